"""What this machine's part of the cluster takes in memory, by what it is for.

The measure is PSS, the proportional set size: a page that several processes share counts in parts,
so the figures of all processes add up to what is really taken. Linux only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hcna_ray.supervisor.processes import PROC

#: What a command line tells, in the order in which it is asked. ``ray::`` names come from Ray's
#: own renaming of its processes.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"/gcs/gcs_server\b", "Ray GCS"),
    (r"/raylet/raylet\b", "Ray raylet"),
    (r"ray/dashboard/dashboard\.py|^ray-dashboard-", "Ray dashboard"),
    (r"^ray::DashboardAgent|ray/dashboard/agent\.py", "Ray dashboard agent"),
    (r"^ray::RuntimeEnvAgent|runtime_env/agent/main\.py", "Ray runtime env agent"),
    (r"ray/_private/log_monitor\.py", "Ray log monitor"),
    (r"ray/autoscaler/.*monitor\.py", "Ray monitor (autoscaler)"),
    (r"^ray::ServeController", "Serve controller"),
    (r"^ray::(?:ProxyActor|HAProxyManager)|haproxy .*/serve/", "Serve proxy and HAProxy"),
    (r"^ray::ServeReplica:hcna-c1:", "C1 replica"),
    (r"^ray::ModeratorActor", "moderator"),
    (r"^ray::ArtifactsActor", "artifacts"),
    (r"^ray::NodeAgent", "agent"),
    (r"^ray::(?:slot:|run_slot)", "slots"),
    (r"^ray::IDLE", "idle Ray workers"),
    (r"hcna_ray\.runtime\.executor", "executors"),
    (r"supervisor/keeper\.py|hcna_ray\.supervisor\.ray_start", "keeper of the Ray node"),
    (r"hcna_ray\.supervisor\b", "supervisor"),
    (r"haproxy .*edge\.cfg", "control edge"),
    (r"hcna_ray\.runtime\.bootstrap", "bootstrap"),
)
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _KINDS)
OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Processes of one kind on one node."""

    kind: str
    count: int
    pss_bytes: int


@dataclass(frozen=True, kw_only=True)
class NodeMemory:
    """Everything of one node, the largest first."""

    node: str
    groups: tuple[Group, ...]
    count: int
    pss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the processes of an instance on this machine take."""

    nodes: tuple[NodeMemory, ...]
    count: int
    pss_bytes: int
    #: Processes whose memory this user may not see; they are not in the sums.
    unreadable: int


def can_measure(proc: Path = PROC) -> bool:
    """Whether this system tells what a process takes."""
    return (proc / "self" / "smaps_rollup").exists()


def measure(pids: Iterable[int], *, own_node: str, proc: Path = PROC) -> Memory:
    """Return what the processes take, by node and kind, where `can_measure`.

    Args:
        pids: The processes of the instance. One that has ended meanwhile is passed over.
        own_node: Node of what belongs to no Ray node, such as the supervisor.
        proc: Where the process file system is.
    """
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    commands: dict[int, str] = {}
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    unreadable = 0
    for pid in pids:
        command, parent = _command(proc, pid), _parent(proc, pid)
        if not command or parent is None:
            continue
        commands[pid], parents[pid] = command, parent
        try:
            sizes[pid] = _pss(proc, pid)
        except PermissionError:
            unreadable += 1
        except (OSError, ValueError):
            continue
    for pid, size in sizes.items():
        node = _node_of(proc, pid, parents) or own_node
        found[node, _kind_of(pid, commands, parents)].append(size)
    by_node: dict[str, list[Group]] = defaultdict(list)
    for (node, kind), values in found.items():
        by_node[node].append(Group(kind=kind, count=len(values), pss_bytes=sum(values)))
    nodes = tuple(
        NodeMemory(
            node=node,
            groups=tuple(sorted(groups, key=lambda group: -group.pss_bytes)),
            count=sum(group.count for group in groups),
            pss_bytes=sum(group.pss_bytes for group in groups),
        )
        for node, groups in sorted(by_node.items())
    )
    return Memory(
        nodes=nodes,
        count=len(sizes),
        pss_bytes=sum(sizes.values()),
        unreadable=unreadable,
    )


def kind_of(command: str) -> str:
    """Return what a process is for, by its command line."""
    for pattern, kind in _COMPILED:
        if pattern.search(command):
            return kind
    return OTHER


def _kind_of(pid: int, commands: Mapping[int, str], parents: Mapping[int, int]) -> str:
    """Return what a process is for: a helper without a name of its own is its parent's."""
    kind = kind_of(commands[pid])
    if kind == OTHER and "multiprocessing" in commands[pid] and parents[pid] in commands:
        return kind_of(commands[parents[pid]])
    return kind


def _node_of(proc: Path, pid: int, parents: Mapping[int, int]) -> str | None:
    """Return the Ray node that a process belongs to: its own mark, or that of one above it.

    Ray renames its processes, which overwrites the environment that can be seen.
    """
    seen: set[int] = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        for word in _read(proc, pid, "environ").split(b"\0"):
            if word.startswith(b"HCNA_NODE="):
                return word.removeprefix(b"HCNA_NODE=").decode("utf-8", "replace")
        pid = parents[pid]
    return None


def _pss(proc: Path, pid: int) -> int:
    for line in (proc / str(pid) / "smaps_rollup").read_bytes().splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no Pss")


def _command(proc: Path, pid: int) -> str:
    raw = _read(proc, pid, "cmdline")
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()


def _parent(proc: Path, pid: int) -> int | None:
    fields = _read(proc, pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def _read(proc: Path, pid: int, name: str) -> bytes:
    try:
        return (proc / str(pid) / name).read_bytes()
    except OSError:
        return b""

"""Processes by identity: a pid together with its start time, so that a reused pid is never hit.

Linux only (``/proc``, pidfd). Every process of an instance carries two variables in its
environment, ``HCNA_HOME`` and ``HCNA_CLUSTER_ID``; that is how they are found again when the
supervisor was killed and nobody remembers their pids.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class ProcessRef:
    """One process for ever: ``started_ticks`` is its start in clock ticks since boot."""

    pid: int
    started_ticks: int


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What tells the processes of one instance from all others."""

    home: Path
    cluster_id: str
    temp_dir: Path

    def environment(self) -> dict[str, str]:
        """Return the variables that mark a process as one of this instance."""
        return {"HCNA_HOME": str(self.home), "HCNA_CLUSTER_ID": self.cluster_id}


def identify(pid: int) -> ProcessRef | None:
    """Return the identity of a running process, or None if there is none (or only a zombie)."""
    stat = _stat(pid)
    if stat is None or stat[0] in "ZX":
        return None
    return ProcessRef(pid, stat[2])


def is_alive(process: ProcessRef) -> bool:
    """Whether exactly this process still runs."""
    return identify(process.pid) == process


def send(process: ProcessRef, signum: signal.Signals) -> bool:
    """Signal exactly this process; False if it is gone. A reused pid cannot be hit."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(descriptor, signum)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_gone(processes: Iterable[ProcessRef], *, timeout_s: float) -> list[ProcessRef]:
    """Wait until the processes have ended; return those that have not. Reaps own children."""
    waiting = list(processes)
    deadline = time.monotonic() + timeout_s
    while True:
        for process in waiting:
            reap(process.pid)
        waiting = [process for process in waiting if is_alive(process)]
        if not waiting or time.monotonic() >= deadline:
            return waiting
        time.sleep(0.05)


def stop(
    processes: Iterable[ProcessRef], *, term_s: float, kill_s: float = 5.0
) -> list[ProcessRef]:
    """Ask the processes to end, then make them; return those that even then have not."""
    targets = list(processes)
    for process in targets:
        send(process, signal.SIGTERM)
    left = wait_gone(targets, timeout_s=term_s)
    for process in left:
        send(process, signal.SIGKILL)
    return wait_gone(left, timeout_s=kill_s)


def reap(pid: int) -> int | None:
    """Collect the exit code of an ended child; None if it runs or is not our child."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if ended else None


def become_subreaper() -> None:
    """Adopt orphans below this process, so that what a dead Ray node leaves can be reaped."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def scan(marker: Marker, *, node: str | None = None) -> list[ProcessRef]:
    """Find every process of an instance but this one and those above it.

    A process counts if its environment carries the marker, if it is one of Ray's with an open file
    below the instance's temporary directory (Ray renames its processes, which overwrites their
    environment as ``/proc`` shows it), or if its parent counts. With ``node`` only what belongs to
    that Ray node (``HCNA_NODE``) and its descendants is returned, and renamed processes only if
    they are orphans: their node is dead, but they may hold its ports for a while. Processes of
    containers are not looked at: another instance may live there under the same paths.
    """
    wanted = {f"{name}={value}".encode() for name, value in marker.environment().items()}
    if node is not None:
        wanted.add(f"HCNA_NODE={node}".encode())
    parents: dict[int, int] = {}
    found: dict[int, ProcessRef] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        stat = _stat(pid)
        if stat is None or stat[0] in "ZX":
            continue
        parents[pid] = stat[1]
        if _owner(pid) != os.getuid() or not _is_of_this_system(pid):
            continue
        left_over = node is None or stat[1] in (1, os.getpid())
        renamed = left_over and _is_renamed_ray_process(pid, marker.temp_dir)
        if renamed or wanted <= set(_read(pid, "environ").split(b"\0")):
            found[pid] = ProcessRef(pid, stat[2])
    above = _ancestors(os.getpid(), parents)
    for pid in parents:
        if pid not in found and found.keys() & _ancestors(parents[pid], parents):
            process = identify(pid)
            if process is not None and _owner(pid) == os.getuid():
                found[pid] = process
    return [process for pid, process in sorted(found.items()) if pid not in above]


def describe(process: ProcessRef) -> str:
    """Return pid and command of a process for a person, at most 120 characters of it."""
    command = _read(process.pid, "cmdline").replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return f"{process.pid} {command[:120]}".strip()


def _ancestors(pid: int, parents: Mapping[int, int]) -> set[int]:
    """Return ``pid`` and every process above it."""
    line: set[int] = set()
    while pid > 0 and pid not in line:
        line.add(pid)
        pid = parents.get(pid, 0)
    return line


def _is_renamed_ray_process(pid: int, temp_dir: Path) -> bool:
    if not _read(pid, "cmdline").startswith(b"ray::"):
        return False
    prefix = f"{temp_dir}/"
    try:
        descriptors = list((PROC / str(pid) / "fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(descriptor).startswith(prefix):
                return True
        except OSError:
            continue
    return False


def _is_of_this_system(pid: int) -> bool:
    """Whether a process counts its like as we do: one in a container may have equal paths."""
    try:
        return os.readlink(PROC / str(pid) / "ns/pid") == os.readlink(PROC / "self/ns/pid")
    except OSError:
        return False


def _owner(pid: int) -> int | None:
    try:
        return (PROC / str(pid)).stat().st_uid
    except OSError:
        return None


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> tuple[str, int, int] | None:
    """Return (state, parent pid, start in ticks). The name may hold blanks and parentheses."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if len(fields) < 20:
        return None
    return fields[0].decode(), int(fields[1]), int(fields[19])

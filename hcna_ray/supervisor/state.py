"""Files below ``run/`` and the lock: what `up`, `down`, `status` and the daemon tell each other.

``supervisor.lock``   held (flock) by the daemon for all its life
``supervisor.pid``    its pid
``state.json``        its members, for those who look and for the daemon after it
``cluster.json``      where the cluster is, for clients
``settings.yaml``     the settings in force, for every process of the instance
``ray.env``           what a shell needs for Ray's own commands and drivers: ``. run/ray.env``
``firewall.nft``      the rules that close Ray's ports, set or to be set by hand
``order``             what `down` wants of the daemon beyond its own end: ``cluster_down``
``restore.pending``   there while a restore puts files in place: nothing may be started
``goodbye``           asks the worker's agent to hand its work back; ``goodbye.done`` is the answer
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hcna_ray.config import Settings
from hcna_ray.durable import make_private_dir, write_private
from hcna_ray.supervisor.ports import marker_of, ray_environment
from hcna_ray.supervisor.processes import ProcessRef, identify

SCHEMA = 1
RUN_FILES = (
    "supervisor.pid",
    "state.json",
    "cluster.json",
    "settings.yaml",
    "ray.env",
    "edge.cfg",
    "serve-haproxy",
    "firewall.nft",
    "order",
    "goodbye",
    "goodbye.done",
    "moderator.sock",
)

#: An order to the daemon: the whole cluster stops, not only this machine.
CLUSTER_DOWN = "cluster_down"


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """Where a running cluster is. ``run/cluster.json`` holds the same fields."""

    url: str
    control_url: str
    ray_address: str
    dashboard_url: str
    home: str
    started_at: float
    cluster_id: str
    temp_dir: str
    #: C1 for other machines; None if they cannot reach it.
    public_url: str | None = None


class RunLock:
    """The daemon's lock. Whoever holds it is the one supervisor of the home."""

    def __init__(self, run_dir: Path) -> None:
        """Remember where the lock is; nothing is taken yet."""
        self._path = run_dir / "supervisor.lock"
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free. A file that was replaced meanwhile does not count."""
        make_private_dir(self._path.parent)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            try:
                if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:
                    self._descriptor = descriptor
                    return True
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def release(self) -> None:
        """Remove the file, then give the lock back. Does nothing if it is not held."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def is_free(self) -> bool:
        """Whether nobody holds the lock now."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


def write_settings(settings: Settings) -> None:
    """Write the settings in force, so that every process of the instance sees the same ones."""
    data = settings.model_dump(mode="json", exclude={"home", "source"}, exclude_none=True)
    header = "# The settings in force, written by hcna up; changes here are lost.\n"
    write_private(
        settings.run_dir / "settings.yaml", header + yaml.safe_dump(data, sort_keys=False)
    )


def write_cluster(settings: Settings, *, started_at: float) -> ClusterInfo:
    """Write ``cluster.json`` and return what is in it."""
    info = ClusterInfo(
        url=settings.api_url,
        control_url=settings.control_url,
        ray_address=settings.ray_address,
        dashboard_url=settings.dashboard_url,
        home=str(settings.home),
        started_at=started_at,
        cluster_id=marker_of(settings).cluster_id,
        temp_dir=str(marker_of(settings).temp_dir),
        public_url=settings.public_url(socket.gethostname()) if settings.has_edge else None,
    )
    write_private(settings.run_dir / "cluster.json", json.dumps(asdict(info), indent=2) + "\n")
    return info


def write_ray_env(settings: Settings, ray_address: str) -> None:
    """Write ``ray.env``: the settings that every node has, where the cluster is, and its token."""
    variables = {
        **ray_environment(settings),
        "RAY_ADDRESS": ray_address,
        "RAY_API_SERVER_ADDRESS": settings.dashboard_url,
        "RAY_DASHBOARD_ADDRESS": settings.dashboard_url,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    header = "# For Ray's own commands and drivers on this machine; written at every start.\n"
    write_private(settings.run_dir / "ray.env", header + "\n".join(lines) + "\n")


def read_cluster(run_dir: Path) -> ClusterInfo | None:
    """Return what ``cluster.json`` says, or None if no cluster was started or its file is odd."""
    data = read_json(run_dir / "cluster.json")
    try:
        return ClusterInfo(**data)
    except TypeError:
        return None


def write_state(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Write ``state.json``: the daemon's view of its members."""
    write_private(run_dir / "state.json", json.dumps({"schema": SCHEMA, **state}, indent=2) + "\n")


def read_state(run_dir: Path) -> dict[str, Any]:
    """Return the last written state, or {} if there is none that we understand."""
    data = read_json(run_dir / "state.json")
    return data if data.get("schema") == SCHEMA else {}


def recorded_process(state: Mapping[str, Any], name: str) -> ProcessRef | None:
    """Return the process that the state names for a member, if exactly that one still runs."""
    member = state.get("members", {}).get(name) or {}
    pid, ticks = member.get("pid"), member.get("started_ticks")
    if not isinstance(pid, int) or not isinstance(ticks, int):
        return None
    process = ProcessRef(pid, ticks)
    return process if identify(pid) == process else None


def recorded_end(state: Mapping[str, Any], name: str) -> float | None:
    """Return when the certificate of a recorded member ends, if the state says so."""
    ends_at = (state.get("members", {}).get(name) or {}).get("certificate_ends_at")
    return float(ends_at) if isinstance(ends_at, int | float) else None


def read_supervisor(run_dir: Path) -> ProcessRef | None:
    """Return the running supervisor that ``supervisor.pid`` names, or None."""
    data = read_json(run_dir / "supervisor.pid")
    pid, ticks = data.get("pid"), data.get("started_ticks")
    if not isinstance(pid, int) or not isinstance(ticks, int):
        return None
    process = ProcessRef(pid, ticks)
    return process if identify(pid) == process else None


def write_supervisor(run_dir: Path, process: ProcessRef) -> None:
    """Write ``supervisor.pid``: pid and start time, as JSON."""
    write_private(run_dir / "supervisor.pid", json.dumps(asdict(process)) + "\n")


def remove_run_files(run_dir: Path) -> None:
    """Remove all that describes a running instance. The lock is removed by its holder."""
    for name in RUN_FILES:
        (run_dir / name).unlink(missing_ok=True)


def write_order(run_dir: Path, order: str) -> None:
    """Leave an order for the daemon, which looks when it ends."""
    write_private(run_dir / "order", order + "\n")


def read_order(run_dir: Path) -> str | None:
    """Return the order that was left, if there is one."""
    try:
        return (run_dir / "order").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def restore_mark(run_dir: Path) -> Path:
    """Return the file that is there while a restore puts files in place."""
    return run_dir / "restore.pending"


def pending_restore(run_dir: Path) -> str | None:
    """Return why this home must not be started, a restore that was cut off; None if it may."""
    if not restore_mark(run_dir).exists():
        return None
    return (
        f"a restore of {run_dir.parent} was cut off, so its store may be missing: "
        "run the same hcna restore again, with --force"
    )


def goodbye_order(run_dir: Path) -> Path:
    """Return the file whose presence asks the worker's agent to hand its work back."""
    return run_dir / "goodbye"


def goodbye_done(run_dir: Path) -> Path:
    """Return the file with which the agent says that it has."""
    return run_dir / "goodbye.done"


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, or {} if the file is missing or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}

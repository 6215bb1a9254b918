"""What the command line calls: bring the cluster up, take it down, say how it is.

All three may be called at any time, twice, and after any process was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hcna_ray.config import ConfigError, Settings, load_settings, with_shared
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import make_private_dir
from hcna_ray.security.keys import ensure_owner_key
from hcna_ray.supervisor import probe
from hcna_ray.supervisor.addresses import outward_addresses
from hcna_ray.supervisor.daemon import EXIT_ALREADY_RUNNING
from hcna_ray.supervisor.firewall import (
    BY_HAND,
    clear,
    commands_for,
    words_on_open_ports,
)
from hcna_ray.supervisor.invites import create_invite
from hcna_ray.supervisor.launcher import head_address, with_address
from hcna_ray.supervisor.membership import read_membership
from hcna_ray.supervisor.ports import marker_of, process_environment, taken_ports
from hcna_ray.supervisor.processes import describe, reap, scan, send, stop, wait_gone
from hcna_ray.supervisor.state import (
    CLUSTER_DOWN,
    ClusterInfo,
    RunLock,
    read_cluster,
    read_state,
    read_supervisor,
    recorded_process,
    remove_run_files,
    write_order,
    write_settings,
)

_POLL_S = 0.1


class StartFailed(HcnaError):
    """The cluster did not come up. The text says what went wrong last and where to look."""

    code = "start_failed"


class StopFailed(HcnaError):
    """Something could not be stopped. The text names it."""

    code = "stop_failed"


@dataclass(frozen=True, kw_only=True)
class MemberStatus:
    """One process below the supervisor."""

    name: str
    pid: int | None
    up: bool
    port: int
    restarts: int


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """How the instance is. ``state`` is ``up``, ``starting``, ``unsupervised`` or ``down``.

    ``unsupervised``: its processes run, but the supervisor is gone; `up` adopts them.
    """

    state: str
    supervisor_pid: int | None
    ready: bool
    worker_nodes: int
    members: tuple[MemberStatus, ...]
    info: ClusterInfo | None
    #: ``head`` on M1's machine, ``worker`` on one that has joined.
    role: str = "head"


@dataclass(frozen=True, kw_only=True)
class DownReport:
    """What `down` found and did. ``left`` and ``ports_open`` are empty when all went well."""

    was_running: bool
    #: Processes ended in the sweep after the supervisor had gone (pid and command).
    swept: tuple[str, ...]
    left: tuple[str, ...]
    ports_open: tuple[int, ...]
    took_s: float


def machine_settings(settings: Settings) -> Settings:
    """Return the settings of this machine: on one that has joined, under M1's decisions."""
    membership = read_membership(settings.cluster_dir)
    if membership is not None:
        host = membership.ray_address.rpartition(":")[0]
        return with_shared(settings, membership.shared, membership.node_id, moderator=host)
    launched = head_address(settings)
    if launched is None or settings.ray.node_address is not None:
        return settings
    return with_address(settings, launched)


def without_worker(settings: Settings) -> Settings:
    """Return the settings of an M1 that runs no tasks itself."""
    moderator = settings.moderator.model_copy(update={"local_worker": "never"})
    return settings.model_copy(update={"moderator": moderator})


def invite(settings: Settings, *, now: float) -> str:
    """Return a fresh join code for one machine, good for an hour. M1 runs."""
    in_force = _settings_in_force(settings)
    addresses = outward_addresses(in_force.ray.node_address)
    return create_invite(in_force, addresses=addresses, now=now)[0]


def up(settings: Settings, *, wait_s: float, on_step: Callable[[str], None]) -> ClusterInfo | None:
    """Start this machine's part of the cluster, or find it running, and wait until it is in.

    On M1's machine that is: C1 ready and, if this machine works too, its worker online. On a
    machine that has joined: its worker confirmed by M1.

    Args:
        settings: What to start. If an instance of this home runs, its own settings stay in force.
        wait_s: How long to wait; the supervisor goes on trying after that.
        on_step: Told each step in a few words, as it happens.

    Returns:
        Where the cluster is, for clients of M1's machine; None on a machine that has joined.

    Raises:
        ConfigError: C1 would be open to others in clear.
        StartFailed: Not ready within ``wait_s``, or the supervisor gave up (ports in use, ...).
    """
    run_dir = settings.run_dir
    make_private_dir(run_dir)
    joined = read_membership(settings.cluster_dir) is not None
    settings = machine_settings(settings)
    if not joined:
        ensure_owner_key(settings.keys_dir, now=time.time())
    steps = _Steps(settings.logs_dir / "supervisor.log")
    daemon: int | None = None
    told: tuple[str, ...] = ()
    deadline = time.monotonic() + wait_s
    while True:
        if daemon is None and RunLock(run_dir).is_free():
            if not _has_members(run_dir):
                if not joined:
                    settings.check_start()
                write_settings(settings)
            daemon = _start_daemon(settings)
            on_step("starting the supervisor")
        for step in steps.new():
            on_step(step)
        if joined:
            if _working(settings):
                _tell_open_ports(settings, on_step)
                return None
        elif (info := _running(settings)) is not None:
            _tell_open_ports(settings, on_step)
            return info
        else:
            told = _tell_reasons(settings, told, on_step)
        if daemon is not None and (code := reap(daemon)) is not None:
            daemon = None
            if code != EXIT_ALREADY_RUNNING:
                raise StartFailed(_last_words(settings, f"the supervisor ended with code {code}"))
        if time.monotonic() >= deadline:
            raise StartFailed(_last_words(settings, f"not ready after {wait_s:g} s"))
        time.sleep(_POLL_S)


def _tell_reasons(
    settings: Settings, told: tuple[str, ...], on_step: Callable[[str], None]
) -> tuple[str, ...]:
    """Say why C1 is not ready yet, once each, if that is for something outside."""
    in_force = _settings_in_force(settings)
    why = probe.why_not_ready(in_force.serve_host, in_force.serve_port)
    if why and why != told and probe.STORE_REASONS.issuperset(why):
        on_step(f"not ready yet: {', '.join(why)} (see hcna status)")
        return why
    return told


def _tell_open_ports(settings: Settings, on_step: Callable[[str], None]) -> None:
    """Say so if hcna may not close Ray's ports, and what closes them."""
    told = read_state(settings.run_dir).get("firewall") or {}
    words = words_on_open_ports(told)
    if words:
        joined = read_membership(settings.cluster_dir) is not None
        on_step(f"note: {words}. To close them ({BY_HAND}):")
        in_force = _settings_in_force(settings)
        for command in commands_for(in_force, "worker" if joined else "head", told):
            on_step(f"  {command}")


def down(
    settings: Settings, *, on_step: Callable[[str], None], everywhere: bool = True
) -> DownReport:
    """Stop everything of this home, whoever started it, and leave no process, port or lock.

    Args:
        settings: Of this machine.
        on_step: Told each step in a few words, as it happens.
        everywhere: On M1's machine: tell the machines that have joined to stop as well.

    Raises:
        StopFailed: A process or a listening port is left. The report's fields are in the text.
    """
    started = time.monotonic()
    run_dir, marker = settings.run_dir, marker_of(settings)
    in_force = _settings_in_force(settings)
    supervisor = read_supervisor(run_dir)
    was_running = supervisor is not None
    steps = _Steps(settings.logs_dir / "supervisor.log")
    if supervisor is not None:
        on_step("stopping the supervisor")
        if everywhere and read_membership(settings.cluster_dir) is None:
            write_order(run_dir, CLUSTER_DOWN)
        send(supervisor, signal.SIGTERM)
        deadline = time.monotonic() + 3 * settings.ray.stop_s + 25
        while wait_gone([supervisor], timeout_s=_POLL_S) and time.monotonic() < deadline:
            for step in steps.new():
                on_step(step)
        for step in steps.new():
            on_step(step)
        stop([supervisor], term_s=0)
    lock = RunLock(run_dir)
    if not lock.acquire():
        raise StopFailed(f"another supervisor has just started for {settings.home}; try again")
    try:
        state = read_state(run_dir)
        known = {recorded_process(state, name) for name in ("edge", "worker", "head")}
        found = [*(process for process in known if process), *scan(marker)]
        swept = tuple(describe(process) for process in dict.fromkeys(found))
        if swept:
            was_running = True
            on_step(f"ending {len(swept)} processes that were left")
            stop(dict.fromkeys(found), term_s=settings.ray.stop_s / 2)
        left = tuple(describe(process) for process in scan(marker))
        joined = read_membership(settings.cluster_dir) is not None
        ports = taken_ports(in_force, worker_only=joined) if was_running else {}
        ports_open = tuple(sorted(ports))
        if not left:
            # Still there only after a supervisor that was killed.
            if problem := clear(settings):
                on_step(f"the firewall's rules are left: {problem}")
            remove_run_files(run_dir)
    finally:
        lock.release()
    if left or ports_open:
        raise StopFailed(
            f"left after down: processes {', '.join(left) or 'none'}; "
            f"ports {', '.join(map(str, ports_open)) or 'none'} (see: ss -ltnp)"
        )
    return DownReport(
        was_running=was_running,
        swept=swept,
        left=left,
        ports_open=ports_open,
        took_s=time.monotonic() - started,
    )


def status(settings: Settings) -> ClusterStatus:
    """Return how the instance of this home is, by looking (at most 4 s)."""
    run_dir = settings.run_dir
    supervisor = read_supervisor(run_dir)
    state = read_state(run_dir)
    members = tuple(
        MemberStatus(
            name=name,
            pid=process.pid if (process := recorded_process(state, name)) else None,
            up=bool(entry.get("up")) and process is not None,
            port=int(entry.get("port", 0)),
            restarts=int(entry.get("restarts", 0)),
        )
        for name, entry in state.get("members", {}).items()
    )
    alive = any(member.pid for member in members)
    in_force = _settings_in_force(settings)
    joined = read_membership(settings.cluster_dir) is not None
    host, port = in_force.serve_host, in_force.serve_port
    if joined:
        ready = alive and probe.is_connected(in_force.worker_host, in_force.worker_port)
        workers = int(ready)
    else:
        ready = alive and probe.is_ready(host, port)
        workers = probe.online_workers(host, port) if ready else 0
    if supervisor is None:
        word = "unsupervised" if alive else "down"
    else:
        word = "up" if ready and (workers or "worker" not in state["members"]) else "starting"
    return ClusterStatus(
        state=word,
        supervisor_pid=supervisor.pid if supervisor else None,
        ready=ready,
        worker_nodes=workers,
        members=members,
        info=read_cluster(run_dir) if supervisor or alive else None,
        role="worker" if joined else "head",
    )


def _has_members(run_dir: Path) -> bool:
    """Whether members of an earlier supervisor run on: it was killed, they can be adopted."""
    state = read_state(run_dir)
    return any(recorded_process(state, name) for name in state.get("members", {}))


def _running(settings: Settings) -> ClusterInfo | None:
    """Return where the cluster is if it is up: supervised, C1 ready, a worker online."""
    if read_supervisor(settings.run_dir) is None:
        return None
    info = read_cluster(settings.run_dir)
    if info is None:
        return None
    in_force = _settings_in_force(settings)
    host, port = in_force.serve_host, in_force.serve_port
    works = "worker" in read_state(settings.run_dir).get("members", {})
    if not probe.is_ready(host, port) or (works and probe.online_workers(host, port) < 1):
        return None
    return info


def _working(settings: Settings) -> bool:
    """Whether this machine's worker is supervised and confirmed by M1."""
    if read_supervisor(settings.run_dir) is None:
        return False
    in_force = _settings_in_force(settings)
    return probe.is_connected(in_force.worker_host, in_force.worker_port)


def _settings_in_force(settings: Settings) -> Settings:
    """Return the settings the running instance was started with; else those given."""
    path = settings.run_dir / "settings.yaml"
    try:
        found = path.stat()
        return _read_settings(settings.home, path, (found.st_ino, found.st_mtime_ns))
    except (FileNotFoundError, ConfigError):
        return settings  # None yet, or of another version: what was given is the better guess.


@lru_cache(maxsize=1)
def _read_settings(home: Path, path: Path, version: tuple[int, int]) -> Settings:
    """Read a file of settings, once for each version: whoever waits asks five times a second."""
    return load_settings(home=home, path=path, env={})


def _start_daemon(settings: Settings) -> int:
    """Start the daemon in a session of its own; return its pid."""
    make_private_dir(settings.logs_dir)
    with (settings.logs_dir / "supervisor.out").open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "hcna_ray.supervisor"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=process_environment(settings, os.environ),
            cwd=settings.home,
            start_new_session=True,
        )
    child.returncode = 0  # It outlives us; `reap` collects it if it ends before that.
    return child.pid


def _last_words(settings: Settings, what: str) -> str:
    """Return ``what`` with the last error that the supervisor logged, and where to read more."""
    errors = [
        line
        for line in _Steps(settings.logs_dir / "supervisor.log", from_start=True).lines()
        if line.get("level") in ("error", "critical")
    ]
    parts = [what]
    if errors:
        parts.append(str(errors[-1].get("message", "")))
        output = str(errors[-1].get("output", "")).strip().splitlines()
        if output:
            parts.append(output[-1][:300])
    return f"{': '.join(parts)} (more in {settings.logs_dir / 'supervisor.log'})"


class _Steps:
    """Reads what the supervisor logs from now on."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        size = path.stat().st_size if path.exists() else 0
        self._offset = max(0, size - 65536) if from_start else size

    def new(self) -> list[str]:
        """Return the messages since the last call."""
        return [str(line["message"]) for line in self.lines() if "message" in line]

    def lines(self) -> Iterator[dict[str, object]]:
        try:
            with self._path.open("rb") as stream:
                if self._path.stat().st_size < self._offset:
                    self._offset = 0  # The file was rotated.
                stream.seek(self._offset)
                raw = stream.read()
        except OSError:
            return
        whole, newline, _ = raw.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line

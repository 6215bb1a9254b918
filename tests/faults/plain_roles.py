"""What the processes of a run without Ray are: moderator, C1, agents and slots of workers.

The classes are the product's; what Ray does between them, starting processes and carrying calls,
is done by the spawner and by Unix sockets. `tests.faults.spawner` forks them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import signal
import traceback
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from ulid import ULID

from hcna_ray import failpoints
from hcna_ray.config import LimitSettings, RaySettings, Settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError
from hcna_ray.handlers import load_registry
from hcna_ray.runtime import executor
from hcna_ray.runtime import moderator as moderator_rules
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.host import HostSettings, SlotHost
from hcna_ray.runtime.messages import (
    Exchange,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Offer,
    Report,
    SlotGone,
    Welcome,
)
from hcna_ray.runtime.nursery import ProcessNursery
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Reports
from hcna_ray.security.authority import (
    begin_rollover,
    ensure_node,
    finish_rollover,
    install_node,
    is_rolling_over,
    request_node,
    revoke,
    sign_request,
)
from hcna_ray.security.certs import ensure_server
from hcna_ray.store import migrations
from hcna_ray.store.migrate import copy_back, copy_store
from hcna_ray.store.migrations import Migration
from hcna_ray.store.sqlite import SqliteTaskStore
from hcna_ray.supervisor.backup import backup, restore
from hcna_ray.supervisor.rounds import announce, read_round, take_over
from tests.support import moderator_process
from tests.support.checked_run import HEARTBEAT_S, application
from tests.support.checked_tasks import TASK_TYPES
from tests.support.moderator_process import SocketLink
from tests.support.workshop import NoArtifacts

#: A heavy attempt's process has this long to deliver its outcome.
_FLUSH_S = 5.0


def import_everything() -> None:
    """Load what processes load when they begin, so that those forked from this one need not."""
    load_registry()
    from hcna_ray.api import app  # noqa: F401
    from hcna_ray.runtime import restore as _restore  # noqa: F401


def settings_of(home: Path) -> Settings:
    """Return the settings of a machine that is backed up or restored."""
    return Settings(
        home=home,
        limits=LimitSettings(disk_free_bytes_min=0),
        ray=RaySettings(temp_dir=home / "ray"),  # Others' Ray is none of this home's.
    )


# -- M1 --------------------------------------------------------------------------------------------


def moderator(
    store: str,
    socket: str,
    policy: dict[str, Any],
    wal_bytes_max: int | None = None,
    prune_period_s: float | None = None,
) -> None:
    """The moderator and its SQLite store; with a small log it is carried over often."""
    if prune_period_s is not None:
        moderator_rules.PRUNE_PERIOD_S = prune_period_s
    if wal_bytes_max is not None:

        class SmallLog(SqliteTaskStore):
            def __init__(self, path: Path, **more: Any) -> None:
                super().__init__(path, wal_bytes_max=wal_bytes_max, **more)

        moderator_process.SqliteTaskStore = SmallLog  # type: ignore[misc]
    asyncio.run(moderator_process._main(Path(store), Path(socket), Policy(**policy)))


def c1(home: str, store: str, moderator_socket: str, socket: str) -> None:
    """C1 on a Unix socket."""
    app = application(Path(home), Path(store), SocketLink(Path(moderator_socket)))
    uvicorn.run(app, uds=socket, lifespan="on", log_level="warning", access_log=False)


def store_opened(store: str, more_migrations: list[tuple[int, str, str]]) -> None:
    """Open a store as the moderator of a later hcna-ray would, migrate it, and end."""
    known = migrations.known_migrations()
    later = [Migration(number, name, sql, f"{number:064}") for number, name, sql in more_migrations]

    def all_of_them(_folder: str = "schema") -> list[Migration]:
        return [*known, *later]

    migrations.known_migrations = all_of_them  # type: ignore[assignment]
    SqliteTaskStore(Path(store)).close()


def backed_up(home: str, to: str, now: float, passphrase: str | None = None) -> None:
    """`hcna backup`."""
    backup(settings_of(Path(home)), to=Path(to), now=now, passphrase=passphrase)


def worker_backed_up(home: str, to: str, worker: str, now: float) -> None:
    """`hcna backup --worker`."""
    backup(settings_of(Path(home)), to=Path(to), now=now, worker=worker)


def restored(
    home: str, archive: str, now: float, passphrase: str | None = None, force: bool = False
) -> None:
    """`hcna restore`."""
    restore(settings_of(Path(home)), Path(archive), now=now, passphrase=passphrase, force=force)


def copied(store: str, url: str) -> None:
    """`hcna store migrate`."""
    copy_store(Path(store), url)


def copied_back(store: str, url: str) -> None:
    """Move a store back."""
    copy_back(url, Path(store))


def certified(home: str) -> None:
    """What M1 does before it listens for machines."""
    names, now = ["m1"], datetime.now(UTC)
    ensure_server(Path(home) / "cluster", "gate", names=names, addresses=["127.0.0.1"], now=now)


def authorized(home: str) -> None:
    """The life of an authority and of a member's certificate, from wherever it was cut off."""
    cluster, member, now = Path(home) / "cluster", Path(home) / "member", datetime.now(UTC)
    addresses = ["127.0.0.1"]
    ensure_node(cluster, "M1", names=["m1"], addresses=addresses, now=now)
    made = sign_request(
        cluster,
        request_node(member, "W2"),
        name="W2",
        kind="node",
        names=["w2"],
        addresses=addresses,
        now=now,
    )
    install_node(member, made, (cluster / "trust.pem").read_text("ascii"))
    revoke(cluster, "W2", now=now)
    if not is_rolling_over(cluster):
        begin_rollover(cluster, now=now)
    ensure_node(cluster, "M1", names=["m1"], addresses=addresses, now=now)
    finish_rollover(cluster, now=now)
    keys = Path(home) / "keys"
    if not read_round(cluster).pending:
        announce(cluster, keys, "token", now=now.timestamp())
    take_over(cluster, keys)


# -- a worker --------------------------------------------------------------------------------------


class _Link:
    """The calls of an agent and of a slot to the moderator."""

    def __init__(self, worker: str, incarnation: str, socket: Path) -> None:
        self._worker, self._incarnation = worker, incarnation
        self._link = SocketLink(socket)

    async def hello(self, hello: Hello) -> Welcome:
        welcome: Welcome = await self._link.ask(hello)
        return welcome

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        reply: HeartbeatReply = await self._link.ask(beat, timeout_s=HEARTBEAT_S)
        return reply

    async def exchange(self, exchange: Exchange) -> Grant:
        grant: Grant = await self._link.ask(exchange)
        return grant

    async def slot_gone(self, gone: SlotGone) -> None:
        await self._link.ask(gone)

    async def goodbye(self, bye: Goodbye) -> None:
        await self._link.ask(bye)

    async def report(self, reports: tuple[Report, ...]) -> bool:
        sent = Reports(worker=self._worker, incarnation=self._incarnation, reports=reports)
        try:
            await self._link.ask(sent)
        except HcnaError:
            return False
        return True


class _Slots:
    """`hcna_ray.runtime.agent.Processes`: the spawner starts them, and ends them with the agent."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from tests.faults.spawner import SpawnerLink

        self._arguments = arguments
        self._home = Path(arguments["home"])
        self._spawner = SpawnerLink(Path(arguments["spawner"]), Path(arguments["failpoints"]))
        self._opened: asyncio.Task[None] | None = None
        self._withdrawn: set[str] = set()

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        return self._start(slot, name, None)

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        return self._start(-1, name, base64.b64encode(pickle.dumps(offer)).decode())

    def withdraw(self, name: str) -> None:
        """Have a process that was not started yet never be."""
        self._withdrawn.add(name)

    async def _start(self, slot: int, name: str, offer: str | None) -> None:
        if self._opened is None:
            self._opened = asyncio.create_task(self._spawner.open())
        await self._opened
        if name in self._withdrawn:
            raise RuntimeError("it was withdrawn")
        worker = self._arguments["worker"]
        more = {"slot": slot, "name": name, "offer": offer}
        kept = ("worker", "incarnation", "home", "moderator_socket", "attach_socket")
        arguments = {key: self._arguments[key] for key in kept}
        pid = await self._spawner.start(
            "slot", self._home / "slots.log", {**arguments, **more}, place=f"{worker}.slot"
        )
        status = await self._spawner.ended(pid)
        if status:
            raise RuntimeError(f"its process ended with status {status}")


def agent(**arguments: Any) -> None:
    """A worker's agent."""
    asyncio.run(_agent(arguments))


async def _agent(arguments: Mapping[str, Any]) -> None:
    worker, incarnation = str(arguments["worker"]), str(arguments["incarnation"])
    home = Path(arguments["home"])
    outbox = home / "outbox" / worker

    def describe(reports: tuple[Report, ...]) -> Hello:
        return Hello(
            worker=worker,
            node_id=worker,
            incarnation=incarnation,
            address="",
            cpu=4.0,
            mem_gb=8.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=TASK_TYPES,
            reports=reports,
        )

    one = WorkerAgent(
        AgentSettings(
            worker=worker,
            node_id=worker,
            incarnation=incarnation,
            outbox=outbox,
            run=home / "run" / worker,
            base=int(arguments["slots"]),
            heartbeat_s=float(arguments["heartbeat_s"]),
            self_stop_s=float(arguments["self_stop_s"]),
        ),
        _Link(worker, incarnation, Path(arguments["moderator_socket"])),
        _Slots(arguments),
        SystemClock(),
        describe=describe,
        telemetry=dict,
        new_id=lambda: str(ULID()),
    )

    async def attach(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = json.loads(await reader.readline())
        told = await one.attach(asked["name"], asked["pid"])
        writer.write(json.dumps(told).encode() + b"\n")
        await writer.drain()
        writer.close()

    listening = await asyncio.start_unix_server(attach, arguments["attach_socket"])
    async with listening:
        await one.run()


def slot(**arguments: Any) -> None:
    """A slot of a worker, or one heavy attempt."""
    asyncio.run(_slot(arguments))


async def _slot(arguments: Mapping[str, Any]) -> None:
    worker, incarnation = str(arguments["worker"]), str(arguments["incarnation"])
    home, name = Path(arguments["home"]), str(arguments["name"])
    offer = None if arguments["offer"] is None else _unpacked(arguments["offer"])
    reader, writer = await asyncio.open_unix_connection(arguments["attach_socket"])
    writer.write(json.dumps({"name": name, "pid": os.getpid()}).encode() + b"\n")
    begin = json.loads(await reader.readline())
    if not begin:
        return
    place = home / "failpoints" / f"{worker}.executor"
    place.mkdir(parents=True, exist_ok=True)
    (home / "failpoints" / f"{worker}.slot" / f"alive.{os.getpid()}").touch()
    outbox = home / "outbox" / worker
    nursery = _ForkedNursery(
        {
            "worker": worker,
            "node_id": worker,
            "disk_path": str(home),
            "scratch_root": str(home / "scratch" / worker),
            "long_s": 0.05,
            "report_s": 0.005,
            "result_bytes_max": 1 << 18,
            "outbox": str(outbox),
            "log": str(home / "worker.log"),
        },
        place,
    )
    host = SlotHost(
        HostSettings(
            worker=worker,
            incarnation=incarnation,
            slot=int(arguments["slot"]),
            name=name,
            outbox=outbox,
            attempts_max=16 if offer is None else 1,
        ),
        _Link(worker, incarnation, Path(arguments["moderator_socket"])),
        nursery,
        NoArtifacts(),
        SystemClock(),
    )
    try:
        if offer is None:
            await host.serve()
        else:
            await host.run_once(offer, _FLUSH_S)
    finally:
        await host.end()
        nursery.close()


class _ForkedNursery(ProcessNursery):
    """Forks the nursery instead of starting an interpreter; it has failpoints of its own."""

    def __init__(self, facts: Mapping[str, Any], place: Path) -> None:
        super().__init__(facts)
        self._place = place

    def _start(self, control: int) -> Any:
        pid = os.fork()
        if pid:
            return _Forked(pid)
        status = 1
        try:
            asyncio._set_running_loop(None)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            kept = os.dup2(control, 3, inheritable=False)
            os.closerange(4, 256)
            os.environ["HCNA_FAILPOINTS"] = str(self._place)
            failpoints._armed_in = self._place
            status = executor.main([str(kept), json.dumps(self._facts)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


class _Forked:
    """As much of `subprocess.Popen` as a nursery needs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def kill(self) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int | None:
        return self._look(0)

    def _look(self, how: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self._pid, how)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status


def _unpacked(text: str) -> Offer:
    offer: Offer = pickle.loads(base64.b64decode(text))
    return offer


ROLES: dict[str, Callable[..., None]] = {
    "moderator": moderator,
    "c1": c1,
    "agent": agent,
    "slot": slot,
    "store": store_opened,
    "backup": backed_up,
    "worker-backup": worker_backed_up,
    "restore": restored,
    "copy": copied,
    "copy_back": copied_back,
    "certify": certified,
    "authorize": authorized,
}

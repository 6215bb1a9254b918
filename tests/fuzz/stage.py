"""The whole of C1 in one process, without Ray: replica, Unix socket, M1's actor, SQLite, one agent.

Nothing here stands in for anything but Ray itself: C1 is built as a Serve replica builds it, finds
the moderator at its socket, and the moderator commits to a store on disk.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import ray
from ulid import ULID

from hcna_ray.api import replica
from hcna_ray.config import Settings, load_settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import FailureKind, Progress, Task, TaskError, TaskState, Token
from hcna_ray.core.schedules import Overlap, Reason, Schedule
from hcna_ray.runtime import actors
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.artifacts import open_store
from hcna_ray.runtime.keyring import guard_of
from hcna_ray.runtime.messages import Exchange, Hello, Offer, Report, ReportKind
from hcna_ray.runtime.output import read_output
from hcna_ray.runtime.output_link import OutputLink
from hcna_ray.runtime.ray_link import AgentModeratorLink, SlotModeratorLink
from hcna_ray.security.certs import ensure_ca
from hcna_ray.security.keys import ROLES, create_key, ensure_owner_key
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.support.builders import a_schedule, a_spec, a_task, an_attempt

#: Everybody who asks: nobody, and one of each role. The admin is not the owner of what is there.
CALLERS = ("anonymous", *ROLES)
#: What is in the store before anybody asks, for each owner.
SEEDED = (
    TaskState.COMPLETED,
    TaskState.CANCELLED,
    TaskState.EXPIRED,
    *[TaskState.FAILED] * 3,
    *[TaskState.SCHEDULED] * 5,
)
FILE = b"bytes that somebody has stored"
WORKER = "W1"
#: Schedules of each owner that may be deleted, beside one that is called as the worker.
DELETABLE = ("old-1", "old-2", "old-3", "old-4")
#: Nobody waits here: a request that waits is answered at once, as after its time.
WAIT_S = 0.01
#: How long a slot without work parks.
IDLE_S = 1.0
#: Process ids from here on belong to nobody.
NOBODY = 1 << 30


def _no_ray(*_: object, **__: object) -> NoReturn:
    # Whoever asks Ray for an actor without being connected would start a cluster.
    raise ValueError("there is no Ray here")


class OutputsHere(OutputLink):
    """There is no agent to be asked over Ray: what is not in this home was not printed."""

    async def read(
        self, worker: str, task_id: str, token: Token, offset: int, size: int
    ) -> bytes | None:
        return read_output(self._folder_of(worker), task_id, token, offset, size)


class Stage:
    """An ASGI application that brings up what is behind C1 with its lifespan."""

    def __init__(self, home: Path) -> None:
        """Set up a home: keys, authority, and a store with something of everybody in it."""
        os.environ["HCNA_HOME"] = str(home)
        os.environ["HCNA_LIMITS__WAIT_S_MAX"] = str(WAIT_S)
        os.environ["HCNA_LIMITS__STREAM_S_MAX"] = str(WAIT_S)
        os.environ["HCNA_COMPOSITE__HOSTS"] = '["testserver"]'  # As the fuzzer calls it.
        # Whatever URL is made up, nobody is called: this name has no address.
        os.environ["HCNA_WEBHOOKS__HOSTS"] = '["receiver.invalid"]'
        os.environ["HCNA_SLOTS__EXCHANGE_WAIT_S"] = str(IDLE_S)
        actors.cluster_nodes = list
        replica.OutputLink = OutputsHere  # type: ignore[misc]
        ray.init = ray.get_actor = _no_ray
        self.settings = load_settings()
        self.settings.run_dir.mkdir(parents=True, mode=0o700)
        now = time.time()
        ensure_ca(self.settings.cluster_dir, now=datetime.now(UTC))
        ensure_owner_key(self.settings.keys_dir, now=now)
        self.keys = {
            role: create_key(self.settings.keys_dir, name=role, role=role, now=now)
            for role in ROLES
        }
        #: Ids of what was there from the beginning.
        self.tasks = _fill(self.settings, now)
        self.artifact = _store_file(self.settings)
        self._app: Any = None
        self._running: list[Any] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Serve a request, or the lifespan."""
        if self._app is None:
            # The first is the lifespan; it is told by raising that nothing came up.
            await self._begin()
        await self._app(scope, receive, send)

    async def _begin(self) -> None:
        self._running.append(actors.ModeratorActor())
        await _until(self.settings.moderator_socket.exists)
        agent = an_agent(self.settings)
        self._running += [agent, asyncio.create_task(agent.run())]
        await _until(lambda: agent.connected)
        self._app = replica.build_replica_app(None, None)


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not what():  # noqa: ASYNC110 - a thread, or a socket, sets no event
            await asyncio.sleep(0.01)


class PaperSlots:
    """Slots that say of every second attempt that it failed, and of the others that they did not.

    Implements `hcna_ray.runtime.agent.Processes`.
    """

    def __init__(self, settings: Settings, incarnation: str) -> None:
        self._link = SlotModeratorLink(
            WORKER, incarnation, IDLE_S, guard_of(settings), settings.moderator_socket
        )
        self._incarnation = incarnation
        self.agent: WorkerAgent | None = None

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        return asyncio.ensure_future(self._serve(slot, name))

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        return asyncio.get_running_loop().create_future()  # It waits for ever.

    def withdraw(self, name: str) -> None:
        """Nothing is on its way."""

    async def _serve(self, slot: int, name: str) -> None:
        assert self.agent is not None
        await self.agent.attach(name, NOBODY + slot)
        seq, ended = 0, 0
        reports: tuple[Report, ...] = ()
        while True:
            seq += 1
            asked = Exchange(
                worker=WORKER,
                incarnation=self._incarnation,
                slot=slot,
                seq=seq,
                reports=reports,
            )
            try:
                grant = await self._link.exchange(asked)
            except HcnaError:
                seq -= 1
                await asyncio.sleep(IDLE_S)
                continue
            ended += len(grant.offers)
            reports = tuple(
                _ended(offer, bad=bool((ended + number) % 2))
                for number, offer in enumerate(grant.offers)
            )


def _ended(offer: Offer, *, bad: bool) -> Report:
    now = time.time()
    token = Token(*offer.token)
    if bad:
        kind, result = ReportKind.FAILED, None
        error = TaskError(kind=FailureKind.ERROR, message="it broke", type="ValueError")
    else:
        kind, result, error = ReportKind.COMPLETED, b'{"ok":true}', None
    return Report(
        kind,
        offer.task_id,
        token,
        now,
        started_at=now,
        result=result,
        error=error,
        duration_ms=1.0,
    )


def an_agent(settings: Settings) -> WorkerAgent:
    """Return a worker that is there, answers intents, and makes short work of every task."""
    incarnation = f"{time.time_ns():x}"
    slots = PaperSlots(settings, incarnation)

    def describe(reports: tuple[Report, ...]) -> Hello:
        return Hello(
            worker=WORKER,
            node_id=f"HCNA-{WORKER}--prod--home--v1.0",
            incarnation=incarnation,
            address="10.0.0.2",
            cpu=4.0,
            mem_gb=8.0,
            gpu=0.0,
            resources=(("camera", 1.0),),
            labels=(("room", "north"),),
            task_types=("echo", "sleep", "test.ping"),
            reports=reports,
            machine_id="machine-of-w1",
        )

    slots.agent = WorkerAgent(
        AgentSettings(
            worker=WORKER,
            node_id=f"HCNA-{WORKER}",
            incarnation=incarnation,
            outbox=settings.home / "outbox",
            base=1,
            heartbeat_s=1.0,
        ),
        AgentModeratorLink(IDLE_S, guard_of(settings), settings.moderator_socket),
        slots,
        SystemClock(),
        describe=describe,
        telemetry=lambda: {"cpu_percent": 1.5},
        kill=lambda _pid, _number: None,
        new_id=lambda: str(ULID()),
    )
    return slots.agent


def _fill(settings: Settings, now: float) -> dict[str, list[str]]:
    """Put tasks of every owner and state into the store; return their ids by owner."""
    path = settings.store_path
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = SqliteTaskStore(path)
    ids: dict[str, list[str]] = {}
    with store.transaction():
        seq = 0
        for owner in ROLES:
            store.save_schedules(
                [_a_schedule(name, owner, now) for name in (WORKER, "W2", *DELETABLE)]
            )
            for state in SEEDED:
                seq += 1
                task = _a_task(f"task-{owner}-{seq}", seq, owner, state, now)
                store.insert([task])
                ids.setdefault(owner, []).append(task.id)
                if task.attempt:
                    store.save_attempts([an_attempt(task.id, token=Token(1, 1), started_at=now)])
    store.close()
    return ids


def _a_schedule(name: str, owner: str, now: float) -> Schedule:
    return a_schedule(
        name,
        principal=owner,
        cron="0 3 1 1 *",
        spec=a_spec("", principal=owner, queue="lab"),
        task=b'{"task_type":"echo","queue":"lab"}',
        overlap=Overlap.ALLOW,
        decided_until=now,
        reason=Reason("too_late", "M1 was off", now),
    )


def _a_task(name: str, seq: int, owner: str, state: TaskState, now: float) -> Task:
    error = TaskError(kind=FailureKind.ERROR, message="it broke", type="ValueError", traceback="…")
    more: dict[str, Any] = {}
    if state is TaskState.SCHEDULED:
        more = {"run_at": now + 1e6, "due_at": now + 1e6}
    if state is TaskState.FAILED:
        more = {"error": error, "attempt": 1, "failures": 1}
    if state is TaskState.COMPLETED:
        more = {"result": b'{"said":1}', "attempt": 1}
        more["progress"] = Progress(percent=50.0, message="half of it", at=now)
    return a_task(
        name,
        seq=seq,
        state=state,
        principal=owner,
        accepted_at=now,
        queue="lab",
        metadata=b'{"note":1}',
        **more,
    )


def _store_file(settings: Settings) -> str:
    store = open_store(settings)
    digests = [store.put(FILE, None, owner=owner).sha256 for owner in ROLES]
    return digests[0]

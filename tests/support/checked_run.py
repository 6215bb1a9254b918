"""One real run for the checker, without Ray: clients, C1, a moderator that is killed, two workers.

``python -m tests.support.checked_run RUN_DIR --seed 1 --tasks 300`` leaves in ``RUN_DIR`` what
``python -m tests.checker RUN_DIR`` reads. The moderator and its store are a process that gets
SIGKILL in the middle; C1 is the real application over ASGI; agents and hosts run in this process
and start real executors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from ulid import ULID

from hcna_ray.api.app import build_app
from hcna_ray.api.ids import UlidIds
from hcna_ray.config import LimitSettings, Settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import TaskFilter, TaskState
from hcna_ray.handlers import load_registry
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.host import HostSettings, SlotHost
from hcna_ray.runtime.messages import (
    Exchange,
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
from hcna_ray.runtime.requests import Reports
from hcna_ray.store.artifacts import ArtifactStore
from tests.checker.recorder import Caller, History
from tests.support.c1 import ADMIN_KEY, URL, PaperKeys, PaperOutputs
from tests.support.checked_tasks import TASK_TYPES
from tests.support.moderator_process import SocketLink, SocketModerator, Where, open_reader
from tests.support.read_store import export
from tests.support.workshop import NoArtifacts

REPOSITORY = Path(__file__).parents[2]
#: What this run lets the moderator do; the schedule tells the checker.
POLICY: dict[str, Any] = {
    "heartbeat_s": 0.5,
    "max_concurrent_tasks": 8,
    "queue_tasks_max": 30,
    "concurrency_default": 1,
    "ageing_step_s": 60.0,
}
#: Two clocks of one machine: time.time and its steady copy, which the kernel may slew apart.
CLOCK_ERROR_S = 0.05
DRAIN_S = 30.0
#: How long C1 sends a batch again to a moderator that does not answer.
RESEND_S = 5.0
#: How long an agent waits for the answer to a heartbeat, as over Ray.
HEARTBEAT_S = 4.0
#: How soon the moderator's process, started again at once, must accept.
ACCEPTING_S = 10.0


def install_tasks(folder: Path) -> None:
    """Make `tests.support.checked_tasks` an installed package, here and in what is started."""
    info = folder / "hcna_checked-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hcna-checked\nVersion: 1\n")
    entry = "[hcna_ray.tasks]\nchecked = tests.support.checked_tasks\n"
    (info / "entry_points.txt").write_text(entry)
    os.environ["PYTHONPATH"] = f"{folder}:{REPOSITORY}"
    sys.path.insert(0, str(folder))


class ModeratorProcess:
    """Starts the moderator, kills it, starts it again."""

    def __init__(
        self, store: Where, socket: Path, log: Path, policy: dict[str, Any] | None = None
    ) -> None:
        self._command = [sys.executable, "-m", "tests.support.moderator_process"]
        self._command += [str(store), str(socket), json.dumps(policy or POLICY)]
        self._socket, self._log = socket, log
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond
                self._command, cwd=REPOSITORY, stderr=log, stdin=subprocess.DEVNULL
            )
        while not self._socket.exists():
            assert self._process.poll() is None, self._log.read_text()
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        """``kill -9``."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


class Worker:
    """A worker's agent and hosts in this process, its executors as processes."""

    def __init__(self, name: str, home: Path, link: SocketLink) -> None:
        self.name, self._link = name, link
        self._home = home / name
        self._outbox = self._home / "outbox"
        self._outbox.mkdir(parents=True)
        self._incarnation = f"{name}-1"
        self._pids = 1 << 30
        self._hosts: list[asyncio.Task[None]] = []
        self.agent = WorkerAgent(
            AgentSettings(
                worker=name,
                node_id=name,
                incarnation=self._incarnation,
                outbox=self._outbox,
                base=2,
                heartbeat_s=float(POLICY["heartbeat_s"]),
            ),
            self,
            self,
            SystemClock(),
            describe=self._describe,
            telemetry=dict,
            kill=self._kill,
            new_id=lambda: str(ULID()),
        )

    def _describe(self, reports: tuple[Report, ...]) -> Hello:
        return Hello(
            worker=self.name,
            node_id=self.name,
            incarnation=self._incarnation,
            address="",
            cpu=4.0,
            mem_gb=8.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=TASK_TYPES,
            reports=reports,
        )

    def _kill(self, pid: int, number: int) -> None:
        if pid < 1 << 30:  # Hosts have numbers that no process has.
            os.kill(pid, number)

    async def end(self) -> None:
        """End every host and what it started."""
        for host in self._hosts:
            host.cancel()
        await asyncio.gather(*self._hosts, return_exceptions=True)

    # `hcna_ray.runtime.agent.ModeratorLink`, and the exchange of `hcna_ray.runtime.host.SlotLink`

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

    async def report(self, reports: tuple[Report, ...]) -> bool:
        try:
            await self._link.ask(
                Reports(worker=self.name, incarnation=self._incarnation, reports=reports)
            )
        except HcnaError:
            return False
        return True

    # `hcna_ray.runtime.agent.Processes`

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        return self._start(slot, name, None)

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        return self._start(-1, name, offer)

    def withdraw(self, name: str) -> None:
        raise AssertionError(f"{name} begins in time")

    def _start(self, slot: int, name: str, offer: Offer | None) -> Awaitable[None]:
        host = asyncio.create_task(self._serve(slot, name, offer))
        self._hosts.append(host)
        return asyncio.shield(host)

    async def _serve(self, slot: int, name: str, offer: Offer | None) -> None:
        nursery = ProcessNursery(
            {
                "worker": self.name,
                "node_id": self.name,
                "disk_path": str(self._home),
                "scratch_root": str(self._home),
                "long_s": 0.05,
                "report_s": 0.005,
                "result_bytes_max": 1 << 18,
                "outbox": str(self._outbox),
                "log": str(self._home / "worker.log"),
            }
        )
        host = SlotHost(
            HostSettings(
                worker=self.name,
                incarnation=self._incarnation,
                slot=slot,
                name=name,
                outbox=self._outbox,
                attempts_max=16 if offer is None else 1,
            ),
            self,
            nursery,
            NoArtifacts(),
            SystemClock(),
        )
        self._pids += 1
        try:
            if not await self.agent.attach(name, self._pids):
                return
            if offer is None:
                await host.serve()
            else:
                await host.run_once(offer, 5.0)
        finally:
            nursery.close()
            await host.end()


def application(
    home: Path, store: Where, link: SocketLink, *, resend_s: float = RESEND_S
) -> FastAPI:
    """Build C1 around the moderator's process; its artifacts lie in ``home``."""
    settings = Settings(home=home, limits=LimitSettings(resend_s=resend_s))
    bounds = settings.limits
    return build_app(
        moderator=SocketModerator(link, store),
        reader=lambda: open_reader(store),
        registry=load_registry(),
        keys=PaperKeys(),
        artifacts=ArtifactStore(
            settings.artifacts_dir,
            artifact_bytes_max=bounds.artifact_bytes,
            part_bytes_max=bounds.artifact_part_bytes,
            uploads_max=bounds.artifact_uploads_max,
            upload_idle_s=bounds.upload_idle_s,
            disk_free_bytes_min=0,
            now=time.time,
            disk_free=lambda _: 1 << 40,
        ),
        outputs=PaperOutputs(),
        settings=settings,
        clock=SystemClock(),
        ids=UlidIds(),
    )


@asynccontextmanager
async def composite(
    home: Path, store: Where, link: SocketLink, *, resend_s: float = RESEND_S
) -> AsyncIterator[httpx.AsyncClient]:
    """Run C1 around the moderator's process."""
    app = application(home, store, link, resend_s=resend_s)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=URL, headers=headers, timeout=60) as http,
    ):
        yield http


class Load:
    """What clients do to it: everything that the checker knows the rules of."""

    def __init__(
        self, folder: Path, http: httpx.AsyncClient, seed: int, tasks: int, *, name: str = "c"
    ) -> None:
        self._folder, self._http, self._seed, self._name = folder, http, seed, name
        self._tasks = tasks
        self.effects = folder / "effects.jsonl"
        self.ids: set[str] = set()
        #: While set, clients whose request is refused try another one, and count it as none.
        self.patient = False
        self._clients = 0
        self._nonces = 0

    def _body(self, draw: random.Random, *, at_once: bool = False) -> dict[str, Any]:
        self._nonces += 1
        nonce = f"n-{self._seed}-{self._nonces}"
        payload: dict[str, Any] = {"effects": str(self.effects), "nonce": nonce}
        body: dict[str, Any] = {
            "task_type": draw.choices(TASK_TYPES, (1, 3))[0],
            "payload": payload,
            "metadata": {"nonce": nonce},
            "priority": draw.choice((0, 5, 5, 5, 9)),
        }
        if at_once:
            return body
        kind = draw.random()
        if kind < 0.15:
            payload["seconds"] = draw.uniform(0.05, 0.8)
        elif kind < 0.25:
            payload["fail_until"] = draw.choice((2, 3, 9))
        elif kind < 0.30:
            payload["die_until"] = draw.choice((2, 9))
        if draw.random() < 0.1:
            body["requires"] = {"worker": draw.choice(("W1", "W2", "W9"))}
        elif draw.random() < 0.1:
            body["ordering_key"] = draw.choice(("north", "south"))
        elif draw.random() < 0.1:
            body["concurrency_key"] = draw.choice(("left", "right"))
        if draw.random() < 0.05:
            due = datetime.now(UTC) + timedelta(seconds=draw.uniform(0.0, 2.0))
            body["run_at"] = due.isoformat()
        if draw.random() < 0.1 and self.ids:
            body["depends_on"] = [draw.choice(sorted(self.ids))]
        return body

    @property
    def over(self) -> bool:
        """Whether every client has done what it had to."""
        return not self._clients

    async def client(self, number: int) -> None:
        """Be one client: submit, ask, cancel, repeat, send again under the same key."""
        self._clients += 1
        try:
            await self._be_client(number)
        finally:
            self._clients -= 1

    async def _be_client(self, number: int) -> None:
        draw = random.Random(f"{self._seed}-{number}")
        history = History(self._folder / "history.jsonl", f"{self._name}{number}", "owner")
        caller = Caller(self._http, history)
        mine: list[str] = []
        turn = 0
        while turn < self._tasks:
            turn += 1
            body = self._body(draw)
            key = f"k-{self._seed}-{number}-{self._nonces}" if draw.random() < 0.3 else None
            sends = 2 if key and draw.random() < 0.5 else 1
            answers = await asyncio.gather(*(caller.submit(body, key=key) for _ in range(sends)))
            for answer in answers:
                if answer.status_code == 202:
                    mine.append(answer.json()["task_id"])
                    self.ids.add(mine[-1])
                else:
                    await asyncio.sleep(0.05)
            if self.patient and not any(answer.status_code == 202 for answer in answers):
                turn -= 1
                await asyncio.sleep(0.3)
                continue
            if key and draw.random() < 0.2:
                await caller.submit({**body, "priority": 1}, key=key)
            if mine:
                chosen = draw.choice(mine[-5:])
                what = draw.random()
                if what < 0.12:
                    await caller.cancel(chosen)
                elif what < 0.20:
                    await caller.retry(chosen)
                elif what < 0.60:
                    await caller.get(chosen)
            await asyncio.sleep(draw.uniform(0.0, 0.03))

    async def meddle(self) -> None:
        """Cancel what runs, and take back what has failed."""
        draw = random.Random(f"{self._seed}-meddle")
        caller = Caller(self._http, History(self._folder / "history.jsonl", "meddler", "owner"))
        for _ in range(3):
            body = self._body(draw, at_once=True)
            body["payload"]["seconds"] = 0.9
            answer = await caller.submit(body)
            while answer.status_code != 202:
                await asyncio.sleep(0.1)
                answer = await caller.submit(body)
            task = answer.json()["task_id"]
            self.ids.add(task)
            for _ in range(200):
                if (await caller.get(task)).json()["status"] == "running":
                    break
                await asyncio.sleep(0.02)
            await caller.cancel(task)
        for task in sorted(self.ids):
            if (await caller.get(task)).json()["status"] == "failed":
                await caller.retry(task)

    async def look(self) -> None:
        """GET every task."""
        history = History(self._folder / "history.jsonl", "last", "owner")
        caller = Caller(self._http, history)
        for task in sorted(self.ids):
            await caller.get(task)


async def moving(store: Where) -> int:
    """Return how many tasks have not ended and will by themselves (W9 does not exist)."""
    reader = open_reader(store)
    try:
        where = TaskFilter(states=(TaskState.SCHEDULED, TaskState.QUEUED, TaskState.RUNNING))
        found = reader.page(where, before_seq=None, limit=10_000)
    finally:
        reader.close()
    stuck: set[str] = set()
    while True:
        keys = {task.spec.ordering_key for task in found if task.id in stuck} - {None}
        more = {
            task.id
            for task in found
            if task.spec.needs.worker == "W9"
            or task.spec.ordering_key in keys
            or stuck & set(task.spec.depends_on)
        }
        if more == stuck:
            return len(found) - len(stuck)
        stuck = more


#: What is done to a run in its middle; returns what the schedule tells of it.
Trouble = Callable[[ModeratorProcess, Load], Awaitable[list[dict[str, Any]]]]


async def kill_the_moderator(process: ModeratorProcess, load: Load) -> list[dict[str, Any]]:
    """SIGKILL, and start it again."""
    process.kill()
    fault = {"kind": "kill", "target": "moderator", "at": time.time()}
    await asyncio.sleep(0.2)
    await process.start()
    return [fault]


async def run(
    folder: Path,
    seed: int,
    tasks: int,
    *,
    store: Where | None = None,
    trouble: Trouble = kill_the_moderator,
    canaries: Sequence[str] = (),
    without: Mapping[str, str] | None = None,
) -> None:
    """Make the run and leave its evidence.

    Args:
        folder: Where to; it does not exist yet.
        seed: Of what the clients do.
        tasks: How many they submit, about.
        store: By default a new SQLite file. The evidence of a database is dumped by its owner.
        trouble: What happens when four tenths of them are accepted.
        canaries: Secrets that must not be found in the evidence.
        without: Checks for which there will be no evidence, and why.
    """
    home, socket = folder / "home", folder / "m1"
    store = store or folder / "queue.db"
    home.mkdir(parents=True)
    install_tasks(folder / "site")
    process = ModeratorProcess(store, socket, folder / "moderator.log")
    await process.start()
    links = [SocketLink(socket) for _ in range(3)]
    workers = [Worker(name, home, link) for name, link in zip(("W1", "W2"), links, strict=False)]
    agents = [asyncio.create_task(worker.agent.run()) for worker in workers]
    faults: list[dict[str, Any]] = []
    started = time.time()
    try:
        async with composite(home, store, links[2]) as http:
            load = Load(folder, http, seed, tasks // 6)
            clients = [asyncio.create_task(load.client(number)) for number in range(6)]
            load.patient = True  # Workers begin late, and the queue is small.
            while len(load.ids) < 0.4 * tasks:
                if all(client.done() for client in clients):
                    raise RuntimeError(f"only {len(load.ids)} tasks were accepted of {tasks}")
                await asyncio.sleep(0.01)
            load.patient = False
            faults += await trouble(process, load)
            await asyncio.gather(*clients)
            await load.meddle()
            end = time.monotonic() + DRAIN_S
            while await moving(store) and time.monotonic() < end:  # noqa: ASYNC110
                # What does not end is for the checker to see.
                await asyncio.sleep(0.25)
            drained_at = time.time()
            await load.look()
    finally:
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
        for worker in workers:
            await worker.end()
        for link in links:
            await link.close()
        process.kill()
    write_schedule(folder, seed, started, drained_at, faults, canaries, without)
    if isinstance(store, Path):
        export(store, folder / "store.jsonl")


def write_schedule(
    folder: Path,
    seed: int,
    started: float,
    drained: float,
    faults: list[dict[str, Any]],
    canaries: Sequence[str] = (),
    without: Mapping[str, str] | None = None,
) -> None:
    """Say what was done, and with which settings."""
    schedule = {
        "format": "hcna.schedule.v1",
        "seed": seed,
        "commit": "working tree",
        "started_at": started,
        "drained_at": drained,
        "clock_error_s": CLOCK_ERROR_S,
        "settings": POLICY,
        "workers_online": ["W1", "W2"],
        "effects_task_types": list(TASK_TYPES),
        "faults": faults,
        "bounds_s": {"moderator_accepting": ACCEPTING_S},
        "canaries": [ADMIN_KEY, *canaries],
        "without": dict(without or {}),
    }
    (folder / "schedule.json").write_text(json.dumps(schedule, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=300)
    chosen = parser.parse_args()
    asyncio.run(run(chosen.folder, chosen.seed, chosen.tasks))

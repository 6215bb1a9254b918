"""A worker with real executors below a real moderator, all without Ray.

The moderator (on paper: an in-memory store), the agent and the slots' hosts live in the test's
event loop; nurseries and executors are the processes that the product starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcna_ray.core.clock import SystemClock, boottime
from hcna_ray.core.errors import HcnaError, ModeratorUnavailable
from hcna_ray.core.models import TaskState
from hcna_ray.observability.traces import TracesPlan
from hcna_ray.runtime import wire
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.host import HostSettings, SlotHost, signal_group
from hcna_ray.runtime.messages import (
    AttemptKey,
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
from hcna_ray.runtime.orders import OrderDesk, OrderGuard
from hcna_ray.runtime.requests import Pending, Reports
from hcna_ray.runtime.runner import ArtifactLink
from hcna_ray.security.certs import ensure_ca
from hcna_ray.security.orders import OrderSigner, OrderVerifier
from tests.support.paper_worker import WAITING, Desk

REPOSITORY = Path(__file__).parents[2]
#: What one attempt may print here.
OUTPUT_BYTES = 1 << 20
#: No process has such an id: hosts here are coroutines, and a signal to one must reach nobody.
FIRST_PID = 1 << 30


class ProcessDied(Exception):
    """A slot's host ended suddenly."""


class NoArtifacts:
    """No test here has files."""

    def put(self, path: Path, attempt: AttemptKey) -> tuple[str, int]:
        raise AssertionError(path)

    def get(self, sha256: str, attempt: AttemptKey) -> Path:
        raise AssertionError(sha256)


def install_handlers(folder: Path) -> str:
    """Make `tests.support.rig_handlers` an installed package; return the ``PYTHONPATH`` for it."""
    info = folder / "hcna_rig-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hcna-rig\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[hcna_ray.tasks]\nrig = tests.support.rig_handlers\n")
    return f"{folder}:{REPOSITORY}"


class _Host:
    """One host: the coroutine that stands for its process."""

    def __init__(self, shop: Workshop, name: str, slot: int, offer: Offer | None) -> None:
        incarnation = shop.incarnation
        self.pid = shop.next_pid()
        self.name = name
        self.incarnation = incarnation
        self._shop, self._offer = shop, offer
        self.nursery = ProcessNursery(
            {
                "worker": "W1",
                "node_id": "W1",
                "disk_path": str(shop.home),
                "scratch_root": str(shop.home),
                "long_s": 0.05,
                "report_s": 0.005,
                "result_bytes_max": 1 << 18,
                "outbox": str(shop.outbox),
                "log": str(shop.home / "worker.log"),
                "outputs": str(shop.outputs),
                "output_bytes": OUTPUT_BYTES,
                "outputs_bytes_max": 1 << 30,
                "once": offer is not None,
                **({"traces": shop.traces_plan().to_json()} if shop.traced else {}),
            }
        )
        self.host = SlotHost(
            HostSettings(
                worker="W1",
                incarnation=incarnation,
                slot=slot,
                name=name,
                outbox=shop.outbox,
                attempts_max=shop.attempts_max if offer is None else 1,
            ),
            self,
            self.nursery,
            shop.artifacts,
            SystemClock(),
        )
        self.crashed = False
        self.task = asyncio.create_task(self._live())

    async def _live(self) -> None:
        try:
            assert self._shop.agent is not None
            if not await self._shop.agent.attach(self.name, self.pid):
                return
            if self._offer is None:
                await self.host.serve()
            else:
                await self.host.run_once(self._offer, 5.0)
        except asyncio.CancelledError:
            if not self.crashed:
                raise
        finally:
            self.nursery.close()
            await self.host.end()
        if self.crashed:
            raise ProcessDied(self.name)

    def crash(self) -> None:
        """End as if by SIGKILL: what it started dies with it, nothing is said."""
        self.crashed = True
        self.task.cancel()

    # `hcna_ray.runtime.host.SlotLink`

    async def exchange(self, exchange: Exchange) -> Grant:
        return await self._shop.exchange(exchange)

    async def report(self, reports: tuple[Report, ...]) -> bool:
        await asyncio.sleep(0)
        try:
            self._shop.ask(Reports(worker="W1", incarnation=self.incarnation, reports=reports))
        except HcnaError:
            return False
        self._shop.reported.append(reports)
        return True


class Workshop:
    """M1's desk, and the agents of one worker with all that they start."""

    def __init__(self, home: Path, desk: Desk) -> None:
        self.home, self.desk = home, desk
        self.outbox = home / "outbox"
        self.outputs = home / "outputs"
        #: What M1 orders is signed, and looked at by agent and hosts, as over Ray.
        ensure_ca(home / "cluster", now=datetime.now(UTC))
        self.orders = OrderDesk(OrderSigner(home / "cluster"), None, elapsed=boottime)
        self.guard = OrderGuard(OrderVerifier(home / "cluster"), patience_s=60.0, elapsed=boottime)
        #: What agents said of hosts that ended, and what hosts reported, as far as it arrived.
        self.gone: list[SlotGone] = []
        self.reported: list[tuple[Report, ...]] = []
        self.hosts: dict[str, _Host] = {}
        self.attempts_max = 16
        self.artifacts: ArtifactLink = NoArtifacts()
        self.away = False
        #: Whether executors make spans, below ``home/traces``.
        self.traced = False
        self.incarnation = ""
        self.agent: WorkerAgent | None = None
        self._agent_task: asyncio.Task[None] | None = None
        self._parked: list[tuple[Pending, asyncio.Future[Any]]] = []

    def traces_plan(self) -> TracesPlan:
        return TracesPlan(
            folder=self.home / "traces",
            bytes_max=1 << 20,
            sample_ratio=1.0,
            service="hcna-worker",
            node_id="W1",
        )

    def next_pid(self) -> int:
        return FIRST_PID + len(self.hosts)

    # -- life ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Workshop]:
        """Let time pass; end every process afterwards."""
        self.outbox.mkdir(exist_ok=True)
        clock = asyncio.create_task(self._keep_time())
        try:
            yield self
        finally:
            await self.lose_agent()
            for host in self.hosts.values():
                host.task.cancel()
            await asyncio.gather(*(one.task for one in self.hosts.values()), return_exceptions=True)
            clock.cancel()

    def start_agent(self, incarnation: str, **settings: Any) -> WorkerAgent:
        """Begin a life of the worker's agent."""
        self.incarnation = incarnation
        chosen: dict[str, Any] = {"base": 1, "heartbeat_s": 0.5}
        self.agent = WorkerAgent(
            AgentSettings(
                worker="W1",
                node_id="W1",
                incarnation=incarnation,
                outbox=self.outbox,
                **{**chosen, **settings},
            ),
            self,
            self,
            SystemClock(),
            describe=lambda reports: self._describe(incarnation, reports),
            telemetry=dict,
            kill=self._kill,
            new_id=lambda: "m",
        )
        self._agent_task = asyncio.create_task(self.agent.run())
        return self.agent

    async def lose_agent(self) -> None:
        """Let the agent die; what it started goes on until somebody stops it."""
        if self._agent_task is not None:
            self._agent_task.cancel()
            await asyncio.gather(self._agent_task, return_exceptions=True)
            self._agent_task = None

    def _kill(self, pid: int, number: int) -> None:
        for host in self.hosts.values():
            if host.pid == pid:
                host.crash()
                return
        signal_group(pid, number)

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self.desk.tick(0.05)
            self.answer()

    def _describe(self, incarnation: str, reports: tuple[Report, ...]) -> Hello:
        return Hello(
            worker="W1",
            node_id="W1",
            incarnation=incarnation,
            address="",
            cpu=4.0,
            mem_gb=8.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=(
                "echo",
                "rig.block",
                "rig.effect",
                "rig.exit",
                "rig.family",
                "rig.flood",
                "rig.look",
                "rig.make",
                "rig.print",
                "rig.read",
                "rig.stubborn",
                "rig.traced",
            ),
            reports=reports,
        )

    # -- looking and waiting ---------------------------------------------------------------------

    async def until(self, what: Callable[[], object], timeout_s: float = 20.0) -> None:
        """Wait until something is true."""
        async with asyncio.timeout(timeout_s):
            while not what():  # noqa: ASYNC110 - processes set no events
                await asyncio.sleep(0.005)

    def starts(self) -> list[tuple[str, int, int]]:
        """Return (task, generation, attempt) of every handler that began, in order."""
        path = self.home / "effects"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(task, int(one), int(two)) for task, one, two in map(str.split, lines)]

    async def running(self, *task_ids: str) -> None:
        """Wait until the handlers of tasks have begun and the moderator knows."""
        await self.until(lambda: set(task_ids) <= {one[0] for one in self.starts()})
        await self.until(
            lambda: {self.desk.task(one).state for one in task_ids} == {TaskState.RUNNING}
        )

    async def ended(self, *task_ids: str, timeout_s: float = 20.0) -> None:
        """Wait until tasks have ended."""
        await self.until(lambda: all(self.desk.task(one).terminal for one in task_ids), timeout_s)

    def submit(self, *task_ids: str, **changes: Any) -> None:
        """Accept tasks, and pass on what that leads to."""
        self.desk.submit_ids(*task_ids, **changes)
        self.answer()

    def cancel(self, task_id: str) -> None:
        """Ask for a cancel, and pass it on."""
        self.desk.cancel(task_id)
        self.answer()

    # -- the moderator ---------------------------------------------------------------------------

    async def hello(self, hello: Hello) -> Welcome:
        hello = self.guard.hello(hello)
        welcome: Welcome = self.orders.welcome(hello, self.ask(hello))
        self.guard.welcomed(hello, welcome)
        return welcome

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        reply: HeartbeatReply = self.ask(beat)
        return reply

    async def exchange(self, exchange: Exchange) -> Grant:
        if self.away:
            raise ModeratorUnavailable("away")
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._parked.append((self.desk.park(exchange), answered))
        self.answer()
        answer = await answered
        if isinstance(answer, HcnaError):
            raise answer
        assert isinstance(answer, Grant)
        travelled = wire.pack_grant(self.orders.send(exchange, answer))
        return self.guard.receive(exchange, wire.unpack_grant(travelled), 0.0)

    async def slot_gone(self, gone: SlotGone) -> None:
        self.ask(gone)
        self.gone.append(gone)

    def ask(self, request: Any) -> Any:
        if self.away:
            raise ModeratorUnavailable("away")
        try:
            return self.desk.ask(request)
        finally:
            self.answer()

    def answer(self) -> None:
        """Pass on what the desk has answered."""
        waiting = []
        for pending, answered in self._parked:
            answer = self.desk.answer(pending)
            if answered.done():
                continue
            if answer is WAITING:
                waiting.append((pending, answered))
            else:
                answered.set_result(answer)
        self._parked = waiting

    def restart_moderator(self) -> None:
        """Lose what the moderator had in memory, and every call that was parked."""
        parked, self._parked = self._parked, []
        self.desk.restart()
        for _, answered in parked:
            if not answered.done():
                answered.set_result(ModeratorUnavailable("restarted"))

    # -- processes, to the agent -----------------------------------------------------------------

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        return self._start(name, slot, None)

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        return self._start(name, -1, offer)

    def withdraw(self, name: str) -> None:
        self.hosts[name].crash()

    def _start(self, name: str, slot: int, offer: Offer | None) -> Awaitable[None]:
        host = self.hosts[name] = _Host(self, name, slot, offer)
        return asyncio.shield(host.task)

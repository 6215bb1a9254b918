"""A worker with real processes below a real moderator, all without Ray.

The agent and the moderator (on paper: an in-memory store) live in the test's event loop; slots and
heavy attempts are processes forked by `tests.support.runner_zygote`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError, ModeratorUnavailable
from hcna_ray.core.models import TaskState
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.messages import (
    Ack,
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
from hcna_ray.runtime.requests import Pending, Reports
from tests.support.paper_worker import WAITING, Desk

REPOSITORY = Path(__file__).parents[2]
TASK_TYPES = ("block", "effect", "family", "stubborn")


class ProcessDied(Exception):
    """A process ended without a goodbye."""


@dataclass
class _Process:
    ended: asyncio.Future[None]
    connections: list[Connection] = field(default_factory=list)
    goodbye: bool = False


class Workshop:
    """M1's desk, the zygote, and the agents of one worker."""

    def __init__(self, home: Path, desk: Desk) -> None:
        self.home, self.desk = home, desk
        self.outbox = home / "outbox"
        #: What agents said of processes that ended.
        self.gone: list[SlotGone] = []
        #: Process ids by runner name.
        self.pids: dict[str, int] = {}
        #: Picks the line before which a new process dies; None lets it live.
        self.die_at_line: Callable[[], int | None] = lambda: None
        self.away = False
        self.incarnation = ""
        self.agent: WorkerAgent | None = None
        self._agent_task: asyncio.Task[None] | None = None
        self._parked: list[tuple[Pending, Callable[[Any], None]]] = []
        self._processes: dict[str, _Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Workshop]:
        """Listen and start the zygote; end every process afterwards."""
        self.outbox.mkdir(exist_ok=True)
        address = str(self.home / "s")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._listener.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener, self._accept)
        module = "tests.support.runner_zygote"
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", module, address, str(self.home)],
            stdin=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        clock = asyncio.create_task(self._keep_time())
        try:
            yield self
        finally:
            await self.kill_agent()
            clock.cancel()
            for process in self._processes.values():
                for connection in process.connections:
                    loop.remove_reader(connection.fileno())
                    connection.close()
            loop.remove_reader(self._listener)
            self._listener.close()
            assert self._zygote.stdin is not None
            self._zygote.stdin.close()
            await asyncio.to_thread(self._zygote.wait, 10.0)

    def start_agent(self, incarnation: str, **settings: Any) -> WorkerAgent:
        """Begin a life of the worker's agent."""
        self.incarnation = incarnation
        chosen: dict[str, Any] = {"base": 2, "spare": 1, "reserve": 1, "heartbeat_s": 0.5}
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
        for task in self._tasks:
            task.cancel()

    async def kill_agent(self) -> None:
        """End the agent and its processes."""
        if self.agent is not None:
            await self.agent.close()
        await self.lose_agent()

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self.desk.tick()
            self._answer()

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
            task_types=TASK_TYPES,
            reports=reports,
        )

    # -- waiting ---------------------------------------------------------------------------------

    async def until(self, what: Callable[[], object], timeout_s: float = 20.0) -> None:
        """Wait until something is true."""
        async with asyncio.timeout(timeout_s):
            while not what():
                await asyncio.sleep(0.005)

    def starts(self) -> list[tuple[str, int, int]]:
        """Return (task, generation, attempt) of every handler that began, in order."""
        path = self.home / "effects"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(task, int(one), int(two)) for task, one, two in map(str.split, lines)]

    async def running(self, task_id: str) -> None:
        """Wait until the handler of a task has begun and the moderator knows."""
        await self.until(lambda: any(one[0] == task_id for one in self.starts()))
        await self.until(lambda: self.desk.task(task_id).state is TaskState.RUNNING)

    async def ended(self, *task_ids: str, timeout_s: float = 20.0) -> None:
        """Wait until tasks have ended."""
        await self.until(lambda: all(self.desk.task(one).terminal for one in task_ids), timeout_s)

    # -- the moderator, to the agent -------------------------------------------------------------

    async def hello(self, hello: Hello) -> Welcome:
        welcome: Welcome = self._ask(hello)
        return welcome

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        reply: HeartbeatReply = self._ask(beat)
        return reply

    async def exchange(self, exchange: Exchange) -> Grant:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._park(exchange, lambda answer: answered.done() or answered.set_result(answer))
        answer = await answered
        if isinstance(answer, HcnaError):
            raise answer
        assert isinstance(answer, Grant)
        return answer

    async def slot_gone(self, gone: SlotGone) -> None:
        self._ask(gone)
        self.gone.append(gone)

    def _ask(self, request: Any) -> Any:
        if self.away:
            raise ModeratorUnavailable("away")
        try:
            return self.desk.ask(request)
        finally:
            self._answer()

    def _park(self, exchange: Exchange, resolve: Callable[[Any], object]) -> None:
        if self.away:
            resolve(ModeratorUnavailable("away"))
            return
        self._parked.append((self.desk.park(exchange), resolve))
        self._answer()

    def _answer(self) -> None:
        """Pass on what the desk has answered."""
        waiting = []
        for pending, resolve in self._parked:
            answer = self.desk.answer(pending)
            if answer is WAITING:
                waiting.append((pending, resolve))
            else:
                resolve(answer)
        self._parked = waiting

    def answer(self) -> None:
        """Pass on what a call of the test itself has led to."""
        self._answer()

    # -- processes, to the agent -----------------------------------------------------------------

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        return self._fork(name, slot, None)

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        return self._fork(name, -1, offer._replace(payload=offer.payload.decode()))  # type: ignore[arg-type]

    def _fork(self, name: str, slot: int, offer: Offer | None) -> Awaitable[None]:
        order = {
            "name": name,
            "slot": slot,
            "incarnation": self.incarnation,
            "offer": offer,
            "die_at_line": self.die_at_line(),
        }
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._processes[name] = _Process(ended)
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(order).encode() + b"\n")
        self._zygote.stdin.flush()
        return ended

    # -- connections -----------------------------------------------------------------------------

    def _accept(self) -> None:
        plain, _ = self._listener.accept()
        plain.setblocking(True)
        connection = Connection(plain.detach())
        loop = asyncio.get_running_loop()
        try:
            name, role = connection.recv()
        except (EOFError, OSError):
            connection.close()
            return
        process = self._processes[name]
        process.connections.append(connection)
        loop.add_reader(connection.fileno(), self._read, connection, name, role)

    def _read(self, connection: Connection, name: str, role: str) -> None:
        process = self._processes[name]
        try:
            value = connection.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(connection.fileno())
            process.connections.remove(connection)
            connection.close()
            if role == "control" and not process.ended.done():
                if process.goodbye:
                    process.ended.set_result(None)
                else:
                    process.ended.set_exception(ProcessDied(name))
            return

        def reply(answer: object) -> None:
            try:
                connection.send(answer)
            except OSError:
                return  # It died while it waited.

        match role:
            case "exchange":
                self._park(value, reply)
            case "report":
                reply(self._take(value))
            case _ if value[0] == "goodbye":
                process.goodbye = True
                reply(True)
            case _:
                self.pids[name] = value[1]
                task = asyncio.create_task(self._attach(name, value[1], reply))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _take(self, reports: tuple[Report, ...]) -> Ack | HcnaError:
        try:
            ack: Ack = self._ask(
                Reports(worker="W1", incarnation=self.incarnation, reports=reports)
            )
        except HcnaError as error:
            return error
        return ack

    async def _attach(self, name: str, pid: int, reply: Callable[[object], None]) -> None:
        assert self.agent is not None
        reply(await self.agent.attach(name, pid))

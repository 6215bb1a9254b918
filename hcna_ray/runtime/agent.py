"""A worker's agent: keeps its slots alive, starts heavy attempts, enforces stops, beats the heart.

Plain asyncio; Ray is behind the `Processes` and `ModeratorLink` protocols. The agent owns every
process that runs work on its machine, so what it cannot vouch for any more it ends: a worker that
could not renew its session for ``self_stop_s`` stops its attempts before the moderator hands them
to somebody else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hcna_ray.core.clock import Clock
from hcna_ray.core.envelopes import Intent, Telemetry
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import HEAVY_SLOT, FailureKind, TaskError, Token
from hcna_ray.runtime.journal import (
    Note,
    RunnerFiles,
    StopOrder,
    read_journal,
    read_note,
    unfinished,
    write_stops,
)
from hcna_ray.runtime.messages import (
    Exchange,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Offer,
    Report,
    ReportKind,
    SlotGone,
    Stop,
    Welcome,
)

log = logging.getLogger(__name__)

#: How often the agent looks at its runners' notes.
WATCH_S = 0.1
#: Time between SIGTERM and SIGKILL.
KILL_GRACE_S = 10.0
#: After the worker fenced itself off, processes get less time: the moderator is about to re-lease.
FENCE_GRACE_S = 5.0
#: Pause before a slot that died is replaced, doubled by each quick death up to the maximum.
RESPAWN_S = 0.2
RESPAWN_MAX_S = 10.0
CALL_TIMEOUT_S = 15.0


class Processes(Protocol):
    """Starts the processes that run work. Each awaitable ends when the process has ended."""

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        """Start a slot; it calls `WorkerAgent.attach` once it is ready."""
        ...

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        """Start one attempt in a process of its own, with what it needs set aside."""
        ...


class ModeratorLink(Protocol):
    """The agent's calls to the moderator; they raise `ModeratorUnavailable` while it is away."""

    async def hello(self, hello: Hello) -> Welcome:
        """Register."""
        ...

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        """Renew the session."""
        ...

    async def exchange(self, exchange: Exchange) -> Grant:
        """Ask for heavy attempts, stops and intents; parks until there is something."""
        ...

    async def slot_gone(self, gone: SlotGone) -> None:
        """Tell that a slot's process ended."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSettings:
    """What an agent needs to know."""

    worker: str
    node_id: str
    incarnation: str
    outbox: Path
    base: int = 4
    spare: int = 1
    reserve: int = 2
    slots_max: int = 16
    long_s: float = 0.05
    idle_s: float = 30.0
    heartbeat_s: float = 5.0
    self_stop_s: float = 20.0
    moderator_address: str = ""


@dataclass(slots=True)
class _Runner:
    """One process that runs work: a slot, or a heavy attempt (``offer`` set)."""

    slot: int
    files: RunnerFiles
    started: float
    offer: Offer | None = None
    ready: bool = False
    activated: asyncio.Event = field(default_factory=asyncio.Event)
    retiring: bool = False
    note: Note | None = None
    idle_since: float = 0.0
    #: Stop orders by token, with the time of SIGTERM and whether SIGKILL has gone out.
    orders: dict[Token, tuple[StopOrder, float]] = field(default_factory=dict)
    killed: Token | None = None


class WorkerAgent:
    """Owner of one worker's processes. Invariant: no attempt runs here outside a known runner."""

    def __init__(
        self,
        settings: AgentSettings,
        link: ModeratorLink,
        processes: Processes,
        clock: Clock,
        *,
        describe: Callable[[tuple[Report, ...]], Hello],
        telemetry: Callable[[], Mapping[str, Any]],
        kill: Callable[[int, int], None] | None = None,
        new_id: Callable[[], str],
    ) -> None:
        """Wire the agent; `run` starts it.

        Args:
            settings: About the worker.
            link: To the moderator.
            processes: Starts slots and heavy attempts.
            clock: Wall clock and CLOCK_BOOTTIME.
            describe: Builds the `Hello` around reports left by an earlier incarnation.
            telemetry: Reads the machine's load.
            kill: Sends a signal to a process group; the default is the real thing.
            new_id: Mints message ids.
        """
        self._settings, self._link, self._processes = settings, link, processes
        self._clock, self._describe, self._telemetry = clock, describe, telemetry
        self._kill = kill or signal_group
        self._new_id = new_id
        self._runners: dict[str, _Runner] = {}
        self._numbers = itertools.count()
        self._confirmed = clock.elapsed()
        self._connected = False
        self._fenced = False
        self._closing = False
        self._deaths = 0
        self._answers: list[tuple[str, Mapping[str, Any]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._leftovers: list[RunnerFiles] = []

    # -- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled or `close`d."""
        self._settings.outbox.mkdir(parents=True, exist_ok=True, mode=0o700)
        loops = [
            asyncio.create_task(self._heartbeat_loop(), name="heartbeat"),
            asyncio.create_task(self._exchange_loop(), name="exchange"),
            asyncio.create_task(self._watch_loop(), name="watch"),
        ]
        try:
            await asyncio.gather(*loops)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def close(self) -> None:
        """End every process of this worker and stop serving. Harmless twice."""
        self._closing = True
        for runner in self._runners.values():
            if runner.note is not None:
                self._signal(runner, signal.SIGKILL)

    async def attach(self, name: str, pid: int) -> bool:
        """A runner's process is ready. Returns when it shall begin; False means: end.

        Args:
            name: The runner's name, as given to `Processes.start_slot`.
            pid: Its process id, which is also its process group.
        """
        runner = self._runners.get(name)
        if runner is None or self._closing:
            return False
        runner.ready = True
        runner.note = Note(pid=pid)
        self._deaths = 0
        self._balance()
        await runner.activated.wait()
        return not self._closing

    @property
    def connected(self) -> bool:
        """Whether the moderator confirmed this worker's session lately."""
        silence = self._clock.elapsed() - self._confirmed
        return self._connected and silence < 3 * self._settings.heartbeat_s

    @property
    def slots(self) -> int:
        """Slots that are ready."""
        return sum(1 for one in self._runners.values() if one.offer is None and one.ready)

    @property
    def running(self) -> int:
        """Attempts that run."""
        return sum(1 for one in self._runners.values() if one.note is not None and one.note.task_id)

    # -- heartbeat -------------------------------------------------------------------------------

    async def _heartbeat_loop(self) -> None:
        while not self._closing:
            try:
                if not self._connected:
                    await self._say_hello()
                reply = await self._link.heartbeat(self._beat())
                if reply.known:
                    self._confirmed = self._clock.elapsed()
                    self._fenced = False
                else:
                    self._connected = False
                    continue
            except HcnaError as error:
                log.warning(
                    "the moderator did not answer",
                    extra={"action": "agent.unreachable", "error": str(error)},
                )
                await asyncio.sleep(0.5)
                continue
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _say_hello(self) -> None:
        left_behind = self._collect_leftovers()
        welcome = await self._link.hello(self._describe(left_behind))
        for files in self._leftovers:
            files.remove()
        self._leftovers.clear()
        self._connected = True
        self._confirmed = self._clock.elapsed()
        log.info(
            "Connected to M1 %s at %s",
            welcome.moderator_node_id,
            self._settings.moderator_address,
            extra={"action": "agent.connected", "worker": self._settings.worker},
        )

    def _collect_leftovers(self) -> tuple[Report, ...]:
        """Read the journals of runners that an earlier life of this agent owned."""
        reports: list[Report] = []
        self._leftovers = []
        for path in sorted(self._settings.outbox.glob("*.note")):
            name = path.name.removesuffix(".note")
            if name in self._runners:
                continue
            files = RunnerFiles(self._settings.outbox, name)
            reports += self._last_words(files, FailureKind.LOST, "its worker's agent ended")
            self._leftovers.append(files)
        return tuple(reports)

    def _beat(self) -> Heartbeat:
        envelope = Telemetry(
            msg_id=self._new_id(),
            ts=self._clock.now(),
            src=self._settings.node_id,
            dst="M1",
            payload=dict(self._telemetry()),
            trace={},
        )
        return Heartbeat(
            worker=self._settings.worker,
            incarnation=self._settings.incarnation,
            telemetry=envelope.to_dict(),
            slots=self.slots,
        )

    # -- heavy attempts, stops, intents ------------------------------------------------------------

    async def _exchange_loop(self) -> None:
        seq = 0
        while not self._closing:
            if not self._connected:
                await asyncio.sleep(0.1)
                continue
            seq += 1
            answers = tuple(self._answers)
            exchange = Exchange(
                worker=self._settings.worker,
                incarnation=self._settings.incarnation,
                slot=HEAVY_SLOT,
                seq=seq,
                answers=answers,
            )
            grant = await self._exchange(exchange)
            if grant is None:
                seq -= 1
                continue
            del self._answers[: len(answers)]
            for offer in grant.offers:
                self._start_heavy(offer)
            for stop in grant.stops:
                self._on_stop(stop)
            for order in grant.intents:
                self._answers.append(self._answer_intent(order.envelope))

    async def _exchange(self, exchange: Exchange) -> Grant | None:
        """Exchange until it is answered; ``None`` when the worker must say hello first."""
        while not self._closing:
            try:
                grant = await self._link.exchange(exchange)
            except HcnaError:
                await asyncio.sleep(0.2)
                continue
            if grant.hello:
                self._connected = False
                return None
            return grant
        return None

    def _answer_intent(self, envelope: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        msg_id = str(envelope.get("msg_id", ""))
        try:
            intent = Intent.from_dict(envelope)
        except HcnaError as error:
            return msg_id, {"error": error.code, "message": str(error)}
        log.info(
            "Received intent %s from M1",
            intent.intent,
            extra={"action": "intent.received", "intent": intent.intent, "msg_id": intent.msg_id},
        )
        if intent.intent != "test.ping":
            known = "this worker answers test.ping; everything else is a task"
            return msg_id, {"error": "unknown_intent", "message": known}
        return msg_id, {
            "pong": True,
            "node_id": self._settings.node_id,
            "at": self._clock.now(),
            "delay_ms": round((self._clock.now() - intent.ts) * 1000.0, 3),
        }

    def _start_heavy(self, offer: Offer) -> None:
        token = Token(*offer.token)
        name = f"{self._settings.incarnation}.heavy.{offer.task_id}.{token}"
        if name in self._runners:
            return  # The same grant, told twice.
        runner = self._new_runner(HEAVY_SLOT, name, offer)
        runner.activated.set()
        self._spawn(self._follow(runner, self._processes.start_heavy(offer, name)))

    def _on_stop(self, stop: Stop) -> None:
        token = Token(*stop.token)
        for runner in self._runners.values():
            if runner.offer is not None:
                if runner.offer.task_id != stop.task_id:
                    continue
            elif runner.slot != stop.slot:
                continue
            self._order(
                runner,
                StopOrder(
                    task_id=stop.task_id,
                    generation=token.generation,
                    attempt=token.attempt,
                    reason=stop.reason,
                ),
            )
            return

    # -- processes -------------------------------------------------------------------------------

    def _new_runner(self, slot: int, name: str, offer: Offer | None = None) -> _Runner:
        files = RunnerFiles(self._settings.outbox, name)
        now = self._clock.elapsed()
        runner = _Runner(slot=slot, files=files, started=now, offer=offer, idle_since=now)
        self._runners[name] = runner
        return runner

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _balance(self) -> None:
        """Keep enough slots that are free of long attempts, and a warm spare behind them."""
        if self._closing or self._fenced:
            return
        settings = self._settings
        slots = [one for one in self._runners.values() if one.offer is None and not one.retiring]
        active = [one for one in slots if one.activated.is_set()]
        waiting = [one for one in slots if one.ready and not one.activated.is_set()]
        nimble = [one for one in active if not self._is_long(one)]
        while waiting and (len(active) < settings.base or len(nimble) < settings.reserve):
            if len(active) >= settings.slots_max:
                break
            runner = waiting.pop(0)
            runner.idle_since = self._clock.elapsed()
            runner.activated.set()
            active.append(runner)
            nimble.append(runner)
        room = min(settings.slots_max, max(settings.base, len(active))) + settings.spare
        for _ in range(room - len(slots)):
            number = next(self._numbers)
            runner = self._new_runner(number, f"{settings.incarnation}.slot.{number}")
            self._spawn(self._follow(runner, self._processes.start_slot(number, runner.files.name)))
        self._retire(active, nimble)

    def _retire(self, active: list[_Runner], nimble: list[_Runner]) -> None:
        """Let a slot go that was added for long attempts and has been idle for a while."""
        now = self._clock.elapsed()
        extra = len(active) - self._settings.base
        for runner in reversed(nimble):
            if extra <= 0 or len(nimble) <= self._settings.reserve:
                return
            busy = runner.note is not None and runner.note.task_id
            if busy or now - runner.idle_since < self._settings.idle_s:
                continue
            runner.retiring = True
            self._order(runner, StopOrder(task_id="", generation=0, attempt=0, reason="retire"))
            extra -= 1

    def _is_long(self, runner: _Runner) -> bool:
        note = runner.note
        if note is None or not note.task_id:
            return False
        return self._clock.elapsed() - note.started_boot > self._settings.long_s

    async def _follow(self, runner: _Runner, process: Awaitable[None]) -> None:
        """Wait for a process to end, then tell the moderator what its journal still holds."""
        try:
            await process
            how = "its process ended"
        except Exception as error:
            how = f"its process ended: {type(error).__name__}"
            if not self._closing and runner.killed is None:
                log.warning(
                    "a process that ran work died",
                    extra={
                        "action": "runner.died",
                        "runner": runner.files.name,
                        "error": str(error)[:300],
                    },
                )
                self._deaths += 1
        finally:
            self._runners.pop(runner.files.name, None)
        oom = "OutOfMemory" in how
        reports = self._last_words(
            runner.files, FailureKind.OOM if oom else FailureKind.POISON, how, runner
        )
        if self._closing:
            return
        await self._tell_gone(runner, tuple(reports))
        if runner.offer is None:
            await asyncio.sleep(min(RESPAWN_S * 2**self._deaths, RESPAWN_MAX_S))
            self._balance()

    async def _tell_gone(self, runner: _Runner, reports: tuple[Report, ...]) -> None:
        gone = SlotGone(
            worker=self._settings.worker,
            incarnation=self._settings.incarnation,
            slot=runner.slot,
            reports=reports,
        )
        while not self._closing:
            try:
                await self._link.slot_gone(gone)
            except HcnaError:
                await asyncio.sleep(0.2)
                continue
            runner.files.remove()
            return

    def _last_words(
        self, files: RunnerFiles, kind: FailureKind, how: str, runner: _Runner | None = None
    ) -> list[Report]:
        """Return a dead runner's journal, with an end for what it had started."""
        reports = read_journal(files)
        now = self._clock.now()
        started = unfinished(reports)
        note = read_note(files)
        idle = note is None or not note.task_id
        if runner is not None and runner.offer is not None and not reports and idle:
            # A heavy attempt whose process never came to write anything (or was confirmed to the
            # last word: then this is late and changes nothing).
            token = Token(*runner.offer.token)
            return [Report(ReportKind.RETURNED, runner.offer.task_id, token, now)]
        for report in started:
            token = Token(*report.token)
            order = None if runner is None else runner.orders.get(token)
            reports.append(_end_of(report, token, now, kind, how, order and order[0]))
        return reports

    # -- watching --------------------------------------------------------------------------------

    async def _watch_loop(self) -> None:
        self._balance()
        while not self._closing:
            await asyncio.sleep(WATCH_S)
            self._watch()

    def _watch(self) -> None:
        """Read every runner's note; enforce deadlines and stop orders; fence this worker off."""
        now = self._clock.elapsed()
        if now - self._confirmed > self._settings.self_stop_s and not self._fenced:
            self._fence()
        for runner in list(self._runners.values()):
            note = read_note(runner.files) or runner.note
            if note is None:
                continue
            if runner.note is not None and runner.note.task_id and not note.task_id:
                runner.idle_since = now
            runner.note = note
            if not note.task_id:
                continue
            if now >= note.deadline_boot and note.token not in runner.orders:
                self._order(
                    runner,
                    StopOrder(
                        task_id=note.task_id,
                        generation=note.generation,
                        attempt=note.attempt,
                        reason="timeout",
                    ),
                )
            self._enforce(runner, note, now)
        self._balance()

    def _enforce(self, runner: _Runner, note: Note, now: float) -> None:
        """SIGKILL what has not stopped in time."""
        found = runner.orders.get(note.token)
        if found is None or runner.killed is not None:
            return
        order, since = found
        grace = FENCE_GRACE_S if order.reason == "fenced" else KILL_GRACE_S
        if now - since >= grace:
            runner.killed = note.token
            self._signal(runner, signal.SIGKILL)

    def _order(self, runner: _Runner, order: StopOrder) -> None:
        token = Token(order.generation, order.attempt)
        runner.orders[token] = (order, self._clock.elapsed())
        write_stops(runner.files, [one for one, _ in runner.orders.values()])
        self._signal(runner, signal.SIGTERM)

    def _signal(self, runner: _Runner, number: int) -> None:
        note = read_note(runner.files) or runner.note
        if note is not None:
            self._kill(note.pid, number)

    def _fence(self) -> None:
        """Nobody has confirmed this worker's session for too long: stop what runs."""
        self._fenced = True
        log.error(
            "no contact with the moderator: stopping this worker's attempts",
            extra={"action": "agent.fenced", "worker": self._settings.worker},
        )
        for runner in self._runners.values():
            note = read_note(runner.files)
            if note is None or not note.task_id:
                continue
            self._order(
                runner,
                StopOrder(
                    task_id=note.task_id,
                    generation=note.generation,
                    attempt=note.attempt,
                    reason="fenced",
                ),
            )


def _end_of(
    started: Report,
    token: Token,
    now: float,
    kind: FailureKind,
    how: str,
    order: StopOrder | None,
) -> Report:
    """Return how an attempt ended whose process is gone."""
    reason = None if order is None else order.reason
    if reason == "cancel":
        return Report(ReportKind.CANCELLED, started.task_id, token, now, started_at=started.at)
    if reason == "timeout":
        text = "ran longer than its timeout_s and was killed"
        error = TaskError(kind=FailureKind.TIMEOUT, type="TaskTimedOut", message=text)
        return Report(
            ReportKind.FAILED, started.task_id, token, now, started_at=started.at, error=error
        )
    error = TaskError(kind=kind, message=how)
    return Report(ReportKind.LOST, started.task_id, token, now, error=error)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process, and with SIGKILL to its whole group; it may be gone already."""
    try:
        if number == signal.SIGKILL and os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return

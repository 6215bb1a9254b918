"""A worker's agent: keeps its slots alive, starts heavy attempts, beats the heart.

Plain asyncio; Ray is behind the `Processes` and `ModeratorLink` protocols. The agent owns every
process that runs work on its machine, so what it cannot vouch for any more it ends: a worker that
could not renew its session for ``self_stop_s`` stops its attempts before the moderator hands them
to somebody else.

To be stopped in good order, a worker's supervisor puts a file ``goodbye`` into the directory
`AgentSettings.run`. The agent then ends its processes, tells the moderator, and answers with
``goodbye.done``, whose JSON says whether the moderator heard it (``delivered``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hcna_ray import failpoints
from hcna_ray.core.clock import Clock
from hcna_ray.core.envelopes import Intent, Telemetry
from hcna_ray.core.errors import (
    HcnaError,
    ModeratorUnavailable,
    StaleModerator,
    StaleWorker,
    WorkerNameTaken,
)
from hcna_ray.core.models import HEAVY_SLOT, FailureKind, TaskError, Token
from hcna_ray.observability.log_context import names_of
from hcna_ray.runtime.host import LATE_S, last_words, signal_group
from hcna_ray.runtime.journal import (
    ContactMark,
    GenerationMark,
    RunnerFiles,
    StopOrder,
    process_birth,
    read_note,
    read_stops,
    write_stops,
)
from hcna_ray.runtime.messages import (
    NOT_STARTED,
    STUCK,
    UNSTARTED,
    Exchange,
    Goodbye,
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

#: How often the agent looks whether it is still in contact and all slots are there.
WATCH_S = 0.25
#: Pause before a slot that died is replaced, doubled by each quick death up to the maximum.
RESPAWN_S = 0.2
RESPAWN_MAX_S = 10.0
#: Longest wait for a killed process to be gone.
GONE_WAIT_S = 5.0
#: Pause before a call that failed is repeated.
RETRY_S = 0.2
#: Pause before another hello where the last one was answered and what followed it was not taken.
HELLO_AGAIN_S = 0.5
#: Written to see whether the outbox takes anything: more than fits beside a file's name.
PROBE = bytes(8192)
#: Pause before a worker whose name another one has tries again.
STAND_BACK_S = 5.0
#: What says that this worker is not to work for that moderator, at least for a while.
REFUSED = (StaleWorker, WorkerNameTaken, StaleModerator)
#: How long a goodbye may take; the supervisor waits for 5 s in all.
GOODBYE_S = 4.0
#: What the supervisor leaves in the run directory, and what it waits for.
GOODBYE_FILE = "goodbye"
GOODBYE_DONE_FILE = "goodbye.done"
#: Stop orders left for one member; older ones have long been obeyed or are void.
ORDERS_KEPT = 100
#: A slot that has not answered an order not to begin something for this long is stuck.
STUCK_S = 5.0
#: Nothing may run, nor begin.
FENCED = StopOrder(task_id="", generation=0, attempt=0, reason="fenced")


class Processes(Protocol):
    """Starts the processes that run work. Each awaitable ends when the process has ended."""

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        """Start a slot; it calls `WorkerAgent.attach` once it is ready."""
        ...

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        """Start one attempt in a process of its own, with what it needs set aside."""
        ...

    def withdraw(self, name: str) -> None:
        """Have a heavy attempt that has no process yet never get one."""
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

    async def goodbye(self, bye: Goodbye) -> None:
        """Tell that this worker stops."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSettings:
    """What an agent needs to know."""

    worker: str
    node_id: str
    incarnation: str
    outbox: Path
    #: Where the supervisor asks for a goodbye; without it, it never does.
    run: Path | None = None
    #: Slots kept alive.
    base: int = 4
    heartbeat_s: float = 5.0
    self_stop_s: float = 20.0
    #: How long the moderator parks an exchange.
    exchange_wait_s: float = 20.0
    moderator_address: str = ""


@dataclass(slots=True)
class _Member:
    """One process that hosts work: a slot, or a heavy attempt (``offer`` set)."""

    slot: int
    #: Only its stop file is the agent's; notes and journals are its executors'.
    files: RunnerFiles
    offer: Offer | None = None
    pid: int | None = None
    #: The moderator waits for this heavy attempt no longer: it must not begin.
    withdrawn: bool = False
    #: Since when this slot has known that an attempt must not begin any more.
    told_not_to_begin: dict[tuple[str, Token], float] = field(default_factory=dict)


class WorkerAgent:
    """Owner of one worker's processes. Invariant: no attempt runs here outside a known member."""

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
        birth: Callable[[int], int | None] = process_birth,
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
            birth: Tells when a living process began; see `process_birth`.
            new_id: Mints message ids.
        """
        self._settings, self._link, self._processes = settings, link, processes
        self._clock, self._describe, self._telemetry = clock, describe, telemetry
        self._mark = GenerationMark(settings.outbox)
        self._contact = ContactMark(settings.outbox)
        self._kill = kill or signal_group
        self._birth, self._new_id = birth, new_id
        self._members: dict[str, _Member] = {}
        self._numbers = itertools.count()
        self._confirmed = clock.elapsed()
        #: What the moderator counts the leases from: the call it knows to have been answered.
        self._renewed = self._confirmed
        self._connected = False
        #: Set when an exchange was told that the moderator does not know this worker.
        self._forgotten = asyncio.Event()
        self._fenced = False
        #: Set while the moderator says that somebody else is this worker.
        self._standing_back = False
        self._closing = False
        #: A request that was there before this agent is not meant for it.
        self._old_request = self._goodbye_request()
        self._trouble = ""
        self._deaths = 0
        self._respawn_at = 0.0
        #: Names of members that are gone while the moderator has not yet heard of it.
        self._telling: set[str] = set()
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
            self._contact.close()

    async def close(self) -> None:
        """End every process of this worker and stop serving. Harmless twice."""
        self._closing = True
        self._kill_members()

    def _kill_members(self) -> None:
        for member in self._members.values():
            if member.pid is not None:
                self._kill(member.pid, signal.SIGKILL)

    async def attach(self, name: str, pid: int) -> bool:
        """A member's process is ready; tell whether there is still work for it.

        Args:
            name: Its name, as given to `Processes`.
            pid: Its process id.
        """
        member = self._members.get(name)
        if member is None or member.withdrawn or self._closing or self._standing_back:
            return False
        failpoints.hit("agent.attach.received")
        member.pid = pid
        self._deaths = 0
        return True

    @property
    def connected(self) -> bool:
        """Whether the moderator confirmed this worker's session lately."""
        silence = self._clock.elapsed() - self._confirmed
        return self._connected and silence < 3 * self._settings.heartbeat_s

    @property
    def _retry_s(self) -> float:
        return STAND_BACK_S if self._standing_back else RETRY_S

    @property
    def slots(self) -> int:
        """Slots that are ready."""
        return sum(1 for one in self._members.values() if one.offer is None and one.pid is not None)

    @property
    def running(self) -> int:
        """Attempts that run."""
        return len(self._began())

    # -- heartbeat -------------------------------------------------------------------------------

    async def _heartbeat_loop(self) -> None:
        while not self._closing:
            try:
                greeted = not self._connected
                if greeted:
                    await self._say_hello()
                # The moderator renews the session when the call arrives, not when it is answered.
                asked = self._clock.elapsed()
                failpoints.hit("agent.heartbeat.before")
                reply = await self._link.heartbeat(self._beat())
                failpoints.hit("agent.heartbeat.answered")
                if reply.known:
                    # The call said that the one before was answered; of this one nobody knows yet.
                    self._renewed, self._confirmed = self._confirmed, asked
                    self._standing_back = False
                    self._note_contact()
                    if self._confirmed - self._renewed > 2 * self._settings.heartbeat_s:
                        continue  # After a silence, the next call renews what this one could not.
                    self._unfence()
                else:
                    self._connected = False
                    if greeted:  # It takes nothing of a session that it has just begun: no haste.
                        await asyncio.sleep(HELLO_AGAIN_S)
                    continue
            except REFUSED as error:
                self._stand_back(error)
                await asyncio.sleep(STAND_BACK_S)
                continue
            except HcnaError as error:
                log.warning(
                    "the moderator did not answer",
                    extra={"action": "agent.unreachable", "error": str(error)},
                )
                await asyncio.sleep(0.5)
                continue
            try:
                # A new moderator hands out nothing before it has heard a hello: no time to lose.
                async with asyncio.timeout(self._settings.heartbeat_s):
                    await self._forgotten.wait()
            except TimeoutError:
                pass

    def _stand_back(self, error: HcnaError) -> None:
        """Another one is this worker, or M1 is not to be trusted: run nothing until that ends."""
        if self._standing_back or self._closing:
            return
        self._standing_back = True
        log.error(
            "this worker stands back: %s",
            error,
            extra={"action": "agent.stands_back", "worker": self._settings.worker},
        )
        self._kill_members()

    async def _say_hello(self) -> None:
        left_behind = await self._collect_leftovers()
        try:
            hello = self._describe(left_behind)
        except Exception as error:
            # Asks the cluster, which may be as much away as the moderator.
            raise ModeratorUnavailable(f"cannot describe this worker: {error!r}") from error
        asked = self._clock.elapsed()
        self._forgotten.clear()
        failpoints.hit("agent.hello.before")
        welcome = await self._link.hello(hello)
        failpoints.hit("agent.hello.answered")
        self._follow_generation(welcome.generation)
        for files in self._leftovers:
            files.remove()
        self._leftovers.clear()
        for path in self._settings.outbox.glob("*.stop"):
            if not path.name.startswith(f"{self._settings.incarnation}."):
                path.unlink(missing_ok=True)  # An earlier life's orders to its members.
        self._connected = True
        self._renewed = self._confirmed = asked
        self._note_contact()
        log.info(
            "Connected to M1 %s at %s",
            welcome.moderator_node_id,
            self._settings.moderator_address,
            extra={"action": "agent.connected", "worker": self._settings.worker},
        )

    def _follow_generation(self, generation: int) -> None:
        """Stop what was granted before a restore; work for no store that a restore has replaced.

        Raises:
            StaleModerator: this worker has worked for a later generation.
        """
        seen = self._mark.read()
        if generation < seen:
            raise StaleModerator(generation, seen, str(self._mark.path))
        if generation == seen:
            return
        try:
            self._mark.write(generation)
        except OSError as error:  # A full disk: the next hello tries again.
            log.error(
                "the generation cannot be written down",
                extra={"action": "agent.generation_failed", "error": str(error)},
            )
        # Also what an executor would begin before it has the order.
        self._note_contact()
        if seen:
            log.warning(
                "the task store was restored: stopping what was granted before",
                extra={"action": "agent.restored", "generation": generation, "seen": seen},
            )
            for member in self._members.values():
                order = StopOrder(task_id="", generation=generation, attempt=0, reason="fenced")
                self._order(member, order)

    async def _collect_leftovers(self) -> tuple[Report, ...]:
        """Read the journals of executors that an earlier life of this agent owned."""
        known = self._members.keys() | self._telling
        self._leftovers = [
            files for files in self._executors() if files.name.rpartition(".")[0] not in known
        ]
        await self._end(self._leftovers)
        return self._last_words(self._leftovers, FailureKind.LOST, "its worker's agent ended")

    def _executors(self, member: str = "") -> list[RunnerFiles]:
        """Return the files of a member's executors, or of all that there are."""
        outbox = self._settings.outbox
        pattern = f"{member}.*" if member else "*"
        names = {
            path.stem
            for ending in ("note", "journal")
            for path in outbox.glob(f"{pattern}.{ending}")
        }
        return [RunnerFiles(outbox, name) for name in sorted(names)]

    async def _end(self, executors: list[RunnerFiles]) -> None:
        """Make sure that processes are gone: their journals are about to be read for good.

        Raises:
            ModeratorUnavailable: one of them will not die; the caller tries again later.
        """
        living = {
            note.pid: note.born
            for files in executors
            if (note := read_note(files)) is not None and self._birth(note.pid) == note.born
        }
        for pid in living:
            self._kill(pid, signal.SIGKILL)
        end = self._clock.elapsed() + GONE_WAIT_S
        while any(self._birth(pid) == born for pid, born in living.items()):
            if self._clock.elapsed() >= end:
                raise ModeratorUnavailable("a process of this worker will not die")
            await asyncio.sleep(0.02)

    def _last_words(
        self, executors: list[RunnerFiles], kind: FailureKind, how: str
    ) -> tuple[Report, ...]:
        reports: list[Report] = []
        for files in executors:
            orders = {
                (one.task_id, Token(one.generation, one.attempt)): one
                for one in read_stops(files.stop)
            }
            reports += last_words(files, orders, self._clock.now(), kind, how)
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
            trouble=self._find_trouble(),
            sent_at=self._clock.now(),
            unanswered_s=self._clock.elapsed() - self._confirmed,
            began=self._began(),
        )

    def _began(self) -> tuple[tuple[str, Token, float], ...]:
        notes = map(read_note, self._executors())
        return tuple(
            (note.task_id, note.token, note.started_at)
            for note in notes
            if note is not None and note.task_id
        )

    def _find_trouble(self) -> str:
        """Return why this worker can run nothing just now: its outbox takes no more."""
        probe = self._settings.outbox / ".probe"
        try:
            probe.write_bytes(PROBE)
            probe.unlink()
        except OSError as error:
            return f"cannot write to its disk ({error.strerror or error})"
        return ""

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
            found = await self._exchange(exchange)
            if found is None:
                seq -= 1
                continue
            grant, took_s = found
            del self._answers[: len(answers)]
            received = self._clock.elapsed()
            for offer in grant.offers:
                self._take_heavy(offer.received(received), took_s)
            for stop in grant.stops:
                self._on_stop(stop)
            for order in grant.intents:
                self._answers.append(self._answer_intent(order.envelope))

    async def _exchange(self, exchange: Exchange) -> tuple[Grant, float] | None:
        """Exchange until it is answered; ``None`` when the worker must say hello first.

        Returns:
            The answer, and how long it took.
        """
        while not self._closing:
            try:
                failpoints.hit("agent.exchange.before")
                asked = self._clock.elapsed()
                grant = await self._link.exchange(exchange)
                failpoints.hit("agent.exchange.answered")
            except HcnaError:
                await asyncio.sleep(self._retry_s)
                continue
            if grant.hello:
                self._connected = False
                self._forgotten.set()
                return None
            return grant, self._clock.elapsed() - asked
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

    def _take_heavy(self, offer: Offer, took_s: float) -> None:
        """Start an attempt, or give it back: granted long ago, it may be another's by now."""
        name = f"{self._settings.incarnation}.heavy.{offer.task_id}.{Token(*offer.token)}"
        if name in self._members or name in self._telling:
            return  # The same grant, told twice.
        if Token(*offer.token).generation < self._mark.read():
            log.error(
                "a grant of an older generation is refused",
                extra={"action": "agent.stale_grant", **_names(offer)},
            )
            return  # Not being held, it goes back by itself.
        if took_s > self._settings.exchange_wait_s + LATE_S:
            log.error(
                "a grant took %.0f s to arrive and goes back",
                took_s,
                extra={"action": "agent.late_grant", **_names(offer)},
            )
            files = RunnerFiles(self._settings.outbox, name)
            self._spawn(self._tell_gone_once(_Member(HEAVY_SLOT, files, offer)))
            return
        failpoints.hit("agent.heavy.granted")
        member = self._add(HEAVY_SLOT, name, offer)
        self._spawn(self._follow(member, lambda: self._processes.start_heavy(offer, name)))

    def _on_stop(self, stop: Stop) -> None:
        token = Token(*stop.token)
        for member in self._members.values():
            offer = member.offer
            if offer is None:
                # A slot whose executors are all busy does not ask the moderator: it looks here.
                if member.slot != stop.slot:
                    continue
            elif (offer.task_id, Token(*offer.token)) != (stop.task_id, token):
                continue
            if stop.reason in (UNSTARTED, STUCK):
                if offer is not None:
                    self._withdraw(member)
                    continue
                if not self._expect_answer(member, stop):
                    continue
            order = StopOrder(
                task_id=stop.task_id,
                generation=token.generation,
                attempt=token.attempt,
                reason=UNSTARTED if stop.reason == STUCK else stop.reason,
            )
            self._order(member, order)

    def _withdraw(self, member: _Member) -> None:
        """See that a heavy attempt which has not begun never does; its end is told as usual."""
        offer = member.offer
        assert offer is not None
        key = (offer.task_id, Token(*offer.token))
        if self._has_begun(member, key):
            return  # The word of it is on its way.
        member.withdrawn = True
        if member.pid is None:
            self._processes.withdraw(member.files.name)
        else:
            self._kill(member.pid, signal.SIGKILL)

    def _has_begun(self, member: _Member, key: tuple[str, Token]) -> bool:
        notes = map(read_note, self._executors(member.files.name))
        return any(note is not None and note.names(key) for note in notes)

    def _expect_answer(self, member: _Member, stop: Stop) -> bool:
        """Whether to pass on to a slot that something must not begin; end a slot that is stuck."""
        key, now = (stop.task_id, Token(*stop.token)), self._clock.elapsed()
        told = member.told_not_to_begin
        # Told for the first time, as after a lost answer, it has as long as any other.
        if stop.reason == UNSTARTED or key not in told:
            while len(told) >= ORDERS_KEPT:
                del told[next(iter(told))]
            told[key] = now
            return True
        began = self._has_begun(member, key)
        if now - told[key] >= STUCK_S and member.pid is not None and not began:
            log.error(
                "a slot is stuck: it is ended",
                extra={"action": "slot.stuck", "slot": member.files.name},
            )
            self._kill(member.pid, signal.SIGKILL)
        return False

    def _order(self, member: _Member, order: StopOrder) -> None:
        """Leave an order where the member looks for it."""
        try:
            known = read_stops(member.files.stop)[-ORDERS_KEPT:]
            write_stops(member.files, [*known, order])
            failpoints.hit("agent.stop.written")
        except OSError as error:
            log.error(
                "a stop order cannot be written",
                extra={"action": "agent.order_failed", "error": str(error)},
            )
            if member.pid is not None:  # A full disk: ending the process is what is left.
                self._kill(member.pid, signal.SIGKILL)

    # -- processes -------------------------------------------------------------------------------

    def _add(self, slot: int, name: str, offer: Offer | None = None) -> _Member:
        member = _Member(slot, RunnerFiles(self._settings.outbox, name), offer)
        self._members[name] = member
        if self._fenced:  # What was there before has the order.
            self._order(member, FENCED)
        return member

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _balance(self) -> None:
        """Keep the slots alive."""
        if self._closing or self._standing_back or self._clock.elapsed() < self._respawn_at:
            return
        slots = sum(1 for one in self._members.values() if one.offer is None)
        for _ in range(self._settings.base - slots):
            self._start_slot(next(self._numbers))

    def _start_slot(self, number: int) -> None:
        name = f"{self._settings.incarnation}.slot.{number}"
        member = self._add(number, name)
        self._spawn(self._follow(member, lambda: self._processes.start_slot(number, name)))

    async def _follow(self, member: _Member, start: Callable[[], Awaitable[None]]) -> None:
        """Wait for a process to end, then tell the moderator what its journals still hold."""
        name = member.files.name
        how, kind = "its slot's process ended", FailureKind.LOST
        try:
            await start()
        except Exception as error:
            if "OutOfMemory" in type(error).__name__:
                how, kind = "the machine ran out of memory", FailureKind.OOM
            if not self._closing and not member.withdrawn:
                log.warning(
                    "a process that ran work died",
                    extra={"action": "slot.died", "slot": name, "error": str(error)[:300]},
                )
                self._count_death()
        finally:
            self._members.pop(name, None)
            self._telling.add(name)
        self._balance()
        await self._tell_gone_once(member, kind, how)

    def _count_death(self) -> None:
        """Let the next process wait longer; those that die together count once."""
        now = self._clock.elapsed()
        if now >= self._respawn_at:
            self._deaths += 1
            pause = min(RESPAWN_S * 2 ** min(self._deaths, 16), RESPAWN_MAX_S)
            self._respawn_at = now + pause

    async def _tell_gone_once(
        self, member: _Member, kind: FailureKind = FailureKind.LOST, how: str = ""
    ) -> None:
        """Deliver it; meanwhile a hello leaves the member's journals alone."""
        name = member.files.name
        self._telling.add(name)
        await self._tell_gone(member, kind, how)
        self._telling.discard(name)

    async def _tell_gone(self, member: _Member, kind: FailureKind, how: str) -> None:
        """Deliver what a dead member's executors had written, until the moderator has it."""
        while not self._closing:
            executors = self._executors(member.files.name)
            try:
                await self._end(executors)
                reports = self._last_words(executors, kind, how)
                if member.offer is not None and not reports:
                    reports = await self._never_started(member)
                gone = SlotGone(
                    worker=self._settings.worker,
                    incarnation=self._settings.incarnation,
                    slot=member.slot,
                    reports=reports,
                )
                failpoints.hit("agent.gone.before")
                await self._link.slot_gone(gone)
                failpoints.hit("agent.gone.answered")
            except HcnaError:
                await asyncio.sleep(self._retry_s)
                continue
            for files in (*executors, member.files):
                files.remove()
            return

    async def _never_started(self, member: _Member) -> tuple[Report, ...]:
        """A heavy attempt left no word: it never began, or was confirmed to the last one."""
        offer = member.offer
        assert offer is not None
        # Told at once, one whose process cannot start would be back at once.
        await asyncio.sleep(max(0.0, self._respawn_at - self._clock.elapsed()))
        error = None
        if member.withdrawn:
            how = (
                "Ray did not start its process"
                if member.pid is None
                else "its process did not begin"
            )
            error = TaskError(kind=FailureKind.LOST, type=NOT_STARTED, message=how)
        token = Token(*offer.token)
        return (Report(ReportKind.RETURNED, offer.task_id, token, self._clock.now(), error=error),)

    # -- watching --------------------------------------------------------------------------------

    async def _watch_loop(self) -> None:
        while not self._closing:
            if self._goodbye_request() not in (None, self._old_request):
                await self._say_goodbye()
                return
            if self._must_stop() and not self._fenced:
                self._fence()
            self._balance()
            await asyncio.sleep(WATCH_S)

    def _must_stop(self) -> bool:
        """Whether the moderator may hand this worker's attempts to others before long."""
        return self._clock.elapsed() > self._contact_until

    @property
    def _contact_until(self) -> float:
        """When this worker stops by itself, unless it is answered before.

        The moderator counts a lease from the call before the last one that was answered. Usually a
        heartbeat lies between the two; after an answer that came after a long silence much more
        may.
        """
        stop_s = self._settings.self_stop_s
        return min(self._confirmed + stop_s, self._renewed + stop_s + self._settings.heartbeat_s)

    def _note_contact(self) -> None:
        """Let executors see before each start how long anything may begin here, and of what."""
        try:
            self._contact.write(self._contact_until, self._mark.read())
        except OSError as error:  # They still have the orders.
            log.error(
                "the contact cannot be written down",
                extra={"action": "agent.contact_failed", "error": str(error)},
            )

    def _goodbye_request(self) -> tuple[int, int] | None:
        """Return what tells one request of the supervisor from another; ``None`` without one."""
        if self._settings.run is None:
            return None
        try:
            found = (self._settings.run / GOODBYE_FILE).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    async def _say_goodbye(self) -> None:
        """End every process, tell the moderator what they left, and answer the supervisor."""
        log.info(
            "asked to stop: this worker says goodbye",
            extra={"action": "agent.goodbye", "worker": self._settings.worker},
        )
        await self.close()
        delivered = False
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._deliver_goodbye()
            delivered = True
        except (TimeoutError, *REFUSED) as error:
            # Its silence, or whoever is this worker now, tells the moderator as well.
            log.warning(
                "the moderator did not hear the goodbye",
                extra={"action": "agent.goodbye_unheard", "error": str(error)},
            )
        self._answer_supervisor(delivered)

    async def _deliver_goodbye(self) -> None:
        while True:
            try:
                # Also what others told the moderator of a moment ago: the fence drops it.
                executors = self._executors()
                await self._end(executors)
                if not self._connected:
                    await self._say_hello()
                found = self._last_words(executors, FailureKind.LOST, "its worker was stopped")
                bye = Goodbye(
                    worker=self._settings.worker,
                    incarnation=self._settings.incarnation,
                    reports=tuple(one for one in found if not _plainly_lost(one)),
                )
                failpoints.hit("agent.goodbye.before")
                await self._link.goodbye(bye)
                failpoints.hit("agent.goodbye.answered")
            except REFUSED:
                raise
            except HcnaError:
                await asyncio.sleep(RETRY_S)
                continue
            for files in executors:
                files.remove()
            return

    def _answer_supervisor(self, delivered: bool) -> None:
        assert self._settings.run is not None
        answer = self._settings.run / GOODBYE_DONE_FILE
        scratch = answer.with_suffix(f".{os.getpid()}")
        try:
            failpoints.hit("agent.goodbye.delivered")
            scratch.write_text(json.dumps({"delivered": delivered, "at": self._clock.now()}))
            scratch.replace(answer)
        except OSError as error:
            log.error(
                "the goodbye cannot be answered",
                extra={"action": "agent.goodbye_failed", "error": str(error)},
            )

    def _fence(self) -> None:
        """Nobody has confirmed this worker's session for too long: whatever runs must stop.

        Also what starts from now on, out of a grant that is still being worked off: an order that
        names no task stands until it is withdrawn.
        """
        self._fenced = True
        log.error(
            "no contact with the moderator: stopping this worker's attempts",
            extra={"action": "agent.fenced", "worker": self._settings.worker},
        )
        for member in self._members.values():
            self._order(member, FENCED)

    def _unfence(self) -> None:
        if self._fenced:
            self._fenced = False
            for member in self._members.values():
                stops = read_stops(member.files.stop)
                kept = [one for one in stops if not one.names_all]
                try:
                    write_stops(member.files, kept)
                except OSError:  # A full disk: no order at all is the better half of it.
                    member.files.stop.unlink(missing_ok=True)


def _plainly_lost(report: Report) -> bool:
    """Whether all that a report says is that its attempt ended with its worker."""
    error = report.error
    return report.kind == ReportKind.LOST and error is not None and error.kind is FailureKind.LOST


def _names(offer: Offer) -> dict[str, object]:
    return names_of(offer.task_id, Token(*offer.token).attempt, offer.traceparent)

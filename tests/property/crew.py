"""Workers as the moderator meets them: what their agents and slots say, and what runs on them.

They follow the protocol of `hcna_ray.runtime.agent` and `hcna_ray.runtime.host`, written anew from
its description: calls are repeated until they are answered, an exchange keeps its number and its
reports until then, what is not confirmed is kept, a worker that is not answered stops by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hcna_ray.core.errors import StaleWorker
from hcna_ray.core.models import HEAVY_SLOT, FailureKind, TaskError, Token
from hcna_ray.runtime.messages import (
    DRAINED,
    NOT_STARTED,
    STUCK,
    UNSTARTED,
    Ack,
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
from hcna_ray.runtime.requests import Reports, Request

#: A worker that was not answered for so long stops what it runs, which takes so long at most.
SELF_STOP_S = 20.0
STOP_S = 5.5
#: Longest time until a cancelled or overdue attempt is dead.
KILL_S = 11.0
HEARTBEAT_S = 5.0
BEAT_TIMEOUT_S = 4.0
CALL_TIMEOUT_S = 15.0
EXCHANGE_TIMEOUT_S = 35.0
GOODBYE_S = 20.0
#: An answer that took longer grants nothing.
GRANT_AGE_S = 25.0
#: What has not begun so long after it was handed to an executor never will.
BEGIN_S = 10.0
#: A slot that was told longer ago that something must not begin, and is told of again, is ended.
STUCK_S = 5.0

Key = tuple[str, Token]


@dataclass(eq=False)
class Call:
    """One request on its way, and who waits for its answer."""

    request: Request
    sent: float
    timeout_s: float
    answered: Callable[[Any], None]
    worker: Worker | None = None
    #: Nobody waits any more.
    given_up: bool = False

    def waits(self, elapsed: float) -> bool:
        """Whether the answer is still waited for."""
        return not self.given_up and elapsed < self.sent + self.timeout_s


@dataclass(eq=False)
class Run:
    """One granted attempt, from the grant until the moderator knows its end."""

    offer: Offer
    granted_at: float
    started_at: float | None = None
    over: bool = False
    #: Why it must end, and until when at the latest.
    stop: str = ""
    stop_by: float = float("inf")
    #: Whether two of one task may overlap for a reason that no lease can exclude.
    excused: bool = False

    @property
    def key(self) -> Key:
        """What it is known by."""
        return self.offer.task_id, Token(*self.offer.token)

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self.started_at is not None and not self.over


@dataclass(eq=False)
class Member:
    """A slot, or one heavy attempt: a process of the worker with a connection of its own."""

    slot: int
    seq: int = 0
    runs: dict[Key, Run] = field(default_factory=dict)
    #: Not confirmed yet, in the order in which it happened.
    outbox: list[Report] = field(default_factory=list)
    #: What an exchange took along, until it is answered.
    taken: tuple[Report, ...] = ()
    #: What must not begin, and since when it is known.
    withdrawn: dict[Key, float] = field(default_factory=dict)
    asking: Call | None = None
    reporting: Call | None = None
    channel: deque[Call] = field(default_factory=deque)

    def settle(self, reports: tuple[Report, ...]) -> None:
        """The moderator has these."""
        told = {(report.kind, report.task_id, report.token) for report in reports}
        self.outbox = [one for one in self.outbox if (one.kind, one.task_id, one.token) not in told]
        for report in reports:
            if report.kind not in (ReportKind.STARTED, ReportKind.PROGRESS):
                self.runs.pop((report.task_id, Token(*report.token)), None)


class Worker:
    """One worker: its agent, its slots, its clock."""

    def __init__(self, name: str, has: dict[str, Any], now: Callable[[], tuple[float, float]]):
        """Begin a worker that is switched off.

        Args:
            name: Its short name.
            has: Fields of its `Hello`.
            now: Wall clock of M1, and the clock that never steps.
        """
        self.name, self._has, self._now = name, has, now
        self.lives = 0
        self.on = False
        self.paused = False
        self.deaf = self.mute = False
        #: Until then it may start what a lease can no longer exclude, see the judge.
        self.excused_until = float("-inf")
        #: What its wall clock is off.
        self.off_s = 0.0
        #: When the call was sent that was answered last, and the one before.
        self.confirmed = 0.0
        self.renewed = 0.0
        self.members: list[Member] = []
        self.leftovers: list[Report] = []
        self.channel: deque[Call] = deque()
        self.begin()
        self.on = False

    # -- lives -----------------------------------------------------------------------------------

    @property
    def incarnation(self) -> str:
        """Names this life of its agent."""
        return f"{self.name}-{self.lives}"

    @property
    def elapsed(self) -> float:
        """The clock that never steps."""
        return self._now()[1]

    @property
    def wall(self) -> float:
        """Its own wall clock."""
        return self._now()[0] + self.off_s

    def begin(self) -> None:
        """Start the agent, with empty hands."""
        self.lives += 1
        self.on = True
        self.connected = self.fenced = False
        self.confirmed = self.renewed = self.elapsed
        self.fenced_at = 0.0
        self.saying: Call | None = None
        self.heard_at = -HEARTBEAT_S
        self.agent = Member(HEAVY_SLOT)
        self.members = [Member(0), Member(1)]
        self.slots_made = 2
        #: Members that ended, what they left, and the call that tells it.
        self.gone: list[tuple[Member, tuple[Report, ...]]] = []
        self.telling: Call | None = None
        self.parting: Call | None = None
        #: Since when it has been about to say goodbye.
        self.leaving: float | None = None
        self.channel = deque()

    def end(self, *, journals: bool) -> None:
        """The agent and all it started die; what was not confirmed is left in journals."""
        left: list[Report] = []
        for member in self.members:
            left += self._last_words(member, FailureKind.LOST)
        for _member, reports in self.gone:
            left += reports
        self.leftovers = [*self.leftovers, *left] if journals else []
        for call in (self.saying, self.telling, self.parting, self.agent.asking):
            _give_up(call)
        self.members, self.gone = [], []
        self.channel.clear()
        self.on = False

    def _last_words(self, member: Member, kind: FailureKind) -> list[Report]:
        """End a member's processes and return what its journals hold."""
        for run in list(member.runs.values()):
            if run.running:
                self._over(member, run, run.stop or kind)
        _give_up(member.asking)
        _give_up(member.reporting)
        member.channel.clear()
        return list(member.outbox)

    # -- what it says ----------------------------------------------------------------------------

    def _call(
        self, channel: deque[Call], request: Request, timeout_s: float, done: Callable[[Any], None]
    ) -> Call:
        call = Call(request, self.elapsed, timeout_s, done, self)
        channel.append(call)
        return call

    def beat(self) -> None:
        """Say hello, or that it is still there."""
        if self.saying is not None and self.saying.waits(self.elapsed):
            return
        _give_up(self.saying)
        sent = self.elapsed
        if not self.connected:
            hello = Hello(
                worker=self.name,
                node_id=f"HCNA-{self.name}--test",
                incarnation=self.incarnation,
                reports=tuple(self.leftovers),
                machine_id=f"machine of {self.name}",
                sent_at=self.wall,
                **self._has,
            )
            told = len(self.leftovers)

            def welcome(answer: object) -> None:
                self.saying = None
                if isinstance(answer, Welcome):
                    del self.leftovers[:told]
                    self.connected = True
                    self.confirmed = self.renewed = sent
                    self.heard_at = -HEARTBEAT_S
                elif isinstance(answer, StaleWorker):
                    self.end(journals=True)

            self.saying = self._call(self.channel, hello, CALL_TIMEOUT_S, welcome)
            return
        told_confirmed = self.confirmed
        beat = Heartbeat(
            worker=self.name,
            incarnation=self.incarnation,
            telemetry={},
            slots=len(self.members),
            sent_at=self.wall,
            unanswered_s=sent - told_confirmed,
            began=tuple(
                (*run.key, self.wall - (sent - run.started_at))
                for member in self.members
                for run in member.runs.values()
                if run.started_at is not None and not run.over
            ),
        )

        def reply(answer: object) -> None:
            self.saying = None
            if isinstance(answer, HeartbeatReply):
                self.connected = answer.known
                if answer.known:
                    self.renewed, self.confirmed = self.confirmed, sent
                    if self.confirmed - self.renewed > 2 * HEARTBEAT_S:
                        self.heard_at = -HEARTBEAT_S  # The next one renews what this could not.
                    else:
                        self.heard_at = sent
                        self.fenced = False
            elif isinstance(answer, StaleWorker):
                self.end(journals=True)

        self.saying = self._call(self.channel, beat, BEAT_TIMEOUT_S, reply)

    def ask(self, member: Member) -> None:
        """Exchange: give outcomes, ask for work."""
        if member.asking is not None and member.asking.waits(self.elapsed):
            return
        if member is self.agent and not self.connected:
            return
        if member is not self.agent and self.fenced and member.asking is None:
            return
        if member.asking is None:
            member.seq += 1
            member.taken = tuple(member.outbox)
        _give_up(member.asking)
        seq, taken, sent = member.seq, member.taken, self.elapsed
        exchange = Exchange(
            worker=self.name,
            incarnation=self.incarnation,
            slot=member.slot,
            seq=seq,
            reports=taken,
            holding=tuple(member.runs),
        )

        def granted(answer: object) -> None:
            if isinstance(answer, StaleWorker) and answer.current is not None:
                if member is not self.agent and member in self.members:
                    self.lose(member, FailureKind.LOST)
                return
            if not isinstance(answer, Grant) or answer.hello:
                if isinstance(answer, Grant) and member is self.agent:
                    self.connected = False
                assert member.asking is not None
                member.asking.given_up = True
                return
            member.asking = None
            member.settle(taken)
            self._take(member, answer, late=self.elapsed - sent > GRANT_AGE_S)

        channel = self.channel if member is self.agent else member.channel
        member.asking = self._call(channel, exchange, EXCHANGE_TIMEOUT_S, granted)

    def _take(self, member: Member, grant: Grant, *, late: bool) -> None:
        for offer in grant.offers:
            run = Run(offer._replace(token=Token(*offer.token)), self.elapsed)
            if member is not self.agent:
                holder = member
                member.runs.setdefault(run.key, run)
            elif all(run.key not in one.runs for one in self.members):
                holder = Member(HEAVY_SLOT, runs={run.key: run})
                self.members.append(holder)
            else:
                continue
            if late or run.key in holder.withdrawn:
                self._give_back(holder, holder.runs[run.key], "not any more")
        for stop in grant.stops:
            self._obey(stop, by_agent=member is self.agent)

    def _obey(self, stop: Stop, *, by_agent: bool) -> None:
        key = (stop.task_id, Token(*stop.token))
        for member in list(self.members):
            run = member.runs.get(key)
            if stop.reason == UNSTARTED or (stop.reason == STUCK and stop.slot == HEAVY_SLOT):
                if run is not None or member.slot == stop.slot != HEAVY_SLOT:
                    member.withdrawn[key] = self.elapsed
                if run is not None and run.started_at is None:
                    self._give_back(member, run, "withdrawn")
            elif stop.reason == STUCK:
                # Only the agent ends a slot.
                if not by_agent or member.slot != stop.slot:
                    continue
                told = member.withdrawn.setdefault(key, self.elapsed)
                if self.elapsed - told >= STUCK_S:
                    self.lose(member, FailureKind.LOST)
                elif run is not None and run.started_at is None:
                    self._give_back(member, run, "withdrawn")
            elif run is not None and not run.over and not run.stop:
                run.stop, run.stop_by = stop.reason, self.elapsed + KILL_S

    def _give_back(self, member: Member, run: Run, why: str) -> None:
        """Return what was granted and has not begun."""
        if run.over:
            return
        run.over = True
        error = TaskError(kind=FailureKind.LOST, type=NOT_STARTED, message=why)
        member.outbox.append(Report(ReportKind.RETURNED, *run.key, self.wall, error=error))

    def report(self, member: Member) -> None:
        """Deliver outcomes between two exchanges."""
        if member.reporting is not None and member.reporting.waits(self.elapsed):
            return
        if not member.outbox:
            return
        _give_up(member.reporting)
        reports = tuple(member.outbox)

        def confirmed(answer: object) -> None:
            member.reporting = None
            if isinstance(answer, Ack):
                member.settle(reports)
                if member.slot == HEAVY_SLOT and not member.runs and member in self.members:
                    self.members.remove(member)

        request = Reports(worker=self.name, incarnation=self.incarnation, reports=reports)
        member.reporting = self._call(member.channel, request, CALL_TIMEOUT_S, confirmed)

    def lose(self, member: Member, kind: FailureKind) -> None:
        """A member's process dies; the agent will tell."""
        reports = tuple(self._last_words(member, kind))
        if member.slot == HEAVY_SLOT and not reports:
            reports = tuple(Report(ReportKind.RETURNED, *key, self.wall) for key in member.runs)
        self.members.remove(member)
        self.gone.append((member, reports))
        if member.slot != HEAVY_SLOT:
            self.members.append(Member(self.slots_made))
            self.slots_made += 1

    def tell_gone(self) -> None:
        """Tell of the member that ended first."""
        if not self.gone or (self.telling is not None and self.telling.waits(self.elapsed)):
            return
        _give_up(self.telling)
        member, reports = self.gone[0]

        def told(answer: object) -> None:
            self.telling = None
            if isinstance(answer, Ack):
                self.gone = [one for one in self.gone if one[0] is not member]

        request = SlotGone(
            worker=self.name, incarnation=self.incarnation, slot=member.slot, reports=reports
        )
        self.telling = self._call(self.channel, request, CALL_TIMEOUT_S, told)

    def part(self) -> None:
        """Stop in good order: end everything, say goodbye, and be off when it is answered."""
        if self.leaving is None:
            self.leaving = self.elapsed
        if self.parting is not None and self.parting.waits(self.elapsed):
            return
        if not self.connected:
            self.beat()
            return
        for member in list(self.members):
            self.gone.append((member, tuple(self._last_words(member, FailureKind.LOST))))
        self.members = []
        reports = tuple(one for _, left in self.gone for one in left if not _plainly_lost(one))

        def parted(answer: object) -> None:
            self.parting = None
            if isinstance(answer, Ack | StaleWorker):
                self.gone = []
                self.end(journals=False)

        bye = Goodbye(worker=self.name, incarnation=self.incarnation, reports=reports)
        self.parting = self._call(self.channel, bye, CALL_TIMEOUT_S, parted)

    # -- what it does ----------------------------------------------------------------------------

    def start(self, member: Member, run: Run) -> bool:
        """Begin a granted attempt, or give it back; return whether it runs now."""
        left = run.offer.expires_in_s
        age = self.elapsed - run.granted_at
        expired = left is not None and age >= left
        # Ray may take its time with a process of its own.
        stale = age > BEGIN_S and member.slot != HEAVY_SLOT
        if self.fenced or run.stop or expired or stale:
            self._give_back(member, run, run.stop or "not started")
            return False
        run.started_at = self.elapsed
        run.stop_by = self.elapsed + run.offer.timeout_s + KILL_S
        member.outbox.append(Report(ReportKind.STARTED, *run.key, self.wall))
        return True

    def finish(self, member: Member, run: Run, how: str, number: int) -> None:
        """End an attempt of itself; ``number`` makes its result unlike any other."""
        run.over = True
        kind = ReportKind.COMPLETED
        more: dict[str, Any]
        if how == "completed":
            more = {"result": result_of(run.key, number)}
        elif how == "lost":
            kind = ReportKind.LOST
            more = {"error": TaskError(kind=FailureKind.POISON, message="it died")}
        else:
            kind = ReportKind.FAILED
            reason = FailureKind.TIMEOUT if how == "timeout" else FailureKind.ERROR
            more = {"error": TaskError(kind=reason, message=how, retryable=how != "fatal")}
        self._report_end(member, run, kind, more)

    def _over(self, member: Member, run: Run, why: str) -> None:
        """A process was stopped, or killed, for a reason."""
        run.over = True
        match why:
            case "cancel":
                self._report_end(member, run, ReportKind.CANCELLED, {})
            case "timeout":
                error = TaskError(kind=FailureKind.TIMEOUT, message="ran too long")
                self._report_end(member, run, ReportKind.FAILED, {"error": error})
            case _:
                kind = FailureKind.LOST if why in ("drain", "fenced") else FailureKind(why)
                error = TaskError(kind=kind, message=why, type=DRAINED if why == "drain" else None)
                self._report_end(member, run, ReportKind.LOST, {"error": error})

    def _report_end(self, member: Member, run: Run, kind: str, more: dict[str, Any]) -> None:
        assert run.started_at is not None
        now = self.wall
        started = now - (self.elapsed - run.started_at)
        member.outbox.append(
            Report(kind, *run.key, now, started_at=started, duration_ms=2.0, **more)
        )

    def stop(self, member: Member, run: Run) -> None:
        """Obey an order: end it, or give it back."""
        if run.running:
            self._over(member, run, run.stop or "timeout")
        elif not run.over:
            self.start(member, run)

    def watch(self) -> None:
        """What an agent sees to by itself: silence, orders, time limits."""
        if not self.on or self.paused:
            return
        now = self.elapsed
        if self.leaving is not None and now - self.leaving > GOODBYE_S:
            self.end(journals=True)  # Its silence tells the moderator as well.
            return
        stops_at = self.stops_at()
        if now > stops_at and not self.fenced:
            self.fenced, self.fenced_at = True, stops_at
        for member in self.members:
            for run in list(member.runs.values()):
                if not run.running:
                    if self.fenced and not run.over:
                        self.start(member, run)  # Which gives it back.
                    continue
                if self.fenced and run.stop != "fenced":
                    run.stop, run.stop_by = "fenced", min(run.stop_by, self.fenced_at + STOP_S)
                if run.stop_by <= now:
                    self.stop(member, run)

    def stops_at(self) -> float:
        """Return when it stops by itself if it is not answered.

        The moderator counts from the answer of which a call has told it: the one before the last.
        """
        return min(self.confirmed + SELF_STOP_S, self.renewed + SELF_STOP_S + HEARTBEAT_S)


def result_of(key: Key, number: int) -> bytes:
    """Return a result that tells who made it."""
    return f'{{"by": "{key[0]} {key[1]}", "n": {number}}}'.encode()


def made_by(result: bytes, task_id: str, token: Token) -> bool:
    """Return whether an attempt made this result."""
    return result.startswith(f'{{"by": "{task_id} {token}", '.encode())


def _give_up(call: Call | None) -> None:
    if call is not None:
        call.given_up = True


def _plainly_lost(report: Report) -> bool:
    error = report.error
    return report.kind == ReportKind.LOST and error is not None and error.kind is FailureKind.LOST

"""Every state that two tasks, two workers and a few faults can reach, one after the other.

The rules are the product's own: `machine.advance` for tasks, `Sessions` for what silence means.
The shell around them is a small model of docs/GUARANTEES.md: who says hello, what a crash leaves,
when a worker stops itself. Time is counted in heartbeats, ages stand for instants, and a state has
no history: so there are finitely many, and all are visited (breadth first). Whatever is possible is
tried in each: a message may wait as long as it likes, and a fault may come between any two steps.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from hcna_ray.core import machine
from hcna_ray.core.errors import TaskFinished
from hcna_ray.core.events import (
    AttemptCancelled,
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    CancelRequested,
    Event,
    LeaseGranted,
    LeaseReturned,
    TimePassed,
)
from hcna_ray.core.models import (
    FailureKind,
    Lease,
    RetryPolicy,
    Task,
    TaskError,
    TaskSpec,
    TaskState,
    Token,
    WorkerState,
)
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.sessions import Session, Sessions
from tests.support.builders import a_worker_record

#: One tick of the model, in seconds. Heartbeats are rarer than the product's: fewer ages.
TICK_S = 10.0
AT = 0.0


class Report(NamedTuple):
    """What a worker has to say of an attempt."""

    task: int
    token: Token
    kind: str


class Run(NamedTuple):
    """An attempt on its worker."""

    task: int
    token: Token
    running: bool
    #: The worker was paused with it in hand: no lease can exclude that two overlap then.
    paused: bool


class Link(NamedTuple):
    """What gets through between a worker and the moderator."""

    to_moderator: bool = True
    to_worker: bool = True


WHOLE = Link()
CUTS = (Link(False, False), Link(True, False), Link(False, True))


class Worker(NamedTuple):
    """One worker, and the moderator's session of it."""

    #: Ticks since the last heartbeat that was answered, and since the one that the moderator is
    #: known to have been told of as answered.
    confirmed: int = 0
    told: int = 0
    connected: bool = True
    paused: bool = False
    link: Link = WHOLE
    runs: frozenset[Run] = frozenset()
    outbox: tuple[Report, ...] = ()
    #: Grants on their way to it.
    coming: frozenset[tuple[int, Token]] = frozenset()
    #: The session: ticks since it was heard, and since its leases count; whether it is closed.
    heard: int = 0
    renewed: int = 0
    asleep: bool = False


class State(NamedTuple):
    """Everything."""

    #: Numbers of the tasks in `Search.tasks`.
    tasks: tuple[int, int]
    workers: tuple[Worker, Worker]
    up: bool = True
    crashes: int = 1
    cuts: int = 1
    pauses: int = 1
    cancels: int = 1


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the model takes from the product, and tests break on purpose."""

    policy: Policy = field(default_factory=Policy)
    #: A worker stops itself after so many ticks of silence; its processes are dead one tick later.
    self_stop: int = 2
    #: What a moderator that starts again makes of a task it finds.
    recover: Callable[[Task], Task] = lambda task: task
    #: Whether a worker counts its silence from what the moderator is known to have been told.
    cautious: bool = True
    #: Whether a worker that stops itself also gives up its calls: an answer may still be under way.
    gives_up_calls: bool = True

    def silence(self, worker: Worker) -> int:
        """Return for how many ticks a worker has been silent, as it sees it itself."""
        return max(worker.confirmed, worker.told - 1) if self.cautious else worker.confirmed


class Violation(Exception):
    """A state that must not be reached."""


@dataclass
class Found:
    """What a search has seen."""

    states: int = 0
    transitions: int = 0
    ends: int = 0
    violation: str = ""
    #: How the violation is reached.
    path: list[str] = field(default_factory=list)


def spec(number: int) -> TaskSpec:
    """Return one of the two tasks: the second one may fail once and is tried again."""
    retry = RetryPolicy() if number == 0 else RetryPolicy(max_attempts=2, backoff_s=0.0)
    return TaskSpec(id=f"t{number}", task_type="echo", retry=retry, max_losses=2 - number)


def begin(*, cuts: int = 1, pauses: int = 1, crashes: int = 1, cancels: int = 1) -> State:
    """Return the first state: two tasks wait, two workers are there.

    Args:
        cuts: How often the way to the first worker may be cut.
        pauses: How often a worker may be paused.
        crashes: How often the moderator may be killed.
        cancels: How often the second task may be cancelled.
    """
    return State(
        (0, 1),
        (Worker(), Worker()),
        crashes=crashes,
        cuts=cuts,
        pauses=pauses,
        cancels=cancels,
    )


class Search:
    """Visits every state."""

    def __init__(self, rules: Rules) -> None:
        """Take the rules."""
        self.rules = rules
        policy = rules.policy
        self._sessions = Sessions(
            suspect_s=2.5 * policy.heartbeat_s,
            ttl_s=policy.lease_ttl_s + policy.lease_grace_s,
            gone_s=policy.gone_after_s,
        )
        #: Every shape that a task takes, and its number.
        self.tasks: list[Task] = []
        self._numbers: dict[Task, int] = {}
        for number in (0, 1):
            self._number(machine.accept(spec(number), seq=number + 1, at=AT).task)
        self._workers: list[Worker] = []
        self._worker_numbers: dict[Worker, int] = {}
        self._known: dict[tuple[int, type[Event], Token | None], int] = {}
        # Whoever is older than this is no different.
        self._silent = rules.self_stop + 1
        self._suspect = int(2.5 * policy.heartbeat_s / TICK_S) + 1
        self._lost = int((policy.lease_ttl_s + policy.lease_grace_s) / TICK_S) + 1
        self.session_state = lru_cache(maxsize=None)(self._session_state)
        self.overdue = lru_cache(maxsize=None)(self._overdue)

    # -- the product's rules -----------------------------------------------------------------------

    def _session(self, heard: int, renewed: int, asleep: bool) -> Session:
        session = self._sessions.put(a_worker_record(), 0.0)
        session.heard, session.renewed = -heard * TICK_S, -renewed * TICK_S
        session.closed = asleep
        return session

    def _session_state(self, heard: int, renewed: int, asleep: bool) -> WorkerState:
        return self._sessions.state(self._session(heard, renewed, asleep), 0.0)

    def _overdue(self, heard: int, renewed: int, asleep: bool) -> bool:
        session = self._session(heard, renewed, asleep)
        return session in self._sessions.overdue(0.0)

    def _number(self, task: Task) -> int:
        number = self._numbers.get(task)
        if number is None:
            number = self._numbers[task] = len(self.tasks)
            self.tasks.append(task)
        return number

    def _advance(self, state: State, index: int, event: Event) -> State:
        """Apply an event to a task, and judge the step."""
        number = state.tasks[index]
        token: Token | None = getattr(event, "token", None)
        if isinstance(event, LeaseGranted):
            token = Token(int(event.lease.worker[1:]), event.lease.token.attempt)
        key = (number, type(event), token)
        after = self._known.get(key)
        if after is None:
            task = machine.advance(self.tasks[number], event).task
            self._judge(self.tasks[number], task, event)
            after = self._known[key] = self._number(task)
        if after == number:
            return state
        tasks = (after, state.tasks[1]) if index == 0 else (state.tasks[0], after)
        return state._replace(tasks=tasks)

    def _judge(self, before: Task, after: Task, event: Event | None) -> None:
        if before == after:
            return
        if before.terminal and after != before:
            raise Violation(f"a finished task moved: {before.state} to {after.state} ({event})")
        if isinstance(event, LeaseGranted):
            token = event.lease.token
            if token.attempt <= before.attempt or before.lease is not None:
                raise Violation(f"token {token} after {before.attempt}, lease {before.lease}")
        named: Token | None = getattr(event, "token", None)
        live = None if before.lease is None else before.lease.token
        if named is not None and named != live:
            raise Violation(f"token {named} counts, and {live} is in force")
        if wrong := machine.violations(after):
            raise Violation("; ".join(wrong))

    # -- what can happen ---------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield everything that can happen next."""
        yield "a heartbeat's time passes", self._tick(state)
        yield from self._moderator(state)
        for number, worker in enumerate(state.workers):
            if not worker.paused:
                yield from self._worker(state, number, worker)
            yield from self._faults(state, number, worker)

    def _each(self, state: State) -> list[tuple[int, Task]]:
        return [(index, self.tasks[number]) for index, number in enumerate(state.tasks)]

    def _with(self, state: State, number: int, worker: Worker) -> State:
        one, other = state.workers
        return state._replace(workers=(worker, other) if number == 0 else (one, worker))

    def _tick(self, state: State) -> State:
        for number in (0, 1):
            state = self._with(state, number, self._older(state, state.workers[number]))
        if state.up:
            for number in (0, 1):
                worker = state.workers[number]
                if self.overdue(worker.heard, worker.renewed, worker.asleep):
                    state = self._lose(state, number)
        return state

    def _older(self, state: State, worker: Worker) -> Worker:
        """One tick later: the worker beats, unless something keeps it from that."""
        worker = worker._replace(
            confirmed=min(worker.confirmed + 1, self._silent),
            told=min(worker.told + 1, self._silent + 1),
            heard=min(worker.heard + 1, self._suspect),
            renewed=min(worker.renewed + 1, self._lost),
        )
        if worker.paused:
            return worker
        beats = state.up and worker.connected and worker.link.to_moderator
        if beats and not worker.asleep:
            # It says when it was last answered: from then its leases count.
            unanswered = worker.confirmed
            worker = worker._replace(heard=0, renewed=min(worker.renewed, unanswered))
            if worker.link.to_worker:
                worker = worker._replace(confirmed=0, told=min(worker.told, unanswered))
        elif beats and worker.link.to_worker:
            worker = worker._replace(connected=False)
        if self.rules.silence(worker) > self.rules.self_stop:
            worker = self._stopped(worker)
        return worker

    def _stopped(self, worker: Worker) -> Worker:
        """It was silent for too long: whatever it runs is dead now."""
        said = tuple(
            Report(run.task, run.token, "lost" if run.running else "returned")
            for run in sorted(worker.runs)
        )
        coming = frozenset() if self.rules.gives_up_calls else worker.coming
        return worker._replace(runs=frozenset(), outbox=worker.outbox + said, coming=coming)

    def _lose(self, state: State, number: int) -> State:
        """The moderator takes back what a silent worker holds."""
        state = self._with(state, number, state.workers[number]._replace(asleep=True))
        for index, task in self._each(state):
            lease = task.lease
            if lease is None or lease.worker != f"W{number}":
                continue
            event: Event = LeaseReturned(at=AT, token=lease.token)
            if lease.started_at is not None:
                event = _lost(lease.token)
            state = self._advance(state, index, event)
        return state

    def _moderator(self, state: State) -> Iterator[tuple[str, State]]:
        if not state.up:
            yield "the moderator starts", self._recover(state)
            return
        if state.crashes:
            yield "the moderator is killed", state._replace(up=False, crashes=state.crashes - 1)
        for index, task in self._each(state):
            if task.state is TaskState.SCHEDULED:
                yield f"t{index} is due", self._advance(state, index, TimePassed(at=AT))
            if state.cancels and not task.terminal and index == 1:
                try:
                    asked = self._advance(state, index, CancelRequested(at=AT))
                except TaskFinished:
                    continue
                yield f"t{index} is to be cancelled", asked._replace(cancels=state.cancels - 1)
            if task.ready:
                for number in (0, 1):
                    yield from self._grant(state, index, number)

    def _grant(self, state: State, index: int, number: int) -> Iterator[tuple[str, State]]:
        worker, task = state.workers[number], self.tasks[state.tasks[index]]
        view = self.session_state(worker.heard, worker.renewed, worker.asleep)
        busy = any(
            one.lease is not None and one.lease.worker == f"W{number}"
            for _, one in self._each(state)
        )
        # Somebody has to ask: a call of a free slot waits at the moderator. One that has stopped
        # itself does not ask: it would give back what it gets, over and over.
        stopped = self.rules.silence(worker) > self.rules.self_stop - 1
        if view is not WorkerState.ONLINE or busy or worker.coming or stopped:
            return
        token = Token(1, task.attempt + 1)
        lease = Lease(
            token=token,
            worker=f"W{number}",
            incarnation="a",
            slot=0,
            grant_seq=1,
            granted_at=AT,
        )
        granted = self._advance(state, index, LeaseGranted(at=AT, lease=lease))
        coming = worker.coming | {(index, token)}
        sent = self._with(granted, number, worker._replace(coming=coming))
        yield f"t{index} is granted to W{number} as {token}", sent
        if state.crashes:
            killed = granted._replace(up=False, crashes=state.crashes - 1)
            yield f"t{index} is granted to W{number} as {token}, unsaid: killed", killed

    def _recover(self, state: State) -> State:
        """A new moderator reads the store: an open session gets one full lease time."""
        workers = tuple(
            worker._replace(heard=0, renewed=0) if not worker.asleep else worker
            for worker in state.workers
        )
        found = []
        for _, task in self._each(state):
            after = self.rules.recover(task)
            self._judge(task, after, None)
            found.append(self._number(after))
        return state._replace(up=True, workers=(workers[0], workers[1]), tasks=(found[0], found[1]))

    def _worker(self, state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
        name, stopped = f"W{number}", self.rules.silence(worker) > self.rules.self_stop - 1
        whole = state.up and worker.link == WHOLE
        if whole and not worker.connected:
            fresh = worker._replace(
                connected=True, confirmed=0, told=0, heard=0, renewed=0, asleep=False
            )
            yield f"{name} says hello", self._with(state, number, fresh)
        if worker.link.to_worker:
            for index, token in worker.coming:
                left = worker.coming - {(index, token)}
                if stopped:
                    back = Report(index, token, "returned")
                    given = worker._replace(coming=left, outbox=(*worker.outbox, back))
                else:
                    run = Run(index, token, False, False)
                    given = worker._replace(coming=left, runs=worker.runs | {run})
                yield f"{name} receives t{index}", self._with(state, number, given)
        if whole and worker.connected and not worker.asleep:
            yield from self._ask_again(state, number, worker)
        for run in worker.runs:
            yield from self._run(state, number, worker, run, stopped)
        if state.up and worker.link.to_moderator and worker.outbox:
            yield from self._deliver(state, number, worker)

    def _ask_again(self, state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
        """The same exchange gets the same grant, and orders to stop reach who holds an attempt."""
        for index, task in self._each(state):
            lease = task.lease
            if lease is None or lease.worker != f"W{number}":
                continue
            known = {(run.task, run.token) for run in worker.runs}
            known |= {(report.task, report.token) for report in worker.outbox}
            known |= worker.coming
            if (index, lease.token) not in known and lease.started_at is None:
                coming = worker.coming | {(index, lease.token)}
                again = worker._replace(coming=coming)
                yield f"t{index} is told to W{number} again", self._with(state, number, again)
            elif (index, lease.token) not in known:
                # It runs nothing of this: whatever it was is over (`holding`).
                yield (
                    f"W{number} does not know t{index}",
                    self._advance(state, index, _lost(lease.token)),
                )
            for run in worker.runs:
                if (run.task, run.token) != (index, lease.token):
                    continue
                if task.cancel_requested_at is not None:
                    kind = "cancelled" if run.running else "returned"
                    ended = self._over(worker, run, kind)
                    yield f"W{number} obeys", self._with(state, number, ended)

    def _over(self, worker: Worker, run: Run, kind: str) -> Worker:
        report = Report(run.task, run.token, kind)
        return worker._replace(runs=worker.runs - {run}, outbox=(*worker.outbox, report))

    def _run(
        self, state: State, number: int, worker: Worker, run: Run, stopped: bool
    ) -> Iterator[tuple[str, State]]:
        name = f"W{number}"
        if not run.running and not stopped:
            self._judge_start(state, number, run)
            begun = worker.runs - {run} | {run._replace(running=True)}
            said = (*worker.outbox, Report(run.task, run.token, "started"))
            now = worker._replace(runs=begun, outbox=said)
            yield f"{name} starts t{run.task} {run.token}", self._with(state, number, now)
        elif not run.running:
            back = self._over(worker, run, "returned")
            yield f"{name} gives t{run.task} back", self._with(state, number, back)
        else:
            done = self._over(worker, run, "completed")
            yield f"{name} completes t{run.task} {run.token}", self._with(state, number, done)
            if run.task == 1:
                bad = self._over(worker, run, "failed")
                yield f"{name} fails t{run.task} {run.token}", self._with(state, number, bad)

    def _judge_start(self, state: State, number: int, run: Run) -> None:
        for other, worker in enumerate(state.workers):
            for that in worker.runs:
                same = that.task == run.task and that.running and (other, that) != (number, run)
                if same and not (that.paused or run.paused):
                    raise Violation(
                        f"t{run.task} runs on W{other} as {that.token} and starts on W{number} "
                        f"as {run.token}"
                    )

    def _deliver(self, state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
        """The first thing that a worker has to say arrives; who is not answered says it again."""
        report, rest = worker.outbox[0], worker.outbox[1:]
        name = f"W{number} reports {report.kind} of t{report.task} {report.token}"
        taken = state
        if not worker.asleep or report.kind != "started":
            taken = self._advance(state, report.task, _event(report))
        if worker.link.to_worker:
            yield name, self._with(taken, number, worker._replace(outbox=rest))
        elif taken is not state:
            yield f"{name}, unanswered", taken
        if state.crashes and taken is not state:
            killed = taken._replace(up=False, crashes=state.crashes - 1)
            yield f"{name}, unanswered: killed", killed

    def _faults(self, state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
        name = f"W{number}"
        if worker.link != WHOLE:
            yield (
                f"the way to {name} is whole",
                self._with(state, number, worker._replace(link=WHOLE)),
            )
        elif state.cuts and number == 0:  # The other one is no different.
            for cut in CUTS:
                lost = worker._replace(link=cut)
                left = state._replace(cuts=state.cuts - 1)
                yield f"the way to {name} is cut {tuple(cut)}", self._with(left, number, lost)
        if worker.paused:
            yield f"{name} goes on", self._with(state, number, worker._replace(paused=False))
        elif state.pauses:
            held = frozenset(run._replace(paused=True) for run in worker.runs)
            # What comes meanwhile is found afterwards, however old it is.
            still = worker._replace(paused=True, runs=held)
            left = state._replace(pauses=state.pauses - 1)
            yield f"{name} stands still", self._with(left, number, still)

    # -- all of it ---------------------------------------------------------------------------------

    def without_the_first(self, state: State) -> State:
        """Return the state with the first task cancelled."""
        return self._advance(state, 0, CancelRequested(at=AT))

    def _packed(self, state: State) -> int:
        """Return a state as one number: millions of them have to be remembered."""
        packed = 0
        for number in (*state.tasks, *(self._worker_number(one) for one in state.workers)):
            packed = packed << 24 | number
        for budget in (state.crashes, state.cuts, state.pauses, state.cancels):
            packed = packed << 2 | budget
        return packed << 1 | state.up

    def _worker_number(self, worker: Worker) -> int:
        number = self._worker_numbers.get(worker)
        if number is None:
            number = self._worker_numbers[worker] = len(self._workers)
            self._workers.append(worker)
        return number

    def _unpacked(self, packed: int) -> State:
        up, packed = bool(packed & 1), packed >> 1
        cancels, pauses, cuts, crashes = (packed >> shift & 3 for shift in (0, 2, 4, 6))
        packed >>= 8
        other, one, second, first = (packed >> shift & 0xFFFFFF for shift in (0, 24, 48, 72))
        return State(
            (first, second),
            (self._workers[one], self._workers[other]),
            up,
            crashes,
            cuts,
            pauses,
            cancels,
        )

    def run(self, first: State, *, states_max: int = 10_000_000) -> Found:
        """Visit every state that can be reached; stop at the first violation."""
        found = Found()
        numbers = {self._packed(first): 0}
        packed = [self._packed(first)]
        #: From which state each was reached first, and all steps as pairs.
        came = array("l", [-1])
        edges_from, edges_to = array("l"), array("l")
        ends = bytearray([0])
        number = -1
        while (number := number + 1) < len(packed):
            state = self._unpacked(packed[number])
            ends[number] = all(task.terminal for _, task in self._each(state))
            try:
                for _, after in self.steps(state):
                    if after == state:
                        continue
                    key = self._packed(after)
                    known = numbers.get(key)
                    if known is None:
                        known = numbers[key] = len(packed)
                        packed.append(key)
                        came.append(number)
                        ends.append(0)
                    edges_from.append(number)
                    edges_to.append(known)
                if len(packed) > states_max:
                    raise Violation("more states than there should be")
            except Violation as error:
                found.violation = str(error)
                found.path = self._path(packed, came, number)
                break
        found.states, found.transitions, found.ends = len(packed), len(edges_to), sum(ends)
        if not found.violation:
            stuck = _stuck(ends, edges_from, edges_to)
            if stuck is not None:
                found.violation = "no end can be reached"
                found.path = self._path(packed, came, stuck)
        return found

    def _path(self, packed: list[int], came: array[int], number: int) -> list[str]:
        """Return what led to a state."""
        names: list[str] = []
        while number > 0:
            before, wanted = self._unpacked(packed[came[number]]), packed[number]
            names.append(
                next(name for name, after in self.steps(before) if self._packed(after) == wanted)
            )
            number = came[number]
        return names[::-1]


def _stuck(ends: bytearray, edges_from: array[int], edges_to: array[int]) -> int | None:
    """Return a state from which no end is in reach, if there is one."""
    reach, changed = bytearray(ends), True
    while changed:
        changed = False
        # Most steps lead to states found later: backwards, a few rounds are enough.
        for before, after in zip(reversed(edges_from), reversed(edges_to), strict=True):
            if reach[after] and not reach[before]:
                reach[before] = changed = True
    return next((number for number, there in enumerate(reach) if not there), None)


def _lost(token: Token) -> AttemptLost:
    return AttemptLost(at=AT, token=token, kind=FailureKind.LOST, message="", worker_gone=True)


def _event(report: Report) -> Event:
    """Return what a report tells the rules; a result names who made it."""
    token = report.token
    match report.kind:
        case "started":
            return AttemptStarted(at=AT, token=token)
        case "completed":
            return AttemptCompleted(at=AT, token=token, started_at=AT, result=str(token).encode())
        case "failed":
            error = TaskError(kind=FailureKind.ERROR, message="")
            return AttemptFailed(at=AT, token=token, started_at=AT, error=error)
        case "cancelled":
            return AttemptCancelled(at=AT, token=token, started_at=AT)
        case "returned":
            return LeaseReturned(at=AT, token=token)
        case _:
            return _lost(token)


def queue_again(task: Task) -> Task:
    """Do what recovery must not do: queue whatever had ended."""
    return dataclasses.replace(
        task, state=TaskState.QUEUED, finished_at=None, result=None, lease=None
    )

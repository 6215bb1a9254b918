"""A small world around the pure core: a moderator's shell, three workers, a bad network, a clock.

Only what is in `Durable` survives a crash. Beside it the world keeps a ledger for every task: what
must be true of it, worked out from what happened and not from the code under test. `World.handle`
compares the two at every step and raises `BrokenPromise` with the number of the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

from hcna_ray.core import machine, placement
from hcna_ray.core.errors import NotFailed, TaskFinished
from hcna_ray.core.events import (
    AttemptCancelled,
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptProgressed,
    AttemptStarted,
    CancelRequested,
    ClockStepped,
    Command,
    DependencySettled,
    Event,
    KeyHeld,
    KeyReleased,
    LeaseGranted,
    LeaseReturned,
    ReleaseConcurrency,
    ReleaseOrdering,
    SettleDependents,
    StopAttempt,
    TaskReplayed,
    TimePassed,
)
from hcna_ray.core.machine import Step
from hcna_ray.core.models import (
    HEAVY_SLOT,
    TERMINAL,
    Attempt,
    Fact,
    FailureKind,
    Hold,
    LaneKey,
    Lease,
    Needs,
    Outcome,
    Progress,
    Task,
    TaskError,
    TaskSpec,
    TaskState,
    Token,
    WorkerState,
    WorkerView,
)
from hcna_ray.core.placement import Assignment, Opening
from tests.property.judge import amounts, broken_promises, totals

START_AT = 1_790_000_000.0
STARTS_MAX = 5
#: How many tasks of a concurrency key may be live.
CONCURRENCY = {"one": 1, "two": 2}
ESTIMATES_MS = {"echo": 2.0}
SLOT_ITEMS_MAX = 3
SLOT_BUDGET_MS = 50.0
HEAVY_MAX = 2

WORKERS = (
    WorkerView(
        name="W1",
        node_id="HCNA-W1",
        state=WorkerState.ONLINE,
        cpu=2.0,
        mem_gb=4.0,
        task_types=frozenset({"echo", "sleep"}),
    ),
    WorkerView(
        name="W2",
        node_id="HCNA-W2",
        state=WorkerState.ONLINE,
        cpu=4.0,
        mem_gb=8.0,
        gpu=1.0,
        resources=(("scratch", 0.3),),
        task_types=frozenset({"echo", "sleep"}),
    ),
    WorkerView(
        name="W3",
        node_id="HCNA-W3",
        state=WorkerState.ONLINE,
        cpu=1.0,
        mem_gb=2.0,
        task_types=frozenset({"echo"}),
    ),
)

#: What may follow in a task's history: phase -> kind of fact -> next phase.
GRAMMAR: dict[str, dict[str, str]] = {
    "unborn": {"accepted": "waiting"},
    "waiting": {
        "queued": "waiting",
        "unpinned": "waiting",
        "granted": "granted",
        "cancelled": "ended",
        "expired": "ended",
        "failed": "ended",
    },
    "granted": {
        "started": "running",
        "returned": "waiting",
        "lost": "waiting",
        "retry_scheduled": "waiting",
        "cancel_requested": "granted",
        "completed": "ended",
        "failed": "ended",
        "cancelled": "ended",
    },
    "running": {
        "lost": "waiting",
        "retry_scheduled": "waiting",
        "cancel_requested": "running",
        "completed": "ended",
        "failed": "ended",
        "cancelled": "ended",
    },
    "ended": {"replayed": "waiting"},
}


class BrokenPromise(AssertionError):
    """The code under test did something that the guarantees exclude."""


@dataclass
class Tally:
    """How much a machine has done."""

    steps: int = 0
    worlds: int = 0
    violations: int = 0
    #: Every change of a task that was seen: shows that the world reaches everything.
    moves: set[tuple[TaskState, str, TaskState]] = field(default_factory=set)


#: The tally that is printed at the end of the test run.
TALLY = Tally()


class Report(NamedTuple):
    """A message on its way to the moderator."""

    task_id: str
    event: Event


class Run(NamedTuple):
    """One attempt as a worker knows it."""

    task_id: str
    token: Token


@dataclass
class Ledger:
    """What must be true of one task. A *life* ends with a replay."""

    live: Token | None = None
    started: bool = False
    asked_to_cancel: bool = False
    failures: int = 0
    losses: int = 0
    #: Attempts lost because somebody stopped their worker: not held against the task.
    forgiven: int = 0
    ends: int = 0
    result: bytes | None = None
    phase: str = "unborn"
    grants: int = 0
    replays: int = 0
    closed: list[Attempt] = field(default_factory=list)


def _copied(ledgers: dict[str, Ledger]) -> dict[str, Ledger]:
    return {name: replace(ledger, closed=list(ledger.closed)) for name, ledger in ledgers.items()}


@dataclass
class Durable:
    """What is on disk. Replaced as a whole by a crash (reloaded) or a restore."""

    generation: int = 1
    seq: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    attempts: dict[tuple[str, Token], Attempt] = field(default_factory=dict)
    waits: dict[str, list[str]] = field(default_factory=dict)
    settlements: list[SettleDependents] = field(default_factory=list)
    idempotency: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Durable:
        """Return what a disk would give back: what it holds is frozen, all but the containers."""
        return Durable(
            generation=self.generation,
            seq=self.seq,
            tasks=dict(self.tasks),
            facts=list(self.facts),
            attempts=dict(self.attempts),
            waits={name: list(held) for name, held in self.waits.items()},
            settlements=list(self.settlements),
            idempotency=dict(self.idempotency),
        )


@dataclass
class Machine:
    """One worker: its life's number, and what that life holds."""

    view: WorkerView
    incarnation: int = 1
    up: bool = True
    granted: list[Run] = field(default_factory=list)
    started: list[Run] = field(default_factory=list)
    told_to_stop: set[Run] = field(default_factory=set)

    def forget_all(self) -> list[Run]:
        """Start a new life and return what the old one still runs somewhere."""
        ghosts = self.granted + self.started
        self.incarnation += 1
        self.granted, self.started, self.told_to_stop = [], [], set()
        return ghosts

    def drop(self, run: Run) -> None:
        """The attempt's process is gone."""
        self.granted = [held for held in self.granted if held != run]
        self.started = [held for held in self.started if held != run]
        self.told_to_stop.discard(run)


class World:
    """Everything, with one method for each thing that can happen."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.clock = START_AT
        self.disk = Durable()
        self.ledgers: dict[str, Ledger] = {}
        #: Every token ever handed out; neither a crash nor a restore takes anything from it.
        self.tokens: dict[str, list[Token]] = {}
        self.generations = 1
        self.network: list[Report] = []
        self.orders: list[Command] = []
        self.machines = {view.name: Machine(view) for view in WORKERS}
        #: Attempts of earlier lives of workers: they run on and may report at any time.
        self.ghosts: list[Run] = []
        self.backup: tuple[Durable, dict[str, Ledger]] | None = None
        self.facts_at_crash = self.facts_at_backup = self.facts_when_nothing_fitted = 0
        self.resent = 0
        #: Tasks as they were when they were last looked at by themselves: they are frozen.
        self._sound: dict[str, Task] = {}
        self._ids = 0

    # -- judging ---------------------------------------------------------------------------------

    def broken(self, promise: str, what: object) -> NoReturn:
        """Count the violation and stop."""
        self.tally.violations += 1
        raise BrokenPromise(f"{promise}: {what}")

    def must(self, held: bool, promise: str, what: object) -> None:
        """Stop unless ``held``."""
        if not held:
            self.broken(promise, what)

    def open_tasks(self) -> list[Task]:
        """Return the tasks that have not ended, in accept order."""
        return [task for task in self.disk.tasks.values() if task.state not in TERMINAL]

    def failed_tasks(self) -> list[Task]:
        """Return the dead-letter list."""
        return [task for task in self.disk.tasks.values() if task.state is TaskState.FAILED]

    def check(self) -> None:
        """Check what must hold at every instant, over all tasks."""
        live_by_key: dict[str, int] = {}
        out_by_key: dict[str, int] = {}
        live_by_limit: dict[str, int] = {}
        used: dict[tuple[str, str], float] = {}
        for task in self.disk.tasks.values():
            if self._sound.get(task.id) is not task:
                wrong = machine.violations(task)
                self.must(not wrong, "invariant", wrong)
                self._sound[task.id] = task
            ledger = self.ledgers[task.id]
            lease = task.lease
            self.must(ledger.live == (lease.token if lease is not None else None), "C7 lease", task)
            self.must((ledger.ends == 1) == task.terminal, "C5 one end", task)
            self.must(task.result == ledger.result, "C5 result", task)
            self.must(task.failures == ledger.failures, "C11 failures", task)
            self.must(task.losses == ledger.losses, "C11 losses", task)
            spec = task.spec
            if spec.ordering_key is not None and not task.terminal:
                out = 0 if task.hold & Hold.ORDERING else 1
                out_by_key[spec.ordering_key] = out_by_key.get(spec.ordering_key, 0) + out
            if lease is None:
                continue
            if spec.ordering_key is not None:
                live_by_key[spec.ordering_key] = live_by_key.get(spec.ordering_key, 0) + 1
            if spec.concurrency_key is not None:
                key = spec.concurrency_key
                live_by_limit[key] = live_by_limit.get(key, 0) + 1
            if lease.slot == HEAVY_SLOT:
                for name, amount in amounts(spec.needs).items():
                    used[lease.worker, name] = used.get((lease.worker, name), 0.0) + amount
        for key, live in live_by_key.items():
            self.must(live <= 1, "C9 one live task of an ordering key", (key, live))
        for key, out in out_by_key.items():
            self.must(out <= 1, "C9 one task out of an ordering key's line", (key, out))
        for key, live in live_by_limit.items():
            self.must(live <= CONCURRENCY[key], "concurrency limit", (key, live))
        for (worker, name), amount in used.items():
            has = totals(self.machines[worker].view)[name]
            self.must(amount <= has + 1e-5, "capacity", (worker, name, amount))

    def check_log(self) -> None:
        """C11: what the tasks count equals what history and attempts imply."""
        grants: dict[str, int] = dict.fromkeys(self.disk.tasks, 0)
        ends: dict[str, int] = dict.fromkeys(self.disk.tasks, 0)
        for fact in self.disk.facts:
            grants[fact.task_id] += fact.kind == "granted"
            ends[fact.task_id] += fact.kind in {state.value for state in TERMINAL}
        for task in self.disk.tasks.values():
            ledger = self.ledgers[task.id]
            self.must(grants[task.id] == ledger.grants, "C11 grants", task)
            self.must(ends[task.id] == ledger.replays + task.terminal, "C5 ends", task)
        for (task_id, token), attempt in self.disk.attempts.items():
            task = self.disk.tasks[task_id]
            runs = task.state is TaskState.RUNNING and task.lease is not None
            is_live = runs and task.lease is not None and task.lease.token == token
            self.must((attempt.ended_at is None) == is_live, "attempt left open", attempt)

    # -- decide, commit --------------------------------------------------------------------------

    def handle(self, task_id: str, event: Event) -> Step:
        """Decide one event, compare with the ledger, commit."""
        before = self.disk.tasks[task_id]
        step = machine.advance(before, event)
        self._compare(before, event, step)
        if step.changed:
            self.tally.moves.add((before.state, type(event).__name__, step.task.state))
            self._commit(step.task.evolve(version=before.version + 1), step)
        else:
            quiet = not (step.facts or step.attempts or step.commands)
            self.must(step.task == before and quiet, "an unchanged task is left alone", event)
        return step

    def _commit(self, task: Task, step: Step) -> None:
        ledger = self.ledgers[task.id]
        self.disk.tasks[task.id] = task
        for fact in step.facts:
            allowed = GRAMMAR[ledger.phase]
            self.must(fact.kind in allowed, "C5 C8 history", (ledger.phase, fact))
            ledger.phase = allowed[fact.kind]
            self.disk.facts.append(fact)
        for attempt in step.attempts:
            self.disk.attempts[task.id, attempt.token] = attempt
            if attempt.ended_at is not None:
                ledger.closed.append(attempt)
        failed = (Outcome.ERRORED, Outcome.TIMED_OUT)
        failures = sum(attempt.outcome in failed for attempt in ledger.closed)
        losses = sum(attempt.outcome is Outcome.LOST for attempt in ledger.closed)
        losses -= ledger.forgiven
        self.must((task.failures, task.losses) == (failures, losses), "C11 attempts", task)
        for command in step.commands:
            if isinstance(command, SettleDependents):
                self.disk.settlements.append(command)
            else:
                self.orders.append(command)

    def _compare(self, before: Task, event: Event, step: Step) -> None:
        """Keep the ledger, and check that the step is what the ledger expects."""
        ledger, after = self.ledgers[before.id], step.task
        token: Token | None = getattr(event, "token", None)
        if token is not None and token != ledger.live:
            self.must(not step.changed, "G3 a stale report changes nothing", (before, event))
            return
        if before.terminal and not isinstance(event, TaskReplayed):
            self.must(not step.changed, "C5 a finished task never moves", (before, event))
            return
        expected = self._expected(before, event, ledger)
        self.must(after.state is expected, f"expected {expected} after", (before, event, after))
        if after.terminal:
            ledger.ends += 1
            ledger.live, ledger.started = None, False
            ledger.result = after.result
            done = isinstance(event, AttemptCompleted)
            self.must(after.result == (event.result if done else None), "C5 result", after)  # type: ignore[union-attr]

    def _expected(self, task: Task, event: Event, ledger: Ledger) -> TaskState:
        """Return the state that the promises ask for after ``event``; note it in the ledger."""
        match event:
            case LeaseGranted(lease=lease):
                issued = self.tokens.setdefault(task.id, [])
                newer = not issued or issued[-1] < lease.token
                self.must(newer, "C6 tokens strictly increase", (task, lease))
                self.must(ledger.live is None, "C7 one live lease", (task, lease))
                issued.append(lease.token)
                ledger.live = lease.token
                ledger.started = False
                ledger.grants += 1
                return TaskState.QUEUED
            case AttemptStarted():
                ledger.started = True
                return TaskState.RUNNING
            case AttemptProgressed() | ClockStepped():
                return task.state
            case AttemptCompleted():
                return TaskState.COMPLETED
            case AttemptCancelled():
                return TaskState.CANCELLED
            case AttemptFailed(error=error):
                return self._after_failure(task, error, ledger)
            case AttemptLost(counted=counted):
                ledger.losses += counted
                ledger.forgiven += not counted
                ledger.live, ledger.started = None, False
                if ledger.asked_to_cancel:
                    return TaskState.CANCELLED
                gone = counted and ledger.losses >= task.spec.max_losses
                return TaskState.FAILED if gone else TaskState.QUEUED
            case LeaseReturned(give_up=give_up):
                if ledger.started:
                    return TaskState.RUNNING
                ledger.live = None
                if ledger.asked_to_cancel:
                    return TaskState.CANCELLED
                return TaskState.FAILED if give_up else TaskState.QUEUED
            case CancelRequested():
                ledger.asked_to_cancel = True
                return TaskState.CANCELLED if ledger.live is None else task.state
            case DependencySettled(completed=completed):
                if not completed:
                    return TaskState.FAILED
                due = task.unmet == 1 and task.due_at <= event.at
                return TaskState.QUEUED if due else TaskState.SCHEDULED
            case TaskReplayed():
                self.must(ledger.phase == "ended", "only what ended is replayed", task)
                replays = ledger.replays + 1
                grants = ledger.grants
                self.ledgers[task.id] = Ledger(phase="ended", replays=replays, grants=grants)
                return TaskState.QUEUED
            case TimePassed():
                return self._after_time(task, event.at, ledger)
            case _:
                return task.state

    def _after_failure(self, task: Task, error: TaskError, ledger: Ledger) -> TaskState:
        ledger.failures += 1
        ledger.live, ledger.started = None, False
        if ledger.asked_to_cancel:
            return TaskState.CANCELLED
        policy = task.spec.retry
        named = {error.kind.value, error.type} & set(policy.retry_on)
        again = error.retryable and named and ledger.failures < policy.max_attempts
        return TaskState.SCHEDULED if again else TaskState.FAILED

    def _after_time(self, task: Task, now: float, ledger: Ledger) -> TaskState:
        spec = task.spec
        if ledger.live is not None:
            started = task.lease.started_at if task.lease is not None else None
            if ledger.started and started is not None and now >= started + spec.timeout_s + 30.0:
                error = TaskError(kind=FailureKind.TIMEOUT, message="")
                return self._after_failure(task, error, ledger)
            return task.state
        if spec.expires_at is not None and now >= spec.expires_at:
            return TaskState.EXPIRED
        if task.state is TaskState.SCHEDULED:
            return TaskState.SCHEDULED if task.unmet or now < task.due_at else TaskState.QUEUED
        waited = now - (task.queued_at or now)
        if spec.queue_timeout_s is not None and waited >= spec.queue_timeout_s:
            return TaskState.FAILED
        return TaskState.QUEUED

    # -- what clients do -------------------------------------------------------------------------

    def submit(self, make: Callable[[str], TaskSpec]) -> str:
        """Accept a task, or return the one that its idempotency key belongs to."""
        self._ids += 1
        spec = make(f"task-{self._ids:03}")
        key = spec.idempotency_key
        if key is not None and key in self.disk.idempotency:
            return self.disk.idempotency[key]
        parents = [self.disk.tasks[parent] for parent in spec.depends_on]
        failed = [p.id for p in parents if p.terminal and p.state is not TaskState.COMPLETED]
        waiting_for = [parent.id for parent in parents if not parent.terminal]
        self.disk.seq += 1
        step = machine.accept(
            spec,
            seq=self.disk.seq,
            at=self.clock,
            unmet=len(waiting_for),
            failed_dependency=failed[0] if failed else None,
            behind_key=self._line(spec.ordering_key) != [],
        )
        ledger = self.ledgers[spec.id] = Ledger()
        if step.task.terminal:
            self.must(bool(failed), "only a failed dependency ends a task at once", step)
            ledger.ends = 1
        else:
            for parent in waiting_for:
                self.disk.waits.setdefault(parent, []).append(spec.id)
        if key is not None:
            self.disk.idempotency[key] = spec.id
        self._commit(step.task, step)
        return spec.id

    def resubmit(self, key: str, make: Callable[[str], TaskSpec]) -> None:
        """C3: a second request under a key finds the first one's task and stores nothing."""
        self.resent += 1
        owner, count = self.disk.idempotency[key], len(self.disk.tasks)
        found = self.submit(lambda new_id: replace(make(new_id), idempotency_key=key))
        self.must(found == owner, "C3 one key, one task", (key, owner, found))
        self.must(len(self.disk.tasks) == count, "C3 nothing stored", key)

    def cancel(self, task_id: str) -> None:
        """Ask for a stop; a task that has ended refuses."""
        over = self.disk.tasks[task_id].terminal
        try:
            self.handle(task_id, CancelRequested(at=self.clock, reason="no longer wanted"))
        except TaskFinished:
            self.must(over, "G7 only an ended task refuses a cancel", task_id)
        else:
            self.must(not over, "G7 an ended task refuses a cancel", task_id)

    def replay(self, task_id: str) -> None:
        """Take a task back from the dead-letter list, behind whoever is out on its key."""
        task = self.disk.tasks[task_id]
        # What it owes its dependents from its last life is settled before the next one begins.
        self.settle(task_id)
        behind = self._line(task.spec.ordering_key) != []
        try:
            self.handle(task_id, TaskReplayed(at=self.clock))
        except NotFailed:
            self.must(task.state is not TaskState.FAILED, "a failed task is replayed", task)
        else:
            self.must(task.state is TaskState.FAILED, "only a failed task is replayed", task)
            if behind:
                self.handle(task_id, KeyHeld(at=self.clock, hold=Hold.ORDERING))

    # -- what the moderator's loops do -----------------------------------------------------------

    def _line(self, key: str | None) -> list[Task]:
        """Return the tasks of an ordering key that have not ended."""
        if key is None:
            return []
        return [task for task in self.open_tasks() if task.spec.ordering_key == key]

    def settle(self, parent_id: str | None = None) -> None:
        """Carry out the settlements of one task, or the oldest one; each in one transaction."""
        orders = self.disk.settlements
        chosen = [o for o in orders if o.task_id == parent_id] if parent_id else orders[:1]
        for order in chosen:
            orders.remove(order)
            for child in self.disk.waits.pop(order.task_id, []):
                event = DependencySettled(
                    at=self.clock, dependency_id=order.task_id, completed=order.completed
                )
                self.handle(child, event)

    def carry_out(self, index: int, *, keep: bool) -> None:
        """Carry out one command; with ``keep`` it will be carried out once more."""
        command = self.orders[index] if keep else self.orders.pop(index)
        match command:
            case StopAttempt(task_id=task_id, token=token, worker=worker):
                self.machines[worker].told_to_stop.add(Run(task_id, token))
            case ReleaseOrdering(key=key):
                self._release_ordering(key)
            case ReleaseConcurrency(key=key):
                self._release_concurrency(key)
            case SettleDependents():
                raise AssertionError("settlements are durable")

    def _release_ordering(self, key: str) -> None:
        line = self._line(key)
        if line and all(task.hold & Hold.ORDERING for task in line):
            head = min(line, key=lambda task: task.seq)
            self.handle(head.id, KeyReleased(at=self.clock, hold=Hold.ORDERING))

    def _release_concurrency(self, key: str) -> None:
        mine = [task for task in self.open_tasks() if task.spec.concurrency_key == key]
        held = [task for task in mine if task.hold & Hold.CONCURRENCY]
        if held and sum(task.lease is not None for task in mine) < CONCURRENCY[key]:
            first = min(held, key=lambda task: (task.dispatch_key, task.seq))
            self.handle(first.id, KeyReleased(at=self.clock, hold=Hold.CONCURRENCY))

    def tick(self, seconds: float) -> None:
        """Let time pass and wake whatever is due; afterwards nothing is due any more."""
        self.clock += seconds
        for task in list(self.disk.tasks.values()):
            if task.wake_at is not None and task.wake_at <= self.clock:
                woken = self.handle(task.id, TimePassed(at=self.clock)).task
                again = woken.wake_at
                late = again is None or again > self.clock or woken.state is not task.state
                self.must(late, "the clock does not spin", task)

    def put_clock(self, by_s: float) -> None:
        """Put the clock on another time: what runs keeps its age, what waits has waited as long."""
        self.clock += by_s
        for task in list(self.disk.tasks.values()):
            if task.lease is None and task.state is TaskState.QUEUED:
                moved = self.handle(task.id, ClockStepped(at=self.clock, by_s=by_s)).task
                for was, now in (
                    (task.queued_at, moved.queued_at),
                    (task.pinned_until, moved.pinned_until),
                ):
                    same = (was is None) == (now is None)
                    timed = task.spec.queue_timeout_s is not None or task.pinned_until is not None
                    if was is not None and now is not None and timed:
                        same = abs(now - was - by_s) < 1e-3
                    self.must(same, "a queued task has waited as long", task)
            if task.lease is not None:
                before = task.wake_at
                moved = self.handle(task.id, ClockStepped(at=self.clock, by_s=by_s)).task
                if task.state is TaskState.RUNNING:
                    assert before is not None
                    assert moved.wake_at is not None
                    kept = abs(moved.wake_at - before - by_s) < 1e-3
                    self.must(kept, "a running attempt keeps its age", task)
        self.tick(0.0)

    def views(self) -> dict[str, WorkerView]:
        """Return the snapshot that a scheduling decision sees."""
        views = {}
        for name, worker in self.machines.items():
            leased = [t for t in self.open_tasks() if t.lease and t.lease.worker == name]
            heavy = [t.needs for t in leased if t.lease and t.lease.slot == HEAVY_SLOT]
            used = Needs()
            for needs in heavy:
                used = placement.occupy(used, needs)
            state = WorkerState.ONLINE if worker.up else WorkerState.GONE
            views[name] = replace(worker.view, state=state, used=used, live=len(leased))
        return views

    def may_dispatch(self) -> bool:
        """Whether a dispatch may find something to do."""
        ready = any(task.ready for task in self.open_tasks())
        return ready and len(self.disk.facts) != self.facts_when_nothing_fitted

    def dispatch(self, *, lose_grants: bool = False) -> int:
        """Match ready tasks to idle workers and grant; return how many were granted.

        With ``lose_grants`` the answers get lost: the worker does not know what it holds.
        """
        leases = [task.lease for task in self.open_tasks() if task.lease is not None]
        busy = {(lease.worker, lease.slot) for lease in leases if lease.slot != HEAVY_SLOT}
        heavy = [lease.worker for lease in leases if lease.slot == HEAVY_SLOT]
        openings: list[Opening] = []
        for name, worker in self.machines.items():
            if not worker.up:
                continue
            room = HEAVY_MAX - heavy.count(name)
            openings += [Opening(worker=name, slot=HEAVY_SLOT, items_max=room, budget_ms=0.0)]
            openings += [
                Opening(worker=name, slot=slot, items_max=SLOT_ITEMS_MAX, budget_ms=SLOT_BUDGET_MS)
                for slot in (0, 1)
                if (name, slot) not in busy
            ]
        lanes: dict[LaneKey, list[Task]] = {}
        for task in self.open_tasks():
            if task.ready:
                lane = LaneKey(task.spec.queue, task.spec.task_type, task.needs)
                lanes.setdefault(lane, []).append(task)
        for tasks in lanes.values():
            tasks.sort(key=lambda task: (task.dispatch_key, task.seq))
        workers, starts_max = self.views(), STARTS_MAX - len(busy) - len(heavy)
        chosen = placement.assign(
            workers, lanes, openings, estimates_ms=ESTIMATES_MS, starts_max=starts_max
        )
        wrong = broken_promises(workers, lanes, openings, ESTIMATES_MS, starts_max, chosen)
        self.must(not wrong, "G5 assignment", wrong)
        granted = sum(self._grant(item, lose=lose_grants) for item in chosen)
        if not granted:
            self.facts_when_nothing_fitted = len(self.disk.facts)
        return granted

    def _grant(self, item: Assignment, *, lose: bool) -> bool:
        task, opening = item.task, item.opening
        spec = task.spec
        if spec.concurrency_key is not None:
            key = spec.concurrency_key
            live = [t for t in self.open_tasks() if t.spec.concurrency_key == key and t.lease]
            if len(live) >= CONCURRENCY[key]:
                self.handle(task.id, KeyHeld(at=self.clock, hold=Hold.CONCURRENCY))
                return False
        for other in self._line(spec.ordering_key):
            overtaken = other.seq < task.seq and not self.ledgers[other.id].replays
            self.must(not overtaken, "C9 accept order of an ordering key", (task, other))
        wanted = {spec.needs.worker, task.pinned_to} - {None}
        self.must(wanted <= {opening.worker}, "C9 a pinned task runs on its worker", task)
        worker = self.machines[opening.worker]
        lease = Lease(
            token=Token(self.disk.generation, task.attempt + 1),
            worker=opening.worker,
            incarnation=str(worker.incarnation),
            slot=opening.slot,
            grant_seq=self.disk.seq,
            granted_at=self.clock,
        )
        self.handle(task.id, LeaseGranted(at=self.clock, lease=lease))
        if not lose:
            worker.granted.append(Run(task.id, lease.token))
        return True

    def deliver(self, index: int, *, keep: bool) -> None:
        """Let one message arrive, whichever; with ``keep`` a copy stays on its way."""
        report = self.network[index] if keep else self.network.pop(index)
        self.receive(report)

    def receive(self, report: Report) -> None:
        """Handle a message, unless a restore has made its task unknown."""
        if report.task_id in self.disk.tasks:
            self.handle(report.task_id, replace(report.event, at=self.clock))

    # -- what workers do -------------------------------------------------------------------------

    def start(self, worker: Machine, index: int) -> None:
        """Begin a granted attempt and say so."""
        run = worker.granted.pop(index)
        worker.started.append(run)
        self.network.append(Report(run.task_id, AttemptStarted(at=self.clock, token=run.token)))

    def give_back(self, worker: Machine, index: int) -> None:
        """Return a granted attempt without starting it."""
        run = worker.granted.pop(index)
        # Now and then it is one time too many.
        give_up = run.token.attempt % 3 == 0
        event = LeaseReturned(
            at=self.clock, token=run.token, reason="slot is busy", give_up=give_up
        )
        self.network.append(Report(run.task_id, event))

    def progress(self, worker: Machine, index: int, percent: float) -> None:
        """Report progress and a checkpoint."""
        run = worker.started[index]
        event = AttemptProgressed(
            at=self.clock,
            token=run.token,
            progress=Progress(at=self.clock, percent=percent),
            checkpoint=b"%d" % percent,
        )
        self.network.append(Report(run.task_id, event))

    def finish(self, worker: Machine, run: Run, outcome: str) -> None:
        """End an attempt's process and report how."""
        worker.drop(run)
        self.network.append(self.outcome(run, outcome))

    def outcome(self, run: Run, outcome: str) -> Report:
        """Return a report of how an attempt ended; each carries a result of its own."""
        now, token = self.clock, run.token
        event: Event
        if outcome == "completed":
            result = b'{"by": "%s", "at": %d}' % (str(token).encode(), len(self.disk.facts))
            event = AttemptCompleted(at=now, token=token, started_at=now, result=result)
        elif outcome == "cancelled":
            event = AttemptCancelled(at=now, token=token, started_at=now)
        elif outcome == "lost":
            event = AttemptLost(at=now, token=token, kind=FailureKind.OOM, message="killed")
        else:
            kind = FailureKind.TIMEOUT if outcome == "timeout" else FailureKind.ERROR
            error = TaskError(kind=kind, message=outcome, retryable=outcome != "fatal")
            event = AttemptFailed(at=now, token=token, started_at=now, error=error, jitter=0.5)
        return Report(run.task_id, event)

    def attach(self, worker: Machine) -> None:
        """The worker says what it holds: what it does not know of comes back or is lost."""
        known = {*worker.granted, *worker.started}
        for task in self.open_tasks():
            lease = task.lease
            if lease is None or lease.worker != worker.view.name:
                continue
            run = Run(task.id, lease.token)
            on_its_way = any(
                report.task_id == task.id and getattr(report.event, "token", None) == lease.token
                for report in self.network
            )
            if run in worker.started:
                self.handle(task.id, AttemptStarted(at=self.clock, token=lease.token))
            elif run not in known and not on_its_way:
                # An outcome that is still in the worker's outbox is waited for.
                if lease.started_at is None:
                    event: Event = LeaseReturned(at=self.clock, token=lease.token)
                else:
                    event = self.outcome(run, "lost").event
                self.handle(task.id, event)

    def worker_down(self, worker: Machine) -> None:
        """The moderator gives the worker up; whatever it runs, runs on unseen."""
        worker.up = False
        self._lose(task for task in self.open_tasks() if task.lease)
        self.ghosts += worker.forget_all()

    def worker_leaves(self, worker: Machine) -> None:
        """It is stopped in good order: what it ran has ended and goes on elsewhere at once."""
        worker.up = False
        for task in list(self.open_tasks()):
            lease = task.lease
            if lease is None or lease.worker != worker.view.name:
                continue
            event: Event = LeaseReturned(at=self.clock, token=lease.token)
            if lease.started_at is not None:
                event = AttemptLost(
                    at=self.clock,
                    token=lease.token,
                    kind=FailureKind.LOST,
                    message=f"{lease.worker} was stopped in good order",
                    worker_gone=True,
                    counted=False,
                )
            self.handle(task.id, event)
        worker.forget_all()

    def _lose(self, tasks: Iterable[Task]) -> None:
        for task in list(tasks):
            lease = task.lease
            if lease is not None and not self.machines[lease.worker].up:
                event = AttemptLost(
                    at=self.clock,
                    token=lease.token,
                    kind=FailureKind.LOST,
                    message=f"{lease.worker} went silent",
                    worker_gone=True,
                )
                self.handle(task.id, event)

    def worker_up(self, worker: Machine) -> None:
        """A new incarnation registers."""
        worker.up = True

    # -- faults of the moderator itself ----------------------------------------------------------

    def crash(self) -> None:
        """Kill the moderator: only what is on disk is there afterwards."""
        self.check_log()
        self.facts_at_crash = len(self.disk.facts)
        self.disk = self.disk.copy()
        self.orders = []
        self.recover()

    def recover(self) -> None:
        """Work out again which commands were not carried out."""
        for task in self.open_tasks():
            if task.lease is not None and task.cancel_requested_at is not None:
                run = Run(task.id, task.lease.token)
                self.machines[task.lease.worker].told_to_stop.add(run)
        for key in ("a", "b"):
            self._release_ordering(key)
        for key, limit in CONCURRENCY.items():
            for _ in range(limit):
                self._release_concurrency(key)

    def save_backup(self) -> None:
        """Take a consistent copy."""
        self.backup = (self.disk.copy(), _copied(self.ledgers))
        self.facts_at_backup = len(self.disk.facts)

    def restore(self) -> None:
        """G13: go back to the copy; the generation rises above every one before, leases end."""
        assert self.backup is not None
        disk, ledgers = self.backup
        self.disk, self.ledgers = disk.copy(), _copied(ledgers)
        self.generations += 1
        self.disk.generation = self.generations
        self.orders = []
        for worker in self.machines.values():
            self.ghosts += worker.forget_all()
        for task in self.open_tasks():
            if task.lease is not None:
                run = Run(task.id, task.lease.token)
                self.handle(task.id, self.outcome(run, "lost").event)
        self.recover()

    # -- the end of a world ----------------------------------------------------------------------

    def drain(self) -> None:
        """C4: with all workers back and nothing lost any more, every task ends or says why not."""
        for worker in self.machines.values():
            worker.up = True
        for _ in range(200):
            moved = self._drain_once()
            if not moved and not self._sleep_until_next():
                break
        else:
            self.broken("C4 every task ends", self.open_tasks())
        views = list(self.views().values())
        stuck: set[str] = set()
        for task in self.open_tasks():
            if task.unmet:
                waits = any(task.id in self.disk.waits.get(parent, ()) for parent in stuck)
                self.must(waits, "C4 waits for a task that waits", task)
            elif task.hold == Hold.ORDERING:
                out = [t for t in self._line(task.spec.ordering_key) if not t.hold]
                self.must(out != [], "C4 waits behind a task that waits", task)
            else:
                self.must(task.ready, "C4 what waits stands in the index", task)
                reason = placement.explain(task.needs, task.spec.task_type, views)
                truly = reason.code in ("unplaceable", "waiting_worker")
                self.must(truly, "C4 a true reason", (task, reason))
            stuck.add(task.id)
        self.check()
        self.check_log()

    def _drain_once(self) -> bool:
        before = len(self.disk.facts), self.disk.generation
        while self.network:
            self.receive(self.network.pop(0))
        while self.orders:
            self.carry_out(0, keep=False)
        while self.disk.settlements:
            self.settle()
        for worker in self.machines.values():
            for run in [*worker.granted, *worker.started]:
                self.finish(worker, run, "cancelled" if run in worker.told_to_stop else "completed")
            while self.network:
                self.receive(self.network.pop(0))
            self.attach(worker)
        self.dispatch()
        return before != (len(self.disk.facts), self.disk.generation) or bool(self.orders)

    def _sleep_until_next(self) -> bool:
        times = [t.wake_at for t in self.open_tasks() if t.wake_at is not None]
        if not times:
            return False
        self.tick(max(0.0, min(times) - self.clock))
        return True

"""The task state machine: a pure function from a task and an event to the next task and commands.

`advance` looks up ``(state, event type)`` in `TRANSITIONS`. Every pair is there; a pair that cannot
happen maps to `impossible`, which raises, and a pair that is merely late maps to `ignore`.

Late and duplicate reports are normal: an event about an attempt carries the fencing token that the
attempt was granted, and only the token of the lease in force may change anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hcna_ray.core.errors import InvalidTransition, NotFailed, TaskFinished
from hcna_ray.core.events import (
    EVENT_TYPES,
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
from hcna_ray.core.models import (
    RUN_TIMEOUT_GRACE_S,
    TERMINAL,
    Attempt,
    Fact,
    FailureKind,
    Hold,
    Lease,
    OnDisconnect,
    Outcome,
    Task,
    TaskError,
    TaskSpec,
    TaskState,
    Token,
)
from hcna_ray.core.retry import backoff_s, worth_retrying

#: Default for `accept`: how many seconds of waiting one step of priority is worth.
AGEING_STEP_S = 60.0


class Step(NamedTuple):
    """The outcome of one decision. Nothing of it may leave before it is committed."""

    task: Task
    facts: tuple[Fact, ...] = ()
    #: Attempts that began or ended with this step, to be stored under their token.
    attempts: tuple[Attempt, ...] = ()
    commands: tuple[Command, ...] = ()
    #: False when the event was late or said nothing new; then the task is unchanged.
    changed: bool = True


def dispatch_key(due_at: float, priority: int, ageing_step_s: float) -> float:
    """Return the ascending dispatch order: one step of priority is worth ``ageing_step_s``."""
    return due_at - priority * ageing_step_s


def accept(
    spec: TaskSpec,
    *,
    seq: int,
    at: float,
    unmet: int = 0,
    failed_dependency: str | None = None,
    behind_key: bool = False,
    ageing_step_s: float = AGEING_STEP_S,
) -> Step:
    """Turn an accepted spec into a task.

    Args:
        spec: What was submitted.
        seq: Accept sequence.
        at: Now.
        unmet: Dependencies that have not ended yet.
        failed_dependency: A dependency that already ended without completing, if any.
        behind_key: Whether an earlier task of the same ordering key has not ended.
        ageing_step_s: Seconds of waiting that one step of priority is worth.
    """
    due_at = at if spec.run_at is None else max(at, spec.run_at)
    task = Task(
        spec=spec,
        seq=seq,
        state=TaskState.SCHEDULED,
        due_at=due_at,
        dispatch_key=dispatch_key(due_at, spec.priority, ageing_step_s),
        unmet=unmet,
        hold=Hold.ORDERING if behind_key else Hold.NONE,
    )
    accepted = Fact(task_id=spec.id, kind="accepted", at=at, state=TaskState.SCHEDULED)
    if failed_dependency is not None:
        return _after((accepted,), _reject_for_dependency(task, failed_dependency, at))
    if unmet or due_at > at:
        return Step(task, (accepted,))
    queued = _queue(task, at)
    return Step(queued, (Fact(task_id=spec.id, kind="accepted", at=at, state=queued.state),))


def advance(task: Task, event: Event) -> Step:
    """Return what ``event`` makes of ``task``.

    Raises:
        InvalidTransition: the pair cannot happen (a bug in the caller).
        TaskFinished: a cancel came after the end.
        NotFailed: a replay of a task that has not failed.
    """
    return TRANSITIONS[task.state, type(event)](task, event)


# -- helpers -------------------------------------------------------------------------------------


def _fact(task: Task, kind: str, at: float, detail: str | None = None) -> Fact:
    """Return a line of a task's history, as the task is now."""
    return _fact_under(task.lease, task, kind, at, detail)


def _fact_under(
    lease: Lease | None, task: Task, kind: str, at: float, detail: str | None = None
) -> Fact:
    """Return a line of a task's history that tells of a lease, which may have ended with it."""
    if lease is None:
        return Fact(task.spec.id, kind, at, task.state, None, None, detail)
    return Fact(task.spec.id, kind, at, task.state, lease.token, lease.worker, detail)


def _after(facts: tuple[Fact, ...], step: Step) -> Step:
    """Return a step whose own lines of history follow others."""
    if not facts:
        return step
    return Step(step.task, facts + step.facts, step.attempts, step.commands)


def _unchanged(task: Task) -> Step:
    return Step(task, changed=False)


def _queue(task: Task, at: float) -> Task:
    return task.evolve(state=TaskState.QUEUED, queued_at=at)


def _holds(task: Task, token: Token) -> bool:
    return task.lease is not None and task.lease.token == token


def _closed(
    lease: Lease,
    task: Task,
    at: float,
    outcome: Outcome,
    started_at: float,
    error: TaskError | None = None,
) -> Attempt:
    begun_at = started_at if lease.started_at is None else lease.started_at
    return Attempt(task.spec.id, lease.token, lease.worker, "", begun_at, at, outcome, error)


def _began(task: Task, lease: Lease, started_at: float) -> tuple[Fact, ...]:
    """Return the line of history for a start of which nobody told before the end."""
    if lease.started_at is not None:
        return ()
    token, worker = lease.token, lease.worker
    return (Fact(task.spec.id, "started", started_at, TaskState.RUNNING, token, worker),)


def _freed(task: Task) -> tuple[Command, ...]:
    """Commands that follow when a task gives up its claim on its concurrency key."""
    key = task.spec.concurrency_key
    return () if key is None else (ReleaseConcurrency(key=key),)


def _end(
    task: Task,
    state: TaskState,
    at: float,
    *,
    attempts: tuple[Attempt, ...] = (),
    detail: str | None = None,
    **changes: Any,
) -> Step:
    """Finish the task: drop its lease and tell whoever waits for it."""
    ended = task.evolve(
        state=state,
        finished_at=at,
        lease=None,
        hold=Hold.NONE,
        pinned_to=None,
        pinned_until=None,
        **changes,
    )
    commands: tuple[Command, ...] = (
        SettleDependents(task_id=task.id, completed=state is TaskState.COMPLETED),
    )
    if task.spec.ordering_key is not None:
        commands += (ReleaseOrdering(key=task.spec.ordering_key),)
    # Also without a lease: it may have been the one let out of the key's line.
    commands += _freed(task)
    return Step(
        ended, (_fact_under(task.lease, ended, state.value, at, detail),), attempts, commands
    )


def _fail(task: Task, error: TaskError, at: float, attempts: tuple[Attempt, ...] = ()) -> Step:
    return _end(task, TaskState.FAILED, at, attempts=attempts, detail=error.message, error=error)


def _reject_for_dependency(task: Task, dependency_id: str, at: float) -> Step:
    error = TaskError(
        kind=FailureKind.REJECTED,
        message=f"depends on {dependency_id}, which ended without completing",
        retryable=False,
    )
    return _fail(task, error, at)


def _requeue(task: Task, at: float, **changes: Any) -> Task:
    """Put a task whose lease ended back, in its old place: the dispatch key stays."""
    return task.evolve(state=TaskState.QUEUED, lease=None, queued_at=at, **changes)


# -- transitions ---------------------------------------------------------------------------------


def ignore(task: Task, event: Event) -> Step:
    """Late or repeated: the task has moved on."""
    return _unchanged(task)


def impossible(task: Task, event: Event) -> Step:
    """A caller broke the protocol."""
    raise InvalidTransition(task.id, task.state.value, type(event).__name__)


def refuse_cancel(task: Task, event: CancelRequested) -> Step:
    """The task had ended before."""
    raise TaskFinished(task.id, task.state.value)


def refuse_replay(task: Task, event: TaskReplayed) -> Step:
    """Only the dead-letter list is replayed."""
    raise NotFailed(task.id, task.state.value)


def on_time_scheduled(task: Task, event: TimePassed) -> Step:
    """Expire, or become due."""
    if task.spec.expires_at is not None and event.at >= task.spec.expires_at:
        return _expire(task, event.at)
    if task.unmet or event.at < task.due_at:
        return _unchanged(task)
    queued = _queue(task, event.at)
    return Step(queued, (_fact(queued, "queued", event.at),))


def on_time_queued(task: Task, event: TimePassed) -> Step:
    """Expire, give up waiting in the queue, or stop waiting for a silent worker.

    A granted task is left alone: its worker checks expiry itself before it starts.
    """
    if task.lease is not None:
        return _unchanged(task)
    if task.spec.expires_at is not None and event.at >= task.spec.expires_at:
        return _expire(task, event.at)
    limit = task.spec.queue_timeout_s
    if limit is not None and task.queued_at is not None and event.at >= task.queued_at + limit:
        error = TaskError(
            kind=FailureKind.TIMEOUT,
            message=f"waited {limit:g} s in queue {task.spec.queue!r} without starting",
            retryable=False,
        )
        return _fail(task, error, event.at)
    if task.pinned_until is not None and event.at >= task.pinned_until:
        freed = task.evolve(pinned_to=None, pinned_until=None)
        return Step(freed, (_fact(freed, "unpinned", event.at, task.pinned_to),))
    return _unchanged(task)


def on_time_running(task: Task, event: TimePassed) -> Step:
    """End an attempt whose worker should have stopped it long ago."""
    lease = _lease(task)
    deadline = _started(lease) + task.spec.timeout_s + RUN_TIMEOUT_GRACE_S
    if event.at < deadline:
        return _unchanged(task)
    error = TaskError(
        kind=FailureKind.TIMEOUT,
        message=f"ran longer than {task.spec.timeout_s:g} s and its worker did not stop it",
    )
    report = AttemptFailed(at=event.at, token=lease.token, started_at=_started(lease), error=error)
    step = on_failed(task, report)
    stop = StopAttempt(
        task_id=task.id,
        worker=lease.worker,
        incarnation=lease.incarnation,
        slot=lease.slot,
        token=lease.token,
        reason="timeout",
    )
    return Step(step.task, step.facts, step.attempts, (*step.commands, stop))


def on_clock_stepped(task: Task, event: ClockStepped) -> Step:
    """Keep the age of what was granted, or how long a queued task has waited.

    Only time that has passed may end either. Of a granted task the lease alone moves: how long it
    waits matters again when it comes back, and is put right then.
    """
    lease = task.lease
    if lease is None:
        return _waited_as_long(task, event.by_s)
    moved = lease._replace(
        granted_at=lease.granted_at + event.by_s,
        started_at=None if lease.started_at is None else lease.started_at + event.by_s,
    )
    return Step(task.evolve(lease=moved))


def _waited_as_long(task: Task, by_s: float) -> Step:
    if task.queued_at is None or (task.spec.queue_timeout_s is None and task.pinned_until is None):
        return _unchanged(task)
    until = None if task.pinned_until is None else task.pinned_until + by_s
    return Step(task.evolve(queued_at=task.queued_at + by_s, pinned_until=until))


def _expire(task: Task, at: float) -> Step:
    return _end(task, TaskState.EXPIRED, at, detail="expires_at passed before it could start")


def on_dependency_settled(task: Task, event: DependencySettled) -> Step:
    """Count a dependency off; a task whose dependency did not complete is rejected."""
    if not task.unmet:
        return _unchanged(task)
    if not event.completed:
        return _reject_for_dependency(task, event.dependency_id, event.at)
    waiting = task.evolve(unmet=task.unmet - 1)
    if waiting.unmet or waiting.due_at > event.at:
        return Step(waiting)
    queued = _queue(waiting, event.at)
    return Step(queued, (_fact(queued, "queued", event.at),))


def on_key_held(task: Task, event: KeyHeld) -> Step:
    """Leave the dispatch index until the key is free."""
    if task.lease is not None or task.hold | event.hold == task.hold:
        return _unchanged(task)
    return Step(task.evolve(hold=task.hold | event.hold))


def on_key_released(task: Task, event: KeyReleased) -> Step:
    """Return to the dispatch index, in the place the dispatch key says."""
    if not task.hold & event.hold:
        return _unchanged(task)
    return Step(task.evolve(hold=task.hold & ~event.hold))


def on_granted(task: Task, event: LeaseGranted) -> Step:
    """Give the lease. The token must be newer than any before it."""
    if not task.ready or event.lease.token.attempt <= task.attempt:
        return impossible(task, event)
    granted = task.evolve(lease=event.lease, attempt=event.lease.token.attempt)
    return Step(granted, (_fact(granted, "granted", event.at),))


def on_returned(task: Task, event: LeaseReturned) -> Step:
    """Take back what never started. Nothing is counted; an asked-for cancel takes effect."""
    if not _holds(task, event.token):
        return _unchanged(task)
    if task.cancel_requested_at is not None:
        return _end(task, TaskState.CANCELLED, event.at, detail=task.cancel_reason or None)
    if event.give_up:
        return _fail(task, TaskError(kind=FailureKind.LOST, message=event.reason), event.at)
    queued = task.evolve(lease=None)
    return Step(
        queued,
        (_fact_under(task.lease, queued, "returned", event.at, event.reason or None),),
        commands=_freed(task),
    )


def on_started(task: Task, event: AttemptStarted) -> Step:
    """The attempt runs."""
    if not _holds(task, event.token):
        return _unchanged(task)
    lease = _lease(task)
    running = task.evolve(
        state=TaskState.RUNNING,
        lease=Lease(*lease[:-1], event.at),
        started_at=event.at,
        pinned_to=None,
        pinned_until=None,
    )
    attempt = Attempt(task.spec.id, lease.token, lease.worker, "", event.at)
    return Step(running, (_fact(running, "started", event.at),), (attempt,))


def on_progressed(task: Task, event: AttemptProgressed) -> Step:
    """Keep the newest progress and checkpoint."""
    if not _holds(task, event.token):
        return _unchanged(task)
    progress = task.progress if event.progress is None else event.progress
    checkpoint = task.checkpoint if event.checkpoint is None else event.checkpoint
    return Step(task.evolve(progress=progress, checkpoint=checkpoint))


def on_completed(task: Task, event: AttemptCompleted) -> Step:
    """Record the one result. It wins over a cancel that was asked for but not yet obeyed."""
    lease = task.lease
    if lease is None or lease.token != event.token:
        return _unchanged(task)
    attempt = _closed(lease, task, event.at, Outcome.COMPLETED, event.started_at)
    step = _end(
        task,
        TaskState.COMPLETED,
        event.at,
        attempts=(attempt,),
        result=event.result,
        error=None,
        started_at=attempt.started_at,
    )
    return _after(_began(task, lease, event.started_at), step)


def on_failed(task: Task, event: AttemptFailed) -> Step:
    """Count the failure; try again after a pause, or give up."""
    if not _holds(task, event.token):
        return _unchanged(task)
    lease = _lease(task)
    return _after(_began(task, lease, event.started_at), _count_failure(task, event, lease))


def _count_failure(task: Task, event: AttemptFailed, lease: Lease) -> Step:
    timed_out = event.error.kind is FailureKind.TIMEOUT
    outcome = Outcome.TIMED_OUT if timed_out else Outcome.ERRORED
    attempt = _closed(lease, task, event.at, outcome, event.started_at, event.error)
    counted = task.evolve(failures=task.failures + 1, started_at=attempt.started_at)
    if task.cancel_requested_at is not None:
        return _end(
            counted,
            TaskState.CANCELLED,
            event.at,
            attempts=(attempt,),
            detail=task.cancel_reason or None,
        )
    if not worth_retrying(task.spec.retry, event.error, counted.failures):
        return _fail(counted, event.error, event.at, (attempt,))
    due_at = event.at + backoff_s(task.spec.retry, counted.failures, event.jitter)
    # The key moves with the due time, by exactly as much as the due time moves.
    waiting = counted.evolve(
        state=TaskState.SCHEDULED,
        lease=None,
        due_at=due_at,
        dispatch_key=task.dispatch_key + (due_at - task.due_at),
        error=event.error,
    )
    return Step(
        waiting,
        (_fact_under(task.lease, waiting, "retry_scheduled", event.at, event.error.message),),
        (attempt,),
        _freed(task),
    )


def on_lost(task: Task, event: AttemptLost) -> Step:
    """Count the loss apart from failures; re-queue in the old place, or give up on poison.

    A loss that was somebody's order to the worker says nothing about the task: not counted.
    """
    if not _holds(task, event.token):
        return _unchanged(task)
    lease = _lease(task)
    error = TaskError(kind=event.kind, message=event.message)
    attempt = _closed(lease, task, event.at, Outcome.LOST, event.at, error)
    losses = task.losses + event.counted
    counted = task.evolve(losses=losses, started_at=attempt.started_at)
    if task.cancel_requested_at is not None:
        return _end(
            counted,
            TaskState.CANCELLED,
            event.at,
            attempts=(attempt,),
            detail=task.cancel_reason or None,
        )
    if event.counted and losses >= task.spec.max_losses:
        return _fail(counted, error, event.at, (attempt,))
    waits = event.worker_gone and task.spec.on_disconnect is OnDisconnect.WAIT
    queued = _requeue(
        counted,
        event.at,
        error=error,
        pinned_to=lease.worker if waits else None,
        pinned_until=event.at + task.spec.wait_max_s if waits else None,
    )
    return Step(
        queued,
        (_fact_under(lease, queued, "lost", event.at, event.message),),
        (attempt,),
        _freed(task),
    )


def on_attempt_cancelled(task: Task, event: AttemptCancelled) -> Step:
    """The worker confirms that the process is gone."""
    if not _holds(task, event.token):
        return _unchanged(task)
    attempt = _closed(_lease(task), task, event.at, Outcome.CANCELLED, event.started_at)
    return _end(
        task,
        TaskState.CANCELLED,
        event.at,
        attempts=(attempt,),
        detail=task.cancel_reason or None,
        started_at=attempt.started_at,
    )


def on_cancel(task: Task, event: CancelRequested) -> Step:
    """Nobody holds it: cancelled at once. Somebody does: a request, until the worker confirms."""
    if task.lease is None:
        return _end(
            task,
            TaskState.CANCELLED,
            event.at,
            detail=event.reason or None,
            cancel_requested_at=event.at,
            cancel_reason=event.reason,
        )
    if task.cancel_requested_at is not None:
        return _unchanged(task)
    asked = task.evolve(cancel_requested_at=event.at, cancel_reason=event.reason)
    stop = StopAttempt(
        task_id=task.id,
        worker=task.lease.worker,
        incarnation=task.lease.incarnation,
        slot=task.lease.slot,
        token=task.lease.token,
        reason="cancel",
    )
    return Step(
        asked,
        (_fact(asked, "cancel_requested", event.at, event.reason or None),),
        commands=(stop,),
    )


def on_replayed(task: Task, event: TaskReplayed) -> Step:
    """Take a failed task back out of the dead-letter list, with fresh counters.

    Its place in an ordering key's line is gone: where another task of the key has not ended, the
    caller holds this one (`KeyHeld`) in the same transaction.
    """
    queued = task.evolve(
        state=TaskState.QUEUED,
        queued_at=event.at,
        due_at=event.at,
        dispatch_key=task.dispatch_key + (event.at - task.due_at),
        failures=0,
        losses=0,
        unmet=0,
        finished_at=None,
        started_at=None,
        error=None,
        progress=None,
        cancel_requested_at=None,
        cancel_reason="",
    )
    return Step(queued, (_fact(queued, "replayed", event.at),))


def _lease(task: Task) -> Lease:
    lease = task.lease
    assert lease is not None, f"{task.id} is {task.state} without a lease"
    return lease


def _started(lease: Lease) -> float:
    assert lease.started_at is not None, "a running task's lease knows when it started"
    return lease.started_at


Transition = Callable[[Task, Any], Step]

_S = TaskState

#: The whole machine. Anything about an attempt is also legal in a state that the attempt's task has
#: left already: then the fence, or `ignore`, drops it.
TRANSITIONS: dict[tuple[TaskState, type[Event]], Transition] = {
    (_S.SCHEDULED, TimePassed): on_time_scheduled,
    (_S.SCHEDULED, DependencySettled): on_dependency_settled,
    (_S.SCHEDULED, KeyHeld): on_key_held,
    (_S.SCHEDULED, KeyReleased): on_key_released,
    (_S.SCHEDULED, LeaseGranted): impossible,
    (_S.SCHEDULED, CancelRequested): on_cancel,
    (_S.SCHEDULED, TaskReplayed): refuse_replay,
    (_S.QUEUED, TimePassed): on_time_queued,
    (_S.QUEUED, ClockStepped): on_clock_stepped,
    (_S.QUEUED, DependencySettled): ignore,
    (_S.QUEUED, KeyHeld): on_key_held,
    (_S.QUEUED, KeyReleased): on_key_released,
    (_S.QUEUED, LeaseGranted): on_granted,
    (_S.QUEUED, LeaseReturned): on_returned,
    (_S.QUEUED, AttemptStarted): on_started,
    (_S.QUEUED, AttemptProgressed): on_progressed,
    (_S.QUEUED, AttemptCompleted): on_completed,
    (_S.QUEUED, AttemptFailed): on_failed,
    (_S.QUEUED, AttemptLost): on_lost,
    (_S.QUEUED, AttemptCancelled): on_attempt_cancelled,
    (_S.QUEUED, CancelRequested): on_cancel,
    (_S.QUEUED, TaskReplayed): refuse_replay,
    (_S.RUNNING, TimePassed): on_time_running,
    (_S.RUNNING, ClockStepped): on_clock_stepped,
    (_S.RUNNING, DependencySettled): ignore,
    (_S.RUNNING, KeyHeld): ignore,
    (_S.RUNNING, KeyReleased): ignore,
    (_S.RUNNING, LeaseGranted): impossible,
    (_S.RUNNING, LeaseReturned): ignore,
    (_S.RUNNING, AttemptStarted): ignore,
    (_S.RUNNING, AttemptProgressed): on_progressed,
    (_S.RUNNING, AttemptCompleted): on_completed,
    (_S.RUNNING, AttemptFailed): on_failed,
    (_S.RUNNING, AttemptLost): on_lost,
    (_S.RUNNING, AttemptCancelled): on_attempt_cancelled,
    (_S.RUNNING, CancelRequested): on_cancel,
    (_S.RUNNING, TaskReplayed): refuse_replay,
    (_S.FAILED, TaskReplayed): on_replayed,
}
for _state in TERMINAL:
    TRANSITIONS[_state, CancelRequested] = refuse_cancel
    TRANSITIONS[_state, LeaseGranted] = impossible
    TRANSITIONS.setdefault((_state, TaskReplayed), refuse_replay)
for _state in TaskState:
    for _event_type in EVENT_TYPES:
        # What is left are reports of attempts (or a late timer) in states the task has moved on to.
        TRANSITIONS.setdefault((_state, _event_type), ignore)


def violations(task: Task) -> list[str]:
    """Return what is wrong with a task, in words; empty when all invariants hold.

    Source of the list: the promises in docs/GUARANTEES.md, as far as one task can show them.
    """
    broken: list[str] = []

    def must(held: bool, sentence: str) -> None:
        if not held:
            broken.append(sentence)

    lease = task.lease
    must(
        lease is None or task.state in (TaskState.QUEUED, TaskState.RUNNING),
        "only a queued or running task may hold a lease",
    )
    must(
        (task.state is TaskState.RUNNING) == (lease is not None and lease.started_at is not None),
        "a task runs exactly while its lease has started",
    )
    must(
        lease is None or lease.token.attempt == task.attempt,
        "the lease in force is the newest attempt's",
    )
    must(task.terminal == (task.finished_at is not None), "finished_at is set exactly at the end")
    must(
        (task.state is TaskState.COMPLETED) == (task.result is not None),
        "a result exists exactly when completed",
    )
    must(task.state is not TaskState.FAILED or task.error is not None, "a failure has a reason")
    must(task.unmet >= 0, "dependencies cannot be met twice")
    must(
        not task.unmet or task.state is TaskState.SCHEDULED or task.terminal,
        "a task with unmet dependencies waits",
    )
    must(task.losses <= task.spec.max_losses, "losses never exceed max_losses")
    must(task.failures <= task.spec.retry.max_attempts, "failures never exceed max_attempts")
    must(not (task.hold and lease is not None), "a held task is not granted")
    must(not (task.hold and task.terminal), "an ended task holds no place in a key's line")
    must(
        (task.pinned_to is None) == (task.pinned_until is None),
        "a pin has an end",
    )
    return broken

"""What a committed batch has to tell in spans: how long tasks waited, and ends nobody else tells.

A worker tells of the attempts that it has run to an end. Of one whose process or machine did not
live to tell, the moderator does, under the id that the attempt's span has everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from hcna_ray.core.models import Attempt, Outcome, Task
from hcna_ray.core.tracing import parse_traceparent
from hcna_ray.observability.traces import Ran, Waited
from hcna_ray.runtime.ledger import Ledger

TraceNote = Waited | Ran


def trace_notes(ledger: Ledger) -> tuple[TraceNote, ...]:
    """Return the notes of a batch. Tasks whose trace is not recorded have none."""
    attempts: dict[str, list[Attempt]] = {}
    for attempt in ledger.attempts:
        attempts.setdefault(attempt.task_id, []).append(attempt)
    notes: list[TraceNote] = []
    for task in ledger.changed():
        trace = parse_traceparent(task.spec.traceparent)
        if trace is not None and trace.sampled:
            before = ledger.before[task.id]
            notes += _of_task(ledger, before, task, attempts.get(task.id, []))
    return tuple(notes)


def _of_task(
    ledger: Ledger, before: Task | None, task: Task, attempts: list[Attempt]
) -> Iterator[TraceNote]:
    lease = None if before is None else before.lease
    for attempt in attempts:
        begins = lease is not None and lease.token == attempt.token and lease.started_at is None
        if begins and before is not None and lease is not None:
            yield _waited(before, lease.granted_at, attempt.token.attempt, lease.worker)
        told = (attempt.task_id, attempt.token) in ledger.ended_by_runner
        if attempt.outcome is not None and attempt.ended_at is not None and not told:
            yield _ran(task, attempt, attempt.outcome, attempt.ended_at)
    ended_now = task.terminal and (before is None or not before.terminal)
    if ended_now and not attempts and task.finished_at is not None:
        yield _waited(before or task, task.finished_at, 0, "", ended=task.state.value)


def _waited(task: Task, until: float, attempt: int, worker: str, *, ended: str = "") -> Waited:
    spec = task.spec
    return Waited(
        task_id=spec.id,
        task_type=spec.task_type,
        queue=spec.queue,
        traceparent=spec.traceparent or "",
        # What waited for its time, or for others, has waited since it was accepted.
        since=task.queued_at if task.attempt > 1 and task.queued_at else spec.accepted_at,
        until=until,
        attempt=attempt,
        worker=worker,
        ended=ended,
    )


def _ran(task: Task, attempt: Attempt, outcome: Outcome, ended_at: float) -> Ran:
    error = attempt.error
    return Ran(
        task_id=attempt.task_id,
        task_type=task.spec.task_type,
        traceparent=task.spec.traceparent or "",
        token=attempt.token,
        worker=attempt.worker,
        since=attempt.started_at,
        until=ended_at,
        outcome=outcome.value,
        error_type="" if error is None else error.type or error.kind.value,
    )

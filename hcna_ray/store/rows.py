"""A `Task` as a row of the table ``task``, and back; also attempts, facts and audit lines.

The columns of ``task`` fall in three: those copied from the spec, which never change; plain ones,
which every save writes; and indexed ones, which a save writes only when they changed, because
SQLite takes an entry out of an index and puts it in again whenever its column is named in an
``UPDATE``.
"""

from __future__ import annotations

from typing import Any

from hcna_ray.core.models import (
    Attempt,
    AuditEntry,
    Fact,
    Hold,
    Lease,
    Outcome,
    Task,
    TaskState,
    Token,
)
from hcna_ray.core.schedules import Reason, Schedule
from hcna_ray.store import codec
from hcna_ray.store.base import StoredAudit, StoredFact

Row = tuple[Any, ...]

SPEC = (
    "seq",
    "id",
    "queue",
    "task_type",
    "principal",
    "batch_id",
    "ordering_key",
    "concurrency_key",
    "accepted_at",
    "bytes",
)
PLAIN = (
    "version",
    "due_at",
    "attempt",
    "failures",
    "losses",
    "unmet",
    "hold",
    "lease_generation",
    "lease_attempt",
    "incarnation",
    "slot",
    "grant_seq",
    "lease_started_at",
    "pinned_to",
    "pinned_until",
    "queued_at",
    "started_at",
    "cancel_requested_at",
    "cancel_reason",
    "progress",
    "error",
    "kind",
    "checkpoint",
    "result",
)
INDEXED = (
    "state",
    "dispatch_key",
    "ready_lane",
    "wake_at",
    "held_key",
    "granted_at",
    "worker",
    "finished_at",
    "end_no",
)
#: Positions in `INDEXED` that the store reads back.
STATE, READY_LANE, WORKER, END_NO = (
    INDEXED.index(name) for name in ("state", "ready_lane", "worker", "end_no")
)

INSERT_TASK = (
    f"INSERT INTO task ({', '.join(SPEC + PLAIN + INDEXED)}) "
    f"VALUES ({', '.join('?' * len(SPEC + PLAIN + INDEXED))}) "
    "ON CONFLICT (id) DO NOTHING"
)
#: Of a `Delivery`, in its order.
DELIVERY = (
    *("id", "task_id", "principal", "target", "url", "body", "created_at", "due_at", "tries"),
    "note",
)
#: Of a `Schedule`.
SCHEDULE = (
    *("principal", "name", "body", "wake_at", "decided_until", "waiting_at", "last_task_id"),
    *("last_at", "started", "skipped", "missed", "reason_code", "reason", "reason_at"),
)
ATTEMPT = (
    "task_id",
    "generation",
    "attempt",
    "worker",
    "node_id",
    "started_at",
    "ended_at",
    "outcome",
    "error",
)
FACT = (
    "number",
    "task_id",
    "kind",
    "at",
    "state",
    "generation",
    "attempt",
    "worker",
    "detail",
)
AUDIT = ("number", "at", "principal", "action", "target", "outcome", "detail", "hash")

#: What `task_from_row` and `indexed_of_row` read. CROSS JOIN: the task is found first.
COLUMNS = ", ".join(
    ["t.seq", *(f"t.{name}" for name in PLAIN if name != "kind"), "s.body"]
    + [f"t.{name}" for name in INDEXED]
)
TASK = f"SELECT {COLUMNS} FROM task AS t CROSS JOIN task_spec AS s ON s.seq = t.seq"

_STATES = {state.value: state for state in TaskState}
_HOLDS = {int(hold): hold for hold in map(Hold, range(4))}


def update_sql(changed: tuple[str, ...]) -> str:
    """Return the statement that writes the plain columns and those indexed ones."""
    columns = ", ".join(f"{name} = ?" for name in PLAIN + changed)
    return f"UPDATE task SET {columns} WHERE seq = ? AND version = ?"


def spec_values(task: Task) -> Row:
    """Return the values of `SPEC`."""
    spec = task.spec
    return (
        task.seq,
        spec.id,
        spec.queue,
        spec.task_type,
        spec.principal,
        spec.batch_id,
        spec.ordering_key,
        spec.concurrency_key,
        spec.accepted_at,
        spec.bytes_stored,
    )


def plain_values(task: Task) -> Row:
    """Return the values of `PLAIN`."""
    lease = task.lease
    return (
        task.version,
        task.due_at,
        task.attempt,
        task.failures,
        task.losses,
        task.unmet,
        int(task.hold),
        *(
            (None, None, None, None, None, None)
            if lease is None
            else (*lease.token, lease.incarnation, lease.slot, lease.grant_seq, lease.started_at)
        ),
        task.pinned_to,
        task.pinned_until,
        task.queued_at,
        task.started_at,
        task.cancel_requested_at,
        task.cancel_reason,
        codec.pack_progress(task.progress),
        codec.pack_error(task.error),
        task.error.kind if task.error and task.state is TaskState.FAILED else None,
        task.checkpoint,
        task.result,
    )


def indexed_values(
    task: Task, *, lane_id: int | None, last_worker: str | None, end_no: int | None
) -> Row:
    """Return the values of `INDEXED`.

    Args:
        task: What is stored.
        lane_id: Its lane while it is ready, else ``None``.
        last_worker: Whoever held the lease before; kept when there is none now.
        end_no: Its end number once it has ended, else ``None``.
    """
    lease = task.lease
    return (
        task.state,
        task.dispatch_key,
        lane_id,
        task.wake_at,
        task.spec.concurrency_key if task.hold and held(task) else None,
        None if lease is None else lease.granted_at,
        last_worker if lease is None else lease.worker,
        task.finished_at,
        end_no,
    )


def held(task: Task) -> bool:
    """Return whether a task waits for its concurrency key."""
    return bool(task.hold) and bool(task.hold & Hold.CONCURRENCY) and not task.terminal


def indexed_of_row(row: Row) -> Row:
    """Return the values of `INDEXED` in a row of `COLUMNS`."""
    return row[-len(INDEXED) :]


def task_from_row(row: Row) -> Task:
    """Return the task of a row of `COLUMNS`."""
    (
        seq,
        version,
        due_at,
        attempt,
        failures,
        losses,
        unmet,
        hold,
        lease_generation,
        lease_attempt,
        incarnation,
        slot,
        grant_seq,
        lease_started_at,
        pinned_to,
        pinned_until,
        queued_at,
        started_at,
        cancel_requested_at,
        cancel_reason,
        progress,
        error,
        checkpoint,
        result,
        body,
        state,
        dispatch_key,
        _ready_lane,
        _wake_at,
        _held_key,
        granted_at,
        worker,
        finished_at,
        _end_no,
    ) = row
    lease = None
    if granted_at is not None:
        lease = Lease(
            token=Token(lease_generation, lease_attempt),
            worker=worker,
            incarnation=incarnation,
            slot=slot,
            grant_seq=grant_seq,
            granted_at=granted_at,
            started_at=lease_started_at,
        )
    return Task(
        spec=codec.unpack_spec(body),
        seq=seq,
        state=_STATES[state],
        due_at=due_at,
        dispatch_key=dispatch_key,
        attempt=attempt,
        failures=failures,
        losses=losses,
        unmet=unmet,
        hold=_HOLDS[hold],
        lease=lease,
        pinned_to=pinned_to,
        pinned_until=pinned_until,
        queued_at=queued_at,
        started_at=started_at,
        finished_at=finished_at,
        cancel_requested_at=cancel_requested_at,
        cancel_reason=cancel_reason,
        progress=codec.unpack_progress(progress),
        checkpoint=checkpoint,
        result=result,
        error=codec.unpack_error(error),
        version=version,
    )


def schedule_values(schedule: Schedule) -> Row:
    """Return the values of `SCHEDULE`."""
    return (
        schedule.principal,
        schedule.name,
        codec.pack_schedule(schedule),
        schedule.wake_at,
        schedule.decided_until,
        schedule.waiting_at,
        schedule.last_task_id,
        schedule.last_at,
        schedule.started,
        schedule.skipped,
        schedule.missed,
        *(schedule.reason or (None, None, None)),
    )


def schedule_from_row(row: Row) -> Schedule:
    """Return the schedule of a row of `SCHEDULE`."""
    (
        principal,
        name,
        body,
        wake_at,
        decided_until,
        waiting_at,
        last_task_id,
        last_at,
        started,
        skipped,
        missed,
        *reason,
    ) = row
    return codec.unpack_schedule(principal, name, body).evolve(
        wake_at=wake_at,
        decided_until=decided_until,
        waiting_at=waiting_at,
        last_task_id=last_task_id,
        last_at=last_at,
        started=started,
        skipped=skipped,
        missed=missed,
        reason=None if reason[0] is None else Reason(*reason),
    )


def attempt_values(attempt: Attempt) -> Row:
    """Return the values of `ATTEMPT`."""
    task_id, (generation, number), *where_and_when, outcome, error = attempt
    return task_id, generation, number, *where_and_when, outcome, codec.pack_error(error)


def attempt_from_row(row: Row) -> Attempt:
    """Return the attempt of a row of `ATTEMPT`."""
    return Attempt(
        task_id=row[0],
        token=Token(row[1], row[2]),
        worker=row[3],
        node_id=row[4],
        started_at=row[5],
        ended_at=row[6],
        outcome=None if row[7] is None else Outcome(row[7]),
        error=codec.unpack_error(row[8]),
    )


def fact_values(number: int, fact: Fact) -> Row:
    """Return the values of `FACT`."""
    task_id, kind, at, state, token, worker, detail = fact
    generation, attempt = token or (None, None)
    return number, task_id, kind, at, state, generation, attempt, worker, detail


def fact_from_row(row: Row) -> StoredFact:
    """Return the fact of a row of `FACT`."""
    return StoredFact(
        row[0],
        Fact(
            task_id=row[1],
            kind=row[2],
            at=row[3],
            state=TaskState(row[4]),
            token=None if row[5] is None else Token(row[5], row[6]),
            worker=row[7],
            detail=row[8],
        ),
    )


def audit_values(number: int, entry: AuditEntry, digest: str) -> Row:
    """Return the values of `AUDIT`."""
    return (
        number,
        entry.at,
        entry.principal,
        entry.action,
        entry.target,
        entry.outcome,
        entry.detail,
        digest,
    )


def audit_from_row(row: Row) -> StoredAudit:
    """Return the audit line of a row of `AUDIT`."""
    return StoredAudit(
        row[0],
        AuditEntry(
            at=row[1],
            principal=row[2],
            action=row[3],
            target=row[4],
            outcome=row[5],
            detail=row[6],
        ),
        row[7],
    )

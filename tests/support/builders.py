"""Values for tests: every builder gives something valid, and takes what the test is about."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hcna_ray.core.models import (
    TERMINAL,
    Attempt,
    AuditEntry,
    Fact,
    FailureKind,
    Lease,
    Task,
    TaskError,
    TaskSpec,
    TaskState,
    Token,
    WorkerRecord,
)
from hcna_ray.core.schedules import Schedule
from hcna_ray.store.base import Delivery

#: The instant at which tests begin, 2026-01-01T00:00:00Z.
T0 = 1_767_225_600.0

_SPEC_FIELDS = frozenset(field.name for field in fields(TaskSpec)) - {"id"}


def a_spec(task_id: str = "t1", **changes: Any) -> TaskSpec:
    """Return the spec of an echo task accepted at `T0`."""
    defaults: dict[str, Any] = {
        "task_type": "echo",
        "payload": b'{"message":"hello"}',
        "accepted_at": T0,
    }
    return TaskSpec(id=task_id, **{**defaults, **changes})


def a_lease(**changes: Any) -> Lease:
    """Return the lease of the first attempt, held by W1."""
    defaults: dict[str, Any] = {
        "token": Token(1, 1),
        "worker": "W1",
        "incarnation": "W1-a",
        "slot": 0,
        "grant_seq": 1,
        "granted_at": T0,
    }
    return Lease(**{**defaults, **changes})


def a_task(
    task_id: str = "t1",
    *,
    seq: int = 1,
    state: TaskState = TaskState.QUEUED,
    **changes: Any,
) -> Task:
    """Return a task; changes may name fields of the task and of its spec.

    A running task has a lease, an ended one its instants, and a failed one an error, unless the
    test says otherwise. The dispatch key is `T0` plus the accept sequence.
    """
    spec = changes.pop("spec", None) or a_spec(
        task_id, **{name: changes.pop(name) for name in _SPEC_FIELDS & changes.keys()}
    )
    defaults: dict[str, Any] = {"due_at": T0, "dispatch_key": T0 + seq}
    if state is not TaskState.SCHEDULED:
        defaults["queued_at"] = T0
    if state is TaskState.RUNNING:
        defaults |= {"lease": a_lease(started_at=T0), "attempt": 1, "started_at": T0}
    if state in TERMINAL:
        defaults["finished_at"] = T0
    if state is TaskState.FAILED:
        defaults["error"] = an_error()
    if state is TaskState.COMPLETED:
        defaults["result"] = b"{}"
    return Task(spec=spec, seq=seq, state=state, **{**defaults, **changes})


def an_error(**changes: Any) -> TaskError:
    """Return the error of a handler that raised."""
    defaults: dict[str, Any] = {
        "kind": FailureKind.ERROR,
        "message": "it broke",
        "type": "ValueError",
    }
    return TaskError(**{**defaults, **changes})


def an_attempt(task_id: str = "t1", **changes: Any) -> Attempt:
    """Return a first attempt that has started on W1."""
    defaults: dict[str, Any] = {
        "token": Token(1, 1),
        "worker": "W1",
        "node_id": "HCNA-W1--prod--home--v1.0",
        "started_at": T0,
    }
    return Attempt(task_id=task_id, **{**defaults, **changes})


def a_fact(task_id: str = "t1", kind: str = "queued", **changes: Any) -> Fact:
    """Return a line of history."""
    defaults: dict[str, Any] = {"at": T0, "state": TaskState.QUEUED}
    return Fact(task_id=task_id, kind=kind, **{**defaults, **changes})


def a_worker_record(name: str = "W1", **changes: Any) -> WorkerRecord:
    """Return what the store remembers of a worker with four processors."""
    defaults: dict[str, Any] = {
        "node_id": f"HCNA-{name}--prod--home--v1.0",
        "incarnation": f"{name}-a",
        "registered_at": T0,
        "last_seen_at": T0,
        "cpu": 4.0,
        "mem_gb": 8.0,
        "task_types": ("echo",),
    }
    return WorkerRecord(name=name, **{**defaults, **changes})


def a_delivery(id_: str = "t1.1.1", **changes: Any) -> Delivery:
    """Return something that is to be told to a webhook."""
    defaults: dict[str, Any] = {
        "task_id": "t1",
        "principal": "owner",
        "target": "example.org:443",
        "url": "https://example.org/hook",
        "body": b'{"type": "task.completed"}',
        "created_at": T0,
        "due_at": T0,
    }
    return Delivery(id_, **{**defaults, **changes})


def a_schedule(name: str = "nightly", **changes: Any) -> Schedule:
    """Return a schedule for every hour that was created at `T0`."""
    defaults: dict[str, Any] = {
        "principal": "owner",
        "cron": "0 * * * *",
        "spec": a_spec("", principal=str(changes.get("principal", "owner"))),
        "created_at": T0,
        "changed_at": T0,
        "decided_until": T0,
    }
    return Schedule(name=name, **{**defaults, **changes})


def an_audit_entry(action: str = "queue.pause", **changes: Any) -> AuditEntry:
    """Return a line of the audit log."""
    defaults: dict[str, Any] = {
        "at": T0,
        "principal": "owner",
        "target": "default",
        "outcome": "done",
    }
    return AuditEntry(action=action, **{**defaults, **changes})

"""Tasks, leases and workers in the states that tests start from."""

from __future__ import annotations

from typing import Any

from hcna_ray.core.events import AttemptStarted, LeaseGranted
from hcna_ray.core.machine import accept, advance
from hcna_ray.core.models import Lease, Task, TaskSpec, Token, WorkerState, WorkerView

#: When every story begins.
NOW = 1000.0


def a_spec(**changes: Any) -> TaskSpec:
    """Return a spec of type ``echo``, changed as asked."""
    return TaskSpec(**{"id": "t1", "task_type": "echo", "accepted_at": NOW, **changes})


def a_queued_task(**changes: Any) -> Task:
    """Return a task that waits for a worker, its spec changed as asked."""
    return accept(a_spec(**changes), seq=1, at=NOW).task


def a_lease(attempt: int = 1, *, generation: int = 1, worker: str = "W1", slot: int = 0) -> Lease:
    """Return a lease that has not started."""
    return Lease(
        token=Token(generation, attempt),
        worker=worker,
        incarnation=f"{worker}-first-life",
        slot=slot,
        grant_seq=7,
        granted_at=NOW,
    )


def granted(task: Task, worker: str = "W1") -> Task:
    """Return ``task`` with a lease for its next attempt."""
    lease = a_lease(task.attempt + 1, worker=worker)
    return advance(task, LeaseGranted(at=NOW, lease=lease)).task


def a_granted_task(**changes: Any) -> Task:
    """Return a task that a worker may start."""
    return granted(a_queued_task(**changes))


def started(task: Task, at: float = NOW) -> Task:
    """Return ``task`` with its next attempt running."""
    held = granted(task)
    return advance(held, AttemptStarted(at=at, token=token_of(held))).task


def a_running_task(**changes: Any) -> Task:
    """Return a task whose first attempt runs since `NOW`."""
    return started(a_queued_task(**changes))


def token_of(task: Task) -> Token:
    """Return the token of the lease in force."""
    assert task.lease is not None
    return task.lease.token


def a_worker(name: str = "W1", **changes: Any) -> WorkerView:
    """Return an idle worker that knows ``echo``."""
    return WorkerView(
        **{
            "name": name,
            "node_id": f"HCNA-{name}--prod--home--v1.0",
            "state": WorkerState.ONLINE,
            "cpu": 4.0,
            "mem_gb": 8.0,
            "task_types": frozenset({"echo"}),
            **changes,
        }
    )

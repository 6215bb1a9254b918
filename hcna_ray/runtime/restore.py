"""What a restored store must be told before a moderator reads it: every lease in it is over.

Whoever held one was promised it by a store that is gone. Plain Python on any `TaskStore`; the
moderator must not run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hcna_ray.core.events import AttemptLost, LeaseReturned
from hcna_ray.core.models import AuditEntry, FailureKind
from hcna_ray.runtime.aftermath import Aftermath
from hcna_ray.runtime.dispatcher import Dispatcher
from hcna_ray.runtime.ledger import Ledger
from hcna_ray.runtime.live import LiveTable
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.turn import Turn
from hcna_ray.store.base import TaskStore


@dataclass(frozen=True, kw_only=True)
class EndedLeases:
    """What became of the leases: those that had not started, and those that had."""

    returned: int
    lost: int


def end_leases(
    store: TaskStore, policy: Policy, *, now: float, why: str, note: AuditEntry
) -> EndedLeases:
    """End every lease in one transaction, and think of every worker as away until it says hello.

    A lease that had not started is returned; an attempt that had is lost, which counts against no
    task: nothing went wrong with it. A task that waits for its own worker (``on_disconnect``) waits
    for it here too; one whose cancel was asked for is cancelled.

    Args:
        store: Restored, its generation raised.
        policy: Of this installation.
        now: The instant.
        why: For the tasks' histories.
        note: For the audit log.
    """
    leased, records = store.leased(), store.workers()
    live = LiveTable()
    live.reset(leased)
    dispatcher = Dispatcher(store, policy, live)
    dispatcher.reset()
    aftermath = Aftermath(store, dispatcher, lambda command: None)  # Nobody is there to be told.
    aftermath.reset()
    node_ids = {record.name: record.node_id for record in records}
    turn = Turn(Ledger(store, live.tasks, node_ids), now, 0.0)
    returned = 0
    for task in leased:
        lease = task.lease
        assert lease is not None
        if lease.started_at is None:
            returned += 1
            turn.ledger.step(task, LeaseReturned(at=now, token=lease.token, reason=why))
            continue
        lost = AttemptLost(
            at=now,
            token=lease.token,
            kind=FailureKind.LOST,
            message=why,
            worker_gone=True,
            counted=False,
        )
        turn.ledger.step(task, lost)
    aftermath.follow_up(turn)
    turn.ledger.audit.append(note)
    with store.transaction():
        turn.ledger.flush()
        for record in records:
            if record.left_at is None and record.asleep_at is None:
                store.save_worker(dataclasses.replace(record, asleep_at=now))
    return EndedLeases(returned=returned, lost=len(leased) - returned)

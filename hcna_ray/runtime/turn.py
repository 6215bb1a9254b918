"""One batch on its way through the moderator: what it has read, decided, and may answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hcna_ray.core.models import AuditEntry, Task
from hcna_ray.runtime.ledger import Ledger
from hcna_ray.runtime.requests import Pending
from hcna_ray.store.base import TaskStore


class Later:
    """Marks an answer that comes with a later batch."""


LATER = Later()


class Turn:
    """The ledger, the instant, and what leaves after the commit."""

    def __init__(self, ledger: Ledger, now: float, elapsed: float) -> None:
        self.ledger, self.now, self.elapsed = ledger, now, elapsed
        self.answers: list[tuple[Pending, object]] = []
        #: Small writes beside the ledger's, inside the same transaction.
        self.writes: list[Callable[[], None]] = []
        #: Changes of the moderator's memory that must not happen unless committed.
        self.effects: deque[Callable[[], None]] = deque()
        self.ended: list[str] = []
        self.added_tasks = 0
        self.added_bytes = 0

    def note(
        self, principal: str, action: str, target: str, outcome: str, detail: str = ""
    ) -> None:
        """Add a line to the audit log."""
        self.ledger.audit.append(
            AuditEntry(
                at=self.now,
                principal=principal,
                action=action,
                target=target,
                outcome=str(outcome),
                detail=detail,
            )
        )

    def ordering_line(self, store: TaskStore, key: str) -> list[Task]:
        """Return open tasks with this ordering key in accept order: the first, and any not held.

        Held tasks stand behind one another in the store, so a look at the line's front is enough;
        only when all of the front ended in this batch the look goes further back.
        """
        found = {task.id: task for task in self.ledger.changed_in_line(key) if not task.terminal}
        limit = 2
        while True:
            line = store.ordering_line(key, limit)
            self.ledger.adopt(line)
            open_ones = [
                task
                for stored in line
                if (task := self.ledger.get(stored.id)) is not None and not task.terminal
            ]
            found.update((task.id, task) for task in open_ones)
            # What this batch has changed says nothing of who stands before it in the store.
            if open_ones or len(line) < limit:
                break
            limit *= 4
        out = store.ordering_out(key)
        if out is not None:
            task = self.ledger.get(out.id)
            if task is not None and not task.terminal:
                found[task.id] = task
        return sorted(found.values(), key=lambda task: task.seq)

    def ordering_busy(self, store: TaskStore, key: str) -> bool:
        """Return whether an open task holds or waits for this ordering key."""
        return bool(self.ordering_line(store, key))

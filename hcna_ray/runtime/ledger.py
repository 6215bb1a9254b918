"""The working set of one batch: tasks read once, changed in memory, written once, in order.

A `Ledger` lives from one commit to the next. It reads through to the store, remembers each task at
the version it started from, and keeps everything that must be written together. Nothing of it may
leave the moderator before `flush` has been committed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from hcna_ray import failpoints
from hcna_ray.core.events import Command, Event
from hcna_ray.core.machine import Step, advance
from hcna_ray.core.models import Attempt, AuditEntry, Fact, LaneKey, Task
from hcna_ray.store.base import Counter, KeyClaim, TaskStore


def lane_of(task: Task) -> LaneKey:
    """Return the lane in which a task waits."""
    return LaneKey(task.spec.queue, task.spec.task_type, task.needs)


class Ledger:
    """Reads, decisions and pending writes of one batch."""

    def __init__(
        self, store: TaskStore, live: Mapping[str, Task], node_ids: Mapping[str, str]
    ) -> None:
        """Open an empty working set.

        Args:
            store: Where tasks are read from, and written to by `flush`.
            live: Tasks that hold a lease as committed; saves reading them again.
            node_ids: Node id by worker name, noted on attempts.
        """
        self._store, self._live, self._node_ids = store, live, node_ids
        self._tasks: dict[str, Task] = {}
        #: Task as committed, for each changed one; ``None`` for a new one.
        self.before: dict[str, Task | None] = {}
        #: Of these, how many have been looked at for their ordering key, and what was found.
        self._lined = 0
        self._lines: dict[str, list[str]] = {}
        self.facts: list[Fact] = []
        self.attempts: list[Attempt] = []
        self.claims: dict[tuple[str, str], KeyClaim] = {}
        self.audit: list[AuditEntry] = []
        self.counts: Tally[Counter] = Tally()
        self.dependencies: list[tuple[str, tuple[str, ...]]] = []
        self.dropped_dependents: list[tuple[str, list[str]]] = []
        self.pushed_settlements: list[tuple[str, bool]] = []
        self.dropped_settlements: list[int] = []
        self.commands: list[Command] = []
        #: Leases gained minus leases ended in this batch, by concurrency key.
        self.lease_delta: Tally[str] = Tally()

    # -- reading --------------------------------------------------------------------------------

    def load(self, ids: Iterable[str]) -> None:
        """Read tasks that the batch will need, in one go."""
        missing = []
        for task_id in ids:
            if task_id in self._tasks:
                continue
            live = self._live.get(task_id)
            if live is not None:
                self._tasks[task_id] = live
            else:
                missing.append(task_id)
        if missing:
            self._tasks.update(self._store.get(missing))

    def get(self, task_id: str) -> Task | None:
        """Return a task as this batch has it, or ``None`` if it does not exist."""
        if task_id not in self._tasks:
            self.load((task_id,))
        return self._tasks.get(task_id)

    def adopt(self, tasks: Iterable[Task]) -> None:
        """Take in tasks that were just read from the store by another query."""
        for task in tasks:
            self._tasks.setdefault(task.id, task)

    def changed(self) -> Iterable[Task]:
        """Return the tasks that this batch has added or changed, as they are now."""
        return [self._tasks[task_id] for task_id in self.before]

    def is_changed(self, task_id: str) -> bool:
        """Return whether this batch has added or changed the task."""
        return task_id in self.before

    def changed_in_line(self, key: str) -> list[Task]:
        """Return the tasks with an ordering key that this batch has added or changed."""
        fresh = len(self.before) - self._lined
        for task_id in itertools.islice(reversed(self.before), fresh):
            line = self._tasks[task_id].spec.ordering_key
            if line is not None:
                self._lines.setdefault(line, []).append(task_id)
        self._lined += fresh
        return [self._tasks[task_id] for task_id in self._lines.get(key, ())]

    # -- deciding -------------------------------------------------------------------------------

    def add(self, step: Step) -> None:
        """Take in a newly accepted task."""
        task = step.task
        self.before[task.id] = None
        self._tasks[task.id] = task
        self._record(step)
        self.counts[Counter("accepted", task.spec.task_type, task.spec.queue)] += 1

    def step(self, task: Task, event: Event) -> Step:
        """Advance a task that was got from this ledger, and note what follows."""
        step = advance(task, event)
        if not step.changed:
            return step
        if task.id not in self.before:
            self.before[task.id] = task
        self._tasks[task.id] = step.task
        if task.spec.concurrency_key is not None:
            change = (step.task.lease is not None) - (task.lease is not None)
            self.lease_delta[task.spec.concurrency_key] += change
        self._record(step)
        return step

    def _record(self, step: Step) -> None:
        self.facts += step.facts
        self.commands += step.commands
        task = step.task
        for attempt in step.attempts:
            node_id = self._node_ids.get(attempt.worker, attempt.worker)
            self.attempts.append(dataclasses.replace(attempt, node_id=node_id))
            if attempt.outcome is not None:
                label = attempt.outcome.value
                self.counts[Counter("attempts", task.spec.task_type, label)] += 1
        if task.terminal:
            self.counts[Counter("ended", task.spec.task_type, task.state.value)] += 1

    # -- writing --------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether there is anything to commit."""
        return bool(
            self.before
            or self.facts
            or self.audit
            or self.claims
            or self.dropped_dependents
            or self.pushed_settlements
            or self.dropped_settlements
            or self.counts
        )

    def flush(self) -> int:
        """Write everything. Must be called inside the store's transaction.

        Returns:
            The number of the newest fact.

        Raises:
            VersionConflict: a task was changed by somebody else; there must be one writer.
        """
        store = self._store
        new = [task for task in self.changed() if self.before[task.id] is None]
        if new:
            added = store.insert(new)
            assert len(added) == len(new), "an id was minted twice"
        if self.claims:
            store.claim_keys(list(self.claims.values()))
        saved = []
        for task_id, before in self.before.items():
            if before is not None:
                task = self._tasks[task_id]
                saved.append(dataclasses.replace(task, version=before.version + 1))
        if saved:
            store.save(saved)
            for task in saved:
                self._tasks[task.id] = task
        failpoints.hit("ledger.tasks.written")
        for child_id, parents in self.dependencies:
            store.add_dependencies(child_id, parents)
        for parent_id, children in self.dropped_dependents:
            store.drop_dependents(parent_id, children)
        if self.pushed_settlements:
            store.push_settlements(self.pushed_settlements)
        for number in self.dropped_settlements:
            store.drop_settlement(number)
        if self.attempts:
            store.save_attempts(self._merged_attempts())
        if self.counts:
            store.bump(self.counts)
        if self.audit:
            store.append_audit(self.audit)
            failpoints.hit("ledger.audit.written")
        return store.append_facts(self.facts)

    def _merged_attempts(self) -> list[Attempt]:
        """Return one row per attempt: one that started and ended in this batch is written once."""
        merged: dict[tuple[str, int, int], Attempt] = {}
        for attempt in self.attempts:
            merged[attempt.task_id, *attempt.token] = attempt
        return list(merged.values())

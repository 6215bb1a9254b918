"""The working set of one batch: tasks read once, changed in memory, written once, in order.

A `Ledger` lives from one commit to the next. It reads through to the store, remembers each task at
the version it started from, and keeps everything that must be written together. Nothing of it may
leave the moderator before `flush` has been committed.
"""

from __future__ import annotations

import itertools
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable, Mapping

from hcna_ray import failpoints
from hcna_ray.core.events import Command, Event
from hcna_ray.core.machine import Step, advance
from hcna_ray.core.models import Attempt, AuditEntry, Fact, LaneKey, Outcome, Task, Token
from hcna_ray.core.schedules import Schedule
from hcna_ray.observability.figures import (
    OTHER_QUEUES,
    QUEUES_NAMED_MAX,
    RAN,
    WAITED,
    stored_deltas,
)
from hcna_ray.runtime.reported import delivery_of
from hcna_ray.store.base import Counter, Delivery, KeyClaim, TaskStore


def lane_of(task: Task) -> LaneKey:
    """Return the lane in which a task waits."""
    return LaneKey(task.spec.queue, task.spec.task_type, task.needs)


class Lanes:
    """Lanes of many tasks: most share one, and a lane's hash is dear."""

    def __init__(self) -> None:
        """Know none."""
        self._known: dict[tuple[str, str, int], LaneKey] = {}

    def of(self, task: Task) -> LaneKey:
        """Return the lane in which a task waits; the task must live as long as this object."""
        if task.pinned_to is not None:
            return lane_of(task)
        spec = task.spec
        name = spec.queue, spec.task_type, id(spec.needs)
        lane = self._known.get(name)
        if lane is None:
            lane = self._known[name] = lane_of(task)
        return lane


class QueueLabels:
    """Says under which label a queue's accepted tasks are counted.

    A counter has a row for ever, and anybody who submits may name a queue of his own for each task:
    the first `QUEUES_NAMED_MAX` queues are counted by name, the others together.
    """

    def __init__(self) -> None:
        """Know no queue; `reset` says which have a row."""
        self._named: set[str] = set()

    def reset(self, stored: Iterable[str]) -> None:
        """Go on with the labels that the store has: whatever has a row keeps it."""
        self._named = set(stored) - {OTHER_QUEUES}

    def of(self, queue: str) -> str:
        """Return a queue's label; a new queue gets its own while there is room."""
        if queue not in self._named:
            if len(self._named) >= QUEUES_NAMED_MAX:
                return OTHER_QUEUES
            self._named.add(queue)
        return queue


class Ledger:
    """Reads, decisions and pending writes of one batch."""

    def __init__(
        self,
        store: TaskStore,
        live: Mapping[str, Task],
        node_ids: Mapping[str, str],
        queue_labels: QueueLabels | None = None,
    ) -> None:
        """Open an empty working set.

        Args:
            store: Where tasks are read from, and written to by `flush`.
            live: Tasks that hold a lease as committed; saves reading them again.
            node_ids: Node id by worker name, noted on attempts.
            queue_labels: For the counters of accepted tasks; ``None`` begins anew.
        """
        self._queue_labels = queue_labels or QueueLabels()
        self._store, self._live, self._node_ids = store, live, node_ids
        self._tasks: dict[str, Task] = {}
        #: Ids that were looked for and are not stored.
        self._absent: set[str] = set()
        #: Task as committed, for each changed one; ``None`` for a new one.
        self.before: dict[str, Task | None] = {}
        #: Of these, how many have been looked at for their ordering key, and what was found.
        self._lined = 0
        self._lines: dict[str, list[str]] = {}
        self.facts: list[Fact] = []
        self._attempts: dict[tuple[str, Token], Attempt] = {}
        #: Attempts whose end was told by the process that ran them.
        self.ended_by_runner: set[tuple[str, Token]] = set()
        self.claims: dict[tuple[str, str], KeyClaim] = {}
        self.audit: list[AuditEntry] = []
        self.counts: Tally[Counter] = Tally()
        #: Seconds that attempts waited in the queue, and ran, by figure and task type.
        self.seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        #: New tasks by type and queue: counters to be.
        self.accepted: Tally[tuple[str, str]] = Tally()
        #: Tasks that this batch has opened minus those that it has ended, by principal.
        self.opened: Tally[str] = Tally()
        self.dependencies: list[tuple[str, tuple[str, ...]]] = []
        self.dropped_dependents: list[tuple[str, list[str]]] = []
        self.pushed_settlements: list[tuple[str, bool]] = []
        self.dropped_settlements: list[int] = []
        #: What is to be told to webhooks.
        self.deliveries: list[Delivery] = []
        #: Schedules as this batch has them, by principal and name; ``None``: there is none.
        self._schedules: dict[tuple[str, str], Schedule | None] = {}
        #: Of these, the ones that it has changed.
        self.changed_schedules: set[tuple[str, str]] = set()
        self.commands: list[Command] = []
        #: Leases gained minus leases ended in this batch, by concurrency key.
        self.lease_delta: Tally[str] = Tally()

    # -- reading --------------------------------------------------------------------------------

    def load(self, ids: Iterable[str]) -> None:
        """Read tasks that the batch will need, in one go."""
        missing = []
        for task_id in ids:
            if task_id in self._tasks or task_id in self._absent:
                continue
            live = self._live.get(task_id)
            if live is not None:
                self._tasks[task_id] = live
            else:
                missing.append(task_id)
        if missing:
            found = self._store.get(missing)
            self._tasks.update(found)
            self._absent.update(missing)
            self._absent.difference_update(found)

    def get(self, task_id: str) -> Task | None:
        """Return a task as this batch has it, or ``None`` if it does not exist."""
        task = self._tasks.get(task_id)
        if task is None and task_id not in self._absent:
            self.load((task_id,))
            task = self._tasks.get(task_id)
        return task

    def schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)`` as this batch has it."""
        if key not in self._schedules:
            self._schedules[key] = self._store.get_schedule(key)
        return self._schedules[key]

    def adopt_schedule(self, read: Schedule) -> Schedule | None:
        """Take in a schedule that was just read from the store; return it as this batch has it."""
        return self._schedules.setdefault(read.key, read)

    def set_schedule(self, key: tuple[str, str], schedule: Schedule | None) -> None:
        """Change a schedule, or delete it."""
        self._schedules[key] = schedule
        self.changed_schedules.add(key)

    def adopt(self, tasks: Iterable[Task]) -> None:
        """Take in tasks that were just read from the store by another query."""
        for task in tasks:
            self._tasks.setdefault(task.spec.id, task)

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

    def lane_changes(self) -> dict[LaneKey, int]:
        """Return how many tasks each lane of the dispatch index has gained or lost."""
        lanes = Lanes()
        by_lane: dict[int, tuple[LaneKey, list[int]]] = {}
        for task_id, before in self.before.items():
            task = self._tasks[task_id]
            for one, change in ((before, -1), (task, 1)):
                if one is not None and one.ready:
                    lane = lanes.of(one)
                    by_lane.setdefault(id(lane), (lane, []))[1].append(change)
        changes: Tally[LaneKey] = Tally()
        for lane, counted in by_lane.values():
            changes[lane] += sum(counted)
        return changes

    # -- deciding -------------------------------------------------------------------------------

    def add(self, step: Step) -> None:
        """Take in a newly accepted task."""
        task = step.task
        spec = task.spec
        self.before[spec.id] = None
        self._tasks[spec.id] = task
        self._record(step)
        self.accepted[spec.task_type, spec.queue] += 1
        self.opened[spec.principal] += not task.terminal

    def step(self, task: Task, event: Event) -> Step:
        """Advance a task that was got from this ledger, and note what follows."""
        step = advance(task, event)
        if not step.changed:
            return step
        spec = task.spec
        self.before.setdefault(spec.id, task)
        self._tasks[spec.id] = step.task
        if step.task.terminal != task.terminal:
            self.opened[spec.principal] += -1 if step.task.terminal else 1
        if spec.concurrency_key is not None:
            change = (step.task.lease is not None) - (task.lease is not None)
            self.lease_delta[spec.concurrency_key] += change
        lease = task.lease
        if lease is not None and lease.started_at is None and task.queued_at is not None:
            # The start itself, or an end before which it was untold. Whether what is lost unheard
            # of ever started nobody knows.
            self.seconds[WAITED, spec.task_type] += [
                attempt.started_at - task.queued_at
                for attempt in step.attempts
                if attempt.outcome is not Outcome.LOST
            ]
        self._record(step)
        return step

    def _record(self, step: Step) -> None:
        task = step.task
        self.facts += step.facts
        self.commands += step.commands
        for attempt in step.attempts:
            # Its last word counts: one that started and ended in this batch is written once.
            self._attempts[attempt.task_id, attempt.token] = attempt
            if attempt.outcome is not None:
                label = attempt.outcome.value
                self.counts[Counter("attempts", task.spec.task_type, label)] += 1
                if attempt.ended_at is not None:
                    ran = attempt.ended_at - attempt.started_at
                    self.seconds[RAN, task.spec.task_type].append(ran)
        if task.finished_at is not None:
            self.counts[Counter("ended", task.spec.task_type, task.state.value)] += 1
            if task.spec.webhook is not None:
                self.deliveries.append(delivery_of(task, self._store.generation()))

    @property
    def attempts(self) -> list[Attempt]:
        """Attempts that began or ended in this batch, one row each, with their nodes' names."""
        names = self._node_ids
        return [
            one._replace(node_id=names.get(one.worker, one.worker))
            for one in self._attempts.values()
        ]

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
            or self.changed_schedules
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
        saved = [
            self._tasks[task_id].evolve(version=before.version + 1)
            for task_id, before in self.before.items()
            if before is not None
        ]
        if saved:
            store.save(saved)
            for task in saved:
                self._tasks[task.spec.id] = task
        failpoints.hit("ledger.tasks.written")
        for child_id, parents in self.dependencies:
            store.add_dependencies(child_id, parents)
        for parent_id, children in self.dropped_dependents:
            store.drop_dependents(parent_id, children)
        if self.pushed_settlements:
            store.push_settlements(self.pushed_settlements)
        for number in self.dropped_settlements:
            store.drop_settlement(number)
        if self._attempts:
            store.save_attempts(self.attempts)
        if self.deliveries:
            store.save_deliveries(self.deliveries)
        if self.changed_schedules:
            self._flush_schedules()
        for (task_type, queue), count in self.accepted.items():
            label = self._queue_labels.of(queue)
            self.counts[Counter("accepted", task_type, label)] += count
        for (figure, task_type), seconds in self.seconds.items():
            for label, count in stored_deltas(seconds).items():
                self.counts[Counter(figure, task_type, label)] += count
        if self.counts:
            store.bump(self.counts)
        if self.audit:
            store.append_audit(self.audit)
            failpoints.hit("ledger.audit.written")
        return store.append_facts(self.facts)

    def _flush_schedules(self) -> None:
        changed = {key: self._schedules[key] for key in sorted(self.changed_schedules)}
        self._store.save_schedules([one for one in changed.values() if one is not None])
        self._store.drop_schedules([key for key, one in changed.items() if one is None])
        failpoints.hit("ledger.schedules.written")

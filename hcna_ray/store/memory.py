"""The in-memory twin: same contract, nothing durable. For unit tests and simulations."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Generic, TypeVar

from hcna_ray.core.audit import AuditPoint, chain_hash
from hcna_ray.core.clock import ClockHold
from hcna_ray.core.errors import NotFound, VersionConflict
from hcna_ray.core.models import (
    Attempt,
    AuditEntry,
    Fact,
    Hold,
    LaneKey,
    Task,
    TaskFilter,
    TaskState,
    Token,
    WorkerRecord,
)
from hcna_ray.core.schedules import Schedule
from hcna_ray.store.base import (
    AuditState,
    Belongs,
    Counter,
    Delivery,
    KeyClaim,
    QueueSize,
    Settlement,
    StoredAudit,
    StoredFact,
)
from hcna_ray.store.bookkeeping import HELD, ended_anew

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_MISSING: Any = object()


class _Table(Generic[K, V]):
    """A dictionary that knows what its last commit held: `before` keeps what changed since."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self.now: dict[K, V] = {}
        self.before: dict[K, V] = {}

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self.before.setdefault(key, self.now.get(key, _MISSING))
            self.now[key] = value

    def drop(self, key: K) -> None:
        if key in self.now:
            with self._lock:
                self.before.setdefault(key, self.now[key])
                del self.now[key]

    def commit(self) -> None:
        self.before.clear()

    def roll_back(self) -> None:
        for key, value in self.before.items():
            if value is _MISSING:
                self.now.pop(key, None)
            else:
                self.now[key] = value
        self.before.clear()

    def committed(self, key: K) -> V | None:
        value = self.before.get(key, self.now.get(key, _MISSING))
        return None if value is _MISSING else value

    def all_committed(self) -> dict[K, V]:
        if not self.before:
            return self.now
        merged = {**self.now, **self.before}
        return {key: value for key, value in merged.items() if value is not _MISSING}


class _Index(Generic[K]):
    """Sorted entries under each key; a key without entries is not there."""

    def __init__(self) -> None:
        self.lists: dict[K, list[tuple[Any, ...]]] = {}

    def add(self, key: K, entry: tuple[Any, ...]) -> None:
        insort(self.lists.setdefault(key, []), entry)

    def discard(self, key: K, entry: tuple[Any, ...]) -> None:
        entries = self.lists[key]
        del entries[bisect_left(entries, entry)]
        if not entries:
            del self.lists[key]

    def first(self, key: K, limit: int) -> list[tuple[Any, ...]]:
        return self.lists.get(key, [])[:limit]


class MemoryTaskStore:
    """Tasks in dictionaries, with rollback. Implements `hcna_ray.store.base.TaskStore`.

    The indexes hold what the tables hold now; a rollback takes the changed tasks out and puts
    the old ones in. Readers look past what the open transaction has changed.
    """

    def __init__(self) -> None:
        lock = self._lock = threading.RLock()
        self._writing = False
        self._tasks: _Table[str, Task] = _Table(lock)
        self._id_of_seq: _Table[int, str] = _Table(lock)
        self._last_worker: _Table[str, str] = _Table(lock)
        self._end_no: _Table[str, int] = _Table(lock)
        self._numbers: _Table[str, int] = _Table(lock)
        self._depth: _Table[tuple[str, TaskState], int] = _Table(lock)
        self._keys: _Table[tuple[str, str], KeyClaim] = _Table(lock)
        self._facts: _Table[int, Fact] = _Table(lock)
        self._attempts: _Table[tuple[str, Token], Attempt] = _Table(lock)
        self._children: _Table[tuple[str, int], str] = _Table(lock)
        self._settlements: _Table[int, Settlement] = _Table(lock)
        self._deliveries: _Table[str, Delivery] = _Table(lock)
        self._schedules: _Table[tuple[str, str], Schedule] = _Table(lock)
        self._workers: _Table[str, WorkerRecord] = _Table(lock)
        self._paused: _Table[str, bool] = _Table(lock)
        self._counters: _Table[Counter, int] = _Table(lock)
        self._audit: _Table[int, StoredAudit] = _Table(lock)
        #: The anchor, at 0.
        self._anchor: _Table[int, AuditPoint] = _Table(lock)
        self._tables: list[_Table[Any, Any]] = [
            value for value in vars(self).values() if isinstance(value, _Table)
        ]
        self._numbers.now["generation"] = 1
        self._ready: _Index[LaneKey] = _Index()
        self._waking: _Index[None] = _Index()
        self._ordering: _Index[str] = _Index()
        self._held: _Index[str] = _Index()
        self._leased: _Index[None] = _Index()
        self._waiting_for: _Index[str] = _Index()

    def reader(self) -> MemoryTaskReader:
        """Return a reader of what is committed."""
        return MemoryTaskReader(self)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def unconfirmed_s(self) -> float:
        """Return 0: nobody else can write here."""
        return 0.0

    # -- transactions ---------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Open the one write transaction; see `TaskStore.transaction`."""
        if self._writing:
            raise RuntimeError("a transaction is open already")
        self._writing = True
        try:
            yield
        except BaseException:
            with self._lock:
                self._roll_back()
            raise
        else:
            with self._lock:
                for table in self._tables:
                    table.commit()
        finally:
            self._writing = False

    def _roll_back(self) -> None:
        changed = list(self._tasks.before)
        edges = list(self._children.before)
        for id_ in changed:
            self._unindex(id_)
        for edge in edges:
            self._unindex_edge(edge)
        for table in self._tables:
            table.roll_back()
        for id_ in changed:
            self._index(id_)
        for edge in edges:
            self._index_edge(edge)

    def _must_write(self) -> None:
        if not self._writing:
            raise RuntimeError("a store is written inside a transaction only")

    def _number(self, name: str) -> int:
        return self._numbers.now.get(name, 0)

    def _add(self, name: str, delta: int) -> int:
        self._numbers.put(name, self._number(name) + delta)
        return self._number(name)

    # -- indexes --------------------------------------------------------------------------------

    def _index(self, id_: str) -> None:
        task = self._tasks.now.get(id_)
        if task is not None:
            for index, key, entry in self._entries(task):
                index.add(key, entry)

    def _unindex(self, id_: str) -> None:
        task = self._tasks.now.get(id_)
        if task is not None:
            for index, key, entry in self._entries(task):
                index.discard(key, entry)

    def _entries(self, task: Task) -> Iterator[tuple[_Index[Any], Any, tuple[Any, ...]]]:
        spec = task.spec
        if task.ready:
            lane = LaneKey(spec.queue, spec.task_type, task.needs)
            yield self._ready, lane, (task.dispatch_key, task.seq, task.id)
        if (wake_at := task.wake_at) is not None:
            yield self._waking, None, (wake_at, task.seq, task.id)
        if spec.ordering_key is not None and not task.terminal:
            yield self._ordering, spec.ordering_key, (task.seq, task.id)
        if spec.concurrency_key is not None and task.hold & Hold.CONCURRENCY and not task.terminal:
            yield self._held, spec.concurrency_key, (task.dispatch_key, task.seq, task.id)
        if task.lease is not None:
            yield self._leased, None, (task.seq, task.id)

    def _index_edge(self, edge: tuple[str, int]) -> None:
        if edge in self._children.now:
            self._waiting_for.add(edge[0], (edge[1], self._children.now[edge]))

    def _unindex_edge(self, edge: tuple[str, int]) -> None:
        if edge in self._children.now:
            self._waiting_for.discard(edge[0], (edge[1], self._children.now[edge]))

    def _put(self, task: Task) -> None:
        """Count and index a task out of where it stood and into where it stands."""
        old = self._tasks.now.get(task.id)
        if old is not None:
            self._count(old, -1)
            self._unindex(task.id)
        self._tasks.put(task.id, task)
        self._count(task, 1)
        self._index(task.id)
        if task.lease is not None:
            self._last_worker.put(task.id, task.lease.worker)
        if not task.terminal:
            self._end_no.drop(task.id)
        elif old is None or not old.terminal or ended_anew(old, task):
            self._end_no.put(task.id, self._add("last_end", 1))

    def _count(self, task: Task, by: int) -> None:
        place = (task.spec.queue, task.state)
        self._depth.put(place, self._depth.now.get(place, 0) + by)
        if not task.terminal:
            self._add("open_tasks", by)
            self._add("open_bytes", by * task.spec.bytes_stored)

    def _named(self, entries: Iterable[tuple[Any, ...]]) -> list[Task]:
        return [self._tasks.now[entry[-1]] for entry in entries]

    # -- identity -------------------------------------------------------------------------------

    def generation(self) -> int:
        """Return the first half of every fencing token."""
        return self._number("generation")

    def raise_generation(self) -> int:
        """Raise the generation by one and return it."""
        self._must_write()
        return self._add("generation", 1)

    def last_seq(self) -> int:
        """Return the highest accept sequence ever used, 0 when none."""
        return self._number("last_seq")

    # -- tasks ----------------------------------------------------------------------------------

    def insert(self, tasks: Sequence[Task]) -> set[str]:
        """Add new tasks and return the ids really added.

        Raises:
            ValueError: an accept sequence belongs to another task.
        """
        self._must_write()
        added: dict[str, Task] = {}
        taken: set[int] = set()
        for task in tasks:
            if task.id in self._tasks.now or task.id in added:
                continue
            if task.seq in self._id_of_seq.now or task.seq in taken:
                raise ValueError(f"accept sequence {task.seq} belongs to another task")
            added[task.id] = task
            taken.add(task.seq)
        for task in sorted(added.values(), key=lambda task: task.seq):
            self._id_of_seq.put(task.seq, task.id)
            self._put(task)
            self._numbers.put("last_seq", max(self.last_seq(), task.seq))
        return set(added)

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        return {id_: self._tasks.now[id_] for id_ in ids if id_ in self._tasks.now}

    def save(self, tasks: Sequence[Task]) -> None:
        """Replace stored tasks; each must carry the stored version plus one, and appear once.

        Nothing is written unless all may be.

        Raises:
            VersionConflict: a stored task is at another version, or there is none.
        """
        self._must_write()
        seen: set[str] = set()
        for task in tasks:
            old = self._tasks.now.get(task.id)
            fits = old is not None and (old.seq, old.version) == (task.seq, task.version - 1)
            if not fits or task.id in seen:
                raise VersionConflict(task.id, task.version - 1)
            seen.add(task.id)
        for task in tasks:
            self._put(task)

    def claim_keys(self, claims: Sequence[KeyClaim]) -> dict[tuple[str, str], KeyClaim]:
        """Bind free idempotency keys; return who holds each ``(principal, key)`` afterwards."""
        self._must_write()
        for claim in claims:
            if (claim.principal, claim.key) not in self._keys.now:
                self._keys.put((claim.principal, claim.key), claim)
        wanted = [(claim.principal, claim.key) for claim in claims]
        return {name: self._keys.now[name] for name in wanted}

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        return {name: self._keys.now[name] for name in keys if name in self._keys.now}

    def append_facts(self, facts: Sequence[Fact]) -> int:
        """Add lines of history and return the number of the last one (0 if there never was one)."""
        self._must_write()
        for fact in facts:
            self._facts.put(self._add("last_fact", 1), fact)
        return self._number("last_fact")

    def save_attempts(self, attempts: Sequence[Attempt]) -> None:
        """Insert or replace attempts by ``(task_id, token)``."""
        self._must_write()
        for attempt in attempts:
            self._attempts.put((attempt.task_id, attempt.token), attempt)

    # -- what the scheduler reads -----------------------------------------------------------------

    def ready_lanes(self) -> dict[LaneKey, int]:
        """Return how many tasks stand in the dispatch index, by lane. Empty lanes are left out."""
        return {lane: len(entries) for lane, entries in self._ready.lists.items()}

    def heads(self, lane: LaneKey, limit: int) -> list[Task]:
        """Return the first ``limit`` ready tasks of a lane by ``(dispatch_key, seq)``."""
        return self._named(self._ready.first(lane, limit))

    def leased(self) -> list[Task]:
        """Return every task that holds a lease, in accept order."""
        return self._named(self._leased.lists.get(None, []))

    def due(self, now: float, limit: int) -> list[Task]:
        """Return tasks whose ``wake_at`` is at or before ``now``, earliest first."""
        first = self._waking.first(None, limit)
        return self._named(entry for entry in first if entry[0] <= now)

    def next_wake(self) -> float | None:
        """Return the earliest ``wake_at`` of all tasks, or ``None``."""
        first = self._waking.first(None, 1)
        return first[0][0] if first else None

    def size(self) -> QueueSize:
        """Return count and bytes of all tasks that have not ended."""
        return QueueSize(tasks=self._number("open_tasks"), bytes=self._number("open_bytes"))

    # -- keys and dependencies --------------------------------------------------------------------

    def ordering_out(self, key: str) -> Task | None:
        """Return the first not yet ended task with this ordering key that is not held for it."""
        line = self._named(self._ordering.lists.get(key, []))
        return next((task for task in line if not task.hold & Hold.ORDERING), None)

    def ordering_line(self, key: str, limit: int) -> list[Task]:
        """Return the not yet ended tasks with this ordering key, in accept order."""
        return self._named(self._ordering.first(key, limit))

    def concurrency_keys_held(self, limit: int, *, after: str = "") -> list[str]:
        """Return up to ``limit`` distinct concurrency keys for which tasks are held, sorted."""
        return sorted(key for key in self._held.lists if key > after)[:limit]

    def held_by_concurrency(self, key: str, limit: int) -> list[Task]:
        """Return tasks held for this concurrency key by ``(dispatch_key, seq)``."""
        return self._named(self._held.first(key, limit))

    def add_dependencies(self, child_id: str, parent_ids: Sequence[str]) -> None:
        """Note that ``child_id``, which is stored already, waits for each parent.

        Raises:
            NotFound: the child is not stored.
        """
        self._must_write()
        child = self._tasks.now.get(child_id)
        if child is None:
            raise NotFound("task", child_id)
        for parent_id in parent_ids:
            edge = (parent_id, child.seq)
            if edge not in self._children.now:
                self._children.put(edge, child_id)
                self._index_edge(edge)

    def task_states(self, ids: Iterable[str]) -> dict[str, TaskState]:
        """Return the states of those of ``ids`` that exist."""
        return {id_: task.state for id_, task in self.get(ids).items()}

    def dependents(self, parent_id: str, limit: int) -> list[str]:
        """Return up to ``limit`` ids that still wait for ``parent_id``, in accept order."""
        return [child_id for _seq, child_id in self._waiting_for.first(parent_id, limit)]

    def waited_for(self, ids: Sequence[str]) -> set[str]:
        """Return those of ``ids`` for which any task still waits."""
        return {id_ for id_ in ids if self._waiting_for.first(id_, 1)}

    def drop_dependents(self, parent_id: str, child_ids: Sequence[str]) -> None:
        """Forget that these children wait for ``parent_id``."""
        self._must_write()
        for child in self.get(child_ids).values():
            self._drop_edge((parent_id, child.seq))

    def _drop_edge(self, edge: tuple[str, int]) -> None:
        self._unindex_edge(edge)
        self._children.drop(edge)

    def push_settlements(self, items: Sequence[tuple[str, bool]]) -> None:
        """Add durable `Settlement` orders for ``(task_id, completed)``."""
        self._must_write()
        for task_id, completed in items:
            number = self._add("last_settlement", 1)
            self._settlements.put(number, Settlement(number, task_id, completed))

    def settlements(self, limit: int) -> list[Settlement]:
        """Return the oldest settlement orders not carried out yet."""
        return sorted(self._settlements.now.values())[:limit]

    def drop_settlement(self, number: int) -> None:
        """Forget a settlement order that has been carried out."""
        self._must_write()
        self._settlements.drop(number)

    # -- webhooks ---------------------------------------------------------------------------------

    def save_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        """Insert or replace deliveries by id."""
        self._must_write()
        for delivery in deliveries:
            self._deliveries.put(delivery.id, delivery)

    def drop_deliveries(self, ids: Sequence[str]) -> None:
        """Forget deliveries that are done with."""
        self._must_write()
        for id_ in ids:
            self._deliveries.drop(id_)

    # -- schedules --------------------------------------------------------------------------------

    def save_schedules(self, schedules: Sequence[Schedule]) -> None:
        """Insert or replace schedules by principal and name; none may be there twice."""
        self._must_write()
        for schedule in schedules:
            self._schedules.put(schedule.key, schedule)

    def drop_schedules(self, keys: Sequence[tuple[str, str]]) -> None:
        """Forget schedules by ``(principal, name)``."""
        self._must_write()
        for key in keys:
            self._schedules.drop(key)

    def get_schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)``, if there is one."""
        return self._schedules.now.get(key)

    def due_schedules(self, now: float, limit: int) -> list[Schedule]:
        """Return schedules whose ``wake_at`` is at or before ``now``, earliest first."""
        due = sorted(entry for entry in self._waking_schedules() if entry[0] <= now)
        return [self._schedules.now[key] for _wake_at, key in due[:limit]]

    def next_schedule_wake(self) -> float | None:
        """Return the earliest ``wake_at`` of all schedules, or ``None``."""
        return min((wake_at for wake_at, _key in self._waking_schedules()), default=None)

    def _waking_schedules(self) -> list[tuple[float, tuple[str, str]]]:
        every = self._schedules.now.values()
        return [(one.wake_at, one.key) for one in every if one.wake_at is not None]

    def count_schedules(self, principal: str | None = None) -> int:
        """Return how many schedules there are, of a principal or in all."""
        return sum(principal in (None, owner) for owner, _name in self._schedules.now)

    # -- small tables -----------------------------------------------------------------------------

    def save_worker(self, record: WorkerRecord) -> None:
        """Insert or replace a worker by name."""
        self._must_write()
        self._workers.put(record.name, record)

    def workers(self) -> list[WorkerRecord]:
        """Return every worker ever registered and not forgotten, by name."""
        return sorted(self._workers.now.values(), key=lambda record: record.name)

    def forget_worker(self, name: str) -> None:
        """Remove a worker that left for good."""
        self._must_write()
        self._workers.drop(name)

    def set_paused(self, queue: str, paused: bool) -> None:
        """Pause a queue, or resume it."""
        self._must_write()
        if paused:
            self._paused.put(queue, True)
        else:
            self._paused.drop(queue)

    def paused(self) -> frozenset[str]:
        """Return the names of paused queues."""
        return frozenset(self._paused.now)

    def bump(self, deltas: Mapping[Counter, int]) -> None:
        """Add to counters."""
        self._must_write()
        for counter, delta in deltas.items():
            self._counters.put(counter, self._counters.now.get(counter, 0) + delta)

    def counted_queues(self) -> frozenset[str]:
        """Return the labels that accepted tasks are counted under, by queue."""
        return frozenset(one.label for one in self._counters.now if one.name == "accepted")

    def append_audit(self, entries: Sequence[AuditEntry]) -> None:
        """Add audit lines, each chained to the one before it."""
        self._must_write()
        anchor = self._anchor.now.get(0, AuditPoint())
        last = max(self._audit.now, default=None)
        head = anchor.hash if last is None else self._audit.now[last].hash or anchor.hash
        for entry in entries:
            number = self._add("last_audit", 1)
            head = chain_hash(head, number, entry)
            self._audit.put(number, StoredAudit(number, entry, head))

    def prune(self, ended_before: float, keys_before: float, limit: int) -> int:
        """Delete up to ``limit`` old tasks, and up to ``limit`` keys; see `TaskStore.prune`."""
        self._must_write()
        ended = (self._tasks.now[id_] for id_ in self._end_no.now)
        old = sorted(
            (task.finished_at, task.seq, task.id)
            for task in ended
            if task.finished_at is not None and task.finished_at < ended_before
            if not self._waiting_for.first(task.id, 1)
        )
        gone = {id_ for _at, _seq, id_ in old[:limit]}
        for id_ in gone:
            self._delete(self._tasks.now[id_])
        for number in [n for n, fact in self._facts.now.items() if fact.task_id in gone]:
            self._facts.drop(number)
        for name in [name for name in self._attempts.now if name[0] in gone]:
            self._attempts.drop(name)
        orphans = sorted(
            (claim.at, claim.principal, claim.key)
            for claim in self._keys.now.values()
            if claim.at < keys_before and claim.task_id not in self._tasks.now
        )
        for _at, principal, key in orphans[:limit]:
            self._keys.drop((principal, key))
        return len(gone)

    def prune_audit(self, before: float, limit: int) -> int:
        """Delete up to ``limit`` old audit lines; see `TaskStore.prune_audit`."""
        self._must_write()
        oldest = sorted(self._audit.now.values())[:limit]
        gone = list(takewhile(lambda line: line.entry.at < before, oldest))
        for line in gone:
            self._audit.drop(line.number)
            self._anchor.put(0, AuditPoint(line.number, line.hash or ""))
        return len(gone)

    def clock_hold(self) -> ClockHold:
        """Return what was last said to `hold_clock`."""
        by_s, since = map(self._number, HELD)
        return ClockHold(by_s=float(by_s), since=float(since))

    def hold_clock(self, hold: ClockHold) -> None:
        """Remember by how much the wall clock was put forward."""
        self._must_write()
        for name, value in zip(HELD, (hold.by_s, hold.since), strict=True):
            self._numbers.put(name, math.ceil(value))

    def _delete(self, task: Task) -> None:
        self._count(task, -1)
        self._unindex(task.id)
        for edge in [edge for edge in self._children.now if edge[1] == task.seq]:
            self._drop_edge(edge)
        self._tasks.drop(task.id)
        self._id_of_seq.drop(task.seq)
        self._last_worker.drop(task.id)
        self._end_no.drop(task.id)


class MemoryTaskReader:
    """Reads of what a `MemoryTaskStore` has committed. Implements `TaskReader`.

    Listings pass over every task: fine for tests, which hold few.
    """

    def __init__(self, store: MemoryTaskStore) -> None:
        self._store = store
        self._lock = store._lock

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        with self._lock:
            found = {id_: self._store._tasks.committed(id_) for id_ in ids}
        return {id_: task for id_, task in found.items() if task is not None}

    def attempts(self, task_id: str) -> list[Attempt]:
        """Return the attempts of a task, oldest first."""
        with self._lock:
            every = self._store._attempts.all_committed().values()
            found = [attempt for attempt in every if attempt.task_id == task_id]
        return sorted(found, key=lambda attempt: attempt.token)

    def page(self, where: TaskFilter, *, before_seq: int | None, limit: int) -> list[Task]:
        """Return tasks that fit, newest first, with ``seq < before_seq`` (a keyset page)."""
        with self._lock:
            workers = self._store._last_worker.all_committed()
            found = [
                task
                for task in self._store._tasks.all_committed().values()
                if before_seq is None or task.seq < before_seq
                if _fits(task, workers.get(task.id), where)
            ]
        return sorted(found, key=lambda task: task.seq, reverse=True)[:limit]

    def ended(
        self, *, ids: Sequence[str] = (), batch_id: str | None = None, after: int = 0, limit: int
    ) -> list[tuple[int, Task]]:
        """Return ended tasks of a batch, or else among ``ids``, with a higher end number."""
        with self._lock:
            numbers = self._store._end_no.all_committed()
            found = [
                (numbers[task.id], task)
                for task in self._among(ids, batch_id)
                if numbers.get(task.id, 0) > after
            ]
        return sorted(found, key=lambda pair: pair[0])[:limit]

    def open_count(self, *, ids: Sequence[str] = (), batch_id: str | None = None) -> int:
        """Return how many of a batch, or else among ``ids``, exist and have not ended."""
        with self._lock:
            return sum(not task.terminal for task in self._among(ids, batch_id))

    def batch_exists(self, batch_id: str) -> bool:
        """Return whether any task carries this batch id."""
        with self._lock:
            return bool(self._among((), batch_id))

    def belongs(self, ids: Iterable[str]) -> dict[str, Belongs]:
        """Return whose those of ``ids`` are that exist."""
        found = self.get(ids).values()
        return {
            task.id: Belongs(task.spec.principal, task.spec.task_type, task.spec.queue)
            for task in found
        }

    def open_of(self, principal: str, limit: int) -> int:
        """Return how many tasks of a principal have not ended, counted as far as ``limit``."""
        with self._lock:
            every = self._store._tasks.all_committed().values()
            open_ = sum(not task.terminal and task.spec.principal == principal for task in every)
        return min(open_, limit)

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        with self._lock:
            every = self._store._keys.all_committed()
            return {name: every[name] for name in keys if name in every}

    def facts(self, *, after: int, limit: int, task_id: str | None = None) -> list[StoredFact]:
        """Return history with numbers above ``after``, oldest first."""
        with self._lock:
            found = [
                StoredFact(number, fact)
                for number, fact in self._store._facts.all_committed().items()
                if number > after and task_id in (None, fact.task_id)
            ]
        return sorted(found, key=lambda fact: fact.number)[:limit]

    def last_fact(self) -> int:
        """Return the number of the newest line of history, 0 when there is none."""
        with self._lock:
            return self._store._numbers.committed("last_fact") or 0

    def generation(self) -> int:
        """Return the first half of every fencing token."""
        with self._lock:
            return self._store._numbers.committed("generation") or 0

    def deliveries(
        self, *, due_before: float, limit: int, not_to: Collection[str] = ()
    ) -> list[Delivery]:
        """Return deliveries that are due at or before an instant, by ``(due_at, id)``."""
        with self._lock:
            every = self._store._deliveries.all_committed().values()
            found = [one for one in every if one.due_at <= due_before and one.target not in not_to]
        return sorted(found, key=lambda one: (one.due_at, one.id))[:limit]

    def get_schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)``, if there is one."""
        with self._lock:
            return self._store._schedules.committed(key)

    def schedules(
        self, *, principal: str | None = None, after: tuple[str, str] = ("", ""), limit: int
    ) -> list[Schedule]:
        """Return schedules by ``(principal, name)``, those behind ``after`` (a keyset page)."""
        with self._lock:
            every = self._store._schedules.all_committed().values()
            found = [one for one in every if principal in (None, one.principal) and one.key > after]
        return sorted(found, key=lambda one: one.key)[:limit]

    def counters(self) -> dict[Counter, int]:
        """Return every counter."""
        with self._lock:
            return dict(self._store._counters.all_committed())

    def depth(self) -> dict[tuple[str, TaskState], int]:
        """Return how many tasks stand in each ``(queue, state)``; none is left out."""
        with self._lock:
            every = self._store._depth.all_committed()
            return {place: tasks for place, tasks in every.items() if tasks}

    def queued_since(self) -> dict[str, float]:
        """Return since when the first ready task of each queue's lanes has been queued."""
        with self._lock:
            ready = [task for task in self._store._tasks.all_committed().values() if task.ready]
        first: dict[LaneKey, Task] = {}
        for task in sorted(ready, key=lambda task: (task.dispatch_key, task.seq)):
            first.setdefault(LaneKey(task.spec.queue, task.spec.task_type, task.needs), task)
        since: dict[str, float] = {}
        for lane, task in first.items():
            if task.queued_at is not None:
                since[lane.queue] = min(task.queued_at, since.get(lane.queue, task.queued_at))
        return since

    def audit(self, *, before: int | None, limit: int) -> list[StoredAudit]:
        """Return audit lines with numbers below ``before``, newest first."""
        with self._lock:
            found = [
                line
                for number, line in self._store._audit.all_committed().items()
                if before is None or number < before
            ]
        return sorted(found, key=lambda line: line.number, reverse=True)[:limit]

    def audit_after(self, after: int, limit: int) -> list[StoredAudit]:
        """Return audit lines with numbers above ``after``, oldest first."""
        with self._lock:
            lines = self._store._audit.all_committed()
        return [lines[number] for number in sorted(lines) if number > after][:limit]

    def audit_state(self) -> AuditState:
        """Return where the audit log begins and ends."""
        with self._lock:
            last = self._store._numbers.committed("last_audit") or 0
            return AuditState(self._store._anchor.committed(0) or AuditPoint(), last)

    def workers(self) -> list[WorkerRecord]:
        """Return every worker on record, by name."""
        with self._lock:
            found = list(self._store._workers.all_committed().values())
        return sorted(found, key=lambda record: record.name)

    def paused(self) -> frozenset[str]:
        """Return the names of paused queues."""
        with self._lock:
            return frozenset(self._store._paused.all_committed())

    def _among(self, ids: Sequence[str], batch_id: str | None) -> list[Task]:
        if batch_id is None:
            return list(self.get(ids).values())
        every = self._store._tasks.all_committed().values()
        return [task for task in every if task.spec.batch_id == batch_id]


def _fits(task: Task, last_worker: str | None, where: TaskFilter) -> bool:
    spec = task.spec
    failed_as = task.error.kind if task.error and task.state is TaskState.FAILED else None
    return (
        (not where.ids or task.id in where.ids)
        and (not where.states or task.state in where.states)
        and where.task_type in (None, spec.task_type)
        and where.queue in (None, spec.queue)
        and where.worker in (None, last_worker)
        and where.batch_id in (None, spec.batch_id)
        and where.principal in (None, spec.principal)
        and where.kind in (None, failed_as)
        and (where.since is None or spec.accepted_at >= where.since)
    )

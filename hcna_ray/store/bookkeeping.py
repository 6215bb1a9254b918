"""What the one writer of an SQL store keeps in memory, so that a batch reads and writes little.

Sequences, lanes and sizes are read when the store is opened and written with the transaction that
changed them; tasks that will soon be asked for again stay decoded. All of it may be forgotten at
any moment and read again, and is after a rollback. How the tables are reached is each store's own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hcna_ray.core.clock import ClockHold
from hcna_ray.core.errors import VersionConflict
from hcna_ray.core.models import LaneKey, Task
from hcna_ray.store import codec, rows
from hcna_ray.store.base import Counter, QueueSize
from hcna_ray.store.rows import Row

#: The writer keeps this many live tasks decoded, each of at most `_SMALL` bytes: what is accepted
#: now is granted soon, and what is granted ends soon.
KNOWN_MAX = 8192
_SMALL = 4096
#: Old idempotency keys that one prune looks at, for each that it may delete.
_KEYS_LOOKED = 10

#: Where an idempotency key stands among all of them by age: ``(at, principal, key)``.
KeyPlace = tuple[float, str, str]
#: Before the oldest.
OLDEST_KEY: KeyPlace = (-math.inf, "", "")
#: Numbers that a store has once the clock was put forward: seconds, and the instant after it.
HELD = ("clock_held_s", "clock_held_since")


@dataclass(slots=True)
class Lane:
    """Tasks that are alike to the scheduler: their number in the store, and how many are ready."""

    id: int
    #: Tasks in the dispatch index.
    ready: int


class Known(NamedTuple):
    """A task as the open transaction sees it, with its index values as they are stored."""

    task: Task
    indexed: Row


class Change(NamedTuple):
    """A task to be written in the place of its former version."""

    task: Task
    #: Index values as they are stored.
    was: Row
    #: Index values that it has now.
    now: Row


def ended_anew(before: Task, now: Task) -> bool:
    """Whether a task that had ended has ended once more: it was replayed in the same commit.

    Who follows ends must see the second one too.
    """
    return (before.state, before.finished_at) != (now.state, now.finished_at)


class Bookkeeper(ABC):
    """The half of a `TaskStore` that is the same whichever database keeps the tables."""

    def __init__(self) -> None:
        self._writing = False
        #: Where the next `_prune_keys` goes on.
        self._keys_seen = OLDEST_KEY
        self._take_in((), ())

    # -- what each database does in its own way ---------------------------------------------------

    @abstractmethod
    def _insert_tasks(self, values: Sequence[Row]) -> set[int]:
        """Insert rows of `rows.SPEC`, `rows.PLAIN` and `rows.INDEXED`; return the new sequences."""

    @abstractmethod
    def _insert_specs(self, values: Sequence[tuple[int, bytes]]) -> None:
        """Insert ``(seq, body)``."""

    @abstractmethod
    def _number_ends(self, values: Sequence[tuple[int, int]]) -> None:
        """Give inserted tasks their end numbers: ``(end_no, seq)``."""

    @abstractmethod
    def _update_tasks(self, changes: Sequence[Change]) -> None:
        """Write each change over the version before it, and make sure that all were written."""

    @abstractmethod
    def _insert_number(self, name: str) -> None:
        """Insert a number, which is 0."""

    @abstractmethod
    def _insert_lane(self, key: LaneKey) -> int:
        """Insert a lane and return its number."""

    @abstractmethod
    def _rows_by_id(self, ids: Sequence[str]) -> Sequence[Row]:
        """Return rows of `rows.COLUMNS`."""

    @abstractmethod
    def _rows_by_seq(self, seqs: Sequence[int]) -> Sequence[Row]:
        """Return rows of `rows.COLUMNS`."""

    @abstractmethod
    def _old_keys(self, after: KeyPlace, before: float, limit: int) -> Sequence[Row]:
        """Return idempotency keys by age: the columns of `KeyPlace`, and whether its task is gone.

        Only those behind ``after`` that were bound before an instant.
        """

    @abstractmethod
    def _delete_keys(self, names: Sequence[tuple[str, str]]) -> None:
        """Delete idempotency keys by ``(principal, key)``."""

    def _refresh(self) -> None:
        """Read what is kept in memory again if it is not known to be true."""
        return

    # -- what is in memory ------------------------------------------------------------------------

    def _take_in(
        self, numbers: Iterable[tuple[str, int]], lanes: Iterable[tuple[int, str, str, str, int]]
    ) -> None:
        """Start from these rows of the tables, and forget what an unfinished transaction added."""
        self._numbers: dict[str, int] = dict(numbers)
        self._lanes: dict[LaneKey, Lane] = {}
        self._lane_by_id: dict[int, Lane] = {}
        for id_, queue, task_type, needs, ready in lanes:
            key = LaneKey(queue, task_type, codec.needs_from_json(needs))
            self._lanes[key] = self._lane_by_id[id_] = Lane(id_, ready)
        self._known: OrderedDict[int, Known] = OrderedDict()
        self._seq_of: dict[str, int] = {}
        self._changed_numbers: set[str] = set()
        self._changed_lanes: set[int] = set()
        self._depth: Tally[tuple[str, str]] = Tally()
        self._counts: Tally[Counter] = Tally()

    def _take_changes(
        self,
    ) -> tuple[
        list[tuple[int, str]],
        list[tuple[int, int]],
        list[tuple[str, str, int]],
        list[tuple[str, str, str, int]],
    ]:
        """Return what has to be written before the commit, and count it as written.

        Returns:
            ``(value, name)`` of numbers, ``(ready, id)`` of lanes, and what to add to the rows of
            ``depth`` and ``counter``.
        """
        numbers = [(self._numbers[name], name) for name in sorted(self._changed_numbers)]
        changed = [self._lane_by_id[id_] for id_ in sorted(self._changed_lanes)]
        lanes = [(lane.ready, lane.id) for lane in changed]
        depth = [(*place, delta) for place, delta in sorted(self._depth.items()) if delta]
        counts = [(*counter, delta) for counter, delta in sorted(self._counts.items())]
        self._changed_numbers.clear()
        self._changed_lanes.clear()
        self._depth.clear()
        self._counts.clear()
        return numbers, lanes, depth, counts

    def _must_write(self) -> None:
        if not self._writing:
            raise RuntimeError("a store is written inside a transaction only")

    def _next(self, sequence: str) -> int:
        self._add(sequence, 1)
        return self._numbers[sequence]

    def _reserve(self, sequence: str, count: int) -> int:
        """Use up ``count`` numbers of a sequence; return the first."""
        first = self._numbers[sequence] + 1
        if count:
            self._add(sequence, count)
        return first

    def _add(self, number: str, delta: int) -> None:
        if delta:
            self._numbers[number] += delta
            self._changed_numbers.add(number)

    # -- identity, sizes, counters ----------------------------------------------------------------

    def generation(self) -> int:
        """Return the first half of every fencing token."""
        self._refresh()
        return self._numbers["generation"]

    def raise_generation(self) -> int:
        """Raise the generation by one and return it."""
        self._must_write()
        return self._next("generation")

    def last_seq(self) -> int:
        """Return the highest accept sequence ever used, 0 when none."""
        self._refresh()
        return self._numbers["last_seq"]

    def size(self) -> QueueSize:
        """Return count and bytes of all tasks that have not ended."""
        self._refresh()
        return QueueSize(tasks=self._numbers["open_tasks"], bytes=self._numbers["open_bytes"])

    def ready_lanes(self) -> dict[LaneKey, int]:
        """Return how many tasks stand in the dispatch index, by lane. Empty lanes are left out."""
        self._refresh()
        return {key: lane.ready for key, lane in self._lanes.items() if lane.ready}

    def bump(self, deltas: Mapping[Counter, int]) -> None:
        """Add to counters."""
        self._must_write()
        self._counts.update(deltas)

    def clock_hold(self) -> ClockHold:
        """Return what was last said to `hold_clock`."""
        self._refresh()
        by_s, since = (self._numbers.get(name, 0) for name in HELD)
        return ClockHold(by_s=float(by_s), since=float(since))

    def hold_clock(self, hold: ClockHold) -> None:
        """Remember by how much the wall clock was put forward."""
        self._must_write()
        for name, value in zip(HELD, (hold.by_s, hold.since), strict=True):
            if name not in self._numbers:
                self._insert_number(name)
                self._numbers[name] = 0
            self._add(name, math.ceil(value) - self._numbers[name])

    # -- tasks ------------------------------------------------------------------------------------

    def insert(self, tasks: Sequence[Task]) -> set[str]:
        """Add new tasks and return the ids really added.

        Raises:
            ValueError: an accept sequence belongs to another task.
        """
        self._must_write()
        placed = [
            rows.indexed_values(task, lane_id=self._lane_of(task), last_worker=None, end_no=None)
            for task in tasks
        ]
        fresh = self._insert_tasks(
            [
                (*rows.spec_values(task), *rows.plain_values(task), *indexed)
                for task, indexed in zip(tasks, placed, strict=True)
            ]
        )
        added: set[str] = set()
        ended: list[int] = []
        specs: list[tuple[int, bytes]] = []
        open_tasks = open_bytes = 0
        for task, indexed in zip(tasks, placed, strict=True):
            spec = task.spec
            if task.seq not in fresh or spec.id in added:
                continue
            added.add(spec.id)
            specs.append((task.seq, codec.pack_spec(spec)))
            self._depth[spec.queue, indexed[rows.STATE]] += 1
            self._add_ready(indexed[rows.READY_LANE], 1)
            if task.terminal:
                ended.append(task.seq)
            else:
                open_tasks += 1
                open_bytes += spec.bytes_stored
                self._remember(task, indexed)
        self._add("open_tasks", open_tasks)
        self._add("open_bytes", open_bytes)
        self._insert_specs(specs)
        self._number_ends([(self._next("last_end"), seq) for seq in sorted(ended)])
        if fresh and max(fresh) > self._numbers["last_seq"]:
            self._add("last_seq", max(fresh) - self._numbers["last_seq"])
        return added

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        found: dict[str, Task] = {}
        unknown: list[str] = []
        for id_ in ids:
            seq = self._seq_of.get(id_)
            if seq is None:
                unknown.append(id_)
            else:
                found[id_] = self._known[seq].task
        if unknown:
            for row in self._rows_by_id(unknown):
                known = self._remember(rows.task_from_row(row), rows.indexed_of_row(row))
                found[known.task.id] = known.task
        return found

    def save(self, tasks: Sequence[Task]) -> None:
        """Replace stored tasks; each must carry the stored version plus one, and appear once.

        Nothing is written unless all may be.

        Raises:
            VersionConflict: a stored task is at another version, or there is none.
        """
        self._must_write()
        stored = self._by_seq([task.seq for task in tasks])
        before: list[Known] = []
        for task in tasks:
            old = stored.pop(task.seq, None)
            if old is None or (old.task.id, old.task.version) != (task.id, task.version - 1):
                raise VersionConflict(task.id, task.version - 1)
            before.append(old)
        changes: list[Change] = []
        opened = opened_bytes = 0
        for task, old in zip(tasks, before, strict=True):
            was, now = old.indexed, self._moved(task, old)
            if (was[rows.END_NO] is None) != (now[rows.END_NO] is None):
                sign = 1 if now[rows.END_NO] is None else -1
                opened += sign
                opened_bytes += sign * task.spec.bytes_stored
            changes.append(Change(task, was, now))
            self._remember(task, now)
        if opened or opened_bytes:
            self._add("open_tasks", opened)
            self._add("open_bytes", opened_bytes)
        self._update_tasks(changes)

    def _moved(self, task: Task, old: Known) -> Row:
        """Count a task out of where it stood and into where it stands; return its index values."""
        was = old.indexed
        end_no: int | None = was[rows.END_NO]
        if not task.terminal:
            end_no = None
        elif end_no is None or ended_anew(old.task, task):
            end_no = self._next("last_end")
        now = rows.indexed_values(
            task, lane_id=self._lane_of(task), last_worker=was[rows.WORKER], end_no=end_no
        )
        if now[rows.STATE] != was[rows.STATE]:
            self._depth[task.spec.queue, was[rows.STATE]] -= 1
            self._depth[task.spec.queue, now[rows.STATE]] += 1
        if now[rows.READY_LANE] != was[rows.READY_LANE]:
            self._add_ready(was[rows.READY_LANE], -1)
            self._add_ready(now[rows.READY_LANE], 1)
        return now

    def _lane_of(self, task: Task) -> int | None:
        """Return the lane's number if the task is ready, creating the lane if it is new."""
        if not task.ready:
            return None
        key = LaneKey(task.spec.queue, task.spec.task_type, task.needs)
        lane = self._lanes.get(key)
        if lane is None:
            id_ = self._insert_lane(key)
            lane = self._lanes[key] = self._lane_by_id[id_] = Lane(id_, 0)
        return lane.id

    def _add_ready(self, lane_id: int | None, delta: int) -> None:
        if lane_id is not None:
            self._lane_by_id[lane_id].ready += delta
            self._changed_lanes.add(lane_id)

    def _prune_keys(self, before: float, limit: int) -> None:
        """Delete up to ``limit`` old idempotency keys whose tasks are gone.

        However many belong to tasks that still live, one call passes over few of them; the next one
        goes on behind those, and after the youngest of the old ones it begins again.
        """
        looked = limit * _KEYS_LOOKED
        found = self._old_keys(self._keys_seen, before, looked)
        gone: list[tuple[str, str]] = []
        for *place, orphan in found:
            if len(gone) == limit:
                break
            self._keys_seen = (place[0], place[1], place[2])
            if orphan:
                gone.append((place[1], place[2]))
        else:
            if len(found) < looked:
                self._keys_seen = OLDEST_KEY
        self._delete_keys(gone)

    def _drop_empty_lanes(self) -> list[int]:
        """Forget lanes without a ready task: no row names them, and needs are of many kinds.

        Returns:
            Their numbers, to be deleted from the table.
        """
        empty = [(key, lane.id) for key, lane in self._lanes.items() if not lane.ready]
        for key, id_ in empty:
            del self._lanes[key], self._lane_by_id[id_]
            self._changed_lanes.discard(id_)
        return [id_ for _key, id_ in empty]

    # -- the cache --------------------------------------------------------------------------------

    def _remember(self, task: Task, indexed: Row) -> Known:
        """Keep what the open transaction sees of a task that may be asked for again soon."""
        known = Known(task, indexed)
        spec = task.spec
        keep = (
            task.finished_at is None and spec.bytes_stored + len(task.checkpoint or b"") <= _SMALL
        )
        if keep:
            self._known[task.seq] = known
            self._seq_of[spec.id] = task.seq
            if len(self._known) > KNOWN_MAX:
                _seq, oldest = self._known.popitem(last=False)
                del self._seq_of[oldest.task.spec.id]
        else:
            self._forget(task.seq)
        return known

    def _forget(self, seq: int) -> None:
        known = self._known.pop(seq, None)
        if known is not None:
            del self._seq_of[known.task.spec.id]

    def _by_seq(self, seqs: Sequence[int]) -> dict[int, Known]:
        """Return what stands at these accept sequences, in the order asked for."""
        # Taken before anything is read: what is read may push these out.
        found = {seq: self._known[seq] for seq in seqs if seq in self._known}
        unknown = [seq for seq in seqs if seq not in found]
        if unknown:
            for row in self._rows_by_seq(unknown):
                found[row[0]] = self._remember(rows.task_from_row(row), rows.indexed_of_row(row))
        return {seq: found[seq] for seq in seqs if seq in found}

    def _tasks_at(self, seqs: Iterable[Row]) -> list[Task]:
        """Return the tasks whose accept sequences are the first column of ``seqs``, in order."""
        return [known.task for known in self._by_seq([row[0] for row in seqs]).values()]

"""Which leases are in force, as committed: by task, by slot, by worker and by key."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass, field

from hcna_ray.core.models import HEAVY_SLOT, Needs, Task
from hcna_ray.core.placement import occupy
from hcna_ray.runtime.ledger import Ledger

Place = tuple[str, int]


@dataclass(slots=True)
class _Held:
    """What one slot (or one worker's agent) holds."""

    #: Task ids, oldest grant first.
    ids: dict[str, None] = field(default_factory=dict)
    #: How many of them have started.
    started: int = 0

    #: Whether its call for work waits: then all that it holds has begun.
    asks: bool = False

    def runs(self, slot: int) -> int:
        """Return how many attempts run there at once, or are about to."""
        if slot == HEAVY_SLOT:
            return len(self.ids)
        if self.asks:
            return self.started
        return self.started or min(len(self.ids), 1)


class LiveTable:
    """Every lease in force, as committed, found by task, by slot and by worker.

    What every round asks for is counted along, so that it costs the same however many there are.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.tasks: dict[str, Task] = {}
        self._places: dict[Place, _Held] = {}
        #: Slots of each worker that hold anything, and leases of each worker.
        self._slots: dict[str, set[int]] = {}
        self._counts: Tally[str] = Tally()
        self._keys: Tally[str] = Tally()
        #: Places whose call for work waits.
        self._asking: set[Place] = set()
        #: Attempts that run at once, or are about to.
        self._runs = 0
        #: Workers whose number of leases has changed since `take_moved`.
        self._moved: set[str] = set()

    def reset(self, leased: Iterable[Task]) -> None:
        """Start over from what the store says."""
        self._moved.update(self._counts)
        self.tasks.clear()
        self._places.clear()
        self._slots.clear()
        self._counts.clear()
        self._keys.clear()
        self._runs = 0
        for task in leased:
            self._put(task)

    def absorb(self, ledger: Ledger) -> None:
        """Follow a committed batch."""
        for task in ledger.changed():
            before = self.tasks.get(task.spec.id)
            if before is not None:
                self._drop(before)
            if task.lease is not None:
                self._put(task)

    def _put(self, task: Task) -> None:
        lease = task.lease
        assert lease is not None
        id_, worker, slot = task.spec.id, lease.worker, lease.slot
        self.tasks[id_] = task
        held = self._places.get((worker, slot))
        if held is None:
            held = self._places[worker, slot] = _Held(asks=(worker, slot) in self._asking)
            self._slots.setdefault(worker, set()).add(slot)
        self._runs -= held.runs(slot)
        held.ids[id_] = None
        held.started += lease.started_at is not None
        self._runs += held.runs(slot)
        self._counts[worker] += 1
        self._moved.add(worker)
        if task.spec.concurrency_key is not None:
            self._keys[task.spec.concurrency_key] += 1

    def _drop(self, task: Task) -> None:
        lease = task.lease
        assert lease is not None
        id_, worker, slot = task.spec.id, lease.worker, lease.slot
        del self.tasks[id_]
        held = self._places[worker, slot]
        self._runs -= held.runs(slot)
        del held.ids[id_]
        held.started -= lease.started_at is not None
        self._runs += held.runs(slot)
        if not held.ids:
            del self._places[worker, slot]
            self._slots[worker].discard(slot)
        self._counts[worker] -= 1
        self._moved.add(worker)
        if not self._counts[worker]:
            del self._counts[worker], self._slots[worker]
        if task.spec.concurrency_key is not None:
            self._keys[task.spec.concurrency_key] -= 1
            if not self._keys[task.spec.concurrency_key]:
                del self._keys[task.spec.concurrency_key]

    def in_slot(self, worker: str, slot: int) -> list[Task]:
        """Return the tasks leased to one slot, oldest grant first."""
        held = self._places.get((worker, slot))
        return [] if held is None else [self.tasks[task_id] for task_id in held.ids]

    def on_worker(self, worker: str) -> list[Task]:
        """Return the tasks leased to one worker."""
        slots = list(self._slots.get(worker, ()))
        return [task for slot in slots for task in self.in_slot(worker, slot)]

    def count(self, worker: str) -> int:
        """Return how many leases a worker holds."""
        return self._counts[worker]

    def take_moved(self) -> set[str]:
        """Return the workers whose number of leases has changed since the last time."""
        moved, self._moved = self._moved, set()
        return moved

    def asks(self, place: Place) -> None:
        """A slot or agent asks for work, and waits."""
        self._asking.add(place)
        self._set_asks(place, asks=True)

    def asks_no_more(self, place: Place) -> None:
        """Its call was answered."""
        self._asking.discard(place)
        self._set_asks(place, asks=False)

    def _set_asks(self, place: Place, *, asks: bool) -> None:
        held = self._places.get(place)
        if held is not None:
            self._runs -= held.runs(place[1])
            held.asks = asks
            self._runs += held.runs(place[1])

    def starts(self, ledger: Ledger | None = None) -> int:
        """Return how many attempts run at once, or are about to.

        That is every attempt that has started, every heavy one, and one for each slot that has a
        grant of which nothing has started yet. Whoever asks for work has begun all that it holds.

        Args:
            ledger: What has happened since the last commit.
        """
        running = self._runs
        for place in () if ledger is None else self._touched(ledger):
            held = self._places.get(place)
            if held is not None and ledger is not None:
                running += self._as_in(ledger, held).runs(place[1]) - held.runs(place[1])
        return running

    def _touched(self, ledger: Ledger) -> set[Place]:
        """Return the places whose leases a batch has changed so far."""
        befores = (self.tasks.get(task_id) for task_id in ledger.before)
        leases = [task.lease for task in befores if task is not None]
        return {(lease.worker, lease.slot) for lease in leases if lease is not None}

    def _as_in(self, ledger: Ledger, held: _Held) -> _Held:
        """Return what is left of a place's leases in a batch."""
        now = _Held(asks=held.asks)
        for task_id in held.ids:
            task = ledger.get(task_id)
            if task is not None and task.lease is not None:
                now.ids[task_id] = None
                now.started += task.lease.started_at is not None
        return now

    def live_of_key(self, key: str) -> int:
        """Return how many leases a concurrency key has."""
        return self._keys[key]

    def used(self, worker: str, ledger: Ledger | None = None) -> Needs:
        """Return what the heavy attempts on a worker hold, less what a batch has ended."""
        used = Needs()
        for task in self.in_slot(worker, HEAVY_SLOT):
            now = None if ledger is None else ledger.get(task.id)
            if now is None or now.lease is not None:
                used = occupy(used, task.needs)
        return used

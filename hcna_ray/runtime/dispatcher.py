"""Which leases are out, which lanes have work, and handing the one to the other.

The decisions are `hcna_ray.core.placement`'s; this module feeds it with a snapshot and turns its
assignments into leases. Memory here follows commits (`absorb`) and can be rebuilt at any moment.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from hcna_ray.core.events import KeyHeld, KeyReleased, LeaseGranted, TimePassed
from hcna_ray.core.models import (
    ACCEPTING,
    HEAVY_SLOT,
    Hold,
    LaneKey,
    Lease,
    Needs,
    Task,
    Token,
    WorkerView,
)
from hcna_ray.core.placement import Assignment, Opening, assign, exclusion, occupy
from hcna_ray.runtime.ledger import Lanes, Ledger
from hcna_ray.runtime.messages import Offer
from hcna_ray.runtime.policy import Policy
from hcna_ray.store.base import TaskStore

Place = tuple[str, int]

#: Heavy attempts handed to one agent in one answer.
HEAVY_GRANT_MAX = 16
#: Weight of the newest observation in the moving average of a type's running time.
ESTIMATE_WEIGHT = 0.2
#: Shorter than this nothing is taken for.
DURATION_MS_MIN = 0.001
#: Concurrency keys looked at by one sweep.
SWEEP_KEYS_MAX = 1000


@dataclass(slots=True)
class _Held:
    """What one slot (or one worker's agent) holds."""

    #: Task ids, oldest grant first.
    ids: dict[str, None] = field(default_factory=dict)
    #: How many of them have started.
    started: int = 0

    def runs(self, slot: int) -> int:
        """Return how many attempts run there at once, or are about to."""
        if slot == HEAVY_SLOT:
            return len(self.ids)
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
        #: Attempts that run at once if no slot is idle.
        self._runs = 0

    def reset(self, leased: Iterable[Task]) -> None:
        """Start over from what the store says."""
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
            held = self._places[worker, slot] = _Held()
            self._slots.setdefault(worker, set()).add(slot)
        self._runs -= held.runs(slot)
        held.ids[id_] = None
        held.started += lease.started_at is not None
        self._runs += held.runs(slot)
        self._counts[worker] += 1
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

    def starts(self, idle: Collection[Place] = (), ledger: Ledger | None = None) -> int:
        """Return how many attempts run at once, or are about to.

        That is every attempt that has started, every heavy one, and one for each slot that has a
        grant of which nothing has started yet.

        Args:
            idle: Slots that ask for work just now: all they hold has started.
            ledger: What has happened since the last commit.
        """
        if ledger is None and not idle:
            return self._runs
        touched = set() if ledger is None else self._touched(ledger)
        running = self._runs
        for place in touched.union(idle):
            held = self._places.get(place)
            if held is None:
                continue
            running -= held.runs(place[1])
            if place in touched:
                assert ledger is not None
                held = self._as_in(ledger, held)
            # Whoever asks for work has begun all that it holds.
            waits = place in idle and place[1] != HEAVY_SLOT
            running += held.started if waits else held.runs(place[1])
        return running

    def _touched(self, ledger: Ledger) -> set[Place]:
        """Return the places whose leases a batch has changed so far."""
        befores = (self.tasks.get(task_id) for task_id in ledger.before)
        leases = [task.lease for task in befores if task is not None]
        return {(lease.worker, lease.slot) for lease in leases if lease is not None}

    def _as_in(self, ledger: Ledger, held: _Held) -> _Held:
        """Return what is left of a place's leases in a batch."""
        now = _Held()
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


class Dispatcher:
    """Turns ready tasks and idle slots into leases."""

    def __init__(self, store: TaskStore, policy: Policy, live: LiveTable) -> None:
        """Start empty; `reset` reads the store."""
        self._store, self._policy, self._live = store, policy, live
        self._ready: Tally[LaneKey] = Tally()
        self._estimates: dict[str, float] = {}
        #: The concurrency key at which the next sweep goes on.
        self._swept = ""
        #: Whether the last `dispatch` left something that another one would place.
        self.unfinished = False

    def reset(self) -> None:
        """Read from the store how many tasks wait in each lane."""
        self._ready = Tally(self._store.ready_lanes())

    @property
    def waiting(self) -> bool:
        """Whether any task is ready, as committed."""
        return bool(self._ready)

    def absorb(self, ledger: Ledger) -> None:
        """Follow a committed batch."""
        for lane, change in ledger.lane_changes().items():
            self._ready[lane] += change
            if not self._ready[lane]:
                del self._ready[lane]

    def any_ready(self, ledger: Ledger) -> bool:
        """Return whether any task may be ready, as a batch has it."""
        return bool(self._ready) or any(task.ready for task in ledger.changed())

    def observe(self, task_type: str, duration_ms: float) -> None:
        """Learn how long a type takes: a moving geometric mean.

        One that stood still in the middle, on a machine with other things to do, must not have the
        next hundred quick ones handed out singly. One that really is long gives back what waits
        behind it.
        """
        took = max(duration_ms, DURATION_MS_MIN)
        known = self._estimates.get(task_type, took)
        self._estimates[task_type] = known * (took / known) ** ESTIMATE_WEIGHT

    def offer(self, task: Task, now: float) -> Offer:
        """Return what the runner of a leased task needs to know, as it is at an instant."""
        lease, spec = task.lease, task.spec
        assert lease is not None
        amounts: tuple[tuple[str, float], ...] = ()
        if lease.slot == HEAVY_SLOT:
            needs = spec.needs
            amounts = (
                ("cpu", needs.cpu),
                ("mem_gb", needs.mem_gb),
                ("gpu", needs.gpu),
                *needs.resources,
            )
        return Offer(
            spec.id,
            spec.task_type,
            lease.token,
            spec.payload,
            spec.timeout_s,
            None if spec.expires_at is None else max(0.0, spec.expires_at - now),
            task.checkpoint,
            spec.traceparent,
            amounts,
        )

    # -- one round -------------------------------------------------------------------------------

    def dispatch(
        self,
        ledger: Ledger,
        views: Mapping[str, WorkerView],
        seqs: Mapping[Place, int],
        incarnations: Mapping[Place, str],
        paused: frozenset[str],
        generation: int,
        now: float,
    ) -> dict[Place, tuple[Offer, ...]]:
        """Lease ready tasks to parked slots and agents.

        Args:
            ledger: The batch; leases become part of it.
            views: Snapshot of the workers.
            seqs: Exchange number of each parked call.
            incarnations: Incarnation of each parked call.
            paused: Queues that hand out nothing.
            generation: First half of the fencing tokens.
            now: The instant.

        Returns:
            Offers by place. They may leave only after the ledger's commit.
        """
        self.unfinished = False
        openings = self._openings(views, seqs)
        room = self._policy.max_concurrent_tasks - self._live.starts(idle=seqs, ledger=ledger)
        if not openings or room <= 0:
            return {}
        lanes = self._heads(ledger, views, openings, paused)
        lanes = self._hold_busy_keys(ledger, lanes, now)
        assignments = assign(views, lanes, openings, estimates_ms=self._estimates, starts_max=room)
        return self._grant(ledger, assignments, seqs, incarnations, generation, now)

    def _openings(
        self, views: Mapping[str, WorkerView], seqs: Mapping[Place, int]
    ) -> list[Opening]:
        openings = []
        for worker, slot in sorted(seqs):
            view = views.get(worker)
            if view is None or view.state not in ACCEPTING:
                continue
            heavy = slot == HEAVY_SLOT
            openings.append(
                Opening(
                    worker=worker,
                    slot=slot,
                    items_max=HEAVY_GRANT_MAX if heavy else self._policy.grant_max,
                    budget_ms=self._policy.grant_target_ms,
                )
            )
        return openings

    def _heads(
        self,
        ledger: Ledger,
        views: Mapping[str, WorkerView],
        openings: list[Opening],
        paused: frozenset[str],
    ) -> dict[LaneKey, list[Task]]:
        """Return the first ready tasks of every lane that some opening could take."""
        fresh: dict[LaneKey, list[Task]] = {}
        touched = 0
        lanes = Lanes()
        for task in ledger.changed():
            before = ledger.before[task.spec.id]
            touched += before is not None and before.ready
            if task.ready:
                fresh.setdefault(lanes.of(task), []).append(task)
        heads: dict[LaneKey, list[Task]] = {}
        for lane in {**dict.fromkeys(self._ready), **dict.fromkeys(fresh)}:
            if lane.queue in paused:
                continue
            limit = self._wanted(lane, views, openings)
            if not limit:
                continue
            rows = list(fresh.get(lane, ()))
            if self._ready[lane]:
                # Some of the stored heads may have changed in this batch: read that many more.
                stored = self._store.heads(lane, limit + touched)
                rows += [task for task in stored if not ledger.is_changed(task.id)]
                rows.sort(key=lambda task: (task.dispatch_key, task.seq))
            elif len(rows) > 1:
                rows.sort(key=lambda task: (task.dispatch_key, task.seq))
            ledger.adopt(rows[:limit])
            heads[lane] = rows[:limit]
        return heads

    def _wanted(
        self, lane: LaneKey, views: Mapping[str, WorkerView], openings: list[Opening]
    ) -> int:
        """Return how many tasks of a lane the openings could take together at most."""
        heavy = lane.needs.heavy
        fitting = Tally(one.worker for one in openings if (one.slot == HEAVY_SLOT) == heavy)
        count = sum(
            number
            for worker, number in fitting.items()
            if exclusion(lane.needs, lane.task_type, views[worker]) is None
        )
        if heavy:
            return count * HEAVY_GRANT_MAX
        expected = self._estimates.get(lane.task_type)
        if expected is None:
            return count
        fits = int(self._policy.grant_target_ms / max(expected, 0.01)) + 1
        return count * min(fits, self._policy.grant_max)

    def _hold_busy_keys(
        self, ledger: Ledger, lanes: dict[LaneKey, list[Task]], now: float
    ) -> dict[LaneKey, list[Task]]:
        """Take tasks out of the index whose concurrency key is full or whose time has passed."""
        seen: Tally[str] = Tally()
        dropped: set[str] = set()
        keyed = [
            task
            for rows in lanes.values()
            for task in rows
            if task.spec.concurrency_key is not None or task.spec.expires_at is not None
        ]
        if not keyed:
            return lanes
        for task in sorted(keyed, key=lambda one: (one.dispatch_key, one.seq)):
            if task.spec.expires_at is not None and task.spec.expires_at <= now:
                ledger.step(task, TimePassed(at=now))
                dropped.add(task.id)
                continue
            key = task.spec.concurrency_key
            if key is None:
                continue
            if self._live_of_key(ledger, key) + seen[key] >= self._limit(key):
                ledger.step(task, KeyHeld(at=now, hold=Hold.CONCURRENCY))
                dropped.add(task.id)
            else:
                seen[key] += 1
        if not dropped:
            return lanes
        self.unfinished = True
        return {
            lane: [task for task in rows if task.id not in dropped] for lane, rows in lanes.items()
        }

    def _grant(
        self,
        ledger: Ledger,
        assignments: list[Assignment],
        seqs: Mapping[Place, int],
        incarnations: Mapping[Place, str],
        generation: int,
        now: float,
    ) -> dict[Place, tuple[Offer, ...]]:
        granted: dict[Place, list[Offer]] = {}
        for task, opening in ((one.task, one.opening) for one in assignments):
            place = (opening.worker, opening.slot)
            lease = Lease(
                Token(generation, task.attempt + 1),
                opening.worker,
                incarnations[place],
                opening.slot,
                seqs[place],
                now,
            )
            step = ledger.step(task, LeaseGranted(at=now, lease=lease))
            granted.setdefault(place, []).append(self.offer(step.task, now))
        return {place: tuple(offers) for place, offers in granted.items()}

    # -- concurrency keys ------------------------------------------------------------------------

    def _limit(self, key: str) -> int:
        return self._policy.concurrency_limits.get(key, self._policy.concurrency_default)

    def _live_of_key(self, ledger: Ledger, key: str) -> int:
        return self._live.live_of_key(key) + ledger.lease_delta[key]

    def release_concurrency(self, ledger: Ledger, key: str, now: float) -> None:
        """Let as many held tasks of a key back into the index as it has free places."""
        free = self._limit(key) - self._live_of_key(ledger, key)
        if free <= 0:
            return
        for found in self._store.held_by_concurrency(key, free + 16):
            task = ledger.get(found.id)
            if free and task is not None and task.hold & Hold.CONCURRENCY:
                ledger.step(task, KeyReleased(at=now, hold=Hold.CONCURRENCY))
                free -= 1

    def sweep(self, ledger: Ledger, now: float) -> None:
        """Let go what a release may have missed, e.g. behind a task that fits on no worker.

        Of very many keys each sweep looks at some, and the next one at those that follow.
        """
        keys = self._store.concurrency_keys_held(SWEEP_KEYS_MAX, after=self._swept)
        self._swept = keys[-1] if len(keys) == SWEEP_KEYS_MAX else ""
        for key in keys:
            self.release_concurrency(ledger, key, now)

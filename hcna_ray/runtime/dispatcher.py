"""Which lanes have work, and handing it to the calls that are parked.

A batch looks at as many parked calls as it has ready tasks, and at no worker that cannot be chosen:
what a lone task costs does not grow with the cluster. The decisions are
`hcna_ray.core.placement`'s; this module feeds it with a snapshot and turns its assignments into
leases. Memory here follows commits (`absorb`) and can be rebuilt at any moment.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from hcna_ray.core.events import KeyHeld, KeyReleased, LeaseGranted, TimePassed
from hcna_ray.core.models import (
    HEAVY_SLOT,
    Hold,
    LaneKey,
    Lease,
    Task,
    Token,
    WorkerView,
)
from hcna_ray.core.placement import Assignment, Opening, absence, assign, has_room, shortcoming
from hcna_ray.runtime.ledger import Lanes, Ledger
from hcna_ray.runtime.live import LiveTable, Place
from hcna_ray.runtime.messages import Offer
from hcna_ray.runtime.parking import Parking, exchange_of
from hcna_ray.runtime.policy import Policy
from hcna_ray.store.base import TaskStore

#: Heavy attempts handed to one agent in one answer.
HEAVY_GRANT_MAX = 16
#: Weight of the newest observation in the moving average of a type's running time.
ESTIMATE_WEIGHT = 0.2
#: Shorter than this nothing is taken for.
DURATION_MS_MIN = 0.001
#: Concurrency keys looked at by one sweep.
SWEEP_KEYS_MAX = 1000
#: Lanes of which it is remembered who could run their tasks.
LANES_KEPT_MAX = 4096


class Roster(Protocol):
    """The workers as one round sees them."""

    @property
    def version(self) -> int:
        """Another number whenever a worker has come, gone, or is something else than it was."""

    def names(self) -> Iterable[str]:
        """Return the names of all."""

    def view(self, name: str) -> WorkerView | None:
        """Return one of them."""


@dataclass(frozen=True, slots=True)
class _Demand:
    """One lane's ready tasks for which some parked call has room."""

    #: Those that the batch has made ready.
    fresh: list[Task]
    #: The workers that could run them by what they are.
    able: Set[str]
    #: The best of those that are idle, no more than there are tasks.
    workers: Sequence[str]
    ready: int
    #: How many could be handed out at most.
    count: int


class Dispatcher:
    """Turns ready tasks and idle slots into leases."""

    def __init__(self, store: TaskStore, policy: Policy, live: LiveTable) -> None:
        """Start empty; `reset` reads the store."""
        self._store, self._policy, self._live = store, policy, live
        self._ready: Tally[LaneKey] = Tally()
        self._estimates: dict[str, float] = {}
        #: Who could run a lane's tasks, and of which version of the roster that is true.
        self._able: dict[LaneKey, Set[str]] = {}
        self._able_version = -1
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
        roster: Roster,
        parking: Parking,
        paused: frozenset[str],
        generation: int,
        now: float,
    ) -> dict[Place, tuple[Offer, ...]]:
        """Lease ready tasks to parked slots and agents.

        Args:
            ledger: The batch; leases become part of it.
            roster: The workers.
            parking: The parked calls.
            paused: Queues that hand out nothing.
            generation: First half of the fencing tokens.
            now: The instant.

        Returns:
            Offers by place. They may leave only after the ledger's commit.
        """
        self.unfinished = False
        room = self._policy.max_concurrent_tasks - self._live.starts(ledger)
        if not parking or room <= 0:
            return {}
        fresh, touched = _ready_in(ledger)
        demands = self._demands(fresh, roster, parking, paused)
        openings = self._openings(demands, roster, parking)
        if not openings:
            return {}
        lanes = self._heads(ledger, demands, openings, touched)
        lanes = self._hold_busy_keys(ledger, lanes, now)
        views = {one.worker: roster.view(one.worker) for one in openings}
        assignments = assign(
            {name: view for name, view in views.items() if view is not None},
            lanes,
            openings,
            estimates_ms=self._estimates,
            starts_max=room,
        )
        return self._grant(ledger, assignments, parking, generation, now)

    def _able_for(self, lane: LaneKey, roster: Roster) -> Set[str]:
        """Return the workers that could run a lane's tasks, were they there and idle."""
        if self._able_version != roster.version or len(self._able) >= LANES_KEPT_MAX:
            self._able.clear()
            self._able_version = roster.version
        able = self._able.get(lane)
        if able is None:
            views = [view for name in roster.names() if (view := roster.view(name)) is not None]
            able = self._able[lane] = {
                view.name for view in views if shortcoming(lane.needs, lane.task_type, view) is None
            }
        return able

    def _demands(
        self,
        fresh: Mapping[LaneKey, list[Task]],
        roster: Roster,
        parking: Parking,
        paused: frozenset[str],
    ) -> dict[LaneKey, _Demand]:
        """Return what the parked calls could take of each lane, were it alone."""
        demands: dict[LaneKey, _Demand] = {}
        for lane in {**dict.fromkeys(self._ready), **dict.fromkeys(fresh)}:
            if lane.queue in paused:
                continue
            rows = fresh.get(lane, [])
            ready = self._ready[lane] + len(rows)
            able = self._able_for(lane, roster)
            workers = parking.best(_fits(lane, able, roster), ready, heavy=lane.needs.heavy)
            if workers:
                places = _places(parking, workers, lane, ready)
                takes = self._items_max(lane) * len(places)
                demands[lane] = _Demand(rows, able, workers, ready, min(ready, takes))
        return demands

    def _openings(
        self, demands: Mapping[LaneKey, _Demand], roster: Roster, parking: Parking
    ) -> list[Opening]:
        """Return the places that may be chosen for what is demanded.

        Each task makes one worker less welcome to all that follow. So of the workers that fit a
        lane the first so many hold the best one until the last task is placed; nobody else can be
        preferred to them.
        """
        count = sum(demand.count for demand in demands.values())
        places: set[Place] = set()
        for lane, demand in demands.items():
            workers = demand.workers
            if count > demand.ready and len(workers) >= demand.ready:  # There may be more.
                fits = _fits(lane, demand.able, roster)
                workers = parking.best(fits, count, heavy=lane.needs.heavy)
            places.update(_places(parking, workers, lane, count))
        return [
            Opening(
                worker=worker,
                slot=slot,
                items_max=HEAVY_GRANT_MAX if slot == HEAVY_SLOT else self._policy.grant_max,
                budget_ms=self._policy.grant_target_ms,
            )
            for worker, slot in sorted(places)
        ]

    def _heads(
        self,
        ledger: Ledger,
        demands: Mapping[LaneKey, _Demand],
        openings: list[Opening],
        touched: int,
    ) -> dict[LaneKey, list[Task]]:
        """Return the first ready tasks of every lane, as many as the openings could take."""
        heads: dict[LaneKey, list[Task]] = {}
        for lane, demand in demands.items():
            limit = self._items_max(lane) * sum(
                (one.slot == HEAVY_SLOT) == lane.needs.heavy and one.worker in demand.able
                for one in openings
            )
            rows = list(demand.fresh)
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

    def _items_max(self, lane: LaneKey) -> int:
        """Return how many tasks of a lane one opening takes at most."""
        if lane.needs.heavy:
            return HEAVY_GRANT_MAX
        expected = self._estimates.get(lane.task_type)
        if expected is None:
            return 1
        fits = int(self._policy.grant_target_ms / max(expected, 0.01)) + 1
        return min(fits, self._policy.grant_max)

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
        parking: Parking,
        generation: int,
        now: float,
    ) -> dict[Place, tuple[Offer, ...]]:
        granted: dict[Place, list[Offer]] = {}
        for task, opening in ((one.task, one.opening) for one in assignments):
            place = (opening.worker, opening.slot)
            call = exchange_of(parking[place])
            lease = Lease(
                Token(generation, task.attempt + 1),
                opening.worker,
                call.incarnation,
                opening.slot,
                call.seq,
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


def _ready_in(ledger: Ledger) -> tuple[dict[LaneKey, list[Task]], int]:
    """Return what a batch has made ready, by lane, and of how many ready ones it has changed."""
    fresh: dict[LaneKey, list[Task]] = {}
    touched = 0
    lanes = Lanes()
    for task in ledger.changed():
        before = ledger.before[task.spec.id]
        touched += before is not None and before.ready
        if task.ready:
            fresh.setdefault(lanes.of(task), []).append(task)
    return fresh, touched


def _fits(lane: LaneKey, able: Set[str], roster: Roster) -> Callable[[str], bool]:
    """Return the question whether a worker can take a task of a lane now."""

    def fits(name: str) -> bool:
        view = roster.view(name) if name in able else None
        if view is None or absence(view) is not None:
            return False
        return not lane.needs.heavy or has_room(lane.needs, view)

    return fits


def _places(parking: Parking, workers: Iterable[str], lane: LaneKey, count: int) -> list[Place]:
    """Return where these workers would take so many tasks of a lane."""
    heavy = lane.needs.heavy
    return [place for name in workers for place in parking.places(name, count, heavy=heavy)]

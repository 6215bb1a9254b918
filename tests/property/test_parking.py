"""A batch looks at few parked calls, and decides as if it had looked at all of them."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from hcna_ray.core.events import AttemptStarted, LeaseGranted
from hcna_ray.core.machine import accept
from hcna_ray.core.models import (
    ACCEPTING,
    HEAVY_SLOT,
    LaneKey,
    Lease,
    Needs,
    Task,
    Token,
    WorkerState,
    WorkerView,
)
from hcna_ray.core.placement import Opening, assign
from hcna_ray.runtime.dispatcher import HEAVY_GRANT_MAX, Dispatcher
from hcna_ray.runtime.ledger import Ledger, lane_of
from hcna_ray.runtime.live import LiveTable, Place
from hcna_ray.runtime.messages import Exchange
from hcna_ray.runtime.parking import Parking
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import T0, a_spec

TYPES = ("echo", "sleep")
GENERATION = 7


class Said(NamedTuple):
    """Everything that one round decided."""

    tasks: list[str]
    places: list[Place]


class Hall:
    """Up to nine workers that hold something, calls of theirs, and tasks of a few kinds."""

    version = 1

    def __init__(self, dice: Random) -> None:
        self.dice = dice
        self.policy = Policy(
            max_concurrent_tasks=dice.choice((3, 8, 1000, 1000)),
            grant_max=dice.choice((1, 3, 8)),
            grant_target_ms=10.0,
        )
        self.store, self.live = MemoryTaskStore(), LiveTable()
        self.dispatcher = Dispatcher(self.store, self.policy, self.live)
        self.workers = {f"W{n}": self._worker(f"W{n}") for n in range(dice.randrange(1, 10))}
        for task_type in TYPES:
            if dice.random() < 0.7:
                self.dispatcher.observe(task_type, dice.choice((0.5, 4.0, 50.0)))
        self.seq = 0
        self.parking = Parking(self.live, lambda name: self.workers[name].cpu)
        # Leases come and go while calls are parked: the order has to follow.
        self._park()
        self._hold_some()
        self._park()
        ledger = self.ledger()
        self._submit(ledger, dice.randrange(8))
        self._commit(ledger)

    def _worker(self, name: str) -> WorkerView:
        dice = self.dice
        return WorkerView(
            name=name,
            node_id=f"HCNA-{name}",
            state=dice.choice((WorkerState.ONLINE,) * 6 + tuple(WorkerState)),
            cpu=dice.choice((1.0, 4.0, 4.0, 16.0)),
            mem_gb=4.0,
            gpu=0.0,
            resources=(),
            labels=dice.choice(((), (), (("zone", "attic"),))),
            task_types=frozenset(TYPES if dice.random() < 0.8 else TYPES[:1]),
            used=Needs(),
            live=0,
            trouble=dice.choice(("", "", "", "has no disk")),
        )

    def _needs(self) -> Needs:
        dice = self.dice
        return Needs(
            worker=dice.choice((None,) * 5 + ("W0", "W3", "W99")),
            labels=dice.choice(((),) * 4 + ((("zone", "attic"),),)),
            cpu=dice.choice((0.0, 0.0, 0.0, 1.0, 4.0, 16.0)),
        )

    def ledger(self) -> Ledger:
        return Ledger(self.store, self.live.tasks, {})

    def _commit(self, ledger: Ledger) -> None:
        with self.store.transaction():
            ledger.flush()
        self.live.absorb(ledger)
        self.dispatcher.absorb(ledger)

    def _submit(self, ledger: Ledger, count: int) -> list[Task]:
        kinds = [(self.dice.choice(TYPES), self._needs()) for _ in range(self.dice.randrange(1, 4))]
        tasks = []
        for _ in range(count):
            self.seq += 1
            task_type, needs = self.dice.choice(kinds)
            spec = a_spec(
                f"t{self.seq}",
                task_type=task_type,
                needs=needs,
                priority=self.dice.randrange(3),
            )
            step = accept(spec, seq=self.seq, at=T0)
            ledger.add(step)
            tasks.append(step.task)
        return tasks

    def _hold_some(self) -> None:
        ledger = self.ledger()
        for number, task in enumerate(self._submit(ledger, self.dice.randrange(12))):
            slot = HEAVY_SLOT if task.needs.heavy else self.dice.randrange(4)
            worker = self.dice.choice(list(self.workers))
            token = Token(GENERATION, task.attempt + 1)
            lease = Lease(token, worker, "a", slot, number, T0)
            held = ledger.step(task, LeaseGranted(at=T0, lease=lease)).task
            if self.dice.random() < 0.7:
                ledger.step(held, AttemptStarted(at=T0, token=token))
        self._commit(ledger)

    def _park(self) -> None:
        for worker in self.workers:
            for slot in range(HEAVY_SLOT, 4):
                place = (worker, slot)
                what = self.dice.choice(("as it was", "gone", "there"))
                if what != "as it was":
                    self.parking.pop(place)
                if what == "there":
                    call = Exchange(worker=worker, incarnation="a", slot=slot, seq=1)
                    self.parking.put(place, Pending(call, lambda _: None))

    # -- the roster ------------------------------------------------------------------------------

    def names(self) -> list[str]:
        return list(self.workers)

    def view(self, name: str) -> WorkerView:
        worker = self.workers[name]
        changes = {"live": self.live.count(name), "used": self.live.used(name)}
        return WorkerView(**{name: getattr(worker, name) for name in worker.__slots__} | changes)

    # -- one round, and what it should be --------------------------------------------------------

    def expected(self, tasks: list[Task]) -> Said:
        """Return what `assign` says of every ready task and every call."""
        views = {name: self.view(name) for name in self.workers}
        lanes: dict[LaneKey, list[Task]] = {}
        for task in sorted(tasks, key=lambda one: (one.dispatch_key, one.seq)):
            lanes.setdefault(lane_of(task), []).append(task)
        openings = [
            Opening(
                worker=worker,
                slot=slot,
                items_max=HEAVY_GRANT_MAX if slot == HEAVY_SLOT else self.policy.grant_max,
                budget_ms=self.policy.grant_target_ms,
            )
            for worker, slot in sorted(self.parking)
            if views[worker].state in ACCEPTING
        ]
        chosen = assign(
            views,
            lanes,
            openings,
            estimates_ms=self.dispatcher._estimates,
            starts_max=self.policy.max_concurrent_tasks - self.live.starts(),
        )
        return Said(
            [one.task.id for one in chosen],
            [(one.opening.worker, one.opening.slot) for one in chosen],
        )


@settings(derandomize=True, database=None, deadline=None, max_examples=1000)
@given(seed=st.integers(0, 2**32 - 1))
def test_few_calls_are_looked_at_and_the_decisions_are_those_of_all(seed: int) -> None:
    hall = Hall(Random(seed))
    ledger = hall.ledger()
    fresh = hall._submit(ledger, hall.dice.choice((1, 1, 2, 5)))
    # What waited already counts as much as what this batch has accepted.
    waiting = [
        task
        for lane, count in hall.store.ready_lanes().items()
        for task in hall.store.heads(lane, count)
    ]
    expected = hall.expected(waiting + fresh)

    granted = hall.dispatcher.dispatch(ledger, hall, hall.parking, frozenset(), GENERATION, T0)

    placed = {offer.task_id: place for place, offers in granted.items() for offer in offers}
    assert placed == dict(zip(expected.tasks, expected.places, strict=True))


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_kept_count_of_running_attempts_is_that_of_a_new_table(seed: int) -> None:
    hall = Hall(Random(seed))
    again = LiveTable()
    for place in hall.parking:
        again.asks(place)
    again.reset(hall.live.tasks.values())

    assert again.starts() == hall.live.starts()

"""Parked calls: the least loaded worker first, and no batch that looks at all of them."""

from __future__ import annotations

import sys
from types import FrameType

import pytest

from benchmarks.crowd import CpuClock, Crowd, plain_specs
from hcna_ray.core.models import HEAVY_SLOT
from hcna_ray.runtime.live import LiveTable
from hcna_ray.runtime.messages import Exchange
from hcna_ray.runtime.moderator import Moderator
from hcna_ray.runtime.parking import Parking
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending
from hcna_ray.store.memory import MemoryTaskStore

CORES = {"W1": 2.0, "W2": 8.0, "W3": 8.0}


def a_call(worker: str, slot: int) -> Pending:
    return Pending(Exchange(worker=worker, incarnation="a", slot=slot, seq=1), lambda _: None)


@pytest.fixture
def parking() -> Parking:
    parking = Parking(LiveTable(), CORES.__getitem__)
    for place in (("W1", 0), ("W3", 1), ("W3", 0), ("W2", 1), ("W1", HEAVY_SLOT)):
        parking.put(place, a_call(*place))
    return parking


def anybody(_: str) -> bool:
    return True


def test_the_stronger_of_idle_workers_comes_first_and_the_lower_slot(parking: Parking) -> None:
    assert parking.best(anybody, 9, heavy=False) == ["W3", "W2", "W1"]
    assert parking.best(anybody, 2, heavy=False) == ["W3", "W2"]
    assert parking.best(lambda name: name != "W3", 1, heavy=False) == ["W2"]
    assert parking.places("W3", 9, heavy=False) == [("W3", 0), ("W3", 1)]
    assert parking.places("W3", 1, heavy=False) == [("W3", 0)]


def test_agents_are_asked_about_heavy_attempts_alone(parking: Parking) -> None:
    assert parking.best(anybody, 9, heavy=True) == ["W1"]
    assert parking.places("W1", 5, heavy=True) == [("W1", HEAVY_SLOT)]


def test_a_call_that_waits_no_more_is_found_nowhere(parking: Parking) -> None:
    assert parking.of("W1") == [("W1", HEAVY_SLOT), ("W1", 0)]
    for place in parking.of("W1"):
        assert parking.pop(place) is not None
        assert parking.pop(place) is None
    assert parking.of("W1") == []
    assert parking.best(anybody, 9, heavy=False) == ["W3", "W2"]
    assert parking.best(anybody, 9, heavy=True) == []
    assert len(parking) == 3


def a_crowd(workers: int) -> Crowd:
    clock = CpuClock()
    moderator = Moderator(
        MemoryTaskStore(),
        Policy(disk_free_bytes_min=0),
        clock=clock,
        jitter=lambda: 0.0,
        free_bytes=lambda: 1 << 40,
    )
    crowd = Crowd(moderator, clock, workers=workers, slots_each=2)
    crowd.join()
    return crowd


def calls_of(crowd: Crowd) -> int:
    """Return how many functions are called for one task, from its submission to its end."""
    number, calls = crowd.completed, 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    specs = list(plain_specs(number, 1, now=crowd.clock.now()))
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        crowd.submit_each(specs)
        while crowd.talking:
            crowd.talk(1)
    finally:
        sys.setprofile(before)
    assert crowd.completed == number + 1
    return calls


def test_a_lone_task_costs_the_same_however_many_slots_are_idle() -> None:
    few, many = a_crowd(3), a_crowd(300)
    for crowd in (few, many):
        for _ in range(8):  # The first ones teach what the type takes.
            calls_of(crowd)

    assert min(calls_of(many) for _ in range(3)) < 1.1 * min(calls_of(few) for _ in range(3))

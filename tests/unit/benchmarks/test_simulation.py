"""The simulation of many workers: small, so that it takes seconds; the same each time."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.costs import fitted
from benchmarks.simulation import Costs, Simulation, World, table, tell

SMALL = World(workers=12, slots_each=2, replicas=2, rate=150.0, seconds=2.0)


def test_everything_that_was_posted_is_done_once() -> None:
    seen = Simulation(SMALL, Costs()).run()
    assert seen.submitted > 200
    assert seen.completed == seen.submitted == len(seen.accepted) == len(seen.waited)
    assert seen.granted_twice == 0
    assert seen.lost_sessions == 0


def test_the_same_seed_gives_the_same_run() -> None:
    one, other = (Simulation(SMALL, Costs()).run() for _ in range(2))
    assert one == other
    assert Simulation(dataclasses.replace(SMALL, seed=2), Costs()).run() != one


def test_slots_never_do_more_than_one_thing_at_a_time() -> None:
    """Work takes its virtual time: with too few slots tasks wait, and none is lost."""
    world = dataclasses.replace(SMALL, workers=1, slots_each=1, kinds=(("echo", 1.0, 0.02),))
    seen = Simulation(world, Costs()).run()
    assert seen.working <= seen.ended_at
    told = tell(world, seen)
    assert told.breaks
    assert told.narrowest == "slots"
    assert told.backlog > world.rate  # It can do fifty a second.


@pytest.mark.parametrize(
    ("changes", "narrowest"),
    [
        ({"call": 20e-3}, "moderator's core"),
        ({"fsync": 2.0}, "writer"),
        ({"post": 20e-3}, "C1"),
    ],
)
def test_what_is_too_slow_is_named(changes: dict[str, float], narrowest: str) -> None:
    told = tell(SMALL, Simulation(SMALL, dataclasses.replace(Costs(), **changes)).run())
    assert told.narrowest == narrowest
    assert told.breaks
    assert f"breaks: {narrowest}" in table([told])


def test_what_is_fast_enough_does_not_break() -> None:
    told = tell(SMALL, Simulation(SMALL, Costs()).run())
    assert not told.breaks
    assert told.backlog < 50
    assert told.completed_per_s == pytest.approx(SMALL.rate, rel=0.2)
    assert "narrowest: " in table([told])


def test_costs_are_found_again() -> None:
    rows = [
        ((1.0, float(a), float(b)), 3.0 + 2.0 * a + 0.5 * b) for a in range(4) for b in range(3)
    ]
    assert fitted(rows) == pytest.approx([3.0, 2.0, 0.5])


def test_no_cost_is_below_zero() -> None:
    rows = [((1.0, float(a)), 3.0 - 0.1 * a) for a in range(5)]
    assert all(cost >= 0.0 for cost in fitted(rows))

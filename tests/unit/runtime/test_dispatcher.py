"""Leases handed out: what fits, in order, within every bound; memory that follows commits."""

from __future__ import annotations

from typing import Any

import pytest

from hcna_ray.core.events import AttemptStarted, CancelRequested, LeaseReturned
from hcna_ray.core.machine import accept
from hcna_ray.core.models import (
    HEAVY_SLOT,
    Hold,
    Needs,
    Task,
    TaskState,
    Token,
    WorkerState,
    WorkerView,
)
from hcna_ray.runtime.dispatcher import Dispatcher
from hcna_ray.runtime.ledger import Ledger
from hcna_ray.runtime.live import LiveTable, Place
from hcna_ray.runtime.messages import Exchange
from hcna_ray.runtime.parking import Parking
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import T0, a_spec


class Floor:
    """A store, a dispatcher, and calls parked at it."""

    def __init__(self, **policy: Any) -> None:
        self.store = MemoryTaskStore()
        self.live = LiveTable()
        self.dispatcher = Dispatcher(self.store, Policy(**policy), self.live)
        self.views = {"W1": self.a_view("W1")}
        self.seq = 0
        self.accepted = 0

    #: The roster.
    version = 1

    def names(self) -> list[str]:
        return list(self.views)

    def view(self, name: str) -> WorkerView | None:
        return self.views.get(name)

    def park(self, *places: Place) -> Parking:
        parking = Parking(self.live, lambda name: self.views[name].cpu)
        for worker, slot in places:
            call = Exchange(worker=worker, incarnation="a", slot=slot, seq=self.seq)
            parking.put((worker, slot), Pending(call, lambda _: None))
        return parking

    def a_view(self, name: str, **changes: Any) -> WorkerView:
        has: dict[str, Any] = {
            "name": name,
            "node_id": name,
            "state": WorkerState.ONLINE,
            "cpu": 4.0,
            "mem_gb": 8.0,
            "gpu": 0.0,
            "resources": (),
            "labels": (),
            "task_types": frozenset({"echo", "sleep"}),
            "used": Needs(),
            "live": 0,
        }
        return WorkerView(**{**has, **changes})

    def ledger(self) -> Ledger:
        return Ledger(self.store, self.live.tasks, {})

    def submit(self, *names: str, ledger: Ledger | None = None, **changes: Any) -> None:
        batch = ledger or self.ledger()
        for name in names:
            self.accepted += 1
            batch.add(accept(a_spec(name, **changes), seq=self.accepted, at=T0))
        if ledger is None:
            self.commit(batch)

    def commit(self, ledger: Ledger) -> None:
        with self.store.transaction():
            ledger.flush()
        self.live.absorb(ledger)
        self.dispatcher.absorb(ledger)

    def dispatch(
        self, *places: Place, ledger: Ledger | None = None, paused: frozenset[str] = frozenset()
    ) -> dict[Place, list[str]]:
        """Park calls, hand out, commit; return task names by place."""
        batch = ledger or self.ledger()
        self.seq += 1
        parking = self.park(*places)
        granted = self.dispatcher.dispatch(batch, self, parking, paused, 7, T0)
        self.commit(batch)
        for place in places:
            parking.pop(place)
        return {place: [offer.task_id for offer in offers] for place, offers in granted.items()}

    def step(self, name: str, event: Any) -> None:
        ledger = self.ledger()
        task = ledger.get(name)
        assert task is not None
        ledger.step(task, event)
        self.commit(ledger)

    def task(self, name: str) -> Task:
        return self.store.get([name])[name]

    def start(self, name: str) -> None:
        lease = self.task(name).lease
        assert lease is not None
        self.step(name, AttemptStarted(at=T0, token=lease.token))


SLOT: Place = ("W1", 0)
AGENT: Place = ("W1", HEAVY_SLOT)


def test_a_lease_names_who_holds_it_and_by_which_call() -> None:
    floor = Floor()
    floor.submit("t1")
    assert floor.dispatch(SLOT) == {SLOT: ["t1"]}

    lease = floor.task("t1").lease
    assert lease is not None
    assert (lease.token, lease.worker, lease.slot) == (Token(7, 1), "W1", 0)
    assert (lease.incarnation, lease.grant_seq) == ("a", 1)


def test_a_type_nobody_has_timed_goes_out_one_by_one_a_quick_one_in_handfuls() -> None:
    floor = Floor(grant_max=8, grant_target_ms=20.0)
    floor.submit(*(f"t{number}" for number in range(30)))
    assert floor.dispatch(SLOT) == {SLOT: ["t0"]}

    floor.dispatcher.observe("echo", 5.0)
    assert floor.dispatch(("W1", 1)) == {("W1", 1): ["t1", "t2", "t3", "t4"]}

    for _ in range(50):
        floor.dispatcher.observe("echo", 0.1)
    assert len(floor.dispatch(("W1", 2))["W1", 2]) == 8


def test_an_outlier_does_not_make_a_quick_type_slow() -> None:
    floor = Floor(grant_max=64, grant_target_ms=20.0)
    floor.submit(*(f"t{number}" for number in range(100)))
    for _ in range(20):
        floor.dispatcher.observe("echo", 1.0)
    floor.dispatcher.observe("echo", 10_000.0)
    assert len(floor.dispatch(SLOT)[SLOT]) == 3
    for _ in range(10):
        floor.dispatcher.observe("echo", 1.0)
    assert len(floor.dispatch(("W1", 1))["W1", 1]) > 15

    for _ in range(4):  # It has become slow.
        floor.dispatcher.observe("echo", 10_000.0)
    assert len(floor.dispatch(("W1", 2))["W1", 2]) == 1
    floor.dispatcher.observe("none", 0.0)


def test_what_was_accepted_a_moment_ago_goes_out_in_the_same_commit_in_its_place() -> None:
    floor = Floor()
    floor.submit("old", priority=5)
    ledger = floor.ledger()
    floor.submit("urgent", ledger=ledger, priority=9)
    floor.submit("later", ledger=ledger, priority=1)

    assert floor.dispatch(SLOT, ledger=ledger) == {SLOT: ["urgent"]}
    assert floor.dispatch(("W1", 1)) == {("W1", 1): ["old"]}
    assert floor.dispatch(("W1", 2)) == {("W1", 2): ["later"]}


def test_a_head_that_changed_in_this_batch_makes_room_for_the_next_in_line() -> None:
    floor = Floor()
    floor.submit("t1", "t2")
    ledger = floor.ledger()
    first = ledger.get("t1")
    assert first is not None
    ledger.step(first, CancelRequested(at=T0, reason=""))

    assert floor.dispatch(SLOT, ledger=ledger) == {SLOT: ["t2"]}


def test_heavy_tasks_go_to_the_agent_and_only_as_many_as_fit() -> None:
    floor = Floor()
    floor.submit("h1", "h2", "h3", needs=Needs(cpu=2.0))
    floor.submit("t1")

    granted = floor.dispatch(SLOT, AGENT)

    assert granted == {SLOT: ["t1"], AGENT: ["h1", "h2"]}
    assert floor.live.used("W1") == Needs(cpu=4.0)
    floor.views["W1"] = floor.a_view("W1", used=floor.live.used("W1"))
    assert floor.dispatch(AGENT) == {}


def test_an_offer_carries_what_a_heavy_attempt_needs() -> None:
    floor = Floor()
    floor.submit("h1", needs=Needs(cpu=2.0, mem_gb=1.0))
    floor.dispatch(AGENT)

    offer = floor.dispatcher.offer(floor.task("h1"), T0)
    assert offer.needs == (("cpu", 2.0), ("mem_gb", 1.0), ("gpu", 0.0))


@pytest.mark.parametrize(
    "state",
    [WorkerState.SUSPECT, WorkerState.GONE, WorkerState.DRAINING, WorkerState.CORDONED],
)
def test_a_worker_that_does_not_accept_gets_nothing(state: WorkerState) -> None:
    floor = Floor()
    floor.views["W1"] = floor.a_view("W1", state=state)
    floor.submit("t1")

    assert floor.dispatch(SLOT) == {}


def test_a_paused_queue_hands_out_nothing_and_holds_up_no_other() -> None:
    floor = Floor()
    floor.submit("t1", queue="slow")
    floor.submit("t2")

    assert floor.dispatch(SLOT, ("W1", 1), paused=frozenset({"slow"})) == {SLOT: ["t2"]}
    assert floor.dispatch(SLOT) == {SLOT: ["t1"]}


def test_the_bound_on_attempts_counts_what_runs_and_what_is_about_to() -> None:
    floor = Floor(max_concurrent_tasks=2)
    floor.submit(*(f"t{number}" for number in range(5)))
    assert floor.dispatch(SLOT) == {SLOT: ["t0"]}
    assert floor.live.starts() == 1
    floor.start("t0")
    # Long by now: the slot asks again beside it.
    assert floor.dispatch(SLOT) == {SLOT: ["t1"]}
    floor.start("t1")

    parking = floor.park(SLOT)
    assert floor.live.starts() == 2
    parking.pop(SLOT)
    assert floor.dispatch(SLOT, ("W1", 1)) == {}


def test_a_key_that_is_full_is_held_and_let_go_when_there_is_room() -> None:
    floor = Floor(concurrency_default=1)
    floor.submit("k1", "k2", "k3", concurrency_key="k")
    floor.submit("t1")

    granted = floor.dispatch(SLOT, ("W1", 1), ("W1", 2))
    assert sorted(name for names in granted.values() for name in names) == ["k1"]
    assert floor.dispatcher.unfinished  # Others may go into the room that was found taken.
    assert floor.dispatch(("W1", 1)) == {("W1", 1): ["t1"]}
    assert floor.task("k2").hold is Hold.CONCURRENCY

    floor.step("k1", LeaseReturned(at=T0, token=Token(7, 1), reason=""))
    floor.step("k1", CancelRequested(at=T0, reason=""))
    ledger = floor.ledger()
    floor.dispatcher.sweep(ledger, T0)
    floor.commit(ledger)
    assert floor.dispatch(SLOT) == {SLOT: ["k2"]}
    assert floor.live.live_of_key("k") == 1


def test_an_expired_head_ends_instead_of_going_out() -> None:
    floor = Floor()
    floor.submit("t1", expires_at=T0 + 1.0)
    ledger = floor.ledger()
    granted = floor.dispatcher.dispatch(ledger, floor, floor.park(SLOT), frozenset(), 7, T0 + 1.0)
    floor.commit(ledger)

    assert granted == {}
    assert floor.task("t1").state is TaskState.EXPIRED


def test_what_memory_says_is_what_the_store_says_also_after_a_restart() -> None:
    floor = Floor()
    floor.submit(*(f"t{number}" for number in range(6)))
    floor.submit("h1", needs=Needs(cpu=1.0))
    floor.dispatch(SLOT, ("W1", 1), AGENT)
    floor.start("t0")
    floor.step("t1", LeaseReturned(at=T0, token=Token(7, 1), reason=""))

    again_live = LiveTable()
    again_live.reset(floor.store.leased())
    again = Dispatcher(floor.store, Policy(), again_live)
    again.reset()

    assert again_live.tasks == floor.live.tasks
    assert again_live.count("W1") == floor.live.count("W1") == 2
    assert again._ready == floor.dispatcher._ready
    assert [task.id for task in again_live.in_slot("W1", 0)] == ["t0"]
    assert {task.id for task in again_live.on_worker("W1")} == {"t0", "h1"}


def test_the_best_worker_by_load_is_passed_over_when_it_is_full() -> None:
    floor = Floor()
    floor.views = {"W1": floor.a_view("W1", cpu=16.0), "W2": floor.a_view("W2", cpu=4.0)}
    floor.submit("h1", needs=Needs(cpu=16.0))
    assert floor.dispatch(AGENT) == {AGENT: ["h1"]}
    floor.views["W1"] = floor.a_view("W1", cpu=16.0, used=Needs(cpu=16.0))

    floor.submit("h2", needs=Needs(cpu=4.0))
    other: Place = ("W2", HEAVY_SLOT)
    assert floor.dispatch(AGENT, other) == {other: ["h2"]}


def test_who_can_run_a_lane_is_found_out_again_when_the_roster_changes() -> None:
    floor = Floor()
    floor.submit("t1", task_type="new")
    assert floor.dispatch(SLOT) == {}
    floor.views["W1"] = floor.a_view("W1", task_types=frozenset({"new"}))
    floor.version += 1

    assert floor.dispatch(SLOT) == {SLOT: ["t1"]}

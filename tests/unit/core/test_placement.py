"""Where tasks go, and why they do not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from hcna_ray.core.machine import accept
from hcna_ray.core.models import HEAVY_SLOT, LaneKey, Needs, Task, WorkerState, WorkerView
from hcna_ray.core.placement import (
    Opening,
    PendingReason,
    assign,
    exclusion,
    explain,
    has_room,
    occupy,
    shortcoming,
)
from tests.unit.core.builders import NOW, a_spec, a_worker


def a_lane(*ids: str, at: float = NOW, **changes: Any) -> tuple[LaneKey, list[Task]]:
    """Return tasks that are alike but for their id, one accepted a second after the other."""
    tasks = [
        accept(a_spec(id=task_id, **changes), seq=index, at=at + index).task
        for index, task_id in enumerate(ids)
    ]
    spec = tasks[0].spec
    return LaneKey(spec.queue, spec.task_type, spec.needs), tasks


def a_slot(worker: str = "W1", slot: int = 0, items_max: int = 4) -> Opening:
    return Opening(worker=worker, slot=slot, items_max=items_max, budget_ms=10.0)


def room(worker: str = "W1", items_max: int = 4) -> Opening:
    return Opening(worker=worker, slot=HEAVY_SLOT, items_max=items_max, budget_ms=0.0)


def placed(
    lanes: list[tuple[LaneKey, list[Task]]],
    openings: list[Opening],
    workers: tuple[WorkerView, ...] = (a_worker(),),
    *,
    estimates_ms: dict[str, float] | None = None,
    starts_max: int = 100,
) -> list[tuple[str, str, int]]:
    """Return (task id, worker, slot) of each assignment."""
    chosen = assign(
        {worker.name: worker for worker in workers},
        dict(lanes),
        openings,
        estimates_ms={"echo": 4.0} if estimates_ms is None else estimates_ms,
        starts_max=starts_max,
    )
    return [(item.task.id, item.opening.worker, item.opening.slot) for item in chosen]


# -- feasible ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "changes", "clause", "detail"),
    [
        (Needs(worker="W2"), {}, "worker=W2", "is W1"),
        (Needs(), {"state": WorkerState.ASLEEP}, "state=online", "is asleep"),
        (Needs(), {"trouble": "cannot write to its disk"}, "state=online", "cannot write"),
        (Needs(), {"task_types": frozenset({"sleep"})}, "task_type=echo", "does not know"),
        (Needs(cpu=8.0), {}, "cpu>=8", "has 4"),
        (Needs(mem_gb=8.5), {}, "mem_gb>=8.5", "has 8"),
        (Needs(gpu=1.0), {}, "gpu>=1", "has 0"),
        (Needs(resources=(("scratch", 2.0),)), {}, "scratch>=2", "has 0"),
        (Needs(labels=(("zone", "attic"),)), {}, "label zone=attic", "has no zone"),
        (
            Needs(labels=(("zone", "attic"),)),
            {"labels": (("zone", "cellar"),)},
            "label zone=attic",
            "has zone=cellar",
        ),
        (
            Needs(labels=(("zone", "attic"),)),
            {"labels": (("zone", ""),)},
            "label zone=attic",
            "has zone=",
        ),
    ],
)
def test_a_worker_is_excluded_by_the_need_it_cannot_meet(
    needs: Needs, changes: dict[str, Any], clause: str, detail: str
) -> None:
    found = exclusion(needs, "echo", a_worker(**changes))

    assert found is not None
    assert found.clause == clause
    assert found.detail.startswith(detail)


@pytest.mark.parametrize("name", ["W1", "HCNA-W1--prod--home--v1.0"])
def test_a_worker_that_meets_every_need_is_feasible_by_either_name(name: str) -> None:
    needs = Needs(
        worker=name,
        cpu=4.0,
        resources=(("scratch", 1.0),),
        labels=(("zone", "attic"),),
    )
    worker = a_worker(resources=(("scratch", 1.0),), labels=(("zone", "attic"),))

    assert exclusion(needs, "echo", worker) is None


def test_a_busy_worker_is_feasible_but_has_no_room() -> None:
    busy = a_worker(used=Needs(cpu=4.0))

    assert exclusion(Needs(cpu=1.0), "echo", busy) is None
    assert not has_room(Needs(cpu=1.0), busy)
    assert has_room(Needs(mem_gb=1.0), busy)


def test_fractions_add_up_to_the_whole() -> None:
    """0.3 - (0.1 + 0.1) is less than 0.1 in binary; the third tenth still fits."""
    tenth = Needs(resources=(("scratch", 0.1),))
    used = occupy(occupy(Needs(), tenth), tenth)

    assert has_room(tenth, a_worker(resources=(("scratch", 0.3),), used=used))


def test_what_is_taken_and_given_back_leaves_nothing() -> None:
    needs = Needs(cpu=1.0, resources=(("scratch", 0.1), ("tape", 2.0)))

    taken = occupy(Needs(), needs)

    assert taken == dataclasses.replace(needs)
    assert occupy(taken, needs, -1) == Needs()


# -- assigned ------------------------------------------------------------------------------------


def test_nothing_to_do_or_nowhere_to_do_it() -> None:
    assert placed([], [a_slot()]) == []
    assert placed([a_lane("a")], []) == []
    lane, _ = a_lane("a")
    assert placed([(lane, [])], [a_slot()]) == []


def test_tasks_go_in_dispatch_order_over_all_lanes() -> None:
    late = a_lane("late", "later", at=NOW + 10)
    urgent = a_lane("urgent", at=NOW + 30, priority=9, queue="fast")

    assert [task for task, *_ in placed([late, urgent], [a_slot(items_max=2)])] == [
        "urgent",
        "late",
    ]


def test_a_slot_takes_as_many_items_as_fit_into_its_budget() -> None:
    """Budget 10 ms, 4 ms each: two."""
    assert placed([a_lane("a", "b", "c")], [a_slot()]) == [("a", "W1", 0), ("b", "W1", 0)]


def test_a_slot_takes_one_of_unknown_length_and_nobody_behind_it() -> None:
    unknown = a_lane("a", "b", task_type="sleep")
    instant = a_lane("c", at=NOW + 60)
    worker = a_worker(task_types=frozenset({"echo", "sleep"}))

    assert placed([unknown, instant], [a_slot()], (worker,), estimates_ms={"echo": 0.0}) == [
        ("a", "W1", 0)
    ]


def test_a_single_item_may_be_longer_than_the_budget() -> None:
    assert placed([a_lane("a", "b")], [a_slot()], estimates_ms={"echo": 99.0}) == [("a", "W1", 0)]


def test_work_spreads_before_it_piles_up() -> None:
    openings = [a_slot("W1", 0), a_slot("W1", 1), a_slot("W2", 0)]

    assert placed([a_lane("a", "b", "c", "d")], openings, (a_worker(), a_worker("W2"))) == [
        ("a", "W1", 0),
        ("b", "W2", 0),
        ("c", "W1", 1),
        ("d", "W2", 0),
    ]


def test_the_less_loaded_worker_comes_first() -> None:
    workers = (a_worker(live=2), a_worker("W2", live=3, cpu=8.0))

    assert placed([a_lane("a")], [a_slot("W1"), a_slot("W2")], workers) == [("a", "W2", 0)]


def test_of_two_idle_workers_the_stronger_comes_first_and_takes_more() -> None:
    strong, weak = a_worker("W1", cpu=2.0), a_worker("W2", cpu=8.0)
    slots = [a_slot(name, number, items_max=1) for name in ("W1", "W2") for number in range(4)]

    chosen = placed([a_lane(*(f"t{n}" for n in range(5)))], slots, (strong, weak))

    assert [worker for _, worker, _ in chosen] == ["W2", "W2", "W2", "W1", "W2"]


def test_an_idle_worker_comes_before_a_busy_one_that_is_stronger() -> None:
    busy, idle = a_worker("W1", cpu=8.0, live=8), a_worker("W2", cpu=2.0)

    assert placed([a_lane("t1")], [a_slot("W1"), a_slot("W2")], (busy, idle)) == [("t1", "W2", 0)]


def test_a_burst_of_short_tasks_does_not_pile_up_on_one_worker() -> None:
    slots = [a_slot(name, number, items_max=64) for name in ("W1", "W2") for number in range(2)]

    chosen = placed(
        [a_lane(*(f"t{n}" for n in range(64)))],
        slots,
        (a_worker("W1"), a_worker("W2")),
        estimates_ms={"echo": 0.1},
    )

    taken = Counter(place[1:] for place in chosen)
    assert set(taken.values()) == {16}


def test_two_workers_share_a_stream_of_work_by_their_strength() -> None:
    """A closed loop: a slot asks again when it is done; more slots than cores slow each other."""
    cores = {"W1": 8.0, "W2": 2.0}
    openings = {(name, number) for name in cores for number in range(4)}
    busy: dict[tuple[str, int], float] = {}
    done: Counter[str] = Counter()
    now, number = 0.0, 0
    while sum(done.values()) < 600:
        running = Counter(name for name, _ in busy)
        views = tuple(a_worker(name, cpu=cores[name], live=running[name]) for name in cores)
        idle = sorted(openings - busy.keys())
        names = [f"t{number + n}" for n in range(len(idle))]
        number += len(idle)
        slots = [a_slot(name, slot, items_max=1) for name, slot in idle]
        for _, name, slot in placed([a_lane(*names)], slots, views):
            running[name] += 1
            busy[name, slot] = now + 0.01 * max(1.0, running[name] / cores[name])
        now = min(busy.values())
        for place in [place for place, end in busy.items() if end <= now]:
            del busy[place]
            done[place[0]] += 1

    assert 1.4 < done["W1"] / done["W2"] < 2.6  # Four cores' worth of slots against two.


def test_heavy_tasks_take_room_and_not_slots() -> None:
    heavy = a_lane("a", "b", "c", needs=Needs(cpu=2.0))

    assert placed([heavy], [a_slot(), room()]) == [("a", "W1", -1), ("b", "W1", -1)]
    assert placed([heavy], [a_slot()]) == []
    assert placed([heavy], [room(items_max=1)]) == [("a", "W1", -1)]
    assert placed([a_lane("light")], [room()]) == []


def test_a_lane_that_fits_nowhere_does_not_hold_up_others() -> None:
    stuck = a_lane("stuck", needs=Needs(worker="W9"))
    behind = a_lane("behind", at=NOW + 60)

    assert placed([stuck, behind], [a_slot()]) == [("behind", "W1", 0)]


def test_the_cluster_starts_no_more_than_it_may() -> None:
    light = a_lane("a", "b", "c")
    heavy = a_lane("h", at=NOW - 60, needs=Needs(cpu=1.0))
    openings = [a_slot(slot=0), a_slot(slot=1), room()]

    assert placed([light, heavy], openings, starts_max=0) == []
    assert placed([light, heavy], openings, starts_max=1) == [("h", "W1", -1)]
    # One start for the heavy task, one for the slot; the second item of a slot is no start.
    assert placed([light, heavy], openings, starts_max=2) == [
        ("h", "W1", -1),
        ("a", "W1", 0),
        ("b", "W1", 0),
    ]
    assert placed([heavy], [room()], starts_max=0) == []


# -- explained -----------------------------------------------------------------------------------


def why(needs: Needs, *workers: WorkerView, **limits: Any) -> PendingReason:
    return explain(needs, "echo", workers, **limits)


def test_without_workers_the_way_out_is_to_start_one() -> None:
    reason = why(Needs())

    assert (reason.code, reason.fix) == ("no_workers", "start one: hcna up")
    assert reason.message.startswith("No healthy workers available")


def test_each_need_is_named_with_the_workers_it_excludes() -> None:
    reason = why(
        Needs(cpu=2.0, gpu=1.0),
        a_worker("W1"),
        a_worker("W2", cpu=1.0),
        a_worker("W3", state=WorkerState.SUSPECT),
    )

    assert reason.code == "unplaceable"
    assert "gpu>=1: excludes 2 of 3 workers (W1 has 0; W3 has 0)" in reason.message
    assert "cpu>=2: excludes 1 of 3 workers (W2 has 1)" in reason.message
    assert reason.fix == "join a worker with gpu>=1 and cpu>=2, or drop the need"


def test_one_worker_is_not_several() -> None:
    assert "excludes 1 of 1 worker (" in why(Needs(cpu=64.0), a_worker()).message


@pytest.mark.parametrize(
    ("state", "fix"),
    [
        (WorkerState.CORDONED, "hcna workers uncordon"),
        (WorkerState.DRAINING, "hcna workers uncordon"),
        (WorkerState.GONE, "start the worker again"),
        (WorkerState.ASLEEP, "its tasks start when it is back"),
        (WorkerState.SUSPECT, "its tasks start when it is back"),
    ],
)
def test_workers_that_are_all_away_are_said_to_be(state: WorkerState, fix: str) -> None:
    reason = why(Needs(), a_worker(state=state))

    assert reason.code == "no_healthy_workers"
    assert f"W1 is {state.value}" in reason.message
    assert fix in reason.fix


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (0.4, "0 s"),
        (99.0, "99 s"),
        (180.0, "3 min"),
        (5999.0, "100 min"),
        (6000.0, "2 h"),
        (86400.0, "24 h"),
        (200_000.0, "2 days"),
    ],
)
def test_how_long_a_worker_has_been_away_is_said_in_words(age: float, words: str) -> None:
    away = a_worker(state=WorkerState.ASLEEP, last_seen_age_s=age)

    reason = why(Needs(), away)

    assert reason.message == (f"No healthy workers available: W1 is asleep, last seen {words} ago")
    assert "on_disconnect replace" in reason.fix
    assert "join another" in reason.fix


@pytest.mark.parametrize(
    ("state", "fix"),
    [
        (WorkerState.CORDONED, "let W1 take work again: hcna workers uncordon W1"),
        (WorkerState.DRAINING, "let W1 take work again: hcna workers uncordon W1"),
        (WorkerState.GONE, "start the worker again (hcna up there), or join another one"),
        (WorkerState.ASLEEP, "wait: its tasks start when it is back; wake its machine"),
        (WorkerState.SUSPECT, "wait: its tasks start when it is back; wake its machine"),
    ],
)
def test_who_has_what_is_needed_and_is_away_is_the_reason(state: WorkerState, fix: str) -> None:
    able = a_worker("W1", gpu=1.0, state=state)
    # Neither what W2 lacks nor how W3 is would help.
    others = a_worker("W2"), a_worker("W3", state=WorkerState.CORDONED)

    reason = why(Needs(gpu=1.0), *others, able)

    assert reason.code == "no_healthy_workers"
    assert reason.message.startswith(
        f"No healthy workers available that have what it needs: W1 is {state.value}"
    )
    assert reason.message.endswith("; needs gpu>=1: excludes 2 of 3 workers (W2 has 0; W3 has 0)")
    assert reason.fix.startswith(fix)


def test_the_only_one_that_knows_a_type_is_cordoned() -> None:
    trained = a_worker("W1", state=WorkerState.CORDONED, task_types=frozenset({"train"}))

    reason = explain(Needs(), "train", (trained, a_worker("W2")))

    assert reason.code == "no_healthy_workers"
    assert "W1 is cordoned; needs task_type=train: excludes 1 of 2 workers" in reason.message
    assert reason.fix == "let W1 take work again: hcna workers uncordon W1"


def test_of_a_worker_that_is_away_what_it_lacks_is_told() -> None:
    """It would be no help to wake it."""
    reason = why(Needs(gpu=1.0), a_worker(state=WorkerState.ASLEEP))

    assert reason.code == "unplaceable"
    assert reason.message == "waiting: needs gpu>=1: excludes 1 of 1 worker (W1 has 0)"
    assert reason.fix == "join a worker with gpu>=1, or drop the need"


def test_a_task_type_that_nobody_knows_is_to_be_installed() -> None:
    """Where that alone is lacking; another worker, or another need, would not bring it."""
    plain, strong = a_worker("W1"), a_worker("W2", gpu=1.0)
    trained = a_worker("W3", task_types=frozenset({"train"}))
    needs = Needs(gpu=1.0)

    def fix(needs: Needs, *workers: WorkerView) -> str:
        reason = explain(needs, "train", workers)
        assert reason.code == "unplaceable"
        return reason.fix

    there = "then hcna down and hcna up there"
    install = "install the package that has train on"
    assert fix(Needs(), plain) == f"{install} W1, {there}"
    assert fix(Needs(), plain, strong) == f"{install} W1 or W2, {there}"
    assert fix(needs, plain, strong) == f"{install} W2, {there}"
    assert fix(needs, plain) == f"{install} a worker with gpu>=1"
    assert fix(needs, plain, trained) == "join a worker with gpu>=1, or drop the need"
    assert fix(needs, strong, trained) == (
        f"{install} W2, {there}, or join a worker with gpu>=1, or drop the need"
    )


def test_a_worker_in_trouble_is_named_with_it() -> None:
    reason = why(Needs(), a_worker(trouble="cannot write to its disk"))

    assert reason.message == "No healthy workers available: W1 cannot write to its disk"
    assert "free space on its disk" in reason.fix


def test_a_pinned_task_waits_for_its_worker_by_name() -> None:
    reason = why(Needs(worker="W9"), a_worker("W1"), a_worker("W2"))

    assert reason.code == "waiting_worker"
    assert "W9, which has never joined or was forgotten (workers: W1, W2)" in reason.message


def test_a_pinned_task_is_explained_by_its_worker_alone() -> None:
    reason = why(Needs(worker="W2", gpu=1.0), a_worker("W1"), a_worker("W2"))

    assert reason.message == "waiting: needs gpu>=1: excludes 1 of 1 worker (W2 has 0)"


def test_a_full_cluster_says_so() -> None:
    reason = why(Needs(), a_worker(), running=8, running_max=8)

    assert reason.code == "max_concurrent_tasks"
    assert "8 of at most 8" in reason.message


def test_a_heavy_task_without_room_is_told_what_is_free() -> None:
    needs = Needs(cpu=3.0, resources=(("scratch", 1.0),))
    worker = a_worker(resources=(("scratch", 1.0),), used=Needs(cpu=2.0))

    reason = why(needs, worker, running=1, running_max=8)

    assert reason.code == "no_room"
    assert "W1 has cpu 2 free, W1 has scratch 1 free" in reason.message


@pytest.mark.parametrize("needs", [Needs(), Needs(cpu=1.0)])
def test_a_task_that_fits_waits_for_its_turn(needs: Needs) -> None:
    reason = why(needs, a_worker("W1"), a_worker("W2"))

    assert (reason.code, reason.message) == ("waiting_turn", "waiting for its turn on W1, W2")


def test_who_could_run_it_were_it_there_does_not_follow_its_state() -> None:
    away = a_worker(state=WorkerState.ASLEEP, trouble="has no disk")

    assert shortcoming(Needs(), "echo", away) is None
    assert exclusion(Needs(), "echo", away) is not None
    other = shortcoming(Needs(worker="W9"), "echo", away)
    assert other is not None
    assert other.clause == "worker=W9"

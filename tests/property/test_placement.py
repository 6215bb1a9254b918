"""`assign` and `explain` keep their promises for any workers, lanes and openings."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random
from typing import NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from hcna_ray.core.machine import accept
from hcna_ray.core.models import (
    HEAVY_SLOT,
    LaneKey,
    Needs,
    Task,
    TaskSpec,
    WorkerState,
    WorkerView,
)
from hcna_ray.core.placement import (
    Assignment,
    Opening,
    assign,
    exclusion,
    explain,
    occupy,
    shortcoming,
)
from tests.property.judge import able, amounts, broken_promises, totals

TYPES = ("echo", "sleep", "qegg.generate")
NAMES = ("W1", "W2", "W3", "W4")
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=500)

#: Scenes are thrown from a seed: Hypothesis, left to itself, prefers clusters with nobody in them.
seeds = st.integers(0, 2**32 - 1)
scenes = seeds.map(lambda seed: a_scene(Random(seed)))
clusters = seeds.map(lambda seed: tuple(some_workers(Random(seed)).values()))
needs_of_any_kind = seeds.map(lambda seed: some_needs(Random(seed)))


def some_needs(dice: Random) -> Needs:
    """Throw needs that are light, heavy, pinned, labelled, or more than anybody has."""

    def amount() -> float:
        return dice.choice((0.0, 0.0, 0.0, 0.1, 0.5, 1.0, 2.0))

    light = Needs(
        worker=dice.choice((None,) * 9 + ("W1", "HCNA-W2", "W9")),
        labels=dice.choice(((),) * 8 + ((("zone", "attic"),), (("disk", ""),))),
    )
    if dice.random() < 0.5:
        return light
    return replace(
        light,
        cpu=64.0 if dice.random() < 0.1 else amount(),
        mem_gb=amount(),
        gpu=dice.choice((0.0, 0.0, 0.0, 0.0, 1.0)),
        resources=dice.choice(((), (), (), (("scratch", 0.1),), (("scratch", 1.0), ("tape", 1.0)))),
        isolated=dice.random() < 0.3,
    )


def some_workers(dice: Random) -> dict[str, WorkerView]:
    """Throw up to four workers that hold something already, but never more than they have."""
    workers = {}
    for name in NAMES[: dice.choice((4, 4, 3, 2, 2, 1, 0))]:
        cpu, mem_gb, gpu = (dice.choice((4.0, 2.0, 1.0, 0.3, 0.0)) for _ in range(3))
        share = dice.choice((0.0, 0.0, 0.5, 1.0))
        workers[name] = WorkerView(
            name=name,
            node_id=f"HCNA-{name}",
            state=dice.choice((WorkerState.ONLINE,) * 9 + tuple(WorkerState)),
            cpu=cpu,
            mem_gb=mem_gb,
            gpu=gpu,
            resources=dice.choice(((), (("scratch", 0.3),), (("scratch", 2.0), ("tape", 2.0)))),
            labels=dice.choice(((), (("zone", "attic"),), (("disk", ""), ("zone", "cellar")))),
            task_types=frozenset(TYPES) - {dice.choice((None, None, *TYPES))},
            used=Needs(cpu=cpu * share, mem_gb=mem_gb * share, gpu=gpu * share),
            live=dice.randrange(9),
        )
    return workers


class Scene(NamedTuple):
    """Everything that one call of `assign` gets."""

    workers: dict[str, WorkerView]
    lanes: dict[LaneKey, list[Task]]
    openings: list[Opening]
    estimates_ms: dict[str, float]
    starts_max: int

    def assign(self) -> list[Assignment]:
        """Make the call."""
        return assign(
            self.workers,
            self.lanes,
            self.openings,
            estimates_ms=self.estimates_ms,
            starts_max=self.starts_max,
        )


def lanes_of(tasks: list[Task]) -> dict[LaneKey, list[Task]]:
    """Group tasks as the store does."""
    lanes: dict[LaneKey, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: (task.dispatch_key, task.seq)):
        lane = LaneKey(task.spec.queue, task.spec.task_type, task.needs)
        lanes.setdefault(lane, []).append(task)
    return lanes


def a_scene(dice: Random) -> Scene:
    """Throw a cluster, tasks in lanes, and openings."""
    workers = some_workers(dice)
    kinds = [(dice.choice(TYPES), some_needs(dice)) for _ in range(dice.randrange(1, 6))]
    tasks = []
    for seq in range(dice.randrange(15)):
        task_type, needs = dice.choice(kinds)
        spec = TaskSpec(id=f"t{seq}", task_type=task_type, needs=needs, priority=dice.randrange(10))
        tasks.append(accept(spec, seq=seq, at=float(dice.randrange(300))).task)
    openings = [
        Opening(worker=name, slot=slot, items_max=dice.randrange(5), budget_ms=10.0)
        for name in workers
        for slot in (HEAVY_SLOT, 0, 1)
        if dice.random() < 0.8
    ]
    estimates = {name: dice.choice((0.0, 1.0, 4.0, 99.0)) for name in TYPES if dice.random() < 0.7}
    return Scene(
        workers, lanes_of(tasks), openings, estimates, dice.choice((12, 12, 9, 6, 3, 1, 0, -1))
    )


@fixed
@given(scenes)
def test_an_assignment_breaks_no_promise_and_is_the_same_each_time(scene: Scene) -> None:
    chosen = scene.assign()

    assert broken_promises(*scene, chosen) == []
    assert chosen == scene.assign()


@fixed
@given(scenes, st.randoms(use_true_random=False))
def test_the_order_in_which_lanes_and_workers_are_listed_does_not_matter(
    scene: Scene, random: Random
) -> None:
    lanes, workers = list(scene.lanes.items()), list(scene.workers.items())
    random.shuffle(lanes)
    random.shuffle(workers)

    shuffled = scene._replace(lanes=dict(lanes), workers=dict(workers))

    assert shuffled.assign() == scene.assign()


@fixed
@given(scenes)
def test_lanes_that_fit_nowhere_do_not_block_others(scene: Scene) -> None:
    def fits(lane: LaneKey) -> bool:
        return any(able(lane, worker) for worker in scene.workers.values())

    without = scene._replace(lanes={k: v for k, v in scene.lanes.items() if fits(k)})

    assert without.assign() == scene.assign()


@fixed
@given(scenes)
def test_an_idle_slot_is_not_left_beside_a_task_that_fits_it(scene: Scene) -> None:
    chosen = scene.assign()
    placed = {item.task.id for item in chosen}
    filled = {item.opening for item in chosen}
    started = len({item.opening for item in chosen if item.opening.slot >= 0})
    started += sum(item.opening.slot < 0 for item in chosen)

    idle = [
        (opening, task)
        for opening in scene.openings
        if opening.slot >= 0 and opening not in filled and opening.items_max
        for lane, tasks in scene.lanes.items()
        if not lane.needs.heavy and able(lane, scene.workers[opening.worker])
        for task in tasks
        if task.id not in placed
    ]

    assert not idle or started >= scene.starts_max


# -- exclusion and explanation -------------------------------------------------------------------


@fixed
@given(clusters, needs_of_any_kind, st.sampled_from(TYPES))
def test_a_worker_is_excluded_exactly_when_it_is_not_able(
    workers: tuple[WorkerView, ...], needs: Needs, task_type: str
) -> None:
    lane = LaneKey("default", task_type, needs)

    for worker in workers:
        assert (exclusion(needs, task_type, worker) is None) == able(lane, worker)


COUNTED = re.compile(r"needs (\S+(?: \S+)?): excludes (\d+) of (\d+) workers? \(")


@fixed
@given(clusters, needs_of_any_kind, st.sampled_from(TYPES))
@example((), Needs(), "echo")
def test_an_explanation_names_each_excluding_need_and_counts_every_worker(
    workers: tuple[WorkerView, ...], needs: Needs, task_type: str
) -> None:
    """Who has all that is needed is said to be away; it is `unplaceable` where nobody has."""
    reason = explain(needs, task_type, workers)

    meant = [w for w in workers if needs.worker in (None, w.name, w.node_id)]
    lacks = [lack for w in meant if (lack := shortcoming(needs, task_type, w)) is not None]
    away = [w for w in meant if shortcoming(needs, task_type, w) is None]
    found = COUNTED.findall(reason.message)
    if any(exclusion(needs, task_type, worker) is None for worker in meant):
        assert reason.code in ("waiting_turn", "no_room")
    elif not workers:
        assert reason.code == "no_workers"
    elif not meant:
        assert reason.code == "waiting_worker"
    else:
        assert reason.code == ("no_healthy_workers" if away else "unplaceable")
        assert all(worker.name in reason.message for worker in meant)
        assert {clause for clause, _, _ in found} == {lack.clause for lack in lacks}
        assert sum(int(count) for _, count, _ in found) == len(lacks)
        assert {int(total) for _, _, total in found} <= {len(meant)}
    assert reason.fix


@fixed
@given(clusters, needs_of_any_kind, st.sampled_from(TYPES), st.integers(0, 5), st.integers(1, 5))
def test_the_limit_of_the_cluster_is_the_reason_only_for_a_task_that_fits(
    workers: tuple[WorkerView, ...], needs: Needs, task_type: str, running: int, limit: int
) -> None:
    fits = any(exclusion(needs, task_type, worker) is None for worker in workers)

    reason = explain(needs, task_type, workers, running=running, running_max=limit)

    assert (reason.code == "max_concurrent_tasks") == (fits and running >= limit)


# -- what is taken and given back ----------------------------------------------------------------


@fixed
@given(st.lists(needs_of_any_kind, max_size=12), st.randoms(use_true_random=False))
def test_what_is_taken_and_given_back_in_any_order_leaves_room_for_the_whole(
    taken: list[Needs], random: Random
) -> None:
    used = Needs()
    for needs in taken:
        used = occupy(used, needs)
    back = list(taken)
    random.shuffle(back)
    for needs in back:
        used = occupy(used, needs, -1)

    assert used.resources == ()
    assert all(abs(left) < 1e-6 for left in amounts(used).values())


def test_the_judge_sees_what_is_wrong() -> None:
    """The judge itself: each broken rule is told in words."""
    worker = WorkerView(
        name="W1",
        node_id="HCNA-W1",
        state=WorkerState.ONLINE,
        cpu=2.0,
        task_types=frozenset({"echo"}),
    )
    slot = Opening(worker="W1", slot=0, items_max=1, budget_ms=10.0)
    heavy_room = Opening(worker="W1", slot=HEAVY_SLOT, items_max=9, budget_ms=0.0)
    light, other, unknown = (
        accept(TaskSpec(id=name, task_type=kind), seq=seq, at=0.0).task
        for seq, (name, kind) in enumerate((("a", "echo"), ("b", "echo"), ("c", "sleep")))
    )
    heavy = [
        accept(TaskSpec(id=f"h{n}", task_type="echo", needs=Needs(cpu=2.0)), seq=9 + n, at=0.0).task
        for n in range(2)
    ]
    lanes = lanes_of([light, other, unknown, *heavy])

    def told(*chosen: Assignment, starts_max: int = 9) -> str:
        found = broken_promises({"W1": worker}, lanes, [slot], {}, starts_max, chosen)
        return "; ".join(found)

    assert told(Assignment(light, slot)) == ""
    assert "not in dispatch order" in told(Assignment(other, slot), Assignment(light, slot))
    assert "assigned twice" in told(Assignment(light, slot), Assignment(light, slot))
    assert "overtook" in told(Assignment(other, slot))
    assert "cannot run c" in told(Assignment(unknown, slot))
    assert "wrong kind" in told(Assignment(light, heavy_room))
    assert "more items" in told(Assignment(light, slot), Assignment(other, slot))
    assert "its budget" in told(Assignment(light, slot), Assignment(other, slot))
    assert "1 starts, 0 allowed" in told(Assignment(light, slot), starts_max=0)
    assert "W1 has 2.0 cpu" in told(*(Assignment(task, heavy_room) for task in heavy))
    assert totals(worker) == {"cpu": 2.0, "mem_gb": 0.0, "gpu": 0.0}

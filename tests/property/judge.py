"""An independent judge of `assign`: says in words which promise a list of assignments breaks.

It shares no code with `hcna_ray.core.placement`; what a worker can run is worked out again here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hcna_ray.core.models import LaneKey, Needs, Task, WorkerState, WorkerView
from hcna_ray.core.placement import Assignment, Opening

#: Sums of fractions do not come out even; half of Ray's own step is room enough for that.
SLACK = 5e-5


def amounts(needs: Needs) -> dict[str, float]:
    """Return what ``needs`` takes of a worker, by name."""
    return {"cpu": needs.cpu, "mem_gb": needs.mem_gb, "gpu": needs.gpu, **dict(needs.resources)}


def totals(worker: WorkerView) -> dict[str, float]:
    """Return what a worker has in all, by name."""
    return {
        "cpu": worker.cpu,
        "mem_gb": worker.mem_gb,
        "gpu": worker.gpu,
        **dict(worker.resources),
    }


def able(lane: LaneKey, worker: WorkerView) -> bool:
    """Return whether ``worker`` could run tasks of ``lane`` if it were empty."""
    has, labels = totals(worker), dict(worker.labels)
    return (
        worker.state is WorkerState.ONLINE
        and lane.task_type in worker.task_types
        and (lane.needs.worker is None or lane.needs.worker in {worker.name, worker.node_id})
        and all(has.get(name, 0.0) >= amount for name, amount in amounts(lane.needs).items())
        and all(labels.get(name) == value for name, value in lane.needs.labels)
    )


def broken_promises(
    workers: Mapping[str, WorkerView],
    lanes: Mapping[LaneKey, Sequence[Task]],
    openings: Sequence[Opening],
    estimates_ms: Mapping[str, float],
    starts_max: int,
    chosen: Sequence[Assignment],
) -> list[str]:
    """Return what is wrong with ``chosen``, in words; empty when every promise holds."""
    lane_of = {task.id: lane for lane, tasks in lanes.items() for task in tasks}
    broken: list[str] = []
    order = [(item.task.dispatch_key, item.task.seq) for item in chosen]
    if order != sorted(order):
        broken.append("assignments are not in dispatch order")
    if len({item.task.id for item in chosen}) != len(chosen):
        broken.append("a task was assigned twice")
    for lane, tasks in lanes.items():
        taken = [item.task.id for item in chosen if lane_of[item.task.id] == lane]
        if taken != [task.id for task in tasks[: len(taken)]]:
            broken.append(f"a task of {lane.task_type} overtook an earlier one of its own lane")

    used = {name: dict(amounts(worker.used)) for name, worker in workers.items()}
    items: dict[Opening, list[Task]] = {}
    starts = 0
    for item in chosen:
        lane, opening = lane_of[item.task.id], item.opening
        before = items.setdefault(opening, [])
        heavy = opening.slot < 0
        if not able(lane, workers[opening.worker]):
            broken.append(f"{opening.worker} cannot run {item.task.id}")
        if heavy != lane.needs.heavy:
            broken.append(f"{item.task.id} went to the wrong kind of opening")
        if heavy:
            for name, amount in amounts(lane.needs).items():
                used[opening.worker][name] = used[opening.worker].get(name, 0.0) + amount
        elif before:
            planned = [estimates_ms.get(task.spec.task_type) for task in (*before, item.task)]
            if None in planned or sum(p for p in planned if p is not None) > opening.budget_ms:
                broken.append(f"{item.task.id} waits in a slot behind more than its budget")
        starts += heavy or not before
        before.append(item.task)
        if len(before) > opening.items_max:
            broken.append(f"{opening.worker} was given more items than it takes")
    if starts > max(starts_max, 0):
        broken.append(f"{starts} starts, {starts_max} allowed")
    for name, worker in workers.items():
        for what, has in totals(worker).items():
            taken_now = used[name].get(what, 0.0)
            if taken_now > has + SLACK and taken_now > amounts(worker.used).get(what, 0.0):
                broken.append(f"{name} has {has} {what}, {taken_now} were given away")
    return broken

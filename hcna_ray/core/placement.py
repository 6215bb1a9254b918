"""Where a task may run, where it runs best, and why it does not run: pure functions.

The steps are those of a batch scheduler: a snapshot of workers and lanes goes in; workers are
filtered (feasible), ordered (ranked) and chosen (assigned); for what is left, the same filter says
in plain words which need excluded how many workers and what would help.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hcna_ray.core.models import (
    ACCEPTING,
    UNHEARD,
    LaneKey,
    Needs,
    Task,
    WorkerState,
    WorkerView,
)

#: Sums of amounts such as 0.1 do not come out even. Ray itself counts in steps of 0.0001.
ROUNDING = 1e-6


class Exclusion(NamedTuple):
    """Why one worker cannot run something. ``clause`` names the need, ``detail`` what it has."""

    clause: str
    detail: str


@dataclass(frozen=True, slots=True)
class PendingReason:
    """Why a task waits, for people: a stable code, one sentence, and what would help."""

    code: str
    message: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """Room for work on one worker: an idle slot, or its agent's room for heavy attempts."""

    worker: str
    #: Slot number, or `HEAVY_SLOT`.
    slot: int
    #: Most items it takes at once.
    items_max: int
    #: Running time it takes at once; the first item is taken whatever its length.
    budget_ms: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """One decision: this task goes to this opening."""

    task: Task
    opening: Opening


def exclusion(needs: Needs, task_type: str, worker: WorkerView) -> Exclusion | None:
    """Return the first need that ``worker`` can never meet as it stands, or ``None``.

    Capacity counts as a whole here: a busy worker is feasible, it just has no room now.
    """
    return _another(needs, worker) or absence(worker) or shortcoming(needs, task_type, worker)


def absence(worker: WorkerView) -> Exclusion | None:
    """Return why ``worker`` can run nothing just now, or ``None``."""
    if worker.state not in ACCEPTING:
        return Exclusion("state=online", state_in_words(worker))
    if worker.trouble:
        return Exclusion("state=online", worker.trouble)
    return None


def _another(needs: Needs, worker: WorkerView) -> Exclusion | None:
    if needs.worker is not None and needs.worker not in (worker.name, worker.node_id):
        return Exclusion(f"worker={needs.worker}", f"is {worker.name}")
    return None


def shortcoming(needs: Needs, task_type: str, worker: WorkerView) -> Exclusion | None:
    """Return the first need that ``worker`` does not meet by what it is, or ``None``.

    That does not change before it registers again.
    """
    if another := _another(needs, worker):
        return another
    if task_type not in worker.task_types:
        return Exclusion(f"task_type={task_type}", "does not know this type")
    totals = dict(worker.resources)
    for name, wanted, has in (
        ("cpu", needs.cpu, worker.cpu),
        ("mem_gb", needs.mem_gb, worker.mem_gb),
        ("gpu", needs.gpu, worker.gpu),
        *((name, amount, totals.get(name, 0.0)) for name, amount in needs.resources),
    ):
        if wanted > has:
            return Exclusion(f"{name}>={wanted:g}", f"has {has:g}")
    labels = dict(worker.labels)
    for name, value in needs.labels:
        if labels.get(name) != value:
            detail = f"has {name}={labels[name]}" if name in labels else f"has no {name}"
            return Exclusion(f"label {name}={value}", detail)
    return None


def age_in_words(seconds: float) -> str:
    """Return an age as people say it: ``42 s``, ``3 min``, ``5 h``, ``2 days``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} days"


def state_in_words(worker: WorkerView) -> str:
    """Return what a worker is, as follows its name: ``is asleep, last seen 3 min ago``."""
    if worker.state in UNHEARD:
        return f"is {worker.state.value}, last seen {age_in_words(worker.last_seen_age_s)} ago"
    return f"is {worker.state.value}"


def has_room(needs: Needs, worker: WorkerView) -> bool:
    """Return whether a heavy attempt fits into what is free on ``worker`` now."""
    wanted = [("cpu", needs.cpu), ("mem_gb", needs.mem_gb), ("gpu", needs.gpu), *needs.resources]
    return all(amount <= worker.free(name) + ROUNDING for name, amount in wanted if amount)


def load(live: int, cpu: float) -> float:
    """Return how loaded a worker would be with one more: leases by core. Less is better.

    Of two idle workers the stronger one comes first.
    """
    return (live + 1) / max(cpu, 1.0)


def occupy(used: Needs, needs: Needs, sign: int = 1) -> Needs:
    """Return ``used`` with ``needs`` added (or, with ``sign=-1``, taken away)."""
    amounts = dict(used.resources)
    for name, amount in needs.resources:
        amounts[name] = amounts.get(name, 0.0) + sign * amount
    return replace(
        used,
        cpu=used.cpu + sign * needs.cpu,
        mem_gb=used.mem_gb + sign * needs.mem_gb,
        gpu=used.gpu + sign * needs.gpu,
        resources=tuple(sorted((n, a) for n, a in amounts.items() if abs(a) > ROUNDING)),
    )


def assign(
    workers: Mapping[str, WorkerView],
    lanes: Mapping[LaneKey, Sequence[Task]],
    openings: Sequence[Opening],
    *,
    estimates_ms: Mapping[str, float],
    starts_max: int,
) -> list[Assignment]:
    """Match waiting tasks to openings, in dispatch order.

    Args:
        workers: The snapshot, by name.
        lanes: The first ready tasks of each lane, in dispatch order.
        openings: Idle slots and agents with room. A slot's items run one after the other.
        estimates_ms: Expected running time by task type; a type that is missing is unknown, so
            a slot takes just one of it.
        starts_max: How many more attempts may run at once in the whole cluster. The first item
            of a slot and every heavy attempt counts as one.

    Returns:
        Assignments in dispatch order: ascending ``(dispatch_key, seq)`` over all lanes. Nothing is
        assigned out of order within a lane, and a lane that fits nowhere does not hold up others.
    """
    book = _Book(workers, openings, estimates_ms, starts_max)
    queue = [
        (tasks[0].dispatch_key, tasks[0].seq, index, 0)
        for index, tasks in enumerate(lanes.values())
        if tasks
    ]
    heapq.heapify(queue)
    keys, rows = list(lanes.keys()), list(lanes.values())
    chosen: list[Assignment] = []
    while queue and book.open:
        _, _, index, position = heapq.heappop(queue)
        task = rows[index][position]
        opening = book.choose(keys[index])
        if opening is None:
            continue  # The lane fits nowhere now; its later tasks need the same.
        chosen.append(Assignment(task, opening))
        if position + 1 < len(rows[index]):
            following = rows[index][position + 1]
            heapq.heappush(queue, (following.dispatch_key, following.seq, index, position + 1))
    return chosen


@dataclass(slots=True)
class _Room:
    """What one opening still has, and how good it is. Ranks only ever get worse."""

    opening: Opening
    items: int = 0
    spent_ms: float = 0.0


class _Book:
    """Running tally of one `assign`: what each opening has taken and each worker still has."""

    def __init__(
        self,
        workers: Mapping[str, WorkerView],
        openings: Sequence[Opening],
        estimates_ms: Mapping[str, float],
        starts_max: int,
    ) -> None:
        self._workers = dict(workers)
        self._live = {name: worker.live for name, worker in workers.items()}
        self._estimates = estimates_ms
        self._starts_left = starts_max
        self._rooms = [_Room(opening) for opening in openings]
        #: For each lane, the openings that could take one of it, the best first. A rank may have
        #: got worse since it was written down, and room may have gone; neither ever comes back.
        self._heaps: dict[LaneKey, list[tuple[tuple[float, ...], int]]] = {}
        self.open = bool(openings)

    def choose(self, lane: LaneKey) -> Opening | None:
        """Take the best opening for one task of ``lane``, or ``None`` when there is none."""
        heap = self._heaps.get(lane)
        if heap is None:
            heap = self._heaps[lane] = self._able(lane)
        while heap:
            written, index = heap[0]
            room = self._rooms[index]
            if not self._fits(lane, room):
                heapq.heappop(heap)
                continue
            rank = self._rank(room)
            if rank != written:
                heapq.heapreplace(heap, (rank, index))
                continue
            self._take(lane, room)
            return room.opening
        return None

    def _able(self, lane: LaneKey) -> list[tuple[tuple[float, ...], int]]:
        """Return the openings on workers that could ever run a lane's tasks, as a heap."""
        able: dict[str, bool] = {}
        heap: list[tuple[tuple[float, ...], int]] = []
        for index, room in enumerate(self._rooms):
            name = room.opening.worker
            if lane.needs.heavy != (room.opening.slot < 0):
                continue
            if name not in able:
                worker = self._workers[name]
                able[name] = exclusion(lane.needs, lane.task_type, worker) is None
            if able[name]:
                heap.append((self._rank(room), index))
        heapq.heapify(heap)
        return heap

    def _fits(self, lane: LaneKey, room: _Room) -> bool:
        opening = room.opening
        if room.items >= opening.items_max:
            return False
        if opening.slot < 0:
            return self._starts_left > 0 and has_room(lane.needs, self._workers[opening.worker])
        if room.items == 0:
            return self._starts_left > 0
        expected = self._estimates.get(lane.task_type)
        return expected is not None and room.spent_ms + expected <= opening.budget_ms

    def _rank(self, room: _Room) -> tuple[float, ...]:
        """Lower is better: the emptier slot, then the less loaded worker, then the lower slot."""
        opening = room.opening
        loaded = load(self._live[opening.worker], self._workers[opening.worker].cpu)
        return (room.items if opening.slot >= 0 else 0, loaded, opening.slot)

    def _take(self, lane: LaneKey, room: _Room) -> None:
        name, heavy = room.opening.worker, room.opening.slot < 0
        if heavy:
            worker = self._workers[name]
            self._workers[name] = replace(worker, used=occupy(worker.used, lane.needs))
        if heavy or room.items == 0:
            self._starts_left -= 1
        room.items += 1
        # An unknown type fills the slot: nobody should wait behind what may take long.
        room.spent_ms += self._estimates.get(lane.task_type, math.inf)
        self._live[name] += 1


def explain(
    needs: Needs,
    task_type: str,
    workers: Sequence[WorkerView],
    *,
    running: int = 0,
    running_max: int | None = None,
) -> PendingReason:
    """Say why a ready task has not been placed: which need excluded how many workers.

    Args:
        needs: What the task needs now.
        task_type: Its type.
        workers: Every worker on record.
        running: Attempts that run in the whole cluster.
        running_max: How many may, or ``None``.
    """
    if not workers:
        return PendingReason(
            "no_workers",
            "No healthy workers available: none has joined yet",
            "start one: hcna up",
        )
    found = [(worker, exclusion(needs, task_type, worker)) for worker in workers]
    able = [worker for worker, why in found if why is None]
    if not able:
        excluded = [(worker, why) for worker, why in found if why is not None]
        return _explain_excluded(needs, task_type, excluded)
    names = ", ".join(worker.name for worker in able)
    if running_max is not None and running >= running_max:
        return PendingReason(
            "max_concurrent_tasks",
            f"waiting for its turn: {running} of at most {running_max} attempts run",
            "wait, or raise moderator.scheduling.max_concurrent_tasks",
        )
    if needs.heavy and not any(has_room(needs, worker) for worker in able):
        return PendingReason(
            "no_room",
            f"waiting for room: {names} could run it but has too little free now "
            f"({_free(needs, able[0])})",
            "wait for running tasks to end, or ask for less",
        )
    return PendingReason(
        "waiting_turn", f"waiting for its turn on {names}", "wait, or raise its priority"
    )


def _free(needs: Needs, worker: WorkerView) -> str:
    names = [name for name in ("cpu", "mem_gb", "gpu") if getattr(needs, name)]
    names += [name for name, _ in needs.resources]
    return ", ".join(f"{worker.name} has {name} {worker.free(name):g} free" for name in names)


def _explain_excluded(
    needs: Needs, task_type: str, excluded: Sequence[tuple[WorkerView, Exclusion]]
) -> PendingReason:
    """Every worker is excluded: say who could run it and is away, else what they all lack.

    What a worker lacks comes before its state: a task that needs a GPU is not helped by waking a
    worker without one.
    """
    if needs.worker is not None:
        named = [pair for pair in excluded if needs.worker in (pair[0].name, pair[0].node_id)]
        if not named:
            return PendingReason(
                "waiting_worker",
                f"waiting for worker {needs.worker}, which has never joined or was forgotten "
                f"(workers: {', '.join(worker.name for worker, _ in excluded)})",
                f"join {needs.worker}, or drop requires.worker",
            )
        excluded = named
    away: list[tuple[WorkerView, Exclusion]] = []
    lacking: list[WorkerView] = []
    clauses: dict[str, list[str]] = {}
    for worker, why in excluded:
        lack = shortcoming(needs, task_type, worker)
        if lack is None:
            away.append((worker, why))
        else:
            lacking.append(worker)
            clauses.setdefault(lack.clause, []).append(f"{worker.name} {lack.detail}")
    parts = [
        f"needs {clause}: excludes {len(who)} of {len(excluded)} "
        f"worker{'s' if len(excluded) > 1 else ''} ({'; '.join(who)})"
        for clause, who in clauses.items()
    ]
    if not away:
        return PendingReason(
            "unplaceable",
            "waiting: " + "; ".join(parts),
            _fix_for_needs(needs, task_type, lacking),
        )
    which = " that have what it needs" if lacking else ""
    states = "; ".join(f"{worker.name} {why.detail}" for worker, why in away)
    return PendingReason(
        "no_healthy_workers",
        "; ".join((f"No healthy workers available{which}: {states}", *parts)),
        _fix_for_states([worker for worker, _ in away]),
    )


def _fix_for_needs(needs: Needs, task_type: str, workers: Sequence[WorkerView]) -> str:
    """Return what helps where every worker lacks something. A type is installed, not joined."""
    lacks = {
        worker.name: shortcoming(
            needs, task_type, replace(worker, task_types=frozenset({task_type}))
        )
        for worker in workers
    }
    package = f"install the package that has {task_type}"
    untaught = [name for name, lack in lacks.items() if lack is None]
    wanted = dict.fromkeys(
        lack.clause
        for worker in workers
        if (lack := lacks[worker.name]) is not None and task_type in worker.task_types
    )
    steps: list[str] = []
    if untaught:
        steps.append(f"{package} on {' or '.join(untaught)}, then hcna down and hcna up there")
    if wanted:
        steps += [f"join a worker with {' and '.join(wanted)}", "drop the need"]
    if not steps:
        # Who lacks the type lacks more than that.
        others = dict.fromkeys(lack.clause for lack in lacks.values() if lack is not None)
        steps.append(f"{package} on a worker with {' and '.join(others)}")
    return ", or ".join(steps)


def _fix_for_states(workers: Sequence[WorkerView]) -> str:
    states = {worker.state for worker in workers}
    held = {WorkerState.CORDONED, WorkerState.DRAINING}
    if states & held:
        name = next(worker.name for worker in workers if worker.state in held)
        return f"let {name} take work again: hcna workers uncordon {name}"
    if states & ACCEPTING:
        return "put its machine right (free space on its disk), or join another worker"
    if states == {WorkerState.GONE}:
        return "start the worker again (hcna up there), or join another one"
    return (
        "wait: its tasks start when it is back; wake its machine (hcna up there), "
        "use on_disconnect replace, or join another worker"
    )

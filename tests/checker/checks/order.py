"""C9: pins, ordering keys, concurrency keys and dispatch order, as far as a log can prove them.

Dispatch order (G5) is ascending ``due_at - priority * ageing_step_s``, then accept sequence. The
log holds grants in the order of decisions, but neither slots nor which slots were free, so two
claims are made, both exact:

*Same lane*. Two tasks with the same queue, type and needs fit the same places at all times. If one
of them is granted while the other stood ready with a smaller place in the order, order was broken.

*First grant of a worker in a round*. Lines of one decision round carry the same instant. The first
task without sizes granted to a worker in a round took an empty slot there; an empty slot fits every
task of that sort whose type, labels and worker the machine meets. So any such task that stood ready
with a smaller place should have had it. Later grants of a round may go to a slot that others have
partly filled, which the log does not show: of those only the first claim is made.

*Ready* is claimed only of a task whose last line left it queued without a lease, that names no
ordering or concurrency key, is not kept for a silent worker, has not passed its ``expires_at``, and
whose queue was not paused. A place is known from the task's acceptance, its replay, or its last
row; a task between two retries has a place that the log does not tell, and nothing is claimed.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.checker.checks.endings import could_run
from tests.checker.checks.leases import CLOSING
from tests.checker.findings import Outcome
from tests.checker.inputs import TERMINAL, Dump, Fact, Run, TaskRow

#: Seconds of waiting that one step of priority is worth, unless the schedule says otherwise.
AGEING_STEP_S = 60.0
#: Sums of instants near 2^31 come out even to a fraction of a microsecond.
ROUNDING_S = 1e-5
#: Lines that leave a task queued without a lease.
_LEAVES_READY = frozenset({"accepted", "queued", "returned", "lost", "replayed", "unpinned"})
_NEW_PLACE = frozenset({"accepted", "retry_scheduled", "replayed"})


def in_order(run: Run) -> Outcome:
    """C9: see this module."""
    out = Outcome("C9")
    dump = run.dump
    assert dump is not None
    _pins(run, dump, out)
    _ordering_keys(dump, out)
    _concurrency_keys(run, dump, out)
    _parents(run, dump, out)
    _places(run, dump, out)
    _Dispatch(run, dump, out).follow()
    return out


def _names(dump: Dump) -> dict[str, set[str]]:
    """Return every name of each worker, by each of its names."""
    found: dict[str, set[str]] = {}
    for row in dump.rows["worker"]:
        names = {str(one) for one in (row.raw["name"], row.raw.get("node_id")) if one}
        for name in names:
            found[name] = names
    return found


def _pins(run: Run, dump: Dump, out: Outcome) -> None:
    """A task that names a worker was granted to it, and ran on it, alone."""
    names = _names(dump)
    pins = {
        row.id: (row, row.needs["worker"]) for row in dump.tasks.values() if row.needs.get("worker")
    }
    for fact in dump.facts:
        if fact.kind == "granted" and fact.task in pins:
            row, wanted = pins[fact.task]
            out.examined += 1
            if fact.worker not in names.get(wanted, {wanted}):
                out.report(fact.task, f"pinned to {wanted}, granted to {fact.worker}", row, fact)
    for effect in run.effects or ():
        if effect.task in pins:
            row, wanted = pins[effect.task]
            out.examined += 1
            if effect.node not in names.get(wanted, {wanted}):
                out.report(effect.task, f"pinned to {wanted}, ran on {effect.node}", row, effect)


def _ordering_keys(dump: Dump, out: Outcome) -> None:
    """Of an ordering key one task is out at a time, and the next is the next that was accepted.

    A replayed task has lost its place in the line, so only that it is not out beside another.
    """
    keys = {
        row.id: (str(row.get("ordering_key")), row)
        for row in dump.tasks.values()
        if row.get("ordering_key")
    }
    lines: dict[str, dict[str, _Member]] = defaultdict(dict)
    for fact in dump.facts:
        if fact.task not in keys:
            continue
        key, row = keys[fact.task]
        line = lines[key]
        if fact.kind in TERMINAL:
            line.pop(fact.task, None)
            continue
        member = line.setdefault(fact.task, _Member(row))
        member.replayed |= fact.kind == "replayed"
        if fact.kind != "granted":
            continue
        out.examined += 1
        for other in line.values():
            if other is member:
                continue
            if other.grant is not None:
                out.report(
                    fact.task, f"two tasks of ordering key {key!r} are out", other.grant, fact
                )
            elif other.row.seq < row.seq and not other.replayed:
                out.report(
                    fact.task, f"overtook {other.row.id} of ordering key {key!r}", other.row, fact
                )
        member.grant = fact


@dataclass(slots=True)
class _Member:
    """One open task of an ordering key. Once granted it is out, also between two attempts."""

    row: TaskRow
    replayed: bool = False
    grant: Fact | None = None


def _concurrency_keys(run: Run, dump: Dump, out: Outcome) -> None:
    """No more leases of a concurrency key at once than the settings allow."""
    default, limits = (
        run.setting("concurrency_default", None),
        run.setting("concurrency_limits", {}),
    )
    keys = {row.id: row.get("concurrency_key") for row in dump.tasks.values()}
    live: dict[str, set[str]] = defaultdict(set)
    if default is None:
        used = len({key for key in keys.values() if key})
        out.note(used, "concurrency keys were used, and the schedule does not say their limit")
        return
    for fact in dump.facts:
        key = keys.get(fact.task)
        if not key:
            continue
        if fact.kind == "granted":
            out.examined += 1
            live[key].add(fact.task)
            limit = int(limits.get(key, default))
            if len(live[key]) > limit:
                out.report(fact.task, f"more than {limit} leases of concurrency key {key!r}", fact)
        elif fact.kind in CLOSING:
            live[key].discard(fact.task)


def _parents(run: Run, dump: Dump, out: Outcome) -> None:
    """Nothing is granted before all that it depends on has completed.

    Unless it was replayed: whoever takes a rejected task back means it to run.
    """
    completed = {fact.task: fact for fact in reversed(dump.facts) if fact.kind == "completed"}
    for row in dump.tasks.values():
        facts = run.facts_by_task.get(row.id, [])
        first = next((fact for fact in facts if fact.kind in ("granted", "replayed")), None)
        if first is None or first.kind == "replayed":
            continue
        for parent in row.get("depends_on", []):
            if parent not in run.facts_by_task:
                continue  # Pruned: a parent without dependents may be.
            out.examined += 1
            done = completed.get(parent)
            if done is None or done.number > first.number:
                out.report(row.id, f"was granted, and {parent} had not completed", row, first)


def _places(run: Run, dump: Dump, out: Outcome) -> None:
    """The place in the order is what the rule makes of due time and priority, and stays."""
    step = float(run.setting("ageing_step_s", AGEING_STEP_S))
    for row in dump.tasks.values():
        facts = run.facts_by_task.get(row.id, [])
        if row.get("due_at") is None or row.get("dispatch_key") is None or not facts:
            continue
        out.examined += 1
        due = float(row.get("due_at"))
        if abs(float(row.get("dispatch_key")) - _place(due, row, step)) > ROUNDING_S:
            out.report(row.id, "its place in the order is not due_at - priority * step", row)
        if facts[0].kind == "accepted" and not any(fact.kind in _NEW_PLACE for fact in facts[1:]):
            first = max(facts[0].at, float(row.get("run_at", -math.inf)))
            if abs(due - first) > ROUNDING_S:
                out.report(row.id, "its due time changed without a retry", facts[0], row)


def _place(due: float, row: TaskRow, step: float) -> float:
    return due - float(row.get("priority", 5)) * step


@dataclass(slots=True)
class _Lane:
    """Tasks alike to the scheduler, and those of them that stand ready."""

    row: TaskRow
    sized: bool
    #: Some of its tasks may be taken out of the order at the last moment.
    mixed: bool = False
    #: (place, accept sequence, task) of ready tasks; some are ready no more.
    heap: list[tuple[float, int, str]] = field(default_factory=list)


class _Dispatch:
    """Follows the log and holds every grant against what stood ready."""

    def __init__(self, run: Run, dump: Dump, out: Outcome) -> None:
        self._run, self._dump, self._out = run, dump, out
        self._step = float(run.setting("ageing_step_s", AGEING_STEP_S))
        self._lane_of: dict[str, str] = {}
        self._lanes: dict[str, _Lane] = {}
        self._worker = {row.raw["name"]: row.raw for row in dump.rows["worker"]}
        self._pauses = _pauses(dump)
        self._last_place = self._find_last_places()
        self._place: dict[str, float | None] = {}
        self._ready: dict[str, tuple[float, int, str]] = {}
        for row in dump.tasks.values():
            self._enter(row)
        self._round: float | None = None
        self._served: set[str] = set()
        #: Whether lines of this round are not in the log any more: their tasks were pruned.
        self._gaps = False
        self._unplaced = self._unknown = 0

    def _enter(self, row: TaskRow) -> None:
        needs = row.needs
        name = json.dumps([row.get("queue"), row.get("task_type"), needs], sort_keys=True)
        lane = self._lanes.get(name)
        if lane is None:
            sized = any(needs.get(one) for one in ("cpu", "mem_gb", "gpu", "resources", "isolated"))
            lane = self._lanes[name] = _Lane(row, sized)
        lane.mixed |= bool(row.get("concurrency_key")) or row.get("expires_at") is not None
        self._lane_of[row.id] = name

    def _find_last_places(self) -> dict[str, int]:
        """Return the number of the line that gave each task its last place."""
        return {fact.task: fact.number for fact in self._dump.facts if fact.kind in _NEW_PLACE}

    def follow(self) -> None:
        last = 0
        for fact in self._dump.facts:
            row = self._dump.tasks.get(fact.task)
            if fact.at != self._round:
                self._round, self._served, self._gaps = fact.at, set(), False
            self._gaps |= row is None or fact.number != last + 1
            last = fact.number
            if row is None:
                continue
            if fact.kind in _NEW_PLACE:
                self._place[fact.task] = self._new_place(fact, row)
            if fact.kind == "granted":
                self._ready.pop(fact.task, None)
                self._judge(fact, row)
            elif fact.kind in _LEAVES_READY and fact.state == "queued":
                self._stand_ready(row)
            elif fact.kind != "cancel_requested":
                self._ready.pop(fact.task, None)
        self._out.note(
            self._unplaced, "grants are of tasks whose place between two retries is not in the log"
        )
        self._out.note(self._unknown, "grants went to workers that the dump does not describe")

    def _new_place(self, fact: Fact, row: TaskRow) -> float | None:
        if fact.kind == "accepted":
            return _place(max(fact.at, float(row.get("run_at", -math.inf))), row, self._step)
        if fact.kind == "replayed":
            return _place(fact.at, row, self._step)
        if self._last_place[fact.task] == fact.number and row.get("dispatch_key") is not None:
            return float(row.get("dispatch_key"))
        return None

    def _stand_ready(self, row: TaskRow) -> None:
        place = self._place.get(row.id)
        if place is None or row.get("ordering_key") or row.get("concurrency_key"):
            return
        if row.get("on_disconnect") == "wait":
            return
        entry = self._ready[row.id] = (place, row.seq, row.id)
        heapq.heappush(self._lanes[self._lane_of[row.id]].heap, entry)

    def _judge(self, fact: Fact, row: TaskRow) -> None:
        self._out.examined += 1
        name = self._lane_of[row.id]
        lane = self._lanes[name]
        worker = fact.worker or ""
        first = not lane.sized and worker not in self._served and not self._gaps
        if not lane.sized:
            self._served.add(worker)
        place = self._place.get(row.id)
        if place is None or row.get("on_disconnect") == "wait":
            self._unplaced += place is None
            return
        self._compare(fact, row, place, lane)
        if not first:
            return
        record = self._worker.get(worker)
        if record is None or record.get("task_types") is None:
            self._unknown += 1
            return
        for other_name, other in self._lanes.items():
            if other_name == name or other.sized or other.mixed:
                continue
            if could_run(_spec_only(other.row), record):
                self._compare(fact, row, place, other)

    def _compare(self, fact: Fact, row: TaskRow, place: float, lane: _Lane) -> None:
        while lane.heap:
            entry = lane.heap[0]
            other = self._dump.tasks[entry[2]]
            expired = float(other.get("expires_at", math.inf)) <= fact.at
            if self._ready.get(entry[2]) != entry or expired:
                heapq.heappop(lane.heap)
                continue
            if _paused_at(self._pauses, str(other.get("queue")), fact.at):
                return
            if _before(entry, (place, row.seq)):
                self._out.report(
                    row.id, f"was granted before {other.id}, which stood ready first", other, fact
                )
            return


def _before(one: tuple[float, int, str], other: tuple[float, int]) -> bool:
    if one[0] == other[0]:
        return one[1] < other[1]
    return one[0] < other[0] - ROUNDING_S


def _spec_only(row: TaskRow) -> TaskRow:
    """Return the row without what holds of this one task only."""
    raw: dict[str, Any] = {**row.raw, "pinned_to": None}
    return TaskRow(where=row.where, text=row.text, id=row.id, seq=row.seq, state=row.state, raw=raw)


def _pauses(dump: Dump) -> dict[str, list[tuple[float, float]]]:
    """Return when each queue was paused, by the audit log."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    since: dict[str, float] = {}
    for row in sorted(dump.rows["audit"], key=lambda one: int(one.raw["number"])):
        queue = str(row.raw.get("target"))
        if row.raw["action"] == "queue.pause":
            since.setdefault(queue, float(row.raw["at"]))
        elif row.raw["action"] == "queue.resume" and queue in since:
            found[queue].append((since.pop(queue), float(row.raw["at"])))
    for queue, start in since.items():
        found[queue].append((start, math.inf))
    return found


def _paused_at(pauses: dict[str, list[tuple[float, float]]], queue: str, at: float) -> bool:
    return any(start <= at <= end for start, end in pauses.get(queue, ()))

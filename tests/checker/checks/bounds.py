"""C13: times of recovery, times of answers, and resources over a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.checker.checks.leases import tenures
from tests.checker.findings import Outcome
from tests.checker.inputs import TRY_LATER, Fault, Row, Run

#: Shipped bounds (G11, G7, G9), in seconds. A schedule's ``bounds_s`` replaces single ones.
BOUNDS_S: dict[str, float] = {
    "moderator_accepting": 10.0,
    "worker_requeued": 35.0,
}
#: Faults that end a worker's leases, and whom they strike.
_WORKER_FAULTS = frozenset({"kill", "partition", "reboot", "power_loss"})


@dataclass(frozen=True, slots=True)
class _Mark:
    where: str
    text: str


def within_bounds(run: Run) -> Outcome:
    """C13: what the run measured, and what the evidence itself shows, is within the bounds.

    ``measured`` in the schedule: ``{name, from, to, max_s}``, ``to`` null for what never came.
    From the evidence: after a moderator was killed submissions are accepted in time (`_accepting`);
    leases on a struck worker end in time (`_requeued`). Bounds of ``refusal_p99`` and
    ``cancel_p99`` are checked where ``bounds_s`` names them. ``limits`` bounds samples by ``max``,
    and by slope (``per_hour_max``, least squares over at least 10 samples).
    """
    out = Outcome("C13")
    schedule = run.schedule
    assert schedule is not None
    bounds = {**BOUNDS_S, **schedule.get("bounds_s", {})}
    for one in schedule.get("measured", []):
        _measured(out, one)
    faults = run.faults
    for index, fault in enumerate(faults):
        following = min((one.at for one in faults[index + 1 :]), default=math.inf)
        if fault.target == "moderator" and fault.kind == "kill":
            _accepting(run, out, fault, bounds["moderator_accepting"], following)
        elif fault.kind in _WORKER_FAULTS and run.dump is not None:
            _requeued(run, out, fault, bounds["worker_requeued"])
    _answers(run, out, bounds)
    _resources(run, out, schedule.get("limits", {}))
    if not out.examined:
        out.missing = "nothing was measured"
    return out


def _measured(out: Outcome, one: dict[str, Any]) -> None:
    out.examined += 1
    took = math.inf if one.get("to") is None else float(one["to"]) - float(one["from"])
    if took > float(one["max_s"]):
        mark = _Mark("schedule.json", str(one))
        words = "never came" if math.isinf(took) else f"took {took:.2f} s"
        out.report(None, f"{one['name']}: {words}, allowed are {one['max_s']} s", mark)


def _accepting(run: Run, out: Outcome, fault: Fault, bound: float, following: float) -> None:
    """Somebody who asks is accepted when the bound is over (if nothing else was done meanwhile).

    Shown by a submission that was sent after the fault and accepted in time. Broken by one that
    failed although it was still waiting, or was only called, after the bound; a client that asked
    before and gave up proves nothing.
    """
    end = fault.at + bound + run.clock_error_s
    asked = [op for op in run.submits() if fault.at <= op.t0 < following]
    if any(op.ok and op.returned <= end for op in asked):
        out.examined += 1
        return
    late = [op for op in asked if op.returned >= end and (op.unknown or op.status == 503)]
    late = [op for op in late if op.returned < following or op.t1 is None]
    if not late or end >= following:
        out.note(1, f"kill of the moderator at {fault.at:.1f}: nobody asked about the bound")
        return
    out.examined += 1
    out.report(None, f"not accepting {bound:g} s after the moderator was killed", *late[:2])


def _requeued(run: Run, out: Outcome, fault: Fault, bound: float) -> None:
    """Leases that a struck worker held have ended in time."""
    assert run.dump is not None
    error = run.clock_error_s
    if fault.until is not None and fault.until < fault.at + bound and fault.kind == "partition":
        return  # Healed before the leases had to end.
    if any(
        other.target in ("moderator", "all", "head")
        and fault.at - bound <= other.at <= fault.at + bound
        for other in run.faults
        if other is not fault
    ):
        # A new moderator gives every session one full lease time.
        out.note(1, f"{fault.kind} of {fault.target} near one of the moderator: not timed")
        return
    for one in tenures(run.dump):
        if one.granted.worker != fault.target or one.granted.at > fault.at - error:
            continue
        if one.ended is not None and one.ended.at < fault.at:
            continue
        out.examined += 1
        ended = math.inf if one.ended is None else one.ended.at
        if ended > fault.at + bound + error and run.dump.taken_at > fault.at + bound + error:
            out.report(
                one.task,
                f"its lease outlived {fault.kind} of {fault.target} by more than {bound:g} s",
                one.granted,
                one.ended,
            )


def _answers(run: Run, out: Outcome, bounds: dict[str, float]) -> None:
    refusals = [op for op in run.history or () if op.status in TRY_LATER and op.t1 is not None]
    if "refusal_p99" in bounds and refusals:
        ranked = sorted(refusals, key=lambda op: op.returned - op.t0)
        worst = ranked[rank(len(ranked), 0.99)]
        out.examined += len(ranked)
        if worst.returned - worst.t0 > bounds["refusal_p99"]:
            took = worst.returned - worst.t0
            out.report(None, f"p99 of {len(ranked)} refusals is {took * 1000:.1f} ms", worst)
    if "cancel_p99" in bounds:
        took_s = []
        for facts in run.facts_by_task.values():
            asked = next((f for f in facts if f.kind == "cancel_requested"), None)
            done = next((f for f in facts if f.kind == "cancelled"), None)
            if asked is not None and done is not None:
                took_s.append((done.at - asked.at, done))
        took_s.sort(key=lambda pair: pair[0])
        out.examined += len(took_s)
        if took_s and took_s[rank(len(took_s), 0.99)][0] > bounds["cancel_p99"]:
            took, fact = took_s[rank(len(took_s), 0.99)]
            out.report(fact.task, f"p99 of {len(took_s)} cancels is {took:.1f} s", fact)


def rank(count: int, share: float) -> int:
    """Return the index of the nearest-rank percentile of ``count`` sorted values."""
    return max(0, math.ceil(share * count) - 1)


def _resources(run: Run, out: Outcome, limits: dict[str, dict[str, float]]) -> None:
    if not limits:
        return
    if run.samples is None:
        out.notes.append("limits are given, and there are no samples*.jsonl")
        return
    series: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in run.samples:
        for name in limits:
            if isinstance(row.raw.get(name), int | float):
                series[str(row.raw["name"]), name].append(row)
    for (process, name), rows in series.items():
        out.examined += len(rows)
        limit = limits[name]
        most = max(rows, key=lambda row: float(row.raw[name]))
        if "max" in limit and float(most.raw[name]) > limit["max"]:
            out.report(None, f"{process}: {name} was {most.raw[name]}", most)
        if "per_hour_max" in limit:
            if len(rows) < 10:
                out.note(len(rows), f"samples of {process} {name}: too few for a slope")
                continue
            slope = 3600.0 * least_squares(
                [(float(row.raw["t"]), float(row.raw[name])) for row in rows]
            )
            if slope > limit["per_hour_max"]:
                out.report(
                    None, f"{process}: {name} grows by {slope:.0f} an hour", rows[0], rows[-1]
                )
    for name in limits.keys() - {name for _, name in series}:
        out.notes.append(f"no sample has {name}")


def least_squares(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line through points that fits best."""
    mean_t = sum(t for t, _ in points) / len(points)
    mean_v = sum(v for _, v in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    if spread == 0.0:
        return 0.0
    return sum((t - mean_t) * (v - mean_v) for t, v in points) / spread

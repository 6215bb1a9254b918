"""C0 and C14: whether the evidence can be read, and whether the log is whole."""

from __future__ import annotations

import hashlib
import math

from tests.checker.checks.counters import is_pruned
from tests.checker.findings import Outcome
from tests.checker.inputs import Dump, Row, Run


def readable(run: Run) -> Outcome:
    """C0: every line could be read and is one that a recorder can have written."""
    out = Outcome("C0")
    out.examined = sum(len(one or ()) for one in (run.history, run.effects, run.samples)) + (
        0 if run.dump is None else len(run.dump.facts) + len(run.dump.tasks)
    )
    for problem in run.problems:
        out.report(None, problem.message, problem)
    out.notes += run.remarks
    return out


def log_is_whole(run: Run) -> Outcome:
    """C14: numbers of the log rise without a gap to the last one; time does not run back in it.

    Every stored task begins with its acceptance. Where audit lines are chained (``prev``, ``hash``
    and the hashed ``body``: SHA-256 of ``prev`` followed by ``body``) the chain is followed; where
    they are not, their numbers must have no gap. Of a pruned store gaps in the log are expected; a
    restore whose ``last_fact`` is told may leave out the numbers that follow it.
    """
    out = Outcome("C14")
    dump = run.dump
    assert dump is not None
    pruned = is_pruned(run)
    _numbers(run, dump, out, pruned)
    stored, last_seq = len(dump.tasks), dump.numbers.get("last_seq")
    if last_seq is not None and last_seq != stored and not pruned:
        out.report(None, f"{last_seq} tasks were accepted, {stored} are stored")
    latest = -math.inf
    for fact in dump.facts:
        if fact.at > dump.taken_at + run.clock_error_s:
            out.report(fact.task, "a line from after the log was read", fact)
        if fact.kind == "started":
            continue  # Told by the worker's clock.
        if fact.at < latest - run.clock_error_s:
            out.report(fact.task, f"the log goes back in time by {latest - fact.at:.3f} s", fact)
        latest = max(latest, fact.at)
    for row in dump.tasks.values():
        out.examined += 1
        facts = run.facts_by_task.get(row.id, [])
        if not facts or facts[0].kind != "accepted":
            out.report(row.id, "its log does not begin with its acceptance", row, *facts[:1])
    if not pruned:
        for task, facts in run.facts_by_task.items():
            if task not in dump.tasks and not _acked(run, task):
                out.report(task, "has a log, and is stored nowhere", facts[0])
    if pruned:
        out.notes.append("the store was pruned: gaps in its log were allowed")
    _audit(dump, out)
    return out


def _acked(run: Run, task: str) -> bool:
    return any(op.id == task and op.ok for op in run.submits())


def _numbers(run: Run, dump: Dump, out: Outcome, pruned: bool) -> None:
    before: int | None = None
    skipping = {one.raw.get("last_fact") for one in run.restores()}
    for fact in dump.facts:
        out.examined += 1
        expected = 1 if before is None else before + 1
        if before is not None and fact.number <= before:
            out.report(fact.task, f"number {fact.number} is used twice", fact)
        elif fact.number != expected and not pruned and expected - 1 not in skipping:
            out.report(fact.task, f"lines {expected} to {fact.number - 1} are gone", fact)
        before = fact.number
    last = dump.numbers.get("last_fact")
    if last is None:
        out.notes.append("the dump does not say how many lines its log has: a cut end is not seen")
    elif last != (before or 0) and not (pruned and last > (before or 0)):
        out.report(None, f"the log ends with {before}, the store counted {last}")


def _audit(dump: Dump, out: Outcome) -> None:
    rows = sorted(dump.rows["audit"], key=lambda row: int(row.raw["number"]))
    if not rows:
        return
    chained = [row for row in rows if row.raw.get("hash")]
    if chained:
        _chain(rows, out)
    else:
        out.notes.append("audit lines are not chained: only their numbers were checked")
    for before, row in zip([None, *rows], rows, strict=False):
        out.examined += 1
        expected = 1 if before is None else int(before.raw["number"]) + 1
        if int(row.raw["number"]) != expected:
            out.report(None, f"audit line {expected} is gone", row)
    last = dump.numbers.get("last_audit")
    if last is not None and last != int(rows[-1].raw["number"]):
        out.report(None, f"the audit log ends early: {last} lines were counted", rows[-1])


def _chain(rows: list[Row], out: Outcome) -> None:
    previous = ""
    for row in rows:
        out.examined += 1
        told, body = str(row.raw.get("prev") or ""), str(row.raw.get("body") or "")
        if told != previous:
            out.report(None, "an audit line does not follow the one before it", row)
        elif hashlib.sha256((told + body).encode()).hexdigest() != row.raw.get("hash"):
            out.report(None, "an audit line does not have its own hash", row)
        previous = str(row.raw.get("hash"))

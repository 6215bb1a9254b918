"""C0 and C14: whether the evidence can be read, and whether the log is whole."""

from __future__ import annotations

import hashlib
import json
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

    Every stored task begins with its acceptance. Audit lines are chained: ``hash`` is the SHA-256
    of the JSON array of `CHAINED`, the hash before it, and the line's fields. The chain begins
    behind the record ``audit_anchor``, or at its genesis; lines up to it without a hash are from
    before there was a chain. Of a pruned store gaps in the log are expected; a restore whose
    ``last_fact`` is told may leave out the numbers that follow it.
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


#: How the hashed array of an audit line begins, and the fields that follow the hash before it.
CHAINED = "hcna.audit.v1"
FIELDS = ("number", "at", "principal", "action", "target", "outcome", "detail")
#: What the very first line follows.
GENESIS = "0" * 64


def _audit(dump: Dump, out: Outcome) -> None:
    rows = sorted(dump.rows["audit"], key=lambda row: int(row.raw["number"]))
    anchors = dump.rows["audit_anchor"]
    if len(anchors) > 1:
        out.report(None, "the audit log has more than one anchor", *anchors)
    anchor = anchors[0] if anchors else None
    start = 0 if anchor is None else int(anchor.raw["number"])
    before = GENESIS if anchor is None else str(anchor.raw["hash"])
    old = [row for row in rows if int(row.raw["number"]) <= start and not row.raw.get("hash")]
    if old:
        out.notes.append(f"{len(old)} audit lines are from before the log was chained")
    _chain([row for row in rows if row not in old], start, before, out)
    last = dump.numbers.get("last_audit")
    ended = max([start, *(int(row.raw["number"]) for row in rows)])
    if last is not None and last != ended:
        out.report(None, f"the audit log ends with {ended}: {last} lines were counted", *rows[-1:])


def _chain(rows: list[Row], number: int, before: str | None, out: Outcome) -> None:
    for row in rows:
        out.examined += 1
        found = int(row.raw["number"])
        if found != number + 1:
            told = _hash(before or "", row) == row.raw.get("hash")
            if row.raw["action"] == "store.went_back" and told:
                out.notes.append(f"audit lines {number + 1} to {found - 1} went with the server")
            else:
                out.report(None, f"audit lines {number + 1} to {found - 1} are gone", row)
                before = None
        number = found
        if not row.raw.get("hash"):
            out.report(None, "an audit line has no hash", row)
        elif before is not None and _hash(before, row) != row.raw["hash"]:
            out.report(
                None, "an audit line is not what was hashed, or does not follow its neighbour", row
            )
        before = row.raw.get("hash")


def _hash(before: str, row: Row) -> str:
    values = {**row.raw, "at": float(row.raw["at"]) + 0.0}
    line = [CHAINED, before, *(values.get(name) for name in FIELDS)]
    return hashlib.sha256(json.dumps(line, separators=(",", ":")).encode()).hexdigest()

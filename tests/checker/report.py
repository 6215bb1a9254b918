"""The report: a table for people, JSON for programs, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.checker.findings import CHECKS, Outcome, violations
from tests.checker.inputs import Run

CLEAN, BROKEN, INCOMPLETE = 0, 1, 3
#: Violations of one check that the table shows in full.
SHOWN = 5


def declared(run: Run) -> dict[str, str]:
    """Return the checks that the run itself says it has no evidence for, with its reasons."""
    return {str(k): str(v) for k, v in ((run.schedule or {}).get("without") or {}).items()}


def verdict(run: Run, outcomes: Sequence[Outcome]) -> tuple[int, str]:
    """Return the exit status and one sentence.

    A check that did not run fails the run, unless the schedule names it under ``without``.
    """
    broken = violations(outcomes)
    excused = declared(run)
    left = [one.check for one in outcomes if one.missing and not excused.get(one.check)]
    seed = (run.schedule or {}).get("seed", "unknown")
    if broken:
        checks = ", ".join(dict.fromkeys(one.check for one in broken))
        return BROKEN, f"BROKEN: {len(broken)} violations of {checks} (seed {seed})"
    if left:
        return INCOMPLETE, f"INCOMPLETE: no violation, but {', '.join(left)} not checked"
    return CLEAN, f"CLEAN: 0 violations in {sum(one.examined for one in outcomes)} looks"


def as_table(run: Run, outcomes: Sequence[Outcome]) -> str:
    """Return the report for people."""
    schedule = run.schedule or {}
    rows = [
        f"run {run.folder}  seed {schedule.get('seed', '?')}  commit {schedule.get('commit', '?')}",
        f"{len(run.history or ())} requests, {len(run.effects or ())} side-effect lines, "
        f"{len(run.dump.facts) if run.dump else 0} log lines, "
        f"{len(run.dump.tasks) if run.dump else 0} tasks, {len(run.faults)} faults",
        "",
    ]
    excused = declared(run)
    for one in outcomes:
        if one.missing:
            state = "declared" if excused.get(one.check) else "NOT RUN"
        else:
            state = "BROKEN" if one.violations else "ok"
        promise = CHECKS[one.check]
        rows.append(
            f"{one.check:<4} {state:<8} {len(one.violations):>4} of {one.examined:<7} {promise}"
        )
        if one.missing:
            rows.append(f"       not checked: {one.missing}")
            if excused.get(one.check):
                rows.append(f"       the schedule says: {excused[one.check]}")
        rows += [f"       not seen: {note}" for note in one.notes]
    for one in outcomes:
        for found in one.violations[:SHOWN]:
            rows += ["", f"{found.check} {found.task or ''}: {found.message}"]
            rows += [f"    {line}" for line in found.lines]
        if len(one.violations) > SHOWN:
            rows.append(f"    and {len(one.violations) - SHOWN} more of {one.check}")
    rows += ["", verdict(run, outcomes)[1]]
    return "\n".join(rows) + "\n"


def as_json(run: Run, outcomes: Sequence[Outcome]) -> str:
    """Return the report for programs."""
    status, sentence = verdict(run, outcomes)
    schedule = run.schedule or {}
    found = {
        "format": "hcna.verdict.v1",
        "status": status,
        "verdict": sentence,
        "seed": schedule.get("seed"),
        "commit": schedule.get("commit"),
        "checks": [
            {
                "check": one.check,
                "promise": CHECKS[one.check],
                "examined": one.examined,
                "violations": len(one.violations),
                "not_checked": one.missing,
                "declared": declared(run).get(one.check),
                "not_seen": one.notes,
            }
            for one in outcomes
        ],
        "violations": [
            {
                "check": one.check,
                "task": one.task,
                "message": one.message,
                "lines": list(one.lines),
            }
            for one in violations(outcomes)
        ],
    }
    return json.dumps(found, indent=2) + "\n"

"""From a run's evidence to an outcome: the schedule that the checker reads, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.programme import Outcome
from tests.support.checked_tasks import TASK_TYPES
from tests.support.sources import ROOT, commit

#: Two clocks of one kernel, one of them steady.
CLOCK_ERROR_S = 0.25


@contextmanager
def own_environment() -> Iterator[None]:
    """Put this process's variables and import paths back as they were."""
    before, path = dict(os.environ), list(sys.path)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:] = path


def write_schedule(
    folder: Path,
    seed: int,
    *,
    started_at: float,
    drained_at: float,
    settings: Mapping[str, Any],
    workers: Sequence[str],
    canaries: Sequence[str],
    faults: Sequence[Mapping[str, Any]] = (),
    bounds: Mapping[str, float] | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
    limits: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Say what was done, and with which settings."""
    schedule = {
        "format": "hcna.schedule.v1",
        "seed": seed,
        "commit": commit(),
        "started_at": started_at,
        "drained_at": drained_at,
        "clock_error_s": CLOCK_ERROR_S,
        "settings": {"concurrency_default": 1, "ageing_step_s": 60.0, **settings},
        "workers_online": list(workers),
        "effects_task_types": list(TASK_TYPES),
        "faults": list(faults),
        "bounds_s": dict(bounds or {}),
        "measured": list(measured),
        "limits": dict(limits or {}),
        "canaries": list(canaries),
    }
    (folder / "schedule.json").write_text(json.dumps(schedule, indent=1))


def check(out: Outcome, folder: Path) -> None:
    """Have the checker read the evidence, in a process of its own."""
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.checker", str(folder), "--json", str(report)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if not report.exists():
        out.violations.append(f"the checker did not end well: {done.stderr[-2000:]}")
        return
    found = json.loads(report.read_text())
    (folder / "report.txt").write_text(done.stdout)
    for one in found["violations"]:
        text = f"{one['check']} {one['task'] or ''}: {one['message']}"
        out.violations.append("\n    ".join([text, *one["lines"]]))
    if found["status"] == 3:
        out.violations.append(f"not everything was checked: {found['verdict']}")
    out.notes.append(str(found["verdict"]))

"""``python -m tests.checker RUN_DIR``: 0 clean, 1 broken promises, 3 something left unchecked."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.checker.checks import run_all
from tests.checker.findings import Outcome
from tests.checker.inputs import Problem, Run, read_run
from tests.checker.report import CLEAN, as_json, as_table, verdict
from tests.checker.sqlite_dump import export


def check(folder: Path) -> tuple[Run, list[Outcome]]:
    """Read a run's directory and check it.

    A SQLite store (``queue.db``) is dumped beside it first, unless there is a dump.
    """
    trouble: Problem | None = None
    store = folder / "queue.db"
    if not list(folder.glob("store*.jsonl")) and store.is_file():
        try:
            export(store, folder / "store.jsonl")
        except (sqlite3.Error, LookupError, TypeError, ValueError) as error:
            trouble = Problem(store.name, "", f"the store cannot be read: {error!r}")
    run = read_run(folder)
    if trouble is not None:
        run.problems.append(trouble)
    return run, run_all(run)


def main(arguments: Sequence[str]) -> int:
    """Check a run; print a table, and write ``report.json`` or what ``--json`` names."""
    parser = argparse.ArgumentParser(prog="python -m tests.checker", description=__doc__)
    parser.add_argument("run", type=Path, help="directory with the run's evidence")
    parser.add_argument("--json", type=Path, help="where to write the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="print the verdict alone")
    chosen = parser.parse_args(arguments)
    if not chosen.run.is_dir():
        parser.error(f"{chosen.run} is no directory")
    run, outcomes = check(chosen.run)
    status, sentence = verdict(run, outcomes)
    if chosen.json is not None:
        chosen.json.write_text(as_json(run, outcomes))
    sys.stdout.write(f"{sentence}\n" if chosen.quiet else as_table(run, outcomes))
    return 0 if status == CLEAN else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

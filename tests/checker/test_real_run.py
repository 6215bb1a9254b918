"""A real run, without Ray, with the moderator killed in the middle: clean; with a cheat: not."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checker.__main__ import check
from tests.checker.findings import violations
from tests.checker.inputs import Run
from tests.checker.report import CLEAN, as_table, verdict

REPOSITORY = Path(__file__).parents[2]
SEED = 7
EVIDENCE = ("history.jsonl", "effects.jsonl", "schedule.json", "queue.db", "queue.db-wal")


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one run of some 300 tasks; takes about ten seconds."""
    folder = tmp_path_factory.mktemp("real") / "run"
    command = [sys.executable, "-m", "tests.support.checked_run", str(folder)]
    subprocess.run([*command, "--seed", str(SEED)], cwd=REPOSITORY, check=True, timeout=240)
    return folder


def test_a_real_run_is_clean(evidence: Path) -> None:
    run, outcomes = check(evidence)
    table = as_table(run, outcomes)
    print(f"\n{table}")  # noqa: T201 - what was looked at belongs beside what was not found
    assert verdict(run, outcomes)[0] == CLEAN, table
    looked_at = {one.check: one.examined for one in outcomes}
    assert min(looked_at.values()) > 0, "every check had something to look at"
    _had_trouble(run)


def _had_trouble(run: Run) -> None:
    """It was a run in which things went wrong."""
    assert run.dump is not None
    kinds = {fact.kind for fact in run.dump.facts}
    wanted = {"lost", "retry_scheduled", "cancelled", "cancel_requested", "replayed", "failed"}
    assert wanted <= kinds
    statuses = {op.status for op in run.history or ()}
    assert {202, 409, 503} <= statuses
    assert len(run.dump.tasks) >= 120
    assert [fault.target for fault in run.faults] == ["moderator"]


# -- cheats ----------------------------------------------------------------------------------------

Cheat = Callable[[sqlite3.Connection], None]
CHEATS: dict[str, tuple[str, Cheat]] = {}


def caught_by(name: str) -> Callable[[Cheat], Cheat]:
    """Register a cheat under a check that must see it."""

    def register(cheat: Cheat) -> Cheat:
        CHEATS[cheat.__name__] = (name, cheat)
        return cheat

    return register


def _one(db: sqlite3.Connection, sql: str) -> tuple[object, ...]:
    row: tuple[object, ...] = db.execute(sql + " LIMIT 1 OFFSET 3").fetchone()
    return row


@caught_by("C1")
def delete_an_accepted_task(db: sqlite3.Connection) -> None:
    (task,) = _one(db, "SELECT id FROM task WHERE state = 'completed'")
    db.execute("DELETE FROM task WHERE id = ?", (task,))


@caught_by("C1")
def delete_an_accepted_task_with_every_trace_of_it(db: sqlite3.Connection) -> None:
    task, queue, kind = _one(db, "SELECT id, queue, task_type FROM task WHERE state = 'cancelled'")
    db.execute("DELETE FROM task WHERE id = ?", (task,))
    for table in ("fact", "attempt", "idempotency_key"):
        db.execute(f"DELETE FROM {table} WHERE task_id = ?", (task,))
    _renumber(db)
    db.execute("UPDATE task SET seq = (SELECT count(*) FROM task AS t WHERE t.seq <= task.seq)")
    db.execute("UPDATE number SET value = value - 1 WHERE name IN ('last_seq', 'last_end')")
    db.execute(
        "UPDATE depth SET tasks = tasks - 1 WHERE queue = ? AND state = 'cancelled'", (queue,)
    )
    for name in ("accepted", "ended"):
        db.execute(
            "UPDATE counter SET value = value - 1 "
            "WHERE name = ? AND task_type = ? AND label IN (?, 'cancelled')",
            (name, kind, queue),
        )


@caught_by("C5")
def change_a_result(db: sqlite3.Connection) -> None:
    (task,) = _one(db, "SELECT id FROM task WHERE state = 'completed'")
    db.execute("UPDATE task SET result = ? WHERE id = ?", (b'{"ok":true}', task))


@caught_by("C5")
def record_an_end_twice(db: sqlite3.Connection) -> None:
    (number,) = _one(db, "SELECT number FROM fact WHERE kind = 'completed'")
    db.execute("UPDATE number SET value = value + 1 WHERE name = 'last_fact'")
    db.execute(
        "INSERT INTO fact SELECT (SELECT value FROM number WHERE name = 'last_fact'), task_id, "
        "kind, at, state, generation, attempt, worker, detail FROM fact WHERE number = ?",
        (number,),
    )


@caught_by("C5")
def call_a_failure_a_success(db: sqlite3.Connection) -> None:
    (task,) = _one(db, "SELECT id FROM task WHERE state = 'failed'")
    change = "SET state = 'completed', kind = NULL, error = NULL, result = ? WHERE id = ?"
    db.execute(f"UPDATE task {change}", (b"{}", task))


@caught_by("C6")
def rewrite_a_token(db: sqlite3.Connection) -> None:
    (task,) = _one(db, "SELECT task_id FROM fact WHERE kind = 'completed'")
    db.execute("UPDATE fact SET attempt = 9 WHERE task_id = ? AND attempt IS NOT NULL", (task,))


@caught_by("C11")
def forget_the_losses(db: sqlite3.Connection) -> None:
    db.execute("UPDATE task SET losses = 0")


@caught_by("C12")
def forget_a_cancel_request(db: sqlite3.Connection) -> None:
    (number,) = _one(db, "SELECT number FROM fact WHERE kind = 'cancelled' AND attempt IS NULL")
    db.execute("UPDATE fact SET kind = 'expired', state = 'expired' WHERE number = ?", (number,))


@caught_by("C9")
def grant_in_another_order(db: sqlite3.Connection) -> None:
    """Let the one granted last have been the one granted first."""
    rows = db.execute(
        "SELECT f.task_id, f.number FROM fact AS f JOIN task AS t ON t.id = f.task_id "
        "WHERE f.kind = 'granted' AND t.attempt = 1 AND t.ordering_key IS NULL "
        "AND t.concurrency_key IS NULL AND t.worker = 'W1' ORDER BY t.dispatch_key, t.seq"
    ).fetchall()
    db.execute("UPDATE task SET dispatch_key = 0, due_at = 300 WHERE id = ?", rows[-1][:1])


@caught_by("C14")
def forget_a_line_of_the_log(db: sqlite3.Connection) -> None:
    (number,) = _one(db, "SELECT number FROM fact WHERE kind = 'started'")
    db.execute("DELETE FROM fact WHERE number = ?", (number,))


@caught_by("C11")
def forget_a_line_of_the_log_and_count_anew(db: sqlite3.Connection) -> None:
    (number,) = _one(db, "SELECT number FROM fact WHERE kind = 'retry_scheduled'")
    db.execute("DELETE FROM fact WHERE number = ?", (number,))
    _renumber(db)


@caught_by("C2")
def invent_a_task(db: sqlite3.Connection) -> None:
    db.execute("UPDATE task SET id = 'task-invented' WHERE seq = 5")
    db.execute(
        "UPDATE task_spec SET body = (SELECT body FROM task_spec WHERE seq = 6) WHERE seq = 5"
    )


def _renumber(db: sqlite3.Connection) -> None:
    """Close the gaps in the log."""
    numbers = [number for (number,) in db.execute("SELECT number FROM fact ORDER BY number")]
    for new, old in enumerate(numbers, 1):
        db.execute("UPDATE fact SET number = ? WHERE number = ?", (new, old))
    db.execute("UPDATE number SET value = ? WHERE name = 'last_fact'", (len(numbers),))


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught(name: str, evidence: Path, tmp_path: Path) -> None:
    expected, cheat = CHEATS[name]
    for file in EVIDENCE:
        if (evidence / file).exists():
            shutil.copy(evidence / file, tmp_path / file)
    db = sqlite3.connect(tmp_path / "queue.db")
    with db:
        cheat(db)
    db.close()
    run, outcomes = check(tmp_path)
    assert expected in {one.check for one in violations(outcomes)}, as_table(run, outcomes)


def test_the_report_for_programs_says_the_same(evidence: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.checker", str(evidence), "--json", str(report)]
    done = subprocess.run([*command, "--quiet"], cwd=REPOSITORY, capture_output=True, text=True)
    found = json.loads(report.read_text())
    assert done.returncode == found["status"] == CLEAN
    assert done.stdout.strip() == found["verdict"]
    assert found["seed"] == SEED
    assert [one["check"] for one in found["checks"]][:3] == ["C0", "C1", "C2"]

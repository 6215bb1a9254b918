"""The audit log is chained in every store, and whoever changes it there is found out.

The hand that changes it has the database open, as an intruder would, and knows SQL.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import psycopg
import pytest

from hcna_ray.core.audit import GENESIS, AuditPoint, chain_hash
from hcna_ray.store.audit import (
    AuditFileBroken,
    AuditReport,
    export_lines,
    verify_file,
    verify_store,
)
from hcna_ray.store.base import TaskReader, TaskStore
from hcna_ray.store.migrate import copy_back, copy_store
from hcna_ray.store.postgres import PostgresTaskStore
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.contract.conftest import Home
from tests.support.builders import T0, an_audit_entry

Execute = Callable[[str], Any]


@dataclass
class Opened:
    """A store, and a way past it into its database."""

    home: Home
    execute: Execute

    def verify(self, **more: Any) -> AuditReport:
        return verify_store(self.home.reader(), **more)


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """A store of each kind with six lines in its audit log."""
    if request.param == "sqlite":
        path = tmp_path / "queue.db"
        home = Home(lambda: SqliteTaskStore(path))
        db = apsw.Connection(str(path))
        execute: Execute = lambda sql: db.execute(sql).fetchall()  # noqa: E731
        close = db.close
    else:
        url = request.getfixturevalue("postgres_url")
        home = Home(lambda: PostgresTaskStore(url))
        connection = psycopg.connect(url, autocommit=True)
        execute = lambda sql: connection.execute(sql.encode())  # noqa: E731
        close = connection.close
    write(home.store, *(f"a{number}" for number in range(1, 7)))
    yield Opened(home, execute)
    close()
    home.close()


def write(store: TaskStore, *actions: str, at: float = T0) -> None:
    with store.transaction():
        store.append_audit(
            [an_audit_entry(action, at=at + 0.1, detail="é\n") for action in actions]
        )


def point(reader: TaskReader) -> AuditPoint:
    (line,) = reader.audit(before=None, limit=1)
    return AuditPoint(line.number, str(line.hash))


def test_every_store_makes_the_same_chain(home: Home) -> None:
    write(home.store, "one", "two")
    home.reopen()
    write(home.store, "three")
    lines = home.reader().audit_after(0, 9)
    assert [line.number for line in lines] == [1, 2, 3]
    assert [str(line.hash)[:16] for line in lines] == [
        "742830857afac405",
        "911299112ba3f053",
        "9df61ac11d5934e7",
    ]
    assert home.reader().audit_state() == (AuditPoint(), 3)


def test_what_was_rolled_back_is_no_part_of_the_chain(home: Home) -> None:
    write(home.store, "one")
    with suppress(ZeroDivisionError), home.store.transaction():
        home.store.append_audit([an_audit_entry("two")])
        raise ZeroDivisionError
    write(home.store, "three")
    report = verify_store(home.reader())
    assert (report.problems, report.lines) == ((), 2)


def test_the_chain_survives_pruning(home: Home) -> None:
    store = home.store
    for number in range(1, 6):
        write(store, f"a{number}", at=T0 + number)
    kept = store_hashes(home)
    for before in (T0 + 3, T0 + 4):
        with store.transaction():
            store.prune_audit(before, 9)
        state = home.reader().audit_state()
        assert state.anchor == (state.anchor.number, kept[state.anchor.number])
        assert verify_store(home.reader()).problems == ()
    with store.transaction():
        assert store.prune_audit(T0 + 99, 9) == 2
    home.reopen()
    assert home.reader().audit_state() == (AuditPoint(5, kept[5]), 5)
    write(home.store, "a6")
    report = verify_store(home.reader())
    assert (report.problems, report.anchor.number, report.lines) == ((), 5, 1)


def store_hashes(home: Home) -> dict[int, str]:
    return {line.number: str(line.hash) for line in home.reader().audit_after(0, 99)}


def test_an_untouched_log_is_whole(opened: Opened) -> None:
    report = opened.verify()
    assert (report.whole, report.lines, report.head) == (True, 6, point(opened.home.reader()))


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("UPDATE audit SET detail = 'x' WHERE number = 3", "line 3 is not what was written"),
        ("UPDATE audit SET at = at + 0.001 WHERE number = 3", "line 3 is not what was written"),
        ("UPDATE audit SET principal = 'eve' WHERE number = 6", "line 6 is not what was written"),
        ("DELETE FROM audit WHERE number = 3", "line 3 is gone"),
        ("DELETE FROM audit WHERE number < 3", "lines 1 to 2 are gone"),
        ("DELETE FROM audit WHERE number > 4", "lines 5 to 6 are gone"),
        ("DELETE FROM audit", "lines 1 to 6 are gone"),
        ("UPDATE audit SET hash = NULL WHERE number = 6", "line 6 has no hash"),
        (
            "UPDATE audit SET number = -number WHERE number IN (3, 4); "
            "UPDATE audit SET number = 7 + number WHERE number < 0",
            "line 3 is not what was written",
        ),
        (
            "DELETE FROM audit WHERE number = 3; "
            "UPDATE audit SET number = -number WHERE number > 3; "
            "UPDATE audit SET number = -number - 1 WHERE number < 0; "
            "UPDATE number SET value = 5 WHERE name = 'last_audit'",
            "line 3 is not what was written",
        ),
        (
            "INSERT INTO audit_anchor VALUES (2, 'f00'); DELETE FROM audit WHERE number < 3",
            "line 3 is not what was written",
        ),
        (
            "INSERT INTO audit_anchor SELECT number, hash FROM audit WHERE number = 3; "
            "UPDATE audit SET detail = 'x', hash = NULL WHERE number <= 3",
            "line 1 has no hash",
        ),
    ],
    ids=[
        *("text", "time", "last", "removed", "beginning", "tail", "all", "hash", "swapped"),
        *("closed gap", "anchor", "no hashes"),
    ],
)
def test_tampering_is_found(opened: Opened, sql: str, problem: str) -> None:
    opened.home.close()
    for statement in sql.split("; "):
        opened.execute(statement)
    opened.home.reopen()
    report = opened.verify()
    assert not report.whole
    assert report.problems[0].startswith(problem)
    # Nor does it heal when the moderator goes on.
    write(opened.home.store, "more")
    assert not opened.verify().whole


def test_a_tail_that_was_cut_with_its_count_shows_by_what_was_noted(
    opened: Opened, tmp_path: Path
) -> None:
    noted = point(opened.home.reader())
    copy = tmp_path / "export.jsonl"
    copy.write_text("".join(f"{line}\n" for line in export_lines(opened.home.reader())))
    opened.home.close()
    opened.execute("DELETE FROM audit WHERE number > 4")
    opened.execute("UPDATE number SET value = 4 WHERE name = 'last_audit'")
    opened.home.reopen()
    assert opened.verify().whole  # By itself it cannot know.
    assert opened.verify(expected=noted).problems == (
        "the log ends before line 6, which was noted elsewhere",
    )
    assert opened.verify(file=copy).problems == (f"the log ends with line 4, {copy} with line 6",)
    write(opened.home.store, "other", "another", "third")
    assert opened.verify().whole
    assert opened.verify(expected=noted).problems == (
        "line 6 has another hash than the one that was noted",
    )
    assert opened.verify(file=copy).problems == (
        f"2 lines, from 5 on, are other ones than in {copy}",
    )


def test_a_beginning_that_claims_to_be_older_than_the_chain_shows_elsewhere(
    opened: Opened, tmp_path: Path
) -> None:
    """All is written anew: the first lines without a hash, the others behind them."""
    reader = opened.home.reader()
    lines = reader.audit_after(0, 9)
    copy = tmp_path / "export.jsonl"
    copy.write_text("".join(f"{line}\n" for line in export_lines(reader)))
    opened.home.close()
    opened.execute(f"INSERT INTO audit_anchor VALUES (3, '{GENESIS}')")
    opened.execute("UPDATE audit SET detail = 'x', hash = NULL WHERE number <= 3")
    digest = GENESIS
    for number, entry, _ in lines[3:]:
        digest = chain_hash(digest, number, entry)
        opened.execute(f"UPDATE audit SET hash = '{digest}' WHERE number = {number}")
    opened.home.reopen()
    report = opened.verify()
    assert (report.whole, report.unchained) == (True, 3)  # By itself it cannot know.
    assert opened.verify(file=copy).problems == (
        f"6 lines, from 1 on, are other ones than in {copy}",
    )
    for number in (2, 5):
        noted = AuditPoint(number, str(lines[number - 1].hash))
        assert opened.verify(expected=noted).problem_count == 1


def test_a_beginning_that_was_taken_out_is_no_pruned_one(opened: Opened, tmp_path: Path) -> None:
    lines = opened.home.reader().audit_after(0, 9)
    copy = tmp_path / "export.jsonl"
    copy.write_text("".join(f"{line}\n" for line in export_lines(opened.home.reader())))
    opened.home.close()
    opened.execute(f"INSERT INTO audit_anchor VALUES (3, '{lines[2].hash}')")
    opened.execute("DELETE FROM audit WHERE number <= 3")
    opened.home.reopen()
    assert opened.verify(file=copy, pruned_before=T0 + 1).whole  # So old lines are pruned.
    (problem,) = opened.verify(file=copy, pruned_before=T0 - 1).problems
    assert problem.startswith(f"line 1 of {copy} is gone, and was too new to be pruned")
    assert problem.endswith("there are 3 such lines")
    noted = AuditPoint(2, str(lines[1].hash))
    assert opened.verify(expected=noted).problems == (
        "line 2, which was noted elsewhere, is not there any more: it was pruned or taken out",
    )


def test_lines_from_before_the_chain_are_compared_with_an_export(
    opened: Opened, tmp_path: Path
) -> None:
    opened.home.close()
    _without_chain(opened.execute)
    opened.home.reopen()
    write(opened.home.store, "a7")
    copy = tmp_path / "export.jsonl"
    copy.write_text("".join(f"{line}\n" for line in export_lines(opened.home.reader())))
    assert opened.verify(file=copy).whole
    opened.execute("UPDATE audit SET detail = 'x' WHERE number = 2")
    assert opened.verify().whole
    assert opened.verify(file=copy).problems == (
        f"1 lines, from 2 on, are other ones than in {copy}",
    )


def test_an_export_is_checked_without_a_store(opened: Opened, tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    lines = list(export_lines(opened.home.reader()))
    path.write_text("\n".join(lines) + "\n")
    assert verify_file(path).whole
    assert verify_file(path).lines == 6
    for changed, problem in (
        ([*lines[:2], *lines[3:]], "line 2 is gone"),
        ([*lines[:-2], lines[-1]], "line 6 is gone"),
        ([*lines[:3], lines[4], lines[3], *lines[5:]], "line 3 is gone"),
        ([line.replace('"a4"', '"a5"') for line in lines], "line 4 is not what was written"),
    ):
        path.write_text("\n".join(changed) + "\n")
        assert verify_file(path).problems[0].startswith(problem), problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x\n",
        "[]\n",
        '{"schema":"hcna.audit.v9","anchor":{"number":0,"hash":""}}\n',
        '{"schema":"hcna.audit.v1","anchor":{"number":"0","hash":""}}\n',
        '{"schema":"hcna.audit.v1","anchor":[]}\n',
        '{"schema":"hcna.audit.v1","anchor":{"number":0,"hash":""}}\n{"number":1}\n',
        '{"schema":"hcna.audit.v1","anchor":{"number":0,"hash":""}}\n'
        '{"number":1,"at":true,"principal":"","action":"","target":"","outcome":"","detail":"",'
        '"hash":""}\n',
    ],
)
def test_what_is_no_audit_log_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(AuditFileBroken):
        verify_file(path)


def test_the_chain_moves_with_the_store(tmp_path: Path, postgres_url: str) -> None:
    path = tmp_path / "queue.db"
    store = SqliteTaskStore(path)
    write(store, "a1", "a2", at=T0)
    write(store, "a3", at=T0 + 5)
    with store.transaction():
        store.prune_audit(T0 + 1, 1)
    store.close()
    copy_store(path, postgres_url)
    server = PostgresTaskStore(postgres_url)
    write(server, "a4")
    reader = server.reader()
    report = verify_store(reader)
    reader.close()
    assert (report.problems, report.anchor.number, report.lines) == ((), 1, 3)
    server.close()
    copy_back(postgres_url, tmp_path / "back.db")
    back = SqliteTaskStore(tmp_path / "back.db")
    write(back, "a5")
    read_back = back.reader()
    report = verify_store(read_back)
    read_back.close()
    assert (report.problems, report.lines) == ((), 4)
    back.close()


def _without_chain(execute: Execute) -> None:
    """Bring a store back to where it was before there was a chain."""
    for sql in (
        "DROP TABLE audit_anchor",
        "ALTER TABLE audit DROP COLUMN hash",
        "DELETE FROM schema_migration WHERE number = 2",
    ):
        execute(sql)


def test_a_store_from_before_the_chain_goes_on_with_one(opened: Opened) -> None:
    opened.home.close()
    _without_chain(opened.execute)
    opened.home.reopen()
    report = opened.verify()
    assert (report.whole, report.unchained, report.anchor) == (True, 6, (6, GENESIS))
    write(opened.home.store, "a7", "a8", at=T0 + 5)
    report = opened.verify()
    assert (report.whole, report.unchained, report.lines) == (True, 6, 2)
    # Of the old lines nothing is known; of the new ones everything.
    opened.execute("UPDATE audit SET detail = 'x' WHERE number = 7")
    assert not opened.verify().whole
    with opened.home.store.transaction():
        assert opened.home.store.prune_audit(T0 + 1, 99) == 6
    assert opened.home.reader().audit_state().anchor == (6, GENESIS)


def test_lines_that_are_pruned_while_the_log_is_read_are_not_missed(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcna_ray.store.audit.PAGE", 2)
    reader = opened.home.reader()
    pages = reader.audit_after
    calls: list[int] = []

    def pruning(after: int, limit: int) -> Any:
        calls.append(after)
        if len(calls) == 2:
            with opened.home.store.transaction():
                opened.home.store.prune_audit(T0 + 9, 4)
        return pages(after, limit)

    monkeypatch.setattr(reader, "audit_after", pruning)
    report = verify_store(reader)
    assert (report.problems, report.head.number) == ((), 6)


def test_ten_lines_of_python_check_an_export(opened: Opened) -> None:
    """As docs/SECURITY.md shows it."""
    import hashlib

    first, *lines, _end = map(json.loads, export_lines(opened.home.reader()))
    before = first["anchor"]["hash"]
    for line in lines:
        names = ("number", "at", "principal", "action", "target", "outcome", "detail")
        body = json.dumps(
            ["hcna.audit.v1", before, *(line[name] for name in names)], separators=(",", ":")
        )
        assert hashlib.sha256(body.encode()).hexdigest() == line["hash"]
        before = line["hash"]

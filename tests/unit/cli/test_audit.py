"""``hcna audit`` as it is typed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import apsw
import pytest

from hcna_ray.runtime.audit_log import AuditLog
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.support.builders import an_audit_entry
from tests.unit.cli.conftest import Hcna


@pytest.fixture
def home(url: str) -> Path:
    """A home with three lines in its audit log, and the moderator's file of it."""
    home = Path(os.environ["HCNA_HOME"])
    store = SqliteTaskStore(home / "queue.db")
    with store.transaction():
        store.append_audit([an_audit_entry(f"a{number}") for number in (1, 2, 3)])
    (home / "logs").mkdir()
    reader = store.reader()
    AuditLog(home / "logs" / "audit.log", reader).catch_up()
    reader.close()
    store.close()
    return home


def tamper(home: Path, sql: str) -> None:
    db = apsw.Connection(str(home / "queue.db"))
    db.execute(sql)
    db.close()


def test_a_whole_log(home: Path, hcna: Hcna) -> None:
    ran = hcna("audit", "verify")
    assert ran.code == 0, ran.err
    assert ran.out.count("3 lines, 1 to 3, whole") == 2
    assert "last line: 3:" in ran.out
    noted = ran.out.partition("last line: ")[2].split()[0]
    assert hcna("audit", "verify", "--expect", noted).code == 0
    report = hcna("audit", "verify", "--json").json
    assert [one["whole"] for one in report.values()] == [True, True]


def test_a_changed_line_ends_with_5_and_says_which(home: Path, hcna: Hcna) -> None:
    tamper(home, "UPDATE audit SET principal = 'nobody' WHERE number = 2")
    ran = hcna("audit", "verify")
    assert ran.code == 5
    assert "line 2 is not what was written" in ran.out
    assert "Next: keep what is there" in ran.err


def test_a_cut_tail_shows_by_the_moderators_file(home: Path, hcna: Hcna) -> None:
    tamper(home, "DELETE FROM audit WHERE number = 3")
    tamper(home, "UPDATE number SET value = 2 WHERE name = 'last_audit'")
    ran = hcna("audit", "verify")
    assert ran.code == 5
    assert "the log ends with line 2" in ran.out.replace("\n", " ")


def test_what_m1_has_put_aside_is_compared(home: Path, hcna: Hcna) -> None:
    log = home / "logs" / "audit.log"
    log.rename(log.with_name("audit.log.earlier-1"))
    assert hcna("audit", "verify").code == 0
    tamper(home, "DELETE FROM audit WHERE number = 3")
    tamper(home, "UPDATE number SET value = 2 WHERE name = 'last_audit'")
    ran = hcna("audit", "verify")
    assert ran.code == 5
    assert "audit.log.earlier-1 has a line 3, the store none" in ran.out.replace("\n", " ")


def test_an_export_is_checked_alone(home: Path, hcna: Hcna, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    assert hcna("audit", "export", str(copy)).code == 0
    assert copy.stat().st_mode & 0o777 == 0o600
    assert hcna("audit", "export", str(copy)).code == 1  # It is never written over.
    assert hcna("audit", "export").out == copy.read_text()
    (home / "queue.db").unlink()
    assert hcna("audit", "verify", "--file", str(copy), "--alone").code == 0
    text = copy.read_text()
    copy.write_text(text.replace('"a2"', '"a9"'))
    assert hcna("audit", "verify", "--file", str(copy), "--alone").code == 5
    copy.write_text("something else\n")
    assert hcna("audit", "verify", "--file", str(copy), "--alone").code == 1


def test_the_newest_lines(home: Path, hcna: Hcna) -> None:
    ran = hcna("audit", "-n", "2")
    assert ran.code == 0, ran.err
    assert "a3" in ran.out
    assert "a1" not in ran.out
    lines = [json.loads(line) for line in hcna("audit", "list", "--json").out.splitlines()]
    assert [line["number"] for line in lines] == [3, 2, 1]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--expect", "3"), 2),
        (("--expect", "3:xyz"), 2),
        (("--alone",), 2),
        (("--file", "/nowhere/audit.log"), 1),
    ],
)
def test_what_makes_no_sense_is_said(
    home: Path, hcna: Hcna, words: tuple[str, ...], code: int
) -> None:
    ran = hcna("audit", "verify", *words)
    assert ran.code == code
    assert "Next: hcna audit" in ran.err

"""`make audit` says what is known, and says loudly when nobody could be asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.programs import script

SCRIPT = Path(__file__).parents[2] / "scripts" / "audit_packages.py"
CLEAN, VULNERABLE, SILENT = 0, 1, 3

GOOD: dict[str, Any] = {"name": "httpx", "version": "0.28.1", "vulns": []}
BAD: dict[str, Any] = {
    "name": "ray",
    "version": "2.0.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2023-48022"], "fix_versions": ["2.56.0"]}],
}
UNKNOWN: dict[str, Any] = {"name": "ours", "skip_reason": "not on the index: ours (1)"}


@pytest.fixture(scope="module")
def audit() -> Iterator[ModuleType]:
    with script("audit_packages") as module:
        yield module


def told(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": list(packages), "fixes": []})


def test_nothing_known_is_said_with_how_many_were_looked_up(audit: ModuleType) -> None:
    verdict = audit.judge(0, told(GOOD, GOOD | {"name": "msgspec"}), "")
    assert verdict.code == CLEAN
    assert verdict.lines == ("no known vulnerability in 2 locked packages",)


def test_what_is_known_is_listed_with_what_helps(audit: ModuleType) -> None:
    verdict = audit.judge(1, told(GOOD, BAD), "Found 1 known vulnerability in 1 package")
    assert verdict.code == VULNERABLE
    assert verdict.lines[0] == "ray 2.0.0: PYSEC-1 (CVE-2023-48022), fixed in 2.56.0"


def test_what_has_no_fix_yet_is_told_so(audit: ModuleType) -> None:
    bare = {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": []}]}
    assert audit.judge(1, told(bare), "").lines[0] == "a 1: X-1, fixed in no version yet"


def test_what_was_not_looked_up_is_not_taken_for_clean(audit: ModuleType) -> None:
    verdict = audit.judge(0, told(GOOD, UNKNOWN), "")
    assert verdict.code == SILENT
    assert verdict.lines[2].startswith("1 of the locked packages")
    assert verdict.lines[3].strip() == "not on the index: ours (1)"
    assert verdict.lines[4] == "No known vulnerability in 1 others."


def test_what_was_not_looked_up_is_counted_beside_what_is_known(audit: ModuleType) -> None:
    verdict = audit.judge(1, told(BAD, UNKNOWN), "")
    assert verdict.code == VULNERABLE
    assert verdict.lines[-1].endswith("nothing is said about 1 others")


def test_an_index_that_has_files_alone_is_no_answer(audit: ModuleType) -> None:
    verdict = audit.judge(0, told(UNKNOWN, UNKNOWN), "No known vulnerabilities found")
    assert verdict.code == SILENT
    assert verdict.lines[2].startswith("the locked packages")
    assert verdict.lines[-2].strip() == "not on the index: ours (1)"


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (1, ""),
        (1, "Traceback (most recent call last):"),
        (0, "[]"),
        (0, "{}"),
        (0, told()),
        (0, told(UNKNOWN)),
        (2, told(GOOD)),
    ],
)
def test_no_answer_is_never_taken_for_a_good_one(code: int, output: str, audit: ModuleType) -> None:
    verdict = audit.judge(code, output, "a\nb\nc\nConnectionError: no route to host\n")
    assert verdict.code == SILENT
    assert any("NOT AUDITED" in line for line in verdict.lines)
    assert verdict.lines[0] == "*" * 78

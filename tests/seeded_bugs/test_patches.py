"""The patches fit the tree they are kept in, change the product alone, and leave it compilable."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from tests.faults.programme import all_parts
from tests.seeded_bugs import ROOT, Bug, all_bugs, apply

BUGS = all_bugs()


def test_there_are_the_twenty_and_more() -> None:
    twenty = [name for name in BUGS if not name.startswith("extra/")]
    assert [name[:2] for name in twenty] == [f"{number:02}" for number in range(1, 21)]
    assert len(BUGS) >= 30


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_patch_applies_and_compiles(bug: Bug, tmp_path: Path) -> None:
    for name in bug.files:
        assert name.startswith("hcna_ray/"), "a bug is one of the product"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    apply(bug, tmp_path)
    for name in bug.files:
        changed = (tmp_path / name).read_text()
        assert changed != (ROOT / name).read_text()
        ast.parse(changed)


def test_a_patch_names_parts_that_exist() -> None:
    parts = all_parts()
    for bug in BUGS.values():
        assert bug.seen_by
        assert bug.what
        assert bug.breaks
        assert set(bug.seen_by) <= set(parts), bug.name

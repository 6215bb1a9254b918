"""The checker's own exam: hand-made histories, and what becomes of them when a line is altered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checker.__main__ import check
from tests.checker.findings import CHECKS, violations
from tests.checker.histories.bad import BAD
from tests.checker.histories.good import GOOD
from tests.checker.histories.world import Story, World
from tests.checker.report import BROKEN, CLEAN, as_table, verdict


def tell(story: Story, folder: Path) -> None:
    world = World()
    story(world)
    world.write(folder)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history_is_accepted(name: str, tmp_path: Path) -> None:
    tell(GOOD[name], tmp_path)
    run, outcomes = check(tmp_path)
    assert verdict(run, outcomes)[0] == CLEAN, as_table(run, outcomes)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_rejected_by_the_one_check_it_breaks(name: str, tmp_path: Path) -> None:
    expected, story = BAD[name]
    tell(story, tmp_path)
    run, outcomes = check(tmp_path)
    assert verdict(run, outcomes)[0] == BROKEN
    found = violations(outcomes)
    assert {one.check for one in found} == {expected}, as_table(run, outcomes)
    assert all(one.lines or expected in ("C11", "C14") for one in found), "no proof"


def test_there_are_enough_of_them_and_every_check_is_broken_by_some() -> None:
    assert len(GOOD) >= 40
    assert len(BAD) >= 40
    assert {check for check, _ in BAD.values()} == set(CHECKS)

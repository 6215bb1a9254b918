"""The newcomer's table: what does not hold is in it. (The walk itself is ``make newcomer``.)"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.rig import newcomer
from tests.rig.computer import Computer
from tests.rig.newcomer import NotHere, Step, Story, Walk, table
from tests.support.rig.testing import rig_for_tests


def test_what_breaks_is_shown_and_the_story_goes_on() -> None:
    def breaks(walk: Walk) -> str:
        raise AssertionError("the card has 40 lines")

    def is_missing(walk: Walk) -> str:
        raise NotHere("Grafana is not installed")

    story = Story(Walk(Computer.__new__(Computer)))
    for step in (
        Step("one", "works", lambda walk: "worked"),
        Step("two", "works", breaks),
        Step("three", "works", is_missing),
        Step("four", "is quick", lambda walk: "came", within_s=0.0),
    ):
        story.tell(step)

    assert [one.holds for one in story.outcomes] == [True, False, None, False]
    out = io.StringIO()
    Console(file=out, width=140).print(table(story.outcomes))
    for words in ("the card has 40 lines", "NO", "not here", "later than 0 s", "worked"):
        assert words in out.getvalue()


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_every_promise_to_a_newcomer_is_kept() -> None:
    with rig_for_tests(("m1",), boot=False):
        pass  # Skipped where there can be no rig.
    assert newcomer.main() == 0

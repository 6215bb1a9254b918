"""Every failpoint is met by some case of the full programme."""

from __future__ import annotations

from hcna_ray.failpoints import POINTS
from tests.faults.parts import machines
from tests.faults.programme import DEFAULT_SEED, Size, all_parts

#: Tried by `tests/contract/test_schedules_killed.py`: the programme's clients make no schedules.
ELSEWHERE = {"ledger.schedules.written"}


def armed(part: str | None = None) -> set[str]:
    """Return every failpoint that a case of a part, or of any, says that it arms."""
    return {
        point
        for name, one in all_parts().items()
        if part in (None, name)
        for case in one.cases(DEFAULT_SEED, Size.FULL)
        for point in case.options.get("failpoints", ())
    }


def test_every_failpoint_is_tried() -> None:
    assert armed() | ELSEWHERE >= set(POINTS)
    assert not armed() & ELSEWHERE


def test_nearly_all_are_tried_without_a_whole_computer() -> None:
    """So that a kill takes seconds: the rest is between Ray's actors, or between machines."""
    assert set(POINTS) - armed("plain_kills") - ELSEWHERE == {
        *("actor.call.answered", "actor.call.before"),
        *("actor.call.decided", "actor.call.received"),
        *("slot.process.attached", "slot.process.begun"),
        *machines.POINTS,
    }


def test_no_case_arms_what_is_no_failpoint() -> None:
    assert armed() <= set(POINTS)

"""Every failpoint is met by some case of the full programme."""

from __future__ import annotations

from hcna_ray.failpoints import POINTS
from tests.faults.programme import DEFAULT_SEED, Size, all_parts

#: Only a computer with Ray, or with a gate that machines join at, comes by these.
WITH_RAY = frozenset(
    {
        "actor.call.answered",
        "actor.call.before",
        "actor.call.decided",
        "actor.call.received",
        "cache.file.fetched",
        "credentials.member.fetched",
        "gate.join.redeemed",
        "gate.join.stored",
        "gate.leave.removed",
        "join.answer.received",
        "join.membership.written",
        "slot.process.attached",
        "slot.process.begun",
    }
)


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
    assert armed("plain_kills") >= set(POINTS) - WITH_RAY


def test_no_case_arms_what_is_no_failpoint() -> None:
    assert armed() <= set(POINTS)

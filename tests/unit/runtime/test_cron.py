"""Cron lines: what they name, where a time zone changes its clock, and what is refused."""

from __future__ import annotations

import math
from datetime import datetime

import pytest

from hcna_ray.core.errors import Invalid
from hcna_ray.runtime.cron import SHORTHANDS, Cron, parsed


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def expect(line: str, start: str, *instants: str, timezone: str = "Europe/Berlin") -> None:
    cron = Cron(line, timezone)
    assert cron.next(at(start), len(instants)) == [at(one) for one in instants]
    # Asked one by one, from the last one or from just before, it is the same row.
    found: float | None = at(start)
    for one in instants:
        assert found is not None
        fresh = Cron(line, timezone)
        assert fresh.after(found) == fresh.after(math.nextafter(at(one), 0)) == at(one)
        found = cron.after(found)
        assert found == at(one)


def test_a_line_names_instants_in_its_time_zone() -> None:
    expect(
        "0 3 * * 1-5",
        "2026-07-03T00:00:00Z",
        "2026-07-03T03:00:00+02:00",
        "2026-07-06T03:00:00+02:00",
    )
    expect(
        "*/20 * * * *",
        "2026-07-03T00:30:00.5Z",
        "2026-07-03T00:40:00Z",
        "2026-07-03T01:00:00Z",
        timezone="UTC",
    )


class TestClocksOfTimeZones:
    def test_an_instant_that_does_not_exist_is_put_off_to_the_first_that_does(self) -> None:
        expect(
            "30 2 * * *",
            "2026-03-28T12:00:00Z",
            "2026-03-29T03:00:00+02:00",
            "2026-03-30T02:30:00+02:00",
        )

    def test_two_that_are_put_off_to_the_same_are_one(self) -> None:
        expect(
            "0,30 2,3 * * *",
            "2026-03-28T12:00:00Z",
            "2026-03-29T03:00:00+02:00",
            "2026-03-29T03:30:00+02:00",
            "2026-03-30T02:00:00+02:00",
        )

    def test_an_instant_that_comes_twice_is_taken_the_first_time(self) -> None:
        expect(
            "30 2 * * *",
            "2026-10-24T12:00:00Z",
            "2026-10-25T02:30:00+02:00",
            "2026-10-26T02:30:00+01:00",
        )

    def test_who_asks_in_the_second_of_the_hours_is_not_told_of_the_first(self) -> None:
        expect("30 2 * * *", "2026-10-25T02:10:00+01:00", "2026-10-26T02:30:00+01:00")

    def test_with_a_star_in_minute_or_hour_what_the_clock_shows_twice_is_taken_twice(self) -> None:
        expect(
            "*/30 2 * * *",
            "2026-10-24T12:00:00Z",
            "2026-10-25T02:00:00+02:00",
            "2026-10-25T02:30:00+02:00",
            "2026-10-25T02:00:00+01:00",
            "2026-10-25T02:30:00+01:00",
            "2026-10-26T02:00:00+01:00",
        )

    def test_and_what_it_leaves_out_is_left_out(self) -> None:
        expect("*/30 2 * * *", "2026-03-28T12:00:00Z", "2026-03-30T02:00:00+02:00")
        expect(
            "0 * * * *",
            "2026-03-29T01:30:00+01:00",
            "2026-03-29T03:00:00+02:00",
            "2026-03-29T04:00:00+02:00",
        )


@pytest.mark.parametrize("name", SHORTHANDS)
def test_a_shorthand_is_its_line(name: str) -> None:
    start = at("2026-07-03T00:30:00Z")
    assert Cron(name, "UTC").next(start, 3) == Cron(SHORTHANDS[name], "UTC").next(start, 3)


def test_a_line_may_name_nothing_for_ever() -> None:
    cron = Cron("0 0 */20 * 1L", "UTC")
    assert cron.after(at("2026-01-01T00:00:00Z")) is None
    assert cron.next(at("2026-01-01T00:00:00Z"), 3) == []


@pytest.mark.parametrize(
    "line",
    [
        "",
        "@reboot",
        "61 * * * *",
        "* * * * * *",
        "* * * *",
        "0 0 30 2 *",
        "a * * * *",
        "*/0 * * * *",
    ],
)
def test_what_is_no_line_is_refused(line: str) -> None:
    with pytest.raises(Invalid) as caught:
        Cron(line, "UTC")
    assert caught.value.code == "invalid_schedule"
    assert caught.value.problems[0][0] == "cron"


@pytest.mark.parametrize("timezone", ["", "Mars/Olympus", "../../etc/passwd", "Europe", "a\0b"])
def test_what_is_no_time_zone_is_refused(timezone: str) -> None:
    with pytest.raises(Invalid) as caught:
        Cron("@daily", timezone)
    assert caught.value.problems[0][0] == "timezone"


def test_a_line_is_parsed_once() -> None:
    assert parsed("@daily", "UTC") is parsed("@daily", "UTC")

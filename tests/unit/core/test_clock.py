"""The clocks that shells hand in."""

from __future__ import annotations

import time

import pytest

from hcna_ray.core.clock import ClockHold, SystemClock, boottime


def test_the_system_clock_tells_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1234.5)

    assert SystemClock().now() == 1234.5


def test_elapsed_time_counts_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def answer(clock_id: int) -> float:
        asked.append(clock_id)
        return 77.0

    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 7, raising=False)
    monkeypatch.setattr(time, "clock_gettime", answer)

    assert SystemClock().elapsed() == 77.0
    assert asked == [7]


def test_a_platform_without_boot_time_has_the_monotonic_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)

    assert boottime() == 5.0


def test_what_was_kept_for_a_second_is_not_old_after_a_step_of_a_year() -> None:
    year, week = 365 * 86400.0, 7 * 86400.0
    at = 1000.0
    hold = ClockHold().after_step(year, at + 1.0 + year, longest_s=week)

    for passed in (0.0, 1.0, week - 3.0):
        assert hold.cutoff(at + 1.0 + year + passed, week) <= at
    # As old as it must be by then, whatever the clock has done.
    assert hold.cutoff(at + 1.0 + year + week, week) > at
    # What is kept for less is not held for longer than that.
    assert hold.cutoff(at + 1.0 + year + 60.0, 60.0) > at


def test_steps_add_up_as_long_as_anything_waits_for_the_first() -> None:
    hold = ClockHold().after_step(100.0, 1100.0, longest_s=60.0)

    soon = hold.after_step(10.0, 1130.0, longest_s=60.0)
    late = hold.after_step(10.0, 1180.0, longest_s=60.0)

    assert soon == ClockHold(by_s=110.0, since=1130.0)
    assert late == ClockHold(by_s=10.0, since=1180.0)


def test_a_clock_that_is_put_back_makes_nothing_old() -> None:
    hold = ClockHold().after_step(100.0, 1100.0, longest_s=60.0)

    assert hold.after_step(-50.0, 1060.0, longest_s=60.0) is hold
    assert ClockHold().cutoff(1000.0, 60.0) == 940.0

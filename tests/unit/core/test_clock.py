"""The clocks that shells hand in."""

from __future__ import annotations

import time

import pytest

from hcna_ray.core.clock import SystemClock, boottime


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

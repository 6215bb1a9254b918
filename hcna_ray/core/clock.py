"""Clocks as values that can be handed in, so that nothing in `hcna_ray.core` reads one itself."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where shells get the time from."""

    def now(self) -> float:
        """Return the instant in seconds since the epoch, UTC."""

    def elapsed(self) -> float:
        """Return seconds on a clock that never steps and keeps running while the machine sleeps."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> float:
        """Return wall-clock seconds since the epoch."""
        return time.time()

    def elapsed(self) -> float:
        """Return ``CLOCK_BOOTTIME`` seconds: CLOCK_MONOTONIC stands still in a sleeping laptop."""
        return boottime()


def boottime() -> float:
    """Seconds since boot, sleep included (monotonic where the platform has no such clock)."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock_id is None else time.clock_gettime(clock_id)

"""Clocks as values that can be handed in, so that nothing in `hcna_ray.core` reads one itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockHold:
    """What is kept by its age stays longer after the wall clock was put forward.

    By what was skipped, everything older seems to have aged at once. Until as much time has really
    passed as something is kept, only what is older by that much, too, is certainly old enough.
    """

    #: Seconds that were skipped.
    by_s: float = 0.0
    #: The wall clock after the last step.
    since: float = 0.0

    def after_step(self, by_s: float, now: float, longest_s: float) -> ClockHold:
        """Return the hold after the clock was put by ``by_s`` and shows ``now``.

        A clock that is put back only keeps things longer, which is no harm.

        Args:
            by_s: Seconds forward; negative if it was put back.
            now: What it shows since.
            longest_s: The longest that anything is kept.
        """
        if by_s <= 0:
            return self
        still_held = self.by_s if now - by_s < self.since + longest_s else 0.0
        return ClockHold(by_s=still_held + by_s, since=now)

    def cutoff(self, now: float, age_s: float) -> float:
        """Return the instant of the wall clock before which everything is older than ``age_s``."""
        held_s = self.by_s if now < self.since + age_s else 0.0
        return now - age_s - held_s


def boottime() -> float:
    """Seconds since boot, sleep included (monotonic where the platform has no such clock)."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock_id is None else time.clock_gettime(clock_id)

"""When a member that died is started again. Pure: randomness is an argument."""

from __future__ import annotations


def restart_delay_s(failures: int, *, first_s: float, max_s: float, draw: float) -> float:
    """Return the pause before the next start: doubled for each failure in a row, spread by half.

    Args:
        failures: Deaths in a row, 1 for the first.
        first_s: Pause after the first death, before spreading.
        max_s: Longest pause before spreading.
        draw: A number in [0, 1). 0 gives half the pause, 1 the whole: machines that lost the same
            head do not come back in step.
    """
    exponent = min(max(failures, 1) - 1, 30)
    return min(max_s, first_s * 2.0**exponent) * (0.5 + draw / 2)

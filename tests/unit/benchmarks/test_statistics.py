from __future__ import annotations

import math

from benchmarks.statistics import median, quantile, summarise


def test_a_quantile_is_one_of_the_samples() -> None:
    samples = [float(n) for n in range(100, 0, -1)]

    assert quantile(samples, 0.5) == 50
    assert quantile(samples, 0.99) == 99
    assert quantile(samples, 1.0) == 100
    assert quantile([7.0], 0.01) == 7
    assert math.isnan(quantile([], 0.5))


def test_a_median_of_evenly_many_is_between_the_two_in_the_middle() -> None:
    assert median([4.0, 1.0, 3.0]) == 3
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert math.isnan(median([]))


def test_a_summary_tells_how_far_rounds_lie_apart() -> None:
    found = summarise([90.0, 100.0, 120.0, math.nan])

    assert found is not None
    assert (found.median, found.low, found.high, found.rounds) == (100, 90, 120, 3)
    assert found.spread == 0.3
    assert summarise([]) is None

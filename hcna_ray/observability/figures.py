"""Figures as they are counted: histograms in memory, and those that the store keeps as counters.

Knows nothing of Prometheus: the moderator counts with it, `exposition` shows what was counted.
"""

from __future__ import annotations

import bisect
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: Upper bounds of how long answers and commits take, in seconds.
BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
#: Upper bounds of how long tasks wait and run, in seconds: from a slot's turn to a night.
TASK_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0),
)
#: Upper bounds of how many calls, and tasks, go into one batch of the writer.
SIZE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)

#: Names of the histograms that the store keeps, see `stored_deltas`.
WAITED, RAN = "waited", "ran"
#: Label of the counter that holds the sum, in microseconds: counters are whole numbers.
SUM = "sum_us"
_ENDLESS = "+Inf"

#: So many queues are counted and shown by name: anybody who submits may name a new one for each
#: task, and every name is rows in the store and series in Prometheus for ever.
QUEUES_NAMED_MAX = 200
#: Label of all the others; no queue can have that name.
OTHER_QUEUES = "(other)"


@dataclass(slots=True)
class Histogram:
    """Observations counted by their upper bounds, not cumulative, the last one without any."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float

    def __init__(self, bounds: tuple[float, ...] = BUCKETS_S) -> None:
        """Count nothing yet.

        Args:
            bounds: Upper bounds, ascending.
        """
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        """Return what has been counted up to now; what is counted later does not change it."""
        copied = Histogram(self.bounds)
        copied.counts, copied.total = list(self.counts), self.total
        return copied

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative (upper bound, count) pairs, ``+Inf`` last."""
        pairs: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*map(str, self.bounds), _ENDLESS), self.counts, strict=True):
            seen += count
            pairs.append((bound, float(seen)))
        return pairs


def stored_deltas(seconds: Iterable[float], bounds: Sequence[float] = TASK_BUCKETS_S) -> Tally[str]:
    """Return what these observations add to a histogram that the store keeps, by label.

    A label is the upper bound of one bucket, not cumulative, or `SUM`.
    """
    deltas: Tally[str] = Tally()
    for value in seconds:
        known = max(0.0, value)
        place = bisect.bisect_left(bounds, known)
        deltas[str(bounds[place]) if place < len(bounds) else _ENDLESS] += 1
        deltas[SUM] += round(known * 1e6)
    return deltas


def stored_histogram(
    counted: Mapping[str, int], bounds: tuple[float, ...] = TASK_BUCKETS_S
) -> Histogram:
    """Return the histogram whose counters are in the store.

    What was counted with other bounds than today's goes into the next bucket that holds it: no
    count is lost when bounds change, and none becomes smaller.
    """
    histogram = Histogram(bounds)
    histogram.total = counted.get(SUM, 0) / 1e6
    for label, count in counted.items():
        if label != SUM:
            histogram.counts[bisect.bisect_left(bounds, float(label))] += count
    return histogram

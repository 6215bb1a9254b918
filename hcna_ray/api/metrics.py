"""What a replica counts of its own requests, and the sample of everything for ``/metrics``."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping

from hcna_ray.core.models import TaskState
from hcna_ray.observability.exposition import Histogram, Labels
from hcna_ray.store.base import Counter


class RequestStats:
    """Requests answered by this replica: counts by route, method and status, and their duration."""

    def __init__(self) -> None:
        self.requests: dict[Labels, int] = {}
        self.durations: dict[Labels, Histogram] = {}

    def count(self, route: str, method: str, status: int, seconds: float | None = None) -> None:
        """Count one answer. ``route`` is a template such as ``/tasks/{task_id}``, never a path."""
        key = (route, method, str(status))
        self.requests[key] = self.requests.get(key, 0) + 1
        if seconds is not None:
            histogram = self.durations.get((route,))
            if histogram is None:
                histogram = self.durations[route,] = Histogram()
            histogram.observe(seconds)


def stored_figures(
    counters: Mapping[Counter, int], depth: Mapping[tuple[str, TaskState], int]
) -> dict[str, dict[Labels, int]]:
    """Sort the store's counters under the names of `hcna_ray.observability.exposition.Sample`."""
    found: dict[str, Tally[Labels]] = {name: Tally() for name in ("accepted", "ended", "attempts")}
    for counter, value in counters.items():
        if counter.name in found:
            found[counter.name][counter.task_type, counter.label] += value
    figures: dict[str, dict[Labels, int]] = {name: dict(tally) for name, tally in found.items()}
    figures["depth"] = {(queue, state.value): count for (queue, state), count in depth.items()}
    return figures

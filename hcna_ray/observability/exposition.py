"""Names of our metrics and their rendering for Prometheus.

The figures of tasks are counters that the store keeps, so a restart of anything never makes them go
backwards. Names, kinds and labels stand here and nowhere else; ids never become labels.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST

#: Upper bounds of the latency histogram, in seconds.
BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)

Labels = tuple[str, ...]


@dataclass(slots=True)
class Histogram:
    """Observations counted by `BUCKETS_S`, not cumulative, the last one without upper bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    total_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative (upper bound, count) pairs, ``+Inf`` last."""
        pairs: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self.counts, strict=True):
            seen += count
            pairs.append((bound, float(seen)))
        return pairs


@dataclass(frozen=True, kw_only=True)
class Sample:
    """All figures at one moment. Keys of the mappings are label values, in the order named."""

    #: (task_type, queue)
    accepted: Mapping[Labels, int] = field(default_factory=dict)
    #: (task_type, state)
    ended: Mapping[Labels, int] = field(default_factory=dict)
    #: (task_type, outcome)
    attempts: Mapping[Labels, int] = field(default_factory=dict)
    #: (queue, state)
    depth: Mapping[Labels, int] = field(default_factory=dict)
    #: (state,); ``None`` when the moderator does not answer.
    workers: Mapping[Labels, int] | None = None
    moderator_up: bool = False
    store_readable: bool = False
    #: (route, method, status)
    requests: Mapping[Labels, int] = field(default_factory=dict)
    #: (route,)
    durations: Mapping[Labels, Histogram] = field(default_factory=dict)
    #: (sort,)
    in_progress: Mapping[Labels, int] = field(default_factory=dict)
    #: (sort,)
    refused: Mapping[Labels, int] = field(default_factory=dict)
    #: Tasks waiting to be stored, and calls made to store tasks.
    gather_items: int = 0
    gather_calls: int = 0
    #: Ids and batches that clients wait for.
    waiting: int = 0


class _Once(Collector):
    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        return families(self._sample)


def render(sample: Sample) -> bytes:
    """Return the exposition of one sample in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(sample))
    return generate_latest(registry)


def families(sample: Sample) -> Iterator[Metric]:
    """Yield every metric family of a sample.

    While the store cannot be read its figures are left out: a gap is honest, a zero would look like
    a counter that went backwards.
    """
    if sample.store_readable:
        yield from _of_store(sample)
    yield _gauge("hcna_moderator_up", "1 if M1 answers.", (), {(): int(sample.moderator_up)})
    yield _gauge(
        "hcna_store_readable", "1 if C1 can read the store.", (), {(): int(sample.store_readable)}
    )
    if sample.workers is not None:
        yield _gauge("hcna_workers", "Workers on record, by state.", ("state",), sample.workers)
    yield from _of_composite(sample)


def _of_store(sample: Sample) -> Iterator[Metric]:
    by_state: dict[Labels, int] = {
        (state,): 0 for state in ("completed", "failed", "cancelled", "expired")
    }
    for (_, state), count in sample.ended.items():
        by_state[state,] = by_state.get((state,), 0) + count
    completed: dict[Labels, int] = {(): by_state["completed",]}
    yield _counter("tasks_completed", "Tasks completed since the store was made.", (), completed)
    yield _counter("hcna_tasks", "Tasks ended, by how they ended.", ("state",), by_state)
    yield _counter(
        "hcna_tasks_accepted", "Tasks accepted.", ("task_type", "queue"), sample.accepted
    )
    yield _counter(
        "hcna_tasks_ended", "Tasks ended, by type.", ("task_type", "state"), sample.ended
    )
    yield _counter(
        "hcna_task_attempts", "Attempts ended.", ("task_type", "outcome"), sample.attempts
    )
    yield _gauge(
        "hcna_queue_depth", "Tasks in a queue, by state.", ("queue", "state"), sample.depth
    )


def _of_composite(sample: Sample) -> Iterator[Metric]:
    yield _counter(
        "hcna_http_requests",
        "Requests answered by this C1 replica.",
        ("route", "method", "status"),
        sample.requests,
    )
    histogram = HistogramMetricFamily(
        "hcna_http_request_duration_seconds",
        "Time to the answer, waits included.",
        labels=["route"],
    )
    for labels, durations in sample.durations.items():
        histogram.add_metric(list(labels), durations.buckets(), durations.total_s)
    yield histogram
    yield _gauge(
        "hcna_http_in_progress", "Requests in progress, by sort.", ("sort",), sample.in_progress
    )
    yield _counter(
        "hcna_http_refused", "Requests refused for lack of room.", ("sort",), sample.refused
    )
    yield _gauge("hcna_gather_items", "Tasks on their way to M1.", (), {(): sample.gather_items})
    yield _counter("hcna_gather_calls", "Batches sent to M1.", (), {(): sample.gather_calls})
    yield _gauge("hcna_waiting", "Ids and batches that clients wait for.", (), {(): sample.waiting})


def _counter(
    name: str, text: str, labels: Sequence[str], values: Mapping[Labels, int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(list(key), value)
    return family


def _gauge(
    name: str, text: str, labels: Sequence[str], values: Mapping[Labels, int]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(list(key), value)
    return family


#: Something that yields metric families; what other processes of ours hand to `render_families`.
Families = Callable[[], Iterable[Metric]]


class _Lazy(Collector):
    def __init__(self, make: Families) -> None:
        self._make = make

    def collect(self) -> Iterable[Metric]:
        return self._make()


def render_families(make: Families) -> bytes:
    """Return the exposition of the families that ``make`` yields."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Lazy(make))
    return generate_latest(registry)

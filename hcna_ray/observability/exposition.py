"""Names of our metrics and their rendering for Prometheus.

The figures of tasks are counters that the store keeps, so a restart of anything never makes them go
backwards. What a process counts of itself begins at zero with each process, which Prometheus allows
for. Names, kinds and labels stand here and nowhere else; ids of tasks never become labels.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from hcna_ray.core.models import TERMINAL, WorkerState
from hcna_ray.observability.figures import OTHER_QUEUES, QUEUES_NAMED_MAX, Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST

Labels = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFigures:
    """One worker as M1 sees it, and what it has said of its machine."""

    state: str
    last_seen_age_s: float
    running: int
    slots: int
    clock_ahead_s: float
    #: By name of the metric; only what the worker has told.
    told: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnFigures:
    """What the moderator counts of itself since its process began."""

    started_at: float
    commits: int
    live_attempts: int
    open_tasks: int
    open_bytes: int
    room: int
    renewals: int
    refused: int
    disk_free_bytes: int
    batch_calls: Histogram
    batch_s: Histogram
    commit_s: Histogram


@dataclass(frozen=True, kw_only=True)
class Sample:
    """All figures at one moment. Keys of the mappings are label values, in the order named."""

    #: (task_type, queue)
    accepted: Mapping[Labels, int] = field(default_factory=dict)
    #: (task_type, state)
    ended: Mapping[Labels, int] = field(default_factory=dict)
    #: (task_type, outcome)
    attempts: Mapping[Labels, int] = field(default_factory=dict)
    #: (outcome,)
    webhook: Mapping[Labels, int] = field(default_factory=dict)
    #: (outcome,)
    schedule: Mapping[Labels, int] = field(default_factory=dict)
    #: (queue, state)
    depth: Mapping[Labels, int] = field(default_factory=dict)
    #: (task_type,): seconds in the queue before an attempt, and seconds of an attempt.
    waited: Mapping[Labels, Histogram] = field(default_factory=dict)
    ran: Mapping[Labels, Histogram] = field(default_factory=dict)
    #: (queue,): seconds, and whether it is paused.
    queue_age: Mapping[Labels, float] = field(default_factory=dict)
    queue_paused: Mapping[Labels, int] = field(default_factory=dict)
    #: (state,); ``None`` when the moderator does not answer.
    workers: Mapping[Labels, int] | None = None
    #: One for each worker on record, by its name; empty when the moderator does not answer.
    worker_figures: Mapping[str, WorkerFigures] = field(default_factory=dict)
    moderator_up: bool = False
    #: ``None`` when it does not answer.
    moderator: OwnFigures | None = None
    #: (name, kind): when it ends, as an instant.
    certificates: Mapping[Labels, float] = field(default_factory=dict)
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


def full_sample() -> Sample:
    """Return a sample in which no family is missing, for whoever wants to know their names."""
    own = OwnFigures(
        started_at=0.0,
        commits=0,
        live_attempts=0,
        open_tasks=0,
        open_bytes=0,
        room=0,
        renewals=0,
        refused=0,
        disk_free_bytes=0,
        batch_calls=Histogram(),
        batch_s=Histogram(),
        commit_s=Histogram(),
    )
    return Sample(store_readable=True, moderator_up=True, workers={}, moderator=own)


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
        yield from _of_workers(sample.worker_figures)
    if sample.moderator is not None:
        yield from _of_moderator(sample.moderator)
    yield _gauge(
        "hcna_certificate_expiry_timestamp_seconds",
        "When a certificate of this cluster ends.",
        ("name", "kind"),
        sample.certificates,
    )
    yield from _of_composite(sample)


def _with_few_queues(sample: Sample) -> Sample:
    """Return a sample with no more queues in its gauges than may be shown by name.

    Those that are paused and those with most open tasks keep their names. The others are one: its
    depths are their sums, its age is that of the oldest, and it is paused if all of them are.
    """
    depth, age, paused = sample.depth, sample.queue_age, sample.queue_paused
    queues = {key[0] for figures in (depth, age, paused) for key in figures}
    if len(queues) <= QUEUES_NAMED_MAX:
        return sample
    weights = {queue: [paused.get((queue,), 0), 0, 0] for queue in queues}
    for (queue, state), count in depth.items():
        weights[queue][1] += 0 if state in _ENDED else count
        weights[queue][2] += count
    order = sorted(queues, key=lambda queue: ([-weight for weight in weights[queue]], queue))
    named = frozenset(order[:QUEUES_NAMED_MAX])

    def shown(queue: str) -> str:
        return queue if queue in named else OTHER_QUEUES

    depths: Tally[Labels] = Tally()
    for (queue, state), count in depth.items():
        depths[shown(queue), state] += count
    return replace(
        sample,
        depth=depths,
        queue_age=_one_of_each(max, ((shown(queue), value) for (queue,), value in age.items())),
        queue_paused=_one_of_each(min, ((shown(queue), one) for (queue,), one in paused.items())),
    )


_ENDED = frozenset(state.value for state in TERMINAL)

V = TypeVar("V", int, float)


def _one_of_each(pick: Callable[[V, V], V], values: Iterable[tuple[str, V]]) -> dict[Labels, V]:
    found: dict[Labels, V] = {}
    for queue, value in values:
        found[queue,] = pick(value, found.get((queue,), value))
    return found


def _of_store(whole: Sample) -> Iterator[Metric]:
    sample = _with_few_queues(whole)
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
    tries: dict[Labels, int] = {("delivered",): 0, ("failed",): 0, ("given_up",): 0}
    yield _counter(
        "hcna_webhook_tries",
        "Reports to webhooks, by what came of each try.",
        ("outcome",),
        tries | dict(sample.webhook),
    )
    instants: dict[Labels, int] = {("started",): 0, ("skipped",): 0, ("missed",): 0}
    yield _counter(
        "hcna_schedule_instants",
        "Instants of schedules, by what became of each.",
        ("outcome",),
        instants | dict(sample.schedule),
    )
    yield _gauge(
        "hcna_queue_depth", "Tasks in a queue, by state.", ("queue", "state"), sample.depth
    )
    yield _gauge(
        "hcna_queue_oldest_age_seconds",
        "How long the first ready task of a queue has waited; 0 if none is ready.",
        ("queue",),
        sample.queue_age,
    )
    yield _gauge("hcna_queue_paused", "1 if a queue is paused.", ("queue",), sample.queue_paused)
    yield _histogram(
        "hcna_task_schedule_to_start_seconds",
        "Time in the queue before an attempt began.",
        ("task_type",),
        sample.waited,
    )
    yield _histogram(
        "hcna_attempt_duration_seconds",
        "Time from the start of an attempt to its end.",
        ("task_type",),
        sample.ran,
    )


#: States of a worker, all of them shown for each.
WORKER_STATES = tuple(state.value for state in WorkerState)
#: What a worker tells of its machine in its telemetry, by the metric that shows it.
TOLD = {
    "hcna_worker_cpu_percent": "cpu_percent",
    "hcna_worker_memory_available_bytes": "memory_available_bytes",
    "hcna_worker_disk_free_bytes": "disk_free_bytes",
}
#: The same names on a worker's own page and on C1's, where they are as M1 last heard of them.
WORKER_GAUGES = {
    "hcna_worker_slots": "Slots that are ready.",
    "hcna_worker_running_attempts": "Attempts that run.",
    "hcna_worker_cpu_percent": "Load of the machine's processors.",
    "hcna_worker_memory_available_bytes": "Memory that processes could still get.",
    "hcna_worker_disk_free_bytes": "Free space where handlers write.",
}


def _of_workers(workers: Mapping[str, WorkerFigures]) -> Iterator[Metric]:
    yield _gauge(
        "hcna_worker_state",
        "1 for the state that a worker is in, 0 for all others.",
        ("worker", "state"),
        {
            (name, state): int(state == one.state)
            for name, one in workers.items()
            for state in WORKER_STATES
        },
    )
    yield _gauge(
        "hcna_worker_last_seen_age_seconds",
        "Time since M1 last heard of a worker.",
        ("worker",),
        {(name,): one.last_seen_age_s for name, one in workers.items()},
    )
    yield _gauge(
        "hcna_worker_clock_ahead_seconds",
        "How far a worker's wall clock is ahead of M1's.",
        ("worker",),
        {(name,): one.clock_ahead_s for name, one in workers.items()},
    )
    for metric, text in WORKER_GAUGES.items():
        values: dict[Labels, float] = {}
        for name, one in workers.items():
            counted = {"hcna_worker_slots": one.slots, "hcna_worker_running_attempts": one.running}
            value = counted.get(metric, one.told.get(metric))
            if value is not None:
                values[name,] = value
        yield _gauge(metric, text, ("worker",), values)


def _of_moderator(own: OwnFigures) -> Iterator[Metric]:
    one: Labels = ()
    yield _gauge(
        "hcna_moderator_start_time_seconds", "When M1's process began.", (), {one: own.started_at}
    )
    yield _counter(
        "hcna_moderator_commits", "Batches that changed the store.", (), {one: own.commits}
    )
    yield _gauge(
        "hcna_moderator_live_attempts",
        "Attempts that are granted or run.",
        (),
        {one: own.live_attempts},
    )
    yield _gauge("hcna_open_tasks", "Tasks that have not ended.", (), {one: own.open_tasks})
    yield _gauge("hcna_open_bytes", "Their size in the store.", (), {one: own.open_bytes})
    yield _gauge("hcna_open_room", "Tasks that may still be accepted.", (), {one: own.room})
    yield _counter(
        "hcna_lease_renewals", "Heartbeats that renewed leases.", (), {one: own.renewals}
    )
    yield _histogram(
        "hcna_writer_batch_calls", "Calls in one batch of the writer.", (), {one: own.batch_calls}
    )
    yield _histogram(
        "hcna_writer_batch_duration_seconds",
        "Time to decide a batch and to commit it.",
        (),
        {one: own.batch_s},
    )
    yield _histogram(
        "hcna_store_commit_duration_seconds",
        "Time of the store to make a batch durable, fsync included.",
        (),
        {one: own.commit_s},
    )
    yield _counter("hcna_store_refusals", "Batches that the store refused.", (), {one: own.refused})
    yield _gauge(
        "hcna_store_disk_free_bytes", "Free space on M1's disk.", (), {one: own.disk_free_bytes}
    )


def _of_composite(sample: Sample) -> Iterator[Metric]:
    yield _counter(
        "hcna_http_requests",
        "Requests answered by this C1 replica.",
        ("route", "method", "status"),
        sample.requests,
    )
    yield _histogram(
        "hcna_http_request_duration_seconds",
        "Time to the answer, waits included.",
        ("route",),
        sample.durations,
    )
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


def _histogram(
    name: str, text: str, labels: Sequence[str], values: Mapping[Labels, Histogram]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, histogram in sorted(values.items(), key=lambda item: item[0]):
        family.add_metric(list(key), histogram.buckets(), histogram.total)
    return family


def _gauge(
    name: str, text: str, labels: Sequence[str], values: Mapping[Labels, float]
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

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

from hcna_ray.observability.exposition import Sample, render
from hcna_ray.observability.figures import (
    BUCKETS_S,
    OTHER_QUEUES,
    QUEUES_NAMED_MAX,
    Histogram,
)


def parsed(sample: Sample) -> dict[str, float]:
    text = render(sample).decode()
    return {
        f"{one.name}{sorted(one.labels.items())}": one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_completed_tasks_are_summed_over_types_under_the_plain_name() -> None:
    ended = {("echo", "completed"): 2, ("sleep", "completed"): 3, ("echo", "failed"): 1}
    found = parsed(Sample(ended=ended, store_readable=True))

    assert found["tasks_completed_total[]"] == 5
    assert found["hcna_tasks_total[('state', 'completed')]"] == 5
    assert found["hcna_tasks_total[('state', 'failed')]"] == 1
    assert found["hcna_tasks_total[('state', 'expired')]"] == 0


def test_an_unreadable_store_leaves_a_gap_instead_of_a_zero() -> None:
    found = parsed(Sample(store_readable=False))

    assert "tasks_completed_total[]" not in found
    assert found["hcna_store_readable[]"] == 0
    assert not any(name.startswith("hcna_workers") for name in found)


def test_so_many_queues_are_shown_by_name_and_the_others_as_one() -> None:
    many = QUEUES_NAMED_MAX
    names = [f"job-{number:03d}" for number in range(many + 3)]
    found = parsed(
        Sample(
            depth={(name, "completed"): 1 for name in names}
            | {("job-000", "completed"): 900, (names[-1], "queued"): 5, (names[-2], "running"): 5},
            queue_age={(name,): float(number) for number, name in enumerate(names)},
            queue_paused={(name,): int(name == names[-3]) for name in names},
            store_readable=True,
        )
    )

    def series(metric: str) -> set[str]:
        return {name for name in found if name.startswith(f"hcna_queue_{metric}[")}

    def of(metric: str, queue: str, *more: tuple[str, str]) -> float | None:
        return found.get(f"hcna_queue_{metric}{sorted([('queue', queue), *more])}")

    done = ("state", "completed")
    assert len(series("oldest_age_seconds")) == len(series("paused")) == many + 1
    assert of("depth", names[-1], ("state", "queued")) == 5
    assert of("depth", names[-2], ("state", "running")) == 5
    assert of("paused", names[-3]) == 1
    assert of("depth", "job-000", done) == 900
    assert of("depth", names[many - 1], done) is None
    assert of("depth", OTHER_QUEUES, done) == 3
    assert of("oldest_age_seconds", OTHER_QUEUES) == many - 1
    assert of("paused", OTHER_QUEUES) == 0


def test_labels_are_escaped() -> None:
    hostile = 'a"b\\c\nd'
    found = parsed(Sample(depth={(hostile, "queued"): 1}, store_readable=True))
    assert found[f"hcna_queue_depth[('queue', {hostile!r}), ('state', 'queued')]"] == 1


def test_a_histogram_counts_up_to_and_including_each_bound() -> None:
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 60.0, 61.0):
        histogram.observe(seconds)

    buckets = dict(histogram.buckets())
    assert (buckets["0.001"], buckets["0.0025"], buckets["60.0"], buckets["+Inf"]) == (2, 3, 4, 5)
    assert list(BUCKETS_S) == sorted(BUCKETS_S)
    assert math.isclose(histogram.total, 121.0021)

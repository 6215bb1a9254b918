from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

from hcna_ray.observability.exposition import Sample, render
from hcna_ray.observability.figures import BUCKETS_S, Histogram


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

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from hcna_ray.observability.exposition import WorkerFigures, full_sample, render
from hcna_ray.observability.figures import SUM, Histogram, stored_deltas, stored_histogram


def test_what_the_store_counts_is_a_histogram_again() -> None:
    counted = stored_deltas([0.002, 0.02, 0.025, 7.0, 1e9, -0.5])

    assert counted["0.005"] == 2  # One of them began before it was queued, by a clock that is off.
    assert (counted["0.025"], counted["10.0"], counted["+Inf"]) == (2, 1, 1)
    assert counted[SUM] == round((0.002 + 0.02 + 0.025 + 7.0 + 1e9) * 1e6)
    histogram = stored_histogram(counted)
    assert dict(histogram.buckets())["0.025"] == 4
    assert dict(histogram.buckets())["+Inf"] == 6


def test_counts_of_other_bounds_are_not_lost() -> None:
    counted = stored_deltas([0.2, 0.7, 5.0], bounds=(0.3, 0.8))
    histogram = stored_histogram(counted, bounds=(0.5, 1.0))
    assert histogram.counts == [1, 1, 1]


def test_a_copy_stands_still() -> None:
    histogram = Histogram()
    histogram.observe(0.1)
    copied = histogram.copy()
    histogram.observe(0.2)
    assert (sum(copied.counts), copied.total) == (1, 0.1)


def test_a_full_sample_leaves_no_family_out() -> None:
    text = render(full_sample()).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"hcna_lease_renewals", "hcna_writer_batch_calls", "hcna_worker_state"} <= names


def test_what_a_worker_has_not_told_is_left_out() -> None:
    silent = WorkerFigures(
        state="asleep", last_seen_age_s=90.0, running=0, slots=0, clock_ahead_s=0.0
    )
    sample = full_sample()
    sample = type(sample)(**{**vars(sample), "worker_figures": {"W1": silent}})
    lines = render(sample).decode().splitlines()
    assert 'hcna_worker_state{state="asleep",worker="W1"} 1.0' in lines
    assert 'hcna_worker_last_seen_age_seconds{worker="W1"} 90.0' in lines
    assert not any(line.startswith("hcna_worker_cpu_percent{") for line in lines)

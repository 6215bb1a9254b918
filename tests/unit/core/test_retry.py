"""How long a retry waits, and whether there is one."""

from __future__ import annotations

import pytest

from hcna_ray.core.models import FailureKind, RetryPolicy, TaskError
from hcna_ray.core.retry import backoff_s, worth_retrying

PATIENT = RetryPolicy(max_attempts=10, backoff_s=2.0, factor=3.0, max_backoff_s=50.0, jitter=0.5)


@pytest.mark.parametrize(("failures", "pause"), [(1, 2.0), (2, 6.0), (3, 18.0), (4, 50.0)])
def test_pauses_grow_up_to_a_limit(failures: int, pause: float) -> None:
    assert backoff_s(PATIENT, failures, 0.0) == pause


@pytest.mark.parametrize(("draw", "pause"), [(-1.0, 1.0), (0.5, 2.5), (1.0, 3.0)])
def test_jitter_moves_a_pause_by_its_share(draw: float, pause: float) -> None:
    assert backoff_s(PATIENT, 1, draw) == pause


@pytest.mark.parametrize(("first", "pause"), [(2.0, 50.0), (0.0, 0.0)])
def test_a_power_too_large_for_a_float_is_the_limit(first: float, pause: float) -> None:
    policy = RetryPolicy(backoff_s=first, factor=100.0, max_backoff_s=50.0, jitter=0.0)

    assert backoff_s(policy, 999, 0.0) == pause


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (TaskError(kind=FailureKind.ERROR, message=""), True),
        (TaskError(kind=FailureKind.TIMEOUT, message=""), False),
        (TaskError(kind=FailureKind.TIMEOUT, message="", type="ReadTimeout"), True),
        (TaskError(kind=FailureKind.ERROR, message="", retryable=False), False),
    ],
    ids=["kind named", "not named", "class named", "not retryable"],
)
def test_what_the_policy_names_is_tried_again(error: TaskError, again: bool) -> None:
    policy = RetryPolicy(max_attempts=2, retry_on=("error", "ReadTimeout"))

    assert worth_retrying(policy, error, 1) is again


def test_attempts_run_out() -> None:
    policy, error = RetryPolicy(max_attempts=2), TaskError(kind=FailureKind.ERROR, message="")

    assert [worth_retrying(policy, error, failures) for failures in (1, 2)] == [True, False]

"""The arithmetic of retries: pure, with jitter handed in."""

from __future__ import annotations

from hcna_ray.core.models import RetryPolicy, TaskError


def backoff_s(policy: RetryPolicy, failures: int, jitter: float) -> float:
    """Return the pause before the next attempt.

    Args:
        policy: The task's policy.
        failures: Attempts that have failed so far, 1 or more.
        jitter: A draw from -1 to 1, made by the caller's random source.

    Returns:
        Seconds, never negative: ``backoff_s * factor ** (failures - 1)``, capped at
        ``max_backoff_s``, then moved by at most ``policy.jitter`` of itself.
    """
    try:
        pause = policy.backoff_s * policy.factor ** (failures - 1)
    except OverflowError:
        pause = policy.max_backoff_s if policy.backoff_s else 0.0
    pause = min(pause, policy.max_backoff_s)
    return max(0.0, pause * (1.0 + policy.jitter * jitter))


def worth_retrying(policy: RetryPolicy, error: TaskError, failures: int) -> bool:
    """Return whether an attempt that failed with ``error`` is tried again.

    Args:
        policy: The task's policy; ``retry_on`` names failure kinds and exception classes.
        error: What went wrong.
        failures: Attempts that have failed, this one included.
    """
    named = error.kind.value in policy.retry_on or (error.type or "") in policy.retry_on
    return error.retryable and named and failures < policy.max_attempts

"""Node names round-trip; pauses between attempts stay within their bounds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hcna_ray.core.errors import InvalidName
from hcna_ray.core.models import FailureKind, RetryPolicy, TaskError
from hcna_ray.core.naming import NodeName, is_short_name
from hcna_ray.core.retry import backoff_s, worth_retrying

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=500)

words = st.from_regex(r"[a-z0-9]([a-z0-9]|-(?!-)){0,20}[a-z0-9]", fullmatch=True)
names = st.builds(
    lambda arch, role, index, env, region, version: NodeName(
        arch=arch,
        role=role,
        index=index,
        env=env,
        region=region if env is not None else None,
        version=version,
    ),
    st.from_regex(r"[A-Z][A-Z0-9]{0,15}", fullmatch=True),
    st.from_regex(r"[A-Z]{1,4}", fullmatch=True),
    st.integers(1, 999_999),
    st.none() | words,
    st.none() | words,
    st.none() | st.tuples(st.integers(0, 9999), st.integers(0, 9999)),
)

#: The bounds of `hcna_ray.config` and of the API.
policies = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 1000),
    backoff_s=st.floats(0, 86400),
    factor=st.floats(1, 100),
    max_backoff_s=st.floats(0, 30 * 86400),
    jitter=st.floats(0, 1),
    retry_on=st.lists(st.sampled_from(("error", "timeout", "ValueError")), unique=True).map(tuple),
)
draws = st.floats(-1, 1)


@fixed
@given(names)
def test_a_name_that_is_written_is_read_again(name: NodeName) -> None:
    assert NodeName.parse(str(name)) == name
    assert is_short_name(name.short)


@fixed
@given(
    st.text(max_size=40)
    | st.from_regex(r"HCNA-[A-Z]{0,2}[0-9]{0,2}(--[a-zA-Z0-9.-]{0,6}){0,4}", fullmatch=True)
)
def test_any_text_is_refused_or_given_back_as_it_was(text: str) -> None:
    try:
        given_back = str(NodeName.parse(text))
    except InvalidName as error:
        given_back = error.name
    assert given_back == text


@fixed
@given(policies, st.integers(1, 1000), draws)
def test_a_pause_is_never_negative_nor_longer_than_its_limit_and_jitter(
    policy: RetryPolicy, failures: int, draw: float
) -> None:
    pause = backoff_s(policy, failures, draw)

    assert 0.0 <= pause <= policy.max_backoff_s * (1 + policy.jitter)


@fixed
@given(policies, st.integers(1, 999))
def test_pauses_never_shrink(policy: RetryPolicy, failures: int) -> None:
    assert backoff_s(policy, failures, 0.0) <= backoff_s(policy, failures + 1, 0.0)


@fixed
@given(policies, st.integers(1, 1000), draws)
def test_a_pause_of_zero_stays_zero(policy: RetryPolicy, failures: int, draw: float) -> None:
    eager = RetryPolicy(backoff_s=0.0, factor=policy.factor, max_backoff_s=policy.max_backoff_s)

    assert backoff_s(eager, failures, draw) == 0.0


@fixed
@given(policies, st.sampled_from(FailureKind), st.none() | st.just("ValueError"), st.booleans())
def test_attempts_are_bounded_whatever_goes_wrong(
    policy: RetryPolicy, kind: FailureKind, class_name: str | None, retryable: bool
) -> None:
    error = TaskError(kind=kind, message="", type=class_name, retryable=retryable)

    assert not worth_retrying(policy, error, policy.max_attempts)
    if policy.max_attempts > 1:
        named = bool({kind.value, class_name} & set(policy.retry_on))
        assert worth_retrying(policy, error, 1) == (retryable and named)

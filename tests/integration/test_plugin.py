"""A package of task types, installed beside the cluster's environment, works from end to end."""

from __future__ import annotations

import httpx
import pytest

from hcna_ray.client import ApiError, Client, InvalidRequest, Retry, TaskFailed, TaskRequest

TYPES = {
    "example.word_count",
    "example.flaky",
    "example.countdown",
    "example.spoken",
    "example.marked",
}


def test_its_types_are_known_to_c1_and_to_the_worker(client: Client, http: httpx.Client) -> None:
    assert set(client.worker("W1").task_types) >= TYPES
    status = http.get("/status").json()
    assert set(status["task_types"]) >= TYPES
    assert status["problems"] == []


def test_a_plain_function(client: Client) -> None:
    text = "To be, or not to be: that is the question. To BE!"
    task = client.submit("example.word_count", {"text": text, "top": 2})

    result = task.result(timeout_s=30)

    assert (result["words"], result["unique"]) == (12, 10)
    assert result["top"] == [["to", 3], ["be,", 1]]
    assert result["processed_by"] == "HCNA-W1--prod--home--v1.0"


def test_its_payload_model_is_c1s(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        client.submit("example.word_count", {"text": 7, "top": 1000, "x": 1})

    assert (refusal.value.status, refusal.value.code) == (422, "invalid_payload")
    fields = {error.field for error in refusal.value.errors}
    assert fields == {"payload.text", "payload.top", "payload.x"}
    with pytest.raises(ApiError):
        client.submit("example.word_count")


def test_one_that_needs_retries_gets_those_of_its_type(client: Client) -> None:
    task = client.submit("example.flaky", {"fail_until_attempt": 3})

    result = task.result(timeout_s=30)

    assert result["succeeded_on_attempt"] == 3
    view = client.get(task.id)
    assert [one.outcome for one in view.attempts] == ["errored", "errored", "completed"]
    assert [(one.error or {}).get("type") for one in view.attempts] == ["OSError", "OSError", None]
    assert (view.failures, view.losses) == (2, 0)
    # backoff 0.1 s, then twice that, each within a tenth.
    first, second, third = view.attempts
    assert first.ended_at is not None
    assert second.started_at is not None
    assert second.ended_at is not None
    assert third.started_at is not None
    assert (second.started_at - first.ended_at).total_seconds() >= 0.08
    assert (third.started_at - second.ended_at).total_seconds() >= 0.17


def test_one_that_never_succeeds_fails_after_its_attempts(client: Client) -> None:
    quick: Retry = {"backoff_s": 0.01, "max_backoff_s": 0.01}
    task = client.submit("example.flaky", {"fail_until_attempt": 99}, retry=quick)

    with pytest.raises(TaskFailed) as failure:
        task.result(timeout_s=30)

    assert (failure.value.kind, failure.value.attempts) == ("error", 5)
    assert failure.value.message == "attempt 5 fails, as asked"
    assert len(client.get(task.id).attempts) == 5


def test_the_submitter_may_ask_for_other_retries(client: Client) -> None:
    not_these: Retry = {"max_attempts": 5, "retry_on": ["ValueError"]}
    task = client.submit("example.flaky", {"fail_until_attempt": 2}, retry=not_these)

    with pytest.raises(TaskFailed) as failure:
        task.result(timeout_s=30)

    assert failure.value.attempts == 1


def test_a_generator(client: Client) -> None:
    result = client.submit("example.countdown", {"start": 3}).result(timeout_s=30)

    assert result["items"] == [{"left": 3}, {"left": 2}, {"left": 1}, {"left": 0}]


def test_many_of_them_among_others(client: Client) -> None:
    requests = [
        TaskRequest(task_type="example.word_count", payload={"text": "a " * (n + 1)})
        for n in range(50)
    ]
    requests += [TaskRequest(task_type="echo", payload={"n": n}) for n in range(50)]
    handles = client.submit_many(requests)

    views = client.wait(handles, timeout_s=60)

    assert {view.status for view in views} == {"completed"}
    assert [(view.result or {})["words"] for view in views[:50]] == list(range(1, 51))

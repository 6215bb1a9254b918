from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime
from itertools import count, islice

import httpx
import pytest

from hcna_ray.client import (
    ApiError,
    Client,
    Conflict,
    InvalidRequest,
    NotFound,
    TaskCancelled,
    TaskExpired,
    TaskFailed,
    TaskOptions,
    TaskRequest,
    UnsendablePayload,
    WaitTimeout,
)
from tests.support.fake_c1 import FakeC1, Seen, json_reply, problem
from tests.support.fake_time import FakeTime


def test_a_submitted_task_gives_its_result(client: Client) -> None:
    handle = client.submit("echo", {"message": "hi"}, priority=9)

    result = handle.result()

    assert result["message"] == "hi"
    assert handle.status == "completed"
    assert handle.view.worker == "W1"
    assert handle.view.duration_ms == 4


def test_options_travel_in_c1s_words(client: Client, c1: FakeC1) -> None:
    run_at = datetime(2026, 11, 21, 10, 0, 0, 500_000, tzinfo=UTC)

    client.submit("echo", run_at=run_at, requires={"gpu": 1}, idempotency_key="mine")

    seen = c1.requests[0]
    assert seen.headers["idempotency-key"] == "mine"
    assert seen.json == {
        "task_type": "echo",
        "payload": {},
        "run_at": "2026-11-21T10:00:00.500Z",
        "requires": {"gpu": 1},
    }


def test_every_option_is_a_field_of_the_request() -> None:
    fields = set(TaskRequest.__dataclass_fields__) - {"task_type", "payload"}
    assert set(TaskOptions.__annotations__) | _inherited(TaskOptions) == fields


def _inherited(cls: type) -> set[str]:
    return set(cls.__required_keys__) | set(cls.__optional_keys__)  # type: ignore[attr-defined]


def test_what_json_cannot_say_is_refused_before_sending(client: Client, c1: FakeC1) -> None:
    with pytest.raises(UnsendablePayload):
        client.submit("echo", {"x": float("nan")})
    with pytest.raises(UnsendablePayload):
        client.submit("echo", {"x": {1, 2}})
    assert c1.requests == []


def test_a_refusal_carries_its_code(client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.submit("nonsense")
    assert (caught.value.status, caught.value.code) == (422, "unknown_task_type")
    assert "nonsense" in str(caught.value)


def test_a_failure_raises_with_facts_and_survives_pickling(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.finish(handle.id, "failed", error={"kind": "oom", "message": "too big"})

    with pytest.raises(TaskFailed) as caught:
        handle.result()

    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.kind, error.message, error.attempts) == ("oom", "too big", 1)
    assert str(error) == str(caught.value)


def test_cancelled_and_expired_have_types_of_their_own(client: Client, c1: FakeC1) -> None:
    cancelled, expired = client.submit("hold"), client.submit("hold")
    cancelled.cancel("no longer needed")
    c1.finish(expired.id, "expired")

    with pytest.raises(TaskCancelled):
        cancelled.result()
    with pytest.raises(TaskExpired):
        expired.result()
    assert cancelled.status == "cancelled"


def test_a_second_cancel_is_a_conflict(client: Client) -> None:
    handle = client.submit("hold")
    handle.cancel()
    with pytest.raises(Conflict) as caught:
        handle.cancel()
    assert caught.value.code == "task_finished"


def test_a_cancel_whose_answer_was_lost_is_no_conflict(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")

    def lose(seen: Seen) -> None:
        raise httpx.ReadError("reset")

    c1.after.append(lose)
    assert handle.cancel().status == "cancelled"


def test_attach_needs_only_the_id(client: Client, c1: FakeC1) -> None:
    task_id = client.submit("echo", {"n": 1}).id
    other = Client("http://c1.test", "test-key", transport=c1.transport())

    assert other.attach(task_id).result()["n"] == 1
    with pytest.raises(NotFound):
        other.attach("task-none")


def test_waiting_asks_c1_to_wait_and_asks_again(client: Client, c1: FakeC1, time: FakeTime) -> None:
    handle = client.submit("hold")
    asked: list[str] = []

    def still_running(seen: Seen) -> None:
        asked.append(seen.query.get("wait", ""))
        time.now_s += float(seen.query["wait"])
        if len(asked) == 2:
            c1.finish(handle.id, "completed", result={"done": True})

    c1.after.extend([still_running, still_running])
    assert handle.result()["done"] is True
    assert asked == ["30", "30"]


def test_wait_gives_up_when_told_and_the_task_goes_on(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    handle = client.submit("hold")

    def pass_time(seen: Seen) -> None:
        time.now_s += float(seen.query["wait"])

    c1.after.extend([pass_time, pass_time])
    with pytest.raises(WaitTimeout) as caught:
        handle.wait(timeout_s=40)
    assert caught.value.task_ids == (handle.id,)
    assert [seen.query["wait"] for seen in c1.requests[1:]] == ["30", "10"]
    assert c1.tasks[handle.id]["status"] == "queued"


def test_wait_for_several_keeps_their_order(client: Client, c1: FakeC1) -> None:
    c1.wait_limit = 2
    handles = [client.submit("echo", {"n": n}) for n in range(5)]
    views = client.wait(handles)
    assert [view.result and view.result["n"] for view in views] == [0, 1, 2, 3, 4]


def test_retry_replays_a_failed_task(client: Client, c1: FakeC1) -> None:
    handle = client.submit("echo")
    handle.wait()
    with pytest.raises(Conflict):
        client.retry(handle.id)
    c1.tasks[handle.id].update(status="failed", finished_at="x")
    assert client.retry(handle.id).result()["processed_by"]


def test_a_replay_whose_answer_was_lost_is_no_conflict(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.finish(handle.id, "failed", error={"kind": "error", "message": "boom"})

    def lose(seen: Seen) -> None:
        raise httpx.ReadError("reset")

    c1.after.append(lose)
    assert client.retry(handle.id).status == "queued"


def test_a_batch_reports_item_by_item(client: Client) -> None:
    batch = client.batch(
        [
            TaskRequest(task_type="echo", payload={"n": 1}, ref="a"),
            TaskRequest(task_type="nonsense"),
            TaskRequest(task_type="echo", depends_on=["ref:a"]),
        ]
    )
    assert [type(outcome).__name__ for outcome in batch] == [
        "TaskHandle",
        "InvalidRequest",
        "TaskHandle",
    ]
    assert (len(batch.handles), len(batch.errors)) == (2, 1)
    assert batch.handles[0].result()["n"] == 1


def test_an_atomic_batch_is_refused_whole(client: Client, c1: FakeC1) -> None:
    with pytest.raises(ApiError):
        client.batch([TaskRequest(task_type="nonsense")], atomic=True)
    assert c1.requests[0].query == {"atomic": "true"}


def test_an_empty_batch_asks_nobody(client: Client, c1: FakeC1) -> None:
    assert client.batch([]) == []
    assert c1.requests == []


def test_submit_many_has_no_upper_bound(client: Client, c1: FakeC1) -> None:
    handles = client.submit_many(TaskRequest(task_type="echo") for _ in range(10_001))
    assert len(handles) == 10_001
    assert len(c1.batches) == 2


def test_listing_follows_pages_lazily(client: Client, c1: FakeC1) -> None:
    client.submit_many([TaskRequest(task_type="echo", payload={"n": n}) for n in range(250)])
    before = len(c1.requests)

    assert len(list(islice(client.tasks(task_type="echo"), 10))) == 10
    assert len(c1.requests) == before + 1
    assert len(list(client.tasks())) == 250
    assert len(list(client.tasks(limit=120))) == 120


# -- map -------------------------------------------------------------------------------------------


def test_map_is_ordered_even_if_c1_answers_backwards(client: Client, c1: FakeC1) -> None:
    c1.wait_limit = 3
    results = client.map("echo", ({"n": n} for n in range(10)), chunk=4, max_in_flight=8)
    assert [result["n"] for result in results] == list(range(10))


def test_map_as_completed_gives_every_result_once(client: Client, c1: FakeC1) -> None:
    c1.wait_limit = 3
    results = client.map(
        "echo", ({"n": n} for n in range(10)), ordered=False, chunk=4, max_in_flight=8
    )
    numbers = [result["n"] for result in results]
    assert sorted(numbers) == list(range(10))
    assert numbers != list(range(10))


def test_map_takes_from_an_endless_iterable_only_what_it_needs(client: Client, c1: FakeC1) -> None:
    source = count()
    results = client.map("echo", ({"n": n} for n in source), chunk=5, max_in_flight=10)

    assert [result["n"] for result in islice(results, 7)] == list(range(7))
    assert next(source) <= 17 + 5
    assert len(c1.tasks) <= 20


def test_map_of_nothing_asks_nobody(client: Client, c1: FakeC1) -> None:
    assert list(client.map("echo", [])) == []
    assert c1.requests == []


def test_map_raises_the_first_failure_or_yields_it(client: Client, c1: FakeC1) -> None:
    c1.artifacts["bad"] = b"not compressed"
    payloads = [{"artifact": "bad"}]
    with pytest.raises(TaskFailed):
        list(client.map("drgfc.decompress", payloads))
    (outcome,) = client.map("drgfc.decompress", payloads, return_exceptions=True)
    assert isinstance(outcome, TaskFailed)
    (refused,) = client.map("nonsense", [{}], return_exceptions=True)
    assert isinstance(refused, InvalidRequest)


def test_map_finds_tasks_of_a_batch_whose_answer_was_lost(client: Client, c1: FakeC1) -> None:
    def lose(seen: Seen) -> None:
        raise httpx.ReadTimeout("gone")

    c1.after.append(lose)  # Stored; the second try is answered with stored ids, in a new batch.
    results = list(client.map("echo", [{"n": n} for n in range(3)]))
    assert [result["n"] for result in results] == [0, 1, 2]
    assert len(c1.tasks) == 3


def test_map_has_an_end_of_patience(client: Client, c1: FakeC1, time: FakeTime) -> None:
    def pass_time(seen: Seen) -> None:
        time.now_s += 3

    c1.after.extend([pass_time] * 4)
    with pytest.raises(WaitTimeout) as caught:
        list(client.map("hold", [{}, {}], timeout_s=5))
    assert len(caught.value.task_ids) == 2


@pytest.mark.parametrize("ordered", [True, False])
def test_map_waits_at_most_a_thousand_ids_at_once(
    client: Client, c1: FakeC1, ordered: bool
) -> None:
    results = client.map(
        "echo", ({"n": n} for n in range(2500)), ordered=ordered, chunk=500, max_in_flight=2000
    )
    assert sorted(result["n"] for result in results) == list(range(2500))


def test_map_refuses_bounds_of_nothing(client: Client) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(client.map("echo", [{}], chunk=0))


# -- workers and the rest --------------------------------------------------------------------------


def test_workers_can_be_seen_and_steered(client: Client) -> None:
    (worker,) = client.workers()
    assert (worker.name, worker.state, worker.resources["cpu"]) == ("W1", "online", 2)
    assert client.drain("W1", deadline_s=5).state == "draining"
    assert client.cordon("W1").state == "cordoned"
    assert client.uncordon("W1").state == "online"
    with pytest.raises(NotFound):
        client.worker("W9")


def test_a_worker_can_be_forgotten(client: Client, c1: FakeC1) -> None:
    with pytest.raises(Conflict):
        client.forget_worker("W1")
    assert client.forget_worker("W1", force=True).name == "W1"
    c1.worker_state = "gone"
    assert client.forget_worker("W1").state == "gone"


def test_a_queue_is_held_and_let_go(client: Client, c1: FakeC1) -> None:
    assert client.pause_queue("night") == {"queue": "night", "paused": True}
    assert client.status().paused == ("night",)
    assert client.resume_queue("night") == {"queue": "night", "paused": False}
    assert client.status().paused == ()


def test_an_intent_is_answered(client: Client) -> None:
    answer = client.send_intent("HCNA-W1--prod--home--v1.0", "test.ping")
    assert answer.answer["pong"] is True


def test_why_says_what_would_help(client: Client) -> None:
    handle = client.submit("echo", requires={"gpu": 1})
    told = client.why(handle.id)
    assert told.status == "queued"
    assert "gpu 1" in told.message
    assert told.fix


def test_why_of_a_failure_names_the_replay(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.finish(handle.id, "failed", error={"kind": "error", "message": "boom"})
    told = client.why(handle.id)
    assert (told.code, told.message) == ("error", "boom")
    assert handle.id in told.fix
    assert told.history == ("attempt 1 on W1: errored (boom)",)


def test_an_unhealthy_c1_is_an_answer(client: Client, c1: FakeC1) -> None:
    body = {"status": "unhealthy", "node_id": "x", "moderator_connected": False, "worker_nodes": 0}
    c1.script.append(json_reply(503, body))
    health = client.health()
    assert (health.status, health.moderator_connected) == ("unhealthy", False)


def test_a_refusal_is_not_taken_for_health(client: Client, c1: FakeC1, time: FakeTime) -> None:
    c1.script.append(problem(503, "overloaded", retry_after_s=2))
    assert client.health().status == "healthy"
    assert time.pauses == [2.0]


def test_batches_are_ndjson(client: Client, c1: FakeC1) -> None:
    client.batch([TaskRequest(task_type="echo", payload={"text": "a\nb"})])
    assert c1.requests[0].headers["content-type"] == "application/x-ndjson"
    assert json.loads(c1.requests[0].body)["payload"] == {"text": "a\nb"}


def test_why_is_what_c1_says(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    told = {"code": "near_timeout", "message": "runs on W1 for 9 s", "fix": "more time"}
    c1.tasks[handle.id].update(status="running", why=told)
    answer = client.why(handle.id)
    assert (answer.code, answer.message, answer.fix) == tuple(told.values())

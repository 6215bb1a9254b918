"""What C1 promises over HTTP, seen from outside, with a worker that really runs the tasks."""

from __future__ import annotations

import itertools
import json
import re
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from hcna_ray.security.keys import create_key, revoke_key
from tests.integration.conftest import Cluster, paused
from tests.support.live import eventually

W1 = "HCNA-W1--prod--home--v1.0"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
PROBES = {"/health", "/ready", "/live", "/metrics", "/metrics/targets", "/status"}
Json = dict[str, Any]


def queue_name() -> str:
    """Return a queue that no other test uses."""
    return f"q{uuid.uuid4().hex[:12]}"


def echo(**fields: Any) -> Json:
    return {"task_type": "echo", "payload": {"message": "x"}, **fields}


def submit(http: httpx.Client, body: Json, **headers: str) -> str:
    reply = http.post("/tasks", json=body, headers=headers)
    assert reply.status_code == 202, reply.text
    return str(reply.json()["task_id"])


def ended(http: httpx.Client, task_id: str, wait: float = 30) -> Json:
    reply = http.get(f"/tasks/{task_id}", params={"wait": wait})
    assert reply.status_code == 200, reply.text
    view: Json = reply.json()
    assert view["status"] in ("completed", "failed", "cancelled", "expired"), view
    return view


def look(http: httpx.Client, task_id: str) -> Json:
    reply = http.get(f"/tasks/{task_id}")
    assert reply.status_code == 200, reply.text
    view: Json = reply.json()
    return view


def problem(reply: httpx.Response) -> tuple[int, str]:
    """Return status and code of a refusal, which must be problem details."""
    assert reply.headers["content-type"] == "application/problem+json", reply.text[:300]
    body = reply.json()
    assert body["status"] == reply.status_code
    assert body["type"] == f"urn:hcna:{body['code']}"
    assert body["title"]
    assert body["detail"]
    return reply.status_code, body["code"]


def reason(http: httpx.Client, task_id: str) -> tuple[str, str]:
    """Return code and message of the reason why a task waits."""
    found = look(http, task_id)["pending_reason"]
    assert found, "no pending_reason"
    assert found["fix"]
    return found["code"], found["message"]


def iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def instant(text: str) -> datetime:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    return datetime.fromisoformat(text)


@pytest.fixture
def document(http: httpx.Client) -> Json:
    found: Json = http.get("/openapi.json").json()
    return found


# -- one task --------------------------------------------------------------------------------------


def test_a_task_as_it_is_shown(http: httpx.Client) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = echo(metadata={"who": "me"}, priority=7, queue=queue_name())
    task_id = submit(http, body, traceparent=trace)

    task = ended(http, task_id)

    assert re.fullmatch(r"task-[0-9a-hjkmnp-tv-z]{26}", task_id)
    assert task["status"] == "completed"
    assert task["result"] == {
        "message": "x",
        "processed_by": W1,
        "duration_ms": task["result"]["duration_ms"],
    }
    ((attempt),) = task["attempts"]
    assert (attempt["attempt"], attempt["worker"], attempt["node_id"]) == (1, "W1", W1)
    assert (attempt["outcome"], attempt["error"]) == ("completed", None)
    times = [task[name] for name in ("accepted_at", "queued_at", "started_at", "finished_at")]
    assert [instant(text) for text in times] == sorted(instant(text) for text in times)
    assert (task["metadata"], task["priority"], task["queue"]) == (
        {"who": "me"},
        7,
        body["queue"],
    )
    assert task["traceparent"] == trace
    assert (task["error"], task["pending_reason"], task["cancel_requested"]) == (None, None, False)
    assert (task["failures"], task["losses"]) == (0, 0)
    assert "payload" not in task
    with_payload = http.get(f"/tasks/{task_id}", params={"payload": "true"}).json()
    assert with_payload["payload"] == {"message": "x"}


def test_json_is_json_whatever_the_content_type_says(http: httpx.Client) -> None:
    body = json.dumps(echo())
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        headers = {} if kind is None else {"Content-Type": kind}
        assert http.post("/tasks", content=body, headers=headers).status_code == 202


def test_numbers_and_text_come_back_as_they_were_sent(http: httpx.Client) -> None:
    payload = (
        '{"task_type":"echo","payload":{"big":9007199254740993,"tiny":1e-300,"one":1.0,'
        '"text":"\\u00e4\\ud83d\\ude00","none":null,"list":[[],{}]}}'
    )
    task_id = http.post("/tasks", content=payload).json()["task_id"]

    result = ended(http, task_id)["result"]

    assert result["big"] == 9007199254740993
    assert result["tiny"] == 1e-300
    assert isinstance(result["one"], float)
    assert result["text"] == "ä😀"
    assert (result["none"], result["list"]) == (None, [[], {}])


def test_waiting_returns_as_soon_as_the_task_has_ended(http: httpx.Client) -> None:
    task_id = submit(http, {"task_type": "sleep", "payload": {"seconds": 1.0}})
    started = time.monotonic()

    first = http.get(f"/tasks/{task_id}", params={"wait": 0.2}).json()
    assert time.monotonic() - started < 0.9
    assert first["status"] in ("queued", "running")
    assert ended(http, task_id)["status"] == "completed"
    assert time.monotonic() - started < 10


# -- idempotency -----------------------------------------------------------------------------------


def test_the_same_key_gives_the_same_task(http: httpx.Client) -> None:
    key = uuid.uuid4().hex
    first = http.post("/tasks", json=echo(), headers={"Idempotency-Key": key})
    ended(http, first.json()["task_id"])

    again = http.post("/tasks", json=echo(), headers={"Idempotency-Key": key})
    spelled_out = json.dumps(echo(priority=5, queue="default"), indent=4, sort_keys=True)
    third = http.post("/tasks", content=spelled_out, headers={"Idempotency-Key": key})
    in_body = http.post("/tasks", json=echo(idempotency_key=key))
    other = http.post("/tasks", json=echo(priority=6), headers={"Idempotency-Key": key})

    assert [one.status_code for one in (first, again, third, in_body)] == [202] * 4
    assert "duplicate" not in first.json()
    assert all(one.json()["duplicate"] is True for one in (again, third, in_body))
    ids = {one.json()["task_id"] for one in (first, again, third, in_body)}
    assert len(ids) == 1
    assert problem(other) == (409, "idempotency_conflict")
    assert len(look(http, ids.pop())["attempts"]) == 1


def test_a_batch_sent_again_stores_only_what_is_new(http: httpx.Client) -> None:
    key, queue = uuid.uuid4().hex, queue_name()
    tasks = [echo(queue=queue), echo(queue=queue, idempotency_key=f"own-{key}")]
    headers = {"Idempotency-Key": key}

    first = http.post("/tasks/batch", json={"tasks": tasks}, headers=headers).json()
    longer = {"tasks": [*tasks, echo(queue=queue)]}
    second = http.post("/tasks/batch", json=longer, headers=headers).json()

    assert second["batch_id"] == first["batch_id"]
    ids = [one["task_id"] for one in second["results"]]
    assert ids[:2] == [one["task_id"] for one in first["results"]]
    assert [one.get("duplicate", False) for one in second["results"]] == [True, True, False]
    assert len(http.get("/tasks", params={"queue": queue}).json()["tasks"]) == 3


# -- batches and waiting ---------------------------------------------------------------------------


def test_items_of_a_batch_are_accepted_or_refused_one_by_one(http: httpx.Client) -> None:
    items = [echo(), {"task_type": "ecko"}, echo(priority=11), {"task_type": "test.ping"}]
    reply = http.post("/tasks/batch", json={"tasks": items})

    assert reply.status_code == 202
    body = reply.json()
    assert (body["accepted"], body["rejected"]) == (2, 2)
    assert [one["index"] for one in body["results"]] == [0, 1, 2, 3]
    errors = {one["index"]: one["error"]["code"] for one in body["results"] if "error" in one}
    assert errors == {1: "unknown_task_type", 2: "invalid_request"}
    for index in (0, 3):
        task = ended(http, body["results"][index]["task_id"])
        assert (task["status"], task["batch_id"]) == ("completed", body["batch_id"])


def test_ndjson_with_a_broken_line(http: httpx.Client) -> None:
    lines = [json.dumps(echo()), '{"task_type": "ec', "", json.dumps(echo(priority=1))]
    headers = {"Content-Type": "application/x-ndjson"}
    body = http.post("/tasks/batch", content="\n".join(lines), headers=headers).json()

    assert (body["accepted"], body["rejected"]) == (2, 1)
    assert body["results"][1]["error"]["code"] == "malformed_json"


def test_an_atomic_batch_is_stored_as_a_whole_or_not_at_all(http: httpx.Client) -> None:
    queue = queue_name()
    tasks = [echo(queue=queue), echo(queue=queue, depends_on=["task-none"])]
    refused = http.post("/tasks/batch?atomic=true", json={"tasks": tasks})

    assert problem(refused) == (422, "dependency_not_found")
    assert http.get("/tasks", params={"queue": queue}).json()["tasks"] == []

    taken = http.post("/tasks/batch?atomic=true", json={"tasks": tasks[:1] * 3})
    assert taken.json()["accepted"] == 3


def test_a_graph_of_tasks_runs_in_its_order(http: httpx.Client) -> None:
    nap = {"task_type": "sleep", "payload": {"seconds": 0.2}}
    tasks = [
        {**nap, "ref": "end", "depends_on": ["ref:left", "ref:right"]},
        {**nap, "ref": "left", "depends_on": ["ref:start"]},
        {**nap, "ref": "right", "depends_on": ["ref:start"]},
        {**nap, "ref": "start"},
    ]
    body = http.post("/tasks/batch?atomic=true", json={"tasks": tasks}).json()
    end, left, right, start = (one["task_id"] for one in body["results"])
    code, message = reason(http, end)
    assert code == "waiting_dependencies"
    assert "2 of the 2 tasks" in message

    views = {task_id: ended(http, task_id) for task_id in (end, left, right, start)}

    assert {view["status"] for view in views.values()} == {"completed"}
    assert set(views[end]["depends_on"]) == {left, right}
    for child, parents in ((left, [start]), (right, [start]), (end, [left, right])):
        for parent in parents:
            assert instant(views[child]["started_at"]) >= instant(views[parent]["finished_at"])


def test_who_depends_on_a_failure_is_rejected(http: httpx.Client) -> None:
    missing = {"task_type": "drgfc.decompress", "payload": {"input_file": "nothing.here"}}
    tasks = [
        {**missing, "ref": "a"},
        echo(ref="b", depends_on=["ref:a"]),
        echo(depends_on=["ref:b"]),
    ]
    body = http.post("/tasks/batch", json={"tasks": tasks}).json()

    views = [ended(http, one["task_id"]) for one in body["results"]]

    assert [view["status"] for view in views] == ["failed"] * 3
    assert [view["error"]["kind"] for view in views][1:] == ["rejected", "rejected"]
    assert views[1]["attempts"] == []


def test_waiting_for_many_gives_each_end_once(http: httpx.Client) -> None:
    tasks = [{"task_type": "sleep", "payload": {"seconds": i / 10}} for i in range(6)]
    batch = http.post("/tasks/batch", json={"tasks": tasks}).json()
    ids = [one["task_id"] for one in batch["results"]]

    for what in ({"ids": ids}, {"batch_id": batch["batch_id"]}):
        seen: list[str] = []
        cursor = None
        for _ in range(20):
            asked = {**what, "cursor": cursor, "wait": 10}
            answer = http.post("/tasks/wait", json=asked).json()
            seen += [view["task_id"] for view in answer["ended"]]
            cursor = answer["cursor"]
            assert all("attempts" not in view for view in answer["ended"])
            assert all(view["result"]["processed_by"] == W1 for view in answer["ended"])
            if not answer["pending"] and len(seen) == len(ids):
                break
        assert sorted(seen) == sorted(ids)
        rest = http.post("/tasks/wait", json={**what, "cursor": cursor, "wait": 10}).json()
        assert (rest["ended"], rest["pending"]) == ([], 0)


# -- listing ---------------------------------------------------------------------------------------


def _pages(http: httpx.Client, **where: Any) -> Iterator[list[Json]]:
    cursor = None
    while True:
        params = {**where} if cursor is None else {**where, "cursor": cursor}
        reply = http.get("/tasks", params=params)
        assert reply.status_code == 200, reply.text
        yield reply.json()["tasks"]
        cursor = reply.json()["next_cursor"]
        if cursor is None:
            return


def test_pages_do_not_shift_when_new_tasks_arrive(http: httpx.Client) -> None:
    queue = queue_name()
    items = [echo(queue=queue) for _ in range(25)]
    batch = http.post("/tasks/batch", json={"tasks": items}).json()
    ids = [one["task_id"] for one in batch["results"]]

    found: list[str] = []
    sizes = []
    for page in _pages(http, queue=queue, limit=10):
        sizes.append(len(page))
        found += [task["task_id"] for task in page]
        submit(http, echo(queue=queue))

    assert found == ids[::-1]
    assert sizes == [10, 10, 5]


def test_listing_filters(http: httpx.Client) -> None:
    queue = queue_name()
    since = iso(datetime.now(UTC))
    ok = submit(http, echo(queue=queue))
    missing = {"task_type": "drgfc.compress", "payload": {"input_file": "nothing.here"}}
    failed = submit(http, {**missing, "queue": queue})
    later = submit(http, echo(queue=queue, run_at="2099-01-01T00:00:00Z"))
    ended(http, ok)
    ended(http, failed)

    def ids(**where: str) -> set[str]:
        found = {task["task_id"] for page in _pages(http, queue=queue, **where) for task in page}
        return found

    assert ids() == {ok, failed, later}
    assert ids(status="completed") == {ok}
    assert ids(status="failed,scheduled") == {failed, later}
    assert ids(task_type="echo") == {ok, later}
    assert ids(worker="W1") == {ok, failed}
    assert ids(worker=W1) == {ok, failed}
    assert ids(worker="W7") == set()
    assert ids(since=since) == {ok, failed, later}
    assert ids(since=iso(datetime.now(UTC) + timedelta(hours=1))) == set()
    assert ids(batch_id="batch-none") == set()
    assert http.delete(f"/tasks/{later}").json()["status"] == "cancelled"


# -- times, order, queues --------------------------------------------------------------------------


def test_a_task_does_not_start_before_its_time(http: httpx.Client) -> None:
    run_at = datetime.now(UTC) + timedelta(seconds=2)
    task_id = submit(http, echo(run_at=iso(run_at)))

    assert look(http, task_id)["status"] == "scheduled"
    code, message = reason(http, task_id)
    assert (code, message) == ("scheduled", f"scheduled for {iso(run_at)}")
    task = ended(http, task_id)
    assert task["status"] == "completed"
    late = instant(task["started_at"]) - instant(task["run_at"])
    assert timedelta(0) <= late < timedelta(seconds=3)


def test_a_task_that_could_not_start_in_time_expires(http: httpx.Client) -> None:
    queue = queue_name()
    with paused(http, queue):
        expires_at = iso(datetime.now(UTC) + timedelta(seconds=1))
        task_id = submit(http, echo(queue=queue, expires_at=expires_at))
        task = ended(http, task_id)

    assert (task["status"], task["attempts"], task["expires_at"]) == ("expired", [], expires_at)


def test_a_queue_timeout_fails_the_task(http: httpx.Client) -> None:
    queue = queue_name()
    with paused(http, queue):
        task = ended(http, submit(http, echo(queue=queue, queue_timeout_s=1)))

    assert (task["status"], task["error"]["kind"]) == ("failed", "timeout")
    assert task["attempts"] == []


def test_priority_decides_what_starts_first(http: httpx.Client) -> None:
    queue, key = queue_name(), uuid.uuid4().hex
    with paused(http, queue):
        # One at a time, so that the order of the starts can be seen.
        nap = {"task_type": "sleep", "payload": {"seconds": 0.05}, "queue": queue}
        tasks = [{**nap, "priority": p, "concurrency_key": key} for p in (0, 9, 5, 9, 0)]
        body = http.post("/tasks/batch", json={"tasks": tasks}).json()
    views = [ended(http, one["task_id"]) for one in body["results"]]

    started = sorted(range(5), key=lambda index: instant(views[index]["started_at"]))
    # The first was let through before the others queued behind its key.
    rest = [index for index in started if index != 0]
    assert rest == [1, 3, 2, 4]


@pytest.mark.parametrize("name", ["ordering_key", "concurrency_key"])
def test_one_after_another_and_never_two_at_a_time(http: httpx.Client, name: str) -> None:
    nap = {"task_type": "sleep", "payload": {"seconds": 0.4}, name: uuid.uuid4().hex}
    body = http.post("/tasks/batch", json={"tasks": [nap] * 4}).json()
    ids = [one["task_id"] for one in body["results"]]
    eventually(lambda: reason(http, ids[-1])[0] == name, 1, f"it waits for its {name}", 0.02)

    views = [ended(http, task_id) for task_id in ids]

    if name == "concurrency_key":
        views.sort(key=lambda view: str(view["started_at"]))
    for earlier, later in itertools.pairwise(views):
        assert instant(later["started_at"]) >= instant(earlier["finished_at"])


def test_a_paused_queue_holds_its_tasks_and_no_others(http: httpx.Client) -> None:
    queue = queue_name()
    with paused(http, queue):
        held = submit(http, echo(queue=queue))
        assert ended(http, submit(http, echo(queue=queue_name())))["status"] == "completed"
        assert reason(http, held) == ("queue_paused", f"the queue '{queue}' is paused")
        assert queue in http.get("/status").json()["paused"]
        assert http.get(f"/tasks/{held}", params={"wait": 0.5}).json()["status"] == "queued"
    assert ended(http, held)["status"] == "completed"
    assert queue not in http.get("/status").json()["paused"]


# -- cancel and retry ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_queued_task_is_cancelled_at_once(http: httpx.Client, method: str) -> None:
    queue = queue_name()

    def cancel() -> httpx.Response:
        if method == "DELETE":
            return http.delete(f"/tasks/{task_id}")
        return http.post(f"/tasks/{task_id}/cancel", json={"reason": "not needed"})

    with paused(http, queue):
        task_id = submit(http, echo(queue=queue))
        reply = cancel()
        second = cancel()

    assert reply.status_code == 200
    assert reply.json() == {"task_id": task_id, "status": "cancelled", "cancel_requested": True}
    assert problem(second) == (409, "task_finished")
    task = look(http, task_id)
    assert (task["status"], task["attempts"]) == ("cancelled", [])
    said = {"kind": "cancelled", "message": "not needed", "attempts": 0, "type": None}
    assert task["error"] == (said if method == "POST" else None)


def test_a_failed_task_can_be_run_again(http: httpx.Client, cluster: Cluster) -> None:
    name = f"{uuid.uuid4().hex}.txt"
    path = cluster.settings.data_dir / name
    task_id = submit(http, {"task_type": "drgfc.compress", "payload": {"input_file": name}})
    failed = ended(http, task_id)
    assert (failed["status"], failed["error"]["kind"]) == ("failed", "rejected")
    assert name in failed["error"]["message"]
    path.write_text("here now")

    reply = http.post(f"/tasks/{task_id}/retry")

    assert reply.status_code == 202
    assert reply.json()["task_id"] == task_id
    task = ended(http, task_id)
    path.unlink()
    assert (task["status"], task["error"]) == ("completed", None)
    assert [one["outcome"] for one in task["attempts"]] == ["errored", "completed"]
    assert [one["attempt"] for one in task["attempts"]] == [1, 2]
    assert problem(http.post(f"/tasks/{task_id}/retry")) == (409, "not_failed")


def test_failed_tasks_are_run_again_by_filter(http: httpx.Client) -> None:
    queue = queue_name()
    missing = {"task_type": "drgfc.compress", "payload": {"input_file": "nothing.here"}}
    items = [{**missing, "queue": queue}] * 3
    body = http.post("/tasks/batch", json={"tasks": [*items, echo(queue=queue)]}).json()
    ids = [one["task_id"] for one in body["results"]]
    for task_id in ids:
        ended(http, task_id)

    where = {"queue": queue, "kind": "rejected"}
    first = http.post("/tasks/retry", json={"filter": where, "limit": 2})

    assert first.status_code == 202
    assert len(first.json()["retried"]) == 2
    assert set(first.json()["retried"]) < set(ids[:3])
    assert first.json()["more"] is True
    for task_id in first.json()["retried"]:
        assert len(ended(http, task_id)["attempts"]) == 2
    assert http.post("/tasks/retry", json={"filter": {"queue": queue, "kind": "oom"}}).json() == {
        "retried": [],
        "more": False,
    }


def test_an_error_is_told_with_what_the_handler_said(http: httpx.Client) -> None:
    task = {"task_type": "example.flaky", "payload": {"fail_until_attempt": 5}}
    task_id = submit(http, {**task, "retry": {"max_attempts": 1}})

    view = ended(http, task_id)

    assert view["error"] == {
        "kind": "error",
        "message": "attempt 1 fails, as asked",
        "attempts": 1,
        "type": "OSError",
    }
    ((attempt),) = view["attempts"]
    assert attempt["outcome"] == "errored"
    assert "fails, as asked" in attempt["error"]["traceback"]


# -- workers ---------------------------------------------------------------------------------------


def test_workers_are_shown_with_what_they_have(http: httpx.Client) -> None:
    eventually(lambda: http.get("/workers/W1").json()["slots"] >= 2, 20, "both slots are ready")
    (worker,) = http.get("/workers").json()["workers"]

    assert (worker["name"], worker["node_id"], worker["state"]) == ("W1", W1, "online")
    assert worker["last_seen_age_s"] < 10
    assert worker["resources"]["cpu"] >= 1
    assert worker["resources"]["W1"] == 1
    assert {"echo", "sleep", "test.ping", "qegg.generate"} <= set(worker["task_types"])
    assert http.get("/workers/W1").json()["node_id"] == W1
    assert http.get(f"/workers/{W1}").json()["name"] == "W1"


def test_a_cordoned_worker_gets_nothing_new(http: httpx.Client) -> None:
    try:
        cordoned = http.post("/workers/W1/cordon")
        assert (cordoned.status_code, cordoned.json()["state"]) == (200, "cordoned")
        task_id = submit(http, echo())
        code, message = reason(http, task_id)
        assert code == "no_healthy_workers"
        assert message.startswith("No healthy workers available: W1 is cordoned")
        assert http.get("/health").json()["worker_nodes"] in (0, 1)
        assert http.get(f"/tasks/{task_id}", params={"wait": 1}).json()["status"] == "queued"
    finally:
        back = http.post("/workers/W1/uncordon")
    assert back.json()["state"] == "online"
    assert ended(http, task_id)["status"] == "completed"


def test_a_drained_worker_finishes_what_it_runs(http: httpx.Client) -> None:
    running = submit(http, {"task_type": "sleep", "payload": {"seconds": 2}})
    eventually(lambda: look(http, running)["status"] == "running", 10, "it runs")
    try:
        draining = http.post("/workers/W1/drain", json={"deadline_s": 60})
        assert draining.json()["state"] == "draining"
        assert draining.json()["draining_until"]
        waiting = submit(http, echo())
        task = ended(http, running)
        assert (task["status"], task["losses"]) == ("completed", 0)
        assert look(http, waiting)["status"] == "queued"
        assert "W1 is draining" in reason(http, waiting)[1]
    finally:
        http.post("/workers/W1/uncordon").raise_for_status()
    assert ended(http, waiting)["status"] == "completed"


@pytest.mark.parametrize(
    ("requires", "code", "words"),
    [
        ({"worker": "W9"}, "waiting_worker", "waiting for worker W9, which has never joined"),
        ({"labels": {"disk": "ssd"}}, "unplaceable", "label disk=ssd"),
        ({"resources": {"tpu": 1}}, "unplaceable", "tpu>=1"),
        ({"mem_gb": 100_000}, "unplaceable", "mem_gb>=100000"),
    ],
    ids=["worker", "label", "resource", "memory"],
)
def test_a_task_that_fits_nowhere_says_why(
    http: httpx.Client, requires: Json, code: str, words: str
) -> None:
    task_id = submit(http, echo(requires=requires))
    try:
        found, message = reason(http, task_id)
    finally:
        http.delete(f"/tasks/{task_id}").raise_for_status()
    assert found == code
    assert words in message


# -- operations ------------------------------------------------------------------------------------


def test_the_audit_log_says_who_did_what(http: httpx.Client) -> None:
    queue = queue_name()
    with paused(http, queue):
        task_id = submit(http, echo(queue=queue))
        http.delete(f"/tasks/{task_id}").raise_for_status()
    http.post(
        "/admin/send-intent", json={"dst": "W1", "intent": "test.ping", "payload": {}}
    ).raise_for_status()

    first = http.get("/admin/audit", params={"limit": 50}).json()
    # What was only read is told now and then, in between.
    entries = [one for one in first["entries"] if not one["action"].startswith("api.")][:4]

    assert [(one["action"], one["target"]) for one in entries] == [
        ("intent.send", "W1"),
        ("queue.resume", queue),
        ("task.cancel", task_id),
        ("queue.pause", queue),
    ]
    assert {one["principal"] for one in entries} == {
        http.get("/admin/keys").json()["keys"][0]["name"]
    }
    cursor = {"limit": 1, "cursor": str(entries[-1]["number"])}
    older = http.get("/admin/audit", params=cursor).json()
    assert all(one["number"] < entries[-1]["number"] for one in older["entries"])


def test_keys_are_listed_and_not_told(http: httpx.Client, cluster: Cluster) -> None:
    reply = http.get("/admin/keys")

    key = reply.json()["keys"][0]
    assert (key["name"], key["role"]) == ("owner", "admin")
    assert cluster.api_key not in reply.text
    stored = (cluster.settings.keys_dir / "keys.json").read_text()
    assert cluster.api_key not in stored
    assert re.search(r"[0-9a-f]{64}", stored)


def test_a_key_works_at_once_and_not_after_it_was_revoked(
    http: httpx.Client, cluster: Cluster
) -> None:
    name, keys_dir = f"guest-{uuid.uuid4().hex[:8]}", cluster.settings.keys_dir
    other = submit(http, echo())
    clear = create_key(keys_dir, name=name, role="submitter", now=time.time(), queues=["default"])
    with httpx.Client(
        base_url=cluster.url, headers={"X-API-Key": clear}, timeout=30, trust_env=False
    ) as guest:
        eventually(lambda: guest.get("/tasks").status_code == 200, 5, "the key is known")
        mine = submit(guest, echo())
        assert ended(guest, mine)["status"] == "completed"
        assert [task["task_id"] for task in guest.get("/tasks").json()["tasks"]] == [mine]
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/retry")):
            reply = guest.request(method, f"/tasks/{other}{path}")
            assert problem(reply) == (404, "task_not_found")
        assert problem(guest.post("/tasks", json=echo(queue="other"))) == (403, "out_of_scope")
        assert problem(guest.post("/workers/W1/cordon")) == (403, "forbidden")
        revoke_key(keys_dir, name, now=time.time())
        eventually(lambda: guest.get("/tasks").status_code == 401, 5, "the key is refused")
    assert ended(http, mine)["status"] == "completed"


def test_an_intent_that_nobody_can_take(http: httpx.Client) -> None:
    unknown = http.post("/admin/send-intent", json={"dst": "W9", "intent": "test.ping"})
    assert problem(unknown) == (404, "worker_not_found")


# -- every route -----------------------------------------------------------------------------------


def _filled(path: str) -> str:
    return re.sub(r"{\w+}", "none-such", path)


def test_every_route_but_the_probes_needs_a_key(cluster: Cluster, document: Json) -> None:
    opened: set[str] = set()
    with httpx.Client(base_url=cluster.url, timeout=30, trust_env=False) as stranger:
        for path, operations in document["paths"].items():
            for method in operations:
                reply = stranger.request(method, _filled(path))
                if reply.status_code == 401:
                    assert reply.headers["www-authenticate"].startswith("Bearer")
                    if method != "head":
                        assert problem(reply) == (401, "unauthorized")
                else:
                    assert reply.status_code == 200, f"{method} {path}: {reply.status_code}"
                    opened.add(path)
        wrong = {"X-API-Key": cluster.api_key[:-1] + "x"}
        assert problem(stranger.get("/tasks", headers=wrong)) == (401, "unauthorized")
        right = {"X-API-Key": cluster.api_key}
        assert stranger.get("/tasks", headers=right).status_code == 200
    assert opened == PROBES
    assert len(document["paths"]) >= 20


def test_methods_that_a_route_does_not_have(http: httpx.Client, document: Json) -> None:
    routes = document["paths"] | {"/docs": {"get": {}}, "/openapi.json": {"get": {}}}
    count = 0
    for path, operations in routes.items():
        for method in METHODS:
            if method.lower() in operations:
                continue
            reply = http.request(method, _filled(path))
            # /tasks/batch and the like are also /tasks/{task_id} to another method.
            if reply.status_code == 405:
                assert problem(reply) == (405, "method_not_allowed")
                allowed = {name.strip() for name in reply.headers["allow"].split(",")}
                assert {name.upper() for name in operations} <= allowed
                assert method not in allowed
                count += 1
            else:
                assert reply.status_code == 404, f"{method} {path}: {reply.status_code}"
                assert problem(reply)[0] == 404
    assert count >= 50


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/tasks/a/b/c", "/tasks/", "/Tasks", "/v1/tasks", "/favicon.ico"]
)
def test_what_is_not_there(http: httpx.Client, path: str) -> None:
    assert problem(http.get(path)) == (404, "not_found")
    assert problem(http.post(path, json={}))[0] == 404


# -- probes ----------------------------------------------------------------------------------------


def test_health_holds_what_the_guide_shows_and_more(http: httpx.Client) -> None:
    health = http.get("/health").json()

    assert {
        "status": "healthy",
        "node_id": "HCNA-C1--prod--home--v1.0",
        "moderator_connected": True,
        "worker_nodes": 1,
    }.items() <= health.items()
    assert health["store_readable"] is True
    assert set(health["tasks"]) == {"scheduled", "queued", "running"}
    assert http.get("/ready").json() == {"ready": True, "reasons": []}
    assert http.get("/live").json() == {"alive": True}


def test_status_at_a_glance(http: httpx.Client, cluster: Cluster) -> None:
    status = http.get("/status").json()

    assert status["versions"]["ray"].startswith("2.60")
    assert status["moderator"]["node_id"] == "HCNA-M1--prod--home--v1.0"
    assert status["workers"][0]["name"] == "W1"
    assert status["problems"] == []
    assert cluster.api_key not in json.dumps(status)


def test_metrics_have_the_names_of_the_guide_and_ours(http: httpx.Client) -> None:
    ended(http, submit(http, echo()))
    reply = http.get("/metrics")

    assert reply.headers["content-type"].startswith("text/plain; version=")
    names = set(re.findall(r"^(\w+)(?:{|\s)", reply.text, re.MULTILINE))
    assert {
        "tasks_completed_total",
        "hcna_tasks_total",
        "hcna_tasks_accepted_total",
        "hcna_tasks_ended_total",
        "hcna_task_attempts_total",
        "hcna_queue_depth",
        "hcna_workers",
        "hcna_moderator_up",
        "hcna_store_readable",
        "hcna_http_requests_total",
        "hcna_http_request_duration_seconds_bucket",
    } <= names
    samples = [line for line in reply.text.splitlines() if not line.startswith("#")]
    assert 'hcna_workers{state="online"} 1.0' in samples
    assert "hcna_moderator_up 1.0" in samples
    assert not [line for line in samples if "task-" in line], "ids are no labels"
    assert not [name for name in names if not name.startswith(("hcna_", "tasks_completed_total"))]


def test_the_control_port_serves_the_control_plane_only(
    cluster: Cluster, http: httpx.Client
) -> None:
    url = cluster.control_url
    assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "healthy"
    assert "tasks_completed_total" in httpx.get(f"{url}/metrics", trust_env=False).text
    groups = httpx.get(f"{url}/metrics/targets", trust_env=False).json()
    # Whoever asks the control port shall scrape the control port.
    assert groups[0]["targets"] == [urlsplit(url).netloc]
    exporters = {(one["labels"]["node"], one["labels"]["exporter"]) for one in groups}
    assert {("M1", "c1"), ("M1", "node"), ("M1", "edge"), ("W1", "node")} <= exporters
    stranger = httpx.get(f"{url}/admin/keys", trust_env=False)
    assert problem(stranger) == (401, "unauthorized")
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    assert httpx.get(f"{url}/admin/keys", headers=headers, trust_env=False).status_code == 200
    for path in (
        "/tasks",
        "/workers",
        "/admin/../tasks",
        "/admin/%2e%2e/tasks",
        "//tasks",
        "/docs",
    ):
        reply = httpx.get(f"{url}{path}", headers=headers, trust_env=False)
        assert problem(reply) == (404, "not_found"), path


def test_the_worker_has_a_page_of_its_own(cluster: Cluster) -> None:
    url = f"http://127.0.0.1:{cluster.settings.worker_port}"

    health = httpx.get(f"{url}/health", trust_env=False).json()
    metrics = httpx.get(f"{url}/metrics", trust_env=False).text

    assert (health["status"], health["node_id"]) == ("healthy", W1)
    assert 'hcna_worker_slots{worker="W1"}' in metrics


def test_the_reference_for_people(http: httpx.Client, document: Json) -> None:
    page = http.get("/docs")

    assert page.headers["content-type"].startswith("text/html")
    for path in document["paths"]:
        assert path in page.text
    # Nothing is loaded from elsewhere.
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page.text)
    assert document["openapi"].startswith("3.1")

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.api.schemas import SubmitOut, TaskOut, TasksOut
from hcna_ray.api.submission import Sender, Submissions
from hcna_ray.api.views import iso
from hcna_ray.config import Settings
from hcna_ray.core.errors import (
    DiskFull,
    NoAnswer,
    Overloaded,
    StoreFull,
    StoreUnavailable,
)
from hcna_ray.handlers import Registry, TaskDefaults, TaskType
from hcna_ray.handlers.registry import AnyPayload
from hcna_ray.runtime.messages import ReportKind
from hcna_ray.security.keys import ApiKey
from tests.support.c1 import Composite

FAR_FUTURE = "2099-01-01T00:00:00Z"


async def test_the_first_task_of_a_newcomer(c1: Composite) -> None:
    reply = await c1.http.post(
        "/tasks",
        content=b'{"task_type": "echo", "payload": {"message": "Hello, HCNA-3!"}}',
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )

    assert reply.status_code == 202
    assert reply.json() == {
        "task_id": "task-1",
        "status": "queued",
        "message": "Task submitted to M1 for scheduling",
    }
    SubmitOut.model_validate(reply.json())


async def test_a_completed_task_tells_who_ran_it_and_how_long(c1: Composite) -> None:
    task_id = await c1.submit()
    worker = c1.moderator.join()
    c1.moderator.run_all(worker, b'{"message":"hi","big":12345678901234567890123}', took_s=0.042)

    view = await c1.task(task_id)

    TaskOut.model_validate(view)
    assert view["status"] == "completed"
    assert view["result"] == {
        "message": "hi",
        "big": 12345678901234567890123,
        "processed_by": "HCNA-W1--test",
        "duration_ms": 42,
    }
    (attempt,) = view["attempts"]
    assert (attempt["worker"], attempt["outcome"]) == ("W1", "completed")
    assert attempt["started_at"] == "2026-01-01T00:00:00.000Z"
    assert view["pending_reason"] is None
    assert "payload" not in view


async def test_the_payload_is_shown_on_request_as_it_was_sent(c1: Composite) -> None:
    payload = {"n": 9007199254740993, "text": "ä\u2028", "list": [1.5, None, True]}
    task_id = await c1.submit(payload=payload, metadata={"who": "me"})

    view = await c1.task(task_id, payload="true")

    assert view["payload"] == payload
    assert view["metadata"] == {"who": "me"}


@pytest.mark.parametrize(
    ("task", "code"),
    [
        ({}, "no_workers"),
        ({"run_at": FAR_FUTURE}, "scheduled"),
        ({"queue": "slow"}, "queue_paused"),
    ],
)
async def test_a_waiting_task_says_why(c1: Composite, task: dict[str, Any], code: str) -> None:
    assert (await c1.http.post("/admin/queues/slow/pause")).json() == {
        "queue": "slow",
        "paused": True,
    }
    view = await c1.task(await c1.submit(**task))

    assert view["pending_reason"]["code"] == code
    assert view["pending_reason"]["message"]
    assert view["pending_reason"]["fix"]
    assert view["why"] == view["pending_reason"]


async def test_a_running_task_says_where_and_whether_it_is_heard_of(c1: Composite) -> None:
    worker = c1.moderator.join()
    task_id = await c1.submit()
    (offer,) = worker.granted()
    worker.report(worker.started(offer))
    runs = (await c1.task(task_id))["why"]
    for _ in range(15):
        c1.moderator.desk.tick(1.0)
    silent = (await c1.task(task_id))["why"]
    c1.moderator.kill()
    c1.services.cache.forget()
    unseen = (await c1.task(task_id))["why"]
    c1.moderator.down = False
    seen = (await c1.task(task_id))["why"]

    assert runs == {
        "code": "running",
        "message": "runs on W1 for 0 s",
        "fix": f"wait, or hcna task cancel {task_id}",
    }
    assert (silent["code"], "suspect" in silent["message"]) == ("worker_silent", True)
    assert unseen["code"] == "running_unseen"
    assert seen["code"] != "running_unseen", "that nobody answered is not remembered"


async def test_a_granted_task_says_what_keeps_its_worker_from_starting_it(c1: Composite) -> None:
    worker = c1.moderator.join()
    task_id = await c1.submit()
    worker.granted()
    about_to = (await c1.task(task_id))["pending_reason"]
    for _ in range(15):
        c1.moderator.desk.tick(1.0)
    silent = (await c1.task(task_id))["pending_reason"]
    assert (await c1.http.delete(f"/tasks/{task_id}")).status_code == 202
    cancelled = (await c1.task(task_id))["pending_reason"]

    assert {one["code"] for one in (about_to, silent, cancelled)} == {"granted"}
    assert about_to["fix"] == "wait"
    assert "W1, to which it is granted, is told to drop it" in cancelled["message"]
    assert silent["message"].startswith("granted to W1, which is suspect, last seen")
    assert silent["message"].endswith("when its lease ends it is queued again")
    assert "wake that machine" in silent["fix"]


async def test_a_task_whose_time_comes_while_m1_is_away_says_so(c1: Composite) -> None:
    clock = c1.moderator.desk.clock
    soon = await c1.submit(run_at=iso(clock.now() + 60))
    later = await c1.submit(run_at=FAR_FUTURE)
    behind = await c1.submit(depends_on=[later])
    clock.advance(600)
    c1.services.cache.forget()
    due = (await c1.task(soon))["pending_reason"]
    c1.moderator.kill()
    c1.services.cache.forget()

    assert due["code"] == "due"
    for view in (await c1.task(soon), (await c1.http.get("/tasks")).json()["tasks"][2]):
        assert view["pending_reason"]["code"] == "moderator_unavailable"
        assert "M1 is started again by itself" in view["pending_reason"]["fix"]
    assert (await c1.task(later))["pending_reason"]["code"] == "scheduled"
    assert (await c1.task(behind))["pending_reason"]["code"] == "waiting_dependencies"


async def test_a_need_nobody_has_is_named(c1: Composite) -> None:
    c1.moderator.join("W1", cpu=2.0)
    view = await c1.task(await c1.submit(requires={"gpu": 1}))

    assert view["pending_reason"]["code"] == "unplaceable"
    assert "gpu" in view["pending_reason"]["message"]


async def test_waiting_for_dependencies_and_keys_is_explained(c1: Composite) -> None:
    first = await c1.submit(run_at=FAR_FUTURE, ordering_key="a")
    second = await c1.submit(depends_on=[first])
    third = await c1.submit(ordering_key="a")

    assert (await c1.task(second))["pending_reason"]["code"] == "waiting_dependencies"
    assert (await c1.task(third))["pending_reason"]["code"] == "ordering_key"


async def test_without_the_moderator_reads_work_and_writes_are_refused(c1: Composite) -> None:
    task_id = await c1.submit()
    c1.moderator.kill()

    view = await c1.task(task_id)
    refused = await c1.http.delete(f"/tasks/{task_id}")

    assert view["pending_reason"]["code"] == "moderator_unavailable"
    assert refused.status_code == 503
    assert refused.json()["code"] == "moderator_unavailable"
    assert "started again by itself" in refused.json()["fix"]
    assert refused.headers["retry-after"] == "2"


async def test_a_task_that_waits_for_a_forgotten_worker_says_so(c1: Composite) -> None:
    worker = c1.moderator.join()
    task_id = await c1.submit(on_disconnect="wait")
    (offer,) = worker.granted()
    worker.report(worker.started(offer))
    for _ in range(60):
        c1.moderator.desk.tick(1.0)
    waiting = (await c1.task(task_id))["pending_reason"]

    reply = await c1.http.delete("/workers/W1")

    assert (reply.status_code, reply.json()["waiting"]) == (200, 1)
    reason = (await c1.task(task_id))["pending_reason"]
    assert waiting["code"] == reason["code"] == "waiting_worker_return"
    assert "asleep" in waiting["message"]
    assert "has been forgotten" in reason["message"]
    assert "join again" in reason["fix"]


async def test_a_change_without_an_answer_may_have_been_made(c1: Composite) -> None:
    task_id = await c1.submit()
    c1.moderator.refuses = NoAnswer("moderator did not answer", 2)

    told = await c1.http.delete(f"/tasks/{task_id}")

    assert (told.status_code, told.json()["code"]) == (504, "outcome_unknown")
    assert told.headers["retry-after"] == "2"


async def test_a_wait_ends_with_the_task(c1: Composite) -> None:
    task_id = await c1.submit()
    waiting = asyncio.create_task(c1.task(task_id, wait=30))
    await settle()

    c1.moderator.run_all(c1.moderator.join())

    async with asyncio.timeout(2):
        assert (await waiting)["status"] == "completed"


async def test_a_wait_that_is_too_short_shows_the_task_as_it_stands(c1: Composite) -> None:
    view = await c1.task(await c1.submit(), wait=0.02)
    assert view["status"] == "queued"


async def test_a_thousand_waits_use_one_call_and_survive_a_new_moderator(c1: Composite) -> None:
    task_id = await c1.submit()
    waiting = [asyncio.create_task(c1.task(task_id, wait=30)) for _ in range(200)]
    await settle(400)
    calls = c1.moderator.change_calls
    assert calls <= 3

    c1.moderator.kill()
    await settle()
    c1.moderator.revive()
    c1.moderator.run_all(c1.moderator.join(incarnation="b"))

    async with asyncio.timeout(5):
        views = await asyncio.gather(*waiting)
    assert {view["status"] for view in views} == {"completed"}
    assert c1.services.feed.waiting == 0
    assert c1.services.admission.in_progress["wait"] == 0


async def test_a_failed_task_is_shown_and_can_be_run_again(c1: Composite) -> None:
    from hcna_ray.core.models import FailureKind, TaskError

    task_id = await c1.submit()
    worker = c1.moderator.join()
    (offer,) = worker.granted()
    worker.report(worker.started(offer))
    error = TaskError(kind=FailureKind.ERROR, message="no", type="ValueError", retryable=False)
    worker.report(worker.ended(offer, ReportKind.FAILED, error=error))

    view = await c1.task(task_id)
    TaskOut.model_validate(view)
    assert view["error"] == {"kind": "error", "message": "no", "attempts": 1, "type": "ValueError"}
    assert view["why"]["message"] == "failed after 1 attempt: ValueError: no"
    assert f"hcna task retry {task_id}" in view["why"]["fix"]
    again = await c1.http.post(f"/tasks/{task_id}/retry")
    assert (again.status_code, again.json()["status"]) == (202, "queued")
    many = await c1.http.post("/tasks/retry", json={"filter": {"task_type": "echo"}})
    assert many.json() == {"retried": [], "more": False}


async def test_cancel_ends_a_waiting_task_at_once(c1: Composite) -> None:
    task_id = await c1.submit()
    reply = await c1.http.post(f"/tasks/{task_id}/cancel", json={"reason": "changed my mind"})
    assert reply.status_code == 200
    assert reply.json() == {"task_id": task_id, "status": "cancelled", "cancel_requested": True}
    said = {"kind": "cancelled", "message": "changed my mind", "attempts": 0, "type": None}
    view = await c1.task(task_id)
    TaskOut.model_validate(view)
    assert view["error"] == said


async def test_pages_lead_through_all_tasks_newest_first(c1: Composite) -> None:
    ids = [await c1.submit(queue="q") for _ in range(5)]
    await c1.submit(queue="other")
    seen: list[str] = []
    cursor = None
    while True:
        params = {"queue": "q", "limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = (await c1.http.get("/tasks", params=params)).json()
        TasksOut.model_validate(page)
        seen += [task["task_id"] for task in page["tasks"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]


async def test_a_retry_with_the_same_key_returns_the_same_task(c1: Composite) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await c1.http.post("/tasks", json={"task_type": "echo"}, headers=headers)
    # Spelled out and in another order: the same request.
    body = b'{"payload": {}, "priority": 5, "task_type": "echo"}'
    second = await c1.http.post("/tasks", content=body, headers=headers)

    assert second.status_code == 202
    assert second.json()["task_id"] == first.json()["task_id"]
    assert second.json()["duplicate"] is True


async def test_the_trace_goes_along_and_a_broken_one_is_dropped(c1: Composite) -> None:
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for sent, kept in ((good, good), ("00-zz", None)):
        reply = await c1.http.post(
            "/tasks", json={"task_type": "echo"}, headers={"traceparent": sent}
        )
        assert (await c1.task(reply.json()["task_id"]))["traceparent"] == kept


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("full", 3), 503),
        (StoreUnavailable("read-only", 3), 503),
        (DiskFull("full", 3), 507),
        (StoreFull("full", 3), 507),
    ],
)
async def test_what_cannot_be_accepted_now_says_when_to_come_back(
    c1: Composite, error: Exception, status: int
) -> None:
    c1.moderator.refuses = error  # type: ignore[assignment]

    reply = await c1.http.post("/tasks", json={"task_type": "echo"})

    assert (reply.status_code, reply.headers["retry-after"]) == (status, "3")
    assert c1.moderator.desk.memory.size().tasks == 0


async def test_an_unexpected_error_tells_nothing_but_a_log_id(
    c1: Composite, caplog: pytest.LogCaptureFixture
) -> None:
    c1.moderator.refuses = RuntimeError("secret /path")  # type: ignore[assignment]

    reply = await c1.http.delete("/tasks/task-1")

    problem = reply.json()
    assert (reply.status_code, problem["code"]) == (500, "internal")
    assert "secret" not in reply.text
    assert any(getattr(r, "log_id", None) == problem["log_id"] for r in caplog.records)


async def settle(turns: int = 50) -> None:
    """Let everything that can run, run."""
    for _ in range(turns):
        await asyncio.sleep(0)


def test_a_type_whose_timeout_is_a_whole_number_gives_a_float(tmp_path: Path) -> None:
    """What is written down is read as a float again, and what M1 signs is held against that."""
    registry = Registry()
    registry.register(
        TaskType(name="acme.minute", handler=_nothing, defaults=TaskDefaults(timeout_s=60))
    )
    key = ApiKey(name="owner", role="admin", sha256="0" * 64, created_at=0.0)
    spec = Submissions(registry, Settings(home=tmp_path)).task(
        {"task_type": "acme.minute"}, Sender(key=key), task_id="t1", now=0.0
    )
    assert (spec.timeout_s, type(spec.timeout_s)) == (60.0, float)


def _nothing(payload: AnyPayload) -> None:
    """Do nothing."""

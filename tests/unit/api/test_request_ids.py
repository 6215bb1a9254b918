"""A request's name: taken or made, in the answer, in problems, in the lines of the log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hcna_ray.observability import logs
from hcna_ray.observability.log_context import current_fields
from tests.support.c1 import Composite, a_composite
from tests.support.fake_moderator import FakeModerator

NAME = "nightly/2026-11-22:7@laptop"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {"X-Request-ID": NAME, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
Lines = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
async def c1(tmp_path: Path) -> AsyncIterator[Composite]:
    async with a_composite(tmp_path) as composite:
        yield composite


@contextmanager
def logged(level: int) -> Iterator[Lines]:
    """Keep C1's lines; yield what returns those of an action."""
    stream = io.StringIO()
    log = logging.getLogger("hcna_ray.api")
    before = log.level
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonLines())
    log.addHandler(handler)
    log.setLevel(level)

    def of(action: str) -> list[dict[str, Any]]:
        lines = map(json.loads, stream.getvalue().splitlines())
        return [one for one in lines if one.get("action") == action]

    try:
        yield of
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


async def test_an_answer_has_the_name_that_was_sent(c1: Composite) -> None:
    good = await c1.http.get("/live", headers=HEADERS)
    refused = await c1.http.get("/tasks/nobody", headers=HEADERS)
    lost = await c1.http.get("/nowhere", headers=HEADERS)

    assert good.headers.get_list("x-request-id") == [NAME]
    assert "request_id" not in good.json()
    for reply, status in ((refused, 404), (lost, 404)):
        assert (reply.status_code, reply.json()["request_id"]) == (status, NAME)
        assert reply.headers.get_list("x-request-id") == [NAME]


@pytest.mark.parametrize(
    "sent", [[], [""], ["x" * 129], ["two words"], ["a", "a"], ['{"json":1}'], ["né"], ["a\tb"]]
)
async def test_what_is_no_name_is_passed_over_and_one_is_made(
    c1: Composite, sent: list[str]
) -> None:
    fields = [("x-request-id", one.encode()) for one in sent]
    names = [
        (await c1.http.get("/live", headers=fields)).headers.get_list("x-request-id")
        for _ in range(2)
    ]

    assert all(len(one) == 1 and len(one[0]) == 32 for one in names), names
    assert names[0] != names[1]


async def test_what_is_refused_before_any_route_has_its_name(c1: Composite) -> None:
    reply = await c1.http.post("/tasks", headers={**HEADERS, "Host": "evil.test"}, content=b"{}")

    assert reply.status_code == 421
    assert reply.json()["request_id"] == reply.headers["x-request-id"] == NAME


async def test_one_line_joins_the_request_its_trace_and_its_task(c1: Composite) -> None:
    with logged(logging.DEBUG) as lines:
        task = await c1.http.post("/tasks", json={"task_type": "echo"}, headers=HEADERS)
        batch = await c1.http.post("/tasks/batch", json={"tasks": [{"task_type": "echo"}]})
        await c1.http.get(f"/tasks/{task.json()['task_id']}")
        await c1.http.get("/tasks/" + "x" * 500)
        submitted, many, looked, long = lines("api.answered")

    assert (
        submitted.items()
        >= {
            "request_id": NAME,
            "trace_id": TRACE,
            "task_id": task.json()["task_id"],
            "method": "POST",
            "route": "/tasks",
            "status": 202,
            "principal": "owner",
        }.items()
    )
    assert many["request_id"] == batch.headers["x-request-id"]
    assert many["batch_id"] == batch.json()["batch_id"]
    assert "task_id" not in many
    assert looked["task_id"] == submitted["task_id"]
    assert len(long["task_id"]) == 100


async def test_answers_are_no_lines_unless_somebody_asks(c1: Composite) -> None:
    with logged(logging.INFO) as lines:
        await c1.submit()
        assert lines("api.answered") == []


async def test_lines_of_two_requests_at_once_keep_apart(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = asyncio.Barrier(2)

    async def broken(*_args: object, **_named: object) -> NoReturn:
        await both.wait()
        raise RuntimeError("a bug")

    monkeypatch.setattr(c1.services.gatherer, "submit", broken)
    with logged(logging.INFO) as lines:
        replies = await asyncio.gather(
            *(
                c1.http.post("/tasks", json={"task_type": "echo"}, headers={"X-Request-ID": name})
                for name in ("one", "two")
            )
        )
        told = {one["request_id"]: one for one in lines("api.internal_error")}

    assert [reply.json()["request_id"] for reply in replies] == ["one", "two"]
    assert {name: line["log_id"] for name, line in told.items()} == {
        reply.headers["x-request-id"]: reply.json()["log_id"] for reply in replies
    }
    assert told["one"]["task_id"] != told["two"]["task_id"]


async def test_what_is_done_for_several_requests_is_not_called_by_the_first(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    submit = FakeModerator.submit

    async def looked(self: FakeModerator, *args: Any, **named: Any) -> Any:
        seen.append(dict(current_fields()))
        return await submit(self, *args, **named)

    monkeypatch.setattr(FakeModerator, "submit", looked)
    await c1.http.post("/tasks", json={"task_type": "echo"}, headers=HEADERS)

    assert seen == [{}]

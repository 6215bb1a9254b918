"""C1's spans: one for each request that hands over work, and its context kept with the task."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

from hcna_ray.core.tracing import parse_traceparent
from hcna_ray.observability import logs
from hcna_ray.observability import spans as spans_module
from hcna_ray.observability.spans import Traces
from hcna_ray.observability.traces import TracesPlan
from tests.support.c1 import Composite, a_composite
from tests.support.otlp import SeenSpan, spooled

TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}


@pytest.fixture(autouse=True)
def no_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the tests may be slow."""
    monkeypatch.setattr(spans_module, "CLOSE_S", 60.0)


@pytest.fixture
async def c1(tmp_path: Path) -> AsyncIterator[Composite]:
    plan = TracesPlan(
        folder=tmp_path / "traces",
        bytes_max=1 << 20,
        sample_ratio=1.0,
        service="hcna-c1",
        node_id="HCNA-C1--test",
    )
    async with a_composite(tmp_path, traces=Traces(plan)) as composite:
        yield composite


def written(c1: Composite, tmp_path: Path) -> list[SeenSpan]:
    assert c1.services.traces is not None
    c1.services.traces.close()
    return spooled(tmp_path / "traces")


async def test_the_span_of_a_submit_is_what_the_task_keeps(c1: Composite, tmp_path: Path) -> None:
    reply = await c1.http.post("/tasks", json={"task_type": "echo", "queue": "q"}, headers=HEADERS)
    task_id = reply.json()["task_id"]
    await c1.http.get(f"/tasks/{task_id}")
    (span,) = written(c1, tmp_path)

    assert (span.trace_id, span.parent_id) == (TRACE, CLIENT_SPAN)
    assert (span.name, span.kind, span.service) == ("POST /tasks", "server", "hcna-c1")
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/tasks",
        "http.response.status_code": 202,
        "messaging.system": "hcna",
        "messaging.operation.name": "submit",
        "messaging.operation.type": "send",
        "messaging.message.id": task_id,
        "messaging.destination.name": "q",
        "hcna.task.type": "echo",
    }
    kept = parse_traceparent((await c1.task(task_id))["traceparent"])
    assert kept == (TRACE, span.span_id, True)


async def test_a_batch_is_one_span_that_all_its_tasks_keep(c1: Composite, tmp_path: Path) -> None:
    reply = await c1.http.post("/tasks/batch", json={"tasks": [{"task_type": "echo"}] * 3})
    (span,) = written(c1, tmp_path)

    ids = [one["task_id"] for one in reply.json()["results"]]
    kept = {(await c1.task(one))["traceparent"] for one in ids}
    assert kept == {f"00-{span.trace_id}-{span.span_id}-03"}
    assert span.name == "POST /tasks/batch"
    assert span.attributes["messaging.batch.message_count"] == 3
    assert span.parent_id == ""


async def test_what_is_refused_says_so_and_a_stranger_leaves_no_span(
    c1: Composite, tmp_path: Path
) -> None:
    refused = await c1.http.post("/tasks", json={"task_type": "nobody knows it"}, headers=HEADERS)
    async with c1.client("hcna_wrong") as stranger:
        unknown = await stranger.post("/tasks", json={"task_type": "echo"}, headers=HEADERS)
    (span,) = written(c1, tmp_path)

    assert (refused.status_code, unknown.status_code) == (422, 401)
    assert span.attributes["http.response.status_code"] == 422
    # The client's mistake is not the server's failure.
    assert not span.failed


async def test_a_repeated_submit_keeps_the_first_trace(c1: Composite) -> None:
    headers = {**HEADERS, "Idempotency-Key": "k"}
    again = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "Idempotency-Key": "k"}
    first = await c1.http.post("/tasks", json={"task_type": "echo"}, headers=headers)
    second = await c1.http.post("/tasks", json={"task_type": "echo"}, headers=again)

    assert first.json()["task_id"] == second.json()["task_id"]
    assert (await c1.task(first.json()["task_id"]))["traceparent"].split("-")[1] == TRACE


async def test_a_line_of_the_log_says_which_trace_met_trouble(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()

    async def broken(*_args: object, **_named: object) -> NoReturn:
        raise RuntimeError("a bug")

    monkeypatch.setattr(c1.services.gatherer, "submit", broken)
    log = logging.getLogger("hcna_ray.api")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonLines())
    log.addHandler(handler)
    try:
        reply = await c1.http.post("/tasks", json={"task_type": "echo"}, headers=HEADERS)
    finally:
        log.removeHandler(handler)

    assert reply.status_code == 500
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [one for one in lines if one.get("action") == "api.internal_error"]
    assert line["trace_id"] == TRACE

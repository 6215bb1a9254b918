"""Requests that C1 must refuse, each with its status and code: one table for every C1.

The unit tests send them to the application in their own process, the cluster tests to a live URL.
Texts in braces are filled in: ``{nonce}`` is new for each row, ``{id}`` is the id that the row's
last preparation answered with.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

#: Tasks that must not start while a row is checked.
FAR_FUTURE = "2099-01-01T00:00:00Z"

MIB = 1024 * 1024
SHA_OF_NOTHING = "0" * 64


@dataclass(frozen=True)
class Sent:
    """One request. ``body`` is sent as it is; a ``dict`` or ``list`` as JSON."""

    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A bad request, what must come back, and what has to be done first."""

    name: str
    request: Sent
    status: int
    code: str
    before: tuple[Sent, ...] = ()
    #: Send a key at all.
    key: bool = True


def bad(
    name: str,
    method: str,
    path: str,
    headers: dict[str, str] | None,
    body: Any,
    status: int,
    code: str,
    *before: Sent,
    key: bool = True,
) -> Row:
    """Build a row: method, path, headers, body, status, code."""
    return Row(name, Sent(method, path, body, headers or {}), status, code, before, key)


def echo(**fields: Any) -> dict[str, Any]:
    """Return the body of a good echo task, with ``fields``."""
    return {"task_type": "echo", "payload": {"message": "x"}, **fields}


def plan(**fields: Any) -> dict[str, Any]:
    """Return the body of a good schedule, with ``fields``; ``None`` leaves one out."""
    good = {"name": "nightly", "cron": "0 3 * * *", "task": echo(), **fields}
    return {name: value for name, value in good.items() if value is not None}


def nested(depth: int) -> bytes:
    """Return a task whose payload is nested so deeply."""
    return b'{"task_type":"echo","payload":{"a":' + b"[" * depth + b"]" * depth + b"}}"


LATER = Sent("POST", "/tasks", echo(run_at=FAR_FUTURE))
CANCELLED = Sent("POST", "/tasks/{id}/cancel")
NDJSON = {"Content-Type": "application/x-ndjson"}
PART = {"Content-Range": "bytes 0-3/8"}

ROWS: tuple[Row, ...] = (
    # -- bytes that are not JSON as it should be
    bad("no body", "POST", "/tasks", None, b"", 400, "malformed_json"),
    bad("cut off", "POST", "/tasks", None, b'{"task_type":', 400, "malformed_json"),
    bad("trailing comma", "POST", "/tasks", None, b'{"task_type":"echo",}', 400, "malformed_json"),
    bad("two documents", "POST", "/tasks", None, b"{}{}", 400, "malformed_json"),
    bad("single quotes", "POST", "/tasks", None, b"{'task_type':'echo'}", 400, "malformed_json"),
    bad("a comment", "POST", "/tasks", None, b'{"task_type":"echo"/*x*/}', 400, "malformed_json"),
    bad("byte order mark", "POST", "/tasks", None, b"\xef\xbb\xbf{}", 400, "malformed_json"),
    bad("not UTF-8", "POST", "/tasks", None, b'{"task_type":"\xff"}', 400, "malformed_json"),
    bad("UTF-16", "POST", "/tasks", None, "{}".encode("utf-16"), 400, "malformed_json"),
    bad(
        "half a surrogate pair",
        *("POST", "/tasks", None),
        b'{"task_type":"echo","payload":{"a":"\\ud800"}}',
        *(400, "malformed_json"),
    ),
    bad(
        "control character in a string",
        *("POST", "/tasks", None, b'{"task_type":"ec\x01ho"}', 400, "malformed_json"),
    ),
    bad(
        "key given twice",
        *("POST", "/tasks", None, b'{"task_type":"echo","task_type":"sleep"}'),
        *(400, "duplicate_key"),
    ),
    bad(
        "key given twice, deep inside",
        *("POST", "/tasks", None, b'{"task_type":"echo","payload":{"a":[{"b":1,"b":2}]}}'),
        *(400, "duplicate_key"),
    ),
    bad("nested 40 deep", "POST", "/tasks", None, nested(40), 400, "too_deep"),
    bad("nested 200 000 deep", "POST", "/tasks", None, nested(200_000), 400, "too_deep"),
    bad("open brackets only", "POST", "/tasks", None, b"[" * 500_000, 400, "too_deep"),
    bad(
        "NaN",
        *("POST", "/tasks", None, b'{"task_type":"echo","payload":{"a":NaN}}', 400, "not_finite"),
    ),
    bad(
        "minus infinity",
        *("POST", "/tasks", None, b'{"task_type":"echo","payload":{"a":-Infinity}}'),
        *(400, "not_finite"),
    ),
    bad(
        "1e999 is infinity too",
        *("POST", "/tasks", None, b'{"task_type":"echo","payload":{"a":1e999}}'),
        *(400, "not_finite"),
    ),
    bad(
        "integer beyond 64 bits",
        *("POST", "/tasks", None, b'{"task_type":"echo","payload":{"a":18446744073709551616}}'),
        *(400, "number_out_of_range"),
    ),
    bad(
        "integer of 100 000 digits",
        *("POST", "/tasks", None),
        b'{"task_type":"echo","payload":{"a":' + b"9" * 100_000 + b"}}",
        *(400, "number_out_of_range"),
    ),
    bad(
        "1001 keys",
        *("POST", "/tasks", None, echo(payload={str(i): i for i in range(1001)})),
        *(400, "too_many_keys"),
    ),
    # -- JSON that does not fit
    bad("a list", "POST", "/tasks", None, [], 422, "invalid_request"),
    bad("null", "POST", "/tasks", None, b"null", 422, "invalid_request"),
    bad("no task_type", "POST", "/tasks", None, {"payload": {}}, 422, "invalid_request"),
    bad("unknown type", "POST", "/tasks", None, {"task_type": "ecko"}, 422, "unknown_task_type"),
    bad("unknown field", "POST", "/tasks", None, echo(prioritiy=3), 422, "invalid_request"),
    bad("payload is text", "POST", "/tasks", None, echo(payload="x"), 422, "invalid_request"),
    bad("payload is null", "POST", "/tasks", None, echo(payload=None), 422, "invalid_request"),
    bad("priority 10", "POST", "/tasks", None, echo(priority=10), 422, "invalid_request"),
    bad("priority is text", "POST", "/tasks", None, echo(priority="5"), 422, "invalid_request"),
    bad("priority is true", "POST", "/tasks", None, echo(priority=True), 422, "invalid_request"),
    bad("priority 1.5", "POST", "/tasks", None, echo(priority=1.5), 422, "invalid_request"),
    bad("negative timeout", "POST", "/tasks", None, echo(timeout_s=-1), 422, "invalid_request"),
    bad("a year's timeout", "POST", "/tasks", None, echo(timeout_s=3.2e7), 422, "invalid_request"),
    bad("run_at is a number", "POST", "/tasks", None, echo(run_at=17), 422, "invalid_request"),
    bad(
        "run_at without time zone",
        *("POST", "/tasks", None, echo(run_at="2099-01-01T00:00:00"), 422, "invalid_request"),
    ),
    bad(
        "run_at is no date",
        *("POST", "/tasks", None, echo(run_at="tomorrow at noon"), 422, "invalid_request"),
    ),
    bad(
        "expired already",
        *("POST", "/tasks", None, echo(expires_at="2001-01-01T00:00:00Z"), 422, "invalid_request"),
    ),
    bad(
        "expires before it runs",
        *("POST", "/tasks", None),
        echo(run_at=FAR_FUTURE, expires_at="2098-01-01T00:00:00Z"),
        *(422, "invalid_request"),
    ),
    bad("queue with a slash", "POST", "/tasks", None, echo(queue="a/b"), 422, "invalid_request"),
    bad("queue ends in a line", "POST", "/tasks", None, echo(queue="a\n"), 422, "invalid_request"),
    bad(
        "unknown retry field",
        *("POST", "/tasks", None, echo(retry={"max_attemps": 3}), 422, "invalid_request"),
    ),
    bad(
        "zero attempts",
        *("POST", "/tasks", None, echo(retry={"max_attempts": 0}), 422, "invalid_request"),
    ),
    bad("negative cpu", "POST", "/tasks", None, echo(requires={"cpu": -1}), 422, "invalid_request"),
    bad(
        "on_disconnect: race",
        *("POST", "/tasks", None, echo(on_disconnect="race"), 422, "invalid_request"),
    ),
    bad(
        "a webhook that leads inside",
        *("POST", "/tasks", None, echo(webhook="https://10.0.0.1/x"), 422, "invalid_request"),
    ),
    bad(
        "a schedule without cron",
        *("POST", "/schedules", None, plan(cron=None), 422, "invalid_request"),
    ),
    bad(
        "a schedule with seconds",
        *("POST", "/schedules", None, plan(cron="0 0 3 * * *"), 422, "invalid_schedule"),
    ),
    bad(
        "a schedule of a 30th of February",
        *("POST", "/schedules", None, plan(cron="0 0 30 2 *"), 422, "invalid_schedule"),
    ),
    bad(
        "a schedule that never comes",
        *("POST", "/schedules", None, plan(cron="0 0 */20 * 1L"), 422, "invalid_schedule"),
    ),
    bad(
        "a schedule on Mars",
        *("POST", "/schedules", None, plan(timezone="Mars/X"), 422, "invalid_schedule"),
    ),
    bad(
        "a schedule of a task with run_at",
        *("POST", "/schedules", None, plan(task=echo(run_at=FAR_FUTURE)), 422, "invalid_request"),
    ),
    bad(
        "a schedule of a task with a key",
        "POST",
        "/schedules",
        None,
        plan(task=echo(idempotency_key="k")),
        422,
        "invalid_request",
    ),
    bad(
        "a schedule of an unknown type",
        *("POST", "/schedules", None, plan(task={"task_type": "nonsense"})),
        422,
        "unknown_task_type",
    ),
    bad(
        "a schedule of a large task",
        *("POST", "/schedules", None, plan(task=echo(payload={"a": "x" * 70_000}))),
        422,
        "invalid_request",
    ),
    bad(
        "overlap: race",
        *("POST", "/schedules", None, plan(overlap="race"), 422, "invalid_request"),
    ),
    bad(
        "a window of a year",
        *("POST", "/schedules", None, plan(catch_up_s=31_536_000), 422, "invalid_request"),
    ),
    bad(
        "a name with a slash",
        *("POST", "/schedules", None, plan(name="a/b"), 422, "invalid_request"),
    ),
    bad("no such schedule", "GET", "/schedules/nobody", None, None, 404, "schedule_not_found"),
    bad(
        "no such schedule to run",
        *("POST", "/schedules/nobody/run", None, None, 404, "schedule_not_found"),
    ),
    bad(
        "metadata of 20 KiB",
        *("POST", "/tasks", None, echo(metadata={"a": "x" * 20_480}), 422, "invalid_request"),
    ),
    bad("a ref outside of a batch", "POST", "/tasks", None, echo(ref="a"), 422, "invalid_request"),
    bad(
        "payload does not fit the type",
        *("POST", "/tasks", None, {"task_type": "sleep", "payload": {"seconds": "long"}}),
        *(422, "invalid_payload"),
    ),
    bad(
        "payload with an unknown field",
        *("POST", "/tasks", None, {"task_type": "sleep", "payload": {"seconds": 1, "x": 1}}),
        *(422, "invalid_payload"),
    ),
    bad(
        "a path that leads out of the worker's disk",
        *("POST", "/tasks", None),
        {"task_type": "drgfc.compress", "payload": {"input_file": "/etc/passwd"}},
        *(422, "invalid_payload"),
    ),
    bad(
        "a path with dots",
        *("POST", "/tasks", None),
        {"task_type": "drgfc.compress", "payload": {"input_file": "../../etc/passwd"}},
        *(422, "invalid_payload"),
    ),
    bad(
        "depends on a task that does not exist",
        *("POST", "/tasks", None, echo(depends_on=["task-none"]), 422, "dependency_not_found"),
    ),
    bad(
        "depends on a ref outside of a batch",
        *("POST", "/tasks", None, echo(depends_on=["ref:a"]), 422, "invalid_request"),
    ),
    # -- batches
    bad("empty batch", "POST", "/tasks/batch", None, {"tasks": []}, 422, "invalid_request"),
    bad("batch without tasks", "POST", "/tasks/batch", None, {}, 422, "invalid_request"),
    bad(
        "batch with another field",
        *("POST", "/tasks/batch", None, {"tasks": [echo()], "x": 1}, 422, "invalid_request"),
    ),
    bad(
        "atomic batch with one bad item",
        *("POST", "/tasks/batch?atomic=true", None, {"tasks": [echo(), {"task_type": "ecko"}]}),
        *(422, "unknown_task_type"),
    ),
    bad(
        "atomic batch with a line that is not JSON",
        *("POST", "/tasks/batch?atomic=true", NDJSON, b'{"task_type":"echo"}\n{"task', 400),
        "malformed_json",
    ),
    bad(
        "batch that goes in a circle",
        *("POST", "/tasks/batch?atomic=true", None),
        {
            "tasks": [
                echo(ref="a", depends_on=["ref:b"]),
                echo(ref="b", depends_on=["ref:c"]),
                echo(ref="c", depends_on=["ref:a"]),
            ]
        },
        *(422, "dependency_cycle"),
    ),
    bad(
        "task that depends on itself",
        *("POST", "/tasks/batch?atomic=1", None, {"tasks": [echo(ref="a", depends_on=["ref:a"])]}),
        *(422, "dependency_cycle"),
    ),
    bad(
        "ref that is not there",
        *("POST", "/tasks/batch?atomic=1", None, {"tasks": [echo(depends_on=["ref:a"])]}),
        *(422, "dependency_not_found"),
    ),
    bad(
        "ref given twice",
        *("POST", "/tasks/batch?atomic=1", None, {"tasks": [echo(ref="a"), echo(ref="a")]}),
        *(422, "invalid_request"),
    ),
    bad(
        "atomic batch that depends on nothing there is",
        *("POST", "/tasks/batch?atomic=1", None),
        {"tasks": [echo(), echo(depends_on=["task-none"])]},
        *(422, "dependency_not_found"),
    ),
    bad("10 001 items", "POST", "/tasks/batch", NDJSON, b"{}\n" * 10_001, 413, "too_large"),
    bad(
        "atomic is neither yes nor no",
        *("POST", "/tasks/batch?atomic=maybe", None, {"tasks": [echo()]}, 422, "invalid_request"),
    ),
    # -- size and encoding
    bad(
        "body of more than 1 MiB",
        *("POST", "/tasks", None, echo(payload={"a": "x" * MIB}), 413, "too_large"),
    ),
    bad(
        "compressed body",
        *("POST", "/tasks", {"Content-Encoding": "gzip"}, b"\x1f\x8b", 415, "unsupported_encoding"),
    ),
    bad("URL of 9000 bytes", "GET", "/tasks?queue=" + "q" * 9000, None, None, 414, "uri_too_long"),
    bad(
        "90 header fields",
        *("GET", "/tasks", {f"X-{i}": "1" for i in range(90)}, None, 431, "headers_too_large"),
    ),
    # -- who asks
    bad("no key", "POST", "/tasks", None, echo(), 401, "unauthorized", key=False),
    bad(
        "wrong key",
        *("POST", "/tasks", {"Authorization": "Bearer hcna_no"}, echo(), 401, "unauthorized"),
        key=False,
    ),
    bad(
        "basic authentication",
        *("GET", "/workers", {"Authorization": "Basic aGNuYTpoY25h"}, None, 401, "unauthorized"),
        key=False,
    ),
    bad("no key for an artifact", "GET", f"/artifacts/{SHA_OF_NOTHING}", None, None, 401,
        "unauthorized", key=False),
    # -- what does not exist
    bad("no such route", "GET", "/task", None, None, 404, "not_found"),
    bad("a trailing slash", "GET", "/tasks/", None, None, 404, "not_found"),
    bad("no such task", "GET", "/tasks/task-none", None, None, 404, "task_not_found"),
    bad("cancel no such task", "DELETE", "/tasks/task-none", None, None, 404, "task_not_found"),
    bad("retry no such task", "POST", "/tasks/task-none/retry", None, None, 404, "task_not_found"),
    bad("wait for no such task", "POST", "/tasks/wait", None, {"ids": ["task-none"]}, 404,
        "task_not_found"),
    bad("wait for no such batch", "POST", "/tasks/wait", None, {"batch_id": "batch-none"}, 404,
        "batch_not_found"),
    bad("no such worker", "GET", "/workers/W99", None, None, 404, "worker_not_found"),
    bad("drain no such worker", "POST", "/workers/W99/drain", None, None, 404, "worker_not_found"),
    bad("no such artifact", "GET", f"/artifacts/{SHA_OF_NOTHING}", None, None, 404,
        "artifact_not_found"),
    bad("not a digest", "GET", "/artifacts/..%2F..%2Fetc", None, None, 404, "not_found"),
    bad("PATCH", "PATCH", "/tasks", None, b"{}", 405, "method_not_allowed"),
    bad("DELETE of a probe", "DELETE", "/health", None, None, 405, "method_not_allowed"),
    # -- what does not fit the state of things
    bad("second cancel", "POST", "/tasks/{id}/cancel", None, None, 409, "task_finished",
        LATER, CANCELLED),
    bad("retry of a task that waits", "POST", "/tasks/{id}/retry", None, None, 409, "not_failed",
        LATER),
    bad(
        "idempotency key with another body",
        *("POST", "/tasks", {"Idempotency-Key": "{nonce}"}, echo(priority=9)),
        *(409, "idempotency_conflict"),
        Sent("POST", "/tasks", echo(run_at=FAR_FUTURE), {"Idempotency-Key": "{nonce}"}),
    ),
    bad("idempotency key with a space", "POST", "/tasks", {"Idempotency-Key": "a b"}, echo(), 422,
        "invalid_request"),
    bad("idempotency key of 300 characters", "POST", "/tasks", {"Idempotency-Key": "k" * 300},
        echo(), 422, "invalid_request"),
    # -- queries and small bodies
    bad("wait of an hour", "GET", "/tasks/task-none?wait=3600", None, None, 422, "invalid_request"),
    bad("wait is no number", "GET", "/tasks/x?wait=soon", None, None, 422, "invalid_request"),
    bad("wait is NaN", "GET", "/tasks/x?wait=nan", None, None, 422, "invalid_request"),
    bad("unknown parameter", "GET", "/tasks?stauts=failed", None, None, 422, "invalid_request"),
    bad("parameter twice", "GET", "/tasks?limit=1&limit=2", None, None, 422, "invalid_request"),
    bad("unknown status", "GET", "/tasks?status=lost", None, None, 422, "invalid_request"),
    bad("limit 0", "GET", "/tasks?limit=0", None, None, 422, "invalid_request"),
    bad("limit 1 000 000", "GET", "/tasks?limit=1000000", None, None, 422, "invalid_request"),
    bad("cursor of another kind", "GET", "/tasks?cursor=abc", None, None, 422, "invalid_request"),
    bad("wait for ids and batch", "POST", "/tasks/wait", None,
        {"ids": ["task-1"], "batch_id": "batch-1"}, 422, "invalid_request"),
    bad("wait for nothing", "POST", "/tasks/wait", None, {"ids": []}, 422, "invalid_request"),
    bad("retry without filter", "POST", "/tasks/retry", None, {}, 422, "invalid_request"),
    bad("reason is a number", "POST", "/tasks/x/cancel", None, {"reason": 7}, 422,
        "invalid_request"),
    bad("pause a queue with a bad name", "POST", "/admin/queues/a%20b/pause", None, None, 422,
        "invalid_request"),
    bad("intent without destination", "POST", "/admin/send-intent", None, {"intent": "test.ping"},
        422, "invalid_request"),
    # -- artifacts
    bad("wrong digest", "PUT", f"/artifacts?sha256={SHA_OF_NOTHING}", None, b"bytes", 422,
        "digest_mismatch"),
    bad("part without digest", "PUT", "/artifacts", PART, b"four", 422, "invalid_request"),
    bad("part that does not fit its range", "PUT", f"/artifacts?sha256={SHA_OF_NOTHING}", PART,
        b"five!", 422, "invalid_request"),
    bad("range that makes no sense", "PUT", f"/artifacts?sha256={SHA_OF_NOTHING}",
        {"Content-Range": "bytes 4-1/8"}, b"four", 422, "invalid_request"),
    bad("part from the middle", "PUT", f"/artifacts?sha256={SHA_OF_NOTHING}",
        {"Content-Range": "bytes 4-7/8"}, b"four", 409, "offset_mismatch"),
    bad("artifact of 5 TiB", "PUT", f"/artifacts?sha256={SHA_OF_NOTHING}",
        {"Content-Range": f"bytes 0-3/{5 << 40}"}, b"four", 413, "too_large"),
    bad("part of more than 8 MiB", "PUT", "/artifacts", None, b"x" * (9 * MIB), 413, "too_large"),
)  # fmt: skip


async def send(http: httpx.AsyncClient, sent: Sent, filled: dict[str, str]) -> httpx.Response:
    """Send one request with its placeholders filled in."""

    def fill(text: str) -> str:
        for name, value in filled.items():
            text = text.replace("{" + name + "}", value)
        return text

    body = sent.body
    if isinstance(body, dict | list):
        body = json.dumps(body).encode()
    headers = {name: fill(value) for name, value in sent.headers.items()}
    return await http.request(sent.method, fill(sent.path), headers=headers, content=body)


async def accepted_tasks(http: httpx.AsyncClient) -> float:
    """Return how many tasks this C1 has ever accepted, from its own figures."""
    text = (await http.get("/metrics")).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("hcna_tasks_accepted_total{")
    )


async def check(row: Row, http: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    """Send a row and compare the answer; nothing may be stored by it.

    Args:
        row: The row.
        http: Client with an admin key.
        stranger: Client without a key.
    """
    filled = {"nonce": uuid.uuid4().hex}
    for sent in row.before:
        reply = await send(http, sent, filled)
        assert reply.is_success, f"preparation: {reply.status_code} {reply.text}"
        filled["id"] = reply.json().get("task_id", "")
    stored = await accepted_tasks(http)
    reply = await send(http if row.key else stranger, row.request, filled)
    assert reply.headers["content-type"] == "application/problem+json", reply.text[:500]
    problem = reply.json()
    assert (reply.status_code, problem["code"]) == (row.status, row.code), reply.text[:1000]
    assert problem["status"] == row.status
    assert problem["type"] == f"urn:hcna:{row.code}"
    assert problem["title"]
    assert 0 < len(problem["detail"]) < 2000
    assert ("www-authenticate" in reply.headers) == (row.status == 401)
    assert await accepted_tasks(http) == stored


async def endless(chunk: bytes, count: int) -> AsyncIterator[bytes]:
    """Yield a body in chunks, so that it has no length the server could look at."""
    for _ in range(count):
        yield chunk

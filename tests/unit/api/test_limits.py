"""What is looked at before anything reads a request: fields, lengths, how slowly a body comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
from starlette.types import Message, Receive, Scope, Send

from hcna_ray.api import limits
from hcna_ray.api.bounds import LAST_FIELD, BodyLimits
from hcna_ray.api.clients import Origins
from hcna_ray.api.hosts import HostRule
from hcna_ray.api.limits import RequestLimits

HOST = (b"host", b"localhost")
Field = tuple[bytes, bytes]


class Reader:
    """An application that reads the whole body and remembers what it was told."""

    def __init__(self) -> None:
        self.fields: list[Field] | None = None
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.fields = scope["headers"]
        more = True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def ask(
    app: Reader, fields: list[Field], pieces: Sequence[bytes] = (b"",), *, endless: bool = False
) -> tuple[int, str]:
    """Send a request in pieces; return status and code."""
    limited = RequestLimits(
        app,
        bodies=BodyLimits(default=100, batch=1000, artifact_part=1000),
        hosts=HostRule((), any_address=False),
        origins=Origins(None),
        on_refusal=lambda scope, status: None,
    )
    left = list(pieces)
    sent: list[Message] = []

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(left) or endless}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/tasks", "headers": fields}
    async with asyncio.timeout(10):
        await limited(scope, receive, send)
    body = json.loads(sent[1]["body"])
    return sent[0]["status"], body.get("code", "")


async def test_a_body_in_pieces_arrives() -> None:
    app = Reader()

    assert await ask(app, [HOST], [b"ab", b"cd", b"ef"]) == (200, "")
    assert app.body == b"abcdef"


async def test_a_body_that_stands_still_ends_with_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_GRACE_S", 0.0)

    assert await ask(Reader(), [HOST], [b"ab"], endless=True) == (408, "request_timeout")


async def test_who_sends_enough_has_the_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_GRACE_S", 0.0)
    monkeypatch.setattr(limits, "BODY_BYTES_PER_S_MIN", 1e-3)

    assert await ask(Reader(), [HOST], [b"ab", b"cd"]) == (200, "")


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ([], 400, "invalid_header"),
        ([HOST, HOST], 400, "invalid_header"),
        ([(b"host", b"evil.test")], 421, "host_refused"),
        ([HOST, (b"origin", b"null")], 403, "origin_refused"),
        ([HOST, (b"content-length", b"4"), (b"content-length", b"4")], 400, "invalid_header"),
        ([HOST, (b"content-length", b"+4")], 400, "invalid_header"),
        ([HOST, (b"content-length", b"101")], 413, "too_large"),
        (
            [HOST, (b"content-length", b"4"), (b"transfer-encoding", b"chunked")],
            400,
            "invalid_header",
        ),
        ([HOST, (b"transfer-encoding", b"gzip, chunked")], 400, "invalid_header"),
        ([HOST, (b"content-encoding", b"gzip")], 415, "unsupported_encoding"),
        ([HOST, *[(b"x-a", b"b")] * 80], 431, "headers_too_large"),
        ([HOST, (b"x-a", b"b" * 12288)], 431, "headers_too_large"),
    ],
)
async def test_a_head_that_will_not_do(fields: list[Field], status: int, code: str) -> None:
    app = Reader()

    assert await ask(app, fields) == (status, code)
    assert app.fields is None


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b" chunked "])
async def test_chunks_will_do(coding: bytes) -> None:
    assert await ask(Reader(), [HOST, (b"transfer-encoding", coding)], [b"ab"]) == (200, "")


async def test_what_comes_behind_the_last_field_of_the_head_does_not_count() -> None:
    app = Reader()
    fields = [HOST, (b"x-a", b"b"), (LAST_FIELD, b"1"), (b"authorization", b"x"), HOST]

    assert await ask(app, fields) == (200, "")
    assert app.fields == [HOST, (b"x-a", b"b")]


async def test_what_uvicorn_adds_later_does_not_count_either() -> None:
    app = Reader()
    fields = [HOST]

    await ask(app, fields)
    fields.append((b"authorization", b"x"))

    assert app.fields == [HOST]

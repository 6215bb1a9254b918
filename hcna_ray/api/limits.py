"""Bounds on what a request may be, checked before anything reads it: plain ASGI, no buffering.

Header fields, URL and encoding are looked at first. The body is counted while it streams, so a
client that lies about its length, or gives none, is stopped at the limit all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hcna_ray.api.problems import (
    BadRequest,
    HeadersTooLarge,
    RequestRefused,
    TooLarge,
    UnsupportedEncoding,
    UriTooLong,
    respond,
)

#: Below what Serve's HAProxy takes (101 fields, some 15 KiB of head with the URL): what is beyond
#: that it refuses by itself, with a page that is no problem details.
HEADERS_MAX = 80
HEADER_BYTES_MAX = 12 * 1024
URL_BYTES_MAX = 8 * 1024
#: A refused body is read and thrown away this far, so that the client gets to read the answer:
#: closing a socket with unread input resets the connection and may destroy the answer.
DRAIN_BYTES_MAX = 16 * 1024 * 1024
DRAIN_S_MAX = 2.0


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Largest body by route, in bytes."""

    default: int
    batch: int
    artifact_part: int

    def of(self, method: str, path: str) -> int:
        """Return the limit for one request."""
        if method == "POST" and path == "/tasks/batch":
            return self.batch
        if method == "PUT" and path == "/artifacts":
            return self.artifact_part
        return self.default


class RequestLimits:
    """ASGI middleware that refuses what is too large with a problem and closes the connection."""

    def __init__(
        self, app: ASGIApp, *, bodies: BodyLimits, on_refusal: Callable[[Scope, int], None]
    ) -> None:
        self._app = app
        self._bodies = bodies
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the head, then pass the request on with a counted body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._bodies.of(scope["method"], scope["path"])
        try:
            length = _check_head(scope)
            if length is not None and length > limit:
                raise _too_large(limit)
        except RequestRefused as refusal:
            await self._refuse(refusal, scope, receive, send)
            return
        body = _CountedBody(receive, limit)
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if body.exceeded:
                    headers = [*message.get("headers", ()), (b"connection", b"close")]
                    message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, body.receive, guarded_send)
        except TooLarge as refusal:
            if started:
                raise
            self._on_refusal(scope, refusal.status)
            await _answer(refusal, scope, receive, send)

    async def _refuse(
        self, refusal: RequestRefused, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._on_refusal(scope, refusal.status)
        if not _has(scope, b"expect"):  # Such a client waits for leave to send; give it the answer.
            await _drain(receive)
        await _answer(refusal, scope, receive, send)


class _CountedBody:
    """Passes body chunks on until there are more bytes than allowed."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0
        self.exceeded = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._limit:
                self.exceeded = True
                if message.get("more_body", False):
                    await _drain(self._receive)
                raise _too_large(self._limit)
        return message


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes, the limit of this route")


def _check_head(scope: Scope) -> int | None:
    """Return the declared length of the body, if there is one."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > HEADERS_MAX:
        raise HeadersTooLarge(f"there are {len(headers)} header fields, at most {HEADERS_MAX}")
    if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES_MAX:
        raise HeadersTooLarge(f"the header fields have more than {HEADER_BYTES_MAX} bytes")
    path = scope.get("raw_path") or scope["path"].encode()
    if len(path) + len(scope.get("query_string", b"")) > URL_BYTES_MAX:
        raise UriTooLong(URL_BYTES_MAX)
    length: int | None = None
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise UnsupportedEncoding(value.decode("latin-1"))
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18:
                raise BadRequest("invalid_header", "Content-Length is not a number")
            length = int(value)
    return length


def _has(scope: Scope, name: bytes) -> bool:
    return any(key == name for key, _ in scope["headers"])


async def _drain(receive: Receive) -> None:
    left = DRAIN_BYTES_MAX
    try:
        async with asyncio.timeout(DRAIN_S_MAX):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b"")) + 1
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _answer(refusal: RequestRefused, scope: Scope, receive: Receive, send: Send) -> None:
    response = respond(refusal)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)

"""Bounds on what a request may be, checked before anything reads it: plain ASGI, no buffering.

Header fields, URL, encoding and by which name C1 is called are looked at first. The body is counted
while it streams, so a client that lies about its length, or gives none, is stopped at the limit all
the same; so is one that lets it trickle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hcna_ray.api.bounds import (
    BODY_BYTES_PER_S_MIN,
    BODY_GRACE_S,
    HEADER_BYTES_MAX,
    HEADERS_MAX,
    LAST_FIELD,
    URL_BYTES_MAX,
    BodyLimits,
)
from hcna_ray.api.clients import Origins
from hcna_ray.api.hosts import HostRule
from hcna_ray.api.problems import (
    BadRequest,
    HeadersTooLarge,
    RequestRefused,
    TooLarge,
    TooSlow,
    UnsupportedEncoding,
    UriTooLong,
    respond,
)
from hcna_ray.api.request_ids import REQUEST_ID, request_id_of, with_request_id
from hcna_ray.observability.log_context import lines_about

#: A refused body is read and thrown away this far, so that the client gets to read the answer:
#: closing a socket with unread input resets the connection and may destroy the answer.
DRAIN_BYTES_MAX = 16 * 1024 * 1024
DRAIN_S_MAX = 2.0
#: Of these one is enough: with two, each reader could believe another one.
_ONCE = frozenset(
    (b"host", b"origin", b"content-encoding", b"content-length", b"transfer-encoding")
)


class RequestLimits:
    """ASGI middleware that refuses what is too large with a problem and closes the connection.

    It is the first to see a request, so it is here that a request gets its name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        bodies: BodyLimits,
        hosts: HostRule,
        origins: Origins,
        on_refusal: Callable[[Scope, int], None],
    ) -> None:
        self._app = app
        self._bodies = bodies
        self._hosts = hosts
        self._origins = origins
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the head, then pass the request on with a counted body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["headers"] = _of_the_head(scope["headers"])
        request_id = request_id_of(scope["headers"])
        with lines_about({REQUEST_ID: request_id}):
            await self._pass_on(scope, receive, with_request_id(send, request_id))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._bodies.of(scope["method"], scope["path"])
        self._origins.settle(scope)
        try:
            length = _check_head(scope, self._hosts)
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
        except (TooLarge, TooSlow) as refusal:
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
    """Passes body chunks on until there are more bytes than allowed, or they come too slowly."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0
        #: When the first piece had come, if there are more to come.
        self._began: float | None = None
        self.exceeded = False

    async def receive(self) -> Message:
        message = await (self._receive() if self._began is None else self._in_time(self._began))
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._limit:
                self.exceeded = True
                if message.get("more_body", False):
                    await _drain(self._receive)
                raise _too_large(self._limit)
            if not message.get("more_body", False):
                self._began = None
            elif self._began is None:
                self._began = asyncio.get_running_loop().time()
        return message

    async def _in_time(self, began: float) -> Message:
        until = began + BODY_GRACE_S + self._seen / BODY_BYTES_PER_S_MIN
        try:
            async with asyncio.timeout_at(until):
                return await self._receive()
        except TimeoutError:
            self.exceeded = True
            raise TooSlow from None


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes, the limit of this route")


def _of_the_head(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the fields that came before the body, as a list of their own.

    uvicorn puts those that come behind the last chunk of a body into the same list, before the
    application has begun or after: there a client could say again what the edge has taken out.
    """
    for place, (name, _) in enumerate(fields):
        if name == LAST_FIELD:
            return fields[:place]
    return fields[:]


def _check_head(scope: Scope, hosts: HostRule) -> int | None:
    """Return the declared length of the body, if there is one."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > HEADERS_MAX:
        raise HeadersTooLarge(f"there are {len(headers)} header fields, at most {HEADERS_MAX}")
    if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES_MAX:
        raise HeadersTooLarge(f"the header fields have more than {HEADER_BYTES_MAX} bytes")
    path = scope.get("raw_path") or scope["path"].encode()
    if len(path) + len(scope.get("query_string", b"")) > URL_BYTES_MAX:
        raise UriTooLong(URL_BYTES_MAX)
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _ONCE:
            if name in found:
                raise BadRequest("invalid_header", f"{name.decode()} is given twice")
            found[name] = value
    hosts.check(found.get(b"host"), found.get(b"origin"))
    encoding = found.get(b"content-encoding", b"")
    if encoding.strip().lower() not in (b"", b"identity"):
        raise UnsupportedEncoding(encoding.decode("latin-1"))
    coding = found.get(b"transfer-encoding")
    if coding is not None and coding.strip().lower() != b"chunked":
        raise BadRequest("invalid_header", "Transfer-Encoding is not chunked")
    length = found.get(b"content-length")
    if length is None:
        return None
    if coding is not None:
        # Which of the two counts is what those who smuggle requests rely on.
        raise BadRequest("invalid_header", "Content-Length and Transfer-Encoding are both given")
    if not length.isdigit() or len(length) > 18:
        raise BadRequest("invalid_header", "Content-Length is not a number")
    return int(length)


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

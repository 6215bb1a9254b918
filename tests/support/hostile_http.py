"""Bytes that two parsers might understand differently, and what may come of them: one table.

The contract tests send them through a real edge, the cluster tests to Serve alone. Whatever the
answer is, three things must hold: what is hidden inside another request is not carried out, nothing
is carried out twice, and the next caller is answered as ever.

Requests are shown for what they did by the tasks they leave: the outer one submits to the queue
``outer-...``, the one that is hidden or comes behind to ``inner-...``.
"""

from __future__ import annotations

import json
import re
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

FAR_FUTURE = "2099-01-01T00:00:00Z"
#: Instead of a status: the connection was closed without an answer.
CLOSED = 0
#: An answer is shorter than this.
_BYTES_MAX = 4 * 1024 * 1024
#: How long an answer may take that must come.
_ANSWERED_S = 60.0


class Door(Protocol):
    """Where C1 is."""

    #: What to call it.
    host: str
    #: A key that may submit tasks and list them.
    key: str

    def connect(self) -> socket.socket:
        """Return a new connection, whose calls end after a while."""
        ...


@dataclass(frozen=True)
class Words:
    """What a case is made of."""

    host: bytes
    key: bytes
    nonce: str

    def task(self, queue: str) -> bytes:
        """Return the body of a task that never starts."""
        wanted = {"task_type": "echo", "queue": f"{queue}-{self.nonce}", "run_at": FAR_FUTURE}
        return json.dumps(wanted).encode()

    @property
    def outer(self) -> bytes:
        return self.task("outer")

    @property
    def inner(self) -> bytes:
        """Return a whole request."""
        body = self.task("inner")
        return self.post(f"Content-Length: {len(body)}".encode(), body=body)

    def post(
        self, *fields: bytes, body: bytes = b"", path: bytes = b"/tasks", version: bytes = b"1.1"
    ) -> bytes:
        """Return a request that submits, with these fields beside Host and key."""
        line = b"POST " + path + b" HTTP/" + version
        own = (b"Host: " + self.host, b"Authorization: Bearer " + self.key)
        return b"\r\n".join((line, *own, *fields, b"", body))

    def get(
        self, target: bytes, *fields: bytes, version: bytes = b"1.1", method: bytes = b"GET"
    ) -> bytes:
        """Return a request without a body."""
        line = method + b" " + target + b" HTTP/" + version
        return b"\r\n".join((line, b"Host: " + self.host, *fields, b"", b""))

    def bare(self, *lines: bytes) -> bytes:
        """Return a head of exactly these lines."""
        return b"\r\n".join((*lines, b"", b""))


Made = Callable[[Words], bytes]


@dataclass(frozen=True)
class Case:
    """One connection's bytes, and what may come of them."""

    name: str
    made: Made
    #: Status that the edge may give to the first request, or `CLOSED`.
    statuses: frozenset[int]
    #: Tasks of the outer request that may be there afterwards: least and most.
    outer: tuple[int, int] = (0, 0)
    #: The same of what came behind it.
    inner: tuple[int, int] = (0, 0)
    #: Requests that may reach the application.
    reach: int = 1
    #: HEAD is answered without a body.
    head_first: bool = False


@dataclass(frozen=True)
class Answered:
    """What came back on a connection."""

    statuses: tuple[int, ...]
    #: What could not be read as answers.
    rest: bytes


CASES: list[Case] = []


def case(
    name: str,
    statuses: int | tuple[int, ...],
    made: Made,
    *,
    outer: int | tuple[int, int] = 0,
    inner: int | tuple[int, int] = 0,
    reach: int = 1,
    head_first: bool = False,
) -> None:
    """Put a case into the table. A count alone is exact; a status alone is the only one."""
    CASES.append(
        Case(
            name,
            made,
            frozenset((statuses,) if isinstance(statuses, int) else statuses),
            (outer, outer) if isinstance(outer, int) else outer,
            (inner, inner) if isinstance(inner, int) else inner,
            reach,
            head_first,
        )
    )


def length(body: bytes, before: bytes = b"Content-Length: ", behind: bytes = b"") -> bytes:
    """Return the field that tells the length of a body, written in some way."""
    return before + str(len(body)).encode() + behind


def chunked(body: bytes, *, size: bytes | None = None, end: bytes = b"0\r\n\r\n") -> bytes:
    """Return a body as one chunk, its size written in some way."""
    size = b"%x" % len(body) if size is None else size
    return size + b"\r\n" + body + b"\r\n" + end


CHUNKED = b"Transfer-Encoding: chunked"
ONCE = (0, 1)
BAD = (400,)
#: A refusal for which the connection may also just end.
GONE = (400, 408, CLOSED)
FINE_OR_BAD = (202, 400)

# -- for comparison: what is no trick works, and shows ---------------------------------------------
case("a submission", 202, lambda w: w.post(length(w.outer), body=w.outer), outer=1)
case("a submission in chunks", 202, lambda w: w.post(CHUNKED, body=chunked(w.outer)), outer=1)
case(
    "a submission in chunks of one byte",
    202,
    lambda w: w.post(
        CHUNKED, body=b"".join(b"1\r\n%c\r\n" % each for each in w.outer) + b"0\r\n\r\n"
    ),
    outer=1,
)
case(
    "two requests behind each other",
    202,
    lambda w: w.post(length(w.outer), body=w.outer) + w.inner,
    outer=1,
    inner=1,
    reach=2,
)
case("forty requests behind each other", 200, lambda w: w.get(b"/live") * 40, reach=40)
case(
    "a submission behind HEAD",
    (200, 405),
    lambda w: w.get(b"/live", method=b"HEAD") + w.inner,
    inner=1,
    reach=2,
    head_first=True,
)

# -- which length counts ---------------------------------------------------------------------------
case(
    "CL.TE: what is behind the last chunk is hidden by the length",
    BAD,
    lambda w: w.post(length(b"0\r\n\r\n" + w.inner), CHUNKED, body=b"0\r\n\r\n" + w.inner),
)
case(
    "CL.TE with a good body before it",
    FINE_OR_BAD,
    lambda w: w.post(length(chunked(w.outer) + w.inner), CHUNKED, body=chunked(w.outer) + w.inner),
    outer=ONCE,
)
case(
    "TE.CL: a chunk is a request to whoever believes the length",
    (*BAD, 408),
    lambda w: w.post(b"Content-Length: 4", CHUNKED, body=chunked(w.inner)),
)
case(
    "TE.CL, the other way round in the head",
    (*BAD, 408),
    lambda w: w.post(CHUNKED, b"Content-Length: 4", body=chunked(w.inner)),
)
case(
    "TE.0: chunked beside a length of zero",
    FINE_OR_BAD,
    lambda w: w.post(CHUNKED, b"Content-Length: 0", body=chunked(w.outer)),
    outer=ONCE,
)
for title, field in {
    "TE.TE: chunked, then another": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    "TE.TE: another, then chunked": b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
    "chunked, chunked": b"Transfer-Encoding: chunked, chunked",
    "xchunked": b"Transfer-Encoding: xchunked",
    "chunked, identity": b"Transfer-Encoding: chunked, identity",
    "gzip, chunked": b"Transfer-Encoding: gzip, chunked",
    "identity alone": b"Transfer-Encoding: identity",
    "a space before the colon of Transfer-Encoding": b"Transfer-Encoding : chunked",
    "a vertical tab before chunked": b"Transfer-Encoding: \x0bchunked",
    "chunked in quotes": b'Transfer-Encoding: "chunked"',
    "a zero byte behind chunked": b"Transfer-Encoding: chunked\x00",
    "a carriage return before chunked": b"Transfer-Encoding: \rchunked",
}.items():
    case(
        title,
        (400, 408, 422, 501),
        lambda w, field=field: w.post(field, body=b"0\r\n\r\n" + w.inner),  # type: ignore[misc]
    )
case(
    "identity, chunked",
    (400, 422, 501),
    lambda w: w.post(b"Transfer-Encoding: identity, chunked", body=chunked(w.outer)),
)
case(
    "a tab before chunked",
    FINE_OR_BAD,
    lambda w: w.post(b"Transfer-Encoding:\tchunked", body=chunked(w.outer)),
    outer=ONCE,
)
case(
    "Chunked in another case",
    202,
    lambda w: w.post(b"tRANSFER-eNCODING: cHUNKED", body=chunked(w.outer)),
    outer=1,
)
case(
    "chunked in a folded line, beside a length",
    (*FINE_OR_BAD, 408),
    lambda w: w.post(b"X-A: b\r\n " + CHUNKED, length(w.outer), body=w.outer),
    outer=ONCE,
)
case(
    "chunked behind a bare line feed, beside a length",
    (400, 408),
    lambda w: w.post(
        b"X-A: b\n" + CHUNKED, length(b"0\r\n\r\n" + w.inner), body=b"0\r\n\r\n" + w.inner
    ),
)
case(
    "chunked in HTTP/1.0",
    (*FINE_OR_BAD, CLOSED),
    lambda w: w.post(CHUNKED, b"Connection: keep-alive", body=chunked(w.outer), version=b"1.0"),
    outer=ONCE,
)
case(
    "the same length twice",
    FINE_OR_BAD,
    lambda w: w.post(length(w.outer), length(w.outer), body=w.outer),
    outer=ONCE,
)
case(
    "two lengths, the longer first",
    BAD,
    lambda w: w.post(length(w.outer + w.inner), length(w.outer), body=w.outer + w.inner),
)
case(
    "two lengths, the shorter first",
    BAD,
    lambda w: w.post(length(w.outer), length(w.outer + w.inner), body=w.outer + w.inner),
)
case(
    "a list of lengths",
    FINE_OR_BAD,
    lambda w: w.post(length(w.outer, behind=b", %d" % len(w.outer)), body=w.outer),
    outer=ONCE,
)
case(
    "a list of two lengths",
    BAD,
    lambda w: w.post(length(w.outer, behind=b", 0"), body=w.outer),
)
for title, before, behind in (
    ("a length with a plus", b"Content-Length: +", b""),
    ("a negative length", b"Content-Length: -", b""),
    ("a length with a point", b"Content-Length: ", b".0"),
    ("a length with an exponent", b"Content-Length: ", b"e0"),
    ("a length with an underscore", b"Content-Length: 0_", b""),
    ("a length and a word", b"Content-Length: ", b" bytes"),
    ("a length beyond 64 bits", b"Content-Length: 99999999999999999999", b""),
    ("a length in another script", b"Content-Length: \xd9\xa1", b""),
    ("a space before the colon of Content-Length", b"Content-Length : ", b""),
    ("a length and a zero byte", b"Content-Length: ", b"\x00"),
):
    case(
        title,
        (400, 413),
        lambda w, before=before, behind=behind: w.post(  # type: ignore[misc]
            length(w.outer, before, behind), body=w.outer
        ),
    )
case(
    "a length of 2^64 and two, which some take for two",
    BAD,
    lambda w: w.post(b"Content-Length: 18446744073709551618", body=b"{}" + w.inner),
)
case(
    "2^64 before the length, which some take for zeros",
    FINE_OR_BAD,
    lambda w: w.post(length(w.outer, b"Content-Length: 18446744073709551616"), body=w.outer),
    outer=ONCE,
)
case(
    "a hexadecimal length",
    BAD,
    lambda w: w.post(b"Content-Length: 0x%x" % len(w.outer), body=w.outer),
)
case("no digits in the length", BAD, lambda w: w.post(b"Content-Length: ", body=w.outer))
case(
    "spaces around the length",
    FINE_OR_BAD,
    lambda w: w.post(length(w.outer, b"Content-Length:   ", b"  "), body=w.outer),
    outer=ONCE,
)
case(
    "Content_Length with an underscore",
    BAD,
    lambda w: w.post(length(w.outer, b"Content_Length: "), body=w.outer),
)
case(
    "a length that is never reached",
    (408, CLOSED),
    lambda w: w.post(length(w.outer + b"......"), body=w.outer),
)
case(
    "a request in the body of GET",
    (200, 400),
    lambda w: w.get(b"/live", length(w.inner))[:-2] + b"\r\n" + w.inner,
)
case(
    "a request in the body of HEAD",
    (200, 400, 405),
    lambda w: w.get(b"/live", length(w.inner), method=b"HEAD") + w.inner,
    head_first=True,
)
case(
    "a request in the body of DELETE",
    (400, 404, 405),
    lambda w: w.get(b"/live", length(w.inner), method=b"DELETE") + w.inner,
)

# -- chunks ----------------------------------------------------------------------------------------
case(
    "a chunk extension",
    FINE_OR_BAD,
    lambda w: w.post(CHUNKED, body=chunked(w.outer, size=b'%x;a=b;c="d"' % len(w.outer))),
    outer=ONCE,
)
case(
    "a chunk extension of 64 KiB",
    (*FINE_OR_BAD, 408, 413, CLOSED),
    lambda w: w.post(CHUNKED, body=chunked(w.outer, size=b"%x;a=" % len(w.outer) + b"b" * 65536)),
    outer=ONCE,
)
case(
    "a chunk extension that ends with a bare line feed",
    GONE,
    lambda w: w.post(
        CHUNKED, body=b"2;\nxx\r\n%x\r\n0\r\n\r\n" % len(b"0\r\n\r\n" + w.inner) + w.inner
    ),
)
case(
    "a chunk extension that hides a line end",
    GONE,
    lambda w: w.post(CHUNKED, body=b"5;a=\rb\r\nhello\r\n0\r\n\r\n" + w.inner),
)
for title, size in {
    "a chunk size beyond 64 bits": b"1000000000000000%x",
    "a chunk size of sixteen f": b"ffffffffffffffff",
    "a chunk size with a minus": b"-%x",
    "a chunk size with a plus": b"+%x",
    "a chunk size with 0x": b"0x%x",
    "a chunk size with a zero byte": b"%x\x00",
    "no chunk size": b"",
    "a word for a chunk size": b"chunk",
}.items():
    case(
        title,
        (400, 408, 413),
        lambda w, size=size: w.post(  # type: ignore[misc]
            CHUNKED,
            body=chunked(w.outer, size=size.replace(b"%x", b"%x" % len(w.outer))) + w.inner,
        ),
    )
case(
    "a chunk size with many zeros before it",
    (*FINE_OR_BAD, 413),
    lambda w: w.post(CHUNKED, body=chunked(w.outer, size=b"0" * 900 + b"%x" % len(w.outer))),
    outer=ONCE,
)
case(
    "a chunk size with a space behind it",
    FINE_OR_BAD,
    lambda w: w.post(CHUNKED, body=chunked(w.outer, size=b"%x " % len(w.outer))),
    outer=ONCE,
)
case(
    "chunks with bare line feeds",
    (*FINE_OR_BAD, 408, CLOSED),
    lambda w: w.post(CHUNKED, body=chunked(w.outer).replace(b"\r\n", b"\n")),
    outer=ONCE,
)
case(
    "a chunk that is longer than its size",
    GONE,
    lambda w: w.post(CHUNKED, body=chunked(w.outer, size=b"%x" % (len(w.outer) - 2)) + w.inner),
)
case(
    "a chunk that is shorter than its size",
    GONE,
    lambda w: w.post(CHUNKED, body=chunked(w.outer, size=b"%x" % (len(w.outer) + 2)) + w.inner),
)
case("no last chunk", (408, CLOSED), lambda w: w.post(CHUNKED, body=chunked(w.outer, end=b"")))
case(
    "fields behind the last chunk that say who is asking",
    FINE_OR_BAD,
    lambda w: w.post(
        CHUNKED,
        body=chunked(w.outer, end=b"0\r\nAuthorization: Bearer x\r\nContent-Length: 3\r\n\r\n"),
    ),
    outer=ONCE,
)
case(
    "a key behind the last chunk alone",
    (400, 401),
    lambda w: (
        w.bare(b"POST /tasks HTTP/1.1", b"Host: " + w.host, CHUNKED)
        + chunked(w.outer, end=b"0\r\nAuthorization: Bearer " + w.key + b"\r\n\r\n")
    ),
)
case(
    "two hundred fields behind the last chunk",
    (*FINE_OR_BAD, 408, 431, 500, CLOSED),
    lambda w: w.post(CHUNKED, body=chunked(w.outer, end=b"0\r\n" + b"X-A: b\r\n" * 200 + b"\r\n")),
    outer=ONCE,
)
case(
    "chunks beyond the limit of the route",
    413,
    lambda w: w.post(CHUNKED, body=chunked(b" " * 65536, end=b"") * 20 + b"0\r\n\r\n"),
)
case(
    "a length beyond the limit of the route, and nothing else",
    413,
    lambda w: w.post(b"Content-Length: 2000000"),
)

# -- the request line ------------------------------------------------------------------------------
case("HTTP/0.9", BAD, lambda w: b"GET /live\r\n")
case("HTTP/0.9 with a field", BAD, lambda w: b"GET /live\r\nHost: " + w.host + b"\r\n\r\n")
case("HTTP/1.0", (200, 400), lambda w: w.get(b"/live", version=b"1.0"))
case("HTTP/1.0 without Host", BAD, lambda w: b"GET /live HTTP/1.0\r\n\r\n")
case("HTTP/1.2", (200, 400, 505), lambda w: w.get(b"/live", version=b"1.2"))
case("HTTP/2.0 in words", (200, 400, 505), lambda w: w.get(b"/live", version=b"2.0"))
case("HTTP/1.10", (400, 505), lambda w: w.get(b"/live", version=b"1.10"))
case("no digits in the version", (400, 505), lambda w: w.get(b"/live", version=b"x.y"))
case(
    "http in small letters",
    (400, 505),
    lambda w: w.bare(b"GET /live http/1.1", b"Host: " + w.host),
)
case("no method", BAD, lambda w: w.bare(b" /live HTTP/1.1", b"Host: " + w.host))
case("no path", BAD, lambda w: w.bare(b"GET HTTP/1.1", b"Host: " + w.host))
case("two spaces", (200, 400), lambda w: w.bare(b"GET  /live HTTP/1.1", b"Host: " + w.host))
case(
    "something behind the version",
    BAD,
    lambda w: w.bare(b"GET /live HTTP/1.1 x", b"Host: " + w.host),
)
case(
    "a tab instead of a space",
    (200, 400),
    lambda w: w.bare(b"GET\t/live HTTP/1.1", b"Host: " + w.host),
)
case(
    "the preface of HTTP/2",
    (400, 405, 421, 505),
    lambda w: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
)
for method in (b"CONNECT", b"TRACE", b"TRACK", b"PROPFIND", b"DEBUG", b"get", b"GE,T"):
    case(
        f"the method {method.decode()}",
        (400, 405),
        lambda w, method=method: w.get(  # type: ignore[misc]
            w.host + b":443" if method == b"CONNECT" else b"/live", method=method
        ),
    )
case("a method with a zero byte", BAD, lambda w: w.get(b"/live", method=b"GE\x00T"))
case("OPTIONS of everything", (200, 400, 404, 405), lambda w: w.get(b"*", method=b"OPTIONS"))
case("GET of everything", (400, 404), lambda w: w.get(b"*"))
case("empty lines before a request", (200, 400), lambda w: b"\r\n" * 20 + w.get(b"/live"))
case("bytes of nobody", GONE, lambda w: bytes(range(128, 256)) * 4 + b"\r\n\r\n")
case(
    "a handshake of TLS inside",
    GONE,
    lambda w: bytes.fromhex("16030100c8010000c40303") + b"\x00" * 200 + b"\r\n\r\n",
)

# -- the target ------------------------------------------------------------------------------------
case("the absolute form", (200, 400), lambda w: w.get(b"http://" + w.host + b"/live"))
case("the absolute form of another host", (400, 421), lambda w: w.get(b"http://evil.test/live"))
case("the absolute form of another scheme", (200, 400, 404), lambda w: w.get(b"ftp://x/live"))
case(
    "the absolute form with a user",
    (200, 400, 421),
    lambda w: w.get(b"http://a@" + w.host + b"/live"),
)
for target in (
    b"//live",
    b"/tasks//x",
    b"/tasks/../live",
    b"/./live",
    b"/..;/live",
    b"/%2e%2e/live",
    b"/tasks/%2E./live",
    b"/tasks%2fx",
    b"/tasks%5cx",
    b"/tasks\\x",
    b"/tasks/%00",
    b"/tasks/x%0d%0aX-A:%20b",
    b"/tasks/%zz",
    b"/tasks/%",
    b"/tasks/%c0%af",
    b"/tasks/\xff\xfe",
    b"/tasks/%ff%fe",
    b"/tasks/x\x00",
    b"/tasks/x#y",
    b"live",
):
    case(
        f"the path {target.decode('latin-1')!r}",
        (400, 401, 404),
        lambda w, target=target: w.get(target),  # type: ignore[misc]
    )
case("a path of 9 KiB", (400, 414), lambda w: w.get(b"/tasks/" + b"a" * 9216))
case("a path of 40 KiB", (400, 414), lambda w: w.get(b"/tasks/" + b"a" * 40960))

# -- fields ----------------------------------------------------------------------------------------
case("no Host", BAD, lambda w: w.bare(b"GET /live HTTP/1.1"))
case("an empty Host", (400, 421), lambda w: w.bare(b"GET /live HTTP/1.1", b"Host:"))
case("Host twice", (200, 400), lambda w: w.get(b"/live", b"Host: " + w.host))
case("two Hosts", BAD, lambda w: w.get(b"/live", b"Host: evil.test"))
for value in (
    b"evil.test",
    b"evil.test:80",
    b"{host}.evil.test",
    b"evil.test@{host}",
    b"{host}@evil.test",
    b"{host}, evil.test",
    b"{host}/evil",
    b"{host} evil",
    b"{host}:0x50",
    b"{host}:99999999",
    b"[::1",
    b"localhost.evil.test",
    b"0x7f000001",
):
    case(
        f"Host: {value.decode()}",
        (400, 421),
        lambda w, value=value: w.bare(  # type: ignore[misc]
            b"GET /live HTTP/1.1", b"Host: " + value.replace(b"{host}", w.host.partition(b":")[0])
        ),
    )
case("an Origin of elsewhere", 403, lambda w: w.get(b"/live", b"Origin: https://evil.test"))
case("an Origin of nowhere", 403, lambda w: w.get(b"/live", b"Origin: null"))
for title, line in {
    "a zero byte in a value": b"X-A: a\x00b",
    "a carriage return in a value": b"X-A: a\rb",
    "a space in a name": b"X A: b",
    "a space before the colon": b"X-A : b",
    "no name": b": b",
    "no colon": b"X-A",
    "a zero byte in a name": b"X\x00A: b",
    "a letter of another script in a name": b"X-\xc3\xa4: b",
    "a carriage return before a name": b"\rX-A: b",
}.items():
    case(title, BAD, lambda w, line=line: w.get(b"/live", line))  # type: ignore[misc]
case("bare line feeds", (200, 400), lambda w: w.get(b"/live").replace(b"\r\n", b"\n"))
case("a folded line", (200, 400), lambda w: w.get(b"/live", b"X-A: b\r\n c"))
case("a folded line first", (200, 400), lambda w: b"GET /live HTTP/1.1\r\n Host: x\r\n\r\n")
case("a value of 20 KiB", (400, 431), lambda w: w.get(b"/live", b"X-A: " + b"b" * 20480))
case("a name of 20 KiB", (400, 431), lambda w: w.get(b"/live", b"x" * 20480 + b": b"))
case("90 fields", (400, 431), lambda w: w.get(b"/live", *[b"X-A: b"] * 90))
case("5000 fields", (400, 431), lambda w: w.get(b"/live", *[b"X-A: b"] * 5000))
case(
    "a compressed body",
    (400, 415),
    lambda w: w.post(b"Content-Encoding: gzip", length(w.outer), body=w.outer),
)
case(
    "two keys",
    401,
    lambda w: w.post(b"X-API-Key: " + w.key, length(w.outer), body=w.outer),
)
case(
    "fields that Connection takes away",
    (202, 400, 401),
    lambda w: w.post(
        b"Connection: close, Content-Length, Host, Authorization", length(w.outer), body=w.outer
    ),
    outer=ONCE,
)
case(
    "another method in a field",
    202,
    lambda w: w.post(b"X-HTTP-Method-Override: DELETE", length(w.outer), body=w.outer),
    outer=1,
)
case(
    "another path in a field",
    200,
    lambda w: w.get(b"/live", b"X-Original-URL: /admin/keys", b"X-Rewrite-URL: /admin/keys"),
)
case(
    "leave to send",
    (100, 202),
    lambda w: w.post(b"Expect: 100-continue", length(w.outer), body=w.outer),
    outer=1,
)
case(
    "another expectation",
    (202, 400, 417),
    lambda w: w.post(b"Expect: the-unexpected", length(w.outer), body=w.outer),
    outer=ONCE,
)
case(
    "an upgrade to HTTP/2",
    (200, 400),
    lambda w: w.get(
        b"/live",
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    ),
)
case(
    "an upgrade to HTTP/2 with a request behind it",
    (200, 400),
    lambda w: (
        w.get(b"/live", b"Connection: Upgrade", b"Upgrade: h2c")
        + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    ),
)
case(
    "an upgrade to a WebSocket",
    (200, 400, 403, 404, 426),
    lambda w: w.get(
        b"/live",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
)


# -- sending ---------------------------------------------------------------------------------------


def words_for(door: Door) -> Words:
    """Return the words of one more case."""
    return Words(door.host.encode(), door.key.encode(), uuid.uuid4().hex[:12])


def exchange(
    door: Door, sent: bytes, *, head_first: bool = False, is_answered: bool = False
) -> Answered:
    """Send bytes on a connection of their own and read until its end, or until it is quiet.

    Args:
        door: Where to.
        sent: The bytes.
        head_first: Whether the first request is a HEAD.
        is_answered: Whether an answer must come, for which to wait however long it takes.
    """
    raw = b""
    with door.connect() as connection:
        quiet_s = connection.gettimeout()
        if is_answered:
            connection.settimeout(_ANSWERED_S)
        try:
            connection.sendall(sent)
        except OSError:
            pass  # Refused before it had sent everything; what was answered can be read.
        while len(raw) < _BYTES_MAX:
            try:
                piece = connection.recv(65536)
            except OSError:
                break
            if not piece:
                break
            raw += piece
            connection.settimeout(quiet_s)
    return read_answers(raw, head_first=head_first)


def read_answers(raw: bytes, *, head_first: bool = False) -> Answered:
    """Take apart what a server sent."""
    statuses: list[int] = []
    while (found := re.match(rb"HTTP/1\.[01] (\d{3})[^\r\n]*\r\n", raw)) is not None:
        head, separator, behind = raw.partition(b"\r\n\r\n")
        if not separator:
            break
        status = int(found[1])
        fields = dict(
            (line.partition(b":")[0].strip().lower(), line.partition(b":")[2].strip())
            for line in head.split(b"\r\n")[1:]
        )
        if status < 200 or status in (204, 304) or (head_first and not statuses):
            size = 0
        elif fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            size = behind.index(b"0\r\n\r\n") + 5
        else:
            size = int(fields.get(b"content-length", len(behind)))
        statuses.append(status)
        raw = behind[size:]
    return Answered(tuple(statuses), raw)


def tasks_in(door: Door, queue: str) -> int:
    """Return how many tasks a queue holds, asked on a new connection; 1000 is the most."""
    request = (
        f"GET /tasks?queue={queue}&limit=1000 HTTP/1.1\r\nHost: {door.host}\r\n"
        f"Authorization: Bearer {door.key}\r\nConnection: close\r\n\r\n"
    )
    raw = b""
    with door.connect() as connection:
        connection.settimeout(_ANSWERED_S)
        connection.sendall(request.encode())
        while piece := connection.recv(65536):
            raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    if b"chunked" in head.lower():
        body = body.partition(b"\r\n")[2].rpartition(b"\r\n0\r\n")[0]
    return len(json.loads(body)["tasks"])


def check(one: Case, door: Door, *, statuses: frozenset[int] | None = None) -> Answered:
    """Send a case and look what came of it.

    Args:
        one: The case.
        door: Where to.
        statuses: What the first answer may be; None: anything but a fault of the server.
    """
    words = words_for(door)
    accepted = one.outer[0] + one.inner[0] > 0
    answered = exchange(door, one.made(words), head_first=one.head_first, is_answered=accepted)

    first = answered.statuses[0] if answered.statuses else CLOSED
    if statuses is None:
        assert first < 500 or first in (501, 505), answered
    else:
        assert first in statuses, answered
    assert not answered.rest, answered
    for queue, (least, most) in (("outer", one.outer), ("inner", one.inner)):
        count = tasks_in(door, f"{queue}-{words.nonce}")
        assert least <= count <= most, (queue, count, answered)
    after = exchange(door, words.get(b"/live", b"Connection: close"), is_answered=True)
    assert after.statuses == (200,), after
    return answered

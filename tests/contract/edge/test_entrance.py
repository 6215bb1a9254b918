"""What the edge does with good requests, with too many, with slow ones, and while it reads anew."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.c1 import ADMIN_KEY, EDGE_MARK, USER_KEY
from tests.support.edge import NAME, Recorder, RunningEdge, running_edge, served
from tests.support.hostile_http import read_answers

T = TypeVar("T")
NOW = datetime.now(UTC)
LIVE = f"GET /live HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
BODY = b'{"task_type":"echo"}'
POST = (
    f"POST /tasks HTTP/1.1\r\nHost: {NAME}\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode()


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Recorder]]:
    with served(tmp_path_factory.mktemp("c1"), hosts=(NAME,)) as found:
        yield found


@pytest.fixture(scope="module")
def edge(
    behind: tuple[int, Recorder], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEdge]:
    home = tmp_path_factory.mktemp("edge")
    with running_edge(home, behind[0], head_s=1, silent_s=1, idle_s=20) as running:
        yield running


def answer(connection: socket.socket) -> bytes:
    """Return one answer, whole."""
    raw = b""
    while True:
        piece = connection.recv(65536)
        raw += piece
        head, end, body = raw.partition(b"\r\n\r\n")
        size = re.search(rb"(?i)content-length: (\d+)", head)
        if not piece or (end and size and len(body) >= int(size[1])):
            return raw


def ask(edge: RunningEdge, request: bytes) -> bytes:
    with edge.connect() as connection:
        connection.sendall(request)
        return answer(connection)


def test_c1_is_told_who_is_asking_and_nothing_that_the_client_says_of_it(
    edge: RunningEdge, behind: tuple[int, Recorder]
) -> None:
    forged = (
        "X-Forwarded-For: 9.9.9.9",
        "X-Forwarded-For: 8.8.8.8",
        "X-Forwarded-Proto: http",
        "X-Forwarded-Host: evil.test",
        "Forwarded: for=9.9.9.9",
        "X-Real-IP: 9.9.9.9",
        "X-Request-ID: mine",
        "X-Request-Timeout-Seconds: 99999",
        "x-request-disconnect-disabled: ?1",
        "X_Request_Timeout_Seconds: 1",
        "serve_multiplexed_model_id: m",
        "Serve-Multiplexed-Model-Id: m",
        "X-Serve-Reason: x",
        "X-HAProxy-Reload-Id: x",
        "X-SSL-Client-CN: root",
        "X-Client-Cert: x",
        "X-Hcna-Last-Field: 1",
        f"X-Hcna-Client: {EDGE_MARK} 9.9.9.9",
        "Upgrade: h2c",
        "X-Kept: yes",
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    request = LIVE[:-2] + "".join(f"{each}\r\n" for each in forged).encode() + b"\r\n"

    assert ask(edge, request).startswith(b"HTTP/1.1 200 OK")

    fields = behind[1].seen[-1][2]
    told = dict(fields)
    assert len(told) == len(fields), "each once"
    assert fields[-1] == ("x-hcna-last-field", "1")
    assert told.pop("x-request-id") not in ("", "mine")
    assert told == {
        "host": NAME,
        "x-kept": "yes",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "https",
        "x-hcna-client": f"{EDGE_MARK} 127.0.0.1",
        "x-hcna-last-field": "1",
    }


def test_fields_behind_a_body_do_not_count(edge: RunningEdge, behind: tuple[int, Recorder]) -> None:
    head = f"POST /tasks HTTP/1.1\r\nHost: {NAME}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    body = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    trailer = f"Authorization: Bearer {ADMIN_KEY}\r\nX-Request-ID: mine\r\n\r\n".encode()

    refusal = ask(edge, head + body + trailer)
    assert refusal.startswith(b"HTTP/1.1 401 ")
    fields = behind[1].seen[-1][2]
    assert ("x-request-id", "mine") in fields, "uvicorn puts it among the others"
    # Nor is the request called so: it has the name that the edge has given it, and logs.
    given = next(value for name, value in fields if name == "x-request-id")
    assert f"x-request-id: {given}\r\n".encode() in refusal
    assert json.loads(refusal.partition(b"\r\n\r\n")[2])["request_id"] == given != "mine"


def test_wrong_keys_are_bounded_by_the_address_that_the_edge_tells(
    edge: RunningEdge, behind: tuple[int, Recorder]
) -> None:
    def get(key: str, more: str = "") -> bytes:
        head = f"GET /tasks HTTP/1.1\r\nHost: {NAME}\r\nAuthorization: Bearer {key}\r\n"
        return ask(edge, f"{head}{more}\r\n".encode())

    assert get(USER_KEY).startswith(b"HTTP/1.1 200 ")
    for number in range(10):
        elsewhere = f"X-Forwarded-For: 10.0.0.{number}\r\nX-Hcna-Client: x 10.0.0.{number}\r\n"
        assert get(f"hcna_{number}", elsewhere).startswith(b"HTTP/1.1 401 ")

    refused = get("hcna_another")
    assert refused.startswith(b"HTTP/1.1 429 ")
    assert re.search(rb"(?i)\r\nretry-after: [1-9]\d*\r\n", refused)
    assert get(ADMIN_KEY).startswith(b"HTTP/1.1 429 "), "not looked at"
    assert get(USER_KEY).startswith(b"HTTP/1.1 200 "), "was good there before"

    composite = behind[1].composite
    assert composite is not None
    composite.moderator.desk.clock.advance(60)
    assert get(ADMIN_KEY).startswith(b"HTTP/1.1 200 ")
    waiting = composite.services.audit.refused.waiting
    assert {what.who for what in waiting} == {"address 127.0.0.1"}
    assert sum(tally.times for what, tally in waiting.items() if what.outcome == "429") == 2


def test_answers_have_what_browsers_heed(edge: RunningEdge) -> None:
    head = ask(edge, LIVE).lower().partition(b"\r\n\r\n")[0].split(b"\r\n")

    assert b"strict-transport-security: max-age=31536000" in head
    assert b"x-content-type-options: nosniff" in head
    assert not [line for line in head if line.startswith(b"server:")]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:8080"])
def test_loopback_is_for_other_programs_too(edge: RunningEdge, host: str) -> None:
    head = ask(edge, LIVE.replace(NAME.encode(), host.encode()))

    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"strict-transport-security" not in head.lower()


@pytest.mark.parametrize("path", ["/-/routes", "/-/healthz", "/-/Routes"])
def test_serves_own_pages_are_not_shown(
    edge: RunningEdge, behind: tuple[int, Recorder], path: str
) -> None:
    behind[1].seen.clear()

    raw = ask(edge, LIVE.replace(b"/live", path.encode()))

    assert raw.startswith(b"HTTP/1.1 404 ")
    assert json.loads(raw.partition(b"\r\n\r\n")[2])["code"] == "not_found"
    assert behind[1].seen == []


@pytest.mark.parametrize(
    ("method", "path", "size", "passes"),
    [
        ("POST", "/tasks", 1024 * 1024, True),
        ("POST", "/tasks", 1024 * 1024 + 1, False),
        ("POST", "/tasks/batch", 1024 * 1024 + 1, True),
        ("POST", "/tasks/batch", 64 * 1024 * 1024 + 1, False),
        ("GET", "/tasks/batch", 1024 * 1024 + 1, False),
        ("PUT", "/artifacts", 8 * 1024 * 1024, True),
        ("PUT", "/artifacts", 9 * 1024 * 1024, False),
    ],
)
def test_a_body_has_the_bound_of_its_route(
    edge: RunningEdge,
    behind: tuple[int, Recorder],
    method: str,
    path: str,
    size: int,
    passes: bool,
) -> None:
    behind[1].seen.clear()
    head = f"{method} {path} HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {size}\r\n\r\n"

    # Enough of the body that the edge hands the request on; what is refused needs none.
    raw = ask(edge, head.encode() + b" " * (32768 if passes else 0))

    assert (len(behind[1].seen) == 1) is passes
    if not passes:
        assert read_answers(raw).statuses == (413,)
        assert b'"code": "too_large"' in raw
        assert b"connection: close" in raw


def test_the_log_says_who_called_for_what(edge: RunningEdge) -> None:
    secret = "hcna_this-is-a-key"
    ask(edge, LIVE.replace(b"/live", f'/x"y?key={secret}'.encode()))

    line = json.loads(edge.logged("/x"))
    assert (line["method"], line["path"], line["status"]) == ("GET", '/x"y', 404)
    assert (line["client"], line["tls"], line["client_name"]) == ("127.0.0.1", "TLSv1.3", "-")
    assert re.fullmatch(r"[0-9a-f-]{36}", line["id"])
    assert line["took_ms"] >= 0
    assert secret not in edge.requests()


def test_the_log_says_who_came_to_no_request(edge: RunningEdge) -> None:
    with socket.create_connection(("127.0.0.1", edge.port), timeout=20) as plain:
        plain.sendall(LIVE)
        with suppress(ConnectionResetError):
            plain.recv(65536)

    line = json.loads(edge.logged("handshake"))
    assert line["client"] == "127.0.0.1"


class TestSlowly:
    """Whoever is slow holds a connection for seconds, and nothing of C1."""

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"", 408),
            (LIVE[:10], 408),
            (LIVE[:-2], 408),
            (POST, 408),
            (POST + BODY[:-1], 408),
        ],
    )
    def test_a_request_that_stands_still(
        self, edge: RunningEdge, behind: tuple[int, Recorder], sent: bytes, status: int
    ) -> None:
        behind[1].seen.clear()
        with edge.connect() as connection:
            connection.sendall(sent)
            raw = answer(connection)

        assert read_answers(raw).statuses == (status,)
        assert behind[1].seen == []

    def test_a_handshake_that_stands_still(self, edge: RunningEdge) -> None:
        with socket.create_connection(("127.0.0.1", edge.port), timeout=20) as plain:
            assert plain.recv(1) == b""

    def test_a_large_body_that_stands_still(self, edge: RunningEdge) -> None:
        head = POST.replace(str(len(BODY)).encode(), b"200000")
        with edge.connect() as connection:
            connection.sendall(head + b" " * 50_000)
            assert read_answers(answer(connection)).statuses in ((400,), (408,))
        assert ask(edge, LIVE).startswith(b"HTTP/1.1 200 OK")


class TestTooMany:
    def test_requests_of_one_address(self, behind: tuple[int, Recorder], tmp_path: Path) -> None:
        with running_edge(tmp_path, behind[0], address_requests_per_s=1) as edge:
            with edge.connect() as connection:
                raw = b""
                for _ in range(10):
                    connection.sendall(LIVE)
                    assert answer(connection).startswith(b"HTTP/1.1 200 OK")
                connection.sendall(LIVE)
                raw = answer(connection)

            assert raw.startswith(b"HTTP/1.1 429 ")
            assert b"retry-after: 5" in raw.lower()
            assert b'"code": "rate_limited"' in raw

    def test_connections_of_one_address(self, behind: tuple[int, Recorder], tmp_path: Path) -> None:
        with (
            running_edge(tmp_path, behind[0], address_connections_max=5) as edge,
            ExitStack() as held,
        ):
            # Who looked whether it is up has left, but the edge may not have noticed yet.
            for _ in range(5):
                held.enter_context(soon(edge.connect))
            with pytest.raises(OSError, match=r"(?i)eof|reset|closed|broken"):
                edge.connect()
            held.close()
            assert soon(lambda: ask(edge, LIVE)).startswith(b"HTTP/1.1 200 OK")


def soon(work: Callable[[], T], within_s: float = 20.0) -> T:
    """Return what succeeds now or soon; the edge has to notice first who came and who left."""
    end = time.monotonic() + within_s
    while True:
        try:
            return work()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def connected_anew(edge: RunningEdge, before: object) -> ssl.SSLSocket:
    """Return a connection that shows another certificate; the old process may take some more."""

    def anew() -> ssl.SSLSocket:
        fresh = edge.connect()
        if fresh.getpeercert() == before:
            fresh.close()
            raise OSError(f"the old process still answers: {edge.log()}")
        return fresh

    return soon(anew)


class TestReadingAnew:
    @pytest.fixture
    def edge(self, behind: tuple[int, Recorder], tmp_path: Path) -> Iterator[RunningEdge]:
        # Time enough between the two halves of a request.
        with running_edge(tmp_path, behind[0]) as running:
            yield running

    def test_nobody_is_cut_off(self, edge: RunningEdge) -> None:
        with edge.connect() as idle, edge.connect() as busy:
            idle.sendall(LIVE)
            assert answer(idle).startswith(b"HTTP/1.1 200 OK")
            busy.sendall(POST + BODY[:5])
            before = busy.getpeercert()
            (edge.settings.cluster_dir / "edge.pem").unlink()
            edge.keeper.prepare(now=NOW)

            edge.reload()

            with connected_anew(edge, before) as fresh:
                fresh.sendall(LIVE)
                assert answer(fresh).startswith(b"HTTP/1.1 200 OK")
            busy.sendall(BODY[5:])
            assert answer(busy).startswith(b"HTTP/1.1 202 ")
            idle.sendall(LIVE)
            assert answer(idle).startswith(b"HTTP/1.1 200 OK"), "what was idle gets one more"

    def test_a_broken_configuration_leaves_it_as_it_is(self, edge: RunningEdge) -> None:
        path = edge.keeper.config_path
        good = path.read_text()
        try:
            path.write_text(good + "nonsense\n")
            edge.reload(ends_with="Loading failure")
            assert ask(edge, LIVE).startswith(b"HTTP/1.1 200 OK")
        finally:
            path.write_text(good)
        edge.reload()
        assert ask(edge, LIVE).startswith(b"HTTP/1.1 200 OK")


def test_the_control_edge_beside_it_is_as_ever(edge: RunningEdge) -> None:
    def get(path: str) -> bytes:
        place = ("127.0.0.1", edge.settings.control_port)
        with socket.create_connection(place, timeout=20) as plain:
            plain.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return answer(plain)

    assert get("/health").startswith(b"HTTP/1.1 200 OK")
    assert get("/admin/keys").startswith(b"HTTP/1.1 401 ")
    for path in ("/tasks", "/admin/../tasks", "//tasks", "/admin/%2e%2e/tasks", "/-/routes"):
        assert get(path).startswith(b"HTTP/1.1 404 "), path


def test_a_c1_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with running_edge(tmp_path, nobody.getsockname()[1]) as edge:
            raw = ask(edge, LIVE)

    assert raw.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 2" in raw.lower()
    assert b'"code": "moderator_unavailable"' in raw

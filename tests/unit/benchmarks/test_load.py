from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from benchmarks.load import Connection, Job, Refused, get, post, task_id

ANSWER = b'HTTP/1.1 202 Accepted\r\nContent-Length: 18\r\nserver: s\r\n\r\n{"task_id":"t-123"}'


class Server:
    """The other end of a connection."""

    def __init__(self) -> None:
        ours, self.end = socket.socketpair()
        self.connection = Connection.__new__(Connection)
        self.connection.socket, self.connection._rest = ours, b""


@pytest.fixture
def server() -> Iterator[Server]:
    opened = Server()
    yield opened
    opened.end.close()
    opened.connection.close()


def test_an_answer_may_come_in_pieces_and_two_at_once(server: Server) -> None:
    whole = ANSWER.replace(b"18", b"19")
    for cut in (10, 40, 60):
        server.end.sendall(whole[:cut])
        assert server.connection.receive() is None
        server.end.sendall(whole[cut:])
        assert server.connection.receive() == (202, b'{"task_id":"t-123"}')

    server.end.sendall(whole.replace(b"Content-Length", b"content-length") + whole[:30])
    assert server.connection.receive() == (202, b'{"task_id":"t-123"}')
    server.end.sendall(whole[30:])
    assert server.connection.receive() == (202, b'{"task_id":"t-123"}')


def test_what_no_system_should_answer_ends_the_run(server: Server) -> None:
    server.end.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with pytest.raises(Refused, match="Content-Length"):
        server.connection.receive()
    server.end.shutdown(socket.SHUT_WR)
    with pytest.raises(Refused, match="closed"):
        server.connection.receive()


def test_requests_are_whole() -> None:
    job = Job(kind="burst", port=80, headers=("Authorization: Bearer k",), body='{"ü":1}')

    head, body = post(job).split(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /tasks HTTP/1.1"
    assert b"\r\nAuthorization: Bearer k\r\n" in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert get(job, "/a?b=1").startswith(b"GET /a?b=1 HTTP/1.1\r\n")
    assert get(job, "/a").endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("body", "known"),
    [
        (b'{"task_id":"task-1","status":"queued"}', "task-1"),
        (b'{"status": "queued", "task_id": "7"}', "7"),
        (b'{"accepted":1000}', ""),
    ],
)
def test_the_id_is_found_without_parsing(body: bytes, known: str) -> None:
    assert task_id(body) == known

"""The log of who called C1: whole lines, in bounds, and nobody waits for it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hcna_ray.supervisor.edge_log import EdgeLog


class Sender:
    """What HAProxy does: sends lines and never waits."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def send(self, *lines: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(self._path)
            for line in lines:
                sender.send(line)


def test_lines_are_written_in_order_and_again_after_a_restart(tmp_path: Path) -> None:
    path, file = tmp_path / "s", tmp_path / "logs" / "edge.log"
    for lines in ((b"one\n", b"two"), (b"three\n",)):
        log = EdgeLog(path, file)
        log.start()
        Sender(path).send(*lines)
        log.stop()

    assert file.read_text() == "one\ntwo\nthree\n"
    assert file.stat().st_mode & 0o077 == 0
    assert not path.exists()


def test_it_is_moved_aside_when_it_is_too_large(tmp_path: Path) -> None:
    path, file = tmp_path / "s", tmp_path / "edge.log"
    log = EdgeLog(path, file, bytes_max=5, kept=2)
    log.start()
    Sender(path).send(*(b"line %d\n" % number for number in range(4)), b"end\n")
    log.stop()

    texts = {each.name: each.read_text() for each in tmp_path.iterdir()}
    assert texts == {"edge.log": "end\n", "edge.log.1": "line 3\n", "edge.log.2": "line 2\n"}


def test_a_socket_that_was_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(str(path))  # And its process was killed.

    log = EdgeLog(path, tmp_path / "edge.log")
    log.start()
    Sender(path).send(b"here\n")
    log.stop()

    assert (tmp_path / "edge.log").read_text() == "here\n"


def test_a_disk_that_refuses_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, file = tmp_path / "s", tmp_path / "edge.log"
    log = EdgeLog(path, file, bytes_max=1)
    refusals = [OSError(28, "No space left on device")]

    def refuse_once(self: EdgeLog) -> None:
        if refusals:
            raise refusals.pop()

    monkeypatch.setattr(EdgeLog, "_move", refuse_once)
    log.start()
    Sender(path).send(b"one\n", b"two\n")
    log.stop()

    assert refusals == []
    assert file.read_text() == "one\ntwo\n"


def test_to_stop_what_does_not_run_is_harmless(tmp_path: Path) -> None:
    EdgeLog(tmp_path / "s", tmp_path / "edge.log").stop()

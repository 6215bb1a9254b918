"""Following log files: from now on, over rotation and cuts, and never waiting for the reader."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import pytest

from hcna_ray.supervisor.relay import LINE_BYTES_MAX, Relay, Tail


def append(path: Path, *lines: str) -> None:
    with path.open("a") as stream:
        stream.write("".join(f"{line}\n" for line in lines))


def everything(tail: Tail) -> list[bytes]:
    found: list[bytes] = []
    while lines := tail.lines():
        found += lines
    return found


def test_only_what_comes_from_now_on_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    append(log, "old")
    tail = Tail(log)
    assert tail.lines() == []
    append(log, "new", "newer")
    assert tail.lines() == [b"new", b"newer"]
    assert tail.lines() == []
    tail.close()


def test_a_file_that_comes_later_is_shown_from_its_beginning(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "a.log")
    assert tail.lines() == []
    append(tmp_path / "a.log", "first")
    assert tail.lines() == [b"first"]
    tail.close()


def test_a_line_is_shown_when_it_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("")
    tail = Tail(log)
    with log.open("a") as stream:
        stream.write("ha")
        stream.flush()
        assert tail.lines() == []
        stream.write("lf\n")
    assert tail.lines() == [b"half"]
    tail.close()


def test_rotation_loses_and_repeats_nothing(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    append(log, "old")
    tail = Tail(log)
    append(log, "1", "2")
    log.rename(tmp_path / "a.log.1")
    append(tmp_path / "a.log.1", "3")  # The writer has not noticed yet.
    append(log, "4")
    assert everything(tail) == [b"1", b"2", b"3", b"4"]
    log.rename(tmp_path / "a.log.2")
    assert tail.lines() == []  # Between the two steps of a rotation.
    append(log, "5")
    assert everything(tail) == [b"5"]
    tail.close()


def test_a_file_that_was_cut_is_read_from_its_new_beginning(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    append(log, "a long old line")
    tail = Tail(log)
    log.write_text("")
    append(log, "new")
    assert tail.lines() == [b"new"]
    tail.close()


def test_a_line_without_an_end_is_given_up(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("")
    tail = Tail(log)
    with log.open("a") as stream:
        for _ in range(3):
            stream.write("x" * LINE_BYTES_MAX)
            stream.flush()
            tail.lines()
        stream.write("\nnext\n")
    assert everything(tail)[-1] == b"next"
    tail.close()


def test_lines_of_all_files_arrive_and_the_last_ones_too(tmp_path: Path) -> None:
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    target = io.BytesIO()
    relay = Relay(logs, target)
    relay.start()
    append(logs[0], "a1", "a2")
    append(logs[1], "b1")
    relay.stop()
    assert sorted(target.getvalue().split()) == [b"a1", b"a2", b"b1"]


def test_a_reader_that_takes_nothing_costs_lines_and_no_time(tmp_path: Path) -> None:
    source, sink = os.pipe()
    log = tmp_path / "a.log"
    log.write_text("")
    with os.fdopen(sink, "wb", buffering=0) as target, os.fdopen(source, "rb") as reader:
        relay = Relay([log], target, lines_max=3)
        relay.start()
        line = b"x" * 1024
        for _ in range(500):  # More than a pipe holds, and nobody reads.
            relay.take(line)
        relay.stop(timeout_s=0.05)
        found: list[bytes] = []
        reading = threading.Thread(target=lambda: found.extend(reader))
        reading.start()
        relay.stop()
        target.close()
        reading.join(5)
    notes = [json.loads(one) for one in found if one.startswith(b"{")]
    assert notes
    assert {note["action"] for note in notes} == {"relay.dropped"}
    assert sum(note["count"] for note in notes) + len(found) - len(notes) == 500


def test_a_reader_that_has_gone_does_not_matter(tmp_path: Path) -> None:
    source, sink = os.pipe()
    os.close(source)
    with os.fdopen(sink, "wb", buffering=0) as target:
        relay = Relay([], target)
        relay.start()
        for _ in range(10):
            relay.take(b"x")
        relay.stop()
    assert not any(thread.name.startswith("relay-") for thread in threading.enumerate())


@pytest.mark.parametrize("count", [0, 1])
def test_a_relay_that_never_started_stops(tmp_path: Path, count: int) -> None:
    Relay([tmp_path / f"{n}.log" for n in range(count)], io.BytesIO()).stop()

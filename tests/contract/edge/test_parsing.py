"""The table of hostile bytes through a real edge to a real C1: refused or harmless, never twice."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.c1 import ADMIN_KEY
from tests.support.edge import NAME, Recorder, RunningEdge, running_edge, served
from tests.support.hostile_http import CASES, Case, check


class EdgeDoor:
    """C1 behind the edge."""

    host, key = NAME, ADMIN_KEY

    def __init__(self, edge: RunningEdge, reached: Recorder) -> None:
        self._edge, self._context = edge, edge.context()
        self.reached = reached

    def connect(self) -> socket.socket:
        return self._edge.connect(self._context)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeDoor]:
    home: Path = tmp_path_factory.mktemp("edge")
    with (
        served(home / "c1", hosts=(NAME,)) as (port, reached),
        # Who waits for more is cut off soon, and so the test sees the end of every connection.
        running_edge(home, port, head_s=1, silent_s=2, idle_s=0.1) as edge,
    ):
        yield EdgeDoor(edge, reached)


def test_there_are_enough_of_them() -> None:
    names = [one.name for one in CASES]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("one", CASES, ids=[one.name for one in CASES])
def test_refused_or_harmless(one: Case, door: EdgeDoor) -> None:
    door.reached.seen.clear()

    check(one, door, statuses=one.statuses)

    # What the check itself asked afterwards: two lists of tasks, and whether C1 is alive.
    reached = door.reached.seen[:-3]
    assert len(reached) <= one.reach
    for _, _, fields in reached:
        marks = dict(fields)
        assert marks["x-forwarded-for"] == "127.0.0.1"
        assert marks["x-forwarded-proto"] == "https"

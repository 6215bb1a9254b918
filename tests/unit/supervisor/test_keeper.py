"""Waiting for a node's processes: real children stand in for Ray's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from hcna_ray.supervisor import keeper
from hcna_ray.supervisor.keeper import (
    EXIT_BROKEN,
    EXIT_RAYLET_LEFT,
    EXIT_TOLD_TO_STOP,
    exit_code_for,
)

#: Becomes the parent of small shells and hands over to the keeper, as `ray start` does.
_PARENT = """
import os, subprocess, sys
role, keeper, *kinds = sys.argv[1:]
words, children = [], []
for kind in kinds:
    name, _, script = kind.partition(":")
    child = subprocess.Popen(["sh", "-c", script or "exec sleep 60"], stdin=subprocess.DEVNULL)
    children.append(child)  # Whoever forgets it collects its exit code.
    words.append(f"{name}={child.pid}")
print(*words, flush=True)
os.execv(sys.executable, [sys.executable, "-I", "-S", keeper, role, *words])
"""

Node = tuple["subprocess.Popen[str]", dict[str, int]]
Start = Callable[..., Node]


@pytest.fixture
def start() -> Iterator[Start]:
    parents: list[Node] = []

    def run(role: str, *kinds: str) -> Node:
        parent = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PARENT, role, keeper.__file__, *kinds],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert parent.stdout is not None
        words = parent.stdout.readline().split()
        pids = {kind: int(pid) for kind, _, pid in (word.partition("=") for word in words)}
        parents.append((parent, pids))
        return parent, pids

    yield run
    for parent, pids in parents:
        for pid in pids.values():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.wait()
        for stream in (parent.stdout, parent.stderr):
            assert stream is not None
            stream.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("ended", "head", "waits", "code"),
    [
        ({}, True, True, None),
        ({"dashboard": 0}, True, True, None),
        ({"dashboard": -9}, True, True, EXIT_BROKEN),
        ({"raylet": -9}, False, True, EXIT_BROKEN),
        ({"raylet": 0}, False, True, EXIT_RAYLET_LEFT),
        ({"raylet": -15}, True, True, None),
        ({"raylet": -15}, True, False, EXIT_RAYLET_LEFT),
        ({"raylet": 0, "gcs_server": 143}, True, True, EXIT_TOLD_TO_STOP),
        ({"gcs_server": 0}, True, True, EXIT_TOLD_TO_STOP),
        ({"gcs_server": 0, "raylet": 1}, True, True, EXIT_TOLD_TO_STOP),
        ({"gcs_server": 1, "raylet": 1}, True, True, EXIT_BROKEN),
        ({"raylet": 0, "dashboard": -9}, True, True, None),
    ],
)
def test_what_ended_decides_the_code(
    ended: dict[str, int], head: bool, waits: bool, code: int | None
) -> None:
    assert exit_code_for(ended, head=head, gcs_may_follow=waits) == code


def test_a_worker_ends_with_its_raylet_and_leaves_nothing(start: Start) -> None:
    parent, pids = start("worker", "raylet:exit 0", "log_monitor")
    assert parent.wait(10) == EXIT_RAYLET_LEFT
    assert not alive(pids["log_monitor"])


def test_a_crash_of_any_part_ends_the_node(start: Start) -> None:
    parent, pids = start("head", "gcs_server", "raylet", "dashboard")
    os.kill(pids["dashboard"], signal.SIGKILL)
    assert parent.wait(10) == EXIT_BROKEN
    assert not any(alive(pid) for pid in pids.values())


def test_a_head_whose_parts_were_told_to_end_says_so(start: Start) -> None:
    parent, pids = start("head", "gcs_server", "raylet", "log_monitor")
    os.kill(pids["raylet"], signal.SIGTERM)
    os.kill(pids["gcs_server"], signal.SIGTERM)
    assert parent.wait(10) == EXIT_TOLD_TO_STOP
    assert not alive(pids["log_monitor"])


def test_sigterm_ends_all_in_order(start: Start) -> None:
    parent, pids = start("head", "gcs_server", "raylet", "log_monitor")
    keeper_is_up(parent)
    os.kill(parent.pid, signal.SIGTERM)
    assert parent.wait(10) == 0
    assert not any(alive(pid) for pid in pids.values())
    assert parent.stderr is not None
    ended = [line.split()[2] for line in parent.stderr]
    assert ended == ["raylet", "gcs_server", "log_monitor"]


def test_a_stubborn_part_is_made_to_end(start: Start) -> None:
    parent, pids = start("worker", "raylet:trap '' TERM; while :; do sleep 0.1; done")
    keeper_is_up(parent)
    os.kill(parent.pid, signal.SIGTERM)
    assert parent.wait(10) == 0
    assert not alive(pids["raylet"])


def keeper_is_up(parent: subprocess.Popen[str]) -> None:
    assert parent.stderr is not None
    assert parent.stderr.readline().startswith("ray node: up with ")


def test_the_keeper_loads_next_to_nothing() -> None:
    code = f"import runpy, sys; runpy.run_path({keeper.__file__!r}); print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"hcna_ray", "site", "json", "subprocess", "logging", "asyncio"} & set(
        found.stdout.split()
    )

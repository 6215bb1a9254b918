"""Identity, stopping and finding of processes, on real ones of our own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hcna_ray.supervisor.processes import (
    Marker,
    ProcessRef,
    identify,
    is_alive,
    scan,
    send,
    stop,
)

Start = Callable[..., ProcessRef]

#: Says that it has begun, then waits for ever; ``stubborn`` ignores SIGTERM.
_CALM = "import time; print(flush=True); time.sleep(600)"
_STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN); " + _CALM


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[subprocess.Popen[bytes]] = []

    def run(code: str = _CALM, **env: str) -> ProcessRef:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            env={"PATH": os.defpath, **env},
        )
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        process = identify(child.pid)
        assert process is not None
        return process

    yield run
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


@pytest.fixture
def marker(tmp_path: Path) -> Marker:
    return Marker(home=tmp_path, cluster_id="0123456789abcdef", temp_dir=tmp_path / "ray")


def test_a_process_is_its_pid_and_its_start(start: Start) -> None:
    process = start()
    another_life = ProcessRef(process.pid, process.started_ticks + 1)

    assert is_alive(process)
    assert not is_alive(another_life)
    assert not send(another_life, signal.SIGKILL)
    assert is_alive(process)


def test_stopping_asks_first(start: Start) -> None:
    process = start()

    assert stop([process], term_s=10) == []
    assert not is_alive(process)


def test_who_does_not_listen_is_made_to_end(start: Start) -> None:
    process = start(_STUBBORN)

    assert stop([process], term_s=0.1) == []
    assert not is_alive(process)


def test_a_scan_finds_what_carries_the_mark(start: Start, marker: Marker) -> None:
    ours = start(**marker.environment())
    start()
    start(**marker.environment() | {"HCNA_CLUSTER_ID": "another"})

    assert scan(marker) == [ours]


def test_a_scan_can_be_for_one_node(start: Start, marker: Marker) -> None:
    start(**marker.environment(), HCNA_NODE="M1")
    ours = start(**marker.environment(), HCNA_NODE="W1")

    assert scan(marker, node="W1") == [ours]


def test_a_scan_finds_children_that_lost_the_mark(start: Start, marker: Marker) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env={})\n"
        "print(flush=True)\n"
        "child.wait()"
    )
    parent = start(code, **marker.environment())

    found = scan(marker)

    assert parent in found
    assert len(found) == 2
    assert stop(found, term_s=5) == []


def test_a_scan_never_finds_those_above(
    marker: Marker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from hcna_ray.supervisor.processes import Marker, scan\n"
        "home, temp = map(Path, sys.argv[1:])\n"
        "print(scan(Marker(home=home, cluster_id='0123456789abcdef', temp_dir=temp)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(marker.home), str(marker.temp_dir)],
        env={"PATH": os.defpath, **marker.environment()},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )

    assert done.stdout.strip() == "[]"

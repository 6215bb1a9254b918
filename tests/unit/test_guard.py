"""The guard around unit tests works, for the tests that rely on it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time

import pytest


def test_a_unit_test_cannot_start_ray() -> None:
    import ray

    with pytest.raises(AssertionError, match="must not start Ray"):
        ray.init()


def test_a_unit_test_cannot_reach_the_network() -> None:
    with (
        socket.socket() as client,
        pytest.raises(AssertionError, match="must not use the network"),
    ):
        client.connect(("127.0.0.1", 9))


def test_a_unit_test_cannot_sleep() -> None:
    with pytest.raises(AssertionError, match="must not sleep"):
        time.sleep(0.001)


def test_event_loops_and_child_processes_still_work() -> None:
    assert asyncio.run(asyncio.sleep(0, "done")) == "done"
    assert subprocess.run([sys.executable, "-c", ""], timeout=60, check=True).returncode == 0

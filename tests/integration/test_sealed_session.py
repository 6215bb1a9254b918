"""M1 and a worker with the message cipher on, and somebody who captures all that passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def a_session(folder: Path, cipher: bool) -> dict[str, Any]:
    """Hold one session; takes some seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.sealed_session", str(folder), str(cipher).lower()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return a_session(tmp_path_factory.mktemp("session"), True)


def test_both_sides_understand_each_other(told: dict[str, Any]) -> None:
    assert told["answer"]["pong"] is True
    assert told["telemetry"] == {"word": "canary-of-the-wire"}
    assert told["heartbeats"] >= 3


def test_what_was_captured_says_nothing(told: dict[str, Any]) -> None:
    assert told["in clear"] == 0


def test_nothing_that_was_captured_is_taken_a_second_time(told: dict[str, Any]) -> None:
    assert told["taken twice"] == []


def test_a_forged_order_is_refused_on_record_and_costs_nothing(told: dict[str, Any]) -> None:
    assert told["after the forgery"]["pong"] is True
    assert ["W1", "order.refused"] in told["audit"]
    assert ["ann", "intent.send"] in told["audit"]


def test_without_the_cipher_the_same_wire_tells_all_and_forgeries_are_refused(
    tmp_path: Path,
) -> None:
    told = a_session(tmp_path, False)
    assert told["in clear"] > 3
    assert "heartbeat" in told["taken twice"]
    assert told["after the forgery"]["pong"] is True
    assert ["W1", "order.refused"] in told["audit"]

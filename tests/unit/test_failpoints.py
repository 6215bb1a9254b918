"""The mechanism of failpoints; which points there are is another test's business."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hcna_ray import failpoints


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Failpoints on, with two points of our own."""
    monkeypatch.setattr(failpoints, "_armed_in", tmp_path)
    monkeypatch.setattr(failpoints, "_arrivals", {})
    monkeypatch.setattr(failpoints, "POINTS", {"here": "now", "there": "then"})
    return tmp_path


def test_nothing_happens_where_nothing_is_armed(armed: Path) -> None:
    failpoints.hit("here")
    assert not list(armed.iterdir())


def test_an_unknown_point_is_a_mistake_while_failpoints_are_on(armed: Path) -> None:
    with pytest.raises(LookupError, match="elsewhere"):
        failpoints.hit("elsewhere")


def test_a_point_fires_once_and_leaves_a_trace(armed: Path) -> None:
    (armed / "here").write_text("enospc")
    failpoints.hit("there")
    with pytest.raises(OSError, match="failpoint here") as caught:
        failpoints.hit("here")
    failpoints.hit("here")
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in armed.iterdir()] == ["here.fired"]


def test_a_point_waits_for_its_arrival(armed: Path) -> None:
    (armed / "here").write_text("eio@3\n")
    failpoints.hit("here")
    failpoints.hit("here")
    with pytest.raises(OSError, match="failpoint here"):
        failpoints.hit("here")


def test_a_point_can_be_armed_again_and_counts_anew(armed: Path) -> None:
    for _ in range(2):
        (armed / "here").write_text("eio@2")
        failpoints.hit("here")
        with pytest.raises(OSError, match="failpoint here"):
            failpoints.hit("here")


def test_an_unknown_action_is_a_mistake(armed: Path) -> None:
    (armed / "here").write_text("dance")
    with pytest.raises(ValueError, match="dance"):
        failpoints.hit("here")


PROGRAM = """
import sys
from hcna_ray import failpoints
failpoints.POINTS = {"here": "now"}
failpoints.hit("here")
print("went on")
"""


@pytest.mark.parametrize(
    ("order", "test", "code", "said"),
    [
        ("kill", "1", -9, ""),
        ("exit:7", "1", 7, ""),
        ("sleep:0.001", "1", 0, "went on\n"),
        ("kill", "", 0, "went on\n"),
    ],
)
def test_a_process_of_its_own(tmp_path: Path, order: str, test: str, code: int, said: str) -> None:
    (tmp_path / "here").write_text(order)
    env = {**os.environ, "HCNA_TEST": test, "HCNA_FAILPOINTS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, said), done.stderr

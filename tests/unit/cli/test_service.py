"""``supervise``, ``units`` and ``memory`` as far as they need no cluster."""

from __future__ import annotations

import os
import plistlib
from pathlib import Path

import pytest

from hcna_ray.cli.service import memory_lines
from hcna_ray.supervisor.memory import Group, Memory, NodeMemory, can_measure
from tests.unit.cli.conftest import Hcna


def test_a_machine_runs_only_what_it_is(hcna: Hcna) -> None:
    ran = hcna("supervise", "w1")
    assert ran.code == 2
    assert "this machine is M1, not W1. Next: hcna supervise m1" in ran.err


def test_units_say_what_to_do_and_write_nothing_unless_told(
    hcna: Hcna, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = hcna("units")
    assert ran.code == 0
    assert "sudo systemctl enable --now hcna-m1 hcna-c1" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_units_are_written_with_this_home_and_this_program(hcna: Hcna, tmp_path: Path) -> None:
    ran = hcna("units", "--dir", str(tmp_path / "units"))
    assert ran.code == 0
    written = sorted(path.name for path in (tmp_path / "units").iterdir())
    assert written == ["hcna-c1.service", "hcna-m1.service"]
    text = (tmp_path / "units" / "hcna-m1.service").read_text()
    assert f"HCNA_HOME={os.environ['HCNA_HOME']}" in text
    assert "/bin/hcna supervise m1" in text


def test_no_secret_and_no_setting_of_the_environment_gets_into_a_unit(
    hcna: Hcna, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCNA_API_KEY", "a-secret-key")
    monkeypatch.setenv("HCNA_RAY__PROFILE", "tiny")
    ran = hcna("units", "--dir", str(tmp_path / "units"))
    texts = "".join(path.read_text() for path in (tmp_path / "units").iterdir())
    assert "secret" not in texts
    assert "PROFILE" not in texts
    assert "HCNA_RAY__PROFILE is set here but will not be in the unit" in ran.err


def test_property_lists_for_macos(hcna: Hcna, tmp_path: Path) -> None:
    assert hcna("units", "--launchd", "--dir", str(tmp_path)).code == 0
    data = plistlib.loads((tmp_path / "org.hcna-ray.m1.plist").read_bytes())
    assert data["ProgramArguments"][1:] == ["supervise", "m1"]


@pytest.mark.skipif(not can_measure(), reason="needs /proc/PID/smaps_rollup")
def test_nothing_running_has_no_memory(hcna: Hcna) -> None:
    ran = hcna("memory")
    assert ran.code == 1
    assert "Next: hcna up" in ran.err
    assert hcna("memory", "--json").json["count"] == 0


def test_memory_is_shown_by_node_and_kind() -> None:
    groups = (Group(kind="slots", count=2, pss_bytes=3 << 20),)
    node = NodeMemory(node="W1", groups=groups, count=2, pss_bytes=3 << 20)
    lines = memory_lines(Memory(nodes=(node,), count=2, pss_bytes=3 << 20, unreadable=1))
    assert [line.split() for line in lines[:3]] == [
        ["W1", "2", "3.0", "MiB"],
        ["slots", "2", "3.0"],
        ["total", "2", "3.0", "MiB"],
    ]
    assert "1 processes of another user" in lines[3]

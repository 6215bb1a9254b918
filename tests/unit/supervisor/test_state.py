"""The lock, the files below run/, backoff and log lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hcna_ray.config import load_settings
from hcna_ray.supervisor.backoff import restart_delay_s
from hcna_ray.supervisor.processes import identify
from hcna_ray.supervisor.state import (
    RunLock,
    read_cluster,
    read_state,
    read_supervisor,
    recorded_process,
    remove_run_files,
    write_cluster,
    write_settings,
    write_state,
    write_supervisor,
)


def test_one_lock_has_one_holder(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)

    assert first.acquire()
    assert not second.acquire()
    assert not second.is_free()
    first.release()
    assert second.is_free()
    assert second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_holders_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / "supervisor.lock").touch()

    assert RunLock(tmp_path).is_free()


def test_the_settings_in_force_are_read_back_the_same(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, env={"HCNA_PORTS__OFFSET": "20000"})
    write_settings(settings)
    path = settings.run_dir / "settings.yaml"

    again = load_settings(home=tmp_path, path=path, env={})

    assert again == settings.model_copy(update={"source": path})
    assert path.stat().st_mode & 0o777 == 0o600


def test_cluster_json_says_where_the_cluster_is(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, env={})

    written = write_cluster(settings, started_at=12.0)

    assert read_cluster(settings.run_dir) == written
    data = json.loads((settings.run_dir / "cluster.json").read_text())
    assert data["url"] == "http://127.0.0.1:8080"
    assert data["ray_address"] == "127.0.0.1:6379"
    remove_run_files(settings.run_dir)
    assert read_cluster(settings.run_dir) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"url": 1}'])
def test_an_odd_file_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    for name in ("cluster.json", "state.json", "supervisor.pid"):
        (tmp_path / name).write_text(text)

    assert read_cluster(tmp_path) is None
    assert read_state(tmp_path) == {}
    assert read_supervisor(tmp_path) is None


def test_a_recorded_process_counts_only_while_exactly_it_runs(tmp_path: Path) -> None:
    me = identify(os.getpid())
    assert me is not None
    write_supervisor(tmp_path, me)
    member = {"pid": me.pid, "started_ticks": me.started_ticks}
    other = {"pid": me.pid, "started_ticks": me.started_ticks - 1}
    write_state(tmp_path, {"members": {"head": member, "worker": other, "edge": {"pid": None}}})

    state = read_state(tmp_path)

    assert read_supervisor(tmp_path) == me
    assert recorded_process(state, "head") == me
    assert recorded_process(state, "worker") is None
    assert recorded_process(state, "edge") is None
    assert recorded_process(state, "nobody") is None


@pytest.mark.parametrize(
    ("failures", "draw", "expected"),
    [(1, 1.0, 1.0), (1, 0.0, 0.5), (2, 1.0, 2.0), (4, 1.0, 8.0), (50, 1.0, 60.0), (50, 0.0, 30.0)],
)
def test_the_pause_doubles_up_to_its_bound(failures: int, draw: float, expected: float) -> None:
    assert restart_delay_s(failures, first_s=1.0, max_s=60.0, draw=draw) == expected

"""What profile ``tiny`` and the dashboard's setting change in the commands of the Ray nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcna_ray.config import MIB, Settings, load_settings
from hcna_ray.supervisor.ports import head_command, object_store_bytes, worker_command

GIB = 1024 * MIB
TINY = {"HCNA_RAY__PROFILE": "tiny"}


def head(settings: Settings) -> list[str]:
    return head_command(settings, address="10.0.0.1", memory=2 * GIB, shared=GIB)


def worker(settings: Settings, *, of: str) -> list[str]:
    return worker_command(settings, head=of, address="10.0.0.2", cpus=2, memory=2 * GIB, shared=GIB)


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({}, "true"),
        ({"HCNA_RAY__DASHBOARD": "false"}, "false"),
        (TINY, "false"),
        ({**TINY, "HCNA_RAY__DASHBOARD": "true"}, "true"),
    ],
)
def test_the_dashboard_is_off_in_tiny_unless_asked_for(
    tmp_path: Path, env: dict[str, str], word: str
) -> None:
    assert f"--include-dashboard={word}" in head(load_settings(home=tmp_path, env=env))


def test_tiny_leaves_out_what_only_serves_rays_own_commands(tmp_path: Path) -> None:
    standard = head(load_settings(home=tmp_path, env={}))
    tiny = head(load_settings(home=tmp_path, env=TINY))
    assert "--no-monitor" in tiny
    assert "--no-monitor" not in standard
    assert "--include-log-monitor=false" in tiny
    assert "--include-log-monitor=true" in standard


def test_one_log_monitor_on_a_machine_is_enough(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, env={})
    assert "--include-log-monitor=false" in worker(settings, of=settings.ray_address)
    assert "--include-log-monitor=true" in worker(settings, of="10.0.0.1:6379")


def test_object_stores_are_small_in_tiny() -> None:
    sizes = [
        object_store_bytes(configured=None, head=head, memory=8 * GIB, shared=GIB, tiny=True)
        for head in (True, False)
    ]
    assert sizes == [80 * MIB, 128 * MIB]
    assert (
        object_store_bytes(configured=GIB, head=True, memory=8 * GIB, shared=GIB, tiny=True) == GIB
    )

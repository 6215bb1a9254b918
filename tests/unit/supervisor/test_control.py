"""What the command line asks again and again while it waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hcna_ray.config import Settings, load_settings
from hcna_ray.supervisor import control
from hcna_ray.supervisor.state import write_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", env={})


def test_settings_in_force_are_read_once_for_each_version_of_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counted(**options: Any) -> Settings:
        reads.append(options)
        return load_settings(**options)

    monkeypatch.setattr(control, "load_settings", counted)
    assert control._settings_in_force(settings) is settings
    other = load_settings(home=settings.home, env={"HCNA_PORTS__OFFSET": "100"})
    write_settings(other)

    for _ in range(3):
        assert control._settings_in_force(settings).ports.offset == 100
    assert len(reads) == 1

    write_settings(settings)

    assert control._settings_in_force(other).ports.offset == 0
    assert len(reads) == 2


def test_settings_of_another_version_are_left_aside(settings: Settings) -> None:
    write_settings(settings)
    (settings.run_dir / "settings.yaml").write_text("moderator: {what: is this}\n")

    assert control._settings_in_force(settings) is settings

"""``hcna supervise c1`` ends with M1 and not before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcna_ray.cli import service
from hcna_ray.cli.main import main
from hcna_ray.config import load_settings
from hcna_ray.supervisor import probe
from hcna_ray.supervisor.processes import identify
from hcna_ray.supervisor.state import write_supervisor


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run directory of a home whose supervisor is this process."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setenv("HCNA_HOME", str(tmp_path))
    monkeypatch.setenv("HCNA_PORTS__OFFSET", "21000")
    monkeypatch.setattr(service, "_LOOK_S", 0.01)
    run_dir = load_settings().run_dir
    me = identify(os.getpid())
    assert me is not None
    write_supervisor(run_dir, me)
    yield run_dir
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_it_ends_when_m1_was_stopped_in_good_order(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask(host: str, port: int) -> bool:
        """Have M1 go when it has been seen and C1 was asked for."""
        asked.append((host, port))
        (run_dir / "supervisor.pid").unlink()
        return False

    monkeypatch.setattr(probe, "is_ready", ask)

    assert main(["supervise", "c1"]) == 0
    assert len(asked) == 1


def test_it_gives_up_when_m1_stays_away(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service, "M1_AWAY_S", 0.05)
    (run_dir / "supervisor.pid").write_text("{}")

    assert main(["supervise", "c1"]) == 1
    assert "M1's supervisor has not been running" in capsys.readouterr().err

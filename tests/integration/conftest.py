"""One real cluster per test session: M1 and W1 as two Ray nodes, C1, the edge, on ports of its own.

It is brought up the way a user does it, by the supervisor's `up`, and taken down the same way,
whatever happens. Tests that change settings or kill things put everything back as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hcna_ray.client import Client
from hcna_ray.config import Settings, load_settings

#: Far from the default ports, so that a running `make demo` is not disturbed.
PORTS_OFFSET = 17_000
UP_S = 180.0

CONFIG = f"""\
ports:
  offset: {PORTS_OFFSET}
worker:
  node_id: HCNA-W1--prod--home--v1.0
  resources:
    cpu_cores: 4
    disk_path: {{data}}
slots:
  base: 4
  max: 12
lease:
  heartbeat_s: 1.0
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster and how to reach it."""

    settings: Settings
    url: str
    control_url: str
    api_key: str

    @property
    def env(self) -> dict[str, str]:
        """Environment of a user's shell on this machine."""
        from hcna_ray.supervisor import ray_environment

        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("HCNA_")},
            **ray_environment(self.settings),
            "HCNA_HOME": str(self.settings.home),
            "HCNA_URL": self.url,
            "HCNA_API_KEY": self.api_key,
            "RAY_ADDRESS": self.settings.ray_address,
        }

    def client(self) -> Client:
        return Client(self.url, self.api_key)

    def log_lines(self, name: str) -> list[dict[str, object]]:
        """Return a log's JSON lines."""
        path = self.settings.logs_dir / f"{name}.log"
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The session's cluster."""
    from hcna_ray.security.keys import read_client_key
    from hcna_ray.supervisor import down, up

    home = Path(tempfile.mkdtemp(prefix="hcna-it-"))
    data = home / "data"
    data.mkdir()
    (home / "hcna.yaml").write_text(CONFIG.format(data=data))
    # What the caller's shell says about another instance must not leak into this one.
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("HCNA_")}
    os.environ["HCNA_HOME"] = str(home)
    settings = load_settings(home)
    steps: list[str] = []
    try:
        info = up(settings, wait_s=UP_S, on_step=steps.append)
        key = read_client_key(settings.keys_dir)
        assert key is not None
        yield Cluster(settings, info.url, info.control_url, key)
    finally:
        report = down(settings, on_step=steps.append)
        os.environ.pop("HCNA_HOME", None)
        os.environ.update(saved)
        kept = os.environ.get("HCNA_KEEP_LOGS")
        if kept:
            shutil.copytree(settings.logs_dir, kept, dirs_exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        assert not report.left, f"processes left behind: {report.left}"
        assert not report.ports_open, f"ports left open: {report.ports_open}"


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """A client with the owner's key."""
    with cluster.client() as client:
        yield client

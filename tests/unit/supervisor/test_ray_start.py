"""What ``ray start`` is made to do otherwise; the whole of it is tried on machines."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hcna_ray.config import Settings
from hcna_ray.supervisor import ray_start
from hcna_ray.supervisor.ports import ray_environment


class FakeNode:
    """As much of Ray's node as starts a raylet."""

    def __init__(self, session: Path, **ports: int | None) -> None:
        self._session_dir, self._node_id = str(session), "5a" * 28
        self._ray_params = SimpleNamespace(**ports)
        self.found: dict[str, int] = {}

    def start_raylet(self, plasma_directory: str, *, object_store_memory: int) -> str:
        self.found = {
            path.name.removesuffix(f"_{self._node_id}"): int(path.read_text())
            for path in Path(self._session_dir).iterdir()
        }
        return f"{plasma_directory} {object_store_memory}"


def test_the_agents_ports_are_written_down_before_the_raylet_starts(tmp_path: Path) -> None:
    """Ray's own names for them, which its raylet waits for at most 15 s."""
    kind: Any = type("Node", (FakeNode,), {})
    ray_start._write_ports_down(kind, import_module("ray._raylet"))
    node = kind(
        tmp_path,
        metrics_agent_port=10023,
        metrics_export_port=10025,
        dashboard_agent_listen_port=10022,
        runtime_env_agent_port=None,
    )

    assert node.start_raylet("/dev/shm", object_store_memory=7) == "/dev/shm 7"

    assert node.found == {
        "metrics_agent_port": 10023,
        "metrics_export_port": 10025,
        "dashboard_agent_listen_port": 10022,
    }


def test_a_raylet_has_patience_with_its_agents() -> None:
    assert int(ray_environment(Settings())["RAY_agent_register_timeout_ms"]) >= 120_000

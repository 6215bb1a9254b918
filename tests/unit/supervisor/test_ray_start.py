"""What our start of Ray mends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hcna_ray.config import LOOPBACK, Settings
from hcna_ray.supervisor.ports import head_command, ray_environment, worker_command
from hcna_ray.supervisor.ray_start import (
    NOT_NEEDED,
    start_dashboard_last,
    tell_raylet_agent_port,
)


@pytest.mark.parametrize("role", ["head", "worker"])
def test_a_raylet_waits_for_none_of_its_agents_ports(role: str) -> None:
    settings = Settings()
    machine: dict[str, Any] = {"address": LOOPBACK, "memory": 8 << 30, "shared": 4 << 30}
    arguments = (
        head_command(settings, **machine)
        if role == "head"
        else worker_command(settings, head=f"{LOOPBACK}:6379", cpus=2, **machine)
    )
    told: dict[str, list[str]] = {}

    def start_ray_process(command: list[str], process_type: str, **_: Any) -> str:
        told[process_type] = command
        return process_type

    services = SimpleNamespace(start_ray_process=start_ray_process)
    tell_raylet_agent_port(services, arguments)

    assert services.start_ray_process(["raylet"], "raylet", fate_share=True) == "raylet"
    services.start_ray_process(["gcs"], process_type="gcs_server")
    port = settings.port(f"{role}_agent_http")
    assert told == {
        "raylet": ["raylet", f"--dashboard_agent_listen_port={port}"],
        "gcs_server": ["gcs"],
    }
    # The raylet hears of these three from Ray itself; a port that is 0 it would wait for.
    for option in ("dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port"):
        (given,) = [one for one in arguments if one.startswith(f"--{option}=")]
        assert int(given.partition("=")[2]) > 0


def test_a_raylet_has_patience_with_its_agents() -> None:
    assert int(ray_environment(Settings())["RAY_agent_register_timeout_ms"]) >= 120_000


def test_the_dashboard_of_a_head_starts_behind_its_raylet() -> None:
    class Node:
        """As much of Ray's as is changed."""

        def __init__(self, *, head: bool) -> None:
            self.head = head
            self.done: list[str] = []
            self._webui_url: str | None = None
            self._ray_params = SimpleNamespace(dashboard_host=LOOPBACK, dashboard_port=8265)
            if head:
                self.done.append("gcs")
                self.start_api_server(include_dashboard=True)
            self.start_ray_processes()

        def start_api_server(self, *, include_dashboard: bool) -> None:
            assert include_dashboard
            self.done.append("dashboard")

        def start_ray_processes(self) -> None:
            self.done.append(f"raylet told of {self._webui_url}")

    start_dashboard_last(Node)

    assert Node(head=True).done == ["gcs", f"raylet told of {LOOPBACK}:8265", "dashboard"]
    assert Node(head=False).done == ["raylet told of None"]


def test_modules_that_are_left_out_are_those_that_the_command_can_do_without() -> None:
    # One that Ray has renamed would be imported after all, and nobody would notice.
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    text = (Path(ray.origin).parent / "scripts" / "scripts.py").read_text()
    assert [name for name in NOT_NEEDED if f"from {name} import" not in text] == []

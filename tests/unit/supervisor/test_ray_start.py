"""What our start of Ray mends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hcna_ray.config import LOOPBACK, Settings
from hcna_ray.supervisor.ports import head_command, ray_environment, worker_command
from hcna_ray.supervisor.ray_start import tell_raylet_agent_port


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

"""The first things anybody does."""

from __future__ import annotations

from hcna_ray.client import Client
from tests.integration.conftest import Cluster


def test_echo_travels_to_the_worker_and_back(cluster: Cluster, client: Client) -> None:
    result = client.submit("echo", {"message": "hello"}).result(timeout_s=20)

    assert result["message"] == "hello"
    assert result["processed_by"] == "HCNA-W1--prod--home--v1.0"
    assert isinstance(result["duration_ms"], int)


def test_the_guides_log_lines_are_there(cluster: Cluster, client: Client) -> None:
    client.submit("echo", {}).result(timeout_s=20)

    moderator = [line["message"] for line in cluster.log_lines("moderator")]
    worker = [line["message"] for line in cluster.log_lines("worker")]
    assert "W1 node HCNA-W1--prod--home--v1.0 registered successfully" in moderator
    assert any(
        str(line).startswith("Connected to M1 HCNA-M1--prod--home--v1.0 at ") for line in worker
    )

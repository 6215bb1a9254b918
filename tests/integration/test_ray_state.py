"""Ray's own commands show what we promise them to show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.client import Client
from hcna_ray.supervisor import read_cluster
from tests.integration.conftest import Cluster
from tests.support.live import eventually


def ray(cluster: Cluster, *words: str) -> str:
    """Run one of Ray's commands as a user would after ``hcna env`` of this cluster."""
    command = [str(Path(sys.executable).parent / "ray"), *words]
    done = subprocess.run(
        command, env=cluster.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ray_list(cluster: Cluster, what: str, *filters: str) -> list[dict[str, Any]]:
    info = read_cluster(cluster.settings.run_dir)
    assert info is not None
    words = [word for one in filters for word in ("--filter", one)]
    text = ray(
        *(cluster, "list", what, "--format", "json", "--detail", "--limit", "1000"),
        *("--address", info.dashboard_url, *words),
    )
    found: list[dict[str, Any]] = json.loads(text[text.index("[") :])
    return found


def test_a_heavy_task_shows_under_its_own_name(cluster: Cluster, client: Client) -> None:
    task = client.submit("sleep", {"seconds": 60}, requires={"cpu": 1})
    eventually(lambda: task.refresh().status == "running", 30, "it runs")
    name = f"sleep:{task.id}"

    def listed() -> list[dict[str, Any]]:
        return ray_list(cluster, "tasks", f"name={name}")

    try:
        # The state API learns of it from events that are sent once a second.
        (found,) = eventually(listed, 30, f"ray list tasks shows {name}", pause_s=1)
        assert found["name"] == name
        assert found["state"] == "RUNNING"
        assert found["required_resources"]["CPU"] == 1
        assert found["required_resources"]["W1"] == pytest.approx(0.001)
        nodes = {node["node_id"]: node for node in ray_list(cluster, "nodes")}
        assert "W1" in nodes[found["node_id"]]["resources_total"]
    finally:
        task.cancel()
        task.wait(timeout_s=30)


def test_ray_status_shows_both_machines(cluster: Cluster) -> None:
    def totals() -> dict[str, float]:
        text = ray(cluster, "status", "--address", cluster.settings.ray_address)
        # Used/total: the used part may be written as 1e-03.
        found = re.findall(r"^\s*\S+/([\d.]+) (M1|W1)$", text, re.MULTILINE)
        return {name: float(amount) for amount, name in found}

    both = {"M1": 1.0, "W1": 1.0}
    eventually(lambda: totals() == both, 20, "ray status shows M1 and W1", pause_s=1)


def test_the_head_takes_no_tasks(cluster: Cluster) -> None:
    totals = [node["resources_total"] for node in ray_list(cluster, "nodes", "state=ALIVE")]

    (head,) = [one for one in totals if "M1" in one]
    (worker,) = [one for one in totals if "W1" in one]
    assert "CPU" not in head
    assert worker["CPU"] >= 1
    assert "M1" not in worker


def test_our_actors_are_where_they_belong(cluster: Cluster) -> None:
    actors = ray_list(cluster, "actors", "state=ALIVE")
    nodes = {node["node_id"]: node["resources_total"] for node in ray_list(cluster, "nodes")}

    where = {actor["name"]: nodes[actor["node_id"]] for actor in actors if actor["name"]}
    assert "M1" in where["moderator"]
    assert "W1" in where["agent:W1"]
    (c1,) = [place for name, place in where.items() if "hcna-c1" in name]
    assert "M1" in c1
    detached = {actor["name"]: actor["is_detached"] for actor in actors}
    assert detached["moderator"] is True
    assert detached["agent:W1"] is True


def test_without_the_token_ray_tells_nothing(cluster: Cluster) -> None:
    info = read_cluster(cluster.settings.run_dir)
    assert info is not None
    env = {name: value for name, value in cluster.env.items() if "AUTH" not in name}
    env["HOME"] = str(cluster.settings.home)
    command = [str(Path(sys.executable).parent / "ray"), "list", "nodes", "--address"]
    done = subprocess.run(
        [*command, info.dashboard_url],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "W1" not in done.stdout

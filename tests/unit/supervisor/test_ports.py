"""Command lines and environment of the Ray nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcna_ray.config import MIB, Settings, load_settings
from hcna_ray.supervisor.ports import (
    connections_max,
    head_command,
    marker_of,
    object_store_bytes,
    process_environment,
    ray_environment,
    single_ports,
    temp_dir_of,
    worker_command,
)

GIB = 1024 * MIB


def settings_with(tmp_path: Path, **env: str) -> Settings:
    return load_settings(home=tmp_path, env=env)


def options(command: list[str]) -> dict[str, str]:
    pairs = (part.removeprefix("--").partition("=") for part in command if part.startswith("--"))
    return {name: value for name, _, value in pairs}


def test_the_head_takes_no_tasks_and_is_called_m1(tmp_path: Path) -> None:
    found = options(
        head_command(settings_with(tmp_path), address="10.0.0.1", memory=8 * GIB, shared=4 * GIB)
    )

    assert found["num-cpus"] == "0"
    assert json.loads(found["resources"]) == {"M1": 1}
    assert found["node-ip-address"] == "10.0.0.1"
    assert found["dashboard-host"] == "127.0.0.1"
    assert {"head", "block", "disable-usage-stats"} <= found.keys()


def test_the_worker_offers_its_cpus_and_its_name(tmp_path: Path) -> None:
    settings = settings_with(
        tmp_path,
        HCNA_WORKER__RESOURCES__CPU_CORES="8",
        HCNA_WORKER__RESOURCES__MEMORY_GB="12",
        HCNA_WORKER__RESOURCES__CUSTOM="{scanner: 2}",
    )

    found = options(
        worker_command(
            settings,
            head="10.0.0.1:6379",
            address="10.0.0.2",
            cpus=4,
            memory=8 * GIB,
            shared=4 * GIB,
        )
    )

    assert found["num-cpus"] == "4"  # Never more than there are.
    assert found["memory"] == str(8 * GIB)
    assert json.loads(found["resources"]) == {"W1": 1.0, "scanner": 2.0}
    assert found["address"] == "10.0.0.1:6379"
    assert found["node-ip-address"] == "10.0.0.2"


def test_two_nodes_and_two_instances_share_no_port(tmp_path: Path) -> None:
    used: list[int] = []
    for offset in (0, 20000):
        settings = settings_with(tmp_path, HCNA_PORTS__OFFSET=str(offset))
        used += single_ports(settings)

    assert len(used) == len(set(used))


def test_all_ports_lie_below_those_that_linux_hands_to_clients(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, HCNA_PORTS__OFFSET="20000")

    assert max(*single_ports(settings), settings.port("worker_processes_max")) < 32768


def test_every_process_gets_the_same_ray_settings_and_the_mark(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    base = {
        "RAY_ADDRESS": "elsewhere:1",
        "HCNA_API_KEY": "hcna_secret",
        "HCNA_LEASE__TTL_S": "99",
        "LANG": "C",
    }

    found = process_environment(settings, base, node="W1")

    assert ray_environment(settings).items() <= found.items()
    assert marker_of(settings).environment().items() <= found.items()
    assert found["HCNA_NODE"] == "W1"
    assert found["LANG"] == "C"
    assert found["HCNA_CONFIG"] == str(tmp_path / "run" / "settings.yaml")
    assert not found.keys() & {"RAY_ADDRESS", "HCNA_API_KEY", "HCNA_LEASE__TTL_S"}


def test_the_address_of_the_store_is_in_no_environment(tmp_path: Path) -> None:
    """Its password would be in that of every process of Ray, and of every handler."""
    ours, other = "postgresql://hcna:secret@db/hcna", "postgresql://app:secret@db/app"
    by_url = load_settings(home=tmp_path, env={"DATABASE_URL": ours})
    by_setting = load_settings(home=tmp_path, env={"HCNA_STORE__URL": ours})

    assert by_url.store.url == by_setting.store.url == ours
    for settings in (by_url, by_setting):
        found = process_environment(settings, {"DATABASE_URL": ours, "HCNA_STORE__URL": ours})
        assert "secret" not in repr(found)
    # A database of somebody else's is theirs to give to handlers.
    assert process_environment(by_setting, {"DATABASE_URL": other})["DATABASE_URL"] == other


def test_ray_demands_a_token(tmp_path: Path) -> None:
    found = ray_environment(settings_with(tmp_path))

    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_AUTH_TOKEN_PATH"].startswith(str(tmp_path))


def test_rays_connections_show_certificates_on_both_sides(tmp_path: Path) -> None:
    found = ray_environment(settings_with(tmp_path))

    assert found["RAY_USE_TLS"] == "1"
    assert found["RAY_TLS_SERVER_CERT"] == found["RAY_TLS_SERVER_KEY"]
    assert found["RAY_TLS_SERVER_CERT"] == str(tmp_path / "cluster" / "node.pem")
    assert found["RAY_TLS_CA_CERT"] == str(tmp_path / "cluster" / "trust.pem")


def test_nobody_leaves_that_out_but_a_test_that_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_with(tmp_path)
    asked = process_environment(settings, {"RAY_USE_TLS": "0", "RAY_TLS_CA_CERT": "/x"})
    assert asked["RAY_USE_TLS"] == "1"
    assert asked["RAY_TLS_CA_CERT"] == str(tmp_path / "cluster" / "trust.pem")

    monkeypatch.delenv("HCNA_TEST", raising=False)
    monkeypatch.setenv("HCNA_TEST_IN_CLEAR", "1")
    assert ray_environment(settings)["RAY_USE_TLS"] == "1"
    monkeypatch.setenv("HCNA_TEST", "1")
    assert "RAY_USE_TLS" not in ray_environment(settings)


def test_homes_have_marks_of_their_own(tmp_path: Path) -> None:
    one, two = settings_with(tmp_path / "a"), settings_with(tmp_path / "b")

    assert marker_of(one).cluster_id != marker_of(two).cluster_id
    assert marker_of(one) == marker_of(settings_with(tmp_path / "a"))


def test_a_socket_path_stays_short(tmp_path: Path) -> None:
    longest = "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"

    settings = settings_with(tmp_path, HCNA_PORTS__OFFSET="20000")

    assert len(str(temp_dir_of(settings)) + longest) <= 107


@pytest.mark.parametrize(
    ("configured", "head", "memory", "shared", "expected"),
    [
        (300 * MIB, True, 8 * GIB, 4 * GIB, 300 * MIB),  # what was asked for
        (None, True, 8 * GIB, 4 * GIB, 200 * MIB),  # M1 moves little
        (None, False, 8 * GIB, 8 * GIB, 8 * GIB // 10),  # a tenth of the memory
        (None, False, 64 * GIB, 64 * GIB, 2 * GIB),  # at most
        (None, False, 64 * GIB, 64 * MIB, 80 * MIB),  # a container's small /dev/shm
    ],
)
def test_the_object_store_fits_the_machine(
    configured: int | None, head: bool, memory: int, shared: int, expected: int
) -> None:
    found = object_store_bytes(configured=configured, head=head, memory=memory, shared=shared)

    assert found == expected


def test_the_entrance_holds_every_waiting_client_but_not_more_than_files_allow(
    tmp_path: Path,
) -> None:
    settings = settings_with(tmp_path)

    assert connections_max(settings, files=65536) > settings.limits.waits_max
    assert connections_max(settings, files=20000) * 2.5 < 20000
    assert connections_max(settings, files=1024) * 2.5 < 1024

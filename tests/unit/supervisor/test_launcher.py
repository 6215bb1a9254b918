"""What `ray up` leaves on the head, read and turned into names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hcna_ray.config import Settings, load_settings
from hcna_ray.supervisor.launcher import (
    LauncherConfig,
    LauncherConfigBroken,
    head_address,
    plan_names,
    read_config,
    remember,
    with_address,
)
from hcna_ray.supervisor.membership import Member

REPOSITORY = Path(__file__).parents[3]
LEFT = {
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]},
    "auth": {"ssh_user": "hcna-admin", "ssh_private_key": "~/ray_bootstrap_key.pem"},
}


def config(*workers: str) -> LauncherConfig:
    return LauncherConfig(
        head_ip="10.0.0.1", worker_ips=workers, ssh_user="me", ssh_private_key=None
    )


def member(name: str, address: str) -> Member:
    return Member(
        name=name,
        node_id=f"HCNA-{name}--prod--home--v1.0",
        machine_id=name,
        hostname=name.lower(),
        address=address,
        token_sha256="0" * 64,
        joined_at=1.0,
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path, env={})


def left(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_what_the_launcher_left_is_read(tmp_path: Path) -> None:
    found = read_config(left(tmp_path, LEFT))

    assert found == LauncherConfig(
        head_ip="10.0.0.1",
        worker_ips=("10.0.0.2", "10.0.0.3"),
        ssh_user="hcna-admin",
        ssh_private_key="~/ray_bootstrap_key.pem",
    )


def test_the_repositorys_own_file_is_one(tmp_path: Path) -> None:
    assert read_config(REPOSITORY / "cluster.yaml").worker_ips == ()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"provider": None}, "'provider'"),
        ({"auth": []}, "'auth'"),
        ({"provider": {"worker_ips": []}}, "provider.head_ip"),
        ({"provider": {"head_ip": "10.0.0.1", "worker_ips": "10.0.0.2"}}, "provider.worker_ips"),
        ({"provider": {"head_ip": "10.0.0.1", "worker_ips": ["10.0.0.1"]}}, "named twice"),
        ({"provider": {"head_ip": "h", "worker_ips": ["w", "w"]}}, "w is named twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, object], word: str) -> None:
    with pytest.raises(LauncherConfigBroken, match=word):
        read_config(left(tmp_path, {**LEFT, **change}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LauncherConfigBroken, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_names_go_by_the_order_of_the_addresses() -> None:
    assert plan_names(["10.0.0.2", "10.0.0.3"], ()) == {"10.0.0.2": "W1", "10.0.0.3": "W2"}


def test_a_machine_keeps_its_name_whatever_is_before_it() -> None:
    known = [member("W2", "10.0.0.3"), member("W5", "10.0.0.9")]

    assert plan_names(["10.0.0.4", "10.0.0.3", "10.0.0.6"], known) == {
        "10.0.0.4": "W1",
        "10.0.0.3": "W2",
        "10.0.0.6": "W3",
    }


def test_those_no_longer_listed_are_told_once(settings: Settings) -> None:
    assert head_address(settings) is None
    assert remember(settings, config("10.0.0.2", "10.0.0.3")) == ()
    assert remember(settings, config("10.0.0.3")) == ("10.0.0.2",)
    assert remember(settings, config("10.0.0.3")) == ()
    assert head_address(settings) == "10.0.0.1"


def test_m1_has_the_address_that_the_launcher_knows(settings: Settings) -> None:
    assert with_address(settings, "10.0.0.1").ray.node_address == "10.0.0.1"

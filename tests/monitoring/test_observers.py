"""`hcna observe up`: real Prometheus and Alertmanager, and a Grafana made of paper."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hcna_ray.cli.main import main
from hcna_ray.supervisor import observers as observers_module
from hcna_ray.supervisor.membership import Membership, write_membership
from hcna_ray.supervisor.observers import Observers
from hcna_ray.supervisor.processes import ProcessRef, is_alive
from tests.monitoring.conftest import Unaware
from tests.support.live import eventually
from tests.support.paper_grafana import PaperGrafana

Say = Callable[..., tuple[int, Any, str]]
A_MEMBERSHIP = Membership(
    name="W2",
    node_id="HCNA-W2--prod--home--v1.0",
    machine_id="machine-of-w2",
    m1_addresses=("192.0.2.1",),
    gate_port=10040,
    ca_pem="pem",
    ca_sha256="0" * 64,
    member_token="token",
    ray_address="192.0.2.1:6379",
    moderator_node_id="HCNA-M1--prod--home--v1.0",
    shared={},
    joined_at=0.0,
)


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HCNA_HOME", str(tmp_path))
    for name in ("GRAFANA_TOKEN", "GRAFANA_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    Observers(tmp_path / "observe").down()


@pytest.fixture
def say(home: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Type a command; return its code, its JSON and what it says to people."""

    def typed(*words: str) -> tuple[int, Any, str]:
        code = main(["observe", *words, "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return typed


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(observers_module, "_MORE_PATH", ())
    return folder


def install(folder: Path, name: str, *command: str) -> None:
    program = folder / name
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)


def config_of(prometheus: str) -> dict[str, Any]:
    reply = httpx.get(f"{prometheus}/api/v1/status/config", trust_env=False).json()
    return dict(yaml.safe_load(reply["data"]["yaml"]))


def outcomes(told: Any) -> dict[str, str]:
    return {one["name"]: one["outcome"] for one in told["programs"]}


def started(home: Path) -> dict[str, ProcessRef]:
    told = json.loads((home / "observe" / "processes.json").read_text())
    return {name: ProcessRef(one["pid"], one["started_ticks"]) for name, one in told.items()}


def test_prometheus_and_alertmanager_are_started_once_and_stopped(home: Path, say: Say) -> None:
    prometheus, alertmanager = free_url(), free_url()
    where = ["--prometheus", prometheus, "--alertmanager", alertmanager]
    up = ["up", *where, "--webhook", "http://127.0.0.1:9/alerts", "--without-grafana"]

    code, told, _ = say(*up)
    assert (code, outcomes(told)) == (0, {"Prometheus": "started", "Alertmanager": "started"})
    rules = httpx.get(f"{prometheus}/api/v1/rules", trust_env=False).json()["data"]["groups"]
    assert [group["name"] for group in rules] == ["hcna"]
    first = started(home)

    code, told, _ = say(*up)
    assert (code, outcomes(told)) == (0, {"Prometheus": "running", "Alertmanager": "running"})
    assert started(home) == first

    # What is new in its configuration is read by the one that runs.
    code, told, _ = say(*up, "--every", "5")
    assert (code, started(home)) == (0, first)
    config = eventually(
        lambda: (one := config_of(prometheus))["global"]["scrape_interval"] == "5s" and one,
        30,
        "the new configuration",
    )
    assert config
    assert config["alerting"]["alertmanagers"][0]["static_configs"] == [
        {"targets": [alertmanager.removeprefix("http://")]}
    ]

    # Nobody is told of alerts any more: Alertmanager would, from what it has read.
    code, told, _ = say("up", "--webhook", "")
    assert (code, outcomes(told)) == (0, {"Prometheus": "running", "Alertmanager": "stopped"})
    assert set(told["kept"]) == {"prometheus", "alertmanager", "without_grafana", "every"}
    assert not is_alive(first["Alertmanager"])
    assert started(home) == {"Prometheus": first["Prometheus"]}
    code, told, _ = say("up", "--webhook", "http://127.0.0.1:9/alerts")
    assert (code, outcomes(told)["Alertmanager"]) == (0, "started")
    first = started(home)

    # Somebody who does not know that it was started here finds it, and leaves it alone.
    stranger = Observers(home / "elsewhere")
    assert stranger.prometheus(prometheus, changed=False).outcome == "found"
    assert stranger.down() == []

    code, told, _ = say("down")
    assert (code, sorted(told["stopped"])) == (0, ["Alertmanager", "Prometheus"])
    assert not [one for one in first.values() if is_alive(one)]
    assert say("down")[1] == {"stopped": []}


def test_another_address_moves_what_was_started_here(
    home: Path, say: Say, nothing_installed: Path
) -> None:
    pages = "tests.support.paper_grafana"
    install(nothing_installed, "grafana", sys.executable, "-m", pages)
    folder = Observers(home / "observe")
    folder.write({})
    one, other = free_url(), free_url()
    assert folder.grafana(one).outcome == "started"
    first = started(home)["Grafana"]
    assert folder.grafana(other).outcome == "started"
    assert not is_alive(first)
    assert folder.down() == ["Grafana"]


def test_what_is_not_installed_is_told_how_to(say: Say, nothing_installed: Path) -> None:
    code, told, error = say("up", "--prometheus", free_url(), "--grafana", free_url())
    assert (code, outcomes(told)) == (3, {"Prometheus": "missing", "Grafana": "missing"})
    assert "apt-get install prometheus" in error
    assert "grafana.com/docs" in told["programs"][1]["then"]
    # What is on another machine is not started here.
    code, told, _ = say("up", "--prometheus", "http://192.0.2.1:9", "--without-grafana")
    assert (code, outcomes(told)) == (3, {"Prometheus": "missing"})


def test_a_program_that_does_not_come_up_is_told_with_its_last_line(
    say: Say, nothing_installed: Path
) -> None:
    install(nothing_installed, "prometheus", "/bin/sh", "-c", "echo the disk is full; exit 1")
    code, _, error = say("up", "--prometheus", free_url(), "--without-grafana")
    assert code == 1
    assert "the disk is full" in error


def test_a_grafana_that_is_installed_is_started_and_given_everything(
    home: Path, say: Say, nothing_installed: Path
) -> None:
    install(nothing_installed, "grafana", sys.executable, "-m", "tests.support.paper_grafana")
    install(nothing_installed, "prometheus", "/bin/false")
    url = free_url()
    # Prometheus is somewhere else, and somebody else's: only Grafana is looked at here.
    with_prometheus = ["up", "--grafana", url, "--prometheus", "http://192.0.2.1:9"]

    code, told, _ = say(*with_prometheus)
    assert (code, outcomes(told)) == (3, {"Prometheus": "missing", "Grafana": "started"})
    assert {one["outcome"] for one in told["changes"]} == {"made"}
    assert (home / "observe" / "grafana.password").stat().st_mode & 0o077 == 0

    code, told, _ = say(*with_prometheus)
    assert outcomes(told)["Grafana"] == "running"
    assert {one["outcome"] for one in told["changes"]} == {"kept"}


def test_a_grafana_of_somebody_else_needs_a_key(
    grafana: PaperGrafana,
    unaware: Unaware,
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    up = ["up", "--grafana", grafana.url, "--prometheus", unaware.url]
    code, _, error = say(*up)
    assert code == 2
    assert "GRAFANA_TOKEN" in error
    assert grafana.writes() == []

    monkeypatch.setenv("GRAFANA_PASSWORD", "secret")
    code, told, error = say(*up)
    assert (code, outcomes(told)) == (3, {"Prometheus": "foreign", "Grafana": "found"})
    assert "does not scrape this cluster" in error
    assert main(["observe", *up]) == 3
    said = capsys.readouterr()
    assert "kept     dashboard    hcna: overview" in said.out
    assert f"Next: {grafana.url}/d/hcna-overview" in said.err


@pytest.mark.parametrize("word", ["--grafana", "--prometheus", "--webhook", "--loki", "--c1"])
def test_what_is_no_address_is_refused(say: Say, word: str) -> None:
    code, _, error = say("up", word, "localhost:9090")
    assert code == 2
    assert "not an address" in error


def test_a_machine_that_has_joined_says_where_to_type_it(home: Path, say: Say) -> None:
    cluster = home / "cluster"
    cluster.mkdir(mode=0o700)
    write_membership(cluster, A_MEMBERSHIP)
    code, _, error = say("up", "--without-grafana")
    assert code == 4
    assert "this machine is W2; C1 is on M1. Next: hcna observe up, on 192.0.2.1" in error

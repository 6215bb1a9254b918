"""``hcna observe up`` on a machine without Prometheus: what it writes, remembers and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hcna_ray.cli import observe
from hcna_ray.supervisor import observers as observers_module
from hcna_ray.supervisor.observers import Wanted
from tests.support.fake_c1 import API_KEY, FakeC1, problem
from tests.support.gates import free_port
from tests.unit.cli.conftest import Hcna, Ran

#: Prometheus is not installed.
MISSING = 3
WEBHOOK = "https://hooks.example/T0/secret"


@pytest.fixture
def folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The observe folder of a machine on which nothing is installed."""
    monkeypatch.setenv("HCNA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    # Where no C1 of the machine that tests answers.
    monkeypatch.setenv("HCNA_COMPOSITE__API_PORT", str(free_port()))
    monkeypatch.setattr(observers_module, "_MORE_PATH", ())
    monkeypatch.setattr(observers_module, "_answers", lambda url, path: False)
    return tmp_path / "observe"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "prometheus.key"
    path.write_text(f"{API_KEY}\n")
    return path


def up(hcna: Hcna, *words: object) -> Ran:
    return hcna("observe", "up", *map(str, words), "--json")


def credentials(folder: Path) -> str | None:
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    access = config["scrape_configs"][0].get("authorization", {})
    found: str | None = access.get("credentials_file")
    return found


def webhook(folder: Path) -> str:
    config: Any = yaml.safe_load((folder / "alertmanager.yml").read_text())
    return str(config["receivers"][0]["webhook_configs"][0]["url"])


# -- a C1 that wants a key -------------------------------------------------------------------------


def test_a_c1_that_wants_a_key_is_not_observed_without_one(
    hcna: Hcna, url: str, folder: Path
) -> None:
    ran = hcna("observe", "up", "--without-grafana", "--c1", url)
    assert ran.code == 4
    assert "--key-file" in ran.err
    assert "hcna keys create prometheus --role viewer > prometheus.key" in ran.err
    assert not folder.exists()


def test_with_its_key_it_is(hcna: Hcna, c1: FakeC1, url: str, folder: Path, key_file: Path) -> None:
    ran = up(hcna, "--without-grafana", "--c1", url, "--key-file", key_file)
    assert ran.code == MISSING
    assert c1.requests[-1].path == "/metrics/targets"
    assert credentials(folder) == str(key_file)


def test_a_key_that_c1_does_not_take_is_told(
    hcna: Hcna, url: str, folder: Path, key_file: Path
) -> None:
    key_file.write_text("another")
    ran = up(hcna, "--without-grafana", "--c1", url, "--key-file", key_file)
    assert ran.code == 4
    assert f"does not take the key in {key_file}" in ran.err
    assert not folder.exists()


@pytest.mark.parametrize("text", [None, "", "two words", "schlüssel"])
def test_a_file_that_holds_no_key_is_told(
    hcna: Hcna, url: str, folder: Path, key_file: Path, text: str | None
) -> None:
    key_file.unlink()
    if text is not None:
        key_file.write_text(text)
    ran = up(hcna, "--without-grafana", "--c1", url, "--key-file", key_file)
    assert ran.code == 2
    assert str(key_file) in ran.err
    assert not folder.exists()


def test_where_c1_does_not_answer_the_settings_say_whether_it_will_want_one(
    hcna: Hcna, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCNA_PORTS__SERVE_HTTP", str(free_port()))
    monkeypatch.setenv("HCNA_COMPOSITE__SECURITY__ENABLE_TLS", "true")
    monkeypatch.setenv("HCNA_COMPOSITE__LISTEN_ADDRESS", "0.0.0.0")
    ran = up(hcna, "--without-grafana")
    assert ran.code == 4
    assert "--key-file" in ran.err
    assert not folder.exists()
    monkeypatch.setenv("HCNA_COMPOSITE__LISTEN_ADDRESS", "127.0.0.1")
    assert up(hcna, "--without-grafana").code == MISSING


def test_what_c1_says_about_something_else_is_no_refusal(
    hcna: Hcna, c1: FakeC1, url: str, folder: Path
) -> None:
    c1.script.append(problem(503, "overloaded"))
    assert up(hcna, "--without-grafana", "--c1", url).code == MISSING


def test_a_prometheus_elsewhere_has_a_key_of_its_own(hcna: Hcna, url: str, folder: Path) -> None:
    there = "http://prometheus.example:9090"
    assert up(hcna, "--without-grafana", "--c1", url, "--prometheus", there).code == MISSING


# -- options of the last time ----------------------------------------------------------------------


def test_an_option_that_is_not_given_stays(
    hcna: Hcna, url: str, folder: Path, key_file: Path
) -> None:
    first = up(
        *(hcna, "--without-grafana", "--c1", url, "--key-file", key_file),
        *("--webhook", WEBHOOK, "--every", 5),
    )
    assert (first.code, first.json["kept"]) == (MISSING, {})

    ran = up(hcna, "--loki", "http://127.0.0.1:3100")
    assert credentials(folder) == str(key_file)
    assert webhook(folder) == WEBHOOK
    assert "scrape_interval: 5s" in (folder / "prometheus.yml").read_text()
    assert ran.json["kept"] == {
        "without_grafana": True,
        "c1": url,
        "key_file": str(key_file),
        "webhook": "https://hooks.example/...",
        "every": 5,
    }
    assert [one["name"] for one in ran.json["programs"]] == ["Prometheus", "Alertmanager"]
    # It says so to people as well, but not where alerts go, which may be a secret.
    said = hcna("observe", "up").err
    assert f"--key-file {key_file}" in said
    assert ", --without-grafana" in said
    assert "--loki http://127.0.0.1:3100" in said
    assert "T0" not in said

    stored = folder / "options.json"
    assert stored.stat().st_mode & 0o777 == 0o600
    assert API_KEY not in stored.read_text()


def test_an_option_is_undone_by_an_empty_word(
    hcna: Hcna, url: str, folder: Path, key_file: Path
) -> None:
    up(
        *(hcna, "--without-grafana", "--c1", url, "--key-file", key_file),
        *("--webhook", WEBHOOK, "--every", 5),
    )
    ran = up(hcna, "--webhook", "", "--every", 15)
    assert webhook(folder) == "http://127.0.0.1:9099/alerts"
    assert set(ran.json["kept"]) == {"without_grafana", "c1", "key_file"}
    assert up(hcna, "--key-file", "").code == 4
    assert credentials(folder) == str(key_file)  # What is refused changes nothing.
    assert up(hcna, "--key-file", "", "--c1", "").json["kept"] == {"without_grafana": True}
    assert credentials(folder) is None


@pytest.mark.parametrize("words", [["--with-grafana"], ["--grafana", "http://127.0.0.1:3001"]])
def test_grafana_is_back_when_it_is_named(hcna: Hcna, folder: Path, words: list[str]) -> None:
    assert len(up(hcna, "--without-grafana").json["programs"]) == 1
    assert len(up(hcna).json["programs"]) == 1
    assert len(up(hcna, *words).json["programs"]) == 2


def test_a_key_file_that_is_gone_is_missed(
    hcna: Hcna, url: str, folder: Path, key_file: Path
) -> None:
    up(hcna, "--without-grafana", "--c1", url, "--key-file", key_file)
    key_file.unlink()
    ran = up(hcna)
    assert ran.code == 2
    assert f"--key-file {key_file}" in ran.err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "options": {}}',
        '{"version": 1, "options": {"every": "5"}}',
        '{"version": 1, "options": {"nobody": null}}',
    ],
)
def test_what_is_remembered_and_cannot_be_read_is_not_dropped(
    hcna: Hcna, folder: Path, text: str
) -> None:
    up(hcna, "--without-grafana", "--webhook", WEBHOOK)
    (folder / "options.json").write_text(text)
    ran = up(hcna, "--without-grafana")
    assert ran.code == 1
    assert "options.json" in ran.err
    assert webhook(folder) == WEBHOOK


def test_the_help_names_the_defaults_that_count() -> None:
    usual = Wanted()
    told = (observe.GRAFANA_URL, observe.PROMETHEUS_URL, observe.ALERTMANAGER_URL)
    assert told == (usual.grafana, usual.prometheus, usual.alertmanager)
    assert (usual.every, usual.user) == (observe.EVERY_S, "admin")


def test_what_is_stored_is_what_was_told(hcna: Hcna, folder: Path) -> None:
    up(hcna, "--without-grafana", "--every", 15)
    stored = json.loads((folder / "options.json").read_text())
    assert stored == {"version": 1, "options": {"without_grafana": True}}

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hcna_ray.api import schemas
from hcna_ray.api.targets import HEAD, Exporters, RayNode, nodes_alive, targets
from hcna_ray.config import PortSettings, RaySettings, Settings
from tests.support.c1 import Composite

M1 = RayNode("192.0.2.1", 10015, frozenset({HEAD, "M1", "node:192.0.2.1"}))
W2 = RayNode("192.0.2.2", 10025, frozenset({"W2", "CPU"}))


def listed(found: list[dict[str, object]]) -> set[tuple[str, str, str]]:
    return {
        (group["labels"]["job"], group["labels"]["exporter"], target)  # type: ignore[index]
        for group in found
        for target in group["targets"]  # type: ignore[attr-defined]
    }


def test_c1_and_every_page_of_ray_are_listed(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, ports=PortSettings(offset=100))
    found = targets(settings, host="localhost:8080", workers=["W2"], nodes=[M1, W2])

    assert listed(found) == {
        ("hcna", "c1", "localhost:8080"),
        ("ray", "node", "192.0.2.1:10015"),
        ("ray", "autoscaler", "192.0.2.1:10116"),
        ("ray", "dashboard", "192.0.2.1:10117"),
        ("ray", "edge", "127.0.0.1:10133"),
        ("ray", "node", "192.0.2.2:10025"),
    }
    assert [group["labels"]["node"] for group in found] == ["M1"] * 5 + ["W2"]


def test_what_is_on_loopback_is_listed_for_those_on_m1_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)

    def edges(host: str) -> set[str]:
        found = targets(settings, host=host, workers=[], nodes=[M1])
        return {target for _, exporter, target in listed(found) if exporter == "edge"}

    assert edges("127.0.0.1:8443") == edges("[::1]:8080") == edges("") == {"127.0.0.1:10033"}
    assert edges("c1.lan:8080") == edges("192.0.2.1:8080") == set()


def test_a_tiny_m1_has_no_page_of_a_dashboard(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, ray=RaySettings(profile="tiny"))
    found = targets(settings, host="c1", workers=[], nodes=[M1])
    assert "dashboard" not in {exporter for _, exporter, _ in listed(found)}
    assert found[0]["targets"] == ["c1:80"]


@pytest.mark.parametrize("host", ["", "a b", "evil\nhost", "c1:1:2", "x" * 300])
def test_a_host_that_is_none_is_not_repeated(tmp_path: Path, host: str) -> None:
    settings = Settings(home=tmp_path)
    (group,) = targets(settings, host=host, workers=[], nodes=[])
    assert group["targets"] == [f"{settings.api_host}:{settings.api_port}"]


def test_an_address_with_colons_stands_in_brackets(tmp_path: Path) -> None:
    node = RayNode("2001:db8::2", 10025, frozenset({"W2"}))
    found = targets(Settings(home=tmp_path), host="[::1]:8080", workers=["W2"], nodes=[node])
    assert [group["targets"] for group in found] == [["[::1]:8080"], ["[2001:db8::2]:10025"]]


def test_only_living_nodes_of_rays_table_count() -> None:
    row = {"NodeManagerAddress": "192.0.2.2", "MetricsExportPort": 10025, "Resources": {"W2": 1.0}}
    assert nodes_alive([{**row, "Alive": True}, {**row, "Alive": False}]) == [
        RayNode("192.0.2.2", 10025, frozenset({"W2"}))
    ]


async def test_what_was_last_known_counts_while_ray_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[object] = [[M1], ConnectionError("no head")]
    asked = threading.Event()
    may_answer = threading.Event()

    def look() -> list[RayNode]:
        if not answers:
            asked.set()
            may_answer.wait()
            return [W2]
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, list)
        return answer

    with ThreadPoolExecutor(1) as executor:
        exporters = Exporters(look, executor)
        assert await exporters.nodes() == [M1]
        assert await exporters.nodes() == [M1]
        monkeypatch.setattr("hcna_ray.api.targets.LOOK_S", 0)
        # It keeps us waiting: asked once, however often we are.
        assert await exporters.nodes() == [M1]
        assert await exporters.nodes() == [M1]
        may_answer.set()
        monkeypatch.setattr("hcna_ray.api.targets.LOOK_S", 60)
        assert await exporters.nodes() == [W2]


async def test_prometheus_is_told_where_c1_is(c1: Composite) -> None:
    c1.moderator.join()
    reply = await c1.http.get("/metrics/targets")

    assert reply.headers["content-type"] == "application/json"
    schemas.TargetsOut.model_validate(reply.json())
    assert reply.json() == [
        {
            "targets": ["127.0.0.1:80"],
            "labels": {"job": "hcna", "node": "M1", "exporter": "c1"},
        }
    ]
    assert (await c1.http.get("/metrics/targets?job=ray")).json() == []
    assert (await c1.http.get("/metrics/targets?job=other")).status_code == 422
    c1.moderator.kill()
    c1.moderator.desk.clock.advance(1)
    assert (await c1.http.get("/metrics/targets")).status_code == 200

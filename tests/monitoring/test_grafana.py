"""What `hcna observe up` asks of Grafana: path, method, key and body, twice in a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hcna_ray.observability import alerts, monitoring
from hcna_ray.observability.grafana import GrafanaTrouble, holds, provision
from tests.support.paper_grafana import RULES, TOKEN, PaperGrafana

PROMETHEUS = "http://127.0.0.1:9090"
#: Writes dashboards as Ray does.
RAYS_OWN = """
import pathlib, sys
from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory
for name in ("default", "serve", "data"):
    text, _ = getattr(factory, f"generate_{name}_grafana_dashboard")()
    (pathlib.Path(sys.argv[1]) / f"{name}_grafana_dashboard.json").write_text(text)
"""
LOKI = "http://127.0.0.1:3100"


def test_a_new_grafana_is_given_everything(grafana: PaperGrafana) -> None:
    changes = provision(grafana.url, TOKEN, prometheus_url=PROMETHEUS)

    assert {one.outcome for one in changes} == {"made"}
    boards = len(monitoring.dashboards())
    assert grafana.writes() == [
        ("POST", "/api/datasources"),
        ("POST", "/api/folders"),
        *[("POST", "/api/dashboards/db")] * boards,
        ("PUT", RULES),
    ]
    source = grafana.bodies["POST", "/api/datasources"]
    assert source == monitoring.datasource(PROMETHEUS)
    assert grafana.bodies["POST", "/api/folders"] == {"title": "hcna", "uid": "hcna"}
    last = grafana.bodies["POST", "/api/dashboards/db"]
    assert (last["folderUid"], last["overwrite"]) == ("hcna", True)
    rules = grafana.bodies["PUT", RULES]
    assert [one["title"] for one in rules["rules"]] == [one.name for one in alerts.ALERTS]
    assert {one["data"][0]["datasourceUid"] for one in rules["rules"]} == {source["uid"]}
    assert grafana.headers["PUT", RULES]["X-Disable-Provenance"] == "true"


def test_the_second_time_nothing_is_written(grafana: PaperGrafana) -> None:
    provision(grafana.url, TOKEN, prometheus_url=PROMETHEUS)
    kept = json.dumps(grafana.kept, sort_keys=True)
    grafana.asked.clear()

    changes = provision(grafana.url, ("admin", "secret"), prometheus_url=PROMETHEUS)

    assert {one.outcome for one in changes} == {"kept"}
    assert grafana.writes() == []
    assert len(grafana.asked) == len(changes)
    assert json.dumps(grafana.kept, sort_keys=True) == kept


def test_rays_own_dashboards_stand_beside_ours(grafana: PaperGrafana, tmp_path: Path) -> None:
    assert monitoring.rays_dashboards(tmp_path) == []
    # A process of its own: Ray leaves files open.
    subprocess.run([sys.executable, "-c", RAYS_OWN, tmp_path], check=True, timeout=120)
    rays = monitoring.rays_dashboards(tmp_path)
    assert [one["uid"] for one in rays] == ["rayDefaultDashboard", "rayServeDashboard"]

    provision(grafana.url, TOKEN, prometheus_url=PROMETHEUS, rays=rays)
    assert grafana.kept["/api/folders/hcna-ray"]["title"] == "Ray"
    kept = grafana.kept["/api/dashboards/uid/rayDefaultDashboard"]
    assert kept["meta"]["folderUid"] == "hcna-ray"
    again = provision(grafana.url, TOKEN, prometheus_url=PROMETHEUS, rays=rays)
    assert {one.outcome for one in again} == {"kept"}


def test_only_what_differs_is_written(grafana: PaperGrafana) -> None:
    provision(grafana.url, TOKEN, prometheus_url=PROMETHEUS)
    grafana.kept["/api/dashboards/uid/hcna-workers"]["dashboard"]["title"] = "mine"
    del grafana.kept[RULES]["rules"][0]
    grafana.asked.clear()

    changes = provision(grafana.url, TOKEN, prometheus_url="http://prometheus:9090")

    changed = {one.name for one in changes if one.outcome == "changed"}
    assert changed == {"hcna", "hcna: workers"}  # The data source and the rules have one name.
    assert grafana.writes() == [
        ("PUT", f"/api/datasources/uid/{alerts.DATASOURCE_UID}"),
        ("POST", "/api/dashboards/db"),
        ("PUT", RULES),
    ]


def test_a_wrong_key_and_a_grafana_that_is_not_there_are_told(grafana: PaperGrafana) -> None:
    with pytest.raises(GrafanaTrouble, match="Unauthorized"):
        provision(grafana.url, "wrong", prometheus_url=PROMETHEUS)
    assert grafana.writes() == []
    with pytest.raises(GrafanaTrouble, match="no answer"):
        provision("http://127.0.0.1:9", TOKEN, prometheus_url=PROMETHEUS)
    with pytest.raises(ValueError, match="address"):
        provision("grafana", TOKEN, prometheus_url=PROMETHEUS)


def test_loki_is_a_data_source_where_there_is_one(grafana: PaperGrafana) -> None:
    provision(grafana.url, TOKEN, prometheus_url=PROMETHEUS, loki_url=LOKI)
    assert [path for method, path in grafana.writes()].count("/api/datasources") == 2
    loki = grafana.kept[f"/api/datasources/uid/{monitoring.LOKI_UID}"]
    assert (loki["type"], loki["url"]) == ("loki", LOKI)

    again = provision(grafana.url, TOKEN, prometheus_url=PROMETHEUS, loki_url=LOKI)
    assert {one.outcome for one in again} == {"kept"}


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ({"a": 1, "more": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([{"a": 1, "b": 2}], [{"a": 1}], True),
        ([1, 2], [1], False),
        ("ab", ["a", "b"], False),
    ],
)
def test_what_is_wanted_is_found_in_what_is_there(
    found: object, wanted: object, expected: bool
) -> None:
    assert holds(found, wanted) is expected

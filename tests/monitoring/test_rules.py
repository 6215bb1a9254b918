"""Rules and dashboards against Debian's promtool, and an alert through a real Alertmanager."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
import yaml

from hcna_ray.observability import alerts, monitoring
from hcna_ray.observability.exposition import families, full_sample
from hcna_ray.runtime.worker_page import GAUGES
from tests.support.promql import filled, metrics_in, queries, selectors_in

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "monitoring"
#: Names that Prometheus itself makes, and those of HAProxy's page.
OTHERS = {
    "up",
    "haproxy_backend_response_time_average_seconds",
    "haproxy_backend_queue_time_average_seconds",
}


def promtool(*arguments: str | Path) -> str:
    """Run promtool; return what it says, or fail with that."""
    program = shutil.which("promtool")
    assert program, "promtool is missing: scripts/system_packages.sh"
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def exported() -> set[str]:
    """Return the name of every series of C1 and of a worker."""
    names = set(GAUGES)
    for family in families(full_sample()):
        if family.type == "counter":
            names.add(f"{family.name}_total")
        elif family.type == "histogram":
            names |= {f"{family.name}_{end}" for end in ("bucket", "sum", "count")}
        else:
            names.add(family.name)
    return names


def rays() -> str:
    """Return the program with which Ray counts what its nodes do."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    agent = Path(spec.origin).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    return agent.read_text("utf-8")


def test_the_files_of_the_documentation_are_what_the_program_writes() -> None:
    wanted = monitoring.files()
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*") if path.is_file()}
    assert there == set(wanted)
    for name, text in wanted.items():
        assert (DOCS / name).read_text("utf-8") == text, name


def test_the_dashboards_are_what_the_sdk_builds() -> None:
    from scripts.build_dashboards import built

    for path, text in built():
        assert path.read_text("utf-8") == text, path


def test_every_dashboard_has_its_own_name_and_says_where_its_data_are() -> None:
    found = monitoring.dashboards()
    assert set(found) == {"overview", "task-types", "workers", "moderator", "one-task"}
    assert len({one["uid"] for one in found.values()}) == len(found)
    for one in found.values():
        assert "id" not in one
        assert [panel["id"] for panel in one["panels"]] == list(range(1, len(one["panels"]) + 1))
        variables = {variable["name"] for variable in one["templating"]["list"]}
        used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps(one["panels"])))
        assert used <= variables, used - variables


def test_every_query_parses(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": filled(expr)}
        for number, (_, expr) in enumerate(queries())
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    said = promtool("check", "rules", file)
    assert f"{len(rules)} rules found" in said


def test_every_query_names_only_what_is_exported() -> None:
    ours, agent = exported(), rays()
    checked = 0
    for where, expr in queries():
        for name in metrics_in(filled(expr)):
            checked += 1
            if name.startswith("ray_"):
                assert f'"{name.removeprefix("ray_")}"' in agent, (where, name)
            else:
                assert name in ours | OTHERS, (where, name)
    assert checked > 60


def test_a_query_of_a_metric_that_nobody_exports_would_be_found() -> None:
    assert metrics_in('sum by (a) (rate(hcna_x_total{b="c"}[5m])) / up > 3e9') == {
        "hcna_x_total",
        "up",
    }


def test_what_a_query_selects() -> None:
    assert selectors_in('sum by (a) (rate(hcna_x_total{b="c"}[5m])) / up > 3e9') == {
        'hcna_x_total{b="c"}',
        "up",
    }


def test_the_rules_do_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "hcna.rules.yml").write_text(monitoring.files()["hcna.rules.yml"])
    shutil.copy(HERE / "rules_test.yml", tmp_path)
    promtool("check", "rules", tmp_path / "hcna.rules.yml")
    promtool("test", "rules", tmp_path / "rules_test.yml")


def test_every_rule_is_seen_to_fire() -> None:
    told = yaml.safe_load((HERE / "rules_test.yml").read_text("utf-8"))
    fired = {
        check["alertname"]
        for test in told["tests"]
        for check in test["alert_rule_test"]
        if check.get("exp_alerts")
    }
    assert fired == {alert.name for alert in alerts.ALERTS}


def test_the_configuration_of_prometheus_is_one(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("hcna_key-of-a-scraper")
    for name, text in monitoring.files(key_file=str(key)).items():
        if "/" not in name:
            (tmp_path / name).write_text(text)
    promtool("check", "config", tmp_path / "prometheus.yml")
    config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    jobs = {one["job_name"]: one for one in config["scrape_configs"]}
    # What opens C1 is not for Ray's pages, which anybody may listen to.
    assert "authorization" in jobs["hcna"]
    assert "authorization" not in jobs["ray"]
    assert all("authorization" in one["http_sd_configs"][0] for one in jobs.values())


# -- Alertmanager ----------------------------------------------------------------------------------


class Webhook(BaseHTTPRequestHandler):
    """Keeps what it is told."""

    told: Queue[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.told.put(json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def a_webhook(port: int = 0) -> Iterator[tuple[str, Queue[dict[str, Any]]]]:
    """Listen on loopback for what Alertmanager tells; yield the address and what has come."""
    told: Queue[dict[str, Any]] = Queue()
    server = HTTPServer(("127.0.0.1", port), type("Hook", (Webhook,), {"told": told}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/alerts", told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def an_alertmanager(folder: Path, webhook_url: str) -> Iterator[httpx.Client]:
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    assert program, "Alertmanager is missing: scripts/system_packages.sh"
    config = yaml.safe_load(monitoring.files(webhook_url=webhook_url)["alertmanager.yml"])
    # Ours waits to put alerts together; a test need not.
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = _free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as http:
            _wait_until_ready(http, process)
            yield http
    finally:
        process.terminate()
        process.wait(20)


def _wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "Alertmanager ended"
        try:
            if http.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail("Alertmanager is not ready")


def test_an_alert_and_its_end_reach_the_webhook(tmp_path: Path) -> None:
    labels = {"alertname": "HcnaWorkerDown", "severity": "warning", "worker": "W1"}
    began = datetime.now(UTC)
    with a_webhook() as (url, told), an_alertmanager(tmp_path, url) as manager:
        # As Prometheus sends it.
        alert = {
            "labels": labels,
            "annotations": {"summary": "Worker W1 is silent."},
            "startsAt": began.isoformat(),
            "endsAt": (began + timedelta(minutes=5)).isoformat(),
        }
        assert manager.post("/api/v2/alerts", json=[alert]).status_code == 200
        first = told.get(timeout=60)
        assert first["status"] == "firing"
        assert first["alerts"][0]["labels"] == labels
        assert first["alerts"][0]["annotations"]["summary"] == "Worker W1 is silent."

        ended = alert | {"endsAt": datetime.now(UTC).isoformat()}
        assert manager.post("/api/v2/alerts", json=[ended]).status_code == 200
        second = told.get(timeout=60)
        assert (second["status"], second["alerts"][0]["labels"]) == ("resolved", labels)

"""Debian's Prometheus scrapes C1 at work: what dashboards and rules ask for is there.

C1, the moderator, its store and a worker are the real ones; only Ray is not there. The rig asks for
the rest, on two hosts (`tests.rig.test_observed`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from hcna_ray.cli.main import main
from hcna_ray.supervisor.observers import Observers
from tests.monitoring.test_observers import free_url
from tests.support.live import eventually
from tests.support.promql import found, metrics_in, wanted

#: What Ray and the edge show, and what a worker tells that has a machine of its own.
NOT_HERE = ("ray_", "haproxy_", "hcna_worker_memory", "hcna_worker_disk")
READY_S, DATA_S = 90.0, 90.0


@contextmanager
def a_c1(tmp_path: Path, **environment: str) -> Iterator[httpx.Client]:
    """Have a C1 of these settings; yield what opens it."""
    url, home = free_url(), tmp_path / "home"
    home.mkdir()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.monitoring.stage_process", home, str(urlsplit(url).port)],
            stdout=log,
            stderr=log,
            env=os.environ | environment,
        )
    try:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:

            def ready() -> bool:
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    return http.get("/ready").status_code == 200
                except httpx.TransportError:
                    return False

            eventually(ready, READY_S, "C1 is ready")
            key = (home / "keys" / "client.key").read_text().strip()
            http.headers["Authorization"] = f"Bearer {key}"
            yield http
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def c1(tmp_path: Path) -> Iterator[httpx.Client]:
    with a_c1(tmp_path) as found:
        yield found


@pytest.fixture
def prometheus(
    c1: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    monkeypatch.setenv("HCNA_HOME", str(tmp_path))
    url = free_url()
    where = ["--c1", str(c1.base_url).rstrip("/"), "--prometheus", url, "--every", "1"]
    try:
        assert main(["observe", "up", "--without-grafana", *where]) == 0
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            yield http
    finally:
        Observers(tmp_path / "observe").down()


def test_every_query_of_ours_finds_data_while_tasks_are_done(
    c1: httpx.Client, prometheus: httpx.Client
) -> None:
    assert c1.post("/admin/queues/night/pause").status_code == 200
    asked = {
        where: expr
        for where, expr in wanted().items()
        if not any(name.startswith(NOT_HERE) for name in metrics_in(expr))
    }
    assert len(asked) > 70

    def work() -> dict[str, Any]:
        """Have some more done; return what finds nothing yet."""
        for number in range(20):
            queue = ("default", "side", "night")[number % 3]
            body = {"task_type": ("echo", "test.ping")[number % 2], "payload": {}, "queue": queue}
            assert c1.post("/tasks", json=body).status_code == 202, body
        return {where: expr for where, expr in asked.items() if not found(prometheus, expr)}

    missing = work()
    end = time.monotonic() + DATA_S
    while missing and time.monotonic() < end:
        time.sleep(1)
        missing = work()
    assert missing == {}

    reply = prometheus.get("/api/v1/rules").json()
    (group,) = reply["data"]["groups"]
    assert {one["health"] for one in group["rules"]} == {"ok"}, json.dumps(group)


def test_a_c1_that_others_can_reach_is_scraped_with_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HCNA_HOME", str(tmp_path))
    public = {
        "HCNA_COMPOSITE__LISTEN_ADDRESS": "0.0.0.0",
        "HCNA_COMPOSITE__SECURITY__ENABLE_TLS": "true",
    }
    with a_c1(tmp_path, **public) as c1:
        url = free_url()
        where = ["--c1", str(c1.base_url).rstrip("/"), "--prometheus", url, "--every", "1"]
        up = ["observe", "up", "--without-grafana", *where]
        assert main(up) == 4
        assert "hcna keys create" in capsys.readouterr().err
        assert not (tmp_path / "observe").exists()

        key = tmp_path / "key"
        key.write_text(c1.headers["Authorization"].removeprefix("Bearer "))
        try:
            assert main([*up, "--key-file", str(key)]) == 0
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as prometheus:
                eventually(
                    lambda: found(prometheus, 'up{job="hcna"} == 1'), DATA_S, "C1 is scraped"
                )
        finally:
            Observers(tmp_path / "observe").down()

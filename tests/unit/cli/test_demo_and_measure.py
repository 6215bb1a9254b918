from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from hcna_ray.cli.demo import make_file, mixed_tasks
from hcna_ray.cli.measure import Target, quantile, run_burst, time_fdatasync, time_singles
from hcna_ray.cli.terminal import CommandFailed
from tests.support.fake_c1 import API_KEY, FakeC1, Seen
from tests.unit.cli.conftest import Hcna


@pytest.fixture
def naps_are_retried(c1: FakeC1, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one task with a retry policy times out once, as on a worker."""
    settle = c1.settle

    def settle_with_a_retry(task_id: str) -> dict[str, object]:
        task = c1.tasks[task_id]
        if "demo" in task["metadata"] and not task["attempts"]:
            c1.finish(task_id, "failed", error={"kind": "timeout", "message": "too long"})
            task.update(status="queued", finished_at=None, error=None)
        return settle(task_id)

    monkeypatch.setattr(c1, "settle", settle_with_a_retry)


@pytest.mark.usefixtures("naps_are_retried")
def test_the_demo_holds_twice_in_a_row_and_shows_the_facts(hcna: Hcna, url: str) -> None:
    for _ in range(2):
        ran = hcna("demo", "--megabytes", "9")
        assert ran.code == 0, ran.out + ran.err
    assert "Hello, HCNA-3!" in ran.out
    assert f"$ curl {url}/health" in ran.out
    assert API_KEY not in ran.out
    assert "C1 had it already" in ran.out
    assert "needs worker W9 and gpu 1" in ran.out
    assert "from hcna_ray.client import Client" in ran.out.splitlines()[-1]


@pytest.mark.usefixtures("naps_are_retried")
def test_the_demo_in_json(hcna: Hcna) -> None:
    ran = hcna("demo", "--megabytes", "1", "--json")
    report = ran.json
    assert (ran.code, report["ok"]) == (0, True)
    assert len(report["tasks"]) == 20
    assert report["file"]["sha256"] == report["file"]["restored_sha256"]
    assert all(check["ok"] for check in report["checks"])


def test_a_demo_that_did_not_hold_says_which_part(hcna: Hcna, c1: FakeC1) -> None:
    ran = hcna("demo", "--megabytes", "1")
    assert ran.code == 1
    assert "sleep ends completed after 2 attempts or more" in ran.err


@pytest.mark.usefixtures("naps_are_retried")
def test_the_demo_without_curl_says_so(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    ran = hcna("demo", "--megabytes", "1")
    assert ran.code == 0
    assert "curl is not installed" in ran.out


def test_the_demo_needs_a_worker(hcna: Hcna, c1: FakeC1) -> None:
    c1.worker_state = "gone"
    ran = hcna("demo")
    assert (ran.code, "hcna workers" in ran.err) == (1, True)


def test_the_twenty_are_twenty() -> None:
    tasks = mixed_tasks("0" * 64)
    assert len(tasks) == 20
    assert len({item.request.task_type for item in tasks}) == 6


def test_the_file_is_the_same_every_time_and_compresses_by_half(tmp_path: Path) -> None:
    first = make_file(tmp_path / "a", 2)
    assert first == make_file(tmp_path / "b", 2)
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 2_000_000
    assert hashlib.sha256(content).hexdigest() == first


# -- measure ---------------------------------------------------------------------------------------


def test_measure_prints_every_figure(hcna: Hcna) -> None:
    ran = hcna("measure", "--count", "10", "--connections", "4", "--seconds", "0.2")
    assert ran.code == 0, ran.err
    for words in ("POST to completed", "accepted", "completed", "fdatasync"):
        assert words in ran.out
    figures = hcna(
        "measure", "--count", "10", "--connections", "2", "--seconds", "0.1", "--json"
    ).json
    assert figures["accepts_per_s"] > 0
    assert figures["single_count"] == 10


def test_a_refused_submit_is_counted_and_tried_again(url: str, c1: FakeC1) -> None:
    from tests.support.fake_c1 import problem

    c1.script.extend([problem(503, "overloaded"), problem(429, "quota")])
    target = Target.parse(url, API_KEY)
    burst = asyncio.run(run_burst(target, connections=1, seconds=0.1))
    assert burst.refused == 2
    assert len(burst.task_ids) == len(c1.tasks)


def test_a_refusal_ends_the_measurement(url: str) -> None:
    target = Target.parse(url, "wrong key")
    with pytest.raises(CommandFailed, match="401"):
        asyncio.run(run_burst(target, connections=3, seconds=0.5))
    with pytest.raises(CommandFailed, match="401"):
        asyncio.run(time_singles(target, count=1, warm_up=0))


def test_a_task_that_fails_is_no_figure(url: str, c1: FakeC1) -> None:
    def fail(seen: Seen) -> None:
        for task_id in c1.tasks:
            c1.finish(task_id, "failed", error={"kind": "error", "message": "x"})

    c1.after.append(fail)
    with pytest.raises(CommandFailed, match="hcna why"):
        asyncio.run(time_singles(Target.parse(url, API_KEY), count=1, warm_up=0))


def test_an_address_is_taken_apart() -> None:
    target = Target.parse("https://c1.example/base/", "k")
    assert (target.host, target.port, target.tls) == ("c1.example", 443, True)
    assert target.get("/tasks").startswith(b"GET /base/tasks HTTP/1.1\r\nHost: c1.example\r\n")


def test_quantiles_are_nearest_rank() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(n) for n in range(200)], 0.99) == 198.0


def test_the_disk_is_timed(tmp_path: Path) -> None:
    assert len(time_fdatasync(tmp_path, count=3)) == 3
    assert len(time_fdatasync(tmp_path / "absent", count=3)) == 3

"""M1 and W1 on hosts of their own, seen from outside: by Prometheus, Alertmanager, a collector.

The tests build on each other, in their order, on one cluster. ``make observed`` runs them alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from queue import Queue
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hcna_ray.client import Client
from hcna_ray.core.models import Token
from hcna_ray.core.tracing import attempt_span_id
from tests.monitoring.test_rules import a_webhook
from tests.rig.computer import HCNA, HOME, Computer, eventually, measured
from tests.support.otlp import Collector, SeenSpan
from tests.support.promql import found, wanted
from tests.support.rig.door import Door, network_of
from tests.support.rig.testing import rig_for_tests
from tests.support.workshop import install_handlers

pytestmark = [pytest.mark.drill, pytest.mark.timeout(540)]

C1, PROMETHEUS, COLLECTOR, WEBHOOK = 8080, 9090, 4318, 9099
#: What is added to the environment of all that runs on a host: task types of the tests, and a line
#: for each answer of C1.
ENVIRONMENT = {
    "PYTHONPATH": "/root/site:/root/hcna-ray",
    "HCNA_RIG": "/root/rig",
    "HCNA_LOG": "info,hcna_ray.api.access=debug",
}
TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NAME = "nightly:7@laptop"
ON_W1 = {"requires": {"worker": "W1"}}
LOAD_S, PER_SECOND, DATA_S = 120.0, 4, 60.0
#: What is submitted in turn: some of it fails, is tried again, runs out of time, or waits.
KINDS: tuple[dict[str, Any], ...] = (
    {"task_type": "echo", "payload": {"message": "hello"}},
    {"task_type": "test.ping", "payload": {}, "queue": "side"},
    {"task_type": "sleep", "payload": {"seconds": 0.3}},
    {"task_type": "rig.read", "payload": {"artifact": "0" * 64}, "retry": {"max_attempts": 2}},
    {"task_type": "echo", "payload": {}, "queue": "night"},
    {"task_type": "sleep", "payload": {"seconds": 5}, "timeout_s": 0.5},
    {"task_type": "rig.traced", "payload": {}, "priority": 9},
    {"task_type": "echo", "payload": {}, "requires": {"cpu": 0.1}},
)


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    base = tmp_path_factory.mktemp("rigs").resolve()
    with rig_for_tests(("m1", "w1", "client"), base=base) as rig:
        made, w1 = Computer(rig), rig["w1"]
        for host in (made.m1, w1):
            install_handlers(host.file("/root/site"))
            host.file("/root/rig").mkdir()
        collector = {"endpoint": f"http://{rig['client'].address}:{COLLECTOR}"}
        own = {"tracing": collector, "moderator": {"local_worker": "never"}}
        made.m1.write(f"{HOME}/hcna.yaml", json.dumps(own))
        made.m1.sh(f"{HCNA} up --wait 240", env=ENVIRONMENT, timeout_s=270)
        w1.sh(f"{HCNA} join {made.invite()} --wait 120", env=ENVIRONMENT, timeout_s=150)
        made.install_services("w1", ENVIRONMENT)
        made.hcna("w1", "down")
        made.systemctl("w1", "enable --now hcna-w1")
        eventually(lambda: made.state_of("W1") == "online", 90, "W1 online")
        yield made
        made.hcna("m1", "down")


@pytest.fixture(scope="module")
def c1(computer: Computer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {computer.key}"}
    with (
        Door(computer.m1, C1) as door,
        httpx.Client(base_url=door.url, headers=headers, timeout=30, trust_env=False) as http,
    ):
        yield http


# -- traces and lines ------------------------------------------------------------------------------


def of_task(spans: list[SeenSpan], task_id: str) -> list[SeenSpan]:
    """Return the spans that name a task, in the order of its way."""
    mine = [one for one in spans if one.attributes.get("messaging.message.id") == task_id]
    return sorted(mine, key=lambda one: one.start_ns)


def test_one_trace_from_the_caller_over_both_hosts_while_the_collector_is_away(
    computer: Computer, c1: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, own = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(own))
    program = provider.get_tracer("program")
    monkeypatch.setattr(trace, "get_tracer", lambda _name: program)
    with (
        Client(str(c1.base_url).rstrip("/"), computer.key) as client,
        program.start_as_current_span("main") as main,
    ):
        first = client.submit("rig.traced", {}, requires={"worker": "W1"}).id
    asked = {"traceparent": f"00-{TRACE}-{CALLER_SPAN}-01", "X-Request-ID": NAME}
    reply = c1.post("/tasks", json={"task_type": "rig.traced", **ON_W1}, headers=asked)
    second = str(reply.json()["task_id"])
    others = [computer.submit("echo", {"number": number}) for number in range(20)]
    for one in (first, second, *others):
        computer.completed(one)
    for host in ("m1", "w1"):  # Both have tried to ship, and nobody was there.
        eventually(
            lambda host=host: [
                line
                for line in computer.log(host, "supervisor.log")
                if line.get("action") == "traces.waiting"
            ],
            30,
            f"{host} waits for the collector",
        )

    # Now there is one.
    with network_of(computer.rig["client"]):
        collector = Collector(COLLECTOR, "0.0.0.0")
    try:
        begun = time.monotonic()
        every = {first, second, *others}
        collector.wait_for(
            lambda spans: (
                all(len(of_task(spans, one)) >= 3 for one in every)
                and sum(one.name == "a step" for one in spans) >= 2
            ),
            60,
        )
        shipped_s = time.monotonic() - begun
    finally:
        collector.close()

    (sent,) = (one for one in own.get_finished_spans() if one.name == "POST /tasks")
    assert sent.parent is not None
    assert sent.parent.span_id == main.get_span_context().span_id
    callers = {
        first: (f"{sent.context.trace_id:032x}", f"{sent.context.span_id:016x}"),
        second: (TRACE, CALLER_SPAN),
    }
    for task_id, (trace_id, span_id) in callers.items():
        accepted, waited, ran = of_task(collector.spans, task_id)
        (step,) = (one for one in collector.spans if one.parent_id == ran.span_id)
        chain = (accepted, waited, ran, step)
        assert [one.name for one in chain] == [
            "POST /tasks",
            "wait default",
            "run rig.traced",
            "a step",
        ]
        assert {one.trace_id for one in chain} == {trace_id}
        assert accepted.parent_id == span_id
        assert waited.parent_id == ran.parent_id == accepted.span_id
        (attempt,) = computer.task(task_id)["attempts"]
        assert ran.span_id == attempt_span_id(task_id, Token(attempt["generation"], 1))
        assert [one.resource["host.name"] for one in chain] == [
            "hcna-m1",
            "hcna-m1",
            "hcna-w1",
            "hcna-w1",
        ]
    for task_id in others:
        assert [one.name for one in of_task(collector.spans, task_id)] == [
            "POST /tasks",
            "wait default",
            "run echo",
        ]
    ids = {(one.trace_id, one.span_id) for one in collector.spans}
    measured(
        f"traces: {len(ids)} spans of {len(every)} tasks, made while the collector was away, were "
        f"all there {shipped_s:.1f} s after it had come"
    )


def test_lines_of_both_hosts_are_joined_by_ids_that_the_caller_has(
    computer: Computer, c1: httpx.Client
) -> None:
    asked = {"traceparent": f"00-{TRACE}-{CALLER_SPAN}-01", "X-Request-ID": NAME}
    reply = c1.post("/tasks", json={"task_type": "rig.traced", **ON_W1}, headers=asked)
    task_id = reply.json()["task_id"]
    computer.completed(task_id)
    assert reply.headers.get_list("x-request-id") == [NAME]

    (answered,) = (
        line
        for line in computer.log("m1", "composite.log")
        if line.get("action") == "api.answered"
        and line["route"] == "/tasks"
        and line.get("task_id") == task_id
    )
    assert (answered["request_id"], answered["trace_id"]) == (NAME, TRACE)
    assert answered["node"] == "C1"
    stepped, _ = eventually(
        lambda: [
            line
            for line in computer.log("w1", "worker.log")
            if line.get("action") == "rig.step" and line["task_id"] == task_id
        ],
        10,
        "the handler's line",
    )
    (line,) = stepped
    assert (line["attempt"], line["trace_id"]) == (1, TRACE)
    assert line["node"] == "W1"

    # What is no name is not taken over, by nobody on the way; and no answer is without one.
    for bad in ([], ["two words"], ["x" * 129], ["a", "a"]):
        names = c1.get("/live", headers=[("X-Request-ID", one) for one in bad]).headers.get_list(
            "x-request-id"
        )
        assert len(names) == 1
        assert names[0] not in bad
    refused = c1.get("/tasks/nobody", headers={"X-Request-ID": NAME})
    assert refused.json()["request_id"] == NAME


# -- Prometheus and Alertmanager -------------------------------------------------------------------


@pytest.fixture(scope="module")
def watching(computer: Computer) -> Iterator[tuple[httpx.Client, Queue[dict[str, Any]]]]:
    """Prometheus and Alertmanager on M1, as people start them, and what the webhook is told."""
    with ExitStack() as stack:
        with network_of(computer.m1):
            webhook, told = stack.enter_context(a_webhook(WEBHOOK))
        computer.hcna("m1", f"observe up --without-grafana --webhook {webhook} --every 2")
        stack.callback(computer.hcna, "m1", "observe down")
        door = stack.enter_context(Door(computer.m1, PROMETHEUS))
        yield (
            stack.enter_context(httpx.Client(base_url=door.url, timeout=30, trust_env=False)),
            told,
        )


def test_promtool_finds_nothing_wrong_with_what_is_written(computer: Computer) -> None:
    computer.hcna("m1", "observe files /root/monitoring")
    said = computer.m1.run("promtool", "check", "config", "/root/monitoring/prometheus.yml").out
    assert "SUCCESS" in said
    written = computer.m1.read("/root/monitoring/prometheus.yml")
    assert written.count("http_sd_configs") == 2
    assert "http://127.0.0.1:8080/metrics/targets?job=ray" in written


def test_every_query_finds_data_after_two_minutes_of_load(
    computer: Computer, c1: httpx.Client, watching: tuple[httpx.Client, Queue[dict[str, Any]]]
) -> None:
    prometheus, _ = watching
    assert c1.post("/admin/queues/night/pause").status_code == 200
    asked = wanted()
    assert len(asked) > 80
    submitted = 0

    def work(seconds: float) -> None:
        nonlocal submitted
        begun, before = time.monotonic(), submitted
        while (gone := time.monotonic() - begun) < seconds:
            for _ in range(int(gone * PER_SECOND) + 1 - (submitted - before)):
                body = KINDS[submitted % len(KINDS)]
                reply = c1.post("/tasks", json={"retry": {"max_attempts": 1}, **body})
                assert reply.status_code == 202, reply.text
                submitted += 1
            time.sleep(0.1)

    def missing() -> dict[str, str]:
        return {where: expr for where, expr in asked.items() if not found(prometheus, expr)}

    work(LOAD_S)
    without = missing()
    end = time.monotonic() + DATA_S
    while without and time.monotonic() < end:
        work(2.0)
        without = missing()

    (group,) = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    targets = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
    down = {
        (one["labels"]["node"], one["labels"]["exporter"])
        for one in targets
        if one["health"] != "up"
    }
    counts = c1.get("/status").json()["totals"]
    measured(
        f"Prometheus on M1, {LOAD_S:.0f} s under load, {submitted} tasks of {len(KINDS)} kinds: "
        f"{len(asked) - len(without)} of {len(asked)} queries find data; {len(group['rules'])} "
        f"rules evaluated; {len(targets) - len(down)} of {len(targets)} targets up"
    )
    measured(f"without data: {sorted(without) or 'none'}; down: {sorted(down) or 'none'}")
    assert without == {}
    assert {one["health"] for one in group["rules"]} == {"ok"}, json.dumps(group)
    # The rules for ports let nobody elsewhere read Ray's own page of a worker.
    assert down == {("W1", "node")}
    assert counts["failed"] > 10, counts


def test_the_alert_of_a_stopped_worker_and_its_end_reach_the_webhook(
    computer: Computer, watching: tuple[httpx.Client, Queue[dict[str, Any]]]
) -> None:
    _, told = watching

    def until_told(status: str) -> float:
        """Wait for a word on W1 in particular; return how long it took."""
        begun = time.monotonic()
        while True:
            for alert in told.get(timeout=200)["alerts"]:
                labels = (alert["labels"]["alertname"], alert["labels"].get("worker"))
                if (*labels, alert["status"]) == ("HcnaWorkerDown", "W1", status):
                    assert alert["annotations"]["summary"].startswith("Worker W1 is silent")
                    return time.monotonic() - begun

    computer.systemctl("w1", "stop hcna-w1")
    fired_s = until_told("firing")
    computer.systemctl("w1", "start hcna-w1")
    computer.works("W1", 90)
    resolved_s = until_told("resolved")
    measured(
        f"W1's service stopped: the webhook was told after {fired_s:.0f} s, and of the end "
        f"{resolved_s:.0f} s after it worked again"
    )

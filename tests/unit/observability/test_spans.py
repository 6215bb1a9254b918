"""Spans from OpenTelemetry's SDK into the spool: names, parents, ids, bounds."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hcna_ray.config import Settings, TracingSettings
from hcna_ray.core.models import Token
from hcna_ray.core.tracing import attempt_span_id, parse_traceparent
from hcna_ray.observability import spans as spans_module
from hcna_ray.observability.spans import SpoolWriter, Traces
from hcna_ray.observability.spool import Spool
from hcna_ray.observability.traces import Ran, TracesPlan, Waited, open_traces
from tests.support.otlp import spooled

TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{CLIENT_SPAN}-01"
UNSAMPLED = f"00-{TRACE}-{CLIENT_SPAN}-00"


@pytest.fixture(autouse=True)
def no_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the tests may be slow."""
    monkeypatch.setattr(spans_module, "CLOSE_S", 60.0)


def plan_of(home: Path, ratio: float = 1.0) -> TracesPlan:
    tracing = TracingSettings(endpoint="http://127.0.0.1:4318", sample_ratio=ratio)
    plan = TracesPlan.of(Settings(home=home, tracing=tracing), "hcna-c1", "HCNA-C1--test")
    assert plan is not None
    return TracesPlan.from_json(plan.to_json())


def traces_in(home: Path, ratio: float = 1.0) -> Traces:
    traces = open_traces(plan_of(home, ratio))
    assert traces is not None
    traces.start()
    return traces


def test_without_a_collector_there_is_nothing(tmp_path: Path) -> None:
    assert TracesPlan.of(Settings(home=tmp_path), "hcna-c1", "C1") is None
    assert open_traces(None) is None


def test_what_cannot_be_made_keeps_no_process_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hcna_ray.observability.spans", None)
    with caplog.at_level(logging.ERROR, logger="hcna_ray"):
        assert open_traces(plan_of(tmp_path)) is None

    assert [one.action for one in caplog.records] == ["traces.failed"]  # type: ignore[attr-defined]


def test_without_a_collector_nothing_of_opentelemetry_is_imported() -> None:
    """What handlers and the moderator run in; C1's framework brings its interface along."""
    code = (
        "import sys\n"
        "import hcna_ray.runtime.executor, hcna_ray.runtime.moderator, hcna_ray.client\n"
        "import hcna_ray.runtime.host, hcna_ray.supervisor.tracing\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_request_is_the_parent_of_what_follows(tmp_path: Path) -> None:
    traces = traces_in(tmp_path)
    request = traces.request("POST", "/tasks", SAMPLED)
    request.set({"messaging.message.id": "t1"})
    request.end(202)
    kept = request.traceparent
    assert kept is not None
    traces.tell([Waited("t1", "echo", "default", kept, 10.0, 12.5, 1, "W1")])
    attempt = traces.attempt("t1", "echo", Token(1, 1), kept, "W1", 12.5)
    child = trace.get_tracer("handler", tracer_provider=traces.provider).start_span("own")
    child.end()
    attempt.end("completed", "", 13.0)
    traces.close()

    found = {one.name: one for one in spooled(tmp_path / "traces")}
    first, waited, ran, own = (
        found[name] for name in ("POST /tasks", "wait default", "run echo", "own")
    )
    assert {one.trace_id for one in found.values()} == {TRACE}
    assert (first.parent_id, first.kind) == (CLIENT_SPAN, "server")
    assert (waited.parent_id, waited.kind) == (first.span_id, "internal")
    assert (ran.parent_id, ran.kind) == (first.span_id, "consumer")
    assert own.parent_id == ran.span_id == attempt_span_id("t1", Token(1, 1))
    assert (waited.start_ns, waited.end_ns) == (10_000_000_000, 12_500_000_000)
    assert (ran.start_ns, ran.end_ns) == (12_500_000_000, 13_000_000_000)
    assert first.attributes["http.response.status_code"] == 202
    assert ran.attributes["messaging.message.id"] == "t1"
    assert ran.attributes["hcna.outcome"] == "completed"
    assert waited.attributes["messaging.destination.name"] == "default"
    assert {one.resource["service.instance.id"] for one in found.values()} == {"HCNA-C1--test"}
    assert not any(one.failed for one in found.values())
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_what_has_ended_otherwise_says_how_and_no_more(tmp_path: Path) -> None:
    traces = traces_in(tmp_path)
    traces.request("POST", "/tasks", SAMPLED).end(503)
    traces.tell(
        [
            Waited("t1", "echo", "q", SAMPLED, 10.0, 9.0, 0, "", ended="expired"),
            Ran("t2", "echo", SAMPLED, Token(3, 2), "W1", 5.0, 6.0, "lost", "poison"),
        ]
    )
    traces.close()

    request, waited, ran = spooled(tmp_path / "traces")
    assert (request.failed, request.attributes["error.type"]) == (True, "503")
    assert (waited.failed, waited.attributes["hcna.outcome"]) == (False, "expired")
    assert waited.start_ns == waited.end_ns
    assert (ran.failed, ran.attributes["error.type"]) == (True, "poison")
    assert ran.span_id == attempt_span_id("t2", Token(3, 2))
    assert ran.attributes["hcna.attempt"] == 2


def test_the_clients_word_on_sampling_counts_and_else_the_ratio(tmp_path: Path) -> None:
    traces = traces_in(tmp_path, ratio=0.0)
    unsampled = traces.request("POST", "/tasks", UNSAMPLED)
    begun_here = traces.request("POST", "/tasks", None)
    sampled = traces.request("POST", "/tasks", SAMPLED)
    for one in (unsampled, begun_here, sampled):
        one.end(202)
    traces.close()

    said = [parse_traceparent(one.traceparent) for one in (unsampled, begun_here, sampled)]
    assert [one.sampled for one in said if one] == [False, False, True]
    assert said[0] is not None
    assert said[0].trace_id == TRACE
    assert len(spooled(tmp_path / "traces")) == 1


def test_a_trace_begins_at_c1_if_the_client_has_none(tmp_path: Path) -> None:
    traces = traces_in(tmp_path)
    ids = set()
    for _ in range(2):
        request = traces.request("POST", "/tasks", None)
        request.end(202)
        found = parse_traceparent(request.traceparent)
        assert found is not None
        assert found.sampled
        ids.add(found.trace_id)
    traces.close()

    assert {one.trace_id for one in spooled(tmp_path / "traces")} == ids
    assert len(ids) == 2


def test_with_the_sdk_disabled_there_is_no_span_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    traces = traces_in(tmp_path)
    request = traces.request("POST", "/tasks", None)
    request.end(202)
    traces.close()

    assert request.traceparent is None
    assert not (tmp_path / "traces").exists()


def test_what_a_handler_writes_into_its_span_is_cut(tmp_path: Path) -> None:
    traces = traces_in(tmp_path)
    span = traces.provider.get_tracer("handler").start_span("own")
    span.set_attribute("huge", "x" * 100_000)
    for number in range(100):
        span.add_event(f"event {number}")
    span.end()
    traces.close()

    (found,) = spooled(tmp_path / "traces")
    assert len(found.attributes["huge"]) == 4096
    assert sum(one.stat().st_size for one in (tmp_path / "traces").iterdir()) < 10_000


def test_a_task_type_that_brought_its_own_provider_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[trace.TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", chosen.append)
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    traces = traces_in(tmp_path)
    traces.offer_to_handlers()
    assert chosen == [traces.provider]

    # Its spans go its own way, below the attempt's.
    memory = InMemorySpanExporter()
    theirs = TracerProvider(shutdown_on_exit=False)
    theirs.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: theirs)
    traces.offer_to_handlers()
    assert chosen == [traces.provider]
    attempt = traces.attempt("t1", "echo", Token(1, 1), SAMPLED, "W1", 1.0)
    trace.get_tracer("handler").start_span("own").end()
    attempt.end("completed", "", 2.0)
    (own,) = memory.get_finished_spans()
    assert own.parent is not None
    assert f"{own.parent.span_id:016x}" == attempt_span_id("t1", Token(1, 1))


def test_what_comes_faster_than_it_is_written_is_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spans_module, "QUEUE_MAX", 3)
    traces = open_traces(plan_of(tmp_path))
    assert traces is not None
    for _ in range(5):
        traces.request("POST", "/tasks", SAMPLED).end(202)
    with caplog.at_level(logging.ERROR, logger="hcna_ray"):
        traces.start()
        traces.close()

    assert len(spooled(tmp_path / "traces")) == 3
    assert "2 spans came faster" in caplog.text


def test_a_disk_that_takes_nothing_costs_the_spans_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "traces").write_text("not a folder")
    traces = traces_in(tmp_path)
    with caplog.at_level(logging.ERROR, logger="hcna_ray"):
        traces.request("POST", "/tasks", SAMPLED).end(202)
        traces.close()
        traces.request("POST", "/tasks", SAMPLED).end(202)
        traces.close()

    assert [one.action for one in caplog.records] == ["traces.lost"]  # type: ignore[attr-defined]


def test_a_note_that_cannot_be_told_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    traces = traces_in(tmp_path)
    with caplog.at_level(logging.ERROR, logger="hcna_ray"):
        traces.writer.take(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        traces.request("POST", "/tasks", SAMPLED).end(202)
        traces.close()

    assert len(spooled(tmp_path / "traces")) == 1
    assert [one.action for one in caplog.records] == ["traces.failed"]  # type: ignore[attr-defined]


def test_many_spans_are_written_in_files_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans_module, "BATCH_MAX", 10)
    sizes: list[int] = []

    def encode(ended: list[ReadableSpan]) -> bytes:
        sizes.append(len(ended))
        return b""

    writer = SpoolWriter(Spool(tmp_path, 1 << 20), encode)
    assert writer.force_flush()  # Before there is a thread: nothing to wait for.
    traces = open_traces(plan_of(tmp_path))
    assert traces is not None
    traces.provider.add_span_processor(writer)
    for _ in range(25):
        traces.request("POST", "/tasks", SAMPLED).end(202)
    writer.start()
    assert writer.force_flush()

    assert sizes == [10, 10, 5]

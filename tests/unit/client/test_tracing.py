"""The caller's trace goes along with what it submits, if it has one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hcna_ray.client import AsyncClient, Client
from hcna_ray.client.tracing import client_span

SUBMITTED = {"task_id": "t1", "status": "queued", "message": "Task submitted"}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """A program that has configured OpenTelemetry."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    yield exporter
    provider.shutdown()


class PaperC1(httpx.MockTransport):
    """Takes every task, or answers as told."""

    def __init__(self, status: int = 202) -> None:
        self.seen: list[httpx.Request] = []

        def answer(request: httpx.Request) -> httpx.Response:
            self.seen.append(request)
            return httpx.Response(status, json=SUBMITTED)

        super().__init__(answer)

    @property
    def traceparents(self) -> list[str | None]:
        return [one.headers.get("traceparent") for one in self.seen]


def a_client(c1: PaperC1) -> Client:
    return Client("http://c1.test", "hcna_k", transport=c1, retry_for_s=0.0)


def test_a_submit_is_a_span_below_the_callers(memory: InMemorySpanExporter) -> None:
    c1 = PaperC1()
    with trace.get_tracer("program").start_as_current_span("main") as main, a_client(c1) as client:
        client.submit("echo", {})
    sent, _ = memory.get_finished_spans()

    assert sent.parent == main.get_span_context()
    assert (sent.name, sent.kind) == ("POST /tasks", SpanKind.CLIENT)
    assert sent.attributes is not None
    assert sent.attributes["http.response.status_code"] == 202
    assert c1.traceparents == [
        f"00-{sent.context.trace_id:032x}-{sent.context.span_id:016x}"
        f"-{sent.context.trace_flags:02x}"
    ]


async def test_so_it_is_with_the_asynchronous_client(memory: InMemorySpanExporter) -> None:
    c1 = PaperC1()
    async with AsyncClient("http://c1.test", "hcna_k", transport=c1, retry_for_s=0.0) as client:
        await client.submit("echo", {})
    (sent,) = memory.get_finished_spans()

    assert c1.traceparents[0] is not None
    assert f"{sent.context.span_id:016x}" in c1.traceparents[0]


def test_a_refusal_is_a_failed_span(memory: InMemorySpanExporter) -> None:
    c1 = PaperC1(422)
    with a_client(c1) as client, pytest.raises(Exception, match="422"):
        client.submit("echo", {})
    (sent,) = memory.get_finished_spans()

    assert sent.status.status_code is StatusCode.ERROR
    assert sent.attributes is not None
    assert sent.attributes["error.type"] == "422"


def test_a_program_without_a_provider_passes_its_own_context_on() -> None:
    """Nothing records here: what the program got from its own caller goes through."""
    remote = trace.SpanContext(
        0x4BF92F3577B34DA6A3CE929D0E0E4736, 0xF067AA0BA902B7, True, trace.TraceFlags(1)
    )
    c1 = PaperC1()
    with trace.use_span(trace.NonRecordingSpan(remote)), a_client(c1) as client:
        client.submit("echo", {})
    with a_client(c1) as client:
        client.submit("echo", {})

    assert c1.traceparents == ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None]


def test_what_hands_over_no_work_carries_nothing(memory: InMemorySpanExporter) -> None:
    for method, path in (("GET", "/tasks"), ("POST", "/tasks/wait")):
        with client_span(method, path) as (headers, answered):
            answered(200)
            assert headers == {}

    assert memory.get_finished_spans() == ()


def test_a_program_without_opentelemetry_stays_without() -> None:
    code = (
        "import sys\n"
        "from hcna_ray.client.tracing import client_span\n"
        "with client_span('POST', '/tasks') as (headers, _):\n"
        "    print(headers, 'opentelemetry' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["{}", "False"]

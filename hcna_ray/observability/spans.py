"""Spans made with OpenTelemetry and written to the spool. Imported only where traces are on.

OpenTelemetry's own way out, a batch processor in every process, loses what a process holds that is
forked, killed or left by ``os._exit``, which is how handlers live and end here; and a collector
that is away holds up its end. So a thread of this process writes to the spool, every fifth of a
second, and the machine's supervisor ships from there.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    ProxyTracerProvider,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from hcna_ray.core.models import Token
from hcna_ray.core.tracing import attempt_span_id, parse_traceparent
from hcna_ray.observability.spool import Spool, time_ns
from hcna_ray.observability.traces import Ran, TracesPlan, Waited

log = logging.getLogger(__name__)

#: Spans, and notes of the moderator, that wait for the thread; what comes beyond is dropped.
QUEUE_MAX = 20_000
#: Most spans in one file.
BATCH_MAX = 2_000
#: Spans that end within this time of each other go into one file.
GATHER_S = 0.2
#: How long the end of a process waits for its last spans to be written.
CLOSE_S = 2.0
#: What a handler may put into one value of an attribute; the rest is cut off.
VALUE_CHARS_MAX = 4096
#: Events and links of one span, and attributes of each.
EVENTS_MAX = 32

SYSTEM = "hcna"


class _Ids(RandomIdGenerator):
    """Random ids, but for the next span of this thread if one was chosen."""

    def __init__(self) -> None:
        self._chosen = threading.local()

    def choose(self, span_id: str) -> None:
        self._chosen.span_id = int(span_id, 16)

    def generate_span_id(self) -> int:
        span_id: int = getattr(self._chosen, "span_id", 0)
        self._chosen.span_id = 0
        return span_id or super().generate_span_id()


class SpoolWriter(SpanProcessor):
    """Takes ended spans from any thread and writes them from one of its own.

    Taking is one ``put`` of a queue made for that: a signal that interrupts a handler at any point
    leaves no lock behind.
    """

    def __init__(self, spool: Spool, encode: Callable[[list[ReadableSpan]], bytes]) -> None:
        """Prepare; `start` begins the thread, in the process that ends the spans.

        Args:
            spool: Where they go.
            encode: Makes an ``ExportTraceServiceRequest`` of them.
        """
        self._spool, self._encode = spool, encode
        self._inbox: queue.SimpleQueue[ReadableSpan | Callable[[], None] | threading.Event] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._ended: list[ReadableSpan] = []
        self._trouble = ""
        #: Not taken because the thread fell behind.
        self.dropped = 0

    def start(self) -> None:
        """Begin to write. After a fork each child does so for itself."""
        self._thread = threading.Thread(target=self._loop, name="hcna-spans", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span (OpenTelemetry calls this)."""
        if threading.current_thread() is self._thread:
            self._ended.append(span)
        else:
            self.take(span)

    def take(self, item: ReadableSpan | Callable[[], None]) -> None:
        """Take a span, or what makes some; never waits."""
        if self._inbox.qsize() < QUEUE_MAX:
            self._inbox.put(item)
        else:
            self.dropped += 1

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Have everything that has ended written; return whether it was in time."""
        if self._thread is None:
            return True
        done = threading.Event()
        self._inbox.put(done)
        return done.wait(timeout_millis / 1000)

    def _loop(self) -> None:
        while True:
            flushed = self._gather()
            self._write()
            if flushed is not None:
                flushed.set()

    def _gather(self) -> threading.Event | None:
        """Collect for one file; return at once with the event of whoever waits for it."""
        item = self._inbox.get()
        end = time.monotonic() + GATHER_S
        while True:
            if isinstance(item, threading.Event):
                return item
            self._keep(item)
            if len(self._ended) >= BATCH_MAX:
                return None
            try:
                item = self._inbox.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None

    def _keep(self, item: ReadableSpan | Callable[[], None]) -> None:
        if isinstance(item, ReadableSpan):
            self._ended.append(item)
            return
        try:
            item()
        except Exception:
            log.exception("a span could not be made", extra={"action": "traces.failed"})

    def _write(self) -> None:
        ended, self._ended = self._ended, []
        if not ended:
            return
        try:
            self._spool.put(self._encode(ended))
            trouble = ""
        except Exception as error:  # Whatever a handler put into its span; or a full disk.
            trouble = f"{type(error).__name__}: {error}"
        if self.dropped:
            trouble = trouble or f"{self.dropped} spans came faster than they could be written"
            self.dropped = 0
        if trouble and trouble != self._trouble:
            log.error(
                "spans were lost: %s",
                trouble,
                extra={"action": "traces.lost", "spans": len(ended)},
            )
        self._trouble = trouble


class RequestSpan:
    """C1's span of one request."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.traceparent = _traceparent_of(span)

    def set(self, attributes: Mapping[str, str | int]) -> None:
        """Add what became known."""
        self._span.set_attributes(attributes)

    def end(self, status: int) -> None:
        """The answer is made."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class AttemptSpan:
    """The span of an attempt that runs in this process; OpenTelemetry's current one meanwhile."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.traceparent = _traceparent_of(span)
        #: Whether there will be anything to write.
        self.recorded = span.is_recording()
        self._attached = otel_context.attach(trace.set_span_in_context(span))

    def end(self, outcome: str, error_type: str, at: float) -> None:
        """The attempt has ended."""
        otel_context.detach(self._attached)
        _close(self._span, outcome, error_type, at)


class Traces:
    """Makes a process's spans. Invariant: whoever asks for one waits for no disk and no network."""

    def __init__(self, plan: TracesPlan) -> None:
        """Prepare; `start` begins to write."""
        self._ids = _Ids()
        self.writer = SpoolWriter(Spool(plan.folder, plan.bytes_max), _encode)
        self.provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(plan.sample_ratio)),
            # Not `Resource.create`: that looks for plug-ins, in threads, at every start.
            resource=Resource(plan.resource()),
            shutdown_on_exit=False,
            id_generator=self._ids,
            span_limits=SpanLimits(
                max_span_attribute_length=VALUE_CHARS_MAX,
                max_attribute_length=VALUE_CHARS_MAX,
                max_events=EVENTS_MAX,
                max_links=EVENTS_MAX,
                max_event_attributes=EVENTS_MAX,
                max_link_attributes=EVENTS_MAX,
            ),
        )
        self.provider.add_span_processor(self.writer)
        self._tracer = self.provider.get_tracer("hcna_ray")

    def start(self) -> None:
        """Begin to write, in this process; after a fork in each child for itself."""
        self.writer.start()

    def close(self) -> None:
        """Have what has ended written, if that goes quickly."""
        self.writer.force_flush(int(CLOSE_S * 1000))

    def offer_to_handlers(self) -> None:
        """Have the spans of handlers go the same way, unless a task type has brought its own."""
        if isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
            trace.set_tracer_provider(self.provider)

    # -- C1 --------------------------------------------------------------------------------------

    def request(self, method: str, route: str, traceparent: str | None) -> RequestSpan:
        """Begin the span of a request that hands over work.

        Args:
            method: HTTP method.
            route: Template of its path.
            traceparent: The client's, checked; without one a trace begins here.
        """
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "messaging.system": SYSTEM,
            "messaging.operation.name": "submit",
            "messaging.operation.type": "send",
        }
        return RequestSpan(
            self._tracer.start_span(
                f"{method} {route}",
                context=_context_of(traceparent),
                kind=SpanKind.SERVER,
                attributes=attributes,
            )
        )

    # -- the moderator ---------------------------------------------------------------------------

    def tell(self, notes: Iterable[Waited | Ran]) -> None:
        """Make spans of what is over, on the writer's thread."""
        self.writer.take(lambda: self._tell(notes))

    def _tell(self, notes: Iterable[Waited | Ran]) -> None:
        for note in notes:
            if isinstance(note, Waited):
                self._tell_waited(note)
            else:
                self._tell_ran(note)

    def _tell_waited(self, note: Waited) -> None:
        attributes: dict[str, str | int] = {
            "messaging.system": SYSTEM,
            "messaging.operation.name": "wait",
            "messaging.destination.name": note.queue,
            "messaging.message.id": note.task_id,
            "hcna.task.type": note.task_type,
        }
        if note.attempt:
            attributes |= {"hcna.attempt": note.attempt, "hcna.worker": note.worker}
        span = self._tracer.start_span(
            f"wait {note.queue}",
            context=_context_of(note.traceparent),
            kind=SpanKind.INTERNAL,
            attributes=attributes,
            start_time=time_ns(note.since),
        )
        if note.ended:
            span.set_attribute("hcna.outcome", note.ended)
        span.end(time_ns(max(note.until, note.since)))

    def _tell_ran(self, note: Ran) -> None:
        span = self._start_attempt(
            note.task_id, note.task_type, note.token, note.traceparent, note.worker, note.since
        )
        _close(span, note.outcome, note.error_type, max(note.until, note.since))

    # -- workers ---------------------------------------------------------------------------------

    def attempt(
        self,
        task_id: str,
        task_type: str,
        token: Token,
        traceparent: str,
        worker: str,
        at: float,
    ) -> AttemptSpan:
        """Begin the span of an attempt, and make it the current one of this thread."""
        return AttemptSpan(self._start_attempt(task_id, task_type, token, traceparent, worker, at))

    def _start_attempt(
        self,
        task_id: str,
        task_type: str,
        token: Token,
        traceparent: str,
        worker: str,
        at: float,
    ) -> Span:
        self._ids.choose(attempt_span_id(task_id, token))
        return self._tracer.start_span(
            f"run {task_type}",
            context=_context_of(traceparent),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": SYSTEM,
                "messaging.operation.name": "run",
                "messaging.operation.type": "process",
                "messaging.message.id": task_id,
                "hcna.task.type": task_type,
                "hcna.attempt": token.attempt,
                "hcna.generation": token.generation,
                "hcna.worker": worker,
            },
            start_time=time_ns(at),
        )


def _close(span: Span, outcome: str, error_type: str, at: float) -> None:
    span.set_attribute("hcna.outcome", outcome)
    if error_type:
        span.set_attribute("error.type", error_type)
        span.set_status(Status(StatusCode.ERROR))
    span.end(time_ns(at))


def _encode(spans: list[ReadableSpan]) -> bytes:
    raw: bytes = encode_spans(spans).SerializeToString()
    return raw


def _context_of(traceparent: str | None) -> otel_context.Context:
    """Return a context with nothing in it but the span that a ``traceparent`` names."""
    found = parse_traceparent(traceparent)
    if found is None:
        return otel_context.Context()
    flags = TraceFlags(TraceFlags.SAMPLED if found.sampled else TraceFlags.DEFAULT)
    remote = SpanContext(
        int(found.trace_id, 16), int(found.span_id, 16), is_remote=True, trace_flags=flags
    )
    return trace.set_span_in_context(NonRecordingSpan(remote), otel_context.Context())


def _traceparent_of(span: Span) -> str | None:
    named = span.get_span_context()
    if not named.is_valid:  # OTEL_SDK_DISABLED is set.
        return None
    return f"00-{named.trace_id:032x}-{named.span_id:016x}-{named.trace_flags:02x}"

"""The caller's trace goes along with what it submits, if it uses OpenTelemetry.

Nothing is imported for this: a program without OpenTelemetry has no current span. One that has
none configured, or is in no trace, sends nothing either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_SUBMITTING = frozenset({"/tasks", "/tasks/batch"})


#: Headers to send, and what takes the status of the answer.
ClientSpan = tuple[Mapping[str, str], Callable[[int], None]]


@contextmanager
def client_span(method: str, path: str) -> Iterator[ClientSpan]:
    """Have a span around a request that hands over work.

    Args:
        method: HTTP method.
        path: Path of the request.
    """
    if "opentelemetry.trace" not in sys.modules or method != "POST" or path not in _SUBMITTING:
        yield {}, _nobody
        return
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    attributes = {
        "http.request.method": method,
        "url.path": path,
        "messaging.system": "hcna",
        "messaging.operation.name": "submit",
        "messaging.operation.type": "send",
    }
    # Whether it is recorded says the program's own provider; without one it is the caller's span.
    tracer = trace.get_tracer("hcna_ray.client")
    kind = trace.SpanKind.CLIENT
    with tracer.start_as_current_span(f"{method} {path}", kind=kind, attributes=attributes) as span:
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers)

        def answered(status: int) -> None:
            span.set_attribute("http.response.status_code", status)
            if status >= 400:
                span.set_attribute("error.type", str(status))
                span.set_status(trace.Status(trace.StatusCode.ERROR))

        yield headers, answered


def _nobody(_status: int) -> None:
    """Nobody wants to know."""

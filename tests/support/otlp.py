"""A collector for tests: takes OTLP over HTTP, decodes it, and remembers the spans.

``python otlp.py HOST PORT FILE`` serves until it is ended and writes each span as a line of JSON.
Needs nothing of this repository, so that it runs on any host.
"""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}


@dataclass(frozen=True, kw_only=True)
class SeenSpan:
    """A span as a collector sees it."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    failed: bool

    @property
    def service(self) -> str:
        return str(self.resource["service.name"])


def _values(pairs: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in pairs}


def decode(raw: bytes) -> list[SeenSpan]:
    """Return the spans of one request's body, or of what is in a spool's file."""
    return [
        SeenSpan(
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            name=span.name,
            kind=KINDS[span.kind],
            start_ns=span.start_time_unix_nano,
            end_ns=span.end_time_unix_nano,
            attributes=_values(span.attributes),
            resource=_values(group.resource.attributes),
            failed=span.status.code == 2,
        )
        for group in ExportTraceServiceRequest.FromString(raw).resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def spooled(folder: Path) -> list[SeenSpan]:
    """Return what waits in a spool, the oldest first."""
    return [span for file in sorted(folder.glob("*.otlp")) for span in decode(file.read_bytes())]


class Collector:
    """A real HTTP server on this machine. It can be down, up, and in a bad mood."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        """Listen; port 0 takes any that is free."""
        self.spans: list[SeenSpan] = []
        #: Headers of each request that came.
        self.heads: list[dict[str, str]] = []
        #: Answered instead of 200 while it is set.
        self.status: int | None = None
        self.retry_after: str | None = None
        #: What a 200 says of refused spans.
        self.rejected = 0
        self.on_spans: Callable[[list[SeenSpan]], None] = lambda spans: None
        self._news = threading.Condition()
        self._server = ThreadingHTTPServer((host, port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Be down: the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for(self, wanted: Callable[[list[SeenSpan]], bool], timeout_s: float) -> None:
        """Wait until what has come is enough."""
        with self._news:
            came = self._news.wait_for(lambda: wanted(self.spans), timeout_s)
            assert came, [(one.service, one.name) for one in self.spans]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector._take(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        return Handler

    def _take(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        good = request.path == "/v1/traces" and (
            request.headers["Content-Type"] == "application/x-protobuf"
        )
        status = self.status or (200 if good else 404)
        answer = b""
        spans: list[SeenSpan] = []
        if status == 200:
            spans = decode(gzip.decompress(body))
            response = ExportTraceServiceResponse()
            if self.rejected:
                response.partial_success.rejected_spans = self.rejected
                response.partial_success.error_message = "too old"
            answer = response.SerializeToString()
        with self._news:
            self.heads.append(dict(request.headers))
            self.spans += spans
            self.on_spans(spans)
            self._news.notify_all()
        request.send_response(status)
        if self.retry_after is not None:
            request.send_header("Retry-After", self.retry_after)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)


def main(host: str, port: str, file: str) -> None:
    """Serve until ended."""
    with open(file, "a", encoding="utf-8") as out:
        collector = Collector(int(port), host)

        def write(spans: list[SeenSpan]) -> None:
            out.writelines(json.dumps(asdict(span)) + "\n" for span in spans)
            out.flush()

        collector.on_spans = write
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How the gate listens: TLS, one thread a connection, bounded in number and in time; HTTP and JSON.

What is asked and answered is not its business: see `hcna_ray.supervisor.gate`.
"""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler
from logging import Logger
from typing import Any, Protocol

from hcna_ray.supervisor.gate_protocol import BODY_BYTES_MAX, GateRefused, Json

CONNECTIONS_MAX = 256
CONNECTIONS_PER_ADDRESS_MAX = 32
#: A connection that has not sent a whole request for this long is closed.
_REQUEST_S = 12.0
_RENEW_CHECK_S = 3600.0


class Answering(Protocol):
    """What stands behind the server. Every method is called from any thread."""

    log: Logger

    def monotonic(self) -> float:
        """Clock for deadlines, in seconds."""
        ...

    def handle(self, method: str, path: str, authorization: str, body: Json, peer: str) -> Json:
        """Answer one request; raise `GateRefused` to refuse it."""
        ...

    def answered(self, path: str, authorization: str, answer: Json) -> None:
        """Note that an answer has been sent."""
        ...

    def refused(self, error: GateRefused, path: str, peer: str) -> None:
        """Note a refusal that is about to be sent."""
        ...

    def tell_refusals(self) -> None:
        """Put on record the refusals that have waited long enough."""
        ...

    def renew(self, context: ssl.SSLContext) -> None:
        """Put another certificate into the context, if the one there nears its end."""
        ...


class GateServer(socketserver.ThreadingTCPServer):
    """One thread per connection, bounded in all and per address; handshakes in the threads."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, where: tuple[str, int], gate: Answering, context: ssl.SSLContext) -> None:
        self.gate, self.context = gate, context
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        #: By when a connection must have sent its request; None while it is being answered.
        self._deadlines: dict[socket.socket, float | None] = {}
        self._renew_at = gate.monotonic() + _RENEW_CHECK_S
        super().__init__(where, _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Let nobody in beyond the bounds."""
        with self._lock:
            return (
                self._open.total() < CONNECTIONS_MAX
                and self._open[client_address[0]] < CONNECTIONS_PER_ADDRESS_MAX
            )

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count the connection, then give it a thread."""
        with self._lock:
            self._open[client_address[0]] += 1
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._leave(client_address[0])
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands and serve the connection to its end, in its own thread."""
        try:
            request.settimeout(_REQUEST_S)
            with self.context.wrap_socket(
                request, server_side=True, do_handshake_on_connect=False
            ) as connection:
                self.waiting_for(connection)
                try:
                    connection.do_handshake()
                    _Handler(connection, client_address, self)
                finally:
                    self.forget_connection(connection)
        except OSError:
            pass  # It left, maybe before it was wrapped, or took too long, or speaks no TLS.
        finally:
            self._leave(client_address[0])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a thread died of, instead of printing it."""
        self.gate.log.exception(
            "a connection to the gate failed",
            extra={"action": "gate.error", "peer": str(client_address[0])},
        )

    def service_actions(self) -> None:
        """Cut off whoever takes too long to say what he wants; see to what is due by the clock."""
        now = self.gate.monotonic()
        with self._lock:
            late = [one for one, by in self._deadlines.items() if by is not None and by < now]
        for connection in late:
            _cut(connection)
        self.gate.tell_refusals()
        if now >= self._renew_at:
            self._renew_at = now + _RENEW_CHECK_S
            self.gate.renew(self.context)

    def waiting_for(self, connection: socket.socket) -> None:
        """Note that a whole request has to arrive soon."""
        with self._lock:
            self._deadlines[connection] = self.gate.monotonic() + _REQUEST_S

    def answering(self, connection: socket.socket) -> None:
        """Note that the request has arrived."""
        with self._lock:
            self._deadlines[connection] = None

    def forget_connection(self, connection: socket.socket) -> None:
        """Note the end of a connection."""
        with self._lock:
            self._deadlines.pop(connection, None)

    def close_all(self) -> None:
        """Cut off every connection."""
        with self._lock:
            open_ones = list(self._deadlines)
        for connection in open_ones:
            _cut(connection)

    def _leave(self, address: str) -> None:
        with self._lock:
            self._open[address] -= 1
            if self._open[address] <= 0:
                del self._open[address]


def _cut(connection: socket.socket) -> None:
    """End a connection under the hands of its thread, which then sees it closed."""
    try:
        # The plain shutdown: that of a TLS socket would take its state away from the thread.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    """HTTP on one connection: bounded JSON in, JSON out."""

    protocol_version = "HTTP/1.1"
    timeout = _REQUEST_S
    disable_nagle_algorithm = True
    server: GateServer

    def do_GET(self) -> None:
        """Answer a GET."""
        self._serve()

    def do_POST(self) -> None:
        """Answer a POST."""
        self._serve()

    def version_string(self) -> str:
        """Say no more than needed about what runs here."""
        return "hcna-gate"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: what matters is logged by the gate."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no proper request, in the form of all refusals."""
        self.close_connection = True
        self.request_version = self.protocol_version  # What was no request had none.
        self._send(int(code), _refusal(GateRefused(int(code), "malformed_request", message or "")))

    def _serve(self) -> None:
        gate = self.server.gate
        peer = str(self.client_address[0])
        authorization = self.headers.get("Authorization", "")
        try:
            body = self._body() if self.command == "POST" else {}
            self.server.answering(self.connection)
            answer = gate.handle(self.command, self.path, authorization, body, peer)
        except GateRefused as error:
            gate.refused(error, self.path, peer)
            self._send(error.status, _refusal(error))
        except (OSError, EOFError):
            raise
        except Exception:
            gate.log.exception(
                "the gate could not answer", extra={"action": "gate.error", "peer": peer}
            )
            self._send(500, _refusal(GateRefused(500, "internal", "M1 could not answer")))
        else:
            self._send(200, answer)
            gate.answered(self.path, authorization, answer)
        self.server.waiting_for(self.connection)

    def _body(self) -> Json:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise GateRefused(411, "length_required", "a request needs its Content-Length")
        if int(length) > BODY_BYTES_MAX:
            self.close_connection = True
            raise GateRefused(413, "too_large", f"a body has {BODY_BYTES_MAX} bytes at most")
        raw = self.rfile.read(int(length))
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise GateRefused(400, "malformed_json", "the body is not a JSON object")
        return data

    def _send(self, status: int, answer: Json) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)


def _refusal(error: GateRefused) -> Json:
    return {
        "status": error.status,
        "code": error.code,
        "message": error.message,
        "fix": error.fix,
    }

"""Receivers of webhooks on this machine, and a trap that nobody may walk into."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

#: How long a path that hangs does so.
HANG_S = 30.0


@dataclass(frozen=True)
class Received:
    """One request, as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def json(self) -> Any:
        return json.loads(self.body)

    def is_signed_with(self, secret: str) -> bool:
        """Check it as a receiver would, from the specification alone."""
        at = self.headers["webhook-timestamp"]
        if abs(time.time() - int(at)) > 300:
            return False
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signed = b".".join((self.id.encode(), at.encode(), self.body))
        made = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        given = (one.partition(",") for one in self.headers["webhook-signature"].split(" "))
        return any(version == "v1" and hmac.compare_digest(made, one) for version, _, one in given)


class Receiver:
    """An HTTP server that does what the path says.

    ``/ok``; ``/status/N``; ``/to?URL`` redirects; ``/after/N`` takes it at the N-th try of each
    report; ``/later`` asks for a pause; ``/hang`` never answers; ``/drip`` answers byte by byte.
    """

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        """Listen on loopback."""
        receiver = self
        self.received: list[Received] = []
        self.changed = threading.Condition()
        self._stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers.get("content-length", "0"))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver._answer(self, Received(self.path, headers, self.rfile.read(size)))

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def until(self, count: int, timeout_s: float = 30.0) -> list[Received]:
        """Wait for so many requests; return all there are."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.received) >= count, timeout_s), (
                f"{len(self.received)} of {count} requests within {timeout_s:g} s"
            )
            return list(self.received)

    def _answer(self, handler: BaseHTTPRequestHandler, request: Received) -> None:
        with self.changed:
            same = [one for one in self.received if one.headers.get("webhook-id") == request.id]
            tries = len(same) + 1
            self.received.append(request)
            self.changed.notify_all()
        url = urlsplit(request.path)
        words = url.path.strip("/").split("/")
        with suppress(OSError):
            match words:
                case ["status", status]:
                    self._end(handler, int(status))
                case ["to"]:
                    (to,) = parse_qs(url.query)["to"]
                    self._end(handler, 307, Location=to)
                case ["after", wanted]:
                    self._end(handler, 204 if tries >= int(wanted) else 503)
                case ["later"]:
                    self._end(handler, 429, **{"Retry-After": "77"})
                case ["hang"]:
                    self._stopping.wait(HANG_S)
                case ["drip"]:
                    for letter in b"HTTP/1.1 200 OK\r\n" + b"X-Long: " + b"x" * 10_000:
                        handler.wfile.write(bytes([letter]))
                        handler.wfile.flush()
                        if self._stopping.wait(0.05):
                            return
                case _:
                    self._end(handler, 200)

    def _end(self, handler: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@contextmanager
def a_receiver(port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Have a receiver meanwhile."""
    with closing(Receiver(port, tls)) as receiver:
        yield receiver


class Trap:
    """Listens on every address of this machine and counts who comes."""

    def __init__(self) -> None:
        self.reached = 0
        self._listeners = self._bound()
        self.port = int(self._listeners[0].getsockname()[1])
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _bound(self) -> Sequence[socket.socket]:
        four = socket.create_server(("0.0.0.0", 0))
        found = [four]
        with suppress(OSError):  # No IPv6 here: then nobody comes by it either.
            found.append(
                socket.create_server(("::", four.getsockname()[1]), family=socket.AF_INET6)
            )
        return found

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self.reached += 1
                connection.close()

    def walk_in(self) -> None:
        """Reach it, to show that it can be reached."""
        before = self.reached
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.recv(1)
        assert self.reached == before + 1
        self.reached = before

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


@contextmanager
def a_trap() -> Iterator[Trap]:
    """Have a trap meanwhile."""
    with closing(Trap()) as trap:
        yield trap


def server_context(directory: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """Return what a server of that name shows, and the authority that vouches for it."""
    from datetime import UTC, datetime

    from hcna_ray.security.certs import ensure_ca, ensure_server

    now = datetime.now(UTC)
    authority = ensure_ca(directory, now=now)
    pair = ensure_server(directory, "receiver", names=[name], addresses=[], now=now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    return context, authority.cert

"""Whether a port can be reached from another machine: plain listeners and short connections.

A listener sends a word of its own to whoever connects, so that it is not taken for another
program, or another machine, that happens to answer there.
"""

from __future__ import annotations

import errno
import selectors
import socket
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

Verdict = Literal["ok", "refused", "timeout", "no_route", "other"]

_WORD_BYTES_MAX = 64
_AT_ONCE = 16
#: Connections that a checker's listeners hold at once.
_GUESTS_MAX = 64


@dataclass(frozen=True)
class Reach:
    """What came of one connection. ``refused``: nothing listens, or a firewall says no."""

    verdict: Verdict
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the connection was made and the right one answered."""
        return self.verdict == "ok"

    def __str__(self) -> str:
        return {
            "ok": "ok",
            "refused": "refused (nothing listens there, or a firewall rejects it)",
            "timeout": "no answer (a firewall drops it, or the wrong network)",
            "no_route": f"no route ({self.detail})",
            "other": self.detail,
        }[self.verdict]


def explain(error: OSError) -> Reach:
    """Return what a failed connection means."""
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return Reach("timeout")
    if isinstance(error, ConnectionRefusedError):
        return Reach("refused")
    text = error.strerror or str(error)
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM):
        return Reach("no_route", text)
    return Reach("other", text)


def try_port(
    host: str, port: int, *, timeout_s: float, word: str = "", source: str | None = None
) -> Reach:
    """Connect once. With ``word``, what listens must say it."""
    try:
        with socket.create_connection(
            (host, port), timeout=timeout_s, source_address=(source, 0) if source else None
        ) as connection:
            if not word:
                return Reach("ok")
            wanted = word.encode("ascii")
            heard = b""
            while len(heard) < len(wanted):
                part = connection.recv(_WORD_BYTES_MAX)
                if not part:
                    break
                heard += part
            return Reach("ok") if heard == wanted else Reach("other", "something else answers")
    except OSError as error:
        return explain(error)


def try_ports(
    host: str,
    ports: Mapping[int, str],
    *,
    timeout_s: float,
    source: str | None = None,
) -> dict[int, Reach]:
    """Connect to all ports at once. ``ports`` holds the word expected at each, or ''."""
    if not ports:
        return {}
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(ports))) as pool:
        made = {
            port: pool.submit(try_port, host, port, timeout_s=timeout_s, word=word, source=source)
            for port, word in ports.items()
        }
        return {port: future.result() for port, future in made.items()}


class Listeners:
    """Listens on some ports for a while and says a word to whoever connects.

    ``opened`` are the ports it got, ``taken`` those that are in use by another program.
    """

    def __init__(self, ports: Iterable[int], word: str, *, host: str = "0.0.0.0") -> None:
        self._wanted, self._word, self._host = tuple(ports), word.encode("ascii"), host
        self._sockets: list[socket.socket] = []
        self._thread: threading.Thread | None = None
        self.opened: tuple[int, ...] = ()
        self.taken: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Start to listen; ports in use are left out."""
        opened, taken = [], []
        for port in self._wanted:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((self._host, port))
                listener.listen(8)
            except OSError:
                listener.close()
                taken.append(port)
                continue
            listener.setblocking(False)
            self._sockets.append(listener)
            opened.append(int(listener.getsockname()[1]))
        self.opened, self.taken = tuple(opened), tuple(taken)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="port-check", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and free the ports. May be called twice."""
        if self._thread is None:
            return
        self._wake.close()
        self._thread.join(timeout=5.0)
        self._thread = None

    def _serve(self) -> None:
        guests: list[socket.socket] = []
        with selectors.DefaultSelector() as selector:
            for listener in (*self._sockets, self._woken):
                selector.register(listener, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._woken in ready:
                    break
                for guest in [guest for guest in guests if guest in ready]:
                    selector.unregister(guest)
                    guests.remove(guest)
                    guest.close()
                for listener in [each for each in self._sockets if each in ready]:
                    came = self._greet(listener)
                    if came is None:
                        continue
                    if len(guests) >= _GUESTS_MAX:
                        came.close()
                        continue
                    guests.append(came)
                    selector.register(came, selectors.EVENT_READ)
        for each in (*guests, *self._sockets, self._woken):
            each.close()

    def _greet(self, listener: socket.socket) -> socket.socket | None:
        """Say the word. The guest closes first: the port must not stay blocked on this side."""
        try:
            guest, _ = listener.accept()
        except OSError:
            return None
        guest.setblocking(False)
        try:
            guest.send(self._word)  # The buffer of a fresh connection takes it without waiting.
        except OSError:
            pass
        return guest

"""A TCP proxy in front of a database server that breaks connections at a chosen moment.

What it is for cannot be had otherwise: a connection that ends when a COMMIT is on its way, or when
the answer to one is. PostgreSQL's messages are not read but for the word.
"""

from __future__ import annotations

import socket
import struct
import threading
from enum import StrEnum
from types import TracebackType
from typing import Self

_COMMIT = b"COMMIT"
_LINGER_NOTHING = struct.pack("ii", 1, 0)


class Cut(StrEnum):
    """Where a connection breaks."""

    #: The server never hears of the COMMIT.
    BEFORE = "before"
    #: The server commits, and nobody hears of it.
    AFTER = "after"


class CuttingProxy:
    """Listens on a port of its own for as long as it is open."""

    def __init__(self, port: int) -> None:
        """Pass connections on to a port of this machine."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._armed: tuple[Cut, int] | None = None
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        #: Connections whose next answer is not passed on.
        self._mute: set[tuple[socket.socket, socket.socket]] = set()
        #: Cuts that were made.
        self.cuts = 0
        self.cut = threading.Event()
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset_all()
        self._accepting.join(timeout=10)

    def arm(self, where: Cut, nth: int = 1) -> None:
        """Break the connection on which the next, or a later, COMMIT passes."""
        with self._lock:
            self.cut.clear()
            self._armed = (where, nth)

    def reset_all(self) -> None:
        """Reset every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            _reset(pair)

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
            for upstream in (True, False):
                threading.Thread(target=self._pass_on, args=(pair, upstream), daemon=True).start()

    def _pass_on(self, pair: tuple[socket.socket, socket.socket], upstream: bool) -> None:
        source, target = pair if upstream else (pair[1], pair[0])
        try:
            while data := source.recv(1 << 16):
                where = self._due(data) if upstream else None
                if where is Cut.AFTER:
                    self._mute.add(pair)
                elif where is Cut.BEFORE or (not upstream and pair in self._mute):
                    # An answer is there, so the server surely has committed.
                    self._break(pair)
                    return
                target.sendall(data)
        except OSError:
            pass
        finally:
            with self._lock:
                self._pairs.discard(pair)
            _reset(pair)

    def _due(self, data: bytes) -> Cut | None:
        with self._lock:
            if self._armed is None or _COMMIT not in data:
                return None
            where, nth = self._armed
            self._armed = None if nth == 1 else (where, nth - 1)
            return where if nth == 1 else None

    def _break(self, pair: tuple[socket.socket, socket.socket]) -> None:
        _reset(pair)
        self.cuts += 1
        self.cut.set()


def _reset(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        try:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOTHING)
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        end.close()

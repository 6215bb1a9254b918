"""Calls between processes of one machine over a Unix socket: a shorter way than through Ray.

A call through Ray passes half a dozen threads of three processes and costs both ends some hundred
microseconds of CPU. C1 always lives beside the moderator, and so do the slots of M1's own machine:
they call it here, with the same methods and answers. Who finds no socket, or nobody behind it, goes
through Ray, so nothing depends on it.

A lost connection means what a dead actor means: nobody knows whether the call was carried out. Only
the owner of the directory can reach the socket, and what travels is pickled, as by Ray: it is for
processes of one user that trust each other as they trust their own memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

log = logging.getLogger(__name__)

#: A frame: its length, then what was pickled.
_HEAD = struct.Struct("<I")
FRAME_BYTES_MAX = 1 << 30
#: Less than this is copied once more to be sent in one call.
_JOINED_BYTES = 1 << 16
#: Pause before somebody is looked for again where nobody was.
AGAIN_S = 1.0
#: Pause between two looks whether the name of the socket still leads to us.
LOOK_S = 1.0
#: Connections that wait to be taken.
BACKLOG = 512
#: Longest path that fits into an address, with its final zero.
_PATH_BYTES_MAX = 104
_CREDENTIALS = struct.Struct("3i")

#: Answers ``method``, ``args`` and ``kwargs``.
Answer = Callable[[str, tuple[Any, ...], dict[str, Any]], Awaitable[tuple[str, Any]]]


class _Frames(asyncio.Protocol):
    """Cuts what arrives into frames, and sends such."""

    def __init__(self) -> None:
        self._arrived = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # Of uvloop: it only looks like one.

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None

    def send(self, value: Any) -> None:
        """Send a frame, or nothing if the connection is lost."""
        if self.transport is not None:
            raw = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
            head = _HEAD.pack(len(raw))
            if len(raw) < _JOINED_BYTES:
                self.transport.write(head + raw)
            else:
                self.transport.write(head)
                self.transport.write(raw)

    def data_received(self, data: bytes) -> None:
        arrived = self._arrived
        arrived += data
        start = 0
        while len(arrived) - start >= _HEAD.size:
            (size,) = _HEAD.unpack_from(arrived, start)
            end = start + _HEAD.size + size
            if size > FRAME_BYTES_MAX:
                self._refuse(f"a frame of {size} bytes")
                return
            if len(arrived) < end:
                break
            try:
                self.frame(pickle.loads(arrived[start + _HEAD.size : end]))
            except Exception as error:
                self._refuse(f"a frame that cannot be read ({error!r})")
                return
            start = end
        del arrived[:start]

    def _refuse(self, what: str) -> None:
        log.error("a local connection is dropped: %s", what, extra={"action": "local.dropped"})
        if self.transport is not None:
            self.transport.abort()

    def frame(self, value: Any) -> None:
        """Take a frame in."""
        raise NotImplementedError


# -- who answers -----------------------------------------------------------------------------------


class LocalServer:
    """Answers on a socket until somebody else has its name, or the process ends."""

    def __init__(self, path: Path, answer: Answer) -> None:
        """Name the socket; nothing is opened yet."""
        self._path, self._answer = path, answer
        self._server: asyncio.AbstractServer | None = None
        self._inode = 0
        self.connections: set[_Served] = set()

    async def run(self) -> None:
        """Serve for as long as the name leads here. Whoever comes later takes it over.

        Raises:
            OSError: there can be no socket of that name.
        """
        await self.open()
        try:
            while self._is_ours():  # noqa: ASYNC110 - a file tells nobody that it is gone
                await asyncio.sleep(LOOK_S)
            log.warning("another process has this socket now", extra={"action": "local.replaced"})
        finally:
            self.close()

    async def open(self) -> None:
        """Take the name, whoever had it."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            with _address(new) as address:
                listening.bind(address)
            try:
                new.chmod(0o600)
                listening.listen(BACKLOG)
                listening.setblocking(False)
                self._inode = new.stat().st_ino
                new.rename(self._path)
            except OSError:
                new.unlink(missing_ok=True)
                raise
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(
                lambda: _Served(self.connections, self._answer), sock=listening
            )
        except OSError:
            listening.close()
            raise

    def close(self) -> None:
        """Serve nobody any more."""
        if self._server is not None:
            self._server.close()
        for one in list(self.connections):
            if one.transport is not None:
                one.transport.abort()
        if self._is_ours():
            self._path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False


class _Served(_Frames):
    """One connection to a caller."""

    def __init__(self, all_: set[_Served], answer: Answer) -> None:
        super().__init__()
        self._all, self._answer = all_, answer
        self._calls: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not _is_this_user(transport):
            self._refuse("another user")
            return
        self._all.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._all.discard(self)

    def frame(self, value: Any) -> None:
        number, method, args, kwargs = value
        call = asyncio.get_running_loop().create_task(self._serve(number, method, args, kwargs))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _serve(
        self, number: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            reply = await self._answer(method, args, kwargs)
        except Exception as error:
            log.exception("a local call failed", extra={"action": "local.failed"})
            reply = ("failed", repr(error))
        self.send((number, reply))


def _is_this_user(transport: asyncio.BaseTransport) -> bool:
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # The directory is its owner's alone.
    taken = transport.get_extra_info("socket")
    with socket.fromfd(taken.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as same:
        raw = same.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return bool(uid == os.getuid())


# -- who calls -------------------------------------------------------------------------------------


class LocalCalls:
    """The way to a `LocalServer`, opened when it is needed, and anew after it broke."""

    def __init__(self, path: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Name the socket; nothing is opened yet."""
        self._path, self._monotonic = path, monotonic
        self._connection: _Calling | None = None
        self._again_at = -AGAIN_S
        self._opening = asyncio.Lock()

    async def ask(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Any] | None:
        """Call; return the answer, or ``None`` if nobody is there and nothing was sent.

        Raises:
            ConnectionError: the connection broke: the call may have been carried out.
        """
        connection = self._connection
        if connection is None or connection.transport is None:
            connection = await self._open()
            if connection is None:
                return None
        try:
            return await connection.ask(method, args, kwargs)
        except ConnectionError:
            # Should all connections break, every other call gets through all the same.
            self._again_at = self._monotonic() + AGAIN_S
            raise

    async def _open(self) -> _Calling | None:
        async with self._opening:
            if self.connected:
                return self._connection
            if self._monotonic() < self._again_at:
                return None
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                with _address(self._path) as address:
                    sock.connect(address)
                loop = asyncio.get_running_loop()
                _, self._connection = await loop.create_unix_connection(_Calling, sock=sock)
            except OSError:
                sock.close()
                self._again_at = self._monotonic() + AGAIN_S
                self._connection = None
            return self._connection

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connection is not None and self._connection.transport is not None

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.abort()


class _Calling(_Frames):
    """One connection to a server."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[tuple[str, Any]]] = {}

    async def ask(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Any]:
        if self.transport is None:
            raise ConnectionResetError("the connection is lost")
        number = next(self._numbers)
        answer: asyncio.Future[tuple[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self.send((number, method, args, kwargs))
            return await answer
        finally:
            del self._waiting[number]

    def frame(self, value: Any) -> None:
        number, reply = value
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("the connection is lost"))


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """Yield a name for a socket that fits into an address, however long its path is."""
    if len(os.fsencode(path)) < _PATH_BYTES_MAX:
        yield os.fspath(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)

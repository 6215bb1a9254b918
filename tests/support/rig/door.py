"""Ways between this machine and the inside of a host's network, for programs that are on neither.

A service that listens on a host's loopback alone is out of reach for a browser of this machine, and
nothing else on the host can be told to wait for what a test listens to. A thread can be in another
network than its process, and a socket stays where it was made.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from .host import Host
from .kernel import enter_network
from .state import RigError

_OWN = Path("/proc/thread-self/ns/net")
_CONNECT_S = 5.0
_START_S = 10.0
_PIECE_BYTES = 1 << 16


@contextmanager
def network_of(host: Host) -> Iterator[None]:
    """Have this thread's sockets that are made inside be on the host.

    Raises:
        RigError: The host is off.
    """
    init = host.init
    if init is None:
        raise RigError(f"{host.name} is off")
    with _OWN.open("rb") as own:
        enter_network(Path(f"/proc/{init}/ns/net"))
        try:
            yield
        finally:
            enter_network(Path(f"/proc/self/fd/{own.fileno()}"))


class Door:
    """A port of this machine's loopback that leads to a port of a host's loopback.

    It stays when the host loses its power and leads there again after a boot.
    """

    def __init__(self, host: Host, port: int) -> None:
        self._host, self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._passing: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._main, name=f"door-{host.name}", daemon=True)

    @property
    def url(self) -> str:
        """Where it is, for HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(_START_S)

    # -- in the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        async with await asyncio.start_server(self._take, sock=self._listener):
            await self._over.wait()
            passing = [*self._passing]
            for one in passing:
                one.cancel()
            await asyncio.gather(*passing, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        try:
            there = await self._loop.run_in_executor(None, self._connect)
            inner_reader, inner_writer = await asyncio.open_connection(sock=there)
            try:
                await asyncio.gather(_pass(reader, inner_writer), _pass(inner_reader, writer))
            finally:
                inner_writer.close()
        except (OSError, RigError, asyncio.CancelledError):
            pass  # Nobody is there, or not any more: the connection ends, as on a network.
        finally:
            writer.close()
            self._passing.discard(task)

    def _connect(self) -> socket.socket:
        with network_of(self._host):
            there = socket.create_connection(("127.0.0.1", self._target), timeout=_CONNECT_S)
        there.setblocking(False)
        return there


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    with suppress(OSError):  # It may have ended by itself meanwhile.
        writer.write_eof()

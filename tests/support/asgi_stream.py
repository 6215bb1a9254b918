"""A client that reads an answer chunk by chunk, as slowly as a test wants; httpx collects it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from starlette.types import Message

#: Nothing here takes that long; a test that waits for what never comes is told.
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Told:
    """One message of an event stream."""

    id: str
    name: str
    data: dict[str, Any]


class StreamClient:
    """One request to an ASGI application; its answer is taken piece by piece."""

    def __init__(self, app: Any, path: str, headers: Mapping[str, str], query: Mapping[str, Any]):
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": quote(path).encode(),
            "root_path": "",
            "query_string": urlencode(query).encode(),
            "headers": [(name.lower().encode(), text.encode()) for name, text in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("c1.test", 80),
        }
        self._gone = asyncio.Event()
        self._asked = False
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._begun = asyncio.Event()
        self._buffer = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        #: Whether the answer came to an end, and was not just broken off.
        self.complete = False
        #: Cleared by a test that does not want to read.
        self.reading = asyncio.Event()
        self.reading.set()
        self.task: asyncio.Task[None] | None = None

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): text.decode() for name, text in message["headers"]}
            self._begun.set()
            return
        await self.reading.wait()
        if message.get("body"):
            self._chunks.put_nowait(message["body"])
        if not message.get("more_body", False):
            self.complete = True

    async def run(self) -> None:
        """Make the request."""
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            self._begun.set()
            self._chunks.put_nowait(None)

    async def begun(self) -> None:
        """Wait for the head of the answer."""
        async with asyncio.timeout(PATIENCE_S):
            await self._begun.wait()

    def hang_up(self) -> None:
        """Go away."""
        self._gone.set()

    async def over(self) -> None:
        """Wait until nothing more can come."""
        assert self.task is not None
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait({self.task})

    async def block(self) -> str | None:
        """Return what stands before the next empty line; ``None`` at the end."""
        while b"\n\n" not in self._buffer:
            async with asyncio.timeout(PATIENCE_S):
                chunk = await self._chunks.get()
            if chunk is None:
                self._chunks.put_nowait(None)
                return None
            self._buffer += chunk
        block, _, self._buffer = self._buffer.partition(b"\n\n")
        return block.decode()

    async def told(self) -> Told | None:
        """Return the next message; ``None`` at the end."""
        while (block := await self.block()) is not None:
            fields = dict(line.split(": ", 1) for line in block.split("\n") if line[0] != ":")
            if "data" in fields:
                return Told(fields["id"], fields.get("event", ""), json.loads(fields["data"]))
        return None

    async def take(self, count: int) -> list[Told]:
        """Return the next messages, so many."""
        found = [await self.told() for _ in range(count)]
        return [one for one in found if one is not None]

    async def rest(self) -> list[Told]:
        """Return all messages up to the end."""
        found = []
        while (one := await self.told()) is not None:
            found.append(one)
        return found


@asynccontextmanager
async def a_stream(
    app: Any, path: str, key: str | None, *, after: str | None = None, **query: Any
) -> AsyncIterator[StreamClient]:
    """Open a stream; ``after`` is sent as ``Last-Event-ID``."""
    headers = {"Host": "127.0.0.1"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    if after is not None:
        headers["Last-Event-ID"] = after
    client = StreamClient(app, path, headers, query)
    client.task = asyncio.create_task(client.run())
    try:
        await client.begun()
        yield client
    finally:
        client.hang_up()
        client.reading.set()
        await client.over()

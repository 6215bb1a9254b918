"""Clients of event streams, thin enough for hundreds of them in one test."""

from __future__ import annotations

import asyncio
import re
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

#: What one connection may take to answer, and what may lie between two signs of life.
ANSWER_S = 20.0
SILENCE_S = 40.0
PAUSE_S = 0.2

_ID = re.compile(rb"^id: (\d+)-(\d+)$", re.MULTILINE)


@dataclass
class Follower:
    """One client that follows all events and comes again, with `Last-Event-ID`, when it is cut."""

    url: str
    api_key: str
    #: Behind which event it begins; ``None``: from when it connects.
    place: str | None = None
    #: Numbers of the events that it was told, in that order.
    numbers: list[int] = field(default_factory=list)
    connections: int = 0
    resets: int = 0
    #: Set when it knows its place for the first time.
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            # Refused, cut or silent: come again.
            with suppress(OSError, EOFError, TimeoutError):
                await self._follow()
            await asyncio.sleep(PAUSE_S)

    async def _follow(self) -> None:
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(request(self.url, self.api_key, self.place))
            async with asyncio.timeout(ANSWER_S):
                head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                return
            self.connections += 1
            rest = b""
            while True:
                async with asyncio.timeout(SILENCE_S):
                    size = int(await reader.readline() or b"0", 16)
                    piece = await reader.readexactly(size + 2)
                if not size:
                    return
                rest = self.take(rest + piece[:-2])
        finally:
            writer.close()

    def take(self, text: bytes) -> bytes:
        """Note the whole messages of ``text``; return what is left of it."""
        whole, end, rest = text.rpartition(b"\n\n")
        for block in (whole + end).split(b"\n\n"):
            found = _ID.search(block)
            if found is None:
                continue
            self.place = f"{int(found[1])}-{int(found[2])}"
            self.opened.set()
            if block.startswith(b"event: reset"):
                self.resets += 1
            elif b"\ndata: " in block:
                self.numbers.append(int(found[2]))
        return rest


@dataclass(frozen=True)
class Tally:
    """How what some clients were told compares with what there was to tell."""

    clients: int
    events: int
    connections: int
    missed: int
    repeated: int
    foreign: int
    unordered: int

    def __str__(self) -> str:
        return (
            f"{self.clients} clients, {self.connections} connections, {self.events} events each: "
            f"{self.missed} missed, {self.repeated} repeated, {self.foreign} that there were not, "
            f"{self.unordered} out of order"
        )

    @property
    def faults(self) -> int:
        """Everything that must not be."""
        return self.missed + self.repeated + self.foreign + self.unordered


def compare(followers: Iterable[Follower], there_were: Iterable[int], upto: int) -> Tally:
    """Hold what clients were told up to a number against what there was."""
    wanted = Counter(there_were)
    clients = connections = missed = repeated = foreign = unordered = 0
    for one in followers:
        told = [number for number in one.numbers if number <= upto]
        seen = Counter(told)
        clients += 1
        connections += one.connections
        missed += len(wanted.keys() - seen.keys())
        foreign += len(seen.keys() - wanted.keys())
        repeated += sum(count - 1 for count in seen.values())
        unordered += sum(1 for this, then in pairwise(told) if then < this)
    return Tally(clients, len(wanted), connections, missed, repeated, foreign, unordered)


def request(url: str, api_key: str, place: str | None) -> bytes:
    """Return the bytes that ask for all events behind a place."""
    lines = [
        "GET /events HTTP/1.1",
        f"Host: {urlsplit(url).hostname}",
        f"Authorization: Bearer {api_key}",
        "Accept: text/event-stream",
    ]
    if place is not None:
        lines.append(f"Last-Event-ID: {place}")
    return "\r\n".join([*lines, "", ""]).encode()


def connected_narrowly(url: str, buffer_bytes: int = 4096) -> socket.socket:
    """Connect with so small a buffer that whoever sends soon notices that nobody reads."""
    parts = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(ANSWER_S)
    connection.connect((parts.hostname, parts.port))
    return connection


def dechunked(body: bytes) -> bytes:
    """Return what a chunked body holds, which may be broken off anywhere."""
    parts: list[bytes] = []
    while b"\r\n" in body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(body[:length])
        if not length or len(body) < length + 2:
            break
        body = body[length + 2 :]
    return b"".join(parts)

"""``python -m tests.faults.offers``: an open-loop source of tasks over HTTP, as cheap as it can be.

Tasks are offered at instants drawn beforehand, whether or not the last one has been answered: that
is what overload is. Every offer goes into the history that the checker reads. It runs as a process
of its own; how late its own event loop was is part of what it tells, because on the machine that
it loads an answer may wait for the one that reads it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.checker.recorder import Call, History
from tests.checker.sqlite_dump import canonical_hash

#: Connections at most; an offer that finds them all busy is counted, and not made.
CONNECTIONS_MAX = 1000
#: How long the last answers may take.
LAST_S = 30.0
_LAG_S = 0.01


@dataclass(kw_only=True)
class Plan:
    """What is offered."""

    url: str
    key: str
    history: str
    effects: str
    seed: int
    per_second: float
    seconds: float
    task_seconds: float
    principal: str = "owner"


@dataclass(kw_only=True)
class Told:
    """What became of it; latencies in seconds."""

    began_at: float = 0.0
    ended_at: float = 0.0
    offered: int = 0
    not_made: int = 0
    #: By status; ``"none"`` for offers without an answer.
    answers: dict[str, int] = field(default_factory=dict)
    without_retry_after: int = 0
    refused_s: list[float] = field(default_factory=list)
    accepted_s: list[float] = field(default_factory=list)
    #: How late timers of this process were, every 10 ms.
    lag_s: list[float] = field(default_factory=list)


class Wire(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self.call: Call | None = None
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, call: Call, request: bytes) -> None:
        """Send a request."""
        assert self._transport is not None
        self.call, self._buffer = call, b""
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        fields = head.lower()
        mark = fields.index(b"\r\ncontent-length:")
        end = fields.find(b"\r\n", mark + 2)
        length = int(fields[mark + 17 : end if end >= 0 else None])
        if len(body) < length or self.call is None:
            return
        took = time.perf_counter() - self._sent
        call, self.call = self.call, None
        self._source.answered(self, call, int(head[9:12]), fields, body, took)

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._source.lost(self)

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()


class Source:
    """Offers tasks and counts answers."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._history = History(Path(plan.history), f"source-{plan.seed}", plan.principal)
        parts = urlsplit(plan.url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._head = (
            f"POST /tasks HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {plan.key}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        )
        self._free: list[Wire] = []
        self._wires: set[Wire] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._out = 0
        self._counted: Counter[str] = Counter()
        self.told = Told()

    async def run(self) -> Told:
        """Offer for as long as the plan says, then wait for the last answers."""
        plan, told, loop = self._plan, self.told, asyncio.get_running_loop()
        for _ in range(16):
            self._free.append(await self._open())
        watch = asyncio.create_task(self._watch())
        draw = random.Random(plan.seed)
        told.began_at = time.time()
        began = loop.time()
        due = 0.0
        while (due := due + draw.expovariate(plan.per_second)) < plan.seconds:
            pause = began + due - loop.time()
            if pause > 0:
                await asyncio.sleep(pause)
            elif told.offered % 32 == 0:
                await asyncio.sleep(0)
            self._offer()
        told.ended_at = time.time()
        end = loop.time() + LAST_S
        while self._out and loop.time() < end:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.01)
        watch.cancel()
        for wire in list(self._wires):
            wire.close()
        if self._out:
            self._counted["none"] += self._out
        told.answers = dict(self._counted)
        return told

    async def _open(self) -> Wire:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(lambda: Wire(self), self._host, self._port)
        self._wires.add(wire)
        return wire

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_S
            await asyncio.sleep(_LAG_S)
            self.told.lag_s.append(loop.time() - due)

    def _offer(self) -> None:
        plan = self._plan
        if not self._free and len(self._wires) + len(self._opening) >= CONNECTIONS_MAX:
            self.told.not_made += 1
            return
        self.told.offered += 1
        nonce = f"o-{plan.seed}-{self.told.offered}"
        body: dict[str, Any] = {
            "task_type": "check.work",
            "payload": {"effects": plan.effects, "nonce": nonce, "seconds": plan.task_seconds},
            "metadata": {"nonce": nonce},
        }
        raw = json.dumps(body).encode()
        request = f"{self._head}{len(raw)}\r\n\r\n".encode() + raw
        digest = canonical_hash(body)
        self._out += 1
        if self._free:
            call = self._history.call("submit", nonce=nonce, body_hash=digest)
            self._free.pop().send(call, request)
            return
        opening = asyncio.create_task(self._open_and_send(nonce, digest, request))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _open_and_send(self, nonce: str, digest: str, request: bytes) -> None:
        try:
            wire = await self._open()
        except OSError:
            self._out -= 1
            self._counted["no connection"] += 1
            return
        wire.send(self._history.call("submit", nonce=nonce, body_hash=digest), request)

    def answered(
        self, wire: Wire, call: Call, status: int, head: bytes, body: bytes, took: float
    ) -> None:
        """Take an answer."""
        self._out -= 1
        self._counted[str(status)] += 1
        self._free.append(wire)
        if status == 202:
            call.returned(status, id=json.loads(body)["task_id"])
            self.told.accepted_s.append(took)
            return
        mark = head.find(b"\r\nretry-after:")
        after = None
        if mark >= 0:
            end = head.find(b"\r\n", mark + 2)
            after = float(head[mark + 14 : end if end >= 0 else None])
        else:
            self.told.without_retry_after += 1
        call.returned(status, retry_after=after)
        self.told.refused_s.append(took)

    def lost(self, wire: Wire) -> None:
        """Take note that a connection is gone, and perhaps an answer with it."""
        self._wires.discard(wire)
        if wire in self._free:
            self._free.remove(wire)
        if wire.call is not None:
            wire.call = None
            self._out -= 1
            self._counted["none"] += 1


def main() -> None:
    """Read a plan from standard input, carry it out, print what became of it."""
    plan = Plan(**json.load(sys.stdin))
    sys.stdout.write(json.dumps(asdict(asyncio.run(Source(plan).run()))))


if __name__ == "__main__":
    main()

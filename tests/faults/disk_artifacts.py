"""Clients that upload artifacts, what they were told, and whether a disk holds it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from hcna_ray.core.errors import NotFound
from hcna_ray.store.artifacts import Artifact, ArtifactStore
from tests.faults.disk_recording import Call
from tests.support.c1 import ADMIN_KEY, URL

_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) .*?\r\n\r\n", re.S)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


def client_of(socket: Path) -> httpx.AsyncClient:
    """Return a client with one connection after the other to C1's process."""
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(socket)),
        base_url=URL,
        headers={"Authorization": f"Bearer {ADMIN_KEY}"},
        timeout=60,
    )


@dataclass
class Uploader:
    """A client that uploads, whole and in parts, and now and then the same again."""

    http: httpx.AsyncClient
    draw: random.Random
    sent: list[bytes] = field(default_factory=list)
    answers: list[httpx.Response] = field(default_factory=list)

    async def run(self, uploads: int) -> None:
        """Upload so often."""
        for _ in range(uploads):
            await self.one()

    async def one(self) -> None:
        """Upload one artifact; a transport error is an answer that never came."""
        if self.sent and self.draw.random() < 0.2:
            data = self.draw.choice(self.sent)
        else:
            data = self.draw.randbytes(self.draw.choice((1, 700, 9000, 60_000)))
            self.sent.append(data)
        try:
            if len(data) > 1000 and self.draw.random() < 0.5:
                await self._in_parts(data)
            else:
                await self._put("/artifacts", data)
        except httpx.TransportError:
            await asyncio.sleep(0.05)

    async def _in_parts(self, data: bytes) -> None:
        name, size = hashlib.sha256(data).hexdigest(), len(data)
        offset = 0
        for _ in range(8):
            end = min(size, offset + -(-size // 3))
            answer = await self._put(
                f"/artifacts?sha256={name}",
                data[offset:end],
                {"Content-Range": f"bytes {offset}-{end - 1}/{size}"},
            )
            if answer.status_code == 201 or answer.status_code >= 500:
                return
            offset = int(answer.json()["received"])  # 202, or 409 with where it stands.

    async def _put(
        self, path: str, data: bytes, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        answer = await self.http.put(path, content=data, headers=headers or {})
        self.answers.append(answer)
        return answer


@dataclass(frozen=True)
class Stored:
    """An answer to an upload: so many bytes of an artifact are kept."""

    tick: int
    sha256: str
    size: int
    #: Below ``size``: an upload that goes on.
    received: int

    def holds(self, store: ArtifactStore) -> bool:
        """Return whether they are there."""
        if self.received < self.size:
            found = store.progress(self.sha256, self.size)
            return isinstance(found, Artifact) or found.received >= self.received
        try:
            return store.find(self.sha256).size == self.size
        except NotFound:
            return False


def stored(calls: Sequence[Call]) -> list[Stored]:
    """Return what C1 has said that it keeps, in the order in which it began to say so."""
    told: dict[tuple[int, str], bytearray] = defaultdict(bytearray)
    found = []
    for call in calls:
        if call.name != "sendto" or (call.result is not None and call.result < 0):
            continue
        channel = (call.session, call.arguments[0])
        told[channel] += call.data()[: call.result]
        for status, body in _responses(told[channel]):
            if status in (201, 202):
                view = json.loads(body)
                size = int(view["size"])
                received = int(view.get("received", size))
                found.append(Stored(call.begun, str(view["sha256"]), size, received))
    return found


def _responses(buffer: bytearray) -> list[tuple[int, bytes]]:
    found = []
    while (head := _HEAD.match(buffer)) is not None:
        length = _LENGTH.search(head[0])
        end = head.end() + (int(length[1]) if length else 0)
        if len(buffer) < end:
            break
        found.append((int(head[1]), bytes(buffer[head.end() : end])))
        del buffer[:end]
    return found


def reopen(root: Path) -> ArtifactStore:
    """Open a directory as the product does."""
    return ArtifactStore(
        root,
        artifact_bytes_max=1 << 30,
        part_bytes_max=1 << 23,
        uploads_max=1000,
        upload_idle_s=86400.0,
        disk_free_bytes_min=0,
        now=time.time,
    )


def wrong_files(root: Path) -> list[str]:
    """Return names of complete artifacts that stand for other bytes."""
    return [
        path.name
        for path in sorted(root.glob("[0-9a-f][0-9a-f]/*"))
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name
    ]

"""Looking at, and breaking, a cluster that really runs."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import apsw
import httpx

from hcna_ray.config import Settings
from hcna_ray.core.models import Token
from hcna_ray.runtime.journal import RunnerFiles, read_note
from hcna_ray.store import codec
from hcna_ray.store.sqlite import SqliteTaskReader
from hcna_ray.supervisor.ports import marker_of
from hcna_ray.supervisor.processes import ProcessRef, describe, identify, scan, send
from hcna_ray.supervisor.state import read_state

T = TypeVar("T")
_LISTEN = "0A"


def eventually(look: Callable[[], T], timeout_s: float, what: str, pause_s: float = 0.1) -> T:
    """Return the first true answer of ``look``; fail when there is none in time."""
    end = time.monotonic() + timeout_s
    while True:
        if found := look():
            return found
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(pause_s)


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that ``share`` of all values do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


@contextmanager
def reading(settings: Settings) -> Iterator[SqliteTaskReader]:
    """Open the cluster's store for reading."""
    reader = SqliteTaskReader(settings.home / "queue.db")
    try:
        yield reader
    finally:
        reader.close()


def incarnation(settings: Settings) -> str:
    """Return the present life of the worker's agent, as the moderator has it stored."""
    flags = apsw.SQLITE_OPEN_READONLY
    db = apsw.Connection(str(settings.home / "queue.db"), flags=flags)
    try:
        ((body,),) = db.execute("SELECT body FROM worker WHERE name = ?", (settings.worker.name,))
    finally:
        db.close()
    return codec.unpack_worker(body).incarnation


# -- processes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process of an instance."""

    ref: ProcessRef
    command: str

    @property
    def pid(self) -> int:
        return self.ref.pid

    @property
    def alive(self) -> bool:
        return identify(self.ref.pid) == self.ref

    def signal(self, number: signal.Signals) -> None:
        """Signal exactly this process."""
        assert send(self.ref, number), f"gone before it was signalled: {self.command}"

    def kill(self) -> None:
        """``kill -9``, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait_gone(10)

    def wait_gone(self, timeout_s: float) -> None:
        """Wait until it has ended."""
        eventually(lambda: not self.alive, timeout_s, f"{self.command} ends", pause_s=0.01)


def processes(settings: Settings) -> list[Process]:
    """Return every process of the instance."""
    found = [(ref, describe(ref)) for ref in scan(marker_of(settings))]
    return [Process(ref, text.partition(" ")[2]) for ref, text in found]


def process(settings: Settings, what: str) -> Process:
    """Return the one process of the instance whose command contains ``what``."""
    found = [one for one in processes(settings) if what in one.command]
    assert len(found) == 1, f"{what!r}: {[one.command for one in found]}"
    return found[0]


def process_of(settings: Settings, pid: int) -> Process:
    """Return the process with this pid, which must belong to the instance."""
    found = [one for one in processes(settings) if one.pid == pid]
    assert found, f"{pid} is no process of this instance"
    return found[0]


def raylet_of(settings: Settings, member: str) -> Process:
    """Return the raylet below the supervisor's member ``head`` or ``worker``."""
    node = int(read_state(settings.run_dir)["members"][member]["pid"])
    found = [
        one
        for one in processes(settings)
        if "/raylet/raylet" in one.command and _parent(one.pid) == node
    ]
    assert len(found) == 1, f"raylets of {member}: {found}"
    return found[0]


def moderator(settings: Settings, url: str) -> Process:
    """Return the moderator's process, as soon as ``GET /status`` names one."""

    def pid() -> int:
        seen = httpx.get(f"{url}/status", timeout=10).json()["moderator"]
        return 0 if seen is None else int(seen["pid"])

    # What C1 asked of one that has just ended is waited for, and shared, for two seconds.
    return process_of(settings, eventually(pid, 10, "a moderator in /status"))


def slots(settings: Settings) -> int:
    """Return how many slots of W1 ask the moderator for work, or run it."""
    own = f"ray::slot:{settings.worker.name}:"
    return sum(1 for one in processes(settings) if one.command.startswith(own))


def runners(settings: Settings) -> dict[int, tuple[str, Token]]:
    """Return what W1's processes run now: pid to task id and token."""
    folder = settings.outbox_dir.parent / settings.worker.name
    found = {}
    for path in folder.glob("*.note"):
        note = read_note(RunnerFiles(folder, path.name.removesuffix(".note")))
        if note is not None and note.task_id and identify(note.pid):
            found[note.pid] = (note.task_id, note.token)
    return found


def all_processes() -> dict[int, str]:
    """Return every process of this machine that is no zombie: pid to command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (ref := identify(int(entry.name))):
            found[ref.pid] = describe(ref)
    return found


def mentions(pid: int, names: Iterable[str]) -> bool:
    """Whether a process's command, environment or open files name one of these paths."""
    folder = Path(f"/proc/{pid}")
    texts: list[str] = []
    for name in ("cmdline", "environ"):
        try:
            texts.append((folder / name).read_bytes().decode("utf-8", "replace"))
        except OSError:
            continue
    try:
        texts += [str(one.readlink()) for one in (folder / "fd").iterdir()]
    except OSError:
        pass
    return any(name in text for name in names for text in texts)


def listening_ports() -> set[int]:
    """Return every TCP port of this machine on which something listens (as ``ss -ltn`` would)."""
    ports = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(stat[1])


def post(url: str, api_key: str, path: str) -> None:
    """POST without a body to C1, which must agree."""
    headers = {"Authorization": f"Bearer {api_key}"}
    httpx.post(url + path, headers=headers, timeout=20).raise_for_status()


# -- many connections at once ----------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An HTTP answer and how long it took, in seconds."""

    status: int
    body: bytes
    took_s: float

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One keep-alive HTTP connection, as thin as it can be: thousands fit into one test."""

    def __init__(self, url: str, api_key: str) -> None:
        """Remember where to; nothing is opened yet."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port, self._key = parts.hostname, parts.port or 80, api_key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def send(self, method: str, path: str, body: bytes = b"") -> None:
        """Send a request without waiting for its answer."""
        assert self._writer is not None
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def receive(self) -> tuple[int, bytes]:
        """Wait for the answer: its status and body."""
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        if "content-length" in headers:
            body = await self._reader.readexactly(int(headers["content-length"]))
        else:
            body = await self._chunks()
        return int(lines[0].split()[1]), body

    async def ask(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Send a request and wait for its answer."""
        started = time.perf_counter()
        await self.send(method, path, body)
        status, answer = await self.receive()
        return Reply(status, answer, time.perf_counter() - started)

    async def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
            await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def _chunks(self) -> bytes:
        assert self._reader is not None
        parts: list[bytes] = []
        while size := int(await self._reader.readline(), 16):
            parts.append(await self._reader.readexactly(size))
            await self._reader.readline()
        await self._reader.readline()
        return b"".join(parts)


async def timed_posts(
    url: str, api_key: str, bodies: Sequence[bytes], *, connections: int
) -> list[Reply]:
    """POST tasks over some connections, each one request after the other."""
    todo = iter(bodies)
    replies: list[Reply] = []

    async def one_after_the_other() -> None:
        wire = Wire(url, api_key)
        await wire.open()
        try:
            for body in todo:
                replies.append(await wire.ask("POST", "/tasks", body))
        finally:
            await wire.close()

    await asyncio.gather(*(one_after_the_other() for _ in range(connections)))
    return replies


def free_files(wanted: int) -> None:
    """Let this process open so many files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= wanted, "too few files allowed"

"""``hcna measure``: first figures of this cluster, on this machine, with this disk.

The load comes from a small HTTP/1.1 client over asyncio streams, because a full client library
would use more of the machine than C1 does. Everything is bounded: connections, seconds, tasks.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import typer

from hcna_ray.cli.terminal import AsJson, CommandFailed, ExitCode, open_client, print_json, talk
from hcna_ray.client.discovery import hcna_home

#: Longest wait for one answer, seconds; more than C1's own ``?wait=30``.
ANSWER_TIMEOUT_S = 60.0
#: No run submits more tasks than this.
TASKS_MAX = 200_000
_ECHO = b'{"task_type":"echo","payload":{"message":"measure"}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured; rates per second, times in milliseconds."""

    single_p50_ms: float
    single_p99_ms: float
    single_count: int
    accepts_per_s: float
    accept_p50_ms: float
    accept_p99_ms: float
    accepted: int
    refused: int
    completes_per_s: float
    connections: int
    fdatasync_p50_ms: float
    cpus: int


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(measure)


def measure(
    count: Annotated[int, typer.Option(min=10, max=10_000, help="Single tasks to time.")] = 200,
    connections: Annotated[
        int, typer.Option(min=1, max=512, help="Keep-alive connections that submit.")
    ] = 32,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=60, help="How long to submit, seconds.")
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Measure one echo from POST to completed, accepts and completions a second, and the disk."""
    console = talk()
    with open_client() as client:
        health = client.health()
        client.workers()  # Is the key right? Better one clear error than 32.
        url, key = client.url, client.api_key or ""
        if health.worker_nodes < 1:
            raise CommandFailed("no worker is online, nothing would complete", "hcna workers")
        console.print(f"measuring {url}, about {seconds + 5:.0f} s")
        target = Target.parse(url, key)
        singles = asyncio.run(time_singles(target, count=count, warm_up=20))
        burst = asyncio.run(run_burst(target, connections=connections, seconds=seconds))
        deadline_s = 60 + len(burst.task_ids) / 20
        for _ in client.as_completed(burst.task_ids, deadline_s):
            pass
        completed_s = time.perf_counter() - burst.started_at
    disk = time_fdatasync(hcna_home(os.environ))
    figures = Figures(
        single_p50_ms=quantile(singles, 0.5),
        single_p99_ms=quantile(singles, 0.99),
        single_count=len(singles),
        accepts_per_s=round(len(burst.task_ids) / burst.took_s, 1),
        accept_p50_ms=quantile(burst.latencies_ms, 0.5),
        accept_p99_ms=quantile(burst.latencies_ms, 0.99),
        accepted=len(burst.task_ids),
        refused=burst.refused,
        completes_per_s=round(len(burst.task_ids) / completed_s, 1),
        connections=connections,
        fdatasync_p50_ms=quantile(disk, 0.5),
        cpus=os.cpu_count() or 1,
    )
    if as_json:
        print_json(asdict(figures))
        return
    for line in lines_of(figures):
        typer.echo(line)


def lines_of(figures: Figures) -> list[str]:
    """The figures for people."""
    return [
        f"single echo, POST to completed  p50 {figures.single_p50_ms:.2f} ms, "
        f"p99 {figures.single_p99_ms:.2f} ms (n = {figures.single_count})",
        f"accepted, {figures.connections} connections        {figures.accepts_per_s:.0f} /s "
        f"(p50 {figures.accept_p50_ms:.1f} ms, p99 {figures.accept_p99_ms:.1f} ms, "
        f"{figures.refused} refused)",
        f"completed                       {figures.completes_per_s:.0f} /s "
        f"({figures.accepted} tasks)",
        f"fdatasync in $HCNA_HOME         p50 {figures.fdatasync_p50_ms:.3f} ms",
        f"machine                         {figures.cpus} CPUs, client on the same ones",
    ]


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile, rounded to a microsecond; 0 for no values."""
    if not values:
        return 0.0
    ranked = sorted(values)
    return round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 3)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send, with the parts of a request that never change."""

    host: str
    port: int
    tls: bool
    prefix: str
    head: str

    @classmethod
    def parse(cls, url: str, api_key: str) -> Self:
        """Take C1's address apart."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        host = parts.hostname or "127.0.0.1"
        head = f"Host: {parts.netloc}\r\nAuthorization: Bearer {api_key}\r\n"
        return cls(host, port, tls, parts.path.rstrip("/"), head)

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of a POST."""
        head = f"POST {self.prefix}{path} HTTP/1.1\r\n{self.head}"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def get(self, path: str) -> bytes:
        """The bytes of a GET."""
        return f"GET {self.prefix}{path} HTTP/1.1\r\n{self.head}\r\n".encode()


class Connection:
    """One keep-alive connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, target: Target) -> Self:
        """Connect."""
        context = ssl.create_default_context() if target.tls else None
        opening = asyncio.open_connection(target.host, target.port, ssl=context)
        return cls(*await asyncio.wait_for(opening, 5.0))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; returns status and body.

        Raises:
            CommandFailed: The answer has no Content-Length, or the connection was closed.
        """
        self._writer.write(request)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            try:
                head = await self._reader.readuntil(b"\r\n\r\n")
                fields = head.lower()
                mark = fields.find(b"\r\ncontent-length:")
                if mark < 0:
                    raise CommandFailed(
                        "the answer has no Content-Length", "measure C1 without a proxy in front"
                    )
                length = int(fields[mark + 17 : fields.index(b"\r\n", mark + 17)])
                return int(head[9:12]), await self._reader.readexactly(length)
            except asyncio.IncompleteReadError:
                raise CommandFailed(
                    "C1 closed the connection", "hcna status", ExitCode.UNREACHABLE
                ) from None

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()


async def time_singles(target: Target, *, count: int, warm_up: int) -> list[float]:
    """Milliseconds from POST to seeing ``completed`` through ``?wait=``, one task at a time."""
    connection = await Connection.open(target)
    took_ms: list[float] = []
    try:
        for number in range(warm_up + count):
            started = time.perf_counter()
            status, body = await connection.ask(target.post("/tasks", _ECHO))
            task_id = _task_id(status, body)
            _, body = await connection.ask(target.get(f"/tasks/{task_id}?wait=30"))
            ended = time.perf_counter()
            view: dict[str, Any] = json.loads(body)
            if view.get("status") != "completed":
                raise CommandFailed(
                    f"{task_id} is {view.get('status')} after 30 s", f"hcna why {task_id}"
                )
            if number >= warm_up:
                took_ms.append((ended - started) * 1000)
    finally:
        connection.close()
    return took_ms


@dataclass(frozen=True, slots=True)
class Burst:
    """What a burst of submits did; ``started_at`` is of `time.perf_counter`."""

    task_ids: list[str]
    refused: int
    latencies_ms: list[float]
    started_at: float
    took_s: float


async def run_burst(target: Target, *, connections: int, seconds: float) -> Burst:
    """Submit as fast as C1 accepts, on so many connections, for so many seconds."""
    opened = [await Connection.open(target) for _ in range(connections)]
    request = target.post("/tasks", _ECHO)
    task_ids: list[str] = []
    latencies_ms: list[float] = []
    refused = 0
    started = time.perf_counter()

    async def submit(connection: Connection) -> None:
        nonlocal refused
        while True:
            sent = time.perf_counter()
            if sent - started >= seconds or len(task_ids) >= TASKS_MAX:
                return
            status, body = await connection.ask(request)
            if status in (429, 503):
                refused += 1
                await asyncio.sleep(0.01)
                continue
            latencies_ms.append((time.perf_counter() - sent) * 1000)
            task_ids.append(_task_id(status, body))

    try:
        async with asyncio.TaskGroup() as group:
            for connection in opened:
                group.create_task(submit(connection))
    except* CommandFailed as failures:
        raise failures.exceptions[0] from None
    finally:
        for connection in opened:
            connection.close()
    return Burst(task_ids, refused, latencies_ms, started, time.perf_counter() - started)


def _task_id(status: int, body: bytes) -> str:
    if status != 202:
        told = body[:200].decode("utf-8", "replace")
        raise CommandFailed(f"C1 answered {status}: {told}", "hcna status", ExitCode.REFUSED)
    return str(json.loads(body)["task_id"])


def time_fdatasync(home: Path, *, count: int = 200) -> list[float]:
    """Milliseconds of ``fdatasync`` after a 4 KiB write, on the disk that holds ``home``."""
    place = home if home.is_dir() else Path(tempfile.gettempdir())
    took_ms: list[float] = []
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(count):
            file.write(b"x" * 4096)
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took_ms.append((time.perf_counter() - started) * 1000)
    return took_ms

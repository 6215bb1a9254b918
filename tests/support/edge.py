"""A real edge before a real C1 in this process: HAProxy with our configuration, uvicorn, TLS.

C1's application runs in a thread of its own around a fake moderator; what reaches it is recorded.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hcna_ray.config import (
    CompositeSecuritySettings,
    CompositeSettings,
    EdgeSettings,
    ModeratorSettings,
    PortSettings,
    RaySettings,
    Settings,
)
from hcna_ray.durable import write_private
from hcna_ray.supervisor.edge import edge_command
from hcna_ray.supervisor.edge_keeper import EdgeKeeper
from hcna_ray.supervisor.edge_log import EdgeLog
from tests.support.c1 import EDGE_MARK, Composite, a_composite
from tests.support.handshakes import connect_here

NAME = "c1.example.org"
#: Whoever waits longer than this for the machine has found a fault.
PATIENCE_S = 20.0
#: What HAProxy prints when it has read its files.
_SERVES = "Loading success"


@dataclass
class Recorder:
    """Stands before the application and notes what reaches it."""

    app: ASGIApp | None = None
    #: The C1 behind it.
    composite: Composite | None = None
    #: (method, path, header fields), in order.
    seen: list[tuple[str, str, list[tuple[str, str]]]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        if scope["type"] == "http":
            fields = [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]]
            self.seen.append((scope["method"], scope["path"], fields))
        await self.app(scope, receive, send)

    def headers(self) -> dict[str, str]:
        """Return the header fields of the last request."""
        return dict(self.seen[-1][2])


@contextmanager
def served(
    home: Path, *, hosts: tuple[str, ...] = (), limits: dict[str, Any] | None = None
) -> Iterator[tuple[int, Recorder]]:
    """Serve C1 on a loopback port; yield the port and what reaches it."""
    recorder, listening = Recorder(), socket.socket()
    listening.bind(("127.0.0.1", 0))
    started, server = threading.Event(), None

    async def serve() -> None:
        nonlocal server
        async with a_composite(home, hosts=hosts, edge=True, limits=limits) as composite:
            recorder.app, recorder.composite = composite.app, composite
            config = uvicorn.Config(recorder, lifespan="off", log_config=None, access_log=False)
            server = uvicorn.Server(config)
            running = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
            started.set()
            await running

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield listening.getsockname()[1], recorder
    finally:
        assert server is not None
        server.should_exit = True
        thread.join(PATIENCE_S)
        listening.close()


@dataclass
class RunningEdge:
    """An edge that serves, and how to reach it."""

    settings: Settings
    process: subprocess.Popen[bytes]
    keeper: EdgeKeeper
    output: Path

    @property
    def port(self) -> int:
        return self.settings.api_port

    @property
    def trust(self) -> Path:
        """The authorities that its certificate comes from."""
        return self.settings.cluster_dir / "trust.pem"

    def context(self) -> ssl.SSLContext:
        """Return a client's context that believes the cluster's authority."""
        return ssl.create_default_context(cafile=self.trust)

    def connect(
        self, context: ssl.SSLContext | None = None, called: str = NAME, *, timeout_s: float = 20.0
    ) -> ssl.SSLSocket:
        """Return a connection to the public entrance, its handshake done."""
        return connect_here(context or self.context(), self.port, called, timeout_s=timeout_s)

    def reload(self, *, ends_with: str = _SERVES) -> None:
        """Have it read its files anew, as the supervisor does, and wait until it has."""
        before = self.log().count(ends_with)
        for turn in range(2000):
            if turn % 200 == 0:  # One that comes while it starts anew may be lost.
                self.process.send_signal(signal.SIGUSR2)
            if self.log().count(ends_with) > before:
                return
            assert not self._is_over(0.01), self.log()
        raise AssertionError(self.log())

    def logged(self, text: str) -> str:
        """Return the last line about a request that holds a text, waiting for it."""
        for _ in range(2000):
            found = [line for line in self.requests().splitlines() if text in line]
            if found:
                return found[-1]
            assert not self._is_over(0.01), self.log()
        raise AssertionError(self.log())

    def _is_over(self, wait_s: float) -> bool:
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def requests(self) -> str:
        """Return its log of requests."""
        path = self.settings.logs_dir / "edge.log"
        return path.read_text() if path.exists() else ""

    def log(self) -> str:
        """Return what it has printed."""
        return self.output.read_text()


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def edge_settings(home: Path, behind: int, **security: Any) -> Settings:
    """Return settings of an M1 whose C1 is on the port ``behind``."""
    edge = {
        name: security.pop(name) for name in list(security) if name in EdgeSettings.model_fields
    }
    public, control = free_ports(2)
    return Settings(
        home=home,
        composite=CompositeSettings(
            api_port=public,
            hosts=(NAME,),
            security=CompositeSecuritySettings(enable_tls=True, **security),
            edge=EdgeSettings(**edge),
        ),
        moderator=ModeratorSettings(control_port=control),
        ports=PortSettings(serve_http=behind),
        ray=RaySettings(temp_dir=home / "t"),
    )


@contextmanager
def running_edge(
    home: Path, behind: int, *, prepare: Callable[[Settings], None] | None = None, **options: Any
) -> Iterator[RunningEdge]:
    """Run the edge as the supervisor would, before the C1 on the port ``behind``."""
    settings = edge_settings(home, behind, **options)
    write_private(settings.cluster_dir / "edge.mark", EDGE_MARK)
    if prepare is not None:
        prepare(settings)
    keeper = EdgeKeeper(settings, addresses=lambda: ("127.0.0.1",))
    keeper.prepare(now=datetime.now(UTC))
    log = EdgeLog.of(settings)
    log.start()
    output = home / "edge.out"
    with output.open("ab") as stream:
        process = subprocess.Popen(
            ["nice", "-n", "5", *edge_command(settings)], stdout=stream, stderr=stream
        )
    try:
        # It listens before it says so, and `RunningEdge.reload` waits for the next such word.
        wait_until_it_listens(settings.api_port, process, output, said=_SERVES)
        yield RunningEdge(settings, process, keeper, output)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        log.stop()


def wait_until_it_listens(
    port: int, process: subprocess.Popen[bytes], output: Path, *, said: str = ""
) -> None:
    """Wait until a process listens on a port, and has printed something if that is wanted."""
    for _ in range(2000):
        assert process.poll() is None, output.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0 and said in output.read_text():
                return
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(output.read_text())


def write_pem(path: Path, *parts: str) -> Path:
    """Write keys and certificates into one file; return its path."""
    write_private(path, "".join(parts))
    return path

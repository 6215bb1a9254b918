"""Forks slots and heavy attempts that talk to a test over a socket: real processes without Ray.

``python -m tests.support.runner_zygote <socket> <home>`` imports everything once, then forks a
process for each JSON line on its standard input. A process says who it is on each connection that
it opens: ``control`` (attach, and goodbye), ``exchange`` and ``report``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel

from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError, ModeratorUnavailable
from hcna_ray.core.models import Token
from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.registry import AnyPayload, Registry
from hcna_ray.runtime import attempts, journal, runner
from hcna_ray.runtime.journal import RunnerFiles
from hcna_ray.runtime.messages import Exchange, Grant, Offer, Report
from hcna_ray.runtime.runner import Runner, RunnerSettings

#: Files whose lines count when a process is told to die at the n-th.
COUNTED = frozenset({attempts.__file__, journal.__file__, runner.__file__, __file__})


class Caller:
    """One connection to the test: a call, then its answer."""

    def __init__(self, address: str, name: str, role: str) -> None:
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(address)
        self._connection = Connection(plain.detach())
        self._connection.send((name, role))

    def call(self, value: object) -> Any:
        try:
            self._connection.send(value)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ModeratorUnavailable("the test has gone") from error
        if isinstance(answer, HcnaError):
            raise answer
        return answer


class PipeLink:
    """A slot's calls over the two connections."""

    def __init__(self, address: str, name: str) -> None:
        self._exchanges = Caller(address, name, "exchange")
        self._reports = Caller(address, name, "report")

    def exchange(self, exchange: Exchange) -> Grant:
        grant: Grant = self._exchanges.call(exchange)
        return grant

    def report(self, reports: tuple[Report, ...]) -> bool:
        try:
            self._reports.call(reports)
        except HcnaError:
            return False
        return True


class NoArtifacts:
    """No test here has files."""

    def put(self, path: Path) -> tuple[str, int]:
        raise AssertionError(path)

    def get(self, sha256: str) -> Path:
        raise AssertionError(sha256)


def a_registry(home: Path) -> Registry:
    """Return handlers that leave a line in ``home/effects`` when they start."""
    registry = Registry()
    effects = os.open(home / "effects", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(ctx: TaskContext) -> None:
        os.write(effects, f"{ctx.task_id} {ctx.fence.generation} {ctx.fence.attempt}\n".encode())

    @registry.task("effect", payload=AnyPayload)
    def effect(_payload: BaseModel, ctx: TaskContext) -> dict[str, int]:
        note(ctx)
        return {"pid": os.getpid()}

    @registry.task("block", payload=AnyPayload)
    def block(_payload: BaseModel, ctx: TaskContext) -> None:
        note(ctx)
        time.sleep(60.0)

    @registry.task("stubborn", payload=AnyPayload)
    def stubborn(_payload: BaseModel, ctx: TaskContext) -> None:
        with subprocess.Popen(["sleep", "60"]) as child:
            (home / f"{ctx.task_id}.child").write_text(str(child.pid))
            note(ctx)
            while True:
                try:
                    time.sleep(60.0)
                except HcnaError:
                    continue

    @registry.task("family", payload=AnyPayload)
    def family(_payload: BaseModel, ctx: TaskContext) -> None:
        child = subprocess.Popen(["sleep", "60"])
        (home / f"{ctx.task_id}.child").write_text(str(child.pid))
        note(ctx)
        time.sleep(60.0)

    return registry


def die_at_line(number: int) -> None:
    """End this process by SIGKILL before it executes the n-th line of the product's runner."""
    left = [number]

    def on_line(frame: FrameType, event: str, _arg: object) -> Callable[..., Any]:
        if event == "line":
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, _event: str, _arg: object) -> Callable[..., Any] | None:
        return on_line if frame.f_code.co_filename in COUNTED else None

    threading.settrace(on_call)
    sys.settrace(on_call)


def run_process(address: str, home: Path, order: dict[str, Any]) -> None:
    """Be a slot (or a heavy attempt, if there is an offer) as `hcna_ray.runtime.attempts` is."""
    attempts.lead_own_group()
    name = str(order["name"])
    control, link = Caller(address, name, "control"), PipeLink(address, name)
    if order["die_at_line"] is not None:
        die_at_line(order["die_at_line"])
    serving = Runner(
        RunnerSettings(worker="W1", node_id="W1", disk_path=home, scratch_root=home),
        a_registry(home),
        RunnerFiles(home / "outbox", name),
        link,
        NoArtifacts(),
        SystemClock(),
    )
    if not control.call(("attach", os.getpid())):
        return
    with serving.serving():
        if order["offer"] is None:
            attempts.serve_slot(serving, link.exchange, "W1", order["incarnation"], order["slot"])
        else:
            offer = Offer(*order["offer"])
            payload = str(offer.payload).encode()
            serving.run((offer._replace(token=Token(*offer.token), payload=payload),))
            serving.flush(5.0)
    attempts.end_children()
    control.call(("goodbye", 0))


def main(address: str, home: Path) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for them.
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = 1
            try:
                run_process(address, home, json.loads(line))
                status = 0
            finally:
                os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Task types of the workshop (`tests.support.workshop`), imported by its nurseries.

Each handler first leaves a line in ``$HCNA_RIG/effects``: a witness that nothing of the product
writes. If there is a file ``$HCNA_RIG/die``, every executor forked from then on ends by SIGKILL
before a random line of the product's own code.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel

from hcna_ray import task
from hcna_ray.core.errors import HcnaError
from hcna_ray.handlers import Payload, TaskContext
from hcna_ray.handlers.registry import AnyPayload

RIG = Path(os.environ["HCNA_RIG"])
TASK_TYPES = ("rig.block", "rig.effect", "rig.exit", "rig.family", "rig.stubborn")
#: Modules whose lines count.
COUNTED = ("channel.py", "executor.py", "journal.py", "runner.py", "rig_handlers.py")


def _note(ctx: TaskContext) -> None:
    line = f"{ctx.task_id} {ctx.fence.generation} {ctx.fence.attempt}\n".encode()
    effects = os.open(RIG / "effects", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(effects, line)
    os.close(effects)


def _child(ctx: TaskContext) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(["sleep", "60"])
    (RIG / f"{ctx.task_id}.child").write_text(str(child.pid))
    return child


@task("rig.effect", payload=AnyPayload)
def effect(_payload: BaseModel, ctx: TaskContext) -> dict[str, int]:
    """Do nothing but leave the line."""
    _note(ctx)
    return {"pid": os.getpid()}


@task("rig.look", payload=AnyPayload)
def look(_payload: BaseModel, ctx: TaskContext) -> dict[str, Any]:
    """Tell what this process was given: its environment, its command line, its open files."""
    _note(ctx)
    own = Path("/proc/self")
    files = {}
    for number in os.listdir(own / "fd"):
        try:
            files[number] = os.readlink(own / "fd" / number)
        except FileNotFoundError:
            continue  # The one that the list was read from.
    return {
        "environ": dict(os.environ),
        "begun_with": (own / "environ").read_bytes().decode("latin-1").split("\0"),
        "command": (own / "cmdline").read_bytes().decode("latin-1").split("\0"),
        "files": files,
        "modules": sorted(sys.modules),
        "parent": os.getppid(),
    }


@task("rig.block", payload=AnyPayload)
def block(_payload: BaseModel, ctx: TaskContext) -> None:
    """Sit in one call that knows nothing of cancelling."""
    _note(ctx)
    time.sleep(60.0)


@task("rig.stubborn", payload=AnyPayload)
def stubborn(_payload: BaseModel, ctx: TaskContext) -> None:
    """Refuse to stop, with a child process."""
    _child(ctx)
    _note(ctx)
    while True:
        try:
            time.sleep(60.0)
        except HcnaError:
            continue


@task("rig.family", payload=AnyPayload)
def family(_payload: BaseModel, ctx: TaskContext) -> None:
    """Leave a child process behind when it is stopped."""
    _child(ctx)
    _note(ctx)
    time.sleep(60.0)


@task("rig.print", payload=AnyPayload)
def say(_payload: BaseModel, ctx: TaskContext) -> None:
    """Print a little, in every way there is."""
    print("printed by", ctx.task_id)  # noqa: T201
    print("an error", file=sys.stderr)  # noqa: T201
    os.write(1, b"written\n")
    subprocess.run(["echo", "by a child"], check=True)
    _note(ctx)


@task("rig.flood", payload=AnyPayload)
def flood(_payload: BaseModel, ctx: TaskContext) -> None:
    """Print one line without end, and have a child do so."""
    subprocess.Popen(["tr", "\\0", "x"], stdin=open("/dev/zero", "rb"))  # noqa: SIM115
    _note(ctx)
    while True:
        print("y" * 1000, end="")  # noqa: T201


class FilePayload(Payload):
    """Which artifact."""

    artifact: str


@task("rig.make", payload=AnyPayload)
def make(_payload: BaseModel, ctx: TaskContext) -> dict[str, str]:
    """Make an artifact, and return a digest that it has nothing to do with beside its own."""
    path = ctx.scratch / "made"
    path.write_bytes(b"made here")
    return {"artifact": ctx.artifact(path).sha256, "other": "0" * 64}


@task("rig.read", payload=FilePayload)
def read(payload: FilePayload, ctx: TaskContext) -> dict[str, str]:
    """Read an artifact."""
    path = ctx.open_artifact(payload.artifact, field="payload.artifact")
    return {"text": path.read_text()}


@task("rig.traced", payload=AnyPayload)
def traced(_payload: BaseModel, ctx: TaskContext) -> dict[str, str | None]:
    """Do one step in a span of its own, through OpenTelemetry's ordinary interface."""
    from opentelemetry import trace

    with trace.get_tracer("rig").start_as_current_span("a step"):
        _note(ctx)
        ctx.log.info("a step is done", extra={"action": "rig.step"})
    return {"traceparent": ctx.traceparent}


@task("rig.exit", payload=AnyPayload)
def leave(_payload: BaseModel, ctx: TaskContext) -> None:
    """End the whole process, as a crashing library does."""
    _note(ctx)
    os._exit(3)


def _die_somewhere() -> None:
    try:
        low, high = json.loads((RIG / "die").read_text())
    except FileNotFoundError:
        return
    left = [random.SystemRandom().randrange(low, high)]

    def on_line(_frame: FrameType, event: str, _arg: object) -> Callable[..., Any]:
        if event == "line":
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, _event: str, _arg: object) -> Callable[..., Any] | None:
        return on_line if frame.f_code.co_filename.endswith(COUNTED) else None

    threading.settrace(on_call)
    sys.settrace(on_call)


os.register_at_fork(after_in_child=_die_somewhere)

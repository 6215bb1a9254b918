"""The task type of `tests.support.checked_run`: every execution writes its own lines."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from pydantic import Field

from hcna_ray import task
from hcna_ray.handlers import Payload, TaskContext
from tests.checker.recorder import SideEffectLog

TASK_TYPES = ("check.other", "check.work")


class WorkPayload(Payload):
    """Where to write the lines, how long to work, and what to do instead of succeeding."""

    effects: str
    nonce: str
    seconds: float = Field(default=0.0, ge=0, le=60)
    fail_until: int = Field(default=1, ge=1, description="First attempt that does not raise.")
    die_until: int = Field(default=1, ge=1, description="First attempt that does not die.")
    artifact: str | None = Field(default=None, description="SHA-256 of one to read first.")


@task("check.work", payload=WorkPayload, max_attempts=3, backoff_s=0.05, retry_on=["OSError"])
def work(payload: WorkPayload, ctx: TaskContext) -> dict[str, object]:
    """Write the first line, do as asked, write the last one."""
    lines = SideEffectLog(Path(payload.effects), ctx.task_id, ctx.fence, ctx.worker)
    lines.start(payload.nonce)
    if payload.artifact is not None:
        ctx.open_artifact(payload.artifact).read_bytes()
    if payload.seconds > 1.0:
        time.sleep(payload.seconds)  # One call that knows nothing of cancelling.
    elif payload.seconds:
        ctx.pause(payload.seconds)
    if ctx.attempt < payload.die_until:
        os.kill(os.getpid(), signal.SIGKILL)
    if ctx.attempt < payload.fail_until:
        raise OSError(f"attempt {ctx.attempt} fails, as asked")
    result: dict[str, object] = {"nonce": payload.nonce, "attempt": ctx.attempt}
    lines.end(result)
    return result


@task("check.other", payload=WorkPayload)
def other(payload: WorkPayload, ctx: TaskContext) -> dict[str, object]:
    """Do the same under another name: a lane of its own, and no retries."""
    return work(payload, ctx)

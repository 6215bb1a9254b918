"""Example task types: a plain function, one that needs retries, a generator, a side effect.

hcna-ray imports this module because ``pyproject.toml`` names it in the group ``hcna_ray.tasks``.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator

from pydantic import BaseModel, Field

from hcna_ray import task
from hcna_ray.handlers import Payload, TaskContext


class WordCountPayload(Payload):
    """A text and how much to say about it."""

    text: str = Field(max_length=1_000_000)
    top: int = Field(
        default=3, ge=0, le=100, description="How many of the commonest words to name."
    )


class WordCountResult(BaseModel):
    """Words of a text, told apart without regard to case."""

    words: int
    unique: int
    #: The commonest words with their counts, commonest first; equals in order of appearance.
    top: list[tuple[str, int]]


@task("example.word_count", payload=WordCountPayload, result=WordCountResult)
def word_count(payload: WordCountPayload) -> WordCountResult:
    """Count the words of a text."""
    counts = Counter(payload.text.casefold().split())
    return WordCountResult(
        words=counts.total(), unique=len(counts), top=counts.most_common(payload.top)
    )


class FlakyPayload(Payload):
    """When to stop failing."""

    fail_until_attempt: int = Field(ge=1, le=100, description="First attempt that succeeds.")


@task("example.flaky", payload=FlakyPayload, max_attempts=5, backoff_s=0.1, retry_on=["OSError"])
def flaky(payload: FlakyPayload, ctx: TaskContext) -> dict[str, int]:
    """Fail on every attempt before the given one."""
    if ctx.attempt < payload.fail_until_attempt:
        raise OSError(f"attempt {ctx.attempt} fails, as asked")
    return {"succeeded_on_attempt": ctx.attempt}


class CountdownPayload(Payload):
    """Where to start."""

    start: int = Field(ge=0, le=10_000)


class CountdownItem(BaseModel):
    """One number of the countdown."""

    left: int


@task("example.countdown", payload=CountdownPayload, result=CountdownItem)
def countdown(payload: CountdownPayload) -> Iterator[CountdownItem]:
    """Count down to zero; each number is seen as progress at once."""
    for left in range(payload.start, -1, -1):
        yield CountdownItem(left=left)


class SpokenPayload(Payload):
    """What to print, and whether to fail after it."""

    lines: list[str] = Field(max_length=10_000)
    pause_s: float = Field(default=0.0, ge=0, le=60, description="Pause after each line.")
    fail_until_attempt: int = Field(default=1, ge=1, le=100)


@task("example.spoken", payload=SpokenPayload, max_attempts=5, backoff_s=0.1, retry_on=["OSError"])
def spoken(payload: SpokenPayload, ctx: TaskContext) -> dict[str, int]:
    """Print lines, each after the number of the attempt."""
    for line in payload.lines:
        print(f"{ctx.attempt}: {line}")  # noqa: T201
        ctx.pause(payload.pause_s)
    if ctx.attempt < payload.fail_until_attempt:
        raise OSError(f"attempt {ctx.attempt} fails, as asked")
    return {"lines": len(payload.lines)}


class MarkedPayload(Payload):
    """How long to work, where to leave marks, and whether to die instead of returning."""

    seconds: float = Field(default=0.0, ge=0, le=3600, allow_inf_nan=False)
    mark: str | None = Field(default=None, description="File that gets a line per start and end.")
    die: bool = Field(default=False, description="End the whole process instead of returning.")
    stubborn: bool = Field(default=False, description="Go on whatever one is told meanwhile.")


class MarkedResult(BaseModel):
    """Who did it."""

    pid: int


@task("example.marked", payload=MarkedPayload, result=MarkedResult)
def marked(payload: MarkedPayload, ctx: TaskContext) -> MarkedResult:
    """Wait, leaving a mark at the start and at the end: a side effect that others can count."""
    _leave_mark(payload.mark, "start", ctx)
    if payload.stubborn:
        _ignore_everybody(payload.seconds)
    elif payload.seconds:
        ctx.pause(payload.seconds)
    if payload.die:
        os._exit(9)
    _leave_mark(payload.mark, "end", ctx)
    return MarkedResult(pid=os.getpid())


def _ignore_everybody(seconds: float) -> None:
    """Wait as a handler does that was not written for being stopped: only SIGKILL ends it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            time.sleep(min(left, 0.1))
        except BaseException:
            continue


def _leave_mark(path: str | None, what: str, ctx: TaskContext) -> None:
    """Append one line in one write, so that lines of many processes never mix."""
    if path is None:
        return
    mark = {
        "what": what,
        "task_id": ctx.task_id,
        "token": list(ctx.fence),
        "pid": os.getpid(),
        "at": time.time(),
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, json.dumps(mark).encode() + b"\n")
    finally:
        os.close(descriptor)

"""Example task types: a plain function, one that needs retries, and a generator.

hcna-ray imports this module because ``pyproject.toml`` names it in the group ``hcna_ray.tasks``.
"""

from __future__ import annotations

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

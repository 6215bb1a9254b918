"""Running a handler once: bytes in, a classified outcome out.

payload bytes -> validated -> handler called -> result checked -> JSON object
     |                            |                  |
  rejected        errored | rejected | timed_out | cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hcna_ray.core.models import FailureKind, Outcome, TaskError
from hcna_ray.handlers import encoding
from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.errors import (
    InvalidPayload,
    Reject,
    ResultTooLarge,
    TaskCancelled,
    TaskTimedOut,
)
from hcna_ray.handlers.registry import TaskType
from hcna_ray.handlers.text import safe_text, short_trace, type_name

#: Results up to this size are kept with the task.
RESULT_BYTES_MAX = 256 << 10
#: What a generator may gather before its attempt fails: it would fill the worker's memory.
GATHERED_BYTES_MAX = 64 << 20
_ITEM_MESSAGE_CHARS = 200

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class HandlerOutcome:
    """How a handler ended. ``result`` exists iff it completed, ``error`` iff it failed."""

    outcome: Outcome
    #: A JSON object.
    result: bytes | None = None
    error: TaskError | None = None


class _BadResult(Exception):
    """The handler returned, but not what it promised. ``name`` is the class to show for it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(name, message)
        self.name, self.message = name, message


def run_handler(
    task_type: TaskType,
    payload_raw: bytes,
    ctx: TaskContext,
    *,
    result_bytes_max: int = RESULT_BYTES_MAX,
) -> HandlerOutcome:
    """Run one attempt of a task and tell how it ended. Removes the attempt's scratch directory.

    Blocks until the handler is done; must not be called from a running event loop. A coroutine is
    ended at the context's deadline. A plain function can be ended only by its process, or by itself
    through `TaskContext.raise_if_cancelled`.

    Args:
        task_type: What to run.
        payload_raw: JSON, as it was accepted.
        ctx: The attempt.
        result_bytes_max: Largest result to return.

    Returns:
        The outcome. Values that are not objects come back as ``{"value": ...}``, what a generator
        yielded as ``{"items": [...]}`` (with ``"value"`` if it also returned something).

    Raises:
        ResultTooLarge: The handler completed; the error's ``result`` holds what it returned.
        KeyboardInterrupt: Somebody wants this process, not the handler, to stop.
    """
    try:
        result = _complete(task_type, payload_raw, ctx)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Also SystemExit and CancelledError: a handler must not end the loop that serves others.
        return classify(error, cancelled=_cancelled(ctx))
    finally:
        ctx.close()
    if len(result) > result_bytes_max:
        too_large = ResultTooLarge(len(result), result_bytes_max)
        too_large.result = result
        raise too_large
    return HandlerOutcome(outcome=Outcome.COMPLETED, result=result)


def classify(error: BaseException, *, cancelled: bool = False) -> HandlerOutcome:
    """Turn what a handler raised into an outcome. Trusts nothing of the exception.

    Args:
        error: What it raised.
        cancelled: Whether the task was cancelled: a cancelled coroutine is then no failure.
    """
    if isinstance(error, TaskCancelled) or (
        cancelled and isinstance(error, asyncio.CancelledError)
    ):
        return HandlerOutcome(outcome=Outcome.CANCELLED)
    if isinstance(error, TaskTimedOut):
        return HandlerOutcome(
            outcome=Outcome.TIMED_OUT,
            error=TaskError(
                kind=FailureKind.TIMEOUT, type=type_name(error), message=safe_text(error)
            ),
        )
    name, message, trace = type_name(error), safe_text(error), None
    if isinstance(error, _BadResult):
        name, message = error.name, error.message
    elif not isinstance(error, InvalidPayload):
        trace = short_trace(error)
    if isinstance(error, SystemExit):
        message = f"the handler called sys.exit({message})"
    rejected = isinstance(error, (Reject, InvalidPayload))
    return HandlerOutcome(
        outcome=Outcome.ERRORED,
        error=TaskError(
            kind=FailureKind.REJECTED if rejected else FailureKind.ERROR,
            type=name,
            message=message or name,
            traceback=trace,
            retryable=not rejected,
        ),
    )


def _complete(task_type: TaskType, payload_raw: bytes, ctx: TaskContext) -> bytes:
    payload = task_type.validate_payload(payload_raw)
    answer = task_type.call(payload, ctx)
    if isinstance(answer, Generator):
        return _gather(task_type, answer, ctx)
    if isinstance(answer, AsyncGenerator):
        return asyncio.run(_until_deadline(_agather(task_type, answer, ctx), ctx))
    if isinstance(answer, Awaitable):
        answer = asyncio.run(_until_deadline(answer, ctx))
    return _as_object(_checked(task_type, answer))


async def _until_deadline(work: Awaitable[T], ctx: TaskContext) -> T:
    try:
        async with asyncio.timeout(ctx.deadline_s) as limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise TaskTimedOut from None
        raise  # The handler's own, from a socket for example: an error like any other.


class _Items:
    """What a generator yielded, already as JSON, so that its size is known and bounded."""

    def __init__(self, task_type: TaskType, ctx: TaskContext) -> None:
        self._task_type, self._ctx = task_type, ctx
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, item: object) -> None:
        raw = encode_result(_checked(self._task_type, item))
        self._size += len(raw) + 1
        if self._size > GATHERED_BYTES_MAX:
            text = f"the items exceed {GATHERED_BYTES_MAX} bytes; write them to an artifact"
            raise _BadResult("ResultTooLarge", text)
        self._parts.append(raw)
        # Cut before decoding: an item may be large, its progress line is not.
        shown = (
            item
            if isinstance(item, str)
            else raw[: 4 * _ITEM_MESSAGE_CHARS].decode("utf-8", "ignore")
        )
        self._ctx.progress(None, shown[:_ITEM_MESSAGE_CHARS])
        self._ctx.raise_if_cancelled()

    def as_object(self, value: object) -> bytes:
        tail = b"" if value is None else b',"value":' + encode_result(value)
        return b'{"items":[' + b",".join(self._parts) + b"]" + tail + b"}"


def _gather(task_type: TaskType, generator: Generator[Any, None, Any], ctx: TaskContext) -> bytes:
    items = _Items(task_type, ctx)
    try:
        while True:
            try:
                item = next(generator)
            except StopIteration as end:
                return items.as_object(end.value)
            items.add(item)
    finally:
        generator.close()


async def _agather(
    task_type: TaskType, generator: AsyncGenerator[Any, None], ctx: TaskContext
) -> bytes:
    items = _Items(task_type, ctx)
    try:
        async for item in generator:
            items.add(item)
        return items.as_object(None)
    finally:
        await generator.aclose()


def _checked(task_type: TaskType, value: object) -> object:
    """Return ``value``, as its model says it looks in JSON if the type has a result model."""
    model = task_type.result
    if model is None:
        return value
    try:
        fitted = value if type(value) is model else model.model_validate(value)
        dumped: object = fitted.model_dump(mode="json", by_alias=True)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "result"
        text = f"the result does not fit {model.__name__}: {where}: {error.errors()[0]['msg']}"
        raise _BadResult("InvalidResult", text[:500]) from None
    return dumped


def encode_result(value: object) -> bytes:
    """Return ``value`` as strict JSON, or fail the attempt with a sentence of what is wrong."""
    try:
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", by_alias=True)
        return encoding.encode(value)
    except ValueError as error:
        text = f"the result cannot be written as JSON: {safe_text(error)}"
        raise _BadResult("InvalidResult", text[:500]) from None


def _as_object(value: object) -> bytes:
    raw = encode_result(value)
    return raw if raw.startswith(b"{") else b'{"value":' + raw + b"}"


def _cancelled(ctx: TaskContext) -> bool:
    try:
        return ctx.cancelled
    except Exception:
        return False  # The effects may be what failed; the handler's own error matters more.

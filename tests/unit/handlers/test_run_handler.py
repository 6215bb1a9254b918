"""Running a handler: every way it can end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from hcna_ray.core.errors import NotFound
from hcna_ray.core.models import FailureKind, Outcome
from hcna_ray.handlers import (
    HandlerOutcome,
    Payload,
    Reject,
    ResultTooLarge,
    TaskCancelled,
    TaskContext,
    TaskType,
    run_handler,
)
from hcna_ray.handlers.run import classify


class Number(Payload):
    n: int = 0


class Sum(BaseModel):
    total: int


def run(
    handler: Callable[..., Any],
    ctx: TaskContext,
    payload: bytes = b"{}",
    *,
    result: type[BaseModel] | None = None,
    result_bytes_max: int = 256 << 10,
) -> HandlerOutcome:
    task_type = TaskType(name="acme.test", handler=handler, payload=Number, result=result)
    return run_handler(task_type, payload, ctx, result_bytes_max=result_bytes_max)


def result_of(outcome: HandlerOutcome) -> Any:
    assert outcome.error is None, outcome.error
    assert outcome.outcome is Outcome.COMPLETED
    assert outcome.result is not None
    return json.loads(outcome.result)


def raising(error: BaseException) -> Callable[[Number], None]:
    def handler(payload: Number) -> None:
        raise error

    return handler


def test_a_plain_function(context: Any) -> None:
    assert result_of(run(lambda p: {"twice": 2 * p.n}, context(), b'{"n": 4}')) == {"twice": 8}


def test_a_coroutine(context: Any) -> None:
    async def handler(payload: Number, ctx: TaskContext) -> dict[str, int]:
        await asyncio.sleep(0)
        return {"attempt": ctx.attempt}

    assert result_of(run(handler, context(attempt=7))) == {"attempt": 7}


def test_a_callable_object_with_a_coroutine(context: Any) -> None:
    class Handler:
        async def __call__(self, payload: Number) -> int:
            return payload.n

    assert result_of(run(Handler(), context(), b'{"n": 3}')) == {"value": 3}


def test_a_generator_gathers_its_items_and_shows_each(context: Any, effects: Any) -> None:
    def handler(payload: Number, ctx: TaskContext) -> Iterator[object]:
        ctx.progress(50)
        yield {"a": 1}
        yield "two"

    assert result_of(run(handler, context())) == {"items": [{"a": 1}, "two"]}
    assert effects.progress == [(50, ""), (50, '{"a":1}'), (50, "two")]


def test_what_a_generator_returns_is_kept(context: Any) -> None:
    def handler(payload: Number) -> Generator[int, None, dict[str, bool]]:
        yield 1
        return {"last": True}

    assert result_of(run(handler, context())) == {"items": [1], "value": {"last": True}}


def test_an_async_generator(context: Any) -> None:
    async def handler(payload: Number) -> AsyncIterator[int]:
        for i in range(payload.n):
            await asyncio.sleep(0)
            yield i

    assert result_of(run(handler, context(), b'{"n": 3}')) == {"items": [0, 1, 2]}
    assert result_of(run(handler, context(), b'{"n": 0}')) == {"items": []}


def test_a_cancelled_generator_is_closed(context: Any, effects: Any) -> None:
    closed = []

    def handler(payload: Number) -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    effects.cancel_after = 2
    assert run(handler, context()) == HandlerOutcome(outcome=Outcome.CANCELLED)
    assert closed == [True]


def test_a_generator_without_end_is_bounded(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcna_ray.handlers.run.GATHERED_BYTES_MAX", 1000)

    def handler(payload: Number) -> Iterator[str]:
        while True:
            yield "x" * 100

    error = run(handler, context()).error
    assert error is not None
    assert error.type == "ResultTooLarge"


@pytest.mark.parametrize("value", [None, 5, "text", [1, {"a": None}], True, 1.5])
def test_a_value_that_is_no_object_is_wrapped(context: Any, value: object) -> None:
    assert result_of(run(lambda p: value, context())) == {"value": value}


def test_models_dataclasses_and_dates_become_json(context: Any, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Point:
        x: int

    value = {
        "model": Sum(total=1),
        "point": Point(2),
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "path": tmp_path,
        "set": {3},
        "tuple": (1, 2),
        "text": "ünï\u2028",
    }
    assert result_of(run(lambda p: value, context())) == {
        "model": {"total": 1},
        "point": {"x": 2},
        "at": "2026-01-02T00:00:00Z",
        "path": str(tmp_path),
        "set": [3],
        "tuple": [1, 2],
        "text": "ünï\u2028",
    }


def circle() -> object:
    loop: dict[str, object] = {}
    loop["self"] = loop
    return loop


def deep() -> object:
    value: object = 1
    for _ in range(100_000):
        value = [value]
    return value


class Reading(BaseModel):
    value: float


@pytest.mark.parametrize(
    "make",
    [
        lambda: float("nan"),
        lambda: {"a": [float("inf")]},
        lambda: Reading(value=float("nan")),
        lambda: {"a": Reading(value=float("-inf"))},
        lambda: {1: "a", "1": "b"},
        lambda: {"a": {(1, 2): 3}},
        lambda: {"a": object()},
        lambda: {"a": b"\xff\xfe"},
        lambda: "\ud800",
        lambda: 10**5000,
        circle,
        deep,
    ],
    ids=range(12),
)
def test_a_result_that_is_not_json_is_an_error(context: Any, make: Callable[[], object]) -> None:
    outcome = run(lambda p: make(), context())

    assert outcome.result is None
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.type) == (FailureKind.ERROR, "InvalidResult")
    assert outcome.error.message.startswith("the result cannot be written as JSON")


def test_a_result_is_checked_against_its_model(context: Any) -> None:
    assert result_of(run(lambda p: {"total": "5"}, context(), result=Sum)) == {"total": 5}
    assert result_of(run(lambda p: Sum(total=6), context(), result=Sum)) == {"total": 6}

    error = run(lambda p: {"total": "many"}, context(), result=Sum).error
    assert error is not None
    assert error.type == "InvalidResult"
    assert "does not fit Sum: total:" in error.message


def test_each_item_of_a_generator_is_checked(context: Any) -> None:
    def handler(payload: Number) -> Iterator[object]:
        yield {"total": 1}
        yield {"sum": 1}

    error = run(handler, context(), result=Sum).error
    assert error is not None
    assert "does not fit Sum" in error.message


def test_an_exception_is_an_error_worth_retrying(context: Any) -> None:
    def inner() -> None:
        raise ValueError("no luck")

    def handler(payload: Number) -> None:
        try:
            inner()
        except ValueError as error:
            raise ConnectionError("gone") from error

    outcome = run(handler, context())

    assert outcome.outcome is Outcome.ERRORED
    error = outcome.error
    assert error is not None
    assert (error.kind, error.type, error.message) == ("error", "ConnectionError", "gone")
    assert error.retryable
    assert error.traceback is not None
    assert "ValueError: no luck" in error.traceback
    assert "in inner" in error.traceback
    assert "hcna_ray/handlers/run.py" not in error.traceback


def test_a_rejection_is_never_retried(context: Any) -> None:
    class Unsuitable(Reject):
        """A handler's own."""

    error = run(raising(Unsuitable("not this one")), context()).error
    assert error is not None
    assert (error.kind, error.type, error.retryable) == ("rejected", "Unsuitable", False)
    assert error.message == "not this one"


def test_a_payload_that_no_longer_fits_is_rejected(context: Any) -> None:
    error = run(lambda p: 1, context(), b'{"m": 1}').error
    assert error is not None
    assert (error.kind, error.type, error.retryable) == ("rejected", "InvalidPayload", False)
    assert "payload.m" in error.message
    assert error.traceback is None


def test_a_path_outside_the_disk_is_rejected(context: Any) -> None:
    error = run(lambda p, ctx: ctx.resolve("/etc/passwd"), context()).error
    assert error is not None
    assert (error.kind, error.type) == ("rejected", "PathOutsideDisk")


def test_cancellation_is_an_outcome_of_its_own(context: Any, effects: Any) -> None:
    assert run(raising(TaskCancelled()), context()).outcome is Outcome.CANCELLED
    stray = run(raising(asyncio.CancelledError()), context())
    assert (stray.outcome, stray.error and stray.error.type) == (Outcome.ERRORED, "CancelledError")
    effects.cancel_after = 0
    assert run(raising(asyncio.CancelledError()), context()).outcome is Outcome.CANCELLED


def test_a_coroutine_ends_at_its_deadline(context: Any, clock: Any) -> None:
    async def handler(payload: Number) -> None:
        await asyncio.Event().wait()

    outcome = run(handler, context(deadline=clock()))

    assert outcome.outcome is Outcome.TIMED_OUT
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.retryable) == (FailureKind.TIMEOUT, True)


def test_a_function_that_looks_at_the_deadline_times_out(context: Any, clock: Any) -> None:
    outcome = run(lambda p, ctx: ctx.pause(60), context(deadline=clock() + 1))
    assert outcome.outcome is Outcome.TIMED_OUT


def test_a_timeout_of_the_handlers_own_is_an_error(context: Any) -> None:
    async def handler(payload: Number) -> None:
        raise TimeoutError("socket")

    outcome = run(handler, context())
    assert outcome.outcome is Outcome.ERRORED
    assert outcome.error is not None
    assert outcome.error.type == "TimeoutError"


def test_a_handler_cannot_end_its_process(context: Any) -> None:
    error = run(lambda p: sys.exit(3), context()).error
    assert error is not None
    assert error.message == "the handler called sys.exit(3)"
    with pytest.raises(KeyboardInterrupt):
        run(raising(KeyboardInterrupt()), context())


class Liar(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise OSError("no name")


class HostileText(str):
    def encode(self, *_: object, **__: object) -> bytes:
        raise OSError("no bytes")

    def __len__(self) -> int:
        raise OSError("no length")


class Exits(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class NotText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class Odd(Exception):
    def __str__(self) -> str:
        return HostileText("odd")

    __repr__ = __str__


class Nameless(Exception, metaclass=Liar):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Exits(), "<Exits whose text raised SystemExit>"),
        (NotText(), "<NotText whose text raised TypeError>"),
        (Odd(), "odd"),
        (Nameless("x"), "x"),
        (ValueError("\ud800"), "?"),
        (ValueError(""), "ValueError"),
        (ValueError("x" * 10_000_000), "x" * 1999 + "…"),
    ],
)
def test_a_hostile_exception_breaks_nothing(context: Any, error: Exception, message: str) -> None:
    outcome = run(raising(error), context())

    assert outcome.error is not None
    assert outcome.error.message == message
    pickle.dumps(outcome)


def test_a_trace_is_bounded(context: Any) -> None:
    def dive(depth: int) -> None:
        if not depth:
            raise ValueError("ä" * 1000)
        try:
            dive(depth - 1)
        except ValueError as error:
            raise RuntimeError("ö" * 1000) from error

    error = run(lambda p: dive(100), context()).error
    assert error is not None
    assert error.traceback is not None
    assert len(error.traceback.encode()) <= 8 << 10


def test_a_result_too_large_leaves_the_decision_to_the_caller(context: Any) -> None:
    with pytest.raises(ResultTooLarge) as caught:
        run(lambda p: {"a": "x" * 100}, context(), result_bytes_max=100)

    assert (caught.value.size, caught.value.limit) == (108, 100)
    assert caught.value.result == b'{"a":"' + b"x" * 100 + b'"}'
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.size, again.limit, again.result) == (108, 100, None)


@pytest.mark.parametrize("fails", [False, True])
def test_scratch_is_gone_afterwards(context: Any, scratch_root: Path, fails: bool) -> None:
    def handler(payload: Number, ctx: TaskContext) -> None:
        (ctx.scratch / "file").write_text("x")
        if fails:
            raise NotFound("artifact", "x")

    run(handler, context())
    assert list(scratch_root.iterdir()) == []


def test_an_error_is_classified_even_if_the_effects_are_broken() -> None:
    outcome = classify(ValueError("x"))
    assert outcome.error is not None
    assert outcome.error.traceback == "ValueError: x\n"

"""Errors cross process boundaries and are matched on by code."""

from __future__ import annotations

import inspect
import pickle

import pytest

from hcna_ray.core import errors
from hcna_ray.core.errors import HcnaError

ARGUMENTS: dict[str, object] = {
    "what": "task",
    "name": "t1",
    "task_id": "t1",
    "state": "completed",
    "key": "k",
    "expected": 3,
    "code": "invalid_payload",
    "message": "payload.size must be positive",
    "problems": (("payload.size", "must be positive"),),
    "retry_after_s": 7,
    "worker": "W1",
    "incarnation": "a",
    "current": "b",
    "found": 1,
    "needed": "3.51.3",
    "known": 2,
    "event": "TimePassed",
    "why": "too short",
    "holder": "10.0.0.7",
    "generation": 1,
    "seen": 7,
    "mark": "outbox/W1/generation",
    "token": "1.2",
    "overlap": "skip",
    "count": 3,
    "setting": "limits.schedules_max",
}


def every_error() -> list[HcnaError]:
    made = []
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, HcnaError):
            own = kind.__init__ is not Exception.__init__
            names = list(inspect.signature(kind).parameters) if own else []
            named = [ARGUMENTS[name] for name in names if name in ARGUMENTS]
            made.append(kind(*named))
    return made


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: HcnaError) -> None:
    back = pickle.loads(pickle.dumps(error))

    assert type(back) is type(error)
    assert (back.code, str(back), vars(back)) == (error.code, str(error), vars(error))


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_the_module_shows_the_whole_tree(error: HcnaError) -> None:
    assert errors.__doc__ is not None
    assert type(error).__name__ in errors.__doc__


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.NotFound("worker", "W9"), "there is no worker 'W9'"),
        (errors.TaskFinished("t1", "expired"), "task t1 has already ended as expired"),
        (errors.NotFailed("t1", "queued"), "task t1 is queued; only a failed task can be retried"),
        (errors.VersionConflict("t1", 3), "task t1 is no longer at version 3"),
        (errors.Invalid("invalid_payload", "size: too small"), "size: too small"),
        (errors.Overloaded("the queue is full"), "the queue is full"),
        (errors.StaleWorker("W1", "a", "b"), "W1: incarnation a was replaced by b"),
        (
            errors.StaleAttempt("t1", "1.2"),
            "attempt 1.2 of task t1 is not in force any more: "
            "it is given no files, and none of it are kept",
        ),
        (errors.InvalidTransition("t1", "queued", "X"), "task t1: no transition from queued on X"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_says_what_is_wrong_with_what(error: HcnaError, sentence: str) -> None:
    assert str(error) == sentence


@pytest.mark.parametrize(
    ("error", "help_with"),
    [
        (errors.IdempotencyConflict("k", "t1"), "use a new key"),
        (errors.StoreTooOld("3.40.1", "3.51.3"), "uv sync"),
        (errors.SchemaTooNew(9, 2), "upgrade hcna-ray"),
        (errors.WorkerOnline("W1", "draining"), "hcna leave"),
        (errors.WorkerNameTaken("W1", "10.0.0.7"), "the machine at 10.0.0.7 is W1 already"),
        (errors.StaleModerator(1, 7, "outbox/W1/generation"), "remove outbox/W1/generation"),
        (errors.InvalidName("w1", "too short"), "example: HCNA-W1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_that_people_see_says_what_helps(error: HcnaError, help_with: str) -> None:
    assert help_with in str(error)


def test_what_is_missing_gives_the_code() -> None:
    assert errors.NotFound("worker", "W9").code == "worker_not_found"


def test_a_refusal_says_when_to_come_back() -> None:
    assert errors.Overloaded("the queue is full").retry_after_s == 1
    assert errors.DiskFull("no space", 30).retry_after_s == 30

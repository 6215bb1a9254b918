"""Hypothesis drives the task state machine through a small world of faults.

``HCNA_MODEL_STEPS`` sets how many steps are made at least (50 000 unless told otherwise). The run
is deterministic: rounds are seeded with their number.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest

from hcna_ray.core import diagram, machine
from hcna_ray.core.events import (
    EVENT_TYPES,
    AttemptCompleted,
    AttemptLost,
    KeyHeld,
    LeaseReturned,
    ReleaseOrdering,
    TaskReplayed,
)
from hcna_ray.core.machine import Step
from hcna_ray.core.models import Hold, Task, TaskState, Token
from tests.property.task_world import STEPS_PER_WORLD, TaskWorld, drive
from tests.property.world import TALLY, BrokenPromise, Tally

STEPS_MIN = int(os.environ.get("HCNA_MODEL_STEPS", "50000"))


@pytest.mark.timeout(600)
def test_every_promise_holds_in_a_world_of_faults() -> None:
    number = 0
    while TALLY.steps < STEPS_MIN:
        left = STEPS_MIN - TALLY.steps
        drive(TaskWorld, number=number, worlds=max(1, min(500, 1 + left // STEPS_PER_WORLD)))
        number += 1

    assert TALLY.violations == 0
    if STEPS_MIN >= 50_000:
        # The drawing shows exactly what was seen to happen, and everything was seen.
        assert {event for _, event, _ in TALLY.moves} == {event.__name__ for event in EVENT_TYPES}
        drawn = {
            (before, event, after)
            for (before, after), names in diagram.arrows().items()
            for event in names
        }
        assert {move for move in TALLY.moves if move[0] is not move[2]} == drawn


# -- the machine can see -------------------------------------------------------------------------


def no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any report about a task that holds a lease counts, whatever its token."""

    def holds(task: Task, token: Token) -> bool:
        return task.lease is not None

    monkeypatch.setattr(machine, "_holds", holds)


def two_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second report of a result ends a completed task once more."""

    def complete_again(task: Task, event: AttemptCompleted) -> Step:
        return machine._end(task, TaskState.COMPLETED, event.at, result=event.result)

    pair = (TaskState.COMPLETED, AttemptCompleted)
    monkeypatch.setitem(machine.TRANSITIONS, pair, complete_again)


def uncounted_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that leads to another attempt is not counted."""

    def forget_the_loss(task: Task, event: AttemptLost) -> Step:
        step = machine.on_lost(task, event)
        return step._replace(task=step.task.evolve(losses=task.losses))

    for state in (TaskState.QUEUED, TaskState.RUNNING):
        monkeypatch.setitem(machine.TRANSITIONS, (state, AttemptLost), forget_the_loss)


def used_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay starts to number its attempts from one again."""

    def start_over(task: Task, event: TaskReplayed) -> Step:
        step = machine.on_replayed(task, event)
        return step._replace(task=step.task.evolve(attempt=0))

    monkeypatch.setitem(machine.TRANSITIONS, (TaskState.FAILED, TaskReplayed), start_over)


def deaf_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A granted task whose cancel was asked for goes back to the queue when it is returned."""

    def return_it(task: Task, event: LeaseReturned) -> Step:
        return machine.on_returned(task.evolve(cancel_requested_at=None), event)

    monkeypatch.setitem(machine.TRANSITIONS, (TaskState.QUEUED, LeaseReturned), return_it)


def jumps_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed task does not queue up again behind its ordering key."""

    def only_for_concurrency(task: Task, event: KeyHeld) -> Step:
        return machine.on_key_held(
            task, dataclasses.replace(event, hold=event.hold & Hold.CONCURRENCY)
        )

    monkeypatch.setitem(machine.TRANSITIONS, (TaskState.QUEUED, KeyHeld), only_for_concurrency)


def forgets_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a task does not let the next one of its ordering key go."""

    def quietly(task: Task, event: AttemptCompleted) -> Step:
        step = machine.on_completed(task, event)
        kept = tuple(c for c in step.commands if not isinstance(c, ReleaseOrdering))
        return step._replace(commands=kept)

    for state in (TaskState.QUEUED, TaskState.RUNNING):
        monkeypatch.setitem(machine.TRANSITIONS, (state, AttemptCompleted), quietly)


@pytest.mark.parametrize(
    ("bug", "promise"),
    [
        (no_fence, "G3 a stale report changes nothing"),
        (two_ends, "G3 a stale report changes nothing"),
        (uncounted_loss, "C11"),
        (used_token, "C6 tokens strictly increase"),
        (deaf_to_cancel, "expected cancelled"),
        (jumps_the_line, "C9"),
        (forgets_the_next, "C4 waits behind a task that waits"),
    ],
)
def test_the_machine_sees_a_seeded_bug(
    bug: Callable[[pytest.MonkeyPatch], None], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BuggyWorld(TaskWorld):
        tally = Tally()

    bug(monkeypatch)

    with pytest.raises(BrokenPromise, match=promise):
        drive(BuggyWorld, number=0, worlds=400, shrink=False)

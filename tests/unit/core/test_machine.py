"""What each event makes of a task."""

from __future__ import annotations

import itertools
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core import diagram
from hcna_ray.core.errors import InvalidTransition, NotFailed, TaskFinished
from hcna_ray.core.events import (
    EVENT_TYPES,
    AttemptCancelled,
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptProgressed,
    AttemptStarted,
    CancelRequested,
    ClockStepped,
    DependencySettled,
    Event,
    KeyHeld,
    KeyReleased,
    LeaseGranted,
    LeaseReturned,
    ReleaseConcurrency,
    ReleaseOrdering,
    SettleDependents,
    StopAttempt,
    TaskReplayed,
    TimePassed,
)
from hcna_ray.core.machine import (
    TRANSITIONS,
    Step,
    accept,
    advance,
    dispatch_key,
    ignore,
    impossible,
    violations,
)
from hcna_ray.core.models import (
    RUN_TIMEOUT_GRACE_S,
    TERMINAL,
    Attempt,
    FailureKind,
    Hold,
    OnDisconnect,
    Outcome,
    Progress,
    RetryPolicy,
    Task,
    TaskError,
    TaskState,
    Token,
)
from tests.unit.core.builders import (
    NOW,
    a_granted_task,
    a_lease,
    a_queued_task,
    a_running_task,
    a_spec,
    granted,
    started,
    token_of,
)

BOOM = TaskError(kind=FailureKind.ERROR, message="boom", type="ValueError")
TWICE = RetryPolicy(max_attempts=2, backoff_s=10.0, jitter=0.0)


def completed(task: Task, at: float = NOW + 5, result: bytes = b'{"ok": true}') -> Step:
    event = AttemptCompleted(at=at, token=token_of(task), started_at=NOW + 1, result=result)
    return advance(task, event)


def failed(task: Task, error: TaskError = BOOM, at: float = NOW + 5) -> Step:
    event = AttemptFailed(at=at, token=token_of(task), started_at=NOW + 1, error=error)
    return advance(task, event)


def lost(task: Task, *, worker_gone: bool = True, at: float = NOW + 5) -> Step:
    event = AttemptLost(
        at=at,
        token=token_of(task),
        kind=FailureKind.LOST,
        message="W1 went silent",
        worker_gone=worker_gone,
    )
    return advance(task, event)


def kinds(step: Step) -> list[str]:
    return [fact.kind for fact in step.facts]


def error_of(task: Task) -> TaskError:
    assert task.error is not None
    return task.error


def test_an_end_tells_of_a_start_that_nobody_told_of() -> None:
    task = a_granted_task()

    for step in (completed(task), failed(task)):
        first, last = step.facts
        assert (first.kind, first.at, first.state) == ("started", NOW + 1, TaskState.RUNNING)
        assert first.token == last.token == token_of(task)
        assert first.worker == last.worker == "W1"
        assert [one.started_at for one in step.attempts] == [NOW + 1]
    assert kinds(completed(a_running_task())) == ["completed"]
    assert kinds(failed(a_running_task())) == ["failed"]


# -- the table -----------------------------------------------------------------------------------


def test_the_table_has_an_answer_for_every_state_and_event() -> None:
    assert set(TRANSITIONS) == set(itertools.product(TaskState, EVENT_TYPES))
    assert set(EVENT_TYPES) == set(Event.__args__)


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_finished_task_never_moves_but_for_a_replay(state: TaskState) -> None:
    moving = {
        event
        for event in EVENT_TYPES
        if TRANSITIONS[state, event] is not ignore and TRANSITIONS[state, event] is not impossible
    }

    assert moving == {CancelRequested, TaskReplayed}


def test_the_drawn_lifecycle_is_the_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "lifecycle.md"

    assert page.read_text() == diagram.render()


def test_the_lifecycle_is_drawn_by_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hcna_ray.core.diagram")

    runpy.run_module("hcna_ray.core.diagram", run_name="__main__")

    assert capsys.readouterr().out == diagram.render()


def test_the_drawing_shows_every_way_that_a_state_is_left() -> None:
    assert {(before.value, after.value) for before, after in diagram.arrows()} == {
        ("scheduled", "queued"),
        ("scheduled", "cancelled"),
        ("scheduled", "expired"),
        ("scheduled", "failed"),
        ("queued", "running"),
        ("queued", "scheduled"),
        ("queued", "completed"),
        ("queued", "failed"),
        ("queued", "cancelled"),
        ("queued", "expired"),
        ("running", "queued"),
        ("running", "scheduled"),
        ("running", "completed"),
        ("running", "failed"),
        ("running", "cancelled"),
        ("failed", "queued"),
    }


# -- accept --------------------------------------------------------------------------------------


def test_a_task_that_can_run_is_queued_at_once() -> None:
    step = accept(a_spec(priority=7), seq=3, at=NOW)

    assert step.task.state is TaskState.QUEUED
    assert step.task.ready
    assert (step.task.seq, step.task.queued_at) == (3, NOW)
    assert step.task.dispatch_key == NOW - 7 * 60
    assert [(fact.kind, fact.state) for fact in step.facts] == [("accepted", TaskState.QUEUED)]


def test_one_step_of_priority_is_worth_one_ageing_step_of_waiting() -> None:
    urgent_now = dispatch_key(NOW, 5, 60.0)
    patient_since_a_minute = dispatch_key(NOW - 60, 4, 60.0)

    assert urgent_now == patient_since_a_minute


@pytest.mark.parametrize(("run_at", "due_at"), [(NOW + 30, NOW + 30), (NOW - 30, NOW)])
def test_a_task_runs_at_its_time_but_not_before_it_was_accepted(
    run_at: float, due_at: float
) -> None:
    assert accept(a_spec(run_at=run_at), seq=1, at=NOW).task.due_at == due_at


def test_a_task_for_later_wakes_up_when_it_is_due() -> None:
    task = accept(a_spec(run_at=NOW + 30), seq=1, at=NOW).task
    assert (task.state, task.wake_at) == (TaskState.SCHEDULED, NOW + 30)

    early = advance(task, TimePassed(at=NOW + 29))
    due = advance(task, TimePassed(at=NOW + 30))

    assert not early.changed
    assert (due.task.state, kinds(due)) == (TaskState.QUEUED, ["queued"])


def test_a_task_whose_dependency_has_failed_is_rejected_at_once() -> None:
    step = accept(a_spec(), seq=1, at=NOW, unmet=2, failed_dependency="t0", behind_key=True)

    assert step.task.state is TaskState.FAILED
    assert error_of(step.task).kind is FailureKind.REJECTED
    assert "t0" in error_of(step.task).message
    assert kinds(step) == ["accepted", "failed"]
    assert step.commands == (SettleDependents(task_id="t1", completed=False),)
    assert violations(step.task) == []


# -- dependencies --------------------------------------------------------------------------------


def test_a_task_waits_for_all_its_dependencies() -> None:
    waiting = accept(a_spec(), seq=1, at=NOW, unmet=2).task
    assert waiting.wake_at is None

    one = advance(waiting, DependencySettled(at=NOW + 1, dependency_id="a", completed=True))
    both = advance(one.task, DependencySettled(at=NOW + 2, dependency_id="b", completed=True))

    assert (one.task.state, one.task.unmet, one.facts) == (TaskState.SCHEDULED, 1, ())
    assert (both.task.state, both.task.queued_at) == (TaskState.QUEUED, NOW + 2)


def test_a_met_dependency_does_not_make_a_task_run_before_its_time() -> None:
    waiting = accept(a_spec(run_at=NOW + 60), seq=1, at=NOW, unmet=1).task

    met = advance(waiting, DependencySettled(at=NOW + 1, dependency_id="a", completed=True)).task

    assert (met.state, met.wake_at) == (TaskState.SCHEDULED, NOW + 60)


def test_time_alone_does_not_queue_a_task_with_open_dependencies() -> None:
    waiting = accept(a_spec(), seq=1, at=NOW, unmet=1).task

    assert not advance(waiting, TimePassed(at=NOW + 10)).changed


def test_a_task_is_rejected_when_a_dependency_did_not_complete() -> None:
    waiting = accept(a_spec(), seq=1, at=NOW, unmet=2).task

    step = advance(waiting, DependencySettled(at=NOW + 1, dependency_id="a", completed=False))

    assert step.task.state is TaskState.FAILED
    assert error_of(step.task).kind is FailureKind.REJECTED
    assert SettleDependents(task_id="t1", completed=False) in step.commands


def test_a_dependency_that_settles_twice_changes_nothing() -> None:
    backing_off = failed(a_running_task(retry=TWICE)).task

    late = DependencySettled(at=NOW + 6, dependency_id="a", completed=False)

    assert not advance(backing_off, late).changed


# -- keys ----------------------------------------------------------------------------------------


def test_a_held_task_leaves_the_dispatch_index_until_it_is_released() -> None:
    task = a_queued_task(concurrency_key="gpu")

    held = advance(task, KeyHeld(at=NOW, hold=Hold.CONCURRENCY)).task
    free = advance(held, KeyReleased(at=NOW, hold=Hold.CONCURRENCY)).task

    assert (held.ready, free.ready) == (False, True)


def test_a_task_may_be_held_for_two_keys() -> None:
    behind = accept(a_spec(ordering_key="a", concurrency_key="b"), seq=1, at=NOW, behind_key=True)
    both = Hold.ORDERING | Hold.CONCURRENCY

    held = advance(behind.task, KeyHeld(at=NOW, hold=both)).task
    half = advance(held, KeyReleased(at=NOW, hold=Hold.ORDERING)).task

    assert held.hold == both
    assert (half.hold, half.ready) == (Hold.CONCURRENCY, False)


def test_holding_or_releasing_twice_changes_nothing() -> None:
    task = a_queued_task()
    held = advance(task, KeyHeld(at=NOW, hold=Hold.ORDERING)).task

    assert not advance(held, KeyHeld(at=NOW, hold=Hold.ORDERING)).changed
    assert not advance(task, KeyReleased(at=NOW, hold=Hold.ORDERING)).changed


def test_a_granted_task_is_not_held() -> None:
    assert not advance(a_granted_task(), KeyHeld(at=NOW, hold=Hold.CONCURRENCY)).changed


@pytest.mark.parametrize(
    "end",
    [
        lambda task: completed(task),
        lambda task: failed(task),
        lambda task: lost(task),
        lambda task: advance(task, LeaseReturned(at=NOW, token=token_of(task))),
        lambda task: failed(task.evolve(spec=a_spec(retry=TWICE, concurrency_key="gpu"))),
    ],
)
def test_a_lease_that_ends_gives_its_concurrency_place_back(end: Any) -> None:
    task = a_granted_task(concurrency_key="gpu")

    assert ReleaseConcurrency(key="gpu") in end(task).commands


def test_the_next_of_an_ordering_key_goes_only_when_the_task_has_ended() -> None:
    task = a_running_task(ordering_key="order-17", retry=TWICE)

    again, over = failed(task), completed(task)

    assert ReleaseOrdering(key="order-17") not in again.commands
    assert ReleaseOrdering(key="order-17") in over.commands


# -- lease ---------------------------------------------------------------------------------------


def test_a_granted_task_is_still_queued_and_not_ready() -> None:
    step = advance(a_queued_task(), LeaseGranted(at=NOW, lease=a_lease()))

    assert (step.task.state, step.task.ready, step.task.attempt) == (TaskState.QUEUED, False, 1)
    (fact,) = step.facts
    assert (fact.kind, fact.token, fact.worker) == ("granted", Token(1, 1), "W1")


@pytest.mark.parametrize(
    "task",
    [
        a_granted_task(),
        a_queued_task().evolve(hold=Hold.ORDERING),
        a_queued_task().evolve(attempt=1),
        accept(a_spec(), seq=1, at=NOW, unmet=1).task,
        a_running_task(),
        completed(a_running_task()).task,
    ],
    ids=["leased", "held", "used token", "scheduled", "running", "ended"],
)
def test_a_lease_that_must_not_be_is_a_bug(task: Task) -> None:
    with pytest.raises(InvalidTransition, match="LeaseGranted"):
        advance(task, LeaseGranted(at=NOW, lease=a_lease()))


def test_a_returned_lease_counts_nothing_and_keeps_the_place() -> None:
    task = a_granted_task()

    step = advance(task, LeaseReturned(at=NOW + 1, token=token_of(task), reason="slot is busy"))

    assert step.task.ready
    assert (step.task.failures, step.task.losses) == (0, 0)
    assert step.task.dispatch_key == task.dispatch_key
    (fact,) = step.facts
    assert (fact.kind, fact.worker, fact.detail) == ("returned", "W1", "slot is busy")


def test_what_was_handed_out_too_often_and_never_began_is_given_up() -> None:
    task = a_granted_task()
    event = LeaseReturned(at=NOW, token=token_of(task), reason="never started", give_up=True)

    step = advance(task, event)

    assert (step.task.state, step.task.failures, step.task.losses) == (TaskState.FAILED, 0, 0)
    assert step.task.error == TaskError(kind=FailureKind.LOST, message="never started")
    assert step.attempts == ()
    stopping = advance(task, CancelRequested(at=NOW)).task
    assert advance(stopping, event).task.state is TaskState.CANCELLED


def test_an_attempt_starts_once() -> None:
    task = a_granted_task()
    event = AttemptStarted(at=NOW + 1, token=token_of(task))

    first = advance(task, event)
    again = advance(first.task, event)

    assert (first.task.state, first.task.started_at) == (TaskState.RUNNING, NOW + 1)
    assert [(a.token, a.started_at, a.outcome) for a in first.attempts] == [
        (Token(1, 1), NOW + 1, None)
    ]
    assert not again.changed


def test_a_used_token_opens_nothing() -> None:
    """Every report about an attempt that is over is dropped, whatever it says."""
    first = a_running_task()
    second = granted(lost(first).task)
    old = token_of(first)
    reports: list[Event] = [
        LeaseReturned(at=NOW, token=old),
        AttemptStarted(at=NOW, token=old),
        AttemptProgressed(at=NOW, token=old, checkpoint=b"{}"),
        AttemptCompleted(at=NOW, token=old, started_at=NOW, result=b"{}"),
        AttemptFailed(at=NOW, token=old, started_at=NOW, error=BOOM),
        AttemptLost(at=NOW, token=old, kind=FailureKind.LOST, message=""),
        AttemptCancelled(at=NOW, token=old, started_at=NOW),
    ]

    for task in (second, second.evolve(lease=None), completed(second).task):
        for report in reports:
            step = advance(task, report)
            assert (step.changed, step.task, step.facts, step.commands) == (False, task, (), ())


def test_the_same_attempt_number_of_an_older_generation_opens_nothing() -> None:
    restored = a_running_task()
    old = Token(0, 1)

    report = AttemptCompleted(at=NOW, token=old, started_at=NOW, result=b"{}")

    assert not advance(restored, report).changed


# -- progress ------------------------------------------------------------------------------------


def test_progress_and_checkpoint_are_kept_apart() -> None:
    task = a_running_task()
    half = Progress(at=NOW + 1, percent=50.0)

    told = advance(task, AttemptProgressed(at=NOW + 1, token=token_of(task), progress=half)).task
    saved = advance(
        told, AttemptProgressed(at=NOW + 2, token=token_of(task), checkpoint=b'{"row": 7}')
    ).task

    assert (saved.progress, saved.checkpoint) == (half, b'{"row": 7}')


def test_the_next_attempt_gets_the_checkpoint() -> None:
    task = a_running_task()
    event = AttemptProgressed(at=NOW, token=token_of(task), checkpoint=b'{"row": 7}')

    again = lost(advance(task, event).task).task

    assert again.checkpoint == b'{"row": 7}'


# -- outcomes ------------------------------------------------------------------------------------


def test_a_completed_task_has_its_result_and_one_closed_attempt() -> None:
    step = completed(a_running_task())

    assert step.task.state is TaskState.COMPLETED
    assert step.task.result == b'{"ok": true}'
    assert (step.task.finished_at, step.task.lease) == (NOW + 5, None)
    assert step.attempts == (
        Attempt(
            task_id="t1",
            token=Token(1, 1),
            worker="W1",
            node_id="",
            started_at=NOW,
            ended_at=NOW + 5,
            outcome=Outcome.COMPLETED,
        ),
    )
    assert step.commands == (SettleDependents(task_id="t1", completed=True),)


def test_a_result_counts_even_if_the_start_was_never_reported() -> None:
    step = completed(a_granted_task())

    assert step.task.state is TaskState.COMPLETED
    assert (step.attempts[0].started_at, step.task.started_at) == (NOW + 1, NOW + 1)


def test_a_result_wins_over_a_cancel_that_was_not_obeyed_yet() -> None:
    asked = advance(a_running_task(), CancelRequested(at=NOW + 2)).task

    assert completed(asked).task.state is TaskState.COMPLETED


def test_an_error_without_retries_fails_the_task() -> None:
    step = failed(a_running_task())

    assert step.task.state is TaskState.FAILED
    assert (step.task.error, step.task.failures) == (BOOM, 1)
    assert step.attempts[0].outcome is Outcome.ERRORED
    assert step.attempts[0].error == BOOM


def test_a_retry_waits_for_its_backoff_and_then_queues_behind_it() -> None:
    task = a_running_task(retry=TWICE)

    step = failed(task)

    waiting = step.task
    assert (waiting.state, waiting.wake_at, waiting.lease) == (TaskState.SCHEDULED, NOW + 15, None)
    assert waiting.dispatch_key == task.dispatch_key + 15
    assert (waiting.failures, waiting.error) == (1, BOOM)
    assert kinds(step) == ["retry_scheduled"]
    assert not advance(waiting, TimePassed(at=NOW + 14)).changed
    assert advance(waiting, TimePassed(at=NOW + 15)).task.ready


def test_the_last_attempt_that_may_fail_ends_the_task() -> None:
    waiting = failed(a_running_task(retry=TWICE)).task
    second = started(advance(waiting, TimePassed(at=NOW + 15)).task, at=NOW + 16)

    step = failed(second, at=NOW + 20)

    assert (step.task.state, step.task.failures) == (TaskState.FAILED, 2)


def test_a_timeout_is_an_outcome_of_its_own() -> None:
    slow = TaskError(kind=FailureKind.TIMEOUT, message="ran too long")

    step = failed(a_running_task(), slow)

    assert step.attempts[0].outcome is Outcome.TIMED_OUT


def test_a_clock_that_is_put_changes_no_age() -> None:
    task = a_running_task()
    assert task.wake_at is not None

    step = advance(task, ClockStepped(at=NOW + 3600, by_s=3600.0))

    assert step.task.wake_at == task.wake_at + 3600.0
    assert not step.facts
    assert advance(step.task, TimePassed(at=task.wake_at + 1.0)).task is step.task

    waiting = a_queued_task()
    assert advance(waiting, ClockStepped(at=NOW + 3600, by_s=3600.0)).task is waiting
    new = a_queued_task(queue_timeout_s=5.0).evolve(queued_at=None)
    assert advance(new, ClockStepped(at=NOW + 3600, by_s=3600.0)).task is new
    handed_out = advance(waiting, LeaseGranted(at=NOW, lease=a_lease())).task
    moved = advance(handed_out, ClockStepped(at=NOW + 3600, by_s=3600.0)).task
    assert moved.lease is not None
    assert handed_out.lease is not None
    assert moved.lease.granted_at == handed_out.lease.granted_at + 3600.0
    assert moved.lease.started_at is None


def test_a_clock_that_is_put_ends_no_wait_in_a_queue() -> None:
    task = a_queued_task(queue_timeout_s=60.0)

    moved = advance(task, ClockStepped(at=NOW + 3600, by_s=3600.0)).task

    assert moved.wake_at == NOW + 3660
    assert moved.dispatch_key == task.dispatch_key
    assert advance(moved, TimePassed(at=NOW + 3659)).task is moved
    assert advance(moved, TimePassed(at=NOW + 3660)).task.state is TaskState.FAILED


def test_a_clock_that_is_put_ends_no_wait_for_a_worker() -> None:
    task = a_queued_task().evolve(pinned_to="W1", pinned_until=NOW + 60)

    moved = advance(task, ClockStepped(at=NOW + 3600, by_s=3600.0)).task

    assert (moved.pinned_to, moved.pinned_until) == ("W1", NOW + 3660)
    assert advance(moved, TimePassed(at=NOW + 3659)).task is moved
    assert advance(moved, TimePassed(at=NOW + 3660)).task.pinned_to is None


def test_a_loss_is_counted_apart_and_keeps_the_place() -> None:
    task = a_running_task()

    step = lost(task)

    assert (step.task.losses, step.task.failures) == (1, 0)
    assert step.task.ready
    assert step.task.dispatch_key == task.dispatch_key
    assert step.task.pinned_to is None
    assert step.attempts[0].outcome is Outcome.LOST


def test_a_loss_on_purpose_is_not_held_against_the_task() -> None:
    task = a_running_task(max_losses=1)
    assert task.lease is not None
    event = AttemptLost(
        at=NOW + 5,
        token=task.lease.token,
        kind=FailureKind.LOST,
        message="W1 was stopped in good order",
        worker_gone=True,
        counted=False,
    )

    step = advance(task, event)

    assert (step.task.state, step.task.losses, step.task.lease) == (TaskState.QUEUED, 0, None)
    assert step.attempts[0].outcome is Outcome.LOST


def test_too_many_losses_end_the_task() -> None:
    step = lost(a_running_task(max_losses=1))

    assert step.task.state is TaskState.FAILED
    assert error_of(step.task).kind is FailureKind.LOST


def test_a_task_that_waits_for_its_worker_is_pinned_to_it_for_a_while() -> None:
    waits = {"on_disconnect": OnDisconnect.WAIT, "wait_max_s": 60.0}

    pinned = lost(a_running_task(**waits)).task
    assert (pinned.needs.worker, pinned.wake_at) == ("W1", NOW + 65)

    early = advance(pinned, TimePassed(at=NOW + 64))
    late = advance(pinned, TimePassed(at=NOW + 65))
    back = started(pinned)

    assert not early.changed
    assert (late.task.needs.worker, kinds(late)) == (None, ["unpinned"])
    assert (back.pinned_to, back.pinned_until) == (None, None)


def test_a_task_whose_process_alone_died_is_not_pinned() -> None:
    task = a_running_task(on_disconnect=OnDisconnect.WAIT)

    assert lost(task, worker_gone=False).task.pinned_to is None


# -- cancel --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", [a_queued_task(), accept(a_spec(), seq=1, at=NOW, unmet=1).task], ids=str
)
def test_what_nobody_holds_is_cancelled_at_once(task: Task) -> None:
    step = advance(task, CancelRequested(at=NOW + 1, reason="typo"))

    assert step.task.state is TaskState.CANCELLED
    assert step.facts[0].detail == "typo"
    assert (step.task.cancel_requested_at, step.task.cancel_reason) == (NOW + 1, "typo")


@pytest.mark.parametrize("task", [a_granted_task(), a_running_task()], ids=["granted", "running"])
def test_what_somebody_holds_is_asked_to_stop_once(task: Task) -> None:
    first = advance(task, CancelRequested(at=NOW + 1, reason="typo"))
    again = advance(first.task, CancelRequested(at=NOW + 2))

    assert first.task.state is task.state
    assert first.commands == (
        StopAttempt(
            task_id="t1",
            worker="W1",
            incarnation="W1-first-life",
            slot=0,
            token=Token(1, 1),
            reason="cancel",
        ),
    )
    assert kinds(first) == ["cancel_requested"]
    assert not again.changed


@pytest.mark.parametrize("reason", ["typo", ""])
@pytest.mark.parametrize(
    "end",
    [
        lambda task: advance(task, LeaseReturned(at=NOW + 3, token=token_of(task))),
        lambda task: failed(task),
        lambda task: lost(task),
        lambda task: advance(
            task, AttemptCancelled(at=NOW + 3, token=token_of(task), started_at=NOW)
        ),
    ],
    ids=["returned", "failed", "lost", "confirmed"],
)
def test_a_task_that_was_asked_to_stop_does_not_come_back(end: Any, reason: str) -> None:
    task = a_granted_task(retry=TWICE)
    asked = advance(task, CancelRequested(at=NOW + 1, reason=reason)).task

    step = end(asked)

    assert step.task.state is TaskState.CANCELLED
    assert step.facts[-1].detail == (reason or None)
    assert violations(step.task) == []


def test_a_confirmed_cancel_closes_the_attempt() -> None:
    task = advance(a_running_task(), CancelRequested(at=NOW + 1)).task

    step = advance(task, AttemptCancelled(at=NOW + 3, token=token_of(task), started_at=NOW))

    assert [(a.outcome, a.ended_at) for a in step.attempts] == [(Outcome.CANCELLED, NOW + 3)]


def test_an_ended_task_refuses_to_be_cancelled() -> None:
    with pytest.raises(TaskFinished, match="completed"):
        advance(completed(a_running_task()).task, CancelRequested(at=NOW))


# -- time ----------------------------------------------------------------------------------------


def test_a_task_expires_only_while_nobody_holds_it() -> None:
    late = TimePassed(at=NOW + 10)
    lifetime = {"expires_at": NOW + 10}

    scheduled = advance(accept(a_spec(**lifetime), seq=1, at=NOW, unmet=1).task, late)
    queued = advance(a_queued_task(**lifetime), late)
    held = advance(a_granted_task(**lifetime), late)
    running = advance(a_running_task(**lifetime), late)

    assert (scheduled.task.state, queued.task.state) == (TaskState.EXPIRED, TaskState.EXPIRED)
    assert (held.changed, running.changed) == (False, False)
    assert a_granted_task(**lifetime).wake_at is None


def test_a_task_gives_up_waiting_in_the_queue() -> None:
    task = a_queued_task(queue_timeout_s=30.0)

    early = advance(task, TimePassed(at=NOW + 29))
    late = advance(task, TimePassed(at=NOW + 30))

    assert task.wake_at == NOW + 30
    assert not early.changed
    assert late.task.state is TaskState.FAILED
    assert error_of(late.task).kind is FailureKind.TIMEOUT
    assert "30 s in queue 'default'" in error_of(late.task).message


def test_an_attempt_that_nobody_stopped_is_ended_by_the_moderator() -> None:
    task = a_running_task(timeout_s=60.0, retry=TWICE)
    deadline = NOW + 60 + RUN_TIMEOUT_GRACE_S
    assert task.wake_at == deadline

    early = advance(task, TimePassed(at=deadline - 1))
    late = advance(task, TimePassed(at=deadline))

    assert not early.changed
    assert (late.task.state, late.task.failures) == (TaskState.SCHEDULED, 1)
    assert late.attempts[0].outcome is Outcome.TIMED_OUT
    assert [c.reason for c in late.commands if isinstance(c, StopAttempt)] == ["timeout"]


def test_a_task_without_limits_sleeps_for_ever() -> None:
    task = a_queued_task()

    assert task.wake_at is None
    assert not advance(task, TimePassed(at=NOW + 1e9)).changed


# -- replay --------------------------------------------------------------------------------------


def test_a_replayed_task_starts_over_with_a_newer_token() -> None:
    dead = failed(a_running_task()).task

    step = advance(dead, TaskReplayed(at=NOW + 100))

    task = step.task
    assert task.ready
    assert (task.failures, task.losses, task.error, task.finished_at) == (0, 0, None, None)
    assert task.dispatch_key == dead.dispatch_key + 100
    assert token_of(granted(task)) > Token(1, 1)
    assert kinds(step) == ["replayed"]
    assert violations(task) == []


def test_a_replayed_task_can_be_held_behind_whoever_is_out_on_its_ordering_key() -> None:
    dead = failed(a_running_task(ordering_key="order-17")).task
    back = advance(dead, TaskReplayed(at=NOW + 100)).task

    held = advance(back, KeyHeld(at=NOW + 100, hold=Hold.ORDERING)).task

    assert (held.hold, held.ready) == (Hold.ORDERING, False)


def test_a_rejected_task_can_be_replayed_without_its_dependencies() -> None:
    rejected = accept(a_spec(), seq=1, at=NOW, unmet=2, failed_dependency="t0").task

    assert advance(rejected, TaskReplayed(at=NOW + 1)).task.ready


@pytest.mark.parametrize(
    "task",
    [a_queued_task(), a_running_task(), completed(a_running_task()).task],
    ids=["queued", "running", "completed"],
)
def test_only_a_failed_task_is_replayed(task: Task) -> None:
    with pytest.raises(NotFailed, match=task.state.value):
        advance(task, TaskReplayed(at=NOW))


# -- invariants ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (
            completed(a_running_task()).task.evolve(lease=a_lease()),
            "only a queued or running task may hold a lease",
        ),
        (
            a_granted_task().evolve(state=TaskState.RUNNING),
            "a task runs exactly while its lease has started",
        ),
        (a_granted_task().evolve(attempt=9), "the lease in force is the newest attempt's"),
        (a_queued_task().evolve(finished_at=NOW), "finished_at is set exactly at the end"),
        (a_queued_task().evolve(result=b"{}"), "a result exists exactly when completed"),
        (failed(a_running_task()).task.evolve(error=None), "a failure has a reason"),
        (
            accept(a_spec(), seq=1, at=NOW, unmet=1).task.evolve(unmet=-1),
            "dependencies cannot be met twice",
        ),
        (a_queued_task().evolve(unmet=1), "a task with unmet dependencies waits"),
        (a_queued_task().evolve(losses=4), "losses never exceed max_losses"),
        (a_queued_task().evolve(failures=2), "failures never exceed max_attempts"),
        (a_granted_task().evolve(hold=Hold.ORDERING), "a held task is not granted"),
        (
            completed(a_running_task()).task.evolve(hold=Hold.ORDERING),
            "an ended task holds no place in a key's line",
        ),
        (a_queued_task().evolve(pinned_to="W1"), "a pin has an end"),
    ],
)
def test_a_broken_task_is_told_in_words(task: Task, sentence: str) -> None:
    assert sentence in violations(task)


def test_a_sound_task_has_no_violations() -> None:
    for task in (a_queued_task(), a_granted_task(), a_running_task()):
        assert violations(task) == []

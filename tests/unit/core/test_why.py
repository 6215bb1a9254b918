"""Every way a task can stand has one sentence and one next step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from hcna_ray.core.advice import ENDED, FAILURE, INTERNAL, REFUSAL, RUNNING, TASK, WAITING
from hcna_ray.core.advice import next_step as step_after
from hcna_ray.core.events import (
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptProgressed,
    CancelRequested,
    DependencySettled,
    TimePassed,
)
from hcna_ray.core.machine import accept, advance
from hcna_ray.core.models import (
    Attempt,
    FailureKind,
    OnDisconnect,
    Outcome,
    Progress,
    RetryPolicy,
    Task,
    TaskError,
    TaskState,
    WorkerState,
    WorkerView,
)
from hcna_ray.core.placement import PendingReason
from hcna_ray.core.why import Why, why
from tests.unit.core.builders import NOW, a_queued_task, a_running_task, a_spec, a_worker, token_of

ONLINE: Sequence[WorkerView] = (a_worker(),)
WAITS = PendingReason("waiting_turn", "waiting for its turn on W1", "wait")


def told(
    task: Task,
    *attempts: Attempt,
    waits: PendingReason | None = None,
    workers: Sequence[WorkerView] | None = ONLINE,
    later_s: float = 0.0,
) -> Why:
    answer = why(task, attempts, waits, workers, now=NOW + later_s)
    assert answer.code in TASK
    assert answer.message
    assert answer.fix or answer.code == "completed"
    assert "ID" not in answer.fix.split()
    return answer


def an_attempt(task: Task, outcome: Outcome | None = None, **more: Any) -> Attempt:
    return Attempt(
        task.id, token_of(task), "W1", "HCNA-W1", NOW, None if outcome is None else NOW + 2, outcome
    )._replace(**more)


def failed(kind: FailureKind, message: str = "boom", **spec: Any) -> tuple[Task, Attempt]:
    """A task whose one attempt ended it."""
    task = a_running_task(**{"max_losses": 1, **spec})
    error = TaskError(kind=kind, message=message, retryable=False)
    attempt = an_attempt(task, Outcome.ERRORED, error=error)
    event = AttemptFailed(at=NOW + 2, token=token_of(task), started_at=NOW, error=error)
    return advance(task, event).task, attempt


# -- it waits --------------------------------------------------------------------------------------


def test_a_task_that_waits_says_what_for_and_for_how_long() -> None:
    task = a_queued_task()
    assert told(task, waits=WAITS) == Why("waiting_turn", "waiting for its turn on W1", "wait")
    assert told(task, waits=WAITS, later_s=200).message.endswith("W1; queued 3 min ago")
    later = accept(a_spec(run_at=NOW + 900), seq=1, at=NOW).task
    reason = PendingReason("scheduled", "scheduled for noon", "wait")
    assert told(later, waits=reason, later_s=200).message == "scheduled for noon"


def test_a_task_that_waits_says_what_happened_to_it_before() -> None:
    running = a_running_task()
    lost = AttemptLost(
        at=NOW, token=token_of(running), kind=FailureKind.LOST, message="W1 fell silent"
    )
    error = TaskError(kind=FailureKind.LOST, message="W1 fell silent")
    attempt = an_attempt(running, Outcome.LOST, error=error)
    again = advance(running, lost).task
    assert told(again, attempt, waits=WAITS).message == (
        "waiting for its turn on W1; attempt 1 was lost on W1: W1 fell silent"
    )
    broken = attempt._replace(outcome=Outcome.ERRORED)
    assert "attempt 1 failed on W1" in told(again, broken, waits=WAITS).message
    assert told(again, an_attempt(running), waits=WAITS).message == "waiting for its turn on W1"


# -- it runs ---------------------------------------------------------------------------------------


def test_a_task_that_runs_says_where_and_how_far() -> None:
    task = a_running_task()
    first = an_attempt(task)
    assert told(task, first, later_s=5).message == "runs on W1 for 5 s"
    progress = AttemptProgressed(
        at=NOW + 4, token=token_of(task), progress=Progress(at=NOW + 4, percent=40, message="step")
    )
    moving = advance(task, progress).task
    assert told(moving, first, later_s=5).message == "runs on W1 for 5 s, 40 % step"
    bare = dataclasses.replace(moving, progress=Progress(at=NOW + 4))
    assert told(bare, first, later_s=5).message == "runs on W1 for 5 s, 0 %"
    assert "(attempt 1)" in told(task, first, first).message, "not the first: the number is told"


def test_a_task_that_has_gone_quiet_is_told_apart() -> None:
    task = dataclasses.replace(a_running_task(), progress=Progress(at=NOW, percent=40))
    answer = told(task, later_s=130)
    assert answer.code == "no_progress"
    assert answer.message == "runs on W1 for 2 min, 40 %; that was 2 min ago"
    assert f"hcna task cancel {task.id}" in answer.fix


def test_a_task_that_is_about_to_be_stopped_is_told_apart() -> None:
    task = a_running_task(timeout_s=100.0)
    assert told(task, later_s=89).code == "running"
    answer = told(task, later_s=91)
    assert answer.code == "near_timeout"
    assert "of at most 2 min" in answer.message
    assert told(a_running_task(timeout_s=1.0), later_s=5).code == "running", "not worth a word"


@pytest.mark.parametrize("state", [WorkerState.SUSPECT, WorkerState.ASLEEP, WorkerState.GONE])
def test_a_task_on_a_worker_that_is_silent(state: WorkerState) -> None:
    worker = a_worker(state=state, last_seen_age_s=30.0)
    answer = told(a_running_task(), workers=(worker,))
    assert answer.code == "worker_silent"
    assert answer.message == (
        f"ran on W1, which is {state.value}, last seen 30 s ago; "
        "when its lease ends it is queued again"
    )
    waiting = a_running_task(on_disconnect=OnDisconnect.WAIT)
    assert told(waiting, workers=(worker,)).message.endswith("ends it waits for W1")
    assert "is not on record" in told(waiting, workers=()).message


@pytest.mark.parametrize("policy", list(OnDisconnect))
def test_a_task_that_fails_if_its_silent_worker_does_not_return(policy: OnDisconnect) -> None:
    worker = a_worker(state=WorkerState.SUSPECT, last_seen_age_s=30.0)
    task = a_running_task(max_losses=2, on_disconnect=policy)
    assert "fails" not in told(task, workers=(worker,)).message
    last = dataclasses.replace(task, losses=1)
    answer = told(last, workers=(worker,))
    assert answer.code == "worker_silent"
    assert answer.message.endswith("when its lease ends it fails: that is loss 2 of 2 (max_losses)")
    assert f"hcna task retry {task.id}" in answer.fix
    lost = AttemptLost(
        at=NOW, token=token_of(last), kind=FailureKind.LOST, message="", worker_gone=True
    )
    assert advance(last, lost).task.state is TaskState.FAILED, "it was true"


def test_a_task_while_nobody_can_see_it() -> None:
    assert told(a_running_task(), workers=None).code == "running_unseen"


def test_a_task_that_is_being_cancelled() -> None:
    task = advance(a_running_task(), CancelRequested(at=NOW + 1, reason="no")).task
    answer = told(task, later_s=4)
    assert (answer.code, answer.message) == ("cancelling", "was cancelled 3 s ago; W1 is ending it")


def test_a_lease_whose_start_is_not_on_record() -> None:
    task = a_running_task()
    assert task.lease is not None
    unsure = dataclasses.replace(task, lease=task.lease._replace(started_at=None), started_at=None)
    assert told(unsure, later_s=50).message == "runs on W1 for 0 s"
    assert told(dataclasses.replace(unsure, started_at=NOW), later_s=50).message.endswith("50 s")


# -- it has ended ----------------------------------------------------------------------------------


def test_a_task_that_completed_needs_nothing() -> None:
    task = a_running_task()
    done = advance(
        task, AttemptCompleted(at=NOW + 2, token=token_of(task), started_at=NOW, result=b"{}")
    ).task
    assert told(done, an_attempt(task, Outcome.COMPLETED)) == Why(
        "completed", "completed on W1 in 2000 ms", ""
    )
    assert told(done, an_attempt(task)).message == "completed on W1"
    assert told(done).message == "completed"


@pytest.mark.parametrize("kind", list(FailureKind))
def test_a_task_that_failed_says_how_and_what_next(kind: FailureKind) -> None:
    task, attempt = failed(kind)
    answer = told(task, attempt)
    assert answer == Why(kind.value, "failed after 1 attempt: boom", answer.fix)
    assert answer.fix == FAILURE[kind.value].fix.replace("ID", task.id)


def test_the_class_of_an_exception_is_named() -> None:
    task, attempt = failed(FailureKind.ERROR)
    assert task.error is not None
    named = dataclasses.replace(task, error=dataclasses.replace(task.error, type="ValueError"))
    assert told(named, attempt).message == "failed after 1 attempt: ValueError: boom"


def test_a_task_that_waited_too_long_is_not_one_that_ran_too_long() -> None:
    waiting = a_queued_task(queue_timeout_s=5.0)
    task = advance(waiting, TimePassed(at=NOW + 6)).task
    answer = told(task)
    assert answer.code == "queue_timeout"
    assert answer.message.startswith("failed before its first attempt: waited 5 s in queue")


def test_a_task_whose_dependency_failed_is_not_one_that_was_rejected() -> None:
    waiting = accept(a_spec(depends_on=("t0",)), seq=1, at=NOW, unmet=1).task
    task = advance(waiting, DependencySettled(at=NOW, dependency_id="t0", completed=False)).task
    assert told(task).code == "dependency_failed"
    own, attempt = failed(FailureKind.REJECTED, depends_on=("t0",))
    assert told(own, attempt).code == "rejected"
    alone = dataclasses.replace(task, spec=dataclasses.replace(task.spec, depends_on=()))
    assert told(alone).code == "rejected"


def test_a_task_that_was_cancelled_or_came_too_late() -> None:
    waiting = a_queued_task(expires_at=NOW + 5)
    assert told(advance(waiting, TimePassed(at=NOW + 6)).task).code == "expired"
    for reason, message in (("no", "was cancelled: no"), ("", "was cancelled")):
        task = advance(waiting, CancelRequested(at=NOW, reason=reason)).task
        assert told(task).message == message


def test_a_task_that_came_too_late_for_another_attempt_says_how_the_last_one_went() -> None:
    error = TaskError(kind=FailureKind.ERROR, message="boom")
    running = a_running_task(expires_at=NOW + 5, retry=RetryPolicy(max_attempts=3, backoff_s=60.0))
    event = AttemptFailed(at=NOW + 2, token=token_of(running), started_at=NOW, error=error)
    waiting = advance(running, event).task
    assert waiting.state is TaskState.SCHEDULED
    expired = advance(waiting, TimePassed(at=NOW + 6)).task
    answer = told(expired, an_attempt(running, Outcome.ERRORED, error=error))
    assert answer == Why(
        "expired",
        "expired: its expires_at passed before the next attempt; attempt 1 failed on W1: boom",
        f"hcna task {expired.id} shows the error; mend the cause, then submit it again with a "
        "later expires_at",
    )
    lost = told(expired, an_attempt(running, Outcome.LOST, error=error))
    assert lost.message.endswith("attempt 1 was lost on W1: boom")
    assert "hcna workers" in lost.fix, "the task is not to blame"


# -- the tables ------------------------------------------------------------------------------------


def test_every_code_has_a_sentence_and_a_next_step() -> None:
    for table in (WAITING, RUNNING, ENDED, REFUSAL, INTERNAL):
        for code, (means, fix) in table.items():
            assert means.endswith("."), code
            assert means[0].isupper() or means.startswith("`"), code
            assert fix or code == "completed", code
            assert not fix.endswith("."), code


def test_every_state_has_its_codes() -> None:
    assert {kind.value for kind in FailureKind} == set(FAILURE)
    states = {state.value for state in TaskState} - {"queued", "failed"}
    assert states <= set(TASK)
    assert not WAITING.keys() & RUNNING.keys() & ENDED.keys()


def test_the_step_after_a_refusal() -> None:
    assert step_after("task_not_found").startswith("hcna task list")
    assert step_after("schema_too_new").startswith("upgrade")
    assert step_after("said by a newer C1") == "hcna status"

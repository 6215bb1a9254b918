"""Where a task stands and what would help, in one plain sentence: a pure function.

What a waiting task waits for is worked out elsewhere (`hcna_ray.core.placement.explain` and the
task's own holds); here that is one of the cases. Every code has its entry in
`hcna_ray.core.advice.TASK`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcna_ray.core.advice import TASK
from hcna_ray.core.models import (
    TERMINAL,
    UNHEARD,
    Attempt,
    FailureKind,
    OnDisconnect,
    Outcome,
    Task,
    TaskState,
    WorkerView,
)
from hcna_ray.core.placement import PendingReason, age_in_words, state_in_words

#: Progress that is older than this, in seconds, is worth a word.
SILENCE_S = 60.0
#: Share of ``timeout_s`` after which its end is announced, and the least time that is "long".
NEARLY, LONG_S = 0.9, 10.0


@dataclass(frozen=True, slots=True)
class Why:
    """A stable code, one sentence, and the next step; empty where nothing is to be done."""

    code: str
    message: str
    fix: str


def why(
    task: Task,
    attempts: Sequence[Attempt],
    waits: PendingReason | None,
    workers: Sequence[WorkerView] | None,
    *,
    now: float,
) -> Why:
    """Say where a task stands.

    Args:
        task: The task.
        attempts: Its attempts, oldest first.
        waits: Why it waits, if it does.
        workers: Every worker on record; ``None`` when M1 does not answer.
        now: The present.
    """
    if waits is not None:
        return Why(waits.code, waits.message + _before(task, attempts, now), waits.fix)
    if task.state in TERMINAL:
        return _ended(task, attempts)
    return _running(task, attempts, workers, now)


def _before(task: Task, attempts: Sequence[Attempt], now: float) -> str:
    """Return what has happened to a task that waits, to follow the reason why it waits."""
    told = ""
    if task.state is TaskState.QUEUED and task.queued_at is not None:
        waited_s = now - task.queued_at
        if waited_s >= LONG_S:
            told += f"; queued {age_in_words(waited_s)} ago"
    if mishap := _last_mishap(attempts):
        told += f"; {mishap}"
    return told


def _last_mishap(attempts: Sequence[Attempt]) -> str:
    """Return how the last attempt failed or was lost; empty if it did not, or if there is none."""
    last = attempts[-1] if attempts else None
    if last is None or last.outcome is None or last.error is None:
        return ""
    verb = "was lost" if last.outcome is Outcome.LOST else "failed"
    return f"attempt {last.token.attempt} {verb} on {last.worker}: {last.error.message}"


def _running(
    task: Task,
    attempts: Sequence[Attempt],
    workers: Sequence[WorkerView] | None,
    now: float,
) -> Why:
    lease = task.lease
    assert lease is not None, "a running task has a lease"
    began = task.started_at if lease.started_at is None else lease.started_at
    ran_s = max(0.0, now - (now if began is None else began))
    where = f"runs on {lease.worker} for {age_in_words(ran_s)}"
    if len(attempts) > 1:
        where += f" (attempt {lease.token.attempt})"
    if task.cancel_requested_at is not None:
        asked = age_in_words(max(0.0, now - task.cancel_requested_at))
        return _say("cancelling", task, f"was cancelled {asked} ago; {lease.worker} is ending it")
    if workers is None:
        return _say("running_unseen", task, f"ran on {lease.worker}; M1 does not answer now")
    worker = next((one for one in workers if one.name == lease.worker), None)
    if worker is None or worker.state in UNHEARD:
        return _silent(task, lease.worker, worker)
    if ran_s >= max(LONG_S, NEARLY * task.spec.timeout_s):
        limit = age_in_words(task.spec.timeout_s)
        return _say("near_timeout", task, f"{where} of at most {limit}; then it is stopped")
    progress = task.progress
    if progress is None:
        return _say("running", task, where)
    told = f", {0.0 if progress.percent is None else progress.percent:.0f} %"
    told += f" {progress.message}" if progress.message else ""
    if now - progress.at > SILENCE_S:
        age = age_in_words(now - progress.at)
        return _say("no_progress", task, f"{where}{told}; that was {age} ago")
    return _say("running", task, where + told)


def _silent(task: Task, name: str, worker: WorkerView | None) -> Why:
    """Say what becomes of a task whose worker is not heard of, as `machine.on_lost` decides it."""
    how = "is not on record" if worker is None else state_in_words(worker)
    where = f"ran on {name}, which {how}; when its lease ends"
    loss, most = task.losses + 1, task.spec.max_losses
    if loss >= most:
        return _say(
            "worker_silent",
            task,
            f"{where} it fails: that is loss {loss} of {most} (max_losses)",
            "wake that machine before that (hcna up there), or hcna task retry ID when it has "
            "failed",
        )
    waits = task.spec.on_disconnect is OnDisconnect.WAIT
    then = f"it waits for {name}" if waits else "it is queued again"
    return _say("worker_silent", task, f"{where} {then}")


def _ended(task: Task, attempts: Sequence[Attempt]) -> Why:
    last = attempts[-1] if attempts else None
    if task.state is TaskState.COMPLETED:
        where = "" if last is None else f" on {last.worker}"
        if last is not None and last.ended_at is not None:
            where += f" in {max(0.0, last.ended_at - last.started_at) * 1000:.0f} ms"
        return _say("completed", task, f"completed{where}")
    if task.state is TaskState.EXPIRED:
        return _expired(task, attempts)
    if task.state is TaskState.CANCELLED:
        reason = f": {task.cancel_reason}" if task.cancel_reason else ""
        return _say("cancelled", task, f"was cancelled{reason}")
    error = task.error
    assert error is not None, "a failed task says why"
    named = f"{error.type}: " if error.type else ""
    tries = f"after {task.attempt} attempt{'s' * (task.attempt != 1)}"
    when = tries if task.attempt else "before its first attempt"
    return _say(_failure(task, attempts), task, f"failed {when}: {named}{error.message}")


def _expired(task: Task, attempts: Sequence[Attempt]) -> Why:
    mishap = _last_mishap(attempts)
    if not mishap:
        return _say("expired", task, "expired: its expires_at passed before a start")
    told = f"expired: its expires_at passed before the next attempt; {mishap}"
    if attempts[-1].outcome is Outcome.LOST:
        return _say("expired", task, told)
    return _say(
        "expired",
        task,
        told,
        "hcna task ID shows the error; mend the cause, then submit it again with a later "
        "expires_at",
    )


def _failure(task: Task, attempts: Sequence[Attempt]) -> str:
    """Return the code of a failure: its kind, or what that kind meant here."""
    assert task.error is not None
    kind = task.error.kind
    own = any(one.error == task.error for one in attempts)
    if kind is FailureKind.TIMEOUT and not own:
        return "queue_timeout"
    if kind is FailureKind.REJECTED and not own and task.spec.depends_on:
        return "dependency_failed"
    return kind.value


def _say(code: str, task: Task, message: str, fix: str | None = None) -> Why:
    """Add the next step, the code's own unless another is given, with the task's own id in it."""
    return Why(code, message, (TASK[code].fix if fix is None else fix).replace("ID", task.id))

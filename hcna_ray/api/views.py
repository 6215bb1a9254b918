"""Tasks, workers and the rest in the words of HTTP: pure functions from values to plain objects.

Instants become ISO 8601 with milliseconds and ``Z``; payload, result and metadata, which are stored
as JSON, are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from hcna_ray.core.advice import TASK
from hcna_ray.core.errors import Invalid
from hcna_ray.core.models import (
    ACCEPTING,
    TERMINAL,
    UNHEARD,
    Attempt,
    Hold,
    Lease,
    Outcome,
    Task,
    TaskError,
    TaskState,
    WorkerView,
)
from hcna_ray.core.placement import PendingReason, age_in_words, explain, state_in_words
from hcna_ray.core.schedules import Schedule
from hcna_ray.core.why import why
from hcna_ray.runtime.cron import parsed
from hcna_ray.runtime.messages import WorkerInfo
from hcna_ray.security.keys import View
from hcna_ray.store.base import Belongs, StoredFact

Json = dict[str, Any]

#: Instants of a schedule that are shown.
NEXT_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Cluster:
    """What `pending_reason` needs to know beside the task; at most half a second old."""

    workers: Sequence[WorkerView]
    running: int
    running_max: int
    paused: frozenset[str]
    #: False when the moderator does not answer: then nobody knows of the workers.
    moderator_answers: bool = True


#: What is known when nobody answers.
NOBODY = Cluster((), 0, 0, frozenset(), moderator_answers=False)


def iso(at: float | None) -> str | None:
    """Return an instant as ISO 8601 in UTC with milliseconds; ``None`` stays ``None``."""
    if at is None:
        return None
    moment = datetime.fromtimestamp(at, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def task_view(
    task: Task,
    attempts: Sequence[Attempt],
    cluster: Cluster,
    *,
    now: float,
    with_payload: bool = False,
    with_attempts: bool = True,
) -> Json:
    """Return a task as ``GET /tasks/{id}`` shows it.

    Args:
        task: The task.
        attempts: Its attempts, oldest first; needed for who processed it, shown or not.
        cluster: For the reason why it waits.
        now: For the same.
        with_payload: Show the payload.
        with_attempts: Show the attempts, and say where the task stands.
    """
    spec = task.spec
    reason = pending_reason(task, cluster, now)
    view: Json = {
        "task_id": spec.id,
        "task_type": spec.task_type,
        "status": task.state.value,
        "queue": spec.queue,
        "priority": spec.priority,
        "accepted_at": iso(spec.accepted_at),
        "queued_at": iso(task.queued_at),
        "started_at": iso(task.started_at),
        "finished_at": iso(task.finished_at),
        "run_at": iso(spec.run_at),
        "expires_at": iso(spec.expires_at),
        "pending_reason": None
        if reason is None
        else {"code": reason.code, "message": reason.message, "fix": reason.fix},
        "progress": None
        if task.progress is None
        else {
            "percent": task.progress.percent,
            "message": task.progress.message,
            "at": iso(task.progress.at),
        },
        "result": _result(task, attempts),
        "error": _failure(task),
        "failures": task.failures,
        "losses": task.losses,
        "cancel_requested": task.cancel_requested_at is not None,
        "depends_on": spec.depends_on,
        "batch_id": spec.batch_id,
        "metadata": None if spec.metadata is None else msgspec.Raw(spec.metadata),
        "traceparent": spec.traceparent,
        "schedule": None
        if spec.schedule is None
        else {"name": spec.schedule, "instant": iso(spec.schedule_at)},
    }
    if with_attempts:
        view["attempts"] = [_attempt(attempt) for attempt in attempts]
        workers = cluster.workers if cluster.moderator_answers else None
        told = why(task, attempts, reason, workers, now=now)
        view["why"] = {"code": told.code, "message": told.message, "fix": told.fix}
    if with_payload:
        view["payload"] = msgspec.Raw(spec.payload)
    return view


def _result(task: Task, attempts: Sequence[Attempt]) -> Json | None:
    """Return the handler's fields with ours: which node it was, and how long it took."""
    if task.state is not TaskState.COMPLETED or task.result is None:
        return None
    last = next((a for a in reversed(attempts) if a.outcome is Outcome.COMPLETED), None)
    try:
        # The values stay as stored: decoding them could change a number.
        fields: Json = msgspec.json.decode(task.result, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError:
        fields = {"value": msgspec.Raw(task.result)}
    if last is not None:
        fields["processed_by"] = last.node_id or last.worker
        if last.ended_at is not None:
            fields["duration_ms"] = max(0, round((last.ended_at - last.started_at) * 1000))
    return fields


def _failure(task: Task) -> Json | None:
    """Return why a task ended without a result, as far as anybody said why."""
    if task.state is TaskState.CANCELLED and task.error is None and task.cancel_reason:
        return {
            "kind": "cancelled",
            "message": task.cancel_reason,
            "attempts": task.attempt,
            "type": None,
        }
    if task.error is None or task.state not in TERMINAL or task.state is TaskState.COMPLETED:
        return None
    return {
        "kind": task.error.kind.value,
        "message": task.error.message,
        "attempts": task.attempt,
        "type": task.error.type,
    }


def _attempt(attempt: Attempt) -> Json:
    return {
        "attempt": attempt.token.attempt,
        "generation": attempt.token.generation,
        "worker": attempt.worker,
        "node_id": attempt.node_id,
        "started_at": iso(attempt.started_at),
        "ended_at": iso(attempt.ended_at),
        "outcome": None if attempt.outcome is None else attempt.outcome.value,
        "error": _attempt_error(attempt.error),
    }


def _attempt_error(error: TaskError | None) -> Json | None:
    if error is None:
        return None
    return {
        "kind": error.kind.value,
        "message": error.message,
        "type": error.type,
        "traceback": error.traceback,
    }


def pending_reason(task: Task, cluster: Cluster, now: float) -> PendingReason | None:
    """Say in plain words why a task has not started, or ``None`` if it runs or has ended.

    The task's own facts come first, in the order in which they hold it back; only a task that
    stands ready is held against the workers.
    """
    if task.state is TaskState.SCHEDULED:
        return _scheduled(task, cluster, now)
    if task.state is not TaskState.QUEUED:
        return None
    if task.lease is not None:
        return _granted(task, task.lease, cluster, now)
    if task.hold & Hold.ORDERING:
        return PendingReason(
            "ordering_key",
            f"an earlier task with ordering key {task.spec.ordering_key!r} has not ended",
            "wait for it, or cancel it",
        )
    if task.hold & Hold.CONCURRENCY:
        return PendingReason(
            "concurrency_key",
            f"as many tasks with concurrency key {task.spec.concurrency_key!r} run as are allowed",
            "wait, or raise moderator.scheduling.concurrency_limits for this key",
        )
    queue = task.spec.queue
    if queue in cluster.paused:
        return PendingReason(
            "queue_paused", f"the queue {queue!r} is paused", f"hcna queues resume {queue}"
        )
    if not cluster.moderator_answers:
        return _MODERATOR_AWAY
    if task.pinned_to is not None:
        found = [one for one in cluster.workers if one.name == task.pinned_to]
        if not found or found[0].state not in ACCEPTING:
            until = "" if task.pinned_until is None else f", until {iso(task.pinned_until)}"
            now_is = state_in_words(found[0]) if found else "has been forgotten"
            again = "bring it back" if found else "let it join again under that name"
            return PendingReason(
                "waiting_worker_return",
                f"waits for worker {task.pinned_to}, on which it ran, which {now_is}{until}",
                f"{again}, or cancel the task and submit it again",
            )
    return explain(
        task.needs,
        task.spec.task_type,
        cluster.workers,
        running=cluster.running,
        running_max=cluster.running_max,
    )


_MODERATOR_AWAY = PendingReason(
    "moderator_unavailable",
    "M1 does not answer, so nothing is placed now; the task is stored and keeps its place",
    "wait: M1 is started again by itself (hcna status shows it)",
)


def _granted(task: Task, lease: Lease, cluster: Cluster, now: float) -> PendingReason:
    """Say what keeps a worker from starting what it was given.

    A worker that is not in the cluster's view has just joined: what it held would be gone with it.
    """
    name = lease.worker
    if task.cancel_requested_at is not None:
        asked = age_in_words(max(0.0, now - task.cancel_requested_at))
        return PendingReason(
            "granted",
            f"was cancelled {asked} ago; {name}, to which it is granted, is told to drop it",
            f"wait: it ends when {name} gives it back, or with its lease",
        )
    worker = next((one for one in cluster.workers if one.name == name), None)
    if worker is not None and worker.state in UNHEARD:
        return PendingReason(
            "granted",
            f"granted to {name}, which {state_in_words(worker)}; when its lease ends it is queued "
            "again",
            TASK["worker_silent"].fix,
        )
    return PendingReason("granted", f"granted to {name}, which is about to start it", "wait")


def _scheduled(task: Task, cluster: Cluster, now: float) -> PendingReason:
    if task.unmet:
        total = len(task.spec.depends_on)
        return PendingReason(
            "waiting_dependencies",
            f"waits for {task.unmet} of the {total} task{'s' * (total != 1)} it depends on",
            "look at the tasks in depends_on",
        )
    if task.due_at <= now and not cluster.moderator_answers:
        return _MODERATOR_AWAY
    if task.failures and task.due_at > (task.spec.run_at or 0.0):
        return PendingReason(
            "backoff",
            f"attempt {task.attempt} failed; the next one starts after {iso(task.due_at)}",
            "wait, or look at the error of the last attempt",
        )
    if task.due_at <= now:
        return PendingReason("due", "its time has come; M1 queues it in a moment", "wait")
    return PendingReason("scheduled", f"scheduled for {iso(task.due_at)}", "wait")


#: What the submitter or the handler wrote, and what an outline has in its place.
_WITHHELD: Json = {
    "result": None,
    "metadata": None,
    "traceparent": None,
    "schedule": None,
    "depends_on": [],
}


def outline(view: Json) -> Json:
    """Return of a task only what it is and how it fares: nothing its submitter or handler wrote."""
    bare = view | _WITHHELD | {"outline": True}
    bare.pop("payload", None)
    if bare["progress"] is not None:
        bare["progress"] = bare["progress"] | {"message": ""}
    if bare["error"] is not None:
        bare["error"] = bare["error"] | {"message": "", "type": None}
    # Words about the task at hand quote its submitter: its keys, labels and the worker it names.
    for told in ("pending_reason", "why"):
        if bare.get(told) is not None:
            code = bare[told]["code"]
            fix = TASK[code].fix.replace("ID", view["task_id"])
            bare[told] = {"code": code, "message": TASK[code].means, "fix": fix}
    if "attempts" in bare:
        bare["attempts"] = [
            attempt
            if attempt["error"] is None
            else attempt | {"error": {**_NO_ERROR, "kind": attempt["error"]["kind"]}}
            for attempt in bare["attempts"]
        ]
    return bare


_NO_ERROR: Json = {"kind": "", "message": "", "type": None, "traceback": None}


def schedule_view(schedule: Schedule, view: View, *, now: float) -> Json:
    """Return a schedule as far as its caller may see it.

    Args:
        schedule: The schedule.
        view: How much of it; something.
        now: The instant.
    """
    spec, reason, full = schedule.spec, schedule.reason, view is View.FULL
    brief: Json = {"task_type": spec.task_type, "queue": spec.queue}
    return {
        "name": schedule.name,
        "owner": schedule.principal,
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "task": msgspec.Raw(schedule.task) if full else brief,
        "overlap": schedule.overlap.value,
        "catch_up_s": schedule.catch_up_s,
        "paused": schedule.paused,
        "created_at": iso(schedule.created_at),
        "changed_at": iso(schedule.changed_at),
        "next_at": [iso(at) for at in _next_instants(schedule, now)],
        "last_at": iso(schedule.last_at),
        "last_task_id": schedule.last_task_id,
        "waiting_at": iso(schedule.waiting_at),
        "started": schedule.started,
        "skipped": schedule.skipped,
        "missed": schedule.missed,
        "last_reason": None
        if reason is None
        else {
            "code": reason.code,
            "message": reason.message if full else "",
            "at": iso(reason.at),
        },
    } | ({} if full else {"outline": True})


def _next_instants(schedule: Schedule, now: float) -> list[float]:
    if schedule.paused:
        return []
    try:
        cron = parsed(schedule.cron, schedule.timezone)
    except Invalid:  # Of a time zone that is no more; `last_reason` says so.
        return []
    return cron.next(max(schedule.decided_until, now), NEXT_SHOWN)


def event_view(stored: StoredFact, belongs: Belongs | None) -> Json:
    """Return one line of history as event streams tell it."""
    fact = stored.fact
    return {
        "number": stored.number,
        "task_id": fact.task_id,
        "kind": fact.kind,
        "at": iso(fact.at),
        "status": fact.state.value,
        "attempt": None if fact.token is None else fact.token.attempt,
        "generation": None if fact.token is None else fact.token.generation,
        "worker": fact.worker,
        "detail": fact.detail,
        "task_type": None if belongs is None else belongs.task_type,
        "queue": None if belongs is None else belongs.queue,
    }


def outline_of_event(view: Json) -> Json:
    """Return of an event only what happened: a detail may quote the submitter or the handler."""
    return view | {"detail": None, "outline": True}


def worker_in_brief(view: Json, running: Sequence[Mapping[str, Any]], *, brief: bool) -> Json:
    """Return a worker as those see it who do not see everything.

    Args:
        view: All of it.
        running: Of what it runs, what they may see, in the words of the moderator.
        brief: Leave out what is for operators.
    """
    shown = view | {"running": [_running(item) for item in running]}
    return shown | {"telemetry": {}, "address": ""} if brief else shown


def worker_for_strangers(view: Json) -> Json:
    """Return who a worker is and whether it is there."""
    blank: Json = {"resources": {}, "free": {}, "labels": {}, "task_types": [], "trouble": None}
    return worker_in_brief(view, (), brief=True) | blank | {"slots": 0, "clock_ahead_s": 0.0}


def worker_view(worker: WorkerInfo) -> Json:
    """Return a worker as ``GET /workers`` shows it to operators."""
    return {
        "name": worker.name,
        "node_id": worker.node_id,
        "state": worker.state.value,
        "last_seen_at": iso(worker.last_seen_at),
        "last_seen_age_s": round(worker.last_seen_age_s, 3),
        "resources": dict(worker.resources),
        "free": dict(worker.free),
        "labels": dict(worker.labels),
        "task_types": worker.task_types,
        "slots": worker.slots,
        "running": [_running(item) for item in worker.running],
        "telemetry": dict(worker.telemetry),
        "draining_until": iso(worker.draining_until),
        "address": worker.address,
        "trouble": worker.trouble or None,
        "clock_ahead_s": worker.clock_ahead_s,
    } | ({} if worker.waiting is None else {"waiting": worker.waiting})


def _running(item: Mapping[str, Any]) -> Json:
    shown = dict(item)
    if isinstance(shown.get("started_at"), int | float):
        shown["started_at"] = iso(shown["started_at"])
    return shown

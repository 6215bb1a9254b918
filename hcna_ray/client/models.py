"""The values a client sends and receives: frozen, typed, parsed once from C1's JSON.

Instants are aware UTC `datetime`; durations are ``float`` seconds (``*_s``) or milliseconds
(``*_ms``). Parsing is tolerant of fields it does not know, so that an old client reads a newer C1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypedDict

from hcna_ray.client.errors import (
    TaskCancelled,
    TaskError,
    TaskExpired,
    TaskFailed,
    UnsendablePayload,
)

#: Statuses after which a task never moves again.
ENDED_STATUSES = frozenset({"completed", "failed", "cancelled", "expired"})

#: A JSON object to read / one we own.
JsonObject = Mapping[str, Any]
Json = dict[str, Any]


class Requires(TypedDict, total=False):
    """What a worker must have. Naming cpu, mem_gb, gpu or resources gives the task its own process.

    Keys: ``worker`` short name such as ``"W1"``; ``cpu`` and ``gpu`` in units; ``mem_gb`` in GiB;
    ``resources`` custom amounts by name; ``labels`` exact matches.
    """

    worker: str
    cpu: float
    mem_gb: float
    gpu: float
    resources: Mapping[str, float]
    labels: Mapping[str, str]


class Retry(TypedDict, total=False):
    """When to try again. ``retry_on`` lists failure kinds or Python exception class names."""

    max_attempts: int
    backoff_s: float
    factor: float
    max_backoff_s: float
    jitter: float
    retry_on: Sequence[str]


class MapOptions(TypedDict, total=False):
    """Optional fields that make sense for every task of a `Client.map`; see `TaskRequest`."""

    queue: str | None
    priority: int | None
    run_at: datetime | str | None
    expires_at: datetime | str | None
    queue_timeout_s: float | None
    retry: Retry | None
    requires: Requires | None
    depends_on: Sequence[str] | None
    ordering_key: str | None
    concurrency_key: str | None
    on_disconnect: str | None
    webhook: str | None
    metadata: JsonObject | None


class TaskOptions(MapOptions, total=False):
    """The optional fields of one task; `TaskRequest` has the same ones with their meaning."""

    timeout_s: float | None
    idempotency_key: str | None
    ref: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """A task to submit. What is left ``None`` takes C1's or the task type's default.

    Attributes:
        task_type: Name of the handler, e.g. ``"echo"``.
        payload: JSON object the handler receives.
        queue: Named lane, ``"default"`` if not given.
        priority: 0 to 9, larger sooner; 5 if not given.
        run_at: Not before this instant. A naive datetime is taken as local time.
        expires_at: Not started after this instant.
        timeout_s: Longest run of one attempt, seconds.
        queue_timeout_s: Longest wait in the queue, seconds.
        retry: Retry policy.
        requires: What the worker must have.
        depends_on: Ids that must complete first; in a batch also ``"ref:<ref>"``.
        ordering_key: Tasks with the same key run one after another, in order.
        concurrency_key: Tasks with the same key never run at the same time.
        on_disconnect: ``"replace"`` or ``"wait"`` when the worker disappears.
        idempotency_key: Submitting twice with the same key gives the same task.
        webhook: URL that is told how the task has ended.
        metadata: Free JSON object kept with the task.
        ref: Name of this task inside its batch.
    """

    task_type: str
    payload: JsonObject = field(default_factory=dict)
    queue: str | None = None
    priority: int | None = None
    run_at: datetime | str | None = None
    expires_at: datetime | str | None = None
    timeout_s: float | None = None
    queue_timeout_s: float | None = None
    retry: Retry | None = None
    requires: Requires | None = None
    depends_on: Sequence[str] | None = None
    ordering_key: str | None = None
    concurrency_key: str | None = None
    on_disconnect: str | None = None
    idempotency_key: str | None = None
    webhook: str | None = None
    metadata: JsonObject | None = None
    ref: str | None = None

    def to_json(self, *, without: Iterable[str] = ()) -> Json:
        """The request as C1 reads it: only what was given, instants in ISO 8601 UTC."""
        skipped = set(without)
        body: Json = {"task_type": self.task_type, "payload": dict(self.payload)}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in body or item.name in skipped or value is None:
                continue
            body[item.name] = format_instant(value) if isinstance(value, datetime) else value
        return body


def format_instant(at: datetime) -> str:
    """ISO 8601 in UTC with milliseconds and ``Z``. A naive datetime is taken as local time."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_instant(value: object) -> datetime | None:
    """An instant of C1's JSON as an aware UTC datetime; ``None`` stays ``None``."""
    if not isinstance(value, str) or not value:
        return None
    return datetime.fromisoformat(value).astimezone(UTC)


def dump_json(value: object) -> bytes:
    """Compact UTF-8 JSON. Raises `UnsendablePayload` for what JSON cannot say (NaN, sets, ...)."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsendablePayload(f"this cannot be sent as JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class Progress:
    """Last report of a running handler: ``percent`` 0 to 100 and a sentence."""

    percent: float
    message: str
    at: datetime | None


@dataclass(frozen=True, slots=True)
class PendingReason:
    """Why a task still waits, in plain words, and what would help."""

    code: str
    message: str
    fix: str


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """How a task failed: ``kind`` is one of error, timeout, lost, oom, poison, rejected."""

    kind: str
    message: str
    attempts: int
    type: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a task on one worker."""

    attempt: int
    generation: int
    worker: str | None
    node_id: str | None
    started_at: datetime | None
    ended_at: datetime | None
    outcome: str | None
    error: Json | None


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as C1 saw it when it answered. ``raw`` is the answer itself."""

    task_id: str
    task_type: str
    status: str
    queue: str
    priority: int
    accepted_at: datetime | None
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    run_at: datetime | None
    expires_at: datetime | None
    pending_reason: PendingReason | None
    progress: Progress | None
    result: Json | None
    error: TaskFailure | None
    attempts: tuple[Attempt, ...]
    failures: int
    losses: int
    cancel_requested: bool
    batch_id: str | None
    metadata: Json
    raw: Json = field(repr=False, compare=False)

    @property
    def ended(self) -> bool:
        """Whether the task will never move again."""
        return self.status in ENDED_STATUSES

    @property
    def worker(self) -> str | None:
        """Short name of the worker of the last attempt, or its node id, or ``None``."""
        if self.attempts:
            return self.attempts[-1].worker or self.attempts[-1].node_id
        processed_by = (self.result or {}).get("processed_by")
        return short_name(processed_by) if isinstance(processed_by, str) else None

    @property
    def duration_ms(self) -> float | None:
        """Run time of the last attempt: as the worker measured it, else end minus start."""
        told = (self.result or {}).get("duration_ms")
        if isinstance(told, int | float):
            return float(told)
        if self.started_at and self.finished_at:
            return (self.finished_at - self.started_at).total_seconds() * 1000
        return None

    def _repr_html_(self) -> str:
        from hcna_ray.client.html import task_html

        return task_html(self)

    def problem(self) -> TaskError | None:
        """The exception that tells how this task ended, or ``None`` if it completed or goes on."""
        if self.status == "failed":
            failure = self.error or TaskFailure("error", "no reason was recorded", 0)
            return TaskFailed(self.task_id, failure.kind, failure.message, failure.attempts)
        tries = self.error.attempts if self.error else len(self.attempts)
        if self.status == "cancelled":
            said = self.error.message if self.error else "it was cancelled"
            return TaskCancelled(self.task_id, "cancelled", said, tries)
        if self.status == "expired":
            said = self.error.message if self.error else "its expires_at passed before a start"
            return TaskExpired(self.task_id, "expired", said, tries)
        return None

    @classmethod
    def from_json(cls, raw: Json) -> TaskView:
        """Parse the answer of ``GET /tasks/{id}``, an item of a listing or of a submit."""
        reason, progress, error = raw.get("pending_reason"), raw.get("progress"), raw.get("error")
        return cls(
            task_id=str(raw["task_id"]),
            task_type=str(raw.get("task_type") or ""),
            status=str(raw.get("status") or "queued"),
            queue=str(raw.get("queue") or "default"),
            priority=int(raw.get("priority") or 0),
            accepted_at=parse_instant(raw.get("accepted_at")),
            queued_at=parse_instant(raw.get("queued_at")),
            started_at=parse_instant(raw.get("started_at")),
            finished_at=parse_instant(raw.get("finished_at")),
            run_at=parse_instant(raw.get("run_at")),
            expires_at=parse_instant(raw.get("expires_at")),
            pending_reason=None
            if not isinstance(reason, dict)
            else PendingReason(
                str(reason.get("code") or ""),
                str(reason.get("message") or ""),
                str(reason.get("fix") or ""),
            ),
            progress=None
            if not isinstance(progress, dict)
            else Progress(
                float(progress.get("percent") or 0.0),
                str(progress.get("message") or ""),
                parse_instant(progress.get("at")),
            ),
            result=raw.get("result"),
            error=None
            if not isinstance(error, dict)
            else TaskFailure(
                str(error.get("kind") or "error"),
                str(error.get("message") or ""),
                int(error.get("attempts") or 0),
                error.get("type"),
            ),
            attempts=tuple(_attempt(item) for item in raw.get("attempts") or ()),
            failures=int(raw.get("failures") or 0),
            losses=int(raw.get("losses") or 0),
            cancel_requested=bool(raw.get("cancel_requested")),
            batch_id=raw.get("batch_id"),
            metadata=raw.get("metadata") or {},
            raw=raw,
        )


def _attempt(raw: Json) -> Attempt:
    return Attempt(
        attempt=int(raw.get("attempt") or 0),
        generation=int(raw.get("generation") or 0),
        worker=raw.get("worker"),
        node_id=raw.get("node_id"),
        started_at=parse_instant(raw.get("started_at")),
        ended_at=parse_instant(raw.get("ended_at")),
        outcome=raw.get("outcome"),
        error=raw.get("error"),
    )


def short_name(node_id: str) -> str:
    """``HCNA-W1--prod--home--v1.0`` gives ``W1``; anything else is returned as it is."""
    head = node_id.partition("--")[0]
    return head.rpartition("-")[2] or node_id


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the moderator knows it. Resources are amounts by name; memory in GiB."""

    name: str
    node_id: str
    state: str
    last_seen_at: datetime | None
    last_seen_age_s: float | None
    resources: Json
    free: Json
    labels: Json
    task_types: tuple[str, ...]
    slots: int
    running: tuple[Json, ...]
    telemetry: Json
    #: Where it is.
    address: str
    #: Why it can run nothing although it is there, or ``None``.
    trouble: str | None
    raw: Json = field(repr=False, compare=False)

    @property
    def figures(self) -> Json:
        """What it measured last: ``cpu_percent``, ``load_1m``, ``disk_free_bytes``, ...

        Empty before its first heartbeat, and for a key that may not see it.
        """
        told = self.telemetry.get("payload")
        return told if isinstance(told, dict) else {}

    def _repr_html_(self) -> str:
        from hcna_ray.client.html import worker_html

        return worker_html(self)

    @classmethod
    def from_json(cls, raw: Json) -> Worker:
        """Parse a worker view."""
        age = raw.get("last_seen_age_s")
        return cls(
            name=str(raw["name"]),
            node_id=str(raw.get("node_id") or raw["name"]),
            state=str(raw.get("state") or "unknown"),
            last_seen_at=parse_instant(raw.get("last_seen_at")),
            last_seen_age_s=None if age is None else float(age),
            resources=raw.get("resources") or {},
            free=raw.get("free") or {},
            labels=raw.get("labels") or {},
            task_types=tuple(raw.get("task_types") or ()),
            slots=int(raw.get("slots") or 0),
            running=tuple(raw.get("running") or ()),
            telemetry=raw.get("telemetry") or {},
            address=str(raw.get("address") or ""),
            trouble=raw.get("trouble") or None,
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    """Content-addressed bytes that C1 holds. ``sha256`` is what payloads name."""

    sha256: str
    size: int
    uri: str

    @classmethod
    def from_json(cls, raw: Json) -> Artifact:
        """Parse the answer of a finished upload."""
        sha256 = str(raw["sha256"])
        return cls(sha256, int(raw.get("size") or 0), str(raw.get("uri") or f"/artifacts/{sha256}"))


@dataclass(frozen=True, slots=True)
class Health:
    """What C1 says of itself: ``status`` is healthy, degraded or unhealthy."""

    status: str
    node_id: str
    moderator_connected: bool
    worker_nodes: int
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Json) -> Health:
        """Parse ``GET /health``."""
        return cls(
            str(raw["status"]),
            str(raw.get("node_id") or ""),
            bool(raw.get("moderator_connected")),
            int(raw.get("worker_nodes") or 0),
            raw,
        )


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Everything at a glance, as far as the key may see it (``GET /status``).

    Attributes:
        node_id: C1's name.
        moderator: M1's own figures, or ``None`` while it does not answer or waits for its store.
        moderator_waits_for_store: M1 has said that it cannot use its task store.
        store_readable: C1 can read the task store; if not, ``queues`` is empty whatever there is.
        workers: Every worker on record.
        queues: Tasks by queue and status.
        paused: Queues that are held.
        totals: Tasks ``accepted`` and ended (``completed``, ``failed``, ``cancelled``,
            ``expired``) since the store was made; ``None`` while it cannot be read.
    """

    node_id: str
    moderator: Json | None
    moderator_waits_for_store: bool
    store_readable: bool
    workers: tuple[Worker, ...]
    queues: dict[str, dict[str, int]]
    paused: tuple[str, ...]
    totals: dict[str, int] | None
    raw: Json = field(repr=False, compare=False)

    def count(self, status: str) -> int:
        """Tasks of that status, over all queues."""
        return sum(states.get(status, 0) for states in self.queues.values())

    @classmethod
    def from_json(cls, raw: Json) -> ClusterStatus:
        """Parse ``GET /status``."""
        return cls(
            node_id=str(raw.get("node_id") or ""),
            moderator=raw.get("moderator"),
            moderator_waits_for_store=bool(raw.get("moderator_waits_for_store")),
            # An older C1 does not say.
            store_readable=raw.get("store_readable") is not False,
            workers=tuple(Worker.from_json(item) for item in raw.get("workers") or ()),
            queues={str(name): dict(states) for name, states in (raw.get("queues") or {}).items()},
            paused=tuple(raw.get("paused") or ()),
            totals=raw.get("totals"),
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class IntentAnswer:
    """A worker's answer to an intent."""

    msg_id: str
    dst: str
    intent: str
    answer: Json
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Json) -> IntentAnswer:
        """Parse the answer of ``POST /admin/send-intent``."""
        return cls(
            str(raw.get("msg_id") or ""),
            str(raw.get("dst") or ""),
            str(raw.get("intent") or ""),
            raw.get("answer") or {},
            raw,
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a task stands and why, for people (`Client.why`).

    ``code`` is stable; ``fix`` is the next step, empty once a task has completed; ``history`` has
    one line for each attempt.
    """

    task_id: str
    status: str
    code: str
    message: str
    fix: str
    history: tuple[str, ...]

    def _repr_html_(self) -> str:
        from hcna_ray.client.html import explanation_html

        return explanation_html(self)

    def to_json(self) -> Json:
        """Plain object, for ``--json``."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def explain(task: TaskView) -> Explanation:
    """Say in one sentence where the task stands.

    C1 says it of a task that was asked for by itself; of one in a listing, and of an older C1's,
    what the view has is put together here.
    """
    told = task.raw.get("why")
    code, fix = task.status, ""
    where = task.worker or "a worker"
    if isinstance(told, dict):
        code, message = str(told.get("code") or task.status), str(told.get("message") or "")
        fix = str(told.get("fix") or "")
    elif task.pending_reason:
        code, message = task.pending_reason.code, task.pending_reason.message
        fix = task.pending_reason.fix
    elif task.status == "scheduled":
        message = "waits for its time" if not task.run_at else f"runs at {task.run_at.isoformat()}"
    elif task.status == "queued":
        message = "queued; M1 is about to place it"
    elif task.status == "running":
        message = f"runs on {where}"
        if task.progress:
            message += f", {task.progress.percent:.0f} % {task.progress.message}".rstrip()
    elif task.status == "completed":
        took = f" in {task.duration_ms:.0f} ms" if task.duration_ms is not None else ""
        message = f"completed on {where}{took}"
    else:
        problem = task.problem()
        message = problem.message if problem else task.status
        if isinstance(problem, TaskFailed):
            code, fix = problem.kind, f"hcna task retry {task.task_id}"
    history = tuple(
        f"attempt {item.attempt} on {item.worker or item.node_id or '?'}: "
        f"{item.outcome or 'running'}"
        + (f" ({item.error.get('message', '')})" if item.error else "")
        for item in task.attempts
    )
    return Explanation(task.task_id, task.status, code, message, fix, history)

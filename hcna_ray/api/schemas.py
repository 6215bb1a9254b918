"""The shapes of requests and answers. Requests are strict: no unknown fields, no conversions.

Requests are checked against these models by hand, after `hcna_ray.api.strict_json`. Answers are
built as plain objects (`hcna_ray.api.views`); their models here document them in ``/openapi.json``
and the tests hold every answer against them.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

#: Longest duration in a request: 30 days.
DURATION_S_MAX = 30 * 86400.0
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,200}\Z")


class Strict(BaseModel):
    """Base of every request: frozen, no unknown fields, no silent conversions, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Answer(BaseModel):
    """Base of every answer."""

    model_config = ConfigDict(extra="forbid")


def _instant(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("must be an ISO 8601 instant such as 2030-01-31T12:00:00Z")
    try:
        found = datetime.fromisoformat(value) if len(value) <= 40 else None
    except ValueError:
        found = None
    if found is None or len(value) < 16:
        raise ValueError("is not an ISO 8601 instant such as 2030-01-31T12:00:00Z")
    if found.tzinfo is None:
        raise ValueError("has no time zone; end it with Z or an offset such as +02:00")
    if not 1970 < found.year < 9999:
        raise ValueError("lies outside of the years 1971 to 9998")
    return found.astimezone(UTC).timestamp()


#: Seconds since the epoch inside, ISO 8601 with a time zone outside.
Instant = Annotated[
    float, BeforeValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})
]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:\-]{0,63}\z")]
NodeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,127}\z")]
TaskTypeName = Annotated[str, StringConstraints(min_length=1, max_length=100)]
TaskId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}\z")]
Ref = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,63}\z")]
#: A task id, or in a batch ``ref:<ref>`` of another item.
DependencyName = Annotated[
    str, StringConstraints(pattern=r"^(ref:)?[A-Za-z0-9][A-Za-z0-9._\-]{0,63}\z")
]
Key = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,200}\z")]
IdempotencyKey = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,200}\z")]
Amount = Annotated[float, Field(ge=0, le=1e6)]
Seconds = Annotated[float, Field(gt=0, le=DURATION_S_MAX)]
JsonObject = dict[str, Any]


class RetryIn(Strict):
    """When a failed attempt is tried again; what is left out takes the type's or C1's default."""

    max_attempts: Annotated[int, Field(ge=1, le=1000)] | None = None
    backoff_s: Annotated[float, Field(ge=0, le=86400)] | None = None
    factor: Annotated[float, Field(ge=1, le=100)] | None = None
    max_backoff_s: Annotated[float, Field(ge=0, le=DURATION_S_MAX)] | None = None
    jitter: Annotated[float, Field(ge=0, le=1)] | None = None
    retry_on: Annotated[list[Name], Field(max_length=100)] | None = Field(
        default=None, description="Failure kinds (error, timeout) and exception class names."
    )


class RequiresIn(Strict):
    """What a worker must have. cpu, mem_gb, gpu or resources give the task a process of its own."""

    worker: NodeName | None = Field(default=None, description="Short name or node id.")
    cpu: Amount | None = None
    mem_gb: Amount | None = None
    gpu: Amount | None = None
    resources: Annotated[dict[Name, Amount], Field(max_length=32)] | None = None
    labels: (
        Annotated[
            dict[Name, Annotated[str, StringConstraints(max_length=128)]], Field(max_length=32)
        ]
        | None
    ) = None


class ScheduledTaskIn(Strict):
    """A task that a schedule submits: all but what concerns one submission alone."""

    task_type: TaskTypeName = Field(description="Name of the handler, e.g. echo.")
    payload: JsonObject = Field(default_factory=dict, description="What the handler receives.")
    queue: Name = "default"
    priority: int = Field(default=5, ge=0, le=9, description="Larger runs sooner.")
    timeout_s: Seconds | None = Field(default=None, description="Longest run of one attempt.")
    queue_timeout_s: Seconds | None = Field(default=None, description="Longest wait in the queue.")
    retry: RetryIn | None = None
    requires: RequiresIn | None = None
    ordering_key: Key | None = Field(default=None, description="Same key: one after another.")
    concurrency_key: Key | None = Field(default=None, description="Same key: so many at a time.")
    on_disconnect: Literal["replace", "wait"] = Field(
        default="replace", description="When the worker falls silent: run elsewhere, or wait."
    )
    webhook: Annotated[str, StringConstraints(max_length=2048)] | None = Field(
        default=None, description="URL that is told, by a signed POST, how the task has ended."
    )
    metadata: JsonObject | None = Field(default=None, description="Kept with the task.")


class TaskIn(ScheduledTaskIn):
    """A task to run."""

    run_at: Instant | None = Field(default=None, description="Not before this instant.")
    expires_at: Instant | None = Field(default=None, description="Not started after this instant.")
    depends_on: Annotated[list[DependencyName], Field(max_length=100_000)] = Field(
        default_factory=list, description="Tasks that must complete first."
    )
    idempotency_key: IdempotencyKey | None = Field(
        default=None, description="Sending it again returns the task stored before."
    )

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        run_at, expires_at = self.run_at, self.expires_at
        if run_at is not None and expires_at is not None and expires_at <= run_at:
            raise ValueError("expires_at must lie after run_at")
        return self


class BatchTaskIn(TaskIn):
    """A task in a batch, which others of the same batch may refer to."""

    ref: Ref | None = Field(default=None, description="Name for depends_on: ['ref:<ref>'].")


class BatchIn(Strict):
    """Many tasks at once. The same may be sent as NDJSON, one task a line."""

    tasks: list[BatchTaskIn]


class WaitIn(Strict):
    """What to wait for: ``ids`` or ``batch_id``."""

    ids: list[TaskId] | None = None
    batch_id: TaskId | None = None
    cursor: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}\z")] | None = Field(
        default=None, description="The cursor of the answer before."
    )
    wait: float = Field(default=0.0, ge=0, description="Seconds.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.ids is None) == (self.batch_id is None):
            raise ValueError("give either ids or batch_id")
        return self


OverlapName = Literal["skip", "queue_one", "allow", "cancel_previous"]


class ScheduleChangeIn(Strict):
    """When which task is submitted."""

    cron: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        description="Five fields (minute, hour, day of month, month, day of week), or @hourly, "
        "@daily, @weekly, @monthly, @yearly."
    )
    timezone: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        default="UTC", description="Name in the IANA database, e.g. Europe/Berlin."
    )
    task: ScheduledTaskIn
    overlap: OverlapName = Field(
        default="skip",
        description="At an instant at which the last task has not ended: submit none, one when it "
        "has ended, one beside it, or one in its place.",
    )
    catch_up_s: float = Field(
        default=3600.0,
        ge=10,
        le=7 * 86400,
        description="How long after an instant its task is still submitted, when M1 was off or "
        "asleep, or the task was refused for a while.",
    )
    paused: bool = Field(default=False, description="Submit nothing until it is resumed.")


class ScheduleIn(ScheduleChangeIn):
    """A new schedule."""

    name: Name = Field(description="Names it among those of its owner.")
    starts_at: Instant | None = Field(
        default=None,
        description="No instant before this one counts. It may lie in the past: what has gone by "
        "since is made up for as far as catch_up_s reaches. Default: now.",
    )


class CancelIn(Strict):
    """Why a task is cancelled."""

    reason: Annotated[str, StringConstraints(max_length=500)] = ""


class Nothing(Strict):
    """An empty object, or no body at all."""


class ReplayFilterIn(Strict):
    """Which failed tasks to run again."""

    task_type: TaskTypeName | None = None
    queue: Name | None = None
    kind: Literal["error", "timeout", "lost", "oom", "poison", "rejected"] | None = None
    since: Instant | None = None


class ReplayIn(Strict):
    """Run failed tasks again, as many as fit the filter."""

    filter: ReplayFilterIn
    limit: int = Field(default=1000, ge=1, le=10_000)


class DrainIn(Strict):
    """How long running work may go on before it is stopped and moved."""

    deadline_s: Annotated[float, Field(ge=0, le=DURATION_S_MAX)] | None = None


class IntentIn(Strict):
    """An intent for a node."""

    dst: NodeName = Field(description="Node id or short name.")
    intent: Name = Field(description="e.g. test.ping")
    payload: JsonObject = Field(default_factory=dict)


# -- queries ---------------------------------------------------------------------------------------
# Values of a query are text, so these are not strict; unknown names are refused all the same.


class Query(BaseModel):
    """Base of every query string."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoQuery(Query):
    """No parameters."""


class TaskQuery(Query):
    """How to look at one task."""

    wait: float = Field(default=0.0, ge=0, description="Seconds to wait for its end.")
    payload: bool = Field(default=False, description="Show the payload too.")


class BatchQuery(Query):
    """How to take a batch."""

    atomic: bool = Field(default=False, description="All items or none.")


class ListQuery(Query):
    """Which tasks to list. Several states are separated by commas."""

    status: Annotated[str, StringConstraints(max_length=100)] | None = None
    task_type: TaskTypeName | None = None
    queue: Name | None = None
    worker: NodeName | None = None
    batch_id: TaskId | None = None
    since: Instant | None = None
    cursor: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}\z")] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


#: Whose something is: the owner of a key.
OwnerName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,64}\z")]
#: Owner and name of the last schedule of a page.
ScheduleCursor = Annotated[
    str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,64}/[A-Za-z0-9._:\-]{1,64}\z")
]


class ScheduleQuery(Query):
    """Whose schedule is meant."""

    owner: OwnerName | None = Field(default=None, description="Whose it is; default: one's own.")


class SchedulesQuery(Query):
    """Which schedules to list."""

    owner: OwnerName | None = Field(
        default=None, description="Whose; default: all that the caller may see."
    )
    cursor: ScheduleCursor | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class WebhooksQuery(Query):
    """How many reports to show."""

    limit: Annotated[int, Field(ge=1)] | None = None


#: How far somebody has read: the ``id`` of an event, or 0 for the beginning.
PlaceText = Annotated[
    str, StringConstraints(pattern=r"^(0|(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,17}))\z")
]


class TaskEventsQuery(Query):
    """From where on, and for how long."""

    after: PlaceText | None = Field(
        default=None,
        description="Id of the last event seen, 0 for all; Last-Event-ID overrules it.",
    )
    follow: bool = Field(default=True, description="False: end when everything there is was told.")


class EventsQuery(TaskEventsQuery):
    """Which events to tell. Several kinds are separated by commas."""

    task_type: TaskTypeName | None = None
    queue: Name | None = None
    kind: Annotated[str, StringConstraints(pattern=r"^[a-z_]+(,[a-z_]+){0,19}\z")] | None = None


class OutputQuery(Query):
    """Which output, and from where on."""

    attempt: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="Number of the attempt; the newest unless said."
    )
    offset: int = Field(default=0, ge=0, le=1 << 40, description="Bytes that are left out.")
    follow: bool = Field(default=False, description="Go on until the attempt has ended.")


class ArtifactQuery(Query):
    """Which bytes are sent."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}\z")] | None = Field(
        default=None, description="SHA-256 of the whole artifact; compulsory for parts."
    )


class PageQuery(Query):
    """A page of something."""

    cursor: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}\z")] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class TargetsQuery(Query):
    """Which targets to list."""

    job: Literal["hcna", "ray"] | None = Field(default=None, description="Only those of one job.")


class ForgetQuery(Query):
    """Which workers may be forgotten."""

    force: bool = Field(default=False, description="Also a worker that is in contact.")


# -- answers ---------------------------------------------------------------------------------------

Status = Literal["scheduled", "queued", "running", "completed", "failed", "cancelled", "expired"]
Time = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]


class FieldProblem(Answer):
    """One field and what is wrong with it."""

    field: str
    message: str


class ProblemOut(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    fix: str = Field(default="", description="The next step.")
    errors: list[FieldProblem] = []
    retry_after_s: int | None = None
    request_id: str = Field(default="", description="X-Request-ID of this answer.")


class SubmitOut(Answer):
    """An accepted task."""

    task_id: str
    status: Status
    message: str
    duplicate: bool = False


class BatchItemOut(Answer):
    """What became of one item: an id, or a problem."""

    index: int
    task_id: str | None = None
    status: Status | None = None
    duplicate: bool = False
    error: ProblemOut | None = None


class BatchOut(Answer):
    """An accepted batch."""

    batch_id: str
    accepted: int
    rejected: int
    results: list[BatchItemOut]


class PendingReasonOut(Answer):
    """Why a task waits, and what would help."""

    code: str
    message: str
    fix: str


class WhyOut(Answer):
    """Where a task stands, in one sentence, and the next step; empty where there is none."""

    code: str
    message: str
    fix: str


class ProgressOut(Answer):
    """The last progress a handler reported."""

    percent: float | None
    message: str
    at: Time


class FailureOut(Answer):
    """Why a task failed, or how it was stopped."""

    kind: str
    message: str
    attempts: int
    type: str | None = None


class AttemptErrorOut(Answer):
    """Why an attempt failed."""

    kind: str
    message: str
    type: str | None = None
    traceback: str | None = None


class AttemptOut(Answer):
    """One try."""

    attempt: int
    generation: int
    worker: str
    node_id: str
    started_at: Time | None
    ended_at: Time | None
    outcome: Literal["completed", "errored", "timed_out", "lost", "cancelled"] | None
    error: AttemptErrorOut | None


class TaskScheduleOut(Answer):
    """The schedule that a task comes from."""

    name: str
    instant: Time = Field(description="The instant that it is for.")


class TaskOut(Answer):
    """A task as it stands. In listings and waits ``attempts`` and ``why`` are left out."""

    task_id: str
    task_type: str
    status: Status
    queue: str
    priority: int
    payload: JsonObject | None = None
    accepted_at: Time
    queued_at: Time | None
    started_at: Time | None
    finished_at: Time | None
    run_at: Time | None
    expires_at: Time | None
    pending_reason: PendingReasonOut | None
    why: WhyOut | None = None
    progress: ProgressOut | None
    result: JsonObject | None
    error: FailureOut | None
    attempts: list[AttemptOut] = []
    failures: int
    losses: int
    cancel_requested: bool
    depends_on: list[str]
    batch_id: str | None
    metadata: JsonObject | None
    traceparent: str | None
    schedule: TaskScheduleOut | None = None
    outline: bool = Field(
        default=False,
        description="A viewer sees no more than this of the tasks of others: neither what was "
        "submitted nor what came of it.",
    )


class WaitOut(Answer):
    """What has ended since the cursor, and how many have not."""

    ended: list[TaskOut]
    cursor: str
    pending: int


class EventOut(Answer):
    """What an event's ``data`` holds: one line of a task's history."""

    number: int
    task_id: str
    kind: str
    at: Time
    status: Status = Field(description="The task's status after it.")
    attempt: int | None
    generation: int | None
    worker: str | None
    detail: str | None
    task_type: str | None
    queue: str | None
    outline: bool = Field(default=False, description="A viewer is not told details of others.")


class TasksOut(Answer):
    """A page of tasks, newest first."""

    tasks: list[TaskOut]
    next_cursor: str | None


class CancelOut(Answer):
    """A cancel that was taken: 200 when the task has ended by it, 202 when it is being stopped."""

    task_id: str
    status: Status
    cancel_requested: Literal[True]


class ReplayOut(Answer):
    """Which tasks run again."""

    retried: list[str]
    more: bool


class UploadOut(Answer):
    """A stored artifact (201), or how much of it is there (202)."""

    sha256: str
    size: int
    uri: str | None = None
    received: int | None = None


class WorkerOut(Answer):
    """One worker."""

    name: str
    node_id: str
    state: Literal["online", "suspect", "asleep", "draining", "cordoned", "gone"]
    last_seen_at: Time | None
    last_seen_age_s: float
    resources: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str]
    task_types: list[str]
    slots: int
    running: list[JsonObject]
    telemetry: JsonObject
    draining_until: Time | None = None
    address: str = ""
    trouble: str | None = Field(
        default=None, description="Why it can run nothing although it is there."
    )
    clock_ahead_s: float = Field(
        default=0.0, description="How far its wall clock is ahead of M1's; below 0 it is behind."
    )
    waiting: int | None = Field(
        default=None, description="Tasks that wait for this very worker; told when it is forgotten."
    )


class WorkersOut(Answer):
    """Every worker on record."""

    workers: list[WorkerOut]
    moderator_connected: bool = True


class IntentOut(Answer):
    """A node's answer to an intent."""

    msg_id: str
    dst: str
    intent: str
    answer: JsonObject


class QueueOut(Answer):
    """A queue, paused or not."""

    queue: str
    paused: bool


class AuditLineOut(Answer):
    """Who did what, when, and how it ended."""

    number: int
    at: Time
    principal: str
    action: str
    target: str
    outcome: str
    detail: str
    hash: str | None


class AuditOut(Answer):
    """A page of the audit log, newest first."""

    entries: list[AuditLineOut]
    next_cursor: str | None


class KeyOut(Answer):
    """A key; what it is nobody knows but its holder."""

    name: str
    role: str
    owner: str
    task_types: list[str]
    queues: list[str]
    created_at: Time
    expires_at: Time | None
    revoked_at: Time | None
    state: Literal["good", "expired", "revoked"]
    quota: int | None
    rate: float | None
    burst: int | None
    fingerprint: str


class KeysOut(Answer):
    """All keys."""

    keys: list[KeyOut]


class ScheduleReasonOut(Answer):
    """Why the last instant that was not started was not."""

    code: str
    message: str
    at: Time


class ScheduleOut(Answer):
    """A schedule and how far it has come."""

    name: str
    owner: str
    cron: str
    timezone: str
    task: JsonObject
    overlap: OverlapName
    catch_up_s: float
    paused: bool
    created_at: Time
    changed_at: Time
    next_at: list[Time] = Field(description="The next few instants.")
    last_at: Time | None = Field(description="The instant that the last task is for.")
    last_task_id: str | None
    waiting_at: Time | None = Field(
        description="The instant whose task is submitted when the last one has ended."
    )
    started: int
    skipped: int
    missed: int
    last_reason: ScheduleReasonOut | None
    outline: bool = Field(
        default=False, description="A viewer sees no more than this of the schedules of others."
    )


class SchedulesOut(Answer):
    """A page of schedules, by owner and name."""

    schedules: list[ScheduleOut]
    next_cursor: str | None


class WebhookSecretOut(Answer):
    """What reports on one's own tasks are signed with."""

    secret: str


class WebhookOut(Answer):
    """A report that waits."""

    id: str
    task_id: str
    principal: str
    target: str
    created_at: str
    due_at: str
    tries: int
    note: str


class WebhooksOut(Answer):
    """Reports that wait."""

    waiting: list[WebhookOut]


class WhoOut(Answer):
    """The key that a request was made with."""

    name: str
    role: Literal["viewer", "submitter", "operator", "admin"]
    owner: str = Field(description="Whose tasks it submits and sees.")
    task_types: list[str] = Field(description="Task types it is limited to; empty: every one.")
    queues: list[str] = Field(description="Queues likewise.")
    expires_at: Time | None


class HealthOut(Answer):
    """How the whole is doing."""

    status: Literal["healthy", "degraded", "unhealthy"]
    node_id: str
    moderator_connected: bool
    worker_nodes: int
    store_readable: bool
    tasks: dict[str, int]
    version: str


class ReadyOut(Answer):
    """Whether work can be taken now, and if not why."""

    ready: bool
    reasons: list[str]


class LiveOut(Answer):
    """This replica answers."""

    alive: Literal[True]


class StatusOut(BaseModel):
    """Everything at a glance."""

    node_id: str
    versions: dict[str, str]
    started_at: Time
    moderator: JsonObject | None
    moderator_waits_for_store: bool = Field(
        description="`moderator` is null because M1 cannot use its task store; else it is silent."
    )
    store_readable: bool = Field(
        description="C1 can read the task store; if not, `queues` is empty whatever there is."
    )
    workers: list[JsonObject]
    queues: dict[str, dict[str, int]]
    totals: dict[str, int] | None
    paused: list[str]
    requests: dict[str, dict[str, int]]
    task_types: list[str]
    problems: list[str]


class TargetGroupOut(BaseModel):
    """Addresses that Prometheus scrapes, and the labels of what it finds there."""

    targets: list[str]
    labels: dict[str, str]


class TargetsOut(RootModel[list[TargetGroupOut]]):
    """What Prometheus' HTTP service discovery reads."""

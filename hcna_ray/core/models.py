"""Values the whole house speaks in: tasks, leases, attempts, workers and what they need.

All are frozen. A `Task` has two parts: its `TaskSpec`, which never changes after acceptance, and
the fields beside it, which only `hcna_ray.core.machine` changes, by returning a new `Task`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from typing import Any, NamedTuple, Self

PRIORITY_MIN = 0
PRIORITY_MAX = 9
PRIORITY_DEFAULT = 5
DEFAULT_QUEUE = "default"

#: How long after a task's run timeout the moderator itself ends an attempt that its worker should
#: have stopped. Long enough for the worker's own SIGTERM, grace and SIGKILL.
RUN_TIMEOUT_GRACE_S = 30.0

#: Slot number of an attempt that has a Ray task of its own.
HEAVY_SLOT = -1

#: Principal of the house's own key: it sees every task, and nothing is counted against it.
OWNER = "owner"


class TaskState(StrEnum):
    """Where a task stands. A granted task is still ``queued``; a backoff is ``scheduled``."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset(
    {TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
)


class Outcome(StrEnum):
    """How one attempt ended."""

    COMPLETED = "completed"
    ERRORED = "errored"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    CANCELLED = "cancelled"


class FailureKind(StrEnum):
    """Why a task is ``failed``."""

    ERROR = "error"
    TIMEOUT = "timeout"
    LOST = "lost"
    OOM = "oom"
    POISON = "poison"
    REJECTED = "rejected"


class OnDisconnect(StrEnum):
    """What becomes of a running task whose worker went silent."""

    REPLACE = "replace"
    WAIT = "wait"


class Hold(IntFlag):
    """Why a queued task is kept out of the dispatch index."""

    NONE = 0
    #: An earlier task of the same ordering key has not ended.
    ORDERING = 1
    #: As many tasks of the same concurrency key as are allowed are live.
    CONCURRENCY = 2


class Token(NamedTuple):
    """Fencing token of one attempt. Never reissued: a restored backup raises ``generation``."""

    generation: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.generation}.{self.attempt}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """When a failed attempt is tried again. Lost attempts are counted apart."""

    #: Attempts that may fail before the task does; 1 means no retry.
    max_attempts: int = 1
    #: Pause before the second attempt.
    backoff_s: float = 1.0
    #: Each further pause is this many times the one before.
    factor: float = 2.0
    max_backoff_s: float = 300.0
    #: Share of the pause, 0 to 1, by which it is randomly shortened or lengthened.
    jitter: float = 0.1
    #: Failure kinds and exception class names that are worth another attempt.
    retry_on: tuple[str, ...] = ("error", "timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a worker must have for a task to run there."""

    worker: str | None = None
    cpu: float = 0.0
    mem_gb: float = 0.0
    gpu: float = 0.0
    #: Custom Ray resources, as sorted (name, amount) pairs.
    resources: tuple[tuple[str, float], ...] = ()
    #: Labels that must match, as sorted (name, value) pairs.
    labels: tuple[tuple[str, str], ...] = ()
    #: Ask for a process of its own even without needing CPU, memory or GPU.
    isolated: bool = False

    @property
    def heavy(self) -> bool:
        """Whether the task gets a Ray task of its own instead of a place in a slot."""
        return bool(self.cpu or self.mem_gb or self.gpu or self.resources or self.isolated)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskError:
    """Why a task or an attempt failed. ``message`` is for people; rules use the other fields."""

    kind: FailureKind
    message: str
    #: Class name of the exception, where there was one.
    type: str | None = None
    traceback: str | None = None
    retryable: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The last progress a handler reported."""

    at: float
    percent: float | None = None
    message: str = ""


@dataclass(frozen=True, kw_only=True)  # No slots: made and pickled by the thousand, see `Task`.
class TaskSpec:
    """What was accepted. Never changes."""

    id: str
    task_type: str
    #: JSON, already checked against the type's payload model. The moderator never parses it.
    payload: bytes = b"{}"
    queue: str = DEFAULT_QUEUE
    priority: int = PRIORITY_DEFAULT
    accepted_at: float = 0.0
    run_at: float | None = None
    expires_at: float | None = None
    #: Longest one attempt may run.
    timeout_s: float = 300.0
    #: Longest wait in the queue, counted from `Task.queued_at`.
    queue_timeout_s: float | None = None
    retry: RetryPolicy = RetryPolicy()
    max_losses: int = 3
    needs: Needs = Needs()
    depends_on: tuple[str, ...] = ()
    ordering_key: str | None = None
    concurrency_key: str | None = None
    on_disconnect: OnDisconnect = OnDisconnect.REPLACE
    #: Longest time a task with ``on_disconnect: wait`` is kept for its silent worker.
    wait_max_s: float = 3600.0
    principal: str = ""
    idempotency_key: str | None = None
    #: SHA-256 (hex) of the validated request: tells a retry from another body under the same key.
    fingerprint: str = ""
    batch_id: str | None = None
    traceparent: str | None = None
    webhook: str | None = None
    #: JSON object of the submitter's own, or ``None``.
    metadata: bytes | None = None
    #: Whether its attempts read its principal's artifacts alone: the key that it was submitted with
    #: does not see everything. Not so of what was accepted before there were such keys.
    confined: bool = False
    #: The schedule of its principal that it comes from, and the instant that it is for; a task that
    #: somebody has asked a schedule for has the instant at which it was.
    schedule: str | None = None
    schedule_at: float | None = None

    @property
    def bytes_stored(self) -> int:
        """Bytes this task counts for against the queue's byte limit."""
        return len(self.payload) + len(self.metadata or b"") + 512


class Lease(NamedTuple):
    """A worker's right to start one attempt, until its session ends.

    A lease exists exactly while a task is granted (state ``queued``) or ``running``. Renewal is per
    worker session and in memory; only the lease itself is durable.
    """

    token: Token
    worker: str
    #: One life of the worker's agent. An older incarnation can never report again.
    incarnation: str
    #: Slot number, or `HEAVY_SLOT`.
    slot: int
    #: Number of the exchange that handed it out, so that the same exchange gets the same answer.
    grant_seq: int
    granted_at: float
    started_at: float | None = None


@dataclass(frozen=True, kw_only=True)  # No slots: `evolve` copies a dictionary.
class Task:
    """One durable unit of work and where it stands."""

    spec: TaskSpec
    #: Accept sequence, assigned by the store's writer; orders equals.
    seq: int
    state: TaskState
    #: When it may run: ``run_at``, or the end of a backoff.
    due_at: float
    #: Ascending dispatch order, fixed when queued: ``due_at - priority * ageing_step_s``.
    dispatch_key: float
    #: Number of the newest attempt granted; with the store's generation, the fencing token.
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    #: Dependencies that have not completed yet.
    unmet: int = 0
    hold: Hold = Hold.NONE
    lease: Lease | None = None
    #: Set while a task with ``on_disconnect: wait`` is kept for a silent worker.
    pinned_to: str | None = None
    pinned_until: float | None = None
    queued_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    cancel_requested_at: float | None = None
    cancel_reason: str = ""
    progress: Progress | None = None
    #: JSON handed to the next attempt.
    checkpoint: bytes | None = None
    #: JSON object, once completed.
    result: bytes | None = None
    error: TaskError | None = None
    #: Raised by every stored change: the store refuses a step that did not start from the newest.
    version: int = 0

    @property
    def id(self) -> str:
        """The task's id."""
        return self.spec.id

    @property
    def terminal(self) -> bool:
        """Whether the task has ended."""
        return self.state in TERMINAL

    @property
    def ready(self) -> bool:
        """Whether the task stands in the dispatch index."""
        return self.state is TaskState.QUEUED and self.lease is None and not self.hold

    @property
    def needs(self) -> Needs:
        """What it needs now: the spec's needs, narrowed to the worker it waits for."""
        if self.pinned_to is None or self.spec.needs.worker is not None:
            return self.spec.needs
        return dataclasses.replace(self.spec.needs, worker=self.pinned_to)

    @property
    def wake_at(self) -> float | None:
        """The next instant at which time alone changes this task, or ``None``."""
        if self.lease is not None:
            started_at = self.lease.started_at
            if started_at is None:
                return None
            return started_at + self.spec.timeout_s + RUN_TIMEOUT_GRACE_S
        if self.state in TERMINAL:
            return None
        return min(self._timers(), default=None)

    def _timers(self) -> list[float]:
        """Return what a task that waits is waiting for."""
        timers: list[float] = []
        if self.spec.expires_at is not None:
            timers.append(self.spec.expires_at)
        if self.state is TaskState.SCHEDULED:
            if not self.unmet:
                timers.append(self.due_at)
            return timers
        if self.spec.queue_timeout_s is not None and self.queued_at is not None:
            timers.append(self.queued_at + self.spec.queue_timeout_s)
        if self.pinned_until is not None:
            timers.append(self.pinned_until)
        return timers

    def evolve(self, **changes: Any) -> Self:
        """Return a copy with ``changes``, all of them fields.

        Each step of each task makes one: `dataclasses.replace`, which calls the constructor, takes
        ten times as long.
        """
        before = self.__dict__
        values = before.copy()
        values.update(changes)
        assert len(values) == len(before), f"one of these is no field: {sorted(changes)}"
        changed = object.__new__(type(self))
        object.__setattr__(changed, "__dict__", values)  # It is frozen.
        return changed


class Attempt(NamedTuple):
    """One try of a task that really started."""

    task_id: str
    token: Token
    worker: str
    node_id: str
    started_at: float
    ended_at: float | None = None
    outcome: Outcome | None = None
    error: TaskError | None = None


class Fact(NamedTuple):
    """One line of a task's history, in the past tense. Stored with the change that it tells of."""

    task_id: str
    kind: str
    at: float
    state: TaskState
    token: Token | None = None
    worker: str | None = None
    detail: str | None = None


class LaneKey(NamedTuple):
    """Tasks that are alike to the scheduler: same queue, same type, same needs."""

    queue: str
    task_type: str
    needs: Needs


class WorkerState(StrEnum):
    """What the moderator thinks of a worker.

    ``suspect`` missed heartbeats and gets nothing new. ``asleep`` was silent for longer than its
    leases, which were taken back, and is expected to return. ``gone`` said goodbye, or has been
    silent for so long that nobody expects it.
    """

    ONLINE = "online"
    SUSPECT = "suspect"
    ASLEEP = "asleep"
    DRAINING = "draining"
    CORDONED = "cordoned"
    GONE = "gone"


#: States in which a worker is given new work.
ACCEPTING = frozenset({WorkerState.ONLINE})
#: States of a worker that nobody can reach and that holds no lease.
AWAY = frozenset({WorkerState.ASLEEP, WorkerState.GONE})
#: States of a worker of which nothing is heard; it may hold leases still.
UNHEARD = AWAY | {WorkerState.SUSPECT}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """One worker, as a scheduling decision sees it."""

    name: str
    node_id: str
    state: WorkerState
    cpu: float = 0.0
    mem_gb: float = 0.0
    gpu: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    task_types: frozenset[str] = frozenset()
    #: What heavy attempts hold of it now.
    used: Needs = Needs()
    #: Attempts granted or running.
    live: int = 0
    #: Seconds since it was last heard of.
    last_seen_age_s: float = 0.0
    #: Why it can run nothing although it is there, e.g. ``cannot write to its disk``.
    trouble: str = ""

    def free(self, name: str) -> float:
        """Return the free amount of ``cpu``, ``mem_gb``, ``gpu`` or a custom resource."""
        if name in ("cpu", "mem_gb", "gpu"):
            return float(getattr(self, name)) - float(getattr(self.used, name))
        return dict(self.resources).get(name, 0.0) - dict(self.used.resources).get(name, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerRecord:
    """What the store remembers of a worker."""

    name: str
    node_id: str
    incarnation: str
    registered_at: float
    last_seen_at: float
    cordoned: bool = False
    draining_until: float | None = None
    cpu: float = 0.0
    mem_gb: float = 0.0
    gpu: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    task_types: tuple[str, ...] = ()
    address: str = ""
    #: Tells two machines apart that claim one name; empty when the worker did not say.
    machine_id: str = ""
    #: Its node in Ray's table.
    ray_node_id: str = ""
    #: When its leases were taken back because of its silence, until it is heard again.
    asleep_at: float | None = None
    #: When it said goodbye, until it says hello.
    left_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """Who did what, when, and how it ended."""

    at: float
    principal: str
    action: str
    target: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFilter:
    """Which tasks a listing or a replay means. ``None`` means any."""

    states: tuple[TaskState, ...] = ()
    task_type: str | None = None
    queue: str | None = None
    worker: str | None = None
    batch_id: str | None = None
    principal: str | None = None
    kind: FailureKind | None = None
    since: float | None = None
    ids: tuple[str, ...] = field(default=())

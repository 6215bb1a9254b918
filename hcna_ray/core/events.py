"""What can happen to a task (events in) and what must then be done (commands out).

Events are facts in the past tense with the instant ``at`` when they were observed. Commands are
orders; they follow from a committed step and are carried out afterwards, at least once.
"""

from __future__ import annotations

from dataclasses import dataclass

from hcna_ray.core.models import FailureKind, Hold, Lease, Progress, TaskError, Token


@dataclass(frozen=True, kw_only=True, slots=True)
class TimePassed:
    """The clock reached the task's ``wake_at`` (or is merely later than before)."""

    at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockStepped:
    """The moderator's wall clock was put another way: durations go on as they were."""

    at: float
    #: Seconds by which it is ahead of what it would have been; negative when it was put back.
    by_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DependencySettled:
    """A task named in ``depends_on`` ended."""

    at: float
    dependency_id: str
    completed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyHeld:
    """The task's ordering or concurrency key is taken by others."""

    at: float
    hold: Hold


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyReleased:
    """The task's turn on its ordering or concurrency key has come."""

    at: float
    hold: Hold


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseGranted:
    """A worker was given the right to start the next attempt."""

    at: float
    lease: Lease


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseReturned:
    """A granted attempt came back without having started. No loss is counted."""

    at: float
    token: Token
    reason: str = ""
    #: True when it is not to be handed out again: it was too often, and never started.
    give_up: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptStarted:
    """The worker began to run the attempt."""

    at: float
    token: Token


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptProgressed:
    """The handler reported progress, a checkpoint, or both."""

    at: float
    token: Token
    progress: Progress | None = None
    checkpoint: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptCompleted:
    """The handler returned."""

    at: float
    token: Token
    started_at: float
    result: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptFailed:
    """The handler raised, ran too long, or refused its payload."""

    at: float
    token: Token
    started_at: float
    error: TaskError
    #: A draw from -1 to 1 for the backoff.
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptLost:
    """The attempt's process or worker is gone and nobody knows how far it got."""

    at: float
    token: Token
    kind: FailureKind
    message: str
    #: Whether the whole worker went (``on_disconnect`` applies), or just the process.
    worker_gone: bool = False
    #: False when somebody stopped the worker on purpose: no loss is held against the task.
    counted: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptCancelled:
    """The worker stopped the attempt because its task was cancelled."""

    at: float
    token: Token
    started_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelRequested:
    """Somebody asked for the task to stop."""

    at: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskReplayed:
    """Somebody took the task back out of the dead-letter list."""

    at: float


Event = (
    TimePassed
    | ClockStepped
    | DependencySettled
    | KeyHeld
    | KeyReleased
    | LeaseGranted
    | LeaseReturned
    | AttemptStarted
    | AttemptProgressed
    | AttemptCompleted
    | AttemptFailed
    | AttemptLost
    | AttemptCancelled
    | CancelRequested
    | TaskReplayed
)

#: Every event type; the transition table has a row for each of them in each state.
EVENT_TYPES: tuple[type[Event], ...] = (
    TimePassed,
    ClockStepped,
    DependencySettled,
    KeyHeld,
    KeyReleased,
    LeaseGranted,
    LeaseReturned,
    AttemptStarted,
    AttemptProgressed,
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptCancelled,
    CancelRequested,
    TaskReplayed,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StopAttempt:
    """Tell a worker to stop an attempt: flag, SIGTERM, then SIGKILL of its process group."""

    task_id: str
    worker: str
    incarnation: str
    slot: int
    token: Token
    #: ``cancel`` or ``timeout``.
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SettleDependents:
    """Tell every task that depends on this one how it ended."""

    task_id: str
    completed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseOrdering:
    """Let the next task of an ordering key go."""

    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseConcurrency:
    """A place of a concurrency key is free again."""

    key: str


Command = StopAttempt | SettleDependents | ReleaseOrdering | ReleaseConcurrency

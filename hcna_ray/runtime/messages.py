"""What crosses process borders inside the cluster: plain values, cheap to pickle, no Ray.

Three conversations use them: C1 with the moderator, a slot (or agent) with the moderator, and the
supervisor's view of both. Every one is idempotent: any message may arrive twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import (
    FailureKind,
    Progress,
    TaskError,
    TaskFilter,
    TaskSpec,
    TaskState,
    Token,
    WorkerState,
)
from hcna_ray.observability.figures import Histogram
from hcna_ray.store import codec

# -- C1 and the moderator ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitBatch:
    """Specs with ids minted by the caller. Sending the same batch again is harmless."""

    specs: tuple[TaskSpec, ...]
    #: All or nothing: one refused item refuses every item.
    atomic: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel in the form in which specs are stored: field by field costs three times that."""
        return _submit_batch, ([codec.pack_spec(spec) for spec in self.specs], self.atomic)


def _submit_batch(packed: Sequence[bytes], atomic: bool) -> SubmitBatch:
    return SubmitBatch(specs=tuple(map(codec.unpack_spec, packed)), atomic=atomic)


class Accepted(NamedTuple):
    """A task is in the durable store."""

    task_id: str
    state: TaskState
    #: True when an idempotency key returned a task accepted earlier.
    duplicate: bool = False


class Refused(NamedTuple):
    """Nothing was stored for this item, and why."""

    error: HcnaError


SubmitResult = Accepted | Refused


def in_brief(batch: SubmitBatch, results: Sequence[SubmitResult]) -> list[SubmitResult | None]:
    """Put ``None`` for what goes without saying: accepted as it was sent, and queued."""
    return [
        None if result == (spec.id, TaskState.QUEUED, False) else result
        for spec, result in zip(batch.specs, results, strict=True)
    ]


def in_full(batch: SubmitBatch, brief: Sequence[SubmitResult | None]) -> list[SubmitResult]:
    """Return the results that `in_brief` was given."""
    return [
        Accepted(spec.id, TaskState.QUEUED) if result is None else result
        for spec, result in zip(batch.specs, brief, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """An answer of the change feed."""

    #: Number of the newest fact covered; the next call's ``after``.
    last: int
    #: Tasks that ended since ``after``, in commit order.
    ended: tuple[str, ...] = ()
    #: True when ``after`` is too old for the feed's memory: every waiter must look for itself.
    gap: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInfo:
    """One worker for people and dashboards; ages are measured by the moderator's clock."""

    name: str
    node_id: str
    state: WorkerState
    last_seen_at: float
    last_seen_age_s: float
    resources: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str]
    task_types: tuple[str, ...]
    slots: int
    running: tuple[Mapping[str, Any], ...]
    telemetry: Mapping[str, Any]
    draining_until: float | None = None
    address: str = ""
    #: Why it can run nothing although it is there; empty when nothing is wrong.
    trouble: str = ""
    #: Seconds that the worker's wall clock is ahead of M1's.
    clock_ahead_s: float = 0.0
    #: Tasks that wait for this very worker; counted when it is forgotten.
    waiting: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeratorFigures:
    """What one process of the moderator has counted. It begins at zero with each process."""

    #: Calls in a batch of the writer, and seconds until the batch was committed. Batches that
    #: nobody has asked for are left out.
    batch_calls: Histogram
    batch_s: Histogram
    #: Seconds that the store takes to make a batch durable, fsync included.
    commit_s: Histogram
    #: Heartbeats that renewed leases, also those that were answered from memory.
    renewals: int
    #: Batches that the store refused.
    refused: int
    disk_free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeratorStatus:
    """The moderator's own condition."""

    node_id: str
    generation: int
    started_at: float
    workers_online: int
    workers: int
    open_tasks: int
    open_bytes: int
    #: Tasks that may still be accepted.
    room: int
    live_attempts: int
    paused: tuple[str, ...]
    pid: int = 0
    commits: int = 0
    store: str = ""
    #: What this process has counted since it started.
    figures: ModeratorFigures | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReply:
    """Which tasks left the dead-letter list, and whether more fit the filter."""

    retried: tuple[str, ...]
    more: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayQuery:
    """Which failed tasks to replay."""

    where: TaskFilter
    limit: int = 1000


# -- workers and the moderator -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """An agent introduces its worker, or introduces itself again to a new moderator."""

    worker: str
    node_id: str
    incarnation: str
    address: str
    cpu: float
    mem_gb: float
    gpu: float
    resources: tuple[tuple[str, float], ...]
    labels: tuple[tuple[str, str], ...]
    task_types: tuple[str, ...]
    #: What the journals of earlier incarnations still hold.
    reports: tuple[Report, ...] = ()
    #: Names the machine, so that two that claim one worker's name can be told apart.
    machine_id: str = ""
    #: The worker's node in Ray's table.
    ray_node_id: str = ""
    #: The worker's wall clock when this was sent; 0 when it does not say.
    sent_at: float = 0.0
    #: This side's half of a channel, if messages are sealed (`hcna_ray.runtime.orders`).
    cipher: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodbye:
    """An agent's last word: its processes have ended, and it will not come back by itself."""

    worker: str
    incarnation: str
    #: What the journals still held. What had started and not ended is left out: the moderator takes
    #: it back without counting a loss.
    reports: tuple[Report, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """The moderator's answer to `Hello`."""

    moderator_node_id: str
    generation: int
    lease_ttl_s: float
    heartbeat_s: float
    #: M1's half of a channel, if messages are sealed.
    cipher: bytes = b""
    #: That M1 says this (`hcna_ray.runtime.orders`).
    proof: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Renews the worker's session and carries its telemetry envelope."""

    worker: str
    incarnation: str
    telemetry: Mapping[str, Any]
    slots: int = 0
    #: Why the worker can run nothing just now; empty when nothing is wrong.
    trouble: str = ""
    #: The worker's wall clock when this was sent; 0 when it does not say.
    sent_at: float = 0.0
    #: Seconds since the last heartbeat that was answered was sent. The lease counts from that one:
    #: a network that lets nothing through one way must not keep it alive.
    unanswered_s: float = 0.0
    #: Attempts that run: task, token, and when each began on the worker's wall clock. The word of a
    #: start may be lost or late; this comes again with every call.
    began: tuple[tuple[str, Token, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class HeartbeatReply:
    """``known`` False asks the agent to say hello again."""

    known: bool


class ReportKind:
    """What a `Report` says; constants, because they travel as short strings."""

    STARTED = "started"
    PROGRESS = "progress"
    COMPLETED = "completed"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"
    RETURNED = "returned"


#: ``type`` of the error of an attempt that was stopped because its worker's drain had ended.
DRAINED = "WorkerDrained"
#: ``type`` of the error of an attempt that came back because its start could not be written down.
DISK_FAILED = "WorkerDiskFailed"
#: ``type`` of the error of an attempt that came back because it had not begun in time.
NOT_STARTED = "NotStarted"


class Report(NamedTuple):
    """One thing that happened to one attempt on a worker. Dropped unless its token is in force.

    ``at`` and ``started_at`` are instants of the worker's wall clock.
    """

    kind: str
    task_id: str
    token: Token
    at: float
    started_at: float = 0.0
    result: bytes | None = None
    error: TaskError | None = None
    progress: Progress | None = None
    checkpoint: bytes | None = None
    duration_ms: float = 0.0


class Offer(NamedTuple):
    """One granted attempt, with everything that its runner needs."""

    task_id: str
    task_type: str
    token: Token
    payload: bytes
    timeout_s: float
    #: Seconds until the task expires, on M1's clock when it answered. Only M1's wall clock counts:
    #: a worker measures the rest on a clock that never steps.
    expires_in_s: float | None
    checkpoint: bytes | None
    traceparent: str | None
    #: Needs of a heavy attempt as (name, amount) pairs; empty in a slot.
    needs: tuple[tuple[str, float], ...] = ()
    #: The same end on the worker's CLOCK_BOOTTIME; set by `received`.
    expires_boot: float | None = None

    def received(self, elapsed: float) -> Offer:
        """Return the offer as its worker keeps it from the moment of its receipt on."""
        if self.expires_in_s is None:
            return self
        return self._replace(expires_boot=elapsed + self.expires_in_s)


#: One attempt: task id and token. The token alone names none, every first attempt has the same.
AttemptKey = tuple[str, Token]

#: Reason of a `Stop`: the attempt should have begun by now. If it has not, it must not any more and
#: comes back; if it has, the order is void.
UNSTARTED = "unstarted"
#: Reason of a `Stop`: nobody answered that. Whatever was to run the attempt is stuck, and is ended.
STUCK = "stuck"


class Stop(NamedTuple):
    """Stop an attempt; if it has not started, give it back."""

    task_id: str
    token: Token
    slot: int
    reason: str


class IntentOrder(NamedTuple):
    """An intent envelope for the agent to answer through ``Exchange.answers``."""

    envelope: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A slot (or, as slot -1, an agent) gives outcomes and asks for leases.

    The same ``seq`` gets the same grant. Outcomes may be forgotten by the sender only when the next
    ``seq`` is answered.
    """

    worker: str
    incarnation: str
    slot: int
    seq: int
    reports: tuple[Report, ...] = ()
    #: What the slot still runs from earlier grants: long attempts beside which it takes more.
    holding: tuple[tuple[str, Token], ...] = ()
    #: Answers of an agent to intents, by ``msg_id``.
    answers: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Answer to an `Exchange`. Empty after a quiet while: ask again with the next ``seq``."""

    seq: int
    offers: tuple[Offer, ...] = ()
    stops: tuple[Stop, ...] = ()
    intents: tuple[IntentOrder, ...] = ()
    #: The worker session is unknown (a new moderator): the agent must say hello first.
    hello: bool = False
    #: That M1 says this, if there are stops or intents in it (`hcna_ray.runtime.orders`).
    proof: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotGone:
    """An agent tells that the process of a slot ended.

    ``reports`` is what its journal still held; whatever else it had been granted never started.
    """

    worker: str
    incarnation: str
    slot: int
    reports: tuple[Report, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ack:
    """How many reports were applied and which were late."""

    applied: int = 0
    late: tuple[tuple[str, Token], ...] = field(default=())


def lost(task_id: str, token: Token, at: float, kind: FailureKind, message: str) -> Report:
    """Build the report of an attempt whose process died."""
    error = TaskError(kind=kind, message=message)
    return Report(ReportKind.LOST, task_id, token, at, error=error)

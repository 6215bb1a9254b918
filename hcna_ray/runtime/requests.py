"""What the moderator's writer thread is handed: one object a call, its answer still to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hcna_ray.core.models import AuditEntry
from hcna_ray.core.schedules import Schedule
from hcna_ray.runtime.messages import (
    Exchange,
    Goodbye,
    Heartbeat,
    Hello,
    ReplayQuery,
    Report,
    SlotGone,
    SubmitBatch,
)
from hcna_ray.store.base import Delivery


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancel:
    """Stop a task."""

    task_id: str
    reason: str
    principal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """Replay one failed task."""

    task_id: str
    principal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryMany:
    """Replay failed tasks. ``ids`` are candidates a reader found; each is checked again."""

    query: ReplayQuery
    ids: tuple[str, ...]
    more: bool
    principal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """Reports sent between two exchanges."""

    worker: str
    incarnation: str
    reports: tuple[Report, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkWorker:
    """Drain, cordon or uncordon."""

    name: str
    action: str
    deadline_s: float | None
    principal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgetWorker:
    """Strike a worker that is away off the record; with ``force``, any worker."""

    name: str
    force: bool
    principal: str


class NodeSeen(NamedTuple):
    """One living node of Ray's table that claims to be a worker."""

    worker: str
    ray_node_id: str
    address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NodesSeen:
    """What Ray's table says of workers' nodes: a hint, and never the end of a lease."""

    nodes: tuple[NodeSeen, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SendIntent:
    """Pass an intent to a worker and wait for its answer."""

    envelope: Mapping[str, Any]
    worker: str
    principal: str
    wait_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PauseQueue:
    """Pause or resume a queue."""

    queue: str
    paused: bool
    principal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Add lines to the audit log."""

    entries: tuple[AuditEntry, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered:
    """What came of a try to tell a webhook: taken there, to be tried again, or given up."""

    delivery: Delivery
    #: ``delivered``, ``failed`` (then ``delivery`` says when again) or ``given_up``.
    outcome: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PutSchedule:
    """Create a schedule, or give an existing one another definition."""

    schedule: Schedule
    #: False: there must be one of that name.
    new: bool
    #: Name of the key that asks.
    by: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkSchedule:
    """Pause, resume or delete a schedule."""

    principal: str
    name: str
    #: ``pause``, ``resume`` or ``delete``.
    action: str
    by: str
    #: On a resume by its owner: digest of the key on whose authority it goes on.
    key_sha256: str | None = None
    #: Whether that key does not see everything: then the schedule's tasks do not either, for good.
    confined: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSchedule:
    """Submit a schedule's task now. Harmless twice with the same task id, or the same key."""

    principal: str
    name: str
    task_id: str
    idempotency_key: str | None
    by: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Read the moderator's own memory on its own thread."""

    name: str


Request = (
    SubmitBatch
    | Cancel
    | Retry
    | RetryMany
    | Reports
    | Exchange
    | SlotGone
    | Hello
    | Heartbeat
    | Goodbye
    | NodesSeen
    | MarkWorker
    | ForgetWorker
    | SendIntent
    | PauseQueue
    | Note
    | Delivered
    | PutSchedule
    | MarkSchedule
    | RunSchedule
    | Query
)

#: What workers ask, and what is told about them. Without it leases run out.
FROM_WORKERS = (Exchange, Reports, SlotGone, Hello, Heartbeat, Goodbye, NodesSeen)


class Pending:
    """A request on its way to an answer. Answered once, and only after the commit."""

    __slots__ = ("arrived", "request", "resolve")

    def __init__(
        self, request: Request, resolve: Callable[[object], None], arrived: float = 0.0
    ) -> None:
        """Bind a request to where its answer goes.

        Args:
            request: What is asked.
            resolve: Takes the answer, or the exception that is the answer.
            arrived: When, on the moderator's clock that never steps.
        """
        self.request, self.resolve, self.arrived = request, resolve, arrived

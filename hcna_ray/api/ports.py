"""What C1 asks of the rest of the house; each port has a real thing behind it, in tests a fake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hcna_ray.core.models import AuditEntry, TaskState, Token, WorkerView
from hcna_ray.core.schedules import Schedule
from hcna_ray.runtime.messages import (
    Accepted,
    Changes,
    ModeratorStatus,
    ReplayQuery,
    ReplayReply,
    SubmitBatch,
    SubmitResult,
    WorkerInfo,
)
from hcna_ray.runtime.requests import MarkSchedule, PutSchedule, RunSchedule
from hcna_ray.security.keys import ApiKey


class ModeratorPort(Protocol):
    """The moderator, wherever it runs.

    Every method may raise `ModeratorUnavailable` when the moderator is away. If it was asked and
    did not answer in time, a method that changes something raises `NoAnswer`: then it is not known
    whether the call was carried out, and only calls that are harmless twice may be repeated.
    """

    async def submit(self, batch: SubmitBatch) -> Sequence[SubmitResult]:
        """Store tasks durably; one answer for each spec, in order. Harmless twice.

        Raises:
            NoAnswer: the batch may have been stored.
            CannotAccept: nothing of the batch was stored.
        """
        ...

    async def cancel(self, task_id: str, *, reason: str, principal: str) -> TaskState:
        """Stop a task; return its state afterwards. Raises `NotFound`, `TaskFinished`."""
        ...

    async def retry(self, task_id: str, *, principal: str) -> TaskState:
        """Take one failed task back. Raises `NotFound`, `NotFailed`."""
        ...

    async def retry_many(self, query: ReplayQuery, *, principal: str) -> ReplayReply:
        """Take failed tasks back by filter."""
        ...

    async def changes(self, after: int, wait_s: float) -> Changes:
        """Return what ended since ``after``, waiting up to ``wait_s`` for the first of it."""
        ...

    async def written(self, after: int, wait_s: float) -> Changes:
        """Return once there is history after the fact ``after``, or after ``wait_s``."""
        ...

    async def workers(self) -> Sequence[WorkerInfo]:
        """Return every worker on record."""
        ...

    async def worker_views(self) -> tuple[Sequence[WorkerView], int, int]:
        """Return workers as placement sees them, attempts running, and how many may."""
        ...

    async def set_worker(
        self, name: str, action: str, *, deadline_s: float | None, principal: str
    ) -> WorkerInfo:
        """Carry out ``drain``, ``cordon`` or ``uncordon``. Raises `NotFound`."""
        ...

    async def forget_worker(self, name: str, *, force: bool, principal: str) -> WorkerInfo:
        """Strike a worker off the record; return what was known of it.

        Raises:
            NotFound: there is none.
            WorkerOnline: it is in contact, and ``force`` was not given.
        """
        ...

    async def send_intent(
        self, dst: str, intent: str, payload: Mapping[str, Any], *, principal: str, wait_s: float
    ) -> Mapping[str, Any]:
        """Pass an intent on and return ``msg_id``, ``dst``, ``intent`` and ``answer``."""
        ...

    async def pause_queue(self, name: str, paused: bool, *, principal: str) -> None:
        """Pause a queue, or resume it."""
        ...

    async def change_schedule(self, order: PutSchedule | MarkSchedule) -> Schedule:
        """Create, change, pause, resume or delete a schedule; return it as it is, or was.

        Raises:
            NotFound: there is none of that name.
            Conflict: there is one already, or there are too many.
        """
        ...

    async def run_schedule(self, order: RunSchedule) -> Accepted:
        """Submit a schedule's task now. Harmless twice. Raises `NotFound`, `ScheduleBusy`."""
        ...

    async def status(self) -> ModeratorStatus:
        """Return the moderator's own condition."""
        ...

    async def audit(self, *entries: AuditEntry) -> None:
        """Add lines to the audit log."""
        ...


class Outputs(Protocol):
    """What attempts have printed, wherever it is kept."""

    async def read(
        self, worker: str, task_id: str, token: Token, offset: int, size: int
    ) -> bytes | None:
        """Return a piece of an output; ``None`` when there is none, or none any more.

        Raises:
            OutputUnavailable: the worker that keeps it does not answer.
        """
        ...


class KeyRing(Protocol):
    """The API keys that are valid now."""

    def verify(self, presented: str) -> ApiKey | None:
        """Return the key that was presented, in time that does not depend on its value."""
        ...

    def all(self) -> Sequence[ApiKey]:
        """Return every key; never the key itself, of which only the digest is known."""
        ...


class IdSource(Protocol):
    """Where new ids come from."""

    def task_ids(self, count: int) -> list[str]:
        """Return so many new ``task-...``, ascending."""
        ...

    def batch_id(self) -> str:
        """Return a new ``batch-...``."""
        ...

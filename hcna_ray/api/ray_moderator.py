"""The moderator as C1 reaches it: the actor ``moderator``, through Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hcna_ray.core.errors import ModeratorUnavailable, NoAnswer
from hcna_ray.core.models import AuditEntry, TaskState, WorkerView
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
    in_full,
)
from hcna_ray.runtime.requests import MarkSchedule, PutSchedule, RunSchedule

#: Longest wait for an answer; a commit may stand behind a slow fsync.
ANSWER_S = 10.0
#: What a call that parks is given beyond the time it asked for.
SLACK_S = 5.0
#: A look at the moderator that takes longer than this is worth nothing any more.
LOOK_S = 3.0


class Link(Protocol):
    """Calls one actor by name; see `hcna_ray.runtime.ray_link.ActorLink`."""

    async def acall(
        self, method: str, *args: Any, timeout_s: float = ANSWER_S, **kwargs: Any
    ) -> Any:
        """Call and wait.

        Raises:
            NoAnswer: it is not known whether the call was carried out.
            ModeratorUnavailable: nothing was sent.
            HcnaError: what the actor answers.
        """
        ...


class RayModerator:
    """`hcna_ray.api.ports.ModeratorPort` over Ray. Finds the actor again after it died."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def _look(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call what changes nothing: without an answer nothing can have been done."""
        try:
            return await self._link.acall(method, *args, timeout_s=timeout_s)
        except NoAnswer as error:
            raise ModeratorUnavailable(error.message, error.retry_after_s) from error

    async def submit(self, batch: SubmitBatch) -> Sequence[SubmitResult]:
        """Store tasks durably. A larger batch is given more time."""
        timeout_s = ANSWER_S + len(batch.specs) / 1000
        return in_full(batch, await self._link.acall("submit", batch, timeout_s=timeout_s))

    async def cancel(self, task_id: str, *, reason: str, principal: str) -> TaskState:
        """Stop a task."""
        state: TaskState = await self._link.acall(
            "cancel", task_id, timeout_s=ANSWER_S, reason=reason, principal=principal
        )
        return state

    async def retry(self, task_id: str, *, principal: str) -> TaskState:
        """Take one failed task back."""
        state: TaskState = await self._link.acall(
            "retry", task_id, timeout_s=ANSWER_S, principal=principal
        )
        return state

    async def retry_many(self, query: ReplayQuery, *, principal: str) -> ReplayReply:
        """Take failed tasks back by filter."""
        reply: ReplayReply = await self._link.acall(
            "retry_many", query, timeout_s=3 * ANSWER_S, principal=principal
        )
        return reply

    async def changes(self, after: int, wait_s: float) -> Changes:
        """Return what ended since ``after``."""
        changes: Changes = await self._look("changes", after, wait_s, timeout_s=wait_s + SLACK_S)
        return changes

    async def written(self, after: int, wait_s: float) -> Changes:
        """Return once there is history after ``after``."""
        changes: Changes = await self._look("written", after, wait_s, timeout_s=wait_s + SLACK_S)
        return changes

    async def workers(self) -> Sequence[WorkerInfo]:
        """Return every worker on record."""
        workers: Sequence[WorkerInfo] = await self._look("workers", timeout_s=LOOK_S)
        return workers

    async def worker_views(self) -> tuple[Sequence[WorkerView], int, int]:
        """Return workers as placement sees them, attempts running, and how many may."""
        views, running, running_max = await self._look("worker_views", timeout_s=LOOK_S)
        return views, running, running_max

    async def set_worker(
        self, name: str, action: str, *, deadline_s: float | None, principal: str
    ) -> WorkerInfo:
        """Drain, cordon or uncordon."""
        worker: WorkerInfo = await self._link.acall(
            "set_worker",
            name,
            action,
            timeout_s=ANSWER_S,
            deadline_s=deadline_s,
            principal=principal,
        )
        return worker

    async def forget_worker(self, name: str, *, force: bool, principal: str) -> WorkerInfo:
        """Strike a worker off the record."""
        worker: WorkerInfo = await self._link.acall(
            "forget_worker", name, timeout_s=ANSWER_S, force=force, principal=principal
        )
        return worker

    async def send_intent(
        self, dst: str, intent: str, payload: Mapping[str, Any], *, principal: str, wait_s: float
    ) -> Mapping[str, Any]:
        """Pass an intent on and return the answer."""
        reply: Mapping[str, Any] = await self._link.acall(
            "send_intent",
            dst,
            intent,
            dict(payload),
            timeout_s=wait_s + SLACK_S,
            principal=principal,
            wait_s=wait_s,
        )
        return reply

    async def pause_queue(self, name: str, paused: bool, *, principal: str) -> None:
        """Pause a queue, or resume it."""
        await self._link.acall("pause_queue", name, paused, timeout_s=ANSWER_S, principal=principal)

    async def change_schedule(self, order: PutSchedule | MarkSchedule) -> Schedule:
        """Create, change, pause, resume or delete a schedule."""
        schedule: Schedule = await self._link.acall("change_schedule", order, timeout_s=ANSWER_S)
        return schedule

    async def run_schedule(self, order: RunSchedule) -> Accepted:
        """Submit a schedule's task now."""
        result: Accepted = await self._link.acall("run_schedule", order, timeout_s=ANSWER_S)
        return result

    async def status(self) -> ModeratorStatus:
        """Return the moderator's own condition."""
        status: ModeratorStatus = await self._look("status", timeout_s=LOOK_S)
        return status

    async def audit(self, *entries: AuditEntry) -> None:
        """Add lines to the audit log."""
        await self._link.acall("audit", *entries, timeout_s=ANSWER_S)

"""The real moderator's rules on an in-memory store, behind C1's port, with trouble on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from hcna_ray.core.errors import HcnaError, ModeratorUnavailable, NoAnswer
from hcna_ray.core.models import AuditEntry, TaskState, WorkerView
from hcna_ray.core.schedules import Schedule
from hcna_ray.runtime.feed import ChangeFeed
from hcna_ray.runtime.messages import (
    Accepted,
    Changes,
    ModeratorStatus,
    ReplayQuery,
    ReplayReply,
    ReportKind,
    SubmitBatch,
    SubmitResult,
    WorkerInfo,
)
from hcna_ray.runtime.moderator import Outbound
from hcna_ray.runtime.requests import (
    Cancel,
    ForgetWorker,
    MarkSchedule,
    MarkWorker,
    Note,
    PauseQueue,
    Pending,
    PutSchedule,
    Query,
    Request,
    Retry,
    RetryMany,
    RunSchedule,
)
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.paper_worker import WAITING, Desk, PaperWorker


class FeedingDesk(Desk):
    """A desk that tells a change feed what ended."""

    def __init__(self, **policy: Any) -> None:
        self.feed = ChangeFeed(0)
        self.memory = MemoryTaskStore()
        super().__init__(self.memory, **policy)

    def _take(self, outbound: Outbound) -> None:
        super()._take(outbound)
        self.feed.publish(outbound.last_fact, outbound.ended)


class FakeModerator:
    """Implements `hcna_ray.api.ports.ModeratorPort` without Ray or threads.

    Attributes:
        down: Nobody answers.
        answers_lost: So many of the next submits are carried out, and their answers lost.
        dies: The next submit is carried out, and then nobody answers any more.
        gate: While set to an event, submits wait for it; so a test can see them gather.
        batches: Every batch that arrived.
        refuses: Raised by every write, if set.
    """

    def __init__(self, **policy: Any) -> None:
        self.desk = FeedingDesk(**policy)
        self.down = False
        self.answers_lost = 0
        self.dies = False
        self.gate: asyncio.Event | None = None
        self.batches: list[SubmitBatch] = []
        self.change_calls = self.written_calls = 0
        self.refuses: HcnaError | None = None
        self.intents: list[tuple[str, str, Mapping[str, Any]]] = []
        self.audited: list[AuditEntry] = []
        self._revived = asyncio.Event()
        self._parked: dict[PaperWorker, Pending] = {}

    def kill(self) -> None:
        """Stop answering, calls that are open included."""
        self.down = True
        self._revived.set()
        self._revived = asyncio.Event()

    def revive(self) -> None:
        """Come back with nothing in memory but the store."""
        self.desk.restart()
        self.desk.feed = ChangeFeed(self.desk.memory.reader().last_fact())
        self.down = False

    def _ask(self, request: Request) -> Any:
        if self.down:
            raise ModeratorUnavailable("moderator did not answer", 2)
        if self.refuses is not None:
            raise self.refuses
        return self.desk.ask(request)

    # -- the port --------------------------------------------------------------------------------

    async def submit(self, batch: SubmitBatch) -> Sequence[SubmitResult]:
        self.batches.append(batch)
        if self.gate is not None:
            await self.gate.wait()
        results: Sequence[SubmitResult] = self._ask(batch)
        if self.dies:
            self.dies = False
            self.kill()
            raise NoAnswer("the moderator died", 2)
        if self.answers_lost:
            self.answers_lost -= 1
            raise NoAnswer("the answer was lost", 2)
        return results

    async def cancel(self, task_id: str, *, reason: str, principal: str) -> TaskState:
        state: TaskState = self._ask(Cancel(task_id=task_id, reason=reason, principal=principal))
        return state

    async def retry(self, task_id: str, *, principal: str) -> TaskState:
        state: TaskState = self._ask(Retry(task_id=task_id, principal=principal))
        return state

    async def retry_many(self, query: ReplayQuery, *, principal: str) -> ReplayReply:
        found = self.desk.memory.reader().page(query.where, before_seq=None, limit=query.limit + 1)
        ids = tuple(task.id for task in found[: query.limit])
        more = len(found) > query.limit
        reply: ReplayReply = self._ask(
            RetryMany(query=query, ids=ids, more=more, principal=principal)
        )
        return reply

    async def changes(self, after: int, wait_s: float) -> Changes:
        self.change_calls += 1
        return await self._parked_call(self.desk.feed.after(after, wait_s))

    async def written(self, after: int, wait_s: float) -> Changes:
        self.written_calls += 1
        return await self._parked_call(self.desk.feed.written(after, wait_s))

    async def _parked_call(self, call: Coroutine[Any, Any, Changes]) -> Changes:
        if self.down:
            call.close()
            raise ModeratorUnavailable("moderator did not answer", 2)
        waiting = asyncio.ensure_future(call)
        killed = asyncio.ensure_future(self._revived.wait())
        try:
            await asyncio.wait({waiting, killed}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ModeratorUnavailable("moderator died", 2)
            return waiting.result()
        finally:
            waiting.cancel()
            killed.cancel()
            await asyncio.gather(waiting, killed, return_exceptions=True)

    async def workers(self) -> Sequence[WorkerInfo]:
        workers: Sequence[WorkerInfo] = self._ask(Query(name="workers"))
        return workers

    async def worker_views(self) -> tuple[Sequence[WorkerView], int, int]:
        views, running, running_max = self._ask(Query(name="worker_views"))
        return views, running, running_max

    async def set_worker(
        self, name: str, action: str, *, deadline_s: float | None, principal: str
    ) -> WorkerInfo:
        worker: WorkerInfo = self._ask(
            MarkWorker(name=name, action=action, deadline_s=deadline_s, principal=principal)
        )
        return worker

    async def forget_worker(self, name: str, *, force: bool, principal: str) -> WorkerInfo:
        worker: WorkerInfo = self._ask(ForgetWorker(name=name, force=force, principal=principal))
        return worker

    async def send_intent(
        self, dst: str, intent: str, payload: Mapping[str, Any], *, principal: str, wait_s: float
    ) -> Mapping[str, Any]:
        self._ask(Query(name="status"))
        self.intents.append((dst, intent, payload))
        return {"msg_id": "msg-1", "dst": dst, "intent": intent, "answer": {"pong": True}}

    async def pause_queue(self, name: str, paused: bool, *, principal: str) -> None:
        self._ask(PauseQueue(queue=name, paused=paused, principal=principal))

    async def change_schedule(self, order: PutSchedule | MarkSchedule) -> Schedule:
        schedule: Schedule = self._ask(order)
        return schedule

    async def run_schedule(self, order: RunSchedule) -> Accepted:
        result: Accepted = self._ask(order)
        return result

    async def status(self) -> ModeratorStatus:
        status: ModeratorStatus = self._ask(Query(name="status"))
        return status

    async def audit(self, *entries: AuditEntry) -> None:
        self.audited += entries
        self._ask(Note(entries=entries))

    # -- a worker --------------------------------------------------------------------------------

    def join(self, name: str = "W1", **has: Any) -> PaperWorker:
        """Let a worker join that runs what tests submit."""
        has.setdefault("task_types", ("echo", "sleep", "test.ping"))
        return PaperWorker(self.desk, name, **has)

    def run_all(
        self, worker: PaperWorker, result: bytes = b'{"ok":true}', took_s: float = 0.0
    ) -> int:
        """Run everything that waits for ``worker``; return how many tasks that was."""
        done = 0
        while True:
            pending = self._parked.pop(worker, None) or worker.exchange()
            grant = self.desk.answer(pending)
            if grant is WAITING:
                self._parked[worker] = pending
                return done
            for offer in grant.offers:
                started = self.desk.clock.now()
                worker.report(worker.started(offer))
                self.desk.clock.advance(took_s)
                report = worker.ended(offer, ReportKind.COMPLETED, result=result)
                worker.report(report._replace(started_at=started, duration_ms=took_s * 1000))
                done += 1

"""The gatherer: many requests, one call to the moderator at a time.

While a call is out, submissions collect; when it returns, all that collected goes in the next one.
So batches form by themselves under load, and a lone request goes out at once. When the moderator
has said that it can take nothing, that is repeated here: under overload most requests are refused,
and a refusal must neither wait for others nor cost the moderator anything. How much room there is
meanwhile is asked beside the requests, and only as many as fit are sent on.

Ids are minted before a batch is sent and the moderator inserts or returns, so the same batch may be
sent again after the moderator was lost in the middle of it. If no try of such a batch is answered,
nobody knows whether it is stored, and its callers are told so: 503 is said only where nothing was
sent. So that it is said where it can be, the moderator is looked for before anything new is sent to
one that has just failed to answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass

from hcna_ray import failpoints
from hcna_ray.api.ports import ModeratorPort
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import (
    CannotAccept,
    DiskFull,
    HcnaError,
    ModeratorUnavailable,
    NoAnswer,
    Overloaded,
    QueueFull,
)
from hcna_ray.core.models import TaskSpec
from hcna_ray.runtime.messages import Refused, SubmitBatch, SubmitResult

log = logging.getLogger(__name__)

#: Pause before the second try of a batch; doubled for each further one.
RESEND_PAUSE_S = 0.05
RESEND_PAUSE_S_MAX = 1.0
#: How long "nothing more can be taken" is repeated before the moderator is asked for its room.
FULL_S = 0.25
#: Until when an answer about the room is worth anything. Below the Retry-After of refusals, so that
#: who comes back then is not told what was true before.
STALE_S = 1.0


@dataclass(eq=False, slots=True)
class _Submission:
    specs: tuple[TaskSpec, ...]
    atomic: bool
    size_bytes: int
    since: float
    answer: asyncio.Future[Sequence[SubmitResult]]


class Gatherer:
    """Collects submissions for the moderator. Invariant: at most one call is out."""

    def __init__(
        self,
        moderator: ModeratorPort,
        clock: Clock,
        *,
        items_max: int,
        bytes_max: int,
        call_items: int,
        call_bytes: int,
        resend_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Make a gatherer; nothing runs until something is submitted.

        Args:
            moderator: Where batches go.
            clock: Elapsed time, for giving up.
            items_max: Tasks held here at once, those of the call that is out included.
            bytes_max: Their bytes.
            call_items: Tasks in one call; a single larger submission still goes whole.
            call_bytes: Their bytes.
            resend_s: How long a batch is sent again before its callers are told: no answer.
            sleep: Pauses between two tries.
        """
        self._moderator = moderator
        self._clock = clock
        self._items_max, self._bytes_max = items_max, bytes_max
        self._call_items, self._call_bytes = call_items, call_bytes
        self._resend_s = resend_s
        self._sleep = sleep
        self._waiting: deque[_Submission] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._closed = False
        #: Why nothing more can be taken, as the moderator said when it was asked last.
        self._full: CannotAccept | None = None
        self._full_at = 0.0
        #: How many tasks are sent on all the same: what there was room for, less what was sent.
        self._room = 0
        self._look_for_room: asyncio.Task[None] | None = None
        #: Whether a try of the batch at hand may have been carried out.
        self._asked = False
        #: Whether the last call was not answered.
        self._silent = False
        self.items = 0
        self.bytes = 0
        self.calls = 0
        self.resent = 0

    async def submit(
        self, specs: Sequence[TaskSpec], *, atomic: bool = False
    ) -> Sequence[SubmitResult]:
        """Hand tasks over; return one answer for each, in order, after they are durable.

        Raises:
            Overloaded: the buffer is full; nothing was sent.
            NoAnswer: it was sent, and for ``resend_s`` nobody answered; it may be stored.
            CannotAccept: the moderator took nothing, or was away for ``resend_s``, or has just said
                that it has no room for it.
        """
        if not specs:
            return ()
        size = sum(spec.bytes_stored for spec in specs)
        if self._closed:
            raise ModeratorUnavailable("C1 is shutting down", 1)
        if self.items + len(specs) > self._items_max or self.bytes + size > self._bytes_max:
            raise Overloaded(
                f"{self.items} tasks wait to be stored, the most C1 holds; try again in a moment"
            )
        # With a key it may be a repetition, whose answer is the task that is stored.
        if self._full is not None and not any(spec.idempotency_key for spec in specs):
            self._pass_or_refuse(len(specs), atomic)
        submission = _Submission(
            tuple(specs),
            atomic,
            size,
            self._clock.elapsed(),
            asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(submission)
        self.items += len(specs)
        self.bytes += size
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), name="gatherer", context=Context())
        return await submission.answer

    async def close(self, timeout_s: float) -> None:
        """Take nothing more, give what is held ``timeout_s`` to get through, then refuse it."""
        self._closed = True
        if self._look_for_room is not None:
            self._look_for_room.cancel()
        if (runner := self._runner) is not None:
            await asyncio.wait({runner}, timeout=timeout_s)
            runner.cancel()
            await asyncio.wait({runner})
        self._fail(list(self._waiting), ModeratorUnavailable("C1 is shutting down", 1))
        self._waiting.clear()

    def _pass_or_refuse(self, count: int, atomic: bool) -> None:
        """Refuse what the moderator had no room for when it was asked last, and ask it anew."""
        assert self._full is not None
        age = self._clock.elapsed() - self._full_at
        if age >= STALE_S:
            self._full = None
            return
        if age >= FULL_S and self._look_for_room is None:
            self._look_for_room = asyncio.create_task(
                self._find_room(), name="look-for-room", context=Context()
            )
        if self._room < (count if atomic else 1):
            raise self._full.with_traceback(None)  # Of another request; it would grow with each.
        self._room = max(0, self._room - count)

    async def _find_room(self) -> None:
        """Ask the moderator for its room; it is full no more when the last room was not used up."""
        try:
            status = await self._moderator.status()
        except HcnaError:
            self._full = None  # Whoever comes next is told what is the matter.
        else:
            if self._room and status.room:
                self._full = None
            self._room, self._full_at = status.room, self._clock.elapsed()
        finally:
            self._look_for_room = None

    async def _run(self) -> None:
        group: list[_Submission] = []
        try:
            while self._waiting:
                group = self._take()
                try:
                    await self._deliver(group)
                except HcnaError as error:
                    self._fail(group, error)
                    if isinstance(error, ModeratorUnavailable):
                        self._fail_overdue()
                except Exception as error:
                    log.exception("batch could not be sent", extra={"action": "gather.failed"})
                    self._fail(group, error)
        finally:
            self._runner = None
            if any(not submission.answer.done() for submission in group):  # Cancelled by `close`.
                shutting = "C1 is shutting down"
                kind = NoAnswer if self._asked else ModeratorUnavailable
                self._fail(group, kind(shutting, 1))

    def _take(self) -> list[_Submission]:
        """Take submissions for one call: many that are not atomic, or a single atomic one."""
        group = [self._waiting.popleft()]
        items, size = len(group[0].specs), group[0].size_bytes
        while self._waiting and not group[0].atomic:
            following = self._waiting[0]
            items += len(following.specs)
            size += following.size_bytes
            if following.atomic or items > self._call_items or size > self._call_bytes:
                break
            group.append(self._waiting.popleft())
        return group

    async def _deliver(self, group: Sequence[_Submission]) -> None:
        specs = tuple(spec for submission in group for spec in submission.specs)
        batch = SubmitBatch(specs=specs, atomic=group[0].atomic)
        deadline = group[0].since + self._resend_s
        pause = RESEND_PAUSE_S
        self._asked = False
        while True:
            try:
                if self._silent and not self._asked:
                    await self._look()
                results = await self._send(batch)
                break
            except CannotAccept as error:
                # What is refused now may have been stored by the try before.
                if not self._asked and not isinstance(error, ModeratorUnavailable):
                    raise
                if self._clock.elapsed() + pause > deadline:
                    if not self._asked or isinstance(error, NoAnswer):
                        raise
                    raise NoAnswer(
                        f"it was sent, and it is not known whether it is stored ({error})", 2
                    ) from error
            self.resent += 1
            await self._sleep(pause)
            pause = min(2 * pause, RESEND_PAUSE_S_MAX)
        if len(results) != len(specs):
            raise RuntimeError(f"{len(specs)} tasks were sent, {len(results)} answers came back")
        self._learn(results)
        start = 0
        for submission in group:
            end = start + len(submission.specs)
            if not submission.answer.done():
                submission.answer.set_result(results[start:end])
            self._forget(submission)
            start = end

    async def _look(self) -> None:
        """Raise `ModeratorUnavailable` unless the moderator is there again."""
        try:
            await self._moderator.status()
        except NoAnswer as error:  # To a question, not to the batch.
            raise ModeratorUnavailable(error.message, error.retry_after_s) from error
        self._silent = False

    async def _send(self, batch: SubmitBatch) -> Sequence[SubmitResult]:
        """Make one try; afterwards ``_asked`` says whether any may have been carried out."""
        before, self._asked = self._asked, True
        self.calls += 1
        failpoints.hit("c1.submit.before")
        try:
            results = await self._moderator.submit(batch)
        except NoAnswer:
            self._silent = True
            raise
        except HcnaError:
            self._asked = before
            raise
        failpoints.hit("c1.submit.answered")
        self._silent = False
        return results

    def _learn(self, results: Sequence[SubmitResult]) -> None:
        """Remember what the last answer says about the next ones, if it was that nothing fits."""
        last = results[-1]
        if isinstance(last, Refused) and isinstance(last.error, QueueFull | DiskFull):
            self._full, self._full_at, self._room = last.error, self._clock.elapsed(), 0

    def _fail_overdue(self) -> None:
        """Refuse what has waited as long as a batch may: it would only wait to fail as well."""
        limit = self._clock.elapsed() - self._resend_s
        overdue = [submission for submission in self._waiting if submission.since <= limit]
        self._waiting = deque(s for s in self._waiting if s.since > limit)
        self._fail(overdue, ModeratorUnavailable("the moderator does not answer", 2))

    def _fail(self, group: Sequence[_Submission], error: Exception) -> None:
        for submission in group:
            if not submission.answer.done():
                submission.answer.set_exception(error)
            self._forget(submission)

    def _forget(self, submission: _Submission) -> None:
        if submission.size_bytes >= 0:
            self.items -= len(submission.specs)
            self.bytes -= submission.size_bytes
            submission.size_bytes = -1

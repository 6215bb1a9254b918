"""Clients that wait for a task: thousands of them, on one call to the moderator.

One loop per replica keeps a single ``changes`` call open and wakes whoever waits for what ended. A
waiter registers first, then reads, then waits: what ends in between wakes it all the same. After
anything that may have hidden a change (a gap, a lost moderator) everybody is woken to look again.

While nobody has waited for some seconds there is no such call: it would be answered for every
commit, and nobody would care.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

from hcna_ray.api.ports import ModeratorPort
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError

log = logging.getLogger(__name__)

#: How long one call to the moderator stays open while nothing ends.
POLL_S = 20.0
PAUSE_S = 0.1
PAUSE_S_MAX = 1.0
#: How long the call is kept up after the last waiter has gone.
LINGER_S = 5.0
#: Stands for what nobody has followed: older than all that is remembered.
_UNKNOWN = -1

#: Tells which batch each of some ended tasks belongs to, if any.
BatchesOf = Callable[[tuple[str, ...]], Awaitable[Iterable[str]]]


class ChangeFeed:
    """Fans what ended out to waiters. Invariant: at most one ``changes`` call is open."""

    def __init__(self, moderator: ModeratorPort, batches_of: BatchesOf, clock: Clock) -> None:
        self._moderator, self._clock = moderator, clock
        self._batches_of = batches_of
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._batch_waiters = 0
        self._after = _UNKNOWN
        self._wanted = asyncio.Event()
        #: When the last waiter has gone.
        self._left = -LINGER_S
        self._loop: asyncio.Task[None] | None = None
        self.connected = False

    def start(self) -> None:
        """Start the loop, unless it runs."""
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run(), name="change-feed")

    async def stop(self) -> None:
        """End the loop and wake everybody."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.wait({loop})
        self._wake_all()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._loop is not None and not self._loop.done()

    @property
    def waiting(self) -> int:
        """How many ids and batches are being waited for."""
        return len(self._waiters)

    @contextmanager
    def watch(
        self, ids: Iterable[str] = (), batch_id: str | None = None
    ) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever one of ``ids``, or a task of the batch, ends."""
        event = asyncio.Event()
        keys = {*ids} if batch_id is None else {batch_id}
        for key in keys:
            self._waiters.setdefault(key, set()).add(event)
        self._batch_waiters += batch_id is not None
        if keys:
            self._wanted.set()
        try:
            yield event
        finally:
            self._batch_waiters -= batch_id is not None
            for key in keys:
                events = self._waiters[key]
                events.discard(event)
                if not events:
                    del self._waiters[key]
            if keys and not self._waiters:
                self._left = self._clock.elapsed()

    async def _run(self) -> None:
        pause = PAUSE_S
        while True:
            if not self._waiters and self._clock.elapsed() - self._left >= LINGER_S:
                self._wanted.clear()
                await self._wanted.wait()
                self._after = _UNKNOWN
            try:
                changes = await self._moderator.changes(self._after, POLL_S)
                if not self.connected or changes.gap:
                    self._wake_all()
                else:
                    await self._wake(changes.ended)
                if changes.last == self._after and not changes.ended:
                    # A quiet while; should it be answered without waiting, this loop must not spin.
                    await asyncio.sleep(0.01)
                self._after = changes.last
                self.connected = True
                pause = PAUSE_S
            except HcnaError as error:
                self._lost(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_S_MAX)
            except Exception:
                self.connected = False
                log.exception("change feed failed, will retry", extra={"action": "feed.failed"})
                await asyncio.sleep(PAUSE_S_MAX)

    def _lost(self, error: HcnaError) -> None:
        if self.connected:
            log.warning(
                "moderator does not answer, waiting for it",
                extra={"action": "feed.moderator_lost", "error_code": error.code},
            )
        self.connected = False

    async def _wake(self, ended: tuple[str, ...]) -> None:
        for task_id in ended:
            for event in self._waiters.get(task_id, ()):
                event.set()
        if ended and self._batch_waiters:
            try:
                batches = await self._batches_of(ended)
            except HcnaError:
                self._wake_all()
                return
            for batch_id in batches:
                for event in self._waiters.get(batch_id, ()):
                    event.set()

    def _wake_all(self) -> None:
        for events in self._waiters.values():
            for event in events:
                event.set()

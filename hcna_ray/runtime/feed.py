"""The change feed: tells every C1 replica which tasks have ended, or just that there is news.

Each replica keeps one call parked here for those who wait for tasks, and another while it has event
streams; both fan out inside the replica, which reads what has happened from the store.
"""

from __future__ import annotations

import asyncio
from collections import deque

from hcna_ray.runtime.messages import Changes

#: Ended tasks remembered for replicas that are a little behind.
REMEMBERED = 100_000


class ChangeFeed:
    """Ended tasks by fact number. Lives on one event loop."""

    def __init__(self, last: int) -> None:
        """Start at the store's newest fact: what came before is a gap for every listener."""
        self._last = self._floor = last
        self._ended: deque[tuple[int, str]] = deque()
        self._news = asyncio.Event()
        #: As `_news`, of every commit with history in it.
        self._written = asyncio.Event()

    def publish(self, last: int, ended: tuple[str, ...]) -> None:
        """Take in a commit: its newest fact number and the tasks that ended with it."""
        if last <= self._last:
            return
        self._last = last
        for task_id in ended:
            self._ended.append((last, task_id))
        while len(self._ended) > REMEMBERED:
            self._floor = self._ended.popleft()[0]
        self._written.set()
        self._written = asyncio.Event()
        if ended:
            self._news.set()
            self._news = asyncio.Event()

    async def after(self, number: int, wait_s: float) -> Changes:
        """Return what ended after a fact number, waiting for it if need be."""
        if number < self._floor or number > self._last:
            return Changes(last=self._last, gap=True)
        found = self._since(number)
        if not found:
            news = self._news
            try:
                async with asyncio.timeout(wait_s):
                    await news.wait()
            except TimeoutError:
                pass
            if number < self._floor:
                return Changes(last=self._last, gap=True)
            found = self._since(number)
        return Changes(last=self._last, ended=tuple(found))

    async def written(self, number: int, wait_s: float) -> Changes:
        """Return once there is history after a fact number, or when the time is up.

        Who asks reads it from the store. A number that is not known here (of a reader that is ahead
        of what was published, or from before a restore) is answered at once.
        """
        if number == self._last:
            written = self._written
            try:
                async with asyncio.timeout(wait_s):
                    await written.wait()
            except TimeoutError:
                pass
        return Changes(last=self._last)

    def _since(self, number: int) -> list[str]:
        found: list[str] = []
        for at, task_id in reversed(self._ended):
            if at <= number:
                break
            found.append(task_id)
        found.reverse()
        return found

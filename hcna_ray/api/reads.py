"""Reads from the store, on one thread of their own, with a connection of its own.

A store's reader may be used by one thread at a time, and a slow disk must not stop the event loop.
Lookups of single tasks that arrive while another is being made are answered together.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from typing import TypeVar

from hcna_ray.core.errors import HcnaError, NotFound, Overloaded, StoreUnavailable
from hcna_ray.core.models import Attempt, Task
from hcna_ray.store.base import TaskReader

T = TypeVar("T")

#: Tasks fetched in one go for callers that came together.
LOOKUPS_MAX = 500
#: Calls that wait for the thread.
CALLS_MAX = 20_000

#: A task with its attempts, oldest first.
Found = tuple[Task, Sequence[Attempt]]


class Reads:
    """Asynchronous face of a `TaskReader`. Invariant: one thread uses the reader."""

    def __init__(self, open_reader: Callable[[], TaskReader], *, threaded: bool = True) -> None:
        """Remember how to open the reader; it is opened by the first call and again after trouble.

        Args:
            open_reader: Called on the reading thread; may fail while the store does not exist yet.
            threaded: False reads on the event loop itself, for a reader that lives there.
        """
        self._open_reader = open_reader
        self._reader: TaskReader | None = None
        self._threads = ThreadPoolExecutor(1, "reads") if threaded else None
        self._lookups: dict[str, list[asyncio.Future[Found | None]]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._calls = 0

    async def run(self, call: Callable[[TaskReader], T]) -> T:
        """Return ``call(reader)``.

        Raises:
            StoreUnavailable: the store cannot be opened or read.
            Overloaded: too many calls wait already.
        """
        if self._threads is None:
            return self._call(call)
        if self._calls >= CALLS_MAX:
            raise Overloaded("too many reads wait for the store; try again in a moment")
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, call)
        finally:
            self._calls -= 1

    async def find(self, task_id: str) -> Found:
        """Return a task with its attempts.

        Raises:
            NotFound: there is no such task.
            StoreUnavailable: the store cannot be read.
        """
        answer: asyncio.Future[Found | None] = asyncio.get_running_loop().create_future()
        self._lookups.setdefault(task_id, []).append(answer)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_up(), name="lookups", context=Context())
        found = await answer
        if found is None:
            raise NotFound("task", task_id[:100])
        return found

    async def close(self) -> None:
        """Close the reader and its thread."""
        if self._looking is not None:
            await asyncio.wait({self._looking})
        if self._threads is None:
            self._close()
            return
        await asyncio.get_running_loop().run_in_executor(self._threads, self._close)
        self._threads.shutdown(wait=False)

    async def _look_up(self) -> None:
        try:
            while self._lookups:
                ids = list(self._lookups)[:LOOKUPS_MAX]
                answers = {task_id: self._lookups.pop(task_id) for task_id in ids}
                try:
                    found = await self.run(functools.partial(with_attempts, ids=ids))
                except Exception as error:
                    for waiting in answers.values():
                        _settle(waiting, error)
                    continue
                for task_id, waiting in answers.items():
                    _settle(waiting, found.get(task_id))
        finally:
            self._looking = None

    def _call(self, call: Callable[[TaskReader], T]) -> T:
        try:
            if self._reader is None:
                self._reader = self._open_reader()
            return call(self._reader)
        except HcnaError:
            raise
        except Exception as error:
            # A reader that failed once is not trusted again: the next call opens another.
            self._close()
            raise StoreUnavailable(f"the store cannot be read ({type(error).__name__})") from error

    def _close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


def _settle(
    waiting: Sequence[asyncio.Future[Found | None]], value: Found | Exception | None
) -> None:
    for answer in waiting:
        if answer.done():
            continue
        if isinstance(value, Exception):
            answer.set_exception(value)
        else:
            answer.set_result(value)


def with_attempts(reader: TaskReader, ids: Sequence[str]) -> dict[str, Found]:
    """Return the tasks that exist among ``ids``, each with its attempts."""
    return {
        task_id: (task, reader.attempts(task_id) if task.attempt else ())
        for task_id, task in reader.get(ids).items()
    }

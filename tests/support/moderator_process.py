"""The moderator and its store in a process of their own, without Ray: made to be killed.

``python -m tests.support.moderator_process STORE SOCKET POLICY`` answers pickled requests on a Unix
socket; `SocketModerator` is the other end, and a `hcna_ray.api.ports.ModeratorPort`. ``STORE`` is a
SQLite file, or the URL of a PostgreSQL database.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hcna_ray.core.clock import SystemClock
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
    SubmitBatch,
    SubmitResult,
    WorkerInfo,
)
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import (
    Cancel,
    MarkSchedule,
    MarkWorker,
    Note,
    PauseQueue,
    PutSchedule,
    Query,
    Request,
    Retry,
    RetryMany,
    RunSchedule,
)
from hcna_ray.runtime.writer import WriterThread
from hcna_ray.store.base import TaskReader, TaskStore
from hcna_ray.store.postgres import PostgresTaskReader, PostgresTaskStore
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore

#: A SQLite file, or the URL of a PostgreSQL database.
Where = Path | str

_LENGTH = struct.Struct("<I")
CALL_TIMEOUT_S = 30.0


def open_writer(where: Where) -> TaskStore:
    """Open a store as the actor of the product does."""
    if isinstance(where, Path):
        return SqliteTaskStore(where)
    return PostgresTaskStore(where, open_wait_s=2.0)


def open_reader(where: Where) -> TaskReader:
    """Open a reader beside whoever writes there."""
    return SqliteTaskReader(where) if isinstance(where, Path) else PostgresTaskReader(where)


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def _write(writer: asyncio.StreamWriter, value: Any) -> None:
    raw = pickle.dumps(value)
    writer.write(_LENGTH.pack(len(raw)) + raw)


class _Server:
    """Answers requests with what the writer thread commits."""

    def __init__(self, store: Where, policy: Policy) -> None:
        self._loop = asyncio.get_running_loop()
        clock, draw = SystemClock(), random.SystemRandom()

        def build() -> Moderator:
            writer = open_writer(store)
            try:
                moderator = Moderator(
                    writer,
                    policy,
                    clock=clock,
                    jitter=lambda: draw.uniform(-1.0, 1.0),
                    free_bytes=lambda: shutil.disk_usage(disk).free,
                )
                reader = open_reader(store)
                self._feed = ChangeFeed(reader.last_fact())
                reader.close()
            except BaseException:
                writer.close()
                raise
            return moderator

        disk = store.parent if isinstance(store, Path) else Path.cwd()
        self._feed = ChangeFeed(0)
        self._writer = WriterThread(build, clock, publish=self._publish, items_max=4096)
        self._writer.begin()
        self._calls: set[asyncio.Task[None]] = set()

    def _publish(self, outbound: Outbound) -> None:
        if outbound.answers or outbound.last_fact:
            self._loop.call_soon_threadsafe(self._deliver, outbound)

    def _deliver(self, outbound: Outbound) -> None:
        for pending, answer in outbound.answers:
            pending.resolve(answer)
        self._feed.publish(outbound.last_fact, outbound.ended)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests, each when its answer is there."""
        try:
            while True:
                number, request = await _read(reader)
                call = asyncio.create_task(self._answer(writer, number, request))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, number: int, request: Any) -> None:
        if isinstance(request, tuple):
            answer: object = await self._feed.after(*request)
        else:
            done: asyncio.Future[object] = self._loop.create_future()

            def resolve(found: object) -> None:
                # As in the product: a parked call of a refused batch is answered, and again later.
                if not done.done():
                    done.set_result(found)

            self._writer.submit(request, resolve)
            answer = await done
        if not writer.is_closing():
            _write(writer, (number, answer))


async def _main(store: Where, socket: Path, policy: Policy) -> None:
    server = _Server(store, policy)
    async with await asyncio.start_unix_server(server.serve, socket, limit=1 << 26) as listening:
        await listening.serve_forever()


class SocketLink:
    """One connection to the moderator's process, opened anew after it broke."""

    def __init__(self, socket: Path) -> None:
        """Name the socket; nothing is opened yet."""
        self._socket = socket
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def ask(
        self, request: Request | tuple[int, float], *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """Send a request and return its answer.

        Raises:
            NoAnswer: it is unknown whether the call took effect.
            ModeratorUnavailable: nothing was sent.
            HcnaError: the answer.
        """
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            writer = await self._open()
        except OSError as error:
            raise ModeratorUnavailable(f"the moderator is not there ({error!r})", 1) from error
        try:
            self._waiting[number] = answer
            _write(writer, (number, request))
            async with asyncio.timeout(timeout_s):
                found = await answer
        except (OSError, TimeoutError) as error:
            raise NoAnswer(f"the moderator did not answer ({error!r})", 1) from error
        finally:
            self._waiting.pop(number, None)
        if isinstance(found, HcnaError):
            raise found
        return found

    async def _open(self) -> asyncio.StreamWriter:
        async with self._lock:
            if self._writer is None:
                reader, self._writer = await asyncio.open_unix_connection(
                    self._socket, limit=1 << 26
                )
                self._reading = asyncio.create_task(self._listen(reader, self._writer))
            return self._writer

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                number, answer = await _read(reader)
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (asyncio.IncompleteReadError, OSError):
            self._writer = None
            writer.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionResetError("the moderator is gone"))

    async def close(self) -> None:
        """Close the connection."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()


class SocketModerator:
    """`hcna_ray.api.ports.ModeratorPort` over a `SocketLink`."""

    def __init__(self, link: SocketLink, store: Where) -> None:
        """Use a connection, and the store for what a replica's own reader finds."""
        self._link, self._store = link, store

    async def submit(self, batch: SubmitBatch) -> Sequence[SubmitResult]:
        results: Sequence[SubmitResult] = await self._link.ask(batch)
        return results

    async def cancel(self, task_id: str, *, reason: str, principal: str) -> TaskState:
        request = Cancel(task_id=task_id, reason=reason, principal=principal)
        return TaskState(await self._link.ask(request))

    async def retry(self, task_id: str, *, principal: str) -> TaskState:
        return TaskState(await self._link.ask(Retry(task_id=task_id, principal=principal)))

    async def retry_many(self, query: ReplayQuery, *, principal: str) -> ReplayReply:
        reader = open_reader(self._store)
        try:
            found = reader.page(query.where, before_seq=None, limit=query.limit)
        finally:
            reader.close()
        ids = tuple(task.id for task in found)
        request = RetryMany(query=query, ids=ids, more=False, principal=principal)
        reply: ReplayReply = await self._link.ask(request)
        return reply

    async def change_schedule(self, order: PutSchedule | MarkSchedule) -> Schedule:
        schedule: Schedule = await self._link.ask(order)
        return schedule

    async def run_schedule(self, order: RunSchedule) -> Accepted:
        result: Accepted = await self._link.ask(order)
        return result

    async def changes(self, after: int, wait_s: float) -> Changes:
        changes: Changes = await self._link.ask((after, min(wait_s, CALL_TIMEOUT_S / 2)))
        return changes

    async def workers(self) -> Sequence[WorkerInfo]:
        workers: Sequence[WorkerInfo] = await self._link.ask(Query(name="workers"))
        return workers

    async def worker_views(self) -> tuple[Sequence[WorkerView], int, int]:
        views, running, running_max = await self._link.ask(Query(name="worker_views"))
        return views, running, running_max

    async def set_worker(
        self, name: str, action: str, *, deadline_s: float | None, principal: str
    ) -> WorkerInfo:
        request = MarkWorker(name=name, action=action, deadline_s=deadline_s, principal=principal)
        worker: WorkerInfo = await self._link.ask(request)
        return worker

    async def send_intent(
        self, dst: str, intent: str, payload: Mapping[str, Any], *, principal: str, wait_s: float
    ) -> Mapping[str, Any]:
        raise NotImplementedError

    async def pause_queue(self, name: str, paused: bool, *, principal: str) -> None:
        await self._link.ask(PauseQueue(queue=name, paused=paused, principal=principal))

    async def status(self) -> ModeratorStatus:
        status: ModeratorStatus = await self._link.ask(Query(name="status"))
        return status

    async def audit(self, *entries: AuditEntry) -> None:
        await self._link.ask(Note(entries=entries))


if __name__ == "__main__":
    given = sys.argv[1]
    place: Where = given if given.startswith("postgresql:") else Path(given)
    asyncio.run(_main(place, Path(sys.argv[2]), Policy(**json.loads(sys.argv[3]))))

"""`AsyncClient`: carries the same plans out under asyncio. No rules here (see `plans`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AsyncExitStack
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast, overload

import httpx

from hcna_ray.client.discovery import find_endpoint
from hcna_ray.client.errors import ApiError, HcnaClientError
from hcna_ray.client.events import TaskEvent
from hcna_ray.client.handles import AsyncTaskHandle
from hcna_ray.client.models import (
    Artifact,
    ClusterStatus,
    Explanation,
    Health,
    IntentAnswer,
    Json,
    JsonObject,
    MapOptions,
    TaskOptions,
    TaskRequest,
    TaskView,
    Worker,
)
from hcna_ray.client.plans import (
    Answer,
    Emit,
    Next,
    NoAnswer,
    Patience,
    Pause,
    Plan,
    Planner,
    Request,
    Send,
    Sink,
    Snapshot,
    Source,
    Step,
    Take,
    Work,
    advance,
    schedule_body,
)
from hcna_ray.client.sync import GLANCE_TIMEOUT_S, ProgressCallback, UploadSource
from hcna_ray.client.tracing import client_span
from hcna_ray.client.transport import (
    answer_of,
    base_headers,
    believed,
    no_answer,
    send_options,
    streams,
)

T = TypeVar("T")
#: Bytes of a download that one hop to a thread takes along.
POUR_BYTES = 1024 * 1024
Payloads = Iterable[JsonObject] | AsyncIterable[JsonObject]


class AsyncBatch(list["AsyncTaskHandle | ApiError"]):
    """As `Batch`, with asynchronous handles."""

    def __init__(self, batch_id: str, outcomes: Iterable[AsyncTaskHandle | ApiError]) -> None:
        super().__init__(outcomes)
        self.batch_id = batch_id

    @property
    def handles(self) -> list[AsyncTaskHandle]:
        """The accepted ones."""
        return [outcome for outcome in self if isinstance(outcome, AsyncTaskHandle)]

    @property
    def errors(self) -> list[ApiError]:
        """What refused the others."""
        return [outcome for outcome in self if isinstance(outcome, ApiError)]


class AsyncClient:
    """An asynchronous client of C1: the methods of `Client`, awaited. Arguments as there."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        retry_for_s: float = 30.0,
        planner: Planner | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._endpoint = find_endpoint(url, api_key, env=os.environ)
        patience = Patience(retry_for_s=retry_for_s)
        self._plans = planner or Planner(self.url, patience=patience, timeout_s=timeout_s)
        self._glances = Planner(self.url, patience=Patience(0.0), timeout_s=GLANCE_TIMEOUT_S)
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            headers=base_headers(self._endpoint.api_key),
            transport=transport,
            trust_env=False,
            verify=believed(self.url, os.environ),
        )

    @property
    def url(self) -> str:
        """C1's address."""
        return self._endpoint.url

    @property
    def api_key(self) -> str | None:
        """The key in use."""
        return self._endpoint.api_key

    async def close(self) -> None:
        """Close the connections. Tasks go on without them."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncClient {self.url}>"

    # -- tasks -----------------------------------------------------------------------------------

    async def submit(
        self, task_type: str, payload: JsonObject | None = None, **options: Unpack[TaskOptions]
    ) -> AsyncTaskHandle:
        """As `Client.submit`."""
        request = TaskRequest(task_type=task_type, payload=payload or {}, **options)
        return AsyncTaskHandle(self, await self._run(self._plans.submit(request)))

    async def batch(self, tasks: Sequence[TaskRequest], atomic: bool = False) -> AsyncBatch:
        """As `Client.batch`."""
        answer = await self._run(self._plans.batch(tasks, atomic=atomic))
        outcomes: list[AsyncTaskHandle | ApiError] = []
        for item in answer.items:
            if item.task is not None:
                outcomes.append(AsyncTaskHandle(self, item.task))
            elif item.error is not None:
                outcomes.append(item.error)
        return AsyncBatch(answer.batch_id, outcomes)

    async def submit_many(self, tasks: Iterable[TaskRequest]) -> list[AsyncTaskHandle]:
        """As `Client.submit_many`."""
        views = await self._run(self._plans.submit_many(list(tasks)))
        return [AsyncTaskHandle(self, view) for view in views]

    @overload
    def map(
        self,
        task_type: str,
        payloads: Payloads,
        *,
        ordered: bool = ...,
        chunk: int = ...,
        max_in_flight: int = ...,
        timeout_s: float | None = ...,
        task_timeout_s: float | None = ...,
        return_exceptions: bool,
        **options: Unpack[MapOptions],
    ) -> AsyncIterator[Json | HcnaClientError]: ...

    @overload
    def map(
        self,
        task_type: str,
        payloads: Payloads,
        *,
        ordered: bool = ...,
        chunk: int = ...,
        max_in_flight: int = ...,
        timeout_s: float | None = ...,
        task_timeout_s: float | None = ...,
        **options: Unpack[MapOptions],
    ) -> AsyncIterator[Json]: ...

    def map(
        self,
        task_type: str,
        payloads: Payloads,
        *,
        ordered: bool = True,
        chunk: int = 1000,
        max_in_flight: int = 4000,
        timeout_s: float | None = None,
        task_timeout_s: float | None = None,
        return_exceptions: bool = False,
        **options: Unpack[MapOptions],
    ) -> AsyncIterator[Any]:
        """As `Client.map`; ``payloads`` may also be an asynchronous iterable."""

        def make(payload: JsonObject) -> TaskRequest:
            return TaskRequest(
                task_type=task_type, payload=payload, timeout_s=task_timeout_s, **options
            )

        plan = self._plans.map(
            make,
            ordered=ordered,
            chunk=chunk,
            max_in_flight=max_in_flight,
            timeout_s=timeout_s,
            return_exceptions=return_exceptions,
        )
        items = aiter(payloads) if isinstance(payloads, AsyncIterable) else iter(payloads)
        return self._stream(plan, items)

    async def get(self, task_id: str) -> TaskView:
        """As `Client.get`."""
        return await self._run(self._plans.get(task_id))

    async def attach(self, task_id: str) -> AsyncTaskHandle:
        """As `Client.attach`."""
        return AsyncTaskHandle(self, await self.get(task_id))

    # A str is an iterable of str too, hence the overlap; the first overload wins, as below.
    @overload
    async def wait(  # type: ignore[overload-overlap]
        self, tasks: str | AsyncTaskHandle, timeout_s: float | None = None
    ) -> TaskView: ...

    @overload
    async def wait(
        self, tasks: Iterable[str | AsyncTaskHandle], timeout_s: float | None = None
    ) -> list[TaskView]: ...

    async def wait(
        self,
        tasks: str | AsyncTaskHandle | Iterable[str | AsyncTaskHandle],
        timeout_s: float | None = None,
    ) -> TaskView | list[TaskView]:
        """As `Client.wait`."""
        if isinstance(tasks, str | AsyncTaskHandle):
            return await self._run(self._plans.wait(_id_of(tasks), timeout_s))
        given = [_id_of(task) for task in tasks]
        views = {view.task_id: view async for view in self.as_completed(given, timeout_s)}
        return [views[task_id] for task_id in given]

    def as_completed(
        self, tasks: Iterable[str | AsyncTaskHandle], timeout_s: float | None = None
    ) -> AsyncIterator[TaskView]:
        """As `Client.as_completed`."""
        plan = self._plans.as_completed([_id_of(task) for task in tasks], timeout_s)
        return self._stream(plan, iter(()))

    async def cancel(self, task_id: str, reason: str = "") -> TaskView:
        """As `Client.cancel`."""
        return await self._run(self._plans.cancel(task_id, reason))

    async def retry(self, task_id: str) -> AsyncTaskHandle:
        """As `Client.retry`."""
        return AsyncTaskHandle(self, await self._run(self._plans.retry(task_id)))

    def tasks(self, *, limit: int | None = None, **filters: object) -> AsyncIterator[TaskView]:
        """As `Client.tasks`."""
        return self._stream(self._plans.tasks(filters, limit), iter(()))

    def events(
        self,
        task_id: str | None = None,
        *,
        after: str | None = None,
        follow: bool = True,
        **filters: object,
    ) -> AsyncIterator[TaskEvent]:
        """As `Client.events`."""
        plan = self._plans.events(task_id, after=after, follow=follow, filters=filters)
        return self._follow(plan)

    def logs(
        self, task_id: str, *, attempt: int | None = None, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """As `Client.logs`."""
        return self._follow(self._plans.logs(task_id, attempt=attempt, follow=follow))

    async def why(self, task_id: str) -> Explanation:
        """As `Client.why`."""
        return await self._run(self._plans.why(task_id))

    # -- schedules -------------------------------------------------------------------------------

    async def create_schedule(
        self,
        name: str,
        cron: str,
        task_type: str,
        payload: JsonObject | None = None,
        *,
        timezone: str | None = None,
        overlap: str | None = None,
        catch_up_s: float | None = None,
        paused: bool | None = None,
        starts_at: datetime | None = None,
        **options: Unpack[TaskOptions],
    ) -> Json:
        """As `Client.create_schedule`."""
        task = TaskRequest(task_type=task_type, payload=payload or {}, **options)
        body = schedule_body(
            cron,
            task,
            name=name,
            timezone=timezone,
            overlap=overlap,
            catch_up_s=catch_up_s,
            paused=paused,
            starts_at=starts_at,
        )
        return await self._run(self._plans.create_schedule(body))

    async def change_schedule(
        self,
        name: str,
        cron: str,
        task_type: str,
        payload: JsonObject | None = None,
        *,
        timezone: str | None = None,
        overlap: str | None = None,
        catch_up_s: float | None = None,
        paused: bool | None = None,
        owner: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Json:
        """As `Client.change_schedule`."""
        task = TaskRequest(task_type=task_type, payload=payload or {}, **options)
        body = schedule_body(
            cron, task, timezone=timezone, overlap=overlap, catch_up_s=catch_up_s, paused=paused
        )
        return await self._run(self._plans.change_schedule(name, body, owner))

    async def schedules(self, owner: str | None = None) -> list[Json]:
        """As `Client.schedules`."""
        return await self._run(self._plans.schedules(owner))

    async def schedule(self, name: str, owner: str | None = None) -> Json:
        """As `Client.schedule`."""
        return await self._run(self._plans.schedule(name, owner))

    async def pause_schedule(self, name: str, owner: str | None = None) -> Json:
        """As `Client.pause_schedule`."""
        return await self._run(self._plans.mark_schedule(name, "pause", owner))

    async def resume_schedule(self, name: str, owner: str | None = None) -> Json:
        """As `Client.resume_schedule`."""
        return await self._run(self._plans.mark_schedule(name, "resume", owner))

    async def run_schedule(self, name: str, owner: str | None = None) -> AsyncTaskHandle:
        """As `Client.run_schedule`."""
        return AsyncTaskHandle(self, await self._run(self._plans.run_schedule(name, owner)))

    async def delete_schedule(self, name: str, owner: str | None = None) -> Json:
        """As `Client.delete_schedule`."""
        return await self._run(self._plans.delete_schedule(name, owner))

    # -- webhooks --------------------------------------------------------------------------------

    async def webhook_secret(self) -> str:
        """As `Client.webhook_secret`."""
        return await self._run(self._plans.webhook_secret())

    async def webhooks(self) -> list[Json]:
        """As `Client.webhooks`."""
        return await self._run(self._plans.webhooks())

    # -- workers, intents, health ----------------------------------------------------------------

    async def workers(self) -> list[Worker]:
        """As `Client.workers`."""
        return await self._run(self._plans.workers())

    async def worker(self, name: str) -> Worker:
        """As `Client.worker`."""
        return await self._run(self._plans.worker(name))

    async def drain(self, name: str, deadline_s: float | None = None) -> Worker:
        """As `Client.drain`."""
        return await self._run(self._plans.steer(name, "drain", deadline_s))

    async def cordon(self, name: str) -> Worker:
        """As `Client.cordon`."""
        return await self._run(self._plans.steer(name, "cordon"))

    async def uncordon(self, name: str) -> Worker:
        """As `Client.uncordon`."""
        return await self._run(self._plans.steer(name, "uncordon"))

    async def forget_worker(self, name: str, *, force: bool = False) -> Worker:
        """As `Client.forget_worker`."""
        return await self._run(self._plans.forget_worker(name, force=force))

    async def pause_queue(self, name: str) -> Json:
        """As `Client.pause_queue`."""
        return await self._run(self._plans.hold(name, "pause"))

    async def resume_queue(self, name: str) -> Json:
        """As `Client.resume_queue`."""
        return await self._run(self._plans.hold(name, "resume"))

    async def send_intent(
        self, dst: str, intent: str, payload: JsonObject | None = None
    ) -> IntentAnswer:
        """As `Client.send_intent`."""
        return await self._run(self._plans.send_intent(dst, intent, payload))

    async def health(self) -> Health:
        """As `Client.health`."""
        return await self._run(self._plans.health())

    async def status(self) -> ClusterStatus:
        """As `Client.status`."""
        return await self._run(self._plans.status())

    async def snapshot(self) -> Snapshot:
        """As `Client.snapshot`."""
        return await self._run(self._glances.snapshot())

    # -- artifacts -------------------------------------------------------------------------------

    async def upload(
        self, source: UploadSource, progress: ProgressCallback | None = None
    ) -> Artifact:
        """As `Client.upload`; hashing and reading happen in a thread."""
        return await self._run(self._plans.upload(Source(source), progress))

    async def download(
        self,
        sha256: str,
        path: str | os.PathLike[str],
        progress: ProgressCallback | None = None,
    ) -> Path:
        """As `Client.download`; writing happens in a thread."""
        return await self._run(self._plans.download(sha256, Path(path), progress))

    # -- carrying out ----------------------------------------------------------------------------

    async def _run(self, plan: Plan[T]) -> T:
        """Carry out a plan that emits nothing."""
        try:
            step, outcome = advance(plan, None, None)
            while step is not None:
                step, outcome = advance(plan, *await self._perform(step, iter(())))
            return cast(T, outcome)
        finally:
            plan.close()

    async def _stream(
        self, plan: Plan[None], items: Iterator[Any] | AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        """Carry out a plan and yield what it emits."""
        try:
            step, _ = advance(plan, None, None)
            while step is not None:
                if isinstance(step, Emit):
                    yield step.value
                    step, _ = advance(plan, None, None)
                else:
                    step, _ = advance(plan, *await self._perform(step, items))
        finally:
            plan.close()

    async def _follow(self, plan: Plan[None]) -> AsyncIterator[Any]:
        """Carry out a plan with lasting answers and yield what it emits."""
        async with AsyncExitStack() as held:
            held.callback(plan.close)
            pieces: AsyncIterator[bytes] | None = None
            connection = await held.enter_async_context(AsyncExitStack())
            step, _ = advance(plan, None, None)
            while step is not None:
                came: object = None
                error: Exception | None = None
                match step:
                    case Emit(value):
                        yield value
                    case Send(request) if request.lasting:
                        await connection.aclose()
                        came, pieces = await self._open(request, connection)
                    case Next():
                        came = await _next_piece(pieces)
                    case _:
                        came, error = await self._perform(step, iter(()))
                step, _ = advance(plan, came, error)

    async def _open(
        self, request: Request, connection: AsyncExitStack
    ) -> tuple[Answer | NoAnswer, AsyncIterator[bytes] | None]:
        try:
            response = await connection.enter_async_context(
                self._http.stream(request.method, self.url + request.path, **send_options(request))
            )
            if response.status_code != 200:
                await response.aread()
                return answer_of(response), None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            return no_answer(error), None
        return Answer(200, dict(response.headers), b""), response.aiter_bytes()

    async def _perform(
        self, step: Step, items: Iterator[Any] | AsyncIterator[Any]
    ) -> tuple[object, Exception | None]:
        """Carry out one step: what to send the plan, or the exception to raise inside it."""
        try:
            match step:
                case Send(request):
                    return await self._send(request), None
                case Pause(delay_s):
                    await self._sleep(delay_s)
                    return None, None
                case Take(count):
                    return await _take(items, count), None
                case Work(call):
                    return await asyncio.to_thread(call), None
                case Emit() | Next():
                    raise AssertionError("only a stream may emit")
        except Exception as error:
            return None, error

    async def _send(self, request: Request) -> Answer | NoAnswer:
        try:
            url = self.url + request.path
            if request.sink is None:
                with client_span(request.method, request.path) as (headers, answered):
                    options = send_options(request, headers)
                    response = await self._http.request(request.method, url, **options)
                    answered(response.status_code)
                return answer_of(response)
            options = send_options(request)
            async with self._http.stream(request.method, url, **options) as response:
                if not streams(request, response):
                    await response.aread()
                    return answer_of(response)
                await _pour(response, request.sink)
                return Answer(response.status_code, dict(response.headers), b"")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            return no_answer(error)


async def _pour(response: httpx.Response, sink: Sink) -> None:
    """Hand a body to a sink, on threads; also what came before it broke off."""
    pieces: list[bytes] = []

    def take() -> None:
        for piece in pieces:
            sink.take(piece)

    held = 0
    try:
        async for piece in response.aiter_bytes():
            pieces.append(piece)
            held += len(piece)
            if held >= POUR_BYTES:
                await asyncio.to_thread(take)
                pieces.clear()
                held = 0
    except httpx.TransportError:
        await asyncio.to_thread(take)
        raise
    await asyncio.to_thread(take)


async def _next_piece(pieces: AsyncIterator[bytes] | None) -> bytes | NoAnswer | None:
    if pieces is None:
        return None
    try:
        return await anext(pieces, None)
    except httpx.TransportError as error:
        return no_answer(error)


async def _take(items: Iterator[Any] | AsyncIterator[Any], count: int) -> list[Any]:
    if not isinstance(items, AsyncIterator):
        return list(islice(items, count))
    taken: list[Any] = []
    while len(taken) < count:
        try:
            taken.append(await anext(items))
        except StopAsyncIteration:
            break
    return taken


def _id_of(task: str | AsyncTaskHandle) -> str:
    return task if isinstance(task, str) else task.id

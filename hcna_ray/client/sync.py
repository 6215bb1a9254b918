"""`Client`: carries plans out with a blocking httpx client. No rules here (see `plans`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar, Unpack, cast, overload

import httpx

from hcna_ray.client.discovery import find_endpoint
from hcna_ray.client.errors import ApiError, HcnaClientError
from hcna_ray.client.events import TaskEvent
from hcna_ray.client.handles import TaskHandle
from hcna_ray.client.html import snapshot_html
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
    Snapshot,
    Source,
    Step,
    Take,
    Work,
    advance,
    schedule_body,
)
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
ProgressCallback = Callable[[int, int], object]
UploadSource = str | os.PathLike[str] | bytes | IO[bytes]

#: A notebook cell must not hang: one try, this many seconds.
GLANCE_TIMEOUT_S = 2.0


class Batch(list["TaskHandle | ApiError"]):
    """Outcomes of `Client.batch` in the order sent: a handle, or the error that refused it."""

    def __init__(self, batch_id: str, outcomes: Iterable[TaskHandle | ApiError]) -> None:
        super().__init__(outcomes)
        self.batch_id = batch_id

    @property
    def handles(self) -> list[TaskHandle]:
        """The accepted ones."""
        return [outcome for outcome in self if isinstance(outcome, TaskHandle)]

    @property
    def errors(self) -> list[ApiError]:
        """What refused the others."""
        return [outcome for outcome in self if isinstance(outcome, ApiError)]


class Client:
    """A synchronous client of C1. Safe to share between threads; use as a context manager or not.

    Args:
        url: C1's address. Default: ``HCNA_URL``, else the cluster ``hcna up`` started here.
        api_key: Default: ``HCNA_API_KEY``, else the owner's key file of this machine's cluster.
        timeout_s: Silence after which a request counts as lost, seconds.
        retry_for_s: How long lost, 429, 503 and 504 answers are tried again in all, seconds.
        transport: Replaces the network, for tests.
        planner: Replaces the rules' clock and luck, for tests.
        sleep: Replaces `time.sleep`, for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
        *,
        retry_for_s: float = 30.0,
        planner: Planner | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = find_endpoint(url, api_key, env=os.environ)
        patience = Patience(retry_for_s=retry_for_s)
        self._plans = planner or Planner(self.url, patience=patience, timeout_s=timeout_s)
        self._glances = Planner(self.url, patience=Patience(0.0), timeout_s=GLANCE_TIMEOUT_S)
        self._sleep = sleep
        self._http = httpx.Client(
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

    def close(self) -> None:
        """Close the connections. Tasks go on without them."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.url}>"

    def _repr_html_(self) -> str:
        return snapshot_html(self.url, self.snapshot())

    # -- tasks -----------------------------------------------------------------------------------

    def submit(
        self, task_type: str, payload: JsonObject | None = None, **options: Unpack[TaskOptions]
    ) -> TaskHandle:
        """Submit one task and return at once. ``options`` are the fields of `TaskRequest`.

        When this returns the task is on C1's disk. It is sent under an Idempotency-Key, so tries
        whose answer was lost do no harm.
        """
        request = TaskRequest(task_type=task_type, payload=payload or {}, **options)
        return TaskHandle(self, self._run(self._plans.submit(request)))

    def batch(self, tasks: Sequence[TaskRequest], atomic: bool = False) -> Batch:
        """Submit up to 10 000 tasks in one transaction; each is accepted or refused by itself.

        With ``atomic`` all or none are accepted, and a refusal raises. Tasks may depend on each
        other by ``ref`` (``depends_on=["ref:a"]``).
        """
        answer = self._run(self._plans.batch(tasks, atomic=atomic))
        outcomes: list[TaskHandle | ApiError] = []
        for item in answer.items:
            if item.task is not None:
                outcomes.append(TaskHandle(self, item.task))
            elif item.error is not None:
                outcomes.append(item.error)
        return Batch(answer.batch_id, outcomes)

    def submit_many(self, tasks: Iterable[TaskRequest]) -> list[TaskHandle]:
        """Submit any number of tasks, in as many batches as it takes. The first refusal raises."""
        views = self._run(self._plans.submit_many(list(tasks)))
        return [TaskHandle(self, view) for view in views]

    @overload
    def map(
        self,
        task_type: str,
        payloads: Iterable[JsonObject],
        *,
        ordered: bool = ...,
        chunk: int = ...,
        max_in_flight: int = ...,
        timeout_s: float | None = ...,
        task_timeout_s: float | None = ...,
        return_exceptions: bool,
        **options: Unpack[MapOptions],
    ) -> Iterator[Json | HcnaClientError]: ...

    @overload
    def map(
        self,
        task_type: str,
        payloads: Iterable[JsonObject],
        *,
        ordered: bool = ...,
        chunk: int = ...,
        max_in_flight: int = ...,
        timeout_s: float | None = ...,
        task_timeout_s: float | None = ...,
        **options: Unpack[MapOptions],
    ) -> Iterator[Json]: ...

    def map(
        self,
        task_type: str,
        payloads: Iterable[JsonObject],
        *,
        ordered: bool = True,
        chunk: int = 1000,
        max_in_flight: int = 4000,
        timeout_s: float | None = None,
        task_timeout_s: float | None = None,
        return_exceptions: bool = False,
        **options: Unpack[MapOptions],
    ) -> Iterator[Any]:
        """Run one task for each payload and yield the result objects.

        Payloads are taken lazily, ``chunk`` at a time and only while fewer than ``max_in_flight``
        tasks are open, so an endless iterable is fine.

        Args:
            task_type: Name of the handler.
            payloads: One JSON object for each task.
            ordered: In the order of the payloads, else as they complete.
            chunk: Tasks in one request.
            max_in_flight: Most tasks submitted whose result was not handed out yet.
            timeout_s: For the whole, seconds; `WaitTimeout` afterwards (with the ids left).
            task_timeout_s: For one attempt of each task, seconds.
            return_exceptions: Yield the exception of a task that did not complete. If false it is
                raised, and the tasks already submitted go on without you.
            options: Fields of `TaskRequest` for every task.
        """

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
        return self._stream(plan, iter(payloads))

    def get(self, task_id: str) -> TaskView:
        """The task as it stands now."""
        return self._run(self._plans.get(task_id))

    def glance(self, task_id: str) -> TaskView:
        """As `get`, with one short try: what a notebook cell uses."""
        return self._run(self._glances.get(task_id))

    def attach(self, task_id: str) -> TaskHandle:
        """A handle for a task submitted earlier, by any process. Raises `NotFound`."""
        return TaskHandle(self, self.get(task_id))

    # A str is an iterable of str too, hence the overlap; the first overload wins, as below.
    @overload
    def wait(  # type: ignore[overload-overlap]
        self, tasks: str | TaskHandle, timeout_s: float | None = None
    ) -> TaskView: ...

    @overload
    def wait(
        self, tasks: Iterable[str | TaskHandle], timeout_s: float | None = None
    ) -> list[TaskView]: ...

    def wait(
        self,
        tasks: str | TaskHandle | Iterable[str | TaskHandle],
        timeout_s: float | None = None,
    ) -> TaskView | list[TaskView]:
        """Wait until one task, or every one of several, ended. Raises `WaitTimeout`."""
        if isinstance(tasks, str | TaskHandle):
            return self._run(self._plans.wait(_id_of(tasks), timeout_s))
        given = [_id_of(task) for task in tasks]
        views = {view.task_id: view for view in self.as_completed(given, timeout_s)}
        return [views[task_id] for task_id in given]

    def as_completed(
        self, tasks: Iterable[str | TaskHandle], timeout_s: float | None = None
    ) -> Iterator[TaskView]:
        """Yield each task's view as it ends (without its attempts). Raises `WaitTimeout`."""
        plan = self._plans.as_completed([_id_of(task) for task in tasks], timeout_s)
        return self._stream(plan, iter(()))

    def cancel(self, task_id: str, reason: str = "") -> TaskView:
        """Cancel a task. Raises `Conflict` (``task_finished``) if it had ended."""
        return self._run(self._plans.cancel(task_id, reason))

    def retry(self, task_id: str) -> TaskHandle:
        """Replay a failed task. Raises `Conflict` (``not_failed``) for any other."""
        return TaskHandle(self, self._run(self._plans.retry(task_id)))

    def tasks(self, *, limit: int | None = None, **filters: object) -> Iterator[TaskView]:
        """Tasks that match, page by page as you iterate.

        Args:
            limit: Most tasks to yield.
            filters: ``status``, ``task_type``, ``queue``, ``worker``, ``batch_id``, ``since``.
        """
        return self._stream(self._plans.tasks(filters, limit), iter(()))

    def events(
        self,
        task_id: str | None = None,
        *,
        after: str | None = None,
        follow: bool = True,
        **filters: object,
    ) -> Iterator[TaskEvent]:
        """What happens to tasks, as it happens: each event once, also over lost connections.

        Args:
            task_id: Of this task, from its beginning until it has ended; else of all, without end.
            after: `TaskEvent.id` of the last one seen; ``"0"`` begins with the oldest that is kept.
                Of all tasks, without it, those from now on are told.
            follow: False ends when everything there is was told.
            filters: ``task_type``, ``queue``, ``kind`` (several separated by commas); not with a
                task.
        """
        plan = self._plans.events(task_id, after=after, follow=follow, filters=filters)
        return self._follow(plan)

    def logs(
        self, task_id: str, *, attempt: int | None = None, follow: bool = False
    ) -> Iterator[bytes]:
        """What a task's handler has printed, in pieces.

        Args:
            task_id: The task.
            attempt: Number of the attempt; the newest unless given.
            follow: Go on while it prints, attempt after attempt, until the task has ended; with
                ``attempt`` until that has.

        Raises:
            NotFound: there is no such task; or no attempt, and it is not to be followed.
            Overloaded: the worker that keeps the output does not answer (``output_unavailable``).
        """
        return self._follow(self._plans.logs(task_id, attempt=attempt, follow=follow))

    def why(self, task_id: str) -> Explanation:
        """Where the task stands and why, in words, and what would help."""
        return self._run(self._plans.why(task_id))

    # -- schedules -------------------------------------------------------------------------------

    def create_schedule(
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
        """Have M1 submit a task at every instant that a cron line names; return the schedule.

        Sending the same again is harmless; another schedule of that name raises `Conflict`.

        Args:
            name: Names it among your own.
            cron: Five fields, or ``@daily`` and the like.
            task_type: Of the task.
            payload: Of the task.
            timezone: In which the cron line is read; UTC if not given.
            overlap: ``skip`` (if not given), ``queue_one``, ``allow`` or ``cancel_previous``.
            catch_up_s: How long after an instant its task is still submitted.
            paused: Submit nothing until it is resumed.
            starts_at: No instant before this one counts; it may lie in the past.
            options: Fields of `TaskRequest`, but for those that concern one submission alone.
        """
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
        return self._run(self._plans.create_schedule(body))

    def change_schedule(
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
        """Give a schedule another definition; what is left out takes its default again.

        Args:
            name: Of the schedule.
            cron: As for `create_schedule`, and so are the others.
            task_type: Of the task.
            payload: Of the task.
            timezone: In which the cron line is read.
            overlap: What becomes of an instant while the last task has not ended.
            catch_up_s: How long after an instant its task is still submitted.
            paused: Submit nothing until it is resumed.
            owner: Whose it is; by default your own.
            options: Fields of `TaskRequest`.
        """
        task = TaskRequest(task_type=task_type, payload=payload or {}, **options)
        body = schedule_body(
            cron, task, timezone=timezone, overlap=overlap, catch_up_s=catch_up_s, paused=paused
        )
        return self._run(self._plans.change_schedule(name, body, owner))

    def schedules(self, owner: str | None = None) -> list[Json]:
        """Every schedule that you may see, or those of one owner."""
        return self._run(self._plans.schedules(owner))

    def schedule(self, name: str, owner: str | None = None) -> Json:
        """One schedule: its task, its next instants, what became of the last ones."""
        return self._run(self._plans.schedule(name, owner))

    def pause_schedule(self, name: str, owner: str | None = None) -> Json:
        """Submit nothing more; what goes by meanwhile is not made up for."""
        return self._run(self._plans.mark_schedule(name, "pause", owner))

    def resume_schedule(self, name: str, owner: str | None = None) -> Json:
        """Go on from now; your own go on with the authority of the key you use."""
        return self._run(self._plans.mark_schedule(name, "resume", owner))

    def run_schedule(self, name: str, owner: str | None = None) -> TaskHandle:
        """Submit its task now. Raises `Conflict` if the last one has to end first."""
        return TaskHandle(self, self._run(self._plans.run_schedule(name, owner)))

    def delete_schedule(self, name: str, owner: str | None = None) -> Json:
        """Delete a schedule; its tasks stay. Returns what it was."""
        return self._run(self._plans.delete_schedule(name, owner))

    # -- webhooks --------------------------------------------------------------------------------

    def webhook_secret(self) -> str:
        """What reports on one's own tasks are signed with, for their receiver to check."""
        return self._run(self._plans.webhook_secret())

    def webhooks(self) -> list[Json]:
        """Reports that have not been taken to their webhooks yet; for admins."""
        return self._run(self._plans.webhooks())

    # -- workers, queues, intents, health --------------------------------------------------------

    def workers(self) -> list[Worker]:
        """Every worker the moderator knows."""
        return self._run(self._plans.workers())

    def worker(self, name: str) -> Worker:
        """One worker, by short name such as ``W1``. Raises `NotFound`."""
        return self._run(self._plans.worker(name))

    def drain(self, name: str, deadline_s: float | None = None) -> Worker:
        """Give the worker nothing new and let it finish, at most ``deadline_s`` seconds."""
        return self._run(self._plans.steer(name, "drain", deadline_s))

    def cordon(self, name: str) -> Worker:
        """Give the worker nothing new."""
        return self._run(self._plans.steer(name, "cordon"))

    def uncordon(self, name: str) -> Worker:
        """Undo `cordon` or `drain`."""
        return self._run(self._plans.steer(name, "uncordon"))

    def forget_worker(self, name: str, *, force: bool = False) -> Worker:
        """Strike a worker that left for good off the record (admin key); what was known of it.

        Args:
            name: Short name or node id.
            force: Also one that is in contact.

        Raises:
            Conflict: it is in contact, and ``force`` was not given.
        """
        return self._run(self._plans.forget_worker(name, force=force))

    def pause_queue(self, name: str) -> Json:
        """Start nothing more from the queue; tasks are still accepted into it (operator key)."""
        return self._run(self._plans.hold(name, "pause"))

    def resume_queue(self, name: str) -> Json:
        """Start tasks from the queue again (operator key)."""
        return self._run(self._plans.hold(name, "resume"))

    def send_intent(self, dst: str, intent: str, payload: JsonObject | None = None) -> IntentAnswer:
        """Send a worker an intent such as ``test.ping`` and return its answer (admin key)."""
        return self._run(self._plans.send_intent(dst, intent, payload))

    def health(self) -> Health:
        """What C1 says of itself; needs no key."""
        return self._run(self._plans.health())

    def status(self) -> ClusterStatus:
        """M1, workers, queues and totals in one answer."""
        return self._run(self._plans.status())

    def snapshot(self) -> Snapshot:
        """Health and workers in one value, with one short try; never raises for a C1 away."""
        return self._run(self._glances.snapshot())

    # -- artifacts -------------------------------------------------------------------------------

    def upload(self, source: UploadSource, progress: ProgressCallback | None = None) -> Artifact:
        """Upload a file (path, bytes or binary file) and return its address by content.

        Sends parts of 8 MiB, only what C1 lacks, and resumes after errors, also in a new process.
        ``progress`` is called with bytes done and bytes in all.
        """
        return self._run(self._plans.upload(Source(source), progress))

    def download(
        self,
        sha256: str,
        path: str | os.PathLike[str],
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Download to ``path`` (a file, or a folder to put it in), checked and put there at once.

        Raises:
            DigestMismatch: What came is not what was asked for; ``path`` was not touched.
        """
        return self._run(self._plans.download(sha256, Path(path), progress))

    # -- carrying out ----------------------------------------------------------------------------

    def _run(self, plan: Plan[T]) -> T:
        """Carry out a plan that emits nothing."""
        try:
            step, outcome = advance(plan, None, None)
            while step is not None:
                step, outcome = advance(plan, *self._perform(step, iter(())))
            return cast(T, outcome)
        finally:
            plan.close()

    def _stream(self, plan: Plan[None], items: Iterator[Any]) -> Iterator[Any]:
        """Carry out a plan and yield what it emits."""
        try:
            step, _ = advance(plan, None, None)
            while step is not None:
                if isinstance(step, Emit):
                    yield step.value
                    step, _ = advance(plan, None, None)
                else:
                    step, _ = advance(plan, *self._perform(step, items))
        finally:
            plan.close()

    def _follow(self, plan: Plan[None]) -> Iterator[Any]:
        """Carry out a plan with lasting answers and yield what it emits."""
        with ExitStack() as held:
            held.callback(plan.close)
            pieces: Iterator[bytes] = iter(())
            connection = held.enter_context(ExitStack())
            step, _ = advance(plan, None, None)
            while step is not None:
                came: object = None
                error: Exception | None = None
                match step:
                    case Emit(value):
                        yield value
                    case Send(request) if request.lasting:
                        connection.close()
                        came, pieces = self._open(request, connection)
                    case Next():
                        came = _next_piece(pieces)
                    case _:
                        came, error = self._perform(step, iter(()))
                step, _ = advance(plan, came, error)

    def _open(
        self, request: Request, connection: ExitStack
    ) -> tuple[Answer | NoAnswer, Iterator[bytes]]:
        try:
            response = connection.enter_context(
                self._http.stream(request.method, self.url + request.path, **send_options(request))
            )
            if response.status_code != 200:
                response.read()
                return answer_of(response), iter(())
        except (httpx.TransportError, httpx.InvalidURL) as error:
            return no_answer(error), iter(())
        return Answer(200, dict(response.headers), b""), response.iter_bytes()

    def _perform(self, step: Step, items: Iterator[Any]) -> tuple[object, Exception | None]:
        """Carry out one step: what to send the plan, or the exception to raise inside it."""
        try:
            match step:
                case Send(request):
                    return self._send(request), None
                case Pause(delay_s):
                    return self._sleep(delay_s), None
                case Take(count):
                    return list(islice(items, count)), None
                case Work(call):
                    return call(), None
                case Emit() | Next():
                    raise AssertionError("only a stream may emit")
        except Exception as error:
            return None, error

    def _send(self, request: Request) -> Answer | NoAnswer:
        try:
            url = self.url + request.path
            if request.sink is None:
                with client_span(request.method, request.path) as (headers, answered):
                    options = send_options(request, headers)
                    response = self._http.request(request.method, url, **options)
                    answered(response.status_code)
                return answer_of(response)
            with self._http.stream(request.method, url, **send_options(request)) as response:
                if not streams(request, response):
                    response.read()
                    return answer_of(response)
                for piece in response.iter_bytes():
                    request.sink.take(piece)
                return Answer(response.status_code, dict(response.headers), b"")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            return no_answer(error)


def _next_piece(pieces: Iterator[bytes]) -> bytes | NoAnswer | None:
    try:
        return next(pieces, None)
    except httpx.TransportError as error:
        return no_answer(error)


def _id_of(task: str | TaskHandle) -> str:
    return task if isinstance(task, str) else task.id

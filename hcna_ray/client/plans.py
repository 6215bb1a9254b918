"""What the client does, without doing it: plans that `Client` and `AsyncClient` carry out.

A *plan* is a generator. It yields steps (send this request, pause, take items, run this piece of
file work, hand this value to the caller) and is sent what came of each. All rules live here, once:
which request to build, when to try again, how to read the answer, when to stop waiting. The two
clients only know how to carry out a step, so they cannot drift apart; tests drive a plan by hand.

    plan ──Send(request)──▶ driver ──Answer | NoAnswer──▶ plan ──Emit(value)──▶ caller
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast
from urllib.parse import quote

from hcna_ray.client.errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    ConnectionsBusy,
    DigestMismatch,
    HcnaClientError,
    NotFound,
    UnexpectedAnswer,
    WaitTimeout,
    api_error_of,
)
from hcna_ray.client.events import EventParser
from hcna_ray.client.models import (
    Artifact,
    ClusterStatus,
    Explanation,
    Health,
    IntentAnswer,
    Json,
    JsonObject,
    TaskRequest,
    TaskView,
    Worker,
    dump_json,
    explain,
    format_instant,
)

#: Largest piece of an artifact C1 takes in one request, bytes.
PART_BYTES = 8 * 1024 * 1024
#: What one request of a download asks for, bytes: C1 sends it piece by piece.
SPAN_BYTES = 32 * 1024 * 1024
#: Longest ``?wait=`` this client asks for, seconds; C1 allows 60.
LONGEST_WAIT_S = 30.0
#: Silence after which a stream counts as lost, seconds; C1 says something every 15.
STREAM_SILENCE_S = 45.0
#: Silence after which a followed output is asked for anew, seconds. Plain text has no room for a
#: sign of life, so a handler that prints nothing is not to be told from a connection that is gone.
LOGS_SILENCE_S = 60.0
#: Most tasks of one batch, and most bytes of its NDJSON that we send at once.
BATCH_ITEMS_MAX = 10_000
BATCH_BYTES_MAX = 32 * 1024 * 1024
#: Most ids one ``POST /tasks/wait`` names (and most results one answer holds).
WAIT_IDS_MAX = 1_000

T = TypeVar("T")


# -- steps ---------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes a body as it comes, so that it need not fit in memory."""

    def begin(self, answer: Answer) -> None:
        """Look at the answer's head, before its body; may refuse it by an exception."""
        ...

    def take(self, piece: bytes) -> None:
        """Take the next bytes. May block."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. ``read_timeout_s`` bounds the silence before the answer.

    The body of an answer 200 or 206 goes to ``sink``, if there is one; the `Answer` is empty then.
    Where the request is ``lasting``, the body of an answer 200 is left for `Next` to take, and
    ``read_timeout_s`` bounds the silence between its pieces.
    """

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    read_timeout_s: float | None = None
    sink: Sink | None = None
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Whatever came back, unread. Header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The request may or may not have arrived.

    ``hopeless`` means trying again cannot help, ``unsent`` that it never left this client.
    """

    reason: str
    hopeless: bool = False
    unsent: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request; the plan is sent an `Answer` or a `NoAnswer`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Next:
    """Take the next piece of a lasting answer; sent ``bytes``, ``None`` at its end, `NoAnswer`."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait ``delay_s`` seconds; the plan is sent ``None``."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Take:
    """Take up to ``count`` items of the caller's iterable; the plan is sent a list."""

    count: int


@dataclass(frozen=True, slots=True)
class Work:
    """Run blocking file work (in a thread, under asyncio); the plan is sent what it returns."""

    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand ``value`` to the caller; the plan goes on when the caller asks for more."""

    value: object


Step = Send | Next | Pause | Take | Work | Emit
Plan = Generator[Step, object, T]


def advance(plan: Plan[T], value: object, error: Exception | None) -> tuple[Step | None, T | None]:
    """The plan's next step (and no outcome), or no step and its outcome.

    What a step raised is raised inside the plan, so that the plan can clean up or decide.
    """
    try:
        return (plan.throw(error) if error else plan.send(value)), None
    except StopIteration as stop:
        return None, stop.value


# -- rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often to try again; seconds. ``retry_for_s`` bounds the whole."""

    retry_for_s: float = 30.0
    backoff_s: float = 0.1
    backoff_max_s: float = 5.0

    def delay_s(self, tries: int, luck: float) -> float:
        """Pause before try ``tries + 1``; ``luck`` in [0, 1) spreads clients over half of it."""
        full = min(self.backoff_max_s, self.backoff_s * 2.0 ** min(tries - 1, 30))
        return full * (0.5 + 0.5 * luck)


@dataclass(frozen=True, slots=True)
class BatchItem:
    """Outcome of one task of a batch: an accepted ``task`` or the ``error`` that refused it."""

    index: int
    task: TaskView | None
    error: ApiError | None


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """Outcome of a batch, item by item, in the order sent."""

    batch_id: str
    accepted: int
    rejected: int
    items: tuple[BatchItem, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a notebook shows of the cluster; ``trouble`` is set when C1 could not be asked."""

    health: Health | None
    workers: tuple[Worker, ...]
    queued: int | None
    running: int | None
    trouble: str


@dataclass(slots=True)
class _OpenBatch:
    """A batch of a `map` some of whose tasks have not ended. ``waiting`` is id to index."""

    batch_id: str
    waiting: dict[str, int]
    cursor: str | None = None
    by_ids: bool = False


class Source:
    """Bytes to upload, read piece by piece at any offset: a path, bytes or a binary file."""

    def __init__(self, source: str | os.PathLike[str] | bytes | IO[bytes]) -> None:
        self._given = source
        self._file: IO[bytes] | None = None
        self._start = 0

    def open(self) -> tuple[str, int]:
        """Open and hash. Returns SHA-256 (hex) and size. A pipe is spooled to a temporary file."""
        if isinstance(self._given, bytes):
            return hashlib.sha256(self._given).hexdigest(), len(self._given)
        if isinstance(self._given, str | os.PathLike):
            self._file = Path(self._given).open("rb")  # noqa: SIM115 - closed in close()
        elif self._given.seekable():
            self._file, self._start = self._given, self._given.tell()
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
            while piece := self._given.read(PART_BYTES):
                self._file.write(piece)
            self._file.seek(0)
        digest, size = hashlib.sha256(), 0
        while piece := self._file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
        return digest.hexdigest(), size

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on (fewer at the end)."""
        if isinstance(self._given, bytes):
            return self._given[offset : offset + count]
        if self._file is None:
            raise HcnaClientError("the upload's source is not open")
        self._file.seek(self._start + offset)
        return self._file.read(count)

    def close(self) -> None:
        """Close what `open` opened, never the caller's own file."""
        if self._file is not None and self._file is not self._given:
            self._file.close()


class Landing:
    """A `Sink`: a file beside the target of a download, hashed on the way.

    Invariant: ``offset`` and ``digest`` describe exactly what was written.
    """

    def __init__(self, target: Path, url: str) -> None:
        """Name the files; nothing is opened yet.

        Args:
            target: Where the whole file will be.
            url: C1's address, for messages only.
        """
        self._target, self._url = target, url
        self._partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        self._file: IO[bytes] | None = None
        self.digest = hashlib.sha256()
        self.offset = 0
        #: Bytes of the whole; below zero while C1 has not told.
        self.size = -1

    def open(self) -> None:
        """Create the file."""
        self._file = self._partial.open("wb", buffering=0)

    def begin(self, answer: Answer) -> None:
        """Learn the size from an answer's head. Raises `UnexpectedAnswer`."""
        if answer.status != 206:
            if self.offset:
                raise UnexpectedAnswer(self._url, "it stopped honouring Range")
            self.size = int(answer.headers.get("content-length", len(answer.body)))
            return
        told = answer.headers.get("content-range", "")
        span, _, total = told.removeprefix("bytes ").partition("/")
        if not total.isdigit() or span.partition("-")[0] != str(self.offset):
            raise UnexpectedAnswer(self._url, f"its Content-Range is {told!r}")
        self.size = int(total)

    def take(self, piece: bytes) -> None:
        """Write the next bytes."""
        assert self._file is not None, "it was opened"
        view = memoryview(piece)
        while view:
            view = view[self._file.write(view) :]
        self.digest.update(piece)
        self.offset += len(piece)

    def take_whole(self, answer: Answer) -> None:
        """Write the body of an answer that was collected."""
        self.begin(answer)
        self.take(answer.body)

    def publish(self) -> None:
        """Give the file its name."""
        self._close()
        self._partial.replace(self._target)

    def discard(self) -> None:
        """Remove what has no name yet. Harmless afterwards."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


def _knows_no_route_yet(answer: Answer) -> bool:
    """Whether Serve's entrance answered, without having found C1 behind it."""
    return (
        answer.status == 404 and answer.body.startswith(b"Path '") and b"/-/routes" in answer.body
    )


class Planner:
    """Makes the plans of one client. Owns no connection; its clock and luck can be replaced.

    Args:
        url: C1's address, for messages only.
        patience: Default retry bounds.
        timeout_s: Silence after which an ordinary request counts as lost, seconds.
        clock: Monotonic seconds.
        luck: Source of jitter, in [0, 1).
        new_key: Makes an Idempotency-Key.
    """

    def __init__(
        self,
        url: str,
        *,
        patience: Patience,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        luck: Callable[[], float] = random.random,
        new_key: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._url = url
        self._patience = patience
        self._timeout_s = timeout_s
        self._clock = clock
        self._luck = luck
        self._new_key = new_key

    # -- sending ---------------------------------------------------------------------------------

    def exchange(
        self,
        request: Request | Callable[[], Request],
        *,
        patience: Patience | None = None,
        lost: list[str] | None = None,
        is_answer: Callable[[Answer], bool] = lambda answer: answer.status < 400,
    ) -> Plan[Answer]:
        """Send until C1 itself answers with something other than "not now", or patience ends.

        Tried again: no answer, 429, 503, 504, a 5xx that is not problem details (a proxy in front
        of C1 spoke, not C1), and the 404 that Serve's entrance gives for every path in the moment
        between its own restart and its finding C1 again. That is safe for everything sent here:
        posts carry an Idempotency-Key, parts of uploads an offset. Any other answer of 400 or more
        raises at once. ``lost`` collects what was tried again: such a try may have taken effect all
        the same. ``is_answer`` says which answers are wanted. A callable makes each try's request.
        """
        patience = patience or self._patience
        started, tries = self._clock(), 0
        while True:
            tries += 1
            got = yield Send(request() if callable(request) else request)
            if isinstance(got, NoAnswer):
                failed = ConnectionsBusy if got.unsent else ConnectionFailed
                problem: HcnaClientError = failed(self._url, got.reason)
                again, at_least_s = not got.hopeless, 0.0
            else:
                answer = cast(Answer, got)
                if is_answer(answer):
                    return answer
                error = self._refusal(answer)
                spoken_by_c1 = "problem+json" in answer.headers.get("content-type", "")
                again = answer.status in (429, 503, 504) or (
                    not spoken_by_c1 and (answer.status >= 500 or _knows_no_route_yet(answer))
                )
                if answer.status == 507:
                    again = False
                problem, at_least_s = error, error.retry_after_s or 0.0
            delay_s = max(at_least_s, patience.delay_s(tries, self._luck()))
            if not again or self._clock() - started + delay_s > patience.retry_for_s:
                raise problem
            if lost is not None:
                lost.append(str(problem))
            yield Pause(delay_s)

    def _refusal(self, answer: Answer) -> ApiError:
        try:
            body = json.loads(answer.body)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            text = " ".join(answer.body[:200].decode("utf-8", "replace").split())
            body = {"code": f"http_{answer.status}", "detail": text or "no explanation was given"}
        told = answer.headers.get("retry-after", "")
        retry_after_s = float(told) if told.replace(".", "", 1).isdigit() else None
        return api_error_of(answer.status, body, retry_after_s)

    def _read(self, answer: Answer) -> Json:
        try:
            body = json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise UnexpectedAnswer(self._url, f"its answer is not JSON ({error})") from error
        if not isinstance(body, dict):
            raise UnexpectedAnswer(self._url, "its answer is not a JSON object")
        return body

    def _ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: object = None,
        key: str | None = None,
        wait_s: float = 0.0,
        patience: Patience | None = None,
        lost: list[str] | None = None,
    ) -> Plan[Json]:
        """One JSON exchange. A POST gets an Idempotency-Key of its own unless it is given one."""
        headers: dict[str, str] = {}
        if method == "POST":
            headers["Idempotency-Key"] = key or self._new_key()
        content = None if body is None else dump_json(body)
        if content is not None:
            headers["Content-Type"] = "application/json"
        timeout_s = self._timeout_s + wait_s
        request = Request(method, path, params or {}, headers, content, timeout_s)
        answer = yield from self.exchange(request, patience=patience, lost=lost)
        return self._read(answer)

    def _parse(self, make: Callable[[Json], T], raw: object) -> T:
        """Build a value of C1's JSON; what does not fit is not C1's fault to guess about."""
        try:
            return make(cast(Json, raw))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UnexpectedAnswer(self._url, reason) from error

    # -- tasks -----------------------------------------------------------------------------------

    def submit(self, task: TaskRequest) -> Plan[TaskView]:
        """``POST /tasks``. The same key on every try makes a lost answer harmless."""
        body = task.to_json(without=("idempotency_key", "ref"))
        raw = yield from self._ask("POST", "/tasks", body=body, key=task.idempotency_key)
        return self._parse(TaskView.from_json, {"task_type": task.task_type, **raw})

    def batch(self, tasks: Sequence[TaskRequest], *, atomic: bool = False) -> Plan[BatchAnswer]:
        """``POST /tasks/batch`` as NDJSON: at most 10 000 tasks and 32 MiB, one transaction."""
        if not tasks:
            return BatchAnswer("", 0, 0, ())
        lines = [dump_json(task.to_json()) for task in tasks]
        if len(lines) > BATCH_ITEMS_MAX or sum(map(len, lines)) > BATCH_BYTES_MAX:
            raise ValueError(f"one batch holds {BATCH_ITEMS_MAX} tasks and {BATCH_BYTES_MAX} bytes")
        return (yield from self._send_batch([task.task_type for task in tasks], lines, atomic))

    def _send_batch(
        self, types: Sequence[str], lines: Sequence[bytes], atomic: bool
    ) -> Plan[BatchAnswer]:
        headers = {
            "Content-Type": "application/x-ndjson",
            "Idempotency-Key": self._new_key(),
        }
        params = {"atomic": "true"} if atomic else {}
        body = b"\n".join(lines) + b"\n"
        request = Request("POST", "/tasks/batch", params, headers, body, 2 * self._timeout_s)
        raw = self._read((yield from self.exchange(request)))
        return self._parse(lambda got: _batch_answer(got, types), raw)

    def submit_many(self, tasks: Sequence[TaskRequest]) -> Plan[list[TaskView]]:
        """Any number of tasks, in as many batches as it takes. The first refusal raises."""
        views: list[TaskView] = []
        lines = [dump_json(task.to_json()) for task in tasks]
        done = 0
        for group in _groups(lines):
            types = [task.task_type for task in tasks[done : done + len(group)]]
            done += len(group)
            answer = yield from self._send_batch(types, group, atomic=False)
            views.extend(_accepted(item) for item in answer.items)
        return views

    def get(
        self, task_id: str, *, wait_s: float = 0.0, patience: Patience | None = None
    ) -> Plan[TaskView]:
        """``GET /tasks/{id}``, waiting at C1 up to ``wait_s`` for the end."""
        params = {"wait": f"{wait_s:g}"} if wait_s > 0 else {}
        path = f"/tasks/{quote(task_id, safe='')}"
        raw = yield from self._ask("GET", path, params=params, wait_s=wait_s, patience=patience)
        return self._parse(TaskView.from_json, raw)

    def wait(self, task_id: str, timeout_s: float | None = None) -> Plan[TaskView]:
        """Ask again and again, each time up to 30 s, until the task ended.

        Raises:
            WaitTimeout: ``timeout_s`` passed first.
        """
        deadline = None if timeout_s is None else self._clock() + timeout_s
        while True:
            wait_s = self._next_wait_s(deadline)
            view = yield from self.get(task_id, wait_s=wait_s)
            if view.ended:
                return view
            if deadline is not None and self._clock() >= deadline:
                raise WaitTimeout((task_id,), cast(float, timeout_s))

    def as_completed(self, task_ids: Sequence[str], timeout_s: float | None = None) -> Plan[None]:
        """Emit the view of each task as it ends, each once. The views carry no attempts."""
        deadline = None if timeout_s is None else self._clock() + timeout_s
        waiting = dict.fromkeys(task_ids)
        while waiting:
            asked = list(islice(waiting, WAIT_IDS_MAX))
            views, _, _ = yield from self._wait_for({"ids": asked}, self._next_wait_s(deadline))
            for view in views:
                if view.task_id in waiting:
                    del waiting[view.task_id]
                    yield Emit(view)
            if waiting and deadline is not None and self._clock() >= deadline:
                raise WaitTimeout(tuple(waiting), cast(float, timeout_s))

    def _next_wait_s(self, deadline: float | None) -> float:
        if deadline is None:
            return LONGEST_WAIT_S
        return round(max(0.0, min(LONGEST_WAIT_S, deadline - self._clock())), 3)

    def _wait_for(self, what: Json, wait_s: float) -> Plan[tuple[list[TaskView], str | None, int]]:
        body = {**what, "wait": wait_s}
        raw = yield from self._ask("POST", "/tasks/wait", body=body, wait_s=wait_s)

        def read(got: Json) -> tuple[list[TaskView], str | None, int]:
            views = [TaskView.from_json(item) for item in got["ended"]]
            return views, got.get("cursor"), int(got["pending"])

        return self._parse(read, raw)

    def map(
        self,
        make: Callable[[Any], TaskRequest],
        *,
        ordered: bool,
        chunk: int,
        max_in_flight: int,
        timeout_s: float | None,
        return_exceptions: bool,
    ) -> Plan[None]:
        """Stream results of one task for each item taken; emits result objects.

        Items are taken only while fewer than ``max_in_flight`` tasks are open (not ended, or ended
        and not yet handed out), so an endless iterable is fine and memory is bounded.
        """
        if chunk < 1 or max_in_flight < 1:
            raise ValueError("chunk and max_in_flight must be at least 1")
        chunk = min(chunk, max_in_flight, BATCH_ITEMS_MAX)
        deadline = None if timeout_s is None else self._clock() + timeout_s
        open_batches: deque[_OpenBatch] = deque()
        ready: dict[int, Json | HcnaClientError] = {}  # Ended, not handed out, by index.
        taken = handed_out = 0
        exhausted = False
        while True:
            while not exhausted and taken - handed_out + chunk <= max_in_flight:
                items = cast("list[Any]", (yield Take(chunk)))
                exhausted = len(items) < chunk
                requests = [make(item) for item in items]
                lines = [dump_json(request.to_json()) for request in requests]
                for group in _groups(lines):
                    types = [request.task_type for request in requests[: len(group)]]
                    del requests[: len(group)]
                    answer = yield from self._send_batch(types, group, atomic=False)
                    batch = _OpenBatch(answer.batch_id, {})
                    for item in answer.items:
                        if item.task is None:
                            ready[taken + item.index] = item.error or _missing(item.index)
                        else:
                            batch.waiting[item.task.task_id] = taken + item.index
                    taken += len(group)
                    if batch.waiting:
                        open_batches.append(batch)
            while ready and (not ordered or handed_out in ready):
                index = handed_out if ordered else next(iter(ready))
                outcome = ready.pop(index)
                if isinstance(outcome, HcnaClientError) and not return_exceptions:
                    raise outcome
                handed_out += 1
                yield Emit(outcome)
            if not open_batches:
                if exhausted:
                    return
                continue
            if not exhausted and taken - handed_out + chunk <= max_in_flight:
                continue
            if deadline is not None and self._clock() >= deadline:
                left = tuple(task_id for batch in open_batches for task_id in batch.waiting)
                raise WaitTimeout(left, cast(float, timeout_s))
            yield from self._collect(open_batches, ready, ordered, self._next_wait_s(deadline))

    def _collect(
        self,
        open_batches: deque[_OpenBatch],
        ready: dict[int, Json | HcnaClientError],
        ordered: bool,
        wait_s: float,
    ) -> Plan[None]:
        """Wait once. The oldest batch is followed by cursor; several at once, by their ids."""
        oldest = open_batches[0]
        if not oldest.by_ids and (ordered or len(open_batches) == 1):
            what: Json = {"batch_id": oldest.batch_id, "cursor": oldest.cursor}
            views, oldest.cursor, pending = yield from self._wait_for(what, wait_s)
            # A batch resent after a lost answer may hold ids of an earlier one: ask for those.
            oldest.by_ids = pending == 0 and not views
        else:
            ids = [task_id for batch in open_batches for task_id in batch.waiting]
            views, _, _ = yield from self._wait_for({"ids": ids[:WAIT_IDS_MAX]}, wait_s)
        for view in views:
            for batch in open_batches:
                index = batch.waiting.pop(view.task_id, None)
                if index is not None:
                    ready[index] = view.problem() or view.result or {}
                    break
        while open_batches and not open_batches[0].waiting:
            open_batches.popleft()
        for batch in [batch for batch in open_batches if not batch.waiting]:
            open_batches.remove(batch)

    def cancel(self, task_id: str, reason: str = "") -> Plan[TaskView]:
        """Cancel; a task that had ended is a `Conflict`, unless our own lost try ended it."""
        path = f"/tasks/{quote(task_id, safe='')}"
        body = {"reason": reason} if reason else {}
        lost: list[str] = []
        try:
            raw = yield from self._ask("POST", f"{path}/cancel", body=body, lost=lost)
        except Conflict:
            view = yield from self.get(task_id)
            if lost and view.status == "cancelled":
                return view
            raise
        self._parse(TaskView.from_json, raw)
        return (yield from self.get(task_id))

    def retry(self, task_id: str) -> Plan[TaskView]:
        """Replay a failed task from the dead-letter list."""
        lost: list[str] = []
        path = f"/tasks/{quote(task_id, safe='')}/retry"
        try:
            raw = yield from self._ask("POST", path, lost=lost)
        except Conflict:
            if lost:  # A try without an answer did it.
                return (yield from self.get(task_id))
            raise
        return self._parse(TaskView.from_json, raw)

    def tasks(self, filters: Mapping[str, object], limit: int | None) -> Plan[None]:
        """Emit task views page by page, newest order as C1 gives it, at most ``limit``."""
        params = {name: _param(value) for name, value in filters.items() if value is not None}
        left = limit
        while left is None or left > 0:
            params["limit"] = str(min(left or 100, 100))
            raw = yield from self._ask("GET", "/tasks", params=dict(params))
            views = self._parse(
                lambda got: [TaskView.from_json(item) for item in got["tasks"]], raw
            )
            for view in views[:left]:
                yield Emit(view)
            left = None if left is None else left - len(views)
            cursor = raw.get("next_cursor")
            if not cursor:  # A page may be empty, for a key with scopes, and another follow.
                return
            params["cursor"] = str(cursor)

    def events(
        self,
        task_id: str | None,
        *,
        after: str | None,
        follow: bool,
        filters: Mapping[str, object],
    ) -> Plan[None]:
        """Emit events, each once: what is lost of a connection is asked for on the next."""
        path = "/events" if task_id is None else f"/tasks/{quote(task_id, safe='')}/events"
        params = {name: _param(value) for name, value in filters.items() if value is not None}
        if not follow:
            params["follow"] = "false"
        if after is not None:
            params["after"] = after
        parser = EventParser()
        broken = 0

        def ask() -> Request:
            headers = {"Accept": "text/event-stream"}
            if parser.place is not None:
                headers["Last-Event-ID"] = parser.place
            return Request(
                "GET", path, params, headers, read_timeout_s=STREAM_SILENCE_S, lasting=True
            )

        while True:
            answer = yield from self.exchange(ask)
            if answer.status == 204:
                return
            parser.begin()
            while isinstance(piece := (yield Next()), bytes):
                try:
                    for event in parser.feed(piece):
                        broken = 0
                        yield Emit(event)
                except (ValueError, KeyError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise UnexpectedAnswer(self._url, reason) from error
            if piece is None and not follow:
                return
            broken += 1
            yield Pause(self._patience.delay_s(broken, self._luck()))

    def logs(self, task_id: str, *, attempt: int | None, follow: bool) -> Plan[None]:
        """Emit what a handler prints, in pieces; followed, attempt after attempt to the end."""
        path = f"/tasks/{quote(task_id, safe='')}/logs"
        number, offset, broken = attempt, 0, 0
        #: Whether the attempt had ended before it was asked for: then an answer is all of it.
        over = not follow

        def ask() -> Request:
            params = {"offset": str(offset)}
            if number is not None:
                params["attempt"] = str(number)
            if follow:
                params["follow"] = "true"
            silence_s = LOGS_SILENCE_S if follow else self._timeout_s
            return Request("GET", path, params, read_timeout_s=silence_s, lasting=True)

        while True:
            asked = self._clock()
            try:
                answer = yield from self.exchange(ask)
            except NotFound as error:
                if error.code != "attempt_not_found" or not follow:
                    raise
                if (yield from self.get(task_id)).ended:
                    return
                # There is none yet: what comes first is read first, however quickly others follow.
                number = number or 1
                broken += 1
                yield Pause(self._patience.delay_s(broken, self._luck()))
                continue
            except ConnectionFailed:
                if not follow or self._clock() - asked < LOGS_SILENCE_S:
                    raise
                # Silence before an answer is like silence in it; C1 itself must be there, though.
                yield from self.get(task_id)
                continue
            number = int(answer.headers.get("x-attempt", number or 1))
            began = self._clock()
            while isinstance(piece := (yield Next()), bytes):
                broken, offset = 0, offset + len(piece)
                yield Emit(piece)
            if piece is None and over:
                view = yield from self.get(task_id)
                # The next attempt may have begun and ended since, and the task with it.
                last = max((one.attempt for one in view.attempts), default=number)
                if attempt is not None or not follow or (view.ended and last <= number):
                    return
                number, offset, over = number + 1, 0, False
                continue
            # One that was there for long, and silent, is no failure that calls for patience.
            lasted = self._clock() - began > self._patience.backoff_max_s
            broken = 1 if lasted else broken + 1
            yield Pause(self._patience.delay_s(broken, self._luck()))
            view = yield from self.get(task_id)
            over = (
                not follow
                or view.ended
                or any(one.attempt == number and one.outcome is not None for one in view.attempts)
            )

    def why(self, task_id: str) -> Plan[Explanation]:
        """Where the task stands, in words."""
        return explain((yield from self.get(task_id)))

    # -- workers, intents, health ----------------------------------------------------------------

    def workers(self, *, patience: Patience | None = None) -> Plan[list[Worker]]:
        """``GET /workers``."""
        raw = yield from self._ask("GET", "/workers", patience=patience)
        return self._parse(lambda got: [Worker.from_json(item) for item in got["workers"]], raw)

    def webhook_secret(self) -> Plan[str]:
        """``GET /webhooks/secret``."""
        raw = yield from self._ask("GET", "/webhooks/secret")
        return self._parse(lambda got: str(got["secret"]), raw)

    def webhooks(self) -> Plan[list[Json]]:
        """``GET /admin/webhooks``."""
        raw = yield from self._ask("GET", "/admin/webhooks")
        return self._parse(lambda got: list(got["waiting"]), raw)

    def create_schedule(self, body: JsonObject) -> Plan[Json]:
        """``POST /schedules``."""
        return (yield from self._ask("POST", "/schedules", body=body))

    def change_schedule(self, name: str, body: JsonObject, owner: str | None) -> Plan[Json]:
        """``PUT /schedules/{name}``."""
        return (yield from self._ask("PUT", *_schedule(name, owner), body=body))

    def schedules(self, owner: str | None) -> Plan[list[Json]]:
        """``GET /schedules``, every page."""
        found: list[Json] = []
        params = {} if owner is None else {"owner": owner}
        while True:
            raw = yield from self._ask("GET", "/schedules", params=dict(params))
            found += self._parse(lambda got: list(got["schedules"]), raw)
            cursor = raw.get("next_cursor")
            if not cursor:
                return found
            params["cursor"] = str(cursor)

    def schedule(self, name: str, owner: str | None) -> Plan[Json]:
        """``GET /schedules/{name}``."""
        return (yield from self._ask("GET", *_schedule(name, owner)))

    def mark_schedule(self, name: str, verb: str, owner: str | None) -> Plan[Json]:
        """``POST /schedules/{name}/{verb}``: pause or resume."""
        return (yield from self._ask("POST", *_schedule(name, owner, f"/{verb}")))

    def run_schedule(self, name: str, owner: str | None) -> Plan[TaskView]:
        """``POST /schedules/{name}/run``."""
        raw = yield from self._ask("POST", *_schedule(name, owner, "/run"))
        return self._parse(TaskView.from_json, raw)

    def delete_schedule(self, name: str, owner: str | None) -> Plan[Json]:
        """``DELETE /schedules/{name}``."""
        return (yield from self._ask("DELETE", *_schedule(name, owner)))

    def worker(self, name: str) -> Plan[Worker]:
        """``GET /workers/{name}``."""
        raw = yield from self._ask("GET", f"/workers/{quote(name, safe='')}")
        return self._parse(Worker.from_json, raw)

    def steer(self, name: str, verb: str, deadline_s: float | None = None) -> Plan[Worker]:
        """``POST /workers/{name}/{verb}``: drain, cordon or uncordon."""
        body = {} if deadline_s is None else {"deadline_s": deadline_s}
        raw = yield from self._ask("POST", f"/workers/{quote(name, safe='')}/{verb}", body=body)
        return self._parse(Worker.from_json, raw)

    def forget_worker(self, name: str, *, force: bool) -> Plan[Worker]:
        """``DELETE /workers/{name}``."""
        params = {"force": "true"} if force else {}
        raw = yield from self._ask("DELETE", f"/workers/{quote(name, safe='')}", params=params)
        return self._parse(Worker.from_json, raw)

    def hold(self, queue: str, verb: str) -> Plan[Json]:
        """``POST /admin/queues/{name}/{verb}``: pause or resume."""
        return (yield from self._ask("POST", f"/admin/queues/{quote(queue, safe='')}/{verb}"))

    def send_intent(self, dst: str, intent: str, payload: JsonObject | None) -> Plan[IntentAnswer]:
        """``POST /admin/send-intent``."""
        body = {"dst": dst, "intent": intent, "payload": dict(payload or {})}
        raw = yield from self._ask("POST", "/admin/send-intent", body=body)
        return self._parse(IntentAnswer.from_json, raw)

    def health(self, *, patience: Patience | None = None) -> Plan[Health]:
        """``GET /health``. An unhealthy C1 may answer 503 with the same body: that is an answer."""
        request = Request("GET", "/health", read_timeout_s=self._timeout_s)
        answer = yield from self.exchange(request, patience=patience, is_answer=_is_health)
        return self._parse(Health.from_json, self._read(answer))

    def status(self) -> Plan[ClusterStatus]:
        """``GET /status``."""
        return self._parse(ClusterStatus.from_json, (yield from self._ask("GET", "/status")))

    def snapshot(self) -> Plan[Snapshot]:
        """What a notebook shows. Never raises for a C1 that is away, and asks only once."""
        once = Patience(retry_for_s=0.0)
        health: Health | None = None
        try:
            health = yield from self.health(patience=once)
            workers = yield from self.workers(patience=once)
        except HcnaClientError as error:
            return Snapshot(health, (), None, None, str(error))
        counts = _task_counts(health.raw)
        return Snapshot(health, tuple(workers), counts.get("queued"), counts.get("running"), "")

    # -- artifacts -------------------------------------------------------------------------------

    def upload(
        self, source: Source, progress: Callable[[int, int], object] | None
    ) -> Plan[Artifact]:
        """Hash, ask what C1 already has, send the rest in parts of 8 MiB.

        Resumes by itself: after an error C1 is told the same part again or says where it stands,
        and a new process uploading the same bytes starts at what C1 has.
        """
        report = progress or (lambda done, total: None)
        try:
            sha256, size = cast("tuple[str, int]", (yield Work(source.open)))
            if size == 0:
                raw = self._read((yield from self._put(b"", sha256, None)))
                return self._finished(raw, sha256)
            answer = yield from self._put(b"", sha256, f"bytes */{size}")
            standstill = 0
            offset = 0
            while answer.status == 202:
                received = self._received(self._read(answer), size)
                standstill = standstill + 1 if received <= offset and offset else 0
                if standstill > 3:
                    raise UnexpectedAnswer(self._url, f"the upload stays at byte {received}")
                offset = received
                report(offset, size)
                part = cast(bytes, (yield Work(_reader(source, offset))))
                last = offset + len(part) - 1
                try:
                    answer = yield from self._put(part, sha256, f"bytes {offset}-{last}/{size}")
                except Conflict as error:
                    if error.code != "offset_mismatch":
                        raise
                    answer = Answer(202, {}, dump_json(error.problem))
            artifact = self._finished(self._read(answer), sha256)
            report(size, size)
            return artifact
        finally:
            source.close()

    def _put(self, part: bytes, sha256: str, content_range: str | None) -> Plan[Answer]:
        headers = {"Content-Type": "application/octet-stream"}
        if content_range:
            headers["Content-Range"] = content_range
        params = {"sha256": sha256}
        timeout_s = 4 * self._timeout_s
        request = Request("PUT", "/artifacts", params, headers, part, timeout_s)
        return (yield from self.exchange(request))

    def _received(self, raw: Json, size: int) -> int:
        received = raw.get("received")
        if not isinstance(received, int) or not 0 <= received < size:
            raise UnexpectedAnswer(self._url, f"it claims to hold {received!r} of {size} bytes")
        return received

    def _finished(self, raw: Json, sha256: str) -> Artifact:
        artifact = self._parse(Artifact.from_json, raw)
        if artifact.sha256 != sha256:
            raise DigestMismatch(sha256, artifact.sha256)
        return artifact

    def download(
        self, sha256: str, path: Path, progress: Callable[[int, int], object] | None
    ) -> Plan[Path]:
        """Fetch into a file beside ``path``, in spans of 32 MiB; check; put it in place at once.

        The bytes go to the file as they come. A span that breaks off is asked for again from where
        it stopped. ``path`` never holds half a file or a wrong one.
        """
        report = progress or (lambda done, total: None)
        target = path / sha256 if path.is_dir() else path
        landing = Landing(target, self._url)
        route = f"/artifacts/{quote(sha256, safe='')}"

        def rest() -> Request:
            end = landing.offset + SPAN_BYTES - 1
            headers = {"Range": f"bytes={landing.offset}-{end}", "Accept-Encoding": "identity"}
            return Request("GET", route, {}, headers, None, 4 * self._timeout_s, landing)

        try:
            yield Work(landing.open)
            while landing.size < 0 or landing.offset < landing.size:
                before = landing.offset
                try:
                    answer = yield from self.exchange(rest)
                except ApiError as error:
                    if error.status == 416 and before == 0:
                        landing.size = 0  # No range of nothing can be satisfied.
                        continue
                    raise
                except ConnectionFailed:
                    if landing.offset == before:
                        raise
                    continue  # Much of it arrived: patience begins anew.
                if answer.body:
                    yield Work(partial(landing.take_whole, answer))
                report(landing.offset, landing.size)
                if landing.offset == before and landing.size:
                    raise UnexpectedAnswer(self._url, f"the artifact ends at byte {before}")
            digest = landing.digest.hexdigest()
            if digest != sha256.lower():
                raise DigestMismatch(sha256, digest)
            yield Work(landing.publish)
        finally:
            landing.discard()
        return target


# -- helpers -------------------------------------------------------------------------------------


def _reader(source: Source, offset: int) -> Callable[[], bytes]:
    return lambda: source.read(offset, PART_BYTES)


def _groups(lines: Sequence[bytes]) -> Iterable[list[bytes]]:
    """Cut into batches of at most 10 000 lines and 32 MiB; a longer single line goes alone."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        if group and (len(group) >= BATCH_ITEMS_MAX or size + len(line) > BATCH_BYTES_MAX):
            yield group
            group, size = [], 0
        group.append(line)
        size += len(line)
    if group:
        yield group


def _batch_answer(raw: Json, types: Sequence[str]) -> BatchAnswer:
    items: list[BatchItem] = []
    for entry in raw["results"]:
        index = int(entry["index"])
        problem = entry.get("error")
        if isinstance(problem, dict):
            status = int(problem.get("status") or 422)
            items.append(BatchItem(index, None, api_error_of(status, problem)))
        else:
            view = TaskView.from_json({"task_type": types[index], **entry})
            items.append(BatchItem(index, view, None))
    items.sort(key=lambda item: item.index)
    if [item.index for item in items] != list(range(len(types))):
        raise ValueError(f"{len(types)} tasks were sent, {len(items)} outcomes came back")
    return BatchAnswer(
        str(raw["batch_id"]), int(raw["accepted"]), int(raw["rejected"]), tuple(items)
    )


def _accepted(item: BatchItem) -> TaskView:
    if item.task is None:
        raise item.error or _missing(item.index)
    return item.task


def _is_health(answer: Answer) -> bool:
    """Whether C1 itself tells its health, under whatever HTTP status."""
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        return answer.status < 400
    return isinstance(body, dict) and isinstance(body.get("status"), str)


def _missing(index: int) -> HcnaClientError:
    return HcnaClientError(f"C1 gave no outcome for item {index}")


def _schedule(name: str, owner: str | None, verb: str = "") -> tuple[str, dict[str, str]]:
    """Path and query of a schedule."""
    params = {} if owner is None else {"owner": owner}
    return f"/schedules/{quote(name, safe='')}{verb}", params


def schedule_body(cron: str, task: TaskRequest, **more: object) -> Json:
    """What is asked of a schedule as C1 reads it: only what was given."""
    given = {
        name: format_instant(value) if isinstance(value, datetime) else value
        for name, value in more.items()
        if value is not None
    }
    return {"cron": cron, "task": task.to_json(), **given}


def _param(value: object) -> str:
    return format_instant(value) if isinstance(value, datetime) else str(value)


def _task_counts(raw: JsonObject) -> dict[str, int]:
    """Queue figures, if this C1's ``/health`` carries them (``tasks: {queued, running}``)."""
    counts = raw.get("tasks")
    if not isinstance(counts, dict):
        return {}
    return {str(name): value for name, value in counts.items() if isinstance(value, int)}

"""Running attempts, one after the other, in a process of its own. No Ray here.

A `Runner` is the inside of a slot (and, with a single offer, of a heavy attempt). Two threads
share it: the main thread runs handlers, so that a signal can interrupt them; the side thread sends
reports a few milliseconds after they happen, gives back what waits behind a long attempt, and
watches for stop orders.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from hcna_ray import failpoints
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import FailureKind, Outcome, Progress, TaskError, Token
from hcna_ray.handlers.context import ArtifactRef, TaskContext
from hcna_ray.handlers.errors import ResultTooLarge, TaskCancelled, TaskTimedOut
from hcna_ray.handlers.registry import Registry
from hcna_ray.handlers.run import HandlerOutcome, run_handler
from hcna_ray.observability.log_context import lines_about, names_of
from hcna_ray.runtime.journal import JournalWriter, Note, RunnerFiles, process_birth
from hcna_ray.runtime.messages import (
    DISK_FAILED,
    DRAINED,
    UNSTARTED,
    AttemptKey,
    Offer,
    Report,
    ReportKind,
)
from hcna_ray.runtime.output import OutputTap

if TYPE_CHECKING:
    from hcna_ray.observability.spans import AttemptSpan, Traces

log = logging.getLogger(__name__)

#: How often the side thread looks at things that nobody tells it of.
WATCH_S = 0.05
#: Progress is sent at most this often; a checkpoint at once.
PROGRESS_S = 0.5
#: Longest wait for the moderator to confirm a checkpoint.
CHECKPOINT_WAIT_S = 20.0


#: Reports that say when their attempt began.
_TELLS_OF_ITS_START = frozenset({ReportKind.COMPLETED, ReportKind.FAILED})


class ReportLink(Protocol):
    """How reports reach the moderator between two exchanges."""

    def report(self, reports: tuple[Report, ...]) -> bool:
        """Send reports; return whether they were confirmed. Never raises, may take seconds."""
        ...


class ArtifactLink(Protocol):
    """Where a handler's files go to and come from, each for one attempt."""

    def put(self, path: Path, attempt: AttemptKey) -> tuple[str, int]:
        """Store a file that the attempt has made; return its SHA-256 (hex) and size."""
        ...

    def get(self, sha256: str, attempt: AttemptKey) -> Path:
        """Return a local read-only file; raise `NotFound` if there is none for this attempt."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSettings:
    """What a runner needs to know of its worker."""

    worker: str
    node_id: str
    disk_path: Path
    scratch_root: Path
    #: A started attempt older than this makes the runner give back what waits behind it.
    long_s: float = 0.05
    #: Reports leave after at most this long.
    report_s: float = 0.005
    result_bytes_max: int = 256 << 10
    #: Write the span of an attempt before its end is told: this process may be ended right then.
    spans_first: bool = False


@dataclass(slots=True)
class _Current:
    """The attempt that runs now."""

    offer: Offer
    started_at: float
    started_boot: float
    #: Why it must stop, once an order has come.
    stopping: str | None = None
    #: Whether a signal may raise in the main thread: only while the handler's own code runs.
    interruptible: bool = False
    #: Whether one has raised: once is enough, the handler may be cleaning up.
    struck: bool = False

    def raise_if_stopping(self) -> None:
        """Raise what the order asks for."""
        if self.stopping is not None:
            raise TaskTimedOut if self.stopping == "timeout" else TaskCancelled


@dataclass(slots=True)
class _Shared:
    """State of both threads, under one lock."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[Offer] = field(default_factory=deque)
    current: _Current | None = None
    #: Reports not confirmed yet, in order.
    unconfirmed: list[Report] = field(default_factory=list)
    #: Whether the side thread, or the main thread's exchange, is sending them just now.
    sending: bool = False
    exchanging: bool = False
    progress: dict[tuple[str, Token], Report] = field(default_factory=dict)
    closed: bool = False


class Runner:
    """Runs what it is offered. After `must_end` turns true it starts nothing more."""

    def __init__(
        self,
        settings: RunnerSettings,
        registry: Registry,
        files: RunnerFiles,
        link: ReportLink,
        artifacts: ArtifactLink,
        clock: Clock,
        output: OutputTap | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Open the journal. `serving` must be entered before `run`.

        Args:
            settings: About the worker.
            registry: Task types this worker knows.
            files: Where to write the journal.
            link: To the moderator.
            artifacts: To the artifact store.
            clock: Wall clock and CLOCK_BOOTTIME.
            output: Keeps what handlers print; without it that goes where this process' goes.
            traces: Makes spans of attempts, if anybody wants them.
        """
        self._settings, self._registry, self._link = settings, registry, link
        self._output, self._traces = output, traces
        #: Whether spans of attempts may not be written yet.
        self._spans = False
        self._artifacts, self._clock = artifacts, clock
        self._journal = JournalWriter(files)
        self._born = process_birth(os.getpid()) or 0
        self._shared = _Shared()
        #: Whether the note names an attempt, which may have ended a moment ago.
        self._noted = True
        self._note_idle()
        self.must_end = False

    # -- main thread ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Run the side thread, and let SIGTERM interrupt the handler it is meant for."""
        side = threading.Thread(target=self._side_loop, name="hcna-reports", daemon=True)
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        side.start()
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            with self._shared.lock:
                self._shared.closed = True
                # An exchange that was given up carries nothing any more.
                self._shared.exchanging = False
                self._shared.lock.notify_all()
            side.join(timeout=5.0)
            self._journal.close()

    def run(self, offers: tuple[Offer, ...]) -> None:
        """Run offers in order. Returns when each has ended or was given back."""
        with self._shared.lock:
            self._shared.waiting.extend(offers)
        while (offer := self._next()) is not None:
            self._run_one(offer)
        if self._spans:
            self._write_spans()  # What this process runs next may end it.

    def take_unconfirmed(self) -> tuple[Report, ...]:
        """Return reports to send with the next exchange; `confirm` them when it is answered.

        Until then the side thread sends nothing: what it would send is under way already.
        """
        with self._shared.lock:
            while self._shared.sending:
                self._shared.lock.wait()
            self._shared.exchanging = True
            return tuple(self._shared.unconfirmed)

    def confirm(self, reports: tuple[Report, ...]) -> None:
        """Forget reports that the moderator has."""
        with self._shared.lock:
            self._shared.exchanging = False
            self._forget(reports)
            if not self._shared.unconfirmed:
                failpoints.hit("runner.journal.confirmed")
                self._journal.clear()
                failpoints.hit("runner.journal.forgotten")
            self._shared.lock.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every report is confirmed; return whether they were in time."""
        end = self._clock.elapsed() + timeout_s
        with self._shared.lock:
            while self._shared.unconfirmed or self._shared.progress:
                left = end - self._clock.elapsed()
                if left <= 0:
                    return False
                self._shared.lock.wait(left)
        return True

    def _next(self) -> Offer | None:
        """Take the next offer, noting it as started; give back all that must not start."""
        with self._shared.lock:
            while self._shared.waiting and not self.must_end:
                offer = self._shared.waiting.popleft()
                current = _Current(offer, self._clock.now(), self._clock.elapsed())
                # From here on a signal finds it; an order that came before is in the file.
                self._shared.current = current
                error: TaskError | None = None
                if self._may_start(current):
                    error = self._note_start(current)
                    if error is None:
                        return offer
                self._shared.current = None
                why = "stopped, expired, or out of contact" if error is None else error.message
                self._give_back([offer], why, error)
            self._give_back(list(self._shared.waiting), "the runner ends")
            self._shared.waiting.clear()
        self._note_idle()
        return None

    def _may_start(self, current: _Current) -> bool:
        """Whether nobody wants it stopped, its task has not expired, and its lease is in force."""
        offer = current.offer
        if not self._journal.may_begin(Token(*offer.token), current.started_boot):
            return False
        if current.stopping is not None:
            return False
        if offer.expires_boot is not None and offer.expires_boot <= current.started_boot:
            return False
        name = (offer.task_id, *offer.token)
        stops = self._journal.read_stops()
        return all((one.task_id, one.generation, one.attempt) != name for one in stops)

    def _note_start(self, current: _Current) -> TaskError | None:
        """Write down that an attempt starts; one that no agent could ever find does not.

        Returns:
            Why it could not be written, or ``None``.
        """
        offer, token = current.offer, Token(*current.offer.token)
        note = Note(
            pid=os.getpid(),
            born=self._born,
            task_id=offer.task_id,
            generation=token.generation,
            attempt=token.attempt,
            started_at=current.started_at,
            started_boot=current.started_boot,
            deadline_boot=current.started_boot + offer.timeout_s,
        )
        started = Report(ReportKind.STARTED, offer.task_id, token, current.started_at)
        try:
            failpoints.hit("runner.start.before")
            self._noted = True
            self._journal.write_note(note)
            self._journal.append((started,))
            failpoints.hit("runner.start.journaled")
        except OSError as error:
            self._say_disk_failed(error)
            self._note_idle()
            self.must_end = True
            text = f"{self._settings.worker} cannot write to its disk ({error.strerror or error})"
            return TaskError(kind=FailureKind.ERROR, type=DISK_FAILED, message=text)
        self._shared.unconfirmed.append(started)
        self._wake_side()
        return None

    def _run_one(self, offer: Offer) -> None:
        current = self._shared.current
        assert current is not None
        token = Token(*offer.token)
        if self._output is not None:
            self._output.begin(offer.task_id, token)
        span = self._begin_span(offer, token, current)
        traceparent = offer.traceparent if span is None else span.traceparent
        try:
            with lines_about(names_of(offer.task_id, token.attempt, traceparent)):
                outcome = self._handle(offer, token, current, traceparent)
        except (TaskCancelled, TaskTimedOut) as stopped:
            # Interrupted outside the handler's own frames: just before it, or just after.
            outcome = _interrupted(stopped)
        except BaseException as error:
            log.exception("the runner failed around a handler", extra={"action": "runner.error"})
            text = f"{type(error).__name__}: {error}"
            failure = TaskError(kind=FailureKind.ERROR, message=text[:500])
            outcome = HandlerOutcome(outcome=Outcome.ERRORED, error=failure)
        current.interruptible = False
        if self._output is not None:
            self._output.end()
        failpoints.hit("runner.handler.ended")
        if outcome.outcome is Outcome.TIMED_OUT:
            self.must_end = True  # Nobody knows what the handler left half done.
        ended = self._clock.now()
        duration_ms = (self._clock.elapsed() - current.started_boot) * 1000.0
        if span is not None:
            self._end_span(span, outcome, current, ended)
        with self._shared.lock:
            self._shared.current = None
            held_back = self._shared.progress.pop((offer.task_id, token), None)
            if held_back is not None:
                self._add(held_back)
            report = _report_of(offer, token, outcome, current, ended, duration_ms)
            if report.kind in _TELLS_OF_ITS_START and not self._shared.sending:
                self._unsay_start(offer)
            self._add(report)
            failpoints.hit("runner.outcome.journaled")
            more = bool(self._shared.waiting)
        if not more or self.must_end:
            self._note_idle()  # Else the next one's note takes its place at once.

    def _begin_span(self, offer: Offer, token: Token, current: _Current) -> AttemptSpan | None:
        if self._traces is None or offer.traceparent is None:
            return None
        try:
            return self._traces.attempt(
                offer.task_id,
                offer.task_type,
                token,
                offer.traceparent,
                self._settings.worker,
                current.started_at,
            )
        except Exception:  # No task fails for its span's sake.
            log.exception("an attempt has no span", extra={"action": "traces.failed"})
            return None

    def _end_span(
        self, span: AttemptSpan, outcome: HandlerOutcome, current: _Current, ended: float
    ) -> None:
        error = outcome.error
        error_type = "" if error is None else error.type or error.kind.value
        named = outcome.outcome
        if named is Outcome.CANCELLED and current.stopping not in (None, "cancel"):
            named = Outcome.LOST  # Its worker stopped it, whatever the handler made of that.
        try:
            span.end(named.value, error_type, ended)
        except Exception:
            log.exception("an attempt has no span", extra={"action": "traces.failed"})
        self._spans = self._spans or span.recorded
        if self._spans and self._settings.spans_first:
            self._write_spans()

    def _write_spans(self) -> None:
        self._spans = False
        if self._traces is not None:
            self._traces.close()

    def _handle(
        self, offer: Offer, token: Token, current: _Current, traceparent: str | None
    ) -> HandlerOutcome:
        settings = self._settings
        ctx = TaskContext(
            task_id=offer.task_id,
            task_type=offer.task_type,
            token=token,
            worker=settings.worker,
            node_id=settings.node_id,
            effects=_Effects(self, current, token),
            disk_path=settings.disk_path,
            scratch_root=settings.scratch_root,
            last_checkpoint=offer.checkpoint,
            deadline=current.started_boot + offer.timeout_s,
            clock=self._clock.elapsed,
            traceparent=traceparent,
        )
        task_type = self._registry.get(offer.task_type)
        try:
            failpoints.hit("runner.handler.before")
            current.interruptible = True
            current.raise_if_stopping()
            outcome = run_handler(
                task_type, offer.payload, ctx, result_bytes_max=settings.result_bytes_max
            )
            current.interruptible = False
        except ResultTooLarge as large:
            current.interruptible = False
            return self._offload(large, (offer.task_id, token))
        if current.stopping is not None and outcome.outcome is not Outcome.COMPLETED:
            # Whatever the handler made of the interruption, the order is why it ended.
            timed_out = current.stopping == "timeout"
            return _interrupted(TaskTimedOut() if timed_out else TaskCancelled())
        return outcome

    def _offload(self, large: ResultTooLarge, attempt: AttemptKey) -> HandlerOutcome:
        """Keep a result that is too large to travel with its task as an artifact.

        Where that cannot be done (a full disk, here or at M1) the attempt fails and says so: a
        later one may find room.
        """
        assert large.result is not None
        scratch = self._settings.scratch_root
        try:
            with tempfile.NamedTemporaryFile(dir=scratch, suffix=".json") as out:
                out.write(large.result)
                out.flush()
                sha256, size = self._artifacts.put(Path(out.name), attempt)
        except (OSError, HcnaError) as error:
            failure = TaskError(
                kind=FailureKind.ERROR,
                type=type(error).__name__,
                message=f"its result of {large.size} bytes could not be kept: {error}"[:500],
            )
            return HandlerOutcome(outcome=Outcome.ERRORED, error=failure)
        reference = {"artifact": {"sha256": sha256, "size": size, "media_type": "application/json"}}
        return HandlerOutcome(outcome=Outcome.COMPLETED, result=msgspec.json.encode(reference))

    def _on_sigterm(self, _signum: int, _frame: object) -> None:
        """Stop the attempt the agent's order names; a signal that comes too late does nothing.

        Whatever happens to the attempt, this process starts nothing after it: a process that was
        interrupted at an unknown point does not serve others.
        """
        current = self._shared.current
        for order in self._journal.read_stops():
            if current is None or order.task_id != current.offer.task_id:
                continue
            if order.reason == UNSTARTED:
                continue  # It has begun, so that order is void.
            if (order.generation, order.attempt) != tuple(current.offer.token):
                continue
            self.must_end = True
            current.stopping = current.stopping or order.reason
            if current.interruptible and not current.struck:
                current.struck = True
                current.raise_if_stopping()

    # -- both threads, lock held ------------------------------------------------------------------

    def _unsay_start(self, offer: Offer) -> None:
        """Send no word of a start that the end tells of too; the journal keeps it."""
        name = (ReportKind.STARTED, offer.task_id, Token(*offer.token))
        unconfirmed = self._shared.unconfirmed
        for index in range(len(unconfirmed) - 1, -1, -1):
            if unconfirmed[index][:3] == name:
                del unconfirmed[index]
                return

    def _wake_side(self) -> None:
        """Have the side thread see the first of some reports; it comes back for the rest itself."""
        if len(self._shared.unconfirmed) == 1:
            self._shared.lock.notify_all()

    def _add(self, report: Report) -> None:
        # Progress is not worth keeping, and a long attempt's would fill the disk. Of the rest, what
        # the disk does not take still goes out from memory.
        if report.kind != ReportKind.PROGRESS:
            try:
                self._journal.append((report,))
            except OSError as error:
                self._say_disk_failed(error)
        self._shared.unconfirmed.append(report)
        self._wake_side()

    def _give_back(self, offers: list[Offer], why: str, error: TaskError | None = None) -> None:
        now = self._clock.now()
        for offer in offers:
            token = Token(*offer.token)
            self._add(Report(ReportKind.RETURNED, offer.task_id, token, now, error=error))
        if offers:
            log.info(
                "gave back %d attempts",
                len(offers),
                extra={"action": "slot.returned", "reason": why},
            )

    def _forget(self, reports: tuple[Report, ...]) -> None:
        sent = {id(report) for report in reports}
        self._shared.unconfirmed = [one for one in self._shared.unconfirmed if id(one) not in sent]

    def _note_idle(self) -> None:
        if not self._noted:
            return
        try:
            self._journal.write_note(Note(pid=os.getpid(), born=self._born))
            self._noted = False
        except OSError as error:
            self._say_disk_failed(error)

    def _say_disk_failed(self, error: OSError) -> None:
        log.error(
            "the outbox cannot be written",
            extra={"action": "runner.outbox_failed", "error": str(error)},
        )

    # -- side thread -----------------------------------------------------------------------------

    def _side_loop(self) -> None:
        progress_sent = 0.0
        while True:
            with self._shared.lock:
                if (
                    not self._shared.unconfirmed or self._shared.exchanging
                ) and not self._shared.closed:
                    self._shared.lock.wait(self._until_next())
                if self._shared.closed and not self._shared.unconfirmed:
                    return
                elapsed = self._clock.elapsed()
                self._give_back_behind_long(elapsed)
                if self._shared.progress and elapsed - progress_sent >= PROGRESS_S:
                    progress_sent = elapsed
                    for report in self._shared.progress.values():
                        self._add(report)
                    self._shared.progress.clear()
                if not self._shared.unconfirmed or self._shared.exchanging:
                    continue
                # Reports that follow within a moment travel together.
                self._shared.lock.wait_for(lambda: self._shared.exchanging, self._settings.report_s)
                if self._shared.exchanging or not self._shared.unconfirmed:
                    continue  # They went with an exchange.
                batch = tuple(self._shared.unconfirmed)
                self._shared.sending = True
            failpoints.hit("runner.report.before")
            confirmed = self._link.report(batch)
            failpoints.hit("runner.report.answered")
            with self._shared.lock:
                self._shared.sending = False
                if confirmed:
                    self._forget(batch)
                closed = self._shared.closed
                self._shared.lock.notify_all()
                if not confirmed and not closed:
                    self._shared.lock.wait(WATCH_S)
            if closed and not confirmed:
                return  # The journal keeps them for the agent.

    def _until_next(self) -> float | None:
        """Return how long to wait for news: at most until the current attempt turns long.

        Without anything that time alone brings about, for ever: whoever has news says so.
        """
        current = self._shared.current
        if current is None or not self._shared.waiting:
            return WATCH_S if self._shared.progress else None
        left = current.started_boot + self._settings.long_s - self._clock.elapsed()
        return min(WATCH_S, max(left, 0.001))

    def _give_back_behind_long(self, elapsed: float) -> None:
        current = self._shared.current
        if current is None or not self._shared.waiting:
            return
        if elapsed - current.started_boot >= self._settings.long_s:
            self._give_back(list(self._shared.waiting), "behind a long attempt")
            self._shared.waiting.clear()

    # -- for handlers ----------------------------------------------------------------------------

    def note_progress(self, offer: Offer, token: Token, progress: Progress) -> None:
        """Keep the newest progress; the side thread sends it."""
        report = Report(ReportKind.PROGRESS, offer.task_id, token, progress.at, progress=progress)
        with self._shared.lock:
            if not self._shared.progress:
                self._shared.lock.notify_all()
            self._shared.progress[offer.task_id, token] = report

    def save_checkpoint(self, offer: Offer, token: Token, data: bytes) -> None:
        """Hand a checkpoint to the moderator and wait until it is durable.

        Raises:
            TaskCancelled: the attempt was told to stop meanwhile.
            TimeoutError: the moderator did not confirm it in time.
        """
        report = Report(
            ReportKind.PROGRESS, offer.task_id, token, self._clock.now(), checkpoint=data
        )
        end = self._clock.elapsed() + CHECKPOINT_WAIT_S
        with self._shared.lock:
            self._add(report)
            while any(one is report for one in self._shared.unconfirmed):
                left = end - self._clock.elapsed()
                if self.is_stopping(token):
                    raise TaskCancelled
                if left <= 0:
                    raise TimeoutError("the moderator did not confirm the checkpoint")
                self._shared.lock.wait(min(left, WATCH_S))

    def is_stopping(self, token: Token) -> bool:
        """Return whether the attempt with this token has been told to stop."""
        current = self._shared.current
        if current is None or current.offer.token != token or current.stopping is not None:
            return True
        for order in self._journal.read_stops():
            named = (order.task_id, order.generation, order.attempt)
            if named == (current.offer.task_id, *token) and order.reason != UNSTARTED:
                # The file is here before the signal: a handler that asks must not seem to have
                # stopped without a reason.
                current.stopping = order.reason
                return True
        return False

    @property
    def artifacts(self) -> ArtifactLink:
        """The artifact store, for the handlers' context."""
        return self._artifacts

    @property
    def now(self) -> Callable[[], float]:
        """The wall clock."""
        return self._clock.now


class _Effects:
    """What a handler's context does to the world (`hcna_ray.handlers.context.ContextEffects`).

    While an effect is under way no signal raises: it could strike while a lock is being taken. An
    order that came meanwhile is obeyed as soon as the effect is done.
    """

    def __init__(self, runner: Runner, current: _Current, token: Token) -> None:
        self._runner, self._current, self._token = runner, current, token
        self._attempt: AttemptKey = (current.offer.task_id, token)

    @contextlib.contextmanager
    def _shielded(self) -> Iterator[None]:
        # Handlers may start threads of their own; a signal only ever strikes the main one.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._current.interruptible = False
        try:
            yield
        finally:
            self._current.interruptible = True
        self._current.raise_if_stopping()

    def send_progress(self, percent: float | None, message: str) -> None:
        progress = Progress(at=self._runner.now(), percent=percent, message=message)
        with self._shielded():
            self._runner.note_progress(self._current.offer, self._token, progress)

    def save_checkpoint(self, data: bytes) -> None:
        with self._shielded():
            self._runner.save_checkpoint(self._current.offer, self._token, data)

    def put_artifact(self, path: Path, name: str | None) -> ArtifactRef:
        with self._shielded():
            sha256, size = self._runner.artifacts.put(path, self._attempt)
        return ArtifactRef(sha256=sha256, size=size, name=name)

    def get_artifact(self, sha256: str) -> Path:
        with self._shielded():
            return self._runner.artifacts.get(sha256, self._attempt)

    def is_cancelled(self) -> bool:
        return self._runner.is_stopping(self._token)


def _interrupted(error: TaskCancelled | TaskTimedOut) -> HandlerOutcome:
    if isinstance(error, TaskCancelled):
        return HandlerOutcome(outcome=Outcome.CANCELLED)
    failure = TaskError(kind=FailureKind.TIMEOUT, type="TaskTimedOut", message=str(error))
    return HandlerOutcome(outcome=Outcome.TIMED_OUT, error=failure)


def _report_of(
    offer: Offer,
    token: Token,
    outcome: HandlerOutcome,
    current: _Current,
    ended_at: float,
    duration_ms: float,
) -> Report:
    kind = {
        Outcome.COMPLETED: ReportKind.COMPLETED,
        Outcome.CANCELLED: ReportKind.CANCELLED,
    }.get(outcome.outcome, ReportKind.FAILED)
    error = outcome.error
    if kind == ReportKind.CANCELLED and current.stopping != "cancel":
        if current.stopping is None:
            kind = ReportKind.FAILED
            text = "the handler raised TaskCancelled although nobody cancelled the task"
            error = TaskError(kind=FailureKind.ERROR, type="TaskCancelled", message=text)
        else:
            kind = ReportKind.LOST
            text = f"stopped by its worker ({current.stopping})"
            type_ = DRAINED if current.stopping == "drain" else None
            error = TaskError(kind=FailureKind.LOST, type=type_, message=text)
    return Report(
        kind,
        offer.task_id,
        token,
        ended_at,
        started_at=current.started_at,
        result=outcome.result,
        error=error,
        duration_ms=duration_ms,
    )

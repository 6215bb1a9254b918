"""A slot from inside: exchanges with the moderator, and executors that do the work. No Ray here.

The host gives the moderator outcomes and gets leases in one call that parks while there is nothing
to do. One executor at a time takes grants; when what it runs turns out to be long, it keeps that
and the next executor, already forked, takes the following grant. So a long attempt never holds up
a short one, and a cancel or a crash ends one executor and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from hcna_ray import failpoints
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import CannotAccept, HcnaError, NotFound, StaleWorker
from hcna_ray.core.models import FailureKind, TaskError, Token
from hcna_ray.observability.log_context import names_of
from hcna_ray.runtime import channel
from hcna_ray.runtime.channel import AsyncChannel, ChannelClosed, Frame
from hcna_ray.runtime.journal import (
    FINAL,
    GenerationMark,
    Note,
    RunnerFiles,
    StopOrder,
    read_journal,
    read_note,
    read_stops,
    unfinished,
    write_stops,
)
from hcna_ray.runtime.messages import (
    DISK_FAILED,
    DRAINED,
    NOT_STARTED,
    STUCK,
    UNSTARTED,
    AttemptKey,
    Exchange,
    Grant,
    Offer,
    Report,
    ReportKind,
    Stop,
)
from hcna_ray.runtime.runner import ArtifactLink

log = logging.getLogger(__name__)

#: Pause after a grant of a store that a restore has replaced.
STALE_S = 5.0
#: How often the host looks at notes, deadlines and its own stop orders.
WATCH_S = 0.05
#: The same while no executor holds anything.
IDLE_WATCH_S = 5.0
#: Time between SIGTERM and SIGKILL.
KILL_GRACE_S = 10.0
#: A worker that fenced itself off gives less: the moderator is about to lease again.
FENCE_GRACE_S = 5.0
#: Pause before a call that failed is repeated.
RETRY_S = 0.1
#: How much longer than it may park an exchange takes at most. What an answer grants that took yet
#: longer may have been given to others: this process stood still, or the answer lay somewhere.
LATE_S = 5.0
#: Pause of a slot whose outbox takes nothing, doubled up to the maximum until it does.
DISK_PAUSE_S = 0.5
DISK_PAUSE_MAX_S = 30.0
#: Written to see whether the outbox takes anything: more than fits beside a file's name.
PROBE = bytes(8192)
#: What an executor is told that asks for a file for an attempt that it does not hold.
NOT_RUNNING = "files are for attempts that run: this one has ended"
#: Idle executors kept, beside the one that takes grants.
SPARES = 1
#: Pause before an executor is forked after one that died before its first word.
REFORK_S = 0.5
#: Longest wait for the nursery's word on an executor whose channel is closed.
EXIT_WAIT_S = 1.0
#: An idle executor beyond the spares ends after this long.
SPARE_IDLE_S = 30.0
#: An executor that is warm begins within milliseconds; one that has not after this many looks never
#: will. Looks, not seconds: none is made while the machine sleeps or stands still.
START_LOOKS = 200
#: Looks at an attempt that must not begin any more before it is given back in the executor's stead.
WITHDRAW_LOOKS = 4


class SlotLink(Protocol):
    """The host's calls to the moderator; they raise `CannotAccept` while it is away."""

    async def exchange(self, exchange: Exchange) -> Grant:
        """Give outcomes, get leases; parks."""
        ...

    async def report(self, reports: tuple[Report, ...]) -> bool:
        """Send reports between two exchanges; return whether they were confirmed."""
        ...


class Nursery(Protocol):
    """Where executors come from."""

    async def fork(self, name: str) -> tuple[int, AsyncChannel]:
        """Make an executor; return its process id and the channel to it."""
        ...

    def on_exit(self, told: Callable[[int, int], None]) -> None:
        """Have ``told(pid, wait status)`` called whenever an executor has ended."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSettings:
    """What a host needs to know."""

    worker: str
    incarnation: str
    slot: int
    name: str
    outbox: Path
    #: Most attempts that may run under this host at once.
    attempts_max: int = 16
    #: An attempt older than this no longer keeps the slot from its next grant.
    long_s: float = 0.05
    #: How long the moderator parks an exchange.
    exchange_wait_s: float = 20.0


@dataclass(slots=True, eq=False)
class _Executor:
    """One process, and what it holds."""

    name: str
    pid: int
    channel: AsyncChannel
    files: RunnerFiles
    #: Granted to it, until the moderator has confirmed how it ended.
    holds: dict[AttemptKey, Offer] = field(default_factory=dict)
    #: Outcomes that came with its last word and are not confirmed yet.
    reports: tuple[Report, ...] = ()
    #: Whether it has ever said a word.
    ready: bool = False
    dead: bool = False
    idle_since: float = 0.0
    #: Set when it is idle again, turned long, or died.
    turned: asyncio.Event = field(default_factory=asyncio.Event)
    orders: dict[AttemptKey, tuple[StopOrder, float]] = field(default_factory=dict)
    #: Must not begin any more, and how many looks it has been watched for since that was written
    #: down; -1 once it was given back, or turned out to have begun.
    withdrawn: dict[AttemptKey, int] = field(default_factory=dict)
    #: Handed to it, and no word yet of its start or end.
    unbegun: set[AttemptKey] = field(default_factory=set)
    #: Looks in a row at which there was something to begin and no sign of it.
    silent_looks: int = 0
    #: Ended because it had not begun what it was handed.
    stalled: bool = False
    killed: bool = False
    #: Open files of the artifacts it was given: while they are locked, nobody prunes them.
    in_use: list[int] = field(default_factory=list)

    def let_files_go(self) -> None:
        """Its attempt is over: whatever it was given may be pruned."""
        while self.in_use:
            os.close(self.in_use.pop())


class SlotHost:
    """Serves one slot, or one heavy attempt. Owns its executors; they die with it."""

    def __init__(
        self,
        settings: HostSettings,
        link: SlotLink,
        nursery: Nursery,
        artifacts: ArtifactLink,
        clock: Clock,
        *,
        kill: Callable[[int, int], None] | None = None,
    ) -> None:
        """Wire the host; `serve` or `run_once` starts it.

        Args:
            settings: About the slot.
            link: To the moderator.
            nursery: Forks executors.
            artifacts: The artifact store; its calls may block and are made on threads.
            clock: Wall clock and CLOCK_BOOTTIME.
            kill: Sends a signal to a process (group); the default is the real thing.
        """
        self._settings, self._link, self._nursery = settings, link, nursery
        self._artifacts, self._clock = artifacts, clock
        self._kill = kill or signal_group
        self._stop_file = RunnerFiles(settings.outbox, settings.name).stop
        self._mark = GenerationMark(settings.outbox)
        self._executors: dict[int, _Executor] = {}
        #: Dead, but their last words are not confirmed yet.
        self._mourned: list[_Executor] = []
        self._main: asyncio.Task[object] | None = None
        self._idle: deque[_Executor] = deque()
        self._active: _Executor | None = None
        self._news = asyncio.Event()
        self._outgoing: list[tuple[tuple[Report, ...], Callable[[bool], None]]] = []
        self._outgoing_news = asyncio.Event()
        self._sending = False
        #: Set while any executor holds anything, which is when time alone may bring something.
        self._working = asyncio.Event()
        self._forks = 0
        self._forking = 0
        #: How long the slot pauses for its disk's sake, and until when.
        self._disk_pause_s = 0.0
        self._disk_retry_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life ------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Exchange and run until the moderator says that this worker was replaced.

        Raises:
            StaleWorker: another incarnation has taken the worker's name.
        """
        self._begin()
        self._fork_soon()
        seq = 0
        while True:
            executor = await self._next_executor()
            await self._spare_the_disk(executor)
            await self._wait_for_contact(executor)
            seq += 1
            grant = await self._exchange(seq, executor)
            for stop in grant.stops:
                self._stop(stop)
            self._active = executor
            received = self._clock.elapsed()
            self._hand_over(executor, tuple(offer.received(received) for offer in grant.offers))
            await executor.turned.wait()
            self._active = None

    async def run_once(self, offer: Offer, flush_s: float) -> None:
        """Run one attempt, deliver its outcome if the moderator can be reached in time, and end.

        What could not be delivered stays in the journal, for the worker's agent.
        """
        self._begin()
        self._fork_soon()
        executor = await self._next_executor()
        self._hand_over(executor, (offer,))
        await executor.turned.wait()
        end = self._clock.elapsed() + flush_s
        while self._sending or self._outgoing or executor.holds:
            if self._clock.elapsed() >= end:
                return
            await asyncio.sleep(WATCH_S)

    def _begin(self) -> None:
        self._main = asyncio.current_task()
        self._nursery.on_exit(self._on_exit)
        self.spawn(self._watch_loop())
        self.spawn(self._report_loop())

    def spawn(self, work: Awaitable[None]) -> None:
        """Run something beside the main loop, until the host ends; if it fails, so does all."""
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Half a host would hold leases and run nothing: the agent replaces a dead one.
            log.critical("the slot failed", exc_info=error, extra={"action": "slot.failed"})
            if self._main is not None:
                self._main.cancel()

    async def end(self) -> None:
        """Stop everything that runs beside the main loop."""
        self._nursery.on_exit(lambda _pid, _status: None)  # Nobody mourns any more.
        for executor in self._executors.values():
            self._kill(executor.pid, signal.SIGKILL)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in self._executors.values():
            executor.channel.close()
            executor.let_files_go()

    # -- a full disk -----------------------------------------------------------------------------

    def _watch_disk(self, reports: tuple[Report, ...]) -> None:
        """Notice that attempts come back, or start, for the disk's sake."""
        for report in reports:
            if report.kind == ReportKind.STARTED:
                self._disk_pause_s = 0.0
            elif report.error is not None and report.error.type == DISK_FAILED:
                self._pause_for_disk(report.error.message)
                return

    def _pause_for_disk(self, why: str) -> None:
        now = self._clock.elapsed()
        if now < self._disk_retry_at:
            return
        self._disk_pause_s = min(max(2 * self._disk_pause_s, DISK_PAUSE_S), DISK_PAUSE_MAX_S)
        self._disk_retry_at = now + self._disk_pause_s
        log.error(
            "%s: this slot pauses for %.1f s",
            why,
            self._disk_pause_s,
            extra={"action": "slot.disk_full", "pause_s": self._disk_pause_s},
        )

    async def _spare_the_disk(self, executor: _Executor) -> None:
        """Take no grant while no start can be written down: it would come back at once."""
        if self._clock.elapsed() >= self._disk_retry_at:
            return
        self._send_apart(executor)
        while (wait := self._disk_retry_at - self._clock.elapsed()) > 0:
            await asyncio.sleep(wait)
            try:
                probe = self._stop_file.with_suffix(".probe")
                probe.write_bytes(PROBE)
                probe.unlink()
            except OSError as error:
                self._pause_for_disk(f"the outbox cannot be written ({error.strerror or error})")

    # -- a silent moderator ----------------------------------------------------------------------

    async def _wait_for_contact(self, executor: _Executor) -> None:
        """Ask for nothing while the worker is fenced off: nothing of a grant could begin."""
        if not self._is_fenced():
            return
        self._send_apart(executor)
        while self._is_fenced():  # noqa: ASYNC110 - a file sets no events
            await asyncio.sleep(RETRY_S)

    def _is_fenced(self) -> bool:
        return any(one.names_all for one in read_stops(self._stop_file))

    def _send_apart(self, executor: _Executor) -> None:
        """Send what would have gone with the next exchange without it."""
        if executor.reports:
            reports, executor.reports = executor.reports, ()
            self._send_surely(reports, lambda: self._note_ends(executor, reports))

    # -- executors -------------------------------------------------------------------------------

    async def _next_executor(self) -> _Executor:
        """Return an idle executor; wait while there is none.

        One whose outcomes have not left yet goes first: they travel with the exchange. Else the one
        used last.
        """
        while True:
            self._idle = deque(one for one in self._idle if not one.dead)
            if self._idle:
                last = self._idle[-1]
                executor = next((one for one in self._idle if one.reports), last)
                self._idle.remove(executor)
                return executor
            self._fork_if_needed()
            self._news.clear()
            await self._news.wait()

    def _fork_if_needed(self) -> None:
        """Have a warm spare behind whatever takes grants, within the bound."""
        alive = len(self._executors) + self._forking
        ready = sum(1 for one in self._executors.values() if not one.holds and not one.dead)
        while ready + self._forking < 1 + SPARES and alive < self._settings.attempts_max:
            self._fork_soon()
            alive += 1

    def _fork_soon(self) -> None:
        self._forking += 1
        self.spawn(self._fork())

    async def _fork(self) -> None:
        self._forks += 1
        name = f"{self._settings.name}.{self._forks}"
        try:
            pid, stream = await self._nursery.fork(name)
        except OSError as error:
            log.error(
                "no executor could be started",
                extra={"action": "slot.fork_failed", "error": str(error)},
            )
            await asyncio.sleep(1.0)
            self._news.set()
            return
        finally:
            self._forking -= 1
        files = RunnerFiles(self._settings.outbox, name)
        executor = _Executor(name, pid, stream, files)
        failpoints.hit("slot.executor.forked")
        self._executors[pid] = executor
        self.spawn(self._listen(executor))

    async def _listen(self, executor: _Executor) -> None:
        try:
            while True:
                frame = await executor.channel.receive()
                _note_beginnings(executor, frame.reports)
                match frame.kind:
                    case channel.IDLE:
                        self._on_idle(executor, frame.reports)
                    case channel.REPORTS:
                        self._on_reports(executor, frame.reports)
                    case channel.PUT | channel.GET:
                        self.spawn(self._serve_file(executor, frame))
                    case _:
                        log.error(
                            "an executor broke the protocol",
                            extra={"action": "slot.bad_frame", "kind": frame.kind},
                        )
        except ChannelClosed:
            # Its end is told by the nursery, with the reason; unless that died too, or told it
            # before we knew the process, or the process lives on without its channel.
            await asyncio.sleep(EXIT_WAIT_S)
            if not executor.dead:
                self._kill(executor.pid, signal.SIGKILL)
                self._on_exit(executor.pid, signal.SIGKILL)

    def _on_idle(self, executor: _Executor, reports: tuple[Report, ...]) -> None:
        executor.idle_since = self._clock.elapsed()
        executor.ready = True
        executor.let_files_go()
        self._watch_disk(reports)
        if executor is self._active or not reports:
            executor.reports = reports  # They travel with the next exchange.
            self._idle.append(executor)
        else:
            # It had been busy for long: what it brings does not wait for its turn.
            def settled() -> None:
                self._note_ends(executor, reports)
                self._idle.append(executor)
                self._news.set()

            self._send_surely(reports, settled)
        executor.turned.set()
        self._news.set()

    def _on_reports(self, executor: _Executor, reports: tuple[Report, ...]) -> None:
        self._watch_disk(reports)

        def confirmed(arrived: bool) -> None:
            if arrived:
                self._note_ends(executor, reports)
            executor.channel.send(Frame(channel.ACK, number=int(arrived)))

        self._send(reports, confirmed)

    def _note_ends(self, executor: _Executor, reports: tuple[Report, ...]) -> None:
        """Forget what is over, once the moderator knows.

        Forgotten any earlier, an exchange that overtakes the report would not name the attempt, and
        the moderator would count it as lost.
        """
        for report in reports:
            if report.kind in FINAL:
                executor.holds.pop((report.task_id, Token(*report.token)), None)

    async def _serve_file(self, executor: _Executor, question: Frame) -> None:
        try:
            attempt = question.attempt
            if attempt is None or attempt not in executor.holds:
                raise HcnaError(NOT_RUNNING)
            if question.kind == channel.PUT:
                path = Path(question.text)
                sha256, size = await asyncio.to_thread(self._artifacts.put, path, attempt)
                answer = Frame(channel.FILE, text=sha256, number=size)
            else:
                found, lock = await asyncio.to_thread(self._get_locked, question.text, attempt)
                executor.in_use.append(lock)
                if executor.dead:
                    executor.let_files_go()
                answer = Frame(channel.FILE, text=str(found))
        except NotFound as error:
            asked = question.kind == channel.GET
            answer = Frame(channel.FILE) if asked else Frame(channel.FILE, (), (), str(error), -1)
        except Exception as error:
            # Whatever it was: the handler waits for an answer.
            answer = Frame(channel.FILE, text=str(error) or type(error).__name__, number=-1)
        executor.channel.send(answer)

    def _get_locked(self, sha256: str, attempt: AttemptKey) -> tuple[Path, int]:
        """Return an artifact's file, and a descriptor that keeps it from being pruned."""
        for again in (True, True, False):
            found = self._artifacts.get(sha256, attempt)
            try:
                lock = os.open(found, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if again:  # Pruned in between: get it anew.
                    continue
                raise
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:
                return found, lock
            os.close(lock)
        raise FileNotFoundError(f"artifact {sha256} is pruned faster than it is read")

    def _on_exit(self, pid: int, status: int) -> None:
        """An executor ended: its journal says what had started and what had ended."""
        executor = self._executors.pop(pid, None)
        if executor is None:
            return
        executor.dead = True
        executor.channel.close()
        executor.let_files_go()
        self._kill(-pid, signal.SIGKILL)  # Whatever the handler left running.
        how = describe_exit(status)
        if executor.holds and not executor.killed and not executor.orders:
            log.warning(
                "a handler's process died",
                extra={
                    "action": "executor.died",
                    "how": how,
                    "executor": executor.name,
                    **_names_of_running(executor),
                },
            )
        oom = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and _low_memory()
        kind = FailureKind.OOM if oom else FailureKind.POISON
        orders = {key: order for key, (order, _) in executor.orders.items()}
        reports = last_words(executor.files, orders, self._clock.now(), kind, how)
        failpoints.hit("slot.executor.mourned")
        told = {
            (report.task_id, Token(*report.token)) for report in reports if report.kind in FINAL
        }
        error = _not_started("its executor took it and did not begin") if executor.stalled else None
        reports += [
            Report(ReportKind.RETURNED, task_id, token, self._clock.now(), error=error)
            for task_id, token in executor.holds
            if (task_id, token) not in told
        ]

        def settled() -> None:
            failpoints.hit("slot.mourning.confirmed")
            self._mourned.remove(executor)
            executor.holds.clear()
            executor.files.remove()

        if reports:
            self._mourned.append(executor)
            self._send_surely(tuple(reports), settled)
        else:
            executor.files.remove()
        executor.turned.set()
        self._news.set()
        if executor.ready:
            self._fork_if_needed()
        else:
            self.spawn(self._fork_later())

    async def _fork_later(self) -> None:
        """Try again after a pause: what ends the executors before they begin may go on."""
        log.error("an executor died before it began", extra={"action": "executor.stillborn"})
        self._forking += 1
        try:
            await asyncio.sleep(REFORK_S)
        finally:
            self._forking -= 1
        self._fork_if_needed()

    # -- the moderator ---------------------------------------------------------------------------

    async def _exchange(self, seq: int, executor: _Executor) -> Grant:
        """Exchange until it is answered; the same number gets the same grant."""
        while True:
            exchange = Exchange(
                worker=self._settings.worker,
                incarnation=self._settings.incarnation,
                slot=self._settings.slot,
                seq=seq,
                reports=executor.reports,
                holding=tuple(
                    key
                    for other in (*self._executors.values(), *self._mourned)
                    for key in other.holds
                ),
            )
            try:
                failpoints.hit("slot.exchange.before")
                asked = self._clock.elapsed()
                grant = await self._link.exchange(exchange)
                failpoints.hit("slot.exchange.answered")
            except CannotAccept:
                await asyncio.sleep(RETRY_S)
                continue
            except StaleWorker as stale:
                if stale.current is not None:
                    raise
                # The worker was given up for a while; its agent says hello again.
                await asyncio.sleep(RETRY_S)
                continue
            if grant.hello:
                await asyncio.sleep(RETRY_S)
                continue
            self._note_ends(executor, executor.reports)
            executor.reports = ()
            return await self._without_stale(self._without_late(grant, asked))

    def _without_late(self, grant: Grant, asked: float) -> Grant:
        """Give back what was granted so long ago that others may have it by now."""
        took_s = self._clock.elapsed() - asked
        if not grant.offers or took_s <= self._settings.exchange_wait_s + LATE_S:
            return grant
        log.error(
            "a grant took %.0f s to arrive and goes back",
            took_s,
            extra={"action": "slot.late_grant", "took_s": round(took_s, 1)},
        )
        self._give_back(grant.offers)
        return dataclasses.replace(grant, offers=())

    async def _without_stale(self, grant: Grant) -> Grant:
        """Leave out offers of a store that was replaced; not being held, they go back."""
        if not grant.offers:
            return grant
        seen = self._mark.read()
        kept = tuple(one for one in grant.offers if Token(*one.token).generation >= seen)
        if len(kept) < len(grant.offers):
            log.error(
                "a grant of an older generation is refused",
                extra={"action": "slot.stale_grant", "seen": seen},
            )
            await asyncio.sleep(STALE_S)
            grant = dataclasses.replace(grant, offers=kept)
        return grant

    def _hand_over(self, executor: _Executor, offers: tuple[Offer, ...]) -> None:
        """Give an executor its grant (an empty one confirms what it reported)."""
        if executor.dead:  # It died while its call was parked.
            self._give_back(offers)
            return
        executor.turned.clear()
        for offer in offers:
            executor.holds[offer.task_id, Token(*offer.token)] = offer
        self._working.set()
        executor.unbegun = {(offer.task_id, Token(*offer.token)) for offer in offers}
        executor.silent_looks = 0
        self._obey_agent()  # An order may have come before the attempt did.
        executor.channel.send(Frame(channel.RUN, offers=offers))
        failpoints.hit("slot.grant.handed_over")
        self._fork_if_needed()

    def _give_back(self, offers: tuple[Offer, ...]) -> None:
        """Return what no executor was handed."""
        now = self._clock.now()
        back = tuple(
            Report(ReportKind.RETURNED, offer.task_id, Token(*offer.token), now) for offer in offers
        )
        if back:
            self._send_surely(back, lambda: None)

    def _send(self, reports: tuple[Report, ...], confirmed: Callable[[bool], None]) -> None:
        self._outgoing.append((reports, confirmed))
        self._outgoing_news.set()

    def _send_surely(self, reports: tuple[Report, ...], settled: Callable[[], None]) -> None:
        """Send until the moderator has it; then ``settled`` is called, once."""

        def confirmed(arrived: bool) -> None:
            if arrived:
                settled()
            else:
                self._send(reports, confirmed)

        self._send(reports, confirmed)

    async def _report_loop(self) -> None:
        """Pass reports on, everything that waits in one call."""
        while True:
            await self._outgoing_news.wait()
            self._outgoing_news.clear()
            batch, self._outgoing = self._outgoing, []
            if not batch:
                continue
            reports = tuple(report for one, _ in batch for report in one)
            self._sending = True
            failpoints.hit("slot.report.before")
            arrived = await self._link.report(reports)
            failpoints.hit("slot.report.answered")
            self._sending = False
            if not arrived:
                await asyncio.sleep(RETRY_S)
            for _, confirmed in batch:
                confirmed(arrived)

    # -- stops and deadlines ---------------------------------------------------------------------

    def _stop(self, stop: Stop) -> None:
        key = (stop.task_id, Token(*stop.token))
        for executor in self._executors.values():
            if key in executor.holds:
                self._obey(executor, key, stop.reason)

    def _obey(self, executor: _Executor, key: AttemptKey, reason: str) -> None:
        if reason == UNSTARTED:
            self._withdraw(executor, key)
        elif reason != STUCK:  # That is for the agent.
            self._order(executor, key, reason)

    def _withdraw(self, executor: _Executor, key: AttemptKey) -> None:
        """Have an attempt not begin any more. No signal: the executor looks before each start."""
        if key in executor.withdrawn:
            return
        executor.withdrawn = {
            known: looks for known, looks in executor.withdrawn.items() if known in executor.holds
        }
        executor.withdrawn[key] = 0
        try:
            self._write_orders(executor)
        except OSError as error:
            del executor.withdrawn[key]  # It might begin after all: nothing can be said of it.
            log.error(
                "a stop order cannot be written",
                extra={"action": "slot.order_failed", "error": str(error)},
            )

    def _answer_for_withdrawn(self, executor: _Executor, note: Note | None) -> None:
        """Give back what did not begin after it was written down that it must not."""
        for key, looks in list(executor.withdrawn.items()):
            if looks < 0:
                continue
            if key not in executor.holds or (note is not None and note.names(key)):
                executor.withdrawn[key] = -1  # It began before, or has come back.
            elif looks < WITHDRAW_LOOKS:
                executor.withdrawn[key] = looks + 1
            else:
                executor.withdrawn[key] = -1
                why = _not_started("its slot did not come to it")
                report = Report(ReportKind.RETURNED, *key, self._clock.now(), error=why)
                self._send_surely((report,), partial(self._note_ends, executor, (report,)))

    def _write_orders(self, executor: _Executor) -> None:
        orders = [one for one, _ in executor.orders.values()]
        orders += [_order_of(key, UNSTARTED) for key in executor.withdrawn]
        write_stops(executor.files, orders)

    def _order(self, executor: _Executor, key: AttemptKey, reason: str) -> None:
        if key in executor.orders:
            return
        order = _order_of(key, reason)
        executor.orders = {
            known: found for known, found in executor.orders.items() if known in executor.holds
        }
        executor.orders[key] = (order, self._clock.elapsed())
        try:
            self._write_orders(executor)
            failpoints.hit("slot.stop.written")
        except OSError as error:
            # A full disk: the executor will not know what the signal means, SIGKILL follows.
            log.error(
                "a stop order cannot be written",
                extra={"action": "slot.order_failed", "error": str(error)},
            )
        self._kill(executor.pid, signal.SIGTERM)

    async def _watch_loop(self) -> None:
        while True:
            if not any(executor.holds for executor in self._executors.values()):
                self._working.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_WATCH_S):
                        await self._working.wait()
            await asyncio.sleep(WATCH_S)
            self._obey_agent()
            now = self._clock.elapsed()
            for executor in list(self._executors.values()):
                self._watch(executor, now)

    def _watch(self, executor: _Executor, now: float) -> None:
        if not executor.holds:
            spare = executor in self._idle and now - executor.idle_since > SPARE_IDLE_S
            if spare and len(self._idle) > 1 + SPARES and not executor.reports:
                self._idle.remove(executor)
                executor.channel.send(Frame(channel.END))
            return
        note = read_note(executor.files)
        self._answer_for_withdrawn(executor, note)
        self._watch_beginning(executor, note)
        if note is None or not note.task_id:
            return
        if executor is self._active and now - note.started_boot >= self._settings.long_s:
            executor.turned.set()
        if now >= note.deadline_boot and (note.task_id, note.token) in executor.holds:
            self._order(executor, (note.task_id, note.token), "timeout")
        self._enforce(executor, note, now)

    def _watch_beginning(self, executor: _Executor, note: Note | None) -> None:
        """End an executor that took a grant and does not begin: it keeps the slot from the next."""
        executor.unbegun &= executor.holds.keys()
        if not executor.unbegun or (note is not None and note.task_id):
            executor.silent_looks = 0
            return
        executor.silent_looks += 1
        if executor.silent_looks > START_LOOKS and not executor.killed:
            executor.killed = executor.stalled = True
            log.error(
                "an executor took a grant and does not begin: it is ended",
                extra={"action": "executor.stalled", "executor": executor.name},
            )
            self._kill(executor.pid, signal.SIGKILL)

    def _enforce(self, executor: _Executor, note: Note, now: float) -> None:
        """SIGKILL what has not stopped in time."""
        found = executor.orders.get((note.task_id, note.token))
        if found is None or executor.killed:
            return
        order, since = found
        grace = FENCE_GRACE_S if order.reason == "fenced" else KILL_GRACE_S
        if now - since >= grace:
            executor.killed = True
            self._kill(executor.pid, signal.SIGKILL)

    def _obey_agent(self) -> None:
        """Carry out the agent's orders."""
        for order in read_stops(self._stop_file):
            for executor in self._executors.values():
                for key in list(executor.holds):
                    if order.names(key):
                        self._obey(executor, key, order.reason)


def _note_beginnings(executor: _Executor, reports: tuple[Report, ...]) -> None:
    """Learn from an executor's words what it has begun, or is done with."""
    executor.silent_looks = 0
    for report in reports:
        if report.kind == ReportKind.STARTED or report.kind in FINAL:
            executor.unbegun.discard((report.task_id, Token(*report.token)))


def _names_of_running(executor: _Executor) -> dict[str, object]:
    """Return what the log calls the attempt that an executor runs, or was running."""
    note = read_note(executor.files)
    offer = None if note is None else executor.holds.get((note.task_id, note.token))
    if note is None or offer is None:
        return {}
    return names_of(offer.task_id, note.token.attempt, offer.traceparent)


def _order_of(key: AttemptKey, reason: str) -> StopOrder:
    task_id, token = key
    return StopOrder(
        task_id=task_id, generation=token.generation, attempt=token.attempt, reason=reason
    )


def _not_started(why: str) -> TaskError:
    return TaskError(kind=FailureKind.LOST, type=NOT_STARTED, message=why)


def last_words(
    files: RunnerFiles,
    orders: dict[AttemptKey, StopOrder],
    now: float,
    kind: FailureKind,
    how: str,
) -> list[Report]:
    """Return a dead executor's journal, with an end for what it had started.

    Args:
        files: Its journal.
        orders: What it had been told to stop.
        now: The instant.
        kind: What to call an attempt that nobody had stopped.
        how: How the process ended, for people.
    """
    reports = read_journal(files)
    for started in unfinished(reports):
        token = Token(*started.token)
        order = orders.get((started.task_id, token))
        reports.append(_end_of(started, token, now, kind, how, order))
    return reports


def _end_of(
    started: Report,
    token: Token,
    now: float,
    kind: FailureKind,
    how: str,
    order: StopOrder | None,
) -> Report:
    """Return how an attempt ended whose process is gone."""
    # One that had begun is not concerned by an order not to begin.
    reason = None if order is None or order.reason == UNSTARTED else order.reason
    if reason == "cancel":
        return Report(ReportKind.CANCELLED, started.task_id, token, now, started_at=started.at)
    if reason == "timeout":
        text = "ran longer than its timeout_s and was killed"
        error = TaskError(kind=FailureKind.TIMEOUT, type="TaskTimedOut", message=text)
        return Report(
            ReportKind.FAILED, started.task_id, token, now, started_at=started.at, error=error
        )
    type_ = DRAINED if reason == "drain" else None
    if reason is not None:
        kind, how = FailureKind.LOST, f"stopped by its worker ({reason})"
    error = TaskError(kind=kind, type=type_, message=how)
    return Report(ReportKind.LOST, started.task_id, token, now, error=error)


def describe_exit(status: int) -> str:
    """Return a wait status in words."""
    if os.WIFSIGNALED(status):
        return f"its process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"its process ended with status {os.waitstatus_to_exitcode(status)}"


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process (or to a whole group: a negative id); it may be gone already.

    SIGKILL always goes to the whole group that the process leads.
    """
    try:
        if pid < 0:
            os.killpg(-pid, number)
        elif number == signal.SIGKILL and os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _low_memory() -> bool:
    """Return whether the machine is short of memory: then a SIGKILL was probably the kernel's."""
    try:
        with open("/proc/meminfo") as table:
            fields = dict(line.split(":", 1) for line in table)
    except OSError:
        return False
    total, free = (int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return free < total * 0.05

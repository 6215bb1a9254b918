"""The moderator: the single writer of task state. Plain Python; knows nothing of Ray or asyncio.

`Moderator.apply` takes everything that arrived since the last commit, decides, schedules, and
commits all of it in one transaction. Only then does it hand back answers. What it keeps in memory
can be rebuilt from the store at any moment, and is, whenever a commit fails.

The decisions are divided by who asks: clients (`intake`), workers (`workforce`, `reports`), and
what follows from either (`aftermath`). They share a `Turn`, and nothing of it leaves before the
commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hcna_ray import failpoints
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError, Invalid, StoreUnavailable
from hcna_ray.core.events import ClockStepped, TimePassed
from hcna_ray.core.models import WorkerState
from hcna_ray.observability.figures import SIZE_BUCKETS, Histogram
from hcna_ray.runtime.aftermath import Aftermath
from hcna_ray.runtime.clockwatch import ClockWatch
from hcna_ray.runtime.dispatcher import Dispatcher
from hcna_ray.runtime.intake import Intake
from hcna_ray.runtime.ledger import Ledger, QueueLabels
from hcna_ray.runtime.live import LiveTable
from hcna_ray.runtime.messages import (
    Exchange,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    ModeratorFigures,
    ModeratorStatus,
    SlotGone,
    SubmitBatch,
)
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.reports import ReportDesk
from hcna_ray.runtime.requests import (
    Cancel,
    Delivered,
    ForgetWorker,
    MarkSchedule,
    MarkWorker,
    NodesSeen,
    Note,
    PauseQueue,
    Pending,
    PutSchedule,
    Query,
    Reports,
    Request,
    Retry,
    RetryMany,
    RunSchedule,
    SendIntent,
)
from hcna_ray.runtime.schedules import Anybody, Authority, ScheduleDesk
from hcna_ray.runtime.starts import StartWatch
from hcna_ray.runtime.trace_notes import TraceNote, trace_notes
from hcna_ray.runtime.turn import LATER, Turn
from hcna_ray.runtime.workforce import Workforce
from hcna_ray.store.base import Counter, TaskStore

log = logging.getLogger(__name__)

#: Timers carried out in one batch.
TIMERS_MAX = 1000
#: Tasks pruned in one batch, and how often pruning looks.
PRUNE_MAX = 500
PRUNE_PERIOD_S = 30.0
#: Pause between two looks at silent workers, free disk space and parked calls.
HOUSEKEEPING_S = 1.0


@dataclass(frozen=True, slots=True)
class Outbound:
    """What may leave after a commit: answers, ended tasks, and the newest fact's number."""

    answers: tuple[tuple[Pending, object], ...]
    ended: tuple[str, ...] = ()
    last_fact: int = 0
    #: Whether there are new lines in the audit log.
    audited: bool = False
    #: Whether there is something new to tell to webhooks.
    hooked: bool = False
    #: What spans are to be made of.
    notes: tuple[TraceNote, ...] = ()


class Moderator:
    """Single writer of task state. One thread calls it; its invariant is the store."""

    def __init__(
        self,
        store: TaskStore,
        policy: Policy,
        *,
        clock: Clock,
        jitter: Callable[[], float],
        free_bytes: Callable[[], int],
        pid: int = 0,
        store_name: str = "",
        authority: Authority | None = None,
    ) -> None:
        """Rebuild from the store.

        Args:
            store: The durable home; this object becomes its only writer.
            policy: Rules' settings.
            clock: Wall clock and a clock that never steps.
            jitter: Draws from -1 to 1, for backoffs.
            free_bytes: Free space on the store's disk.
            pid: Process id, for `status`.
            store_name: What the store is, for `status`.
            authority: Whether schedules may still submit their tasks; by default they may.
        """
        self._store, self._policy, self._clock = store, policy, clock
        self._free_bytes = free_bytes
        self._pid, self._store_name = pid, store_name
        self._started_at = clock.now()
        self._commits = 0
        self._batch_calls, self._batch_s = Histogram(SIZE_BUCKETS), Histogram()
        self._commit_s = Histogram()
        self._refusals = 0
        self._live = LiveTable()
        self._queue_labels = QueueLabels()
        self._dispatcher = Dispatcher(store, policy, self._live)
        starts = StartWatch(policy.start_s)
        self._workforce = Workforce(
            store,
            policy,
            self._live,
            self._dispatcher,
            ReportDesk(self._dispatcher.observe, jitter, starts),
            starts,
        )
        self._aftermath = Aftermath(store, self._dispatcher, self._workforce.stop)
        self._intake = Intake(store, policy, self._aftermath)
        self._schedules = ScheduleDesk(
            store, policy, self._intake, authority or Anybody(), self._workforce.views, clock
        )
        self._housekept = self._pruned = clock.elapsed()
        self._clocks = ClockWatch(clock.now(), clock.elapsed(), store.clock_hold())
        #: Whether memory has to be read from the store before anything is decided.
        self._stale = True
        self._rebuild()

    # -- the one entry ---------------------------------------------------------------------------

    def apply(self, batch: Sequence[Pending]) -> Outbound:
        """Decide and commit a batch, and return what may now leave.

        An empty batch carries out timers and housekeeping. A store that refuses to commit answers
        every request of the batch with `StoreUnavailable`, and nothing of it happened; so does one
        that cannot even be read, until it can be again. Heartbeats alone are answered all the same,
        as long as `Renewals` says that it is safe.

        Raises:
            OSError: fsync failed. The process must exit: what is on disk is unknown.
        """
        elapsed = self._clock.elapsed()
        self._workforce.take_renewals(elapsed)
        if self._stale:
            trouble = self._try_to_rebuild()
            if trouble is not None:
                return self._refused(batch, trouble)
        turn = Turn(
            Ledger(
                self._store,
                self._live.tasks,
                self._workforce.sessions.node_ids(),
                self._queue_labels,
            ),
            self._clock.now(),
            elapsed,
        )
        try:
            last_fact = self._decide(turn, batch)
        except StoreUnavailable as error:
            log.error("the store refused", extra={"action": "store.refused", "error": str(error)})
            self._try_to_rebuild()
            return self._refused({*batch, *(pending for pending, _ in turn.answers)}, error)
        if batch:
            self._batch_calls.observe(len(batch))
            self._batch_s.observe(self._clock.elapsed() - elapsed)
        self._workforce.warn_if_nobody_works(turn, waiting=self._dispatcher.waiting)
        return Outbound(
            tuple(turn.answers),
            tuple(turn.ended),
            last_fact,
            audited=bool(turn.ledger.audit),
            hooked=bool(turn.ledger.deliveries),
            notes=trace_notes(turn.ledger) if self._policy.traced else (),
        )

    def renew(self, beat: Heartbeat) -> HeartbeatReply | None:
        """Answer a heartbeat from memory, if that is safe. Callable from any thread."""
        return self._workforce.renewals.renew(beat, self._clock.elapsed())

    def _refused(self, batch: Iterable[Pending], trouble: StoreUnavailable) -> Outbound:
        """Refuse a batch, but for heartbeats: they ask nothing of the store."""
        answers: list[tuple[Pending, object]] = []
        refused = set(batch)
        self._refusals += 1
        self._workforce.hang_up(refused)
        for pending in refused:
            request = pending.request
            reply = self.renew(request) if isinstance(request, Heartbeat) else None
            answers.append((pending, reply or trouble))
        return Outbound(tuple(answers))

    def _decide(self, turn: Turn, batch: Sequence[Pending]) -> int:
        """Take the batch through to its commit; return the newest fact's number."""
        self._preload(turn, batch)
        self._follow_clock(turn)
        for pending in batch:
            try:
                answer = self._handle(turn, pending)
            except StoreUnavailable:
                raise  # Half of a request may have been decided: none of the batch counts.
            except HcnaError as error:
                answer = error
            if answer is not LATER:
                turn.answers.append((pending, answer))
        self._run_timers(turn)
        self._workforce.watch_sessions(turn)
        self._keep_house(turn)
        self._schedules.run_due(turn)
        self._aftermath.take_orders(turn)
        self._aftermath.follow_up(turn)
        granted = self._workforce.grant(turn, self._paused)
        self._aftermath.follow_up(turn)
        self._workforce.answer_parked(turn, granted)
        return self._commit(turn)

    def sleep_s(self) -> float:
        """Return how long nothing will happen by itself: 0 when work is left over."""
        if self._stale:
            return HOUSEKEEPING_S
        if self._aftermath.unfinished or self._dispatcher.unfinished:
            return 0.0
        try:
            wakes = [self._store.next_wake(), self._schedules.wake_at()]
        except StoreUnavailable:
            # The next batch says so to whoever waits. What was read before may be of yesterday:
            # only the store that comes back can tell.
            self._stale = True
            return 0.0
        # A lease ends to the moment: its task should not wait for the next look around.
        silence_s = self._workforce.sessions.quiet_s(self._clock.elapsed())
        pause = min(HOUSEKEEPING_S, silence_s + 0.001)
        now = self._clock.now()
        return min([pause, *(max(0.0, wake_at - now) for wake_at in wakes if wake_at is not None)])

    # -- commit and rebuild ----------------------------------------------------------------------

    def _commit(self, turn: Turn) -> int:
        ledger = turn.ledger
        last_fact = 0
        if ledger.dirty or turn.writes:
            with self._store.transaction():
                last_fact = ledger.flush()
                for write in turn.writes:
                    write()
                failpoints.hit("moderator.commit.written")
                written = self._clock.elapsed()
            self._commit_s.observe(self._clock.elapsed() - written)
            failpoints.hit("moderator.commit.done")
            self._commits += 1
        # From here on everything is durable: memory follows.
        self._live.absorb(ledger)
        self._dispatcher.absorb(ledger)
        self._clocks.follow(ledger)
        # Also one that had ended before: it was replayed and has ended once more, in one batch.
        turn.ended = [task.id for task in ledger.changed() if task.terminal]
        for effect in turn.effects:
            effect()
        return last_fact

    def _try_to_rebuild(self) -> StoreUnavailable | None:
        """Rebuild, or return why that cannot be done now; until then memory is not used."""
        try:
            self._rebuild()
        except StoreUnavailable as error:
            log.error("the store is away", extra={"action": "store.away", "error": str(error)})
            return error
        return None

    def _rebuild(self) -> None:
        """Forget everything that followed from uncommitted decisions; read the store again."""
        self._stale = True
        leased = self._store.leased()
        failpoints.hit("moderator.rebuild.begun")
        self._paused = self._store.paused()
        self._queue_labels.reset(self._store.counted_queues())
        self._clocks.hold = self._store.clock_hold()
        self._live.reset(leased)
        self._dispatcher.reset()
        self._workforce.reset(leased, self._clock.now(), self._clock.elapsed())
        self._intake.reset()
        self._schedules.reset()
        self._aftermath.reset()
        self._stale = False
        failpoints.hit("moderator.rebuild.done")

    def _preload(self, turn: Turn, batch: Sequence[Pending]) -> None:
        ids: list[str] = []
        for pending in batch:
            request = pending.request
            match request:
                case Exchange() | Reports() | SlotGone() | Hello() | Goodbye():
                    ids += [report.task_id for report in request.reports]
                case Heartbeat():
                    ids += [task_id for task_id, _, _ in request.began]
                case SubmitBatch():
                    ids += [spec.id for spec in request.specs]
                case Cancel() | Retry():
                    ids.append(request.task_id)
                case RetryMany():
                    ids += request.ids
                case _:
                    pass
        turn.ledger.load(ids)

    # -- requests --------------------------------------------------------------------------------

    def _handle(self, turn: Turn, pending: Pending) -> object:
        request: Request = pending.request
        match request:
            case Exchange():
                return self._workforce.exchange(turn, pending, request)
            case SubmitBatch():
                return self._intake.submit(turn, request)
            case Reports():
                return self._workforce.take_reports(turn, request)
            case Heartbeat():
                return self._workforce.heartbeat(turn, request)
            case SlotGone():
                return self._workforce.slot_gone(turn, request)
            case Hello():
                return self._workforce.hello(turn, request)
            case Cancel():
                return self._intake.cancel(turn, request)
            case Retry():
                return self._intake.retry(turn, request)
            case RetryMany():
                return self._intake.retry_many(turn, request)
            case Goodbye():
                return self._workforce.goodbye(turn, request)
            case NodesSeen():
                self._workforce.nodes_seen(turn, request)
                return None
            case MarkWorker():
                return self._workforce.mark(turn, request)
            case ForgetWorker():
                return self._workforce.forget(turn, request)
            case SendIntent():
                return self._workforce.send_intent(turn, pending, request)
            case PauseQueue():
                self._pause(turn, request)
                return None
            case Note():
                turn.ledger.audit += request.entries
                return None
            case Delivered():
                self._delivered(turn, request)
                return None
            case PutSchedule():
                return self._schedules.put(turn, request)
            case MarkSchedule():
                return self._schedules.mark(turn, request)
            case RunSchedule():
                return self._schedules.run(turn, request)
            case Query():
                return self._answer(request.name, turn.elapsed)

    def _pause(self, turn: Turn, request: PauseQueue) -> None:
        if request.paused:
            self._paused |= {request.queue}
        else:
            self._paused -= {request.queue}
        turn.writes.append(lambda: self._store.set_paused(request.queue, request.paused))
        action = "queue.pause" if request.paused else "queue.resume"
        turn.note(request.principal, action, request.queue, "done")

    def _delivered(self, turn: Turn, request: Delivered) -> None:
        delivery, outcome = request.delivery, request.outcome
        if outcome == "failed":
            turn.writes.append(lambda: self._store.save_deliveries([delivery]))
        else:
            turn.writes.append(lambda: self._store.drop_deliveries([delivery.id]))
        if outcome == "given_up":
            detail = f"{delivery.target}, after {delivery.tries} tries: {delivery.note}"
            turn.note(delivery.principal, "webhook.give_up", delivery.task_id, "failed", detail)
        turn.ledger.counts[Counter("webhook", "", outcome)] += 1

    # -- time ------------------------------------------------------------------------------------

    def _follow_clock(self, turn: Turn) -> None:
        """Keep the age of what runs, waits or is kept when somebody puts the wall clock."""
        by_s = self._clocks.look(turn.now, turn.elapsed)
        if not by_s:
            return
        log.warning(
            "the clock of this machine was put %+.0f s; running attempts keep their age",
            by_s,
            extra={"action": "clock.stepped", "by_s": round(by_s, 1)},
        )
        # Also what has begun and has not told so yet: its word counts from its grant on.
        for task in list(self._live.tasks.values()):
            turn.ledger.step(task, ClockStepped(at=turn.now, by_s=by_s))
        hold = self._clocks.hold.after_step(by_s, turn.now, self._policy.kept_s_max)
        if hold != self._clocks.hold:
            self._clocks.hold = hold
            turn.writes.append(lambda: self._store.hold_clock(hold))

    def _run_timers(self, turn: Turn) -> None:
        wake_at = self._store.next_wake()
        if wake_at is None or wake_at > turn.now:
            return
        due = self._store.due(turn.now, TIMERS_MAX)
        turn.ledger.adopt(due)
        for found in due:
            task = turn.ledger.get(found.id)
            if task is None or turn.ledger.is_changed(found.id):
                continue
            if owed_s := self._clocks.owed(task):
                task = turn.ledger.step(task, ClockStepped(at=turn.now, by_s=owed_s)).task
            turn.ledger.step(task, TimePassed(at=turn.now))

    def _keep_house(self, turn: Turn) -> None:
        if turn.elapsed - self._housekept < HOUSEKEEPING_S:
            return
        self._housekept = turn.elapsed
        self._intake.disk_low = self._free_bytes() < self._policy.disk_free_bytes_min
        self._workforce.keep_house(turn)
        self._dispatcher.sweep(turn.ledger, turn.now)
        if turn.elapsed - self._pruned > PRUNE_PERIOD_S:
            self._pruned = turn.elapsed
            turn.writes.append(lambda: self._prune(turn.now))

    def _prune(self, now: float) -> None:
        """Delete what has been kept long enough; what one batch cannot take goes with the next."""
        hold, policy = self._clocks.hold, self._policy
        ended_before = hold.cutoff(now, policy.retention_s)
        keys_before = hold.cutoff(now, policy.retention_s + policy.idempotency_s)
        audited_before = hold.cutoff(now, policy.audit_retention_s)
        gone = self._store.prune(ended_before, keys_before, PRUNE_MAX)
        lines = self._store.prune_audit(audited_before, PRUNE_MAX)
        if max(gone, lines) >= PRUNE_MAX:
            self._pruned -= PRUNE_PERIOD_S
        failpoints.hit("moderator.prune.written")

    # -- looking in ------------------------------------------------------------------------------

    def _answer(self, name: str, elapsed: float) -> object:
        match name:
            case "workers":
                return [self._workforce.info(one, elapsed) for one in self._workforce.sessions]
            case "worker_views":
                return (
                    self._workforce.views(elapsed),
                    self._live.starts(),
                    self._policy.max_concurrent_tasks,
                )
            case "status":
                return self._status(elapsed)
            case _:
                raise Invalid("invalid_query", f"unknown query {name!r}")

    def _status(self, elapsed: float) -> ModeratorStatus:
        size = self._store.size()
        states = [view.state for view in self._workforce.views(elapsed)]
        return ModeratorStatus(
            node_id=self._policy.node_id,
            generation=self._store.generation(),
            started_at=self._started_at,
            workers_online=states.count(WorkerState.ONLINE),
            workers=len(states),
            open_tasks=size.tasks,
            open_bytes=size.bytes,
            room=self._intake.room(),
            live_attempts=len(self._live.tasks),
            paused=tuple(sorted(self._paused)),
            pid=self._pid,
            commits=self._commits,
            store=self._store_name,
            figures=ModeratorFigures(
                batch_calls=self._batch_calls.copy(),
                batch_s=self._batch_s.copy(),
                commit_s=self._commit_s.copy(),
                renewals=self._workforce.renewed,
                refused=self._refusals,
                disk_free_bytes=self._free_bytes(),
            ),
        )

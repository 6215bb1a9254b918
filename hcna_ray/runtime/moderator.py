"""The moderator: the single writer of task state. Plain Python; knows nothing of Ray or asyncio.

`Moderator.apply` takes everything that arrived since the last commit, decides, schedules, and
commits all of it in one transaction. Only then does it hand back answers. What it keeps in memory
can be rebuilt from the store at any moment, and is, whenever a commit fails.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import (
    DiskFull,
    HcnaError,
    IdempotencyConflict,
    Invalid,
    NotFound,
    Overloaded,
    StaleWorker,
    StoreUnavailable,
    WorkerUnavailable,
)
from hcna_ray.core.events import (
    AttemptCancelled,
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptProgressed,
    AttemptStarted,
    CancelRequested,
    DependencySettled,
    KeyHeld,
    KeyReleased,
    LeaseReturned,
    ReleaseConcurrency,
    ReleaseOrdering,
    SettleDependents,
    StopAttempt,
    TaskReplayed,
    TimePassed,
)
from hcna_ray.core.machine import accept
from hcna_ray.core.models import (
    HEAVY_SLOT,
    TERMINAL,
    AuditEntry,
    FailureKind,
    Hold,
    Task,
    TaskError,
    TaskSpec,
    TaskState,
    Token,
    WorkerRecord,
    WorkerState,
    WorkerView,
)
from hcna_ray.runtime.dispatcher import Dispatcher, LiveTable
from hcna_ray.runtime.ledger import Ledger
from hcna_ray.runtime.messages import (
    Accepted,
    Ack,
    Exchange,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    IntentOrder,
    ModeratorStatus,
    Refused,
    ReplayReply,
    Report,
    ReportKind,
    SlotGone,
    Stop,
    SubmitBatch,
    SubmitResult,
    Welcome,
    WorkerInfo,
)
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import (
    Cancel,
    MarkWorker,
    Note,
    PauseQueue,
    Pending,
    Query,
    Reports,
    Request,
    Retry,
    RetryMany,
    SendIntent,
)
from hcna_ray.runtime.sessions import Session, Sessions, marked
from hcna_ray.store.base import KeyClaim, TaskStore

log = logging.getLogger(__name__)

#: Dependents settled in one batch; the rest follows in the next ones, from a durable order.
SETTLE_MAX = 1000
#: Timers carried out in one batch.
TIMERS_MAX = 1000
#: Tasks pruned in one batch, and how often pruning looks.
PRUNE_MAX = 500
PRUNE_PERIOD_S = 30.0
#: Pause between two looks at silent workers, free disk space and parked calls.
HOUSEKEEPING_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Outbound:
    """What may leave after a commit: answers, ended tasks, and the newest fact's number."""

    answers: tuple[tuple[Pending, object], ...]
    ended: tuple[str, ...] = ()
    last_fact: int = 0


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
        """
        self._store, self._policy, self._clock = store, policy, clock
        self._jitter, self._free_bytes = jitter, free_bytes
        self._pid, self._store_name = pid, store_name
        self._started_at = clock.now()
        self._commits = 0
        self._sessions = Sessions(
            suspect_s=2.5 * policy.heartbeat_s, ttl_s=policy.lease_ttl_s + policy.lease_grace_s
        )
        self._live = LiveTable()
        self._dispatcher = Dispatcher(store, policy, self._live)
        #: Calls that wait for work, by (worker, slot).
        self._parked: dict[tuple[str, int], Pending] = {}
        #: The last answer to each slot, for a repeated exchange.
        self._grants: dict[tuple[str, int], tuple[str, Grant]] = {}
        #: Orders for agents that are not parked just now.
        self._stops: dict[str, list[Stop]] = {}
        self._intents: dict[str, list[IntentOrder]] = {}
        self._asked: dict[str, Pending] = {}
        self._housekept = self._pruned = clock.elapsed()
        self._disk_low = False
        self._settling = False
        self._rebuild()

    # -- the one entry ---------------------------------------------------------------------------

    def apply(self, batch: Sequence[Pending]) -> Outbound:
        """Decide and commit a batch, and return what may now leave.

        An empty batch carries out timers and housekeeping. A store that refuses to commit answers
        every request of the batch with `StoreUnavailable`, and nothing of it happened.

        Raises:
            OSError: fsync failed. The process must exit: what is on disk is unknown.
        """
        turn = _Turn(
            Ledger(self._store, self._live.tasks, self._sessions.node_ids()),
            self._clock.now(),
            self._clock.elapsed(),
        )
        self._preload(turn, batch)
        for pending in batch:
            try:
                answer = self._handle(turn, pending)
            except HcnaError as error:
                answer = error
            if answer is not _LATER:
                turn.answers.append((pending, answer))
        self._run_timers(turn)
        self._keep_house(turn)
        try:
            if self._settling:
                self._take_settlements(turn)
            self._follow_up(turn)
            self._dispatch(turn)
            last_fact = self._commit(turn)
        except StoreUnavailable as error:
            log.error(
                "the store refused a commit", extra={"action": "store.refused", "error": str(error)}
            )
            self._rebuild()
            waiting = {*batch, *(pending for pending, _ in turn.answers)}
            return Outbound(tuple((pending, error) for pending in waiting))
        return Outbound(tuple(turn.answers), tuple(turn.ended), last_fact)

    def sleep_s(self) -> float:
        """Return how long nothing will happen by itself: 0 when work is left over."""
        if self._settling or self._dispatcher.unfinished:
            return 0.0
        wake_at = self._store.next_wake()
        pause = HOUSEKEEPING_S
        if wake_at is not None:
            pause = min(pause, max(0.0, wake_at - self._clock.now()))
        return pause

    # -- commit and rebuild ----------------------------------------------------------------------

    def _commit(self, turn: _Turn) -> int:
        ledger = turn.ledger
        last_fact = 0
        if ledger.dirty or turn.writes:
            with self._store.transaction():
                last_fact = ledger.flush()
                for write in turn.writes:
                    write()
            self._commits += 1
        # From here on everything is durable: memory follows.
        self._live.absorb(ledger)
        self._dispatcher.absorb(ledger)
        turn.ended = [
            task.id
            for task in ledger.changed()
            if task.state in TERMINAL and not _was_ended(ledger.before[task.id])
        ]
        for effect in turn.effects:
            effect()
        return last_fact

    def _rebuild(self) -> None:
        """Forget everything that followed from uncommitted decisions; read the store again."""
        leased = self._store.leased()
        self._generation = self._store.generation()
        self._seq = self._store.last_seq()
        self._paused = self._store.paused()
        records = self._store.workers()
        known = {one.record.name: one for one in self._sessions}
        elapsed = self._clock.elapsed()
        if not known:
            self._sessions.restore(records, elapsed)
        self._live.reset(leased)
        self._dispatcher.reset()
        self._stops.clear()
        for task in leased:
            if task.cancel_requested_at is not None and task.lease is not None:
                stop = Stop(task.id, task.lease.token, task.lease.slot, "cancel")
                self._stops.setdefault(task.lease.worker, []).append(stop)
        self._settling = bool(self._store.settlements(1))

    def _preload(self, turn: _Turn, batch: Sequence[Pending]) -> None:
        ids: list[str] = []
        for pending in batch:
            request = pending.request
            match request:
                case Exchange() | Reports() | SlotGone() | Hello():
                    ids += [report.task_id for report in request.reports]
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

    def _handle(self, turn: _Turn, pending: Pending) -> object:
        request: Request = pending.request
        match request:
            case Exchange():
                return self._on_exchange(turn, pending, request)
            case SubmitBatch():
                return self._on_submit(turn, request)
            case Reports():
                self._sessions.current(request.worker, request.incarnation)
                return self._report_all(turn, request.reports)
            case Heartbeat():
                return self._on_heartbeat(turn, request)
            case SlotGone():
                return self._on_slot_gone(turn, request)
            case Hello():
                return self._on_hello(turn, request)
            case Cancel():
                return self._on_cancel(turn, request)
            case Retry():
                return self._on_retry(turn, request)
            case RetryMany():
                return self._on_retry_many(turn, request)
            case MarkWorker():
                return self._on_mark(turn, request)
            case SendIntent():
                return self._on_intent(turn, pending, request)
            case PauseQueue():
                self._on_pause(turn, request)
                return None
            case Note():
                turn.ledger.audit.append(request.entry)
                return None
            case Query():
                return self._answer(request.name, turn.elapsed)

    def _on_submit(self, turn: _Turn, batch: SubmitBatch) -> list[SubmitResult]:
        results: list[SubmitResult] = []
        accepted: list[tuple[TaskSpec, list[str], str | None]] = []
        size = self._store.size()
        tasks, stored = size.tasks + turn.added_tasks, size.bytes + turn.added_bytes
        claims: dict[tuple[str, str], KeyClaim] = {}
        names = [(s.principal, s.idempotency_key) for s in batch.specs if s.idempotency_key]
        held = self._store.keys_held([(p, k) for p, k in names if k is not None])
        states = self._dependency_states(turn, batch)
        #: Ids minted for items that turned out to be earlier tasks, and whose they are.
        renamed: dict[str, str] = {}
        for sent in batch.specs:
            spec = _with_parents(sent, renamed)
            known = turn.ledger.get(spec.id)
            if known is not None:
                results.append(Accepted(spec.id, known.state))
                continue
            try:
                duplicate = self._same_key(turn, held, spec)
                if duplicate is not None:
                    results.append(duplicate)
                    renamed[spec.id] = duplicate.task_id
                    states[duplicate.task_id] = duplicate.state
                    continue
                self._check_room(tasks, stored + spec.bytes_stored)
                unmet, failed = _unmet(spec, states)
            except HcnaError as error:
                if batch.atomic:
                    raise
                results.append(Refused(error))
                continue
            tasks, stored = tasks + 1, stored + spec.bytes_stored
            accepted.append((spec, unmet, failed))
            states[spec.id] = TaskState.FAILED if failed else TaskState.QUEUED
            if spec.idempotency_key is not None:
                claim = KeyClaim(
                    spec.principal, spec.idempotency_key, spec.id, spec.fingerprint, turn.now
                )
                held[spec.principal, spec.idempotency_key] = claim
                claims[spec.principal, spec.idempotency_key] = claim
            results.append(Accepted(spec.id, TaskState.QUEUED))
        turn.ledger.claims.update(claims)
        final = {}
        for spec, unmet, failed in accepted:
            final[spec.id] = self._accept(turn, spec, unmet, failed)
        turn.added_tasks, turn.added_bytes = tasks - size.tasks, stored - size.bytes
        return [
            one._replace(state=final.get(one.task_id, one.state))
            if isinstance(one, Accepted)
            else one
            for one in results
        ]

    def _accept(
        self, turn: _Turn, spec: TaskSpec, unmet: list[str], failed: str | None
    ) -> TaskState:
        self._seq += 1
        behind = False
        if spec.ordering_key is not None:
            behind = turn.ordering_busy(self._store, spec.ordering_key)
        step = accept(
            spec,
            seq=self._seq,
            at=turn.now,
            unmet=len(unmet),
            failed_dependency=failed,
            behind_key=behind,
            ageing_step_s=self._policy.ageing_step_s,
        )
        turn.ledger.add(step)
        if unmet and failed is None:
            turn.ledger.dependencies.append((spec.id, tuple(unmet)))
        return step.task.state

    def _dependency_states(self, turn: _Turn, batch: SubmitBatch) -> dict[str, TaskState]:
        wanted = {parent for spec in batch.specs for parent in spec.depends_on}
        if not wanted:
            return {}
        states = self._store.task_states(wanted)
        for parent in wanted:
            if turn.ledger.is_changed(parent):
                task = turn.ledger.get(parent)
                assert task is not None
                states[parent] = task.state
        return states

    def _same_key(
        self, turn: _Turn, held: dict[tuple[str, str], KeyClaim], spec: TaskSpec
    ) -> Accepted | None:
        """Return the earlier answer for a repeated idempotency key.

        Raises:
            IdempotencyConflict: the earlier request was different.
        """
        if spec.idempotency_key is None:
            return None
        name = (spec.principal, spec.idempotency_key)
        claim = turn.ledger.claims.get(name) or held.get(name)
        if claim is None:
            return None
        if claim.fingerprint != spec.fingerprint:
            raise IdempotencyConflict(spec.idempotency_key, claim.task_id)
        task = turn.ledger.get(claim.task_id)
        state = TaskState.QUEUED if task is None else task.state
        return Accepted(claim.task_id, state, True)

    def _check_room(self, tasks: int, stored: int) -> None:
        if self._disk_low:
            raise DiskFull("free disk space is below limits.disk_free_bytes_min on M1", 30)
        if tasks >= self._policy.queue_tasks_max:
            raise Overloaded(f"the queue holds its maximum of {tasks} tasks", 5)
        if stored > self._policy.queue_bytes_max:
            raise Overloaded("the queue holds its maximum of bytes", 5)

    def _on_cancel(self, turn: _Turn, request: Cancel) -> TaskState:
        task = turn.ledger.get(request.task_id)
        if task is None:
            raise NotFound("task", request.task_id)
        step = turn.ledger.step(task, CancelRequested(at=turn.now, reason=request.reason))
        self._note(turn, request.principal, "task.cancel", request.task_id, step.task.state)
        return step.task.state

    def _on_retry(self, turn: _Turn, request: Retry) -> TaskState:
        task = turn.ledger.get(request.task_id)
        if task is None:
            raise NotFound("task", request.task_id)
        state = self._replay(turn, task)
        self._note(turn, request.principal, "task.retry", request.task_id, state)
        return state

    def _on_retry_many(self, turn: _Turn, request: RetryMany) -> ReplayReply:
        retried = []
        for task_id in request.ids:
            task = turn.ledger.get(task_id)
            if task is not None and task.state is TaskState.FAILED:
                self._replay(turn, task)
                retried.append(task_id)
        self._note(turn, request.principal, "task.retry_many", "", f"{len(retried)} tasks")
        return ReplayReply(retried=tuple(retried), more=request.more)

    def _replay(self, turn: _Turn, task: Task) -> TaskState:
        self._settle_before_replay(turn, task)
        key = task.spec.ordering_key
        busy = key is not None and turn.ordering_busy(self._store, key)
        replayed = turn.ledger.step(task, TaskReplayed(at=turn.now)).task
        if busy:
            held = KeyHeld(at=turn.now, hold=Hold.ORDERING)
            replayed = turn.ledger.step(replayed, held).task
        return replayed.state

    def _on_mark(self, turn: _Turn, request: MarkWorker) -> WorkerInfo:
        session = self._sessions.find(request.name)
        if session is None:
            raise NotFound("worker", request.name)
        until = session.record.draining_until
        cordoned = session.record.cordoned
        match request.action:
            case "drain":
                until = turn.now + (request.deadline_s or 600.0)
            case "cordon":
                cordoned = True
            case _:
                cordoned, until = False, None
        record = marked(session.record, cordoned=cordoned, draining_until=until)
        session.record = record
        turn.writes.append(lambda: self._store.save_worker(record))
        self._note(turn, request.principal, f"worker.{request.action}", record.name, "done")
        return self._info(session, turn.elapsed)

    def _on_pause(self, turn: _Turn, request: PauseQueue) -> None:
        if request.paused:
            self._paused |= {request.queue}
        else:
            self._paused -= {request.queue}
        turn.writes.append(lambda: self._store.set_paused(request.queue, request.paused))
        action = "queue.pause" if request.paused else "queue.resume"
        self._note(turn, request.principal, action, request.queue, "done")

    def _on_intent(self, turn: _Turn, pending: Pending, request: SendIntent) -> object:
        session = self._sessions.find(request.worker)
        if session is None:
            raise NotFound("worker", request.worker)
        state = self._sessions.state(session, turn.elapsed)
        if state is WorkerState.GONE:
            raise WorkerUnavailable(f"worker {session.record.name} is {state.value}", 10)
        name = session.record.name
        self._asked[str(request.envelope["msg_id"])] = pending
        self._intents.setdefault(name, []).append(IntentOrder(request.envelope))
        intent = str(request.envelope["intent"])
        self._note(turn, request.principal, "intent.send", name, "sent", intent)
        return _LATER

    def _note(
        self, turn: _Turn, principal: str, action: str, target: str, outcome: str, detail: str = ""
    ) -> None:
        turn.ledger.audit.append(
            AuditEntry(
                at=turn.now,
                principal=principal,
                action=action,
                target=target,
                outcome=str(outcome),
                detail=detail,
            )
        )

    # -- workers ---------------------------------------------------------------------------------

    def _on_hello(self, turn: _Turn, hello: Hello) -> Welcome:
        known = self._sessions.find(hello.worker)
        fresh = known is None or known.record.incarnation != hello.incarnation
        # What the old incarnation's journals held counts before its leases are closed.
        self._report_all(turn, hello.reports)
        if known is not None and fresh:
            self._close_leases(
                turn,
                known.record.name,
                "the worker's agent was replaced",
                keep_incarnation=hello.incarnation,
                worker_gone=True,
            )
            self._drop_parked(turn, known.record.name)
        record = WorkerRecord(
            name=hello.worker,
            node_id=hello.node_id,
            incarnation=hello.incarnation,
            registered_at=turn.now,
            last_seen_at=turn.now,
            cordoned=known is not None and known.record.cordoned,
            draining_until=None if known is None else known.record.draining_until,
            cpu=hello.cpu,
            mem_gb=hello.mem_gb,
            gpu=hello.gpu,
            resources=hello.resources,
            labels=hello.labels,
            task_types=hello.task_types,
            address=hello.address,
        )
        self._sessions.put(record, turn.elapsed)
        turn.writes.append(lambda: self._store.save_worker(record))
        log.info(
            "%s node %s registered successfully",
            hello.worker,
            hello.node_id,
            extra={"action": "worker.registered", "worker": hello.worker},
        )
        return Welcome(
            moderator_node_id=self._policy.node_id,
            generation=self._generation,
            lease_ttl_s=self._policy.lease_ttl_s,
            heartbeat_s=self._policy.heartbeat_s,
        )

    def _on_heartbeat(self, turn: _Turn, beat: Heartbeat) -> HeartbeatReply:
        session = self._sessions.current(beat.worker, beat.incarnation)
        if session is None:
            return HeartbeatReply(known=False)
        session.renewed = turn.elapsed
        session.telemetry, session.slots = beat.telemetry, beat.slots
        session.record = dataclasses.replace(session.record, last_seen_at=turn.now)
        return HeartbeatReply(known=True)

    def _on_exchange(self, turn: _Turn, pending: Pending, exchange: Exchange) -> object:
        place = (exchange.worker, exchange.slot)
        session = self._sessions.current(exchange.worker, exchange.incarnation)
        if session is None:
            return Grant(seq=exchange.seq, hello=True)
        for msg_id, answer in exchange.answers:
            asked = self._asked.pop(msg_id, None)
            if asked is not None:
                turn.answers.append((asked, dict(answer)))
        self._report_all(turn, exchange.reports)
        previous = self._parked.pop(place, None)
        if previous is not None:  # Its call was given up by the slot; nobody reads this answer.
            turn.answers.append((previous, Grant(seq=_seq(previous))))
        repeated = self._repeated(exchange)
        if repeated is not None:
            return repeated
        if exchange.slot != HEAVY_SLOT:
            self._settle_slot(turn, exchange)
        self._parked[place] = pending
        return _LATER

    def _repeated(self, exchange: Exchange) -> Grant | None:
        """Return the answer that this exchange was given before, if it was."""
        place = (exchange.worker, exchange.slot)
        last = self._grants.get(place)
        if last is not None and last[0] == exchange.incarnation:
            if last[1].seq == exchange.seq:
                return last[1]
            if last[1].seq > exchange.seq:
                return Grant(seq=exchange.seq)
            return None
        # A new moderator: the leases themselves say what was granted.
        granted = [
            task
            for task in self._live.in_slot(*place)
            if task.lease is not None
            and task.lease.incarnation == exchange.incarnation
            and task.lease.grant_seq == exchange.seq
        ]
        if not granted:
            return None
        offers = tuple(self._dispatcher.offer(task) for task in granted)
        return Grant(seq=exchange.seq, offers=offers)

    def _settle_slot(self, turn: _Turn, exchange: Exchange) -> None:
        """A slot that asks again has nothing left of its earlier grants."""
        for task_id in [task.id for task in self._live.in_slot(exchange.worker, exchange.slot)]:
            task = turn.ledger.get(task_id)
            if task is None or task.lease is None or task.lease.slot != exchange.slot:
                continue
            if task.lease.worker != exchange.worker or task.lease.grant_seq >= exchange.seq:
                continue
            self._take_back(turn, task, "the slot moved on without it", FailureKind.LOST)

    def _on_slot_gone(self, turn: _Turn, gone: SlotGone) -> Ack:
        self._sessions.current(gone.worker, gone.incarnation)
        ack = self._report_all(turn, gone.reports)
        place = (gone.worker, gone.slot)
        parked = self._parked.pop(place, None)
        if parked is not None:
            turn.answers.append((parked, Grant(seq=_seq(parked))))
        self._grants.pop(place, None)
        if gone.slot == HEAVY_SLOT:
            return ack
        for live in self._live.in_slot(*place):
            task = turn.ledger.get(live.id)
            if task is None or task.lease is None or task.lease.incarnation != gone.incarnation:
                continue
            if (task.lease.worker, task.lease.slot) == place:
                self._take_back(turn, task, "the slot's process ended", FailureKind.POISON)
        return ack

    def _take_back(
        self, turn: _Turn, task: Task, why: str, kind: FailureKind, worker_gone: bool = False
    ) -> None:
        """End a lease whose holder is gone: lost if the attempt had started, else just returned."""
        lease = task.lease
        assert lease is not None
        if lease.started_at is None:
            returned = LeaseReturned(at=turn.now, token=lease.token, reason=why)
            turn.ledger.step(task, returned)
            return
        turn.ledger.step(
            task,
            AttemptLost(
                at=turn.now, token=lease.token, kind=kind, message=why, worker_gone=worker_gone
            ),
        )

    def _close_leases(
        self,
        turn: _Turn,
        worker: str,
        why: str,
        *,
        keep_incarnation: str | None = None,
        worker_gone: bool,
    ) -> None:
        for live in self._live.on_worker(worker):
            task = turn.ledger.get(live.id)
            if task is None or task.lease is None or task.lease.worker != worker:
                continue
            if task.lease.incarnation != keep_incarnation:
                self._take_back(turn, task, why, FailureKind.LOST, worker_gone)

    def _drop_parked(self, turn: _Turn, worker: str) -> None:
        for place in [place for place in self._parked if place[0] == worker]:
            pending = self._parked.pop(place)
            turn.answers.append((pending, StaleWorker(worker, "", None)))
        for place in [place for place in self._grants if place[0] == worker]:
            del self._grants[place]

    def _report_all(self, turn: _Turn, reports: Iterable[Report]) -> Ack:
        applied, late = 0, []
        for report in reports:
            task = turn.ledger.get(report.task_id)
            if task is not None and self._report(turn, task, report):
                applied += 1
            else:
                late.append((report.task_id, report.token))
        return Ack(applied=applied, late=tuple(late))

    def _report(self, turn: _Turn, task: Task, report: Report) -> bool:
        token = Token(*report.token)
        match report.kind:
            case ReportKind.STARTED:
                started = AttemptStarted(at=report.at, token=token)
                return turn.ledger.step(task, started).changed
            case ReportKind.COMPLETED:
                step = turn.ledger.step(
                    task,
                    AttemptCompleted(
                        at=turn.now,
                        token=token,
                        started_at=report.started_at,
                        result=report.result or b"{}",
                    ),
                )
                if step.changed:
                    self._dispatcher.observe(task.spec.task_type, report.duration_ms)
                return step.changed
            case ReportKind.FAILED:
                return turn.ledger.step(
                    task,
                    AttemptFailed(
                        at=turn.now,
                        token=token,
                        started_at=report.started_at,
                        error=_error(report),
                        jitter=self._jitter(),
                    ),
                ).changed
            case ReportKind.PROGRESS:
                return turn.ledger.step(
                    task,
                    AttemptProgressed(
                        at=turn.now,
                        token=token,
                        progress=report.progress,
                        checkpoint=report.checkpoint,
                    ),
                ).changed
            case ReportKind.CANCELLED:
                if task.cancel_requested_at is None:
                    return False
                return turn.ledger.step(
                    task,
                    AttemptCancelled(at=turn.now, token=token, started_at=report.started_at),
                ).changed
            case ReportKind.LOST:
                error = _error(report)
                return turn.ledger.step(
                    task,
                    AttemptLost(at=turn.now, token=token, kind=error.kind, message=error.message),
                ).changed
            case ReportKind.RETURNED:
                return turn.ledger.step(
                    task, LeaseReturned(at=turn.now, token=token, reason="given back")
                ).changed
            case _:
                raise Invalid("invalid_report", f"unknown report kind {report.kind!r}")

    # -- time ------------------------------------------------------------------------------------

    def _run_timers(self, turn: _Turn) -> None:
        wake_at = self._store.next_wake()
        if wake_at is None or wake_at > turn.now:
            return
        due = self._store.due(turn.now, TIMERS_MAX)
        turn.ledger.adopt(due)
        for found in due:
            task = turn.ledger.get(found.id)
            if task is not None and not turn.ledger.is_changed(found.id):
                turn.ledger.step(task, TimePassed(at=turn.now))

    def _keep_house(self, turn: _Turn) -> None:
        if turn.elapsed - self._housekept < HOUSEKEEPING_S:
            return
        self._housekept = turn.elapsed
        self._disk_low = self._free_bytes() < self._policy.disk_free_bytes_min
        for session in self._sessions.overdue(turn.elapsed):
            self._lose(turn, session)
        for place, pending in list(self._parked.items()):
            if turn.elapsed - pending.arrived > self._policy.exchange_wait_s:
                del self._parked[place]
                self._answer_exchange(turn, place, pending, Grant(seq=_seq(pending)))
        for msg_id, pending in list(self._asked.items()):
            request = pending.request
            if isinstance(request, SendIntent) and (
                turn.elapsed - pending.arrived > request.wait_s
            ):
                del self._asked[msg_id]
                error = WorkerUnavailable(f"{request.worker} did not answer in time", 5)
                turn.answers.append((pending, error))
        self._dispatcher.sweep(turn.ledger, turn.now)
        if turn.elapsed - self._pruned > PRUNE_PERIOD_S:
            self._pruned = turn.elapsed
            turn.writes.append(lambda: self._prune(turn.now))

    def _prune(self, now: float) -> None:
        ended_before = now - self._policy.retention_s
        keys_before = ended_before - self._policy.idempotency_s
        self._store.prune(ended_before, keys_before, PRUNE_MAX)

    def _lose(self, turn: _Turn, session: Session) -> None:
        name = session.record.name
        log.warning(
            "health check failed",
            extra={
                "action": "worker.lost",
                "worker": name,
                "silence_s": round(turn.elapsed - session.renewed, 1),
            },
        )
        why = f"{name} was silent for {turn.elapsed - session.renewed:.0f} s"
        self._close_leases(turn, name, why, worker_gone=True)
        session.gone = True
        self._drop_parked(turn, name)

    # -- what follows from steps -----------------------------------------------------------------

    def _follow_up(self, turn: _Turn) -> None:
        """Carry out the commands of this batch's steps, which may lead to further steps."""
        ledger = turn.ledger
        budget = SETTLE_MAX
        position = 0
        while position < len(ledger.commands):
            command = ledger.commands[position]
            position += 1
            match command:
                case SettleDependents():
                    budget -= self._settle(turn, command, budget)
                case ReleaseOrdering():
                    self._release_ordering(turn, command.key)
                case ReleaseConcurrency():
                    self._dispatcher.release_concurrency(ledger, command.key, turn.now)
                case StopAttempt():
                    stop = Stop(command.task_id, command.token, command.slot, command.reason)
                    self._stops.setdefault(command.worker, []).append(stop)
        ledger.commands.clear()

    def _take_settlements(self, turn: _Turn) -> None:
        orders = self._store.settlements(16)
        for order in orders:
            turn.ledger.dropped_settlements.append(order.number)
            command = SettleDependents(task_id=order.task_id, completed=order.completed)
            turn.ledger.commands.append(command)
        self._settling = len(orders) == 16

    def _settle(self, turn: _Turn, command: SettleDependents, budget: int) -> int:
        """Settle up to ``budget`` dependents; leave a durable order for the rest."""
        ledger = turn.ledger
        children = self._store.dependents(command.task_id, max(budget, 0) + 1)
        # The store does not know yet what this batch added or dropped.
        for child_id, parents in ledger.dependencies:
            if command.task_id in parents and child_id not in children:
                children.append(child_id)
        dropped = {
            child
            for parent, gone in ledger.dropped_dependents
            if parent == command.task_id
            for child in gone
        }
        children = [child for child in children if child not in dropped]
        if not children:
            return 0
        now, later = children[: max(budget, 0)], children[max(budget, 0) :]
        ledger.load(now)
        for child_id in now:
            child = ledger.get(child_id)
            if child is not None:
                event = DependencySettled(
                    at=turn.now, dependency_id=command.task_id, completed=command.completed
                )
                ledger.step(child, event)
        if now:
            ledger.dropped_dependents.append((command.task_id, now))
        if later:
            ledger.pushed_settlements.append((command.task_id, command.completed))
            self._settling = True
        return len(now)

    def _settle_before_replay(self, turn: _Turn, task: Task) -> None:
        """Reject now whoever still waits to hear of the failure: later it would be untrue."""
        command = SettleDependents(task_id=task.id, completed=False)
        self._settle(turn, command, 1 << 40)
        if self._settling:
            orders = self._store.settlements(1 << 30)
            own = [order.number for order in orders if order.task_id == task.id]
            turn.ledger.dropped_settlements += own

    def _release_ordering(self, turn: _Turn, key: str) -> None:
        """Let the key's next task go, unless one of its tasks is out already.

        The lowest sequence is not always the one that is out: a replayed task stands before it.
        """
        line = turn.ordering_line(self._store, key)
        if line and all(task.hold & Hold.ORDERING for task in line):
            turn.ledger.step(line[0], KeyReleased(at=turn.now, hold=Hold.ORDERING))

    # -- handing out work ------------------------------------------------------------------------

    def _dispatch(self, turn: _Turn) -> None:
        views = {view.name: view for view in self._views(turn.elapsed, turn.ledger)}
        granted = self._dispatcher.dispatch(
            turn.ledger,
            views,
            {place: _seq(pending) for place, pending in self._parked.items()},
            {place: _incarnation(pending) for place, pending in self._parked.items()},
            self._paused,
            self._generation,
            turn.now,
        )
        self._follow_up(turn)
        for place, pending in list(self._parked.items()):
            worker, slot = place
            offers = granted.get(place, ())
            stops: tuple[Stop, ...] = ()
            intents: tuple[IntentOrder, ...] = ()
            if slot == HEAVY_SLOT:
                stops = tuple(self._stops.get(worker, ()))
                intents = tuple(self._intents.get(worker, ()))
            if offers or stops or intents:
                grant = Grant(seq=_seq(pending), offers=offers, stops=stops, intents=intents)
                self._answer_exchange(turn, place, pending, grant)

    def _answer_exchange(
        self, turn: _Turn, place: tuple[str, int], pending: Pending, grant: Grant
    ) -> None:
        """Answer a parked call, once the batch is committed, and remember what it was told."""
        turn.answers.append((pending, grant))

        def settled() -> None:
            self._parked.pop(place, None)
            self._grants[place] = (_incarnation(pending), grant)
            if grant.stops:
                self._stops.pop(place[0], None)
            if grant.intents:
                self._intents.pop(place[0], None)

        turn.effects.append(settled)

    # -- looking in ------------------------------------------------------------------------------

    def _answer(self, name: str, elapsed: float) -> object:
        match name:
            case "workers":
                return [self._info(session, elapsed) for session in self._sessions]
            case "worker_views":
                return self._views(elapsed), self._live.starts(), self._policy.max_concurrent_tasks
            case "status":
                return self._status(elapsed)
            case _:
                raise Invalid("invalid_query", f"unknown query {name!r}")

    def _views(self, elapsed: float, ledger: Ledger | None = None) -> list[WorkerView]:
        return [self._view(session, elapsed, ledger) for session in self._sessions]

    def _view(
        self, session: Session, elapsed: float, ledger: Ledger | None = None
    ) -> WorkerView:
        name = session.record.name
        return self._sessions.view(
            session, elapsed, self._live.count(name), self._live.used(name, ledger)
        )

    def _status(self, elapsed: float) -> ModeratorStatus:
        size = self._store.size()
        states = [self._sessions.state(session, elapsed) for session in self._sessions]
        return ModeratorStatus(
            node_id=self._policy.node_id,
            generation=self._generation,
            started_at=self._started_at,
            workers_online=states.count(WorkerState.ONLINE),
            workers=len(states),
            open_tasks=size.tasks,
            open_bytes=size.bytes,
            live_attempts=len(self._live.tasks),
            paused=tuple(sorted(self._paused)),
            pid=self._pid,
            commits=self._commits,
            store=self._store_name,
        )

    def _info(self, session: Session, elapsed: float) -> WorkerInfo:
        record = session.record
        view = self._view(session, elapsed)
        names = ["cpu", "mem_gb", "gpu", *(name for name, _ in record.resources)]
        totals: dict[str, float] = {
            "cpu": record.cpu,
            "mem_gb": record.mem_gb,
            "gpu": record.gpu,
            **dict(record.resources),
        }
        running: list[dict[str, Any]] = []
        for task in self._live.on_worker(record.name):
            lease = task.lease
            if lease is not None and lease.started_at is not None:
                running.append(
                    {
                        "task_id": task.id,
                        "task_type": task.spec.task_type,
                        "attempt": lease.token.attempt,
                        "started_at": lease.started_at,
                    }
                )
        return WorkerInfo(
            name=record.name,
            node_id=record.node_id,
            state=view.state,
            last_seen_at=record.last_seen_at,
            last_seen_age_s=max(0.0, elapsed - session.renewed),
            resources=totals,
            free={name: view.free(name) for name in names},
            labels=dict(record.labels),
            task_types=record.task_types,
            slots=session.slots,
            running=tuple(running),
            telemetry=session.telemetry,
            draining_until=record.draining_until,
        )


class _Later:
    """Marks an answer that comes with a later batch."""


_LATER = _Later()


class _Turn:
    """One batch on its way: the ledger, the instant, and what leaves after the commit."""

    def __init__(self, ledger: Ledger, now: float, elapsed: float) -> None:
        self.ledger, self.now, self.elapsed = ledger, now, elapsed
        self.answers: list[tuple[Pending, object]] = []
        #: Small writes beside the ledger's, inside the same transaction.
        self.writes: list[Callable[[], None]] = []
        #: Changes of the moderator's memory that must not happen unless committed.
        self.effects: deque[Callable[[], None]] = deque()
        self.ended: list[str] = []
        self.added_tasks = 0
        self.added_bytes = 0

    def ordering_line(self, store: TaskStore, key: str) -> list[Task]:
        """Return open tasks with this ordering key in accept order: the first, and any not held.

        Held tasks stand behind one another in the store, so a look at the line's front is enough;
        only when all of the front ended in this batch the look goes further back.
        """
        found = {
            task.id: task
            for task in self.ledger.changed()
            if task.spec.ordering_key == key and not task.terminal
        }
        limit = 2
        while True:
            line = store.ordering_line(key, limit)
            self.ledger.adopt(line)
            for stored in line:
                task = self.ledger.get(stored.id)
                if task is not None and not task.terminal:
                    found[task.id] = task
            if found or len(line) < limit:
                break
            limit *= 4
        out = store.ordering_out(key)
        if out is not None:
            task = self.ledger.get(out.id)
            if task is not None and not task.terminal:
                found[task.id] = task
        return sorted(found.values(), key=lambda task: task.seq)

    def ordering_busy(self, store: TaskStore, key: str) -> bool:
        """Return whether an open task holds or waits for this ordering key."""
        return bool(self.ordering_line(store, key))


def _with_parents(spec: TaskSpec, renamed: dict[str, str]) -> TaskSpec:
    """Return the spec with its parents' true ids: a repeated batch mints new ones in vain."""
    if not renamed or not any(parent in renamed for parent in spec.depends_on):
        return spec
    parents = tuple(renamed.get(parent, parent) for parent in spec.depends_on)
    return dataclasses.replace(spec, depends_on=parents)


def _unmet(spec: TaskSpec, states: dict[str, TaskState]) -> tuple[list[str], str | None]:
    """Return the dependencies still open, and one that already ended without completing.

    Raises:
        Invalid: a dependency does not exist.
    """
    unmet = []
    failed = None
    for parent in dict.fromkeys(spec.depends_on):
        state = states.get(parent)
        if state is None:
            raise Invalid(
                "dependency_not_found",
                f"depends_on names {parent}, which does not exist",
                (("depends_on", f"there is no task {parent!r}"),),
            )
        if state not in TERMINAL:
            unmet.append(parent)
        elif state is not TaskState.COMPLETED:
            failed = parent
    return unmet, failed


def _error(report: Report) -> TaskError:
    if report.error is not None:
        return report.error
    return TaskError(kind=FailureKind.ERROR, message="the worker gave no reason")


def _was_ended(before: Task | None) -> bool:
    return before is not None and before.terminal


def _seq(pending: Pending) -> int:
    request = pending.request
    assert isinstance(request, Exchange)
    return request.seq


def _incarnation(pending: Pending) -> str:
    request = pending.request
    assert isinstance(request, Exchange)
    return request.incarnation

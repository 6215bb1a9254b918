"""Workers as the moderator deals with them: sessions, parked calls, grants, orders, losses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Set
from typing import Any

from hcna_ray.core.errors import (
    NotFound,
    StaleWorker,
    WorkerNameTaken,
    WorkerOnline,
    WorkerUnavailable,
)
from hcna_ray.core.events import AttemptLost, LeaseReturned, StopAttempt
from hcna_ray.core.models import (
    ACCEPTING,
    AWAY,
    HEAVY_SLOT,
    FailureKind,
    Task,
    Token,
    WorkerRecord,
    WorkerState,
    WorkerView,
)
from hcna_ray.core.placement import age_in_words
from hcna_ray.observability.log_context import names_of
from hcna_ray.runtime.dispatcher import Dispatcher
from hcna_ray.runtime.ledger import Ledger
from hcna_ray.runtime.live import LiveTable, Place
from hcna_ray.runtime.messages import (
    Ack,
    Exchange,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    IntentOrder,
    Offer,
    Report,
    ReportKind,
    SlotGone,
    Stop,
    Welcome,
    WorkerInfo,
)
from hcna_ray.runtime.parking import Parking, exchange_of
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.renewals import Renewals
from hcna_ray.runtime.reports import ReportDesk
from hcna_ray.runtime.requests import (
    ForgetWorker,
    MarkWorker,
    NodesSeen,
    Pending,
    Reports,
    SendIntent,
)
from hcna_ray.runtime.sessions import Session, Sessions, marked
from hcna_ray.runtime.starts import StartWatch
from hcna_ray.runtime.turn import LATER, Turn
from hcna_ray.store.base import TaskStore

log = logging.getLogger(__name__)

#: How long a drain lets attempts run on when nobody says otherwise.
DRAIN_S = 600.0
#: Pause between two log lines that say that no worker takes work, and between two looks.
WARN_PERIOD_S = 10.0
LOOK_PERIOD_S = 0.5
#: Pause between two log lines about one name that two machines claim.
CLAIMED_PERIOD_S = 60.0
#: A worker's wall clock that is further off than this is worth a line in the log.
CLOCK_OFF_S = 5.0


class Workforce:
    """Every worker, and every call of theirs that waits for work."""

    def __init__(
        self,
        store: TaskStore,
        policy: Policy,
        live: LiveTable,
        dispatcher: Dispatcher,
        reports: ReportDesk,
        starts: StartWatch,
    ) -> None:
        """Start empty; `reset` reads the store."""
        self._store, self._policy, self._starts = store, policy, starts
        self._live, self._dispatcher, self._reports = live, dispatcher, reports
        self._generation = 1
        self.sessions = Sessions(
            suspect_s=2.5 * policy.heartbeat_s,
            ttl_s=policy.lease_ttl_s + policy.lease_grace_s,
            gone_s=policy.gone_after_s,
        )
        #: Sessions that are renewed while the store keeps everything else waiting.
        self.renewals = Renewals(
            store.unconfirmed_s, memory_s=policy.lease_ttl_s - policy.self_stop_s
        )
        #: Heartbeats that renewed a session, since this process began.
        self.renewed = 0
        #: Of which sessions they were told.
        self._allowed = -1
        self._parked = Parking(live, self._cpu_of)
        #: The last answer to each slot, for a repeated exchange.
        self._grants: dict[Place, tuple[str, Grant]] = {}
        #: Orders for calls that are not parked just now.
        self._stops: dict[Place, list[Stop]] = {}
        self._intents: dict[str, list[IntentOrder]] = {}
        self._asked: dict[str, Pending] = {}
        self._warned = self._looked_for_workers = -WARN_PERIOD_S
        #: When the log last said that a name is claimed twice, and that a clock is off.
        self._claimed: dict[str, float] = {}
        self._clock_off: dict[str, float] = {}

    def reset(self, leased: list[Task], now: float, elapsed: float) -> None:
        """Follow the store: whom to wait for, and what must be stopped."""
        self._generation = self._store.generation()
        self.sessions.restore(self._store.workers(), now, elapsed)
        self.take_renewals(elapsed)
        self._stops.clear()
        self._starts.reset()
        self._reports.reset()
        for task in leased:
            if task.cancel_requested_at is not None and task.lease is not None:
                stop = Stop(task.id, task.lease.token, task.lease.slot, "cancel")
                self._order(task.lease.worker, stop)

    def take_renewals(self, elapsed: float) -> None:
        """Count what was renewed from memory, and say which sessions may be from now on.

        Those that this instant finds overdue may not: their leases are about to be taken back.
        """
        same = self._allowed == self.sessions.version
        if same and self.sessions.quiet(elapsed) and not self.renewals.waiting:
            return  # Nobody is overdue who was not at the last look.
        for renewal in self.renewals.take():
            session = self.sessions.find(renewal.beat.worker)
            if session is None or session.closed:
                continue
            if session.record.incarnation == renewal.beat.incarnation:
                self.renewed += 1
                self.sessions.heard(session, renewal.at, renewal.beat.unanswered_s)
        self._allowed = self.sessions.version
        overdue = {session.record.name for session in self.sessions.overdue(elapsed)}
        self.renewals.allow(
            session
            for session in self.sessions
            if not session.closed and session.record.name not in overdue
        )

    def stop(self, command: StopAttempt) -> None:
        """Pass an order on with the next answer to whoever holds the attempt."""
        stop = Stop(command.task_id, command.token, command.slot, command.reason)
        self._order(command.worker, stop)

    def _order(self, worker: str, stop: Stop) -> None:
        place = (worker, stop.slot)
        if place not in self._parked:
            # Busy in full, a slot may not ask for hours. Its agent always does, and passes it on.
            place = (worker, HEAVY_SLOT)
        self._stops.setdefault(place, []).append(stop)

    # -- sessions --------------------------------------------------------------------------------

    def hello(self, turn: Turn, hello: Hello) -> Welcome:
        """Register a worker, or a new life of its agent.

        Raises:
            WorkerNameTaken: another machine is this worker, and in contact.
            StaleWorker: this incarnation has said goodbye.
        """
        known = self.sessions.find(hello.worker)
        fresh = known is None or known.record.incarnation != hello.incarnation
        self.renewals.withdraw(hello.worker)
        if known is not None:
            self._check_claim(turn, known, hello)
        # What the old incarnation's journals held counts before its leases are closed.
        skew = turn.now - hello.sent_at if hello.sent_at else 0.0
        self._reports.apply(turn, hello.reports, skew)
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
            machine_id=hello.machine_id,
            ray_node_id=hello.ray_node_id,
        )
        if known is not None:
            self._note_return(turn, known)
        session = self.sessions.put(record, turn.elapsed)
        self._parked.rank(hello.worker)
        if hello.sent_at:
            session.skews.append(skew)
        turn.writes.append(lambda: self._store.save_worker(record))
        if hello.machine_id and (known is None or known.record.machine_id != hello.machine_id):
            turn.note(hello.worker, "worker.join", hello.address, "done", hello.machine_id)
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

    def _check_claim(self, turn: Turn, known: Session, hello: Hello) -> None:
        """Refuse a hello that must not take the name over."""
        record = known.record
        if record.left_at is not None and record.incarnation == hello.incarnation:
            # On its way since before the goodbye; this incarnation has ended its processes.
            raise StaleWorker(hello.worker, hello.incarnation, None)
        if not record.machine_id or hello.machine_id in ("", record.machine_id):
            return
        if self.sessions.state(known, turn.elapsed) not in AWAY:
            log.error(
                "name %s is taken: %s has it, and the machine at %s wants it too",
                record.name,
                record.address,
                hello.address,
                extra={"action": "worker.name_taken", "worker": record.name},
            )
            raise WorkerNameTaken(record.name, record.address)
        log.warning(
            "%s is another machine now: it was at %s, it is at %s",
            record.name,
            record.address,
            hello.address,
            extra={"action": "worker.moved", "worker": record.name},
        )

    def _note_return(self, turn: Turn, session: Session) -> None:
        """Say that a worker which was thought of as away, or nearly so, is heard again."""
        if not (session.suspected or session.closed):
            return
        session.suspected = False
        silence = turn.elapsed - session.heard
        log.info(
            "%s is back after %.0f s",
            session.record.name,
            silence,
            extra={
                "action": "worker.back",
                "worker": session.record.name,
                "silence_s": round(silence, 1),
            },
        )

    def heartbeat(self, turn: Turn, beat: Heartbeat) -> HeartbeatReply:
        """Renew a session."""
        session = self.sessions.current(beat.worker, beat.incarnation)
        if session is None:
            return HeartbeatReply(known=False)
        if not session.node_missing:
            self._note_return(turn, session)
        self.renewed += 1
        self.sessions.heard(session, turn.elapsed, beat.unanswered_s)
        if beat.sent_at:
            session.skews.append(turn.now - beat.sent_at)
            self._watch_clock(turn, session)
        if beat.trouble != session.trouble:
            self._note_trouble(session, beat.trouble)
        self._reports.apply(
            turn,
            [Report(ReportKind.STARTED, *attempt) for attempt in beat.began],
            session.skew,
        )
        session.telemetry, session.slots = beat.telemetry, beat.slots
        session.record = dataclasses.replace(session.record, last_seen_at=turn.now)
        return HeartbeatReply(known=True)

    def _watch_clock(self, turn: Turn, session: Session) -> None:
        name, ahead = session.record.name, -session.skew
        last = self._clock_off.get(name)
        if abs(ahead) < CLOCK_OFF_S or (last is not None and turn.elapsed - last < 3600.0):
            return
        self._clock_off[name] = turn.elapsed
        log.warning(
            "the clock of %s is %.0f s %s; only M1's clock decides when tasks expire",
            name,
            abs(ahead),
            "ahead" if ahead > 0 else "behind",
            extra={"action": "worker.clock_off", "worker": name, "ahead_s": round(ahead, 1)},
        )

    def _note_trouble(self, session: Session, trouble: str) -> None:
        name = session.record.name
        session.trouble = trouble
        if trouble:
            log.error(
                "%s %s: it gets no work",
                name,
                trouble,
                extra={"action": "worker.trouble", "worker": name},
            )
        else:
            log.info("%s works again", name, extra={"action": "worker.recovered", "worker": name})

    def goodbye(self, turn: Turn, bye: Goodbye) -> Ack:
        """A worker was stopped in good order. Raises `StaleWorker`."""
        session = self.sessions.find(bye.worker)
        if session is None:
            return self._reports.apply(turn, bye.reports)
        if session.record.incarnation != bye.incarnation:
            raise StaleWorker(bye.worker, bye.incarnation, session.record.incarnation)
        ack = self._reports.apply(turn, bye.reports, session.skew)
        name = session.record.name
        self.renewals.withdraw(name)
        if session.record.left_at is not None:
            return ack  # Told twice.
        taken = self._close_leases(
            turn, name, f"{name} was stopped in good order", worker_gone=True, counted=False
        )
        self._drop_parked(turn, name)
        session.closed = True
        session.record = dataclasses.replace(
            session.record, left_at=turn.now, asleep_at=None, last_seen_at=turn.now
        )
        session.heard = session.renewed = turn.elapsed
        self._save(turn, session.record)
        log.info(
            "%s left in good order; %d attempts taken back",
            name,
            taken,
            extra={"action": "worker.left", "worker": name, "attempts": taken},
        )
        return ack

    def forget(self, turn: Turn, request: ForgetWorker) -> WorkerInfo:
        """Strike a worker off the record. Raises `NotFound`, `WorkerOnline`."""
        session = self.sessions.find(request.name)
        if session is None:
            raise NotFound("worker", request.name)
        name = session.record.name
        state = self.sessions.state(session, turn.elapsed)
        if state not in AWAY and not request.force:
            raise WorkerOnline(name, state.value)
        info = self.info(session, turn.elapsed)
        info = dataclasses.replace(info, waiting=self._waiting_for(session.record))
        self.renewals.withdraw(name)
        # Nobody waits for it any more, whatever a task's on_disconnect says.
        self._close_leases(turn, name, f"{name} was forgotten", worker_gone=False, counted=False)
        self._drop_parked(turn, name)
        self.sessions.drop(name)
        self._claimed.pop(name, None)
        self._clock_off.pop(name, None)
        turn.writes.append(lambda: self._store.forget_worker(name))
        turn.note(request.principal, "worker.forget", name, "done")
        log.info("%s is forgotten", name, extra={"action": "worker.forgotten", "worker": name})
        return info

    def _waiting_for(self, record: WorkerRecord) -> int:
        """Count what will wait for a worker that is forgotten: for it alone, or for its return."""
        names = (record.name, record.node_id)
        ready = self._store.ready_lanes().items()
        held = self._live.on_worker(record.name)
        return sum(count for lane, count in ready if lane.needs.worker in names) + sum(
            task.spec.needs.worker in names for task in held
        )

    def _save(self, turn: Turn, record: WorkerRecord) -> None:
        turn.writes.append(lambda: self._store.save_worker(record))

    def nodes_seen(self, turn: Turn, seen: NodesSeen) -> None:
        """Take Ray's hint: a worker whose node is dead gets no new work, from now on.

        Its parked calls are dead too, most likely, and what they would be granted is lost.
        """
        claims: dict[str, dict[str, str]] = {}
        for node in seen.nodes:
            claims.setdefault(node.worker, {})[node.ray_node_id] = node.address
        for session in self.sessions:
            record = session.record
            if record.ray_node_id and not session.closed:
                missing = record.ray_node_id not in claims.get(record.name, {})
                if missing != session.node_missing:
                    session.node_missing = missing
                    self.sessions.look_again()
        for name, nodes in claims.items():
            self._warn_of_claims(turn, name, nodes)

    def _warn_of_claims(self, turn: Turn, name: str, nodes: dict[str, str]) -> None:
        last = self._claimed.get(name)
        # One machine whose node was restarted a moment ago is listed twice as well.
        if len(set(nodes.values())) < 2 or (
            last is not None and turn.elapsed - last < CLAIMED_PERIOD_S
        ):
            return
        self._claimed[name] = turn.elapsed
        session = self.sessions.find(name)
        holder = None if session is None else nodes.get(session.record.ray_node_id)
        log.error(
            "name %s is claimed by two machines: %s",
            name,
            " and ".join(sorted(set(nodes.values()))),
            extra={
                "action": "worker.name_claimed_twice",
                "worker": name,
                "kept": holder or "the first that says hello",
            },
        )

    def mark(self, turn: Turn, request: MarkWorker) -> WorkerInfo:
        """Drain, cordon or uncordon. Raises `NotFound`."""
        session = self.sessions.find(request.name)
        if session is None:
            raise NotFound("worker", request.name)
        until = session.record.draining_until
        cordoned = session.record.cordoned
        match request.action:
            case "drain":
                until = turn.now + (DRAIN_S if request.deadline_s is None else request.deadline_s)
            case "cordon":
                cordoned = True
            case _:
                cordoned, until = False, None
        record = marked(session.record, cordoned=cordoned, draining_until=until)
        session.record = record
        turn.writes.append(lambda: self._store.save_worker(record))
        turn.note(request.principal, f"worker.{request.action}", record.name, "done")
        return self.info(session, turn.elapsed)

    def send_intent(self, turn: Turn, pending: Pending, request: SendIntent) -> object:
        """Hand an intent to a worker's agent. Raises `NotFound`, `WorkerUnavailable`."""
        session = self.sessions.find(request.worker)
        if session is None:
            raise NotFound("worker", request.worker)
        state = self.sessions.state(session, turn.elapsed)
        name = session.record.name
        if state in AWAY:
            age = age_in_words(turn.elapsed - session.heard)
            raise WorkerUnavailable(
                f"worker {name} is {state.value}, last seen {age} ago; ask again when it is back",
                10,
            )
        self._asked[str(request.envelope["msg_id"])] = pending
        self._intents.setdefault(name, []).append(IntentOrder(request.envelope))
        intent = str(request.envelope["intent"])
        turn.note(request.principal, "intent.send", name, "sent", intent)
        return LATER

    def take_reports(self, turn: Turn, request: Reports) -> Ack:
        """Apply reports that a slot sent between two exchanges. Raises `StaleWorker`."""
        session = self.sessions.current(request.worker, request.incarnation)
        return self._reports.apply(turn, request.reports, _skew(session))

    # -- exchanges -------------------------------------------------------------------------------

    def exchange(self, turn: Turn, pending: Pending, exchange: Exchange) -> object:
        """Take what a slot or agent delivers; park it until there is work."""
        place = (exchange.worker, exchange.slot)
        session = self.sessions.current(exchange.worker, exchange.incarnation)
        if session is None:
            return Grant(seq=exchange.seq, hello=True)
        for msg_id, answer in exchange.answers:
            asked = self._asked.pop(msg_id, None)
            if asked is not None:
                turn.answers.append((asked, dict(answer)))
        self._reports.apply(turn, exchange.reports, session.skew)
        previous = self._parked.pop(place)
        if previous is not None:  # Its call was given up by the slot; nobody reads this answer.
            turn.answers.append((previous, Grant(seq=exchange_of(previous).seq)))
        repeated = self._repeated(turn, exchange)
        if repeated is not None:
            return repeated
        if exchange.slot != HEAVY_SLOT:
            self._settle_slot(turn, exchange)
        self._parked.put(place, pending)
        return LATER

    def _renewed(self, turn: Turn, grant: Grant) -> Grant:
        """Return a grant as it is now: of the seconds until an expiry some have passed.

        What was taken back since, or is being asked back, must not begin: the slot that moves on
        without it says so by that.
        """
        offers: list[Offer] = []
        for offer in grant.offers:
            task = turn.ledger.get(offer.task_id)
            if task is None or task.lease is None or task.lease.token != offer.token:
                continue
            if not self._starts.is_asked_for(task):
                offers.append(self._dispatcher.offer(task, turn.now))
        return dataclasses.replace(grant, offers=tuple(offers))

    def _repeated(self, turn: Turn, exchange: Exchange) -> Grant | None:
        """Return the answer that this exchange was given before, if it was."""
        place = (exchange.worker, exchange.slot)
        last = self._grants.get(place)
        if last is not None and last[0] == exchange.incarnation:
            if last[1].seq == exchange.seq:
                return self._renewed(turn, last[1])
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
            and not self._starts.is_asked_for(task)
        ]
        if not granted:
            return None
        offers = tuple(self._dispatcher.offer(task, turn.now) for task in granted)
        return Grant(seq=exchange.seq, offers=offers)

    def _settle_slot(self, turn: Turn, exchange: Exchange) -> None:
        """Take back what a slot that asks again does not know of any more."""
        holding = {(task_id, Token(*token)) for task_id, token in exchange.holding}
        for task_id in [task.id for task in self._live.in_slot(exchange.worker, exchange.slot)]:
            task = turn.ledger.get(task_id)
            if task is None or task.lease is None or task.lease.slot != exchange.slot:
                continue
            if task.lease.worker != exchange.worker or task.lease.grant_seq >= exchange.seq:
                continue
            if (task.id, task.lease.token) in holding:
                continue
            self._take_back(turn, task, "the slot moved on without it", FailureKind.LOST)

    def slot_gone(self, turn: Turn, gone: SlotGone) -> Ack:
        """Take back what a dead process held."""
        session = self.sessions.current(gone.worker, gone.incarnation)
        ack = self._reports.apply(turn, gone.reports, _skew(session))
        place = (gone.worker, gone.slot)
        parked = self._parked.pop(place)
        if parked is not None:
            turn.answers.append((parked, Grant(seq=exchange_of(parked).seq)))
        if gone.slot == HEAVY_SLOT:  # One attempt's process; the agent itself goes on asking.
            return ack
        self._grants.pop(place, None)
        self._stops.pop(place, None)
        for live in self._live.in_slot(*place):
            task = turn.ledger.get(live.id)
            if task is None or task.lease is None or task.lease.incarnation != gone.incarnation:
                continue
            if (task.lease.worker, task.lease.slot) != place:
                continue
            if task.lease.started_at is None and self._starts.is_asked_for(task):
                why = f"the slot of {gone.worker} that was to start it was stuck"
                turn.ledger.step(task, self._starts.returned(task, why, turn.now))
            else:
                self._take_back(turn, task, "the slot's process ended", FailureKind.POISON)
        return ack

    def _take_back(
        self,
        turn: Turn,
        task: Task,
        why: str,
        kind: FailureKind,
        *,
        worker_gone: bool = False,
        counted: bool = True,
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
                at=turn.now,
                token=lease.token,
                kind=kind,
                message=why,
                worker_gone=worker_gone,
                counted=counted,
            ),
        )

    def _close_leases(
        self,
        turn: Turn,
        worker: str,
        why: str,
        *,
        keep_incarnation: str | None = None,
        worker_gone: bool,
        counted: bool = True,
    ) -> int:
        """Take back what a worker holds; return how many leases that were."""
        taken = 0
        for live in self._live.on_worker(worker):
            task = turn.ledger.get(live.id)
            if task is None or task.lease is None or task.lease.worker != worker:
                continue
            if task.lease.incarnation != keep_incarnation:
                taken += 1
                self._take_back(
                    turn,
                    task,
                    why,
                    FailureKind.LOST,
                    worker_gone=worker_gone,
                    counted=counted,
                )
        return taken

    def hang_up(self, refused: Set[Pending]) -> None:
        """Let no call wait on that has just been refused: it would be answered a second time."""
        for place in [place for place, call in self._parked.items() if call in refused]:
            self._parked.pop(place)
        for msg_id, pending in list(self._asked.items()):
            if pending in refused:
                del self._asked[msg_id]
                for orders in self._intents.values():
                    orders[:] = [one for one in orders if one.envelope["msg_id"] != msg_id]

    def _drop_parked(self, turn: Turn, worker: str) -> None:
        for place in self._parked.of(worker):
            turn.answers.append((self._parked[place], StaleWorker(worker, "", None)))
            self._parked.pop(place)
        for place in [place for place in self._grants if place[0] == worker]:
            del self._grants[place]

    # -- time ------------------------------------------------------------------------------------

    def keep_house(self, turn: Turn) -> None:
        """Give up on starts and calls that take too long, on intents; end drains."""
        for session in self.sessions:
            self._end_drain(turn, session)
        self._watch_starts(turn)
        for place, pending in list(self._parked.items()):
            if turn.elapsed - pending.arrived > self._policy.exchange_wait_s:
                self._parked.pop(place)
                self._answer_exchange(turn, place, pending, Grant(seq=exchange_of(pending).seq))
        for msg_id, pending in list(self._asked.items()):
            request = pending.request
            if isinstance(request, SendIntent) and (
                turn.elapsed - pending.arrived > request.wait_s
            ):
                del self._asked[msg_id]
                error = WorkerUnavailable(f"{request.worker} did not answer in time", 5)
                turn.answers.append((pending, error))

    def _watch_starts(self, turn: Turn) -> None:
        """Ask for what should have begun by now; take back what nobody answers for."""
        in_contact = {
            session.record.name
            for session in self.sessions
            if not session.closed
            and self.sessions.state(session, turn.elapsed) is not WorkerState.SUSPECT
        }
        overdue = self._starts.look(
            self._live.tasks.values(), in_contact.__contains__, turn.elapsed
        )
        for found, reason, given_up in overdue:
            task = turn.ledger.get(found.id)
            if task is None or task.lease is None or task.lease != found.lease:
                continue  # Something has happened to it in this very batch.
            lease = task.lease
            self._order(lease.worker, Stop(task.id, lease.token, lease.slot, reason))
            log.warning(
                "an attempt does not start",
                extra={
                    "action": "attempt.unstarted",
                    **names_of(task.id, lease.token.attempt, task.spec.traceparent),
                    "worker": lease.worker,
                    "taken_back": given_up,
                },
            )
            if given_up:
                why = f"{lease.worker} did not start it and did not say why"
                turn.ledger.step(task, self._starts.returned(task, why, turn.now))

    def watch_sessions(self, turn: Turn) -> None:
        """Say which workers have fallen silent, and take back what the silent hold."""
        if self.sessions.quiet(turn.elapsed):
            return
        for session in self.sessions:
            if session.suspected or session.closed:
                continue
            if self.sessions.state(session, turn.elapsed) in (
                WorkerState.SUSPECT,
                WorkerState.ASLEEP,
                WorkerState.GONE,
            ):
                self._suspect(turn, session)
        for session in self.sessions.overdue(turn.elapsed):
            self._lose(turn, session)
        self.sessions.looked(turn.elapsed)

    def _suspect(self, turn: Turn, session: Session) -> None:
        session.suspected = True
        silence = turn.elapsed - session.heard
        log.warning(
            "health check failed",
            extra={
                "action": "worker.suspect",
                "worker": session.record.name,
                "silence_s": round(silence, 1),
                "why": "Ray reports its node as dead" if session.node_missing else "no heartbeat",
            },
        )

    def _end_drain(self, turn: Turn, session: Session) -> None:
        """A drain's time is up: stop what still runs, so that it moves to another worker."""
        until = session.record.draining_until
        if until is None or turn.now < until or session.drained == until:
            return
        session.drained = until
        for task in self._live.on_worker(session.record.name):
            if task.lease is not None:
                stop = Stop(task.id, task.lease.token, task.lease.slot, "drain")
                self._order(session.record.name, stop)

    def _lose(self, turn: Turn, session: Session) -> None:
        name = session.record.name
        silence = turn.elapsed - session.heard
        why = f"{name} was silent for {silence:.0f} s"
        taken = self._close_leases(turn, name, why, worker_gone=True)
        session.closed = True
        session.record = dataclasses.replace(session.record, asleep_at=turn.now)
        self._save(turn, session.record)
        self._drop_parked(turn, name)
        log.warning(
            "%s is asleep: its %d attempts go to others",
            name,
            taken,
            extra={
                "action": "worker.asleep",
                "worker": name,
                "silence_s": round(silence, 1),
                "attempts": taken,
            },
        )

    # -- handing out work ------------------------------------------------------------------------

    def grant(self, turn: Turn, paused: frozenset[str]) -> dict[Place, tuple[Offer, ...]]:
        """Lease ready tasks to the calls that are parked."""
        if not self._parked or not self._dispatcher.any_ready(turn.ledger):
            # Whatever was left over waits for a call now, and that comes in a batch of its own.
            self._dispatcher.unfinished = False
            return {}
        roster = _Roster(self, turn)
        return self._dispatcher.dispatch(
            turn.ledger, roster, self._parked, paused, self._generation, turn.now
        )

    def warn_if_nobody_works(self, turn: Turn, *, waiting: bool) -> None:
        """Say in the log, now and then, that ready tasks have nobody to go to.

        Args:
            turn: The batch.
            waiting: Whether a task stands in the dispatch index.
        """
        since = max(self._warned + WARN_PERIOD_S, self._looked_for_workers + LOOK_PERIOD_S)
        if not waiting or turn.elapsed < since:
            return
        self._looked_for_workers = turn.elapsed
        views = self.views(turn.elapsed, turn.ledger)
        if any(view.state in ACCEPTING and not view.trouble for view in views):
            return
        self._warned = turn.elapsed
        log.warning(
            "No healthy workers available",
            extra={
                "action": "scheduler.no_workers",
                "workers": {view.name: view.state.value for view in views},
            },
        )

    def answer_parked(self, turn: Turn, granted: dict[Place, tuple[Offer, ...]]) -> None:
        """Answer the calls for which there is something: leases, stops or intents."""
        agents = [(worker, HEAVY_SLOT) for worker in self._intents]
        for place in dict.fromkeys((*granted, *self._stops, *agents)):
            pending = self._parked.get(place)
            if pending is None:
                continue
            worker, slot = place
            offers = granted.get(place, ())
            stops = tuple(self._stops.get(place, ()))
            intents: tuple[IntentOrder, ...] = ()
            if slot == HEAVY_SLOT:
                intents = tuple(self._intents.get(worker, ()))
            if offers or stops or intents:
                grant = Grant(
                    seq=exchange_of(pending).seq, offers=offers, stops=stops, intents=intents
                )
                self._answer_exchange(turn, place, pending, grant)

    def _answer_exchange(
        self, turn: Turn, place: tuple[str, int], pending: Pending, grant: Grant
    ) -> None:
        """Answer a parked call, once the batch is committed, and remember what it was told."""
        turn.answers.append((pending, grant))

        def settled() -> None:
            self._parked.pop(place)
            self._grants[place] = (exchange_of(pending).incarnation, grant)
            if grant.stops:
                self._stops.pop(place, None)
            if grant.intents:
                self._intents.pop(place[0], None)

        turn.effects.append(settled)

    # -- looking in ------------------------------------------------------------------------------

    def views(self, elapsed: float, ledger: Ledger | None = None) -> list[WorkerView]:
        """Return every worker as a scheduling decision sees it."""
        return [self._view(session, elapsed, ledger) for session in self.sessions]

    def view(self, name: str, turn: Turn) -> WorkerView | None:
        """Return one worker as a batch's scheduling decision sees it."""
        session = self.sessions.find(name)
        return None if session is None else self._view(session, turn.elapsed, turn.ledger)

    def _cpu_of(self, name: str) -> float:
        session = self.sessions.find(name)
        return 0.0 if session is None else session.record.cpu

    def _view(self, session: Session, elapsed: float, ledger: Ledger | None = None) -> WorkerView:
        name = session.record.name
        return self.sessions.view(
            session, elapsed, self._live.count(name), self._live.used(name, ledger)
        )

    def info(self, session: Session, elapsed: float) -> WorkerInfo:
        """Return one worker for people."""
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
            last_seen_age_s=max(0.0, elapsed - session.heard),
            resources=totals,
            free={name: view.free(name) for name in names},
            labels=dict(record.labels),
            task_types=record.task_types,
            slots=session.slots,
            running=tuple(running),
            telemetry=session.telemetry,
            draining_until=record.draining_until,
            address=record.address,
            trouble=session.trouble,
            clock_ahead_s=round(-session.skew, 3),
        )


def _skew(session: Session | None) -> float:
    return 0.0 if session is None else session.skew


class _Roster:
    """The workers as a batch sees them, each looked at once, when it is asked for."""

    def __init__(self, workforce: Workforce, turn: Turn) -> None:
        self._workforce, self._turn = workforce, turn
        self._views: dict[str, WorkerView | None] = {}

    @property
    def version(self) -> int:
        return self._workforce.sessions.version

    def names(self) -> Iterable[str]:
        return [session.record.name for session in self._workforce.sessions]

    def view(self, name: str) -> WorkerView | None:
        if name not in self._views:
            self._views[name] = self._workforce.view(name, self._turn)
        return self._views[name]

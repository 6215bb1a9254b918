"""Worker sessions: who is here, when it was last heard of, and what it said of itself.

A session is renewed by heartbeats, in memory. Only the `WorkerRecord` is durable, so that a new
moderator knows whom to wait for: a session that was open gets one full lease time, one that was
closed stays closed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hcna_ray.core.errors import StaleWorker
from hcna_ray.core.models import Needs, WorkerRecord, WorkerState, WorkerView

#: Heartbeats over which the difference between a worker's wall clock and ours is watched.
SKEWS_KEPT = 12


@dataclass(slots=True)
class Session:
    """One worker as the moderator knows it now."""

    record: WorkerRecord
    #: When it was heard last, on the moderator's own clock that never steps.
    heard: float
    #: The instant from which its leases count: that of the last heartbeat which it knows was
    #: answered. A worker that is heard but hears nothing is about to stop what it runs.
    renewed: float
    #: Its leases were taken back: it was silent for too long, or said goodbye.
    closed: bool = False
    #: Whether Ray says that the worker's node is dead or not there. A hint: it ends no lease.
    node_missing: bool = False
    #: Whether the log has said that it is suspect.
    suspected: bool = False
    #: Why it can run nothing although it is there.
    trouble: str = ""
    #: Our wall clock minus the worker's, as heartbeats arrived.
    skews: deque[float] = field(default_factory=lambda: deque(maxlen=SKEWS_KEPT))
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 0
    #: The end of the drain for which attempts have been told to stop.
    drained: float | None = None

    @property
    def skew(self) -> float:
        """What to add to an instant of the worker's wall clock to have it on ours.

        The smallest of late: a message can take long, but never arrives before it was sent.
        """
        return min(self.skews, default=0.0)


class Sessions:
    """All workers by name."""

    def __init__(self, *, suspect_s: float, ttl_s: float, gone_s: float) -> None:
        """Start empty.

        Args:
            suspect_s: Silence after which a worker gets no new work.
            ttl_s: Silence after which its leases are taken back.
            gone_s: Silence after which nobody expects it back.
        """
        self._suspect_s, self._ttl_s, self._gone_s = suspect_s, ttl_s, gone_s
        #: One more heartbeat: what it knows was answered is one behind what was heard.
        self._unanswered_s = 1.4 * suspect_s
        self._by_name: dict[str, Session] = {}
        self._node_ids: dict[str, str] = {}
        #: Until then silence alone changes nothing; it may be later, and is found out by a look.
        self._quiet_until = -math.inf
        #: Raised whenever a session begins, ends, or is another's.
        self.version = 0

    def restore(self, records: Iterable[WorkerRecord], now: float, elapsed: float) -> None:
        """Follow the store: what was decided and not committed has not happened.

        A worker that is new here and was not away gets one full lease time to call.

        Args:
            records: What the store remembers.
            now: The instant: on it alone the time of a worker that is away can go on.
            elapsed: The same on the clock that never steps.
        """
        before, self._by_name = self._by_name, {}
        for record in records:
            closed = record.asleep_at is not None or record.left_at is not None
            session = before.get(record.name)
            if session is None:
                silence = max(0.0, now - record.last_seen_at) if closed else 0.0
                session = Session(record, elapsed - silence, elapsed - silence)
            session.record, session.closed = record, closed
            self._by_name[record.name] = session
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._node_ids = {name: one.record.node_id for name, one in self._by_name.items()}
        self.look_again()

    def look_again(self) -> None:
        """Something other than silence has changed what is thought of a worker."""
        self._quiet_until = -math.inf

    def quiet(self, elapsed: float) -> bool:
        """Whether nothing has changed by silence since the last `looked`. Costs nothing."""
        return elapsed < self._quiet_until

    def quiet_s(self, elapsed: float) -> float:
        """Return for how long that will stay so at least."""
        return max(0.0, self._quiet_until - elapsed)

    def looked(self, elapsed: float) -> None:
        """Whatever silence has changed until now has been dealt with."""
        self._quiet_until = elapsed + self.next_change_s(elapsed)

    def heard(self, session: Session, at: float, unanswered_s: float) -> None:
        """Renew a session.

        Args:
            session: Whose worker called.
            at: When.
            unanswered_s: How long before that it had made the last call that was answered.
        """
        session.heard = max(session.heard, at)
        session.renewed = max(session.renewed, at - unanswered_s)
        # Of one that had been silent nothing was expected any more.
        self._quiet_until = min(
            self._quiet_until,
            session.heard + self._suspect_s,
            session.renewed + min(self._unanswered_s, self._ttl_s),
        )

    def __iter__(self) -> Iterator[Session]:
        return iter(sorted(self._by_name.values(), key=lambda one: one.record.name))

    def find(self, name: str) -> Session | None:
        """Return a worker by short name or node id."""
        session = self._by_name.get(name)
        if session is not None:
            return session
        for other in self._by_name.values():
            if other.record.node_id == name:
                return other
        return None

    def put(self, record: WorkerRecord, elapsed: float) -> Session:
        """Register a worker, or renew what is known of it."""
        session = self._by_name.get(record.name)
        if session is None:
            session = self._by_name[record.name] = Session(record, elapsed, elapsed)
        session.record, session.closed = record, False
        session.heard = session.renewed = elapsed
        session.node_missing = session.suspected = False
        session.skews.clear()
        self._changed()
        return session

    def drop(self, name: str) -> None:
        """Forget a worker."""
        self._by_name.pop(name, None)
        self._changed()

    def current(self, worker: str, incarnation: str) -> Session | None:
        """Return the session a call belongs to; ``None`` when the worker must say hello first.

        Raises:
            StaleWorker: a newer incarnation has taken the name.
        """
        session = self._by_name.get(worker)
        if session is None or session.closed:
            return None
        if session.record.incarnation != incarnation:
            raise StaleWorker(worker, incarnation, session.record.incarnation)
        return session

    def state(self, session: Session, elapsed: float) -> WorkerState:
        """Return what the moderator thinks of a worker now."""
        silence, unanswered = elapsed - session.heard, elapsed - session.renewed
        if session.record.left_at is not None or silence > self._gone_s:
            return WorkerState.GONE
        if session.closed or unanswered > self._ttl_s:
            return WorkerState.ASLEEP
        if silence > self._suspect_s or unanswered > self._unanswered_s or session.node_missing:
            return WorkerState.SUSPECT
        if session.record.draining_until is not None:
            return WorkerState.DRAINING
        if session.record.cordoned:
            return WorkerState.CORDONED
        return WorkerState.ONLINE

    def overdue(self, elapsed: float) -> list[Session]:
        """Return sessions whose silence has just exceeded the lease."""
        return [
            one
            for one in self._by_name.values()
            if not one.closed and elapsed - one.renewed > self._ttl_s
        ]

    def next_change_s(self, elapsed: float) -> float:
        """Return how long until silence alone changes what is thought of some worker."""
        waits = [
            limit - (elapsed - since)
            for one in self._by_name.values()
            if not one.closed
            for limit, since in (
                (self._suspect_s, one.heard),
                (self._unanswered_s, one.renewed),
                (self._ttl_s, one.renewed),
            )
        ]
        return min((wait for wait in waits if wait >= 0.0), default=math.inf)

    def view(self, session: Session, elapsed: float, live: int, used: Needs) -> WorkerView:
        """Return the worker as a scheduling decision sees it.

        Args:
            session: Whose.
            elapsed: Now, on the moderator's clock that never steps.
            live: Leases it holds.
            used: What its heavy attempts hold of it.
        """
        record = session.record
        return WorkerView(
            name=record.name,
            node_id=record.node_id,
            state=self.state(session, elapsed),
            cpu=record.cpu,
            mem_gb=record.mem_gb,
            gpu=record.gpu,
            resources=record.resources,
            labels=record.labels,
            task_types=frozenset(record.task_types),
            used=used,
            live=live,
            last_seen_age_s=max(0.0, elapsed - session.heard),
            trouble=session.trouble,
        )

    def node_ids(self) -> dict[str, str]:
        """Return the node id of every worker, by short name."""
        return self._node_ids


def marked(record: WorkerRecord, *, cordoned: bool, draining_until: float | None) -> WorkerRecord:
    """Return the record with another scheduling mark."""
    return dataclasses.replace(record, cordoned=cordoned, draining_until=draining_until)

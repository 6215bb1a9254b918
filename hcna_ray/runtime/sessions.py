"""Worker sessions: who is here, when it was last heard of, and what it said of itself.

A session is renewed by heartbeats, in memory. Only the `WorkerRecord` is durable, so that a new
moderator knows whom to wait for: every session it restores gets one full lease time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hcna_ray.core.errors import StaleWorker
from hcna_ray.core.models import Needs, WorkerRecord, WorkerState, WorkerView


@dataclass(slots=True)
class Session:
    """One worker as the moderator knows it now."""

    record: WorkerRecord
    #: On the moderator's own clock that never steps.
    renewed: float
    #: Heartbeats have stopped for longer than the lease; its leases were taken back.
    gone: bool = False
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 0
    #: The end of the drain for which attempts have been told to stop.
    drained: float | None = None


class Sessions:
    """All workers by name."""

    def __init__(self, *, suspect_s: float, ttl_s: float) -> None:
        """Start empty.

        Args:
            suspect_s: Silence after which a worker gets no new work.
            ttl_s: Silence after which its leases are taken back.
        """
        self._suspect_s, self._ttl_s = suspect_s, ttl_s
        self._by_name: dict[str, Session] = {}

    def restore(self, records: Iterable[WorkerRecord], elapsed: float) -> None:
        """Give every worker on record one full lease time to call."""
        self._by_name = {record.name: Session(record, elapsed) for record in records}

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
            session = self._by_name[record.name] = Session(record, elapsed)
        session.record, session.renewed, session.gone = record, elapsed, False
        return session

    def current(self, worker: str, incarnation: str) -> Session | None:
        """Return the session a call belongs to; ``None`` when the worker must say hello first.

        Raises:
            StaleWorker: a newer incarnation has taken the name.
        """
        session = self._by_name.get(worker)
        if session is None or session.gone:
            return None
        if session.record.incarnation != incarnation:
            raise StaleWorker(worker, incarnation, session.record.incarnation)
        return session

    def state(self, session: Session, elapsed: float) -> WorkerState:
        """Return what the moderator thinks of a worker now."""
        silence = elapsed - session.renewed
        if session.gone or silence > self._ttl_s:
            return WorkerState.GONE
        if silence > self._suspect_s:
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
            if not one.gone and elapsed - one.renewed > self._ttl_s
        ]

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
        )

    def node_ids(self) -> dict[str, str]:
        """Return the node id of every worker, by short name."""
        return {name: one.record.node_id for name, one in self._by_name.items()}


def marked(record: WorkerRecord, *, cordoned: bool, draining_until: float | None) -> WorkerRecord:
    """Return the record with another scheduling mark."""
    return dataclasses.replace(record, cordoned=cordoned, draining_until=draining_until)

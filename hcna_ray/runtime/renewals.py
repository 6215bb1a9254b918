"""Heartbeats while the store keeps the moderator waiting: answered from memory, as long as safe.

A commit may take long (a slow disk, a database that is away), and a worker that hears nothing for
``self_stop_s`` stops what it runs. Renewing its session needs nothing from the store, so it goes on
meanwhile: no lease is given, taken or ended by it, and no task moves.

**What is safe.** While the store is away nobody here can know whether another moderator has taken
it over. One that did gives every session a whole lease (``ttl_s + grace_s``) from its takeover,
which is later than the last instant at which the store was certainly ours
(`TaskStore.unconfirmed_s`). A worker that is answered now runs on for at most ``self_stop_s`` and
the time from SIGTERM to SIGKILL, ``grace_s``. So answers from memory end ``ttl_s - self_stop_s``
after that instant: then the worker has stopped before its tasks are given away, whoever does so.
Where nobody can take the store over (SQLite) they do not end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hcna_ray.runtime.messages import Heartbeat, HeartbeatReply
from hcna_ray.runtime.sessions import Session


@dataclass(frozen=True, slots=True)
class Renewal:
    """A heartbeat that was answered from memory, and when."""

    beat: Heartbeat
    at: float


class Renewals:
    """Which sessions may be renewed now, and which were. Used from two threads.

    Invariant: no session whose leases the current batch takes back because of silence is in the
    table, so what is answered here counts as answered before the batch, or after it.
    """

    def __init__(self, unconfirmed_s: Callable[[], float], *, memory_s: float) -> None:
        """Start with no session.

        Args:
            unconfirmed_s: How long ago the store was certainly ours; callable from any thread.
            memory_s: How old that may be.
        """
        self._unconfirmed_s, self._memory_s = unconfirmed_s, memory_s
        self._lock = threading.Lock()
        #: Incarnations that hold a session, by worker.
        self._open: dict[str, str] = {}
        self._taken: dict[str, Renewal] = {}

    @property
    def waiting(self) -> bool:
        """Whether anything was answered since the last `take`."""
        return bool(self._taken)

    def take(self) -> list[Renewal]:
        """Return what was answered since the last time; nothing is answered until `allow`."""
        with self._lock:
            taken, self._taken = list(self._taken.values()), {}
            self._open = {}
        return taken

    def allow(self, sessions: Iterable[Session]) -> None:
        """Say which sessions may be renewed until the next `take`."""
        with self._lock:
            self._open = {one.record.name: one.record.incarnation for one in sessions}

    def withdraw(self, worker: str) -> None:
        """Renew this one no more: something is being decided about it."""
        with self._lock:
            self._open.pop(worker, None)

    def renew(self, beat: Heartbeat, elapsed: float) -> HeartbeatReply | None:
        """Renew a session without the store; ``None`` if that would not be safe.

        Args:
            beat: Of its worker.
            elapsed: Now, on the moderator's clock that never steps.
        """
        with self._lock:
            if self._open.get(beat.worker) != beat.incarnation:
                return None
            if self._unconfirmed_s() > self._memory_s:
                return None
            self._taken[beat.worker] = Renewal(beat, elapsed)
            return HeartbeatReply(known=True)

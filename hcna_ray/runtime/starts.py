"""Attempts that were handed out and should have begun by now.

A grant is a promise of a worker to begin. Several things break it while the worker itself is in
contact, so that its leases would never end. Each is noticed where it happens; what nobody notices
is found here, by the moderator, from the leases alone.

==========================================  ====================================================
what happened                               who notices, and what follows
==========================================  ====================================================
the answer with the grant was lost          the slot asks again with the same number, and is given
                                            the same grant (`Workforce.exchange`)
Ray never starts a slot                     nobody has to: only a slot that asks is granted
no executor can be forked in a slot         likewise: a slot asks once it has one
the slot's process ends                     its agent, which tells so (`SlotGone`)
an executor takes a grant and never begins  its host, which ends it (`SlotHost`)
a handler keeps the interpreter to itself,  this module; the host sees that they do not begin, and
so that what waits behind it is not given   gives them back in the executor's stead
back
Ray never starts a heavy attempt: what it   this module; the agent withdraws the attempt from Ray
needs is taken by somebody else's work
a heavy attempt's process never begins      this module; the agent ends the process
the slot's host is stuck                    this module; nobody answers, and the agent ends the
                                            slot, and tells so
the word of a start is lost                 the next heartbeat: it names all that runs
agent or worker do not answer at all        the session: its silence ends all its leases
==========================================  ====================================================

An order comes before the fence, because the worker knows better what has begun: an attempt that
runs is never handed out a second time only because word of it is late. Nor is one that might still
begin: a worker in contact is asked, again and again, to end what was to run it, and it goes to
others when that is done. Only of a worker that beats its heart and does nothing else for a whole
minute it is taken without its word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from hcna_ray.core.events import LeaseReturned
from hcna_ray.core.models import HEAVY_SLOT, Task, Token
from hcna_ray.runtime.messages import STUCK, UNSTARTED

#: A process of its own takes longer to begin: Ray starts one, and that imports the task types.
HEAVY_PATIENCE = 4
#: Each time a task did not begin it is given twice as long, up to this many times: a machine that
#: is merely slow must not be mistaken for a broken one for ever.
PATIENCE_MAX = 16
#: Handed out this often without ever beginning, a task is given up.
UNSTARTED_MAX = 8
#: How long a worker has to answer before it is told to end what was to run the attempt, and how
#: long between two such orders: one may be lost with the answer that carries it.
ANSWER_S = 10.0
#: How long it has in all before the fence takes its attempt back. Longer than a call that is lost
#: keeps its agent from asking for orders.
FENCE_S = 60.0
#: Two looks further apart than this: the moderator itself stood still, and nobody can be blamed.
LOOK_MAX_S = 3.0
#: Tasks whose starts are counted at once.
COUNTED_MAX = 10_000

_Key = tuple[str, Token]
#: One grant: worker, slot, exchange number. Attempts with a process of their own stand alone.
_Grant = tuple[str, int, int, str]


class Overdue(NamedTuple):
    """An attempt that should have begun."""

    task: Task
    #: What its worker is to be told: `UNSTARTED`, or `STUCK`.
    reason: str
    #: It has been told often enough: the fence takes the attempt back.
    given_up: bool


@dataclass(slots=True)
class _Wait:
    """One grant of which something has not begun."""

    waiting: frozenset[_Key]
    since: float
    asked: dict[_Key, float] = field(default_factory=dict)
    #: How many orders have followed the first.
    orders: dict[_Key, int] = field(default_factory=dict)


class StartWatch:
    """Watches the leases of workers that are in contact. In memory: a new moderator starts over.

    The attempts of one grant begin one after the other, so its clock starts anew whenever one of
    them begins, ends or comes back: of 64 short attempts the last may begin much later than the
    deadline after the grant, as long as the slot goes on.
    """

    def __init__(self, start_s: float) -> None:
        """Start with nothing.

        Args:
            start_s: How long a slot may take to begin an attempt of a grant.
        """
        self._start_s = start_s
        #: Goes on only while the moderator looks.
        self._time = 0.0
        self._looked: float | None = None
        self._waits: dict[_Grant, _Wait] = {}
        #: How often in a row a task did not begin.
        self._counts: dict[str, int] = {}

    def reset(self) -> None:
        """Forget how long anything has waited: the store was read anew."""
        self._waits.clear()

    def is_asked_for(self, task: Task) -> bool:
        """Whether its worker was told that the attempt in force must not begin any more."""
        wait = self._waits.get(_grant(task))
        return wait is not None and _key(task) in wait.asked

    def look(
        self, leased: Iterable[Task], in_contact: Callable[[str], bool], elapsed: float
    ) -> list[Overdue]:
        """Return what should have begun by now.

        Args:
            leased: Every task with a lease.
            in_contact: Whether a worker is heard, by name. Of another nothing is expected: its
                word that something has begun could not arrive.
            elapsed: Now, on the moderator's clock that never steps.
        """
        if self._looked is not None:
            self._time += min(elapsed - self._looked, LOOK_MAX_S)
        self._looked = elapsed
        grants: dict[_Grant, list[Task]] = {}
        for task in leased:
            lease = task.lease
            assert lease is not None
            if lease.started_at is not None:
                self._counts.pop(task.id, None)
            elif in_contact(lease.worker):
                grants.setdefault(_grant(task), []).append(task)
        self._waits = {key: self._follow(key, tasks) for key, tasks in grants.items()}
        return [overdue for key, tasks in grants.items() for overdue in self._overdue(key, tasks)]

    def _follow(self, grant: _Grant, tasks: list[Task]) -> _Wait:
        waiting = frozenset(map(_key, tasks))
        known = self._waits.get(grant)
        if known is None:
            return _Wait(waiting, self._time)
        if known.waiting != waiting:
            asked = {key: at for key, at in known.asked.items() if key in waiting}
            orders = {key: count for key, count in known.orders.items() if key in waiting}
            return _Wait(waiting, self._time, asked, orders)
        return known

    def _overdue(self, grant: _Grant, tasks: list[Task]) -> Iterable[Overdue]:
        wait = self._waits[grant]
        for task in tasks:
            key = _key(task)
            asked_at = wait.asked.get(key)
            if asked_at is None:
                if self._time - wait.since > self._patience(task):
                    wait.asked[key] = self._time
                    yield Overdue(task, UNSTARTED, given_up=False)
                continue
            due = int((self._time - asked_at) / ANSWER_S)
            given_up = self._time - asked_at > FENCE_S
            if given_up or due > wait.orders.get(key, 0):
                wait.orders[key] = due
                yield Overdue(task, STUCK, given_up=given_up)

    def _patience(self, task: Task) -> float:
        lease = task.lease
        assert lease is not None
        longer = HEAVY_PATIENCE if lease.slot == HEAVY_SLOT else 1
        doubled = min(2 ** self._counts.get(task.id, 0), PATIENCE_MAX)
        return float(self._start_s * longer * doubled)

    def returned(self, task: Task, why: str, at: float) -> LeaseReturned:
        """Count that the attempt in force did not begin, and say what becomes of its task."""
        lease = task.lease
        assert lease is not None
        times = self._counts.pop(task.id, 0) + 1
        give_up = times >= UNSTARTED_MAX
        if give_up:
            why = f"handed out {times} times and never started; the last time: {why}"
        else:
            if len(self._counts) >= COUNTED_MAX:
                del self._counts[next(iter(self._counts))]
            self._counts[task.id] = times
        return LeaseReturned(at=at, token=lease.token, reason=why, give_up=give_up)


def _grant(task: Task) -> _Grant:
    lease = task.lease
    assert lease is not None
    alone = task.id if lease.slot == HEAVY_SLOT else ""
    return lease.worker, lease.slot, lease.grant_seq, alone


def _key(task: Task) -> _Key:
    assert task.lease is not None
    return task.id, task.lease.token

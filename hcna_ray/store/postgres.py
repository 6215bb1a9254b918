"""Tasks on a PostgreSQL server: for machines that come and go while the database stays.

Same contract as SQLite's, kept by other means. A commit has been flushed by the server (and by its
synchronous standby, if it has one) when it returns. A batch is three round trips: what must be
known first, everything else in one pipeline, and the commit. One moderator writes: an advisory lock
keeps a second one out while the first lives, and an epoch makes every transaction of one that was
replaced fail, however late it wakes up.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

from hcna_ray import failpoints
from hcna_ray.core.audit import GENESIS, WENT_BACK, AuditPoint, chain_hash
from hcna_ray.core.clock import boottime
from hcna_ray.core.errors import HcnaError, NotFound, StoreUnavailable
from hcna_ray.core.models import (
    OWNER,
    Attempt,
    AuditEntry,
    Fact,
    LaneKey,
    Task,
    TaskFilter,
    TaskState,
    WorkerRecord,
)
from hcna_ray.core.schedules import Schedule
from hcna_ray.store import codec, origin, rows
from hcna_ray.store.base import (
    AuditState,
    Belongs,
    Counter,
    Delivery,
    KeyClaim,
    Settlement,
    StoredAudit,
    StoredFact,
)
from hcna_ray.store.bookkeeping import Bookkeeper, Change, KeyPlace
from hcna_ray.store.generations import generation_above, numbers_to_skip
from hcna_ray.store.migrations import known_migrations, missing_migrations
from hcna_ray.store.postgres_session import (
    Array,
    ConnectionLost,
    Manners,
    Session,
    Statement,
    StoreUnfit,
    blobs,
    floats,
    integers,
    texts,
)
from hcna_ray.store.rows import Row

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Folder of this store's migrations.
SCHEMA = "schema/postgres"
#: Who holds the store is asked for its silence; a live moderator speaks every second.
TAKEOVER_S = 15.0
#: How long opening waits for whoever holds the store.
OPEN_WAIT_S = 20.0
#: The server's settings without which a commit may be forgotten; they can change at any time.
_SAFE = "current_setting('fsync') = 'on' AND current_setting('full_page_writes') = 'on'"
#: Longest time one read of a reader may take.
READ_S_MAX = 5.0
#: How long a commit whose connection broke may stay in doubt until the process must end.
DOUBT_S = 30.0
_POLL_S = 0.1
#: What one statement of a bulk write carries at most (one row may be larger).
_PART_ROWS = 2000
_PART_BYTES = 16 * 1024 * 1024
_SEQ_MAX = 2**63 - 1
#: Numbers that must rise whatever the server remembers.
_NEVER_LOWER = frozenset(
    {"generation", "last_seq", "last_fact", "last_end", "last_audit", "last_settlement"}
)


class StoreInUse(HcnaError):
    """Another process holds the store for writing, and it is alive."""

    code = "store_in_use"

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder

    def __str__(self) -> str:
        return (
            f"the task store is in use by {self.holder}; "
            "stop that one first (hcna down), or wait until it is gone"
        )


class LeadershipLost(OSError):
    """Another process has taken the store over. This one must exit: what it knows is stale."""


class _Holder(NamedTuple):
    pid: int
    #: How long its session has been idle, or ``None`` if that may not be seen.
    silent_s: float | None
    name: str


class PostgresTaskStore(Bookkeeper):
    """The one writer of a PostgreSQL database. Implements `hcna_ray.store.base.TaskStore`.

    A lost connection refuses the batch that met it and is opened again for the next one, as long as
    nobody else has taken the store over meanwhile.
    """

    def __init__(
        self,
        url: str,
        *,
        unsafe: bool = False,
        open_wait_s: float = OPEN_WAIT_S,
        takeover_s: float = TAKEOVER_S,
        doubt_s: float = DOUBT_S,
        manners: Manners | None = None,
        restored: bool = False,
    ) -> None:
        """Connect, become the one writer, and bring the schema up to date.

        Args:
            url: ``postgresql://...`` as libpq reads it.
            unsafe: Take a server that may forget what it has committed.
            open_wait_s: How long to wait for another writer to end, and for a server that is away.
            takeover_s: A writer whose session is idle for so long is disconnected and replaced.
            doubt_s: How long to look for the outcome of a commit whose connection broke.
            manners: Timeouts of the session.
            restored: Take a database that was restored or copied; whoever says so ends its leases,
                calls `renumber`, and then `settle_in`.

        Raises:
            StoreRestored: the database was restored from a dump, or is a copy of another.
            StoreUnfit: the server is too old, may lose commits, or lets this role do too little.
            StoreInUse: another writer is alive.
            SchemaTooNew: a newer hcna-ray wrote the database.
            SchemaChanged: an applied migration was edited.
            StoreUnavailable: the server cannot be reached.
        """
        super().__init__()
        self._url = url
        self._manners = manners or Manners(name="hcna moderator", unsafe=unsafe)
        self._open_wait_s, self._takeover_s, self._doubt_s = open_wait_s, takeover_s, doubt_s
        self._session: Session | None = None
        #: The last session that was the writer's, closed or not.
        self._leading: Session | None = None
        self._pid = 0
        self._epoch = 0
        #: The own epoch, and those taken in a commit whose answer never came.
        self._epochs: set[int] = set()
        self._commits = 0
        #: Transactions that were confirmed, and the numbers that they left.
        self._confirmed = 0
        self._marks: dict[str, int] = {}
        self._unsafe = unsafe
        self._restored = restored
        self._closed = False
        self._broken = False
        #: Whether whoever uses this store must be told that it holds less than before.
        self._went_back = False
        self._queued: list[Statement] = []
        self._begun = False
        end = time.monotonic() + open_wait_s
        while True:
            try:
                self._epochs = set()
                self._connect(max(0.0, end - time.monotonic()))
                break
            except StoreUnavailable:
                if time.monotonic() > end:
                    raise
            time.sleep(_POLL_S)
        self._load()

    def reader(self) -> PostgresTaskReader:
        """Return a reader with a connection of its own."""
        return PostgresTaskReader(self._url)

    def close(self) -> None:
        """Hang up, which lets another writer in. Harmless twice."""
        self._closed = True
        self._hang_up()

    def unconfirmed_s(self) -> float:
        """Return how long ago it was last certain that nobody else writes here.

        The lock goes with the session, so a request that it answered was sent while nobody else had
        the epoch: whoever has taken it since did so later.
        """
        leading = self._leading
        return math.inf if leading is None else boottime() - leading.answered_at

    @property
    def session(self) -> Session:
        """The session of the open transaction, for what is written past the bookkeeping."""
        self._must_write()
        self._drain()
        return self._live()

    # -- leading --------------------------------------------------------------------------------

    def _connect(self, wait_s: float) -> None:
        """Open a session and become the one writer with it.

        Raises:
            LeadershipLost: somebody else became the writer since this store was opened.
        """
        if self._closed:
            raise StoreUnavailable("the task store is closed")
        session = Session(self._url, self._manners)
        try:
            if self._epochs:
                self._check_epoch(session)
            again = bool(self._epochs)
            self._lock(session, time.monotonic() + wait_s)
            if not self._epochs:
                migrate(session)
                origin.prepare(session)
                self._epochs = {epoch for (epoch,) in session.run("SELECT epoch FROM leader")}
            lead = (max(self._epochs), _own_name(), integers(self._epochs))
            _begun, found = session.run_all([Statement("BEGIN"), Statement(_LEAD, lead)])
            if not found:
                raise self._lost()
            self._epochs |= {found[0][0]}
            forgotten = self._confirmed - found[0][1] if again else 0
            if forgotten > 0:
                self._outlive(session, forgotten)
            self._look_around(session, again)
            # Confirmed like any other, so by a synchronous standby too: then what came before is.
            session.commit()
        except BaseException:
            session.close()
            raise
        ((self._epoch, self._commits),) = found
        self._epochs = {self._epoch}
        # What is counted beyond was in doubt, and whoever doubts looks at it before anybody else.
        self._confirmed = self._commits
        self._went_back = self._went_back or forgotten > 0
        self._session = self._leading = session
        self._pid = session.pid

    def _check_epoch(self, session: Session) -> None:
        ((epoch,),) = session.run("SELECT epoch FROM leader")
        if epoch < min(self._epochs):
            self._epochs.add(epoch)  # A server that has forgotten even that: see `_outlive`.
        elif epoch not in self._epochs:
            raise self._lost()

    def _outlive(self, session: Session, forgotten: int) -> None:
        """Go on upon a server that has lost confirmed commits, as upon a restored backup.

        A standby was promoted that was behind, or files were put back. Tokens that it knows nothing
        of may be out, so the generation is raised; numbers that readers have seen stay used.
        """
        marks = {name: n for name, n in self._marks.items() if name in _NEVER_LOWER}
        session.run(_RAISE, (texts(marks), integers(marks.values())))
        told = f"the server has lost {forgotten} confirmed commits: what they held is gone"
        _note(session, told)
        log.critical(
            "%s; the generation is raised",
            told,
            extra={"action": "store.went_back", "forgotten": forgotten},
        )

    def _look_around(self, session: Session, again: bool) -> None:
        """Compare where this database is with where it was when it was last written.

        Whoever has been here before knows by the count of commits what is missing, and vouches for
        the place.
        """
        found = origin.look(session)
        if not again and not self._restored and found.known is not None:
            if how := found.moved():
                raise origin.StoreRestored(how)
            if found.branched():
                told = (
                    f"the server's history has branched (timeline {found.known.timeline}, now "
                    f"{found.now.timeline}), so commits may be lost"
                )
                self._renumber(session, now=time.time(), told=told)
                log.critical(
                    "%s; the generation is raised", told, extra={"action": "store.went_back"}
                )
        if not self._restored:
            found.settle(session)

    def renumber(self, now: float) -> tuple[int, int]:
        """Raise the generation above every one that was ever out, and let the numbers leap.

        What was given out after the point that this database is of is unknown to it; its last fact
        is not younger than that point.

        Args:
            now: Seconds since the epoch.

        Returns:
            The generation before and now.
        """
        with self.transaction():
            numbers = self._renumber(self.session, now=now, told=None)
        self._take_in((), ())
        return numbers

    def _renumber(self, session: Session, *, now: float, told: str | None) -> tuple[int, int]:
        ((before, at),) = session.run(_POINT)
        generation = generation_above([before], created_at=at, now=now)
        skip = numbers_to_skip(created_at=at, now=now)
        session.run(_LEAP, (generation, skip))
        if told is not None:
            _note(session, told)
        return int(before), generation

    def settle_in(self) -> None:
        """Say that this database, wherever it is now, is the one that goes on."""
        with self.transaction():
            origin.look(self.session).settle(self.session)
        self._restored = False

    def last_known_at(self) -> float:
        """Return the instant of the last fact; what is stored is at least of then."""
        ((_generation, at),) = self._run(_POINT)
        return float(at)

    def _lost(self) -> LeadershipLost:
        self._broken = True
        return LeadershipLost(errno.ESTALE, "another moderator has taken the task store over")

    def _lock(self, session: Session, end: float) -> None:
        """Take the lock that goes with the session; disconnect a holder that is not alive."""
        name = f"hcna-ray task store {session.schema}"
        while True:
            ((taken,),) = session.run(
                "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", (name,)
            )
            if taken:
                return
            holder = _holder(session, name)
            if holder is not None:
                silent = holder.silent_s is not None and holder.silent_s >= self._takeover_s
                if silent or holder.pid == self._pid:
                    log.warning(
                        "disconnecting the silent writer of the task store",
                        extra={"action": "store.takeover", "holder": holder.name},
                    )
                    session.run("SELECT pg_terminate_backend(%s::int)", (holder.pid,))
                elif time.monotonic() > end:
                    if self._epochs:
                        raise StoreUnavailable(f"the task store is held by {holder.name}", 2)
                    raise StoreInUse(holder.name)
            time.sleep(_POLL_S)

    # -- transactions ---------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Open the one write transaction; see `TaskStore.transaction`.

        Raises:
            LeadershipLost: another moderator writes now.
            OSError: a commit stays in doubt.
        """
        if self._writing:
            raise RuntimeError("a transaction is open already")
        self._refresh()
        self._begun = False
        opening = [Statement("BEGIN"), Statement(_FENCE, (self._epoch,))]
        self._queued = list(opening)
        self._writing = True
        try:
            yield
            self._flush()
            if self._begun or len(self._queued) > len(opening):
                self._drain()
                self._commit()
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._writing = False
            self._queued = []

    def _commit(self) -> None:
        session = self._live()
        try:
            failpoints.hit("postgres.commit.before")
            session.commit()
        except ConnectionLost as error:
            self._settle(error)
        self._confirmed, self._marks = self._commits, dict(self._numbers)
        failpoints.hit("postgres.commit.after")

    def _settle(self, cause: ConnectionLost) -> None:
        """Find out how a commit ended whose answer was lost, by the count it would have left.

        Taking a new epoch waits for the old session's transaction, so the count is final then.
        """
        log.warning("a commit is in doubt", extra={"action": "store.doubt", "error": str(cause)})
        expected = self._commits
        end = time.monotonic() + self._doubt_s
        while True:
            self._hang_up()
            try:
                self._connect(max(0.0, end - time.monotonic()))
                if self._commits == expected:
                    self._load()
                    return
            except (StoreUnavailable, StoreUnfit) as error:
                if time.monotonic() > end:
                    self._broken = True
                    raise OSError(
                        errno.EIO, f"whether the task store has committed is not known: {error}"
                    ) from cause
            else:
                raise StoreUnavailable(f"nothing was stored: {cause}", 2) from cause
            time.sleep(_POLL_S)

    def _roll_back(self) -> None:
        self._take_in((), ())
        if self._session is not None and not self._session.closed:
            self._session.roll_back()

    def _flush(self) -> None:
        """Queue what was kept in memory until now, once for the whole transaction."""
        numbers, lanes, depth, counts = self._take_changes()
        if numbers:
            values, names = zip(*numbers, strict=True)
            self._queue(
                "UPDATE number AS t SET value = n.value FROM unnest(%s, %s) AS n (value, name) "
                "WHERE t.name = n.name",
                (integers(values), texts(names)),
                expect=len(numbers),
            )
        if lanes:
            ready, ids = zip(*lanes, strict=True)
            self._queue(
                "UPDATE lane AS t SET ready = n.ready FROM unnest(%s, %s) AS n (ready, id) "
                "WHERE t.id = n.id",
                (integers(ready), integers(ids)),
                expect=len(lanes),
            )
        if depth:
            queues, states, deltas = zip(*depth, strict=True)
            self._queue(
                "INSERT INTO depth SELECT * FROM unnest(%s, %s, %s) "
                "ON CONFLICT (queue, state) DO UPDATE SET tasks = depth.tasks + excluded.tasks",
                (texts(queues), texts(states), integers(deltas)),
            )
        if counts:
            names, types, labels, deltas = zip(*counts, strict=True)
            self._queue(
                "INSERT INTO counter SELECT * FROM unnest(%s, %s, %s, %s) "
                "ON CONFLICT (name, task_type, label) "
                "DO UPDATE SET value = counter.value + excluded.value",
                (texts(names), texts(types), texts(labels), integers(deltas)),
            )

    # -- speaking -------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Have a session, and in memory what is stored.

        Raises:
            StoreUnavailable: the server cannot be reached.
        """
        if self._writing:
            return
        if self._broken:
            raise OSError(errno.EIO, "the task store is lost to this process; it must exit")
        if self._session is None or self._session.closed:
            self._hang_up()
            try:
                self._connect(0.0)
            except StoreUnfit as error:  # It can be put right, and then all goes on.
                raise StoreUnavailable(str(error), 30) from error
            self._take_in((), ())
        if self._went_back:
            self._went_back = False
            self._take_in((), ())
            raise StoreUnavailable("the server has lost commits; what is left is read anew", 1)
        if not self._numbers:
            self._load()

    def _load(self) -> None:
        numbers, lanes = self._live().run_all(
            [
                Statement("SELECT name, value FROM number"),
                Statement("SELECT id, queue, task_type, needs, ready FROM lane"),
            ]
        )
        self._take_in(numbers, lanes)
        self._marks = dict(self._numbers)

    def _live(self) -> Session:
        if self._session is None:
            raise ConnectionLost("the connection to the task store broke", 2)
        return self._session

    def _hang_up(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _queue(self, sql: str, values: Sequence[Any], *, expect: int | None = None) -> None:
        """Have a statement executed with the next read, or with the commit."""
        self._queued.append(Statement(sql, values, expect))

    def _queue_rows(self, sql: str, kinds: Sequence[_Column], values: Sequence[Row]) -> None:
        """Have rows written, by as many statements as their size asks for."""
        self._queued += [Statement(sql, columns) for columns, _rows in _parts(kinds, values)]

    def _drain(self, *more: Statement) -> list[list[Row]]:
        """Execute what is queued, then ``more``; return the rows of each of those."""
        statements, self._queued = [*self._queued, *more], []
        if not statements:
            return []
        found = self._live().run_all(statements)
        if not self._begun:
            self._begun = True
            if not found[1]:
                raise self._lost()
            ((self._commits, safe),) = found[1]
            if not (safe or self._unsafe):
                raise StoreUnavailable(
                    "PostgreSQL may lose what it commits: fsync or full_page_writes was turned "
                    "off, so nothing is stored until it is on again",
                    30,
                )
        return found[len(found) - len(more) :]

    def _run(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Read, inside the transaction if there is one."""
        statement = Statement(sql, values)
        if self._writing:
            return self._drain(statement)[0]
        for last_try in (False, True):
            self._refresh()
            try:
                return self._live().run_all([statement])[0]
            except ConnectionLost:
                self._hang_up()
                if last_try:
                    raise
        raise AssertionError

    # -- tasks ----------------------------------------------------------------------------------

    def _insert_tasks(self, values: Sequence[Row]) -> set[int]:
        parts = [Statement(_INSERT_TASKS, columns) for columns, _rows in _parts(_TASK, values)]
        found = self._drain(*parts) if parts else []
        return {seq for fresh in found for (seq,) in fresh}

    def _insert_specs(self, values: Sequence[tuple[int, bytes]]) -> None:
        self._queue_rows("INSERT INTO task_spec SELECT * FROM unnest(%s, %s)", _SPEC, values)

    def _insert_number(self, name: str) -> None:
        self._queue("INSERT INTO number VALUES (%s, 0)", (name,))

    def _number_ends(self, values: Sequence[tuple[int, int]]) -> None:
        if values:
            numbers, seqs = zip(*values, strict=True)
            self._queue(
                "UPDATE task AS t SET end_no = n.end_no FROM unnest(%s, %s) AS n (end_no, seq) "
                "WHERE t.seq = n.seq",
                (integers(numbers), integers(seqs)),
                expect=len(values),
            )

    def _update_tasks(self, changes: Sequence[Change]) -> None:
        values = [
            (*rows.plain_values(task), *now, task.seq, task.version - 1)
            for task, _was, now in changes
        ]
        for columns, count in _parts(_UPDATED, values):
            self._queue(_UPDATE_TASKS, columns, expect=count)

    def _insert_lane(self, key: LaneKey) -> int:
        id_ = max(self._lane_by_id, default=0) + 1
        self._queue(
            "INSERT INTO lane (id, queue, task_type, needs) VALUES (%s, %s, %s, %s)",
            (id_, key.queue, key.task_type, codec.needs_to_json(key.needs)),
        )
        return id_

    def _rows_by_id(self, ids: Sequence[str]) -> list[Row]:
        return self._run(_BY_ID, (texts(ids),))

    def _rows_by_seq(self, seqs: Sequence[int]) -> list[Row]:
        return self._run(_BY_SEQ, (integers(seqs),))

    def _found(self, sql: str, values: Sequence[Any] = ()) -> list[Task]:
        """Return the tasks whose accept sequences a statement finds, in its order."""
        return self._tasks_at(self._run(sql, values))

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        self._refresh()
        return super().get(ids)

    def claim_keys(self, claims: Sequence[KeyClaim]) -> dict[tuple[str, str], KeyClaim]:
        """Bind free idempotency keys; return who holds each ``(principal, key)`` afterwards."""
        self._must_write()
        if not claims:
            return {}
        self._queue_rows(
            "INSERT INTO idempotency_key SELECT * FROM unnest(%s, %s, %s, %s, %s) "
            "ON CONFLICT (principal, key) DO NOTHING",
            _KEY,
            claims,
        )
        return self.keys_held((claim.principal, claim.key) for claim in claims)

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        wanted = list(dict.fromkeys(keys))
        if not wanted:
            return {}
        principals, names = zip(*wanted, strict=True)
        holders = self._run(_KEYS_HELD, (texts(principals), texts(names)))
        return {(row[0], row[1]): KeyClaim(*row) for row in holders}

    def append_facts(self, facts: Sequence[Fact]) -> int:
        """Add lines of history and return the number of the last one (0 if there never was one)."""
        self._must_write()
        first = self._reserve("last_fact", len(facts))
        values = [rows.fact_values(number, fact) for number, fact in enumerate(facts, first)]
        self._queue_rows(_INSERT_FACTS, _FACT_KINDS, values)
        return self._numbers["last_fact"]

    def save_attempts(self, attempts: Sequence[Attempt]) -> None:
        """Insert or replace attempts by ``(task_id, token)``."""
        self._must_write()
        # Of several for one token the last counts; one statement may touch a row only once.
        last = {(attempt.task_id, attempt.token): attempt for attempt in attempts}
        values = [rows.attempt_values(attempt) for attempt in last.values()]
        self._queue_rows(_SAVE_ATTEMPTS, _ATTEMPT_KINDS, values)

    # -- what the scheduler reads -----------------------------------------------------------------

    def heads(self, lane: LaneKey, limit: int) -> list[Task]:
        """Return the first ``limit`` ready tasks of a lane by ``(dispatch_key, seq)``."""
        self._refresh()
        known = self._lanes.get(lane)
        if known is None or not known.ready:
            return []
        return self._found(_HEADS, (known.id, limit))

    def leased(self) -> list[Task]:
        """Return every task that holds a lease, in accept order."""
        return sorted(self._found(_LEASED), key=lambda task: task.seq)

    def due(self, now: float, limit: int) -> list[Task]:
        """Return tasks whose ``wake_at`` is at or before ``now``, earliest first."""
        return self._found(_DUE, (float(now), limit))

    def next_wake(self) -> float | None:
        """Return the earliest ``wake_at`` of all tasks, or ``None``."""
        found = self._run(_NEXT_WAKE)
        return found[0][0] if found else None

    # -- keys and dependencies --------------------------------------------------------------------

    def ordering_out(self, key: str) -> Task | None:
        """Return the first not yet ended task with this ordering key that is not held for it."""
        found = self._found(_ORDERING_OUT, (key,))
        return found[0] if found else None

    def ordering_line(self, key: str, limit: int) -> list[Task]:
        """Return the not yet ended tasks with this ordering key, in accept order."""
        return self._found(_ORDERING_LINE, (key, key, limit))

    def concurrency_keys_held(self, limit: int, *, after: str = "") -> list[str]:
        """Return up to ``limit`` distinct concurrency keys for which tasks are held, sorted."""
        return [key for (key,) in self._run(_KEYS_WITH_HELD, (after, limit))]

    def held_by_concurrency(self, key: str, limit: int) -> list[Task]:
        """Return tasks held for this concurrency key by ``(dispatch_key, seq)``."""
        return self._found(_HELD, (key, limit))

    def add_dependencies(self, child_id: str, parent_ids: Sequence[str]) -> None:
        """Note that ``child_id``, which is stored already, waits for each parent.

        Raises:
            NotFound: the child is not stored.
        """
        self._must_write()
        seq = self._seq_of.get(child_id)
        if seq is None:
            child = self._run("SELECT seq FROM task WHERE id = %s", (child_id,))
            if not child:
                raise NotFound("task", child_id)
            seq = child[0][0]
        self._queue(
            "INSERT INTO dependency SELECT p.id, %s, %s FROM unnest(%s) AS p (id) "
            "ON CONFLICT (parent_id, child_seq) DO NOTHING",
            (seq, child_id, texts(parent_ids)),
        )

    def task_states(self, ids: Iterable[str]) -> dict[str, TaskState]:
        """Return the states of those of ``ids`` that exist."""
        found = self._run("SELECT id, state FROM task WHERE id = ANY(%s)", (texts(ids),))
        return {id_: TaskState(state) for id_, state in found}

    def dependents(self, parent_id: str, limit: int) -> list[str]:
        """Return up to ``limit`` ids that still wait for ``parent_id``, in accept order."""
        return [child_id for (child_id,) in self._run(_DEPENDENTS, (parent_id, limit))]

    def waited_for(self, ids: Sequence[str]) -> set[str]:
        """Return those of ``ids`` for which any task still waits."""
        return {parent_id for (parent_id,) in self._run(_WAITED_FOR, (texts(ids),))}

    def drop_dependents(self, parent_id: str, child_ids: Sequence[str]) -> None:
        """Forget that these children wait for ``parent_id``."""
        self._must_write()
        # By number, the second half of the key: otherwise each chunk would read all that are left.
        self._queue(
            "DELETE FROM dependency WHERE parent_id = %s "
            "AND child_seq = ANY(ARRAY(SELECT seq FROM task WHERE id = ANY(%s)))",
            (parent_id, texts(child_ids)),
        )

    def push_settlements(self, items: Sequence[tuple[str, bool]]) -> None:
        """Add durable `Settlement` orders for ``(task_id, completed)``."""
        self._must_write()
        if items:
            ids, done = zip(*items, strict=True)
            numbers = [self._next("last_settlement") for _ in items]
            self._queue(
                "INSERT INTO settlement SELECT * FROM unnest(%s, %s, %s)",
                (integers(numbers), texts(ids), integers(done)),
            )

    def settlements(self, limit: int) -> list[Settlement]:
        """Return the oldest settlement orders not carried out yet."""
        found = self._run(
            "SELECT number, task_id, completed FROM settlement ORDER BY number LIMIT %s", (limit,)
        )
        return [Settlement(number, task_id, bool(done)) for number, task_id, done in found]

    def drop_settlement(self, number: int) -> None:
        """Forget a settlement order that has been carried out."""
        self._must_write()
        self._queue("DELETE FROM settlement WHERE number = %s", (number,))

    # -- webhooks ---------------------------------------------------------------------------------

    def save_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        """Insert or replace deliveries by id."""
        self._must_write()
        last = {delivery.id: delivery for delivery in deliveries}
        self._queue_rows(_SAVE_DELIVERIES, _DELIVERY_KINDS, list(last.values()))

    def drop_deliveries(self, ids: Sequence[str]) -> None:
        """Forget deliveries that are done with."""
        self._must_write()
        self._queue("DELETE FROM delivery WHERE id = ANY(%s)", (texts(ids),))

    # -- schedules --------------------------------------------------------------------------------

    def save_schedules(self, schedules: Sequence[Schedule]) -> None:
        """Insert or replace schedules by principal and name; none may be there twice."""
        self._must_write()
        self._queue_rows(
            _SAVE_SCHEDULES, _SCHEDULE_KINDS, list(map(rows.schedule_values, schedules))
        )

    def drop_schedules(self, keys: Sequence[tuple[str, str]]) -> None:
        """Forget schedules by ``(principal, name)``."""
        self._must_write()
        for key in keys:
            self._queue("DELETE FROM schedule WHERE principal = %s AND name = %s", key)

    def get_schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)``, if there is one."""
        return _schedule(self._run(_SCHEDULE_BY_KEY, key))

    def due_schedules(self, now: float, limit: int) -> list[Schedule]:
        """Return schedules whose ``wake_at`` is at or before ``now``, earliest first."""
        return list(map(rows.schedule_from_row, self._run(_DUE_SCHEDULES, (now, limit))))

    def next_schedule_wake(self) -> float | None:
        """Return the earliest ``wake_at`` of all schedules, or ``None``."""
        found = self._run(_NEXT_SCHEDULE_WAKE)
        return found[0][0] if found else None

    def count_schedules(self, principal: str | None = None) -> int:
        """Return how many schedules there are, of a principal or in all."""
        of, values = ("", ()) if principal is None else (" WHERE principal = %s", (principal,))
        return int(self._run(f"SELECT count(*) FROM schedule{of}", values)[0][0])

    # -- small tables -----------------------------------------------------------------------------

    def save_worker(self, record: WorkerRecord) -> None:
        """Insert or replace a worker by name."""
        self._must_write()
        self._queue(
            "INSERT INTO worker VALUES (%s, %s) "
            "ON CONFLICT (name) DO UPDATE SET body = excluded.body",
            (record.name, codec.pack_worker(record)),
        )

    def workers(self) -> list[WorkerRecord]:
        """Return every worker ever registered and not forgotten, by name."""
        return _workers(self._run(_WORKERS))

    def forget_worker(self, name: str) -> None:
        """Remove a worker that left for good."""
        self._must_write()
        self._queue("DELETE FROM worker WHERE name = %s", (name,))

    def set_paused(self, queue: str, paused: bool) -> None:
        """Pause a queue, or resume it."""
        self._must_write()
        if paused:
            self._queue(
                "INSERT INTO paused_queue VALUES (%s) ON CONFLICT (queue) DO NOTHING", (queue,)
            )
        else:
            self._queue("DELETE FROM paused_queue WHERE queue = %s", (queue,))

    def paused(self) -> frozenset[str]:
        """Return the names of paused queues."""
        return frozenset(queue for (queue,) in self._run(_PAUSED))

    def counted_queues(self) -> frozenset[str]:
        """Return the labels that accepted tasks are counted under, by queue."""
        sql = "SELECT DISTINCT label FROM counter WHERE name = 'accepted'"
        return frozenset(label for (label,) in self._run(sql))

    def append_audit(self, entries: Sequence[AuditEntry]) -> None:
        """Add audit lines, each chained to the one before it."""
        self._must_write()
        self._queue_rows(_INSERT_AUDIT, _AUDIT_KINDS, self._chained(entries))

    def _audit_tails(self) -> list[Row]:
        return self._run(_AUDIT_TAILS)

    def _old_keys(self, after: KeyPlace, before: float, limit: int) -> Sequence[Row]:
        return self._run(_OLD_KEYS, (after[0], *after, float(before), limit))

    def _delete_keys(self, names: Sequence[tuple[str, str]]) -> None:
        if names:
            principals, keys = zip(*names, strict=True)
            self._queue(_DELETE_KEYS, (texts(principals), texts(keys)))

    def prune(self, ended_before: float, keys_before: float, limit: int) -> int:
        """Delete up to ``limit`` old tasks, and up to ``limit`` keys; see `TaskStore.prune`."""
        self._must_write()
        gone = self._run(_PRUNABLE, (float(ended_before), limit))
        if gone:
            seqs = integers([row[0] for row in gone])
            ids = texts([row[1] for row in gone])
            for table, column, among in (
                ("task", "seq", seqs),
                ("task_spec", "seq", seqs),
                ("dependency", "child_seq", seqs),
                ("attempt", "task_id", ids),
                ("fact", "task_id", ids),
            ):
                self._queue(f"DELETE FROM {table} WHERE {column} = ANY(%s)", (among,))
        for seq, _id, queue, state in gone:
            self._forget(seq)
            self._depth[queue, state] -= 1
        self._prune_keys(keys_before, limit)
        if empty := self._drop_empty_lanes():
            self._queue("DELETE FROM lane WHERE id = ANY(%s)", (integers(empty),))
        return len(gone)

    def prune_audit(self, before: float, limit: int) -> int:
        """Delete up to ``limit`` old audit lines; see `TaskStore.prune_audit`."""
        self._must_write()
        oldest = self._run("SELECT number, at, hash FROM audit ORDER BY number LIMIT %s", (limit,))
        gone = list(takewhile(lambda row: row[1] < before, oldest))
        if gone:
            number, _at, digest = gone[-1]
            self._queue("DELETE FROM audit WHERE number <= %s", (number,))
            if digest is not None:
                self._queue("DELETE FROM audit_anchor", ())
                self._queue("INSERT INTO audit_anchor VALUES (%s, %s)", (number, digest))
        return len(gone)


class PostgresTaskReader:
    """Reads of a database that somebody else writes. Implements `TaskReader`.

    One connection, one call at a time, from any thread. Every method is one statement, hence sees
    one commit. It reads where the writer writes, never from a standby: what was acknowledged is
    there. A connection that broke is opened again by the next call.

    A read that takes longer than `READ_S_MAX` is broken off, by the server or, if that stands
    still, by hanging up: whoever asked is told to ask again later, and nobody waits behind it.
    """

    def __init__(self, url: str, *, manners: Manners | None = None) -> None:
        """Connect, to say now what is wrong.

        Raises:
            StoreUnfit: the server does not fit.
            SchemaTooNew: a newer hcna-ray wrote the database.
            StoreUnavailable: the server is away, or there is no store there yet.
        """
        self._url = url
        self._manners = manners or Manners(
            name="hcna reader",
            read_only=True,
            statement_s=READ_S_MAX,
            answer_s=READ_S_MAX + 1.0,
            custom_plans=True,
        )
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._closed = False
        with self._lock:
            self._open()

    def close(self) -> None:
        """Hang up. Harmless twice."""
        with self._lock:
            self._closed = True
            if self._session is not None:
                self._session.close()

    def _open(self) -> Session:
        if self._closed:
            raise StoreUnavailable("the reader is closed")
        if self._session is None or self._session.closed:
            self._session = Session(self._url, self._manners)
            try:
                if not check_schema(self._session):
                    raise StoreUnavailable(
                        "there is no task store in this database yet: start it with hcna up"
                    )
            except BaseException:
                self._session.close()
                raise
        return self._session

    def _run(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        with self._lock:
            for last_try in (False, True):
                session = self._open()
                asked = time.monotonic()
                try:
                    return session.run(sql, values)
                except ConnectionLost:
                    # Nobody may have noticed before: a read is repeated without harm. But a server
                    # that stands still would have whoever asks wait once more.
                    if last_try or time.monotonic() - asked >= self._manners.answer_s:
                        raise
        raise AssertionError

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        found = map(rows.task_from_row, self._run(_BY_ID, (texts(ids),)))
        return {task.id: task for task in found}

    def attempts(self, task_id: str) -> list[Attempt]:
        """Return the attempts of a task, oldest first."""
        return [rows.attempt_from_row(row) for row in self._run(_ATTEMPTS, (task_id,))]

    def page(self, where: TaskFilter, *, before_seq: int | None, limit: int) -> list[Task]:
        """Return tasks that fit, newest first, with ``seq < before_seq`` (a keyset page).

        One filter alone is read off its index. Of several, the first of ids, batch, worker,
        principal, states (with kind), type and queue picks the index and the others are compared
        row by row, as ``since`` and the house's owner always are.
        """
        if where.kind is not None and where.states and TaskState.FAILED not in where.states:
            return []
        found = self._run(*page_query(where, before_seq=before_seq, limit=limit))
        return [rows.task_from_row(row) for row in sorted(found, key=_first, reverse=True)]

    def ended(
        self, *, ids: Sequence[str] = (), batch_id: str | None = None, after: int = 0, limit: int
    ) -> list[tuple[int, Task]]:
        """Return ended tasks of a batch, or else among ``ids``, with a higher end number."""
        if batch_id is not None:
            found = self._run(_ENDED_OF_BATCH, (batch_id, after, limit))
        else:
            found = self._run(_ENDED_OF_IDS, (texts(ids), after, limit))
        return [(row[0], rows.task_from_row(row[1:])) for row in sorted(found, key=_first)]

    def open_count(self, *, ids: Sequence[str] = (), batch_id: str | None = None) -> int:
        """Return how many of a batch, or else among ``ids``, exist and have not ended."""
        if batch_id is not None:
            ((count,),) = self._run(_OPEN_OF_BATCH, (batch_id, batch_id))
        else:
            ((count,),) = self._run(_OPEN_OF_IDS, (texts(ids),))
        return int(count)

    def batch_exists(self, batch_id: str) -> bool:
        """Return whether any task carries this batch id."""
        return bool(self._run("SELECT 1::bigint FROM task WHERE batch_id = %s LIMIT 1", [batch_id]))

    def belongs(self, ids: Iterable[str]) -> dict[str, Belongs]:
        """Return whose those of ``ids`` are that exist."""
        found = self._run(_BELONGS, (texts(ids),))
        return {row[0]: Belongs(*row[1:]) for row in found}

    def open_of(self, principal: str, limit: int) -> int:
        """Return how many tasks of a principal have not ended, counted as far as ``limit``."""
        sql = _OPEN_OF_OWNER if principal == OWNER else _OPEN_OF_PRINCIPAL
        ((count,),) = self._run(sql, (principal, limit))
        return int(count)

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        wanted = list(dict.fromkeys(keys))
        if not wanted:
            return {}
        principals, names = zip(*wanted, strict=True)
        holders = self._run(_KEYS_HELD, (texts(principals), texts(names)))
        return {(row[0], row[1]): KeyClaim(*row) for row in holders}

    def facts(self, *, after: int, limit: int, task_id: str | None = None) -> list[StoredFact]:
        """Return history with numbers above ``after``, oldest first."""
        sql, values = (
            (_FACTS, (after, limit))
            if task_id is None
            else (_FACTS_OF_TASK, (task_id, after, task_id, limit))
        )
        return [rows.fact_from_row(row) for row in self._run(sql, values)]

    def last_fact(self) -> int:
        """Return the number of the newest line of history, 0 when there is none."""
        found = self._run("SELECT value FROM number WHERE name = 'last_fact'")
        return int(found[0][0])

    def generation(self) -> int:
        """Return the first half of every fencing token."""
        found = self._run("SELECT value FROM number WHERE name = 'generation'")
        return int(found[0][0])

    def deliveries(
        self, *, due_before: float, limit: int, not_to: Collection[str] = ()
    ) -> list[Delivery]:
        """Return deliveries that are due at or before an instant, by ``(due_at, id)``."""
        values = float(due_before), texts(not_to), limit
        return [Delivery(*row) for row in self._run(_DELIVERIES, values)]

    def get_schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)``, if there is one."""
        return _schedule(self._run(_SCHEDULE_BY_KEY, key))

    def schedules(
        self, *, principal: str | None = None, after: tuple[str, str] = ("", ""), limit: int
    ) -> list[Schedule]:
        """Return schedules by ``(principal, name)``, those behind ``after`` (a keyset page)."""
        if principal is None:
            found = self._run(_SCHEDULES, (*after, limit))
        else:
            found = self._run(_SCHEDULES_OF, (principal, *after, limit))
        return list(map(rows.schedule_from_row, found))

    def counters(self) -> dict[Counter, int]:
        """Return every counter."""
        found = self._run("SELECT name, task_type, label, value FROM counter")
        return {Counter(*row[:3]): row[3] for row in found}

    def depth(self) -> dict[tuple[str, TaskState], int]:
        """Return how many tasks stand in each ``(queue, state)``; none is left out."""
        found = self._run("SELECT queue, state, tasks FROM depth WHERE tasks > 0")
        return {(queue, TaskState(state)): tasks for queue, state, tasks in found}

    def queued_since(self) -> dict[str, float]:
        """Return since when the first ready task of each queue's lanes has been queued."""
        return dict(self._run(_QUEUED_SINCE))

    def audit(self, *, before: int | None, limit: int) -> list[StoredAudit]:
        """Return audit lines with numbers below ``before``, newest first."""
        found = self._run(_AUDIT, (_SEQ_MAX if before is None else before, limit))
        return [rows.audit_from_row(row) for row in found]

    def audit_after(self, after: int, limit: int) -> list[StoredAudit]:
        """Return audit lines with numbers above ``after``, oldest first."""
        return [rows.audit_from_row(row) for row in self._run(_AUDIT_AFTER, (after, limit))]

    def audit_state(self) -> AuditState:
        """Return where the audit log begins and ends."""
        ((last, number, digest),) = self._run(_AUDIT_STATE)
        return AuditState(AuditPoint() if number is None else AuditPoint(number, digest), last)

    def workers(self) -> list[WorkerRecord]:
        """Return every worker on record, by name."""
        return _workers(self._run(_WORKERS))

    def paused(self) -> frozenset[str]:
        """Return the names of paused queues."""
        return frozenset(queue for (queue,) in self._run(_PAUSED))


# -- schema ----------------------------------------------------------------------------------------

_LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migration (
    number bigint PRIMARY KEY,
    name text COLLATE "C" NOT NULL,
    sha256 text COLLATE "C" NOT NULL
)
"""


def migrate(session: Session) -> None:
    """Apply what a database is missing, each migration and its ledger line in one transaction.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote this store.
        SchemaChanged: an applied migration was edited.
    """
    if not _has_ledger(session):
        session.run(_LEDGER)
    for migration in missing_migrations(known_migrations(SCHEMA), _applied(session)):
        session.run("BEGIN")
        try:
            session.script(migration.sql)
            failpoints.hit("postgres.step.applied")
            session.run("INSERT INTO schema_migration VALUES (%s, %s, %s)", migration.line)
            session.commit()
        except BaseException:
            session.roll_back()
            raise


def check_schema(session: Session) -> bool:
    """Return whether a database has exactly the schema this package knows.

    ``False`` means not yet: the writer has not created or migrated it.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote this store.
        SchemaChanged: an applied migration was edited.
    """
    return not missing_migrations(known_migrations(SCHEMA), _applied(session))


def _has_ledger(session: Session) -> bool:
    return session.run("SELECT to_regclass('schema_migration') IS NOT NULL") == [(True,)]


def _applied(session: Session) -> dict[int, str]:
    if not _has_ledger(session):
        return {}
    return dict(session.run("SELECT number, sha256 FROM schema_migration"))


def _note(session: Session, told: str) -> None:
    """Add a line to the audit log past the bookkeeping: the server has gone back."""
    heads = [digest for (digest,) in session.run(_AUDIT_TAILS) if digest is not None]
    ((number, at),) = session.run(_NOTE)
    entry = AuditEntry(
        at=at,
        principal="moderator",
        action=WENT_BACK,
        target="",
        outcome="done",
        detail=told,
    )
    row = rows.audit_values(number, entry, chain_hash([*heads, GENESIS][0], number, entry))
    session.run(_INSERT_AUDIT, _columns(_AUDIT_KINDS, [row]))


# -- statements ------------------------------------------------------------------------------------

_Column = Callable[[Iterable[Any]], Array]
_TEXTS = {
    *("id", "queue", "task_type", "principal", "batch_id", "ordering_key", "concurrency_key"),
    *("state", "worker", "incarnation", "pinned_to", "cancel_reason", "held_key", "kind"),
}
_FLOATS = {
    *("accepted_at", "due_at", "dispatch_key", "wake_at", "granted_at", "lease_started_at"),
    *("pinned_until", "queued_at", "started_at", "finished_at", "cancel_requested_at"),
}
_BLOBS = {"progress", "error", "checkpoint", "result"}


def _kind(column: str) -> _Column:
    for names, kind in ((_TEXTS, texts), (_FLOATS, floats), (_BLOBS, blobs)):
        if column in names:
            return kind
    return integers


_TASK = [_kind(name) for name in rows.SPEC + rows.PLAIN + rows.INDEXED]
_UPDATED = [*(_kind(name) for name in rows.PLAIN + rows.INDEXED), integers, integers]
_SPEC: list[_Column] = [integers, blobs]
_KEY: list[_Column] = [texts, texts, texts, texts, floats]
_FACT_KINDS: list[_Column] = [
    *(integers, texts, texts, floats, texts, integers, integers, texts, texts),
]
_ATTEMPT_KINDS: list[_Column] = [
    *(texts, integers, integers, texts, texts, floats, floats, texts, blobs),
]
_DELIVERY_KINDS: list[_Column] = [
    *(texts, texts, texts, texts, texts, blobs, floats, floats, integers, texts),
]
_SCHEDULE_KINDS: list[_Column] = [
    *(texts, texts, blobs, floats, floats, floats, texts, floats, integers, integers, integers),
    *(texts, texts, floats),
]
_AUDIT_KINDS: list[_Column] = [integers, floats, texts, texts, texts, texts, texts, texts]


def _columns(kinds: Sequence[_Column], values: Sequence[Row]) -> list[Array]:
    """Turn rows into one array for each column."""
    return [kind(column) for kind, column in zip(kinds, zip(*values, strict=True), strict=True)]


def _parts(kinds: Sequence[_Column], values: Sequence[Row]) -> Iterator[tuple[list[Array], int]]:
    """Divide a bulk write into columns and their length: one value holds a gibibyte at most."""
    part: list[Row] = []
    size = 0
    for row in values:
        row_size = sum(len(value) for value in row if isinstance(value, bytes | str))
        if part and (len(part) == _PART_ROWS or size + row_size > _PART_BYTES):
            yield _columns(kinds, part), len(part)
            part, size = [], 0
        part.append(row)
        size += row_size
    if part:
        yield _columns(kinds, part), len(part)


def _unnest(columns: int) -> str:
    return f"unnest({', '.join(['%s'] * columns)})"


_LEAD = (
    "UPDATE leader SET epoch = greatest(epoch, %s) + 1, holder = %s, since = clock_timestamp() "
    "WHERE epoch = ANY(%s) RETURNING epoch, commits"
)
# Never lower than what was told before: tokens, and the places of readers, must not come again.
_RAISE = (
    "UPDATE number AS t SET value = greatest(t.value, n.value) + (t.name = 'generation')::int "
    "FROM unnest(%s, %s) AS n (name, value) WHERE t.name = n.name RETURNING t.name, t.value"
)
_POINT = (
    "SELECT (SELECT value FROM number WHERE name = 'generation'), coalesce("
    "(SELECT at FROM fact ORDER BY number DESC LIMIT 1), "
    "(SELECT extract(epoch FROM since)::double precision FROM leader))"
)
_LEAP = (
    "UPDATE number AS t SET value = CASE name WHEN 'generation' THEN %s ELSE value + %s END "
    "WHERE name IN ('generation', 'last_fact', 'last_end')"
)
_NOTE = (
    "UPDATE number SET value = value + 1 WHERE name = 'last_audit' RETURNING value, "
    "extract(epoch FROM clock_timestamp())::double precision"
)
# Counts the transaction and, until it ends, keeps everybody else from taking the epoch.
_FENCE = f"UPDATE leader SET commits = commits + 1 WHERE epoch = %s RETURNING commits, {_SAFE}"

_INSERT_TASKS = (
    f"INSERT INTO task ({', '.join(rows.SPEC + rows.PLAIN + rows.INDEXED)}) "
    f"SELECT * FROM {_unnest(len(_TASK))} ON CONFLICT (id) DO NOTHING RETURNING seq"
)
_UPDATE_TASKS = (
    f"UPDATE task AS t SET {', '.join(f'{name} = n.{name}' for name in rows.PLAIN + rows.INDEXED)} "
    f"FROM {_unnest(len(_UPDATED))} AS n ({', '.join(rows.PLAIN + rows.INDEXED)}, seq, was) "
    "WHERE t.seq = n.seq AND t.version = n.was"
)
_INSERT_FACTS = f"INSERT INTO fact SELECT * FROM {_unnest(len(_FACT_KINDS))}"
_INSERT_AUDIT = f"INSERT INTO audit SELECT * FROM {_unnest(len(_AUDIT_KINDS))}"
_SAVE_ATTEMPTS = (
    f"INSERT INTO attempt SELECT * FROM {_unnest(len(_ATTEMPT_KINDS))} "
    "ON CONFLICT (task_id, generation, attempt) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in rows.ATTEMPT[3:])
)
_SAVE_DELIVERIES = (
    f"INSERT INTO delivery SELECT * FROM {_unnest(len(_DELIVERY_KINDS))} "
    "ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in rows.DELIVERY[1:])
)
_DELIVERIES = (
    f"SELECT {', '.join(rows.DELIVERY)} FROM delivery WHERE due_at <= %s AND target <> ALL(%s) "
    "ORDER BY due_at, id LIMIT %s"
)
_SAVE_SCHEDULES = (
    f"INSERT INTO schedule SELECT * FROM {_unnest(len(_SCHEDULE_KINDS))} "
    "ON CONFLICT (principal, name) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in rows.SCHEDULE[2:])
)
_SCHEDULE = f"SELECT {', '.join(rows.SCHEDULE)} FROM schedule"
_SCHEDULE_BY_KEY = f"{_SCHEDULE} WHERE principal = %s AND name = %s"
_DUE_SCHEDULES = f"{_SCHEDULE} WHERE wake_at <= %s ORDER BY wake_at, principal, name LIMIT %s"
_NEXT_SCHEDULE_WAKE = (
    "SELECT wake_at FROM schedule WHERE wake_at IS NOT NULL ORDER BY wake_at LIMIT 1"
)
_BEHIND = "(principal, name) > (%s, %s) ORDER BY principal, name LIMIT %s"
_SCHEDULES = f"{_SCHEDULE} WHERE {_BEHIND}"
_SCHEDULES_OF = f"{_SCHEDULE} WHERE principal = %s AND {_BEHIND}"
_FROM = "task AS t ON t.seq = p.seq JOIN task_spec AS s ON s.seq = p.seq"
_BY_SEQ = f"SELECT {rows.COLUMNS} FROM unnest(%s) AS p (seq) JOIN {_FROM}"
_BY_ID = (
    f"SELECT {rows.COLUMNS} FROM task AS t JOIN task_spec AS s ON s.seq = t.seq "
    "WHERE t.id = ANY(%s)"
)
# What the scheduler looks for is found in indexes alone, as row numbers. Where a key's rows are
# wanted by number, the key is given as a range and named in the order: else the server might walk
# along the numbers of all rows instead, believing that one with the key comes soon.
_HEADS = "SELECT seq FROM task WHERE ready_lane = %s ORDER BY dispatch_key, seq LIMIT %s"
_QUEUED_SINCE = (
    "SELECT queue, MIN(since) FROM (SELECT l.queue, (SELECT t.queued_at FROM task AS t "
    "WHERE t.ready_lane = l.id ORDER BY t.dispatch_key, t.seq LIMIT 1) AS since "
    "FROM lane AS l WHERE l.ready > 0) AS f WHERE since IS NOT NULL GROUP BY queue"
)
_LEASED = "SELECT seq FROM task WHERE granted_at IS NOT NULL"
_DUE = "SELECT seq FROM task WHERE wake_at <= %s ORDER BY wake_at, seq LIMIT %s"
_NEXT_WAKE = "SELECT wake_at FROM task WHERE wake_at IS NOT NULL ORDER BY wake_at LIMIT 1"
_ORDERING_OUT = (
    "SELECT seq FROM task WHERE ordering_key = %s AND end_no IS NULL AND (hold & 1) = 0 "
    "ORDER BY seq LIMIT 1"
)
_ORDERING_LINE = (
    "SELECT seq FROM task WHERE ordering_key BETWEEN %s AND %s AND end_no IS NULL "
    "ORDER BY ordering_key, seq LIMIT %s"
)
_HELD = "SELECT seq FROM task WHERE held_key = %s ORDER BY dispatch_key, seq LIMIT %s"
# Leaps from key to key along the index: flat cost per key.
_KEYS_WITH_HELD = """
WITH RECURSIVE found (held_key) AS (
    (SELECT held_key FROM task WHERE held_key > %s ORDER BY held_key LIMIT 1)
    UNION ALL
    SELECT (SELECT t.held_key FROM task AS t WHERE t.held_key > f.held_key
            ORDER BY t.held_key LIMIT 1)
    FROM found AS f WHERE f.held_key IS NOT NULL
)
SELECT held_key FROM found WHERE held_key IS NOT NULL LIMIT %s
"""
_WAITED_FOR = (
    "SELECT j.id FROM unnest(%s) AS j (id) "
    "WHERE EXISTS (SELECT 1 FROM dependency WHERE parent_id = j.id)"
)
_DEPENDENTS = "SELECT child_id FROM dependency WHERE parent_id = %s ORDER BY child_seq LIMIT %s"
_KEYS_HELD = (
    "SELECT k.principal, k.key, k.task_id, k.fingerprint, k.at "
    "FROM unnest(%s, %s) AS n (principal, key) "
    "JOIN idempotency_key AS k ON k.principal = n.principal AND k.key = n.key"
)
_PRUNABLE = (
    "SELECT seq, id, queue, state FROM task AS t WHERE end_no IS NOT NULL AND finished_at < %s "
    "AND NOT EXISTS (SELECT 1 FROM dependency WHERE parent_id = t.id) "
    "ORDER BY finished_at, seq LIMIT %s"
)
_OLD_KEYS = (
    "SELECT at, principal, key, NOT EXISTS (SELECT 1 FROM task WHERE id = k.task_id) "
    "FROM idempotency_key AS k WHERE at >= %s AND (at, principal, key) > (%s, %s, %s) AND at < %s "
    "ORDER BY at, principal, key LIMIT %s"
)
_DELETE_KEYS = (
    "DELETE FROM idempotency_key WHERE (principal, key) IN "
    "(SELECT n.principal, n.key FROM unnest(%s, %s) AS n (principal, key))"
)
_WORKERS = "SELECT body FROM worker ORDER BY name"
_PAUSED = "SELECT queue FROM paused_queue"
_ATTEMPTS = (
    f"SELECT {', '.join(rows.ATTEMPT)} FROM attempt WHERE task_id = %s ORDER BY generation, attempt"
)
# The rows are picked by number first: a sort must not carry payloads around.
_ENDED = f"SELECT p.end_no, {rows.COLUMNS} FROM ({{}}) AS p JOIN {_FROM}"
_ENDED_OF_BATCH = _ENDED.format(
    "SELECT seq, end_no FROM task WHERE batch_id = %s AND end_no > %s ORDER BY end_no LIMIT %s"
)
_ENDED_OF_IDS = _ENDED.format(
    "SELECT seq, end_no FROM task WHERE id = ANY(%s) AND end_no > %s ORDER BY end_no LIMIT %s"
)
# Both counts of a batch are read off indexes.
_OPEN_OF_BATCH = (
    "SELECT (SELECT count(*) FROM task WHERE batch_id = %s) - "
    "(SELECT count(*) FROM task WHERE batch_id = %s AND end_no > 0)"
)
_BELONGS = "SELECT id, principal, task_type, queue FROM task WHERE id = ANY(%s)"
# Only in these words are the indexes of principals used: they leave the house's owner out.
_NOT_OWNER = f"principal <> '{OWNER}'"
_OPEN_OF_OWNER = (
    "SELECT count(*) FROM (SELECT 1 FROM task WHERE principal = %s AND end_no IS NULL LIMIT %s)"
    " AS open"
)
_OPEN_OF_PRINCIPAL = _OPEN_OF_OWNER.replace("= %s", f"= %s AND {_NOT_OWNER}", 1)
_OPEN_OF_IDS = "SELECT count(*) FROM task WHERE id = ANY(%s) AND end_no IS NULL"
_FACT = f"SELECT {', '.join(rows.FACT)} FROM fact"
_FACTS = f"{_FACT} WHERE number > %s ORDER BY number LIMIT %s"
_FACTS_OF_TASK = (
    f"{_FACT} WHERE (task_id, number) > (%s, %s) AND task_id <= %s "
    "ORDER BY task_id, number LIMIT %s"
)
_AUDIT = (
    f"SELECT {', '.join(rows.AUDIT)} FROM audit WHERE number < %s ORDER BY number DESC LIMIT %s"
)
_AUDIT_AFTER = (
    f"SELECT {', '.join(rows.AUDIT)} FROM audit WHERE number > %s ORDER BY number LIMIT %s"
)
_AUDIT_TAILS = (
    "(SELECT hash FROM audit ORDER BY number DESC LIMIT 1) "
    "UNION ALL (SELECT hash FROM audit_anchor)"
)
_AUDIT_STATE = (
    "SELECT n.value, a.number, a.hash FROM number AS n LEFT JOIN audit_anchor AS a ON true "
    "WHERE n.name = 'last_audit'"
)


#: Columns with an index of their own for listings, which ends in seq.
_LISTED = frozenset({"batch_id", "worker", "principal", "state", "task_type", "queue"})


def page_query(where: TaskFilter, *, before_seq: int | None, limit: int) -> tuple[str, list[Any]]:
    """Return the statement that finds a listing page, and its values. Rows come in any order."""
    before = _SEQ_MAX if before_seq is None else before_seq
    owner, principal = where.principal == OWNER, where.principal
    if owner:
        principal = None
    compared: list[tuple[str, Any]] = [
        (column, value)
        for column, value in (
            ("batch_id", where.batch_id),
            ("worker", where.worker),
            ("principal", principal),
            ("task_type", where.task_type),
            ("queue", where.queue),
            ("kind", where.kind),
        )
        if value is not None
    ]
    states = {state.value for state in where.states}
    if where.kind is not None:
        # Only a failed task has a kind; and so the index of states is of use.
        states = {TaskState.FAILED.value}
    narrow = (where.batch_id, where.worker, principal)
    if states and not where.ids and all(value is None for value in narrow):
        # One range of the index for each state, merged: an ANY would sort all that fit.
        ranges = [[("state", state), *compared] for state in sorted(states)]
        states = set()
    else:
        ranges = [compared]
    picks: list[str] = []
    values: list[Any] = []
    for conditions in ranges:
        table, driver, drives = "task", "", False
        texts_ = [f"{column} = %s" for column, _value in conditions]
        found = [value for _column, value in conditions]
        if where.ids:
            # A list of ids drives whatever else is asked: they are few, and found at once.
            table = "(SELECT * FROM task WHERE id = ANY(%s) OFFSET 0) AS task"
            values.append(texts(where.ids))
        elif conditions and conditions[0][0] in _LISTED:
            driver, drives = conditions[0][0], True
        if drives:
            texts_[0] = f"({driver}, seq) < (%s, %s) AND {driver} >= %s"
            found[:1] = [conditions[0][1], before, conditions[0][1]]
            if driver == "principal":
                texts_[0] += f" AND {_NOT_OWNER}"
                if states == {TaskState.FAILED.value}:
                    # Of all that somebody has submitted few have failed: they have an index.
                    texts_[0] += f" AND state = '{TaskState.FAILED.value}'"
                    states = set()
        else:
            texts_.append("seq < %s")
            found.append(before)
        if states:
            texts_.append("state = ANY(%s)")
            found.append(texts(sorted(states)))
        if owner:
            texts_.append("principal = %s")
            found.append(OWNER)
        if where.since is not None:
            texts_.append("accepted_at >= %s")
            found.append(float(where.since))
        order = f"{driver} DESC, seq DESC" if drives else "seq DESC"
        picks.append(
            f"(SELECT seq FROM {table} WHERE {' AND '.join(texts_)} ORDER BY {order} LIMIT %s)"
        )
        values += [*found, limit]
    picked = picks[0]
    if len(picks) > 1:
        picked = f"({' UNION ALL '.join(picks)} ORDER BY seq DESC LIMIT %s)"
        values.append(limit)
    return f"SELECT {rows.COLUMNS} FROM {picked} AS p JOIN {_FROM}", values


def _schedule(found: Sequence[Row]) -> Schedule | None:
    return rows.schedule_from_row(found[0]) if found else None


def _workers(found: Sequence[Row]) -> list[WorkerRecord]:
    return [codec.unpack_worker(body) for (body,) in found]


def _holder(session: Session, lock: str) -> _Holder | None:
    """Return who holds an advisory lock now."""
    found = session.run(
        "SELECT l.pid::bigint, "
        "extract(epoch FROM clock_timestamp() - greatest(a.state_change, a.query_start))"
        "::double precision * CASE WHEN a.state LIKE 'idle%%' THEN 1 ELSE 0 END, "
        "coalesce(host(a.client_addr), 'this host') || ', ' || coalesce(a.application_name, '?') "
        "FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid "
        "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 "
        "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
        "AND (l.classid::bigint << 32) | l.objid::bigint = hashtextextended(%s, 0)",
        (lock,),
    )
    return _Holder(found[0][0], found[0][1], found[0][2]) if found else None


def _own_name() -> str:
    return f"{socket.gethostname()} pid {os.getpid()}"


def _first(row: Row) -> Any:
    return row[0]

"""The embedded default: one SQLite file, written by the moderator and read by anybody.

Durability is ``journal_mode=WAL`` with ``synchronous=FULL``: a commit has been fsynced when it
returns. A file that contradicts itself is not opened. What the scheduler asks on every round
(lanes, size, sequences) is kept in memory by the writer and written with the transaction that
changed it, so its cost does not grow with the queue.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw

from hcna_ray import failpoints
from hcna_ray.core.audit import AuditPoint
from hcna_ray.core.errors import (
    NotFound,
    Overloaded,
    StoreDamaged,
    StoreFull,
    StoreTooOld,
    StoreUnavailable,
)
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
from hcna_ray.store import codec, rows
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
from hcna_ray.store.migrations import check_schema, migrate
from hcna_ray.store.rows import Row
from hcna_ray.store.sqlite_locks import left_behind
from hcna_ray.store.sqlite_log import Index, lost_commits, read_index

#: Older libraries can corrupt a WAL database that one connection checkpoints while another commits.
SQLITE_MIN = (3, 51, 3)
#: Bound of the write-ahead log.
WAL_BYTES_MAX = 64 * 1024 * 1024

#: A larger database is not read through before it is opened: that takes seconds (about 4 ms a
#: mebibyte), and the moderator has to be back soon. `hcna store check` and each backup do it.
CHECK_BYTES_MAX = 512 * 1024 * 1024

_PAGE_BYTES = 4096
_BUSY_MS = 5000
#: Longest that a commit waits for readers of old pages before the log simply grows on. A backup is
#: such a reader for seconds, and leases are renewed by commits.
_READERS_MS = 250
#: Longest time one read may take, and how often (in SQLite's steps) a read looks at the clock.
READ_S_MAX = 5.0
_LOOK_STEPS = 100_000
_SEQ_MAX = 2**63 - 1
_FSYNC_FAILED = frozenset({apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC})
_REFUSED = (
    apsw.FullError,
    apsw.ReadOnlyError,
    apsw.CantOpenError,
    apsw.IOError,
    apsw.BusyError,
    apsw.LockedError,
)


def require_library(version: str | None = None) -> None:
    """Refuse a SQLite library with the WAL-reset bug.

    Args:
        version: What to judge, by default the library that apsw brought.

    Raises:
        StoreTooOld: it is older than `SQLITE_MIN`.
    """
    found = version or apsw.sqlite_lib_version()
    if tuple(int(part) for part in found.split(".")) < SQLITE_MIN:
        raise StoreTooOld(found, ".".join(map(str, SQLITE_MIN)))


class _SyncFailed(OSError):
    """An fsync failed: what is on disk is unknown, and asking again would lie."""


class _Connection:
    """One connection and what the writer and the readers both ask of it."""

    def __init__(self, db: apsw.Connection, *, cache_bytes: int) -> None:
        self._db = db
        db.set_busy_timeout(_BUSY_MS)
        for pragma in (
            f"cache_size = -{cache_bytes // 1024}",
            # Mapped pages count as resident memory, and an I/O error there is a SIGBUS.
            "mmap_size = 0",
            "temp_store = MEMORY",
            "foreign_keys = OFF",
            "trusted_schema = OFF",
        ):
            self._run(f"PRAGMA {pragma}")

    def close(self) -> None:
        """Release the connection. Harmless twice."""
        self._db.close()

    def workers(self) -> list[WorkerRecord]:
        """Return every worker on record, by name."""
        found = self._run("SELECT body FROM worker ORDER BY name")
        return [codec.unpack_worker(body) for (body,) in found]

    def paused(self) -> frozenset[str]:
        """Return the names of paused queues."""
        return frozenset(queue for (queue,) in self._run("SELECT queue FROM paused_queue"))

    def counted_queues(self) -> frozenset[str]:
        """Return the labels that accepted tasks are counted under, by queue."""
        sql = "SELECT DISTINCT label FROM counter WHERE name = 'accepted'"
        return frozenset(label for (label,) in self._run(sql))

    def get_schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)``, if there is one."""
        found = self._run(_SCHEDULE_BY_KEY, key)
        return rows.schedule_from_row(found[0]) if found else None

    def _run(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        try:
            return self._db.execute(sql, values).fetchall()
        except apsw.Error as error:
            raise _translated(error) from error

    def _many(self, sql: str, values: Iterable[Sequence[Any]]) -> list[Row]:
        try:
            return self._db.executemany(sql, values).fetchall()
        except apsw.Error as error:
            raise _translated(error) from error


class SqliteTaskStore(_Connection, Bookkeeper):
    """The one writer of a SQLite file. Implements `hcna_ray.store.base.TaskStore`.

    Sequences, lanes and size live in memory while it is open; a rollback reads them again, and so
    does a transaction that finds that somebody else (a restore) has written in between.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        bytes_max: int | None = None,
        wal_bytes_max: int = WAL_BYTES_MAX,
        library_version: str | None = None,
        vfs: str | None = None,
    ) -> None:
        """Open the file, creating it (mode 0600) and bringing its schema up to date.

        Args:
            path: The database file; its directory must exist.
            bytes_max: Largest size of the file; beyond it a write raises `StoreUnavailable`.
            wal_bytes_max: Bound of the write-ahead log while readers keep their reads short.
            library_version: What to take for the version of SQLite.
            vfs: Name of a registered apsw VFS, through which tests make the disk fail.

        Raises:
            StoreTooOld: the SQLite library is older than the WAL-reset fix.
            SchemaTooNew: a newer hcna-ray wrote the file.
            SchemaChanged: an applied migration was edited.
            StoreDamaged: the file or its log is not what was written.
            StoreUnavailable: the disk refused.
            OSError: the file cannot be created.
        """
        require_library(library_version)
        self.path = Path(path)
        # Before SQLite does, so that there is no moment at which others can read it.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        failpoints.hit("store.file.created")
        before = read_index(self.path)
        try:
            db = apsw.Connection(os.fspath(self.path), vfs=vfs, statementcachesize=512)
        except apsw.Error as error:
            raise _translated(error) from error
        try:
            # Else closing would carry a damaged log over, and delete it.
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            _Connection.__init__(self, db, cache_bytes=64 * 1024 * 1024)
            Bookkeeper.__init__(self)
            self._broken = False
            self._check(before)
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            self._configure(bytes_max, wal_bytes_max)
            # After a failed fsync the kernel keeps pages that are on no disk and counts them as
            # clean: nobody writes them again. So what the last process left in the log may be read
            # today and be gone after a loss of power, with all that followed it. Carried into the
            # database, it is written and synced anew.
            self._carry_over(apsw.SQLITE_CHECKPOINT_RESTART)
            self._load()
        except BaseException:
            db.close()
            raise

    def _check(self, before: Index | None) -> None:
        """Refuse a file that contradicts itself.

        Pages have no checksums: a bit that flipped inside a value is not noticed here.
        """
        self._run("SELECT count(*) FROM sqlite_schema")  # SQLite looks at the log.
        # Not from ``-shm``: whoever closes any descriptor of a file gives up all the POSIX locks
        # that his process has on it. The next one to open the store would take himself for the
        # only one, and empty the index under this one's feet (SIGBUS, or worse).
        try:
            recovered, _ = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        except apsw.Error as error:
            raise _translated(error) from error
        why = lost_commits(self.path, before, max(0, recovered))
        if why is not None:
            raise StoreDamaged(f"{self.path}: {why}")
        ((pages,),) = self._run("PRAGMA page_count")
        if pages * _PAGE_BYTES <= CHECK_BYTES_MAX:
            ((found,), *_) = self._run("PRAGMA quick_check(1)")
            if found != "ok":
                raise StoreDamaged(f"{self.path}: {found}")

    def _configure(self, bytes_max: int | None, wal_bytes_max: int) -> None:
        if self._run("PRAGMA journal_mode = WAL") != [("wal",)]:
            raise StoreUnavailable(f"{self.path}: this file system cannot hold a WAL database", 5)
        self._run("PRAGMA synchronous = FULL")
        self._run(f"PRAGMA journal_size_limit = {wal_bytes_max}")
        if bytes_max is not None:
            self._run(f"PRAGMA max_page_count = {bytes_max // _PAGE_BYTES}")
        # SQLite's own automatic checkpoint never waits for readers, so a steady stream of them
        # lets the log grow for ever; and it hides errors. `_checkpoint` does neither.
        self._wal_pages = 0
        self._wal_step = max(1, wal_bytes_max // _PAGE_BYTES // 8)
        self._checkpoint_at = self._wal_step
        self._db.set_wal_hook(self._note_wal_pages)
        try:
            migrate(self._db)
        except apsw.Error as error:
            raise _translated(error) from error

    def reader(self) -> SqliteTaskReader:
        """Return a reader with a connection of its own."""
        return SqliteTaskReader(self.path)

    def unconfirmed_s(self) -> float:
        """Return 0: whoever else might write the file is started when this process has ended."""
        return 0.0

    # -- transactions ---------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Open the one write transaction; see `TaskStore.transaction`."""
        if self._writing:
            raise RuntimeError("a transaction is open already")
        if self._broken:
            raise OSError(errno.EIO, f"{self.path}: an fsync failed; this process must exit")
        self._begin()
        self._writing = True
        try:
            if self._run("PRAGMA data_version") != self._data_version:
                self._load()
            yield
            self._flush()
            failpoints.hit("store.commit.before")
            self._run("COMMIT")
        except BaseException as error:
            self._roll_back(error)
            raise
        finally:
            self._writing = False
        failpoints.hit("store.commit.after")
        self._checkpoint()

    def _begin(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except apsw.BusyError as error:
            self._require_locks_back(error)
            raise _translated(error) from error
        except apsw.Error as error:
            raise _translated(error) from error

    def _require_locks_back(self, error: apsw.BusyError) -> None:
        """Tell a file that somebody else uses from one that this process locked out itself."""
        if left_behind(self.path):
            self._broken = True
            raise OSError(
                errno.EIO, f"{self.path}: a lock was not given back; this process must exit"
            ) from error

    def _roll_back(self, cause: BaseException) -> None:
        self._broken = isinstance(cause, _SyncFailed)
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._load()
        except (apsw.Error, StoreUnavailable) as error:
            # What is in memory no longer tells what is stored.
            self._broken = True
            raise OSError(errno.EIO, f"{self.path}: rollback failed: {error}") from cause

    def _load(self) -> None:
        """Read what is kept in memory; forget what an unfinished transaction had added."""
        self._data_version = self._run("PRAGMA data_version")
        self._take_in(
            self._run("SELECT name, value FROM number"),
            self._run("SELECT id, queue, task_type, needs, ready FROM lane"),
        )

    def _flush(self) -> None:
        """Write what was kept in memory until now, once for the whole transaction."""
        numbers, lanes, depth, counts = self._take_changes()
        if numbers:
            self._many("UPDATE number SET value = ? WHERE name = ?", numbers)
        if lanes:
            self._many("UPDATE lane SET ready = ? WHERE id = ?", lanes)
        if depth:
            self._many(
                "INSERT INTO depth VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET tasks = tasks + excluded.tasks",
                depth,
            )
        if counts:
            self._many(
                "INSERT INTO counter VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET value = value + excluded.value",
                counts,
            )

    def _note_wal_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        if pages < self._wal_pages:
            self._checkpoint_at = self._wal_step  # The log has started again.
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self) -> None:
        """Carry the log into the database, now and then, so that it stays within its bound.

        A full disk or a busy reader only postpones it: the transaction is durable already.
        """
        if self._wal_pages < self._checkpoint_at:
            return
        # Past three quarters the readers of old pages are waited for, and the log starts again.
        wait = self._wal_pages >= 6 * self._wal_step
        mode = apsw.SQLITE_CHECKPOINT_RESTART if wait else apsw.SQLITE_CHECKPOINT_PASSIVE
        self._checkpoint_at = self._wal_pages + self._wal_step
        self._carry_over(mode)

    def _carry_over(self, mode: int) -> None:
        self._db.set_busy_timeout(_READERS_MS)
        try:
            failpoints.hit("store.checkpoint.before")
            self._db.wal_checkpoint(mode=mode)
            failpoints.hit("store.checkpoint.after")
        except apsw.BusyError as error:
            self._require_locks_back(error)
        except apsw.Error as error:
            failure = _translated(error)
            if not isinstance(failure, StoreUnavailable):
                self._broken = True
                raise failure from error
        finally:
            self._db.set_busy_timeout(_BUSY_MS)

    # -- tasks ----------------------------------------------------------------------------------

    def _insert_tasks(self, values: Sequence[Row]) -> set[int]:
        fresh: set[int] = set()

        def watched() -> Iterator[Row]:
            """Yield the rows; whoever asks for the next one has dealt with the one before."""
            count = self._db.total_changes()
            for row in values:
                yield row
                if count != (count := self._db.total_changes()):
                    fresh.add(row[0])

        # RETURNING would say the same for nearly as much time again.
        self._many(rows.INSERT_TASK, watched())
        return fresh

    def _insert_specs(self, values: Sequence[tuple[int, bytes]]) -> None:
        self._many("INSERT INTO task_spec VALUES (?, ?)", values)

    def _insert_number(self, name: str) -> None:
        self._run("INSERT INTO number VALUES (?, 0)", (name,))

    def _number_ends(self, values: Sequence[tuple[int, int]]) -> None:
        self._many("UPDATE task SET end_no = ? WHERE seq = ?", values)

    def _update_tasks(self, changes: Sequence[Change]) -> None:
        updates: dict[tuple[int, ...], list[Row]] = {}
        for task, was, now in changes:
            changed = tuple([i for i, value in enumerate(now) if value != was[i]])
            updates.setdefault(changed, []).append(
                (
                    *rows.plain_values(task),
                    *[now[i] for i in changed],
                    task.seq,
                    task.version - 1,
                )
            )
        before = self._db.total_changes()
        for changed, values in updates.items():
            self._many(_update_sql(changed), values)
        if self._db.total_changes() - before != len(changes):
            raise AssertionError("a task changed between the check of its version and its update")

    def _insert_lane(self, key: LaneKey) -> int:
        ((id_,),) = self._run(
            "INSERT INTO lane (queue, task_type, needs) VALUES (?, ?, ?) RETURNING id",
            (key.queue, key.task_type, codec.needs_to_json(key.needs)),
        )
        return int(id_)

    def _rows_by_id(self, ids: Sequence[str]) -> list[Row]:
        return self._run(_BY_ID, (codec.to_json(ids),))

    def _rows_by_seq(self, seqs: Sequence[int]) -> list[Row]:
        return self._run(_BY_SEQ, (codec.to_json(seqs),))

    def _old_keys(self, after: KeyPlace, before: float, limit: int) -> list[Row]:
        return self._run(_OLD_KEYS, (*after, before, limit))

    def _delete_keys(self, names: Sequence[tuple[str, str]]) -> None:
        self._many("DELETE FROM idempotency_key WHERE principal = ? AND key = ?", names)

    def _found(self, sql: str, values: Sequence[Any] = ()) -> list[Task]:
        """Return the tasks whose accept sequences a statement finds, in its order."""
        return self._tasks_at(self._run(sql, values))

    def claim_keys(self, claims: Sequence[KeyClaim]) -> dict[tuple[str, str], KeyClaim]:
        """Bind free idempotency keys; return who holds each ``(principal, key)`` afterwards."""
        self._must_write()
        self._many(
            "INSERT INTO idempotency_key VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", claims
        )
        return self.keys_held((claim.principal, claim.key) for claim in claims)

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        holders = self._many(_KEY_HELD, keys)
        return {(row[0], row[1]): KeyClaim(*row) for row in holders}

    def append_facts(self, facts: Sequence[Fact]) -> int:
        """Add lines of history and return the number of the last one (0 if there never was one)."""
        self._must_write()
        first = self._reserve("last_fact", len(facts))
        if facts:
            self._many(
                "INSERT INTO fact VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [rows.fact_values(number, fact) for number, fact in enumerate(facts, first)],
            )
        return self._numbers["last_fact"]

    def save_attempts(self, attempts: Sequence[Attempt]) -> None:
        """Insert or replace attempts by ``(task_id, token)``."""
        self._must_write()
        self._many(
            "INSERT OR REPLACE INTO attempt VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            map(rows.attempt_values, attempts),
        )

    # -- what the scheduler reads -----------------------------------------------------------------

    def heads(self, lane: LaneKey, limit: int) -> list[Task]:
        """Return the first ``limit`` ready tasks of a lane by ``(dispatch_key, seq)``."""
        known = self._lanes.get(lane)
        if known is None or not known.ready:
            return []
        return self._found(_HEADS, (known.id, limit))

    def leased(self) -> list[Task]:
        """Return every task that holds a lease, in accept order."""
        return sorted(self._found(_LEASED), key=lambda task: task.seq)

    def due(self, now: float, limit: int) -> list[Task]:
        """Return tasks whose ``wake_at`` is at or before ``now``, earliest first."""
        return self._found(_DUE, (now, limit))

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
        return self._found(_ORDERING_LINE, (key, limit))

    def concurrency_keys_held(self, limit: int, *, after: str = "") -> list[str]:
        """Return up to ``limit`` distinct concurrency keys for which tasks are held, sorted."""
        found: list[str] = []
        last = after
        while len(found) < limit:  # Leaps from key to key along the index: flat cost per key.
            row = self._run(
                "SELECT held_key FROM task WHERE held_key > ? ORDER BY held_key LIMIT 1", (last,)
            )
            if not row:
                break
            last = row[0][0]
            found.append(last)
        return found

    def held_by_concurrency(self, key: str, limit: int) -> list[Task]:
        """Return tasks held for this concurrency key by ``(dispatch_key, seq)``."""
        return self._found(_HELD, (key, limit))

    def add_dependencies(self, child_id: str, parent_ids: Sequence[str]) -> None:
        """Note that ``child_id``, which is stored already, waits for each parent.

        Raises:
            NotFound: the child is not stored.
        """
        self._must_write()
        child = self._run("SELECT seq FROM task WHERE id = ?", (child_id,))
        if not child:
            raise NotFound("task", child_id)
        self._many(
            "INSERT INTO dependency VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(parent_id, child[0][0], child_id) for parent_id in parent_ids],
        )

    def task_states(self, ids: Iterable[str]) -> dict[str, TaskState]:
        """Return the states of those of ``ids`` that exist."""
        found = self._run(
            "SELECT t.id, t.state FROM json_each(?) AS j CROSS JOIN task AS t ON t.id = j.value",
            (codec.to_json(ids),),
        )
        return {id_: TaskState(state) for id_, state in found}

    def dependents(self, parent_id: str, limit: int) -> list[str]:
        """Return up to ``limit`` ids that still wait for ``parent_id``, in accept order."""
        return [child_id for (child_id,) in self._run(_DEPENDENTS, (parent_id, limit))]

    def waited_for(self, ids: Sequence[str]) -> set[str]:
        """Return those of ``ids`` for which any task still waits."""
        return {parent_id for (parent_id,) in self._run(_WAITED_FOR, (codec.to_json(ids),))}

    def drop_dependents(self, parent_id: str, child_ids: Sequence[str]) -> None:
        """Forget that these children wait for ``parent_id``."""
        self._must_write()
        # By number, the second half of the key: otherwise each chunk would read all that are left.
        self._many(
            "DELETE FROM dependency "
            "WHERE parent_id = ? AND child_seq = (SELECT seq FROM task WHERE id = ?)",
            [(parent_id, child_id) for child_id in child_ids],
        )

    def push_settlements(self, items: Sequence[tuple[str, bool]]) -> None:
        """Add durable `Settlement` orders for ``(task_id, completed)``."""
        self._must_write()
        self._many(
            "INSERT INTO settlement VALUES (?, ?, ?)",
            [(self._next("last_settlement"), task_id, done) for task_id, done in items],
        )

    def settlements(self, limit: int) -> list[Settlement]:
        """Return the oldest settlement orders not carried out yet."""
        found = self._run(
            "SELECT number, task_id, completed FROM settlement ORDER BY number LIMIT ?", (limit,)
        )
        return [Settlement(number, task_id, bool(done)) for number, task_id, done in found]

    def drop_settlement(self, number: int) -> None:
        """Forget a settlement order that has been carried out."""
        self._must_write()
        self._run("DELETE FROM settlement WHERE number = ?", (number,))

    # -- webhooks ---------------------------------------------------------------------------------

    def save_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        """Insert or replace deliveries by id."""
        self._must_write()
        marks = ", ".join("?" * len(rows.DELIVERY))
        self._many(f"INSERT OR REPLACE INTO delivery VALUES ({marks})", deliveries)

    def drop_deliveries(self, ids: Sequence[str]) -> None:
        """Forget deliveries that are done with."""
        self._must_write()
        self._many("DELETE FROM delivery WHERE id = ?", [(id_,) for id_ in ids])

    # -- schedules --------------------------------------------------------------------------------

    def save_schedules(self, schedules: Sequence[Schedule]) -> None:
        """Insert or replace schedules by principal and name; none may be there twice."""
        self._must_write()
        marks = ", ".join("?" * len(rows.SCHEDULE))
        values = map(rows.schedule_values, schedules)
        self._many(f"INSERT OR REPLACE INTO schedule VALUES ({marks})", values)

    def drop_schedules(self, keys: Sequence[tuple[str, str]]) -> None:
        """Forget schedules by ``(principal, name)``."""
        self._must_write()
        self._many("DELETE FROM schedule WHERE principal = ? AND name = ?", keys)

    def due_schedules(self, now: float, limit: int) -> list[Schedule]:
        """Return schedules whose ``wake_at`` is at or before ``now``, earliest first."""
        return list(map(rows.schedule_from_row, self._run(_DUE_SCHEDULES, (now, limit))))

    def next_schedule_wake(self) -> float | None:
        """Return the earliest ``wake_at`` of all schedules, or ``None``."""
        found = self._run(_NEXT_SCHEDULE_WAKE)
        return found[0][0] if found else None

    def count_schedules(self, principal: str | None = None) -> int:
        """Return how many schedules there are, of a principal or in all."""
        of, values = ("", ()) if principal is None else (" WHERE principal = ?", (principal,))
        return int(self._run(f"SELECT count(*) FROM schedule{of}", values)[0][0])

    # -- small tables -----------------------------------------------------------------------------

    def save_worker(self, record: WorkerRecord) -> None:
        """Insert or replace a worker by name."""
        self._must_write()
        body = codec.pack_worker(record)
        self._run("INSERT OR REPLACE INTO worker VALUES (?, ?)", (record.name, body))

    def forget_worker(self, name: str) -> None:
        """Remove a worker that left for good."""
        self._must_write()
        self._run("DELETE FROM worker WHERE name = ?", (name,))

    def set_paused(self, queue: str, paused: bool) -> None:
        """Pause a queue, or resume it."""
        self._must_write()
        if paused:
            self._run("INSERT INTO paused_queue VALUES (?) ON CONFLICT DO NOTHING", (queue,))
        else:
            self._run("DELETE FROM paused_queue WHERE queue = ?", (queue,))

    def append_audit(self, entries: Sequence[AuditEntry]) -> None:
        """Add audit lines, each chained to the one before it."""
        self._must_write()
        self._many("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self._chained(entries))

    def _audit_tails(self) -> list[Row]:
        return [*self._run(_AUDIT_TAIL), *self._run(_AUDIT_ANCHOR)]

    def prune(self, ended_before: float, keys_before: float, limit: int) -> int:
        """Delete up to ``limit`` old tasks, and up to ``limit`` keys; see `TaskStore.prune`."""
        self._must_write()
        gone = self._run(_PRUNABLE, (ended_before, limit))
        by_seq = [(row[0],) for row in gone]
        by_id = [(row[1],) for row in gone]
        self._many("DELETE FROM task WHERE seq = ?", by_seq)
        self._many("DELETE FROM task_spec WHERE seq = ?", by_seq)
        self._many("DELETE FROM dependency WHERE child_seq = ?", by_seq)
        self._many("DELETE FROM attempt WHERE task_id = ?", by_id)
        self._many("DELETE FROM fact WHERE task_id = ?", by_id)
        for seq, _id, queue, state in gone:
            self._forget(seq)
            self._depth[queue, state] -= 1
        self._prune_keys(keys_before, limit)
        self._many("DELETE FROM lane WHERE id = ?", [(id_,) for id_ in self._drop_empty_lanes()])
        return len(gone)

    def prune_audit(self, before: float, limit: int) -> int:
        """Delete up to ``limit`` old audit lines; see `TaskStore.prune_audit`."""
        self._must_write()
        oldest = self._run("SELECT number, at, hash FROM audit ORDER BY number LIMIT ?", (limit,))
        gone = list(takewhile(lambda row: row[1] < before, oldest))
        if gone:
            number, _at, digest = gone[-1]
            self._run("DELETE FROM audit WHERE number <= ?", (number,))
            if digest is not None:
                self._run("DELETE FROM audit_anchor")
                self._run("INSERT INTO audit_anchor VALUES (?, ?)", (number, digest))
        return len(gone)


class SqliteTaskReader(_Connection):
    """Reads of a SQLite file that somebody else writes. Implements `TaskReader`.

    Every method is one statement, hence one short read transaction that sees one commit. One that
    takes longer than `READ_S_MAX` is broken off with `Overloaded`: as long as it lasts, the log
    beside the database cannot start again, and whoever else reads here waits.
    """

    def __init__(self, path: str | os.PathLike[str], *, library_version: str | None = None) -> None:
        """Open the file read-only.

        Raises:
            StoreTooOld: the SQLite library is older than the WAL-reset fix.
            SchemaTooNew: a newer hcna-ray wrote the file.
            StoreUnavailable: there is no store there yet.
        """
        require_library(library_version)
        missing = StoreUnavailable(f"there is no task store at {path} yet: start it with hcna up")
        try:
            db = apsw.Connection(
                f"file:{quote(os.fspath(path))}?mode=ro",
                flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
                statementcachesize=256,
            )
        except apsw.CantOpenError as error:
            raise missing from error
        try:
            super().__init__(db, cache_bytes=16 * 1024 * 1024)
            self._run("PRAGMA query_only = ON")
            db.set_progress_handler(self._takes_too_long, _LOOK_STEPS)
            if not check_schema(db):
                raise missing
        except apsw.Error as error:
            db.close()
            raise _translated(error) from error
        except BaseException:
            db.close()
            raise

    def _run(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        self._until = time.monotonic() + READ_S_MAX
        try:
            return super()._run(sql, values)
        except apsw.InterruptError as error:
            raise Overloaded(
                f"this read takes longer than {READ_S_MAX:g} s; ask for less at once", 5
            ) from error

    def _takes_too_long(self) -> bool:
        return time.monotonic() > self._until

    def check(self) -> None:
        """Compare every table with its indexes. Reads everything, however long that takes.

        Raises:
            StoreDamaged: they contradict each other.
        """
        self._until = float("inf")
        ((found,), *_) = super()._run("PRAGMA integrity_check(1)")
        if found != "ok":
            raise StoreDamaged(str(found))

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        found = map(rows.task_from_row, self._run(_BY_ID, (codec.to_json(ids),)))
        return {task.id: task for task in found}

    def attempts(self, task_id: str) -> list[Attempt]:
        """Return the attempts of a task, oldest first."""
        return [rows.attempt_from_row(row) for row in self._run(_ATTEMPTS, (task_id,))]

    def page(self, where: TaskFilter, *, before_seq: int | None, limit: int) -> list[Task]:
        """Return tasks that fit, newest first, with ``seq < before_seq`` (a keyset page).

        One filter alone is read off its index. Of several, the first of ids, batch, worker,
        principal, states (with kind), type and queue picks the index and the others are compared
        row by row, as ``since`` and the house's owner always are: such a combination, when few
        tasks fit it, reads everything its index holds.
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
            found = self._run(_ENDED_OF_IDS, (codec.to_json(ids), after, limit))
        return [(row[0], rows.task_from_row(row[1:])) for row in sorted(found, key=_first)]

    def open_count(self, *, ids: Sequence[str] = (), batch_id: str | None = None) -> int:
        """Return how many of a batch, or else among ``ids``, exist and have not ended."""
        if batch_id is not None:
            ((count,),) = self._run(_OPEN_OF_BATCH, (batch_id, batch_id))
        else:
            ((count,),) = self._run(_OPEN_OF_IDS, (codec.to_json(ids),))
        return int(count)

    def batch_exists(self, batch_id: str) -> bool:
        """Return whether any task carries this batch id."""
        return bool(self._run("SELECT 1 FROM task WHERE batch_id = ? LIMIT 1", (batch_id,)))

    def belongs(self, ids: Iterable[str]) -> dict[str, Belongs]:
        """Return whose those of ``ids`` are that exist."""
        found = self._run(_BELONGS, (codec.to_json(ids),))
        return {row[0]: Belongs(*row[1:]) for row in found}

    def open_of(self, principal: str, limit: int) -> int:
        """Return how many tasks of a principal have not ended, counted as far as ``limit``."""
        sql = _OPEN_OF_OWNER if principal == OWNER else _OPEN_OF_PRINCIPAL
        ((count,),) = self._run(sql, (principal, limit))
        return int(count)

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        holders = [row for pair in keys for row in self._run(_KEY_HELD, pair)]
        return {(row[0], row[1]): KeyClaim(*row) for row in holders}

    def facts(self, *, after: int, limit: int, task_id: str | None = None) -> list[StoredFact]:
        """Return history with numbers above ``after``, oldest first."""
        sql, values = (
            (_FACTS, (after, limit))
            if task_id is None
            else (_FACTS_OF_TASK, (task_id, after, limit))
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
        values = due_before, codec.to_json(not_to), limit
        return [Delivery(*row) for row in self._run(_DELIVERIES, values)]

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


_BY_SEQ = (
    f"SELECT {rows.COLUMNS} FROM json_each(?) AS j CROSS JOIN task AS t ON t.seq = j.value "
    "CROSS JOIN task_spec AS s ON s.seq = t.seq"
)
_BY_ID = (
    f"SELECT {rows.COLUMNS} FROM json_each(?) AS j CROSS JOIN task AS t ON t.id = j.value "
    "CROSS JOIN task_spec AS s ON s.seq = t.seq"
)
_BELONGS = (
    "SELECT t.id, t.principal, t.task_type, t.queue FROM json_each(?) AS j "
    "CROSS JOIN task AS t ON t.id = j.value"
)
# What the scheduler looks for is found in indexes alone, as row numbers.
_HEADS = "SELECT seq FROM task WHERE ready_lane = ? ORDER BY dispatch_key, seq LIMIT ?"
_QUEUED_SINCE = (
    "SELECT queue, MIN(since) FROM (SELECT l.queue, (SELECT t.queued_at FROM task AS t "
    "WHERE t.ready_lane = l.id ORDER BY t.dispatch_key, t.seq LIMIT 1) AS since "
    "FROM lane AS l WHERE l.ready > 0) AS f WHERE since IS NOT NULL GROUP BY queue"
)
_LEASED = "SELECT seq FROM task WHERE granted_at IS NOT NULL"
_DUE = "SELECT seq FROM task WHERE wake_at <= ? ORDER BY wake_at, seq LIMIT ?"
_NEXT_WAKE = "SELECT wake_at FROM task WHERE wake_at IS NOT NULL ORDER BY wake_at LIMIT 1"
_ORDERING_OUT = (
    "SELECT seq FROM task WHERE ordering_key = ? AND end_no IS NULL AND hold & 1 = 0 "
    "ORDER BY seq LIMIT 1"
)
_ORDERING_LINE = (
    "SELECT seq FROM task WHERE ordering_key = ? AND end_no IS NULL ORDER BY seq LIMIT ?"
)
_HELD = "SELECT seq FROM task WHERE held_key = ? ORDER BY dispatch_key, seq LIMIT ?"
_DEPENDENTS = "SELECT child_id FROM dependency WHERE parent_id = ? ORDER BY child_seq LIMIT ?"
_WAITED_FOR = (
    "SELECT value FROM json_each(?) WHERE EXISTS (SELECT 1 FROM dependency WHERE parent_id = value)"
)
_PRUNABLE = (
    "SELECT seq, id, queue, state FROM task AS t WHERE end_no IS NOT NULL AND finished_at < ? "
    "AND NOT EXISTS (SELECT 1 FROM dependency WHERE parent_id = t.id) "
    "ORDER BY finished_at, seq LIMIT ?"
)
_OLD_KEYS = (
    "SELECT at, principal, key, NOT EXISTS (SELECT 1 FROM task WHERE id = k.task_id) "
    "FROM idempotency_key AS k WHERE (at, principal, key) > (?, ?, ?) AND at < ? "
    "ORDER BY at, principal, key LIMIT ?"
)
# The rows are picked by number first: a sort must not carry payloads around.
_ENDED = (
    f"SELECT p.end_no, {rows.COLUMNS} FROM ({{}}) AS p CROSS JOIN task AS t ON t.seq = p.seq "
    "CROSS JOIN task_spec AS s ON s.seq = p.seq"
)
_ENDED_OF_BATCH = _ENDED.format(
    "SELECT seq, end_no FROM task WHERE batch_id = ? AND end_no > ? ORDER BY end_no LIMIT ?"
)
_ENDED_OF_IDS = _ENDED.format(
    "SELECT seq, end_no FROM task WHERE id IN (SELECT value FROM json_each(?)) AND +end_no > ? "
    "ORDER BY end_no LIMIT ?"
)
# Both counts are read off covering indexes.
_OPEN_OF_BATCH = (
    "SELECT (SELECT count(*) FROM task WHERE batch_id = ?) - "
    "(SELECT count(*) FROM task WHERE batch_id = ? AND end_no > 0)"
)
_OPEN_OF_IDS = (
    "SELECT count(*) FROM task WHERE id IN (SELECT value FROM json_each(?)) AND +end_no IS NULL"
)
# Only in these words are the indexes of principals used: they leave the house's owner out.
_OF_PRINCIPAL = f"principal = ? AND principal <> '{OWNER}'"
_FAILED_OF_PRINCIPAL = f"{_OF_PRINCIPAL} AND state = '{TaskState.FAILED.value}'"
_OPEN_OF_OWNER = (
    "SELECT count(*) FROM (SELECT 1 FROM task WHERE principal = ? AND end_no IS NULL LIMIT ?)"
)
_OPEN_OF_PRINCIPAL = _OPEN_OF_OWNER.replace("principal = ?", _OF_PRINCIPAL)
_KEY_HELD = (
    "SELECT principal, key, task_id, fingerprint, at FROM idempotency_key "
    "WHERE principal = ? AND key = ?"
)
_ATTEMPTS = (
    f"SELECT {', '.join(rows.ATTEMPT)} FROM attempt WHERE task_id = ? ORDER BY generation, attempt"
)
_FACT = f"SELECT {', '.join(rows.FACT)} FROM fact"
_FACTS = f"{_FACT} WHERE number > ? ORDER BY number LIMIT ?"
_FACTS_OF_TASK = f"{_FACT} WHERE task_id = ? AND number > ? ORDER BY number LIMIT ?"
_DELIVERIES = (
    f"SELECT {', '.join(rows.DELIVERY)} FROM delivery WHERE due_at <= ? "
    "AND target NOT IN (SELECT value FROM json_each(?)) ORDER BY due_at, id LIMIT ?"
)
_SCHEDULE = f"SELECT {', '.join(rows.SCHEDULE)} FROM schedule"
_SCHEDULE_BY_KEY = f"{_SCHEDULE} WHERE principal = ? AND name = ?"
_DUE_SCHEDULES = f"{_SCHEDULE} WHERE wake_at <= ? ORDER BY wake_at, principal, name LIMIT ?"
_NEXT_SCHEDULE_WAKE = (
    "SELECT wake_at FROM schedule WHERE wake_at IS NOT NULL ORDER BY wake_at LIMIT 1"
)
_BEHIND = "(principal, name) > (?, ?) ORDER BY principal, name LIMIT ?"
_SCHEDULES = f"{_SCHEDULE} WHERE {_BEHIND}"
_SCHEDULES_OF = f"{_SCHEDULE} WHERE principal = ? AND {_BEHIND}"
_AUDIT = f"SELECT {', '.join(rows.AUDIT)} FROM audit WHERE number < ? ORDER BY number DESC LIMIT ?"
_AUDIT_AFTER = f"SELECT {', '.join(rows.AUDIT)} FROM audit WHERE number > ? ORDER BY number LIMIT ?"
_AUDIT_TAIL = "SELECT hash FROM audit ORDER BY number DESC LIMIT 1"
_AUDIT_ANCHOR = "SELECT hash FROM audit_anchor"
_AUDIT_STATE = (
    "SELECT n.value, a.number, a.hash FROM number AS n LEFT JOIN audit_anchor AS a "
    "WHERE n.name = 'last_audit'"
)


def page_query(where: TaskFilter, *, before_seq: int | None, limit: int) -> tuple[str, list[Any]]:
    """Return the statement that finds a listing page, and its values. Rows come in any order."""
    driving: list[tuple[str, Any]] = []
    if where.ids:
        driving.append(("id IN (SELECT value FROM json_each(?))", codec.to_json(where.ids)))
    if where.batch_id is not None:
        driving.append(("batch_id = ?", where.batch_id))
    if where.worker is not None:
        driving.append(("worker = ?", where.worker))
    if where.principal is not None and where.principal != OWNER:
        driving.append((_OF_PRINCIPAL if not driving else "principal = ?", where.principal))
    compared: list[tuple[str, Any]] = [
        (f"{column} = ?", value)
        for column, value in (
            ("task_type", where.task_type),
            ("queue", where.queue),
            ("principal", OWNER if where.principal == OWNER else None),
            ("kind", where.kind),
        )
        if value is not None
    ]
    if where.since is not None:
        compared.append(("accepted_at >= ?", where.since))
    states = {state.value for state in where.states}
    if where.kind is not None:
        # Only a failed task has a kind; and so the index of states is of use.
        states = {TaskState.FAILED.value}
    table = "task"
    ranges: list[list[tuple[str, Any]]]
    if states == {TaskState.FAILED.value} and driving and driving[0][0] == _OF_PRINCIPAL:
        # Of all that somebody has submitted few have failed, and they have an index of their own.
        table = "task INDEXED BY task_principal_failed"
        ranges = [[(_FAILED_OF_PRINCIPAL, driving[0][1]), *compared]]
    elif not states:
        ranges = [[*driving, *compared]]
    elif driving:
        among = ("state IN (SELECT value FROM json_each(?))", codec.to_json(states))
        ranges = [[*driving, among, *compared]]
    else:
        # One range of the index for each state, merged: an IN would sort all that fit.
        ranges = [[("state = ?", state), *compared] for state in sorted(states)]
    picks, values = [], []
    for conditions in ranges:
        # A plus takes a column out of the choice of an index: only the first may drive.
        texts = [f"+{text}" if i else text for i, (text, _value) in enumerate(conditions)]
        picks.append(
            f"SELECT seq FROM {table} WHERE {' AND '.join([*texts, 'seq < ?'])} "
            "ORDER BY seq DESC LIMIT ?"
        )
        values += [value for _text, value in conditions]
        values += [_SEQ_MAX if before_seq is None else before_seq, limit]
    picked = picks[0]
    if len(picks) > 1:
        union = " UNION ALL ".join(f"SELECT seq FROM ({pick})" for pick in picks)
        picked = f"{union} ORDER BY seq DESC LIMIT ?"
        values.append(limit)
    return f"{rows.TASK} WHERE t.seq IN ({picked})", values


@cache  # At most one for each subset of the indexed columns.
def _update_sql(changed: tuple[int, ...]) -> str:
    return rows.update_sql(tuple(rows.INDEXED[i] for i in changed))


def _first(row: Row) -> Any:
    return row[0]


def _translated(error: apsw.Error) -> Exception:
    """Return what the contract says for an error of SQLite; unexpected ones stay as they are."""
    if isinstance(error, apsw.IOError) and _extended(error) in _FSYNC_FAILED:
        return _SyncFailed(errno.EIO, f"the task store could not be synced to disk: {error}")
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return StoreDamaged(str(error))
    if isinstance(error, apsw.FullError):
        return StoreFull(f"the task store's disk is full: {error}", 10)
    if isinstance(error, _REFUSED):
        return StoreUnavailable(f"the task store cannot be used now: {error}", 5)
    if isinstance(error, apsw.ConstraintError):
        return ValueError(str(error))
    return error


def _extended(error: apsw.Error) -> int:
    # Set by apsw on every error that SQLite reported; missing from its type stubs.
    return int(getattr(error, "extendedresult", 0))

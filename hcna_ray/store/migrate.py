"""Moves a whole task store from SQLite to PostgreSQL or back, or nothing of it.

One transaction on the server holds the copy. Before it is committed every row is read back, and the
digest over all rows of each table must be the one that the source gave. On the way back the copy is
a file beside its place until all of it was compared.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw
import msgspec

from hcna_ray import failpoints
from hcna_ray.core.errors import HcnaError, StoreUnavailable
from hcna_ray.durable import sync_dir, sync_file
from hcna_ray.store import migrations
from hcna_ray.store.backup import scratch
from hcna_ray.store.postgres import PostgresTaskStore
from hcna_ray.store.postgres_session import Manners, Session
from hcna_ray.store.rows import Row
from hcna_ray.store.sqlite import require_library

#: Tables that tell of the database itself, not of tasks.
_OWN = frozenset({"schema_migration", "leader", "origin"})
_encode = msgspec.msgpack.Encoder().encode


class StoreNotEmpty(HcnaError):
    """A copy would mix with what is stored already."""

    code = "store_not_empty"

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table

    def __str__(self) -> str:
        return f"the target holds rows in {self.table} already; copy into an empty database"


class SourceInUse(HcnaError):
    """Somebody has the source open, so a copy would miss what is written meanwhile."""

    code = "store_in_use"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} is in use; stop everything that has it open first (hcna down)"


class CopyDiffers(HcnaError):
    """What arrived is not what was sent. Nothing was kept."""

    code = "store_copy_differs"

    def __init__(self, table: str, sent: int, arrived: int) -> None:
        super().__init__(table, sent, arrived)
        self.table, self.sent, self.arrived = table, sent, arrived

    def __str__(self) -> str:
        return (
            f"table {self.table} differs after the copy ({self.sent} rows sent, {self.arrived} "
            "arrived); nothing was kept in the target, the source is as it was"
        )


@dataclass(frozen=True, slots=True)
class CopiedTable:
    """One table: how many rows, and SHA-256 over them in the order of their key."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Table:
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]


def copy_store(
    source: Path,
    target_url: str,
    *,
    unsafe: bool = False,
    on_table: Callable[[CopiedTable], None] = lambda table: None,
) -> tuple[CopiedTable, ...]:
    """Copy every table of a SQLite store into an empty PostgreSQL database.

    The source is locked meanwhile and left as it was, apart from migrations that it had missed. The
    generation stays: tokens given out by the source are good in the target, so the source must not
    be used again.

    Args:
        source: The SQLite file, which nobody may have open.
        target_url: The database; its schema is created.
        unsafe: Take a server that may forget what it has committed.
        on_table: Told of each table that has arrived and was compared.

    Returns:
        What was copied, when all of it is committed.

    Raises:
        FileNotFoundError: there is no source.
        SourceInUse: somebody has it open.
        StoreInUse: another process writes to the target.
        StoreNotEmpty: the target holds something already.
        CopyDiffers: what arrived is not what was sent.
        StoreUnavailable: either of them cannot be used now.
    """
    require_library()
    if not source.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no SQLite store", os.fspath(source))
    # A large table takes its time in one statement; a broken connection is noticed all the same.
    manners = Manners(
        name="hcna store migrate",
        statement_s=0,
        idle_in_transaction_s=0,
        answer_s=86400.0,
        unsafe=unsafe,
    )
    db = _locked(source)
    try:
        migrations.migrate(db)
        target = PostgresTaskStore(target_url, unsafe=unsafe, open_wait_s=2.0, manners=manners)
        try:
            with target.transaction():
                copied = tuple(_copy_all(db, target.session, on_table))
                failpoints.hit("copy.store.compared")
            failpoints.hit("copy.store.committed")
            return copied
        finally:
            target.close()
    except apsw.Error as error:
        raise StoreUnavailable(f"{source} cannot be read: {error}") from error
    finally:
        db.close()


def copy_back(
    source_url: str,
    target: Path,
    *,
    unsafe: bool = False,
    on_table: Callable[[CopiedTable], None] = lambda table: None,
) -> tuple[CopiedTable, ...]:
    """Copy every table of a PostgreSQL store into a SQLite file that is not there yet.

    The source is held as by a moderator meanwhile and left as it was. Generation and tokens stay as
    with `copy_store`, so the source must not be used again.

    Args:
        source_url: The database, which no moderator may work on.
        target: The file to make; its directory must exist.
        unsafe: Take a server that may forget what it has committed.
        on_table: Told of each table that has arrived and was compared.

    Returns:
        What was copied, when all of it is on the disk and the file has its name.

    Raises:
        FileExistsError: the file, or the log of one, is there.
        StoreInUse: a moderator works on the source.
        StoreRestored: the source was put back, and not taken over yet.
        CopyDiffers: what arrived is not what was sent.
        StoreUnavailable: either of them cannot be used now.
    """
    require_library()
    _must_be_free(target)
    manners = Manners(
        name="hcna store migrate",
        statement_s=0,
        idle_in_transaction_s=0,
        answer_s=86400.0,
        unsafe=unsafe,
    )
    source = PostgresTaskStore(source_url, unsafe=unsafe, open_wait_s=2.0, manners=manners)
    try:
        with scratch(target.parent, ".hcna-copy-") as folder:
            copy = folder / target.name
            with source.transaction():
                copied = tuple(_copy_back_all(source.session, copy, on_table))
            failpoints.hit("copy.file.compared")
            # Unlike a rename this never replaces a file that somebody else has made meanwhile.
            os.link(copy, target)
            sync_dir(target.parent)
            failpoints.hit("copy.file.named")
        return copied
    except apsw.Error as error:
        raise StoreUnavailable(f"{target} cannot be written: {error}") from error
    finally:
        source.close()


def _must_be_free(target: Path) -> None:
    """Refuse a target that is there, or whose name a log of another file goes with."""
    for end in ("", "-wal", "-shm", "-journal"):
        path = target.with_name(f"{target.name}{end}")
        if path.exists():
            raise FileExistsError(errno.EEXIST, "move this file away first", os.fspath(path))


def _copy_back_all(
    session: Session, path: Path, on_table: Callable[[CopiedTable], None]
) -> Iterator[CopiedTable]:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    db = apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        # Nobody else knows the file, and what breaks off is thrown away.
        db.execute("PRAGMA journal_mode = OFF").fetchall()
        db.execute("PRAGMA synchronous = OFF")
        migrations.migrate(db)
        tables = _tables(db)
        _must_be_alike(tables, _target_types(session))
        with db:
            db.execute("DELETE FROM number")
            for table in tables:
                select = _select(table)
                sent = _Digest(session.stream(select))
                marks = ", ".join("?" * len(table.columns))
                names = ", ".join(f'"{column}"' for column in table.columns)
                db.executemany(f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})', sent)
                failpoints.hit("copy.back.sent")
                copied = _compared(table, sent, _Digest(db.execute(select)))
                on_table(copied)
                yield copied
    finally:
        db.close()
    sync_file(path)


def _locked(path: Path) -> apsw.Connection:
    """Open a SQLite store for nobody else: in this mode it is one connection's alone."""
    db = apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN IMMEDIATE")
        db.execute("COMMIT")
    except apsw.BusyError as error:
        db.close()
        raise SourceInUse(os.fspath(path)) from error
    except apsw.Error as error:
        db.close()
        raise StoreUnavailable(f"{path} cannot be opened: {error}") from error
    return db


def _copy_all(
    db: apsw.Connection, session: Session, on_table: Callable[[CopiedTable], None]
) -> Iterator[CopiedTable]:
    tables = _tables(db)
    types = _target_types(session)
    _must_be_alike(tables, types)
    for table in tables:
        _must_be_empty(session, table)
    for table in tables:
        select = _select(table)
        sent = _Digest(db.execute(select))
        kinds = [types[table.name][column] for column in table.columns]
        session.copy_in(table.name, table.columns, kinds, sent)
        failpoints.hit("copy.table.sent")
        copied = _compared(table, sent, _Digest(session.stream(select)))
        on_table(copied)
        yield copied
    session.script("ANALYZE")


def _must_be_alike(tables: Iterable[_Table], types: dict[str, dict[str, str]]) -> None:
    expected = {table.name: set(table.columns) for table in tables}
    found = {name: set(columns) for name, columns in types.items()}
    if expected != found:
        raise AssertionError(f"the schemas differ: {expected} and {found}")


def _select(table: _Table) -> str:
    names = ", ".join(f'"{column}"' for column in table.columns)
    key = ", ".join(f'"{column}"' for column in table.key)
    return f'SELECT {names} FROM "{table.name}" ORDER BY {key}'


def _compared(table: _Table, sent: _Digest, arrived: _Digest) -> CopiedTable:
    """Read to the end what has arrived; return what it is if that is what was sent."""
    for _row in arrived:
        pass
    if (sent.count, sent.sha256) != (arrived.count, arrived.sha256):
        raise CopyDiffers(table.name, sent.count, arrived.count)
    return CopiedTable(table.name, arrived.count, arrived.sha256)


class _Digest:
    """Rows on their way, counted and hashed."""

    def __init__(self, source: Iterable[Row]) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._source:
            self.count += 1
            self._hash.update(_encode(row))
            yield row

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _tables(db: apsw.Connection) -> list[_Table]:
    """Return the tables as the file itself tells of them, so that none is forgotten."""
    found = []
    for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"):
        if name in _OWN or str(name).startswith("sqlite_"):
            continue
        columns = [(row[1], row[5]) for row in db.execute(f'PRAGMA table_info("{name}")')]
        key = [column for column, place in sorted(columns, key=lambda one: one[1]) if place]
        found.append(_Table(str(name), tuple(column for column, _ in columns), tuple(key)))
    return found


def _target_types(session: Session) -> dict[str, dict[str, str]]:
    """Return the type of every column, by table."""
    types: dict[str, dict[str, str]] = {}
    for table, column, kind in session.run(
        "SELECT table_name::text, column_name::text, udt_name::text "
        "FROM information_schema.columns WHERE table_schema = current_schema()"
    ):
        if table not in _OWN:
            types.setdefault(table, {})[column] = kind
    return types


def _must_be_empty(session: Session, table: _Table) -> None:
    if table.name == "number":
        fresh = (
            "SELECT name FROM number WHERE value <> CASE name WHEN 'generation' THEN 1 ELSE 0 END"
        )
        if session.run(fresh):
            raise StoreNotEmpty(table.name)
        session.run("DELETE FROM number")
    elif session.run(f'SELECT 1::bigint FROM "{table.name}" LIMIT 1'):
        raise StoreNotEmpty(table.name)

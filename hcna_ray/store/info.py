"""What can be said of the store that the settings name, without changing it."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass
from typing import Any

import apsw

from hcna_ray.config import Settings
from hcna_ray.core.models import TaskFilter
from hcna_ray.store.factory import open_reader
from hcna_ray.store.sqlite import SqliteTaskReader


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreInfo:
    """One store, as ``hcna store info`` shows it."""

    #: Its URL without the password.
    store: str
    #: ``SQLite 3.54.1`` or ``PostgreSQL 15.18``.
    engine: str
    bytes: int
    schema: int
    generation: int
    #: Tasks by state.
    tasks: dict[str, int]
    facts: int
    workers: int
    #: Who was the last to open it for writing; PostgreSQL only.
    writer: str | None
    #: What is done until a commit counts, in words.
    durability: str = "every commit is synced to disk"
    #: Settings of the server for which it may lose what it has committed.
    risks: tuple[str, ...] = ()


def describe_store(settings: Settings) -> StoreInfo:
    """Look at the store.

    Raises:
        StoreUnavailable: there is none yet, or it cannot be reached.
    """
    reader = open_reader(settings)
    try:
        tasks: Tally[str] = Tally()
        for (_queue, state), count in reader.depth().items():
            tasks[state.value] += count
        facts, workers = reader.last_fact(), len(reader.workers())
    finally:
        reader.close()
    look = _look_at_postgres if settings.store_path is None else _look_at_sqlite
    engine, size, schema, generation, more = look(settings)
    return StoreInfo(
        store=settings.store_name,
        engine=engine,
        bytes=size,
        schema=schema,
        generation=generation,
        tasks=dict(tasks),
        facts=facts,
        workers=workers,
        **more,
    )


def risks_of(settings: Settings) -> tuple[str, ...]:
    """Return for which of its settings the server may lose commits; SQLite has none of them.

    Raises:
        StoreRestored: the database was restored or copied, and nobody has taken it over yet.
        StoreUnavailable: the server cannot be reached.
    """
    if settings.store_path is not None:
        return ()
    from hcna_ray.store import origin
    from hcna_ray.store.postgres_session import Manners, Session

    session = Session(settings.store_url, Manners(name="hcna doctor", read_only=True))
    try:
        origin.check(session)
    finally:
        session.close()
    return session.risks


_Look = tuple[str, int, int, int, dict[str, Any]]


def check_store(settings: Settings) -> int:
    """Read all of a SQLite store and compare its tables with their indexes.

    Takes about a second for 100 000 tasks, beside whoever writes. A PostgreSQL server checks its
    pages itself, where it was set up with checksums.

    Returns:
        How many tasks could be read.

    Raises:
        StoreDamaged: something in it contradicts itself or cannot be read.
        StoreUnavailable: there is none yet, or it cannot be reached.
    """
    reader = open_reader(settings)
    try:
        if isinstance(reader, SqliteTaskReader):
            reader.check()
        count, before = 0, None
        while page := reader.page(TaskFilter(), before_seq=before, limit=_PAGE):
            count, before = count + len(page), page[-1].seq
    finally:
        reader.close()
    return count


_PAGE = 1000
_SCHEMA = "SELECT max(number) FROM schema_migration"
_GENERATION = "SELECT value FROM number WHERE name = 'generation'"


def _look_at_sqlite(settings: Settings) -> _Look:
    path = settings.store_path
    assert path is not None
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        schema, generation = db.execute(_SCHEMA).get, db.execute(_GENERATION).get
    finally:
        db.close()
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*") if file.is_file())
    more = {"writer": None}
    return f"SQLite {apsw.sqlite_lib_version()}", size, int(schema), int(generation), more


def _look_at_postgres(settings: Settings) -> _Look:
    from hcna_ray.store.postgres_session import Manners, Session

    session = Session(settings.store_url, Manners(name="hcna store info", read_only=True))
    try:
        ((version, size, schema, generation, holder, waits, standbys),) = session.run(
            "SELECT current_setting('server_version'), pg_database_size(current_database()), "
            f"({_SCHEMA}), ({_GENERATION}), (SELECT holder FROM leader), "
            "current_setting('synchronous_commit'), current_setting('synchronous_standby_names')"
        )
    finally:
        session.close()
    number = str(version).partition(" ")[0]
    durability = "every commit is synced to the server's disk"
    if standbys and waits in ("on", "remote_apply"):
        durability += f", and to that of its standby ({standbys})"
    elif standbys:
        durability += f"; its standby is not waited for to sync (synchronous_commit is {waits})"
    else:
        durability += "; no standby is waited for"
    if session.risks:
        durability = f"commits may be lost: {' and '.join(session.risks)}"
    more = {
        "writer": str(holder) or None,
        "durability": durability,
        "risks": session.risks,
    }
    return f"PostgreSQL {number}", int(size), int(schema), int(generation), more

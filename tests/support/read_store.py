"""Reads a SQLite store beside whoever writes there.

With the library that the product uses: the locks of a process on a file are one set, whatever
library took them, and a second library that closes the file gives up those of the first. The
standard library's module may be another library.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw

from tests.checker import sqlite_dump


@contextmanager
def opened(store: Path) -> Iterator[apsw.Connection]:
    """Open a store for reading only."""
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    db = apsw.Connection(f"file:{quote(str(store))}?mode=ro", flags=flags)
    try:
        db.set_busy_timeout(10_000)
        yield db
    finally:
        db.close()


def export(store: Path, target: Path, *, taken_at: float | None = None) -> None:
    """Write a store as `tests.checker.sqlite_dump.export` does."""
    with opened(store) as db:
        db.row_trace = _named
        sqlite_dump.write(db, target, taken_at=taken_at)


def _named(cursor: apsw.Cursor, row: apsw.SQLiteValues) -> dict[str, Any]:
    names = [column[0] for column in cursor.get_description()]
    return dict(zip(names, row, strict=True))


def query(store: Path, sql: str) -> list[tuple[Any, ...]]:
    """Run one query; ``apsw.Error`` if there is no such store, or none that can be read."""
    with opened(store) as db:
        return db.execute(sql).fetchall()

"""The adapter for hcna-ray's PostgreSQL store: its tables become a dump (`inputs.Dump`).

Its tables are those of the SQLite store with the types of PostgreSQL, so `sqlite_dump` reads them.
Text alone differs: U+0000, which PostgreSQL cannot hold, is written as two U+0001, and U+0001
itself as U+0001 U+0002.

Whoever has no psycopg can check such a run all the same: the checker reads the dump.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from tests.checker.sqlite_dump import records


class _Row(dict[str, Any]):
    """A row with its columns' names, and its text as it was before it was stored."""


def _rows(cursor: psycopg.Cursor[Any]) -> Any:
    names = [column.name for column in cursor.description or ()]

    def make(values: Sequence[Any]) -> _Row:
        return _Row(zip(names, map(_restored, values), strict=True))

    return make


def _restored(value: Any) -> Any:
    if not isinstance(value, str) or "\x01" not in value:
        return value
    return value.replace("\x01\x01", "\x00").replace("\x01\x02", "\x01")


class _Database:
    """A connection that is asked in text."""

    def __init__(self, db: psycopg.Connection[_Row]) -> None:
        self._db = db

    def execute(self, sql: str, /) -> Any:
        return self._db.execute(sql.encode())


def export(url: str, target: Path, *, taken_at: float | None = None) -> None:
    """Write a store, as one read transaction sees it, to a file of JSON lines.

    Args:
        url: The database; also beside a living writer.
        target: Where the dump goes.
        taken_at: The instant to note in its head, by default now.
    """
    with psycopg.connect(url, row_factory=_rows, autocommit=True) as db:
        db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        now = time.time() if taken_at is None else taken_at
        with target.open("w") as out:
            for record in records(_Database(db), now, source="postgres"):
                out.write(json.dumps(record, separators=(",", ":")) + "\n")

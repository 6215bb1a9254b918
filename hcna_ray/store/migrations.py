"""Numbered SQL files that bring a store to the newest schema, each exactly once.

Every kind of database has its own files, in ``schema/`` (SQLite) and ``schema/postgres/``, with the
same numbers: a number means the same tables and columns wherever it has been applied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple

import apsw

from hcna_ray import failpoints
from hcna_ray.core.errors import HcnaError, SchemaTooNew

_LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migration (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL
) STRICT
"""


class SchemaChanged(HcnaError):
    """A migration that this store has applied reads differently now: the store may not fit."""

    code = "schema_changed"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"migration {self.name} was edited after it had been applied to this store; "
            "restore the original file and put the change into a new migration"
        )


class Migration(NamedTuple):
    """One file of ``schema/``."""

    number: int
    name: str
    sql: str
    sha256: str

    @property
    def line(self) -> tuple[int, str, str]:
        """What the ledger says of it."""
        return self.number, self.name, self.sha256


def known_migrations(folder: str = "schema") -> list[Migration]:
    """Return the migrations that came with this package, oldest first.

    Args:
        folder: ``schema`` (SQLite) or ``schema/postgres``.
    """
    files = resources.files("hcna_ray.store").joinpath(folder).iterdir()
    found = []
    for file in sorted(files, key=lambda item: item.name):
        if file.name.endswith(".sql"):
            body = file.read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            found.append(Migration(int(file.name[:4]), file.name, body.decode(), digest))
    return found


def missing_migrations(
    known: Sequence[Migration], applied: Mapping[int, str]
) -> Sequence[Migration]:
    """Return what has not been applied yet, oldest first.

    Args:
        known: What this package brings.
        applied: Digest by number, as the store's ledger has it.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote this store.
        SchemaChanged: an applied migration was edited.
    """
    newest = max(migration.number for migration in known)
    if applied and max(applied) > newest:
        raise SchemaTooNew(max(applied), newest)
    for migration in known:
        if applied.get(migration.number, migration.sha256) != migration.sha256:
            raise SchemaChanged(migration.name)
    return [migration for migration in known if migration.number not in applied]


def migrate(db: apsw.Connection) -> None:
    """Apply what a SQLite store is missing, each migration and its ledger line in one transaction.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote this store.
        SchemaChanged: an applied migration was edited.
    """
    db.execute(_LEDGER)
    for migration in missing_migrations(known_migrations(), _applied(db)):
        with db:
            db.execute(migration.sql)
            failpoints.hit("schema.step.applied")
            db.execute("INSERT INTO schema_migration VALUES (?, ?, ?)", migration.line)
        failpoints.hit("schema.step.committed")


def check_schema(db: apsw.Connection) -> bool:
    """Return whether a SQLite store has exactly the schema this package knows.

    ``False`` means not yet: the writer has not created or migrated it.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote this store.
        SchemaChanged: an applied migration was edited.
    """
    return not missing_migrations(known_migrations(), _applied(db))


def _applied(db: apsw.Connection) -> dict[int, str]:
    if not db.table_exists("main", "schema_migration"):
        return {}
    return dict(db.execute("SELECT number, sha256 FROM schema_migration"))

"""Numbered SQL files that bring an SQLite store to the newest schema, each exactly once."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import NamedTuple

import apsw

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


def known_migrations() -> list[Migration]:
    """Return the migrations that came with this package, oldest first."""
    files = resources.files("hcna_ray.store").joinpath("schema").iterdir()
    found = []
    for file in sorted(files, key=lambda item: item.name):
        if file.name.endswith(".sql"):
            body = file.read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            found.append(Migration(int(file.name[:4]), file.name, body.decode(), digest))
    return found


def migrate(db: apsw.Connection) -> None:
    """Apply what is missing, each migration and its ledger line in one transaction.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote this store.
        SchemaChanged: an applied migration was edited.
    """
    db.execute(_LEDGER)
    applied = _applied(db)
    for migration in known_migrations():
        if migration.number not in applied:
            with db:
                db.execute(migration.sql)
                db.execute("INSERT INTO schema_migration VALUES (?, ?, ?)", _line(migration))
    check_schema(db)


def check_schema(db: apsw.Connection) -> bool:
    """Return whether the store has exactly the schema this package knows.

    ``False`` means not yet: the writer has not created or migrated it.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote this store.
        SchemaChanged: an applied migration was edited.
    """
    known = {migration.number: migration for migration in known_migrations()}
    applied = _applied(db)
    if applied and max(applied) > max(known):
        raise SchemaTooNew(max(applied), max(known))
    for number, sha256 in applied.items():
        if known[number].sha256 != sha256:
            raise SchemaChanged(known[number].name)
    return applied.keys() == known.keys()


def _line(migration: Migration) -> tuple[int, str, str]:
    return migration.number, migration.name, migration.sha256


def _applied(db: apsw.Connection) -> dict[int, str]:
    if not db.table_exists("main", "schema_migration"):
        return {}
    return dict(db.execute("SELECT number, sha256 FROM schema_migration"))

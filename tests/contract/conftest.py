"""Every implementation of `TaskStore`, for the suite to be run on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from hcna_ray.store.base import TaskReader, TaskStore
from hcna_ray.store.memory import MemoryTaskStore
from hcna_ray.store.postgres import PostgresTaskStore
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from tests.support.postgres import PostgresServer, running_server


class ReadableStore(TaskStore, Protocol):
    """A store that opens readers beside itself."""

    def reader(self) -> TaskReader:
        """Return a reader of its own."""
        ...


class Home:
    """A place where a store lives; a durable one can be closed and opened again."""

    def __init__(self, open_store: Callable[[], ReadableStore]) -> None:
        """Open the store for the first time."""
        self._open_store = open_store
        self._readers: list[TaskReader] = []
        self._store = open_store()
        self.durable = not isinstance(self._store, MemoryTaskStore)

    @property
    def store(self) -> TaskStore:
        """The store that is open now."""
        return self._store

    def reader(self) -> TaskReader:
        """Return a reader of its own, closed with the home."""
        reader = self._store.reader()
        self._readers.append(reader)
        return reader

    def reopen(self) -> TaskStore:
        """Close a durable store and open it again; a store in memory stays as it is."""
        if self.durable:
            self.close()
            self._store = self._open_store()
        return self._store

    def close(self) -> None:
        """Close everything."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._store.close()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    """A home of each kind."""
    match request.param:
        case "memory":
            home = Home(MemoryTaskStore)
        case "sqlite":
            home = Home(lambda: SqliteTaskStore(tmp_path / "queue.db"))
        case _:
            url = request.getfixturevalue("postgres_url")
            home = Home(lambda: PostgresTaskStore(url))
    yield home
    home.close()


@pytest.fixture
def store(home: Home) -> TaskStore:
    """The store of the home."""
    return home.store


@pytest.fixture
def reader(home: Home) -> TaskReader:
    """A reader beside the store."""
    return home.reader()


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    """Where a SQLite store may be created."""
    return tmp_path / "queue.db"


@pytest.fixture
def sqlite_store(sqlite_path: Path) -> Iterator[SqliteTaskStore]:
    """An open SQLite store."""
    store = SqliteTaskStore(sqlite_path)
    yield store
    store.close()


@pytest.fixture
def sqlite_reader(sqlite_store: SqliteTaskStore) -> Iterator[SqliteTaskReader]:
    """A reader of the SQLite store."""
    reader = sqlite_store.reader()
    yield reader
    reader.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for this session."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_template(postgres: PostgresServer) -> str:
    """A database with the newest schema and nothing in it, to be copied."""
    name = postgres.create_database()
    PostgresTaskStore(postgres.url(name)).close()
    # A copy that remembers where it was made is refused.
    postgres.execute("DELETE FROM origin", name)
    return name


@pytest.fixture
def postgres_url(postgres: PostgresServer, postgres_template: str) -> Iterator[str]:
    """A database of the test's own, with the newest schema and nothing in it."""
    name = postgres.create_database(postgres_template)
    yield postgres.url(name)
    postgres.drop_database(name)

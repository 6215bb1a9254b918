"""The same moderator on several stores at once: whatever one tells, the others must tell too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.parse import quote

from hcna_ray.core.models import FailureKind, TaskFilter, TaskState
from hcna_ray.runtime.policy import Policy
from hcna_ray.store import bookkeeping
from hcna_ray.store.base import TaskReader
from hcna_ray.store.memory import MemoryTaskStore
from hcna_ray.store.postgres import PostgresTaskStore
from hcna_ray.store.postgres_session import Manners, texts
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.property.office import Office, Op, Told, plain, told_shortly
from tests.property.office_walk import OfficeTally, OfficeWorld
from tests.support.observed import inside, view
from tests.support.postgres import PostgresServer

#: Operations of one sequence, at least and at most.
OPS = (4, 16)
#: Operations between two looks at everything that can be seen.
LOOK_EVERY = 9
#: Tasks of which everything is asked at a look.
NAMED = 6
KEYS = ("a", "b", "one", "two")
BATCHES = ("b1", "b2")
#: How many tasks the writers of SQL stores keep decoded: few, so that they forget, or as always.
KNOWN = (2, bookkeeping.KNOWN_MAX)

_EMPTY = """
    DELETE FROM task; DELETE FROM task_spec; DELETE FROM lane; DELETE FROM attempt;
    DELETE FROM fact; DELETE FROM idempotency_key; DELETE FROM dependency; DELETE FROM settlement;
    DELETE FROM worker; DELETE FROM paused_queue; DELETE FROM depth; DELETE FROM counter;
    DELETE FROM audit; DELETE FROM audit_anchor; DELETE FROM delivery; DELETE FROM schedule;
"""


class Disagreement(AssertionError):
    """Two stores tell different things."""


@dataclass
class Twin:
    """Another kind of store, on which the same is done."""

    name: str
    office: Office
    reader: Callable[[], TaskReader]


class Offices(Office):
    """A moderator on the store in memory, and others that must answer the same."""

    def __init__(self, policy: Policy, jitter_seed: int) -> None:
        """Begin alone; `join` brings others."""
        super().__init__(MemoryTaskStore, policy, jitter_seed=jitter_seed)
        self.twins: list[Twin] = []
        self._since_look = 0

    def perform(self, op: Op) -> Told:
        """Carry out one operation everywhere, and compare."""
        told = super().perform(op)
        wanted = plain(told)
        for twin in self.twins:
            found = twin.office.perform(op)
            if plain(found) != wanted:
                raise Disagreement(
                    f"after {told_shortly(op)}\nmemory answers {told_shortly(told)}\n"
                    f"{twin.name} answers {told_shortly(found)}"
                )
        self._since_look += 1
        if op.first == "reopen" or self._since_look >= LOOK_EVERY:
            self.look()
        return told

    def look(self, random: Random | None = None) -> None:
        """Compare everything that a writer or a reader can see."""
        self._since_look = 0
        assert isinstance(self.store, MemoryTaskStore)
        # Some are asked for one by one, which takes time.
        names = list(self.store._tasks.now)[-NAMED:]
        now = self.clock.now()
        seen = [
            *inside(self.store, names, KEYS, now + 5.0),
            *view(self.store.reader(), names, BATCHES, 500),
            *(_pages(self.store.reader(), names, Random(len(names))) if random else ()),
        ]
        for twin in self.twins:
            reader = twin.reader()
            other = [
                *inside(twin.office.store, names, KEYS, now + 5.0),
                *view(reader, names, BATCHES, 500),
                *(_pages(reader, names, Random(len(names))) if random else ()),
            ]
            for number, (one, that) in enumerate(zip(seen, other, strict=True)):
                if one != that:
                    raise Disagreement(
                        f"view {number}: memory has {told_shortly(one)}\n"
                        f"{twin.name} has {told_shortly(that)}"
                    )


def _pages(reader: TaskReader, names: Sequence[str], random: Random) -> Iterator[object]:
    """Yield some listings with filters."""
    for _ in range(4):
        where = TaskFilter(
            states=tuple(random.sample(list(TaskState), random.choice((0, 0, 2)))),
            task_type=random.choice((None, None, "echo")),
            queue=random.choice((None, None, "night")),
            worker=random.choice((None, None, "W1", "W2")),
            batch_id=random.choice((None, None, "b1")),
            principal=random.choice((None, None, "ann")),
            kind=random.choice((None, None, None, *FailureKind)),
            ids=tuple(random.sample(names, min(len(names), random.choice((0, 0, 3))))),
        )
        before = random.choice((None, 5, 12))
        yield reader.page(where, before_seq=before, limit=3)
        yield reader.facts(after=random.randrange(20), limit=4, task_id=None)
        yield reader.ended(batch_id="b1", after=random.randrange(4), limit=3)
        yield reader.open_count(batch_id="b1")
        yield reader.audit(before=random.choice((None, 6)), limit=3)


class SqliteHome:
    """Makes SQLite stores: each is a copy of an empty one."""

    name = "SQLite"

    def __init__(self, folder: Path) -> None:
        """Make the empty one."""
        self._folder = folder
        self._template = folder / "empty.db"
        SqliteTaskStore(self._template).close()
        self._reader: TaskReader | None = None

    def join(self, policy: Policy, jitter_seed: int) -> Twin:
        """Return a moderator on a new store."""
        self.clear()
        path = self._folder / "queue.db"
        shutil.copy(self._template, path)
        office = Office(lambda: SqliteTaskStore(path), policy, jitter_seed=jitter_seed)
        self._office = office

        def reader() -> TaskReader:
            store = office.store
            assert isinstance(store, SqliteTaskStore)
            if self._reader is not None:
                self._reader.close()
            self._reader = store.reader()
            return self._reader

        return Twin(self.name, office, reader)

    _office: Office | None = None

    def clear(self) -> None:
        """Close and delete what there is."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._office is not None:
            self._office.close()
            self._office = None
        for path in self._folder.glob("queue.db*"):
            path.unlink()

    close = clear


class PostgresHome:
    """Makes PostgreSQL stores: always the same database, emptied; the connections stay."""

    name = "PostgreSQL"

    def __init__(self, server: PostgresServer) -> None:
        """Make the database."""
        self._server = server
        # Past TCP: many small questions are asked.
        here = f"?host={quote(str(server.folder), safe='')}"
        self._url = server.url(server.create_database(), options=here)
        self._store = self._open()
        self._reader: TaskReader | None = None
        session = self._store._session
        assert session is not None
        self._numbers = session.run("SELECT name, value FROM number")

    def _open(self) -> PostgresTaskStore:
        self._store = PostgresTaskStore(
            self._url, manners=Manners(name="differential", unsafe=True)
        )
        return self._store

    def join(self, policy: Policy, jitter_seed: int) -> Twin:
        """Return a moderator on the database, which is empty."""
        store = self._store
        with store.transaction():
            for statement in _EMPTY.split(";"):
                if statement.strip():
                    store.session.run(statement)
            known = texts([name for name, _ in self._numbers])
            store.session.run("DELETE FROM number WHERE name <> ALL(%s)", (known,))
            for name, value in self._numbers:
                store.session.run("UPDATE number SET value = %s WHERE name = %s", (value, name))
        # What it knows of the tables is known no more.
        store._take_in((), ())
        store._load()
        opened = iter([store])
        office = Office(lambda: next(opened, None) or self._open(), policy, jitter_seed=jitter_seed)

        def reader() -> TaskReader:
            if self._reader is None:
                self._reader = self._store.reader()
            return self._reader

        return Twin(self.name, office, reader)

    def close(self) -> None:
        """Hang up."""
        if self._reader is not None:
            self._reader.close()
        self._store.close()


Home = SqliteHome | PostgresHome


@contextmanager
def homes(folder: Path, server: PostgresServer | None) -> Iterator[list[Home]]:
    """Yield the stores to compare with the one in memory."""
    found: list[Home] = [SqliteHome(folder)]
    if server is not None:
        found.append(PostgresHome(server))
    try:
        yield found
    finally:
        for home in found:
            home.close()


def sequence(seed: int, homes: Sequence[Home], tally: OfficeTally) -> None:
    """Make one sequence of operations on every store.

    Raises:
        Disagreement: two of them told different things.
    """
    known = bookkeeping.KNOWN_MAX
    bookkeeping.KNOWN_MAX = KNOWN[seed % len(KNOWN)]
    try:

        def make(policy: Policy, jitter_seed: int) -> Offices:
            offices = Offices(policy, jitter_seed)
            offices.twins = [home.join(policy, jitter_seed) for home in homes]
            return offices

        world = OfficeWorld(seed, tally, office=make, copies=False, ops=OPS)
        world.live()
        assert isinstance(world.office, Offices)
        world.office.look(Random(seed))
    finally:
        bookkeeping.KNOWN_MAX = known

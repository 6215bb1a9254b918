"""What only the PostgreSQL store promises: durability, one leader, reconnection, plans."""

from __future__ import annotations

import errno
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcna_ray.config import secrets_of
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import SchemaTooNew, StoreFull, StoreUnavailable
from hcna_ray.core.models import Hold, LaneKey, Needs, Task, TaskFilter, TaskState
from hcna_ray.runtime.messages import (
    Accepted,
    Heartbeat,
    HeartbeatReply,
    Hello,
    SubmitBatch,
    Welcome,
)
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending, Request
from hcna_ray.runtime.writer import WriterThread
from hcna_ray.store import postgres as module
from hcna_ray.store import postgres_session, rows, sqlite
from hcna_ray.store.audit import verify_store
from hcna_ray.store.base import KeyClaim
from hcna_ray.store.migrations import SchemaChanged, known_migrations
from hcna_ray.store.postgres import (
    LeadershipLost,
    PostgresTaskReader,
    PostgresTaskStore,
    StoreInUse,
    page_query,
)
from hcna_ray.store.postgres_session import (
    ConnectionLost,
    Manners,
    Session,
    StoreUnfit,
    escaped,
    texts,
    unescaped,
)
from hcna_ray.store.rows import Row
from tests.support import postgres as support
from tests.support.builders import (
    T0,
    a_fact,
    a_lease,
    a_spec,
    a_task,
    an_attempt,
    an_audit_entry,
)
from tests.support.paper_worker import PaperClock
from tests.support.postgres import PostgresMissing, PostgresServer, running_server

ECHO = LaneKey("default", "echo", Needs())
QUICK = Manners(name="test", statement_s=1.0, lock_s=0.5, answer_s=1.5)


def put(store: PostgresTaskStore, *tasks: Task) -> None:
    with store.transaction():
        store.insert(tasks)


def fill(store: PostgresTaskStore, *, payload_bytes: int) -> None:
    """Put one task after another, until the store refuses."""
    for seq in range(1, 10_000):
        put(store, a_task(f"t{seq}", seq=seq, payload=os.urandom(payload_bytes)))


@pytest.fixture
def store(postgres_url: str) -> Iterator[PostgresTaskStore]:
    """An open store in a database of the test's own."""
    store = PostgresTaskStore(postgres_url)
    yield store
    store.close()


@pytest.fixture
def reader(store: PostgresTaskStore) -> Iterator[PostgresTaskReader]:
    """A reader beside it."""
    reader = store.reader()
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def frail_server() -> Iterator[PostgresServer]:
    """A server for tests that stop it."""
    with running_server() as server:
        yield server


@pytest.fixture
def frail(frail_server: PostgresServer) -> Iterator[tuple[PostgresServer, str]]:
    """That server, running as in production, with the URL of an empty database."""
    name = frail_server.create_database()
    yield frail_server, frail_server.url(name)
    frail_server.stop()
    frail_server.start()
    frail_server.drop_database(name)


class Stranger:
    """Another client of the same database, which knows nothing of stores."""

    def __init__(self, url: str) -> None:
        self.db = psycopg.connect(url, autocommit=True)

    def run(self, sql: str) -> list[tuple[Any, ...]]:
        cursor = self.db.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def other(postgres_url: str) -> Iterator[Stranger]:
    """A connection beside the store's."""
    session = Stranger(postgres_url)
    yield session
    session.db.close()


class TestTheServerItself:
    def test_where_there_is_none_the_tests_say_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def programs() -> Path:
            raise PostgresMissing("initdb is missing")

        monkeypatch.setattr(support, "_programs", programs)
        monkeypatch.delenv("HCNA_REQUIRE_ALL", raising=False)
        with pytest.raises(pytest.skip.Exception, match="NO POSTGRESQL"), running_server():
            pass
        monkeypatch.setenv("HCNA_REQUIRE_ALL", "1")
        with pytest.raises(pytest.fail.Exception, match="NO POSTGRESQL"), running_server():
            pass


class TestOpening:
    def test_no_password_is_ever_told(self, postgres: PostgresServer, postgres_url: str) -> None:
        right = postgres.password
        escaped_right = "p%40ss%2F" + right.partition("/")[2]
        broken = [
            postgres_url.replace(":" + str(postgres.port), ":1"),
            postgres_url.replace(f"/{postgres_url.rpartition('/')[2]}", "/nosuch"),
            postgres_url.replace(escaped_right, escaped_right + "x"),
            # Not escaped, so that libpq takes a part of it for something else.
            postgres_url.replace(escaped_right, right),
            postgres_url + "?nosuch=1",
            f"postgresql://127.0.0.1:{postgres.port}/x?user=hcna&password={escaped_right}",
        ]
        for url in broken:
            with pytest.raises((StoreUnavailable, StoreUnfit)) as refusal:
                PostgresTaskStore(url, open_wait_s=0.0)
            told = f"{refusal.value} {refusal.value!r} {refusal.value.__cause__!r}"
            for part in (right, escaped_right, right.partition("/")[2]):
                assert part not in told

    def test_a_store_shows_no_password(self, store: PostgresTaskStore) -> None:
        with pytest.raises(StoreUnavailable) as refusal:
            store._live().run("SELECT pg_terminate_backend(pg_backend_pid())")
        reader = store.reader()
        for thing in (store, store._live(), store._live()._db, reader, refusal.value):
            assert "p@ss" not in repr(thing)
            assert "p%40ss" not in repr(thing)
        reader.close()

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("postgresql://u:a%40b@h/d", ("a%40b", "a@b")),
            ("postgresql://u:p@h:1/d?password=q&sslmode=require", ("p", "q")),
            ("postgresql://u@h/d", ()),
            ("postgresql://h/d?user=u", ()),
            ("postgresql://u:p/q@r@h/d", ("p/q@r",)),
            ("postgresql://h/d?user=u&pass%77ord=p%40", ("p%40", "p@")),
        ],
    )
    def test_secrets_are_found_in_a_url(self, url: str, expected: tuple[str, ...]) -> None:
        assert set(secrets_of(url)) == set(expected)

    def test_a_server_that_forgets_is_refused(self, frail: tuple[PostgresServer, str]) -> None:
        server, url = frail
        for settings in ({"fsync": "off"}, {"full_page_writes": "off"}):
            (name,) = settings
            server.stop()
            server.start(**settings)
            with pytest.raises(StoreUnfit, match=f"{name} is off"):
                PostgresTaskStore(url)
            PostgresTaskStore(url, unsafe=True).close()

    def test_commits_that_are_not_waited_for_are_refused(
        self, postgres_url: str, other: Stranger
    ) -> None:
        database = postgres_url.rpartition("/")[2]
        other.run(f"ALTER DATABASE {database} SET synchronous_commit = off")
        with pytest.raises(StoreUnfit, match="synchronous_commit is off"):
            PostgresTaskStore(postgres_url)
        # A reader loses nothing by it.
        PostgresTaskReader(postgres_url).close()

    def test_the_servers_configuration_cannot_loosen_an_open_session(
        self, frail: tuple[PostgresServer, str]
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        server.execute("ALTER SYSTEM SET synchronous_commit = off")
        server.execute("SELECT pg_reload_conf()")
        time.sleep(0.2)
        try:
            put(store, a_task())
            assert store._live().run("SHOW synchronous_commit") == [("on",)]
        finally:
            server.execute("ALTER SYSTEM RESET synchronous_commit")
        store.close()

    def test_one_that_begins_to_forget_stores_nothing_until_it_is_put_right(
        self, frail: tuple[PostgresServer, str]
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        put(store, a_task())
        for name in ("fsync", "full_page_writes"):
            server.execute(f"ALTER SYSTEM SET {name} = off")
            server.execute("SELECT pg_reload_conf()")
            _until_it_says(store, name, "off")
            with pytest.raises(StoreUnavailable, match="may lose what it commits"):
                put(store, a_task("t2", seq=2))
            # Nor does a new connection take it.
            server.execute(f"SELECT pg_terminate_backend({store._live().pid})")
            with pytest.raises(StoreUnavailable, match=f"{name} is off|broke"):
                put(store, a_task("t2", seq=2))
            with pytest.raises(StoreUnavailable, match=f"{name} is off"):
                put(store, a_task("t2", seq=2))
            server.execute(f"ALTER SYSTEM RESET {name}")
            server.execute("SELECT pg_reload_conf()")
            _until_it_takes(store)
        put(store, a_task("t2", seq=2))
        assert sorted(store.get(["t1", "t2"])) == ["t1", "t2"]
        store.close()

    def test_an_old_server_is_refused(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgres_session, "SERVER_MIN", 99)
        with pytest.raises(StoreUnfit, match="99 or newer"):
            PostgresTaskStore(postgres_url)

    def test_another_encoding_is_refused(self, postgres: PostgresServer) -> None:
        postgres.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        with pytest.raises(StoreUnfit, match="LATIN1"):
            PostgresTaskStore(postgres.url("latin"))
        postgres.drop_database("latin")

    def test_a_role_without_rights_is_refused(
        self, postgres: PostgresServer, other: Stranger, postgres_url: str
    ) -> None:
        other.run("DROP TABLE schema_migration")
        other.run("CREATE ROLE poor LOGIN PASSWORD 'poor'")
        url = f"postgresql://poor:poor@127.0.0.1:{postgres.port}/{postgres_url.rpartition('/')[2]}"
        with pytest.raises(StoreUnfit, match="permission denied"):
            PostgresTaskStore(url)
        other.run("DROP ROLE poor")

    def test_a_schema_of_its_own_may_be_used(self, postgres_url: str, other: Stranger) -> None:
        other.run("CREATE SCHEMA tasks")
        ours = PostgresTaskStore(f"{postgres_url}?options=-csearch_path%3Dtasks")
        public = PostgresTaskStore(postgres_url)
        put(ours, a_task())
        assert public.get(["t1"]) == {}
        assert other.run("SELECT id FROM tasks.task") == [("t1",)]
        ours.close()
        public.close()

    def test_a_reader_before_the_store_exists_says_what_to_do(
        self, postgres: PostgresServer
    ) -> None:
        name = postgres.create_database()
        with pytest.raises(StoreUnavailable, match="hcna up"):
            PostgresTaskReader(postgres.url(name))
        postgres.drop_database(name)

    def test_a_reader_cannot_write(self, reader: PostgresTaskReader) -> None:
        with pytest.raises(StoreUnavailable, match="read-only"):
            reader._run("DELETE FROM task")


class TestMigrations:
    def test_they_are_those_of_sqlite_and_applied_once(
        self, postgres: PostgresServer, other: Stranger
    ) -> None:
        ours = known_migrations("schema/postgres")
        assert [m.name for m in ours] == [m.name for m in known_migrations()]
        name = postgres.create_database()
        for _ in range(2):
            PostgresTaskStore(postgres.url(name)).close()
        ledger = postgres.execute("SELECT number, name, sha256 FROM schema_migration", name)
        assert ledger == [migration.line for migration in ours]
        postgres.drop_database(name)

    def test_the_tables_are_those_of_sqlite(self, tmp_path: Path, other: Stranger) -> None:
        db = apsw.Connection(os.fspath(tmp_path / "x.db"))
        for migration in known_migrations():
            db.execute(migration.sql)
        kinds = {"INTEGER": "bigint", "REAL": "double precision", "TEXT": "text", "BLOB": "bytea"}
        expected = {
            (table, column, kinds[kind], "NO" if needed or key else "YES")
            for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            for _i, column, kind, needed, _default, key in db.execute(f"PRAGMA table_info({table})")
        }
        db.close()
        found = other.run(
            "SELECT table_name, column_name, data_type, is_nullable "
            "FROM information_schema.columns WHERE table_schema = 'public' "
            "AND table_name NOT IN ('leader', 'origin', 'schema_migration')"
        )
        assert set(found) == expected
        collations = other.run(
            "SELECT DISTINCT collation_name FROM information_schema.columns "
            "WHERE table_schema = 'public' AND data_type = 'text'"
        )
        assert collations == [("C",)]

    def test_an_edited_migration_is_refused(self, postgres_url: str, other: Stranger) -> None:
        other.run("UPDATE schema_migration SET sha256 = 'other'")
        with pytest.raises(SchemaChanged, match=r"0001_tasks\.sql"):
            PostgresTaskStore(postgres_url)
        with pytest.raises(SchemaChanged):
            PostgresTaskReader(postgres_url)

    def test_a_newer_schema_is_refused(self, postgres_url: str, other: Stranger) -> None:
        other.run("INSERT INTO schema_migration VALUES (99, '0099_future.sql', 'x')")
        with pytest.raises(SchemaTooNew, match="99"):
            PostgresTaskStore(postgres_url)
        with pytest.raises(SchemaTooNew):
            PostgresTaskReader(postgres_url)


class TestText:
    @given(st.lists(st.text(alphabet="\x00\x01\x02\x03a\U0001f600", max_size=6), max_size=6))
    def test_escaping_keeps_order_and_equality(self, words: list[str]) -> None:
        assert [unescaped(escaped(word)) for word in words] == words
        assert not any("\x00" in escaped(word) for word in words)
        by_bytes = sorted(words, key=lambda word: escaped(word).encode())
        assert by_bytes == sorted(words)

    def test_a_zero_in_a_text_is_no_trouble(
        self, store: PostgresTaskStore, reader: PostgresTaskReader
    ) -> None:
        task = a_task(cancel_reason="a\x00b\x01", ordering_key="\x00", batch_id="\x01\x01")
        put(store, task)
        assert reader.get(["t1"]) == {"t1": task}
        assert store.ordering_line("\x00", 9) == [task]
        assert store.ordering_line("\x01", 9) == []
        assert reader.batch_exists("\x01\x01")

    def test_clashes_concern_one_item_alone(
        self, store: PostgresTaskStore, reader: PostgresTaskReader
    ) -> None:
        put(store, *(a_task(f"t{i}", seq=i) for i in (1, 3, 5)))
        with store.transaction():
            again = [a_task(f"t{i}", seq=10 + i, payload=b"2") for i in range(1, 7)]
            assert store.insert(again) == {"t2", "t4", "t6"}
            claims = [KeyClaim("me", f"k{i % 2}", f"t{i}", "f", T0) for i in range(1, 7)]
            held = store.claim_keys(claims)
        assert {key: claim.task_id for (_me, key), claim in held.items()} == {
            "k1": "t1",
            "k0": "t2",
        }
        found = reader.get([f"t{i}" for i in range(1, 7)])
        assert [found[f"t{i}"].seq for i in range(1, 7)] == [1, 12, 3, 14, 5, 16]
        assert store.size().tasks == 6
        with pytest.raises(ValueError, match="seq"), store.transaction():
            store.insert([a_task("t7", seq=1)])
        put(store, a_task("t7", seq=20))


class TestBulk:
    def test_a_bulk_write_is_divided(
        self, store: PostgresTaskStore, monkeypatch: pytest.MonkeyPatch, other: Stranger
    ) -> None:
        monkeypatch.setattr(module, "_PART_ROWS", 7)
        monkeypatch.setattr(module, "_PART_BYTES", 1000)
        tasks = [a_task(f"t{i}", seq=i, payload=bytes(90 * (i % 9))) for i in range(1, 41)]
        again = [a_task("t3", seq=90), a_task("t41", seq=91), a_task("t41", seq=92)]
        with store.transaction():
            assert store.insert([*tasks, *again]) == {f"t{i}" for i in range(1, 42)}
            store.append_facts([a_fact(task.id) for task in tasks])
            claims = [KeyClaim("me", f"k{i % 20}", f"t{i}", "f", T0) for i in range(1, 41)]
            assert len(store.claim_keys(claims)) == 20
            store.save([task.evolve(version=1, checkpoint=bytes(300)) for task in tasks])
        assert [len(task.checkpoint or b"") for task in store.get(["t1", "t40"]).values()] == [
            300
        ] * 2
        assert other.run("SELECT count(*) FROM task WHERE version = 1") == [(40,)]

    def test_a_batch_of_many_mebibytes_goes_through_one_pipeline(
        self, store: PostgresTaskStore
    ) -> None:
        tasks = [a_task(f"t{i}", seq=i, payload=os.urandom(60_000)) for i in range(1, 801)]
        put(store, *tasks)
        done = [
            task.evolve(version=1, state=TaskState.COMPLETED, finished_at=T0, result=bytes(60_000))
            for task in tasks
        ]
        with store.transaction():
            store.save(done)
            store.append_facts([a_fact(task.id) for task in tasks])
        assert store.get(["t800"]) == {"t800": done[-1]}

    def test_a_row_changed_behind_the_bookkeeping_is_not_overwritten(
        self, store: PostgresTaskStore, other: Stranger
    ) -> None:
        put(store, a_task("t1"), a_task("t2", seq=2))
        other.run("UPDATE task SET version = 7 WHERE id = 't2'")
        changed = [a_task("t1", version=1), a_task("t2", seq=2, version=1)]
        with pytest.raises(AssertionError, match="1 rows instead of 2"), store.transaction():
            store.save(changed)
        assert other.run("SELECT version FROM task ORDER BY seq") == [(0,), (7,)]


class TestOneWriter:
    def test_a_second_writer_is_kept_out_while_the_first_lives(
        self, store: PostgresTaskStore, postgres_url: str
    ) -> None:
        with pytest.raises(StoreInUse, match="hcna moderator"):
            PostgresTaskStore(postgres_url, open_wait_s=0.3)
        put(store, a_task())

    def test_it_gets_in_when_the_first_one_leaves(self, postgres_url: str) -> None:
        first = PostgresTaskStore(postgres_url)
        leaving = threading.Timer(0.5, first.close)
        leaving.start()
        second = PostgresTaskStore(postgres_url, open_wait_s=20.0)
        put(second, a_task())
        second.close()
        leaving.join()

    def test_a_silent_writer_is_replaced_and_must_exit(
        self, store: PostgresTaskStore, postgres_url: str
    ) -> None:
        put(store, a_task())
        time.sleep(0.4)
        second = PostgresTaskStore(postgres_url, takeover_s=0.3)
        granted = a_task(version=1, lease=a_lease())
        with second.transaction():
            second.save([granted])
        # It wakes up, and believes in what it knew.
        with pytest.raises((StoreUnavailable, LeadershipLost)), store.transaction():
            store.save([a_task(version=1, cancel_reason="late")])
        for _ in range(2):
            with pytest.raises(OSError, match=r"taken|must exit"), store.transaction():
                store.save([a_task(version=1, cancel_reason="late")])
        assert second.get(["t1"]) == {"t1": granted}
        put(second, a_task("t2", seq=2))
        second.close()

    def test_one_that_is_silent_in_a_transaction_is_rolled_back(
        self, store: PostgresTaskStore, postgres_url: str
    ) -> None:
        put(store, a_task())
        seconds: list[PostgresTaskStore] = []

        def pause_before_the_commit() -> None:
            with store.transaction():
                store.save([a_task(version=1, cancel_reason="late")])
                assert store.workers() == []  # Sent, and its row is locked.
                time.sleep(0.4)
                seconds.append(PostgresTaskStore(postgres_url, takeover_s=0.3))

        with pytest.raises((StoreUnavailable, LeadershipLost)):
            pause_before_the_commit()
        (second,) = seconds
        assert second.get(["t1"]) == {"t1": a_task()}
        second.close()

    def test_without_its_lock_the_epoch_alone_keeps_an_old_one_from_writing(
        self, store: PostgresTaskStore, other: Stranger
    ) -> None:
        """As behind a pooler that hands sessions around: the second line of defence."""
        put(store, a_task())
        other.run("UPDATE leader SET epoch = epoch + 1")

        def write() -> None:
            with store.transaction():
                store.save([a_task(version=1, cancel_reason="late")])
                store.append_facts([a_fact()])

        with pytest.raises(LeadershipLost) as lost:
            write()
        assert isinstance(lost.value, OSError)
        assert lost.value.errno == errno.ESTALE
        assert other.run("SELECT count(*) FROM task WHERE version > 0") == [(0,)]
        assert other.run("SELECT count(*) FROM fact") == [(0,)]
        with pytest.raises(OSError, match="must exit"), store.transaction():
            store.insert([a_task("t2", seq=2)])

    def test_a_live_writer_that_only_polls_is_not_silent(
        self, store: PostgresTaskStore, postgres_url: str
    ) -> None:
        done = threading.Event()

        def poll() -> None:
            while not done.wait(0.1):
                store.next_wake()

        polling = threading.Thread(target=poll)
        polling.start()
        try:
            with pytest.raises(StoreInUse):
                PostgresTaskStore(postgres_url, takeover_s=5.0, open_wait_s=7.0)
        finally:
            done.set()
            polling.join()


class TestReconnection:
    def end_session(self, other: Stranger, store: PostgresTaskStore) -> None:
        other.run(f"SELECT pg_terminate_backend({store._live().pid})")
        end = time.monotonic() + 10
        while other.run(f"SELECT 1 FROM pg_stat_activity WHERE pid = {store._live().pid}"):
            assert time.monotonic() < end
            time.sleep(0.01)

    def test_a_lost_connection_refuses_the_batch_and_the_next_one_works(
        self, store: PostgresTaskStore, other: Stranger
    ) -> None:
        put(store, a_task())

        def write() -> None:
            with store.transaction():
                store.insert([a_task("t2", seq=2)])
                self.end_session(other, store)
                store.append_facts([a_fact()])

        with pytest.raises(StoreUnavailable) as refusal:
            write()
        assert refusal.value.retry_after_s
        assert store.last_seq() == 1
        assert store.get(["t1", "t2"]) == {"t1": a_task()}
        put(store, a_task("t2", seq=2))
        assert store.size().tasks == 2

    def test_a_read_outside_a_transaction_does_not_even_notice(
        self, store: PostgresTaskStore, reader: PostgresTaskReader, other: Stranger
    ) -> None:
        put(store, a_task(expires_at=T0 + 9))
        self.end_session(other, store)
        assert store.next_wake() == T0 + 9
        self.end_session(other, store)
        assert store.heads(ECHO, 9)
        other.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'hcna reader'"
        )
        assert reader.page(TaskFilter(), before_seq=None, limit=9)

    def test_a_commit_that_arrived_counts_although_its_answer_was_lost(
        self, store: PostgresTaskStore, other: Stranger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def commit_and_lose(session: Session) -> None:
            session.script("COMMIT")
            self.end_session(other, store)
            raise ConnectionLost("server closed the connection unexpectedly", 2)

        monkeypatch.setattr(Session, "commit", _once(commit_and_lose, Session.commit))
        put(store, a_task())
        assert store.get(["t1"]) == {"t1": a_task()}
        put(store, a_task("t2", seq=2))
        assert other.run("SELECT count(*) FROM task") == [(2,)]

    def test_a_commit_that_did_not_arrive_stored_nothing(
        self, store: PostgresTaskStore, other: Stranger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lose(session: Session) -> None:
            self.end_session(other, store)
            raise ConnectionLost("could not send data to server", 2)

        monkeypatch.setattr(Session, "commit", _once(lose, Session.commit))
        with pytest.raises(StoreUnavailable, match="nothing was stored"):
            put(store, a_task())
        assert store.get(["t1"]) == {}
        assert store.last_seq() == 0
        put(store, a_task())
        assert other.run("SELECT count(*) FROM task") == [(1,)]

    def test_a_commit_still_on_its_way_is_waited_for_or_cut_off(
        self, store: PostgresTaskStore, other: Stranger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The network broke, and the server does not know: its transaction is open still."""
        abandoned: list[Session] = []

        def lose(session: Session) -> None:
            abandoned.append(session)
            store._session = None  # So that nobody closes it.
            raise ConnectionLost("no route to host", 2)

        monkeypatch.setattr(Session, "commit", _once(lose, Session.commit))
        with pytest.raises(StoreUnavailable, match="nothing was stored"):
            put(store, a_task())
        with pytest.raises(ConnectionLost):
            abandoned[0].run("COMMIT")
        assert other.run("SELECT count(*) FROM task") == [(0,)]
        put(store, a_task())

    def test_a_doubt_that_lasts_ends_the_process(
        self, frail: tuple[PostgresServer, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url, doubt_s=0.5)
        put(store, a_task())

        def lose(session: Session) -> None:
            server.crash()
            raise ConnectionLost("server closed the connection unexpectedly", 2)

        monkeypatch.setattr(Session, "commit", _once(lose, Session.commit))
        with pytest.raises(OSError, match="not known"):
            put(store, a_task("t2", seq=2))
        server.start()
        with pytest.raises(OSError, match="must exit"):
            store.next_wake()
        store.close()

    def test_while_the_server_is_away_everything_is_refused_at_once(
        self, frail: tuple[PostgresServer, str]
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        reader = store.reader()
        put(store, a_task())
        server.stop()
        started = time.monotonic()
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                put(store, a_task("t2", seq=2))
            with pytest.raises(StoreUnavailable):
                store.next_wake()
            with pytest.raises(StoreUnavailable):
                store.last_seq()
            with pytest.raises(StoreUnavailable):
                reader.get(["t1"])
        assert time.monotonic() - started < 3
        server.start()
        assert store.last_seq() == 1
        assert reader.get(["t1"]) == {"t1": a_task()}
        put(store, a_task("t2", seq=2))
        reader.close()
        store.close()

    def test_a_commit_is_not_acknowledged_before_its_standby_has_it(
        self, frail: tuple[PostgresServer, str]
    ) -> None:
        """The server commits alone when the wait for a standby is cancelled, and only warns."""
        server, url = frail
        store = PostgresTaskStore(url, manners=QUICK, doubt_s=1.0)
        put(store, a_task())
        server.execute("ALTER SYSTEM SET synchronous_standby_names = 'ghost'")
        server.execute("SELECT pg_reload_conf()")
        time.sleep(2)  # Its checkpointer tells the others, and nobody tells when it has.
        try:
            with pytest.raises(OSError, match="not known"):
                put(store, a_task("t2", seq=2))
        finally:
            server.execute("ALTER SYSTEM RESET synchronous_standby_names")
            server.execute("SELECT pg_reload_conf()")
        store.close()
        time.sleep(0.3)
        store = PostgresTaskStore(url)
        assert store.last_seq() == 2
        store.close()


def _until_it_says(store: PostgresTaskStore, name: str, value: str) -> None:
    """Wait until a changed setting has reached the store's session."""
    while store._live().run(f"SHOW {name}") != [(value,)]:
        time.sleep(0.02)


def _until_it_takes(store: PostgresTaskStore) -> None:
    """Wait until the store can be read again."""
    while True:
        try:
            store.next_wake()
            return
        except StoreUnavailable:
            time.sleep(0.02)


def _once(first: Any, then: Any) -> Any:
    """Return a method that is ``first`` at its first call and ``then`` at every later one."""
    calls: list[object] = []

    def method(self: Session) -> None:
        calls.append(self)
        (first if len(calls) == 1 else then)(self)

    return method


class TestReadsOfAServerThatStandsStill:
    """Its processes are there and the kernel takes what is sent to them: no connection breaks."""

    def test_each_is_given_up_once_and_says_when_to_ask_again(
        self, frail: tuple[PostgresServer, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        put(store, a_task())
        manners = replace(QUICK, read_only=True, custom_plans=True)
        reader = PostgresTaskReader(url, manners=manners)
        asked: list[str] = []
        run = Session.run

        def counted(self: Session, sql: str, values: Sequence[Any] = ()) -> list[Row]:
            asked.append(sql)
            return run(self, sql, values)

        monkeypatch.setattr(Session, "run", counted)
        with server.standing_still(), pytest.raises(ConnectionLost) as told:
            reader.get(["t1"])
        assert told.value.retry_after_s >= 1
        assert len(asked) == 1
        assert list(reader.get(["t1"])) == ["t1"]
        reader.close()
        store.close()

    def test_no_read_of_c1_may_take_longer_than_one_of_sqlite(
        self, reader: PostgresTaskReader
    ) -> None:
        manners = reader._manners
        assert manners.statement_s <= sqlite.READ_S_MAX
        assert manners.answer_s <= sqlite.READ_S_MAX + 1.0


class TestServerThatForgot:
    """A standby that was behind was promoted, or older files were put back under a live writer."""

    def test_it_is_told_and_nothing_is_given_out_twice(
        self, frail: tuple[PostgresServer, str], tmp_path: Path
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        put(store, a_task())
        with store.transaction():
            store.append_facts([a_fact()])
        server.stop()
        old = tmp_path / "older"
        shutil.copytree(server.data, old)
        server.start()
        _until_it_takes(store)
        put(store, a_task("t2", seq=2))
        with store.transaction():
            last = store.append_facts([a_fact("t2"), a_fact("t2")])
            store.append_audit([an_audit_entry("lost"), an_audit_entry("with it")])
        generation = store.generation()
        server.stop()
        shutil.rmtree(server.data)
        subprocess.run(["cp", "-a", os.fspath(old), os.fspath(server.data)], check=True)
        _give_to_owner(server)
        server.start()
        with pytest.raises(StoreUnavailable, match="lost commits"):
            _until_reached(store)
        assert sorted(store.get(["t1", "t2"])) == ["t1"]
        assert store.generation() == generation + 1
        assert store.last_seq() == 2, "its number is not given to another task"
        with store.transaction():
            assert store.append_facts([a_fact("t1")]) == last + 1
        reader = store.reader()
        (line,) = reader.audit(before=None, limit=9)
        assert (line.entry.action, line.entry.target) == ("store.went_back", "")
        assert "lost 2 confirmed commits" in line.entry.detail
        with store.transaction():
            store.append_audit([an_audit_entry("after it")])
        report = verify_store(reader)
        assert report.whole
        assert report.notes[0].startswith("lines 1 to 2 were lost with commits")
        reader.close()
        store.close()
        again = PostgresTaskStore(url)
        assert again.generation() == generation + 1
        again.close()

    def test_a_server_that_only_restarted_has_forgotten_nothing(
        self, frail: tuple[PostgresServer, str]
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        for turn in range(3):
            put(store, a_task(f"t{turn}", seq=turn + 1))
            server.crash()
            with pytest.raises(StoreUnavailable):
                put(store, a_task("x", seq=99))
            server.start()
            _until_it_takes(store)
        assert store.generation() == 1
        store.close()


def _give_to_owner(server: PostgresServer) -> None:
    owner = server.folder.stat()
    command = ["chown", "-R", f"{owner.st_uid}:{owner.st_gid}", os.fspath(server.data)]
    subprocess.run(command, check=True)
    server.data.chmod(0o700)


def _until_reached(store: PostgresTaskStore) -> None:
    """Read until the answer is not that the server is away."""
    while True:
        try:
            store.next_wake()
            return
        except ConnectionLost:
            time.sleep(0.02)


class TestRefusals:
    def test_a_lock_that_is_not_released_is_not_waited_for_long(
        self, postgres_url: str, other: Stranger
    ) -> None:
        store = PostgresTaskStore(postgres_url, manners=QUICK)
        put(store, a_task())
        other.run("BEGIN")
        other.run("LOCK TABLE fact")
        started = time.monotonic()

        def write() -> None:
            with store.transaction():
                store.insert([a_task("t2", seq=2)])
                store.append_facts([a_fact()])

        with pytest.raises(StoreUnavailable, match="lock timeout"):
            write()
        assert time.monotonic() - started < 5
        other.run("ROLLBACK")
        assert store.get(["t2"]) == {}
        put(store, a_task("t2", seq=2))
        store.close()

    def test_a_server_that_became_read_only_is_refused(self, store: PostgresTaskStore) -> None:
        put(store, a_task())
        store._live().run("SET default_transaction_read_only = on")
        with pytest.raises(StoreUnavailable, match="read-only"):
            put(store, a_task("t2", seq=2))
        store._live().run("SET default_transaction_read_only = off")
        put(store, a_task("t2", seq=2))

    @pytest.mark.parametrize(
        ("state", "expected"),
        [
            ("53100", StoreFull),  # disk full
            ("53300", StoreUnavailable),  # too many connections
            ("40001", StoreUnavailable),  # serialization failure
            ("40P01", StoreUnavailable),  # deadlock
            ("57014", StoreUnavailable),  # statement timeout
            ("58030", StoreUnavailable),  # I/O error
            ("25006", StoreUnavailable),  # read-only
            ("57P01", ConnectionLost),  # administrator
            ("57P02", ConnectionLost),  # crash of another session
            ("08006", ConnectionLost),  # connection failure
            ("25P03", ConnectionLost),  # idle in a transaction
            ("42501", StoreUnfit),  # rights
            ("23505", ValueError),  # unique
            ("XX001", psycopg.DatabaseError),  # damaged data: nobody can go on
            ("42P01", psycopg.ProgrammingError),  # our bug
        ],
    )
    def test_what_the_server_says_becomes_our_words(
        self, store: PostgresTaskStore, state: str, expected: type[Exception]
    ) -> None:
        said = f"DO $$ BEGIN RAISE EXCEPTION 'it said so' USING ERRCODE = '{state}'; END $$"
        with pytest.raises(expected, match="it said so") as told, store.transaction():
            store._queue(said, ())
        assert isinstance(told.value, StoreUnavailable) == issubclass(expected, StoreUnavailable)
        put(store, a_task())

    def test_a_full_disk_is_refused_and_survived(
        self, postgres: PostgresServer, postgres_template: str
    ) -> None:
        mount = postgres.folder / "small"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=40m,mode=0777", "tmpfs", os.fspath(mount)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a disk")
        try:
            place = mount / "space"
            place.mkdir()
            owner = postgres.data.stat()
            os.chown(place, owner.st_uid, owner.st_gid)
            postgres.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
            postgres.execute(
                f"CREATE DATABASE cramped TEMPLATE {postgres_template} TABLESPACE small"
            )
            ballast = mount / "ballast"
            with ballast.open("wb") as file:
                file.write(bytes(16 * 1024 * 1024))
            store = PostgresTaskStore(postgres.url("cramped"))
            with pytest.raises(StoreFull, match="space") as refusal:
                fill(store, payload_bytes=50_000)
            stored = store.last_seq()
            assert stored > 10
            assert refusal.value.retry_after_s == 10
            assert len(store.get([f"t{i}" for i in range(1, stored + 2)])) == stored
            ballast.unlink()
            put(store, a_task("small", seq=stored + 1))
            assert store.size().tasks == stored + 1
            store.close()
            postgres.drop_database("cramped")
            postgres.execute("DROP TABLESPACE small")
        finally:
            subprocess.run(["umount", "-l", os.fspath(mount)], check=True)


class TestModerator:
    def test_it_refuses_while_the_server_is_away_and_goes_on_afterwards(
        self, frail: tuple[PostgresServer, str]
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        clock = PaperClock()
        moderator = Moderator(
            store, Policy(), clock=clock, jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
        )

        def submit(name: str) -> object:
            spec = a_spec(name, fingerprint=name)
            pending = Pending(SubmitBatch(specs=(spec,)), lambda answer: None, clock.elapsed())
            ((_pending, answer),) = moderator.apply([pending]).answers
            return answer

        for turn in range(3):
            assert submit(f"a{turn}") == [Accepted(f"a{turn}", TaskState.QUEUED)]
            (server.stop, server.crash)[turn % 2]()
            for _ in range(2):
                assert isinstance(submit(f"b{turn}"), StoreUnavailable)
                assert moderator.sleep_s() > 0
                moderator.apply([])
            server.start()
            assert submit(f"b{turn}") == [Accepted(f"b{turn}", TaskState.QUEUED)]
        names = [f"{letter}{turn}" for letter in "ab" for turn in range(3)]
        assert sorted(store.get(names)) == names
        assert store.size().tasks == 6
        store.close()

    def test_workers_stay_while_the_server_stands_still(
        self, frail: tuple[PostgresServer, str]
    ) -> None:
        server, url = frail
        store, clock = PostgresTaskStore(url), SystemClock()

        def publish(outbound: Outbound) -> None:
            for pending, answer in outbound.answers:
                pending.resolve(answer)

        writer = WriterThread(
            lambda: Moderator(
                store, Policy(), clock=clock, jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
            ),
            clock,
            publish=publish,
            items_max=100,
        )
        writer.start()

        def ask(request: Request) -> queue.SimpleQueue[object]:
            answer: queue.SimpleQueue[object] = queue.SimpleQueue()
            writer.submit(request, answer.put)
            return answer

        hello = Hello(
            worker="W1",
            node_id="HCNA-W1--test",
            incarnation="a",
            cpu=1.0,
            mem_gb=1.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=("echo",),
            address="",
        )
        beat = Heartbeat(worker="W1", incarnation="a", telemetry={})
        assert isinstance(ask(hello).get(timeout=20), Welcome)
        assert ask(beat).get(timeout=20) == HeartbeatReply(known=True)
        with server.standing_still():
            stuck = ask(SubmitBatch(specs=(a_spec("t1"),)))
            while store.unconfirmed_s() < 1.0:  # The writer stands in the commit.
                time.sleep(0.05)
            assert ask(beat).get(timeout=20) == HeartbeatReply(known=True)
            assert stuck.empty()
        assert stuck.get(timeout=60) == [Accepted("t1", TaskState.QUEUED)]
        assert ask(beat).get(timeout=20) == HeartbeatReply(known=True)
        assert store.unconfirmed_s() < 60
        writer.close()
        store.close()

    def test_one_that_was_replaced_is_told_to_exit(self, postgres_url: str) -> None:
        store = PostgresTaskStore(postgres_url)
        moderator = Moderator(
            store, Policy(), clock=PaperClock(), jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
        )
        time.sleep(0.4)
        second = PostgresTaskStore(postgres_url, takeover_s=0.3)
        pending = Pending(SubmitBatch(specs=(a_spec("t1"),)), lambda answer: None, 0.0)

        def write_on() -> None:
            for _ in range(2):
                moderator.apply([pending])

        with pytest.raises(LeadershipLost):
            write_on()
        assert second.get(["t1"]) == {}
        second.close()
        store.close()


WRITER = """
import sys
from hcna_ray.store.postgres import PostgresTaskStore
from tests.support.builders import a_fact, a_task

store = PostgresTaskStore(sys.stdin.readline().strip())
seq = store.last_seq()
while True:
    with store.transaction():
        tasks = [a_task(f"t{seq + i}", seq=seq + i) for i in (1, 2, 3)]
        store.insert(tasks)
        store.append_facts([a_fact(task.id) for task in tasks])
    seq += 3
    print(seq, flush=True)
"""


class TestDurability:
    def test_a_killed_writer_loses_nothing_that_it_committed(self, postgres_url: str) -> None:
        told = 0
        for commits in (1, 5, 9):
            with subprocess.Popen(
                [sys.executable, "-c", WRITER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            ) as writer:
                assert writer.stdin is not None
                assert writer.stdout is not None
                writer.stdin.write(postgres_url + "\n")
                writer.stdin.flush()
                for _ in range(commits):
                    told = int(writer.stdout.readline())
                writer.send_signal(signal.SIGKILL)
            self.check(postgres_url, told)

    def check(self, url: str, told: int) -> None:
        """Everything that was told is there, and nothing that was half written."""
        store = PostgresTaskStore(url)
        found = store.get(f"t{i}" for i in range(1, store.last_seq() + 1))
        assert len(found) == store.last_seq() == store.size().tasks >= told
        assert store.last_seq() % 3 == 0
        assert store.ready_lanes() == {ECHO: store.last_seq()}
        reader = store.reader()
        assert len(reader.facts(after=0, limit=100_000)) == store.last_seq()
        reader.close()
        store.close()

    @pytest.mark.parametrize("how", ["fast", "immediate", "crash"])
    def test_a_restarted_server_loses_nothing_that_was_acknowledged(
        self, frail: tuple[PostgresServer, str], how: str
    ) -> None:
        server, url = frail
        store = PostgresTaskStore(url)
        acknowledged, refused = 0, 0
        done = threading.Event()

        def write() -> None:
            nonlocal acknowledged, refused
            while not done.is_set():
                # What was refused was not stored: its numbers are used again.
                seq = acknowledged
                try:
                    with store.transaction():
                        tasks = [a_task(f"t{seq + i}", seq=seq + i) for i in (1, 2, 3)]
                        assert len(store.insert(tasks)) == 3
                        store.append_facts([a_fact(task.id) for task in tasks])
                    acknowledged = seq + 3
                except StoreUnavailable:
                    refused += 1
                    time.sleep(0.01)

        writing = threading.Thread(target=write)
        writing.start()
        for _ in range(4):
            before = acknowledged
            end = time.monotonic() + 20
            while acknowledged < before + 30:
                assert time.monotonic() < end
                time.sleep(0.005)
            match how:
                case "fast":
                    server.stop(signal.SIGINT)
                case "immediate":
                    server.stop(signal.SIGQUIT)
                case _:
                    server.crash()
            time.sleep(0.05)
            server.start()
        before = acknowledged
        while acknowledged == before:
            time.sleep(0.005)
        done.set()
        writing.join(timeout=60)
        assert refused
        assert store.last_seq() == acknowledged
        store.close()
        self.check(url, acknowledged)

    def test_readers_see_whole_batches_while_the_writer_writes(
        self, store: PostgresTaskStore
    ) -> None:
        done = threading.Event()
        troubles: list[BaseException] = []
        reader = store.reader()
        turns = [0, 0]

        def watch(index: int) -> None:
            last = 0
            try:
                while not done.is_set() or not turns[index]:
                    page = reader.page(TaskFilter(), before_seq=None, limit=64)
                    newest = page[0].seq if page else 0
                    assert newest >= last
                    assert newest % 8 == 0
                    last = newest
                    turns[index] += 1
            except BaseException as error:
                troubles.append(error)

        # Two threads share one reader: a call waits for the other's to end.
        threads = [threading.Thread(target=watch, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for start in range(1, 401, 8):
            put(store, *(a_task(f"t{i}", seq=i) for i in range(start, start + 8)))
        done.set()
        for thread in threads:
            thread.join(timeout=30)
        reader.close()
        assert troubles == []
        assert all(turns)


@pytest.fixture(scope="module")
def crowded(postgres: PostgresServer, postgres_template: str) -> Iterator[PostgresTaskStore]:
    """Some thousand tasks of every kind, so that a plan is what it is with many."""
    name = postgres.create_database(postgres_template)
    store = PostgresTaskStore(postgres.url(name))
    states = [TaskState.QUEUED] * 4 + [TaskState.COMPLETED, TaskState.RUNNING]
    tasks = [
        a_task(
            f"t{i}",
            seq=i,
            state=states[i % 6],
            queue=f"q{i % 3}",
            task_type=f"type{i % 5}",
            batch_id=f"b{i % 7}",
            ordering_key=f"o{i % 11}",
            concurrency_key="c",
            hold=Hold.CONCURRENCY if i % 4 == 0 else Hold.NONE,
            expires_at=T0 + i,
        )
        for i in range(1, 3001)
    ]
    put(store, *tasks)
    with store.transaction():
        store.append_facts([a_fact(task.id) for task in tasks])
        store.save_attempts([an_attempt(task.id) for task in tasks])
        store.add_dependencies("t1", [f"t{i}" for i in range(2, 500)])
    yield store
    store.close()
    postgres.drop_database(name)


_IDS, _SEQS = texts(["t1", "t2"]), postgres_session.integers([1, 2])
QUERIES: dict[str, tuple[str, list[Any]]] = {
    "heads": (module._HEADS, [1, 64]),
    "due": (module._DUE, [T0, 64]),
    "next_wake": (module._NEXT_WAKE, []),
    "ordering_line": (module._ORDERING_LINE, ["o1", "o1", 2]),
    "ordering_out": (module._ORDERING_OUT, ["o1"]),
    "held": (module._HELD, ["c", 9]),
    "keys with held": (module._KEYS_WITH_HELD, ["", 9]),
    "keys held": (module._KEYS_HELD, [texts(["me"]), texts(["k"])]),
    "old keys": (module._OLD_KEYS, [0.0, 0.0, "", "", T0, 9]),
    "leased": (module._LEASED, []),
    "dependents": (module._DEPENDENTS, ["t2", 9]),
    "waited_for": (module._WAITED_FOR, [_IDS]),
    "prunable": (module._PRUNABLE, [T0, 9]),
    "by_id": (module._BY_ID, [_IDS]),
    "by_seq": (module._BY_SEQ, [_SEQS]),
    "attempts": (module._ATTEMPTS, ["t1"]),
    "ended of batch": (module._ENDED_OF_BATCH, ["b1", 0, 9]),
    "open of batch": (module._OPEN_OF_BATCH, ["b1", "b1"]),
    "open of ids": (module._OPEN_OF_IDS, [_IDS]),
    "facts": (module._FACTS, [0, 9]),
    "facts of task": (module._FACTS_OF_TASK, ["t1", 0, "t1", 9]),
    "audit": (module._AUDIT, [9, 9]),
    "audit after": (module._AUDIT_AFTER, [9, 9]),
} | {
    f"page by {name}": page_query(where, before_seq=900, limit=9)
    for name, where in {
        "nothing": TaskFilter(),
        "state": TaskFilter(states=(TaskState.RUNNING,)),
        "kind": TaskFilter(states=(TaskState.FAILED,)),
        "task_type": TaskFilter(task_type="type1"),
        "queue": TaskFilter(queue="q1"),
        "worker": TaskFilter(worker="W1"),
        "batch": TaskFilter(batch_id="b1"),
        "batch and state": TaskFilter(batch_id="b1", states=(TaskState.QUEUED,)),
        "worker and queue": TaskFilter(worker="W1", queue="q1"),
        "state and queue": TaskFilter(states=(TaskState.RUNNING,), queue="q1"),
    }.items()
}


#: The indexes that a query may use besides the primary key of `task` and `task_spec`, which find
#: the rows that were picked.
INDEXES: dict[str, tuple[str, ...]] = {
    "heads": ("task_ready",),
    "due": ("task_wake",),
    "next_wake": ("task_wake",),
    "ordering_line": ("task_ordering",),
    "ordering_out": ("task_ordering_out", "task_ordering"),
    "held": ("task_held",),
    "keys with held": ("task_held",),
    "keys held": ("idempotency_key_pkey",),
    "old keys": ("idempotency_key_at", "task_id_key"),
    "leased": ("task_leased",),
    "dependents": ("dependency_pkey",),
    "waited_for": ("dependency_pkey",),
    "prunable": ("task_finished", "dependency_pkey"),
    "by_id": ("task_id_key",),
    "by_seq": (),
    "attempts": ("attempt_pkey",),
    "ended of batch": ("task_batch_ended",),
    "open of batch": ("task_batch", "task_batch_ended"),
    "open of ids": ("task_id_key",),
    "facts": ("fact_pkey",),
    "facts of task": ("fact_task",),
    "audit": ("audit_pkey",),
    "audit after": ("audit_pkey",),
    "page by nothing": ("task_pkey",),
    "page by state": ("task_state",),
    "page by kind": ("task_state",),
    "page by task_type": ("task_type",),
    "page by queue": ("task_queue",),
    "page by worker": ("task_worker",),
    "page by batch": ("task_batch",),
    "page by batch and state": ("task_batch",),
    "page by worker and queue": ("task_worker",),
    "page by state and queue": ("task_state",),
}


class TestPlans:
    @pytest.mark.parametrize("analyzed", [False, True])
    @pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
    @pytest.mark.parametrize("name", QUERIES)
    def test_each_query_is_read_off_its_index(
        self, crowded: PostgresTaskStore, name: str, mode: str, analyzed: bool
    ) -> None:
        sql, values = QUERIES[name]
        session = crowded._live()
        session.run(f"SET plan_cache_mode = {mode}")
        if analyzed:
            session.run("ANALYZE")
        plan = [row[0] for row in session.run(f"EXPLAIN (COSTS OFF) {sql}", values)]
        assert not [line for line in plan if "Seq Scan" in line], plan
        if name not in ("ordering_out", "old keys"):
            # A sort of what a list of ids has found is none of a table; nor is that of the one
            # task that a key has let out, or of the keys that were bound at one instant.
            assert not [line for line in plan if "Sort" in line.partition(":")[0]], plan
        used = {line.partition(" using ")[2].split(" ")[0] for line in plan if " using " in line}
        wanted = set(INDEXES[name])
        assert used - {"task_pkey", "task_spec_pkey"} <= wanted, plan
        assert not wanted or used & wanted, plan
        # Rows that were picked are found one by one, by number.
        walks = [i for i, line in enumerate(plan) if "using task_pkey" in line]
        for i in walks:
            below = " ".join(plan[i + 1 : i + 2])
            assert "seq = " in below or name == "page by nothing", plan

    def test_the_kinds_of_columns_are_those_of_the_table(self, crowded: PostgresTaskStore) -> None:
        kinds = {
            "bigint": postgres_session.integers,
            "double precision": postgres_session.floats,
            "text": texts,
            "bytea": postgres_session.blobs,
        }
        found = crowded._live().run(
            "SELECT column_name::text, data_type::text FROM information_schema.columns "
            "WHERE table_schema = 'public' AND table_name = 'task'"
        )
        assert {name: module._kind(name) for name, _type in found} == {
            name: kinds[type_] for name, type_ in found
        }
        assert {name for name, _type in found} == {*rows.SPEC, *rows.PLAIN, *rows.INDEXED}

"""A store moves to PostgreSQL and back whole, or not at all; and the commands that do it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import psycopg
import pytest

from hcna_ray.cli.main import main
from hcna_ray.config import load_settings
from hcna_ray.core.errors import StoreUnavailable
from hcna_ray.core.models import Hold, Outcome, TaskState, Token
from hcna_ray.store.base import Counter, KeyClaim
from hcna_ray.store.info import describe_store
from hcna_ray.store.migrate import CopyDiffers, SourceInUse, StoreNotEmpty, copy_back, copy_store
from hcna_ray.store.origin import StoreRestored
from hcna_ray.store.postgres import PostgresTaskReader, PostgresTaskStore, StoreInUse
from hcna_ray.store.postgres_session import Session
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from hcna_ray.supervisor.checks import store_check
from tests.contract.test_task_store import everything, full_task
from tests.support.builders import (
    T0,
    a_delivery,
    a_fact,
    a_lease,
    a_schedule,
    a_task,
    a_worker_record,
    an_attempt,
    an_audit_entry,
    an_error,
)
from tests.support.postgres import PostgresServer

TABLES = {
    *("attempt", "audit", "audit_anchor", "counter", "delivery", "dependency", "depth", "fact"),
    *("idempotency_key", "lane"),
    *("number", "paused_queue", "schedule", "settlement", "task", "task_spec", "worker"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A SQLite store with something in every table, and numbers with gaps."""
    path = tmp_path / "queue.db"
    store = SqliteTaskStore(path)
    with store.transaction():
        store.insert(
            [
                a_task("t0", seq=1, state=TaskState.COMPLETED, finished_at=T0 - 99),
                full_task(),
                a_task("t2", seq=4, ordering_key="o", expires_at=T0 + 9, batch_id="b"),
                a_task("t3", seq=5, state=TaskState.RUNNING),
                a_task("t4", seq=6, hold=Hold.CONCURRENCY, concurrency_key="c\x00\x01\U0001f600"),
                a_task("t5", seq=7, state=TaskState.FAILED, error=an_error(message="\x00")),
            ]
        )
        store.insert([a_task(f"x{i}", seq=100 + i, payload=os.urandom(99)) for i in range(2500)])
        store.append_facts([a_fact("t0"), a_fact("t3", token=Token(1, 1), detail="a\x00b")])
        store.append_facts([a_fact(f"x{i}") for i in range(2500)])
        store.save_attempts([an_attempt("t3"), an_attempt("t5", outcome=Outcome.ERRORED)])
        store.claim_keys([KeyClaim("me", "k", "t2", "f", T0), KeyClaim("\x01", "", "gone", "", T0)])
        store.add_dependencies("t4", ["t3", "p"])
        store.push_settlements([("t0", True), ("t5", False)])
        store.save_deliveries([a_delivery("d1"), a_delivery("d2", body=b"\x00\xff", tries=2)])
        store.save_schedules([a_schedule("s1", wake_at=T0 + 1), a_schedule("s2", principal="me")])
        store.save_worker(a_worker_record())
        store.set_paused("night", True)
        store.bump({Counter("attempts", "echo", "completed"): 7})
        store.append_audit([an_audit_entry(at=T0 - 99), an_audit_entry(detail="\x00")])
    with store.transaction():
        store.raise_generation()
        assert store.prune_audit(T0, 9) == 1
        assert store.prune(T0 - 9, T0, 9) == 1
        store.drop_settlement(1)
    store.close()
    return path


@pytest.fixture
def empty_url(postgres: PostgresServer) -> Iterator[str]:
    """A database with nothing in it, not even tables."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


def run(url: str, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as db:
        cursor = db.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def rows_in(url: str) -> int:
    """Rows of every table but those that are never empty."""
    return sum(run(url, f"SELECT count(*) FROM {table}")[0][0] for table in TABLES - {"number"})


class TestCopy:
    def test_everything_arrives(self, source: Path, empty_url: str) -> None:
        copied = copy_store(source, empty_url)

        assert {table.name for table in copied} == TABLES
        assert all(table.rows for table in copied)
        old, new = SqliteTaskStore(source), PostgresTaskStore(empty_url)
        readers = SqliteTaskReader(source), PostgresTaskReader(empty_url)
        assert everything(new, readers[1]) == everything(old, readers[0])
        names = ["t1", "t2", "t3", "t4", "t5", *(f"x{i}" for i in range(2500))]
        assert new.get(names) == old.get(names)
        assert len(new.get(names)) == 2505
        key = "c\x00\x01\U0001f600"
        assert new.held_by_concurrency(key, 9) == old.held_by_concurrency(key, 9) != []
        assert readers[1].facts(after=0, limit=9999) == readers[0].facts(after=0, limit=9999)
        # What comes next is numbered alike.
        for store in (old, new):
            with store.transaction():
                assert store.raise_generation() == 3
                assert store.append_facts([a_fact()]) == 2503
                assert store.claim_keys([KeyClaim("me", "k", "t9", "f", T0)])["me", "k"].task_id
                store.save([a_task("t2", seq=4, version=1, lease=a_lease(), batch_id="b")])
                store.insert([a_task("new", seq=store.last_seq() + 1)])
                store.push_settlements([("t2", True)])
        assert new.settlements(9) == old.settlements(9)
        assert everything(new, readers[1]) == everything(old, readers[0])
        for thing in (*readers, old, new):
            thing.close()

    def test_an_empty_store_may_be_copied(self, tmp_path: Path, postgres_url: str) -> None:
        SqliteTaskStore(tmp_path / "queue.db").close()
        assert sum(table.rows for table in copy_store(tmp_path / "queue.db", postgres_url)) == 8
        PostgresTaskStore(postgres_url).close()

    def test_a_source_in_use_is_refused(self, source: Path, postgres_url: str) -> None:
        for user in (SqliteTaskStore(source), SqliteTaskReader(source)):
            with pytest.raises(SourceInUse, match="hcna down"):
                copy_store(source, postgres_url)
            user.close()
        assert rows_in(postgres_url) == 0

    def test_nobody_opens_the_source_meanwhile(self, source: Path, postgres_url: str) -> None:
        refused = []

        def intrude(table: object) -> None:
            if not refused:
                other = apsw.Connection(os.fspath(source))
                try:
                    other.execute("SELECT count(*) FROM task").fetchall()
                except apsw.BusyError as error:
                    refused.append(error)
                other.close()

        copy_store(source, postgres_url, on_table=intrude)
        assert refused

    def test_a_target_in_use_is_refused(self, source: Path, postgres_url: str) -> None:
        target = PostgresTaskStore(postgres_url)
        with pytest.raises(StoreInUse):
            copy_store(source, postgres_url)
        target.close()

    def test_a_target_that_holds_something_is_refused(
        self, source: Path, postgres_url: str
    ) -> None:
        target = PostgresTaskStore(postgres_url)
        with target.transaction():
            target.set_paused("a", True)
        target.close()
        with pytest.raises(StoreNotEmpty, match="paused_queue"):
            copy_store(source, postgres_url)
        assert rows_in(postgres_url) == 1
        run(postgres_url, "DELETE FROM paused_queue")
        run(postgres_url, "UPDATE number SET value = 2 WHERE name = 'generation'")
        with pytest.raises(StoreNotEmpty, match="number"):
            copy_store(source, postgres_url)

    def test_a_copy_that_differs_is_not_kept(self, source: Path, postgres_url: str) -> None:
        run(
            postgres_url,
            "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN IF NEW.number = 1700 THEN NEW.at = NEW.at + 1e-6; END IF; RETURN NEW; END $$;"
            "CREATE TRIGGER spoil BEFORE INSERT ON fact FOR EACH ROW EXECUTE FUNCTION spoil()",
        )
        with pytest.raises(CopyDiffers, match="fact"):
            copy_store(source, postgres_url)
        assert rows_in(postgres_url) == 0
        run(postgres_url, "DROP TRIGGER spoil ON fact")
        copy_store(source, postgres_url)

    def test_a_copy_that_breaks_off_is_not_kept(self, source: Path, postgres_url: str) -> None:
        def cut(table: Any) -> None:
            if table.name == "task":
                run(
                    postgres_url,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'hcna store migrate'",
                )

        with pytest.raises(StoreUnavailable):
            copy_store(source, postgres_url, on_table=cut)
        assert rows_in(postgres_url) == 0
        copy_store(source, postgres_url)
        assert rows_in(postgres_url) > 5000

    def test_a_source_that_is_not_there_is_not_made(
        self, tmp_path: Path, postgres_url: str
    ) -> None:
        with pytest.raises(FileNotFoundError):
            copy_store(tmp_path / "no.db", postgres_url)
        assert not (tmp_path / "no.db").exists()


class TestWayBack:
    @pytest.fixture
    def moved(self, source: Path, postgres_url: str) -> str:
        """A database with something in every table."""
        copy_store(source, postgres_url)
        return postgres_url

    def test_everything_arrives(self, source: Path, moved: str, tmp_path: Path) -> None:
        told: list[str] = []
        target = tmp_path / "back.db"
        copied = copy_back(moved, target, on_table=lambda table: told.append(table.name))

        assert {table.name for table in copied} == set(told) == TABLES
        assert all(table.rows for table in copied)
        assert target.stat().st_mode & 0o777 == 0o600
        assert {path.name for path in tmp_path.iterdir()} == {"queue.db", "back.db"}
        old, new = PostgresTaskStore(moved), SqliteTaskStore(target)
        readers = PostgresTaskReader(moved), SqliteTaskReader(target)
        assert everything(new, readers[1]) == everything(old, readers[0])
        names = ["t1", "t2", "t3", "t4", "t5", *(f"x{i}" for i in range(2500))]
        assert new.get(names) == old.get(names)
        assert len(new.get(names)) == 2505
        key = "c\x00\x01\U0001f600"
        assert new.held_by_concurrency(key, 9) == old.held_by_concurrency(key, 9) != []
        assert readers[1].facts(after=0, limit=9999) == readers[0].facts(after=0, limit=9999)
        # What comes next is numbered alike.
        for store in (old, new):
            with store.transaction():
                assert store.raise_generation() == 3
                assert store.append_facts([a_fact()]) == 2503
                assert store.claim_keys([KeyClaim("me", "k", "t9", "f", T0)])["me", "k"].task_id
                store.save([a_task("t2", seq=4, version=1, lease=a_lease(), batch_id="b")])
                store.insert([a_task("new", seq=store.last_seq() + 1)])
                store.push_settlements([("t2", True)])
        assert new.settlements(9) == old.settlements(9)
        assert everything(new, readers[1]) == everything(old, readers[0])
        for thing in (*readers, old, new):
            thing.close()

    def test_there_and_back_is_the_same_digest(
        self, source: Path, postgres_url: str, tmp_path: Path
    ) -> None:
        there = copy_store(source, postgres_url)
        assert copy_back(postgres_url, tmp_path / "back.db") == there

    def test_an_empty_store_may_be_copied(self, postgres_url: str, tmp_path: Path) -> None:
        target = tmp_path / "back.db"
        assert sum(table.rows for table in copy_back(postgres_url, target)) == 8
        SqliteTaskStore(target).close()

    def test_a_source_in_use_is_refused(self, moved: str, tmp_path: Path) -> None:
        store = PostgresTaskStore(moved)
        with pytest.raises(StoreInUse):
            copy_back(moved, tmp_path / "back.db")
        store.close()
        assert not (tmp_path / "back.db").exists()

    def test_nobody_writes_to_the_source_meanwhile(self, moved: str, tmp_path: Path) -> None:
        refused = []

        def intrude(table: object) -> None:
            if not refused:
                with pytest.raises(StoreInUse) as caught:
                    PostgresTaskStore(moved, open_wait_s=0.0)
                refused.append(caught)

        copy_back(moved, tmp_path / "back.db", on_table=intrude)
        assert refused

    @pytest.mark.parametrize("end", ["", "-wal", "-journal"])
    def test_a_target_that_is_there_is_refused(self, moved: str, tmp_path: Path, end: str) -> None:
        (tmp_path / f"back.db{end}").write_bytes(b"mine")
        with pytest.raises(FileExistsError, match="move this file away"):
            copy_back(moved, tmp_path / "back.db")
        assert (tmp_path / f"back.db{end}").read_bytes() == b"mine"

    def test_a_target_that_comes_up_meanwhile_is_not_replaced(
        self, moved: str, tmp_path: Path
    ) -> None:
        def intrude(table: object) -> None:
            (tmp_path / "back.db").write_bytes(b"mine")

        with pytest.raises(FileExistsError):
            copy_back(moved, tmp_path / "back.db", on_table=intrude)
        assert (tmp_path / "back.db").read_bytes() == b"mine"

    def test_a_copy_that_differs_is_not_kept(
        self, moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A number that SQLite keeps as another one: text in a column of numbers."""
        rows = Session.stream

        def spoiled(session: Session, sql: str, page: int = 1000) -> Iterator[Any]:
            for row in rows(session, sql, page):
                changed = [str(value) if type(value) is float else value for value in row]
                yield tuple(changed) if 'FROM "fact"' in sql else row

        monkeypatch.setattr(Session, "stream", spoiled)
        with pytest.raises(CopyDiffers, match="fact"):
            copy_back(moved, tmp_path / "back.db")
        assert {path.name for path in tmp_path.iterdir()} == {"queue.db"}

    def test_a_copy_that_breaks_off_is_not_kept(self, moved: str, tmp_path: Path) -> None:
        def cut(table: Any) -> None:
            if table.name == "task":
                run(
                    moved,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'hcna store migrate'",
                )

        with pytest.raises(StoreUnavailable):
            copy_back(moved, tmp_path / "back.db", on_table=cut)
        assert {path.name for path in tmp_path.iterdir()} == {"queue.db"}
        copy_back(moved, tmp_path / "back.db")

    def test_a_restored_source_is_refused(self, moved: str, tmp_path: Path) -> None:
        run(moved, "UPDATE origin SET database = 1")
        with pytest.raises(StoreRestored):
            copy_back(moved, tmp_path / "back.db")


class TestCommands:
    @pytest.fixture(autouse=True)
    def environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("DATABASE_URL", "PGPASSWORD", "HCNA_CONFIG", "HCNA_STORE__URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HCNA_HOME", str(tmp_path))

    def test_migrate_then_info(
        self,
        source: Path,
        postgres: PostgresServer,
        postgres_url: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        assert main(["store", "info", "--json"]) == 0
        before = json.loads(capfd.readouterr().out)
        assert before["store"] == f"sqlite://{source}"
        assert before["engine"].startswith("SQLite ")

        monkeypatch.setenv("DATABASE_URL", postgres_url)
        assert main(["store", "migrate"]) == 0
        told = capfd.readouterr()
        assert "rows in 17 tables copied and compared" in told.out
        assert "never start on it again" in " ".join(told.err.split())

        assert main(["store", "info", "--json"]) == 0
        after = json.loads(capfd.readouterr().out)
        for name in ("tasks", "facts", "generation", "schema", "workers"):
            assert after[name] == before[name]
        assert after["engine"].startswith("PostgreSQL ")
        assert after["tasks"]["queued"] == 2502
        assert main(["store"]) == 0
        assert main(["store", "migrate", "--json"]) == 1
        told_again = capfd.readouterr()
        assert "copy into an empty database" in told_again.err
        assert postgres.password not in "".join([*told, *told_again, json.dumps(after)])

    def test_info_and_doctor_tell_what_a_commit_is_worth(
        self,
        postgres: PostgresServer,
        postgres_url: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setenv("HCNA_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HCNA_STORE__URL", postgres_url)
        settings, database = load_settings(), postgres_url.rpartition("/")[2]
        found = describe_store(settings)
        assert (found.durability, found.risks) == (
            "every commit is synced to the server's disk; no standby is waited for",
            (),
        )
        assert store_check(settings).level == "ok"
        postgres.execute(f"ALTER DATABASE {database} SET synchronous_commit = off")
        found = describe_store(settings)
        assert found.durability == "commits may be lost: synchronous_commit is off"
        check = store_check(settings)
        assert (check.level, check.found) == (
            "fail",
            f"{settings.store_name} may lose what it commits: synchronous_commit is off",
        )
        monkeypatch.setenv("HCNA_STORE__UNSAFE", "true")
        assert store_check(load_settings()).level == "warn"
        url = postgres_url.replace(f":{postgres.port}/", ":1/")
        monkeypatch.setenv("HCNA_STORE__URL", url)
        check = store_check(load_settings())
        assert check.level == "fail"
        assert "cannot be reached" in check.found
        assert "p%40ss" not in f"{check.found}{check.fix}"

    def test_the_password_may_come_from_libpq(
        self,
        source: Path,
        postgres: PostgresServer,
        postgres_url: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        bare = postgres.url(postgres_url.rpartition("/")[2], password=False)
        monkeypatch.setenv("PGPASSWORD", postgres.password)
        assert main(["store", "migrate", "--to", bare, "--json"]) == 0
        tables = json.loads(capfd.readouterr().out)["tables"]
        assert {table["name"] for table in tables} == TABLES

    def test_a_password_on_the_command_line_is_refused(
        self, source: Path, postgres_url: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["store", "migrate", "--to", postgres_url]) == 2
        told = capfd.readouterr().err
        assert "DATABASE_URL" in told
        assert "p%40ss" not in told

    def test_the_way_back(
        self,
        source: Path,
        postgres: PostgresServer,
        postgres_url: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        copy_store(source, postgres_url)
        assert main(["store", "migrate", "--to", f"sqlite://{source}"]) == 2
        assert "there is no source" in capfd.readouterr().err
        monkeypatch.setenv("DATABASE_URL", postgres_url)
        assert main(["store", "migrate", "--to", f"sqlite://{source}"]) == 1
        assert "move this file away first" in " ".join(capfd.readouterr().err.split())
        source.rename(source.with_name("old.db"))
        assert main(["store", "migrate", "--to", f"sqlite://{source}"]) == 0
        told = capfd.readouterr()
        assert "rows in 17 tables copied and compared" in told.out
        assert "take it out of store.url and DATABASE_URL" in " ".join(told.err.split())
        assert "never start on it again" in " ".join(told.err.split())
        monkeypatch.delenv("DATABASE_URL")
        assert main(["store", "info", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["tasks"]["queued"] == 2502
        assert main(["store", "migrate", "--from", postgres_url, "--to", "sqlite:///x"]) == 2
        assert postgres.password not in "".join(told)

    def test_what_is_missing_is_named(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(["store", "migrate"]) == 2
        assert main(["store", "migrate", "--to", "postgresql://u@127.0.0.1:1/d"]) == 1
        assert "there is no SQLite store at" in capfd.readouterr().err

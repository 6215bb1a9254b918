"""A PostgreSQL database is dumped, lost and put back with the server's own programs.

What was out then must open nothing, and a moderator must not go on before that is seen to.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hcna_ray.cli.main import main
from hcna_ray.config import LimitSettings, RaySettings, Settings, StoreSettings, without_secrets
from hcna_ray.core.errors import StoreUnavailable
from hcna_ray.core.models import OnDisconnect, TaskState, Token
from hcna_ray.runtime.artifacts import open_store as open_artifacts
from hcna_ray.runtime.messages import ReportKind
from hcna_ray.store import origin
from hcna_ray.store.audit import verify_store
from hcna_ray.store.backup import BackupRefused, inspect
from hcna_ray.store.base import StoredAudit
from hcna_ray.store.generations import NUMBERS_PER_S
from hcna_ray.store.origin import StoreRestored
from hcna_ray.store.postgres import PostgresTaskReader, PostgresTaskStore, StoreInUse
from hcna_ray.store.postgres_session import Manners, Session
from hcna_ray.supervisor.backup import backup, dump_command, restore, restore_command
from hcna_ray.supervisor.checks import store_check
from hcna_ray.supervisor.database import take_over
from tests.support.builders import T0, a_fact, a_task
from tests.support.paper_worker import Desk, PaperWorker
from tests.support.postgres import PostgresServer, running_server

_FINAL = (ReportKind.COMPLETED, ReportKind.FAILED)


def settings_of(home: Path, url: str) -> Settings:
    home.mkdir(exist_ok=True)
    return Settings(
        home=home,
        store=StoreSettings(url=url),
        limits=LimitSettings(disk_free_bytes_min=0),
        ray=RaySettings(temp_dir=home / "ray"),
    )


@pytest.fixture
def settings(tmp_path: Path, postgres_url: str) -> Settings:
    """M1, with its tasks in a database."""
    return settings_of(tmp_path / "m1", postgres_url)


@pytest.fixture
def elsewhere(postgres: PostgresServer, tmp_path: Path) -> Iterator[Settings]:
    """An empty machine, and an empty database."""
    name = postgres.create_database()
    yield settings_of(tmp_path / "spare", postgres.url(name))
    postgres.drop_database(name)


@pytest.fixture
def opened() -> Iterator[Callable[[Settings], PostgresTaskStore]]:
    stores = []

    def open_store(settings: Settings) -> PostgresTaskStore:
        stores.append(PostgresTaskStore(settings.store_url))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def dumped(postgres: PostgresServer, settings: Settings, file: Path) -> Path:
    postgres.shell(dump_command(settings, file))
    return file


def filled(postgres: PostgresServer, settings: Settings, file: Path) -> None:
    postgres.shell(restore_command(settings).replace("FILE.dump", str(file)))


def number(settings: Settings, name: str) -> int:
    session = Session(settings.store_url, Manners(name="test", read_only=True))
    ((value,),) = session.run("SELECT value FROM number WHERE name = %s", (name,))
    session.close()
    return int(value)


def audit_of(settings: Settings) -> list[StoredAudit]:
    reader = PostgresTaskReader(settings.store_url)
    found = reader.audit(before=None, limit=9)
    report = verify_store(reader)
    reader.close()
    assert report.whole, report.problems  # Its chain goes on over whatever has happened.
    return found


class TestFence:
    def test_old_tokens_open_nothing_and_what_ran_runs_again(
        self,
        settings: Settings,
        elsewhere: Settings,
        postgres: PostgresServer,
        tmp_path: Path,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        desk = Desk(opened(settings))
        worker = PaperWorker(desk)
        desk.submit_ids("ran", "waited", "later")
        desk.submit_ids("pinned", on_disconnect=OnDisconnect.WAIT)
        ran, waited, later, pinned = [worker.granted(slot)[0] for slot in range(4)]
        worker.report(worker.started(ran), worker.started(pinned))
        dump = dumped(postgres, settings, tmp_path / "hcna.dump")
        # After the dump: one ends, one starts, a new one comes and goes out.
        worker.report(worker.ended(ran), worker.started(waited))
        desk.submit_ids("after")
        (after,) = worker.granted(4)
        lost = number(settings, "last_fact")

        filled(postgres, elsewhere, dump)
        with pytest.raises(StoreRestored, match="hcna store restored"):
            opened(elsewhere)
        desk.clock.advance(600)
        now = desk.clock.now()
        found = take_over(elsewhere, now=now)

        assert (found.generation_before, found.generation) == (1, int(now * 1000))
        assert (found.ended.returned, found.ended.lost) == (2, 2)
        assert number(elsewhere, "last_fact") > lost + 600 * NUMBERS_PER_S
        again = Desk(opened(elsewhere))
        again.clock.advance(600)
        old = PaperWorker(again, incarnation="a")
        assert again.store.leased() == []
        assert again.store.get(["after"]) == {}
        task = again.task("ran")
        assert (task.state, task.losses, task.failures) == (TaskState.QUEUED, 0, 0)
        for offer in (ran, waited, later, pinned, after):
            for one in (old.started(offer), *(old.ended(offer, kind) for kind in _FINAL)):
                ack = old.report(one)
                assert ack.applied == 0
                assert ack.late == ((offer.task_id, Token(*offer.token)),)
        offers = [old.granted(slot)[0] for slot in range(4)]
        assert {offer.task_id for offer in offers} == {"ran", "waited", "later", "pinned"}
        highest = max(Token(*one.token) for one in (ran, waited, later, pinned, after))
        assert min(Token(*offer.token) for offer in offers) > highest
        old.report(*(old.started(offer) for offer in offers))
        old.report(*(old.ended(offer) for offer in offers))
        assert again.task("ran").state is TaskState.COMPLETED
        entry = audit_of(elsewhere)[-1]
        assert entry.entry.action == "store.restore"

    def test_one_dump_put_back_twice_gives_two_generations(
        self,
        settings: Settings,
        elsewhere: Settings,
        postgres: PostgresServer,
        tmp_path: Path,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        opened(settings).close()
        dump = dumped(postgres, settings, tmp_path / "hcna.dump")
        filled(postgres, elsewhere, dump)
        first = take_over(elsewhere, now=time.time()).generation
        opened(elsewhere).close()
        postgres.drop_database(elsewhere.store_url.rpartition("/")[2])
        postgres.execute(f"CREATE DATABASE {elsewhere.store_url.rpartition('/')[2]}")
        filled(postgres, elsewhere, dump)
        with pytest.raises(StoreRestored):
            opened(elsewhere)
        assert take_over(elsewhere, now=time.time()).generation > first


class TestNoticed:
    @pytest.fixture(autouse=True)
    def used(self, settings: Settings) -> None:
        """A database that a moderator has worked on."""
        store = PostgresTaskStore(settings.store_url)
        with store.transaction():
            store.insert([a_task()])
            store.append_facts([a_fact()])
        store.close()

    def test_it_is_itself(
        self, settings: Settings, opened: Callable[[Settings], PostgresTaskStore]
    ) -> None:
        opened(settings).close()
        assert number(settings, "generation") == 1

    def test_put_back_into_the_same_database(
        self,
        settings: Settings,
        postgres: PostgresServer,
        tmp_path: Path,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        dump = dumped(postgres, settings, tmp_path / "hcna.dump")
        postgres.shell(
            restore_command(settings)
            .replace("--no-owner", "--clean --no-owner")
            .replace("FILE.dump", str(dump))
        )
        with pytest.raises(StoreRestored, match="its tables were made anew"):
            opened(settings)

    def test_a_copy_beside_it(
        self,
        settings: Settings,
        postgres: PostgresServer,
        tmp_path: Path,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        name = postgres.create_database(settings.store_url.rpartition("/")[2])
        copy = settings_of(tmp_path / "copy", postgres.url(name))
        with pytest.raises(StoreRestored, match="another database"):
            opened(copy)
        check = store_check(copy)
        assert (check.level, check.fix) == ("fail", "hcna store restored")
        assert store_check(settings).level == "ok"
        opened(settings).close()
        postgres.drop_database(name)

    def test_another_server(
        self,
        settings: Settings,
        postgres: PostgresServer,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        database = settings.store_url.rpartition("/")[2]
        postgres.execute("UPDATE origin SET server = server + 1", database)
        with pytest.raises(StoreRestored, match="another server"):
            opened(settings)

    def test_half_a_take_over_is_none(
        self,
        settings: Settings,
        postgres: PostgresServer,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        database = settings.store_url.rpartition("/")[2]
        postgres.execute("UPDATE origin SET database = 1", database)
        store = PostgresTaskStore(settings.store_url, restored=True)
        assert store.renumber(T0 + 60) == (1, int((T0 + 60) * 1000))
        store.close()
        with pytest.raises(StoreRestored):
            opened(settings)
        found = take_over(settings, now=T0 + 60)
        assert found.generation_before == int((T0 + 60) * 1000)
        assert found.generation > found.generation_before
        opened(settings).close()
        assert number(settings, "generation") == found.generation

    def test_a_branch_of_the_servers_history_raises_the_generation_by_itself(
        self,
        settings: Settings,
        postgres: PostgresServer,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        """A standby was promoted, or a base backup put back, while no moderator was connected."""
        database = settings.store_url.rpartition("/")[2]
        before = {name: number(settings, name) for name in ("generation", "last_fact")}
        postgres.execute("UPDATE origin SET timeline = '000000FF'", database)
        opened(settings).close()
        assert number(settings, "generation") > before["generation"] + 1
        assert number(settings, "last_fact") >= before["last_fact"] + NUMBERS_PER_S
        (entry,) = audit_of(settings)
        assert (entry.entry.action, entry.entry.outcome) == ("store.went_back", "done")
        assert "timeline 000000FF" in entry.entry.detail
        raised = number(settings, "generation")
        opened(settings).close()
        assert number(settings, "generation") == raised

    def test_a_role_that_may_not_ask_the_server(
        self,
        settings: Settings,
        postgres: PostgresServer,
        opened: Callable[[Settings], PostgresTaskStore],
    ) -> None:
        database = settings.store_url.rpartition("/")[2]
        for function in ("pg_control_system()", "pg_walfile_name(pg_lsn)"):
            postgres.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM public", database)
        postgres.execute("CREATE ROLE plain LOGIN PASSWORD 'plain'")
        try:
            postgres.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO plain", database)
            url = f"postgresql://plain:plain@127.0.0.1:{postgres.port}/{database}"
            session = Session(url, Manners(name="test", read_only=True))
            found = origin.look(session)
            session.close()
        finally:
            postgres.execute("DROP OWNED BY plain", database)
            postgres.execute("DROP ROLE plain")
        assert (found.now.server, found.now.timeline) == (None, None)
        assert (found.moved(), found.branched()) == ("", False)

    def test_a_moderator_at_work_is_not_disturbed(self, settings: Settings) -> None:
        store = PostgresTaskStore(settings.store_url)
        with pytest.raises(StoreInUse):
            take_over(settings, now=T0)
        store.close()

    def test_a_clock_that_is_behind_is_refused(self, settings: Settings) -> None:
        with pytest.raises(BackupRefused, match="set the clock first"):
            take_over(settings, now=T0 - 3600)

    def test_a_sqlite_store_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(BackupRefused, match="hcna restore"):
            take_over(Settings(home=tmp_path), now=T0)


class TestBranch:
    """A server recovers from its archive, which ends in a timeline of its own."""

    @pytest.fixture
    def server(self) -> Iterator[PostgresServer]:
        with running_server() as server:
            yield server

    @staticmethod
    def branch(server: PostgresServer) -> None:
        server.stop()
        (server.data / "recovery.signal").touch()
        server.start(restore_command="false")

    def test_who_starts_after_it_raises_the_generation(
        self, server: PostgresServer, tmp_path: Path
    ) -> None:
        settings = settings_of(tmp_path / "m1", server.url(server.create_database()))
        PostgresTaskStore(settings.store_url).close()
        server.stop()
        server.start()
        PostgresTaskStore(settings.store_url).close()
        assert number(settings, "generation") == 1, "a restart is none"
        self.branch(server)
        PostgresTaskStore(settings.store_url).close()
        raised = number(settings, "generation")
        assert raised > 10**12
        assert [one.entry.action for one in audit_of(settings)] == ["store.went_back"]
        PostgresTaskStore(settings.store_url).close()
        assert number(settings, "generation") == raised

    def test_who_lived_through_it_knows_that_nothing_is_missing(
        self, server: PostgresServer, tmp_path: Path
    ) -> None:
        settings = settings_of(tmp_path / "m1", server.url(server.create_database()))
        store = PostgresTaskStore(settings.store_url)
        with store.transaction():
            store.insert([a_task()])
        self.branch(server)
        while True:
            try:
                with store.transaction():
                    store.append_facts([a_fact()])
                break
            except StoreUnavailable:
                time.sleep(0.05)
        store.close()
        PostgresTaskStore(settings.store_url).close()
        assert number(settings, "generation") == 1
        assert audit_of(settings) == []


class TestArchive:
    def test_a_dump_that_comes_first_refers_to_nothing_that_is_missing(
        self, settings: Settings, elsewhere: Settings, postgres: PostgresServer, tmp_path: Path
    ) -> None:
        artifacts = open_artifacts(settings)
        stop, some = threading.Event(), threading.Event()

        def write() -> None:
            store = PostgresTaskStore(settings.store_url)
            while not stop.is_set():
                seq = store.last_seq() + 1
                stored = artifacts.put(os.urandom(64) + b"artifact")
                with store.transaction():
                    payload = json.dumps({"artifact": stored.sha256}).encode()
                    store.insert([a_task(f"t{seq}", seq=seq, payload=payload)])
                if seq > 20:
                    some.set()
            store.close()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert some.wait(60)
            dump = dumped(postgres, settings, tmp_path / "hcna.dump")
            report = backup(settings, to=tmp_path / "hcna.tar.zst", now=T0)
        finally:
            stop.set()
            writer.join()
        filled(postgres, elsewhere, dump)
        reader = PostgresTaskReader(elsewhere.store_url)
        tasks = reader.get([f"t{seq}" for seq in range(1, 10_000)])
        reader.close()
        named = {json.loads(one.spec.payload)["artifact"] for one in tasks.values()}
        assert len(named) > 20
        restore(elsewhere, Path(report.path), now=T0 + 60)
        back = open_artifacts(elsewhere)
        for name in named:
            found = back.find(name)
            data = back.read(name, 0, found.size)
            assert hashlib.sha256(data).hexdigest() == name

    def test_there_and_back_in_the_words_of_the_commands(
        self, settings: Settings, elsewhere: Settings, postgres: PostgresServer, tmp_path: Path
    ) -> None:
        stored = open_artifacts(settings).put(b"an artifact")
        report = backup(settings, to=tmp_path, now=T0)
        manifest = inspect(Path(report.path)).manifest
        assert (manifest.on_server, manifest.point, manifest.artifacts) == (True, None, 1)
        told = " ".join(report.notes)
        assert "begun before it" in told
        assert postgres.password not in told
        assert "p%40ss" not in told
        (line,) = (one for one in report.notes if "pg_dump" in one)
        command = line.partition("in this order: ")[2].partition(" && ")[0]
        postgres.shell(command)
        assert len(list(tmp_path.glob("*.dump"))) == 1

        with pytest.raises(BackupRefused, match="DATABASE_URL"):
            restore(Settings(home=tmp_path / "x"), Path(report.path), now=T0)
        back = restore(elsewhere, Path(report.path), now=T0)
        assert (back.point, back.ended, back.artifacts) == (None, None, 1)
        assert restore_command(elsewhere) in back.notes
        assert back.notes[-1] == "hcna store restored"
        assert open_artifacts(elsewhere).find(stored.sha256).size == 11

    def test_the_command(
        self,
        settings: Settings,
        postgres: PostgresServer,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("HCNA_CONFIG", "HCNA_STORE__URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HCNA_HOME", str(settings.home))
        monkeypatch.setenv("DATABASE_URL", settings.store_url)
        PostgresTaskStore(settings.store_url).close()
        database = settings.store_url.rpartition("/")[2]
        postgres.execute("UPDATE origin SET database = 1", database)
        assert main(["store", "restored"]) == 0
        told = capfd.readouterr()
        assert "The generation was 1 and is 1" in told.out
        assert "hcna up" in told.err
        assert main(["store", "restored", "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["generation"] > found["generation_before"] > 10**12


def test_no_secret_stays_in_a_command() -> None:
    url = "postgresql://me:p%40ss@h,g:5433/d?sslmode=require&password=x&sslpassword=y&options=-cz"
    assert without_secrets(url) == "postgresql://me@h,g:5433/d?sslmode=require&options=-cz"
    assert without_secrets("postgresql://h/d?pass%77ord=x&user=u") == "postgresql://h/d?user=u"
    assert without_secrets("postgresql:///d?host=/run") == "postgresql:///d?host=/run"
    assert without_secrets("sqlite:///x/y") == "sqlite:///x/y"

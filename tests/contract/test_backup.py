"""A backup is one commit of a store that is being written to, and a restore fences what was out."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import apsw
import pytest

from hcna_ray.config import LimitSettings, RaySettings, Settings
from hcna_ray.core.models import OnDisconnect, RetryPolicy, TaskState, Token
from hcna_ray.runtime.messages import Grant, ReportKind
from hcna_ray.store import backup as store_backup
from hcna_ray.store.backup import BackupRefused, Point, next_generation
from hcna_ray.store.generations import numbers_to_skip
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from hcna_ray.supervisor.backup import backup, check, restore
from tests.support.builders import T0, a_fact, a_task
from tests.support.paper_worker import WAITING, Desk, PaperWorker

WORDS = "correct horse battery staple"


def settings_of(home: Path) -> Settings:
    return Settings(
        home=home,
        limits=LimitSettings(disk_free_bytes_min=0),
        ray=RaySettings(temp_dir=home / "ray"),  # Others' Ray is none of this home's.
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    home = tmp_path / "m1"
    home.mkdir()
    return settings_of(home)


@pytest.fixture
def spare(tmp_path: Path) -> Settings:
    """An empty machine."""
    return settings_of(tmp_path / "spare")


@pytest.fixture
def opened() -> Iterator[Callable[[Settings], SqliteTaskStore]]:
    stores = []

    def open_store(settings: Settings) -> SqliteTaskStore:
        assert settings.store_path is not None
        stores.append(SqliteTaskStore(settings.store_path))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def saved(settings: Settings, tmp_path: Path, *, now: float = T0) -> Path:
    return Path(backup(settings, to=tmp_path / f"{time.monotonic_ns()}.tar.zst", now=now).path)


def history(settings: Settings, limit: int = 10**6) -> list[tuple[int, str, str]]:
    assert settings.store_path is not None
    reader = SqliteTaskReader(settings.store_path)
    try:
        found = reader.facts(after=0, limit=limit)
    finally:
        reader.close()
    return [(one.number, one.fact.task_id, one.fact.kind) for one in found]


class Writer:
    """Commits tasks and facts as fast as it can, on a thread; remembers how long each took."""

    def __init__(self, settings: Settings, *, batch: int = 20) -> None:
        self._settings, self._batch = settings, batch
        self._stop = threading.Event()
        self.some = threading.Event()
        self.commits_s: list[float] = []
        self.written = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        assert self._settings.store_path is not None
        store = SqliteTaskStore(self._settings.store_path)
        while not self._stop.is_set():
            seqs = range(store.last_seq() + 1, store.last_seq() + 1 + self._batch)
            began = time.perf_counter()
            with store.transaction():
                store.insert([a_task(f"t{seq}", seq=seq, payload=os.urandom(200)) for seq in seqs])
                store.append_facts([a_fact(f"t{seq}", kind="accepted") for seq in seqs])
            self.commits_s.append(time.perf_counter() - began)
            self.written += self._batch
            if self.written > 50 * self._batch:
                self.some.set()
        store.close()

    def __enter__(self) -> Writer:
        self._thread.start()
        assert self.some.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class TestPoint:
    def test_what_is_restored_is_a_prefix_of_what_was_committed(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        archives = []
        with Writer(settings):
            for _ in range(5):
                archives.append(saved(settings, tmp_path))
                time.sleep(0.05)
        whole = history(settings)

        last = 0
        for number, archive in enumerate(archives):
            point = check(archive).point
            assert point is not None
            there = settings_of(tmp_path / f"spare-{number}")
            report = restore(there, archive, now=T0 + 60)
            assert history(there) == whole[: point.last_fact]
            assert point.last_fact == point.facts == whole[point.last_fact - 1][0]
            assert sum(point.tasks.values()) == point.last_fact  # One fact each, in one commit.
            assert report.ended is not None
            assert last < point.last_fact < len(whole)
            last = point.last_fact

    def test_a_store_that_nobody_has_open_is_saved_too(
        self, settings: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        assert settings.store_path is not None
        store = SqliteTaskStore(settings.store_path)
        with store.transaction():
            store.insert([a_task()])
        store.close()
        assert sorted(path.name for path in settings.home.iterdir()) == ["queue.db"]

        restore(spare, saved(settings, tmp_path), now=T0)

        assert spare.store_path is not None
        reader = SqliteTaskReader(spare.store_path)
        assert set(reader.get(["t1"])) == {"t1"}
        reader.close()

    def test_the_log_of_a_killed_writer_is_part_of_the_point(
        self, settings: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        """What was committed stands in the log alone when its writer was killed."""
        assert settings.store_path is not None
        store = SqliteTaskStore(settings.store_path)
        with store.transaction():
            store.insert([a_task()])
        killed = settings_of(tmp_path / "killed")
        killed.home.mkdir()
        for end in ("", "-wal"):
            source = settings.store_path.with_name(f"queue.db{end}")
            (killed.home / source.name).write_bytes(source.read_bytes())
        store.close()

        point = check(saved(killed, tmp_path)).point

        assert point is not None
        assert point.tasks == {"queued": 1}

    def test_commits_do_not_wait_for_a_slow_copy(self, settings: Settings) -> None:
        """Once the log is near its bound the writer waits for readers: not for long."""
        store = SqliteTaskStore(settings.store_path)  # type: ignore[arg-type]
        with store.transaction():
            store.insert([a_task("t1", seq=1)])
        flags = apsw.SQLITE_OPEN_READONLY
        slow = apsw.Connection(str(settings.store_path), flags=flags)
        slow.execute("BEGIN")
        slow.execute("SELECT count(*) FROM task").fetchall()
        longest = 0.0
        for first in range(2, 16_000, 400):  # Some 64 MiB, so the log passes 48.
            tasks = [
                a_task(f"t{n}", seq=n, payload=os.urandom(4000)) for n in range(first, first + 400)
            ]
            began = time.perf_counter()
            with store.transaction():
                store.insert(tasks)
            longest = max(longest, time.perf_counter() - began)
        slow.close()
        store.close()
        assert longest < 3.0  # It was 5: the whole patience of a connection.

    def test_a_copy_that_lets_the_log_grow_without_end_is_given_up(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = SqliteTaskStore(settings.store_path, wal_bytes_max=1 << 20)  # type: ignore[arg-type]
        numbers = itertools.count(1)

        def write_on(_descriptor: int = -1) -> None:
            with store.transaction():
                store.insert(
                    [a_task(f"t{n}", seq=n, payload=bytes(4000)) for n in islice(numbers, 100)]
                )

        for _ in range(10):
            write_on()
        monkeypatch.setattr(store_backup, "LOG_GROWTH_MAX", 4 << 20)
        monkeypatch.setattr(store_backup, "_PAGES_PER_STEP", 1)
        # At every step of the copy more is written than the step has copied.
        monkeypatch.setattr(os, "fdatasync", write_on)

        with pytest.raises(BackupRefused, match="more than 4 MiB were written"):
            store_backup.snapshot(store.path, tmp_path / "copy")

        monkeypatch.undo()
        log = Path(f"{store.path}-wal")
        assert log.stat().st_size > 4 << 20
        write_on()  # The log has been carried over, whole.
        for _ in range(20):
            write_on()
            assert log.stat().st_size <= 2 << 20  # Its bound, and one commit.
        store.close()

    def test_a_damaged_store_is_not_saved(self, settings: Settings, tmp_path: Path) -> None:
        assert settings.store_path is not None
        store = SqliteTaskStore(settings.store_path)
        with store.transaction():
            store.insert([a_task(f"t{seq}", seq=seq) for seq in range(1, 2000)])
        store.close()
        raw = bytearray(settings.store_path.read_bytes())
        raw[len(raw) // 2 : len(raw) // 2 + 8192] = bytes(8192)
        settings.store_path.write_bytes(raw)
        out = tmp_path / "out"
        out.mkdir()

        with pytest.raises(Exception, match="damaged"):
            backup(settings, to=out, now=T0)
        assert list(out.iterdir()) == []
        assert not list(settings.home.glob(".hcna*"))


class TestFence:
    """A moderator, killed; its store as it was some time before; and those who lived on."""

    def test_old_tokens_open_nothing_and_what_ran_runs_again(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        desk = Desk(opened(settings))
        worker = PaperWorker(desk)
        desk.submit_ids("ran", "waited", "later")
        ran, waited, later = [worker.granted(slot)[0] for slot in range(3)]
        worker.report(worker.started(ran))
        archive = saved(settings, tmp_path, now=desk.clock.now())
        # After the backup: one ends, one starts, a new one comes.
        worker.report(worker.ended(ran), worker.started(waited))
        desk.submit_ids("after")

        desk.clock.advance(600)
        report = restore(spare, archive, now=desk.clock.now())

        assert (report.ended.returned, report.ended.lost) == (2, 1)  # type: ignore[union-attr]
        again = Desk(opened(spare))
        again.clock.advance(600)
        old = PaperWorker(again, incarnation="a")
        store = again.store
        assert store.leased() == []
        assert store.get(["after"]) == {}
        task = again.task("ran")
        assert (task.state, task.losses, task.failures) == (TaskState.QUEUED, 0, 0)
        # Whoever still has an old token: every kind of report is late, and says so.
        now = again.clock.now()
        for offer in (ran, waited, later):
            for one in (old.started(offer), *(old.ended(offer, kind) for kind in _FINAL)):
                ack = old.report(one)
                assert ack.applied == 0
                assert ack.late == ((offer.task_id, Token(*offer.token)),)
        assert {again.task(id_).state for id_ in ("ran", "waited", "later")} == {TaskState.QUEUED}
        # All three go out again, under tokens above every old one, and end.
        offers = [old.granted(slot)[0] for slot in range(3)]
        assert {offer.task_id for offer in offers} == {"ran", "waited", "later"}
        assert report.generation == int(now * 1000)
        for offer in offers:
            assert Token(*offer.token) > max(Token(*one.token) for one in (ran, waited, later))
        old.report(*(old.started(offer) for offer in offers))
        old.report(*(old.ended(offer) for offer in offers))
        assert {again.task(id_).state for id_ in ("ran", "waited")} == {TaskState.COMPLETED}

    def test_a_worker_that_lived_through_it_must_say_hello_first(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        desk = Desk(opened(settings))
        worker = PaperWorker(desk)
        desk.submit_ids("t1")
        (offer,) = worker.granted()
        restore(spare, saved(settings, tmp_path), now=T0 + 60)

        worker.desk = again = Desk(opened(spare))
        assert worker.heartbeat().known is False
        assert again.answer(worker.exchange()) == Grant(seq=2, hello=True)
        assert worker.report(worker.ended(offer)).late == (("t1", Token(1, 1)),)
        worker.hello()
        assert worker.heartbeat().known is True
        assert [one.task_id for one in worker.granted()] == ["t1"]

    def test_journals_of_before_that_come_with_the_hello_change_nothing(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        desk = Desk(opened(settings))
        worker = PaperWorker(desk)
        desk.submit_ids("t1")
        (offer,) = worker.granted()
        restore(spare, saved(settings, tmp_path), now=T0 + 60)

        worker.desk, worker.incarnation = Desk(opened(spare)), "b"
        worker.hello((worker.started(offer), worker.ended(offer)))

        assert worker.desk.task("t1").state is TaskState.QUEUED

    def test_keys_dependents_and_cancels_follow_their_task(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        desk = Desk(opened(settings))
        worker = PaperWorker(desk)
        desk.submit_ids("cancelled", ordering_key="k", concurrency_key="c")
        desk.submit_ids("behind", ordering_key="k", concurrency_key="c")
        desk.submit_ids("child", depends_on=("cancelled",))
        (offer,) = worker.granted()
        worker.report(worker.started(offer))
        desk.cancel("cancelled")
        assert desk.task("cancelled").state is TaskState.RUNNING
        restore(spare, saved(settings, tmp_path), now=T0 + 60)

        again = Desk(opened(spare))
        assert again.task("cancelled").state is TaskState.CANCELLED
        assert again.task("child").state is TaskState.FAILED
        assert [one.task_id for one in PaperWorker(again).granted()] == ["behind"]

    def test_a_task_that_waits_for_its_worker_goes_to_that_one(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        desk = Desk(opened(settings))
        worker = PaperWorker(desk)
        desk.submit_ids("t1", on_disconnect=OnDisconnect.WAIT, retry=RetryPolicy(max_attempts=1))
        (offer,) = worker.granted()
        worker.report(worker.started(offer))
        restore(spare, saved(settings, tmp_path), now=desk.clock.now())

        again = Desk(opened(spare))
        other = PaperWorker(again, "W2")
        assert again.answer(other.exchange()) is WAITING
        assert [one.task_id for one in PaperWorker(again, "W1", "b").granted()] == ["t1"]

    def test_the_audit_log_and_the_histories_tell_of_it(
        self, settings: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        desk = Desk(SqliteTaskStore(settings.store_path))  # type: ignore[arg-type]
        worker = PaperWorker(desk)
        desk.submit_ids("t1")
        worker.report(worker.started(worker.granted()[0]))
        archive = saved(settings, tmp_path, now=T0)
        desk.store.close()
        report = restore(spare, archive, now=T0 + 60)

        assert spare.store_path is not None
        reader = SqliteTaskReader(spare.store_path)
        (entry,) = [one.entry for one in reader.audit(before=None, limit=10)]
        assert (entry.action, entry.target) == ("store.restore", archive.name)
        assert f"generation 1 is now {report.generation}" in entry.detail
        last = reader.facts(after=0, limit=100, task_id="t1")[-1]
        assert (last.fact.kind, last.fact.token) == ("lost", Token(1, 1))
        assert last.fact.detail == "a backup of 2026-01-01T00:00:00+00:00 was restored"
        (attempt,) = reader.attempts("t1")
        assert (attempt.outcome, attempt.node_id) == ("lost", "HCNA-W1--test")
        assert reader.workers()[0].asleep_at == T0 + 60
        reader.close()


_FINAL = (
    ReportKind.COMPLETED,
    ReportKind.FAILED,
    ReportKind.LOST,
    ReportKind.RETURNED,
    ReportKind.PROGRESS,
)


class TestNumbers:
    """No token and no number that anybody may remember is ever given again."""

    POINT = Point(
        generation=1,
        last_fact=100,
        last_end=10,
        last_seq=5,
        schema=1,
        tasks={},
        leases=0,
        facts=100,
        audit=0,
        workers=0,
    )

    def test_one_archive_restored_twice_gives_two_generations(
        self, settings: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        SqliteTaskStore(settings.store_path).close()  # type: ignore[arg-type]
        archive = saved(settings, tmp_path)

        first = restore(spare, archive, now=T0 + 60)
        second = restore(settings_of(tmp_path / "third"), archive, now=T0 + 60.002)

        assert first.generation is not None
        assert second.generation is not None
        assert 1 < first.generation < second.generation

    def test_a_store_that_is_replaced_is_outdone_whatever_the_clock_says(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        SqliteTaskStore(settings.store_path).close()  # type: ignore[arg-type]
        archive = saved(settings, tmp_path)
        ahead = restore(settings, archive, force=True, now=T0 + 86400).generation

        assert ahead is not None
        assert restore(settings, archive, force=True, now=T0 + 60).generation == ahead + 1

    @pytest.mark.parametrize(("now", "others"), [(T0, []), (T0 - 100, []), (T0, [1 << 50])])
    def test_a_generation_is_above_all_that_are_known(self, now: float, others: list[int]) -> None:
        found = next_generation(self.POINT, created_at=T0, now=now, others=others)
        assert found >= int(T0 * 1000)
        assert found > max([1, *others])
        assert found < 1 << 53  # JSON readers have doubles.

    def test_what_was_counted_after_the_backup_is_leapt_over(self) -> None:
        """A second restore lands above all that the first one's store can have given."""
        first = numbers_to_skip(created_at=T0, now=T0 + 60)
        given = 3600 * 1_000_000
        assert numbers_to_skip(created_at=T0, now=T0 + 60 + 3600) >= first + given
        assert numbers_to_skip(created_at=T0, now=T0 - 5) > 0

    def test_facts_and_ends_after_a_restore_are_new_to_every_reader(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        desk = Desk(opened(settings))
        worker = PaperWorker(desk)
        desk.submit_ids("t1", "t2")
        one, two = [worker.granted(slot)[0] for slot in range(2)]
        worker.report(worker.started(one), worker.ended(one))
        archive = saved(settings, tmp_path)
        worker.report(worker.started(two), worker.ended(two))
        reader = opened(settings).reader()
        facts, ends = reader.last_fact(), reader.ended(ids=["t1", "t2"], limit=10)[-1][0]
        reader.close()
        restore(spare, archive, now=T0 + 60)

        again = Desk(opened(spare))
        worker = PaperWorker(again)
        (offer,) = worker.granted()
        worker.report(worker.started(offer), worker.ended(offer))
        reader = opened(spare).reader()
        fresh = reader.facts(after=facts, limit=10)
        assert [line.fact.kind for line in fresh] == ["returned", "granted", "started", "completed"]
        assert [task.id for _, task in reader.ended(ids=["t1", "t2"], after=ends, limit=9)] == [
            "t2"
        ]
        reader.close()


class TestArtifacts:
    def put(self, settings: Settings, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        path = settings.artifacts_dir / name[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return name

    def test_those_that_the_point_refers_to_come_along_and_no_others(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        names = [self.put(settings, os.urandom(300_000 + number)) for number in range(4)]
        store = opened(settings)
        payload = f'{{"artifact":"{names[0]}"}}'.encode()
        result = f'{{"artifact":{{"sha256":"{names[1].upper()}"}}}}'.encode()
        checkpoint = f'["{names[2]}", "{"0" * 64}"]'.encode()
        with store.transaction():
            store.insert(
                [
                    a_task("t1", seq=1, payload=payload),
                    a_task("t2", seq=2, state=TaskState.COMPLETED, result=result),
                    a_task("t3", seq=3, checkpoint=checkpoint),
                ]
            )
        archive = saved(settings, tmp_path)
        assert check(archive).artifacts == 3

        restore(spare, archive, now=T0)

        for name in names[:3]:
            path = spare.artifacts_dir / name[:2] / name
            assert hashlib.sha256(path.read_bytes()).hexdigest() == name
            assert path.stat().st_mode & 0o777 == 0o400
        assert not (spare.artifacts_dir / names[3][:2] / names[3]).exists()

    def test_one_that_rotted_on_the_disk_is_told_and_left_out(
        self,
        settings: Settings,
        spare: Settings,
        tmp_path: Path,
        opened: Callable[[Settings], SqliteTaskStore],
    ) -> None:
        good, bad = self.put(settings, b"good"), self.put(settings, b"bad")
        (settings.artifacts_dir / bad[:2] / bad).write_bytes(b"bAd")
        store = opened(settings)
        with store.transaction():
            store.insert([a_task(payload=f'["{good}","{bad}"]'.encode())])

        manifest = check(saved(settings, tmp_path))
        assert manifest.damaged == (bad,)
        report = restore(spare, saved(settings, tmp_path), now=T0)

        assert report.artifacts == 1
        assert (spare.artifacts_dir / good[:2] / good).is_file()
        assert not (spare.artifacts_dir / bad[:2] / bad).exists()


class TestSize:
    @pytest.mark.timeout(600)
    def test_a_hundred_thousand_tasks_while_the_writer_goes_on(
        self, settings: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        assert settings.store_path is not None
        count = 100_000
        store = SqliteTaskStore(settings.store_path)
        for first in range(1, count + 1, 5000):
            seqs = range(first, first + 5000)
            with store.transaction():
                store.insert(
                    [
                        a_task(
                            f"task-01K{seq:023d}",
                            seq=seq,
                            state=TaskState.COMPLETED if seq % 2 else TaskState.QUEUED,
                            payload=b'{"message":"%s"}' % os.urandom(100).hex().encode(),
                        )
                        for seq in seqs
                    ]
                )
                for kind in ("accepted", "granted", "started", "completed"):
                    store.append_facts([a_fact(f"task-01K{seq:023d}", kind) for seq in seqs])
        store.close()
        store_bytes = settings.store_path.stat().st_size

        with Writer(settings, batch=5) as writer:
            before = max(writer.commits_s)
            writer.commits_s.clear()
            report = backup(settings, to=tmp_path / "big.tar.zst", now=T0)
            during = max(writer.commits_s)
        began = time.perf_counter()
        check(Path(report.path))
        check_s = time.perf_counter() - began
        restored = restore(spare, Path(report.path), now=T0)

        assert restored.point is not None
        assert sum(restored.point.tasks.values()) >= count
        print(  # noqa: T201 - figures for whoever runs it
            f"\nmeasured: backup of {count} tasks: store {store_bytes / 1e6:.0f} MB, "
            f"archive {report.archive_bytes / 1e6:.0f} MB, backup {report.took_s:.1f} s, "
            f"verify {check_s:.1f} s, restore {restored.took_s:.1f} s; longest commit beside it "
            f"{during * 1000:.0f} ms (before: {before * 1000:.0f} ms)"
        )


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        if os.geteuid() != 0:
            pytest.skip("needs root, to mount a small tmpfs")
        path = tmp_path / "small"
        path.mkdir()
        if os.system(f"mount -t tmpfs -o size=1m tmpfs {path} 2>/dev/null"):
            pytest.skip("no tmpfs can be mounted here")
        yield path
        os.system(f"umount {path}")

    def fill(self, settings: Settings) -> None:
        store = SqliteTaskStore(settings.store_path)  # type: ignore[arg-type]
        with store.transaction():
            store.insert([a_task(f"t{n}", seq=n, payload=os.urandom(4000)) for n in range(1, 600)])
        store.close()

    def test_of_the_archive(self, settings: Settings, small_disk: Path) -> None:
        self.fill(settings)
        with pytest.raises(BackupRefused, match="full"):
            backup(settings, to=small_disk, now=T0)
        assert list(small_disk.iterdir()) == []
        assert not list(settings.home.glob(".hcna*"))

    def test_of_the_store_which_keeps_its_reserve(self, settings: Settings, tmp_path: Path) -> None:
        self.fill(settings)
        greedy = settings.model_copy(
            update={"limits": LimitSettings(disk_free_bytes_min=1024 * (1 << 30))}
        )
        with pytest.raises(BackupRefused, match="reserve"):
            backup(greedy, to=tmp_path / "a.tar.zst", now=T0)

    def test_while_restoring(self, settings: Settings, small_disk: Path, tmp_path: Path) -> None:
        self.fill(settings)
        archive = saved(settings, tmp_path)
        with pytest.raises(BackupRefused, match="full"):
            restore(settings_of(small_disk / "home"), archive, now=T0)
        left = [path for path in small_disk.rglob("*") if path.is_file()]
        assert left == []


def test_an_older_schema_is_brought_up_to_date(
    settings: Settings, spare: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-in for the next version: this one with one migration more."""
    from hcna_ray.store import migrations

    SqliteTaskStore(settings.store_path).close()  # type: ignore[arg-type]
    archive = saved(settings, tmp_path)
    known = migrations.known_migrations()
    number = known[-1].number + 1
    sql = "CREATE TABLE something_new (id INTEGER PRIMARY KEY) STRICT"
    more = migrations.Migration(number, f"{number:04d}_new.sql", sql, "0" * 64)
    monkeypatch.setattr(migrations, "known_migrations", lambda: [*known, more])

    restore(spare, archive, now=T0)

    db = apsw.Connection(str(spare.store_path))
    assert db.table_exists("main", "something_new")
    db.close()

"""What only the SQLite store promises: durability, bounds, migrations, plans on indexes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from hcna_ray.core.errors import Overloaded, SchemaTooNew, StoreTooOld, StoreUnavailable
from hcna_ray.core.models import Hold, LaneKey, Needs, Task, TaskFilter, TaskState
from hcna_ray.store import bookkeeping, codec, rows, sqlite
from hcna_ray.store.migrations import SchemaChanged, known_migrations
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore, page_query, require_library
from hcna_ray.store.sqlite_locks import left_behind
from tests.support.builders import (
    T0,
    a_fact,
    a_lease,
    a_spec,
    a_task,
    a_worker_record,
    an_attempt,
)

ECHO = LaneKey("default", "echo", Needs())


def put(store: SqliteTaskStore, *tasks: Task) -> None:
    with store.transaction():
        store.insert(tasks)


def fill(store: SqliteTaskStore, *, payload_bytes: int) -> None:
    """Put one task after another, until the store refuses."""
    for seq in range(1, 10_000):
        put(store, a_task(f"t{seq}", seq=seq, payload=os.urandom(payload_bytes)))


class TestOpening:
    @pytest.mark.parametrize("version", ["3.40.1", "3.51.2", "3.9.9"])
    def test_a_library_with_the_wal_reset_bug_is_refused(
        self, sqlite_path: Path, version: str
    ) -> None:
        with pytest.raises(StoreTooOld, match=r"3\.51\.3"):
            SqliteTaskStore(sqlite_path, library_version=version)
        assert not sqlite_path.exists()
        with pytest.raises(StoreTooOld):
            SqliteTaskReader(sqlite_path, library_version=version)

    @pytest.mark.parametrize("version", [None, "3.51.3", "3.53.0", "4.0"])
    def test_a_library_with_the_fix_is_taken(self, version: str | None) -> None:
        require_library(version)

    def test_the_file_is_for_its_owner_alone(self, sqlite_path: Path) -> None:
        mask = os.umask(0)
        try:
            store = SqliteTaskStore(sqlite_path)
            put(store, a_task())
        finally:
            os.umask(mask)
        files = sqlite_path.parent.iterdir()
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in files}
        store.close()
        assert modes == {"queue.db": 0o600, "queue.db-wal": 0o600, "queue.db-shm": 0o600}

    def test_the_pragmas_are_really_set(self, sqlite_store: SqliteTaskStore) -> None:
        def pragma(name: str) -> object:
            return sqlite_store._run(f"PRAGMA {name}")[0][0]

        assert pragma("journal_mode") == "wal"
        assert pragma("synchronous") == 2
        assert pragma("journal_size_limit") == 64 * 1024 * 1024
        assert pragma("temp_store") == 2
        assert pragma("foreign_keys") == 0
        assert pragma("busy_timeout") == 5000
        assert pragma("cache_size") == -65536

    def test_a_reader_cannot_write(self, sqlite_reader: SqliteTaskReader) -> None:
        assert sqlite_reader._run("PRAGMA query_only") == [(1,)]
        with pytest.raises(StoreUnavailable):
            sqlite_reader._run("DELETE FROM task")

    def test_a_reader_before_the_store_exists_says_what_to_do(self, sqlite_path: Path) -> None:
        with pytest.raises(StoreUnavailable, match="hcna up"):
            SqliteTaskReader(sqlite_path)
        assert not sqlite_path.exists()
        sqlite_path.touch()
        with pytest.raises(StoreUnavailable, match="hcna up"):
            SqliteTaskReader(sqlite_path)

    def test_a_path_may_hold_any_character(self, tmp_path: Path) -> None:
        path = tmp_path / "a b?c#d%e.db"
        store = SqliteTaskStore(path)
        put(store, a_task())
        reader = store.reader()
        assert reader.get(["t1"]) == {"t1": a_task()}
        reader.close()
        store.close()
        assert path.exists()

    def test_a_missing_directory_is_an_os_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            SqliteTaskStore(tmp_path / "no" / "queue.db")


class TestMigrations:
    def test_they_are_numbered_without_a_gap_and_applied_once(self, sqlite_path: Path) -> None:
        numbers = [migration.number for migration in known_migrations()]
        assert numbers == list(range(1, len(numbers) + 1))
        for _ in range(2):
            SqliteTaskStore(sqlite_path).close()
        ledger = list(edit(sqlite_path, "SELECT number, name, sha256 FROM schema_migration"))
        assert ledger == [(m.number, m.name, m.sha256) for m in known_migrations()]

    def test_an_edited_migration_is_refused(self, sqlite_path: Path) -> None:
        SqliteTaskStore(sqlite_path).close()
        edit(sqlite_path, "UPDATE schema_migration SET sha256 = 'other'")
        with pytest.raises(SchemaChanged, match=r"0001_tasks\.sql"):
            SqliteTaskStore(sqlite_path)
        with pytest.raises(SchemaChanged):
            SqliteTaskReader(sqlite_path)

    def test_a_newer_schema_is_refused(self, sqlite_path: Path) -> None:
        SqliteTaskStore(sqlite_path).close()
        edit(sqlite_path, "INSERT INTO schema_migration VALUES (99, '0099_future.sql', 'x')")
        with pytest.raises(SchemaTooNew, match="99"):
            SqliteTaskStore(sqlite_path)
        with pytest.raises(SchemaTooNew):
            SqliteTaskReader(sqlite_path)

    def test_an_old_spec_is_still_read(self) -> None:
        """The bytes of form 1, as they were first written. They must be readable for ever."""
        old = bytes.fromhex(
            "01dc0019a27431a46563686fc4027b7da764656661756c7405cb000000000000"
            "0000c0c0cb4072c00000000000c0c003c090c0c0a77265706c616365cb40ac20"
            "0000000000a0c0a0c0c0c0c0"
        )
        assert codec.unpack_spec(old) == a_spec(payload=b"{}", accepted_at=0.0)
        assert codec.pack_spec(a_spec(payload=b"{}", accepted_at=0.0)) == old

    def test_the_spec_of_a_confined_task_is_one_that_older_versions_refuse(self) -> None:
        """Form 2 is form 1 but for that; whatever was accepted before sees everything."""
        spec = a_spec(confined=True)
        raw = codec.pack_spec(spec)
        assert raw == b"\x02" + codec.pack_spec(a_spec())[1:]
        assert codec.unpack_spec(raw) == spec
        with pytest.raises(SchemaTooNew):  # Nothing else has such a form.
            codec.unpack_error(b"\x02")

    @pytest.mark.parametrize("confined", [False, True])
    def test_the_spec_of_a_schedules_task_says_which_and_for_when(self, confined: bool) -> None:
        spec = a_spec(confined=confined, schedule="nightly", schedule_at=T0)
        raw = codec.pack_spec(spec)
        assert raw[:1] == b"\x03"
        assert codec.unpack_spec(raw) == spec
        fields, *more = msgspec.msgpack.decode(raw[1:])
        assert more == [confined, "nightly", T0]
        assert b"\x01" + msgspec.msgpack.encode(fields) == codec.pack_spec(a_spec())

    def test_a_spec_of_a_newer_form_is_refused(self) -> None:
        with pytest.raises(SchemaTooNew):
            codec.unpack_spec(b"\x04" + codec.pack_spec(a_spec())[1:])

    def test_a_worker_that_another_version_wrote_is_read(self) -> None:
        """Fields that are new have a value of their own, and those of a newer one are passed by."""
        added = ("machine_id", "ray_node_id", "asleep_at", "left_at")
        record = a_worker_record(address="10.0.0.2")
        fields = msgspec.to_builtins(record)
        older = {name: value for name, value in fields.items() if name not in added}

        assert codec.unpack_worker(codec.FORM + msgspec.msgpack.encode(older)) == record
        newer = {**fields, "colour": "green"}
        assert codec.unpack_worker(codec.FORM + msgspec.msgpack.encode(newer)) == record


def _refused_to_others(path: str, *, first: int, count: int) -> bool:
    """Return whether another process cannot have these bytes of a file for itself."""
    code = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "try:\n"
        "    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, int(sys.argv[3]), int(sys.argv[2]))\n"
        "except BlockingIOError:\n"
        "    sys.exit(7)\n"
    )
    command = [sys.executable, "-c", code, path, str(first), str(count)]
    status = subprocess.run(command, check=False).returncode
    assert status in (0, 7)
    return status == 7


@contextmanager
def refused_unlocks(*, of_byte: int) -> Iterator[list[int]]:
    """Let the system refuse SQLite to give locks of one byte back; yields how often it did."""
    call = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, use_errno=True
    )
    real = call(("fcntl", ctypes.CDLL(None)))
    refused = [0]

    @call
    def fcntl_(fd: int, what: int, argument: int | None) -> int:
        if what == fcntl.F_SETLK and argument is not None:
            kind, _, start = struct.unpack_from("hhq", ctypes.string_at(argument, 16))
            if kind == fcntl.F_UNLCK and start == of_byte:
                refused[0] += 1
                ctypes.set_errno(errno.EIO)
                return -1
        return int(real(fd, what, argument))

    unix = apsw.VFS("refused-unlocks", base="unix")
    before = unix.xGetSystemCall("fcntl")
    unix.xSetSystemCall("fcntl", ctypes.cast(fcntl_, ctypes.c_void_p).value)
    try:
        yield refused
    finally:
        unix.xSetSystemCall("fcntl", before)
        unix.unregister()


def edit(path: Path, sql: str) -> list[tuple[object, ...]]:
    db = apsw.Connection(os.fspath(path))
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


class TestSeveralConnections:
    def test_two_readers_read_while_the_writer_writes(self, sqlite_store: SqliteTaskStore) -> None:
        done = threading.Event()
        troubles: list[BaseException] = []
        turns = [0, 0]

        def watch(index: int) -> None:
            reader = sqlite_store.reader()
            last = 0
            try:
                while not done.is_set() or not turns[index]:
                    page = reader.page(TaskFilter(), before_seq=None, limit=64)
                    newest = page[0].seq if page else 0
                    # Batches of eight are committed whole, and nothing goes back.
                    assert newest >= last
                    assert newest % 8 == 0
                    last = newest
                    turns[index] += 1
            except BaseException as error:
                troubles.append(error)
            finally:
                reader.close()

        threads = [threading.Thread(target=watch, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for start in range(1, 801, 8):
            put(sqlite_store, *(a_task(f"t{i}", seq=i) for i in range(start, start + 8)))
        done.set()
        for thread in threads:
            thread.join(timeout=30)
        assert troubles == []
        assert all(turns)

    @pytest.mark.parametrize("opened_before", [0, 1])
    def test_others_see_that_the_store_is_open(self, sqlite_path: Path, opened_before: int) -> None:
        for _ in range(opened_before):
            SqliteTaskStore(sqlite_path).close()
        store = SqliteTaskStore(sqlite_path)
        put(store, *(a_task(f"t{i}", seq=i) for i in range(1, 40)))
        reader = store.reader()
        assert reader.get(["t1"])
        reader.close()
        store._carry_over(apsw.SQLITE_CHECKPOINT_RESTART)
        left_behind(sqlite_path)
        # Whoever gets the one takes himself for the first, and empties the log's index; whoever
        # gets the other takes himself for the last, and deletes the log.
        assert _refused_to_others(f"{sqlite_path}-shm", first=128, count=1)
        assert _refused_to_others(str(sqlite_path), first=0x40000002, count=510)
        store.close()

    def test_a_lock_that_cannot_be_given_back_ends_the_process(
        self, sqlite_store: SqliteTaskStore
    ) -> None:
        put(sqlite_store, a_task())
        with refused_unlocks(of_byte=120) as refused:
            put(sqlite_store, a_task("t2", seq=2))
        assert refused == [1]
        sqlite_store._db.set_busy_timeout(50)
        for _ in range(2):
            with pytest.raises(OSError, match="must exit") as caught:
                put(sqlite_store, a_task("t3", seq=3))
            assert not isinstance(caught.value, StoreUnavailable)
        assert set(sqlite_store.get(["t1", "t2", "t3"])) == {"t1", "t2"}

    def test_a_log_that_can_never_begin_again_ends_the_process(self, sqlite_path: Path) -> None:
        store = SqliteTaskStore(sqlite_path, wal_bytes_max=256 * 1024)
        with refused_unlocks(of_byte=121) as refused, pytest.raises(OSError, match="must exit"):
            fill(store, payload_bytes=32 * 1024)
        assert refused[0]
        store.close()

    def test_another_process_in_the_way_is_waited_for(
        self, sqlite_store: SqliteTaskStore, sqlite_path: Path
    ) -> None:
        hold = (
            "import sys, apsw; db = apsw.Connection(sys.argv[1]); db.execute('BEGIN IMMEDIATE'); "
            "print('held', flush=True); sys.stdin.read()"
        )
        sqlite_store._db.set_busy_timeout(50)
        with subprocess.Popen(
            [sys.executable, "-c", hold, str(sqlite_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(StoreUnavailable):
                put(sqlite_store, a_task())
            other.communicate(b"")
        put(sqlite_store, a_task())

    def test_a_transaction_notices_that_another_process_has_written(
        self, sqlite_store: SqliteTaskStore, sqlite_path: Path
    ) -> None:
        put(sqlite_store, a_task())
        other = SqliteTaskStore(sqlite_path)
        with other.transaction():
            other.raise_generation()
            other.save([a_task(version=1, lease=a_lease())])
        other.close()
        put(sqlite_store, a_task("t2", seq=2))
        assert sqlite_store.generation() == 2
        assert sqlite_store.ready_lanes() == {ECHO: 1}
        assert sqlite_store.get(["t1"])["t1"].lease == a_lease()

    def test_the_log_stays_within_its_bound_beside_a_reader(self, sqlite_path: Path) -> None:
        bound = 1024 * 1024
        store = SqliteTaskStore(sqlite_path, wal_bytes_max=bound)
        reader = store.reader()
        log = Path(f"{sqlite_path}-wal")
        largest = 0
        for i in range(1, 121):
            put(store, a_task(f"t{i}", seq=i, payload=os.urandom(32 * 1024)))
            assert reader.get([f"t{i}"])
            largest = max(largest, log.stat().st_size)
        assert sqlite_path.stat().st_size > 3 * bound
        assert bound / 16 < largest <= bound
        reader.close()
        store.close()

    def test_a_read_that_takes_too_long_is_broken_off_and_lets_the_log_start_again(
        self, sqlite_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound = 1024 * 1024
        store = SqliteTaskStore(sqlite_path, wal_bytes_max=bound)
        put(store, *(a_task(f"t{i}", seq=i) for i in range(1, 101)))
        reader = store.reader()
        endless = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
            "SELECT count(*) FROM n, task"
        )
        monkeypatch.setattr(sqlite, "READ_S_MAX", 0.2)

        with pytest.raises(Overloaded, match="ask for less"):
            reader._run(endless)

        monkeypatch.undo()
        assert len(reader.get([f"t{i}" for i in range(1, 101)])) == 100
        # It holds no old page any more: beside it the log stays within its bound.
        for i in range(101, 221):
            put(store, a_task(f"t{i}", seq=i, payload=os.urandom(32 * 1024)))
        assert Path(f"{sqlite_path}-wal").stat().st_size <= bound
        reader.close()
        store.close()


WRITER = """
import sys
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.support.builders import a_fact, a_task

store = SqliteTaskStore(sys.argv[1])
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
    def test_a_killed_writer_loses_nothing_that_it_committed(self, sqlite_path: Path) -> None:
        told = 0
        for commits in (1, 5, 9):
            with subprocess.Popen(
                [sys.executable, "-c", WRITER, os.fspath(sqlite_path)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            ) as writer:
                assert writer.stdout is not None
                for _ in range(commits):
                    told = int(writer.stdout.readline())
                writer.send_signal(signal.SIGKILL)
            store = SqliteTaskStore(sqlite_path)
            found = store.get(f"t{i}" for i in range(1, store.last_seq() + 1))
            assert len(found) == store.last_seq() == store.size().tasks >= told
            assert store.last_seq() % 3 == 0
            assert store.ready_lanes() == {ECHO: store.last_seq()}
            reader = store.reader()
            assert len(reader.facts(after=0, limit=10_000)) == store.last_seq()
            assert store._run("PRAGMA integrity_check") == [("ok",)]
            reader.close()
            store.close()

    def test_what_the_last_process_left_in_the_log_is_written_anew(self, sqlite_path: Path) -> None:
        """After a failed fsync the log may be in memory alone: nobody must build on it."""
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, os.fspath(sqlite_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        ) as writer:
            assert writer.stdout is not None
            told = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
        store = SqliteTaskStore(sqlite_path)
        # The database alone, without its log.
        alone = apsw.Connection(
            f"file:{sqlite_path}?immutable=1",
            flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
        )
        assert alone.execute("SELECT count(*) FROM task").get == store.last_seq() >= told
        alone.close()
        store.close()

    @pytest.fixture
    def cramped(self, tmp_path: Path) -> Iterator[tuple[SqliteTaskStore, Path]]:
        """A store on a disk of four mebibytes, half taken by a file beside it.

        Without the right to mount a disk, the store has a bound of its own instead.
        """
        mount = tmp_path / "disk"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", os.fspath(mount)]
        mounted = not subprocess.run(command, capture_output=True, check=False).returncode
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(2 * 1024 * 1024))
        bound = None if mounted else 2 * 1024 * 1024
        store = SqliteTaskStore(mount / "queue.db", bytes_max=bound)
        try:
            yield store, ballast
        finally:
            store.close()
            if mounted:
                subprocess.run(["umount", os.fspath(mount)], check=True)

    def test_a_full_disk_is_refused_and_survived(
        self, cramped: tuple[SqliteTaskStore, Path]
    ) -> None:
        store, ballast = cramped
        with pytest.raises(StoreUnavailable) as refusal:
            fill(store, payload_bytes=50_000)
        stored = store.last_seq()
        assert stored
        assert refusal.value.retry_after_s == 10
        assert store.size().tasks == store.last_seq() == stored
        ballast.unlink()
        self.still_well(store, stored)

    def test_the_bound_of_the_file_is_kept(self, sqlite_path: Path) -> None:
        bound = 1024 * 1024
        store = SqliteTaskStore(sqlite_path, bytes_max=bound)
        with pytest.raises(StoreUnavailable):
            fill(store, payload_bytes=20_000)
        stored = store.last_seq()
        assert stored > 10
        self.still_well(store, stored)
        store.close()
        assert sqlite_path.stat().st_size <= bound

    def still_well(self, store: SqliteTaskStore, stored: int) -> None:
        """Nothing of the refused transaction is there, and the store goes on."""
        names = [f"t{i}" for i in range(1, stored + 2)]
        assert sorted(store.get(names)) == sorted(names[:-1])
        assert store.last_seq() == store.size().tasks == stored
        assert store.ready_lanes() == {ECHO: stored}
        done = a_task("t1", state=TaskState.COMPLETED, spec=store.get(["t1"])["t1"].spec, version=1)
        with store.transaction():
            store.save([done])
            assert store.prune(T0 + 1, T0 + 1, 9) == 1
        put(store, a_task("small", seq=stored + 1))
        assert store.size().tasks == stored

    def test_a_read_only_database_is_refused(self, sqlite_store: SqliteTaskStore) -> None:
        sqlite_store._run("PRAGMA query_only = ON")
        with pytest.raises(StoreUnavailable):
            put(sqlite_store, a_task())
        sqlite_store._run("PRAGMA query_only = OFF")
        put(sqlite_store, a_task())


class Disk(apsw.VFS):
    """The disk, made to fail: `failure` is raised by the call of that name."""

    def __init__(self) -> None:
        self.failing: str | None = None
        self.code = 0
        super().__init__("failing-disk", "")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return DiskFile(self, name, flags)

    def touch(self, call: str) -> None:
        if self.failing == call:
            error = apsw.IOError(f"{call} failed")
            error.extendedresult = self.code  # type: ignore[attr-defined]
            raise error


class DiskFile(apsw.VFSFile):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._disk = disk
        super().__init__("", name, flags)

    def xSync(self, flags: int) -> None:
        self._disk.touch("sync")
        super().xSync(flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.touch("write")
        super().xWrite(data, offset)


class TestCache:
    def test_a_small_cache_hides_no_task(
        self, sqlite_store: SqliteTaskStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bookkeeping, "KNOWN_MAX", 3)
        tasks = [a_task(f"t{i}", seq=i) for i in range(1, 10)]
        put(sqlite_store, *tasks)
        for names in (["t7", "t1", "t8", "t2"], ["t9", "t3"], [task.id for task in tasks]):
            assert sorted(sqlite_store.get(names)) == sorted(names)
            assert sqlite_store.heads(ECHO, 9) == tasks
        with sqlite_store.transaction():
            sqlite_store.save([task.evolve(version=1, lease=a_lease()) for task in tasks])
        assert [task.version for task in sqlite_store.leased()] == [1] * 9

    def test_large_tasks_are_not_kept(self, sqlite_store: SqliteTaskStore) -> None:
        put(sqlite_store, a_task("t1", payload=bytes(5000)), a_task("t2", seq=2))
        assert [known.task.id for known in sqlite_store._known.values()] == ["t2"]


class TestFailingDisk:
    @pytest.fixture
    def disk(self) -> Iterator[Disk]:
        """A registered disk that works so far."""
        disk = Disk()
        yield disk
        disk.unregister()

    @pytest.mark.parametrize("code", [apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC])
    def test_a_failed_fsync_ends_the_store(self, disk: Disk, sqlite_path: Path, code: int) -> None:
        store = SqliteTaskStore(sqlite_path, vfs="failing-disk")
        put(store, a_task())
        disk.failing, disk.code = "sync", code
        with pytest.raises(OSError, match="synced") as failure:
            put(store, a_task("t2", seq=2))
        assert failure.value.errno == errno.EIO
        disk.failing = None
        with pytest.raises(OSError, match="must exit"), store.transaction():
            pass
        store.close()

        store = SqliteTaskStore(sqlite_path)
        assert "t1" in store.get(["t1"])
        store.close()

    @pytest.mark.parametrize(
        "code", [apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR, apsw.SQLITE_IOERR_TRUNCATE]
    )
    def test_a_failed_write_is_refused_and_survived(
        self, disk: Disk, sqlite_path: Path, code: int
    ) -> None:
        store = SqliteTaskStore(sqlite_path, vfs="failing-disk")
        put(store, a_task())
        disk.failing, disk.code = "write", code
        with pytest.raises(StoreUnavailable):
            put(store, a_task("t2", seq=2))
        disk.failing = None
        assert store.size().tasks == 1
        assert store.get(["t2"]) == {}
        put(store, a_task("t2", seq=2))
        assert store.size().tasks == 2
        store.close()

    def test_a_failed_fsync_of_a_checkpoint_ends_the_store(
        self, disk: Disk, sqlite_path: Path
    ) -> None:
        store = SqliteTaskStore(sqlite_path, vfs="failing-disk")
        put(store, a_task())
        store._wal_pages = store._wal_step
        disk.failing, disk.code = "sync", apsw.SQLITE_IOERR_FSYNC
        with pytest.raises(OSError, match="synced"):
            store._checkpoint()
        disk.failing = None
        with pytest.raises(OSError, match="must exit"), store.transaction():
            pass
        store.close()

    def test_a_checkpoint_that_finds_the_disk_full_waits(
        self, disk: Disk, sqlite_path: Path
    ) -> None:
        store = SqliteTaskStore(sqlite_path, vfs="failing-disk")
        put(store, a_task())
        store._wal_pages = store._wal_step
        disk.failing, disk.code = "write", apsw.SQLITE_IOERR_WRITE
        store._checkpoint()
        disk.failing = None
        put(store, a_task("t2", seq=2))
        assert store.size().tasks == 2
        store.close()


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteTaskStore]:
    """Some thousand tasks of every kind, so that a plan is what it is with many."""
    store = SqliteTaskStore(tmp_path_factory.mktemp("crowd") / "queue.db")
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


QUERIES: dict[str, tuple[str, Any]] = {
    "heads": (sqlite._HEADS, [1, 64]),
    "due": (sqlite._DUE, [T0, 64]),
    "next_wake": (sqlite._NEXT_WAKE, []),
    "ordering_line": (sqlite._ORDERING_LINE, ["o1", 2]),
    "ordering_out": (sqlite._ORDERING_OUT, ["o1"]),
    "held": (sqlite._HELD, ["c", 9]),
    "old keys": (sqlite._OLD_KEYS, [0.0, "", "", T0, 9]),
    "leased": (sqlite._LEASED, []),
    "dependents": (sqlite._DEPENDENTS, ["t2", 9]),
    "waited_for": (sqlite._WAITED_FOR, ['["t1"]']),
    "prunable": (sqlite._PRUNABLE, [T0, 9]),
    "by_id": (sqlite._BY_ID, ['["t1"]']),
    "by_seq": (sqlite._BY_SEQ, ["[1]"]),
    "insert": (rows.INSERT_TASK, [None] * len(rows.SPEC + rows.PLAIN + rows.INDEXED)),
    "update": (rows.update_sql(("state",)), [None] * (len(rows.PLAIN) + 3)),
    "ended of batch": (sqlite._ENDED_OF_BATCH, ["b1", 0, 9]),
    "open of batch": (sqlite._OPEN_OF_BATCH, ["b1", "b1"]),
    "open of ids": (sqlite._OPEN_OF_IDS, ['["t1"]']),
    "facts": (sqlite._FACTS, [0, 9]),
    "facts of task": (sqlite._FACTS_OF_TASK, ["t1", 0, 9]),
    "audit": (sqlite._AUDIT, [9, 9]),
    "audit_after": (sqlite._AUDIT_AFTER, [9, 9]),
    "audit_tail": (sqlite._AUDIT_TAIL, []),
    "audit_state": (sqlite._AUDIT_STATE, []),
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


class TestPlans:
    @pytest.mark.parametrize("analyzed", [False, True])
    @pytest.mark.parametrize("name", QUERIES)
    def test_nothing_is_scanned_and_nothing_is_sorted(
        self, crowded: SqliteTaskStore, name: str, analyzed: bool
    ) -> None:
        if analyzed:
            crowded._run("ANALYZE")
        sql, values = QUERIES[name]
        plan = [str(row[3]) for row in crowded._run(f"EXPLAIN QUERY PLAN {sql}", values)]
        # Reading a covering partial index whole is what `leased` and `next_wake` are about, and
        # p, j and json_each are lists of what was picked already.
        harmless = ("SCAN p", "SCAN j", "SCAN json_each", "SCAN CONSTANT ROW")
        wrong = [
            line
            for line in plan
            if "TEMP B-TREE" in line
            or (
                line.startswith("SCAN")
                and not line.startswith(harmless)
                and "USING COVERING INDEX task_leased" not in line
                and "USING COVERING INDEX task_wake" not in line
                and "audit" not in name
            )
        ]
        assert wrong == [], plan

    def test_listed_ids_and_merged_states_sort_numbers_only(self, crowded: SqliteTaskStore) -> None:
        """These two sort, but only accept sequences, and no more than were asked for."""
        for where in (
            TaskFilter(ids=("t1", "t2")),
            TaskFilter(states=(TaskState.RUNNING, TaskState.QUEUED)),
        ):
            sql, values = page_query(where, before_seq=None, limit=9)
            plan = [str(row[3]) for row in crowded._run(f"EXPLAIN QUERY PLAN {sql}", values)]
            assert not [line for line in plan if line.startswith("SCAN task")], plan
            assert any("USING" in line and "INDEX" in line for line in plan), plan

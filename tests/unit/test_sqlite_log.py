"""What tells a log that was damaged from one whose end was torn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hcna_ray.core.errors import StoreDamaged
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from hcna_ray.store.sqlite_log import read_index
from tests.support.builders import a_task

STEP = 24 + 4096


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The files of a store of nine commits whose process was killed."""
    work = tmp_path / "work"
    work.mkdir()
    store = SqliteTaskStore(work / "queue.db")
    for seq in range(1, 10):
        with store.transaction():
            store.insert([a_task(f"t{seq}", seq=seq, payload=bytes(5000))])
    shutil.copytree(work, tmp_path / "killed")
    store.close()
    return tmp_path / "killed" / "queue.db"


def log_of(database: Path) -> Path:
    return Path(f"{database}-wal")


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 1

    return change


def tasks_in(database: Path) -> int:
    store = SqliteTaskStore(database)
    try:
        return store.size().tasks
    finally:
        store.close()


def test_a_killed_store_is_opened(killed: Path) -> None:
    index = read_index(killed)
    assert index is not None
    assert index.frames > 9
    assert tasks_in(killed) == 9


@pytest.mark.parametrize("at", [0, 17, 32, 32 + 100, 32 + 3 * STEP + 20, 32 + 9 * STEP + 2000])
@pytest.mark.parametrize("index", [True, False])
def test_a_flipped_bit_is_noticed_and_nothing_is_changed(
    killed: Path, at: int, index: bool
) -> None:
    if not index:
        Path(f"{killed}-shm").unlink()
    edit(log_of(killed), flip(at))
    before = log_of(killed).read_bytes(), killed.read_bytes()
    with pytest.raises(StoreDamaged, match="hcna restore"):
        SqliteTaskStore(killed)
    assert (log_of(killed).read_bytes(), killed.read_bytes()) == before


@pytest.mark.parametrize("size", [0, 10, 32, 40, 32 + 5 * STEP])
def test_a_log_that_was_cut_is_noticed_by_its_index(killed: Path, size: int) -> None:
    edit(log_of(killed), lambda data: data.__delitem__(slice(size, None)))
    with pytest.raises(StoreDamaged):
        SqliteTaskStore(killed)


def test_a_missing_log_is_noticed_by_its_index(killed: Path) -> None:
    log_of(killed).unlink()
    with pytest.raises(StoreDamaged, match="missing"):
        SqliteTaskStore(killed)


@pytest.mark.parametrize("index", [None, b"", bytes(32768), b"\x07" * 32768])
def test_a_torn_end_is_no_damage(killed: Path, index: bytes | None) -> None:
    """After a loss of power the last transaction may be half there, and the index anything."""
    shm = Path(f"{killed}-shm")
    if index is None:
        shm.unlink()
    else:
        shm.write_bytes(index)
    edit(log_of(killed), lambda data: data.extend(b"\xff" * 700))
    assert tasks_in(killed) == 9


def test_a_database_with_a_broken_page_is_refused(killed: Path) -> None:
    assert tasks_in(killed) == 9
    edit(killed, lambda data: data.__setitem__(slice(8192, 12288), bytes(4096)))
    with pytest.raises(StoreDamaged):
        SqliteTaskStore(killed)


def test_a_reader_says_that_it_is_damaged(killed: Path) -> None:
    assert tasks_in(killed) == 9
    edit(killed, lambda data: data.__setitem__(slice(0, 100), bytes(100)))
    with pytest.raises(StoreDamaged):
        SqliteTaskReader(killed)

"""The spool: nothing leaves it but on purpose, and it has a bound."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hcna_ray.observability.spool import Spool

KIB = 1024


class Times:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def spool(tmp_path: Path, times: Times) -> Spool:
    return Spool(tmp_path / "traces", 64 * KIB, now=times, elapsed=times)


def test_what_was_put_comes_out_oldest_first(spool: Spool, times: Times) -> None:
    for text in (b"one", b"two", b"three"):
        spool.put(text)
        times.at += 1
    spool.put(b"")

    files = spool.oldest(1 << 20)

    assert [path.read_bytes() for path in files] == [b"one", b"two", b"three"]
    assert spool.read(files) == b"onetwothree"
    assert files[0].stat().st_mode & 0o777 == 0o600
    assert spool.folder.stat().st_mode & 0o777 == 0o700


def test_an_empty_or_absent_folder_holds_nothing(spool: Spool) -> None:
    assert spool.oldest(1 << 20) == []
    assert spool.prune() == 0


def test_one_request_carries_so_much_but_at_least_one_file(spool: Spool, times: Times) -> None:
    for _ in range(3):
        spool.put(bytes(6000))
        times.at += 1

    assert len(spool.oldest(100)) == 1
    assert len(spool.oldest(12_000)) == 2


def test_beyond_the_bound_the_oldest_go_and_the_log_says_so_once_a_minute(
    spool: Spool, times: Times, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="hcna_ray"):
        for number in range(100):
            spool.put(bytes([number]) * 5000)  # Two blocks of 4 KiB each.
            times.at += 0.1
        spool.prune()

    kept = [path.read_bytes()[0] for path in spool.oldest(1 << 20)]
    assert kept == list(range(92, 100))
    assert [one.action for one in caplog.records] == ["traces.dropped"]  # type: ignore[attr-defined]


def test_no_writer_goes_far_beyond_the_bound_between_two_looks(spool: Spool) -> None:
    for number in range(50):  # All at one instant: no look is due.
        spool.put(bytes([number]) * 4096)

    assert len(spool.oldest(1 << 20)) <= 16 + 2


def test_small_files_are_put_together_and_nothing_is_lost(spool: Spool, times: Times) -> None:
    for text in (b"one", b"two"):
        spool.put(text)
        times.at += 1
    files = spool.oldest(1 << 20)
    spool.put_together(files, spool.read(files))
    spool.put(b"three")

    assert [path.read_bytes() for path in spool.oldest(1 << 20)] == [b"onetwo", b"three"]
    (first, _) = spool.oldest(1 << 20)
    spool.put_together([first], b"unused")
    assert first.read_bytes() == b"onetwo"


def test_what_another_one_has_removed_is_left_out(spool: Spool) -> None:
    spool.put(b"one")
    files = spool.oldest(1 << 20)
    spool.remove(files)
    spool.remove(files)

    assert spool.read(files) == b""


def test_what_a_dead_writer_left_unnamed_goes_after_a_minute(spool: Spool, times: Times) -> None:
    spool.put(b"one")
    unnamed = spool.folder / "x.tmp"
    unnamed.write_bytes(b"half")
    times.at = unnamed.stat().st_mtime + 59
    spool.prune()
    assert unnamed.exists()
    times.at += 2
    spool.prune()

    assert not unnamed.exists()


def test_a_disk_that_takes_nothing_raises_and_leaves_nothing_half(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.put(b"one")

    def full(_self: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        spool.put(b"two")

    assert len(list(spool.folder.iterdir())) == 1

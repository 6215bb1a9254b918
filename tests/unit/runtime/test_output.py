"""What handlers print: kept per attempt, cut at a limit, bounded in all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.models import Token
from hcna_ray.runtime import output as output_module
from hcna_ray.runtime.output import (
    CUT_MARK,
    OutputSettings,
    OutputTap,
    output_file,
    prune_outputs,
)

LIMIT = 100_000
MARK = (CUT_MARK % LIMIT).encode()


class Bench:
    """A tap at two descriptors of its own, and what was kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "outputs"
        self.settings = OutputSettings(
            folder=self.folder, bytes_max=LIMIT, total_bytes_max=10 * LIMIT
        )
        self.out = os.open(os.devnull, os.O_WRONLY)
        self.err = os.open(os.devnull, os.O_WRONLY)
        self.tap = OutputTap(self.settings, (self.out, self.err))

    def print(self, data: bytes, descriptor: int | None = None) -> None:
        while data:
            data = data[os.write(self.out if descriptor is None else descriptor, data) :]

    def attempt(self, task_id: str, data: bytes = b"") -> None:
        self.tap.begin(task_id, Token(1, 1))
        self.print(data)
        self.tap.end()

    def child(self, code: str) -> subprocess.Popen[bytes]:
        """Start a process that inherits what a handler's children inherit."""
        return subprocess.Popen([sys.executable, "-c", code], stdout=self.out, stderr=self.err)

    def kept(self, task_id: str) -> bytes | None:
        path = output_file(self.folder, task_id, Token(1, 1))
        return path.read_bytes() if path.exists() else None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.tap.close()
    os.close(bench.out)
    os.close(bench.err)


def test_each_attempt_has_a_file_of_what_it_printed(bench: Bench) -> None:
    bench.attempt("t1", b"one\n")
    bench.tap.begin("t2", Token(1, 1))
    bench.print(b"out\n")
    bench.print(b"err\n", bench.err)
    bench.tap.end()
    bench.attempt("t3")

    assert (bench.kept("t1"), bench.kept("t2")) == (b"one\n", b"out\nerr\n")
    assert bench.kept("t3") is None


def test_what_is_printed_between_attempts_goes_nowhere(bench: Bench) -> None:
    bench.print(b"before\n")
    bench.attempt("t1", b"one\n")
    bench.print(b"between\n")
    bench.attempt("t2", b"two\n")

    assert (bench.kept("t1"), bench.kept("t2")) == (b"one\n", b"two\n")


@pytest.mark.parametrize("chunk", [b"x", b"line\n" * 20_000, b"y" * (1 << 20)])
def test_the_limit_holds_and_the_cut_is_marked(bench: Bench, chunk: bytes) -> None:
    bench.attempt("t1", chunk * (-(-2 * LIMIT // len(chunk)) if len(chunk) > 1 else LIMIT * 2))

    kept = bench.kept("t1")
    assert kept is not None
    assert len(kept) == LIMIT
    assert kept.endswith(MARK)
    bench.attempt("t2", b"two\n")  # And the next one starts anew.
    assert bench.kept("t2") == b"two\n"


def test_what_just_fits_is_not_cut(bench: Bench) -> None:
    bench.attempt("t1", b"x" * (LIMIT - len(MARK)))

    assert bench.kept("t1") == b"x" * (LIMIT - len(MARK))


def test_a_child_is_held_to_the_same_limit(bench: Bench) -> None:
    bench.tap.begin("t1", Token(1, 1))
    child = bench.child("import sys\nfor _ in range(20): sys.stdout.write('z' * 65536)")
    assert child.wait(60) == 0  # It was not blocked: what is too much is read all the same.
    bench.tap.end()

    kept = bench.kept("t1")
    assert kept is not None
    assert (len(kept), kept.endswith(MARK)) == (LIMIT, True)


def test_what_a_process_left_behind_prints_reaches_no_other_task(bench: Bench) -> None:
    code = "import sys, time\nsys.stdin.readline()\nwhile True: print('late', flush=True)"
    bench.tap.begin("t1", Token(1, 1))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=bench.out, stderr=bench.err
    )
    bench.tap.end()
    bench.tap.begin("t2", Token(1, 1))
    assert child.stdin is not None
    child.stdin.write(b"go on\n")
    child.stdin.close()
    assert child.wait(60) != 0  # It wrote into nothing.
    bench.tap.end()

    assert (bench.kept("t1"), bench.kept("t2")) == (None, None)


def test_a_flood_that_never_ends_does_not_hold_up_the_end(bench: Bench) -> None:
    bench.tap.begin("t1", Token(1, 1))
    child = bench.child("while True: print('x' * 1000)")
    while bench.kept("t1") is None or not (bench.kept("t1") or b"").endswith(MARK):
        os.sched_yield()
    bench.tap.end()

    assert child.wait(60) != 0


def test_a_handler_that_prints_much_at_once_is_not_blocked(bench: Bench) -> None:
    """As one that keeps the interpreter to itself meanwhile, and so keeps it from the reader."""
    with bench.tap._lock:
        bench.print(b"x" * (1 << 20))


def test_a_disk_that_takes_nothing_ends_the_output_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(bench.tap, "_write", full)
    bench.attempt("t1", b"one\n" * 100_000)
    monkeypatch.undo()
    bench.attempt("t2", b"two\n")

    assert (bench.kept("t1"), bench.kept("t2")) == (b"", b"two\n")


def test_streams_of_any_kind_do_not_break_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def flush(self) -> None:
            raise RuntimeError("no")

    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", None)
    bench.attempt("t1", b"one\n")

    assert bench.kept("t1") == b"one\n"


def a_file(folder: Path, name: str, size: int, written_at: float) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"x" * size)
    os.utime(path, (written_at, written_at))
    return path


def test_outputs_are_pruned_by_age_size_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outputs"
    settings = OutputSettings(folder=folder, total_bytes_max=250)
    now = 1e9
    assert prune_outputs(settings, now) == 0
    ages = [output_module.KEPT_S + 1, 50.0, 40.0, 30.0, 20.0]
    files = [a_file(folder, f"t{n}.1.1.log", 100, now - age) for n, age in enumerate(ages)]

    assert prune_outputs(settings, now) == 3
    assert [path.exists() for path in files] == [False, False, False, True, True]
    monkeypatch.setattr(output_module, "FILES_MAX", 1)
    assert prune_outputs(settings, now) == 1
    assert [path.exists() for path in files] == [False, False, False, False, True]


@pytest.mark.parametrize(("name", "most"), [("PRUNE_FILES", 5), ("PRUNE_BYTES", 10_000)])
def test_whoever_prints_much_looks_after_the_directory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setattr(output_module, name, most)
    monkeypatch.setattr(output_module, "FILES_MAX", 3)
    for number in range(20):
        bench.attempt(f"t{number}", b"x" * 4000)

    assert len(list(bench.folder.iterdir())) <= 8


def test_a_directory_that_cannot_be_pruned_is_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: Any) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(output_module, "PRUNE_FILES", 1)
    monkeypatch.setattr(output_module, "prune_outputs", broken)
    bench.attempt("t1", b"one\n")

    assert "output.prune_failed" in {getattr(one, "action", "") for one in caplog.records}

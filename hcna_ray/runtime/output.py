"""What handlers print: one file for each attempt, cut at a limit. No Ray here.

An executor's standard output and error are a pipe that the executor itself reads, in a thread. What
arrives while an attempt runs goes to that attempt's file. Whatever fills the pipe (the handler, a
thread of it, a child that inherited it, with or without ends of lines) is held to the same limit;
beyond it, the rest is read slowly and thrown away, so that a flood costs little but its own time.

A pipe serves one attempt after the other as long as nobody else can hold it. After an attempt that
printed or left a process behind it is closed, and the next attempt has a new one: what was left
behind writes into nothing, and never into the output of another task.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hcna_ray.config import Settings
from hcna_ray.core.errors import NotFound
from hcna_ray.core.models import Token

log = logging.getLogger(__name__)

#: The last line of an output that was cut.
CUT_MARK = "\n[output cut here: the limit of %d bytes is reached]\n"
#: Read at once.
CHUNK_BYTES = 64 << 10
#: What a pipe holds, where the kernel lets it: a handler that holds the interpreter while it prints
#: keeps the reader from reading.
PIPE_BYTES = 1 << 20
#: Pause after each chunk that is thrown away.
SPARE_S = 0.005
#: An executor looks after the directory each time it has written this much, or as many files.
PRUNE_BYTES = 16 << 20
PRUNE_FILES = 1000
#: Files kept, whatever their size.
FILES_MAX = 20_000
#: How long outputs are kept.
KEPT_S = 7 * 86400.0

#: The most that is read at once.
PIECE_BYTES = 256 << 10

_SUFFIX = ".log"
_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,63}\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSettings:
    """Where outputs go, and their limits."""

    folder: Path
    #: Of one attempt, the mark included.
    bytes_max: int = 10 << 20
    #: Of all that are kept here.
    total_bytes_max: int = 1 << 30


def outputs_of(settings: Settings, worker: str) -> Path:
    """Return the directory with what attempts on a worker have printed."""
    return settings.home / "outputs" / worker


def output_file(folder: Path, task_id: str, token: Token) -> Path:
    """Return where an attempt's output is, if it printed anything."""
    return folder / f"{task_id}.{token}{_SUFFIX}"


def read_output(folder: Path, task_id: str, token: Token, offset: int, size: int) -> bytes | None:
    """Return a piece of an attempt's output; ``None`` when there is none, or none any more.

    Raises:
        NotFound: it is no task's id: nothing else in this machine is read by it.
        OSError: the disk fails.
    """
    if not _TASK_ID.match(task_id):
        raise NotFound("task", task_id[:100])
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(output_file(folder, task_id, Token(*token)), flags)
    except FileNotFoundError:
        return None
    try:
        return os.pread(file, min(size, PIECE_BYTES), offset)
    finally:
        os.close(file)


def prune_outputs(settings: OutputSettings, now: float) -> int:
    """Delete what is too old, and the oldest of what is too much; return how many files went."""
    found: list[tuple[float, int, str]] = []
    try:
        with os.scandir(settings.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    found.append((stat.st_mtime, stat.st_size, entry.path))
    except FileNotFoundError:
        return 0
    total, left, removed = sum(size for _, size, _ in found), len(found), 0
    for written_at, size, path in sorted(found):
        fits = total <= settings.total_bytes_max and left <= FILES_MAX
        if fits and now - written_at <= KEPT_S:
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            removed += 1
        total, left = total - size, left - 1
    return removed


class OutputTap:
    """Stands at some descriptors of this process, usually 1 and 2, from its making to its end."""

    def __init__(self, settings: OutputSettings, descriptors: Sequence[int] = (1, 2)) -> None:
        """Take the descriptors over; what is printed between attempts goes nowhere.

        Raises:
            OSError: there is no pipe to be had.
        """
        self._settings, self._descriptors = settings, tuple(descriptors)
        self._mark = (CUT_MARK % settings.bytes_max).encode()
        self._lock = threading.Lock()
        settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        #: Whose output comes now.
        self._of: tuple[str, Token] | None = None
        self._file = self._source = -1
        self._poll = select.poll()
        #: Bytes of the current attempt that came, and whether no more of them are kept.
        self._came = 0
        self._cut = False
        self._bytes_since, self._files_since = 0, 0
        self._closed = False
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for stream in (sys.stdout, sys.stderr):
            # A process that is killed must not take with it what was printed a while ago.
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        self._renew()
        self._reader = threading.Thread(target=self._read_on, name="hcna-output", daemon=True)
        self._reader.start()

    # -- main thread -----------------------------------------------------------------------------

    def begin(self, task_id: str, token: Token) -> None:
        """From here on, what is printed is this attempt's."""
        with self._lock:
            self._drain()
            self._of = (task_id, token)
            self._came, self._cut = 0, False

    def end(self) -> None:
        """What was printed up to here is the attempt's; the rest is nobody's. Never raises."""
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            # A handler may have put anything in their places.
            with contextlib.suppress(Exception):
                stream.flush()  # type: ignore[union-attr]
        with self._lock:
            self._drain()
            self._of = None
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            if self._came or _has_children():
                with contextlib.suppress(OSError):
                    self._renew()
            self._came = 0
        self._look_after()

    def close(self) -> None:
        """Stop reading. The descriptors stay as they are."""
        with self._lock:
            self._closed = True
        os.write(self._wake, b"x")
        self._reader.join(timeout=5.0)
        for descriptor in (self._source, self._woken, self._wake):
            os.close(descriptor)

    def _look_after(self) -> None:
        if self._bytes_since < PRUNE_BYTES and self._files_since < PRUNE_FILES:
            return
        self._bytes_since = self._files_since = 0
        try:
            prune_outputs(self._settings, time.time())
        except OSError as error:
            log.warning(
                "outputs cannot be pruned",
                extra={"action": "output.prune_failed", "error": str(error)},
            )

    # -- both threads, lock held -----------------------------------------------------------------

    def _renew(self) -> None:
        source, target = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(source, False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        for descriptor in self._descriptors:
            os.dup2(target, descriptor)
        os.close(target)
        if self._source >= 0:
            os.close(self._source)
        self._source = source
        self._poll = select.poll()
        self._poll.register(source, select.POLLIN)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def _drain(self) -> None:
        """Take what is in the pipe now; who goes on filling it is not waited for."""
        if not self._poll.poll(0):
            return
        left = 2 * PIPE_BYTES
        while left > 0 and (size := self._read_some()):
            left -= size

    def _read_some(self) -> int:
        try:
            data = os.read(self._source, CHUNK_BYTES)
        except BlockingIOError:
            return 0
        if self._of is not None:
            self._keep(data)
        return len(data)

    def _keep(self, data: bytes) -> None:
        before, self._came = self._came, self._came + len(data)
        if self._cut:
            return
        room = self._settings.bytes_max - len(self._mark) - before
        try:
            if self._file < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                assert self._of is not None
                path = output_file(self._settings.folder, *self._of)
                self._file = os.open(path, flags, 0o600)
                self._files_since += 1
            if len(data) <= room:
                self._write(data)
                return
            self._cut = True
            self._write(data[: max(room, 0)] + self._mark)
        except OSError as error:
            # A full disk: the handler is none the wiser, its output ends here.
            self._cut = True
            log.warning(
                "an attempt's output cannot be kept",
                extra={"action": "output.failed", "error": str(error)},
            )
        self._spare_ourselves()

    def _write(self, data: bytes) -> None:
        self._bytes_since += len(data)
        while data:
            data = data[os.write(self._file, data) :]

    def _spare_ourselves(self) -> None:
        """What this process itself prints from now on needs no reader; children have their copy."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            for descriptor in self._descriptors:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)

    # -- the reader ------------------------------------------------------------------------------

    def _read_on(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                source = self._source
            ready = select.poll()
            ready.register(source, select.POLLIN)
            ready.register(self._woken, select.POLLIN)
            told = dict(ready.poll())
            with self._lock:
                if self._woken in told:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                    continue  # There is another pipe, or an end.
                if source != self._source or self._closed:
                    continue
                size, thrown = self._read_some(), self._cut or self._of is None
            if thrown or not size:
                # Nothing is gained by speed; without writers the pipe is at its end until the next.
                pause = select.poll()
                pause.register(self._woken, select.POLLIN)
                pause.poll(SPARE_S * 1000)


def _has_children() -> bool:
    """Whether this process has children, running or ended; theirs count once they are orphans."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True

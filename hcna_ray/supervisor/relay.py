"""Copies lines of log files to a stream, from now on, without ever waiting for the stream.

This is how ``journalctl -u hcna-m1`` comes to show what the processes of this machine log to files.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

#: Lines that wait for the stream; more are dropped and counted.
LINES_MAX = 2000
#: A line without an end is given up at this length.
LINE_BYTES_MAX = 256 * 1024
#: Read from one file in one go.
_READ_BYTES = 256 * 1024
_POLL_S = 0.25


class Tail:
    """The lines that are added to one file, also when it is rotated, cut, or not there yet."""

    def __init__(self, path: Path) -> None:
        """Begin at the end of the file; at the beginning of one that comes later."""
        self._path = path
        self._stream: BinaryIO | None = None
        self._rest = b""
        self._open()
        if self._stream is not None:
            self._stream.seek(0, os.SEEK_END)

    def lines(self) -> list[bytes]:
        """Return the whole lines since the last call, some 256 KiB of them at most."""
        if self._stream is None:
            self._open()
        if self._stream is None:
            return []
        lines = self._read(self._stream)
        if lines:
            return lines
        # At the end. Only now a successor counts: the old file has been read to its end.
        if self._was_replaced(self._stream):
            self.close()
            self._open()
            if self._stream is not None:
                lines = self._read(self._stream)
        return lines

    def close(self) -> None:
        """Give the file back."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._rest = None, b""

    def _open(self) -> None:
        try:
            self._stream = self._path.open("rb", buffering=0)
        except OSError:
            self._stream = None

    def _read(self, stream: BinaryIO) -> list[bytes]:
        if os.fstat(stream.fileno()).st_size < stream.tell():
            stream.seek(0)
            self._rest = b""
        raw = self._rest + stream.read(_READ_BYTES)
        *lines, self._rest = raw.split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            self._rest = b""
        return [line for line in lines if line]

    def _was_replaced(self, stream: BinaryIO) -> bool:
        try:
            found = self._path.stat()
        except OSError:
            return False  # Being rotated: the successor comes.
        mine = os.fstat(stream.fileno())
        return (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino)


class Relay:
    """Copies lines in threads of its own. A stream that takes none costs lines, never time."""

    def __init__(
        self, paths: Iterable[Path], target: BinaryIO, *, lines_max: int = LINES_MAX
    ) -> None:
        """Begin at the ends of the files; nothing is copied before `start`."""
        self._tails = [Tail(path) for path in paths]
        self._target, self._lines_max = target, lines_max
        self._waiting: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._stopping = threading.Event()
        self._broken = False
        self._threads = [
            threading.Thread(target=work, name=f"relay-{work.__name__}", daemon=True)
            for work in (self._read, self._write)
        ]

    def start(self) -> None:
        """Copy until `stop`."""
        for thread in self._threads:
            thread.start()

    def stop(self, *, timeout_s: float = 2.0) -> None:
        """Copy what has been logged until now, as far as the stream takes it in time."""
        self._stopping.set()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))

    def take(self, line: bytes) -> None:
        """Queue a line, or count it as dropped if the stream has not taken those before it."""
        with self._changed:
            if len(self._waiting) >= self._lines_max:
                self._dropped += 1
                return
            if self._dropped:
                self._waiting.append(_note(self._dropped))
                self._dropped = 0
            self._waiting.append(line)
            self._changed.notify()

    def next_line(self) -> bytes | None:
        """Return the next line for the stream, None at the end; a note where some are missing."""
        with self._changed:
            while not self._waiting:
                if self._dropped:
                    count, self._dropped = self._dropped, 0
                    return _note(count)
                if self._stopping.is_set() and not self._threads[0].is_alive():
                    return None
                self._changed.wait(_POLL_S)
            return self._waiting.popleft()

    def _read(self) -> None:
        while True:
            last = self._stopping.is_set()
            busy = False
            for tail in self._tails:
                for line in tail.lines():
                    busy = True
                    self.take(line)
            if last and not busy:
                break
            if not busy:
                self._stopping.wait(_POLL_S)
        for tail in self._tails:
            tail.close()

    def _write(self) -> None:
        while (line := self.next_line()) is not None:
            if self._broken:
                continue
            try:
                self._target.write(line + b"\n")
                self._target.flush()
            except (OSError, ValueError):
                self._broken = True  # Nobody reads any more. Our work goes on.


def _note(count: int) -> bytes:
    return json.dumps(
        {
            "level": "warning",
            "logger": __name__,
            "message": f"{count} lines were not shown: nobody took them in time",
            "action": "relay.dropped",
            "count": count,
        }
    ).encode()

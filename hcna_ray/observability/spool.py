"""Spans on their way out: files of one machine, until the collector has taken them.

Every process of the machine writes, one ships. A file holds one ``ExportTraceServiceRequest`` of
OTLP as protobuf. Such messages, one behind the other, are one message again: so files are put
together without being understood, here and on the wire.

The bound is in bytes on disk. Beyond it the oldest files go: what has just happened is worth more
to whoever looks than what happened before the collector went away.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_SUFFIX = ".otlp"
#: What a file takes on disk at least.
_BLOCK_BYTES = 4096
#: Pause between two looks of one writer at what all of them have written, and the share of the
#: bound that it may write in between.
_LOOK_S = 5.0
_LOOK_SHARE = 16
#: A file that nobody has given its name for this long is of a process that died meanwhile.
_UNNAMED_S = 60.0
#: The log says that spans are thrown away once in this time.
_SAY_S = 60.0


class Spool:
    """A folder of spans. Its processes share nothing but the folder."""

    def __init__(
        self,
        folder: Path,
        bytes_max: int,
        *,
        now: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        """Remember the folder; it is made when something is put into it.

        Args:
            folder: Used for nothing else.
            bytes_max: What its files may take on disk.
            now: Seconds since the epoch: files are shipped in this order.
            elapsed: Seconds that never step.
        """
        self.folder, self.bytes_max = folder, bytes_max
        self._now, self._elapsed = now, elapsed
        self._numbers = itertools.count()
        self._look_at = 0.0
        self._written = 0
        self._say_at = 0.0

    def put(self, batch: bytes) -> None:
        """Keep spans. They are not synced: a machine that loses its power loses the last ones.

        Raises:
            OSError: the disk refused.
        """
        if not batch:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = f"{time_ns(self._now()):020d}-{os.getpid()}-{next(self._numbers)}"
        self._write(self.folder / f"{number}{_SUFFIX}", batch)
        self._written += _on_disk(len(batch))
        late = self._elapsed() >= self._look_at
        if late or self._written > self.bytes_max // _LOOK_SHARE:
            self.prune()

    def _write(self, path: Path, batch: bytes) -> None:
        unnamed = path.with_suffix(".tmp")
        try:
            unnamed.touch(mode=0o600)
            unnamed.write_bytes(batch)
            unnamed.rename(path)
        except BaseException:
            unnamed.unlink(missing_ok=True)
            raise

    def oldest(self, bytes_max: int) -> list[Path]:
        """Return the oldest files, at least one if there is any, together of this size at most."""
        found: list[Path] = []
        size = 0
        for path, taken in self._files():
            size += taken
            if found and size > bytes_max:
                break
            found.append(path)
        return found

    def read(self, files: Sequence[Path]) -> bytes:
        """Return what files hold, put together; what has gone meanwhile is left out."""
        parts = []
        for path in files:
            try:
                parts.append(path.read_bytes())
            except FileNotFoundError:
                continue
        return b"".join(parts)

    def remove(self, files: Sequence[Path]) -> None:
        """Forget files."""
        for path in files:
            path.unlink(missing_ok=True)

    def put_together(self, files: Sequence[Path], batch: bytes) -> None:
        """Keep as one file what was in many: it takes less of the disk.

        If this is cut off, some spans are there twice; none is lost.
        """
        if len(files) > 1:
            self._write(files[0], batch)
            self.remove(files[1:])

    def prune(self) -> int:
        """Delete the oldest files beyond the bound, and what dead writers left; say how many."""
        self._look_at = self._elapsed() + _LOOK_S
        self._written = 0
        files = self._files()
        total = sum(_on_disk(size) for _, size in files)
        gone = 0
        for path, size in files:
            if total <= self.bytes_max:
                break
            path.unlink(missing_ok=True)
            total -= _on_disk(size)
            gone += 1
        if gone and self._elapsed() >= self._say_at:
            self._say_at = self._elapsed() + _SAY_S
            log.error(
                "the collector has taken no spans for too long: the oldest are thrown away",
                extra={"action": "traces.dropped", "files": gone, "bytes_max": self.bytes_max},
            )
        for unnamed in self.folder.glob("*.tmp"):
            try:
                if self._now() - unnamed.stat().st_mtime > _UNNAMED_S:
                    unnamed.unlink()
            except FileNotFoundError:
                continue
        return gone

    def _files(self) -> list[tuple[Path, int]]:
        """Return every file with its size, the oldest first."""
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name.endswith(_SUFFIX):
                        try:
                            found.append((Path(entry.path), entry.stat().st_size))
                        except FileNotFoundError:
                            continue
        except FileNotFoundError:
            return []
        found.sort(key=lambda one: one[0].name)
        return found


def time_ns(at: float) -> int:
    """Return an instant as OTLP has it: nanoseconds since the epoch."""
    return int(at * 1e9)


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES

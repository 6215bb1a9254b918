"""Whether SQLite's write-ahead log still holds what was once committed.

SQLite takes the first frame whose checksum is wrong for the end of the log: a torn end is normal
after a crash. A bit that flipped in the middle, or a file that was cut, looks the same to it, and
everything committed after that place would be gone without a word. Two things tell the difference:

- A transaction that was written on top of a commit proves that this commit had been there: what
  follows a torn end does not follow a commit.
- The index of the log (``-shm``) outlives a killed process and says how far the log had been
  committed. It is written after the sync, so it never says too much.

The last commit before a loss of power is told of by neither, if that very place is damaged.
The formats are https://www.sqlite.org/fileformat2.html#walformat and
https://www.sqlite.org/walformat.html.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_MAGIC = 0x377F0682
_INDEX = struct.Struct("=IIIBBHII8s8s8s")
_INDEX_VERSION = 3007000


@dataclass(frozen=True, slots=True)
class Index:
    """What the index of a log says."""

    salts: bytes
    #: Frames that are committed.
    frames: int
    #: Frames of these that are in the database already.
    carried: int


def read_index(database: Path) -> Index | None:
    """Return what ``-shm`` says, or ``None`` if it is not there, or not whole.

    Only for a process that has not opened the store: it would lose its locks on the file.
    """
    try:
        with Path(f"{database}-shm").open("rb") as file:
            raw = file.read(2 * _INDEX.size + 4)
    except OSError:
        return None
    if len(raw) < 2 * _INDEX.size + 4 or raw[: _INDEX.size] != raw[_INDEX.size : 2 * _INDEX.size]:
        return None
    version, _, _, ready, _, _, frames, _, _, salts, checksum = _INDEX.unpack_from(raw)
    if version != _INDEX_VERSION or not ready:
        return None
    if struct.pack("=II", *_sum(raw[: _INDEX.size - 8], (0, 0), sys.byteorder)) != checksum:
        return None
    (carried,) = struct.unpack_from("=I", raw, 2 * _INDEX.size)
    return Index(salts, frames, carried)


def lost_commits(database: Path, before: Index | None, recovered: int) -> str | None:
    """Return why a log has lost commits, or ``None`` if nothing says so.

    Args:
        database: The database file.
        before: Its log's index before SQLite looked at the log.
        recovered: Frames that SQLite found to be committed.
    """
    try:
        with Path(f"{database}-wal").open("rb") as file:
            header = file.read(_HEADER_BYTES)
            size = file.seek(0, 2)
            salts = header[16:24]
            if before is not None and _has_less(before, salts, recovered):
                return (
                    f"its log had {before.frames} committed pages, and only {recovered} of them "
                    "can be read"
                )
            if size <= _HEADER_BYTES + _FRAME_HEADER_BYTES:
                return None
            order = _byte_order(header)
            if order is None:
                return "the beginning of its log cannot be read"
            page = int.from_bytes(header[8:12], "big")
            for number, frame, following in _pairs(file, page, size, recovered):
                if _follows(frame, following, salts, order):
                    return f"page {number} of its log was committed and cannot be read"
    except FileNotFoundError:
        if before is not None and before.carried < before.frames:
            return "its log (-wal) is missing"
    return None


def _has_less(before: Index, salts: bytes, recovered: int) -> bool:
    if before.salts == salts:
        return recovered < before.frames
    # An empty log that was not carried over: it was cut. Other salts: it has begun again.
    return not salts and before.carried < before.frames


def _byte_order(header: bytes) -> str | None:
    """Return the byte order of a log's checksums, or ``None`` if its header is damaged."""
    magic = int.from_bytes(header[:4], "big")
    if magic & ~1 != _MAGIC:
        return None
    order = "big" if magic & 1 else "little"
    return order if _sum(header[:24], (0, 0), order) == struct.unpack(">II", header[24:]) else None


def _pairs(
    file: BinaryIO, page: int, size: int, recovered: int
) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield number and header of each frame behind the recovered ones, and the frame after it."""
    step = _FRAME_HEADER_BYTES + page
    last = (size - _HEADER_BYTES) // step
    for number in range(recovered + 1, last):
        file.seek(_HEADER_BYTES + (number - 1) * step)
        frame = file.read(_FRAME_HEADER_BYTES)
        if frame[4:8] == bytes(4):
            continue  # No commit.
        file.seek(_HEADER_BYTES + number * step)
        yield number, frame, file.read(step)


def _follows(frame: bytes, following: bytes, salts: bytes, order: str) -> bool:
    """Return whether a frame was written on top of the one before it."""
    if frame[8:16] != salts or following[8:16] != salts:
        return False
    before: tuple[int, int] = struct.unpack(">II", frame[16:24])
    found = _sum(following[:8] + following[_FRAME_HEADER_BYTES:], before, order)
    return found == struct.unpack(">II", following[16:24])


def _sum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    """Return SQLite's checksum of a multiple of eight bytes."""
    first, second = start
    words = struct.unpack(f"{'>' if order == 'big' else '<'}{len(data) // 4}I", data)
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second

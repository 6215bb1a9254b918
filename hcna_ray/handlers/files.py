"""Reading and writing a worker's files so that a crash, or a hostile neighbour, leaves no mess.

A finished file appears under its name at once and whole, or not at all. Readers and writers never
follow a symbolic link in the last place and never block on a FIFO or a device.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from hcna_ray.durable import sync_dir
from hcna_ray.handlers.errors import Reject

CHUNK_BYTES = 1 << 20
#: How often a writer looks at the free space of its disk.
_SPACE_CHECK_BYTES = 64 << 20


def open_regular(path: Path, *, field: str) -> BinaryIO:
    """Open ``path`` for reading.

    Raises:
        Reject: It does not exist, may not be read, or is no regular file; names ``field``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Reject(f"{field}: {str(path)!r} does not exist on this worker") from None
    except PermissionError:
        raise Reject(f"{field}: {str(path)!r} may not be read by the worker") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise Reject(f"{field}: {str(path)!r} is not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Reject(f"{field}: {str(path)!r} is not a regular file")
    return os.fdopen(descriptor, "rb")


class BoundedWriter:
    """Writes, hashes and counts; refuses to write more than allowed or to fill the disk.

    Invariant: ``size`` and ``sha256`` describe exactly the bytes in the file.
    """

    def __init__(self, file: BinaryIO, *, bytes_max: int, reserve_bytes: int) -> None:
        self._file, self._bytes_max, self._reserve_bytes = file, bytes_max, reserve_bytes
        self._digest = hashlib.sha256()
        self._next_space_check = 0
        self.size = 0

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._digest.hexdigest()

    def reserve(self, size: int) -> None:
        """Refuse now what could not be written later.

        Raises:
            Reject: ``size`` is above the limit of bytes.
            OSError: ``ENOSPC``: the disk has less than ``size`` and the reserve left.
        """
        if size > self._bytes_max:
            raise Reject(
                f"the output would have {size} bytes, more than the {self._bytes_max} allowed; "
                "raise payload.max_output_bytes or the worker's limit"
            )
        disk = os.fstatvfs(self._file.fileno())
        free = disk.f_bavail * disk.f_frsize
        if size > free - self._reserve_bytes:
            raise OSError(errno.ENOSPC, f"{size} bytes wanted, {free} free on the worker's disk")

    def write(self, data: bytes) -> int:
        """Write all of ``data``; raises as `reserve` does."""
        if self.size + len(data) > self._bytes_max:
            self.reserve(self.size + len(data))
        if self.size >= self._next_space_check:
            self.reserve(len(data))
            self._next_space_check = self.size + _SPACE_CHECK_BYTES
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)


class AtomicOutput:
    """A file that appears under its name only when its writing succeeded.

    Use as a context manager: leaving it without an exception syncs and renames, leaving it with one
    removes what was written. What an earlier attempt of the same task left behind after a crash is
    removed first; that attempt, were it still alive, could then no longer rename its file.
    """

    def __init__(
        self,
        path: Path,
        *,
        owner: str,
        fence: str,
        field: str,
        bytes_max: int,
        reserve_bytes: int = 0,
    ) -> None:
        """Prepare to write ``path``; ``owner`` (a task id) and ``fence`` name the partial file."""
        self.path, self._field = path, field
        self._bytes_max, self._reserve_bytes = bytes_max, reserve_bytes
        digest = hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        self._prefix = f".hcna-{digest}-{owner}-"
        self._partial = path.parent / f"{self._prefix}{fence}.partial"

    def __enter__(self) -> Self:
        """Create the partial file beside the final one."""
        if self.path.is_dir() or not self.path.name:
            raise Reject(f"{self._field}: {str(self.path)!r} is a directory; name a file")
        parent = self.path.parent
        if not parent.is_dir():
            raise Reject(
                f"{self._field}: the directory {str(parent)!r} does not exist on this worker; "
                "create it or choose another"
            )
        for entry in os.listdir(parent):
            if entry.startswith(self._prefix):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(parent / entry)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self._partial, flags, 0o666)
        except PermissionError:
            raise Reject(f"{self._field}: the worker may not write to {str(parent)!r}") from None
        self._file: BinaryIO = os.fdopen(descriptor, "wb")
        self.writer = BoundedWriter(
            self._file, bytes_max=self._bytes_max, reserve_bytes=self._reserve_bytes
        )
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Publish the file, or remove it after an exception."""
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self.path)
                sync_dir(self.path.parent)
        finally:
            with contextlib.suppress(OSError):  # After ENOSPC even closing can fail again.
                self._file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._partial)


def chunks(file: BinaryIO, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield what ``file`` holds from here on, at most ``size`` bytes at a time."""
    while chunk := file.read(size):
        yield chunk

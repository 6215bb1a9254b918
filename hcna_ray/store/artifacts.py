"""Content-addressed files: what a client uploads and a handler reads, named by their SHA-256.

    artifacts/ab/ab12...         complete, never changed again
    artifacts/parts/ab12....4096.part   an upload of 4096 bytes; its length is what has arrived

A part is flushed to the disk before it is acknowledged, and so is its name. An upload becomes an
artifact by a rename, after its digest was checked, so a name never stands for wrong or half bytes.
Several threads and processes may use one directory: an upload is locked while a part is added.

Everything here blocks; callers run it on a thread.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hcna_ray import failpoints
from hcna_ray.core.errors import (
    Conflict,
    DiskFull,
    HcnaError,
    Invalid,
    NotFound,
    Overloaded,
    StoreUnavailable,
)
from hcna_ray.durable import sync_dir

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_PART = re.compile(r"([0-9a-f]{64})\.([0-9]{1,18})\.part\Z")
_CHUNK = 1024 * 1024
#: Seconds after which a full disk is worth another try.
DISK_RETRY_S = 30


class ArtifactTooLarge(HcnaError):
    """An artifact, or one part of it, has more bytes than are allowed."""

    code = "too_large"

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(what, size, limit)
        self.what, self.size, self.limit = what, size, limit

    def __str__(self) -> str:
        return f"{self.what} has {self.size} bytes, at most {self.limit} are allowed"


class OffsetMismatch(Conflict):
    """A part does not begin where the upload stands. ``received`` is where it does."""

    code = "offset_mismatch"

    def __init__(self, sha256: str, offset: int, received: int) -> None:
        super().__init__(sha256, offset, received)
        self.sha256, self.offset, self.received = sha256, offset, received

    def __str__(self) -> str:
        return f"the part begins at byte {self.offset}, but {self.received} bytes are here"


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """Bytes that are here."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """Bytes on their way: ``received`` of ``size``."""

    sha256: str
    size: int
    received: int


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn "no space" and "over quota" into `DiskFull`, a failing disk into `StoreUnavailable`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the disk of the artifacts is full", DISK_RETRY_S) from error
        if error.errno in (errno.EIO, errno.EROFS):
            text = f"the disk of the artifacts fails: {os.strerror(error.errno)}"
            raise StoreUnavailable(text, DISK_RETRY_S) from error
        raise


class ArtifactStore:
    """Files below one directory. Invariant: a file under its digest holds exactly these bytes."""

    def __init__(
        self,
        root: Path,
        *,
        artifact_bytes_max: int,
        part_bytes_max: int,
        uploads_max: int,
        upload_idle_s: float,
        disk_free_bytes_min: int,
        now: Callable[[], float],
        disk_free: Callable[[Path], int] | None = None,
    ) -> None:
        """Make the directories and sweep stale uploads.

        Args:
            root: Directory; made with mode 0700.
            artifact_bytes_max: Size of one artifact.
            part_bytes_max: Size of one part, or of an artifact sent whole.
            uploads_max: Uploads begun and not complete.
            upload_idle_s: An upload without a new part for this long is thrown away.
            disk_free_bytes_min: Writes are refused when they would leave less than this.
            now: Wall clock, seconds since the epoch.
            disk_free: Free bytes where a path lies; the machine's by default.
        """
        self._root = root
        self._parts = root / "parts"
        self._artifact_bytes_max = artifact_bytes_max
        self._part_bytes_max = part_bytes_max
        self._uploads_max = uploads_max
        self._upload_idle_s = upload_idle_s
        self._disk_free_bytes_min = disk_free_bytes_min
        self._now = now
        self._disk_free = disk_free or (lambda path: shutil.disk_usage(path).free)
        #: Digests of uploads as far as they were seen here, so that the end need not read it all.
        self._digests: OrderedDict[str, tuple[int, hashlib._Hash]] = OrderedDict()
        self._lock = threading.Lock()
        self._parts.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (root.parent, root):  # Else they may be gone after a loss of power.
            sync_dir(folder)
        self.sweep()

    def path(self, sha256: str) -> Path:
        """Return the file of a complete artifact.

        Raises:
            NotFound: it is not here.
        """
        path = self._path(sha256)
        if path is None or not path.is_file():
            raise NotFound("artifact", sha256[:64])
        return path

    @_disk_errors()
    def find(self, sha256: str) -> Artifact:
        """Return a complete artifact. Raises `NotFound`."""
        return Artifact(sha256=sha256.lower(), size=self.path(sha256).stat().st_size)

    @_disk_errors()
    def open(self, sha256: str) -> BinaryIO:
        """Open a complete artifact for reading. Raises `NotFound`."""
        return self.path(sha256).open("rb")

    @_disk_errors()
    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset``. Raises `NotFound`."""
        with self.open(sha256) as stream:
            stream.seek(offset)
            return stream.read(length)

    @_disk_errors()
    def put(self, data: bytes, sha256: str | None = None) -> Artifact:
        """Store a whole artifact.

        Args:
            data: At most ``part_bytes_max`` bytes.
            sha256: What the digest should be, if the caller knows it.

        Raises:
            ArtifactTooLarge: it must be sent in parts.
            Invalid: ``digest_mismatch``.
            DiskFull: too little space.
            StoreUnavailable: the disk fails.
        """
        if len(data) > self._part_bytes_max:
            raise ArtifactTooLarge("the artifact", len(data), self._part_bytes_max)
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != _digest_name(sha256):
            raise _mismatch(sha256, found)
        target = self._target(found)
        if target.is_file():
            self._settle(target)
        else:
            self._check_space(len(data))
            with self._temporary() as (stream, temporary):
                _write(stream, data)
                self._publish(temporary, target)
        return Artifact(sha256=found, size=len(data))

    @_disk_errors()
    def put_file(self, source: Path) -> Artifact:
        """Store a copy of a local file of any allowed size. Raises as `put` does."""
        size = source.stat().st_size
        if size > self._artifact_bytes_max:
            raise ArtifactTooLarge("the artifact", size, self._artifact_bytes_max)
        self._check_space(size)
        digest, copied = hashlib.sha256(), 0
        with source.open("rb") as original, self._temporary() as (stream, temporary):
            while chunk := original.read(_CHUNK):
                copied += len(chunk)
                if copied > self._artifact_bytes_max:
                    raise ArtifactTooLarge("the artifact", copied, self._artifact_bytes_max)
                digest.update(chunk)
                _write(stream, chunk, flush=False)
            _write(stream, b"")
            found = digest.hexdigest()
            target = self._target(found)
            if target.is_file():
                self._settle(target)
            else:
                self._publish(temporary, target)
        return Artifact(sha256=found, size=copied)

    @_disk_errors()
    def progress(self, sha256: str, size: int) -> Artifact | Upload:
        """Return how much of an upload is here; nothing is begun by asking.

        Raises:
            ArtifactTooLarge: ``size`` is more than an artifact may have.
        """
        name = self._check_upload(sha256, size)
        target = self._target(name)
        if target.is_file():
            return Artifact(sha256=name, size=target.stat().st_size)
        try:
            received = self._part(name, size).stat().st_size
        except FileNotFoundError:
            received = 0
        # All there but never checked (a crash in between): the last byte is asked for again.
        return Upload(sha256=name, size=size, received=min(received, max(0, size - 1)))

    @_disk_errors()
    def append(
        self, sha256: str, *, offset: int, size: int, pieces: Sequence[bytes]
    ) -> Artifact | Upload:
        """Add one part to an upload; the last one makes it an artifact.

        Args:
            sha256: Digest of the whole.
            offset: Where the part begins: what has been received so far.
            size: Bytes of the whole.
            pieces: The part, in as many pieces as it came in: together at least one byte, and at
                most ``part_bytes_max``.

        Raises:
            OffsetMismatch: the upload stands elsewhere.
            ArtifactTooLarge: the part or the whole.
            Invalid: ``digest_mismatch``; the upload is thrown away and starts anew.
            Overloaded: too many uploads are open.
            DiskFull: too little space.
            StoreUnavailable: the disk fails.
        """
        name = self._check_upload(sha256, size)
        length = sum(map(len, pieces))
        if length > self._part_bytes_max:
            raise ArtifactTooLarge("the part", length, self._part_bytes_max)
        if not length or offset < 0 or offset + length > size:
            raise Invalid("invalid_request", "the part is empty or does not lie inside the whole")
        target = self._target(name)
        if target.is_file():
            self._settle(target)
            return Artifact(sha256=name, size=target.stat().st_size)
        part = self._part(name, size)
        if not part.exists():
            if offset:
                raise OffsetMismatch(name, offset, 0)
            self._make_room()
        self._check_space(length)
        with _opened_for_append(part, target) as (descriptor, received):
            if target.is_file():  # Somebody else completed it while we waited for the lock.
                part.unlink(missing_ok=True)
                self._settle(target)
                return Artifact(sha256=name, size=size)
            if received == size and offset == size - length:
                received = offset  # All there but never checked: take the last part again.
                os.ftruncate(descriptor, received)
            if offset != received:
                raise OffsetMismatch(name, offset, min(received, size - 1))
            _write_at(descriptor, part, pieces, offset)
            failpoints.hit("artifact.part.flushed")
            self._update(name, offset, pieces)
            if offset + length < size:
                sync_dir(self._parts)  # The upload has a name since its first part.
                return Upload(sha256=name, size=size, received=offset + length)
            return self._commit(name, size, part, target)

    def uploads(self) -> int:
        """Return how many uploads are open."""
        return sum(1 for _ in self._open_uploads())

    def sweep(self) -> int:
        """Throw uploads away that have been idle for too long; return how many."""
        oldest = self._now() - self._upload_idle_s
        swept = 0
        for path in self._parts.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    swept += 1
        return swept

    # -- helpers -----------------------------------------------------------------------------------

    def _path(self, sha256: str) -> Path | None:
        name = sha256.lower()
        return self._target(name) if _SHA256.match(name) else None

    def _target(self, name: str) -> Path:
        return self._root / name[:2] / name

    def _part(self, name: str, size: int) -> Path:
        return self._parts / f"{name}.{size}.part"

    def _open_uploads(self) -> Iterator[Path]:
        return (path for path in self._parts.iterdir() if _PART.match(path.name))

    def _check_upload(self, sha256: str, size: int) -> str:
        if size > self._artifact_bytes_max:
            raise ArtifactTooLarge("the artifact", size, self._artifact_bytes_max)
        if size < 1:
            raise Invalid("invalid_request", "an empty artifact is sent whole, not in parts")
        return _digest_name(sha256)

    def _make_room(self) -> None:
        if self.uploads() >= self._uploads_max:
            self.sweep()
        if self.uploads() >= self._uploads_max:
            raise Overloaded(
                f"{self._uploads_max} uploads are open, the most allowed; "
                "finish one, or try again later",
                10,
            )

    def _check_space(self, size: int) -> None:
        free = self._disk_free(self._root)
        if free - size < self._disk_free_bytes_min:
            raise DiskFull(
                f"{free} bytes are free, and {self._disk_free_bytes_min} are kept in reserve",
                DISK_RETRY_S,
            )

    @contextmanager
    def _temporary(self) -> Iterator[tuple[BinaryIO, Path]]:
        descriptor, name = tempfile.mkstemp(dir=self._parts, prefix=".whole-")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, source: Path, target: Path) -> None:
        """Rename a complete, flushed file to its name, durably."""
        target.parent.mkdir(mode=0o700, exist_ok=True)
        source.chmod(0o400)
        sync_dir(self._root)  # Before anything moves into a folder made just now.
        failpoints.hit("artifact.rename.before")
        source.rename(target)
        failpoints.hit("artifact.rename.after")
        sync_dir(target.parent)

    def _settle(self, target: Path) -> None:
        """Make sure that the name of an artifact that was here before outlives a loss of power.

        Whoever renamed it may have died right after that.
        """
        sync_dir(self._root)
        sync_dir(target.parent)

    def _update(self, name: str, offset: int, pieces: Sequence[bytes]) -> None:
        with self._lock:
            at, digest = self._digests.pop(name, (0, hashlib.sha256()))
        if at != offset:
            return
        for piece in pieces:  # Uploads of others are not kept waiting by this.
            digest.update(piece)
            at += len(piece)
        with self._lock:
            self._digests[name] = (at, digest)
            while len(self._digests) > self._uploads_max:
                self._digests.popitem(last=False)

    def _commit(self, name: str, size: int, part: Path, target: Path) -> Artifact:
        with self._lock:
            at, digest = self._digests.pop(name, (0, hashlib.sha256()))
        found = digest.hexdigest() if at == size else _digest_of(part)
        if found != name:
            part.unlink(missing_ok=True)
            raise _mismatch(name, found)
        self._publish(part, target)
        failpoints.hit("artifact.upload.complete")
        return Artifact(sha256=name, size=size)


def _digest_name(sha256: str) -> str:
    name = sha256.lower()
    if not _SHA256.match(name):
        raise Invalid(
            "invalid_request",
            "sha256 must be 64 hexadecimal digits",
            (("sha256", "must be 64 hexadecimal digits"),),
        )
    return name


def _mismatch(expected: str, found: str) -> Invalid:
    text = f"the bytes have SHA-256 {found}, not {expected.lower()}; nothing was kept"
    return Invalid("digest_mismatch", text, (("sha256", text),))


def _digest_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _opened_for_append(part: Path, target: Path) -> Iterator[tuple[int, int]]:
    """Open and lock an upload; give its descriptor and how much of it is there."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = os.fstat(descriptor)
            # Whoever held the lock before us may have completed the upload, or thrown it away.
            if held.st_nlink or target.is_file():
                yield descriptor, held.st_size
                return
        finally:
            os.close(descriptor)


def _write_at(descriptor: int, part: Path, pieces: Sequence[bytes], offset: int) -> None:
    """Write a part and flush it; on failure the upload stands where it stood."""
    try:
        at = offset
        for piece in pieces:
            view = memoryview(piece)
            while view:
                written = os.pwrite(descriptor, view, at)
                view, at = view[written:], at + written
        os.fsync(descriptor)
    except OSError:
        # What a failed fsync was about is nowhere, though it can be read: it must not count as
        # received.
        try:
            os.ftruncate(descriptor, offset)
        except OSError:
            part.unlink(missing_ok=True)
        raise


def _write(stream: BinaryIO, data: bytes, *, flush: bool = True) -> None:
    stream.write(data)
    if flush:
        stream.flush()
        os.fsync(stream.fileno())

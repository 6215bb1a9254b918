"""Content-addressed files: what a client uploads and a handler reads, named by their SHA-256.

    artifacts/ab/ab12...         complete, never changed again
    artifacts/parts/ab12....4096.part   an upload of 4096 bytes; its length is what has arrived
    artifacts/owners/<who>/ab12...      an empty file: it is theirs, among others perhaps
    artifacts/makers/ab/ab12...         which tasks have made it: principal, type and queue of each

Who may see everything needs no mark of his own. Anybody else has one for what he has sent, byte for
byte, or what a task of his has made; and an upload of his is apart from those of others, so that
how far it is tells nothing of what others have. The makers are for keys that see tasks of others:
what these have made is seen with them.

A part is flushed to the disk before it is acknowledged, and so is its name. An upload becomes an
artifact by a rename, after its digest was checked, so a name never stands for wrong or half bytes.
Several threads and processes may use one directory: an upload is locked while a part is added.

Everything here blocks; callers run it on a thread.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

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
from hcna_ray.durable import sync_dir, write_private

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_PART = re.compile(r"([0-9a-f]{64})\.([0-9]{1,18})(\.[0-9a-f]{32})?\.part\Z")
_CHUNK = 1024 * 1024
#: Kinds of tasks that are noted as makers of one artifact: the first so many.
MAKERS_MAX = 100
#: Seconds after which a full disk is worth another try.
DISK_RETRY_S = 30
#: One owner may have one part in so many of all uploads, and as much is kept for those without an
#: owner: workers, and who sees everything. Else one key could keep everybody from uploading.
SHARES = 4
#: An upload without a new part for this long may make room for another one of its owner. A slow
#: client's part of 8 MiB is given 35 minutes.
GIVEN_UP_S = 3600.0


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


class Maker(NamedTuple):
    """What a task is by which keys are held against it; its id is not kept."""

    principal: str
    task_type: str
    queue: str


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
            uploads_max: Uploads begun and not complete. One owner may have a quarter of them, and
                a quarter is kept for those without an owner.
            upload_idle_s: An upload without a new part for this long is thrown away.
            disk_free_bytes_min: Writes are refused when they would leave less than this.
            now: Wall clock, seconds since the epoch.
            disk_free: Free bytes where a path lies; the machine's by default.
        """
        self._root = root
        self._parts = root / "parts"
        self._owners = root / "owners"
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
    def owned(self, sha256: str, owner: str) -> bool:
        """Return whether a complete artifact is here and marked as theirs."""
        path = self._path(sha256)
        # The mark first: what is somebody else's takes no other time than what nobody has.
        return path is not None and self._mark(path.name, owner).exists() and path.is_file()

    @_disk_errors()
    def own(self, sha256: str, owner: str) -> bool:
        """Mark a complete artifact as theirs, durably; return whether it is here."""
        path = self._path(sha256)
        if path is None or not path.is_file():
            return False
        mark = self._mark(path.name, owner)
        if not mark.exists():
            for folder in (self._owners, mark.parent):
                if not folder.is_dir():
                    folder.mkdir(mode=0o700, exist_ok=True)
                    sync_dir(folder.parent)
            mark.touch(mode=0o400)
            sync_dir(mark.parent)
        return True

    @_disk_errors()
    def made(self, sha256: str, maker: Maker) -> None:
        """Note, durably, which kind of task has made a complete artifact: it is its principal's.

        To be called in one process alone, from any of its threads.

        Raises:
            NotFound: it is not here.
        """
        path = self.path(sha256)
        with self._lock:
            put_makers(self._root, {path.name: [maker]})
        self.own(path.name, maker.principal)

    @_disk_errors()
    def makers(self, sha256: str) -> list[Maker]:
        """Return which kinds of tasks have made an artifact; none if it is not here."""
        path = self._path(sha256)
        if path is None:
            return []
        try:
            found = json.loads(_makers_file(self._root, path.name).read_bytes())
        except FileNotFoundError:
            return []
        return [Maker(*one) for one in found]

    @_disk_errors()
    def put(self, data: bytes, sha256: str | None = None, *, owner: str | None = None) -> Artifact:
        """Store a whole artifact.

        Args:
            data: At most ``part_bytes_max`` bytes.
            sha256: What the digest should be, if the caller knows it.
            owner: Whose it is; ``None`` needs no mark.

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
        if owner is not None:
            self.own(found, owner)
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
    def progress(self, sha256: str, size: int, *, owner: str | None = None) -> Artifact | Upload:
        """Return how much of an upload is here; nothing is begun by asking.

        Args:
            sha256: Digest of the whole.
            size: Bytes of the whole.
            owner: Whose upload it is; ``None`` is of whoever sees everything.

        Raises:
            ArtifactTooLarge: ``size`` is more than an artifact may have.
        """
        name = self._check_upload(sha256, size)
        target = self._target(name)
        if self._is_done(target, owner):
            return Artifact(sha256=name, size=target.stat().st_size)
        try:
            received = self._part(name, size, owner).stat().st_size
        except FileNotFoundError:
            received = 0
        # All there but never checked (a crash in between): the last byte is asked for again.
        return Upload(sha256=name, size=size, received=min(received, max(0, size - 1)))

    @_disk_errors()
    def append(
        self,
        sha256: str,
        *,
        offset: int,
        size: int,
        pieces: Sequence[bytes],
        owner: str | None = None,
    ) -> Artifact | Upload:
        """Add one part to an upload; the last one makes it an artifact.

        Args:
            sha256: Digest of the whole.
            offset: Where the part begins: what has been received so far.
            size: Bytes of the whole.
            pieces: The part, in as many pieces as it came in: together at least one byte, and at
                most ``part_bytes_max``.
            owner: Whose upload it is; ``None`` is of whoever sees everything. Theirs is complete
                when they have sent all of it, whoever else has.

        Raises:
            OffsetMismatch: the upload stands elsewhere.
            ArtifactTooLarge: the part or the whole.
            Invalid: ``digest_mismatch``; the upload is thrown away and starts anew.
            Overloaded: too many uploads are open, of theirs or of all.
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
        if self._is_done(target, owner):
            self._settle(target)
            return Artifact(sha256=name, size=target.stat().st_size)
        part = self._part(name, size, owner)
        if not part.exists():
            if offset:
                raise OffsetMismatch(name, offset, 0)
            self._make_room(owner)
        self._check_space(length)
        done = functools.partial(self._is_done, target, owner)
        with _opened_for_append(part, done) as (descriptor, received):
            if done():  # Somebody else completed it while we waited for the lock.
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
            self._update(part.name, offset, pieces)
            if offset + length < size:
                sync_dir(self._parts)  # The upload has a name since its first part.
                return Upload(sha256=name, size=size, received=offset + length)
            return self._commit(name, size, part, target, owner)

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

    def _part(self, name: str, size: int, owner: str | None) -> Path:
        whose = "" if owner is None else f".{_folder_of(owner)}"
        return self._parts / f"{name}.{size}{whose}.part"

    def _mark(self, name: str, owner: str) -> Path:
        return self._owners / _folder_of(owner) / name

    def _is_done(self, target: Path, owner: str | None) -> bool:
        return target.is_file() and (owner is None or self._mark(target.name, owner).exists())

    def _open_uploads(self) -> Iterator[Path]:
        return (path for path in self._parts.iterdir() if _PART.match(path.name))

    def _check_upload(self, sha256: str, size: int) -> str:
        if size > self._artifact_bytes_max:
            raise ArtifactTooLarge("the artifact", size, self._artifact_bytes_max)
        if size < 1:
            raise Invalid("invalid_request", "an empty artifact is sent whole, not in parts")
        return _digest_name(sha256)

    def _make_room(self, owner: str | None) -> None:
        """See to it that one more upload may begin.

        Who has as many as he may loses the one that stood still for longest, if it did for
        `GIVEN_UP_S`. It is never somebody else's.
        """
        if self._crowded(owner) is not None:
            self.sweep()
        if self._crowded(owner) is not None:
            self._drop_idle(owner)
        if (crowd := self._crowded(owner)) is not None:
            raise Overloaded(f"{crowd}, the most allowed; finish one, or try again later", 10)

    def _crowded(self, owner: str | None) -> str | None:
        """Say which bound keeps a new upload out; ``None`` if there is room."""
        share = self._uploads_max // SHARES
        everyone = list(self._open_uploads())
        if len(everyone) >= self._uploads_max:
            return f"{len(everyone)} uploads are open"
        if owner is None:
            return None
        own = sum(_is_of(path, owner) for path in everyone)
        if own >= max(1, share):
            return f"{own} uploads of {owner!r} are open"
        owned = sum(not _is_of(path, None) for path in everyone)
        return f"{owned} uploads are open" if owned >= self._uploads_max - share else None

    def _drop_idle(self, owner: str | None) -> None:
        """Throw an owner's longest idle upload away, if nobody is coming back to it."""
        oldest = self._now() - GIVEN_UP_S
        found: list[tuple[float, Path]] = []
        for path in self._open_uploads():
            with suppress(FileNotFoundError):
                if _is_of(path, owner) and (at := path.stat().st_mtime) < oldest:
                    found.append((at, path))
        if found:
            _drop_unused(min(found)[1])

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

    def _update(self, part: str, offset: int, pieces: Sequence[bytes]) -> None:
        with self._lock:
            at, digest = self._digests.pop(part, (0, hashlib.sha256()))
        if at != offset:
            return
        for piece in pieces:  # Uploads of others are not kept waiting by this.
            digest.update(piece)
            at += len(piece)
        with self._lock:
            self._digests[part] = (at, digest)
            while len(self._digests) > self._uploads_max:
                self._digests.popitem(last=False)

    def _commit(
        self, name: str, size: int, part: Path, target: Path, owner: str | None
    ) -> Artifact:
        with self._lock:
            at, digest = self._digests.pop(part.name, (0, hashlib.sha256()))
        found = digest.hexdigest() if at == size else _digest_of(part)
        if found != name:
            part.unlink(missing_ok=True)
            raise _mismatch(name, found)
        self._publish(part, target)
        if owner is not None:
            self.own(name, owner)
        failpoints.hit("artifact.upload.complete")
        return Artifact(sha256=name, size=size)


#: Whose artifacts are: names by the folder of their owner.
Marks = Mapping[str, Sequence[str]]

_FOLDER = re.compile(r"[0-9a-f]{32}\Z")


def marks_in(root: Path, names: Collection[str]) -> dict[str, list[str]]:
    """Return who is marked as an owner of which of these artifacts."""
    found = {
        folder.name: sorted(mark.name for mark in folder.iterdir() if mark.name in names)
        for folder in sorted((root / "owners").glob("*"))
        if _FOLDER.match(folder.name)
    }
    return {folder: marks for folder, marks in found.items() if marks}


def checked_marks(data: object) -> Marks:
    """Return marks that came from elsewhere. Raises `ValueError` if they are none."""
    if not isinstance(data, dict):
        raise ValueError("it is no object")
    for folder, names in data.items():
        if not _FOLDER.match(folder) or not isinstance(names, list):
            raise ValueError("it names what is no owner")
        if not all(isinstance(name, str) and _SHA256.match(name) for name in names):
            raise ValueError("it names what is no artifact")
    return data


def put_marks(root: Path, marks: Marks) -> None:
    """Add marks to those that are there, durably."""
    for folder, names in marks.items():
        place = root / "owners" / folder
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            (place / name).touch(mode=0o400)
        for path in (root, root / "owners", place):
            sync_dir(path)


#: Which kinds of tasks have made artifacts: (principal, type, queue) by the artifact's name.
Makers = Mapping[str, Sequence[Sequence[str]]]


def makers_in(root: Path, names: Collection[str]) -> dict[str, list[list[str]]]:
    """Return which kinds of tasks have made which of these artifacts."""
    found = {}
    for path in sorted((root / "makers").glob("*/*")):
        if path.name in names:  # Not one that is just being written under another name.
            found[path.name] = json.loads(path.read_bytes())
    return found


def checked_makers(data: object) -> Makers:
    """Return makers that came from elsewhere. Raises `ValueError` if they are none."""
    if not isinstance(data, dict):
        raise ValueError("it is no object")
    for name, makers in data.items():
        if not _SHA256.match(name) or not isinstance(makers, list):
            raise ValueError("it names what is no artifact")
        for maker in makers:
            texts = isinstance(maker, list) and all(isinstance(text, str) for text in maker)
            if not texts or len(maker) != len(Maker._fields):
                raise ValueError("it names what is no task")
    return data


def put_makers(root: Path, makers: Makers) -> None:
    """Add makers to those that are there, durably, up to `MAKERS_MAX` of one artifact."""
    written = False
    for name, more in makers.items():
        path = _makers_file(root, name)
        known = json.loads(path.read_bytes()) if path.exists() else []
        found = [*known, *(list(one) for one in more if list(one) not in known)][:MAKERS_MAX]
        if found != known:
            write_private(path, json.dumps(found, separators=(",", ":")))
            written = True
    if written:
        for folder in (root, root / "makers"):  # Which may be new.
            sync_dir(folder)


def _makers_file(root: Path, name: str) -> Path:
    return root / "makers" / name[:2] / name


def _is_of(part: Path, owner: str | None) -> bool:
    """Whether an upload is theirs."""
    named = _PART.match(part.name)
    whose = "" if owner is None else f".{_folder_of(owner)}"
    return named is not None and (named[3] or "") == whose


def _drop_unused(part: Path) -> None:
    """Delete an upload, unless a part is being added to it just now."""
    with suppress(FileNotFoundError):
        descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(part, os.fstat(descriptor)):
                part.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def _folder_of(owner: str) -> str:
    """Return how an owner is called in a path: any printable text may be a name."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


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
def _opened_for_append(part: Path, done: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """Open and lock an upload; give its descriptor and how much of it is there.

    Args:
        part: The upload.
        done: Tells whether it is complete, and so gone by right.
    """
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = os.fstat(descriptor)
            # Whoever held the lock before us may have completed the upload, or thrown it away.
            if done() or _is_at(part, held):
                yield descriptor, held.st_size
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, held: os.stat_result) -> bool:
    """Whether an open file is still the one of that name: a renamed one is an artifact by now."""
    try:
        return os.path.samestat(path.stat(), held)
    except FileNotFoundError:
        return False


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

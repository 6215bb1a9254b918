"""Backups: a consistent point of a store and its files in one archive, and the way back.

An archive is a tar file (plain ustar headers, no extensions) inside one zstandard frame with a
checksum. Its members, in this order, each of them optional but the first and the last two::

    hcna-backup            format and kind: whatever does not begin with it is no backup
    config/hcna.yaml       settings
    cluster/members.json   who has joined, without tokens
    store/queue.db         the store as of one commit; not of a store on a database server
    artifacts/<sha256>     every artifact that this commit refers to; without one, every artifact
    artifacts-owners.json  whose they are, if they are somebody's in particular
    artifacts-makers.json  which kinds of tasks have made them, if any has
    data/...               files of a worker's data directory (``data-long/N``: a long name)
    sealed                 keys and certificates, under a passphrase
    manifest.json          `Manifest`: what there must be, with size and SHA-256 of each
    manifest.sha256

The manifest comes last because the digests are made while the bytes are copied, once. A reader goes
through the archive twice: `inspect` checks everything and writes nothing, `extract` writes files
and checks each again.

Blocking; knows files, no settings.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import apsw
import msgspec
import zstandard

from hcna_ray import failpoints
from hcna_ray.core.errors import HcnaError
from hcna_ray.store.generations import generation_above

FORMAT = 1
PRODUCT = "hcna-ray"
#: What an archive may be of.
MODERATOR, WORKER = "moderator", "worker"

HEADER, CONFIG, MEMBERS = "hcna-backup", "config/hcna.yaml", "cluster/members.json"
#: Whose the artifacts are; left out while they are nobody's in particular.
OWNERS = "artifacts-owners.json"
#: Which kinds of tasks have made them; left out while none has.
MAKERS = "artifacts-makers.json"
STORE, SEALED = "store/queue.db", "sealed"
MANIFEST, MANIFEST_SUM = "manifest.json", "manifest.sha256"
#: Members that are read into memory, and how large they may be.
SMALL: Mapping[str, int] = {
    HEADER: 4096,
    CONFIG: 1 << 20,
    MEMBERS: 16 << 20,
    OWNERS: 128 << 20,
    MAKERS: 128 << 20,
    SEALED: 64 << 20,
}
MANIFEST_BYTES_MAX = 512 << 20

#: Later than any clock (the year 5138), and more than JSON readers can count to.
_TIME_MAX, _NUMBER_MAX = 1e11, 1 << 53
_ARTIFACT = re.compile(r"artifacts/([0-9a-f]{64})\Z")
_LONG = re.compile(r"data-long/[0-9]{8}\Z")
_HEX64 = re.compile(rb"(?<![0-9A-Fa-f])[0-9A-Fa-f]{64}(?![0-9A-Fa-f])")
_NAME_BYTES_MAX = 100
_BLOCK = 512
_CHUNK = 1 << 20
#: Compressed bytes decompressed at once: a hostile frame makes 32 KiB of each.
_PIECE = 4096
#: By how much the store's log may grow beside a copy. It cannot start again before the copy is
#: done, and a slow disk or share must not fill the store's own.
LOG_GROWTH_MAX = 1 << 30
#: Pages copied between two looks at the clock of the disk (8 MiB).
_PAGES_PER_STEP = 2048
_LEVEL = 3
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
#: Held in a scratch directory for as long as somebody works there.
_LOCK = "lock"


class BackupRefused(HcnaError):
    """A backup or restore cannot be done here and now. Nothing was changed."""

    code = "backup_refused"


class BackupDamaged(HcnaError):
    """An archive is not what was written, or none of ours. Nothing of it is used."""

    code = "backup_damaged"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} cannot be used: {self.reason}"


# -- what an archive says of itself ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file of an archive."""

    #: Its name in the tar file.
    member: str
    size: int
    sha256: str
    #: Below the data directory, for a worker's file; else empty.
    path: str = ""
    mode: int = 0o600
    mtime: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A directory below a worker's data directory."""

    path: str
    mode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Which commit of the store an archive holds, and what was in it."""

    generation: int
    last_fact: int
    last_end: int
    last_seq: int
    schema: int
    #: Tasks by state.
    tasks: Mapping[str, int]
    leases: int
    facts: int
    audit: int
    workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an archive holds, and what its maker noticed."""

    format: int
    product: str
    version: str
    kind: str
    #: Full name of the node it is of.
    node_id: str
    #: Seconds since the epoch, on the clock of that machine.
    created_at: float
    point: Point | None = None
    entries: tuple[Entry, ...] = ()
    folders: tuple[Folder, ...] = ()
    #: Artifacts whose bytes were already wrong when they were read. They are not restored.
    damaged: tuple[str, ...] = ()
    #: Files of a worker that were written to while they were copied.
    changed: tuple[str, ...] = ()
    #: What was left out (links, devices, ...), and why.
    skipped: tuple[str, ...] = ()

    @property
    def sealed(self) -> bool:
        """Whether keys and certificates are in it."""
        return any(entry.member == SEALED for entry in self.entries)

    @property
    def on_server(self) -> bool:
        """Whether it is an M1's whose tasks are on a database server, so not in it."""
        members = {entry.member for entry in self.entries}
        return self.kind == MODERATOR and self.point is None and STORE not in members

    @property
    def artifacts(self) -> int:
        """How many artifacts are in it."""
        return sum(1 for entry in self.entries if _ARTIFACT.match(entry.member))

    @property
    def bytes(self) -> int:
        """Size of all files in it."""
        return sum(entry.size for entry in self.entries)


_decode_manifest = msgspec.json.Decoder(Manifest).decode
_encode = msgspec.json.Encoder().encode


def binding(manifest: Manifest) -> bytes:
    """Return what the sealed part is tied to: every other file, and which point it is.

    So whoever changes an archive that has a sealed part needs the passphrase.
    """
    point = manifest.point
    lines = [
        f"{manifest.format} {manifest.kind} {manifest.node_id} {manifest.created_at!r}",
        "" if point is None else f"{point.generation} {point.last_fact}",
        *(
            f"{one.member}\0{one.path}\0{one.size}\0{one.sha256}\0{one.mode}"
            for one in manifest.entries
            if one.member != SEALED
        ),
    ]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).digest()


# -- writing ---------------------------------------------------------------------------------------


class ArchiveWriter:
    """Writes members one after the other and remembers what they were."""

    def __init__(self, stream: BinaryIO, kind: str) -> None:
        """Begin an archive of a kind on an empty file."""
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        self._out = compressor.stream_writer(stream, closefd=False)
        self.entries: list[Entry] = []
        self._put(HEADER, _encode({"product": PRODUCT, "format": FORMAT, "kind": kind}))

    def add_bytes(self, member: str, data: bytes) -> None:
        """Add a small file."""
        digest = hashlib.sha256(data).hexdigest()
        self._put(member, data)
        self.entries.append(Entry(member=member, size=len(data), sha256=digest))

    def add_file(self, member: str, source: BinaryIO, *, path: str = "") -> tuple[Entry, bool]:
        """Add an open file as it is now.

        Args:
            member: Its name in the archive.
            source: At its beginning.
            path: Where it belongs, if ``member`` does not say.

        Returns:
            What was added, and whether the file changed meanwhile (then it may be of two halves).
        """
        before = os.fstat(source.fileno())
        self._head(member, before.st_size)
        digest, left = hashlib.sha256(), before.st_size
        while left:
            chunk = source.read(min(_CHUNK, left))
            if not chunk:
                break
            digest.update(chunk)
            self._out.write(chunk)
            left -= len(chunk)
        changed = left > 0
        while left:  # It has become shorter: the header has promised these bytes.
            zeros = bytes(min(_CHUNK, left))
            digest.update(zeros)
            self._out.write(zeros)
            left -= len(zeros)
        self._pad(before.st_size)
        after = os.fstat(source.fileno())
        changed |= (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
        entry = Entry(
            member=member,
            size=before.st_size,
            sha256=digest.hexdigest(),
            path=path,
            mode=stat.S_IMODE(before.st_mode) & 0o777,
            mtime=before.st_mtime,
        )
        self.entries.append(entry)
        return entry, changed

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, with the entries added here, and close the frame."""
        raw = _encode(manifest)
        self._put(MANIFEST, raw)
        self._put(MANIFEST_SUM, hashlib.sha256(raw).hexdigest().encode() + b"\n")
        self._out.write(bytes(2 * _BLOCK))
        self._out.close()  # type: ignore[no-untyped-call] # Untyped in its stubs.

    def _put(self, member: str, data: bytes) -> None:
        self._head(member, len(data))
        self._out.write(data)
        self._pad(len(data))

    def _head(self, member: str, size: int) -> None:
        info = tarfile.TarInfo(member)
        info.size, info.mode = size, 0o600
        head = info.tobuf(format=tarfile.GNU_FORMAT)
        assert len(head) == _BLOCK, "a member's name fits into its header"
        self._out.write(head)

    def _pad(self, size: int) -> None:
        self._out.write(bytes(-size % _BLOCK))


def data_member(path: str, number: int) -> str:
    """Return the member's name for a worker's file: its path, if a plain header can hold it."""
    name = f"data/{path}"
    try:
        fits = len(name.encode("utf-8")) <= _NAME_BYTES_MAX
    except UnicodeEncodeError:
        fits = False
    return name if fits else f"data-long/{number:08d}"


# -- the store -------------------------------------------------------------------------------------


def snapshot(source: Path, target: Path) -> Point:
    """Copy the newest commit of a SQLite store that somebody may be writing to.

    One read transaction is held during the copy, so the writer is not kept waiting; it is short,
    as only pages are copied, because its log cannot start again before we are done. The copy is
    carried to the disk in steps: a writer's fsync must not have to wait for all of it at once. It
    is given up when the log has grown by `LOG_GROWTH_MAX`.

    Raises:
        BackupRefused: There is no store, the disk of the copy is full, or it is too slow for all
            that is written meanwhile.
        BackupDamaged: The store itself is damaged.
    """
    if not source.is_file():
        raise BackupRefused(f"there is no task store at {source}")
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        _copy_pages(source, target)
        failpoints.hit("backup.store.copied")
        return check_store(target)
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise BackupDamaged(str(source), f"the task store is damaged: {error}") from error
    except apsw.FullError as error:
        raise BackupRefused(f"the disk of {target.parent} is full") from error
    except apsw.Error as error:
        raise BackupRefused(f"the task store cannot be copied: {error}") from error


def _copy_pages(source: Path, target: Path) -> None:
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    reader = apsw.Connection(f"file:{quote(os.fspath(source))}?mode=ro", flags=flags)
    # Nobody else knows the copy, and not every file system that takes backups can lock.
    writer = apsw.Connection(os.fspath(target), vfs="unix-none")
    descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        reader.set_busy_timeout(5000)
        writer.execute("PRAGMA journal_mode = OFF").fetchall()
        writer.execute("PRAGMA synchronous = OFF").fetchall()
        # An open read transaction pins the commit: steps of the copy cannot see a newer one.
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        copy = writer.backup("main", reader, "main")
        log_at_first = _log_bytes(source)
        try:
            while not copy.done:
                copy.step(_PAGES_PER_STEP)
                os.fdatasync(descriptor)
                if _log_bytes(source) - log_at_first > LOG_GROWTH_MAX:
                    raise BackupRefused(
                        f"more than {LOG_GROWTH_MAX >> 20} MiB were written to the task store "
                        "while it was copied: copy it to a faster disk, or when less is going on"
                    )
        finally:
            copy.finish()
        reader.execute("ROLLBACK")
    finally:
        os.close(descriptor)
        writer.close()
        reader.close()


def _log_bytes(source: Path) -> int:
    try:
        return os.stat(f"{source}-wal").st_size
    except FileNotFoundError:
        return 0


def _open_copy(path: Path) -> apsw.Connection:
    """Open a copy that nobody writes to: no log, no lock, no file beside it."""
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"file:{quote(os.fspath(path))}?mode=ro&immutable=1", flags=flags)


def check_store(path: Path) -> Point:
    """Return what a copied store holds.

    Raises:
        BackupDamaged: Its pages contradict each other, or it is no store of ours.
    """
    db = _open_copy(path)
    try:
        wrong = db.execute("PRAGMA quick_check(1)").fetchall()
        if wrong != [("ok",)]:
            raise BackupDamaged(str(path), f"the task store is damaged: {wrong[0][0]}")
        return _point(db)
    except apsw.SQLError as error:
        raise BackupDamaged(str(path), f"it is not a task store: {error}") from error
    finally:
        db.close()


def _point(db: apsw.Connection) -> Point:
    def rows(sql: str) -> list[tuple[Any, ...]]:
        return db.execute(sql).fetchall()

    def one(sql: str) -> int:
        return int(rows(sql)[0][0] or 0)

    numbers = {name: int(value) for name, value in rows("SELECT name, value FROM number")}
    tasks = rows("SELECT state, count(*) FROM task GROUP BY state ORDER BY state")
    return Point(
        generation=numbers["generation"],
        last_fact=numbers["last_fact"],
        last_end=numbers["last_end"],
        last_seq=numbers["last_seq"],
        schema=one("SELECT max(number) FROM schema_migration"),
        tasks={str(state): int(count) for state, count in tasks},
        leases=one("SELECT count(*) FROM task WHERE granted_at IS NOT NULL"),
        facts=one("SELECT count(*) FROM fact"),
        audit=one("SELECT count(*) FROM audit"),
        workers=one("SELECT count(*) FROM worker"),
    )


def artifacts_named(path: Path, present: Collection[str]) -> set[str]:
    """Return which artifacts a copied store refers to.

    A reference has no fixed place: payloads, results and checkpoints are the handlers' own. So
    whatever looks like a SHA-256 and is the name of an artifact that is here counts.

    Args:
        path: The copy.
        present: Names of artifacts that are here.
    """
    if not present:
        return set()
    found: set[str] = set()
    db = _open_copy(path)
    try:
        for sql in ("SELECT body FROM task_spec", "SELECT result, checkpoint FROM task"):
            for row in db.execute(sql):
                for blob in row:
                    if isinstance(blob, bytes):
                        found |= {name.decode().lower() for name in _HEX64.findall(blob)}
    finally:
        db.close()
    return found & set(present)


def artifacts_present(root: Path) -> dict[str, Path]:
    """Return every complete artifact of a store's directory."""
    return {
        path.name: path
        for folder in root.glob("[0-9a-f][0-9a-f]")
        for path in folder.iterdir()
        if _ARTIFACT.match(f"artifacts/{path.name}")
    }


# -- numbers that must never be given twice --------------------------------------------------------


def next_generation(point: Point, *, created_at: float, now: float, others: Iterable[int]) -> int:
    """Return a generation above every one that tokens were made with: see `generation_above`.

    Args:
        point: Of the backup.
        created_at: When it was made.
        now: Seconds since the epoch.
        others: Generations known from elsewhere, such as that of a store being replaced.
    """
    return generation_above([point.generation, *others], created_at=created_at, now=now)


def renumber(path: Path, *, generation: int, skip: int) -> None:
    """Give a copied store its new generation, and let its sequences leap."""
    db = apsw.Connection(os.fspath(path))
    try:
        with db:
            db.execute("UPDATE number SET value = ? WHERE name = 'generation'", (generation,))
            db.execute(
                "UPDATE number SET value = value + ? WHERE name IN ('last_fact', 'last_end')",
                (skip,),
            )
    finally:
        db.close()


def generation_of(path: Path) -> int:
    """Return the generation of a store that is about to be replaced; 0 if it cannot be read."""
    try:
        db = apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            sql = "SELECT value FROM number WHERE name = 'generation'"
            found: list[tuple[Any, ...]] = db.execute(sql).fetchall()
            return int(found[0][0])
        finally:
            db.close()
    except (apsw.Error, IndexError, TypeError, ValueError):
        return 0


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """An archive that was found to be whole."""

    manifest: Manifest
    #: The members of `SMALL` that it has.
    small: Mapping[str, bytes] = field(default_factory=dict)


class _Unpacked:
    """The bytes inside the frame, in bounded pieces; knows whether the frame was whole."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._pieces: list[bytes] = []
        self._have = 0

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer only at the end."""
        while self._have < size and self._fill():
            pass
        data = b"".join(self._pieces)
        self._pieces = [data[size:]]
        self._have = len(self._pieces[0])
        return data[:size]

    def _fill(self) -> bool:
        if self._frame.eof:
            return False
        raw = self._stream.read(_PIECE)
        if not raw:
            raise EOFError("it is cut off")
        piece = self._frame.decompress(raw)
        self._pieces.append(piece)
        self._have += len(piece)
        return True

    def finish(self) -> None:
        """Go through what is left: zeros to the end of the frame, and nothing behind it."""
        while rest := self.read(_CHUNK):
            if rest.strip(b"\0"):
                raise ValueError("there are bytes behind its end")
        if self._frame.unused_data or self._stream.read(1):
            raise ValueError("there are bytes behind its end")


def inspect(archive: Path) -> Contents:
    """Read an archive to its end and compare it with its manifest. Nothing is written.

    Raises:
        BackupDamaged: It is not whole, or none of ours.
        OSError: The file cannot be read.
    """
    small: dict[str, bytes] = {}
    seen: dict[str, tuple[int, str]] = {}
    raw_manifest, raw_sum = b"", b""
    with _opened(archive) as members:
        for number, (member, size, chunks) in enumerate(members):
            if (number == 0) != (member == HEADER):
                raise BackupDamaged(str(archive), "it is not a backup of hcna-ray")
            if member in seen or raw_sum or (raw_manifest and member != MANIFEST_SUM):
                raise BackupDamaged(str(archive), f"{member} is where it must not be")
            limit = MANIFEST_BYTES_MAX if member == MANIFEST else SMALL.get(member)
            if member == MANIFEST_SUM:
                limit = 65
            if limit is not None and size > limit:
                raise BackupDamaged(str(archive), f"{member} is too large")
            digest, kept = hashlib.sha256(), []
            for chunk in chunks:
                digest.update(chunk)
                if limit is not None:
                    kept.append(chunk)
            data = b"".join(kept)
            if member == HEADER:
                _check_header(archive, data)
            elif member == MANIFEST:
                raw_manifest = data
            elif member == MANIFEST_SUM:
                raw_sum = data
            else:
                seen[member] = (size, digest.hexdigest())
                if limit is not None:
                    small[member] = data
    if hashlib.sha256(raw_manifest).hexdigest().encode() != raw_sum.strip():
        raise BackupDamaged(str(archive), "its manifest is missing or was changed")
    manifest = _read_manifest(archive, raw_manifest)
    _compare(archive, manifest, seen)
    return Contents(manifest=manifest, small=small)


def _check_header(archive: Path, data: bytes) -> None:
    try:
        head = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise BackupDamaged(str(archive), f"its first member is broken ({error})") from None
    found = head.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise BackupDamaged(
            str(archive), f"its format is {found}, this hcna-ray knows up to {FORMAT}: upgrade"
        )


def _read_manifest(archive: Path, raw: bytes) -> Manifest:
    try:
        manifest = _decode_manifest(raw)
    except msgspec.MsgspecError as error:
        raise BackupDamaged(str(archive), f"its manifest is broken ({error})") from None
    if manifest.product != PRODUCT or manifest.format != FORMAT:
        raise BackupDamaged(str(archive), "its manifest is of another product or format")
    if manifest.kind not in (MODERATOR, WORKER):
        raise BackupDamaged(str(archive), f"its kind {manifest.kind!r} is unknown")
    point = manifest.point
    numbers = () if point is None else (point.generation, point.last_fact, point.last_end)
    if not 0 <= manifest.created_at < _TIME_MAX or any(
        not 0 <= number < _NUMBER_MAX for number in numbers
    ):
        raise BackupDamaged(str(archive), "its manifest holds a number that cannot be")
    return manifest


def _compare(archive: Path, manifest: Manifest, seen: Mapping[str, tuple[int, str]]) -> None:
    """Refuse an archive whose members are not those of its manifest, or lead elsewhere."""
    listed = {entry.member: (entry.size, entry.sha256) for entry in manifest.entries}
    for member in sorted(listed.keys() | seen.keys()):
        if member not in seen:
            raise BackupDamaged(str(archive), f"{member} is missing")
        if member not in listed:
            raise BackupDamaged(str(archive), f"{member} is not in its manifest")
        if listed[member] != seen[member]:
            raise BackupDamaged(str(archive), f"{member} is not what was written")
    if len(listed) != len(manifest.entries):
        raise BackupDamaged(str(archive), "its manifest names a member twice")
    for entry in manifest.entries:
        named = _ARTIFACT.match(entry.member)
        if named and named[1] != entry.sha256 and named[1] not in manifest.damaged:
            raise BackupDamaged(str(archive), f"{entry.member} does not hold what it is named for")
        if _is_data(entry.member) != bool(entry.path) or (entry.path and not _is_safe(entry.path)):
            raise BackupDamaged(str(archive), f"{entry.member} leads to {entry.path!r}")
        if entry.member.startswith("data/") and entry.member != f"data/{entry.path}":
            raise BackupDamaged(str(archive), f"{entry.member} leads to {entry.path!r}")
    for folder in manifest.folders:
        if not _is_safe(folder.path):
            raise BackupDamaged(str(archive), f"a folder leads to {folder.path!r}")


def extract(archive: Path, manifest: Manifest, place: Callable[[Entry], Path | None]) -> None:
    """Write the files of an archive that was inspected, each checked again and flushed.

    Args:
        archive: The file.
        manifest: What `inspect` said.
        place: Where an entry goes; ``None`` leaves it out. Missing directories are made.

    Raises:
        BackupDamaged: The archive has changed since it was inspected.
        BackupRefused: The disk is full.
        OSError: A file cannot be written.
    """
    entries = {entry.member: entry for entry in manifest.entries}
    missing = set(entries)
    with _opened(archive) as members:
        for member, _size, chunks in members:
            entry = entries.get(member)
            target = None if entry is None else place(entry)
            missing.discard(member)
            if entry is None or target is None:
                for _ in chunks:
                    pass
                continue
            if _write(target, chunks) != entry.sha256:
                raise BackupDamaged(str(archive), f"{member} has changed since it was checked")
            failpoints.hit("restore.file.extracted")
            if entry.path:  # What is ours stays 0600, whatever the archive says.
                os.chmod(target, entry.mode & 0o777)
                os.utime(target, (entry.mtime, entry.mtime))
    if missing:
        raise BackupDamaged(str(archive), "it has changed since it was checked")


def _write(target: Path, chunks: Iterator[bytes]) -> str:
    """Write a new file durably; return the digest of its bytes."""
    digest = hashlib.sha256()
    with disk_errors(target.parent):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(target, flags, 0o600), "wb") as stream:
            for chunk in chunks:
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
    return digest.hexdigest()


Members = Iterator[tuple[str, int, Iterator[bytes]]]


@contextmanager
def _opened(archive: Path) -> Iterator[Members]:
    """Give the members of an archive; whatever is wrong with it is a `BackupDamaged`."""
    with archive.open("rb") as stream:
        if stream.read(len(zstandard.FRAME_HEADER)) != zstandard.FRAME_HEADER:
            raise BackupDamaged(str(archive), "it is not a backup of hcna-ray")
        stream.seek(0)
        try:
            yield _members(_Unpacked(stream))
        except (zstandard.ZstdError, EOFError, ValueError, OverflowError) as error:
            raise BackupDamaged(str(archive), str(error)) from error


def _members(unpacked: _Unpacked) -> Members:
    """Yield name, size and bytes of each member. Only plain files with our names are members."""
    while True:
        head = unpacked.read(_BLOCK)
        if not head.strip(b"\0") and len(head) == _BLOCK:
            break
        name, size = _parse_head(head)
        chunks = _chunks(unpacked, size)
        yield name, size, chunks
        for _ in chunks:
            pass
        if unpacked.read(-size % _BLOCK).strip(b"\0"):
            raise ValueError(f"there are bytes behind {name}")
    unpacked.finish()


def _parse_head(head: bytes) -> tuple[str, int]:
    if len(head) < _BLOCK:
        raise EOFError("it is cut off")
    counted = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    if head[257:262] != b"ustar" or _number(head[148:156]) != counted:
        raise ValueError("a header in it is broken")
    name = head[:_NAME_BYTES_MAX].rstrip(b"\0").decode("utf-8")
    # A link, a device, a directory, or a header that changes the next one.
    if head[156:157] != b"0" or head[345:500].strip(b"\0"):
        raise ValueError(f"{name!r} is not a plain file")
    if not (_ARTIFACT.match(name) or _LONG.match(name) or name in _NAMES or _is_safe_data(name)):
        raise ValueError(f"{name!r} has no place in a backup")
    size = _number(head[124:136])
    if size < 0:
        raise ValueError(f"{name!r} has no size")
    return name, size


_NAMES = frozenset({HEADER, CONFIG, MEMBERS, OWNERS, MAKERS, STORE, SEALED, MANIFEST, MANIFEST_SUM})


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:  # Beyond 8 GiB: binary, as GNU tar writes it.
        return int.from_bytes(raw[1:], "big") if raw[0] == 0x80 else -1
    return int(raw.rstrip(b"\0 ") or b"0", 8)


def _chunks(unpacked: _Unpacked, size: int) -> Iterator[bytes]:
    while size:
        chunk = unpacked.read(min(size, _CHUNK))
        if not chunk:
            raise EOFError("it is cut off")
        size -= len(chunk)
        yield chunk


def _is_data(member: str) -> bool:
    return member.startswith(("data/", "data-long/"))


def _is_safe_data(member: str) -> bool:
    return member.startswith("data/") and _is_safe(member.removeprefix("data/"))


def _is_safe(path: str) -> bool:
    """Whether a path stays below where it is put."""
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


# -- files -----------------------------------------------------------------------------------------


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """Give a private directory that is gone afterwards, whatever happens.

    What a killed process left of the same kind is swept first: its lock is free.

    Args:
        parent: Must exist.
        prefix: Begins the name, and tells the kind; starts with a dot.
    """
    with disk_errors(parent):
        for left in parent.glob(f"{prefix}*"):
            _sweep(left)
        path, lock = _locked_dir(parent, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked_dir(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # A file system without locks: then nobody sweeps there.
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:  # Else somebody swept it before it was locked.
            return path, lock
        os.close(lock)


def _sweep(path: Path) -> None:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # Somebody works there.
    finally:
        os.close(lock)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn "no space" and "over quota" into `BackupRefused`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise BackupRefused(f"the disk of {where} is full") from error
        raise

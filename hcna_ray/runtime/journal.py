"""What a runner leaves on its worker's disk: a journal of reports, a note of now, a stop order.

The journal outlives the process: after a crash its agent reads what had started and what had ended,
so that a finished attempt is not run again and an unfinished one is known to be lost. Nothing is
fsynced: after a power failure the attempt simply runs again.

Three small files per runner, all below ``outbox/<worker>/``:

``<name>.journal``  length-prefixed msgpack `Report` records not confirmed by the moderator yet
``<name>.note``     what runs now, rewritten in place; a checksum tells a torn read from a whole one
``<name>.stop``     tokens the agent wants stopped; written by the agent alone
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hcna_ray.core.models import Token
from hcna_ray.durable import write_private
from hcna_ray.runtime.messages import Report, ReportKind

_LENGTH = struct.Struct("<I")
#: Length and CRC-32 before a note.
_NOTE_HEAD = struct.Struct("<II")
_NOTE_BYTES = 1024
#: Until when, and the lowest generation; followed by a CRC-32.
_CONTACT = struct.Struct("<dQ")
_CHECKSUM = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Report)

#: Reports after which an attempt is over.
FINAL = frozenset(
    {
        ReportKind.COMPLETED,
        ReportKind.FAILED,
        ReportKind.LOST,
        ReportKind.CANCELLED,
        ReportKind.RETURNED,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What a runner's process is doing. ``task_id`` is empty while it does nothing."""

    pid: int
    #: When the process began (`process_birth`): tells it from a later one with the same id.
    born: int = 0
    task_id: str = ""
    generation: int = 0
    attempt: int = 0
    #: Seconds since the epoch.
    started_at: float = 0.0
    #: Seconds on CLOCK_BOOTTIME: when it started, and when its time is up.
    started_boot: float = 0.0
    deadline_boot: float = 0.0

    @property
    def token(self) -> Token:
        """Fencing token of what runs."""
        return Token(self.generation, self.attempt)

    def names(self, key: tuple[str, Token]) -> bool:
        """Whether the attempt with this task id and token runs."""
        return (self.task_id, self.token) == key


@dataclass(frozen=True, kw_only=True, slots=True)
class StopOrder:
    """One attempt that must end, and why: ``cancel``, ``timeout``, ``fenced`` or ``drain``.

    With the reason ``unstarted`` it must not begin; once it has, the order is void. With no task it
    names every attempt, or (with a generation) every one of an earlier generation.
    """

    task_id: str
    generation: int
    attempt: int
    reason: str

    def names(self, key: tuple[str, Token]) -> bool:
        """Whether the attempt with this task id and token is meant."""
        task_id, token = key
        if self.task_id:
            return (task_id, *token) == (self.task_id, self.generation, self.attempt)
        return not self.generation or token.generation < self.generation

    @property
    def names_all(self) -> bool:
        """Whether every attempt is meant, also each that is granted from now on."""
        return not self.task_id and not self.generation


_note_decoder = msgspec.msgpack.Decoder(Note)
_stops_decoder = msgspec.json.Decoder(list[StopOrder])


class RunnerFiles:
    """The three files of one runner. The runner writes journal and note, its agent the stop."""

    def __init__(self, folder: Path, name: str) -> None:
        """Name the files; nothing is opened yet."""
        self.name = name
        self.journal = folder / f"{name}.journal"
        self.note = folder / f"{name}.note"
        self.stop = folder / f"{name}.stop"

    def remove(self) -> None:
        """Delete all three. Harmless twice, and when it was interrupted the first time."""
        # The note goes last: by it the next agent finds what this one left.
        for path in (self.journal, self.stop, _scratch(self.stop), self.note):
            path.unlink(missing_ok=True)


class GenerationMark:
    """The highest generation of tokens that a worker has worked for, beside its outbox's journals.

    A restore raises the generation: whoever comes with a lower one serves a store that was
    replaced.
    """

    def __init__(self, outbox: Path) -> None:
        """Name the file; it need not exist."""
        self.path = outbox / "generation"
        #: What was read last, and of which file: `write` makes a new one.
        self._known: tuple[tuple[int, int], int] | None = None

    def read(self) -> int:
        """Return the highest generation seen; 0 if none is known."""
        try:
            found = os.stat(self.path)
            name = found.st_ino, found.st_mtime_ns
            if self._known is None or self._known[0] != name:
                self._known = name, int(self.path.read_text(encoding="ascii"))
            return self._known[1]
        except (OSError, ValueError):
            return 0

    def write(self, generation: int) -> None:
        """Remember a generation over a restart of this machine."""
        write_private(self.path, str(generation))


class ContactMark:
    """How long anything may begin on a worker, and of which store, beside its outbox's journals.

    Its agent writes it whenever the moderator has confirmed the worker; executors read it before
    each start. A machine that has slept, or processes that stood still, may wake when the lease of
    what they were granted is long over: the order to stop takes a moment, and nothing may begin in
    that. In place, sixteen bytes and a checksum: a read beside a write is noticed.
    """

    def __init__(self, outbox: Path) -> None:
        """Name the file; it need not exist."""
        self._path = outbox / "contact"
        self._file = -1

    def write(self, until_boot: float, generation: int) -> None:
        """Say until when, on CLOCK_BOOTTIME, and what is the lowest generation that may begin."""
        self._open(os.O_RDWR | os.O_CREAT)
        body = _CONTACT.pack(until_boot, generation)
        os.pwrite(self._file, body + _CHECKSUM.pack(zlib.crc32(body)), 0)

    def allows(self, generation: int, elapsed: float) -> bool:
        """Whether an attempt of a generation may begin now.

        Where nothing can be read, its agent could not write: then only its orders stop anything.
        """
        try:
            self._open(os.O_RDONLY)
            for _ in range(3):
                raw = os.pread(self._file, _CONTACT.size + _CHECKSUM.size, 0)
                body, checksum = raw[: _CONTACT.size], raw[_CONTACT.size :]
                if checksum == _CHECKSUM.pack(zlib.crc32(body)):
                    until_boot, lowest = _CONTACT.unpack(body)
                    return bool(elapsed <= until_boot and generation >= lowest)
        except OSError:
            pass
        return True

    def close(self) -> None:
        """Close the file. Harmless twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self, flags: int) -> None:
        if self._file < 0:
            self._file = os.open(self._path, flags | os.O_CLOEXEC, 0o600)


def forget_generations(outboxes: Path) -> None:
    """Let the workers of this machine work for another cluster, whatever its generation."""
    for folder in outboxes.glob("*"):
        GenerationMark(folder).path.unlink(missing_ok=True)


class JournalWriter:
    """The runner's end of journal and note. Used by one thread at a time."""

    def __init__(self, files: RunnerFiles) -> None:
        """Open (and create) journal and note."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._journal = os.open(files.journal, flags | os.O_APPEND, 0o600)
        self._note = os.open(files.note, flags, 0o600)
        self._size = os.fstat(self._journal).st_size
        self._stop = files.stop
        self._contact = ContactMark(files.stop.parent)

    def append(self, reports: Iterable[Report]) -> None:
        """Add reports in one write, whole or not at all.

        Raises:
            OSError: the disk took none of it.
        """
        parts: list[bytes] = []
        for report in reports:
            raw = _encoder.encode(report)
            parts += (_LENGTH.pack(len(raw)), raw)
        data = b"".join(parts)
        written = os.write(self._journal, data)
        if written < len(data):
            # A full disk takes what fits; half a record would hide all that follow it.
            os.ftruncate(self._journal, self._size)
            raise OSError(errno.ENOSPC, "the journal's disk is full")
        self._size += written

    def clear(self) -> None:
        """Forget everything: the moderator has confirmed it."""
        os.ftruncate(self._journal, 0)
        self._size = 0

    def write_note(self, note: Note) -> None:
        """Say what runs now."""
        raw = _encoder.encode(note)
        assert len(raw) + _NOTE_HEAD.size <= _NOTE_BYTES, "ids are bounded"
        os.pwrite(self._note, _NOTE_HEAD.pack(len(raw), zlib.crc32(raw)) + raw, 0)

    def read_stops(self) -> list[StopOrder]:
        """Return the agent's orders; cheap when there are none."""
        return read_stops(self._stop)

    def may_begin(self, token: Token, elapsed: float) -> bool:
        """Whether the worker's agent is in contact, with the store that gave this token."""
        return self._contact.allows(token.generation, elapsed)

    def close(self) -> None:
        """Close both files. What comes later fails, and strikes no file that took their number."""
        journal, note = self._journal, self._note
        self._journal = self._note = -1
        os.close(journal)
        os.close(note)
        self._contact.close()


def read_journal(files: RunnerFiles) -> list[Report]:
    """Return the reports a runner left. A torn last record, from a crash mid-write, is dropped."""
    try:
        raw = files.journal.read_bytes()
    except FileNotFoundError:
        return []
    reports: list[Report] = []
    position = 0
    while position + _LENGTH.size <= len(raw):
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size
        if position + length > len(raw):
            break
        try:
            reports.append(_decoder.decode(raw[position : position + length]))
        except msgspec.DecodeError:
            break
        position += length
    return reports


def read_note(files: RunnerFiles) -> Note | None:
    """Return what a runner is doing, or ``None`` before its first word or during a rewrite."""
    try:
        raw = files.note.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < _NOTE_HEAD.size:
        return None
    length, checksum = _NOTE_HEAD.unpack_from(raw)
    body = raw[_NOTE_HEAD.size : _NOTE_HEAD.size + length]
    if zlib.crc32(body) != checksum:
        return None
    try:
        return _note_decoder.decode(body)
    except msgspec.DecodeError:
        return None


def read_stops(path: Path) -> list[StopOrder]:
    """Return the stop orders in a file.

    One that cannot be read counts as empty: a signal handler and a starting agent look in here, and
    an order that is not obeyed ends in a SIGKILL anyway.
    """
    if not os.access(path, os.F_OK):
        return []  # As a rule, and asked before each start.
    try:
        return _stops_decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return []


def write_stops(files: RunnerFiles, orders: list[StopOrder]) -> None:
    """Replace the stop orders, atomically."""
    scratch = _scratch(files.stop)
    scratch.write_bytes(msgspec.json.encode(orders))
    scratch.replace(files.stop)


def process_birth(pid: int) -> int | None:
    """Return when a living process began, in clock ticks since boot; ``None`` if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    # Fields 3 (state) and 22 (starttime) of proc(5), counted after the command's name.
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _scratch(stop: Path) -> Path:
    return stop.with_suffix(".stop.new")


def unfinished(reports: Iterable[Report]) -> list[Report]:
    """Return the ``started`` reports for which no final report follows."""
    started: dict[tuple[str, Token], Report] = {}
    for report in reports:
        key = (report.task_id, Token(*report.token))
        if report.kind == ReportKind.STARTED:
            started[key] = report
        elif report.kind in FINAL:
            started.pop(key, None)
    return list(started.values())

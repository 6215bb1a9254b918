"""What a runner leaves on its worker's disk: a journal of reports, a note of now, a stop order.

The journal outlives the process: after a crash its agent reads what had started and what had ended,
so that a finished attempt is not run again and an unfinished one is known to be lost. Nothing is
fsynced: after a power failure the attempt simply runs again.

Three small files per runner, all below ``outbox/<worker>/``:

``<name>.journal``  length-prefixed msgpack `Report` records not confirmed by the moderator yet
``<name>.note``     what runs now, rewritten in place
``<name>.stop``     tokens the agent wants stopped; written by the agent alone
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hcna_ray.core.models import Token
from hcna_ray.runtime.messages import Report, ReportKind

_LENGTH = struct.Struct("<I")
_NOTE_BYTES = 1024
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StopOrder:
    """One attempt that must end, and why: ``cancel``, ``timeout``, ``fenced`` or ``retire``."""

    task_id: str
    generation: int
    attempt: int
    reason: str


class RunnerFiles:
    """The three files of one runner. The runner writes journal and note, its agent the stop."""

    def __init__(self, folder: Path, name: str) -> None:
        """Name the files; nothing is opened yet."""
        self.name = name
        self.journal = folder / f"{name}.journal"
        self.note = folder / f"{name}.note"
        self.stop = folder / f"{name}.stop"

    def remove(self) -> None:
        """Delete all three. Harmless twice."""
        for path in (self.journal, self.note, self.stop):
            path.unlink(missing_ok=True)


class JournalWriter:
    """The runner's end of journal and note. Used by one thread at a time."""

    def __init__(self, files: RunnerFiles) -> None:
        """Open (and create) journal and note."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._journal = os.open(files.journal, flags | os.O_APPEND, 0o600)
        self._note = os.open(files.note, flags, 0o600)
        self._stop = files.stop

    def append(self, reports: Iterable[Report]) -> None:
        """Add reports in one write."""
        parts: list[bytes] = []
        for report in reports:
            raw = _encoder.encode(report)
            parts += (_LENGTH.pack(len(raw)), raw)
        os.write(self._journal, b"".join(parts))

    def clear(self) -> None:
        """Forget everything: the moderator has confirmed it."""
        os.ftruncate(self._journal, 0)

    def write_note(self, note: Note) -> None:
        """Say what runs now."""
        raw = _encoder.encode(note)
        assert len(raw) + _LENGTH.size <= _NOTE_BYTES, "ids are bounded"
        os.pwrite(self._note, _LENGTH.pack(len(raw)) + raw, 0)

    def read_stops(self) -> list[StopOrder]:
        """Return the agent's orders; cheap when there are none."""
        return read_stops(self._stop)

    def close(self) -> None:
        """Close both files."""
        os.close(self._journal)
        os.close(self._note)


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
    if len(raw) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(raw)
    try:
        return msgspec.msgpack.decode(raw[_LENGTH.size : _LENGTH.size + length], type=Note)
    except msgspec.DecodeError:
        return None


def read_stops(path: Path) -> list[StopOrder]:
    """Return the stop orders in a file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    return msgspec.json.decode(raw, type=list[StopOrder])


def write_stops(files: RunnerFiles, orders: list[StopOrder]) -> None:
    """Replace the stop orders, atomically."""
    scratch = files.stop.with_suffix(".stop.new")
    scratch.write_bytes(msgspec.json.encode(orders))
    scratch.replace(files.stop)


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

"""The audit log as people keep it: checked in its store, written to files, checked there.

A file holds JSON lines: first what the next line follows, then one line for each of the log, and
at the end of an export (not of the moderator's own file) where it ended::

    {"schema":"hcna.audit.v1","anchor":{"number":0,"hash":"000..."}}
    {"number":1,"at":1.7e9,"time":"...","principal":"owner",...,"hash":"5f2..."}
    {"end":{"number":1,"hash":"5f2..."}}

Who can write the store can also write a chain anew, from any line to its end. So what counts is
also kept elsewhere: the moderator's files, an export, or a number and a hash on paper. The
moderator puts its files aside when the store does not go on where they end, so those are compared
too: only a restore, or commits that a server has lost, may have parted them from the store.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hcna_ray.core.audit import (
    RESTORED,
    SCHEMA,
    WENT_BACK,
    AuditPoint,
    ChainCheck,
    chain_hash,
)
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import AuditEntry
from hcna_ray.store.base import StoredAudit, TaskReader

#: Lines read at once.
PAGE = 1000
#: Longer lines are none of ours.
LINE_CHARS_MAX = 65536
#: In the names of files of another log than the one that is followed.
EARLIER = ".earlier-"
_ROTATED = re.compile(r"\.(\d+)")
_EARLIER = re.compile(re.escape(EARLIER) + r"(\d+)(?:\.(\d+))?")
#: Actions of lines behind which the log may be another one than before.
_REASONS = (RESTORED, WENT_BACK)
_TOO_YOUNG = (
    "is gone, and was too new to be pruned (unless limits.audit_retention_s was raised since)"
)


class AuditFileBroken(HcnaError):
    """A file is not an audit log that this hcna-ray wrote."""

    code = "audit_file_broken"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} is no audit log of ours: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """What a check of the chain has found."""

    #: What the first line follows, and the last line.
    anchor: AuditPoint
    head: AuditPoint
    #: Lines that were followed, and lines from before the log was chained.
    lines: int
    unchained: int
    #: The first problems, and how many there are in all.
    problems: tuple[str, ...]
    problem_count: int
    notes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem_count


class _Copy(NamedTuple):
    """A line as a file has it."""

    at: float
    mark: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parting:
    """The first line of some files that the store does not have."""

    name: str
    line: StoredAudit
    #: The store's line of that number, or else the next one.
    there: StoredAudit | None
    #: Whether the store has lines of these files before it.
    shares: bool
    #: Whether it is missing where lines were pruned, and is too new for that.
    is_young: bool


def verify_store(
    reader: TaskReader,
    *,
    expected: AuditPoint | None = None,
    file: Path | None = None,
    beside: Sequence[Sequence[Path]] = (),
    pruned_before: float = math.inf,
) -> AuditReport:
    """Follow the chain in a store, beside whoever writes and prunes.

    Args:
        reader: Of the store.
        expected: A line that was noted elsewhere.
        file: A file of the log; what it holds must be what the store holds.
        beside: Other files of the log, as `kept_files` returns them. The store may have left them
            where its own line tells why.
        pruned_before: What is younger may not have been pruned.

    Raises:
        AuditFileBroken: The file is none of ours.
    """
    kept = {} if file is None else {line.number: _copy(line) for line in read_file(file)}
    last_kept = max(kept, default=0)
    # Before the store is read to its end, so that it has the reasons by then.
    notes: list[str] = []
    partings = [_parting(reader, files, pruned_before, notes) for files in beside]
    state = reader.audit_state()
    check = ChainCheck(state.anchor, expected=expected)
    pruned_to = state.anchor.number
    differ: list[int] = []
    reasons: list[int] = []
    after = 0
    while lines := reader.audit_after(after, PAGE):
        if lines[0].number > check.head.number + 1:
            moved = reader.audit_state().anchor
            if moved.number > check.head.number and moved.number < lines[0].number:
                check.skip_to(moved)  # They were pruned while this went on.
                pruned_to = moved.number
        for line in lines:
            check.follow(*line)
            copy = kept.pop(line.number, None)
            if copy is not None and copy.mark != _mark(line):
                differ.append(line.number)
            if line.entry.action in _REASONS:
                reasons.append(line.number)
        after = lines[-1].number
    check.end(state.last)
    more: list[str] = []
    if differ:
        more.append(f"{len(differ)} lines, from {differ[0]} on, are other ones than in {file}")
    young = [
        number for number, copy in kept.items() if number <= pruned_to and copy.at >= pruned_before
    ]
    if young:
        more.append(f"line {min(young)} of {file} {_TOO_YOUNG}; there are {len(young)} such lines")
    if last_kept > max(check.head.number, state.last):
        more.append(f"the log ends with line {check.head.number}, {file} with line {last_kept}")
    for parting in partings:
        if parting is not None:
            explained, words = _judge(parting, reasons)
            (notes if explained else more).append(words)
    return _report(check, more, notes)


def kept_files(path: Path) -> list[list[Path]]:
    """Return the files that the moderator has put aside from its file of the log.

    Those of one log together, the oldest lines first.
    """
    found: dict[int, list[tuple[int, Path]]] = {}
    for one in sorted(path.parent.glob(f"{path.name}.*")):
        end = one.name[len(path.name) :]
        if match := _ROTATED.fullmatch(end):
            found.setdefault(0, []).append((int(match[1]), one))
        elif match := _EARLIER.fullmatch(end):
            found.setdefault(int(match[1]), []).append((int(match[2] or 0), one))
    return [
        [file for _age, file in sorted(files, reverse=True)]
        for _log, files in sorted(found.items())
    ]


def _parting(
    reader: TaskReader, files: Sequence[Path], pruned_before: float, notes: list[str]
) -> _Parting | None:
    """Return where a log's files and the store part, or None if they do not."""
    try:
        return _first_other(reader, files, pruned_before)
    except (AuditFileBroken, OSError) as error:
        # As after a power failure. What could be read of it is in the store.
        notes.append(f"not all of {files[-1].name} can be compared: {error}")
        return None


def _first_other(
    reader: TaskReader, files: Sequence[Path], pruned_before: float
) -> _Parting | None:
    store: Iterator[StoredAudit] | None = None
    there: StoredAudit | None = None
    shares, anchor = False, AuditPoint()
    for name, line in chain.from_iterable(map(_named, files)):
        if store is None:
            store = _lines_behind(reader, line.number - 1)
            there = next(store, None)
        while there is not None and there.number < line.number:
            there = next(store, None)
        if there is not None and there.number == line.number and _mark(there) == _mark(line):
            shares = True
            continue
        if line.number > anchor.number:
            anchor = reader.audit_state().anchor
        is_old, is_gone = line.entry.at < pruned_before, line.number <= anchor.number
        # If the two have nothing in common yet, what has parted them may be pruned as well.
        if is_old and (is_gone or not shares):
            continue
        return _Parting(name=name, line=line, there=there, shares=shares, is_young=is_gone)
    return None


def _judge(parting: _Parting, reasons: Collection[int]) -> tuple[bool, str]:
    """Return whether the store tells why it left some files, and what to say of it.

    Args:
        parting: Where it left them.
        reasons: Numbers of the store's lines that tell of restores and lost commits.
    """
    number, there = parting.line.number, parting.there
    if parting.is_young:
        return False, f"line {number} of {parting.name} {_TOO_YOUNG}"
    if there is not None and there.number in reasons:
        told = there.number
    else:
        # They may be of a log that had itself begun with a restore, or begin behind the reason.
        own = parting.line.entry.action in _REASONS
        told = min(
            (each for each in reasons if (own if each > number else not parting.shares)), default=0
        )
    if told:
        return True, f"{parting.name} is of another log from line {number} on, as line {told} tells"
    has = "none" if there is None or there.number != number else "another"
    return False, (
        f"{parting.name} has a line {number}, the store {has}, and no line tells of a restore or "
        "of lost commits there"
    )


def _named(path: Path) -> Iterator[tuple[str, StoredAudit]]:
    return ((path.name, line) for line in read_file(path))


def _lines_behind(reader: TaskReader, number: int) -> Iterator[StoredAudit]:
    while lines := reader.audit_after(number, PAGE):
        yield from lines
        number = lines[-1].number


def _copy(line: StoredAudit) -> _Copy:
    return _Copy(line.entry.at, _mark(line))


def _mark(line: StoredAudit) -> str:
    """Return what is the same in two copies of a line, also of one without a hash."""
    return line.hash or chain_hash("", line.number, line.entry)


def verify_file(path: Path, *, expected: AuditPoint | None = None) -> AuditReport:
    """Follow the chain in a file. A cut end shows in an export, or beside ``expected``.

    Raises:
        AuditFileBroken: The file is none of ours.
    """
    anchor, end = _ends(path)
    check = ChainCheck(anchor, expected=expected)
    for line in read_file(path):
        check.follow(*line)
    check.end(end.number if end is not None else check.head.number)
    more = []
    if end is not None and end.number == check.head.number and end != check.head:
        more.append(f"line {end.number} has another hash than the end of the file says")
    return _report(check, more, [])


def _report(check: ChainCheck, more: list[str], notes: list[str]) -> AuditReport:
    return AuditReport(
        anchor=check.anchor,
        head=check.head,
        lines=check.lines,
        unchained=check.unchained,
        problems=(*check.problems, *more),
        problem_count=check.problem_count + len(more),
        notes=(*check.notes, *notes),
    )


def export_lines(reader: TaskReader) -> Iterator[str]:
    """Yield the lines of an export, without their ends."""
    anchor = reader.audit_state().anchor
    yield first_line(anchor)
    after, head = 0, anchor
    while lines := reader.audit_after(after, PAGE):
        for line in lines:
            yield line_text(line)
            head = AuditPoint(line.number, line.hash or "")
        after = lines[-1].number
    yield _json({"end": {"number": head.number, "hash": head.hash}})


def first_line(anchor: AuditPoint) -> str:
    """Return the first line of a file whose next line follows a point."""
    return _json({"schema": SCHEMA, "anchor": {"number": anchor.number, "hash": anchor.hash}})


def line_text(line: StoredAudit) -> str:
    """Return a line of the log as it stands in a file."""
    entry = line.entry
    return _json(
        {
            "number": line.number,
            # As it was hashed.
            "at": float(entry.at) + 0.0,
            "time": _iso(entry.at),
            "principal": entry.principal,
            "action": entry.action,
            "target": entry.target,
            "outcome": entry.outcome,
            "detail": entry.detail,
            "hash": line.hash,
        }
    )


def read_file(path: Path) -> Iterator[StoredAudit]:
    """Yield the lines of a file, in its order.

    Raises:
        AuditFileBroken: A line is none of ours.
    """
    for data in _objects(path):
        if "number" in data:
            yield _line(path, data)


def _ends(path: Path) -> tuple[AuditPoint, AuditPoint | None]:
    """Return what a file's first line follows, and where it says that it ends."""
    anchor = end = None
    for data in _objects(path):
        if "anchor" in data:
            anchor = _point(path, data["anchor"])
        elif "end" in data:
            end = _point(path, data["end"])
    if anchor is None:
        raise AuditFileBroken(str(path), "its first line is missing")
    return anchor, end


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        number = 0
        while raw := stream.readline(LINE_CHARS_MAX):
            number += 1
            try:
                data = json.loads(raw)
            except (ValueError, RecursionError):
                if not raw.endswith("\n") and not stream.read(1):
                    return  # It was not written to its end; M1 writes it again.
                raise AuditFileBroken(str(path), f"its line {number} is not JSON") from None
            if not isinstance(data, dict):
                raise AuditFileBroken(str(path), f"its line {number} is no object")
            if number == 1 and (data.get("schema") != SCHEMA or "anchor" not in data):
                raise AuditFileBroken(str(path), f"it does not begin with {SCHEMA}")
            yield data


def _line(path: Path, data: dict[str, Any]) -> StoredAudit:
    try:
        names = ("principal", "action", "target", "outcome", "detail")
        texts = {name: data[name] for name in names}
        digest, number, at = data["hash"], data["number"], data["at"]
        right = all(isinstance(value, str) for value in texts.values())
        right &= isinstance(digest, str | None) and isinstance(number, int)
        if not right or isinstance(at, bool) or not isinstance(at, int | float):
            raise TypeError(f"line {number} has a field of another type")
    except (KeyError, TypeError) as error:
        raise AuditFileBroken(str(path), f"a field is missing or wrong ({error})") from None
    return StoredAudit(number, AuditEntry(at=float(at), **texts), digest)


def _point(path: Path, data: Any) -> AuditPoint:
    try:
        number, digest = data["number"], data["hash"]
    except (KeyError, TypeError) as error:
        raise AuditFileBroken(str(path), f"a field is missing ({error})") from None
    if not isinstance(number, int) or not isinstance(digest, str):
        raise AuditFileBroken(str(path), "a field is of another type")
    return AuditPoint(number, digest)


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"))


def _iso(at: float) -> str:
    try:
        moment = datetime.fromtimestamp(at, UTC)
    except (OverflowError, ValueError, OSError):
        return ""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

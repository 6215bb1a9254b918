"""The audit log as people keep it: checked in its store, written to files, checked there.

A file holds JSON lines: first what the next line follows, then one line for each of the log, and
at the end of an export (not of the moderator's own file) where it ended::

    {"schema":"hcna.audit.v1","anchor":{"number":0,"hash":"000..."}}
    {"number":1,"at":1.7e9,"time":"...","principal":"owner",...,"hash":"5f2..."}
    {"end":{"number":1,"hash":"5f2..."}}

Who can write the store can also write a chain anew, from any line to its end. So what counts is
also kept elsewhere: the moderator's file, an export, or a number and a hash on paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcna_ray.core.audit import SCHEMA, AuditPoint, ChainCheck
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import AuditEntry
from hcna_ray.store.base import StoredAudit, TaskReader

#: Lines read at once.
PAGE = 1000
#: Longer lines are none of ours.
LINE_CHARS_MAX = 65536


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


def verify_store(
    reader: TaskReader, *, expected: AuditPoint | None = None, file: Path | None = None
) -> AuditReport:
    """Follow the chain in a store, beside whoever writes and prunes.

    Args:
        reader: Of the store.
        expected: A line that was noted elsewhere.
        file: A file of the log; what it holds must be what the store holds.

    Raises:
        AuditFileBroken: The file is none of ours.
    """
    kept = {} if file is None else {line.number: line.hash for line in read_file(file)}
    state = reader.audit_state()
    check = ChainCheck(state.anchor, expected=expected)
    differ: list[int] = []
    after = 0
    while lines := reader.audit_after(after, PAGE):
        if lines[0].number > check.head.number + 1:
            moved = reader.audit_state().anchor
            if moved.number > check.head.number and moved.number < lines[0].number:
                check.skip_to(moved)  # They were pruned while this went on.
        for line in lines:
            check.follow(*line)
            if line.hash is not None and kept.get(line.number, line.hash) != line.hash:
                differ.append(line.number)
        after = lines[-1].number
    check.end(state.last)
    more: list[str] = []
    if differ:
        more.append(f"{len(differ)} lines, from {differ[0]} on, are other ones than in {file}")
    if kept and max(kept) > max(check.head.number, state.last):
        more.append(f"the log ends with line {check.head.number}, {file} with line {max(kept)}")
    return _report(check, more)


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
    return _report(check, more)


def _report(check: ChainCheck, more: list[str]) -> AuditReport:
    return AuditReport(
        anchor=check.anchor,
        head=check.head,
        lines=check.lines,
        unchained=check.unchained,
        problems=(*check.problems, *more),
        problem_count=check.problem_count + len(more),
        notes=tuple(check.notes),
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

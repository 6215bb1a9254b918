"""C15: secrets that were planted are found nowhere outside."""

from __future__ import annotations

import base64
import gzip
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.checker.findings import Outcome
from tests.checker.inputs import Run

_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    where: str
    text: str


def no_canary(run: Run) -> Outcome:
    """C15: no canary of the schedule is in any file of the run, nor in what ``scan`` names.

    ``canaries`` are planted secrets (keys, tokens), each of at least 8 characters. Files are read
    as bytes: logs, dumps, databases, cores, the output of ``ps``; ``.gz`` also unpacked. Looked for
    are the secret itself and its usual clothes: JSON and URL escapes, hex, base64 at each of its
    three offsets. What was encrypted or compressed otherwise is not seen.
    """
    out = Outcome("C15")
    schedule = run.schedule
    assert schedule is not None
    canaries = [str(one) for one in schedule.get("canaries", [])]
    if not canaries:
        out.missing = "no canaries were planted"
        return out
    if short := [one for one in canaries if len(one) < 8]:
        out.note(len(short), "canaries are too short to be told from chance")
    needles = {form: name for name in canaries if len(name) >= 8 for form in forms(name)}
    longest = max((len(one) for one in needles), default=0)
    roots = [run.folder, *(Path(one) for one in schedule.get("scan", []))]
    unread = 0
    for path in _files(roots, {run.folder / "schedule.json"}):
        out.examined += 1
        try:
            for name, offset in _search(path, needles, longest):
                number = canaries.index(name) + 1
                place = _Place(f"{_short(path, run.folder)}@{offset}", f"canary {number}")
                out.report(None, f"canary {number} is in {place.where}", place)
        except OSError:
            unread += 1
    out.note(unread, "files could not be read")
    return out


def forms(secret: str) -> Iterator[bytes]:
    raw = secret.encode()
    yield raw
    yield json.dumps(secret)[1:-1].encode()
    yield urllib.parse.quote(secret, safe="").encode()
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for shift in range(3):
        # The characters that depend on what stands before and after are left off.
        coded = base64.b64encode(b"\0" * shift + raw)
        first, last = (shift * 8 + 5) // 6, (shift + len(raw)) * 8 // 6
        yield coded[first:last]
        yield base64.urlsafe_b64encode(b"\0" * shift + raw)[first:last]


def _files(roots: list[Path], leave: set[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and path not in leave and path not in seen:
                seen.add(path)
                yield path


def _search(path: Path, needles: dict[bytes, str], longest: int) -> Iterator[tuple[str, int]]:
    """Yield each canary found in a file once, with where."""
    found: set[str] = set()
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        tail, start = b"", 0
        while chunk := file.read(_CHUNK):
            window = tail + chunk
            for needle, name in needles.items():
                if name not in found and (at := window.find(needle)) >= 0:
                    found.add(name)
                    yield name, start + at
            tail = window[-longest:]
            start += len(window) - len(tail)


def _short(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)

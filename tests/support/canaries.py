"""Secrets that are planted, and places where they must not turn up.

A canary is found as it stands and in its usual clothes: JSON and URL escapes, hex, base64. The
forms are those of the checker, which looks for them in the files of a recorded run.
"""

from __future__ import annotations

import gzip
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import zstandard

from tests.checker.checks.secrets import forms as forms_of

CHUNK = 4 << 20
#: Shorter ones are told from chance by nobody.
CHARS_MIN = 8


@dataclass(frozen=True, slots=True)
class Hit:
    """A secret where it must not be."""

    #: The slot that it was planted in.
    name: str
    where: str


class Canaries:
    """Secrets by the slot that they are in. What they are is never part of a message."""

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self._known: dict[str, str] = {}
        self._forms: dict[bytes, str] = {}
        self._longest = 1
        for name, secret in (known or {}).items():
            self.add(name, secret)

    def __len__(self) -> int:
        return len(self._known)

    def names(self) -> list[str]:
        return sorted(self._known)

    def plant(self, name: str) -> str:
        """Make up a secret for a slot."""
        secret = f"canary{secrets.token_hex(20)}"
        self.add(name, secret)
        return secret

    def add(self, name: str, secret: str) -> None:
        """Take up a secret that the product made."""
        assert len(secret) >= CHARS_MIN, name
        self._known[name] = secret
        for form in forms_of(secret):
            self._forms.setdefault(form, name)
            self._longest = max(self._longest, len(form))

    def within(self, raw: bytes) -> list[str]:
        """Return the slots whose secrets are in some bytes."""
        return sorted({name for form, name in self._forms.items() if form in raw})

    def in_file(self, path: Path) -> list[str]:
        """Return the slots whose secrets are in a file, or in what it packs (``.gz``, ``.zst``)."""
        found: set[str] = set()
        for opened in (_plain, *_PACKED.get(path.suffix, ())):
            tail = b""
            try:
                with opened(path) as file:
                    while chunk := file.read(CHUNK):
                        found.update(self.within(tail + chunk))
                        tail = (tail + chunk)[-self._longest :]
            except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError):
                continue  # Cut off, or no archive after all: it was searched as it stands.
        return sorted(found)

    def in_folders(self, folders: Iterable[Path], *, homes: Iterable[Path] = ()) -> list[Hit]:
        """Search files, their names and where links lead.

        Args:
            folders: Where to look, with all that is below.
            homes: Files and folders in which a secret is at home.
        """
        left_out = {path.resolve() for path in homes}
        hits: list[Hit] = []
        for folder in folders:
            for path in _files(folder, left_out):
                where = str(path)
                hits += [Hit(name, f"the name {where}") for name in self.within(where.encode())]
                try:
                    if path.is_symlink():
                        found = self.within(os.readlink(path).encode())
                    else:
                        found = self.in_file(path) if path.is_file() else []
                except OSError:
                    continue  # Gone meanwhile.
                hits += [Hit(name, where) for name in found]
        return hits

    def in_processes(self, pids: Iterable[int] | None = None, *, environ: bool = True) -> list[Hit]:
        """Search command lines and environments of processes, by default of all that we may see."""
        if pids is None:
            pids = [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()]
        hits: list[Hit] = []
        for pid in pids:
            for name in ("cmdline", "environ") if environ else ("cmdline",):
                path = Path(f"/proc/{pid}/{name}")
                try:
                    raw = path.read_bytes()
                except OSError:
                    continue
                hits += [Hit(found, str(path)) for found in self.within(raw)]
        return hits


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _gunzipped(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _unzstd(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", zstandard.open(path, "rb"))


_PACKED: Mapping[str, tuple[Callable[[Path], IO[bytes]], ...]] = {
    ".gz": (_gunzipped,),
    ".zst": (_unzstd,),
}


def _files(folder: Path, left_out: set[Path]) -> Iterator[Path]:
    if folder.resolve() in left_out:
        return
    if folder.is_symlink() or not folder.is_dir():
        yield folder
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return
    for path in inside:
        yield from _files(path, left_out)

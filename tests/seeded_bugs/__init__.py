"""Seeded bugs: the product is broken on purpose, one patch at a time, to see which test notices.

``NN-name.patch`` are the twenty bugs that `make seeded-bugs` must see, ``extra/`` holds more of
them. Before the first ``---`` a patch says in words what is broken and which promise breaks with
it; its line ``Seen by:`` names the parts of the fault programme that are meant to notice.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent

_SEEN_BY = "Seen by:"
_BREAKS = "Breaks:"
_TARGET = re.compile(r"^\+\+\+ b/(\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One patch."""

    #: ``01-ack-before-commit``, or ``extra/01-returned-number-used-again``.
    name: str
    path: Path
    what: str
    breaks: str
    #: Parts of the programme, the likeliest first.
    seen_by: tuple[str, ...]
    #: Files that it changes.
    files: tuple[str, ...]


def read_bug(path: Path) -> Bug:
    """Read a patch's header.

    Raises:
        ValueError: it does not say what it should.
    """
    text = path.read_text()
    header, separator, body = text.partition("\n--- ")
    what, breaks_at, rest = header.partition(_BREAKS)
    breaks, seen_at, parts = rest.partition(_SEEN_BY)
    if not (separator and breaks_at and seen_at):
        raise ValueError(f"{path.name}: a patch says what is broken, what it breaks, who sees it")
    return Bug(
        name=str(path.relative_to(FOLDER).with_suffix("")),
        path=path,
        what=" ".join(what.split()),
        breaks=" ".join(breaks.split()),
        seen_by=tuple(one.strip() for one in parts.split(",")),
        files=tuple(_TARGET.findall("--- " + body)),
    )


def all_bugs() -> dict[str, Bug]:
    """Return every bug by name: the twenty first, then the others."""
    paths = [*sorted(FOLDER.glob("*.patch")), *sorted(FOLDER.glob("extra/*.patch"))]
    return {bug.name: bug for bug in map(read_bug, paths)}


def apply(bug: Bug, tree: Path) -> None:
    """Apply a patch to a copy of the tree.

    One line of context is enough, or in the end what is replaced alone, so that edits nearby do not
    make a patch useless.

    Raises:
        ValueError: it does not fit any more.
    """
    told = ""
    for context in (1, 0):
        done = subprocess.run(
            ["git", "apply", f"-C{context}", str(bug.path)],
            cwd=tree,
            # The copy is no repository, and must not be taken for a part of one around it.
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return
        told = done.stderr.strip()
    raise ValueError(f"{bug.name} does not apply: {told}")

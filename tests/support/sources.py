"""What was tested or measured: the commit, and a hash of the sources."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Files that decide what the product does.
PRODUCT = frozenset({".py", ".sql", ".yaml"})


def digest(
    *folders: str, suffixes: Collection[str] = PRODUCT, without: Collection[str] = ()
) -> str:
    """Return a short hash of files below some folders of the repository.

    Args:
        folders: Relative to its root.
        suffixes: Which files count.
        without: Names of files that do not.
    """
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.name not in without and path.suffix in suffixes:
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def commit() -> str:
    """Return the commit that is checked out, with ``+`` if something was changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"

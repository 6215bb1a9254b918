"""Files of results, one JSON object a line, that a run may have left in the middle of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Kept = TypeVar("Kept")


def read(path: Path, make: Callable[..., Kept]) -> list[Kept]:
    """Return what the lines of a file make; a torn line, or one of another form, is left out."""
    found: list[Kept] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(make(**json.loads(line)))
        except (TypeError, ValueError):
            continue
    return found

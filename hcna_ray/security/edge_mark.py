"""The edge's mark: a secret by which C1 knows that what it is told of a client comes from the edge.

Any program on M1 can speak to Serve on loopback and say there who it speaks for. Only who can read
the cluster's directory knows the mark.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from hcna_ray.durable import write_private

_NAME = "edge.mark"
_FORM = re.compile(r"[0-9a-f]{64}")


def ensure_edge_mark(directory: Path) -> str:
    """Return the mark; make one if there is none. The supervisor alone calls this."""
    found = read_edge_mark(directory)
    if found is None:
        found = secrets.token_hex(32)
        write_private(directory / _NAME, found + "\n")
    return found


def read_edge_mark(directory: Path) -> str | None:
    """Return the mark, or None if there is none that will do."""
    try:
        text = (directory / _NAME).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _FORM.fullmatch(text) else None

"""What is done to keys, certificates and members beside the moderator, on its way to the audit log.

The owner's commands on M1 and the gate change files; the moderator may be away meanwhile, and it
alone writes the log. So each act is left in a file of its own, and the moderator takes it up:
within seconds, or when it is back. An act counts, and is then left; what dies between the two has
acted without a line.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from hcna_ray.core.audit import clipped
from hcna_ray.core.models import OWNER, AuditEntry
from hcna_ray.durable import write_private

log = logging.getLogger(__name__)

SCHEMA = 1
#: So many wait at most; who could make more of them must not fill the disk.
WAITING_MAX = 10_000
#: Of these, so many may be refusals, which any stranger can bring about, and so many what machines
#: did. The rest is left for the owner's own acts.
REFUSED_MAX = 5_000
MACHINES_MAX = 9_000
#: A file that is longer is none of ours.
_FILE_BYTES_MAX = 64 * 1024


class Waiting(NamedTuple):
    """An act that no line tells yet."""

    path: Path
    entry: AuditEntry


def leave(
    folder: Path,
    action: str,
    target: str,
    *,
    principal: str = OWNER,
    outcome: str = "done",
    detail: str = "",
) -> bool:
    """Leave an act for the moderator. It is done already, so trouble here is only logged.

    Args:
        folder: `Settings.acts_dir`.
        action: As in ``key.created``.
        target: What it was done to.
        principal: Who did it: the owner, at M1's own shell, or the machine that asked.
        outcome: ``done`` or ``refused``.
        detail: More of it, without secrets.

    Returns:
        Whether it will be on record.
    """
    at_ns = time.time_ns()
    entry = AuditEntry(
        at=at_ns / 1e9,
        principal=principal,
        action=action,
        target=target,
        outcome=outcome,
        detail=detail,
    )
    path = folder / f"{at_ns:020}-{secrets.token_hex(4)}.json"
    most = WAITING_MAX if principal == OWNER else MACHINES_MAX
    most = REFUSED_MAX if outcome == "refused" else most
    try:
        if folder.is_dir() and len(os.listdir(folder)) >= most:
            raise OSError(f"{most} acts wait in {folder} already")
        write_private(path, json.dumps({"schema": SCHEMA, **asdict(clipped(entry))}) + "\n")
    except OSError as error:
        log.error(
            "%s %s is not put on record: %s",
            action,
            target,
            error,
            extra={"action": "audit.act_lost", "act": action, "target": target},
        )
        return False
    return True


def waiting(folder: Path, limit: int) -> list[Waiting]:
    """Return what was left, oldest first. A file that is no act is told as one itself."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    found = []
    for name in names[:limit]:
        path = folder / name
        try:
            found.append(Waiting(path, _read(path)))
        except FileNotFoundError:
            continue
    return found


def drop(done: Iterable[Waiting]) -> None:
    """Forget acts that are on record."""
    for one in done:
        one.path.unlink(missing_ok=True)


def _read(path: Path) -> AuditEntry:
    with path.open("rb") as stream:
        raw = stream.read(_FILE_BYTES_MAX + 1)
        at = os.fstat(stream.fileno()).st_mtime
    try:
        data = json.loads(raw)
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        at = float(data.pop("at"))
        texts = {name: str(value) for name, value in data.items()}
        return clipped(AuditEntry(at=at, **texts))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return AuditEntry(
            at=at,
            principal="",
            action="audit.act_unreadable",
            target=path.name[:64],
            outcome="refused",
            detail=str(error)[:200],
        )

"""The moderator takes up what was done beside it, and puts it on record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import AuditEntry
from hcna_ray.security import acts

#: Taken up at once.
TAKEN_MAX = 200
#: The end of the log that is looked through for what an earlier moderator has written already.
_LOOKED_THROUGH = 2 * TAKEN_MAX

#: The newest lines of the audit log, so many at most.
Newest = Callable[[int], Awaitable[list[AuditEntry]]]
#: Commits lines, each an argument.
Note = Callable[..., Awaitable[object]]


async def take_up(folder: Path, newest: Newest, note: Note) -> int:
    """Put on record what was left in a folder; return how many lines that made.

    Each act makes one line, also when the moderator dies between the commit and the file's end:
    whoever comes next finds the line.

    Args:
        folder: `Settings.acts_dir`.
        newest: Reads the log.
        note: Writes to it.
    """
    found = await asyncio.to_thread(acts.waiting, folder, TAKEN_MAX)
    if not found:
        return 0
    try:
        known = set(await newest(_LOOKED_THROUGH))
        fresh = [one.entry for one in found if one.entry not in known]
        if fresh:
            await note(*fresh)
    except HcnaError:  # A store that is away, or full: they wait on.
        return 0
    await asyncio.to_thread(acts.drop, found)
    return len(fresh)

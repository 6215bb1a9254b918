"""Numbers that must never be given twice, also where a store goes on from a past of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable

#: Facts, or ends, that no system commits more of in a second: see `numbers_to_skip`.
NUMBERS_PER_S = 1_000_000


def generation_above(known: Iterable[int], *, created_at: float, now: float) -> int:
    """Return a generation above every one that tokens were made with.

    The store that was lost may have been restored itself after this backup was made, even from this
    very archive: counting on from the archive's number would give the same one twice, with any
    step. But only a restore raises the generation, and each restore takes the time of day in
    milliseconds (or more): so every generation that exists is at most the time of the restore that
    made it, and this restore is later. Two restores are told apart if their machines' clocks
    differ by less than the time between them; a generation that is known, such as that of a store
    that is being replaced, does not even need that.

    Args:
        known: Generations that were out, as far as they are known.
        created_at: When what goes on was last whole.
        now: Seconds since the epoch.
    """
    highest = max(known)
    return max(int(max(now, created_at) * 1000), highest + 1)


def numbers_to_skip(*, created_at: float, now: float) -> int:
    """Return by how much the sequences of facts and ends must leap.

    Readers remember these numbers ("everything after N"). Those that the lost store gave since the
    backup were fewer than `NUMBERS_PER_S` times the seconds; a second restore of the same archive
    leaps further than the first one and all that followed it came.
    """
    return (math.ceil(max(0.0, now - created_at)) + 1) * NUMBERS_PER_S

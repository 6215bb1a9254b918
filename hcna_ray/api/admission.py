"""How many requests of each sort are in progress at once, counted and never queued.

A request that finds its budget full is refused at once with 503 and ``Retry-After``: an unbounded
queue only turns overload into timeouts. The budgets are apart, so that thousands of clients waiting
for a result take nothing from those who submit.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from hcna_ray.core.errors import Overloaded


class Sort(StrEnum):
    """What a request costs, roughly."""

    WRITE = "write"
    READ = "read"
    WAIT = "wait"
    #: Event streams and logs that are followed, from their beginning to their end.
    STREAM = "stream"
    #: Large bodies held in memory: batches, and parts of uploads.
    BATCH = "batch"
    UPLOAD = "upload"
    #: Health checks and scrapes: few, and never in the way of one another.
    PROBE = "probe"


#: Large bodies in memory at once: 4 of 64 MiB, 16 of 8 MiB.
BATCHES_MAX = 4
UPLOADS_MAX = 16
PROBES_MAX = 64


class Admission:
    """Budgets of one replica. Invariant: ``in_progress[sort] <= budgets[sort]``."""

    def __init__(self, *, writes: int, reads: int, waits: int, streams: int) -> None:
        self.budgets: Mapping[Sort, int] = {
            Sort.WRITE: writes,
            Sort.READ: reads,
            Sort.WAIT: waits,
            Sort.STREAM: streams,
            Sort.BATCH: BATCHES_MAX,
            Sort.UPLOAD: UPLOADS_MAX,
            Sort.PROBE: PROBES_MAX,
        }
        self.in_progress: dict[Sort, int] = dict.fromkeys(Sort, 0)
        self.refused: dict[Sort, int] = dict.fromkeys(Sort, 0)

    def take(self, sort: Sort) -> None:
        """Count a request from here on; who took a place gives it back.

        Raises:
            Overloaded: the budget is used up.
        """
        if self.in_progress[sort] >= self.budgets[sort]:
            self.refused[sort] += 1
            raise Overloaded(
                f"{self.budgets[sort]} {sort.value} requests are in progress, the most allowed; "
                "try again in a moment"
            )
        self.in_progress[sort] += 1

    def give(self, sort: Sort) -> None:
        """The request is no longer in progress."""
        self.in_progress[sort] -= 1

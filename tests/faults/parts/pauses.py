"""Parts of M1 and of its workers that stand still for longer than a lease, under load.

More pauses of workers are in the epochs of `partitions`, beside the cuts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.stack import Stack, allowed, eventually, stack
from tests.faults.still import stand_still

LINE = "pauses beyond the lease"
#: Where, what and for how long. A GCS that does not answer for longer than 10 s is replaced.
STEPS = (
    ("M1", "moderator", 40.0),
    ("W1", "slot", 60.0),
    ("M1", "gcs", 40.0),
    ("M1", "moderator", 75.0),
    ("W2", "executor", 50.0),
    ("M1", "c1", 45.0),
    ("W1", "host", 60.0),
)


class Pauses:
    """See this module."""

    name = "pauses"
    title = "processes of M1 and whole hosts that stand still for longer than a lease"
    budget_s = 900.0
    needs_root = True
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the epoch."""
        if size is Size.SLICE:
            return []
        return [Case(name="epoch-01", seed=seed, options={"steps": [list(one) for one in STEPS]})]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Bring up M1 and two workers."""
        with stack(folder, seed=3, workers=("w1", "w2"), per_second=4.0) as shared:
            yield lambda case, own: run_epoch(shared, case, own)


def run_epoch(on: Stack, case: Case, folder: Path) -> Outcome:
    """Stop one after the other; then have it all checked."""
    draw = random.Random(case.seed)
    since, troubles = len(on.faults), []
    on.clients.go_on()
    for where, what, seconds in case.options["steps"]:
        if not eventually(on.all_online, 150.0, 1.0):
            troubles.append(f"not all workers are back before the pause of {where} {what}")
        time.sleep(draw.uniform(3.0, 8.0))
        troubles += stand_still(on, where, what, seconds)
        if what == "moderator":
            title = "moderator stood still: accepting again"
            at = float(on.faults[-1]["until"])
            on.clients.probe(True)
            when = eventually(lambda at=at: on.clients.accepted_after(at), 60.0)  # type: ignore[misc]
            on.clients.probe(False)
            if when is None:
                troubles.append(f"{title}: not within 60 s, allowed are {allowed(title):g} s")
            else:
                on.took(title, when - at)
    drained = on.settle()
    out = on.judge(folder, drained, since)
    out.violations = troubles + out.violations
    out.counts = {LINE: len(case.options["steps"])}
    return out


PART = Pauses()

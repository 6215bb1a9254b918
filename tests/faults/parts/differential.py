"""The same operations on the store in memory, SQLite and PostgreSQL, each below a whole moderator.

What is compared is everything that can be observed: answers, ended tasks, numbers of facts, how
long the moderator would sleep, and every query that a writer or a reader may make. Durability is
not what is looked at here: the server of PostgreSQL and the disk of SQLite need not sync.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.property.office_walk import OfficeTally
from tests.property.offices import Home, homes, sequence
from tests.support.postgres import PostgresServer

SEQUENCES = "differential sequences"
#: Where nothing has to wait for a disk, if there is such a place.
QUICK = Path("/dev/shm")


class Differential:
    """Three stores, one behaviour."""

    name = "differential"
    title = "memory, SQLite and PostgreSQL answer the same operations alike"
    budget_s = 1500.0
    needs_root = False
    only_when_named = False
    side_by_side = True

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Sequences in cases of a hundred; the slice has a few."""
        count, each = (1, 25) if size is Size.SLICE else (100, 100)
        return [
            Case(
                name=f"sequences-{number:02}",
                seed=Random(f"{seed} differential {number}").getrandbits(40),
                options={"sequences": each},
            )
            for number in range(count)
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Start a PostgreSQL server, and keep one connection to it."""
        with ExitStack() as stack:
            where = QUICK if QUICK.is_dir() else folder
            quick = stack.enter_context(tempfile.TemporaryDirectory(prefix="hcna-", dir=where))
            server = PostgresServer()
            stack.callback(server.remove)
            server.start()
            found = stack.enter_context(homes(Path(quick), server))
            yield lambda case, _folder: run(case, found)


def run(case: Case, found: Sequence[Home]) -> Outcome:
    """Make a case's sequences; each has a seed of its own."""
    logging.getLogger("hcna_ray").setLevel(logging.CRITICAL)  # It has much to complain of.
    outcome, tally = Outcome(), OfficeTally()
    seeds = Random(case.seed)
    made = 0
    for _ in range(int(case.options["sequences"])):
        seed = seeds.getrandbits(48)
        try:
            sequence(seed, found, tally)
        except Exception as error:
            outcome.violations.append(f"sequence {seed}: {type(error).__name__}: {error}")
            break
        made += 1
    outcome.counts[SEQUENCES] = made
    stores = ", ".join(home.name for home in found)
    outcome.notes.append(f"{tally.steps} operations on memory, {stores}")
    return outcome


PART = Differential()

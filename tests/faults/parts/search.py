"""All states that two tasks, two workers and one fault of each kind can reach.

With all kinds of faults at once there are more states than fit anywhere; so all are there at once
for one task, and any two of them for two tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.property.search import Rules, Search, begin

STATES = "states searched"
KINDS = ("cuts", "crashes", "pauses", "cancels")


class StateSearch:
    """Breadth first, to the last state."""

    name = "search"
    title = "every state of two tasks and two workers under a crash, a partition and a pause"
    budget_s = 600.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Nothing is random; the slice searches what is small."""
        if size is Size.SLICE:
            return [_case(1, kinds, seed) for kinds in (KINDS[:2],)]
        return [
            _case(1, KINDS, seed),
            *(_case(2, (kind,), seed) for kind in KINDS),
            *(_case(2, pair, seed) for pair in itertools.combinations(KINDS, 2)),
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        yield run


def _case(tasks: int, kinds: Sequence[str], seed: int) -> Case:
    return Case(
        name="-".join((f"{tasks}-task{'s' * (tasks > 1)}", *kinds)),
        seed=seed,
        options={"tasks": tasks, "faults": list(kinds)},
    )


def run(case: Case, folder: Path) -> Outcome:
    """Search one world."""
    faults = case.options["faults"]
    search = Search(Rules())
    first = begin(**{kind: int(kind in faults) for kind in KINDS})
    if case.options["tasks"] == 1:
        first = search.without_the_first(first)
    found = search.run(first)
    outcome = Outcome(counts={STATES: found.states})
    outcome.notes.append(f"{found.transitions} transitions, {found.ends} ends")
    if found.violation:
        outcome.violations.append(f"{found.violation}, after: {'; '.join(found.path)}")
    return outcome


PART = StateSearch()

"""Millions of steps of the pure rules and of the whole moderator, through worlds full of trouble.

Neither Ray nor a process nor a disk takes part, so that what goes wrong can go wrong thousands of
times a second: messages lost, doubled and late, crashes, restored backups, cancels, poison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

from hcna_ray.core import diagram
from hcna_ray.core.events import EVENT_TYPES
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.property import office_walk
from tests.property.task_world import STEPS_PER_WORLD, TaskWorld, drive
from tests.property.walk import walk
from tests.property.world import Tally

HYPOTHESIS = "model steps, Hypothesis"
WALK = "model steps, random walk"
MODERATOR = "moderator steps, random walk"
#: Steps from which on a case is expected to have reached everything that can be reached.
ENOUGH = 50_000


class Model:
    """The rules as a model, by three ways of choosing what happens next."""

    name = "model"
    title = "the task rules and the moderator in worlds of faults, step by step"
    budget_s = 2400.0
    needs_root = False
    only_when_named = False
    side_by_side = True

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Twenty cases of each kind; the slice has one of each walk."""
        if size is Size.SLICE:
            # The Hypothesis steps of `make test` are those of tests/property.
            return [
                *_cases("walk", 1, 30_000, seed),
                *_cases("moderator", 1, 6_000, seed),
            ]
        return [
            *_cases("hypothesis", 20, 50_000, seed),
            *_cases("moderator", 20, 20_000, seed),
            *_cases("walk", 20, 500_000, seed),
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        yield run


def _cases(kind: str, count: int, steps: int, seed: int) -> list[Case]:
    return [
        Case(
            name=f"{kind}-{number:02}",
            seed=Random(f"{seed} {kind} {number}").getrandbits(40),
            options={"kind": kind, "steps": steps},
        )
        for number in range(count)
    ]


def run(case: Case, folder: Path) -> Outcome:
    """Make a case's steps."""
    kinds: dict[str, Callable[[Case], Outcome]] = {
        "hypothesis": _hypothesis,
        "walk": _walk,
        "moderator": _moderator,
    }
    return kinds[str(case.options["kind"])](case)


def _hypothesis(case: Case) -> Outcome:
    tally, steps = Tally(), int(case.options["steps"])

    class Counted(TaskWorld):
        """The same world, counted apart."""

    Counted.tally = tally
    outcome = Outcome()
    number = case.seed
    while tally.steps < steps and not outcome.violations:
        worlds = max(1, min(500, 1 + (steps - tally.steps) // STEPS_PER_WORLD))
        try:
            drive(Counted, number=number, worlds=worlds)
        except Exception as error:
            told = "\n".join([f"{type(error).__name__}: {error}", *_notes(error)])
            outcome.violations.append(f"round {number} of Hypothesis: {told}")
        number += 1
    outcome.counts[HYPOTHESIS] = tally.steps
    return _complete(outcome, tally)


def _notes(error: BaseException) -> list[str]:
    """Return how Hypothesis came to it."""
    return list(getattr(error, "__notes__", ()))


def _walk(case: Case) -> Outcome:
    walked = walk(case.seed, int(case.options["steps"]))
    outcome = Outcome(violations=walked.violations, counts={WALK: walked.tally.steps})
    return _complete(outcome, walked.tally)


def _moderator(case: Case) -> Outcome:
    tally = office_walk.walk(case.seed, int(case.options["steps"]))
    seen = ", ".join(f"{count} {what}" for what, count in sorted(tally.seen.items()))
    return Outcome(
        violations=tally.violations,
        counts={MODERATOR: tally.steps},
        notes=[f"{tally.worlds} worlds: {seen}"],
    )


def _complete(outcome: Outcome, tally: Tally) -> Outcome:
    """Make sure that the steps went everywhere: what was never met was never judged."""
    outcome.notes.append(f"{tally.worlds} worlds, {len(tally.moves)} kinds of moves")
    if tally.steps >= ENOUGH and not outcome.violations:
        drawn = {
            (before, event, after)
            for (before, after), names in diagram.arrows().items()
            for event in names
        }
        seen = {move for move in tally.moves if move[0] is not move[2]}
        events = {event.__name__ for event in EVENT_TYPES} - {event for _, event, _ in tally.moves}
        if seen != drawn or events:
            outcome.violations.append(
                f"the drawing of the rules and what happened differ: {seen ^ drawn}, {events}"
            )
    return outcome


PART = Model()

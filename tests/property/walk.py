"""A random walk through the small world, without Hypothesis: many more steps in the same time.

Nothing is shrunk. A walk is made of worlds, and each has a seed of its own, from which everything
in it follows; ``python -m tests.property.walk SEED`` walks through one again and tells every step.
Worlds are unlike each other on purpose: each draws anew how often what happens in it.
"""

from __future__ import annotations

import itertools
import sys
from bisect import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.property.actions import ACTIONS, Action, Life
from tests.property.world import Tally, World

#: Steps of one world, at least and at most.
STEPS = (40, 400)
#: How much more or less often something happens in one world than in another.
FACTORS = (0.0, 0.3, 1.0, 1.0, 1.0, 3.0)
#: Steps that are told of a walk that broke a promise.
TOLD = 40
#: Tries to draw something possible before the choice is made among what is.
TRIES = 40

_ALL: list[tuple[str, Action]] = [
    (group, action) for group, actions in ACTIONS.items() for action in actions
]


@dataclass(kw_only=True)
class Walked:
    """What became of a walk."""

    tally: Tally = field(default_factory=Tally)
    #: Broken promises, each with the seed of its world and its last steps.
    violations: list[str] = field(default_factory=list)


class Walker(Life):
    """One world on its way."""

    def __init__(self, seed: int, tally: Tally) -> None:
        """Begin a world, whose ways are drawn from its seed."""
        self.random = Random(seed)
        self.world = World(tally)
        self.length = self.random.randint(*STEPS)
        self.told: deque[str] = deque(maxlen=TOLD)
        # Life itself goes on in every world; what goes wrong differs.
        weights = [
            action.weight * (1.0 if group == "life" else self.random.choice(FACTORS))
            for group, action in _ALL
        ]
        self._sums = list(itertools.accumulate(weights))
        self._tally = tally

    def walk(self, tell: Callable[[str], None] | None = None) -> None:
        """Make all steps, then let the world come to rest.

        Raises:
            BrokenPromise: and what happened last stands in ``told``.
        """
        world, tally = self.world, self._tally
        tally.worlds += 1
        for _ in range(2 + self.pick(3)):
            self.submit()
        for number in range(self.length):
            action = self._draw()
            line = f"{number} {action.do.__name__} at {world.clock:.1f}"
            self.told.append(line)
            if tell is not None:
                tell(line)
            tally.steps += 1
            action.do(self)
            world.check()
        world.drain()

    def _draw(self) -> Action:
        world, total = self.world, self._sums[-1]
        for _ in range(TRIES):
            group, action = _ALL[bisect(self._sums, self.random.random() * total)]
            if (group != "network" or world.network) and action.possible(world):
                return action
        able = [action for group, action in _ALL if group == "life" and action.possible(world)]
        return able[self.pick(len(able))]


def walk(seed: int, steps: int) -> Walked:
    """Walk through worlds until so many steps are made, or one broke a promise."""
    walked = Walked()
    seeds = Random(seed)
    while walked.tally.steps < steps:
        world_seed = seeds.getrandbits(48)
        walker = Walker(world_seed, walked.tally)
        try:
            walker.walk()
        except Exception as error:
            last = "; ".join(walker.told)
            walked.violations.append(
                f"{type(error).__name__}: {error} (python -m tests.property.walk {world_seed} "
                f"walks through it again; the last steps: {last})"
            )
            break
    return walked


if __name__ == "__main__":
    Walker(int(sys.argv[1]), Tally()).walk(lambda line: print(line, flush=True))  # noqa: T201

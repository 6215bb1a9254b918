"""Hypothesis as the one who draws the numbers in the small world; see `test_task_machine`."""

from __future__ import annotations

import sys
from random import Random
from typing import ClassVar

from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.property.actions import ACTIONS, Life
from tests.property.world import TALLY, Tally, World

STEPS_PER_WORLD = 100
#: Seeds all choices of one step, see `TaskWorld.pick`.
numbers = st.integers(0, 2**32 - 1)


class TaskWorld(Life, RuleBasedStateMachine):
    """Three rules, each of which does one of the actions that are possible now.

    Hypothesis leaves some rules out of some runs: there are worlds without trouble, and worlds
    whose messages all arrive. All choices of a step are drawn from one number mixed with how far
    the world has come: Hypothesis likes to repeat small numbers, which should not repeat a choice.
    """

    tally: ClassVar[Tally] = TALLY

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.tally)
        self.tally.worlds += 1
        self.random = Random(0)

    def teardown(self) -> None:
        """Let the world come to rest, unless it has already failed."""
        if sys.exc_info()[0] is None:
            self.world.drain()

    @invariant()
    def everything_promised_holds(self) -> None:
        self.world.check()

    @initialize(these=st.lists(numbers, min_size=2, max_size=4))
    def begin(self, these: list[int]) -> None:
        self.tally.steps += 1
        for number in these:
            self._seed(number)
            self.submit()

    @rule(number=numbers)
    def life_goes_on(self, number: int) -> None:
        self._do_one_of("life", number)

    @precondition(lambda self: self.world.network)
    @rule(number=numbers)
    def messages_go_astray(self, number: int) -> None:
        self._do_one_of("network", number)

    @precondition(lambda self: any(a.possible(self.world) for a in ACTIONS["trouble"]))
    @rule(number=numbers)
    def trouble_comes(self, number: int) -> None:
        self._do_one_of("trouble", number)

    def _seed(self, number: int) -> None:
        world = self.world
        come_so_far = (len(world.disk.facts) * 64 + len(world.network)) * 64 + len(world.orders)
        self.random = Random(number << 32 | come_so_far)

    def _do_one_of(self, group: str, number: int) -> None:
        self._seed(number)
        able = [found for found in ACTIONS[group] if found.possible(self.world)]
        chosen = [found.do for found in able for _ in range(found.weight)]
        do = self.random.choice(chosen)
        note(f"# {do.__name__}")
        self.tally.steps += 1
        do(self)


def drive(machine_class: type[TaskWorld], *, number: int, worlds: int, shrink: bool = True) -> None:
    """Run one round of Hypothesis; the same number makes the same round."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        seed(number)(machine_class),
        settings=settings(
            max_examples=worlds,
            stateful_step_count=STEPS_PER_WORLD,
            derandomize=True,
            database=None,
            deadline=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )

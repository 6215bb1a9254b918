"""Hypothesis drives the task state machine through a small world of faults.

``HCNA_MODEL_STEPS`` sets how many steps are made at least (50 000 unless told otherwise). The run
is deterministic: rounds are seeded with their number.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import pytest
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

from hcna_ray.core import diagram, machine
from hcna_ray.core.events import (
    EVENT_TYPES,
    AttemptCompleted,
    AttemptLost,
    KeyHeld,
    LeaseReturned,
    ReleaseOrdering,
    TaskReplayed,
)
from hcna_ray.core.machine import Step
from hcna_ray.core.models import (
    Hold,
    Needs,
    OnDisconnect,
    RetryPolicy,
    Task,
    TaskSpec,
    TaskState,
    Token,
)
from tests.property.world import TALLY, BrokenPromise, Machine, Run, Tally, World

STEPS_MIN = int(os.environ.get("HCNA_MODEL_STEPS", "50000"))
STEPS_PER_WORLD = 100
OPEN_MAX = 8
TASKS_MAX = 20

#: Seeds all choices of one step, see `TaskWorld.pick`.
numbers = st.integers(0, 2**32 - 1)

OUTCOMES = ("completed", "completed", "error", "timeout", "fatal", "lost")

NEEDS = (
    Needs(),
    Needs(),
    Needs(),
    Needs(worker="W1"),
    Needs(cpu=1.0),
    Needs(cpu=2.0, mem_gb=3.0),
    Needs(gpu=1.0, resources=(("scratch", 0.1),)),
    Needs(resources=(("scratch", 0.1),)),
    Needs(worker="W2", isolated=True),
    # These two fit nowhere.
    Needs(worker="W9"),
    Needs(cpu=64.0),
)
FITS_NOWHERE = NEEDS[-2:]

RETRIES = (
    RetryPolicy(),
    RetryPolicy(max_attempts=2),
    RetryPolicy(max_attempts=3, backoff_s=4.0, retry_on=("error",)),
)


@dataclass(frozen=True)
class Action:
    """One thing that can happen, how often compared with others, and when it can."""

    do: Callable[[TaskWorld], None]
    weight: int
    possible: Callable[[World], object]


#: By rule: ordinary life, messages that go astray, and trouble.
ACTIONS: dict[str, list[Action]] = {"life": [], "network": [], "trouble": []}


def action(
    group: str, weight: int, possible: Callable[[World], object] = lambda world: True
) -> Callable[[Callable[[TaskWorld], None]], Callable[[TaskWorld], None]]:
    """Enter a method of `TaskWorld` in `ACTIONS`."""

    def enter(do: Callable[[TaskWorld], None]) -> Callable[[TaskWorld], None]:
        ACTIONS[group].append(Action(do, weight, possible))
        return do

    return enter


def machines(world: World, has: Callable[[Machine], object]) -> list[Machine]:
    """Return the workers that have something."""
    return [worker for worker in world.machines.values() if has(worker)]


class TaskWorld(RuleBasedStateMachine):
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
        self._random = Random(0)

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
        self._random = Random(number << 32 | come_so_far)

    def _do_one_of(self, group: str, number: int) -> None:
        self._seed(number)
        able = [found for found in ACTIONS[group] if found.possible(self.world)]
        chosen = [found.do for found in able for _ in range(found.weight)]
        do = self._random.choice(chosen)
        note(f"# {do.__name__}")
        self.tally.steps += 1
        do(self)

    def pick(self, count: int) -> int:
        """Return a number below ``count``."""
        return self._random.randrange(count)

    # -- clients ---------------------------------------------------------------------------------

    @action("life", 3, lambda w: len(w.disk.tasks) < TASKS_MAX and len(w.open_tasks()) < OPEN_MAX)
    def submit(self) -> None:
        self.world.submit(self._spec())

    @action("life", 1, lambda w: len(w.disk.idempotency) > w.resent)
    def submit_again(self) -> None:
        keys = list(self.world.disk.idempotency)
        self.world.resubmit(keys[self.pick(len(keys))], self._spec())

    def _spec(self) -> Callable[[str], TaskSpec]:
        now, known = self.world.clock, list(self.world.disk.tasks)
        needs = NEEDS[self.pick(len(NEEDS))]
        keyed = needs not in FITS_NOWHERE
        retry = RETRIES[self.pick(len(RETRIES))]
        task_type = ("echo", "sleep")[self.pick(2)]
        priority, max_losses, timing = self.pick(10), 1 + self.pick(3), self.pick(8)
        key, back = self.pick(8), 1 + self.pick(12)
        depends_on = tuple(known[-back:][:1]) if back <= 3 else ()

        def make(task_id: str) -> TaskSpec:
            return TaskSpec(
                id=task_id,
                task_type=task_type,
                queue=("default", "other")[priority % 2],
                priority=priority,
                accepted_at=now,
                run_at=now + 10.0 if timing == 1 else None,
                expires_at=now + 60.0 if timing in (2, 3) else None,
                queue_timeout_s=45.0 if timing == 4 else None,
                timeout_s=40.0,
                retry=retry,
                max_losses=max_losses,
                needs=needs,
                depends_on=depends_on,
                ordering_key={0: "a", 1: "b", 2: "a"}.get(key) if keyed else None,
                concurrency_key={2: "two", 3: "one", 4: "two", 5: "one"}.get(key)
                if keyed
                else None,
                on_disconnect=OnDisconnect.WAIT if timing >= 6 else OnDisconnect.REPLACE,
                wait_max_s=25.0,
                idempotency_key=f"key-{task_id}" if timing % 2 else None,
            )

        return make

    @action("life", 1, lambda w: len(w.open_tasks()) > 2)
    def cancel_one_that_is_open(self) -> None:
        tasks = self.world.open_tasks()
        self.world.cancel(tasks[self.pick(len(tasks))].id)

    @action("life", 1, lambda w: any(task.lease for task in w.open_tasks()))
    def cancel_one_that_is_held(self) -> None:
        tasks = [task for task in self.world.open_tasks() if task.lease]
        self.world.cancel(tasks[self.pick(len(tasks))].id)

    @action("trouble", 1, lambda w: w.disk.tasks)
    def cancel_or_replay_whatever(self) -> None:
        known = list(self.world.disk.tasks)
        task_id = known[self.pick(len(known))]
        if self.pick(2):
            self.world.cancel(task_id)
        else:
            self.world.replay(task_id)

    @action("life", 1, lambda w: w.failed_tasks() and len(w.open_tasks()) < OPEN_MAX)
    def replay(self) -> None:
        failed = self.world.failed_tasks()
        self.world.replay(failed[self.pick(len(failed))].id)

    # -- moderator -------------------------------------------------------------------------------

    @action("life", 2)
    def tick(self) -> None:
        self.world.tick((0.5, 1.0, 3.0, 12.0, 80.0)[self.pick(5)])

    @action("life", 6, lambda w: w.may_dispatch())
    def dispatch(self) -> None:
        self.world.dispatch()

    @action("trouble", 2, lambda w: w.may_dispatch())
    def dispatch_but_the_grants_get_lost(self) -> None:
        self.world.dispatch(lose_grants=True)

    @action("life", 3, lambda w: w.orders)
    def carry_out_a_command(self) -> None:
        self.world.carry_out(self.pick(len(self.world.orders)), keep=False)

    @action("trouble", 1, lambda w: w.orders)
    def carry_out_a_command_that_will_be_repeated(self) -> None:
        self.world.carry_out(self.pick(len(self.world.orders)), keep=True)

    @action("life", 2, lambda w: w.disk.settlements)
    def settle_dependents(self) -> None:
        self.world.settle()

    # -- network ---------------------------------------------------------------------------------

    @action("life", 6, lambda w: w.network)
    @action("network", 2)
    def deliver_any(self) -> None:
        self.world.deliver(self.pick(len(self.world.network)), keep=False)

    @action("network", 2)
    def deliver_and_keep_a_copy(self) -> None:
        self.world.deliver(self.pick(len(self.world.network)), keep=True)

    @action("network", 1)
    def drop(self) -> None:
        del self.world.network[self.pick(len(self.world.network))]

    # -- workers ---------------------------------------------------------------------------------

    @action("life", 5, lambda w: machines(w, lambda m: m.granted))
    def start(self) -> None:
        able = machines(self.world, lambda m: m.granted)
        worker = able[self.pick(len(able))]
        self.world.start(worker, self.pick(len(worker.granted)))

    @action("life", 1, lambda w: machines(w, lambda m: m.granted))
    def give_back(self) -> None:
        able = machines(self.world, lambda m: m.granted)
        worker = able[self.pick(len(able))]
        self.world.give_back(worker, self.pick(len(worker.granted)))

    @action("life", 1, lambda w: machines(w, lambda m: m.started))
    def progress(self) -> None:
        able = machines(self.world, lambda m: m.started)
        worker = able[self.pick(len(able))]
        self.world.progress(worker, self.pick(len(worker.started)), float(self.pick(101)))

    @action("life", 4, lambda w: machines(w, lambda m: m.started))
    def finish(self) -> None:
        able = machines(self.world, lambda m: m.started)
        worker = able[self.pick(len(able))]
        run = worker.started[self.pick(len(worker.started))]
        self.world.finish(worker, run, OUTCOMES[self.pick(len(OUTCOMES))])

    @action("life", 3, lambda w: machines(w, lambda m: m.told_to_stop))
    def obey_a_stop(self) -> None:
        able = machines(self.world, lambda m: m.told_to_stop)
        worker = able[self.pick(len(able))]
        run = sorted(worker.told_to_stop)[self.pick(len(worker.told_to_stop))]
        worker.told_to_stop.discard(run)
        if run in worker.started:
            self.world.finish(worker, run, "cancelled")
        elif run in worker.granted:
            self.world.give_back(worker, worker.granted.index(run))

    @action("trouble", 3, lambda w: any(task.lease for task in w.open_tasks()))
    def attach(self) -> None:
        able = machines(self.world, lambda m: m.up)
        if able:
            self.world.attach(able[self.pick(len(able))])

    @action("trouble", 2, lambda w: machines(w, lambda m: m.granted or m.started))
    def worker_goes_down(self) -> None:
        able = machines(self.world, lambda m: m.granted or m.started)
        self.world.worker_down(able[self.pick(len(able))])

    @action("trouble", 1, lambda w: machines(w, lambda m: m.granted or m.started))
    def worker_leaves_in_good_order(self) -> None:
        able = machines(self.world, lambda m: m.granted or m.started)
        self.world.worker_leaves(able[self.pick(len(able))])

    @action("life", 2, lambda w: machines(w, lambda m: not m.up))
    def worker_comes_back_as_a_new_incarnation(self) -> None:
        able = machines(self.world, lambda m: not m.up)
        self.world.worker_up(able[self.pick(len(able))])

    @action("trouble", 2, lambda w: w.ghosts)
    def an_old_incarnation_reports(self) -> None:
        run = self.world.ghosts[self.pick(len(self.world.ghosts))]
        self.world.receive(self.world.outcome(run, OUTCOMES[self.pick(len(OUTCOMES))]))

    @action("trouble", 2, lambda w: w.tokens)
    def somebody_uses_an_old_token(self) -> None:
        known = list(self.world.tokens)
        task_id = known[self.pick(len(known))]
        tokens = self.world.tokens[task_id]
        token = tokens[self.pick(len(tokens))]
        task = self.world.disk.tasks.get(task_id)
        if task is None or task.lease is None or task.lease.token != token:
            outcome = OUTCOMES[self.pick(len(OUTCOMES))]
            self.world.receive(self.world.outcome(Run(task_id, token), outcome))

    # -- the moderator's process and its disk ----------------------------------------------------

    @action("trouble", 2, lambda w: len(w.disk.facts) > w.facts_at_crash)
    def crash_restart(self) -> None:
        self.world.crash()

    @action("trouble", 1, lambda w: len(w.disk.facts) > w.facts_at_backup)
    def back_up(self) -> None:
        self.world.save_backup()

    @action("trouble", 1, lambda w: w.backup is not None and w.generations < 4)
    def restore(self) -> None:
        self.world.restore()


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


@pytest.mark.timeout(600)
def test_every_promise_holds_in_a_world_of_faults() -> None:
    number = 0
    while TALLY.steps < STEPS_MIN:
        left = STEPS_MIN - TALLY.steps
        drive(TaskWorld, number=number, worlds=max(1, min(500, 1 + left // STEPS_PER_WORLD)))
        number += 1

    assert TALLY.violations == 0
    if STEPS_MIN >= 50_000:
        # The drawing shows exactly what was seen to happen, and everything was seen.
        assert {event for _, event, _ in TALLY.moves} == {event.__name__ for event in EVENT_TYPES}
        drawn = {
            (before, event, after)
            for (before, after), names in diagram.arrows().items()
            for event in names
        }
        assert {move for move in TALLY.moves if move[0] is not move[2]} == drawn


# -- the machine can see -------------------------------------------------------------------------


def no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any report about a task that holds a lease counts, whatever its token."""

    def holds(task: Task, token: Token) -> bool:
        return task.lease is not None

    monkeypatch.setattr(machine, "_holds", holds)


def two_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second report of a result ends a completed task once more."""

    def complete_again(task: Task, event: AttemptCompleted) -> Step:
        return machine._end(task, TaskState.COMPLETED, event.at, result=event.result)

    pair = (TaskState.COMPLETED, AttemptCompleted)
    monkeypatch.setitem(machine.TRANSITIONS, pair, complete_again)


def uncounted_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that leads to another attempt is not counted."""

    def forget_the_loss(task: Task, event: AttemptLost) -> Step:
        step = machine.on_lost(task, event)
        return dataclasses.replace(step, task=step.task.evolve(losses=task.losses))

    for state in (TaskState.QUEUED, TaskState.RUNNING):
        monkeypatch.setitem(machine.TRANSITIONS, (state, AttemptLost), forget_the_loss)


def used_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay starts to number its attempts from one again."""

    def start_over(task: Task, event: TaskReplayed) -> Step:
        step = machine.on_replayed(task, event)
        return dataclasses.replace(step, task=step.task.evolve(attempt=0))

    monkeypatch.setitem(machine.TRANSITIONS, (TaskState.FAILED, TaskReplayed), start_over)


def deaf_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A granted task whose cancel was asked for goes back to the queue when it is returned."""

    def return_it(task: Task, event: LeaseReturned) -> Step:
        return machine.on_returned(task.evolve(cancel_requested_at=None), event)

    monkeypatch.setitem(machine.TRANSITIONS, (TaskState.QUEUED, LeaseReturned), return_it)


def jumps_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed task does not queue up again behind its ordering key."""

    def only_for_concurrency(task: Task, event: KeyHeld) -> Step:
        return machine.on_key_held(
            task, dataclasses.replace(event, hold=event.hold & Hold.CONCURRENCY)
        )

    monkeypatch.setitem(machine.TRANSITIONS, (TaskState.QUEUED, KeyHeld), only_for_concurrency)


def forgets_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a task does not let the next one of its ordering key go."""

    def quietly(task: Task, event: AttemptCompleted) -> Step:
        step = machine.on_completed(task, event)
        kept = tuple(c for c in step.commands if not isinstance(c, ReleaseOrdering))
        return dataclasses.replace(step, commands=kept)

    for state in (TaskState.QUEUED, TaskState.RUNNING):
        monkeypatch.setitem(machine.TRANSITIONS, (state, AttemptCompleted), quietly)


@pytest.mark.parametrize(
    ("bug", "promise"),
    [
        (no_fence, "G3 a stale report changes nothing"),
        (two_ends, "G3 a stale report changes nothing"),
        (uncounted_loss, "C11"),
        (used_token, "C6 tokens strictly increase"),
        (deaf_to_cancel, "expected cancelled"),
        (jumps_the_line, "C9"),
        (forgets_the_next, "C4 waits behind a task that waits"),
    ],
)
def test_the_machine_sees_a_seeded_bug(
    bug: Callable[[pytest.MonkeyPatch], None], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BuggyWorld(TaskWorld):
        tally = Tally()

    bug(monkeypatch)

    with pytest.raises(BrokenPromise, match=promise):
        drive(BuggyWorld, number=0, worlds=400, shrink=False)

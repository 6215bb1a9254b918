"""Everything that can happen in the small world of `tests.property.world`, and how often.

Who draws the numbers is left open: Hypothesis (`test_task_machine`), or a random walk (`walk`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from hcna_ray.core.models import Needs, OnDisconnect, RetryPolicy, TaskSpec
from tests.property.world import Machine, Run, World

OPEN_MAX = 8
TASKS_MAX = 20

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

    do: Callable[[Life], None]
    weight: int
    possible: Callable[[World], object]


#: By rule: ordinary life, messages that go astray, and trouble.
ACTIONS: dict[str, list[Action]] = {"life": [], "network": [], "trouble": []}


def action(
    group: str, weight: int, possible: Callable[[World], object] = lambda world: True
) -> Callable[[Callable[[Life], None]], Callable[[Life], None]]:
    """Enter a method of `Life` in `ACTIONS`."""

    def enter(do: Callable[[Life], None]) -> Callable[[Life], None]:
        ACTIONS[group].append(Action(do, weight, possible))
        return do

    return enter


def machines(world: World, has: Callable[[Machine], object]) -> list[Machine]:
    """Return the workers that have something."""
    return [worker for worker in world.machines.values() if has(worker)]


class Life:
    """One world, and the source of all choices. Each action is something that can happen now."""

    world: World
    random: Random

    def pick(self, count: int) -> int:
        """Return a number below ``count``."""
        return self.random.randrange(count)

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

    @action("trouble", 1)
    def put_clock(self) -> None:
        self.world.put_clock((30.0, 900.0, 90_000.0)[self.pick(3)])

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

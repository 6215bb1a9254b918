"""What one task costs the store does not depend on how many others wait there.

Counted in steps of SQLite's virtual machine, for a small store and one eight times as large, with
the moderator that the product has: no clock decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.models import OWNER, TaskFilter, TaskState
from hcna_ray.runtime.dispatcher import SWEEP_KEYS_MAX
from hcna_ray.store.base import KeyClaim
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from tests.support.builders import T0, a_schedule, a_spec, a_task
from tests.support.paper_worker import Desk, PaperWorker
from tests.support.steps import counted_steps

SMALL, LARGE = 300, 2400
QUEUED = frozenset({TaskState.QUEUED})


class House:
    """A moderator with a queue of every kind of task, and a worker."""

    def __init__(self, path: Path, tasks: int) -> None:
        self.store = SqliteTaskStore(path)
        self.desk = Desk(self.store, max_concurrent_tasks=1000)
        # What waits for keys and parents must not be what a step is about: it lies far behind.
        for first in range(0, tasks, 100):
            self.desk.submit(*(self._spec(n) for n in range(first, first + 100)))
        with self.store.transaction():
            self.store.save_schedules([self._schedule(n) for n in range(tasks)])
        self.desk.restart()
        self.worker = PaperWorker(self.desk)
        self.reader = self.store.reader()
        self.number = tasks

    def _spec(self, number: int) -> Any:
        more: dict[str, Any] = {}
        match number % 10:
            case 9:
                more["depends_on"] = (f"t{number - 9:06}",)
            case 3:
                more["concurrency_key"] = f"key-{number}"
            case 5:
                more["ordering_key"] = f"line-{number % 7}"
            case 6:
                more |= {"idempotency_key": f"k{number}", "fingerprint": "f"}
            case 8:
                more["run_at"] = T0 + 9999.0 + number
        return a_spec(
            f"t{number:06}",
            queue=f"q{number % 3}",
            principal=f"user-{number % 4}",
            batch_id=f"batch-{number // 100}",
            **more,
        )

    def _schedule(self, number: int) -> Any:
        return a_schedule(
            f"s{number:06}", principal=f"user-{number % 4}", wake_at=T0 + 1e6 + number % 60
        )

    def submit(self, count: int = 1, **more: Any) -> None:
        numbers = range(self.number, self.number + count)
        self.number += count
        self.desk.submit_ids(*(f"t{number:06}" for number in numbers), **more)

    def work(self) -> None:
        """Take a task, do it, and take the next one."""
        (offer, *rest) = self.worker.granted()
        self.worker.granted(0, self.worker.ended(offer), *map(self.worker.ended, rest))

    def restart(self) -> None:
        self.desk.restart()

    def tick(self) -> None:
        self.desk.tick(1.5)
        self.worker.heartbeat()

    def wake(self) -> None:
        """Let the time of one schedule come, of so many."""
        now = self.desk.clock.now()
        due = a_schedule("due", wake_at=now, decided_until=now - 3600.0)
        with self.store.transaction():
            self.store.save_schedules([due])
        self.desk.restart()
        self.tick()
        after = self.store.get_schedule(due.key)
        assert after is not None
        assert after.wake_at is not None
        assert after.wake_at > now

    def close(self) -> None:
        self.reader.close()
        self.store.close()


def _pages(where: TaskFilter) -> Callable[[House], object]:
    def read(house: House) -> object:
        newest = house.reader.page(where, before_seq=None, limit=20)
        return newest, house.reader.page(where, before_seq=newest[-1].seq, limit=20)

    return read


#: What is done again and again while tasks wait, and must not cost more when many do.
WORK: dict[str, Callable[[House], object]] = {
    "a submit": House.submit,
    "a submit of a batch": lambda house: house.submit(20, batch_id="batch-of-20"),
    "a submit with an ordering key": lambda house: house.submit(ordering_key="line-1"),
    "a submit with a concurrency key": lambda house: house.submit(concurrency_key="key-3"),
    "a submit with a dependency": lambda house: house.submit(depends_on=("t000001",)),
    "a submit with an idempotency key": lambda house: house.submit(
        idempotency_key=f"new-{house.number}", fingerprint="f"
    ),
    "taking and doing a task": House.work,
    "an idle second": House.tick,
    "a cancel": lambda house: house.desk.cancel("t000290"),
    "a restart": House.restart,
    "depth and counters": lambda house: (house.reader.depth(), house.reader.counters()),
    "an idle second in which a schedule wakes": House.wake,
    "a schedule": lambda house: house.reader.get_schedule(("user-1", "s000001")),
    "pages of schedules": lambda house: house.reader.schedules(limit=20),
    "pages of a principal's schedules": lambda house: house.reader.schedules(
        principal="user-1", after=("user-1", "s000100"), limit=20
    ),
    "how long the first in each queue waits": lambda house: house.reader.queued_since(),
    "one task": lambda house: house.reader.get(["t000001"]),
    "its history": lambda house: house.reader.facts(after=0, limit=50, task_id="t000001"),
    "news": lambda house: house.reader.facts(after=house.reader.last_fact() - 9, limit=50),
    "what is open of a batch": lambda house: house.reader.open_count(batch_id="batch-1"),
    "what has ended of a batch": lambda house: house.reader.ended(batch_id="batch-1", limit=9),
    "pages of all": _pages(TaskFilter()),
    "pages of a queue": _pages(TaskFilter(queue="q1")),
    "pages of a type": _pages(TaskFilter(task_type="echo")),
    "pages of a state": _pages(TaskFilter(states=tuple(QUEUED))),
    "pages of a batch": _pages(TaskFilter(batch_id="batch-1")),
    "pages of a principal": _pages(TaskFilter(principal="user-1")),
    "a principal without tasks": lambda house: house.reader.page(
        TaskFilter(principal="nobody"), before_seq=None, limit=20
    ),
    "a principal's queued tasks": _pages(TaskFilter(principal="user-1", states=tuple(QUEUED))),
    "a principal's failed tasks": lambda house: house.reader.page(
        TaskFilter(principal="user-1", states=(TaskState.FAILED,)), before_seq=None, limit=20
    ),
    "whose a task is": lambda house: house.reader.belongs(["t000001"]),
    "a principal's open tasks, as far as its quota": lambda house: house.reader.open_of(
        "user-1", 20
    ),
}


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, House]]:
    folder = tmp_path_factory.mktemp("houses")
    built = {tasks: House(folder / f"{tasks}.db", tasks) for tasks in (SMALL, LARGE)}
    for house in built.values():
        house.work()  # How long an echo takes is known from here on.
    yield built
    for house in built.values():
        house.close()


@pytest.mark.parametrize("name", WORK)
def test_it_costs_as_many_steps_in_a_full_store(houses: dict[int, House], name: str) -> None:
    taken: dict[int, int] = {}
    for tasks, house in houses.items():
        with counted_steps(house.store, house.reader) as steps:
            WORK[name](house)
        taken[tasks] = steps.taken
        assert steps.taken, "nothing was asked of the store"
        # Small tables are read whole: numbers, lanes, depth, counters, workers, paused queues.
        assert steps.scanned < 100, steps.statements
    assert taken[LARGE] <= 1.1 * taken[SMALL] + 30, taken


def test_a_small_store_and_a_large_one_do_differ(houses: dict[int, House]) -> None:
    """The measure sees a walk: the owner's own tasks are in no index of principals."""
    taken = {}
    for tasks, house in houses.items():
        with counted_steps(house.reader) as steps:
            house.reader.page(TaskFilter(principal=OWNER), before_seq=None, limit=20)
        taken[tasks] = steps.taken
    assert taken[LARGE] > 6 * taken[SMALL]


def _with_old_keys(path: Path, living: int) -> SqliteTaskStore:
    """A store with keys that are old and whose tasks still wait, and one old key without a task."""
    store = SqliteTaskStore(path)
    with store.transaction():
        store.insert([a_task(f"t{n}", seq=n) for n in range(1, living + 1)])
        store.claim_keys(
            [KeyClaim("p", f"k{n}", f"t{n}", "f", T0 + n) for n in range(1, living + 1)]
        )
        store.claim_keys([KeyClaim("p", "orphan", "gone", "f", T0 + living + 1)])
    return store


def test_pruning_passes_over_few_living_keys_at_a_time(tmp_path: Path) -> None:
    taken = {}
    for living in (SMALL, LARGE):
        store = _with_old_keys(tmp_path / f"{living}.db", living)
        with counted_steps(store) as steps, store.transaction():
            store.prune(0.0, T0 + 99_999, 10)
        taken[living] = steps.taken
        assert store.keys_held([("p", "orphan")])
        store.close()
    assert taken[LARGE] <= 1.1 * taken[SMALL], taken


def test_what_lies_behind_living_keys_is_pruned_in_the_end(tmp_path: Path) -> None:
    store = _with_old_keys(tmp_path / "queue.db", SMALL)
    for _ in range(SMALL // 100 + 1):
        with store.transaction():
            store.prune(0.0, T0 + 99_999, 10)
    assert not store.keys_held([("p", "orphan")])
    with store.transaction():  # And from there it begins again.
        store.claim_keys([KeyClaim("p", "older", "gone too", "f", T0)])
        store.prune(0.0, T0 + 99_999, 10)
    assert not store.keys_held([("p", "older")])
    assert store.keys_held([("p", "k1")])
    store.close()


def test_every_key_has_its_turn_when_tasks_are_held_for_very_many() -> None:
    """A sweep looks at some of them: the next one must not look at the same again."""
    desk = Desk(max_concurrent_tasks=10_000)
    desk.runs_on = False
    keys = [f"key-{n:05}" for n in range(SWEEP_KEYS_MAX + 3)]
    seen: list[str] = []
    listed = desk.store.concurrency_keys_held

    def watched(limit: int, *, after: str = "") -> list[str]:
        found = [key for key in keys if key > after][:limit]
        seen.extend(found)
        return found

    desk.store.concurrency_keys_held = watched  # type: ignore[method-assign]
    assert listed(1) == []
    desk.tick(1.5)
    assert seen == keys[:SWEEP_KEYS_MAX]
    desk.tick(1.5)
    assert seen == keys
    desk.tick(1.5)
    assert seen == [*keys, *keys[:SWEEP_KEYS_MAX]]


def test_a_reader_counts_as_well(houses: dict[int, House]) -> None:
    reader: SqliteTaskReader = houses[SMALL].reader
    with counted_steps(reader) as steps:
        reader.get(["t000001"])
    assert steps.taken
    assert steps.statements

from __future__ import annotations

import dataclasses

import pytest

from hcna_ray.core.errors import VersionConflict
from hcna_ray.core.events import (
    AttemptCompleted,
    AttemptStarted,
    CancelRequested,
    LeaseGranted,
    LeaseReturned,
    SettleDependents,
)
from hcna_ray.core.machine import accept
from hcna_ray.core.models import LaneKey, Outcome, TaskState, Token
from hcna_ray.observability.figures import RAN, SUM, WAITED
from hcna_ray.runtime.ledger import Ledger, lane_of
from hcna_ray.store.base import Counter
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import T0, a_lease, a_spec, a_task

NODE_IDS = {"W1": "HCNA-W1--test"}


@pytest.fixture
def store() -> MemoryTaskStore:
    store = MemoryTaskStore()
    with store.transaction():
        store.insert([a_task("t1", seq=1), a_task("t2", seq=2, concurrency_key="k")])
    return store


def a_ledger(store: MemoryTaskStore) -> Ledger:
    return Ledger(store, {}, NODE_IDS)


def commit(store: MemoryTaskStore, ledger: Ledger) -> int:
    with store.transaction():
        return ledger.flush()


def test_nothing_reaches_the_store_before_the_flush(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    assert not ledger.dirty
    task = ledger.get("t1")
    assert task is not None
    ledger.step(task, CancelRequested(at=T0, reason=""))

    assert ledger.dirty
    assert store.get(["t1"])["t1"].state is TaskState.QUEUED
    commit(store, ledger)
    assert store.get(["t1"])["t1"].state is TaskState.CANCELLED


def test_a_task_is_remembered_as_the_batch_has_it(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    task = ledger.get("t1")
    assert task is not None
    granted = ledger.step(task, LeaseGranted(at=T0, lease=a_lease())).task

    assert ledger.get("t1") is granted
    ledger.adopt(store.get(["t1"]).values())  # Read again by another query: older news.
    assert ledger.get("t1") is granted
    assert ledger.get("nobody") is None


def test_many_steps_of_one_task_are_one_write_with_one_version(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    task = ledger.get("t1")
    assert task is not None
    version = task.version
    for event in (
        LeaseGranted(at=T0, lease=a_lease()),
        AttemptStarted(at=T0, token=Token(1, 1)),
        AttemptCompleted(at=T0, token=Token(1, 1), started_at=T0, result=b"{}"),
    ):
        task = ledger.step(task, event).task
    newest = commit(store, ledger)

    stored = store.get(["t1"])["t1"]
    assert (stored.state, stored.version) == (TaskState.COMPLETED, version + 1)
    facts = store.reader().facts(after=0, limit=10, task_id="t1")
    assert [one.fact.kind for one in facts] == ["granted", "started", "completed"]
    assert facts[-1].number == newest
    (attempt,) = store.reader().attempts("t1")
    assert (attempt.outcome, attempt.node_id) == (Outcome.COMPLETED, "HCNA-W1--test")
    assert store.reader().counters() == {
        Counter("attempts", "echo", "completed"): 1,
        Counter("ended", "echo", "completed"): 1,
        # It waited and ran for no time at all, once.
        **{Counter(figure, "echo", "0.005"): 1 for figure in (WAITED, RAN)},
        **{Counter(figure, "echo", SUM): 0 for figure in (WAITED, RAN)},
    }


def test_late_news_changes_and_counts_nothing(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    task = ledger.get("t1")
    assert task is not None
    step = ledger.step(
        task, AttemptCompleted(at=T0, token=Token(9, 9), started_at=T0, result=b"{}")
    )

    assert not step.changed
    assert not ledger.dirty
    assert list(ledger.changed()) == []


def test_a_new_task_is_inserted_and_may_go_on_in_the_same_batch(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    task = accept(a_spec("t3"), seq=3, at=T0)
    ledger.add(task)
    ledger.step(task.task, LeaseGranted(at=T0, lease=a_lease()))
    commit(store, ledger)

    assert store.get(["t3"])["t3"].lease == a_lease()
    assert store.reader().counters() == {Counter("accepted", "echo", "default"): 1}


def test_two_writers_are_noticed(store: MemoryTaskStore) -> None:
    first, second = a_ledger(store), a_ledger(store)
    for ledger in (first, second):
        task = ledger.get("t1")
        assert task is not None
        ledger.step(task, CancelRequested(at=T0, reason=""))
    commit(store, first)

    with pytest.raises(VersionConflict):
        commit(store, second)


def test_a_flush_that_fails_leaves_the_store_as_it_was(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    for name in ("t1", "t2"):
        task = ledger.get(name)
        assert task is not None
        ledger.step(task, CancelRequested(at=T0, reason=""))
    ledger.before["t2"] = dataclasses.replace(ledger.before["t2"], version=77)  # type: ignore[type-var]

    with pytest.raises(VersionConflict):
        commit(store, ledger)

    assert store.get(["t1"])["t1"].state is TaskState.QUEUED
    assert store.reader().last_fact() == 0


def test_leases_of_a_concurrency_key_are_counted_up_and_down(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    task = ledger.get("t2")
    assert task is not None
    task = ledger.step(task, LeaseGranted(at=T0, lease=a_lease())).task
    assert ledger.lease_delta["k"] == 1
    task = ledger.step(task, LeaseReturned(at=T0, token=Token(1, 1), reason="")).task
    assert ledger.lease_delta["k"] == 0


def test_what_follows_from_steps_is_kept_in_order(store: MemoryTaskStore) -> None:
    ledger = a_ledger(store)
    task = ledger.get("t1")
    assert task is not None
    ledger.step(task, CancelRequested(at=T0, reason=""))

    assert ledger.commands == [SettleDependents(task_id="t1", completed=False)]


def test_a_leased_task_need_not_be_read_again() -> None:
    store = MemoryTaskStore()
    live = a_task("t9", state=TaskState.RUNNING)
    ledger = Ledger(store, {"t9": live}, NODE_IDS)

    assert ledger.get("t9") is live


def test_a_lane_is_what_the_scheduler_cannot_tell_apart() -> None:
    task = a_task("t1", queue="q", task_type="sleep")

    assert lane_of(task) == LaneKey("q", "sleep", task.needs)

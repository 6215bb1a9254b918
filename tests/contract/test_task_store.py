"""The exam of every `TaskStore` and `TaskReader`: each sentence of the contract has a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hcna_ray.core.clock import ClockHold
from hcna_ray.core.errors import NotFound, VersionConflict
from hcna_ray.core.models import (
    OWNER,
    FailureKind,
    Hold,
    LaneKey,
    Needs,
    OnDisconnect,
    Outcome,
    Progress,
    RetryPolicy,
    Task,
    TaskFilter,
    TaskState,
    Token,
)
from hcna_ray.core.schedules import Overlap, Reason
from hcna_ray.store.base import (
    Belongs,
    Counter,
    KeyClaim,
    QueueSize,
    Settlement,
    TaskReader,
    TaskStore,
)
from tests.support.builders import (
    T0,
    a_delivery,
    a_fact,
    a_lease,
    a_schedule,
    a_spec,
    a_task,
    a_worker_record,
    an_attempt,
    an_audit_entry,
    an_error,
)

if TYPE_CHECKING:
    from tests.contract.conftest import Home

ECHO = LaneKey("default", "echo", Needs())


class Boom(Exception):
    """What makes a transaction roll back."""


@contextmanager
def failing(store: TaskStore) -> Iterator[None]:
    """Open a transaction that fails after everything in it."""
    with store.transaction():
        yield
        raise Boom


def put(store: TaskStore, *tasks: Task) -> None:
    with store.transaction():
        store.insert(tasks)


def save(store: TaskStore, *tasks: Task) -> None:
    with store.transaction():
        store.save(tasks)


def step(task: Task, **changes: object) -> Task:
    """Return the next version of a task."""
    return task.evolve(**{"version": task.version + 1, **changes})


def ended(task: Task, state: TaskState = TaskState.COMPLETED, at: float = T0) -> Task:
    return step(task, state=state, lease=None, finished_at=at)


def ids(tasks: Sequence[Task]) -> list[str]:
    return [task.id for task in tasks]


def full_task() -> Task:
    """A task with every field away from its default."""
    spec = a_spec(
        "t1",
        payload=b'{"a": [1, 2]}',
        queue="night",
        priority=9,
        run_at=T0 + 5,
        expires_at=T0 + 50,
        timeout_s=7.5,
        queue_timeout_s=20.0,
        retry=RetryPolicy(max_attempts=4, backoff_s=2.0, retry_on=("error", "KeyError")),
        max_losses=7,
        needs=Needs(
            worker="W2",
            cpu=1.5,
            mem_gb=2.0,
            gpu=1.0,
            resources=(("scanner", 1.0),),
            labels=(("zone", "a"),),
            isolated=True,
        ),
        depends_on=("t0",),
        ordering_key="user-1",
        concurrency_key="disk",
        on_disconnect=OnDisconnect.WAIT,
        wait_max_s=60.0,
        principal="owner",
        idempotency_key="k",
        fingerprint="f" * 64,
        batch_id="batch-1",
        traceparent="00-1-2-01",
        webhook="https://example.org/hook",
        metadata=b'{"m": 1}',
        confined=True,
        schedule="nightly",
        schedule_at=T0 + 3600,
    )
    return a_task(
        seq=3,
        spec=spec,
        state=TaskState.RUNNING,
        due_at=T0 + 5,
        dispatch_key=T0 - 535,
        attempt=2,
        failures=1,
        losses=1,
        unmet=1,
        hold=Hold.ORDERING | Hold.CONCURRENCY,
        lease=a_lease(token=Token(3, 2), worker="W2", slot=-1, grant_seq=9, started_at=T0 + 7),
        pinned_to="W2",
        pinned_until=T0 + 70,
        queued_at=T0 + 5,
        started_at=T0 + 7,
        finished_at=T0 + 9,
        cancel_requested_at=T0 + 8,
        cancel_reason="enough",
        progress=Progress(at=T0 + 8, percent=12.5, message="on it"),
        checkpoint=b'{"at": 4}',
        result=b'{"r": 1}',
        error=an_error(kind=FailureKind.OOM, type="MemoryError", traceback="tb", retryable=False),
        version=4,
    )


class TestTransaction:
    def test_a_commit_is_seen_by_readers_when_it_returns(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        with store.transaction():
            store.insert([a_task()])
            store.append_facts([a_fact()])
            store.bump({Counter("accepted", "echo", ""): 1})
            assert reader.get(["t1"]) == {}
            assert reader.facts(after=0, limit=9) == []
            assert reader.page(TaskFilter(), before_seq=None, limit=9) == []
            assert reader.depth() == {}
            assert reader.counters() == {}
            assert reader.open_count(ids=["t1"]) == 0

        assert reader.get(["t1"]) == {"t1": a_task()}
        assert len(reader.facts(after=0, limit=9)) == 1
        assert ids(reader.page(TaskFilter(), before_seq=None, limit=9)) == ["t1"]
        assert reader.depth() == {("default", TaskState.QUEUED): 1}
        assert reader.counters() == {Counter("accepted", "echo", ""): 1}
        assert reader.open_count(ids=["t1"]) == 1

    def test_the_queues_that_are_counted_are_known(self, store: TaskStore) -> None:
        assert store.counted_queues() == frozenset()
        with store.transaction():
            store.bump({Counter("accepted", one, "q"): 1 for one in ("echo", "sleep")})
            store.bump({Counter("accepted", "echo", "r"): 1, Counter("ended", "echo", "failed"): 1})
        assert store.counted_queues() == {"q", "r"}

    def test_readers_see_the_old_task_until_the_new_one_is_committed(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        put(store, a_task(batch_id="b"))
        with store.transaction():
            store.save([ended(a_task(batch_id="b"))])
            store.save_worker(a_worker_record())
            store.set_paused("default", True)
            assert reader.get(["t1"])["t1"].state is TaskState.QUEUED
            assert reader.ended(batch_id="b", limit=9) == []
            assert reader.open_count(batch_id="b") == 1
            assert reader.workers() == []
            assert reader.paused() == frozenset()
        assert reader.get(["t1"])["t1"].state is TaskState.COMPLETED
        assert len(reader.ended(batch_id="b", limit=9)) == 1
        assert reader.workers() == [a_worker_record()]
        assert reader.paused() == {"default"}

    def test_an_exception_rolls_everything_back_and_propagates(self, home: Home) -> None:
        store, reader = home.store, home.reader()
        queued = a_task("t1", seq=1, ordering_key="o", expires_at=T0 + 9, batch_id="b")
        running = a_task("t2", seq=2, state=TaskState.RUNNING)
        done = a_task("t3", seq=3, state=TaskState.COMPLETED)
        held = a_task("t4", seq=4, hold=Hold.CONCURRENCY, concurrency_key="c")
        with store.transaction():
            store.insert([queued, running, done, held])
            store.add_dependencies("t1", ["p"])
            store.push_settlements([("t3", True)])
            store.save_deliveries([a_delivery("d1"), a_delivery("d2")])
            store.save_schedules([a_schedule("s1", wake_at=T0), a_schedule("s2")])
            store.claim_keys([KeyClaim("me", "k", "t1", "f", T0)])
            store.append_facts([a_fact()])
            store.save_attempts([an_attempt("t2")])
            store.save_worker(a_worker_record())
            store.set_paused("default", True)
            store.bump({Counter("n", "", ""): 1})
            store.append_audit([an_audit_entry()])
        before = everything(store, reader)

        with pytest.raises(Boom), failing(store):
            change_everything(store)

        assert everything(store, reader) == before
        with store.transaction():
            assert store.append_facts([a_fact("t2")]) == 2
            store.save([ended(queued)])
        (_number, task), *_rest = reader.ended(ids=["t1"], limit=9)
        assert task.id == "t1"
        assert store.ready_lanes() == {}
        reader.close()
        assert home.reopen().size().tasks == 2

    def test_reads_see_what_the_open_transaction_has_written(self, store: TaskStore) -> None:
        with store.transaction():
            store.insert([a_task(ordering_key="o", expires_at=T0 + 9)])
            assert ids(store.heads(ECHO, 9)) == ["t1"]
            assert store.ready_lanes() == {ECHO: 1}
            assert store.size().tasks == 1
            assert store.last_seq() == 1
            assert store.next_wake() == T0 + 9
            assert store.task_states(["t1"]) == {"t1": TaskState.QUEUED}
            head = next(iter(store.ordering_line("o", 1)), None)
            assert head is not None
            store.save([step(head, lease=a_lease())])
            assert store.heads(ECHO, 9) == []
            assert ids(store.leased()) == ["t1"]
            assert store.get(["t1"])["t1"].lease == a_lease()

    def test_there_is_only_one_transaction_at_a_time(self, store: TaskStore) -> None:
        with store.transaction():
            with pytest.raises(RuntimeError), store.transaction():
                pass
            store.insert([a_task()])
        assert store.get(["t1"])

    def test_writing_outside_a_transaction_is_a_bug(self, store: TaskStore) -> None:
        with pytest.raises(RuntimeError):
            store.insert([a_task()])
        with pytest.raises(RuntimeError):
            store.raise_generation()
        assert store.get(["t1"]) == {}

    def test_closing_twice_is_harmless(self, store: TaskStore, reader: TaskReader) -> None:
        reader.close()
        reader.close()
        store.close()
        store.close()

    def test_a_reader_is_told_the_generation(self, store: TaskStore, reader: TaskReader) -> None:
        assert reader.generation() == store.generation() == 1
        with store.transaction():
            store.raise_generation()
        assert reader.generation() == store.generation() == 2


def change_everything(store: TaskStore) -> None:
    """Write with every method once, upon the tasks of the test of rollback."""
    stored = store.get(["t1", "t2", "t3", "t4"])
    store.insert([a_task("t5", seq=5, task_type="other", queue="q2")])
    store.save(
        [
            step(stored["t1"], lease=a_lease(), attempt=1),
            ended(stored["t2"], TaskState.FAILED),
            step(stored["t3"], state=TaskState.QUEUED, finished_at=None),
            step(stored["t4"], hold=Hold.NONE),
        ]
    )
    store.raise_generation()
    store.add_dependencies("t2", ["p"])
    store.drop_dependents("p", ["t1"])
    store.push_settlements([("t2", False)])
    store.drop_settlement(1)
    store.save_deliveries([a_delivery("d1", tries=1), a_delivery("d3")])
    store.drop_deliveries(["d2"])
    store.save_schedules([a_schedule("s1", wake_at=T0 + 9, started=1), a_schedule("s3")])
    store.drop_schedules([("owner", "s2")])
    store.claim_keys([KeyClaim("me", "k2", "t5", "f", T0)])
    store.append_facts([a_fact("t5")])
    store.save_attempts([an_attempt("t2", ended_at=T0, outcome=Outcome.LOST)])
    store.save_worker(a_worker_record("W9"))
    store.forget_worker("W1")
    store.set_paused("default", False)
    store.set_paused("q2", True)
    store.bump({Counter("n", "", ""): 5, Counter("m", "", ""): 1})
    store.append_audit([an_audit_entry()])
    assert store.prune(T0 + 99, T0 + 99, 9) == 1


def everything(store: TaskStore, reader: TaskReader) -> list[object]:
    """All that can be observed of a store."""
    names = [f"t{i}" for i in range(9)]
    return [
        store.generation(),
        store.last_seq(),
        store.get(names),
        store.ready_lanes(),
        store.heads(ECHO, 9),
        store.leased(),
        store.due(T0 + 999, 9),
        store.next_wake(),
        store.size(),
        store.ordering_line("o", 1),
        store.held_by_concurrency("c", 9),
        store.dependents("p", 9),
        store.settlements(9),
        store.due_schedules(T0 + 999, 9),
        store.next_schedule_wake(),
        store.count_schedules(),
        store.workers(),
        store.paused(),
        reader.get(names),
        [reader.attempts(name) for name in names],
        reader.page(TaskFilter(), before_seq=None, limit=9),
        reader.page(TaskFilter(worker="W1"), before_seq=None, limit=9),
        reader.ended(ids=names, limit=9),
        reader.open_count(batch_id="b"),
        reader.facts(after=0, limit=9),
        reader.deliveries(due_before=T0 + 999, limit=9),
        reader.schedules(limit=9),
        reader.counters(),
        reader.depth(),
        reader.audit(before=None, limit=9),
        reader.workers(),
        reader.paused(),
    ]


class TestIdentity:
    def test_the_generation_starts_at_one_and_is_raised_by_one(self, home: Home) -> None:
        assert home.store.generation() == 1
        with home.store.transaction():
            assert home.store.raise_generation() == 2
        assert home.reopen().generation() == 2

    def test_last_seq_is_the_highest_ever_used(self, home: Home) -> None:
        store = home.store
        assert store.last_seq() == 0
        put(store, a_task("t1", seq=7, state=TaskState.COMPLETED), a_task("t2", seq=5))
        assert store.last_seq() == 7
        with store.transaction():
            assert store.prune(T0 + 1, T0 + 1, 9) == 1
        assert home.reopen().last_seq() == 7


class TestTasks:
    def test_a_task_comes_back_as_it_was(self, home: Home) -> None:
        put(home.store, full_task(), a_task("t2", seq=4))
        assert home.store.get(["t1", "t2"]) == {"t1": full_task(), "t2": a_task("t2", seq=4)}
        assert home.reader().get(["t1"]) == {"t1": full_task()}
        assert home.reopen().get(["t1"]) == {"t1": full_task()}

    def test_a_saved_task_comes_back_as_it_was(self, home: Home) -> None:
        full = full_task()
        bare = a_task(spec=full.spec, seq=full.seq, version=full.version - 1)
        put(home.store, bare)
        save(home.store, full)
        assert home.store.get(["t1"]) == {"t1": full}
        save(home.store, step(bare, version=full.version + 1))
        assert home.store.get(["t1"])["t1"].lease is None
        assert home.reopen().get(["t1"]) == {"t1": step(bare, version=full.version + 1)}

    def test_insert_returns_the_ids_really_added(self, store: TaskStore) -> None:
        with store.transaction():
            assert store.insert([a_task("t1"), a_task("t2", seq=2)]) == {"t1", "t2"}
            assert store.insert([]) == set()

    def test_a_resent_task_is_left_as_it_is(self, store: TaskStore, reader: TaskReader) -> None:
        put(store, a_task("t1"))
        save(store, step(a_task("t1"), lease=a_lease()))
        with store.transaction():
            assert store.insert([a_task("t1", seq=2), a_task("t2", seq=3)]) == {"t2"}
        assert store.get(["t1"])["t1"].lease == a_lease()
        assert store.get(["t1"])["t1"].seq == 1
        assert store.size().tasks == 2
        assert store.ready_lanes() == {ECHO: 1}
        assert reader.depth() == {("default", TaskState.QUEUED): 2}

    def test_the_first_of_two_equal_ids_is_added(self, store: TaskStore) -> None:
        with store.transaction():
            again = a_task("t1", seq=2, payload=b"2")
            assert store.insert([a_task("t1", payload=b"1"), again]) == {"t1"}
        assert store.get(["t1"])["t1"].spec.payload == b"1"
        assert store.size().tasks == 1
        assert store.last_seq() == 1

    def test_an_accept_sequence_belongs_to_one_task(self, store: TaskStore) -> None:
        put(store, a_task("t1"))
        with pytest.raises(ValueError, match="seq"), store.transaction():
            store.insert([a_task("t2", seq=1)])
        assert store.get(["t2"]) == {}

    def test_get_leaves_out_what_is_missing(self, store: TaskStore, reader: TaskReader) -> None:
        put(store, a_task())
        assert list(store.get(iter(["no", "t1", "t1"]))) == ["t1"]
        assert list(reader.get(iter(["no", "t1", "t1"]))) == ["t1"]
        assert store.get([]) == {}
        assert reader.get([]) == {}

    @pytest.mark.parametrize("version", [0, 2, 7])
    def test_a_step_that_does_not_follow_the_stored_one_is_refused(
        self, store: TaskStore, version: int
    ) -> None:
        put(store, a_task("t1"), a_task("t2", seq=2))
        good, stale = step(a_task("t2", seq=2), attempt=5), a_task("t1", version=version)
        with store.transaction():
            with pytest.raises(VersionConflict):
                store.save([good, stale])
            store.append_facts([a_fact()])
        assert store.get(["t1", "t2"]) == {"t1": a_task("t1"), "t2": a_task("t2", seq=2)}

    def test_a_task_that_is_not_stored_cannot_be_saved(self, store: TaskStore) -> None:
        put(store, a_task("t1"))
        with pytest.raises(VersionConflict), store.transaction():
            store.save([a_task("t2", seq=2, version=1)])
        with pytest.raises(VersionConflict), store.transaction():
            store.save([a_task("t2", seq=1, version=1)])
        assert store.size().tasks == 1

    def test_one_save_takes_a_task_once(self, store: TaskStore) -> None:
        put(store, a_task())
        with pytest.raises(VersionConflict), store.transaction():
            store.save([step(a_task()), step(step(a_task()))])
        assert store.get(["t1"]) == {"t1": a_task()}

    def test_a_task_may_be_saved_again_in_the_same_transaction(self, store: TaskStore) -> None:
        put(store, a_task())
        with store.transaction():
            granted = step(a_task(), lease=a_lease(), attempt=1)
            store.save([granted])
            store.save([ended(granted)])
        assert store.get(["t1"])["t1"].version == 2
        assert store.size() == QueueSize(tasks=0, bytes=0)

    def test_end_numbers_rise_in_the_order_of_ending(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        tasks = [a_task(f"t{i}", seq=i, batch_id="b") for i in range(1, 5)]
        put(store, *tasks)
        save(store, ended(tasks[2]))
        save(store, ended(tasks[0], TaskState.FAILED), ended(tasks[3], TaskState.CANCELLED))
        found = reader.ended(batch_id="b", limit=9)
        assert [task.id for _number, task in found] == ["t3", "t1", "t4"]
        numbers = [number for number, _task in found]
        assert numbers == sorted(set(numbers))

    def test_a_replayed_task_loses_its_end_number_and_gets_a_new_one(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        tasks = [a_task(f"t{i}", seq=i) for i in (1, 2)]
        put(store, *tasks)
        first, second = (ended(task, TaskState.FAILED) for task in tasks)
        save(store, first)
        save(store, second)
        (last, _task) = reader.ended(ids=["t1", "t2"], limit=9)[-1]
        again = step(first, state=TaskState.QUEUED, finished_at=None, error=None)
        save(store, again)
        assert [task.id for _n, task in reader.ended(ids=["t1", "t2"], limit=9)] == ["t2"]
        assert store.size().tasks == 1
        save(store, ended(again))
        ((number, task),) = reader.ended(ids=["t1", "t2"], after=last, limit=9)
        assert task.id == "t1"
        assert number > last

    def test_an_ended_task_that_changes_keeps_its_end_number(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        put(store, a_task())
        save(store, ended(a_task()))
        before = reader.ended(ids=["t1"], limit=9)[0][0]
        save(store, step(ended(a_task()), cancel_reason="late"))
        assert reader.ended(ids=["t1"], limit=9)[0][0] == before

    def test_a_task_that_was_replayed_and_ended_in_one_commit_has_ended_anew(
        self, home: Home, reader: TaskReader
    ) -> None:
        store = home.store
        tasks = [a_task(f"t{i}", seq=i, batch_id="b") for i in (1, 2)]
        put(store, *tasks)
        first, second = (ended(task, TaskState.FAILED) for task in tasks)
        save(store, first, second)
        last = reader.ended(batch_id="b", limit=9)[-1][0]

        again = step(first, state=TaskState.CANCELLED, error=None)
        save(store, again)
        ((number, task),) = reader.ended(batch_id="b", after=last, limit=9)
        assert (task.id, task.state) == ("t1", TaskState.CANCELLED)
        assert number > last
        # Failed once more, later: the instant alone tells.
        save(store, step(second, finished_at=T0 + 9))
        assert [one.id for _n, one in reader.ended(batch_id="b", after=last, limit=9)] == [
            "t1",
            "t2",
        ]
        assert store.size().tasks == 0
        assert store.size() == home.reopen().size()

    def test_a_task_may_be_inserted_ended(self, store: TaskStore, reader: TaskReader) -> None:
        put(store, a_task(state=TaskState.FAILED))
        assert [task.id for _n, task in reader.ended(ids=["t1"], limit=9)] == ["t1"]
        assert store.size().tasks == 0


class TestIdempotencyKeys:
    def test_a_free_key_is_bound_and_a_bound_one_says_to_whom(self, home: Home) -> None:
        store = home.store
        first = KeyClaim("me", "k", "t1", "f1", T0)
        with store.transaction():
            assert store.claim_keys([first]) == {("me", "k"): first}
            late = KeyClaim("me", "k", "t2", "f2", T0 + 1)
            other = KeyClaim("you", "k", "t3", "f3", T0 + 1)
            assert store.claim_keys([late, other]) == {("me", "k"): first, ("you", "k"): other}
            assert store.claim_keys([]) == {}
        store = home.reopen()
        with store.transaction():
            assert store.claim_keys([late]) == {("me", "k"): first}

    def test_the_first_of_two_equal_claims_wins(self, store: TaskStore) -> None:
        claims = [KeyClaim("me", "k", task_id, "f", T0) for task_id in ("t1", "t2")]
        with store.transaction():
            assert store.claim_keys(claims) == {("me", "k"): claims[0]}


class TestFacts:
    def test_the_number_of_the_last_fact_is_returned(self, store: TaskStore) -> None:
        with store.transaction():
            assert store.append_facts([]) == 0
            assert store.append_facts([a_fact(), a_fact()]) == 2
            assert store.append_facts([]) == 2

    def test_facts_come_back_oldest_first_after_a_number(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        full = a_fact("t2", "started", token=Token(1, 2), worker="W1", detail="slot 3")
        with store.transaction():
            store.append_facts([a_fact("t1"), full, a_fact("t1", "ended")])
        assert [line.number for line in reader.facts(after=0, limit=2)] == [1, 2]
        assert [line.number for line in reader.facts(after=2, limit=9)] == [3]
        assert reader.facts(after=1, limit=1)[0].fact == full
        assert [line.number for line in reader.facts(after=0, limit=9, task_id="t1")] == [1, 3]
        assert [line.number for line in reader.facts(after=1, limit=9, task_id="t1")] == [3]
        assert reader.facts(after=0, limit=9, task_id="no") == []

    def test_committed_numbers_never_repeat(self, home: Home) -> None:
        store, reader = home.store, home.reader()
        seen: list[int] = []

        def read() -> None:
            after = seen[-1] if seen else 0
            seen.extend(line.number for line in reader.facts(after=after, limit=9))

        put(store, a_task(state=TaskState.COMPLETED))
        with store.transaction():
            store.append_facts([a_fact(), a_fact()])
        read()
        with pytest.raises(Boom), failing(store):
            store.append_facts([a_fact()] * 3)
        with store.transaction():
            store.append_facts([a_fact()])
        read()
        with store.transaction():
            assert store.prune(T0 + 1, T0 + 1, 9) == 1
        assert reader.facts(after=0, limit=9) == []
        store = home.reopen()
        reader = home.reader()
        with store.transaction():
            store.append_facts([a_fact("t2")])
        read()
        assert len(seen) == 4
        assert seen == sorted(set(seen))


class TestAttempts:
    def test_an_attempt_is_inserted_then_replaced_by_its_token(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        second = an_attempt(token=Token(1, 2), started_at=T0 + 3)
        restored = an_attempt(token=Token(2, 1), started_at=T0 + 4)
        with store.transaction():
            store.save_attempts([restored, second, an_attempt(), an_attempt("t2")])
        assert reader.attempts("t1") == [an_attempt(), second, restored]
        closed = an_attempt(ended_at=T0 + 2, outcome=Outcome.ERRORED, error=an_error())
        with store.transaction():
            store.save_attempts([closed])
        assert reader.attempts("t1") == [closed, second, restored]
        assert reader.attempts("no") == []


class TestDispatch:
    def test_only_ready_tasks_stand_in_lanes(self, store: TaskStore) -> None:
        put(
            store,
            a_task("t1", seq=1),
            a_task("t2", seq=2, state=TaskState.SCHEDULED),
            a_task("t3", seq=3, state=TaskState.RUNNING),
            a_task("t4", seq=4, lease=a_lease()),
            a_task("t5", seq=5, hold=Hold.ORDERING),
            a_task("t6", seq=6, state=TaskState.COMPLETED),
            a_task("t7", seq=7),
        )
        assert store.ready_lanes() == {ECHO: 2}
        assert ids(store.heads(ECHO, 9)) == ["t1", "t7"]

    def test_lanes_part_by_queue_type_and_needs(self, home: Home) -> None:
        needy = Needs(cpu=1.0, labels=(("zone", "a"),))
        put(
            home.store,
            a_task("t1", seq=1),
            a_task("t2", seq=2, queue="night"),
            a_task("t3", seq=3, task_type="sleep"),
            a_task("t4", seq=4, needs=needy),
            a_task("t5", seq=5, needs=Needs(cpu=1, labels=(("zone", "a"),))),
        )
        expected = {
            ECHO: 1,
            LaneKey("night", "echo", Needs()): 1,
            LaneKey("default", "sleep", Needs()): 1,
            LaneKey("default", "echo", needy): 2,
        }
        assert home.store.ready_lanes() == expected
        store = home.reopen()
        assert store.ready_lanes() == expected
        assert ids(store.heads(LaneKey("default", "echo", needy), 9)) == ["t4", "t5"]

    def test_a_pinned_task_stands_in_the_lane_of_its_worker(self, store: TaskStore) -> None:
        put(store, a_task())
        pinned = step(a_task(), pinned_to="W2", pinned_until=T0 + 60)
        save(store, pinned)
        lane = LaneKey("default", "echo", Needs(worker="W2"))
        assert store.ready_lanes() == {lane: 1}
        assert store.heads(ECHO, 9) == []
        save(store, step(pinned, pinned_to=None, pinned_until=None))
        assert store.ready_lanes() == {ECHO: 1}

    def test_a_lane_that_was_empty_when_pruned_may_fill_again(self, home: Home) -> None:
        store = home.store
        put(store, a_task("t1", seq=1), a_task("t2", seq=2, task_type="sleep"))
        with store.transaction():
            store.save([ended(a_task("t1", seq=1))])
            assert store.prune(T0 + 1, T0, 9) == 1
        put(store, a_task("t3", seq=3))
        store = home.reopen()
        assert store.ready_lanes() == {ECHO: 1, LaneKey("default", "sleep", Needs()): 1}
        assert ids(store.heads(ECHO, 9)) == ["t3"]

    def test_heads_come_by_dispatch_key_then_accept_sequence(self, store: TaskStore) -> None:
        keys = {"t1": 5.0, "t2": 3.0, "t3": 3.0, "t4": -1.0, "t5": 3.0}
        put(store, *(a_task(name, seq=int(name[1]), dispatch_key=keys[name]) for name in keys))
        assert ids(store.heads(ECHO, 9)) == ["t4", "t2", "t3", "t5", "t1"]
        assert ids(store.heads(ECHO, 3)) == ["t4", "t2", "t3"]
        assert store.heads(ECHO, 0) == []
        assert store.heads(LaneKey("no", "echo", Needs()), 9) == []

    def test_heads_follow_a_changed_dispatch_key(self, store: TaskStore) -> None:
        put(store, a_task("t1", seq=1), a_task("t2", seq=2))
        save(store, step(a_task("t1", seq=1), dispatch_key=T0 + 99))
        assert ids(store.heads(ECHO, 9)) == ["t2", "t1"]

    def test_every_lease_is_found(self, home: Home) -> None:
        running = a_task("t2", seq=2, state=TaskState.RUNNING)
        put(home.store, a_task("t1", seq=1), running, a_task("t3", seq=3, lease=a_lease()))
        assert sorted(ids(home.store.leased())) == ["t2", "t3"]
        save(home.store, ended(running))
        assert ids(home.store.leased()) == ["t3"]
        assert ids(home.reopen().leased()) == ["t3"]

    def test_due_tasks_come_earliest_first(self, store: TaskStore) -> None:
        put(
            store,
            a_task("t1", seq=1, state=TaskState.SCHEDULED, due_at=T0 + 30),
            a_task("t2", seq=2, state=TaskState.SCHEDULED, due_at=T0 + 10),
            a_task("t3", seq=3, expires_at=T0 + 20),
            a_task("t4", seq=4, queue_timeout_s=5.0),
            a_task("t5", seq=5),
            a_task("t6", seq=6, state=TaskState.SCHEDULED, due_at=T0 + 10),
        )
        assert store.next_wake() == T0 + 5
        assert store.due(T0 + 4.9, 9) == []
        assert ids(store.due(T0 + 5, 9)) == ["t4"]
        assert ids(store.due(T0 + 99, 9)) == ["t4", "t2", "t6", "t3", "t1"]
        assert ids(store.due(T0 + 99, 2)) == ["t4", "t2"]

    def test_a_task_that_was_woken_is_due_no_more(self, store: TaskStore) -> None:
        waiting = a_task(state=TaskState.SCHEDULED, due_at=T0 + 10)
        put(store, waiting)
        save(store, step(waiting, state=TaskState.QUEUED))
        assert store.due(T0 + 99, 9) == []
        assert store.next_wake() is None

    def test_size_counts_what_has_not_ended(self, home: Home) -> None:
        assert home.store.size() == QueueSize(tasks=0, bytes=0)
        tasks = [a_task(f"t{i}", seq=i, payload=b"x" * i, metadata=b"yy") for i in (1, 2, 3)]
        put(home.store, *tasks, a_task("t4", seq=4, state=TaskState.FAILED))
        assert home.store.size() == QueueSize(tasks=3, bytes=3 * 514 + 6)
        save(home.store, ended(tasks[2]))
        assert home.store.size() == QueueSize(tasks=2, bytes=2 * 514 + 3)
        assert home.reopen().size() == QueueSize(tasks=2, bytes=2 * 514 + 3)


class TestKeysAndDependencies:
    def test_the_ordering_line_is_what_has_not_ended_in_accept_order(
        self, store: TaskStore
    ) -> None:
        tasks = [
            a_task(f"t{i}", seq=i, ordering_key="o", hold=Hold.ORDERING if i > 2 else Hold.NONE)
            for i in (2, 3, 4)
        ]
        put(store, a_task("t1", seq=1, ordering_key="p"), *reversed(tasks))
        assert store.ordering_line("o", 9) == tasks
        assert store.ordering_line("o", 2) == tasks[:2]
        save(store, step(tasks[0], state=TaskState.RUNNING, lease=a_lease()))
        assert store.ordering_line("o", 1) == [store.get(["t2"])["t2"]]
        save(store, ended(store.get(["t2"])["t2"], TaskState.FAILED))
        assert store.ordering_line("o", 9) == tasks[1:]
        assert store.ordering_line("none", 9) == []

    def test_the_one_that_is_out_is_found_wherever_it_stands(self, store: TaskStore) -> None:
        tasks = [
            a_task(f"t{i}", seq=i, ordering_key="o", hold=Hold.NONE if i == 3 else Hold.ORDERING)
            for i in (2, 3, 4)
        ]
        put(store, *tasks)
        assert store.ordering_out("o") == tasks[1]
        save(store, ended(tasks[1]))
        assert store.ordering_out("o") is None
        save(store, step(tasks[0], hold=Hold.CONCURRENCY))
        found = store.ordering_out("o")
        assert found is not None
        assert found.id == "t2"

    def test_keys_with_held_tasks_are_listed_once_each(self, store: TaskStore) -> None:
        put(
            store,
            *(
                a_task(f"t{n}", seq=n, concurrency_key=key, hold=hold)
                for n, (key, hold) in enumerate(
                    [
                        ("b", Hold.CONCURRENCY),
                        ("a", Hold.CONCURRENCY),
                        ("b", Hold.CONCURRENCY),
                        ("free", Hold.NONE),
                    ],
                    start=1,
                )
            ),
        )
        assert store.concurrency_keys_held(9) == ["a", "b"]
        assert store.concurrency_keys_held(1) == ["a"]
        assert store.concurrency_keys_held(9, after="a") == ["b"]
        assert store.concurrency_keys_held(9, after="b") == []

    def test_holders_of_keys_are_told_without_claiming(self, store: TaskStore) -> None:
        put(store, a_task("t1"))
        claim = KeyClaim("p", "k", "t1", "f", T0)
        with store.transaction():
            store.claim_keys([claim])
        assert store.keys_held([("p", "k"), ("p", "free")]) == {("p", "k"): claim}
        assert store.keys_held([("p", "free")]) == {}

    def test_held_tasks_come_by_dispatch_key_then_sequence(self, store: TaskStore) -> None:
        keys = {"t1": 5.0, "t2": 3.0, "t3": 3.0}
        held = [
            a_task(
                name,
                seq=int(name[1]),
                dispatch_key=key,
                concurrency_key="c",
                hold=Hold.CONCURRENCY,
            )
            for name, key in keys.items()
        ]
        free = a_task("t4", seq=4, concurrency_key="c")
        ordered = a_task("t5", seq=5, concurrency_key="c", hold=Hold.ORDERING)
        other = a_task("t6", seq=6, concurrency_key="d", hold=Hold.CONCURRENCY)
        put(store, *held, free, ordered, other)
        assert ids(store.held_by_concurrency("c", 9)) == ["t2", "t3", "t1"]
        assert ids(store.held_by_concurrency("c", 2)) == ["t2", "t3"]
        save(store, step(held[1], hold=Hold.NONE), ended(held[2], TaskState.CANCELLED))
        assert ids(store.held_by_concurrency("c", 9)) == ["t1"]

    def test_dependents_come_in_accept_order_until_dropped(self, home: Home) -> None:
        store = home.store
        with store.transaction():
            store.insert([a_task(name, seq=i) for i, name in enumerate(["z", "m", "a"], start=1)])
            store.add_dependencies("a", ["p", "q"])
            store.add_dependencies("z", ["p"])
            store.add_dependencies("m", ["p"])
            store.add_dependencies("m", ["p"])
        assert store.dependents("p", 9) == ["z", "m", "a"]
        assert store.dependents("p", 2) == ["z", "m"]
        assert store.dependents("no", 9) == []
        with store.transaction():
            store.drop_dependents("p", ["z", "a", "no"])
        store = home.reopen()
        assert store.dependents("p", 9) == ["m"]
        assert store.dependents("q", 9) == ["a"]
        assert store.waited_for(["no", "p", "q"]) == {"p", "q"}
        assert store.waited_for([]) == set()
        with store.transaction():
            store.drop_dependents("p", ["m"])
        assert store.waited_for(["no", "p", "q"]) == {"q"}

    def test_a_child_must_be_stored_first(self, store: TaskStore) -> None:
        with pytest.raises(NotFound), store.transaction():
            store.add_dependencies("no", ["p"])

    def test_states_of_those_that_exist(self, store: TaskStore) -> None:
        put(store, a_task("t1"), a_task("t2", seq=2, state=TaskState.COMPLETED))
        assert store.task_states(iter(["t1", "t2", "no"])) == {
            "t1": TaskState.QUEUED,
            "t2": TaskState.COMPLETED,
        }

    def test_settlements_come_oldest_first_until_dropped(self, home: Home) -> None:
        store = home.store
        with store.transaction():
            store.push_settlements([("t1", True), ("t2", False)])
            store.push_settlements([("t3", True)])
        first, second, third = store.settlements(9)
        assert first == Settlement(first.number, "t1", True)
        assert second == Settlement(second.number, "t2", False)
        assert store.settlements(1) == [first]
        assert second.completed is False
        with store.transaction():
            store.drop_settlement(third.number)
            store.drop_settlement(first.number)
        store = home.reopen()
        assert store.settlements(9) == [second]
        with store.transaction():
            store.push_settlements([("t4", True)])
        assert store.settlements(9)[-1].number > third.number


class TestDeliveries:
    def test_they_come_by_when_they_are_due_and_stay_until_dropped(self, home: Home) -> None:
        store = home.store
        late, soon = a_delivery("d1", due_at=T0 + 9), a_delivery("d2", due_at=T0 + 5)
        now = a_delivery(
            "d3", body=bytes(range(256)), tries=3, note="500 é", url="https://e/?q=%00"
        )
        with store.transaction():
            store.save_deliveries([late, soon, now])
            store.save_deliveries([])

        reader = home.reader()
        assert reader.deliveries(due_before=T0 + 99, limit=9) == [now, soon, late]
        assert reader.deliveries(due_before=T0 + 5, limit=9) == [now, soon]
        assert reader.deliveries(due_before=T0 + 99, limit=1) == [now]
        assert reader.deliveries(due_before=T0 - 1, limit=9) == []
        reader.close()

        store = home.reopen()
        with store.transaction():
            store.drop_deliveries(["d2", "no"])
            store.drop_deliveries([])
            store.save_deliveries([now._replace(due_at=T0 + 20, tries=4), now._replace(tries=5)])
        reader = home.reader()
        assert reader.deliveries(due_before=T0 + 99, limit=9) == [now._replace(tries=5), late]
        reader.close()

    def test_targets_can_be_left_out(self, store: TaskStore, reader: TaskReader) -> None:
        with store.transaction():
            store.save_deliveries(
                [a_delivery(f"d{n}", target=f"host-{n % 3}:443", due_at=T0 + n) for n in range(9)]
            )
        found = reader.deliveries(due_before=T0 + 99, limit=2, not_to={"host-0:443", "no:1"})
        assert [one.id for one in found] == ["d1", "d2"]
        everyone = ["host-0:443", "host-1:443", "host-2:443"]
        assert reader.deliveries(due_before=T0 + 99, limit=9, not_to=everyone) == []

    def test_they_outlive_their_task(self, store: TaskStore, reader: TaskReader) -> None:
        put(store, a_task(state=TaskState.COMPLETED, finished_at=T0))
        with store.transaction():
            store.save_deliveries([a_delivery()])
        with store.transaction():
            assert store.prune(T0 + 99, T0 + 99, 9) == 1
        assert reader.deliveries(due_before=T0 + 99, limit=9) == [a_delivery()]


class TestSchedules:
    def test_one_is_found_by_whose_it_is_and_its_name_as_it_was_saved(self, home: Home) -> None:
        mine = a_schedule(
            timezone="Europe/Berlin",
            spec=a_spec("", payload=b'{"a": 1}', metadata=b"{}", confined=True, priority=9),
            task=b'{"task_type": "echo"}',
            overlap=Overlap.QUEUE_ONE,
            catch_up_s=90.5,
            paused=True,
            key_sha256="ab" * 32,
            waiting_at=T0 + 1,
            wake_at=T0 + 2.5,
            last_task_id="t1",
            last_at=T0 + 3,
            started=4,
            skipped=5,
            missed=6,
            reason=Reason("queue_full", "Nö", T0 + 7),
        )
        other = a_schedule(principal="alice")
        with home.store.transaction():
            home.store.save_schedules([mine, other])
            home.store.save_schedules([])
            assert home.store.get_schedule(mine.key) == mine

        store, reader = home.reopen(), home.reader()
        for found in (store, reader):
            assert found.get_schedule(("owner", "nightly")) == mine
            assert found.get_schedule(("alice", "nightly")) == other
            assert found.get_schedule(("bob", "nightly")) is None
        with store.transaction():
            store.save_schedules([mine.evolve(started=5, reason=None)])
            store.drop_schedules([other.key, ("bob", "no")])
            store.drop_schedules([])
        assert reader.schedules(limit=9) == [mine.evolve(started=5, reason=None)]
        reader.close()

    def test_those_that_wake_come_by_when_and_the_others_never(self, store: TaskStore) -> None:
        late, soon = a_schedule("late", wake_at=T0 + 9), a_schedule("soon", wake_at=T0 + 5)
        assert store.next_schedule_wake() is None
        with store.transaction():
            store.save_schedules([late, soon, a_schedule("paused", paused=True)])
        assert store.next_schedule_wake() == T0 + 5
        assert store.due_schedules(T0 + 4, 9) == []
        assert store.due_schedules(T0 + 5, 9) == [soon]
        assert store.due_schedules(T0 + 9, 9) == [soon, late]
        assert store.due_schedules(T0 + 9, 1) == [soon]
        with store.transaction():
            store.save_schedules([soon.evolve(wake_at=None)])
            assert store.next_schedule_wake() == T0 + 9
            store.drop_schedules([late.key])
            assert store.next_schedule_wake() is None

    def test_pages_follow_one_another_and_are_counted(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        every = [a_schedule(f"s{n}", principal=who) for who in ("a", "b") for n in range(3)]
        with store.transaction():
            store.save_schedules(every[::-1])
        first = reader.schedules(limit=4)
        assert first + reader.schedules(after=first[-1].key, limit=4) == every
        assert reader.schedules(principal="b", limit=9) == every[3:]
        assert reader.schedules(principal="b", after=("b", "s0"), limit=1) == [every[4]]
        assert reader.schedules(principal="c", limit=9) == []
        assert [store.count_schedules(who) for who in (None, "b", "c")] == [6, 3, 0]


class TestSmallTables:
    def test_workers_are_replaced_by_name_and_forgotten(self, home: Home) -> None:
        store, reader = home.store, home.reader()
        full = a_worker_record(
            "W1",
            cordoned=True,
            draining_until=T0 + 60,
            gpu=1.0,
            resources=(("scanner", 2.0),),
            labels=(("zone", "a"),),
            address="10.0.0.2",
            machine_id="m-1",
            ray_node_id="ab12",
            asleep_at=T0 + 35,
            left_at=T0 + 40,
        )
        with store.transaction():
            store.save_worker(a_worker_record("W2"))
            store.save_worker(a_worker_record("W1"))
            store.save_worker(full)
        assert store.workers() == [full, a_worker_record("W2")]
        assert reader.workers() == store.workers()
        with store.transaction():
            store.forget_worker("W2")
            store.forget_worker("W3")
        assert home.reopen().workers() == [full]

    def test_queues_pause_and_resume(self, home: Home) -> None:
        store = home.store
        with store.transaction():
            for queue in ("a", "b", "a"):
                store.set_paused(queue, True)
            store.set_paused("b", False)
            store.set_paused("c", False)
        assert store.paused() == {"a"}
        assert home.reader().paused() == {"a"}
        assert home.reopen().paused() == {"a"}

    def test_counters_add_up_over_transactions(self, home: Home) -> None:
        done, lost = Counter("attempts", "echo", "completed"), Counter("attempts", "echo", "lost")
        for _ in range(2):
            with home.store.transaction():
                home.store.bump({done: 2})
                home.store.bump({done: 1, lost: 1})
        assert home.reader().counters() == {done: 6, lost: 2}
        home.reopen()
        assert home.reader().counters() == {done: 6, lost: 2}

    def test_audit_lines_come_newest_first(self, store: TaskStore, reader: TaskReader) -> None:
        entries = [an_audit_entry(f"a{i}", detail=str(i)) for i in range(3)]
        with store.transaction():
            store.append_audit(entries[:2])
            store.append_audit(entries[2:])
        lines = reader.audit(before=None, limit=9)
        assert [line.entry for line in lines] == entries[::-1]
        assert [line.number for line in lines] == sorted((n.number for n in lines), reverse=True)
        assert reader.audit(before=lines[0].number, limit=1) == [lines[1]]
        assert reader.audit(before=lines[-1].number, limit=9) == []


class TestPrune:
    def test_old_ended_tasks_go_with_their_history_and_attempts(self, home: Home) -> None:
        store, reader = home.store, home.reader()
        old = [a_task(f"t{i}", seq=i, state=TaskState.FAILED, finished_at=T0 + i) for i in (1, 2)]
        put(store, *old, a_task("t3", seq=3), a_task("t4", seq=4, state=TaskState.COMPLETED))
        with store.transaction():
            for name in ("t1", "t2", "t3", "t4"):
                store.append_facts([a_fact(name)])
                store.save_attempts([an_attempt(name)])
        with store.transaction():
            # t4 ended at T0, t1 at T0+1; t2 at T0+2 is not before, and t3 has not ended.
            assert store.prune(T0 + 2, T0, 9) == 2
        names = ["t1", "t2", "t3", "t4"]
        assert sorted(reader.get(names)) == ["t2", "t3"]
        assert [line.fact.task_id for line in reader.facts(after=0, limit=9)] == ["t2", "t3"]
        assert [len(reader.attempts(name)) for name in names] == [0, 1, 1, 0]
        assert reader.depth() == {
            ("default", TaskState.QUEUED): 1,
            ("default", TaskState.FAILED): 1,
        }
        assert store.size().tasks == 1
        assert ids(reader.page(TaskFilter(), before_seq=None, limit=9)) == ["t3", "t2"]
        assert sorted(home.reopen().get(names)) == ["t2", "t3"]

    def test_it_goes_in_bounded_chunks_oldest_first(self, store: TaskStore) -> None:
        put(
            store,
            *(
                a_task(f"t{i}", seq=i, state=TaskState.COMPLETED, finished_at=T0 - i)
                for i in range(1, 6)
            ),
        )
        for expected in (2, 2, 1, 0):
            with store.transaction():
                assert store.prune(T0, T0, 2) == expected
            if expected == 2:
                assert "t5" not in store.get(["t5"])
        assert store.get([f"t{i}" for i in range(1, 6)]) == {}

    def test_a_task_that_others_depend_on_stays(self, store: TaskStore) -> None:
        put(store, a_task("p", seq=1, state=TaskState.COMPLETED), a_task("c", seq=2))
        with store.transaction():
            store.add_dependencies("c", ["p"])
        with store.transaction():
            assert store.prune(T0 + 9, T0, 9) == 0
            store.drop_dependents("p", ["c"])
            assert store.prune(T0 + 9, T0, 9) == 1

    def test_a_pruned_child_depends_no_more(self, store: TaskStore) -> None:
        put(
            store,
            a_task("p", seq=1, state=TaskState.COMPLETED, finished_at=T0 + 1),
            a_task("c", seq=2, state=TaskState.CANCELLED, finished_at=T0),
        )
        with store.transaction():
            store.add_dependencies("c", ["p"])
            assert store.prune(T0 + 9, T0, 9) == 1
            assert store.dependents("p", 9) == []
            assert store.prune(T0 + 9, T0, 9) == 1

    def test_keys_go_when_they_are_old_and_their_task_is_gone(self, store: TaskStore) -> None:
        put(store, a_task("t1"))
        claims = {
            "alive": KeyClaim("me", "alive", "t1", "f", T0),
            "orphan": KeyClaim("me", "orphan", "gone", "f", T0),
            "young": KeyClaim("me", "young", "gone", "f", T0 + 5),
        }
        with store.transaction():
            store.claim_keys(list(claims.values()))
            assert store.prune(T0, T0 + 5, 9) == 0
            taken = store.claim_keys([KeyClaim("me", key, "new", "f", T0 + 9) for key in claims])
        holders = {key: claim.task_id for (_me, key), claim in taken.items()}
        assert holders == {"alive": "t1", "orphan": "new", "young": "gone"}

    def test_old_audit_lines_go_from_the_oldest_on(self, home: Home) -> None:
        store, reader = home.store, home.reader()
        # The fourth was written while the clock was put back: it stands behind one that stays.
        at = {"a1": T0, "a2": T0 + 1, "a3": T0 + 5, "a4": T0 + 1, "a5": T0 + 6}
        with store.transaction():
            store.append_audit([an_audit_entry(name, at=when) for name, when in at.items()])
        numbers = [line.number for line in reader.audit(before=None, limit=9)][::-1]
        gone = []
        for before, limit in ((T0, 9), (T0 + 2, 1), (T0 + 2, 9), (T0 + 2, 9)):
            with store.transaction():
                gone.append(store.prune_audit(before, limit))
        assert gone == [0, 1, 1, 0]
        kept = reader.audit(before=None, limit=9)
        assert [line.number for line in kept] == numbers[:1:-1]
        with store.transaction():
            assert store.prune_audit(T0 + 9, 9) == 3
            assert store.prune_audit(T0 + 9, 9) == 0
        home.reopen()
        with home.store.transaction():
            home.store.append_audit([an_audit_entry("a6")])
        (line,) = home.reader().audit(before=None, limit=9)
        assert line.number == numbers[-1] + 1

    @staticmethod
    def _give_up(store: TaskStore) -> None:
        with suppress(ZeroDivisionError), store.transaction():
            store.hold_clock(ClockHold(by_s=9.0, since=T0 + 9.0))
            raise ZeroDivisionError

    def test_by_how_much_the_clock_was_put_is_remembered(self, home: Home) -> None:
        assert home.store.clock_hold() == ClockHold()
        with home.store.transaction():
            home.store.hold_clock(ClockHold(by_s=2.5, since=T0 + 0.5))
        assert home.store.clock_hold() == ClockHold(by_s=3.0, since=T0 + 1.0)
        self._give_up(home.store)
        with home.store.transaction():
            home.store.hold_clock(ClockHold(by_s=4.0, since=T0 + 2.0))
        assert home.reopen().clock_hold() == ClockHold(by_s=4.0, since=T0 + 2.0)


class TestPages:
    @pytest.fixture
    def listed(self, store: TaskStore) -> TaskStore:
        """Twelve tasks that differ in one thing or another."""
        error = an_error(kind=FailureKind.TIMEOUT)
        put(
            store,
            a_task("t1", seq=1, accepted_at=T0 + 1),
            a_task("t2", seq=2, accepted_at=T0 + 2, queue="night", principal=OWNER),
            a_task("t3", seq=3, accepted_at=T0 + 3, task_type="sleep"),
            a_task("t4", seq=4, accepted_at=T0 + 4, state=TaskState.RUNNING),
            a_task("t5", seq=5, accepted_at=T0 + 5, state=TaskState.RUNNING, queue="night"),
            a_task("t6", seq=6, accepted_at=T0 + 6, state=TaskState.FAILED),
            a_task("t7", seq=7, accepted_at=T0 + 7, state=TaskState.FAILED, error=error),
            a_task("t8", seq=8, accepted_at=T0 + 8, batch_id="b"),
            a_task("t9", seq=9, accepted_at=T0 + 9, batch_id="b", principal="me"),
            a_task("t10", seq=10, accepted_at=T0, lease=a_lease(worker="W2")),
            a_task("t11", seq=11, accepted_at=T0 + 9, state=TaskState.SCHEDULED),
            # It failed once and waits for another attempt: its error is not what it ended as.
            a_task("t12", seq=12, accepted_at=T0 + 9, error=error, batch_id="b"),
        )
        save(store, ended(store.get(["t4"])["t4"]))
        return store

    @pytest.mark.parametrize(
        ("where", "expected"),
        [
            (TaskFilter(), [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
            (TaskFilter(states=(TaskState.RUNNING,)), [5]),
            (TaskFilter(states=(TaskState.RUNNING, TaskState.FAILED)), [7, 6, 5]),
            (TaskFilter(states=tuple(TaskState)), [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
            (TaskFilter(task_type="sleep"), [3]),
            (TaskFilter(queue="night"), [5, 2]),
            (TaskFilter(worker="W1"), [5, 4]),
            (TaskFilter(worker="W2"), [10]),
            (TaskFilter(batch_id="b"), [12, 9, 8]),
            (TaskFilter(principal="me"), [9]),
            (TaskFilter(principal="me", queue="night"), []),
            (TaskFilter(principal="me", worker="W1"), []),
            (TaskFilter(principal="me", ids=("t8", "t9")), [9]),
            (TaskFilter(principal="me", states=(TaskState.QUEUED, TaskState.RUNNING)), [9]),
            (TaskFilter(principal="me", states=(TaskState.FAILED,)), []),
            (TaskFilter(principal="me", since=T0 + 9.5), []),
            (TaskFilter(principal="nobody"), []),
            (TaskFilter(principal=OWNER), [2]),
            (TaskFilter(principal=OWNER, queue="night"), [2]),
            (TaskFilter(principal=OWNER, states=(TaskState.FAILED,)), []),
            (TaskFilter(kind=FailureKind.TIMEOUT), [7]),
            (TaskFilter(kind=FailureKind.TIMEOUT, states=(TaskState.FAILED,)), [7]),
            (TaskFilter(kind=FailureKind.TIMEOUT, states=(TaskState.QUEUED,)), []),
            (TaskFilter(since=T0 + 8), [12, 11, 9, 8]),
            (TaskFilter(ids=("t3", "t1", "no")), [3, 1]),
            (TaskFilter(ids=("t3", "t1"), task_type="echo"), [1]),
            (TaskFilter(batch_id="b", states=(TaskState.QUEUED,), principal="me"), [9]),
            (TaskFilter(worker="W1", states=(TaskState.COMPLETED, TaskState.FAILED)), [4]),
            (TaskFilter(queue="night", states=(TaskState.RUNNING,), task_type="echo"), [5]),
            (TaskFilter(queue="no"), []),
        ],
    )
    def test_only_what_fits_newest_first(
        self, listed: TaskStore, reader: TaskReader, where: TaskFilter, expected: list[int]
    ) -> None:
        del listed
        whole = reader.page(where, before_seq=None, limit=99)
        assert [task.seq for task in whole] == expected
        turned: list[Task] = []
        while page := reader.page(where, before_seq=turned[-1].seq if turned else None, limit=2):
            assert len(page) <= 2
            turned += page
        assert turned == whole

    def test_a_worker_is_who_holds_the_lease_or_held_it_last(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        task = a_task(state=TaskState.RUNNING)
        put(store, task)
        lost = step(task, state=TaskState.QUEUED, lease=None)
        save(store, lost)
        assert ids(reader.page(TaskFilter(worker="W1"), before_seq=None, limit=9)) == ["t1"]
        save(store, step(lost, lease=a_lease(worker="W2")))
        assert reader.page(TaskFilter(worker="W1"), before_seq=None, limit=9) == []
        assert ids(reader.page(TaskFilter(worker="W2"), before_seq=None, limit=9)) == ["t1"]

    def test_pages_hold_together_while_tasks_arrive(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        put(store, *(a_task(f"t{i}", seq=i) for i in range(1, 5)))
        first = reader.page(TaskFilter(), before_seq=None, limit=2)
        put(store, a_task("t5", seq=5))
        second = reader.page(TaskFilter(), before_seq=first[-1].seq, limit=2)
        assert ids([*first, *second]) == ["t4", "t3", "t2", "t1"]


class TestEnded:
    def test_the_last_end_number_is_the_next_cursor(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        tasks = [a_task(f"t{i}", seq=i, batch_id="b") for i in range(1, 6)]
        put(store, *tasks, a_task("x", seq=9))
        for task in reversed(tasks[1:]):
            save(store, ended(task))
        save(store, ended(a_task("x", seq=9)))
        names = [task.id for task in tasks]
        for by in ({"batch_id": "b"}, {"ids": names}):
            after, seen = 0, []
            while found := reader.ended(**by, after=after, limit=3):
                assert len(found) <= 3
                seen += [task.id for _number, task in found]
                after = found[-1][0]
            assert seen == ["t5", "t4", "t3", "t2"]

    def test_the_ended_task_comes_whole(self, store: TaskStore, reader: TaskReader) -> None:
        put(store, a_task())
        done = step(a_task(), state=TaskState.COMPLETED, finished_at=T0 + 1, result=b'{"ok":1}')
        save(store, done)
        assert [task for _n, task in reader.ended(ids=["t1", "t1"], limit=9)] == [done]
        assert reader.ended(ids=["no"], limit=9) == []
        assert reader.ended(batch_id="no", limit=9) == []
        assert reader.ended(limit=9) == []

    def test_open_count_is_what_exists_and_has_not_ended(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        tasks = [a_task(f"t{i}", seq=i, batch_id="b") for i in range(1, 4)]
        put(store, *tasks, a_task("x", seq=9))
        assert reader.open_count(batch_id="b") == 3
        save(store, ended(tasks[0]))
        assert reader.open_count(batch_id="b") == 2
        assert reader.open_count(ids=["t1", "t2", "x", "no", "x"]) == 2
        assert reader.open_count(batch_id="no") == 0
        assert reader.open_count() == 0

    def test_a_batch_exists_while_a_task_carries_its_id(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        assert not reader.batch_exists("b")
        put(store, a_task(batch_id="b"))
        assert reader.batch_exists("b")
        assert not reader.batch_exists("c")


class TestPrincipals:
    def test_the_failed_tasks_of_a_principal_are_found(
        self, store: TaskStore, reader: TaskReader
    ) -> None:
        put(
            store,
            a_task("t1", seq=1, principal="me", state=TaskState.FAILED, queue="night"),
            a_task("t2", seq=2, principal="me"),
            a_task("t3", seq=3, principal="you", state=TaskState.FAILED),
            a_task("t4", seq=4, principal=OWNER, state=TaskState.FAILED),
            a_task("t5", seq=5, principal="me", state=TaskState.FAILED),
        )
        failed = TaskFilter(principal="me", states=(TaskState.FAILED,))

        def found(where: TaskFilter, before: int | None = None, limit: int = 9) -> list[int]:
            return [task.seq for task in reader.page(where, before_seq=before, limit=limit)]

        assert found(failed) == [5, 1]
        assert found(failed, before=5) == [1]
        assert found(failed, limit=1) == [5]
        assert found(replace(failed, queue="night")) == [1]
        assert found(replace(failed, ids=("t1", "t2", "t3"))) == [1]
        assert found(replace(failed, principal=OWNER)) == [4]
        assert found(replace(failed, states=(TaskState.FAILED, TaskState.QUEUED))) == [5, 2, 1]

    @pytest.mark.parametrize("principal", ["me", OWNER])
    def test_open_tasks_of_a_principal_are_counted_up_to_a_limit(
        self, store: TaskStore, reader: TaskReader, principal: str
    ) -> None:
        mine = [a_task(f"t{n}", seq=n, principal=principal) for n in range(1, 5)]
        put(store, *mine, a_task("t5", seq=5, principal="you"))
        assert reader.open_of(principal, 9) == 4
        assert reader.open_of(principal, 3) == 3
        assert reader.open_of("nobody", 9) == 0
        save(store, ended(mine[0]))
        assert reader.open_of(principal, 9) == 3
        replayed = step(store.get(["t1"])["t1"], state=TaskState.QUEUED, finished_at=None)
        save(store, replayed)
        assert reader.open_of(principal, 9) == 4

    def test_a_reader_tells_whose_tasks_are(self, store: TaskStore, reader: TaskReader) -> None:
        put(
            store,
            a_task("t1", principal="me", queue="night"),
            a_task("t2", seq=2, principal=OWNER, task_type="sleep"),
        )
        assert reader.belongs(["t1", "t2", "t3", "t1"]) == {
            "t1": Belongs("me", "echo", "night"),
            "t2": Belongs(OWNER, "sleep", "default"),
        }
        assert reader.belongs([]) == {}

    def test_a_reader_tells_who_holds_keys(self, store: TaskStore, reader: TaskReader) -> None:
        put(store, a_task("t1"))
        claim = KeyClaim("p", "k", "t1", "f", T0)
        with store.transaction():
            store.claim_keys([claim])
        assert reader.keys_held([("p", "k"), ("p", "free"), ("q", "k")]) == {("p", "k"): claim}
        assert reader.keys_held([]) == {}


class TestDepth:
    def test_depth_counts_every_task_by_queue_and_state(self, home: Home) -> None:
        put(
            home.store,
            a_task("t1", seq=1),
            a_task("t2", seq=2),
            a_task("t3", seq=3, queue="night"),
            a_task("t4", seq=4, state=TaskState.COMPLETED),
        )
        save(home.store, step(a_task("t1", seq=1), state=TaskState.RUNNING, lease=a_lease()))
        expected = {
            ("default", TaskState.RUNNING): 1,
            ("default", TaskState.QUEUED): 1,
            ("night", TaskState.QUEUED): 1,
            ("default", TaskState.COMPLETED): 1,
        }
        assert home.reader().depth() == expected
        home.reopen()
        assert home.reader().depth() == expected

    def test_a_queue_has_waited_for_as_long_as_the_first_of_its_lanes(self, home: Home) -> None:
        assert home.reader().queued_since() == {}
        put(
            home.store,
            a_task("t1", seq=1, queued_at=T0 + 9, dispatch_key=T0),
            a_task("t2", seq=2, queued_at=T0 + 5, dispatch_key=T0 + 1),
            a_task("t3", seq=3, queued_at=T0 + 7, task_type="sleep"),
            a_task("t4", seq=4, queued_at=T0 + 3, queue="night"),
            a_task("t5", seq=5, queued_at=T0, hold=Hold.ORDERING),
            a_task("t6", seq=6, state=TaskState.SCHEDULED),
        )
        assert home.reader().queued_since() == {"default": T0 + 7, "night": T0 + 3}
        t3, t4 = (home.store.get([one])[one] for one in ("t3", "t4"))
        save(home.store, ended(t3), step(t4, state=TaskState.RUNNING, lease=a_lease()))
        assert home.reader().queued_since() == {"default": T0 + 9}

    def test_a_queue_of_tasks_without_an_instant_has_not_waited(self, home: Home) -> None:
        put(
            home.store,
            a_task("t1", seq=1, queued_at=None, queue="night"),
            a_task("t2", seq=2, queued_at=None),
            a_task("t3", seq=3, queued_at=T0 + 7, task_type="sleep"),
        )
        assert home.reader().queued_since() == {"default": T0 + 7}

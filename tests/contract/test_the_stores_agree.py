"""Whatever is done to two kinds of store, both tell the same afterwards, also after a rollback."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import FailureKind, Hold, Outcome, TaskFilter, TaskState, Token
from hcna_ray.store import bookkeeping
from hcna_ray.store.base import Counter, KeyClaim, TaskReader, TaskStore
from hcna_ray.store.memory import MemoryTaskStore
from hcna_ray.store.postgres import PostgresTaskStore
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.support import observed
from tests.support.builders import (
    T0,
    a_delivery,
    a_fact,
    a_lease,
    a_schedule,
    a_task,
    a_worker_record,
    an_attempt,
    an_audit_entry,
    an_error,
)
from tests.support.postgres import PostgresServer

if TYPE_CHECKING:
    from tests.contract.conftest import ReadableStore

NAMES = [f"t{i}" for i in range(6)]
names = st.sampled_from(NAMES)
instants = st.integers(0, 6).map(lambda i: T0 + i)
queues = st.sampled_from(["default", "night"])
types = st.sampled_from(["echo", "sleep"])
maybe_key = st.sampled_from([None, "k1", "k2"])

#: What may be written of a task, without asking whether the machine would ever do so.
changes = st.fixed_dictionaries(
    {
        "state": st.sampled_from([TaskState.QUEUED] * 5 + list(TaskState)),
        "dispatch_key": instants,
        "hold": st.sampled_from([Hold.NONE] * 4 + [Hold.ORDERING, Hold.CONCURRENCY, Hold(3)]),
        "lease": st.sampled_from([None, None, a_lease(), a_lease(worker="W2")]),
        "finished_at": instants,
        "due_at": instants,
        "pinned_to": st.sampled_from([None, None, "W2"]),
        "pinned_until": st.none() | instants,
        "error": st.none() | st.sampled_from(FailureKind).map(lambda kind: an_error(kind=kind)),
    }
)
specs = st.fixed_dictionaries(
    {
        "queue": queues,
        "task_type": types,
        "ordering_key": maybe_key,
        "concurrency_key": maybe_key,
        "batch_id": maybe_key,
        "principal": st.sampled_from(["", "me"]),
        "expires_at": st.none() | instants,
        "accepted_at": instants,
        "payload": st.binary(max_size=5),
    }
)
filters = st.builds(
    TaskFilter,
    states=st.lists(st.sampled_from(TaskState), max_size=3).map(tuple),
    task_type=st.none() | types,
    queue=st.none() | queues,
    worker=st.sampled_from([None, None, "W1", "W2"]),
    batch_id=maybe_key,
    principal=st.sampled_from([None, "me"]),
    kind=st.none() | st.sampled_from(FailureKind),
    since=st.none() | instants,
    ids=st.lists(names, max_size=3).map(tuple),
)
inserts = st.lists(st.tuples(names, specs, changes), min_size=1, max_size=3)
saves = st.lists(st.tuples(names, changes), min_size=1, max_size=4, unique_by=lambda pair: pair[0])
some_names = st.lists(names, min_size=1, max_size=3)
#: Twice what the rest is built upon.
operations = st.one_of(
    st.tuples(st.just("insert"), inserts),
    st.tuples(st.just("save"), saves),
    st.tuples(st.just("insert"), inserts),
    st.tuples(st.just("save"), saves),
    st.tuples(st.just("prune"), st.tuples(instants, instants, st.integers(0, 4))),
    st.tuples(st.just("prune"), st.just((T0 + 9, T0 + 9, 2))),
    st.tuples(st.just("save stale"), names),
    st.tuples(st.just("depend"), st.tuples(names, some_names)),
    st.tuples(st.just("undepend"), st.tuples(names, some_names)),
    st.tuples(st.just("claim"), st.lists(st.tuples(names, names, instants), max_size=3)),
    st.tuples(st.just("note"), names),
    st.tuples(st.just("settle"), names),
    st.tuples(st.just("hook"), names),
    st.tuples(st.just("plan"), st.tuples(st.integers(0, 3), st.none() | instants)),
    st.tuples(st.just("small"), st.tuples(queues, st.booleans())),
    st.tuples(st.just("generation"), st.none()),
)


class Boom(Exception):
    """What makes a transaction roll back."""


class Twins(RuleBasedStateMachine):
    """The same operations on both stores, with everything observable compared after each."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryTaskStore()
        self.create()
        self.durable = self.open()
        self.readers: list[TaskReader] = [self.memory.reader(), self.durable.reader()]
        self.seq = 0

    def create(self) -> None:
        """Make room for a new durable store."""

    def open(self) -> ReadableStore:
        """Open the durable store."""
        raise NotImplementedError

    def remove(self) -> None:
        """Delete the durable store, which is closed."""

    @property
    def stores(self) -> list[TaskStore]:
        return [self.memory, self.durable]

    @initialize(tasks=st.lists(st.tuples(specs, changes), min_size=4, max_size=4))
    def begin(self, tasks: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        named = [(name, *rest) for name, rest in zip(NAMES, tasks, strict=False)]
        self._transact([("insert", named)], fail=False)

    @rule(
        steps=st.lists(operations, min_size=2, max_size=8),
        fail=st.sampled_from([False, False, True]),
    )
    def transact(self, steps: list[tuple[str, Any]], fail: bool) -> None:
        self._transact(steps, fail)

    def _transact(self, steps: list[tuple[str, Any]], fail: bool) -> None:
        seq = self.seq
        committed = [view(reader) for reader in self.readers]
        answers: list[list[Any]] = [[], []]
        for i, (store, answer) in enumerate(zip(self.stores, answers, strict=True)):
            self.seq = seq
            try:
                with store.transaction():
                    for name, argument in steps:
                        answer.append(self.perform(store, name, argument))
                        answer.append(inside(store))
                    assert view(self.readers[i]) == committed[i]
                    if fail:
                        raise Boom
            except Boom:
                pass
        assert answers[0] == answers[1]
        if fail:
            assert [view(reader) for reader in self.readers] == committed

    def perform(self, store: TaskStore, name: str, argument: Any) -> Any:
        """Carry out one operation and return its answer, or the error it raised."""
        try:
            return self._perform(store, name, argument)
        except HcnaError as error:
            return type(error), error.args

    def _perform(self, store: TaskStore, name: str, argument: Any) -> Any:
        match name:
            case "insert":
                tasks = []
                for task_id, spec, changed in argument:
                    self.seq += 1
                    tasks.append(a_task(task_id, seq=self.seq, **spec, **changed))
                return store.insert(tasks)
            case "save":
                stored = store.get(task_id for task_id, _ in argument)
                return store.save(
                    [
                        stored[task_id].evolve(version=stored[task_id].version + 1, **changed)
                        for task_id, changed in argument
                        if task_id in stored
                    ]
                )
            case "save stale":
                return store.save(list(store.get([argument]).values()))
            case "depend":
                return store.add_dependencies(argument[0], argument[1])
            case "undepend":
                return store.drop_dependents(argument[0], argument[1])
            case "claim":
                claims = [KeyClaim("me", key, task_id, "f", at) for key, task_id, at in argument]
                return store.claim_keys(claims)
            case "note":
                store.bump({Counter("n", "echo", argument): 1})
                store.append_audit([an_audit_entry(argument)])
                store.save_attempts([an_attempt(argument)])
                store.save_attempts([an_attempt(argument, token=Token(1, 2), outcome=Outcome.LOST)])
                return store.append_facts([a_fact(argument), a_fact(argument, "started")])
            case "settle":
                store.push_settlements([(argument, True), (argument, False)])
                return store.drop_settlement(store.settlements(1)[0].number)
            case "hook":
                store.save_deliveries([a_delivery(argument), a_delivery("t1", due_at=T0 + 5)])
                return store.drop_deliveries([argument])
            case "plan":
                number, wake_at = argument
                planned = a_schedule(f"s{number}", wake_at=wake_at, started=number)
                store.save_schedules([planned, planned.evolve(name="every")])
                return store.drop_schedules([("owner", f"s{number - 1}")])
            case "small":
                queue, on = argument
                store.set_paused(queue, on)
                if on:
                    return store.save_worker(a_worker_record(queue))
                return store.forget_worker(queue)
            case "generation":
                return store.raise_generation()
            case "prune":
                return store.prune(*argument)
        raise AssertionError(name)

    @rule()
    def reopen(self) -> None:
        self.readers[1].close()
        self.durable.close()
        self.durable = self.open()
        self.readers[1] = self.durable.reader()

    @rule(where=filters, before=st.none() | st.integers(1, 40), limit=st.integers(1, 5))
    def list_tasks(self, where: TaskFilter, before: int | None, limit: int) -> None:
        one, other = (r.page(where, before_seq=before, limit=limit) for r in self.readers)
        assert one == other

    @rule(after=st.integers(0, 20), limit=st.integers(0, 5), some=st.lists(names), key=maybe_key)
    def follow(self, after: int, limit: int, some: list[str], key: str | None) -> None:
        one, other = (
            (
                r.ended(ids=some, after=after, limit=limit),
                r.ended(batch_id=key, after=after, limit=limit),
                r.open_count(ids=some),
                r.open_count(batch_id=key),
                r.facts(after=after, limit=limit),
                r.facts(after=after, limit=limit, task_id="t1"),
                r.audit(before=after or None, limit=limit),
            )
            for r in self.readers
        )
        assert one == other

    @invariant()
    def they_agree(self) -> None:
        assert inside(self.memory) == inside(self.durable)
        assert view(self.readers[0]) == view(self.readers[1])

    def teardown(self) -> None:
        for reader in self.readers:
            reader.close()
        self.durable.close()
        self.remove()


class SqliteTwins(Twins):
    """Memory and SQLite."""

    def create(self) -> None:
        self.folder = tempfile.TemporaryDirectory()

    def open(self) -> ReadableStore:
        return SqliteTaskStore(Path(self.folder.name) / "queue.db")

    def remove(self) -> None:
        self.folder.cleanup()


class PostgresTwins(Twins):
    """Memory and PostgreSQL."""

    server: PostgresServer
    template: str

    def create(self) -> None:
        self.name = self.server.create_database(self.template)

    def open(self) -> ReadableStore:
        return PostgresTaskStore(self.server.url(self.name))

    def remove(self) -> None:
        self.server.drop_database(self.name)


def inside(store: TaskStore) -> list[object]:
    """What the writer sees."""
    return observed.inside(store, NAMES, ["k1", "k2"])


def view(reader: TaskReader) -> list[object]:
    """What a reader sees."""
    return observed.view(reader, NAMES, ["k1", "k2"])


@pytest.fixture(params=[SqliteTwins, PostgresTwins])
def twins(request: pytest.FixtureRequest) -> type[Twins]:
    """Each pair of stores."""
    if request.param is PostgresTwins:
        PostgresTwins.server = request.getfixturevalue("postgres")
        PostgresTwins.template = request.getfixturevalue("postgres_template")
    pair: type[Twins] = request.param
    return pair


def test_memory_and_the_durable_store_agree(
    twins: type[Twins], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few that the cache of decoded tasks is always full.
    monkeypatch.setattr(bookkeeping, "KNOWN_MAX", 2)
    run_state_machine_as_test(
        twins,
        settings=settings(
            max_examples=70 if twins is SqliteTwins else 30,
            stateful_step_count=15,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

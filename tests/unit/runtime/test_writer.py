"""The writer thread: batches form by themselves, and nobody is left without an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import pytest

from hcna_ray.core.errors import ModeratorUnavailable, Overloaded, StoreTooOld, StoreUnavailable
from hcna_ray.core.models import Fact, Task, TaskState
from hcna_ray.runtime import writer as writer_module
from hcna_ray.runtime.messages import Accepted, Heartbeat, SubmitBatch
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Cancel, Pending, Query, Reports, Request
from hcna_ray.runtime.writer import EXIT_BUG, EXIT_FSYNC, WriterThread
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import a_spec
from tests.support.paper_worker import PaperClock

WAIT_S = 10.0


def a_heartbeat(number: int) -> Heartbeat:
    return Heartbeat(worker=f"W{number}", incarnation="i", telemetry={})


class SlowModerator:
    """Answers every request with its batch's size; a test says when a batch may go on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.batches: list[int] = []
        self.entered = threading.Semaphore(0)
        self.may_go_on = threading.Semaphore(0)

    def apply(self, batch: Sequence[Pending]) -> Outbound:
        if not batch:
            return Outbound(())
        if self.error is not None:
            raise self.error
        self.batches.append(len(batch))
        self.entered.release()
        assert self.may_go_on.acquire(timeout=WAIT_S)
        return Outbound(tuple((pending, len(batch)) for pending in batch))

    def sleep_s(self) -> float:
        return 0.05


class Office:
    """A writer thread around a moderator, with its answers collected."""

    def __init__(
        self, moderator: SlowModerator, items_max: int = 100, build: Callable[[], Any] | None = None
    ) -> None:
        self.moderator = moderator
        self.exits: list[int] = []
        self.exited = threading.Event()
        self.answers: list[object] = []
        self.answered = threading.Semaphore(0)
        self.writer = WriterThread(
            build or (lambda: cast(Moderator, moderator)),
            PaperClock(),
            publish=self._publish,
            items_max=items_max,
            exit_process=self._exit,
        )

    def _publish(self, outbound: Outbound) -> None:
        for pending, answer in outbound.answers:
            pending.resolve(answer)

    def _exit(self, status: int) -> None:
        self.exits.append(status)
        self.exited.set()

    def ask(self, request: Request | None = None) -> None:
        def resolve(answer: object) -> None:
            self.answers.append(answer)
            self.answered.release()

        self.writer.submit(request or Query(name="status"), resolve)

    def wait_for_answers(self, count: int) -> None:
        for _ in range(count):
            assert self.answered.acquire(timeout=WAIT_S)


def test_what_arrives_during_a_commit_goes_into_the_next_one_together() -> None:
    office = Office(SlowModerator())
    office.writer.start()
    office.ask()
    assert office.moderator.entered.acquire(timeout=WAIT_S)
    for _ in range(5):
        office.ask()

    office.moderator.may_go_on.release(2)
    office.wait_for_answers(6)

    assert office.moderator.batches == [1, 5]
    assert office.answers == [1, 5, 5, 5, 5, 5]
    office.writer.close()


def test_workers_do_not_wait_behind_all_that_clients_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SPECS_MAX", 3)
    office = Office(SlowModerator())
    office.writer.start()
    office.ask()
    assert office.moderator.entered.acquire(timeout=WAIT_S)
    for names in (("a", "b"), ("c", "d"), ("e",), ("f",)):
        office.ask(SubmitBatch(specs=tuple(a_spec(name) for name in names)))
    office.ask(Query(name="status"))
    office.ask(a_heartbeat(1))

    office.moderator.may_go_on.release(3)
    office.wait_for_answers(7)

    # Two submissions and the heartbeat; what came after the third one keeps its place.
    assert office.moderator.batches == [1, 3, 3]
    office.writer.close()


def test_the_stand_in_sleeps_until_somebody_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_LOOK_S", 0.0)
    office = Office(SlowModerator())
    looked = threading.Semaphore(0)
    look_after = office.writer.look_after

    def look() -> list[tuple[Pending, object]]:
        looked.release()
        return look_after()

    monkeypatch.setattr(office.writer, "look_after", look)
    office.writer.start()
    office.ask()
    assert office.moderator.entered.acquire(timeout=WAIT_S)
    assert not looked.acquire(blocking=False)

    office.ask()

    assert looked.acquire(timeout=WAIT_S)
    office.moderator.may_go_on.release(2)
    office.wait_for_answers(2)
    office.writer.close()


def test_closing_commits_what_waits_and_refuses_what_comes_later() -> None:
    office = Office(SlowModerator())
    office.writer.start()
    office.ask()
    assert office.moderator.entered.acquire(timeout=WAIT_S)
    office.ask()
    office.moderator.may_go_on.release(2)

    office.writer.close()
    office.writer.close()
    office.ask()

    assert office.answers[:2] == [1, 1]
    assert isinstance(office.answers[2], ModeratorUnavailable)


def test_a_full_inbox_refuses_at_once() -> None:
    office = Office(SlowModerator(), items_max=2)
    office.writer.start()
    office.ask()
    assert office.moderator.entered.acquire(timeout=WAIT_S)
    for _ in range(3):
        office.ask()

    assert isinstance(office.answers[0], Overloaded)
    office.moderator.may_go_on.release(2)
    office.wait_for_answers(4)
    office.writer.close()


def test_an_inbox_full_of_tasks_has_room_for_what_workers_say() -> None:
    office = Office(SlowModerator(), items_max=2)
    office.writer.start()
    office.ask()
    assert office.moderator.entered.acquire(timeout=WAIT_S)
    for n in range(3):
        office.ask(SubmitBatch(specs=(a_spec(f"t{n}"),)))
    assert [type(answer) for answer in office.answers] == [Overloaded]

    office.ask(a_heartbeat(1))
    office.ask(Reports(worker="W1", incarnation="i", reports=()))
    assert len(office.answers) == 1  # Both wait for the next batch.
    office.ask(a_heartbeat(2))
    assert [type(answer) for answer in office.answers] == [Overloaded] * 2  # Bounded, too.

    office.moderator.may_go_on.release(3)
    office.wait_for_answers(7)
    assert office.moderator.batches == [1, 4]
    office.moderator.may_go_on.release()
    office.ask()  # Whoever was taken out of the inbox has left room.
    office.wait_for_answers(1)
    office.writer.close()


@pytest.mark.parametrize(
    ("error", "status"), [(OSError("fsync"), EXIT_FSYNC), (KeyError("bug"), EXIT_BUG)]
)
def test_what_cannot_be_survived_ends_the_process(error: Exception, status: int) -> None:
    office = Office(SlowModerator(error))
    office.writer.start()
    office.ask()

    assert office.exited.wait(WAIT_S)
    assert office.exits == [status]
    assert office.answers == []  # Nobody is told anything: what is on disk is unknown.


def test_a_store_that_does_not_open_is_told_to_whoever_starts() -> None:
    def build() -> Any:
        raise StoreTooOld("3.40.1", "3.51.3")

    with pytest.raises(StoreTooOld):
        Office(SlowModerator(), build=build).writer.start()


def test_no_answer_leaves_before_its_commit() -> None:
    moderator = SlowModerator()
    office = Office(moderator)
    office.writer.start()
    office.ask()
    assert moderator.entered.acquire(timeout=WAIT_S)

    assert office.answers == []
    moderator.may_go_on.release()
    office.wait_for_answers(1)
    office.writer.close()


def test_a_store_that_cannot_be_asked_for_the_next_timer_ends_the_process() -> None:
    class Unreadable(SlowModerator):
        def sleep_s(self) -> float:
            raise StoreUnavailable("disk I/O error")

    office = Office(Unreadable())
    office.writer.start()

    assert office.exited.wait(WAIT_S)
    assert office.exits == [EXIT_BUG]


class FullDisk(MemoryTaskStore):
    """Refuses to commit while a test says so."""

    full = True

    def append_facts(self, facts: Sequence[Fact]) -> int:
        if self.full:
            raise StoreUnavailable("no space left on device")
        return super().append_facts(facts)


def test_a_refused_commit_is_answered_to_all_and_the_next_one_works() -> None:
    store = FullDisk()
    moderator = Moderator(
        store, Policy(), clock=PaperClock(), jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
    )
    office = Office(SlowModerator(), build=lambda: moderator)
    office.writer.start()
    for number in range(3):
        office.ask(SubmitBatch(specs=(a_spec(f"t{number}"),)))
    office.wait_for_answers(3)
    assert [type(answer) for answer in office.answers] == [StoreUnavailable] * 3

    store.full = False
    office.ask(SubmitBatch(specs=(a_spec("t0"),)))
    office.wait_for_answers(1)

    assert office.answers[-1] == [Accepted("t0", TaskState.QUEUED)]
    assert list(store.get(["t0", "t1", "t2"])) == ["t0"]
    assert office.exits == []
    office.writer.close()


class FarStore(MemoryTaskStore):
    """A store on a server that is away while a test says so: it can neither be written nor read."""

    away = False

    def _reach(self) -> None:
        if self.away:
            raise StoreUnavailable("connection refused")

    def transaction(self) -> AbstractContextManager[None]:
        self._reach()
        return super().transaction()

    def leased(self) -> list[Task]:
        self._reach()
        return super().leased()

    def next_wake(self) -> float | None:
        self._reach()
        return super().next_wake()

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        self._reach()
        return super().get(ids)


def test_a_store_that_is_away_is_refused_until_it_is_back_and_the_process_stays() -> None:
    store = FarStore()
    moderator = Moderator(
        store, Policy(), clock=PaperClock(), jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
    )
    office = Office(SlowModerator(), build=lambda: moderator)
    office.writer.start()
    office.ask(SubmitBatch(specs=(a_spec("t0"),)))
    office.wait_for_answers(1)

    store.away = True
    for number in range(1, 4):
        office.ask(SubmitBatch(specs=(a_spec(f"t{number}"),)))
        office.ask(Cancel(task_id="t0", reason="", principal="p"))
        office.wait_for_answers(2)
    assert [type(answer) for answer in office.answers[1:]] == [StoreUnavailable] * 6
    assert moderator.sleep_s() > 0
    store.away = False
    office.ask(SubmitBatch(specs=(a_spec("t9"),)))
    office.wait_for_answers(1)

    assert office.answers[-1] == [Accepted("t9", TaskState.QUEUED)]
    assert {name: task.state for name, task in store.get(["t0", "t1", "t9"]).items()} == {
        "t0": TaskState.QUEUED,
        "t9": TaskState.QUEUED,
    }
    assert office.exits == []
    office.writer.close()


def test_half_a_request_that_met_trouble_is_not_committed() -> None:
    class Half(MemoryTaskStore):
        """Cannot be asked for lines of tasks."""

        def ordering_line(self, key: str, limit: int) -> list[Task]:
            raise StoreUnavailable("connection reset")

    store = Half()
    moderator = Moderator(
        store, Policy(), clock=PaperClock(), jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
    )
    specs = (a_spec("t1"), a_spec("t2", ordering_key="o"))
    outbound = moderator.apply([Pending(SubmitBatch(specs=specs), lambda answer: None, 0.0)])

    assert [type(answer) for _pending, answer in outbound.answers] == [StoreUnavailable]
    assert store.get(["t1", "t2"]) == {}


class TestOpening:
    """What happens until there is a moderator."""

    def test_a_store_that_is_away_is_tried_again_and_everybody_is_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer_module, "OPEN_AGAIN_S", 0.01)
        store, away = MemoryTaskStore(), threading.Event()
        away.set()

        def build() -> Any:
            if away.is_set():
                raise StoreUnavailable("connection refused", 5)
            return Moderator(
                store, Policy(), clock=PaperClock(), jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
            )

        office = Office(SlowModerator(), build=build)
        assert office.writer.begin() is False
        for _ in range(3):
            office.ask(Query(name="status"))
        for _ in range(3):
            assert office.answered.acquire(timeout=WAIT_S)
        assert {str(one) for one in office.answers} == {
            "M1 cannot open its task store: connection refused"
        }
        assert all(isinstance(one, StoreUnavailable) for one in office.answers)
        office.answers.clear()
        away.clear()
        while not office.answers or isinstance(office.answers[-1], StoreUnavailable):
            office.ask(SubmitBatch(specs=(a_spec("t1"),)))
            assert office.answered.acquire(timeout=WAIT_S)
        assert office.answers[-1] == [Accepted("t1", TaskState.QUEUED)]
        office.writer.close()
        assert office.exits == []

    def test_it_can_be_stopped_while_it_waits(self) -> None:
        def build() -> Any:
            raise StoreUnavailable("connection refused", 5)

        office = Office(SlowModerator(), build=build)
        office.writer.begin()
        office.writer.close()
        office.ask(Query(name="status"))
        assert isinstance(office.answers[-1], ModeratorUnavailable)

    def test_a_bug_ends_the_process(self) -> None:
        def build() -> Any:
            raise ValueError("impossible")

        office = Office(SlowModerator(), build=build)
        assert office.writer.begin() is False
        assert office.exited.wait(WAIT_S)
        assert office.exits == [EXIT_BUG]

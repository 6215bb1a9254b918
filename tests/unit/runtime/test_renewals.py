"""Sessions go on while the store is away, for as long as that cannot do harm."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hcna_ray.core.errors import StoreUnavailable
from hcna_ray.core.models import TaskState
from hcna_ray.runtime.messages import Accepted, Exchange, Heartbeat, HeartbeatReply, SubmitBatch
from hcna_ray.runtime.moderator import Outbound
from hcna_ray.runtime.requests import Reports, Request
from hcna_ray.runtime.writer import REFUSE_S, WriterThread
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import a_spec
from tests.support.paper_worker import WAITING, Desk, PaperWorker


class RemoteStore(MemoryTaskStore):
    """A store in memory that can be away, and that somebody else might have taken over then."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        #: Only commits fail.
        self.away_on_commit = False
        self.unconfirmed = 0.0
        #: Set while a commit hangs.
        self.entered, self.may_go_on = threading.Event(), threading.Event()
        self.hangs = False

    def unconfirmed_s(self) -> float:
        return self.unconfirmed

    def _ask(self) -> None:
        if self.away:
            raise StoreUnavailable("the server is away", 2)

    def leased(self) -> Any:
        self._ask()
        return super().leased()

    def next_wake(self) -> float | None:
        self._ask()
        return super().next_wake()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._ask()
        with super().transaction():
            yield
            if self.away_on_commit:
                raise StoreUnavailable("the disk is full", 5)
            if self.hangs:
                self.entered.set()
                assert self.may_go_on.wait(20)


@pytest.fixture
def store() -> RemoteStore:
    return RemoteStore()


@pytest.fixture
def desk(store: RemoteStore) -> Desk:
    """A moderator on it; it looks again only when a test lets time pass."""
    desk = Desk(store)
    desk.runs_on = False
    return desk


def beat(worker: PaperWorker, unanswered_s: float = 0.0) -> Heartbeat:
    return Heartbeat(
        worker=worker.name,
        incarnation=worker.incarnation,
        telemetry={},
        unanswered_s=unanswered_s,
    )


def running(desk: Desk) -> tuple[PaperWorker, Any]:
    w1 = PaperWorker(desk)
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    return w1, offer


class TestWhileTheStoreIsAway:
    def test_heartbeats_are_answered_and_nothing_else(self, desk: Desk, store: RemoteStore) -> None:
        w1, offer = running(desk)
        store.away = True
        submit = SubmitBatch(specs=(a_spec("t2"),))
        for _ in range(3):
            desk.clock.advance(3)
            reply, refusal, report = desk.apply(beat(w1), submit, _reports(w1, offer))
            assert reply == HeartbeatReply(known=True)
            assert isinstance(refusal, StoreUnavailable)
            assert refusal.retry_after_s
            assert isinstance(report, StoreUnavailable)
        store.away = False
        desk.tick(1)
        assert desk.ask(submit) == [Accepted("t2", TaskState.QUEUED)]
        assert desk.task("t1").state is TaskState.RUNNING

    def test_what_was_renewed_counts_when_it_is_back(self, desk: Desk, store: RemoteStore) -> None:
        w1, offer = running(desk)
        store.away = True
        for _ in range(10):
            desk.clock.advance(5)
            assert desk.ask(beat(w1, unanswered_s=5)) == HeartbeatReply(known=True)
        store.away = False
        desk.tick(1)
        assert desk.task("t1").state is TaskState.RUNNING
        w1.report(w1.ended(offer))
        assert desk.task("t1").state is TaskState.COMPLETED

    def test_who_is_silent_meanwhile_loses_its_leases_afterwards(
        self, desk: Desk, store: RemoteStore
    ) -> None:
        running(desk)
        store.away = True
        desk.tick(40)
        assert desk.task("t1").state is TaskState.RUNNING
        store.away = False
        desk.tick(1)
        assert desk.task("t1").state is not TaskState.RUNNING
        assert desk.task("t1").losses == 1

    def test_an_overdue_session_is_not_renewed(self, desk: Desk, store: RemoteStore) -> None:
        w1, _offer = running(desk)
        store.away = True
        desk.clock.advance(36)
        with pytest.raises(StoreUnavailable):
            desk.ask(beat(w1))

    def test_a_stranger_and_an_old_incarnation_are_not(
        self, desk: Desk, store: RemoteStore
    ) -> None:
        w1, _offer = running(desk)
        store.away = True
        for name, incarnation in (("W2", "a"), ("W1", "b")):
            with pytest.raises(StoreUnavailable):
                desk.ask(Heartbeat(worker=name, incarnation=incarnation, telemetry={}))
        assert desk.ask(beat(w1)) == HeartbeatReply(known=True)

    def test_a_parked_call_that_is_refused_is_not_answered_again(
        self, desk: Desk, store: RemoteStore
    ) -> None:
        w1 = PaperWorker(desk)
        parked = w1.exchange()
        assert desk.answer(parked) is WAITING
        store.away_on_commit = True
        (refusal,) = desk.apply(SubmitBatch(specs=(a_spec("t1"),)))
        assert isinstance(refusal, StoreUnavailable)
        assert isinstance(desk.answer(parked), StoreUnavailable)
        store.away_on_commit = False
        desk.submit_ids("t1")
        assert isinstance(desk.answer(parked), StoreUnavailable)
        assert desk.task("t1").lease is None, "nothing is granted to a call that has ended"
        assert [offer.task_id for offer in w1.granted()] == ["t1"]

    def test_nor_is_one_that_was_parked_by_the_refused_batch(
        self, desk: Desk, store: RemoteStore
    ) -> None:
        w1 = PaperWorker(desk)
        store.away_on_commit = True
        call = Exchange(worker="W1", incarnation="a", slot=0, seq=1)
        refusals = desk.apply(call, SubmitBatch(specs=(a_spec("t1"),)))
        assert all(isinstance(one, StoreUnavailable) for one in refusals)
        store.away_on_commit = False
        desk.submit_ids("t1")
        assert desk.task("t1").lease is None
        assert [offer.task_id for offer in w1.granted()] == ["t1"]


class TestWhatIsSafe:
    def test_it_ends_before_another_moderator_could_give_the_leases_away(
        self, desk: Desk, store: RemoteStore
    ) -> None:
        w1, _offer = running(desk)
        policy = desk.policy
        store.away = True
        store.unconfirmed = policy.lease_ttl_s - policy.self_stop_s
        assert desk.ask(beat(w1)) == HeartbeatReply(known=True)
        # Whoever is answered now runs on for as long as this, its last five seconds included.
        runs_on_s = store.unconfirmed + policy.self_stop_s + policy.lease_grace_s
        assert runs_on_s <= policy.lease_ttl_s + policy.lease_grace_s
        store.unconfirmed += 0.001
        with pytest.raises(StoreUnavailable):
            desk.ask(beat(w1))

    def test_a_session_that_a_batch_decides_about_is_not_renewed_beside_it(
        self, desk: Desk, store: RemoteStore
    ) -> None:
        w1, _offer = running(desk)
        w1.heartbeat()
        assert desk.moderator.renew(beat(w1)) == HeartbeatReply(known=True)
        store.away = True
        with pytest.raises(StoreUnavailable):
            PaperWorker(desk, incarnation="b")
        assert desk.moderator.renew(beat(w1)) is None


def _reports(worker: PaperWorker, offer: Any) -> Request:
    return Reports(
        worker=worker.name, incarnation=worker.incarnation, reports=(worker.ended(offer),)
    )


class TestTheStandIn:
    def test_it_answers_while_a_commit_hangs(self, desk: Desk, store: RemoteStore) -> None:
        w1, _offer = running(desk)

        def publish(outbound: Outbound) -> None:
            for pending, answer in outbound.answers:
                pending.resolve(answer)

        writer = WriterThread(lambda: desk.moderator, desk.clock, publish=publish, items_max=10)
        writer.start()
        store.hangs = True
        stuck = Call(writer, SubmitBatch(specs=(a_spec("t2"),)))
        assert store.entered.wait(20)
        renewal = Call(writer, beat(w1))
        waiting = Call(writer, SubmitBatch(specs=(a_spec("t3"),)))
        assert writer.look_after() == [], "a commit may take its time"
        desk.clock.advance(2)
        assert renewal.answer() == HeartbeatReply(known=True)
        assert writer.look_after() == []
        desk.clock.advance(REFUSE_S)
        refusal = waiting.answer()
        assert isinstance(refusal, StoreUnavailable)
        assert refusal.retry_after_s
        store.hangs = False
        store.may_go_on.set()
        assert stuck.answer() == [Accepted("t2", TaskState.QUEUED)]
        writer.close()
        assert sorted(store.get(["t1", "t2", "t3"])) == ["t1", "t2"]


class Call:
    """A request to a writer, and its answer."""

    def __init__(self, writer: WriterThread, request: Request) -> None:
        self._answered = threading.Event()
        self._answer: object = None
        writer.submit(request, self._take)

    def _take(self, answer: object) -> None:
        self._answer = answer
        self._answered.set()

    def answer(self) -> object:
        assert self._answered.wait(20)
        return self._answer

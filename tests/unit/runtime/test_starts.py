"""Attempts that were handed out and do not begin: asked for, then taken back by the fence."""

from __future__ import annotations

from typing import Any

import pytest

from hcna_ray.core.models import FailureKind, Needs, TaskError, TaskState, Token
from hcna_ray.runtime import starts
from hcna_ray.runtime.messages import (
    NOT_STARTED,
    STUCK,
    UNSTARTED,
    Grant,
    Offer,
    Report,
    ReportKind,
    Stop,
)
from hcna_ray.runtime.starts import (
    ANSWER_S,
    FENCE_S,
    HEAVY_PATIENCE,
    UNSTARTED_MAX,
    StartWatch,
)
from tests.support.paper_worker import WAITING, Desk, PaperWorker

START_S = 15.0


@pytest.fixture
def desk() -> Desk:
    return Desk(start_s=START_S)


@pytest.fixture
def w1(desk: Desk) -> PaperWorker:
    return PaperWorker(desk)


def pass_time(worker: PaperWorker, seconds: float) -> None:
    """Let time pass while a worker goes on beating."""
    for _ in range(int(seconds)):
        worker.heartbeat()
        worker.desk.tick(1.0)


class Asking:
    """A call of a worker that is always parked, as its agent's is."""

    def __init__(self, worker: PaperWorker, slot: int = -1) -> None:
        self.worker, self.slot = worker, slot
        self.parked = worker.exchange(slot)

    def news(self) -> Grant:
        """Return what the call was answered by now, and ask again."""
        grant = self.worker.desk.answer(self.parked)
        if grant is WAITING:
            return Grant(seq=0)
        assert isinstance(grant, Grant)
        self.parked = self.worker.exchange(self.slot)
        return grant if grant.stops or grant.offers else self.news()

    def orders(self) -> list[Stop]:
        return list(self.news().stops)


def never_began(worker: PaperWorker, offer: Offer) -> Report:
    error = TaskError(kind=FailureKind.LOST, type=NOT_STARTED, message="it was not begun")
    return worker.ended(offer, ReportKind.RETURNED, error=error, result=None)


def echoes(desk: Desk, worker: PaperWorker, *ids: str) -> list[Offer]:
    """Have one grant of several short tasks."""
    desk.submit_ids("known")
    (known,) = worker.granted()
    desk.submit_ids(*ids)
    return worker.granted(0, worker.started(known), worker.ended(known))


def test_a_worker_is_asked_for_what_should_have_begun(desk: Desk, w1: PaperWorker) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    pass_time(w1, START_S)
    assert agent.orders() == []
    pass_time(w1, 2)

    assert agent.orders() == [Stop("t1", Token(1, 1), 0, UNSTARTED)]
    # Nothing is taken from it yet: it may have begun, and the word of it be late.
    w1.report(w1.started(offer))
    pass_time(w1, 60)
    assert desk.task("t1").state is TaskState.RUNNING
    assert w1.report(w1.ended(offer)).applied == 1


def test_what_comes_back_unstarted_is_handed_out_anew_and_charged_with_nothing(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    pass_time(w1, START_S + 2)
    (again,) = w1.granted(0, never_began(w1, offer))

    assert Token(*again.token) == Token(1, 2)
    task = desk.task("t1")
    assert (task.failures, task.losses) == (0, 0)
    w1.report(w1.started(again), w1.ended(again))
    assert desk.task("t1").state is TaskState.COMPLETED


def test_what_nobody_answers_for_is_taken_back_by_the_fence(desk: Desk, w1: PaperWorker) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w2 = PaperWorker(desk, "W2")
    other = Asking(w2, 0)
    reasons, tokens = [], []
    while not tokens:
        w2.heartbeat()
        pass_time(w1, 1)
        reasons += [stop.reason for stop in agent.orders()]
        tokens += [Token(*one.token) for one in other.news().offers]
    reasons += [stop.reason for stop in agent.orders()]

    assert (reasons[0], set(reasons[1:]), tokens) == (UNSTARTED, {STUCK}, [Token(1, 2)])
    assert len(reasons) == 2 + FENCE_S / ANSWER_S
    # The old token opens nothing, should that slot ever wake up.
    assert w1.report(w1.started(offer), w1.ended(offer)).applied == 0
    assert desk.task("t1").lease is not None


def test_what_might_still_begin_is_handed_out_when_its_slot_has_ended(
    desk: Desk, w1: PaperWorker
) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    w1.granted()
    for seconds, reason in ((START_S + 2, UNSTARTED), (ANSWER_S + 1, STUCK)):
        pass_time(w1, seconds)
        assert [stop.reason for stop in agent.orders()] == [reason]
    assert desk.task("t1").lease is not None  # Its agent may not have ended the slot yet.

    w1.gone(0)
    (again,) = w1.granted(1)

    assert Token(*again.token) == Token(1, 2)
    # It counts as not begun: now there is twice the patience.
    pass_time(w1, 2 * START_S - 2)
    assert agent.orders() == []
    pass_time(w1, 4)
    assert [stop.reason for stop in agent.orders()] == [UNSTARTED]


def test_an_attempt_whose_word_of_its_start_is_lost_is_never_handed_out_again(
    desk: Desk, w1: PaperWorker
) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    started = w1.started(offer)
    for _ in range(60):
        w1.heartbeat(began=((offer.task_id, offer.token, started.at),))
        desk.tick(1.0)

    task = desk.task("t1")
    assert (task.state, task.attempt) == (TaskState.RUNNING, 1)
    assert task.started_at == started.at
    assert agent.orders() == []
    assert w1.report(started, w1.ended(offer)).applied == 1
    # A heartbeat that was on its way says nothing new.
    w1.heartbeat(began=((offer.task_id, offer.token, started.at),))
    assert desk.task("t1").state is TaskState.COMPLETED


@pytest.mark.parametrize("taken_back", [False, True])
def test_an_answer_that_is_repeated_grants_nothing_that_was_asked_back(
    desk: Desk, w1: PaperWorker, taken_back: bool
) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    w1.granted()  # Which is lost, and the slot asks again only now.
    pass_time(w1, START_S + (FENCE_S + 5 if taken_back else 2))
    assert UNSTARTED in [stop.reason for stop in agent.orders()]

    grant = desk.answer(w1.exchange(seq=1))

    assert grant == Grant(seq=1)
    (again,) = w1.granted()
    assert Token(*again.token) == Token(1, 2)


def test_the_last_of_many_has_as_long_as_the_first(desk: Desk, w1: PaperWorker) -> None:
    agent = Asking(w1)
    offers = echoes(desk, w1, *(f"t{number}" for number in range(16)))
    assert len(offers) == 16
    for offer in offers:
        pass_time(w1, START_S - 1)
        assert agent.orders() == []
        w1.report(w1.started(offer), w1.ended(offer))
    assert desk.task("t15").state is TaskState.COMPLETED


def test_what_waits_behind_an_attempt_that_runs_on_is_asked_for(
    desk: Desk, w1: PaperWorker
) -> None:
    agent = Asking(w1)
    first, *behind = echoes(desk, w1, "t1", "t2", "t3")
    w1.report(w1.started(first))
    pass_time(w1, START_S + 2)

    assert [stop.task_id for stop in agent.orders()] == ["t2", "t3"]
    w1.report(*(never_began(w1, offer) for offer in behind))
    assert desk.task("t1").state is TaskState.RUNNING
    assert desk.task("t2").ready


def test_a_process_of_its_own_may_take_longer(desk: Desk, w1: PaperWorker) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1", "t2", needs=Needs(cpu=1.0))
    first, _ = agent.news().offers
    pass_time(w1, 5)
    w1.report(w1.started(first))  # That says nothing of the other.
    pass_time(w1, HEAVY_PATIENCE * START_S - 6)
    assert agent.orders() == []
    pass_time(w1, 3)

    assert [(stop.task_id, stop.slot) for stop in agent.orders()] == [("t2", -1)]


def test_nothing_is_expected_of_a_worker_that_cannot_be_heard(desk: Desk, w1: PaperWorker) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    w1.granted()
    for _ in range(30):
        desk.tick(1.0)
    assert desk.task("t1").lease is not None  # Its silence will end the lease, at its time.
    pass_time(w1, START_S)

    assert agent.orders() == []


def test_a_moderator_that_stood_still_blames_nobody(desk: Desk, w1: PaperWorker) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    w1.granted()
    desk.tick(1.0)
    desk.clock.advance(25.0)
    w1.heartbeat()
    pass_time(w1, 5)

    assert agent.orders() == []


def test_a_new_moderator_starts_over(desk: Desk, w1: PaperWorker) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    w1.granted()
    pass_time(w1, START_S - 1)
    desk.restart()
    w1.hello()
    pass_time(w1, START_S)

    assert agent.orders() == []


def test_each_time_there_is_more_patience_and_at_last_there_is_an_end(
    desk: Desk, w1: PaperWorker
) -> None:
    agent = Asking(w1)
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    waits = []
    while desk.task("t1").state is TaskState.QUEUED:
        waited = 0
        while not agent.orders():
            pass_time(w1, 1)
            waited += 1
        waits.append(waited)
        grant = desk.answer(w1.exchange(0, never_began(w1, offer)))
        if grant is not WAITING:
            (offer,) = grant.offers

    assert len(waits) == UNSTARTED_MAX
    assert waits[:5] == pytest.approx([15, 30, 60, 120, 240], abs=2)
    assert max(waits) <= START_S * starts.PATIENCE_MAX + 2
    task = desk.task("t1")
    assert (task.state, task.failures, task.losses) == (TaskState.FAILED, 0, 0)
    assert task.error is not None
    assert task.error.kind is FailureKind.LOST
    assert "handed out 8 times and never started" in task.error.message


def test_who_begins_is_not_held_to_earlier_times(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", max_losses=100)
    for _ in range(UNSTARTED_MAX):
        (offer,) = w1.granted()
        (offer,) = w1.granted(0, never_began(w1, offer))
        w1.report(w1.started(offer))
        desk.tick(1.0)
        w1.heartbeat()
        w1.gone(0)

    assert desk.task("t1").state is TaskState.QUEUED


@pytest.mark.parametrize("late", ["started", "old token"])
def test_late_words_of_not_having_begun_count_nothing(
    desk: Desk, w1: PaperWorker, late: str
) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    if late == "started":
        w1.report(w1.started(offer))
    else:
        w1.report(w1.ended(offer, ReportKind.RETURNED, result=None))
        w1.granted(1)
    for _ in range(UNSTARTED_MAX):
        assert w1.report(never_began(w1, offer)).applied == 0

    assert not desk.task("t1").terminal


def test_the_counts_are_bounded(monkeypatch: pytest.MonkeyPatch, desk: Desk) -> None:
    monkeypatch.setattr(starts, "COUNTED_MAX", 2)
    watch = StartWatch(START_S)
    w1 = PaperWorker(desk)
    desk.submit_ids("t1", "t2", "t3")
    tasks = [desk.task(w1.granted(slot)[0].task_id) for slot in range(3)]

    def again(task: Any) -> bool:
        return watch.returned(task, "why", 0.0).give_up

    assert not any(again(task) for task in tasks)
    for _ in range(UNSTARTED_MAX - 2):
        assert not again(tasks[1])
    assert again(tasks[1])
    assert not any(again(tasks[0]) for _ in range(UNSTARTED_MAX - 1))  # It had been forgotten.

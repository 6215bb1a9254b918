"""Workers that come and go: what the moderator thinks of them, takes back and gives them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from hcna_ray.core.errors import (
    NotFound,
    StaleWorker,
    StoreUnavailable,
    WorkerNameTaken,
    WorkerOnline,
    WorkerUnavailable,
)
from hcna_ray.core.models import (
    HEAVY_SLOT,
    FailureKind,
    Needs,
    OnDisconnect,
    Progress,
    TaskError,
    TaskState,
    WorkerState,
)
from hcna_ray.runtime.messages import (
    DISK_FAILED,
    DRAINED,
    Goodbye,
    Grant,
    Heartbeat,
    Offer,
    Report,
    ReportKind,
)
from hcna_ray.runtime.requests import ForgetWorker, MarkWorker, NodeSeen, NodesSeen, SendIntent
from tests.support.paper_worker import WAITING, Desk, PaperWorker


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def w1(desk: Desk) -> PaperWorker:
    return PaperWorker(desk)


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def bye(worker: PaperWorker, *reports: Report) -> Any:
    return worker.desk.ask(
        Goodbye(worker=worker.name, incarnation=worker.incarnation, reports=reports)
    )


def state(desk: Desk, name: str = "W1") -> WorkerState:
    found: WorkerState = desk.workers()[name].state
    return found


def pass_time(desk: Desk, seconds: int, *alive: PaperWorker) -> None:
    """Let time pass while some workers go on beating."""
    for _ in range(seconds):
        for worker in alive:
            worker.heartbeat()
        desk.tick(1.0)


def running(worker: PaperWorker, task_id: str = "t1", **spec: Any) -> Offer:
    worker.desk.submit_ids(task_id, **spec)
    (offer,) = worker.granted()
    worker.report(worker.started(offer))
    return offer


def said(caplog: pytest.LogCaptureFixture, action: str) -> list[logging.LogRecord]:
    return [one for one in caplog.records if getattr(one, "action", "") == action]


# -- goodbye ---------------------------------------------------------------------------------------


def test_after_a_goodbye_its_tasks_go_on_elsewhere_at_once_and_without_a_loss(
    desk: Desk, w1: PaperWorker, caplog: pytest.LogCaptureFixture
) -> None:
    offer = running(w1, max_losses=1)
    desk.submit_ids("t2")
    (granted,) = w1.granted(1)
    parked = w1.exchange(2)

    bye(w1)

    assert isinstance(desk.answer(parked), StaleWorker)
    assert (desk.task("t1").state, desk.task("t1").losses) == (TaskState.QUEUED, 0)
    assert state(desk) is WorkerState.GONE
    w2 = PaperWorker(desk, "W2")
    again = {w2.granted(0)[0].task_id, w2.granted(1)[0].task_id}
    assert again == {offer.task_id, granted.task_id}
    (line,) = said(caplog, "worker.left")
    assert line.getMessage() == "W1 left in good order; 2 attempts taken back"


def test_a_task_may_wait_for_a_worker_that_said_goodbye(desk: Desk, w1: PaperWorker) -> None:
    running(w1, on_disconnect=OnDisconnect.WAIT, wait_max_s=100.0)
    w2 = PaperWorker(desk, "W2")

    bye(w1)

    assert desk.answer(w2.exchange()) is WAITING
    back = PaperWorker(desk, "W1", incarnation="b")
    assert back.granted()[0].task_id == "t1"


def test_what_a_goodbye_brings_counts_before_the_leases_are_closed(
    desk: Desk, w1: PaperWorker
) -> None:
    offer = running(w1)

    bye(w1, w1.ended(offer))
    bye(w1)  # Told twice.

    assert desk.task("t1").state is TaskState.COMPLETED


def test_a_cancel_that_was_asked_for_is_carried_out_by_a_goodbye(
    desk: Desk, w1: PaperWorker
) -> None:
    running(w1)
    desk.cancel("t1")

    bye(w1)

    assert desk.task("t1").state is TaskState.CANCELLED


def test_who_left_stays_gone_over_a_restart_and_is_back_with_a_new_life(
    desk: Desk, w1: PaperWorker
) -> None:
    bye(w1)
    desk.restart()
    assert state(desk) is WorkerState.GONE
    assert not w1.heartbeat().known
    with pytest.raises(StaleWorker):
        w1.hello()  # It was on its way since before the goodbye.

    PaperWorker(desk, "W1", incarnation="b")

    assert state(desk) is WorkerState.ONLINE


def test_only_the_life_on_record_can_say_goodbye(desk: Desk, w1: PaperWorker) -> None:
    PaperWorker(desk, "W1", incarnation="b")
    with pytest.raises(StaleWorker):
        bye(w1)
    desk.ask(Goodbye(worker="W9", incarnation="a"))

    assert state(desk) is WorkerState.ONLINE


# -- forgotten -------------------------------------------------------------------------------------


def test_a_worker_that_is_away_can_be_forgotten_and_join_again(desk: Desk, w1: PaperWorker) -> None:
    bye(w1)

    forgotten = desk.ask(ForgetWorker(name="HCNA-W1--test", force=False, principal="p"))

    assert forgotten.name == "W1"
    assert desk.workers() == {}
    assert desk.store.workers() == []
    desk.restart()
    assert desk.workers() == {}
    PaperWorker(desk, "W1", incarnation="b")
    assert state(desk) is WorkerState.ONLINE


@pytest.mark.parametrize("action", ["", "drain", "cordon"])
def test_a_worker_in_contact_is_forgotten_only_by_force(
    desk: Desk, w1: PaperWorker, action: str
) -> None:
    running(w1, on_disconnect=OnDisconnect.WAIT)
    if action:
        desk.ask(MarkWorker(name="W1", action=action, deadline_s=None, principal="p"))
    parked = w1.exchange(1)
    with pytest.raises(WorkerOnline, match="asleep or gone"):
        desk.ask(ForgetWorker(name="W1", force=False, principal="p"))

    desk.ask(ForgetWorker(name="W1", force=True, principal="p"))

    assert desk.workers() == {}
    assert isinstance(desk.answer(parked), StaleWorker)
    assert desk.task("t1").pinned_to is None  # Nobody comes back for it.
    assert desk.task("t1").losses == 0
    assert not w1.heartbeat().known
    w1.hello()  # As an agent does that is not known: this one runs on.
    assert state(desk) is WorkerState.ONLINE


def test_who_forgets_a_worker_is_told_what_goes_on_waiting_for_it(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t0", on_disconnect=OnDisconnect.WAIT)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    desk.submit_ids("t1", needs=Needs(worker="W1"))
    desk.submit_ids("t2", needs=Needs(worker="HCNA-W1--test"))
    desk.submit_ids("t3")
    pass_time(desk, 60)
    assert desk.task("t0").pinned_to == "W1"

    forgotten = desk.ask(ForgetWorker(name="W1", force=False, principal="p"))

    assert forgotten.waiting == 3
    assert desk.task("t0").pinned_to == "W1"  # Until its time is up, or the name is back.


def test_nobody_can_forget_whom_nobody_knows(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.ask(ForgetWorker(name="W9", force=True, principal="p"))


def test_what_a_store_did_not_take_has_not_happened(
    desk: Desk, w1: PaperWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(w1)

    def refuse(_self: object, _saved: object) -> None:
        raise StoreUnavailable("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(type(desk.store), "save_worker", refuse)
        with pytest.raises(StoreUnavailable):
            bye(w1)
        assert state(desk) is WorkerState.ONLINE
        assert desk.task("t1").state is TaskState.RUNNING
        pass_time(desk, 40)
        assert desk.task("t1").state is TaskState.RUNNING

    desk.tick(1.0)
    assert state(desk) is WorkerState.ASLEEP
    assert desk.task("t1").state is TaskState.QUEUED


# -- silent ----------------------------------------------------------------------------------------


def test_silence_is_logged_when_it_begins_when_it_costs_leases_and_when_it_ends(
    desk: Desk, w1: PaperWorker, caplog: pytest.LogCaptureFixture
) -> None:
    running(w1)
    desk.submit_ids("t2")
    w1.granted(1)
    pass_time(desk, 12)
    assert (state(desk), said(caplog, "worker.suspect")) == (WorkerState.ONLINE, [])

    pass_time(desk, 8)  # 20 s after the last heartbeat.
    (failed,) = said(caplog, "worker.suspect")
    assert failed.getMessage() == "health check failed"
    assert vars(failed)["worker"] == "W1"
    assert 12.5 < vars(failed)["silence_s"] < 14.0
    assert state(desk) is WorkerState.SUSPECT

    pass_time(desk, 16)
    (asleep,) = said(caplog, "worker.asleep")
    assert asleep.getMessage() == "W1 is asleep: its 2 attempts go to others"
    assert len(said(caplog, "worker.suspect")) == 1

    pass_time(desk, 24)
    assert not w1.heartbeat().known
    w1.hello()
    (back,) = said(caplog, "worker.back")
    assert back.getMessage() == "W1 is back after 60 s"
    assert state(desk) is WorkerState.ONLINE


def test_a_worker_that_is_heard_in_time_was_suspected_and_loses_nothing(
    desk: Desk, w1: PaperWorker, caplog: pytest.LogCaptureFixture
) -> None:
    offer = running(w1)
    pass_time(desk, 20)
    w1.heartbeat()
    pass_time(desk, 30, w1)

    assert [one.getMessage() for one in said(caplog, "worker.back")] == ["W1 is back after 20 s"]
    assert w1.report(w1.ended(offer)).applied == 1
    pass_time(desk, 20)
    assert len(said(caplog, "worker.suspect")) == 2  # Once each time.


def test_from_the_last_heartbeat_to_another_worker_it_takes_no_longer_than_the_settings_say(
    desk: Desk, w1: PaperWorker
) -> None:
    running(w1)
    w2 = PaperWorker(desk, "W2")
    w1.heartbeat()
    begun = desk.clock.elapsed()
    parked = w2.exchange()
    while desk.answer(parked) is WAITING or not desk.answer(parked).offers:
        if desk.answer(parked) is not WAITING:
            parked = w2.exchange()
        w2.heartbeat()
        desk.tick(desk.moderator.sleep_s())  # As the writer's thread does.

    policy = desk.policy
    took = desk.clock.elapsed() - begun
    assert policy.lease_ttl_s + policy.lease_grace_s < took
    assert took < policy.lease_ttl_s + policy.lease_grace_s + 0.1


def test_a_worker_asleep_stays_so_over_a_restart_until_nobody_expects_it(
    desk: Desk, w1: PaperWorker
) -> None:
    pass_time(desk, 40)
    desk.restart()
    assert state(desk) is WorkerState.ASLEEP
    assert desk.workers()["W1"].last_seen_age_s == pytest.approx(40.0)
    desk.tick(86_390.0)
    assert state(desk) is WorkerState.GONE

    w1.hello()
    assert state(desk) is WorkerState.ONLINE


@pytest.mark.parametrize("left", [False, True])
def test_an_intent_to_who_is_away_is_refused_in_plain_words(
    desk: Desk, w1: PaperWorker, left: bool
) -> None:
    if left:
        bye(w1)
    pass_time(desk, 180)
    envelope = {"msg_id": "m1", "intent": "test.ping"}

    with pytest.raises(WorkerUnavailable) as refused:
        desk.ask(SendIntent(envelope=envelope, worker="W1", principal="p", wait_s=5.0))

    what = "gone" if left else "asleep"
    expected = f"worker W1 is {what}, last seen 3 min ago; ask again when it is back"
    assert (str(refused.value), refused.value.retry_after_s) == (expected, 10)


# -- Ray's hint ------------------------------------------------------------------------------------


def seen(desk: Desk, *nodes: tuple[str, str, str]) -> None:
    desk.ask(NodesSeen(nodes=tuple(NodeSeen(*node) for node in nodes)))


def test_a_worker_whose_node_is_dead_gets_nothing_new_and_loses_nothing(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    w1 = PaperWorker(desk, ray_node_id="n1")
    offer = running(w1)
    parked = w1.exchange(1)
    seen(desk, ("W1", "n1", "10.0.0.2"))
    assert state(desk) is WorkerState.ONLINE

    seen(desk, ("W1", "another", "10.0.0.2"))
    desk.submit_ids("t2")

    assert state(desk) is WorkerState.SUSPECT
    assert desk.answer(parked) is WAITING
    (line,) = said(caplog, "worker.suspect")
    assert vars(line)["why"] == "Ray reports its node as dead"
    pass_time(desk, 15, w1)
    assert desk.task("t1").state is TaskState.RUNNING
    assert w1.report(w1.ended(offer)).applied == 1

    seen(desk, ("W1", "n1", "10.0.0.2"))
    w1.heartbeat()
    assert state(desk) is WorkerState.ONLINE
    assert w1.granted(1)[0].task_id == "t2"


def test_a_worker_that_does_not_name_its_node_is_taken_at_its_word(
    desk: Desk, w1: PaperWorker
) -> None:
    seen(desk)

    assert state(desk) is WorkerState.ONLINE


def test_two_machines_that_claim_one_name_are_named_once_a_minute(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    w1 = PaperWorker(desk, ray_node_id="n1")
    both = (("W1", "n1", "10.0.0.2"), ("W1", "n2", "10.0.0.3"))
    for _ in range(50):
        seen(desk, *both)
        pass_time(desk, 1, w1)
    (line,) = said(caplog, "worker.name_claimed_twice")
    assert line.getMessage() == "name W1 is claimed by two machines: 10.0.0.2 and 10.0.0.3"
    assert vars(line)["kept"] == "10.0.0.2"
    pass_time(desk, 20, w1)
    seen(desk, *both, ("W2", "n3", "10.0.0.4"), ("W2", "n4", "10.0.0.4"))

    assert len(said(caplog, "worker.name_claimed_twice")) == 2
    assert state(desk) is WorkerState.ONLINE


def test_of_two_strangers_the_first_to_say_hello_is_kept(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    seen(desk, ("W1", "n1", "10.0.0.2"), ("W1", "n2", "10.0.0.3"))

    (line,) = said(caplog, "worker.name_claimed_twice")
    assert vars(line)["kept"] == "the first that says hello"


# -- one name, two machines ------------------------------------------------------------------------


@pytest.mark.parametrize("silence", [0, 20])
def test_a_second_machine_is_refused_while_the_first_is_there(
    desk: Desk, caplog: pytest.LogCaptureFixture, silence: int
) -> None:
    first = PaperWorker(desk, machine_id="m-a", address="10.0.0.2")
    offer = running(first)
    pass_time(desk, silence)

    with pytest.raises(WorkerNameTaken) as refused:
        PaperWorker(desk, incarnation="b", machine_id="m-b", address="10.0.0.3")

    assert "10.0.0.2" in str(refused.value)
    (line,) = said(caplog, "worker.name_taken")
    assert "10.0.0.3" in line.getMessage()
    first.heartbeat()
    assert first.report(first.ended(offer)).applied == 1


def test_a_second_machine_may_follow_the_first_when_that_is_away(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    first = PaperWorker(desk, machine_id="m-a", address="10.0.0.2")
    pass_time(desk, 40)
    PaperWorker(desk, incarnation="b", machine_id="m-b", address="10.0.0.3")

    (line,) = said(caplog, "worker.moved")
    assert line.getMessage() == "W1 is another machine now: it was at 10.0.0.2, it is at 10.0.0.3"
    assert desk.workers()["W1"].address == "10.0.0.3"
    with pytest.raises(StaleWorker):
        first.heartbeat()


@pytest.mark.parametrize(("before", "after"), [("m-a", "m-a"), ("", "m-a"), ("m-a", "")])
def test_a_new_life_on_the_same_machine_takes_over_at_once(
    desk: Desk, before: str, after: str
) -> None:
    PaperWorker(desk, machine_id=before)
    PaperWorker(desk, incarnation="b", machine_id=after)

    assert state(desk) is WorkerState.ONLINE


# -- clocks ----------------------------------------------------------------------------------------


class WrongClockWorker(PaperWorker):
    """A worker whose wall clock is off by ``off`` seconds."""

    off = 0.0

    def _now(self) -> float:
        return self.desk.clock.now() + self.off

    def hello(self, reports: tuple[Report, ...] = ()) -> None:
        self.has["sent_at"] = self._now()
        super().hello(reports)

    def heartbeat(self) -> Any:
        return self.desk.ask(
            Heartbeat(
                worker=self.name, incarnation=self.incarnation, telemetry={}, sent_at=self._now()
            )
        )

    def started(self, offer: Offer) -> Report:
        return super().started(offer)._replace(at=self._now())

    def ended(self, offer: Offer, kind: str = ReportKind.COMPLETED, **more: Any) -> Report:
        found = super().ended(offer, kind, **more)
        return found._replace(at=self._now(), started_at=self._now())


@pytest.mark.parametrize("off", [600.0, -600.0, 0.0])
@pytest.mark.parametrize("known", [True, False])
def test_a_clock_that_is_minutes_off_changes_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, off: float, known: bool
) -> None:
    """Known or not: what the moderator has not learned of the clock it keeps within its bounds."""
    monkeypatch.setattr(WrongClockWorker, "off", off)
    w1 = WrongClockWorker(desk)
    if not known:
        session = desk.moderator._workforce.sessions.find("W1")
        assert session is not None
        session.skews.clear()
    begun = desk.clock.now()
    offer = running(w1, timeout_s=60.0, expires_at=begun + 120.0)
    assert offer.expires_in_s == pytest.approx(120.0)
    progress = Progress(at=w1._now(), percent=1.0)
    w1.report(Report(ReportKind.PROGRESS, "t1", offer.token, w1._now(), progress=progress))
    assert desk.task("t1").started_at == pytest.approx(begun)
    shown = desk.task("t1").progress
    assert shown is not None
    assert shown.at == pytest.approx(begun)

    pass_time(desk, 50, w1)
    assert desk.task("t1").state is TaskState.RUNNING  # Neither timed out nor expired.
    w1.report(w1.ended(offer))

    (attempt,) = desk.store.reader().attempts("t1")  # type: ignore[attr-defined]
    assert desk.task("t1").state is TaskState.COMPLETED
    assert attempt.started_at == pytest.approx(begun)
    assert attempt.ended_at == pytest.approx(begun + 50.0)


def test_what_came_late_counts_from_when_it_happened(desk: Desk) -> None:
    w1 = WrongClockWorker(desk)
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    desk.clock.advance(2.0)
    started = w1.started(offer)
    desk.clock.advance(3.0)
    w1.report(started)

    assert desk.task("t1").started_at == pytest.approx(desk.clock.now() - 3.0)


def test_a_clock_that_is_far_off_is_shown_and_logged_once(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WrongClockWorker, "off", 600.0)
    w1 = WrongClockWorker(desk)
    pass_time(desk, 30, w1)

    (line,) = said(caplog, "worker.clock_off")
    assert line.getMessage().startswith("the clock of W1 is 600 s ahead")
    assert desk.workers()["W1"].clock_ahead_s == pytest.approx(600.0)
    monkeypatch.setattr(WrongClockWorker, "off", 0.0)  # Somebody put it right.
    pass_time(desk, 15, w1)
    assert desk.workers()["W1"].clock_ahead_s == pytest.approx(0.0)


def test_a_worker_that_gives_an_expired_task_back_is_not_given_it_again(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1", expires_at=desk.clock.now() + 10.0)
    (offer,) = w1.granted()
    assert offer.expires_in_s == pytest.approx(10.0)
    desk.tick(10.0)

    w1.exchange(0, w1.ended(offer, ReportKind.RETURNED))

    assert desk.task("t1").state is TaskState.EXPIRED
    assert desk.task("t1").attempt == 1


@pytest.mark.parametrize("restart", [False, True])
def test_a_grant_that_is_repeated_says_what_is_left_by_then(
    desk: Desk, w1: PaperWorker, restart: bool
) -> None:
    desk.submit_ids("t1", expires_at=desk.clock.now() + 10.0)
    desk.submit_ids("t2")
    w1.granted()
    desk.clock.advance(4.0)
    if restart:
        desk.restart()

    grant = desk.answer(w1.exchange(seq=1))

    assert isinstance(grant, Grant)
    assert [one.expires_in_s for one in grant.offers] == [pytest.approx(6.0)]


# -- trouble ---------------------------------------------------------------------------------------


def test_a_worker_that_cannot_write_gets_nothing_until_it_can(
    desk: Desk, w1: PaperWorker, caplog: pytest.LogCaptureFixture
) -> None:
    sick = Heartbeat(
        worker="W1", incarnation="a", telemetry={}, trouble="cannot write to its disk (full)"
    )
    desk.ask(sick)
    parked = w1.exchange()
    desk.submit_ids("t1")
    desk.tick(1.0)
    assert desk.answer(parked) is WAITING
    assert desk.workers()["W1"].trouble == "cannot write to its disk (full)"
    assert said(caplog, "scheduler.no_workers")
    desk.ask(sick)
    assert len(said(caplog, "worker.trouble")) == 1

    w1.heartbeat()

    assert desk.answer(parked).offers[0].task_id == "t1"
    assert said(caplog, "worker.recovered")


def test_why_an_attempt_came_back_unstarted_is_in_its_history(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    error = TaskError(kind=FailureKind.ERROR, type=DISK_FAILED, message="W1 cannot write")
    w1.report(w1.ended(offer, ReportKind.RETURNED, error=error))

    facts = desk.store.reader().facts(after=0, limit=9, task_id="t1")  # type: ignore[attr-defined]
    assert [(one.fact.kind, one.fact.detail) for one in facts][-1] == (
        "returned",
        "W1 cannot write",
    )
    assert (desk.task("t1").losses, desk.task("t1").failures) == (0, 0)


# -- policies over several workers -----------------------------------------------------------------


def three(desk: Desk) -> dict[str, PaperWorker]:
    return {
        "W1": PaperWorker(desk, "W1", cpu=2.0, mem_gb=4.0),
        "W2": PaperWorker(desk, "W2", cpu=8.0, mem_gb=32.0, labels=(("room", "attic"),)),
        "W3": PaperWorker(
            desk, "W3", cpu=4.0, mem_gb=8.0, gpu=1.0, resources=(("W3", 1.0), ("scanner", 2.0))
        ),
    }


@pytest.mark.parametrize(
    ("needs", "fits"),
    [
        (Needs(worker="W2"), {"W2"}),
        (Needs(worker="HCNA-W3--test"), {"W3"}),
        (Needs(cpu=3.0), {"W2", "W3"}),
        (Needs(mem_gb=16.0), {"W2"}),
        (Needs(gpu=1.0), {"W3"}),
        (Needs(resources=(("scanner", 1.0),)), {"W3"}),
        (Needs(labels=(("room", "attic"),)), {"W2"}),
        (Needs(cpu=64.0), set()),
    ],
    ids=str,
)
def test_a_task_goes_only_where_its_needs_are_met(desk: Desk, needs: Needs, fits: set[str]) -> None:
    workers = three(desk)
    for name in workers:  # Each of them in turn is the only one that asks.
        slot = HEAVY_SLOT if needs.heavy else 0
        desk.submit_ids(f"for-{name}", needs=needs)
        grant = desk.answer(workers[name].exchange(slot))
        got = set() if grant is WAITING else {one.task_id for one in grant.offers}
        assert bool(got) is (name in fits)


def test_the_attempts_of_a_drained_worker_move_to_another_and_count_no_loss(desk: Desk) -> None:
    w1, w2 = PaperWorker(desk), PaperWorker(desk, "W2")
    offer = running(w1, max_losses=1)
    parked = w1.exchange(holding=[offer])
    desk.ask(MarkWorker(name="W1", action="drain", deadline_s=5.0, principal="p"))
    pass_time(desk, 6, w1, w2)
    (stop,) = desk.answer(parked).stops
    assert stop.reason == "drain"

    error = TaskError(kind=FailureKind.LOST, type=DRAINED, message="stopped by its worker (drain)")
    w1.report(w1.ended(offer, ReportKind.LOST, error=error))

    assert desk.answer(w1.exchange(1)) is WAITING
    (again,) = w2.granted()
    assert (again.task_id, desk.task("t1").losses) == ("t1", 0)


def test_each_task_says_for_itself_whether_it_waits_for_its_worker(desk: Desk) -> None:
    w1, w2 = PaperWorker(desk), PaperWorker(desk, "W2")
    desk.submit_ids("waits", on_disconnect=OnDisconnect.WAIT, wait_max_s=20.0)
    desk.submit_ids("moves", on_disconnect=OnDisconnect.REPLACE)
    for slot in (0, 1):
        (offer,) = w1.granted(slot)
        w1.report(w1.started(offer))

    pass_time(desk, 36, w2)
    assert w2.granted()[0].task_id == "moves"
    assert desk.answer(w2.exchange(1)) is WAITING
    pass_time(desk, 21, w2)
    assert w2.granted(1)[0].task_id == "waits"


def test_a_lease_counts_from_the_last_heartbeat_that_was_answered(
    desk: Desk, w1: PaperWorker
) -> None:
    """A network that lets only the worker's words through must not keep its leases alive."""
    w1.hello()
    states = []
    for beat in range(1, 8):
        desk.tick(5.0)
        unanswered = Heartbeat(
            worker="W1", incarnation=w1.incarnation, telemetry={}, unanswered_s=5.0 * beat
        )
        desk.ask(unanswered)
        states.append(desk.workers()["W1"].state)

    assert states[:3] == [WorkerState.ONLINE] * 3
    assert states[3:] == [WorkerState.SUSPECT] * 4
    desk.tick(1.0)
    assert desk.workers()["W1"].state is WorkerState.ASLEEP


def test_a_machine_that_joins_is_on_record_once(desk: Desk) -> None:
    PaperWorker(desk, machine_id="m-a", address="10.0.0.2")
    PaperWorker(desk, incarnation="b", machine_id="m-a", address="10.0.0.2")
    (line,) = desk.store.reader().audit(before=None, limit=9)  # type: ignore[attr-defined]
    entry = line.entry
    assert (entry.principal, entry.action, entry.target) == ("W1", "worker.join", "10.0.0.2")
    assert entry.detail == "m-a"

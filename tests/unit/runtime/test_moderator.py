"""The moderator's promises, with workers made of paper and a clock that is told the time."""

from __future__ import annotations

import dataclasses

import pytest

from hcna_ray.config import Settings
from hcna_ray.core.errors import (
    DiskFull,
    IdempotencyConflict,
    Invalid,
    NotFailed,
    NotFound,
    Overloaded,
    StaleWorker,
    StoreUnavailable,
    TaskFinished,
    WorkerUnavailable,
)
from hcna_ray.core.models import (
    HEAVY_SLOT,
    AuditEntry,
    FailureKind,
    Hold,
    Needs,
    OnDisconnect,
    RetryPolicy,
    TaskError,
    TaskState,
    Token,
    WorkerState,
)
from hcna_ray.observability.figures import OTHER_QUEUES, RAN, SUM, WAITED, stored_histogram
from hcna_ray.runtime import ledger, reports
from hcna_ray.runtime.messages import Accepted, Grant, Offer, Refused, ReportKind, SubmitBatch
from hcna_ray.runtime.moderator import PRUNE_MAX, PRUNE_PERIOD_S
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import (
    Cancel,
    MarkWorker,
    PauseQueue,
    Query,
    Reports,
    Retry,
    SendIntent,
)
from hcna_ray.store.base import Counter
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import a_spec
from tests.support.paper_worker import WAITING, Desk, PaperWorker

BOOM = TaskError(kind=FailureKind.ERROR, type="ValueError", message="boom")


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def w1(desk: Desk) -> PaperWorker:
    return PaperWorker(desk)


# -- the ordinary way ------------------------------------------------------------------------------


def test_a_task_goes_from_accepted_to_completed(desk: Desk, w1: PaperWorker) -> None:
    (answer,) = desk.submit(a_spec("t1"))
    assert answer == Accepted("t1", TaskState.QUEUED, False)

    (offer,) = w1.granted()
    assert (offer.task_id, tuple(offer.token)) == ("t1", (1, 1))
    assert desk.task("t1").state is TaskState.QUEUED  # Granted is not running.

    w1.report(w1.started(offer))
    assert desk.task("t1").state is TaskState.RUNNING

    w1.report(w1.ended(offer, result=b'{"x":1}'))
    assert desk.task("t1").state is TaskState.COMPLETED
    assert desk.task("t1").result == b'{"x":1}'
    assert desk.ended == ["t1"]
    (attempt,) = desk.store.reader().attempts("t1")
    assert (attempt.worker, attempt.node_id) == ("W1", "HCNA-W1--test")


def test_a_parked_slot_gets_a_task_in_the_very_commit_that_accepts_it(
    desk: Desk, w1: PaperWorker
) -> None:
    parked = w1.exchange()
    assert desk.answer(parked) is WAITING

    commits = desk.ask(Query(name="status")).commits
    desk.submit(a_spec("t1"))

    assert desk.answer(parked).offers[0].task_id == "t1"
    assert desk.ask(Query(name="status")).commits == commits + 1


def test_a_resent_batch_changes_nothing(desk: Desk) -> None:
    batch = SubmitBatch(specs=(a_spec("t1"), a_spec("t2")))
    first, second = desk.ask(batch), desk.ask(batch)

    assert [answer.task_id for answer in second] == [answer.task_id for answer in first]
    assert desk.ask(Query(name="status")).open_tasks == 2


def test_a_quiet_exchange_is_answered_empty_after_a_while(desk: Desk, w1: PaperWorker) -> None:
    parked = w1.exchange()
    for _ in range(25):
        w1.heartbeat()
        desk.tick(1.0)

    assert desk.answer(parked) == Grant(seq=1)


# -- idempotency -----------------------------------------------------------------------------------


def test_the_same_key_and_request_returns_the_first_task(desk: Desk) -> None:
    first = a_spec("t1", idempotency_key="k", fingerprint="f", principal="p")
    again = a_spec("t2", idempotency_key="k", fingerprint="f", principal="p")
    desk.submit(first)

    assert desk.submit(again) == [Accepted("t1", TaskState.QUEUED, True)]
    assert desk.ask(Query(name="status")).open_tasks == 1


def test_the_same_key_with_another_request_is_refused(desk: Desk) -> None:
    desk.submit(a_spec("t1", idempotency_key="k", fingerprint="f"))

    (answer,) = desk.submit(a_spec("t2", idempotency_key="k", fingerprint="other"))

    assert isinstance(answer, Refused)
    assert isinstance(answer.error, IdempotencyConflict)


def test_keys_of_different_principals_do_not_meet(desk: Desk) -> None:
    answers = desk.submit(
        a_spec("t1", idempotency_key="k", fingerprint="f", principal="a"),
        a_spec("t2", idempotency_key="k", fingerprint="g", principal="b"),
    )

    assert [answer.task_id for answer in answers] == ["t1", "t2"]


def test_one_key_twice_in_one_batch_makes_one_task(desk: Desk) -> None:
    answers = desk.submit(
        a_spec("t1", idempotency_key="k", fingerprint="f"),
        a_spec("t2", idempotency_key="k", fingerprint="f"),
    )

    assert [answer.task_id for answer in answers] == ["t1", "t1"]


# -- refusals --------------------------------------------------------------------------------------


def test_an_atomic_batch_is_all_or_nothing(desk: Desk) -> None:
    desk.submit(a_spec("t0", idempotency_key="k", fingerprint="f"))
    bad = a_spec("t2", idempotency_key="k", fingerprint="other")

    with pytest.raises(IdempotencyConflict):
        desk.submit(a_spec("t1", idempotency_key="k1", fingerprint="f"), bad, atomic=True)

    assert desk.ask(Query(name="status")).open_tasks == 1
    # The key of the item that was fine is still free.
    assert desk.submit(a_spec("t3", idempotency_key="k1", fingerprint="g"))[0].task_id == "t3"


def test_a_full_queue_refuses_exactly_what_does_not_fit() -> None:
    desk = Desk(queue_tasks_max=3)

    answers = desk.submit(*(a_spec(f"t{n}") for n in range(5)))

    assert [type(answer) for answer in answers] == [Accepted] * 3 + [Refused] * 2
    assert isinstance(answers[4].error, Overloaded)
    assert answers[4].error.retry_after_s >= 1


def test_a_queue_full_of_bytes_refuses_exactly_what_does_not_fit() -> None:
    big = a_spec("t0", payload=b'"' + b"x" * 1000 + b'"')
    desk = Desk(queue_bytes_max=2 * big.bytes_stored + 200)

    answers = desk.submit(big, *(dataclasses.replace(big, id=f"t{n}") for n in range(1, 3)))
    answers += desk.submit(dataclasses.replace(big, id="t3"))

    assert [type(answer) for answer in answers] == [Accepted] * 2 + [Refused] * 2
    assert isinstance(answers[3].error, Overloaded)
    assert answers[3].error.retry_after_s >= 1
    desk.cancel("t0")
    desk.restart()  # What has ended takes no room, to a new moderator neither.
    assert [type(answer) for answer in desk.submit(dataclasses.replace(big, id="t4"))] == [Accepted]


def test_two_batches_in_one_commit_share_the_room() -> None:
    desk = Desk(queue_tasks_max=3)

    first, second = desk.apply(
        SubmitBatch(specs=(a_spec("a1"), a_spec("a2"))),
        SubmitBatch(specs=(a_spec("b1"), a_spec("b2"))),
    )

    assert [type(answer) for answer in [*first, *second]] == [Accepted] * 3 + [Refused]  # type: ignore[misc]


def test_the_status_tells_for_how_many_there_is_room() -> None:
    desk = Desk(queue_tasks_max=5, queue_bytes_max=2 * a_spec("t1").bytes_stored)
    assert desk.ask(Query(name="status")).room == 5

    desk.submit(a_spec("t1"))
    assert desk.ask(Query(name="status")).room == 4
    desk.submit(a_spec("t2"))
    assert desk.ask(Query(name="status")).room == 0  # There is none for bytes.

    desk.cancel("t2")
    assert desk.ask(Query(name="status")).room == 4
    desk.free_bytes = 0
    desk.tick(2.0)
    assert desk.ask(Query(name="status")).room == 0


def test_a_low_disk_refuses_until_there_is_space_again(desk: Desk) -> None:
    desk.free_bytes = 0
    desk.tick(2.0)
    (answer,) = desk.submit(a_spec("t1"))
    assert isinstance(answer.error, DiskFull)

    desk.free_bytes = 1 << 40
    desk.tick(2.0)
    desk.submit_ids("t2")


def test_a_store_that_refuses_a_commit_answers_everybody_and_loses_nothing(
    w1: PaperWorker, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.submit_ids("t1")
    with monkeypatch.context() as broken:

        def full(_facts: object) -> int:
            raise StoreUnavailable("disk full", 5)

        broken.setattr(desk.store, "append_facts", full)
        with pytest.raises(StoreUnavailable):
            desk.submit(a_spec("t2"))
        assert isinstance(desk.answer(w1.exchange()), StoreUnavailable)

    assert desk.task("t1").lease is None
    (offer,) = w1.granted()
    assert offer.task_id == "t1"
    assert tuple(offer.token) == (1, 1)
    assert "t2" not in desk.store.get(["t2"])


# -- dependencies ----------------------------------------------------------------------------------


def test_a_dependent_waits_for_both_parents(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("a", "b")
    desk.submit(a_spec("c", depends_on=("a", "b")))
    assert desk.task("c").state is TaskState.SCHEDULED

    offers = {offer.task_id: offer for offer in w1.granted() + w1.granted(1)}
    assert set(offers) == {"a", "b"}
    w1.report(w1.started(offers["a"]), w1.ended(offers["a"]))
    assert desk.task("c").state is TaskState.SCHEDULED

    w1.report(w1.started(offers["b"]), w1.ended(offers["b"]))
    assert desk.task("c").state is TaskState.QUEUED


def test_a_failed_parent_rejects_the_whole_line_behind_it(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("a")
    desk.submit(a_spec("b", depends_on=("a",)), a_spec("c", depends_on=("b",)))
    (offer,) = w1.granted()

    w1.report(w1.started(offer), w1.ended(offer, ReportKind.FAILED, error=BOOM))

    for task_id in ("b", "c"):
        task = desk.task(task_id)
        assert task.state is TaskState.FAILED
        assert task.error is not None
        assert task.error.kind is FailureKind.REJECTED
    assert desk.ended == ["a", "b", "c"]


def test_a_parent_that_has_ended_already_counts_at_once(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("a", "b")
    offers = w1.granted() + w1.granted(1)
    w1.report(*(w1.ended(offer) for offer in offers[:1]))
    desk.cancel(offers[1].task_id)
    w1.report(w1.ended(offers[1], ReportKind.CANCELLED))

    desk.submit(a_spec("c", depends_on=("a",)), a_spec("d", depends_on=("b",)))

    assert desk.task("c").state is TaskState.QUEUED
    assert desk.task("d").state is TaskState.FAILED


def test_a_parent_that_does_not_exist_is_refused(desk: Desk) -> None:
    (answer,) = desk.submit(a_spec("c", depends_on=("nobody",)))

    assert isinstance(answer.error, Invalid)
    assert answer.error.code == "dependency_not_found"


def test_what_nobody_asks_for_any_more_keeps_no_thread_busy(desk: Desk, w1: PaperWorker) -> None:
    """A round that held a task back is followed by another, but only while somebody waits."""
    desk.submit_ids("t1", "t2", concurrency_key="k")
    desk.submit_ids("t3")
    w1.exchange(0)
    w1.exchange(1)
    assert desk.answer(w1.exchange(2)) is WAITING

    assert desk.task("t2").hold is Hold.CONCURRENCY
    assert desk.moderator.sleep_s() > 0.0


def test_thousands_of_dependents_are_settled_in_durable_steps(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("a")
    desk.submit(*(a_spec(f"c{n}", depends_on=("a",)) for n in range(2500)))
    (offer,) = w1.granted()
    desk.runs_on = False
    w1.report(w1.started(offer), w1.ended(offer))
    assert desk.task("c999").state is TaskState.QUEUED
    assert desk.task("c2499").state is TaskState.SCHEDULED

    desk.restart()  # The rest of the order is in the store, not in memory.
    desk.runs_on = True
    desk.tick()

    assert desk.task("c2499").state is TaskState.QUEUED
    assert sum(desk.store.ready_lanes().values()) == 2500


# -- cancelling ------------------------------------------------------------------------------------


def test_a_queued_task_is_cancelled_at_once_and_never_starts(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")

    assert desk.cancel("t1") is TaskState.CANCELLED
    assert desk.answer(w1.exchange()) is WAITING
    with pytest.raises(TaskFinished):
        desk.cancel("t1")


def test_a_running_task_is_stopped_through_its_slot(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    parked = w1.exchange(holding=[offer])  # It runs for long; the slot asks for more beside it.

    assert desk.cancel("t1") is TaskState.RUNNING
    (stop,) = desk.answer(parked).stops
    assert (stop.task_id, stop.slot, stop.reason) == ("t1", 0, "cancel")

    w1.report(w1.ended(offer, ReportKind.CANCELLED))
    assert desk.task("t1").state is TaskState.CANCELLED


def test_a_result_that_is_there_first_wins_over_a_cancel(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    desk.cancel("t1")

    w1.report(w1.ended(offer))

    assert desk.task("t1").state is TaskState.COMPLETED


def test_a_granted_task_that_is_cancelled_ends_when_it_comes_back(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    assert desk.cancel("t1") is TaskState.QUEUED

    w1.report(w1.ended(offer, ReportKind.RETURNED))

    assert desk.task("t1").state is TaskState.CANCELLED


def test_a_stop_survives_a_moderator_restart(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    desk.cancel("t1")

    desk.restart()

    (stop,) = desk.answer(w1.exchange(HEAVY_SLOT)).stops
    assert stop.task_id == "t1"


def test_a_heavy_task_is_stopped_through_its_agent(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("h1", needs=Needs(cpu=1.0))
    (offer,) = w1.granted(HEAVY_SLOT)
    w1.report(w1.started(offer))
    agent = w1.exchange(HEAVY_SLOT)

    desk.cancel("h1")

    (stop,) = desk.answer(agent).stops
    assert (stop.task_id, stop.slot) == ("h1", HEAVY_SLOT)


def test_cancelling_what_does_not_exist_says_so(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.cancel("nobody")


# -- retries and replays ---------------------------------------------------------------------------


def test_a_failure_is_retried_after_its_backoff(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", retry=RetryPolicy(max_attempts=2, backoff_s=10.0))
    (offer,) = w1.granted()
    w1.report(w1.started(offer), w1.ended(offer, ReportKind.FAILED, error=BOOM))
    assert desk.task("t1").state is TaskState.SCHEDULED

    desk.tick(9.0)
    assert desk.task("t1").state is TaskState.SCHEDULED
    desk.tick(1.0)
    (offer,) = w1.granted()
    assert offer.token.attempt == 2
    w1.report(w1.started(offer), w1.ended(offer, ReportKind.FAILED, error=BOOM))

    assert desk.task("t1").state is TaskState.FAILED
    assert desk.task("t1").failures == 2


def test_only_a_failed_task_is_replayed(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    with pytest.raises(NotFailed):
        desk.ask(Retry(task_id="t1", principal="p"))
    (offer,) = w1.granted()
    w1.report(w1.started(offer), w1.ended(offer, ReportKind.FAILED, error=BOOM))

    assert desk.ask(Retry(task_id="t1", principal="p")) is TaskState.QUEUED
    (offer,) = w1.granted()
    assert offer.token.attempt == 2
    w1.report(w1.started(offer), w1.ended(offer))
    assert desk.task("t1").state is TaskState.COMPLETED


# -- losing slots, workers and moderators ----------------------------------------------------------


def test_a_dead_slot_costs_only_what_it_had_started(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("warm")
    (offer,) = w1.granted()
    w1.report(w1.started(offer), w1.ended(offer))  # Now echo is known to be short.
    desk.submit_ids("t1", "t2", "t3")
    offers = w1.granted()
    assert len(offers) == 3

    w1.report(w1.started(offers[0]))
    w1.gone(0)

    assert [desk.task(id_).losses for id_ in ("t1", "t2", "t3")] == [1, 0, 0]
    assert len(w1.granted(1)) == 3


def test_poison_is_given_up_after_three_losses(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    for slot in range(3):
        (offer,) = w1.granted(slot)
        w1.report(w1.started(offer))
        w1.gone(slot)

    task = desk.task("t1")
    assert task.state is TaskState.FAILED
    assert task.error is not None
    assert task.error.kind is FailureKind.POISON
    assert task.failures == 0


def test_a_late_end_is_on_record_once_however_often_it_is_repeated(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1", "t2")
    offer, other = _grants(w1)
    w1.report(w1.started(offer), w1.ended(offer))
    w1.report(w1.started(other), w1.ended(other))
    for _ in range(5):
        w1.report(w1.ended(offer), w1.ended(offer))
    w1.report(w1.ended(other, ReportKind.FAILED, error=BOOM))

    assert [(one.target, one.detail) for one in _late_lines(desk)] == [
        ("t1", "1.1 completed counts no longer"),
        ("t2", "1.1 failed counts no longer"),
    ]


def test_a_flood_of_late_ends_does_not_fill_the_audit_log(
    desk: Desk, w1: PaperWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "LATE_LINES_MAX", 3)
    monkeypatch.setattr(reports, "LATE_KNOWN", 2)
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer), w1.ended(offer))

    def lie(count: int) -> None:
        forged = w1.ended(offer)
        w1.report(*(forged._replace(token=Token(1, 100 + n)) for n in range(count)))

    lie(10)
    assert len(_late_lines(desk)) == 3
    desk.tick(61.0)
    lie(10)
    assert len(_late_lines(desk)) == 6


def _grants(worker: PaperWorker) -> list[Offer]:
    found = [*worker.granted()]
    while len(found) < 2:
        found += worker.granted(len(found))
    return found


def _late_lines(desk: Desk) -> list[AuditEntry]:
    lines = desk.store.reader().audit(before=None, limit=100)
    return [one.entry for one in reversed(lines) if one.entry.action == "report.late"]


def test_losses_are_counted_over_restarts_of_the_moderator(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    for slot in range(3):
        (offer,) = w1.granted(slot)
        w1.report(w1.started(offer))
        desk.restart()
        w1.hello()
        w1.gone(slot)
        desk.restart()
        w1.hello()

    task = desk.task("t1")
    assert task.state is TaskState.FAILED
    assert task.error is not None
    assert task.error.kind is FailureKind.POISON


def test_a_repeated_exchange_gets_the_same_grant(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", "t2")
    first = desk.answer(w1.exchange())

    again = desk.answer(w1.exchange(seq=1))

    assert again == first


def test_a_new_moderator_repeats_the_grant_of_the_old_one(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    first = desk.answer(w1.exchange())

    desk.restart()
    again = desk.answer(w1.exchange(seq=1))

    assert again.offers == first.offers


def test_a_running_attempt_survives_a_new_moderator(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))

    desk.restart()
    desk.tick(20.0)
    assert w1.heartbeat().known
    w1.report(w1.ended(offer))

    task = desk.task("t1")
    assert (task.state, task.attempt, task.losses) == (TaskState.COMPLETED, 1, 0)


def test_what_a_slot_does_not_know_of_comes_back(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    w1.exchange()  # The answer is lost on the way, and the slot moves on.

    (offer,) = w1.granted()

    assert (offer.task_id, offer.token.attempt) == ("t1", 2)
    assert desk.task("t1").losses == 0


def test_a_silent_worker_loses_its_leases_and_late_reports_change_nothing(
    desk: Desk, w1: PaperWorker
) -> None:
    w2 = PaperWorker(desk, "W2")
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))

    for _ in range(36):
        w2.heartbeat()
        desk.tick(1.0)
    assert desk.workers()["W1"].state is WorkerState.ASLEEP
    (second,) = w2.granted()
    w2.report(w2.started(second))

    late = w1.report(w1.ended(offer, result=b'{"late":true}'))
    assert late.applied == 0
    # What it did is on record, under its token.
    (entry,) = [one.entry for one in desk.store.reader().audit(before=None, limit=10)]
    assert (entry.action, entry.target) == ("report.late", "t1")
    assert entry.detail.startswith(f"{offer.token[0]}.{offer.token[1]} completed")
    w2.report(w2.ended(second, result=b'{"second":true}'))
    task = desk.task("t1")
    assert (task.result, task.losses) == (b'{"second":true}', 1)


@pytest.mark.parametrize("by_s", [3600.0, -3600.0, 90_000.0])
def test_a_running_attempt_keeps_its_age_when_the_clock_is_put(
    desk: Desk, w1: PaperWorker, by_s: float
) -> None:
    desk.submit_ids("t1", timeout_s=60.0)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    desk.tick(20.0)
    desk.clock.step(by_s)
    for _ in range(6):
        w1.heartbeat()
        desk.tick(10.0)
    assert desk.task("t1").state is TaskState.RUNNING

    for _ in range(2):  # The worker should have stopped it after 60 s, and gets 30 s more.
        w1.heartbeat()
        desk.tick(6.0)
    assert desk.task("t1").error is not None
    assert desk.task("t1").error.kind is FailureKind.TIMEOUT


def test_word_of_a_start_from_before_the_clock_was_put_is_no_age(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1", timeout_s=5.0)
    (offer,) = w1.granted()
    started = w1.started(offer)
    desk.clock.advance(0.25)
    desk.clock.step(300.0)
    w1.report(started)
    assert desk.task("t1").state is TaskState.RUNNING


def test_a_task_may_wait_for_its_silent_worker(desk: Desk, w1: PaperWorker) -> None:
    w2 = PaperWorker(desk, "W2")
    desk.submit_ids("t1", on_disconnect=OnDisconnect.WAIT, wait_max_s=100.0)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    for _ in range(36):
        w2.heartbeat()
        desk.tick(1.0)

    parked = w2.exchange()
    assert desk.answer(parked) is WAITING
    w1.hello()  # The worker is back.
    (offer,) = w1.granted()
    assert offer.task_id == "t1"


def test_waiting_for_a_worker_has_an_end(desk: Desk, w1: PaperWorker) -> None:
    w2 = PaperWorker(desk, "W2")
    desk.submit_ids("t1", on_disconnect=OnDisconnect.WAIT, wait_max_s=60.0)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    for _ in range(100):
        w2.heartbeat()
        desk.tick(1.0)

    (offer,) = w2.granted()
    assert offer.task_id == "t1"


def test_a_new_incarnation_takes_over_and_the_old_one_is_told(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))

    fresh = PaperWorker(desk, "W1", incarnation="b")

    with pytest.raises(StaleWorker):
        w1.report(w1.ended(offer))
    (offer,) = fresh.granted()
    assert offer.token.attempt == 2


def test_reports_in_an_old_journal_count_before_the_leases_are_closed(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))

    fresh = PaperWorker(desk, "W1", incarnation="b")
    fresh.hello((w1.ended(offer),))  # Too late: the first hello had closed the lease.
    assert desk.task("t1").state is TaskState.QUEUED

    (offer,) = fresh.granted()
    third = PaperWorker.__new__(PaperWorker)
    third.__dict__.update(fresh.__dict__, incarnation="c", seqs={})
    third.hello((fresh.started(offer), fresh.ended(offer)))
    assert desk.task("t1").state is TaskState.COMPLETED


def test_an_unknown_worker_is_asked_to_say_hello(desk: Desk, w1: PaperWorker) -> None:
    stranger = PaperWorker.__new__(PaperWorker)
    stranger.__dict__.update(w1.__dict__, name="W9", seqs={})

    assert desk.answer(stranger.exchange()).hello
    assert not stranger.heartbeat().known


def test_an_attempt_that_its_worker_does_not_stop_is_ended_by_the_moderator(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1", timeout_s=5.0)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    for _ in range(36):
        w1.heartbeat()
        desk.tick(1.0)

    task = desk.task("t1")
    assert task.state is TaskState.FAILED
    assert task.error is not None
    assert task.error.kind is FailureKind.TIMEOUT
    # The slot does not ask just now: the agent passes it on.
    assert desk.answer(w1.exchange(HEAVY_SLOT)).stops[0].reason == "timeout"


# -- scheduling ------------------------------------------------------------------------------------


def test_priority_and_age_decide_the_order(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("low", priority=0)
    desk.clock.advance(1.0)
    desk.submit_ids("high", priority=9)

    assert [w1.granted(slot)[0].task_id for slot in (0, 1)] == ["high", "low"]


def test_waiting_long_enough_beats_priority(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("old", priority=0)
    desk.clock.advance(9 * 60.0 + 1.0)
    w1.heartbeat()
    desk.submit_ids("urgent", priority=9)

    assert w1.granted()[0].task_id == "old"


def test_a_grant_grows_with_what_is_known_of_a_type(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids(*(f"t{n}" for n in range(400)))
    assert len(w1.granted()) == 1  # Unknown: nobody should wait behind what may take long.
    offers = w1.granted(0)

    w1.report(w1.started(offers[0]), w1.ended(offers[0], duration_ms=0.01))

    assert len(w1.granted()) == desk.policy.grant_max


def test_what_comes_back_from_behind_a_long_item_has_lost_nothing(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("warm")
    (warm,) = w1.granted()
    w1.report(w1.started(warm), w1.ended(warm, duration_ms=0.1))
    desk.submit_ids(*(f"t{n:02}" for n in range(64)))
    offers = w1.granted()
    assert len(offers) == 64

    w1.report(
        w1.started(offers[0]), *(w1.ended(offer, ReportKind.RETURNED) for offer in offers[1:])
    )
    desk.cancel(offers[0].task_id)
    w1.gone(0, w1.ended(offers[0], ReportKind.CANCELLED))

    again = w1.granted(1)
    assert {offer.task_id for offer in again} == {offer.task_id for offer in offers[1:]}
    assert all(desk.task(offer.task_id).losses == 0 for offer in again)
    assert desk.task(offers[0].task_id).state is TaskState.CANCELLED


def test_no_more_than_max_concurrent_tasks_run_at_once() -> None:
    desk = Desk(max_concurrent_tasks=2)
    w1 = PaperWorker(desk)
    desk.submit_ids("t1", "t2", "t3")

    first, _ = w1.granted(0), w1.granted(1)
    third = w1.exchange(2)
    assert desk.answer(third) is WAITING

    w1.report(w1.started(first[0]), w1.ended(first[0]))
    assert desk.answer(third).offers[0].task_id == "t3"


def test_a_slot_takes_more_beside_a_long_attempt(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("long", "short")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))

    again = desk.answer(w1.exchange(holding=[offer]))

    assert [one.task_id for one in again.offers] == ["short"]
    assert desk.task("long").state is TaskState.RUNNING
    assert desk.task("long").losses == 0


def test_what_a_slot_holds_counts_against_the_limit() -> None:
    desk = Desk(max_concurrent_tasks=2)
    w1 = PaperWorker(desk)
    desk.submit_ids("t1", "t2", "t3")
    (first,) = w1.granted()
    w1.report(w1.started(first))
    (second,) = desk.answer(w1.exchange(holding=[first])).offers
    w1.report(w1.started(second))

    third = w1.exchange(holding=[first, second])
    assert desk.answer(third) is WAITING
    w1.report(w1.ended(first))
    assert [one.task_id for one in desk.answer(third).offers] == ["t3"]


def test_a_heavy_task_goes_to_an_agent_with_room_and_keeps_its_share(desk: Desk) -> None:
    w1 = PaperWorker(desk, cpu=4.0)
    desk.submit_ids("h1", "h2", needs=Needs(cpu=3.0))
    parked = w1.exchange(0)
    agent = w1.exchange(HEAVY_SLOT)

    (offer,) = desk.answer(agent).offers
    assert dict(offer.needs)["cpu"] == 3.0
    assert desk.answer(parked) is WAITING  # Heavy work never goes into a slot.
    assert desk.workers()["W1"].free["cpu"] == 1.0

    second = w1.exchange(HEAVY_SLOT)
    assert desk.answer(second) is WAITING
    w1.report(w1.started(offer), w1.ended(offer))
    assert [one.task_id for one in desk.answer(second).offers] == ["h2"]


def test_the_less_loaded_worker_comes_first(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t0")
    w1.granted(0)
    w2 = PaperWorker(desk, "W2")
    on_w1, on_w2 = w1.exchange(1), w2.exchange(0)

    desk.submit_ids("t1")

    assert desk.answer(on_w1) is WAITING
    assert desk.answer(on_w2).offers[0].task_id == "t1"


def test_a_pinned_task_waits_and_does_not_hold_up_others(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("pinned", needs=Needs(worker="W2"))
    desk.submit_ids("free")

    assert w1.granted()[0].task_id == "free"
    w2 = PaperWorker(desk, "W2")
    assert w2.granted()[0].task_id == "pinned"


def test_a_paused_queue_hands_out_nothing_until_it_is_resumed(desk: Desk, w1: PaperWorker) -> None:
    desk.ask(PauseQueue(queue="default", paused=True, principal="p"))
    desk.submit_ids("t1")
    parked = w1.exchange()
    assert desk.answer(parked) is WAITING

    desk.restart()
    parked = w1.exchange(seq=1)
    assert desk.answer(parked) is WAITING
    desk.ask(PauseQueue(queue="default", paused=False, principal="p"))
    assert desk.answer(parked).offers[0].task_id == "t1"


@pytest.mark.parametrize("action", ["drain", "cordon"])
def test_a_marked_worker_gets_nothing_new(desk: Desk, w1: PaperWorker, action: str) -> None:
    desk.ask(MarkWorker(name="W1", action=action, deadline_s=60.0, principal="p"))
    desk.submit_ids("t1")
    parked = w1.exchange()
    assert desk.answer(parked) is WAITING

    desk.ask(MarkWorker(name="W1", action="uncordon", deadline_s=None, principal="p"))
    assert desk.answer(parked).offers[0].task_id == "t1"


def test_an_ordering_key_lets_one_task_go_at_a_time_in_accept_order(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("a", ordering_key="k", priority=0)
    desk.submit_ids("b", ordering_key="k", priority=9)
    desk.submit_ids("c", ordering_key="k", priority=9)

    (offer,) = w1.granted(0)
    assert offer.task_id == "a"
    parked = w1.exchange(1)
    assert desk.answer(parked) is WAITING

    w1.report(w1.started(offer), w1.ended(offer))
    assert desk.answer(parked).offers[0].task_id == "b"


def test_cancelling_a_whole_line_at_once_leaves_the_key_usable(desk: Desk, w1: PaperWorker) -> None:
    from hcna_ray.runtime.requests import Cancel

    ids = [f"t{n}" for n in range(20)]
    desk.submit_ids(*ids, ordering_key="k")
    desk.apply(*(Cancel(task_id=id_, reason="", principal="p") for id_ in ids[:-1]))

    (offer,) = w1.granted()
    assert offer.task_id == ids[-1]


def test_a_replayed_task_does_not_run_beside_the_one_behind_it(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", "t2", "t3", ordering_key="k")
    (first,) = w1.granted()
    w1.report(w1.started(first), w1.ended(first, ReportKind.FAILED, error=BOOM))
    (second,) = w1.granted()
    w1.report(w1.started(second))
    desk.ask(Retry(task_id="t1", principal="p"))
    desk.cancel("t3")

    parked = w1.exchange(1)
    assert desk.answer(parked) is WAITING
    w1.report(w1.ended(second))
    assert [one.task_id for one in desk.answer(parked).offers] == ["t1"]


def test_a_replay_does_not_reject_who_comes_later(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("a")
    desk.submit(*(a_spec(f"c{n}", depends_on=("a",)) for n in range(1500)))
    (offer,) = w1.granted()
    desk.runs_on = False
    w1.report(w1.started(offer), w1.ended(offer, ReportKind.FAILED, error=BOOM))
    assert desk.task("c1499").state is TaskState.SCHEDULED

    desk.ask(Retry(task_id="a", principal="p"))
    desk.submit(a_spec("late", depends_on=("a",)))
    desk.runs_on = True
    desk.tick()

    assert desk.task("c1499").state is TaskState.FAILED
    assert desk.task("late").state is TaskState.SCHEDULED


def test_a_repeated_batch_knows_its_parents_by_their_first_names(desk: Desk) -> None:
    def batch(parent: str, child: str) -> SubmitBatch:
        return SubmitBatch(
            specs=(
                a_spec(parent, idempotency_key="p", fingerprint="p"),
                a_spec(child, idempotency_key=child, fingerprint="c", depends_on=(parent,)),
            )
        )

    desk.ask(batch("p1", "c1"))
    answers = desk.ask(batch("p2", "c2"))

    assert [answer.task_id for answer in answers] == ["p1", "c2"]
    assert desk.task("c2").spec.depends_on == ("p1",)


def test_a_concurrency_key_is_a_limit_and_not_an_order() -> None:
    desk = Desk(concurrency_limits={"gpu": 2})
    w1 = PaperWorker(desk)
    desk.submit_ids("a", "b", "c", concurrency_key="gpu")
    desk.submit_ids("x")

    first, _ = w1.granted(0), w1.granted(1)
    assert w1.granted(2)[0].task_id == "x"
    parked = w1.exchange(3)
    assert desk.answer(parked) is WAITING

    w1.report(w1.started(first[0]), w1.ended(first[0]))
    assert desk.answer(parked).offers[0].task_id == "c"


def test_a_held_task_is_not_forgotten_when_the_one_before_it_is_cancelled(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("a", "b", "c", concurrency_key="k")
    (offer,) = w1.granted(0)
    parked = w1.exchange(1)
    w1.report(w1.started(offer), w1.ended(offer))
    second = desk.answer(parked).offers[0]
    desk.cancel(second.task_id)
    w1.report(w1.ended(second, ReportKind.RETURNED))

    assert w1.granted(2)[0].task_id == "c"


def test_expiry_is_checked_before_the_grant(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", expires_at=desk.clock.now() + 10.0)
    desk.clock.advance(10.0)

    parked = w1.exchange()

    assert desk.answer(parked) is WAITING
    assert desk.task("t1").state is TaskState.EXPIRED


def test_a_scheduled_task_becomes_due_by_itself(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", run_at=desk.clock.now() + 5.0)
    parked = w1.exchange()
    assert desk.moderator.sleep_s() <= 5.0
    desk.tick(5.0)

    assert desk.answer(parked).offers[0].task_id == "t1"


# -- operations ------------------------------------------------------------------------------------


def test_an_intent_reaches_the_agent_and_its_answer_the_sender(desk: Desk, w1: PaperWorker) -> None:
    from hcna_ray.runtime.messages import Exchange

    agent = w1.exchange(HEAVY_SLOT)
    envelope = {"msg_id": "m1", "intent": "test.ping"}
    sender = desk.park(SendIntent(envelope=envelope, worker="W1", principal="p", wait_s=10.0))
    assert desk.answer(agent).intents[0].envelope == envelope

    desk.park(
        Exchange(
            worker="W1",
            incarnation="a",
            slot=HEAVY_SLOT,
            seq=2,
            answers=(("m1", {"pong": True}),),
        )
    )
    assert desk.answer(sender) == {"pong": True}


def test_an_intent_to_a_silent_worker_is_refused_or_runs_out_of_time(
    desk: Desk, w1: PaperWorker
) -> None:
    sender = desk.park(
        SendIntent(envelope={"msg_id": "m1", "intent": "x"}, worker="W1", principal="p", wait_s=5.0)
    )
    desk.tick(6.0)
    assert isinstance(desk.answer(sender), WorkerUnavailable)

    desk.tick(60.0)
    with pytest.raises(WorkerUnavailable):
        desk.ask(
            SendIntent(
                envelope={"msg_id": "m2", "intent": "x"}, worker="W1", principal="p", wait_s=5.0
            )
        )
    with pytest.raises(NotFound):
        desk.ask(
            SendIntent(
                envelope={"msg_id": "m3", "intent": "x"}, worker="W9", principal="p", wait_s=5.0
            )
        )


def test_operations_leave_an_audit_line(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    desk.cancel("t1")
    desk.ask(MarkWorker(name="W1", action="cordon", deadline_s=None, principal="p"))

    lines = desk.store.reader().audit(before=None, limit=10)  # type: ignore[attr-defined]

    assert [line.entry.action for line in lines] == ["worker.cordon", "task.cancel"]


def test_a_newcomer_does_not_overtake_a_line_whose_front_ends_in_its_batch(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("parent")
    (parent,) = w1.granted()
    w1.report(w1.started(parent))
    desk.submit_ids("t1", "t2", ordering_key="k", depends_on=("parent",))
    desk.submit_ids("t3", ordering_key="k")
    w1.exchange(1)

    # The parent's failure ends the two at the front, in the batch that brings a fourth.
    desk.apply(
        SubmitBatch(specs=(a_spec("t4", ordering_key="k"),)),
        Reports(
            worker="W1",
            incarnation="a",
            reports=(w1.ended(parent, ReportKind.FAILED, error=BOOM),),
        ),
    )

    assert [desk.task(name).state for name in ("t1", "t2")] == [TaskState.FAILED] * 2
    assert desk.task("t3").lease is not None
    assert desk.task("t4").hold is Hold.ORDERING


def test_old_tasks_are_pruned(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer), w1.ended(offer))
    desk.tick(8 * 86400.0)
    desk.tick(60.0)

    assert desk.store.get(["t1"]) == {}


def test_pruning_is_on_by_default_and_keeps_up_with_many() -> None:
    policy = Policy.from_settings(Settings())
    assert 0 < policy.retention_s < float("inf")
    desk = Desk(retention_s=policy.retention_s)
    ids = [f"t{n}" for n in range(2 * PRUNE_MAX + 1)]
    desk.submit_ids(*ids)
    for id_ in ids:
        desk.cancel(id_)
    desk.tick(policy.retention_s)
    assert len(desk.store.get(ids)) == len(ids)

    left = []
    for _ in range(4):  # The period is over: what one look leaves over the next ones take.
        desk.tick(PRUNE_PERIOD_S + 1.0 if not left else 1.5)
        left.append(len(desk.store.get(ids)))

    assert left == [PRUNE_MAX + 1, 1, 0, 0]


def test_the_audit_log_is_pruned_by_its_age_by_default(desk: Desk) -> None:
    policy = Policy.from_settings(Settings())
    assert desk.policy.audit_retention_s == policy.audit_retention_s < float("inf")
    for number in range(3):
        desk.submit_ids(f"t{number}")
        desk.cancel(f"t{number}")
        desk.tick(86400.0)

    desk.tick(policy.audit_retention_s - 3 * 86400.0)
    desk.tick(PRUNE_PERIOD_S + 1.0)

    lines = desk.store.reader().audit(before=None, limit=10)  # type: ignore[attr-defined]
    assert [line.entry.target for line in lines] == ["t2", "t1"]


def test_what_waited_when_the_clock_was_put_is_not_older_for_the_next_moderator() -> None:
    desk = Desk()
    desk.submit_ids("t1", queue_timeout_s=60.0)
    desk.tick(10.0)
    desk.clock.step(45.0)
    desk.tick(1.0)
    desk.submit_ids("t2", queue_timeout_s=60.0)
    desk.restart()

    desk.tick(40.0)  # 51 s for t1, by the wall clock 96.
    assert desk.task("t1").state is TaskState.QUEUED
    desk.restart()  # It was moved, and is not moved again.
    desk.tick(11.0)
    assert desk.task("t1").error is not None
    assert desk.task("t1").error.kind is FailureKind.TIMEOUT
    assert desk.task("t2").state is TaskState.QUEUED
    desk.tick(11.0)  # It began to wait after that, and is owed nothing.
    assert desk.task("t2").state is TaskState.FAILED


@pytest.mark.parametrize("restarts", [False, True])
def test_a_clock_that_is_put_forward_makes_nothing_old(restarts: bool) -> None:
    desk = Desk()
    desk.submit_ids("t1", "t2")
    desk.cancel("t1")
    desk.clock.step(365 * 86400.0)
    desk.tick(1.0)
    desk.cancel("t2")
    if restarts:
        desk.restart()

    def kept() -> list[str]:
        desk.tick(PRUNE_PERIOD_S + 1.0)
        return sorted(desk.store.get(["t1", "t2"]))

    assert kept() == ["t1", "t2"]
    desk.tick(desk.policy.retention_s - 120.0)
    assert kept() == ["t1", "t2"]
    desk.tick(120.0)
    assert kept() == []
    lines = desk.store.reader().audit(before=None, limit=10)  # type: ignore[attr-defined]
    assert len(lines) == 2


def test_a_clock_that_is_put_ends_no_wait(desk: Desk) -> None:
    desk.submit_ids("t1", queue_timeout_s=100.0)
    desk.tick(30.0)
    for by_s in (60.0, 3600.0, 86400.0):
        desk.clock.step(by_s)
        desk.tick(1.0)
    desk.submit_ids("t2", queue_timeout_s=100.0)  # That one knows nothing of all this.
    desk.tick(66.0)
    assert {desk.task(name).state for name in ("t1", "t2")} == {TaskState.QUEUED}

    desk.clock.step(40.0)
    desk.tick(0.9)
    assert {desk.task(name).state for name in ("t1", "t2")} == {TaskState.QUEUED}
    desk.tick(0.5)
    assert desk.task("t1").state is TaskState.FAILED  # After 100 s of waiting.
    desk.tick(31.0)
    assert desk.task("t2").state is TaskState.QUEUED
    desk.tick(2.0)
    assert desk.task("t2").state is TaskState.FAILED


def test_a_wait_that_begins_anew_after_a_step_is_whole(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", queue_timeout_s=100.0)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    desk.clock.step(3600.0)
    desk.tick(1.0)
    w1.gone(0)
    desk.tick(99.5)
    assert desk.task("t1").state is TaskState.QUEUED
    desk.tick(1.0)
    assert desk.task("t1").state is TaskState.FAILED
    assert desk.moderator._clocks._since == {}


def test_a_task_that_is_replayed_and_ends_in_one_batch_has_ended_anew(
    desk: Desk, w1: PaperWorker
) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer), w1.ended(offer, ReportKind.FAILED, error=BOOM))
    reader = desk.store.reader()  # type: ignore[attr-defined]
    ((first, _),) = reader.ended(ids=["t1"], limit=9)
    desk.ended.clear()

    desk.apply(Retry(task_id="t1", principal="p"), Cancel(task_id="t1", reason="", principal="p"))

    ((again, task),) = reader.ended(ids=["t1"], after=first, limit=9)
    assert task.state is TaskState.CANCELLED
    assert again > first
    assert desk.ended == ["t1"]


def test_nobody_waits_for_a_task_that_only_its_key_remembers(desk: Desk, w1: PaperWorker) -> None:
    first = a_spec("t1", principal="me", idempotency_key="k1")
    desk.submit(first)
    (offer,) = w1.granted()
    w1.report(w1.started(offer), w1.ended(offer))
    desk.tick(8 * 86400.0)
    desk.tick(60.0)

    # The same pair once more, under new ids: the first one's key is still held, its task is gone.
    again, child = desk.submit(
        a_spec("t2", principal="me", idempotency_key="k1"), a_spec("t3", depends_on=("t2",))
    )

    assert again == Accepted("t1", TaskState.QUEUED, True)
    assert isinstance(child, Refused)
    assert child.error.code == "dependency_not_found"
    assert desk.store.get(["t3"]) == {}


def test_counters_say_what_happened(desk: Desk, w1: PaperWorker) -> None:
    assert isinstance(desk.store, MemoryTaskStore)
    desk.submit_ids("t1", "t2")
    first, second = w1.granted(0)[0], w1.granted(1)[0]
    w1.report(w1.started(first), w1.ended(first))
    w1.report(w1.started(second), w1.ended(second, ReportKind.FAILED, error=BOOM))

    stored = desk.store.reader().counters()
    counted = {tuple(name): n for name, n in stored.items() if name.name not in (WAITED, RAN)}

    assert counted == {
        ("accepted", "echo", "default"): 2,
        ("attempts", "echo", "completed"): 1,
        ("attempts", "echo", "errored"): 1,
        ("ended", "echo", "completed"): 1,
        ("ended", "echo", "failed"): 1,
    }


def accepted_by_queue(desk: Desk) -> dict[str, int]:
    assert isinstance(desk.store, MemoryTaskStore)
    stored = desk.store.reader().counters()
    return {one.label: value for one, value in stored.items() if one.name == "accepted"}


def test_so_many_queues_are_counted_by_name_and_the_others_together(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "QUEUES_NAMED_MAX", 3)
    desk.submit(*(a_spec(f"t{number}", queue=f"job-{number}") for number in range(5)))
    desk.submit(a_spec("t5", queue="job-0"), a_spec("t6", queue="job-9"))
    assert accepted_by_queue(desk) == {"job-0": 2, "job-1": 1, "job-2": 1, OTHER_QUEUES: 3}

    desk.restart()
    desk.submit(a_spec("t7", queue="job-2"), a_spec("t8", queue="job-4"))
    assert accepted_by_queue(desk) == {"job-0": 2, "job-1": 1, "job-2": 2, OTHER_QUEUES: 4}

    # What an older version has counted by name goes on under that name.
    with desk.store.transaction():
        desk.store.bump({Counter("accepted", "echo", f"old-{number}"): 7 for number in range(9)})
    desk.restart()
    desk.submit(a_spec("t9", queue="old-8"), a_spec("t10", queue="new"))
    found = accepted_by_queue(desk)
    assert (found["old-8"], found[OTHER_QUEUES]) == (8, 5)
    assert "new" not in found


def histogram_of(desk: Desk, figure: str) -> list[tuple[str, float]]:
    """Return the buckets of echo tasks that hold anything, and the sum, as the store has them."""
    assert isinstance(desk.store, MemoryTaskStore)
    stored = desk.store.reader().counters()
    counted = {
        one.label: value
        for one, value in stored.items()
        if (one.name, one.task_type) == (figure, "echo")
    }
    histogram = stored_histogram(counted)
    return [
        (bound, count)
        for (bound, _), count in zip(histogram.buckets(), histogram.counts, strict=True)
        if count
    ] + [(SUM, histogram.total)]


def test_how_long_tasks_wait_and_run_survives_the_moderator(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1", "t2")
    desk.clock.advance(2)
    first, second = w1.granted(0)[0], w1.granted(1)[0]
    w1.report(w1.started(first))
    w1.report(w1.started(first))  # Told twice, counted once.
    desk.clock.advance(20)
    w1.report(w1.ended(first), w1.ended(second))

    # Of the second one nobody told before its end that it had begun.
    assert histogram_of(desk, WAITED)[0] == ("2.5", 1)
    assert sum(count for _, count in histogram_of(desk, WAITED)[:-1]) == 2
    ran = histogram_of(desk, RAN)
    assert sum(count for _, count in ran[:-1]) == 2
    desk.restart()
    assert histogram_of(desk, RAN) == ran


def test_the_moderator_counts_its_own_batches_and_renewals(desk: Desk, w1: PaperWorker) -> None:
    before = desk.ask(Query(name="status")).figures
    desk.submit_ids("t1", "t2")
    w1.heartbeat()
    after = desk.ask(Query(name="status")).figures

    assert after.renewals == before.renewals + 1
    assert sum(after.commit_s.counts) > sum(before.commit_s.counts)
    assert sum(after.batch_calls.counts) == sum(before.batch_calls.counts) + 3
    assert sum(after.batch_s.counts) == sum(after.batch_calls.counts)
    assert (after.refused, after.disk_free_bytes) == (0, desk.free_bytes)


def test_a_drain_lets_attempts_run_on_until_its_time_is_up(desk: Desk, w1: PaperWorker) -> None:
    desk.submit_ids("t1")
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    parked = w1.exchange(holding=[offer])
    desk.ask(MarkWorker(name="W1", action="drain", deadline_s=3.0, principal="p"))
    desk.tick(2.0)
    assert desk.answer(parked) is WAITING

    desk.tick(2.0)

    (stop,) = desk.answer(parked).stops
    assert (stop.task_id, stop.reason) == ("t1", "drain")
    desk.tick(2.0)
    assert desk.answer(w1.exchange(holding=[offer])) is WAITING  # Told once.


def test_the_log_says_when_nobody_takes_work(
    desk: Desk, w1: PaperWorker, caplog: pytest.LogCaptureFixture
) -> None:
    desk.ask(MarkWorker(name="W1", action="cordon", deadline_s=None, principal="p"))
    desk.submit_ids("t1", "t2")
    desk.submit_ids("t3")

    said = [record.message for record in caplog.records]
    assert said.count("No healthy workers available") == 1
    desk.tick(11.0)
    said = [record.message for record in caplog.records]
    assert said.count("No healthy workers available") == 2

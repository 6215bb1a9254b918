"""What the moderator has to tell in spans, seen at the desk."""

from __future__ import annotations

from hcna_ray.core.models import FailureKind, Needs, RetryPolicy, TaskError, Token
from hcna_ray.observability.traces import Ran, Waited
from hcna_ray.runtime.messages import Goodbye, ReportKind
from tests.support.builders import T0
from tests.support.paper_worker import Desk, PaperWorker

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BOOM = TaskError(kind=FailureKind.ERROR, type="ValueError", message="boom")


def a_desk(**policy: object) -> tuple[Desk, PaperWorker]:
    desk = Desk(traced=True, **policy)
    return desk, PaperWorker(desk)


def test_a_task_has_waited_from_accept_to_hand_out() -> None:
    desk, w1 = a_desk()
    desk.submit_ids("t1", traceparent=TRACE, queue="q")
    desk.tick(3.0)
    (offer,) = w1.granted()
    assert desk.notes == []  # It may come back: nothing is told of a grant.
    desk.tick(1.0)
    w1.report(w1.started(offer))
    told = list(desk.notes)
    w1.report(w1.ended(offer, duration_ms=4.0))

    assert told == [Waited("t1", "echo", "q", TRACE, T0, T0 + 3.0, 1, "W1")]
    assert desk.notes == told  # The runner tells of what it has run.


def test_a_quick_one_whose_end_tells_of_its_start_too() -> None:
    desk, w1 = a_desk()
    desk.submit_ids("t1", traceparent=TRACE)
    (offer,) = w1.granted()
    w1.report(w1.ended(offer, duration_ms=4.0))

    assert [type(one) for one in desk.notes] == [Waited]


def test_nobody_tells_of_what_is_not_sampled_or_in_no_trace() -> None:
    desk, w1 = a_desk()
    desk.submit_ids("t1", traceparent=TRACE[:-2] + "00")
    desk.submit_ids("t2")
    for offer in w1.granted() + w1.granted():
        w1.report(w1.ended(offer, duration_ms=4.0))
    desk.submit_ids("t3")
    desk.cancel("t3")

    assert desk.notes == []


def test_where_traces_are_off_there_are_no_notes() -> None:
    desk = Desk()
    w1 = PaperWorker(desk)
    desk.submit_ids("t1", traceparent=TRACE)
    (offer,) = w1.granted()
    w1.report(w1.ended(offer, duration_ms=4.0))

    assert desk.notes == []


def test_each_attempt_has_its_own_wait_and_a_restart_changes_nothing() -> None:
    desk, w1 = a_desk()
    retry = RetryPolicy(max_attempts=2, backoff_s=10.0, jitter=0.0)
    desk.submit_ids("t1", traceparent=TRACE, retry=retry)
    (first,) = w1.granted()
    w1.report(w1.ended(first, kind=ReportKind.FAILED, error=BOOM, duration_ms=4.0))
    desk.restart()
    w1 = PaperWorker(desk, incarnation="later")
    desk.tick(10.0)
    queued_at = desk.clock.now()
    desk.tick(2.0)
    (second,) = w1.granted()
    w1.report(w1.ended(second, duration_ms=4.0))

    waits = [one for one in desk.notes if isinstance(one, Waited)]
    assert [one.attempt for one in waits] == [1, 2]
    assert (waits[1].since, waits[1].until) == (queued_at, queued_at + 2.0)
    assert {one.traceparent for one in waits} == {TRACE}


def test_of_an_attempt_whose_process_died_the_moderator_tells() -> None:
    desk, w1 = a_desk()
    desk.submit_ids("t1", traceparent=TRACE)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    begun = desk.clock.now()
    desk.tick(5.0)
    error = TaskError(kind=FailureKind.POISON, message="its process ended with status 9")
    w1.report(w1.ended(offer, kind=ReportKind.LOST, error=error, duration_ms=0.0))

    (ran,) = [one for one in desk.notes if isinstance(one, Ran)]
    assert ran == Ran("t1", "echo", TRACE, Token(1, 1), "W1", begun, begun + 5.0, "lost", "poison")


def test_of_an_attempt_whose_worker_left_the_moderator_tells() -> None:
    desk, w1 = a_desk()
    desk.submit_ids("t1", traceparent=TRACE)
    (offer,) = w1.granted()
    w1.report(w1.started(offer))
    desk.ask(Goodbye(worker="W1", incarnation=w1.incarnation))

    (ran,) = [one for one in desk.notes if isinstance(one, Ran)]
    assert (ran.outcome, ran.error_type) == ("lost", "lost")


def test_what_ends_in_the_queue_has_waited_until_then() -> None:
    desk, _ = a_desk()
    desk.submit_ids("t1", traceparent=TRACE, needs=Needs(worker="W9"))
    desk.tick(7.0)
    desk.cancel("t1")

    (waited,) = desk.notes
    assert waited == Waited("t1", "echo", "default", TRACE, T0, T0 + 7.0, 0, "", ended="cancelled")

from __future__ import annotations

import math

import pytest

from hcna_ray.core.errors import StaleWorker
from hcna_ray.core.models import Needs, WorkerState
from hcna_ray.runtime.sessions import Sessions, marked
from tests.support.builders import T0, a_worker_record


@pytest.fixture
def sessions() -> Sessions:
    sessions = Sessions(suspect_s=12.5, ttl_s=35.0, gone_s=1000.0)
    sessions.put(a_worker_record("W1"), 1000.0)
    return sessions


def test_a_worker_is_found_by_either_of_its_names(sessions: Sessions) -> None:
    by_short = sessions.find("W1")
    assert by_short is not None
    assert sessions.find(by_short.record.node_id) is by_short
    assert sessions.find("W2") is None


@pytest.mark.parametrize(
    ("silence", "state"),
    [
        (0.0, WorkerState.ONLINE),
        (12.5, WorkerState.ONLINE),
        (12.6, WorkerState.SUSPECT),
        (35.0, WorkerState.SUSPECT),
        (35.1, WorkerState.ASLEEP),
        (1000.0, WorkerState.ASLEEP),
        (1000.1, WorkerState.GONE),
    ],
)
def test_silence_makes_a_worker_suspect_then_asleep_then_gone(
    sessions: Sessions, silence: float, state: WorkerState
) -> None:
    session = sessions.find("W1")
    assert session is not None
    assert sessions.state(session, 1000.0 + silence) is state
    assert bool(sessions.overdue(1000.0 + silence)) is (silence > 35.0)


def test_a_worker_that_is_heard_but_hears_nothing_loses_its_leases_in_time(
    sessions: Sessions,
) -> None:
    session = sessions.find("W1")
    assert session is not None
    # It still gets through, but what it knows was answered stays behind.
    session.heard, session.renewed = 1030.0, 1000.0

    assert sessions.state(session, 1017.5) is WorkerState.ONLINE
    assert sessions.state(session, 1017.6) is WorkerState.SUSPECT
    assert sessions.overdue(1035.0) == []
    assert sessions.overdue(1035.1) == [session]


def test_a_worker_is_given_up_once(sessions: Sessions) -> None:
    (session,) = sessions.overdue(1036.0)
    session.closed = True

    assert sessions.overdue(1100.0) == []
    assert sessions.state(session, 1000.0) is WorkerState.ASLEEP


def test_marks_show_unless_silence_matters_more(sessions: Sessions) -> None:
    session = sessions.find("W1")
    assert session is not None
    session.record = marked(session.record, cordoned=True, draining_until=None)
    assert sessions.state(session, 1000.0) is WorkerState.CORDONED
    session.record = marked(session.record, cordoned=True, draining_until=5.0)
    assert sessions.state(session, 1000.0) is WorkerState.DRAINING
    assert sessions.state(session, 1020.0) is WorkerState.SUSPECT


def test_a_call_belongs_to_the_incarnation_on_record(sessions: Sessions) -> None:
    session = sessions.current("W1", "W1-a")
    assert session is not None
    with pytest.raises(StaleWorker) as stale:
        sessions.current("W1", "W1-old")
    assert stale.value.current == "W1-a"


def test_the_unknown_and_the_given_up_must_say_hello_first(sessions: Sessions) -> None:
    assert sessions.current("W2", "x") is None
    session = sessions.find("W1")
    assert session is not None
    session.closed = True
    assert sessions.current("W1", "W1-a") is None

    sessions.put(session.record, 1100.0)
    assert sessions.current("W1", "W1-a") is session
    assert sessions.state(session, 1100.0) is WorkerState.ONLINE


def test_who_is_on_record_gets_a_full_term_after_a_restart() -> None:
    sessions = Sessions(suspect_s=12.5, ttl_s=35.0, gone_s=1000.0)
    sessions.restore([a_worker_record("W2"), a_worker_record("W1")], T0 + 500.0, 5000.0)

    assert [one.record.name for one in sessions] == ["W1", "W2"]
    assert sessions.overdue(5035.0) == []
    assert len(sessions.overdue(5035.1)) == 2


def test_who_was_away_stays_away_after_a_restart_for_as_long_as_it_was() -> None:
    sessions = Sessions(suspect_s=12.5, ttl_s=35.0, gone_s=1000.0)
    asleep = a_worker_record("W1", asleep_at=T0 + 35.0)
    left = a_worker_record("W2", left_at=T0 + 1.0)
    sessions.restore([asleep, left], T0 + 900.0, 50.0)

    first, second = sessions
    assert sessions.state(first, 50.0) is WorkerState.ASLEEP
    assert sessions.state(second, 50.0) is WorkerState.GONE
    assert sessions.view(first, 50.0, 0, Needs()).last_seen_age_s == 900.0
    assert sessions.state(first, 150.1) is WorkerState.GONE
    assert sessions.overdue(150.0) == []


def test_what_is_known_in_memory_alone_survives_following_the_store(sessions: Sessions) -> None:
    session = sessions.find("W1")
    assert session is not None
    session.slots, session.closed = 4, True
    sessions.restore([a_worker_record("W1")], T0 + 500.0, 1010.0)

    assert sessions.find("W1") is session
    assert (session.slots, session.closed, session.renewed) == (4, False, 1000.0)
    sessions.restore([], T0 + 500.0, 1010.0)
    assert list(sessions) == []


def test_the_next_change_by_silence_is_known_to_the_moment(sessions: Sessions) -> None:
    session = sessions.find("W1")
    assert session is not None
    assert sessions.next_change_s(1000.0) == 12.5
    assert sessions.next_change_s(1020.0) == 15.0
    session.closed = True
    assert sessions.next_change_s(1020.0) == math.inf


def test_a_skew_is_the_smallest_of_late(sessions: Sessions) -> None:
    session = sessions.find("W1")
    assert session is not None
    assert session.skew == 0.0
    session.skews.extend([600.2, 600.01, 603.0])
    assert session.skew == 600.01
    session.skews.extend([5.0 + n for n in range(12)])  # The clock was put right.
    assert session.skew == 5.0


def test_a_view_says_what_the_worker_has_and_what_is_taken(sessions: Sessions) -> None:
    session = sessions.find("W1")
    assert session is not None
    view = sessions.view(session, 1000.0, live=3, used=Needs(cpu=1.0))

    assert (view.cpu, view.used.cpu, view.live) == (4.0, 1.0, 3)
    assert view.free("cpu") == 3.0
    assert view.task_types == {"echo"}
    assert sessions.node_ids() == {"W1": "HCNA-W1--prod--home--v1.0"}

from __future__ import annotations

import pytest

from hcna_ray.core.errors import StaleWorker
from hcna_ray.core.models import Needs, WorkerState
from hcna_ray.runtime.sessions import Sessions, marked
from tests.support.builders import a_worker_record


@pytest.fixture
def sessions() -> Sessions:
    sessions = Sessions(suspect_s=12.5, ttl_s=35.0)
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
        (35.1, WorkerState.GONE),
    ],
)
def test_silence_makes_a_worker_suspect_and_then_gone(
    sessions: Sessions, silence: float, state: WorkerState
) -> None:
    session = sessions.find("W1")
    assert session is not None
    assert sessions.state(session, 1000.0 + silence) is state
    assert bool(sessions.overdue(1000.0 + silence)) is (state is WorkerState.GONE)


def test_a_worker_is_given_up_once(sessions: Sessions) -> None:
    (session,) = sessions.overdue(1036.0)
    session.gone = True

    assert sessions.overdue(1100.0) == []
    assert sessions.state(session, 1000.0) is WorkerState.GONE


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
    session.gone = True
    assert sessions.current("W1", "W1-a") is None

    sessions.put(session.record, 1100.0)
    assert sessions.current("W1", "W1-a") is session
    assert sessions.state(session, 1100.0) is WorkerState.ONLINE


def test_who_is_on_record_gets_a_full_term_after_a_restart() -> None:
    sessions = Sessions(suspect_s=12.5, ttl_s=35.0)
    sessions.restore([a_worker_record("W2"), a_worker_record("W1")], 5000.0)

    assert [one.record.name for one in sessions] == ["W1", "W2"]
    assert sessions.overdue(5035.0) == []
    assert len(sessions.overdue(5035.1)) == 2


def test_a_view_says_what_the_worker_has_and_what_is_taken(sessions: Sessions) -> None:
    session = sessions.find("W1")
    assert session is not None
    view = sessions.view(session, 1000.0, live=3, used=Needs(cpu=1.0))

    assert (view.cpu, view.used.cpu, view.live) == (4.0, 1.0, 3)
    assert view.free("cpu") == 3.0
    assert view.task_types == {"echo"}
    assert sessions.node_ids() == {"W1": "HCNA-W1--prod--home--v1.0"}

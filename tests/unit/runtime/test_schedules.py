"""Schedules inside the moderator: one task an instant, whatever happens in between."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hcna_ray import failpoints
from hcna_ray.core.errors import (
    HcnaError,
    IdempotencyConflict,
    NotFound,
    ScheduleBusy,
    ScheduleExists,
    StoreUnavailable,
    TooManySchedules,
)
from hcna_ray.core.models import Task, TaskFilter, TaskState
from hcna_ray.core.schedules import OFFER_AGAIN_S, Overlap, Schedule
from hcna_ray.runtime import schedules
from hcna_ray.runtime.messages import Accepted
from hcna_ray.runtime.requests import MarkSchedule, PutSchedule, RunSchedule
from hcna_ray.runtime.schedules import KeyAuthority, Refusal, task_id_of
from hcna_ray.security.keys import ApiKey
from hcna_ray.store.base import Counter
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import T0, a_schedule, a_spec, a_task
from tests.support.paper_worker import Desk, PaperWorker

#: The first full hour behind `T0`.
HOUR = T0 + 3600 - T0 % 3600


@pytest.fixture
def desk() -> Desk:
    return Desk()


def create(desk: Desk, name: str = "nightly", **changes: Any) -> Schedule:
    schedule = a_schedule(name, **{"decided_until": desk.clock.now(), **changes})
    created: Schedule = desk.ask(PutSchedule(schedule=schedule, new=True, by="owner"))
    return created


def until(desk: Desk, at: float) -> None:
    """Let time pass until an instant, and the moderator look."""
    desk.tick(at - desk.clock.now())


def of(desk: Desk, name: str = "nightly", principal: str = "owner") -> Schedule:
    found = desk.store.get_schedule((principal, name))
    assert found is not None
    return found


def tasks(desk: Desk) -> list[Task]:
    """Every task, oldest first."""
    assert isinstance(desk.store, MemoryTaskStore)
    return desk.store.reader().page(TaskFilter(), before_seq=None, limit=999)[::-1]


def instants(desk: Desk) -> list[float | None]:
    return [task.spec.schedule_at for task in tasks(desk)]


def audit(desk: Desk) -> list[tuple[str, str, str]]:
    assert isinstance(desk.store, MemoryTaskStore)
    lines = desk.store.reader().audit(before=None, limit=99)[::-1]
    return [(line.entry.action, line.entry.target, line.entry.outcome) for line in lines]


# -- the ordinary way ------------------------------------------------------------------------------


def test_when_its_time_comes_its_task_is_submitted_and_done(desk: Desk) -> None:
    created = create(desk, spec=a_spec("", payload=b'{"n": 1}', queue="night", principal="owner"))
    assert created.wake_at == HOUR
    assert desk.moderator.sleep_s() <= 1.0
    until(desk, HOUR - 0.5)
    assert desk.moderator.sleep_s() == pytest.approx(0.5)
    assert not tasks(desk)

    until(desk, HOUR + 0.25)
    w1 = PaperWorker(desk)
    (offer,) = w1.granted()
    assert offer.payload == b'{"n": 1}'
    (task,) = tasks(desk)
    assert task.spec.id == offer.task_id == task_id_of(created, HOUR)
    assert (task.spec.schedule, task.spec.schedule_at) == ("nightly", HOUR)
    assert (task.spec.queue, task.spec.principal) == ("night", "owner")
    assert task.spec.accepted_at == HOUR + 0.25

    w1.exchange(0, w1.ended(offer))
    after = of(desk)
    assert (after.started, after.last_task_id, after.last_at) == (1, task.id, HOUR)
    assert after.wake_at == HOUR + 3600
    assert desk.ended == [task.id]


def test_ids_of_tasks_follow_from_schedule_and_instant() -> None:
    ids = {
        task_id_of(a_schedule(name, principal=who), at)
        for name in ("a", "b")
        for who in ("me", "you")
        for at in (HOUR, HOUR + 3600)
    }
    assert len(ids) == 8
    assert all(len(one) == len("task-") + 26 for one in ids)
    early, late = (task_id_of(a_schedule(), HOUR + by) for by in (0, 3600))
    assert early < late


def test_what_was_missed_while_nothing_ran_is_made_up_for(desk: Desk) -> None:
    create(desk, overlap=Overlap.ALLOW, catch_up_s=7200.0)
    desk.clock.advance(HOUR + 3 * 3600 + 60 - desk.clock.now())
    desk.restart()
    desk.tick()
    assert instants(desk) == [HOUR + 2 * 3600, HOUR + 3 * 3600]
    after = of(desk)
    assert (after.started, after.missed) == (2, 2)
    assert desk.store.reader().counters()[Counter("schedule", "", "missed")] == 2  # type: ignore[attr-defined]
    assert audit(desk)[-1] == ("schedule.held_up", "nightly", "too_late")


# -- exactly one task an instant -------------------------------------------------------------------


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize(
    "where",
    ["ledger.tasks.written", "ledger.schedules.written", "moderator.commit.written"],
)
def test_a_crash_before_the_commit_leaves_neither_task_nor_progress(
    desk: Desk, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = create(desk)
    _kill_at(monkeypatch, where)
    with pytest.raises(Killed):
        until(desk, HOUR + 1)
    assert not tasks(desk)
    assert of(desk) == before

    monkeypatch.undo()
    desk.restart()
    desk.tick()
    assert instants(desk) == [HOUR]
    assert of(desk).started == 1


def test_a_crash_behind_the_commit_leaves_both(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    create(desk)
    _kill_at(monkeypatch, "moderator.commit.done")
    with pytest.raises(Killed):
        until(desk, HOUR + 1)
    assert instants(desk) == [HOUR]

    monkeypatch.undo()
    desk.restart()
    desk.tick()
    assert instants(desk) == [HOUR]
    assert of(desk).started == 1


def _kill_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def hit(name: str) -> None:
        if name == where:
            raise Killed

    monkeypatch.setattr(failpoints, "hit", hit)


def test_a_clock_that_is_put_back_gives_no_instant_a_second_task(desk: Desk) -> None:
    create(desk)
    until(desk, HOUR + 5)
    desk.clock.step(-600)
    for _ in range(20):
        desk.tick(60)
        desk.restart()
    assert instants(desk) == [HOUR]


def test_an_instant_that_has_its_task_gets_no_other_one_after_a_change(desk: Desk) -> None:
    created = create(desk, overlap=Overlap.ALLOW)
    until(desk, HOUR + 5)
    desk.clock.step(-600)
    anew = created.evolve(catch_up_s=60.0, decided_until=desk.clock.now())
    desk.ask(PutSchedule(schedule=anew, new=False, by="owner"))
    until(desk, HOUR + 30)
    assert instants(desk) == [HOUR]
    assert of(desk).started == 1
    until(desk, HOUR + 3600)
    assert instants(desk) == [HOUR, HOUR + 3600]


def test_a_store_that_refuses_the_batch_is_asked_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(desk)

    def refuse(entries: object) -> None:
        raise StoreUnavailable("full", 5)

    monkeypatch.setattr(desk.store, "save_schedules", refuse)
    desk.runs_on = False
    until(desk, HOUR + 1)
    assert not tasks(desk)
    monkeypatch.undo()
    desk.runs_on = True
    desk.tick()
    assert instants(desk) == [HOUR]


# -- overlap ---------------------------------------------------------------------------------------


def test_skip_waits_for_no_one(desk: Desk) -> None:
    create(desk)
    until(desk, HOUR)
    until(desk, HOUR + 3600)
    assert of(desk).skipped == 1
    desk.cancel(tasks(desk)[0].id)
    assert instants(desk) == [HOUR]
    until(desk, HOUR + 7200)
    assert instants(desk) == [HOUR, HOUR + 7200]


def test_queue_one_submits_as_soon_as_the_last_one_has_ended(desk: Desk) -> None:
    create(desk, overlap=Overlap.QUEUE_ONE)
    until(desk, HOUR)
    until(desk, HOUR + 3600)
    until(desk, HOUR + 7200)
    assert instants(desk) == [HOUR]
    assert (of(desk).waiting_at, of(desk).skipped) == (HOUR + 3600, 1)

    desk.restart()
    until(desk, HOUR + 7300)
    desk.cancel(tasks(desk)[0].id)
    assert instants(desk) == [HOUR, HOUR + 3600]
    assert of(desk).waiting_at is None


def test_cancel_previous_cancels_it(desk: Desk) -> None:
    create(desk, overlap=Overlap.CANCEL_PREVIOUS)
    until(desk, HOUR)
    until(desk, HOUR + 3600)
    first, second = tasks(desk)
    assert first.state is TaskState.CANCELLED
    assert first.cancel_reason == schedules.SUPERSEDED
    assert second.state is TaskState.QUEUED


def test_allow_makes_up_for_many_in_parts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "TASKS_MAX", 4)
    create(desk, overlap=Overlap.ALLOW, catch_up_s=86400.0)
    create(desk, "other", overlap=Overlap.ALLOW, catch_up_s=86400.0)
    desk.runs_on = False
    until(desk, HOUR + 5 * 3600)
    assert len(tasks(desk)) == 4
    desk.runs_on = True
    desk.tick()
    assert len(tasks(desk)) == 12
    assert {of(desk, name).started for name in ("nightly", "other")} == {6}


def test_one_batch_takes_no_more_schedules_than_it_has_time_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "BUSY_S", -1.0)
    monkeypatch.setattr(schedules, "DUE_MAX", 2)
    for number in range(5):
        create(desk, f"s{number}")
    desk.runs_on = False
    until(desk, HOUR)
    assert len(tasks(desk)) in (0, 1)
    monkeypatch.setattr(schedules, "BUSY_S", 1.0)
    desk.runs_on = True
    desk.tick()
    assert len(tasks(desk)) == 5


# -- refusals --------------------------------------------------------------------------------------


def test_while_the_queue_is_full_it_waits_within_its_window() -> None:
    desk = Desk(queue_tasks_max=1)
    create(desk, catch_up_s=60.0)
    desk.submit(a_spec("other"))
    until(desk, HOUR + 1)
    waits = of(desk)
    assert (waits.wake_at, waits.missed) == (HOUR + 1 + OFFER_AGAIN_S, 0)
    assert waits.reason is not None
    assert waits.reason.code == "overloaded"

    desk.cancel("other")
    until(desk, HOUR + 1 + OFFER_AGAIN_S)
    assert [task.spec.schedule_at for task in tasks(desk)[1:]] == [HOUR]


def test_a_queue_that_stays_full_is_a_miss_and_is_on_record_once() -> None:
    desk = Desk(queue_tasks_max=1)
    create(desk, catch_up_s=30.0)
    desk.submit(a_spec("other"))
    for hour in range(2):
        for seconds in (1, 12, 23, 34):
            until(desk, HOUR + hour * 3600 + seconds)
    assert (of(desk).missed, of(desk).started) == (2, 0)
    assert of(desk).wake_at == HOUR + 7200
    assert [line for line in audit(desk) if line[0] == "schedule.held_up"] == [
        ("schedule.held_up", "nightly", "overloaded")
    ]


def test_what_holds_it_up_again_after_a_task_is_on_record_again() -> None:
    desk = Desk(queue_tasks_max=1)
    create(desk, catch_up_s=30.0, overlap=Overlap.ALLOW)
    for hour, name in enumerate(("first", None, "second")):
        if name is not None:
            desk.submit(a_spec(name))
        for seconds in (1, 12, 23, 34):
            until(desk, HOUR + hour * 3600 + seconds)
        for task in tasks(desk):
            if not task.terminal:
                desk.cancel(task.id)
    assert (of(desk).started, of(desk).missed) == (1, 2)
    assert [line[0] for line in audit(desk)].count("schedule.held_up") == 2


def test_a_type_that_no_worker_has_any_more_is_waited_for(desk: Desk) -> None:
    PaperWorker(desk)
    create(desk, spec=a_spec("", task_type="gone", principal="owner"))
    until(desk, HOUR + 1)
    assert not tasks(desk)
    reason = of(desk).reason
    assert reason is not None
    assert reason.code == "unknown_task_type"


def test_a_cron_line_that_means_nothing_any_more_is_told_and_tried_again(desk: Desk) -> None:
    with desk.store.transaction():
        desk.store.save_schedules([a_schedule(timezone="Gone/Zone", wake_at=HOUR)])
    desk.restart()
    until(desk, HOUR)
    assert of(desk).wake_at == HOUR + schedules.BROKEN_S
    reason = of(desk).reason
    assert reason is not None
    assert reason.code == "invalid_schedule"


class TestAuthority:
    KEY = ApiKey(name="alice", role="submitter", sha256="aa", created_at=T0)

    def refusal(
        self, *keys: ApiKey, now: float = T0, opened: int = 0, **changes: Any
    ) -> Refusal | None:
        store = MemoryTaskStore()
        with store.transaction():
            store.insert([a_task(principal="alice")])
        authority = KeyAuthority(lambda: keys, store.reader)
        spec = a_spec("", principal="alice", queue="q")
        return authority.refusal(a_schedule(key_sha256="aa", spec=spec, **changes), now, opened)

    def test_a_good_key_may(self) -> None:
        assert self.refusal(self.KEY) is None
        assert self.refusal(_changed(self.KEY, task_types=("ec*",), queues=("q",))) is None
        assert self.refusal(_changed(self.KEY, quota=2)) is None

    @pytest.mark.parametrize(
        ("change", "code", "passes"),
        [
            ({"revoked_at": T0}, "key_revoked", False),
            ({"expires_at": T0 - 1}, "key_expired", False),
            ({"role": "viewer"}, "out_of_scope", False),
            ({"task_types": ("sleep",)}, "out_of_scope", False),
            ({"queues": ("other",)}, "out_of_scope", False),
            ({"sha256": "bb"}, "key_gone", False),
            ({"quota": 1}, "quota", True),
        ],
    )
    def test_another_may_not(self, change: dict[str, Any], code: str, passes: bool) -> None:
        refusal = self.refusal(_changed(self.KEY, **change))
        assert refusal is not None
        assert (refusal.code, refusal.passes) == (code, passes)

    @pytest.mark.parametrize(("quota", "opened", "used_up"), [(2, 1, True), (1, -1, False)])
    def test_what_the_batch_has_opened_and_ended_counts(
        self, quota: int, opened: int, used_up: bool
    ) -> None:
        refusal = self.refusal(_changed(self.KEY, quota=quota), opened=opened)
        assert (refusal is not None) is used_up

    def with_quota(self, desk: Desk, quota: int) -> None:
        key = _changed(self.KEY, quota=quota)
        desk.authority = KeyAuthority(lambda: [key], desk.store.reader)  # type: ignore[attr-defined]
        desk.restart()

    def test_many_schedules_of_one_minute_keep_to_the_quota(self, desk: Desk) -> None:
        self.with_quota(desk, 3)
        for number in range(10):
            create(desk, f"s{number}", key_sha256="aa")
        until(desk, HOUR)
        assert len(tasks(desk)) == 3

        w1 = PaperWorker(desk)
        (offer,) = w1.granted()
        w1.exchange(0, w1.ended(offer))
        until(desk, HOUR + OFFER_AGAIN_S)
        assert sum(not task.terminal for task in tasks(desk)) == 3

    def test_a_schedule_that_catches_up_keeps_to_the_quota(self, desk: Desk) -> None:
        self.with_quota(desk, 2)
        create(desk, key_sha256="aa", overlap=Overlap.ALLOW, catch_up_s=86400.0)
        desk.clock.advance(HOUR + 5 * 3600 - desk.clock.now())
        desk.tick()
        assert len(tasks(desk)) == 2

    def test_a_store_that_cannot_say_is_asked_again(self) -> None:
        def away() -> Any:
            raise StoreUnavailable("away", 5)

        key = _changed(self.KEY, quota=1)
        refusal = KeyAuthority(lambda: [key], away).refusal(a_schedule(key_sha256="aa"), T0, 0)
        assert refusal is not None
        assert refusal.passes

    def test_a_schedule_whose_key_was_revoked_misses_its_instants(self, desk: Desk) -> None:
        gone = _changed(self.KEY, revoked_at=T0)
        desk.authority = KeyAuthority(lambda: [gone], MemoryTaskStore().reader)
        desk.restart()
        create(desk, key_sha256="aa")
        until(desk, HOUR + 3600)
        assert not tasks(desk)
        assert of(desk).missed == 2
        assert audit(desk)[-1] == ("schedule.held_up", "nightly", "key_revoked")

        desk.authority = KeyAuthority(
            lambda: [_changed(self.KEY, sha256="bb")], MemoryTaskStore().reader
        )
        desk.restart()
        _mark(desk, "resume", key_sha256="bb")
        until(desk, HOUR + 7200)
        assert instants(desk) == [HOUR + 7200]


def _changed(key: ApiKey, **changes: Any) -> ApiKey:
    return dataclasses.replace(key, **changes)


# -- what clients ask ------------------------------------------------------------------------------


def _mark(desk: Desk, action: str, **more: Any) -> Schedule:
    order = MarkSchedule(principal="owner", name="nightly", action=action, by="key", **more)
    marked: Schedule = desk.ask(order)
    return marked


def _run(desk: Desk, task_id: str = "task-1", key: str | None = None) -> Any:
    order = RunSchedule(
        principal="owner", name="nightly", task_id=task_id, idempotency_key=key, by="key"
    )
    return desk.ask(order)


def test_to_create_the_same_again_is_harmless_and_another_one_is_refused(desk: Desk) -> None:
    created = create(desk)
    desk.clock.advance(5)
    assert create(desk) == created
    with pytest.raises(ScheduleExists):
        create(desk, cron="5 * * * *")
    assert create(desk, cron="5 * * * *", principal="alice").principal == "alice"
    assert audit(desk) == [
        ("schedule.create", "owner/nightly", "done"),
        ("schedule.create", "alice/nightly", "done"),
    ]


def test_there_are_only_so_many() -> None:
    desk = Desk(schedules_max=3, schedules_of_one_max=2)
    orders = [PutSchedule(schedule=a_schedule(f"s{n}"), new=True, by="owner") for n in range(3)]
    *good, refused = desk.apply(*orders)
    assert all(isinstance(one, Schedule) for one in good)
    assert isinstance(refused, TooManySchedules)
    assert "schedules_of_one_max" in str(refused)
    create(desk, principal="alice")
    with pytest.raises(TooManySchedules, match="schedules_max"):
        create(desk, principal="bob")
    create(desk, "s1")  # The same again.


def test_a_change_needs_something_to_change(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.ask(PutSchedule(schedule=a_schedule(), new=False, by="owner"))
    for action in ("pause", "resume", "delete"):
        with pytest.raises(NotFound):
            _mark(desk, action)
    with pytest.raises(NotFound):
        _run(desk)


def test_what_is_paused_does_nothing_until_it_is_resumed(desk: Desk) -> None:
    create(desk)
    assert _mark(desk, "pause").paused
    until(desk, HOUR + 1800)
    assert not tasks(desk)
    assert _mark(desk, "resume").wake_at == HOUR + 3600
    until(desk, HOUR + 3600)
    assert instants(desk) == [HOUR + 3600]


def test_what_is_deleted_is_gone_and_its_tasks_stay(desk: Desk) -> None:
    create(desk)
    until(desk, HOUR)
    assert _mark(desk, "delete").name == "nightly"
    assert desk.store.get_schedule(("owner", "nightly")) is None
    until(desk, HOUR + 3600)
    assert instants(desk) == [HOUR]
    assert audit(desk)[-1][0] == "schedule.delete"


def test_changes_in_one_batch_see_one_another(desk: Desk) -> None:
    put = PutSchedule(schedule=a_schedule(), new=True, by="o")
    delete = MarkSchedule(principal="owner", name="nightly", action="delete", by="o")
    answers = desk.apply(put, delete, delete)
    assert isinstance(answers[0], Schedule)
    assert isinstance(answers[2], NotFound)
    assert desk.store.count_schedules() == 0


class TestRun:
    def test_it_submits_at_once_also_what_is_paused(self, desk: Desk) -> None:
        create(desk)
        _mark(desk, "pause")
        desk.clock.advance(7)
        assert _run(desk) == Accepted("task-1", TaskState.QUEUED)
        (task,) = tasks(desk)
        assert (task.spec.schedule, task.spec.schedule_at) == ("nightly", T0 + 7)
        after = of(desk)
        assert (after.started, after.last_task_id, after.paused) == (1, "task-1", True)
        assert audit(desk)[-1] == ("schedule.run", "owner/nightly", "done")

    def test_the_same_again_is_the_same_task(self, desk: Desk) -> None:
        create(desk)
        _run(desk)
        assert _run(desk) == Accepted("task-1", TaskState.QUEUED)
        assert of(desk).started == 1

    def test_so_it_is_under_an_idempotency_key(self, desk: Desk) -> None:
        create(desk)
        _run(desk, key="k")
        assert _run(desk, "task-2", key="k") == Accepted("task-1", TaskState.QUEUED, True)
        desk.submit(a_spec("other", idempotency_key="j", fingerprint="f", principal="owner"))
        with pytest.raises(HcnaError) as caught:
            _run(desk, "task-3", key="j")
        assert isinstance(caught.value, IdempotencyConflict)
        assert of(desk).started == 1

    @pytest.mark.parametrize("overlap", [Overlap.SKIP, Overlap.QUEUE_ONE])
    def test_not_beside_a_task_that_should_be_alone(self, desk: Desk, overlap: Overlap) -> None:
        create(desk, overlap=overlap)
        _run(desk)
        with pytest.raises(ScheduleBusy):
            _run(desk, "task-2")
        with pytest.raises(ScheduleBusy):
            _run(desk, "task-2", key="new")
        desk.cancel("task-1")
        _run(desk, "task-2")

    def test_it_cancels_the_previous_one_if_that_is_the_policy(self, desk: Desk) -> None:
        create(desk, overlap=Overlap.CANCEL_PREVIOUS)
        _run(desk)
        _run(desk, "task-2")
        assert [task.state for task in tasks(desk)] == [TaskState.CANCELLED, TaskState.QUEUED]

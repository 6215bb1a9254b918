"""What a schedule does at an instant, by overlap policy, window and what its tasks meet."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hcna_ray.core import schedules
from hcna_ray.core.schedules import (
    CATCH_UP_MAX,
    COUNTED_MAX,
    OFFER_AGAIN_S,
    Choice,
    Look,
    Overlap,
    Schedule,
)
from tests.support.builders import T0, a_schedule


class Every:
    """An instant every so many seconds from `T0` on, until an end."""

    def __init__(self, seconds: float = 60.0, until: float = float("inf")) -> None:
        self._seconds, self._until = seconds, until

    def after(self, at: float) -> float | None:
        number = max(0.0, (at - T0) // self._seconds + 1)
        found = T0 + number * self._seconds
        return found if found <= self._until else None


MINUTE = Every()


def run(
    schedule: Schedule,
    now: float,
    *,
    running: bool = False,
    recurrence: Every = MINUTE,
    refuse: int = -1,
) -> tuple[Schedule, list[float]]:
    """Look at a schedule and let every task be accepted, but for one that is refused for good.

    Returns:
        The schedule afterwards, and the instants whose tasks were accepted.
    """
    look = schedules.look(schedule, recurrence, now)
    submitted: list[float] = []
    while (choice := schedules.choose(look, running=running, now=now)).submit is not None:
        if len(submitted) == refuse:
            look, refuse = schedules.missed(choice, "out_of_scope", "no", now), -1
            continue
        submitted.append(choice.submit)
        look = schedules.started(choice, f"task-{choice.submit}")
        running = True
    return schedules.settle(choice.look), submitted


def counts(schedule: Schedule) -> tuple[int, int, int]:
    return schedule.started, schedule.skipped, schedule.missed


def test_an_instant_gets_its_task_and_the_next_one_is_waited_for() -> None:
    after, submitted = run(a_schedule(), T0 + 60.2)

    assert submitted == [T0 + 60]
    assert (after.decided_until, after.wake_at) == (T0 + 60, T0 + 120)
    assert (after.last_task_id, after.last_at) == (f"task-{T0 + 60}", T0 + 60)
    assert counts(after) == (1, 0, 0)
    assert run(after, T0 + 60.3) == (after, [])


def test_before_the_first_instant_nothing_happens() -> None:
    after, submitted = run(a_schedule(), T0 + 59)
    assert not submitted
    assert after == a_schedule(wake_at=T0 + 60)


def test_a_clock_that_is_put_back_runs_nothing_again() -> None:
    after, _ = run(a_schedule(), T0 + 120)
    again, submitted = run(after, T0 + 61)
    assert not submitted
    assert again == after
    assert run(again, T0 + 180)[1] == [T0 + 180]


class TestOverlap:
    def test_skip_wants_no_task_while_the_last_one_has_not_ended(self) -> None:
        after, submitted = run(a_schedule(last_task_id="t1"), T0 + 180, running=True)
        assert not submitted
        assert counts(after) == (0, 3, 0)
        assert (after.decided_until, after.wake_at) == (T0 + 180, T0 + 240)
        assert after.reason == ("previous_running", "task t1 had not ended", T0 + 180)

    def test_skip_starts_the_oldest_of_several(self) -> None:
        after, submitted = run(a_schedule(), T0 + 180)
        assert submitted == [T0 + 60]
        assert counts(after) == (1, 2, 0)

    def test_queue_one_keeps_one_until_the_last_has_ended(self) -> None:
        schedule = a_schedule(overlap=Overlap.QUEUE_ONE)
        waiting, submitted = run(schedule, T0 + 180, running=True)
        assert not submitted
        assert (waiting.waiting_at, waiting.decided_until) == (T0 + 60, T0 + 180)
        assert counts(waiting) == (0, 2, 0)

        still, submitted = run(waiting, T0 + 240, running=True)
        assert not submitted
        assert (still.waiting_at, counts(still)) == (T0 + 60, (0, 3, 0))

        # However long it has waited; and what is due now waits in its place.
        after, submitted = run(still, T0 + 99 * 3600, running=False)
        assert submitted == [T0 + 60]
        assert after.waiting_at == T0 + 98 * 3600
        assert after.started == 1

    def test_allow_starts_each(self) -> None:
        after, submitted = run(a_schedule(overlap=Overlap.ALLOW), T0 + 180, running=True)
        assert submitted == [T0 + 60, T0 + 120, T0 + 180]
        assert counts(after) == (3, 0, 0)

    def test_cancel_previous_starts_the_newest(self) -> None:
        schedule = a_schedule(overlap=Overlap.CANCEL_PREVIOUS)
        after, submitted = run(schedule, T0 + 180, running=True)
        assert submitted == [T0 + 180]
        assert counts(after) == (1, 2, 0)
        assert after.reason is not None
        assert after.reason.code == "superseded"
        assert run(after, T0 + 240, running=True)[1] == [T0 + 240]


class TestWindow:
    def test_what_is_older_is_missed_and_what_is_not_is_made_up_for(self) -> None:
        schedule = a_schedule(overlap=Overlap.ALLOW, catch_up_s=120.0)
        after, submitted = run(schedule, T0 + 600)
        assert submitted == [T0 + 480, T0 + 540, T0 + 600]
        assert counts(after) == (3, 0, 7)
        assert after.reason is not None
        assert after.reason.code == "too_late"

    def test_if_all_is_too_old_all_is_missed(self) -> None:
        after, submitted = run(a_schedule(catch_up_s=10.0), T0 + 119)
        assert not submitted
        assert counts(after) == (0, 0, 1)
        assert (after.decided_until, after.wake_at) == (T0 + 109, T0 + 120)
        assert run(after, T0 + 119)[0] == after

    def test_of_very_many_the_newest_are_made_up_for(self) -> None:
        schedule = a_schedule(overlap=Overlap.ALLOW, catch_up_s=7 * 86400.0)
        after, submitted = run(schedule, T0 + 60 * 250)
        assert submitted == [T0 + 60 * (151 + n) for n in range(CATCH_UP_MAX)]
        assert counts(after) == (100, 0, 150)

    def test_of_a_very_long_absence_so_many_are_counted(self) -> None:
        after, submitted = run(a_schedule(catch_up_s=60.0), T0 + 365 * 86400)
        assert submitted == [T0 + 365 * 86400 - 60]
        assert after.missed == COUNTED_MAX

    def test_the_last_instant_of_all_leaves_nothing_to_wait_for(self) -> None:
        after, submitted = run(a_schedule(), T0 + 60, recurrence=Every(until=T0 + 60))
        assert submitted == [T0 + 60]
        assert after.wake_at is None


class TestRefusal:
    def test_one_for_good_is_a_miss_and_the_next_instant_has_its_turn(self) -> None:
        after, submitted = run(a_schedule(overlap=Overlap.ALLOW), T0 + 180, refuse=1)
        assert submitted == [T0 + 60, T0 + 180]
        assert counts(after) == (2, 0, 1)
        assert after.reason == ("out_of_scope", "no", T0 + 180)

    def test_one_for_now_is_offered_again_within_the_window(self) -> None:
        look = schedules.look(a_schedule(catch_up_s=60.0), MINUTE, T0 + 61)
        choice = schedules.choose(look, running=False, now=T0 + 61)
        assert schedules.worth_waiting(choice, T0 + 61)
        assert not schedules.worth_waiting(choice, T0 + 111)

        waits = schedules.put_off(choice, "queue_full", "full", T0 + 61)
        assert waits.wake_at == T0 + 61 + OFFER_AGAIN_S
        assert counts(waits) == (0, 0, 0)
        assert run(waits, T0 + 71)[1] == [T0 + 60]
        # Longer than that it does not wait.
        assert counts(run(waits, T0 + 121)[0]) == (1, 0, 1)

    def test_one_that_waited_for_the_last_task_is_missed_alone(self) -> None:
        schedule = a_schedule(overlap=Overlap.QUEUE_ONE, waiting_at=T0 - 60)
        after, submitted = run(schedule, T0 + 60, refuse=0)
        assert submitted == [T0 + 60]
        assert (after.waiting_at, counts(after)) == (None, (1, 0, 1))

    def test_an_instant_that_has_its_task_already_counts_for_nothing(self) -> None:
        look = schedules.look(a_schedule(), MINUTE, T0 + 60)
        left = schedules.known(schedules.choose(look, running=False, now=T0 + 60))
        assert left == Look(a_schedule(decided_until=T0 + 60), (), T0 + 120)


class TestPause:
    def test_a_paused_schedule_has_no_instants(self) -> None:
        waiting = a_schedule(overlap=Overlap.QUEUE_ONE, waiting_at=T0, wake_at=T0 + 60)
        paused = schedules.pause(waiting, T0 + 30)
        assert (paused.wake_at, paused.waiting_at, paused.skipped) == (None, None, 1)
        assert paused.decided_until == T0
        assert run(paused, T0 + 60)[0].wake_at is None
        assert schedules.pause(a_schedule(), T0 + 30).skipped == 0

        going = schedules.resume(paused, MINUTE, T0 + 3601)
        assert (going.paused, going.wake_at) == (False, T0 + 3660)
        assert run(going, T0 + 3660)[1] == [T0 + 3660]

    def test_to_resume_one_that_is_not_paused_leaves_its_instants(self) -> None:
        going = schedules.resume(a_schedule(), MINUTE, T0 + 180)
        assert going.decided_until == T0

    def test_a_resume_under_a_clock_that_was_put_back_runs_nothing_again(self) -> None:
        after, _ = run(a_schedule(), T0 + 600)
        again = schedules.resume(schedules.pause(after, T0 + 601), MINUTE, T0 + 60)
        assert again.decided_until == T0 + 600


class TestChange:
    def test_the_same_request_is_told_from_another_one(self) -> None:
        one = a_schedule()
        assert schedules.alike(one, a_schedule(started=3, decided_until=T0 + 9, created_at=T0 + 9))
        for change in (
            {"cron": "1 * * * *"},
            {"timezone": "Europe/Berlin"},
            {"task": b'{"task_type": "sleep"}'},
            {"overlap": Overlap.ALLOW},
            {"catch_up_s": 60.0},
            {"paused": True},
        ):
            assert not schedules.alike(one, a_schedule(**change))

    def test_counts_go_on_and_instants_begin_anew(self) -> None:
        before = a_schedule(
            overlap=Overlap.QUEUE_ONE, waiting_at=T0, started=1, skipped=2, missed=3, last_at=T0
        )
        asked = a_schedule(overlap=Overlap.QUEUE_ONE, created_at=T0 + 99, decided_until=T0 + 99)
        after = schedules.changed(before, asked)
        assert counts(after) == (1, 2, 3)
        assert (after.created_at, after.decided_until) == (T0, T0 + 99)
        assert (after.waiting_at, after.last_at) == (T0, T0)
        for other in (asked.evolve(overlap=Overlap.SKIP), asked.evolve(paused=True)):
            assert schedules.changed(before, other).waiting_at is None


events = st.lists(
    st.one_of(
        st.tuples(st.just("look"), st.floats(-500, 5000)),
        st.tuples(st.just("refuse"), st.floats(0, 500)),
        st.tuples(st.just("end"), st.just(0.0)),
        st.tuples(st.just("pause"), st.just(0.0)),
        st.tuples(st.just("resume"), st.just(0.0)),
    ),
    max_size=30,
)


@given(
    overlap=st.sampled_from(Overlap),
    catch_up_s=st.floats(10, 2000),
    every_s=st.sampled_from([7.0, 60.0, 1000.0]),
    happens=events,
)
def test_no_instant_twice_none_outside_the_window_and_never_back(
    overlap: Overlap, catch_up_s: float, every_s: float, happens: list[tuple[str, float]]
) -> None:
    recurrence, now, running = Every(every_s), T0, False
    schedule = a_schedule(overlap=overlap, catch_up_s=catch_up_s)
    given_tasks: list[float] = []
    for name, by_s in happens:
        now += by_s
        before = schedule
        if name == "end":
            running = False
        elif name == "pause":
            schedule = schedules.pause(schedule, now)
        elif name == "resume":
            schedule = schedules.resume(schedule, recurrence, now)
        elif not schedule.paused:
            schedule, running = _look(schedule, recurrence, now, running, name, given_tasks)
            assert schedule.wake_at is not None
            assert schedule.wake_at > now or schedule.wake_at > schedule.decided_until
        assert schedule.decided_until >= before.decided_until
        assert all(new >= old for new, old in zip(counts(schedule), counts(before), strict=True))
    assert len(given_tasks) == len(set(given_tasks)) == schedule.started
    assert given_tasks == sorted(given_tasks)


def _look(
    schedule: Schedule,
    recurrence: Every,
    now: float,
    running: bool,
    name: str,
    given_tasks: list[float],
) -> tuple[Schedule, bool]:
    """Look once; with ``refuse`` every task is refused for now."""
    look = schedules.look(schedule, recurrence, now)
    while True:
        choice: Choice = schedules.choose(look, running=running, now=now)
        if choice.submit is None:
            return schedules.settle(choice.look), running
        if name == "refuse" and schedules.worth_waiting(choice, now):
            return schedules.put_off(choice, "queue_full", "full", now), running
        if name == "refuse":
            look = schedules.missed(choice, "queue_full", "full", now)
            continue
        if choice.submit != choice.look.schedule.waiting_at:
            assert now - schedule.catch_up_s <= choice.submit <= now
            assert not running or schedule.overlap in (Overlap.ALLOW, Overlap.CANCEL_PREVIOUS)
        given_tasks.append(choice.submit)
        look, running = schedules.started(choice, "t"), True


def test_a_schedule_is_known_by_whose_it_is_and_its_name() -> None:
    one = a_schedule(principal="ann", name="nightly")

    assert one.key == ("ann", "nightly")
    assert one.evolve(paused=True).key == one.key
    assert a_schedule(principal="bob", name="nightly").key != one.key

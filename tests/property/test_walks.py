"""The walks and the search see what is broken on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from hcna_ray.core import machine
from hcna_ray.core.clock import ClockHold
from hcna_ray.core.events import TimePassed
from hcna_ray.core.models import LaneKey, Task, TaskState
from hcna_ray.runtime.clockwatch import ClockWatch
from hcna_ray.runtime.dispatcher import Dispatcher
from hcna_ray.runtime.intake import Intake
from hcna_ray.runtime.ledger import Ledger
from hcna_ray.runtime.messages import ReportKind
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.sessions import Sessions
from hcna_ray.runtime.turn import Turn
from hcna_ray.store.base import TaskStore
from hcna_ray.store.memory import MemoryTaskStore
from tests.property.crew import Member, Worker
from tests.property.office_walk import OfficeTally, OfficeWorld
from tests.property.office_walk import walk as walk_the_office
from tests.property.offices import Disagreement, SqliteHome, sequence
from tests.property.search import Rules, Search, begin, queue_again
from tests.property.walk import walk

# -- the pure rules --------------------------------------------------------------------------------


def no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any report about a task that holds a lease counts, whatever its token."""
    monkeypatch.setattr(machine, "_holds", lambda task, token: task.lease is not None)


def test_the_walk_is_clean_and_repeats_itself() -> None:
    one, other = walk(5, 3000), walk(5, 3000)

    assert one.violations == []
    assert (one.tally.steps, one.tally.moves) == (other.tally.steps, other.tally.moves)


def test_the_walk_sees_a_lost_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    no_fence(monkeypatch)

    (violation,) = walk(5, 20_000).violations

    assert "G3 a stale report changes nothing" in violation
    assert "python -m tests.property.walk" in violation


# -- a whole moderator -----------------------------------------------------------------------------


def front_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer overtakes a line whose front ends in its batch."""

    def shortsighted(self: Turn, store: TaskStore, key: str) -> list[Task]:
        found = {
            task.id: task
            for task in self.ledger.changed()
            if task.spec.ordering_key == key and not task.terminal
        }
        line = store.ordering_line(key, 2)
        self.ledger.adopt(line)
        for stored in line:
            task = self.ledger.get(stored.id)
            if task is not None and not task.terminal:
                found[task.id] = task
        return sorted(found.values(), key=lambda task: task.seq)

    monkeypatch.setattr(Turn, "ordering_line", shortsighted)


def double_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idempotency key is forgotten."""
    monkeypatch.setattr(Intake, "_same_key", lambda *arguments: None)


def one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue takes one task more than it may."""
    check = Intake._check_room
    monkeypatch.setattr(
        Intake, "_check_room", lambda self, tasks, stored: check(self, tasks - 1, stored)
    )


def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is given to another before its holder has stopped."""
    begin = Sessions.__init__

    def hasty(self: Sessions, *, suspect_s: float, ttl_s: float, gone_s: float) -> None:
        begin(self, suspect_s=suspect_s, ttl_s=13.0, gone_s=gone_s)

    monkeypatch.setattr(Sessions, "__init__", hasty)


def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended is not counted."""
    record = Ledger._record

    def silently(self: Ledger, step: machine.Step) -> None:
        before = dict(self.counts)
        record(self, step)
        if step.task.terminal:
            self.counts.clear()
            self.counts.update(before)

    monkeypatch.setattr(Ledger, "_record", silently)


def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A concurrency key has no limit."""
    monkeypatch.setattr(Dispatcher, "_limit", lambda self, key: 99)


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what the wall clock shows for time that has passed in a queue."""
    monkeypatch.setattr(ClockWatch, "owed", lambda self, task: 0.0)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what the wall clock shows for the age of what has ended."""
    monkeypatch.setattr(ClockHold, "cutoff", lambda self, now, age_s: now - age_s)


class Mumbler(Worker):
    """The word of a start alone never arrives."""

    def report(self, member: Member) -> None:
        if any(one.kind != ReportKind.STARTED for one in member.outbox):
            super().report(member)


def test_a_start_of_which_only_heartbeats_tell_is_known() -> None:
    assert walk_the_office(2, 4000, Mumbler).violations == []


def test_the_moderator_is_clean_and_repeats_itself() -> None:
    one, other = walk_the_office(3, 1000), walk_the_office(3, 1000)

    assert one.violations == []
    assert one.seen == other.seen


@pytest.mark.parametrize(
    ("bug", "promise"),
    [
        (no_fence, "C"),
        (front_of_the_line, "C9"),
        (double_keys, "C3 one key, one task"),
        (one_too_many, "C10 the queue's bound"),
        (no_grace, "C7 one task runs in two places"),
        (uncounted, "C11 counters"),
        (crowded, "concurrency limit"),
        (impatient, "nothing gives up before its time"),
        (forgetful, "a clock that was put makes nothing old"),
    ],
)
def test_the_judge_sees_a_seeded_bug(
    bug: Callable[[pytest.MonkeyPatch], None], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)

    (violation,) = walk_the_office(1, 40_000).violations

    assert promise in violation


@pytest.mark.parametrize(
    "seed",
    [
        # A repeated answer granted what was being taken back, in the same batch and before.
        239493461176445,
        3918541985969,
        # A repeated answer to a worker whose leases end with its batch.
        138768120681038,
        # It began on the worker for which it waited, died there, and went on elsewhere.
        264523107692700,
        # Withdrawn; stuck.
        116730527723184,
        168359774171651,
    ],
)
def test_a_world_that_once_went_wrong_is_clean(seed: int) -> None:
    OfficeWorld(seed, OfficeTally()).walk()


# -- several stores --------------------------------------------------------------------------------


def test_two_stores_that_differ_are_seen(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(self: MemoryTaskStore, lane: LaneKey, limit: int) -> list[Task]:
        return self._named(self._ready.lists.get(lane, [])[-limit:])

    home = SqliteHome(tmp_path)
    sequence(1, [home], OfficeTally())
    monkeypatch.setattr(MemoryTaskStore, "heads", backwards)

    def until_they_differ() -> None:
        for seed in range(200):
            sequence(seed, [home], OfficeTally())

    with pytest.raises(Disagreement):
        until_they_differ()
    home.close()


# -- all states ------------------------------------------------------------------------------------


def hasty(policy: Policy) -> Policy:
    """Lease again as soon as a worker would begin to stop."""
    return dataclasses.replace(policy, lease_ttl_s=15.0, lease_grace_s=0.0)


def test_all_states_without_faults_are_good() -> None:
    found = Search(Rules()).run(begin(cuts=0, pauses=0, crashes=0, cancels=0))

    assert found.violation == ""
    assert found.states > 500
    assert found.ends


def test_a_search_sees_a_lost_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    no_fence(monkeypatch)

    found = Search(Rules()).run(begin(pauses=0, cancels=0, crashes=0))

    assert "is in force" in found.violation
    assert found.path


def test_a_search_sees_a_lease_given_again_too_early() -> None:
    found = Search(Rules(policy=hasty(Policy()))).run(begin(pauses=0, cancels=0, crashes=0))

    assert "runs on W0 as 1.1 and starts on W1 as 1.2" in found.violation


def test_a_search_sees_a_recovery_that_queues_what_had_ended() -> None:
    def recover(task: Task) -> Task:
        return queue_again(task) if task.state is TaskState.COMPLETED else task

    found = Search(Rules(recover=recover)).run(begin(cuts=0, pauses=0, cancels=0))

    assert "a finished task moved" in found.violation


def test_a_search_sees_an_answer_that_comes_too_late() -> None:
    found = Search(Rules(gives_up_calls=False)).run(begin(pauses=0, cancels=0, crashes=0))

    assert "starts on W" in found.violation


def test_a_search_sees_a_dead_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignore(task: Task, event: object) -> machine.Step:
        return machine.Step(task, changed=False)

    monkeypatch.setitem(machine.TRANSITIONS, (TaskState.SCHEDULED, TimePassed), ignore)

    found = Search(Rules()).run(begin(cuts=0, pauses=0, crashes=0, cancels=0))

    assert found.violation == "no end can be reached"

"""What the values say about themselves. How tasks move is in test_machine.py."""

from __future__ import annotations

import dataclasses

import pytest

from hcna_ray.core.models import Needs, TaskSpec, TaskState, Token
from tests.unit.core.builders import a_queued_task, a_running_task, a_spec, a_worker


def test_tokens_are_ordered_by_generation_first() -> None:
    assert Token(1, 9) < Token(2, 1) < Token(2, 2)
    assert str(Token(2, 1)) == "2.1"


@pytest.mark.parametrize(
    ("needs", "heavy"),
    [
        (Needs(), False),
        (Needs(worker="W1", labels=(("zone", "attic"),)), False),
        (Needs(cpu=0.5), True),
        (Needs(mem_gb=1.0), True),
        (Needs(gpu=1.0), True),
        (Needs(resources=(("scratch", 1.0),)), True),
        (Needs(isolated=True), True),
    ],
)
def test_asking_for_amounts_or_isolation_makes_a_task_heavy(needs: Needs, heavy: bool) -> None:
    assert needs.heavy is heavy


def test_the_bytes_of_a_task_count_with_a_share_for_the_row() -> None:
    plain = TaskSpec(id="t1", task_type="echo", payload=b"12345")

    assert plain.bytes_stored == 517
    assert dataclasses.replace(plain, metadata=b"{}").bytes_stored == 519


def test_a_task_evolves_in_its_fields_alone() -> None:
    task = a_queued_task()

    assert task.evolve(attempt=3) == dataclasses.replace(task, attempt=3)
    assert task.attempt == 0
    with pytest.raises(AssertionError, match="atempt"):
        task.evolve(atempt=3)


def test_a_task_needs_what_its_spec_says_unless_it_waits_for_a_worker() -> None:
    anywhere, pinned = a_queued_task(), a_queued_task(needs=Needs(worker="W2"))

    assert anywhere.needs is anywhere.spec.needs
    assert anywhere.evolve(pinned_to="W1").needs == Needs(worker="W1")
    assert pinned.evolve(pinned_to="W1").needs == Needs(worker="W2")


def test_the_earliest_of_all_timers_wakes_a_task() -> None:
    task = a_queued_task(expires_at=1500.0, queue_timeout_s=100.0)

    assert task.wake_at == 1100.0
    assert task.evolve(pinned_to="W1", pinned_until=1050.0).wake_at == 1050.0
    assert task.evolve(queued_at=None).wake_at == 1500.0
    assert task.evolve(state=TaskState.CANCELLED).wake_at is None


def test_a_running_task_wakes_for_its_run_timeout_alone() -> None:
    assert a_running_task(expires_at=1001.0, timeout_s=60.0).wake_at == 1090.0


def test_a_task_knows_its_id() -> None:
    assert a_queued_task(id="t9").id == a_spec(id="t9").id == "t9"


def test_a_worker_knows_what_is_free() -> None:
    worker = a_worker(
        gpu=1.0,
        resources=(("scratch", 5.0),),
        used=Needs(cpu=1.5, resources=(("scratch", 2.0),)),
    )

    free = {name: worker.free(name) for name in ("cpu", "mem_gb", "gpu", "scratch", "tape")}

    assert free == {"cpu": 2.5, "mem_gb": 8.0, "gpu": 1.0, "scratch": 3.0, "tape": 0.0}

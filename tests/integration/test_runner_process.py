"""Real slot processes, a real agent and a real moderator, no Ray: interrupts and sudden deaths."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from hcna_ray.core.models import FailureKind, Outcome, TaskState
from hcna_ray.runtime import agent as agent_module
from hcna_ray.runtime.journal import process_birth
from hcna_ray.runtime.messages import ReportKind
from tests.support.paper_worker import Desk
from tests.support.workshop import Workshop

KILLS = 200


@pytest.fixture
def home() -> Iterator[Path]:
    # A socket's address is short, pytest's own folders are not.
    with tempfile.TemporaryDirectory(prefix="hcna-r-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture
async def shop(home: Path) -> AsyncIterator[Workshop]:
    async with Workshop(home, Desk()).open() as shop:
        yield shop


def outcomes(shop: Workshop, task_id: str) -> list[Outcome | None]:
    return [attempt.outcome for attempt in shop.desk.store.reader().attempts(task_id)]


async def test_tasks_run_in_slots_and_end(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.desk.submit_ids(*(f"t{n}" for n in range(50)), task_type="effect")
    await shop.ended(*(f"t{n}" for n in range(50)))

    assert {shop.desk.task(f"t{n}").state for n in range(50)} == {TaskState.COMPLETED}
    assert Counter(shop.starts()) == Counter((f"t{n}", 1, 1) for n in range(50))


async def test_a_cancel_interrupts_a_handler_that_sleeps(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.desk.submit_ids("t1", task_type="block")
    await shop.running("t1")

    shop.desk.cancel("t1")
    shop.answer()
    await shop.ended("t1", timeout_s=2.0)

    assert shop.desk.task("t1").state is TaskState.CANCELLED
    assert outcomes(shop, "t1") == [Outcome.CANCELLED]
    # The process that was interrupted serves nobody else; others do.
    shop.desk.submit_ids("t2", task_type="effect")
    shop.answer()
    await shop.ended("t2")


async def test_a_timeout_interrupts_a_handler_that_sleeps(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.desk.submit_ids("t1", task_type="block", timeout_s=0.3)
    await shop.ended("t1", timeout_s=3.0)

    error = shop.desk.task("t1").error
    assert error is not None
    assert error.kind is FailureKind.TIMEOUT
    assert outcomes(shop, "t1") == [Outcome.TIMED_OUT]


async def test_who_does_not_stop_is_killed_with_its_children_and_still_counts_as_cancelled(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "KILL_GRACE_S", 0.3)
    shop.start_agent("a")
    shop.desk.submit_ids("t1", task_type="stubborn")
    await shop.running("t1")
    child = int((shop.home / "t1.child").read_text())
    assert process_birth(child) is not None

    shop.desk.cancel("t1")
    shop.answer()
    await shop.ended("t1", timeout_s=5.0)

    assert shop.desk.task("t1").state is TaskState.CANCELLED
    assert outcomes(shop, "t1") == [Outcome.CANCELLED]
    await shop.until(lambda: process_birth(child) is None)


async def test_what_a_cancelled_handler_left_running_ends_with_its_slot(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.desk.submit_ids("t1", task_type="family")
    await shop.running("t1")
    child = int((shop.home / "t1.child").read_text())

    shop.desk.cancel("t1")
    shop.answer()
    await shop.ended("t1", timeout_s=5.0)

    await shop.until(lambda: process_birth(child) is None)


async def test_a_killed_slot_loses_only_what_it_had_started(shop: Workshop) -> None:
    shop.start_agent("a", base=1)
    # A slot learns that the type is quick, so that the next grant holds many.
    shop.desk.submit_ids("t0", task_type="effect")
    await shop.ended("t0")
    shop.desk.submit_ids("long", task_type="block", priority=9)
    await shop.running("long")
    (name,) = [name for name, pid in shop.pids.items() if _runs(shop, name)]

    os.kill(shop.pids[name], signal.SIGKILL)
    await shop.until(lambda: shop.desk.task("long").losses == 1)

    shop.desk.cancel("long")
    shop.answer()
    await shop.ended("long")
    assert outcomes(shop, "long")[0] is Outcome.LOST


def _runs(shop: Workshop, name: str) -> bool:
    note = agent_module.read_note(agent_module.RunnerFiles(shop.outbox, name))
    return note is not None and bool(note.task_id)


async def test_a_new_agent_ends_what_the_old_one_left_running_and_tells_of_it(
    shop: Workshop,
) -> None:
    shop.start_agent("a", base=1)
    shop.desk.submit_ids("t1", task_type="stubborn")
    await shop.running("t1")
    (name,) = [name for name in shop.pids if _runs(shop, name)]
    old = shop.pids[name]
    await shop.lose_agent()
    assert process_birth(old) is not None

    shop.start_agent("b", base=1)
    await shop.until(lambda: shop.desk.task("t1").losses == 1)

    assert process_birth(old) is None
    await shop.until(lambda: len(shop.starts()) == 2)
    assert [attempt for _, _, attempt in shop.starts()] == [1, 2]
    await shop.until(lambda: not list(shop.outbox.glob("a.*")))


async def test_a_heavy_attempt_runs_in_a_process_of_its_own(shop: Workshop) -> None:
    from hcna_ray.core.models import Needs

    shop.start_agent("a", base=1)
    shop.desk.submit_ids("t1", task_type="effect", needs=Needs(cpu=1.0))
    await shop.ended("t1")

    assert outcomes(shop, "t1") == [Outcome.COMPLETED]
    await shop.until(lambda: not list(shop.outbox.glob("*.heavy.*")))


async def test_a_moderator_that_was_away_gets_every_outcome_once(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.desk.submit_ids(*(f"t{n}" for n in range(40)), task_type="effect")
    await shop.until(lambda: shop.starts())
    shop.away = True
    await asyncio.sleep(0.2)
    shop.desk.restart()
    shop.away = False
    await shop.ended(*(f"t{n}" for n in range(40)))

    assert len(shop.starts()) == len(set(shop.starts())) == 40


async def test_every_start_ends_as_completed_or_lost_whatever_line_a_slot_dies_at(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "RESPAWN_S", 0.005)
    draw = random.Random(20260101)
    # From the first line of a runner to somewhere in its twentieth attempt.
    shop.die_at_line = lambda: draw.randrange(1, 60) if draw.random() < 0.2 else draw.randrange(
        60, 3000
    )
    shop.start_agent("a", base=4, spare=2)
    submitted: list[str] = []

    def deaths() -> int:
        return len(shop.gone)

    while deaths() < KILLS:
        if len(submitted) - len(shop.desk.ended) < 100:
            fresh = [f"t{len(submitted) + n}" for n in range(50)]
            shop.desk.submit_ids(*fresh, task_type="effect", max_losses=100)
            shop.answer()
            submitted += fresh
        await asyncio.sleep(0.02)
    shop.die_at_line = lambda: None
    await shop.ended(*submitted, timeout_s=60.0)

    starts = Counter(shop.starts())
    assert max(starts.values()) == 1, "one token ran twice"
    rows = {
        (task_id, *attempt.token): attempt.outcome
        for task_id in submitted
        for attempt in shop.desk.store.reader().attempts(task_id)
    }
    assert set(rows.values()) == {Outcome.COMPLETED, Outcome.LOST}
    # What has no row never ran, and what completed did run.
    assert set(starts) <= set(rows)
    completed = {name for name, outcome in rows.items() if outcome is Outcome.COMPLETED}
    assert completed <= set(starts)
    # starts = completions + lost: whatever a slot noted as started has exactly one of two ends.
    assert len(rows) == len(completed) + len(rows.keys() - completed)
    assert Counter(task_id for task_id, _, _ in completed) == Counter(submitted)
    # An outcome that reached the journal is never lost.
    journaled = {
        (report.task_id, *report.token)
        for gone in shop.gone
        for report in gone.reports
        if report.kind == ReportKind.COMPLETED
    }
    assert journaled <= completed
    # No task starts again once it has completed.
    last = {task_id: attempt for task_id, _, attempt in sorted(completed)}
    assert all(attempt <= last[task_id] for task_id, _, attempt in starts)

"""Real executors, real hosts, a real agent and moderator, no Ray: interrupts and sudden deaths."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from hcna_ray.config import LimitSettings, Settings
from hcna_ray.core.models import FailureKind, Needs, Outcome, Task, TaskState, Token
from hcna_ray.core.tracing import attempt_span_id
from hcna_ray.observability.traces import Ran, Waited
from hcna_ray.runtime import artifacts
from hcna_ray.runtime import host as host_module
from hcna_ray.runtime.artifacts import ArtifactServer, WorkerArtifacts
from hcna_ray.runtime.journal import RunnerFiles, process_birth, read_note
from hcna_ray.runtime.messages import ReportKind
from hcna_ray.runtime.output import output_file
from tests.support.otlp import spooled
from tests.support.paper_worker import Desk
from tests.support.workshop import OUTPUT_BYTES, Workshop

KILLS = 200


@pytest_asyncio.fixture
async def shop(home: Path) -> AsyncIterator[Workshop]:
    async with Workshop(home, Desk()).open() as shop:
        yield shop


def outcomes(shop: Workshop, task_id: str) -> list[Outcome | None]:
    return [attempt.outcome for attempt in shop.desk.store.reader().attempts(task_id)]


def running_now(shop: Workshop, task_id: str) -> list[int]:
    """Return the processes that say they run a task."""
    names = [path.stem for path in shop.outbox.glob("*.note")]
    notes = [read_note(RunnerFiles(shop.outbox, name)) for name in names]
    return [one.pid for one in notes if one is not None and one.task_id == task_id]


def executor_of(shop: Workshop, task_id: str) -> int:
    """Return the process that runs a task."""
    (pid,) = running_now(shop, task_id)
    return pid


async def test_tasks_run_in_slots_and_end(shop: Workshop) -> None:
    names = [f"t{n}" for n in range(50)]
    shop.start_agent("a", base=2)
    shop.submit(*names, task_type="rig.effect")
    await shop.ended(*names)

    assert {shop.desk.task(name).state for name in names} == {TaskState.COMPLETED}
    assert Counter(shop.starts()) == Counter((name, 1, 1) for name in names)


async def test_a_long_attempt_holds_up_nobody(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.submit("warm", task_type="rig.effect")
    await shop.ended("warm")
    shop.submit("long", task_type="rig.block", priority=9)
    names = [f"t{n}" for n in range(20)]
    shop.submit(*names, task_type="rig.effect")

    await shop.ended(*names, timeout_s=3.0)

    assert shop.desk.task("long").state is TaskState.RUNNING
    assert {outcome for name in names for outcome in outcomes(shop, name)} == {Outcome.COMPLETED}


async def test_what_an_attempt_prints_is_kept_beside_what_others_print(shop: Workshop) -> None:
    shop.start_agent("a")
    for name in ("t1", "t2"):
        shop.submit(name, task_type="rig.print")
        await shop.ended(name)

    for name in ("t1", "t2"):
        kept = output_file(shop.outputs, name, Token(1, 1)).read_text().splitlines()
        assert sorted(kept) == ["an error", "by a child", f"printed by {name}", "written"]


@pytest.mark.parametrize("place", ["m1", "w1"])
async def test_files_are_read_by_tasks_of_whoever_has_them(
    shop: Workshop, home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """On M1's own machine, and where a copy is kept."""
    limits = LimitSettings(disk_free_bytes_min=0)
    m1, w1 = (Settings(home=home / name, limits=limits) for name in ("m1", "w1"))
    server = ArtifactServer(m1, shop.desk.store.reader)

    class Link:
        """Calls M1 as the actor is called."""

        def call(self, method: str, *args: object, timeout_s: float = 0.0) -> object:
            return getattr(server, method)(*args)

    monkeypatch.setattr(artifacts, "ActorLink", lambda _name: Link())
    shop.artifacts = WorkerArtifacts(m1 if place == "m1" else w1)
    shop.start_agent("a")

    async def outcome(name: str, task_type: str, who: str, digest: str = "") -> Task:
        payload = json.dumps({"artifact": digest}).encode()
        shop.submit(name, task_type=task_type, payload=payload, principal=who, confined=True)
        await shop.ended(name)
        return shop.desk.task(name)

    made = json.loads((await outcome("t1", "rig.make", "anna")).result or b"")
    refused = []
    for number, digest in enumerate((made["artifact"], made["other"])):
        task = await outcome(f"b{number}", "rig.read", "ben", digest)
        assert task.error is not None
        assert task.error.type == "ArtifactNotFound"
        refused.append(task.error.message.replace(digest, "N"))
    assert refused[0] == refused[1]
    assert refused[0].startswith("payload.artifact: there is no artifact 'N'")
    for number in range(2):  # The second time from the copy, if there is one.
        task = await outcome(f"a{number}", "rig.read", "anna", made["artifact"])
        assert json.loads(task.result or b"") == {"text": "made here"}
    assert (await outcome("b2", "rig.read", "ben", made["artifact"])).state is TaskState.FAILED
    only = json.dumps({"artifact": made["artifact"]}).encode()
    shop.submit("o1", task_type="rig.read", payload=only, principal="owner")
    await shop.ended("o1")
    assert shop.desk.task("o1").state is TaskState.COMPLETED


async def test_a_flood_is_cut_and_holds_up_nobody(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.submit("flood", task_type="rig.flood")
    await shop.running("flood")
    kept = output_file(shop.outputs, "flood", Token(1, 1))
    await shop.until(lambda: kept.exists() and kept.stat().st_size == OUTPUT_BYTES)

    names = [f"t{n}" for n in range(20)]
    shop.submit(*names, task_type="rig.effect")
    await shop.ended(*names)
    assert shop.desk.task("flood").state is TaskState.RUNNING
    shop.cancel("flood")
    await shop.ended("flood")

    assert kept.stat().st_size == OUTPUT_BYTES
    assert b"cut here" in kept.read_bytes()[-100:]
    assert {path.name for path in shop.outputs.iterdir()} == {kept.name}


async def test_a_cancel_interrupts_a_handler_that_sleeps(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.block")
    await shop.running("t1")
    pid = executor_of(shop, "t1")

    shop.cancel("t1")
    await shop.ended("t1", timeout_s=2.0)

    assert shop.desk.task("t1").state is TaskState.CANCELLED
    assert outcomes(shop, "t1") == [Outcome.CANCELLED]
    # The process that was interrupted serves nobody else; another one does.
    await shop.until(lambda: process_birth(pid) is None)
    shop.submit("t2", task_type="rig.effect")
    await shop.ended("t2", timeout_s=2.0)


async def test_a_cancel_reaches_a_slot_that_is_busy_in_full(shop: Workshop) -> None:
    shop.attempts_max = 2
    shop.start_agent("a")
    shop.submit("t1", "t2", task_type="rig.block")
    await shop.running("t1", "t2")
    await asyncio.sleep(0.2)

    shop.cancel("t2")
    await shop.ended("t2", timeout_s=3.0)

    assert shop.desk.task("t1").state is TaskState.RUNNING


async def test_a_timeout_interrupts_a_handler_that_sleeps(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.block", timeout_s=0.3)
    await shop.ended("t1", timeout_s=5.0)

    error = shop.desk.task("t1").error
    assert error is not None
    assert error.kind is FailureKind.TIMEOUT
    assert outcomes(shop, "t1") == [Outcome.TIMED_OUT]


async def test_who_does_not_stop_is_killed_with_its_children_and_still_counts_as_cancelled(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "KILL_GRACE_S", 0.3)
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.stubborn")
    await shop.running("t1")
    child = int((shop.home / "t1.child").read_text())
    assert process_birth(child) is not None

    shop.cancel("t1")
    await shop.ended("t1", timeout_s=5.0)

    assert outcomes(shop, "t1") == [Outcome.CANCELLED]
    await shop.until(lambda: process_birth(child) is None)


async def test_what_a_cancelled_handler_left_running_ends_with_its_executor(
    shop: Workshop,
) -> None:
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.family")
    await shop.running("t1")
    child = int((shop.home / "t1.child").read_text())

    shop.cancel("t1")
    await shop.ended("t1", timeout_s=5.0)

    await shop.until(lambda: process_birth(child) is None)


async def test_a_handler_that_ends_its_process_is_poison(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.exit", max_losses=2)
    await shop.ended("t1")

    assert outcomes(shop, "t1") == [Outcome.LOST, Outcome.LOST]
    error = shop.desk.task("t1").error
    assert error is not None
    assert error.kind is FailureKind.POISON
    assert "status 3" in error.message


async def test_a_killed_executor_loses_only_what_it_had_started(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.submit("t1", "t2", task_type="rig.block")
    await shop.running("t1", "t2")

    os.kill(executor_of(shop, "t1"), signal.SIGKILL)
    await shop.until(lambda: shop.desk.task("t1").losses == 1)

    assert outcomes(shop, "t1")[0] is Outcome.LOST
    assert outcomes(shop, "t2") == [None]


@pytest.mark.parametrize("whom", ["host", "nursery"])
async def test_a_dead_host_or_nursery_is_replaced_and_what_ran_is_lost(
    shop: Workshop, whom: str
) -> None:
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.block")
    await shop.running("t1")
    pid = executor_of(shop, "t1")
    (host,) = shop.hosts.values()

    if whom == "host":
        host.crash()
    else:
        process = host.nursery._process
        assert process is not None
        process.kill()
    await shop.until(lambda: shop.desk.task("t1").losses == 1)
    await shop.until(lambda: len(shop.starts()) == 2)

    assert process_birth(pid) is None
    # A spare of the dead nursery may have been granted it in between, and gave it back.
    await shop.until(lambda: outcomes(shop, "t1") == [Outcome.LOST, None])


async def test_a_new_agent_ends_what_the_old_one_left_running_and_tells_of_it(
    shop: Workshop,
) -> None:
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.stubborn")
    await shop.running("t1")
    old = executor_of(shop, "t1")
    await shop.lose_agent()
    assert process_birth(old) is not None

    shop.start_agent("b")
    await shop.until(lambda: shop.desk.task("t1").losses >= 1)
    assert process_birth(old) is None

    # The slot that the old agent left may have been quick enough to take the task once more.
    def runs_under_the_new_one() -> bool:
        lease = shop.desk.task("t1").lease
        return lease is not None and lease.incarnation == "b" and lease.started_at is not None

    await shop.until(runs_under_the_new_one)
    *lost, running = outcomes(shop, "t1")
    assert set(lost) == {Outcome.LOST}
    assert running is None
    # Of a start that it could not report nobody knows; that of now is told before it happens.
    await shop.until(lambda: len(shop.starts()) > len(lost))


async def test_a_heavy_attempt_runs_in_a_process_of_its_own(shop: Workshop) -> None:
    shop.start_agent("a")
    shop.submit("t1", task_type="rig.effect", needs=Needs(cpu=1.0))
    await shop.ended("t1")

    assert outcomes(shop, "t1") == [Outcome.COMPLETED]
    await shop.until(lambda: not list(shop.outbox.glob("*.heavy.*")))


async def test_a_heavy_attempt_cancelled_while_its_process_starts_never_starts(
    shop: Workshop,
) -> None:
    shop.start_agent("a")
    await shop.until(lambda: shop.desk.workers().get("W1"))
    shop.submit("t1", task_type="rig.block", needs=Needs(cpu=1.0))
    await shop.until(lambda: any(".heavy." in name for name in shop.hosts))

    shop.cancel("t1")
    await shop.ended("t1", timeout_s=10.0)

    assert shop.desk.task("t1").state is TaskState.CANCELLED
    assert shop.starts() == []


async def test_a_moderator_that_was_away_gets_every_outcome_once(shop: Workshop) -> None:
    names = [f"t{n}" for n in range(210)]
    shop.start_agent("a", base=2)
    for turn in range(3):
        seen = len(shop.starts())
        # Anew each time: one grant takes all that there is, and runs on while nobody answers.
        shop.submit(*names[turn::3], task_type="rig.effect")
        await shop.until(lambda seen=seen: len(shop.starts()) > seen)  # type: ignore[misc]
        shop.away = True
        await asyncio.sleep(0.15)
        shop.restart_moderator()
        shop.away = False
    await shop.ended(*names)

    assert len(shop.starts()) == len(set(shop.starts())) == len(names)


async def test_a_worker_that_is_cut_off_stops_itself_and_comes_back(shop: Workshop) -> None:
    shop.start_agent("a", self_stop_s=0.8, heartbeat_s=0.2)
    shop.submit("t1", task_type="rig.block")
    await shop.running("t1")

    shop.away = True
    await shop.until(lambda: not running_now(shop, "t1"), timeout_s=4.0)
    assert shop.desk.task("t1").state is TaskState.RUNNING  # Nobody could tell.
    shop.away = False

    await shop.until(lambda: len(shop.starts()) == 2)
    assert outcomes(shop, "t1")[0] is Outcome.LOST
    shop.submit("t2", task_type="rig.effect")
    await shop.ended("t2")


async def test_every_start_ends_as_completed_or_lost_whatever_line_an_executor_dies_at(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "REFORK_S", 0.01)
    deaths: list[int] = []
    on_exit = host_module.SlotHost._on_exit

    def counted(host: host_module.SlotHost, pid: int, status: int) -> None:
        deaths.append(status)
        on_exit(host, pid, status)

    monkeypatch.setattr(host_module.SlotHost, "_on_exit", counted)
    # From the first line of an executor to somewhere behind its twentieth attempt.
    (shop.home / "die").write_text(json.dumps([1, 3000]))
    shop.start_agent("a", base=2)
    submitted: list[str] = []
    async with asyncio.timeout(60.0):
        while len(deaths) < KILLS:
            if len(submitted) - len(shop.desk.ended) < 100:
                fresh = [f"t{len(submitted) + n}" for n in range(50)]
                shop.submit(*fresh, task_type="rig.effect", max_losses=100)
                submitted += fresh
            await asyncio.sleep(0.01)
    (shop.home / "die").unlink()
    await shop.ended(*submitted, timeout_s=60.0)

    assert set(deaths) == {signal.SIGKILL}
    starts = Counter(shop.starts())
    assert max(starts.values()) == 1, "one token ran twice"
    rows = {
        (task_id, *attempt.token): attempt.outcome
        for task_id in submitted
        for attempt in shop.desk.store.reader().attempts(task_id)
    }
    # starts = completions + lost: whatever was noted as started has one of exactly two ends.
    assert set(rows.values()) == {Outcome.COMPLETED, Outcome.LOST}
    completed = {name for name, outcome in rows.items() if outcome is Outcome.COMPLETED}
    # What has no row never ran; what completed did run, once; and nothing ran after that.
    assert completed <= set(starts) <= set(rows)
    assert Counter(task_id for task_id, _, _ in completed) == Counter(submitted)
    last = {task_id: attempt for task_id, _, attempt in completed}
    assert all(attempt <= last[task_id] for task_id, _, attempt in rows)
    # An outcome that reached the journal of a process that died is never lost.
    told = {
        (report.task_id, *report.token)
        for reports in shop.reported
        for report in reports
        if report.kind == ReportKind.COMPLETED
    }
    assert told <= completed


# -- traces ----------------------------------------------------------------------------------------


async def test_every_attempt_has_one_span_however_it_ended(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own process tells of it, or else the moderator has it to tell; never both, never none."""
    monkeypatch.setattr(host_module, "KILL_GRACE_S", 0.5)
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    workshop = Workshop(home, Desk(traced=True))
    workshop.traced = True
    async with workshop.open() as shop:
        shop.start_agent("a")
        shop.submit("light", task_type="rig.effect", traceparent=trace)
        heavy = Needs(cpu=1.0)
        shop.submit("heavy", task_type="rig.effect", traceparent=trace, needs=heavy)
        await shop.ended("light", "heavy")
        # It ends the process that has just run another one.
        shop.submit("dies", task_type="rig.exit", traceparent=trace, max_losses=2)
        shop.submit("obeys", task_type="rig.block", traceparent=trace)
        shop.submit("defies", task_type="rig.stubborn", traceparent=trace)
        await shop.ended("dies")
        await shop.running("obeys", "defies")
        shop.cancel("obeys")
        shop.cancel("defies")
        await shop.ended("obeys", "defies")
        attempts = [
            (one.task_id, attempt_span_id(one.task_id, one.token), str(one.outcome))
            for task in ("light", "heavy", "dies", "obeys", "defies")
            for one in shop.desk.store.reader().attempts(task)
        ]
        await shop.until(lambda: len(spooled(home / "traces")) == 3)

    def of_notes() -> Iterator[tuple[str, str, str]]:
        for note in shop.desk.notes:
            if isinstance(note, Ran):
                yield note.task_id, attempt_span_id(note.task_id, note.token), note.outcome

    written = [
        (
            str(one.attributes["messaging.message.id"]),
            one.span_id,
            str(one.attributes["hcna.outcome"]),
        )
        for one in spooled(home / "traces")
    ]
    assert {name for name, _, _ in written} == {"light", "heavy", "obeys"}
    assert sorted([*written, *of_notes()]) == sorted(attempts)
    assert len(attempts) == 6
    waits = [note for note in shop.desk.notes if isinstance(note, Waited)]
    assert len(waits) == 6


async def test_a_handlers_own_spans_lie_below_its_attempt(home: Path) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    workshop = Workshop(home, Desk(traced=True))
    workshop.traced = True
    async with workshop.open() as shop:
        shop.start_agent("a")
        shop.submit("t1", task_type="rig.traced", traceparent=trace)
        await shop.ended("t1")
        await shop.until(lambda: len(spooled(home / "traces")) == 2)

    found = {one.name: one for one in spooled(home / "traces")}
    ran, step = found["run rig.traced"], found["a step"]
    assert (ran.trace_id, ran.parent_id) == tuple(trace.split("-")[1:3])
    assert (step.trace_id, step.parent_id) == (ran.trace_id, ran.span_id)
    assert step.resource == ran.resource
    result = json.loads(shop.desk.task("t1").result or b"")
    assert result["traceparent"] == f"00-{ran.trace_id}-{ran.span_id}-01"

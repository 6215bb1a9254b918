"""Tasks that ask for a share of a machine: each has a process of its own, which ends when told."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import psutil
import pytest

from hcna_ray.client import Client, Requires, TaskCancelled, TaskFailed, TaskHandle, TaskRequest
from tests.integration.conftest import Cluster, paused
from tests.support import figures, live
from tests.support.live import eventually
from tests.support.side_effects import TASK_TYPE, Mark, SideEffects

#: Longest time from a cancel or timeout to the end of the process.
STOP_S = 15.0
#: More than any machine of the tests has, and how the reason puts it.
NEEDS: dict[str, tuple[Requires, str]] = {"cpu": ({"cpu": 99}, "99"), "gpu": ({"gpu": 1}, "1")}


@pytest.fixture
def effects(tmp_path: Path) -> SideEffects:
    return SideEffects(tmp_path / "marks")


def _start_of(effects: SideEffects, task: TaskHandle) -> Mark:
    """Wait until the task's only attempt runs, and return what it wrote."""
    eventually(lambda: effects.started(task.id), 30, "it runs")
    (start,) = effects.started(task.id)
    return start


def _ends(process: live.Process) -> float:
    """Wait for the end of a process and return how long that took, in seconds."""
    started = time.monotonic()
    eventually(lambda: not process.alive, STOP_S, f"{process.command} ends", pause_s=0.02)
    return time.monotonic() - started


def test_a_heavy_task_runs_in_a_process_of_its_own(
    client: Client, effects: SideEffects, cluster: Cluster
) -> None:
    tasks = [client.submit(TASK_TYPE, effects.payload(), requires={"cpu": 1}) for _ in range(2)]
    light = client.submit(TASK_TYPE, effects.payload())

    results = [task.result(timeout_s=60) for task in (*tasks, light)]

    pids = [result["pid"] for result in results]
    assert len(set(pids)) == 3
    eventually(
        lambda: not any(psutil.pid_exists(pid) and _is_ours(cluster, pid) for pid in pids[:2]),
        STOP_S,
        "processes of heavy tasks serve no other task",
    )


def _is_ours(cluster: Cluster, pid: int) -> bool:
    """Whether a process still runs an attempt."""
    return pid in live.runners(cluster.settings)


def test_heavy_tasks_share_the_processors(client: Client, effects: SideEffects) -> None:
    cpus = client.worker("W1").raw["resources"]["cpu"]
    every: Requires = {"cpu": cpus}
    first, second = (
        client.submit(TASK_TYPE, effects.payload(1.0), requires=every) for _ in range(2)
    )
    _start_of(effects, first)

    reason = client.get(second.id).pending_reason

    assert reason is not None
    assert reason.code == "no_room"
    assert "W1 has cpu 0 free" in reason.message
    assert client.worker("W1").raw["free"]["cpu"] == 0
    one, two = client.wait([first, second], timeout_s=60)
    assert one.finished_at is not None
    assert two.started_at is not None
    assert two.started_at >= one.finished_at
    assert {one.status, two.status} == {"completed"}


def test_priority_decides_which_heavy_task_comes_first(
    client: Client, http: httpx.Client, effects: SideEffects
) -> None:
    cpus = client.worker("W1").raw["resources"]["cpu"]
    with paused(http, "heavy-priority"):
        requests = [
            TaskRequest(
                task_type=TASK_TYPE,
                payload=effects.payload(),
                requires={"cpu": cpus},
                priority=priority,
                queue="heavy-priority",
            )
            for priority in (1, 5, 9)
        ]
        low, middle, high = client.submit_many(requests)
    client.wait([low, middle, high], timeout_s=90)

    starts = [mark.task_id for mark in effects.marks() if mark.what == "start"]
    assert starts == [high.id, middle.id, low.id]


@pytest.mark.parametrize("need", NEEDS)
def test_what_no_worker_has_is_waited_for_and_named(client: Client, need: str) -> None:
    requires, amount = NEEDS[need]
    task = client.submit("echo", {}, requires=requires)
    time.sleep(0.5)
    view = client.get(task.id)
    told = client.why(task.id)
    task.cancel()

    assert view.status == "queued"
    assert view.pending_reason is not None
    assert view.pending_reason.code == "unplaceable"
    assert f"{need}>={amount}" in view.pending_reason.message
    assert "W1 has" in view.pending_reason.message
    assert f"{need}>={amount}" in view.pending_reason.fix
    assert told.message.startswith(view.pending_reason.message)


#: In a slot or with a process of its own; as handlers should be, or deaf to everything but SIGKILL.
KINDS = pytest.mark.parametrize(
    ("requires", "stubborn"),
    [(None, False), ({"cpu": 1}, False), (None, True), ({"cpu": 1}, True)],
    ids=["slot", "heavy", "stubborn slot", "stubborn heavy"],
)


@KINDS
def test_a_cancel_ends_the_process(
    client: Client,
    effects: SideEffects,
    cluster: Cluster,
    requires: Requires | None,
    stubborn: bool,
) -> None:
    payload = effects.payload(120, stubborn=stubborn)
    task = client.submit(TASK_TYPE, payload, requires=requires)
    beside = client.submit(TASK_TYPE, effects.payload(2))
    process = live.process_of(cluster.settings, _start_of(effects, task).pid)

    task.cancel("no longer wanted")
    took_s = _ends(process)

    with pytest.raises(TaskCancelled) as cancelled:
        task.result(timeout_s=STOP_S)
    assert "no longer wanted" in cancelled.value.message
    view = client.get(task.id)
    assert [one.outcome for one in view.attempts] == ["cancelled"]
    assert not [mark for mark in effects.marks() if mark.what == "end" and mark.task_id == task.id]
    other = beside.wait(timeout_s=30)
    assert (other.status, other.losses) == ("completed", 0)
    kind = ("stubborn " if stubborn else "") + ("heavy" if requires else "light")
    figures.note(f"cancel of a running {kind} task: its process ended after {took_s:.2f} s")


@KINDS
def test_a_timeout_stops_the_attempt_and_harms_no_other(
    client: Client,
    effects: SideEffects,
    cluster: Cluster,
    requires: Requires | None,
    stubborn: bool,
) -> None:
    beside = client.submit_many(
        [TaskRequest(task_type=TASK_TYPE, payload=effects.payload(2.5)) for _ in range(2)]
    )
    payload = effects.payload(120, stubborn=stubborn)
    task = client.submit(TASK_TYPE, payload, requires=requires, timeout_s=1.5)
    process = live.process_of(cluster.settings, _start_of(effects, task).pid)
    assert live.runners(cluster.settings)[process.pid][0] == task.id

    with pytest.raises(TaskFailed) as failure:
        task.result(timeout_s=STOP_S)

    assert (failure.value.kind, failure.value.attempts) == ("timeout", 1)
    assert "ran longer than" in failure.value.message
    if requires or stubborn:
        _ends(process)
    else:  # A handler that stops by itself when its time is up leaves a process as good as new.
        eventually(
            lambda: task.id not in [one for one, _ in live.runners(cluster.settings).values()],
            5,
            "the attempt is over",
        )
    view = client.get(task.id)
    assert [one.outcome for one in view.attempts] == ["timed_out"]
    assert view.losses == 0
    assert not [mark for mark in effects.marks() if mark.what == "end" and mark.task_id == task.id]
    views = client.wait(beside, timeout_s=30)
    assert {(one.status, one.losses, one.failures) for one in views} == {("completed", 0, 0)}


def test_a_checkpoint_is_handed_to_the_next_attempt(client: Client) -> None:
    task = client.submit(
        "sleep",
        {"seconds": 3, "steps": 30, "resume": True},
        timeout_s=1.2,
        retry={"max_attempts": 6, "backoff_s": 0.05, "retry_on": ["timeout"]},
    )

    result = task.result(timeout_s=60)

    view = client.get(task.id)
    outcomes = [one.outcome for one in view.attempts]
    assert outcomes == ["timed_out"] * (len(outcomes) - 1) + ["completed"]
    assert 2 <= len(outcomes) <= 6
    assert result["resumed_s"] > 0
    assert result["resumed_s"] + result["slept_s"] == pytest.approx(3)
    assert view.failures == len(outcomes) - 1


def test_progress_is_seen_while_it_runs(client: Client) -> None:
    task = client.submit("sleep", {"seconds": 6, "steps": 60}, requires={"cpu": 1})

    seen = set()
    while not task.refresh().ended:
        if task.progress is not None:
            seen.add(round(task.progress.percent))
        time.sleep(0.1)

    assert task.result()["slept_s"] == pytest.approx(6)
    assert len(seen) >= 5
    assert seen <= set(range(101))
    assert task.progress is not None
    assert task.progress.percent == 100

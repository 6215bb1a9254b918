"""Processes are killed and stopped under load; what was promised holds.

Every test leaves the cluster working, and checks the same identity: what the attempts wrote down
themselves (`SideEffects`) agrees with the store, task by task.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hcna_ray.client import Client, TaskFailed, TaskHandle, TaskRequest
from hcna_ray.core.models import Outcome, TaskState
from tests.integration.conftest import Cluster
from tests.support import figures, live
from tests.support.live import eventually
from tests.support.side_effects import TASK_TYPE, SideEffects, states

pytestmark = pytest.mark.faults

#: Time within which everything that was under way when something died must have ended.
DRAIN_S = 120


@pytest.fixture
def effects(tmp_path: Path) -> SideEffects:
    return SideEffects(tmp_path / "marks")


@pytest.fixture(autouse=True)
def steady(cluster: Cluster, client: Client) -> Iterator[None]:
    """Start from, and go back to, a cluster that runs tasks."""
    _works(client)
    yield
    _works(client)


def _works(client: Client) -> None:
    eventually(lambda: any(one.state == "online" for one in client.workers()), 60, "W1 online")
    assert client.submit("echo", {}).result(timeout_s=30)


def _marked(effects: SideEffects, seconds: float = 0.0, queue: str | None = None) -> TaskRequest:
    return TaskRequest(task_type=TASK_TYPE, payload=effects.payload(seconds), queue=queue)


def _ids(handles: list[TaskHandle]) -> list[str]:
    return [one.id for one in handles]


def _all_start(effects: SideEffects, ids: list[str], timeout_s: float = 30) -> None:
    """Wait until an attempt of every task runs."""

    def missing() -> set[str]:
        return set(ids) - {mark.task_id for mark in effects.marks()}

    eventually(lambda: not missing(), timeout_s, f"{len(ids)} attempts run")


def _all_complete(
    cluster: Cluster, client: Client, effects: SideEffects, ids: list[str], what: str
) -> None:
    """Wait for the end of all, then hold the log against the store."""
    views = client.wait(ids, timeout_s=DRAIN_S)
    assert {view.status for view in views} == {"completed"}
    with live.reading(cluster.settings) as reader:
        account = effects.account(reader, ids)
    assert account.completed == len(ids)
    figures.note(f"{what}: {account}")


class Submitter:
    """Submits marked tasks one after the other from a thread, as a client that never gives up."""

    def __init__(self, cluster: Cluster, effects: SideEffects) -> None:
        self._cluster, self._effects = cluster, effects
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.handles: list[TaskHandle] = []
        self.errors: list[Exception] = []
        self.longest_s = 0.0

    def __enter__(self) -> Submitter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "a submit hangs"

    def _run(self) -> None:
        url, key = self._cluster.url, self._cluster.api_key
        with Client(url, key, timeout_s=15, retry_for_s=60) as client:
            while not self._stop.is_set():
                started = time.monotonic()
                number = len(self.handles)
                try:
                    self.handles.append(
                        client.submit(
                            TASK_TYPE,
                            self._effects.payload(),
                            metadata={"number": number, "run": str(self._effects.path)},
                        )
                    )
                except Exception as error:
                    self.errors.append(error)
                    return
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self._stop.wait(0.02)

    def goes_on(self, more: int) -> None:
        """Wait until so many more tasks are accepted."""
        wanted = len(self.handles) + more
        eventually(lambda: self.errors or len(self.handles) >= wanted, 60, "the client goes on")
        assert self.errors == []

    def check(self, client: Client) -> list[str]:
        """Everything submitted was accepted, and stored exactly once; return the ids."""
        assert self.errors == []
        ids = _ids(self.handles)
        assert len(set(ids)) == len(ids)
        numbers = [
            task.metadata["number"]
            for task in client.tasks(task_type=TASK_TYPE)
            if task.metadata and task.metadata.get("run") == str(self._effects.path)
        ]
        assert sorted(numbers) == list(range(len(ids))), "a submit was lost or doubled"
        return ids


def test_five_hundred_queued_tasks_survive_the_moderator(
    cluster: Cluster, client: Client, effects: SideEffects
) -> None:
    long_ones = client.submit_many([_marked(effects, 20.0) for _ in range(10)])
    _all_start(effects, _ids(long_ones))
    _pause(cluster, "outage", "pause")
    queued = client.submit_many(
        [
            # One in five takes 1 to 5 s, most of them at the lower end of it.
            _marked(effects, 1.0 + 4.0 * (i / 499) ** 6 if i % 5 == 0 else 0.0, queue="outage")
            for i in range(500)
        ]
    )
    with live.reading(cluster.settings) as reader:
        assert states(reader, _ids(queued)) == {TaskState.QUEUED: 500}
        assert states(reader, _ids(long_ones)) == {TaskState.RUNNING: 10}
    victim = live.moderator(cluster.settings, cluster.url)
    _pause(cluster, "outage", "resume")

    with Submitter(cluster, effects) as submitter:
        victim.kill()
        killed_at = time.monotonic()
        accepting_s = _accepts_again(cluster) - killed_at
        submitter.goes_on(20)

    ids = submitter.check(client)
    figures.note(
        f"moderator killed: accepting again after {accepting_s:.2f} s; "
        f"{len(ids)} submits, the longest {submitter.longest_s:.2f} s"
    )
    _all_complete(cluster, client, effects, _ids(queued) + ids, "moderator killed, queued")
    _all_complete(cluster, client, effects, _ids(long_ones), "moderator killed, running")
    for handle in long_ones:
        view = client.get(handle.id)
        assert [(one.attempt, one.outcome) for one in view.attempts] == [(1, "completed")]
        assert view.losses == 0
    assert live.moderator(cluster.settings, cluster.url).pid != victim.pid


def test_a_moderator_that_stands_still_loses_nothing(
    cluster: Cluster, client: Client, effects: SideEffects
) -> None:
    running = client.submit_many([_marked(effects, 5.0) for _ in range(3)])
    _all_start(effects, _ids(running))
    frozen = live.moderator(cluster.settings, cluster.url)

    with Submitter(cluster, effects) as submitter:
        frozen.signal(signal.SIGSTOP)
        try:
            time.sleep(12)
        finally:
            frozen.signal(signal.SIGCONT)
        submitter.goes_on(5)

    ids = submitter.check(client)
    figures.note(f"moderator stopped 12 s: the longest submit took {submitter.longest_s:.2f} s")
    _all_complete(cluster, client, effects, ids + _ids(running), "moderator stopped 12 s")
    assert all(client.get(one.id).losses == 0 for one in running)


def test_a_killed_slot_costs_one_loss(
    cluster: Cluster, client: Client, effects: SideEffects
) -> None:
    victim_task = client.submit(TASK_TYPE, effects.payload(3.0))
    _all_start(effects, [victim_task.id])
    beside = client.submit_many([_marked(effects, 0.5) for _ in range(6)])
    (start,) = effects.started(victim_task.id)

    live.process_of(cluster.settings, start.pid).kill()

    _all_complete(cluster, client, effects, [victim_task.id, *_ids(beside)], "slot killed")
    view = client.get(victim_task.id)
    assert [one.outcome for one in view.attempts] == ["lost", "completed"]
    assert (view.losses, view.failures) == (1, 0)
    assert all(client.get(one.id).losses == 0 for one in beside)


def test_a_killed_agent_comes_back_and_repeats_nothing_that_had_ended(
    cluster: Cluster, client: Client, effects: SideEffects
) -> None:
    ended = client.submit_many([_marked(effects) for _ in range(30)])
    client.wait(ended, timeout_s=30)
    running = client.submit_many([_marked(effects, 4.0) for _ in range(3)])
    _all_start(effects, _ids(running))
    queued = client.submit_many([_marked(effects, 0.2) for _ in range(20)])
    incarnation = live.incarnation(cluster.settings)
    slots = set(live.runners(cluster.settings))

    live.process(cluster.settings, "ray::NodeAgent").kill()

    eventually(
        lambda: not slots & {one.pid for one in live.processes(cluster.settings)},
        15,
        "the slots of a dead agent end",
    )
    ids = _ids(ended) + _ids(running) + _ids(queued)
    _all_complete(cluster, client, effects, ids, "agent killed")
    assert live.incarnation(cluster.settings) != incarnation
    assert all(len(effects.started(one.id)) == 1 for one in ended)
    assert {client.get(one.id).losses for one in running} == {1}


def test_a_killed_raylet_of_w1_is_brought_back(
    cluster: Cluster, client: Client, effects: SideEffects
) -> None:
    running = client.submit_many([_marked(effects, 4.0) for _ in range(3)])
    _all_start(effects, _ids(running))
    queued = client.submit_many([_marked(effects, 0.1) for _ in range(40)])
    incarnation = live.incarnation(cluster.settings)
    started = time.monotonic()

    live.raylet_of(cluster.settings, "worker").kill()

    eventually(lambda: live.incarnation(cluster.settings) != incarnation, 90, "W1 registers again")
    figures.note(f"raylet of W1 killed: registered again after {time.monotonic() - started:.1f} s")
    _all_complete(cluster, client, effects, _ids(running) + _ids(queued), "raylet killed")


@pytest.mark.parametrize("what", ["ray::ServeReplica:hcna-c1", "haproxy_of_serve"])
def test_c1_answers_again_after_its_process_was_killed(
    cluster: Cluster, client: Client, effects: SideEffects, what: str
) -> None:
    running = client.submit_many([_marked(effects, 3.0) for _ in range(2)])
    _all_start(effects, _ids(running))
    victim = (
        _serve_haproxy(cluster)
        if what == "haproxy_of_serve"
        else live.process(cluster.settings, what)
    )

    with Submitter(cluster, effects) as submitter:
        submitter.goes_on(5)
        victim.kill()
        killed_at = time.monotonic()
        answering_s = _accepts_again(cluster) - killed_at
        submitter.goes_on(5)

    ids = submitter.check(client)
    figures.note(
        f"{what} killed: accepting again after {answering_s:.2f} s, "
        f"the longest submit took {submitter.longest_s:.2f} s"
    )
    _all_complete(cluster, client, effects, ids + _ids(running), f"{what} killed")
    assert all(client.get(one.id).losses == 0 for one in running)


def test_a_task_that_kills_its_process_is_poison_and_harms_no_other(
    cluster: Cluster, client: Client, effects: SideEffects
) -> None:
    poison = client.submit(TASK_TYPE, effects.payload(0.05, die=True))
    others = client.submit_many([_marked(effects, 0.1) for _ in range(60)])

    with pytest.raises(TaskFailed) as failure:
        poison.result(timeout_s=60)

    assert failure.value.kind == "poison"
    _all_complete(cluster, client, effects, _ids(others), "beside poison")
    view = client.get(poison.id)
    assert [one.outcome for one in view.attempts] == ["lost"] * 3
    assert view.losses == 3
    assert all(client.get(one.id).losses == 0 for one in others)
    with live.reading(cluster.settings) as reader:
        account = effects.account(reader, [poison.id])
        assert {one.outcome for one in reader.attempts(poison.id)} == {Outcome.LOST}
    figures.note(f"poison: {account}")


# -- helpers ---------------------------------------------------------------------------------------


def _pause(cluster: Cluster, queue: str, action: str) -> None:
    live.post(cluster.url, cluster.api_key, f"/admin/queues/{queue}/{action}")


def _accepts_again(cluster: Cluster) -> float:
    """Return the instant (monotonic) of the first POST that was accepted from now on."""
    body = json.dumps({"task_type": "echo", "payload": {}})

    def accepted() -> float | None:
        try:
            answer = httpx.post(
                f"{cluster.url}/tasks",
                content=body,
                headers={"Authorization": f"Bearer {cluster.api_key}"},
                timeout=15,
            )
        except httpx.TransportError:
            return None
        return time.monotonic() if answer.status_code == 202 else None

    return eventually(accepted, 60, "C1 accepts tasks again", pause_s=0.05) or 0.0


def _serve_haproxy(cluster: Cluster) -> live.Process:
    """Return Serve's HAProxy, which is not the one of the control edge."""
    found = [
        one
        for one in live.processes(cluster.settings)
        if "haproxy" in one.command.split(" ")[0] and "edge.cfg" not in one.command
    ]
    assert found, "Serve runs no HAProxy"
    return found[-1]

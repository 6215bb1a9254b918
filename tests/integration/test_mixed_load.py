"""Short tasks are not held up by long ones of the same type, nor by what happens to them."""

from __future__ import annotations

import time
from pathlib import Path

from hcna_ray.client import Client, Conflict, TaskHandle, TaskRequest
from hcna_ray.core.models import TaskState
from tests.integration.conftest import Cluster
from tests.support import figures, live
from tests.support.live import eventually, percentile
from tests.support.side_effects import TASK_TYPE, SideEffects, check_history

LONG, SHORT = 8, 400
GRANT = 64


def test_short_payloads_overtake_long_ones_of_their_type(cluster: Cluster, client: Client) -> None:
    _let_slots_rest(cluster, client)
    long_ones: list[TaskHandle] = []
    short_ones: list[TaskHandle] = []
    try:
        for i in range(SHORT):
            if i % (SHORT // LONG) == 0:
                long_ones.append(client.submit("sleep", {"seconds": 30}))
            short_ones.append(client.submit("sleep", {"seconds": 0.001}))
        views = client.wait(short_ones, timeout_s=60)
        spent_s = [
            (view.finished_at - view.accepted_at).total_seconds()
            for view in views
            if view.finished_at and view.accepted_at
        ]
        assert len(spent_s) == SHORT
        p50, p99 = percentile(spent_s, 0.5), percentile(spent_s, 0.99)
        figures.note(
            f"{LONG} tasks of 30 s among {SHORT} of 1 ms: the short ones' p50 {p50 * 1000:.0f} ms, "
            f"p99 {p99 * 1000:.0f} ms, max {max(spent_s) * 1000:.0f} ms"
        )
        assert {view.status for view in views} == {"completed"}
        assert {view.losses for view in views} == {0}
        assert not any(client.get(one.id).ended for one in long_ones)
        assert p99 < 1.0
    finally:
        _cancel_all(client, long_ones)


def test_cancelling_the_first_of_a_grant_costs_the_others_nothing(
    cluster: Cluster, client: Client, tmp_path: Path
) -> None:
    effects = SideEffects(tmp_path / "marks")
    for _ in range(5):
        _let_slots_rest(cluster, client)
        first, others = _grant_behind_a_long_one(cluster, client, effects)
        with live.reading(cluster.settings) as reader:
            facts = {
                task.id: [
                    stored.fact.kind for stored in reader.facts(after=0, limit=100, task_id=task.id)
                ]
                for task in others
            }
        behind = [task_id for task_id, kinds in facts.items() if "returned" in kinds]
        (start,) = effects.started(first.id)
        process = live.process_of(cluster.settings, start.pid)

        first.cancel("the test wants it gone")

        assert first.wait(timeout_s=30).status == "cancelled"
        process.wait_gone(15)
        views = client.wait(others, timeout_s=60)
        assert {(view.status, view.losses, view.failures) for view in views} == {
            ("completed", 0, 0)
        }
        with live.reading(cluster.settings) as reader:
            for task in [first, *others]:
                check_history(reader, task.id)
            account = effects.account(reader, [first.id, *(one.id for one in others)])
        assert account.cancelled == 1
        assert account.ends == len(others)
        figures.note(f"first of a grant of {len(behind) + 1} cancelled: {account}")
        if len(behind) == GRANT - 1:
            return
    raise AssertionError(f"no grant of {GRANT} in 5 tries, the last had {len(behind) + 1}")


def _grant_behind_a_long_one(
    cluster: Cluster, client: Client, effects: SideEffects
) -> tuple[TaskHandle, list[TaskHandle]]:
    """Have every slot granted 64 tasks at once, the very first of which takes long.

    The moderator makes grants so large only of types it knows to be quick.
    """
    list(client.map(TASK_TYPE, [{}] * 300, timeout_s=60))
    _queue(cluster, "pause")
    slots = live.slots(cluster.settings)
    requests = [TaskRequest(task_type=TASK_TYPE, payload=effects.payload(60), queue="grant")]
    requests += [
        TaskRequest(task_type=TASK_TYPE, payload=effects.payload(), queue="grant")
        for _ in range(slots * GRANT - 1)
    ]
    first, *others = client.submit_many(requests)
    with live.reading(cluster.settings) as reader:
        assert {task.state for task in reader.get([first.id]).values()} == {TaskState.QUEUED}
    _queue(cluster, "resume")
    eventually(lambda: effects.started(first.id), 20, "the long one runs")
    # It holds its slot for longer than long_ms: what was granted behind it goes back.
    client.wait(others, timeout_s=60)
    assert not client.get(first.id).ended
    return first, others


def _let_slots_rest(cluster: Cluster, client: Client) -> None:
    """Wait until no task runs and the slots are idle."""
    eventually(lambda: not live.runners(cluster.settings), 30, "slots are idle")
    assert client.submit("echo", {}).result(timeout_s=20)


def _queue(cluster: Cluster, action: str) -> None:
    live.post(cluster.url, cluster.api_key, f"/admin/queues/grant/{action}")


def _cancel_all(client: Client, handles: list[TaskHandle]) -> None:
    for handle in handles:
        try:
            handle.cancel("the test is over")
        except Conflict:
            continue
    started = time.monotonic()
    client.wait(handles, timeout_s=30)
    assert time.monotonic() - started < 30

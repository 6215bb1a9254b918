"""Thousands of clients wait for their tasks and are in nobody's way."""

from __future__ import annotations

import asyncio
import json

import httpx

from hcna_ray.client import Client, TaskRequest
from tests.integration.conftest import Cluster, paused
from tests.support import figures, live
from tests.support.live import Reply, Wire, eventually, percentile

WAITERS = 2_000
TASKS = 200
POSTS = 400
ROUNDS = 3
CONNECTIONS = 8
QUEUE = "waited-for"


async def test_two_thousand_open_waits_do_not_slow_submits_down(
    cluster: Cluster, client: Client, http: httpx.Client
) -> None:
    live.free_files(2 * WAITERS)
    wires = [Wire(cluster.url, cluster.api_key) for _ in range(WAITERS)]
    answers: list[asyncio.Task[tuple[int, bytes]]] = []
    try:
        with paused(http, QUEUE):
            request = TaskRequest(task_type="echo", payload={"message": "hi"}, queue=QUEUE)
            waited_for = [one.id for one in client.submit_many([request] * TASKS)]
            await _post(cluster)  # Both phases find everything warm.
            alone = [await _post(cluster) for _ in range(ROUNDS)]
            for start in range(0, WAITERS, 200):
                await asyncio.gather(
                    *(_wait_for(wires[i], waited_for[i % TASKS]) for i in range(start, start + 200))
                )
            eventually(lambda: _waiting(cluster) >= WAITERS, 10, "all of them wait")
            answers = [asyncio.create_task(wire.receive()) for wire in wires]
            beside = [await _post(cluster) for _ in range(ROUNDS)]
            assert not any(answer.done() for answer in answers)
        replies = await asyncio.wait_for(asyncio.gather(*answers), 60)
    finally:
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*(wire.close() for wire in wires))

    views = [json.loads(body) for _, body in replies]
    assert {status for status, _ in replies} == {200}
    assert {view["status"] for view in views} == {"completed"}
    assert [view["task_id"] for view in views] == [waited_for[i % TASKS] for i in range(WAITERS)]
    p99_alone, p99_beside = _p99_ms(alone), _p99_ms(beside)
    figures.note(
        f"POST /tasks, {CONNECTIONS} connections: p99 {p99_alone:.1f} ms alone, "
        f"{p99_beside:.1f} ms beside {WAITERS} open waits ({p99_beside / p99_alone:.2f} times)"
    )
    assert p99_beside <= 2 * p99_alone


async def _post(cluster: Cluster) -> list[Reply]:
    body = json.dumps({"task_type": "echo", "payload": {"message": "hello"}}).encode()
    replies = await live.timed_posts(
        cluster.url, cluster.api_key, [body] * POSTS, connections=CONNECTIONS
    )
    assert {reply.status for reply in replies} == {202}
    return replies


async def _wait_for(wire: Wire, task_id: str) -> None:
    await wire.open()
    await wire.send("GET", f"/tasks/{task_id}?wait=60")


def _waiting(cluster: Cluster) -> int:
    """Return how many requests wait in C1, as its metrics say."""
    for line in httpx.get(f"{cluster.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("hcna_http_in_progress") and '"wait"' in line:
            return int(float(line.rpartition(" ")[2]))
    return 0


def _p99_ms(rounds: list[list[Reply]]) -> float:
    """Return the best round's p99: what else this machine does just then is none of ours."""
    return min(percentile((reply.took_s for reply in replies), 0.99) for replies in rounds) * 1000.0

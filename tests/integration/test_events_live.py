"""Event streams through Serve and its HAProxy: nothing missed, nothing twice, whatever happens.

`make follow` runs it in full: 200 clients for a minute.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import httpx

from hcna_ray.api.events import BEGINNING
from hcna_ray.client import AsyncClient, AsyncTaskHandle, Client, TaskRequest
from tests.integration.conftest import Cluster
from tests.support import figures, live
from tests.support.followers import Follower, compare, connected_narrowly, dechunked, request
from tests.support.live import eventually

CLIENTS = int(os.environ.get("HCNA_TEST_FOLLOWERS", "60"))
TASKS = int(os.environ.get("HCNA_TEST_FOLLOWED_TASKS", "160"))
TASKS_PER_S = 20.0
AT_ONCE = 50
#: Behind so many tasks the moderator is killed.
KILLED_AFTER = TASKS // 2
DRAIN_S = 90
#: Tasks whose history does not fit into the buffers between C1 and a client that does not read: the
#: kernel lets them grow as it likes, and they have held that of 9 250.
HISTORY = 20_000
PAGE = 5000


async def test_nothing_is_missed_or_told_twice_while_the_moderator_restarts(
    cluster: Cluster, client: Client
) -> None:
    live.free_files(4 * CLIENTS)
    assert client.submit("echo", {}).result(timeout_s=60)
    followers = [Follower(cluster.url, cluster.api_key) for _ in range(CLIENTS)]
    async with _following(followers):
        begin = max(_number(one) for one in followers)
        assert {_number(one) for one in followers} == {begin}  # Nothing happens meanwhile.

        took_s = await _submit_steadily(cluster)

        with live.reading(cluster.settings) as reader:
            upto = reader.last_fact()
        await _until_told(followers, upto)

    tally = compare(followers, _history(cluster, begin, upto), upto)
    figures.note(f"{TASKS} tasks in {took_s:.0f} s, one moderator killed: {tally}")
    assert tally.events >= 3 * TASKS
    assert tally.faults == 0
    assert not any(one.resets for one in followers)


async def test_a_client_that_does_not_read_is_cut_and_goes_on_where_it_was(
    cluster: Cluster, client: Client
) -> None:
    with live.reading(cluster.settings) as reader:
        begin, generation = reader.last_fact(), reader.generation()
    echo = TaskRequest(task_type="echo", payload={})
    done = client.submit_many([echo] * HISTORY)
    client.wait(done[-1:], timeout_s=120)
    eventually(lambda: _all_ended(client), 120, "all tasks end")
    with live.reading(cluster.settings) as reader:
        upto = reader.last_fact()
    eventually(lambda: _streams(cluster) == 0, 30, "the streams of clients that left have ended")
    follower = Follower(cluster.url, cluster.api_key, place=f"{generation}-{begin}")

    with connected_narrowly(cluster.url) as connection:
        connection.sendall(request(cluster.url, cluster.api_key, follower.place))
        eventually(lambda: _streams(cluster) == 1, 10, "its stream is open")
        started = time.monotonic()
        eventually(lambda: _streams(cluster) == 0, 60, "its stream is cut")
        cut_s = time.monotonic() - started
        answer = _all_of(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    follower.take(dechunked(body))
    before = len(follower.numbers)
    assert 0 < before < upto - begin
    follower.connections = 1

    async with _following([follower]):
        await _until_told([follower], upto)

    tally = compare([follower], _history(cluster, begin, upto), upto)
    figures.note(
        f"a client that does not read, cut after {cut_s:.0f} s and {before} events: {tally}"
    )
    assert tally.faults == 0


def test_a_task_is_followed_from_its_beginning_to_its_end(client: Client) -> None:
    task = client.submit("sleep", {"seconds": 0.5})

    told = list(task.events())

    kinds = [event.kind for event in told]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "completed"
    assert {event.task_id for event in told} == {task.id}
    # The same again for somebody who comes late, and the rest for who has seen the first.
    assert [one.id for one in client.events(task.id)] == [one.id for one in told]
    assert [one.id for one in client.events(task.id, after=told[0].id)] == [
        one.id for one in told[1:]
    ]
    assert next(iter(client.events(after=BEGINNING, follow=False))).kind


# -- helpers ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _following(followers: list[Follower]) -> AsyncIterator[None]:
    """Have clients follow meanwhile; all of them know their place at the beginning."""
    running = [asyncio.create_task(one.run()) for one in followers]
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(*(one.opened.wait() for one in followers))
        yield
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _submit_steadily(cluster: Cluster) -> float:
    """Submit the tasks, kill the moderator meanwhile, wait for all; return how long it took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    # While nobody answers they pile up: more than a client has connections for.
    room = asyncio.Semaphore(AT_ONCE)
    async with AsyncClient(cluster.url, cluster.api_key, retry_for_s=120) as client:

        async def submit(number: int) -> AsyncTaskHandle:
            async with room:
                return await client.submit("echo", {"number": number})

        submits = []
        for number in range(TASKS):
            await asyncio.sleep(max(0.0, started + number / TASKS_PER_S - loop.time()))
            submits.append(asyncio.create_task(submit(number)))
            if number == KILLED_AFTER:
                await asyncio.to_thread(live.moderator(cluster.settings, cluster.url).kill)
        handles = await asyncio.gather(*submits)
        views = await client.wait(handles, timeout_s=DRAIN_S)
    assert {view.status for view in views} == {"completed"}
    return loop.time() - started


async def _until_told(followers: list[Follower], upto: int) -> None:
    def told() -> bool:
        return all(_number(one) >= upto for one in followers)

    await asyncio.to_thread(eventually, told, DRAIN_S, f"all are told up to {upto}")


def _number(follower: Follower) -> int:
    assert follower.place is not None
    return int(follower.place.partition("-")[2])


def _history(cluster: Cluster, after: int, upto: int) -> Iterator[int]:
    """Yield the numbers of all events between two of them, as the store has them."""
    with live.reading(cluster.settings) as reader:
        while facts := reader.facts(after=after, limit=PAGE):
            yield from (stored.number for stored in facts if stored.number <= upto)
            after = facts[-1].number


def _all_ended(client: Client) -> bool:
    return not any(
        list(client.tasks(status=status, limit=1)) for status in ("queued", "running", "scheduled")
    )


def _streams(cluster: Cluster) -> int:
    """Return how many streams C1 has open, as its metrics say."""
    for line in httpx.get(f"{cluster.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("hcna_http_in_progress") and '"stream"' in line:
            return int(float(line.rpartition(" ")[2]))
    return 0


def _all_of(connection: socket.socket) -> bytes:
    """Read until the other side has closed."""
    parts: list[bytes] = []
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            parts.append(piece)
    return b"".join(parts)

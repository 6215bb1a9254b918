"""The rules are `Client`'s (one set of plans); here only that every step is carried out."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from hcna_ray.client import AsyncClient, Client, TaskCancelled, TaskFailed, TaskRequest
from tests.support.fake_c1 import FakeC1
from tests.support.fake_time import FakeTime


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    def shape(cls: type, name: str) -> list[str]:
        return [str(p.name) for p in inspect.signature(getattr(cls, name)).parameters.values()]

    names = {name for name, _ in inspect.getmembers(Client, inspect.isfunction) if name[0] != "_"}
    names -= {"glance"}  # For cells of a notebook, which cannot await.
    for name in sorted(names):
        assert shape(Client, name) == shape(AsyncClient, name), name


def test_submit_retry_and_result(async_client: AsyncClient, c1: FakeC1, time: FakeTime) -> None:
    async def scenario() -> None:
        async with async_client as client:
            c1.script.append(httpx.ConnectError("refused"))
            handle = await client.submit("echo", {"n": 1})
            assert (await handle.result())["n"] == 1
            assert time.pauses == [pytest.approx(0.1)]
            again = await client.attach(handle.id)
            assert (await again.refresh()).status == "completed"

    run(scenario())


def test_map_takes_from_an_async_iterable(async_client: AsyncClient) -> None:
    async def payloads() -> AsyncIterator[dict[str, int]]:
        for n in range(7):
            yield {"n": n}

    async def scenario() -> None:
        results = [item["n"] async for item in async_client.map("echo", payloads(), chunk=3)]
        assert results == list(range(7))
        results = [item["n"] async for item in async_client.map("echo", [{"n": 5}], ordered=False)]
        assert results == [5]

    run(scenario())


def test_artifacts_both_ways(async_client: AsyncClient, tmp_path: Path) -> None:
    async def scenario() -> None:
        artifact = await async_client.upload(b"some bytes")
        target = await async_client.download(artifact.sha256, tmp_path / "out")
        assert target.read_bytes() == b"some bytes"

    run(scenario())


def test_the_rest(async_client: AsyncClient, c1: FakeC1) -> None:
    async def scenario() -> None:
        client = async_client
        batch = await client.batch(
            [TaskRequest(task_type="echo"), TaskRequest(task_type="nonsense")]
        )
        assert (len(batch.handles), len(batch.errors)) == (1, 1)
        many = await client.submit_many([TaskRequest(task_type="echo")])
        assert len(await client.wait(many)) == 1
        assert (await client.wait(many[0])).status == "completed"
        held = await client.submit("hold")
        assert (await held.cancel("enough")).status == "cancelled"
        with pytest.raises(TaskCancelled):
            await held.result()
        failed = await client.submit("hold")
        c1.finish(failed.id, "failed", error={"kind": "error", "message": "boom"})
        with pytest.raises(TaskFailed):
            await failed.result()
        assert (await client.retry(failed.id)).status == "queued"
        assert (await client.why(failed.id)).status == "queued"
        assert len([view async for view in client.tasks()]) == 4
        assert (await client.health()).status == "healthy"
        assert (await client.workers())[0] == await client.worker("W1")
        assert (await client.drain("W1")).state == "draining"
        assert (await client.cordon("W1")).state == "cordoned"
        assert (await client.uncordon("W1")).state == "online"
        assert (await client.pause_queue("night"))["paused"] is True
        assert (await client.resume_queue("night"))["paused"] is False
        assert (await client.send_intent("W1", "test.ping")).answer["pong"]
        assert (await client.snapshot()).trouble == ""
        assert "AsyncClient" in repr(client)
        await client.close()

    run(scenario())

"""Calls over a Unix socket: answered as by Ray, and never in the way of Ray's own."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.errors import NoAnswer, NotFound
from hcna_ray.runtime import local_rpc
from hcna_ray.runtime.local_rpc import LocalCalls, LocalServer
from hcna_ray.runtime.ray_link import ActorLink


class Desk:
    """Answers as an actor's ``call`` does."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.gate = asyncio.Event()

    async def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Any]:
        self.calls.append((method, args, kwargs))
        match method:
            case "echo":
                return "ok", (args, kwargs)
            case "trouble":
                return "error", NotFound("task", "t1")
            case "park":
                await self.gate.wait()
                return "ok", "late"
            case _:
                raise RuntimeError("no such method")


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "moderator.sock"


@pytest.fixture
async def server(desk: Desk, path: Path) -> AsyncIterator[LocalServer]:
    server = LocalServer(path, desk.call)
    await server.open()
    yield server
    server.close()


async def until(ready: Callable[[], bool]) -> None:
    """Let the loop run until something has come about."""
    async with asyncio.timeout(10):
        while not ready():  # noqa: ASYNC110 - most of it sets no event
            await asyncio.sleep(0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir()]


async def test_calls_are_answered_each_when_its_answer_is_there(
    desk: Desk, path: Path, server: LocalServer
) -> None:
    calls = LocalCalls(path)
    parked = asyncio.create_task(calls.ask("park", (), {}))
    assert await calls.ask("echo", (1, b"x"), {"a": None}) == ("ok", ((1, b"x"), {"a": None}))
    assert not parked.done()
    desk.gate.set()
    assert await parked == ("ok", "late")
    assert len(server.connections) == 1
    calls.close()


@pytest.mark.parametrize("size", [0, 100, 70_000, 5_000_000])
async def test_what_is_large_arrives_whole(path: Path, server: LocalServer, size: int) -> None:
    calls = LocalCalls(path)
    payload = os.urandom(size)
    asked = [calls.ask("echo", (n, payload), {}) for n in range(5)]
    assert await asyncio.gather(*asked) == [("ok", ((n, payload), {})) for n in range(5)]
    calls.close()


async def test_a_link_prefers_it_and_answers_as_ever(
    desk: Desk, path: Path, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*_args: object, **_more: object) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr("ray.get_actor", no_ray)
    link = ActorLink("moderator", path)
    assert await link.acall("echo", 1, timeout_s=5.0, b=2) == ((1,), {"b": 2})
    with pytest.raises(NotFound, match="t1"):
        await link.acall("trouble")
    with pytest.raises(NoAnswer, match="no such method"):
        await link.acall("nonsense")
    with pytest.raises(NoAnswer, match="TimeoutError"):
        await link.acall("park", timeout_s=0.01)
    waiting = asyncio.create_task(link.acall("park"))
    await until(lambda: len(desk.calls) == 5)
    server.close()
    with pytest.raises(NoAnswer, match="ConnectionResetError"):  # It may have been carried out.
        await waiting


async def test_who_finds_nobody_goes_through_ray_and_looks_again_later(
    desk: Desk, path: Path
) -> None:
    now = 0.0
    calls = LocalCalls(path, monotonic=lambda: now)
    assert await calls.ask("echo", (), {}) is None  # No socket.
    server = LocalServer(path, desk.call)
    await server.open()
    assert await calls.ask("echo", (), {}) is None  # Not at every call.
    now += local_rpc.AGAIN_S
    assert await calls.ask("echo", (), {}) == ("ok", ((), {}))
    server.close()
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(path))  # As a killed process leaves it: a name, and nobody behind it.
    left.close()
    await until(lambda: not calls.connected)
    assert await calls.ask("echo", (), {}) is None
    assert len(desk.calls) == 1


async def test_who_comes_later_takes_it_over(
    desk: Desk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_rpc, "LOOK_S", 0.0)
    first, second = Desk(), LocalServer(path, desk.call)
    serving = asyncio.create_task(LocalServer(path, first.call).run())
    await until(path.exists)
    calls = LocalCalls(path)
    parked = asyncio.create_task(calls.ask("park", (), {}))
    await until(lambda: len(first.calls) == 1)

    await second.open()

    await serving  # It has noticed, and serves nobody any more.
    with pytest.raises(ConnectionResetError):
        await parked
    assert await calls.ask("echo", (), {}) is None  # Through Ray, for a moment.
    assert await LocalCalls(path).ask("echo", (), {}) == ("ok", ((), {}))
    assert desk.calls == [("echo", (), {})]
    assert names(path.parent) == [
        "moderator.sock"
    ]  # The first has not taken the second's name away.
    second.close()
    assert names(path.parent) == []


async def test_only_its_owner_can_reach_it(
    path: Path, server: LocalServer, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mode(path) == 0o600
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    calls = LocalCalls(path)
    with pytest.raises(ConnectionResetError):
        await calls.ask("echo", (), {})
    assert desk.calls == []


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (int, ("no number",))


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<I", (1 << 30) + 1),
        struct.pack("<I", 4) + b"abcd",
        struct.pack("<I", len(pickle.dumps(Bomb()))) + pickle.dumps(Bomb()),
        struct.pack("<I", len(pickle.dumps(1))) + pickle.dumps(1),
    ],
    ids=["too-long", "no-pickle", "does-not-load", "no-call"],
)
async def test_what_cannot_be_read_ends_that_connection_alone(
    path: Path, server: LocalServer, raw: bytes
) -> None:
    calls = LocalCalls(path)
    await calls.ask("echo", (), {})
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(raw)
    assert await reader.read() == b""
    writer.close()
    assert await calls.ask("echo", (), {}) == ("ok", ((), {}))
    calls.close()


async def test_a_long_path_is_no_obstacle(tmp_path: Path, desk: Desk) -> None:
    path = tmp_path / ("d" * 100) / ("e" * 100) / "moderator.sock"
    path.parent.mkdir(parents=True)
    server, calls = LocalServer(path, desk.call), LocalCalls(path)
    await server.open()
    assert await calls.ask("echo", (1,), {}) == ("ok", ((1,), {}))
    assert names(path.parent) == ["moderator.sock"]
    calls.close()
    server.close()

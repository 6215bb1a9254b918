from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from hcna_ray.client import AsyncClient, Client, ConnectionFailed, NotFound, Overloaded
from hcna_ray.client.plans import LOGS_SILENCE_S, Planner
from tests.support.fake_c1 import API_KEY, FakeC1, Seen, problem
from tests.support.fake_time import FakeTime


def test_an_output_comes_as_it_was_printed(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.printed[handle.id] = [b"first", b"\xff second"]
    assert b"".join(handle.logs()) == b"\xff second"
    assert b"".join(client.logs(handle.id, attempt=1)) == b"first"
    assert c1.requests[-2].query == {"offset": "0", "attempt": "1"}


def test_without_an_attempt_there_is_nothing_to_show(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    with pytest.raises(NotFound) as caught:
        list(handle.logs())
    assert caught.value.code == "attempt_not_found"


def test_a_worker_that_stays_away_is_told(client: Client, c1: FakeC1, time: FakeTime) -> None:
    handle = client.submit("hold")
    c1.script += [problem(503, "output_unavailable", retry_after_s=5)] * 10
    with pytest.raises(Overloaded) as caught:
        list(handle.logs())
    assert caught.value.code == "output_unavailable"


def test_a_followed_output_is_taken_up_where_it_broke_off(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    handle = client.submit("hold")
    c1.printed[handle.id] = [b"0123456789"]
    c1.printed_at_once = 4
    c1.script += [httpx.ConnectError("refused")]

    found = bytearray()
    for piece in handle.logs(follow=True):
        found += piece
        if len(found) == 8:
            c1.printed_at_once = 100
            c1.finish(handle.id, "completed")

    assert bytes(found) == b"0123456789"
    offsets = [seen.query["offset"] for seen in c1.requests if seen.path.endswith("/logs")]
    assert offsets[:4] == ["0", "0", "4", "8"]


def test_a_task_that_has_not_begun_is_waited_for(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    handle = client.submit("hold")
    c1.script += [problem(404, "attempt_not_found")]
    c1.printed[handle.id] = [b"here"]
    c1.finish(handle.id, "completed")
    # It has ended without an attempt, as far as is known here: nothing is waited for.
    assert list(handle.logs(follow=True)) == []


def test_who_follows_before_the_first_attempt_misses_none(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    handle = client.submit("hold")
    c1.script += [problem(404, "attempt_not_found")]
    c1.printed[handle.id] = [b"one", b"two"]

    assert next(handle.logs(follow=True)) == b"one"


async def test_the_asynchronous_client_does_the_same(async_client: AsyncClient, c1: FakeC1) -> None:
    handle = await async_client.submit("hold")
    c1.printed[handle.id] = [b"first", b"second"]
    assert [piece async for piece in handle.logs(attempt=1)] == [b"first"]
    await async_client.close()


class Hush(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that says something, and then nothing until its reader has had enough."""

    def __init__(self, body: bytes, request: httpx.Request, time: FakeTime) -> None:
        self._body, self._time = body, time
        self._silence_s = request.extensions["timeout"]["read"]

    def __iter__(self) -> Iterator[bytes]:
        if self._body:
            yield self._body
        assert self._silence_s is not None, "its reader would wait for ever"
        self._time.now_s += self._silence_s
        raise httpx.ReadTimeout("nothing came")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


class Silent:
    """A C1 whose connections die without a word: each tells what is there, and then nothing.

    Before each of them a line is printed, or nothing; at the end the task ends.
    """

    def __init__(self, c1: FakeC1, time: FakeTime, lines: list[bytes]) -> None:
        self._c1, self._time, self._lines = c1, time, list(lines)
        self._through = c1.transport()
        self.offsets: list[int] = []
        self.transport = httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        parts = request.url.path.strip("/").split("/")
        if parts[-1] != "logs":
            return self._through.handle_request(request)
        self.offsets.append(int(request.url.params["offset"]))
        if self._lines:
            self._c1.printed[parts[1]][-1] += self._lines.pop(0)
            told = self._through.handle_request(request)
            headers = {"x-attempt": told.headers["x-attempt"]}
            return httpx.Response(
                200, headers=headers, stream=Hush(told.read(), request, self._time)
            )
        if not self._c1.tasks[parts[1]]["finished_at"]:
            self._c1.finish(parts[1], "completed")
        return self._through.handle_request(request)


#: The handler is quiet for an hour in the middle.
LINES = [b"one\n", b"two\n", *[b""] * 60, b"three\n", b"four"]


def test_who_follows_learns_that_a_connection_is_dead(
    c1: FakeC1, planner: Planner, time: FakeTime
) -> None:
    silent = Silent(c1, time, LINES)
    with Client(
        "http://c1.test", API_KEY, transport=silent.transport, planner=planner, sleep=time.sleep
    ) as client:
        handle = client.submit("hold")
        c1.printed[handle.id] = [b""]

        assert list(handle.logs(follow=True)) == [b"one\n", b"two\n", b"three\n", b"four"]

    assert silent.offsets == [0, 4, *[8] * 61, 14, 18, 18]
    assert time.now_s > 60 * LOGS_SILENCE_S
    # What is printed after a long silence does not wait for a patience that grew meanwhile.
    assert max(time.pauses) < 1


def test_silence_before_an_answer_is_not_the_end_either(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    handle = client.submit("hold")
    c1.printed[handle.id] = [b"here"]
    c1.finish(handle.id, "completed")

    def dead(_: Seen) -> None:
        time.now_s += LOGS_SILENCE_S
        raise httpx.ReadTimeout("nothing came")

    c1.script.append(dead)
    assert list(handle.logs(follow=True)) == [b"here"]
    c1.script.append(dead)
    with pytest.raises(ConnectionFailed):
        list(handle.logs())


async def test_who_follows_under_asyncio_learns_it_too(
    c1: FakeC1, planner: Planner, time: FakeTime
) -> None:
    silent = Silent(c1, time, LINES)
    client = AsyncClient(
        "http://c1.test",
        API_KEY,
        transport=silent.transport,
        planner=planner,
        sleep=time.sleep_async,
    )
    handle = await client.submit("hold")
    c1.printed[handle.id] = [b""]

    found = [piece async for piece in handle.logs(follow=True)]

    assert found == [b"one\n", b"two\n", b"three\n", b"four"]
    await client.close()

from __future__ import annotations

import httpx
import pytest

from hcna_ray.client import AsyncClient, Client, NotFound, Overloaded
from tests.support.fake_c1 import FakeC1, problem
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

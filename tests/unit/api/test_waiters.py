"""The change feed of a replica: one call to the moderator for all who wait, none for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from hcna_ray.api.waiters import LINGER_S, ChangeFeed
from tests.support.c1 import Composite
from tests.support.paper_worker import PaperClock


async def no_batches(_ids: tuple[str, ...]) -> Iterable[str]:
    return ()


@pytest.fixture
def clock() -> PaperClock:
    return PaperClock()


@pytest.fixture
async def feed(c1: Composite, clock: PaperClock) -> AsyncIterator[ChangeFeed]:
    feed = ChangeFeed(c1.moderator, no_batches, clock)
    feed.start()
    yield feed
    await feed.stop()


async def settle(turns: int = 50) -> None:
    """Let all that is ready run."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def run_one(c1: Composite, *, incarnation: str) -> str:
    task_id = await c1.submit()
    c1.moderator.run_all(c1.moderator.join(incarnation=incarnation))
    return task_id


async def test_while_nobody_waits_nothing_is_asked(
    c1: Composite, feed: ChangeFeed, clock: PaperClock
) -> None:
    for incarnation in "abc":
        await run_one(c1, incarnation=incarnation)
        await settle()
    assert c1.moderator.change_calls == 0
    assert feed.alive


async def test_whoever_waits_is_woken_also_by_what_ended_while_nobody_asked(
    c1: Composite, feed: ChangeFeed
) -> None:
    task_id = await run_one(c1, incarnation="a")
    with feed.watch((task_id,)) as ended:
        async with asyncio.timeout(5):
            await ended.wait()  # To look again: it may have ended since it was looked for.
    assert c1.moderator.change_calls >= 1


async def test_the_call_is_kept_up_for_a_while_after_the_last_waiter(
    c1: Composite, feed: ChangeFeed, clock: PaperClock
) -> None:
    with feed.watch(("t0",)):
        await settle()
    clock.advance(LINGER_S - 1)
    await run_one(c1, incarnation="a")
    await settle()
    lingering = c1.moderator.change_calls
    task_id = await c1.submit()
    with feed.watch((task_id,)) as ended:
        c1.moderator.run_all(c1.moderator.join(incarnation="b"))
        async with asyncio.timeout(5):
            await ended.wait()
    clock.advance(LINGER_S)
    await run_one(c1, incarnation="c")  # Answers the call that is out.
    await settle()
    last = c1.moderator.change_calls
    assert last > lingering > 0

    for incarnation in "def":
        await run_one(c1, incarnation=incarnation)
        await settle()

    assert c1.moderator.change_calls == last

"""The change feed: what ended, to whoever listens, without gaps that nobody is told of."""

from __future__ import annotations

import asyncio

import pytest

from hcna_ray.runtime import feed as feed_module
from hcna_ray.runtime.feed import ChangeFeed


async def test_news_reaches_every_listener_at_once() -> None:
    feed = ChangeFeed(10)
    listeners = [asyncio.create_task(feed.after(10, 60.0)) for _ in range(3)]
    await asyncio.sleep(0)

    feed.publish(13, ("t1", "t2"))

    for changes in await asyncio.gather(*listeners):
        assert (changes.last, changes.ended, changes.gap) == (13, ("t1", "t2"), False)


async def test_a_listener_that_was_away_for_a_moment_misses_nothing() -> None:
    feed = ChangeFeed(0)
    feed.publish(1, ("t1",))
    feed.publish(2, ("t2",))

    assert (await feed.after(0, 0.0)).ended == ("t1", "t2")
    assert (await feed.after(1, 0.0)).ended == ("t2",)


async def test_what_is_not_remembered_is_a_gap() -> None:
    feed = ChangeFeed(100)

    assert (await feed.after(99, 0.0)).gap
    assert (await feed.after(101, 0.0)).gap  # From before a restore: it knows more than there is.
    assert not (await feed.after(100, 0.0)).gap


async def test_memory_is_bounded_and_what_falls_out_becomes_a_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed_module, "REMEMBERED", 2)
    feed = ChangeFeed(0)
    for number in (1, 2, 3):
        feed.publish(number, (f"t{number}",))

    assert (await feed.after(0, 0.0)).gap
    assert (await feed.after(1, 0.0)).ended == ("t2", "t3")


async def test_a_commit_in_which_nothing_ended_wakes_nobody_but_counts() -> None:
    feed = ChangeFeed(0)
    listener = asyncio.create_task(feed.after(0, 60.0))
    await asyncio.sleep(0)
    feed.publish(5, ())
    await asyncio.sleep(0)
    assert not listener.done()

    feed.publish(6, ("t1",))
    assert (await listener).last == 6


async def test_a_wait_has_an_end() -> None:
    changes = await ChangeFeed(7).after(7, 0.001)

    assert (changes.last, changes.ended) == (7, ())


async def test_a_listener_that_is_overrun_while_it_waits_is_told_of_the_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed_module, "REMEMBERED", 3)
    feed = ChangeFeed(0)
    listener = asyncio.create_task(feed.after(0, 60.0))
    await asyncio.sleep(0)
    for number in range(1, 6):
        feed.publish(number, (f"t{number}",))

    assert (await listener).gap


async def test_a_commit_told_twice_counts_once() -> None:
    feed = ChangeFeed(0)
    feed.publish(3, ("t1",))
    feed.publish(3, ("t1",))
    feed.publish(0, ())

    assert (await feed.after(0, 0.0)).ended == ("t1",)


async def test_whoever_asks_for_history_is_woken_by_any_of_it() -> None:
    feed = ChangeFeed(10)
    listener = asyncio.create_task(feed.written(10, 60.0))
    await asyncio.sleep(0)
    assert not listener.done()

    feed.publish(11, ())

    assert (await listener).last == 11
    assert (await feed.written(10, 60.0)).last == 11
    assert (await feed.written(12, 60.0)).last == 11  # Who has read ahead looks again by itself.
    assert (await feed.written(11, 0.001)).last == 11

"""Event streams: everything once and in order, to whoever may see it, also over interruptions."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcna_ray.api import events, schemas
from hcna_ray.api.admission import Sort
from hcna_ray.api.events import EventHub, Place
from tests.support.asgi_stream import StreamClient, Told, a_stream
from tests.support.builders import T0
from tests.support.c1 import ADMIN_KEY, Composite, a_composite

LIFE = ["accepted", "granted", "started", "completed"]
incarnations: Iterator[str] = (f"i{number}" for number in itertools.count())


def run_all(c1: Composite) -> int:
    """Let a worker come and run what waits."""
    return c1.moderator.run_all(c1.moderator.join(incarnation=next(incarnations)))


def kinds(told: list[Told]) -> list[str]:
    return [one.data["kind"] for one in told]


async def history(c1: Composite, **query: object) -> list[Told]:
    """Return everything there is."""
    async with a_stream(c1.app, "/events", ADMIN_KEY, follow="false", after="0", **query) as all_:
        return await all_.rest()


# -- one task --------------------------------------------------------------------------------------


async def test_a_task_is_told_from_its_beginning_to_its_end(c1: Composite) -> None:
    task_id = await c1.submit(payload={"n": 1})
    async with a_stream(c1.app, f"/tasks/{task_id}/events", ADMIN_KEY) as stream:
        (accepted,) = await stream.take(1)
        run_all(c1)
        rest = await stream.rest()

    assert kinds([accepted, *rest]) == LIFE
    assert stream.complete
    assert stream.headers["content-type"].startswith("text/event-stream")
    numbers = [one.data["number"] for one in [accepted, *rest]]
    assert numbers == sorted(set(numbers))
    assert [one.id for one in rest] == [f"1-{number}" for number in numbers[1:]]
    assert rest[-1].data["status"] == "completed"
    assert rest[-1].data["worker"] == "W1"
    for one in rest:
        schemas.EventOut.model_validate(one.data)


async def test_a_task_whose_end_was_told_is_not_told_again(c1: Composite) -> None:
    task_id = await c1.submit()
    run_all(c1)
    path = f"/tasks/{task_id}/events"
    async with a_stream(c1.app, path, ADMIN_KEY) as stream:
        whole = await stream.rest()
    async with a_stream(c1.app, path, ADMIN_KEY, after=whole[1].id) as stream:
        assert await stream.rest() == whole[2:]
    async with a_stream(c1.app, path, ADMIN_KEY, after=whole[-1].id) as stream:
        await stream.over()
        assert (stream.status, await stream.rest()) == (204, [])


async def test_other_tasks_do_not_come_in_between(c1: Composite) -> None:
    mine, other = await c1.submit(), await c1.submit()
    async with a_stream(c1.app, f"/tasks/{mine}/events", ADMIN_KEY) as stream:
        await stream.take(1)
        run_all(c1)
        rest = await stream.rest()

    assert kinds(rest) == LIFE[1:]
    assert {one.data["task_id"] for one in await history(c1)} == {mine, other}


async def test_of_a_task_that_nobody_has_there_are_no_events(c1: Composite) -> None:
    reply = await c1.http.get("/tasks/task-of-nobody/events")
    assert (reply.status_code, reply.json()["code"]) == (404, "task_not_found")


# -- all tasks -------------------------------------------------------------------------------------


async def test_a_stream_begins_now_unless_it_says_from_where(c1: Composite) -> None:
    before = await c1.submit()
    async with a_stream(c1.app, "/events", ADMIN_KEY) as stream:
        await stream.block()
        task_id = await c1.submit()
        (first,) = await stream.take(1)
    assert first.data["task_id"] == task_id
    assert (await history(c1))[0].data["task_id"] == before


async def test_every_listener_is_told_everything_once_over_a_restart_of_the_moderator(
    c1: Composite,
) -> None:
    async def follow(number: int) -> list[Told]:
        # Every second one is cut now and then, and goes on behind what it has seen.
        told: list[Told] = []
        while True:
            after = told[-1].id if told else "0"
            async with a_stream(c1.app, "/events", ADMIN_KEY, after=after) as stream:
                for _ in range(7 if number % 2 else 10_000):
                    (one,) = await stream.take(1)
                    told.append(one)
                    if one.data["queue"] == "end":
                        return told

    listeners = [asyncio.create_task(follow(number)) for number in range(20)]
    for turn in range(3):
        for _ in range(20):
            await c1.submit()
        run_all(c1)
        if turn == 1:
            c1.moderator.kill()
            await asyncio.sleep(0)
            c1.moderator.revive()
    await c1.submit(queue="end")
    everything = [one.id for one in await history(c1)]

    assert len(everything) > 60 * len(LIFE)
    for told in await asyncio.gather(*listeners):
        ids = [one.id for one in told]
        assert ids == everything[: everything.index(ids[-1]) + 1]


async def test_events_are_told_while_the_moderator_is_away(c1: Composite) -> None:
    await c1.submit()
    c1.moderator.kill()
    async with a_stream(c1.app, "/events", ADMIN_KEY, after="0") as stream:
        (accepted,) = await stream.take(1)
    assert accepted.data["kind"] == "accepted"


async def test_what_was_committed_and_not_announced_is_told(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moderator that dies between its commit and telling of it leaves a line in the store."""
    async with a_stream(c1.app, "/events", ADMIN_KEY) as stream:
        await stream.block()
        monkeypatch.setattr(c1.moderator.desk.feed, "publish", lambda *_: None)
        task_id = await c1.submit()
        c1.moderator.kill()
        (accepted,) = await stream.take(1)
    assert accepted.data["task_id"] == task_id


async def test_what_is_not_remembered_is_read_from_the_store(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "REMEMBERED", 5)
    monkeypatch.setattr(events, "PAGE", 3)
    async with (
        a_stream(c1.app, "/events", ADMIN_KEY) as fast,
        a_stream(c1.app, "/events", ADMIN_KEY) as slow,
    ):
        await slow.block()
        await fast.block()
        slow.reading.clear()
        for _ in range(10):
            await c1.submit()
            await fast.take(1)
        slow.reading.set()
        assert [one.id for one in await slow.take(10)] == [one.id for one in await history(c1)]


async def test_events_are_chosen_by_type_queue_and_kind(c1: Composite) -> None:
    here = await c1.submit(queue="lab")
    await c1.submit(queue="night")
    await c1.submit(task_type="sleep", payload={"seconds": 0}, queue="lab")
    run_all(c1)

    chosen = await history(c1, task_type="echo", queue="lab", kind="started,completed")
    assert [(one.data["task_id"], one.data["kind"]) for one in chosen] == [
        (here, "started"),
        (here, "completed"),
    ]
    assert await history(c1, queue="nowhere") == []


@pytest.mark.parametrize("place", ["x", "1", "1-", "-1-1", "1-2-3", "1- 1", "1-1\u0661", "01-1"])
async def test_what_is_no_place_is_refused(c1: Composite, place: str) -> None:
    reply = await c1.http.get("/events", headers=[(b"Last-Event-ID", place.encode())])
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_request")


# -- restored stores -------------------------------------------------------------------------------


async def test_who_comes_from_before_a_restore_is_told_so(c1: Composite) -> None:
    for _ in range(3):
        await c1.submit()
    store = c1.moderator.desk.memory
    with store.transaction():
        store.raise_generation()

    async with a_stream(c1.app, "/events", ADMIN_KEY, after="1-2", follow="false") as stream:
        (told,) = await stream.rest()
    assert (told.name, told.id, told.data) == ("reset", "2-3", {"reason": "restored"})


async def test_a_number_that_is_still_to_come_is_from_before_a_restore(c1: Composite) -> None:
    await c1.submit()
    async with a_stream(c1.app, "/events", ADMIN_KEY, after="1-99", follow="false") as stream:
        (told,) = await stream.rest()
    assert (told.name, told.id) == ("reset", "1-1")


async def test_of_a_restored_task_the_whole_story_is_told_again(c1: Composite) -> None:
    task_id = await c1.submit()
    run_all(c1)
    path = f"/tasks/{task_id}/events"
    async with a_stream(c1.app, path, ADMIN_KEY, after="0-2") as stream:
        reset, *story = await stream.rest()
    assert reset.name == "reset"
    assert kinds(story) == LIFE


async def test_a_stream_that_is_open_over_a_restore_is_told_and_goes_on(c1: Composite) -> None:
    async with a_stream(c1.app, "/events", ADMIN_KEY) as stream:
        await c1.submit()
        await stream.take(1)
        store = c1.moderator.desk.memory
        with store.transaction():
            store.raise_generation()
        await c1.submit()
        (reset,) = await stream.take(1)
        task_id = await c1.submit()
        (after,) = await stream.take(1)
    assert reset.name == "reset"
    assert (after.data["task_id"], Place.parse(after.id)) == (task_id, Place(2, 3))


# -- whoever may -----------------------------------------------------------------------------------


async def test_each_is_told_what_it_may_see(c1: Composite) -> None:
    for name, role, more in (
        ("bob", "submitter", {}),
        ("watcher", "viewer", {}),
        ("nightly", "operator", {"queues": ("night",)}),
    ):
        c1.keys.add(f"hcna_{name}", name=name, role=role, **more)  # type: ignore[arg-type]
    async with c1.client("hcna_bob") as bob:
        reply = await bob.post("/tasks", json={"task_type": "echo", "queue": "night"})
    his = reply.json()["task_id"]
    other = await c1.submit()
    await c1.http.post(f"/tasks/{other}/cancel", json={"reason": "a secret reason"})

    async def told(key: str) -> list[Told]:
        async with a_stream(c1.app, "/events", key, after="0", follow="false") as stream:
            return await stream.rest()

    assert {one.data["task_id"] for one in await told("hcna_bob")} == {his}
    assert {one.data["task_id"] for one in await told("hcna_nightly")} == {his}
    seen = await told("hcna_watcher")
    assert {one.data["task_id"] for one in seen} == {his, other}
    assert all(one.data["outline"] and one.data["detail"] is None for one in seen)
    assert "a secret reason" in json.dumps([one.data for one in await told(ADMIN_KEY)])


async def test_a_key_that_is_revoked_is_told_no_more(c1: Composite) -> None:
    c1.keys.add("hcna_short", name="short", role="operator", expires_at=T0 + 60.0)
    async with a_stream(c1.app, "/events", "hcna_short") as stream:
        await c1.submit()
        assert len(await stream.take(1)) == 1
        c1.moderator.desk.clock.advance(61.0)
        await c1.submit()
        assert await stream.rest() == []
        assert stream.complete
    async with a_stream(c1.app, "/events", "hcna_short") as stream:
        assert stream.status == 401


# -- bounds ----------------------------------------------------------------------------------------


def in_progress(c1: Composite) -> int:
    return c1.services.admission.in_progress[Sort.STREAM]


async def test_streams_have_a_budget_of_their_own(tmp_path: Path) -> None:
    async with a_composite(tmp_path, limits={"streams_max": 2}) as c1:
        async with (
            a_stream(c1.app, "/events", ADMIN_KEY),
            a_stream(c1.app, "/events", ADMIN_KEY) as second,
        ):
            assert in_progress(c1) == 2
            reply = await c1.http.get("/events")
            assert (reply.status_code, reply.json()["code"]) == (503, "overloaded")
            second.hang_up()
            await second.over()
            assert in_progress(c1) == 1
        assert in_progress(c1) == 0
        assert c1.services.events.streams == 0


async def test_a_client_that_does_not_read_is_cut_and_goes_on_later(tmp_path: Path) -> None:
    async with a_composite(tmp_path, limits={"stream_send_s_max": 0.05}) as c1:
        async with a_stream(c1.app, "/events", ADMIN_KEY) as slow:
            await c1.submit()
            (first,) = await slow.take(1)
            slow.reading.clear()
            for _ in range(5):
                await c1.submit()
            await slow.over()
            assert not slow.complete
        assert in_progress(c1) == 0
        async with a_stream(c1.app, "/events", ADMIN_KEY, after=first.id) as again:
            rest = await again.take(5)
        everything = [one.id for one in await history(c1)]
    assert [first.id, *(one.id for one in rest)] == everything


async def test_a_stream_has_an_end_after_which_the_client_comes_again(tmp_path: Path) -> None:
    async with a_composite(tmp_path, limits={"stream_s_max": 0.01}) as c1:
        task_id = await c1.submit()
        async with a_stream(c1.app, f"/tasks/{task_id}/events", ADMIN_KEY) as stream:
            told = await stream.rest()
        assert kinds(told) == ["accepted"]
        assert stream.complete


async def test_a_quiet_stream_says_that_it_is_alive_and_where_it_stands(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "ALIVE_S", 0.01)
    await c1.submit()
    async with a_stream(c1.app, "/events", ADMIN_KEY, queue="nowhere") as stream:
        assert await stream.block() == "retry: 1000\nid: 1-1"
        assert await stream.block() == ": alive\nid: 1-1"


async def test_a_stopping_replica_ends_its_streams(tmp_path: Path) -> None:
    async with a_composite(tmp_path) as c1, a_stream(c1.app, "/events", ADMIN_KEY) as stream:
        await stream.block()
        await c1.services.events.stop()
        assert await stream.rest() == []
        assert stream.complete


async def test_a_store_that_is_away_ends_the_stream_without_an_error(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_stream(c1.app, "/events", ADMIN_KEY) as stream:
        await stream.block()
        monkeypatch.setattr(c1.services.reads, "_open_reader", _away)
        c1.services.reads._close()
        await c1.submit()
        c1.services.events._forget()
        c1.services.events._tell()
        assert await stream.rest() == []
    reply = await c1.http.get("/events")
    assert (reply.status_code, reply.json()["code"]) == (503, "store_unavailable")


def _away() -> object:
    raise OSError("no disk")


async def test_without_streams_nothing_is_asked(c1: Composite) -> None:
    await c1.submit()
    await asyncio.sleep(0)
    assert c1.moderator.written_calls == 0
    hub: EventHub = c1.services.events
    assert hub.alive
    async with a_stream(c1.app, "/events", ADMIN_KEY) as stream:
        await c1.submit()
        await stream.take(1)
    assert c1.moderator.written_calls >= 1


async def test_an_event_that_a_client_left_alone_is_not_lost_with_it(c1: Composite) -> None:
    stream: StreamClient
    async with a_stream(c1.app, "/events", ADMIN_KEY) as stream:
        await c1.submit()
        await stream.take(1)
    assert in_progress(c1) == 0
    assert len(await history(c1)) == 1

from __future__ import annotations

from itertools import islice

import httpx
import pytest

from hcna_ray.client import AsyncClient, Client, NotFound, TaskEvent, UnexpectedAnswer
from hcna_ray.client.events import EventParser
from tests.support.fake_c1 import FakeC1, Reply, problem
from tests.support.fake_time import FakeTime

STREAM = {"content-type": "text/event-stream"}
ONE = b'id: 1-7\ndata: {"task_id":"t","kind":"started","status":"running"}\n\n'


def test_a_message_may_come_in_any_pieces() -> None:
    text = b": hello\nretry: 1000\n\n" + ONE + b": alive\nid: 1-9\n\n"
    for size in range(1, len(text) + 1):
        parser = EventParser()
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        (event,) = [event for piece in pieces for event in parser.feed(piece)]
        assert (event.id, event.kind, event.status) == ("1-7", "started", "running")
        assert parser.place == "1-9"


def test_half_of_a_message_is_not_continued_on_another_connection() -> None:
    parser = EventParser("1-6")
    assert list(parser.feed(ONE[:20])) == []
    parser.begin()
    assert [event.id for event in parser.feed(ONE)] == ["1-7"]


@pytest.mark.parametrize("text", [b"data: x\n\n", b"data: []\n\n", b"data: {}\n\n"])
def test_what_is_no_event_is_an_error(client: Client, c1: FakeC1, text: bytes) -> None:
    c1.script.append(Reply(200, text, STREAM))
    with pytest.raises(UnexpectedAnswer):
        list(client.events(follow=False))


def test_a_message_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcna_ray.client.events.MESSAGE_BYTES_MAX", 100)
    with pytest.raises(ValueError, match="100 bytes"):
        list(EventParser().feed(b"data: " + b"x" * 100))


def test_every_event_comes_once_over_connections_that_break(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    for number in range(7):
        c1.tell(f"task-{number}", "accepted")
    c1.events_at_once = 2
    c1.script += [httpx.ConnectError("refused"), problem(503, "overloaded", retry_after_s=3)]

    seen = list(islice(client.events(after="0", kind="accepted,started", queue=None), 7))

    assert [event.id for event in seen] == [f"1-{number}" for number in range(1, 8)]
    first, *_, last = c1.requests
    assert first.query == {"after": "0", "kind": "accepted,started"}
    assert first.headers["accept"] == "text/event-stream"
    assert "last-event-id" not in first.headers
    assert last.headers["last-event-id"] == "1-6"
    assert 3.0 in time.pauses


def test_what_there_is_ends_without_following(client: Client, c1: FakeC1) -> None:
    c1.tell("task-1", "accepted")
    (event,) = client.events(follow=False)
    assert event.raw["kind"] == "accepted"
    assert c1.requests[0].query == {"follow": "false"}


def test_a_task_is_followed_to_its_end(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.tell(handle.id, "accepted")
    c1.tell(handle.id, "completed", worker="W1", attempt=1)

    seen = list(handle.events())

    assert [(event.kind, event.worker, event.attempt) for event in seen] == [
        ("accepted", None, None),
        ("completed", "W1", 1),
    ]
    assert c1.requests[-1].path == f"/tasks/{handle.id}/events"
    assert c1.requests[-1].headers["last-event-id"] == "1-2"


def test_a_restore_is_told(client: Client, c1: FakeC1) -> None:
    body = b'event: reset\nid: 2-3\ndata: {"reason": "restored"}\n\n'
    c1.script.append(Reply(200, body, STREAM))
    (event,) = client.events(follow=False)
    assert event == TaskEvent(id="2-3", kind="reset", detail="restored", raw={"reason": "restored"})


def test_a_refusal_is_raised(client: Client, c1: FakeC1) -> None:
    c1.script.append(problem(404, "task_not_found"))
    with pytest.raises(NotFound):
        next(client.events("task-of-nobody"))


async def test_the_asynchronous_client_does_the_same(
    async_client: AsyncClient, c1: FakeC1, time: FakeTime
) -> None:
    handle = await async_client.submit("hold")
    for kind in ("accepted", "started", "completed"):
        c1.tell(handle.id, kind)
    c1.events_at_once = 1
    c1.script.append(httpx.ConnectError("refused"))

    seen = [event.kind async for event in handle.events()]

    assert seen == ["accepted", "started", "completed"]
    everything = [event.id async for event in async_client.events(follow=False)]
    assert everything == ["1-1"]
    await async_client.close()

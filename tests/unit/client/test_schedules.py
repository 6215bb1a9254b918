from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from hcna_ray.client import AsyncClient, Client, Conflict
from tests.support.fake_c1 import FakeC1, json_reply, problem

SCHEDULE = {"name": "nightly", "cron": "@daily"}


def test_what_is_not_given_is_not_sent(client: Client, c1: FakeC1) -> None:
    c1.script += [json_reply(201, SCHEDULE), json_reply(201, SCHEDULE)]
    assert client.create_schedule("nightly", "@daily", "echo") == SCHEDULE
    task = {"task_type": "echo", "payload": {}}
    assert c1.requests[-1].json == {"name": "nightly", "cron": "@daily", "task": task}

    start = datetime(2026, 1, 1, tzinfo=UTC)
    client.create_schedule("nightly", "@daily", "echo", starts_at=start, queue="night")
    sent = c1.requests[-1].json
    assert sent["starts_at"].startswith("2026-01-01T00:00:00")
    assert sent["task"]["queue"] == "night"


def test_a_change_is_put_where_it_belongs(client: Client, c1: FakeC1) -> None:
    c1.script.append(json_reply(200, SCHEDULE))
    client.change_schedule("nightly", "@daily", "echo", {"n": 1}, overlap="allow", owner="al")
    sent = c1.requests[-1]
    assert (sent.method, sent.path, sent.query) == ("PUT", "/schedules/nightly", {"owner": "al"})
    assert sent.json == {
        "cron": "@daily",
        "overlap": "allow",
        "task": {"task_type": "echo", "payload": {"n": 1}},
    }


def test_a_run_gives_a_task_to_hold(client: Client, c1: FakeC1) -> None:
    task = client.submit("echo", {"n": 1})
    c1.script.append(json_reply(202, {"task_id": task.id, "status": "queued"}))
    assert client.run_schedule("nightly").result()["n"] == 1
    c1.script.append(problem(409, "schedule_busy", "task-1 has not ended"))
    with pytest.raises(Conflict, match="task-1"):
        client.run_schedule("nightly")


def test_the_other_client_does_the_same(async_client: AsyncClient, c1: FakeC1) -> None:
    async def scenario() -> None:
        async with async_client as client:
            task = await client.submit("echo")
            c1.script += [
                json_reply(201, SCHEDULE),
                json_reply(200, SCHEDULE),
                json_reply(200, {"schedules": [SCHEDULE], "next_cursor": None}),
                *[json_reply(200, SCHEDULE)] * 3,
                json_reply(202, {"task_id": task.id, "status": "queued"}),
                json_reply(200, SCHEDULE),
            ]
            assert await client.create_schedule("nightly", "@daily", "echo") == SCHEDULE
            assert await client.change_schedule("nightly", "@daily", "echo") == SCHEDULE
            assert await client.schedules() == [SCHEDULE]
            assert await client.schedule("nightly") == SCHEDULE
            assert await client.pause_schedule("nightly") == SCHEDULE
            assert await client.resume_schedule("nightly") == SCHEDULE
            assert (await client.run_schedule("nightly")).id == task.id
            assert await client.delete_schedule("nightly") == SCHEDULE

    asyncio.run(scenario())
    assert [(seen.method, seen.path) for seen in c1.requests[1:]] == [
        ("POST", "/schedules"),
        ("PUT", "/schedules/nightly"),
        ("GET", "/schedules"),
        ("GET", "/schedules/nightly"),
        ("POST", "/schedules/nightly/pause"),
        ("POST", "/schedules/nightly/resume"),
        ("POST", "/schedules/nightly/run"),
        ("DELETE", "/schedules/nightly"),
    ]

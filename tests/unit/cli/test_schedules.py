from __future__ import annotations

import json
from typing import Any

from tests.support.fake_c1 import FakeC1, json_reply
from tests.unit.cli.conftest import Hcna

SCHEDULE: dict[str, Any] = {
    "name": "nightly",
    "owner": "alice",
    "cron": "0 3 * * *",
    "timezone": "Europe/Berlin",
    "task": {"task_type": "echo", "payload": {"n": 1}},
    "overlap": "skip",
    "catch_up_s": 3600.0,
    "paused": False,
    "created_at": "2026-01-01T00:00:00.000Z",
    "changed_at": "2026-01-01T00:00:00.000Z",
    "next_at": ["2026-01-02T02:00:00.000Z", "2026-01-03T02:00:00.000Z"],
    "last_at": "2026-01-01T02:00:00.000Z",
    "last_task_id": "task-1",
    "waiting_at": None,
    "started": 7,
    "skipped": 2,
    "missed": 1,
    "last_reason": {"code": "queue_full", "message": "no room", "at": "2026-01-01T02:00:00.000Z"},
}


def test_one_is_created(hcna: Hcna, c1: FakeC1) -> None:
    c1.script.append(json_reply(201, SCHEDULE))
    told = hcna(
        *("schedules", "create", "--cron", "0 3 * * *", "--timezone", "Europe/Berlin"),
        *("--name", "nightly", "--overlap", "queue_one", "--catch-up", "60", "--attempts", "3"),
        *("--queue", "night", "--metadata", "a=b", "echo", "n=1"),
    )
    assert told.code == 0, told.err
    (sent,) = c1.requests
    assert (sent.method, sent.path) == ("POST", "/schedules")
    assert sent.json == {
        "name": "nightly",
        "cron": "0 3 * * *",
        "timezone": "Europe/Berlin",
        "overlap": "queue_one",
        "catch_up_s": 60.0,
        "task": {
            "task_type": "echo",
            "payload": {"n": 1},
            "queue": "night",
            "retry": {"max_attempts": 3},
            "metadata": {"a": "b"},
        },
    }
    assert "2026-01-02T02:00:00.000Z" in told.out


def test_its_name_is_its_type_unless_said(hcna: Hcna, c1: FakeC1) -> None:
    c1.script.append(json_reply(201, SCHEDULE))
    assert hcna("schedules", "create", "--cron", "@daily", "--paused", "echo").code == 0
    assert c1.requests[-1].json["name"] == "echo"
    assert c1.requests[-1].json["paused"] is True


def test_they_are_listed_page_by_page(hcna: Hcna, c1: FakeC1) -> None:
    c1.script.append(json_reply(200, {"schedules": [], "next_cursor": None}))
    assert "there is no schedule" in hcna("schedules", "list").err
    paused = SCHEDULE | {"name": "weekly", "paused": True, "next_at": [], "last_task_id": None}
    pages = [
        json_reply(200, {"schedules": [SCHEDULE], "next_cursor": "alice/nightly"}),
        json_reply(200, {"schedules": [paused], "next_cursor": None}),
    ]
    c1.script += pages
    told = hcna("schedules", "list", "--owner", "alice").out
    for word in ("nightly", "alice", "2026-01-02T02:00:00.000Z", "weekly", "paused", "task-1"):
        assert word in told
    assert c1.requests[-1].query == {"owner": "alice", "cursor": "alice/nightly"}
    c1.script += pages
    assert json.loads(hcna("schedules", "list", "--json").out) == {"schedules": [SCHEDULE, paused]}


def test_one_is_shown_with_what_became_of_it(hcna: Hcna, c1: FakeC1) -> None:
    c1.script.append(json_reply(200, SCHEDULE))
    told = hcna("schedules", "show", "nightly").out
    for word in ("0 3 * * * (Europe/Berlin)", "echo in queue default", "7 started", "no room"):
        assert word in told
    c1.script.append(json_reply(200, SCHEDULE))
    assert json.loads(hcna("schedules", "show", "nightly", "--json").out) == SCHEDULE


def test_it_is_paused_resumed_run_and_deleted(hcna: Hcna, c1: FakeC1) -> None:
    for verb, method, path in (
        ("pause", "POST", "/schedules/nightly/pause"),
        ("resume", "POST", "/schedules/nightly/resume"),
        ("delete", "DELETE", "/schedules/nightly"),
    ):
        c1.script.append(json_reply(200, SCHEDULE))
        told = hcna("schedules", verb, "nightly", "--owner", "alice")
        assert told.code == 0, told.err
        sent = c1.requests[-1]
        assert (sent.method, sent.path, sent.query) == (method, path, {"owner": "alice"})
        c1.script.append(json_reply(200, SCHEDULE))
        assert json.loads(hcna("schedules", verb, "nightly", "--json").out) == SCHEDULE

    accepted = {"task_id": "task-9", "status": "queued", "message": "submitted"}
    c1.script.append(json_reply(202, accepted))
    assert hcna("schedules", "run", "nightly").out == "task-9\n"
    assert c1.requests[-1].headers["idempotency-key"]
    c1.script.append(json_reply(202, accepted))
    assert json.loads(hcna("schedules", "run", "nightly", "--json").out) == {"task_id": "task-9"}

"""Schedules over HTTP: created, shown, changed, run, and whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from hcna_ray.api import schemas
from tests.support.builders import T0
from tests.support.c1 import ADMIN_KEY, Composite, a_composite

#: The first full hour behind `T0`.
HOUR = T0 + 3600 - T0 % 3600
GOOD = {"name": "nightly", "cron": "0 * * * *", "task": {"task_type": "echo", "queue": "lab"}}


async def create(c1: Composite, **changes: Any) -> dict[str, Any]:
    reply = await c1.http.post("/schedules", json=GOOD | changes)
    assert reply.status_code == 201, reply.text
    schemas.ScheduleOut.model_validate(reply.json())
    view: dict[str, Any] = reply.json()
    return view


async def show(c1: Composite, name: str = "nightly", **params: str) -> dict[str, Any]:
    reply = await c1.http.get(f"/schedules/{name}", params=params)
    assert reply.status_code == 200, reply.text
    view: dict[str, Any] = reply.json()
    return view


def until(c1: Composite, at: float) -> None:
    """Let time pass until an instant, and the moderator look."""
    desk = c1.moderator.desk
    desk.tick(at - desk.clock.now())


def refused(reply: httpx.Response, status: int, code: str) -> None:
    assert (reply.status_code, reply.json()["code"]) == (status, code)


async def test_one_is_created_and_shown_with_its_next_instants(c1: Composite) -> None:
    made = await create(c1, timezone="Europe/Berlin", overlap="queue_one", catch_up_s=60)
    assert made == await show(c1)
    assert made["owner"] == "owner"
    assert made["task"] == GOOD["task"]
    assert (made["overlap"], made["catch_up_s"], made["paused"]) == ("queue_one", 60, False)
    assert len(made["next_at"]) == 5
    assert made["next_at"][0] < made["next_at"][1]
    assert (made["started"], made["last_task_id"], made["last_reason"]) == (0, None, None)


async def test_its_task_says_where_it_comes_from(c1: Composite) -> None:
    await create(c1, task={"task_type": "echo", "payload": {"n": 1}, "metadata": {"m": 2}})
    until(c1, HOUR + 1)

    view = await show(c1)
    task = await c1.task(view["last_task_id"], payload="true")
    schemas.TaskOut.model_validate(task)
    assert task["schedule"] == {"name": "nightly", "instant": view["last_at"]}
    assert (task["payload"], task["metadata"]) == ({"n": 1}, {"m": 2})
    assert view["started"] == 1
    assert view["next_at"][0] > view["last_at"]
    (listed,) = (await c1.http.get("/tasks")).json()["tasks"]
    assert listed["schedule"] == task["schedule"]
    other = await c1.task(await c1.submit())
    assert other["schedule"] is None


async def test_to_send_the_same_again_is_harmless_and_another_is_a_conflict(c1: Composite) -> None:
    made = await create(c1)
    c1.moderator.desk.clock.advance(60)
    same = {"task": {"queue": "lab", "task_type": "echo"}, "cron": "0 * * * *", "name": "nightly"}
    again = await c1.http.post("/schedules", json=same)
    assert again.status_code == 201
    assert again.json()["created_at"] == made["created_at"]
    reply = await c1.http.post("/schedules", json=GOOD | {"cron": "@daily"})
    refused(reply, 409, "schedule_exists")


async def test_what_went_by_since_its_start_is_made_up_for(c1: Composite) -> None:
    until(c1, HOUR + 60)
    start = "2001-01-01T00:00:00Z"
    await create(c1, starts_at=start, catch_up_s=7200, overlap="allow")
    c1.moderator.desk.tick()
    view = await show(c1)
    assert view["started"] == 2
    assert view["missed"] == 1000
    assert view["last_reason"]["code"] == "too_late"


async def test_one_that_starts_later_does_nothing_before(c1: Composite) -> None:
    made = await create(c1, starts_at="2098-01-01T00:00:00Z")
    assert made["next_at"][0] == "2098-01-01T00:00:00.000Z"
    until(c1, HOUR + 60)
    assert (await show(c1))["started"] == 0


async def test_a_change_keeps_counts(c1: Composite) -> None:
    made = await create(c1)
    until(c1, HOUR)
    asked = {"cron": "@daily", "task": {"task_type": "sleep", "payload": {"seconds": 1}}}
    reply = await c1.http.put("/schedules/nightly", json=asked)
    assert reply.status_code == 200, reply.text
    view = reply.json()
    assert (view["cron"], view["task"], view["started"]) == ("@daily", asked["task"], 1)
    assert view["created_at"] == made["created_at"] < view["changed_at"]
    refused(await c1.http.put("/schedules/other", json=asked), 404, "schedule_not_found")


async def test_pause_resume_and_delete(c1: Composite) -> None:
    await create(c1)
    paused = (await c1.http.post("/schedules/nightly/pause")).json()
    assert (paused["paused"], paused["next_at"]) == (True, [])
    until(c1, HOUR + 60)
    resumed = (await c1.http.post("/schedules/nightly/resume")).json()
    assert (resumed["paused"], resumed["started"], resumed["missed"]) == (False, 0, 0)
    gone = await c1.http.delete("/schedules/nightly")
    assert gone.json()["name"] == "nightly"
    refused(await c1.http.delete("/schedules/nightly"), 404, "schedule_not_found")
    lines = (await c1.http.get("/admin/audit")).json()["entries"]
    assert [line["action"] for line in lines[::-1] if line["action"].startswith("sched")] == [
        *("schedule.create", "schedule.pause", "schedule.resume", "schedule.delete")
    ]
    assert {line["target"] for line in lines} == {"owner/nightly"}


class TestRun:
    async def test_it_submits_now(self, c1: Composite) -> None:
        await create(c1)
        reply = await c1.http.post("/schedules/nightly/run")
        assert reply.status_code == 202
        task = await c1.task(reply.json()["task_id"])
        assert task["schedule"]["name"] == "nightly"
        refused(await c1.http.post("/schedules/nightly/run"), 409, "schedule_busy")

    async def test_under_one_key_it_runs_once(self, c1: Composite) -> None:
        await create(c1)
        key = {"Idempotency-Key": "k"}
        first = (await c1.http.post("/schedules/nightly/run", headers=key)).json()
        again = (await c1.http.post("/schedules/nightly/run", headers=key)).json()
        assert again == first | {"duplicate": True}

    async def test_it_counts_against_the_quota(self, c1: Composite) -> None:
        c1.keys.add("hcna_carl", name="carl", role="submitter", quota=1)
        async with c1.client("hcna_carl") as carl:
            assert (await carl.post("/schedules", json=GOOD)).status_code == 201
            await carl.post("/tasks", json={"task_type": "echo"})
            refused(await carl.post("/schedules/nightly/run"), 429, "quota")


class TestOwners:
    async def test_names_are_each_owners_own(self, c1: Composite) -> None:
        c1.keys.add("hcna_alice", name="alice", role="submitter")
        async with c1.client("hcna_alice") as alice:
            assert (await alice.post("/schedules", json=GOOD)).status_code == 201
            await create(c1, cron="@daily")
            mine = (await alice.get("/schedules")).json()["schedules"]
            assert [(one["owner"], one["cron"]) for one in mine] == [("alice", "0 * * * *")]
            theirs = await alice.get("/schedules", params={"owner": "owner"})
            assert theirs.json()["schedules"] == []
            refused(
                await alice.get("/schedules/nightly", params={"owner": "owner"}),
                *(404, "schedule_not_found"),
            )
        everybodys = (await c1.http.get("/schedules")).json()["schedules"]
        assert [one["owner"] for one in everybodys] == ["alice", "owner"]
        assert (await show(c1, owner="alice"))["cron"] == "0 * * * *"
        assert (await show(c1))["cron"] == "@daily"

    async def test_what_an_operator_changes_stays_its_owners(self, c1: Composite) -> None:
        alice = c1.keys.add("hcna_alice", name="alice", role="submitter")
        async with c1.client("hcna_alice") as http:
            await http.post("/schedules", json=GOOD)
        asked = {"cron": "30 * * * *", "task": {"task_type": "echo"}}
        params = {"owner": "alice"}
        reply = await c1.http.put("/schedules/nightly", json=asked, params=params)
        assert reply.json()["owner"] == "alice"
        await c1.http.post("/schedules/nightly/resume", params=params)
        stored = c1.moderator.desk.store.get_schedule(("alice", "nightly"))
        assert stored is not None
        assert (stored.key_sha256, stored.spec.principal) == (alice.sha256, "alice")
        assert stored.spec.confined

    async def test_an_owner_who_resumes_puts_it_on_another_key(self, c1: Composite) -> None:
        c1.keys.add("hcna_alice", name="alice", role="submitter")
        new = c1.keys.add("hcna_new", name="alice-2", role="submitter", owner="alice")
        async with c1.client("hcna_alice") as http:
            await http.post("/schedules", json=GOOD)
        async with c1.client("hcna_new") as http:
            assert (await http.post("/schedules/nightly/resume")).status_code == 200
        stored = c1.moderator.desk.store.get_schedule(("alice", "nightly"))
        assert stored is not None
        assert stored.key_sha256 == new.sha256

    @pytest.mark.parametrize(
        ("creates", "resumes", "confined"),
        [
            ("operator", "operator", False),
            ("operator", "submitter", True),
            ("submitter", "operator", True),
        ],
    )
    async def test_the_lesser_of_two_keys_says_what_its_tasks_may_read(
        self, c1: Composite, creates: str, resumes: str, confined: bool
    ) -> None:
        c1.keys.add("hcna_first", name="alice-1", role=creates, owner="alice")
        c1.keys.add("hcna_second", name="alice-2", role=resumes, owner="alice")
        async with c1.client("hcna_first") as http:
            await http.post("/schedules", json=GOOD)
        async with c1.client("hcna_second") as http:
            assert (await http.post("/schedules/nightly/resume")).status_code == 200
        stored = c1.moderator.desk.store.get_schedule(("alice", "nightly"))
        assert stored is not None
        assert stored.spec.confined is confined

    async def test_a_viewer_sees_an_outline_of_others(self, c1: Composite) -> None:
        await create(c1, task={"task_type": "echo", "payload": {"secret": "x"}})
        c1.keys.add("hcna_eve", name="eve", role="viewer")
        async with c1.client("hcna_eve") as eve:
            view = (await eve.get("/schedules/nightly", params={"owner": "owner"})).json()
        schemas.ScheduleOut.model_validate(view)
        assert view["task"] == {"task_type": "echo", "queue": "default"}
        assert view["outline"] is True


class TestListing:
    async def test_pages_follow_one_another(self, c1: Composite) -> None:
        for number in range(5):
            await create(c1, name=f"s{number}")
        names: list[str] = []
        params: dict[str, str] = {"limit": "2"}
        while True:
            page = (await c1.http.get("/schedules", params=params)).json()
            schemas.SchedulesOut.model_validate(page)
            names += [one["name"] for one in page["schedules"]]
            if page["next_cursor"] is None:
                break
            params["cursor"] = page["next_cursor"]
        assert names == [f"s{number}" for number in range(5)]

    async def test_a_key_with_scopes_sees_those_inside(self, c1: Composite) -> None:
        for number in range(6):
            queue = "lab" if number % 2 else "night"
            await create(c1, name=f"s{number}", task={"task_type": "echo", "queue": queue})
        c1.keys.add("hcna_lab", name="lab", role="operator", queues=("lab",))
        async with c1.client("hcna_lab") as lab:
            page = (await lab.get("/schedules", params={"limit": "2"})).json()
            assert [one["name"] for one in page["schedules"]] == ["s1", "s3"]
            params = {"limit": "2", "cursor": page["next_cursor"]}
            rest = (await lab.get("/schedules", params=params)).json()
        assert [one["name"] for one in rest["schedules"]] == ["s5"]
        assert rest["next_cursor"] is None


async def test_there_are_only_so_many(tmp_path: Path) -> None:
    async with a_composite(tmp_path, schedules_of_one_max=1) as c1:
        await create(c1)
        reply = await c1.http.post("/schedules", json=GOOD | {"name": "other"})
        refused(reply, 409, "too_many_schedules")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_a_name_that_cannot_be_one_is_not_there(c1: Composite, method: str) -> None:
    reply = await c1.http.request(method, "/schedules/a%00b", json={"cron": "@daily", "task": {}})
    refused(reply, 404, "schedule_not_found")


async def test_a_moderator_that_is_away_changes_nothing(c1: Composite) -> None:
    c1.moderator.kill()
    reply = await c1.http.post("/schedules", json=GOOD)
    refused(reply, 503, "moderator_unavailable")
    async with c1.client(ADMIN_KEY) as http:
        assert (await http.get("/schedules")).json()["schedules"] == []

"""Webhooks over HTTP: named with a task, refused where they lead inside, signed for each alone."""

from __future__ import annotations

import json

import pytest

from hcna_ray.security.outbound import ensure_master, secret_of
from tests.support.c1 import Composite
from tests.support.ssrf import bad_urls

URL = "https://hooks.example.org/a?token=hidden"


async def test_the_end_of_a_task_is_stored_for_its_webhook(c1: Composite) -> None:
    task_id = await c1.submit(webhook=URL, metadata={"order": 7})
    await c1.submit()
    assert (await c1.http.get("/admin/webhooks")).json() == {"waiting": []}

    await c1.http.delete(f"/tasks/{task_id}")

    reply = await c1.http.get("/admin/webhooks")
    (one,) = reply.json()["waiting"]
    assert (one["task_id"], one["target"], one["tries"]) == (task_id, "hooks.example.org", 0)
    assert one["due_at"] == one["created_at"]
    assert "hidden" not in reply.text


async def test_a_batch_names_webhooks_too(c1: Composite) -> None:
    items = [
        {"task_type": "echo", "webhook": URL},
        {"task_type": "echo", "webhook": "https://[::1]/"},
    ]
    reply = await c1.http.post("/tasks/batch", json={"tasks": items})
    good, bad = reply.json()["results"]
    assert reply.status_code == 202
    assert good["task_id"]
    assert bad["error"]["status"] == 422


async def test_how_many_are_listed_has_a_limit(c1: Composite) -> None:
    for _ in range(3):
        await c1.http.delete(f"/tasks/{await c1.submit(webhook=URL)}")
    reply = await c1.http.get("/admin/webhooks", params={"limit": 2})
    assert len(reply.json()["waiting"]) == 2


@pytest.mark.parametrize("url", bad_urls(443).values(), ids=bad_urls(443).keys())
async def test_a_url_that_leads_inside_is_refused_and_nothing_stored(
    c1: Composite, url: str
) -> None:
    body = json.dumps({"task_type": "echo", "webhook": url})
    reply = await c1.http.post("/tasks", content=body)
    assert reply.status_code == 422
    assert "webhook" in reply.text
    assert (await c1.http.get("/tasks")).json()["tasks"] == []


async def test_the_same_key_with_another_webhook_is_another_request(c1: Composite) -> None:
    headers = {"Idempotency-Key": "k"}
    body = {"task_type": "echo", "webhook": URL}
    first = await c1.http.post("/tasks", json=body, headers=headers)
    again = await c1.http.post("/tasks", json=body, headers=headers)
    other = await c1.http.post("/tasks", json={"task_type": "echo"}, headers=headers)
    assert first.json()["task_id"] == again.json()["task_id"]
    assert other.status_code == 409


async def test_everybody_gets_a_secret_of_their_own(c1: Composite) -> None:
    keys = [f"hcna_{letter * 43}" for letter in "abc"]
    for key, name, owner in zip(
        keys, ("alice", "laptop", "bob"), ("alice", "alice", "bob"), strict=True
    ):
        c1.keys.add(key, name=name, role="submitter", owner=owner)

    secrets = []
    for key in keys:
        reply = await c1.http.get("/webhooks/secret", headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 200
        assert reply.headers["cache-control"] == "no-store"
        secrets.append(reply.json()["secret"])

    assert secrets[0] == secrets[1] != secrets[2]
    master = ensure_master(c1.services.settings.keys_dir)
    assert secrets[0] == secret_of(master, "alice")


async def test_a_secret_that_cannot_be_read_is_said(c1: Composite) -> None:
    keys_dir = c1.services.settings.keys_dir
    ensure_master(keys_dir)
    (keys_dir / "webhook.key").write_text("broken")
    reply = await c1.http.get("/webhooks/secret")
    assert reply.status_code == 503
    assert "webhook.key" in reply.json()["detail"]

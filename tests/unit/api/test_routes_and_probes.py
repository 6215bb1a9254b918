from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.routing import BaseRoute

from hcna_ray.api import schemas
from hcna_ray.api.admission import Sort
from hcna_ray.api.app import declared_routes
from hcna_ray.api.policy import Check, rank_of
from hcna_ray.api.routing import Routes
from hcna_ray.core.errors import StoreUnavailable
from hcna_ray.runtime.messages import Goodbye, Heartbeat
from tests.support.c1 import USER_KEY, Composite, a_composite

OPEN = {
    "/health",
    "/ready",
    "/live",
    "/metrics",
    "/metrics/targets",
    "/status",
    "/openapi.json",
    "/docs",
}
#: Those of them that are pages.
PAGES = {"/ui", "/ui/{file}"}


def flattened(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        if inner is not None:
            yield from flattened(inner.routes)
            continue
        for method in getattr(route, "methods", None) or ():
            yield method, route.path  # type: ignore[attr-defined]


def test_every_route_of_the_application_has_a_policy(c1: Composite) -> None:
    declared = {(route.method, route.path): route for route in declared_routes()}
    served = set(flattened(c1.app.routes))

    assert served == set(declared)
    assert {route.path for route in declared.values() if route.policy.role is None} == OPEN | PAGES
    admin = {name for name, route in declared.items() if route.policy.role == "admin"}
    assert admin == {
        ("POST", "/admin/send-intent"),
        ("GET", "/admin/audit"),
        ("GET", "/admin/keys"),
        ("GET", "/admin/webhooks"),
        ("DELETE", "/workers/{name}"),
    }


def test_a_route_without_a_policy_cannot_be_declared() -> None:
    answers: dict[int, type[BaseModel] | str] = {200: schemas.LiveOut}
    with pytest.raises(TypeError, match="policy"):
        Routes("new").add("GET", "/new", sort=Sort.READ, answers=answers)  # type: ignore[call-arg]


def test_what_a_path_names_is_checked() -> None:
    """Whoever adds a route on a task, a queue or an artifact declares that it is held."""
    named = {
        "{task_id}": Check.TASK,
        "{sha256}": Check.ARTIFACT,
        "/queues/{name}": Check.QUEUE,
        "/schedules/{name}": Check.SCHEDULE,
    }
    for route in declared_routes():
        for part, check in named.items():
            held = (check, Check.OUTPUT) if check is Check.TASK else (check,)
            assert (part in route.path) <= (route.policy.check in held), route
        if route.method not in ("GET", "HEAD") and route.path != "/tasks/wait":
            assert rank_of(route.policy.role) >= rank_of("submitter"), route


async def test_without_a_key_only_probes_and_the_reference_answer(c1: Composite) -> None:
    async with c1.client(None) as stranger, c1.client(USER_KEY) as guest:
        for route in declared_routes():
            path = re.sub(r"{\w+}", "x", route.path)
            status = (await stranger.request(route.method, path)).status_code
            assert (status == 401) == (route.policy.role is not None), route
            if rank_of(route.policy.role) > rank_of("submitter"):
                assert (await guest.request(route.method, path)).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-API-Key": USER_KEY}, 200),
        ({"Authorization": f"bearer {USER_KEY}"}, 200),
        ({"Authorization": f"Bearer {USER_KEY}", "X-API-Key": USER_KEY}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"X-API-Key": "x" * 5000}, 401),
        ({"X-API-Key": ""}, 401),
        ({"Authorization": f"Basic {USER_KEY}"}, 401),
    ],
)
async def test_how_a_key_may_be_sent(c1: Composite, headers: dict[str, str], status: int) -> None:
    async with c1.client(None) as http:
        assert (await http.get("/workers", headers=headers)).status_code == status


async def test_a_full_budget_refuses_its_own_sort_only(tmp_path: Path) -> None:
    async with a_composite(tmp_path, limits={"reads_max": 1}) as c1:
        c1.services.admission.take(Sort.READ)
        refused = await c1.http.get("/tasks")
        accepted = await c1.http.post("/tasks", json={"task_type": "echo"})
        c1.services.admission.give(Sort.READ)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert accepted.status_code == 202
        assert (await c1.http.get("/tasks")).status_code == 200


async def test_health_with_and_without_moderator_and_workers(c1: Composite) -> None:
    c1.moderator.join()
    health = (await c1.http.get("/health")).json()
    schemas.HealthOut.model_validate(health)
    assert health["status"] == "healthy"
    assert health["node_id"] == "HCNA-C1--prod--home--v1.0"
    assert (health["moderator_connected"], health["worker_nodes"]) == (True, 1)
    assert (await c1.http.get("/ready")).json() == {"ready": True, "reasons": []}

    c1.moderator.kill()
    c1.moderator.desk.clock.advance(1)
    health = (await c1.http.get("/health")).json()
    assert (health["status"], health["moderator_connected"]) == ("degraded", False)
    ready = await c1.http.get("/ready")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["M1 does not answer"])
    assert (await c1.http.get("/live")).json() == {"alive": True}
    workers = (await c1.http.get("/workers")).json()
    assert workers["moderator_connected"] is False
    assert [worker["name"] for worker in workers["workers"]] == ["W1"]

    # That it did not answer is not kept for the next who asks, in the same half second.
    c1.moderator.revive()
    assert (await c1.http.get("/health")).json()["moderator_connected"] is True


async def test_status_shows_everything_at_a_glance(c1: Composite) -> None:
    c1.moderator.join()
    await c1.submit(queue="q")
    status = (await c1.http.get("/status")).json()
    schemas.StatusOut.model_validate(status)
    assert status["queues"] == {"q": {"queued": 1}}
    assert status["moderator"]["workers_online"] == 1
    assert "echo" in status["task_types"]
    assert status["totals"] == {
        "accepted": 1,
        **dict.fromkeys(("completed", "failed", "cancelled", "expired"), 0),
    }


async def test_status_tells_a_store_that_cannot_be_read_from_one_that_is_empty(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = (await c1.http.get("/status")).json()
    assert (status["queues"], status["store_readable"]) == ({}, True)
    await c1.submit(queue="q")

    def gone(_: object) -> None:
        raise StoreUnavailable("the store cannot be read")

    with monkeypatch.context() as away:
        away.setattr(c1.services.reads, "_call", gone)
        reply = await c1.http.get("/status")
    schemas.StatusOut.model_validate(reply.json())
    told = [reply.json()[name] for name in ("store_readable", "queues", "totals")]
    assert (reply.status_code, told) == (200, [False, {}, None])
    assert reply.json()["moderator"] is not None  # M1 has its own way to the store.
    assert (await c1.http.get("/status")).json()["store_readable"] is True


async def test_status_tells_a_silent_m1_from_one_that_waits_for_its_store(c1: Composite) -> None:
    async def told() -> tuple[bool, bool]:
        c1.services.cache.forget()
        status = (await c1.http.get("/status")).json()
        return status["moderator"] is not None, status["moderator_waits_for_store"]

    assert await told() == (True, False)
    c1.moderator.refuses = StoreUnavailable("M1 cannot open its task store", 5)
    assert await told() == (False, True)
    # Many ask at once, and each finds what the last look has found.
    assert await asyncio.gather(*(told() for _ in range(20))) == [(False, True)] * 20
    c1.moderator.refuses = None
    c1.moderator.kill()
    assert await told() == (False, False)
    c1.moderator.revive()
    assert await told() == (True, False)


async def test_totals_are_not_for_strangers(c1: Composite) -> None:
    async with c1.client(None) as stranger:
        assert (await stranger.get("/status")).json()["totals"] is None


async def test_metrics_have_the_names_dashboards_ask_for(c1: Composite) -> None:
    for _ in range(3):
        await c1.submit()
    c1.moderator.run_all(c1.moderator.join())
    c1.moderator.desk.clock.advance(1)

    reply = await c1.http.get("/metrics")

    assert reply.headers["content-type"].startswith("text/plain")
    lines = reply.text.splitlines()
    for line in (
        "tasks_completed_total 3.0",
        'hcna_tasks_total{state="completed"} 3.0',
        'hcna_tasks_total{state="failed"} 0.0',
        'hcna_task_attempts_total{outcome="completed",task_type="echo"} 3.0',
        'hcna_tasks_accepted_total{queue="default",task_type="echo"} 3.0',
        'hcna_workers{state="online"} 1.0',
        "hcna_moderator_up 1.0",
        'hcna_http_requests_total{method="POST",route="/tasks",status="202"} 3.0',
    ):
        assert line in lines or line in [_sorted_labels(one) for one in lines], line
    assert "task-1" not in reply.text
    for name in (
        'hcna_task_schedule_to_start_seconds_count{task_type="echo"} 3.0',
        'hcna_attempt_duration_seconds_count{task_type="echo"} 3.0',
        'hcna_queue_oldest_age_seconds{queue="default"} 0.0',
        'hcna_queue_paused{queue="default"} 0.0',
        'hcna_worker_state{state="online",worker="W1"} 1.0',
        'hcna_worker_state{state="gone",worker="W1"} 0.0',
        'hcna_worker_last_seen_age_seconds{worker="W1"} 1.0',
        "hcna_lease_renewals_total 0.0",
        "hcna_store_refusals_total 0.0",
    ):
        assert name in lines or name in [_sorted_labels(one) for one in lines], name

    c1.moderator.kill()
    c1.moderator.desk.clock.advance(1)
    text = (await c1.http.get("/metrics")).text
    assert "hcna_moderator_up 0.0" in text
    assert "tasks_completed_total 3.0" in text


def _sorted_labels(line: str) -> str:
    match = re.match(r"(\w+){(.*)} (.*)", line)
    if match is None:
        return line
    return f"{match[1]}{{{','.join(sorted(match[2].split(',')))}}} {match[3]}"


async def test_workers_are_shown_and_taken_out_of_service(c1: Composite) -> None:
    c1.moderator.join()
    listed = (await c1.http.get("/workers")).json()
    schemas.WorkersOut.model_validate(listed)
    by_node = await c1.http.get("/workers/HCNA-W1--test")
    assert by_node.json()["name"] == "W1"
    for verb, state in (("cordon", "cordoned"), ("uncordon", "online"), ("drain", "draining")):
        reply = await c1.http.post(f"/workers/W1/{verb}")
        schemas.WorkerOut.model_validate(reply.json())
        assert (reply.status_code, reply.json()["state"]) == (200, state)
    audit = (await c1.http.get("/admin/audit?limit=2")).json()
    schemas.AuditOut.model_validate(audit)
    assert len(audit["entries"]) == 2
    assert audit["entries"][0]["principal"] == "owner"
    older = (await c1.http.get("/admin/audit", params={"cursor": audit["next_cursor"]})).json()
    assert older["entries"][0]["number"] < audit["entries"][-1]["number"]


async def test_an_intent_is_passed_on(c1: Composite) -> None:
    reply = await c1.http.post(
        "/admin/send-intent",
        json={"dst": "HCNA-W1--prod--home--v1.0", "intent": "test.ping", "payload": {}},
    )
    schemas.IntentOut.model_validate(reply.json())
    assert reply.json()["answer"] == {"pong": True}
    keys = (await c1.http.get("/admin/keys")).json()
    schemas.KeysOut.model_validate(keys)
    assert [key["name"] for key in keys["keys"]] == ["owner", "guest"]


async def test_405_names_every_method_of_the_path(c1: Composite) -> None:
    reply = await c1.http.put("/tasks")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, POST")


# -- the reference -------------------------------------------------------------------------------


async def test_openapi_describes_every_route_and_resolves(c1: Composite) -> None:
    document = (await c1.http.get("/openapi.json")).json()

    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    hidden = {("GET", path) for path in ("/openapi.json", "/docs", *PAGES)}
    assert described | hidden == {(route.method, route.path) for route in declared_routes()}
    names = set(document["components"]["schemas"])
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in names
    for route in declared_routes():
        operation = document["paths"].get(route.path, {}).get(route.method.lower())
        if operation is None:
            continue
        responses = operation["responses"]
        assert {"413", "422", "500", "503"} <= set(responses)
        assert ("401" in responses) == (route.path not in OPEN - {"/metrics", "/metrics/targets"})
        for status, response in responses.items():
            if int(status) >= 400 and not (route.path in OPEN and status == "503"):
                assert "application/problem+json" in response["content"], (route, status)
        ids = re.findall(r"{(\w+)}", route.path)
        named = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
        assert named == ids
    ids = [o["operationId"] for ms in document["paths"].values() for o in ms.values()]
    assert len(ids) == len(set(ids))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


class _Assets(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.add(value)


async def test_docs_need_nothing_from_outside_and_every_link_leads_somewhere(
    c1: Composite,
) -> None:
    reply = await c1.http.get("/docs")
    page = _Assets()
    page.feed(reply.text)

    assert reply.headers["content-type"].startswith("text/html")
    assert not page.tags & {"script", "link", "img", "iframe"}
    for link in page.links:
        assert link == "openapi.json" or link.removeprefix("#") in page.ids, link
    assert "/tasks/{task_id}/cancel" in reply.text


async def test_a_worker_that_left_is_forgotten(c1: Composite) -> None:
    worker = c1.moderator.join()
    refused = await c1.http.delete("/workers/W1")
    assert (refused.status_code, refused.json()["code"]) == (409, "worker_online")
    assert "hcna leave" in refused.json()["detail"]
    assert (await c1.http.delete("/workers/W9")).json()["code"] == "worker_not_found"

    c1.moderator.desk.ask(Goodbye(worker="W1", incarnation=worker.incarnation))
    c1.moderator.desk.clock.advance(1.0)
    assert (await c1.http.get("/workers/W1")).json()["state"] == "gone"
    reply = await c1.http.delete("/workers/W1")

    assert reply.status_code == 200
    schemas.WorkerOut.model_validate(reply.json())
    assert (await c1.http.get("/workers")).json()["workers"] == []


async def test_a_worker_in_contact_is_forgotten_by_force(c1: Composite) -> None:
    c1.moderator.join()

    assert (await c1.http.delete("/workers/W1?force=true")).status_code == 200
    assert (await c1.http.get("/workers")).json()["workers"] == []


async def test_without_the_moderator_the_store_says_who_is_away(c1: Composite) -> None:
    for name in ("W1", "W2", "W3"):
        c1.moderator.join(name)
    c1.moderator.desk.ask(Goodbye(worker="W2", incarnation="a"))
    for _ in range(40):
        c1.moderator.desk.ask(Heartbeat(worker="W3", incarnation="a", telemetry={}))
        c1.moderator.desk.tick(1.0)
    c1.moderator.kill()
    c1.moderator.desk.clock.advance(1.0)

    shown = (await c1.http.get("/workers")).json()

    states = {worker["name"]: worker["state"] for worker in shown["workers"]}
    assert states == {"W1": "asleep", "W2": "gone", "W3": "suspect"}

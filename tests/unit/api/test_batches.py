from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hcna_ray.api.schemas import BatchOut, WaitOut
from hcna_ray.api.submission import parents_first, resolve
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import TaskSpec
from tests.support.c1 import Composite


def ndjson(*items: dict[str, Any]) -> bytes:
    return b"\n".join(json.dumps(item).encode() for item in items)


async def test_bad_items_are_refused_and_good_ones_accepted(c1: Composite) -> None:
    body = ndjson({"task_type": "echo"}, {"task_type": "ecko"}) + b'\n{"task_type"\n'
    reply = await c1.http.post(
        "/tasks/batch", content=body, headers={"Content-Type": "application/x-ndjson"}
    )

    answer = reply.json()
    BatchOut.model_validate(answer)
    assert reply.status_code == 202
    assert (answer["accepted"], answer["rejected"]) == (1, 2)
    first, second, third = answer["results"]
    assert first["status"] == "queued"
    assert second["error"]["code"] == "unknown_task_type"
    assert third["error"]["code"] == "malformed_json"


async def test_a_graph_is_accepted_in_any_order(c1: Composite) -> None:
    items = [
        {"task_type": "echo", "ref": "last", "depends_on": ["ref:left", "ref:right"]},
        {"task_type": "echo", "ref": "left", "depends_on": ["ref:first"]},
        {"task_type": "echo", "ref": "right", "depends_on": ["ref:first"]},
        {"task_type": "echo", "ref": "first"},
    ]
    reply = await c1.http.post("/tasks/batch?atomic=true", json={"tasks": items})

    results = reply.json()["results"]
    last, left, right, first = [result["task_id"] for result in results]
    assert (await c1.task(last))["depends_on"] == [left, right]
    worker = c1.moderator.join()
    assert c1.moderator.run_all(worker) == 4
    ended = (await c1.http.post("/tasks/wait", json={"ids": [last, first]})).json()
    assert [task["task_id"] for task in ended["ended"]] == [first, last]


async def test_what_depends_on_a_refused_item_is_refused(c1: Composite) -> None:
    items = [
        {"task_type": "ecko", "ref": "a"},
        {"task_type": "echo", "ref": "b", "depends_on": ["ref:a"]},
        {"task_type": "echo", "ref": "c", "depends_on": ["ref:b"]},
        {"task_type": "echo"},
    ]
    answer = (await c1.http.post("/tasks/batch", json={"tasks": items})).json()

    codes = [result.get("error", {}).get("code") for result in answer["results"]]
    # An item that does not fit has no ref that anybody could mean.
    assert codes == ["unknown_task_type", "dependency_not_found", "dependency_not_found", None]


async def test_a_circle_is_named_and_only_what_hangs_on_it_is_refused(c1: Composite) -> None:
    items = [
        {"task_type": "echo", "ref": "a", "depends_on": ["ref:b"]},
        {"task_type": "echo", "ref": "b", "depends_on": ["ref:a"]},
        {"task_type": "echo", "ref": "behind", "depends_on": ["ref:a"]},
        {"task_type": "echo", "ref": "free"},
    ]
    answer = (await c1.http.post("/tasks/batch", json={"tasks": items})).json()

    a, b, behind, free = answer["results"]
    assert a["error"]["code"] == b["error"]["code"] == "dependency_cycle"
    assert "ref:a -> ref:b -> ref:a" in a["error"]["detail"]
    assert behind["error"]["code"] == "dependency_not_found"
    assert free["status"] == "queued"


async def test_a_batch_sent_again_is_the_same_batch(c1: Composite) -> None:
    body = {"tasks": [{"task_type": "echo"}, {"task_type": "echo", "payload": {"n": 2}}]}
    headers = {"Idempotency-Key": "batch-key"}
    first = (await c1.http.post("/tasks/batch", json=body, headers=headers)).json()
    body["tasks"].append({"task_type": "echo", "payload": {"n": 3}})
    second = (await c1.http.post("/tasks/batch", json=body, headers=headers)).json()

    assert second["batch_id"] == first["batch_id"]
    ids = [result["task_id"] for result in second["results"]]
    assert ids[:2] == [result["task_id"] for result in first["results"]]
    c1.moderator.run_all(c1.moderator.join())
    done = await c1.http.post("/tasks/wait", json={"batch_id": first["batch_id"]})
    assert {task["task_id"] for task in done.json()["ended"]} == set(ids)


async def test_a_batch_of_known_tasks_only_is_nothing_to_wait_for(c1: Composite) -> None:
    item = {"task_type": "echo", "idempotency_key": "own"}
    await c1.http.post("/tasks", json=item)
    answer = (await c1.http.post("/tasks/batch", json={"tasks": [item]})).json()
    assert answer["results"][0]["duplicate"] is True

    waited = await c1.http.post("/tasks/wait", json={"batch_id": answer["batch_id"]})

    assert waited.json() == {"ended": [], "cursor": "0", "pending": 0}


async def test_a_cursor_walks_through_what_ends(c1: Composite) -> None:
    body = {"tasks": [{"task_type": "echo"} for _ in range(3)]}
    batch_id = (await c1.http.post("/tasks/batch", json=body)).json()["batch_id"]
    worker = c1.moderator.join()
    waiting = asyncio.create_task(
        c1.http.post("/tasks/wait", json={"batch_id": batch_id, "wait": 30.0})
    )
    for _ in range(50):
        await asyncio.sleep(0)

    c1.moderator.run_all(worker)

    async with asyncio.timeout(2):
        answer = (await waiting).json()
    WaitOut.model_validate(answer)
    assert (len(answer["ended"]), answer["pending"]) == (3, 0)
    rest = await c1.http.post(
        "/tasks/wait", json={"batch_id": batch_id, "cursor": answer["cursor"], "wait": 1.0}
    )
    assert rest.json() == {"ended": [], "cursor": answer["cursor"], "pending": 0}


# -- references, for graphs of any shape ---------------------------------------------------------

graphs = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=10)


@given(graphs)
def test_references_resolve_exactly_when_no_circle_can_be_reached(graph: list[list[int]]) -> None:
    count = len(graph)
    items: list[tuple[str | None, TaskSpec] | HcnaError] = [
        (
            f"r{index}",
            TaskSpec(
                id=f"t{index}",
                task_type="echo",
                depends_on=tuple(dict.fromkeys(f"ref:r{parent % count}" for parent in parents)),
            ),
        )
        for index, parents in enumerate(graph)
    ]

    def above(index: int) -> set[int]:
        seen: set[int] = set()
        stack = [parent % count for parent in graph[index]]
        while stack:
            at = stack.pop()
            if at not in seen:
                seen.add(at)
                stack += [parent % count for parent in graph[at]]
        return seen

    results = resolve(items)

    for index, found in enumerate(results):
        reached = above(index)
        bad = any(at in above(at) for at in {*reached, index})
        assert isinstance(found, HcnaError) == bad
        if isinstance(found, HcnaError) and index in reached:
            assert found.code == "dependency_cycle"
    specs = [found for found in results if isinstance(found, TaskSpec)]
    order = parents_first(specs)
    assert sorted(order) == list(range(len(specs)))
    seen: set[str] = set()
    for position in order:
        assert set(specs[position].depends_on) <= seen
        seen.add(specs[position].id)


def test_a_circle_of_ten_thousand_is_found_quickly() -> None:
    count = 10_000
    items: list[tuple[str | None, TaskSpec] | HcnaError] = [
        (
            f"r{i}",
            TaskSpec(id=f"t{i}", task_type="echo", depends_on=(f"ref:r{(i + 1) % count}",)),
        )
        for i in range(count)
    ]
    results = resolve(items)
    assert all(isinstance(found, HcnaError) for found in results)
    assert len(str(results[0])) < 1000

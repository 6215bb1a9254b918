"""Keys at work: what a submission may name, whose artifacts they are, quotas and rates."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hcna_ray.client import AsyncClient, Forbidden, NotFound
from hcna_ray.core.errors import DiskFull
from hcna_ray.core.models import TaskState
from hcna_ray.security.key_ring import FileKeyRing
from hcna_ray.security.keys import Role, create_key, revoke_key
from hcna_ray.store.artifacts import Maker
from tests.support.builders import a_task
from tests.support.c1 import ADMIN_KEY, URL, Composite, a_composite

BYTES = b"what alice has made" * 10
NAME = hashlib.sha256(BYTES).hexdigest()


class House:
    """C1 with as many people as a test asks for."""

    def __init__(self, c1: Composite) -> None:
        self.c1 = c1
        self.moderator = c1.moderator

    def client(self, name: str, role: Role = "submitter", **more: Any) -> httpx.AsyncClient:
        self.c1.keys.add(f"hcna_of-{name}", name=name, role=role, **more)
        return self.c1.client(f"hcna_of-{name}")

    def finished(self, owner: str, payload: bytes, result: bytes, seq: int = 1000) -> str:
        """Put a completed task into the store."""
        task = a_task(
            f"task-{owner}-{seq}",
            seq=seq,
            state=TaskState.COMPLETED,
            principal=owner,
            payload=payload,
            result=result,
        )
        store = self.moderator.desk.memory
        with store.transaction():
            store.insert([task])
        return task.id


@pytest.fixture
def house(c1: Composite) -> House:
    return House(c1)


async def submitted(http: httpx.AsyncClient, **task: Any) -> str:
    reply = await http.post("/tasks", json={"task_type": "echo", **task})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["task_id"])


# -- what a submission names -----------------------------------------------------------------------


async def test_a_task_depends_on_ones_own_alone(house: House) -> None:
    async with house.client("alice") as alice, house.client("bob") as bob:
        parent = await submitted(alice)
        await submitted(alice, depends_on=[parent])

        body = {"task_type": "echo", "depends_on": [parent]}
        refused = await bob.post("/tasks", json=body)
        nothing = await bob.post("/tasks", json=body | {"depends_on": ["task-none"]})
        assert refused.status_code == nothing.status_code == 422
        # Word for word what the moderator says of a task that nobody has.
        assert refused.text == nothing.text.replace("task-none", parent)
        assert refused.json()["code"] == "dependency_not_found"

        batch = {"tasks": [body | {"ref": "a"}, {"task_type": "echo", "depends_on": ["ref:a"]}]}
        reply = await bob.post(
            "/tasks/batch", json={"tasks": [*batch["tasks"], {**body, "depends_on": []}]}
        )
        codes = [one.get("error", {}).get("code") for one in reply.json()["results"]]
        assert codes == ["dependency_not_found", "dependency_not_found", None]
        whole = await bob.post("/tasks/batch?atomic=true", json=batch)
        assert whole.status_code == 422


async def test_an_operator_of_a_queue_knows_no_task_outside(house: House) -> None:
    async with house.client("alice") as alice:
        inside, outside = await submitted(alice, queue="lab"), await submitted(alice)
    async with house.client("op", "operator", queues=("lab",)) as op:
        body = {"task_type": "echo", "queue": "lab"}
        assert (await op.post("/tasks", json=body | {"depends_on": [inside]})).status_code == 202
        assert (await op.post("/tasks", json=body | {"depends_on": [outside]})).status_code == 422
        assert (await op.post("/tasks", json={"task_type": "echo"})).status_code == 403


async def test_a_batch_is_waited_for_by_its_owner(house: House) -> None:
    items = {"tasks": [{"task_type": "echo", "queue": "lab"}, {"task_type": "echo"}]}
    async with (
        house.client("alice") as alice,
        house.client("alice-lab", owner="alice", queues=("lab",)) as lab,
        house.client("alice-all", owner="alice", queues=("lab", "d*")) as both,
        house.client("watcher", "viewer") as watcher,
        house.client("bob") as bob,
    ):
        batch = (await alice.post("/tasks/batch", json=items)).json()["batch_id"]
        house.moderator.run_all(house.moderator.join())
        body = {"batch_id": batch}
        for http in (alice, both, both):
            reply = (await http.post("/tasks/wait", json=body)).json()
            assert [task["status"] for task in reply["ended"]] == ["completed"] * 2
            assert reply["ended"][0]["result"]["ok"] is True
        seen = (await watcher.post("/tasks/wait", json=body)).json()
        assert [(task["result"], task["outline"]) for task in seen["ended"]] == [(None, True)] * 2
        for http in (bob, lab):
            refused = await http.post("/tasks/wait", json=body)
            nothing = await http.post("/tasks/wait", json={"batch_id": "batch-none"})
            assert refused.status_code == nothing.status_code == 404
            assert refused.text == nothing.text.replace("batch-none", batch)
            later = await http.post("/tasks/wait", json=body | {"cursor": "1"})
            assert later.json() == {"ended": [], "cursor": "1", "pending": 0}
            listed = await http.get("/tasks", params={"batch_id": batch})
            assert len(listed.json()["tasks"]) == (http is lab)


async def test_a_repeated_batch_is_empty_for_its_owner_alone(house: House) -> None:
    items = {"tasks": [{"task_type": "echo", "idempotency_key": "k"}]}
    async with house.client("alice") as alice, house.client("bob") as bob:
        await alice.post("/tasks/batch", json=items)
        again = (await alice.post("/tasks/batch", json=items)).json()["batch_id"]

        assert (await alice.post("/tasks/wait", json={"batch_id": again})).status_code == 200
        assert (await bob.post("/tasks/wait", json={"batch_id": again})).status_code == 404
        # And the same idempotency key of somebody else is another one.
        (item,) = (await bob.post("/tasks/batch", json=items)).json()["results"]
        assert "duplicate" not in item


async def test_waiting_for_many_passes_over_what_is_not_ones_own(house: House) -> None:
    async with house.client("alice") as alice, house.client("bob") as bob:
        mine, theirs = await submitted(bob), await submitted(alice)
        house.moderator.run_all(house.moderator.join())

        both = {"ids": [mine, theirs]}
        refused = await bob.post("/tasks/wait", json=both)
        assert (refused.status_code, refused.json()["detail"]) == (
            404,
            f"there is no task '{theirs}'",
        )
        first = (await bob.post("/tasks/wait", json={"ids": [mine]})).json()
        later = (await bob.post("/tasks/wait", json=both | {"cursor": first["cursor"]})).json()
        assert later == {"ended": [], "cursor": first["cursor"], "pending": 0}


async def test_failed_tasks_are_run_again_within_scopes_and_rights(house: House) -> None:
    store = house.moderator.desk.memory
    with store.transaction():
        store.insert(
            [
                a_task(f"t-{who}-{queue}", seq=1000 + n, state=TaskState.FAILED,
                       principal=who, queue=queue)
                for n, (who, queue) in enumerate(
                    [("alice", "lab"), ("alice", "day"), ("bob", "lab"), ("bob", "day")]
                )
            ]
        )  # fmt: skip

    async def retried(http: httpx.AsyncClient, **where: str) -> Any:
        reply = await http.post("/tasks/retry", json={"filter": where})
        return sorted(reply.json().get("retried", [])) or reply.json().get("code")

    async with (
        house.client("bob") as bob,
        house.client("op", "operator", queues=("l*", "x")) as op,
        house.client("op1", "operator", queues=("day",)) as op1,
    ):
        assert await retried(bob, queue="lab") == ["t-bob-lab"]
        assert await retried(op) == "out_of_scope"
        assert await retried(op, queue="day") == "out_of_scope"
        assert await retried(op, queue="lab") == ["t-alice-lab"]
        assert await retried(op1) == ["t-alice-day", "t-bob-day"]


async def test_a_listing_within_scopes_leads_through_all_of_it(house: House) -> None:
    async with house.client("alice") as alice:
        wanted = [await submitted(alice, queue=f"q{n % 5}") for n in range(25)][::-5]
    async with house.client("op", "operator", queues=("q4",)) as op:
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = (await op.get("/tasks", params={"limit": "2"} | cursor)).json()
            assert len(page["tasks"]) <= 2
            seen += [task["task_id"] for task in page["tasks"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
    assert seen == wanted


# -- artifacts -------------------------------------------------------------------------------------


async def status_of(http: httpx.AsyncClient, name: str = NAME) -> int:
    return (await http.get(f"/artifacts/{name}")).status_code


async def test_an_artifact_is_whose_who_sent_it(house: House) -> None:
    async with house.client("alice") as alice, house.client("bob") as bob:
        assert (await alice.put("/artifacts", content=BYTES)).status_code == 201
        assert (await status_of(alice), await status_of(bob)) == (200, 404)

        # Knowing the name is not enough, and asking does not tell that it is here.
        asked = {"Content-Range": f"bytes */{len(BYTES)}"}
        reply = await bob.put("/artifacts", params={"sha256": NAME}, headers=asked)
        assert (reply.status_code, reply.json()["received"]) == (202, 0)
        last = {"Content-Range": f"bytes {len(BYTES) - 1}-{len(BYTES) - 1}/{len(BYTES)}"}
        reply = await bob.put(
            "/artifacts", params={"sha256": NAME}, headers=last, content=BYTES[-1:]
        )
        assert (reply.status_code, reply.json()["code"]) == (409, "offset_mismatch")
        assert await status_of(bob) == 404

        # Whoever sends all of it has it.
        for first, end in ((0, 100), (100, len(BYTES))):
            part = {"Content-Range": f"bytes {first}-{end - 1}/{len(BYTES)}"}
            reply = await bob.put(
                "/artifacts", params={"sha256": NAME}, headers=part, content=BYTES[first:end]
            )
        assert reply.status_code == 201
        assert (await bob.get(f"/artifacts/{NAME}")).content == BYTES
    async with house.c1.client(ADMIN_KEY) as owner:
        assert await status_of(owner) == 200


async def test_two_uploads_of_the_same_bytes_do_not_see_each_other(house: House) -> None:
    half = {"Content-Range": f"bytes 0-99/{len(BYTES)}"}
    rest = {"Content-Range": f"bytes 100-{len(BYTES) - 1}/{len(BYTES)}"}
    asked = {"Content-Range": f"bytes */{len(BYTES)}"}
    where: dict[str, Any] = {"params": {"sha256": NAME}}
    async with house.client("alice") as alice, house.client("bob") as bob:
        await alice.put("/artifacts", headers=half, content=BYTES[:100], **where)
        assert (await bob.put("/artifacts", headers=asked, **where)).json()["received"] == 0
        await bob.put("/artifacts", headers=half, content=BYTES[:100], **where)
        done = await alice.put("/artifacts", headers=rest, content=BYTES[100:], **where)
        assert done.status_code == 201
        assert (await bob.put("/artifacts", headers=asked, **where)).json()["received"] == 100
        done = await bob.put("/artifacts", headers=rest, content=BYTES[100:], **where)
        assert done.status_code == 201
        assert (await status_of(alice), await status_of(bob)) == (200, 200)


async def test_what_a_task_has_made_is_its_owners(house: House) -> None:
    async with house.c1.client(ADMIN_KEY) as owner:
        await owner.put("/artifacts", content=BYTES)
    store = house.c1.services.artifacts
    async with (
        house.client("alice") as alice,
        house.client("watcher", "viewer") as watcher,
        house.client("bob") as bob,
        house.client("op", "operator", queues=("lab",)) as op,
        house.client("op-at-night", "operator", queues=("night",)) as other,
    ):
        people = (alice, watcher, bob, op, other)
        assert [await status_of(http) for http in people] == [404] * 5
        store.made(NAME, Maker("alice", "echo", "lab"))
        assert [await status_of(http) for http in people] == [200, 404, 404, 200, 404]
    # And so it is for tasks of whoever was given the bytes.
    assert [store.owned(NAME, who) for who in ("alice", "op", "op-at-night")] == [True, True, False]


async def test_a_disk_that_takes_no_note_hides_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = house.c1.services.artifacts
    store.put(BYTES)
    store.made(NAME, Maker("alice", "echo", "lab"))

    def full(*_: object) -> bool:
        raise DiskFull("the disk of the artifacts is full", 30)

    monkeypatch.setattr(store, "own", full)
    async with house.client("op", "operator", queues=("lab",)) as op:
        assert (await op.get(f"/artifacts/{NAME}")).content == BYTES
    assert not store.owned(NAME, "op")


async def test_a_result_hands_out_nothing(house: House) -> None:
    async with house.client("alice") as alice:
        await alice.put("/artifacts", content=BYTES)
    said = f'{{"artifact":"{NAME}"}}'.encode()
    task = house.finished("bob", b"{}", said)
    async with house.client("bob") as bob:
        assert (await bob.get("/tasks")).json()["tasks"][0]["result"]["artifact"] == NAME
        assert (await bob.get(f"/tasks/{task}")).json()["result"]["artifact"] == NAME
        assert (await bob.post("/tasks/wait", json={"ids": [task]})).status_code == 200
        assert await status_of(bob) == 404


async def test_what_a_payload_says_tells_nothing_of_what_is_here(house: House) -> None:
    """A digest is a word like others: what a task may read is looked at where it reads."""
    names = [NAME, NAME.upper(), "0" * 64]
    bodies = [{"task_type": "echo", "payload": {"deep": [f"/artifacts/{n}"]}} for n in names]
    async with house.client("alice") as alice, house.client("bob") as bob:
        await alice.put("/artifacts", content=BYTES)
        for body in bodies:
            assert (await bob.post("/tasks", json=body)).status_code == 202
        batch = await bob.post("/tasks/batch", json={"tasks": bodies})
        assert batch.json()["accepted"] == len(bodies)


@pytest.mark.parametrize(
    ("role", "scopes", "confined"),
    [
        ("submitter", {}, True),
        ("submitter", {"queues": ("default",)}, True),
        ("operator", {}, False),
        ("operator", {"queues": ("default",)}, True),
        ("operator", {"task_types": ("e*",)}, True),
        ("admin", {}, False),
    ],
)
async def test_a_task_reads_as_much_as_the_key_sees_that_submitted_it(
    house: House, role: Role, scopes: dict[str, Any], confined: bool
) -> None:
    async with house.client("key", role, owner="team", **scopes) as http:
        ids = [await submitted(http)]
        batch = await http.post("/tasks/batch", json={"tasks": [{"task_type": "echo"}]})
        ids += [one["task_id"] for one in batch.json()["results"]]
    tasks = house.moderator.desk.memory.get(ids)
    assert [(tasks[i].spec.principal, tasks[i].spec.confined) for i in ids] == [
        ("team", confined)
    ] * 2


# -- quotas and rates ------------------------------------------------------------------------------


async def test_a_quota_is_reached_and_freed(house: House) -> None:
    async with house.client("ci", quota=2) as ci, house.client("ci-2", owner="ci") as other:
        mine = [await submitted(ci), await submitted(ci)]
        refused = await ci.post("/tasks", json={"task_type": "echo"})
        assert (refused.status_code, refused.json()["code"]) == (429, "quota")
        assert refused.headers["retry-after"] == str(refused.json()["retry_after_s"]) == "5"
        await submitted(other)  # The other key has no quota, and its tasks are the same owner's.

        await ci.delete(f"/tasks/{mine[0]}")
        assert (await ci.post("/tasks", json={"task_type": "echo"})).status_code == 429
        await ci.delete(f"/tasks/{mine[1]}")
        await submitted(ci)


async def test_a_repetition_asks_for_no_place(house: House) -> None:
    key = {"Idempotency-Key": "k"}
    body = {"task_type": "echo"}
    async with house.client("ci", quota=1) as ci:
        first = await ci.post("/tasks", json=body, headers=key)
        again = await ci.post("/tasks", json=body, headers=key)
        assert again.json() == first.json() | {"duplicate": True}
        other = await ci.post("/tasks", json=body, headers={"Idempotency-Key": "l"})
        assert other.status_code == 429


async def test_of_a_batch_as_much_is_taken_as_there_is_room_for(house: House) -> None:
    tasks = [{"task_type": "echo", "depends_on": ["ref:b"]}, {"task_type": "echo", "ref": "b"}]
    tasks += [{"task_type": "echo"}] * 2
    async with house.client("ci", quota=3) as ci:
        whole = await ci.post("/tasks/batch?atomic=true", json={"tasks": tasks})
        assert (whole.status_code, whole.json()["code"]) == (429, "quota")
        reply = (await ci.post("/tasks/batch", json={"tasks": tasks})).json()
        assert (reply["accepted"], reply["rejected"]) == (3, 1)
        assert reply["results"][3]["error"]["code"] == "quota"
        assert reply["results"][3]["error"]["retry_after_s"] == 5
        full = await ci.post("/tasks/batch", json={"tasks": tasks})
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")


async def test_running_again_asks_for_a_place(house: House) -> None:
    store = house.moderator.desk.memory
    failed = [
        a_task(f"t{n}", seq=1000 + n, state=TaskState.FAILED, principal="ci") for n in range(4)
    ]
    with store.transaction():
        store.insert(failed)
    async with house.client("ci", quota=2) as ci:
        many = (await ci.post("/tasks/retry", json={"filter": {}})).json()
        assert (len(many["retried"]), many["more"]) == (2, True)
        assert (await ci.post("/tasks/retry", json={"filter": {}})).status_code == 429
        one = await ci.post("/tasks/t0/retry")
        assert (one.status_code, one.json()["code"]) == (429, "quota")


async def test_tasks_whose_answer_was_lost_are_counted(house: House) -> None:
    async with house.client("ci", quota=2) as ci:
        await submitted(ci)
        house.moderator.dies = True
        lost = asyncio.create_task(ci.post("/tasks", json={"task_type": "echo"}))
        for _ in range(50):
            await asyncio.sleep(0)
        house.moderator.desk.clock.advance(20.0)  # C1 gives up at the next try.
        assert (await lost).status_code == 504
        house.moderator.revive()
        assert (await ci.post("/tasks", json={"task_type": "echo"})).status_code == 429


async def test_a_count_of_long_ago_is_not_believed(house: House) -> None:
    async with house.client("ci", quota=3) as ci, house.client("ci-2", owner="ci") as other:
        await submitted(ci)
        await submitted(other)
        await submitted(other)
        house.moderator.desk.clock.advance(1.0)
        assert (await ci.post("/tasks", json={"task_type": "echo"})).status_code == 429


async def test_a_rate_lets_a_burst_through_and_then_so_many_a_second(house: House) -> None:
    clock = house.moderator.desk.clock
    async with house.client("ci", rate=0.5, burst=3) as ci, house.client("free") as free:
        assert [(await ci.get("/tasks")).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = await ci.get("/tasks")
        assert (refused.json()["code"], refused.headers["retry-after"]) == ("rate_limited", "2")
        assert (await free.get("/tasks")).status_code == 200
        assert (await ci.get("/health")).status_code == 200  # A probe is nobody's.
        clock.advance(1.9)
        assert (await ci.get("/tasks")).status_code == 429
        clock.advance(0.1)
        assert [(await ci.get("/tasks")).status_code for _ in range(2)] == [200, 429]
        clock.advance(3600.0)
        assert [(await ci.get("/tasks")).status_code for _ in range(4)] == [200, 200, 200, 429]


# -- the Python client -----------------------------------------------------------------------------


async def test_the_client_sees_what_its_key_sees_and_waits_for_its_rate(house: House) -> None:
    clock = house.moderator.desk.clock
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.advance(seconds)

    def client(name: str, role: Role = "submitter", **more: Any) -> AsyncClient:
        house.c1.keys.add(f"hcna_of-{name}", name=name, role=role, **more)
        transport = httpx.ASGITransport(house.c1.app)
        return AsyncClient(URL, f"hcna_of-{name}", transport=transport, sleep=sleep)

    async with (
        client("alice", rate=0.5, burst=2) as alice,
        client("bob") as bob,
        client("op", "operator", queues=("lab",)) as op,
        client("watcher", "viewer") as watcher,
    ):
        inside = await alice.submit("echo", {"n": 1}, queue="lab")
        for number in range(25):
            house.finished("bob", b"{}", b"{}", seq=1000 + number)
        assert pauses == []
        assert (await alice.get(inside.id)).status == "queued"
        await alice.get(inside.id)
        assert pauses  # The third request was one too many, and was made again.
        with pytest.raises(NotFound):
            await bob.get(inside.id)
        with pytest.raises(NotFound):
            await bob.cancel(inside.id)
        with pytest.raises(Forbidden):
            await watcher.submit("echo", {})
        with pytest.raises(Forbidden):
            await op.submit("echo", {})
        # Behind pages that hold nothing of its own to see.
        assert [task.task_id async for task in op.tasks(limit=1)] == [inside.id]
        assert [task.task_id async for task in bob.tasks(limit=2)] == [
            "task-bob-1024",
            "task-bob-1023",
        ]
        assert (await watcher.get(inside.id)).result is None


# -- keys in a file, and C1 in public --------------------------------------------------------------


async def test_a_revoked_key_is_refused_by_a_running_c1(c1: Composite, tmp_path: Path) -> None:
    clock = c1.moderator.desk.clock
    folder = tmp_path / "keys"
    clear = create_key(folder, name="ci", role="submitter", now=clock.now(), expires_at=4e9)
    object.__setattr__(c1.services, "keys", FileKeyRing(folder, clock))
    async with c1.client(clear) as ci:
        assert (await ci.get("/tasks")).status_code == 200
        revoke_key(folder, "ci", now=clock.now())
        clock.advance(0.1)
        refused = await ci.get("/tasks")
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert "revoked" in refused.json()["detail"]
    assert refused.headers["www-authenticate"].startswith("Bearer")


@pytest.fixture
async def public(tmp_path: Path) -> AsyncIterator[House]:
    async with a_composite(tmp_path, public=True) as c1:
        yield House(c1)


async def test_figures_need_a_key_where_others_can_ask(public: House) -> None:
    async with public.c1.client(None) as stranger, public.client("p", "viewer") as scraper:
        assert (await stranger.get("/metrics")).status_code == 401
        assert (await scraper.get("/metrics")).status_code == 200
        for path in ("/health", "/ready", "/live"):
            assert (await stranger.get(path)).status_code == 200

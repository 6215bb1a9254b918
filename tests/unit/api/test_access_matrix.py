"""Who may do what: every route against every kind of caller, and nothing leaks.

The rows are the routes as they are declared, the columns the callers below. What a cell must answer
is worked out here, from the route's policy and from what is said of each caller by hand, and not
with the functions that the application uses. Everything that Alice wrote holds a canary, and so
does every answer to somebody who may not see it: never.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from hcna_ray.api import schemas
from hcna_ray.api.app import declared_routes
from hcna_ray.api.policy import Check
from hcna_ray.api.routing import Route
from hcna_ray.core.models import (
    Fact,
    FailureKind,
    Hold,
    Needs,
    Progress,
    Task,
    TaskError,
    TaskFilter,
    TaskState,
)
from hcna_ray.core.schedules import Reason
from hcna_ray.runtime.messages import Heartbeat
from hcna_ray.store.artifacts import Maker
from tests.support.builders import T0, a_schedule, a_spec, a_task
from tests.support.c1 import ADMIN_KEY, Composite, a_composite

CANARY = "alice-wrote-this"
TRACE = "00-a11cea11cea11cea11cea11cea11cea1-00f067aa0ba902b7-01"
#: What only those who operate the house see.
PLACE = "10.99.88.77"
LOAD = "telemetry-of-W1"
FILE = f"{CANARY} into a file".encode()
RANKS = ("viewer", "submitter", "operator", "admin")

Sees = Literal["nothing", "outline", "all"]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody, and what is to be expected of it towards a task of Alice: echo, in queue lab."""

    name: str
    headers: tuple[tuple[str, str], ...] = ()
    #: How its key is made; ``None``: there is none, or none that counts.
    key: dict[str, Any] | None = None
    #: Whether the key opens anything at all.
    good: bool = True
    sees: Sees = "nothing"
    #: Whether task type and queue lie in its scopes.
    type_fits: bool = True
    queue_fits: bool = True
    #: Whether Alice's artifact is its own to see.
    has_file: bool = False

    @property
    def rank(self) -> int:
        return -1 if self.key is None else RANKS.index(self.key["role"])

    @property
    def fits(self) -> bool:
        return self.type_fits and self.queue_fits

    @property
    def scoped(self) -> bool:
        return self.key is not None and bool({"task_types", "queues"} & set(self.key))

    @property
    def has_types(self) -> bool:
        return self.key is not None and "task_types" in self.key


def _with(key: str) -> tuple[tuple[str, str], ...]:
    return (("Authorization", f"Bearer {key}"),)


def _holder(name: str, role: str, *, good: bool = True, **more: Any) -> Caller:
    expected = {n: more.pop(n) for n in list(more) if n in Caller.__dataclass_fields__}
    key = {"role": role, "name": name, **more}
    return Caller(name=name, headers=_with(f"hcna_of-{name}"), key=key, good=good, **expected)


_ALICE: dict[str, Any] = {"owner": "alice", "has_file": True}
_EVERYTHING: dict[str, Any] = {"sees": "all", "has_file": True}

CALLERS = (
    Caller(name="nobody", good=False),
    Caller(name="no scheme", headers=(("Authorization", ADMIN_KEY),), good=False),
    Caller(name="wrong scheme", headers=(("Authorization", f"Basic {ADMIN_KEY}"),), good=False),
    Caller(name="empty key", headers=(("X-API-Key", ""),), good=False),
    Caller(name="two keys", headers=(*_with(ADMIN_KEY), ("X-API-Key", ADMIN_KEY)), good=False),
    Caller(name="unknown key", headers=_with("hcna_" + "A" * 43), good=False),
    Caller(name="key cut short", headers=_with(ADMIN_KEY[:-1]), good=False),
    Caller(name="key with more", headers=_with(ADMIN_KEY + "x"), good=False),
    Caller(name="long key", headers=_with("x" * 5000), good=False),
    _holder("expired", "submitter", owner="alice", expires_at=T0, good=False),
    _holder("revoked", "submitter", owner="alice", revoked_at=T0 - 9, good=False),
    _holder("expired-admin", "admin", expires_at=T0 - 9, good=False),
    _holder("revoked-admin", "admin", revoked_at=T0, good=False),
    _holder("watcher", "viewer", sees="outline"),
    _holder("watcher-elsewhere", "viewer", queues=("night",), queue_fits=False),
    _holder("watcher-of-sleep", "viewer", task_types=("sleep",), type_fits=False),
    _holder("bob", "submitter"),
    _holder("bob-in-lab", "submitter", owner="bob", queues=("lab",), task_types=("echo",)),
    _holder("alice", "submitter", sees="all", **_ALICE),
    _holder("alice-until", "submitter", sees="all", expires_at=T0 + 1e6, **_ALICE),
    _holder("alice-looks", "viewer", sees="all", **_ALICE),
    _holder("alice-in-lab", "submitter", sees="all", queues=("l*",), task_types=("e*",), **_ALICE),
    _holder("alice-asleep", "submitter", task_types=("sleep",), type_fits=False, **_ALICE),
    _holder("alice-at-night", "submitter", queues=("night",), queue_fits=False, **_ALICE),
    _holder("operator", "operator", **_EVERYTHING),
    _holder("operator-in-lab", "operator", sees="all", queues=("lab",)),
    _holder("operator-at-night", "operator", queues=("night",), queue_fits=False),
    _holder("operator-of-sleep", "operator", task_types=("sleep", "x.*"), type_fits=False),
    _holder("operator-of-echo", "operator", sees="all", task_types=("echo",)),
    _holder("boss", "admin", **_EVERYTHING),
)


@dataclass
class World:
    """One C1, with tasks of Alice in it, one of them running."""

    c1: Composite
    running: str = ""
    file: str = ""
    #: What a task of hers has made, in queue lab.
    made: str = ""
    #: Everything that is Alice's, by id.
    ids: set[str] = field(default_factory=set)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1_000_000))

    def task(self, state: TaskState, **more: Any) -> str:
        """Put a task of Alice into the store; return its id."""
        number = next(self.numbers)
        error = TaskError(
            kind=FailureKind.ERROR, message=CANARY, type=f"E{CANARY}", traceback=CANARY
        )
        ended = state in (TaskState.COMPLETED, TaskState.FAILED)
        task = a_task(
            f"task-of-alice-{number}",
            seq=number,
            state=state,
            principal="alice",
            queue="lab",
            payload=f'{{"message":"{CANARY}"}}'.encode(),
            metadata=f'{{"note":"{CANARY}"}}'.encode(),
            traceparent=TRACE,
            result=f'{{"said":"{CANARY}"}}'.encode() if state is TaskState.COMPLETED else None,
            error=error if state is TaskState.FAILED else None,
            progress=Progress(percent=50.0, message=CANARY, at=T0),
            schedule=CANARY,
            schedule_at=T0,
            finished_at=T0 if ended else None,
            **more,
        )
        store = self.c1.moderator.desk.memory
        with store.transaction():
            store.insert([task])
            store.append_facts([Fact(task.id, "accepted", T0, state, None, "W1", CANARY)])
        self.ids.add(task.id)
        return task.id

    def schedule(self) -> str:
        """Put a schedule of Alice into the store; return its name."""
        schedule = a_schedule(
            f"of-alice-{next(self.numbers)}",
            principal="alice",
            spec=a_spec("", principal="alice", queue="lab"),
            task=f'{{"task_type":"echo","queue":"lab","payload":{{"n":"{CANARY}"}}}}'.encode(),
            reason=Reason("too_late", CANARY, T0),
        )
        store = self.c1.moderator.desk.memory
        with store.transaction():
            store.save_schedules([schedule])
        self.ids.add(schedule.name)
        return schedule.name

    def snapshot(self) -> object:
        """Everything that a refused request must leave as it is."""
        reader = self.c1.moderator.desk.memory.reader()
        tasks: list[Task] = reader.page(TaskFilter(), before_seq=None, limit=10_000)
        workers = [(w.name, w.state) for w in self.c1.moderator.desk.workers().values()]
        files = sorted(self.c1.services.settings.artifacts_dir.rglob("*"))
        schedules = reader.schedules(limit=10_000)
        return tasks, schedules, reader.paused(), workers, files, list(self.c1.moderator.intents)


_STATES = itertools.cycle((TaskState.COMPLETED, TaskState.FAILED, TaskState.QUEUED))
#: What is asked: the target in the path, the rest of the request, the status when it is allowed.
Ask = tuple[str, dict[str, Any], int]
ECHO = {"task_type": "echo", "queue": "lab"}


def _task(state: TaskState, status: int = 200) -> Callable[[World], Ask]:
    return lambda world: (world.task(state), {}, status)


def _wait(world: World) -> Ask:
    return "", {"json": {"ids": [world.task(TaskState.COMPLETED)]}}, 200


def _list(world: World) -> Ask:
    world.task(TaskState.COMPLETED)
    world.task(TaskState.FAILED)
    return "", {}, 200


def _events(world: World) -> Ask:
    world.task(TaskState.FAILED)
    return "", {"params": {"follow": "false", "after": "0"}}, 200


def _retry_many(world: World) -> Ask:
    world.task(TaskState.FAILED)
    return "", {"json": {"filter": ECHO}}, 202


def _plan(world: World) -> Ask:
    name = f"of-nobody-yet-{next(world.numbers)}"
    return "", {"json": {"name": name, "cron": "@daily", "task": ECHO}}, 201


def _schedule(status: int = 200, **more: Any) -> Callable[[World], Ask]:
    return lambda world: (world.schedule(), {"params": {"owner": "alice"}, **more}, status)


def _plain(target: str = "", *, status: int = 200, **more: Any) -> Callable[[World], Ask]:
    return lambda _: (target, more, status)


ASKS: dict[tuple[str, str], Callable[[World], Ask]] = {
    ("POST", "/tasks"): _plain(json=ECHO, status=202),
    ("POST", "/tasks/batch"): _plain(json={"tasks": [ECHO]}, status=202),
    ("POST", "/tasks/wait"): _wait,
    ("GET", "/tasks"): _list,
    ("GET", "/tasks/{task_id}"): lambda world: (
        world.task(next(_STATES)),
        {"params": {"payload": "true"}},
        200,
    ),
    ("GET", "/tasks/{task_id}/events"): lambda world: (
        world.task(next(_STATES)),
        {"params": {"follow": "false"}},
        200,
    ),
    ("GET", "/tasks/{task_id}/logs"): lambda world: (world.running, {}, 200),
    ("GET", "/events"): _events,
    ("DELETE", "/tasks/{task_id}"): _task(TaskState.QUEUED),
    ("POST", "/tasks/{task_id}/cancel"): _task(TaskState.QUEUED),
    ("POST", "/tasks/{task_id}/retry"): _task(TaskState.FAILED, 202),
    ("POST", "/tasks/retry"): _retry_many,
    ("PUT", "/artifacts"): _plain(content=b"somebody's own bytes", status=201),
    ("GET", "/artifacts/{sha256}"): lambda world: (world.file, {}, 200),
    ("HEAD", "/artifacts/{sha256}"): lambda world: (world.file, {}, 200),
    ("GET", "/workers"): _plain(),
    ("GET", "/workers/{name}"): _plain("W1"),
    ("POST", "/workers/{name}/drain"): _plain("W1"),
    ("POST", "/workers/{name}/cordon"): _plain("W1"),
    ("POST", "/workers/{name}/uncordon"): _plain("W1"),
    ("DELETE", "/workers/{name}"): _plain("W1", params={"force": "true"}),
    ("POST", "/admin/send-intent"): _plain(json={"dst": "W1", "intent": "test.ping"}),
    ("POST", "/admin/queues/{name}/pause"): _plain("lab"),
    ("POST", "/admin/queues/{name}/resume"): _plain("lab"),
    ("GET", "/admin/audit"): _plain(),
    ("GET", "/admin/keys"): _plain(),
    ("POST", "/schedules"): _plan,
    ("GET", "/schedules"): lambda world: (world.schedule() and "", {}, 200),
    ("GET", "/schedules/{name}"): _schedule(),
    ("PUT", "/schedules/{name}"): _schedule(json={"cron": "@daily", "task": ECHO}),
    ("POST", "/schedules/{name}/pause"): _schedule(),
    ("POST", "/schedules/{name}/resume"): _schedule(),
    ("POST", "/schedules/{name}/run"): _schedule(202),
    ("DELETE", "/schedules/{name}"): _schedule(),
    ("GET", "/webhooks/secret"): _plain(),
    ("GET", "/admin/webhooks"): _plain(),
    ("GET", "/health"): _plain(),
    ("GET", "/ready"): _plain(),
    ("GET", "/live"): _plain(),
    ("GET", "/metrics"): _plain(),
    ("GET", "/metrics/targets"): _plain(),
    ("GET", "/status"): _plain(),
    ("GET", "/openapi.json"): _plain(),
    ("GET", "/docs"): _plain(),
    ("GET", "/whoami"): _plain(),
    ("GET", "/ui"): _plain(),
    ("GET", "/ui/{file}"): _plain("app.js"),
}


def expected(route: Route, caller: Caller, status: int) -> tuple[int, str | None]:
    """Return status and code of a cell."""
    policy = route.policy
    if policy.role is None:
        return status, None
    if not caller.good:
        return 401, "unauthorized"
    if caller.rank < RANKS.index(policy.role):
        return 403, "forbidden"
    match policy.check:
        case Check.SUBMISSION if not caller.fits and route.path == "/tasks":
            return 403, "out_of_scope"
        case Check.SCHEDULE if not caller.fits and route.path == "/schedules":
            return 403, "out_of_scope"
        case Check.SCHEDULE if caller.sees == "nothing" and route.path != "/schedules":
            return 404, "schedule_not_found"
        case Check.TASKS if not caller.fits and route.path == "/tasks/retry":
            return 403, "out_of_scope"
        case Check.TASKS if caller.sees == "nothing" and route.path == "/tasks/wait":
            return 404, "task_not_found"
        case Check.TASK if caller.sees == "nothing":
            return 404, "task_not_found"
        case Check.OUTPUT if caller.sees != "all":
            return 404, "task_not_found"
        case Check.ARTIFACT if not caller.has_file and route.method != "PUT":
            return 404, "artifact_not_found"
        case Check.QUEUE if not caller.queue_fits or caller.has_types:
            return 403, "out_of_scope"
        case Check.MACHINES if caller.scoped:
            return 403, "out_of_scope"
    return status, None


def leaks(
    route: Route, caller: Caller, world: World, asked: str, reply: httpx.Response
) -> list[str]:
    """Return what an answer holds that its caller must not see."""
    text = reply.text + str(reply.headers.raw)
    found = []
    if caller.sees != "all" and not (caller.has_file and route.policy.check is Check.ARTIFACT):
        found += [word for word in (CANARY, TRACE[3:20]) if word in text]
    if caller.sees == "nothing" or not caller.good:
        found += [task_id for task_id in world.ids if task_id in text.replace(asked or "\0", "")]
    if not caller.good or caller.rank < RANKS.index("operator"):
        found += [word for word in (PLACE, LOAD) if word in text]
    return found


async def a_world(c1: Composite) -> World:
    for caller in CALLERS:
        if caller.key is not None:
            c1.keys.add(f"hcna_of-{caller.name}", **caller.key)
    world = World(c1)
    worker = c1.moderator.join(address=PLACE)
    beat = Heartbeat(worker="W1", incarnation="a", telemetry={"load": LOAD})
    c1.moderator.desk.ask(beat)
    async with c1.client("hcna_of-alice") as alice:
        reply = await alice.post("/tasks", json=ECHO | {"payload": {"message": CANARY}})
        world.running = reply.json()["task_id"]
        world.file = (await alice.put("/artifacts", content=FILE)).json()["sha256"]
    artifacts = c1.services.artifacts
    world.made = artifacts.put(FILE + b", and a task went on").sha256
    artifacts.made(world.made, Maker("alice", "echo", "lab"))
    (offer,) = worker.granted()
    worker.report(worker.started(offer))
    c1.outputs.texts[world.running, 1] = CANARY.encode()
    # No id of one is the beginning of another's.
    assert world.running == "task-1"
    return world


@pytest.mark.parametrize(
    "route", list(declared_routes()), ids=lambda route: f"{route.method} {route.path}"
)
async def test_a_route_against_every_caller(route: Route, tmp_path: Path) -> None:
    wrong: list[str] = []
    async with a_composite(tmp_path) as c1:
        world = await a_world(c1)
        for caller in CALLERS:
            target, request, status = ASKS[route.method, route.path](world)
            path = route.path.partition("{")[0] + target + route.path.partition("}")[2]
            before = world.snapshot()
            async with c1.client(None) as http:
                reply = await http.request(
                    route.method, path, headers=list(caller.headers), **request
                )
            asked = target or str(request.get("json", {}).get("ids", [""])[0])
            want = expected(route, caller, status)
            code = None
            if reply.status_code >= 400 and route.method != "HEAD":
                code = reply.json()["code"]
            elif reply.status_code >= 400:
                code = want[1]
            if (reply.status_code, code) != want:
                wrong.append(f"{caller.name}: {reply.status_code} {code}, wanted {want}")
            if reply.status_code >= 400 and world.snapshot() != before:
                wrong.append(f"{caller.name}: was refused, and something has changed")
            wrong += [
                f"{caller.name}: sees {word!r}"
                for word in leaks(route, caller, world, asked, reply)
            ]
            if route.path == "/tasks/batch" and reply.status_code == 202:
                (item,) = reply.json()["results"]
                said = item.get("error", {}).get("code")
                if said != (None if caller.fits else "out_of_scope"):
                    wrong.append(f"{caller.name}: {item}")
            if reply.status_code == 404:
                wrong += await _differs_from_nothing(c1, route, caller, asked, request, reply)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_what_a_task_has_made_against_every_caller(c1: Composite, method: str) -> None:
    """It is Alice's, and is seen by whoever sees all of such a task."""
    world = await a_world(c1)
    (route,) = [
        one
        for one in declared_routes()
        if one.policy.check is Check.ARTIFACT and one.method == method
    ]
    wrong: list[str] = []
    for caller in CALLERS:
        want = 200 if caller.has_file or caller.sees == "all" else 404
        want = want if caller.good else 401
        before = world.snapshot()
        async with c1.client(None) as http:
            path = f"/artifacts/{world.made}"
            reply = await http.request(method, path, headers=list(caller.headers))
        if reply.status_code != want:
            wrong.append(f"{caller.name}: {reply.status_code}, wanted {want}")
        if want != 200:
            if world.snapshot() != before:
                wrong.append(f"{caller.name}: was refused, and something has changed")
            wrong += leaks(route, caller, world, world.made, reply)
        if want == 404:
            wrong += await _differs_from_nothing(c1, route, caller, world.made, {}, reply)
    assert not wrong, "\n".join(wrong)


async def _differs_from_nothing(
    c1: Composite,
    route: Route,
    caller: Caller,
    asked: str,
    request: dict[str, Any],
    reply: httpx.Response,
) -> list[str]:
    """What is somebody else's is answered as what nobody has, word for word."""
    nothing = "f" * 64 if len(asked) == 64 else "task-of-nobody"
    path = route.path.partition("{")[0] + nothing + route.path.partition("}")[2]
    if "json" in request and "params" not in request:
        request, path = {"json": {"ids": [nothing]}}, route.path
    async with c1.client(None) as http:
        other = await http.request(route.method, path, headers=list(caller.headers), **request)
    same = (other.status_code, other.text.replace(nothing, asked))
    return [] if same == (reply.status_code, reply.text) else [f"{caller.name}: {other.text}"]


def test_the_matrix_is_complete_and_large() -> None:
    declared = {(route.method, route.path) for route in declared_routes()}

    assert set(ASKS) == declared
    assert len({caller.name for caller in CALLERS}) == len(CALLERS)
    assert len(declared) * len(CALLERS) >= 400


# -- what an answer holds --------------------------------------------------------------------------


@pytest.fixture
async def world(c1: Composite) -> World:
    return await a_world(c1)


async def _get(world: World, who: str, path: str) -> Any:
    async with world.c1.client(f"hcna_of-{who}") as http:
        reply = await http.get(path)
    assert reply.status_code == 200, reply.text
    return reply.json()


#: Fields of a task that a viewer sees only of his own, and what stands there instead.
WITHHELD: dict[str, Any] = {
    "result": None,
    "metadata": None,
    "traceparent": None,
    "schedule": None,
    "depends_on": [],
    "outline": True,
}


@pytest.mark.parametrize("state", [TaskState.COMPLETED, TaskState.FAILED, TaskState.QUEUED])
async def test_an_outline_holds_nothing_that_was_written(world: World, state: TaskState) -> None:
    task_id = world.task(state)
    whole = await _get(world, "operator", f"/tasks/{task_id}?payload=true")
    bare = await _get(world, "watcher", f"/tasks/{task_id}?payload=true")

    for view in (whole, bare):
        schemas.TaskOut.model_validate(view)
    assert "payload" in whole
    assert CANARY in str(whole)
    assert "payload" not in bare
    assert bare == bare | WITHHELD
    assert bare["progress"] == whole["progress"] | {"message": ""}
    if state is TaskState.FAILED:
        assert bare["error"] == whole["error"] | {"message": "", "type": None}
    assert bare["why"]["code"] == whole["why"]["code"]
    assert bare["why"]["message"]
    assert CANARY not in str(bare)
    hidden = {*WITHHELD, "payload", "progress", "error", "attempts", "why", "pending_reason"}
    assert {n: v for n, v in bare.items() if n not in hidden} == {
        n: v for n, v in whole.items() if n not in hidden
    }
    listed = await _get(world, "watcher", "/tasks")
    schemas.TasksOut.model_validate(listed)
    assert CANARY not in str(listed)
    assert task_id in str(listed)


#: Tasks that wait for what their submitter wrote, and why.
WAITS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("unplaceable", {"needs": Needs(labels=(("project", CANARY),))}),
    ("unplaceable", {"needs": Needs(labels=((CANARY, "1"),))}),
    ("unplaceable", {"needs": Needs(resources=((CANARY, 1.0),))}),
    ("waiting_worker", {"needs": Needs(worker=CANARY)}),
    ("waiting_worker_return", {"pinned_to": CANARY}),
    ("ordering_key", {"ordering_key": CANARY, "hold": Hold.ORDERING}),
    ("concurrency_key", {"concurrency_key": CANARY, "hold": Hold.CONCURRENCY}),
)


@pytest.mark.parametrize(("code", "task"), WAITS)
async def test_an_outline_says_why_a_task_waits_in_words_of_ours(
    world: World, code: str, task: dict[str, Any]
) -> None:
    task_id = world.task(TaskState.QUEUED, **task)
    path = f"/tasks/{task_id}"
    whole = await _get(world, "operator", path)
    bare = await _get(world, "watcher", path)
    listed = await _get(world, "watcher", "/tasks")

    assert CANARY in whole["pending_reason"]["message"] + whole["pending_reason"]["fix"]
    for told in (bare["pending_reason"], bare["why"]):
        assert told["code"] == code
        assert told["message"]
        assert told["fix"]
    schemas.TaskOut.model_validate(bare)
    assert task_id in str(listed)
    assert CANARY not in str(bare) + str(listed)


async def test_a_listing_holds_ones_own(world: World) -> None:
    async with world.c1.client("hcna_of-bob") as bob:
        mine = (await bob.post("/tasks", json={"task_type": "echo"})).json()["task_id"]
    theirs = world.task(TaskState.FAILED)

    def ids(page: Any) -> set[str]:
        return {task["task_id"] for task in page["tasks"]}

    assert ids(await _get(world, "bob", "/tasks")) == {mine}
    assert ids(await _get(world, "alice", "/tasks")) == {world.running, theirs}
    assert ids(await _get(world, "operator", "/tasks")) == {mine, world.running, theirs}
    assert ids(await _get(world, "operator-in-lab", "/tasks")) == {world.running, theirs}
    assert ids(await _get(world, "operator-at-night", "/tasks")) == set()
    assert ids(await _get(world, "operator-in-lab", "/tasks?queue=default")) == set()
    assert ids(await _get(world, "bob", "/tasks?queue=lab")) == set()


async def test_of_a_worker_each_sees_what_it_may(world: World) -> None:
    def seen(view: Any) -> tuple[bool, bool, bool]:
        shape = schemas.StatusOut if "versions" in view else schemas.WorkersOut
        shape.model_validate(view)
        schemas.WorkerOut.model_validate(view["workers"][0])
        worker = view["workers"][0]
        runs = [item["task_id"] for item in worker["running"]]
        return world.running in runs, worker["address"] == PLACE, bool(worker["telemetry"])

    assert seen(await _get(world, "operator", "/workers")) == (True, True, True)
    assert seen(await _get(world, "operator-at-night", "/workers")) == (False, True, True)
    assert seen(await _get(world, "watcher", "/workers")) == (True, False, False)
    assert seen(await _get(world, "alice", "/workers")) == (True, False, False)
    assert seen(await _get(world, "bob", "/workers")) == (False, False, False)
    assert seen(await _get(world, "operator", "/status")) == (True, True, True)
    async with world.c1.client(None) as stranger:
        status = (await stranger.get("/status")).json()
    assert seen(status) == (False, False, False)
    assert status["workers"][0]["name"] == "W1"
    assert "store" not in status["moderator"]

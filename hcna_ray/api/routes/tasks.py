"""Tasks: submit one, look at one, list, cancel, run failed ones again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.allowance import Hold, used_up
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.problems import OutOfScope, refuse_field
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import (
    CancelIn,
    CancelOut,
    ListQuery,
    Nothing,
    ReplayIn,
    ReplayOut,
    SubmitOut,
    TaskIn,
    TaskOut,
    TaskQuery,
    TasksOut,
)
from hcna_ray.api.services import Services
from hcna_ray.api.submission import Sender
from hcna_ray.api.views import NOBODY, task_view
from hcna_ray.api.visibility import (
    foreign_parents,
    seen_as,
    visible_page,
    whose,
)
from hcna_ray.core.errors import InvalidName
from hcna_ray.core.models import TERMINAL, FailureKind, TaskFilter, TaskSpec, TaskState
from hcna_ray.core.naming import NodeName
from hcna_ray.runtime.messages import Accepted, Refused, ReplayQuery, SubmitResult
from hcna_ray.security.keys import ApiKey
from hcna_ray.store.base import TaskReader

routes = Routes("tasks")

SUBMITS = Policy(role="submitter", check=Check.SUBMISSION)
CHANGES = Policy(role="submitter", check=Check.TASK)

SUBMITTED = "Task submitted to M1 for scheduling"
_STATES = {state.value: state for state in TaskState}


def read_or_wait(request: Request) -> Sort:
    """Count a look that waits against the waits, any other against the reads."""
    return Sort.WAIT if request.query_params.get("wait", "0") != "0" else Sort.READ


@routes.add(
    "POST",
    "/tasks",
    policy=SUBMITS,
    sort=Sort.WRITE,
    body=TaskIn,
    answers={202: SubmitOut},
    problems=(409, 507),
)
async def submit_task(call: Call) -> Response:
    """Submit a task.

    The answer is sent after the task is durable. With an Idempotency-Key, sending it again returns
    the task that was stored before; another request under the same key is a 409.
    """
    services = call.services
    body = await call.json()
    key = call.key
    sender = Sender(key=key, idempotency_key=call.idempotency_key, traceparent=call.traceparent)
    (task_id,) = services.ids.task_ids(1)
    call.about["task_id"] = task_id
    spec = services.submissions.task(body, sender, task_id=task_id, now=services.clock.now())
    if spec.depends_on and not key.sees_all:
        for refusal in (await foreign_parents(services, key, (spec,))).values():
            raise refusal
    if key.quota is None:
        (result,) = await services.gatherer.submit((spec,))
    else:
        (result,) = await within_quota(services, key, (spec,))
    if isinstance(result, Refused):
        raise result.error
    call.about["task_id"] = result.task_id  # Of a repetition, the one that is stored.
    call.say_of_span(
        {
            "messaging.message.id": result.task_id,
            "messaging.destination.name": spec.queue,
            "hcna.task.type": spec.task_type,
        }
    )
    return answer(submitted(result), 202)


async def within_quota(
    services: Services, key: ApiKey, specs: Sequence[TaskSpec], *, atomic: bool = False
) -> Sequence[SubmitResult]:
    """Hand over as many tasks as the key's quota has room for; refuse the others.

    A repetition under an idempotency key asks for no room: its task is in the queue already, or has
    been. The specs stand behind those that they depend on, so none that is sent lacks a parent.

    Raises:
        QuotaExceeded: there is room for none; or not for all, and it is all or nothing.
    """
    async with services.quotas.hold(key, len(specs)) as held:
        free: set[str] = set()
        if held.places < len(specs):
            free = await services.quotas.repeated(key, specs)
        sent: list[TaskSpec] = []
        new = 0
        for spec in specs:
            if spec.id in free or new < held.places:
                sent.append(spec)
                new += spec.id not in free
        if not sent or (atomic and len(sent) < len(specs)):
            raise used_up(key)
        answers = iter(await services.gatherer.submit(sent, atomic=atomic))
        chosen = {spec.id for spec in sent}
        results: list[SubmitResult] = [
            next(answers) if spec.id in chosen else Refused(used_up(key)) for spec in specs
        ]
        held.accepted = sum(isinstance(one, Accepted) and not one.duplicate for one in results)
    return results


def submitted(result: Accepted) -> dict[str, object]:
    """Return the answer to an accepted task."""
    view: dict[str, object] = {
        "task_id": result.task_id,
        "status": result.state.value,
        "message": SUBMITTED,
    }
    if result.duplicate:
        view["duplicate"] = True
    return view


@routes.add(
    "GET",
    "/tasks/{task_id}",
    policy=Policy(role="viewer", check=Check.TASK),
    sort=read_or_wait,
    query=TaskQuery,
    answers={200: TaskOut},
    problems=(404, 405),
)
async def get_task(call: Call) -> Response:
    """Show a task, waiting for its end if asked to.

    With ``wait`` the answer comes as soon as the task has ended, or after that many seconds as it
    stands then.
    """
    services = call.services
    query = call.query(TaskQuery)
    wait_s = checked_wait(call, query.wait)
    task_id = call.path("task_id")
    deadline = services.clock.elapsed() + wait_s
    with services.feed.watch((task_id,) if wait_s else ()) as ended:
        while True:
            ended.clear()
            task, attempts = await services.reads.find(task_id)
            if task.state in TERMINAL:
                break
            left_s = deadline - services.clock.elapsed()
            if left_s <= 0 or not await call.wait_for(ended, left_s):
                if wait_s:  # What changed while waiting is worth telling.
                    task, attempts = await services.reads.find(task_id)
                break
    cluster = NOBODY if task.state in TERMINAL else await services.cache.cluster()
    view = task_view(task, attempts, cluster, now=services.clock.now(), with_payload=query.payload)
    return answer(seen_as(call.key, task, view))


def checked_wait(call: Call, wait_s: float) -> float:
    """Return the seconds to wait, within the limit."""
    limit = call.services.settings.limits.wait_s_max
    if wait_s > limit:
        raise refuse_field("wait", f"must be at most {limit:g} seconds; ask again after that")
    return wait_s


def page_limit(call: Call, asked: int | None) -> int:
    """Return how many items a page has, within the limit."""
    limits = call.services.settings.limits
    if asked is not None and asked > limits.page_items_max:
        raise refuse_field("limit", f"must be at most {limits.page_items_max}")
    return asked or limits.page_items


@routes.add(
    "GET",
    "/tasks",
    policy=Policy(role="viewer", check=Check.TASKS),
    sort=Sort.READ,
    query=ListQuery,
    answers={200: TasksOut},
)
async def list_tasks(call: Call) -> Response:
    """List tasks, newest first.

    ``next_cursor`` leads to the next page; new tasks do not shift the pages.
    """
    services = call.services
    query = call.query(ListQuery)
    limit = page_limit(call, query.limit)
    where = TaskFilter(
        states=_states(query.status),
        task_type=query.task_type,
        queue=query.queue,
        worker=_short(query.worker),
        batch_id=query.batch_id,
        since=query.since,
        principal=whose(call.key),
    )
    before = None if query.cursor is None else int(query.cursor)

    def read(reader: TaskReader) -> tuple[list[dict[str, object]], int | None]:
        page, after = visible_page(reader, call.key, where, before_seq=before, limit=limit)
        views = [
            seen_as(
                call.key,
                task,
                task_view(
                    task,
                    reader.attempts(task.id) if task.state is TaskState.COMPLETED else (),
                    cluster,
                    now=now,
                    with_attempts=False,
                ),
            )
            for task in page
        ]
        return views, after

    cluster = await services.cache.cluster()
    now = services.clock.now()
    views, after = await services.reads.run(read)
    return answer({"tasks": views, "next_cursor": None if after is None else str(after)})


def _states(text: str | None) -> tuple[TaskState, ...]:
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in _STATES]:
        raise refuse_field("status", f"{unknown[0]!r} is not one of {', '.join(_STATES)}")
    return tuple(_STATES[name] for name in dict.fromkeys(names))


def _short(worker: str | None) -> str | None:
    """Return the short name of a worker, whichever of its names was given."""
    if worker is None:
        return None
    try:
        return NodeName.parse(worker).short
    except InvalidName:
        return worker


@routes.add(
    "DELETE",
    "/tasks/{task_id}",
    policy=CHANGES,
    sort=Sort.WRITE,
    answers={200: CancelOut, 202: CancelOut},
    problems=(404, 405, 409),
)
async def delete_task(call: Call) -> Response:
    """Cancel a task; the same as POST /tasks/{task_id}/cancel."""
    return await _cancel(call, "")


@routes.add(
    "POST",
    "/tasks/{task_id}/cancel",
    policy=CHANGES,
    sort=Sort.WRITE,
    body=CancelIn,
    body_optional=True,
    answers={200: CancelOut, 202: CancelOut},
    problems=(404, 409),
)
async def cancel_task(call: Call) -> Response:
    """Cancel a task.

    200: it has ended. 202: it runs, and its process is being stopped. 409: it had ended before.
    """
    body = await call.model(CancelIn, optional=True)
    return await _cancel(call, body.reason)


async def _cancel(call: Call, reason: str) -> Response:
    task_id = call.path("task_id")
    state = await call.services.moderator.cancel(task_id, reason=reason, principal=call.principal)
    view = {"task_id": task_id, "status": state.value, "cancel_requested": True}
    return answer(view, 200 if state in TERMINAL else 202)


@routes.add(
    "POST",
    "/tasks/retry",
    policy=Policy(role="submitter", check=Check.TASKS),
    sort=Sort.WRITE,
    body=ReplayIn,
    answers={202: ReplayOut},
)
async def retry_tasks(call: Call) -> Response:
    """Run failed tasks again, as many as fit a filter; ``more`` says whether others are left.

    A key with scopes names a task type and a queue in them.
    """
    key = call.key
    body = await call.model(ReplayIn)
    where = TaskFilter(
        states=(TaskState.FAILED,),
        principal=whose(key),
        task_type=_in_scope(key, "task_type", body.filter.task_type, key.task_types),
        queue=_in_scope(key, "queue", body.filter.queue, key.queues),
        kind=None if body.filter.kind is None else FailureKind(body.filter.kind),
        since=body.filter.since,
    )
    async with room_for(call, body.limit) as held:
        query = ReplayQuery(where=where, limit=held.places)
        reply = await call.services.moderator.retry_many(query, principal=call.principal)
        held.accepted = len(reply.retried)
    return answer({"retried": reply.retried, "more": reply.more}, 202)


def _in_scope(key: ApiKey, field: str, asked: str | None, scope: Sequence[str]) -> str | None:
    """Return which task type or queue a filter is limited to.

    Raises:
        OutOfScope: it is not in the key's scope, or there are several that it may mean.
    """
    if asked is None and len(scope) == 1 and not scope[0].endswith("*"):
        return scope[0]
    if scope and (asked is None or not key.covers(**{field: asked})):
        raise OutOfScope(
            f"the key {key.name!r} is for {field} {', '.join(scope)}: name one in filter.{field}"
        )
    return asked


@asynccontextmanager
async def room_for(call: Call, tasks: int) -> AsyncIterator[Hold]:
    """Hold as many places in the caller's quota as there are, at least one.

    Raises:
        QuotaExceeded: there is none.
    """
    if call.key.quota is None:
        yield Hold(tasks)
        return
    async with call.services.quotas.hold(call.key, tasks) as held:
        if not held.places:
            raise used_up(call.key)
        yield held


@routes.add(
    "POST",
    "/tasks/{task_id}/retry",
    policy=CHANGES,
    sort=Sort.WRITE,
    body=Nothing,
    body_optional=True,
    answers={202: SubmitOut},
    problems=(404, 409),
)
async def retry_task(call: Call) -> Response:
    """Run a failed task again; 409 if it has not failed."""
    await call.model(Nothing, optional=True)
    task_id = call.path("task_id")
    async with room_for(call, 1) as held:
        state = await call.services.moderator.retry(task_id, principal=call.principal)
        held.accepted = 1
    return answer(submitted(Accepted(task_id, state)), 202)

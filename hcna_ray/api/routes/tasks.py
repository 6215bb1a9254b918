"""Tasks: submit one, look at one, list, cancel, run failed ones again."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.problems import refuse_field
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
from hcna_ray.api.submission import Sender
from hcna_ray.api.views import NOBODY, task_view
from hcna_ray.core.errors import InvalidName
from hcna_ray.core.models import TERMINAL, FailureKind, TaskFilter, TaskState
from hcna_ray.core.naming import NodeName
from hcna_ray.runtime.messages import Accepted, Refused, ReplayQuery
from hcna_ray.store.base import TaskReader

routes = Routes("tasks")

SUBMITTED = "Task submitted to M1 for scheduling"
_STATES = {state.value: state for state in TaskState}


def read_or_wait(request: Request) -> Sort:
    """Count a look that waits against the waits, any other against the reads."""
    return Sort.WAIT if request.query_params.get("wait", "0") != "0" else Sort.READ


@routes.add(
    "POST",
    "/tasks",
    access="key",
    sort=Sort.WRITE,
    body=TaskIn,
    answers={202: SubmitOut},
    problems=(409, 429, 507),
)
async def submit_task(call: Call) -> Response:
    """Submit a task.

    The answer is sent after the task is durable. With an Idempotency-Key, sending it again returns
    the task that was stored before; another request under the same key is a 409.
    """
    services = call.services
    body = await call.json()
    sender = Sender(
        principal=call.principal,
        idempotency_key=call.idempotency_key,
        traceparent=call.traceparent,
    )
    (task_id,) = services.ids.task_ids(1)
    spec = services.submissions.task(body, sender, task_id=task_id, now=services.clock.now())
    (result,) = await services.gatherer.submit((spec,))
    if isinstance(result, Refused):
        raise result.error
    return answer(submitted(result), 202)


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
    access="key",
    sort=read_or_wait,
    query=TaskQuery,
    answers={200: TaskOut},
    problems=(404,),
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
    with services.feed.watch((task_id,)) as ended:
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
    cluster = await services.cache.cluster() if task.state is TaskState.QUEUED else NOBODY
    view = task_view(task, attempts, cluster, now=services.clock.now(), with_payload=query.payload)
    return answer(view)


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


@routes.add("GET", "/tasks", access="key", sort=Sort.READ, query=ListQuery, answers={200: TasksOut})
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
    )
    before = None if query.cursor is None else int(query.cursor)

    def read(reader: TaskReader) -> list[dict[str, object]]:
        page = reader.page(where, before_seq=before, limit=limit + 1)
        if len(page) > limit:
            del page[limit:]
            cursor.append(str(page[-1].seq))
        return [
            task_view(
                task,
                reader.attempts(task.id) if task.state is TaskState.COMPLETED else (),
                cluster,
                now=now,
                with_attempts=False,
            )
            for task in page
        ]

    cursor: list[str] = []
    cluster = await services.cache.cluster()
    now = services.clock.now()
    views = await services.reads.run(read)
    return answer({"tasks": views, "next_cursor": cursor[0] if cursor else None})


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
    access="key",
    sort=Sort.WRITE,
    answers={200: CancelOut, 202: CancelOut},
    problems=(404, 409),
)
async def delete_task(call: Call) -> Response:
    """Cancel a task; the same as POST /tasks/{task_id}/cancel."""
    return await _cancel(call, "")


@routes.add(
    "POST",
    "/tasks/{task_id}/cancel",
    access="key",
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
    access="key",
    sort=Sort.WRITE,
    body=ReplayIn,
    answers={202: ReplayOut},
)
async def retry_tasks(call: Call) -> Response:
    """Run failed tasks again, as many as fit a filter; ``more`` says whether others are left."""
    body = await call.model(ReplayIn)
    where = TaskFilter(
        states=(TaskState.FAILED,),
        task_type=body.filter.task_type,
        queue=body.filter.queue,
        kind=None if body.filter.kind is None else FailureKind(body.filter.kind),
        since=body.filter.since,
    )
    reply = await call.services.moderator.retry_many(
        ReplayQuery(where=where, limit=body.limit), principal=call.principal
    )
    return answer({"retried": reply.retried, "more": reply.more}, 202)


@routes.add(
    "POST",
    "/tasks/{task_id}/retry",
    access="key",
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
    state = await call.services.moderator.retry(task_id, principal=call.principal)
    return answer(submitted(Accepted(task_id, state)), 202)

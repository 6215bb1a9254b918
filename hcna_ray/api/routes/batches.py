"""Many tasks at once: submit a batch, wait for many."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from hcna_ray.api import strict_json
from hcna_ray.api.admission import Sort
from hcna_ray.api.ids import batch_id_of
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.problems import (
    TooLarge,
    problem,
    problem_of,
    refuse_field,
    render,
    status_of,
)
from hcna_ray.api.routes.tasks import SUBMITS, checked_wait, within_quota
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import BatchIn, BatchOut, BatchQuery, WaitIn, WaitOut
from hcna_ray.api.submission import Sender, parents_first, resolve
from hcna_ray.api.views import NOBODY, task_view
from hcna_ray.api.visibility import (
    foreign_parents,
    seen_as,
    sees_batch,
    visible_ids,
)
from hcna_ray.core.errors import HcnaError, Invalid, NotFound
from hcna_ray.core.models import TaskSpec, TaskState
from hcna_ray.runtime.messages import Accepted, Refused, SubmitResult
from hcna_ray.store.base import TaskReader

routes = Routes("batches")

#: Items checked before others are served.
SLICE = 100
#: Ended tasks in one answer of POST /tasks/wait.
ENDED_MAX = 1000
#: After the first of many has ended, the answer waits this long for more to go with it.
LINGER_S = 0.01
#: Media types of one task a line; the first is the one that we name.
NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
#: Levels that {"tasks": [...]} adds around a task.
WRAPPING = 2


@routes.add(
    "POST",
    "/tasks/batch",
    policy=SUBMITS,
    sort=Sort.BATCH,
    body=BatchIn,
    body_also={NDJSON[0]: "One task a line, each a BatchTaskIn."},
    query=BatchQuery,
    answers={202: BatchOut},
    problems=(404, 409, 507),
)
async def submit_batch(call: Call) -> Response:
    """Submit many tasks, as ``{"tasks": [...]}`` or as NDJSON, one task a line.

    Each item is accepted or refused by itself, unless ``atomic`` is asked for. Items may depend on
    each other: one carries ``ref: "a"``, another ``depends_on: ["ref:a"]``. An Idempotency-Key
    covers item *i* as ``key/i``; the batch sent again has the same ``batch_id``.
    """
    services = call.services
    caller = call.key
    sender = Sender(key=caller, idempotency_key=call.idempotency_key, traceparent=call.traceparent)
    bodies = await _bodies(call)
    key = sender.idempotency_key
    batch_id = services.ids.batch_id() if key is None else batch_id_of(caller.owner, key)
    call.about["batch_id"] = batch_id
    call.say_of_span({"messaging.batch.message_count": len(bodies), "hcna.batch.id": batch_id})
    checked = await _check(call, bodies, sender, batch_id)
    if not caller.sees_all:
        specs_named = [item[1] for item in checked if not isinstance(item, HcnaError)]
        foreign = await foreign_parents(services, caller, specs_named)
        checked = [
            item if isinstance(item, HcnaError) else foreign.get(item[1].id, item)
            for item in checked
        ]
    items = resolve(checked)
    atomic = call.query(BatchQuery).atomic
    if atomic:
        refused = [(i, item) for i, item in enumerate(items) if isinstance(item, HcnaError)]
        if refused:
            return _refuse_all(refused, len(items))
    specs = [(index, item) for index, item in enumerate(items) if isinstance(item, TaskSpec)]
    order = parents_first([spec for _, spec in specs])
    specs = [specs[position] for position in order]
    sent = [spec for _, spec in specs]
    if caller.quota is None or not sent:
        answers = await services.gatherer.submit(sent, atomic=atomic)
    else:
        answers = await within_quota(services, caller, sent, atomic=atomic)
    outcomes: list[SubmitResult | HcnaError | None] = [
        item if isinstance(item, HcnaError) else None for item in items
    ]
    for (index, _), result in zip(specs, answers, strict=True):
        outcomes[index] = result
    accepted = [one for one in outcomes if isinstance(one, Accepted)]
    if all(one.duplicate for one in accepted):
        services.empty_batches.add(caller.owner, batch_id)
    view = {
        "batch_id": batch_id,
        "accepted": len(accepted),
        "rejected": len(outcomes) - len(accepted),
        "results": [_outcome(index, one) for index, one in enumerate(outcomes)],
    }
    return answer(view, 202)


async def _bodies(call: Call) -> list[Any]:
    """Return the items as parsed, or in the place of each that could not be, the reason."""
    limits = call.services.settings.limits
    kind = call.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in NDJSON:
        raw = await call.request.body()
        lines = [line for line in raw.split(b"\n") if line.strip()]
        _check_count(len(lines), limits.batch_items)
        return await asyncio.to_thread(_parse_lines, lines, limits.json_depth)
    body = await call.json(extra_depth=WRAPPING)
    if not isinstance(body, dict) or not isinstance(body.get("tasks"), list):
        raise refuse_field("tasks", "must be a list of tasks (or send NDJSON, one task a line)")
    if unknown := sorted(set(body) - {"tasks"}):
        raise refuse_field(unknown[0][:100], "this field is unknown")
    _check_count(len(body["tasks"]), limits.batch_items)
    return list(body["tasks"])


def _check_count(count: int, limit: int) -> None:
    if not count:
        raise refuse_field("tasks", "is empty")
    if count > limit:
        raise TooLarge(f"the batch has {count} tasks, at most {limit} are allowed")


def _parse_lines(lines: Sequence[bytes], depth: int) -> list[Any]:
    parsed: list[Any] = []
    for line in lines:
        try:
            parsed.append(strict_json.parse(line, depth_max=depth))
        except HcnaError as error:
            parsed.append(error)
    return parsed


async def _check(
    call: Call, bodies: Sequence[Any], sender: Sender, batch_id: str
) -> list[tuple[str | None, TaskSpec] | HcnaError]:
    services = call.services
    now = services.clock.now()
    checked: list[tuple[str | None, TaskSpec] | HcnaError] = []
    task_ids = services.ids.task_ids(len(bodies))
    for index, body in enumerate(bodies):
        if isinstance(body, HcnaError):
            checked.append(body)
        else:
            try:
                item = services.submissions.batch_item(
                    body,
                    sender,
                    index=index,
                    task_id=task_ids[index],
                    batch_id=batch_id,
                    now=now,
                )
                checked.append(item)
            except HcnaError as error:
                checked.append(error)
        if index % SLICE == SLICE - 1:
            await asyncio.sleep(0)
    return checked


def _refuse_all(refused: Sequence[tuple[int, HcnaError]], count: int) -> Response:
    """Refuse an atomic batch with the first item's code, naming what is wrong with each."""
    index, first = refused[0]
    errors: list[tuple[str, str]] = []
    for position, error in refused:
        fields = error.problems if isinstance(error, Invalid) else ()
        errors += [(f"tasks.{position}.{field}", text) for field, text in fields] or [
            (f"tasks.{position}", str(error))
        ]
    detail = (
        f"{len(refused)} of {count} items do not fit, so nothing was stored "
        f"(atomic=true); item {index}: {first}"
    )
    return render(problem(status_of(first), first.code, detail, errors=errors))


def _outcome(index: int, one: SubmitResult | HcnaError | None) -> dict[str, Any]:
    if isinstance(one, Accepted):
        view = {"index": index, "task_id": one.task_id, "status": one.state}
        return view | {"duplicate": True} if one.duplicate else view
    error = one.error if isinstance(one, Refused) else one
    assert error is not None
    return {"index": index, "error": problem_of(error)}


@routes.add(
    "POST",
    "/tasks/wait",
    policy=Policy(role="viewer", check=Check.TASKS),
    sort=Sort.WAIT,
    body=WaitIn,
    answers={200: WaitOut},
    problems=(404,),
)
async def wait_for_tasks(call: Call) -> Response:
    """Return what has ended since a cursor, waiting for the first of it if asked to.

    At most 1000 tasks an answer. ``pending`` counts those that have not ended.
    """
    services = call.services
    body = await call.model(WaitIn)
    wait_s = checked_wait(call, body.wait)
    ids = tuple(dict.fromkeys(body.ids or ()))
    limit = services.settings.limits.wait_ids_max
    if len(ids) > limit:
        raise TooLarge(f"{len(ids)} ids are named, at most {limit} are allowed")
    if body.ids is not None and not ids:
        raise refuse_field("ids", "is empty")
    after = int(body.cursor or 0)
    batch_id, asked = body.batch_id, ids
    if not call.key.sees_all:
        ids = await services.reads.run(lambda reader: visible_ids(reader, call.key, asked))
    deadline = services.clock.elapsed() + wait_s

    def read(reader: TaskReader) -> tuple[int, int, list[dict[str, Any]]]:
        # Counted first: what ends in between is then in the list, and never in neither.
        hidden = batch_id is not None and not _sees(reader, batch_id, call)
        pending = 0 if hidden else reader.open_count(ids=ids, batch_id=batch_id)
        found = (
            [] if hidden else reader.ended(ids=ids, batch_id=batch_id, after=after, limit=ENDED_MAX)
        )
        if batch_id is not None and not after and not found and not pending:
            _check_batch(reader, batch_id, call, hidden=hidden)
        elif not after and asked and len(found) + pending < min(len(asked), ENDED_MAX):
            _check_exist(reader, asked, set(ids))
        now = services.clock.now()
        views = [
            seen_as(
                call.key,
                task,
                task_view(
                    task,
                    reader.attempts(task.id) if task.state is TaskState.COMPLETED else (),
                    NOBODY,
                    now=now,
                    with_attempts=False,
                ),
            )
            for _, task in found
        ]
        return pending, found[-1][0] if found else after, views

    with services.feed.watch(ids, batch_id) as ended:
        while True:
            ended.clear()
            pending, cursor, views = await services.reads.run(read)
            left_s = deadline - services.clock.elapsed()
            if views or not pending or left_s <= 0:
                break
            if not await call.wait_for(ended, left_s):
                pending, cursor, views = await services.reads.run(read)
                break
            if pending > 1:
                await asyncio.sleep(LINGER_S)
    return answer({"ended": views, "cursor": str(cursor), "pending": pending})


def _sees(reader: TaskReader, batch_id: str, call: Call) -> bool:
    key = call.key
    return key.sees_all or sees_batch(reader, call.services.seen_batches, key, batch_id)


def _check_batch(reader: TaskReader, batch_id: str, call: Call, *, hidden: bool) -> None:
    """Raise `NotFound` for a batch that does not exist, or not for the caller."""
    if call.services.empty_batches.has(call.key.owner, batch_id):
        return
    if hidden or not reader.batch_exists(batch_id):
        raise NotFound("batch", batch_id)


def _check_exist(reader: TaskReader, asked: Sequence[str], visible: set[str]) -> None:
    """Raise `NotFound` for the first task that does not exist, or not for the caller."""
    known = reader.get(asked)
    for task_id in asked:
        if task_id not in known or task_id not in visible:
            raise NotFound("task", task_id)

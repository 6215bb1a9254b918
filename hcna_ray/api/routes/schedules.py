"""Schedules: tasks that M1 submits when it is time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.problems import invalid, refuse_field
from hcna_ray.api.routes.tasks import page_limit, room_for, submitted
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import (
    Nothing,
    ScheduleChangeIn,
    ScheduleIn,
    ScheduleOut,
    ScheduleQuery,
    SchedulesOut,
    SchedulesQuery,
    SubmitOut,
)
from hcna_ray.api.submission import Sender
from hcna_ray.api.views import Json, schedule_view
from hcna_ray.api.visibility import find_schedule, schedule_seen, visible_schedules
from hcna_ray.core.schedules import Overlap, Schedule
from hcna_ray.runtime.cron import Cron
from hcna_ray.runtime.requests import MarkSchedule, PutSchedule, RunSchedule
from hcna_ray.store.base import TaskReader

routes = Routes("schedules")

M = TypeVar("M", bound=ScheduleChangeIn)

LOOKS = Policy(role="viewer", check=Check.SCHEDULE)
CHANGES = Policy(role="submitter", check=Check.SCHEDULE)


@routes.add(
    "POST",
    "/schedules",
    policy=CHANGES,
    sort=Sort.WRITE,
    body=ScheduleIn,
    answers={201: ScheduleOut},
    problems=(409,),
)
async def create_schedule(call: Call) -> Response:
    """Create a schedule: M1 submits its task at every instant that its cron line names.

    The task is checked as a submission is, now; it is submitted on the authority of the key that
    asks, as long as that is good. Sending the same again is harmless; a 409 is another schedule
    under the same name.
    """
    body = await _body(call)
    model = _checked(ScheduleIn, body)
    asked = _asked(call, model.name, model, body["task"])
    if model.starts_at is not None:
        # That instant itself counts.
        asked = asked.evolve(decided_until=math.nextafter(model.starts_at, -math.inf))
    order = PutSchedule(schedule=asked, new=True, by=call.principal)
    return _shown(call, await call.services.moderator.change_schedule(order), 201)


@routes.add(
    "GET",
    "/schedules",
    policy=Policy(role="viewer", check=Check.SCHEDULES),
    sort=Sort.READ,
    query=SchedulesQuery,
    answers={200: SchedulesOut},
)
async def list_schedules(call: Call) -> Response:
    """List schedules, by owner and name. ``next_cursor`` leads to the next page."""
    query = call.query(SchedulesQuery)
    limit = page_limit(call, query.limit)
    owner, _, name = (query.cursor or "/").rpartition("/")
    now = call.services.clock.now()

    def read(reader: TaskReader) -> tuple[list[Json], tuple[str, str] | None]:
        page, last = visible_schedules(
            reader, call.key, owner=query.owner, after=(owner, name), limit=limit
        )
        views = [schedule_view(one, schedule_seen(call.key, one), now=now) for one in page]
        return views, last

    views, last = await call.services.reads.run(read)
    return answer({"schedules": views, "next_cursor": None if last is None else "/".join(last)})


@routes.add(
    "GET",
    "/schedules/{name}",
    policy=LOOKS,
    sort=Sort.READ,
    query=ScheduleQuery,
    answers={200: ScheduleOut},
)
async def get_schedule(call: Call) -> Response:
    """Show a schedule: its task, its next instants, and what became of the last ones."""
    return _shown(call, await _found(call))


@routes.add(
    "PUT",
    "/schedules/{name}",
    policy=CHANGES,
    sort=Sort.WRITE,
    query=ScheduleQuery,
    body=ScheduleChangeIn,
    answers={200: ScheduleOut},
    problems=(504,),
)
async def change_schedule(call: Call) -> Response:
    """Give a schedule another definition; its counts go on, its instants begin anew."""
    before = await _found(call)
    body = await _body(call)
    asked = _asked(call, before.name, _checked(ScheduleChangeIn, body), body["task"])
    if before.principal != call.key.owner:
        # It stays its owner's, and is as good as its owner's key.
        spec = dataclasses.replace(
            asked.spec, principal=before.principal, confined=before.spec.confined
        )
        asked = asked.evolve(principal=before.principal, spec=spec, key_sha256=before.key_sha256)
    order = PutSchedule(schedule=asked, new=False, by=call.principal)
    return _shown(call, await call.services.moderator.change_schedule(order))


@routes.add(
    "POST",
    "/schedules/{name}/pause",
    policy=CHANGES,
    sort=Sort.WRITE,
    query=ScheduleQuery,
    body=Nothing,
    body_optional=True,
    answers={200: ScheduleOut},
)
async def pause_schedule(call: Call) -> Response:
    """Submit nothing more; instants that go by meanwhile are not made up for."""
    await call.model(Nothing, optional=True)
    return await _mark(call, "pause")


@routes.add(
    "POST",
    "/schedules/{name}/resume",
    policy=CHANGES,
    sort=Sort.WRITE,
    query=ScheduleQuery,
    body=Nothing,
    body_optional=True,
    answers={200: ScheduleOut},
)
async def resume_schedule(call: Call) -> Response:
    """Go on from now; by its owner, on the authority of the key that asks."""
    await call.model(Nothing, optional=True)
    return await _mark(call, "resume")


@routes.add(
    "POST",
    "/schedules/{name}/run",
    policy=CHANGES,
    sort=Sort.WRITE,
    query=ScheduleQuery,
    body=Nothing,
    body_optional=True,
    answers={202: SubmitOut},
    problems=(409, 507),
)
async def run_schedule(call: Call) -> Response:
    """Submit a schedule's task now, paused or not.

    409: its last task has not ended, and ``overlap`` is ``skip`` or ``queue_one``.
    """
    await call.model(Nothing, optional=True)
    services, schedule = call.services, await _found(call)
    (task_id,) = services.ids.task_ids(1)
    async with room_for(call, 1) as held:
        result = await services.moderator.run_schedule(
            RunSchedule(
                principal=schedule.principal,
                name=schedule.name,
                task_id=task_id,
                idempotency_key=call.idempotency_key,
                by=call.principal,
            )
        )
        held.accepted = int(not result.duplicate)
    return answer(submitted(result), 202)


@routes.add(
    "DELETE",
    "/schedules/{name}",
    policy=CHANGES,
    sort=Sort.WRITE,
    query=ScheduleQuery,
    answers={200: ScheduleOut},
)
async def delete_schedule(call: Call) -> Response:
    """Delete a schedule; return what it was. The tasks that it has submitted stay."""
    return await _mark(call, "delete")


async def _body(call: Call) -> dict[str, Any]:
    body = await call.json(extra_depth=1)
    if not isinstance(body, dict):
        raise refuse_field("body", "must be a JSON object")
    return body


def _checked(kind: type[M], body: dict[str, Any]) -> M:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from None


def _asked(call: Call, name: str, model: ScheduleChangeIn, task: object) -> Schedule:
    """Return the schedule that a caller asks for, as one of its own.

    Raises:
        Invalid: its cron line, its time zone or its task does not fit.
        OutOfScope: its task lies outside of the key's scopes.
    """
    services, key = call.services, call.key
    now = services.clock.now()
    spec, sent = services.submissions.scheduled(task, Sender(key=key), now=now)
    if not Cron(model.cron, model.timezone).next(now, 1):
        raise refuse_field("cron", "names no instant of the next 50 years", "invalid_schedule")
    return Schedule(
        principal=key.owner,
        name=name,
        cron=model.cron,
        timezone=model.timezone,
        spec=spec,
        task=sent,
        overlap=Overlap(model.overlap),
        catch_up_s=model.catch_up_s,
        paused=model.paused,
        key_sha256=key.sha256,
        created_at=now,
        changed_at=now,
        decided_until=now,
    )


async def _found(call: Call) -> Schedule:
    owner = call.query(ScheduleQuery).owner or call.key.owner
    return await find_schedule(call.services, call.key, owner, call.path("name"))


async def _mark(call: Call, action: str) -> Response:
    schedule = await _found(call)
    own = action == "resume" and schedule.principal == call.key.owner
    order = MarkSchedule(
        principal=schedule.principal,
        name=schedule.name,
        action=action,
        by=call.principal,
        key_sha256=call.key.sha256 if own else None,
        confined=not call.key.sees_all,
    )
    return _shown(call, await call.services.moderator.change_schedule(order))


def _shown(call: Call, schedule: Schedule, status: int = 200) -> Response:
    view = schedule_seen(call.key, schedule)
    return answer(schedule_view(schedule, view, now=call.services.clock.now()), status)

"""What happens to tasks, as server-sent events."""

from __future__ import annotations

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.events import (
    BEGINNING,
    MEDIA_TYPE,
    EventStream,
    Place,
    Wanted,
    reset,
)
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.problems import refuse_field
from hcna_ray.api.routing import Call, Routes
from hcna_ray.api.schemas import EventsQuery, TaskEventsQuery
from hcna_ray.api.streaming import StreamResponse
from hcna_ray.core.models import TERMINAL

routes = Routes("events")

_HEADERS = {"Last-Event-ID": "Id of the last event seen: those behind it are told."}


@routes.add(
    "GET",
    "/events",
    policy=Policy(role="viewer", check=Check.TASKS),
    sort=Sort.STREAM,
    query=EventsQuery,
    headers=_HEADERS,
    answers={200: MEDIA_TYPE},
)
async def all_events(call: Call) -> Response:
    """Tell what happens to tasks, as it happens.

    From now on, or from behind ``Last-Event-ID`` (or ``after``) on: each event once, in order. An
    event ``reset`` says that the store was restored from a backup since.
    """
    query = call.query(EventsQuery)
    kinds = frozenset(query.kind.split(",")) if query.kind else frozenset()
    wanted = Wanted(task_type=query.task_type, queue=query.queue, kinds=kinds, follow=query.follow)
    return _stream(call, await _opened(call, wanted, _asked(call, query)))


@routes.add(
    "GET",
    "/tasks/{task_id}/events",
    policy=Policy(role="viewer", check=Check.TASK),
    sort=Sort.STREAM,
    query=TaskEventsQuery,
    headers=_HEADERS,
    answers={200: MEDIA_TYPE, 204: ""},
    problems=(404,),
)
async def task_events(call: Call) -> Response:
    """Tell what has happened to a task and what happens to it, until it has ended.

    From its beginning, or from behind ``Last-Event-ID`` (or ``after``) on. 204: it has ended, and
    everything was told; a browser does not ask again then.
    """
    query = call.query(TaskEventsQuery)
    task_id = call.path("task_id")
    task, _ = await call.services.reads.find(task_id)
    wanted = Wanted(task_id=task_id, follow=query.follow)
    stream = await _opened(call, wanted, _asked(call, query) or BEGINNING)
    stream.ended = task.state in TERMINAL
    if stream.ended and stream.place.number and not stream.first:
        behind = await call.services.events.read(stream.place.number, task_id)
        if not behind.events:
            return Response(status_code=204)
    return _stream(call, stream)


def _asked(call: Call, query: TaskEventsQuery) -> str | None:
    """Return behind which event the client wants to go on, if it said so."""
    # What a browser that connects again has seen is newer than what stands in its URL.
    text = call.request.headers.get("last-event-id") or query.after
    if text is None or text == BEGINNING:
        return text
    if Place.parse(text) is None:
        raise refuse_field("Last-Event-ID", "is not the id of an event, such as 1-1234")
    return text


async def _opened(call: Call, wanted: Wanted, asked: str | None) -> EventStream:
    """Return a stream that stands where the client wants to go on."""
    services = call.services
    generation, last = await services.reads.run(
        lambda reader: (reader.generation(), reader.last_fact())
    )
    first: list[bytes] = []
    if asked is None:
        place = Place(generation, last)
    elif asked == BEGINNING:
        place = Place(generation, 0)
    else:
        found = Place.parse(asked)
        assert found is not None
        place = found
        if place.generation != generation or place.number > last:
            place = Place(generation, last if wanted.task_id is None else 0)
            first.append(reset(place))
    return EventStream(
        hub=services.events,
        caller=call.key,
        wanted=wanted,
        place=place,
        still_good=call.still_good,
        life_s=services.settings.limits.stream_s_max,
        first=first,
    )


def _stream(call: Call, stream: EventStream) -> Response:
    limits = call.services.settings.limits
    return StreamResponse(
        stream.chunks(), media_type=MEDIA_TYPE, send_s_max=limits.stream_send_s_max
    )

"""What handlers have printed."""

from __future__ import annotations

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.outputs import MEDIA_TYPE, PIECE_BYTES, chosen, look, pieces
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.routing import Call, Routes
from hcna_ray.api.schemas import OutputQuery
from hcna_ray.api.streaming import StreamResponse
from hcna_ray.core.errors import NotFound

routes = Routes("logs")


@routes.add(
    "GET",
    "/tasks/{task_id}/logs",
    policy=Policy(role="viewer", check=Check.OUTPUT),
    sort=Sort.STREAM,
    query=OutputQuery,
    answers={200: MEDIA_TYPE},
    problems=(404,),
)
async def task_logs(call: Call) -> Response:
    """Show what a task's handler has printed: standard output and error of one attempt.

    Of the newest attempt, or of ``attempt``; with ``follow`` until that has ended. ``X-Attempt``
    says which it is; 404 ``attempt_not_found``: there is none yet. API keys of this house are made
    unreadable.
    """
    services = call.services
    query = call.query(OutputQuery)
    task_id = call.path("task_id")
    _, attempts = await services.reads.find(task_id)
    attempt = chosen(list(attempts), query.attempt)
    if attempt is None:
        raise NotFound("attempt", str(query.attempt or 1))
    worker, token = attempt.worker, attempt.token

    async def read(offset: int) -> bytes | None:
        return await services.outputs.read(worker, task_id, token, offset, PIECE_BYTES)

    async def ended() -> bool:
        try:
            _, found = await services.reads.find(task_id)
        except NotFound:
            return True
        return all(one.ended_at is not None for one in found if one.token == token)

    limits = services.settings.limits
    response = StreamResponse(
        pieces(
            read,
            query.offset,
            first=await look(read, query.offset),
            over=attempt.ended_at is not None,
            ended=ended,
            still_good=call.still_good,
            follow=query.follow,
            life_s=limits.stream_s_max,
        ),
        media_type=MEDIA_TYPE,
        send_s_max=limits.stream_send_s_max,
    )
    response.headers["X-Attempt"] = str(token.attempt)
    response.headers["X-Worker"] = worker
    return response

"""The page at ``/ui``, and who the key is that it was opened with."""

from __future__ import annotations

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.page import HEADERS, INDEX, PageFile, page_files
from hcna_ray.api.policy import OPEN, Policy
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import WhoOut
from hcna_ray.api.views import iso
from hcna_ray.core.errors import NotFound

routes = Routes("page")


@routes.add(
    "GET",
    "/whoami",
    policy=Policy(role="viewer"),
    sort=Sort.READ,
    answers={200: WhoOut},
)
async def who_am_i(call: Call) -> Response:
    """Say whose key this is and what it may do."""
    key = call.key
    return answer(
        {
            "name": key.name,
            "role": key.role,
            "owner": key.owner,
            "task_types": key.task_types,
            "queues": key.queues,
            "expires_at": iso(key.expires_at),
        }
    )


@routes.add(
    "GET",
    "/ui",
    policy=OPEN,
    sort=Sort.PROBE,
    query=None,
    answers={200: "text/html"},
    in_schema=False,
)
async def page(call: Call) -> Response:
    """Show machines, queues and tasks in a browser, and drive them."""
    return _sent(call, page_files()[INDEX])


@routes.add(
    "GET",
    "/ui/{file}",
    policy=OPEN,
    sort=Sort.PROBE,
    query=None,
    answers={200: "text/javascript"},
    in_schema=False,
)
async def page_file(call: Call) -> Response:
    """Hand out a part of the page."""
    name = call.path("file")
    found = page_files().get(name)
    if found is None:
        raise NotFound("file", name[:100])
    return _sent(call, found)


def _sent(call: Call, file: PageFile) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if file.etag in call.request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.kind)

"""The reference: ``/openapi.json`` for machines, ``/docs`` for people. Nothing from outside."""

from __future__ import annotations

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.openapi import render_page
from hcna_ray.api.policy import OPEN
from hcna_ray.api.routing import Call, Routes, answer

routes = Routes("reference")


@routes.add(
    "GET",
    "/openapi.json",
    policy=OPEN,
    sort=Sort.PROBE,
    query=None,
    answers={200: "application/json"},
    in_schema=False,
)
async def openapi_document(call: Call) -> Response:
    """Describe this API in OpenAPI."""
    return answer(call.request.app.openapi())


@routes.add(
    "GET",
    "/docs",
    policy=OPEN,
    sort=Sort.PROBE,
    query=None,
    answers={200: "text/html"},
    in_schema=False,
)
async def reference_page(call: Call) -> Response:
    """Describe this API for people."""
    return Response(
        render_page(call.request.app.openapi()),
        headers={
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
            "X-Content-Type-Options": "nosniff",
        },
        media_type="text/html",
    )

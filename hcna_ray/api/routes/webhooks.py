"""Reports to webhooks: what they are signed with, and which of them wait."""

from __future__ import annotations

import asyncio
import math

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.policy import Policy
from hcna_ray.api.routes.tasks import page_limit
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import WebhookSecretOut, WebhooksOut, WebhooksQuery
from hcna_ray.api.views import iso
from hcna_ray.core.errors import CannotAccept
from hcna_ray.security.outbound import ensure_master, secret_of

routes = Routes("webhooks")


@routes.add(
    "GET",
    "/webhooks/secret",
    policy=Policy(role="submitter"),
    sort=Sort.READ,
    answers={200: WebhookSecretOut},
)
async def webhook_secret(call: Call) -> Response:
    """Show what reports on the caller's own tasks are signed with, for their receiver to check.

    Everybody has another one, and it stays the same.
    """
    try:
        master = await asyncio.to_thread(ensure_master, call.services.settings.keys_dir)
    except (OSError, ValueError) as error:
        raise CannotAccept(f"the secret cannot be read on M1: {error}", 30) from error
    found = {"secret": secret_of(master, call.key.owner)}
    return answer(found, headers={"Cache-Control": "no-store"})


@routes.add(
    "GET",
    "/admin/webhooks",
    policy=Policy(role="admin"),
    sort=Sort.READ,
    query=WebhooksQuery,
    answers={200: WebhooksOut},
)
async def list_webhooks(call: Call) -> Response:
    """Show the reports that have not been taken to their webhooks yet, those due soonest first.

    Of a URL only host and port: the rest may hold a secret of the receiver's.
    """
    limit = page_limit(call, call.query(WebhooksQuery).limit)
    found = await call.services.reads.run(
        lambda reader: reader.deliveries(due_before=math.inf, limit=limit)
    )
    waiting = [
        {
            "id": one.id,
            "task_id": one.task_id,
            "principal": one.principal,
            "target": one.target,
            "created_at": iso(one.created_at),
            "due_at": iso(one.due_at),
            "tries": one.tries,
            "note": one.note,
        }
        for one in found
    ]
    return answer({"waiting": waiting})

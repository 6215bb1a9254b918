"""Operations: intents, queues, audit log, keys."""

from __future__ import annotations

import re

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.problems import refuse_field
from hcna_ray.api.routes.tasks import page_limit
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import (
    AuditOut,
    IntentIn,
    IntentOut,
    KeysOut,
    Nothing,
    PageQuery,
    QueueOut,
)
from hcna_ray.api.views import iso

routes = Routes("admin")

ADMIN = Policy(role="admin")
QUEUES = Policy(role="operator", check=Check.QUEUE)

#: How long a node has to answer an intent.
INTENT_WAIT_S = 15.0

_QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,63}\Z")


@routes.add(
    "POST",
    "/admin/send-intent",
    policy=ADMIN,
    sort=Sort.WAIT,
    body=IntentIn,
    answers={200: IntentOut},
    problems=(404,),
)
async def send_intent(call: Call) -> Response:
    """Send a node an intent, such as test.ping, and return its answer."""
    body = await call.model(IntentIn)
    reply = await call.services.moderator.send_intent(
        body.dst, body.intent, body.payload, principal=call.principal, wait_s=INTENT_WAIT_S
    )
    return answer({name: reply[name] for name in ("msg_id", "dst", "intent", "answer")})


@routes.add(
    "POST",
    "/admin/queues/{name}/pause",
    policy=QUEUES,
    sort=Sort.WRITE,
    body=Nothing,
    body_optional=True,
    answers={200: QueueOut},
)
async def pause_queue(call: Call) -> Response:
    """Start nothing more from a queue; tasks are still accepted into it."""
    return await _pause(call, True)


@routes.add(
    "POST",
    "/admin/queues/{name}/resume",
    policy=QUEUES,
    sort=Sort.WRITE,
    body=Nothing,
    body_optional=True,
    answers={200: QueueOut},
)
async def resume_queue(call: Call) -> Response:
    """Start tasks from a queue again."""
    return await _pause(call, False)


async def _pause(call: Call, paused: bool) -> Response:
    await call.model(Nothing, optional=True)
    name = call.path("name")
    if not _QUEUE.match(name):
        raise refuse_field("name", "is not the name of a queue")
    await call.services.moderator.pause_queue(name, paused, principal=call.principal)
    call.services.cache.forget()
    return answer({"queue": name, "paused": paused})


@routes.add(
    "GET",
    "/admin/audit",
    policy=ADMIN,
    sort=Sort.READ,
    query=PageQuery,
    answers={200: AuditOut},
)
async def list_audit(call: Call) -> Response:
    """Show who did what, newest first, with the hash that chains each line to the one before it.

    ``hcna audit verify`` follows the chain, ``hcna audit export`` writes it to a file.
    """
    query = call.query(PageQuery)
    limit = page_limit(call, query.limit)
    before = None if query.cursor is None else int(query.cursor)
    lines = await call.services.reads.run(
        lambda reader: reader.audit(before=before, limit=limit + 1)
    )
    more = len(lines) > limit
    shown = lines[:limit]
    entries = [
        {
            "number": line.number,
            "at": iso(line.entry.at),
            "principal": line.entry.principal,
            "action": line.entry.action,
            "target": line.entry.target,
            "outcome": line.entry.outcome,
            "detail": line.entry.detail,
            "hash": line.hash,
        }
        for line in shown
    ]
    return answer({"entries": entries, "next_cursor": str(shown[-1].number) if more else None})


@routes.add("GET", "/admin/keys", policy=ADMIN, sort=Sort.READ, answers={200: KeysOut})
async def list_keys(call: Call) -> Response:
    """List the names of the API keys. The keys themselves are known to their holders alone."""
    keys = [
        {
            "name": key.name,
            "role": key.role,
            "owner": key.owner,
            "task_types": key.task_types,
            "queues": key.queues,
            "created_at": iso(key.created_at),
            "expires_at": iso(key.expires_at),
            "revoked_at": iso(key.revoked_at),
            "state": key.state(call.services.clock.now()),
            "quota": key.quota,
            "rate": key.rate,
            "burst": key.burst,
            "fingerprint": key.fingerprint,
        }
        for key in call.services.keys.all()
    ]
    return answer({"keys": keys})

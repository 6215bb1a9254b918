"""Probes and figures: open, cheap, and answered even while the moderator is away."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
from collections import Counter as Tally
from typing import Any

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.metrics import own_figures, read_stored, stored_figures, worker_figures
from hcna_ray.api.policy import OPEN, Check, Policy
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import (
    HealthOut,
    LiveOut,
    ReadyOut,
    StatusOut,
    TargetsOut,
    TargetsQuery,
)
from hcna_ray.api.services import Glance
from hcna_ray.api.targets import targets
from hcna_ray.api.views import iso
from hcna_ray.api.visibility import worker_views
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import TERMINAL, TaskState, WorkerState
from hcna_ray.observability.exposition import CONTENT_TYPE, Sample, render

routes = Routes("probes")

_VERSIONS = ("hcna-ray", "ray", "fastapi", "pydantic", "apsw")

Depth = dict[tuple[str, TaskState], int]


#: Why C1 is not ready although nothing needs to be deployed again.
M1_WAITS, STORE_AWAY = "M1 waits for its task store", "the store cannot be read"


async def _depth(call: Call) -> Depth | None:
    """Return queue depths, or ``None`` when the store cannot be read."""
    try:
        return await call.services.reads.run(lambda reader: reader.depth())
    except HcnaError:
        return None


async def _totals(call: Call) -> dict[str, int] | None:
    """Return how many tasks were accepted and ended, by how, since the store was made."""
    if call.caller is None:
        return None
    try:
        counters = await call.services.reads.run(lambda reader: reader.counters())
    except HcnaError:
        return None
    figures = stored_figures(counters, {})
    ended: Tally[str] = Tally({state.value: 0 for state in TERMINAL})
    for (_, state), count in figures["ended"].items():
        ended[state] += count
    return {"accepted": sum(figures["accepted"].values()), **ended}


async def _look(call: Call) -> tuple[Glance | None, Depth | None]:
    return await asyncio.gather(call.services.cache.glance(), _depth(call))


@routes.add(
    "GET",
    "/health",
    policy=OPEN,
    sort=Sort.PROBE,
    query=None,
    answers={200: HealthOut, 503: HealthOut},
)
async def health(call: Call) -> Response:
    """Say how the whole is doing.

    ``healthy``: M1 answers and a worker is online. ``degraded``: one of the two is missing; tasks
    are kept. ``unhealthy`` (503): the store cannot be read.
    """
    glance, depth = await _look(call)
    workers = 0 if glance is None else glance.status.workers_online
    status = "healthy" if glance is not None and workers else "degraded"
    if depth is None:
        status = "unhealthy"
    tasks: Tally[str] = Tally({s.value: 0 for s in TaskState if s not in TERMINAL})
    for (_, state), count in (depth or {}).items():
        if state not in TERMINAL:
            tasks[state.value] += count
    view = {
        "status": status,
        "node_id": call.services.settings.composite.node_id,
        "moderator_connected": glance is not None,
        "worker_nodes": workers,
        "store_readable": depth is not None,
        "tasks": tasks,
        "version": _version("hcna-ray"),
    }
    return answer(view, 503 if depth is None else 200)


@routes.add(
    "GET",
    "/ready",
    policy=OPEN,
    sort=Sort.PROBE,
    query=None,
    answers={200: ReadyOut, 503: ReadyOut},
)
async def ready(call: Call) -> Response:
    """Say whether tasks can be accepted now: M1 answers and the store can be read."""
    glance, depth = await _look(call)
    reasons = []
    if glance is None:
        away = call.services.cache.store_away
        reasons.append(M1_WAITS if away else "M1 does not answer")
    if depth is None:
        reasons.append(STORE_AWAY)
    return answer({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


@routes.add("GET", "/live", policy=OPEN, sort=Sort.PROBE, query=None, answers={200: LiveOut})
async def live(call: Call) -> Response:
    """Say that this replica answers at all."""
    return answer({"alive": True})


@routes.add(
    "GET",
    "/status",
    policy=Policy(role=None, check=Check.WORKERS),
    sort=Sort.PROBE,
    query=None,
    answers={200: StatusOut},
)
async def status(call: Call) -> Response:
    """Show everything at a glance: versions, M1, workers, queues, requests in progress.

    All of it to a key of role operator or admin; of workers and M1 less to others, and least
    without a key.
    """
    services, caller = call.services, call.caller
    full = caller is not None and caller.sees_all
    (glance, depth), totals = await asyncio.gather(_look(call), _totals(call))
    queues: dict[str, dict[str, int]] = {}
    for (queue, state), count in (depth or {}).items():
        queues.setdefault(queue, {})[state.value] = count
    admission = services.admission
    view = {
        "node_id": services.settings.composite.node_id,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _VERSIONS},
        "started_at": iso(services.started_at),
        "moderator": None if glance is None else _moderator(glance, full=full),
        "moderator_waits_for_store": glance is None and services.cache.store_away,
        "store_readable": depth is not None,
        "workers": await worker_views(services, caller, () if glance is None else glance.workers),
        "queues": queues,
        "totals": totals,
        "paused": [] if glance is None else sorted(glance.status.paused),
        "requests": {
            sort.value: {
                "in_progress": admission.in_progress[sort],
                "budget": admission.budgets[sort],
                "refused": admission.refused[sort],
            }
            for sort in Sort
        },
        "task_types": services.registry.names(),
        "problems": [
            f"{problem.distribution}: {problem.message}" if full else problem.distribution
            for problem in services.registry.problems
        ],
    }
    return answer(view)


def _moderator(glance: Glance, *, full: bool) -> dict[str, Any]:
    found = glance.status
    return {
        "node_id": found.node_id,
        "generation": found.generation,
        "started_at": iso(found.started_at),
        "workers": found.workers,
        "workers_online": found.workers_online,
        "open_tasks": found.open_tasks,
        "open_bytes": found.open_bytes,
        "live_attempts": found.live_attempts,
        "commits": found.commits,
        "pid": found.pid,
    } | ({"store": found.store} if full else {})


@routes.add(
    "GET",
    "/metrics",
    policy=Policy(role=None, in_public="viewer"),
    sort=Sort.PROBE,
    query=None,
    answers={200: "text/plain"},
)
async def metrics(call: Call) -> Response:
    """Show every figure in Prometheus' text format."""
    services = call.services
    now = services.clock.now()
    glance = await services.cache.glance()
    try:
        stored = await services.reads.run(lambda reader: read_stored(reader, now))
    except HcnaError:
        stored = None
    loop = asyncio.get_running_loop()
    certificates = await loop.run_in_executor(services.files, services.certificates.ends)
    workers: dict[tuple[str, ...], int] | None = None
    if glance is not None:
        workers = {(state.value,): 0 for state in WorkerState}
        for worker in glance.workers:
            workers[worker.state.value,] += 1
    admission = services.admission
    sample = Sample(
        **(stored or {}),
        workers=workers,
        worker_figures={} if glance is None else worker_figures(glance.workers),
        moderator=None if glance is None else own_figures(glance.status),
        certificates=certificates,
        moderator_up=glance is not None,
        store_readable=stored is not None,
        requests=services.stats.requests,
        durations=services.stats.durations,
        in_progress={(s.value,): n for s, n in admission.in_progress.items()},
        refused={(s.value,): n for s, n in admission.refused.items()},
        gather_items=services.gatherer.items,
        gather_calls=services.gatherer.calls,
        waiting=services.feed.waiting,
    )
    return Response(render(sample), 200, {"Content-Type": CONTENT_TYPE})


@routes.add(
    "GET",
    "/metrics/targets",
    policy=Policy(role=None, in_public="viewer"),
    sort=Sort.PROBE,
    query=TargetsQuery,
    answers={200: TargetsOut},
)
async def metrics_targets(call: Call) -> Response:
    """List what Prometheus shall scrape: C1 (job ``hcna``) and every page of Ray (job ``ray``).

    For ``http_sd_configs``. While M1 or Ray does not answer, what was last known is listed.
    """
    services, job = call.services, call.query(TargetsQuery).job
    glance = await services.cache.glance()
    found = targets(
        services.settings,
        host=call.request.headers.get("host", ""),
        workers=[worker.name for worker in (() if glance is None else glance.workers)],
        nodes=await services.exporters.nodes(),
    )
    return answer([group for group in found if job in (None, group["labels"]["job"])])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

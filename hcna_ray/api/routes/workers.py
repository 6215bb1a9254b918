"""Workers: who is there, what they run, and taking them out of service."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from hcna_ray.api.admission import Sort
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import DrainIn, ForgetQuery, Nothing, WorkerOut, WorkersOut
from hcna_ray.api.views import worker_view
from hcna_ray.api.visibility import worker_views
from hcna_ray.core.errors import NotFound
from hcna_ray.core.models import WorkerRecord, WorkerState
from hcna_ray.runtime.messages import WorkerInfo

routes = Routes("workers")

MACHINES = Policy(role="operator", check=Check.MACHINES)
ADMIN = Policy(role="admin")


async def _workers(call: Call) -> tuple[bool, Sequence[WorkerInfo]]:
    """Return whether M1 answers, and the workers: as it sees them, or else as last stored."""
    services = call.services
    glance = await services.cache.glance()
    if glance is not None:
        return True, glance.workers
    records = await services.reads.run(lambda reader: reader.workers())
    now = services.clock.now()
    return False, [_from_record(record, now) for record in records]


def _from_record(record: WorkerRecord, now: float) -> WorkerInfo:
    """Return what the store remembers of a worker. Without M1 nobody knows whether it is there."""
    amounts = {"cpu": record.cpu, "mem_gb": record.mem_gb, "gpu": record.gpu}
    return WorkerInfo(
        name=record.name,
        node_id=record.node_id,
        state=_state_on_record(record),
        last_seen_at=record.last_seen_at,
        last_seen_age_s=max(0.0, now - record.last_seen_at),
        resources=amounts | dict(record.resources),
        free={},
        labels=dict(record.labels),
        task_types=record.task_types,
        slots=0,
        running=(),
        telemetry={},
        draining_until=record.draining_until,
        address=record.address,
    )


def _state_on_record(record: WorkerRecord) -> WorkerState:
    if record.left_at is not None:
        return WorkerState.GONE
    if record.asleep_at is not None:
        return WorkerState.ASLEEP
    return WorkerState.CORDONED if record.cordoned else WorkerState.SUSPECT


def _named(workers: Sequence[WorkerInfo], name: str) -> WorkerInfo:
    for worker in workers:
        if name in (worker.name, worker.node_id):
            return worker
    raise NotFound("worker", name[:100])


@routes.add(
    "GET",
    "/workers",
    policy=Policy(role="viewer", check=Check.WORKERS),
    sort=Sort.READ,
    answers={200: WorkersOut},
)
async def list_workers(call: Call) -> Response:
    """List every worker with its state, resources and what it runs.

    While M1 does not answer (``moderator_connected: false``) this is what the store remembers.
    """
    connected, workers = await _workers(call)
    views = await worker_views(call.services, call.key, workers)
    return answer({"workers": views, "moderator_connected": connected})


@routes.add(
    "GET",
    "/workers/{name}",
    policy=Policy(role="viewer", check=Check.WORKERS),
    sort=Sort.READ,
    answers={200: WorkerOut},
    problems=(404,),
)
async def get_worker(call: Call) -> Response:
    """Show one worker, by short name or node id."""
    _, workers = await _workers(call)
    worker = _named(workers, call.path("name"))
    return answer((await worker_views(call.services, call.key, [worker]))[0])


@routes.add(
    "POST",
    "/workers/{name}/drain",
    policy=MACHINES,
    sort=Sort.WRITE,
    body=DrainIn,
    body_optional=True,
    answers={200: WorkerOut},
    problems=(404,),
)
async def drain_worker(call: Call) -> Response:
    """Give a worker nothing new and let it finish what it runs, until the deadline."""
    body = await call.model(DrainIn, optional=True)
    return await _set(call, "drain", body.deadline_s)


@routes.add(
    "POST",
    "/workers/{name}/cordon",
    policy=MACHINES,
    sort=Sort.WRITE,
    body=Nothing,
    body_optional=True,
    answers={200: WorkerOut},
    problems=(404,),
)
async def cordon_worker(call: Call) -> Response:
    """Give a worker nothing new."""
    await call.model(Nothing, optional=True)
    return await _set(call, "cordon", None)


@routes.add(
    "POST",
    "/workers/{name}/uncordon",
    policy=MACHINES,
    sort=Sort.WRITE,
    body=Nothing,
    body_optional=True,
    answers={200: WorkerOut},
    problems=(404,),
)
async def uncordon_worker(call: Call) -> Response:
    """Give a drained or cordoned worker work again."""
    await call.model(Nothing, optional=True)
    return await _set(call, "uncordon", None)


@routes.add(
    "DELETE",
    "/workers/{name}",
    policy=ADMIN,
    sort=Sort.WRITE,
    query=ForgetQuery,
    answers={200: WorkerOut},
    problems=(404, 409),
)
async def forget_worker(call: Call) -> Response:
    """Strike a worker that left for good off the record; it may join again later.

    Only one that is asleep or gone, unless ``force`` is given. What it held goes to other workers.
    One in contact that is forgotten by force is a new worker of that name a moment later, if it
    goes on running. Answers with what was known of it.
    """
    query = call.query(ForgetQuery)
    forgotten = await call.services.moderator.forget_worker(
        call.path("name"), force=query.force, principal=call.principal
    )
    call.services.cache.forget()
    return answer(worker_view(forgotten))


async def _set(call: Call, action: str, deadline_s: float | None) -> Response:
    _, workers = await _workers(call)
    worker = _named(workers, call.path("name"))
    changed = await call.services.moderator.set_worker(
        worker.name, action, deadline_s=deadline_s, principal=call.principal
    )
    call.services.cache.forget()
    return answer(worker_view(changed))

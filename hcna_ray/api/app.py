"""Builds C1 around what it is handed. Knows neither Ray nor where anything comes from."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from hcna_ray.api import openapi, problems
from hcna_ray.api.admission import Admission
from hcna_ray.api.allowance import DOUBT_S, Quotas, Rates
from hcna_ray.api.audit import AuditDesk
from hcna_ray.api.bounds import BodyLimits
from hcna_ray.api.clients import Guesses, Origins
from hcna_ray.api.events import EventHub
from hcna_ray.api.gather import Gatherer
from hcna_ray.api.hosts import HostRule
from hcna_ray.api.limits import RequestLimits
from hcna_ray.api.metrics import Certificates, RequestStats
from hcna_ray.api.ports import IdSource, KeyRing, ModeratorPort, Outputs
from hcna_ray.api.reads import Reads
from hcna_ray.api.routes import (
    admin,
    artifacts,
    batches,
    events,
    page,
    probes,
    reference,
    schedules,
    tasks,
    webhooks,
    workers,
)
from hcna_ray.api.routes import (
    outputs as output_routes,
)
from hcna_ray.api.routing import Endpoint, Route, Routes
from hcna_ray.api.schemas import ProblemOut
from hcna_ray.api.services import ClusterCache, Services
from hcna_ray.api.submission import Submissions
from hcna_ray.api.targets import Exporters, RayNode
from hcna_ray.api.waiters import ChangeFeed
from hcna_ray.config import Settings
from hcna_ray.core.clock import Clock
from hcna_ray.core.models import TERMINAL
from hcna_ray.handlers import Registry
from hcna_ray.store.artifacts import ArtifactStore
from hcna_ray.store.base import TaskReader

if TYPE_CHECKING:
    from hcna_ray.observability.spans import Traces

log = logging.getLogger(__name__)

GROUPS: tuple[Routes, ...] = (
    # Batches first: POST /tasks/batch must not be taken for a task id.
    batches.routes,
    tasks.routes,
    events.routes,
    output_routes.routes,
    artifacts.routes,
    workers.routes,
    admin.routes,
    schedules.routes,
    webhooks.routes,
    probes.routes,
    reference.routes,
    page.routes,
)

#: Bytes that one call to the moderator carries, unless a single request has more.
CALL_BYTES_MAX = 16 * 1024 * 1024
FILE_THREADS = 4
#: How long a stopping replica lets tasks on their way get through.
CLOSE_S = 5.0
#: How long it waits for the moderator to take what was counted for the audit log.
AUDIT_CLOSE_S = 2.0
#: Pause between two sweeps of stale uploads.
SWEEP_S = 600.0


def declared_routes() -> Iterator[Route]:
    """Yield every route of C1 with its policy."""
    for group in GROUPS:
        yield from group.declared


class Composite(FastAPI):
    """C1's application, with a short way in.

    FastAPI's way from a request to its route costs more than the route itself. It checks nothing
    of ours: policy, models and errors are the endpoint's (`hcna_ray.api.routing`). So a path
    without parameters is looked up; everything else (parameters, no such path, another method)
    goes the long way.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        bodies: BodyLimits,
        hosts: HostRule,
        origins: Origins,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._direct: Mapping[tuple[str, str], Endpoint] = {
            (route.method, route.path): route.endpoint for route in routes if "{" not in route.path
        }
        self._literal = frozenset(path for _, path in self._direct)
        self._limited = RequestLimits(
            self._to_route,
            bodies=bodies,
            hosts=hosts,
            origins=origins,
            on_refusal=self._count_refusal,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or the lifespan."""
        if scope["type"] == "http":
            await self._limited(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _to_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._direct.get((scope["method"], scope["path"]))
        if endpoint is None and scope["path"] in self._literal:
            # Not /tasks/{task_id} with the id "batch": a path that is written out is itself alone.
            method = scope["method"]
            self.state.services.stats.count("no route", method[:10], 405)
            refusal = problems.not_offered(method, self._offered(scope["path"]))
            await refusal(scope, receive, send)
            return
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)

    def _offered(self, path: str) -> Sequence[str]:
        return sorted(method for method, known in self._direct if known == path)

    def _count_refusal(self, scope: Scope, status: int) -> None:
        self.state.services.stats.count("refused before routing", scope["method"][:10], status)


def build_app(
    *,
    moderator: ModeratorPort,
    reader: TaskReader | Callable[[], TaskReader],
    registry: Registry,
    keys: KeyRing,
    artifacts: ArtifactStore,
    outputs: Outputs,
    settings: Settings,
    clock: Clock,
    ids: IdSource,
    ray_nodes: Callable[[], Sequence[RayNode]] = tuple,
    threaded_reads: bool = True,
    public: bool | None = None,
    traces: Traces | None = None,
    hosts: Collection[str] | None = None,
    edge_mark: str | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        moderator: Takes every write.
        reader: Answers every read; or a function that opens one, called when it is first needed and
            again after it failed.
        registry: Task types, for checking what is submitted.
        keys: Who may do what.
        artifacts: Files by their digest.
        outputs: What handlers have printed.
        settings: Limits, names and defaults.
        clock: Time.
        ids: New ids.
        ray_nodes: Lists Ray's living nodes; may block.
        threaded_reads: False reads on the event loop, for a reader that is not safe elsewhere.
        public: Whether others than this machine can reach it; by default the settings say so.
        traces: Makes spans of what is submitted.
        hosts: Names by which it may be called besides loopback's; by default those in the settings.
        edge_mark: By what the edge is believed; None: nobody is.
    """
    limits = settings.limits
    hosts = settings.composite.hosts if hosts is None else hosts
    open_reader = reader if callable(reader) else _always(reader)
    reads = Reads(open_reader, threaded=threaded_reads)

    async def batches_of(ended: tuple[str, ...]) -> Iterable[str]:
        tasks = await reads.run(lambda opened: opened.get(ended))
        return {
            task.spec.batch_id
            for task in tasks.values()
            if task.spec.batch_id is not None and task.state in TERMINAL
        }

    files = ThreadPoolExecutor(FILE_THREADS, "files")
    services = Services(
        moderator=moderator,
        reads=reads,
        registry=registry,
        keys=keys,
        artifacts=artifacts,
        outputs=outputs,
        settings=settings,
        clock=clock,
        ids=ids,
        admission=Admission(
            writes=limits.writes_max,
            reads=limits.reads_max,
            waits=limits.waits_max,
            streams=limits.streams_max,
        ),
        gatherer=Gatherer(
            moderator,
            clock,
            items_max=limits.gather_items,
            bytes_max=limits.gather_bytes,
            call_items=limits.writer_items,
            call_bytes=CALL_BYTES_MAX,
            resend_s=limits.resend_s,
        ),
        feed=ChangeFeed(moderator, batches_of, clock),
        events=EventHub(moderator, reads),
        cache=ClusterCache(moderator, reads, clock),
        submissions=Submissions(registry, settings),
        stats=RequestStats(),
        certificates=Certificates(settings.cluster_dir, clock),
        audit=AuditDesk(moderator, clock),
        rates=Rates(clock),
        quotas=Quotas(reads, clock, doubt_s=limits.resend_s + DOUBT_S),
        guesses=Guesses(clock),
        public=settings.is_public if public is None else public,
        traces=traces,
        started_at=clock.now(),
        exporters=Exporters(ray_nodes, files),
        files=files,
    )
    routes = list(declared_routes())
    app = Composite(
        routes,
        BodyLimits.by(limits),
        HostRule(hosts, any_address=settings.has_edge),
        Origins(edge_mark),
        title="hcna C1",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(services),
    )
    app.state.services = services
    _install(app, services, routes)
    return app


def _always(reader: TaskReader) -> Callable[[], TaskReader]:
    return lambda: reader


def _install(app: FastAPI, services: Services, routes: Sequence[Route]) -> None:
    def allowed(path: str) -> Sequence[str]:
        return sorted({str(route.method) for route in routes if route.pattern.match(path)})

    problems.install(
        app,
        allowed=allowed,
        counted=lambda method, status: services.stats.count("no route", method[:10], status),
    )
    for group in GROUPS:
        app.include_router(group.router)
    models: list[type[BaseModel]] = [ProblemOut]
    models += [model for route in routes for model in route.models]
    document: dict[str, Any] = {}

    def described() -> dict[str, Any]:
        if not document:
            document.update(openapi.build(app, models, importlib.metadata.version("hcna-ray")))
        return document

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way to replace it.


def _lifespan(services: Services) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.feed.start()
        if services.traces is not None:
            services.traces.start()
        services.events.start()
        sweeping = asyncio.create_task(_sweep(services), name="sweep-uploads")
        auditing = asyncio.create_task(services.audit.run(), name="audit")
        try:
            yield
        finally:
            sweeping.cancel()
            auditing.cancel()
            await services.gatherer.close(CLOSE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(AUDIT_CLOSE_S):
                    await services.audit.flush()
            await services.events.stop()
            await services.feed.stop()
            await services.reads.close()
            services.files.shutdown(wait=False)
            if services.traces is not None:
                await asyncio.to_thread(services.traces.close)

    return lifespan


async def _sweep(services: Services) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            swept = await loop.run_in_executor(services.files, services.artifacts.sweep)
        except OSError as error:
            log.warning(
                "stale uploads could not be swept",
                extra={"action": "artifacts.sweep_failed", "reason": str(error)},
            )
            continue
        if swept:
            log.info(
                "stale uploads swept", extra={"action": "artifacts.swept", "upload_count": swept}
            )

"""What the routes of one replica share, wired once by `hcna_ray.api.app.build_app`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hcna_ray.api.admission import Admission
from hcna_ray.api.allowance import Quotas, Rates
from hcna_ray.api.audit import AuditDesk
from hcna_ray.api.clients import Guesses
from hcna_ray.api.events import EventHub
from hcna_ray.api.gather import Gatherer
from hcna_ray.api.metrics import Certificates, RequestStats
from hcna_ray.api.ports import IdSource, KeyRing, ModeratorPort, Outputs
from hcna_ray.api.reads import Reads
from hcna_ray.api.submission import Submissions
from hcna_ray.api.targets import Exporters
from hcna_ray.api.views import NOBODY, Cluster
from hcna_ray.api.visibility import Seen
from hcna_ray.api.waiters import ChangeFeed
from hcna_ray.config import Settings
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError, StoreUnavailable
from hcna_ray.handlers import Registry
from hcna_ray.runtime.messages import ModeratorStatus, WorkerInfo
from hcna_ray.store.artifacts import ArtifactStore

if TYPE_CHECKING:
    from hcna_ray.observability.spans import Traces

log = logging.getLogger(__name__)

#: How old a view of the cluster may be.
VIEW_AGE_S = 0.5
#: How long a probe waits for the moderator before it says that it does not answer.
PROBE_S = 2.0


@dataclass(frozen=True, slots=True)
class Glance:
    """The moderator's status and workers at one moment; ``None`` when it did not answer."""

    status: ModeratorStatus
    workers: Sequence[WorkerInfo]


class ClusterCache:
    """Asks the moderator what many want to know, once for all who ask within half a second."""

    def __init__(self, moderator: ModeratorPort, reads: Reads, clock: Clock) -> None:
        self._moderator = moderator
        self._reads = reads
        self._clock = clock
        self._cluster: tuple[float, Cluster] | None = None
        self._glance: tuple[float, Glance] | None = None
        self._asking: dict[str, asyncio.Task[None]] = {}
        #: Whether M1 said at the last look that its store is away.
        self.store_away = False

    async def cluster(self) -> Cluster:
        """Return what placement sees, or nobody when the moderator does not answer.

        That it did not answer is not kept, as in `glance`.
        """
        kept = self._cluster
        if kept is None or not kept[1].moderator_answers or self._old(kept[0]):
            await self._once("cluster")
        return self._cluster[1] if self._cluster is not None else NOBODY

    async def glance(self) -> Glance | None:
        """Return status and workers, or ``None`` when the moderator does not answer.

        That it did not answer is not kept: who asks after it has answered someone sees it.
        """
        if self._glance is None or self._old(self._glance[0]):
            await self._once("glance")
        return self._glance[1] if self._glance is not None else None

    def forget(self) -> None:
        """Ask anew next time: something was changed through this replica."""
        self._cluster = self._glance = None

    def _old(self, since: float) -> bool:
        return self._clock.elapsed() - since > VIEW_AGE_S

    async def _once(self, what: str) -> None:
        asking = self._asking.get(what)
        if asking is None:
            ask = self._ask_cluster if what == "cluster" else self._ask_glance
            asking = asyncio.create_task(ask(), name=f"ask-{what}", context=Context())
            self._asking[what] = asking
            asking.add_done_callback(lambda _: self._asking.pop(what, None))
        await asyncio.shield(asking)

    async def _ask_cluster(self) -> None:
        try:
            paused = await self._reads.run(lambda reader: reader.paused())
        except HcnaError:
            paused = frozenset()
        try:
            async with asyncio.timeout(PROBE_S):
                views, running, running_max = await self._moderator.worker_views()
            cluster = Cluster(views, running, running_max, paused)
        except (HcnaError, TimeoutError):
            cluster = Cluster((), 0, 0, paused, moderator_answers=False)
        self._cluster = (self._clock.elapsed(), cluster)

    async def _ask_glance(self) -> None:
        self._glance = None
        # What the last look found stays until this one has: who asks meanwhile reads it.
        store_away = False
        try:
            async with asyncio.timeout(PROBE_S):
                status = await self._moderator.status()
                glance = Glance(status, await self._moderator.workers())
            self._glance = (self._clock.elapsed(), glance)
        except StoreUnavailable:
            store_away = True
        except (HcnaError, TimeoutError):
            log.debug("moderator does not answer", extra={"action": "api.moderator_silent"})
        self.store_away = store_away


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything a route may use."""

    moderator: ModeratorPort
    reads: Reads
    registry: Registry
    keys: KeyRing
    artifacts: ArtifactStore
    outputs: Outputs
    settings: Settings
    clock: Clock
    ids: IdSource
    admission: Admission
    gatherer: Gatherer
    feed: ChangeFeed
    events: EventHub
    cache: ClusterCache
    submissions: Submissions
    stats: RequestStats
    certificates: Certificates
    exporters: Exporters
    audit: AuditDesk
    started_at: float
    #: Blocking file work.
    files: ThreadPoolExecutor
    #: Requests and open tasks by key.
    rates: Rates
    quotas: Quotas
    #: Wrong keys by address.
    guesses: Guesses
    #: Makes spans of requests that hand over work, if anybody wants them.
    traces: Traces | None = None
    #: Whether C1 listens on more than loopback.
    public: bool = False
    #: Recent batches none of whose items was new, by principal: there is nothing to wait for.
    empty_batches: Seen = field(default_factory=Seen)
    #: Which batches a key was found to see.
    seen_batches: Seen = field(default_factory=Seen)

"""Wires the application inside a Serve replica: settings, keys, store, files, moderator."""

from __future__ import annotations

import asyncio
import functools
import logging
from pathlib import Path

import ray
from fastapi import FastAPI

from hcna_ray.api.app import build_app
from hcna_ray.api.ids import UlidIds
from hcna_ray.api.ray_moderator import RayModerator
from hcna_ray.api.services import Services
from hcna_ray.api.targets import nodes_alive
from hcna_ray.config import Settings, load_settings, names_here
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError
from hcna_ray.handlers import load_registry
from hcna_ray.observability import logs
from hcna_ray.observability.traces import TracesPlan, open_traces
from hcna_ray.runtime.artifacts import open_store
from hcna_ray.runtime.output import outputs_of
from hcna_ray.runtime.output_link import OutputLink
from hcna_ray.runtime.ray_link import MODERATOR, ActorLink, agent_name
from hcna_ray.security.edge_mark import read_edge_mark
from hcna_ray.security.key_ring import FileKeyRing
from hcna_ray.security.own_certs import names_in
from hcna_ray.store.factory import open_reader

log = logging.getLogger(__name__)


def build_replica_app(home: str | None, config: str | None) -> FastAPI:
    """Build C1 from the settings of this machine.

    Args:
        home: State directory, or ``None`` for what the environment says.
        config: Settings file, or ``None`` likewise.

    Raises:
        ConfigError: the settings cannot be used.
    """
    settings = load_settings(
        None if home is None else Path(home), None if config is None else Path(config)
    )
    logs.configure(
        settings.logs_dir / "composite.log",
        fields={"node": settings.composite.name, "node_id": settings.composite.node_id},
    )
    clock = SystemClock()
    return build_app(
        moderator=RayModerator(ActorLink(MODERATOR, settings.moderator_socket)),
        reader=functools.partial(open_reader, settings),
        registry=load_registry(),
        keys=FileKeyRing(settings.keys_dir, clock),
        artifacts=open_store(settings),
        outputs=OutputLink(
            functools.partial(outputs_of, settings),
            lambda worker: ActorLink(agent_name(worker)),
        ),
        settings=settings,
        clock=clock,
        ids=UlidIds(),
        traces=open_traces(TracesPlan.of(settings, "hcna-c1", settings.composite.node_id)),
        ray_nodes=lambda: nodes_alive(ray.nodes()),  # type: ignore[no-untyped-call]
        hosts=hosts_of(settings),
        edge_mark=read_edge_mark(settings.cluster_dir) if settings.has_edge else None,
    )


def hosts_of(settings: Settings) -> tuple[str, ...]:
    """Return by which names C1 may be called, besides those of loopback.

    Those of this machine and of the settings; behind an edge also those of its certificate: C1 is
    started anew when these change.
    """
    names = (*settings.composite.hosts, *names_here(settings))
    if not settings.has_edge:
        return names
    cert_path = settings.composite.security.cert_path
    try:
        return (*names, *names_in(cert_path or settings.cluster_dir / "edge.pem"))
    except HcnaError as error:
        # The supervisor has said so. By address and the names in the settings C1 can be reached.
        log.warning(str(error), extra={"action": "api.certificate_unreadable"})
        return names


async def check_replica(app: FastAPI, timeout_s: float) -> str | None:
    """Return why this replica cannot work, or ``None``.

    A store that cannot be read is not a reason, and neither is a moderator that is away: another
    replica would meet the same. A thread that hangs is.
    """
    services: Services = app.state.services
    if not services.feed.alive:
        return "the change feed has ended"
    if not services.events.alive:
        return "the event hub has ended"
    try:
        async with asyncio.timeout(timeout_s):
            await services.reads.run(lambda reader: reader.paused())
    except TimeoutError:
        return f"a read takes longer than {timeout_s:g} s"
    except HcnaError:
        return None
    return None

"""Wires the application inside a Serve replica: settings, keys, store, files, moderator."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from fastapi import FastAPI

from hcna_ray.api.app import build_app
from hcna_ray.api.auth import FileKeyRing
from hcna_ray.api.ids import UlidIds
from hcna_ray.api.ray_moderator import RayModerator
from hcna_ray.api.services import Services
from hcna_ray.config import load_settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError
from hcna_ray.handlers import load_registry
from hcna_ray.observability import logs
from hcna_ray.runtime.artifacts import open_store
from hcna_ray.runtime.ray_link import MODERATOR, ActorLink
from hcna_ray.store.factory import open_reader


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
        settings.logs_dir / "composite.log", fields={"node_id": settings.composite.node_id}
    )
    clock = SystemClock()
    return build_app(
        moderator=RayModerator(ActorLink(MODERATOR, settings.moderator_socket)),
        reader=functools.partial(open_reader, settings),
        registry=load_registry(),
        keys=FileKeyRing(settings.keys_dir, clock),
        artifacts=open_store(settings),
        settings=settings,
        clock=clock,
        ids=UlidIds(),
    )


async def check_replica(app: FastAPI, timeout_s: float) -> str | None:
    """Return why this replica cannot work, or ``None``.

    A store that cannot be read is not a reason, and neither is a moderator that is away: another
    replica would meet the same. A thread that hangs is.
    """
    services: Services = app.state.services
    if not services.feed.alive:
        return "the change feed has ended"
    try:
        async with asyncio.timeout(timeout_s):
            await services.reads.run(lambda reader: reader.paused())
    except TimeoutError:
        return f"a read takes longer than {timeout_s:g} s"
    except HcnaError:
        return None
    return None

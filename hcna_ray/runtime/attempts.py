"""What runs on a worker as Ray tasks: slots, and heavy attempts. Submitted by the worker's agent.

The functions here wire a `SlotHost` to this process; they hold no rules. Handlers run in executors
that the host forks, never in a Ray process.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from hcna_ray import failpoints
from hcna_ray.config import Settings, load_settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import StaleWorker
from hcna_ray.core.models import Token
from hcna_ray.core.naming import NodeName
from hcna_ray.observability import logs
from hcna_ray.observability.traces import TracesPlan
from hcna_ray.runtime.artifacts import WorkerArtifacts
from hcna_ray.runtime.host import HostSettings, SlotHost
from hcna_ray.runtime.keyring import guard_of
from hcna_ray.runtime.messages import Offer
from hcna_ray.runtime.nursery import ProcessNursery
from hcna_ray.runtime.output import outputs_of
from hcna_ray.runtime.ray_link import ActorLink, SlotModeratorLink, agent_name

#: How long a heavy attempt's process tries to deliver its outcome before it leaves it to the agent.
HEAVY_FLUSH_S = 10.0


def run_slot(worker: str, home: str, incarnation: str, slot: int, name: str) -> None:
    """A slot: run what the moderator grants, until this worker is replaced or the process ends."""
    settings = _begin(worker, home)
    if _attach(worker, name):
        asyncio.run(_serve(settings, worker, incarnation, slot, name, None))


def run_heavy(worker: str, home: str, incarnation: str, offer: Offer, name: str) -> None:
    """One attempt in a process of its own, with what it needs set aside by Ray."""
    settings = _begin(worker, home)
    if _attach(worker, name):
        sent = Offer(*offer)._replace(token=Token(*offer.token))
        asyncio.run(_serve(settings, worker, incarnation, -1, name, sent))


def _begin(worker: str, home: str) -> Settings:
    settings = load_settings(Path(home))
    logs.configure(settings.logs_dir / "worker.log", fields={"node": worker}, rotate=False)
    return settings


def _attach(worker: str, name: str) -> bool:
    """Tell the agent which process this is; it says whether there is still work for it."""
    failpoints.hit("slot.process.begun")
    begin: bool = ActorLink(agent_name(worker)).call("attach", name, os.getpid(), timeout_s=60.0)
    failpoints.hit("slot.process.attached")
    return begin


async def _serve(
    settings: Settings,
    worker: str,
    incarnation: str,
    slot: int,
    name: str,
    offer: Offer | None,
) -> None:
    outbox = settings.outbox_dir.parent / worker
    slots = settings.slots
    node_id = node_id_of(worker, settings)
    traces = TracesPlan.of(settings, "hcna-worker", node_id)
    nursery = ProcessNursery(
        {
            "worker": worker,
            "node_id": node_id,
            "disk_path": str(settings.data_dir),
            "scratch_root": str(scratch_root(settings, worker)),
            "long_s": slots.long_ms / 1000.0,
            "report_s": slots.report_ms / 1000.0,
            "result_bytes_max": settings.limits.result_bytes,
            "outbox": str(outbox),
            "log": str(settings.logs_dir / "worker.log"),
            "outputs": str(outputs_of(settings, worker)),
            "output_bytes": settings.limits.output_bytes,
            "outputs_bytes_max": settings.limits.outputs_bytes,
            "once": offer is not None,
            **({} if traces is None else {"traces": traces.to_json()}),
        }
    )
    host = SlotHost(
        HostSettings(
            worker=worker,
            incarnation=incarnation,
            slot=slot,
            name=name,
            outbox=outbox,
            attempts_max=slots.max if offer is None else 1,
            long_s=slots.long_ms / 1000.0,
            exchange_wait_s=slots.exchange_wait_s,
        ),
        SlotModeratorLink(
            worker,
            incarnation,
            slots.exchange_wait_s,
            guard_of(settings),
            settings.moderator_socket,
        ),
        nursery,
        WorkerArtifacts(settings),
        SystemClock(),
    )
    try:
        if offer is None:
            await host.serve()
        else:
            await host.run_once(offer, HEAVY_FLUSH_S)
    except StaleWorker:
        return
    finally:
        await host.end()
        nursery.close()


def node_id_of(worker: str, settings: Settings) -> str:
    """Return the full name of a worker: its own settings', or built like them."""
    own = settings.worker.node_id
    if settings.worker.name == worker:
        return own
    for node in settings.moderator.worker_nodes:
        if NodeName.parse(node.node_id).short == worker:
            return node.node_id
    _, _, rest = own.partition("--")
    arch = NodeName.parse(own).arch
    return f"{arch}-{worker}--{rest}" if rest else f"{arch}-{worker}"


def scratch_root(settings: Settings, worker: str) -> Path:
    """Return the directory of attempts' scratch directories."""
    return settings.home / "scratch" / worker

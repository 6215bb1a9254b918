"""What runs on a worker as Ray tasks: slots, and heavy attempts. Submitted by the worker's agent.

The functions here wire a `Runner` to this process; they hold no rules.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hcna_ray.config import Settings, load_settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import CannotAccept
from hcna_ray.core.models import Token
from hcna_ray.core.naming import NodeName
from hcna_ray.handlers import load_registry
from hcna_ray.observability import logs
from hcna_ray.runtime.artifacts import WorkerArtifacts
from hcna_ray.runtime.journal import RunnerFiles
from hcna_ray.runtime.messages import Exchange, Offer
from hcna_ray.runtime.ray_link import ActorLink, SlotModeratorLink, agent_name
from hcna_ray.runtime.runner import Runner, RunnerSettings


def run_slot(worker: str, home: str, incarnation: str, slot: int, name: str) -> None:
    """A slot: run what the moderator grants, one attempt after the other, until told to end."""
    settings = load_settings(Path(home))
    logs.configure(settings.logs_dir / "worker.log", fields={"node": worker}, rotate=False)
    link = SlotModeratorLink(worker, incarnation, settings.slots.exchange_wait_s)
    runner = build_runner(settings, worker, name, link)
    if not ActorLink(agent_name(worker)).call("attach", name, os.getpid(), timeout_s=1e9):
        return
    with runner.serving():
        serve_slot(runner, link.exchange, worker, incarnation, slot)


def serve_slot(
    runner: Runner,
    exchange: Callable[[Exchange], Any],
    worker: str,
    incarnation: str,
    slot: int,
    *,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Exchange outcomes for leases until the runner must end.

    Args:
        runner: Runs what is granted.
        exchange: Calls the moderator; raises `CannotAccept` while it is away.
        worker: Who asks.
        incarnation: Which life of its agent.
        slot: Which slot.
        pause: Waits between two tries.
    """
    seq = 0
    while not runner.must_end:
        seq += 1
        while True:
            reports = runner.take_unconfirmed()
            try:
                grant = exchange(
                    Exchange(
                        worker=worker,
                        incarnation=incarnation,
                        slot=slot,
                        seq=seq,
                        reports=reports,
                    )
                )
            except CannotAccept:
                pause(0.1)
                continue
            if not grant.hello:
                break
            pause(0.1)
        runner.confirm(reports)
        runner.run(grant.offers)
    runner.flush(5.0)


def run_heavy(worker: str, home: str, incarnation: str, offer: Offer, name: str) -> None:
    """One attempt in a process of its own, with what it needs set aside by Ray."""
    settings = load_settings(Path(home))
    logs.configure(settings.logs_dir / "worker.log", fields={"node": worker}, rotate=False)
    link = SlotModeratorLink(worker, incarnation, settings.slots.exchange_wait_s)
    runner = build_runner(settings, worker, name, link)
    if not ActorLink(agent_name(worker)).call("attach", name, os.getpid(), timeout_s=60.0):
        return
    with runner.serving():
        runner.run((Offer(*offer)._replace(token=Token(*offer.token)),))
        # What is not confirmed by then stays in the journal, and the agent delivers it.
        runner.flush(10.0)


def build_runner(settings: Settings, worker: str, name: str, link: SlotModeratorLink) -> Runner:
    """Wire a runner for this process."""
    limits, slots = settings.limits, settings.slots
    return Runner(
        RunnerSettings(
            worker=worker,
            node_id=node_id_of(worker, settings),
            disk_path=disk_path(settings),
            scratch_root=scratch_root(settings, worker),
            long_s=slots.long_ms / 1000.0,
            report_s=slots.report_ms / 1000.0,
            result_bytes_max=limits.result_bytes,
        ),
        load_registry(),
        RunnerFiles(settings.outbox_dir.parent / worker, name),
        link,
        WorkerArtifacts(settings),
        SystemClock(),
    )


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


def disk_path(settings: Settings) -> Path:
    """Return the directory below which handlers read and write files."""
    return settings.data_dir


def scratch_root(settings: Settings, worker: str) -> Path:
    """Return the directory of attempts' scratch directories."""
    return settings.home / "scratch" / worker

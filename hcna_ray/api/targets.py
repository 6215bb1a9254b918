"""What Prometheus shall scrape, as its HTTP service discovery wants to have it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

from hcna_ray.config import LOOPBACK, Settings, is_loopback

#: How long Ray is given to list its nodes; then the last known list counts.
LOOK_S = 3.0
#: A host name or address, with or without a port.
_HOST = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::(?P<port>\d{1,5}))?"
)
#: What marks the head among Ray's nodes.
HEAD = "node:__internal_head__"


class RayNode(NamedTuple):
    """A node of Ray that is alive, and where it shows its figures."""

    address: str
    metrics_port: int
    #: Names of its resources: its worker's own is among them.
    resources: frozenset[str]


def nodes_alive(table: Sequence[Mapping[str, Any]]) -> list[RayNode]:
    """Return the living nodes of Ray's own table (``ray.nodes()``)."""
    return [
        RayNode(
            str(node["NodeManagerAddress"]),
            int(node["MetricsExportPort"]),
            frozenset(node.get("Resources", ())),
        )
        for node in table
        if node.get("Alive")
    ]


class Exporters:
    """Ray's nodes as last seen. One look at a time: without its head Ray keeps it waiting."""

    def __init__(self, look: Callable[[], Sequence[RayNode]], executor: Executor) -> None:
        """Know none yet.

        Args:
            look: Asks Ray, and blocks.
            executor: Where to do so.
        """
        self._look, self._executor = look, executor
        self._known: Sequence[RayNode] = ()
        self._asking: asyncio.Future[Sequence[RayNode]] | None = None

    async def nodes(self) -> Sequence[RayNode]:
        """Return the nodes that are alive, or those that were when Ray last answered."""
        if self._asking is None or self._asking.done():
            loop = asyncio.get_running_loop()
            self._asking = loop.run_in_executor(self._executor, self._look)
        try:
            async with asyncio.timeout(LOOK_S):
                self._known = await asyncio.shield(self._asking)
        except Exception:  # Whatever Ray raises: the head is away, or restarts.
            return self._known
        return self._known


def targets(
    settings: Settings, *, host: str, workers: Collection[str], nodes: Sequence[RayNode]
) -> list[dict[str, Any]]:
    """Return groups of targets: C1 as job ``hcna``, every page of Ray as job ``ray``.

    Args:
        settings: M1's; its ports.
        host: The ``Host`` field of the request: where whoever asks can reach C1.
        workers: Names of workers.
        nodes: Ray's living nodes.
    """
    composite = _composite(settings, host)
    groups = [_group("hcna", composite, node="M1", exporter="c1")]
    for node in nodes:
        is_head = HEAD in node.resources
        found = sorted(node.resources & set(workers))
        name = "M1" if is_head else found[0] if found else node.address
        at = _bracketed(node.address)
        groups.append(_group("ray", f"{at}:{node.metrics_port}", node=name, exporter="node"))
        if not is_head:
            continue
        pages = {"autoscaler": "autoscaler_metrics"}
        if settings.ray.has_dashboard:
            pages["dashboard"] = "dashboard_metrics"
        groups += [
            _group("ray", f"{at}:{settings.port(port)}", node=name, exporter=exporter)
            for exporter, port in sorted(pages.items())
        ]
        # This page is on loopback alone: there is nothing to scrape for whoever is elsewhere.
        if is_loopback(composite.rpartition(":")[0].strip("[]")):
            edge = f"{LOOPBACK}:{settings.port('haproxy_metrics')}"
            groups.append(_group("ray", edge, node=name, exporter="edge"))
    return groups


def _group(job: str, target: str, **labels: str) -> dict[str, Any]:
    return {"targets": [target], "labels": {"job": job, **labels}}


def _composite(settings: Settings, host: str) -> str:
    """Return where C1 was reached; its own address where the request does not say so well."""
    match = _HOST.fullmatch(host)
    if match is None:
        return f"{_bracketed(settings.api_host)}:{settings.api_port}"
    return f"{match['host']}:{match['port'] or 80}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address and not address.startswith("[") else address

"""``/health`` and ``/metrics`` of one worker, on its own ``worker_port``.

Open to whoever reaches the port, which is loopback unless configured otherwise: both hold figures
about the machine and no task's content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client.core import GaugeMetricFamily

from hcna_ray.observability.exposition import CONTENT_TYPE, WORKER_GAUGES, render_families

#: Figures of the worker and the sentence that explains each.
GAUGES = {
    "hcna_worker_moderator_connected": "Whether the moderator confirmed this worker lately.",
    **WORKER_GAUGES,
}


async def serve(host: str, port: int, read: Callable[[], Mapping[str, Any]]) -> web.AppRunner:
    """Start serving; the runner's ``cleanup`` ends it.

    Args:
        host: Address to bind.
        port: Port to bind.
        read: Returns ``worker``, ``node_id`` and a figure for each of `GAUGES`.

    Raises:
        OSError: the port is taken.
    """

    async def health(_request: web.Request) -> web.Response:
        found = read()
        connected = bool(found["hcna_worker_moderator_connected"])
        body = {
            "status": "healthy" if connected else "degraded",
            "node_id": found["node_id"],
            "moderator_connected": connected,
            "running_attempts": found["hcna_worker_running_attempts"],
        }
        return web.Response(text=json.dumps(body), content_type="application/json")

    async def metrics(_request: web.Request) -> web.Response:
        found = read()
        text = render_families(lambda: [_gauge(name, found) for name in GAUGES])
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def _gauge(name: str, found: Mapping[str, Any]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, GAUGES[name], labels=("worker",))
    gauge.add_metric((str(found["worker"]),), float(found[name]))
    return gauge

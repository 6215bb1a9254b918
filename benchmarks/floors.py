"""The floors: what the parts we stand on allow, each alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.children import Children, do, ended_whatever_happens, free_port, listening
from benchmarks.load import Job
from benchmarks.machine import Usage
from benchmarks.statistics import quantile
from benchmarks.systems import TASK, emptied
from benchmarks.visits import CONNECTIONS, Size
from hcna_ray.supervisor.ports import RAY_TUNING

#: Short, because the paths of sockets are limited.
_RAY_FOLDER = Path(f"/tmp/hcna-floor-{os.getuid()}")
_READY_S = 120.0
#: What its empty processes call themselves.
EMPTY_PROCESSES: Mapping[str, tuple[str, ...]] = {
    "moderator": ("ray::Empty",),
    "c1": ("ray::ServeReplica:empty",),
}


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[Children, int, Mapping[str, float]]]:
    """Run a Ray cluster with an empty replica and an empty actor.

    Yields:
        Its processes, the port of Serve's HAProxy, and the figures of what needs no HTTP.
    """
    emptied(folder)
    port = free_port()
    ports = {
        "FLOOR_PORT": port,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": free_port(),
        "RAY_SERVE_HAPROXY_STATS_PORT": free_port(),
        "RAY_SERVE_HAPROXY_METRICS_PORT": free_port(),
        "AUTOSCALER_METRIC_PORT": free_port(),
        "DASHBOARD_METRIC_PORT": free_port(),
    }
    serve = folder / "serve"
    serve.mkdir()
    environment = {
        **RAY_TUNING,
        **{name: str(number) for name, number in ports.items()},
        "RAY_AUTH_MODE": "disabled",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(serve / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(_RAY_FOLDER / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(_RAY_FOLDER / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(serve),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(serve / "server-state"),
        # The same number of threads as C1's.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, len(os.sched_getaffinity(0)))),
        "FLOOR_RAY_FOLDER": str(_RAY_FOLDER),
        # What Ray writes into the home of whoever starts it stays here.
        "HOME": str(folder),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    emptied(_RAY_FOLDER)
    children = Children(folder / "logs", environment)
    try:
        with ended_whatever_happens(children):
            program = [sys.executable, "-m", "benchmarks.floor_programs", "ray", str(folder)]
            children.start("ray", program)
            figures = folder / "figures.json"
            children.until(figures.exists, "the start of Serve", _READY_S)
            children.until(lambda: listening(port), "the start of HAProxy", _READY_S)
            yield children, port, json.loads(figures.read_text())
    finally:
        shutil.rmtree(_RAY_FOLDER, ignore_errors=True)


def measure(folder: Path, size: Size) -> tuple[dict[str, float], list[Usage]]:
    """Measure every floor."""
    figures: dict[str, float] = {}
    emptied(folder / "sqlite")
    alone = Children(folder / "sqlite" / "logs")
    usages: list[Usage] = []
    with ended_whatever_happens(alone):
        meter = alone.metered()
        program = [sys.executable, "-m", "benchmarks.floor_programs", "sqlite"]
        alone.call("sqlite", [*program, str(folder / "sqlite")], timeout_s=60)
        usages.append(meter.read())
    figures |= json.loads((folder / "sqlite" / "figures.json").read_text())
    with cluster(folder / "ray") as (children, port, found):
        figures |= found
        for path in ("/empty", "/actor"):
            job = Job(kind="burst", port=port, path=path, body=TASK, connections=CONNECTIONS)
            do(job_for(job, size.warm_s))
            meter = children.metered()
            done = do(job_for(job, size.posts_s))
            usages.append(meter.read())
            figures[f"serve{path.replace('/', '_')}_s"] = done.requests / done.accept_s
            figures[f"serve{path.replace('/', '_')}_p50_ms"] = 1000 * quantile(
                done.latencies_s, 0.5
            )
    return figures, usages


def job_for(job: Job, seconds: float) -> Job:
    """Return a job of another length."""
    return replace(job, seconds=seconds)

"""What runs in the process of a floor: ``python -m benchmarks.floor_programs NAME FOLDER``.

``ray`` starts a cluster of its own with the tuning that hcna-ray ships, measures what needs no
HTTP, writes it to ``FOLDER/figures.json`` and then serves until it is ended: ``/empty`` is a
replica that does nothing, ``/actor`` one that makes one actor call. ``sqlite`` measures the store's
library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.statistics import quantile

#: Seconds that each thing is done for.
EACH_S = 2.0
IN_FLIGHT = 32
STREAMED = 64
ROWS = 32


def sqlite(folder: Path) -> dict[str, float]:
    """One row a transaction and 32, in WAL mode, each transaction fsynced."""
    import apsw

    db = apsw.Connection(str(folder / "floor.db"))
    db.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE task (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, body BLOB) STRICT")
    figures: dict[str, float] = {}
    number = 0
    for rows in (1, ROWS):
        took: list[float] = []
        start = time.perf_counter()
        while (begun := time.perf_counter()) - start < EACH_S:
            values = [(f"task-{number + n:026}", b"{" + b"x" * 100 + b"}") for n in range(rows)]
            number += rows
            with db:
                db.executemany("INSERT INTO task (id, body) VALUES (?, ?)", values)
            took.append(time.perf_counter() - begun)
        figures[f"sqlite_{rows}_rows_s"] = rows * len(took) / (time.perf_counter() - start)
        figures[f"sqlite_{rows}_commit_p50_ms"] = 1000 * quantile(took, 0.5)
    db.close()
    return figures


def ray_cluster(folder: Path) -> None:
    """Measure calls and tasks, then serve."""
    import ray
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        object_store_memory=200 * 1024 * 1024,
        _temp_dir=os.environ["FLOOR_RAY_FOLDER"],
        log_to_driver=False,
        configure_logging=False,
    )
    answer = b'{"task_id":"task-0","status":"queued"}'

    @ray.remote(num_cpus=0)
    class Empty:
        async def echo(self, body: bytes) -> bytes:
            return body

    @ray.remote(num_cpus=0)
    def task(body: bytes) -> bytes:
        return body

    @ray.remote(num_cpus=0, num_returns="streaming")
    def stream(body: bytes, count: int) -> Iterator[list[bytes]]:
        for _ in range(count):
            yield [body] * STREAMED

    # What a remote object offers is beyond its types.
    kind: Any = Empty
    empty = kind.options(name="empty", lifetime="detached").remote()
    stream_of: Any = stream.remote
    body = b'{"message":"measure"}'
    figures: dict[str, float] = {}
    figures |= timed("actor_call", lambda: empty.echo.remote(body))
    figures |= timed("task", lambda: task.remote(body))
    ray.get(next(stream_of(body, 1)))
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < EACH_S:
        for reference in stream_of(body, 50):
            count += len(ray.get(reference))
    figures["stream_s"] = count / (time.perf_counter() - start)

    def deployment(handler: type, name: str) -> Any:
        return serve.deployment(
            name=name,
            num_replicas=1,
            max_ongoing_requests=10_000,
            max_queued_requests=2_000,
            ray_actor_options={"num_cpus": 0},
        )(handler)

    class Nothing:
        async def __call__(self, request: Request) -> Response:
            del request
            return Response(answer, 202, media_type="application/json")

    class OneCall:
        def __init__(self) -> None:
            self._actor = ray.get_actor("empty")

        async def __call__(self, request: Request) -> Response:
            await self._actor.echo.remote(await request.body())
            return Response(answer, 202, media_type="application/json")

    port = int(os.environ["FLOOR_PORT"])
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployment(Nothing, "Nothing").bind(), name="empty", route_prefix="/empty")
    serve.run(deployment(OneCall, "OneCall").bind(), name="actor", route_prefix="/actor")
    written(folder, figures)
    while True:
        time.sleep(60)


def timed(name: str, begin: Any) -> dict[str, float]:
    """Time something that returns a reference: one after the other, then 32 at once."""
    import ray

    for _ in range(50):
        ray.get(begin())
    took: list[float] = []
    start = time.perf_counter()
    while (begun := time.perf_counter()) - start < EACH_S:
        ray.get(begin())
        took.append(time.perf_counter() - begun)
    start, count = time.perf_counter(), 0
    out = [begin() for _ in range(IN_FLIGHT)]
    while time.perf_counter() - start < EACH_S:
        done, out = ray.wait(out, num_returns=1)
        count += len(done)
        ray.get(done)
        out += [begin() for _ in done]
    ray.get(out)
    return {
        f"{name}_p50_ms": 1000 * quantile(took, 0.5),
        f"{name}_s": count / (time.perf_counter() - start),
    }


def written(folder: Path, figures: dict[str, float]) -> None:
    """Write the figures, whole or not at all."""
    path = folder / "figures.json"
    path.with_suffix(".new").write_text(json.dumps(figures))
    path.with_suffix(".new").rename(path)


def main() -> int:
    """Run a floor."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "sqlite":
        written(folder, sqlite(folder))
    else:
        ray_cluster(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

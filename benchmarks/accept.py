"""Where an accepted task's time goes: CPU of each step, in one process, without Ray and HTTP.

``python -m benchmarks.accept`` prints microseconds of CPU a task, for one task a request and for a
thousand. Process time, so that it may run while the machine does something else; the figures of the
whole path are those of ``make bench``. The store lies in memory (/dev/shm), where an fsync is free.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from hcna_ray.api.admission import BATCHES_MAX
from hcna_ray.api.app import build_app
from hcna_ray.api.ids import UlidIds
from hcna_ray.api.ports import ModeratorPort, Outputs
from hcna_ray.config import Settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.models import TaskState
from hcna_ray.handlers import load_registry
from hcna_ray.runtime.messages import Accepted, SubmitBatch, SubmitResult, in_brief, in_full
from hcna_ray.runtime.moderator import Moderator
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending
from hcna_ray.security.key_ring import FileKeyRing
from hcna_ray.security.keys import ensure_owner_key
from hcna_ray.store.artifacts import ArtifactStore
from hcna_ray.store.sqlite import SqliteTaskStore

ECHO = b'{"task_type":"echo","payload":{"message":"measure"}}'
#: Tasks of a large request, requests at once on their own, and rounds of which the best counts.
LARGE, AT_ONCE, ROUNDS = 1000, 16, 5


class _Instant:
    """A moderator that accepts everything at once, and keeps what it was sent last."""

    def __init__(self) -> None:
        self.batch = SubmitBatch(specs=())

    async def submit(self, batch: SubmitBatch) -> Sequence[SubmitResult]:
        self.batch = batch
        await asyncio.sleep(0)
        return [Accepted(spec.id, TaskState.QUEUED) for spec in batch.specs]


class Bench:
    """The application, and a moderator that stores."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home)
        self._key = ensure_owner_key(settings.keys_dir, now=0.0)
        self._instant, self._clock = _Instant(), SystemClock()
        self._app = build_app(
            moderator=cast(ModeratorPort, self._instant),
            reader=_no_reader,
            registry=load_registry(),
            keys=FileKeyRing(settings.keys_dir, self._clock),
            artifacts=cast(ArtifactStore, None),
            outputs=cast(Outputs, None),
            settings=settings,
            clock=self._clock,
            ids=UlidIds(),
        )
        self._moderator = Moderator(
            SqliteTaskStore(home / "queue.db"),
            Policy.from_settings(settings),
            clock=self._clock,
            jitter=lambda: 0.0,
            free_bytes=lambda: 1 << 40,
        )

    async def post(self, path: str, body: bytes) -> None:
        """Have the application answer a request."""
        sent: list[Any] = []
        received = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            return received.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = {
            "host": "localhost",
            "authorization": f"Bearer {self._key}",
            "content-length": str(len(body)),
        }
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        await self._app(scope, receive, send)
        assert sent[0]["status"] == 202, sent

    async def requests(self, tasks: int) -> float:
        """Return the CPU seconds a task that requests with so many tasks take."""
        path, body, at_once, count = "/tasks", ECHO, AT_ONCE, 100 * AT_ONCE
        if tasks > 1:
            path, body, at_once, count = "/tasks/batch", _batch(tasks), BATCHES_MAX, AT_ONCE
        started = time.process_time()
        for _ in range(count // at_once):
            await asyncio.gather(*(self.post(path, body) for _ in range(at_once)))
        return (time.process_time() - started) / count / tasks

    async def batch(self, tasks: int) -> SubmitBatch:
        """Return a new batch as a replica makes it."""
        await self.post("/tasks/batch", _batch(tasks))
        return self._instant.batch

    async def message(self, tasks: int) -> float:
        """Return the CPU seconds a task of a batch's way to the moderator, and its answer's."""
        batch = await self.batch(tasks)
        results: list[SubmitResult] = [Accepted(one.id, TaskState.QUEUED) for one in batch.specs]
        count = 20_000 // tasks
        started = time.process_time()
        for _ in range(count):
            arrived = pickle.loads(pickle.dumps(batch))
            in_full(batch, pickle.loads(pickle.dumps(in_brief(arrived, results))))
        return (time.process_time() - started) / count / tasks

    async def stored(self, tasks: int) -> float:
        """Return the CPU seconds a task in the moderator, until it is committed."""
        batches = [pickle.loads(pickle.dumps(await self.batch(tasks))) for _ in range(10)]
        started = time.process_time()
        for batch in batches:
            self._moderator.apply([Pending(batch, _ignore, self._clock.elapsed())])
        return (time.process_time() - started) / len(batches) / tasks


def _batch(tasks: int) -> bytes:
    return b'{"tasks":[' + b",".join([ECHO] * tasks) + b"]}"


def _no_reader() -> Any:
    raise AssertionError("nothing is read here")


def _ignore(answer: object) -> None:
    pass


async def measure(home: Path) -> dict[tuple[str, str], float]:
    """Return microseconds of CPU a task by step and by kind of request."""
    bench = Bench(home)
    steps: dict[str, tuple[Callable[[int], Any], int, int]] = {
        "request, checked and answered, in C1": (bench.requests, 1, LARGE),
        f"message there and back (calls of {AT_ONCE}, {LARGE})": (bench.message, AT_ONCE, LARGE),
        f"decided and committed (turns of {AT_ONCE}, {LARGE})": (bench.stored, AT_ONCE, LARGE),
    }
    found: dict[tuple[str, str], float] = {}
    for name, (step, small, large) in steps.items():
        for kind, tasks in (("one a request", small), (f"{LARGE} a request", large)):
            found[name, kind] = min([1e6 * await step(tasks) for _ in range(ROUNDS)])
    return found


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        found = asyncio.run(measure(Path(home)))
    kinds = list(dict.fromkeys(kind for _, kind in found))
    sys.stdout.write(f"| CPU a task, us | {' | '.join(kinds)} |\n|---|---:|---:|\n")
    for name in dict.fromkeys(name for name, _ in found):
        values = " | ".join(f"{found[name, kind]:.1f}" for kind in kinds)
        sys.stdout.write(f"| {name} | {values} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One visit of a running system: warm it up, then time what everybody is timed at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from benchmarks.children import Trouble, do
from benchmarks.load import Connection, Done, get
from benchmarks.machine import Meter, Usage
from benchmarks.statistics import median, quantile
from benchmarks.systems import STAMPED, Target
from hcna_ray.cli.measure import time_fdatasync

CONNECTIONS = 32
BATCH_CONNECTIONS = 4
BATCH_TASKS = 1000
#: How long it may take to complete all that batches submitted, about, seconds.
BATCH_DONE_S = 5.0
#: The share of its own peak at which the time to dispatch is looked at.
PACED_SHARE = 0.6
#: Tasks whose results are compared with what was sent, after each run.
CHECKED = 20
#: Tasks of a paced run that are asked when they began.
LOOKED_AT = 500


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    name: str
    rounds: int
    lone: int
    warm_s: float
    posts_s: float
    batch_s: float
    #: Requests of a thousand, at most and at least; a slow system gets fewer, to be done in time.
    batches: int
    batches_slow: int
    paced_s: float
    #: How long our queue becomes where a long one is measured.
    queued: int


QUICK = Size(
    name="quick",
    rounds=2,
    lone=200,
    warm_s=1.5,
    posts_s=3.0,
    batch_s=2.0,
    batches=24,
    batches_slow=4,
    paced_s=0.0,
    queued=100_000,
)
FULL = Size(
    name="full",
    rounds=5,
    lone=500,
    warm_s=2.0,
    posts_s=5.0,
    batch_s=3.0,
    batches=100,
    batches_slow=4,
    paced_s=4.0,
    queued=1_000_000,
)


class Visit:
    """Figures of one system in one round, and who else used the machine meanwhile."""

    def __init__(self, target: Target) -> None:
        """Begin a visit."""
        self.target = target
        self.figures: dict[str, float] = {}
        self.usages: list[Usage] = []
        self.notes: list[str] = []
        self.fsync_ms = median(time_fdatasync(target.folder))

    @contextmanager
    def metered(self) -> Iterator[Meter]:
        """Meter what is done inside."""
        meter = self.target.children.metered()
        yield meter
        self.usages.append(meter.read())

    def warm_up(self, size: Size) -> None:
        """Let it start what it starts lazily, and learn what it learns."""
        do(self.target.asked(kind="lone", requests=100, seconds=size.warm_s))
        do(self.target.asked(connections=CONNECTIONS, seconds=size.warm_s))

    def lone(self, size: Size) -> None:
        """One task at a time, from POST to the answer that shows it completed."""
        with self.metered():
            done = do(self.target.asked(kind="lone", requests=size.lone, seconds=60))
        self.figures["lone_p50_ms"] = 1000 * quantile(done.latencies_s, 0.5)
        self.figures["lone_p99_ms"] = 1000 * quantile(done.latencies_s, 0.99)
        self._check(done)

    def posts(self, size: Size) -> None:
        """One POST a task on 32 connections."""
        with self.metered():
            done = do(self.target.asked(connections=CONNECTIONS, seconds=size.posts_s))
        self._rates("posts", done)
        self.figures["posts_p50_ms"] = 1000 * quantile(done.latencies_s, 0.5)
        self.figures["posts_p99_ms"] = 1000 * quantile(done.latencies_s, 0.99)
        self.figures["load_cores"] = done.cpu_s / done.accept_s
        usage = self.usages[-1]
        self.figures["posts_cpu_ms"] = (
            1000 * usage.system_cores * usage.seconds / max(1, done.completed)
        )
        self._check(done)

    def batch(self, size: Size) -> None:
        """A thousand tasks a request on 4 connections."""
        job = self.target.batched(
            BATCH_TASKS,
            connections=BATCH_CONNECTIONS,
            seconds=size.batch_s,
            requests=size.batches_slow,
        )
        # A first one says how many are done in some seconds, and wakes what is used for this alone.
        done = do(job)
        in_time = int(BATCH_DONE_S * done.completed / done.complete_s / BATCH_TASKS)
        with self.metered():
            done = do(replace(job, requests=max(size.batches_slow, min(size.batches, in_time))))
        self._rates("batch", done)

    def paced(self, size: Size) -> None:
        """From POST to the start of the handler, at 60 % of what it completed at most."""
        rate = PACED_SHARE * self.figures["posts_complete_s"]
        job = self.target.asked(
            kind="paced",
            body=STAMPED,
            connections=2 * CONNECTIONS,
            rate=rate,
            seconds=size.paced_s,
        )
        with self.metered():
            done = do(job)
        step = max(1, len(done.sent) // LOOKED_AT)
        waited = [
            began - sent
            for known, sent in done.sent[::step]
            if (began := self._began(known)) is not None
        ]
        self.figures["paced_rate"] = rate
        self.figures["dispatch_p50_ms"] = 1000 * quantile(waited, 0.5)
        self.figures["dispatch_p95_ms"] = 1000 * quantile(waited, 0.95)

    def _rates(self, name: str, done: Done) -> None:
        if done.completed < done.accepted:
            raise Trouble(f"{done.accepted} were accepted, {done.completed} completed in time")
        self.figures[f"{name}_accept_s"] = done.accepted / done.accept_s
        self.figures[f"{name}_complete_s"] = done.completed / done.complete_s
        self.figures[f"{name}_tasks"] = done.completed

    def _check(self, done: Done) -> None:
        """See that some of the tasks have given back what was sent."""
        step = max(1, len(done.sent) // CHECKED)
        for known, _ in done.sent[::step]:
            view = self._view(known)
            result = view.get("result") or {}
            if view.get("status") != "completed" or (
                "message" in result and result["message"] != "measure"
            ):
                raise Trouble(f"task {known} is not what it should be: {view}")

    def _began(self, known: str) -> float | None:
        """Return when a task's handler began: its own word, or that of who keeps the record."""
        view = self._view(known)
        attempts = view.get("attempts")
        if attempts:
            return datetime.fromisoformat(attempts[-1]["started_at"]).timestamp()
        found = (view.get("result") or {}).get("started_at")
        return None if found is None else float(found)

    def _view(self, known: str) -> dict[str, Any]:
        job = self.target.job
        connection = Connection(job.port)
        try:
            status, body = connection.ask(get(job, f"/tasks/{known}?wait=5"))
        finally:
            connection.close()
        if status != 200:
            raise Trouble(f"task {known}: {status} {body[:200]!r}")
        found: dict[str, Any] = json.loads(body)
        return found

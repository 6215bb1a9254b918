"""What batches of the real moderator cost on this machine, for `benchmarks.simulation`.

CPU time of many batches on a SQLite store, each with a known number of accepted, granted and ended
tasks and of exchanges: a least-squares fit says what each of them takes. Batches of every kind are
among them, so that the parts can be told apart: that accept and grant, that accept alone, that end
and grant, that end alone; with slots that take one task at a time, and with slots that take many.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.crowd import CpuClock, Crowd, plain_specs
from benchmarks.simulation import Costs
from hcna_ray.core.models import TaskSpec, TaskState
from hcna_ray.runtime.messages import Exchange, Grant, SubmitBatch
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending
from hcna_ray.store.sqlite import SqliteTaskStore

#: What is counted of each batch, in the order of the fit; the first is the batch itself.
COUNTED = ("batch", "accept", "grant", "end", "exchange")


class Scales:
    """Hands batches on to a moderator, and notes what was in each and what it took."""

    def __init__(self, moderator: Moderator) -> None:
        """Start with nothing noted."""
        self._moderator = moderator
        self.rows: list[tuple[list[float], float]] = []
        self.walls: list[float] = []

    def apply(self, batch: Sequence[Pending]) -> Outbound:
        """Have a batch decided and committed."""
        wall, cpu = time.perf_counter(), time.process_time()
        outbound = self._moderator.apply(batch)
        cpu = time.process_time() - cpu
        self.walls.append(time.perf_counter() - wall - cpu)
        requests = [pending.request for pending in batch]
        counts = [
            1.0,
            float(sum(len(one.specs) for one in requests if isinstance(one, SubmitBatch))),
            float(sum(len(g.offers) for _, g in outbound.answers if isinstance(g, Grant))),
            float(len(outbound.ended)),
            float(sum(isinstance(one, Exchange) for one in requests)),
        ]
        self.rows.append((counts, cpu))
        return outbound


#: Type of task, and how long one takes: of the second a slot takes one at a time.
KINDS = (("echo", 1.0), ("resize", 40.0))
#: Tasks of a batch of submits, and slots of a batch of exchanges.
SUBMITS = (1, 8, 64, 100)
EXCHANGES = (1, 3, 10, 30)


def measured(given: Costs, *, workers: int = 100, rounds: int = 40) -> Costs:
    """Return the costs with those of batches, heartbeats and fsync as they are here."""
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteTaskStore(Path(folder) / "queue.db")
        clock = CpuClock()
        moderator = Moderator(
            store,
            Policy(max_concurrent_tasks=100_000, disk_free_bytes_min=0),
            clock=clock,
            jitter=lambda: 0.0,
            free_bytes=lambda: 1 << 40,
        )
        scales = Scales(moderator)
        crowd = Crowd(moderator, clock, workers=workers, slots_each=2, apply=scales.apply)
        crowd.join()
        numbers = itertools.count()

        def submit(kind: str, count: int) -> None:
            names = [next(numbers) for _ in range(count)]
            now = clock.now()
            crowd.submit_each([dataclasses.replace(_spec(n, now), task_type=kind) for n in names])

        def drain() -> None:
            while crowd.talking:
                crowd.talk(30)

        drain()
        for turn in range(rounds + 6):
            if turn == 6:  # The first ones warm up.
                scales.rows.clear()
                scales.walls.clear()
            kind, crowd.duration_ms = KINDS[turn % len(KINDS)]
            for size in SUBMITS:  # Every slot is idle: what is accepted is granted.
                submit(kind, size)
            for slots in EXCHANGES:  # Nothing waits: what ends makes room for nothing.
                crowd.talk(slots)
            drain()
            while crowd.parked:
                submit(kind, crowd.parked)
            for size in SUBMITS:  # Every slot is busy: it is accepted, and waits.
                submit(kind, size)
            for slots in EXCHANGES:  # What ends makes room for what waits.
                crowd.talk(slots)
            drain()
        beats = []
        for _ in range(5):
            begun = time.process_time()
            crowd.beat()
            beats.append((time.process_time() - begun) / workers)
        assert store.reader().depth().get(("default", TaskState.FAILED), 0) == 0
        found = dict(zip(COUNTED, fitted(scales.rows), strict=True))
        waits = statistics.median(scales.walls)
        store.close()
    return dataclasses.replace(
        given, heartbeat=statistics.median(beats), fsync=max(waits, 1e-5), **found
    )


def _spec(number: int, now: float) -> TaskSpec:
    return next(plain_specs(number, 1, now=now))


def fitted(rows: Sequence[tuple[Sequence[float], float]]) -> list[float]:
    """Return the coefficients, none below zero, that explain the rows best (least squares)."""
    free = set(range(len(rows[0][0])))
    while True:
        names = sorted(free)
        matrix = [
            [sum(counts[i] * counts[j] for counts, _ in rows) for j in names]
            + [sum(counts[i] * cost for counts, cost in rows)]
            for i in names
        ]
        solved = dict(zip(names, _solved(matrix), strict=True))
        lowest = min(solved, key=lambda name: solved[name])
        if solved[lowest] >= 0.0:
            return [solved.get(name, 0.0) for name in range(len(rows[0][0]))]
        free.discard(lowest)


def _solved(matrix: list[list[float]]) -> list[float]:
    """Solve a linear system by elimination; the last column is the right side."""
    size = len(matrix)
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(matrix[row][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        head = matrix[i][i] or 1e-30
        matrix[i] = [value / head for value in matrix[i]]
        for row in range(size):
            if row != i:
                factor = matrix[row][i]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[i], strict=True)]
    return [row[-1] for row in matrix]

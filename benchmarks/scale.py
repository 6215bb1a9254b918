"""A long queue: what it costs to submit and to dispatch, how much memory, how long a restart."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from benchmarks.children import Trouble, do
from benchmarks.load import Connection, completed, post
from benchmarks.machine import family, processes
from benchmarks.statistics import quantile
from benchmarks.visits import BATCH_CONNECTIONS, BATCH_TASKS, CONNECTIONS, Size, Visit

#: How long the peers' queues become at most, and for how long they are filled: some of them take
#: minutes for what takes us seconds.
PEERS_TASKS = 50_000
PEERS_S = 25.0
#: The empty queue's rate of dispatch is that of so many batches that waited.
EMPTY_BATCHES = 10
#: How long the rate of dispatch is watched.
WATCHED_S = 6.0
RESTART_S = 120.0


def measure(seen: Visit, size: Size) -> None:
    """Compare an empty queue with a long one."""
    seen.warm_up(size)
    for name in ("empty", "long"):
        seen.target.pause()
        if name == "long":
            _fill(seen, size)
        _submit(seen, name)
        if name == "long":
            _memory(seen)
            if seen.target.moderator:
                _restart(seen)
        else:
            do(_waiting(seen, requests=EMPTY_BATCHES, seconds=60))
        seen.target.resume()
        seen.figures[f"{name}_dispatch_s"] = _dispatched(seen)
        if name == "empty":
            _drained(seen)


def _waiting(seen: Visit, **changes: object) -> Any:
    fields: dict[str, object] = {"connections": BATCH_CONNECTIONS, "count_path": "", **changes}
    return seen.target.batched(BATCH_TASKS, **fields)


def _fill(seen: Visit, size: Size) -> None:
    ours = seen.target.moderator is not None
    tasks, seconds = (size.queued, 600.0) if ours else (PEERS_TASKS, PEERS_S)
    done = do(_waiting(seen, requests=tasks // BATCH_TASKS, seconds=seconds))
    seen.figures["queued"] = done.accepted
    seen.figures["fill_s"] = done.accept_s


def _submit(seen: Visit, name: str) -> None:
    with seen.metered():
        done = do(seen.target.asked(connections=CONNECTIONS, seconds=4, count_path=""))
    seen.figures[f"{name}_submit_p99_ms"] = 1000 * quantile(done.latencies_s, 0.99)
    seen.figures[f"{name}_submit_s"] = done.accepted / done.accept_s


def _memory(seen: Visit) -> None:
    alive = processes()
    mine = family(seen.target.children.mark, seen.target.children.roots, alive)
    seen.figures["resident_mib"] = sum(alive[pid].resident_bytes for pid in mine) / 2**20
    if seen.target.moderator:
        pid = seen.target.moderator()
        seen.figures["moderator_mib"] = alive[pid].resident_bytes / 2**20


def _restart(seen: Visit) -> None:
    """Kill the moderator and submit until something is accepted again."""
    assert seen.target.moderator is not None
    job = seen.target.asked()
    os.kill(seen.target.moderator(), signal.SIGKILL)
    begun = time.perf_counter()
    while True:
        try:
            connection = Connection(job.port)
            try:
                status, _ = connection.ask(post(job))
            finally:
                connection.close()
            if status == 202:
                break
        except OSError:
            pass
        if time.perf_counter() - begun > RESTART_S:
            raise Trouble(f"nothing was accepted {RESTART_S:.0f} s after the moderator was killed")
        time.sleep(0.02)
    seen.figures["restart_s"] = time.perf_counter() - begun


def _dispatched(seen: Visit) -> float:
    """Return how many a second complete once they may."""
    job = seen.target.job
    end = time.perf_counter() + 30
    first = completed(job)
    while completed(job) == first:  # The first one: from there it is the rate that counts.
        if time.perf_counter() > end:
            raise Trouble("nothing was dispatched for 30 s")
        time.sleep(0.02)
    start, before = time.perf_counter(), completed(job)
    while time.perf_counter() - start < WATCHED_S:
        time.sleep(0.05)
        count = completed(job)
        took = time.perf_counter() - start
        if count - before >= 0.9 * EMPTY_BATCHES * BATCH_TASKS:
            break
    return (count - before) / took


def _drained(seen: Visit) -> None:
    """Wait until the queue is empty again."""
    job, last, since = seen.target.job, -1, time.perf_counter()
    while time.perf_counter() - since < 2.0:
        count = completed(job)
        if count != last:
            last, since = count, time.perf_counter()
        time.sleep(0.1)

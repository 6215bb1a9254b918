"""What a task costs when a million of them wait, beside what it costs in an empty store.

The plain moderator and its store in a process of their own, without Ray and HTTP: what they cost is
all that can grow with the queue. Each step runs in a fresh process, so that its memory is its own:

``empty``    a new store: submits one by one and gathered, 200 workers that take and complete
``fill``     a mixed queue (`benchmarks.crowd.mixed_specs`) in batches of 1000
``restart``  from the start of the process to the first accepted task
``full``     the same as ``empty``

CPU time of the process is printed beside wall time, because a shared machine's wall time says
little; on PostgreSQL the server's own is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TASKS = 1_000_000
WORKERS = 200
ALONE = 1500
GATHERED = 32
DISPATCHED = 20_000
#: Calls of slots that one commit takes.
TALKING = 20
#: What may not grow by more than this from empty to full.
FLAT = 1.5
RSS_MAX_MIB = 512
RESTART_MAX_S = 10.0


# -- in the measured process -------------------------------------------------------------------


def _open(where: str) -> Any:
    from hcna_ray.store.postgres import PostgresTaskStore
    from hcna_ray.store.sqlite import SqliteTaskStore

    if where.startswith("postgresql:"):
        return PostgresTaskStore(where)
    return SqliteTaskStore(where)


def _crowd(store: Any) -> Any:
    from benchmarks.crowd import CpuClock, Crowd
    from hcna_ray.runtime.moderator import Moderator
    from hcna_ray.runtime.policy import Policy

    draw = random.Random(1)
    clock = CpuClock()
    moderator = Moderator(
        store,
        Policy(max_concurrent_tasks=10_000, disk_free_bytes_min=0),
        clock=clock,
        jitter=lambda: draw.uniform(-1.0, 1.0),
        free_bytes=lambda: 1 << 40,
    )
    return Crowd(moderator, clock, workers=WORKERS)


class _Watch:
    """Wall and CPU time of many repetitions of something."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu = 0.0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall.append(time.perf_counter() - wall)
        self.cpu += time.process_time() - cpu

    def told(self, items: int) -> dict[str, float]:
        """Return the figures, with CPU time and rate per item."""
        ranked = sorted(self.wall)
        return {
            "n": items,
            "p50_ms": 1e3 * statistics.median(ranked),
            "p99_ms": 1e3 * ranked[min(len(ranked) - 1, int(len(ranked) * 0.99))],
            "cpu_us": 1e6 * self.cpu / items,
            "per_s": items / sum(ranked),
            "per_cpu_s": items / self.cpu,
        }


def rss_mib(of: str = "VmRSS") -> float:
    """Return the resident memory of this process now (``VmHWM``: at most)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(of + ":"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fill(where: str, tasks: int) -> dict[str, Any]:
    """Bring a mixed queue into a store."""
    from benchmarks.crowd import mixed_specs

    store = _open(where)
    crowd = _crowd(store)
    watch = _Watch()
    costs = [0.0]
    for first in range(0, tasks, 1000):
        specs = list(mixed_specs(first, 1000, now=time.time()))
        with watch.one():
            crowd.submit(specs)
        costs.append(watch.cpu)
    found = {"fill": watch.told(tasks), "rss_mib": rss_mib(), "rss_max_mib": rss_mib("VmHWM")}
    tenth = max(1, len(watch.wall) // 10)
    found["first_tenth_cpu_us"] = 1e3 * costs[tenth] / tenth
    found["last_tenth_cpu_us"] = 1e3 * (costs[-1] - costs[-1 - tenth]) / tenth
    store.close()
    return found


def restart(where: str) -> dict[str, Any]:
    """Open the store and accept one task."""
    from benchmarks.crowd import plain_specs

    begun = time.perf_counter(), time.process_time()
    store = _open(where)
    opened = time.perf_counter() - begun[0]
    crowd = _crowd(store)
    built = time.perf_counter() - begun[0]
    now = time.time()
    crowd.submit(list(plain_specs(0, 1, now=now, prefix=f"r{int(now * 1e6)}")))
    accepted = time.perf_counter() - begun[0]
    return {
        "open_s": opened,
        "built_s": built,
        "accepted_s": accepted,
        "cpu_s": time.process_time() - begun[1],
        "rss_mib": rss_mib(),
    }


def measure(where: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Submit one by one, gathered and in a batch; dispatch and complete; tell the memory."""
    from benchmarks.crowd import mixed_specs, plain_specs

    alone, gathered, dispatched = sizes
    store = _open(where)
    crowd = _crowd(store)
    stamp = f"{int(time.time())}x"
    found: dict[str, Any] = {"open_tasks": store.size().tasks}
    specs = list(plain_specs(0, alone + alone * 4, now=time.time(), prefix=stamp))
    watch = _Watch()
    for spec in specs[:alone]:
        with watch.one():
            crowd.submit([spec])
    found["alone"] = watch.told(alone)
    watch = _Watch()
    for first in range(alone, len(specs), GATHERED):
        part = specs[first : first + GATHERED]
        with watch.one():
            crowd.submit_each(part)
    found["gathered"] = watch.told(len(specs) - alone)
    watch = _Watch()
    first = 10 * TASKS
    for _ in range(10):
        part = list(mixed_specs(first, 1000, now=time.time(), prefix=stamp))
        first += 1000
        with watch.one():
            crowd.submit(part)
    found["batch"] = watch.told(10_000)
    rss_before = rss_mib()
    crowd.join()
    while crowd.completed < 2000:  # The types' durations become known: grants grow.
        crowd.talk(TALKING)
    watch = _Watch()
    done = 0
    while done < dispatched:
        if len(crowd.talking) == 0:
            raise AssertionError("everybody waits: there is nothing left to do")
        if store.size().tasks < 6000 + 20 * WORKERS * 2:  # Never quite empty.
            crowd.submit(list(mixed_specs(first, 1000, now=time.time(), prefix=stamp)))
            first += 1000
        with watch.one():
            done += crowd.talk(TALKING)
    found["dispatch"] = watch.told(done)
    found |= {"rss_idle_mib": rss_before, "rss_mib": rss_mib(), "rss_max_mib": rss_mib("VmHWM")}
    found["open_tasks_after"] = store.size().tasks
    store.close()
    return found


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "fill": fill,
    "restart": restart,
    "measure": measure,
}


# -- in the process that measures ---------------------------------------------------------------


def child(step: str, *values: object) -> dict[str, Any]:
    """Run one step in a process of its own."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--step", json.dumps([step, *values])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{step} failed: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["process_s"] = time.perf_counter() - begun
    return found


def run(empty: str, full: str, tasks: int, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure a store empty and full. ``empty`` must be a new one for each round."""
    found: dict[str, Any] = {"tasks": tasks, "empty": [], "full": [], "restart": []}
    found["fill"] = child("fill", full, tasks)
    for number in range(rounds):
        found["empty"].append(child("measure", empty.format(number), sizes))
        found["restart"].append(child("restart", full))
        found["full"].append(child("measure", full, sizes))
    return found


def table(found: dict[str, Any]) -> str:
    """Return the figures as a Markdown table: medians of the rounds."""

    def median(of: str, *path: str) -> float:
        values = []
        for one in found[of]:
            for name in path:
                one = one[name]
            values.append(one)
        return float(statistics.median(values))

    lines = ["| | empty | full | ratio |", "|---|---|---|---|"]
    for what, unit, path in (
        ("submit alone, p50", "ms", ("alone", "p50_ms")),
        ("submit alone, p99", "ms", ("alone", "p99_ms")),
        ("submit alone, CPU", "us", ("alone", "cpu_us")),
        ("32 gathered, CPU a task", "us", ("gathered", "cpu_us")),
        ("batch of 1000 mixed, CPU a task", "us", ("batch", "cpu_us")),
        ("dispatch and complete", "/s", ("dispatch", "per_s")),
        ("dispatch and complete, CPU a task", "us", ("dispatch", "cpu_us")),
        ("commit of 20 exchanges, p50", "ms", ("dispatch", "p50_ms")),
        ("commit of 20 exchanges, p99", "ms", ("dispatch", "p99_ms")),
        ("RSS", "MiB", ("rss_max_mib",)),
    ):
        empty, full = median("empty", *path), median("full", *path)
        lines.append(f"| {what} | {empty:.2f} {unit} | {full:.2f} {unit} | {full / empty:.2f} |")
    lines.append(f"| restart to the first accepted task | | {median('restart', 'accepted_s'):.2f} s | |")
    lines.append(f"| the same with the start of Python | | {median('restart', 'process_s'):.2f} s | |")
    fill_ = found["fill"]
    lines.append(
        f"| filling, first and last tenth, CPU a task | {fill_['first_tenth_cpu_us']:.2f} us "
        f"| {fill_['last_tenth_cpu_us']:.2f} us "
        f"| {fill_['last_tenth_cpu_us'] / fill_['first_tenth_cpu_us']:.2f} |"
    )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--folder", type=Path, help="keep the stores here, and use a full one again")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    if asked.step:
        name, *values = json.loads(asked.step)
        logging.disable(logging.CRITICAL)
        print(json.dumps(STEPS[name](*values)))
        return
    sizes = (ALONE, 0, DISPATCHED)
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if asked.store == "postgres":
            from tests.support.postgres import running_server

            server = stack.enter_context(running_server())
            names = {}

            def url(name: str) -> str:
                return names.setdefault(name, server.new_database())

            empty = [url(f"empty-{number}") for number in range(asked.rounds)]
            raise SystemExit("later")
        found = run(str(folder / "empty-{}.db"), str(folder / "full.db"), asked.tasks, sizes, asked.rounds)
    print(table(found))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

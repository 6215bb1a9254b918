"""What a task costs when a million of them wait, beside what it costs in an empty store.

The plain moderator and its store in a process of their own, without Ray and HTTP: what they cost is
all that can grow with the queue. Each step runs in a fresh process, so that its memory is its own:

``empty``    a new store: submits one by one and gathered, 200 workers that take and complete
``fill``     a mixed queue (`benchmarks.crowd.mixed_specs`) in batches of 1000
``restart``  from the start of the process to the first accepted task
``full``     the same as ``empty``

CPU time is printed beside wall time, because the wall time of a machine that does other things too
says little. The moderator's clocks go with its own CPU time for the same reason.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    alone, dispatched = sizes
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


class Place:
    """Where the stores of a run are: files in a folder, or databases of a server of its own."""

    def __init__(self, folder: Path, server: Any = None) -> None:
        """Take a folder, or a running `tests.support.postgres.PostgresServer`."""
        self._folder, self._server = folder, server

    def new(self, name: str) -> str:
        """Return where a store that does not exist yet may be."""
        if self._server is not None:
            return str(self._server.url(self._server.create_database()))
        path = self._folder / f"{name}.db"
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        return str(path)

    def server_cpu_s(self) -> float:
        """Return the CPU time that the server and its processes have used."""
        if self._server is None:
            return 0.0
        pid = self._server.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(_cpu_s(int(one)) for one in (pid, *children))


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    # utime, stime, and those of children that have ended.
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def child(place: Place, step: str, *values: object) -> dict[str, Any]:
    """Run one step in a process of its own."""
    begun, server = time.perf_counter(), place.server_cpu_s()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.long_queue", "--step", json.dumps([step, *values])],
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
    found["server_cpu_s"] = place.server_cpu_s() - server
    return found


def run(place: Place, tasks: int, sizes: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Fill a store, and measure it in turn with empty ones."""
    full = place.new("full")
    found: dict[str, Any] = {"tasks": tasks, "empty": [], "full": [], "restart": []}
    _say(f"filling a store with {tasks} tasks")
    found["fill"] = child(place, "fill", full, tasks)
    for number in range(rounds):
        _say(f"round {number + 1} of {rounds}")
        found["empty"].append(child(place, "measure", place.new("empty"), sizes))
        found["restart"].append(child(place, "restart", full))
        found["full"].append(child(place, "measure", full, sizes))
    return found


ROWS = (
    ("submit alone, p50", "ms", ("alone", "p50_ms")),
    ("submit alone, p99", "ms", ("alone", "p99_ms")),
    ("submit alone, CPU", "us", ("alone", "cpu_us")),
    (f"{GATHERED} gathered, CPU a task", "us", ("gathered", "cpu_us")),
    ("batch of 1000 mixed, CPU a task", "us", ("batch", "cpu_us")),
    ("dispatch and complete", "/s", ("dispatch", "per_s")),
    ("dispatch and complete, CPU a task", "us", ("dispatch", "cpu_us")),
    (f"commit of {TALKING} exchanges, p50", "ms", ("dispatch", "p50_ms")),
    (f"commit of {TALKING} exchanges, p99", "ms", ("dispatch", "p99_ms")),
    ("CPU of the database server, all of it", "s", ("server_cpu_s",)),
    ("RSS at most", "MiB", ("rss_max_mib",)),
)


def median_of(runs: Sequence[Mapping[str, Any]], path: Sequence[str]) -> float:
    """Return the median of one figure over some runs."""
    values = []
    for one in runs:
        value: Any = one
        for name in path:
            value = value[name]
        values.append(float(value))
    return statistics.median(values)


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table: medians of the rounds."""
    lines = [f"| | empty | {found['tasks']:,} waiting | ratio |", "|---|---|---|---|"]
    for what, unit, path in ROWS:
        empty, full = median_of(found["empty"], path), median_of(found["full"], path)
        if empty:
            ratio = f"{full / empty:.2f}"
            lines.append(f"| {what} | {empty:.2f} {unit} | {full:.2f} {unit} | {ratio} |")
    fill_ = found["fill"]
    first, last = fill_["first_tenth_cpu_us"], fill_["last_tenth_cpu_us"]
    lines += [
        f"| filling: CPU a task, first and last tenth | {first:.1f} us | {last:.1f} us "
        f"| {last / first:.2f} |",
        f"| a new moderator, to its first accepted task | "
        f"| {median_of(found['restart'], ['accepted_s']):.2f} s | |",
        f"| the same with the start of its process | "
        f"| {median_of(found['restart'], ['process_s']):.2f} s | |",
    ]
    return "\n".join(lines)


def _say(words: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {words}\n")


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="What a task costs when a million wait")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args(words)
    if asked.step:
        name, *values = json.loads(asked.step)
        logging.disable(logging.CRITICAL)
        sys.stdout.write(json.dumps(STEPS[name](*values)) + "\n")
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hcna-scale-")))
        server = None
        if asked.store == "postgres":
            from tests.support.postgres import running_server

            server = stack.enter_context(running_server())
        sizes = (ALONE, DISPATCHED)
        found = run(Place(folder, server), asked.tasks, sizes, asked.rounds)
    sys.stdout.write(table(found) + "\n")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""CPU and wake-ups while there is nothing to do."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace

from benchmarks.children import Children, do
from benchmarks.machine import Process, Usage, command_line, family, processes
from benchmarks.visits import Size, Visit

#: After a little work, how long it may come to rest, and how long it is watched, seconds.
SETTLE_S = 10.0
WATCHED_S = 20.0

#: Processes of ours by what they call themselves, as regular expressions.
OUR_PROCESSES: Mapping[str, tuple[str, ...]] = {
    "moderator": ("ray::ModeratorActor", "ray::moderator"),
    "c1": ("ray::ServeReplica:hcna-c1",),
    "agents": ("ray::NodeAgent", "ray::agent"),
    "slots": ("ray::slot", "ray::run_slot"),
    "supervisor": (r"-m hcna_ray\.supervisor$",),
}


def measure(seen: Visit, size: Size) -> None:
    """Watch a system that has been used and is left alone."""
    del size
    do(seen.target.asked(kind="lone", requests=20, seconds=10))
    do(replace(seen.target.asked(connections=4), requests=200))
    figures, usage = watch(seen.target.children, OUR_PROCESSES)
    seen.figures |= figures
    seen.usages.append(usage)


def watch(
    children: Children, named: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, float], Usage]:
    """Watch every process of a system, and some of them by name.

    Returns:
        ``cores``, ``wakeups_s`` and ``resident_mib`` of all; of those with a name the first two as
        ``<name>_cores``; and who else used the machine meanwhile.
    """
    time.sleep(SETTLE_S)
    meter = children.metered()
    begun = time.perf_counter()
    before = processes(wakeups=True)
    time.sleep(WATCHED_S)
    after = processes(wakeups=True)
    seconds = time.perf_counter() - begun
    usage = meter.read()
    watched = family(children.mark, children.roots, after) & set(before)

    def used(pids: set[int], prefix: str) -> dict[str, float]:
        return {
            f"{prefix}cores": _grown(pids, before, after, "cpu_s") / seconds,
            f"{prefix}wakeups_s": _grown(pids, before, after, "wakeups") / seconds,
        }

    figures = used(watched, "")
    figures["resident_mib"] = sum(after[pid].resident_bytes for pid in watched) / 2**20
    figures["processes"] = len(watched)
    told = {pid: command_line(pid) for pid in watched}
    for name, words in named.items():
        pids = {pid for pid, line in told.items() if any(re.search(word, line) for word in words)}
        if pids:
            figures |= used(pids, f"{name}_")
    return figures, usage


def _grown(
    pids: set[int], before: Mapping[int, Process], after: Mapping[int, Process], what: str
) -> float:
    return sum(float(getattr(after[pid], what) - getattr(before[pid], what)) for pid in pids)

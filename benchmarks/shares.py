"""``make shares``: which process a task's CPU time goes to, under load; printed as a table.

Two cores that also serve the client are what limits most rates of `benchmarks`, so this says what
stands in the way of higher ones. Percentages are of the whole, so that a machine that is slower for
a while tells the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace

from benchmarks.children import FOLDER, Trouble, do
from benchmarks.idle import OUR_PROCESSES
from benchmarks.load import Done, Job
from benchmarks.machine import Process, command_line, described, family, processes
from benchmarks.report import number, table
from benchmarks.systems import Hcna, Target
from benchmarks.visits import BATCH_CONNECTIONS, BATCH_TASKS, CONNECTIONS, QUICK, Visit

SECONDS = 10.0
BATCHES = 40
#: Who is told apart, by what it calls itself; the first that fits counts.
WHO: Mapping[str, tuple[str, ...]] = {
    "C1 (Serve's replica)": OUR_PROCESSES["c1"],
    "moderator and its store": OUR_PROCESSES["moderator"],
    "handlers' processes": (r"-m hcna_ray\.runtime\.executor",),
    "slots": OUR_PROCESSES["slots"],
    "Serve's HAProxy": (r"haproxy\b.* -f ",),
}
OTHERS = "agents, supervisor, Ray's own"
CLIENT = "load generator"


def who(line: str) -> str:
    """Return whom a command line belongs to."""
    for name, words in WHO.items():
        if any(re.search(word, line) for word in words):
            return name
    return OTHERS


def spent(before: Mapping[int, Process], after: Mapping[int, Process]) -> dict[str, float]:
    """Return seconds of CPU by who used them; what began in between counts whole."""
    found = dict.fromkeys((*WHO, OTHERS), 0.0)
    for pid, now in after.items():
        then = before.get(pid)
        same = then is not None and then.began == now.began
        found[who(command_line(pid))] += now.cpu_s - (then.cpu_s if same and then else 0.0)
    return found


def watched(target: Target, job: Job) -> tuple[Done, dict[str, float]]:
    """Do a job; return what came of it and the CPU time of everybody meanwhile, seconds."""
    children = target.children

    def alive() -> dict[int, Process]:
        every = processes()
        return {pid: every[pid] for pid in family(children.mark, children.roots, every)}

    before = alive()
    done = do(job)
    if done.completed < done.accepted:
        raise Trouble(f"{done.accepted} were accepted, {done.completed} completed in time")
    return done, spent(before, alive()) | {CLIENT: done.cpu_s}


def main() -> int:
    """Measure and print."""
    try:
        with Hcna().running(FOLDER / "run" / "shares", {}) as target:
            Visit(target).warm_up(QUICK)
            posts = target.asked(connections=CONNECTIONS, seconds=SECONDS)
            batches = target.batched(
                BATCH_TASKS, connections=BATCH_CONNECTIONS, requests=BATCHES, seconds=60.0
            )
            do(replace(batches, requests=4))
            told = [watched(target, posts), watched(target, batches)]
    except Trouble as error:
        sys.stderr.write(f"stopped: {error}\n")
        return 1
    rows = []
    for name in (*told[0][1], ""):
        row = [name or "together, us a task"]
        for done, cpu in told:
            whole = sum(cpu.values())
            if name:
                row.append(f"{100 * cpu[name] / whole:.0f} %")
            else:
                row.append(number(1e6 * whole / done.completed, 0))
        rows.append(row)
    rows.append(["completed a second", *(number(d.completed / d.complete_s, 0) for d, _ in told)])
    head = ("CPU time of a task", "one POST a task", "a thousand a POST")
    sys.stdout.write("\n".join([f"{described()}:", "", *table(head, rows)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

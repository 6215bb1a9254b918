"""The plug pulled and put in again: of a worker, of M1, of all hosts at once, under load."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.stack import Stack, allowed, eventually, stack

#: Which hosts lose power together, and for how long they are off.
EPOCHS = (
    (("w1",), ("m1",), ("w1", "w2"), ("m1", "w1", "w2")),
    (("m1", "w2"), ("w2",), ("m1", "w1", "w2"), ("m1",)),
    (("m1", "w1", "w2"), ("m1",), ("w1",), ("w2",)),
)


class Reboots:
    """See this module."""

    name = "reboots"
    title = "power off and on again: a worker, M1, several, all hosts at once"
    budget_s = 1200.0
    needs_root = True
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the epochs."""
        if size is Size.SLICE:
            return []
        return [
            Case(
                name=f"epoch-{number:02}",
                seed=seed * 100 + number,
                options={"hosts": [list(one) for one in epoch]},
            )
            for number, epoch in enumerate(EPOCHS, 1)
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Bring up M1 and two workers."""
        with stack(folder, seed=4, workers=("w1", "w2"), per_second=4.0) as shared:
            yield lambda case, own: run_epoch(shared, case, own)


def run_epoch(on: Stack, case: Case, folder: Path) -> Outcome:
    """Pull and put in the plugs, one reboot after the other; then have it all checked."""
    draw = random.Random(case.seed)
    since, troubles = len(on.faults), []
    on.clients.go_on()
    for hosts in case.options["hosts"]:
        time.sleep(draw.uniform(4.0, 10.0))
        troubles += _reboot(on, hosts, off_s=draw.uniform(0.0, 3.0))
    drained = on.settle()
    out = on.judge(folder, drained, since)
    out.violations = troubles + out.violations
    everything = sum(len(one) == 1 + len(on.workers) for one in case.options["hosts"])
    out.counts = {
        "reboots": len(case.options["hosts"]) - everything,
        "reboots of all hosts at once": everything,
    }
    return out


def _reboot(on: Stack, hosts: Sequence[str], off_s: float) -> list[str]:
    everything = len(hosts) == 1 + len(on.workers)
    at = time.time()
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(lambda name: on.rig[name].unplug(), hosts))
    if "m1" in hosts:
        on.note("reboot", "all" if everything else "head", at)
    for name in hosts:
        if name != "m1":
            on.note("reboot", on.workers[name], at)
    time.sleep(off_s)
    on.rig.boot(list(hosts))
    booted = time.time()
    troubles: list[str] = []
    who = "all" if everything else "M1" if "m1" in hosts else "worker"
    if "m1" in hosts:
        on.clients.probe(True)
        title = f"{who} rebooted: accepting again"
        when = eventually(lambda: on.clients.accepted_after(booted), 2 * allowed(title))
        on.clients.probe(False)
        if when is None:
            troubles.append(f"{title}: not within {2 * allowed(title):g} s")
        else:
            on.took(title, when - booted)
        title = f"{who} rebooted: all workers back"
    else:
        title = "worker rebooted: works again"

    def back() -> bool:
        # A slot there is one of after the plug was put in; M1 may not yet miss those of before.
        return on.all_online() and all(
            on.pids(name, "ray::slot") for name in hosts if name in on.workers
        )

    if eventually(back, 2 * allowed(title), 0.5):
        on.took(title, time.time() - booted)
    else:
        troubles.append(f"{title}: not within {2 * allowed(title):g} s")
    return troubles


PART = Reboots()

"""Partitions between M1 and its workers, short and long, beside workers that stand still.

A case is an epoch of some minutes on one computer: W1 and W2 go through short cuts, W3 and W4
through long ones, W5 is frozen or has its agent stopped, each at its own pace and all at the same
time, under load. Then everything is healed and drained, and the checker reads what was left.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.stack import Stack, eventually, stack
from tests.faults.still import PAUSES, stand_still

SHORT, LONG = "partitions healed within 40 s", "partitions of 90 to 300 s"
_SHORT_S = (5, 15, 25, 35, 40)
_SHORT_WAYS = (
    "both",
    "from-m1",
    "to-m1",
    "both",
    "flapping",
    "gcs",
    "refused",
    "raylet",
    "both",
    "to-m1",
)
#: For W3 and W4, by epoch: what is long stands beside what is short.
_LONGS = (
    ((("both", 300.0),), (("to-m1", 90.0), ("both", 150.0))),
    ((("both", 240.0), ("flapping", 90.0)), (("from-m1", 120.0), ("both", 120.0))),
    ((("gcs", 180.0), ("both", 90.0)), (("to-m1", 90.0),)),
)
_EPOCHS = 3
_SHORTS = 30
#: Ways that cut off a worker as a whole: the checker's rules for a partition of it hold.
_WHOLE = ("both", "from-m1", "to-m1")
_DOWN_S, _UP_S = 3.0, 4.0
Step = tuple[str, str, float]


class Partitions:
    """See this module."""

    name = "partitions"
    title = "silent, one-way, port-selective and flapping partitions, and workers that stand still"
    budget_s = 1500.0
    needs_root = True
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the epochs; `make test` has a partition in the epoch of `whole_kills`."""
        if size is Size.SLICE:
            return []
        draw = random.Random(f"{seed}-partitions")
        shorts = [
            ("cut", _SHORT_WAYS[number % len(_SHORT_WAYS)], float(seconds))
            for number, seconds in zip(range(_SHORTS), itertools.cycle(_SHORT_S), strict=False)
        ]
        # Ways and lengths have a common period: draw which way has which length.
        ways = [way for _, way, _ in shorts]
        draw.shuffle(ways)
        shorts = [("cut", way, seconds) for way, (_, _, seconds) in zip(ways, shorts, strict=True)]
        pauses = [
            ("stop", what, float(draw.randrange(45, 75)))
            for what, _ in zip(itertools.cycle(("host", *PAUSES)), range(15), strict=False)
        ]
        return [
            Case(
                name=f"epoch-{number + 1:02}",
                seed=seed * 100 + number,
                options={
                    "W1": [*shorts[2 * number :: 2 * _EPOCHS], pauses[number]],
                    "W2": [*shorts[2 * number + 1 :: 2 * _EPOCHS], pauses[_EPOCHS + number]],
                    "W3": [("cut", *one) for one in _LONGS[number][0]],
                    "W4": [("cut", *one) for one in _LONGS[number][1]],
                    "W5": pauses[2 * _EPOCHS + number :: _EPOCHS],
                },
            )
            for number in range(_EPOCHS)
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Bring up M1 and five workers."""
        hosts = [f"w{number}" for number in range(1, 6)]
        with stack(folder, seed=2, workers=hosts, per_second=4.0) as shared:
            yield lambda case, own: run_epoch(shared, case, own)


def run_epoch(on: Stack, case: Case, folder: Path) -> Outcome:
    """Do to each worker what the case says, all at the same time; then have it all checked."""
    since = len(on.faults)
    on.clients.go_on()
    with ThreadPoolExecutor(len(case.options)) as pool:
        jobs = [
            pool.submit(_suffer, on, worker, steps, case.seed)
            for worker, steps in case.options.items()
        ]
        troubles = [trouble for job in jobs for trouble in job.result()]
    drained = on.settle()
    out = on.judge(folder, drained, since)
    out.violations = troubles + out.violations
    steps = [step for one in case.options.values() for step in one]
    cuts = [seconds for what, _, seconds in steps if what == "cut"]
    out.counts = {
        SHORT: sum(seconds <= 40 for seconds in cuts),
        LONG: sum(seconds >= 90 for seconds in cuts),
        "pauses beyond the lease": sum(what == "stop" for what, _, _ in steps),
    }
    return out


def _suffer(on: Stack, worker: str, steps: Sequence[Step], seed: int) -> list[str]:
    """Put a worker through its steps; it is back before each of them."""
    draw = random.Random(f"{seed}-{worker}")
    troubles = []
    for what, how, seconds in steps:
        if not eventually(lambda: worker in on.online(), 150.0, 1.0):
            troubles.append(f"{worker} is not back 150 s after what came before {what} {how}")
        time.sleep(draw.uniform(4.0, 9.0))
        if what == "cut":
            _cut(on, worker, how, seconds)
        else:
            troubles += stand_still(on, worker, how, seconds)
    return troubles


def _cut(on: Stack, worker: str, way: str, seconds: float) -> None:
    rig, host = on.rig, worker.lower()
    target = worker if way in _WHOLE else f"{worker}/{way}"
    fault = on.note("partition", target, time.time(), way=way)
    end = time.monotonic() + seconds
    match way:
        case "from-m1":
            rig.partition("m1", host, one_way=True)
        case "to-m1":
            rig.partition(host, "m1", one_way=True)
        case "gcs":
            rig.partition(host, "m1", port=6379)
        case "raylet":
            rig.partition("m1", host, port=10020)
        case "refused":
            rig.partition("m1", host, reject=True)
        case "flapping":
            while time.monotonic() < end:
                rig.partition("m1", host)
                time.sleep(_DOWN_S)
                rig.heal("m1", host)
                time.sleep(_UP_S)
        case _:
            rig.partition("m1", host)
    time.sleep(max(0.0, end - time.monotonic()))
    rig.heal("m1", host)
    fault["until"] = time.time()


PART = Partitions()

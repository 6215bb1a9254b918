"""The disk of the store is full or fails, at every system call that the store makes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hcna_ray.runtime.writer import EXIT_FSYNC
from tests.faults.disk_stack import Fault, Injection, Stack, struck_in, until
from tests.faults.programme import Case, Outcome, RunCase, Size

#: Calls of a running store, and the errors that each can have.
RUNNING = {
    "pwrite64": ("ENOSPC", "EIO"),
    "fdatasync": ("EIO", "ENOSPC"),
    "pread64": ("EIO",),
    "fcntl": ("EIO",),
}
#: Calls of a store that is being opened.
STARTING = {
    "openat": ("EIO", "ENOSPC"),
    "pread64": ("EIO",),
    "pwrite64": ("ENOSPC", "EIO"),
    "fdatasync": ("EIO",),
    "ftruncate": ("ENOSPC", "EIO"),
    "mmap": ("EIO", "ENOMEM"),
    "fcntl": ("EIO",),
}
NUMBERS = (1, 2, 3, 5, 8, 13, 21)
STRUCK_S = 4.0
HELD_S = 0.5
#: How soon writes go through again once the disk works.
ACCEPTING_S = 30.0


def _points(calls: dict[str, tuple[str, ...]], numbers: Sequence[int]) -> list[list[object]]:
    return [
        [call, error, number, once]
        for call, errors in calls.items()
        for error in errors
        for number in numbers
        for once in (True, False)
    ]


class DiskErrors:
    """ENOSPC and EIO at the calls of the store."""

    name = "disk_errors"
    title = "the store's disk is full or fails, at every call"
    budget_s = 700.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return cases of a few points each: one run of moderator, C1 and clients."""
        if size is Size.SLICE:
            points = {
                "running": [
                    ["pwrite64", "ENOSPC", 2, True],
                    ["pwrite64", "ENOSPC", 1, False],
                    ["pwrite64", "EIO", 3, True],
                    ["fdatasync", "EIO", 2, True],
                ],
                "starting": [["pwrite64", "ENOSPC", 2, False], ["fdatasync", "EIO", 1, True]],
            }
            return [
                Case(name=f"slice-{kind}", seed=seed, options={"kind": kind, "points": chosen})
                for kind, chosen in points.items()
            ]
        cases = []
        for kind, calls, numbers, each in (
            ("running", RUNNING, NUMBERS, 7),
            ("starting", STARTING, (1, 2, 4), 6),
        ):
            points_ = _points(calls, numbers)
            for number, start in enumerate(range(0, len(points_), each)):
                options = {"kind": kind, "points": points_[start : start + each]}
                cases.append(Case(name=f"{kind}.{number:02}", seed=seed + number, options=options))
        return cases

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        del folder
        yield lambda case, evidence: asyncio.run(_run(case, evidence))


async def _run(case: Case, folder: Path) -> Outcome:
    data = folder / "data"
    data.mkdir()
    stack = Stack(folder, case.seed, data)
    outcome = Outcome(counts={"disk errors (ENOSPC, EIO)": 0})
    async with stack.running():
        await stack.accepting(ACCEPTING_S + stack.start_s)
        for number, (call, error, when, once) in enumerate(case.options["points"]):
            fault = Fault(call, error, when, once)
            strike = _strike_running if case.options["kind"] == "running" else _strike_start
            await strike(stack, fault, folder / f"strace-{number}.log", outcome)
    outcome.violations += stack.judge()
    answered = ", ".join(
        f"{count} {what} {status}" for (what, status), count in sorted(stack.statuses.items())
    )
    outcome.notes.append(f"{answered}; exits {stack.exits}")
    return outcome


def _paths(stack: Stack) -> list[Path]:
    return [
        stack.data,
        *(stack.data / f"queue.db{end}" for end in ("", "-wal", "-shm", "-journal")),
    ]


async def _strike_running(stack: Stack, fault: Fault, log: Path, outcome: Outcome) -> None:
    exits = len(stack.exits)
    injection = Injection(fault, stack.moderator_pid(), _paths(stack), log)
    try:
        await until(injection.attached, STRUCK_S)
        struck = await until(injection.struck, STRUCK_S)
        if struck and not fault.once:
            await asyncio.sleep(HELD_S)
            await stack.accepting(0.0)
    finally:
        await asyncio.to_thread(injection.detach)
    await _went_on(stack, fault, exits, injection.struck(), outcome)


async def _strike_start(stack: Stack, fault: Fault, log: Path, outcome: Outcome) -> None:
    """Let the moderator's process die and fail at its next start."""
    stack.prefix = [*fault.options(_paths(stack), log), "--"]
    before = stack.process
    os.kill(stack.moderator_pid(), signal.SIGKILL)
    await until(lambda: stack.process is not before, STRUCK_S)
    exits = len(stack.exits)
    started = stack.process

    def over() -> bool:
        return started is not stack.process or stack.socket.exists()

    await until(over, 20.0)
    await asyncio.sleep(HELD_S)
    struck = struck_in(log)
    if started is stack.process:  # It serves, whatever failed: the next one finds a good disk.
        os.kill(stack.moderator_pid(), signal.SIGKILL)
        await until(lambda: stack.process is not started, STRUCK_S)
        exits = len(stack.exits)
    await _went_on(stack, fault, exits, struck, outcome, starting=True)


async def _went_on(
    stack: Stack, fault: Fault, exits: int, struck: int, outcome: Outcome, *, starting: bool = False
) -> None:
    # Starts are part of it, and take long on a machine that has much to do.
    within_s = ACCEPTING_S + 3 * stack.start_s
    took_s = await stack.accepting(within_s)
    if took_s is None:
        outcome.violations.append(f"{fault.name}: nothing is accepted {within_s:.0f} s later")
    else:
        outcome.times_s.setdefault("disk works again: accepting again", []).append(took_s)
    ended = stack.exits[exits:]
    if not starting and any(status != EXIT_FSYNC for status in ended):
        outcome.violations.append(f"{fault.name}: the moderator ended with {ended}")
    if struck:
        outcome.counts["disk errors (ENOSPC, EIO)"] += 1
    else:
        outcome.notes.append(f"{fault.name} was never reached")


PART = DiskErrors()

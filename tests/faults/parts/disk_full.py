"""A disk that is really full: a small tmpfs under store, artifacts or temporary files."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hcna_ray.runtime.writer import EXIT_FSYNC
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.faults.disk_artifacts import Uploader, client_of, wrong_files
from tests.faults.disk_stack import POLICY, Stack, until
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support.sources import ROOT

LINE = "disk errors (ENOSPC, EIO)"
BYTES = 6 * 1024 * 1024
ACCEPTING_S = 30.0
START_S = 30.0
#: How long a disk stays full, and how soon it refuses something.
HELD_S = 1.5
REFUSED_WITHIN_S = 30.0


class DiskFull:
    """A full tmpfs, and space again."""

    name = "disk_full"
    title = "a disk is really full, then there is space again"
    budget_s = 120.0
    needs_root = True
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return which directory is full, and how often it fills."""
        if size is Size.SLICE:
            return [Case(name="slice-store", seed=seed, options={"what": "store", "times": 1})]
        return [
            Case(name=what, seed=seed, options={"what": what, "times": 5})
            for what in ("store", "reserve", "artifacts", "temporary")
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        del folder
        yield _run


def _run(case: Case, folder: Path) -> Outcome:
    disk = folder / "disk"
    disk.mkdir()
    options = f"size={BYTES},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
    try:
        work = _artifacts if case.options["what"] == "artifacts" else _store
        return asyncio.run(work(case, folder, disk))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def _refused(stack: Stack, before: Counter[tuple[str, int]]) -> Counter[int]:
    """Return how many submits the disk has refused, by status."""
    return Counter(
        {
            status: count
            for (asked, status), count in (stack.statuses - before).items()
            if asked == "submit" and status in (503, 507)
        }
    )


async def _store(case: Case, folder: Path, disk: Path) -> Outcome:
    """Fill the disk of the store (or of temporary files), with or without a reserve."""
    what = case.options["what"]
    data = folder / "data" if what == "temporary" else disk
    data.mkdir(exist_ok=True)
    policy = {**POLICY, "disk_free_bytes_min": BYTES // 4 if what == "reserve" else 0}
    stack = Stack(folder, case.seed, data, policy=policy)
    if what == "temporary":
        stack.environment["TMPDIR"] = str(disk)
    outcome = Outcome(counts={LINE: 0})
    async with stack.running():
        await stack.accepting(ACCEPTING_S)
        for number in range(int(case.options["times"])):
            ballast = _fill(disk)
            before = Counter(stack.statuses)
            if what == "temporary":
                await asyncio.sleep(HELD_S)
            else:  # The log may have room for a while.
                await until(lambda: _refused(stack, before), REFUSED_WITHIN_S)  # noqa: B023
                await asyncio.sleep(HELD_S)
            refused = _refused(stack, before)
            if what == "temporary" and refused:
                outcome.violations.append(f"full temporary files: submits refused {refused}")
            elif what != "temporary" and not refused:
                outcome.violations.append(f"round {number}: the full disk refused nothing")
            elif what == "reserve" and set(refused) - {507}:
                outcome.violations.append(f"below the reserve submits are refused {refused}")
            ballast.unlink()
            if (took_s := await stack.accepting(ACCEPTING_S)) is None:
                outcome.violations.append(
                    f"round {number}: nothing is accepted though there is space"
                )
            else:
                outcome.times_s.setdefault("disk works again: accepting again", []).append(took_s)
            outcome.counts[LINE] += 1
    if any(status != EXIT_FSYNC for status in stack.exits):
        outcome.violations.append(f"the moderator ended with {stack.exits}")
    outcome.violations += stack.judge()
    outcome.notes.append(
        ", ".join(f"{n} {asked} {status}" for (asked, status), n in sorted(stack.statuses.items()))
    )
    return outcome


async def _artifacts(case: Case, folder: Path, disk: Path) -> Outcome:
    """Fill the disk of the artifacts."""
    SqliteTaskStore(folder / "queue.db").close()
    socket = folder / "c1"
    command = [sys.executable, "-m", "tests.support.c1_process", str(disk)]
    command += [str(folder / "queue.db"), str(folder / "nobody"), str(socket)]
    outcome = Outcome(counts={LINE: 0})
    with (folder / "c1.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        if not await until(lambda: socket.exists() or process.poll() is not None, START_S):
            raise RuntimeError((folder / "c1.log").read_text())
        async with client_of(socket) as http:
            client = Uploader(http, random.Random(case.seed))
            for number in range(int(case.options["times"])):
                await client.run(3)
                ballast = _fill(disk)
                begun = len(client.answers)
                await client.run(6)
                full = Counter(one.status_code for one in client.answers[begun:])
                if not full[507] or set(full) - {201, 202, 409, 507}:
                    outcome.violations.append(f"round {number}: a full disk answered {full}")
                ballast.unlink()
                begun = len(client.answers)
                await client.run(4)
                after = Counter(one.status_code for one in client.answers[begun:])
                if set(after) - {201, 202, 409}:
                    outcome.violations.append(f"round {number}: with space again {after}")
                outcome.counts[LINE] += 1
            for one in client.answers:
                if one.status_code == 507 and "retry-after" not in one.headers:
                    outcome.violations.append("507 without Retry-After")
                elif one.status_code == 201:
                    name = one.json()["sha256"]
                    found = await http.get(f"/artifacts/{name}")
                    if found.status_code != 200:
                        outcome.violations.append(f"{name} was acknowledged and is not there")
    finally:
        process.kill()
        process.wait()
    if wrong := wrong_files(disk / "artifacts"):
        outcome.violations.append(f"{len(wrong)} names stand for other bytes, e.g. {wrong[0]}")
    told = Counter(one.status_code for one in client.answers)
    outcome.notes.append(", ".join(f"{n} times {status}" for status, n in sorted(told.items())))
    return outcome


PART = DiskFull()

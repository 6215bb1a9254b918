"""The disk of the artifacts is full or fails, at every system call that an upload makes."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hcna_ray.store.sqlite import SqliteTaskStore
from tests.faults.disk_artifacts import Uploader, client_of, wrong_files
from tests.faults.disk_stack import Fault, Injection, until
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support.sources import ROOT

CALLS = {
    "openat": ("ENOSPC", "EIO"),
    "write": ("ENOSPC", "EIO"),
    "pwrite64": ("ENOSPC", "EIO"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("ENOSPC", "EIO"),
    "mkdir": ("ENOSPC", "EIO"),
    "chmod": ("EIO",),
    "ftruncate": ("EIO",),
}
START_S = 30.0
STRUCK_S = 3.0


class DiskErrorsArtifacts:
    """ENOSPC and EIO at the calls of the artifact store."""

    name = "disk_errors_artifacts"
    title = "the artifacts' disk is full or fails, at every call"
    budget_s = 200.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return cases of a few points each, against one C1."""
        if size is Size.SLICE:
            points = [["pwrite64", "ENOSPC", 1, True], ["fsync", "EIO", 2, False]]
            return [Case(name="slice-uploads", seed=seed, options={"points": points})]
        return [
            Case(
                name=f"uploads.{call}",
                seed=seed,
                options={
                    "points": [
                        [call, error, when, once]
                        for error in errors
                        for when in (1, 3)
                        for once in (True, False)
                    ]
                },
            )
            for call, errors in CALLS.items()
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        del folder
        yield lambda case, evidence: asyncio.run(_run(case, evidence))


async def _run(case: Case, folder: Path) -> Outcome:
    SqliteTaskStore(folder / "queue.db").close()
    (folder / "home").mkdir()
    socket, draw = folder / "c1", random.Random(case.seed)
    command = [sys.executable, "-m", "tests.support.c1_process", str(folder / "home")]
    command += [str(folder / "queue.db"), str(folder / "nobody"), str(socket)]
    outcome = Outcome(counts={"disk errors (ENOSPC, EIO)": 0})
    with (folder / "c1.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        if not await until(lambda: socket.exists() or process.poll() is not None, START_S):
            raise RuntimeError((folder / "c1.log").read_text())
        statuses: Counter[int] = Counter()
        async with client_of(socket) as http:
            for number, (call, error, when, once) in enumerate(case.options["points"]):
                fault = Fault(call, error, when, once)
                log_ = folder / f"strace-{number}.log"
                statuses += await _strike(fault, process.pid, Uploader(http, draw), log_, outcome)
        told = ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))
        outcome.notes.append(f"uploads were answered {told}")
    finally:
        process.kill()
        process.wait()
    if wrong := wrong_files(folder / "home" / "artifacts"):
        outcome.violations.append(f"{len(wrong)} names stand for other bytes, e.g. {wrong[0]}")
    return outcome


async def _strike(
    fault: Fault, pid: int, client: Uploader, log: Path, outcome: Outcome
) -> Counter[int]:
    await client.one()
    injection = Injection(fault, pid, [], log)
    try:
        await until(injection.attached, STRUCK_S)
        for _ in range(40):
            await client.one()
            if injection.struck() and (fault.once or injection.struck() > 2):
                break
    finally:
        await asyncio.to_thread(injection.detach)
    struck = injection.struck()
    before = len(client.answers)
    for _ in range(4):
        await client.one()
    if any(one.status_code not in (201, 202) for one in client.answers[before:]):
        last = [one.status_code for one in client.answers[before:]]
        outcome.violations.append(f"{fault.name}: afterwards uploads are answered {last}")
    for one in client.answers:
        if one.status_code == 201:
            name = one.json()["sha256"]
            data = await client.http.get(f"/artifacts/{name}")
            if data.status_code != 200 or len(data.content) != one.json()["size"]:
                outcome.violations.append(f"{fault.name}: {name} was acknowledged and is not there")
        elif one.status_code in (503, 507):
            if "retry-after" not in one.headers:
                outcome.violations.append(f"{fault.name}: {one.status_code} without Retry-After")
        elif one.status_code not in (202, 409):
            outcome.violations.append(f"{fault.name}: answered {one.status_code} {one.text[:200]}")
    if struck:
        outcome.counts["disk errors (ENOSPC, EIO)"] += 1
    else:
        outcome.notes.append(f"{fault.name} was never reached")
    return Counter(one.status_code for one in client.answers)


PART = DiskErrorsArtifacts()

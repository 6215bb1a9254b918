"""The disk is slow: every fsync of the store takes long. Leases are renewed all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw

from hcna_ray.config import LeaseSettings
from hcna_ray.store.sqlite import WAL_BYTES_MAX
from tests.faults.disk_stack import POLICY, Fault, Injection, Stack, until
from tests.faults.programme import Case, Outcome, RunCase, Size

LINE = "slow disks"
LEASE = LeaseSettings()
STRUCK_S = 20.0
CLIENTS = 12


class DiskSlow:
    """Delays of 0.3 and 5 s at each fdatasync."""

    name = "disk_slow"
    title = "every fsync takes long: no lease ends for it, and submits are answered"
    budget_s = 200.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return delays, and how long each is kept up."""
        slow = {"slice-300ms": (0.3, 5.0)} if size is Size.SLICE else {}
        if size is Size.FULL:
            slow = {"300ms": (0.3, 30.0), "5s": (5.0, 75.0)}
        return [
            Case(name=name, seed=seed, options={"delay_s": delay_s, "held_s": held_s})
            for name, (delay_s, held_s) in slow.items()
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        del folder
        yield lambda case, evidence: asyncio.run(_run(case, evidence))


async def _run(case: Case, folder: Path) -> Outcome:
    delay_s, held_s = float(case.options["delay_s"]), float(case.options["held_s"])
    data = folder / "data"
    data.mkdir()
    policy = {**POLICY, "heartbeat_s": LEASE.heartbeat_s}
    # As shipped: checkpoints are as rare as they are.
    stack = Stack(
        folder, case.seed, data, policy=policy, wal_bytes_max=WAL_BYTES_MAX, clients=CLIENTS
    )
    outcome = Outcome(counts={LINE: 1})
    async with stack.running():
        await stack.accepting(STRUCK_S)
        fault = Fault("fdatasync", str(int(delay_s * 1e6)), 1, once=False)
        log = folder / "strace.log"
        injection = Injection(
            fault, stack.moderator_pid(), [stack.store, data / "queue.db-wal"], log
        )
        try:
            await until(injection.attached, STRUCK_S)
            if not await until(injection.struck, STRUCK_S):
                outcome.violations.append("no fsync was slow")
            answered, beats = len(stack.submits_s), len(stack.worker.beats_s)
            await asyncio.sleep(held_s)
        finally:
            await asyncio.to_thread(injection.detach)
        submits, silences = stack.submits_s[answered:], stack.worker.beats_s[beats:]
    outcome.times_s[f"submit, each fsync {delay_s:g} s"] = submits
    outcome.times_s[f"lease unconfirmed, each fsync {delay_s:g} s"] = silences
    if not submits:
        outcome.violations.append("no submit was answered")
    # A worker that is not sure of its lease for so long stops what it runs.
    late = [silence for silence in silences if silence > LEASE.self_stop_s]
    if late:
        outcome.violations.append(
            f"{len(late)} of {len(silences)} heartbeats were confirmed too late, "
            f"the worst after {max(late):.1f} s"
        )
    if lost := _lost(stack.store):
        outcome.violations.append(f"{lost} attempts were lost because the disk was slow")
    if stack.exits:
        outcome.violations.append(f"the moderator ended with {stack.exits}")
    outcome.violations += stack.judge()
    outcome.notes.append(
        f"{injection.struck()} slow fsyncs, {len(submits)} submits answered, "
        f"the slowest in {max(submits, default=0):.1f} s, "
        f"longest silence {max(silences, default=0):.1f} s"
    )
    return outcome


def _lost(store: Path) -> int:
    db = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return int(db.execute("SELECT count(*) FROM fact WHERE kind = 'lost'").get)
    finally:
        db.close()


PART = DiskSlow()

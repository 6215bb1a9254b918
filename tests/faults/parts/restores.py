"""Backups made under load, restored elsewhere; and those who lived through it.

A moderator in a process, C1 and two workers with real executors, without Ray. A backup is made
while all are busy, the moderator is killed some time later, and another one starts on what was
restored, on the same socket: clients and workers go on, with tokens of before.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hcna_ray.config import LimitSettings, RaySettings, Settings
from hcna_ray.supervisor.backup import backup, restore
from hcna_ray.supervisor.backup import check as read_archive
from tests.checker.inputs import Dump, Fact, Reader
from tests.checker.recorder import Caller, History
from tests.faults.checking import check, own_environment, write_schedule
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support import checked_run
from tests.support.read_store import export, query

LINE = "backups restored"
WORDS = "correct horse battery staple"
#: G13: for a million tasks.
RTO_S = 600.0
#: How many.
FULL, SLICE = 10, 2
_TASKS = 90
#: What was granted before the restore is stopped first, and that takes its time.
DRAIN_S = 120.0
#: Attempts that run at the moment of the backup, and on through the restore.
_LONG = 3


class Restores:
    """See this module."""

    name = "restores"
    title = "backups under load, restored beside workers that lived on, without Ray"
    budget_s = 300.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return restores that differ by their seed only."""
        return [
            Case(name=f"restore-{number:02}", seed=seed * 100 + number)
            for number in range(1, 1 + (SLICE if size is Size.SLICE else FULL))
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        del folder

        def run(case: Case, own: Path) -> Outcome:
            with own_environment():
                return asyncio.run(go_through(case, own))

        yield run


def settings_of(home: Path) -> Settings:
    """Return the settings of a machine without anything else on it."""
    return Settings(
        home=home,
        limits=LimitSettings(disk_free_bytes_min=0),
        ray=RaySettings(temp_dir=home / "ray"),  # Others' Ray is none of this home's.
    )


async def go_through(case: Case, folder: Path) -> Outcome:
    """Back up, go on, kill, restore, go on."""
    out = Outcome()
    draw = random.Random(case.seed)
    first, second = settings_of(folder / "m1"), settings_of(folder / "spare")
    store, spare = folder / "m1" / "queue.db", folder / "spare" / "queue.db"
    socket, home = folder / "socket", folder / "home"
    home.mkdir()
    store.parent.mkdir()
    checked_run.install_tasks(folder / "site")
    process = checked_run.ModeratorProcess(store, socket, folder / "moderator.log")
    await process.start()
    links = [checked_run.SocketLink(socket) for _ in range(4)]
    workers = [
        checked_run.Worker(name, home, link)
        for name, link in zip(("W1", "W2"), links, strict=False)
    ]
    agents = [asyncio.create_task(worker.agent.run()) for worker in workers]
    started_at = time.time()
    try:
        async with checked_run.composite(home, store, links[2]) as http:
            load = checked_run.Load(folder, http, case.seed, _TASKS // 6)
            await busy(load, Caller(http, History(folder / "history.jsonl", "long", "owner")))
            clients = [asyncio.create_task(load.client(number)) for number in range(6)]
            enough = draw.uniform(0.2, 0.5) * _TASKS
            while len(load.ids) < enough:  # noqa: ASYNC110 - clients set no events
                await asyncio.sleep(0.01)
            backup_at = time.time()
            made = await asyncio.to_thread(
                backup, first, to=folder / "a.tar.zst", now=backup_at, passphrase=WORDS
            )
            await asyncio.sleep(draw.uniform(0.1, 0.6))
            killed_at = time.time()
            process.kill()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        export(store, folder / "before-1.jsonl")
        archive = Path(made.path)
        await asyncio.to_thread(read_archive, archive, WORDS)
        # Nothing of it is there any more.
        shutil.rmtree(store.parent)
        begun = time.time()
        report = await asyncio.to_thread(restore, second, archive, now=begun, passphrase=WORDS)
        restored_at = time.time()
        process = checked_run.ModeratorProcess(spare, socket, folder / "moderator.log")
        await process.start()
        accepting_at = time.time()
        async with checked_run.composite(home, spare, links[3]) as http:
            again = checked_run.Load(folder, http, case.seed + 50, _TASKS // 12, name="again")
            again.ids |= stored(spare)
            await asyncio.gather(*(again.client(number) for number in range(3)))
            end = time.monotonic() + DRAIN_S
            while await checked_run.moving(spare) and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            drained_at = time.time()
            again.ids = stored(spare)
            await again.look()
    finally:
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
        for worker in workers:
            await worker.end()
        for link in links:
            await link.close()
        process.kill()
    export(spare, folder / "store.jsonl")
    write_schedule(
        folder,
        case.seed,
        started_at=started_at,
        drained_at=drained_at,
        settings=checked_run.POLICY,
        workers=["W1", "W2"],
        canaries=[checked_run.ADMIN_KEY],
        faults=[
            {"kind": "kill", "target": "moderator", "at": killed_at},
            {
                "kind": "restore",
                "target": "M1",
                "at": restored_at,
                "backup_at": backup_at,
                "last_fact": None if report.point is None else report.point.last_fact,
            },
        ],
        measured=[{"name": "restored", "from": begun, "to": accepting_at, "max_s": RTO_S}],
    )
    assert report.point is not None
    assert report.generation is not None
    judge_restored(
        out,
        folder,
        last_fact=report.point.last_fact,
        generation=report.generation,
        restored_at=restored_at,
    )
    check(out, folder)
    out.counts = {LINE: 1}
    out.times_s = {"restore begun, without Ray: accepting again": [accepting_at - begun]}
    return out


async def busy(load: checked_run.Load, caller: Caller) -> None:
    """Have some attempts run for longer than it takes to restore."""
    ids = []
    for number in range(_LONG):
        nonce = f"long-{number}"
        payload = {"effects": str(load.effects), "nonce": nonce, "seconds": 8.0}
        answer = await caller.submit(
            {"task_type": "check.work", "payload": payload, "metadata": {"nonce": nonce}}
        )
        if answer.status_code == 202:
            ids.append(answer.json()["task_id"])
    for task in ids:
        for _ in range(200):
            if (await caller.get(task)).json()["status"] != "queued":
                break
            await asyncio.sleep(0.02)


def stored(store: Path) -> set[str]:
    """Return the ids of all tasks in a store."""
    return {str(one) for (one,) in query(store, "SELECT id FROM task")}


def judge_restored(
    out: Outcome, folder: Path, *, last_fact: int, generation: int, restored_at: float
) -> None:
    """Hold the restored store against what was lost: a prefix, a fence, and all accounted for.

    Args:
        out: Takes what is found.
        folder: ``before-1.jsonl`` and ``store.jsonl``.
        last_fact: Number of the last line of the log that the backup holds.
        generation: What every token is to begin with from now on.
        restored_at: When the restore was over, and nothing had started yet.
    """
    before, after = read_dump(folder / "before-1.jsonl"), read_dump(folder / "store.jsonl")
    kept = [_line(one) for one in before.facts if one.number <= last_fact]
    back = [_line(one) for one in after.facts if one.number <= last_fact]
    if kept != back:
        out.violations.append(
            f"what was restored is no prefix: {len(kept)} lines were in the log up to {last_fact}, "
            f"{len(back)} are back, {len(set(kept) ^ set(back))} differ"
        )
    older = [one.token for one in before.facts if one.token is not None]
    if older and generation <= max(older)[0]:
        out.violations.append(f"generation {generation} is not above {max(older)}")
    ended = 0
    for fact in after.facts:
        if fact.number <= last_fact or fact.token is None or fact.token[0] == generation:
            continue
        if fact.at <= restored_at:
            ended += 1  # By the restore itself.
        else:
            out.violations.append(f"an old token changed something: {fact.text}")
    accepted = {one.task: one.number for one in before.facts if one.kind == "accepted"}
    gone = {task for task in before.tasks if task not in after.tasks}
    wrong = {task for task in gone if accepted[task] <= last_fact}
    if wrong:
        out.violations.append(f"accepted before the backup, and gone: {sorted(wrong)[:5]}")
    out.notes.append(
        f"{len(back)} log lines and {len(accepted) - len(gone)} tasks are back, {len(gone)} "
        f"accepted after the backup are gone; {ended} leases ended by the restore, "
        f"{len(after.rows['late'])} late reports on record"
    )


def _line(fact: Fact) -> tuple[object, ...]:
    return (fact.number, fact.task, fact.kind, fact.at, fact.state, fact.token, fact.worker)


def read_dump(path: Path) -> Dump:
    """Return a dump."""
    reader = Reader(path.parent)
    dump = reader.dump([path])
    assert dump is not None, reader.problems[:3]
    return dump


PART = Restores()

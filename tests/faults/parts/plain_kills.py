"""SIGKILL without Ray: moderator, store, C1, agents, slots and executors, at every boundary.

A case is one run of moderator, C1, two workers and clients with some ten kills in it, one after the
other, each followed by what has to come back; then it is drained, and the checker reads what is
left. Kills come at failpoints, at the N-th system call of one kind (by strace), and at any moment;
some strike a process that is only just coming back from the last one. Other cases kill a migration,
a backup, a restore and a copy of the store at each of their steps.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from hcna_ray.runtime.journal import RunnerFiles, process_birth, read_note
from tests.checker.__main__ import check
from tests.checker.findings import violations
from tests.checker.report import CLEAN, as_table, verdict
from tests.faults import plain_files
from tests.faults.checking import own_environment
from tests.faults.plain_stack import WORKERS, PlainClients, PlainStack, eventually
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.spawner import SpawnerProcess
from tests.support.checked_run import install_tasks
from tests.support.sources import ROOT

LINE = "kill points, moderator and store alone"
ACCEPTING = "moderator killed: accepting again (alone)"
C1_ACCEPTING = "C1 killed: accepting again (alone)"
#: How soon somebody is accepted again, at the latest.
BACK_S = 10.0
#: How long a point may wait for a process to come by.
REACHED_S = 6.0
PER_CASE = 10
#: A run that drains for longer than this says so: somebody waited for a lease to end.
SLOW_S = 12.0

#: Points of a process that works, by the process and the number of arrivals that are tried.
WORKING: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "moderator": (
        (1, 2, 3, 5, 9, 17),
        (
            "writer.batch.taken",
            "moderator.commit.written",
            "moderator.commit.done",
            "writer.batch.published",
            "ledger.tasks.written",
            "ledger.audit.written",
            "store.commit.before",
            "store.commit.after",
            "store.checkpoint.before",
            "store.checkpoint.after",
        ),
    ),
    "c1": (
        (1, 2, 3, 7),
        (
            "c1.request.admitted",
            "c1.submit.before",
            "c1.submit.answered",
            "c1.answer.made",
            "artifact.part.flushed",
            "artifact.rename.before",
            "artifact.rename.after",
            "artifact.upload.complete",
        ),
    ),
    "agent": (
        (1, 2, 4),
        (
            "agent.heartbeat.before",
            "agent.heartbeat.answered",
            "agent.exchange.before",
            "agent.exchange.answered",
            "agent.heavy.granted",
            "agent.stop.written",
            "agent.gone.before",
            "agent.gone.answered",
        ),
    ),
    "slot": (
        (1, 2, 4),
        (
            "slot.exchange.before",
            "slot.exchange.answered",
            "slot.grant.handed_over",
            "slot.executor.forked",
            "slot.executor.mourned",
            "slot.mourning.confirmed",
            "slot.report.before",
            "slot.report.answered",
            "slot.stop.written",
        ),
    ),
    "executor": (
        (1, 2, 4),
        (
            "nursery.executor.forked",
            "executor.idle.before",
            "runner.start.before",
            "runner.start.journaled",
            "runner.handler.before",
            "runner.handler.ended",
            "runner.outcome.journaled",
            "runner.report.before",
            "runner.report.answered",
            "runner.journal.confirmed",
            "runner.journal.forgotten",
        ),
    ),
}
#: Points of a process that begins or ends: it is killed first, and at each start again.
BEGINNING: dict[str, tuple[str, ...]] = {
    "moderator": ("store.file.created", "moderator.rebuild.begun", "moderator.rebuild.done"),
    "agent": ("agent.hello.before", "agent.hello.answered", "agent.attach.received"),
}
LEAVING = ("agent.goodbye.before", "agent.goodbye.answered", "agent.goodbye.delivered")
#: Tried in a case of its own, where tasks are deleted soon.
PRUNING = "moderator.prune.written"
#: What has to happen for a point to be come by soon: seconds that a task runs, and how.
POKES: dict[str, dict[str, Any]] = {
    "agent.heavy.granted": {"seconds": 0.0, "heavy": True},
    "agent.stop.written": {"seconds": 3.0, "heavy": True},
    "agent:rename": {"seconds": 3.0, "heavy": True},
    "slot.stop.written": {"seconds": 3.0},
    "slot.executor.mourned": {"seconds": 0.0, "dies": True},
    "slot.mourning.confirmed": {"seconds": 0.0, "dies": True},
    "slot.executor.forked": {"seconds": 0.0, "dies": True},
    "nursery.executor.forked": {"seconds": 0.0, "dies": True},
    "agent.gone.before": {"seconds": 0.0, "heavy": True},
    "agent.gone.answered": {"seconds": 0.0, "heavy": True},
    "slot.report.before": {"seconds": 0.3},
    "slot.report.answered": {"seconds": 0.3},
    "runner.report.before": {"seconds": 0.3},
    "runner.report.answered": {"seconds": 0.3},
}
#: System calls by the process that makes them, and their numbers.
CALLS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("moderator", "pwrite64:wal", (1, 2, 3, 5, 8, 13, 21, 34, 55)),
    ("moderator", "fdatasync:wal", (1, 2, 3, 5, 8, 13)),
    ("moderator", "pwrite64:db", (1, 2, 3, 5, 8, 13)),
    ("moderator", "fdatasync:db", (1, 2, 3)),
    ("moderator", "pread64:db", (3, 10, 30)),
    ("slot", "write", (2, 4, 7, 12, 20, 33)),
    ("slot", "pwrite64", (1, 2, 5, 9)),
    ("slot", "ftruncate", (1, 2, 4, 7)),
    ("slot", "sendto", (10, 30)),
    ("agent", "unlink", (1, 2, 3, 5)),
    ("agent", "write", (1, 3, 6)),
    ("agent", "rename", (1, 2)),
)
ANY_MOMENT = {"moderator": 16, "c1": 6, "agent": 8, "slot": 8, "executor": 12}


def _kills(draw: random.Random) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for who, (numbers, points) in WORKING.items():
        found += [
            {"who": who, "point": point, "number": number} for point in points for number in numbers
        ]
    for who, points in BEGINNING.items():
        found += [{"who": who, "point": point, "times": 3} for point in points for _ in range(2)]
    found += [{"who": "agent", "point": point, "leaving": True} for point in LEAVING * 2]
    for who, call, numbers in CALLS:
        found += [{"who": who, "call": call, "number": number} for number in numbers]
    for who, times in ANY_MOMENT.items():
        found += [{"who": who, "after_s": round(draw.uniform(0.0, 0.7), 3)} for _ in range(times)]
    return found


class PlainKills:
    """See this module."""

    name = "plain_kills"
    title = "kill -9 of moderator, store, C1 and workers without Ray, at every boundary"
    budget_s = 2400.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the runs, and the migrations, backups, restores and copies."""
        draw = random.Random(f"{seed}-plain")
        kills = _kills(draw)
        draw.shuffle(kills)
        found: list[Case] = []
        if size is Size.SLICE:
            kills = _slice(kills)
        for start in range(0, len(kills), PER_CASE):
            some = kills[start : start + PER_CASE]
            number = start // PER_CASE + 1
            options: dict[str, Any] = {"kind": "run", "kills": some, "failpoints": _points(some)}
            found.append(Case(name=f"run-{number:02}", seed=seed * 1000 + number, options=options))
        if size is Size.FULL:
            prune = [{"who": "moderator", "point": PRUNING, "number": n} for n in (1, 1, 2, 1)]
            options = {"kind": "run", "kills": prune, "failpoints": [PRUNING], "retention_s": 3.0}
            found.append(Case(name="pruning", seed=seed, options=options))
        for kind, (points, in_slice) in plain_files.KINDS.items():
            if in_slice or size is Size.FULL:
                options = {"kind": kind, "failpoints": list(points), "all": size is Size.FULL}
                found.append(Case(name=kind, seed=seed, options=options))
        return found

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Start the spawner."""
        with own_environment():
            install_tasks(folder / "site")
            environment = dict(os.environ)
        environment |= {"HCNA_TEST": "1", "HCNA_FAILPOINTS": str(folder)}
        with ExitStack() as opened:
            spawner = SpawnerProcess(folder, environment, ROOT)
            opened.callback(spawner.close)
            servers = opened.enter_context(plain_files.Servers())

            def run(case: Case, own: Path) -> Outcome:
                if case.options["kind"] == "run":
                    return asyncio.run(_run(case, own, spawner.socket))
                return asyncio.run(plain_files.run(case, own, spawner.socket, servers, LINE))

            yield run


def _slice(kills: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a few of every kind, those that need no luck."""
    wanted = {"moderator": 8, "c1": 2, "agent": 2, "slot": 2, "executor": 3}
    chosen = []
    for one in kills:
        easy = "point" in one and one["point"] not in POKES and one.get("number", 9) <= 3
        if easy and wanted[one["who"]] and not one["point"].startswith("artifact."):
            wanted[one["who"]] -= 1
            chosen.append(one)
    chosen.append({"who": "moderator", "call": "pwrite64:wal", "number": 5})
    return chosen


def _points(kills: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({one["point"] for one in kills if "point" in one})


# -- one run ---------------------------------------------------------------------------------------


async def _run(case: Case, folder: Path, spawner: Path) -> Outcome:
    out = Outcome(counts={LINE: 0})
    run = folder / "run"
    run.mkdir()
    retention = case.options.get("retention_s")
    stack = PlainStack(
        run,
        spawner,
        seed=case.seed,
        policy={} if retention is None else {"retention_s": retention},
        moderator={"wal_bytes_max": 384 * 1024}
        | ({} if retention is None else {"prune_period_s": 1.0}),
    )
    try:
        await stack.start()
        clients = PlainClients(stack)
        clients.start()
        if any(point.startswith("artifact.") for point in case.options["failpoints"]):
            stack.spawn(clients.upload())
        if retention is not None:
            stack.spawn(clients.watch())
        await eventually(lambda: len(clients.ids) >= 8, 20.0)
        draw = random.Random(case.seed)
        for kill in case.options["kills"]:
            one = _Kill(stack, clients, draw, out)
            begun = time.monotonic()
            await one.do(kill)
            if not one.done:
                out.notes.append(f"not reached: {kill}")
            elif time.monotonic() - begun > REACHED_S:
                out.notes.append(f"{time.monotonic() - begun:.1f} s for {kill}")
            out.counts[LINE] += one.done
            await asyncio.sleep(draw.uniform(0.05, 0.3))
        clients.busy = False
        rested = time.time()
        drained = await stack.drain()
        if drained - rested > SLOW_S:
            out.notes.append(f"{drained - rested:.0f} s to drain, {await stack.left()} left")
        await clients.look()
        await clients.look_at_uploads()
        await clients.close()
    finally:
        await stack.stop()
    stack.write_evidence(drained)
    found, outcomes = check(run)
    status, sentence = verdict(found, outcomes)
    out.violations += stack.violations
    out.violations += [f"{one.check} {one.task}: {one.message}" for one in violations(outcomes)]
    if status != CLEAN:
        out.violations.append(f"{sentence}\n{as_table(found, outcomes)}")
    out.notes.append(sentence)
    return out


class _Kill:
    """One kill, or a few in a row of the same process, and what has to come back."""

    def __init__(
        self, stack: PlainStack, clients: PlainClients, draw: random.Random, out: Outcome
    ) -> None:
        self._stack, self._clients, self._draw, self._out = stack, clients, draw, out
        #: How many times something was killed.
        self.done = 0

    async def do(self, kill: dict[str, Any]) -> None:
        """Kill as told, and wait until it is back."""
        who = str(kill["who"])
        worker = self._draw.choice(list(WORKERS)) if who in ("agent", "slot", "executor") else ""
        place = {"agent": worker, "slot": f"{worker}.slot", "executor": f"{worker}.executor"}.get(
            who, who
        )
        if "after_s" in kill:
            await asyncio.sleep(kill["after_s"])
            await self._now(who, worker, place)
        elif "call" in kill:
            await self._at_call(kill, who, worker, place)
        elif kill.get("leaving"):
            await self._leaving(kill["point"], worker)
        elif "times" in kill:
            await self._beginning(kill["point"], who, place, kill["times"])
        else:
            await self._working(kill["point"], who, worker, place, kill["number"])

    def _killed(self, who: str, worker: str, at: float, **more: Any) -> None:
        self.done += 1
        target = {"moderator": "moderator", "c1": "m1/c1", "agent": worker}.get(
            who, f"{worker}/{who}"
        )
        self._stack.note(target, at, **more)

    async def _back(self, who: str, at: float) -> None:
        """Wait until somebody is accepted who asked after it."""
        if who not in ("moderator", "c1"):
            return
        # The instants of files and of clients are of clocks that the kernel keeps together.
        took = await self._clients.accepted_after(at, 2 * BACK_S)
        if took is None or took > BACK_S:
            self._stack.violations.append(f"{who} killed at {at:.2f}: accepting after {took} s")
        else:
            title = ACCEPTING if who == "moderator" else C1_ACCEPTING
            self._out.times_s.setdefault(title, []).append(took)

    async def _now(self, who: str, worker: str, place: str) -> None:
        stack = self._stack
        if who in ("moderator", "c1", "agent"):
            at = stack.kill(place)
        else:
            pids = _slots(stack, worker) if who == "slot" else _executors(stack, worker)
            if not pids:
                return
            at = time.time()
            with suppress(ProcessLookupError):
                os.kill(self._draw.choice(pids), signal.SIGKILL)
        self._killed(who, worker, at)
        await self._back(who, at)

    async def _working(self, point: str, who: str, worker: str, place: str, number: int) -> None:
        stack = self._stack
        fired = stack.arm(place, point, f"kill@{number}")
        with self._poking(point, lambda: fired() is not None):
            await eventually(lambda: fired() is not None, REACHED_S)
        stack.disarm(place, point)
        at = fired()
        if at is not None:
            self._killed(who, worker, at, point=point)
            await self._back(who, at)

    @contextmanager
    def _poking(self, point: str, over: Callable[[], bool]) -> Iterator[None]:
        poke = POKES.get(point)
        if poke is None:
            yield
            return
        task = self._stack.spawn(self._clients.poke(over, **poke))
        yield
        # It ends by itself; only one that still waits for its task is cut short.
        asyncio.get_running_loop().call_later(1.0, task.cancel)

    async def _beginning(self, point: str, who: str, place: str, times: int) -> None:
        """Kill it, and then each time when it has come as far as the point."""
        stack = self._stack
        kept = stack.kept[place]
        kept.free.clear()
        at = stack.kill(place)
        self._killed(who, place, at)
        await eventually(lambda: not stack.spawner.is_alive(kept.pid), REACHED_S)
        for _ in range(times):
            fired = stack.arm(place, point, "kill")
            before = kept.starts
            kept.free.set()
            await eventually(lambda: kept.starts > before, REACHED_S)  # noqa: B023
            kept.free.clear()
            if not await eventually(lambda: fired() is not None, REACHED_S):  # noqa: B023
                break
            at = fired() or at
            self._killed(who, place, at, point=point)
            await eventually(lambda: not kept.up.is_set(), REACHED_S)
        stack.disarm(place, point)
        at = time.time() if self.done == 1 else at
        kept.free.set()
        await self._back(who, at)

    async def _leaving(self, point: str, worker: str) -> None:
        stack = self._stack
        fired = stack.arm(worker, point, "kill")
        request = stack.home / "run" / worker / "goodbye"
        request.unlink(missing_ok=True)
        request.touch()
        await eventually(lambda: fired() is not None, REACHED_S)
        stack.disarm(worker, point)
        if (at := fired()) is not None:
            self._killed("agent", worker, at, point=point)

    async def _at_call(self, kill: dict[str, Any], who: str, worker: str, place: str) -> None:
        """Have the next one of its kind be killed at its N-th call of one sort."""
        stack = self._stack
        name, _, file = str(kill["call"]).partition(":")
        paths = {"wal": [Path(f"{stack.store}-wal")], "db": [stack.store]}.get(file, [])
        held = await stack.hold(place)
        if who == "slot":
            pids = _slots(stack, worker)
            if not pids:
                return
            at = time.time()
            with suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
        else:
            at = stack.kill(place)
        self._killed(who, worker, at)
        pid = await held()
        number = int(kill["number"])
        tracer = await stack.trace(pid, f"{name}:signal=SIGKILL:when={number}", paths)
        try:
            log = stack.folder / "strace.log"
            with self._poking(f"{who}:{name}", lambda: _struck(log) is not None):
                await eventually(lambda: _struck(log) is not None, REACHED_S, 0.01)
            at = time.time()
            if (struck := _struck(log)) is not None:
                # Whoever runs below a slot was forked by it.
                victim = "executor" if who == "slot" and struck != pid else who
                self._killed(victim, worker, at, call=kill["call"], number=number)
            else:
                self._out.notes.append(f"not reached: {kill}")
        finally:
            # It does not always end when it is asked to.
            tracer.kill()
            tracer.wait()
        log.unlink(missing_ok=True)
        await self._back(who, at)


def _struck(log: Path) -> int | None:
    """Return who did not come back from a call, as strace tells; None while nobody was struck."""
    found = re.search(rb"^(\d+) .*= \?$", log.read_bytes(), re.MULTILINE)
    return None if found is None else int(found[1])


def _slots(stack: PlainStack, worker: str) -> list[int]:
    place = stack.place(f"{worker}.slot")
    pids = [int(path.suffix[1:]) for path in place.glob("alive.*")]
    return [pid for pid in pids if process_birth(pid) is not None]


def _executors(stack: PlainStack, worker: str) -> list[int]:
    outbox = stack.home / "outbox" / worker
    found = []
    for path in outbox.glob("*.note"):
        note = read_note(RunnerFiles(outbox, path.stem))
        if note is not None and process_birth(note.pid) == note.born:
            found.append(note.pid)
    return found


PART = PlainKills()

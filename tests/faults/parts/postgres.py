"""PostgreSQL under a moderator, agents, executors and C1, without Ray: every way it can go away.

Each case is one run of `tests.support.checked_run` on a database of its own, with the trouble in
its middle, and judged by `tests.checker`. The commits whose connection broke are looked at most:
whether they took place can only be read from the store afterwards.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checker.__main__ import check
from tests.checker.findings import violations
from tests.checker.postgres_dump import export
from tests.checker.report import CLEAN, as_table, verdict
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support import checked_run
from tests.support.cutting_proxy import Cut, CuttingProxy
from tests.support.postgres import PostgresServer

LINE = "PostgreSQL: server and moderator killed, stopped, away"
#: A store that has been away answers the first submission in this time. Machines are loaded.
_WAIT_S = 60.0

Faults = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What a case may break."""

    server: PostgresServer
    #: The thread that starts the server: Linux ends it with that thread.
    keeper: ThreadPoolExecutor
    proxy: CuttingProxy
    process: checked_run.ModeratorProcess
    load: checked_run.Load
    draw: random.Random
    away_s: float
    outcome: Outcome

    async def do(self, what: Callable[[], None]) -> None:
        """Start or end the server while the run goes on."""
        await asyncio.get_running_loop().run_in_executor(self.keeper, what)

    async def accepted_more(self) -> None:
        """Wait until something is accepted that was not before."""
        before, end = len(self.load.ids), time.monotonic() + _WAIT_S
        while (  # noqa: ASYNC110 - clients set no events
            len(self.load.ids) == before and time.monotonic() < end and not self.load.over
        ):
            await asyncio.sleep(0.02)
        if len(self.load.ids) == before and not self.load.over:
            self.outcome.violations.append(f"nothing was accepted for {_WAIT_S:g} s afterwards")


async def _server_killed(ground: _Ground) -> None:
    await ground.do(ground.server.crash)
    await asyncio.sleep(ground.away_s)
    await ground.do(ground.server.start)


async def _server_stopped(ground: _Ground) -> None:
    await ground.do(ground.server.stop)
    await asyncio.sleep(ground.away_s)
    await ground.do(ground.server.start)


async def _server_stands_still(ground: _Ground) -> None:
    with ground.server.standing_still():
        await asyncio.sleep(ground.away_s)


async def _connections_reset(ground: _Ground) -> None:
    for _ in range(5):
        ground.proxy.reset_all()
        await ground.accepted_more()


async def _commits_cut(ground: _Ground, where: Cut) -> None:
    for _ in range(5):
        ground.proxy.arm(where, ground.draw.randint(1, 4))
        await asyncio.to_thread(ground.proxy.cut.wait, _WAIT_S)
        await ground.accepted_more()
    ground.outcome.notes.append(f"{ground.proxy.cuts} connections were cut, {where} their commit")


async def _commits_cut_before(ground: _Ground) -> None:
    await _commits_cut(ground, Cut.BEFORE)


async def _commits_cut_after(ground: _Ground) -> None:
    await _commits_cut(ground, Cut.AFTER)


async def _moderator_killed(ground: _Ground) -> None:
    for _ in range(2):
        ground.process.kill()
        await asyncio.sleep(0.1)
        await ground.process.start()
        await ground.accepted_more()


async def _both_killed(ground: _Ground) -> None:
    """The moderator comes back first, and must wait for its store."""
    await ground.do(ground.server.crash)
    ground.process.kill()
    await ground.process.start()
    await asyncio.sleep(ground.away_s)
    await ground.do(ground.server.start)


_TROUBLES: dict[str, Callable[[_Ground], Awaitable[None]]] = {
    "server-killed": _server_killed,
    "server-stopped": _server_stopped,
    "server-stands-still": _server_stands_still,
    "connections-reset": _connections_reset,
    "commits-cut-before": _commits_cut_before,
    "commits-cut-after": _commits_cut_after,
    "moderator-killed": _moderator_killed,
    "both-killed": _both_killed,
}
#: Cases with Ray, and their tasks: see `tests.faults.postgres_whole`.
WITH_RAY = {"whole-computer": 200, "whole-restored": 50}
#: How long the server is away: shorter than a worker waits, and longer.
_AWAY_S = {"server-stopped": (2.0, 20.0, 50.0), "server-stands-still": (3.0, 40.0)}


class _Postgres:
    name = "postgres"
    title = "a PostgreSQL server that is killed, stopped, cut off, and a moderator on it"
    budget_s = 1500.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Each trouble, thrice, and Ray under it once; the slice has what leaves most in doubt."""
        if size is Size.SLICE:
            chosen = [("server-killed", 1.0), ("commits-cut-after", 0.0)]
            return [self._case(name, away, seed, 0, tasks=90) for name, away in chosen]
        return [
            self._case(name, away, seed, turn, tasks=240)
            for name in _TROUBLES
            for away in _AWAY_S.get(name, (1.0,))
            for turn in range(3)
        ] + [self._with_ray(name, tasks, seed) for name, tasks in WITH_RAY.items()]

    def _with_ray(self, name: str, tasks: int, seed: int) -> Case:
        return Case(
            name=name,
            seed=random.Random(f"{seed}-{name}").getrandbits(31),
            options={"trouble": name, "tasks": tasks, "away_at_start_s": 12.0, "away_s": 20.0},
        )

    def _case(self, trouble: str, away_s: float, seed: int, turn: int, *, tasks: int) -> Case:
        return Case(
            name=f"{trouble}.{away_s:g}s.{turn}",
            seed=random.Random(f"{seed}-{trouble}-{away_s}-{turn}").getrandbits(31),
            options={"trouble": trouble, "away_s": away_s, "tasks": tasks},
        )

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Start a server and, as every other test does, a database of its own for each case."""
        server = PostgresServer()
        with ThreadPoolExecutor(1, "server") as keeper:
            try:
                keeper.submit(server.start).result()

                def run(case: Case, evidence: Path) -> Outcome:
                    if case.options["trouble"] in WITH_RAY:
                        from tests.faults import postgres_whole

                        kinds = {
                            "whole-computer": postgres_whole.whole,
                            "whole-restored": postgres_whole.restored,
                        }
                        outcome = kinds[case.name](server, keeper, case, evidence)
                        outcome.counts[LINE] = 1
                        return outcome
                    return _run(server, keeper, case, evidence)

                yield run
            finally:
                server.remove()


def _run(server: PostgresServer, keeper: ThreadPoolExecutor, case: Case, evidence: Path) -> Outcome:
    outcome = Outcome()
    database = server.create_database()
    run = evidence / "run"
    with CuttingProxy(server.port) as proxy:
        url = server.url(database).replace(f":{server.port}/", f":{proxy.port}/")

        async def trouble(process: checked_run.ModeratorProcess, load: checked_run.Load) -> Faults:
            ground = _Ground(
                server=server,
                keeper=keeper,
                proxy=proxy,
                process=process,
                load=load,
                draw=random.Random(case.seed),
                away_s=float(case.options["away_s"]),
                outcome=outcome,
            )
            at, load.patient = time.time(), True
            await _TROUBLES[case.options["trouble"]](ground)
            back = time.monotonic()
            await ground.accepted_more()
            outcome.times_s["store back: accepting again"] = [time.monotonic() - back]
            load.patient = False
            # A decision may be older than its commit by as long as the store was away.
            return [{"kind": "stall", "target": "all", "at": at, "until": time.time()}]

        path = list(sys.path)
        try:
            asyncio.run(
                checked_run.run(
                    run,
                    case.seed,
                    int(case.options["tasks"]),
                    store=url,
                    trouble=trouble,
                    canaries=(server.password,),
                    without={"C13": "what is measured is how soon the store is back"},
                )
            )
        finally:
            sys.path[:] = path
    export(server.url(database), run / "store.jsonl")
    server.drop_database(database)
    found, outcomes = check(run)
    status, sentence = verdict(found, outcomes)
    if status != CLEAN:
        outcome.violations.append(f"{sentence}\n{as_table(found, outcomes)}")
    outcome.violations += [f"{one.check} {one.task}: {one.message}" for one in violations(outcomes)]
    outcome.notes.append(sentence)
    outcome.counts[LINE] = 1
    return outcome


PART = _Postgres()

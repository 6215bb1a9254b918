"""A whole composite computer on a PostgreSQL server that is away at its start, and under load."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from hcna_ray.config import Settings, StoreSettings
from hcna_ray.core.models import TaskState
from hcna_ray.store.postgres import PostgresTaskStore
from hcna_ray.supervisor.backup import dump_command, restore_command
from hcna_ray.supervisor.database import take_over
from tests.checker.postgres_dump import export
from tests.checker.recorder import Caller, History
from tests.faults.checking import check, own_environment, write_schedule
from tests.faults.one_machine import UP_S, Cluster, cluster
from tests.faults.programme import Case, Outcome
from tests.support import live
from tests.support.builders import a_task, an_attempt
from tests.support.postgres import PostgresServer

_CONFIG = """\
worker:
  resources:
    cpu_cores: 4
    disk_path: {data}
slots: {{base: 2, max: 8}}
"""
_CLIENTS = 4
#: Everything has ended by then, or something is stuck. Machines are loaded.
_GIVE_UP_S = 300.0
_OPEN = "SELECT count(*) FROM task WHERE state IN ('scheduled', 'queued', 'running')"

Faults = list[dict[str, Any]]


def whole(server: PostgresServer, keeper: ThreadPoolExecutor, case: Case, folder: Path) -> Outcome:
    """Bring the computer up while the server is away; then kill M1, and stop the server."""
    out = Outcome()
    database = server.create_database()
    begun_at = time.time()
    effects = folder / "effects.jsonl"
    with own_environment():
        os.environ["DATABASE_URL"] = server.url(database)
        keeper.submit(server.stop).result()
        back = keeper.submit(_later, float(case.options["away_at_start_s"]), server.start)
        began = time.monotonic()
        with cluster(_CONFIG, folder / "logs") as on:
            out.times_s["computer up, store away at first"] = [time.monotonic() - began]
            back.result()
            faults = asyncio.run(_load(on, server, keeper, case, effects, folder, out))
            key = on.key
    drained_at = time.time()
    if "store.closed" not in (folder / "logs" / "moderator.log").read_text():
        out.violations.append("the moderator did not say that it waits for its store")
    export(server.url(database), folder / "store.jsonl")
    _judge(server, database, int(case.options["tasks"]), out)
    server.drop_database(database)
    write_schedule(
        folder,
        case.seed,
        started_at=begun_at,
        drained_at=drained_at,
        settings={"queue_tasks_max": 100_000, "max_concurrent_tasks": 8, "heartbeat_s": 5.0},
        workers=["W1"],
        canaries=[key, server.password],
        faults=faults,
        measured=[
            {"name": "all ended", "from": begun_at, "to": drained_at, "max_s": 4 * _GIVE_UP_S}
        ],
    )
    check(out, folder)
    return out


def restored(
    server: PostgresServer, keeper: ThreadPoolExecutor, case: Case, folder: Path
) -> Outcome:
    """Bring the computer up on a dump that was put back: it waits, and then goes on by itself."""
    out = Outcome()
    count = int(case.options["tasks"])
    first, second = server.create_database(), server.create_database()
    _leave_behind(server.url(first), count, folder / "effects.jsonl")
    home = folder / "operator"
    home.mkdir()
    old, new = (
        Settings(home=home, store=StoreSettings(url=server.url(one))) for one in (first, second)
    )
    server.shell(dump_command(old, folder / "hcna.dump"))
    server.shell(restore_command(new).replace("FILE.dump", str(folder / "hcna.dump")))
    with own_environment():
        os.environ["DATABASE_URL"] = server.url(second)
        began = time.monotonic()
        seen: list[float] = []

        def take_over_later() -> None:
            seen.append(time.monotonic() - began)
            found = take_over(new, now=time.time())
            out.notes.append(
                f"{found.ended.returned} leases returned, {found.ended.lost} lost, generation "
                f"{found.generation_before} is now {found.generation}"
            )

        done = keeper.submit(_later, float(case.options["away_at_start_s"]), take_over_later)
        with cluster(_CONFIG, folder / "logs"):
            took_s = time.monotonic() - began
            done.result()
            out.times_s["computer up, database to be taken over at first"] = [took_s]
            if took_s < seen[0]:
                out.violations.append("it was ready before the database was taken over")
            end = time.monotonic() + _GIVE_UP_S
            while server.execute(_OPEN, second)[0][0] and time.monotonic() < end:
                time.sleep(0.5)
    logs = (folder / "logs" / "moderator.log").read_text()
    if "hcna store restored" not in logs:
        out.violations.append("moderator.log does not say what to do")
    _judge(server, second, count, out)
    generations = server.execute("SELECT DISTINCT generation FROM attempt", second)
    if any(int(generation) < 10**12 for (generation,) in generations if generation != 1):
        out.violations.append(f"attempts of generations {generations}")
    for database in (first, second):
        server.drop_database(database)
    return out


def _leave_behind(url: str, count: int, effects: Path) -> None:
    """Make a store in which some tasks wait and some were handed out."""
    store = PostgresTaskStore(url)
    with store.transaction():
        for seq in range(1, count + 1):
            payload = json.dumps({"effects": str(effects), "nonce": f"r-{seq}"}).encode()
            state = TaskState.QUEUED if seq % 5 else TaskState.RUNNING
            task = a_task(f"r{seq}", seq=seq, state=state, task_type="check.work", payload=payload)
            store.insert([task])
            if state is TaskState.RUNNING:
                store.save_attempts([an_attempt(task.id)])
    store.close()


def _later(after_s: float, what: Callable[[], None]) -> None:
    """Do something when the moderator has met a store that it cannot open, and a while after."""
    end = time.monotonic() + UP_S - 30.0
    while time.monotonic() < end:
        log = Path(os.environ.get("HCNA_HOME", "/nowhere")) / "logs" / "moderator.log"
        if log.is_file() and "store.closed" in log.read_text():
            break
        time.sleep(0.2)
    time.sleep(after_s)
    what()


async def _load(
    on: Cluster,
    server: PostgresServer,
    keeper: ThreadPoolExecutor,
    case: Case,
    effects: Path,
    folder: Path,
    out: Outcome,
) -> Faults:
    """Have all tasks accepted, with the trouble in the middle, and wait for their ends."""
    draw = random.Random(case.seed)
    wanted = int(case.options["tasks"])
    accepted: list[str] = []
    numbers = iter(range(wanted))
    headers = {"Authorization": f"Bearer {on.key}"}
    async with httpx.AsyncClient(
        base_url=on.url, headers=headers, timeout=60, trust_env=False
    ) as http:

        async def client(name: str) -> None:
            caller = Caller(http, History(folder / "history.jsonl", name, "owner"))
            for number in numbers:
                nonce = f"p-{case.seed}-{number}"
                body = {
                    "task_type": "check.work",
                    "payload": {
                        "effects": str(effects),
                        "nonce": nonce,
                        "seconds": draw.choice((0.0, 0.05, 0.5, 3.0)),
                    },
                    "metadata": {"nonce": nonce},
                }
                accepted.append(await _accepted(caller, body, f"key-{nonce}"))
                await asyncio.sleep(draw.uniform(0.0, 0.3))

        began = time.time()
        clients = asyncio.gather(*(client(f"client-{n}") for n in range(_CLIENTS)))
        trouble = asyncio.ensure_future(_trouble(on, server, keeper, case, accepted, out))
        await clients
        await trouble
        end = time.monotonic() + _GIVE_UP_S
        while left := server.execute(_OPEN, _database_of())[0][0]:
            if time.monotonic() > end:
                out.violations.append(f"{left} tasks have not ended after {_GIVE_UP_S:g} s")
                break
            await asyncio.sleep(0.5)
    return [{"kind": "stall", "target": "all", "at": began, "until": time.time()}]


async def _accepted(caller: Caller, body: dict[str, Any], key: str) -> str:
    """Submit until it is accepted, with the same key, and return the task's id."""
    end = time.monotonic() + _GIVE_UP_S
    while True:
        try:
            answer = await caller.submit(body, key=key)
            if answer.status_code in (200, 202):
                return str(answer.json()["task_id"])
        except httpx.HTTPError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"nothing was accepted for {_GIVE_UP_S:g} s")
        await asyncio.sleep(0.5)


async def _trouble(
    on: Cluster,
    server: PostgresServer,
    keeper: ThreadPoolExecutor,
    case: Case,
    accepted: list[str],
    out: Outcome,
) -> None:
    loop = asyncio.get_running_loop()
    share = int(case.options["tasks"]) // 5

    async def reached(count: int) -> None:
        while len(accepted) < count:  # noqa: ASYNC110 - clients set no events
            await asyncio.sleep(0.05)

    async def goes_on(what: str) -> None:
        began, before = time.monotonic(), len(accepted)
        await reached(before + _CLIENTS)
        out.times_s[what] = [time.monotonic() - began]

    await reached(share)
    victim = await asyncio.to_thread(live.moderator, on.settings, on.url)
    await asyncio.to_thread(victim.kill)
    await goes_on("moderator killed: accepting again")
    await reached(2 * share)
    await loop.run_in_executor(keeper, server.stop)
    await asyncio.sleep(float(case.options["away_s"]))
    await loop.run_in_executor(keeper, server.start)
    await goes_on("store back: accepting again")


def _database_of() -> str:
    return os.environ["DATABASE_URL"].rpartition("/")[2]


def _judge(server: PostgresServer, database: str, wanted: int, out: Outcome) -> None:
    """Every task was accepted once and ended once, well."""
    sql = "SELECT state, count(*) FROM task GROUP BY state"
    states = {str(state): int(count) for state, count in server.execute(sql, database)}
    if states != {"completed": wanted}:
        out.violations.append(f"{wanted} tasks were submitted; in the store are {states}")
    sql = (
        "SELECT task_id, count(*) FROM fact WHERE kind = 'completed' "
        "GROUP BY task_id HAVING count(*) > 1"
    )
    if doubled := server.execute(sql, database):
        out.violations.append(f"tasks that ended more than once: {doubled[:5]}")
    ((attempts, lost),) = server.execute(
        "SELECT count(*), count(*) FILTER (WHERE outcome IS DISTINCT FROM 'completed') "
        "FROM attempt",
        database,
    )
    out.notes.append(f"{wanted} tasks, {attempts} attempts, {lost} of them not completed")

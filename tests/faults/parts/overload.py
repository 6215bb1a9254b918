"""Five times what the computer can do, offered for minutes: what it takes, it does.

Everything else is refused, at once and with a time to come again; and when the load is over, all
is as before. The full case is a whole computer whose load comes from a process of its own on the
same machine. The slice has the same things without Ray, and does not look at times.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.checker.recorder import Caller, History
from tests.faults import samples
from tests.faults.checking import check, own_environment, write_schedule
from tests.faults.offers import Plan, Told
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support.read_store import export, query
from tests.support.sources import ROOT

LINE = "offers under overload"

#: How much more is offered than is done.
FACTOR = 5.0
TASK_S = 0.05
QUEUE_MAX = 2000
#: What is promised of refusals, and of the time after.
REFUSED_P99_S = 0.05
NORMAL_S = 60.0
REFUSED_SHARE_MIN = 0.6
#: Growth over the load, after its first quarter, that still is flat: a tenth, or this.
FLAT_BYTES = 16 << 20
#: The moderator also fills its store's page cache while the database grows, and no further.
PAGE_CACHE_BYTES = 64 << 20
LONE = 30
_SAMPLE_S = 2.0
_CONFIG = f"""\
worker:
  resources:
    cpu_cores: 4
    disk_path: {{data}}
slots: {{{{base: 4, max: 8}}}}
moderator:
  scheduling: {{{{max_concurrent_tasks: 8}}}}
limits: {{{{queue_tasks_max: {QUEUE_MAX}}}}}
"""
#: Processes of which samples are taken, by a text in their command.
PROCESSES = {
    "moderator": "ray::ModeratorActor",
    "C1": "ray::ServeReplica",
    "agent": "ray::NodeAgent",
}


class Overload:
    """See this module."""

    name = "overload"
    title = "tasks of 50 ms at five times the measured drain rate, and what is left of it"
    budget_s = 600.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the only case."""
        if size is Size.SLICE:
            return [Case(name="without-ray", seed=seed, options={"seconds": 5.0})]
        return [Case(name="five-minutes", seed=seed, options={"seconds": 300.0})]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        del folder
        yield run_case


def run_case(case: Case, folder: Path) -> Outcome:
    """Run the case that was asked for."""
    if case.name == "without-ray":
        with own_environment():
            return asyncio.run(without_ray(case, folder))
    return whole(case, folder)


# -- a whole computer ------------------------------------------------------------------------------


def whole(case: Case, folder: Path) -> Outcome:
    """Overload a computer that really runs."""
    from tests.faults.one_machine import cluster
    from tests.support.live import processes

    out = Outcome()
    seconds = float(case.options["seconds"])
    with cluster(_CONFIG, folder / "logs") as on:
        store = on.settings.home / "queue.db"

        def pids() -> dict[str, int]:
            found = processes(on.settings)
            return {
                name: one.pid
                for name, text in PROCESSES.items()
                for one in found
                if one.command.startswith(text)
            }

        async def measured(work: Callable[[Caller], Any]) -> Any:
            headers = {"Authorization": f"Bearer {on.key}"}
            limits = httpx.Limits(max_connections=32)
            async with httpx.AsyncClient(
                base_url=on.url, headers=headers, timeout=60, limits=limits, trust_env=False
            ) as http:
                number[0] += 1
                name = f"judge-{number[0]}"
                return await work(Caller(http, History(folder / "history.jsonl", name, "owner")))

        number = [0]
        begun_at = time.time()
        effects = folder / "effects.jsonl"
        bodies = _bodies(effects, case.seed)
        asyncio.run(measured(lambda caller: lone(caller, bodies, 10)))
        before_s = asyncio.run(measured(lambda caller: lone(caller, bodies, LONE)))
        asyncio.run(measured(lambda caller: burst(caller, bodies, 1000)))
        rate = drained(store, 1000)
        plan = Plan(
            url=on.url,
            key=on.key,
            history=str(folder / "history-offers.jsonl"),
            effects=str(effects),
            seed=case.seed,
            per_second=FACTOR * rate,
            seconds=seconds,
            task_seconds=TASK_S,
        )
        with samples.Sampler(folder / "samples.jsonl", pids, every_s=_SAMPLE_S):
            done = subprocess.run(
                [sys.executable, "-m", "tests.faults.offers"],
                input=json.dumps(plan.__dict__),
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr[-3000:]
        told = Told(**json.loads(done.stdout))
        normal_s, after_s, empty_s = asyncio.run(
            measured(lambda caller: back_to_normal(caller, bodies, store, before_s, told.ended_at))
        )
        drained_at = time.time()
        export(store, folder / "store.jsonl")
        key = on.key
    write_schedule(
        folder,
        case.seed,
        started_at=begun_at,
        drained_at=drained_at,
        settings={"queue_tasks_max": QUEUE_MAX, "max_concurrent_tasks": 8, "heartbeat_s": 5.0},
        workers=["W1"],
        canaries=[key],
        bounds={"refusal_p99": REFUSED_P99_S},
        measured=[_normal_again(told.ended_at, drained_at)],
    )
    _judge_offers(out, told, rate)
    _judge_times(out, told, before_s, after_s, normal_s, empty_s)
    _judge_memory(out, folder / "samples.jsonl", told)
    check(out, folder)
    return out


def _bodies(effects: Path, seed: int) -> Callable[[float], dict[str, Any]]:
    count = 0

    def body(task_s: float) -> dict[str, Any]:
        nonlocal count
        count += 1
        nonce = f"j-{seed}-{count}"
        return {
            "task_type": "check.work",
            "payload": {"effects": str(effects), "nonce": nonce, "seconds": task_s},
            "metadata": {"nonce": nonce},
        }

    return body


async def lone(
    caller: Caller, bodies: Callable[[float], dict[str, Any]], count: int
) -> list[float]:
    """Return how long single tasks took from POST to their end, one after the other."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        answer = await caller.submit(bodies(0.0))
        if answer.status_code != 202:
            took.append(math.inf)
            await asyncio.sleep(0.2)
            continue
        found = await caller.get(answer.json()["task_id"], wait_s=30)
        ended = found.json()["status"] == "completed"
        took.append(time.perf_counter() - began if ended else math.inf)
    return took


async def burst(caller: Caller, bodies: Callable[[float], dict[str, Any]], count: int) -> None:
    """Have so many tasks accepted."""
    left = count

    async def one_after_the_other() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await caller.submit(bodies(TASK_S))

    await asyncio.gather(*(one_after_the_other() for _ in range(16)))


def drained(store: Path, count: int) -> float:
    """Wait until the queue is empty; return how many of the last tasks ended in a second."""
    while open_tasks(store):
        time.sleep(0.1)
    rows = query(store, "SELECT at FROM fact WHERE kind = 'completed' ORDER BY number")
    ends = [float(at) for (at,) in rows][-count:]
    # While all were accepted, and what is left at the end, is not the rate of a full queue.
    middle = ends[len(ends) // 4 : len(ends) * 9 // 10]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def open_tasks(store: Path) -> int:
    """Return how many tasks have not ended."""
    sql = "SELECT count(*) FROM task WHERE state IN ('scheduled', 'queued', 'running')"
    return int(query(store, sql)[0][0])


async def back_to_normal(
    caller: Caller,
    bodies: Callable[[float], dict[str, Any]],
    store: Path,
    before_s: Sequence[float],
    ended_at: float,
) -> tuple[float, list[float], float]:
    """Wait until lone tasks take at most twice as long as before, with nothing else in the queue.

    Returns:
        Seconds from the end of the load to that, what lone tasks take then, and seconds to the
        empty queue; infinity for what did not come.
    """
    give_up = ended_at + 2 * NORMAL_S
    while open_tasks(store):
        if time.time() > give_up:
            return math.inf, [], math.inf
        await asyncio.sleep(0.1)
    empty_s = time.time() - ended_at
    bound = 2 * statistics.median(before_s)
    while statistics.median(await lone(caller, bodies, 5)) > bound:
        if time.time() > give_up:
            return math.inf, [], empty_s
    normal_s = time.time() - ended_at
    return normal_s, await lone(caller, bodies, LONE), empty_s


def _normal_again(over_at: float, drained_at: float) -> dict[str, Any]:
    return {"name": "normal again", "from": over_at, "to": drained_at, "max_s": 2 * NORMAL_S}


# -- judging ---------------------------------------------------------------------------------------


def _judge_offers(out: Outcome, told: Told, rate: float) -> None:
    answers = Counter(told.answers)
    accepted, refused = answers["202"], answers["503"] + answers["429"]
    out.counts[LINE] = told.offered
    share = refused / max(1, told.offered)
    out.notes.append(
        f"drain rate {rate:.0f}/s, offered {told.offered / (told.ended_at - told.began_at):.0f}/s, "
        f"{told.offered} offers, {accepted} accepted, {refused} refused ({100 * share:.0f} %)"
    )
    others = {status: n for status, n in answers.items() if status not in ("202", "503", "429")}
    if others or told.not_made:
        out.violations.append(
            f"offers that were neither accepted nor refused: {others}; not made: {told.not_made}"
        )
    if share < REFUSED_SHARE_MIN:
        out.violations.append(f"only {100 * share:.0f} % were refused: this was no overload")
    if told.without_retry_after:
        out.violations.append(f"{told.without_retry_after} refusals without Retry-After")


def _judge_times(
    out: Outcome,
    told: Told,
    before_s: Sequence[float],
    after_s: Sequence[float],
    normal_s: float,
    empty_s: float,
) -> None:
    p99 = quantile(told.refused_s, 0.99)
    out.notes.append(
        f"refused in p50 {1000 * quantile(told.refused_s, 0.5):.1f} ms, p99 {1000 * p99:.1f} ms; "
        f"accepted in p99 {1000 * quantile(told.accepted_s, 0.99):.1f} ms; timers of the source "
        f"late by p99 {1000 * quantile(told.lag_s, 0.99):.1f} ms"
    )
    out.times_s = {
        "overload: refused": sorted(told.refused_s)[:: max(1, len(told.refused_s) // 1000)],
        "overload over: queue empty": [empty_s],
        "overload over: back to normal": [normal_s],
        "lone task before overload": list(before_s),
        "lone task after overload": list(after_s),
    }
    if p99 > REFUSED_P99_S:
        out.violations.append(
            f"p99 of {len(told.refused_s)} refusals is {1000 * p99:.1f} ms, promised are "
            f"{1000 * REFUSED_P99_S:g} ms"
        )
    if normal_s > NORMAL_S:
        out.violations.append(f"back to normal after {normal_s:.1f} s, promised are {NORMAL_S:g} s")
    out.times_s = {
        name: kept
        for name, values in out.times_s.items()
        if (kept := [one for one in values if math.isfinite(one)])
    }


def _judge_memory(out: Outcome, path: Path, told: Told) -> None:
    lasted = told.ended_at - told.began_at
    for name, rows in samples.by_name(samples.read(path)).items():
        during = [row for row in rows if told.began_at <= row["t"] <= told.ended_at]
        slope = samples.per_hour(during, "rss", warm_up_s=lasted / 4)
        if slope is None:
            out.violations.append(f"{name}: it was not there all the time, or not sampled")
            continue
        grown = slope[0] * lasted / 3600.0
        most = max(row["rss"] for row in during)
        out.notes.append(
            f"{name}: RSS at most {most / 2**20:.0f} MiB, {slope[0] / 2**20:+.1f} MiB an hour over "
            f"{slope[1]} samples; fds {_range(during, 'fds')}, threads {_range(during, 'threads')}"
        )
        cache = PAGE_CACHE_BYTES if name == "moderator" else 0
        if grown > max(FLAT_BYTES, 0.1 * most) + cache:
            out.violations.append(f"{name} grew by {grown / 2**20:.1f} MiB in {lasted:.0f} s")


def _range(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    found = [int(row[kind]) for row in rows]
    return f"{min(found)} to {max(found)}"


def quantile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank quantile; 0 for no values."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else 0.0


# -- without Ray -----------------------------------------------------------------------------------

_SMALL_QUEUE = 60


async def without_ray(case: Case, folder: Path) -> Outcome:
    """Overload C1, a moderator in a process, and a worker with real executors."""
    from tests.support import checked_run

    out = Outcome()
    policy = {**checked_run.POLICY, "max_concurrent_tasks": 2, "queue_tasks_max": _SMALL_QUEUE}
    store, socket, home = folder / "queue.db", folder / "m1", folder / "home"
    home.mkdir()
    begun_at = time.time()
    checked_run.install_tasks(folder / "site")
    process = checked_run.ModeratorProcess(store, socket, folder / "moderator.log", policy)
    await process.start()
    links = [checked_run.SocketLink(socket) for _ in range(2)]
    worker = checked_run.Worker("W1", home, links[0])
    agent = asyncio.create_task(worker.agent.run())
    bodies = _bodies(folder / "effects.jsonl", case.seed)
    try:
        async with checked_run.composite(home, store, links[1]) as http:
            caller = Caller(http, History(folder / "history.jsonl", "source", "owner"))
            rates = []
            for _ in range(2):  # A machine that stood still for a moment has a low rate.
                await burst(caller, bodies, 50)
                rates.append(await asyncio.to_thread(drained, store, 50))
            rate = max(rates)
            told = Told(began_at=time.time())
            answers: list[httpx.Response] = []

            async def offer() -> None:
                answers.append(await caller.submit(bodies(TASK_S)))

            loop = asyncio.get_running_loop()
            began, seconds = loop.time(), float(case.options["seconds"])
            async with asyncio.TaskGroup() as group:
                while (due := told.offered / (FACTOR * rate)) < seconds:
                    await asyncio.sleep(max(0.0, began + due - loop.time()))
                    group.create_task(offer())
                    told.offered += 1
            told.ended_at = time.time()
            for one in answers:
                status = str(one.status_code)
                told.answers[status] = told.answers.get(status, 0) + 1
                told.without_retry_after += status != "202" and "retry-after" not in one.headers
            await asyncio.to_thread(drained, store, 50)
            took = await lone(caller, bodies, 3)
            if not all(map(math.isfinite, took)):
                out.violations.append(f"lone tasks after the load took {took}")
            drained_at = time.time()
    finally:
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        await worker.end()
        for link in links:
            await link.close()
        process.kill()
    export(store, folder / "store.jsonl")
    write_schedule(
        folder,
        case.seed,
        started_at=begun_at,
        drained_at=drained_at,
        settings=policy,
        workers=["W1"],
        canaries=[checked_run.ADMIN_KEY],
        measured=[_normal_again(told.ended_at, drained_at)],
    )
    _judge_offers(out, told, rate)
    check(out, folder)
    return out


PART = Overload()

"""``make soak``: an hour of load with a fault every two minutes; nothing is lost, nothing grows.

Ended tasks are kept for three minutes only, so that pruning is part of it: what the store holds is
collected all the time, and at the end the checker reads all of it, as if nothing had been pruned.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import apsw

from tests.checker.inputs import read_run
from tests.faults import samples
from tests.faults.checking import check, write_schedule
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.stack import EFFECTS, SETTINGS, Stack, allowed, eventually, measure, stack
from tests.faults.still import stand_still
from tests.support.read_store import export, query

LINE = "minutes of soak"
MINUTES = float(os.environ.get("HCNA_SOAK_MINUTES", "60"))
PER_SECOND = 10.0
FAULT_EVERY_S = 120.0
RETENTION_S = 180.0
_SAMPLE_S = 5.0
_COLLECT_S = 20.0
#: What is left out of each life of a process, and of the run, before a slope is fitted.
WARM_UP_S = 120.0
#: Shorter runs print slopes and judge none: a few minutes say nothing about an hour.
JUDGED_MINUTES = 30.0
FAULTS = (
    "moderator",
    "slot",
    "agent",
    "raylet",
    "c1",
    "partition",
    "pause",
    "reboot",
)
#: Processes that are sampled, by a text in their command: on M1, and on each worker.
ON_M1 = {
    "moderator": "ray::ModeratorActor",
    "C1": "ray::ServeReplica",
    "M1 supervisor": "hcna_ray.supervisor",
    "GCS": "gcs_server",
}
ON_WORKERS = {
    "agent": "ray::NodeAgent",
    "slot": "ray::slot",
    "supervisor": "hcna_ray.supervisor",
    "raylet": "raylet/raylet",
}
MIB = float(1 << 20)
#: What may grow by how much in an hour, and what may be how large.
PER_HOUR_MAX = {"rss": 24 * MIB, "fds": 12.0, "threads": 6.0, "wal": 16 * MIB, "disk": 96 * MIB}
MOST = {"rss": 512 * MIB, "wal": 64 * MIB}


class Soak:
    """See this module."""

    name = "soak"
    title = "ten tasks a second for an hour, and a fault every two minutes"
    budget_s = 60 * MINUTES + 600
    needs_root = True
    only_when_named = True
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the hour, or as many minutes as ``HCNA_SOAK_MINUTES`` says."""
        if size is Size.SLICE:
            return []
        return [Case(name=f"{MINUTES:g}-minutes", seed=seed, options={"minutes": MINUTES})]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Bring up M1 and two workers for the case."""

        def run(case: Case, own: Path) -> Outcome:
            with stack(
                folder,
                seed=case.seed,
                workers=("w1", "w2"),
                per_second=PER_SECOND,
                settings={"limits": {"retention_s": RETENTION_S}},
                brief=True,
            ) as on:
                return go_through(on, case, own)

        yield run


def go_through(on: Stack, case: Case, folder: Path) -> Outcome:
    """Let it run, with faults; then judge."""
    minutes = float(case.options["minutes"])
    draw = random.Random(case.seed)
    store = on.rig["m1"].file("/root/.hcna/queue.db")
    began_at = time.time()
    troubles: list[str] = []
    measured: list[dict[str, Any]] = []
    collector = Collector(store)
    on.clients.go_on()
    looking = _Looking(on)
    with (
        samples.Sampler(
            folder / "samples.jsonl", lambda: _pids(on), lambda: _sizes(on), every_s=_SAMPLE_S
        ),
        collector,
        looking,
    ):
        left: list[str] = []
        end = time.monotonic() + 60 * minutes
        next_at = time.monotonic() + min(FAULT_EVERY_S, 15 * minutes)
        while time.monotonic() < end:
            if time.monotonic() < next_at:
                time.sleep(0.5)
                continue
            next_at += FAULT_EVERY_S
            if not left:
                left = list(FAULTS)
                draw.shuffle(left)
            troubles += strike(on, left.pop(), draw, measured)
        drained_at = on.settle()
    collector.collect()
    on.clients.look(300)
    collector.write(folder / "store.jsonl")
    shutil.copy(on.folder / "history.jsonl", folder / "history.jsonl")
    for name in on.workers:
        effects = on.rig[name].file(EFFECTS)
        if effects.exists():
            shutil.copy(effects, folder / f"effects-{name}.jsonl")
    for name, found in measure(on, read_run(folder), on.faults).items():
        on.timed.setdefault(name, []).extend(found)
    measured += [
        {"name": name, "from": 0.0, "to": took, "max_s": allowed(name)}
        for name, found in on.timed.items()
        for took in found
    ]
    out = Outcome(violations=troubles)
    out.violations += [f"a client broke: {one}" for one in on.clients.broken]
    write_schedule(
        folder,
        case.seed,
        started_at=began_at,
        drained_at=drained_at,
        settings=SETTINGS,
        workers=sorted(on.workers.values()),
        canaries=[on.computer.key],
        faults=on.faults,
        measured=measured,
        bounds={
            "moderator_accepting": allowed("moderator killed: accepting again"),
            "worker_requeued": allowed("worker killed: queued again"),
        },
    )
    kinds: dict[str, int] = {}
    for fault in on.faults:
        name = f"{fault['kind']} {fault['target']}"
        kinds[name] = kinds.get(name, 0) + 1
    out.notes.append(f"faults: {kinds}")
    out.notes.append(
        f"{len(on.clients.ids)} accepted, {collector.pruned(store)} of them pruned at the end"
    )
    out.notes += judge_growth(out, folder / "samples.jsonl", judged=minutes >= JUDGED_MINUTES)
    check(out, folder)
    if out.violations:
        on.keep_logs(folder)
    out.times_s, on.timed = on.timed, {}
    out.counts = {LINE: round(minutes)}
    return out


# -- faults ----------------------------------------------------------------------------------------


def strike(on: Stack, what: str, draw: random.Random, measured: list[dict[str, Any]]) -> list[str]:
    """Do one thing to the computer; return what did not come back.

    Args:
        on: The computer.
        what: One of `FAULTS`.
        draw: Of host and length.
        measured: Where it is written down how long it took until all was back.
    """
    host = draw.choice(sorted(on.workers))
    worker = target = on.workers[host]
    at = time.time()
    match what:
        case "moderator" | "c1":
            text = ON_M1["moderator" if what == "moderator" else "C1"]
            target = "moderator" if what == "moderator" else "m1/c1"
            on.kill_one("m1", text, None, lambda: on.note("kill", target, time.time()) and None)
        case "slot" | "agent" | "raylet":
            target = f"{worker}/slot" if what == "slot" else worker
            text = ON_WORKERS[what]
            on.kill_one(host, text, None, lambda: on.note("kill", target, time.time()) and None)
        case "partition":
            fault = on.note("partition", worker, at)
            on.rig.partition("m1", host)
            time.sleep(draw.uniform(20.0, 60.0))
            on.rig.heal("m1", host)
            fault["until"] = time.time()
        case "pause":
            stand_still(on, worker, "host", draw.uniform(5.0, 45.0))
        case "reboot":
            on.rig[host].unplug()
            on.note("reboot", worker, at)
            on.rig[host].boot()
        case _:
            raise LookupError(what)
    back, ended = allowed("worker rebooted: works again"), time.time()
    came = eventually(lambda: on.is_ready() and on.all_online(), back, 0.5)
    measured.append(
        {
            "name": f"{what} of {target}: all back",
            "from": ended,
            "to": time.time() if came else None,
            "max_s": back,
        }
    )
    if not came:
        return [f"{what} of {host}: not all is back after {back:g} s, online are {on.online()}"]
    return []


class _Looking:
    """Sees every task's end before it is pruned."""

    def __init__(self, on: Stack) -> None:
        self._on = on
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looking", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(300)

    def _run(self) -> None:
        while not self._stop.wait(10.0):
            with suppress(TimeoutError):
                self._on.clients.look(300)


# -- evidence --------------------------------------------------------------------------------------


class Collector:
    """Keeps what a store had before it was pruned: the union of many looks at it."""

    def __init__(self, store: Path) -> None:
        """Name the store."""
        self._store = store
        self._mutex = threading.Lock()
        self._kept: dict[tuple[Any, ...], str] = {}
        #: Of the last look: what has no name, and the names.
        self._rest: list[str] = []
        self._last: set[tuple[Any, ...]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)

    def _run(self) -> None:
        while not self._stop.wait(_COLLECT_S):
            self.collect()

    def collect(self) -> None:
        """Look at the store."""
        with self._mutex:
            target = Path(f"/tmp/soak-{os.getpid()}-{id(self)}.jsonl")
            try:
                export(self._store, target)
            except (apsw.Error, OSError):
                return  # Its host is down.
            try:
                rest, last = [], set()
                for line in target.read_text().splitlines():
                    record = json.loads(line)
                    name = identity(record)
                    if name is None:
                        rest.append(line)
                    else:
                        self._kept[name] = line
                        last.add(name)
                self._rest, self._last = rest, last
            finally:
                target.unlink()

    def write(self, path: Path) -> None:
        """Write one dump of all that there ever was."""
        with self._mutex, path.open("w") as out:
            for line in (*self._depths(), *self._kept.values()):
                out.write(line + "\n")

    def _depths(self) -> list[str]:
        """Return what has no name, with depths that count also the tasks that were pruned."""
        more: dict[tuple[str, str], int] = {}
        for name in self._kept.keys() - self._last:
            if name[0] == "task":
                task = json.loads(self._kept[name])
                where = task["queue"], task["state"]
                more[where] = more.get(where, 0) + 1
        lines = []
        for line in self._rest:
            record = json.loads(line)
            if record["record"] == "depth":
                record["tasks"] += more.pop((record["queue"], record["state"]), 0)
                line = json.dumps(record, separators=(",", ":"))
            lines.append(line)
        for (queue, state), tasks in more.items():
            missing = {"record": "depth", "queue": queue, "state": state, "tasks": tasks}
            lines.append(json.dumps(missing, separators=(",", ":")))
        return lines

    def pruned(self, store: Path) -> int:
        """Return how many tasks are no longer stored."""
        stored = {str(one) for (one,) in query(store, "SELECT id FROM task")}
        return sum(name[0] == "task" and name[1] not in stored for name in self._kept)


def identity(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what a record of a dump is known by, if it may be pruned."""
    match record["record"]:
        case "fact" | "audit":
            return (record["record"], record["number"])
        case "task":
            return ("task", record["id"])
        case "attempt":
            return ("attempt", record["task"], record["gen"], record["attempt"])
        case "key":
            return ("key", record["principal"], record["key"])
        case "late":
            return ("late", record["task"], record["gen"], record["attempt"], record["at"])
        case _:
            return None


def _pids(on: Stack) -> dict[str, int]:
    found: dict[str, int] = {}
    for host, wanted in (("m1", ON_M1), *((name, ON_WORKERS) for name in on.workers)):
        try:
            running = on.rig[host].processes()
        except Exception:
            continue  # Its host is being switched off or on.
        for what, text in wanted.items():
            pids = [one.pid for one in running if text in one.command]
            if pids:
                found[what if host == "m1" else f"{host} {what}"] = min(pids)
    return found


def _sizes(on: Stack) -> dict[str, dict[str, float]]:
    home = on.rig["m1"].file("/root/.hcna")
    found: dict[str, float] = {}
    with suppress(OSError):
        found["wal"] = (home / "queue.db-wal").stat().st_size
    with suppress(OSError):
        found["store"] = (home / "queue.db").stat().st_size
    total = 0
    for path in home.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    found["disk"] = total
    return {"M1's home": found}


def judge_growth(out: Outcome, path: Path, *, judged: bool) -> list[str]:
    """Fit slopes; return them in words, and name what is too steep or too large as broken."""
    told = []
    for name, rows in samples.by_name(samples.read(path)).items():
        words = []
        for kind in ("rss", "fds", "threads", "wal", "store", "disk"):
            values = [float(row[kind]) for row in rows if kind in row]
            if not values:
                continue
            unit = MIB if kind not in ("fds", "threads") else 1.0
            slope = samples.per_hour(rows, kind, warm_up_s=WARM_UP_S)
            rate = "" if slope is None else f" ({slope[0] / unit:+.1f}/h over {slope[1]})"
            words.append(f"{kind} {min(values) / unit:.0f}-{max(values) / unit:.0f}{rate}")
            if max(values) > MOST.get(kind, float("inf")):
                out.violations.append(f"{name}: {kind} was {max(values) / unit:.0f}")
            limit = PER_HOUR_MAX.get(kind)
            if judged and slope is not None and limit is not None and slope[0] > limit:
                out.violations.append(
                    f"{name}: {kind} grows by {slope[0] / unit:.1f} an hour, "
                    f"allowed are {limit / unit:g}"
                )
        told.append(f"{name}: {', '.join(words)}")
    return told


PART = Soak()

"""One rule, one scenario: short runs without Ray, each of which a certain mistake would break.

*Towns* (`tests.faults.town`) are minutes of life of the real moderator and store among simulated
workers, in virtual time, judged by the checker. The other scenarios put one piece of the product,
the real one, before the one situation in which a rule matters: a disk that refuses, a second
moderator, an attempt that waits while its cancel comes, a process that dies with its outbox.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import apsw

from hcna_ray.config import LimitSettings, RaySettings, Settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError, ModeratorUnavailable, StoreUnavailable
from hcna_ray.core.models import Token
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.host import HostSettings, SlotHost
from hcna_ray.runtime.journal import RunnerFiles, StopOrder, read_journal, read_stops, write_stops
from hcna_ray.runtime.messages import (
    Accepted,
    Exchange,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Offer,
    Report,
    ReportKind,
    SlotGone,
    SubmitBatch,
    Welcome,
)
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.nursery import ProcessNursery
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.writer import WriterThread
from hcna_ray.store.artifacts import ArtifactStore
from hcna_ray.store.postgres import LeadershipLost, PostgresTaskStore, StoreInUse
from hcna_ray.store.sqlite import SqliteTaskStore
from hcna_ray.supervisor.backup import backup, restore
from tests.faults.paper_disk import PaperDisk
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.town import Town
from tests.support.builders import T0, a_spec, a_task
from tests.support.paper_worker import Desk, PaperWorker
from tests.support.postgres import PostgresServer
from tests.support.workshop import NoArtifacts

REPOSITORY = Path(__file__).resolve().parents[3]
LINE, STEPS = "rules, one scenario each", "moderator steps, random walk"
#: How long something may take that should be there at once, on a machine that has much to do.
PATIENCE_S = 120.0

# -- towns -----------------------------------------------------------------------------------------

_DISK = {"kill moderator": 1, "kill in commit": 4, "full disk": 2, "failed sync": 1, "low disk": 1}
_WORKERS = {"kill slot": 2, "kill worker": 1, "worker loses power": 1, "stop worker": 1, "pause": 1}
_NETWORK = {"partition": 4, "flap": 3, "pause": 3, "cut, then pause": 2, "long pause": 1}
TOWNS: dict[str, dict[str, Any]] = {
    "disk": {"faults": {**_DISK, **_WORKERS}, "power": True, "every_s": 8},
    "network": {"faults": {**_NETWORK, **_WORKERS, "kill moderator": 1}, "every_s": 6},
    # Not an hour forward: run time is watched on the wall clock, so it ends what runs (F21).
    "clock": {
        "faults": {"step clock": 4, "partition": 1, "kill moderator": 1},
        "clock_steps": (-3600.0, -300.0, -40.0, 40.0, 300.0, 3600.0),
        "every_s": 15,
    },
    "prune": {
        "faults": {**_WORKERS, "partition": 1, "kill moderator": 1, "pause queue": 2},
        "policy": {"retention_s": 40.0, "idempotency_s": 600.0},
        "every_s": 12,
    },
    "all": {"faults": {**_DISK, **_WORKERS, **_NETWORK, "pause queue": 1}, "every_s": 6},
}
TOWN_S = {Size.SLICE: 100.0, Size.FULL: 240.0}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the moderator logs about the trouble it is put to out of the way."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def live_in_town(kind: str, folder: Path, seed: int, seconds: float) -> Outcome:
    """Let a town live for some minutes of its time, and judge it."""
    with _quietly():
        town = Town(folder, seed, TOWNS[kind])
        try:
            town.live(seconds)
            town.drain()
        finally:
            town.close()
        found = town.judge()
    told = ", ".join(f"{count} {name}" for name, count in sorted(town.counts.items()))
    return Outcome(
        violations=found[:20],
        counts={STEPS: town.steps, LINE: 1},
        notes=[f"{len(set(town.ids))} tasks; {told}"],
    )


# -- the writer and its disk -----------------------------------------------------------------------


class _Desk:
    """The real writer thread on a paper disk; keeps every answer, and what was safe by then."""

    def __init__(self, folder: Path) -> None:
        home = folder / "disk"
        home.mkdir()
        self.disk = PaperDisk(home)
        self.folder = folder
        self.accepted: dict[str, bool] = {}
        self.refused: dict[str, object] = {}
        self.exits: list[int] = []
        self.looks = 0
        self._lock = threading.Condition()
        self._clock = SystemClock()
        self.writer = WriterThread(
            self._build,
            self._clock,
            publish=self._publish,
            items_max=1000,
            exit_process=self._exit,
        )
        self.writer.start()

    def _build(self) -> Moderator:
        self.store = SqliteTaskStore(self.disk.folder / "queue.db", vfs=self.disk.name)
        return Moderator(
            self.store,
            Policy(queue_tasks_max=10_000, disk_free_bytes_min=0),
            clock=self._clock,
            jitter=lambda: 0.0,
            free_bytes=lambda: 1 << 40,
        )

    def _exit(self, code: int) -> None:
        with self._lock:
            self.exits.append(code)
            self._lock.notify_all()

    def _publish(self, outbound: Outbound) -> None:
        for pending, answer in outbound.answers:
            pending.resolve(answer)

    def submit(self, task_id: str) -> None:
        """Hand a task in; its answer is noted on the writer's thread."""

        def resolve(answer: object) -> None:
            with self._lock:
                if isinstance(answer, list) and isinstance(answer[0], Accepted):
                    self.accepted[task_id] = task_id in self._safe()
                else:
                    self.refused[task_id] = answer
                self._lock.notify_all()

        spec = a_spec(task_id, accepted_at=self._clock.now())
        self.writer.submit(SubmitBatch(specs=(spec,)), resolve)

    def _safe(self) -> set[str]:
        """Return the tasks that a power cut at this moment would leave."""
        self.looks += 1
        place = self.folder / f"after-{self.looks}"
        place.mkdir()
        for name, image in self.disk.images.items():
            (place / name).write_bytes(bytes(image.synced))
        db = apsw.Connection(str(place / "queue.db"))
        try:
            return {str(row[0]) for row in db.execute("SELECT id FROM task")}
        finally:
            db.close()

    def answer(self, *task_ids: str) -> bool:
        """Submit, and wait for the answers or the end of the process."""
        for one in task_ids:
            self.submit(one)

        def done() -> bool:
            return bool(self.exits) or all(
                one in self.accepted or one in self.refused for one in task_ids
            )

        with self._lock:
            return self._lock.wait_for(done, PATIENCE_S)

    def close(self) -> None:
        self.disk.full, self.disk.failing_syncs = False, 0
        self.writer.close()
        self.store.close()
        self.disk.unregister()


def answers_follow_commits(folder: Path, seed: int) -> Outcome:
    """Nothing is answered before it would outlive a power cut; what is refused is not stored."""
    draw, broken = random.Random(seed), []
    with _quietly():
        desk = _Desk(folder)
        try:
            number = 0
            for _ in range(40):
                desk.disk.full = draw.random() < 0.3
                names = [f"t{number + i}" for i in range(draw.choice((1, 1, 2, 5)))]
                number += len(names)
                if not desk.answer(*names):
                    broken.append(f"no answer to {names}")
            desk.disk.full = False
            broken += [
                f"{name} was accepted before it was safe from a power cut"
                for name, safe in desk.accepted.items()
                if not safe
            ]
            stored = desk._safe()
            broken += [f"{one} was refused, and is stored" for one in desk.refused if one in stored]
            broken += [f"{one} was accepted, and is gone" for one in desk.accepted.keys() - stored]
            if not desk.refused or not desk.accepted:
                broken.append("the disk was never full, or always")
        finally:
            desk.close()
    return Outcome(violations=broken, counts={LINE: 1})


def failed_fsync_ends_the_process(folder: Path, seed: int) -> Outcome:
    """After a failed fsync nobody is told that anything was stored, and the process ends."""
    broken = []
    with _quietly():
        desk = _Desk(folder)
        try:
            desk.answer("before")
            desk.disk.failing_syncs = 1
            desk.answer("during")
            if not desk.exits:
                desk.answer("after")
                broken.append(
                    "an fsync failed, and the process went on; then it "
                    f"answered {'accepted' if 'after' in desk.accepted else 'refused'}"
                )
            if "during" in desk.accepted:
                broken.append("a task was accepted whose commit could not be synced")
            if not desk.accepted.get("before"):
                broken.append("a task was accepted before it was safe from a power cut")
        finally:
            desk.close()
    del seed
    return Outcome(violations=broken, counts={LINE: 1})


def steady_clock(folder: Path, seed: int) -> Outcome:
    """What durations are measured with does not move when the wall clock is put."""
    del folder
    clock, broken = SystemClock(), []
    really = time.time
    for step in (3600.0, -3600.0, 300.0 + seed % 60):
        before = clock.elapsed()
        with mock.patch("time.time", lambda step=step: really() + step):
            inside = clock.elapsed()
            moved = clock.now() - really()
        after = clock.elapsed()
        if not before <= inside <= after or after - before > PATIENCE_S:
            broken.append(f"a step of {step:g} s moved the steady clock by {inside - before:g} s")
        if abs(moved - step) > PATIENCE_S:
            broken.append(f"the wall clock was put by {step:g} s and moved by {moved:g} s")
    return Outcome(violations=broken, counts={LINE: 1})


def leases_end_in_time(folder: Path, seed: int) -> Outcome:
    """A lease ends 30 s and 5 s of grace after the last renewal that was answered: not before.

    However the wall clock is put meanwhile, and whether the worker is silent, or heard and not
    answered. A new moderator gives a whole lease time again.
    """
    del folder
    draw, broken = random.Random(seed), []
    with _quietly():
        for how in ("silent", "unanswered", "restart"):
            desk = Desk()
            worker, other = PaperWorker(desk), PaperWorker(desk, "W2")
            desk.submit_ids("t1")
            (offer,) = worker.granted()
            worker.report(worker.started(offer))
            for _ in range(draw.randrange(1, 4)):
                desk.tick(5.0)
                worker.heartbeat()
            since = desk.clock.elapsed()
            for _ in range(100):
                desk.tick(0.5)
                other.heartbeat()
                if draw.random() < 0.3:
                    desk.clock.step(draw.choice((-600.0, -40.0, 40.0, 100.0)))
                waited = desk.clock.elapsed() - since
                if how == "unanswered" and waited % 5.0 == 0.0:
                    beat = Heartbeat(
                        worker="W1", incarnation="a", telemetry={}, unanswered_s=waited
                    )
                    desk.ask(beat)
                if how == "restart" and waited == 10.0:
                    desk.restart()
                    since, how = desk.clock.elapsed(), "silent to a new moderator"
                if desk.task("t1").lease is None:
                    break
            waited = desk.clock.elapsed() - since
            if not 35.0 <= waited <= 36.0:
                broken.append(f"the lease of a worker that was {how} ended after {waited:g} s")
    return Outcome(violations=broken, counts={LINE: 1})


# -- two moderators --------------------------------------------------------------------------------


@contextmanager
def _database() -> Iterator[tuple[PostgresServer, str]]:
    server = PostgresServer()
    try:
        server.start()
        yield server, server.url(server.create_database())
    finally:
        server.remove()


def _put(store: PostgresTaskStore, name: str, seq: int) -> None:
    with store.transaction():
        store.insert([a_task(name, seq=seq)])


def taken_over_store_is_lost(folder: Path, seed: int) -> Outcome:
    """Once another moderator has led, the first one writes nothing any more, whoever leads then."""
    del folder, seed
    broken = []
    with _quietly(), _database() as (server, url):
        first = PostgresTaskStore(url, open_wait_s=2.0)
        _put(first, "one", 1)
        # Its machine stands still; the server gives its session up.
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname LIKE 'test%'"
        )
        second = PostgresTaskStore(url, open_wait_s=10.0)
        _put(second, "two", 2)
        second.close()
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                _put(first, "three", 3)
            except LeadershipLost:
                break
            except (StoreUnavailable, OSError, ValueError) as error:
                if time.monotonic() > end:
                    broken.append(f"the first moderator never learns that it was replaced: {error}")
                    break
                time.sleep(0.1)
                continue
            broken.append("a moderator that another one had replaced wrote to the store")
            break
        first.close()
    return Outcome(violations=broken, counts={LINE: 1})


def second_moderator_waits(folder: Path, seed: int) -> Outcome:
    """While one moderator lives, a second one does not become the writer."""
    del folder, seed
    broken = []
    with _quietly(), _database() as (_, url):
        first = PostgresTaskStore(url, open_wait_s=2.0)
        _put(first, "one", 1)
        try:
            second = PostgresTaskStore(url, open_wait_s=1.0)
        except StoreInUse:
            pass
        else:
            broken.append("a second moderator became the writer beside a living one")
            second.close()
        try:
            _put(first, "two", 2)
        except (OSError, HcnaError) as error:
            broken.append(f"the living moderator lost its store to a second one: {error}")
        first.close()
    return Outcome(violations=broken, counts={LINE: 1})


def restored_tokens_are_new(folder: Path, seed: int) -> Outcome:
    """After a restore no token is given twice, and none that was out opens anything."""
    del seed
    broken: list[str] = []

    def settings_of(name: str) -> Settings:
        home = folder / name
        home.mkdir()
        return Settings(
            home=home,
            limits=LimitSettings(disk_free_bytes_min=0),
            ray=RaySettings(temp_dir=home / "ray"),
        )

    with _quietly():
        old, new = settings_of("old"), settings_of("new")
        assert old.store_path is not None
        assert new.store_path is not None
        desk = Desk(SqliteTaskStore(old.store_path))
        worker = PaperWorker(desk)
        desk.submit_ids("t1", "t2")
        (first,) = worker.granted(0)
        worker.report(worker.started(first))
        archive = Path(backup(old, to=folder / "backup.tar.zst", now=desk.clock.now()).path)
        # After the backup: the attempt is lost, tried again, and the other one goes out.
        worker.report(
            worker.ended(first, ReportKind.RETURNED), worker.ended(first, ReportKind.LOST)
        )
        out = [*worker.granted(1), *worker.granted(2)]
        tokens = {(one.task_id, Token(*one.token)) for one in (first, *out)}
        desk.clock.advance(600)
        restore(new, archive, now=desk.clock.now())
        again = Desk(SqliteTaskStore(new.store_path))
        again.clock.advance(600)
        heir = PaperWorker(again)
        fresh = [*heir.granted(0), *heir.granted(1)]
        heir.report(*(heir.started(one) for one in fresh))
        broken += [
            f"{one.task_id}: token {tuple(one.token)} was given again after a restore"
            for one in fresh
            if (one.task_id, Token(*one.token)) in tokens
        ]
        broken += [
            f"{one.task_id}: a report under {tuple(one.token)}, given before a restore, counted"
            for one in (first, *out)
            if heir.report(heir.ended(one)).applied
        ]
        if len(fresh) != 2:
            broken.append(f"{len(fresh)} of 2 tasks went out again after a restore")
        desk.store.close()
        again.store.close()
    return Outcome(violations=broken, counts={LINE: 1})


# -- artifacts -------------------------------------------------------------------------------------


def artifact_is_durable_before_its_name(folder: Path, seed: int) -> Outcome:
    """An artifact's bytes are synced before it has its name, and the name before it is told."""
    draw, broken = random.Random(seed), []
    synced: set[int] = set()
    named: list[Path] = []
    open_names: list[Path] = []
    sync, rename = os.fsync, os.rename

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        found = os.fstat(descriptor)
        synced.add(found.st_ino)
        open_names[:] = [one for one in open_names if one.parent.stat().st_ino != found.st_ino]

    def watched_rename(source: Any, target: Any, *rest: Any, **more: Any) -> None:
        if os.stat(source).st_ino not in synced:
            broken.append(f"{Path(target).name[:12]} got its name before its bytes were synced")
        rename(source, target, *rest, **more)
        named.append(Path(target))
        open_names.append(Path(target))

    store = ArtifactStore(
        folder / "artifacts",
        artifact_bytes_max=1 << 20,
        part_bytes_max=1 << 16,
        uploads_max=4,
        upload_idle_s=60.0,
        disk_free_bytes_min=0,
        now=time.time,
        disk_free=lambda _: 1 << 40,
    )
    with mock.patch("os.fsync", watched_sync), mock.patch("os.rename", watched_rename):
        for _ in range(3):
            store.put(draw.randbytes(5000))
            broken += [f"{one.name[:12]} was told before its name was synced" for one in open_names]
            source = folder / "source"
            source.write_bytes(draw.randbytes(200_000))
            store.put_file(source)
            broken += [f"{one.name[:12]} was told before its name was synced" for one in open_names]
    if len(named) != 6:
        broken.append(f"{len(named)} of 6 artifacts were given their name by a rename")
    return Outcome(violations=broken, counts={LINE: 1})


# -- a slot and its executors ----------------------------------------------------------------------


@contextmanager
def _installed_tasks(folder: Path) -> Iterator[None]:
    """Have the nurseries that are started find `tests.support.checked_tasks`."""
    info = folder / "hcna_checked-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hcna-checked\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[hcna_ray.tasks]\nchecked = tests.support.checked_tasks\n"
    )
    with mock.patch.dict(os.environ, {"PYTHONPATH": f"{folder}:{REPOSITORY}"}):
        yield


class _Script:
    """A moderator that says what is written down: `hcna_ray.runtime.host.SlotLink`."""

    def __init__(self, *grants: Sequence[Offer]) -> None:
        self.grants = deque(grants)
        #: What was delivered with exchanges and with reports, in order.
        self.delivered: list[Report] = []
        self.tried: list[Report] = []
        #: After its grants: refuse every call (away), or take everything and park.
        self.away = False
        self.slow_s = 0.0

    async def exchange(self, exchange: Exchange) -> Grant:
        self.tried += exchange.reports
        if self.grants:
            return Grant(seq=exchange.seq, offers=tuple(self.grants.popleft()))
        if self.away:
            await asyncio.sleep(0.02)
            raise ModeratorUnavailable("away")
        self.delivered += exchange.reports
        await asyncio.Event().wait()
        raise AssertionError("parked for ever")

    async def report(self, reports: tuple[Report, ...]) -> bool:
        self.tried += reports
        await asyncio.sleep(self.slow_s)
        final = any(one.kind == ReportKind.COMPLETED for one in reports)
        if self.away and final:
            return False
        self.delivered += reports
        return True


class _Slot:
    """A real host with real executors below a script."""

    def __init__(self, folder: Path, script: _Script, *, long_s: float) -> None:
        self.folder, self.script = folder, script
        self.outbox = folder / "outbox"
        self.outbox.mkdir()
        self.effects = folder / "effects.jsonl"
        facts = {
            "worker": "W1",
            "node_id": "W1",
            "disk_path": str(folder),
            "scratch_root": str(folder),
            "long_s": long_s,
            "report_s": 0.005,
            "result_bytes_max": 1 << 18,
            "outbox": str(self.outbox),
            "log": str(folder / "worker.log"),
        }
        self.files = RunnerFiles(self.outbox, "W1-1.slot.0")
        self._nursery = ProcessNursery(facts)
        self._host = SlotHost(
            HostSettings(
                worker="W1",
                incarnation="W1-1",
                slot=0,
                name=self.files.name,
                outbox=self.outbox,
                long_s=long_s,
            ),
            script,
            self._nursery,
            NoArtifacts(),
            SystemClock(),
        )
        self._serving: asyncio.Task[None] | None = None

    def offer(self, name: str, seconds: float, expires_in_s: float | None = None) -> Offer:
        payload = {"effects": str(self.effects), "nonce": name, "seconds": seconds}
        return Offer(
            name,
            "check.work",
            Token(1, 1),
            json.dumps(payload).encode(),
            300.0,
            expires_in_s,
            None,
            None,
        )

    def wrote(self, what: str) -> set[str]:
        """Return the tasks that wrote a first (``start``) or a last (``end``) line."""
        if not self.effects.exists():
            return set()
        lines = [json.loads(line) for line in self.effects.read_text().splitlines()]
        return {line["task"] for line in lines if line["what"] == what}

    async def until(self, what: Callable[[], bool]) -> bool:
        end = time.monotonic() + PATIENCE_S
        while not what():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.01)
        return True

    def begin(self) -> None:
        self._serving = asyncio.create_task(self._host.serve())

    async def die(self) -> None:
        """End as by SIGKILL: executors die with their host."""
        assert self._serving is not None
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._nursery.close()
        await self._host.end()


def _ended(reports: Sequence[Report], name: str) -> str | None:
    kinds = [one.kind for one in reports if one.task_id == name and one.kind != ReportKind.STARTED]
    return kinds[-1] if kinds else None


async def _waiting_is_stopped(folder: Path) -> list[str]:
    script = _Script()
    slot = _Slot(folder, script, long_s=60.0)
    script.grants.append(
        (
            slot.offer("first", 2.0),
            slot.offer("cancelled", 0.0),
            slot.offer("expired", 0.0, expires_in_s=0.2),
            slot.offer("last", 0.0),
        )
    )
    slot.begin()
    broken: list[str] = []
    try:
        if not await slot.until(lambda: "first" in slot.wrote("start")):
            raise TimeoutError("the first attempt did not start")
        order = StopOrder(task_id="cancelled", generation=1, attempt=1, reason="cancel")
        write_stops(slot.files, [order])

        def known() -> bool:
            """Whether the order lies on the disk of whoever is about to start the attempt."""
            return any(
                one.task_id == "cancelled"
                for path in slot.outbox.glob(f"{slot.files.name}.*.stop")
                for one in read_stops(path)
            )

        if not await slot.until(known):
            return ["the host did not pass a stop order on to its executor"]
        in_time = "first" not in slot.wrote("end")
        delivered = script.delivered
        if not await slot.until(
            lambda: all(_ended(delivered, one) for one in ("cancelled", "expired"))
        ):
            broken.append("attempts that must not start are not given back")
        if in_time and "cancelled" in slot.wrote("start"):
            broken.append("an attempt started after its cancel had come to its executor")
        if "expired" in slot.wrote("start"):
            broken.append("an attempt started after its task had expired")
        if _ended(delivered, "first") != ReportKind.COMPLETED:
            broken.append("an order for another attempt stopped the first one")
    finally:
        await slot.die()
    return broken


async def _fence_stops_all(folder: Path) -> list[str]:
    script = _Script()
    slot = _Slot(folder, script, long_s=60.0)
    script.grants.append((slot.offer("first", 50.0), slot.offer("second", 0.0)))
    slot.begin()
    broken: list[str] = []
    try:
        if not await slot.until(lambda: "first" in slot.wrote("start")):
            raise TimeoutError("the first attempt did not start")
        order = StopOrder(task_id="", generation=0, attempt=0, reason="fenced")
        write_stops(slot.files, [order])
        if not await slot.until(lambda: _ended(script.delivered, "first") is not None):
            broken.append("an attempt runs on although its worker was cut off")
        elif _ended(script.delivered, "first") not in (ReportKind.LOST, ReportKind.FAILED):
            broken.append("an attempt that its worker stopped is not told as lost")
        if "second" in slot.wrote("start"):
            broken.append("an attempt started on a worker that was cut off")
    finally:
        await slot.die()
    return broken


async def _outbox_outlives_its_process(folder: Path) -> list[str]:
    script = _Script()
    script.away, script.slow_s = True, 0.4
    slot = _Slot(folder, script, long_s=0.05)
    script.grants.append((slot.offer("done", 0.2),))
    slot.begin()
    try:
        if not await slot.until(lambda: "done" in slot.wrote("end")):
            raise TimeoutError("the attempt did not end")
        if not await slot.until(lambda: _ended(script.tried, "done") == ReportKind.COMPLETED):
            return ["the outcome was not even tried to be delivered"]
        await asyncio.sleep(0.2)
    finally:
        await slot.die()
    names = {path.stem for path in slot.outbox.glob("*.journal")}
    left = [one for name in names for one in read_journal(RunnerFiles(slot.outbox, name))]
    if _ended(left, "done") != ReportKind.COMPLETED:
        return [
            "an attempt had ended, nobody had confirmed it, and its outcome is not in the outbox: "
            f"{[one.kind for one in left]}"
        ]
    return []


def _with_executors(scenario: Callable[[Path], Awaitable[list[str]]]) -> Scenario:
    def run(folder: Path, seed: int) -> Outcome:
        del seed
        with _quietly(), _installed_tasks(folder / "site"):
            broken = asyncio.run(scenario(folder))  # type: ignore[arg-type]
        return Outcome(violations=broken, counts={LINE: 1})

    return run


# -- an agent --------------------------------------------------------------------------------------


class _HandClock:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return T0 + self.at

    def elapsed(self) -> float:
        return self.at


class _SlowModerator:
    """A `ModeratorLink` that answers one heartbeat, slowly, and nothing after it."""

    def __init__(self, clock: _HandClock, took_s: float) -> None:
        self._clock, self._took_s = clock, took_s
        self.beats = 0
        self.answered = asyncio.Event()

    async def hello(self, hello: Hello) -> Welcome:
        del hello
        return Welcome(moderator_node_id="M1", generation=1, lease_ttl_s=30.0, heartbeat_s=5.0)

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        del beat
        self.beats += 1
        if self.beats > 1:
            await asyncio.Event().wait()
        self._clock.at += self._took_s
        self.answered.set()
        return HeartbeatReply(known=True)

    async def exchange(self, exchange: Exchange) -> Grant:
        del exchange
        await asyncio.Event().wait()
        raise AssertionError("parked for ever")

    async def slot_gone(self, gone: SlotGone) -> None:
        del gone

    async def goodbye(self, bye: Goodbye) -> None:
        del bye


class _Idle:
    """Processes that are there and do nothing."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        del slot
        self.names.append(name)
        return asyncio.get_running_loop().create_future()

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        raise AssertionError((offer, name))


async def _self_stop_counts_from_the_question(folder: Path) -> list[str]:
    clock = _HandClock()
    link, processes = _SlowModerator(clock, 15.0), _Idle()
    agent = WorkerAgent(
        AgentSettings(
            worker="W1",
            node_id="W1",
            incarnation="W1-1",
            outbox=folder / "outbox",
            base=1,
            heartbeat_s=5.0,
        ),
        link,
        processes,
        clock,
        describe=lambda reports: Hello(
            worker="W1",
            node_id="W1",
            incarnation="W1-1",
            address="",
            cpu=1.0,
            mem_gb=1.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=("check.work",),
            reports=reports,
        ),
        telemetry=dict,
        kill=lambda pid, number: None,
        new_id=lambda: "m",
    )
    running = asyncio.create_task(agent.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await link.answered.wait()
            while not processes.names:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        clock.at += 6.0  # 21 s since it asked, 6 s since it was answered.
        stop = RunnerFiles(folder / "outbox", processes.names[0]).stop
        end = time.monotonic() + PATIENCE_S / 2
        while time.monotonic() < end:
            if any(one.reason == "fenced" for one in read_stops(stop)):
                return []
            await asyncio.sleep(0.05)
        return [
            "a worker lets its attempts run 21 s after it asked for the renewal that was the last "
            "to be answered: it counts from the answer"
        ]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def self_stop_counts_from_the_question(folder: Path, seed: int) -> Outcome:
    """A worker's time runs from when it asked for the renewal, as the moderator's does."""
    del seed
    with _quietly():
        broken = asyncio.run(_self_stop_counts_from_the_question(folder))
    return Outcome(violations=broken, counts={LINE: 1})


def ray_repeats_nothing(folder: Path, seed: int) -> Outcome:
    """Whatever is handed to Ray is handed over with the order not to repeat it."""
    del seed
    from hcna_ray.runtime import actors  # Brings Ray, which takes seconds.

    asked: list[dict[str, Any]] = []

    class Task:
        def options(self, **options: Any) -> Task:
            asked.append(options)
            return self

        def remote(self, *args: Any) -> None:
            del args

    processes = actors._RayProcesses.__new__(actors._RayProcesses)
    processes._worker, processes._home, processes._incarnation = "W1", str(folder), "W1-1"
    processes._here, processes._heavy = None, {}
    offer = Offer("t1", "echo", Token(1, 1), b"{}", 1.0, None, None, None, (("cpu", 1.0),))

    def remote(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return Task() if args else lambda function: Task()

    with mock.patch.object(actors.ray, "remote", remote):
        processes.start_slot(0, "slot")
        heavy: Any = processes.start_heavy(offer, "heavy")
        heavy.close()  # A coroutine that nobody awaits.
        actors._create(object, "actor", "M1")
    tasks = [one for one in asked if "max_retries" in one]
    broken = [
        f"Ray is asked to repeat {one.get('name')}: {one}"
        for one in asked
        if one.get("max_retries", 0)
        or one.get("retry_exceptions")
        or one.get("max_task_retries", 0)
    ]
    if len(tasks) != 2 or not any(one.get("max_task_retries") == 0 for one in asked):
        broken.append(f"it is left to Ray's own defaults whether something is repeated: {asked}")
    return Outcome(violations=broken, counts={LINE: 1})


# -- the part --------------------------------------------------------------------------------------

Scenario = Callable[[Path, int], Outcome]

SCENARIOS: dict[str, Scenario] = {
    "answers-follow-commits": answers_follow_commits,
    "failed-fsync-ends-the-process": failed_fsync_ends_the_process,
    "steady-clock": steady_clock,
    "leases-end-in-time": leases_end_in_time,
    "restored-tokens-are-new": restored_tokens_are_new,
    "artifact-is-durable-before-its-name": artifact_is_durable_before_its_name,
    "ray-repeats-nothing": ray_repeats_nothing,
    "waiting-attempt-is-stopped": _with_executors(_waiting_is_stopped),
    "fence-stops-all": _with_executors(_fence_stops_all),
    "outbox-outlives-its-process": _with_executors(_outbox_outlives_its_process),
    "self-stop-counts-from-the-question": self_stop_counts_from_the_question,
    "second-moderator-waits": second_moderator_waits,
    "taken-over-store-is-lost": taken_over_store_is_lost,
}
#: Lives of each kind of town.
TOWNS_OF = {Size.SLICE: 2, Size.FULL: 40}
TIMES_OF = {Size.SLICE: 1, Size.FULL: 3}


class Rules:
    """See this module."""

    name = "rules"
    title = "one scenario for each rule, without Ray, most of them in virtual time"
    budget_s = 1500.0
    needs_root = False
    only_when_named = False
    side_by_side = True

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return scenarios, then towns of every kind in turn."""
        found = [
            Case(name=f"{name}-{number}", seed=seed + number, options={"scenario": name})
            for number in range(TIMES_OF[size])
            for name in SCENARIOS
        ]
        found += [
            Case(
                name=f"town-{kind}-{number}",
                seed=seed + number,
                options={"town": kind, "seconds": TOWN_S[size]},
            )
            for number in range(TOWNS_OF[size])
            for kind in TOWNS
        ]
        return found

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Share nothing."""
        del folder

        def run(case: Case, place: Path) -> Outcome:
            if "town" in case.options:
                seconds = float(case.options["seconds"])
                return live_in_town(str(case.options["town"]), place, case.seed, seconds)
            return SCENARIOS[str(case.options["scenario"])](place, case.seed)

        yield run


PART = Rules()

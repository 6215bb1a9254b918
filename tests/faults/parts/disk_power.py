"""Power is lost: disks are rebuilt from recordings, and everything told before must be there."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcna_ray.store.backup import snapshot
from hcna_ray.store.sqlite import WAL_BYTES_MAX
from tests.faults.disk_model import PAGE
from tests.faults.disk_promises import Found, Promise, promises, recover
from tests.faults.disk_recording import Player, Recorded, Recorder, last_tick
from tests.faults.disk_traffic import PaperWorker, Submitter
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support.moderator_process import SocketLink
from tests.support.sources import ROOT

FULL_LINE = "power-loss images, FULL"
NORMAL_LINE = "power-loss images, NORMAL"

POLICY: dict[str, Any] = {
    "heartbeat_s": 0.5,
    "max_concurrent_tasks": 8,
    "exchange_wait_s": 0.2,
    "disk_free_bytes_min": 0,
}
#: A log this small is carried into the database every few dozen commits.
SMALL_WAL_BYTES = 768 * 1024
START_S = 30.0
#: Violations that one case tells of.
TOLD_MAX = 5


# -- recording -------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is recorded: several lives of one moderator."""

    seed: int
    commits: int
    synchronous: str | None = None
    #: The fsync of one life fails: its number in the process.
    failing_sync: int | None = None
    wal_bytes: int = SMALL_WAL_BYTES


class Recording:
    """Everything that one moderator did in its lives, and what it had told whom."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Make the recording; takes a few seconds."""
        self.folder, self.plan = folder, plan
        self.data = folder / "data"
        self.data.mkdir()
        self.recorder = Recorder(folder)
        self.lives = 0
        asyncio.run(self._make())
        self.calls = self.recorder.calls()
        self.promises = promises(self.calls)
        self.ticks = last_tick(self.calls) + 1

    async def _make(self) -> None:
        draw = random.Random(self.plan.seed)
        lives = 3
        for life in range(lives):
            fails = self.plan.failing_sync if life == 1 else None
            process = self._start(fails)
            link = SocketLink(self._socket)
            await self._listening(process)
            try:
                await self._load(draw, link, process, life, self.plan.commits // lives)
            finally:
                await link.close()
                with suppress(ProcessLookupError):
                    await asyncio.to_thread(process.kill)
                self.recorder.settle()
            self.lives += 1

    def _start(self, failing_sync: int | None) -> Recorded:
        self._socket = self.folder / f"m{self.lives}"
        options = {"wal_bytes_max": self.plan.wal_bytes, "synchronous": self.plan.synchronous}
        command = [sys.executable, "-m", "tests.faults.recorded_moderator"]
        command += [str(self.data / "queue.db"), str(self._socket)]
        command += [json.dumps(POLICY), json.dumps(options)]
        inject = [] if failing_sync is None else [f"fdatasync:error=EIO:when={failing_sync}"]
        return self.recorder.start(
            command, cwd=ROOT, log=self.folder / "moderator.log", inject=inject
        )

    async def _listening(self, process: Recorded) -> None:
        async with asyncio.timeout(START_S):
            while not self._socket.exists():
                if not process.running:
                    raise RuntimeError((self.folder / "moderator.log").read_text())
                await asyncio.sleep(0.01)

    async def _load(
        self, draw: random.Random, link: SocketLink, process: Recorded, life: int, commits: int
    ) -> None:
        worker = PaperWorker("W1", link, random.Random(draw.random()))
        clients = [Submitter(10 * life + n, link, random.Random(draw.random())) for n in range(3)]
        working = asyncio.create_task(worker.run())

        def goes_on() -> bool:
            return process.running and sum(one.asked for one in clients) < commits

        try:
            backing_up = asyncio.to_thread(self._back_up, goes_on) if life == 0 else None
            running = [asyncio.create_task(one.run(goes_on)) for one in clients]
            if backing_up is not None:
                running.append(asyncio.create_task(backing_up))
            await asyncio.gather(*running)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    def _back_up(self, goes_on: Any) -> None:
        """Copy the store again and again, so that power is lost beside a backup too."""
        wait = threading.Event()
        while goes_on():
            copy = self.folder / "copy.db"
            snapshot(self.data / "queue.db", copy)
            copy.unlink()
            wait.wait(0.02)

    def differences(self) -> list[str]:
        """Return files that the model has otherwise than the kernel: there must be none."""
        player = Player(self.data, self.calls)
        player.play_to(self.ticks)
        out = self.folder / "model"
        player.disk.cached(out)
        names = {path.name for path in [*out.iterdir(), *self.data.iterdir()]}
        return sorted(
            name
            for name in names
            if not name.endswith("-shm") and _bytes(out / name) != _bytes(self.data / name)
        )


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


# -- judging ---------------------------------------------------------------------------------------


class Judge:
    """Knows every state that was committed, and what was promised when."""

    def __init__(self, recording: Recording, scratch: Path) -> None:
        """Recover the store after each commit, as if only the process had died."""
        self._recording, self._scratch = recording, scratch
        self._promises = recording.promises
        self._ticks = [one.tick for one in self._promises]
        #: Ticks just before and after an answer, and inside checkpoints: where to look.
        self.answers = sorted(set(self._ticks))
        self.checkpoints: list[int] = []
        self.committed: dict[str, int] = {}
        self._play()

    def _play(self) -> None:
        player = Player(self._recording.data, self._recording.calls)
        database, log = (str(self._recording.data / name) for name in ("queue.db", "queue.db-wal"))
        self._remember(player)
        commit_follows = False
        while player.more:
            call, ended = player.step()
            if call.name == "pwrite64" and ended and call.ok:
                path = call.descriptor()[1]
                data = call.data()
                if path == database:
                    self.checkpoints.append(player.tick)
                    self._remember_first(player)
                elif path == log and len(data) == 24:
                    commit_follows = data[4:8] != bytes(4)
                elif path == log and len(data) == PAGE and commit_follows:
                    commit_follows = False
                    self._remember(player)

    def _remember_first(self, player: Player) -> None:
        if len(self.committed) < 3:
            self._remember(player)

    def _remember(self, player: Player) -> None:
        folder = self._scratch / "committed"
        shutil.rmtree(folder, ignore_errors=True)
        player.disk.cached(folder)
        self.committed.setdefault(recover(folder, work=False).digest, player.tick)

    def judge(self, tick: int, found: Found) -> list[str]:
        """Return what is broken in a store recovered from a loss of power at a tick."""
        told = self._promises[: bisect_right(self._ticks, tick - 1)]
        broken = [one for one in told if not one.holds(found)]
        wrong = list(found.troubles)
        if broken:
            wrong.append(f"{len(broken)} promises are broken, the first: {broken[0].text}")
        if found.digest not in self.committed:
            wrong.append("it is in a state that was never committed")
        return wrong

    def told(self, tick: int) -> Sequence[Promise]:
        """Return what had been promised before a tick."""
        return self._promises[: bisect_right(self._ticks, tick - 1)]


def instants(judge: Judge, draw: random.Random, ticks: int, count: int) -> list[int]:
    """Draw moments: anywhere, beside answers (m2, m8) and inside checkpoints (m11)."""
    found = []
    for number in range(count):
        if number % 3 == 0 or not judge.answers:
            found.append(draw.randrange(ticks))
        elif number % 3 == 1 or not judge.checkpoints:
            found.append(draw.choice(judge.answers) + draw.choice((0, 1, 2)))
        else:
            found.append(draw.choice(judge.checkpoints) + draw.choice((-3, -1, 0, 1, 2, 4)))
    return sorted(max(0, min(tick, ticks)) for tick in found)


def lose_power(
    recording: Recording, judge: Judge, draw: random.Random, count: int, scratch: Path
) -> Iterator[tuple[int, str, list[str], Path]]:
    """Rebuild disks; yield tick, how it was drawn, and what is broken on each."""
    player = Player(recording.data, recording.calls)
    for number, tick in enumerate(instants(judge, draw, recording.ticks, count)):
        player.play_to(tick)
        folder = scratch / "image"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        how = player.disk.after_power_loss(folder, draw)
        if draw.random() < 0.5:
            # Never synced, hence anything: SQLite must not believe it.
            (folder / "queue.db-shm").write_bytes(draw.randbytes(draw.choice((100, 32768))))
        kept = scratch / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        try:
            wrong = judge.judge(tick, recover(folder, work=number % 4 == 0))
        except Exception as error:
            wrong = [f"it cannot be opened: {error!r}"]
        yield tick, how, wrong, kept


# -- the part --------------------------------------------------------------------------------------


class DiskPower:
    """Power-loss images of a store that was recorded under load."""

    name = "disk_power"
    title = "power is lost: what was told before is on the disk"
    budget_s = 600.0
    needs_root = False
    only_when_named = False
    side_by_side = True

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return recordings with so many images each."""
        if size is Size.SLICE:
            plan = [("full", 1, 300, 150), ("normal", 1, 60, 150), ("failed-sync", 1, 60, 120)]
        else:
            plan = [("full", 8, 300, 400), ("normal", 4, 250, 400), ("failed-sync", 6, 100, 240)]
        return [
            Case(
                name=f"{size}-{kind}.{number:02}",
                seed=seed + number,
                options={"kind": kind, "images": images, "commits": commits},
            )
            for kind, count, images, commits in plan
            for number in range(count)
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Make a place for images: in memory, where there is one."""
        shared = Path("/dev/shm")
        place = shared if os.access(shared, os.W_OK) else folder
        with tempfile.TemporaryDirectory(prefix="hcna-images-", dir=place) as scratch:
            yield lambda case, evidence: _run(case, evidence, Path(scratch))


def _run(case: Case, evidence: Path, scratch: Path) -> Outcome:
    kind, count = str(case.options["kind"]), int(case.options["images"])
    draw = random.Random(case.seed)
    plan = Plan(
        seed=case.seed,
        commits=int(case.options["commits"]),
        synchronous="NORMAL" if kind == "normal" else None,
        failing_sync=draw.randint(5, 30) if kind == "failed-sync" else None,
        # Whatever a checkpoint carries over is written and synced anew.
        wal_bytes=WAL_BYTES_MAX if kind == "failed-sync" else SMALL_WAL_BYTES,
    )
    recording = Recording(evidence, plan)
    outcome = Outcome()
    if different := recording.differences():
        outcome.violations.append(f"the recording missed changes of {', '.join(different)}")
    judge = Judge(recording, scratch)
    bad: list[str] = []
    kinds: Counter[str] = Counter()
    for tick, how, wrong, kept in lose_power(recording, judge, draw, count, scratch):
        kinds[how.partition(",")[0]] += bool(wrong)
        if wrong:
            bad.append(f"power lost at tick {tick} ({how}): {'; '.join(wrong)}")
            if len(bad) <= TOLD_MAX and kind != "normal":
                shutil.copytree(kept, evidence / f"image-{tick}", dirs_exist_ok=True)
    promised = Counter(one.kind for one in recording.promises)
    outcome.notes.append(
        f"{len(judge.committed)} commits, {sum(promised.values())} promises "
        f"({', '.join(f'{n} {name}' for name, n in sorted(promised.items()))}), "
        f"{recording.ticks // 2} system calls, {len(judge.checkpoints)} pages carried over"
    )
    if kind == "normal":
        outcome.counts[NORMAL_LINE] = count
        outcome.notes.append(f"{len(bad)} of {count} images have lost something, as they must")
        if not bad:
            outcome.violations.append("synchronous=NORMAL lost nothing: the test sees nothing")
    else:
        outcome.counts[FULL_LINE] = count
        outcome.violations += bad[:TOLD_MAX]
        if len(bad) > TOLD_MAX:
            outcome.violations.append(f"and {len(bad) - TOLD_MAX} more images")
    return outcome


PART = DiskPower()

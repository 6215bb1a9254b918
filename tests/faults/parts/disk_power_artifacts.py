"""Power is lost while artifacts are uploaded: what was acknowledged is there, whole."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hcna_ray.store.sqlite import SqliteTaskStore
from tests.faults.disk_artifacts import Stored, Uploader, client_of, reopen, stored, wrong_files
from tests.faults.disk_recording import Player, Recorder, last_tick
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support.sources import ROOT

START_S = 30.0
TOLD_MAX = 5


class Recording:
    """C1 in two lives, with three clients that upload to it."""

    def __init__(self, folder: Path, seed: int, uploads: int) -> None:
        """Make the recording."""
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        self._store = folder / "queue.db"
        SqliteTaskStore(self._store).close()
        self._recorder = Recorder(folder)
        draw = random.Random(seed)
        for life in range(2):
            asyncio.run(self._live(life, draw, uploads))
        self.calls = self._recorder.calls()
        self.told = stored(self.calls)
        self.ticks = last_tick(self.calls) + 1

    async def _live(self, life: int, draw: random.Random, uploads: int) -> None:
        socket = self.folder / f"c{life}"
        command = [sys.executable, "-m", "tests.support.c1_process", str(self.home)]
        command += [str(self._store), str(self.folder / "nobody"), str(socket)]
        log = self.folder / "c1.log"
        process = self._recorder.start(command, cwd=ROOT, log=log)
        try:
            async with asyncio.timeout(START_S):
                while not socket.exists():
                    if not process.running:
                        raise RuntimeError(log.read_text())
                    await asyncio.sleep(0.01)
            async with client_of(socket) as http:
                clients = [Uploader(http, random.Random(draw.random())) for _ in range(3)]
                working = [asyncio.create_task(one.run(uploads)) for one in clients]
                if life == 0:  # Killed in the middle, with uploads begun.
                    while sum(len(one.answers) for one in clients) < 2 * uploads:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                    process.kill()
                await asyncio.gather(*working)
        finally:
            with suppress(ProcessLookupError):
                process.kill()


class DiskPowerArtifacts:
    """Power-loss images of the artifact store."""

    name = "disk_power_artifacts"
    title = "power is lost: artifacts that were acknowledged are there"
    budget_s = 120.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return recordings with so many images each."""
        count, images = (1, 60) if size is Size.SLICE else (4, 150)
        return [
            Case(
                name=f"{size}-uploads.{n:02}",
                seed=seed + n,
                options={"images": images, "uploads": 30},
            )
            for n in range(count)
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Make a place for images: in memory, where there is one."""
        shared = Path("/dev/shm")
        place = shared if os.access(shared, os.W_OK) else folder
        with tempfile.TemporaryDirectory(prefix="hcna-images-", dir=place) as scratch:
            yield lambda case, evidence: _run(case, evidence, Path(scratch))


def _run(case: Case, evidence: Path, scratch: Path) -> Outcome:
    draw = random.Random(case.seed)
    recording = Recording(evidence, case.seed, int(case.options["uploads"]))
    count = int(case.options["images"])
    answers = [one.tick for one in recording.told]
    instants = sorted(
        draw.randrange(recording.ticks)
        if number % 2
        else min(recording.ticks, draw.choice(answers) + draw.choice((0, 1, 2)))
        for number in range(count)
    )
    bad = []
    player = Player(recording.home, recording.calls)
    for tick in instants:
        player.play_to(tick)
        folder = scratch / "image"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        how = player.disk.after_power_loss(folder, draw)
        if wrong := _judge(
            folder / "artifacts", [one for one in recording.told if one.tick < tick]
        ):
            bad.append(f"power lost at tick {tick} ({how}): {wrong}")
    whole = sum(one.received == one.size for one in recording.told)
    outcome = Outcome(
        violations=bad[:TOLD_MAX],
        counts={"power-loss images, FULL": count},
        notes=[f"{whole} artifacts and {len(recording.told) - whole} parts were acknowledged"],
    )
    if len(bad) > TOLD_MAX:
        outcome.violations.append(f"and {len(bad) - TOLD_MAX} more images")
    if not whole or whole == len(recording.told):
        outcome.violations.append("nothing was uploaded whole, or nothing in parts")
    return outcome


def _judge(root: Path, told: Sequence[Stored]) -> str:
    store = reopen(root)
    missing = [one for one in told if not one.holds(store)]
    wrong = wrong_files(root)
    found = []
    if missing:
        one = missing[0]
        found.append(
            f"{len(missing)} acknowledged uploads are gone, the first: "
            f"{one.sha256} with {one.received} of {one.size} bytes"
        )
    if wrong:
        found.append(f"{len(wrong)} names stand for other bytes, the first: {wrong[0]}")
    return "; ".join(found)


PART = DiskPowerArtifacts()

"""Bits flip, sectors vanish and files are cut: a damaged store is refused and drops no task."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import TaskState
from hcna_ray.store.backup import BackupDamaged, BackupRefused, snapshot
from hcna_ray.store.info import check_store
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.faults.disk_promises import read_all
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.support.builders import a_fact, a_task

LINE = "damaged files"
COMMITS = 60


@dataclass
class Original:
    """Files of a store whose process was killed, and what it had committed."""

    folder: Path
    digest: str
    ids: frozenset[str]
    #: Tasks of the last commit alone.
    newest: frozenset[str]


class DiskDamage:
    """Damage to the database and its log, and then a start."""

    name = "disk_damage"
    title = "database or log is damaged: refused, and no task is dropped in silence"
    budget_s = 60.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return what is damaged, and how often."""
        times = 20 if size is Size.SLICE else 150
        return [
            Case(
                name=f"{size}-{what}", seed=seed, options={"file": file, "end": end, "times": times}
            )
            for what, file, end in (
                ("database", "queue.db", "closed"),
                ("database-with-log", "queue.db", "killed"),
                ("log", "queue.db-wal", "killed"),
                ("log-after-reboot", "queue.db-wal", "rebooted"),
            )
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Write the stores that are damaged later."""
        shared = Path("/dev/shm")
        place = shared if os.access(shared, os.W_OK) else folder
        with tempfile.TemporaryDirectory(prefix="hcna-damage-", dir=place) as scratch:
            originals = {end: _original(Path(scratch), end) for end in ("closed", "killed")}
            originals["rebooted"] = _original(Path(scratch), "rebooted")
            yield lambda case, evidence: _run(case, evidence, originals, Path(scratch))


def _original(scratch: Path, end: str) -> Original:
    """Write a store, and end as said: closed, killed, or killed with the log's index gone."""
    work, folder = scratch / f"{end}-work", scratch / end
    work.mkdir()
    draw = random.Random(7)
    store = SqliteTaskStore(work / "queue.db", wal_bytes_max=1 << 20)
    seq = 0
    newest: list[str] = []
    for number in range(COMMITS):
        newest = []
        with store.transaction():
            for _ in range(draw.choice((1, 2, 4))):
                seq += 1
                newest.append(f"task-{seq:04}")
                state = TaskState.COMPLETED if number % 3 == 0 else TaskState.QUEUED
                payload = draw.randbytes(draw.choice((50, 1500, 9000)))
                store.insert([a_task(newest[-1], seq=seq, state=state, payload=payload)])
                store.append_facts([a_fact(newest[-1])])
    found = read_all(store)
    if end == "closed":
        store.close()
    shutil.copytree(work, folder)
    store.close()
    if end == "rebooted":
        (folder / "queue.db-shm").unlink()
    return Original(folder, found.digest, frozenset(found.tasks), frozenset(newest))


def _damage(path: Path, draw: random.Random, *, cut: bool) -> str:
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    kind = draw.choice(("bit", "bit", "sector", "page", *(("cut",) if cut else ())))
    if kind == "bit":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "sector":
        at -= at % 512
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "page":
        at -= at % 4096
        data[at : at + 4096] = draw.randbytes(len(data[at : at + 4096]))
    else:
        del data[at:]
    path.write_bytes(data)
    return f"{kind} at {at}"


def _run(case: Case, evidence: Path, originals: dict[str, Original], scratch: Path) -> Outcome:
    original = originals[str(case.options["end"])]
    draw = random.Random(case.seed)
    outcome = Outcome(counts={LINE: int(case.options["times"])})
    verdicts: Counter[str] = Counter()
    for number in range(int(case.options["times"])):
        folder = scratch / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original.folder, folder)
        # Without its index nothing tells a log that was cut from one that ended there.
        cut = case.options["end"] != "rebooted"
        how = _damage(folder / str(case.options["file"]), draw, cut=cut)
        kept = scratch / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        verdict, wrong = _judge(folder, original)
        verdicts[verdict] += 1
        if wrong:
            outcome.violations.append(f"{how}: {wrong}")
            shutil.copytree(kept, evidence / f"damaged-{number}")
    outcome.notes.append(", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items())))
    return outcome


def _judge(folder: Path, original: Original) -> tuple[str, str]:
    """Return what became of it in a word, and what is wrong with that, if anything."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        store = SqliteTaskStore(folder / "queue.db")
    except HcnaError:
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        changed = [name for name in before if not name.endswith("-shm")]
        if any(before[name] != after.get(name) for name in changed):
            return "refused", "it was refused, but its files were changed"
        return "refused at the start", ""
    except Exception as error:
        return "failed", f"no clear refusal: {error!r}"
    try:
        found = read_all(store)
    except HcnaError:
        return "refused when it was read", ""
    except Exception as error:
        return "failed", f"no clear refusal: {error!r}"
    finally:
        store.close()
    if found.digest == original.digest:
        return "harmless", ""
    missing = original.ids - set(found.tasks)
    if not missing:
        return "a value was changed, unnoticed", ""
    if missing <= original.newest and not found.troubles:
        return "the last commit is gone, unnoticed", ""
    if _noticed(folder):
        return "noticed by a check or a backup", ""
    return "dropped", f"{len(missing)} tasks are gone, and nobody notices: {sorted(missing)[:3]}"


def _noticed(folder: Path) -> bool:
    try:
        check_store(Settings(home=folder))
        snapshot(folder / "queue.db", folder / "copy.db")
    except (HcnaError, BackupDamaged, BackupRefused):
        return True
    return False


PART = DiskDamage()

"""The drill on whole machines: M1 and one worker burn, the other worker lives on.

Backups are made under load, with keys and certificates. Then the homes of M1 and of W2 are gone,
both hosts come back empty, and what the archives hold is restored on them. W1 has had attempts
running all the time, under tokens of before.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.parts.restores import LINE, RTO_S, WORDS, judge_restored
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.stack import Stack, eventually, stack
from tests.rig.computer import HCNA, HOME
from tests.support.read_store import export

_LOAD_S = 25.0
#: Between the backup and the fire.
_AFTER_S = 10.0
_ARCHIVES = "/data/archives"
_WORDS_FILE = "/etc/hcna-words"
_SEALED = f"--with-keys --passphrase-file {_WORDS_FILE}"
_BACK_S = 120.0


class RestoreDrill:
    """See this module."""

    name = "restore_drill"
    title = "M1 and a worker lose their homes under load and come back from their archives"
    budget_s = 420.0
    needs_root = True
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the drill."""
        return [] if size is Size.SLICE else [Case(name="drill", seed=seed)]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Bring up M1 and two workers for each case: they do not come out as they went in."""

        def run(case: Case, own: Path) -> Outcome:
            with stack(folder, seed=case.seed, workers=("w1", "w2"), per_second=5.0) as on:
                return _Drill(on, own).run()

        yield run


class _Drill:
    def __init__(self, on: Stack, folder: Path) -> None:
        self._on, self._folder = on, folder
        self._troubles: list[str] = []
        self._times: dict[str, list[float]] = {}

    def run(self) -> Outcome:
        """Have load, back up, burn, restore, go on, judge."""
        on = self._on
        on.clients.go_on()
        time.sleep(_LOAD_S)
        for name in ("m1", "w2"):
            on.rig[name].write(_WORDS_FILE, f"{WORDS}\n", mode=0o600)
            on.rig[name].sh(f"mkdir -p {_ARCHIVES}")
        long_ones = [on.clients.submit_one(20.0, "W1") for _ in range(2)]
        time.sleep(2.0)
        self._hcna("w2", f"backup --worker W2 --to {_ARCHIVES}/w2.tar.zst {_SEALED}")
        backup_at = time.time()
        made = self._hcna("m1", f"backup --to {_ARCHIVES}/m1.tar.zst {_SEALED}")
        self._times["backup of M1 under load"] = [float(made["took_s"])]
        time.sleep(_AFTER_S)

        self._burn("m1", "w2")
        home = on.rig["m1"].file(HOME)
        export(home / "queue.db", self._folder / "before-1.jsonl")
        for name in ("m1", "w2"):
            on.rig[name].file("/etc/systemd/enabled/hcna-" + name).unlink()
            shutil.rmtree(on.rig[name].file(HOME))

        on.rig.boot(["m1", "w2"])
        begun = time.time()
        report = self._hcna("m1", f"restore {_ARCHIVES}/m1.tar.zst {_SEALED}")
        restored = on.note(
            "restore",
            "M1",
            time.time(),
            backup_at=backup_at,
            last_fact=report["point"]["last_fact"],
        )
        on.clients.probe(True)
        on.computer.systemctl("m1", "enable --now hcna-m1")
        self._hcna("w2", f"restore {_ARCHIVES}/w2.tar.zst {_SEALED}")
        on.computer.systemctl("w2", "enable --now hcna-w2")
        self._until_back(begun, float(restored["at"]))
        on.clients.probe(False)
        for worker in ("W1", "W2"):
            self._works(worker)
        drained = on.settle()
        # What is gone needs not be looked for; that it is gone is in the evidence.
        stored = {str(one) for (one,) in on.query("SELECT id FROM task")}
        on.clients.ids[:] = [one for one in on.clients.ids if one in stored]
        out = on.judge(self._folder, drained, 0)
        out.violations = self._troubles + out.violations
        out.times_s |= self._times
        out.notes.append(f"attempts of 20 s that ran on W1 through all of it: {len(long_ones)}")
        last_fact, generation = int(report["point"]["last_fact"]), int(report["generation"])
        judge_restored(
            out,
            self._folder,
            last_fact=last_fact,
            generation=generation,
            restored_at=float(restored["at"]),
        )
        out.counts = {LINE: 2}
        return out

    def _hcna(self, host: str, arguments: str) -> dict[str, Any]:
        done = self._on.rig[host].sh(f"{HCNA} {arguments} --json", timeout_s=180)
        return dict(json.loads(done.out))

    def _burn(self, *hosts: str) -> None:
        at = time.time()
        with ThreadPoolExecutor(len(hosts)) as pool:
            list(pool.map(lambda name: self._on.rig[name].unplug(), hosts))
        self._on.note("reboot", "head", at)
        self._on.note("reboot", "W2", at)

    def _until_back(self, begun: float, restored_at: float) -> None:
        on = self._on
        accepted = eventually(lambda: on.clients.accepted_after(restored_at), RTO_S, 0.1)
        if accepted is None:
            self._troubles.append(f"M1 does not accept {RTO_S:g} s after its restore")
        else:
            self._times["restore of M1 begun: accepting again"] = [accepted - begun]
        if eventually(on.all_online, _BACK_S, 0.5):
            self._times["restore of M1 begun: all workers back"] = [time.time() - begun]
        else:
            self._troubles.append(f"online are only {sorted(on.online())}")

    def _works(self, worker: str) -> None:
        """A task that only this worker may take is done."""
        task = self._on.clients.submit_one(0.0, worker)
        ended = f"SELECT 1 FROM task WHERE id = '{task}' AND state = 'completed'"
        if task is None or not eventually(lambda: self._on.query(ended), _BACK_S, 0.2):
            self._troubles.append(f"{worker} does not work after the restore")


PART = RestoreDrill()

"""A whole composite computer on hosts of a rig, with clients and failpoints, and what it leaves.

M1 does not work itself; every worker is a host with one slot, in the profile for little memory, so
that two cores can carry five of them. All is as `hcna up`, `hcna join` and the service manager make
it; beyond that hosts have the variables that switch failpoints on, the task types of
`tests.support.checked_tasks`, and on M1 a rule that lets outsiders reach C1.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import apsw

from tests.checker.checks.leases import tenures
from tests.checker.inputs import Run, read_run
from tests.checker.recorder import steady_now
from tests.faults.clients import Clients
from tests.faults.programme import Outcome
from tests.rig.computer import HCNA, Computer
from tests.support.checked_tasks import TASK_TYPES
from tests.support.read_store import export, query
from tests.support.rig import Rig, RigError
from tests.support.sources import commit

T = TypeVar("T")

EFFECTS = "/root/effects.jsonl"
FAILPOINTS = "/root/failpoints"
_SITE = "/root/site"
#: Where outsiders find C1.
_DOOR = 18080
#: What is added to the environment of all that runs on a host.
ENVIRONMENT = {
    "HCNA_TEST": "1",
    "HCNA_FAILPOINTS": FAILPOINTS,
    "PYTHONPATH": f"{_SITE}:/root/hcna-ray",
}
_ENTRY_POINTS = "[hcna_ray.tasks]\nchecked = tests.support.checked_tasks\n"
_OPEN = "('scheduled', 'queued', 'running')"

#: What is timed, with its bound of G11 in seconds; the head's are those of a reboot.
BOUNDS_S = {
    "moderator killed: accepting again": 10.0,
    "moderator stood still: accepting again": 10.0,
    "C1 killed: accepting again": 60.0,
    "worker killed: queued again": 35.0,
    "worker killed: works again": 30.0,
    "partition: detected": 20.0,
    "partition: queued again": 35.0,
    "partition healed: worker usable": 30.0,
    "pause: queued again": 35.0,
    "pause ended: worker usable": 30.0,
    "head killed: accepting again": 60.0,
    "head killed: all workers back": 120.0,
    "M1 rebooted: accepting again": 60.0,
    "M1 rebooted: all workers back": 120.0,
    "worker rebooted: works again": 120.0,
    "all rebooted: accepting again": 60.0,
    "all rebooted: all workers back": 120.0,
}
#: The two cores of one machine carry every host here: what starts together, waits for each other.
ALLOWANCE_S, ALLOWANCE = 10.0, 1.5
#: Kinds of faults that strike a worker: what is timed, and of which the end is.
_TIMED = {
    "kill": ("worker killed", ""),
    "partition": ("partition", "partition healed: worker usable"),
    "pause": ("pause", "pause ended: worker usable"),
}
#: What is shorter does not cost a worker its session.
_FELT_S = 24.0
#: Two clocks of one kernel, one of them steady.
CLOCK_ERROR_S = 0.25
SETTINGS: dict[str, Any] = {
    "heartbeat_s": 5.0,
    "max_concurrent_tasks": 64,
    "queue_tasks_max": 2_000_000,
    "concurrency_default": 1,
    "ageing_step_s": 60.0,
}


def allowed(what: str) -> float:
    """Return a bound with what a loaded machine is allowed beyond it, in seconds."""
    return max(BOUNDS_S[what] + ALLOWANCE_S, BOUNDS_S[what] * ALLOWANCE)


def eventually(look: Callable[[], T], timeout_s: float, pause_s: float = 0.1) -> T | None:
    """Look until there is something; return it, or None when it did not come in time."""
    end = time.monotonic() + timeout_s
    while True:
        if found := look():
            return found
        if time.monotonic() > end:
            return None
        time.sleep(pause_s)


_SOCKETS = shutil.ignore_patterns("*.sock", "sockets")


class Stack:
    """A composite computer, its clients, and everything that was done to it."""

    def __init__(self, rig: Rig, folder: Path, seed: int, workers: Sequence[str]) -> None:
        """Take hosts that are up; `raise_up` starts everything on them."""
        self.rig, self.folder, self.seed = rig, folder, seed
        self.computer = Computer(rig)
        #: Worker names by host: ``w1`` is ``W1``.
        self.workers = {name: name.upper() for name in workers}
        self.faults: list[dict[str, Any]] = []
        self.started_at = time.time()
        self._clients: Clients | None = None
        self._told = 0
        self._known_violations: set[str] = set()
        #: What was measured in this epoch, by a name of `BOUNDS_S`.
        self.timed: dict[str, list[float]] = {}
        self._mutex = threading.Lock()

    @property
    def clients(self) -> Clients:
        """The clients."""
        assert self._clients is not None, "the stack is up"
        return self._clients

    # -- up ----------------------------------------------------------------------------------------

    def raise_up(
        self, per_second: float, settings: Mapping[str, Any], *, brief: bool = False
    ) -> None:
        """Start M1 and the workers, and let the clients begin.

        Args:
            per_second: Submissions, roughly.
            settings: More of M1's settings than that it does not work itself.
            brief: Tasks are short, and the rate is kept.
        """
        hosts = ["m1", *self.workers]
        with ThreadPoolExecutor(len(hosts)) as pool:
            list(pool.map(self._furnish, hosts))
        m1 = self.rig["m1"]
        # The door leads outsiders to a port that M1's own rules would keep from them.
        ray = {"profile": "tiny", "firewall": "off"}
        # Clients call it by M1's address, which is not what C1 listens on.
        called = {"hosts": [m1.address]}
        own = {"moderator": {"local_worker": "never"}, "ray": ray, "composite": called, **settings}
        m1.write("/root/.hcna/hcna.yaml", json.dumps(own))
        # The kernel's own relay: a program would be one more thing that dies.
        m1.at_boot(
            "door",
            "sysctl -qw net.ipv4.conf.all.route_localnet=1\n"
            "nft -f - <<END\n"
            "table ip door {\n chain in {\n  type nat hook prerouting priority -100;\n"
            f"  tcp dport {_DOOR} dnat to 127.0.0.1:8080\n }}\n}}\nEND\n",
        )
        m1.sh("bash /etc/boot.d/door.sh")
        self.computer.install_services("m1", ENVIRONMENT)
        self.computer.systemctl("m1", "enable --now hcna-m1")
        key = m1.file("/root/.hcna/keys/client.key")
        assert eventually(key.exists, 60), "M1's supervisor does not start"
        assert eventually(self.is_ready, 180, 0.5), "M1 does not come up"
        code = self.computer.code_in(self.computer.hcna("m1", "invite --uses 0").out)
        # One after the other: a raylet whose agents take 15 s to start, as they may when several
        # machines start on two cores, ends itself.
        for host in self.workers:
            self._join(host, code)
        assert eventually(self.all_online, 120, 0.5), "not all workers come online"
        self._clients = Clients(
            self.folder,
            f"http://{m1.address}:{_DOOR}",
            self.computer.key,
            network=Path(f"/proc/{self.rig.keeper}/ns/net"),
            effects=EFFECTS,
            workers=tuple(self.workers.values()),
            seed=self.seed,
            per_second=per_second,
            brief=brief,
        )
        self._clients.start()
        accepted = eventually(lambda: self.clients.accepted_after(0.0) or self.clients.broken, 60)
        assert accepted, "nothing that the clients submit is accepted"
        assert not self.clients.broken, self.clients.broken

    def _furnish(self, name: str) -> None:
        host = self.rig[name]
        info = f"{_SITE}/hcna_checked-1.dist-info"
        host.write(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hcna-checked\nVersion: 1\n")
        host.write(f"{info}/entry_points.txt", _ENTRY_POINTS)
        host.file(FAILPOINTS).mkdir()

    def _join(self, name: str, code: str) -> None:
        host = self.rig[name]
        host.write("/root/.hcna/hcna.yaml", "ray: {profile: tiny}\n")
        wanted = self.workers[name]
        host.sh(f"{HCNA} join {code} --name {wanted} --wait 120", timeout_s=150, env=ENVIRONMENT)
        self.computer.install_services(name, ENVIRONMENT)
        self.computer.systemctl(name, f"enable hcna-{name}")

    # -- looking -----------------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether C1 says that it is ready."""
        return bool(self.computer.api("GET", "/ready")[0] == 200)

    def online(self) -> set[str]:
        """Return the names of workers that are online; empty while C1 does not answer."""
        try:
            found = self.computer.workers()
        except (RigError, ValueError, TypeError, KeyError):
            return set()
        return {name for name, one in found.items() if one["state"] == "online"}

    def all_online(self) -> bool:
        """Whether all workers are."""
        return self.online() >= set(self.workers.values())

    def pids(self, host: str, what: str) -> list[int]:
        """Return the numbers, on this machine, of a host's processes whose command has a text."""
        return [one.pid for one in self.rig[host].processes() if what in one.command]

    def kill_one(
        self, host: str, what: str, draw: random.Random | None, before: Callable[[], object]
    ) -> bool:
        """Kill a process of a host whose command has a text: the newest, or a drawn one.

        ``before`` is called right before the signal, if there is such a process.
        """
        found = self.pids(host, what)
        if not found:
            return False
        chosen = max(found) if draw is None else draw.choice(found)
        before()
        with suppress(ProcessLookupError):
            os.kill(chosen, signal.SIGKILL)
        return True

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Read from the store, beside its owner."""
        return query(self.rig["m1"].file("/root/.hcna/queue.db"), sql)

    def suspected(self) -> list[tuple[str, float]]:
        """Return each worker that M1's health check missed, with the instant."""
        found = []
        for path in sorted(self.rig["m1"].file("/root/.hcna/logs").glob("moderator.log*")):
            for line in path.read_text().splitlines():
                if '"worker.suspect"' in line:
                    told = json.loads(line)
                    at = datetime.fromisoformat(told["at"].replace("Z", "+00:00"))
                    found.append((str(told["worker"]), at.timestamp()))
        return found

    def open_tasks(self) -> int:
        """Return how many tasks have not ended."""
        try:
            return int(self.query(f"SELECT count(*) FROM task WHERE state IN {_OPEN}")[0][0])
        except apsw.Error:
            return -1

    def took(self, what: str, seconds: float) -> None:
        """Write down how long something took."""
        with self._mutex:
            self.timed.setdefault(what, []).append(seconds)

    # -- faults ------------------------------------------------------------------------------------

    def note(self, kind: str, target: str, at: float, **more: Any) -> dict[str, Any]:
        """Write down what was done; ``until`` may be put into what is returned."""
        fault = {"kind": kind, "target": target, "at": at, **more}
        with self._mutex:
            self.faults.append(fault)
        return fault

    def arm(self, host: str, point: str, action: str = "kill") -> Callable[[], float | None]:
        """Arm a failpoint; return what tells when it fired, on the clock of the faults."""
        order = self.rig[host].file(f"{FAILPOINTS}/{point}")
        fired = order.with_name(f"{point}.fired")
        fired.unlink(missing_ok=True)
        new = order.with_name(f".{point}.new")
        new.write_text(action)
        new.rename(order)

        def when() -> float | None:
            try:
                return fired.stat().st_ctime
            except OSError:
                return None

        return when

    def disarm(self) -> list[str]:
        """Disarm everything; return what had not fired."""
        left = []
        for name in ("m1", *self.workers):
            for path in self.rig[name].file(FAILPOINTS).iterdir():
                if not path.name.endswith(".fired"):
                    left.append(f"{name}:{path.name}")
                path.unlink(missing_ok=True)
        return left

    # -- the end of an epoch -----------------------------------------------------------------------

    def settle(self, drain_s: float = 180.0) -> float:
        """Heal everything, stop submitting, wait until all has ended; return the instant."""
        self.clients.probe(False)
        self.clients.rest()
        self.disarm()
        self.rig.heal()
        for host in self.rig:
            host.resume()
            if not host.is_up:
                host.boot()
        eventually(self.is_ready, 90, 0.5)
        eventually(self.all_online, 120, 0.5)
        eventually(lambda: self.open_tasks() == 0, drain_s, 0.5)
        return steady_now()

    def judge(self, case_folder: Path, drained_at: float, since: int) -> Outcome:
        """Collect the evidence of all that has been so far, and have it checked.

        Args:
            case_folder: Where the evidence goes.
            drained_at: What `settle` returned.
            since: Number of faults before this epoch.
        """
        out = Outcome()
        self.clients.look(120)
        out.violations += [f"a client broke: {one}" for one in self.clients.broken]
        export(self.rig["m1"].file("/root/.hcna/queue.db"), case_folder / "store.jsonl")
        shutil.copy(self.folder / "history.jsonl", case_folder / "history.jsonl")
        for name in self.workers:
            effects = self.rig[name].file(EFFECTS)
            if effects.exists():
                shutil.copy(effects, case_folder / f"effects-{name}.jsonl")
        for name, samples in measure(self, read_run(case_folder), self.faults[since:]).items():
            self.timed.setdefault(name, []).extend(samples)
        out.times_s, self.timed = self.timed, {}
        self._write_schedule(case_folder, drained_at, out.times_s)
        report = case_folder / "report.json"
        done = subprocess.run(
            [sys.executable, "-m", "tests.checker", str(case_folder), "--json", str(report)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            out.violations.append(f"the checker did not end well: {done.stderr[-2000:]}")
            return out
        found = json.loads(report.read_text())
        (case_folder / "report.txt").write_text(done.stdout)
        for one in found["violations"]:
            # The evidence is of the whole session: nothing is told by two epochs.
            text = f"{one['check']} {one['task'] or ''}: {one['message']}"
            if text not in self._known_violations:
                self._known_violations.add(text)
                out.violations.append("\n    ".join([text, *one["lines"]]))
        if found["status"] == 3:
            out.violations.append(f"not everything was checked: {found['verdict']}")
        if out.violations:
            told = [json.dumps(one) for one in self.faults[since:]]
            out.violations.append("faults of this epoch: " + "; ".join(told))
            self.keep_logs(case_folder)
        looks = sum(one["examined"] for one in found["checks"])
        out.notes.append(f"{looks} looks of the checker")
        return out

    def _write_schedule(
        self, folder: Path, drained_at: float, times_s: Mapping[str, Sequence[float]]
    ) -> None:
        measured = [
            {"name": name, "from": 0.0, "to": took, "max_s": allowed(name)}
            for name, samples in times_s.items()
            for took in samples
        ]
        schedule = {
            "format": "hcna.schedule.v1",
            "seed": self.seed,
            "commit": commit(),
            "started_at": self.started_at,
            "drained_at": drained_at,
            "clock_error_s": CLOCK_ERROR_S,
            "settings": SETTINGS,
            "workers_online": sorted(self.workers.values()),
            "effects_task_types": list(TASK_TYPES),
            "faults": self.faults,
            "measured": measured,
            # An epoch of a few faults may have nothing that is timed.
            "without": {} if measured else {"C13": "nothing was timed in this epoch"},
            "bounds_s": {
                "moderator_accepting": allowed("moderator killed: accepting again"),
                "worker_requeued": allowed("worker killed: queued again"),
            },
            "canaries": [self.computer.key],
        }
        (folder / "schedule.json").write_text(json.dumps(schedule, indent=1))

    def keep_logs(self, folder: Path) -> None:
        """Copy every host's logs."""
        for host in self.rig:
            logs = host.file("/root/.hcna/logs")
            if logs.is_dir():
                shutil.copytree(logs, folder / "logs" / host.name, dirs_exist_ok=True)
            if host.is_up:
                for path in host.file("/tmp").glob("hcna-*/session_2*/logs"):
                    name = f"{path.parent.name}-ray"
                    target = folder / "logs" / host.name / name
                    shutil.copytree(path, target, dirs_exist_ok=True, ignore=_SOCKETS)


def measure(stack: Stack, run: Run, faults: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Read from the evidence how soon leases were taken back, and workers of use again."""
    found: dict[str, list[float]] = {}
    assert run.dump is not None
    leases = list(tenures(run.dump))
    suspected = stack.suspected()
    for fault in faults:
        worker, kind, at, until = (fault.get(name) for name in ("target", "kind", "at", "until"))
        if worker not in stack.workers.values() or kind not in _TIMED:
            continue
        title, healed = _TIMED[kind]
        lost = [
            one.ended.at - at
            for one in leases
            if one.granted.worker == worker
            and one.ended is not None
            and one.ended.kind == "lost"
            and one.granted.at < at < one.ended.at < (until or at) + 120
        ]
        taken_back = [took for took in lost if until is None or took < until - at]
        if taken_back:
            found.setdefault(f"{title}: queued again", []).append(max(taken_back))
        if kind == "partition":
            told = [when - at for name, when in suspected if name == worker and at < when < until]
            if told:
                found.setdefault("partition: detected", []).append(min(told))
        if healed and until - at >= _FELT_S:
            starts = [
                one.t_wall - until
                for one in run.effects or ()
                if one.what == "start" and one.node == worker and one.t_wall > until
            ]
            if starts:
                found.setdefault(healed, []).append(min(starts))
    return found


@contextmanager
def stack(
    folder: Path,
    *,
    seed: int,
    workers: Sequence[str],
    per_second: float,
    settings: Mapping[str, Any] | None = None,
    brief: bool = False,
) -> Iterator[Stack]:
    """Bring up a composite computer for cases to share."""
    with Rig.up(("m1", *workers), base=folder.resolve()) as rig:
        one = Stack(rig, folder, seed, workers)
        try:
            one.raise_up(per_second, settings or {}, brief=brief)
        except BaseException:
            one.keep_logs(folder)
            raise
        try:
            yield one
        finally:
            one.clients.stop()

"""A moderator that is supervised, C1 and clients around it, and a disk that is made to fail.

The moderator is a process, started again whenever it ends; C1 is the real application in this
process; a worker of paper ends every task at once. Every request is written down for the checker.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from hcna_ray.core.models import TaskFilter, TaskState
from hcna_ray.store.sqlite import SqliteTaskReader
from tests.checker.__main__ import check
from tests.checker.findings import violations
from tests.checker.recorder import Caller, History
from tests.faults.disk_traffic import TASK_TYPE, PaperWorker
from tests.support.c1 import ADMIN_KEY
from tests.support.checked_run import CLOCK_ERROR_S, composite
from tests.support.moderator_process import SocketLink
from tests.support.read_store import export
from tests.support.sources import ROOT, commit

POLICY: dict[str, Any] = {
    "heartbeat_s": 0.5,
    "max_concurrent_tasks": 8,
    "queue_tasks_max": 100_000,
    "exchange_wait_s": 0.5,
    "disk_free_bytes_min": 0,
}
#: Before anything is tried; on a machine that has much to do.
START_S = 120.0
DRAIN_S = 60.0
#: Longer than a restart takes on a busy machine: a batch whose fate is unknown is asked about
#: until it is known.
RESEND_S = 60.0
#: Between the end of a process and its next start.
RESTART_S = 0.1
#: Answers that a client may get while a disk fails.
EXPECTED = frozenset({200, 202, 409, 503, 504, 507})


@dataclass
class Stack:
    """Everything that runs in one case."""

    folder: Path
    seed: int
    #: Where the store lies.
    data: Path
    policy: dict[str, Any] = field(default_factory=lambda: dict(POLICY))
    wal_bytes_max: int = 256 * 1024
    clients: int = 3
    exits: list[int] = field(default_factory=list)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    #: Seconds that each answered submit took.
    submits_s: list[float] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    #: Added to the moderator's environment.
    environment: dict[str, str] = field(default_factory=dict)
    #: Goes before the command of the next start: a strace.
    prefix: list[str] = field(default_factory=list)
    #: How long the first start took, before anything failed.
    start_s: float = 0.0

    def __post_init__(self) -> None:
        self.store = self.data / "queue.db"
        self.socket = self.folder / "m1"
        self._stopping = False
        self._nonces = 0
        self._started_at = time.time()

    # -- the moderator ----------------------------------------------------------------------------

    def start_process(self) -> None:
        """Start the moderator's process; does not wait for it."""
        command = [sys.executable, "-m", "tests.faults.recorded_moderator", str(self.store)]
        command += [str(self.socket), json.dumps(self.policy)]
        command += [json.dumps({"wal_bytes_max": self.wal_bytes_max})]
        self.socket.unlink(missing_ok=True)
        with (self.folder / "moderator.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        self.prefix = []

    def moderator_pid(self) -> int:
        """Return the moderator's own process id, also when a strace started it."""
        assert self.process is not None
        if not Path(os.readlink(f"/proc/{self.process.pid}/exe")).name.startswith("strace"):
            return self.process.pid
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(task.read_text().split()[0])

    async def supervise(self) -> None:
        """Start the process again whenever it has ended."""
        while not self._stopping:
            assert self.process is not None
            status = self.process.poll()
            if status is not None:
                self.exits.append(status)
                await asyncio.sleep(RESTART_S)
                self.start_process()
            await asyncio.sleep(0.01)

    def end_process(self) -> None:
        """``kill -9``; nobody starts it again."""
        self._stopping = True
        if self.process is not None and self.process.poll() is None:
            try:
                os.kill(self.moderator_pid(), signal.SIGKILL)
            except (OSError, IndexError):
                self.process.kill()
            self.process.wait()

    # -- around it --------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run everything; on leaving, let all tasks end, and stop it."""
        async with AsyncExitStack() as stack:
            stack.callback(self.end_process)
            began = time.monotonic()
            self.start_process()
            async with asyncio.timeout(START_S):
                while not self.socket.exists():
                    assert self.process is not None
                    if self.process.poll() is not None:
                        raise RuntimeError((self.folder / "moderator.log").read_text())
                    await asyncio.sleep(0.01)
            self.start_s = time.monotonic() - began
            links = [SocketLink(self.socket) for _ in range(2)]
            for link in links:
                stack.push_async_callback(link.close)
            draw = random.Random(self.seed)
            self.worker = PaperWorker(
                "W1", links[0], draw, heartbeat_s=float(self.policy["heartbeat_s"])
            )
            working = asyncio.create_task(self.worker.run())
            home = self.folder / "home"
            home.mkdir(exist_ok=True)
            self.http = await stack.enter_async_context(
                composite(home, self.store, links[1], resend_s=RESEND_S)
            )
            self.probe = self._caller("probe")
            supervising = asyncio.create_task(self.supervise())
            clients = [asyncio.create_task(self._client(number)) for number in range(self.clients)]
            self._clients_stop = False
            try:
                yield
                self._clients_stop = True
                await asyncio.gather(*clients)
                await self._drain()
                for task in self.ids:
                    await self._noted("get", self.probe.get(task))
            finally:
                running = [supervising, *clients, working]
                for one in running:
                    one.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _caller(self, name: str) -> Caller:
        return Caller(self.http, History(self.folder / "history.jsonl", name, "owner"))

    def body(self, draw: random.Random) -> dict[str, Any]:
        """Return a request for a task."""
        self._nonces += 1
        nonce = f"n-{self.seed}-{self._nonces}"
        body: dict[str, Any] = {
            "task_type": TASK_TYPE,
            "payload": {"message": draw.randbytes(draw.choice((10, 100, 2000))).hex()},
            "metadata": {"nonce": nonce},
        }
        if draw.random() < 0.15:
            body["requires"] = {"worker": "W9"}
        return body

    async def submit(self, caller: Caller, draw: random.Random) -> httpx.Response:
        """Submit one task."""
        key = f"k-{self.seed}-{self._nonces}" if draw.random() < 0.3 else None
        began = time.monotonic()
        answer = await self._noted("submit", caller.submit(self.body(draw), key=key))
        self.submits_s.append(time.monotonic() - began)
        if answer.status_code == 202:
            self.ids.append(answer.json()["task_id"])
        return answer

    async def _noted(self, what: str, asking: Any) -> httpx.Response:
        answer: httpx.Response = await asking
        self.statuses[what, answer.status_code] += 1
        return answer

    async def _client(self, number: int) -> None:
        draw = random.Random(f"{self.seed}-{number}")
        caller = self._caller(f"c{number}")
        mine: list[str] = []
        while not self._clients_stop:
            answer = await self.submit(caller, draw)
            if answer.status_code == 202:
                mine.append(answer.json()["task_id"])
            if mine:
                chosen, what = draw.choice(mine[-4:]), draw.random()
                if what < 0.2:
                    await self._noted("cancel", caller.cancel(chosen))
                elif what < 0.3:
                    await self._noted("retry", caller.retry(chosen))
                else:
                    await self._noted("get", caller.get(chosen))
            await asyncio.sleep(draw.uniform(0.0, 0.02))

    async def accepting(self, within_s: float) -> float | None:
        """Submit until it is accepted; return after how many seconds, or `None` if never."""
        draw, began = random.Random(self._nonces), time.monotonic()
        while time.monotonic() < began + within_s:
            if (await self.submit(self.probe, draw)).status_code == 202:
                return time.monotonic() - began
            await asyncio.sleep(0.05)
        return None

    async def _drain(self) -> None:
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end:
            reader = SqliteTaskReader(self.store)
            try:
                where = TaskFilter(
                    states=(TaskState.SCHEDULED, TaskState.QUEUED, TaskState.RUNNING)
                )
                found = reader.page(where, before_seq=None, limit=10_000)
            finally:
                reader.close()
            if all(task.spec.needs.worker == "W9" for task in found):
                return
            await asyncio.sleep(0.1)

    # -- what it shows ----------------------------------------------------------------------------

    def judge(self) -> list[str]:
        """Write the evidence down and let the checker judge it."""
        schedule = {
            "format": "hcna.schedule.v1",
            "seed": self.seed,
            "commit": commit(),
            "started_at": self._started_at,
            "drained_at": time.time(),
            "clock_error_s": CLOCK_ERROR_S,
            "settings": self.policy,
            "workers_online": ["W1"],
            "effects_task_types": [],
            "faults": self.faults,
            "canaries": [ADMIN_KEY],
        }
        (self.folder / "schedule.json").write_text(json.dumps(schedule, indent=2))
        export(self.store, self.folder / "store.jsonl")
        _run, outcomes = check(self.folder)
        found = [
            f"{one.check} {one.task or ''}: {one.message} {' | '.join(one.lines[:3])}"
            for one in violations(outcomes)
        ]
        found += [
            f"{count} times {what} was answered {status}"
            for (what, status), count in sorted(self.statuses.items())
            if status not in EXPECTED
        ]
        found += [
            f"{count} reads were answered {status} while the disk failed"
            for (what, status), count in sorted(self.statuses.items())
            if what == "get" and status in (503, 507)
        ]
        return found


# -- the disk that fails --------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What strace does to a process: which calls fail, how and when."""

    call: str
    #: ``ENOSPC``, ``EIO``, ...; or a delay in microseconds.
    error: str
    #: Number of the call, counted in the thread that makes it.
    when: int
    #: That call alone, or all from it on.
    once: bool

    @property
    def name(self) -> str:
        """Return it in words."""
        return f"{self.call} {self.error} at {self.when}{'' if self.once else ' and all after it'}"

    def options(self, paths: Sequence[Path], log: Path) -> list[str]:
        """Return the command line, up to the process."""
        how = f"delay_exit={self.error}" if self.error.isdigit() else f"error={self.error}"
        when = f"{self.when}{'' if self.once else '+'}"
        options = ["strace", "-f", "-q", "-o", str(log), "-e", f"trace={self.call}"]
        options += ["-e", "signal=none", "-e", f"inject={self.call}:{how}:when={when}"]
        return options + [part for path in paths for part in ("-P", str(path))]


class Injection:
    """A strace attached to a running process."""

    def __init__(self, fault: Fault, pid: int, paths: Sequence[Path], log: Path) -> None:
        """Attach."""
        self.log = log
        self._strace = subprocess.Popen(
            [*fault.options(paths, log), "-p", str(pid)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._pid = pid

    def attached(self) -> bool:
        """Return whether every thread is being watched, or the process has ended."""
        try:
            tasks = list(Path(f"/proc/{self._pid}/task").iterdir())
            return all("TracerPid:\t0\n" not in (one / "status").read_text() for one in tasks)
        except OSError:
            return True

    def struck(self) -> int:
        """Return how often a call was made to fail so far."""
        return struck_in(self.log)

    def detach(self) -> None:
        """Let the process alone again."""
        if self._strace.poll() is None:
            self._strace.send_signal(signal.SIGINT)
        try:
            self._strace.wait(timeout=5)
        except subprocess.TimeoutExpired:
            # Now and then strace waits for ever for a process that ends while it is being made to
            # fail, and the process for strace.
            self._strace.kill()
            self._strace.wait()


def struck_in(log: Path) -> int:
    """Return how often strace made a call fail, or late, by its log."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return 0
    return text.count("(INJECTED)") + text.count("(DELAYED)")


async def until(condition: Any, within_s: float) -> bool:
    """Wait for a condition; return whether it came."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.01)
    return True

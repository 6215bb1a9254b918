"""A whole run without Ray that can be killed anywhere: moderator, C1, two workers, clients.

Every process is forked by the spawner, so each is back in milliseconds and a run holds many kills.
`PlainStack` starts them, starts them again when they died, arms failpoints, sets strace on them,
and leaves the evidence that `tests.checker` reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from hcna_ray.core.errors import StoreUnavailable
from tests.checker.recorder import Caller, History, steady_now
from tests.faults.spawner import SpawnerLink
from tests.support.c1 import ADMIN_KEY
from tests.support.checked_run import moving
from tests.support.checked_tasks import TASK_TYPES
from tests.support.read_store import export
from tests.support.sources import commit

POLICY: dict[str, Any] = {
    "heartbeat_s": 0.5,
    "lease_ttl_s": 10.0,
    "lease_grace_s": 3.0,
    "max_concurrent_tasks": 8,
    "queue_tasks_max": 60,
    "concurrency_default": 1,
    "exchange_wait_s": 1.0,
    "disk_free_bytes_min": 0,
}
SELF_STOP_S = 6.0
WORKERS = {"W1": 2, "W2": 1}
CLIENTS = 3
#: Of the machine's two clocks; see `tests.support.checked_run`.
CLOCK_ERROR_S = 0.05
ACCEPTING_S = 10.0
START_S = 30.0
DRAIN_S = 45.0
_REQUEST_S = 20.0
_AGAIN_S = 0.05
_OVER = ("completed", "failed", "cancelled", "expired")
#: Ends of a process that a kill, or nobody, explains.
_EXPECTED = (-signal.SIGKILL, 0)


async def eventually(look: Callable[[], bool], timeout_s: float, every_s: float = 0.005) -> bool:
    """Wait until something is so; tell whether it came to be."""
    end = time.monotonic() + timeout_s
    while not look():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(every_s)
    return True


@dataclass
class _Kept:
    """A process that is started again whenever it has ended."""

    role: str
    name: str
    arguments: Callable[[], dict[str, Any]]
    pid: int = 0
    starts: int = 0
    #: Cleared while nobody may start it again.
    free: asyncio.Event = field(default_factory=asyncio.Event)
    up: asyncio.Event = field(default_factory=asyncio.Event)


class PlainStack:
    """The processes of one run. Used inside one event loop."""

    def __init__(
        self,
        folder: Path,
        spawner: Path,
        *,
        seed: int,
        policy: dict[str, Any] | None = None,
        moderator: dict[str, Any] | None = None,
    ) -> None:
        """Name everything; `start` starts it.

        Args:
            folder: The run's directory; it is there.
            spawner: The spawner's socket.
            seed: Of what clients do.
            policy: What differs from `POLICY`.
            moderator: More arguments of the moderator's role.
        """
        self.folder, self.seed = folder, seed
        self.home = folder / "home"
        self.store = self.home / "queue.db"
        self.policy = {**POLICY, **(policy or {})}
        self._more = moderator or {}
        self._failpoints = self.home / "failpoints"
        self._spawner_socket = spawner
        self.spawner = SpawnerLink(spawner, self._failpoints)
        self.kept: dict[str, _Kept] = {}
        self.faults: list[dict[str, Any]] = []
        self.violations: list[str] = []
        self.started = time.time()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything and wait until it answers."""
        for name in WORKERS:
            (self.home / "run" / name).mkdir(parents=True)
        await self.spawner.open()
        self._keep(_Kept("moderator", "moderator", self._moderator))
        self._keep(_Kept("c1", "c1", self._c1))
        for name in WORKERS:
            self._keep(_Kept("agent", name, lambda name=name: self._agent(name)))
        for one in self.kept.values():
            async with asyncio.timeout(START_S):
                await one.up.wait()

    async def stop(self) -> None:
        """End every process; harmless twice."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(AttributeError):
            await self.spawner.close()

    def _keep(self, one: _Kept) -> None:
        one.free.set()
        self.kept[one.name] = one
        self.spawn(self._keep_alive(one))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside, until the stack is stopped."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep_alive(self, one: _Kept) -> None:
        while not self._closing:
            await one.free.wait()
            arguments = one.arguments()
            one.starts += 1
            log = self.folder / f"{one.name}.log"
            one.pid = await self.spawner.start(one.role, log, arguments, place=one.name)
            socket = Path(str(arguments.get("socket", arguments.get("attach_socket"))))
            await self._appears(socket, one.pid)
            one.up.set()
            status = await self.spawner.ended(one.pid)
            one.up.clear()
            if status not in _EXPECTED and not self._closing:
                said = log.read_text(errors="replace")[-2000:]
                self.violations.append(f"{one.name} ended by itself with {status}: {said}")
            await asyncio.sleep(0.02)

    async def _appears(self, socket: Path, pid: int) -> None:
        """Wait until a process listens, or has ended."""
        await eventually(lambda: socket.exists() or not self.spawner.is_alive(pid), START_S)

    def _moderator(self) -> dict[str, Any]:
        socket = self.folder / "m1"
        socket.unlink(missing_ok=True)
        told = {"store": str(self.store), "socket": str(socket), "policy": self.policy}
        return {**told, **self._more}

    def _c1(self) -> dict[str, Any]:
        socket = self.folder / "c1"
        socket.unlink(missing_ok=True)
        return {
            "home": str(self.home),
            "store": str(self.store),
            "moderator_socket": str(self.folder / "m1"),
            "socket": str(socket),
        }

    def _agent(self, name: str) -> dict[str, Any]:
        number = self.kept[name].starts + 1
        socket = self.folder / f"a{name}-{number}"
        return {
            "worker": name,
            "incarnation": f"{name}-{number}",
            "home": str(self.home),
            "moderator_socket": str(self.folder / "m1"),
            "attach_socket": str(socket),
            "spawner": str(self._spawner_socket),
            "failpoints": str(self._failpoints),
            "slots": WORKERS[name],
            "heartbeat_s": self.policy["heartbeat_s"],
            "self_stop_s": SELF_STOP_S,
        }

    # -- faults ----------------------------------------------------------------------------------

    def note(self, target: str, at: float, **more: Any) -> None:
        """Write down that something was killed."""
        self.faults.append({"kind": "kill", "target": target, "at": at, **more})

    def place(self, who: str) -> Path:
        """Return the directory in which a kind of process looks for armed failpoints."""
        folder = self._failpoints / who
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def arm(self, who: str, point: str, action: str) -> Callable[[], float | None]:
        """Arm a failpoint; return what tells when it fired."""
        order = self.place(who) / point
        fired = order.with_name(f"{point}.fired")
        fired.unlink(missing_ok=True)
        written = order.with_name(f".{point}")
        written.write_text(action)
        written.rename(order)

        def when() -> float | None:
            # Renaming touches the change time of the file, and nothing else does.
            try:
                return fired.stat().st_ctime
            except FileNotFoundError:
                return None

        return when

    def disarm(self, who: str, point: str) -> None:
        """Take an order back that nobody has met."""
        (self.place(who) / point).unlink(missing_ok=True)

    def kill(self, name: str) -> float:
        """SIGKILL to one of the processes that are kept; return when."""
        at = time.time()
        with suppress(ProcessLookupError):
            os.kill(self.kept[name].pid, signal.SIGKILL)
        return at

    async def hold(self, who: str) -> Callable[[], Awaitable[int]]:
        """Have the next process of a kind stand still at its first step; see `trace`."""
        place = self.place(who)
        (place / "hold").touch()

        async def held() -> int:
            if not await eventually(lambda: any(place.glob("held.*")), START_S):
                raise TimeoutError(f"no {who} was started")
            found = list(place.glob("held.*"))
            pid = int(found[0].name.partition(".")[2])
            found[0].unlink()
            await eventually(lambda: _state(pid) == "T", START_S)
            return pid

        return held

    async def trace(self, pid: int, inject: str, paths: list[Path]) -> subprocess.Popen[bytes]:
        """Set strace on a process that stands still, and let it go."""
        command = ["strace", "-f", "-q", "-o", str(self.folder / "strace.log"), "-p", str(pid)]
        calls = inject.partition(":")[0]
        command += ["-e", f"trace={calls}", "-e", f"inject={inject}", "-e", "signal=none"]
        command += [part for path in paths for part in ("-P", str(path))]
        with (self.folder / "strace.err").open("ab") as log:
            tracer = subprocess.Popen(  # noqa: ASYNC220 - a millisecond
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        await eventually(lambda: _traced(pid) or tracer.poll() is not None, START_S)
        os.kill(pid, signal.SIGCONT)
        return tracer

    # -- the end ---------------------------------------------------------------------------------

    async def drain(self) -> float:
        """Wait until nothing moves any more; return when. What still does is for the checker."""
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end:
            with suppress(StoreUnavailable):
                if not await moving(self.store):
                    break
            await asyncio.sleep(0.1)
        return time.time()

    async def left(self) -> int:
        """Return how many tasks have not ended that would by themselves."""
        return await moving(self.store)

    def write_evidence(self, drained_at: float, **more: Any) -> None:
        """Write the schedule, and the store's dump."""
        schedule = {
            "format": "hcna.schedule.v1",
            "seed": self.seed,
            "commit": commit(),
            "started_at": self.started,
            "drained_at": drained_at,
            "clock_error_s": CLOCK_ERROR_S,
            "settings": self.policy,
            "workers_online": list(WORKERS),
            "effects_task_types": list(TASK_TYPES),
            "faults": sorted(self.faults, key=lambda fault: float(fault["at"])),
            "bounds_s": {"moderator_accepting": ACCEPTING_S},
            "canaries": [ADMIN_KEY],
            **more,
        }
        (self.folder / "schedule.json").write_text(json.dumps(schedule, indent=2))
        export(self.store, self.folder / "store.jsonl")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _traced(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return "TracerPid:\t0" not in status


class PlainClients:
    """Clients of C1 that submit, ask, cancel, replay and repeat, and write everything down."""

    def __init__(self, stack: PlainStack) -> None:
        """Open the connections."""
        self._stack, self._seed = stack, stack.seed
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(stack.folder / "c1")),
            base_url="http://localhost",
            headers={"Authorization": f"Bearer {ADMIN_KEY}"},
            timeout=_REQUEST_S,
        )
        self._effects = str(stack.folder / "effects.jsonl")
        self._nonces = 0
        self.ids: list[str] = []
        #: When submissions that were accepted were sent, and answered.
        self.accepted: list[tuple[float, float]] = []
        self.busy = True
        #: Artifacts that were answered with 201, and how much of others with 202.
        self.uploaded: dict[str, bytes] = {}
        self._kept: dict[str, int] = {}

    def start(self) -> None:
        """Let them begin."""
        for number in range(CLIENTS):
            self._stack.spawn(self._client(number))

    async def accepted_after(self, instant: float, timeout_s: float) -> float | None:
        """Wait for a submission sent after an instant to be accepted; return how long it took."""

        def found() -> list[float]:
            # The newest ones are last.
            return [told for sent, told in self.accepted[-50:] if sent >= instant]

        if not await eventually(lambda: bool(found()), timeout_s):
            return None
        return min(found()) - instant

    def _caller(self, name: str) -> Caller:
        return Caller(self._http, History(self._stack.folder / "history.jsonl", name, "owner"))

    def _body(self, draw: random.Random) -> dict[str, Any]:
        self._nonces += 1
        nonce = f"n-{self._seed}-{self._nonces}"
        payload: dict[str, Any] = {"effects": self._effects, "nonce": nonce}
        body: dict[str, Any] = {
            "task_type": draw.choices(TASK_TYPES, (1, 3))[0],
            "payload": payload,
            "metadata": {"nonce": nonce},
            "priority": draw.choice((0, 5, 5, 5, 9)),
        }
        kind = draw.random()
        if kind < 0.15:
            payload["seconds"] = draw.uniform(0.05, 0.5)
        elif kind < 0.25:
            payload["fail_until"] = draw.choice((2, 3, 9))
        elif kind < 0.29:
            payload["die_until"] = draw.choice((2, 9))
        place = draw.random()
        if place < 0.10:
            body["requires"] = {"worker": draw.choice((*WORKERS, "W9"))}
        elif place < 0.12:
            body["requires"] = {"cpu": 1.0}
        elif place < 0.25:
            body["ordering_key"] = draw.choice(("north", "south"))
        elif place < 0.35:
            body["concurrency_key"] = draw.choice(("left", "right"))
        if draw.random() < 0.05 and body.get("requires") != {"worker": "W9"}:
            due = datetime.now(UTC) + timedelta(seconds=draw.uniform(0.0, 2.0))
            body["run_at"] = due.isoformat()
        if draw.random() < 0.06 and self.ids:
            body["depends_on"] = [draw.choice(self.ids[-20:])]
        return body

    async def submit(self, caller: Caller, body: dict[str, Any], key: str | None) -> str | None:
        """Submit once; return the task's id if it was accepted."""
        sent = steady_now()
        response = await caller.submit(body, key=key)
        if response.status_code != 202:
            await asyncio.sleep(_AGAIN_S)
            return None
        self.accepted.append((sent, steady_now()))
        task = str(response.json()["task_id"])
        self.ids.append(task)
        return task

    async def _client(self, number: int) -> None:
        draw = random.Random(f"{self._seed}-{number}")
        caller = self._caller(f"c{number}")
        mine: list[str] = []
        turn = 0
        while True:
            await asyncio.sleep(draw.uniform(0.02, 0.12))
            if self.busy:
                turn += 1
                try:
                    await self._turn(caller, draw, f"k-{self._seed}-{number}-{turn}", mine)
                except httpx.TransportError:
                    await asyncio.sleep(_AGAIN_S)

    async def _turn(self, caller: Caller, draw: random.Random, key: str, mine: list[str]) -> None:
        body = self._body(draw)
        given = key if draw.random() < 0.5 else None
        sends = 2 if given and draw.random() < 0.3 else 1
        try:
            found = await asyncio.gather(
                *(self.submit(caller, body, given) for _ in range(sends)), return_exceptions=True
            )
            for one in found:
                if isinstance(one, BaseException):
                    raise one
                if one is not None:
                    mine.append(one)
        except httpx.TransportError:
            if given is None:
                raise
            # Nobody knows whether it was accepted; the same key must lead to the same task.
            await asyncio.sleep(_AGAIN_S)
            again = await self.submit(caller, body, given)
            if again is not None:
                mine.append(again)
        if given and draw.random() < 0.1:
            await caller.submit({**body, "priority": 1}, key=given)
        if not mine:
            return
        chosen = draw.choice(mine[-5:])
        what = draw.random()
        if what < 0.15:
            await caller.cancel(chosen)
        elif what < 0.22:
            await caller.retry(chosen)
        elif what < 0.50:
            await caller.get(chosen)

    async def poke(self, until: Callable[[], bool], seconds: float, **more: Any) -> None:
        """Have a task run, and if it takes long be cancelled, again and again until something."""
        draw = random.Random(f"{self._seed}-poke-{self._nonces}")
        caller = self._caller(f"p{self._nonces}")
        while not until():
            body = self._body(draw)
            for name in ("requires", "ordering_key", "concurrency_key", "run_at", "depends_on"):
                body.pop(name, None)
            body["priority"] = 9
            payload: dict[str, Any] = {"effects": self._effects, "nonce": body["metadata"]["nonce"]}
            if seconds:
                payload["seconds"] = seconds
            if more.get("dies"):
                payload["die_until"] = 9
            if more.get("heavy"):
                body["requires"] = {"cpu": 1.0}
            body["payload"] = payload
            with suppress(httpx.TransportError):
                task = await self.submit(caller, body, None)
                if task is None or not seconds:
                    await asyncio.sleep(_AGAIN_S)
                    continue
                for _ in range(40):
                    seen = await caller.get(task)
                    if seen.status_code == 200 and seen.json()["status"] == "running":
                        break
                    await asyncio.sleep(_AGAIN_S)
                await caller.cancel(task)

    async def watch(self) -> None:
        """GET every task until it was seen ended, before anybody may delete it."""
        caller = self._caller("watcher")
        over: set[str] = set()
        while True:
            for task in [one for one in self.ids if one not in over]:
                with suppress(httpx.TransportError):
                    seen = await caller.get(task)
                    if seen.status_code == 404 or seen.json().get("status") in _OVER:
                        over.add(task)
            await asyncio.sleep(_AGAIN_S)

    async def look(self) -> None:
        """GET every task."""
        caller = self._caller("last")
        for task in dict.fromkeys(self.ids):
            for _ in range(20):
                with suppress(httpx.TransportError):
                    if (await caller.get(task)).status_code in (200, 404):
                        break
                await asyncio.sleep(_AGAIN_S)

    async def upload(self) -> None:
        """Upload artifacts in parts, for ever; what was answered must be there."""
        draw = random.Random(f"{self._seed}-upload")
        while self.busy:
            data = draw.randbytes(draw.choice((700, 9000, 60_000)))
            name, size, offset = hashlib.sha256(data).hexdigest(), len(data), 0
            while offset < size:
                end = min(size, offset + -(-size // 3))
                said = {"Content-Range": f"bytes {offset}-{end - 1}/{size}"}
                try:
                    answer = await self._http.put(
                        f"/artifacts?sha256={name}", content=data[offset:end], headers=said
                    )
                except httpx.TransportError:
                    await asyncio.sleep(_AGAIN_S)
                    continue
                if answer.status_code == 201:
                    self.uploaded[name] = data
                    break
                if answer.status_code not in (202, 409):
                    await asyncio.sleep(_AGAIN_S)
                    continue
                received = int(answer.json()["received"])
                if answer.status_code == 409 and received < self._kept.get(name, 0):
                    self._stack.violations.append(
                        f"of artifact {name} {self._kept[name]} bytes were kept, now {received}"
                    )
                    self._kept[name] = received
                offset = self._kept[name] = received

    async def look_at_uploads(self) -> None:
        """GET every artifact that was answered."""
        for name, data in list(self.uploaded.items()):
            answer = await self._http.get(f"/artifacts/{name}")
            if answer.status_code != 200 or answer.content != data:
                self._stack.violations.append(
                    f"artifact {name} of {len(data)} bytes was answered with 201, and is now "
                    f"{answer.status_code} with {len(answer.content)} bytes"
                )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

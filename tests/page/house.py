"""C1 on loopback for a browser: the real application and the moderator's real rules, without Ray.

Its worker is made of paper (`tests.support.paper_worker`), so a test says what it does and when.
The clock runs, and can be put forward.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from hcna_ray.api.ids import UlidIds
from hcna_ray.core.models import FailureKind, Progress, TaskError, Token
from hcna_ray.runtime.messages import Grant, Heartbeat, Offer, Report, ReportKind
from hcna_ray.runtime.requests import Pending
from hcna_ray.store.base import TaskReader
from tests.support.c1 import Composite, a_composite
from tests.support.paper_worker import PaperClock, PaperWorker

T = TypeVar("T")
VIEWER_KEY = "hcna_viewer-key-of-the-tests"
OPERATOR_KEY = "hcna_operator-key-of-the-tests"
#: How often the worker is heard of, and the moderator looks at its clock.
BEAT_S = 0.1
SLOTS = 4
LOAD = {"cpu_percent": 37.0, "memory_percent": 52.0, "disk_free_bytes": 91 << 30}
START_S = 20.0


class RunningClock(PaperClock):
    """The time it is, and what a test has added to it."""

    def __init__(self) -> None:
        super().__init__()
        self._added = 0.0

    def now(self) -> float:
        return time.time() + self._added

    def elapsed(self) -> float:
        return time.monotonic() + self._added

    def advance(self, seconds: float) -> None:
        self._added += seconds


class House:
    """One C1, its moderator and a worker W1. A test calls what it has from its own thread."""

    def __init__(self, composite: Composite, loop: asyncio.AbstractEventLoop) -> None:
        self.c1 = composite
        self.url = ""
        self.beats = True
        self._loop = loop
        self._desk = composite.moderator.desk
        self._worker = self._joined()
        self._parked: dict[int, Pending] = {}
        #: What was granted to each slot and has not ended; the first of them runs.
        self._held: dict[int, list[Offer]] = {}

    def _joined(self) -> PaperWorker:
        return self.c1.moderator.join(address="10.0.0.2", cpu=8.0, mem_gb=16.0)

    def do(self, what: Callable[[], T]) -> T:
        """Do something on the loop's thread; return what came of it."""

        async def done() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(10.0)

    # -- what a test does ------------------------------------------------------------------------

    def running(self) -> list[str]:
        """Return the ids of the tasks that run."""
        return self.do(lambda: [offers[0].task_id for offers in self._held.values() if offers])

    def complete(self, task_id: str, result: bytes = b'{"said":"hello"}') -> None:
        """Let a running task end well."""
        self.do(lambda: self._end(task_id, ReportKind.COMPLETED, result=result))

    def fail(self, task_id: str, message: str, kind: FailureKind = FailureKind.ERROR) -> None:
        """Let a running task fail."""
        error = TaskError(
            kind=kind,
            message=message,
            type="ValueError",
            traceback=f"Traceback (most recent call last):\nValueError: {message}",
        )
        self.do(lambda: self._end(task_id, ReportKind.FAILED, error=error))

    def progress(self, task_id: str, percent: float, message: str) -> None:
        """Let a running task say how far it is."""

        def tell() -> None:
            at = self._desk.clock.now()
            offer = self._held[self._slot_of(task_id)][0]
            self._worker.report(
                Report(
                    ReportKind.PROGRESS,
                    task_id,
                    Token(*offer.token),
                    at,
                    progress=Progress(at=at, percent=percent, message=message),
                )
            )

        self.do(tell)

    def later(self, seconds: float) -> None:
        """Let time pass in which W1 is heard of."""

        def pass_by() -> None:
            left = seconds
            while left > 0:
                self._desk.tick(min(left, 1.0))
                self._beat()
                left -= 1.0

        self.do(pass_by)

    def silence(self, seconds: float) -> None:
        """Let nothing be heard of W1 any more, and so much time pass."""

        def hush() -> None:
            self.beats = False
            self._desk.tick(seconds)

        self.do(hush)

    def back(self) -> None:
        """Let W1 come back as a new life of itself; what it ran is lost."""

        def again() -> None:
            self._parked.clear()
            self._held.clear()
            self._worker = PaperWorker(
                self._desk,
                incarnation=self._worker.incarnation + "b",
                task_types=self._worker.task_types,
                **self._worker.has,
            )
            self.beats = True

        self.do(again)

    def stop_moderator(self) -> None:
        """Let the moderator answer nobody."""
        self.do(self.c1.moderator.kill)

    def start_moderator(self) -> None:
        """Let a new moderator begin from the store."""

        def again() -> None:
            self.c1.moderator.revive()
            self._parked.clear()
            self._worker.hello()

        self.do(again)

    def lose_store(self) -> None:
        """Let C1 be unable to read the store; M1 has its own way to it."""

        def gone() -> TaskReader:
            raise OSError("the disk is gone")

        self._read_with(gone)

    def find_store(self) -> None:
        """Let C1 read the store again."""
        self._read_with(self._desk.memory.reader)

    def _read_with(self, open_reader: Callable[[], TaskReader]) -> None:
        def opened_anew() -> None:
            reads = self.c1.services.reads
            reads._reader, reads._open_reader = None, open_reader

        self.do(opened_anew)

    # -- on the loop -----------------------------------------------------------------------------

    async def live(self) -> None:
        """Be a worker, and the moderator's look at the clock."""
        while True:
            if self.beats and not self.c1.moderator.down:
                self._beat()
                for slot in range(SLOTS):
                    self._take(slot)
            if not self.c1.moderator.down:
                self._desk.tick()
            await asyncio.sleep(BEAT_S)

    def _beat(self) -> None:
        self._desk.ask(
            Heartbeat(
                worker="W1",
                incarnation=self._worker.incarnation,
                telemetry={"payload": LOAD},
                slots=SLOTS,
            )
        )

    def _take(self, slot: int) -> None:
        if self._held.get(slot):
            return
        parked = self._parked.pop(slot, None) or self._worker.exchange(slot)
        grant = self._desk.answer(parked)
        if not isinstance(grant, Grant):
            self._parked[slot] = parked
        elif grant.offers:
            self._held[slot] = list(grant.offers)
            self._start(slot)

    def _start(self, slot: int) -> None:
        if self._held[slot]:
            self._worker.report(self._worker.started(self._held[slot][0]))

    def _slot_of(self, task_id: str) -> int:
        for slot, offers in self._held.items():
            if offers and offers[0].task_id == task_id:
                return slot
        raise AssertionError(f"{task_id} does not run")

    def _end(self, task_id: str, kind: str, **more: Any) -> None:
        slot = self._slot_of(task_id)
        self._worker.report(self._worker.ended(self._held[slot].pop(0), kind, **more))
        self._start(slot)


@contextmanager
def a_house(home: Path, **limits: Any) -> Iterator[House]:
    """Run a house on a thread of its own, on a port that was free; ``limits`` are C1's."""
    found: list[House] = []
    ready, over = threading.Event(), threading.Event()
    trouble: list[BaseException] = []

    async def run() -> None:
        async with a_composite(
            home, limits=limits, ids=UlidIds(), clock=RunningClock()
        ) as composite:
            composite.keys.add(VIEWER_KEY, name="watcher", role="viewer")
            composite.keys.add(OPERATOR_KEY, name="operator", role="operator")
            house = House(composite, asyncio.get_running_loop())
            config = uvicorn.Config(
                composite.app,
                "127.0.0.1",
                0,
                lifespan="off",
                log_level="critical",
                timeout_graceful_shutdown=1,
                ws="none",
            )
            server = uvicorn.Server(config)
            living = asyncio.create_task(house.live())
            serving = asyncio.create_task(server.serve())
            while not server.started:  # noqa: ASYNC110 - it sets no event
                await asyncio.sleep(0.01)
            house.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            found.append(house)
            ready.set()
            await asyncio.to_thread(over.wait)
            living.cancel()
            server.should_exit = True
            await asyncio.gather(living, serving, return_exceptions=True)

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            trouble.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="house")
    thread.start()
    try:
        assert ready.wait(START_S), "the house does not come up"
        if not found:
            raise trouble[0]
        yield found[0]
    finally:
        over.set()
        thread.join(START_S)

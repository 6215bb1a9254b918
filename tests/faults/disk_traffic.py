"""Clients and a worker made of paper, who talk to a plain moderator over its socket.

No executor runs: an offer is reported as started and then as ended, as a worker would. A report is
kept until the next number of its slot was answered, and sent again until then.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ulid import ULID

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import FailureKind, Needs, RetryPolicy, TaskError, TaskSpec
from hcna_ray.runtime.messages import (
    Accepted,
    Exchange,
    Grant,
    Heartbeat,
    Hello,
    Offer,
    Report,
    ReportKind,
    SubmitBatch,
)
from hcna_ray.runtime.requests import Cancel, Retry
from tests.support.moderator_process import SocketLink

TASK_TYPE = "echo"


@dataclass
class PaperWorker:
    """An agent and its slots; every offer ends at once."""

    name: str
    link: SocketLink
    draw: random.Random
    slots: int = 2
    task_types: tuple[str, ...] = (TASK_TYPE,)
    heartbeat_s: float = 0.5
    #: Share of attempts that fail.
    failing: float = 0.1
    #: Seconds between a heartbeat's sending and the answer, each time.
    beats_s: list[float] = field(default_factory=list)
    ended: int = 0
    stopping: bool = False

    async def run(self) -> None:
        """Work until `stopping` is set and every report was confirmed."""
        self._known = asyncio.Lock()
        await self._hello()
        beats = asyncio.create_task(self._beat())
        try:
            await asyncio.gather(*(self._slot(number) for number in range(self.slots)))
        finally:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)

    async def _hello(self) -> None:
        hello = Hello(
            worker=self.name,
            node_id=f"HCNA-{self.name}--test",
            incarnation=f"{self.name}-1",
            address="",
            cpu=4.0,
            mem_gb=8.0,
            gpu=0.0,
            resources=((self.name, 1.0),),
            labels=(),
            task_types=self.task_types,
        )
        while True:
            try:
                await self.link.ask(hello)
                return
            except HcnaError:
                await asyncio.sleep(0.05)

    async def _beat(self) -> None:
        sent = time.monotonic()
        while True:
            began = time.monotonic()
            beat = Heartbeat(worker=self.name, incarnation=f"{self.name}-1", telemetry={})
            try:
                reply = await self.link.ask(beat)
            except HcnaError:
                await asyncio.sleep(0.05)
                continue
            # A lease counts from the sending of the last heartbeat that was answered.
            self.beats_s.append(time.monotonic() - sent)
            sent = began
            if not reply.known:
                await self._hello()
            await asyncio.sleep(self.heartbeat_s)

    async def _slot(self, slot: int) -> None:
        seq, reports = 1, ()
        while not self.stopping or reports:
            exchange = Exchange(
                worker=self.name,
                incarnation=f"{self.name}-1",
                slot=slot,
                seq=seq,
                reports=reports,
            )
            try:
                grant = await self.link.ask(exchange)
            except HcnaError:
                await asyncio.sleep(0.05)
                continue
            assert isinstance(grant, Grant), grant
            if grant.hello:
                await self._hello()
                continue
            seq += 1
            reports = tuple(one for offer in grant.offers for one in self._work(offer))
            self.ended += len(grant.offers)

    def _work(self, offer: Offer) -> list[Report]:
        now = time.time()
        started = Report(ReportKind.STARTED, offer.task_id, offer.token, now)
        if self.draw.random() < self.failing:
            error = TaskError(kind=FailureKind.ERROR, message="it fails, as drawn")
            ended = Report(
                ReportKind.FAILED, offer.task_id, offer.token, now, started_at=now, error=error
            )
        else:
            result = json.dumps({"id": offer.task_id, "attempt": offer.token[1]}).encode()
            ended = Report(
                ReportKind.COMPLETED, offer.task_id, offer.token, now, started_at=now, result=result
            )
        return [started, ended]


@dataclass
class Submitter:
    """A client that submits, cancels and replays."""

    number: int
    link: SocketLink
    draw: random.Random
    ids: list[str] = field(default_factory=list)
    #: Tasks for a worker that does not exist: they wait until they are cancelled.
    waiting: list[str] = field(default_factory=list)
    asked: int = 0

    async def run(self, goes_on: Callable[[], bool]) -> None:
        """Ask one thing after the other while ``goes_on``."""
        while goes_on():
            try:
                await self._ask()
            except HcnaError:
                await asyncio.sleep(0.02)
            self.asked += 1

    async def _ask(self) -> None:
        what = self.draw.random()
        if self.ids and what < 0.15:
            task = self.waiting.pop() if self.waiting else self.draw.choice(self.ids[-8:])
            await self.link.ask(Cancel(task_id=task, reason="as drawn", principal="owner"))
        elif self.ids and what < 0.25:
            task = self.draw.choice(self.ids[-8:])
            await self.link.ask(Retry(task_id=task, principal="owner"))
        else:
            count = self.draw.choice((1, 1, 1, 2, 5))
            batch = SubmitBatch(specs=tuple(self._spec() for _ in range(count)))
            for spec, one in zip(batch.specs, await self.link.ask(batch), strict=True):
                if isinstance(one, Accepted):
                    self.ids.append(one.task_id)
                    if spec.needs.worker is not None:
                        self.waiting.append(one.task_id)

    def _spec(self) -> TaskSpec:
        size = self.draw.choice((20, 200, 1000, 6000))
        payload = {"message": self.draw.randbytes(size // 2).hex()}
        key = f"k-{self.number}-{self.asked}" if self.draw.random() < 0.3 else None
        return TaskSpec(
            id=f"task-{ULID()}",
            task_type=TASK_TYPE,
            payload=json.dumps(payload).encode(),
            accepted_at=time.time(),
            principal="owner",
            priority=self.draw.choice((0, 5, 9)),
            idempotency_key=key,
            fingerprint=key or "",
            ordering_key="north" if self.draw.random() < 0.1 else None,
            needs=Needs(worker="W9" if self.draw.random() < 0.2 else None),
            retry=RetryPolicy(max_attempts=self.draw.choice((1, 2)), backoff_s=0.05),
        )

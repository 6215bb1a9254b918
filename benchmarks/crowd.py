"""A crowd for the real moderator: many tasks of all kinds, and workers that are values.

No process, no network: `Crowd` speaks to a `hcna_ray.runtime.moderator.Moderator` as agents and
slots do, by messages, and does each granted task in no time. What is measured around it is what the
moderator and its store cost. `benchmarks.long_queue` and `benchmarks.simulation` are built on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcna_ray.core.clock import Clock
from hcna_ray.core.models import TaskSpec, Token
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
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.requests import Pending, Request

#: Every tenth task waits for the one that came first of its ten, every tenth has one of so many
#: concurrency keys, and every hundredth one of ten that many share.
KEYS = 10_000
HOT_KEYS = 10
#: Seconds between two heartbeats of a worker.
BEAT_S = 5.0
TASK_TYPES = ("echo", "count", "resize", "index")
QUEUES = ("default", "mail", "night")


def mixed_specs(first: int, count: int, *, now: float, prefix: str = "t") -> Iterator[TaskSpec]:
    """Return ``count`` specs of a mixed queue: the same ones for the same numbers.

    Of a million 100 000 have a dependency, 100 000 one of `KEYS` concurrency keys, 10 000 one of
    `HOT_KEYS`, 50 000 an ordering key, 100 000 an idempotency key, and 10 000 start in an hour.

    Args:
        first: Number of the first one; a multiple of ten.
        count: How many.
        now: The instant.
        prefix: Begins every id.
    """
    for number in range(first, first + count):
        digit, ten = number % 10, number // 10
        more: dict[str, Any] = {}
        if digit == 9:
            more["depends_on"] = (_name(prefix, number - 9),)
        elif digit == 3:
            more["concurrency_key"] = f"key-{ten % KEYS}"
        elif digit == 5 and ten % 2:
            more["ordering_key"] = f"line-{ten % 5000}"
        elif digit == 6:
            more["idempotency_key"] = f"{prefix}-{number * 7919 % 1_000_003}"
            more["fingerprint"] = "0" * 64
        elif digit == 7 and not ten % 10:
            more["concurrency_key"] = f"hot-{ten // 10 % HOT_KEYS}"
        elif digit == 8 and not ten % 10:
            more["run_at"] = now + 3600.0
        yield TaskSpec(
            id=_name(prefix, number),
            task_type=TASK_TYPES[ten % len(TASK_TYPES)],
            queue=QUEUES[ten % len(QUEUES)],
            payload=b'{"message":"hello"}',
            accepted_at=now,
            principal=f"user-{ten % 20}",
            batch_id=f"batch-{prefix}-{number // 1000}",
            **more,
        )


def plain_specs(first: int, count: int, *, now: float, prefix: str = "p") -> Iterator[TaskSpec]:
    """Return ``count`` echo tasks."""
    for number in range(first, first + count):
        yield TaskSpec(
            id=_name(prefix, number),
            task_type="echo",
            payload=b'{"message":"hello"}',
            accepted_at=now,
            principal="user-1",
        )


def _name(prefix: str, number: int) -> str:
    # As long as a real id, and in the order of acceptance like one.
    return f"task-{prefix}{number:026d}"


class CpuClock:
    """Both clocks go with this process's CPU time.

    Nobody falls silent and nothing is late because a shared machine was busy with something else.
    """

    def __init__(self) -> None:
        self._wall = time.time()

    def now(self) -> float:
        """Return the instant at which this process began, and what it has worked since."""
        return self._wall + time.process_time()

    def elapsed(self) -> float:
        """Return seconds of work."""
        return 1000.0 + time.process_time()


@dataclass(slots=True)
class Slot:
    """One slot of a simulated worker: what it was granted, and what it says next."""

    worker: str
    number: int
    seq: int = 0
    offers: Sequence[Offer] = ()


@dataclass(slots=True)
class Crowd:
    """Workers that take whatever they are granted and have done it when they ask again."""

    moderator: Moderator
    clock: Clock
    workers: int = 200
    slots_each: int = 2
    duration_ms: float = 1.0
    #: Slots that have something to say, in the order in which they will.
    talking: deque[Slot] = field(default_factory=deque)
    completed: int = 0
    #: When the sessions were renewed last, on the clock that never steps.
    beaten: float = 0.0
    #: Calls whose answer is still to come.
    _open: dict[int, Slot] = field(default_factory=dict)
    _kept: dict[int, Pending] = field(default_factory=dict)
    #: Instead of answering at once, hands in each batch; a test or a simulation may measure it.
    apply: Callable[[Sequence[Pending]], Outbound] | None = None

    def join(self) -> None:
        """Say hello for everybody; all slots are idle then."""
        for number in range(self.workers):
            name = f"W{number}"
            self.ask(
                Hello(
                    worker=name,
                    node_id=f"HCNA-{name}--bench",
                    incarnation="a",
                    address="127.0.0.1",
                    cpu=8.0,
                    mem_gb=16.0,
                    gpu=0.0,
                    resources=(),
                    labels=(("zone", f"z{number % 4}"),),
                    task_types=TASK_TYPES,
                )
            )
            self.talking.extend(Slot(name, slot) for slot in range(self.slots_each))

    @property
    def parked(self) -> int:
        """How many slots wait for work."""
        return len(self._open)

    def beat(self) -> None:
        """Renew every session, in one batch."""
        self.beaten = self.clock.elapsed()
        self._apply(
            [
                Pending(
                    Heartbeat(worker=f"W{number}", incarnation="a", telemetry={}),
                    _unused,
                    self.clock.elapsed(),
                )
                for number in range(self.workers)
            ]
        )

    def ask(self, *requests: Request) -> list[object]:
        """Hand in requests that are answered at once, in one batch; return their answers."""
        batch = [Pending(request, _unused, self.clock.elapsed()) for request in requests]
        outbound = self._apply(batch)
        answers = {id(pending): answer for pending, answer in outbound.answers}
        found = [answers[id(pending)] for pending in batch]
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
        return found

    def submit(self, specs: Sequence[TaskSpec]) -> None:
        """Have a batch accepted, every task of it."""
        (answers,) = self.ask(SubmitBatch(specs=tuple(specs)))
        assert isinstance(answers, list)
        refused = [one for one in answers if not isinstance(one, Accepted)]
        if refused:
            raise AssertionError(f"refused: {refused[0]}")

    def submit_each(self, specs: Sequence[TaskSpec]) -> None:
        """Have tasks accepted that came in calls of their own, gathered into one batch."""
        self.ask(*(SubmitBatch(specs=(spec,)) for spec in specs))

    def talk(self, at_once: int) -> int:
        """Let some slots deliver and ask, in one batch; return how many tasks that completed."""
        if self.clock.elapsed() - self.beaten > BEAT_S:
            self.beat()
        batch = []
        for _ in range(min(at_once, len(self.talking))):
            slot = self.talking.popleft()
            now = self.clock.now()
            slot.seq += 1
            reports = tuple(
                Report(
                    ReportKind.COMPLETED,
                    offer.task_id,
                    Token(*offer.token),
                    now,
                    started_at=now,
                    result=b'{"message":"hello"}',
                    duration_ms=self.duration_ms,
                )
                for offer in slot.offers
            )
            slot.offers = ()
            exchange = Exchange(
                worker=slot.worker,
                incarnation="a",
                slot=slot.number,
                seq=slot.seq,
                reports=reports,
            )
            pending = Pending(exchange, _unused, self.clock.elapsed())
            self._open[id(pending)], self._kept[id(pending)] = slot, pending
            batch.append(pending)
        before = self.completed
        self._apply(batch)
        return self.completed - before

    def _apply(self, batch: Sequence[Pending]) -> Outbound:
        outbound = (self.apply or self.moderator.apply)(batch)
        self.completed += len(outbound.ended)
        for pending, answer in outbound.answers:
            slot = self._open.pop(id(pending), None)
            self._kept.pop(id(pending), None)
            if slot is None:
                continue
            assert isinstance(answer, Grant), answer
            slot.offers = answer.offers
            self.talking.append(slot)
        return outbound


def _unused(_answer: object) -> None:
    raise AssertionError("the crowd reads answers from the outbound value")

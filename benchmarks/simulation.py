"""What two cores cannot run: a thousand workers and 10 000 tasks a second, in virtual time.

The moderator is the real one: each batch goes through `hcna_ray.runtime.moderator.Moderator.apply`
with its machine, its placement, its sessions and its timers, at a virtual instant. What surrounds
it is a model: requests arrive at random at C1's replicas, which gather them as
`hcna_ray.api.gather` does; calls take their way; one core of M1 unpacks calls and decides batches,
in turn, while a commit waits for the disk; slots do what they are granted, one after the other, and
ask again; agents send heartbeats. How long each part takes are the `Costs`: measured, and printed
with the result. Whatever exceeds its share of the one core shows as waiting.

The same seed and costs give the same table, on any machine.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import logging
import random
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hcna_ray.core.models import HEAVY_SLOT, Attempt, Fact, TaskSpec, Token
from hcna_ray.runtime.messages import (
    Exchange,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Offer,
    Report,
    ReportKind,
    SubmitBatch,
)
from hcna_ray.runtime.moderator import Moderator
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending, Request
from hcna_ray.store.memory import MemoryTaskStore

#: Above this share of its time a part is what holds the others up.
FULL = 0.95


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that the real parts take, as measured on one machine (``--measure``)."""

    #: CPU of the moderator's process to take in one actor call and to send its answer.
    call: float = 250e-6
    #: CPU to unpack one task of a call, and to pack one offer of an answer.
    task_on_the_way: float = 12e-6
    #: CPU of one batch, whatever is in it.
    batch: float = 400e-6
    #: CPU for each task accepted, granted and ended; decisions and statements.
    accept: float = 55e-6
    grant: float = 45e-6
    end: float = 60e-6
    #: CPU for each exchange and each heartbeat in a batch.
    exchange: float = 25e-6
    heartbeat: float = 10e-6
    #: What a commit waits for the disk. No CPU.
    fsync: float = 1.5e-3
    #: CPU of a C1 replica for one POST.
    post: float = 250e-6
    #: From one process to another, one way.
    way: float = 200e-6


@dataclass(frozen=True, kw_only=True)
class World:
    """What is simulated."""

    workers: int = 1000
    slots_each: int = 2
    replicas: int = 8
    #: POSTs a second, of one task each.
    rate: float = 10_000.0
    #: Length of the load; what is left is worked off afterwards, for at most as long again.
    seconds: float = 20.0
    #: How long tasks take: ``(share, mean seconds)`` by type; each is drawn exponentially.
    kinds: tuple[tuple[str, float, float], ...] = (
        ("echo", 0.80, 0.005),
        ("resize", 0.19, 0.100),
        ("index", 0.01, 2.000),
    )
    seed: int = 1


class VirtualClock:
    """Both clocks of `hcna_ray.core.clock.Clock`, put forward by the simulation."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        """Return the instant in seconds since the epoch."""
        return 1_767_225_600.0 + self.at

    def elapsed(self) -> float:
        """Return virtual seconds."""
        return 1000.0 + self.at


class ForgetfulStore(MemoryTaskStore):
    """Keeps no history, and no task that has ended: minutes of 10 000 a second fit in memory."""

    def append_facts(self, facts: Sequence[Fact]) -> int:
        """Count the lines of history."""
        self._must_write()
        self._numbers.put("last_fact", self._numbers.now.get("last_fact", 0) + len(facts))
        return self._numbers.now["last_fact"]

    def save_attempts(self, attempts: Sequence[Attempt]) -> None:
        """Drop them."""

    def forget(self, ids: Iterable[str]) -> None:
        """Drop ended tasks."""
        with self.transaction():
            for id_ in ids:
                self._delete(self._tasks.now[id_])


@dataclass
class Seen:
    """What happened, in virtual seconds."""

    accepted: list[float] = field(default_factory=list)
    #: From a POST's arrival at C1 to the start of its task.
    waited: list[float] = field(default_factory=list)
    renewed: list[float] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    completed: int = 0
    #: The same when the load ended, and what had been spent by then.
    in_time: int = 0
    spent_in_time: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    submitted: int = 0
    granted_twice: int = 0
    #: Seconds of the moderator's core, by what for; and the disk's.
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    #: Seconds of all C1 replicas, and of all slots.
    posting: float = 0.0
    working: float = 0.0
    #: Tasks not ended when the load ended, and when half of it had been sent.
    backlog: int = 0
    backlog_half: int = 0
    backlog_max: int = 0
    lost_sessions: int = 0
    ended_at: float = 0.0


class _Replica:
    """One C1 replica: gathers while a call is out."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.waiting: list[tuple[TaskSpec, float]] = []
        self.out: list[tuple[TaskSpec, float]] = []


class _Slot:
    def __init__(self, worker: str, number: int) -> None:
        self.worker, self.number = worker, number
        self.seq = 0
        self.reports: tuple[Report, ...] = ()


class Simulation:
    """One run. Events are ``(instant, number, what, arguments)`` on a heap."""

    def __init__(self, world: World, costs: Costs) -> None:
        self._world, self._costs = world, costs
        self._clock = VirtualClock()
        self._draw = random.Random(world.seed)
        self._store = ForgetfulStore()
        self._moderator = Moderator(
            self._store,
            Policy(
                max_concurrent_tasks=world.workers * (world.slots_each + 1),
                disk_free_bytes_min=0,
            ),
            clock=self._clock,
            jitter=lambda: self._draw.uniform(-1.0, 1.0),
            free_bytes=lambda: 1 << 40,
        )
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._replicas = [_Replica() for _ in range(world.replicas)]
        #: When the moderator's one core is free, and whether its writer has a batch.
        self._core_free = 0.0
        self._writing = False
        self._inbox: deque[Pending] = deque()
        self._wake_at = 0.0
        #: What becomes of an answer, by the call.
        self._callers: dict[int, tuple[Pending, Callable[[Any], None]]] = {}
        #: When each task that has not ended was posted, and which of them are accepted.
        self._posted_at: dict[str, float] = {}
        self._open: set[str] = set()
        self._durations: dict[str, float] = {}
        self._tasks = 0
        self.seen = Seen()

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> Seen:
        """Run to the end of the load and until everything is done, or as long again."""
        world = self._world
        for number in range(world.workers):
            self._hello(f"W{number}")
        self._after(0.5, self._arrive)
        self._after(0.5 + world.seconds / 2, self._note_half)
        self._after(0.5 + world.seconds, self._note_end)
        until = 0.5 + 2 * world.seconds
        while self._events and self._events[0][0] <= until:
            at, _, what, arguments = heapq.heappop(self._events)
            self._clock.at = at
            what(*arguments)
            if at > 0.5 + world.seconds and not self._posted_at:
                break
        self.seen.ended_at = self._clock.at
        return self.seen

    def _after(self, seconds: float, what: Callable[..., None], *arguments: Any) -> None:
        event = (self._clock.at + seconds, next(self._numbers), what, arguments)
        heapq.heappush(self._events, event)

    def _note_half(self) -> None:
        self.seen.backlog_half = len(self._posted_at)

    def _note_end(self) -> None:
        self.seen.backlog = len(self._posted_at)
        self.seen.in_time = self.seen.completed
        self.seen.spent_in_time = self.seen.spent.copy()

    # -- clients and C1 --------------------------------------------------------------------------

    def _arrive(self) -> None:
        """One POST arrives; the next one is drawn."""
        world = self._world
        if self._clock.at >= 0.5 + world.seconds:
            return
        self._after(self._draw.expovariate(world.rate), self._arrive)
        share = self._draw.random()
        kind, mean = world.kinds[-1][0], world.kinds[-1][2]
        for name, of, seconds in world.kinds:
            share -= of
            if share <= 0:
                kind, mean = name, seconds
                break
        self._tasks += 1
        task_id = f"t{self._tasks}"
        self._posted_at[task_id] = self._clock.at
        self._durations[task_id] = self._draw.expovariate(1.0 / mean)
        spec = TaskSpec(id=task_id, task_type=kind, accepted_at=self._clock.now())
        replica = self._replicas[self._tasks % len(self._replicas)]
        begun = max(self._clock.at, replica.free_at)
        replica.free_at = begun + self._costs.post
        self.seen.posting += self._costs.post
        self.seen.submitted += 1
        self._after(replica.free_at - self._clock.at, self._gather, replica, spec, self._clock.at)

    def _gather(self, replica: _Replica, spec: TaskSpec, arrived: float) -> None:
        replica.waiting.append((spec, arrived))
        if not replica.out:
            self._send_batch(replica)

    def _send_batch(self, replica: _Replica) -> None:
        replica.out, replica.waiting = replica.waiting[:1000], replica.waiting[1000:]
        request = SubmitBatch(specs=tuple(spec for spec, _ in replica.out))

        def answered(_answer: object) -> None:
            for _, arrived in replica.out:
                self.seen.accepted.append(self._clock.at - arrived)
            replica.out = []
            if replica.waiting:
                self._send_batch(replica)

        self._call("submit", request, answered, items=len(request.specs))

    # -- calls to the moderator ------------------------------------------------------------------

    def _call(
        self, kind: str, request: Request, answered: Callable[[Any], None], *, items: int = 0
    ) -> None:
        self.seen.calls[kind] += 1
        self._after(self._costs.way, self._take_call, request, answered, items)

    def _take_call(self, request: Request, answered: Callable[[Any], None], items: int) -> None:
        """The call has arrived: the core unpacks it when it has time."""
        cost = self._costs.call + items * self._costs.task_on_the_way
        self._after(self._on_core(cost, "calls"), self._enqueue, request, answered)

    def _on_core(self, cost: float, what: str) -> float:
        """Take the core for a while, once it is free; return in how many seconds that ends."""
        begun = max(self._clock.at, self._core_free)
        self._core_free = begun + cost
        self.seen.spent[what] += cost
        return self._core_free - self._clock.at

    def _enqueue(self, request: Request, answered: Callable[[Any], None]) -> None:
        pending = Pending(request, _unused, self._clock.elapsed())
        self._callers[id(pending)] = (pending, answered)
        self._inbox.append(pending)
        if not self._writing:
            self._commit()

    def _commit(self) -> None:
        """Decide and commit everything that has gathered: the moderator's own code."""
        batch, self._inbox = list(self._inbox), deque()
        outbound = self._moderator.apply(batch)
        self._writing = True
        seen, costs = self.seen, self._costs
        kinds = Counter(type(pending.request) for pending in batch)
        accepted = sum(
            len(pending.request.specs)
            for pending in batch
            if isinstance(pending.request, SubmitBatch)
        )
        offers = sum(
            len(answer.offers) for _, answer in outbound.answers if isinstance(answer, Grant)
        )
        for what, cost in (
            ("batches", costs.batch),
            ("accepting", accepted * costs.accept),
            ("granting", offers * (costs.grant + costs.task_on_the_way)),
            ("ending", len(outbound.ended) * costs.end),
            ("exchanges", kinds[Exchange] * costs.exchange),
            ("heartbeats", kinds[Heartbeat] * costs.heartbeat),
        ):
            lasts = self._on_core(cost, what)
        durable = bool(accepted or offers or outbound.ended)
        if durable:
            seen.spent["disk"] += costs.fsync
            seen.batches += 1
        self._after(lasts + costs.fsync * durable, self._committed, outbound)

    def _committed(self, outbound: Any) -> None:
        self._store.forget(outbound.ended)
        for task_id in outbound.ended:
            del self._posted_at[task_id]
        self._open.difference_update(outbound.ended)
        self.seen.completed += len(outbound.ended)
        for pending, answer in outbound.answers:
            known = self._callers.pop(id(pending), None)
            if known is None:
                continue
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(pending.request, SubmitBatch):
                self._open.update(spec.id for spec in pending.request.specs)
            self._after(self._costs.way, known[1], answer)
        self.seen.backlog_max = max(self.seen.backlog_max, len(self._open))
        self._writing = False
        pause = self._moderator.sleep_s()
        if self._inbox or pause == 0.0:
            self._commit()
        else:
            self._wake_at = self._clock.at + pause
            self._after(pause, self._wake, self._wake_at)

    def _wake(self, wanted: float) -> None:
        if not self._writing and wanted == self._wake_at:
            self._commit()

    # -- workers ---------------------------------------------------------------------------------

    def _hello(self, worker: str) -> None:
        hello = Hello(
            worker=worker,
            node_id=f"HCNA-{worker}--sim",
            incarnation="a",
            address="127.0.0.1",
            cpu=8.0,
            mem_gb=16.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=tuple(kind for kind, _, _ in self._world.kinds),
        )

        def welcomed(_answer: object) -> None:
            for number in (HEAVY_SLOT, *range(self._world.slots_each)):
                # Not all at once: processes start when they start.
                self._after(self._draw.uniform(0.0, 0.2), self._ask, _Slot(worker, number))
            self._after(self._draw.uniform(0.0, 5.0), self._beat, worker)

        self._call("hello", hello, welcomed)

    def _beat(self, worker: str) -> None:
        sent = self._clock.at

        def answered(reply: object) -> None:
            assert isinstance(reply, HeartbeatReply)
            self.seen.lost_sessions += not reply.known
            self.seen.renewed.append(self._clock.at - sent)
            self._after(max(0.0, 5.0 - (self._clock.at - sent)), self._beat, worker)

        request = Heartbeat(worker=worker, incarnation="a", telemetry={}, slots=2)
        self._call("heartbeat", request, answered)

    def _ask(self, slot: _Slot) -> None:
        slot.seq += 1
        request = Exchange(
            worker=slot.worker,
            incarnation="a",
            slot=slot.number,
            seq=slot.seq,
            reports=slot.reports,
        )

        def answered(grant: object) -> None:
            assert isinstance(grant, Grant), grant
            self._work(slot, grant.offers)

        self._call("exchange", request, answered, items=len(slot.reports))
        slot.reports = ()

    def _work(self, slot: _Slot, offers: Sequence[Offer]) -> None:
        """Do what was granted, one after the other; then ask again."""
        at = self._clock.now()
        reports = []
        for offer in offers:
            lasts = self._durations.pop(offer.task_id, None)
            if lasts is None:
                self.seen.granted_twice += 1
                continue
            begun = self._clock.at + at - self._clock.now()
            self.seen.waited.append(begun - self._posted_at[offer.task_id])
            self.seen.working += lasts
            reports.append(
                Report(
                    ReportKind.COMPLETED,
                    offer.task_id,
                    Token(*offer.token),
                    at + lasts,
                    started_at=at,
                    result=b"{}",
                    duration_ms=1e3 * lasts,
                )
            )
            at += lasts
        slot.reports = tuple(reports)
        self._after(at - self._clock.now(), self._ask, slot)


def _unused(_answer: object) -> None:
    raise AssertionError("the simulation reads answers from the outbound value")


# -- what it tells ------------------------------------------------------------------------------


def _at(values: Sequence[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


@dataclass(frozen=True, kw_only=True)
class Told:
    """One row of the table."""

    rate: float
    workers: int
    completed_per_s: float
    accept_p50_ms: float
    accept_p99_ms: float
    wait_p50_ms: float
    wait_p99_ms: float
    renew_p99_ms: float
    commits_per_s: float
    exchanges_per_s: float
    calls_per_s: float
    #: Shares of the moderator's core, of its writer, of all C1 replicas, and of all slots.
    core: float
    core_calls: float
    writer: float
    c1: float
    slots: float
    backlog: int
    lost_sessions: int
    #: What holds the others up, or is nearest to doing so.
    narrowest: str
    breaks: bool


def tell(world: World, seen: Seen) -> Told:
    """Sum a run up."""
    lasted, spent = world.seconds, seen.spent_in_time
    of_core = sum(cost for what, cost in spent.items() if what != "disk")
    shares = {
        "moderator's core": of_core / lasted,
        # Batches follow one another; calls push in between.
        "writer": (of_core - spent["calls"] + spent["disk"]) / lasted,
        "C1": seen.posting / lasted / world.replicas,
        "slots": seen.working / (seen.ended_at - 0.5) / (world.workers * world.slots_each),
    }
    narrowest = max(shares, key=lambda name: shares[name])
    # One that keeps up has as many open at the end as half way.
    grows = seen.backlog > 1.5 * seen.backlog_half + 0.1 * world.rate
    return Told(
        rate=world.rate,
        workers=world.workers,
        completed_per_s=seen.in_time / lasted,
        accept_p50_ms=1e3 * _at(seen.accepted, 0.5),
        accept_p99_ms=1e3 * _at(seen.accepted, 0.99),
        wait_p50_ms=1e3 * _at(seen.waited, 0.5),
        wait_p99_ms=1e3 * _at(seen.waited, 0.99),
        renew_p99_ms=1e3 * _at(seen.renewed, 0.99),
        commits_per_s=seen.batches / seen.ended_at,
        exchanges_per_s=seen.calls["exchange"] / seen.ended_at,
        calls_per_s=sum(seen.calls.values()) / seen.ended_at,
        core=shares["moderator's core"],
        core_calls=spent["calls"] / lasted,
        writer=shares["writer"],
        c1=shares["C1"],
        slots=shares["slots"],
        backlog=seen.backlog,
        lost_sessions=seen.lost_sessions,
        narrowest=narrowest,
        breaks=grows or shares[narrowest] > FULL or seen.lost_sessions > 0,
    )


def table(rows: Sequence[Told]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| offered /s | completed /s | accept p50, p99 ms | wait p50, p99 ms | renewal p99 ms "
        "| commits /s | exchanges /s | calls /s | M1's core (calls) | writer | C1 | slots "
        "| left at the end | |",
        "|" + "---|" * 14,
    ]
    for row in rows:
        verdict = f"**breaks: {row.narrowest}**" if row.breaks else f"narrowest: {row.narrowest}"
        lines.append(
            f"| {row.rate:.0f} | {row.completed_per_s:.0f} "
            f"| {row.accept_p50_ms:.1f}, {row.accept_p99_ms:.1f} "
            f"| {row.wait_p50_ms:.1f}, {row.wait_p99_ms:.1f} | {row.renew_p99_ms:.1f} "
            f"| {row.commits_per_s:.0f} | {row.exchanges_per_s:.0f} | {row.calls_per_s:.0f} "
            f"| {100 * row.core:.0f} % ({100 * row.core_calls:.0f} %) | {100 * row.writer:.0f} % "
            f"| {100 * row.c1:.0f} % | {100 * row.slots:.0f} % | {row.backlog} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Simulate some loads, and print the table."""
    parser = argparse.ArgumentParser(description="Simulate M1 under loads that no machine here has")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="virtual seconds of load")
    parser.add_argument("--rates", default="1000,2000,4000,10000", help="POSTs a second")
    parser.add_argument("--replicas", type=int, default=8, help="replicas of C1")
    parser.add_argument("--costs", type=Path, help="JSON with seconds by name; see Costs")
    parser.add_argument(
        "--measure", action="store_true", help="measure on this machine what batches cost"
    )
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    costs = Costs()
    if asked.costs:
        costs = Costs(**json.loads(asked.costs.read_text()))
    if asked.measure:
        from benchmarks.costs import measured

        costs = measured(costs)
    told = {name: float(f"{value:.3g}") for name, value in asdict(costs).items()}
    sys.stdout.write(f"seconds: {json.dumps(told)}\n")
    rows = []
    for rate in map(float, asked.rates.split(",")):
        world = World(
            workers=asked.workers, rate=rate, seconds=asked.seconds, replicas=asked.replicas
        )
        begun = time.process_time()
        rows.append(tell(world, Simulation(world, costs).run()))
        sys.stderr.write(f"{rate:.0f}/s: {time.process_time() - begun:.0f} s of CPU\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()

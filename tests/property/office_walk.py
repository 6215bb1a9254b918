"""A random walk through a whole moderator: its store, three workers, and a network that fails.

What the pure rules cannot show is seen here: the ledger, the dispatcher, idempotency, limits of the
queue, leases on the clock that never steps, timers, rebuilding after a crash. ``python -m
tests.property.office_walk SEED`` walks through one world again and tells every operation.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hcna_ray.core.models import (
    HEAVY_SLOT,
    FailureKind,
    Needs,
    OnDisconnect,
    RetryPolicy,
    TaskFilter,
    TaskSpec,
)
from hcna_ray.runtime.messages import ReplayQuery, SubmitBatch
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import (
    Cancel,
    ForgetWorker,
    MarkWorker,
    NodeSeen,
    NodesSeen,
    PauseQueue,
    Query,
    Request,
    Retry,
    RetryMany,
    SendIntent,
)
from hcna_ray.store.memory import MemoryTaskStore
from tests.property.crew import Call, Member, Worker
from tests.property.office import PLENTY, Office, Op, Told, told_shortly
from tests.property.office_judge import Judge

OPS = (40, 600)
TOLD = 60
OUTCOMES = ("completed", "completed", "completed", "error", "timeout", "fatal", "lost")
NEEDS = (
    Needs(),
    Needs(),
    Needs(),
    Needs(),
    Needs(worker="W1"),
    Needs(cpu=1.0),
    Needs(cpu=2.0, mem_gb=3.0),
    Needs(worker="W2", isolated=True),
    Needs(worker="W9"),
)
RETRIES = (
    RetryPolicy(),
    RetryPolicy(max_attempts=2, backoff_s=3.0),
    RetryPolicy(max_attempts=3, backoff_s=4.0, retry_on=("error",)),
)
LIMITS = {"two": 2}
CREW: dict[str, dict[str, Any]] = {
    "W1": {"cpu": 2.0, "mem_gb": 4.0},
    "W2": {"cpu": 4.0, "mem_gb": 8.0},
    "W3": {"cpu": 1.0, "mem_gb": 2.0},
}


def a_policy(random: Random) -> Policy:
    """Draw the settings of one world."""
    return Policy(
        max_concurrent_tasks=random.choice((3, 8, 64)),
        concurrency_limits=LIMITS,
        queue_tasks_max=random.choice((6, 15, 1000)),
        queue_bytes_max=random.choice((8_000, 1 << 30)),
        grant_max=random.choice((1, 4, 64)),
        retention_s=random.choice((40.0, 7 * 86400.0)),
        idempotency_s=random.choice((60.0, 7 * 86400.0)),
        gone_after_s=random.choice((90.0, 86400.0)),
    )


@dataclass(kw_only=True)
class Trouble:
    """How often what goes wrong in one world, 0 to 1."""

    lost_calls: float
    doubled_calls: float
    lost_answers: float
    late_answers: float
    refused: float
    crashes: float
    restores: float
    cuts: float
    flaps: float
    pauses: float
    deaths: float
    jumps: float
    wall: float

    @classmethod
    def drawn(cls, random: Random, *, going_back: bool) -> Trouble:
        """Draw a world's troubles; many have none of most."""

        def often(most: float) -> float:
            return random.choice((0.0, 0.0, 0.3, 1.0)) * most

        return cls(
            lost_calls=often(0.15),
            doubled_calls=often(0.15),
            lost_answers=often(0.15),
            late_answers=often(0.3),
            refused=often(0.05),
            crashes=often(0.05),
            restores=often(0.02) if going_back else 0.0,
            cuts=often(0.06),
            flaps=often(0.4),
            pauses=often(0.03),
            deaths=often(0.08),
            jumps=often(0.08),
            wall=often(0.05),
        )


@dataclass(kw_only=True)
class OfficeTally:
    """What a walk has done."""

    steps: int = 0
    worlds: int = 0
    violations: list[str] = field(default_factory=list)
    #: How often something was seen to happen.
    seen: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        """Count something."""
        self.seen[what] = self.seen.get(what, 0) + 1


class OfficeWorld:
    """Clients, workers and the wire; the office decides, the judge looks on."""

    def __init__(
        self,
        seed: int,
        tally: OfficeTally,
        *,
        office: Callable[[Policy, int], Office] | None = None,
        worker: type[Worker] = Worker,
        copies: bool = True,
        restores: bool = True,
        ops: tuple[int, int] = OPS,
    ) -> None:
        """Begin a world, whose ways are drawn from its seed.

        Args:
            seed: Everything follows from it.
            tally: What is counted.
            office: Makes the moderator; in memory unless told otherwise.
            worker: What workers are like.
            copies: Whether a restore may go back to an older copy (a store in memory).
            restores: Whether there are restores.
            ops: Operations of the world, at least and at most.
        """
        self.random = random = Random(seed)
        self.tally = tally
        tally.worlds += 1
        policy = a_policy(random)
        make = office or (lambda policy, seed: Office(MemoryTaskStore, policy, jitter_seed=seed))
        self.office = make(policy, random.getrandbits(32))
        self.trouble = Trouble.drawn(random, going_back=restores)
        self.copies = copies
        self.length = random.randint(*ops)
        clock = self.office.clock
        self.crew = [
            worker(
                name,
                {
                    "address": "10.0.0.1",
                    "gpu": 0.0,
                    "resources": (),
                    "labels": (),
                    "task_types": ("echo", "sleep") if name != "W3" else ("echo",),
                    **has,
                },
                lambda: (clock.now(), clock.elapsed()),
            )
            for name, has in CREW.items()
        ]
        for one in self.crew:
            one.off_s = random.choice((0.0, 0.0, 2.0, -400.0))
        self.judge = Judge(self.office, self.crew, LIMITS)
        #: The last operations, each with its number.
        self.made: deque[tuple[int, Op]] = deque(maxlen=TOLD)
        self.tell: Callable[[str], None] | None = None
        self._numbers = 0
        self._ids = 0
        self._waiting: dict[int, Call] = {}
        self._late: list[tuple[Call, object]] = []
        self._batch: list[tuple[int, Request]] = []
        self._submitted: list[SubmitBatch] = []
        self._free = PLENTY

    # -- chance ----------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        """Return whether something of this likelihood happens."""
        return share > 0 and self.random.random() < share

    def pick(self, count: int) -> int:
        """Return a number below ``count``."""
        return self.random.randrange(count)

    # -- one operation ---------------------------------------------------------------------------

    def walk(self) -> None:
        """Make all operations, then let the world come to rest."""
        self.live()
        self.drain()

    def live(self) -> None:
        """Make all operations."""
        for one in self.crew:
            if self.chance(0.8):
                one.begin()
        while self.length > 0:
            self.length -= 1
            for _ in range(2 + self.pick(6)):
                self._something()
            self._trouble()
            self._collect()
            self.perform(self._time(), self._wall(), self._first())

    def perform(self, seconds: float = 0.0, wall_s: float = 0.0, first: str = "") -> Told:
        """Hand everything in that has arrived, and take the answers out."""
        batch: list[tuple[int, Request]] = []
        if first != "restore":  # Nobody serves while it is restored.
            batch, self._batch = self._batch, []
        op = Op(
            requests=tuple(batch),
            seconds=seconds,
            wall_s=wall_s,
            free_bytes=self._free,
            refused=first != "restore" and self.chance(self.trouble.refused),
            first=first,
        )
        self.made.append((self.tally.steps, op))
        if self.tell is not None:
            self.tell(_in_words(*self.made[-1]))
        self.tally.steps += 1
        if first:
            self.tally.note(first)
        if op.refused:
            self.tally.note("refused commit")
        self.judge.before(op)
        # Processes end by themselves while time passes, whether or not anybody listens.
        if first in ("restart", "reopen", "restore"):
            self._waiting.clear()
        told = self.office.perform(op)
        if self.tell is not None:
            self.tell(f"   {told_shortly(told)}")
        for one in self.crew:
            one.watch()
        self.judge.after(op, told)
        for number, answer in told.answers:
            self._answer(number, answer)
        return told

    def _answer(self, number: int, answer: object) -> None:
        call = self._waiting.pop(number, None)
        if call is None or call.given_up:
            return
        worker = call.worker
        if worker is not None and (worker.deaf or self.chance(self.trouble.lost_answers)):
            return
        if worker is not None and (worker.paused or self.chance(self.trouble.late_answers)):
            self._late.append((call, answer))
        else:
            self._receive(call, answer)

    def _receive(self, call: Call, answer: object) -> None:
        if call.waits(self.office.clock.elapsed()) and (call.worker is None or call.worker.on):
            call.answered(answer)

    def _enter(self, request: Request, call: Call | None = None) -> None:
        self._numbers += 1
        if call is not None:
            self._waiting[self._numbers] = call
        self._batch.append((self._numbers, request))
        self.tally.note(type(request).__name__)

    def _time(self) -> float:
        if self.chance(self.trouble.jumps):
            return self.random.choice((12.0, 22.0, 31.0, 40.0, 100.0, 700.0))
        return self.random.choice((0.0, 0.0, 0.01, 0.3, 1.0, 2.0, 4.0))

    def _wall(self) -> float:
        if not self.chance(self.trouble.wall):
            return 0.0
        return self.random.choice((0.5, -0.5, 20.0, -20.0, 3600.0, -3600.0))

    def _first(self) -> str:
        if self.chance(self.trouble.crashes):
            return self.random.choice(("restart", "reopen"))
        if self.chance(self.trouble.restores):
            return "restore"
        if self.copies and self.chance(2 * self.trouble.restores):
            return "backup"
        return ""

    # -- the wire --------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Let some of what is on its way arrive: in order for each caller, else in any."""
        for call, answer in self._drawn(self._late):
            if call.worker is not None and call.worker.paused:
                self._late.append((call, answer))
            else:
                self._receive(call, answer)
        channels = [
            (one, channel)
            for one in self.crew
            if not one.mute
            for channel in (one.channel, *(member.channel for member in one.members))
            if channel
        ]
        self.random.shuffle(channels)
        for _one, channel in channels:
            while channel and self.chance(0.8):
                call = channel.popleft()
                if self.chance(self.trouble.lost_calls):
                    continue
                if self.chance(self.trouble.doubled_calls):
                    self._enter(call.request)  # Given up, and arrives nevertheless.
                self._enter(call.request, call)

    def _drawn(self, things: list[Any]) -> list[Any]:
        drawn = [one for one in things if self.chance(0.5)]
        things[:] = [one for one in things if not any(one is other for other in drawn)]
        return drawn

    # -- what happens ----------------------------------------------------------------------------

    def _something(self) -> None:
        draw = self.random.random()
        if draw < 0.1:
            self._client()
        elif draw < 0.12:
            self._operator()
        else:
            able = [one for one in self.crew if one.on and not one.paused]
            if able:
                self._worker(able[self.pick(len(able))])

    def _worker(self, one: Worker) -> None:
        draw = self.random.random()
        elapsed = one.elapsed
        # The loops of an agent do not forget: a beat is never long overdue.
        if elapsed - one.heard_at >= 5.0 or not one.connected:
            one.beat()
        if one.leaving is not None:
            one.part()
            return
        if one.gone:
            one.tell_gone()
        runs = [
            (member, run) for member in one.members for run in member.runs.values() if not run.over
        ]
        if draw < 0.35 or not runs:
            members = [one.agent, *(m for m in one.members if m.slot != HEAVY_SLOT)]
            self._ask(one, members[self.pick(len(members))])
        elif draw < 0.5:
            members = [member for member in one.members if member.outbox]
            if members:
                one.report(members[self.pick(len(members))])
        else:
            member, run = runs[self.pick(len(runs))]
            if run.stop and self.chance(0.6):
                one.stop(member, run)
            elif run.started_at is None:
                if one.start(member, run):
                    self.tally.note("attempt")
                    self.judge.started(one, run)
            else:
                one.finish(member, run, OUTCOMES[self.pick(len(OUTCOMES))], self._numbers)
                self._numbers += 1

    def _ask(self, one: Worker, member: Member) -> None:
        if member.slot == HEAVY_SLOT:
            one.ask(member)
        elif all(run.over or run.started_at is not None for run in member.runs.values()):
            # A slot asks when its executor is idle, or busy for long.
            one.ask(member)

    def _trouble(self) -> None:
        trouble, crew = self.trouble, self.crew
        one = crew[self.pick(len(crew))]
        if self.chance(0.3):
            self._recover(one)
        if self.chance(trouble.flaps):
            crew[0].deaf = crew[0].mute = self.chance(0.8)
        if self.chance(trouble.cuts) and one.on:
            one.deaf, one.mute = self.random.choice(((True, True), (True, False), (False, True)))
            self.tally.note("partition")
        if self.chance(trouble.pauses) and one.on:
            one.paused = True
            self.tally.note("pause")
            self.judge.excuse(one)
        if self.chance(trouble.deaths) and one.on and not one.paused:
            self._death(one)
        self._free = 0 if self.chance(trouble.refused) else PLENTY

    def _recover(self, one: Worker) -> None:
        if one.paused and self.chance(0.3):
            self.judge.excuse(one)
            one.paused = False
        if (one.deaf or one.mute) and self.chance(0.3):
            one.deaf = one.mute = False
        if not one.on and self.chance(0.6):
            one.begin()

    def _death(self, one: Worker) -> None:
        draw = self.random.random()
        if draw < 0.5 and one.members:
            self.tally.note("process died")
            member = one.members[self.pick(len(one.members))]
            one.lose(member, self.random.choice((FailureKind.POISON, FailureKind.OOM)))
        elif draw < 0.7:
            self.tally.note("agent died")
            one.end(journals=True)
        elif draw < 0.8:
            self.tally.note("power lost")
            one.end(journals=False)
        else:
            self.tally.note("goodbye")
            one.part()

    # -- clients and operators -------------------------------------------------------------------

    def _client(self) -> None:
        known = self.judge.known()
        draw = self.pick(12)
        if draw < 7 or not known:
            self._submit()
        elif draw < 9:
            task_id = known[-1 - self.pick(min(len(known), 8))]
            self._enter(Cancel(task_id=task_id, reason="no longer wanted", principal="ann"))
        elif draw < 10:
            task_id = known[self.pick(len(known))]
            self._enter(Retry(task_id=task_id, principal="ann"))
        elif draw < 11:
            some = tuple(self.random.sample(known, min(len(known), 4)))
            query = ReplayQuery(where=TaskFilter())
            self._enter(RetryMany(query=query, ids=some, more=False, principal="ann"))
        elif self._submitted:
            # An answer that never came: the same batch once more.
            self._enter(self._submitted[-1 - self.pick(min(len(self._submitted), 5))])

    def _submit(self) -> None:
        specs: list[TaskSpec] = []
        for _ in range(self.random.choice((1, 1, 2, 5))):
            specs.append(self._spec([spec.id for spec in specs]))
        batch = SubmitBatch(specs=tuple(specs), atomic=self.chance(0.3))
        self._submitted.append(batch)
        self._enter(batch)

    def _spec(self, siblings: Sequence[str]) -> TaskSpec:
        self._ids += 1
        random, now = self.random, self.office.clock.now()
        timing, key = self.pick(10), self.pick(9)
        known = [*self.judge.known()[-8:], *siblings]
        parents = {
            known[self.pick(len(known))] for _ in range(self.pick(3)) if known and self.chance(0.4)
        }
        named = self.chance(0.3)
        return TaskSpec(
            id=f"task-{self._ids:04}",
            task_type=random.choice(("echo", "echo", "sleep")),
            payload=b"x" * random.choice((2, 2, 900)),
            queue=random.choice(("default", "default", "night")),
            priority=self.pick(10),
            accepted_at=now,
            run_at=now + 6.0 if timing == 1 else None,
            expires_at=now + 30.0 if timing in (2, 3) else None,
            queue_timeout_s=25.0 if timing == 4 else None,
            timeout_s=random.choice((20.0, 300.0)),
            retry=random.choice(RETRIES),
            max_losses=1 + self.pick(3),
            needs=random.choice(NEEDS),
            depends_on=tuple(sorted(parents)),
            ordering_key={0: "a", 1: "b", 2: "a"}.get(key),
            concurrency_key={2: "two", 3: "one", 4: "two"}.get(key),
            on_disconnect=OnDisconnect.WAIT if timing >= 7 else OnDisconnect.REPLACE,
            wait_max_s=15.0,
            principal=random.choice(("ann", "bob")),
            idempotency_key=f"key-{self.pick(6)}" if named else None,
            fingerprint=f"body-{self.pick(2)}" if named else "",
            batch_id=random.choice((None, "b1")),
        )

    def _operator(self) -> None:
        name = self.crew[self.pick(len(self.crew))].name
        match self.pick(7):
            case 0:
                action = self.random.choice(("drain", "cordon", "uncordon", "uncordon"))
                deadline = self.random.choice((None, 5.0)) if action == "drain" else None
                self._enter(
                    MarkWorker(name=name, action=action, deadline_s=deadline, principal="ann")
                )
            case 1:
                force = self.chance(0.3)
                if force:
                    self.judge.excuse(next(one for one in self.crew if one.name == name))
                self._enter(ForgetWorker(name=name, force=force, principal="ann"))
            case 2 | 3:
                queue = self.random.choice(("default", "night"))
                self._enter(PauseQueue(queue=queue, paused=self.chance(0.4), principal="ann"))
            case 4:
                nodes = tuple(
                    NodeSeen(one.name, "", "10.0.0.1") for one in self.crew if self.chance(0.7)
                )
                self._enter(NodesSeen(nodes=nodes))
            case 5:
                envelope = {"msg_id": f"m{self._numbers}", "intent": "test.ping"}
                self._enter(SendIntent(envelope=envelope, worker=name, principal="a", wait_s=5.0))
            case _:
                self._enter(Query(name=self.random.choice(("workers", "worker_views", "status"))))

    # -- the end ---------------------------------------------------------------------------------

    def drain(self) -> None:
        """With everybody back and nothing lost any more, every task ends or says why not."""
        self.trouble = Trouble(**dict.fromkeys(Trouble.__dataclass_fields__, 0.0))
        self._free = PLENTY
        for one in self.crew:
            one.deaf = one.mute = one.paused = False
            if not one.on:
                one.begin()
        for queue in ("default", "night"):
            self._enter(PauseQueue(queue=queue, paused=False, principal="ann"))
        for one in self.crew:
            self._enter(
                MarkWorker(name=one.name, action="uncordon", deadline_s=None, principal="ann")
            )
        quiet = 0
        for _ in range(600):
            facts = self.judge.facts
            for one in self.crew:
                self._serve(one)
            self._collect_all()
            told = self.perform(min(max(self._sleep, 0.0), 1.0) if quiet else 0.2)
            self._sleep = told.sleep_s
            quiet = 0 if self.judge.facts != facts else quiet + 1
            if quiet > 14 and self.judge.at_rest():
                break
            if quiet > 8 and (wake := self.office.store.next_wake()) is not None:
                # Nothing happens for long: up to the next timer.
                left = wake - self.office.clock.now()
                if left > 1.0:
                    self._idle(left)
        self.judge.finish()

    _sleep = 0.0

    def _idle(self, seconds: float) -> None:
        """Let a long time pass in which workers go on to say that they are there."""
        end = self.office.clock.elapsed() + min(seconds, 400.0)
        while self.office.clock.elapsed() < end:
            for one in self.crew:
                one.beat()
            self._collect_all()
            self.perform(4.0)

    def _serve(self, one: Worker) -> None:
        """Do everything that a worker has to do."""
        if not one.on:
            one.begin()
        if one.elapsed - one.heard_at >= 5.0 or not one.connected:
            one.beat()
        if one.leaving is not None:
            one.part()
            return
        one.tell_gone()
        for member in list(one.members):
            for run in list(member.runs.values()):
                if run.over:
                    continue
                if run.stop:
                    one.stop(member, run)
                elif run.started_at is None:
                    if one.start(member, run):
                        self.judge.started(one, run)
                else:
                    one.finish(member, run, "completed", self._numbers)
                    self._numbers += 1
            one.report(member)
        for member in [one.agent, *(m for m in one.members if m.slot != HEAVY_SLOT)]:
            self._ask(one, member)

    def _collect_all(self) -> None:
        late, self._late = self._late, []
        for call, answer in late:
            self._receive(call, answer)
        for one in self.crew:
            for channel in (one.channel, *(member.channel for member in one.members)):
                while channel:
                    call = channel.popleft()
                    self._enter(call.request, call)


def _in_words(number: int, op: Op) -> str:
    return f"{number}: {told_shortly(op)}"


def walk(seed: int, steps: int, worker: type[Worker] = Worker) -> OfficeTally:
    """Walk through worlds until so many operations are made, or one broke a promise."""
    tally = OfficeTally()
    logging.getLogger("hcna_ray").setLevel(logging.CRITICAL)  # It has much to complain of.
    seeds = Random(seed)
    while tally.steps < steps and not tally.violations:
        world_seed = seeds.getrandbits(48)
        world = OfficeWorld(world_seed, tally, worker=worker)
        try:
            world.walk()
        except Exception as error:
            tally.violations.append(
                f"{type(error).__name__}: {error} (python -m tests.property.office_walk "
                f"{world_seed} walks through it again)\nthe last operations:\n"
                + "\n".join(_in_words(number, op) for number, op in world.made)
            )
    return tally


if __name__ == "__main__":
    logging.getLogger("hcna_ray").setLevel(logging.CRITICAL)
    this = OfficeWorld(int(sys.argv[1]), OfficeTally())
    this.tell = lambda line: print(line, flush=True)  # noqa: T201
    this.walk()

"""A moderator on an in-memory store, a clock that is told the time, and workers made of paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hcna_ray.core.models import Task, TaskSpec, Token
from hcna_ray.runtime.messages import (
    Accepted,
    Exchange,
    Grant,
    Heartbeat,
    Hello,
    Offer,
    Report,
    ReportKind,
    SlotGone,
    SubmitBatch,
)
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Cancel, Pending, Query, Reports, Request
from hcna_ray.runtime.schedules import Authority
from hcna_ray.runtime.trace_notes import TraceNote
from hcna_ray.store.base import TaskStore
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import T0, a_spec


class PaperClock:
    """Both clocks of `hcna_ray.core.clock.Clock`, moved by hand."""

    def __init__(self) -> None:
        self._now = T0
        self._elapsed = 1000.0

    def now(self) -> float:
        return self._now

    def elapsed(self) -> float:
        return self._elapsed

    def advance(self, seconds: float) -> None:
        self._now += seconds
        self._elapsed += seconds

    def step(self, seconds: float) -> None:
        """Put the wall clock alone another way."""
        self._now += seconds


class Desk:
    """A moderator and what it has answered so far."""

    def __init__(
        self, store: TaskStore | None = None, clock: PaperClock | None = None, **policy: Any
    ) -> None:
        self.store = store or MemoryTaskStore()
        self.clock = clock or PaperClock()
        self.free_bytes = 1 << 40
        self.policy = Policy(**policy)
        #: Whether schedules may submit their tasks; by default they may.
        self.authority: Authority | None = None
        #: Whether to run on while the moderator says that it has work left over.
        self.runs_on = True
        self.ended: list[str] = []
        #: What spans are to be made of.
        self.notes: list[TraceNote] = []
        self.answers: dict[int, object] = {}
        self.moderator = self._build()

    def _build(self) -> Moderator:
        return Moderator(
            self.store,
            self.policy,
            clock=self.clock,
            jitter=lambda: 0.0,
            free_bytes=lambda: self.free_bytes,
            authority=self.authority,
        )

    def restart(self) -> None:
        """Lose everything the moderator had in memory."""
        self.answers.clear()
        self.moderator = self._build()

    def apply(self, *requests: Request) -> list[object]:
        """Hand in one batch; return each request's answer, `WAITING` where it is parked."""
        batch = [Pending(request, _unused, self.clock.elapsed()) for request in requests]
        self._run(batch)
        return [self.answers.get(id(pending), WAITING) for pending in batch]

    def park(self, request: Request) -> Pending:
        """Hand in a call that will be answered later."""
        pending = Pending(request, _unused, self.clock.elapsed())
        self._run([pending])
        return pending

    def answer(self, pending: Pending) -> Any:
        """Return what a parked call has been answered."""
        return self.answers.get(id(pending), WAITING)

    def ask(self, request: Request) -> Any:
        """Hand in one request alone; raise its answer if that is an error."""
        (answer,) = self.apply(request)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def tick(self, seconds: float = 0.0) -> None:
        """Let time pass, then let the moderator look at the clock."""
        self.clock.advance(seconds)
        self._run([])

    def _run(self, batch: list[Pending]) -> None:
        self._take(self.moderator.apply(batch))
        while self.runs_on and self.moderator.sleep_s() == 0.0:
            self._take(self.moderator.apply([]))

    def _take(self, outbound: Outbound) -> None:
        for pending, answer in outbound.answers:
            self.answers[id(pending)] = answer
            self._kept.append(pending)
        self.ended += outbound.ended
        self.notes += outbound.notes

    #: Keeps answered calls alive, so that no two share an ``id()``.
    _kept: list[Pending] = []  # noqa: RUF012 - shared on purpose

    # -- clients ---------------------------------------------------------------------------------

    def submit(self, *specs: TaskSpec, atomic: bool = False) -> list[Any]:
        return list(self.ask(SubmitBatch(specs=specs, atomic=atomic)))

    def submit_ids(self, *ids: str, **changes: Any) -> None:
        answers = self.submit(
            *(a_spec(id_, accepted_at=self.clock.now(), **changes) for id_ in ids)
        )
        assert all(isinstance(answer, Accepted) for answer in answers), answers

    def cancel(self, task_id: str) -> Any:
        return self.ask(Cancel(task_id=task_id, reason="", principal="tester"))

    def task(self, task_id: str) -> Task:
        return self.store.get([task_id])[task_id]

    def workers(self) -> Any:
        return {worker.name: worker for worker in self.ask(Query(name="workers"))}


class PaperWorker:
    """A worker whose slots do what a test tells them."""

    def __init__(
        self,
        desk: Desk,
        name: str = "W1",
        incarnation: str = "a",
        task_types: Sequence[str] = ("echo",),
        **has: Any,
    ) -> None:
        self.desk, self.name, self.incarnation = desk, name, incarnation
        self.seqs: dict[int, int] = {}
        self.task_types, self.has = tuple(task_types), has
        self.hello()

    def hello(self, reports: tuple[Report, ...] = ()) -> None:
        defaults: dict[str, Any] = {
            "cpu": 4.0,
            "mem_gb": 8.0,
            "gpu": 0.0,
            "labels": (),
            "address": "127.0.0.1",
            "resources": ((self.name, 1.0),),
        }
        self.desk.ask(
            Hello(
                worker=self.name,
                node_id=f"HCNA-{self.name}--test",
                incarnation=self.incarnation,
                task_types=self.task_types,
                reports=reports,
                **{**defaults, **self.has},
            )
        )

    def heartbeat(self, *, began: tuple[tuple[str, Token, float], ...] = ()) -> Any:
        return self.desk.ask(
            Heartbeat(worker=self.name, incarnation=self.incarnation, telemetry={}, began=began)
        )

    def exchange(
        self,
        slot: int = 0,
        *reports: Report,
        seq: int | None = None,
        holding: Sequence[Offer] = (),
    ) -> Pending:
        """Ask for work (and deliver reports); the call parks if there is none."""
        number = self.seqs.get(slot, 0) + 1 if seq is None else seq
        self.seqs[slot] = number
        return self.desk.park(
            Exchange(
                worker=self.name,
                incarnation=self.incarnation,
                slot=slot,
                seq=number,
                reports=reports,
                holding=tuple((offer.task_id, Token(*offer.token)) for offer in holding),
            )
        )

    def granted(self, slot: int = 0, *reports: Report) -> list[Offer]:
        """Ask for work that is there."""
        grant = self.desk.answer(self.exchange(slot, *reports))
        assert isinstance(grant, Grant), grant
        return list(grant.offers)

    def report(self, *reports: Report) -> Any:
        return self.desk.ask(
            Reports(worker=self.name, incarnation=self.incarnation, reports=reports)
        )

    def gone(self, slot: int, *reports: Report) -> Any:
        return self.desk.ask(
            SlotGone(worker=self.name, incarnation=self.incarnation, slot=slot, reports=reports)
        )

    def started(self, offer: Offer) -> Report:
        return Report(ReportKind.STARTED, offer.task_id, Token(*offer.token), self.desk.clock.now())

    def ended(self, offer: Offer, kind: str = ReportKind.COMPLETED, **more: Any) -> Report:
        now = self.desk.clock.now()
        if kind == ReportKind.COMPLETED:
            more.setdefault("result", b'{"ok":true}')
        more.setdefault("duration_ms", 1.0)
        return Report(kind, offer.task_id, Token(*offer.token), now, started_at=now, **more)


class _Waiting:
    def __repr__(self) -> str:
        return "WAITING"


WAITING = _Waiting()


def _unused(answer: object) -> None:
    raise AssertionError("the desk reads answers from the outbound value")

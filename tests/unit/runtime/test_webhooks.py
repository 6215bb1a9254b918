"""Reports to webhooks: stored with the end of a task, told at least once, given up some time."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from hcna_ray.config import WebhookSettings
from hcna_ray.core.errors import StoreUnavailable
from hcna_ray.core.models import FailureKind, TaskState
from hcna_ray.runtime import webhooks
from hcna_ray.runtime.reported import body_of, delivery_of
from hcna_ray.runtime.requests import Delivered
from hcna_ray.runtime.webhooks import Answer, Deliverer, Verdict, WebhookThread, judged
from hcna_ray.store.base import Delivery
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import T0, a_delivery, a_task, an_error
from tests.support.paper_worker import Desk, PaperClock

URL = "https://hooks.example.org:8443/a?token=b"
PATIENCE_S = 10.0


def waiting(desk: Desk) -> list[Delivery]:
    assert isinstance(desk.store, MemoryTaskStore)
    return desk.store.reader().deliveries(due_before=math.inf, limit=99)


def counts(desk: Desk) -> dict[str, int]:
    assert isinstance(desk.store, MemoryTaskStore)
    found = desk.store.reader().counters()
    return {one.label: count for one, count in found.items() if one.name == "webhook"}


class TestWhatIsTold:
    def test_a_report_says_how_the_task_ended_and_not_what_it_returned(self) -> None:
        task = a_task(
            "task-1",
            state=TaskState.FAILED,
            webhook=URL,
            queue="lab",
            metadata=b'{"order": 7}',
            payload=b'{"secret": 1}',
            result=b'{"r": 1}',
            finished_at=T0 + 2,
            started_at=T0 + 1,
            failures=3,
            error=an_error(kind=FailureKind.TIMEOUT, message="too slow"),
        )
        told = json.loads(body_of(task))
        assert told["type"] == "task.failed"
        assert told["timestamp"] == told["data"]["finished_at"]
        assert told["data"]["task_id"] == "task-1"
        assert told["data"]["queue"] == "lab"
        assert told["data"]["failures"] == 3
        assert told["data"]["error"] == {"kind": "timeout", "message": "too slow"}
        assert told["data"]["metadata"] == {"order": 7}
        assert "secret" not in body_of(task).decode()
        assert "result" not in told["data"]

    def test_a_delivery_is_named_after_this_end_of_this_task(self) -> None:
        task = a_task("task-1", webhook=URL, finished_at=T0, state=TaskState.COMPLETED, version=3)
        first = delivery_of(task, 1)
        assert first.id == "task-1.1.4"
        assert first.target == "hooks.example.org:8443"
        assert (first.created_at, first.due_at, first.tries) == (T0, T0, 0)
        assert delivery_of(task, 2).id != first.id
        assert delivery_of(task.evolve(version=9), 1).id != first.id


class TestTheModerator:
    def test_it_is_stored_in_the_commit_in_which_the_task_ends(self) -> None:
        desk = Desk()
        desk.submit_ids("t1", webhook=URL)
        desk.submit_ids("t2")
        assert waiting(desk) == []

        desk.cancel("t1")
        desk.cancel("t2")

        (one,) = waiting(desk)
        assert (one.task_id, one.url, one.target) == ("t1", URL, "hooks.example.org:8443")
        assert json.loads(one.body)["type"] == "task.cancelled"
        desk.restart()
        assert waiting(desk) == [one]

    def test_an_end_that_is_rolled_back_is_not_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        desk = Desk()
        desk.submit_ids("t1", webhook=URL)

        def full(_facts: object) -> int:
            raise StoreUnavailable("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(desk.store, "append_facts", full)
            with pytest.raises(StoreUnavailable):
                desk.cancel("t1")
        assert waiting(desk) == []

    def test_one_that_was_taken_is_forgotten(self) -> None:
        desk, one = self._with_one()
        desk.ask(Delivered(delivery=one, outcome="delivered"))
        assert waiting(desk) == []
        assert counts(desk) == {"delivered": 1}

    def test_one_that_was_not_waits_for_its_next_try(self) -> None:
        desk, one = self._with_one()
        later = one._replace(tries=1, due_at=one.due_at + 5, note="status 500")
        desk.ask(Delivered(delivery=later, outcome="failed"))
        assert waiting(desk) == [later]
        assert counts(desk) == {"failed": 1}

    def test_one_that_is_given_up_is_put_on_record(self) -> None:
        desk, one = self._with_one()
        last = one._replace(tries=9, note="status 500")
        desk.ask(Delivered(delivery=last, outcome="given_up"))
        assert waiting(desk) == []
        assert counts(desk) == {"given_up": 1}
        assert isinstance(desk.store, MemoryTaskStore)
        (line,) = desk.store.reader().audit(before=None, limit=1)
        assert (line.entry.action, line.entry.target) == ("webhook.give_up", "t1")
        assert line.entry.detail == "hooks.example.org:8443, after 9 tries: status 500"

    def _with_one(self) -> tuple[Desk, Delivery]:
        desk = Desk()
        desk.submit_ids("t1", webhook=URL)
        desk.cancel("t1")
        (one,) = waiting(desk)
        return desk, one


class TestJudging:
    def judge(self, answer: Answer, tries: int = 0, jitter: float = 0.0) -> Verdict:
        return judged(
            a_delivery(tries=tries), answer, backoff_s=(5.0, 60.0), now=T0 + 1, jitter=jitter
        )

    @pytest.mark.parametrize("status", [200, 201, 204, 299])
    def test_any_2xx_will_do(self, status: int) -> None:
        verdict = self.judge(Answer(status, f"status {status}"))
        assert (verdict.outcome, verdict.delivery.tries) == ("delivered", 1)

    @pytest.mark.parametrize("status", [None, 301, 302, 307, 308, 400, 401, 404, 429, 500, 503])
    def test_anything_else_is_tried_again(self, status: int | None) -> None:
        verdict = self.judge(Answer(status, "x"))
        assert verdict.outcome == "failed"
        assert verdict.delivery.due_at == T0 + 1 + 5
        assert verdict.delivery.note == "x"

    def test_pauses_grow_and_end(self) -> None:
        assert self.judge(Answer(500, ""), tries=1).delivery.due_at == T0 + 1 + 60
        verdict = self.judge(Answer(500, ""), tries=2)
        assert (verdict.outcome, verdict.delivery.tries) == ("given_up", 3)

    def test_they_are_moved_a_little(self) -> None:
        assert self.judge(Answer(500, ""), jitter=1.0).delivery.due_at == T0 + 1 + 5.5
        assert self.judge(Answer(500, ""), jitter=-1.0).delivery.due_at == T0 + 1 + 4.5

    def test_a_receiver_that_is_gone_is_not_asked_again(self) -> None:
        assert self.judge(Answer(410, "status 410")).outcome == "given_up"

    def test_a_receiver_may_ask_for_a_longer_pause_and_for_no_shorter_one(self) -> None:
        assert self.judge(Answer(429, "", 90.0)).delivery.due_at == T0 + 1 + 90
        assert self.judge(Answer(429, "", 1.0)).delivery.due_at == T0 + 1 + 5

    def test_what_it_says_is_made_harmless(self) -> None:
        note = self.judge(Answer(None, "a\x1b[31m\nb" + "x" * 999)).delivery.note
        assert note.startswith("a?[31m?b")
        assert len(note) == webhooks.NOTE_CHARS_MAX


class Receivers:
    """Stands where `Courier.take` does; a receiver answers when the test lets it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.most = 0
        self.busy = 0
        self.answer = Answer(200, "status 200")
        self.gates: dict[str, asyncio.Event] = {}
        self.changed = asyncio.Event()

    def hold(self, target: str) -> asyncio.Event:
        return self.gates.setdefault(target, asyncio.Event())

    async def take(self, delivery: Delivery) -> Answer:
        self.begun.append(delivery.id)
        self.busy += 1
        self.most = max(self.most, self.busy)
        self._tell()
        if delivery.target in self.gates:
            await self.gates[delivery.target].wait()
        self.busy -= 1
        return self.answer

    async def until_begun(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.begun) < count:
                await self.changed.wait()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Writer:
    """Puts down verdicts as the moderator does."""

    def __init__(self, store: MemoryTaskStore) -> None:
        self.store = store
        self.verdicts: list[Verdict] = []
        self.refuse = 0
        self.changed = asyncio.Event()

    async def tell(self, verdict: Verdict) -> None:
        if self.refuse:
            self.refuse -= 1
            raise StoreUnavailable("away")
        with self.store.transaction():
            if verdict.outcome == "failed":
                self.store.save_deliveries([verdict.delivery])
            else:
                self.store.drop_deliveries([verdict.delivery.id])
        self.verdicts.append(verdict)
        self.changed.set()
        self.changed = asyncio.Event()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.verdicts) < count:
                await self.changed.wait()


class House:
    """A deliverer with everything around it."""

    def __init__(self, **settings: Any) -> None:
        self.store, self.clock = MemoryTaskStore(), PaperClock()
        self.receivers, self.writer = Receivers(), Writer(self.store)
        self.deliverer = Deliverer(
            WebhookSettings(**settings),
            self.store.reader(),
            self.receivers.take,
            self.writer.tell,
            self.clock,
            jitter=lambda: 0.0,
        )

    def put(self, *deliveries: Delivery) -> None:
        with self.store.transaction():
            self.store.save_deliveries(deliveries)
        self.deliverer.news()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.deliverer.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class TestDeliverer:
    async def test_what_waits_at_the_start_is_told_and_what_comes_later_too(self) -> None:
        house = House()
        house.put(a_delivery("d1"))
        async with house.running():
            await house.writer.until(1)
            house.put(a_delivery("d2"))
            await house.writer.until(2)
        assert [one.delivery.id for one in house.writer.verdicts] == ["d1", "d2"]
        assert house.store.reader().deliveries(due_before=math.inf, limit=9) == []

    async def test_what_is_not_due_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(webhooks, "LOOK_S", 0.001)
        house = House(backoff_s=(60.0,))
        house.receivers.answer = Answer(500, "status 500")
        house.put(a_delivery("d1"))
        async with house.running():
            await house.writer.until(1)
            house.put(a_delivery("d2"))
            await house.writer.until(2)
            assert house.receivers.begun == ["d1", "d2"]
            house.clock.advance(61)
            await house.writer.until(4)
        assert house.receivers.begun == ["d1", "d2", "d1", "d2"]
        assert {one.outcome for one in house.writer.verdicts[2:]} == {"given_up"}

    async def test_one_that_hangs_is_in_nobodys_way(self) -> None:
        house = House(at_once=8, at_once_to_one=2)
        gate = house.receivers.hold("hangs:443")
        house.put(*(a_delivery(f"h{n:02}", target="hangs:443") for n in range(20)))
        async with house.running():
            await house.receivers.until_begun(2)
            house.put(*(a_delivery(f"z{n}", target=f"other-{n % 3}:443") for n in range(9)))
            await house.writer.until(9)
            assert {one.delivery.id[0] for one in house.writer.verdicts} == {"z"}
            assert sum(1 for one in house.receivers.begun if one[0] == "h") == 2
            gate.set()
            await house.writer.until(29)
        assert house.receivers.most <= 8

    async def test_there_are_so_many_at_once(self) -> None:
        house = House(at_once=3, at_once_to_one=2)
        gates = [house.receivers.hold(f"r{n}:443") for n in range(5)]
        house.put(*(a_delivery(f"d{n}", target=f"r{n}:443") for n in range(5)))
        async with house.running():
            await house.receivers.until_begun(3)
            assert house.receivers.busy == 3
            for gate in gates:
                gate.set()
            await house.writer.until(5)
        assert house.receivers.most == 3

    async def test_nothing_is_told_again_while_the_writer_is_away(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(webhooks, "TELL_AGAIN_S", 0.001)
        house = House()
        house.writer.refuse = 5
        house.put(a_delivery("d1"))
        async with house.running():
            await house.writer.until(1)
        assert house.receivers.begun == ["d1"]

    async def test_a_store_that_is_away_is_asked_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(webhooks, "LOOK_S", 0.001)
        house = House()
        house.put(a_delivery("d1"))
        reader: Any = house.deliverer._reader
        there, failures = reader.deliveries, [StoreUnavailable("away")] * 3

        def deliveries(**where: Any) -> Any:
            if failures:
                raise failures.pop()
            return there(**where)

        reader.deliveries = deliveries
        async with house.running():
            await house.writer.until(1)
        assert not failures


def test_the_thread_survives_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "IDLE_S", 0.001)
    store, taken = MemoryTaskStore(), threading.Event()
    failures = [OSError("no such authority"), StoreUnavailable("away")]

    async def take(_delivery: Delivery) -> Answer:
        taken.set()
        return Answer(200, "status 200")

    def make() -> Deliverer:
        if failures:
            raise failures.pop()
        return Deliverer(
            WebhookSettings(),
            store.reader(),
            take,
            Writer(store).tell,
            PaperClock(),
            jitter=lambda: 0.0,
        )

    thread = WebhookThread(make)
    with store.transaction():
        store.save_deliveries([a_delivery()])
    thread.tell()
    assert taken.wait(PATIENCE_S)
    assert not failures

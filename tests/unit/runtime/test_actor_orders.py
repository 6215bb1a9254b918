"""Ray's face of the moderator: what it does with orders and sealed messages, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hcna_ray.core.errors import StoreUnavailable, WorkerNameTaken
from hcna_ray.core.models import AuditEntry, TaskFilter
from hcna_ray.runtime import wire
from hcna_ray.runtime.actors import ModeratorActor
from hcna_ray.runtime.messages import Grant, Heartbeat, HeartbeatReply, Hello, ReplayQuery
from hcna_ray.runtime.orders import CipherMismatch
from hcna_ray.runtime.refusals import TELL_S
from hcna_ray.runtime.requests import Note
from hcna_ray.security.cipher import MessageRefused
from tests.support.builders import T0
from tests.unit.runtime.test_orders import (
    BPCS,
    INTENT,
    STOP,
    TELEMETRY,
    WELCOME,
    Cluster,
    a_hello,
    an_exchange,
)


class FixedClock:
    def now(self) -> float:
        return T0

    def elapsed(self) -> float:
        return 0.0


class Actor(ModeratorActor):
    """The real face over a moderator that gives one answer to everything."""

    def __init__(self, cluster: Cluster) -> None:
        self._orders, self._clock = cluster.desk, FixedClock()  # type: ignore[assignment]
        self.asked: list[Any] = []
        self.answer: Any = None

    async def _ask(self, request: Any) -> Any:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @property
    def audited(self) -> list[AuditEntry]:
        return [entry for one in self.asked if isinstance(one, Note) for entry in one.entries]


Make = Callable[..., Cluster]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda m1, w1: Cluster(tmp_path, m1, w1)


async def greeted(actor: Actor, cluster: Cluster) -> Hello:
    actor.answer = WELCOME
    sent = cluster.guard.hello(a_hello())
    cluster.guard.welcomed(sent, await actor.do_hello(sent))
    return sent


async def test_what_leaves_is_what_a_worker_believes(make: Make) -> None:
    cluster = make(BPCS[0], BPCS[0])
    actor = Actor(cluster)
    await greeted(actor, cluster)
    actor.answer = Grant(seq=1, stops=(STOP,), intents=(INTENT,))
    raw = await actor.do_exchange(wire.pack_exchange(an_exchange()))
    found = cluster.received(raw)
    assert (found.stops, found.intents) == ((STOP,), (INTENT,))
    answered = an_exchange(2, answers=(("m1", {"pong": True}),))
    actor.answer = Grant(seq=2)
    await actor.do_exchange(wire.pack_exchange(cluster.guard.seal_answers(answered)))
    assert actor.asked[-1] == answered
    assert actor.audited == []


async def test_telemetry_that_comes_again_asks_for_a_hello_and_is_on_record_once(
    make: Make,
) -> None:
    cluster = make(BPCS[0], BPCS[0])
    actor = Actor(cluster)
    await greeted(actor, cluster)
    actor.answer = HeartbeatReply(known=True)
    captured = cluster.beat()
    assert (await actor.do_heartbeat(captured)).known
    assert actor.asked[-1].telemetry == TELEMETRY
    for _ in range(9):
        assert not (await actor.do_heartbeat(captured)).known
    (entry,) = actor.audited
    assert (entry.principal, entry.action, entry.outcome) == ("W1", "worker.refused", "refused")
    await greeted(actor, cluster)
    actor.answer = HeartbeatReply(known=True)
    assert (await actor.do_heartbeat(cluster.beat())).known


async def test_a_worker_with_another_key_is_not_asked_for_one_hello_after_the_other(
    make: Make,
) -> None:
    cluster = make(BPCS[0], BPCS[1])
    actor = Actor(cluster)
    await greeted(actor, cluster)
    with pytest.raises(MessageRefused):
        await actor.do_heartbeat(cluster.beat())
    assert [entry.action for entry in actor.audited] == ["worker.refused"]


async def test_answers_that_do_not_open_come_again_after_a_hello(make: Make) -> None:
    cluster = make(BPCS[0], BPCS[0])
    actor = Actor(cluster)
    await greeted(actor, cluster)
    actor.answer = Grant(seq=2)
    answered = an_exchange(2, answers=(("m1", {"pong": True}),))
    captured = wire.pack_exchange(cluster.guard.seal_answers(answered))
    assert not wire.unpack_grant(await actor.do_exchange(captured)).hello
    count = len(actor.asked)
    assert wire.unpack_grant(await actor.do_exchange(captured)).hello
    assert [type(one) for one in actor.asked[count:]] == [Note]  # The question is still open.
    await greeted(actor, cluster)
    actor.answer = Grant(seq=2)
    again = wire.pack_exchange(cluster.guard.seal_answers(answered))
    assert not wire.unpack_grant(await actor.do_exchange(again)).hello
    assert actor.asked[-1] == answered


async def test_a_worker_without_the_cipher_is_refused_and_on_record(make: Make) -> None:
    cluster = make(BPCS[0], {})
    actor = Actor(cluster)
    with pytest.raises(CipherMismatch):
        await actor.do_hello(a_hello())
    (entry,) = actor.audited
    assert "worker.security.enable_bpcs: true" in entry.detail
    beat = Heartbeat(worker="W1", incarnation="a", telemetry={})
    assert not (await actor.do_heartbeat(beat)).known  # It is told to say hello first.


async def test_a_machine_with_a_taken_name_is_on_record(make: Make) -> None:
    actor = Actor(make({}, {}))
    actor.answer = WorkerNameTaken("W1", "10.0.0.2")
    for _ in range(3):
        with pytest.raises(WorkerNameTaken):
            await actor.do_hello(a_hello())
    (entry,) = actor.audited  # Nor does a store that is away hide why it was refused.
    assert (entry.principal, entry.action) == ("W1", "worker.refused")
    assert "10.0.0.2" in entry.detail


async def test_what_a_worker_refused_is_on_record(make: Make) -> None:
    actor = Actor(make({}, {}))
    written = [await actor.do_order_refused("W1", count, "x" * 5000) for count in (3, 4)]
    assert written == [True, False]  # The worker tells of the four again.
    (entry,) = actor.audited
    assert (entry.principal, entry.action) == ("W1", "order.refused")
    assert entry.detail.startswith("3 times; the last time: xxx")
    assert len(entry.detail) == 1000


async def test_another_refusal_does_not_hide_refused_orders(make: Make) -> None:
    actor = Actor(make({}, {}))
    actor.answer = WorkerNameTaken("W1", "10.0.0.2")
    with pytest.raises(WorkerNameTaken):
        await actor.do_hello(a_hello())
    actor.answer = None
    assert await actor.do_order_refused("W1", 1, "changed") is True
    assert [entry.action for entry in actor.audited] == ["worker.refused", "order.refused"]


async def test_what_the_store_did_not_take_is_not_said_to_be_on_record(make: Make) -> None:
    cluster = make({}, {})
    actor = Actor(cluster)
    actor.answer = StoreUnavailable("away", 5)
    assert await actor.do_order_refused("W1", 3, "changed") is False
    for _ in range(2):
        await actor._note_refusal("W1", "worker.refused", "changed")
    actor.answer = None
    cluster.elapsed += TELL_S
    await actor._record_due()
    assert actor.audited[-1].action == "worker.refused"
    assert actor.audited[-1].detail == "2 times; the last time: changed"
    assert await actor.do_order_refused("W1", 3, "changed") is True


async def test_audit_lines_from_elsewhere_are_bounded(make: Make) -> None:
    actor = Actor(make({}, {}))
    entry = AuditEntry(at=T0, principal="p" * 5000, action="a", target="t", outcome="o")
    await actor.do_audit(*[entry] * 5000)
    assert len(actor.audited) == 1000
    assert {len(one.principal) for one in actor.audited} == {200}


async def test_what_is_to_be_replayed_is_not_looked_for_on_the_event_loop(make: Make) -> None:
    threads: list[str] = []

    class Reader:
        def page(self, where: TaskFilter, *, before_seq: int | None, limit: int) -> list[Any]:
            threads.append(threading.current_thread().name)
            return [SimpleNamespace(id=f"t{n}") for n in range(limit)]

    actor = Actor(make({}, {}))
    actor._loop = asyncio.get_running_loop()
    actor._reader = Reader()  # type: ignore[assignment]
    actor._reading = ThreadPoolExecutor(1, "reading")
    await actor.do_retry_many(ReplayQuery(where=TaskFilter(), limit=2), principal="ci")
    (asked,) = actor.asked
    assert (asked.ids, asked.more) == (("t0", "t1"), True)
    assert threads == ["reading_0"]
    actor._reading.shutdown()

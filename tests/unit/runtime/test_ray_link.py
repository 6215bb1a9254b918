"""Calls to actors, with Ray's two functions replaced by paper ones."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError

from hcna_ray.core.errors import HcnaError, ModeratorUnavailable, NoAnswer, NotFound, StaleWorker
from hcna_ray.core.models import Token
from hcna_ray.runtime import wire
from hcna_ray.runtime.messages import Ack, Exchange, Grant, Report, ReportKind
from hcna_ray.runtime.ray_link import ActorLink, AgentModeratorLink, SlotModeratorLink, agent_name
from tests.support.builders import T0

EXCHANGE = Exchange(worker="W1", incarnation="a", slot=0, seq=1)
STARTED = Report(ReportKind.STARTED, "t1", Token(1, 1), T0)


class Ref:
    """What an actor's answer is before it is there."""

    def __init__(self, answer: Any, delay_s: float = 0.0) -> None:
        self.answer, self.delay_s = answer, delay_s

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        await asyncio.sleep(self.delay_s)
        return self.result()

    def result(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class PaperRay:
    """One named actor, which may be absent, dead or slow."""

    def __init__(self) -> None:
        self.there = True
        self.answer: Any = ("ok", None)
        self.delay_s = 0.0
        self.lookups: list[str] = []
        self.calls: list[tuple[Any, ...]] = []

    def get_actor(self, name: str, namespace: str) -> Any:
        self.lookups.append(f"{namespace}/{name}")
        if not self.there:
            raise ValueError(f"no actor {name}")
        return SimpleNamespace(call=SimpleNamespace(remote=self._remote))

    def _remote(self, *call: Any) -> Ref:
        self.calls.append(call)
        return Ref(self.answer, self.delay_s)

    def get(self, ref: Ref, timeout: float) -> Any:
        self.timeout = timeout
        return ref.result()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> PaperRay:
    paper = PaperRay()
    monkeypatch.setattr("ray.get_actor", paper.get_actor)
    monkeypatch.setattr("ray.get", paper.get)
    return paper


def test_an_actor_is_looked_up_once_and_answers_by_value(ray: PaperRay) -> None:
    ray.answer = ("ok", 42)
    link = ActorLink("moderator")

    assert link.call("status") == 42
    assert link.call("cancel", "t1", reason="r", timeout_s=3.0) == 42
    assert ray.lookups == ["hcna/moderator"]
    assert ray.calls == [("status", (), {}), ("cancel", ("t1",), {"reason": "r"})]
    assert ray.timeout == 3.0


def test_expected_trouble_comes_back_as_itself(ray: PaperRay) -> None:
    ray.answer = ("error", NotFound("task", "t1"))

    with pytest.raises(NotFound, match="t1"):
        ActorLink("moderator").call("cancel", "t1")


def test_an_actor_that_is_not_there_is_unavailable_and_looked_for_again(ray: PaperRay) -> None:
    ray.there = False
    link = ActorLink("moderator")
    with pytest.raises(ModeratorUnavailable, match="not there") as refused:
        link.call("status")
    assert not isinstance(refused.value, NoAnswer)  # Nothing was sent.
    ray.there = True
    assert link.call("status") is None


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("away", None)])
def test_an_actor_that_died_is_looked_up_anew(ray: PaperRay, error: RayError) -> None:
    link = ActorLink("moderator")
    link.call("status")
    ray.answer = error
    with pytest.raises(NoAnswer):
        link.call("status")
    ray.answer = ("ok", 1)

    assert link.call("status") == 1
    assert len(ray.lookups) == 2


def test_no_answer_in_time_is_unavailable_and_nobody_knows_what_happened(ray: PaperRay) -> None:
    ray.answer = GetTimeoutError()
    link = ActorLink("moderator")
    with pytest.raises(NoAnswer, match="GetTimeoutError"):
        link.call("status")
    ray.answer = ("ok", 1)
    link.call("status")
    assert len(ray.lookups) == 1  # It may only be slow.


async def test_the_same_on_an_event_loop(ray: PaperRay) -> None:
    link = ActorLink("moderator")
    ray.answer = ("ok", 7)
    assert await link.acall("status") == 7
    ray.answer = ("error", NotFound("task", "t1"))
    with pytest.raises(NotFound):
        await link.acall("status")
    ray.answer = ActorDiedError()
    with pytest.raises(NoAnswer):
        await link.acall("status")
    ray.answer, ray.delay_s = ("ok", 7), 60.0
    with pytest.raises(NoAnswer, match="TimeoutError"):
        await link.acall("status", timeout_s=0.01)


async def test_who_is_cancelled_while_waiting_is_cancelled(ray: PaperRay) -> None:
    ray.delay_s = 60.0
    waiting = asyncio.create_task(ActorLink("moderator").acall("status"))
    await asyncio.sleep(0)
    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_slots_reports_are_confirmed_by_an_acknowledgement_alone(ray: PaperRay) -> None:
    link = SlotModeratorLink("W1", "a", 20.0)
    ray.answer = ("ok", Ack(applied=1))
    assert await link.report((STARTED,)) is True
    method, (raw,), _ = ray.calls[-1]
    assert (method, wire.unpack_reports(raw)) == ("report", ("W1", "a", (STARTED,)))
    for refusal in (("error", StaleWorker("W1", "a", "b")), ActorDiedError(), ("ok", None)):
        ray.answer = refusal
        assert await link.report((STARTED,)) is False


async def test_a_slots_exchange_raises_what_ends_it(ray: PaperRay) -> None:
    link = SlotModeratorLink("W1", "a", 20.0)
    ray.answer = ("ok", wire.pack_grant(Grant(seq=1)))
    assert await link.exchange(EXCHANGE) == Grant(seq=1)
    method, (raw,), _ = ray.calls[-1]
    assert (method, wire.unpack_exchange(raw)) == ("exchange", EXCHANGE)
    ray.answer = ("error", StaleWorker("W1", "a", "b"))
    with pytest.raises(StaleWorker):
        await link.exchange(EXCHANGE)


async def test_an_agents_calls_find_the_moderator(ray: PaperRay) -> None:
    link = AgentModeratorLink(20.0)
    ray.answer = ("ok", wire.pack_grant(Grant(seq=1, hello=True)))
    assert (await link.exchange(EXCHANGE)).hello
    assert ray.lookups == ["hcna/moderator"]
    assert agent_name("W1") == "agent:W1"


@pytest.mark.parametrize(
    "error",
    [
        ModeratorUnavailable("away", 2),
        StaleWorker("W1", "a", "b"),
        NotFound("task", "t1"),
        HcnaError("anything"),
    ],
)
def test_errors_survive_the_way_between_processes(error: HcnaError) -> None:
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert (str(again), again.code) == (str(error), error.code)

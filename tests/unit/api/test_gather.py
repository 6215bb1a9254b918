from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from hcna_ray.api.gather import FULL_S, STALE_S, Gatherer
from hcna_ray.core.errors import (
    ModeratorUnavailable,
    NoAnswer,
    Overloaded,
    QueueFull,
    StoreUnavailable,
)
from hcna_ray.core.models import TaskSpec, TaskState
from hcna_ray.runtime.messages import Accepted, ModeratorStatus, Refused, SubmitBatch, SubmitResult
from tests.support.builders import T0
from tests.support.fake_moderator import FakeModerator


def spec(name: str) -> TaskSpec:
    return TaskSpec(id=name, task_type="echo", accepted_at=T0)


def a_gatherer(moderator: FakeModerator, **changes: float) -> Gatherer:
    async def sleep(seconds: float) -> None:
        moderator.desk.clock.advance(seconds)
        await asyncio.sleep(0)

    bounds = {"items_max": 10, "bytes_max": 100_000, "call_items": 4, "call_bytes": 50_000}
    bounds |= {"resend_s": 10.0, **changes}
    return Gatherer(moderator, moderator.desk.clock, sleep=sleep, **bounds)  # type: ignore[arg-type]


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_lone_request_goes_out_at_once_and_others_gather_behind_it() -> None:
    moderator = FakeModerator()
    moderator.gate = asyncio.Event()
    gatherer = a_gatherer(moderator)
    calls = [asyncio.create_task(gatherer.submit([spec("t0")]))]
    await turns()
    calls += [asyncio.create_task(gatherer.submit([spec(f"t{i}")])) for i in range(1, 7)]
    await turns()
    assert [len(batch.specs) for batch in moderator.batches] == [1]

    moderator.gate.set()
    answers = await asyncio.gather(*calls)

    assert [len(batch.specs) for batch in moderator.batches] == [1, 4, 2]
    assert [answer[0].task_id for answer in answers if isinstance(answer[0], Accepted)] == [
        f"t{i}" for i in range(7)
    ]
    assert (gatherer.items, gatherer.bytes) == (0, 0)


async def test_an_atomic_batch_goes_alone() -> None:
    moderator = FakeModerator()
    moderator.gate = asyncio.Event()
    gatherer = a_gatherer(moderator)
    calls = [asyncio.create_task(gatherer.submit([spec(f"t{i}")], atomic=i == 2)) for i in range(5)]
    await turns()
    moderator.gate.set()
    await asyncio.gather(*calls)

    sent = [([s.id for s in batch.specs], batch.atomic) for batch in moderator.batches]
    assert sent == [(["t0", "t1"], False), (["t2"], True), (["t3", "t4"], False)]


async def test_what_does_not_fit_into_the_buffer_is_refused_at_once() -> None:
    moderator = FakeModerator()
    moderator.gate = asyncio.Event()
    gatherer = a_gatherer(moderator, items_max=2)
    held = [asyncio.create_task(gatherer.submit([spec(f"t{i}")])) for i in range(2)]
    await turns()

    with pytest.raises(Overloaded):
        await gatherer.submit([spec("t2")])

    moderator.gate.set()
    await asyncio.gather(*held)
    assert await gatherer.submit([spec("t2")])


async def test_that_the_queue_is_full_is_repeated_for_a_moment_without_asking() -> None:
    moderator = FakeModerator(queue_tasks_max=1)
    gatherer = a_gatherer(moderator)
    await gatherer.submit([spec("t0")])
    (answer,) = await gatherer.submit([spec("t1")])
    assert isinstance(answer, Refused)
    asked = len(moderator.batches)

    for number in range(3):
        with pytest.raises(QueueFull) as refusal:
            await gatherer.submit([spec(f"u{number}")])
        assert refusal.value.retry_after_s == answer.error.retry_after_s
    assert len(moderator.batches) == asked

    moderator.desk.cancel("t0")
    moderator.desk.clock.advance(STALE_S)
    (answer,) = await gatherer.submit([spec("t2")])
    assert isinstance(answer, Accepted)


async def test_a_refusal_never_waits_for_the_moderator() -> None:
    """It is asked beside the requests; as many as it has room for are sent, the rest is refused."""
    moderator = FakeModerator(queue_tasks_max=2)
    gatherer = a_gatherer(moderator)
    await gatherer.submit([spec("t0"), spec("t1"), spec("t2")])
    moderator.desk.cancel("t0")
    moderator.desk.clock.advance(FULL_S)

    with pytest.raises(QueueFull):
        await gatherer.submit([spec("t3")])
    await turns()
    answers = await asyncio.gather(
        gatherer.submit([spec("t4"), spec("t5")], atomic=True),
        gatherer.submit([spec("t6")]),
        gatherer.submit([spec("t7")]),
        return_exceptions=True,
    )

    assert [type(answer) for answer in answers] == [QueueFull, list, QueueFull]
    assert moderator.batches[-1].specs == (spec("t6"),)


async def test_the_queue_is_full_no_longer_when_its_room_is_not_used_up() -> None:
    moderator = FakeModerator(queue_tasks_max=5)
    gatherer = a_gatherer(moderator)
    await gatherer.submit([spec(f"t{number}") for number in range(6)])
    for number in range(5):
        moderator.desk.cancel(f"t{number}")

    for number in range(2):
        moderator.desk.clock.advance(FULL_S)
        results = await asyncio.gather(
            gatherer.submit([spec(f"u{number}")]), return_exceptions=True
        )
        assert isinstance(results[0], QueueFull) is (number == 0)
        await turns()
    answers = await gatherer.submit([spec(f"v{number}") for number in range(6)], atomic=False)

    assert [type(answer) for answer in answers] == [Accepted] * 4 + [Refused] * 2


async def test_a_moderator_that_does_not_tell_its_room_is_asked_by_the_next_request() -> None:
    moderator = FakeModerator(queue_tasks_max=1)
    gatherer = a_gatherer(moderator)
    await gatherer.submit([spec("t0"), spec("t1")])
    moderator.desk.clock.advance(FULL_S)
    moderator.down = True

    with pytest.raises(QueueFull):
        await gatherer.submit([spec("t2")])
    await turns()
    with pytest.raises(ModeratorUnavailable):
        await gatherer.submit([spec("t3")])


async def test_a_look_for_room_ends_with_its_gatherer() -> None:
    moderator = FakeModerator(queue_tasks_max=1)
    gatherer = a_gatherer(moderator)
    await gatherer.submit([spec("t0"), spec("t1")])
    moderator.desk.clock.advance(FULL_S)
    asked = asyncio.Event()

    async def status() -> ModeratorStatus:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody waits for it any more")

    moderator.status = status  # type: ignore[method-assign]
    with pytest.raises(QueueFull):
        await gatherer.submit([spec("t2")])
    await asked.wait()

    await gatherer.close(timeout_s=0.01)
    await turns()

    assert not [one for one in asyncio.all_tasks() if one.get_name() == "look-for-room"]


async def test_a_repetition_under_a_key_is_answered_also_while_the_queue_is_full() -> None:
    moderator = FakeModerator(queue_tasks_max=1)
    gatherer = a_gatherer(moderator)
    keyed = dataclasses.replace(spec("t0"), principal="p", idempotency_key="k", fingerprint="f")
    await gatherer.submit([keyed])
    await gatherer.submit([spec("t1")])

    (answer,) = await gatherer.submit([dataclasses.replace(keyed, id="t2")])

    assert answer == Accepted("t0", TaskState.QUEUED, True)


async def test_what_is_too_large_for_the_room_left_says_nothing_about_others() -> None:
    moderator = FakeModerator(queue_bytes_max=1000)
    gatherer = a_gatherer(moderator)
    (large,) = await gatherer.submit([dataclasses.replace(spec("t0"), payload=bytes(2000))])
    assert isinstance(large, Refused)

    (small,) = await gatherer.submit([spec("t1")])

    assert isinstance(small, Accepted)


async def test_a_lost_answer_is_asked_for_again_with_the_same_batch() -> None:
    moderator = FakeModerator()
    moderator.answers_lost = 2
    gatherer = a_gatherer(moderator)

    (answer,) = await gatherer.submit([spec("t1")])

    assert isinstance(answer, Accepted)
    assert len(moderator.batches) == 3
    assert len({id(batch) for batch in moderator.batches}) == 1
    assert moderator.desk.memory.size().tasks == 1


async def test_after_ten_seconds_of_silence_everybody_is_told() -> None:
    moderator = FakeModerator()
    moderator.down = True
    gatherer = a_gatherer(moderator)
    since = moderator.desk.clock.elapsed()

    results = await asyncio.gather(
        *(gatherer.submit([spec(f"t{i}")]) for i in range(6)), return_exceptions=True
    )

    assert all(isinstance(result, ModeratorUnavailable) for result in results)
    assert 9 <= moderator.desk.clock.elapsed() - since <= 11
    assert (gatherer.items, gatherer.bytes) == (0, 0)


async def test_who_was_sent_and_never_answered_is_told_that_nobody_knows() -> None:
    moderator = FakeModerator()
    moderator.dies = True
    gatherer = a_gatherer(moderator, call_items=1)

    first, second = await asyncio.gather(
        gatherer.submit([spec("t1")]), gatherer.submit([spec("t2")]), return_exceptions=True
    )
    third = await asyncio.gather(gatherer.submit([spec("t3")]), return_exceptions=True)

    assert isinstance(first, NoAnswer)  # It is stored, as it happens.
    assert moderator.desk.memory.get(["t1"])
    # Of the others nothing was sent: it is true that nothing is stored.
    for refused in (second, *third):
        assert type(refused) is ModeratorUnavailable
    assert {one.id for batch in moderator.batches for one in batch.specs} == {"t1"}

    moderator.revive()
    assert await gatherer.submit([spec("t4")])


async def test_a_refusal_after_a_lost_answer_is_not_believed() -> None:
    moderator = FakeModerator()
    moderator.answers_lost = 1
    gatherer = a_gatherer(moderator)
    submitted = moderator.submit

    async def with_a_store_that_goes_away(batch: SubmitBatch) -> Sequence[SubmitResult]:
        try:
            return await submitted(batch)
        finally:
            moderator.refuses = StoreUnavailable("read-only", 3)

    moderator.submit = with_a_store_that_goes_away  # type: ignore[method-assign]

    with pytest.raises(NoAnswer, match="read-only"):
        await gatherer.submit([spec("t1")])
    with pytest.raises(StoreUnavailable):
        await gatherer.submit([spec("t2")])
    assert moderator.desk.memory.get(["t1"])
    assert not moderator.desk.memory.get(["t2"])


async def test_a_call_that_closing_cuts_off_may_have_been_carried_out() -> None:
    moderator = FakeModerator()
    moderator.gate = asyncio.Event()
    gatherer = a_gatherer(moderator, call_items=1)
    calls = [asyncio.create_task(gatherer.submit([spec(f"t{i}")])) for i in range(2)]
    await turns()

    await gatherer.close(timeout_s=0.01)

    sent, held = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(sent, NoAnswer)
    assert type(held) is ModeratorUnavailable


async def test_a_client_that_left_does_not_disturb_the_others() -> None:
    moderator = FakeModerator()
    moderator.gate = asyncio.Event()
    gatherer = a_gatherer(moderator)
    calls = [asyncio.create_task(gatherer.submit([spec(f"t{i}")])) for i in range(3)]
    await turns()
    calls[1].cancel()
    moderator.gate.set()

    results = await asyncio.gather(*calls, return_exceptions=True)

    assert isinstance(results[1], asyncio.CancelledError)
    assert isinstance(results[0], list)
    assert results[2]
    assert gatherer.items == 0


async def test_closing_refuses_what_is_left_and_what_comes_later() -> None:
    moderator = FakeModerator()
    moderator.gate = asyncio.Event()
    gatherer = a_gatherer(moderator)
    calls = [asyncio.create_task(gatherer.submit([spec(f"t{i}")])) for i in range(2)]
    await turns()

    await gatherer.close(timeout_s=0.01)

    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, ModeratorUnavailable) for result in results)
    with pytest.raises(ModeratorUnavailable):
        await gatherer.submit([spec("t3")])

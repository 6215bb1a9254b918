"""What handlers have printed, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from hcna_ray.api import outputs
from hcna_ray.api.outputs import KEY_BYTES, redacted
from hcna_ray.runtime.messages import ReportKind
from tests.support.asgi_stream import a_stream
from tests.support.builders import T0
from tests.support.c1 import ADMIN_KEY, Composite
from tests.support.paper_worker import PaperWorker

KEY = b"hcna_" + b"aB3_-" * 8 + b"xyz"
STARS = b"hcna_" + b"*" * 43


async def started(c1: Composite) -> tuple[str, PaperWorker, object]:
    """Return a task that runs, and where."""
    task_id = await c1.submit()
    worker = c1.moderator.join()
    (offer,) = worker.granted()
    worker.report(worker.started(offer))
    return task_id, worker, offer


async def test_what_was_printed_is_shown_with_whose_it_is(c1: Composite) -> None:
    task_id, worker, offer = await started(c1)
    c1.outputs.texts[task_id, 1] = "one\ntwö\n".encode()
    worker.report(worker.ended(offer, ReportKind.COMPLETED, result=b"{}"))

    reply = await c1.http.get(f"/tasks/{task_id}/logs", params={"follow": "true"})

    assert (reply.status_code, reply.text) == (200, "one\ntwö\n")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert (reply.headers["x-attempt"], reply.headers["x-worker"]) == ("1", "W1")
    reply = await c1.http.get(f"/tasks/{task_id}/logs", params={"offset": 4, "attempt": 1})
    assert reply.text == "twö\n"


async def test_who_prints_nothing_has_an_empty_output(c1: Composite) -> None:
    task_id, _, _ = await started(c1)
    reply = await c1.http.get(f"/tasks/{task_id}/logs")
    assert (reply.status_code, reply.content) == (200, b"")


async def test_a_long_output_comes_in_pieces(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PIECE_BYTES", 128)
    monkeypatch.setattr("hcna_ray.api.routes.outputs.PIECE_BYTES", 128)
    task_id, worker, offer = await started(c1)
    text = b"0123456789" * 5 + b"hh" + KEY + b"h" + b"0123456789" * 16 + KEY + KEY + b"hcna_h"
    c1.outputs.texts[task_id, 1] = text
    worker.report(worker.ended(offer, ReportKind.COMPLETED, result=b"{}"))
    reply = await c1.http.get(f"/tasks/{task_id}/logs")
    assert reply.content == text.replace(KEY, STARS)


@pytest.mark.parametrize("follow", ["false", "true"])
async def test_no_offset_shows_the_rest_of_a_key(c1: Composite, follow: str) -> None:
    task_id, worker, offer = await started(c1)
    text = b"a " + KEY + b" b " + KEY + KEY + b"\n"
    told = text.replace(KEY, STARS)
    c1.outputs.texts[task_id, 1] = text
    worker.report(worker.ended(offer, ReportKind.COMPLETED, result=b"{}"))
    for offset in range(len(text) + 2):
        reply = await c1.http.get(
            f"/tasks/{task_id}/logs", params={"offset": offset, "follow": follow}
        )
        assert reply.content == told[offset:], offset


async def test_half_of_a_key_is_kept_back_while_the_rest_may_come(c1: Composite) -> None:
    task_id, worker, offer = await started(c1)
    path = f"/tasks/{task_id}/logs"
    c1.outputs.texts[task_id, 1] = b"a " + KEY[:-1]
    assert (await c1.http.get(path)).content == b"a hcna_"
    assert (await c1.http.get(path, params={"offset": 20})).content == b""
    c1.outputs.texts[task_id, 1] += KEY[-1:] + b" b"
    assert (await c1.http.get(path, params={"offset": 7})).content == b"*" * 43 + b" b"
    c1.outputs.texts[task_id, 1] += b" hcna_ray"
    worker.report(worker.ended(offer, ReportKind.COMPLETED, result=b"{}"))
    assert (await c1.http.get(path)).content == b"a " + STARS + b" b hcna_ray"


async def test_attempts_that_are_not_there_are_not_found(c1: Composite) -> None:
    task_id = await c1.submit()
    reply = await c1.http.get(f"/tasks/{task_id}/logs")
    assert (reply.status_code, reply.json()["code"]) == (404, "attempt_not_found")
    reply = await c1.http.get("/tasks/task-of-nobody/logs")
    assert (reply.status_code, reply.json()["code"]) == (404, "task_not_found")


async def test_a_worker_that_is_away_is_named(c1: Composite) -> None:
    task_id, _, _ = await started(c1)
    c1.outputs.away.add("W1")
    reply = await c1.http.get(f"/tasks/{task_id}/logs")
    assert (reply.status_code, reply.json()["code"]) == (503, "output_unavailable")
    assert "W1" in reply.json()["detail"]
    assert "retry-after" in reply.headers


async def test_an_output_is_followed_until_its_attempt_has_ended(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PAUSE_S", 0.001)
    monkeypatch.setattr(outputs, "PAUSE_S_MAX", 0.001)
    task_id, worker, offer = await started(c1)
    c1.outputs.texts[task_id, 1] = b"one\n\n"
    async with a_stream(c1.app, f"/tasks/{task_id}/logs", ADMIN_KEY, follow="1") as stream:
        assert await stream.block() == "one"
        c1.outputs.texts[task_id, 1] += b"two\n\n" + KEY[:20]
        assert await stream.block() == "two"
        # The last of it is printed between the last look and the end.
        c1.outputs.texts[task_id, 1] += KEY[20:] + b"\n\nthree\n\n"
        worker.report(worker.ended(offer, ReportKind.COMPLETED, result=b"{}"))
        assert await stream.block() == STARS.decode()
        assert await stream.block() == "three"
        assert await stream.block() is None
        assert stream.complete


async def test_a_follower_whose_worker_falls_silent_is_let_go(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PAUSE_S", 0.001)
    task_id, _, _ = await started(c1)
    c1.outputs.texts[task_id, 1] = b"one\n\n"
    async with a_stream(c1.app, f"/tasks/{task_id}/logs", ADMIN_KEY, follow="1") as stream:
        assert await stream.block() == "one"
        c1.outputs.away.add("W1")
        assert await stream.block() is None


async def test_a_key_that_is_good_no_more_reads_no_further(
    c1: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PAUSE_S", 0.001)
    task_id, _, _ = await started(c1)
    c1.outputs.texts[task_id, 1] = b"one\n\n"
    c1.keys.add("hcna_short", name="short", role="operator", expires_at=T0 + 60.0)
    async with a_stream(c1.app, f"/tasks/{task_id}/logs", "hcna_short", follow="1") as stream:
        assert await stream.block() == "one"
        c1.moderator.desk.clock.advance(61.0)
        c1.outputs.texts[task_id, 1] += b"two\n\n"
        assert await stream.block() is None


async def read_through(text: bytes, size: int) -> bytes:
    """Read a whole output in pieces, as it grows byte by byte."""
    grown = 0

    async def read(offset: int) -> bytes | None:
        nonlocal grown
        grown = min(len(text), grown + size)
        return text[offset:grown]

    async def ended() -> bool:
        return grown == len(text)

    found: AsyncGenerator[bytes, None] = outputs.pieces(
        read,
        0,
        first=outputs.Piece(b"", 0),
        over=False,
        ended=ended,
        still_good=lambda: True,
        follow=True,
        life_s=60.0,
    )
    return b"".join([piece async for piece in found])


@pytest.mark.parametrize("size", [1, 7, 48, 1000])
async def test_keys_are_made_unreadable_however_they_come(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PAUSE_S", 0.0)
    monkeypatch.setattr(outputs, "PAUSE_S_MAX", 0.0)
    text = b"a " + KEY + b" b\n" + KEY + KEY + b"\nhcna_short hcnah"
    told = b"a " + STARS + b" b\n" + STARS + STARS + b"\nhcna_short hcnah"
    async with asyncio.timeout(20):
        assert await read_through(text, size) == told


def test_only_keys_are_made_unreadable() -> None:
    assert redacted(KEY[:-1], last=True) == KEY[:-1]
    assert redacted(b"x" + KEY + b"y", last=True) == b"x" + STARS + b"y"
    assert redacted(b"hcna_ray", last=False) == b"hcna_"
    assert redacted(b"hcna_ray ", last=False) == b"hcna_ray "


def test_keys_that_lie_in_each_other_are_unreadable_from_everywhere() -> None:
    text = KEY[:30] + KEY[:40] + KEY + b"x" * 60
    shown = redacted(text, last=True)
    assert shown == b"hcna_" + b"*" * (30 + 40 + 43) + b"x" * 60
    for start in range(len(text)):
        behind = start + KEY_BYTES - 1
        assert redacted(text[start:], last=True)[KEY_BYTES - 1 :] == shown[behind:]
    # The end of a whole key may be the beginning of another.
    text = KEY[:-5] + b"hcna_"
    assert redacted(text, last=False) == STARS

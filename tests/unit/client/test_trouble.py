from __future__ import annotations

import asyncio

import httpx
import pytest

from hcna_ray.client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    ConnectionsBusy,
    InvalidRequest,
    Overloaded,
    Unauthorized,
    UnexpectedAnswer,
)
from hcna_ray.client.plans import Patience
from tests.support.fake_c1 import FakeC1, Reply, Seen, json_reply, problem
from tests.support.fake_time import FakeTime


def test_a_lost_answer_does_not_double_the_task(client: Client, c1: FakeC1) -> None:
    def lose(seen: Seen) -> None:
        raise httpx.ReadError("connection reset")

    c1.after.append(lose)
    client.submit("echo")

    first, second = c1.requests
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert len(c1.tasks) == 1


def test_two_submits_have_two_keys(client: Client, c1: FakeC1) -> None:
    client.submit("echo")
    client.submit("echo")
    assert len(c1.tasks) == 2


@pytest.mark.parametrize(
    ("status", "code"), [(503, "overloaded"), (429, "quota"), (504, "outcome_unknown")]
)
def test_retry_after_is_honoured(
    client: Client, c1: FakeC1, time: FakeTime, status: int, code: str
) -> None:
    c1.script.append(problem(status, code, retry_after_s=7))
    client.submit("echo")
    assert time.pauses == [7.0]


def test_backoff_grows_and_stops(client: Client, c1: FakeC1, time: FakeTime) -> None:
    c1.script.extend(httpx.ConnectError("refused") for _ in range(100))
    with pytest.raises(ConnectionFailed) as caught:
        client.submit("echo")
    assert time.pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert max(time.pauses) <= 5.0
    assert sum(time.pauses) <= 30.0
    assert "hcna up" in str(caught.value)
    assert "http://c1.test" in str(caught.value)


def test_a_client_that_has_no_connection_free_does_not_blame_c1(
    client: Client, async_client: AsyncClient, c1: FakeC1, time: FakeTime
) -> None:
    async def submit() -> None:
        await async_client.submit("echo")

    for ask in (lambda: client.submit("echo"), lambda: asyncio.run(submit())):
        c1.script[:] = [httpx.PoolTimeout("") for _ in range(100)]
        time.pauses.clear()
        with pytest.raises(ConnectionsBusy) as caught:
            ask()
        assert isinstance(caught.value, ConnectionFailed)
        assert "this client waited for a connection" in str(caught.value)
        for misleading in ("cannot reach", "hcna up", "HCNA_URL"):
            assert misleading not in str(caught.value)
        assert time.pauses  # One may come free: it was tried again first.


def test_an_entrance_that_has_just_restarted_is_asked_again(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    body = b"Path '/tasks' not found. Ping http://.../-/routes for available routes."
    c1.script.append(Reply(404, body, {"content-type": "text/plain"}))

    client.submit("echo")

    assert len(c1.tasks) == 1
    assert len(time.pauses) == 1


def test_a_retry_after_beyond_patience_raises_at_once(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    c1.script.append(problem(503, "overloaded", retry_after_s=31))
    with pytest.raises(Overloaded) as caught:
        client.submit("echo")
    assert time.pauses == []
    assert caught.value.retry_after_s == 31


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (problem(400, "malformed_json"), InvalidRequest),
        (problem(401, "unauthorized"), Unauthorized),
        (problem(413, "too_large"), InvalidRequest),
        (problem(422, "invalid_payload"), InvalidRequest),
        (problem(507, "disk_full", retry_after_s=1), Overloaded),
    ],
)
def test_a_refusal_is_never_sent_again(
    client: Client, c1: FakeC1, time: FakeTime, reply: Reply, error: type[Exception]
) -> None:
    c1.script.append(reply)
    with pytest.raises(error):
        client.submit("echo")
    assert time.pauses == []
    assert len(c1.requests) == 1


def test_a_proxy_that_speaks_for_c1_is_tried_again(
    client: Client, c1: FakeC1, time: FakeTime
) -> None:
    c1.script.append(Reply(500, b"<html>no server", {"content-type": "text/html"}))
    client.submit("echo")
    assert len(time.pauses) == 1


def test_an_error_of_c1_itself_is_not(client: Client, c1: FakeC1, time: FakeTime) -> None:
    c1.script.append(problem(500, "internal"))
    with pytest.raises(Exception, match="internal"):
        client.submit("echo")
    assert time.pauses == []


def test_fields_are_named(client: Client, c1: FakeC1) -> None:
    errors = [{"field": "payload.message", "message": "must be text"}]
    c1.script.append(problem(422, "invalid_payload", "does not fit", errors=errors))
    with pytest.raises(InvalidRequest) as caught:
        client.submit("echo")
    assert caught.value.errors[0].field == "payload.message"
    assert "payload.message: must be text" in str(caught.value)


@pytest.mark.parametrize("body", [b"hello", b"[1]", b'{"other": true}'])
def test_another_program_at_the_address_is_recognised(
    client: Client, c1: FakeC1, body: bytes
) -> None:
    c1.script.append(Reply(200, body))
    with pytest.raises(UnexpectedAnswer, match="HCNA_URL"):
        client.submit("echo")


def test_a_listing_with_strange_items_is_recognised(client: Client, c1: FakeC1) -> None:
    c1.script.append(json_reply(200, {"tasks": ["x"]}))
    with pytest.raises(UnexpectedAnswer):
        list(client.tasks())


def test_an_address_without_scheme_fails_at_once() -> None:
    with (
        Client("c1.test:8080", "k", sleep=lambda delay_s: pytest.fail("tried again")) as client,
        pytest.raises(ConnectionFailed),
    ):
        client.workers()


def test_jitter_spreads_clients() -> None:
    patience = Patience()
    assert patience.delay_s(3, 0.0) == pytest.approx(0.2)
    assert patience.delay_s(3, 0.999) == pytest.approx(0.4, rel=0.01)
    assert patience.delay_s(1000, 1.0) == 5.0

"""From which address a request comes, and how many wrong keys may come from there."""

from __future__ import annotations

from typing import Any

import pytest

from hcna_ray.api.clients import (
    ADDRESS,
    ADDRESSES_MAX,
    GOOD_MAX,
    WINDOW_S,
    WRONG_MAX,
    Guesses,
    Origins,
)
from hcna_ray.core.errors import RateLimited
from tests.support.c1 import EDGE_MARK
from tests.support.paper_worker import PaperClock

PEER = ("127.0.0.1", 4711)


def settled(mark: str | None, *fields: tuple[str, str], believed: str = "") -> dict[str, Any]:
    """Return a request's scope, with what uvicorn has made of it, after it was looked at."""
    headers = [(name.encode(), value.encode()) for name, value in fields]
    scope = {"headers": headers, "client": (believed, 0) if believed else PEER}
    Origins(mark).settle(scope)
    return scope


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
    ],
)
def test_the_edge_is_believed(said: str, address: str) -> None:
    scope = settled(
        EDGE_MARK,
        ("host", "c1"),
        ("x-forwarded-for", said),
        ("x-hcna-client", f"{EDGE_MARK} {said}"),
        believed=said,
    )

    assert (scope[ADDRESS], scope["client"]) == (address, (address, 0))
    assert scope["headers"] == [(b"host", b"c1"), (b"x-forwarded-for", said.encode())]


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        (EDGE_MARK, ["x 192.0.2.7"]),
        (EDGE_MARK, ["192.0.2.7"]),
        (EDGE_MARK, [""]),
        (EDGE_MARK, [f"{EDGE_MARK} nowhere"]),
        (EDGE_MARK, [f"{EDGE_MARK} \u00e4"]),
        (EDGE_MARK, [f"{EDGE_MARK}"]),
        (EDGE_MARK, [f"{EDGE_MARK} 192.0.2.7", f"{EDGE_MARK} 192.0.2.8"]),
        (None, [f"{EDGE_MARK} 192.0.2.7"]),
        (None, ["None 192.0.2.7"]),
    ],
)
def test_nobody_else_is(mark: str | None, said: list[str]) -> None:
    scope = settled(mark, ("host", "c1"), *(("x-hcna-client", each) for each in said))

    assert ADDRESS not in scope
    assert scope["client"] == PEER
    assert scope["headers"] == [(b"host", b"c1")]


def test_what_a_client_says_of_itself_is_not_in_the_audit_log() -> None:
    scope = settled(EDGE_MARK, ("x-forwarded-for", "9.9.9.9"), believed="9.9.9.9")

    assert ADDRESS not in scope
    assert scope["client"] == ("127.0.0.1", 0)


def spent(clock: PaperClock, address: str = "192.0.2.7") -> Guesses:
    guesses = Guesses(clock)
    for number in range(WRONG_MAX):
        guesses.check(address, f"wrong {number}")
        guesses.wrong(address)
    return guesses


def test_after_ten_wrong_keys_within_a_minute_no_key_is_looked_at() -> None:
    clock = PaperClock()
    guesses = spent(clock)

    with pytest.raises(RateLimited) as refusal:
        guesses.check("192.0.2.7", "right")
    assert refusal.value.retry_after_s == WINDOW_S
    guesses.check("192.0.2.8", "right")

    clock.advance(WINDOW_S - 1)
    with pytest.raises(RateLimited) as refusal:
        guesses.check("192.0.2.7", "right")
    assert refusal.value.retry_after_s == 1
    clock.advance(1)
    guesses.check("192.0.2.7", "right")


def test_the_bound_moves_with_time() -> None:
    clock = PaperClock()
    guesses = Guesses(clock)
    for _ in range(WRONG_MAX):
        guesses.wrong("192.0.2.7")
        clock.advance(WINDOW_S / WRONG_MAX)

    guesses.check("192.0.2.7", "x")
    guesses.wrong("192.0.2.7")
    with pytest.raises(RateLimited) as refusal:
        guesses.check("192.0.2.7", "x")
    assert refusal.value.retry_after_s == WINDOW_S / WRONG_MAX


def test_a_key_that_was_good_there_is_looked_at_all_the_same() -> None:
    guesses = Guesses(PaperClock())
    guesses.right("192.0.2.7", "good")
    for _ in range(WRONG_MAX):
        guesses.wrong("192.0.2.7")

    guesses.check("192.0.2.7", "good")
    with pytest.raises(RateLimited):
        guesses.check("192.0.2.7", "good elsewhere")


def test_keys_of_this_machine_are_not_counted() -> None:
    guesses = Guesses(PaperClock())
    guesses.right(None, "good")
    for _ in range(2 * WRONG_MAX):
        guesses.check(None, "x")
        guesses.wrong(None)

    assert not guesses._wrong
    assert not guesses._good


def test_a_network_of_ipv6_is_one_address() -> None:
    guesses = spent(PaperClock(), "2001:db8::1")

    with pytest.raises(RateLimited):
        guesses.check("2001:db8::ffff:2", "x")
    guesses.check("2001:db8:0:1::1", "x")


def test_what_is_remembered_is_bounded() -> None:
    guesses = spent(PaperClock(), "first")
    guesses.right("first", "good")
    for number in range(max(ADDRESSES_MAX, GOOD_MAX)):
        guesses.wrong(f"address {number}")
        guesses.right(f"address {number}", "good")

    guesses.check("first", "x")
    assert len(guesses._wrong) == ADDRESSES_MAX
    assert len(guesses._good) == GOOD_MAX

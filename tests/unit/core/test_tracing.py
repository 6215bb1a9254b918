"""W3C trace context, and the id that an attempt's span has wherever it is told of."""

from __future__ import annotations

import pytest

from hcna_ray.core.models import Token
from hcna_ray.core.tracing import TraceParent, attempt_span_id, parse_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True)]
)
def test_what_a_traceparent_says(flags: str, sampled: bool) -> None:
    assert parse_traceparent(f"00-{TRACE}-{SPAN}-{flags}") == TraceParent(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "00-zz",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE.upper()}-{SPAN}-01",
    ],
)
def test_what_is_no_traceparent_says_nothing(text: str | None) -> None:
    assert parse_traceparent(text) is None


def test_every_attempt_has_a_span_of_its_own_and_always_the_same() -> None:
    ids = {
        attempt_span_id(task, Token(generation, attempt))
        for task in ("a", "b")
        for generation in (1, 2)
        for attempt in (1, 2)
    }

    assert len(ids) == 8
    assert attempt_span_id("a", Token(1, 2)) in ids
    assert all(len(one) == 16 and int(one, 16) for one in ids)

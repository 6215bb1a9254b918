"""What travels between moderator and workers."""

from __future__ import annotations

from typing import Any

import pytest

from hcna_ray.core.envelopes import Intent, Telemetry, trace_id
from hcna_ray.core.errors import Invalid

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def an_intent() -> Intent:
    return Intent(
        msg_id="m1",
        ts=1000.0,
        src="M1",
        dst="W1",
        payload={"message": "hello"},
        trace={"traceparent": TRACE},
        intent="test.ping",
    )


def test_an_intent_comes_back_as_it_was_sent() -> None:
    sent = an_intent()

    assert sent.to_dict()["schema"] == "hcna.intent.v1"
    assert Intent.from_dict(sent.to_dict()) == sent


def test_telemetry_comes_back_as_it_was_sent() -> None:
    sent = Telemetry(msg_id="m2", ts=1, src="W1", dst="M1", payload={}, trace={})

    assert sent.to_dict()["schema"] == "hcna.telemetry.v1"
    assert Telemetry.from_dict(sent.to_dict()) == sent


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": "hcna.intent.v2"}, "hcna.intent.v2"),
        ({"schema": "hcna.telemetry.v1"}, "this node speaks 'hcna.intent.v1'"),
        ({"admin": True}, r"unknown \['admin'\]"),
        ({"payload": []}, "payload must be an object"),
        ({"trace": None}, "trace must be an object"),
        ({"trace": {"traceparent": 7}}, "trace must hold text"),
        ({"msg_id": 7}, "msg_id must be text"),
        ({"dst": None}, "dst must be text"),
        ({"intent": ["test.ping"]}, "intent must be text"),
        ({"ts": "now"}, "ts must be seconds"),
        ({"ts": True}, "ts must be seconds"),
    ],
)
def test_an_envelope_that_does_not_fit_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        Intent.from_dict({**an_intent().to_dict(), **change})

    assert caught.value.code == "invalid_envelope"


def test_a_missing_key_is_named() -> None:
    data = an_intent().to_dict()
    del data["intent"]

    with pytest.raises(Invalid, match=r"missing \['intent'\]"):
        Intent.from_dict(data)


@pytest.mark.parametrize(
    ("traceparent", "found"),
    [
        (TRACE, "4bf92f3577b34da6a3ce929d0e0e4736"),
        (None, None),
        ("", None),
        ("junk", None),
        (TRACE.upper(), None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", None),
    ],
)
def test_the_trace_id_is_found_in_a_sound_traceparent(
    traceparent: str | None, found: str | None
) -> None:
    assert trace_id(traceparent) == found

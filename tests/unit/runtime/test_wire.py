"""What travels as bytes arrives as what it was."""

from __future__ import annotations

from hcna_ray.core.models import FailureKind, Progress, TaskError, Token
from hcna_ray.runtime import wire
from hcna_ray.runtime.messages import (
    Exchange,
    Grant,
    IntentOrder,
    Offer,
    Report,
    ReportKind,
    Stop,
)
from tests.support.builders import T0

TOKEN = Token(3, 2)
REPORTS = (
    Report(ReportKind.STARTED, "t1", TOKEN, T0),
    Report(
        ReportKind.PROGRESS,
        "t1",
        TOKEN,
        T0,
        progress=Progress(at=T0, percent=5.0, message="half"),
        checkpoint=b"\x00\xff",
    ),
    Report(
        ReportKind.FAILED,
        "t1",
        TOKEN,
        T0 + 1,
        started_at=T0,
        error=TaskError(kind=FailureKind.TIMEOUT, message="late", type="E", traceback="here"),
        duration_ms=1000.25,
    ),
    Report(ReportKind.COMPLETED, "t2", TOKEN, T0, started_at=T0, result=b'{"a":"\xc3\xa9"}'),
)


def test_an_exchange_arrives_as_it_was_sent() -> None:
    exchange = Exchange(
        worker="W1",
        incarnation="a",
        slot=-1,
        seq=2**40,
        reports=REPORTS,
        holding=(("t3", TOKEN),),
        answers=(("m1", {"pong": True, "at": T0, "nested": {"list": [1, None, "x"]}}),),
    )
    arrived = wire.unpack_exchange(wire.pack_exchange(exchange))

    assert arrived == exchange
    assert [type(one.token) for one in arrived.reports] == [Token] * len(REPORTS)
    assert type(arrived.holding[0][1]) is Token
    error = arrived.reports[2].error
    assert error is not None
    assert error.kind is FailureKind.TIMEOUT


def test_a_grant_arrives_as_it_was_sent() -> None:
    offers = (
        Offer("t1", "echo", TOKEN, b"{}", 300.0, None, None, None),
        Offer("t2", "x", TOKEN, b"[]", 1.5, 2.5, b"{}", "00-1", (("cpu", 0.5), ("tpu", 1.0))),
    )
    grant = Grant(
        seq=7,
        offers=offers,
        stops=(Stop("t1", TOKEN, -1, "cancel"),),
        intents=(IntentOrder({"msg_id": "m1", "payload": {"a": [1]}}),),
        hello=True,
    )
    arrived = wire.unpack_grant(wire.pack_grant(grant))

    assert arrived == grant
    assert type(arrived.offers[0]) is Offer
    assert arrived.offers[1].received(10.0).expires_boot == 12.5
    assert arrived.stops[0].token == TOKEN


def test_reports_arrive_with_whom_they_are_of() -> None:
    sent = wire.unpack_reports(wire.pack_reports("W1", "a", REPORTS))

    assert sent == ("W1", "a", REPORTS)

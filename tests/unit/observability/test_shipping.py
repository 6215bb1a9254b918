"""The shipper: what is taken goes, what is not waits, and nobody else does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hcna_ray.observability.shipping import (
    DOUBTS_MAX,
    LOOK_S,
    RETRY_AFTER_MAX_S,
    RETRY_MAX_S,
    Answer,
    Shipper,
    Verdict,
)
from hcna_ray.observability.spool import Spool

TAKEN = Answer(Verdict.TAKEN)
AWAY = Answer(Verdict.LATER, "connection refused")


class PaperCollector:
    """Answers as it is told."""

    def __init__(self) -> None:
        self.answer = TAKEN
        self.bodies: list[bytes] = []

    def __call__(self, body: bytes) -> Answer:
        self.bodies.append(body)
        return self.answer


@pytest.fixture
def collector() -> PaperCollector:
    return PaperCollector()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path, 1 << 20)


@pytest.fixture
def shipper(spool: Spool, collector: PaperCollector) -> Shipper:
    return Shipper(spool, collector)


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.action for one in caplog.records]  # type: ignore[attr-defined]


def test_what_is_taken_goes_in_one_request(
    shipper: Shipper, spool: Spool, collector: PaperCollector
) -> None:
    for part in (b"a", b"b", b"c"):
        spool.put(part)

    assert shipper.step() == LOOK_S
    assert collector.bodies == [b"abc"]
    assert spool.oldest(1) == []
    assert shipper.step() == LOOK_S
    assert len(collector.bodies) == 1


def test_much_goes_without_a_pause(
    shipper: Shipper, spool: Spool, collector: PaperCollector
) -> None:
    for _ in range(2):
        spool.put(bytes(600_000 // 2))
        spool.put(bytes(600_000 // 2))

    assert shipper.step() == 0.0


def test_while_the_collector_is_away_everything_waits_in_few_files(
    shipper: Shipper,
    spool: Spool,
    collector: PaperCollector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    collector.answer = AWAY
    pauses = []
    with caplog.at_level(logging.INFO, logger="hcna_ray"):
        for number in range(8):
            spool.put(bytes([65 + number]))
            pauses.append(shipper.step())
        assert len(spool.oldest(1 << 20)) == 1
        collector.answer = TAKEN
        shipper.step()

    assert pauses == [1.0, 2.0, 4.0, 8.0, *[RETRY_MAX_S] * 4]
    assert collector.bodies[-1] == b"ABCDEFGH"
    assert spool.oldest(1) == []
    assert actions(caplog) == ["traces.waiting", "traces.taken"]


@pytest.mark.parametrize(
    ("told", "waits"), [(7.0, 7.0), (0.0, 1.0), (100_000.0, RETRY_AFTER_MAX_S)]
)
def test_a_collector_that_asks_for_patience_gets_it(
    shipper: Shipper, spool: Spool, collector: PaperCollector, told: float, waits: float
) -> None:
    spool.put(b"a")
    collector.answer = Answer(Verdict.LATER, "answered 429", told)

    assert shipper.step() == waits


def test_what_is_refused_for_good_holds_nothing_up(
    shipper: Shipper,
    spool: Spool,
    collector: PaperCollector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spool.put(b"bad")
    collector.answer = Answer(Verdict.REFUSED, "answered 400")
    with caplog.at_level(logging.INFO, logger="hcna_ray"):
        shipper.step()
        collector.answer = Answer(Verdict.TAKEN, "2 refused: too old")
        spool.put(b"half good")
        shipper.step()

    assert spool.oldest(1) == []
    assert actions(caplog) == ["traces.refused", "traces.refused_in_part"]


def test_a_collector_in_trouble_is_given_time_and_no_body_holds_up_the_others_for_ever(
    shipper: Shipper,
    spool: Spool,
    collector: PaperCollector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spool.put(b"poison")
    collector.answer = Answer(Verdict.LATER, "answered 500", None, doubtful=True)
    with caplog.at_level(logging.INFO, logger="hcna_ray"):
        for _ in range(DOUBTS_MAX - 1):
            shipper.step()
        assert spool.oldest(1)
        collector.answer = AWAY  # It was the collector after all.
        shipper.step()
        collector.answer = Answer(Verdict.LATER, "answered 500", None, doubtful=True)
        for _ in range(DOUBTS_MAX - 1):
            shipper.step()
        assert spool.oldest(1)
        shipper.step()

    assert spool.oldest(1) == []
    assert "traces.refused" in actions(caplog)


def test_at_the_end_what_the_last_processes_wrote_still_goes(
    shipper: Shipper, spool: Spool, collector: PaperCollector
) -> None:
    shipper.start()
    spool.put(b"last words")
    shipper.stop()
    shipper.stop()

    assert b"".join(collector.bodies) == b"last words"


def test_a_spool_that_cannot_be_read_ends_nothing(
    shipper: Shipper, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(spool, "prune", broken)

    assert shipper._guarded_step() == RETRY_MAX_S
    assert shipper._guarded_step() == RETRY_MAX_S

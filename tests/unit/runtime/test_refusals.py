"""Refusals on record: few lines, and none of them uncounted."""

from __future__ import annotations

import pytest

from hcna_ray.runtime import refusals
from hcna_ray.runtime.refusals import OTHERS, RefusalBook, Refusals


class Clock:
    """A time that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> RefusalBook:
    return RefusalBook(clock)


def test_the_first_is_told_at_once_and_the_rest_a_minute_later(
    book: RefusalBook, clock: Clock
) -> None:
    book.add("W1", "worker.refused", 1, "first")
    assert book.due() == [Refusals("W1", "worker.refused", 1, "first")]
    for number in range(5):
        book.add("W1", "worker.refused", 2, f"why {number}")
    assert book.due() == []
    clock.now += refusals.TELL_S
    assert book.due() == [Refusals("W1", "worker.refused", 10, "why 4")]
    assert book.due() == []


def test_one_kind_does_not_hide_another(book: RefusalBook) -> None:
    for action in ("worker.refused", "order.refused"):
        book.add("W1", action, 1, "")
        assert [line.action for line in book.due()] == [action]
    assert not book.may_tell("W1", "order.refused")
    assert book.may_tell("W2", "order.refused")


def test_a_flood_of_names_is_bounded_and_adds_up(book: RefusalBook, clock: Clock) -> None:
    lines: list[Refusals] = []
    for number in range(1000):
        book.add(f"W{number}", "worker.refused", 1, "")
        lines += book.due()
    assert len(lines) == refusals.KEYS_MAX
    for _ in range(20):
        clock.now += refusals.TELL_S
        lines += book.due()
    assert sum(line.times for line in lines) == 1000
    assert OTHERS in {line.worker for line in lines}
    assert len(lines) <= 2 * refusals.KEYS_MAX + 1


def test_a_day_has_so_many_lines_and_the_next_one_brings_the_rest(
    book: RefusalBook, clock: Clock
) -> None:
    lines: list[Refusals] = []
    minutes = int(refusals.DAY_S / refusals.TELL_S)
    for _ in range(minutes):
        for worker in ("W1", "W2", "W3"):
            book.add(worker, "worker.refused", 1, "")
        lines += book.due()
        clock.now += refusals.TELL_S
    assert len(lines) == refusals.DAY_MAX
    lines += book.due()
    assert len(lines) <= refusals.DAY_MAX + 3
    assert sum(line.times for line in lines) == 3 * minutes

"""What the audit log is told of refusals between machines: in bounds, and in full.

Whoever can send messages can have them refused, as often as he likes. So one line stands for many:
who sends has one for each kind in a minute, all together have `DAY_MAX` in a day, and what is not
written yet is counted, so that the lines add up. What is counted is lost with the process.

M1 has a book of what its workers and it refuse each other, and the gate one of whom it refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

#: Pause between two lines of one worker and kind.
TELL_S = 60.0
#: Lines in a day.
DAY_MAX = 2000
DAY_S = 86400.0
#: Workers and kinds that are told apart; the rest is put together.
KEYS_MAX = 200
#: Stands for the workers that are not told apart.
OTHERS = "(others)"


class Refusals(NamedTuple):
    """Refusals for which one line is to be written."""

    #: Who was refused, or refused M1: a worker's name, at the gate an address.
    worker: str
    action: str
    times: int
    #: Why, the last time.
    why: str


class RefusalBook:
    """Counts refusals, and says when a line is due. One thread at a time."""

    def __init__(self, elapsed: Callable[[], float], *, keys_max: int = KEYS_MAX) -> None:
        """Begin without any.

        Args:
            elapsed: A clock that never steps.
            keys_max: Workers and kinds that are told apart, and lines in a minute.
        """
        self._elapsed, self._keys_max = elapsed, keys_max
        self._written: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], tuple[int, str]] = {}
        self._day, self._lines = elapsed(), 0

    def add(self, worker: str, action: str, count: int, why: str) -> None:
        """Count refusals; `due` says when they are to be written."""
        key = (worker, action)
        if key not in self._held and len(self._held) >= self._keys_max:
            key = (OTHERS, action)
        self._held[key] = self._held.get(key, (0, ""))[0] + count, why

    def due(self) -> list[Refusals]:
        """Return the lines that are due. They count as written: what fails is to be added again."""
        self._look()
        found: list[Refusals] = []
        for key in list(self._held):
            if not self._room():
                break
            if key not in self._written:
                self._count(key)
                found.append(Refusals(*key, *self._held.pop(key)))
        return found

    def may_tell(self, worker: str, action: str) -> bool:
        """Whether a line of what is counted elsewhere may be written; then it counts as written."""
        self._look()
        key = (worker, action)
        if key in self._written or not self._room():
            return False
        self._count(key)
        return True

    def _look(self) -> None:
        now = self._elapsed()
        if now - self._day >= DAY_S:
            self._day, self._lines = now, 0
        self._written = {key: at for key, at in self._written.items() if now - at < TELL_S}

    def _room(self) -> bool:
        return self._lines < DAY_MAX and len(self._written) < self._keys_max

    def _count(self, key: tuple[str, str]) -> None:
        self._written[key] = self._elapsed()
        self._lines += 1

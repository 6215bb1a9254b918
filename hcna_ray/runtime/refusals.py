"""What the audit log is told of refusals between M1 and its workers: in bounds, and in full.

Whoever can send messages can have them refused, as often as he likes. So one line stands for many:
a worker has one for each kind in a minute, all workers together have `DAY_MAX` in a day, and what
is not written yet is counted, so that the lines add up. What is counted is lost with the process.
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

    worker: str
    action: str
    times: int
    #: Why, the last time.
    why: str


class RefusalBook:
    """Counts refusals, and says when a line is due. On one event loop."""

    def __init__(self, elapsed: Callable[[], float]) -> None:
        """Begin without any.

        Args:
            elapsed: A clock that never steps.
        """
        self._elapsed = elapsed
        self._written: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], tuple[int, str]] = {}
        self._day, self._lines = elapsed(), 0

    def add(self, worker: str, action: str, count: int, why: str) -> None:
        """Count refusals; `due` says when they are to be written."""
        key = (worker, action)
        if key not in self._held and len(self._held) >= KEYS_MAX:
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
        return self._lines < DAY_MAX and len(self._written) < KEYS_MAX

    def _count(self, key: tuple[str, str]) -> None:
        self._written[key] = self._elapsed()
        self._lines += 1

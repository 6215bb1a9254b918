"""What callers did and what they were refused, gathered for the audit log.

What changes something is put on record by the moderator, one line each. Everything else that passes
C1 is counted here and told in bounds: one line for each caller, route and outcome of a window. A
refusal costs whoever is refused a request and us an addition; it is never a call to the moderator
of its own, and never a line of its own. Beyond the bounds lines are put together, not dropped: the
number of requests stays right.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from starlette.requests import Request

from hcna_ray.api.ports import ModeratorPort
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError, NoAnswer
from hcna_ray.core.models import AuditEntry
from hcna_ray.security.keys import ApiKey

log = logging.getLogger(__name__)

#: Answers that refuse a caller for who it is, or for how much it asks.
REFUSALS = frozenset({401, 403, 429})
#: Windows in which refusals and uses are gathered.
REFUSED_S = 60.0
USED_S = 600.0
#: Callers, routes and outcomes told apart in one window; the others share a line.
KINDS_MAX = 200
#: Whoever was told apart no more.
OTHERS = "(others)"

Sort = Literal["api.refused", "api.used"]


class _What(NamedTuple):
    """What is counted together."""

    who: str
    target: str
    outcome: str


@dataclass(slots=True)
class _Tally:
    times: int = 0
    first: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class _Window:
    """What one sort of line may cost, and what waits to be told."""

    sort: Sort
    length_s: float
    #: Lines that may be written at once, and how many more each second.
    lines_max: float
    lines_per_s: float
    lines: float
    refilled: float
    ends: float
    waiting: dict[_What, _Tally] = field(default_factory=dict)

    def count(self, what: _What, now: float) -> None:
        """Count one request."""
        if what not in self.waiting and len(self.waiting) >= KINDS_MAX:
            what = _What(OTHERS, "", what.outcome)
        tally = self.waiting.setdefault(what, _Tally(first=now))
        tally.times, tally.last = tally.times + 1, now

    def take(self, elapsed: float) -> list[tuple[_What, _Tally]]:
        """Return what may be told now; what is too much for lines of its own shares one."""
        gained = max(0.0, elapsed - self.refilled) * self.lines_per_s
        self.lines, self.refilled = min(self.lines_max, self.lines + gained), elapsed
        self.ends = elapsed + self.length_s
        room = int(self.lines)
        if not self.waiting or not room:
            return []  # It waits, and is counted on.
        found = sorted(self.waiting.items(), key=lambda one: -one[1].times)
        self.waiting = {}
        if len(found) > room:
            found, rest = found[: room - 1], found[room - 1 :]
            together = _Tally(first=min(one.first for _, one in rest))
            for _, one in rest:
                together.times += one.times
                together.last = max(together.last, one.last)
            found.append((_What(OTHERS, "", "various"), together))
        self.lines -= len(found)
        return found

    def put_back(self, found: list[tuple[_What, _Tally]]) -> None:
        """Count again what could not be told."""
        for what, tally in found:
            if what not in self.waiting and len(self.waiting) >= KINDS_MAX:
                what = _What(OTHERS, "", what.outcome)
            known = self.waiting.setdefault(what, _Tally(first=tally.first, last=tally.last))
            known.times += tally.times
            known.first = min(known.first, tally.first)
            known.last = max(known.last, tally.last)


class AuditDesk:
    """The counts of one replica. On its event loop."""

    def __init__(self, moderator: ModeratorPort, clock: Clock) -> None:
        """Begin with empty windows.

        A replica writes at most 200 lines of refusals at once and 2000 a day, of uses 2000 and
        10 000: with lines kept for 90 days, some 50 and 250 MB at the very worst.
        """
        self._moderator, self._clock = moderator, clock
        now = clock.elapsed()
        self.refused = _Window("api.refused", REFUSED_S, 200, 2000 / 86400, 200, now, now)
        self.used = _Window("api.used", USED_S, 2000, 10_000 / 86400, 2000, now, now)
        self.refused.ends += REFUSED_S
        self.used.ends += USED_S

    def count(
        self, request: Request, caller: ApiKey | None, method: str, path: str, status: int
    ) -> None:
        """Count an answer.

        Args:
            request: What was asked.
            caller: Whose key it carried; None if it carried none that is valid, or needed none.
            method: Of the route.
            path: Its template, such as ``/tasks/{task_id}``.
            status: Of the answer.
        """
        if status in REFUSALS:
            window, outcome = self.refused, str(status)
        elif caller is not None:
            window, outcome = self.used, f"{status // 100}xx"
        else:
            return
        who = caller.name if caller is not None else f"address {_address(request)}"
        window.count(_What(who, f"{method} {path}", outcome), self._clock.now())

    async def run(self) -> None:
        """Tell the moderator at the end of each window, until cancelled."""
        while True:
            await asyncio.sleep(REFUSED_S / 4)
            elapsed = self._clock.elapsed()
            for window in (self.refused, self.used):
                if elapsed >= window.ends:
                    await self._tell(window)

    async def flush(self) -> None:
        """Tell the moderator now what was counted."""
        for window in (self.refused, self.used):
            await self._tell(window)

    async def _tell(self, window: _Window) -> None:
        found = window.take(self._clock.elapsed())
        if not found:
            return
        entries = [_entry(window.sort, what, tally) for what, tally in found]
        try:
            await self._moderator.audit(*entries)
        except Exception as error:
            window.put_back(found)
            if not isinstance(error, NoAnswer):  # Else it may be told twice: twice the lines.
                window.lines += len(found)
            known = isinstance(error, HcnaError)
            log.log(
                logging.WARNING if known else logging.ERROR,
                "the audit log was not told what was counted; it will be",
                exc_info=not known,  # A bug: the counting must not end with it.
                extra={"action": "api.audit_failed", "error": str(error), "lines": len(found)},
            )


def _entry(sort: Sort, what: _What, tally: _Tally) -> AuditEntry:
    since = f" in {tally.last - tally.first:.0f} s" if tally.times > 1 else ""
    return AuditEntry(
        at=tally.last,
        principal=what.who,
        action=sort,
        target=what.target,
        outcome=what.outcome,
        detail=f"{tally.times} times{since}" if tally.times > 1 else "once",
    )


def _address(request: Request) -> str:
    return "unknown" if request.client is None else request.client.host[:64]

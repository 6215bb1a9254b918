"""Cron lines: which instants they name. What they mean is cronsim's, and so Debian's.

A line has five fields, or is one of `SHORTHANDS`. Where a time zone's clock is put forward, an
instant that does not exist is put off to the first minute that does; where it is put back, one that
exists twice is taken once, the first time. Lines whose minute or hour begins with ``*`` follow what
the clock shows: what it leaves out is left out, and what it shows twice is taken twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from hcna_ray.core.errors import Invalid

SHORTHANDS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
#: Schedules whose parsed lines are kept.
_KEPT = 1024


class Cron:
    """The instants of a cron line. Implements `hcna_ray.core.schedules.Recurrence`."""

    def __init__(self, line: str, timezone: str) -> None:
        """Parse.

        Args:
            line: The line.
            timezone: Name in the IANA database.

        Raises:
            Invalid: either of them means nothing.
        """
        fields = SHORTHANDS.get(line, line)
        if len(fields.split()) != 5:
            raise _invalid(
                "cron",
                "must have five fields (minute, hour, day of month, month, day of week), or be one "
                f"of {', '.join(SHORTHANDS)}",
            )
        try:
            self._zone = ZoneInfo(timezone)
        except (KeyError, ValueError, OSError) as error:
            what = "is not a name in the IANA database, such as Europe/Berlin"
            raise _invalid("timezone", what) from error
        self._fields = fields
        #: The instants behind the last answer, most often asked for next.
        self._rest: Iterator[float] = iter(())
        self._last: float | None = None
        try:
            self._from(0.0)
        except (CronSimError, ValueError) as error:
            raise _invalid("cron", f"is not a cron line: {error}") from error

    def after(self, at: float) -> float | None:
        """Return the first instant behind ``at``, or ``None`` when there is none for 50 years."""
        if at != self._last:
            self._rest = self._from(at)
        self._last = next(self._rest, None)
        return self._last

    def next(self, at: float, count: int) -> list[float]:
        """Return the first ``count`` instants behind ``at``, or as many as there are."""
        return list(islice(self._from(at), count))

    def _from(self, at: float) -> Iterator[float]:
        # Of whole seconds: rounded up, an instant just behind would be passed over.
        start = datetime.fromtimestamp(math.floor(at), self._zone)
        return self._behind(CronSim(self._fields, start), at)

    @staticmethod
    def _behind(found: Iterator[datetime], at: float) -> Iterator[float]:
        # Of an hour that comes twice cronsim names the first one, also when the second has begun;
        # and what does not exist may be put off to what is named besides.
        for one in found:
            instant = one.timestamp()
            if instant > at:
                at = instant
                yield instant


@lru_cache(_KEPT)
def parsed(line: str, timezone: str) -> Cron:
    """Return the instants of a line. For one thread: they remember where they are.

    Raises:
        Invalid: the line or the time zone means nothing.
    """
    return Cron(line, timezone)


def _invalid(field: str, message: str) -> Invalid:
    return Invalid("invalid_schedule", f"{field} {message}", ((field, message),))

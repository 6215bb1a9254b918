"""What a single key may take: requests a second, and tasks in the queue at once.

Both are counted in the replica, of which C1 has one, on M1. A rate is a token bucket: it holds
``burst`` requests and is filled with ``rate`` of them a second. A quota is held against the tasks
of the key's owner that have not ended, as the store has them, and those on their way there from
here, and those of which nobody knows whether they arrived; so requests never pass it, and while
they overlap, or after an answer was lost, it may be reached a little early. The moderator holds
schedules against it by itself (`hcna_ray.runtime.schedules.KeyAuthority`) and knows nothing of what
is on its way from here: for a second the two may accept a few tasks too many together.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hcna_ray.api.reads import Reads
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError, NoAnswer, QuotaExceeded, RateLimited
from hcna_ray.core.models import TaskSpec
from hcna_ray.security.keys import KEYS_MAX, ApiKey

#: How long a count of open tasks is believed while it is not used up: tasks of the same owner may
#: come in with other keys.
COUNT_S = 1.0
#: When trying again is worth it after a quota is used up: some task has to end first.
QUOTA_RETRY_S = 5
#: How long a call may still be carried out after C1 has given it up.
DOUBT_S = 60.0


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Rates:
    """One token bucket for each key that has a rate."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: ApiKey) -> None:
        """Count one request. Raises `RateLimited`, which counts nothing."""
        assert key.rate is not None
        burst = float(key.burst or 1)
        now = self._clock.elapsed()
        bucket = self._buckets.get(key.sha256)
        if bucket is None:
            if len(self._buckets) >= 2 * KEYS_MAX:
                self._buckets.clear()  # Of keys that are long gone; others begin with a full one.
            bucket = self._buckets[key.sha256] = _Bucket(burst, now)
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * key.rate)
        bucket.at = now
        if bucket.tokens < 1:
            wait_s = math.ceil((1 - bucket.tokens) / key.rate)
            raise RateLimited(
                f"the key {key.name!r} may make {key.rate:g} requests a second, "
                f"{burst:g} at once after a pause",
                max(1, wait_s),
            )
        bucket.tokens -= 1


@dataclass(slots=True)
class _Count:
    """What is known of one owner's open tasks."""

    #: As the store had it, and what was accepted here since.
    open: int
    #: How far was counted: at this many, there may be more.
    limit: int
    at: float
    #: Sent to the moderator, not answered yet.
    on_the_way: int = 0
    #: Sent, and nobody knows what became of it: until when it may still come in, and how many.
    doubts: list[tuple[float, int]] = field(default_factory=list)

    @property
    def taken(self) -> int:
        """How many places are not free."""
        return self.open + self.on_the_way + sum(places for _, places in self.doubts)


class Hold:
    """Places in a quota, held while tasks are on their way."""

    def __init__(self, places: int) -> None:
        #: How many tasks there is room for.
        self.places = places
        #: To be set: how many of them were new.
        self.accepted = 0


class Quotas:
    """Counts the open tasks of owners whose keys have a quota."""

    def __init__(self, reads: Reads, clock: Clock, *, doubt_s: float = DOUBT_S) -> None:
        """Begin without counts.

        Args:
            reads: Counts in the store.
            clock: Elapsed time.
            doubt_s: How long a call that nobody answered may still be carried out.
        """
        self._reads = reads
        self._clock = clock
        self._doubt_s = doubt_s
        self._counts: dict[str, _Count] = {}

    @asynccontextmanager
    async def hold(self, key: ApiKey, wanted: int) -> AsyncIterator[Hold]:
        """Hold up to ``wanted`` places in a key's quota; as many as there are, perhaps none.

        Raises:
            StoreUnavailable: the open tasks cannot be counted.
        """
        assert key.quota is not None
        count = self._counts.get(key.owner)
        if count is None or self._spent(key.quota, count, wanted):
            count = await self._read(key)
        held = Hold(max(0, min(wanted, key.quota - count.taken)))
        count.on_the_way += held.places
        try:
            yield held
        except BaseException as error:
            count.at = -math.inf  # Counted anew before the next.
            refused = isinstance(error, HcnaError) and not isinstance(error, NoAnswer)
            if held.places and not refused:
                # It may be carried out yet: until it cannot, the places are not given away.
                until = self._clock.elapsed() + self._doubt_s
                count.doubts.append((until, held.places))
            raise
        finally:
            count.on_the_way -= held.places
            count.open += held.accepted

    def _spent(self, quota: int, count: _Count, wanted: int) -> bool:
        """Whether the last count is too old, or too close to the quota to be relied on."""
        return (
            self._clock.elapsed() - count.at >= COUNT_S
            or quota > count.limit
            or count.taken + wanted > quota
        )

    async def _read(self, key: ApiKey) -> _Count:
        owner, limit = key.owner, key.quota or 0
        begun = self._clock.elapsed()
        found = await self._reads.run(lambda reader: reader.open_of(owner, limit))
        if len(self._counts) >= KEYS_MAX and owner not in self._counts:
            self._counts = {n: c for n, c in self._counts.items() if c.on_the_way or c.doubts}
        count = self._counts.setdefault(owner, _Count(0, limit, 0.0))
        count.open, count.limit, count.at = found, limit, self._clock.elapsed()
        # What has come in by now is counted, and nothing more comes.
        count.doubts = [doubt for doubt in count.doubts if doubt[0] > begun]
        return count

    async def repeated(self, key: ApiKey, specs: Sequence[TaskSpec]) -> set[str]:
        """Return the ids of those specs whose idempotency key is held: they ask for no place."""
        wanted = [(spec.principal, spec.idempotency_key or "") for spec in specs]
        wanted = [pair for pair in wanted if pair[1]]
        if not wanted:
            return set()
        held = await self._reads.run(lambda reader: reader.keys_held(wanted))
        return {s.id for s in specs if (s.principal, s.idempotency_key) in held}


def used_up(key: ApiKey) -> QuotaExceeded:
    """Return the refusal of a task for which there is no place."""
    return QuotaExceeded(
        f"{key.quota} tasks of {key.owner!r} wait or run, the most its key {key.name!r} allows; "
        "try again when some have ended",
        QUOTA_RETRY_S,
    )

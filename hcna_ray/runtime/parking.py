"""Calls of slots and agents that wait for work: by place, the least loaded worker first.

To hand out one task must cost the same whether two slots are idle or two thousand. So the order in
which workers are preferred is kept from batch to batch, and of it only the beginning is looked at.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping

from hcna_ray.core.models import HEAVY_SLOT
from hcna_ray.core.placement import load
from hcna_ray.runtime.live import LiveTable, Place
from hcna_ray.runtime.messages import Exchange
from hcna_ray.runtime.requests import Pending

#: Load, then lowest idle slot, then name: as `hcna_ray.core.placement.assign` prefers them.
_Rank = tuple[float, int, str]


def exchange_of(pending: Pending) -> Exchange:
    """Return what a parked call brought."""
    request = pending.request
    assert isinstance(request, Exchange)
    return request


class _Order:
    """Workers by rank."""

    def __init__(self) -> None:
        self._ranks: dict[str, _Rank] = {}
        self._sorted: list[_Rank] = []

    def put(self, worker: str, rank: _Rank | None) -> None:
        """Give a worker another rank, or none."""
        before = self._ranks.get(worker)
        if before == rank:
            return
        if before is not None:
            del self._sorted[bisect_left(self._sorted, before)]
            del self._ranks[worker]
        if rank is not None:
            self._ranks[worker] = rank
            insort(self._sorted, rank)

    def __iter__(self) -> Iterator[str]:
        return (name for _, _, name in self._sorted)


class Parking(Mapping[Place, Pending]):
    """Every call that waits, by ``(worker, slot)``."""

    def __init__(self, live: LiveTable, cpu_of: Callable[[str], float]) -> None:
        """Start empty.

        Args:
            live: Leases in force; it is told which slots ask for work.
            cpu_of: Cores of a worker, by name.
        """
        self._live, self._cpu_of = live, cpu_of
        self._calls: dict[Place, Pending] = {}
        #: Idle slots of each worker that has any.
        self._slots: dict[str, set[int]] = {}
        self._light, self._heavy = _Order(), _Order()

    def __getitem__(self, place: Place) -> Pending:
        return self._calls[place]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def put(self, place: Place, pending: Pending) -> None:
        """Let a call wait."""
        worker, slot = place
        self._calls[place] = pending
        self._live.asks(place)
        if slot != HEAVY_SLOT:
            self._slots.setdefault(worker, set()).add(slot)
        self.rank(worker)

    def pop(self, place: Place) -> Pending | None:
        """Let a call wait no more, and return it if it did."""
        pending = self._calls.pop(place, None)
        if pending is not None:
            worker, slot = place
            self._live.asks_no_more(place)
            idle = self._slots.get(worker)
            if idle is not None:
                idle.discard(slot)
                if not idle:
                    del self._slots[worker]
            self.rank(worker)
        return pending

    def of(self, worker: str) -> list[Place]:
        """Return the places of one worker whose calls wait."""
        places = [(worker, slot) for slot in sorted(self._slots.get(worker, ()))]
        agent = (worker, HEAVY_SLOT)
        return [agent, *places] if agent in self._calls else places

    def rank(self, worker: str) -> None:
        """Follow what has changed about a worker: its idle slots, leases or cores."""
        idle = self._slots.get(worker)
        asks = (worker, HEAVY_SLOT) in self._calls
        if idle is None and not asks:
            self._light.put(worker, None)
            self._heavy.put(worker, None)
            return
        now = load(self._live.count(worker), self._cpu_of(worker))
        self._light.put(worker, None if idle is None else (now, min(idle), worker))
        self._heavy.put(worker, (now, HEAVY_SLOT, worker) if asks else None)

    def best(self, fits: Callable[[str], bool], count: int, *, heavy: bool) -> list[str]:
        """Return the workers that are preferred for so many tasks, the best first.

        Args:
            fits: Whether a worker would do.
            count: How many at most.
            heavy: Whether an agent takes them rather than slots.
        """
        for worker in self._live.take_moved():
            self.rank(worker)
        order = self._heavy if heavy else self._light
        return list(itertools.islice(filter(fits, order), count))

    def places(self, worker: str, count: int, *, heavy: bool) -> list[Place]:
        """Return where a worker would take so many tasks: its agent, or its first idle slots."""
        if heavy:
            return [(worker, HEAVY_SLOT)]
        return [(worker, slot) for slot in sorted(self._slots[worker])[:count]]

"""From which address a request comes, and how many wrong keys may come from there.

C1's peer is always a proxy on this machine. The address of whoever asks is known from the edge
alone, which says it behind its mark; what anybody else says of it (``X-Forwarded-For``) is not
believed, although uvicorn would. Without an edge every client is on this machine.

A key has 256 bits and cannot be guessed; what is bounded is the attempt, for those who look at the
audit log and for those who paste something shorter. A key that was good at an address is looked at
there all the same: whoever shares the address, as a class does, is not shut out by one of them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
from collections import deque

from starlette.types import Scope

from hcna_ray.api.bounds import CLIENT_FIELD
from hcna_ray.config import LOOPBACK
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import RateLimited

#: Where the address stands in a request's scope, if the edge has told it.
ADDRESS = "hcna.address"
#: Wrong keys from one address within the window, and how long that is.
WRONG_MAX = 10
WINDOW_S = 60.0
#: Addresses whose wrong keys are counted, and good keys that are remembered with where they were.
ADDRESSES_MAX = 10_000
GOOD_MAX = 10_000
#: Who has one address of IPv6 has all of its network.
_NETWORK_BITS = 64


class Origins:
    """Finds out where a request comes from. Invariant: only the edge is believed."""

    def __init__(self, mark: str | None) -> None:
        """Take the edge's mark; None: there is no edge, nobody is believed."""
        self._mark = None if mark is None else mark.encode()

    def settle(self, scope: Scope) -> None:
        """Put the client's address into the scope, and take out what says it."""
        said: list[bytes] = []
        others: list[tuple[bytes, bytes]] = []
        forwarded = False
        for field in scope["headers"]:
            name = field[0]
            if name == CLIENT_FIELD:
                said.append(field[1])
                continue
            forwarded = forwarded or name == b"x-forwarded-for"
            others.append(field)
        if said:
            scope["headers"] = others
        address = self._believed(said)
        if address is not None:
            scope[ADDRESS] = address
            scope["client"] = (address, 0)
        elif forwarded:
            # It need not be so, and uvicorn has believed it.
            scope["client"] = (LOOPBACK, 0)

    def _believed(self, said: list[bytes]) -> str | None:
        if self._mark is None or len(said) != 1:
            return None
        mark, _, text = said[0].partition(b" ")
        if not hmac.compare_digest(mark, self._mark):
            return None
        try:
            address = ipaddress.ip_address(text.decode("ascii"))
        except ValueError:
            return None
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(address)


class Guesses:
    """Wrong keys by the address that they came from. On the event loop of a replica.

    Those of this machine itself (address None) are not counted: all its programs would share them.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        #: When the last ones came, oldest first, `WRONG_MAX` at most.
        self._wrong: dict[str, deque[float]] = {}
        self._good: dict[tuple[str, bytes], None] = {}

    def check(self, address: str | None, presented: str) -> None:
        """Raise `RateLimited` if this key from there must not be looked at for now."""
        if address is None:
            return
        network = _network_of(address)
        times = self._recent(network)
        if len(times) < WRONG_MAX or (network, _digest(presented)) in self._good:
            return
        raise RateLimited(
            f"{WRONG_MAX} keys that are not valid came from your address within a minute",
            max(1, math.ceil(times[0] + WINDOW_S - self._clock.elapsed())),
        )

    def wrong(self, address: str | None) -> None:
        """Count a key that is none."""
        if address is None:
            return
        network = _network_of(address)
        self._recent(network)
        if network not in self._wrong and len(self._wrong) >= ADDRESSES_MAX:
            del self._wrong[next(iter(self._wrong))]
        times = self._wrong.setdefault(network, deque(maxlen=WRONG_MAX))
        times.append(self._clock.elapsed())

    def right(self, address: str | None, presented: str) -> None:
        """Remember that a key is one, and where it was."""
        if address is None:
            return
        found = (_network_of(address), _digest(presented))
        if found not in self._good:
            if len(self._good) >= GOOD_MAX:
                del self._good[next(iter(self._good))]
            self._good[found] = None

    def _recent(self, network: str) -> deque[float]:
        times = self._wrong.get(network)
        if times is None:
            return deque()
        now = self._clock.elapsed()
        while times and now - times[0] >= WINDOW_S:
            times.popleft()
        if not times:
            del self._wrong[network]
        return times


def _digest(presented: str) -> bytes:
    return hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()


def _network_of(address: str) -> str:
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Network((address.partition("%")[0], _NETWORK_BITS), strict=False))

"""By which names C1 may be called, and from which pages: against DNS rebinding and foreign pages.

A page in a browser on M1's machine can send requests to loopback. The browser tells where the page
is from (``Origin``) and which name it was asked for (``Host``). A page of a stranger whose name
suddenly leads to 127.0.0.1 is, to the browser, of the same origin as C1; only the name gives it
away. So a name that is not C1's is refused, whatever address it led to.

An IP address in ``Host`` cannot be a stranger's: whoever is called by an address is called there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from hcna_ray.api.problems import BadRequest, HostRefused, OriginRefused

#: Values that were found good are remembered, this many.
_KNOWN_MAX = 256
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._\-]{1,253})(?::\d{1,5})?")
_ORIGIN = re.compile(r"https?://([^/?#@\s]+)")


class HostRule:
    """Checks ``Host`` and ``Origin``. Invariant: what is remembered as good is good."""

    def __init__(self, names: Collection[str], *, any_address: bool) -> None:
        """Take the names besides loopback's.

        Args:
            names: DNS names and IP addresses; ``*.example.org`` stands for one label before it.
            any_address: Whether every IP address will do: C1 listens on more than loopback.
        """
        self._names = frozenset(_plain(name) for name in names)
        self._any_address = any_address
        self._known: set[bytes] = set()

    def check(self, host: bytes | None, origin: bytes | None) -> None:
        """Let a request pass, or refuse it.

        Args:
            host: Value of its one ``Host``; None if it has none.
            origin: Value of ``Origin``, which only browsers send; None if it has none.

        Raises:
            BadRequest: There is no ``Host``, or it is none.
            HostRefused: It is a name that C1 does not have.
            OriginRefused: The request comes from a page that is not C1's.
        """
        if host is None:
            raise BadRequest("invalid_header", "the request needs a Host header")
        if host not in self._known:
            self._look_at(host)
        if origin is not None:
            self._check_origin(host, origin)

    def _look_at(self, host: bytes) -> None:
        found = _HOST.fullmatch(host.decode("latin-1"))
        if found is None:
            raise BadRequest("invalid_header", "Host is not a name or an address with a port")
        if not self._is_ours(found[1]):
            raise HostRefused(found[1])
        if len(self._known) < _KNOWN_MAX:
            self._known.add(host)

    def _check_origin(self, host: bytes, origin: bytes) -> None:
        text = origin.decode("latin-1").lower()
        found = _ORIGIN.fullmatch(text)
        if found is not None:
            if found[1] == host.decode("latin-1").lower():
                return
            called = _HOST.fullmatch(found[1])
            if called is not None and self._is_named(_plain(called[1])):
                return
        raise OriginRefused(text)

    def _is_ours(self, name: str) -> bool:
        name = _plain(name)
        if name == "localhost" or self._is_named(name):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address or address.is_loopback

    def _is_named(self, name: str) -> bool:
        return name in self._names or f"*.{name.partition('.')[2]}" in self._names


def _plain(name: str) -> str:
    """Return a name without what makes no difference: case, brackets, the dot at its end."""
    return name.lower().strip("[]").removesuffix(".")

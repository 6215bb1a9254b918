"""Who is asking: API keys from the ``Authorization`` or ``X-API-Key`` header."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.datastructures import Headers

from hcna_ray.api.clients import Guesses
from hcna_ray.api.ports import KeyRing
from hcna_ray.api.problems import Unauthorized
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError
from hcna_ray.security.keys import ApiKey, by_digest, load_keys, look_up

log = logging.getLogger(__name__)

#: How long a change of the key file may go unnoticed. A look costs more than the check itself, so
#: a busy replica looks ten times a second and not at every request.
RELOAD_S = 0.1
KEY_CHARS_MAX = 512


class FileKeyRing:
    """Keys from ``keys/keys.json``, read again when it changes. A broken file admits nobody."""

    def __init__(self, keys_dir: Path, clock: Clock) -> None:
        self._path = keys_dir / "keys.json"
        self._clock = clock
        self._keys: tuple[ApiKey, ...] = ()
        self._known: Mapping[str, ApiKey] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._looked_at: float | None = None

    def verify(self, presented: str) -> ApiKey | None:
        """Return the key that was presented, or None; one that has expired or was revoked too."""
        self._look()
        return look_up(self._known, presented)

    def all(self) -> Sequence[ApiKey]:
        """Return every key on record."""
        self._look()
        return self._keys

    def _look(self) -> None:
        now = self._clock.elapsed()
        if self._looked_at is not None and now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            self._take((), None)
            return
        if stamp == self._stamp:
            return
        try:
            self._take(load_keys(self._path.parent), stamp)
        except (HcnaError, OSError) as error:
            self._take((), None)
            log.error(
                "API keys cannot be read",
                extra={"action": "api.keys_unreadable", "reason": str(error)},
            )

    def _take(self, keys: tuple[ApiKey, ...], stamp: tuple[int, int, int] | None) -> None:
        self._keys, self._known, self._stamp = keys, by_digest(keys), stamp


def authenticate(
    headers: Headers,
    keys: KeyRing,
    clock: Clock,
    *,
    guesses: Guesses,
    address: str | None,
) -> ApiKey:
    """Return the key that a request carries.

    Args:
        headers: Of the request.
        keys: Those that there are.
        clock: Time of day.
        guesses: Counts wrong keys.
        address: Where the request comes from; None: from this machine.

    Raises:
        Unauthorized: there is none, there are two, it is not known, or it is good no more.
        RateLimited: Too many came from there that were not known; this one was not looked at.
    """
    presented = _presented(headers)
    if presented is None:
        raise Unauthorized(
            "this route needs a key: send 'Authorization: Bearer <key>' or 'X-API-Key: <key>' "
            "(hcna env prints yours)"
        )
    guesses.check(address, presented)
    key = keys.verify(presented) if 0 < len(presented) <= KEY_CHARS_MAX else None
    if key is None:
        guesses.wrong(address)
        raise Unauthorized("the key is not valid")
    guesses.right(address, presented)
    if (key.revoked_at is not None or key.expires_at is not None) and (
        state := key.state(clock.now())
    ) != "good":
        # Said to whoever has the very key, and to nobody else.
        raise Unauthorized(f"the key {key.name!r} is {state}; hcna keys create makes another")
    return key


def _presented(headers: Headers) -> str | None:
    """Return what stands in one of the two headers; more than one is refused."""
    found: str | None = None
    count = 0
    for name, value in headers.raw:
        if name == b"authorization":
            scheme, _, found = value.decode("latin-1").partition(" ")
            count += 1
            if scheme.lower() != "bearer":
                found = None
        elif name == b"x-api-key":
            found = value.decode("latin-1")
            count += 1
    if count > 1:
        raise Unauthorized("send one key, in one header")
    if count and found is None:
        raise Unauthorized("the Authorization header must be 'Bearer <key>'")
    return None if found is None else found.strip()

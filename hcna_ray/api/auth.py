"""Who is asking: API keys from the ``Authorization`` or ``X-API-Key`` header."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers

from hcna_ray.api.ports import KeyRing
from hcna_ray.api.problems import Unauthorized
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError
from hcna_ray.security.keys import ApiKey, load_keys, verify

log = logging.getLogger(__name__)

#: How long a change of the key file may go unnoticed.
RELOAD_S = 1.0
KEY_CHARS_MAX = 512


class FileKeyRing:
    """Keys from ``keys/keys.json``, read again when it changes. A broken file admits nobody."""

    def __init__(self, keys_dir: Path, clock: Clock) -> None:
        self._keys_dir = keys_dir
        self._clock = clock
        self._keys: tuple[ApiKey, ...] = ()
        self._stamp: tuple[int, int, int] | None = None
        self._looked_at: float | None = None

    def verify(self, presented: str) -> ApiKey | None:
        """Return the key that was presented, or None."""
        return verify(self.all(), presented)

    def all(self) -> Sequence[ApiKey]:
        """Return every key that is valid now."""
        now = self._clock.elapsed()
        if self._looked_at is None or now - self._looked_at >= RELOAD_S:
            self._looked_at = now
            self._reload()
        return self._keys

    def _reload(self) -> None:
        try:
            found = (self._keys_dir / "keys.json").stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            self._keys, self._stamp = (), None
            return
        if stamp == self._stamp:
            return
        try:
            self._keys, self._stamp = load_keys(self._keys_dir), stamp
        except (HcnaError, OSError) as error:
            self._keys, self._stamp = (), None
            log.error(
                "API keys cannot be read",
                extra={"action": "api.keys_unreadable", "reason": str(error)},
            )


def authenticate(headers: Headers, keys: KeyRing) -> ApiKey:
    """Return the key that a request carries.

    Raises:
        Unauthorized: there is none, there are two, or it is not known.
    """
    presented = _presented(headers)
    if presented is None:
        raise Unauthorized(
            "this route needs a key: send 'Authorization: Bearer <key>' or 'X-API-Key: <key>' "
            "(hcna env prints yours)"
        )
    key = keys.verify(presented) if 0 < len(presented) <= KEY_CHARS_MAX else None
    if key is None:
        raise Unauthorized("the key is not valid")
    return key


def _presented(headers: Headers) -> str | None:
    bearers = headers.getlist("authorization")
    plain = headers.getlist("x-api-key")
    if not bearers and not plain:
        return None
    if len(bearers) + len(plain) > 1:
        raise Unauthorized("send one key, in one header")
    if plain:
        return plain[0].strip()
    scheme, _, value = bearers[0].partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized("the Authorization header must be 'Bearer <key>'")
    return value.strip()

"""The keys on record, for those who look often: C1 at every request, M1 at every scheduled task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError
from hcna_ray.security.keys import ApiKey, by_digest, load_keys, look_up

log = logging.getLogger(__name__)

#: How long a change of the key file may go unnoticed. A look costs more than the check itself, so
#: a busy replica looks ten times a second and not at every request.
RELOAD_S = 0.1


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

"""Ids that C1 mints: time-sortable, so that new rows land side by side in the store's index."""

from __future__ import annotations

import base64
import hashlib
import os
import time

from ulid import ULID

#: Crockford's alphabet, and from that of RFC 4648 to it.
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_TO_CROCKFORD = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", _CROCKFORD.encode())
#: A ULID is 48 bits of time and 80 random ones, five to a character.
_TIME_SHIFTS = range(45, -1, -5)
_RANDOM_BYTES, _RANDOM_CHARS = 10, 16


class UlidIds:
    """Ids from ULIDs, in lower case."""

    def task_ids(self, count: int) -> list[str]:
        """Return new task ids, ascending: for a thousand the instant is written once."""
        now_ms = time.time_ns() // 1_000_000
        prefix = "task-" + "".join([_CROCKFORD[now_ms >> shift & 31] for shift in _TIME_SHIFTS])
        drawn = base64.b32encode(os.urandom(_RANDOM_BYTES * count))
        text = drawn.translate(_TO_CROCKFORD).decode()
        starts = range(0, _RANDOM_CHARS * count, _RANDOM_CHARS)
        return sorted([prefix + text[at : at + _RANDOM_CHARS] for at in starts])

    def batch_id(self) -> str:
        """Return a new batch id."""
        return f"batch-{str(ULID()).lower()}"


def batch_id_of(principal: str, key: str) -> str:
    """Return the id of the batch sent under an idempotency key.

    It follows from the key, so that a batch sent again is the same batch and can be waited for by
    its id, whichever answer got lost.
    """
    digest = hashlib.sha256(f"{principal}\0{key}".encode()).digest()
    return f"batch-{str(ULID(digest[:16])).lower()}"

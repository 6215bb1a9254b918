"""Ids that C1 mints: time-sortable, so that new rows land side by side in the store's index."""

from __future__ import annotations

import hashlib

from ulid import ULID


class UlidIds:
    """Ids from ULIDs, in lower case."""

    def task_id(self) -> str:
        """Return a new task id."""
        return f"task-{str(ULID()).lower()}"

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

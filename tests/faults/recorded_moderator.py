"""`tests.support.moderator_process` with a small log, or a store that syncs too little.

``python -m tests.faults.recorded_moderator STORE SOCKET POLICY OPTIONS``; options are JSON:
``wal_bytes_max`` makes checkpoints come soon, ``synchronous`` is for the test of the test alone and
no setting of the product.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from hcna_ray.runtime.policy import Policy
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.support import moderator_process


def store_class(*, wal_bytes_max: int, synchronous: str | None) -> type[SqliteTaskStore]:
    """Return the product's store with these two things changed."""

    class ChangedStore(SqliteTaskStore):
        def __init__(self, path: Path, **more: Any) -> None:
            super().__init__(path, wal_bytes_max=wal_bytes_max, **more)
            if synchronous is not None:
                self._run(f"PRAGMA synchronous = {synchronous}")

    return ChangedStore


if __name__ == "__main__":
    options = json.loads(sys.argv[4])
    moderator_process.SqliteTaskStore = store_class(  # type: ignore[misc]
        wal_bytes_max=options["wal_bytes_max"], synchronous=options.get("synchronous")
    )
    asyncio.run(
        moderator_process._main(
            Path(sys.argv[1]), Path(sys.argv[2]), Policy(**json.loads(sys.argv[3]))
        )
    )

"""What SQLite has to do for a piece of work, counted in steps of its virtual machine.

Steps are the same on a fast machine, a slow one and a busy one. A walk along an index or a table
shows as steps that grow with what is stored; the depth of a tree does not show at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import apsw

from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore


class Steps:
    """What was counted: steps, and of these the ones along a table or index as a whole."""

    def __init__(self) -> None:
        self.taken = 0
        self.scanned = 0
        self.statements: list[str] = []


@contextmanager
def counted_steps(*of: SqliteTaskStore | SqliteTaskReader) -> Iterator[Steps]:
    """Count what some connections do until the block ends."""
    steps = Steps()

    def note(told: dict[str, object]) -> None:
        status = told["stmt_status"]
        assert isinstance(status, dict)
        steps.taken += status["SQLITE_STMTSTATUS_VM_STEP"]
        steps.scanned += status["SQLITE_STMTSTATUS_FULLSCAN_STEP"]
        steps.statements.append(str(told["sql"]))

    for one in of:
        one._db.trace_v2(apsw.SQLITE_TRACE_PROFILE, note)
    try:
        yield steps
    finally:
        for one in of:
            one._db.trace_v2(0)

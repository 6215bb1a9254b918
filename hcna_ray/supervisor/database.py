"""``hcna store restored``: after the operator has put the database of the tasks back.

A dump knows nothing of what was given out after it: leases, tokens, numbers. A moderator refuses
such a database until this was done (`hcna_ray.store.origin`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hcna_ray.config import Settings
from hcna_ray.core.audit import RESTORED
from hcna_ray.core.models import AuditEntry
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.restore import EndedLeases, end_leases
from hcna_ray.store.backup import BackupRefused
from hcna_ray.store.postgres import PostgresTaskStore
from hcna_ray.supervisor.backup import CLOCK_BEHIND_S

#: How long a moderator that is about to end may still hold the database.
_WAIT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class TakenOver:
    """What became of a database that was put back."""

    store: str
    #: Instant of the last fact in it.
    known_at: float
    generation_before: int
    generation: int
    ended: EndedLeases


def take_over(settings: Settings, *, now: float) -> TakenOver:
    """Make a restored database fit to go on: nothing that was ever out is good in it.

    The note of where the database is comes last, so whoever is killed in between leaves one that a
    moderator still refuses; to do it again harms nothing.

    Args:
        settings: They name the database.
        now: Seconds since the epoch.

    Raises:
        BackupRefused: There is nothing to take over, or the clock is wrong.
        StoreInUse: A moderator works on it.
        StoreUnavailable: It cannot be reached.
    """
    if settings.store_path is not None:
        raise BackupRefused(
            f"the tasks are in {settings.store_path}: hcna restore puts a SQLite store back, and "
            "needs nothing after it"
        )
    store = PostgresTaskStore(
        settings.store_url, unsafe=settings.store.unsafe, open_wait_s=_WAIT_S, restored=True
    )
    try:
        known_at = store.last_known_at()
        if now < known_at - CLOCK_BEHIND_S:
            made = datetime.fromtimestamp(known_at, UTC).isoformat(timespec="seconds")
            raise BackupRefused(
                f"the database is of {made} or later, which lies ahead of this machine's clock: "
                "set the clock first, for the new generation is taken from it"
            )
        before, generation = store.renumber(now)
        of = datetime.fromtimestamp(known_at, UTC).isoformat(timespec="seconds")
        why = f"a database of {of} was restored"
        note = AuditEntry(
            at=now,
            principal="owner",
            action=RESTORED,
            target=settings.store_name,
            outcome="done",
            detail=f"{why}; generation {before} is now {generation}",
        )
        ended = end_leases(store, Policy.from_settings(settings), now=now, why=why, note=note)
        store.settle_in()
    finally:
        store.close()
    return TakenOver(
        store=settings.store_name,
        known_at=known_at,
        generation_before=before,
        generation=generation,
        ended=ended,
    )

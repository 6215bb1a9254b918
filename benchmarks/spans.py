"""Where a lone task's time goes: what the client saw, between what the store has written down."""

from __future__ import annotations

from itertools import pairwise

import apsw

from benchmarks.children import Trouble, do
from benchmarks.statistics import quantile
from benchmarks.visits import Size, Visit


def measure(seen: Visit, size: Size) -> None:
    """Follow lone tasks through their facts."""
    seen.warm_up(size)
    with seen.metered():
        done = do(seen.target.asked(kind="lone", requests=size.lone, seconds=60))
    assert seen.target.home is not None
    facts = _facts(str(seen.target.home / "queue.db"))
    samples: dict[str, list[float]] = {}
    for (known, sent), accept_s, whole_s in zip(
        done.sent, done.accepts_s, done.latencies_s, strict=True
    ):
        found = facts.get(known, {})
        # "granted" is decided together with "accepted".
        kinds = ("checked", "accepted", "started", "completed")
        points = [("sent", sent), *((kind, found[kind]) for kind in kinds if kind in found)]
        points.append(("seen", sent + whole_s))
        for (before, then), (after, at) in pairwise(points):
            samples.setdefault(f"{before}_{after}", []).append(at - then)
        samples.setdefault("sent_answered", []).append(accept_s)
        samples.setdefault("sent_seen", []).append(whole_s)
    if not samples:
        raise Trouble("no task was followed")
    for name, values in samples.items():
        seen.figures[f"{name}_p50_ms"] = 1000 * quantile(values, 0.5)
        seen.figures[f"{name}_p95_ms"] = 1000 * quantile(values, 0.95)


_FACTS = """
SELECT id, 'checked', accepted_at FROM task
UNION ALL SELECT task_id, kind, at FROM (SELECT * FROM fact ORDER BY number)
"""


def _facts(path: str) -> dict[str, dict[str, float]]:
    """Return when each thing was first so, by task and kind of fact."""
    db = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    try:
        found: dict[str, dict[str, float]] = {}
        for known, kind, at in db.execute(_FACTS):
            found.setdefault(str(known), {}).setdefault(str(kind), float(at))
        return found
    finally:
        db.close()

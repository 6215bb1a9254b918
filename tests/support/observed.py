"""Everything that can be seen of a task store, as values that can be compared with another's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hcna_ray.core.models import TaskFilter
from hcna_ray.store.base import TaskReader, TaskStore
from tests.support.builders import T0


def inside(
    store: TaskStore, names: Sequence[str], keys: Sequence[str], at: float = T0 + 3
) -> list[object]:
    """Return what the writer sees.

    Args:
        store: Whose.
        names: Ids of tasks that may exist.
        keys: Ordering and concurrency keys that may be used.
        at: The instant for which due tasks are asked.
    """
    lanes = store.ready_lanes()
    return [
        store.generation(),
        store.last_seq(),
        store.get(names),
        lanes,
        {lane: store.heads(lane, 3) for lane in lanes},
        store.leased(),
        store.due(at, 4),
        store.next_wake(),
        store.size(),
        [store.ordering_line(key, 3) for key in keys],
        [store.ordering_out(key) for key in keys],
        [store.held_by_concurrency(key, 3) for key in keys],
        store.concurrency_keys_held(5),
        [store.dependents(name, 3) for name in names],
        store.task_states(names),
        store.settlements(5),
        store.due_schedules(at, 4),
        store.next_schedule_wake(),
        store.count_schedules("owner"),
        store.workers(),
        store.paused(),
    ]


def view(
    reader: TaskReader, names: Sequence[str], batches: Sequence[str], limit: int = 99
) -> list[object]:
    """Return what a reader sees.

    Args:
        reader: Whose.
        names: Ids of tasks that may exist.
        batches: Batch ids that may exist.
        limit: Of each listing.
    """
    return [
        reader.get(names),
        reader.ended(ids=names, limit=limit),
        reader.open_count(ids=names),
        [reader.batch_exists(key) for key in batches],
        [reader.attempts(name) for name in names],
        reader.facts(after=0, limit=limit),
        reader.last_fact(),
        reader.audit(before=None, limit=limit),
        reader.deliveries(due_before=math.inf, limit=limit),
        reader.schedules(limit=limit),
        reader.counters(),
        reader.depth(),
        reader.queued_since(),
        reader.page(TaskFilter(), before_seq=None, limit=limit),
        reader.workers(),
        reader.paused(),
    ]

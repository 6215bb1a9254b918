"""What webhooks are told: that a task has ended, and how.

What it returned is not in it; that is fetched from C1, by whoever may see it.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from hcna_ray.core.models import Task
from hcna_ray.store.base import Delivery


def delivery_of(task: Task, generation: int) -> Delivery:
    """Return what is to be told of a task that has just ended.

    Args:
        task: It; its spec names a webhook.
        generation: Of the store: after a restore the same task may end once more, otherwise.
    """
    url, ended_at = task.spec.webhook, task.finished_at
    assert url is not None
    assert ended_at is not None
    authority = url.partition("://")[2].partition("/")[0].partition("?")[0].lower()
    return Delivery(
        id=f"{task.id}.{generation}.{task.version + 1}",
        task_id=task.id,
        principal=task.spec.principal,
        target=authority,
        url=url,
        body=body_of(task),
        created_at=ended_at,
        due_at=ended_at,
    )


def body_of(task: Task) -> bytes:
    """Return the report on an ended task, as Standard Webhooks shapes them."""
    spec, error = task.spec, task.error
    return msgspec.json.encode(
        {
            "type": f"task.{task.state.value}",
            "timestamp": _iso(task.finished_at),
            "data": {
                "task_id": spec.id,
                "status": task.state.value,
                "task_type": spec.task_type,
                "queue": spec.queue,
                "batch_id": spec.batch_id,
                "accepted_at": _iso(spec.accepted_at),
                "started_at": _iso(task.started_at),
                "finished_at": _iso(task.finished_at),
                "failures": task.failures,
                "losses": task.losses,
                "error": None
                if error is None
                else {"kind": error.kind.value, "message": error.message},
                "metadata": None if spec.metadata is None else msgspec.Raw(spec.metadata),
            },
        }
    )


def _iso(at: float | None) -> str | None:
    if at is None:
        return None
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")

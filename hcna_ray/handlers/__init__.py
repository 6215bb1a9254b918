"""Task types: the ``@task`` registry, what a handler sees while it runs, and the built-in types.

This is what a package of handlers imports::

    from hcna_ray import task
    from hcna_ray.handlers import Payload, Reject, TaskContext

    class Words(Payload):
        text: str

    @task("acme.count", payload=Words)
    def count(payload: Words, ctx: TaskContext) -> dict[str, int]:
        return {"words": len(payload.text.split())}

and names in the entry point group ``hcna_ray.tasks`` of its ``pyproject.toml``. The composite loads
the same registry to check payloads before it accepts a task; the worker loads it to run them.

Nothing here knows Ray, HTTP or the store: a handler reaches the outside through `TaskContext`,
whose effects the runtime injects. May import `hcna_ray.config` and `hcna_ray.core` only.
"""

from __future__ import annotations

from hcna_ray.handlers.context import (
    ArtifactRef,
    ContextEffects,
    HandlerLimits,
    TaskContext,
    remove_stale_scratch,
)
from hcna_ray.handlers.errors import (
    ArtifactNotFound,
    CheckpointTooLarge,
    DuplicateTaskType,
    InvalidPayload,
    PathOutsideDisk,
    Reject,
    ResultTooLarge,
    TaskCancelled,
    TaskTimedOut,
    UnknownTaskType,
)
from hcna_ray.handlers.paths import OptionalWorkerPath, WorkerPath, check_worker_path
from hcna_ray.handlers.registry import (
    Payload,
    Problem,
    Registry,
    TaskDefaults,
    TaskType,
    default_registry,
    load_registry,
    task,
)
from hcna_ray.handlers.run import HandlerOutcome, run_handler

__all__ = [
    "ArtifactNotFound",
    "ArtifactRef",
    "CheckpointTooLarge",
    "ContextEffects",
    "DuplicateTaskType",
    "HandlerLimits",
    "HandlerOutcome",
    "InvalidPayload",
    "OptionalWorkerPath",
    "PathOutsideDisk",
    "Payload",
    "Problem",
    "Registry",
    "Reject",
    "ResultTooLarge",
    "TaskCancelled",
    "TaskContext",
    "TaskDefaults",
    "TaskTimedOut",
    "TaskType",
    "UnknownTaskType",
    "WorkerPath",
    "check_worker_path",
    "default_registry",
    "load_registry",
    "remove_stale_scratch",
    "run_handler",
    "task",
]

"""What can go wrong with task types and handlers.

Invalid
├── UnknownTaskType       no such type; names those that are close
└── InvalidPayload        does not fit the type's model; names the fields
HcnaError
├── DuplicateTaskType     two packages want the same name
├── Reject                a handler's word for "never try this again"
│   └── PathOutsideDisk
├── NotFound
│   └── ArtifactNotFound
├── TaskCancelled, TaskTimedOut     how a handler stops when it is asked to
└── ResultTooLarge, CheckpointTooLarge
"""

from __future__ import annotations

from collections.abc import Sequence

from hcna_ray.core.errors import HcnaError, Invalid, NotFound


class UnknownTaskType(Invalid):
    """No handler is registered under this name."""

    def __init__(self, name: str, close: Sequence[str] = ()) -> None:
        hint = f"; did you mean {' or '.join(close)}?" if close else "; see GET /workers"
        message = f"there is no task type {name[:100]!r}{hint}"
        super().__init__("unknown_task_type", message, (("task_type", message),))
        self.args = (name, tuple(close))
        self.name, self.close = name, tuple(close)


class InvalidPayload(Invalid):
    """The payload does not fit the model of its task type.

    ``problems`` holds (field path, sentence) pairs; a path begins with ``payload``.
    """

    def __init__(self, task_type: str, problems: Sequence[tuple[str, str]]) -> None:
        first = "; ".join(f"{field}: {text}" for field, text in problems[:3])
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        message = f"the payload does not fit {task_type}: {first}{more}"
        super().__init__("invalid_payload", message, tuple(problems))
        self.args = (task_type, tuple(problems))
        self.task_type = task_type


class DuplicateTaskType(HcnaError):
    """Two packages want to register the same task type."""

    code = "duplicate_task_type"

    def __init__(self, name: str, package: str, owner: str) -> None:
        super().__init__(name, package, owner)
        self.name, self.package, self.owner = name, package, owner

    def __str__(self) -> str:
        return (
            f"task type {self.name!r} of {self.package} is refused: {self.owner} has it already; "
            "rename one or uninstall one of the two packages"
        )


class Reject(HcnaError):
    """Raised by a handler when no further attempt can help: the task fails at once."""

    code = "rejected"


class PathOutsideDisk(Reject):
    """A path of a payload leads out of ``worker.resources.disk_path``, or names nothing usable."""

    def __init__(self, field: str, path: str, disk_path: str, why: str) -> None:
        super().__init__(field, path, disk_path, why)
        self.field, self.path, self.disk_path, self.why = field, path, disk_path, why

    def __str__(self) -> str:
        return (
            f"{self.field}: {self.path[:300]!r} {self.why}; give a path below {self.disk_path!r} "
            "(worker.resources.disk_path)"
        )


class ArtifactNotFound(NotFound):
    """A payload names an artifact that is not stored, or not for whoever submitted the task."""

    def __init__(self, field: str, sha256: str) -> None:
        super().__init__("artifact", sha256)
        self.args = (field, sha256)
        self.field = field

    def __str__(self) -> str:
        return (
            f"{self.field}: there is no artifact {self.name!r} of whoever submitted this task; "
            "upload it with PUT /artifacts under the same key, and submit the task again"
        )


class TaskCancelled(HcnaError):
    """The task was cancelled while its handler ran; raised by `TaskContext.raise_if_cancelled`."""

    code = "task_cancelled"

    def __str__(self) -> str:
        return "the task was cancelled"


class TaskTimedOut(HcnaError):
    """The attempt used up its time; raised by `TaskContext.raise_if_cancelled`."""

    code = "task_timed_out"

    def __str__(self) -> str:
        return "the attempt ran longer than its timeout_s"


class ResultTooLarge(HcnaError):
    """A handler's result is too large to be kept inline.

    ``result`` is the result itself (JSON), for a caller who stores it elsewhere. It does not travel
    when the error is pickled.
    """

    code = "result_too_large"

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size, self.limit = size, limit
        self.result: bytes | None = None

    def __reduce__(self) -> tuple[type[ResultTooLarge], tuple[int, int]]:
        return type(self), (self.size, self.limit)

    def __str__(self) -> str:
        return (
            f"the result has {self.size} bytes, more than the {self.limit} allowed; "
            "store it with ctx.artifact() and return the reference"
        )


class CheckpointTooLarge(HcnaError):
    """A checkpoint exceeds what is kept with a task."""

    code = "checkpoint_too_large"

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size, self.limit = size, limit

    def __str__(self) -> str:
        return (
            f"the checkpoint has {self.size} bytes, more than the {self.limit} allowed; "
            "store the data with ctx.artifact() and keep its sha256 in the checkpoint"
        )

"""What a handler sees of the world while it runs one attempt."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from hcna_ray.core.clock import boottime
from hcna_ray.core.errors import NotFound
from hcna_ray.core.models import Token
from hcna_ray.core.tracing import parse_traceparent
from hcna_ray.handlers import encoding
from hcna_ray.handlers.errors import (
    ArtifactNotFound,
    CheckpointTooLarge,
    Reject,
    TaskCancelled,
    TaskTimedOut,
)
from hcna_ray.handlers.paths import resolve_worker_path

CHECKPOINT_BYTES_MAX = 256 << 10
PROGRESS_MESSAGE_MAX = 500
#: Longest pause between two looks at the cancel flag in `TaskContext.pause`.
PAUSE_SLICE_S = 0.1
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactRef:
    """A stored file, named by what it holds. May be returned as part of a result."""

    #: SHA-256 of the content, 64 lower-case hex digits.
    sha256: str
    #: Size in bytes.
    size: int
    name: str | None = None

    @property
    def uri(self) -> str:
        """Where the composite serves it."""
        return f"/artifacts/{self.sha256}"


class ContextEffects(Protocol):
    """How a context reaches outside. The runtime brings the real one, tests a fake.

    Called from the handler's thread, or from threads the handler started.
    """

    def send_progress(self, percent: float | None, message: str) -> None:
        """Report progress. Called very often: must be cheap, and may drop all but the last."""
        ...

    def save_checkpoint(self, data: bytes) -> None:
        """Keep ``data`` (JSON) for the next attempt. Must have been handed over when it returns."""
        ...

    def put_artifact(self, path: Path, name: str | None) -> ArtifactRef:
        """Store the file at ``path``; it may be deleted as soon as this returns."""
        ...

    def get_artifact(self, sha256: str) -> Path:
        """Return a local, read-only file with this content.

        Raises:
            NotFound: There is none, or it is not for whoever submitted the task.
        """
        ...

    def is_cancelled(self) -> bool:
        """Whether the attempt should stop. Cheap enough for an inner loop."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HandlerLimits:
    """What a worker lets a handler use up. In bytes."""

    #: Largest file a handler may write.
    output_bytes_max: int = 16 << 30
    #: Space a handler leaves free on the disk it writes to.
    disk_reserve_bytes: int = 64 << 20


class _TaskLog(logging.LoggerAdapter[logging.Logger]):
    """Adds the attempt's names to every line, and keeps the fields a handler gave."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Merge the two sets of fields; the attempt's own win."""
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class TaskContext:
    """One attempt, seen from inside its handler.

    Invariant: what the handler causes through it carries the attempt's `fence`, so the system drops
    it once a newer attempt owns the task.
    """

    def __init__(
        self,
        *,
        task_id: str,
        task_type: str,
        token: Token,
        worker: str,
        node_id: str,
        effects: ContextEffects,
        disk_path: str | os.PathLike[str] | None = None,
        scratch_root: str | os.PathLike[str] | None = None,
        last_checkpoint: bytes | None = None,
        deadline: float | None = None,
        limits: HandlerLimits | None = None,
        clock: Callable[[], float] = boottime,
        sleep: Callable[[float], None] = time.sleep,
        traceparent: str | None = None,
    ) -> None:
        """Bind an attempt to its effects.

        Args:
            task_id: The task.
            task_type: Its type, as registered.
            token: The attempt's fencing token.
            worker: Short name of the worker, such as ``W1``.
            node_id: Full name of the worker's node.
            effects: The way outside.
            disk_path: ``worker.resources.disk_path``, or ``None`` if the worker offers no files.
            scratch_root: Existing directory for `scratch`; the system's by default.
            last_checkpoint: JSON an earlier attempt left, or ``None``.
            deadline: When the attempt's time is up, on ``clock``; ``None`` means never.
            limits: What the handler may use up.
            clock: Seconds that keep running while the machine sleeps.
            sleep: Pauses the thread for a number of seconds.
            traceparent: W3C trace context of this attempt, if it belongs to a trace.
        """
        trace = parse_traceparent(traceparent)
        #: W3C trace context to send along with what the handler asks of others, or ``None``. With
        #: traces on it names the attempt's own span, else what the submitter sent.
        self.traceparent = None if trace is None else traceparent
        #: The trace that the attempt belongs to, 32 hex digits, or ``None``.
        self.trace_id = None if trace is None else trace.trace_id
        self.task_id = task_id
        self.task_type = task_type
        self.worker = worker
        self.node_id = node_id
        self.limits = limits or HandlerLimits()
        names: dict[str, object] = {
            "task_id": task_id,
            "task_type": task_type,
            "attempt": token.attempt,
        }
        if trace is not None:
            names["trace_id"] = trace.trace_id
        #: A logger whose lines name the task, the attempt and the trace.
        self.log: logging.LoggerAdapter[logging.Logger] = _TaskLog(
            logging.getLogger(f"hcna_ray.tasks.{task_type}"), names
        )
        self._token, self._effects = token, effects
        self._disk_path, self._scratch_root = disk_path, scratch_root
        self._last_checkpoint = last_checkpoint
        self._deadline, self._clock, self._sleep = deadline, clock, sleep
        self._scratch: Path | None = None
        self._percent: float | None = None

    def __enter__(self) -> Self:
        """Return itself; leaving the block removes the scratch directory."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @property
    def fence(self) -> Token:
        """The fencing token ``(generation, attempt)``; as text, ``generation.attempt``.

        It only grows from attempt to attempt: hand it to whatever you write to, so that a late
        attempt can be told from the current one.
        """
        return self._token

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self._token.attempt

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancelled the task. A handler that runs for long asks now and then."""
        return self._effects.is_cancelled()

    @property
    def deadline_s(self) -> float | None:
        """Seconds left to this attempt, never below zero; ``None`` if it has no timeout."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def raise_if_cancelled(self) -> None:
        """Stop here if there is no point in going on.

        Raises:
            TaskCancelled: The task was cancelled.
            TaskTimedOut: The attempt has no time left.
        """
        if self._effects.is_cancelled():
            raise TaskCancelled
        if self.deadline_s == 0.0:
            raise TaskTimedOut

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than the task is wanted; raises as `raise_if_cancelled` does."""
        end = self._clock() + seconds
        self.raise_if_cancelled()
        while (left := end - self._clock()) > 0:
            self._sleep(min(left, PAUSE_SLICE_S))
            self.raise_if_cancelled()

    def progress(self, percent: float | None, message: str = "") -> None:
        """Tell the submitter how far it is.

        Args:
            percent: 0 to 100, cut to that range; ``None`` keeps the last one.
            message: For people; cut to 500 characters.
        """
        if percent is not None and math.isfinite(percent):
            self._percent = min(100.0, max(0.0, float(percent)))
        self._effects.send_progress(self._percent, message[:PROGRESS_MESSAGE_MAX])

    def checkpoint(self, data: object) -> None:
        """Keep ``data`` for the next attempt, should this one fail or be lost.

        Replaces what was kept before.

        Raises:
            ValueError: ``data`` cannot be written as strict JSON.
            CheckpointTooLarge: It has more than 256 KiB as JSON.
        """
        raw = encoding.encode(data)
        if len(raw) > CHECKPOINT_BYTES_MAX:
            raise CheckpointTooLarge(len(raw), CHECKPOINT_BYTES_MAX)
        self._effects.save_checkpoint(raw)

    @property
    def last_checkpoint(self) -> Any:
        """What an earlier attempt kept, as parsed JSON, or ``None``."""
        return None if self._last_checkpoint is None else encoding.decode(self._last_checkpoint)

    def artifact(self, path: str | os.PathLike[str], name: str | None = None) -> ArtifactRef:
        """Store the local file ``path`` for the submitter; ``name`` defaults to its own."""
        local = Path(path)
        return self._effects.put_artifact(local, name or local.name)

    def open_artifact(self, sha256: str, *, field: str = "artifact") -> Path:
        """Return a local file with the content ``sha256``. It is read-only and shared.

        Args:
            sha256: Its digest.
            field: Where it came from, such as ``payload.artifact``; named in the error.

        Raises:
            Reject: ``sha256`` is not 64 lower-case hex digits.
            ArtifactNotFound: No such artifact is stored, or it is not for whoever submitted the
                task: what somebody has sent under the same owner, and what tasks of his have made.
        """
        if not _SHA256.fullmatch(sha256):
            raise Reject(f"{field}: {sha256[:80]!r} is not a sha256: 64 lower-case hex digits are")
        try:
            return self._effects.get_artifact(sha256)
        except NotFound:
            raise ArtifactNotFound(field, sha256) from None

    def resolve(self, path: str, *, field: str = "path") -> Path:
        """Return the real path of a file of this worker, links followed. It need not exist.

        Args:
            path: Absolute, or relative to the worker's disk path.
            field: Where it came from, such as ``payload.input_file``; named in the error.

        Raises:
            PathOutsideDisk: It leads out of ``worker.resources.disk_path``. The task is rejected.
            Reject: The worker offers no disk path.
        """
        if self._disk_path is None:
            raise Reject(
                f"{field}: {self.worker} has no worker.resources.disk_path; "
                "configure one, or send the file as an artifact"
            )
        return resolve_worker_path(path, self._disk_path, field=field)

    @property
    def scratch(self) -> Path:
        """A directory of this attempt's own, made on first use and removed when it ends."""
        if self._scratch is None:
            prefix = f"{self.task_id}.{self._token}."
            self._scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=self._scratch_root))
        return self._scratch

    def close(self) -> None:
        """Remove the scratch directory. Harmless when repeated."""
        if self._scratch is not None:
            _remove_tree(self._scratch)
            self._scratch = None


def remove_stale_scratch(
    scratch_root: str | os.PathLike[str], running_task_ids: Collection[str]
) -> int:
    """Remove scratch directories whose attempts were killed; return how many there were.

    Args:
        scratch_root: A directory used for nothing else.
        running_task_ids: Tasks whose directories are in use.
    """
    removed = 0
    with os.scandir(scratch_root) as entries:
        for entry in entries:
            task_id = entry.name.partition(".")[0]
            if entry.is_dir(follow_symlinks=False) and task_id not in running_task_ids:
                _remove_tree(Path(entry.path))
                removed += 1
    return removed


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning(
            "scratch directory could not be removed",
            extra={"action": "scratch.stuck", "path": str(path)},
        )

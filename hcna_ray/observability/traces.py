"""Spans of tasks: what is told of, and the one place that decides whether anything is.

``open_traces`` returns nothing where no collector is named, and then nothing of OpenTelemetry is
imported for it. A task's way shows as

    POST /tasks        C1, for the request; its context is kept with the task
      wait default     the moderator, from accept (or the end of the attempt before) to hand-out
      run echo         the worker, one for each attempt; current while the handler runs

Spans carry names, ids and outcomes; no payload, no result, no message of an error.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from hcna_ray.config import Settings
from hcna_ray.core.models import Token

if TYPE_CHECKING:
    from hcna_ray.observability.spans import Traces


log = logging.getLogger(__name__)


class Waited(NamedTuple):
    """A task has waited in the moderator's queue."""

    task_id: str
    task_type: str
    queue: str
    traceparent: str
    since: float
    until: float
    #: Number of the attempt that it was handed out as; 0 if it ended in the queue.
    attempt: int
    #: To whom, or empty.
    worker: str
    #: How the task ended if it was not handed out.
    ended: str = ""


class Ran(NamedTuple):
    """An attempt has ended. Its span follows from the token; see `attempt_span_id`."""

    task_id: str
    task_type: str
    traceparent: str
    token: Token
    worker: str
    since: float
    until: float
    outcome: str
    #: Kind or class of what went wrong, or empty.
    error_type: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TracesPlan:
    """Where one process's spans go, and what they say of it."""

    folder: Path
    bytes_max: int
    sample_ratio: float
    #: ``hcna-c1``, ``hcna-moderator`` or ``hcna-worker``.
    service: str
    node_id: str

    @classmethod
    def of(cls, settings: Settings, service: str, node_id: str) -> Self | None:
        """Return the plan, or ``None`` where traces are off."""
        tracing = settings.tracing
        if tracing.endpoint is None:
            return None
        return cls(
            folder=settings.traces_dir,
            bytes_max=tracing.spool_bytes,
            sample_ratio=tracing.sample_ratio,
            service=service,
            node_id=node_id,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan for another process."""
        return {
            "folder": str(self.folder),
            "bytes_max": self.bytes_max,
            "sample_ratio": self.sample_ratio,
            "service": self.service,
            "node_id": self.node_id,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the plan that `to_json` gave."""
        return cls(**{**data, "folder": Path(data["folder"])})

    def resource(self) -> dict[str, str]:
        """Return what OpenTelemetry calls the resource: who speaks."""
        return {
            "service.name": self.service,
            "service.namespace": "hcna",
            "service.version": version("hcna-ray"),
            "service.instance.id": self.node_id,
            "host.name": socket.gethostname(),
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "opentelemetry",
            "telemetry.sdk.version": version("opentelemetry-sdk"),
        }


def open_traces(plan: TracesPlan | None) -> Traces | None:
    """Return what writes spans, or ``None`` where traces are off."""
    if plan is None:
        return None
    try:
        from hcna_ray.observability.spans import Traces

        return Traces(plan)
    except Exception:  # A broken installation, say: no process stays down for that.
        log.exception("there will be no spans", extra={"action": "traces.failed"})
        return None

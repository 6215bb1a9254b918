"""Talk to C1 from Python: `Client` and `AsyncClient`.

Needs httpx and nothing else of this product: no Ray, no models of the server. May be imported by
anyone; imports nothing of ours.

    discovery   where C1 is, and the key
    models      values sent and received
    events      streams of events, turned into values
    plans       every rule, without I/O: requests, retries, reading answers
    transport   how httpx's words map to the plans'
    sync, aio       the two clients: they carry plans out
    handles, html   a task to hold on to, and how a notebook shows it
    notebook        a progress bar, a live table, rows for a data frame

A task's states, as seen from here::

    scheduled ──▶ queued ──▶ running ──▶ completed | failed | cancelled | expired
        ▲                       │
        └── backoff, lost ──────┘
"""

from hcna_ray.client.aio import AsyncBatch, AsyncClient
from hcna_ray.client.discovery import Endpoint, find_endpoint
from hcna_ray.client.errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    ConnectionsBusy,
    DigestMismatch,
    FieldError,
    Forbidden,
    HcnaClientError,
    InvalidRequest,
    NotFound,
    Overloaded,
    StrangerListens,
    TaskCancelled,
    TaskError,
    TaskExpired,
    TaskFailed,
    Unauthorized,
    UnexpectedAnswer,
    UnsendablePayload,
    WaitTimeout,
)
from hcna_ray.client.events import TaskEvent
from hcna_ray.client.handles import AsyncTaskHandle, TaskHandle
from hcna_ray.client.models import (
    Artifact,
    Attempt,
    ClusterStatus,
    Explanation,
    Health,
    IntentAnswer,
    MapOptions,
    PendingReason,
    Progress,
    Requires,
    Retry,
    TaskFailure,
    TaskOptions,
    TaskRequest,
    TaskView,
    Worker,
)
from hcna_ray.client.sync import Batch, Client

__all__ = [
    "ApiError",
    "Artifact",
    "AsyncBatch",
    "AsyncClient",
    "AsyncTaskHandle",
    "Attempt",
    "Batch",
    "Client",
    "ClusterStatus",
    "Conflict",
    "ConnectionFailed",
    "ConnectionsBusy",
    "DigestMismatch",
    "Endpoint",
    "Explanation",
    "FieldError",
    "Forbidden",
    "HcnaClientError",
    "Health",
    "IntentAnswer",
    "InvalidRequest",
    "MapOptions",
    "NotFound",
    "Overloaded",
    "PendingReason",
    "Progress",
    "Requires",
    "Retry",
    "StrangerListens",
    "TaskCancelled",
    "TaskError",
    "TaskEvent",
    "TaskExpired",
    "TaskFailed",
    "TaskFailure",
    "TaskHandle",
    "TaskOptions",
    "TaskRequest",
    "TaskView",
    "Unauthorized",
    "UnexpectedAnswer",
    "UnsendablePayload",
    "WaitTimeout",
    "Worker",
    "find_endpoint",
]

"""``test.ping``: a worker says that it is there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel

from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.registry import Payload, task


class PingPayload(Payload):
    """Nothing to say."""


class PingResult(BaseModel):
    """Who answered, and when by its own clock."""

    pong: Literal[True] = True
    node: str
    #: ISO 8601, UTC, milliseconds.
    time: str


@task("test.ping", payload=PingPayload, result=PingResult)
def ping(payload: PingPayload, ctx: TaskContext) -> PingResult:
    """Answer with the worker's name and clock."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return PingResult(node=ctx.node_id, time=now)

"""What is submitted to every peer."""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel


class TaskIn(BaseModel):
    """A task."""

    task_type: str
    payload: dict[str, Any]


class BatchIn(BaseModel):
    """Many of them."""

    tasks: list[TaskIn]


def echoed(payload: dict[str, Any]) -> dict[str, Any]:
    """Give back what was given; with ``stamp``, also when that was."""
    return {**payload, "started_at": time.time()} if "stamp" in payload else payload

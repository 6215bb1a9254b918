"""W3C trace context as values: what a ``traceparent`` says, and which span an attempt is."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from hcna_ray.core.models import Token

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})\Z")
_SAMPLED = 0x01


class TraceParent(NamedTuple):
    """One span as others name it."""

    #: 32 lower-case hex digits.
    trace_id: str
    #: 16 lower-case hex digits.
    span_id: str
    #: Whether whoever began the trace wants it to be recorded.
    sampled: bool


def parse_traceparent(text: str | None) -> TraceParent | None:
    """Return what a W3C ``traceparent`` says, or ``None`` when it is absent or malformed."""
    match = _TRACEPARENT.match(text or "")
    if match is None or match[1] == "0" * 32 or match[2] == "0" * 16:
        return None
    return TraceParent(match[1], match[2], bool(int(match[3], 16) & _SAMPLED))


def attempt_span_id(task_id: str, token: Token) -> str:
    """Return the id of the span of one attempt, 16 hex digits.

    It follows from the attempt, so that whoever outlives it can tell of it: a worker that died had
    given this id to what ran below it.
    """
    name = f"{task_id}.{token.generation}.{token.attempt}"
    return hashlib.sha256(name.encode()).hexdigest()[:16]

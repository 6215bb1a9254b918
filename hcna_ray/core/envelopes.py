"""Versioned envelopes between moderator and workers: intents down, telemetry up.

Both are idempotent by ``msg_id`` and carry a W3C trace id. They travel as JSON objects with exactly
the keys below; an unknown schema is refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hcna_ray.core.errors import Invalid
from hcna_ray.core.tracing import parse_traceparent

INTENT_SCHEMA = "hcna.intent.v1"
TELEMETRY_SCHEMA = "hcna.telemetry.v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Envelope:
    msg_id: str
    #: Instant of sending, seconds since the epoch.
    ts: float
    src: str
    dst: str
    payload: Mapping[str, Any]
    trace: Mapping[str, str]
    schema: str

    def to_dict(self) -> dict[str, Any]:
        """Return the envelope as a JSON-ready object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read an envelope.

        Raises:
            Invalid: a key is missing, unknown or of the wrong type, or the schema is another.
        """
        fields = cls.__dataclass_fields__
        unknown = sorted(set(data) - set(fields))
        missing = sorted(set(fields) - set(data))
        if unknown or missing:
            raise Invalid("invalid_envelope", f"envelope: missing {missing}, unknown {unknown}")
        expected = fields["schema"].default
        if data["schema"] != expected:
            raise Invalid(
                "invalid_envelope", f"schema is {data['schema']!r}, this node speaks {expected!r}"
            )
        for name in ("payload", "trace"):
            if not isinstance(data[name], Mapping):
                raise Invalid("invalid_envelope", f"{name} must be an object")
        for name in sorted(set(fields) - {"payload", "trace", "ts"}):
            if not isinstance(data[name], str):
                raise Invalid("invalid_envelope", f"{name} must be text")
        if not all(isinstance(value, str) for value in data["trace"].values()):
            raise Invalid("invalid_envelope", "trace must hold text")
        if isinstance(data["ts"], bool) or not isinstance(data["ts"], int | float):
            raise Invalid("invalid_envelope", "ts must be seconds since the epoch")
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent(_Envelope):
    """Asks a node for something, e.g. ``test.ping``."""

    intent: str
    schema: str = INTENT_SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry(_Envelope):
    """A worker's report on itself; its arrival is the heartbeat."""

    schema: str = TELEMETRY_SCHEMA


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace id of a W3C ``traceparent``, or ``None`` when it is absent or malformed."""
    found = parse_traceparent(traceparent)
    return None if found is None else found.trace_id

"""What the lines of a log are about: a task, an attempt, a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from hcna_ray.core.tracing import parse_traceparent

_NOTHING: Mapping[str, object] = {}
_fields: ContextVar[Mapping[str, object]] = ContextVar("hcna_log_fields", default=_NOTHING)


def names_of(task_id: str, attempt: int, traceparent: str | None) -> dict[str, object]:
    """Return the fields that name an attempt, and its trace if it belongs to one."""
    trace = parse_traceparent(traceparent)
    names: dict[str, object] = {"task_id": task_id, "attempt": attempt}
    return names if trace is None else names | {"trace_id": trace.trace_id}


@contextmanager
def lines_about(fields: Mapping[str, object]) -> Iterator[None]:
    """Have every line that is logged inside, in this context, carry these fields too."""
    before = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(before)


def current_fields() -> Mapping[str, object]:
    """Return what the lines logged here are about; a line's own fields count more."""
    return _fields.get()

"""Event streams as they come over HTTP (``text/event-stream``), turned into values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from hcna_ray.client.models import Json, parse_instant

#: No message of C1 is as long as that; what is has lost its way.
MESSAGE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """Something that happened to a task.

    Attributes:
        id: Where it stands in the history; what `Client.events` takes as ``after``.
        kind: What happened, e.g. ``"started"``. ``"reset"``, without a task, says that the store
            was restored from a backup: look at your tasks again.
        task_id: The task.
        status: The task's status after it.
        at: When.
        attempt: Number of the attempt, if it is about one.
        worker: Where that ran.
        detail: A reason or a message, if there is one.
        task_type: The task's type.
        queue: The task's queue.
        raw: All that C1 sent.
    """

    id: str
    kind: str
    task_id: str = ""
    status: str = ""
    at: datetime | None = None
    attempt: int | None = None
    worker: str | None = None
    detail: str | None = None
    task_type: str | None = None
    queue: str | None = None
    raw: Json = field(default_factory=dict)

    @classmethod
    def from_json(cls, place: str, name: str, raw: Json) -> TaskEvent:
        """Read a message. Raises `KeyError` for one that names no task."""
        if name == "reset":
            return cls(id=place, kind="reset", detail=raw.get("reason"), raw=raw)
        return cls(
            id=place,
            kind=raw["kind"],
            task_id=raw["task_id"],
            status=raw["status"],
            at=parse_instant(raw.get("at")),
            attempt=raw.get("attempt"),
            worker=raw.get("worker"),
            detail=raw.get("detail"),
            task_type=raw.get("task_type"),
            queue=raw.get("queue"),
            raw=raw,
        )


class EventParser:
    """Takes a stream piece by piece; knows how far it was read. A piece may end anywhere."""

    def __init__(self, place: str | None = None) -> None:
        #: Id of the last message, or of where C1 said that the stream stands.
        self.place = place
        self._buffer = b""

    def begin(self) -> None:
        """Another connection: half of a message is not continued on it."""
        self._buffer = b""

    def feed(self, piece: bytes) -> Iterator[TaskEvent]:
        """Yield the events that are complete now.

        Raises:
            ValueError: it is no stream of events.
            KeyError: a message without what it is about.
        """
        self._buffer += piece
        while b"\n\n" in self._buffer:
            block, _, self._buffer = self._buffer.partition(b"\n\n")
            event = self._read(block)
            if event is not None:
                yield event
        if len(self._buffer) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message has more than {MESSAGE_BYTES_MAX} bytes")

    def _read(self, block: bytes) -> TaskEvent | None:
        name, data, place = "", [], None
        for line in block.decode().split("\n"):
            field_, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field_ == "data":
                data.append(value)
            elif field_ == "event":
                name = value
            elif field_ == "id":
                place = value
        if place is not None:
            self.place = place
        if not data:
            return None
        raw = json.loads("\n".join(data))
        if not isinstance(raw, dict):
            raise ValueError("a message is no JSON object")
        return TaskEvent.from_json(self.place or "", name, raw)

"""What a replica counts of its own requests, and the sample of everything for ``/metrics``."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import TaskState
from hcna_ray.observability.exposition import TOLD, Labels, OwnFigures, WorkerFigures
from hcna_ray.observability.figures import RAN, WAITED, Histogram, stored_histogram
from hcna_ray.runtime.messages import ModeratorStatus, WorkerInfo
from hcna_ray.security.authority import Node, list_issued, trusted
from hcna_ray.store.base import Counter, TaskReader

#: How old the list of certificates may be.
CERTIFICATES_AGE_S = 60.0


class RequestStats:
    """Requests answered by this replica: counts by route, method and status, and their duration."""

    def __init__(self) -> None:
        self.requests: dict[Labels, int] = {}
        self.durations: dict[Labels, Histogram] = {}

    def count(self, route: str, method: str, status: int, seconds: float | None = None) -> None:
        """Count one answer. ``route`` is a template such as ``/tasks/{task_id}``, never a path."""
        key = (route, method, str(status))
        self.requests[key] = self.requests.get(key, 0) + 1
        if seconds is not None:
            histogram = self.durations.get((route,))
            if histogram is None:
                histogram = self.durations[route,] = Histogram()
            histogram.observe(seconds)


def read_stored(reader: TaskReader, now: float) -> dict[str, Any]:
    """Read what the store knows, under the names of `hcna_ray.observability.exposition.Sample`."""
    depth = reader.depth()
    since, paused = reader.queued_since(), reader.paused()
    queues = {queue for queue, _ in depth} | since.keys() | paused
    return {
        **stored_figures(reader.counters(), depth),
        "queue_age": {(one,): max(0.0, now - since.get(one, now)) for one in queues},
        "queue_paused": {(one,): int(one in paused) for one in queues},
    }


def stored_figures(
    counters: Mapping[Counter, int], depth: Mapping[tuple[str, TaskState], int]
) -> dict[str, Any]:
    """Sort the store's counters under the names of `hcna_ray.observability.exposition.Sample`."""
    found: dict[str, Tally[Labels]] = {name: Tally() for name in ("accepted", "ended", "attempts")}
    by_type: dict[str, dict[str, dict[str, int]]] = {WAITED: {}, RAN: {}}
    for counter, value in counters.items():
        if counter.name in found:
            found[counter.name][counter.task_type, counter.label] += value
        elif counter.name in by_type:
            by_type[counter.name].setdefault(counter.task_type, {})[counter.label] = value
    figures: dict[str, Any] = {name: dict(tally) for name, tally in found.items()}
    for name, counted in by_type.items():
        figures[name] = {(task_type,): stored_histogram(one) for task_type, one in counted.items()}
    for name in ("webhook", "schedule"):
        figures[name] = {
            (counter.label,): value for counter, value in counters.items() if counter.name == name
        }
    figures["depth"] = {(queue, state.value): count for (queue, state), count in depth.items()}
    return figures


def worker_figures(workers: Sequence[WorkerInfo]) -> dict[str, WorkerFigures]:
    """Return what `/metrics` shows of each worker."""
    return {
        one.name: WorkerFigures(
            state=one.state.value,
            last_seen_age_s=one.last_seen_age_s,
            running=len(one.running),
            slots=one.slots,
            clock_ahead_s=one.clock_ahead_s,
            told=_told(one.telemetry),
        )
        for one in workers
    }


def _told(telemetry: Mapping[str, Any]) -> dict[str, float]:
    payload = telemetry.get("payload")
    if not isinstance(payload, Mapping):
        return {}
    found = {metric: payload.get(field) for metric, field in TOLD.items()}
    return {
        metric: float(value)
        for metric, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def own_figures(status: ModeratorStatus) -> OwnFigures | None:
    """Return what `/metrics` shows of the moderator; ``None`` if it does not count itself."""
    counted = status.figures
    if counted is None:
        return None
    return OwnFigures(
        started_at=status.started_at,
        commits=status.commits,
        live_attempts=status.live_attempts,
        open_tasks=status.open_tasks,
        open_bytes=status.open_bytes,
        room=status.room,
        renewals=counted.renewals,
        refused=counted.refused,
        disk_free_bytes=counted.disk_free_bytes,
        batch_calls=counted.batch_calls,
        batch_s=counted.batch_s,
        commit_s=counted.commit_s,
    )


class Certificates:
    """When the certificates of this cluster end: its authorities, and what they have given out."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        """Remember where they are; nothing is read yet."""
        self._directory, self._clock = directory, clock
        self._read: tuple[float, dict[Labels, float]] | None = None

    def ends(self) -> dict[Labels, float]:
        """Return the instant of the end by (name, kind). Reads files once a minute.

        Of each name only the newest one that is not revoked counts: the others have been replaced.
        What cannot be read is left out.
        """
        now = self._clock.elapsed()
        if self._read is None or now - self._read[0] > CERTIFICATES_AGE_S:
            self._read = now, {**_either(self._authorities), **_either(self._given)}
        return self._read[1]

    def _authorities(self) -> Iterable[tuple[Labels, float]]:
        bundle = Node.of(self._directory).trust
        ends = [one.not_valid_after_utc.timestamp() for one in trusted(bundle)]
        # While one replaces the other, what machines believe ends with the last of them.
        return [(("authority", "authority"), max(ends))] if ends else []

    def _given(self) -> Iterable[tuple[Labels, float]]:
        newest = {
            (one.name, str(one.kind)): one.expires_at
            for one in list_issued(self._directory)
            if one.revoked_at is None
        }
        return newest.items()


def _either(read: Callable[[], Iterable[tuple[Labels, float]]]) -> dict[Labels, float]:
    try:
        return dict(read())
    except HcnaError:
        return {}

"""Resources of processes over a run: sampled, and their slopes."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.checker.checks.bounds import least_squares

PAGE = os.sysconf("SC_PAGE_SIZE")
#: What is sampled of a process.
KINDS = ("rss", "fds", "threads")
#: Threads of gRPC's own pool: it grows when the machine is busy, by one for each time nothing went
#: on for a while, and shrinks by itself. That is no leak, and would hide one.
_POOL = "event_engine"


def sample(pid: int) -> dict[str, int] | None:
    """Return what a process uses now; ``None`` when it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        rss = int((folder / "statm").read_text().split()[1]) * PAGE
        fds = len(list((folder / "fd").iterdir()))
        threads = sum(_name(one) != _POOL for one in (folder / "task").iterdir())
    except OSError:
        return None
    return {"rss": rss, "fds": fds, "threads": threads}


def _name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text().strip()
    except OSError:
        return _POOL  # It has just ended.


class Sampler:
    """Writes ``samples.jsonl`` from a thread: ``t``, ``name``, ``pid`` and numbers."""

    def __init__(
        self,
        path: Path,
        processes: Callable[[], Mapping[str, int]],
        sizes: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
        *,
        every_s: float,
    ) -> None:
        """Prepare; entering it begins.

        Args:
            path: The file.
            processes: Tells the pid of each process by its name, anew each time.
            sizes: Further numbers by name, such as those of files.
            every_s: Pause between two samples.
        """
        self._path, self._processes, self._sizes = path, processes, sizes
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        with self._path.open("a") as out:
            while not self._stop.wait(self._every_s):
                now = time.time()
                for name, pid in self._processes().items():
                    if found := sample(pid):
                        out.write(json.dumps({"t": now, "name": name, "pid": pid, **found}) + "\n")
                for name, numbers in self._sizes().items():
                    out.write(json.dumps({"t": now, "name": name, **numbers}) + "\n")
                out.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the samples."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def per_hour(
    rows: Iterable[Mapping[str, Any]], kind: str, *, warm_up_s: float
) -> tuple[float, int] | None:
    """Return by how much something grows in an hour, and from how many samples that is known.

    A process that was started again begins anew: of each life the first part is left out, and what
    is fitted is one slope with a level of its own for each life.
    """
    lives: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if kind in row:
            lives[row.get("pid")].append((float(row["t"]), float(row[kind])))
    above = below = 0.0
    count = 0
    for points in lives.values():
        kept = [(t, v) for t, v in points if t >= points[0][0] + warm_up_s]
        if len(kept) < 3:
            continue
        spread = spread_of(kept)
        above += least_squares(kept) * spread
        below += spread
        count += len(kept)
    return (3600.0 * above / below, count) if below else None


def spread_of(points: Sequence[tuple[float, float]]) -> float:
    """Return the sum of squared distances of the points' times from their mean."""
    mean = sum(t for t, _ in points) / len(points)
    return sum((t - mean) ** 2 for t, _ in points)


def by_name(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return samples by name, in order of name."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[str(row["name"])].append(row)
    return dict(sorted(found.items()))

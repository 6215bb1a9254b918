"""What is measured: parts made of visits, each the smallest thing that a resumed run skips."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import copies, floors, idle, scale, spans
from benchmarks.children import FOLDER, ROOT, Trouble
from benchmarks.machine import Usage
from benchmarks.statistics import median
from benchmarks.systems import Hcna, System, emptied
from benchmarks.visits import Size, Visit
from hcna_ray.cli.measure import time_fdatasync

#: What each fsync is made to take longer, microseconds.
SLOW_US = 5000
#: Rounds of that; more would not fit into the 40 minutes that a whole run may take.
SLOW_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a visit found."""

    figures: Mapping[str, float]
    usages: Sequence[Usage]
    fsync_ms: float
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One visit of one system or floor in one round."""

    part: str
    of: str
    round: int
    measure: Callable[[Path], Found]


PARTS = {
    "rounds": "everybody beside everybody: rates, a lone task, batches, dispatch at 60 %",
    "slow": "lone tasks and 32 connections with 5 ms more for each fsync",
    "scale": "a long queue: submit, dispatch, memory, restart",
    "idle": "CPU and wake-ups while there is nothing to do",
    "copy": "artifacts beside a plain HTTP copy",
    "spans": "where a task's time goes",
}


def stops(
    part: str, systems: Sequence[System], size: Size, rounds: int, *, with_floors: bool
) -> Iterator[Stop]:
    """Yield the visits of a part, in turn."""

    def stop(of: str, number: int, measure: Callable[[Path], Found]) -> Stop:
        return Stop(part=part, of=of, round=number, measure=measure)

    ours = [system for system in systems if isinstance(system, Hcna)]
    if part == "rounds":
        for number in range(1, rounds + 1):
            for system in systems:
                yield stop(system.name, number, _of_system(system, size, _everything))
            if with_floors:
                yield stop("floors", number, lambda folder: _floors(folder, size))
    elif part == "slow":
        for number in range(1, min(rounds, SLOW_ROUNDS) + 1):
            for system in systems:
                yield stop(system.name, number, _slowly(system, size))
    elif part == "scale":
        for system in systems:
            yield stop(system.name, 1, _of_system(system, size, scale.measure))
    elif part == "idle":
        for system in systems:
            yield stop(system.name, 1, _of_system(system, size, idle.measure))
        if with_floors:
            yield stop("floors", 1, _idle_floors)
    elif part == "copy":
        for system in ours:
            yield stop(system.name, 1, _of_system(system, size, copies.measure))
    elif part == "spans":
        for system in ours:
            yield stop(system.name, 1, _of_system(system, size, spans.measure))


def _everything(seen: Visit, size: Size) -> None:
    seen.warm_up(size)
    seen.lone(size)
    seen.posts(size)
    if size.paced_s:
        seen.paced(size)
    seen.batch(size)


def _of_system(
    system: System,
    size: Size,
    measure: Callable[[Visit, Size], None],
    extra: Mapping[str, str] | None = None,
) -> Callable[[Path], Found]:
    def visit(folder: Path) -> Found:
        with system.running(folder, extra or {}) as target:
            seen = Visit(target)
            measure(seen, size)
        return Found(
            figures=seen.figures, usages=seen.usages, fsync_ms=seen.fsync_ms, notes=seen.notes
        )

    return visit


def _floors(folder: Path, size: Size) -> Found:
    emptied(folder)
    disk = median(time_fdatasync(folder))
    figures, usages = floors.measure(folder, size)
    return Found(figures=figures, usages=usages, fsync_ms=disk)


def _idle_floors(folder: Path) -> Found:
    emptied(folder)
    disk = median(time_fdatasync(folder))
    with floors.cluster(folder) as (children, _, _):
        figures, usage = idle.watch(children, floors.EMPTY_PROCESSES)
    return Found(figures=figures, usages=[usage], fsync_ms=disk)


def _slowly(system: System, size: Size) -> Callable[[Path], Found]:
    def visit(folder: Path) -> Found:
        library = slow_library()
        counted = FOLDER / "slow_fsyncs"
        counted.write_bytes(b"")
        counted.chmod(0o666)  # PostgreSQL runs as somebody else.
        extra = {
            "LD_PRELOAD": str(library),
            "SLOW_FSYNC_US": str(SLOW_US),
            "SLOW_FSYNC_COUNT": str(counted),
        }

        def measure(seen: Visit, size: Size) -> None:
            seen.warm_up(size)
            before = counted.stat().st_size
            seen.lone(size)
            seen.figures["lone_fsyncs"] = (counted.stat().st_size - before) / size.lone
            seen.posts(size)

        found = _of_system(system, size, measure, extra)(folder)
        if system.durable == "yes" and not counted.stat().st_size:
            raise Trouble(f"{system.title}: no fsync was slow")
        return found

    return visit


def slow_library() -> Path:
    """Compile what makes fsync slow, once."""
    source, library = ROOT / "benchmarks" / "slow_fsync.c", FOLDER / "slow_fsync.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        options = ["-O2", "-Wall", "-shared", "-fPIC"]
        command = ["cc", *options, "-o", str(library), str(source), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise Trouble("cc is missing; as root: scripts/system_packages.sh benchmarks") from None
        except subprocess.CalledProcessError as error:
            raise Trouble(f"{source.name}: {error.stderr}") from None
    return library

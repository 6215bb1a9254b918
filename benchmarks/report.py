"""Tables and plot from results. Pure but for the writing of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from benchmarks.results import Result
from benchmarks.statistics import Summary, summarise


class Named(Protocol):
    """What a row of a table is about."""

    name: str
    title: str
    durable: str


#: Columns of the main table: figure, heading, digits.
COLUMNS = (
    ("posts_accept_s", "accept/s", 0),
    ("posts_complete_s", "complete/s", 0),
    ("posts_p99_ms", "POST p99 ms", 1),
    ("posts_cpu_ms", "CPU ms/task", 2),
    ("lone_p50_ms", "lone p50 ms", 2),
    ("lone_p99_ms", "lone p99 ms", 2),
    ("batch_accept_s", "batch accept/s", 0),
    ("batch_complete_s", "batch complete/s", 0),
    ("dispatch_p95_ms", "dispatch p95 ms", 1),
    ("load_cores", "client cores", 2),
)


def figure(results: Sequence[Result], of: str, name: str) -> Summary | None:
    """Return a figure of a system over its rounds."""
    return summarise([one.figures[name] for one in results if one.of == of and name in one.figures])


def console_table(results: Sequence[Result], systems: Sequence[Named]) -> str:
    """Return medians (and lowest to highest) as plain text."""
    lines = []
    for name, heading, digits in COLUMNS:
        cells = []
        for system in systems:
            found = figure(results, system.name, name)
            cells.append(
                "-"
                if found is None
                else f"{found.median:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"
            )
        if any(cell != "-" for cell in cells):
            lines.append(f"{heading:18}" + "".join(f"{cell:>28}" for cell in cells))
    head = f"{'':18}" + "".join(f"{system.title[:27]:>28}" for system in systems)
    durable = f"{'durable':18}" + "".join(f"{system.durable:>28}" for system in systems)
    foreign = f"{'others, cores':18}"
    for system in systems:
        used = [f"{one.foreign_cores:.1f}" for one in results if one.of == system.name]
        foreign += f"{' '.join(used):>28}"
    return "\n".join([head, *lines, durable, foreign])

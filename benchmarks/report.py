"""Tables, goals and the page from results. Pure, but for the writing of the page at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.results import FOREIGN_CORES_MAX, Result
from benchmarks.statistics import Summary, median, summarise

BEGIN = "<!-- measured: written by `make bench`, do not edit below -->"
END = "<!-- measured: end -->"
PLOT = "performance.svg"
#: What a whole run has.
ROUNDS = 5

#: What a row of the console's table shows: figure, heading, digits.
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


class Named(Protocol):
    """What a row of a table is about."""

    name: str
    title: str
    durable: str


class Results:
    """Results of one run, looked up by part, system and figure."""

    def __init__(self, results: Sequence[Result]) -> None:
        """Take results of the same sources."""
        self.all = results

    def of(self, part: str, of: str) -> list[Result]:
        """Return the rounds of a system in a part."""
        found = [one for one in self.all if one.part == part and one.of == of]
        return sorted(found, key=lambda one: one.round)

    def figure(self, part: str, of: str, name: str) -> Summary | None:
        """Return a figure over its rounds, or ``None`` if it was not measured."""
        return summarise([r.figures[name] for r in self.of(part, of) if name in r.figures])

    def value(self, part: str, of: str, name: str) -> float:
        """Return a figure's median; NaN if it was not measured."""
        found = self.figure(part, of, name)
        return math.nan if found is None else found.median

    def conditions(self, part: str) -> str:
        """Return a sentence about the machine while a part was measured."""
        rows = [one for one in self.all if one.part == part]
        disks = summarise([one.fsync_ms for one in rows])
        assert disks is not None
        marked = [f"{one.of} {one.round}" for one in rows if one.disturbed]
        told = (
            f"fdatasync of the machine p50 {disks.median:.2f} ms ({disks.low:.2f} to "
            f"{disks.high:.2f} over {disks.rounds} visits); others used "
            f"{median([one.foreign_cores for one in rows]):.2f} cores in the middle"
        )
        if marked:
            told += f"; more than {FOREIGN_CORES_MAX:g} in {len(marked)} of {len(rows)} visits (†)"
        return told + "."


def number(value: float, digits: int = 0) -> str:
    """Return a number for a reader: thousands apart, a dash for what was not measured."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}".replace(",", " ")


def cell(found: Summary | None, digits: int = 0) -> str:
    """Return a median and, of several rounds, from where to where they lie."""
    if found is None:
        return "-"
    if found.rounds == 1:
        return number(found.median, digits)
    return f"{number(found.median, digits)} ({number(found.low, digits)} to " + (
        f"{number(found.high, digits)})"
    )


def ratio(ours: float, theirs: float) -> str:
    """Return how many times as much the first is."""
    if math.isnan(ours) or math.isnan(theirs) or not theirs:
        return "-"
    return f"{ours / theirs:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table; all but the first column are numbers."""
    line = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(row)} |" for row in (head, line, *rows)]


def console_table(results: Sequence[Result], systems: Sequence[Named]) -> str:
    """Return medians (and lowest to highest) as plain text."""
    found = Results(results)
    lines = [f"{'':18}" + "".join(f"{system.title[:27]:>28}" for system in systems)]
    for name, heading, digits in COLUMNS:
        cells = [cell(found.figure("rounds", system.name, name), digits) for system in systems]
        if any(one != "-" for one in cells):
            lines.append(f"{heading:18}" + "".join(f"{one:>28}" for one in cells))
    lines.append(f"{'durable':18}" + "".join(f"{system.durable:>28}" for system in systems))
    used = [
        " ".join(f"{one.foreign_cores:.1f}" for one in found.of("rounds", system.name))
        for system in systems
    ]
    lines.append(f"{'others, cores':18}" + "".join(f"{one:>28}" for one in used))
    return "\n".join(lines)


# -- goals -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """Something to reach: a figure and its bound."""

    what: str
    wanted: str
    measured: str
    met: bool


def goals(found: Results) -> list[Goal]:
    """Return every goal that can be judged from the results."""

    def rounds(of: str, name: str) -> float:
        return found.value("rounds", of, name)

    accept, complete = rounds("hcna", "posts_accept_s"), rounds("hcna", "posts_complete_s")
    p50, p99 = rounds("hcna", "lone_p50_ms"), rounds("hcna", "lone_p99_ms")
    listed: list[tuple[str, float, Callable[[float, float], bool], float, int, str]] = [
        ("accept/s, one POST a task, 32 connections", accept, _least, 2500, 0, ""),
        ("complete/s, the same", complete, _least, 2100, 0, ""),
        (
            "complete, beside Celery",
            complete / rounds("celery", "posts_complete_s"),
            _least,
            3,
            2,
            "x",
        ),
        ("accept, beside Dask", accept / rounds("dask", "posts_accept_s"), _least, 1, 2, "x"),
        ("batch, accept/s", rounds("hcna", "batch_accept_s"), _least, 40_000, 0, ""),
        ("batch, complete/s", rounds("hcna", "batch_complete_s"), _least, 25_000, 0, ""),
        ("lone task p50, beside Celery's", p50 / rounds("celery", "lone_p50_ms"), _most, 1, 2, "x"),
        ("lone task p99, beside its p50", p99 / p50, _most, 3, 2, "x"),
        ("dispatch p95 at 60 % of peak, ms", rounds("hcna", "dispatch_p95_ms"), _most, 100, 1, ""),
    ]

    def long(name: str) -> float:
        return found.value("scale", "hcna", name)

    listed += [
        (
            "submit p99 with a long queue, beside an empty one",
            long("long_submit_p99_ms") / long("empty_submit_p99_ms"),
            _most,
            1.5,
            2,
            "x",
        ),
        (
            "dispatch with an empty queue, beside a long one",
            long("empty_dispatch_s") / long("long_dispatch_s"),
            _most,
            1.5,
            2,
            "x",
        ),
        ("moderator's memory then, MiB", long("moderator_mib"), _most, 512, 0, ""),
        ("its restart until it accepts, s", long("restart_s"), _most, 10, 1, ""),
    ]

    def idle(of: str) -> float:
        return found.value("idle", of, "moderator_cores") + found.value("idle", of, "c1_cores")

    listed += [
        (
            "idle, moderator and C1 above an empty actor and replica, % of a core",
            100 * (idle("hcna") - idle("floors")),
            _most,
            1,
            2,
            "",
        ),
        (
            "artifact up, beside a plain copy",
            found.value("copy", "hcna", "upload_mb_s")
            / found.value("copy", "hcna", "plain_upload_mb_s"),
            _least,
            0.7,
            2,
            "x",
        ),
        (
            "artifact down, beside a plain copy",
            found.value("copy", "hcna", "download_mb_s")
            / found.value("copy", "hcna", "plain_download_mb_s"),
            _least,
            0.7,
            2,
            "x",
        ),
    ]
    return [
        Goal(
            what,
            f"{'at least' if test is _least else 'at most'} {number(bound, 1 if bound % 1 else 0)}"
            f"{unit}",
            number(value, digits) + unit,
            test(value, bound),
        )
        for what, value, test, bound, digits, unit in listed
        if not math.isnan(value)
    ]


def _least(value: float, bound: float) -> bool:
    return value >= bound


def _most(value: float, bound: float) -> bool:
    return value <= bound


# -- the page --------------------------------------------------------------------------------------


def measured_part(found: Results, systems: Sequence[Named], machine: str) -> list[str]:
    """Return the generated lines of the page."""
    latest = max(found.all, key=lambda one: one.at)
    day = time.strftime("%Y-%m-%d", time.gmtime(latest.at))
    lines = [
        f"Commit {latest.commit}, {day}, {machine}. Medians; in brackets the lowest and the "
        "highest round.",
        "",
    ]
    rounds = max(one.round for one in found.all)
    if rounds < ROUNDS or any(one.disturbed for one in found.all):
        disturbed = sum(one.disturbed for one in found.all)
        lines += [
            f"**To be measured again**: {rounds} of {ROUNDS} rounds, and in {disturbed} of "
            f"{len(found.all)} visits other programs used more than {FOREIGN_CORES_MAX:g} cores.",
            "",
        ]
    judged = goals(found)
    if judged:
        lines += ["## Goals", ""]
        lines += table(
            ("goal", "wanted", "measured", "met"),
            [
                (one.what, one.wanted, one.measured, "yes" if one.met else "**no**")
                for one in judged
            ],
        )
        lines += ["", f"![Rates and times beside the peers]({PLOT})", ""]
    sections: Sequence[tuple[str, str, Callable[[Results, Sequence[Named]], list[str]]]] = (
        ("rounds", "One POST a task, 32 connections", _posts),
        ("rounds", "One task alone", _lone),
        ("rounds", "`POST /tasks/batch`, 1000 a request, 4 connections", _batches),
        ("rounds", "From POST to the start of the handler, at 60 % of the peak", _dispatch),
        ("rounds", "The floors", _floors),
        ("slow", "The same with 5 ms more for each fsync", _slow),
        ("scale", "A long queue", _scale),
        ("idle", "Nothing to do", _idle),
        ("copy", "Artifacts", _copies),
        ("spans", "Where a lone task's time goes", _spans),
    )
    for part, title, write in sections:
        if not any(one.part == part for one in found.all):
            continue
        if write is _floors and not found.of(part, "floors"):
            continue
        lines += [f"## {title}", "", *write(found, systems), "", found.conditions(part), ""]
    return lines


def _marked(found: Results, part: str, system: Named) -> str:
    """Return a system's title, marked if one of its rounds was disturbed."""
    return system.title + (
        " †" if any(one.disturbed for one in found.of(part, system.name)) else ""
    )


def _compared(
    found: Results,
    systems: Sequence[Named],
    part: str,
    columns: Sequence[tuple[str, str, int]],
    against: str,
    more: str,
) -> list[str]:
    """Return a table of systems with the ratio of ours to each.

    Args:
        found: The results.
        systems: Its rows.
        part: Where the figures are.
        columns: Figure, heading, digits.
        against: The figure that is compared.
        more: Heading of the ratio.
    """
    ours = found.value(part, "hcna", against)
    rows = []
    for system in systems:
        if not found.of(part, system.name):
            continue
        cells = [cell(found.figure(part, system.name, name), digits) for name, _, digits in columns]
        theirs = found.value(part, system.name, against)
        same = "" if system.name == "hcna" else ratio(ours, theirs)
        rows.append([_marked(found, part, system), *cells, same, system.durable])
    return table(["", *(heading for _, heading, _ in columns), more, "durable"], rows)


def _posts(found: Results, systems: Sequence[Named]) -> list[str]:
    columns = (
        ("posts_accept_s", "accepted/s", 0),
        ("posts_complete_s", "completed/s", 0),
        ("posts_p50_ms", "POST p50, ms", 1),
        ("posts_p99_ms", "POST p99, ms", 1),
        ("posts_cpu_ms", "CPU a task, ms", 2),
        ("load_cores", "load generator, cores", 2),
    )
    return _compared(found, systems, "rounds", columns, "posts_complete_s", "ours, completed")


def _lone(found: Results, systems: Sequence[Named]) -> list[str]:
    columns = (("lone_p50_ms", "p50, ms", 2), ("lone_p99_ms", "p99, ms", 2))
    return _compared(found, systems, "rounds", columns, "lone_p50_ms", "ours, p50")


def _batches(found: Results, systems: Sequence[Named]) -> list[str]:
    columns = (
        ("batch_accept_s", "accepted/s", 0),
        ("batch_complete_s", "completed/s", 0),
        ("batch_tasks", "tasks", 0),
    )
    return _compared(found, systems, "rounds", columns, "batch_complete_s", "ours, completed")


def _dispatch(found: Results, systems: Sequence[Named]) -> list[str]:
    columns = (
        ("paced_rate", "tasks/s", 0),
        ("dispatch_p50_ms", "p50, ms", 1),
        ("dispatch_p95_ms", "p95, ms", 1),
    )
    return _compared(found, systems, "rounds", columns, "dispatch_p95_ms", "ours, p95")


_FLOORS = (
    ("serve_empty_s", "Serve's HAProxy ingress, empty replica, 32 connections", "requests/s", 0),
    ("serve_actor_s", "the same with one actor call", "requests/s", 0),
    ("actor_call_s", "actor calls, 32 at once", "/s", 0),
    ("actor_call_p50_ms", "one actor call", "ms, p50", 2),
    ("task_s", "Ray tasks, 32 at once", "/s", 0),
    ("task_p50_ms", "one Ray task", "ms, p50", 2),
    ("stream_s", "outcomes of a streaming Ray task, 64 a step", "/s", 0),
    ("sqlite_1_rows_s", "SQLite, FULL, a row a transaction", "rows/s", 0),
    ("sqlite_1_commit_p50_ms", "such a transaction", "ms, p50", 2),
    ("sqlite_32_rows_s", "SQLite, FULL, 32 rows a transaction", "rows/s", 0),
)


def _floors(found: Results, systems: Sequence[Named]) -> list[str]:
    del systems
    rows = [
        (title, cell(found.figure("rounds", "floors", name), digits), unit)
        for name, title, unit, digits in _FLOORS
        if found.figure("rounds", "floors", name)
    ]
    return table(("what we stand on, each alone", "median", "unit"), rows)


def _slow(found: Results, systems: Sequence[Named]) -> list[str]:
    columns = (
        ("lone_p50_ms", "lone p50, ms", 2),
        ("lone_p99_ms", "lone p99, ms", 2),
        ("lone_fsyncs", "fsyncs a lone task", 1),
        ("posts_accept_s", "accepted/s", 0),
        ("posts_complete_s", "completed/s", 0),
    )
    return _compared(found, systems, "slow", columns, "posts_complete_s", "ours, completed")


def _scale(found: Results, systems: Sequence[Named]) -> list[str]:
    columns = (
        ("queued", "queued", 0),
        ("empty_submit_p99_ms", "submit p99 empty, ms", 1),
        ("long_submit_p99_ms", "submit p99 long, ms", 1),
        ("empty_dispatch_s", "dispatched/s empty", 0),
        ("long_dispatch_s", "dispatched/s long", 0),
        ("moderator_mib", "moderator, MiB", 0),
        ("resident_mib", "all processes, MiB", 0),
        ("restart_s", "restart, s", 1),
    )
    return _compared(found, systems, "scale", columns, "long_dispatch_s", "ours, dispatched")


_IDLE = (
    ("moderator", "moderator"),
    ("c1", "C1's replica"),
    ("agents", "agents"),
    ("slots", "slots"),
    ("supervisor", "supervisor"),
)


def _idle(found: Results, systems: Sequence[Named]) -> list[str]:
    rows = [
        _idle_row(found, system.name, "", f"{system.title}, all processes")
        for system in systems
        if found.of("idle", system.name)
    ]
    for name, title in _IDLE:
        if found.figure("idle", "hcna", f"{name}_cores"):
            rows.append(_idle_row(found, "hcna", f"{name}_", f"hcna-ray, {title}"))
    if found.of("idle", "floors"):
        rows.append(_idle_row(found, "floors", "moderator_", "an empty actor"))
        rows.append(_idle_row(found, "floors", "c1_", "an empty replica"))
        rows.append(_idle_row(found, "floors", "", "Ray and Serve with these two, all processes"))
    return table(("", "% of a core", "wake-ups/s", "resident, MiB"), rows)


def _idle_row(found: Results, of: str, prefix: str, title: str) -> list[str]:
    cores = found.value("idle", of, f"{prefix}cores")
    return [
        title,
        number(100 * cores, 2),
        number(found.value("idle", of, f"{prefix}wakeups_s")),
        number(found.value("idle", of, "resident_mib")) if not prefix else "-",
    ]


def _copies(found: Results, systems: Sequence[Named]) -> list[str]:
    del systems
    kinds = (
        ("upload", "plain_upload", "up, with our client"),
        ("download", "plain_download", "down, with curl"),
        ("client_download", "plain_download", "down, with our client, checked"),
    )
    rows = []
    for name, plain, title in kinds:
        ours = found.value("copy", "hcna", f"{name}_mb_s")
        theirs = found.value("copy", "hcna", f"{plain}_mb_s")
        rows.append((title, number(ours), number(theirs), ratio(ours, theirs)))
    return table(("128 MiB", "hcna-ray, MB/s", "plain copy, MB/s", "ratio"), rows)


_SPANS: Mapping[str, str] = {
    "sent_checked": "from POST through the ingress until C1 has checked it",
    "checked_accepted": "to the moderator, until it decides",
    "accepted_started": "commit, the way to the slot, the start of the handler",
    "started_completed": "the handler, and its outcome on the worker's disk",
    "completed_seen": "outcome to the moderator, commit, the news to C1, the answer",
    "sent_answered": "of these, until the 202 is there",
    "sent_seen": "the whole",
}


def _spans(found: Results, systems: Sequence[Named]) -> list[str]:
    del systems
    whole = found.value("spans", "hcna", "sent_seen_p50_ms")
    rows = []
    for name, title in _SPANS.items():
        p50 = found.value("spans", "hcna", f"{name}_p50_ms")
        if not math.isnan(p50):
            p95 = found.value("spans", "hcna", f"{name}_p95_ms")
            rows.append((title, number(p50, 2), number(p95, 2), f"{100 * p50 / whole:.0f} %"))
    return table(("span", "p50, ms", "p95, ms", "share"), rows)


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Put lines between the markers of a page; what stands around them is left as it is.

    Raises:
        ValueError: the page has no markers.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no markers")
    before, after = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    inner = "\n".join(lines).strip("\n")
    path.write_text(f"{before}{BEGIN}\n\n{inner}\n\n{END}{after}")

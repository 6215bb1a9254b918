"""The programme's table: for the terminal, and for docs/RELIABILITY.md between its two marks."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.programme import LINES, Result, times
from tests.support.sources import ROOT

PAGE = ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(results: Sequence[Result]) -> str:
    """Return what was tried, how often, and what broke, as Markdown."""
    rows = ["| Tried | n | in cases | violations | seeds | commit |", "|---|--:|--:|--:|---|---|"]
    for line in LINES:
        those = [one for one in results if line in one.counts]
        count = sum(one.counts[line] for one in those)
        broken = sum(len(one.violations) for one in those)
        rows.append(
            f"| {line} | {_number(count)} | {len(those)} | {broken if those else ''} | "
            f"{_seeds(those)} | {', '.join(sorted({one.commit for one in those}))} |"
        )
    return "\n".join(rows)


def times_table(results: Sequence[Result]) -> str:
    """Return the measured times, as Markdown."""
    rows = ["| Time | n | p50 | p99 | worst |", "|---|--:|--:|--:|--:|"]
    for name, samples in times(results):
        rows.append(
            f"| {name} | {len(samples)} | {_quantile(samples, 0.5):.2f} s | "
            f"{_quantile(samples, 0.99):.2f} s | {samples[-1]:.2f} s |"
        )
    return "\n".join(rows)


def parts_table(results: Sequence[Result]) -> str:
    """Return what each part took, as Markdown."""
    rows = ["| Part | cases | with violations | minutes |", "|---|--:|--:|--:|"]
    for name in sorted({one.part for one in results}):
        those = [one for one in results if one.part == name]
        broken = sum(bool(one.violations) for one in those)
        minutes = sum(one.took_s for one in those) / 60
        rows.append(f"| `{name}` | {len(those)} | {broken} | {minutes:.1f} |")
    return "\n".join(rows)


def page_section(results: Sequence[Result]) -> str:
    """Return the generated section of the page."""
    if not results:
        return "Nothing was run yet."
    first = time.strftime("%Y-%m-%d", time.gmtime(min(one.started_at for one in results)))
    last = time.strftime("%Y-%m-%d", time.gmtime(max(one.started_at for one in results)))
    when = first if first == last else f"{first} to {last}"
    return "\n\n".join(
        (
            f"Run {when} on {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, "
            f"Python {platform.python_version()}. An empty line was not run.",
            table(results),
            times_table(results),
            parts_table(results),
        )
    )


def write_page(results: Sequence[Result], page: Path = PAGE) -> None:
    """Put the section between the page's marks."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{page_section(results)}\n\n{END}{after}")


def _number(count: int) -> str:
    return f"{count:,}".replace(",", " ") if count else ""


def _seeds(results: Sequence[Result]) -> str:
    seeds = sorted({one.seed for one in results})
    if len(seeds) <= 2:
        return ", ".join(map(str, seeds))
    return f"{seeds[0]} … {seeds[-1]}"


def _quantile(samples: Sequence[float], part: float) -> float:
    """Return the smallest sample that at least this part of them does not exceed."""
    return samples[max(0, min(len(samples) - 1, -int(-part * len(samples) // 1) - 1))]

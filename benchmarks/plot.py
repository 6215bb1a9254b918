"""The plot of the page: bars with whiskers, as SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.report import Named, Results, number

#: Figure, title, digits, whether more is better.
PANELS = (
    ("posts_accept_s", "accepted/s, 32 connections", 0, True),
    ("posts_complete_s", "completed/s, 32 connections", 0, True),
    ("batch_complete_s", "completed/s, batches", 0, True),
    ("lone_p50_ms", "lone task, p50 ms", 2, False),
)
#: Readable on white and on black.
_OURS, _PEER, _DURABLE_PEER, _INK = "#2f7ed8", "#9a9a9a", "#6b6b6b", "#808080"
_ROW, _BAR, _LABELS, _WIDTH, _VALUES, _GAP = 26, 16, 250, 330, 110, 46
_FONT = "font-family='sans-serif' font-size='13'"


def svg(found: Results, systems: Sequence[Named]) -> str:
    """Draw a panel for each figure, a bar for each system; a whisker from lowest to highest."""
    parts: list[str] = []
    top = 0
    for name, title, digits, more in PANELS:
        rows = [
            (system, summary)
            for system in systems
            if (summary := found.figure("rounds", system.name, name)) is not None
        ]
        if not rows:
            continue
        top += _GAP
        better = "more is better" if more else "less is better"
        parts.append(
            f"<text x='4' y='{top - 12}' {_FONT} font-weight='bold' fill='{_INK}'>"
            f"{escape(title)} ({better})</text>"
        )
        scale = _WIDTH / max(summary.high for _, summary in rows)
        for system, summary in rows:
            middle = top + _ROW // 2
            colour = _OURS
            if system.name != "hcna":
                colour = _DURABLE_PEER if system.durable == "yes" else _PEER
            low, high = (_LABELS + value * scale for value in (summary.low, summary.high))
            parts += [
                f"<text x='{_LABELS - 8}' y='{middle + 5}' text-anchor='end' {_FONT} "
                f"fill='{_INK}'>{escape(system.title)}</text>",
                f"<rect x='{_LABELS}' y='{middle - _BAR // 2}' height='{_BAR}' "
                f"width='{summary.median * scale:.1f}' fill='{colour}'/>",
                f"<path d='M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8"
                f"M{high:.1f} {middle - 4}v8' stroke='{_INK}' fill='none'/>",
                f"<text x='{high + 8:.1f}' y='{middle + 5}' {_FONT} fill='{_INK}'>"
                f"{number(summary.median, digits)}</text>",
            ]
            top += _ROW
    parts.append(
        f"<text x='4' y='{top + 24}' {_FONT} fill='{_INK}'>Blue: hcna-ray, durable. Dark grey: "
        "durable. Light grey: not. Whiskers: lowest and highest round.</text>"
    )
    width, height = _LABELS + _WIDTH + _VALUES, top + 36
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>"
    return "\n".join([head, *parts, "</svg>"]) + "\n"

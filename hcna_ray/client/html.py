"""HTML for notebooks. Pure: values in, a string out, everything that is not ours escaped.

Bars and colours are inline styles, because a saved notebook keeps only what is in the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any

from hcna_ray.client.models import Explanation, TaskView, Worker, explain

if TYPE_CHECKING:
    from hcna_ray.client.plans import Snapshot

_COLOURS = {
    "completed": "#2e7d32",
    "healthy": "#2e7d32",
    "online": "#2e7d32",
    "running": "#1565c0",
    "failed": "#c62828",
    "unhealthy": "#c62828",
    "gone": "#c62828",
    "asleep": "#b26a00",
    "suspect": "#ef6c00",
    "degraded": "#ef6c00",
    "draining": "#ef6c00",
    "cordoned": "#ef6c00",
}
_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"


def task_html(view: TaskView, *, stale: str = "") -> str:
    """A task: status, bar, worker, times, and what to do if it waits or failed.

    Args:
        view: The task.
        stale: Why this is not the present state, if it is not.
    """
    percent = 100.0 if view.status == "completed" else 0.0
    if view.progress and not view.ended:
        percent = min(100.0, max(0.0, view.progress.percent))
    told = explain(view)
    rows = [
        ("task", f"<code>{escape(view.task_id)}</code>"),
        ("type", escape(view.task_type or "?")),
        ("status", _badge(view.status)),
        ("progress", _bar(percent, view.progress.message if view.progress else "")),
        ("worker", escape(view.worker or "none yet")),
        ("times", escape(_times(view))),
        ("says", escape(told.message)),
    ]
    if told.fix:
        rows.append(("fix", f"<code>{escape(told.fix)}</code>"))
    if stale:
        rows.append(("note", escape(f"as last seen: {stale}")))
    return _table(rows)


def snapshot_html(url: str, snapshot: Snapshot) -> str:
    """The cluster: health, machines, queue and links, and the truth when C1 cannot be asked."""
    link = _link(url, url)
    if snapshot.health is None:
        return _table(
            [
                ("C1", link),
                ("status", _badge("unreachable")),
                ("says", escape(snapshot.trouble)),
            ]
        )
    rows = [
        ("C1", f"{link} · {escape(snapshot.health.node_id)}"),
        ("status", _badge(snapshot.health.status)),
        ("M1", "connected" if snapshot.health.moderator_connected else "away"),
    ]
    if snapshot.trouble:
        rows.append(("says", escape(snapshot.trouble)))
    if snapshot.queued is not None:
        rows.append(("queue", f"{snapshot.queued} queued, {snapshot.running or 0} running"))
    rows.extend((worker.name, _worker_line(worker)) for worker in snapshot.workers)
    links = (("docs", "/docs"), ("health", "/health"), ("metrics", "/metrics"))
    rows.append(("links", " · ".join(_link(url + path, name) for name, path in links)))
    return _table(rows)


def worker_html(worker: Worker) -> str:
    """One worker: is it there, what it has, what it runs."""
    rows = [("worker", f"{escape(worker.name)} · {escape(worker.node_id)}")]
    rows.append(("state", _worker_line(worker)))
    if worker.trouble:
        rows.append(("trouble", escape(worker.trouble)))
    if worker.address:
        rows.append(("address", escape(worker.address)))
    for run in worker.running:
        told = f"{run.get('task_type')} {run.get('task_id')}, attempt {run.get('attempt')}"
        rows.append(("runs", escape(told)))
    return _table(rows)


def explanation_html(told: Explanation) -> str:
    """Where a task stands, why, and what would help."""
    rows = [
        ("task", f"<code>{escape(told.task_id)}</code>"),
        ("status", _badge(told.status)),
        ("why", escape(told.message)),
    ]
    if told.fix:
        rows.append(("fix", escape(told.fix)))
    rows.extend(("", escape(line)) for line in told.history)
    return _table(rows)


def bar_html(percent: float, words: str) -> str:
    """A bar and what it counts."""
    return _bar(min(100.0, max(0.0, percent)), "", words)


def rows_html(rows: Sequence[dict[str, Any]]) -> str:
    """A table with a column for each key of the first row."""
    if not rows:
        return "<i>nothing to show</i>"
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(f'<td style="{_CELL}">{_value(name, row.get(name))}</td>' for name in rows[0])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _value(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in ("status", "state"):
        return _badge(str(value))
    if name == "progress" and isinstance(value, int | float):
        return bar_html(float(value), f"{value:.0f} %")
    if isinstance(value, datetime):
        return escape(_clock(value))
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _worker_line(worker: Worker) -> str:
    cpu, mem = worker.resources.get("cpu"), worker.resources.get("mem_gb")
    facts = [f"{cpu:g} CPU" if isinstance(cpu, int | float) else ""]
    facts.append(f"{mem:g} GiB" if isinstance(mem, int | float) else "")
    facts.append(f"{len(worker.running)} running")
    if worker.last_seen_age_s is not None:
        facts.append(f"seen {worker.last_seen_age_s:.0f} s ago")
    return f"{_badge(worker.state)} {escape(', '.join(fact for fact in facts if fact))}"


def _times(view: TaskView) -> str:
    parts = [f"accepted {_clock(view.accepted_at)}"] if view.accepted_at else []
    if view.started_at:
        parts.append(f"started {_clock(view.started_at)}")
    if view.finished_at:
        parts.append(f"ended {_clock(view.finished_at)}")
    if view.duration_ms is not None:
        parts.append(f"took {view.duration_ms:.0f} ms")
    return ", ".join(parts) or "not started"


def _clock(at: datetime) -> str:
    return at.strftime("%H:%M:%S UTC")


def _badge(word: str) -> str:
    colour = _COLOURS.get(word, "#616161")
    return f'<b style="color:{colour}">{escape(word)}</b>'


def _bar(percent: float, message: str, words: str | None = None) -> str:
    told = f"{percent:.0f} % {message}" if words is None else words
    return (
        '<span style="display:inline-block;width:160px;height:10px;background:#ddd;'
        'border-radius:5px;overflow:hidden;vertical-align:middle">'
        f'<span style="display:block;height:10px;width:{percent:.0f}%;background:#1565c0">'
        f"</span></span> {escape(told)}"
    )


def _link(href: str, text: str) -> str:
    if not href.startswith(("http://", "https://")):
        return escape(text)
    return f'<a href="{escape(href, quote=True)}" target="_blank">{escape(text)}</a>'


def _table(rows: list[tuple[str, str]]) -> str:
    """Rows of an escaped heading and ready HTML."""
    body = "".join(
        f'<tr><th style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{value}</td></tr>'
        for name, value in rows
    )
    return f"<table>{body}</table>"

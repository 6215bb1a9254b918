"""HTML for notebooks. Pure: values in, a string out, everything that is not ours escaped.

Bars and colours are inline styles, because a saved notebook keeps only what is in the cell.
"""

from __future__ import annotations

from datetime import datetime
from html import escape

from hcna_ray.client.models import TaskView, Worker, explain
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


def _bar(percent: float, message: str) -> str:
    return (
        '<span style="display:inline-block;width:160px;height:10px;background:#ddd;'
        'border-radius:5px;overflow:hidden;vertical-align:middle">'
        f'<span style="display:block;height:10px;width:{percent:.0f}%;background:#1565c0">'
        f"</span></span> {percent:.0f} % {escape(message)}"
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

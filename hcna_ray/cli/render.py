"""Values as tables and lines for people. Pure: a value in, something Rich can print out."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich import markup
from rich.table import Table

from hcna_ray.cli.terminal import clock, tame
from hcna_ray.client import Explanation, TaskView, Worker
from hcna_ray.core.placement import age_in_words

#: The colour of a status, and of a worker's state.
STYLES = {
    "completed": "green",
    "healthy": "green",
    "online": "green",
    "up": "green",
    "running": "blue",
    "failed": "red",
    "unhealthy": "red",
    "gone": "red",
    "down": "red",
    "trouble": "red",
    "suspect": "yellow",
    "asleep": "yellow",
    "degraded": "yellow",
    "draining": "yellow",
    "cordoned": "yellow",
    "expired": "yellow",
    "cancelled": "yellow",
}


def escape(text: str) -> str:
    """Text of others as it may be printed: neither markup nor commands to the terminal."""
    return markup.escape(tame(text))


def word(status: str) -> str:
    """A status in its colour."""
    style = STYLES.get(status)
    return f"[{style}]{escape(status)}[/{style}]" if style else escape(status)


def duration(ms: float | None) -> str:
    """Milliseconds for people: ``42 ms``, ``1.25 s``."""
    if ms is None:
        return ""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def megabytes(size: float) -> str:
    """Bytes for people, in 10^6."""
    return f"{size / 1e6:.1f} MB"


def task_lines(view: TaskView) -> Table:
    """One task, a fact a line."""
    table = _facts()
    table.add_row("task", escape(view.task_id))
    table.add_row("type", escape(view.task_type))
    table.add_row("status", word(view.status))
    table.add_row("queue", f"{escape(view.queue)}, priority {view.priority}")
    table.add_row("worker", escape(view.worker or "none yet"))
    table.add_row("accepted", clock(view.accepted_at))
    if view.started_at:
        table.add_row("started", clock(view.started_at))
    if view.finished_at:
        took = f" (ran {duration(view.duration_ms)})" if view.duration_ms is not None else ""
        table.add_row("ended", clock(view.finished_at) + took)
    if view.progress and not view.ended:
        told = f"{view.progress.percent:.0f} % {view.progress.message}"
        table.add_row("progress", escape(told))
    if view.pending_reason:
        table.add_row("waits", escape(view.pending_reason.message))
        table.add_row("fix", escape(view.pending_reason.fix))
    for item in view.attempts:
        where = item.worker or item.node_id or "?"
        told = f"{item.outcome or 'running'} on {where}"
        reason = item.error.get("message") if item.error else None
        told += f": {reason}" if reason else ""
        table.add_row(f"attempt {item.attempt}", escape(told))
    if view.error:
        table.add_row("error", escape(f"{view.error.kind}: {view.error.message}"))
    if view.result is not None:
        table.add_row("result", escape(json.dumps(view.result, ensure_ascii=False)))
    return table


def task_table(views: Iterable[TaskView]) -> Table:
    """Several tasks, one a row."""
    table = _columns("task", "type", "status", "worker", "accepted", "ran")
    for view in views:
        table.add_row(
            escape(view.task_id),
            escape(view.task_type),
            word(view.status),
            escape(view.worker or ""),
            clock(view.accepted_at),
            duration(view.duration_ms),
        )
    return table


def worker_table(workers: Iterable[Worker]) -> Table:
    """Workers, one a row."""
    table = _columns("worker", "state", "seen", "cpu", "mem GB", "gpu", "running", "node")
    for worker in workers:
        age = worker.last_seen_age_s
        table.add_row(
            escape(worker.name),
            word("trouble" if worker.trouble and worker.state == "online" else worker.state),
            "never" if age is None else f"{age_in_words(age)} ago",
            *(_amounts(worker, name) for name in ("cpu", "mem_gb", "gpu")),
            str(len(worker.running)),
            escape(worker.node_id),
        )
    return table


def worker_lines(worker: Worker) -> Table:
    """One worker, a fact a line."""
    table = _facts()
    table.add_row("worker", escape(worker.name))
    table.add_row("node", escape(worker.node_id))
    table.add_row("state", word(worker.state))
    if worker.trouble:
        table.add_row("trouble", escape(f"it {worker.trouble}"))
    age = worker.last_seen_age_s
    ago = "" if age is None else f" ({age_in_words(age)} ago)"
    table.add_row("last seen", (clock(worker.last_seen_at) or "never") + ago)
    if worker.address:
        table.add_row("address", escape(worker.address))
    for name in worker.resources:
        table.add_row(escape(name), f"{_amounts(worker, name)} free / all")
    for name, value in worker.labels.items():
        table.add_row("label", escape(f"{name}={value}"))
    table.add_row("types", escape(", ".join(worker.task_types)))
    table.add_row("slots", str(worker.slots))
    for run in worker.running:
        told = f"{run.get('task_type')} {run.get('task_id')} attempt {run.get('attempt')}"
        table.add_row("running", escape(told))
    return table


def explanation(told: Explanation) -> Table:
    """Where a task stands: what ``hcna why`` prints."""
    table = _facts()
    table.add_row("task", escape(told.task_id))
    table.add_row("status", word(told.status))
    table.add_row("why", escape(told.message))
    if told.fix:
        table.add_row("fix", escape(told.fix))
    for line in told.history:
        table.add_row("", escape(line))
    return table


def _amounts(worker: Worker, name: str) -> str:
    whole, free = worker.resources.get(name), worker.free.get(name)
    if whole is None:
        return "-"
    return _number(whole) if free is None else f"{_number(free)}/{_number(whole)}"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else escape(str(value))


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _columns(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True, overflow="ignore" if name == "task" else "ellipsis")
    return table

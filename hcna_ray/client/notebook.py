"""For those who look rather than read: a bar, a live table of tasks, and rows for a data frame.

    from hcna_ray.client.notebook import table, track, watch

    for result in track(client.map("echo", payloads), total=100): ...
    watch(client.submit_many(requests))
    table(client.tasks(limit=50)).frame()

In a notebook they draw HTML into the cell, in a terminal one line on stderr, elsewhere nothing.
IPython and pandas are imported when they are needed, not before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from hcna_ray.client.errors import WaitTimeout
from hcna_ray.client.handles import TaskHandle
from hcna_ray.client.html import bar_html, rows_html
from hcna_ray.client.models import ENDED_STATUSES, TaskView, Worker, explain

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
Row = dict[str, Any]

#: A picture is drawn again after this time, seconds; the last one always is.
DRAW_S = 0.1
#: Time between two looks at the tasks that `watch` shows, seconds.
LOOK_S = 0.25
#: Most tasks that `watch` shows: each is asked for by itself.
WATCHED_MAX = 200


@dataclass(frozen=True, slots=True)
class Picture:
    """One thing to look at, in both forms."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


class Canvas(Protocol):
    """A place where the same picture is drawn again and again."""

    def draw(self, picture: Picture) -> None:
        """Replace what was drawn before."""

    def close(self) -> None:
        """Leave the last picture where it is."""


# -- a bar -----------------------------------------------------------------------------------------


def track(
    items: Iterable[T],
    total: int | None = None,
    label: str = "",
    *,
    canvas: Canvas | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Yield the items, and show how many have come and how fast.

    Args:
        items: Anything to iterate over, such as `Client.map` or `Client.as_completed`.
        total: How many there will be; by default what ``len`` says, if it says anything.
        label: A word before the bar.
        canvas: Where to draw; by default the cell or the terminal this runs in.
        clock: Monotonic seconds.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    place = canvas or find_canvas()
    started, drawn, done = clock(), -DRAW_S, 0
    try:
        for item in items:
            done += 1
            now = clock()
            if now - drawn >= DRAW_S:
                place.draw(_bar(label, done, total, now - started))
                drawn = now
            yield item
    finally:
        place.draw(_bar(label, done, total, clock() - started))
        place.close()


def _bar(label: str, done: int, total: int | None, took_s: float) -> Picture:
    rate = f", {done / took_s:.1f} a second" if took_s > 0 else ""
    counted = f"{done} of {total}{rate}" if total is not None else f"{done}{rate}"
    percent = 100.0 * done / total if total else 100.0
    words = f"{label} {counted}".strip()
    return Picture(bar_html(percent, words), f"{percent:3.0f} % {words}" if total else words)


# -- a live table ----------------------------------------------------------------------------------


def watch(
    tasks: Iterable[TaskHandle],
    timeout_s: float | None = None,
    *,
    canvas: Canvas | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[TaskView]:
    """Show tasks, each with its bar and its worker, until all have ended.

    Args:
        tasks: At most `WATCHED_MAX` handles. More are for ``track(client.as_completed(...))``.
        timeout_s: Longest time to look.
        canvas: Where to draw; by default the cell or the terminal this runs in.
        clock: Monotonic seconds.
        sleep: Waits.

    Returns:
        The tasks as they ended, in the order given.

    Raises:
        WaitTimeout: ``timeout_s`` passed; the tasks go on.
    """
    handles = list(tasks)
    if len(handles) > WATCHED_MAX:
        raise ValueError(f"watch shows {WATCHED_MAX} tasks; track(client.as_completed(...)) more")
    place = canvas or find_canvas()
    end = None if timeout_s is None else clock() + timeout_s
    try:
        while True:
            for handle in handles:
                if not handle.ended:
                    handle.refresh()
            views = [handle.view for handle in handles]
            place.draw(Picture(rows_html([_watched(view) for view in views]), _count(views)))
            going = tuple(view.task_id for view in views if not view.ended)
            if not going:
                return views
            if end is not None and clock() >= end:
                raise WaitTimeout(going, cast(float, timeout_s))
            sleep(LOOK_S)
    finally:
        place.close()


def _watched(view: TaskView) -> Row:
    percent = 0.0 if view.progress is None else view.progress.percent
    return {
        "task": view.task_id,
        "type": view.task_type,
        "status": view.status,
        "progress": 100.0 if view.status == "completed" else percent,
        "worker": view.worker or "",
        "attempts": len(view.attempts),
        "says": explain(view).message,
    }


def _count(views: Sequence[TaskView]) -> str:
    statuses = [view.status for view in views]
    told = ", ".join(f"{statuses.count(one)} {one}" for one in sorted(set(statuses)))
    return f"{len(views)} tasks: {told}" if views else "no tasks"


# -- rows ------------------------------------------------------------------------------------------


class Table(Sequence[Row]):
    """Flat rows: a cell shows them, `frame` hands them to pandas."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __repr__(self) -> str:
        return f"<Table of {len(self)} rows>"

    def _repr_html_(self) -> str:
        return rows_html(self._rows)

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas data frame. Instants are aware UTC."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a data frame needs pandas: pip install pandas") from error
        return pandas.DataFrame(self._rows)


def table(values: Iterable[TaskHandle | TaskView | Worker]) -> Table:
    """Make a row of each task or worker."""
    return Table(_row(value) for value in values)


def _row(value: TaskHandle | TaskView | Worker) -> Row:
    if isinstance(value, Worker):
        return {
            "worker": value.name,
            "state": value.state,
            "seen_s": value.last_seen_age_s,
            "cpu": value.resources.get("cpu"),
            "cpu_free": value.free.get("cpu"),
            "mem_gb": value.resources.get("mem_gb"),
            "mem_gb_free": value.free.get("mem_gb"),
            "running": len(value.running),
            "address": value.address,
            "trouble": value.trouble or "",
        }
    view = value.view if isinstance(value, TaskHandle) else value
    return {
        "task": view.task_id,
        "type": view.task_type,
        "status": view.status,
        "queue": view.queue,
        "worker": view.worker or "",
        "attempts": len(view.attempts),
        "failures": view.failures,
        "losses": view.losses,
        "accepted_at": view.accepted_at,
        "started_at": view.started_at,
        "finished_at": view.finished_at,
        "ran_ms": view.duration_ms if view.status in ENDED_STATUSES else None,
        "says": explain(view).message,
    }


# -- where to draw ---------------------------------------------------------------------------------


def find_canvas() -> Canvas:
    """The cell of a notebook, a line of a terminal, or nowhere."""
    if "IPython" in sys.modules:
        from IPython import get_ipython

        if getattr(get_ipython(), "kernel", None) is not None:
            return _Cell()
    return _Line() if sys.stderr.isatty() else _Nowhere()


class _Cell:
    """The output of a notebook cell."""

    def __init__(self) -> None:
        self._shown: Any = None

    def draw(self, picture: Picture) -> None:
        from IPython.display import display

        if self._shown is None:
            self._shown = display(picture, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(picture)

    def close(self) -> None:
        pass


class _Line:
    """The last line of a terminal."""

    def draw(self, picture: Picture) -> None:
        sys.stderr.write(f"\r{picture.text}\x1b[K")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")


class _Nowhere:
    def draw(self, picture: Picture) -> None:
        pass

    def close(self) -> None:
        pass

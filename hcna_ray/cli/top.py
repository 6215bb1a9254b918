"""``hcna top``: machines, queues, tasks and rates, live in a terminal.

    Looker    a thread that asks C1 again and again and leaves the newest `Reading`
    Wanted    what the person at the keyboard chose: which list, how far down, how often
    frame     both as lines of a screen of any size: pure
    Terminal  the raw side of a terminal: single keys, the other screen, and everything put back

It draws whole frames and nothing between them, so it is quiet enough for a slow line; it needs 80
columns and 24 rows and uses what is there beyond. ``NO_COLOR`` is honoured.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import FrameType
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Console, Group
from rich.text import Text

from hcna_ray.cli.render import STYLES
from hcna_ray.cli.terminal import AsJson, Json, open_client, paper, print_json, tame
from hcna_ray.client import ApiError, Client, ClusterStatus, HcnaClientError, TaskView, Worker
from hcna_ray.client.models import explain
from hcna_ray.core.placement import age_in_words

#: Most tasks that are asked for at once: more than any screen shows.
TASKS_MAX = 100
#: A rate of less time than this, in seconds, would jump about.
RATED_S = 0.15
#: Bounds of the pause between two looks, seconds.
PAUSE_MIN_S, PAUSE_MAX_S = 0.2, 60.0
#: The lists that Tab goes through: title, statuses asked for, what an empty one says.
LISTS = (
    ("RUNNING", "running", "nothing runs"),
    ("WAITING", "queued", "nothing waits"),
    ("FAILED", "failed", "nothing has failed"),
)
HELP = (
    "q, Ctrl-C    leave",
    "Tab, l       next list: running, waiting (and why), failed (and how)",
    "arrows, j k  one task down or up; PgUp, PgDn a page",
    "space, p     hold the picture; again: go on",
    "r            look now",
    "+  -         look more often, less often",
    "h, ?         this help; any key closes it",
    "",
    "hcna why ID says more of one task. hcna top --once prints one picture.",
)


# -- what is looked at -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What C1 said, and when; ``trouble`` if it did not, then the rest is as last known.

    ``short`` is the trouble in a word.
    """

    at: float = 0.0
    status: ClusterStatus | None = None
    tasks: tuple[TaskView, ...] = ()
    #: Which of `LISTS` ``tasks`` is.
    shown: int = 0
    #: Per second since `counted`; by word of `ClusterStatus.totals`.
    rates: Mapping[str, float] = field(default_factory=dict)
    #: An earlier instant and its totals, to which later ones are compared.
    counted: tuple[float, Mapping[str, int]] | None = None
    trouble: str = ""
    short: str = ""


def look(client: Client, before: Reading, shown: int, now: float) -> Reading:
    """Ask C1 for everything on the screen.

    Args:
        client: One that does not try for long.
        before: The reading before this one, for rates and for what is last known.
        shown: Which of `LISTS`.
        now: Monotonic seconds.
    """
    try:
        status = client.status()
        tasks = tuple(client.tasks(status=LISTS[shown][1], limit=TASKS_MAX))
    except HcnaClientError as error:
        short = error.code if isinstance(error, ApiError) else "unreachable"
        return replace(before, trouble=str(error), short=short)
    rates, counted = before.rates, before.counted
    if status.totals is not None:
        if counted is None:
            counted = now, status.totals
        elif (took := now - counted[0]) >= RATED_S:
            old = counted[1]
            rates = {
                name: max(0, count - old.get(name, count)) / took
                for name, count in status.totals.items()
            }
            counted = now, status.totals
    return Reading(at=now, status=status, tasks=tasks, shown=shown, rates=rates, counted=counted)


@dataclass(slots=True)
class Wanted:
    """What the keys have chosen."""

    shown: int = 0
    first: int = 0
    pause_s: float = 1.0
    held: bool = False
    helping: bool = False
    leaving: bool = False
    hurry: bool = False


def press(wanted: Wanted, key: str, page: int) -> None:
    """Change what is wanted as a key says; a key that means nothing changes nothing.

    Args:
        wanted: Changed in place.
        key: A character, or the name of a key.
        page: Rows of a page.
    """
    if wanted.helping:
        wanted.helping = False
        if key not in ("q", "\x03", "\x04"):
            return
    match key:
        case "q" | "\x03" | "\x04":
            wanted.leaving = True
        case "h" | "?":
            wanted.helping = True
        case "\t" | "l":
            wanted.shown, wanted.first = (wanted.shown + 1) % len(LISTS), 0
            wanted.hurry = True
        case "down" | "j":
            wanted.first += 1
        case "up" | "k":
            wanted.first = max(0, wanted.first - 1)
        case "pagedown":
            wanted.first += page
        case "pageup":
            wanted.first = max(0, wanted.first - page)
        case " " | "p":
            wanted.held = not wanted.held
        case "r":
            wanted.hurry = True
        case "+":
            wanted.pause_s = max(PAUSE_MIN_S, wanted.pause_s / 2)
        case "-":
            wanted.pause_s = min(PAUSE_MAX_S, wanted.pause_s * 2)


_SEQUENCES = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "pageup",
    "\x1b[6~": "pagedown",
}


def keys_of(typed: str) -> Iterator[str]:
    """Yield the keys in what a terminal sent; sequences that are not known are left out."""
    while typed:
        if typed[0] != "\x1b":
            yield typed[0]
            typed = typed[1:]
            continue
        end = 1
        if typed[1:2] in ("[", "O"):
            end = 2
            while end < len(typed) and not typed[end].isalpha() and typed[end] != "~":
                end += 1
            end += 1
        if typed[:end] in _SEQUENCES:
            yield _SEQUENCES[typed[:end]]
        typed = typed[end:]


# -- the picture -----------------------------------------------------------------------------------


def frame(
    url: str, reading: Reading, wanted: Wanted, *, now: float, width: int, height: int
) -> list[Text]:
    """Return the picture: at most ``height`` lines of at most ``width`` columns.

    Args:
        url: C1's address.
        reading: What is known.
        wanted: What was chosen.
        now: Monotonic seconds, to say how old the reading is.
        width: Columns.
        height: Rows. Machines and queues get what they need up to a third each; tasks the rest.
    """
    foot = _foot(wanted)
    if wanted.helping:
        lines = [Text("hcna top", style="bold"), Text(), *(Text(line) for line in HELP)]
    elif reading.status is None:
        said = reading.trouble or "asking C1 ..."
        lines = [Text(f"hcna top  {url}", style="bold"), Text(), *_wrapped(said, width)]
    else:
        lines = _picture(url, reading, wanted, now, height - 1)
    body = lines[: height - 1]
    body += [Text()] * (height - 1 - len(body))
    return [_cut(line, width) for line in (*body, foot)]


def whole(url: str, reading: Reading, *, width: int) -> list[Text]:
    """Return one picture without a foot and without a bottom: for ``--once``."""
    if reading.status is None:
        return [Text(reading.trouble)]
    return [_cut(line, width) for line in _picture(url, reading, Wanted(), reading.at, None)]


def _picture(
    url: str, reading: Reading, wanted: Wanted, now: float, height: int | None
) -> list[Text]:
    assert reading.status is not None
    head = _head(url, reading, now)
    machines = _machines(reading.status.workers)
    queues = _queues(reading.status)
    if height is not None:
        room = height - len(head) - 3  # Three blank lines between the parts.
        machines = _few(machines, max(3, room // 3), "machines")
        queues = _few(queues, max(3, room // 3), "queues")
        room -= len(machines) + len(queues)
    tasks = _tasks(reading, wanted, None if height is None else room)
    return [*head, Text(), *machines, Text(), *queues, Text(), *tasks]


def _head(url: str, reading: Reading, now: float) -> list[Text]:
    status = reading.status
    assert status is not None
    first = Text.assemble(("hcna top", "bold"), f"  {url}  ")
    if reading.trouble:
        age = age_in_words(max(0.0, now - reading.at))
        first.append(f"{reading.short}, last known {age} ago", style="bold red")
    elif status.moderator_waits_for_store:
        first.append("M1 waits for its task store", style="bold red")
    elif status.moderator is None:
        first.append("M1 does not answer; tasks are kept", style="bold red")
    else:
        online = sum(worker.state == "online" for worker in status.workers)
        first.append(f"M1 answers, {online} of {len(status.workers)} workers online", style="green")
    second = Text("tasks  ")
    for name in ("scheduled", "queued", "running"):
        second.append(f"{name} {status.count(name)}   ")
    totals = status.totals or {}
    for name in ("completed", "failed", "cancelled", "expired"):
        if name in totals:
            second.append(f"{name} {totals[name]}   ")
    third = Text("a second  ")
    for name in ("accepted", "completed", "failed"):
        rate = reading.rates.get(name)
        third.append(f"{name} {'-' if rate is None else f'{rate:.1f}'}   ")
    if status.paused:
        third.append(f"paused: {', '.join(status.paused)}", style="yellow")
    return [first, second, third]


def _machines(workers: Sequence[Worker]) -> list[Text]:
    rows = [("MACHINE", "STATE", "SEEN", "CPU FREE", "MEM GB FREE", "RUNS", "LOAD", "TROUBLE")]
    for worker in sorted(workers, key=lambda one: one.name):
        age, load = worker.last_seen_age_s, worker.figures.get("load_1m")
        rows.append(
            (
                worker.name,
                worker.state,
                "never" if age is None else age_in_words(age),
                _amount(worker, "cpu"),
                _amount(worker, "mem_gb"),
                str(len(worker.running)),
                f"{load:.2f}" if isinstance(load, int | float) else "-",
                worker.trouble or "",
            )
        )
    if len(rows) == 1:
        return [*_columns(rows), Text("no worker has joined: hcna up here, hcna join there")]
    return _columns(rows)


def _amount(worker: Worker, name: str) -> str:
    free, have = worker.free.get(name), worker.resources.get(name)
    if not isinstance(have, int | float):
        return "-"
    return f"{free:.4g}/{have:.4g}" if isinstance(free, int | float) else f"{have:.4g}"


def _queues(status: ClusterStatus) -> list[Text]:
    names = ("scheduled", "queued", "running", "failed")
    rows = [("QUEUE", *(name.upper() for name in names), "")]
    for queue, states in sorted(status.queues.items(), key=lambda item: (_minus(item[1]), item[0])):
        held = "paused" if queue in status.paused else ""
        rows.append((queue, *(str(states.get(name, 0)) for name in names), held))
    if not status.store_readable:
        return [*_columns(rows), Text("C1 cannot read the task store", style="bold red")]
    if len(rows) == 1:
        return [*_columns(rows), Text("no queue holds a task")]
    return _columns(rows)


def _minus(states: Mapping[str, int]) -> int:
    """Sorts the fullest queue first."""
    return -sum(states.get(name, 0) for name in ("scheduled", "queued", "running"))


def _tasks(reading: Reading, wanted: Wanted, room: int | None) -> list[Text]:
    title, state, empty = LISTS[reading.shown]
    tasks = reading.tasks
    if state == "running":
        tasks = tuple(sorted(tasks, key=lambda task: task.started_at or _LATE))
        rows: list[tuple[str, ...]] = [(title, "TYPE", "WORKER", "FOR", "PROGRESS")]
        rows += [_running_row(task, reading) for task in tasks]
    else:
        when = "WAITS" if state == "queued" else "ENDED"
        rows = [(title, "TYPE", when, "WHY")]
        rows += [_other_row(task) for task in tasks]
    if not tasks:
        return [*_columns(rows), Text(empty)]
    lines = _columns(rows)
    if room is None:
        return lines
    page = max(1, room - 2)
    wanted.first = min(wanted.first, max(0, len(tasks) - page))
    end = wanted.first + page
    left = len(tasks) - end
    more = f"... {left}{'+' if len(tasks) == TASKS_MAX else ''} more" if left > 0 else ""
    return [lines[0], *lines[1 + wanted.first : 1 + end], Text(more, style="dim")]


_LATE = datetime.max.replace(tzinfo=UTC)


def _running_row(task: TaskView, reading: Reading) -> tuple[str, ...]:
    assert reading.status is not None
    worker = task.worker or next(
        (
            one.name
            for one in reading.status.workers
            for run in one.running
            if run.get("task_id") == task.task_id
        ),
        "",
    )
    told = "" if task.progress is None else f"{task.progress.percent:.0f} % {task.progress.message}"
    return task.task_id, task.task_type, worker, _since(task.started_at), told


def _other_row(task: TaskView) -> tuple[str, ...]:
    return (
        task.task_id,
        task.task_type,
        _since(task.finished_at or task.accepted_at),
        explain(task).message,
    )


def _since(at: datetime | None) -> str:
    if at is None:
        return ""
    return age_in_words(max(0.0, (datetime.now(UTC) - at).total_seconds()))


def _foot(wanted: Wanted) -> Text:
    held = "  held" if wanted.held else ""
    return Text(
        f"q leave  h help  Tab list  space hold  + - every {wanted.pause_s:g} s{held}",
        style="reverse",
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[Text]:
    """Lay rows out in columns; the first row is the heading."""
    clean = [[tame(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*clean, strict=True)]
    lines = []
    for number, row in enumerate(clean):
        line = Text(style="dim" if number == 0 else "")
        for cell, width in zip(row, widths, strict=True):
            style = STYLES.get(cell, "") if number else ""
            line.append(cell, style=style).append(" " * (width - cell_len(cell) + 2))
        line.rstrip()
        lines.append(line)
    return lines


def _few(lines: list[Text], most: int, what: str) -> list[Text]:
    """Keep the heading and what fits, and say how many do not."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], Text(f"... {len(lines) - most + 1} more {what}", style="dim")]


def _wrapped(text: str, width: int) -> list[Text]:
    return list(Text(text).wrap(Console(width=width), width))


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


# -- the loop --------------------------------------------------------------------------------------


class Looker:
    """Asks C1 in a thread, so that keys are answered while C1 is not."""

    def __init__(self, ask: Callable[[Reading, int], Reading], wake: Callable[[], None]) -> None:
        """Remember how to ask and whom to tell; nothing is asked yet.

        Args:
            ask: Makes a reading of the one before and the number of the list.
            wake: Called after each.
        """
        self._ask, self._wake = ask, wake
        self._now = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="hcna-top", daemon=True)
        self.reading = Reading()
        self.shown = 0
        self.pause_s = 1.0
        self.held = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def hurry(self) -> None:
        """Look now."""
        self._now.set()

    def end(self) -> None:
        """Begin to stop. A look that is under way ends with the process."""
        self._ended = True
        self._now.set()

    def _run(self) -> None:
        while not self._ended:
            hurried = self._now.is_set()
            self._now.clear()
            if hurried or not self.held:
                self.reading = self._ask(self.reading, self.shown)
                self._wake()
            self._now.wait(self.pause_s)


@contextmanager
def _single_keys(descriptor: int) -> Iterator[None]:
    """Have keys come one by one and unseen; Ctrl-Z must not leave the other screen behind."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        now = termios.tcgetattr(descriptor)
        now[3] &= ~termios.ISIG
        termios.tcsetattr(descriptor, termios.TCSADRAIN, now)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def _wakes(signals: Iterable[signal.Signals], wake: Callable[[], None]) -> Iterator[list[int]]:
    """Collect signals instead of dying of them; ``wake`` is called for each."""
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)
        wake()

    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _live(client: Client, console: Console, wanted: Wanted) -> None:
    keyboard = sys.stdin.fileno()
    woken, waker = os.pipe()
    os.set_blocking(waker, False)

    def wake() -> None:
        try:
            os.write(waker, b"!")
        except (BlockingIOError, BrokenPipeError):
            pass  # It is full of wake-ups already, or nobody waits any more.

    looker = Looker(lambda before, shown: look(client, before, shown, time.monotonic()), wake)
    leave = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    try:
        with (
            _single_keys(keyboard),
            _wakes((signal.SIGWINCH, *leave), wake) as signals,
            console.screen(hide_cursor=True) as screen,
        ):
            looker.start()
            while not wanted.leaving:
                looker.shown, looker.pause_s, looker.held = (
                    wanted.shown,
                    wanted.pause_s,
                    wanted.held,
                )
                if wanted.hurry:
                    wanted.hurry = False
                    looker.hurry()
                width, height = os.get_terminal_size(sys.stdout.fileno())
                lines = frame(
                    client.url,
                    looker.reading,
                    wanted,
                    now=time.monotonic(),
                    width=width,
                    height=height,
                )
                console.size = (width, height)
                screen.update(Group(*lines))
                ready, _, _ = select.select([keyboard, woken], [], [], wanted.pause_s)
                if woken in ready:
                    os.read(woken, 4096)
                if keyboard in ready:
                    typed = os.read(keyboard, 1024)
                    for key in keys_of(typed.decode("utf-8", "replace")) if typed else ["q"]:
                        press(wanted, key, page=height // 3)
                wanted.leaving |= any(number in leave for number in signals)
    finally:
        looker.end()
        os.close(woken)
        # The thread may still wake: its end stays open until the process ends.


# -- the command -----------------------------------------------------------------------------------


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(top)


def top(
    interval: Annotated[
        float,
        typer.Option(min=PAUSE_MIN_S, max=PAUSE_MAX_S, help="Seconds between two looks."),
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture of two looks, and leave.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show machines, queues, tasks and rates, live; h shows the keys.

    Where output is no terminal it prints one picture, as with --once.
    """
    live = sys.stdin.isatty() and sys.stdout.isatty() and not once and not as_json
    with open_client(retry_for_s=0) as client:
        if live:
            _live(client, Console(highlight=False), Wanted(pause_s=interval))
            return
        first = look(client, Reading(), 0, time.monotonic())
        if first.status is None:
            client.status()  # Raises what `look` has caught.
        time.sleep(interval)
        reading = look(client, first, 0, time.monotonic())
    if as_json:
        print_json(_as_json(reading))
        return
    out = paper()
    for line in whole(client.url, reading, width=out.width):
        out.print(line, soft_wrap=True)


def _as_json(reading: Reading) -> Json:
    assert reading.status is not None
    return {
        "status": reading.status.raw,
        "rates": {name: round(rate, 3) for name, rate in reading.rates.items()},
        "running": [task.raw for task in reading.tasks],
    }

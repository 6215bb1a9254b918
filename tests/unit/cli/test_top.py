"""`hcna top`: the picture as a function, then the whole on a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pyte
import pytest

from hcna_ray.cli.top import Reading, Wanted, frame, keys_of, look, press
from hcna_ray.client import Client, ClusterStatus, TaskView
from tests.support.fake_c1 import API_KEY, NOW, FakeC1
from tests.unit.cli.conftest import Hcna

URL = "http://c1.test"
HCNA = (sys.executable, "-c", "from hcna_ray.cli.main import run; run()")


def status(workers: int = 1, queues: int = 1, **more: Any) -> ClusterStatus:
    view = FakeC1().worker()
    return ClusterStatus.from_json(
        {
            "moderator": {"live_attempts": 1},
            "workers": [{**view, "name": f"W{number}"} for number in range(1, workers + 1)],
            "queues": {f"q{number}": {"queued": number} for number in range(1, queues + 1)},
            "totals": {"accepted": 10, "completed": 7, "failed": 1},
            **more,
        }
    )


def task(number: int, **more: Any) -> TaskView:
    return TaskView.from_json(
        {
            "task_id": f"task-{number:026d}",
            "task_type": "sleep",
            "status": "running",
            "started_at": NOW,
            "progress": {"percent": 40, "message": "slept 4 of 10 s", "at": NOW},
            **more,
        }
    )


def lines(reading: Reading, wanted: Wanted | None = None, width: int = 80, height: int = 24) -> str:
    drawn = frame(URL, reading, wanted or Wanted(), now=12.0, width=width, height=height)
    assert len(drawn) == height
    assert all(line.cell_len <= width for line in drawn)
    return "\n".join(line.plain for line in drawn)


# -- the picture -----------------------------------------------------------------------------------


def test_everything_is_in_eighty_columns_and_twenty_four_rows() -> None:
    tasks = tuple(task(number) for number in range(60))
    shown = lines(Reading(status=status(workers=30, queues=30), tasks=tasks))

    assert "M1 answers, 30 of 30 workers online" in shown
    assert "more machines" in shown
    assert "more queues" in shown
    assert "task-00000000000000000000000000" in shown
    assert "40 % slept 4 of" in shown
    assert re.search(r"\.\.\. \d+ more$", shown, re.MULTILINE)
    assert "q leave" in shown


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 12), (20, 5), (10, 2)])
def test_it_fits_any_screen(width: int, height: int) -> None:
    reading = Reading(status=status(workers=9, queues=9), tasks=tuple(map(task, range(9))))
    for shown in range(3):
        lines(reading, Wanted(shown=shown), width, height)
    lines(reading, Wanted(helping=True), width, height)
    lines(Reading(trouble="cannot reach C1. " * 9), None, width, height)


def test_the_fullest_queue_comes_first() -> None:
    shown = lines(Reading(status=status(queues=3)))
    assert shown.index("q3") < shown.index("q1")


def test_what_is_paused_away_or_in_trouble_is_said() -> None:
    one = {**FakeC1().worker(), "state": "asleep", "last_seen_age_s": 190, "trouble": "disk full"}
    shown = lines(Reading(status=status(workers=0, moderator=None, paused=["q1"])))
    assert "M1 does not answer" in shown
    assert "no worker has joined" in shown
    assert "paused: q1" in shown
    shown = lines(Reading(status=ClusterStatus.from_json({"workers": [one]})))
    assert re.search(r"W1 +asleep +3 min .*disk full", shown)
    assert "no queue holds a task" in shown
    away = {"moderator": None, "moderator_waits_for_store": True, "store_readable": False}
    shown = lines(Reading(status=status(queues=0, **away)))
    assert "M1 waits for its task store" in shown
    assert "M1 does not answer" not in shown
    assert "C1 cannot read the task store" in shown
    assert "no queue holds a task" not in shown


def test_a_c1_that_is_away_leaves_what_was_last_known(c1: FakeC1) -> None:
    with Client(URL, API_KEY, transport=c1.transport(), retry_for_s=0) as client:
        first = look(client, Reading(), 0, now=2.0)
        c1.script.append(httpx.ConnectError("refused"))
        second = look(client, first, 0, now=3.0)
    assert "unreachable, last known 10 s ago" in lines(second)
    assert "W1" in lines(second)


def test_rates_are_differences_of_totals(c1: FakeC1) -> None:
    with Client(URL, API_KEY, transport=c1.transport(), retry_for_s=0) as client:
        reading = look(client, Reading(), 0, now=0.0)
        assert "accepted -" in lines(reading)
        for _ in range(6):
            client.submit("hold")
        reading = look(client, reading, 0, now=0.1)
        assert reading.rates == {}, "too soon to tell"
        reading = look(client, reading, 0, now=2.0)
    assert reading.rates["accepted"] == 3.0
    assert "accepted 3.0" in lines(reading)


def test_the_lists_say_why_and_how() -> None:
    reason = {"code": "no_room", "message": "waiting for room", "fix": "wait"}
    waiting = task(1, status="queued", pending_reason=reason, accepted_at=NOW)
    shown = lines(Reading(status=status(), tasks=(waiting,), shown=1))
    assert re.search(r"WAITING .*WHY", shown)
    assert "waiting for room" in shown
    failed = task(2, status="failed", error={"kind": "error", "message": "boom", "attempts": 3})
    assert "boom" in lines(Reading(status=status(), tasks=(failed,), shown=2))
    assert "nothing has failed" in lines(Reading(status=status(), shown=2))


def test_what_handlers_write_does_not_speak_to_the_terminal() -> None:
    evil = {"percent": 1, "message": "\x1b]0;owned\x07\x1b[2J\nnext 日本", "at": None}
    shown = lines(Reading(status=status(), tasks=(task(1, progress=evil),)), width=140)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "?[2J next 日本" in shown


def test_scrolling_stops_at_both_ends() -> None:
    reading = Reading(status=status(), tasks=tuple(map(task, range(30))))
    wanted = Wanted()
    press(wanted, "up", 8)
    assert wanted.first == 0
    for _ in range(9):
        press(wanted, "pagedown", 8)
    shown = lines(reading, wanted)
    assert "29  sleep" in shown
    assert "more" not in shown
    for key in ("pageup", "k", "j"):
        press(wanted, key, 8)
    assert "... " in lines(reading, wanted)


def test_keys() -> None:
    assert list(keys_of("q\x1b[A\x1b[6~\x1bOB\x1b[1;5Cj\x1b")) == [
        *("q", "up", "pagedown", "down", "j")
    ]
    wanted = Wanted(pause_s=1.0)
    for key, name, value in (
        *(("+", "pause_s", 0.5), ("-", "pause_s", 1.0), ("p", "held", True)),
        *((" ", "held", False), ("\t", "shown", 1), ("r", "hurry", True), ("h", "helping", True)),
        *(("l", "helping", False), ("z", "leaving", False), ("\x03", "leaving", True)),
    ):
        press(wanted, key, 8)
        assert getattr(wanted, name) == value, key
    for _ in range(20):
        press(wanted, "+", 8)
    assert wanted.pause_s == 0.2


# -- for scripts -----------------------------------------------------------------------------------


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run it as a script does: two looks take time, and no test of this process may sleep."""
    return subprocess.run(
        [*HCNA, "top", "--interval", "0.2", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_once_prints_one_picture(hcna: Hcna) -> None:
    hcna("submit", "hold")
    ran = run("--once")
    assert ran.returncode == 0, ran.stderr
    assert "M1 answers" in ran.stdout
    assert "accepted 0.0" in ran.stdout
    assert "\x1b" not in ran.stdout
    assert "q leave" not in ran.stdout


@pytest.mark.usefixtures("url")
def test_once_in_json() -> None:
    told = json.loads(run("--json").stdout)
    assert told["status"]["workers"][0]["name"] == "W1"
    assert told["rates"]["accepted"] == 0
    assert told["running"] == []


def test_once_without_c1_is_an_error(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNA_URL", "http://127.0.0.1:9")
    ran = hcna("top", "--once")
    assert ran.code == 3
    assert "hcna up" in ran.err


# -- on a terminal ---------------------------------------------------------------------------------


class Session:
    """``hcna top`` on a pseudo-terminal, and what stands on its screen."""

    def __init__(self, rows: int = 24, columns: int = 80, **env: str) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._master, self._slave = pty.openpty()
        self._size(rows, columns)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [*HCNA, "top"],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", **env},
        )

    def _size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, rows: int, columns: int) -> None:
        self._screen.resize(rows, columns)
        self._size(rows, columns)
        os.kill(self.process.pid, 28)  # The kernel tells a terminal's own session; this is none.

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    @property
    def shown(self) -> str:
        return "\n".join(self._screen.display)

    def until(self, good: Callable[[str], object], what: str, seconds: float = 200) -> str:
        """Read until the screen is as it should be."""
        end = time.monotonic() + seconds
        while not good(self.shown):
            left = end - time.monotonic()
            assert left > 0, f"{what}; shown:\n{self.shown}"
            self._read(left)
        return self.shown

    def _read(self, seconds: float) -> None:
        ready, _, _ = select.select([self._master], [], [], seconds)
        if ready:
            piece = os.read(self._master, 65536)
            self.raw += piece
            self._stream.feed(piece)

    def ends(self) -> int:
        """Wait for the end, and read what was left."""
        code = self.process.wait(100)
        while select.select([self._master], [], [], 0)[0]:
            self._read(0)
        return code

    def attributes(self) -> Any:
        return termios.tcgetattr(self._slave)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(100)
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def sessions(url: str) -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def start(**given: Any) -> Session:
        opened.append(Session(**given))
        return opened[-1]

    yield start
    for session in opened:
        session.close()


def test_a_person_looks_asks_for_help_and_leaves(
    sessions: Callable[..., Session], c1: FakeC1, url: str
) -> None:
    with Client(url, API_KEY) as client:
        held = client.submit("hold").id
    c1.tasks[held].update(status="running", started_at=NOW)
    session = sessions()

    session.until(lambda shown: held in shown, "the running task")
    assert "M1 answers, 1 of 1 workers online" in session.shown
    assert "0.25" in session.shown, "the load of W1"
    session.type("h")
    session.until(lambda shown: "any key closes it" in shown, "the help")
    session.type("x")
    session.until(lambda shown: held in shown, "the picture again")
    session.type("\t")
    session.until(lambda shown: "nothing waits" in shown, "the list of what waits")
    session.type(" ")
    session.until(lambda shown: "held" in shown.splitlines()[-1], "the picture is held")
    session.type("q")

    assert session.ends() == 0
    assert b"\x1b[?1049h" in session.raw
    assert session.raw.rstrip().endswith((b"\x1b[?1049l", b"\x1b[?25h"))
    assert session.attributes() == session.before


def test_it_follows_the_size_of_the_terminal(sessions: Callable[..., Session]) -> None:
    session = sessions()
    session.until(lambda shown: "q leave" in shown.splitlines()[23], "24 rows are used")
    session.resize(40, 120)
    session.until(lambda shown: "q leave" in shown.splitlines()[39], "40 rows are used")
    session.type("\x03")
    assert session.ends() == 0


def test_without_colour_there_is_none(sessions: Callable[..., Session]) -> None:
    coloured, plain = sessions(), sessions(NO_COLOR="1")
    for session in (coloured, plain):
        session.until(lambda shown: "online" in shown and "W1" in shown, "the worker")
        session.type("q")
        assert session.ends() == 0
    colours = re.compile(rb"\x1b\[[\d;]*\b(3[0-7]|4[0-7]|9[0-7]|38;5;\d+)m")
    assert colours.search(coloured.raw)
    assert not colours.search(plain.raw)


def test_it_says_so_when_c1_goes_away_and_ends_when_told(
    c1: FakeC1, monkeypatch: pytest.MonkeyPatch, sessions: Callable[..., Session]
) -> None:
    with c1.serve() as served:
        monkeypatch.setenv("HCNA_URL", served)
        session = sessions()
        session.until(lambda shown: "W1" in shown, "the worker")
    session.until(lambda shown: "unreachable, last known" in shown, "C1 is away")
    assert "W1" in session.shown
    session.process.terminate()
    assert session.ends() == 0
    assert session.attributes() == session.before

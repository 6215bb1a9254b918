"""Pictures of what a terminal shows, for the documentation: ``make captures`` (as root).

Three hosts of their own (`tests.support.rig`) are one computer with something to do; a tmux on M1
types what a person would, and its screen becomes an SVG in ``docs/images``. Takes some minutes.
"""

from __future__ import annotations

import io
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.rig.computer import Computer, eventually
from tests.support.rig import Host, Rig, RigUnavailable

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
WIDTH = 100
_TMUX = ("tmux", "-L", "captures", "-f", "/dev/null")
#: Rich names fonts of the web in what it exports; a picture of ours fetches nothing.
_WEB_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
#: The prompt again, behind all else.
_DONE = r"\n\$\s*$"


def svg(screen: str, title: str, *, width: int = WIDTH) -> str:
    """Return a picture of a screen.

    Args:
        screen: Its lines, with colours as terminals are told them (SGR).
        title: What stands above it.
        width: Its columns.
    """
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for line in screen.rstrip().splitlines():
        console.print(Text.from_ansi(line), no_wrap=True, overflow="crop", crop=True)
    drawn = _WEB_FONT.sub("", console.export_svg(title=title))
    return "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"


class Screen:
    """A terminal on a host, in which somebody types."""

    def __init__(self, host: Host, *, rows: int) -> None:
        self._host = host
        shell = "env PATH=$HOME/hcna-ray/.venv/bin:$PATH PS1='$ ' bash --norc --noprofile"
        self._tmux("new-session", "-d", "-x", str(WIDTH), "-y", str(rows), shell)
        self._tmux("set", "-g", "status", "off")
        self.until(r"\$")

    def _tmux(self, *words: str) -> str:
        return self._host.run(*_TMUX, *words, env={"TERM": "screen-256color"}).out

    def types(self, line: str) -> None:
        """Type a line and Enter."""
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def until(self, shown: str, timeout_s: float = 60) -> None:
        """Wait until the screen shows what fits a pattern."""
        look, end = re.compile(shown, re.DOTALL), time.monotonic() + timeout_s
        while not look.search(seen := self._tmux("capture-pane", "-p")):
            assert time.monotonic() < end, f"no {shown!r} within {timeout_s:g} s in:\n{seen}"
            time.sleep(0.25)

    def save(self, name: str, title: str) -> None:
        """Draw what it shows to ``docs/images/terminal-NAME.svg``."""
        path = IMAGES / f"terminal-{name}.svg"
        path.write_text(svg(self._tmux("capture-pane", "-p", "-e"), title))
        say(f"{path.name}\n{self._tmux('capture-pane', '-p').rstrip()}")

    def close(self) -> None:
        """End it and what runs in it."""
        self._tmux("kill-server")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def captured(host: Host, name: str, lines: Sequence[tuple[str, str]], *, rows: int) -> None:
    """Type lines, each until the screen shows what fits its pattern, and keep the picture."""
    screen = Screen(host, rows=rows)
    try:
        for line, shown in lines:
            screen.types(line)
            screen.until(shown)
        screen.save(name, lines[-1][0].split(" task-")[0])
    finally:
        screen.close()


def take(rig: Rig) -> None:
    """Start a computer on the hosts, have it work and lose W1, and take all pictures."""
    computer = Computer(rig)
    m1, w1 = rig["m1"], rig["w1"]
    computer.join("w1", code=computer.code_in(computer.hcna("m1", "up").out))
    computer.join("w2")
    for worker in ("W1", "W2"):
        computer.works(worker, 90)
    for n in range(40):
        computer.completed(computer.submit("echo", {"n": n}))
    lacking = computer.submit("echo", {}, requires={"gpu": 9})
    naps = [computer.submit("sleep", {"seconds": 25}, queue="lab") for _ in range(24)]
    eventually(lambda: computer.task(naps[1])["status"] == "running", 30, "they run")
    captured(m1, "top", [("hcna top", r"accepted \d.*W2.*QUEUE.*RUNNING.*sleep")], rows=26)

    eventually(lambda: _on_w1(computer, naps), 60, "one runs on W1")
    victim = _on_w1(computer, naps)[-1]
    w1.unplug()
    computer.until_state("W1", "asleep", 120)
    pinned = computer.submit("echo", {}, requires={"worker": "W1"})
    captured(
        m1,
        "why",
        [
            (f"hcna why {lacking}", f"gpu.*{_DONE}"),
            (f"hcna why {pinned}", f"gpu.*W1.*asleep.*{_DONE}"),
        ],
        rows=20,
    )
    computer.completed(victim, 300)
    captured(
        m1,
        "events",
        [(f"hcna events {victim}", f"lost.*completed.*{_DONE}")],
        rows=20,
    )
    computer.hcna("m1", "down")


def _on_w1(computer: Computer, ids: Sequence[str]) -> list[str]:
    """Return those of the tasks that run on W1 now."""
    found = [computer.task(one) for one in ids]
    return [
        str(one["task_id"])
        for one in found
        if one["status"] == "running" and one["attempts"][-1]["worker"] == "W1"
    ]


def main() -> int:
    # As with Ctrl-C: the hosts go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="captures-") as base:
        try:
            rig = Rig.up(("m1", "w1", "w2"), base=Path(base).resolve())
        except RigUnavailable as error:
            say(f"{error}. Next: sudo make captures")
            return 1
        with rig:
            take(rig)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The commands of a page of the documentation, typed on the hosts that it names.

A block's info string says where it runs (``on=m1``, or ``on=m1,w1``), and how its last command
ends if not well (``exit=1``). The shell of a host goes on from block to block. In what is typed,
``CODE`` is the join code and ``ID`` the task that was named last.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.rig.computer import CODE, Computer
from tests.support.rig import Done

_BLOCK = re.compile(
    r"^```(?P<language>bash|python)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_TASK = re.compile(r"\btask-[0-9a-z]{26}\b")
#: What was typed before is in force: directory, PATH, variables.
_SETTLES = re.compile(r"(cd|eval|export)\b")


@dataclass(frozen=True)
class Block:
    """A block of commands, or of Python, and where it is meant to be typed."""

    hosts: tuple[str, ...]
    text: str
    line: int
    language: str = "bash"
    #: Exit code of its last command.
    code: int = 0

    @property
    def commands(self) -> int:
        """How many lines begin a command."""
        return len([one for one in self.text.splitlines() if one and not one.startswith(" ")])


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in its order, those for no host too."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        options = dict(part.split("=", 1) for part in match["info"].split())
        hosts = tuple(filter(None, options.get("on", "").split(",")))
        line = text[: match.start()].count("\n") + 1
        code = int(options.get("exit", 0))
        found.append(Block(hosts, match["text"], line, match["language"], code))
    return found


def unexplained(page: Path) -> list[int]:
    """Return the lines of blocks that name no host and do not say why they are not run."""
    lines = page.read_text().splitlines()
    return [
        block.line
        for block in blocks(page)
        if not block.hosts
        and "not run by the tests"
        not in " ".join(lines[max(0, block.line - 4) : block.line]).lower()
    ]


class Reader:
    """Somebody who types what a page says, in its order, and reads what comes."""

    def __init__(self, computer: Computer) -> None:
        self.computer = computer
        self.ran = 0
        self._settled: dict[str, list[str]] = {}
        self._names = {"CODE": "", "ID": ""}

    def type(self, block: Block, host: str) -> Done:
        """Type a block on a host; it has to end as the page says."""
        text = block.text
        for name, value in self._names.items():
            text = re.sub(rf"\b{name}\b", value, text)
        settled = self._settled.setdefault(host, [])
        script = text if block.language == "bash" else f"python - <<'END'\n{text}END\n"
        done = self.computer.rig[host].sh(
            "\n".join(["set -e", *settled, script]), timeout_s=180, check=False
        )
        assert done.code == block.code, (
            f"line {block.line} on {host}: {shlex.quote(text)}: exit code {done.code}, "
            f"not {block.code}\n{done.out}\n{done.err}"
        )
        if block.language == "bash":
            settled += [one for one in text.splitlines() if _SETTLES.match(one)]
            self.ran += block.commands
        self._read(done.out + done.err)
        return done

    def _read(self, text: str) -> None:
        for name, pattern in (("CODE", CODE), ("ID", _TASK)):
            if found := pattern.findall(text):
                self._names[name] = found[-1]

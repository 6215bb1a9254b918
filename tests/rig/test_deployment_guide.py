"""Every command of docs/DEPLOYMENT.md that names its machine, on hosts, in the page's order.

A block's info string says where it runs (``on=m1``); the shell of a host goes on from block to
block. Blocks that do not name a machine are counted as not run, and have to say why.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig.computer import Computer, measured
from tests.support.rig.testing import rig_for_tests

PAGE = Path(__file__).parents[2] / "docs" / "DEPLOYMENT.md"
_BLOCK = re.compile(r"^```bash(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_RAY_UP = "## 7."


@dataclass(frozen=True)
class Block:
    """A block of commands and where they are meant to be typed."""

    hosts: tuple[str, ...]
    text: str
    line: int


def blocks() -> list[Block]:
    page = PAGE.read_text()
    found = []
    for match in _BLOCK.finditer(page):
        options = dict(part.split("=", 1) for part in match["info"].split())
        hosts = tuple(filter(None, options.get("on", "").split(",")))
        found.append(Block(hosts, match["text"], page[: match.start()].count("\n") + 1))
    return found


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    with rig_for_tests(base=tmp_path_factory.mktemp("rigs").resolve()) as rig:
        yield Computer(rig)


def test_blocks_that_are_not_run_say_why() -> None:
    page = PAGE.read_text().splitlines()
    section = ""
    for block in blocks():
        section = next(line for line in reversed(page[: block.line]) if line.startswith("## "))
        before = " ".join(page[max(0, block.line - 4) : block.line])
        if not block.hosts and not section.startswith(_RAY_UP):
            assert "not run by the tests" in before.lower(), f"line {block.line}"


def test_every_command_of_the_page(computer: Computer) -> None:
    typed: dict[str, list[str]] = {}
    code, ran = "", 0
    for block in blocks():
        for host in block.hosts:
            text = block.text.replace("CODE", code)
            # What was typed before is in force: directory, PATH, variables.
            settled = [one for one in typed.get(host, []) if re.match(r"(cd|eval|export)\b", one)]
            script = "\n".join(["set -e", *settled, text])
            done = computer.rig[host].sh(script, timeout_s=180, check=False)
            assert done.code == 0, f"line {block.line} on {host}: {shlex.quote(text)}\n{done.err}"
            typed.setdefault(host, []).extend(text.splitlines())
            ran += len([one for one in text.splitlines() if one and not one.startswith(" ")])
            if "hcna up" in text:
                code = computer.code_in(done.out)
    others = sum(len(block.text.splitlines()) for block in blocks() if not block.hosts)
    measured(f"docs/DEPLOYMENT.md: {ran} commands run on hosts, {others} lines not run here")
    assert ran >= 12
    assert computer.works("W1", 30) < 30
    computer.hcna("m1", "down")

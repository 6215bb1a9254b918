"""Every command of docs/DEPLOYMENT.md that names its machine, on hosts, in the page's order.

Blocks that do not name a machine are counted as not run, and have to say why.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.computer import Computer, measured
from tests.rig.pages import Reader, blocks, unexplained
from tests.support.rig.testing import rig_for_tests

PAGE = Path(__file__).parents[2] / "docs" / "DEPLOYMENT.md"
_RAY_UP = "## 7."


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    with rig_for_tests(base=tmp_path_factory.mktemp("rigs").resolve()) as rig:
        yield Computer(rig)


def test_blocks_that_are_not_run_say_why() -> None:
    page = PAGE.read_text().splitlines()
    sections = {
        line: next(one for one in reversed(page[:line]) if one.startswith("## "))
        for line in unexplained(PAGE)
    }
    # test_ray_up.py runs those.
    assert [line for line, title in sections.items() if not title.startswith(_RAY_UP)] == []


@pytest.mark.drill
def test_every_command_of_the_page(computer: Computer) -> None:
    reader = Reader(computer)
    for block in blocks(PAGE):
        for host in block.hosts:
            reader.type(block, host)
    others = sum(len(block.text.splitlines()) for block in blocks(PAGE) if not block.hosts)
    measured(f"docs/DEPLOYMENT.md: {reader.ran} commands run on hosts, {others} lines not run here")
    assert reader.ran >= 12
    assert computer.works("W1", 30) < 30
    computer.hcna("m1", "down")

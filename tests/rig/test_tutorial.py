"""docs/tutorial.md as a newcomer follows it: every block, on two hosts, in the page's order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.computer import LEAVES_S, Computer, measured
from tests.rig.pages import Reader, blocks, unexplained
from tests.support.plugin import find_uv
from tests.support.rig import Done
from tests.support.rig.testing import rig_for_tests

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
W1 = "HCNA-W1--prod--home--v1.0"


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    with rig_for_tests(base=tmp_path_factory.mktemp("rigs").resolve()) as rig:
        for host in (rig["m1"], rig["w1"]):
            # Step 1 brings it, and needs the network.
            brought = host.file("/root/.local/bin/uv")
            brought.parent.mkdir(parents=True)
            shutil.copy(find_uv(), brought)
        yield Computer(rig)


def test_blocks_that_are_not_run_say_why() -> None:
    assert unexplained(PAGE) == []


@pytest.mark.drill  # Minutes: it starts everything twice.
@pytest.mark.timeout(600)
def test_every_step_of_the_walk(computer: Computer) -> None:
    reader = Reader(computer)
    told: list[tuple[str, Done]] = [
        (block.text, reader.type(block, host)) for block in blocks(PAGE) for host in block.hosts
    ]

    def after(words: str) -> str:
        """Return what was printed by the block, or blocks, with these words."""
        found = [done.out + done.err for text, done in told if words in text]
        assert found, f"the page has no {words!r}"
        return "\n".join(found)

    assert "/ui" in after("hcna up")
    assert "this machine is W1" in after("hcna join CODE")
    assert json.loads(after("Hello, W1"))["processed_by"] == W1
    watched = after("hcna events ID")
    for kind in ("accepted", "started", "completed"):
        assert f"  {kind}  " in watched, watched
    assert "needs gpu>=9" in after("hcna why ID")
    assert "join a worker with gpu>=9" in after("hcna why ID")
    assert "diary.txt" in after("hcna submit drgfc.compress")
    assert "output_bytes" in after("hcna task retry ID")
    poem = after("hcna logs ID")
    assert "ep" in poem
    assert "line 2: M1 kept count, so we could sleep." in poem
    assert "payload.lines" in after("lines=7")
    assert f"100 poems, by {{'{W1}'}}" in after("client.map")
    assert W1 in after("client.attach")
    others = sum(not block.hosts for block in blocks(PAGE))
    measured(f"docs/tutorial.md: {reader.ran} commands run on hosts, {others} blocks not run here")
    computer.until_clean(LEAVES_S, computer.m1, computer.rig["w1"])

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.errors import ModeratorUnavailable, NotFound, OutputUnavailable
from hcna_ray.core.models import Token
from hcna_ray.runtime.output import output_file, read_output
from hcna_ray.runtime.output_link import OutputLink

TOKEN = Token(1, 2)


class Agent:
    """An agent with a folder of its own, or one that does not answer."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.asked = 0

    async def acall(self, method: str, *args: Any, timeout_s: float) -> Any:
        self.asked += 1
        assert method == "output"
        if self.folder is None:
            raise ModeratorUnavailable("actor agent:W2 is not there yet", 1)
        return read_output(self.folder, *args)


def keep(folder: Path, text: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    output_file(folder, "task-1", TOKEN).write_bytes(text)


async def test_what_is_here_is_read_here(tmp_path: Path) -> None:
    keep(tmp_path / "W1", b"0123456789")
    agent = Agent(None)
    link = OutputLink(lambda worker: tmp_path / worker, lambda _: agent)
    assert await link.read("W1", "task-1", TOKEN, 2, 3) == b"234"
    assert await link.read("W1", "task-1", TOKEN, 10, 3) == b""
    assert agent.asked == 0


async def test_what_is_elsewhere_is_asked_for_there(tmp_path: Path) -> None:
    keep(tmp_path / "far", b"far away")
    agents: list[Agent] = []

    def link_to(_worker: str) -> Agent:
        agents.append(Agent(tmp_path / "far"))
        return agents[-1]

    link = OutputLink(lambda worker: tmp_path / worker, link_to)
    for _ in range(2):
        assert await link.read("W2", "task-1", TOKEN, 0, 100) == b"far away"
    assert await link.read("W2", "task-2", TOKEN, 0, 100) is None
    assert [agent.asked for agent in agents] == [3]


async def test_a_worker_that_does_not_answer_is_named(tmp_path: Path) -> None:
    link = OutputLink(lambda worker: tmp_path / worker, lambda _: Agent(None))
    with pytest.raises(OutputUnavailable, match="W2"):
        await link.read("W2", "task-1", TOKEN, 0, 100)


@pytest.mark.parametrize("name", ["../keys", "a/b", "", ".", "task-1\n", "x" * 65])
def test_nothing_but_outputs_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        read_output(tmp_path, name, TOKEN, 0, 100)


def test_a_link_in_the_place_of_an_output_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    output_file(tmp_path, "task-1", TOKEN).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        read_output(tmp_path, "task-1", TOKEN, 0, 100)

"""Notebooks are kept as they should be read; that they run, the integration tests show.

What these do not come across (many files, a W1 on another machine) is tried here, cell by cell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from hcna_ray.client import Client, TaskRequest
from hcna_ray.client.notebook import WATCHED_MAX, table, track, watch
from tests.support.fake_c1 import API_KEY, FakeC1

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = read(path)

    nbformat.validate(notebook)  # type: ignore[no-untyped-call]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert not [cell.id for cell in notebook.cells if cell.metadata], "of whose editor is that?"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_what_users_have(path: Path) -> None:
    """The public client, and nothing else of the product."""
    lines = [
        line.strip()
        for cell in read(path).cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
    ]

    ours = {line.split()[1] for line in lines if line.startswith(("import hcna", "from hcna"))}
    assert ours <= {"hcna_ray.client", "hcna_ray.client.notebook"}
    assert not [line for line in lines if "client._" in line]


def run(stem: str, names: dict[str, Any], *cells: str) -> None:
    """Run some cells of a notebook with these names, and leave theirs there."""
    (path,) = [path for path in NOTEBOOKS if path.stem == stem]
    sources = {cell.id: cell.source for cell in read(path).cells}
    for cell in cells:
        exec(compile(sources[cell], f"{stem}[{cell}]", "exec"), names)


def test_a_folder_may_hold_more_files_than_a_table_shows(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(WATCHED_MAX + 1)]
    for number, path in enumerate(files):
        path.write_text(f"picture {number // 2} " * 100)  # Some are the same.
    with Client("http://c1.test", API_KEY, transport=FakeC1().transport()) as client:
        names: dict[str, Any] = {
            "Path": Path,
            "TaskRequest": TaskRequest,
            "track": track,
            "client": client,
            "FOLDER": tmp_path,
            "files": files,
        }
        run("03_compress_a_folder", names, "send", "compress", "proof")

    assert list(names["packed"]) == files
    assert not names["failed"]
    assert all(names["same"])


class W1Elsewhere:
    """The drill where W1 is another machine: naps run, pauses take no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # A process of this machine that is no agent, and has W1's number by chance.
        self.pid = os.getpid()
        self.c1 = FakeC1()
        self.killed: list[int] = []
        self.slept = 0
        self.meanwhile: Callable[[], None] = lambda: None
        worker = self.c1.worker()
        monkeypatch.setattr(
            self.c1,
            "worker",
            lambda: {**worker, "telemetry": {"payload": {"agent_pid": self.pid}}},
        )
        monkeypatch.setattr(os, "kill", lambda pid, _: self.killed.append(pid))
        monkeypatch.setattr(time, "sleep", self._sleep)
        self.client = Client("http://c1.test", API_KEY, transport=self.c1.transport())
        monkeypatch.setattr(self.client, "submit_many", self._submit)
        self.asked: list[TaskRequest] = []
        self.names: dict[str, Any] = {
            "client": self.client,
            "TaskRequest": TaskRequest,
            "table": table,
            "watch": watch,
        }

    def _submit(self, requests: list[TaskRequest]) -> list[Any]:
        self.asked = requests
        handles = [self.client.submit("hold") for _ in requests]
        for task in self.c1.tasks.values():
            task["status"] = "running"
        return handles

    def _sleep(self, _: float) -> None:
        self.slept += 1
        assert self.slept < 1000
        self.meanwhile()

    def end(self) -> None:
        """All naps end."""
        for task_id in self.c1.tasks:
            self.c1.finish(task_id, "completed", result={"resumed_s": 3.0})

    def run(self, *cells: str) -> None:
        """Run these cells."""
        run("04_failure_drill", self.names, *cells)


def test_the_drill_waits_for_whoever_has_to_walk_over_to_w1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drill = W1Elsewhere(monkeypatch)
    drill.run("work")
    assert {request.payload["seconds"] for request in drill.asked} == {60}
    before = drill.pid

    def killed_after_a_while() -> None:
        if drill.slept >= 50:
            drill.pid += 1

    drill.meanwhile = killed_after_a_while
    drill.run("kill")

    assert f"kill -9 {before}" in capsys.readouterr().out
    assert drill.slept >= 50
    assert not drill.killed
    assert drill.names["killed_at"] <= time.time()
    drill.end()
    drill.run("watch", "count", "verdict")
    drill.client.close()


def test_the_drill_goes_on_when_nobody_does_anything_to_w1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drill = W1Elsewhere(monkeypatch)
    drill.run("work")
    drill.meanwhile = drill.end
    drill.run("kill", "watch", "count", "verdict")

    assert "nobody has killed it" in capsys.readouterr().out
    assert "killed_at" in drill.names
    drill.client.close()

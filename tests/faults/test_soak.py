"""The soak's evidence: what was pruned is in it, and all else is as the store says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.parts import soak
from tests.faults.parts.soak import Collector


def test_pruned_tasks_stay_in_the_dump_and_in_its_depths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(name: str, state: str) -> dict[str, Any]:
        return {"record": "task", "id": name, "queue": "default", "state": state}

    def depth(state: str, tasks: int) -> dict[str, Any]:
        return {"record": "depth", "queue": "default", "state": state, "tasks": tasks}

    looks = [
        [
            *(task("t1", "completed"), task("t2", "failed"), task("t3", "queued")),
            *(depth("completed", 1), depth("failed", 1), depth("queued", 1)),
        ],
        [
            *(task("t3", "completed"), task("t4", "queued"), {"record": "number", "name": "n"}),
            *(depth("completed", 1), depth("queued", 1)),
        ],
    ]

    def export(store: Path, target: Path) -> None:
        del store
        target.write_text("".join(json.dumps(one) + "\n" for one in looks.pop(0)))

    monkeypatch.setattr(soak, "export", export)
    collector = Collector(tmp_path / "queue.db")
    collector.collect()
    collector.collect()
    collector.write(tmp_path / "all.jsonl")

    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [one for one in found if one["record"] == "task"] == [
        task("t1", "completed"),
        task("t2", "failed"),
        task("t3", "completed"),
        task("t4", "queued"),
    ]
    assert [one for one in found if one["record"] != "task"] == [
        {"record": "number", "name": "n"},
        depth("completed", 2),
        depth("queued", 1),
        depth("failed", 1),
    ]

"""The soak's evidence: what was pruned is in it, and all else is as the store says."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.faults import samples
from tests.faults.parts import soak
from tests.faults.parts.soak import Collector


def test_threads_of_a_pool_that_breathes_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> int:
        found = samples.sample(os.getpid())
        assert found is not None
        return found["threads"]

    before, done = threads(), threading.Event()
    one = threading.Thread(target=done.wait)
    one.start()
    try:
        with_one = threads()
        monkeypatch.setattr(samples, "_POOL", one_name(one))
        without = threads()
    finally:
        done.set()
        one.join()
    assert with_one == before + 1
    assert without < with_one


def one_name(thread: threading.Thread) -> str:
    return Path(f"/proc/self/task/{thread.native_id}/comm").read_text().strip()


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

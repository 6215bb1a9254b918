"""What a handler sees while it runs."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.errors import NotFound
from hcna_ray.handlers import (
    CheckpointTooLarge,
    Reject,
    TaskCancelled,
    TaskTimedOut,
    remove_stale_scratch,
)


def test_the_fence_is_a_pair_and_a_text(context: Any) -> None:
    ctx = context(attempt=2)

    assert tuple(ctx.fence) == (3, 2)
    assert str(ctx.fence) == "3.2"
    assert ctx.attempt == 2


def test_progress_is_cut_to_its_range_and_keeps_the_last_percentage(
    context: Any, effects: Any
) -> None:
    ctx = context()
    for percent in (-5, 50, None, float("nan"), 250):
        ctx.progress(percent, "m" * 501)

    assert [percent for percent, _ in effects.progress] == [0, 50, 50, 50, 100]
    assert {len(message) for _, message in effects.progress} == {500}


def test_a_checkpoint_reaches_the_next_attempt(context: Any, effects: Any) -> None:
    assert context().last_checkpoint is None
    context().checkpoint({"done": [1, 2]})

    assert context(last_checkpoint=effects.checkpoints[-1]).last_checkpoint == {"done": [1, 2]}


def test_a_checkpoint_is_strict_and_bounded(context: Any, effects: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        context().checkpoint({"x": float("nan")})
    with pytest.raises(CheckpointTooLarge, match=r"ctx\.artifact"):
        context().checkpoint("x" * (256 << 10))
    assert effects.checkpoints == []


def test_an_artifact_comes_back_as_a_file(context: Any, effects: Any, tmp_path: Path) -> None:
    source = tmp_path / "mesh.obj"
    source.write_bytes(b"v 0 0 0\n")

    stored = context().artifact(source)

    assert (stored.size, stored.name, stored.uri) == (8, "mesh.obj", f"/artifacts/{stored.sha256}")
    assert context().open_artifact(stored.sha256).read_bytes() == b"v 0 0 0\n"
    assert context().artifact(str(source), name="other").name == "other"
    with pytest.raises(NotFound) as missing:
        context().open_artifact("0" * 64, field="payload.mesh")
    assert str(missing.value) == (
        f"payload.mesh: there is no artifact '{'0' * 64}' of whoever submitted this task; "
        "upload it with PUT /artifacts under the same key, and submit the task again"
    )
    assert pickle.loads(pickle.dumps(missing.value)).field == "payload.mesh"


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_an_artifact_is_named_by_a_digest_only(context: Any, sha256: str) -> None:
    with pytest.raises(Reject, match="sha256"):
        context().open_artifact(sha256)


def test_cancellation_and_the_deadline_stop_a_handler(
    context: Any, effects: Any, clock: Any
) -> None:
    ctx = context(deadline=clock() + 5)
    assert not ctx.cancelled
    assert ctx.deadline_s == 5
    ctx.pause(4.5)
    assert ctx.deadline_s == pytest.approx(0.5)
    with pytest.raises(TaskTimedOut):
        ctx.pause(10)
    assert clock() == pytest.approx(1005, abs=0.11)
    assert ctx.deadline_s == 0

    effects.cancel_after = effects.looks
    assert ctx.cancelled
    with pytest.raises(TaskCancelled):
        ctx.raise_if_cancelled()


def test_a_pause_ends_as_soon_as_the_task_is_cancelled(
    context: Any, effects: Any, clock: Any
) -> None:
    effects.cancel_after = 3
    with pytest.raises(TaskCancelled):
        context().pause(3600)
    assert clock() <= 1000.5


def test_without_a_timeout_there_is_no_deadline(context: Any) -> None:
    assert context().deadline_s is None
    context().raise_if_cancelled()


def test_scratch_is_made_on_demand_and_removed(context: Any, scratch_root: Path) -> None:
    with context() as ctx:
        assert list(scratch_root.iterdir()) == []
        (ctx.scratch / "sub").mkdir()
        (ctx.scratch / "sub" / "file").write_text("x")
        assert ctx.scratch == ctx.scratch
        assert ctx.scratch.stat().st_mode & 0o777 == 0o700
    ctx.close()
    assert list(scratch_root.iterdir()) == []


def test_stale_scratch_is_removed_but_not_that_of_running_tasks(
    context: Any, tmp_path: Path
) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    kept = context(task_id="task-a", scratch_root=root).scratch
    stale = context(task_id="task-b", scratch_root=root).scratch
    (root / "file").touch()

    assert remove_stale_scratch(root, {"task-a"}) == 1
    assert kept.is_dir()
    assert not stale.exists()


def test_log_lines_name_the_attempt(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        context("acme.test", attempt=2).log.info("half way", extra={"rows": 5, "attempt": 99})

    record = caplog.records[0]
    assert record.name == "hcna_ray.tasks.acme.test"
    assert (record.__dict__["task_id"], record.__dict__["attempt"]) == ("task-1", 2)
    assert record.__dict__["rows"] == 5


def test_a_worker_without_a_disk_path_rejects_files(context: Any) -> None:
    with pytest.raises(Reject, match=r"payload\.x: W1 has no worker\.resources\.disk_path"):
        context(disk_path=None).resolve("a", field="payload.x")

"""A context whose effects are recorded, and a clock that moves only when somebody sleeps."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.errors import NotFound
from hcna_ray.core.models import Token
from hcna_ray.handlers import ArtifactRef, Registry, TaskContext, load_registry

Contexts = Callable[..., TaskContext]


class RecordingEffects:
    """Effects that end in lists and in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.progress: list[tuple[float | None, str]] = []
        self.checkpoints: list[bytes] = []
        self.artifacts: list[ArtifactRef] = []
        #: The answer to the n-th look at the cancel flag; ``None`` means it is never set.
        self.cancel_after: int | None = None
        self.looks = 0

    def send_progress(self, percent: float | None, message: str) -> None:
        self.progress.append((percent, message))

    def save_checkpoint(self, data: bytes) -> None:
        self.checkpoints.append(data)

    def put_artifact(self, path: Path, name: str | None) -> ArtifactRef:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, self._directory / sha256)
        stored = ArtifactRef(sha256=sha256, size=path.stat().st_size, name=name)
        self.artifacts.append(stored)
        return stored

    def get_artifact(self, sha256: str) -> Path:
        path = self._directory / sha256
        if not path.exists():
            raise NotFound("artifact", sha256)
        return path

    def is_cancelled(self) -> bool:
        self.looks += 1
        return self.cancel_after is not None and self.looks > self.cancel_after


class SleepClock:
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def effects(tmp_path: Path) -> RecordingEffects:
    store = tmp_path / "artifacts"
    store.mkdir()
    return RecordingEffects(store)


@pytest.fixture
def clock() -> SleepClock:
    return SleepClock()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The worker's disk path."""
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def scratch_root(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


@pytest.fixture
def context(
    effects: RecordingEffects, clock: SleepClock, disk: Path, scratch_root: Path
) -> Iterator[Contexts]:
    """Make contexts; keyword arguments override the defaults."""

    def make(task_type: str = "acme.test", *, attempt: int = 1, **changes: Any) -> TaskContext:
        given: dict[str, Any] = {
            "task_id": "task-1",
            "task_type": task_type,
            "token": Token(3, attempt),
            "worker": "W1",
            "node_id": "HCNA-W1--prod--home--v1.0",
            "effects": effects,
            "disk_path": disk,
            "scratch_root": scratch_root,
            "clock": clock,
            "sleep": clock.sleep,
        }
        return TaskContext(**{**given, **changes})

    yield make
    assert list(scratch_root.iterdir()) == [], "a scratch directory was left behind"


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The process-wide registry, as the product loads it."""
    return load_registry()

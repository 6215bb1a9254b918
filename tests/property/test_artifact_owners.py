"""Whoever reads an artifact has sent it, or has made it, or sees all: in whatever order.

Real stores and files: M1's, a worker beside it and one elsewhere with a cache. What is expected is
worked out from what was done, with sets; the two must agree after every step.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcna_ray.api.visibility import sees_artifact
from hcna_ray.config import LimitSettings, Settings
from hcna_ray.core.errors import NotFound
from hcna_ray.core.models import TaskState, Token
from hcna_ray.runtime import artifacts
from hcna_ray.runtime.artifacts import ArtifactServer, WorkerArtifacts, open_store
from hcna_ray.runtime.messages import AttemptKey
from hcna_ray.security.keys import ApiKey
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import a_task

FILES = [b"one", b"two"]
NAMES = [hashlib.sha256(data).hexdigest() for data in FILES]

KEYS = (
    ApiKey(name="anna", role="submitter", sha256="", created_at=0.0),
    ApiKey(name="ben", role="submitter", sha256="", created_at=0.0),
    ApiKey(name="watcher", role="viewer", sha256="", created_at=0.0),
    ApiKey(name="lab", role="operator", sha256="", created_at=0.0, queues=("lab",)),
    ApiKey(name="op", role="operator", sha256="", created_at=0.0),
)
SENDERS = [key for key in KEYS if key.role != "viewer"]


class Send(NamedTuple):
    """A key uploads a file through C1."""

    key: int
    file: int


class Make(NamedTuple):
    """A task that a key has submitted hands a file over, on this machine or the other."""

    key: int
    queue: str
    file: int
    here: bool


class Read(NamedTuple):
    """A task that a key has submitted opens a file."""

    key: int
    file: int
    here: bool


class Look(NamedTuple):
    """A key asks C1 for a file."""

    key: int
    file: int


keys, files = st.integers(0, len(SENDERS) - 1), st.integers(0, len(FILES) - 1)
queues = st.sampled_from(["lab", "day"])
steps = (
    st.builds(Read, keys, files, st.just(False))  # Where there is a cache.
    | st.builds(Send, keys, files)
    | st.builds(Make, keys, queues, files, st.booleans())
    | st.builds(Read, keys, files, st.booleans())
    | st.builds(Look, st.integers(0, len(KEYS) - 1), files)
)


class House:
    """The real things, and beside them what must be so."""

    def __init__(self, folder: Path) -> None:
        limits = LimitSettings(disk_free_bytes_min=0)
        m1, w1 = (Settings(home=folder / name, limits=limits) for name in ("m1", "w1"))
        for each in (m1, w1):
            each.home.mkdir()
        self._folder = folder
        self._tasks = MemoryTaskStore()
        self._numbers = itertools.count(1)
        self._store = open_store(m1)
        self._server = ArtifactServer(m1, self._tasks.reader)
        self._here, self._there = WorkerArtifacts(m1), WorkerArtifacts(w1)
        for worker in (self._here, self._there):
            worker._link = self  # type: ignore[assignment]
        #: What is stored, whose it is, and what tasks in queue lab have made.
        self.stored: set[int] = set()
        self.whose: set[tuple[str, int]] = set()
        self.in_lab: set[int] = set()

    def call(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        """Answer a worker as the actor does."""
        return getattr(self._server, method)(*args)

    def carry_out(self, step: Send | Make | Read | Look) -> None:
        """Do it, and compare."""
        match step:
            case Send(key, file):
                owner = None if SENDERS[key].sees_all else SENDERS[key].owner
                self._store.put(FILES[file], owner=owner)
                self.stored.add(file)
                if owner is not None:
                    self.whose.add((owner, file))
            case Make(key, queue, file, here):
                path = self._folder / "out"
                path.write_bytes(FILES[file])
                assert self._worker(here).put(path, self._attempt(key, queue))[0] == NAMES[file]
                self.stored.add(file)
                self.whose.add((SENDERS[key].owner, file))
                if queue == "lab":
                    self.in_lab.add(file)
            case Read(key, file, here):
                caller = SENDERS[key]
                may = (caller.owner, file) in self.whose
                if caller.sees_all:
                    may = file in self.stored
                self._read(self._worker(here), self._attempt(key, "lab"), file, may=may)
            case Look(key, file):
                caller = KEYS[key]
                if caller.sees_all:
                    return  # C1 asks nothing about it.
                may = (caller.owner, file) in self.whose
                may |= caller.name == "lab" and file in self.in_lab
                assert sees_artifact(self._store, caller, NAMES[file]) is may
                if may:
                    self.whose.add((caller.owner, file))

    def _read(self, worker: WorkerArtifacts, attempt: AttemptKey, file: int, *, may: bool) -> None:
        if may:
            assert worker.get(NAMES[file], attempt).read_bytes() == FILES[file]
            return
        said = []
        for name in (NAMES[file], "0" * 64):
            with pytest.raises(NotFound) as caught:
                worker.get(name, attempt)
            said.append(str(caught.value).replace(name, "N"))
        assert said[0] == said[1]

    def _worker(self, here: bool) -> WorkerArtifacts:
        return self._here if here else self._there

    def _attempt(self, key: int, queue: str) -> AttemptKey:
        """Have a task run that a key has submitted."""
        caller, number = SENDERS[key], next(self._numbers)
        task = a_task(
            f"t{number}",
            seq=number,
            state=TaskState.RUNNING,
            principal=caller.owner,
            queue=queue,
            confined=not caller.sees_all,
        )
        with self._tasks.transaction():
            self._tasks.insert([task])
        return task.id, Token(1, 1)


@settings(derandomize=True, database=None, deadline=None, max_examples=80)
@given(st.lists(steps, min_size=8, max_size=24))
def test_who_reads_an_artifact_has_it_by_right(walk: list[Send | Make | Read | Look]) -> None:
    with (
        pytest.MonkeyPatch.context() as patched,
        tempfile.TemporaryDirectory() as folder,
    ):
        patched.setattr(artifacts, "ActorLink", lambda _name: None)
        house = House(Path(folder))
        for step in walk:
            house.carry_out(step)

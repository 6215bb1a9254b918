"""Artifacts as workers see them: beside the store, or at the other end of an actor call."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.config import Settings, load_settings
from hcna_ray.core.errors import (
    HcnaError,
    Invalid,
    ModeratorUnavailable,
    NoAnswer,
    NotFound,
    Overloaded,
    StaleAttempt,
    StoreUnavailable,
)
from hcna_ray.core.models import Task, TaskState, Token
from hcna_ray.runtime import artifacts as artifacts_module
from hcna_ray.runtime.artifacts import (
    ASK_PAUSE_S,
    ASK_TRIES,
    ArtifactServer,
    WorkerArtifacts,
    open_store,
    prune_cache,
)
from hcna_ray.runtime.messages import AttemptKey
from hcna_ray.security.keys import create_key, ensure_owner_key, revoke_key
from hcna_ray.store.artifacts import Maker
from hcna_ray.store.memory import MemoryTaskReader, MemoryTaskStore
from tests.support.builders import T0, a_task

PART = 65_536
CONFIG = f"limits:\n  artifact_part_bytes: {PART}\n  disk_free_bytes_min: 0\n"
DATA = os.urandom(3 * PART + 17)
SHA = hashlib.sha256(DATA).hexdigest()
#: The attempt of a task that may read everything.
HOUSE: AttemptKey = ("house", Token(1, 1))


class PaperLink:
    """Calls the server object directly, as the actor would."""

    def __init__(self, server: ArtifactServer) -> None:
        self.server = server
        self.calls: list[str] = []
        self.faults: list[Exception] = []
        #: What to do to a part on its way back.
        self.spoil = lambda part: part

    def call(self, method: str, *args: Any, timeout_s: float = 15.0) -> Any:
        self.calls.append(method)
        if self.faults:
            raise self.faults.pop(0)
        answer = getattr(self.server, method)(*args)
        return self.spoil(answer) if method == "read" else answer


def settings_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    home.mkdir(exist_ok=True)
    (home / "hcna.yaml").write_text(CONFIG)
    monkeypatch.setenv("HCNA_HOME", str(home))
    return load_settings(home)


class Site:
    """M1's home, and a worker in another one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.m1 = settings_of(folder / "m1", monkeypatch)
        self.w1 = settings_of(folder / "w1", monkeypatch)
        self.tasks = MemoryTaskStore()
        self.server = ArtifactServer(self.m1, self.tasks.reader)
        self.attempt("house", "owner", confined=False)
        self.link = PaperLink(self.server)
        monkeypatch.setattr(artifacts_module, "ActorLink", lambda _name: self.link)
        self.pauses: list[float] = []
        self.local = WorkerArtifacts(self.m1, pause=self.pauses.append)
        self.remote = WorkerArtifacts(self.w1, pause=self.pauses.append)
        self.file = folder / "out.bin"
        self.file.write_bytes(DATA)

    def attempt(self, task_id: str, principal: str, *, confined: bool = True) -> AttemptKey:
        """Put a task that runs into M1's store; return the name of its attempt."""
        task = a_task(
            task_id,
            seq=self.tasks.last_seq() + 1,
            state=TaskState.RUNNING,
            principal=principal,
            confined=confined,
        )
        with self.tasks.transaction():
            self.tasks.insert([task])
        return task_id, Token(1, 1)

    @property
    def cache(self) -> list[str]:
        return sorted(path.name for path in (self.w1.home / "cache").glob("*"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_a_worker_beside_the_store_uses_it_directly(site: Site) -> None:
    assert site.local.put(site.file, HOUSE) == (SHA, len(DATA))
    assert site.local.get(SHA, HOUSE).read_bytes() == DATA
    # And asks only once whose directory it is.
    assert site.link.calls == ["identity", "made", "size"]


def test_any_other_worker_sends_and_fetches_parts(site: Site) -> None:
    assert site.remote.put(site.file, HOUSE) == (SHA, len(DATA))
    assert site.link.calls.count("write") == 1 + 4
    found = site.remote.get(SHA, HOUSE)

    assert found.read_bytes() == DATA
    assert site.link.calls.count("read") == 4
    assert site.cache == [SHA]
    assert not os.access(found, os.W_OK) or os.geteuid() == 0


def test_what_is_in_the_cache_is_not_fetched_again(site: Site) -> None:
    site.local.put(site.file, HOUSE)
    site.remote.get(SHA, HOUSE)
    reads = site.link.calls.count("read")
    site.remote.get(SHA, HOUSE)

    assert site.link.calls.count("read") == reads


def test_an_upload_goes_on_where_it_stands(site: Site) -> None:
    site.server.write(SHA, len(DATA), 0, DATA[:PART])

    assert site.remote.put(site.file, HOUSE) == (SHA, len(DATA))
    assert site.link.calls.count("write") == 1 + 3


def test_what_is_there_is_not_sent_again(site: Site) -> None:
    site.local.put(site.file, HOUSE)
    site.link.calls.clear()

    assert site.remote.put(site.file, HOUSE) == (SHA, len(DATA))
    assert site.link.calls == ["write", "made"]


def test_a_worker_waits_while_too_many_uploads_are_open(site: Site) -> None:
    store = site.server._store
    for number in range(64):
        store.append(f"{number:064x}", offset=0, size=2, pieces=[b"x"])
    with pytest.raises(Overloaded):
        site.remote.put(site.file, HOUSE)
    assert len(site.pauses) == ASK_TRIES - 1

    def one_ends(_pause_s: float) -> None:
        next(iter((site.m1.artifacts_dir / "parts").iterdir())).unlink()

    patient = WorkerArtifacts(site.w1, pause=one_ends)
    assert patient.put(site.file, HOUSE) == (SHA, len(DATA))


def test_two_who_send_the_same_file_get_along(site: Site) -> None:
    sent: list[int] = []
    write = site.server.write

    def overtaken(sha256: str, total: int, offset: int, part: bytes) -> int:
        if part and not sent:
            sent.append(offset)
            write(sha256, total, offset, part)  # The other one was first.
        return write(sha256, total, offset, part)

    site.server.write = overtaken  # type: ignore[method-assign]

    assert site.remote.put(site.file, HOUSE) == (SHA, len(DATA))
    assert site.local.get(SHA, HOUSE).read_bytes() == DATA


def test_a_file_that_becomes_shorter_on_its_way_is_refused(site: Site) -> None:
    write = site.server.write

    def shorten(sha256: str, total: int, offset: int, part: bytes) -> int:
        site.file.write_bytes(DATA[:10])
        return write(sha256, total, offset, part)

    site.server.write = shorten  # type: ignore[method-assign]

    with pytest.raises(Invalid, match="shorter"):
        site.remote.put(site.file, HOUSE)


def test_an_empty_file_cannot_be_sent(site: Site) -> None:
    site.file.write_bytes(b"")

    with pytest.raises(Invalid, match="empty"):
        site.remote.put(site.file, HOUSE)


def test_what_nobody_has_is_not_found_here_or_there(site: Site) -> None:
    for worker in (site.local, site.remote):
        with pytest.raises(NotFound):
            worker.get("0" * 64, HOUSE)
    assert site.cache == []


@pytest.mark.parametrize("spoil", [lambda part: part[:-1] + b"x", lambda part: part[:0]])
def test_what_arrives_damaged_or_short_is_not_kept(site: Site, spoil: Any) -> None:
    site.local.put(site.file, HOUSE)
    site.link.spoil = spoil

    with pytest.raises(HcnaError, match="damaged"):
        site.remote.get(SHA, HOUSE)
    assert site.cache == []


def test_a_store_that_does_not_answer_is_asked_again(site: Site) -> None:
    away = [ModeratorUnavailable("away"), StoreUnavailable("away")]
    site.link.faults = list(away)
    assert site.local.put(site.file, HOUSE) == (SHA, len(DATA))
    site.link.faults = list(away)
    assert site.local.get(SHA, HOUSE).read_bytes() == DATA
    assert site.pauses == [ASK_PAUSE_S] * 4

    site.link.faults = [NoAnswer("away")] * ASK_TRIES
    with pytest.raises(NoAnswer):
        site.remote.get(SHA, HOUSE)
    assert not site.link.faults
    assert site.pauses == [ASK_PAUSE_S] * (4 + ASK_TRIES - 1)


def test_a_directory_keeps_its_name_over_restarts(site: Site) -> None:
    assert ArtifactServer(site.m1).identity() == site.server.identity()
    assert ArtifactServer(site.w1).identity() != site.server.identity()


# -- for whom --------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "remote"])
def worker(site: Site, request: pytest.FixtureRequest) -> WorkerArtifacts:
    """Return a worker on M1's own machine, or on another."""
    found: WorkerArtifacts = getattr(site, request.param)
    return found


def refused_alike(worker: WorkerArtifacts, attempt: AttemptKey) -> bool:
    """Return whether what is there is answered as what nobody has."""
    said = []
    for name in (SHA, "0" * 64):
        with pytest.raises(NotFound) as caught:
            worker.get(name, attempt)
        said.append(str(caught.value).replace(name, "N"))
    return said[0] == said[1]


def test_what_somebody_has_sent_is_for_his_tasks(site: Site, worker: WorkerArtifacts) -> None:
    annas, bens = site.attempt("a1", "anna"), site.attempt("b1", "ben")
    store = open_store(site.m1)
    for part in range(0, len(DATA), PART):
        store.append(
            SHA, offset=part, size=len(DATA), pieces=[DATA[part : part + PART]], owner="anna"
        )

    assert refused_alike(worker, bens)
    assert worker.get(SHA, annas).read_bytes() == DATA
    # A copy is here by now, and it is still not for everybody.
    assert refused_alike(worker, bens)
    assert worker.get(SHA, HOUSE).read_bytes() == DATA
    assert worker.get(SHA, site.attempt("o1", "op", confined=False)).read_bytes() == DATA


def test_what_a_task_has_made_is_for_the_tasks_of_its_principal(
    site: Site, worker: WorkerArtifacts
) -> None:
    annas, bens = site.attempt("a1", "anna"), site.attempt("b1", "ben")
    worker.put(site.file, annas)

    assert worker.get(SHA, site.attempt("a2", "anna")).read_bytes() == DATA
    assert refused_alike(worker, bens)
    assert open_store(site.m1).makers(SHA) == [Maker("anna", "echo", "default")]
    # Whoever has the bytes himself has them.
    worker.put(site.file, bens)
    assert worker.get(SHA, bens).read_bytes() == DATA


def test_what_was_sent_by_whoever_sees_everything_is_for_no_others(
    site: Site, worker: WorkerArtifacts
) -> None:
    annas = site.attempt("a1", "anna")
    worker.put(site.file, HOUSE)

    assert refused_alike(worker, annas)
    assert worker.get(SHA, HOUSE).read_bytes() == DATA


def test_a_copy_that_is_not_for_an_attempt_is_not_made_by_it(
    site: Site, worker: WorkerArtifacts
) -> None:
    """Not even if a handler stores whatever path it is told."""
    annas, bens = site.attempt("a1", "anna"), site.attempt("b1", "ben")
    worker.put(site.file, annas)
    copy = worker.get(SHA, annas)
    link = site.file.with_name("link")
    link.symlink_to(copy)

    for path in (copy, link):
        with pytest.raises(NotFound):
            worker.put(path, bens)
    assert refused_alike(worker, bens)
    assert worker.put(copy, annas) == (SHA, len(DATA))


def test_naming_what_is_sent_later_opens_nothing(site: Site, worker: WorkerArtifacts) -> None:
    bens = site.attempt("b1", "ben")
    assert refused_alike(worker, bens)
    worker.put(site.file, site.attempt("a1", "anna"))
    assert refused_alike(worker, bens)


@pytest.mark.parametrize(
    "attempt", [("house", Token(1, 2)), ("house", Token(2, 1)), ("nobody", Token(1, 1))]
)
def test_an_attempt_that_is_not_in_force_is_given_nothing_and_leaves_nothing(
    site: Site, worker: WorkerArtifacts, attempt: AttemptKey
) -> None:
    worker.put(site.file, HOUSE)
    for ask in (lambda: worker.get(SHA, attempt), lambda: worker.put(site.file, attempt)):
        with pytest.raises(StaleAttempt, match=r"attempt \d\.\d of task \w+ is not in force"):
            ask()
    assert open_store(site.m1).makers(SHA) == [Maker("owner", "echo", "default")]


def test_an_attempt_that_has_ended_is_given_nothing(site: Site, worker: WorkerArtifacts) -> None:
    worker.put(site.file, HOUSE)
    (task,) = site.tasks.get(("house",)).values()
    ended = task.evolve(state=TaskState.COMPLETED, lease=None, finished_at=T0, version=1)
    with site.tasks.transaction():
        site.tasks.save([ended])
    with pytest.raises(StaleAttempt):
        worker.get(SHA, HOUSE)


def test_every_part_is_given_to_the_attempt_that_asks(site: Site) -> None:
    annas, bens = site.attempt("a1", "anna"), site.attempt("b1", "ben")
    site.remote.put(site.file, annas)

    assert site.server.read(SHA, 0, 5, annas) == DATA[:5]
    with pytest.raises(NotFound):
        site.server.read(SHA, 0, 5, bens)


def test_a_store_of_tasks_that_fails_is_opened_anew(site: Site) -> None:
    readers = [BrokenReader(), site.tasks.reader()]
    server = ArtifactServer(site.m1, lambda: readers.pop(0))
    site.local.put(site.file, HOUSE)

    with pytest.raises(StoreUnavailable, match="ZeroDivisionError"):
        server.size(SHA, HOUSE)
    assert server.size(SHA, HOUSE) == server.size(SHA.upper(), HOUSE) == len(DATA)
    assert readers == []


class BrokenReader(MemoryTaskReader):
    """A connection that is gone."""

    def __init__(self) -> None:
        super().__init__(MemoryTaskStore())

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        raise ZeroDivisionError


def test_a_store_of_tasks_that_is_not_there_yet_says_so(site: Site) -> None:
    with pytest.raises(StoreUnavailable):
        ArtifactServer(site.m1).size(SHA, HOUSE)


def test_a_worker_that_does_not_say_for_whom_is_served_where_all_see_everything(
    site: Site,
) -> None:
    """As versions before this one ask."""
    site.local.put(site.file, HOUSE)
    assert site.server.size(SHA) == len(DATA)
    ensure_owner_key(site.m1.keys_dir, now=T0)
    for name, role in (("op", "operator"), ("boss", "admin"), ("watcher", "viewer")):
        create_key(site.m1.keys_dir, name=name, role=role, now=T0)  # type: ignore[arg-type]
    assert site.server.read(SHA, 0, 5) == DATA[:5]

    create_key(site.m1.keys_dir, name="anna", role="submitter", now=T0)
    revoke_key(site.m1.keys_dir, "anna", now=T0)  # What it has submitted may still run.
    for ask in (lambda: site.server.size(SHA), lambda: site.server.read(SHA, 0, 5)):
        with pytest.raises(HcnaError, match="upgrade hcna-ray on this worker"):
            ask()
    # What it stores is nobody's in particular.
    other = hashlib.sha256(b"other").hexdigest()
    assert site.server.write(other, 5, 0, b"other") == 5
    with pytest.raises(NotFound):
        site.remote.get(other, site.attempt("a1", "anna"))
    assert site.remote.get(other, HOUSE).read_bytes() == b"other"


# -- the cache -------------------------------------------------------------------------------------


def limited(settings: Settings, **limits: Any) -> Settings:
    return settings.model_copy(update={"limits": settings.limits.model_copy(update=limits)})


def cached(settings: Settings, name: str, size: int, age_s: float) -> Path:
    path = settings.home / "cache" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    used_at = time.time() - age_s
    os.utime(path, (used_at, used_at))
    return path


def names(settings: Settings) -> list[str]:
    return sorted(path.name for path in (settings.home / "cache").iterdir())


def test_the_least_recently_used_go_first_and_only_as_many_as_must(site: Site) -> None:
    settings = limited(site.w1, artifact_cache_bytes=100)
    for number in range(5):
        cached(settings, f"f{number}", 30, 100.0 - number)

    assert prune_cache(settings) == 2
    assert names(settings) == ["f2", "f3", "f4"]
    assert prune_cache(settings, room_bytes=40) == 1
    assert names(settings) == ["f3", "f4"]
    assert prune_cache(settings, room_bytes=1000) == 2


def test_what_nobody_used_for_long_goes_whatever_its_size(site: Site) -> None:
    settings = limited(site.w1, artifact_cache_s=3600.0)
    cached(settings, "old", 1, 4000.0)
    cached(settings, "young", 1, 3000.0)
    cached(settings, ".part-dead", 1, 90_000.0)
    cached(settings, ".part-alive", 1, 60.0)

    assert prune_cache(settings) == 1
    assert names(settings) == [".part-alive", "young"]


def test_what_somebody_uses_stays(site: Site) -> None:
    settings = limited(site.w1, artifact_cache_bytes=0)
    held = cached(settings, "held", 30, 100.0)
    cached(settings, "free", 30, 50.0)
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert prune_cache(settings) == 1
        assert names(settings) == ["held"]

    assert prune_cache(settings) == 1


def test_no_cache_is_nothing_to_prune(site: Site) -> None:
    assert prune_cache(site.w1) == 0


def test_a_fetch_makes_room_for_itself_and_a_use_counts(site: Site) -> None:
    site.local.put(site.file, HOUSE)
    old = cached(site.w1, "0" * 64, len(DATA), 100.0)
    settings = limited(site.w1, artifact_cache_bytes=len(DATA) + 10)
    worker = WorkerArtifacts(settings)

    found = worker.get(SHA, HOUSE)

    assert not old.exists()
    os.utime(found, (1.0, 1.0))
    worker.get(SHA, HOUSE)
    assert time.time() - found.stat().st_mtime < 60.0

"""Artifacts as workers see them: beside the store, or at the other end of an actor call."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.config import Settings, load_settings
from hcna_ray.core.errors import HcnaError, Invalid, ModeratorUnavailable, NotFound
from hcna_ray.runtime import artifacts as artifacts_module
from hcna_ray.runtime.artifacts import ArtifactServer, WorkerArtifacts, prune_cache

PART = 65_536
CONFIG = f"limits:\n  artifact_part_bytes: {PART}\n  disk_free_bytes_min: 0\n"
DATA = os.urandom(3 * PART + 17)
SHA = hashlib.sha256(DATA).hexdigest()


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
        self.server = ArtifactServer(self.m1)
        self.link = PaperLink(self.server)
        monkeypatch.setattr(artifacts_module, "ActorLink", lambda _name: self.link)
        self.local, self.remote = WorkerArtifacts(self.m1), WorkerArtifacts(self.w1)
        self.file = folder / "out.bin"
        self.file.write_bytes(DATA)

    @property
    def cache(self) -> list[str]:
        return sorted(path.name for path in (self.w1.home / "cache").iterdir())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_a_worker_beside_the_store_uses_it_directly(site: Site) -> None:
    assert site.local.put(site.file) == (SHA, len(DATA))
    assert site.local.get(SHA).read_bytes() == DATA
    assert set(site.link.calls) == {"identity"}  # And asks only once whose directory it is.
    assert site.link.calls.count("identity") == 1


def test_any_other_worker_sends_and_fetches_parts(site: Site) -> None:
    assert site.remote.put(site.file) == (SHA, len(DATA))
    assert site.link.calls.count("write") == 1 + 4
    found = site.remote.get(SHA)

    assert found.read_bytes() == DATA
    assert site.link.calls.count("read") == 4
    assert site.cache == [SHA]
    assert not os.access(found, os.W_OK) or os.geteuid() == 0


def test_what_is_in_the_cache_is_not_fetched_again(site: Site) -> None:
    site.local.put(site.file)
    site.remote.get(SHA)
    reads = site.link.calls.count("read")
    site.remote.get(SHA)

    assert site.link.calls.count("read") == reads


def test_an_upload_goes_on_where_it_stands(site: Site) -> None:
    site.server.write(SHA, len(DATA), 0, DATA[:PART])

    assert site.remote.put(site.file) == (SHA, len(DATA))
    assert site.link.calls.count("write") == 1 + 3


def test_what_is_there_is_not_sent_again(site: Site) -> None:
    site.local.put(site.file)
    site.link.calls.clear()

    assert site.remote.put(site.file) == (SHA, len(DATA))
    assert site.link.calls.count("write") == 1


def test_two_who_send_the_same_file_get_along(site: Site) -> None:
    sent: list[int] = []
    write = site.server.write

    def overtaken(sha256: str, total: int, offset: int, part: bytes) -> int:
        if part and not sent:
            sent.append(offset)
            write(sha256, total, offset, part)  # The other one was first.
        return write(sha256, total, offset, part)

    site.server.write = overtaken  # type: ignore[method-assign]

    assert site.remote.put(site.file) == (SHA, len(DATA))
    assert site.local.get(SHA).read_bytes() == DATA


def test_a_file_that_becomes_shorter_on_its_way_is_refused(site: Site) -> None:
    write = site.server.write

    def shorten(sha256: str, total: int, offset: int, part: bytes) -> int:
        site.file.write_bytes(DATA[:10])
        return write(sha256, total, offset, part)

    site.server.write = shorten  # type: ignore[method-assign]

    with pytest.raises(Invalid, match="shorter"):
        site.remote.put(site.file)


def test_an_empty_file_cannot_be_sent(site: Site) -> None:
    site.file.write_bytes(b"")

    with pytest.raises(Invalid, match="empty"):
        site.remote.put(site.file)


def test_what_nobody_has_is_not_found_here_or_there(site: Site) -> None:
    for worker in (site.local, site.remote):
        with pytest.raises(NotFound):
            worker.get("0" * 64)
    assert site.cache == []


@pytest.mark.parametrize("spoil", [lambda part: part[:-1] + b"x", lambda part: part[:0]])
def test_what_arrives_damaged_or_short_is_not_kept(site: Site, spoil: Any) -> None:
    site.local.put(site.file)
    site.link.spoil = spoil

    with pytest.raises(HcnaError, match="damaged"):
        site.remote.get(SHA)
    assert site.cache == []


def test_a_store_that_does_not_answer_is_asked_again_next_time(site: Site) -> None:
    site.link.faults = [ModeratorUnavailable("away")]
    with pytest.raises(ModeratorUnavailable):
        site.local.put(site.file)

    assert site.local.put(site.file) == (SHA, len(DATA))
    assert site.link.calls.count("identity") == 2


def test_a_directory_keeps_its_name_over_restarts(site: Site) -> None:
    assert ArtifactServer(site.m1).identity() == site.server.identity()
    assert ArtifactServer(site.w1).identity() != site.server.identity()


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
    site.local.put(site.file)
    old = cached(site.w1, "0" * 64, len(DATA), 100.0)
    settings = limited(site.w1, artifact_cache_bytes=len(DATA) + 10)
    worker = WorkerArtifacts(settings)

    found = worker.get(SHA)

    assert not old.exists()
    os.utime(found, (1.0, 1.0))
    worker.get(SHA)
    assert time.time() - found.stat().st_mtime < 60.0

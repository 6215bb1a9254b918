from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.errors import DiskFull, Invalid, NotFound, Overloaded, StoreUnavailable
from hcna_ray.store import artifacts
from hcna_ray.store.artifacts import (
    Artifact,
    ArtifactStore,
    ArtifactTooLarge,
    Maker,
    OffsetMismatch,
    Upload,
    checked_makers,
    checked_marks,
    makers_in,
    marks_in,
    put_makers,
    put_marks,
)

DATA = bytes(range(256)) * 40
SHA = hashlib.sha256(DATA).hexdigest()


class Now:
    def __init__(self) -> None:
        self.at = 1_000_000_000.0

    def __call__(self) -> float:
        return self.at


def a_store(root: Path, **changes: Any) -> ArtifactStore:
    bounds: dict[str, Any] = {
        "artifact_bytes_max": 100_000,
        "part_bytes_max": 20_000,
        "uploads_max": 2,
        "upload_idle_s": 3600.0,
        "disk_free_bytes_min": 1000,
        "now": Now(),
        "disk_free": lambda path: 1 << 40,
    }
    return ArtifactStore(root / "artifacts", **(bounds | changes))


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_bytes_come_back_under_their_digest_and_are_stored_once(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert store.put(DATA) == store.put(DATA, SHA.upper()) == Artifact(sha256=SHA, size=len(DATA))
    assert store.read(SHA, 256, 3) == b"\x00\x01\x02"
    assert files(tmp_path) == [SHA]
    assert store.path(SHA).stat().st_mode & 0o777 == 0o400
    assert a_store(tmp_path).find(SHA).size == len(DATA)


@pytest.mark.parametrize("name", ["0" * 64, "", "..", "../../etc/passwd", "parts", "g" * 64])
def test_what_is_not_here_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        a_store(tmp_path).open(name)


def test_a_wrong_digest_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="nothing was kept") as caught:
        a_store(tmp_path).put(DATA, "0" * 64)
    assert caught.value.code == "digest_mismatch"
    assert files(tmp_path) == []


def test_an_upload_goes_on_where_it_stood_after_a_restart(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert store.progress(SHA, len(DATA)) == Upload(sha256=SHA, size=len(DATA), received=0)
    store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:4000]])

    store = a_store(tmp_path)
    assert store.progress(SHA, len(DATA)) == Upload(sha256=SHA, size=len(DATA), received=4000)
    done = store.append(SHA, offset=4000, size=len(DATA), pieces=[DATA[4000:]])

    assert done == Artifact(sha256=SHA, size=len(DATA))
    assert store.path(SHA).read_bytes() == DATA
    assert store.uploads() == 0
    assert store.progress(SHA, len(DATA)) == done
    assert store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:10]]) == done


def test_a_part_from_elsewhere_is_refused_with_where_to_go_on(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(OffsetMismatch) as caught:
        store.append(SHA, offset=10, size=len(DATA), pieces=[b"x"])
    assert caught.value.received == 0
    store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:100]])
    for offset in (0, 99, 101):
        with pytest.raises(OffsetMismatch) as caught:
            store.append(SHA, offset=offset, size=len(DATA), pieces=[b"x"])
        assert caught.value.received == 100


def test_an_upload_of_other_bytes_starts_anew(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.append(SHA, offset=0, size=8, pieces=[b"some"])
    with pytest.raises(Invalid, match="SHA-256"):
        store.append(SHA, offset=4, size=8, pieces=[b"else"])
    assert store.progress(SHA, 8) == Upload(sha256=SHA, size=8, received=0)
    assert files(tmp_path) == []


def test_all_there_but_never_checked_is_finished_by_the_last_part(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:-10]])
    (part,) = (tmp_path / "artifacts" / "parts").iterdir()
    part.write_bytes(DATA)  # As after a crash between the last write and its check.

    store = a_store(tmp_path)
    found = store.progress(SHA, len(DATA))
    assert isinstance(found, Upload)
    assert found.received == len(DATA) - 1
    done = store.append(SHA, offset=len(DATA) - 1, size=len(DATA), pieces=[DATA[-1:]])
    assert done == Artifact(sha256=SHA, size=len(DATA))


def test_what_is_too_large_is_refused(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(ArtifactTooLarge):
        store.append(SHA, offset=0, size=100_001, pieces=[b"x"])
    with pytest.raises(ArtifactTooLarge):
        store.progress(SHA, 100_001)
    with pytest.raises(ArtifactTooLarge):
        store.put(b"x" * 20_001)
    with pytest.raises(ArtifactTooLarge):
        store.append(SHA, offset=0, size=50_000, pieces=[b"x" * 20_001])


def test_open_uploads_are_bounded_and_stale_ones_make_room(tmp_path: Path) -> None:
    now = Now()
    store = a_store(tmp_path, now=now)
    for digit in "12":
        store.append(digit * 64, offset=0, size=10, pieces=[b"x"])
        (part,) = (tmp_path / "artifacts" / "parts").glob(f"{digit}*")
        os.utime(part, (now.at, now.at))
    with pytest.raises(Overloaded):
        store.append("3" * 64, offset=0, size=10, pieces=[b"x"])

    now.at += 3601
    store.append("3" * 64, offset=0, size=10, pieces=[b"x"])
    assert store.uploads() == 1


def test_the_reserve_of_the_disk_is_kept(tmp_path: Path) -> None:
    store = a_store(tmp_path, disk_free=lambda path: 1500)
    store.put(b"x" * 500)
    with pytest.raises(DiskFull) as caught:
        store.put(b"x" * 501)
    assert caught.value.retry_after_s > 0
    with pytest.raises(DiskFull):
        store.append(SHA, offset=0, size=9000, pieces=[b"x" * 501])


def test_a_disk_that_fills_up_leaves_the_upload_where_it_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_store(tmp_path)
    store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:100]])
    real, calls = os.pwrite, 0

    def fails_halfway(descriptor: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "no space")
        return real(descriptor, data[:50], offset)

    monkeypatch.setattr(os, "pwrite", fails_halfway)
    with pytest.raises(DiskFull):
        store.append(SHA, offset=100, size=len(DATA), pieces=[DATA[100:300]])
    monkeypatch.undo()

    found = store.progress(SHA, len(DATA))
    assert isinstance(found, Upload)
    assert found.received == 100
    store.append(SHA, offset=100, size=len(DATA), pieces=[DATA[100:]])
    assert store.path(SHA).read_bytes() == DATA


def test_what_a_failed_fsync_was_about_does_not_count_as_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_store(tmp_path)
    store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:100]])

    def fails(_descriptor: int) -> None:
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreUnavailable):
        store.append(SHA, offset=100, size=len(DATA), pieces=[DATA[100:300]])
    with pytest.raises(StoreUnavailable):
        store.put(b"other")
    monkeypatch.undo()

    found = store.progress(SHA, len(DATA))
    assert isinstance(found, Upload)
    assert found.received == 100
    assert store.put(b"other").size == 5


def test_an_artifact_that_was_here_is_synced_before_it_is_acknowledged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever renamed it may have died before the sync of its directory."""
    store = a_store(tmp_path)
    path = store.path(store.put(DATA).sha256)
    synced: list[str] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    store.put(DATA)
    assert str(path.parent) in synced


def test_a_local_file_is_taken_in(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA * 3)
    store = a_store(tmp_path)
    found = store.put_file(source)
    assert store.path(found.sha256).read_bytes() == DATA * 3
    source.write_bytes(b"x" * 100_001)
    with pytest.raises(ArtifactTooLarge):
        store.put_file(source)


def test_the_same_parts_from_many_threads_make_one_artifact(tmp_path: Path) -> None:
    store, others = a_store(tmp_path), a_store(tmp_path)
    done: list[object] = []

    def upload(own: ArtifactStore) -> None:
        offset = 0
        while True:
            try:
                found = own.append(
                    SHA, offset=offset, size=len(DATA), pieces=[DATA[offset : offset + 100]]
                )
            except OffsetMismatch as error:
                offset = error.received
                continue
            if isinstance(found, Artifact):
                done.append(found)
                return
            offset = found.received

    threads = [threading.Thread(target=upload, args=(own,)) for own in (store, others) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert done == [Artifact(sha256=SHA, size=len(DATA))] * 4
    assert store.path(SHA).read_bytes() == DATA
    assert files(tmp_path) == [SHA]


# -- whose they are --------------------------------------------------------------------------------


def test_an_artifact_may_be_marked_as_somebodys(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert not store.own(SHA, "anna")
    store.put(DATA)
    assert not store.owned(SHA, "anna")

    assert store.own(SHA.upper(), "anna")
    assert store.own(SHA, "anna")

    again = a_store(tmp_path)
    assert again.owned(SHA.upper(), "anna")
    assert not again.owned(SHA, "ben")
    assert not again.owned("../" + SHA[3:], "anna")
    marks = [path for path in (tmp_path / "artifacts" / "owners").rglob("*") if path.is_file()]
    assert [(path.name, path.stat().st_size) for path in marks] == [(SHA, 0)]
    assert "anna" not in str(marks[0])


@pytest.mark.parametrize("owner", ["anna", "../../x", "a/b", "…"])
def test_what_somebody_sends_is_theirs(tmp_path: Path, owner: str) -> None:
    store = a_store(tmp_path)
    store.put(DATA, owner=owner)
    assert store.owned(SHA, owner)
    assert {path.parent.name for path in tmp_path.rglob(SHA)} >= {SHA[:2]}
    assert len(list((tmp_path / "artifacts" / "owners").iterdir())) == 1


def test_an_upload_of_what_is_here_is_complete_when_all_was_sent(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.put(DATA, owner="ben")
    size = len(DATA)

    assert store.progress(SHA, size, owner="anna") == Upload(sha256=SHA, size=size, received=0)
    with pytest.raises(OffsetMismatch) as caught:
        store.append(SHA, offset=size - 1, size=size, pieces=[DATA[-1:]], owner="anna")
    assert caught.value.received == 0
    first = store.append(SHA, offset=0, size=size, pieces=[DATA[:4000]], owner="anna")
    assert first == Upload(sha256=SHA, size=size, received=4000)
    assert store.progress(SHA, size, owner="ben") == Artifact(sha256=SHA, size=size)
    assert store.progress(SHA, size) == Artifact(sha256=SHA, size=size)
    last = store.append(SHA, offset=4000, size=size, pieces=[DATA[4000:]], owner="anna")
    assert last == Artifact(sha256=SHA, size=size)
    assert store.owned(SHA, "anna")
    assert store.uploads() == 0


def test_wrong_bytes_are_not_taken_for_those_that_are_here(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.put(DATA)
    wrong = b"\0" * len(DATA)

    with pytest.raises(Invalid, match="nothing was kept"):
        store.append(SHA, offset=0, size=len(DATA), pieces=[wrong], owner="anna")

    assert not store.owned(SHA, "anna")
    assert store.read(SHA, 0, len(DATA)) == DATA


def test_an_upload_that_was_cut_off_before_its_mark_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has its name already: what is sent again must not be written into it."""
    store = a_store(tmp_path)
    size = len(DATA)
    with monkeypatch.context() as broken:
        broken.setattr(store, "own", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            store.append(SHA, offset=0, size=size, pieces=[DATA], owner="anna")
    assert store.find(SHA).size == size

    assert store.progress(SHA, size, owner="anna") == Upload(sha256=SHA, size=size, received=0)
    store.append(SHA, offset=0, size=size, pieces=[DATA[:1000]], owner="anna")
    assert store.read(SHA, 0, size) == DATA
    store.append(SHA, offset=1000, size=size, pieces=[DATA[1000:]], owner="anna")
    assert store.owned(SHA, "anna")
    assert store.read(SHA, 0, size) == DATA


def test_marks_are_taken_elsewhere_with_what_they_mark(tmp_path: Path) -> None:
    store, other = a_store(tmp_path / "a"), a_store(tmp_path / "b")
    store.put(DATA, owner="anna")
    store.put(b"more", owner="anna")
    store.put(DATA, owner="ben")
    more = hashlib.sha256(b"more").hexdigest()

    marks = marks_in(tmp_path / "a" / "artifacts", {SHA})
    assert sorted(map(list, marks.values())) == [[SHA], [SHA]]
    other.put(DATA)
    put_marks(tmp_path / "b" / "artifacts", checked_marks(json.loads(json.dumps(marks))))
    put_marks(tmp_path / "b" / "artifacts", marks)

    assert other.owned(SHA, "anna")
    assert other.owned(SHA, "ben")
    assert not other.own(more, "anna")
    assert marks_in(tmp_path / "c", {SHA}) == {}


@pytest.mark.parametrize(
    "data", [[], {"../x": []}, {"a" * 32: "x"}, {"a" * 32: ["../y"]}, {"a" * 32: [1]}]
)
def test_marks_from_elsewhere_are_looked_at(data: object) -> None:
    with pytest.raises(ValueError, match="it"):
        checked_marks(data)


ANNAS, BENS = Maker("anna", "echo", "lab"), Maker("ben", "echo", "lab")


def test_what_a_task_has_made_is_its_principals_and_known_by_its_kind(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(NotFound):
        store.made(SHA, ANNAS)
    assert store.makers(SHA) == store.makers("../" + SHA[3:]) == []
    store.put(DATA)

    store.made(SHA.upper(), ANNAS)
    store.made(SHA, BENS)
    store.made(SHA, ANNAS)

    again = a_store(tmp_path)
    assert again.makers(SHA.upper()) == [ANNAS, BENS]
    assert [again.owned(SHA, who) for who in ("anna", "ben", "carl")] == [True, True, False]
    (noted,) = (tmp_path / "artifacts" / "makers").rglob(SHA)
    assert noted.stat().st_mode & 0o777 == 0o600


def test_makers_that_come_at_once_are_all_noted(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.put(DATA)
    makers = [Maker("anna", "echo", f"q{number}") for number in range(20)]
    threads = [threading.Thread(target=store.made, args=(SHA, maker)) for maker in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(store.makers(SHA)) == sorted(makers)


def test_only_so_many_kinds_of_makers_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "MAKERS_MAX", 1)
    store = a_store(tmp_path)
    store.put(DATA)
    store.made(SHA, ANNAS)
    store.made(SHA, BENS)
    assert store.makers(SHA) == [ANNAS]
    assert store.owned(SHA, "ben")


def test_makers_are_taken_elsewhere_with_what_they_have_made(tmp_path: Path) -> None:
    store, other = a_store(tmp_path / "a"), a_store(tmp_path / "b")
    more = store.put(b"more").sha256
    store.put(DATA)
    store.made(SHA, ANNAS)
    store.made(more, ANNAS)

    makers = makers_in(tmp_path / "a" / "artifacts", {SHA})
    assert makers == {SHA: [list(ANNAS)]}
    other.put(DATA)
    other.made(SHA, BENS)
    for _ in range(2):
        put_makers(tmp_path / "b" / "artifacts", checked_makers(json.loads(json.dumps(makers))))
    put_makers(tmp_path / "b" / "artifacts", {})

    assert other.makers(SHA) == [BENS, ANNAS]
    assert makers_in(tmp_path / "c", {SHA}) == {}


@pytest.mark.parametrize(
    "data", [[], {"../x": []}, {SHA: "x"}, {SHA: ["abc"]}, {SHA: [["a", "b"]]}, {SHA: [[1, 2, 3]]}]
)
def test_makers_from_elsewhere_are_looked_at(data: object) -> None:
    with pytest.raises(ValueError, match="it"):
        checked_makers(data)


def test_idle_uploads_of_owners_are_swept_and_counted(tmp_path: Path) -> None:
    now = Now()
    store = a_store(tmp_path, now=now)
    for owner in ("anna", "ben"):
        store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:10]], owner=owner)
    with pytest.raises(Overloaded):
        store.append(SHA, offset=0, size=len(DATA), pieces=[DATA[:10]])
    for path in (tmp_path / "artifacts" / "parts").iterdir():
        os.utime(path, (now.at, now.at))
    now.at += 3601
    assert store.sweep() == 2


# -- how many uploads there may be -----------------------------------------------------------------


def begin(store: ArtifactStore, number: int, owner: str | None = None) -> None:
    """Begin the upload of a file of its own."""
    store.append(f"{number:064x}", offset=0, size=10, pieces=[b"x"], owner=owner)


def test_one_owner_cannot_keep_others_from_uploading(tmp_path: Path) -> None:
    store = a_store(tmp_path, uploads_max=64)
    for number in range(16):
        begin(store, number, "anna")
    with pytest.raises(Overloaded, match="16 uploads of 'anna' are open"):
        begin(store, 16, "anna")

    begin(store, 17, "ben")
    begin(store, 18)
    begin(store, 0, "ben")  # The same bytes: anna's is not in the way.
    assert store.uploads() == 19


def test_room_is_kept_for_uploads_of_nobody(tmp_path: Path) -> None:
    store = a_store(tmp_path, uploads_max=8)
    for number in range(6):
        begin(store, number, f"user{number // 2}")
    with pytest.raises(Overloaded, match="6 uploads are open"):
        begin(store, 6, "anna")

    begin(store, 7)
    begin(store, 8)
    with pytest.raises(Overloaded, match="8 uploads are open"):
        begin(store, 9)


def test_an_upload_that_stands_still_makes_room_for_its_owner_alone(tmp_path: Path) -> None:
    now = Now()
    store = a_store(tmp_path, uploads_max=4, upload_idle_s=86400.0, now=now)
    parts = tmp_path / "artifacts" / "parts"
    for number, owner in enumerate(("anna", "ben", None, None)):
        begin(store, number, owner)
        (part,) = parts.glob(f"{number:064x}*")
        os.utime(part, (now.at + number, now.at + number))
    now.at += 3600
    with pytest.raises(Overloaded):
        begin(store, 4)
    now.at += 60
    with pytest.raises(Overloaded):
        begin(store, 5, "carl")  # Of his own nothing stands still.

    begin(store, 6)
    assert not list(parts.glob(f"{2:064x}*"))
    begin(store, 7, "anna")
    assert not list(parts.glob(f"{0:064x}*"))
    assert store.uploads() == 4
    found = store.progress(f"{1:064x}", 10, owner="ben")
    assert isinstance(found, Upload)
    assert found.received == 1


def test_an_upload_to_which_a_part_is_being_added_makes_no_room(tmp_path: Path) -> None:
    now = Now()
    store = a_store(tmp_path, uploads_max=4, upload_idle_s=86400.0, now=now)
    begin(store, 1, "anna")
    (part,) = (tmp_path / "artifacts" / "parts").iterdir()
    os.utime(part, (now.at, now.at))
    now.at += 3601
    with part.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Overloaded):
            begin(store, 2, "anna")
    begin(store, 2, "anna")
    assert store.uploads() == 1

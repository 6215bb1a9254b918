from __future__ import annotations

import hashlib
import io
from pathlib import Path

import httpx
import pytest

from hcna_ray.client import ApiError, Client, DigestMismatch, NotFound, UnexpectedAnswer
from hcna_ray.client.plans import PART_BYTES
from tests.support.fake_c1 import FakeC1, Reply, Seen, problem

CONTENT = bytes(range(256)) * (PART_BYTES // 256 * 2) + b"tail"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def parts_of(c1: FakeC1) -> list[str]:
    return [seen.headers["content-range"] for seen in c1.requests if seen.method == "PUT"]


def test_an_upload_asks_first_then_sends_parts(client: Client, c1: FakeC1) -> None:
    seen: list[tuple[int, int]] = []

    artifact = client.upload(CONTENT, progress=lambda done, total: seen.append((done, total)))

    assert (artifact.sha256, artifact.size) == (SHA256, len(CONTENT))
    assert c1.artifacts[SHA256] == CONTENT
    assert parts_of(c1) == [
        f"bytes */{len(CONTENT)}",
        f"bytes 0-{PART_BYTES - 1}/{len(CONTENT)}",
        f"bytes {PART_BYTES}-{2 * PART_BYTES - 1}/{len(CONTENT)}",
        f"bytes {2 * PART_BYTES}-{len(CONTENT) - 1}/{len(CONTENT)}",
    ]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_what_c1_has_is_not_sent(client: Client, c1: FakeC1) -> None:
    c1.artifacts[SHA256] = CONTENT
    client.upload(CONTENT)
    assert len(c1.requests) == 1


def test_an_upload_goes_on_where_an_earlier_one_stopped(client: Client, c1: FakeC1) -> None:
    c1.partial[SHA256] = bytearray(CONTENT[:PART_BYTES])
    client.upload(io.BytesIO(CONTENT))
    assert parts_of(c1)[1].startswith(f"bytes {PART_BYTES}-")


def test_a_part_whose_answer_was_lost_is_not_stored_twice(client: Client, c1: FakeC1) -> None:
    def lose(seen: Seen) -> None:
        raise httpx.ReadError("reset")

    c1.after.extend([lambda seen: None, lose])
    client.upload(CONTENT)
    assert c1.artifacts[SHA256] == CONTENT


def test_an_offset_that_never_moves_is_given_up(client: Client, c1: FakeC1) -> None:
    c1.script.extend(
        [lambda seen: None] + [problem(409, "offset_mismatch", received=5) for _ in range(9)]
    )
    with pytest.raises(UnexpectedAnswer, match="stays at byte"):
        client.upload(CONTENT)


def test_a_file_that_changed_on_the_way_is_refused(
    client: Client, tmp_path: Path, c1: FakeC1
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")

    def change(seen: Seen) -> None:
        path.write_bytes(b"xyz")

    c1.after.append(change)
    with pytest.raises(ApiError) as caught:
        client.upload(path)
    assert caught.value.code == "digest_mismatch"


def test_nothing_can_be_uploaded_too(client: Client, tmp_path: Path) -> None:
    artifact = client.upload(b"")
    assert artifact.sha256 == hashlib.sha256(b"").hexdigest()
    target = client.download(artifact.sha256, tmp_path / "empty")
    assert target.read_bytes() == b""


def test_a_pipe_is_spooled(client: Client, c1: FakeC1) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    client.upload(Pipe(b"from a pipe"))
    assert b"from a pipe" in c1.artifacts.values()


def test_a_file_is_uploaded_from_where_it_stands_and_left_open(client: Client, c1: FakeC1) -> None:
    file = io.BytesIO(b"skip this")
    file.seek(5)
    client.upload(file)
    assert b"this" in c1.artifacts.values()
    assert not file.closed


def test_a_download_comes_in_parts_and_is_checked(
    client: Client, c1: FakeC1, tmp_path: Path
) -> None:
    c1.artifacts[SHA256] = CONTENT
    seen: list[tuple[int, int]] = []

    target = client.download(SHA256, tmp_path, lambda done, total: seen.append((done, total)))

    assert target == tmp_path / SHA256
    assert target.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == [SHA256]


def test_a_lost_part_is_asked_for_again_alone(client: Client, c1: FakeC1, tmp_path: Path) -> None:
    c1.artifacts[SHA256] = CONTENT

    def lose(seen: Seen) -> None:
        raise httpx.ReadError("reset")

    c1.after.extend([lambda seen: None, lose])
    client.download(SHA256, tmp_path / "file")
    ranges = [seen.headers["range"] for seen in c1.requests]
    assert ranges.count(ranges[1]) == 2
    assert len(ranges) == 4


def test_wrong_bytes_never_reach_the_target(client: Client, c1: FakeC1, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")
    c1.artifacts[SHA256] = b"something else"
    with pytest.raises(DigestMismatch):
        client.download(SHA256, target)
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_artifact_leaves_no_file(client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        client.download(SHA256, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_c1_without_ranges_still_works(client: Client, c1: FakeC1, tmp_path: Path) -> None:
    c1.script.append(Reply(200, b"whole"))
    sha256 = hashlib.sha256(b"whole").hexdigest()
    assert client.download(sha256, tmp_path / "f").read_bytes() == b"whole"

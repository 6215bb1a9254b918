from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from hcna_ray.client import (
    ApiError,
    AsyncClient,
    Client,
    ConnectionFailed,
    DigestMismatch,
    NotFound,
    UnexpectedAnswer,
    plans,
)
from hcna_ray.client.plans import PART_BYTES, Planner
from tests.support.fake_c1 import FakeC1, Reply, Seen, problem
from tests.support.fake_time import FakeTime

URL = "http://c1.test"

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


def test_a_lost_span_is_asked_for_again_alone(
    client: Client, c1: FakeC1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "SPAN_BYTES", PART_BYTES)
    c1.artifacts[SHA256] = CONTENT

    def lose(seen: Seen) -> None:
        raise httpx.ReadError("reset")

    c1.after.extend([lambda seen: None, lose])
    client.download(SHA256, tmp_path / "file")
    ranges = [seen.headers["range"] for seen in c1.requests]
    assert ranges.count(ranges[1]) == 2
    assert len(ranges) == 4


class Breaking(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        raise httpx.ReadError("reset")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def c1_that_breaks_off(after: int, asked: list[str]) -> httpx.MockTransport:
    """C1 whose every answer but those of two bytes or less breaks off after some bytes."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["range"])
        first = int(asked[-1].removeprefix("bytes=").partition("-")[0])
        headers = {"Content-Range": f"bytes {first}-{len(SHORT) - 1}/{len(SHORT)}"}
        rest = SHORT[first:]
        if len(rest) <= after:
            return httpx.Response(206, headers=headers, content=rest)
        return httpx.Response(206, headers=headers, stream=Breaking([rest[:after]]))

    return httpx.MockTransport(answer)


SHORT = b"0123456789"


def test_a_span_that_breaks_off_goes_on_where_it_stopped(planner: Planner, tmp_path: Path) -> None:
    asked: list[str] = []
    digest = hashlib.sha256(SHORT).hexdigest()
    transport = c1_that_breaks_off(4, asked)
    with Client(URL, transport=transport, planner=planner, sleep=lambda _: None) as client:
        assert client.download(digest, tmp_path / "file").read_bytes() == SHORT
    assert [one.partition("-")[0] for one in asked] == ["bytes=0", "bytes=4", "bytes=8"]


def test_one_that_never_goes_on_ends_and_leaves_nothing(
    planner: Planner, time: FakeTime, tmp_path: Path
) -> None:
    transport = c1_that_breaks_off(0, [])
    with (
        Client(URL, transport=transport, planner=planner, sleep=time.sleep) as client,
        pytest.raises(ConnectionFailed),
    ):
        client.download(SHA256, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_patience_begins_anew_when_bytes_have_come(
    planner: Planner, time: FakeTime, tmp_path: Path
) -> None:
    """Each try brings one byte and takes longer than patience lasts."""
    digest = hashlib.sha256(SHORT).hexdigest()
    asked: list[str] = []
    answer = c1_that_breaks_off(1, asked)

    def slowly(request: httpx.Request) -> httpx.Response:
        time.sleep(40.0)
        return answer.handler(request)  # type: ignore[return-value]

    slow = httpx.MockTransport(slowly)
    with Client(URL, transport=slow, planner=planner, sleep=time.sleep) as client:
        assert client.download(digest, tmp_path / "file").read_bytes() == SHORT
    assert len(asked) == len(SHORT)


@pytest.mark.parametrize("span", ["bytes 3-9/10", "bytes 0-9/*", "nonsense"])
def test_a_span_that_is_not_the_one_asked_for_is_refused_before_its_bytes(
    planner: Planner, tmp_path: Path, span: str
) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(206, headers={"Content-Range": span}, content=SHORT)

    transport = httpx.MockTransport(answer)
    with (
        Client(URL, transport=transport, planner=planner, sleep=lambda _: None) as client,
        pytest.raises(UnexpectedAnswer),
    ):
        client.download(SHA256, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_c1_that_stops_honouring_ranges_is_refused(planner: Planner, tmp_path: Path) -> None:
    answers = iter(
        [
            httpx.Response(
                206, headers={"Content-Range": "bytes 0-9/10"}, stream=Breaking([SHORT[:4]])
            ),
            httpx.Response(200, content=SHORT),
        ]
    )
    transport = httpx.MockTransport(lambda _: next(answers))
    with (
        Client(URL, transport=transport, planner=planner, sleep=lambda _: None) as client,
        pytest.raises(UnexpectedAnswer),
    ):
        client.download(SHA256, tmp_path / "file")


def test_an_asynchronous_download_goes_on_as_well(planner: Planner, tmp_path: Path) -> None:
    asked: list[str] = []
    digest = hashlib.sha256(SHORT).hexdigest()

    async def scenario() -> None:
        async with AsyncClient(
            URL, transport=c1_that_breaks_off(4, asked), planner=planner, sleep=no_sleep
        ) as client:
            target = await client.download(digest, tmp_path / "file")
            assert target.read_bytes() == SHORT

    asyncio.run(scenario())
    assert len(asked) == 3


async def no_sleep(_: float) -> None:
    return


def test_memory_does_not_grow_with_the_artifact(planner: Planner, tmp_path: Path) -> None:
    """What a landing is given goes to the file at once."""
    landing = plans.Landing(tmp_path / "file", URL)
    landing.open()
    landing.begin(plans.Answer(206, {"content-range": "bytes 0-9/10"}, b""))
    landing.take(SHORT[:5])
    (partial,) = tmp_path.iterdir()
    assert partial.read_bytes() == SHORT[:5]
    landing.discard()
    assert list(tmp_path.iterdir()) == []


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

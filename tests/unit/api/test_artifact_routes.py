from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hcna_ray.api.schemas import UploadOut
from tests.support.c1 import Composite, a_composite

DATA = bytes(range(250)) * 8000
SHA = hashlib.sha256(DATA).hexdigest()


async def test_a_small_file_goes_up_whole(c1: Composite) -> None:
    reply = await c1.http.put("/artifacts", content=b"hello")

    sha = hashlib.sha256(b"hello").hexdigest()
    assert reply.status_code == 201
    assert reply.json() == {"sha256": sha, "size": 5, "uri": f"/artifacts/{sha}"}
    UploadOut.model_validate(reply.json())
    assert (await c1.http.get(reply.headers["location"])).content == b"hello"


async def test_an_empty_file_is_a_file(c1: Composite) -> None:
    reply = await c1.http.put("/artifacts", content=b"")
    back = await c1.http.get(reply.json()["uri"])
    assert (back.status_code, back.content, back.headers["content-length"]) == (200, b"", "0")


async def test_parts_are_resumed_and_come_back_equal(c1: Composite) -> None:
    size, half = len(DATA), len(DATA) // 2
    url = f"/artifacts?sha256={SHA}"
    asked = await c1.http.put(url, headers={"Content-Range": f"bytes */{size}"})
    assert (asked.status_code, asked.json()) == (
        202,
        {"sha256": SHA, "received": 0, "size": size},
    )
    first = {"Content-Range": f"bytes 0-{half - 1}/{size}"}
    assert (await c1.http.put(url, headers=first, content=DATA[:half])).status_code == 202

    again = await c1.http.put(url, headers=first, content=DATA[:half])
    assert (again.status_code, again.json()["code"]) == (409, "offset_mismatch")
    assert again.json()["received"] == half

    rest = {"Content-Range": f"bytes {half}-{size - 1}/{size}"}
    done = await c1.http.put(url, headers=rest, content=DATA[half:])
    assert (done.status_code, done.json()["size"]) == (201, size)
    back = await c1.http.get(f"/artifacts/{SHA}")
    assert hashlib.sha256(back.content).hexdigest() == SHA


async def test_a_download_is_safe_to_open_and_can_be_cached(c1: Composite) -> None:
    await c1.http.put("/artifacts", content=b"<script>alert(1)</script>")
    sha = hashlib.sha256(b"<script>alert(1)</script>").hexdigest()
    reply = await c1.http.get(f"/artifacts/{sha}")

    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["content-disposition"].startswith("attachment")
    etag = reply.headers["etag"]
    same = await c1.http.get(f"/artifacts/{sha}", headers={"If-None-Match": etag})
    assert (same.status_code, same.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        ("bytes=0-0", 206, 0, 0),
        ("bytes=10-19", 206, 10, 19),
        ("bytes=1999990-", 206, 1_999_990, 1_999_999),
        ("bytes=-5", 206, 1_999_995, 1_999_999),
        ("bytes=0-99999999", 206, 0, 1_999_999),
        ("bytes=600000-1200000", 206, 600_000, 1_200_000),
        ("bytes=5-1", 200, 0, 1_999_999),
        ("bytes=0-1,4-5", 200, 0, 1_999_999),
        ("lines=1-2", 200, 0, 1_999_999),
    ],
)
async def test_ranges(c1: Composite, asked: str, status: int, first: int, last: int) -> None:
    await c1.http.put("/artifacts", content=DATA)

    reply = await c1.http.get(f"/artifacts/{SHA}", headers={"Range": asked})
    head = await c1.http.head(f"/artifacts/{SHA}", headers={"Range": asked})

    assert (reply.status_code, reply.content) == (status, DATA[first : last + 1])
    assert head.status_code == status
    assert head.headers["content-length"] == str(last - first + 1)
    if status == 206:
        assert reply.headers["content-range"] == f"bytes {first}-{last}/{len(DATA)}"


async def test_a_range_behind_the_end_and_one_of_another_version(c1: Composite) -> None:
    await c1.http.put("/artifacts", content=DATA)
    reply = await c1.http.get(f"/artifacts/{SHA}", headers={"Range": f"bytes={len(DATA)}-"})
    assert (reply.status_code, reply.json()["code"]) == (416, "range_not_satisfiable")
    assert reply.headers["content-range"] == f"bytes */{len(DATA)}"
    whole = await c1.http.get(
        f"/artifacts/{SHA}", headers={"Range": "bytes=0-1", "If-Range": '"other"'}
    )
    assert whole.status_code == 200


async def test_a_full_disk_is_a_507(c1: Composite) -> None:
    c1.disk["free"] = 0
    reply = await c1.http.put("/artifacts", content=b"x")
    assert (reply.status_code, reply.json()["code"]) == (507, "disk_full")
    assert int(reply.headers["retry-after"]) > 0


async def test_open_uploads_are_bounded(tmp_path: Path) -> None:
    async with a_composite(tmp_path, limits={"artifact_uploads_max": 1}) as c1:
        headers = {"Content-Range": "bytes 0-0/2"}
        for digit, status in (("1", 202), ("2", 503)):
            reply = await c1.http.put(
                f"/artifacts?sha256={digit * 64}", headers=headers, content=b"x"
            )
            assert reply.status_code == status

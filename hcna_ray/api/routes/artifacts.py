"""Artifacts: bytes by their SHA-256, up in parts that can be resumed, down in ranges."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO, TypeVar

from starlette.responses import Response, StreamingResponse

from hcna_ray.api.admission import Sort
from hcna_ray.api.policy import Check, Policy
from hcna_ray.api.problems import RangeNotSatisfiable, refuse_field
from hcna_ray.api.routing import Call, Routes, answer
from hcna_ray.api.schemas import ArtifactQuery, UploadOut
from hcna_ray.store.artifacts import Artifact, Upload

routes = Routes("artifacts")

OCTETS = "application/octet-stream"
CHUNK = 1024 * 1024
#: Smaller pieces of a body are put together: each costs an object.
CRUMB_BYTES = 64 * 1024

_PART = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})\Z")
_ASK = re.compile(r"bytes \*/([0-9]{1,18})\Z")
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})\Z")

#: What a download may be asked for beside the whole.
_ASKED = {
    "Range": "One range of bytes; anything else is ignored.",
    "If-Range": "The ETag for which the range is meant.",
    "If-None-Match": "ETags that are known already.",
}

T = TypeVar("T")


async def _on_file_thread(call: Call, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(call.services.files, work)


@routes.add(
    "PUT",
    "/artifacts",
    policy=Policy(role="submitter", check=Check.ARTIFACT),
    sort=Sort.UPLOAD,
    body=OCTETS,
    body_optional=True,
    query=ArtifactQuery,
    headers={"Content-Range": "Which part this is, or ``bytes */total`` to ask how much is here."},
    answers={201: UploadOut, 202: UploadOut},
    problems=(409, 507),
)
async def put_artifact(call: Call) -> Response:
    """Upload an artifact, whole or in parts of at most 8 MiB.

    Whole: no Content-Range. A part: ``Content-Range: bytes a-b/total`` and ``?sha256=`` of the
    whole. With ``bytes */total`` and no body the answer says how much is here. 201: complete; 202:
    more is wanted from byte ``received``; 409 ``offset_mismatch`` names that byte too.
    """
    store = call.services.artifacts
    owner = None if call.key.sees_all else call.key.owner
    sha256 = call.query(ArtifactQuery).sha256
    said = call.request.headers.getlist("content-range")
    if not said:
        data = await call.request.body()
        return _uploaded(await _on_file_thread(call, lambda: store.put(data, sha256, owner=owner)))
    pieces = await _pieces(call)
    received = sum(map(len, pieces))
    if sha256 is None:
        raise refuse_field("sha256", "a part needs ?sha256=<digest of the whole>")
    if len(said) == 1 and (asked := _ASK.match(said[0])):
        if pieces:
            raise refuse_field("Content-Range", "'bytes */total' asks, and comes without a body")
        size = int(asked[1])
        return _uploaded(
            await _on_file_thread(call, lambda: store.progress(sha256, size, owner=owner))
        )
    part = _PART.match(said[0]) if len(said) == 1 else None
    if part is None:
        raise refuse_field("Content-Range", "must be 'bytes a-b/total' or 'bytes */total'")
    first, last, size = int(part[1]), int(part[2]), int(part[3])
    if last < first or last >= size or last - first + 1 != received:
        raise refuse_field(
            "Content-Range", f"says {said[0]!r}, which does not fit a body of {received} bytes"
        )
    result = await _on_file_thread(
        call,
        lambda: store.append(sha256, offset=first, size=size, pieces=pieces, owner=owner),
    )
    return _uploaded(result)


async def _pieces(call: Call) -> list[bytes]:
    """Return a body as it came: joining all of it would copy it once more. Crumbs are joined."""
    pieces: list[bytes] = []
    crumbs = bytearray()
    async for piece in call.request.stream():
        if len(piece) >= CRUMB_BYTES:
            if crumbs:
                pieces.append(bytes(crumbs))
                crumbs.clear()
            pieces.append(piece)
            continue
        crumbs += piece
        if len(crumbs) >= CRUMB_BYTES:
            pieces.append(bytes(crumbs))
            crumbs.clear()
    if crumbs:
        pieces.append(bytes(crumbs))
    return pieces


def _uploaded(result: Artifact | Upload) -> Response:
    if isinstance(result, Upload):
        view = {"sha256": result.sha256, "received": result.received, "size": result.size}
        return answer(view, 202)
    uri = f"/artifacts/{result.sha256}"
    view = {"sha256": result.sha256, "size": result.size, "uri": uri}
    return answer(view, 201, {"Location": uri})


@routes.add(
    "GET",
    "/artifacts/{sha256}",
    policy=Policy(role="viewer", check=Check.ARTIFACT),
    sort=Sort.READ,
    headers=_ASKED,
    answers={200: OCTETS, 206: OCTETS, 304: ""},
    problems=(404, 416),
)
async def get_artifact(call: Call) -> Response:
    """Download an artifact, or with Range a part of it."""
    return await _download(call, with_body=True)


@routes.add(
    "HEAD",
    "/artifacts/{sha256}",
    policy=Policy(role="viewer", check=Check.ARTIFACT),
    sort=Sort.READ,
    headers=_ASKED,
    answers={200: "", 206: "", 304: ""},
    problems=(404, 416),
)
async def head_artifact(call: Call) -> Response:
    """Say how large an artifact is."""
    return await _download(call, with_body=False)


async def _download(call: Call, *, with_body: bool) -> Response:
    store = call.services.artifacts
    name = call.path("sha256")
    found = await _on_file_thread(call, lambda: store.find(name))
    etag = f'"{found.sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": f'attachment; filename="{found.sha256}"',
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }
    known = call.request.headers.get("if-none-match", "")
    if known == "*" or etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    span = _span(call, found.size, etag)
    status, (first, length) = (200, (0, found.size)) if span is None else (206, span)
    if span is not None:
        headers["Content-Range"] = f"bytes {first}-{first + length - 1}/{found.size}"
    headers["Content-Length"] = str(length)
    if not with_body or not length:
        return Response(status_code=status, headers=headers, media_type=OCTETS)
    stream = await _on_file_thread(call, lambda: store.open(name))
    return StreamingResponse(
        _chunks(call, stream, first, length), status, headers, media_type=OCTETS
    )


def _span(call: Call, size: int, etag: str) -> tuple[int, int] | None:
    """Return offset and length of the range asked for; ``None`` means all of it.

    What is not a single byte range is ignored, as HTTP allows.
    """
    asked = _RANGE.match(call.request.headers.get("range", ""))
    condition = call.request.headers.get("if-range")
    if asked is None or asked[0] == "bytes=-" or (condition is not None and condition != etag):
        return None
    if not asked[1]:
        length = min(int(asked[2]), size)
        if not length:
            raise RangeNotSatisfiable(size)
        return size - length, length
    first = int(asked[1])
    last = min(int(asked[2]) if asked[2] else size - 1, size - 1)
    if asked[2] and int(asked[2]) < first:
        return None
    if first >= size:
        raise RangeNotSatisfiable(size)
    return first, last - first + 1


async def _chunks(call: Call, stream: BinaryIO, first: int, length: int) -> AsyncIterator[bytes]:
    """Yield a span of a file. The next piece is read while the last one is on its way."""
    loop, descriptor = asyncio.get_running_loop(), stream.fileno()

    def read(offset: int) -> asyncio.Future[bytes]:
        size = min(CHUNK, first + length - offset)
        return loop.run_in_executor(call.services.files, os.pread, descriptor, size, offset)

    offset, ahead = first, read(first)
    try:
        while offset < first + length:
            chunk = await ahead
            if not chunk:
                raise OSError("the artifact is shorter than its size")
            offset += len(chunk)
            if offset < first + length:
                ahead = read(offset)
            yield chunk
    finally:
        # A thread may still be reading: closed now, the number could be another file's by then.
        ahead.add_done_callback(lambda _: stream.close())

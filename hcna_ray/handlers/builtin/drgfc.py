"""``drgfc.compress`` and ``drgfc.decompress``: one file in, one file out, bit for bit.

An open stand-in: the format is one Zstandard frame (RFC 8878) that states the size of its content
and ends with a checksum. Decompression insists on both, so that a cut, extended or altered file, or
one that would not fit, is refused and leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, Self

import zstandard
from pydantic import BaseModel, Field, model_validator

from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.errors import ArtifactNotFound, Reject
from hcna_ray.handlers.files import CHUNK_BYTES, AtomicOutput, BoundedWriter, chunks, open_regular
from hcna_ray.handlers.paths import OptionalWorkerPath
from hcna_ray.handlers.registry import Payload, task

SUFFIX = ".drgfc"
OUTPUT_BYTES_MAX = 16 << 30
#: Input handed to the decompressor at once. Four bytes can stand for 128 KiB, so 4 KiB of a hostile
#: file can take up to 128 MiB of memory at once; honest files do not notice.
_FEED_BYTES = 4 << 10
#: Largest window a frame may ask for; level 19 needs 8 MiB.
_WINDOW_BYTES_MAX = 128 << 20
_HEADER_BYTES_MAX = 18


class _FilePayload(Payload):
    """Where the bytes come from and where they go."""

    input_file: OptionalWorkerPath = Field(
        default=None, description="File on the worker, below its disk path."
    )
    artifact: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="Instead of input_file: sha256 of a stored artifact.",
    )
    output_file: OptionalWorkerPath = Field(
        default=None,
        description="File on the worker to write, replaced if it exists; else an artifact is made.",
    )

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.input_file is None) == (self.artifact is None):
            raise ValueError("give either input_file or artifact")
        if self.output_file is not None and self.output_file == self.input_file:
            raise ValueError("output_file must differ from input_file")
        return self


class CompressPayload(_FilePayload):
    """What to compress."""

    level: int = Field(default=3, ge=1, le=19, description="1 is fastest, 19 smallest.")


class DecompressPayload(_FilePayload):
    """What to decompress."""

    max_output_bytes: int = Field(
        default=OUTPUT_BYTES_MAX, ge=0, le=OUTPUT_BYTES_MAX, description="Refuse to write more."
    )


class FileResult(BaseModel):
    """What was read and written."""

    input_bytes: int
    output_bytes: int
    #: Uncompressed size by compressed size; 0 for an empty file.
    ratio: float
    #: Uncompressed megabytes (10^6 bytes) per second.
    mb_per_s: float
    input_sha256: str
    output_sha256: str
    #: Path on the worker, if ``output_file`` was given.
    output_file: str | None = None
    #: SHA-256 of the stored artifact otherwise.
    artifact: str | None = None


@task("drgfc.compress", payload=CompressPayload, result=FileResult, stand_in=True)
def compress(payload: CompressPayload, ctx: TaskContext) -> FileResult:
    """Compress a file or an artifact."""
    return _Job(payload, ctx, "compress").run(level=payload.level)


@task("drgfc.decompress", payload=DecompressPayload, result=FileResult, stand_in=True)
def decompress(payload: DecompressPayload, ctx: TaskContext) -> FileResult:
    """Restore what drgfc.compress made, checked against its checksum."""
    return _Job(payload, ctx, "decompress").run(bytes_max=payload.max_output_bytes)


class _Job:
    """One file through the codec: opens both ends, reports progress, accounts for the bytes."""

    def __init__(
        self, payload: _FilePayload, ctx: TaskContext, way: Literal["compress", "decompress"]
    ) -> None:
        self._payload, self._ctx, self._way = payload, ctx, way
        self._digest = hashlib.sha256()
        self._read = 0
        self._size = 0

    def run(self, *, level: int = 3, bytes_max: int = OUTPUT_BYTES_MAX) -> FileResult:
        field, source_path, name = self._source()
        target = self._target(source_path, name)
        started = time.perf_counter()
        with ExitStack() as stack:
            source = stack.enter_context(open_regular(source_path, field=field))
            self._size = source.seek(0, 2)
            source.seek(0)
            output = stack.enter_context(
                AtomicOutput(
                    target,
                    owner=self._ctx.task_id,
                    fence=str(self._ctx.fence),
                    field="payload.output_file",
                    bytes_max=min(bytes_max, self._ctx.limits.output_bytes_max),
                    reserve_bytes=self._ctx.limits.disk_reserve_bytes,
                )
            )
            if self._way == "compress":
                self._compress(source, output.writer, level)
            else:
                self._decompress(source, output.writer, field)
            self._ctx.raise_if_cancelled()
        elapsed = max(time.perf_counter() - started, 1e-9)
        written = output.writer
        plain, packed = (self._read, written.size)[:: 1 if self._way == "compress" else -1]
        stored = None if self._payload.output_file else self._ctx.artifact(target)
        self._ctx.progress(100.0, f"{self._read} bytes read, {written.size} written")
        return FileResult(
            input_bytes=self._read,
            output_bytes=written.size,
            ratio=round(plain / packed, 4) if packed else 0.0,
            mb_per_s=round(plain / 1e6 / elapsed, 2),
            input_sha256=self._digest.hexdigest(),
            output_sha256=written.sha256,
            output_file=str(target) if stored is None else None,
            artifact=None if stored is None else stored.sha256,
        )

    def _source(self) -> tuple[str, Path, str]:
        """Return the field it came from, the local file, and a name for people."""
        if self._payload.input_file is not None:
            field = "payload.input_file"
            path = self._ctx.resolve(self._payload.input_file, field=field)
            return field, path, path.name
        sha256 = self._payload.artifact or ""
        try:
            path = self._ctx.open_artifact(sha256, field="payload.artifact")
        except ArtifactNotFound as error:
            raise Reject(str(error)) from None
        return "payload.artifact", path, sha256[:12]

    def _target(self, source: Path, name: str) -> Path:
        if self._payload.output_file is not None:
            field = "payload.output_file"
            target = self._ctx.resolve(self._payload.output_file, field=field)
            if target == source or (
                target.exists() and source.exists() and target.samefile(source)
            ):
                raise Reject(f"{field}: {str(target)!r} is the input itself; choose another name")
            return target
        if self._way == "compress":
            return self._ctx.scratch / f"{name}{SUFFIX}"
        return self._ctx.scratch / (name.removesuffix(SUFFIX) or "output")

    def _take(self, chunk: bytes) -> None:
        """Account for input, and stop between chunks if the task is no longer wanted."""
        self._digest.update(chunk)
        self._read += len(chunk)
        if self._size:
            self._ctx.progress(99.0 * min(1.0, self._read / self._size))
        self._ctx.raise_if_cancelled()

    def _compress(self, source: BinaryIO, sink: BoundedWriter, level: int) -> None:
        codec = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        frame = codec.compressobj(size=self._size)
        try:
            for chunk in chunks(source):
                self._take(chunk)
                sink.write(frame.compress(chunk))
            sink.write(frame.flush())
        except zstandard.ZstdError as error:
            if self._read != self._size or source.seek(0, 2) != self._size:
                raise RuntimeError("the input changed while it was read; try again") from error
            raise

    def _decompress(self, source: BinaryIO, sink: BoundedWriter, field: str) -> None:
        head = source.read(_HEADER_BYTES_MAX)
        source.seek(0)
        try:
            frame = zstandard.get_frame_parameters(head)
        except zstandard.ZstdError:
            raise Reject(f"{field}: not a file that drgfc.compress made") from None
        if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN or not frame.has_checksum:
            raise Reject(f"{field}: its frame lacks a content size or a checksum")
        if frame.window_size > _WINDOW_BYTES_MAX:
            raise Reject(f"{field}: it asks for {frame.window_size} bytes of memory")
        sink.reserve(frame.content_size)
        codec = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX).decompressobj()
        try:
            for chunk in chunks(source, CHUNK_BYTES):
                self._take(chunk)
                view = memoryview(chunk)
                for start in range(0, len(chunk), _FEED_BYTES):
                    if codec.eof:
                        raise Reject(f"{field}: it has data after its end")
                    sink.write(codec.decompress(view[start : start + _FEED_BYTES]))
                    if codec.unused_data:
                        raise Reject(f"{field}: it has data after its end")
        except zstandard.ZstdError as error:
            raise Reject(f"{field}: damaged: {error}") from None
        if not codec.eof:
            raise Reject(f"{field}: cut short: {sink.size} of {frame.content_size} bytes restored")

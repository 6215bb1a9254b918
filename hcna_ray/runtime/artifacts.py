"""Artifacts as a worker sees them: local files, wherever the store is.

M1 keeps the store. A worker on the same machine uses it directly; any other worker copies parts
through the ``artifacts`` actor and keeps what it read in a cache of its own. The cache is pruned by
size and age; a slot holds a shared lock on what its attempts were given, and that stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
import uuid
from pathlib import Path

from hcna_ray import failpoints
from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError, Invalid
from hcna_ray.runtime.ray_link import ARTIFACTS, ActorLink
from hcna_ray.store.artifacts import ArtifactStore, OffsetMismatch, Upload

#: Names the store's directory, so that a worker can tell whether it sees the same one.
_IDENTITY_FILE = "identity"
_PART_TIMEOUT_S = 60.0
_PART_PREFIX = ".part-"
#: A file that is still being fetched after this long was left behind by a process that died.
_PART_IDLE_S = 86400.0


def open_store(settings: Settings) -> ArtifactStore:
    """Return this home's artifact store."""
    limits = settings.limits
    return ArtifactStore(
        settings.artifacts_dir,
        artifact_bytes_max=limits.artifact_bytes,
        part_bytes_max=limits.artifact_part_bytes,
        uploads_max=limits.artifact_uploads_max,
        upload_idle_s=limits.upload_idle_s,
        disk_free_bytes_min=limits.disk_free_bytes_min,
        now=time.time,
    )


def prune_cache(settings: Settings, *, room_bytes: int = 0) -> int:
    """Remove from a worker's cache what was not used for long, and the least recently used.

    Args:
        settings: The worker's; ``limits.artifact_cache_bytes`` and ``artifact_cache_s`` count.
        room_bytes: Size of what is about to be added.

    Returns:
        How many files went.
    """
    now = time.time()
    limit = settings.limits.artifact_cache_bytes - room_bytes
    found: list[tuple[float, int, Path]] = []
    for path in _cache_of(settings).glob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        if not path.name.startswith(_PART_PREFIX):
            found.append((stat.st_mtime, stat.st_size, path))
        elif now - stat.st_mtime > _PART_IDLE_S:
            path.unlink(missing_ok=True)
    total = sum(size for _, size, _ in found)
    removed = 0
    for used_at, size, path in sorted(found):
        if total <= limit and now - used_at <= settings.limits.artifact_cache_s:
            break
        if _remove_unused(path):
            total -= size
            removed += 1
    return removed


def _remove_unused(path: Path) -> bool:
    """Delete a cached file unless somebody holds a lock on it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _cache_of(settings: Settings) -> Path:
    return settings.home / "cache"


class ArtifactServer:
    """M1's side: the store, in parts."""

    def __init__(self, settings: Settings) -> None:
        """Open the store and give its directory a name."""
        self._store = open_store(settings)
        self._file = settings.artifacts_dir / _IDENTITY_FILE
        if not self._file.exists():
            scratch = self._file.with_suffix(f".{os.getpid()}")
            scratch.write_text(uuid.uuid4().hex)
            scratch.replace(self._file)

    def identity(self) -> str:
        """Return the directory's name."""
        return self._file.read_text()

    def read(self, sha256: str, offset: int, size: int) -> bytes:
        """Return a part of an artifact. Raises `NotFound`."""
        return self._store.read(sha256, offset, size)

    def size(self, sha256: str) -> int:
        """Return an artifact's size in bytes. Raises `NotFound`."""
        return self._store.find(sha256).size

    def write(self, sha256: str, total: int, offset: int, part: bytes) -> int:
        """Add a part of an upload; return how many bytes of it are there now.

        An empty part asks how much is there.
        """
        if part:
            found = self._store.append(sha256, offset=offset, size=total, pieces=(part,))
        else:
            found = self._store.progress(sha256, total)
        return found.received if isinstance(found, Upload) else found.size


class WorkerArtifacts:
    """A runner's side (`hcna_ray.runtime.runner.ArtifactLink`)."""

    def __init__(self, settings: Settings) -> None:
        """Look nothing up yet: most attempts touch no artifact."""
        self._settings = settings
        self._link = ActorLink(ARTIFACTS)
        self._local: ArtifactStore | None = None
        self._looked = False

    def put(self, path: Path) -> tuple[str, int]:
        """Store a file; return its SHA-256 (hex) and size."""
        local = self._shared_store()
        if local is not None:
            stored = local.put_file(path)
            return stored.sha256, stored.size
        return self._send(path)

    def get(self, sha256: str) -> Path:
        """Return a local read-only file. Raises `NotFound`."""
        local = self._shared_store()
        if local is not None:
            return local.path(sha256)
        return self._fetch(sha256)

    def _shared_store(self) -> ArtifactStore | None:
        """Return the store itself if this process sees M1's directory."""
        if not self._looked:
            mark = self._settings.artifacts_dir / _IDENTITY_FILE
            if mark.is_file() and mark.read_text() == self._link.call("identity"):
                self._local = open_store(self._settings)
            self._looked = True
        return self._local

    def _send(self, path: Path) -> tuple[str, int]:
        digest = hashlib.sha256()
        part_bytes = self._settings.limits.artifact_part_bytes
        with path.open("rb") as source:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
        sha256, total = digest.hexdigest(), path.stat().st_size
        if not total:
            raise Invalid("invalid_request", f"{path.name} is empty: an artifact has bytes")
        received = int(self._link.call("write", sha256, total, 0, b""))
        with path.open("rb") as source:
            while received < total:
                source.seek(received)
                part = source.read(part_bytes)
                if not part:
                    raise Invalid("invalid_request", f"{path.name} became shorter on its way")
                try:
                    received = int(
                        self._link.call(
                            "write", sha256, total, received, part, timeout_s=_PART_TIMEOUT_S
                        )
                    )
                except OffsetMismatch as elsewhere:
                    # Somebody sends the same file; what is there is there.
                    received = elsewhere.received
        return sha256, total

    def _fetch(self, sha256: str) -> Path:
        """Copy an artifact into this worker's cache, checked by its digest."""
        cache = _cache_of(self._settings)
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = cache / sha256
        try:
            os.utime(target)
            return target
        except FileNotFoundError:
            pass
        total = int(self._link.call("size", sha256))
        prune_cache(self._settings, room_bytes=total)
        part_bytes = self._settings.limits.artifact_part_bytes
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=cache, prefix=_PART_PREFIX, delete=False) as scratch:
            try:
                received = 0
                while received < total:
                    part: bytes = self._link.call(
                        "read", sha256, received, part_bytes, timeout_s=_PART_TIMEOUT_S
                    )
                    if not part:
                        break
                    scratch.write(part)
                    digest.update(part)
                    received += len(part)
                scratch.flush()
                if digest.hexdigest() != sha256:
                    raise HcnaError(f"artifact {sha256} arrived damaged")
                os.chmod(scratch.name, 0o400)
                failpoints.hit("cache.file.fetched")
                Path(scratch.name).replace(target)
            except BaseException:
                Path(scratch.name).unlink(missing_ok=True)
                raise
        return target

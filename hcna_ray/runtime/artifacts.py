"""Artifacts as a worker sees them: local files, wherever the store is.

M1 keeps the store. A worker on the same machine uses it directly; any other worker copies parts
through the ``artifacts`` actor and keeps what it read in a cache of its own. The cache is pruned by
size and age; a slot holds a shared lock on what its attempts were given, and that stays.

Whose bytes they are is decided here, where they are handed out, and not by what a payload says. A
worker names the attempt for which it wants an artifact, also when it has a copy or sees the store;
M1 looks the task up. The attempt of a task that is *confined* (`TaskSpec.confined`) is given what
its principal has sent, and what attempts of its principal's tasks have made. All else does not
exist for it. What an attempt has made is known from the bytes: a slot's host reads the file that a
handler hands over (`WorkerArtifacts.put`), and no handler can name a digest instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hcna_ray import failpoints
from hcna_ray.config import Settings
from hcna_ray.core.errors import (
    HcnaError,
    Invalid,
    ModeratorUnavailable,
    NotFound,
    Overloaded,
    StaleAttempt,
    StoreUnavailable,
)
from hcna_ray.core.models import Task, TaskSpec, Token
from hcna_ray.runtime.messages import AttemptKey
from hcna_ray.runtime.ray_link import ARTIFACTS, ActorLink
from hcna_ray.security.keys import load_keys
from hcna_ray.store.artifacts import ArtifactStore, Maker, OffsetMismatch, Upload
from hcna_ray.store.base import TaskReader
from hcna_ray.store.factory import open_reader

#: Names the store's directory, so that a worker can tell whether it sees the same one.
_IDENTITY_FILE = "identity"
_PART_TIMEOUT_S = 60.0
#: How often M1 is asked about an artifact while it does not answer, and the pause in between: for
#: so long that a worker out of contact is told to stop before an attempt fails for want of a file.
ASK_TRIES = 120
ASK_PAUSE_S = 1.0
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

    def __init__(
        self, settings: Settings, open_tasks: Callable[[], TaskReader] | None = None
    ) -> None:
        """Open the store and give its directory a name.

        Args:
            settings: M1's.
            open_tasks: Opens the store of the tasks, at the first question; the settings' own by
                default.
        """
        self._store = open_store(settings)
        self._keys_dir = settings.keys_dir
        self._tasks = _Tasks(open_tasks or partial(open_reader, settings))
        self._file = settings.artifacts_dir / _IDENTITY_FILE
        if not self._file.exists():
            scratch = self._file.with_suffix(f".{os.getpid()}")
            scratch.write_text(uuid.uuid4().hex)
            scratch.replace(self._file)

    def identity(self) -> str:
        """Return the directory's name."""
        return self._file.read_text()

    def read(self, sha256: str, offset: int, size: int, attempt: AttemptKey | None = None) -> bytes:
        """Return a part of an artifact. Raises as `size` does."""
        self._check(sha256, attempt)
        return self._store.read(sha256, offset, size)

    def size(self, sha256: str, attempt: AttemptKey | None = None) -> int:
        """Return the size in bytes of an artifact that an attempt may read.

        Args:
            sha256: The artifact.
            attempt: Who wants it. An older worker does not say.

        Raises:
            NotFound: it is not here, or it is not for this attempt.
            StaleAttempt: the attempt is not in force.
        """
        self._check(sha256, attempt)
        return self._store.find(sha256).size

    def made(self, sha256: str, attempt: AttemptKey) -> None:
        """Note that an attempt has made an artifact: it is its principal's from now on.

        Raises:
            NotFound: it is not here.
            StaleAttempt: the attempt is not in force.
        """
        spec = self._tasks.spec_of(attempt)
        self._store.made(sha256, Maker(spec.principal, spec.task_type, spec.queue))

    def _check(self, sha256: str, attempt: AttemptKey | None) -> None:
        if attempt is None:
            self._check_nameless()
            return
        spec = self._tasks.spec_of(attempt)
        if spec.confined and not self._store.owned(sha256, spec.principal):
            raise NotFound("artifact", sha256[:64])

    def _check_nameless(self) -> None:
        """Serve a worker that does not say for whom, where all who submit see everything."""
        if any(key.rank and not key.sees_all for key in load_keys(self._keys_dir)):
            raise HcnaError(
                "this worker does not say for which task it wants an artifact, and not every key "
                "may see every artifact: upgrade hcna-ray on this worker to M1's version"
            )

    def write(self, sha256: str, total: int, offset: int, part: bytes) -> int:
        """Add a part of an upload; return how many bytes of it are there now.

        An empty part asks how much is there.
        """
        if part:
            found = self._store.append(sha256, offset=offset, size=total, pieces=(part,))
        else:
            found = self._store.progress(sha256, total)
        return found.received if isinstance(found, Upload) else found.size


class _Tasks:
    """M1's tasks, for questions of any thread, one at a time."""

    def __init__(self, open_tasks: Callable[[], TaskReader]) -> None:
        self._open, self._lock = open_tasks, threading.Lock()
        self._reader: TaskReader | None = None

    def spec_of(self, attempt: AttemptKey) -> TaskSpec:
        """Return what the task of an attempt was accepted as.

        Raises:
            StaleAttempt: it is not in force: it has ended, or has been given to others.
            StoreUnavailable: the store cannot be opened or read.
        """
        task_id, token = attempt
        with self._lock:
            task = self._get(task_id)
        if task is None or task.lease is None or task.lease.token != tuple(token):
            raise StaleAttempt(task_id[:100], str(Token(*token)))
        return task.spec

    def _get(self, task_id: str) -> Task | None:
        try:
            if self._reader is None:
                self._reader = self._open()
            return self._reader.get((task_id,)).get(task_id)
        except HcnaError:
            raise
        except Exception as error:
            # A reader that failed once is not trusted again: the next question opens another.
            reader, self._reader = self._reader, None
            if reader is not None:
                reader.close()
            raise StoreUnavailable(f"the store cannot be read ({type(error).__name__})") from error


class WorkerArtifacts:
    """A runner's side (`hcna_ray.runtime.runner.ArtifactLink`)."""

    def __init__(self, settings: Settings, *, pause: Callable[[float], None] = time.sleep) -> None:
        """Look nothing up yet: most attempts touch no artifact.

        Args:
            settings: The worker's.
            pause: Waits so many seconds before M1 is asked again.
        """
        self._settings, self._pause = settings, pause
        self._link = ActorLink(ARTIFACTS)
        self._local: ArtifactStore | None = None
        self._looked = False

    def put(self, path: Path, attempt: AttemptKey) -> tuple[str, int]:
        """Store a file that an attempt has made; return its SHA-256 (hex) and size.

        Raises:
            NotFound: it is a copy of an artifact that is not for this attempt.
            StaleAttempt: the attempt is not in force any more.
            HcnaError: it cannot be stored.
        """
        path = path.resolve()
        kept = (_cache_of(self._settings), self._settings.artifacts_dir)
        if any(path.is_relative_to(folder.resolve()) for folder in kept):
            # A handler that stores whatever path it is told must not make it anybody's.
            self._ask("size", path.name, attempt)
        local = self._shared_store()
        if local is not None:
            stored = local.put_file(path)
            sha256, size = stored.sha256, stored.size
        else:
            sha256, size = self._send(path)
        self._ask("made", sha256, attempt)
        return sha256, size

    def get(self, sha256: str, attempt: AttemptKey) -> Path:
        """Return a local read-only file.

        M1 is asked each time: what is here may have been fetched for somebody else.

        Raises:
            NotFound: there is none, or it is not for this attempt.
            StaleAttempt: the attempt is not in force any more.
        """
        size = int(self._ask("size", sha256, attempt))
        local = self._shared_store()
        if local is not None:
            return local.path(sha256)
        return self._fetch(sha256, size, attempt)

    def _ask(self, method: str, *args: Any) -> Any:
        """Ask M1, for a while also if it is just being started again; each question is harmless."""
        for _ in range(ASK_TRIES - 1):
            try:
                return self._link.call(method, *args)
            except (ModeratorUnavailable, StoreUnavailable):
                self._pause(ASK_PAUSE_S)
        return self._link.call(method, *args)

    def _shared_store(self) -> ArtifactStore | None:
        """Return the store itself if this process sees M1's directory."""
        if not self._looked:
            mark = self._settings.artifacts_dir / _IDENTITY_FILE
            if mark.is_file() and mark.read_text() == self._ask("identity"):
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
                    received = self._send_part(sha256, total, received, part)
                except OffsetMismatch as elsewhere:
                    # Somebody sends the same file; what is there is there.
                    received = elsewhere.received
        return sha256, total

    def _send_part(self, sha256: str, total: int, offset: int, part: bytes) -> int:
        """Send a part, for a while also if too many uploads are open: others end meanwhile."""
        call = partial(self._link.call, "write", sha256, total, offset, part)
        for _ in range(ASK_TRIES - 1):
            try:
                return int(call(timeout_s=_PART_TIMEOUT_S))
            except Overloaded:
                self._pause(ASK_PAUSE_S)
        return int(call(timeout_s=_PART_TIMEOUT_S))

    def _fetch(self, sha256: str, total: int, attempt: AttemptKey) -> Path:
        """Copy an artifact into this worker's cache, checked by its digest."""
        cache = _cache_of(self._settings)
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = cache / sha256
        try:
            os.utime(target)
            return target
        except FileNotFoundError:
            pass
        prune_cache(self._settings, room_bytes=total)
        part_bytes = self._settings.limits.artifact_part_bytes
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=cache, prefix=_PART_PREFIX, delete=False) as scratch:
            try:
                received = 0
                while received < total:
                    part: bytes = self._link.call(
                        "read", sha256, received, part_bytes, attempt, timeout_s=_PART_TIMEOUT_S
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

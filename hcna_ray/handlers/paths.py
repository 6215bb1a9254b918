"""Which paths of a payload may be touched on a worker: only those below its disk path.

Three steps, from cheap to sure: `check_path_shape` needs only the text and runs while a payload is
validated; `check_worker_path` also needs the configured disk path and touches no disk, so the
composite may use it to refuse early; `resolve_worker_path` follows symbolic links on the worker.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from hcna_ray.handlers.errors import PathOutsideDisk

PATH_BYTES_MAX = 4095


class WorkerPathMark:
    """Marks a payload field as a path on the worker, so that it can be checked early."""


def check_path_shape(path: str) -> str:
    """Return ``path`` if it could be a path at all; raise ``ValueError`` with a sentence if not."""
    if not path.strip():
        raise ValueError("must not be empty")
    if "\0" in path:
        raise ValueError("must not contain a NUL character")
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    if size > PATH_BYTES_MAX:
        raise ValueError(f"must be at most {PATH_BYTES_MAX} bytes long")
    if ".." in PurePosixPath(path).parts:
        raise ValueError("must not contain '..'; write the path out")
    return path


def _optional_shape(path: str | None) -> str | None:
    return None if path is None else check_path_shape(path)


#: A payload field that names a file or directory on the worker.
WorkerPath = Annotated[str, AfterValidator(check_path_shape), WorkerPathMark()]
#: The same, where the field may be left out.
OptionalWorkerPath = Annotated[str | None, AfterValidator(_optional_shape), WorkerPathMark()]


def check_worker_path(path: str, disk_path: str | os.PathLike[str], *, field: str = "path") -> str:
    """Return ``path`` as an absolute path below ``disk_path``. Pure: reads no disk.

    Args:
        path: Absolute, or relative to ``disk_path``.
        disk_path: The worker's ``worker.resources.disk_path``, absolute.
        field: Name to complain under, such as ``payload.input_file``.

    Raises:
        PathOutsideDisk: It has no usable shape or leads out of ``disk_path``.
    """
    root = os.path.normpath(os.fspath(disk_path))
    try:
        check_path_shape(path)
    except ValueError as error:
        raise PathOutsideDisk(field, path, root, str(error)) from None
    full = os.path.normpath(os.path.join(root, path))
    if full.startswith("//"):  # POSIX gives exactly two leading slashes a meaning of their own.
        full = full[1:]
    if not _is_below(full, root):
        raise PathOutsideDisk(field, path, root, "is outside the worker's disk path")
    return full


def resolve_worker_path(
    path: str, disk_path: str | os.PathLike[str], *, field: str = "path"
) -> Path:
    """Return the real path ``path`` stands for, all symbolic links followed. It need not exist.

    Raises:
        PathOutsideDisk: It leads out of ``disk_path``, by its text or by a symbolic link.
    """
    full = check_worker_path(path, disk_path, field=field)
    root = os.path.realpath(disk_path)
    real = os.path.realpath(full)
    if not _is_below(real, root):
        why = "leads out of the worker's disk path through a symbolic link"
        raise PathOutsideDisk(field, path, os.fspath(disk_path), why)
    return Path(real)


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")

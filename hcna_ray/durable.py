"""Bring names and files to the disk. The standard library alone: every layer may use it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from hcna_ray import failpoints


def sync_dir(path: Path) -> None:
    """Make renames and new names in a directory durable.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some network file systems sync files alone.
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make durable what a file holds, whoever wrote it.

    Raises:
        OSError: the disk refused, or there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step, mode 0600: a reader sees the old or the new one, never half.

    Raises:
        OSError: the disk refused; the old file is still there.
    """
    make_private_dir(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        failpoints.hit("private.file.flushed")
        os.replace(temporary, path)
        failpoints.hit("private.file.named")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def make_private_dir(path: Path) -> None:
    """Create a directory (and those above it) that only its owner may enter."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)

"""A disk for SQLite that remembers what is synced: it can be full, fail, stop, and lose power.

`PaperDisk` is an apsw VFS. Files are real files, read and written as always; beside each the disk
keeps what would be left of it after a power cut: what was synced, and any part of what was not. A
failed fsync behaves as on Linux: what it should have written is lost, and the next one succeeds.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

import apsw

#: What a power cut may tear a write into.
SECTOR_BYTES = 512
_IOERR_FSYNC = apsw.SQLITE_IOERR_FSYNC
_names = itertools.count(1)


@dataclass
class Image:
    """One file as a power cut would find it."""

    synced: bytearray = field(default_factory=bytearray)
    #: Writes (and, with ``None``, truncations) since the last sync, in order.
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        """All that was written is safe now."""
        for offset, data in self.pending:
            _apply(self.synced, offset, data)
        self.pending.clear()

    def after_power_cut(self, draw: random.Random) -> bytes:
        """Return what is left: the synced part, and any sectors of the rest, in any order."""
        left = bytearray(self.synced)
        keep = draw.choice((0.0, 0.5, 1.0))
        for offset, data in self.pending:
            if data is None:
                if draw.random() < keep:
                    _apply(left, offset, None)
                continue
            for start in range(0, len(data), SECTOR_BYTES):
                if draw.random() < keep:
                    _apply(left, offset + start, data[start : start + SECTOR_BYTES])
        return bytes(left)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


@dataclass
class Snapshot:
    """What a process that was killed left: the files as others read them, and their images."""

    files: dict[str, bytes]
    images: dict[str, Image]


class PaperDisk(apsw.VFS):
    """One folder's disk. Use its ``name`` as the ``vfs`` of a store in that folder."""

    def __init__(self, folder: Path) -> None:
        """Begin with the files that are there, all of them synced."""
        self.folder = folder
        self.name = f"paper-{next(_names)}"
        self.images: dict[str, Image] = {}
        for path in folder.iterdir():
            self.images[path.name] = Image(bytearray(path.read_bytes()))
        #: Refuse every write, as a full disk does.
        self.full = False
        #: Let that many of the next fsyncs fail.
        self.failing_syncs = 0
        #: Take a snapshot when that many more calls have been made, as if the process died there.
        self.dies_in: int | None = None
        self.died: Snapshot | None = None
        self.syncs = self.writes = 0
        super().__init__(self.name, "")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        """Open a file; only the database and its log are kept account of."""
        text = name.filename() if isinstance(name, apsw.URIFilename) else name
        image = None
        if text is not None and not text.endswith("-shm"):
            image = self.images.setdefault(Path(text).name, Image())
        return _PaperFile(self, name, flags, image)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Delete a file; that a power cut might bring it back is not looked at."""
        super().xDelete(filename, syncdir)
        self.images.pop(Path(filename).name, None)

    def snapshot(self) -> Snapshot:
        """Return what a SIGKILL at this moment would leave."""
        files = {name: (self.folder / name).read_bytes() for name in self._living()}
        images = {
            name: Image(bytearray(self.images[name].synced), list(self.images[name].pending))
            for name in files
        }
        return Snapshot(files, images)

    def _living(self) -> list[str]:
        return [name for name in self.images if (self.folder / name).is_file()]

    def touch(self) -> None:
        """Count a call, and die in it if its time has come."""
        if self.dies_in is None:
            return
        self.dies_in -= 1
        if self.dies_in <= 0:
            self.dies_in, self.died = None, self.snapshot()


def restarted(left: Snapshot, folder: Path) -> PaperDisk:
    """Return the disk after the process was killed: what was written is there, synced or not."""
    folder.mkdir()
    for name, data in left.files.items():
        (folder / name).write_bytes(data)
    disk = PaperDisk(folder)
    disk.images = left.images
    return disk


def powered_off(left: Snapshot, folder: Path, draw: random.Random) -> PaperDisk:
    """Return the disk after its power was cut."""
    folder.mkdir()
    for name in left.files:
        (folder / name).write_bytes(left.images[name].after_power_cut(draw))
    return PaperDisk(folder)


class _PaperFile(apsw.VFSFile):
    def __init__(
        self,
        disk: PaperDisk,
        name: str | apsw.URIFilename | None,
        flags: list[int],
        image: Image | None,
    ) -> None:
        self._disk, self._image = disk, image
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._disk.full:
            raise apsw.FullError("the disk is full")
        self._disk.touch()
        self._disk.writes += 1
        super().xWrite(data, offset)
        if self._image is not None:
            self._image.pending.append((offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        if self._image is not None:
            self._image.pending.append((size, None))

    def xSync(self, flags: int) -> None:
        self._disk.touch()
        self._disk.syncs += 1
        if self._disk.failing_syncs:
            self._disk.failing_syncs -= 1
            if self._image is not None:
                self._image.pending.clear()
            error = apsw.IOError("the disk could not sync")
            error.extendedresult = _IOERR_FSYNC  # type: ignore[attr-defined]
            raise error
        if self._image is not None:
            self._image.sync()

"""A disk as the kernel sees it between two syncs, and what a loss of power may leave of it.

Everything is played from a recording (`tests.faults.disk_recording`). A file has what is *durable*
and what only the page cache holds; an fsync makes the one equal to the other, as far as the calls
before it had returned. A name is durable once its directory was synced. What was not synced may
have reached the disk or not, in any order, and torn at any sector.

A page whose fsync failed stays in the cache and counts as clean: Linux never writes it again unless
it is written to again. Such pages are *lost*: no later sync makes them durable.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
SECTORS = (512, 4096)

#: What becomes of what was not synced, and how often that is tried.
FATES = {"none": 3, "all": 2, "prefix": 5, "calls": 4, "sectors": 6}


@dataclass(eq=False)
class Change:
    """One write or truncation that no sync covers yet."""

    offset: int = 0
    data: bytes = b""
    #: Set for a truncation.
    size: int | None = None
    done: bool = False

    def pages(self, length: int) -> range:
        """Return the pages it touches in a file of this length."""
        if self.size is not None:
            return range(self.size // PAGE, -(-max(length, self.size) // PAGE))
        return range(self.offset // PAGE, -(-(self.offset + len(self.data)) // PAGE))


@dataclass(eq=False)
class Inode:
    """A file or a directory."""

    folder: bool = False
    durable: bytearray = field(default_factory=bytearray)
    cache: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)

    def finish(self, change: Change, written: int | None = None) -> None:
        """Take a call that has returned into the cache."""
        change.done = True
        if change.size is not None:
            _resize(self.cache, change.size)
            return
        change.data = change.data[:written]
        _put(self.cache, change.offset, change.data)

    def synced(self, covered: list[Change]) -> None:
        """Make what returned before the sync durable."""
        # Lengths before any of it: a truncation touches what it cuts off.
        length = max(len(self.durable), len(self.cache))
        pages = {page for change in covered for page in change.pages(length)}
        _resize(self.durable, len(self.cache))
        for page in pages:
            part = self.cache[page * PAGE : (page + 1) * PAGE]
            self.durable[page * PAGE : page * PAGE + len(part)] = part
        self.lost -= pages
        self.pending = [one for one in self.pending if one not in covered]

    def sync_failed(self, covered: list[Change]) -> None:
        """Mark what the failed sync was about as clean and nowhere."""
        for change in covered:
            self.lost |= set(change.pages(len(self.cache)))
        self.pending = [one for one in self.pending if one not in covered]


def _resize(data: bytearray, size: int) -> None:
    if len(data) > size:
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


def _put(data: bytearray, offset: int, part: bytes) -> None:
    if len(data) < offset + len(part):
        _resize(data, offset + len(part))
    data[offset : offset + len(part)] = part


@dataclass(eq=False)
class Rename:
    """A new binding of one name, or of two by one rename."""

    #: Name to inode; `None` removes the name.
    names: dict[str, Inode | None]


class Disk:
    """The files below one directory, which was durable and empty at first."""

    def __init__(self, root: str) -> None:
        """Begin with an empty directory."""
        self.root = root
        self.names: dict[str, Inode] = {root: Inode(folder=True)}
        self.durable_names = dict(self.names)
        self.renames: list[Rename] = []

    # -- what happens --------------------------------------------------------------------------

    def bind(self, names: dict[str, Inode | None]) -> None:
        """Create, remove or rename."""
        self.renames.append(Rename(names))
        for name, inode in names.items():
            _bind(self.names, name, inode)

    def folder_synced(self, path: str, covered: list[Rename]) -> None:
        """Make the changes of a directory durable; a rename out of it or into it at once."""
        for rename in covered:
            if any(name.rpartition("/")[0] == path for name in rename.names):
                for name, inode in rename.names.items():
                    _bind(self.durable_names, name, inode)
                self.renames.remove(rename)

    # -- what a loss of power leaves --------------------------------------------------------------

    def cached(self, out: Path) -> None:
        """Write what the cache holds: what is left when only processes die."""
        self._write(out, {name: bytes(inode.cache) for name, inode in self._files(self.names)})

    def after_power_loss(self, out: Path, draw: random.Random) -> str:
        """Write one disk that a loss of power now may leave; return how it was drawn."""
        fate = draw.choices(list(FATES), list(FATES.values()))[0]
        named = draw.choices(("none", "prefix", "any", "all"), (3, 3, 3, 1))[0]
        sector = draw.choice(SECTORS)
        names = self._names_after(named, draw)
        files = {name: _content(inode, fate, sector, draw) for name, inode in self._files(names)}
        self._write(out, files)
        return f"{fate}, torn at {sector}, names: {named}"

    def _names_after(self, fate: str, draw: random.Random) -> dict[str, Inode]:
        names = dict(self.durable_names)
        kept = self.renames
        if fate == "none":
            kept = []
        elif fate == "prefix":
            kept = kept[: draw.randint(0, len(kept))]
        elif fate == "any":
            kept = [one for one in kept if draw.random() < 0.5]
        for rename in kept:
            for name, inode in rename.names.items():
                _bind(names, name, inode)
        return names

    def _files(self, names: dict[str, Inode]) -> list[tuple[str, Inode]]:
        """Return the files whose directories are all there."""
        found = []
        for name, inode in sorted(names.items()):
            above = name
            while above != self.root:
                above = above.rpartition("/")[0]
                if above not in names:
                    break
            else:
                if not inode.folder:
                    found.append((name, inode))
        return found

    def _write(self, out: Path, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = out / name[len(self.root) + 1 :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _bind(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


def _content(inode: Inode, fate: str, sector: int, draw: random.Random) -> bytes:
    """Draw what a file's durable part and some of its pending changes make."""
    if not inode.pending and not inode.lost:
        return bytes(inode.durable)
    changes = inode.pending
    sizes = [len(inode.durable)]
    for change in changes:
        end = change.offset + len(change.data)
        sizes.append(change.size if change.size is not None else max(sizes[-1], end))
    spans = [_sectors(change, sizes[i], sector) for i, change in enumerate(changes)]
    limits, size = _limits(fate, spans, sizes, draw)
    found = bytearray(inode.durable)
    _resize(found, max(sizes))
    for i, change in enumerate(changes):
        for number in spans[i]:
            if i < limits.get(number, 0):
                _copy(found, change, number * sector, (number + 1) * sector)
    _resize(found, size)
    for page in sorted(inode.lost):
        for at in range(page * PAGE, min((page + 1) * PAGE, len(found)), sector):
            if draw.random() < 0.5:
                part = inode.cache[at : at + sector][: len(found) - at]
                found[at : at + len(part)] = part
    return bytes(found)


def _sectors(change: Change, size: int, sector: int) -> range:
    if change.size is not None:
        return range(change.size // sector, -(-size // sector))
    return range(change.offset // sector, -(-(change.offset + len(change.data)) // sector))


def _copy(found: bytearray, change: Change, start: int, end: int) -> None:
    if change.size is not None:
        start = max(start, change.size)
        end = min(end, len(found))
        found[start:end] = bytes(max(0, end - start))
        return
    start = max(start, change.offset)
    end = min(end, change.offset + len(change.data))
    found[start:end] = change.data[start - change.offset : end - change.offset]


def _limits(
    fate: str, spans: list[range], sizes: list[int], draw: random.Random
) -> tuple[dict[int, int], int]:
    """Draw how many of the changes each sector has seen, and the file's size.

    A sector is written as it stands in the cache, so it has seen a prefix of its changes.
    """
    touched: dict[int, list[int]] = defaultdict(list)
    for i, span in enumerate(spans):
        for number in span:
            touched[number].append(i)
    count = len(spans)
    if fate == "none":
        return {}, sizes[0]
    if fate == "all":
        return dict.fromkeys(touched, count), sizes[-1]
    if fate == "prefix":
        whole = draw.randint(0, count)
        limits = dict.fromkeys(touched, whole)
        if whole < count:
            for number in spans[whole]:
                if draw.random() < 0.5:
                    limits[number] = whole + 1
        return limits, sizes[draw.randint(whole, min(whole + 1, count))]
    if fate == "calls":
        share = draw.choice((0.2, 0.5, 0.8, 0.95))
        kept = [draw.random() < share for _ in spans]
        limits = {
            number: max((i + 1 for i in seen if kept[i]), default=0)
            for number, seen in touched.items()
        }
        last = max((i + 1 for i in range(count) if kept[i]), default=0)
        return limits, sizes[last]
    share = draw.choice((0.1, 0.5, 0.9))
    limits = {}
    for number, seen in touched.items():
        limits[number] = count if draw.random() < share else draw.choice([0, *seen])
    return limits, sizes[-1] if draw.random() < 0.7 else draw.choice(sizes)

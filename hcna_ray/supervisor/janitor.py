"""Keeps what is left behind within bounds: our logs, and the session directories of Ray.

Nothing that a process holds open is deleted, whatever its name: Ray names the live files of a
second node like rotated ones (``raylet.1.out``). Of the rest goes what is too old, and the oldest
while there is too much. A growing ``*.out`` file, which its writer cannot rotate, keeps its end.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hcna_ray.config import MIB, Settings

#: A ``*.out`` file above this is cut; its last part stays in ``*.out.1``.
OUT_BYTES_MAX = 8 * MIB
OUT_BYTES_KEPT = 1 * MIB
#: A file that changed this recently is left alone: its writer may open it for each line.
QUIET_S = 60.0
#: A session that ended this long ago needs its spilled objects no more.
SPILLED_S = 600.0
#: Files deleted in one run at most; the next run goes on.
DELETIONS_MAX = 5000

_PROC = Path("/proc")
#: What handlers of the standard library call a file that they have done with.
_ROTATED = re.compile(r"\.(?:log|out)\.\d+$")


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    #: What it takes on disk: a file that was cut under its writer may look larger than it is.
    size_bytes: int
    changed_at: float


@dataclass(kw_only=True)
class JanitorReport:
    """What one run did."""

    files: int = 0
    sessions: int = 0
    cut: int = 0
    freed_bytes: int = 0
    #: Bytes that could not be freed although there are too many: all of it is in use.
    over_bytes: int = 0

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.files or self.sessions or self.cut)


@dataclass(kw_only=True)
class Janitor:
    """Run it about once a minute; a run that finds nothing to do takes milliseconds."""

    logs_dir: Path
    temp_dir: Path
    bytes_max: int
    age_s_max: float
    #: Paths below the given directories that processes hold open; None if that cannot be found out.
    open_paths: Callable[[Sequence[Path]], frozenset[str] | None] = field(
        default_factory=lambda: open_paths
    )

    @classmethod
    def of(cls, settings: Settings, temp_dir: Path) -> Janitor:
        """Return the janitor of an instance."""
        return cls(
            logs_dir=settings.logs_dir,
            temp_dir=temp_dir,
            bytes_max=settings.ray.logs_bytes_max,
            age_s_max=settings.ray.logs_age_s_max,
        )

    def run(self, now: float) -> JanitorReport:
        """Tidy up once. Files that vanish meanwhile or cannot be deleted are passed over.

        Args:
            now: Seconds since the epoch, as file systems count.
        """
        report = JanitorReport()
        used = self.open_paths((self.logs_dir, self.temp_dir))
        self._cut_outputs(report)
        files = list(_files_below(self.logs_dir))
        if used is None:  # Not on Linux: only what its writer has done with for sure.
            files = [one for one in files if _ROTATED.search(one.path.name)]
        self._tidy(files, used or frozenset(), now, report)
        if used is not None:
            self._tidy_sessions(used, now, report)
        return report

    # -- our own logs -------------------------------------------------------------------------

    def _cut_outputs(self, report: JanitorReport) -> None:
        for path in self.logs_dir.glob("*.out"):
            try:
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and _taken(found) > OUT_BYTES_MAX:
                    _cut(path)
                    report.cut += 1
                    report.freed_bytes += _taken(found)
            except OSError:
                continue

    def _tidy(
        self, files: Iterable[_File], used: frozenset[str], now: float, report: JanitorReport
    ) -> None:
        """Delete what is too old, then the oldest while the files are too large together."""
        total, idle = 0, []
        for one in files:
            total += one.size_bytes
            if str(one.path) not in used and now - one.changed_at > QUIET_S:
                idle.append(one)
        idle.sort(key=lambda one: one.changed_at)
        for one in idle:
            too_old = now - one.changed_at > self.age_s_max
            if not (too_old or total > self.bytes_max) or report.files >= DELETIONS_MAX:
                break
            try:
                one.path.unlink()
            except OSError:
                continue
            total -= one.size_bytes
            report.files += 1
            report.freed_bytes += one.size_bytes
        report.over_bytes += max(0, total - self.bytes_max)

    # -- Ray's sessions -----------------------------------------------------------------------

    def _tidy_sessions(self, used: frozenset[str], now: float, report: JanitorReport) -> None:
        sessions = _sessions(self.temp_dir)
        ended = [one for one in sessions if not _is_used(one, used)]
        current = self._current(sessions)
        total = 0
        sizes = {one: sum(file.size_bytes for file in _files_below(one)) for one in ended}
        files = [file for one in sessions for file in _files_below(one / "logs")]
        total = sum(file.size_bytes for file in files)
        for session in ended:
            if session == current:
                continue
            age_s = now - _changed_at(session)
            if age_s > self.age_s_max or (age_s > SPILLED_S and total > self.bytes_max):
                shutil.rmtree(session, ignore_errors=True)
                total -= sizes[session]
                report.sessions += 1
                report.freed_bytes += sizes[session]
            elif age_s > SPILLED_S:
                self._drop_spilled(session, report)
        left = [file for one in sessions for file in _files_below(one / "logs")]
        self._tidy(left, used, now, report)

    def _current(self, sessions: Sequence[Path]) -> Path | None:
        """Return the session whose logs are wanted even when nothing runs: the newest."""
        latest = self.temp_dir / "session_latest"
        target = Path(os.path.realpath(latest))
        return target if target in sessions else (sessions[-1] if sessions else None)

    def _drop_spilled(self, session: Path, report: JanitorReport) -> None:
        for directory in session.glob("ray_spilled_objects*"):
            if directory.is_symlink() or not directory.is_dir():
                continue
            report.freed_bytes += sum(file.size_bytes for file in _files_below(directory))
            report.files += 1
            shutil.rmtree(directory, ignore_errors=True)


def open_paths(directories: Sequence[Path]) -> frozenset[str] | None:
    """Return every path below the directories that a process of this user holds open.

    None where ``/proc`` does not tell. One look takes some ten milliseconds.
    """
    if not (_PROC / "self" / "fd").is_dir():
        return None
    prefixes = tuple(f"{os.path.realpath(directory)}/" for directory in directories)
    named = tuple(f"{directory}/" for directory in directories)
    found = set()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            with os.scandir(entry / "fd") as descriptors:
                links = [one.path for one in descriptors]
        except OSError:
            continue  # It has ended, or belongs to somebody else, who cannot have our files open.
        for link in links:
            try:
                path = os.readlink(link)
            except OSError:
                continue
            for prefix, name in zip(prefixes, named, strict=True):
                if path.startswith(prefix):
                    found.add(name + path.removeprefix(prefix))
    return frozenset(found)


def _sessions(temp_dir: Path) -> list[Path]:
    """Return Ray's session directories, the oldest first: their names begin with the time."""
    return sorted(
        entry for entry in temp_dir.glob("session_2*") if entry.is_dir() and not entry.is_symlink()
    )


def _is_used(session: Path, used: frozenset[str]) -> bool:
    prefix = f"{session}/"
    return any(path.startswith(prefix) for path in used)


def _changed_at(session: Path) -> float:
    """Return when anything below the session changed last, as far as its upper levels tell."""
    times = [0.0]
    for path in (session, session / "logs", session / "sockets"):
        try:
            times.append(path.lstat().st_mtime)
        except OSError:
            continue
    times += [file.changed_at for file in _files_below(session / "logs")]
    return max(times)


def _files_below(directory: Path) -> Iterator[_File]:
    """Yield every regular file; symbolic links are neither followed nor counted."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            try:
                found = path.lstat()
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode):
                yield _File(path, _taken(found), found.st_mtime)


def _taken(found: os.stat_result) -> int:
    """Return the bytes that a file takes on disk, or would take where that is not counted."""
    return min(found.st_size, found.st_blocks * 512)


def _cut(path: Path) -> None:
    """Move the end of a file to ``*.1`` and empty it in place: its writer goes on writing.

    What is written in between, a moment, is lost.
    """
    with path.open("r+b") as stream:
        stream.seek(-OUT_BYTES_KEPT, os.SEEK_END)
        end = stream.read(OUT_BYTES_KEPT)
        kept = path.with_name(f"{path.name}.1")
        kept.unlink(missing_ok=True)
        descriptor = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as target:
            target.write(end)
        os.truncate(stream.fileno(), 0)

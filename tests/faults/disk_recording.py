"""What a process did to its files, in order, and when it answered: strace, read back.

One log of system calls has everything: data written and synced, names made and removed, and the
bytes that went in and out of its sockets. A *tick* is a moment between two of them. What was told
to a client counts from the tick at which the sending began.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults.disk_model import Change, Disk, Inode, Rename

#: Calls that change files or names, and those that talk. A file that was changed in any other way
#: differs from the model at the end of the recording.
CALLS = (
    "openat,close,write,writev,pwrite64,pwritev,lseek,ftruncate,truncate,fallocate,fdatasync,fsync,"
    "sync_file_range,msync,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,mkdir,"
    "mkdirat,rmdir,copy_file_range,sendfile,sendto,recvfrom,sendmsg,recvmsg"
)
_STRING_MAX = 1 << 24

_WHOLE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?)(?:<([^>]*)>)?(.*)\Z", re.S)
_BEGUN = re.compile(r"(\d+) +(\w+)\((.*?),? <unfinished \.\.\.>\Z", re.S)
_RESUMED = re.compile(
    r"(\d+) +<\.\.\. (\w+) resumed>(.*)\) += (-?\d+|\?)(?:<([^>]*)>)?(.*)\Z", re.S
)
_FD = re.compile(r"(-?\d+)(?:<([^>]*)>)?(\(deleted\))?")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True, slots=True)
class Call:
    """One system call: when it began, and when it returned if it did."""

    session: int
    thread: str
    begun: int
    name: str
    arguments: tuple[str, ...]
    #: None for one in whose middle the process died.
    ended: int | None
    result: int | None
    #: Path behind a descriptor that was returned.
    path: str

    @property
    def ok(self) -> bool:
        """Whether it returned success."""
        return self.result is not None and self.result >= 0

    def descriptor(self, index: int = 0) -> tuple[int, str]:
        """Return a descriptor among the arguments and what it stands for."""
        found = _FD.match(self.arguments[index])
        if found is None:
            return -1, ""
        return int(found[1]), _decoded(found[2] or "").decode() + (found[3] or "")

    def data(self, index: int = 1) -> bytes:
        """Return a text among the arguments."""
        found = _TEXT.match(self.arguments[index])
        return b"" if found is None else _decoded(found[1])


def _decoded(text: str) -> bytes:
    if "\\x" not in text:
        return text.encode()
    return bytes.fromhex(text.replace("\\x", ""))


def read_log(path: Path, session: int, first: int) -> Iterator[Call]:
    """Read one log; ticks count from ``first``, two for each line."""
    begun: dict[str, tuple[int, str, str]] = {}
    with path.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines):
            tick, line = first + 2 * number, line.rstrip("\n")
            if whole := _WHOLE.match(line):
                pid, name, text, result, where, _ = whole.groups()
                yield _call(session, pid, tick, name, text, tick + 1, result, where)
            elif half := _BEGUN.match(line):
                begun[half[1]] = (tick, half[2], half[3])
            elif rest := _RESUMED.match(line):
                pid, name, text, result, where, _ = rest.groups()
                since, _name, before = begun.pop(pid)
                joined = f"{before}, {text.lstrip(', ')}" if before and text.strip() else before
                yield _call(session, pid, since, name, joined or text, tick + 1, result, where)
    for pid, (since, name, before) in begun.items():  # It died in the middle.
        yield _call(session, pid, since, name, before, None, None, None)


def _call(
    session: int,
    thread: str,
    tick: int,
    name: str,
    text: str,
    ended: int | None,
    result: str | None,
    where: str | None,
) -> Call:
    arguments, path = tuple(text.split(", ")), _decoded(where or "").decode()
    if result in (None, "?"):
        # It has not returned. That is no failure: after a failed sync its pages are never written.
        return Call(session, thread, tick, name, arguments, None, None, path)
    return Call(session, thread, tick, name, arguments, ended, int(result or 0), path)


#: Result of a call whose process died before the kernel began with it.
_NEVER = -1
#: Calls by which SQLite changes its files.
_WRITES = frozenset({"pwrite64", "ftruncate"})


def _cut(call: Call) -> bool:
    """Return whether its process may have died in the middle of its thread's last call.

    Of some of these strace reads a result, 0, from the registers of the dying thread.
    """
    return call.result is None or call.result == 0


def _landed(call: Call) -> int | None:
    """Return what a call that was cut would have returned; None if nothing of it is in the file.

    A kill cuts a write between two pages.
    """
    path = Path(call.descriptor()[1])
    held = path.read_bytes() if path.is_file() else b""
    if call.name == "ftruncate":
        return 0 if len(held) == int(call.arguments[1]) else None
    data = call.data()
    offset = int(call.arguments[3])
    there = held[offset : offset + len(data)]
    pairs = enumerate(zip(data, there, strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(there)) or None


@dataclass
class Recorder:
    """Runs processes one after the other under strace, on the same files."""

    folder: Path
    logs: list[Path] = field(default_factory=list)
    #: By log: what the kernel had done of calls in whose middle the process died, in bytes.
    _landed: list[dict[int, int | None]] = field(default_factory=list)

    def start(
        self, command: Sequence[str], *, cwd: Path, log: Path, inject: Sequence[str] = ()
    ) -> Recorded:
        """Start a process; what it does is recorded until it ends."""
        trace = self.folder / f"strace-{len(self.logs)}.log"
        self.logs.append(trace)
        options = ["-f", "--seccomp-bpf", "-y", "-xx", "-s", str(_STRING_MAX), "-o", str(trace)]
        options += ["-e", f"trace={CALLS}", "-e", "signal=none"]
        options += [part for one in inject for part in ("-e", f"inject={one}")]
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                ["strace", *options, "--", *command],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        return Recorded(process)

    def settle(self) -> None:
        """Look how far calls came in whose middle the process died: strace was not told.

        To be called after the end of each process, before anything else changes the files.
        """
        last = {one.thread: one for one in read_log(self.logs[-1], 0, 0)}
        self._landed.append(
            {one.begun: _landed(one) for one in last.values() if one.name in _WRITES and _cut(one)}
        )

    def calls(self) -> list[Call]:
        """Return every call of all processes, in the order in which they began."""
        found: list[Call] = []
        first = 0
        for session, log in enumerate(self.logs):
            with log.open("rb") as lines:
                count = sum(1 for _ in lines)
            landed = self._landed[session] if session < len(self._landed) else {}
            for call in read_log(log, session, first):
                if call.begun - first in landed:
                    came = landed[call.begun - first]
                    # Of what did not come to be nothing may reach the disk later on.
                    result = _NEVER if came is None else came
                    call = replace(call, ended=first + 2 * count, result=result)
                found.append(call)
            first += 2 * count + 2
        return sorted(found, key=lambda call: call.begun)


def last_tick(calls: Sequence[Call]) -> int:
    """Return the tick of the last thing that happened: the call begun last may not end last."""
    return max(call.begun if call.ended is None else call.ended for call in calls)


class Recorded:
    """A process that is being recorded."""

    def __init__(self, strace: subprocess.Popen[bytes]) -> None:
        """Wrap strace, whose only child it is."""
        self.strace = strace

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.strace.poll() is None

    def kill(self) -> None:
        """``kill -9`` the process itself; strace writes down what it knows and ends."""
        for pid in _children(self.strace.pid):
            os.kill(pid, signal.SIGKILL)
        self.strace.wait(timeout=60)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; return its exit status."""
        return self.strace.wait(timeout_s)


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


# -- playing it -----------------------------------------------------------------------------------


@dataclass
class _Open:
    position: int
    append: bool


class Player:
    """Plays calls on a `Disk`, tick by tick."""

    def __init__(self, root: Path, calls: Sequence[Call]) -> None:
        """Begin before the first call.

        Args:
            root: The directory whose files are meant.
            calls: In the order in which they began.
        """
        self.disk = Disk(str(root))
        self.tick = 0
        self._moments: list[tuple[int, bool, Call]] = []
        for call in calls:
            if call.name in _TALK:
                continue
            self._moments.append((call.begun, False, call))
            if call.ended is not None:
                self._moments.append((call.ended, True, call))
        self._moments.sort(key=lambda moment: moment[:2])
        self._next = 0
        self._open: dict[tuple[int, int], _Open] = {}
        self._changes: dict[int, tuple[Inode, Change]] = {}
        self._covered: dict[int, tuple[Inode | None, list[Change], list[Rename]]] = {}

    def play_to(self, tick: int) -> None:
        """Play everything before a tick."""
        while self._next < len(self._moments) and self._moments[self._next][0] < tick:
            self.step()

    @property
    def more(self) -> bool:
        """Whether there is anything left to play."""
        return self._next < len(self._moments)

    def step(self) -> tuple[Call, bool]:
        """Play one moment; return the call, and whether it was its end."""
        tick, ended, call = self._moments[self._next]
        self._next += 1
        self.tick = tick + 1
        if ended:
            self._end(call)
        else:
            self._begin(call)
        return call, ended

    def _mine(self, path: str) -> bool:
        return path.startswith(f"{self.disk.root}/") and not path.endswith("-shm")

    def _inode(self, path: str) -> Inode | None:
        return self.disk.names.get(path) if self._mine(path) else None

    def _begin(self, call: Call) -> None:
        if call.name not in _ON_DESCRIPTORS:
            return
        number, path = call.descriptor()
        if call.name in ("fsync", "fdatasync"):
            inode = self.disk.names.get(path)
            covered = [one for one in inode.pending if one.done] if inode is not None else []
            self._covered[call.begun] = (inode, covered, list(self.disk.renames))
            return
        inode = self._inode(path)
        if inode is None:
            return
        match call.name:
            case "pwrite64":
                change = Change(int(call.arguments[3]), call.data())
            case "write":
                held = self._open[call.session, number]
                position = len(inode.cache) if held.append else held.position
                change = Change(position, call.data())
            case "ftruncate":
                change = Change(size=int(call.arguments[1]))
            case _:
                raise NotImplementedError(f"{call.name} on {path}")
        inode.pending.append(change)
        self._changes[call.begun] = (inode, change)

    def _end(self, call: Call) -> None:
        if call.name in ("fsync", "fdatasync"):
            self._end_sync(call)
            return
        if call.begun in self._changes:
            inode, change = self._changes.pop(call.begun)
            if not call.ok:
                inode.pending.remove(change)
                return
            inode.finish(change, call.result)
            if call.name == "write":
                self._open[call.session, call.descriptor()[0]].position = change.offset + len(
                    change.data
                )
            return
        if not call.ok:
            return
        match call.name:
            case "openat":
                self._opened(call)
            case "lseek":
                if (held := self._open.get((call.session, call.descriptor()[0]))) is not None:
                    held.position = call.result or 0
            case "mkdir":
                if self._mine(path := call.data(0).decode()):
                    self.disk.bind({path: Inode(folder=True)})
            case "unlink":
                if self._mine(path := call.data(0).decode()):
                    self.disk.bind({path: None})
            case "rename":
                source, target = call.data(0).decode(), call.data(1).decode()
                if self._mine(source) or self._mine(target):
                    self.disk.bind({source: None, target: self.disk.names[source]})
            case _:
                self._refuse_unknown(call)

    def _refuse_unknown(self, call: Call) -> None:
        """Fail on a call that changes one of the files in a way that is not modelled."""
        if call.name in ("close", "write", "pwrite64", "ftruncate"):
            return
        said = [_decoded(one[1]) for text in call.arguments for one in _TEXT.finditer(text)]
        paths = [path.decode(errors="replace") for path in said]
        if any(self._mine(path) for path in [*paths, call.descriptor()[1]]):
            raise NotImplementedError(f"{call.name} {call.arguments}")

    def _opened(self, call: Call) -> None:
        if not self._mine(call.path):
            return
        flags = call.arguments[2]
        self._open[call.session, call.result or 0] = _Open(0, "O_APPEND" in flags)
        inode = self.disk.names.get(call.path)
        if inode is None:
            inode = Inode()
            self.disk.bind({call.path: inode})
        elif "O_TRUNC" in flags and inode.cache:
            change = Change(size=0)
            inode.pending.append(change)
            inode.finish(change)

    def _end_sync(self, call: Call) -> None:
        inode, covered, renames = self._covered.pop(call.begun)
        if inode is None:
            return
        if not call.ok:
            inode.sync_failed(covered)
        elif inode.folder:
            path = call.descriptor()[1]
            left = [one for one in renames if one in self.disk.renames]
            self.disk.folder_synced(path, left)
        else:
            inode.synced(covered)


_TALK = frozenset({"sendto", "recvfrom", "sendmsg", "recvmsg"})
_ON_DESCRIPTORS = frozenset(
    {"write", "writev", "pwrite64", "pwritev", "ftruncate", "fallocate", "fdatasync", "fsync"}
    | {"sync_file_range", "copy_file_range", "sendfile"}
)

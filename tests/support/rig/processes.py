"""Whose process is whose, as seen from outside all hosts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .state import RigError

_PROC = Path("/proc")
#: How the long-lived processes of a rig are started: their arguments are how they are found again.
PYTHON_OPTIONS = ("-S", "-B", "-m")
KEEPER_MODULE = "tests.support.rig.keeper"
INIT_MODULE = "tests.support.rig.init"


@dataclass(frozen=True, kw_only=True)
class HostProcess:
    """A process of a host."""

    #: Its number on this machine, and its parent's.
    pid: int
    parent: int
    #: Its number in the host.
    inner_pid: int
    #: One letter, as in ``ps``: T is stopped, Z is a zombie.
    state: str
    command: str

    @property
    def stopped(self) -> bool:
        """Whether it cannot run, now and until somebody wakes it."""
        return self.state in "TtZXx"


def numbers() -> list[int]:
    """Return every process of this machine."""
    return [int(name) for name in os.listdir(_PROC) if name.isdigit()]


def arguments(pid: int) -> list[str]:
    """Return a process's command line; empty for one that is gone."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return raw.decode(errors="replace").rstrip("\0").split("\0") if raw else []


def namespace(pid: int, kind: str) -> str | None:
    """Return which namespace a process is in; ``None`` for one that is gone."""
    try:
        return os.readlink(_PROC / str(pid) / "ns" / kind)
    except OSError:
        return None


def within(namespaces: set[tuple[str, str | None]]) -> list[int]:
    """Return the processes that are in any of some namespaces, given as kind and name."""
    return [
        pid
        for pid in numbers()
        if any(namespace(pid, kind) == name for kind, name in namespaces if name is not None)
    ]


def inner_numbers(pid: int) -> list[int]:
    """Return a process's numbers, from this machine's down to the innermost namespace's."""
    try:
        text = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith("NSpid:")), "")
    return [int(number) for number in line.split()[1:]]


def find_inits(module: str) -> Iterator[tuple[int, list[str]]]:
    """Yield number and arguments of every first process of a namespace that runs ``module``."""
    for pid in numbers():
        words = arguments(pid)
        if tuple(words[1:4]) != PYTHON_OPTIONS or words[4:5] != [module]:
            continue
        inner = inner_numbers(pid)
        # The one that is about to be it has still the same number inside and out.
        if len(inner) > 1 and inner[-1] == 1:
            yield pid, words[5:]


def members(init: int) -> list[HostProcess]:
    """Return all processes of the host whose first process is ``init``, parents first."""
    own = namespace(init, "pid")
    if own is None:
        return []
    depth = len(inner_numbers(init))
    seen: dict[int, tuple[int, str]] = {}
    inside: set[int] = set()
    for pid in numbers():
        try:
            stat = (_PROC / str(pid) / "stat").read_text()
        except OSError:
            continue
        state, parent = stat.rpartition(")")[2].split()[:2]
        seen[pid] = (int(parent), state)
        if namespace(pid, "pid") == own:
            inside.add(pid)
    # A process may have made a namespace of its own further down: it still belongs to the host.
    grew = True
    while grew:
        more = {pid for pid, (parent, _) in seen.items() if parent in inside} - inside
        inside |= more
        grew = bool(more)

    def generation(pid: int) -> int:
        count = 0
        while pid in inside and (pid := seen[pid][0]):
            count += 1
        return count

    found = []
    for pid in sorted(inside, key=lambda pid: (generation(pid), pid)):
        inner = inner_numbers(pid)
        if len(inner) < depth:
            continue
        above, condition = seen[pid]
        words = arguments(pid)
        found.append(
            HostProcess(
                pid=pid,
                parent=above,
                inner_pid=inner[depth - 1],
                state=condition,
                command=" ".join(words) or f"[{name_of(pid)}]",
            )
        )
    return found


def name_of(pid: int) -> str:
    """Return the short name of a process."""
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "?"


def parent_of(pid: int) -> int:
    """Return the number of a process's parent; 0 if it has none, or is gone."""
    try:
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def state_of(pid: int) -> str:
    """Return a process's state as one letter; X when it is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal processes; those that are gone are passed over."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def of_session(session: int) -> list[int]:
    """Return the processes of a session that have not ended, its leader left out."""
    found = []
    for pid in numbers():
        try:
            stat = (_PROC / str(pid) / "stat").read_text()
        except OSError:
            continue
        state, _, _, its_session = stat.rpartition(")")[2].split()[:4]
        if int(its_session) == session and pid != session and state not in "ZXx":
            found.append(pid)
    return found


def enter(process: int, *namespaces: str) -> list[str]:
    """Return the start of a command that runs in namespaces of a process."""
    return ["nsenter", "-t", str(process), *namespaces, "--"]


def eventually(look: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until ``look`` finds what it looks for."""
    end = time.monotonic() + timeout_s
    while not look():
        if time.monotonic() > end:
            raise RigError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.005)

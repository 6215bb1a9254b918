"""What the machine does meanwhile: its disk, and who uses its cores."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Set in the environment of everything that is started here, so that it is told from others.
MARK = "HCNA_RAY_BENCHMARK"
_TICKS = os.sysconf("SC_CLK_TCK")
_KTHREADD = 2


@dataclass(frozen=True, slots=True)
class Process:
    """A live process as ``/proc`` shows it."""

    pid: int
    parent: int
    name: str
    #: CPU time of itself so far, seconds.
    cpu_s: float
    resident_bytes: int
    #: Voluntary and involuntary switches of all its threads: how often it was woken.
    wakeups: int
    #: When it began, in ticks since the start of the machine: tells it from a later one of its pid.
    began: int
    #: Whether it has ended and nobody has asked how.
    ended: bool


def processes(*, wakeups: bool = False) -> dict[int, Process]:
    """Return every live process by pid; counting wake-ups reads every thread, so ask for it."""
    found: dict[int, Process] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text()
            switches = _switches(Path(entry.path)) if wakeups else 0
        except OSError:  # It ended meanwhile.
            continue
        name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :]
        fields = rest.split()
        found[int(entry.name)] = Process(
            pid=int(entry.name),
            parent=int(fields[1]),
            name=name,
            cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
            resident_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
            wakeups=switches,
            began=int(fields[19]),
            ended=fields[0] == "Z",
        )
    return found


def _switches(folder: Path) -> int:
    count = 0
    for thread in (folder / "task").iterdir():
        for line in (thread / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                count += int(line.rsplit("\t", 1)[1])
    return count


def marked(value: str, mark: str = MARK) -> set[int]:
    """Return the pids of processes whose environment carries a mark."""
    wanted = f"{mark}={value}".encode()
    found: set[int] = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables:
            found.add(int(entry.name))
    return found


def descendants(roots: set[int], alive: Mapping[int, Process]) -> set[int]:
    """Return processes and all below them."""
    found = set(roots)
    grew = True
    while grew:
        more = {pid for pid, one in alive.items() if one.parent in found} - found
        found |= more
        grew = bool(more)
    return found


def family(mark: str, roots: set[int], alive: Mapping[int, Process]) -> set[int]:
    """Return the live processes of a system under test.

    Those that write what they are into ``ps`` (Redis, PostgreSQL, Ray's workers) write over their
    environment, and with it the mark: they are found as children of others.

    Args:
        mark: Value of `MARK` in the environment of those that keep it.
        roots: Those that were started directly.
        alive: Every live process.
    """
    return descendants(marked(mark) | roots, alive) & set(alive)


def command_line(pid: int) -> str:
    """Return what a process was started as, or what it calls itself; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Cores used over a while."""

    seconds: float
    #: By the system under test; not by the load generator.
    system_cores: float
    #: By processes that have nothing to do with any of it, and by the machine's host (steal).
    foreign_cores: float
    stolen_cores: float
    load_average: float


class Meter:
    """Measures who uses the cores, from its start to `read`."""

    def __init__(self, mark: str, roots: set[int]) -> None:
        """Begin to measure the processes of a `family`."""
        self._mark, self._roots = mark, roots
        self._at = time.perf_counter()
        self._load = os.getloadavg()[0]
        self._children_s = _children_s()
        self._before = self._sums()
        self._busy, self._stolen = _busy()

    def _sums(self) -> tuple[dict[int, float], dict[int, float]]:
        """Return CPU times by pid: of the system under test, and of all whose use is known."""
        alive = processes()
        system = family(self._mark, self._roots, alive)
        own = descendants({os.getpid()}, alive)
        kernel = {pid for pid, one in alive.items() if _KTHREADD in (pid, one.parent)}
        known = system | own | kernel
        return (
            {pid: alive[pid].cpu_s for pid in system},
            {pid: alive[pid].cpu_s for pid in known if pid in alive},
        )

    def read(self) -> Usage:
        """Return what was used since."""
        seconds = time.perf_counter() - self._at
        after = self._sums()
        busy, stolen = _busy()
        ended = _children_s() - self._children_s
        system, known = (
            sum(cpu - then.get(pid, 0.0) for pid, cpu in now.items())
            for then, now in zip(self._before, after, strict=True)
        )
        return Usage(
            seconds=seconds,
            system_cores=system / seconds,
            foreign_cores=max(0.0, (busy - self._busy - known - ended) / seconds),
            stolen_cores=(stolen - self._stolen) / seconds,
            load_average=self._load,
        )


def _children_s() -> float:
    """Return the CPU time of children that have ended: load generators, while a meter runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _busy() -> tuple[float, float]:
    """Return the seconds of CPU time that processes have used, and that the host has taken."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, _, _, steal = (int(field) / _TICKS for field in fields[:8])
    return user + nice + system, steal


def described() -> str:
    """Return the machine in a few words."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {os.uname().release}"

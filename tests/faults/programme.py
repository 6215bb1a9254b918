"""The frame of the fault programme: parts made of cases, run one after the other, and resumed.

A *part* is a module of `tests.faults.parts` with a ``PART``. It lists its cases for a seed and a
size, and runs them in what they share (hosts, a database server). A *case* is the smallest thing
that can be repeated by its name and seed; its *outcome* counts what was tried and tells what broke.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import queue
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Protocol

from tests.faults import parts
from tests.support import json_lines
from tests.support.sources import ROOT, commit, digest

RESULTS = ROOT / "build" / "faults"
#: All randomness follows from it; another one makes another programme of the same kind.
DEFAULT_SEED = 20260

#: How a violation begins that is none by itself, and nothing that may pass for a clean case.
FELL_OVER = "the case itself failed"

#: What the programme counts, in the order of its table.
LINES = (
    "kill points, moderator and store alone",
    "kill points, whole stack",
    "partitions healed within 40 s",
    "partitions of 90 to 300 s",
    "pauses beyond the lease",
    "reboots",
    "reboots of all hosts at once",
    "power-loss images, FULL",
    "power-loss images, NORMAL",
    "disk errors (ENOSPC, EIO)",
    "slow disks",
    "damaged files",
    "backups restored",
    "rules, one scenario each",
    "PostgreSQL: server and moderator killed, stopped, away",
    "model steps, Hypothesis",
    "model steps, random walk",
    "moderator steps, random walk",
    "differential sequences",
    "states searched",
    "offers under overload",
    "minutes of soak",
)


class Size(StrEnum):
    """How much of a part: what `make test` affords, or all of it."""

    SLICE = "slice"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to run that can be repeated by its name."""

    #: Unique in its part; letters, digits, dots and hyphens.
    name: str
    #: Everything random in the case follows from it.
    seed: int
    #: What the case does, in words of its part; JSON.
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Outcome:
    """What a case tried and what it found."""

    #: Broken promises, with what is needed to look into them. Empty: none.
    violations: list[str] = field(default_factory=list)
    #: How often something was tried, by its line of `LINES`.
    counts: dict[str, int] = field(default_factory=dict)
    #: Seconds that something took, each time.
    times_s: dict[str, list[float]] = field(default_factory=dict)
    #: What a reader of the log wants to know besides.
    notes: list[str] = field(default_factory=list)


RunCase = Callable[[Case, Path], Outcome]


class Part(Protocol):
    """A part of the programme."""

    #: The module's name.
    name: str
    #: What it does, in one line.
    title: str
    #: How long all of it may take on two cores.
    budget_s: float
    #: Whether only root can run it.
    needs_root: bool
    #: It runs only when it is named: it takes long and has a command of its own.
    only_when_named: bool
    #: Nothing in it is timed and every case is on its own: as many run at once as there are cores.
    side_by_side: bool

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the cases, always the same for a seed and a size."""

    def open(self, folder: Path) -> AbstractContextManager[RunCase]:
        """Make what the cases share; what it yields runs one, with an empty folder of its own."""


def part_names() -> list[str]:
    """Return the names of all parts, in order."""
    return [module.name for module in pkgutil.iter_modules(parts.__path__)]


def all_parts(only: Sequence[str] = ()) -> dict[str, Part]:
    """Return every part by name, in order of name, or these alone: importing all takes seconds."""
    found: dict[str, Part] = {}
    for name in only or part_names():
        part: Part | None = getattr(
            importlib.import_module(f"{parts.__name__}.{name}"), "PART", None
        )
        if part is not None:
            found[part.name] = part
    return found


# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of ``results.jsonl``: a case that was run."""

    part: str
    case: str
    seed: int
    size: str
    #: The state of the sources it was run on.
    commit: str
    digest: str
    started_at: float
    took_s: float
    violations: list[str]
    counts: dict[str, int]
    times_s: dict[str, list[float]]
    notes: list[str]


def product_digest() -> str:
    """Return a short hash of the product's sources: results of other sources are not these."""
    return digest("hcna_ray")


def stated(violations: Sequence[str]) -> str | None:
    """Return the first violation that a case stated; a case that fell over states none."""
    return next((one for one in violations if not one.startswith(FELL_OVER)), None)


class Ledger:
    """The results of all runs so far, one line a case; a torn last line is left out."""

    def __init__(self, folder: Path) -> None:
        """Open or begin the results in a folder."""
        self.folder = folder
        self._file = folder / "results.jsonl"
        self.results = json_lines.read(self._file, Result)

    def add(self, result: Result) -> None:
        """Append a result, durably enough for a programme that is killed."""
        self.results.append(result)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def last(self, digest: str | None = None) -> dict[tuple[str, str, int], Result]:
        """Return the last result of each case, of these sources or of any."""
        return {
            (one.part, one.case, one.seed): one
            for one in self.results
            if digest is None or one.digest == digest
        }


# -- running ---------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Programme:
    """Runs cases of parts, and keeps their results."""

    ledger: Ledger
    say: Callable[[str], None]
    size: Size = Size.FULL
    seed: int = DEFAULT_SEED
    #: When to stop, on the monotonic clock: what is left is for the next run.
    end_at: float = float("inf")
    #: Run also what has a result of these sources.
    again: bool = False
    #: Go no further after the first violation that a case stated.
    fail_fast: bool = False

    def run(self, part: Part, only: Sequence[str] = ()) -> list[Result]:
        """Run a part's cases that have no result yet; return the new results."""
        cases = [one for one in part.cases(self.seed, self.size) if not only or one.name in only]
        if only and len(cases) < len(only):
            missing = set(only) - {one.name for one in cases}
            raise LookupError(f"part {part.name} has no case {', '.join(sorted(missing))}")
        digest = product_digest()
        done = {} if self.again or only else self.ledger.last(digest)
        left = [one for one in cases if (part.name, one.name, one.seed) not in done]
        self.say(
            f"{part.name}: {part.title}; {len(left)} of {len(cases)} cases to run, "
            f"seed {self.seed}, budget {part.budget_s:.0f} s"
        )
        found: list[Result] = []
        if not left:
            return found
        with ExitStack() as stack:
            for result in self._results(part, left, digest, stack):
                found.append(result)
                self.ledger.add(result)
                self.say(
                    f"{part.name} {len(found)}/{len(left)} {result.case} (seed {result.seed}): "
                    f"{_told(result)}, {result.took_s:.1f} s"
                )
                for violation in result.violations:
                    self.say(f"  BROKEN {violation}")
                if self.fail_fast and stated(result.violations) is not None:
                    return found
        if len(found) < len(left):
            self.say(f"{part.name}: out of time; {len(left) - len(found)} cases are left")
        return found

    def _results(
        self, part: Part, cases: Sequence[Case], digest: str, stack: ExitStack
    ) -> Iterator[Result]:
        """Yield results as they come, until the time is over; ``stack`` ends what is under way."""
        folder = self.ledger.folder / "evidence" / part.name
        lanes = min(len(cases), os.cpu_count() or 1) if part.side_by_side else 1
        if lanes > 1:
            yield from stack.enter_context(_lanes(self, part.name, cases, digest, lanes))
            return
        run_case = stack.enter_context(part.open(_emptied(folder / "shared")))
        for case in cases:
            if time.monotonic() > self.end_at:
                return
            yield self.one(part, case, run_case, folder / case.name, digest)

    def one(self, part: Part, case: Case, run_case: RunCase, folder: Path, digest: str) -> Result:
        """Run one case."""
        started_at, begun = time.time(), time.monotonic()
        try:
            outcome = run_case(case, _emptied(folder))
        except Exception:
            outcome = Outcome(violations=[f"{FELL_OVER}:\n{traceback.format_exc()}"])
        if not outcome.violations:
            shutil.rmtree(folder, ignore_errors=True)
        strange = set(outcome.counts) - set(LINES)
        if strange:
            raise LookupError(f"the table has no line {', '.join(sorted(strange))}")
        return Result(
            part=part.name,
            case=case.name,
            seed=case.seed,
            size=self.size,
            commit=commit(),
            digest=digest,
            started_at=started_at,
            took_s=time.monotonic() - begun,
            violations=outcome.violations,
            counts=outcome.counts,
            times_s=outcome.times_s,
            notes=outcome.notes,
        )


@contextmanager
def _lanes(
    programme: Programme, part: str, cases: Sequence[Case], digest: str, count: int
) -> Iterator[Iterator[Result]]:
    """Run cases in processes side by side; what it yields tells their results as they come."""
    # Not forked: who forks takes the other threads' locks along.
    spawn = multiprocessing.get_context("spawn")
    todo: Queue[Case | None] = spawn.Queue()
    done: Queue[Result | None] = spawn.Queue()
    for case in [*cases, *[None] * count]:
        todo.put(case)
    given = (programme.ledger.folder, programme.size, part, digest)
    seconds = programme.end_at - time.monotonic()
    lanes = [
        spawn.Process(target=_lane, args=(*given, number, seconds, todo, done))
        for number in range(count)
    ]

    ended = 0

    def results() -> Iterator[Result]:
        nonlocal ended
        while ended < count:
            try:
                result = done.get(timeout=1.0)
            except queue.Empty:
                if any(one.exitcode for one in lanes):
                    raise RuntimeError(f"{part}: a process that ran cases has died") from None
                continue
            if result is None:
                ended += 1
            else:
                yield result

    try:
        for lane in lanes:
            lane.start()
        yield results()
    finally:
        for lane in lanes:
            # As Ctrl-C does it, so that it takes down what it has started.
            if ended < count and lane.is_alive() and lane.pid is not None:
                os.kill(lane.pid, signal.SIGINT)
        while any(lane.is_alive() for lane in lanes):
            with suppress(queue.Empty):  # It cannot end before somebody takes what it says.
                done.get(timeout=0.1)


def _lane(
    folder: Path,
    size: Size,
    name: str,
    digest: str,
    number: int,
    seconds: float,
    todo: Queue[Case | None],
    done: Queue[Result | None],
) -> None:
    """Run cases until there are no more, or no more time, in a process of its own."""
    os.setsid()  # Ctrl-C comes from who started it, and once.
    parent = os.getppid()
    programme = Programme(ledger=Ledger(folder), say=lambda text: None, size=size)
    part = all_parts([name])[name]
    evidence = folder / "evidence" / name
    end_at = time.monotonic() + seconds
    with suppress(KeyboardInterrupt), part.open(_emptied(evidence / f"shared-{number}")) as run:
        while time.monotonic() < end_at and os.getppid() == parent:
            case = todo.get()
            if case is None:
                break
            done.put(programme.one(part, case, run, evidence / case.name, digest))
    done.put(None)


def run_one(part: Part, case: Case, run_case: RunCase, folder: Path) -> Outcome:
    """Run a case of the slice, for pytest: whatever goes wrong is raised."""
    del part
    return run_case(case, _emptied(folder))


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _told(result: Result) -> str:
    told = [f"{n} {line}" for line, n in result.counts.items()]
    told += result.notes
    told.append(f"{len(result.violations)} violations" if result.violations else "clean")
    return ", ".join(told)


def times(results: Sequence[Result]) -> Iterator[tuple[str, list[float]]]:
    """Yield every measured time's name with all its samples, in ascending order."""
    gathered: dict[str, list[float]] = {}
    for one in results:
        for name, samples in one.times_s.items():
            gathered.setdefault(name, []).extend(samples)
    for name in sorted(gathered):
        yield name, sorted(gathered[name])

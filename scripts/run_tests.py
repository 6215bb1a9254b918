"""Run the parts of the suite, each within its time budget, and add them up.

Parts that start neither Ray nor hosts run side by side, one for each core of a small machine; what
such a part prints comes when it has ended. The others follow, each with the machine for itself.
Every pytest part is a process (and process group) of its own. A part that exceeds its budget is
interrupted, so that its fixtures can clean up, then killed, and counts as failed. The last line is
``N passed, N failed, N skipped`` over all parts; a static check counts as one test.

``HCNA_REQUIRE_ALL=1`` counts a skipped test as failed. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
REPORTS = ROOT / "build" / "test-reports"

#: Parts that run at once, of those that may.
LANES = 2
#: An interrupted part may still take its cluster down.
INTERRUPT_S = 60.0
TERMINATE_S = 10.0
#: Lines of a part's output that are repeated under the table.
REPEATED = ("state machine:", "measured:", "FAIL Required test coverage")
#: Variables of the caller that do not reach the tests: they speak of a running instance or a
#: database, and the tests bring their own.
DROPPED = ("HCNA_", "RAY_", "PYTEST_", "PG", "DATABASE_URL")
#: Those that do nevertheless.
KEPT = ("HCNA_REQUIRE_ALL", "HCNA_MODEL_STEPS", "HCNA_KEEP_LOGS", "HCNA_TEST_", "HCNA_FUZZ_")


#: Children of this program.
RUNNING: list[subprocess.Popen[bytes]] = []
#: Children that begin now are to end at once.
STOPPING = threading.Event()


class Interrupted(Exception):
    """Somebody asked this program to stop."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something to run: static checks (``commands``) or tests (``pytest`` arguments)."""

    name: str
    kind: str
    budget_s: float
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pytest: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    #: May run beside other parts.
    shares: bool = False


@dataclass(kw_only=True)
class Tally:
    """What became of a part."""

    part: Part
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    took_s: float = 0.0
    #: What to say about it besides the numbers.
    notes: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    #: What it has printed, if that was kept from the terminal.
    output: str = ""

    @property
    def ran(self) -> int:
        """Tests that were run to an end, good or bad."""
        return self.passed + self.failed


def parts(everything: bool) -> list[Part]:
    """Return all parts in order: of those that share the machine the longest first.

    Budgets are for two cores; ``make test`` needs half of them.
    """
    tool = {name: str(BIN / name) for name in ("ruff", "mypy", "lint-imports")}
    static: dict[str, Sequence[str]] = {
        "ruff check": [tool["ruff"], "check", "."],
        "ruff format --check": [tool["ruff"], "format", "--check", "."],
        "mypy --strict": [tool["mypy"], "hcna_ray", "scripts", "benchmarks"],
        "import contracts": [tool["lint-imports"]],
    }
    if uv := os.environ.get("UV"):
        static["uv.lock is up to date"] = [uv, "lock", "--check", "--quiet"]
    # What takes minutes of waiting, or a cluster of its own, is for ``make test-all``.
    usual = [] if everything else ["-m", "not drill"]
    found = [
        Part(
            name="lint, types, contracts", kind="static", budget_s=180, commands=static, shares=True
        ),
        Part(
            name="contract",
            kind="contract",
            budget_s=900,
            pytest=["tests/contract"],
            shares=True,
        ),
        Part(
            name="unit",
            kind="unit",
            budget_s=780,
            pytest=["tests/unit", "--ignore=tests/unit/core"],
            shares=True,
        ),
        Part(
            name="slice of the faults",
            kind="faults",
            budget_s=720,
            pytest=["tests/faults", "-k", "not whole_kills"],
            shares=True,
        ),
        Part(
            name="the served OpenAPI, fuzzed",
            kind="fuzz",
            budget_s=5400 if everything else 600,
            pytest=["tests/fuzz"],
            env={"HCNA_FUZZ_EXAMPLES": "500"} if everything else {},
            shares=True,
        ),
        Part(
            name="property",
            kind="property",
            budget_s=1800 if everything else 480,
            pytest=["tests/property"],
            env={"HCNA_MODEL_STEPS": "500000"} if everything else {},
            shares=True,
        ),
        Part(
            name="checker",
            kind="checker",
            budget_s=300,
            pytest=["tests/checker", "tests/seeded_bugs"],
            shares=True,
        ),
        Part(
            name="core, branch coverage 100 %",
            kind="unit",
            budget_s=120,
            pytest=[
                "tests/unit/core",
                "--cov=hcna_ray.core",
                "--cov-config=scripts/core_coverage.ini",
                "--cov-report=term-missing:skip-covered",
            ],
            env={"COVERAGE_FILE": str(REPORTS / "core.coverage")},
            shares=True,
        ),
        Part(
            name="Prometheus, rules, Grafana",
            kind="unit",
            budget_s=240,
            pytest=["tests/monitoring"],
            shares=True,
        ),
        Part(
            name="the page, in Chromium",
            kind="page",
            budget_s=300,
            pytest=["tests/page"],
            shares=True,
        ),
        Part(
            name="slice of the faults, whole cluster",
            kind="faults",
            budget_s=600,
            pytest=["tests/faults", "-k", "whole_kills"],
        ),
        Part(
            name="integration, notebooks",
            kind="integration",
            budget_s=1800,
            pytest=["tests/integration", *usual],
        ),
        Part(
            name="hosts of their own",
            kind="rig",
            budget_s=1800,
            pytest=["tests/rig", *usual],
        ),
    ]
    if everything and (ROOT / "tests" / "acceptance").is_dir():
        found.append(
            Part(name="acceptance", kind="acceptance", budget_s=3600, pytest=["tests/acceptance"])
        )
    return found


def environment(part: Part) -> dict[str, str]:
    """Return the environment of a part's processes."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(KEPT) or not name.startswith(DROPPED)
    }
    kept["PATH"] = os.pathsep.join((str(BIN), kept.get("PATH", os.defpath)))
    return {**kept, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", **part.env}


def run_process(
    command: Sequence[str], *, env: Mapping[str, str], log: Path, budget_s: float, quiet: bool
) -> tuple[int | None, str]:
    """Run a command in a process group of its own.

    Args:
        command: What to run, in the repository's root.
        env: Its whole environment.
        log: File that gets its output.
        budget_s: How long it may take.
        quiet: Keep its output from the terminal.

    Returns:
        Its exit code, or ``None`` if it exceeded the budget, and its output.
    """
    output = bytearray()
    with log.open("wb") as file:
        child = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
        RUNNING.append(child)
        if STOPPING.is_set():
            end_group(child)

        def copy() -> None:
            assert child.stdout is not None
            while chunk := child.stdout.read(65536):
                output.extend(chunk)
                file.write(chunk)
                file.flush()
                if not quiet:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.buffer.flush()

        copying = threading.Thread(target=copy, daemon=True)
        copying.start()
        try:
            code: int | None = child.wait(timeout=budget_s)
        except subprocess.TimeoutExpired:
            code = None
            end_group(child)
        except BaseException:
            end_group(child)
            raise
        finally:
            RUNNING.remove(child)
        # Something that the command left behind may hold the pipe open; do not wait for that.
        copying.join(timeout=5.0)
        return code, output.decode("utf-8", "replace")


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a process group: ask pytest to stop, then ask everybody, then kill."""
    for number, patience_s in (
        (signal.SIGINT, INTERRUPT_S),
        (signal.SIGTERM, TERMINATE_S),
        (signal.SIGKILL, TERMINATE_S),
    ):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            continue
        if number is signal.SIGKILL:
            return


def run_part(part: Part, *, beside: bool = False) -> Tally:
    """Run a part.

    Args:
        part: Which.
        beside: Others run at the same time, so it prints when it has ended.
    """
    say(f"== {part.name}")
    started = time.monotonic()
    tally = run_static(part) if part.commands else run_pytest(part, quiet=beside)
    tally.took_s = time.monotonic() - started
    if beside:
        say(f"== {part.name}: ended")
    if tally.output:
        say(tally.output.rstrip())
    return tally


def run_beside(chosen: Sequence[Part]) -> list[Tally]:
    """Run parts side by side. Who is interrupted ends them all."""
    pool = ThreadPoolExecutor(LANES)
    jobs = [pool.submit(run_part, part, beside=True) for part in chosen]
    try:
        return [job.result() for job in jobs]
    except BaseException:
        STOPPING.set()
        for job in jobs:
            job.cancel()
        for child in tuple(RUNNING):
            end_group(child)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_static(part: Part) -> Tally:
    """Run each check; show the output of those that fail."""
    tally = Tally(part=part)
    lines = []
    end = time.monotonic() + part.budget_s
    for number, (name, command) in enumerate(part.commands.items()):
        code, output = run_process(
            command,
            env=environment(part),
            log=REPORTS / f"static-{number}.log",
            budget_s=max(1.0, end - time.monotonic()),
            quiet=True,
        )
        if code == 0:
            tally.passed += 1
            lines.append(f"  {name}: ok")
            continue
        tally.failed += 1
        why = "exceeded the budget" if code is None else f"exit code {code}"
        tally.notes.append(f"{name}: {why}")
        lines += [f"  {name}: FAILED ({why})", output.rstrip()]
    tally.output = "\n".join(lines)
    return tally


def run_pytest(part: Part, *, quiet: bool) -> Tally:
    """Run pytest once and read what it reports."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in part.name)
    junit = REPORTS / f"{slug}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={junit}"]
    code, output = run_process(
        [*command, *part.pytest],
        env=environment(part),
        log=REPORTS / f"{slug}.log",
        budget_s=part.budget_s,
        quiet=quiet,
    )
    tally = Tally(part=part, output=output if quiet else "")
    tally.repeated = [line for line in output.splitlines() if line.startswith(REPEATED)]
    found = list(cases(junit))
    if code is None and found and found[-1][1] == "passed":
        found.pop()  # It is in the report because it was interrupted, not because it passed.
    for name, outcome, detail in found:
        if outcome == "skipped" and os.environ.get("HCNA_REQUIRE_ALL") != "1":
            tally.skipped += 1
            tally.notes.append(f"skipped {name}: {detail}")
        elif outcome == "skipped":
            tally.failed += 1
            tally.notes.append(f"skipped, which HCNA_REQUIRE_ALL=1 forbids: {name}: {detail}")
        elif outcome == "failed":
            tally.failed += 1
            tally.notes.append(f"failed {name}")
        else:
            tally.passed += 1
    if code is None:
        tally.failed += 1
        tally.notes.append(f"exceeded its budget of {part.budget_s:.0f} s and was killed")
    elif tally.ran + tally.skipped == 0:
        tally.failed += 1
        tally.notes.append(f"no test ran (exit code {code})")
    elif code and not tally.failed:
        tally.failed += 1
        tally.notes.append(f"all tests passed, but pytest ended with exit code {code}")
    return tally


def cases(junit: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (name, ``passed`` | ``failed`` | ``skipped``, message) of every test in a report."""
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError):
        return
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        bad = case.find("failure") if case.find("error") is None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            yield name, "failed", bad.get("message", "")
        elif skipped is not None:
            yield name, "skipped", skipped.get("message", "")
        else:
            yield name, "passed", ""


def say(text: str) -> None:
    """Print at once: output of the parts goes to the same place."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(tallies: Sequence[Tally]) -> Iterator[str]:
    """Yield the lines of the closing table."""
    width = max(len(tally.part.name) for tally in tallies)
    yield f"{'part':<{width}}  tests  passed  failed  skipped  seconds  budget"
    for one in tallies:
        yield (
            f"{one.part.name:<{width}}  {one.ran + one.skipped:5}  {one.passed:6}  {one.failed:6}  "
            f"{one.skipped:7}  {one.took_s:7.1f}  {one.part.budget_s:6.0f}"
        )
    took_s = sum(one.took_s for one in tallies)
    budget_s = sum(one.part.budget_s for one in tallies)
    yield f"{'all':<{width}}  {'':29}  {took_s:7.1f}  {budget_s:6.0f}"


def closing(tallies: Sequence[Tally], took_s: float) -> Iterator[str]:
    """Yield everything that is said at the end; the last line is the sum."""
    yield from table(tallies)
    yield f"{took_s / 60:.1f} minutes in all"
    for one in tallies:
        yield from one.repeated
        yield from (f"{one.part.name}: {note}" for note in one.notes)
    kinds: dict[str, int] = {}
    for one in tallies:
        kinds[one.part.kind] = kinds.get(one.part.kind, 0) + one.ran
    yield "ran: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    sums = (
        sum(tally.passed for tally in tallies),
        sum(tally.failed for tally in tallies),
        sum(tally.skipped for tally in tallies),
    )
    yield f"{sums[0]} passed, {sums[1]} failed, {sums[2]} skipped"


def _on_signal(number: int, _: FrameType | None) -> None:
    """Stop; whoever asks twice does not want to wait for what is being cleaned up."""
    if STOPPING.is_set():
        for child in tuple(RUNNING):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        return
    STOPPING.set()
    raise Interrupted(signal.Signals(number).name)


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; return 0 only if everything passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = parts(everything=True)
    parser.add_argument(
        "kinds", nargs="*", metavar="kind", help=", ".join(dict.fromkeys(p.kind for p in known))
    )
    parser.add_argument("--all", action="store_true", help="also what takes long")
    options = parser.parse_args(arguments)
    chosen = [one for one in parts(options.all) if not options.kinds or one.kind in options.kinds]
    if not chosen:
        parser.error(f"there is no part {' '.join(options.kinds)}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    for stale in REPORTS.iterdir():
        if stale.is_file():
            stale.unlink()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    tallies: list[Tally] = []
    started = time.monotonic()
    sharing = [part for part in chosen if part.shares]
    if len(sharing) == 1:
        sharing = []  # There is nobody to wait for.
    try:
        tallies += run_beside(sharing)
        for part in chosen:
            if part not in sharing:
                tallies.append(run_part(part))
    except Interrupted as stop:
        say(f"\nstopped by {stop}; nothing more is run")
        left = [part for part in chosen if part not in [one.part for one in tallies]]
        tallies.append(Tally(part=left[0], failed=1, notes=["was interrupted"]))
    say("")
    for line in closing(tallies, time.monotonic() - started):
        say(line)
    return 1 if any(tally.failed for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

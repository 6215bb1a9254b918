"""``make bench``: measure, then write ``docs/PERFORMANCE.md``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from benchmarks.children import FOLDER, ROOT, Trouble
from benchmarks.machine import described
from benchmarks.parts import PARTS, Stop, stops
from benchmarks.plot import svg
from benchmarks.report import COLUMNS, PLOT, Results, console_table, measured_part, write_page
from benchmarks.results import Ledger, Result, sources_digest
from benchmarks.systems import SYSTEMS, chosen, see_peers
from benchmarks.visits import FULL, QUICK, Size
from tests.support.sources import commit

PAGE = ROOT / "docs" / "PERFORMANCE.md"


def main(words: Sequence[str]) -> int:
    """Measure what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a short look at the rounds; the page is not written"
    )
    parser.add_argument(
        "--only", default="", help="names of systems, with commas: hcna,celery,...; and floors"
    )
    parser.add_argument("--part", action="append", default=[], choices=PARTS, help="not all parts")
    parser.add_argument("--rounds", type=int, default=0, help="how many, instead of 5 (quick: 2)")
    parser.add_argument("--again", action="store_true", help="measure also what has a result")
    given = parser.parse_args(words)
    size = QUICK if given.quick else FULL
    names = [name for name in given.only.split(",") if name]
    parts = given.part or (["rounds"] if given.quick else list(PARTS))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        systems = (
            chosen([name for name in names if name != "floors"]) if names != ["floors"] else []
        )
        with_floors = "floors" in names or not (names or given.quick)
        if any(system.name != "hcna" for system in systems):
            see_peers()
        rounds = given.rounds or size.rounds
        wanted = [
            stop
            for part in parts
            for stop in stops(part, systems, size, rounds, with_floors=with_floors)
        ]
        found = run(wanted, size, again=given.again)
    except (Trouble, LookupError) as error:
        say(f"stopped: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything that was started has been ended. The same command goes on")
        return 130
    rows = [one for one in found if one.part == "rounds"]
    if rows:
        sys.stdout.write(console_table(rows, systems) + "\n")
    if size is FULL and found:
        write(Results(Ledger().of(sources_digest(), size.name)))
    return 0 if len(found) == len(wanted) else 1


def write(found: Results) -> None:
    """Write the generated part of the page, and the plot."""
    nice = os.nice(0)
    machine = described() + (f", run at nice {nice}" if nice else "")
    write_page(PAGE, measured_part(found, SYSTEMS, machine))
    (PAGE.parent / PLOT).write_text(svg(found, SYSTEMS))
    say(f"written: {PAGE}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def say(words: str) -> None:
    """Tell how far it is."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {words}\n")
    sys.stderr.flush()


def run(wanted: Sequence[Stop], size: Size, *, again: bool) -> list[Result]:
    """Make every visit that has no result yet; return the results of all."""
    ledger, digest = Ledger(), sources_digest()
    known = {} if again else {one.key: one for one in ledger.of(digest, size.name)}
    found: list[Result] = []
    for number, stop in enumerate(wanted, 1):
        where = f"{number} of {len(wanted)}: {stop.part} {stop.round}, {stop.of}"
        before = known.get((stop.part, stop.of, stop.round))
        if before is not None:
            say(f"{where}: measured already")
            found.append(before)
            continue
        say(f"{where}: starting")
        try:
            result = made(stop, size, digest)
        except Trouble as error:  # The next one may still be measured; this one the next time.
            say(f"{where}: FAILED, {error}")
            continue
        ledger.add(result)
        found.append(result)
        say(f"{where}: {in_short(result)}")
    return found


def made(stop: Stop, size: Size, digest: str) -> Result:
    """Make a visit."""
    at, begun = time.time(), time.perf_counter()
    seen = stop.measure(FOLDER / "run" / stop.of)
    watched = sum(one.seconds for one in seen.usages) or 1.0
    return Result(
        part=stop.part,
        of=stop.of,
        round=stop.round,
        size=size.name,
        digest=digest,
        commit=commit(),
        at=at,
        took_s=time.perf_counter() - begun,
        fsync_ms=seen.fsync_ms,
        load_average=seen.usages[0].load_average if seen.usages else 0.0,
        foreign_cores=sum(one.foreign_cores * one.seconds for one in seen.usages) / watched,
        figures=dict(seen.figures),
        notes=list(seen.notes),
    )


def in_short(result: Result) -> str:
    """Return the figures of a visit for the one who watches."""
    told = [
        f"{heading} {result.figures[name]:.{digits}f}"
        for name, heading, digits in COLUMNS
        if name in result.figures
    ]
    if not told:
        told = [f"{name} {value:.6g}" for name, value in result.figures.items()]
    return f"{', '.join(told)}; others used {result.foreign_cores:.2f} cores; {result.took_s:.0f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m tests.faults``: run the fault programme, or the part or case that is named.

0: nothing broken. 1: a promise is broken. 3: something was left for lack of time or rights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.programme import (
    DEFAULT_SEED,
    RESULTS,
    Ledger,
    Part,
    Programme,
    Size,
    all_parts,
    part_names,
    product_digest,
    stated,
)
from tests.faults.report import PAGE, parts_table, table, times_table, write_page

#: What `make faults` may take at most.
HOURS = 4.0


def say(text: str) -> None:
    """Print at once, with the time of day."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, print the table, write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--part", action="append", default=[], help="only this part; repeatable")
    parser.add_argument("--case", action="append", default=[], help="only this case of the part")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--slice", action="store_true", help="only what `make test` runs")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first violation")
    parser.add_argument("--hours", type=float, default=HOURS, help="stop after; go on another time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--list", action="store_true", help="list parts and cases")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    chosen = parser.parse_args(arguments)

    names = part_names()
    if unknown := set(chosen.part) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    known = all_parts(chosen.part)
    parts = [known[name] for name in chosen.part] or [
        one for one in known.values() if not one.only_when_named
    ]
    if chosen.case and len(parts) != 1:
        parser.error("--case needs exactly one --part")
    size = Size.SLICE if chosen.slice else Size.FULL
    if chosen.list:
        for part in parts:
            say(f"{part.name}: {part.title}")
            for case in part.cases(chosen.seed, size):
                say(f"  {case.name} seed {case.seed} {dict(case.options) or ''}")
        return 0
    programme = Programme(
        ledger=Ledger(chosen.results),
        say=say,
        size=size,
        seed=chosen.seed,
        end_at=time.monotonic() + chosen.hours * 3600,
        again=chosen.again,
        fail_fast=chosen.fail_fast,
    )
    if chosen.report:
        write_page(list(programme.ledger.last().values()))
        return 0
    return run(programme, parts, chosen.case)


def run(programme: Programme, parts: Sequence[Part], only: Sequence[str]) -> int:
    """Run parts; return the exit code."""
    left = 0
    for part in parts:
        if part.needs_root and os.geteuid() != 0:
            say(f"{part.name}: NOT RUN, it needs root")
            left += 1
            continue
        found = programme.run(part, only)
        if programme.fail_fast and any(stated(one.violations) for one in found):
            break
    last = programme.ledger.last(product_digest())
    results = [
        one
        for (name, _, _), one in last.items()
        if any(name == part.name for part in parts) and (not only or one.case in only)
    ]
    for part in parts:
        cases = part.cases(programme.seed, programme.size)
        left += sum(
            (part.name, one.name, one.seed) not in last
            for one in cases
            if not only or one.name in only
        )
    sys.stdout.write(f"\n{table(results)}\n\n{times_table(results)}\n\n{parts_table(results)}\n")
    if programme.size is Size.FULL and not only and programme.ledger.folder == RESULTS:
        write_page(list(programme.ledger.last().values()))
        say(f"written to {PAGE}")
    broken = sum(len(one.violations) for one in results)
    say(f"{len(results)} cases, {broken} violations, {left} cases left")
    return 1 if broken else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

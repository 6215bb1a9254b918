"""``python -m tests.seeded_bugs [NN ...]``: break the product on purpose, and see who notices.

Each bug is a patch (see `tests.seeded_bugs`) that is applied to a copy of the tree. In the copy the
slice that `make test` runs is run until its first violation, the parts that are meant to see the
bug first. Then those parts are run in full, also until their first violation; a case of the same
name as the one that saw it in the slice comes before all others. What counts is a violation that a
part or the checker states; a program that falls over has seen nothing. And it counts only if the
very same case is clean in an unbroken copy.

Results are kept in ``build/seeded-bugs/results.jsonl``; a bug that has one for these sources is not
run again. 0: all were caught. 1: some were not. 2: the unbroken product was accused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.programme import (
    DEFAULT_SEED,
    Size,
    all_parts,
    part_names,
    product_digest,
    stated,
)
from tests.faults.report import PAGE
from tests.seeded_bugs import ROOT, Bug, all_bugs, apply

RESULTS = ROOT / "build" / "seeded-bugs"
BEGIN, END = "<!-- seeded bugs: begin -->", "<!-- seeded bugs: end -->"
#: How long one part may look for one bug.
PART_S = 1800.0
SLICE_S = 900.0
#: Exit codes of ``python -m tests.faults`` after which its results can be read.
_RAN = (0, 1, 3)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A violation that was stated about a broken copy, and not about an unbroken one."""

    part: str
    case: str
    seed: int
    size: str
    said: str


@dataclass(kw_only=True)
class Verdict:
    """What became of one bug."""

    bug: str
    digest: str
    programme: Sight | None = None
    slice: Sight | None = None
    programme_ran: bool = False
    slice_ran: bool = False
    #: What fell over instead of stating a violation, and what could not be run.
    notes: list[str] = field(default_factory=list)
    #: Violations that the unbroken copy has as well.
    false_alarms: list[str] = field(default_factory=list)
    took_s: float = 0.0
    at: float = 0.0


def say(text: str) -> None:
    """Print at once, with the time of day."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


# -- copies ----------------------------------------------------------------------------------------


def tree_files() -> list[str]:
    """Return the files of the tree, also those that were not committed yet."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@contextmanager
def a_copy(bug: Bug | None) -> Iterator[Path]:
    """Make a copy of the tree, with the bug in it if there is one."""
    folder = Path(tempfile.mkdtemp(prefix="hcna-bug-"))
    # Servers that run as another user start from inside.
    folder.chmod(0o755)
    try:
        for name in tree_files():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        if bug is not None:
            apply(bug, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(tree: Path) -> str | None:
    """Give a copy an environment of its own, for hosts that run what is installed there."""
    done = subprocess.run(
        ["scripts/prepare.sh"], cwd=tree, capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-300:]


# -- looking ---------------------------------------------------------------------------------------


def look(
    tree: Path,
    part: str,
    size: Size,
    *,
    within_s: float,
    case: str | None = None,
    seed: int = DEFAULT_SEED,
) -> tuple[list[dict[str, Any]], str | None]:
    """Run a part in a copy until its first violation.

    Returns:
        The result lines, and why it could not be run to its end, if so.
    """
    results = tree / "build" / f"looked-{part}"
    shutil.rmtree(results, ignore_errors=True)
    own = tree / ".venv" / "bin" / "python"
    command = [str(own if own.exists() else sys.executable), "-m", "tests.faults"]
    command += ["--part", part, "--fail-fast", "--again", "--seed", str(seed)]
    command += ["--results", str(results), "--hours", str(within_s / 3600)]
    command += ["--slice"] if size is Size.SLICE else []
    command += ["--case", case] if case is not None else []
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    log = tree / "build" / f"looked-{part}.log"
    log.parent.mkdir(exist_ok=True)
    why: str | None = None
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(timeout=within_s + 300)
            if code not in _RAN:
                why = f"exit code {code}: {log.read_text()[-400:].strip()}"
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(timeout=60)
            why = f"not done after {within_s + 300:.0f} s"
    file = results / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines], why


class Control:
    """The unbroken copy: what it says of a case is asked once."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self._known: dict[tuple[str, str, Size], str | None] = {}

    def accuses(self, part: str, case: str, size: Size) -> str | None:
        """Return what the case says of the unbroken product; None: nothing."""
        name = (part, case, size)
        if name not in self._known:
            self._known[name] = self._ask(*name)
        return self._known[name]

    def _ask(self, part: str, case: str, size: Size) -> str | None:
        found, why = look(self.tree, part, size, within_s=PART_S, case=case)
        told = [sentence for one in found for sentence in one["violations"]]
        if why is None and found and not told:
            return None
        return str(told or why)[:300]


class Hunt:
    """The hunt for one bug, in a copy with it and a copy without."""

    def __init__(self, verdict: Verdict, broken: Path, control: Control) -> None:
        self._verdict, self._broken, self._control = verdict, broken, control
        self._prepared = False

    def hunt(
        self, parts: Iterable[str], size: Size, within_s: float, first: Sight | None = None
    ) -> Sight | None:
        """Look with each part; return the first sight that holds.

        Args:
            first: the case to begin with, if one of these parts has it in this size.
        """
        end = time.monotonic() + within_s
        names = list(parts)
        tries: list[tuple[str, str | None]] = [(name, None) for name in names]
        if first is not None and first.part in names and self._has(first.part, first.case, size):
            tries.insert(0, (first.part, first.case))
        for name, case in tries:
            left = end - time.monotonic()
            if left <= 0:
                self._verdict.notes.append(f"no time for {name} ({size})")
                break
            sight = self._look(name, size, left, case)
            if sight is not None:
                return sight
        return None

    def _has(self, part: str, case: str, size: Size) -> bool:
        known = all_parts([part])[part]
        return any(one.name == case for one in known.cases(DEFAULT_SEED, size))

    def _look(self, name: str, size: Size, within_s: float, case: str | None) -> Sight | None:
        if name not in part_names():
            self._verdict.notes.append(f"there is no part {name}")
            return None
        if all_parts([name])[name].needs_root:
            if os.geteuid() != 0:
                self._verdict.notes.append(f"{name} needs root")
                return None
            self._make_ready()
        found, why = look(self._broken, name, size, within_s=within_s, case=case)
        if why is not None:
            self._verdict.notes.append(f"{name} ({size}) fell over: {why}")
        for result in found:
            said = stated(result["violations"])
            if said is None:
                if result["violations"]:
                    text = str(result["violations"][0]).strip().splitlines()[-1]
                    self._verdict.notes.append(f"{name}/{result['case']} fell over: {text[:200]}")
                continue
            seen_in, seed = str(result["case"]), int(result["seed"])
            accused = self._control.accuses(name, seen_in, size)
            if accused is None:
                return Sight(
                    part=name,
                    case=seen_in,
                    seed=seed,
                    size=str(size),
                    said=said.splitlines()[0][:300],
                )
            self._verdict.false_alarms.append(f"{name}/{seen_in} without the bug: {accused}")
        return None

    def _make_ready(self) -> None:
        if self._prepared:
            return
        self._prepared = True
        for tree in (self._broken, self._control.tree):
            why = _prepare(tree)
            if why is not None:
                self._verdict.notes.append(f"no environment of its own: {why}")


def judge(bug: Bug, digest: str, control: Control, *, slice_only: bool) -> Verdict:
    """Look for a bug with the slice, then with the parts that should see it."""
    verdict = Verdict(bug=bug.name, digest=digest, at=time.time())
    begun = time.monotonic()
    with a_copy(bug) as broken:
        hunt = Hunt(verdict, broken, control)
        verdict.slice_ran = True
        verdict.slice = hunt.hunt(slice_parts(bug), Size.SLICE, SLICE_S)
        if not slice_only:
            verdict.programme_ran = True
            verdict.programme = hunt.hunt(bug.seen_by, Size.FULL, PART_S, verdict.slice)
    verdict.took_s = time.monotonic() - begun
    return verdict


def slice_parts(bug: Bug) -> list[str]:
    """Return the parts of the slice: those meant to see the bug first, those with hosts last."""
    parts = all_parts()
    found = {name for name, part in parts.items() if part.cases(DEFAULT_SEED, Size.SLICE)}
    likely = [name for name in bug.seen_by if name in found]
    found -= set(likely)
    return [*likely, *sorted(found, key=lambda name: (parts[name].needs_root, name))]


# -- results ---------------------------------------------------------------------------------------


class Book:
    """All verdicts so far, one line each."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.verdicts: dict[str, Verdict] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                try:
                    self._take(json.loads(line))
                except (TypeError, ValueError, KeyError):
                    continue  # Torn, or of another form.

    def _take(self, raw: dict[str, Any]) -> None:
        for name in ("programme", "slice"):
            raw[name] = None if raw[name] is None else Sight(**raw[name])
        verdict = Verdict(**raw)
        self.verdicts[verdict.bug] = verdict

    def add(self, verdict: Verdict) -> None:
        """Append a verdict."""
        self.verdicts[verdict.bug] = verdict
        with self._file.open("a") as out:
            out.write(json.dumps(asdict(verdict)) + "\n")


def digest_of(bug: Bug) -> str:
    """Return a hash of everything that the verdict depends on."""
    digest = hashlib.sha256(product_digest().encode() + bug.path.read_bytes())
    for folder in ("faults", "checker", "support", "seeded_bugs", "property"):
        for path in sorted((ROOT / "tests" / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def table(bugs: Sequence[Bug], verdicts: dict[str, Verdict]) -> str:
    """Return the table as Markdown."""
    rows = [
        "| Bug | What is broken | Programme | Slice | First words |",
        "|---|---|---|---|---|",
    ]
    for bug in bugs:
        found = verdicts.get(bug.name)
        if found is None:
            rows.append(f"| {bug.name} | {bug.what} | not run | not run | |")
            continue
        sight = found.programme or found.slice
        said = "" if sight is None else sight.said.replace("|", "\\|")[:140]
        # What the slice sees `make faults` sees too: the slice's cases are among its own parts'.
        programme = _where(found.programme or found.slice, found.programme_ran)
        rows.append(
            f"| {bug.name} | {bug.what} | {programme} | {_where(found.slice, found.slice_ran)} "
            f"| {said} |"
        )
    return "\n".join(rows)


def _where(sight: Sight | None, ran: bool) -> str:
    if sight is not None:
        return f"`{sight.part}`, {sight.case}, seed {sight.seed}"
    return "**not seen**" if ran else "not run"


def summary(bugs: Sequence[Bug], verdicts: dict[str, Verdict]) -> str:
    """Return how many were seen, in a sentence."""
    found = [verdicts[bug.name] for bug in bugs if bug.name in verdicts]
    seen = sum(1 for one in found if one.programme or one.slice)
    in_slice = sum(1 for one in found if one.slice)
    alarms = sum(len(one.false_alarms) for one in found)
    minutes = sum(one.took_s for one in found) / 60
    return (
        f"{seen} of {len(found)} were seen, {in_slice} by the slice in `make test`; "
        f"{alarms} violations were stated of the unbroken product as well; {minutes:.0f} minutes."
    )


def write_page(bugs: Sequence[Bug], verdicts: dict[str, Verdict], page: Path = PAGE) -> None:
    """Put the tables between the page's marks."""
    parts = []
    for title, those in (
        ("The twenty", [bug for bug in bugs if not bug.name.startswith("extra/")]),
        ("Others", [bug for bug in bugs if bug.name.startswith("extra/")]),
    ):
        if any(bug.name in verdicts for bug in those):
            parts.append(f"### {title}\n\n{summary(those, verdicts)}\n\n{table(those, verdicts)}")
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n\n".join(parts) or "Nothing was run yet."
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


# -- the program -----------------------------------------------------------------------------------


def chosen_bugs(names: Sequence[str]) -> list[Bug]:
    """Return the bugs that are named, by number or by name; without names, all.

    Raises:
        LookupError: there is no such bug.
    """
    known = all_bugs()
    if not names:
        return list(known.values())
    found = []
    for name in names:
        fits = [
            bug for bug in known.values() if name == bug.name or bug.name.startswith(f"{name}-")
        ]
        if name == "extra":
            fits = [bug for bug in known.values() if bug.name.startswith("extra/")]
        if not fits:
            raise LookupError(f"there is no bug {name}")
        found += fits
    return found


def _tell(verdict: Verdict) -> None:
    for name, sight, ran in (
        ("slice", verdict.slice, verdict.slice_ran),
        ("programme", verdict.programme, verdict.programme_ran),
    ):
        if sight is not None:
            say(f"  {name}: {sight.part}/{sight.case} seed {sight.seed}: {sight.said}")
        elif ran:
            say(f"  {name}: NOT SEEN")
    for note in (*verdict.notes, *verdict.false_alarms):
        say(f"  {note}")
    say(f"  {verdict.took_s:.0f} s")


def main(
    arguments: Sequence[str], judge_one: Callable[..., Verdict] = judge, page: Path = PAGE
) -> int:
    """Run what is asked for, print the table, write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.seeded_bugs", description=__doc__)
    parser.add_argument("bug", nargs="*", help="number (07, extra/03), name, or extra; default all")
    parser.add_argument("--slice-only", action="store_true", help="only with what `make test` runs")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--list", action="store_true", help="list the bugs")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    chosen = parser.parse_args(arguments)
    try:
        bugs = chosen_bugs(chosen.bug)
    except LookupError as error:
        parser.error(str(error))
    if chosen.list:
        for bug in bugs:
            say(f"{bug.name}: {bug.what} {bug.breaks} Seen by {', '.join(bug.seen_by)}.")
        return 0
    book = Book(chosen.results)
    sought = {}
    for bug in bugs:
        digest, known = digest_of(bug), book.verdicts.get(bug.name)
        done = known is not None and known.digest == digest
        done = done and (chosen.slice_only or (known is not None and known.programme_ran))
        if not chosen.report and (chosen.again or not done):
            sought[bug] = digest
    if sought:
        with a_copy(None) as clean:
            control = Control(clean)
            for bug, digest in sought.items():
                say(f"{bug.name}: {bug.what}")
                verdict = judge_one(bug, digest, control, slice_only=chosen.slice_only)
                book.add(verdict)
                _tell(verdict)
    sys.stdout.write(f"\n{table(bugs, book.verdicts)}\n\n{summary(bugs, book.verdicts)}\n")
    if chosen.results == RESULTS or page != PAGE:
        write_page(list(all_bugs().values()), book.verdicts, page)
    found = [book.verdicts[bug.name] for bug in bugs if bug.name in book.verdicts]
    if any(one.false_alarms for one in found):
        return 2
    return 0 if all(one.programme or one.slice for one in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a check found: violations with the lines that prove them, and what it could not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

#: Check ids and what each promises, in the order of the report.
CHECKS: dict[str, str] = {
    "C0": "the evidence can be read",
    "C1": "what was acknowledged is stored",
    "C2": "what is stored or ran was submitted",
    "C3": "one key, one task",
    "C4": "ended, or waiting for a true reason",
    "C5": "one end, one result",
    "C6": "tokens rise and are never used twice",
    "C7": "one lease at a time",
    "C7b": "overlapping runs leave a refused report",
    "C8": "nothing starts long after its end",
    "C9": "pins, ordering keys, dispatch order",
    "C10": "refused means absent, and says when to retry",
    "C11": "counters equal the log",
    "C12": "each task is linearizable",
    "C13": "bounds of time and resources",
    "C14": "the log is whole",
    "C15": "no secret leaked",
}


class Record(Protocol):
    """Anything read from a file: where it stood and what it said."""

    @property
    def where(self) -> str:
        """Return file and line."""
        ...

    @property
    def text(self) -> str:
        """Return the line itself."""
        ...


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    check: str
    task: str | None
    message: str
    #: Lines that prove it, as ``file:line text``.
    lines: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What became of one check."""

    check: str
    #: How many things it looked at. A zero without an ``n`` beside it says nothing.
    examined: int = 0
    violations: list[Violation] = field(default_factory=list)
    #: What it could not see, in words.
    notes: list[str] = field(default_factory=list)
    #: Why it did not run at all.
    missing: str | None = None

    def report(self, task: str | None, message: str, *proof: Record | None) -> None:
        """Add a violation."""
        lines = tuple(_shown(record) for record in proof if record is not None)
        self.violations.append(Violation(self.check, task, message, lines))

    def note(self, count: int, sentence: str) -> None:
        """Say that ``count`` things could not be judged; nothing if there were none."""
        if count:
            self.notes.append(f"{count} {sentence}")


def _shown(record: Record) -> str:
    text = record.text if len(record.text) <= 400 else record.text[:400] + "..."
    return f"{record.where} {text}"


def not_run(check: str, why: str) -> Outcome:
    """Return the outcome of a check that lacks its input."""
    return Outcome(check, missing=why)


Check = Callable[..., Outcome]


def violations(outcomes: Iterable[Outcome]) -> list[Violation]:
    """Return all violations."""
    return [one for outcome in outcomes for one in outcome.violations]

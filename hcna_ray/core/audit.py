"""The chain of the audit log: every line carries a digest of itself and of the line before it.

    hash = SHA-256 of the JSON array
           ["hcna.audit.v1", hash before, number, at, principal, action, target, outcome, detail]

without spaces, in ASCII, with ``at`` as the shortest decimal number that is read back as the same
double. So a line cannot be changed, left out or moved without every later hash being another one.
What is pruned leaves its last number and hash behind, the *anchor*, on which the rest stands.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from hcna_ray.core.models import AuditEntry

SCHEMA = "hcna.audit.v1"
#: What the first line of all follows.
GENESIS = "0" * 64
#: Action of the line by which a database server that has lost commits is put on record.
WENT_BACK = "store.went_back"
#: Action of the line with which the log goes on after a restore.
RESTORED = "store.restore"
#: Lines that one call may add, and how long their texts may be.
ENTRIES_MAX = 1000
TEXT_CHARS_MAX = 200
DETAIL_CHARS_MAX = 1000
#: Problems that one check names; it goes on counting.
PROBLEMS_MAX = 100


class AuditPoint(NamedTuple):
    """A place in the chain: a line's number and hash."""

    number: int = 0
    hash: str = GENESIS


def chain_hash(previous: str, number: int, entry: AuditEntry) -> str:
    """Return the hash of a line.

    Args:
        previous: Hash of the line before it.
        number: Its own number.
        entry: What it says.
    """
    # A database may give back an integer as a float, and minus zero as zero.
    line = [
        SCHEMA,
        previous,
        number,
        float(entry.at) + 0.0,
        entry.principal,
        entry.action,
        entry.target,
        entry.outcome,
        entry.detail,
    ]
    return hashlib.sha256(json.dumps(line, separators=(",", ":")).encode("ascii")).hexdigest()


def clipped(entry: AuditEntry) -> AuditEntry:
    """Return a line with texts of bounded length: what others write must not fill the disk."""
    return AuditEntry(
        at=entry.at,
        principal=entry.principal[:TEXT_CHARS_MAX],
        action=entry.action[:TEXT_CHARS_MAX],
        target=entry.target[:TEXT_CHARS_MAX],
        outcome=entry.outcome[:TEXT_CHARS_MAX],
        detail=entry.detail[:DETAIL_CHARS_MAX],
    )


class ChainCheck:
    """Follows the chain line by line, oldest first, and says where it does not hold."""

    def __init__(self, anchor: AuditPoint, *, expected: AuditPoint | None = None) -> None:
        """Begin behind a point.

        Args:
            anchor: What the first line has to follow. With the hash `GENESIS`, lines up to it that
                are still there were written before there was a chain.
            expected: A line that was noted elsewhere, where nobody could change it.
        """
        self.anchor, self._expected = anchor, expected
        self.problems: list[str] = []
        #: What is not as usual and has its reason.
        self.notes: list[str] = []
        self.problem_count = 0
        #: Lines that were followed, and lines from before there was a chain.
        self.lines = self.unchained = 0
        #: The last line that was seen.
        self.head = anchor
        #: None behind a gap: what the next line followed is not known.
        self._previous: str | None = anchor.hash
        #: Whether the line that was noted has been compared.
        self._met = False
        if expected is not None and expected.number == anchor.number:
            self._compare(anchor)

    def follow(self, number: int, entry: AuditEntry, digest: str | None) -> None:
        """Take the next line."""
        if number <= self.anchor.number and digest is None:
            if self.anchor.hash == GENESIS:
                self.unchained += 1
            else:  # Old lines go before the first one with a hash does: none is kept beside it.
                self._report(f"line {number} has no hash")
            return
        self.lines += 1
        if number <= self.head.number:
            self._report(f"line {number} comes after line {self.head.number}")
        elif number > self.head.number + 1:
            first, last = self.head.number + 1, number - 1
            if entry.action == WENT_BACK and self._follows(number, entry, digest):
                self.notes.append(
                    f"lines {first} to {last} were lost with commits of the database server, "
                    f"as line {number} tells"
                )
            else:
                self._gone(first, last)
                self._previous = None
        if digest is None:
            self._report(f"line {number} has no hash")
        elif not self._follows(number, entry, digest):
            self._report(f"line {number} is not what was written, or does not follow its neighbour")
        self._previous = digest
        self.head = AuditPoint(number, digest or "")
        self._compare(self.head)

    def skip_to(self, anchor: AuditPoint) -> None:
        """Go on behind a later anchor: meanwhile the lines up to it were pruned."""
        self.head, self._previous = anchor, anchor.hash
        self._compare(anchor)

    def end(self, last: int) -> None:
        """Say that there are no more lines.

        Args:
            last: The number of the last line that was written, as it was counted apart from them.
        """
        if last > self.head.number:
            self._gone(self.head.number + 1, last)
        expected = self._expected
        if expected is None or self._met:
            return
        if expected.number > self.head.number:
            self._report(f"the log ends before line {expected.number}, which was noted elsewhere")
        else:
            self._report(
                f"line {expected.number}, which was noted elsewhere, is not there any more: "
                "it was pruned or taken out"
            )

    def _follows(self, number: int, entry: AuditEntry, digest: str | None) -> bool:
        previous = self._previous
        return previous is None or chain_hash(previous, number, entry) == digest

    def _compare(self, point: AuditPoint) -> None:
        expected = self._expected
        if expected is None or expected.number != point.number:
            return
        self._met = True
        if expected.hash != point.hash:
            self._report(f"line {point.number} has another hash than the one that was noted")

    def _gone(self, first: int, last: int) -> None:
        many = f"line {first} is" if first == last else f"lines {first} to {last} are"
        self._report(f"{many} gone")

    def _report(self, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)

"""Results of visits, one line each in ``build/bench/results.jsonl``; a run is resumed there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.children import FOLDER
from tests.support import json_lines
from tests.support.sources import PRODUCT, digest

#: Foreign use of the cores beyond which a round is marked.
FOREIGN_CORES_MAX = 0.5


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one visit of one system found."""

    part: str
    #: Name of the system or floor.
    of: str
    round: int
    #: ``quick`` or ``full``.
    size: str
    #: Hash of the sources that were measured.
    digest: str
    commit: str
    at: float
    took_s: float
    #: The machine's fdatasync just before, median in milliseconds.
    fsync_ms: float
    load_average: float
    #: Cores that something else used on average meanwhile.
    foreign_cores: float
    figures: Mapping[str, float]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def key(self) -> tuple[str, str, int]:
        """What a repeated visit replaces."""
        return self.part, self.of, self.round

    @property
    def disturbed(self) -> bool:
        """Whether something else used much of the machine meanwhile."""
        return self.foreign_cores > FOREIGN_CORES_MAX


class Ledger:
    """All results so far; a torn last line is left out."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Open or begin the results in a folder."""
        self._file = folder / "results.jsonl"
        self.results = json_lines.read(self._file, Result)

    def add(self, result: Result) -> None:
        """Append a result."""
        self.results.append(result)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def of(self, digest: str, size: str) -> list[Result]:
        """Return the last result of each visit of these sources."""
        last = {one.key: one for one in self.results if one.digest == digest and one.size == size}
        return list(last.values())


#: What only tells of results: they stay what they are when it changes.
_TELLING = ("report.py", "plot.py", "results.py", "statistics.py", "__main__.py")


def sources_digest() -> str:
    """Return a short hash of the product and of what measures it."""
    return digest("hcna_ray", "benchmarks", suffixes={*PRODUCT, ".txt", ".c"}, without=_TELLING)

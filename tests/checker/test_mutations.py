"""Every good history with one line altered: what the checker sees of it, in numbers."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from tests.checker.__main__ import check
from tests.checker.findings import violations
from tests.checker.histories.good import GOOD
from tests.checker.mutate import MUST_BE_SEEN, MUTATIONS, mutate
from tests.checker.test_histories import tell

SEEDS = range(3)


def test_altered_evidence_is_seen(tmp_path: Path) -> None:
    tried: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    by: Counter[str] = Counter()
    missed: list[str] = []
    for name, story in GOOD.items():
        original = tmp_path / name
        original.mkdir()
        tell(story, original)
        for mutation in MUTATIONS:
            for seed in SEEDS:
                folder = tmp_path / "altered"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(original, folder)
                draw = random.Random(f"{seed} {name} {mutation.name}")
                struck = mutate(folder, mutation, draw)
                if struck is None:
                    break
                tried[mutation.name] += 1
                _run, outcomes = check(folder)
                found = violations(outcomes)
                if found:
                    seen[mutation.name] += 1
                    by.update({one.check for one in found})
                elif mutation.name in MUST_BE_SEEN:
                    missed.append(f"{mutation.name} in {name} (seed {seed}): {struck}")
    rows = [f"{name:<36} {seen[name]:>4} of {tried[name]:<4} seen" for name in sorted(tried)]
    total = f"{seen.total()} of {tried.total()} altered histories rejected"
    checks = ", ".join(f"{check} {count}" for check, count in by.most_common())
    print("\n".join([*rows, total, f"seen by: {checks}"]))  # noqa: T201 - the point of it
    assert not missed, "\n".join(missed)
    assert tried.total() > 1000
    assert seen.total() > 0.8 * tried.total(), total

"""The slice of the fault programme that `make test` affords: one test for each case."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.programme import DEFAULT_SEED, Case, Part, RunCase, Size, all_parts, run_one

CASES = [
    pytest.param(part, case, id=f"{part.name}-{case.name}")
    for part in all_parts().values()
    for case in part.cases(DEFAULT_SEED, Size.SLICE)
]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Part], RunCase]]:
    """Open each part once. Cases come part by part, so the last one is closed for the next."""
    stack, current, run = ExitStack(), "", None

    def open_part(part: Part) -> RunCase:
        nonlocal current, run
        if current != part.name or run is None:
            stack.close()
            current = part.name
            run = stack.enter_context(part.open(tmp_path_factory.mktemp(part.name)))
        return run

    with stack:
        yield open_part


@pytest.mark.parametrize(("part", "case"), CASES)
def test_no_promise_is_broken(
    part: Part,
    case: Case,
    opened: Callable[[Part], RunCase],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if part.needs_root and os.geteuid() != 0:
        pytest.skip(f"part {part.name} needs root")
    outcome = run_one(part, case, opened(part), tmp_path / "case")
    # Not by record_property, which warns, so fails, beside a JUnit report of pytest's own family.
    request.node.user_properties.extend(outcome.counts.items())
    assert not outcome.violations, (
        f"python -m tests.faults --slice --part {part.name} --case {case.name} repeats it "
        f"(seed {case.seed}):\n" + "\n".join(outcome.violations)
    )
    assert sum(outcome.counts.values()) > 0, "the case tried nothing"

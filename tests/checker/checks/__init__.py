"""The checks, C0 to C15. Each is a function from a `Run` to an `Outcome`."""

from __future__ import annotations

from tests.checker.checks import (
    acceptance,
    bounds,
    counters,
    endings,
    leases,
    linear,
    order,
    secrets,
    whole,
)
from tests.checker.findings import CHECKS, Check, Outcome, not_run
from tests.checker.inputs import Run

_CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "C0": (whole.readable, ()),
    "C1": (acceptance.acked_is_stored, ("history", "dump")),
    "C2": (acceptance.stored_was_submitted, ("history", "dump")),
    "C3": (acceptance.one_key_one_task, ("history", "dump")),
    "C4": (endings.ended_or_waiting, ("dump", "schedule")),
    "C5": (endings.one_end_one_result, ("dump",)),
    "C6": (leases.tokens_rise, ("dump",)),
    "C7": (leases.one_lease, ("dump",)),
    "C7b": (leases.overlaps_are_refused, ("dump", "effects")),
    "C8": (leases.nothing_starts_late, ("dump", "effects", "schedule")),
    "C9": (order.in_order, ("dump",)),
    "C10": (acceptance.refused_is_absent, ("history", "dump")),
    "C11": (counters.counters_equal_the_log, ("dump",)),
    "C12": (linear.linearizable, ("history", "dump")),
    "C13": (bounds.within_bounds, ("schedule",)),
    "C14": (whole.log_is_whole, ("dump",)),
    "C15": (secrets.no_canary, ("schedule",)),
}
assert list(_CHECKS) == list(CHECKS), "every check has its place in the report"

_WORDS = {
    "history": "no client history (history*.jsonl)",
    "effects": "no side-effect log (effects*.jsonl)",
    "dump": "no transition log and tasks (store*.jsonl or queue.db)",
    "schedule": "no schedule (schedule.json)",
}


def run_all(run: Run) -> list[Outcome]:
    """Run every check whose input is there."""
    outcomes = []
    for name, (check, inputs) in _CHECKS.items():
        lacks = [_WORDS[one] for one in inputs if getattr(run, one) is None]
        outcomes.append(not_run(name, "; ".join(lacks)) if lacks else _guarded(name, check, run))
    return outcomes


def _guarded(name: str, check: Check, run: Run) -> Outcome:
    """Run a check; evidence of a shape that no recorder writes counts against the run."""
    try:
        return check(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        out = Outcome(name)
        out.report(None, f"the evidence has a shape that nobody writes: {error!r}")
        return out

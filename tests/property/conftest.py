"""Prints how far the model went."""

from __future__ import annotations

import pytest

from tests.property.world import TALLY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many steps the state machine made, counted by itself."""
    if TALLY.steps:
        steps = f"{TALLY.steps:,}".replace(",", " ")
        terminalreporter.write_line(f"state machine: {steps} steps, {TALLY.violations} violations")

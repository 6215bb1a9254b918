"""For all tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.support.figures import FIGURES

# The same examples each time, however slow the machine is: new ones are for the fault programme.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests measured."""
    for figure in FIGURES:
        terminalreporter.write_line(figure)

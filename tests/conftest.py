"""For all tests."""

from __future__ import annotations

import pytest

from tests.support.figures import FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests measured."""
    for figure in FIGURES:
        terminalreporter.write_line(figure)

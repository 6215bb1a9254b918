from __future__ import annotations

import pytest

from tests.support.live import FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what was asked, with the seed to ask it again."""
    for figure in FIGURES:
        terminalreporter.write_line(figure)

"""What a session of tests measured, in words; shown at its end."""

from __future__ import annotations

FIGURES: list[str] = []


def note(figure: str) -> None:
    """Have a line shown at the end of the session, passed or failed."""
    FIGURES.append(figure)

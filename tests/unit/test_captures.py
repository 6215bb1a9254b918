"""The pictures of terminals: what is in them, and that they fetch nothing."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.rig.captures import IMAGES, svg

SPACE = "{http://www.w3.org/2000/svg}"


def text_of(picture: str) -> str:
    root = ElementTree.fromstring(picture)
    return "\n".join((one.text or "").replace("\xa0", " ") for one in root.iter(f"{SPACE}text"))


def test_a_screen_is_drawn_with_its_colours_and_nothing_from_elsewhere() -> None:
    screen = "$ hcna top\n\x1b[1mW1\x1b[0m \x1b[32monline\x1b[39m <&>\n\n"

    drawn = svg(screen, "hcna top", width=40)

    for part in ("$ hcna top", "W1", "online", " <&>"):
        assert part in text_of(drawn)
    assert "font-weight: bold" in drawn
    assert set(re.findall(r"https?://[^\s\"<]+", drawn)) <= {
        "http://www.w3.org/2000/svg",
        "https://www.textualize.io",  # Named in a comment.
    }
    assert "url(http" not in drawn


def test_what_does_not_fit_is_cut_and_every_line_stays_one() -> None:
    drawn = svg(f"{'x' * 100}\nend", "t", width=40)
    lines = [line for line in text_of(drawn).splitlines() if line]
    assert lines[1:] == ["x" * 40, "end"]


@pytest.mark.parametrize("name", ["top", "why", "events"])
def test_the_documentation_shows_what_was_captured(name: str) -> None:
    picture = (IMAGES / f"terminal-{name}.svg").read_text()
    assert f"hcna {name}" in text_of(picture)
    assert "@font-face" not in picture
    pages = [path.read_text() for path in Path(IMAGES.parent).rglob("*.md")]
    assert any(f"images/terminal-{name}.svg" in page for page in pages)

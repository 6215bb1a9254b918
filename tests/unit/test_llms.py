"""``llms.txt`` says what the documentation's index says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.programs import script

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llms() -> Iterator[ModuleType]:
    with script("generate_llms") as module:
        yield module


def test_it_is_up_to_date(llms: ModuleType) -> None:
    assert (REPOSITORY / "llms.txt").read_text("utf-8") == llms.text(), "stale: make docs"
    assert llms.main(["--check"]) == 0


def test_it_has_the_form_that_readers_expect() -> None:
    """One heading, a summary as a quotation, then sections of links, each with a note."""
    lines = (REPOSITORY / "llms.txt").read_text("utf-8").splitlines()

    assert lines[0] == "# hcna-ray"
    assert lines[2].startswith("> ")
    links = [line for line in lines if line.startswith("- ")]
    assert len(links) >= 20
    for line in links:
        found = re.fullmatch(r"- \[[^\]]+\]\(([^)]+)\): .+\.", line)
        assert found, line
        assert (REPOSITORY / found[1]).is_file(), line


def test_every_page_of_the_documentation_is_reached() -> None:
    text = (REPOSITORY / "llms.txt").read_text("utf-8")
    pages = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "docs").rglob("*.md")}
    pages |= {path.relative_to(REPOSITORY) for path in (REPOSITORY / "notebooks").glob("*.ipynb")}

    unlisted = {str(page) for page in pages if f"({page})" not in text}

    assert unlisted == {"docs/index.md"}, "docs/index.md names it under what it is for"


def test_a_page_that_says_nothing_is_refused(llms: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty.md").write_text("# A heading\n")
    with pytest.raises(llms.Missing, match="says nothing"):
        llms.first_sentence(tmp_path / "empty.md")
    with pytest.raises(llms.Missing, match="leads there"):
        llms.first_sentence(tmp_path / "gone.md")

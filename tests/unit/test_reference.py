"""The generated pages of the documentation say what the code says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hcna_ray.core import advice
from tests.support.programs import script

REPOSITORY = Path(__file__).parents[2]
PAGES = ("access", "cli", "configuration", "error-codes", "http-api", "metrics", "ports")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    with script("generate_reference") as module:
        yield module


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(reference: ModuleType, name: str) -> None:
    path = REPOSITORY / "docs" / "reference" / f"{name}.md"

    text = reference.pages()[path]

    assert path.read_text("utf-8") == text, "stale: make docs"


def test_every_generated_page_is_checked(reference: ModuleType) -> None:
    assert {path.stem for path in reference.pages()} == set(PAGES)


def test_a_code_without_a_sentence_is_refused(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = {code: one for code, one in advice.REFUSAL.items() if code != "task_finished"}
    monkeypatch.setattr(advice, "REFUSAL", fewer)

    with pytest.raises(reference.Stale, match="task_finished"):
        reference.error_codes()


def pages() -> list[Path]:
    tops = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    return tops + sorted((REPOSITORY / "docs").rglob("*.md"))


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    targets = [target for target in LINK.findall(path.read_text("utf-8")) if "://" not in target]

    missing = [
        target
        for target in targets
        if target.partition("#")[0] and not (path.parent / target.partition("#")[0]).exists()
    ]

    assert not missing


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_tests_that_a_page_names_exist(path: Path) -> None:
    """A guarantee names its test as ``tests/x.py::test_y``; a renamed test must not leave it."""
    for file, names in re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", path.read_text("utf-8")):
        assert (REPOSITORY / file).is_file(), file
        source = (REPOSITORY / file).read_text("utf-8")
        for name in filter(None, names.split("::")):
            assert re.search(rf"(def|class) {name}\b", source), f"{file}::{name}"

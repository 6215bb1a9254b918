from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.page.browser import MISSING, Browser, a_browser, found
from tests.page.house import House, a_house


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with a_house(tmp_path / "home") as built:
        yield built


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all: a house has an origin of its own, so nothing is left in it."""
    if not found():
        pytest.skip(MISSING)
    with a_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(opened: Browser, house: House) -> Iterator[Browser]:
    opened.url = house.url
    yield opened
    opened.leave()

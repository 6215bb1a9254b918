from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.c1 import Composite, a_composite


@pytest.fixture
async def c1(tmp_path: Path) -> AsyncIterator[Composite]:
    async with a_composite(tmp_path) as composite:
        yield composite

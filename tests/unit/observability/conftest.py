"""For the tests of what is written and shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def leave_logging_as_it_was() -> Iterator[None]:
    log = logging.getLogger("hcna_ray")
    before = (log.level, log.propagate)
    yield
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.level, log.propagate = before

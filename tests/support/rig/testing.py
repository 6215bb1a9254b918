"""How a test gets a rig: made for it, and skipped with the reason where there can be none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .rig import Rig
from .state import RigUnavailable


@contextmanager
def rig_for_tests(*arguments: Any, **options: Any) -> Iterator[Rig]:
    """Make a rig for the tests that follow; takes what `Rig.up` takes.

    Where this machine cannot hold one, the tests are skipped, or fail if ``HCNA_REQUIRE_ALL=1``.
    """
    try:
        rig = Rig.up(*arguments, **options)
    except RigUnavailable as error:
        if os.environ.get("HCNA_REQUIRE_ALL") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    with rig:
        yield rig

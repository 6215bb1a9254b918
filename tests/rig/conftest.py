"""One rig for the tests of the rig; each test finds its hosts up and hearing each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rig import Rig
from tests.support.rig.testing import rig_for_tests


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where these tests make rigs, so that they never meet those of anybody else."""
    return tmp_path_factory.mktemp("rigs").resolve()


@pytest.fixture(scope="session")
def shared_rig(base: Path) -> Iterator[Rig]:
    with rig_for_tests(base=base, data_size={"w2": "48m"}) as rig:
        yield rig


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    yield shared_rig
    shared_rig.heal()
    for host in shared_rig:
        host.resume()
        if not host.is_up:
            host.boot()

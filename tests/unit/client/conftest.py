"""A fake C1, a clock that only moves when told, and clients of both kinds on top."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hcna_ray.client import AsyncClient, Client
from hcna_ray.client.plans import Patience, Planner
from tests.support.fake_c1 import API_KEY, FakeC1
from tests.support.fake_time import FakeTime

URL = "http://c1.test"


@pytest.fixture(autouse=True)
def _no_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HCNA_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("HCNA_URL", raising=False)
    monkeypatch.delenv("HCNA_API_KEY", raising=False)


@pytest.fixture
def c1() -> FakeC1:
    return FakeC1()


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def planner(time: FakeTime) -> Planner:
    keys = iter(f"key-{number}" for number in range(10_000))
    return Planner(
        URL,
        patience=Patience(retry_for_s=30.0),
        clock=time.clock,
        luck=lambda: 1.0,
        new_key=lambda: next(keys),
    )


@pytest.fixture
def client(c1: FakeC1, planner: Planner, time: FakeTime) -> Iterator[Client]:
    with Client(URL, API_KEY, transport=c1.transport(), planner=planner, sleep=time.sleep) as made:
        yield made


@pytest.fixture
def async_client(c1: FakeC1, planner: Planner, time: FakeTime) -> AsyncClient:
    return AsyncClient(
        URL, API_KEY, transport=c1.transport(), planner=planner, sleep=time.sleep_async
    )

"""A fake C1 on a loopback port, and ``hcna`` run in this process against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from hcna_ray.cli.main import main
from tests.support.fake_c1 import API_KEY, FakeC1


@dataclass(frozen=True)
class Ran:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Hcna = Callable[..., Ran]


@pytest.fixture
def c1() -> FakeC1:
    return FakeC1()


@pytest.fixture
def url(
    c1: FakeC1, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with c1.serve() as served:
        monkeypatch.setenv("HCNA_URL", served)
        monkeypatch.setenv("HCNA_API_KEY", API_KEY)
        monkeypatch.setenv("HCNA_HOME", str(tmp_path_factory.mktemp("home")))
        monkeypatch.setenv("HCNA_RETRY_FOR_S", "0")
        monkeypatch.delenv("HCNA_DEBUG", raising=False)
        yield served


@pytest.fixture
def hcna(url: str, capsys: pytest.CaptureFixture[str]) -> Hcna:
    def run(*words: str) -> Ran:
        capsys.readouterr()
        code = main(list(words))
        seen = capsys.readouterr()
        return Ran(code, seen.out, seen.err)

    return run

"""Places in a quota, when answers are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from hcna_ray.api.allowance import Quotas
from hcna_ray.core.errors import ModeratorUnavailable, NoAnswer
from hcna_ray.security.keys import ApiKey

KEY = ApiKey(name="ci", role="submitter", sha256="0" * 64, created_at=0.0, quota=3)


class Clock:
    """A time that is set by hand."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def elapsed(self) -> float:
        return self.at


class Counted:
    """A store in which so many tasks are open."""

    open = 0

    def open_of(self, owner: str, limit: int) -> int:
        return min(self.open, limit)

    async def run(self, read: Callable[[Any], Any]) -> Any:
        return read(self)


async def free(quotas: Quotas) -> int:
    async with quotas.hold(KEY, 9) as held:
        return held.places


@pytest.mark.parametrize("error", [NoAnswer("lost", 2), asyncio.CancelledError(), KeyError()])
async def test_what_may_still_come_in_keeps_its_places(error: BaseException) -> None:
    clock, store = Clock(), Counted()
    quotas = Quotas(store, clock, doubt_s=60.0)  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        async with quotas.hold(KEY, 2):
            raise error
    assert await free(quotas) == 1
    clock.at = 59.9
    assert await free(quotas) == 1
    store.open = 2  # Now it is carried out: until the doubt is over both are counted.
    assert await free(quotas) == 0
    clock.at = 60.0
    assert await free(quotas) == 1
    store.open = 0
    clock.at = 61.0
    assert await free(quotas) == 3


async def test_what_was_refused_gives_its_places_back_at_once() -> None:
    quotas = Quotas(Counted(), Clock(), doubt_s=60.0)  # type: ignore[arg-type]
    with pytest.raises(ModeratorUnavailable):
        async with quotas.hold(KEY, 2):
            raise ModeratorUnavailable("away", 2)
    assert await free(quotas) == 3

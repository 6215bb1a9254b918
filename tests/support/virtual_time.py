"""An event loop whose time passes only while everybody waits, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tests.support.builders import T0

T = TypeVar("T")


class _Jumping(selectors.BaseSelector):
    """Never waits: reports what is ready, or lets the loop's time jump."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        self._inner, self._jump = selectors.DefaultSelector(), jump

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._inner.select(0)
        if not ready and timeout is None:
            raise AssertionError("everybody waits for something that cannot happen any more")
        if not ready and timeout is not None and timeout > 0:
            self._jump(timeout)
        return ready

    def close(self) -> None:
        self._inner.close()

    def get_map(self) -> Any:
        return self._inner.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs a whole day in a moment, always in the same order."""

    def __init__(self) -> None:
        self._elapsed = 1000.0
        super().__init__(_Jumping(self._pass))

    def time(self) -> float:
        return self._elapsed

    def _pass(self, seconds: float) -> None:
        self._elapsed += seconds


class LoopClock:
    """`hcna_ray.core.clock.Clock` that follows the running loop."""

    def now(self) -> float:
        return T0 + self.elapsed() - 1000.0

    def elapsed(self) -> float:
        return asyncio.get_running_loop().time()


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Play a scenario in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(scenario)

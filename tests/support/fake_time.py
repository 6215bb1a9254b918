"""Time that passes only by sleeping."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FakeTime:
    """A monotonic clock and both kinds of sleep; remembers every pause, in seconds."""

    now_s: float = 100.0
    pauses: list[float] = field(default_factory=list)

    def clock(self) -> float:
        """Seconds."""
        return self.now_s

    def sleep(self, delay_s: float) -> None:
        """Let ``delay_s`` pass."""
        self.pauses.append(delay_s)
        self.now_s += delay_s

    async def sleep_async(self, delay_s: float) -> None:
        """Let ``delay_s`` pass."""
        self.sleep(delay_s)

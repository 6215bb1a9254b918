"""The way from M1 to what an attempt has printed: to the worker that keeps it.

A worker on this machine with this home is read directly, also while its agent is not there. Any
other is asked through its agent, and while that does not answer its outputs cannot be had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hcna_ray.core.errors import CannotAccept, OutputUnavailable
from hcna_ray.core.models import Token
from hcna_ray.runtime.output import read_output

#: Longest wait for an agent.
ANSWER_S = 5.0
#: Agents that are remembered; there are not so many workers.
LINKS_MAX = 1000


class Link(Protocol):
    """Calls one agent; see `hcna_ray.runtime.ray_link.ActorLink`."""

    async def acall(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call and wait. Raises `CannotAccept` when nobody answers."""
        ...


class OutputLink:
    """`hcna_ray.api.ports.Outputs`: this machine's folder first, then the worker's agent."""

    def __init__(self, folder_of: Callable[[str], Path], link_to: Callable[[str], Link]) -> None:
        """Prepare; nothing is looked up yet.

        Args:
            folder_of: Where outputs of a worker are, if it is on this machine.
            link_to: A way to a worker's agent.
        """
        self._folder_of, self._link_to = folder_of, link_to
        self._links: dict[str, Link] = {}

    async def read(
        self, worker: str, task_id: str, token: Token, offset: int, size: int
    ) -> bytes | None:
        """Return a piece of an output; ``None`` when there is none.

        Raises:
            OutputUnavailable: the worker does not answer.
        """
        try:
            here = await asyncio.to_thread(
                read_output, self._folder_of(worker), task_id, token, offset, size
            )
        except OSError as error:
            raise OutputUnavailable(f"the output cannot be read ({error.strerror})", 5) from error
        if here is not None:
            return here
        link = self._links.get(worker)
        if link is None:
            if len(self._links) >= LINKS_MAX:
                self._links.clear()
            link = self._links[worker] = self._link_to(worker)
        try:
            found: bytes | None = await link.acall(
                "output", task_id, tuple(token), offset, size, timeout_s=ANSWER_S
            )
        except CannotAccept as error:
            raise OutputUnavailable(
                f"worker {worker}, which keeps the output, does not answer", 5
            ) from error
        return found

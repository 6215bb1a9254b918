"""The writer thread: group commit around a `Moderator`.

Calls gather while the last batch is being decided and committed; then they all go into the next
one. Batches form by themselves under load, and a lone call waits for nobody.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from hcna_ray import failpoints
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError, ModeratorUnavailable, Overloaded
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.requests import Pending, Request

log = logging.getLogger(__name__)

#: Exit status after a failed fsync, or when another moderator took the store over: what is stored
#: is unknown here, only a restart can tell.
EXIT_FSYNC = 74
#: Exit status after anything else that must not happen.
EXIT_BUG = 70


class WriterThread:
    """Feeds a moderator from any thread. Owns the only thread that touches it."""

    def __init__(
        self,
        build: Callable[[], Moderator],
        clock: Clock,
        *,
        publish: Callable[[Outbound], None],
        items_max: int,
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        """Prepare; `start` builds the moderator on the writer's own thread.

        Args:
            build: Makes the moderator (opens the store).
            clock: Clock for arrival times.
            publish: Takes what may leave after each commit. Called on the writer's thread.
            items_max: Calls that may wait at once; more are refused with `Overloaded`.
            exit_process: Ends the process at once, without cleaning up.
        """
        self._build, self._clock, self._publish = build, clock, publish
        self._items_max, self._exit = items_max, exit_process
        self._inbox: list[Pending] = []
        self._wake = threading.Condition()
        self._closed = False
        self._failed: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hcna-writer", daemon=True)

    def start(self, timeout_s: float = 120.0) -> None:
        """Build the moderator and begin.

        Raises:
            HcnaError: the store could not be opened; the reason is what `build` raised.
        """
        self._thread.start()
        if not self._started.wait(timeout_s):
            raise ModeratorUnavailable("the store did not open in time", 5)
        if self._failed is not None:
            raise self._failed

    def submit(self, request: Request, resolve: Callable[[object], None]) -> None:
        """Queue a call; ``resolve`` gets its answer on the writer's thread, after the commit."""
        pending = Pending(request, resolve, self._clock.elapsed())
        with self._wake:
            if self._closed:
                refusal: HcnaError = ModeratorUnavailable("the moderator is stopping", 2)
            elif len(self._inbox) >= self._items_max:
                refusal = Overloaded("the moderator's inbox is full", 1)
            else:
                self._inbox.append(pending)
                if len(self._inbox) == 1:
                    self._wake.notify()
                return
        resolve(refusal)

    def close(self) -> None:
        """Commit what is waiting, then stop. Harmless twice."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30.0)

    def _loop(self) -> None:
        try:
            moderator = self._build()
        except BaseException as error:
            self._failed = error
            self._started.set()
            return
        self._started.set()
        try:
            self._serve(moderator)
        except OSError as error:
            log.critical(
                "the store is lost to this process: it must end",
                extra={"action": "store.lost", "error": str(error)},
            )
            self._exit(EXIT_FSYNC)
        except Exception:
            # A bug. Nothing of the batch was committed; a restart rebuilds from the store.
            log.critical(
                "the moderator failed", exc_info=True, extra={"action": "moderator.failed"}
            )
            self._exit(EXIT_BUG)

    def _serve(self, moderator: Moderator) -> None:
        while True:
            # Reads the store: whoever calls `submit` meanwhile must not wait for that.
            pause = moderator.sleep_s()
            with self._wake:
                if not self._inbox and not self._closed and pause > 0:
                    self._wake.wait(pause)
                batch, self._inbox = self._inbox, []
                closed = self._closed
            if closed and not batch:
                return
            failpoints.hit("writer.batch.taken")
            self._publish(moderator.apply(batch))
            failpoints.hit("writer.batch.published")

"""The writer thread: group commit around a `Moderator`.

Calls gather while the last batch is being decided and committed; then they all go into the next
one. Batches form by themselves under load, and a lone call waits for nobody. Clients and workers
have an inbox's worth of room each: however many tasks are sent in, workers renew their leases.

A second thread stands in when the store holds the writer up: heartbeats are answered from memory,
and what nobody should wait for any longer is refused. It decides nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from hcna_ray import failpoints
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError, ModeratorUnavailable, Overloaded, StoreUnavailable
from hcna_ray.runtime.messages import Heartbeat, SubmitBatch
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.requests import FROM_WORKERS, Pending, Request

log = logging.getLogger(__name__)

#: A batch that takes longer is held up by the store: heartbeats are answered meanwhile. Agents give
#: each one four seconds.
HELD_UP_S = 1.0
#: A batch that takes longer lets nobody wait in the inbox any more.
REFUSE_S = 8.0
_LOOK_S = 0.25
#: New tasks after which a batch takes no more of them: more at once cost each one no less, and
#: whoever has an outcome to tell, or asks for work, would wait for longer.
SPECS_MAX = 500
#: Pause before a store that could not be opened is tried again, and before the log repeats why.
OPEN_AGAIN_S = 1.0
SAY_AGAIN_S = 60.0
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
            publish: Takes what may leave. Called on the writer's thread after each commit, and on
                another one while that one is held up.
            items_max: Calls of clients that may wait at once, and as many of workers; more are
                refused with `Overloaded`.
            exit_process: Ends the process at once, without cleaning up.
        """
        self._build, self._clock, self._publish = build, clock, publish
        self._items_max, self._exit = items_max, exit_process
        self._inbox: list[Pending] = []
        #: How many of those in the inbox come from workers.
        self._of_workers = 0
        self._wake = threading.Condition()
        self._closed = False
        self._failed: BaseException | None = None
        self._started = threading.Event()
        self._moderator: Moderator | None = None
        self._patient = False
        #: Why the store is not open yet, and when the log says so again.
        self._trouble: StoreUnavailable | None = None
        self._say_at = 0.0
        #: Since when the batch at hand is being worked on.
        self._busy_since: float | None = None
        #: Set when a call has to wait for the batch at hand: only then anybody may need a stand-in.
        self._behind = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hcna-writer", daemon=True)
        self._second = threading.Thread(target=self._stand_in, name="hcna-stand-in", daemon=True)

    def begin(self, wait_s: float = 15.0) -> bool:
        """Begin, and try again and again while the store cannot be opened.

        Until then every call is refused with `StoreUnavailable`, whose text says why.

        Args:
            wait_s: How long this may take until the first attempt has ended.

        Returns:
            Whether the moderator is built. A build that fails otherwise ends the process.
        """
        self._patient = True
        self._thread.start()
        self._started.wait(wait_s)
        return self._moderator is not None

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
        of_worker = isinstance(request, FROM_WORKERS)
        with self._wake:
            if self._closed:
                refusal: HcnaError = ModeratorUnavailable("the moderator is stopping", 2)
            elif self._trouble is not None:
                refusal = self._trouble
            elif self._waiting(of_worker) >= self._items_max:
                refusal = Overloaded("the moderator's inbox is full", 1)
            else:
                self._inbox.append(pending)
                self._of_workers += of_worker
                if len(self._inbox) == 1:
                    self._wake.notify()
                if self._busy_since is not None and not self._behind.is_set():
                    self._behind.set()
                return
        resolve(refusal)

    def _waiting(self, of_workers: bool) -> int:
        return self._of_workers if of_workers else len(self._inbox) - self._of_workers

    def _keep(self, kept: list[Pending]) -> list[Pending]:
        """Put these in the place of the inbox; return what was in it."""
        taken, self._inbox = self._inbox, kept
        self._of_workers = sum(isinstance(one.request, FROM_WORKERS) for one in kept)
        return taken

    def _take(self) -> list[Pending]:
        """Take what goes into the next batch: everything, but only so many new tasks at once.

        What comes beyond that waits for the batch after it, and with it all that clients have asked
        since: in the meantime outcomes are committed and leases handed out.
        """
        if len(self._inbox) - self._of_workers < 2:
            return self._keep([])
        taken: list[Pending] = []
        left: list[Pending] = []
        room = SPECS_MAX
        for pending in self._inbox:
            request = pending.request
            if isinstance(request, FROM_WORKERS):
                taken.append(pending)
            elif left or (isinstance(request, SubmitBatch) and room <= 0):
                left.append(pending)
            else:
                taken.append(pending)
                if isinstance(request, SubmitBatch):
                    room -= len(request.specs)
        self._keep(left)
        return taken

    def close(self) -> None:
        """Commit what is waiting, then stop. Harmless twice."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30.0)

    def _loop(self) -> None:
        moderator = self._open()
        if moderator is None:
            return
        with self._wake:
            self._moderator, self._trouble = moderator, None
        self._second.start()
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
        finally:
            self._ended.set()
            self._behind.set()

    def _open(self) -> Moderator | None:
        """Build the moderator; ``None`` when that failed for good, or nobody waits any more."""
        while True:
            try:
                return self._build()
            except (HcnaError, OSError) as error:
                if not self._patient:
                    self._failed = error
                    self._started.set()
                    return None
                if not self._wait_to_open_again(error):
                    return None
            except BaseException as error:
                self._failed = error
                self._started.set()
                if self._patient:
                    log.critical(
                        "the moderator cannot be built",
                        exc_info=True,
                        extra={"action": "moderator.failed"},
                    )
                    self._exit(EXIT_BUG)
                return None

    def _wait_to_open_again(self, error: Exception) -> bool:
        """Refuse everybody for this reason, and pause; whether to go on trying."""
        trouble = StoreUnavailable(f"M1 cannot open its task store: {error}", 5)
        now = self._clock.elapsed()
        if self._trouble is None or str(trouble) != str(self._trouble) or now >= self._say_at:
            self._say_at = now + SAY_AGAIN_S
            log.error(
                "the task store cannot be opened, will try again: %s",
                error,
                extra={"action": "store.closed", "error": str(error)},
            )
        with self._wake:
            self._trouble = trouble
            refused = self._keep([])
        self._started.set()
        self._publish(Outbound(tuple((pending, trouble) for pending in refused)))
        with self._wake:
            if not self._closed:
                self._wake.wait(OPEN_AGAIN_S)
            return not self._closed

    def _serve(self, moderator: Moderator) -> None:
        while True:
            # Reads the store: whoever calls `submit` meanwhile must not wait for that.
            pause = moderator.sleep_s()
            with self._wake:
                self._busy_since = None
                if not self._inbox and not self._closed and pause > 0:
                    self._wake.wait(pause)
                batch = self._take()
                closed = self._closed
                self._busy_since = self._clock.elapsed()
            if closed and not batch:
                return
            failpoints.hit("writer.batch.taken")
            self._publish(moderator.apply(batch))
            failpoints.hit("writer.batch.published")

    # -- while the writer is held up --------------------------------------------------------------

    def _stand_in(self) -> None:
        while True:
            self._behind.wait()
            self._behind.clear()
            if self._ended.wait(_LOOK_S):
                return
            answers = self.look_after()
            if answers:
                self._publish(Outbound(tuple(answers)))

    def look_after(self) -> list[tuple[Pending, object]]:
        """Take out of the inbox what need not wait for a writer that is held up, with answers."""
        with self._wake:
            moderator, since = self._moderator, self._busy_since
            held_up = 0.0 if since is None else self._clock.elapsed() - since
            if held_up < HELD_UP_S or moderator is None:
                if self._inbox and since is not None:
                    self._behind.set()
                return []
            answers: list[tuple[Pending, object]] = []
            kept: list[Pending] = []
            for pending in self._inbox:
                request = pending.request
                answer: object = None
                if isinstance(request, Heartbeat):
                    answer = moderator.renew(request)
                if answer is None and held_up >= REFUSE_S:
                    answer = StoreUnavailable(
                        f"the task store has not answered for {held_up:.0f} s", 5
                    )
                if answer is None:
                    kept.append(pending)
                else:
                    answers.append((pending, answer))
            self._keep(kept)
            if kept:
                self._behind.set()  # Not yet; or a heartbeat that must not be answered now.
        return answers

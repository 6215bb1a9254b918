"""What a step of the wall clock must not change: how long something has waited, or been kept.

Instants that people know (``run_at``, ``expires_at``) are on the wall clock and follow it wherever
it is put. Durations are on it too, as an instant and a length, because only the wall clock survives
a restart; here it is known by how much each of those instants is off.

Attempts are moved at once, they are few. Tasks that wait in a queue may be millions: each is moved
when its timer comes, if a clock put forward made it come too soon. Ended tasks and audit lines are
not moved at all; for as long as it matters, they are kept longer by what was skipped.

Not noticed: a step while no moderator runs. What waits longer because the clock was put back is not
hurried up.
"""

from __future__ import annotations

from hcna_ray.core.clock import ClockHold
from hcna_ray.core.models import Task, TaskState
from hcna_ray.runtime.ledger import Ledger

#: Seconds by which the wall clock may leave the steady one between two batches; more is a step.
CLOCK_STEP_S = 2.0


class ClockWatch:
    """Both clocks of the moderator side by side. What it notes counts from the commit on."""

    def __init__(self, now: float, elapsed: float) -> None:
        """Start with what the clocks show now."""
        #: How far the wall clock is ahead of the one that never steps.
        self._ahead_s = self._ahead_now = now - elapsed
        #: All steps of this moderator's life, summed up; and with the open batch's.
        self._total_s = self._total_now = 0.0
        #: That sum when a task last began to wait. Whoever is not named began before all steps.
        self._since: dict[str, float] = {}
        self._stepped = False
        self.hold = ClockHold()

    def look(self, now: float, elapsed: float) -> float:
        """Return by how much the clock was put since the last committed batch; 0 if it was not."""
        self._ahead_now, self._total_now = now - elapsed, self._total_s
        by_s = self._ahead_now - self._ahead_s
        if abs(by_s) < CLOCK_STEP_S:
            self._ahead_s = self._ahead_now  # Clocks drift, and are slewed.
            return 0.0
        self._stepped = True
        self._total_now += by_s
        return by_s

    def owed(self, task: Task) -> float:
        """Return by how much what time does to a waiting task must be put off."""
        if task.state is not TaskState.QUEUED or task.lease is not None:
            return 0.0  # Attempts were moved when it happened.
        return max(0.0, self._total_now - self._since.get(task.id, 0.0))

    def follow(self, ledger: Ledger) -> None:
        """The batch is committed: keep what it noticed, and who began to wait in it."""
        self._ahead_s, self._total_s = self._ahead_now, self._total_now
        if not self._stepped:  # As nearly always: nothing has to be known of any task.
            return
        for task in ledger.changed():
            before = ledger.before[task.id]
            if task.terminal:
                self._since.pop(task.id, None)
            elif task.spec.queue_timeout_s is None and task.pinned_until is None:
                continue
            elif task.state is TaskState.QUEUED and (
                before is None
                or (task.queued_at, task.pinned_until) != (before.queued_at, before.pinned_until)
            ):
                self._since[task.id] = self._total_s

"""What workers report of their attempts, turned into events. The fence drops what is late."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

from hcna_ray.core.errors import Invalid
from hcna_ray.core.events import (
    AttemptCancelled,
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptProgressed,
    AttemptStarted,
    LeaseReturned,
)
from hcna_ray.core.models import FailureKind, Task, TaskError, Token
from hcna_ray.runtime.messages import DRAINED, NOT_STARTED, Ack, Report, ReportKind
from hcna_ray.runtime.starts import StartWatch
from hcna_ray.runtime.turn import Turn

log = logging.getLogger(__name__)

#: Late ends remembered as being on record, and lines added to the record in one window of time: a
#: worker that repeats itself must not fill the audit log.
LATE_KNOWN = 4096
LATE_LINES_MAX = 1000
LATE_WINDOW_S = 60.0


class ReportDesk:
    """Applies reports to tasks."""

    def __init__(
        self,
        observe: Callable[[str, float], None],
        jitter: Callable[[], float],
        starts: StartWatch,
    ) -> None:
        """Name the helpers.

        Args:
            observe: Takes a task type and how long one of it took, in milliseconds.
            jitter: Draws from -1 to 1, for backoffs.
            starts: Counts what was handed out and never began.
        """
        self._observe, self._jitter, self._starts = observe, jitter, starts
        #: Late ends that are on record, oldest first.
        self._noted: OrderedDict[tuple[str, tuple[int, int], str], None] = OrderedDict()
        self._window_end, self._lines = 0.0, 0

    def reset(self) -> None:
        """Forget what was put on record: it may not have been committed."""
        self._noted.clear()

    def apply(self, turn: Turn, reports: Iterable[Report], skew: float = 0.0) -> Ack:
        """Apply reports in order; say how many counted and which were late.

        Args:
            turn: The batch.
            reports: What a worker says, with instants of its own wall clock.
            skew: What to add to those to have them on ours.
        """
        applied, late = 0, []
        ledger = turn.ledger
        for report in reports:
            task = ledger.get(report.task_id)
            if task is not None and self._report(turn, task, report, skew):
                applied += 1
                if report.duration_ms:
                    ledger.ended_by_runner.add((report.task_id, Token(*report.token)))
            else:
                late.append((report.task_id, report.token))
                if task is not None and report.kind in _ENDS:
                    self._note_late(turn, report)
        return Ack(applied=applied, late=tuple(late))

    def _note_late(self, turn: Turn, report: Report) -> None:
        """Put a late end on record, once: it changed nothing."""
        generation, attempt = report.token
        name = (report.task_id, (generation, attempt), report.kind)
        if name in self._noted:
            self._noted.move_to_end(name)
            return
        if turn.elapsed >= self._window_end:
            self._window_end, self._lines = turn.elapsed + LATE_WINDOW_S, 0
        self._lines += 1
        if self._lines > LATE_LINES_MAX:
            if self._lines == LATE_LINES_MAX + 1:
                log.warning(
                    "very many late reports: for a minute the audit log tells of no more",
                    extra={"action": "report.late_dropped"},
                )
            return
        self._noted[name] = None
        if len(self._noted) > LATE_KNOWN:
            self._noted.popitem(last=False)
        turn.note(
            "worker",
            "report.late",
            report.task_id,
            "refused",
            f"{generation}.{attempt} {report.kind} counts no longer",
        )

    def _report(self, turn: Turn, task: Task, report: Report, skew: float) -> bool:
        token = Token(*report.token)
        match report.kind:
            case ReportKind.COMPLETED:
                step = turn.ledger.step(
                    task,
                    AttemptCompleted(
                        at=turn.now,
                        token=token,
                        started_at=_on_our_clock(report.started_at, task, turn, skew),
                        result=report.result or b"{}",
                    ),
                )
                if step.changed:
                    self._observe(task.spec.task_type, report.duration_ms)
                return step.changed
            case ReportKind.STARTED:
                at = _on_our_clock(report.at, task, turn, skew)
                return turn.ledger.step(task, AttemptStarted(at=at, token=token)).changed
            case ReportKind.FAILED:
                return turn.ledger.step(
                    task,
                    AttemptFailed(
                        at=turn.now,
                        token=token,
                        started_at=_on_our_clock(report.started_at, task, turn, skew),
                        error=_error(report),
                        jitter=self._jitter(),
                    ),
                ).changed
            case ReportKind.PROGRESS:
                progress = report.progress
                if progress is not None:
                    at = _on_our_clock(progress.at, task, turn, skew)
                    progress = dataclasses.replace(progress, at=at)
                return turn.ledger.step(
                    task,
                    AttemptProgressed(
                        at=turn.now, token=token, progress=progress, checkpoint=report.checkpoint
                    ),
                ).changed
            case ReportKind.CANCELLED:
                if task.cancel_requested_at is None:
                    return False
                started_at = _on_our_clock(report.started_at, task, turn, skew)
                return turn.ledger.step(
                    task, AttemptCancelled(at=turn.now, token=token, started_at=started_at)
                ).changed
            case ReportKind.LOST:
                error = _error(report)
                return turn.ledger.step(
                    task,
                    AttemptLost(
                        at=turn.now,
                        token=token,
                        kind=error.kind,
                        message=error.message,
                        counted=error.type != DRAINED,
                    ),
                ).changed
            case ReportKind.RETURNED:
                return turn.ledger.step(task, self._returned(turn, task, token, report)).changed
            case _:
                raise Invalid("invalid_report", f"unknown report kind {report.kind!r}")

    def _returned(self, turn: Turn, task: Task, token: Token, report: Report) -> LeaseReturned:
        why = "given back" if report.error is None else report.error.message
        lease = task.lease
        waits = lease is not None and lease.token == token and lease.started_at is None
        if waits and report.error is not None and report.error.type == NOT_STARTED:
            return self._starts.returned(task, why, turn.now)
        return LeaseReturned(at=turn.now, token=token, reason=why)


#: Reports of work that was done; when they come too late, somebody may ask where it went.
_ENDS = frozenset({ReportKind.COMPLETED, ReportKind.FAILED})


def _on_our_clock(at: float, task: Task, turn: Turn, skew: float) -> float:
    """Return a worker's instant on our clock: after the grant, and not after now.

    A worker's wall clock may be wrong by any amount, and nothing but what is shown depends on it.
    """
    lease = task.lease
    return at if lease is None else min(max(at + skew, lease.granted_at), turn.now)


def _error(report: Report) -> TaskError:
    if report.error is not None:
        return report.error
    return TaskError(kind=FailureKind.ERROR, message="the worker gave no reason")

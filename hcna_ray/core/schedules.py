"""What a schedule does at an instant: pure, and each instant is decided once.

An *instant* is a moment that the schedule's cron line names. `Schedule.decided_until` says up to
where instants have been decided; it only rises, so none is decided twice, whatever the wall clock
does. What became of one is counted: it was *started* (a task was submitted for it), *skipped* (the
overlap policy wants no task for it), or *missed* (M1 was off for longer than the catch-up window,
or the task was refused).

A look at a schedule is `look`, then `choose` again and again, each answered by `started`, `missed`,
`known` or `put_off`, until there is nothing to submit; `settle` says when to look again.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, Self

from hcna_ray.core.models import TaskSpec

#: Instants made up for at once; of more, the newest.
CATCH_UP_MAX = 100
#: Instants before the window that one look counts; of a longer absence the others are not counted.
COUNTED_MAX = 1000
#: Pause before a task is offered again that was refused for now.
OFFER_AGAIN_S = 10.0


#: Codes of reasons that lie in the schedule itself; all others are trouble.
BY_OVERLAP = frozenset({"previous_running", "superseded", "paused"})


class Overlap(StrEnum):
    """What becomes of an instant while the task of the last one has not ended."""

    SKIP = "skip"
    QUEUE_ONE = "queue_one"
    ALLOW = "allow"
    CANCEL_PREVIOUS = "cancel_previous"


class Recurrence(Protocol):
    """The instants of a schedule, a fixed and ascending row of seconds since the epoch."""

    def after(self, at: float) -> float | None:
        """Return the first one that lies behind ``at``, or ``None`` when there is none."""


class Reason(NamedTuple):
    """Why an instant was not started."""

    code: str
    message: str
    at: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When which task is submitted, and how far that has come. Unique by principal and name."""

    #: Whose it is, and whose its tasks are.
    principal: str
    name: str
    cron: str
    timezone: str = "UTC"
    #: What is submitted; id, instant of acceptance and schedule are put in then.
    spec: TaskSpec
    #: The task as it was asked for (JSON).
    task: bytes = b"{}"
    overlap: Overlap = Overlap.SKIP
    #: How old an instant may be for which a task is still submitted.
    catch_up_s: float = 3600.0
    paused: bool = False
    #: Digest of the key on whose authority tasks are submitted.
    key_sha256: str = ""
    created_at: float = 0.0
    changed_at: float = 0.0
    #: Every instant up to this one has been decided.
    decided_until: float = 0.0
    #: The instant whose task is submitted when the last one has ended (``queue_one``).
    waiting_at: float | None = None
    #: When it is to be looked at again without anybody asking.
    wake_at: float | None = None
    last_task_id: str | None = None
    #: The instant that the last task is for.
    last_at: float | None = None
    started: int = 0
    skipped: int = 0
    missed: int = 0
    #: Why the last instant that was not started was not.
    reason: Reason | None = None

    def evolve(self, **changes: Any) -> Self:
        """Return a copy with ``changes``."""
        return dataclasses.replace(self, **changes)

    @property
    def key(self) -> tuple[str, str]:
        """Principal and name."""
        return self.principal, self.name


class Look(NamedTuple):
    """What a look at a schedule has found, or what is left of it."""

    schedule: Schedule
    #: Instants to be decided now, ascending.
    due: tuple[float, ...]
    #: The first one that is still to come.
    next_at: float | None


class Choice(NamedTuple):
    """What comes next of a look."""

    look: Look
    #: The instant for which a task is to be submitted; ``None``: everything is decided.
    submit: float | None


def look(schedule: Schedule, recurrence: Recurrence, now: float) -> Look:
    """Find the instants that are to be decided, and count those that are too old for it.

    Args:
        schedule: As it is stored.
        recurrence: Its instants.
        now: The wall clock. Before ``decided_until`` nothing is found.
    """
    horizon = now - schedule.catch_up_s
    too_old = 0
    found = recurrence.after(schedule.decided_until)
    while found is not None and found < horizon:
        too_old += 1
        if too_old == COUNTED_MAX:
            found = recurrence.after(math.nextafter(horizon, -math.inf))
        else:
            found = recurrence.after(found)
    due: deque[float] = deque(maxlen=CATCH_UP_MAX)
    while found is not None and found <= now:
        too_old += len(due) == CATCH_UP_MAX
        due.append(found)
        found = recurrence.after(found)
    if too_old:
        # Up to here nothing is made up for, nor looked at again.
        until = math.nextafter(due[0], -math.inf) if due else horizon
        schedule = schedule.evolve(
            decided_until=until,
            missed=schedule.missed + too_old,
            reason=Reason("too_late", "M1 was off or asleep for longer than catch_up_s", now),
        )
    return Look(schedule, tuple(due), found)


def choose(look: Look, *, running: bool, now: float) -> Choice:
    """Decide what may be decided without submitting anything; say what is to be submitted next.

    Args:
        look: What is left of the look.
        running: Whether the schedule's last task has not ended.
        now: The wall clock.
    """
    schedule, due, next_at = look
    if schedule.waiting_at is not None and not running:
        return Choice(look, schedule.waiting_at)
    if not due:
        return Choice(look, None)
    if schedule.overlap is Overlap.CANCEL_PREVIOUS:
        # Each but the last would be cancelled by the one behind it.
        newest = _skipped(schedule, due[:-1], "superseded", "a newer instant was due as well", now)
        return Choice(Look(newest, due[-1:], next_at), due[-1])
    if schedule.overlap is Overlap.ALLOW or not running:
        return Choice(look, due[0])
    if schedule.overlap is Overlap.QUEUE_ONE and schedule.waiting_at is None:
        schedule = schedule.evolve(waiting_at=due[0], decided_until=due[0])
        due = due[1:]
    message = f"task {schedule.last_task_id} had not ended"
    schedule = _skipped(schedule, due, "previous_running", message, now)
    return Choice(Look(schedule, (), next_at), None)


def started(choice: Choice, task_id: str) -> Look:
    """A task was accepted for the instant that was to be submitted."""
    schedule, due, next_at = choice.look
    schedule = schedule.evolve(
        started=schedule.started + 1, last_task_id=task_id, last_at=choice.submit
    )
    return _decided(Look(schedule, due, next_at), choice.submit)


def known(choice: Choice) -> Look:
    """The instant has its task already, from before a change of the schedule: none is counted."""
    return _decided(choice.look, choice.submit)


def missed(choice: Choice, code: str, message: str, now: float) -> Look:
    """The task for the instant was refused, and waiting would not help."""
    schedule, due, next_at = choice.look
    schedule = schedule.evolve(missed=schedule.missed + 1, reason=Reason(code, message, now))
    return _decided(Look(schedule, due, next_at), choice.submit)


def worth_waiting(choice: Choice, now: float) -> bool:
    """Whether the instant will not be too old yet when its task is offered again."""
    assert choice.submit is not None, "nothing was to be submitted"
    return now + OFFER_AGAIN_S - choice.submit <= choice.look.schedule.catch_up_s


def put_off(choice: Choice, code: str, message: str, now: float) -> Schedule:
    """The task for the instant was refused for now: the same again in a while."""
    reason = Reason(code, message, now)
    return choice.look.schedule.evolve(reason=reason, wake_at=now + OFFER_AGAIN_S)


def settle(look: Look) -> Schedule:
    """Everything up to now is decided: set when to look again, if at all."""
    return look.schedule.evolve(wake_at=None if look.schedule.paused else look.next_at)


def alike(one: Schedule, other: Schedule) -> bool:
    """Whether two definitions ask for the same: as when a request was sent twice."""
    return _asked(one) == _asked(other)


def _asked(schedule: Schedule) -> tuple[object, ...]:
    return (
        schedule.cron,
        schedule.timezone,
        schedule.task,
        schedule.overlap,
        schedule.catch_up_s,
        schedule.paused,
    )


def changed(before: Schedule, asked: Schedule) -> Schedule:
    """Return a schedule with another definition: its counts go on, its instants begin anew."""
    waits = asked.overlap is Overlap.QUEUE_ONE and not asked.paused
    return asked.evolve(
        created_at=before.created_at,
        waiting_at=before.waiting_at if waits else None,
        last_task_id=before.last_task_id,
        last_at=before.last_at,
        started=before.started,
        skipped=before.skipped,
        missed=before.missed,
        reason=before.reason,
    )


def pause(schedule: Schedule, now: float) -> Schedule:
    """Submit nothing any more. An instant that waited for the last task is skipped."""
    if schedule.waiting_at is not None:
        schedule = _skipped(schedule, (schedule.decided_until,), "paused", "it was paused", now)
    return schedule.evolve(paused=True, waiting_at=None, wake_at=None, changed_at=now)


def resume(schedule: Schedule, recurrence: Recurrence, now: float) -> Schedule:
    """Go on with the instants from now on; those of the pause are none of its instants."""
    until = max(schedule.decided_until, now) if schedule.paused else schedule.decided_until
    going = schedule.evolve(paused=False, decided_until=until, changed_at=now)
    return going.evolve(wake_at=recurrence.after(until))


def _decided(look: Look, instant: float | None) -> Look:
    """Strike out the instant that was to be submitted."""
    schedule, due, next_at = look
    if instant == schedule.waiting_at:
        return Look(schedule.evolve(waiting_at=None), due, next_at)
    return Look(schedule.evolve(decided_until=instant), due[1:], next_at)


def _skipped(
    schedule: Schedule, instants: tuple[float, ...], code: str, message: str, now: float
) -> Schedule:
    if not instants:
        return schedule
    return schedule.evolve(
        decided_until=instants[-1],
        skipped=schedule.skipped + len(instants),
        reason=Reason(code, message, now),
    )

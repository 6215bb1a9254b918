"""Submits what schedules ask for, when it is time. No Ray here.

The task for an instant and the word that the instant is decided are written in one commit, so a
crash leaves both or neither. The id of the task follows from schedule and instant besides: whatever
has become of the schedule, an instant that has its task is not given another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from ulid import ULID

from hcna_ray.core import schedules as rules
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import (
    CannotAccept,
    HcnaError,
    Invalid,
    NotFound,
    ScheduleBusy,
    ScheduleExists,
    StoreUnavailable,
    TooManySchedules,
)
from hcna_ray.core.events import CancelRequested
from hcna_ray.core.models import Task, WorkerView
from hcna_ray.core.schedules import Choice, Look, Overlap, Reason, Schedule
from hcna_ray.runtime.cron import parsed
from hcna_ray.runtime.intake import Intake
from hcna_ray.runtime.messages import Accepted, SubmitBatch
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import MarkSchedule, PutSchedule, RunSchedule
from hcna_ray.runtime.turn import Turn
from hcna_ray.security.keys import ROLES, ApiKey
from hcna_ray.store.base import Counter, TaskReader, TaskStore

log = logging.getLogger(__name__)

#: Schedules read at once, and tasks that one batch submits for them; others wait for the next one.
DUE_MAX = 100
TASKS_MAX = 500
#: A batch begins with no further schedule after this: many may be due at once, after a long sleep.
BUSY_S = 0.25
#: Pause before a schedule is looked at again whose cron line or time zone is not known any more.
BROKEN_S = 3600.0
SUPERSEDED = "cancelled by its schedule: the next instant has come"


class Refusal(NamedTuple):
    """Why a schedule may not submit its task."""

    code: str
    message: str
    #: Whether that may change by itself.
    passes: bool = False


class Authority(Protocol):
    """Says on whose word a schedule submits tasks, and whether that word still holds."""

    def refusal(self, schedule: Schedule, now: float, opened: int) -> Refusal | None:
        """Return why its task must not be submitted, or ``None``.

        Args:
            schedule: The schedule.
            now: The instant.
            opened: Tasks of its principal that this batch has opened minus those it has ended.
        """
        ...


class KeyAuthority:
    """Holds a schedule to the key that it was made with."""

    def __init__(
        self, keys: Callable[[], Sequence[ApiKey]], open_reader: Callable[[], TaskReader]
    ) -> None:
        """Prepare.

        Args:
            keys: Returns every key on record.
            open_reader: Opens a reader; asked for when the first key with a quota comes.
        """
        self._keys, self._open_reader = keys, open_reader
        self._reader: TaskReader | None = None

    def refusal(self, schedule: Schedule, now: float, opened: int) -> Refusal | None:
        """Return why its task must not be submitted, or ``None``."""
        key = next((one for one in self._keys() if one.sha256 == schedule.key_sha256), None)
        spec = schedule.spec
        if key is None:
            return Refusal("key_gone", "the key that it was made with is not on record")
        if (state := key.state(now)) != "good":
            return Refusal(f"key_{state}", f"the key {key.name!r} is {state}")
        if key.rank < ROLES.index("submitter") or not key.covers(spec.task_type, spec.queue):
            return Refusal("out_of_scope", f"the key {key.name!r} does not cover its task any more")
        return None if key.quota is None else self._used_up(spec.principal, key.quota, opened)

    def _used_up(self, principal: str, quota: int, opened: int) -> Refusal | None:
        # The store has nothing yet of this batch, and is asked for no more than makes a difference.
        most = quota - opened
        try:
            if self._reader is None:
                self._reader = self._open_reader()
            used_up = most <= 0 or self._reader.open_of(principal, most) >= most
        except HcnaError as error:
            return Refusal(error.code, str(error), True)
        message = f"{quota} tasks of {principal!r} have not ended"
        return Refusal("quota", message, True) if used_up else None


class Anybody:
    """An authority that lets every schedule submit."""

    def refusal(self, schedule: Schedule, now: float, opened: int) -> Refusal | None:
        """Return ``None``."""
        return None


def task_id_of(schedule: Schedule, at: float) -> str:
    """Return the id of the task for an instant: a ULID whose time is the instant."""
    digest = hashlib.sha256(f"{schedule.principal}\0{schedule.name}\0{at}".encode()).digest()
    return f"task-{str(ULID(int(at * 1000).to_bytes(6) + digest[:10])).lower()}"


class ScheduleDesk:
    """Looks after schedules, inside the moderator's batches."""

    def __init__(
        self,
        store: TaskStore,
        policy: Policy,
        intake: Intake,
        authority: Authority,
        views: Callable[[float], Iterable[WorkerView]],
        clock: Clock,
    ) -> None:
        """Start empty; `reset` reads the store.

        Args:
            store: Where schedules are.
            policy: How many there may be.
            intake: Takes their tasks.
            authority: Whether they may still submit them.
            views: Returns the workers, by elapsed time.
            clock: For the time that a batch takes.
        """
        self._store, self._policy, self._intake = store, policy, intake
        self._authority, self._views, self._clock = authority, views, clock
        self._wake_at: float | None = None
        #: Whether `_wake_at` is to be read again.
        self._stale = True

    def reset(self) -> None:
        """Read from the store when the first schedule wakes."""
        self._wake_at, self._stale = self._store.next_schedule_wake(), False

    def wake_at(self) -> float | None:
        """Return when the first schedule wakes. Reads the store only after a change."""
        if self._stale:
            self.reset()
        return self._wake_at

    # -- when it is time ------------------------------------------------------------------------

    def run_due(self, turn: Turn) -> None:
        """Submit what is due, and what has waited for a task that ended in this batch."""
        left = TASKS_MAX
        for key in self._released(turn):
            schedule = turn.ledger.schedule(key)
            if schedule is not None and schedule.waiting_at is not None:
                left -= self._carry_out(turn, schedule, left)
        wake_at = self.wake_at()
        if wake_at is None or wake_at > turn.now:
            return
        until = self._clock.elapsed() + BUSY_S
        for read in self._store.due_schedules(turn.now, DUE_MAX):
            schedule = turn.ledger.adopt_schedule(read)
            if schedule is None or schedule.wake_at is None or schedule.wake_at > turn.now:
                continue  # This batch has changed it.
            if left <= 0 or self._clock.elapsed() > until:
                break
            left -= self._carry_out(turn, schedule, left)

    def _released(self, turn: Turn) -> list[tuple[str, str]]:
        """Return the schedules whose tasks have ended in this batch."""
        specs = [task.spec for task in turn.ledger.changed() if task.finished_at is not None]
        found = ((one.principal, one.schedule) for one in specs if one.schedule is not None)
        return list(dict.fromkeys(found))

    def _carry_out(self, turn: Turn, before: Schedule, room: int) -> int:
        """Decide what is due of a schedule; return how many tasks were submitted."""
        try:
            cron = parsed(before.cron, before.timezone)
        except Invalid as error:
            reason = Reason(error.code, str(error), turn.now)
            self._keep(turn, before.evolve(reason=reason, wake_at=turn.now + BROKEN_S), before)
            return 0
        submitted = 0
        look = rules.look(before, cron, turn.now)
        while True:
            running = self._running(turn, look.schedule)
            choice = rules.choose(look, running=running is not None, now=turn.now)
            if choice.submit is None:
                after = rules.settle(choice.look)
                break
            if submitted >= room:
                after = choice.look.schedule.evolve(wake_at=turn.now)  # The next batch goes on.
                break
            refusal, look = self._offer(turn, choice, running)
            submitted += refusal is None
            if refusal is not None:
                if refusal.passes and rules.worth_waiting(choice, turn.now):
                    after = rules.put_off(choice, refusal.code, refusal.message, turn.now)
                    break
                look = rules.missed(choice, refusal.code, refusal.message, turn.now)
        self._keep(turn, after, before)
        return submitted

    def _offer(
        self, turn: Turn, choice: Choice, running: Task | None
    ) -> tuple[Refusal | None, Look]:
        """Submit the task for an instant; return why not, or what is left."""
        schedule, at = choice.look.schedule, choice.submit
        assert at is not None
        task_id = task_id_of(schedule, at)
        if turn.ledger.get(task_id) is not None:
            return None, rules.known(choice)
        opened = turn.ledger.opened[schedule.spec.principal]
        refusal = self._authority.refusal(schedule, turn.now, opened)
        refusal = refusal or self._unknown_type(turn, schedule)
        if refusal is None:
            try:
                self._submit(turn, schedule, task_id, at)
            except StoreUnavailable:
                raise
            except HcnaError as error:
                refusal = Refusal(error.code, str(error), isinstance(error, CannotAccept))
        if refusal is not None:
            return refusal, choice.look
        self._cancel_previous(turn, schedule, running)
        return None, rules.started(choice, task_id)

    def _submit(
        self,
        turn: Turn,
        schedule: Schedule,
        task_id: str,
        at: float,
        idempotency_key: str | None = None,
    ) -> Accepted:
        spec = dataclasses.replace(
            schedule.spec,
            id=task_id,
            accepted_at=turn.now,
            schedule=schedule.name,
            schedule_at=at,
            idempotency_key=idempotency_key,
            fingerprint="" if idempotency_key is None else f"schedule {schedule.name}",
        )
        (result,) = self._intake.submit(turn, SubmitBatch(specs=(spec,), atomic=True))
        assert isinstance(result, Accepted), "an atomic batch is accepted or raises"
        return result

    def _cancel_previous(self, turn: Turn, schedule: Schedule, running: Task | None) -> None:
        if schedule.overlap is Overlap.CANCEL_PREVIOUS and running is not None:
            turn.ledger.step(running, CancelRequested(at=turn.now, reason=SUPERSEDED))

    def _running(self, turn: Turn, schedule: Schedule) -> Task | None:
        """Return the schedule's last task if it has not ended."""
        if schedule.last_task_id is None:
            return None
        task = turn.ledger.get(schedule.last_task_id)
        return None if task is None or task.terminal else task

    def _unknown_type(self, turn: Turn, schedule: Schedule) -> Refusal | None:
        """Refuse a type that no worker on record has; without workers nobody can tell."""
        workers = list(self._views(turn.elapsed))
        name = schedule.spec.task_type
        if not workers or any(name in worker.task_types for worker in workers):
            return None
        message = f"no worker on record runs tasks of type {name!r}"
        return Refusal("unknown_task_type", message, True)

    def _keep(self, turn: Turn, after: Schedule, before: Schedule) -> None:
        """Note what has become of a schedule, and what is to be counted and put on record of it."""
        self._set(turn, after.key, after)
        for outcome in ("started", "skipped", "missed"):
            if delta := getattr(after, outcome) - getattr(before, outcome):
                turn.ledger.counts[Counter("schedule", "", outcome)] += delta
        reason, told = after.reason, before.reason
        if reason is None or reason == told or reason.code in rules.BY_OVERLAP:
            return
        log.warning(
            "a schedule could not submit its task",
            extra={
                "action": "schedule.held_up",
                "schedule": after.name,
                "principal": after.principal,
                "missed": after.missed - before.missed,
                "error_code": reason.code,
            },
        )
        since = told is not None and before.last_at is not None and before.last_at > told.at
        if told is None or told.code != reason.code or since:
            # Once for each reason: a schedule may be held up every minute for ever.
            turn.note(after.principal, "schedule.held_up", after.name, reason.code, reason.message)

    def _set(self, turn: Turn, key: tuple[str, str], schedule: Schedule | None) -> None:
        turn.ledger.set_schedule(key, schedule)
        turn.effects.append(self._look_again)

    def _look_again(self) -> None:
        self._stale = True

    # -- what clients ask -----------------------------------------------------------------------

    def put(self, turn: Turn, request: PutSchedule) -> Schedule:
        """Create a schedule, or give it another definition.

        Raises:
            ScheduleExists: there is another one of that name.
            NotFound: there is none to be changed.
            TooManySchedules: there are as many as there may be.
        """
        asked = request.schedule
        before = turn.ledger.schedule(asked.key)
        cron = parsed(asked.cron, asked.timezone)
        if before is None:
            if not request.new:
                raise NotFound("schedule", asked.name)
            self._check_room(turn, asked.principal)
            after = asked
        elif request.new:
            if not rules.alike(before, asked):
                raise ScheduleExists(asked.name)
            return before
        else:
            after = rules.changed(before, asked)
        after = after.evolve(wake_at=None if after.paused else cron.after(after.decided_until))
        self._set(turn, after.key, after)
        action = "schedule.create" if before is None else "schedule.change"
        turn.note(request.by, action, _named(after), "done", f"{after.cron} {after.timezone}")
        return after

    def _check_room(self, turn: Turn, principal: str) -> None:
        new = [key for key in turn.ledger.changed_schedules if turn.ledger.schedule(key)]
        for owner, most, setting in (
            (principal, self._policy.schedules_of_one_max, "limits.schedules_of_one_max"),
            (None, self._policy.schedules_max, "limits.schedules_max"),
        ):
            count = self._store.count_schedules(owner)
            count += sum(owner in (None, whose) for whose, _name in new)
            if count >= most:
                raise TooManySchedules(count, setting)

    def mark(self, turn: Turn, request: MarkSchedule) -> Schedule:
        """Pause, resume or delete a schedule; return it as it is, or was. Raises `NotFound`."""
        before = self._found(turn, request.principal, request.name)
        after = before
        match request.action:
            case "pause":
                after = rules.pause(before, turn.now)
            case "resume":
                cron = parsed(before.cron, before.timezone)
                after = rules.resume(before, cron, turn.now)
                if request.key_sha256 is not None:
                    # A lesser key lends less. A greater one lends nothing: it says nothing of what
                    # the task is, and that may be from somebody with a lesser key.
                    confined = after.spec.confined or request.confined
                    spec = dataclasses.replace(after.spec, confined=confined)
                    after = after.evolve(key_sha256=request.key_sha256, spec=spec)
        self._set(turn, before.key, None if request.action == "delete" else after)
        turn.note(request.by, f"schedule.{request.action}", _named(before), "done")
        return after

    def run(self, turn: Turn, request: RunSchedule) -> Accepted:
        """Submit a schedule's task now, whether it is paused or not.

        Raises:
            NotFound: there is no such schedule.
            ScheduleBusy: its last task has not ended, and ``overlap`` wants no second one.
            HcnaError: the task was refused.
        """
        schedule = self._found(turn, request.principal, request.name)
        name, running = request.idempotency_key, self._running(turn, schedule)
        if (
            running is not None
            and schedule.overlap in (Overlap.SKIP, Overlap.QUEUE_ONE)
            and not self._repeated(turn, request)
        ):
            raise ScheduleBusy(schedule.name, running.id, schedule.overlap)
        repeated = turn.ledger.get(request.task_id) is not None
        result = self._submit(turn, schedule, request.task_id, turn.now, name)
        if not (repeated or result.duplicate):
            self._cancel_previous(turn, schedule, running)
            self._set(
                turn,
                schedule.key,
                schedule.evolve(
                    started=schedule.started + 1, last_task_id=result.task_id, last_at=turn.now
                ),
            )
            turn.ledger.counts[Counter("schedule", "", "started")] += 1
            turn.note(request.by, "schedule.run", _named(schedule), "done", result.task_id)
        return result

    def _repeated(self, turn: Turn, request: RunSchedule) -> bool:
        """Whether the same was asked before: then its task is the answer."""
        if turn.ledger.get(request.task_id) is not None:
            return True
        if request.idempotency_key is None:
            return False
        name = (request.principal, request.idempotency_key)
        return name in turn.ledger.claims or bool(self._store.keys_held([name]))

    def _found(self, turn: Turn, principal: str, name: str) -> Schedule:
        found = turn.ledger.schedule((principal, name))
        if found is None:
            raise NotFound("schedule", name)
        return found


def _named(schedule: Schedule) -> str:
    """Return how the audit log calls a schedule."""
    return f"{schedule.principal}/{schedule.name}"

"""Every error that hcna-ray expects, with a stable code.

    HcnaError
    ├── NotFound              task_not_found, worker_not_found, artifact_not_found, ...
    ├── Conflict
    │   ├── TaskFinished      a finished task cannot be cancelled
    │   ├── NotFailed         only a failed task can be replayed
    │   ├── IdempotencyConflict
    │   ├── WorkerOnline      only a worker that is away can be forgotten
    │   ├── WorkerNameTaken   another machine is the worker of that name
    │   ├── ScheduleExists    there is another one of that name
    │   ├── ScheduleBusy      its last task has not ended
    │   ├── TooManySchedules
    │   └── VersionConflict   a step did not start from the newest stored task
    ├── Invalid               unknown_task_type, invalid_request, dependency_not_found, ...
    ├── CannotAccept          retry later: ``retry_after_s``
    │   ├── Overloaded
    │   │   └── QueueFull     not one task more, however small
    │   ├── ModeratorUnavailable
    │   │   └── NoAnswer      it was asked: whether it did what was asked is not known
    │   ├── WorkerUnavailable
    │   ├── OutputUnavailable the worker that keeps what was printed is away
    │   ├── StoreUnavailable
    │   │   ├── StoreDamaged  its file contradicts itself: only a backup helps
    │   │   └── StoreFull
    │   ├── QuotaExceeded     as many tasks as the key may have in the queue
    │   ├── RateLimited       as many requests as the key may make
    │   └── DiskFull
    ├── StaleWorker           an old incarnation of a worker called
    ├── StaleAttempt          an attempt asks for files, and its lease is over
    ├── StaleModerator        a moderator on an older store than this worker has worked for
    ├── StoreTooOld           the SQLite library is older than the WAL-reset fix
    ├── SchemaTooNew          a newer hcna-ray wrote the database
    ├── InvalidTransition     a missing pair in the transition table: a bug
    └── InvalidName           a node name that does not parse

All take positional arguments and keep them, so that they survive pickling between processes.
"""

from __future__ import annotations


class HcnaError(Exception):
    """Root of the tree. ``code`` is stable and may be matched on; the text may change."""

    code = "internal"


class NotFound(HcnaError):
    """Something named by a caller does not exist (or is not the caller's to see)."""

    code = "not_found"

    def __init__(self, what: str, name: str) -> None:
        super().__init__(what, name)
        self.what, self.name = what, name
        self.code = f"{what}_not_found"

    def __str__(self) -> str:
        return f"there is no {self.what} {self.name!r}"


class Conflict(HcnaError):
    """The request is well formed but does not fit the state of things."""

    code = "conflict"


class TaskFinished(Conflict):
    """The task has ended, so it cannot be cancelled."""

    code = "task_finished"

    def __init__(self, task_id: str, state: str) -> None:
        super().__init__(task_id, state)
        self.task_id, self.state = task_id, state

    def __str__(self) -> str:
        return f"task {self.task_id} has already ended as {self.state}"


class NotFailed(Conflict):
    """Only a failed task can be replayed."""

    code = "not_failed"

    def __init__(self, task_id: str, state: str) -> None:
        super().__init__(task_id, state)
        self.task_id, self.state = task_id, state

    def __str__(self) -> str:
        return f"task {self.task_id} is {self.state}; only a failed task can be retried"


class IdempotencyConflict(Conflict):
    """The idempotency key was used before with another request."""

    code = "idempotency_conflict"

    def __init__(self, key: str, task_id: str) -> None:
        super().__init__(key, task_id)
        self.key, self.task_id = key, task_id

    def __str__(self) -> str:
        return (
            f"idempotency key {self.key!r} already belongs to task {self.task_id}, "
            "whose request was different; use a new key for a new request"
        )


class WorkerOnline(Conflict):
    """The worker is in contact, so it cannot be forgotten."""

    code = "worker_online"

    def __init__(self, worker: str, state: str) -> None:
        super().__init__(worker, state)
        self.worker, self.state = worker, state

    def __str__(self) -> str:
        return (
            f"worker {self.worker} is {self.state}; only one that is asleep or gone is forgotten: "
            "run hcna leave on its machine first, or say force"
        )


class WorkerNameTaken(Conflict):
    """Another machine is the worker of that name, and it is in contact."""

    code = "worker_name_taken"

    def __init__(self, worker: str, holder: str) -> None:
        super().__init__(worker, holder)
        self.worker, self.holder = worker, holder

    def __str__(self) -> str:
        return (
            f"the machine at {self.holder} is {self.worker} already; "
            "let this one join under another name, or stop that one first"
        )


class ScheduleExists(Conflict):
    """There is a schedule of that name already, and it is not the same."""

    code = "schedule_exists"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"there is another schedule {self.name!r} already; PUT changes it"


class ScheduleBusy(Conflict):
    """The schedule's last task has not ended, and its overlap policy wants no second one."""

    code = "schedule_busy"

    def __init__(self, name: str, task_id: str, overlap: str) -> None:
        super().__init__(name, task_id, overlap)
        self.name, self.task_id, self.overlap = name, task_id, overlap

    def __str__(self) -> str:
        return (
            f"task {self.task_id} of schedule {self.name!r} has not ended, and overlap is "
            f"{self.overlap}"
        )


class TooManySchedules(Conflict):
    """There are as many schedules as there may be, of one owner or in all."""

    code = "too_many_schedules"

    def __init__(self, count: int, setting: str) -> None:
        super().__init__(count, setting)
        self.count, self.setting = count, setting

    def __str__(self) -> str:
        return f"there are {self.count} schedules, as many as {self.setting} allows"


class VersionConflict(Conflict):
    """The stored task is not the one a step started from."""

    code = "version_conflict"

    def __init__(self, task_id: str, expected: int) -> None:
        super().__init__(task_id, expected)
        self.task_id, self.expected = task_id, expected

    def __str__(self) -> str:
        return f"task {self.task_id} is no longer at version {self.expected}"


class Invalid(HcnaError):
    """The request does not fit; ``problems`` names each field and what is wrong with it."""

    code = "invalid_request"

    def __init__(self, code: str, message: str, problems: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(code, message, problems)
        self.code, self.message, self.problems = code, message, problems

    def __str__(self) -> str:
        return self.message


class CannotAccept(HcnaError):
    """The system cannot accept this now. Trying again later helps.

    Nothing was stored, except of a `NoAnswer`, which says that this is not known.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.message, self.retry_after_s = message, retry_after_s

    def __str__(self) -> str:
        return self.message


class Overloaded(CannotAccept):
    """A bounded queue or budget is full."""

    code = "overloaded"


class QueueFull(Overloaded):
    """The queue holds as many tasks as it may, so whatever is sent is refused until some end."""


class ModeratorUnavailable(CannotAccept):
    """The moderator does not answer."""

    code = "moderator_unavailable"


class OutputUnavailable(CannotAccept):
    """The worker that keeps an attempt's output does not answer."""

    code = "output_unavailable"


class NoAnswer(ModeratorUnavailable):
    """The moderator was asked and did not answer: what was asked may have been done, or not.

    So this one does *not* say that nothing was stored.
    """

    code = "outcome_unknown"


class WorkerUnavailable(CannotAccept):
    """The worker asked for is on record but does not answer."""

    code = "worker_unavailable"


class StoreUnavailable(CannotAccept):
    """The durable store cannot be written."""

    code = "store_unavailable"


class StoreDamaged(StoreUnavailable):
    """The durable store is not what was written: nothing may be built on it."""

    code = "store_damaged"

    def __init__(self, message: str, retry_after_s: int = 600) -> None:
        super().__init__(message, retry_after_s)

    def __str__(self) -> str:
        return (
            f"the task store is damaged: {self.message}; stop hcna-ray, keep its files, "
            "and restore a backup (hcna restore)"
        )


class StoreFull(StoreUnavailable):
    """Where the durable store lies there is no space left."""

    code = "store_full"


class QuotaExceeded(CannotAccept):
    """The caller's own limit is reached."""

    code = "quota"


class RateLimited(CannotAccept):
    """The caller has made as many requests as its key allows for now."""

    code = "rate_limited"


class DiskFull(CannotAccept):
    """Free space is below the reserve."""

    code = "disk_full"


class StaleWorker(HcnaError):
    """A call came from an incarnation of a worker that has been replaced."""

    code = "stale_worker"

    def __init__(self, worker: str, incarnation: str, current: str | None) -> None:
        super().__init__(worker, incarnation, current)
        self.worker, self.incarnation, self.current = worker, incarnation, current

    def __str__(self) -> str:
        return f"{self.worker}: incarnation {self.incarnation} was replaced by {self.current}"


class StaleAttempt(HcnaError):
    """An attempt asks for something, and its lease is over: the task has moved on."""

    code = "stale_attempt"

    def __init__(self, task_id: str, token: str) -> None:
        super().__init__(task_id, token)
        self.task_id, self.token = task_id, token

    def __str__(self) -> str:
        return (
            f"attempt {self.token} of task {self.task_id} is not in force any more: "
            "it is given no files, and none of it are kept"
        )


class StaleModerator(HcnaError):
    """A moderator's tokens are older than some this worker has seen: its store was replaced."""

    code = "stale_moderator"

    def __init__(self, generation: int, seen: int, mark: str) -> None:
        super().__init__(generation, seen, mark)
        self.generation, self.seen, self.mark = generation, seen, mark

    def __str__(self) -> str:
        return (
            f"M1 serves a store of generation {self.generation}, and this worker has worked for "
            f"generation {self.seen}: that store is an older copy. Stop that M1; or, if the store "
            f"was meant to begin anew, remove {self.mark} on this worker"
        )


class StoreTooOld(HcnaError):
    """The database library carries a known corruption bug."""

    code = "store_too_old"

    def __init__(self, found: str, needed: str) -> None:
        super().__init__(found, needed)
        self.found, self.needed = found, needed

    def __str__(self) -> str:
        return (
            f"SQLite {self.found} can corrupt a WAL database (fixed in {self.needed}); "
            "install a newer apsw: uv sync"
        )


class SchemaTooNew(HcnaError):
    """The database was written by a newer hcna-ray."""

    code = "schema_too_new"

    def __init__(self, found: int, known: int) -> None:
        super().__init__(found, known)
        self.found, self.known = found, known

    def __str__(self) -> str:
        return (
            f"the store has schema {self.found}, this hcna-ray knows up to {self.known}; "
            "upgrade hcna-ray or restore an older backup"
        )


class InvalidTransition(HcnaError):
    """The transition table has no entry for this state and event: a bug in hcna-ray."""

    code = "invalid_transition"

    def __init__(self, task_id: str, state: str, event: str) -> None:
        super().__init__(task_id, state, event)
        self.task_id, self.state, self.event = task_id, state, event

    def __str__(self) -> str:
        return f"task {self.task_id}: no transition from {self.state} on {self.event}"


class InvalidName(HcnaError):
    """A node name does not have the form ``ARCH-ROLE[--ENV][--REGION][--vMAJOR.MINOR]``."""

    code = "invalid_name"

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name!r} is not a node name: {self.why} (example: HCNA-W1--prod--home--v1.0)"

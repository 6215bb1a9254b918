"""What the moderator asks of a durable home of tasks, and what readers ask of it.

One writer (the moderator's writer thread) uses a `TaskStore`; any number of readers, in other
processes too, use a `TaskReader`. Every implementation passes the suite in ``tests/contract``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hcna_ray.core.audit import AuditPoint
from hcna_ray.core.clock import ClockHold
from hcna_ray.core.models import (
    Attempt,
    AuditEntry,
    Fact,
    LaneKey,
    Task,
    TaskFilter,
    TaskState,
    WorkerRecord,
)
from hcna_ray.core.schedules import Schedule


class KeyClaim(NamedTuple):
    """An idempotency key wanted for, or held by, a task."""

    principal: str
    key: str
    task_id: str
    fingerprint: str
    at: float


class StoredFact(NamedTuple):
    """A `Fact` with the number the store gave it. Numbers rise in commit order, never repeat."""

    number: int
    fact: Fact


class StoredAudit(NamedTuple):
    """An `AuditEntry` with its number and its hash (`hcna_ray.core.audit`)."""

    number: int
    entry: AuditEntry
    #: ``None`` for a line from before the log was chained.
    hash: str | None


class AuditState(NamedTuple):
    """Where the audit log begins and ends, as it is kept apart from its lines."""

    #: The last line that was pruned; or, where lines without a hash are left, the last of those.
    anchor: AuditPoint
    #: The number of the last line that was written.
    last: int


class Belongs(NamedTuple):
    """Whose a task is, and what a key's scopes are held against."""

    principal: str
    task_type: str
    queue: str


class Settlement(NamedTuple):
    """Durable order to tell the dependents of an ended task how it ended. Carried out in chunks."""

    number: int
    task_id: str
    completed: bool


class Delivery(NamedTuple):
    """What is to be told to a webhook, until it was taken there or given up."""

    #: The same on every try, and of nothing else: whoever gets it twice can tell.
    id: str
    task_id: str
    #: Whose task it is; what is sent is signed with a secret of theirs.
    principal: str
    #: Host and port of the URL.
    target: str
    url: str
    #: What is sent, to the byte.
    body: bytes
    created_at: float
    due_at: float
    tries: int = 0
    #: What came of the last try.
    note: str = ""


class Counter(NamedTuple):
    """A monotone count that survives restarts, e.g. ``("attempts", "echo", "completed")``."""

    name: str
    task_type: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSize:
    """How much is waiting or running (every task that has not ended)."""

    tasks: int
    bytes: int


class TaskStore(Protocol):
    """Durable home of tasks: one writer, used from one thread at a time.

    Every method that writes must be called inside `transaction`; every method that reads sees what
    the open transaction has written. Instants are handed in: a store never reads a clock.
    """

    def transaction(self) -> AbstractContextManager[None]:
        """Open the one write transaction. Leaving it commits durably (fsync) before returning.

        An exception inside rolls everything back and propagates.

        Raises:
            StoreUnavailable: the disk refused (full, read-only), or the server cannot be reached;
                rolled back, nothing stored.
            OSError: fsync failed, a commit stays in doubt, or another moderator writes now: the
                process must exit, what is stored is unknown to it.
        """
        ...

    def close(self) -> None:
        """Release the database. Harmless twice."""
        ...

    def unconfirmed_s(self) -> float:
        """Return how long ago it was last certain that nobody else writes here.

        0 where nobody can take the store over from a living writer. Callable from any thread, also
        while the writer's waits for the database.
        """
        ...

    # -- identity -------------------------------------------------------------------------------

    def generation(self) -> int:
        """Return the first half of every fencing token: 1 at first, raised by each restore."""
        ...

    def raise_generation(self) -> int:
        """Raise the generation by one and return it."""
        ...

    def last_seq(self) -> int:
        """Return the highest accept sequence ever used, 0 when none."""
        ...

    # -- tasks ----------------------------------------------------------------------------------

    def insert(self, tasks: Sequence[Task]) -> set[str]:
        """Add new tasks and return the ids really added.

        An id that exists already is left as it is and is not in the answer (a resent batch).
        """
        ...

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        ...

    def save(self, tasks: Sequence[Task]) -> None:
        """Replace stored tasks; each must carry the stored version plus one.

        A task that ends is given the next *end number* (see `TaskReader.ended`); one that is
        replayed loses it.

        Raises:
            VersionConflict: a stored task is at another version.
        """
        ...

    def claim_keys(self, claims: Sequence[KeyClaim]) -> dict[tuple[str, str], KeyClaim]:
        """Bind free idempotency keys; return who holds each ``(principal, key)`` afterwards."""
        ...

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        ...

    def append_facts(self, facts: Sequence[Fact]) -> int:
        """Add lines of history and return the number of the last one (0 if there never was one)."""
        ...

    def save_attempts(self, attempts: Sequence[Attempt]) -> None:
        """Insert or replace attempts by ``(task_id, token)``."""
        ...

    # -- what the scheduler reads -----------------------------------------------------------------

    def ready_lanes(self) -> dict[LaneKey, int]:
        """Return how many tasks stand in the dispatch index, by lane. Empty lanes are left out."""
        ...

    def heads(self, lane: LaneKey, limit: int) -> list[Task]:
        """Return the first ``limit`` ready tasks of a lane by ``(dispatch_key, seq)``."""
        ...

    def leased(self) -> list[Task]:
        """Return every task that holds a lease. Bounded by what the workers can hold."""
        ...

    def due(self, now: float, limit: int) -> list[Task]:
        """Return tasks whose ``wake_at`` is at or before ``now``, earliest first."""
        ...

    def next_wake(self) -> float | None:
        """Return the earliest ``wake_at`` of all tasks, or ``None``."""
        ...

    def size(self) -> QueueSize:
        """Return count and bytes of all tasks that have not ended. Flat cost: kept as counters."""
        ...

    # -- keys and dependencies --------------------------------------------------------------------

    def ordering_out(self, key: str) -> Task | None:
        """Return the first not yet ended task with this ordering key that is not held for it."""
        ...

    def ordering_line(self, key: str, limit: int) -> list[Task]:
        """Return the not yet ended tasks with this ordering key, in accept order."""
        ...

    def held_by_concurrency(self, key: str, limit: int) -> list[Task]:
        """Return tasks held for this concurrency key by ``(dispatch_key, seq)``."""
        ...

    def concurrency_keys_held(self, limit: int, *, after: str = "") -> list[str]:
        """Return up to ``limit`` distinct concurrency keys for which tasks are held, sorted.

        Args:
            limit: How many at most.
            after: Only those that sort behind this one (a keyset page).
        """
        ...

    def add_dependencies(self, child_id: str, parent_ids: Sequence[str]) -> None:
        """Note that ``child_id`` waits for each parent."""
        ...

    def task_states(self, ids: Iterable[str]) -> dict[str, TaskState]:
        """Return the states of those of ``ids`` that exist."""
        ...

    def dependents(self, parent_id: str, limit: int) -> list[str]:
        """Return up to ``limit`` ids that still wait for ``parent_id``, in accept order."""
        ...

    def waited_for(self, ids: Sequence[str]) -> set[str]:
        """Return those of ``ids`` for which any task still waits."""
        ...

    def drop_dependents(self, parent_id: str, child_ids: Sequence[str]) -> None:
        """Forget that these children wait for ``parent_id``."""
        ...

    def push_settlements(self, items: Sequence[tuple[str, bool]]) -> None:
        """Add durable `Settlement` orders for ``(task_id, completed)``."""
        ...

    def settlements(self, limit: int) -> list[Settlement]:
        """Return the oldest settlement orders not carried out yet."""
        ...

    def drop_settlement(self, number: int) -> None:
        """Forget a settlement order that has been carried out."""
        ...

    # -- webhooks ---------------------------------------------------------------------------------

    def save_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        """Insert or replace deliveries by id."""
        ...

    def drop_deliveries(self, ids: Sequence[str]) -> None:
        """Forget deliveries that are done with."""
        ...

    # -- schedules --------------------------------------------------------------------------------

    def save_schedules(self, schedules: Sequence[Schedule]) -> None:
        """Insert or replace schedules by principal and name; none may be there twice."""
        ...

    def drop_schedules(self, keys: Sequence[tuple[str, str]]) -> None:
        """Forget schedules by ``(principal, name)``."""
        ...

    def get_schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)``, if there is one."""
        ...

    def due_schedules(self, now: float, limit: int) -> list[Schedule]:
        """Return schedules whose ``wake_at`` is at or before ``now``, earliest first."""
        ...

    def next_schedule_wake(self) -> float | None:
        """Return the earliest ``wake_at`` of all schedules, or ``None``."""
        ...

    def count_schedules(self, principal: str | None = None) -> int:
        """Return how many schedules there are, of a principal or in all."""
        ...

    # -- small tables -----------------------------------------------------------------------------

    def save_worker(self, record: WorkerRecord) -> None:
        """Insert or replace a worker by name."""
        ...

    def workers(self) -> list[WorkerRecord]:
        """Return every worker ever registered and not forgotten, by name."""
        ...

    def forget_worker(self, name: str) -> None:
        """Remove a worker that left for good."""
        ...

    def set_paused(self, queue: str, paused: bool) -> None:
        """Pause a queue, or resume it."""
        ...

    def paused(self) -> frozenset[str]:
        """Return the names of paused queues."""
        ...

    def bump(self, deltas: Mapping[Counter, int]) -> None:
        """Add to counters."""
        ...

    def counted_queues(self) -> frozenset[str]:
        """Return the labels that accepted tasks are counted under, by queue."""
        ...

    def append_audit(self, entries: Sequence[AuditEntry]) -> None:
        """Add audit lines, each chained to the one before it (`hcna_ray.core.audit`)."""
        ...

    def prune(self, ended_before: float, keys_before: float, limit: int) -> int:
        """Delete up to ``limit`` tasks ended before an instant, with their history and attempts.

        Idempotency keys go when bound before ``keys_before`` and their task is gone. A task that
        others still depend on stays. Returns how many tasks went.
        """
        ...

    def prune_audit(self, before: float, limit: int) -> int:
        """Delete up to ``limit`` audit lines of before an instant; return how many went.

        Oldest number first, and none behind one that stays: what is left is the end of the log,
        without a gap. Numbers are never used again. The last one's hash stays as the anchor.
        """
        ...

    def clock_hold(self) -> ClockHold:
        """Return what was last said to `hold_clock`; nothing is held in a new store."""
        ...

    def hold_clock(self, hold: ClockHold) -> None:
        """Remember by how much the wall clock was put forward. Whole seconds, rounded up."""
        ...


class TaskReader(Protocol):
    """Reads for the outside: short transactions, never blocks the writer. One thread at a time."""

    def close(self) -> None:
        """Release the connection. Harmless twice."""
        ...

    def get(self, ids: Iterable[str]) -> dict[str, Task]:
        """Return the tasks that exist among ``ids``."""
        ...

    def attempts(self, task_id: str) -> list[Attempt]:
        """Return the attempts of a task, oldest first."""
        ...

    def page(self, where: TaskFilter, *, before_seq: int | None, limit: int) -> list[Task]:
        """Return tasks that fit, newest first, with ``seq < before_seq`` (a keyset page)."""
        ...

    def ended(
        self, *, ids: Sequence[str] = (), batch_id: str | None = None, after: int = 0, limit: int
    ) -> list[tuple[int, Task]]:
        """Return ended tasks among ``ids`` or of a batch with an end number above ``after``.

        Ordered by end number, which rises in commit order: the last one is the next ``after``.
        """
        ...

    def open_count(self, *, ids: Sequence[str] = (), batch_id: str | None = None) -> int:
        """Return how many of them exist and have not ended."""
        ...

    def batch_exists(self, batch_id: str) -> bool:
        """Return whether any task carries this batch id."""
        ...

    def belongs(self, ids: Iterable[str]) -> dict[str, Belongs]:
        """Return whose those of ``ids`` are that exist. Cheaper than `get`: no spec is read."""
        ...

    def open_of(self, principal: str, limit: int) -> int:
        """Return how many tasks of a principal have not ended, counted as far as ``limit``."""
        ...

    def keys_held(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyClaim]:
        """Return who holds each of these ``(principal, key)`` pairs; free ones are left out."""
        ...

    def facts(self, *, after: int, limit: int, task_id: str | None = None) -> list[StoredFact]:
        """Return history with numbers above ``after``, oldest first."""
        ...

    def last_fact(self) -> int:
        """Return the number of the newest line of history, 0 when there is none."""
        ...

    def generation(self) -> int:
        """Return the generation: a restore raises it, and may give numbers of history again."""
        ...

    def deliveries(
        self, *, due_before: float, limit: int, not_to: Collection[str] = ()
    ) -> list[Delivery]:
        """Return deliveries that are due at or before an instant, by ``(due_at, id)``.

        Args:
            due_before: The instant.
            limit: How many at most.
            not_to: Targets that are left out.
        """
        ...

    def get_schedule(self, key: tuple[str, str]) -> Schedule | None:
        """Return the schedule of ``(principal, name)``, if there is one."""
        ...

    def schedules(
        self, *, principal: str | None = None, after: tuple[str, str] = ("", ""), limit: int
    ) -> list[Schedule]:
        """Return schedules by ``(principal, name)``, those behind ``after`` (a keyset page).

        Args:
            principal: Whose; ``None``: everybody's.
            after: The last one of the page before.
            limit: How many at most.
        """
        ...

    def counters(self) -> dict[Counter, int]:
        """Return every counter."""
        ...

    def depth(self) -> dict[tuple[str, TaskState], int]:
        """Return how many tasks stand in each ``(queue, state)``. Flat cost: kept as counters."""
        ...

    def queued_since(self) -> dict[str, float]:
        """Return for each queue since when its longest waiting ready task has been queued.

        Of each lane only the first task in dispatch order is looked at, so the cost grows with the
        lanes and not with the tasks; one behind it, of lower priority, may have waited for longer.
        Queues without a ready task are left out.
        """
        ...

    def audit(self, *, before: int | None, limit: int) -> list[StoredAudit]:
        """Return audit lines, newest first."""
        ...

    def audit_after(self, after: int, limit: int) -> list[StoredAudit]:
        """Return audit lines with numbers above ``after``, oldest first."""
        ...

    def audit_state(self) -> AuditState:
        """Return where the audit log begins and ends."""
        ...

    def workers(self) -> list[WorkerRecord]:
        """Return every worker on record."""
        ...

    def paused(self) -> frozenset[str]:
        """Return the names of paused queues."""
        ...

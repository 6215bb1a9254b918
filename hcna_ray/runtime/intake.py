"""What clients ask of tasks: accept, cancel, replay."""

from __future__ import annotations

import dataclasses

from hcna_ray.core.errors import (
    DiskFull,
    HcnaError,
    IdempotencyConflict,
    Invalid,
    NotFound,
    Overloaded,
    QueueFull,
)
from hcna_ray.core.events import CancelRequested, KeyHeld, TaskReplayed
from hcna_ray.core.machine import accept
from hcna_ray.core.models import TERMINAL, Hold, Task, TaskSpec, TaskState
from hcna_ray.runtime.aftermath import Aftermath
from hcna_ray.runtime.messages import Accepted, Refused, ReplayReply, SubmitBatch, SubmitResult
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Cancel, Retry, RetryMany
from hcna_ray.runtime.turn import Turn
from hcna_ray.store.base import KeyClaim, TaskStore


class Intake:
    """Decides what is accepted. Every refusal leaves nothing behind."""

    def __init__(self, store: TaskStore, policy: Policy, aftermath: Aftermath) -> None:
        """Start empty; `reset` reads the store."""
        self._store, self._policy, self._aftermath = store, policy, aftermath
        self._seq = 0
        #: Whether free disk space is below the reserve.
        self.disk_low = False

    def reset(self) -> None:
        """Read the accept sequence from the store."""
        self._seq = self._store.last_seq()

    def submit(self, turn: Turn, batch: SubmitBatch) -> list[SubmitResult]:
        """Accept what may be accepted, in order; answer each item.

        Raises:
            HcnaError: the batch is atomic and this item was refused; nothing is stored.
        """
        results: list[SubmitResult] = []
        accepted: list[tuple[TaskSpec, list[str], str | None]] = []
        size = self._store.size()
        tasks, stored = size.tasks + turn.added_tasks, size.bytes + turn.added_bytes
        claims: dict[tuple[str, str], KeyClaim] = {}
        names = [(s.principal, s.idempotency_key) for s in batch.specs if s.idempotency_key]
        held = self._store.keys_held([(p, k) for p, k in names if k is not None])
        states = self._dependency_states(turn, batch)
        #: Ids minted for items that turned out to be earlier tasks, and whose they are.
        renamed: dict[str, str] = {}
        for sent in batch.specs:
            spec = _with_parents(sent, renamed) if renamed else sent
            known = turn.ledger.get(spec.id)
            if known is not None:
                results.append(Accepted(spec.id, known.state))
                continue
            try:
                duplicate = self._same_key(turn, held, spec) if spec.idempotency_key else None
                if duplicate is not None:
                    results.append(duplicate)
                    renamed[spec.id] = duplicate.task_id
                    # A key outlives its task: nobody may wait for one that is no longer there.
                    if turn.ledger.get(duplicate.task_id) is not None:
                        states[duplicate.task_id] = duplicate.state
                    continue
                self._check_room(tasks, stored + spec.bytes_stored)
                unmet, failed = _unmet(spec, states) if spec.depends_on else ([], None)
            except HcnaError as error:
                if batch.atomic:
                    raise
                results.append(Refused(error))
                continue
            tasks, stored = tasks + 1, stored + spec.bytes_stored
            accepted.append((spec, unmet, failed))
            states[spec.id] = TaskState.FAILED if failed else TaskState.QUEUED
            if spec.idempotency_key is not None:
                claim = KeyClaim(
                    spec.principal, spec.idempotency_key, spec.id, spec.fingerprint, turn.now
                )
                held[spec.principal, spec.idempotency_key] = claim
                claims[spec.principal, spec.idempotency_key] = claim
            results.append(Accepted(spec.id, TaskState.QUEUED))
        turn.ledger.claims.update(claims)
        #: States of those that are not simply queued.
        final: dict[str, TaskState] = {}
        for spec, unmet, failed in accepted:
            state = self._accept(turn, spec, unmet, failed)
            if state is not TaskState.QUEUED:
                final[spec.id] = state
        turn.added_tasks, turn.added_bytes = tasks - size.tasks, stored - size.bytes
        if not final:
            return results
        return [
            one._replace(state=final.get(one.task_id, one.state))
            if isinstance(one, Accepted)
            else one
            for one in results
        ]

    def _accept(
        self, turn: Turn, spec: TaskSpec, unmet: list[str], failed: str | None
    ) -> TaskState:
        self._seq += 1
        behind = False
        if spec.ordering_key is not None:
            behind = turn.ordering_busy(self._store, spec.ordering_key)
        step = accept(
            spec,
            seq=self._seq,
            at=turn.now,
            unmet=len(unmet),
            failed_dependency=failed,
            behind_key=behind,
            ageing_step_s=self._policy.ageing_step_s,
        )
        turn.ledger.add(step)
        if unmet and failed is None:
            turn.ledger.dependencies.append((spec.id, tuple(unmet)))
        return step.task.state

    def _dependency_states(self, turn: Turn, batch: SubmitBatch) -> dict[str, TaskState]:
        wanted = {parent for spec in batch.specs for parent in spec.depends_on}
        if not wanted:
            return {}
        states = self._store.task_states(wanted)
        for parent in wanted:
            if turn.ledger.is_changed(parent):
                task = turn.ledger.get(parent)
                assert task is not None
                states[parent] = task.state
        return states

    def _same_key(
        self, turn: Turn, held: dict[tuple[str, str], KeyClaim], spec: TaskSpec
    ) -> Accepted | None:
        """Return the earlier answer for a repeated idempotency key.

        Raises:
            IdempotencyConflict: the earlier request was different.
        """
        if spec.idempotency_key is None:
            return None
        name = (spec.principal, spec.idempotency_key)
        claim = turn.ledger.claims.get(name) or held.get(name)
        if claim is None:
            return None
        if claim.fingerprint != spec.fingerprint:
            raise IdempotencyConflict(spec.idempotency_key, claim.task_id)
        task = turn.ledger.get(claim.task_id)
        state = TaskState.QUEUED if task is None else task.state
        return Accepted(claim.task_id, state, True)

    def _check_room(self, tasks: int, stored: int) -> None:
        if self.disk_low:
            raise DiskFull("free disk space is below limits.disk_free_bytes_min on M1", 30)
        if tasks >= self._policy.queue_tasks_max:
            raise QueueFull(f"the queue holds its maximum of {tasks} tasks", 5)
        if stored > self._policy.queue_bytes_max:
            raise Overloaded("the queue holds its maximum of bytes", 5)

    def room(self) -> int:
        """Return how many more tasks would be accepted now, if they are small."""
        size = self._store.size()
        if self.disk_low or size.bytes >= self._policy.queue_bytes_max:
            return 0
        return max(0, self._policy.queue_tasks_max - size.tasks)

    def cancel(self, turn: Turn, request: Cancel) -> TaskState:
        """Cancel a task, or ask its worker to. Raises `NotFound`, `TaskFinished`."""
        task = turn.ledger.get(request.task_id)
        if task is None:
            raise NotFound("task", request.task_id)
        step = turn.ledger.step(task, CancelRequested(at=turn.now, reason=request.reason))
        turn.note(request.principal, "task.cancel", request.task_id, step.task.state)
        return step.task.state

    def retry(self, turn: Turn, request: Retry) -> TaskState:
        """Take a task out of the dead-letter list. Raises `NotFound`, `NotFailed`."""
        task = turn.ledger.get(request.task_id)
        if task is None:
            raise NotFound("task", request.task_id)
        state = self._replay(turn, task)
        turn.note(request.principal, "task.retry", request.task_id, state)
        return state

    def retry_many(self, turn: Turn, request: RetryMany) -> ReplayReply:
        """Replay those of the candidates that are still failed."""
        retried = []
        for task_id in request.ids:
            task = turn.ledger.get(task_id)
            if task is not None and task.state is TaskState.FAILED:
                self._replay(turn, task)
                retried.append(task_id)
        turn.note(request.principal, "task.retry_many", "", f"{len(retried)} tasks")
        return ReplayReply(retried=tuple(retried), more=request.more)

    def _replay(self, turn: Turn, task: Task) -> TaskState:
        self._aftermath.settle_before_replay(turn, task)
        key = task.spec.ordering_key
        busy = key is not None and turn.ordering_busy(self._store, key)
        replayed = turn.ledger.step(task, TaskReplayed(at=turn.now)).task
        if busy:
            held = KeyHeld(at=turn.now, hold=Hold.ORDERING)
            replayed = turn.ledger.step(replayed, held).task
        return replayed.state


def _with_parents(spec: TaskSpec, renamed: dict[str, str]) -> TaskSpec:
    """Return the spec with its parents' true ids: a repeated batch mints new ones in vain."""
    if not any(parent in renamed for parent in spec.depends_on):
        return spec
    parents = tuple(renamed.get(parent, parent) for parent in spec.depends_on)
    return dataclasses.replace(spec, depends_on=parents)


def _unmet(spec: TaskSpec, states: dict[str, TaskState]) -> tuple[list[str], str | None]:
    """Return the dependencies still open, and one that already ended without completing.

    Raises:
        Invalid: a dependency does not exist.
    """
    unmet = []
    failed = None
    for parent in dict.fromkeys(spec.depends_on):
        state = states.get(parent)
        if state is None:
            raise Invalid(
                "dependency_not_found",
                f"depends_on names {parent}, which does not exist",
                (("depends_on", f"there is no task {parent!r}"),),
            )
        if state not in TERMINAL:
            unmet.append(parent)
        elif state is not TaskState.COMPLETED:
            failed = parent
    return unmet, failed

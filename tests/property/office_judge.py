"""Watches a moderator from outside: what was asked, what it answered, what its store holds.

The rules are those of docs/GUARANTEES.md and of the checker (tests/checker), judged after every
operation on the change that it made. None of the moderator's own memory is believed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hcna_ray.core import machine, placement
from hcna_ray.core.errors import HcnaError, IdempotencyConflict, StoreUnavailable, TaskFinished
from hcna_ray.core.models import HEAVY_SLOT, TERMINAL, Hold, Task, TaskSpec, TaskState, Token
from hcna_ray.observability.figures import RAN, SUM, WAITED
from hcna_ray.runtime.clockwatch import CLOCK_STEP_S
from hcna_ray.runtime.messages import Accepted, Grant, Refused, Report, ReportKind, SubmitBatch
from hcna_ray.runtime.requests import Cancel, Request, Retry, RetryMany
from hcna_ray.store.base import Counter
from hcna_ray.store.memory import MemoryTaskStore
from tests.property.crew import Run, Worker, made_by
from tests.property.judge import SLACK, amounts
from tests.property.office import Office, Op, Told, told_shortly

#: A step of the wall clock that is larger may end attempts too early: their limits are on it.
WALL_STEP_S = 15.0
#: How long after it was let go on a worker may still receive what was sent to it before.
STALE_CALL_S = 40.0


class Misdeed(AssertionError):
    """The moderator did something that the guarantees exclude."""


@dataclass
class Kept:
    """What the judge knows of the store; goes back with it when a backup is restored."""

    tasks: dict[str, Task] = field(default_factory=dict)
    acked: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    replayed: dict[str, int] = field(default_factory=dict)
    #: ``(task, fingerprint, since)`` by ``(principal, key)``.
    keys: dict[tuple[str, str], tuple[str, str, float]] = field(default_factory=dict)
    pruned: int = 0


class Judge:
    """Looks on."""

    def __init__(self, office: Office, crew: Sequence[Worker], limits: Mapping[str, int]) -> None:
        """Begin with an empty store."""
        self.office, self.crew, self.limits = office, crew, limits
        self.kept = Kept()
        self._backup: Kept | None = None
        self._restores = 0
        #: Every token ever seen, and none is taken from it.
        self.tokens: dict[str, list[Token]] = {}
        self.facts = 0
        self._runs: dict[str, list[tuple[Worker, Run]]] = {}
        self._asked: dict[int, Request] = {}
        self._may_have_ended: set[str] = set()
        #: What the wall clock showed at most: what was too old once is gone.
        self._latest = 0.0
        #: Time that has passed as far as a moderator can know: a step of the wall clock is none,
        #: unless nobody was there to see it. And steps that no commit has followed yet.
        self._passed = self._unseen_s = 0.0
        self._looked = office.clock.elapsed()
        #: When tasks ended and began to wait, in that time.
        self._ended: dict[str, float] = {}
        self._queued: dict[str, float] = {}

    def must(self, held: bool, promise: str, what: object) -> None:
        """Stop unless ``held``."""
        if not held:
            raise Misdeed(f"{promise}: {told_shortly(what)}")

    def known(self) -> list[str]:
        """Return the tasks that clients know and the store has."""
        return [task_id for task_id in self.kept.tasks if task_id in self.kept.acked]

    def _stored(self) -> dict[str, Task]:
        store = self.office.store
        assert isinstance(store, MemoryTaskStore)
        return dict(store._tasks.now)

    # -- one operation ---------------------------------------------------------------------------

    def before(self, op: Op) -> None:
        """Note what is about to be asked."""
        self._asked.update(op.requests)
        if op.first == "backup":
            self._backup = copy.deepcopy(self.kept)
        if op.first == "restore":
            self._restores += 1
            for one in self.crew:
                self.excuse(one)
            if self._backup is not None:
                # What was accepted since is gone, and everybody is told so.
                self.kept = copy.deepcopy(self._backup)
        if abs(op.wall_s) > WALL_STEP_S:
            for one in self.crew:
                self.excuse(one)

    def after(self, op: Op, told: Told) -> None:
        """Judge what the operation changed and what was answered."""
        now = self.office.clock.now()
        self._latest = max(self._latest, now)
        self._let_pass(op)
        stored = self._stored()
        self.facts = told.last_fact or self.facts
        reports = [
            report for _, request in op.requests for report in getattr(request, "reports", ())
        ]
        replayed = self._replayed(op)
        before = self.kept.tasks
        if op.first != "restore":
            self._compare(op, before, stored, reports, replayed, now)
        else:
            for task in stored.values():
                self._issue(task.id, task)
        if op.first == "restore":  # When it all was is not known any more.
            self._ended.clear()
            self._queued.clear()
        for task in stored.values():
            if task.id not in before or before[task.id] is not task:
                if op.first != "restore":
                    self._note_times(before.get(task.id), task)
                wrong = machine.violations(task)
                self.must(not wrong, "invariant", (wrong, task))
        self.kept.tasks = stored
        self._check_all(stored)
        self._may_have_ended = replayed
        for number, answer in told.answers:
            request = self._asked.pop(number, None)
            if request is not None:
                self._judge_answer(request, answer, stored)
        missing = [id_ for id_ in self.kept.acked if id_ not in stored]
        self.must(not missing, "C1 acknowledged is stored", missing)

    def _let_pass(self, op: Op) -> None:
        elapsed = self.office.clock.elapsed()
        self._passed += elapsed - self._looked
        self._looked = elapsed
        self._unseen_s += op.wall_s
        if op.first not in ("", "backup") or abs(self._unseen_s) < CLOCK_STEP_S:
            self._passed += self._unseen_s
        elif op.refused:
            # Followed only if there was nothing to commit; in doubt more time has passed.
            self._unseen_s = max(0.0, self._unseen_s)
            return
        self._unseen_s = 0.0

    def _note_times(self, old: Task | None, task: Task) -> None:
        """Note when a task ended or began to wait; judge one that has waited for too long."""
        if task.terminal:
            self._ended[task.id] = self._passed
        elif (
            old is None
            or old.state is not task.state
            or (old.lease is not None and old.queued_at != task.queued_at)
        ):
            self._queued[task.id] = self._passed
        limit = task.spec.queue_timeout_s
        gave_up = task.error is not None and task.error.message.startswith("waited ")
        if gave_up and limit is not None and task.id in self._queued and task.terminal:
            waited = self._passed - self._queued[task.id]
            self.must(waited > limit - 0.01, "nothing gives up before its time", (waited, task))

    def _replayed(self, op: Op) -> set[str]:
        found: set[str] = set()
        for _, request in op.requests:
            if isinstance(request, Retry):
                found.add(request.task_id)
            elif isinstance(request, RetryMany):
                found.update(request.ids)
        return found

    def _compare(
        self,
        op: Op,
        before: Mapping[str, Task],
        stored: Mapping[str, Task],
        reports: Sequence[Report],
        replayed: set[str],
        now: float,
    ) -> None:
        specs = {
            spec.id: spec
            for _, request in op.requests
            if isinstance(request, SubmitBatch)
            for spec in request.specs
        }
        for _, request in op.requests:
            if isinstance(request, Cancel):
                self.kept.cancelled.add(request.task_id)
        for task_id, task in stored.items():
            old = before.get(task_id)
            if old is None:
                self._judge_new(task, specs, now)
            elif old is not task:
                self._judge_change(old, task, reports, replayed, now)
        if op.refused and any(before.get(id_) is not task for id_, task in stored.items()):
            self.must(False, "C1 nothing of a refused commit is stored", op)
        for task_id, old in before.items():
            if task_id not in stored:
                age = self._latest - (old.finished_at or now)
                kept = self.office.policy.retention_s
                self.must(old.terminal and age > kept, "only old ended tasks are pruned", old)
                age = self._passed - self._ended.get(task_id, -kept)
                self.must(age > kept - 0.01, "a clock that was put makes nothing old", (age, old))
                self.kept.pruned += 1
                self.kept.acked.discard(task_id)
                # Whoever sends it once more, so long afterwards, has sent something new.
                self.tokens.pop(task_id, None)
                self._runs.pop(task_id, None)

    def _judge_new(self, task: Task, specs: Mapping[str, TaskSpec], now: float) -> None:
        self.must(task.id in specs, "C2 nothing is invented", task)
        spec, sent = task.spec, specs[task.id]
        same = spec.payload == sent.payload and spec.queue == sent.queue
        self.must(same and spec.needs == sent.needs, "C2 what was sent is stored", task)
        if spec.idempotency_key is not None:
            name = (spec.principal, spec.idempotency_key)
            held = self.kept.keys.get(name)
            if held is not None:
                policy = self.office.policy
                age = self._latest - held[2]
                over = held[0] not in self.kept.tasks and age > policy.idempotency_s
                self.must(over, "C3 one key, one task", (held, task))
            self.kept.keys[name] = (task.id, spec.fingerprint, now)
        self._issue(task.id, task)
        self._judge_grant(None, task)

    def _judge_change(
        self, old: Task, task: Task, reports: Sequence[Report], replayed: set[str], now: float
    ) -> None:
        self.must(task.version == old.version + 1, "one version a commit", (old, task))
        if old.terminal:
            may = old.state is TaskState.FAILED and task.id in replayed
            self.must(may, "C5 a finished task never moves", (old, task))
            self.kept.replayed[task.id] = self.kept.replayed.get(task.id, 0) + 1
            self._issue(task.id, task)
            self._judge_grant(None, task)
            return
        self.must(task.attempt >= old.attempt, "C6 attempts only grow", (old, task))
        live = None if old.lease is None else old.lease.token
        if task.state is TaskState.COMPLETED:
            sent = any(
                report.result == task.result and Token(*report.token) == live
                for report in reports
                if report.task_id == task.id
            )
            mine = live is not None and made_by(task.result or b"", task.id, live)
            self.must(sent and mine, "C5 the result of the lease in force", (old, task))
        if task.state is TaskState.CANCELLED:
            self.must(task.id in self.kept.cancelled, "G7 somebody cancelled it", task)
        if task.state is TaskState.EXPIRED:
            at = task.spec.expires_at
            self.must(at is not None and at <= now, "expired when its time had passed", task)
        if task.state is TaskState.RUNNING:
            assert task.lease is not None
            self.must(task.lease.token == live, "only what was granted before runs", (old, task))
        self.must(0 <= task.losses - old.losses <= 1, "C11 one loss at a time", (old, task))
        self.must(0 <= task.failures - old.failures <= 1, "C11 one failure at a time", (old, task))
        if task.lease is not None and task.lease.token != live:
            self._issue(task.id, task)
            began = any(
                Token(*report.token) == live and report.kind != ReportKind.RETURNED
                for report in reports
                if report.task_id == task.id
            )
            # An attempt that began on the worker for which it waited ended its waiting.
            self._judge_grant(None if began else old, task)

    def _issue(self, task_id: str, task: Task) -> None:
        if task.lease is None:
            return
        issued, token = self.tokens.setdefault(task_id, []), task.lease.token
        if issued and issued[-1] == token and self._restores:
            return
        self.must(not issued or issued[-1] < token, "C6 tokens strictly increase", task)
        issued.append(token)

    def _judge_grant(self, old: Task | None, task: Task) -> None:
        """Judge who was given a new lease."""
        lease, spec = task.lease, task.spec
        if lease is None:
            return
        store = self.office.store
        record = {one.name: one for one in store.workers()}.get(lease.worker)
        self.must(record is not None, "a lease goes to a worker on record", task)
        assert record is not None
        fit = not record.cordoned and record.draining_until is None and record.left_at is None
        self.must(fit and record.asleep_at is None, "a lease goes to who takes work", record)
        self.must(spec.needs.worker in (None, lease.worker), "C9 pinned to its worker", task)
        if old is not None and old.pinned_to is not None and old.pinned_until is not None:
            waits = old.pinned_until > self.office.clock.now()
            self.must(not waits or old.pinned_to == lease.worker, "it waits for its worker", task)
        self.must(spec.queue not in store.paused(), "a paused queue hands out nothing", task)
        self.must(spec.task_type in record.task_types, "it knows the task's type", task)
        now = self.office.clock.now()
        at = spec.expires_at
        self.must(at is None or at > now, "C8 nothing starts after its expiry", task)

    def _check_all(self, stored: Mapping[str, Task]) -> None:
        """Check what must hold at every instant, over all tasks."""
        store = self.office.store
        live_of_key: dict[str, int] = {}
        out_of_key: dict[str, list[Task]] = {}
        used: dict[tuple[str, str], float] = {}
        open_tasks = open_bytes = 0
        wake: float | None = None
        for task in stored.values():
            at = task.wake_at
            if at is not None and (wake is None or at < wake):
                wake = at
            if task.state in TERMINAL:
                continue
            spec, lease = task.spec, task.lease
            open_tasks += 1
            open_bytes += spec.bytes_stored
            if spec.ordering_key is not None and not task.hold & Hold.ORDERING:
                out_of_key.setdefault(spec.ordering_key, []).append(task)
            if lease is None:
                continue
            if spec.concurrency_key is not None:
                live_of_key[spec.concurrency_key] = live_of_key.get(spec.concurrency_key, 0) + 1
            if lease.slot == HEAVY_SLOT:
                for name, amount in amounts(spec.needs).items():
                    used[lease.worker, name] = used.get((lease.worker, name), 0.0) + amount
        for key, out in out_of_key.items():
            self.must(len(out) <= 1, "C9 one task out of an ordering key's line", out)
            first = min(
                (
                    task.seq
                    for task in stored.values()
                    if task.spec.ordering_key == key
                    and not task.terminal
                    and task.id not in self.kept.replayed
                ),
                default=0,
            )
            ahead = out[0].seq <= first or out[0].id in self.kept.replayed
            self.must(ahead, "C9 accept order of an ordering key", (out, first))
        for key, live in live_of_key.items():
            self.must(live <= self.limits.get(key, 1), "concurrency limit", (key, live))
        records = {one.name: one for one in store.workers()}
        for (worker, name), amount in used.items():
            if worker in records:
                has = float(getattr(records[worker], name, 0.0))
                self.must(amount <= has + SLACK, "capacity", (worker, name, amount))
        size = store.size()
        self.must((size.tasks, size.bytes) == (open_tasks, open_bytes), "C11 size", size)
        self.must(store.next_wake() == wake, "the next timer", (store.next_wake(), wake))
        replays = sum(self.kept.replayed.values())
        room = self.office.policy.queue_tasks_max + replays
        self.must(open_tasks <= room, "C10 the queue's bound", open_tasks)

    def _judge_answer(self, request: Request, answer: object, stored: Mapping[str, Task]) -> None:
        if isinstance(request, SubmitBatch) and isinstance(answer, list):
            self.must(len(answer) == len(request.specs), "an answer for each", answer)
            for spec, one in zip(request.specs, answer, strict=True):
                self._judge_submitted(spec, one, stored)
        elif isinstance(answer, HcnaError) and isinstance(request, Cancel):
            task = stored.get(request.task_id)
            # In one batch it may have been refused first, and its task replayed then.
            over = task is None or task.terminal or not isinstance(answer, TaskFinished)
            over |= request.task_id in self._may_have_ended
            self.must(over, "G7 only an ended task refuses a cancel", (request, task))
        elif isinstance(answer, Grant):
            for offer in answer.offers:
                known = Token(*offer.token) in self.tokens.get(offer.task_id, ())
                self.must(known, "nothing leaves before its commit", offer)
        elif isinstance(answer, BaseException) and not isinstance(answer, HcnaError):
            self.must(False, "trouble travels as what it is", answer)

    def _judge_submitted(self, spec: TaskSpec, answer: object, stored: Mapping[str, Task]) -> None:
        if isinstance(answer, Refused):
            self.must(not isinstance(answer.error, StoreUnavailable), "one answer", answer)
            if isinstance(answer.error, IdempotencyConflict):
                held = self.kept.keys.get((spec.principal, spec.idempotency_key or ""))
                other = held is not None and held[1] != spec.fingerprint
                self.must(other, "C3 refused although it is the same", (spec, held))
            return
        assert isinstance(answer, Accepted)
        gone = self.office.policy.retention_s < 1000.0
        if answer.task_id not in stored and (gone or self._restores):
            return  # A key outlives its task.
        self.must(answer.task_id in stored, "C1 acknowledged is stored", answer)
        if spec.idempotency_key is not None and answer.task_id != spec.id:
            held = self.kept.keys.get((spec.principal, spec.idempotency_key))
            same = held is not None and held[:2] == (answer.task_id, spec.fingerprint)
            self.must(same, "C3 the same key and request, the same task", (spec, held))
        else:
            self.must(answer.task_id == spec.id, "C3 its own task", (spec, answer))
        self.kept.acked.add(answer.task_id)

    # -- what really runs ------------------------------------------------------------------------

    def excuse(self, worker: Worker) -> None:
        """From now on what a worker runs may overlap: no lease can exclude it."""
        for member in worker.members:
            for run in member.runs.values():
                run.excused = True
        worker.excused_until = worker.elapsed + STALE_CALL_S

    def started(self, worker: Worker, run: Run) -> None:
        """C7: a task's process starts: no other of it may be alive."""
        task_id, token = run.key
        run.excused |= token.generation < self.office.store.generation()
        run.excused |= run.granted_at <= worker.excused_until
        alive = [
            (other, that)
            for other, that in self._runs.get(task_id, ())
            if that.running and that is not run
        ]
        for other, that in alive:
            free = run.excused or that.excused
            self.must(
                free,
                "C7 one task runs in two places",
                f"{task_id} on {other.name} as {that.key[1]} since {that.started_at} and on "
                f"{worker.name} as {token} at {worker.elapsed}",
            )
        self._runs[task_id] = [*alive, (worker, run)]

    # -- the end ---------------------------------------------------------------------------------

    def _stuck(self) -> list[str]:
        """Return what is wrong with the tasks that have not ended."""
        office = self.office
        views = office.moderator._workforce.views(office.clock.elapsed())
        wrong = []
        stored = self._stored()
        waits = {id_ for id_, task in stored.items() if not task.terminal}
        for task in stored.values():
            if task.terminal:
                continue
            if task.unmet:
                if not waits & set(task.spec.depends_on):
                    wrong.append(f"C4 {task.id} waits for nobody")
            elif task.hold & Hold.ORDERING:
                key = task.spec.ordering_key
                out = [
                    one
                    for one in stored.values()
                    if one.spec.ordering_key == key and not one.terminal and not one.hold
                ]
                if not out:
                    wrong.append(f"C4 {task.id} waits behind nobody")
            elif task.lease is not None or not task.ready:
                wrong.append(f"C4 {task.id} does not stand in the index: {told_shortly(task)}")
            else:
                reason = placement.explain(task.needs, task.spec.task_type, views)
                if reason.code not in ("unplaceable", "waiting_worker"):
                    wrong.append(f"C4 {task.id} waits without a reason: {reason}")
        return wrong

    def at_rest(self) -> bool:
        """Whether whatever has not ended waits for a true reason."""
        return not self._stuck()

    def finish(self) -> None:
        """C4, C11: the last look."""
        wrong = self._stuck()
        self.must(not wrong, "C4 every task ends", wrong)
        if self._restores or self.kept.pruned:
            return
        store = self.office.store
        assert isinstance(store, MemoryTaskStore)
        reader = store.reader()
        counted: dict[Counter, int] = {}

        def count(name: str, task_type: str, label: str) -> None:
            counter = Counter(name, task_type, label)
            counted[counter] = counted.get(counter, 0) + 1

        for task in self._stored().values():
            count("accepted", task.spec.task_type, task.spec.queue)
            for attempt in reader.attempts(task.id):
                self.must(attempt.outcome is not None or not task.terminal, "open attempt", attempt)
                if attempt.outcome is not None:
                    count("attempts", task.spec.task_type, attempt.outcome.value)
            for stored in reader.facts(after=0, limit=1 << 30, task_id=task.id):
                if stored.fact.kind in {state.value for state in TERMINAL}:
                    count("ended", task.spec.task_type, stored.fact.kind)
        stored = reader.counters()
        plain = {one: value for one, value in stored.items() if one.name not in (WAITED, RAN)}
        self.must(counted == plain, "C11 counters", (counted, plain))
        ran: dict[str, int] = {}
        ends: dict[str, int] = {}
        for one, value in stored.items():
            if one.name == RAN and one.label != SUM:
                ran[one.task_type] = ran.get(one.task_type, 0) + value
            elif one.name == "attempts":
                ends[one.task_type] = ends.get(one.task_type, 0) + value
        self.must(ran == ends, "C11 counters", (ran, ends))

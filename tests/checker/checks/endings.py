"""C4 and C5: how tasks end, and what is true of those that have not."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.checker.findings import Outcome
from tests.checker.inputs import TERMINAL, Dump, Effect, Fact, Op, Run, TaskRow, Token

#: How long after its instant a due task may still stand as scheduled.
DUE_S = 5.0

#: Codes of ``pending_reason``, by what must be true for them.
REASONS: dict[str, frozenset[str]] = {
    "dependencies": frozenset({"waiting_dependencies"}),
    "not_due": frozenset({"scheduled", "backoff", "due"}),
    "ordering": frozenset({"ordering_key"}),
    "concurrency": frozenset({"concurrency_key"}),
    "paused": frozenset({"queue_paused"}),
    "worker": frozenset(
        {
            "waiting_worker",
            "waiting_worker_return",
            "no_workers",
            "no_healthy_workers",
            "unplaceable",
        }
    ),
}


def ended_or_waiting(run: Run) -> Outcome:
    """C4: after the drain every task has ended, or waits for something that is really so.

    Only a run that says when it was drained (``drained_at``) can be judged. Whether a worker could
    take a queued task is judged from ``workers_online`` and what the dump says of those workers.
    """
    out = Outcome("C4")
    dump, schedule = run.dump, run.schedule
    assert dump is not None
    assert schedule is not None
    if schedule.get("drained_at") is None:
        out.missing = "the schedule names no drained_at: the run was not drained"
        return out
    waiting = _Waiting(run, dump)
    for row in dump.tasks.values():
        out.examined += 1
        if row.state in TERMINAL:
            continue
        reasons = waiting.true_reasons(row)
        if not reasons:
            out.report(row.id, f"{row.state} after the drain, with nothing in its way", row)
        elif "unknown" not in reasons:
            _check_told(run, out, row, reasons)
    out.note(waiting.blind, "queued tasks could not be judged: workers_online is not given")
    return out


def _check_told(run: Run, out: Outcome, row: TaskRow, reasons: set[str]) -> None:
    """The reason that clients were told after the drain is one of the true ones."""
    drained = float((run.schedule or {})["drained_at"])
    allowed = {code for reason in reasons for code in REASONS[reason]}
    for op in run.history or ():
        told = op.body.get("pending_reason") if op.op == "get" and op.id == row.id else None
        if not op.ok or op.t0 < drained or not isinstance(told, dict):
            continue
        if told.get("code") not in allowed:
            words = " or ".join(sorted(reasons))
            out.report(row.id, f"waits for {words}, but says {told.get('code')!r}", op, row)


class _Waiting:
    """Works out, from the final dump alone, what holds a task back."""

    def __init__(self, run: Run, dump: Dump) -> None:
        self._dump = dump
        online = (run.schedule or {}).get("workers_online")
        self._online = None if online is None else set(online)
        self._workers = [row.raw for row in dump.rows["worker"]]
        self._paused = {row.raw["queue"] for row in dump.rows["paused"]}
        self._limits = run.setting("concurrency_limits", {})
        self._limit = run.setting("concurrency_default", 1)
        self._ordering: dict[str, list[TaskRow]] = defaultdict(list)
        self._live: dict[str, int] = defaultdict(int)
        for row in dump.tasks.values():
            if row.state in TERMINAL:
                continue
            if row.get("ordering_key"):
                self._ordering[row.get("ordering_key")].append(row)
            if row.get("concurrency_key") and row.get("lease"):
                self._live[row.get("concurrency_key")] += 1
        self.blind = 0

    def true_reasons(self, row: TaskRow) -> set[str]:
        if row.get("lease") or row.state == "running":
            return set()
        found: set[str] = set()
        if row.state == "scheduled":
            if self._waits_for_parents(row):
                found.add("dependencies")
            elif float(row.get("due_at", 0.0)) > self._dump.taken_at - DUE_S:
                found.add("not_due")
            return found
        if any(one.id != row.id for one in self._ordering.get(row.get("ordering_key", ""), ())):
            found.add("ordering")
        key = row.get("concurrency_key")
        if key and self._live[key] >= int(self._limits.get(key, self._limit)):
            found.add("concurrency")
        if row.get("queue") in self._paused:
            found.add("paused")
        able = self._somebody_could(row)
        if able is None:
            self.blind += 1
            found.add("unknown")
        elif not able:
            found.add("worker")
        return found

    def _waits_for_parents(self, row: TaskRow) -> bool:
        parents = [self._dump.tasks.get(one) for one in row.get("depends_on", [])]
        open_ones = [one for one in parents if one is not None and one.state not in TERMINAL]
        return bool(row.get("unmet", 0)) and bool(open_ones)

    def _somebody_could(self, row: TaskRow) -> bool | None:
        if self._online is None:
            return None
        here = [one for one in self._workers if one["name"] in self._online]
        return any(could_run(row, worker) for worker in here)


def could_run(row: TaskRow, worker: dict[str, Any]) -> bool:
    """Whether a worker meets a task's needs, as far as names, types, sizes and labels go."""
    needs = row.needs
    names = (worker["name"], worker.get("node_id"))
    if needs.get("worker") and needs["worker"] not in names:
        return False
    pinned = row.get("pinned_to")
    if pinned and pinned not in names:
        return False
    types = worker.get("task_types")
    if types is not None and row.get("task_type") not in types:
        return False
    for name in ("cpu", "mem_gb", "gpu"):
        if float(needs.get(name) or 0.0) > float(worker.get(name) or 0.0):
            return False
    has, labels = worker.get("resources") or {}, worker.get("labels") or {}
    if any(float(amount) > float(has.get(one, 0.0)) for one, amount in needs.get("resources", [])):
        return False
    return all(labels.get(name) == value for name, value in needs.get("labels", []))


def one_end_one_result(run: Run) -> Outcome:
    """C5: a task ends once; what it ended with is what its attempt returned, and never changes.

    A failed task that is replayed begins anew. Results are compared by hash: of every GET after the
    end, of the final dump, and of the line that the winning attempt itself wrote at its end.
    """
    out = Outcome("C5")
    dump = run.dump
    assert dump is not None
    ends: dict[tuple[str, Token], Effect] = {}
    starts: set[tuple[str, Token]] = set()
    for effect in run.effects or ():
        if effect.what == "end":
            ends[effect.task, effect.token] = effect
        else:
            starts.add((effect.task, effect.token))
    witnessed = set((run.schedule or {}).get("effects_task_types", []))
    gets = _terminal_gets(run)
    unwitnessed = 0
    for task in sorted(dump.tasks.keys() | run.facts_by_task.keys()):
        row, facts = dump.tasks.get(task), run.facts_by_task.get(task, [])
        out.examined += 1
        final = _check_ends(out, task, row, facts)
        _check_answers(run, out, task, row, facts, gets.get(task, []))
        if row is None or row.state != "completed" or final is None or final.token is None:
            continue
        if run.effects is None or row.get("task_type") not in witnessed:
            unwitnessed += 1
            continue
        end = ends.get((task, final.token))
        if end is None:
            which = "ended" if (task, final.token) in starts else "ran"
            out.report(task, f"completed under a token under which nothing {which}", final, row)
        elif end.result_hash and row.get("result_hash") not in (None, end.result_hash):
            out.report(task, "the stored result is not what the attempt returned", end, row)
    out.note(unwitnessed, "completed tasks are of types that write no side-effect lines")
    return out


def _check_ends(out: Outcome, task: str, row: TaskRow | None, facts: list[Fact]) -> Fact | None:
    """One end in each life, nothing after it; return the end of the last life."""
    final: Fact | None = None
    for fact in facts:
        if final is not None:
            if fact.kind == "replayed" and final.state == "failed":
                final = None
                continue
            word = "a second end" if fact.kind in TERMINAL else f"{fact.kind!r} after its end"
            out.report(task, word, final, fact)
        if fact.kind in TERMINAL:
            final = fact
    if row is None or not facts:
        return final
    if row.state in TERMINAL and final is None:
        out.report(task, f"is {row.state}, and its log has no end", row, facts[-1])
    elif final is not None and row.state != final.state:
        out.report(task, f"is {row.state}, its log says {final.state}", row, final)
    if row.state == "completed" and row.raw.get("result_hash") is None:
        out.report(task, "completed without a result", row)
    if row.state != "completed" and row.raw.get("result_hash") is not None:
        out.report(task, f"{row.state} with a result", row)
    return final


def _terminal_gets(run: Run) -> dict[str, list[Op]]:
    found: dict[str, list[Op]] = defaultdict(list)
    for op in run.history or ():
        if op.op == "get" and op.ok and op.id and op.body.get("status") in TERMINAL:
            found[op.id].append(op)
    return found


def _check_answers(
    run: Run,
    out: Outcome,
    task: str,
    row: TaskRow | None,
    facts: list[Fact],
    gets: list[Op],
) -> None:
    """Everybody who saw the end saw the same one."""
    replayed = any(fact.kind == "replayed" for fact in facts)
    if any(one.at >= op.t0 for one in run.restores() for op in gets):
        return  # What was seen before a restore may have been taken back by it.
    first: Op | None = None
    for op in gets:
        seen = (op.body.get("status"), op.body.get("result_hash"))
        if replayed and seen[0] == "failed":
            continue  # The end of an earlier life.
        if first is None:
            first = op
        told = (first.body.get("status"), first.body.get("result_hash"))
        if seen != told:
            out.report(task, f"was told to be {told}, then {seen}", first, op)
    if first is None or row is None:
        return
    if first.body.get("status") != row.state and not (replayed and row.state not in TERMINAL):
        out.report(task, f"told as {first.body['status']}, stored as {row.state}", first, row)
    hashes = (first.body.get("result_hash"), row.get("result_hash"))
    if row.state == "completed" and None not in hashes and hashes[0] != hashes[1]:
        out.report(task, "the result told is not the one stored", first, row)

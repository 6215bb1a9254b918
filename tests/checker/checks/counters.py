"""C11: totals, attempts and limits equal what the transition log implies."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

from tests.checker.checks.leases import CLOSING
from tests.checker.findings import Outcome, Record
from tests.checker.inputs import TERMINAL, AttemptRow, Dump, Fact, Run, TaskRow, Token

#: How an attempt may have ended, by the line that closed its lease; ``None`` is no attempt at all.
_OUTCOMES: dict[str, frozenset[str | None]] = {
    "completed": frozenset({"completed"}),
    "retry_scheduled": frozenset({"errored", "timed_out"}),
    "lost": frozenset({"lost"}),
    "failed": frozenset({"errored", "timed_out", "lost"}),
    "cancelled": frozenset({"cancelled", "errored", "timed_out", "lost", None}),
    "returned": frozenset({None}),
}
_FAILED = frozenset({"errored", "timed_out"})
#: What the schedule calls it when a worker is told to stop what it runs.
ORDERS = frozenset({"stop", "drain", "forget"})
#: How long such an order takes to be carried out, unless the schedule says until when.
ORDER_S = 30.0


def counters_equal_the_log(run: Run) -> Outcome:
    """C11: see this module. Of a pruned store counters may only be larger than its log."""
    out = Outcome("C11")
    dump = run.dump
    assert dump is not None
    rows: dict[str, dict[Token, AttemptRow]] = defaultdict(dict)
    for attempt in dump.attempts:
        rows[attempt.task][attempt.token] = attempt
    for task in sorted(dump.tasks.keys() | run.facts_by_task.keys() | rows.keys()):
        facts = run.facts_by_task.get(task, [])
        if not facts and task in dump.tasks:
            continue  # A task without a log: C14 tells.
        out.examined += 1
        _attempts(out, task, facts, rows.get(task, {}))
        if task in dump.tasks and facts:
            _own_counts(run, out, dump.tasks[task], facts, rows.get(task, {}))
    _totals(run, dump, out)
    _depth(run, dump, out)
    _limit(run, dump, out)
    return out


def _attempts(out: Outcome, task: str, facts: list[Fact], rows: dict[Token, AttemptRow]) -> None:
    """Each attempt that started or ended has one row, which says what the log says."""
    granted: dict[Token, Fact] = {}
    started: dict[Token, Fact] = {}
    closed: dict[Token, Fact] = {}
    for fact in facts:
        if fact.token is None:
            continue
        kinds = {"granted": granted, "started": started}
        if fact.kind in kinds:
            kinds[fact.kind].setdefault(fact.token, fact)
        elif fact.kind in CLOSING:
            closed.setdefault(fact.token, fact)
    for token, row in rows.items():
        if token not in granted:
            out.report(task, f"an attempt {token} that was never granted", row)
        elif row.worker != granted[token].worker:
            out.report(task, f"attempt {token} is another worker's", granted[token], row)
    for token, end in closed.items():
        attempt = rows.get(token)
        outcome = None if attempt is None else attempt.outcome
        allowed = _OUTCOMES.get(end.kind, frozenset({None}))
        if outcome not in allowed or (attempt is not None and outcome is None):
            out.report(task, f"{end.kind!r}, but attempt {token} is {outcome}", end, attempt)
    for token, start in started.items():
        if token not in rows:
            out.report(task, f"started under {token}, and there is no such attempt", start)
        elif token not in closed and rows[token].outcome is not None:
            out.report(task, f"attempt {token} ended, the log says nothing", start, rows[token])


def _own_counts(
    run: Run, out: Outcome, row: TaskRow, facts: list[Fact], rows: dict[Token, AttemptRow]
) -> None:
    """Failures, losses and the attempt number, counted anew in each life.

    A loss that somebody ordered is held against no task; which those were the schedule tells.
    What a restore takes back is no loss that counts.
    """
    since = max((fact.number for fact in facts if fact.kind == "replayed"), default=0)
    grants = [fact for fact in facts if fact.kind == "granted" and fact.token]
    mine = {fact.token for fact in grants if fact.number > since}
    mine -= _taken_back(run, facts)
    outcomes = Counter(attempt.outcome for token, attempt in rows.items() if token in mine)
    ordered = sum(1 for fact in facts if fact.number > since and _was_ordered(run, fact))
    counted = {
        "failures": _only(sum(outcomes[one] for one in _FAILED)),
        "losses": range(max(0, outcomes["lost"] - ordered), outcomes["lost"] + 1),
        "attempt": _only(grants[-1].token[1] if grants and grants[-1].token else 0),
    }
    for name, values in counted.items():
        if row.raw.get(name) is not None and row.raw[name] not in values:
            told = " or ".join(map(str, values))
            out.report(row.id, f"{name} is {row.raw[name]}, the log says {told}", row)
    for name, limit in (("failures", "max_attempts"), ("losses", "max_losses")):
        allowed = row.get(limit)
        if allowed is not None and counted[name][0] > int(allowed):
            out.report(row.id, f"{counted[name][0]} {name}, {limit} is {allowed}", row)


def _only(value: int) -> range:
    return range(value, value + 1)


def _was_ordered(run: Run, fact: Fact) -> bool:
    """Whether a lease ended because somebody stopped its worker in good order, or by a restore."""
    if fact.kind not in ("lost", "failed", "cancelled"):
        return False
    return any(
        one.kind == "restore" or (one.kind in ORDERS and one.target in ("all", fact.worker))
        for one in run.faults
        if one.at - run.clock_error_s <= fact.at <= (one.until or one.at + ORDER_S)
    )


def _taken_back(run: Run, facts: list[Fact]) -> set[Token | None]:
    """Return the tokens of leases that a restore ended: between the backup and its own end.

    Where the restore tells the last line of the log that was in the backup, that line decides: a
    backup takes its time, and what ends meanwhile may still be in it.
    """
    return {
        fact.token
        for fact in facts
        for one in run.restores()
        if fact.kind in CLOSING
        and fact.at <= one.at
        and fact.number > int(one.raw.get("last_fact") or 0)
        and fact.at >= float(one.raw.get("backup_at", one.at))
    }


def _totals(run: Run, dump: Dump, out: Outcome) -> None:
    """Counters that survive restarts."""
    wanted: Counter[tuple[str, str, str]] = Counter()
    types = {row.id: str(row.get("task_type")) for row in dump.tasks.values()}
    for fact in dump.facts:
        if fact.task not in types:
            continue
        row = dump.tasks[fact.task]
        if fact.kind == "accepted":
            wanted["accepted", types[fact.task], str(row.get("queue"))] += 1
        elif fact.kind in TERMINAL:
            wanted["ended", types[fact.task], fact.kind] += 1
    for attempt in dump.attempts:
        if attempt.outcome is not None and attempt.task in types:
            wanted["attempts", types[attempt.task], attempt.outcome] += 1
    stored = {
        (row.raw["name"], row.raw["task_type"], row.raw["label"]): row
        for row in dump.rows["counter"]
    }
    if not stored and dump.facts:
        out.notes.append("the dump holds no counters")
        return
    pruned = is_pruned(run)
    for name in sorted(wanted.keys() | stored.keys()):
        if name[0] not in ("accepted", "ended", "attempts"):
            continue
        out.examined += 1
        found: Record | None = stored.get(name)
        value = int(stored[name].raw["value"]) if name in stored else 0
        if value != wanted[name] and (not pruned or value < wanted[name]):
            out.report(None, f"counter {name} is {value}, the log says {wanted[name]}", found)


def is_pruned(run: Run) -> bool:
    """Whether tasks are gone from the store that may be: the run outlasted their retention."""
    dump = run.dump
    assert dump is not None
    retention = run.setting("retention_s", None)
    if retention is None or dump.numbers.get("last_seq", 0) <= len(dump.tasks):
        return False
    started = float((run.schedule or {}).get("started_at", -math.inf))
    return dump.taken_at - started >= float(retention)


def _depth(run: Run, dump: Dump, out: Outcome) -> None:
    """How many tasks stand where, and how much is open."""
    depth = Counter((str(row.get("queue")), row.state) for row in dump.tasks.values())
    for told in dump.rows["depth"]:
        out.examined += 1
        where = (str(told.raw["queue"]), str(told.raw["state"]))
        if int(told.raw["tasks"]) != depth.pop(where, 0):
            out.report(None, f"depth of {where} is not the number of such tasks", told)
    if dump.rows["depth"]:
        for where, count in depth.items():
            out.report(None, f"{count} tasks are {where}, which depth does not know")
    still = [row for row in dump.tasks.values() if row.state not in TERMINAL]
    totals = {
        "open_tasks": len(still),
        "open_bytes": sum(int(row.get("bytes", 0)) for row in still),
    }
    numbers = {row.raw["name"]: row for row in dump.rows["number"]}
    for name, value in totals.items():
        if name in numbers and int(numbers[name].raw["value"]) != value:
            out.report(None, f"{name} should be {value}", numbers[name])
    ends = [row for row in dump.tasks.values() if row.get("end_no") is not None]
    if len({row.get("end_no") for row in ends}) != len(ends):
        out.report(None, "two tasks share an end number")
    told_ends = dump.numbers.get("last_end")
    counted = _ends_shown(run)
    if told_ends is not None and told_ends != counted and not (is_pruned(run) or run.restores()):
        out.report(None, f"{counted} tasks ended", numbers["last_end"])


def _ends_shown(run: Run) -> int:
    """Return how many ends some commit showed: of a round that also replayed the task, the last."""
    shown = 0
    for facts in run.facts_by_task.values():
        ended = False
        for _, group in itertools.groupby(facts, key=lambda fact: fact.at):
            ends = False
            for fact in group:
                ends |= fact.kind in TERMINAL
                ended = fact.kind in TERMINAL or (ended and fact.kind != "replayed")
            shown += ended and ends
    return shown


def _limit(run: Run, dump: Dump, out: Outcome) -> None:
    """The queue never held more than its limit when it took one more.

    A replay is let in whatever the limit, and one of the same round is not counted yet.
    """
    limit = run.setting("queue_tasks_max", None)
    if limit is None:
        return
    waiting = just_replayed = 0
    at = -math.inf
    for fact in dump.facts:
        if fact.kind != "started" and fact.at != at:
            at, just_replayed = fact.at, 0
        if fact.kind == "accepted":
            waiting += 1
            out.examined += 1
            if waiting - just_replayed > int(limit):
                out.report(fact.task, f"accepted as number {waiting} of {limit}", fact)
        elif fact.kind == "replayed":
            waiting, just_replayed = waiting + 1, just_replayed + 1
        elif fact.kind in TERMINAL:
            waiting -= 1

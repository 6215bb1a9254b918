"""C12: each task by itself behaves as if every request took effect at one instant.

The log of a task is a sequence of states; it must be a life that `tests.checker.model` allows. Then
a search after Wing and Gong looks for an order of all requests about the task, together with the
lines of its log, in which

* what returned before something else was called comes before it;
* each request is answered as the state of that moment demands;
* each acceptance, cancel and replay in the log coincides with a request for it.

A line of the log took effect between the instant it carries (its decision) and the first instant of
a later round (the next decision starts only after the commit). Requests without an answer may have
taken effect at any time after their call, or never.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.checker.checks.leases import CLOSING
from tests.checker.findings import Outcome, Record
from tests.checker.inputs import TERMINAL, Dump, Fact, Op, Run, Token
from tests.checker.model import ABSENT, Illegal, Life, after, needs_request

#: States a search may visit before it gives up and says so.
STATES_MAX = 200_000


@dataclass(frozen=True, slots=True)
class Span:
    """When something took effect: not before ``low``, not after ``high``."""

    low: float
    high: float


def linearizable(run: Run) -> Outcome:
    """C12: see this module."""
    out = Outcome("C12")
    dump = run.dump
    assert dump is not None
    assert run.history is not None
    spans = commit_spans(dump.facts, run.clock_error_s)
    ops = _ops_by_task(run, dump)
    replays = any(op.op == "retry_many" for op in run.history)
    undone = gave_up = 0
    for task in sorted(run.facts_by_task.keys() | ops.keys()):
        facts = run.facts_by_task.get(task, [])
        mine = ops.get(task, [])
        if not facts:
            _without_log(run, dump, out, task, mine)
            continue
        out.examined += 1
        lives = _replay(out, task, facts)
        if lives is None:
            continue
        doubtful = [op for op in mine if _around_restore(run, op)]
        undone += len(doubtful)
        kept = [op for op in mine if op not in doubtful]
        # Nobody knows whether what it did is among what came back.
        kept += [replace(op, t1=None, status=None, body={}) for op in doubtful if op.op != "get"]
        search = Search(
            facts[: len(lives) - 1],
            lives,
            [spans[fact.number] for fact in facts],
            kept,
            free_replays=replays,
        )
        found = search.run()
        if found is None:
            gave_up += 1
        elif not found:
            message, proof = search.explain()
            out.report(task, message, *proof)
    out.note(
        undone, "requests fell between a backup and its restore: they may have had effect or not"
    )
    out.note(gave_up, f"tasks need more than {STATES_MAX} states: the search gave up")
    if math.isinf(run.clock_error_s):
        out.notes.append("clocks were stepped: no instants of the log were compared with clients'")
    return out


def commit_spans(facts: Sequence[Fact], error_s: float) -> dict[int, Span]:
    """Return when each line was committed, by its number.

    A round's lines carry its instant, but for ``started``, which carries the worker's. A round is
    committed before the next one is decided.
    """
    spans: dict[int, Span] = {}
    rounds = [fact.at for fact in facts if fact.kind != "started"]
    distinct: list[float] = []
    for at in rounds:
        if not distinct or at > distinct[-1]:
            distinct.append(at)
    following = {at: distinct[i + 1] for i, at in enumerate(distinct[:-1])}
    last = -math.inf
    for index, fact in enumerate(facts):
        if fact.kind == "started":
            # Its round is that of a neighbour, or one between: two rounds on, it is committed.
            own = next((f.at for f in facts[index + 1 : index + 50] if f.kind != "started"), None)
            limit = math.inf if own is None else following.get(own, math.inf)
            low = fact.at
        else:
            limit, low = following.get(fact.at, math.inf), fact.at
        last = max(last, min(low, limit))
        spans[fact.number] = Span(last - error_s, limit + error_s)
    return spans


def _ops_by_task(run: Run, dump: Dump) -> dict[str, list[Op]]:
    """Return the requests about each task; those without an answer by their key or nonce."""
    by_key = {
        (str(row.get("principal", "")), row.get("key")): row.id
        for row in dump.tasks.values()
        if row.get("key")
    }
    by_nonce = {row.get("nonce"): row.id for row in dump.tasks.values() if row.get("nonce")}
    found: dict[str, list[Op]] = defaultdict(list)
    for op in run.history or ():
        task = op.id
        if op.op == "submit" and not op.ok:
            if not op.unknown:
                continue
            task = by_key.get((op.principal, op.key)) or by_nonce.get(op.nonce) or op.id
        if task is not None and op.op != "retry_many":
            found[task].append(op)
    return dict(found)


def _without_log(run: Run, dump: Dump, out: Outcome, task: str, ops: list[Op]) -> None:
    """A task without a log was never seen, unless others must tell why it has none."""
    acked = any(op.op == "submit" and op.ok for op in ops)
    if acked or task in dump.tasks or run.restores() or run.setting("retention_s", None):
        return
    for op in ops:
        out.examined += 1
        if op.ok and op.op in ("get", "cancel", "retry"):
            out.report(task, "a task was seen that was never accepted", op)


def _around_restore(run: Run, op: Op) -> bool:
    error = run.clock_error_s
    return any(
        op.t0 <= one.at + error and op.returned >= float(one.raw.get("backup_at", one.at)) - error
        for one in run.restores()
    )


def _replay(out: Outcome, task: str, facts: Sequence[Fact]) -> list[Life] | None:
    """Return the state before the first line and after each; ``None`` if the log is no life."""
    lives = [Life()]
    for fact in facts:
        if lives[-1].ended and fact.kind != "replayed":
            break  # C5 tells.
        try:
            lives.append(after(lives[-1], fact))
        except Illegal as why:
            out.report(task, str(why), *facts[max(0, len(lives) - 2) : len(lives)])
            return None
    return lives


class Search:
    """Wing and Gong's search, over a log that is in order already and requests that are not."""

    def __init__(
        self,
        facts: Sequence[Fact],
        lives: Sequence[Life],
        spans: Sequence[Span],
        ops: Sequence[Op],
        *,
        free_replays: bool = False,
    ) -> None:
        """Prepare.

        Args:
            facts: The task's log.
            lives: The state before the first line, and after each.
            spans: When each line took effect.
            ops: Requests about the task.
            free_replays: Replays by filter were asked for, which name no task.
        """
        self._facts, self._lives, self._spans = facts, lives, spans
        self._ops = [op for op in ops if _says_something(op)]
        self._free_replays = free_replays
        self._submitted = any(op.op == "submit" for op in self._ops)
        self._furthest: tuple[int, int, frozenset[int]] = (-1, 0, frozenset())

    def run(self) -> bool | None:
        """Return whether there is an order; ``None`` when it was not found within bounds."""
        start = (0, frozenset(range(len(self._ops))))
        stack, seen = [start], {start}
        while stack:
            position, left = stack.pop()
            left = self._read_all(position, left)
            done = position + len(self._ops) - len(left)
            if done > self._furthest[0]:
                self._furthest = (done, position, left)
            if position == len(self._facts) and all(self._optional(self._ops[i]) for i in left):
                return True
            for state in self._moves(position, left):
                if state not in seen:
                    seen.add(state)
                    stack.append(state)
            if len(seen) > STATES_MAX:
                return None
        return False

    def _limit(self, position: int, left: frozenset[int]) -> float:
        """Return the instant by which the next step must have happened."""
        limit = min((self._deadline(self._ops[i]) for i in left), default=math.inf)
        if position < len(self._facts):
            limit = min(limit, self._spans[position].high)
        return limit

    def _read_all(self, position: int, left: frozenset[int]) -> frozenset[int]:
        """Take every read that fits here: taking it at once never spoils what comes later."""
        while True:
            limit = self._limit(position, left)
            now = [
                i
                for i in left
                if self._ops[i].t0 <= limit and self._is_plain_read(self._ops[i], position)
            ]
            if not now:
                return left
            left = left - frozenset(now)

    def _moves(self, position: int, left: frozenset[int]) -> list[tuple[int, frozenset[int]]]:
        limit = self._limit(position, left)
        found = []
        for i in left:
            op = self._ops[i]
            if op.t0 <= limit and self._answers_here(op, position):
                found.append((position, left - {i}))
        if position == len(self._facts):
            return found
        fact, low = self._facts[position], self._spans[position].low
        wanted = needs_request(self._lives[position], fact)
        if low <= limit:
            if self._by_itself(wanted):
                found.append((position + 1, left))
            for i in left:
                op = self._ops[i]
                if op.t0 <= limit and self._causes(op, wanted, fact):
                    found.append((position + 1, left - {i}))
        return found

    def _by_itself(self, wanted: str | None) -> bool:
        if wanted == "submit":
            return not self._submitted  # Whose task this is, C2 asks.
        return wanted is None or (wanted == "retry" and self._free_replays)

    # -- what an answer demands --------------------------------------------------------------------

    @staticmethod
    def _optional(op: Op) -> bool:
        """Whether a request may never have taken effect."""
        return op.unknown or (op.op != "submit" and op.status == 503)

    def _deadline(self, op: Op) -> float:
        """Return when it must have taken effect: without a true answer, never."""
        return math.inf if self._optional(op) else op.returned

    def _is_plain_read(self, op: Op, position: int) -> bool:
        """Whether it could have read this state, and can have caused nothing."""
        life = self._lives[position]
        if op.stale:
            return True
        if op.status == 404:
            return life.phase == ABSENT
        if op.op == "get":
            asked = op.body.get("cancel_requested")
            return (
                op.ok
                and life.phase != ABSENT
                and op.body.get("status", life.phase) == life.phase
                and (asked is None or asked == life.cancel)
            )
        if op.status == 409:
            return {
                "cancel": life.ended,
                "retry": life.phase not in ("failed", ABSENT),
                "complete": life.lease != op.token,
            }.get(op.op, True)
        return False

    def _answers_here(self, op: Op, position: int) -> bool:
        """Whether it may have found its work done by somebody else."""
        life = self._lives[position]
        if not op.ok:
            return False
        match op.op:
            case "submit":
                return op.key is not None and life.phase != ABSENT
            case "cancel":
                return op.status == 202 and life.cancel and life.lease is not None
            case "complete":
                return _closed_by(self._facts[:position], op.token)
            case _:
                return False

    def _causes(self, op: Op, wanted: str | None, fact: Fact) -> bool:
        """Whether a request may be what a line of the log tells of."""
        if op.op == "complete":
            return (
                (op.ok or op.unknown)
                and fact.kind in CLOSING
                and fact.kind != "returned"
                and fact.token == op.token
            )
        if op.op != wanted or not (op.ok or self._optional(op)):
            return False
        if op.op == "cancel" and op.ok:
            return (op.status == 200) == (fact.kind == "cancelled")
        return True

    def explain(self) -> tuple[str, list[Record]]:
        """Say where the furthest attempt got stuck, and show what stood against each other."""
        _, position, left = self._furthest
        stuck = sorted(
            (self._ops[i] for i in left if not self._optional(self._ops[i])),
            key=lambda op: op.returned,
        )
        around: list[Record] = list(self._facts[max(0, position - 1) : position + 1])
        if not stuck:
            fact = self._facts[position]
            wanted = needs_request(self._lives[position], fact)
            return f"{fact.kind!r}, and nobody asked for it ({wanted})", around
        op = stuck[0]
        said = op.body.get("status") if op.op == "get" and op.ok else op.status
        phase = self._lives[position].phase
        return f"no order explains that {op.op} was answered {said!r} (by then {phase})", [
            op,
            *around,
        ]


def _says_something(op: Op) -> bool:
    """Whether an answer says anything about the state of the task."""
    if op.op == "get":
        return op.ok or op.status == 404
    if op.op == "submit":
        return op.ok or op.unknown
    return op.ok or op.unknown or op.status in (404, 409, 503)


def _closed_by(facts: Sequence[Fact], token: Token | None) -> bool:
    return any(fact.token == token and fact.kind in CLOSING | TERMINAL for fact in facts)

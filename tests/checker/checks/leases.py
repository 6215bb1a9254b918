"""C6, C7, C7b, C8: tokens, leases, and what really ran under them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tests.checker.findings import Outcome
from tests.checker.inputs import TERMINAL, Dump, Effect, Fact, Run, Token

#: Lines that end the lease they name.
CLOSING = frozenset({"returned", "lost", "retry_scheduled", *TERMINAL})
#: The worker's own stop: 20 s without a confirmed renewal, then 5 s to SIGKILL.
SELF_STOP_S = 25.0
#: Faults that keep a process from running, without ending it.
PAUSES = frozenset({"pause", "suspend", "freeze"})
#: Faults after which a report that was under way may never have been delivered.
DEATHS = frozenset({"kill", "reboot", "power_loss", "partition"})


@dataclass(frozen=True, slots=True)
class Tenure:
    """One lease: from its grant to the line that ended it, if any did."""

    task: str
    token: Token
    granted: Fact
    ended: Fact | None


def tenures(dump: Dump) -> Iterator[Tenure]:
    """Yield every lease in the log, each with the first line that closed its token."""
    open_ones: dict[tuple[str, Token], Fact] = {}
    for fact in dump.facts:
        if fact.token is None:
            continue
        name = (fact.task, fact.token)
        if fact.kind == "granted":
            open_ones.setdefault(name, fact)
        elif fact.kind in CLOSING and name in open_ones:
            yield Tenure(fact.task, fact.token, open_ones.pop(name), fact)
    for (task, token), granted in open_ones.items():
        yield Tenure(task, token, granted, None)


def tokens_rise(run: Run) -> Outcome:
    """C6: tokens of a task strictly rise, also over restores; none is used twice, or unissued.

    Used means: a process started under it. A token granted before a restore and again, differently,
    after it was reissued.
    """
    out = Outcome("C6")
    dump = run.dump
    assert dump is not None
    grants: dict[tuple[str, Token], Fact] = {}
    newest: dict[str, Fact] = {}
    generation: Fact | None = None
    for fact in dump.facts:
        if fact.kind != "granted" or fact.token is None:
            continue
        out.examined += 1
        last = newest.get(fact.task)
        if last is not None and last.token is not None and fact.token <= last.token:
            out.report(fact.task, f"token {fact.token} was granted after {last.token}", last, fact)
        if generation is not None and generation.token and fact.token[0] < generation.token[0]:
            out.report(fact.task, "a generation came back", generation, fact)
        newest[fact.task] = fact
        grants[fact.task, fact.token] = fact
        if generation is None or generation.token is None or fact.token > generation.token:
            generation = fact
    for earlier in run.earlier:
        for fact in earlier.facts:
            if fact.kind != "granted" or fact.token is None:
                continue
            out.examined += 1
            again = grants.get((fact.task, fact.token))
            if again is not None and (again.number, again.at) != (fact.number, fact.at):
                out.report(fact.task, f"token {fact.token} was issued again", fact, again)
            grants.setdefault((fact.task, fact.token), fact)
    _check_use(run, out, grants)
    return out


def _check_use(run: Run, out: Outcome, grants: dict[tuple[str, Token], Fact]) -> None:
    if run.effects is None:
        out.notes.append("no side-effect log: under which tokens processes ran was not checked")
        return
    assert run.dump is not None
    starts: dict[tuple[str, Token], Effect] = {}
    running: set[tuple[str, Token]] = set()
    unknown = 0
    for effect in run.effects:
        name = (effect.task, effect.token)
        out.examined += 1
        if effect.what == "end":
            if name not in starts:
                out.report(effect.task, f"an end under {effect.token} without a start", effect)
            elif name not in running:
                out.report(effect.task, f"a second end under {effect.token}", effect)
            running.discard(name)
            continue
        if name in starts:
            out.report(effect.task, f"{effect.token} was started twice", starts[name], effect)
        starts.setdefault(name, effect)
        running.add(name)
        grant = grants.get(name)
        if grant is None:
            if effect.task not in run.facts_by_task or run.restores():
                unknown += 1  # A task nobody stored is C2's to tell.
            else:
                out.report(effect.task, f"started under {effect.token}, never granted", effect)
        elif effect.t_wall < grant.at - run.clock_error_s:
            out.report(effect.task, "started before its token was granted", effect, grant)
    witnessed = set((run.schedule or {}).get("effects_task_types", []))
    for attempt in run.dump.attempts:
        row = run.dump.tasks.get(attempt.task)
        if row is None or row.get("task_type") not in witnessed or attempt.outcome != "errored":
            continue  # What was lost or stopped may have ended before its first line.
        if (attempt.task, attempt.token) not in starts:
            out.report(attempt.task, f"failed under {attempt.token}, and never started", attempt)
    out.note(unknown, "starts are of tasks whose log is gone: their tokens were not checked")


def one_lease(run: Run) -> Outcome:
    """C7: in the order of commits, a task is never granted while a lease of it is in force."""
    out = Outcome("C7")
    dump = run.dump
    assert dump is not None
    held: dict[str, Fact] = {}
    for fact in dump.facts:
        if fact.kind == "granted":
            out.examined += 1
            if fact.task in held:
                out.report(fact.task, "granted while a lease was in force", held[fact.task], fact)
            held[fact.task] = fact
        elif fact.kind in CLOSING and fact.task in held:
            if fact.token not in (None, held[fact.task].token):
                continue  # The late end of a lease that had been taken over.
            del held[fact.task]
    for row in dump.tasks.values():
        lease, log = row.get("lease"), held.get(row.id)
        if row.id not in run.facts_by_task:
            continue
        told = None if lease is None else tuple(lease)
        known = None if log is None else log.token
        if told != known:
            out.report(row.id, f"holds the lease {told}, its log says {known}", row, log)
    return out


def overlaps_are_refused(run: Run) -> Outcome:
    """C7b: two executions of a task at once are allowed; then one's report was refused or equal.

    An overlap is proven only by an end written after the other's start, so an execution that was
    killed proves none. Of a proven one the report of the older attempt must be on record as refused
    (a ``late`` record or a 409 to its completion), or have the stored result's hash, unless its
    machine was killed or cut off after that end, before it can be known to have reported.
    """
    out = Outcome("C7b")
    dump = run.dump
    assert dump is not None
    assert run.effects is not None
    executions: dict[str, dict[Token, list[Effect | None]]] = defaultdict(dict)
    for effect in run.effects:
        pair = executions[effect.task].setdefault(effect.token, [None, None])
        index = 0 if effect.what == "start" else 1
        pair[index] = pair[index] or effect
    refused = {
        (row.raw["task"], (row.raw["gen"], row.raw["attempt"])): row for row in dump.rows["late"]
    }
    told = {
        (op.id, op.token) for op in run.history or () if op.op == "complete" and op.status == 409
    }
    excused = 0
    for task, pairs in executions.items():
        tokens = sorted(pairs)
        for older, newer in itertools.pairwise(tokens):
            end, start = pairs[older][1], pairs[newer][0]
            out.examined += 1
            if end is None or start is None or not _after(end, start, run.clock_error_s):
                continue
            if (task, older) in refused or (task, older) in told:
                continue
            row = dump.tasks.get(task)
            if row is not None and end.result_hash and end.result_hash == row.get("result_hash"):
                continue
            if any(f.kind in DEATHS and _struck(f.target, end) for f in run.faults):
                excused += 1
                continue
            out.report(task, f"{older} still ran under {newer}, and was never refused", start, end)
    out.note(excused, "overlaps ended on a machine that was struck: their reports may be lost")
    return out


def _struck(target: str, effect: Effect) -> bool:
    return target in ("", "all", effect.node, effect.boot_id)


def _after(one: Effect, other: Effect, error_s: float) -> bool:
    """Whether ``one`` surely came after ``other``."""
    if one.boot_id == other.boot_id:
        return one.t_mono > other.t_mono
    return one.t_wall > other.t_wall + error_s


def nothing_starts_late(run: Run) -> Outcome:
    """C8: no process starts more than 25 s after the store ended the task or took its lease back.

    Time for which the schedule says that the worker stood still does not count: a process that is
    stopped between its last look and its first line knows nothing of the time that passed. The
    instant in the log is that of the decision, which is earlier than the commit by one fsync; a
    disk that is made to stall longer than the clock error must be a fault of kind ``stall``.
    """
    out = Outcome("C8")
    dump = run.dump
    assert dump is not None
    assert run.effects is not None
    bound = float(run.setting("self_stop_bound_s", SELF_STOP_S))
    closed = {(one.task, one.token): one.ended for one in tenures(dump) if one.ended is not None}
    for effect in run.effects:
        if effect.what != "start":
            continue
        out.examined += 1
        ended = closed.get((effect.task, effect.token))
        if ended is None:
            continue  # In force to the end; or no token of the log, which C6 tells.
        excuse = sum(
            max(0.0, min(f.until or effect.t_wall, effect.t_wall) - max(f.at, ended.at))
            for f in run.faults
            if f.kind in PAUSES | {"stall"} and _struck(f.target, effect)
        )
        late = effect.t_wall - ended.at - excuse
        if late > bound + run.clock_error_s:
            out.report(
                effect.task, f"started {late:.1f} s after the store had ended it", ended, effect
            )
    return out

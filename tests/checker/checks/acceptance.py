"""C1, C2, C3, C10: between what clients were told and what is stored."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from tests.checker.findings import Outcome
from tests.checker.inputs import TRY_LATER, Dump, Op, Run, TaskRow

RETRY_AFTER_S = (1.0, 3600.0)


def _dump(run: Run) -> Dump:
    assert run.dump is not None
    return run.dump


def _keyed(run: Run) -> dict[tuple[str, str], list[TaskRow]]:
    """Return stored tasks by principal and idempotency key."""
    found: dict[tuple[str, str], list[TaskRow]] = defaultdict(list)
    for row in _dump(run).tasks.values():
        if row.get("key"):
            found[str(row.get("principal", "")), str(row.get("key"))].append(row)
    return found


def acked_is_stored(run: Run) -> Outcome:
    """C1: every task that was answered with success is in the final dump, as it was sent.

    It may be missing only where the run itself says so: pruned after its retention, or accepted
    between a backup and the restore that went back to it.
    """
    out = Outcome("C1")
    dump = _dump(run)
    forgotten = pruned = unmarked = 0
    seen: set[str] = set()
    for op in run.submits():
        if not op.ok or op.id is None:
            continue
        row = dump.tasks.get(op.id)
        if op.id in seen and row is None:
            continue
        seen.add(op.id)
        out.examined += 1
        if row is None:
            if _undone_by_restore(run, op):
                forgotten += 1
            elif _prunable(run, op.id):
                pruned += 1
            else:
                out.report(op.id, f"acknowledged with {op.status} and not stored", op)
            continue
        if op.nonce is None or row.get("nonce") is None:
            unmarked += 1
        elif row.get("nonce") != op.nonce and not _same_request_elsewhere(run, op):
            out.report(op.id, "stored, but not what was sent", op, row)
    out.note(forgotten, "acknowledged after a backup, and gone with the restore")
    out.note(pruned, "acknowledged, seen ended, and pruned after their retention")
    out.note(unmarked, "carry no nonce: seen to be stored, not to say what was sent")
    return out


def _same_request_elsewhere(run: Run, op: Op) -> bool:
    """Whether a repeated key led to the first request's task, which has the first one's nonce."""
    return op.key is not None and any(
        other.key == op.key and other.principal == op.principal and other is not op
        for other in run.submits()
    )


def _undone_by_restore(run: Run, op: Op) -> bool:
    error = run.clock_error_s
    return any(
        op.returned >= float(one.raw.get("backup_at", one.at)) - error and op.t0 <= one.at
        for one in run.restores()
    )


def _prunable(run: Run, task: str) -> bool:
    """Whether somebody saw the task ended long enough ago for it to have been pruned."""
    retention = run.setting("retention_s", None)
    if retention is None:
        return False
    limit = _dump(run).taken_at - float(retention)
    return any(
        op.op == "get" and op.id == task and op.body.get("status") in _ENDED and op.t0 <= limit
        for op in run.history or ()
    )


_ENDED = ("completed", "failed", "cancelled", "expired")


def stored_was_submitted(run: Run) -> Outcome:
    """C2: everything stored, and everything that ran, goes back to somebody's request.

    A task that nobody was told of must belong to a request without a known answer: by its key, by
    its nonce, or, where requests carry neither, one task for each such request sent in time.
    """
    out = Outcome("C2")
    dump = _dump(run)
    foreign = set((run.schedule or {}).get("foreign_principals", []))
    acked = {op.id for op in run.submits() if op.ok}
    open_ops = [op for op in run.submits() if op.unknown]
    by_key = {(op.principal, op.key) for op in open_ops if op.key}
    by_nonce = {op.nonce for op in open_ops if op.nonce}
    anonymous = sorted(op.t0 for op in open_ops if not op.key and not op.nonce)
    guessed: list[TaskRow] = []
    for row in dump.tasks.values():
        if row.get("principal") in foreign:
            continue
        out.examined += 1
        known = (
            row.id in acked
            or (row.get("key") and (row.get("principal", ""), row.get("key")) in by_key)
            or (row.get("nonce") and row.get("nonce") in by_nonce)
        )
        if not known:
            guessed.append(row)
    # Requests without a mark: match each task, by its time, with an earlier request.
    guessed.sort(key=lambda row: float(row.get("accepted_at", math.inf)))
    left = 0
    taken = 0
    for row in guessed:
        accepted = float(row.get("accepted_at", math.inf)) + run.clock_error_s
        while taken < len(anonymous) and anonymous[taken] <= accepted:
            taken, left = taken + 1, left + 1
        if left:
            left -= 1
        else:
            out.report(row.id, "stored, and nobody submitted it", row)
    out.note(
        len(guessed) - sum(1 for one in out.violations),
        "belong to requests without answer, key and nonce: matched by number and time only",
    )
    _check_effects(run, out)
    return out


def _check_effects(run: Run, out: Outcome) -> None:
    """What ran is a stored task, with the content that was stored."""
    if run.effects is None:
        out.notes.append("no side-effect log: that nothing else ran was not checked")
        return
    dump = _dump(run)
    known = set(dump.tasks) | set(run.facts_by_task)
    known |= {task for one in run.earlier for task in one.tasks}
    unexplained: set[str] = set()
    for effect in run.effects:
        out.examined += 1
        if effect.task not in known:
            if effect.task not in unexplained and not _told_of(run, effect.task):
                out.report(effect.task, "ran, and is stored nowhere", effect)
            unexplained.add(effect.task)
            continue
        row = dump.tasks.get(effect.task)
        if row is not None and effect.nonce and row.get("nonce", effect.nonce) != effect.nonce:
            out.report(effect.task, "what ran is not what is stored", effect, row)


def _told_of(run: Run, task: str) -> bool:
    """Whether a client was told of the task: then that it is gone is C1's to say."""
    return any(op.id == task and op.ok for op in run.submits())


def one_key_one_task(run: Run) -> Outcome:
    """C3: a key of a principal leads to one task, whoever asks how often; and one task has one key.

    Keys are expected to be used within their time (7 days). The same key with another body must be
    refused; clients write their bodies in one canonical form, so that hashes can be compared.
    """
    out = Outcome("C3")
    acked: dict[tuple[str, str], list[Op]] = defaultdict(list)
    owners: dict[str, list[Op]] = defaultdict(list)
    for op in run.submits():
        if not op.ok or op.id is None:
            continue
        owners[op.id].append(op)
        if op.key is not None:
            acked[op.principal, op.key].append(op)
    stored = _keyed(run)
    table = {
        (str(row.raw["principal"]), str(row.raw["key"])): row for row in _dump(run).rows["key"]
    }
    for name in sorted(acked.keys() | stored.keys() | table.keys()):
        out.examined += 1
        ops, rows = acked.get(name, []), stored.get(name, [])
        ids = {op.id for op in ops}
        if len(ids) > 1:
            two = list({op.id: op for op in ops}.values())
            out.report(ops[0].id, f"key {name[1]!r} was answered with {len(ids)} tasks", *two[:3])
        elif len(rows) > 1:
            out.report(rows[0].id, f"key {name[1]!r} has {len(rows)} tasks", *rows[:3])
        elif ops and rows and rows[0].id not in ids:
            out.report(ops[0].id, f"key {name[1]!r} is stored for another task", ops[0], rows[0])
        held = table.get(name)
        if held is not None and rows and held.raw["task"] not in {row.id for row in rows}:
            out.report(rows[0].id, f"key {name[1]!r} is bound to another task", held, rows[0])
        bodies = {op.body_hash: op for op in ops if op.body_hash}
        if len(bodies) > 1:
            shown = list(bodies.values())[:2]
            out.report(ops[0].id, f"key {name[1]!r} was accepted for two bodies", *shown)
    sent: dict[tuple[str, str], list[Op]] = defaultdict(list)
    for op in run.submits():
        if op.key is not None:
            sent[op.principal, op.key].append(op)
    for ops in sent.values():
        for op in ops:
            hashes = {other.body_hash for other in ops if other is not op}
            if op.status == 409 and op.body_hash and not hashes - {op.body_hash}:
                out.report(op.id, f"key {op.key!r} is refused to the only one who used it", op)
    for task, ops in owners.items():
        names = {(op.principal, op.key) if op.key else ("", op.where) for op in ops}
        if len(names) > 1:
            out.report(task, "one task was the answer to different requests", *ops[:3])
    return out


def refused_is_absent(run: Run) -> Outcome:
    """C10: what was refused is not stored; 429, 503 and 507 say when to come again.

    Absence is seen by key or nonce; a refused request with neither cannot be looked for.
    """
    out = Outcome("C10")
    dump = _dump(run)
    stored, nonces = _keyed(run), defaultdict(list)
    for row in dump.tasks.values():
        if row.get("nonce"):
            nonces[row.get("nonce")].append(row)
    other = Counter((op.principal, op.key) for op in run.submits() if op.key and not op.refused)
    sent = Counter(op.nonce for op in run.submits() if op.nonce and not op.refused)
    blind = 0
    for op in run.history or ():
        if op.status in TRY_LATER:
            low, high = RETRY_AFTER_S
            if op.retry_after is None or not low <= op.retry_after <= high:
                out.report(op.id, f"{op.status} without a Retry-After of {low:g} to {high:g} s", op)
        if not op.refused:
            continue
        out.examined += 1
        if op.op != "submit":
            continue
        if op.key and other[op.principal, op.key] == 0:
            found = stored.get((op.principal, op.key), [])
        elif op.nonce and sent[op.nonce] == 0:
            found = nonces.get(op.nonce, [])
        else:
            found = []
            blind += not op.key and not op.nonce
        if op.id is not None and op.id in dump.tasks and op.status != 409:
            found = [dump.tasks[op.id]]
        if found:
            out.report(found[0].id, f"refused with {op.status}, and stored", op, found[0])
    out.note(blind, "refused requests carry neither key nor nonce: they cannot be looked for")
    return out

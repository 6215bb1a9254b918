"""A system on paper: every word of a story leaves the lines that a working system would leave."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checker.inputs import DUMP_FORMAT, SCHEDULE_FORMAT, TERMINAL

T0 = 1_000_000.0
CANARY = "hcna_live_4f9a-secret-of-the-owner"
Line = dict[str, Any]
Story = Callable[["World"], None]

_CLOSING = {"returned", "lost", "retry_scheduled", *TERMINAL}


class World:
    """Clients, a store and workers. One second passes with each thing that happens.

    Attributes:
        history, effects, facts, samples: Lines as they will be written; stories may change them.
        rows: Overrides of fields in the final rows of tasks; ``None`` removes the row.
        extra: Further records of the dump.
        raw: Lines to add to a file as they are.
        edits: Called with all records of the dump just before they are written.
    """

    def __init__(self) -> None:
        self.now = T0
        self.history: list[Line] = []
        self.effects: list[Line] = []
        self.facts: list[Line] = []
        self.samples: list[Line] = []
        self.rows: dict[str, dict[str, Any] | None] = defaultdict(dict)
        self.extra: list[Line] = []
        self.raw: dict[str, str] = defaultdict(str)
        self.edits: list[Callable[[list[Line]], None]] = []
        self.earlier: list[list[Line]] = []
        self.schedule: dict[str, Any] = {
            "format": SCHEDULE_FORMAT,
            "seed": 1,
            "commit": "by hand",
            "clock_error_s": 0.01,
            "settings": {"ageing_step_s": 60.0, "concurrency_default": 1},
            "workers_online": ["W1", "W2"],
            "effects_task_types": ["echo", "other"],
            "faults": [],
            "measured": [{"name": "the story", "from": T0, "to": T0, "max_s": 1}],
            "canaries": [CANARY],
        }
        self.workers: list[Line] = [
            {"record": "worker", "name": name, "node_id": f"node-{name}", "cpu": 4.0}
            | {"task_types": ["echo", "other"], "labels": {}, "resources": {}}
            for name in ("W1", "W2")
        ]
        self.specs: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, tuple[int, int]] = {}
        self.nodes: dict[str, str] = {}
        self.generation = 1
        self.outcomes: dict[tuple[str, tuple[int, int]], str | None] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self._number = 0
        self._calls = 0
        #: Number and hash of the last line of the audit log.
        self.audited = (0, "0" * 64)

    # -- time and lines ----------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def fact(self, task: str, kind: str, state: str, *, token: bool = False, **more: Any) -> Line:
        """Add a line to the store's log."""
        self.now += 1.0
        self._number += 1
        held = self.tokens[task] if token else (None, None)
        line: Line = {"record": "fact", "number": self._number, "task": task, "kind": kind}
        line |= {"at": self.now, "state": state, "gen": held[0], "attempt": held[1]}
        line |= {"worker": self.nodes.get(task) if token else None, **more}
        self.facts.append(line)
        return line

    def call(self, op: str, **asked: Any) -> int:
        """Write that a request goes out; return its number."""
        self.now += 1.0
        self._calls += 1
        line: Line = {"event": "call", "client": "c", "n": self._calls, "op": op}
        self.history.append({**line, "principal": "owner", "t0": self.now, **asked})
        return self._calls

    def answer(self, number: int, status: int, **told: Any) -> None:
        """Write what it was answered."""
        self.now += 1.0
        line: Line = {"event": "return", "client": "c", "n": number}
        self.history.append({**line, "t1": self.now, "status": status, **told})

    # -- clients -----------------------------------------------------------------------------------

    def submit(self, task: str, *, key: str | None = None, **spec: Any) -> int:
        """Submit a task, and have it accepted."""
        number = self.call("submit", **self.mark(task, key))
        self.accept(task, key=key, **spec)
        self.answer(number, 202, id=task)
        return number

    def mark(self, task: str, key: str | None = None) -> Line:
        """Return what tells one request from another."""
        asked: Line = {"nonce": f"nonce-{task}", "body_hash": f"body-{task}"}
        return asked if key is None else {**asked, "key": key}

    def accept(self, task: str, *, key: str | None = None, **spec: Any) -> None:
        """Have the store accept a task."""
        waits = spec.get("run_at") is not None or spec.get("depends_on")
        self.specs[task] = {"key": key, "nonce": f"nonce-{task}", **spec}
        if key is not None:
            self.keys["owner", key] = task
        self.fact(task, "accepted", "scheduled" if waits else "queued")

    def refuse(self, task: str, status: int = 503, *, key: str | None = None, **told: Any) -> None:
        """Submit a task, and have it refused."""
        number = self.call("submit", **self.mark(task, key))
        if status in (429, 503, 507):
            told.setdefault("retry_after", 5)
        self.answer(number, status, **told)

    def get(self, task: str, status: str | None = None, **body: Any) -> None:
        """GET a task, and see it as it stands (or as ``status`` says)."""
        number = self.call("get", id=task)
        seen = status or self.state(task)
        if seen == "completed":
            body.setdefault("result_hash", f"result-{task}")
        self.answer(number, 200, id=task, body={"status": seen, **body})

    def cancel(self, task: str) -> None:
        """Cancel a task: at once if nobody holds it, else as a request."""
        number = self.call("cancel", id=task)
        if self.held(task):
            self.fact(task, "cancel_requested", self.state(task), token=True)
            self.answer(number, 202, id=task)
        else:
            self.fact(task, "cancelled", "cancelled")
            self.answer(number, 200, id=task)

    def replay(self, task: str) -> None:
        """Take a failed task back."""
        number = self.call("retry", id=task)
        self.fact(task, "replayed", "queued")
        self.answer(number, 202, id=task)

    # -- the moderator and its workers -------------------------------------------------------------

    def queue(self, task: str) -> None:
        """Let a scheduled task become due."""
        self.fact(task, "queued", "queued")

    def grant(self, task: str, worker: str = "W1") -> Line:
        """Lease a task to a worker."""
        attempt = self.tokens.get(task, (0, 0))[1] + 1
        self.tokens[task], self.nodes[task] = (self.generation, attempt), worker
        return self.fact(task, "granted", "queued", token=True)

    def start(self, task: str) -> None:
        """Have the attempt's process start."""
        self.effect(task, "start", nonce=f"nonce-{task}")
        self.fact(task, "started", "running", token=True)
        self.outcomes[task, self.tokens[task]] = None

    def effect(
        self, task: str, what: str, token: tuple[int, int] | None = None, **more: Any
    ) -> Line:
        """Write a line as the running task does."""
        self.now += 0.1
        gen, attempt = token or self.tokens[task]
        node = self.nodes.get(task, "W1")
        line: Line = {"what": what, "task": task, "gen": gen, "attempt": attempt, "node": node}
        line |= {"boot_id": f"boot-{node}", "pid": 100, "t_mono": self.now - T0, **more}
        line["t_wall"] = self.now
        self.effects.append(line)
        return line

    def complete(self, task: str) -> None:
        """Have the attempt return its result."""
        self.effect(task, "end", result_hash=f"result-{task}")
        self._close(task, "completed", "completed", "completed")

    def run(self, task: str, worker: str = "W1") -> None:
        """Grant, start, complete."""
        self.grant(task, worker)
        self.start(task)
        self.complete(task)

    def fail(self, task: str, *, again: bool = False) -> None:
        """Have the attempt fail; ``again`` schedules the next one."""
        kind, state = ("retry_scheduled", "scheduled") if again else ("failed", "failed")
        self._close(task, kind, state, "errored")
        if again:
            place = {"due_at": self.now + 1.0, "dispatch_key": self.now + 1.0 - 300.0}
            self.override(task, **place)

    def lose(self, task: str) -> None:
        """Have the attempt be lost with its worker."""
        self._close(task, "lost", "queued", "lost")

    def give_back(self, task: str) -> None:
        """Have a lease come back unused."""
        self.fact(task, "returned", "queued", token=True)

    def confirm_cancel(self, task: str) -> None:
        """Have the worker say that it stopped the attempt."""
        self._close(task, "cancelled", "cancelled", "cancelled")

    def expire(self, task: str) -> None:
        """Let the task's time pass."""
        self.fact(task, "expired", "expired")

    def _close(self, task: str, kind: str, state: str, outcome: str) -> None:
        self.fact(task, kind, state, token=True)
        self.outcomes[task, self.tokens[task]] = outcome

    def override(self, task: str, **fields: Any) -> None:
        """Say what the final row of a task holds."""
        row = self.rows[task]
        assert row is not None
        row.update(fields)

    def fault(self, kind: str, target: str, **more: Any) -> Line:
        """Do something to the system."""
        self.now += 1.0
        line: Line = {"kind": kind, "target": target, "at": self.now, **more}
        self.schedule["faults"].append(line)
        return line

    def audit(self, action: str, target: str, **more: Any) -> None:
        """Add a line to the audit log."""
        number, before = self.audited
        line: Line = {"record": "audit", "number": number + 1, "at": self.now, "action": action}
        line |= {"principal": "ann", "target": target, "outcome": "done", "detail": "", **more}
        hashed = ("number", "at", "principal", "action", "target", "outcome", "detail")
        array = ["hcna.audit.v1", before, *(line[name] for name in hashed)]
        text = json.dumps(array, separators=(",", ":"))
        line["hash"] = hashlib.sha256(text.encode()).hexdigest()
        self.audited = line["number"], line["hash"]
        self.extra.append(line)

    def prune_audit(self, count: int) -> None:
        """Forget the first lines of the audit log, and keep what the next one follows."""
        lines = [one for one in self.extra if one["record"] == "audit"]
        for line in lines[:count]:
            self.extra.remove(line)
        last = lines[count - 1]
        anchor: Line = {"record": "audit_anchor", "number": last["number"], "hash": last["hash"]}
        self.extra.append(anchor)

    # -- the end -----------------------------------------------------------------------------------

    def state(self, task: str) -> str:
        """Return where a task stands."""
        return str([one for one in self.facts if one["task"] == task][-1]["state"])

    def held(self, task: str) -> bool:
        """Return whether somebody holds its lease."""
        kinds = [one["kind"] for one in self.facts if one["task"] == task]
        last = next((k for k in reversed(kinds) if k == "granted" or k in _CLOSING), None)
        return last == "granted"

    def drain(self) -> None:
        """Say that everything has come to rest."""
        self.now += 1.0
        self.schedule["drained_at"] = self.now

    def dump(self) -> list[Line]:
        """Return the records of the store as it stands."""
        tasks = [row for row in map(self._row, self.specs) if row is not None]
        attempts = [
            {"record": "attempt", "task": task, "gen": token[0], "attempt": token[1]}
            | {"worker": self._worker_of(task, token), "outcome": outcome}
            for (task, token), outcome in self.outcomes.items()
        ]
        keys = [
            {"record": "key", "principal": principal, "key": key, "task": task}
            for (principal, key), task in self.keys.items()
        ]
        head: Line = {"record": "dump", "format": DUMP_FORMAT, "taken_at": self.now + 1.0}
        records: list[Line] = [head, *self.facts, *attempts, *keys, *self.workers, *tasks]
        records += [*self.extra, *self._sums(tasks)]
        return [dict(one) for one in records]

    def _worker_of(self, task: str, token: tuple[int, int]) -> str:
        for one in self.facts:
            mine = one["kind"] == "granted" and one["task"] == task
            if mine and (one["gen"], one["attempt"]) == token:
                return str(one["worker"])
        return "W1"

    def _row(self, task: str) -> Line | None:
        override = self.rows[task]
        if override is None:
            return None
        spec = self.specs[task]
        mine = [one for one in self.facts if one["task"] == task]
        since = max((one["number"] for one in mine if one["kind"] == "replayed"), default=0)
        lives = {
            (one["gen"], one["attempt"])
            for one in mine
            if one["kind"] == "granted" and one["number"] > since
        }
        outcomes = Counter(o for (t, k), o in self.outcomes.items() if t == task and k in lives)
        first = mine[0]["at"] if mine else T0
        due = max(first, spec.get("run_at") or first)
        replayed = next((one["at"] for one in mine if one["number"] == since), None)
        due = replayed or due
        state = mine[-1]["state"] if mine else "queued"
        row: Line = {
            "record": "task",
            "id": task,
            "seq": 1 + list(self.specs).index(task),
            "state": state,
            "queue": "default",
            "task_type": "echo",
            "principal": "owner",
            "priority": 5,
            "accepted_at": first,
            "due_at": due,
            "failures": outcomes["errored"] + outcomes["timed_out"],
            "losses": outcomes["lost"],
            "attempt": self.tokens.get(task, (0, 0))[1],
            "max_attempts": 3,
            "max_losses": 3,
            "bytes": 100,
            "needs": {},
            "lease": list(self.tokens[task]) if self.held(task) else None,
            "result_hash": f"result-{task}" if state == "completed" else None,
            "end_no": self._end_no(task) if state in TERMINAL else None,
        }
        row |= spec
        row["dispatch_key"] = row["due_at"] - row["priority"] * 60.0
        return row | override

    def _end_no(self, task: str) -> int:
        ends = [one["task"] for one in self.facts if one["kind"] in TERMINAL]
        return 1 + max(i for i, name in enumerate(ends) if name == task)

    def _sums(self, tasks: list[Line]) -> list[Line]:
        types = {row["id"]: (row["task_type"], row["queue"]) for row in tasks}
        counted: Counter[tuple[str, str, str]] = Counter()
        for one in self.facts:
            if one["task"] not in types:
                continue
            task_type, queue = types[one["task"]]
            if one["kind"] == "accepted":
                counted["accepted", task_type, queue] += 1
            elif one["kind"] in TERMINAL:
                counted["ended", task_type, one["kind"]] += 1
        for (task, _), outcome in self.outcomes.items():
            if outcome is not None and task in types:
                counted["attempts", types[task][0], outcome] += 1
        still = [row for row in tasks if row["state"] not in TERMINAL]
        numbers = {
            "last_fact": self._number,
            "last_seq": len(self.specs),
            "last_end": sum(1 for one in self.facts if one["kind"] in TERMINAL),
            "last_audit": self.audited[0],
            "open_tasks": len(still),
            "open_bytes": 100 * len(still),
        }
        depth = Counter((row["queue"], row["state"]) for row in tasks)
        found: list[Line] = [
            {"record": "counter", "name": n, "task_type": t, "label": label, "value": value}
            for (n, t, label), value in counted.items()
        ]
        found += [{"record": "number", "name": n, "value": v} for n, v in numbers.items()]
        found += [
            {"record": "depth", "queue": queue, "state": state, "tasks": count}
            for (queue, state), count in depth.items()
        ]
        return found

    def back_up(self) -> None:
        """Keep the store as it stands: what a later restore takes away is seen by it."""
        self.earlier.append(self.dump())

    def write(self, folder: Path) -> None:
        """Leave everything in a directory."""
        self.schedule.setdefault("drained_at", self.now)
        records = self.dump()
        for edit in self.edits:
            edit(records)
        files: dict[str, list[Line]] = {
            "history.jsonl": self.history,
            "effects.jsonl": self.effects,
            "store.jsonl": records,
        }
        if self.samples:
            files["samples.jsonl"] = self.samples
        files |= {f"before-{i}.jsonl": dump for i, dump in enumerate(self.earlier, 1)}
        for name, lines in files.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / name).write_text(text + self.raw.get(name, ""))
        (folder / "schedule.json").write_text(json.dumps(self.schedule))
        for name in self.raw.keys() - files.keys():
            (folder / name).write_text(self.raw[name])

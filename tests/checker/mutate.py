"""Altering evidence: one line taken away, doubled or changed, chosen by a seed.

A mutation of a good run either breaks a promise, and then must be seen, or leaves a story that is
possible too (a GET less is no crime). `MUST_BE_SEEN` are those of which it is known that they break
one, whichever line they strike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Change = Callable[[Line, random.Random], Line | None]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to alter a file: which lines it may strike, and what becomes of one."""

    name: str
    file: str
    fits: Callable[[Line], bool]
    change: Change
    #: Keep the old line as well.
    doubles: bool = False


def _drop(line: Line, draw: random.Random) -> Line | None:
    return None


def _same(line: Line, draw: random.Random) -> Line | None:
    return line


def _set(name: str, value: Any) -> Change:
    return lambda line, draw: {**line, name: value}


def _add(name: str, by: Any) -> Change:
    return lambda line, draw: {**line, name: line[name] + by}


def _record(record: str, **fields: Any) -> Callable[[Line], bool]:
    return lambda line: (
        line.get("record") == record
        and all(line.get(name) == value for name, value in fields.items())
    )


def _in_body(name: str, value: str) -> Change:
    return lambda line, draw: {**line, "body": {**line["body"], name: value}}


def _terminal(line: Line) -> bool:
    return line.get("kind") in ("completed", "failed", "cancelled", "expired")


def _seen(line: Line, status: str | None = None) -> bool:
    body = line.get("body") or {}
    return line.get("event") == "return" and "status" in body and status in (None, body["status"])


def _acked(line: Line) -> bool:
    return line.get("event") == "return" and line.get("status") == 202 and "body" not in line


def _other_state(line: Line, draw: random.Random) -> Line:
    states = {"queued", "running", "completed", "failed", "cancelled", "expired", "scheduled"}
    return {**line, "state": draw.choice(sorted(states - {line["state"]}))}


def _next_fact(line: Line, draw: random.Random) -> Line:
    return {**line, "number": line["number"] + 100_000}


MUTATIONS = (
    Mutation("drop a line of the log", "store.jsonl", _record("fact"), _drop),
    Mutation("repeat a line of the log", "store.jsonl", _record("fact"), _same, doubles=True),
    Mutation("repeat an end under a new number", "store.jsonl", _terminal, _next_fact, True),
    Mutation("another state in the log", "store.jsonl", _record("fact"), _other_state),
    Mutation(
        "another kind in the log", "store.jsonl", _record("fact"), _set("kind", "retry_scheduled")
    ),
    Mutation("an older token", "store.jsonl", _record("fact", kind="granted"), _set("attempt", 0)),
    Mutation("another worker", "store.jsonl", _record("fact", kind="granted"), _set("worker", "X")),
    Mutation("a line of the log an hour later", "store.jsonl", _record("fact"), _add("at", 3600.0)),
    Mutation("drop a task", "store.jsonl", _record("task"), _drop),
    Mutation("another state of a task", "store.jsonl", _record("task"), _other_state),
    Mutation(
        "another result",
        "store.jsonl",
        _record("task", state="completed"),
        _set("result_hash", "x"),
    ),
    Mutation("another content", "store.jsonl", _record("task"), _set("nonce", "x")),
    Mutation("another place", "store.jsonl", _record("task"), _add("dispatch_key", -100.0)),
    Mutation("one loss more", "store.jsonl", _record("task"), _add("losses", 1)),
    Mutation("drop an attempt", "store.jsonl", _record("attempt", outcome="completed"), _drop),
    Mutation("another outcome", "store.jsonl", _record("attempt"), _set("outcome", "timed_out")),
    Mutation("one more counted", "store.jsonl", _record("counter"), _add("value", 1)),
    Mutation("one more open", "store.jsonl", _record("number"), _add("value", 1)),
    Mutation("another depth", "store.jsonl", _record("depth"), _add("tasks", 1)),
    Mutation("a key of another task", "store.jsonl", _record("key"), _set("task", "another")),
    Mutation("drop a request", "history.jsonl", lambda o: o["event"] == "call", _drop),
    Mutation("drop an answer", "history.jsonl", lambda o: o["event"] == "return", _drop),
    Mutation("an acknowledgement of nothing", "history.jsonl", _acked, _set("id", "nothing")),
    Mutation("see another end", "history.jsonl", _seen, _in_body("status", "expired")),
    Mutation(
        "see another result",
        "history.jsonl",
        lambda line: _seen(line, "completed"),
        _in_body("result_hash", "x"),
    ),
    Mutation("find nothing", "history.jsonl", _seen, _set("status", 404)),
    Mutation("drop a start", "effects.jsonl", lambda o: o["what"] == "start", _drop),
    Mutation("drop an end", "effects.jsonl", lambda o: o["what"] == "end", _drop),
    Mutation("start twice", "effects.jsonl", lambda o: o["what"] == "start", _same, doubles=True),
    Mutation(
        "start an hour later", "effects.jsonl", lambda o: o["what"] == "start", _add("t_wall", 3600)
    ),
    Mutation(
        "return something else",
        "effects.jsonl",
        lambda o: o["what"] == "end" and "result_hash" in o,
        _set("result_hash", "x"),
    ),
    Mutation("run another token", "effects.jsonl", lambda o: True, _add("attempt", 50)),
)

#: Mutations that break a promise whatever they strike.
MUST_BE_SEEN = frozenset(
    {
        "drop a line of the log",
        "repeat a line of the log",
        "repeat an end under a new number",
        "another state in the log",
        "drop a task",
        "another state of a task",
        "another place",
        "one more counted",
        "an acknowledgement of nothing",
        "run another token",
        "start twice",
    }
)


def mutate(folder: Path, mutation: Mutation, draw: random.Random) -> str | None:
    """Alter one line in a run's directory; return it, or ``None`` when nothing fits."""
    path = folder / mutation.file
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    fitting = []
    for index, text in enumerate(lines):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if mutation.fits(line):
            fitting.append((index, line))
    if not fitting:
        return None
    index, line = draw.choice(fitting)
    changed = mutation.change(line, draw)
    struck = lines[index]
    new = [] if changed is None else [json.dumps(changed)]
    lines[index : index + 1] = [struck, *new] if mutation.doubles else new
    path.write_text("".join(text + "\n" for text in lines))
    return struck

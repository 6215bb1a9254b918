"""Schemathesis against the OpenAPI that C1 serves, as one caller.

    python -m tests.fuzz.run FOLDER CALLER EXAMPLES [SEED]

Every request goes to the real application in this process (`tests.fuzz.stage`). Prints what was
sent and what is wrong as one JSON object. Phases: what the schema's bounds demand (coverage), drawn
requests, fitting and not (fuzzing), and chains of them (stateful). EXAMPLES is asked for drawn
requests of each operation.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.engine import Status, events, from_schema

from tests.fuzz.stage import DELETABLE, WORKER, Stage

SEED = 6
#: Chains of requests; each is some steps long.
CHAINS_SHARE = 5

#: That a request which fits the schema is taken is not asked: the schema cannot say which task
#: types there are, or that a task has not ended yet.
_OFF = ("positive_data_acceptance",)


@dataclass(kw_only=True)
class Found:
    """What came of it."""

    caller: str
    seed: int
    examples: int
    took_s: float = 0.0
    #: Requests of each operation that were drawn, and all that were sent.
    drawn: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    #: Answers of each status.
    statuses: dict[str, int] = field(default_factory=dict)
    #: Operations that were answered with something else than a refusal.
    good: list[str] = field(default_factory=list)
    #: What is wrong, each kind once, with a request that shows it.
    failures: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def configured(stage: Stage, caller: str, examples: int, seed: int) -> SchemathesisConfig:
    """Return how to ask: as whom, how often, and with which names among the made-up ones."""
    known = {
        "tasks": [task for ids in stage.tasks.values() for task in ids],
        "types": ["echo", "sleep", "test.ping"],
        "workers": [WORKER, "W2"],
        "queues": ["lab", "default"],
        "digests": [stage.artifact],
        "intents": ["test.ping"],
        "ranges": ["bytes=0-3", "bytes=-5", "bytes=99-", "bytes=2-1"],
        "parts": ["bytes */30", "bytes 0-3/30", "bytes 0-0/1"],
        "places": ["0", "1-0", "1-3", "1-999999", "2-1"],
        "cursors": ["0", "1", "9", "100"],
        "crons": ["0 3 * * *", "*/5 * * * *", "@daily", "0 0 29 2 *", "61 * * * *", "@reboot"],
        "zones": ["UTC", "Europe/Berlin", "America/Nuuk", "Mars/Olympus"],
        "owners": list(stage.keys),
        "deletable": [*DELETABLE],
    }
    used = {
        "path.task_id": ("tasks", 0.6),
        "path.name": ("workers", 0.5),
        "path.sha256": ("digests", 0.6),
        "query.sha256": ("digests", 0.5),
        "query.task_type": ("types", 0.5),
        "query.queue": ("queues", 0.5),
        "query.cursor": ("cursors", 0.5),
        "header.Range": ("ranges", 0.6),
        "header.Content-Range": ("parts", 0.6),
        "header.Last-Event-ID": ("places", 0.6),
        "query.after": ("places", 0.6),
        "query.owner": ("owners", 0.7),
        "body.cron": ("crons", 0.9),
        "body.timezone": ("zones", 0.9),
        "body.task.task_type": ("types", 0.9),
        "body.task_type": ("types", 0.9),
        "body.tasks[*].task_type": ("types", 0.9),
        "body.ids[*]": ("tasks", 0.9),
        "body.filter.task_type": ("types", 0.5),
        "body.dst": ("workers", 0.8),
        "body.intent": ("intents", 0.8),
    }
    data: dict[str, Any] = {
        "seed": seed,
        "headers": _headers(stage, caller),
        "generation": {
            "max-examples": examples,
            "database": "none",
            # Keys that are made up are `tests/unit/api/test_access_matrix.py`'s.
            "with-security-parameters": False,
        },
        "dictionaries": {name: {"values": values} for name, values in known.items()},
        "parameters": {
            name: {"dictionary": values, "probability": share}
            for name, (values, share) in used.items()
        },
        "checks": {name: {"enabled": False} for name in _OFF},
        "phases": {"stateful": {"generation": {"max-examples": max(1, examples // CHAINS_SHARE)}}},
        # Each item of a batch is taken or refused by itself: one that does not fit is no 422.
        "operations": [
            {
                "include-name": "POST /tasks/batch",
                "checks": {"negative_data_rejection": {"enabled": False}},
            },
            # There are others to be looked at, changed and run.
            {
                "include-name": "DELETE /schedules/{name}",
                "parameters": {"path.name": {"dictionary": "deletable", "probability": 0.8}},
            },
            # Each owner has one of that name.
            {
                "include-name": "GET /schedules/{name}",
                "checks": {"use_after_free": {"enabled": False}},
            },
            # The one worker here is in contact: forgotten by force, it is back when it next beats.
            {
                "include-name": "GET /workers/{name}",
                "checks": {"use_after_free": {"enabled": False}},
            },
        ],
        "suppress-health-check": ["all"],
    }
    return SchemathesisConfig.from_dict(data)


def _headers(stage: Stage, caller: str) -> dict[str, str]:
    key = stage.keys.get(caller)
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def run(stage: Stage, caller: str, examples: int, seed: int = SEED) -> Found:
    """Ask everything; return what was found."""
    found = Found(caller=caller, seed=seed, examples=examples)
    begun = time.monotonic()
    config = configured(stage, caller, examples, seed)
    schema = schemathesis.openapi.from_asgi("/openapi.json", stage, config=config)
    good: set[str] = set()
    failures: dict[tuple[str, str], str] = {}
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            good |= set(_count(event, found))
            for operation, name, text in _failures(event):
                failures.setdefault((operation, name), text)
        elif isinstance(event, events.NonFatalError):
            found.errors.append(f"{event.label}: {event.value!r}"[:2000])
        elif isinstance(event, events.FatalError):
            found.errors.append(f"{event.exception!r}"[:2000])
    good |= set(_repeat(schema, stage, found))
    found.good = sorted(good)
    found.failures = list(failures.values())
    found.took_s = time.monotonic() - begun
    return found


def _repeat(schema: Any, stage: Stage, found: Found) -> Iterable[str]:
    """Ask again where there are few questions, until that has been done often enough.

    There is but one in a GET without parameters; and of what is deleted Hypothesis soon has enough.
    """
    headers = _headers(stage, found.caller)
    tasks = [task for ids in stage.tasks.values() for task in ids]
    known = {"task_id": [*tasks, "task-none"], "name": [*DELETABLE, "none"]}
    draw = random.Random(found.seed)
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.method not in ("get", "delete"):
            continue
        named = [name for name in known if f"{{{name}}}" in operation.path]
        while found.drawn.get(operation.label, 0) < found.examples:
            path = {name: draw.choice(known[name]) for name in named}
            try:
                case = operation.Case(path_parameters=path)
                answer = case.call_and_validate(headers=headers)
            except FailureGroup as failures:
                found.failures += [f"{operation.label}: {one!r}" for one in failures.exceptions]
                return
            _add(found.drawn, operation.label)
            _add(found.sent, operation.label)
            _add(found.statuses, str(answer.status_code))
            if answer.status_code < 400:
                yield operation.label


def _add(counts: dict[str, int], name: str, count: int = 1) -> None:
    counts[name] = counts.get(name, 0) + count


def _count(event: events.ScenarioFinished, found: Found) -> Iterable[str]:
    recorder = event.recorder
    for case_id, node in recorder.cases.items():
        operation = node.value.operation.label
        interaction = recorder.interactions.get(case_id)
        if interaction is None or interaction.response is None:
            continue
        status = interaction.response.status_code
        _add(found.sent, operation)
        _add(found.drawn, operation, event.phase.value == "fuzzing")
        _add(found.statuses, str(status))
        if status < 400:
            yield operation


def _failures(event: events.ScenarioFinished) -> Iterable[tuple[str, str, str]]:
    recorder = event.recorder
    for case_id, checks in recorder.checks.items():
        for check in checks:
            if check.status is not Status.FAILURE or check.failure_info is None:
                continue
            failure = check.failure_info.failure
            operation = recorder.cases[case_id].value.operation.label
            text = f"{operation}: {check.name}: {failure.title}\n{failure.message}"
            yield operation, check.name, f"{text}\n{check.failure_info.code_sample}"[:3000]


def main(arguments: list[str]) -> None:
    """Run as one caller and print the JSON; then end at once, writer thread and all."""
    folder, caller, examples = arguments[:3]
    seed = int(arguments[3]) if len(arguments) > 3 else SEED
    found = run(Stage(Path(folder)), caller, int(examples), seed)
    sys.stdout.write(json.dumps(vars(found)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # The moderator's writer thread goes on for ever, as in its actor.


if __name__ == "__main__":
    main(sys.argv[1:])

"""Draws the task state machine from `TRANSITIONS`: ``python -m hcna_ray.core.diagram``.

The arrows are found by asking the machine: sample tasks in every state meet every event, and what
comes of it is drawn. ``docs/lifecycle.md`` is this module's output; a test keeps it in step.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.events import (
    EVENT_TYPES,
    AttemptCancelled,
    AttemptCompleted,
    AttemptFailed,
    AttemptLost,
    AttemptProgressed,
    AttemptStarted,
    CancelRequested,
    ClockStepped,
    DependencySettled,
    Event,
    KeyHeld,
    KeyReleased,
    LeaseGranted,
    LeaseReturned,
    TaskReplayed,
    TimePassed,
)
from hcna_ray.core.machine import TRANSITIONS, accept, advance
from hcna_ray.core.models import (
    FailureKind,
    Hold,
    Lease,
    RetryPolicy,
    Task,
    TaskError,
    TaskSpec,
    TaskState,
    Token,
)

_HEAD = """\
# Life of a task

Generated from the transition table in `hcna_ray/core/machine.py` by
`python -m hcna_ray.core.diagram > docs/lifecycle.md`. Edit the table, not this page.

A granted task is still `queued`; a pause before the next attempt is `scheduled`. A report about an
attempt counts only while it carries the fencing token of the lease in force.
"""

_LEGEND = """\
## Every state, every event

What the machine does in each state. *ignored*: late or repeated, nothing changes. *refused*: the
caller is told why. *bug*: cannot happen, raises `InvalidTransition`.
"""


def _samples() -> list[Task]:
    """Return tasks that between them can take every transition."""
    spec = TaskSpec(id="t", task_type="echo", expires_at=50.0, retry=RetryPolicy(max_attempts=2))
    waiting = accept(spec, seq=1, at=0.0, unmet=1).task
    due = waiting.evolve(unmet=0)
    queued = accept(spec, seq=1, at=0.0).task
    lease = Lease(
        token=Token(1, 1), worker="W1", incarnation="a", slot=0, grant_seq=1, granted_at=0.0
    )
    granted = advance(queued, LeaseGranted(at=0.0, lease=lease)).task
    running = advance(granted, AttemptStarted(at=0.0, token=lease.token)).task
    poisoned = running.evolve(losses=spec.max_losses - 1, failures=1)
    stopping = running.evolve(cancel_requested_at=0.0)
    ended = [
        advance(running, event).task
        for event in (
            AttemptCompleted(at=1.0, token=lease.token, started_at=0.0, result=b"{}"),
            AttemptCancelled(at=1.0, token=lease.token, started_at=0.0),
        )
    ]
    failed = advance(waiting, DependencySettled(at=1.0, dependency_id="d", completed=False)).task
    expired = advance(queued, TimePassed(at=60.0)).task
    impatient = accept(replace(spec, queue_timeout_s=5.0), seq=1, at=0.0).task
    doomed = granted.evolve(losses=spec.max_losses - 1, failures=1)
    stopped = granted.evolve(cancel_requested_at=0.0)
    alive = [waiting, due, queued, impatient, granted, doomed, stopped, running, poisoned, stopping]
    return [*alive, *ended, failed, expired]


def _events() -> list[Event]:
    token = Token(1, 1)
    error = TaskError(kind=FailureKind.ERROR, message="")
    lease = Lease(token=token, worker="W1", incarnation="a", slot=0, grant_seq=1, granted_at=0.0)
    return [
        TimePassed(at=10.0),
        TimePassed(at=1000.0),
        ClockStepped(at=10.0, by_s=10.0),
        DependencySettled(at=10.0, dependency_id="d", completed=True),
        DependencySettled(at=10.0, dependency_id="d", completed=False),
        KeyHeld(at=10.0, hold=Hold.ORDERING),
        KeyReleased(at=10.0, hold=Hold.ORDERING),
        LeaseGranted(at=10.0, lease=lease),
        LeaseReturned(at=10.0, token=token),
        LeaseReturned(at=10.0, token=token, reason="never started", give_up=True),
        AttemptStarted(at=10.0, token=token),
        AttemptProgressed(at=10.0, token=token),
        AttemptCompleted(at=10.0, token=token, started_at=0.0, result=b"{}"),
        AttemptFailed(at=10.0, token=token, started_at=0.0, error=error),
        AttemptLost(at=10.0, token=token, kind=FailureKind.LOST, message=""),
        AttemptCancelled(at=10.0, token=token, started_at=0.0),
        CancelRequested(at=10.0),
        TaskReplayed(at=10.0),
    ]


def arrows() -> dict[tuple[TaskState, TaskState], list[str]]:
    """Return, for each two different states, the names of the events that lead over."""
    found: dict[tuple[TaskState, TaskState], list[str]] = {}
    for task in _samples():
        for event in _events():
            try:
                after = advance(task, event).task.state
            except HcnaError:
                continue
            names = found.setdefault((task.state, after), [])
            if after is not task.state and type(event).__name__ not in names:
                names.append(type(event).__name__)
    return {pair: names for pair, names in sorted(found.items()) if names}


def render() -> str:
    """Return the page: a Mermaid diagram and the whole table."""
    lines = [_HEAD, "```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {state.value}" for state in (TaskState.SCHEDULED, TaskState.QUEUED)]
    lines += ["    [*] --> failed: a dependency had failed"]
    lines += [
        f"    {before.value} --> {after.value}: {', '.join(names)}"
        for (before, after), names in arrows().items()
    ]
    lines += ["```", "", _LEGEND]
    lines += ["| Event | " + " | ".join(f"`{state.value}`" for state in TaskState) + " |"]
    lines += ["|---" * (len(TaskState) + 1) + "|"]
    for event_type in EVENT_TYPES:
        cells = [_cell(TRANSITIONS[state, event_type].__name__) for state in TaskState]
        lines.append(f"| `{event_type.__name__}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(name: str) -> str:
    words = {"ignore": "ignored", "impossible": "bug"}
    if name.startswith("refuse_"):
        return "refused"
    return words.get(name, f"`{name}`")


if __name__ == "__main__":
    sys.stdout.write(render())

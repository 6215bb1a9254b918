"""What attempts really did, as they wrote it down themselves, held against what the store says.

The example package's task type ``example.marked`` appends a line to a file when a process starts
an attempt and another when it ends it. Nothing of the product writes that file, so it is a witness
of its own: of attempts that ran twice, ran late, or ran and were forgotten.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcna_ray.config import Settings
from hcna_ray.core.models import TERMINAL, Attempt, Outcome, TaskState, Token
from hcna_ray.store.sqlite import SqliteTaskReader

TASK_TYPE = "example.marked"
Key = tuple[str, Token]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One line of the log."""

    what: str
    task_id: str
    token: Token
    pid: int
    at: float


@dataclass(frozen=True, kw_only=True)
class Account:
    """What the log and the store say together about some tasks."""

    tasks: int
    starts: int
    ends: int
    #: Attempts the store calls completed, and lost; of the lost, those that left a start mark.
    completed: int
    lost: int
    lost_started: int
    cancelled: int

    def __str__(self) -> str:
        return (
            f"{self.tasks} tasks: {self.starts} starts = {self.completed} completed "
            f"+ {self.lost_started} lost + {self.cancelled} cancelled; {self.ends} ends"
            + (
                f"; {self.lost - self.lost_started} lost before their first line"
                if self.lost > self.lost_started
                else ""
            )
        )


class SideEffects:
    """The log that the handlers write to."""

    def __init__(self, path: Path) -> None:
        """Name the file; the first attempt creates it."""
        self.path = path

    def payload(self, seconds: float = 0.0, **more: Any) -> dict[str, Any]:
        """Return a payload for a marked task that writes here."""
        return {"seconds": seconds, "mark": str(self.path), **more}

    def marks(self) -> list[Mark]:
        """Return every line so far, in the order written."""
        if not self.path.exists():
            return []
        lines = (json.loads(line) for line in self.path.read_text().splitlines())
        return [Mark(**{**line, "token": Token(*line["token"])}) for line in lines]

    def started(self, task_id: str) -> list[Mark]:
        """Return the starts of one task, oldest first."""
        return [one for one in self.marks() if one.what == "start" and one.task_id == task_id]

    def account_of(self, settings: Settings, ids: Iterable[str]) -> Account:
        """As `account`, with the store of this instance."""
        reader = SqliteTaskReader(settings.home / "queue.db")
        try:
            return self.account(reader, ids)
        finally:
            reader.close()

    def account(self, reader: SqliteTaskReader, ids: Iterable[str]) -> Account:
        """Check that log and store tell one story of these ended tasks, and return it.

        Every task has exactly one terminal transition in its history. Every start has an attempt
        in the store and ran once; every attempt in the store has a start, but for one that died
        between its process's note and its first line. What ended by its own line is either
        completed, or was lost between that line and its report. Fencing tokens rise.
        """
        wanted = dict.fromkeys(ids)
        marks = [mark for mark in self.marks() if mark.task_id in wanted]
        starts = Counter((mark.task_id, mark.token) for mark in marks if mark.what == "start")
        ends = Counter((mark.task_id, mark.token) for mark in marks if mark.what == "end")
        attempts: dict[Key, Attempt] = {}
        for task_id in wanted:
            check_history(reader, task_id)
            found = reader.attempts(task_id)
            assert [one.token for one in found] == sorted({one.token for one in found})
            attempts |= {(task_id, one.token): one for one in found}
        outcomes = Counter(one.outcome for one in attempts.values())

        assert not [key for key, count in starts.items() if count > 1], "an attempt started twice"
        assert not [key for key, count in ends.items() if count > 1], "an attempt ended twice"
        assert not ends.keys() - starts.keys(), "an end without a start"
        assert not starts.keys() - attempts.keys(), "a start the store knows nothing of"
        lost = {key for key, one in attempts.items() if one.outcome is Outcome.LOST}
        unmarked = attempts.keys() - starts.keys()
        assert unmarked <= lost, f"attempts that never started: {unmarked - lost}"
        done = {key for key, one in attempts.items() if one.outcome is Outcome.COMPLETED}
        assert done <= ends.keys() <= done | lost, "completed without an end, or the reverse"
        _check_order(marks)
        account = Account(
            tasks=len(wanted),
            starts=len(starts),
            ends=len(ends),
            completed=outcomes[Outcome.COMPLETED],
            lost=outcomes[Outcome.LOST],
            lost_started=len(lost & starts.keys()),
            cancelled=outcomes[Outcome.CANCELLED],
        )
        assert account.starts == account.completed + account.lost_started + account.cancelled
        return account


def check_history(reader: SqliteTaskReader, task_id: str) -> None:
    """Assert that a task's history ends, once, in the state the task is in."""
    (task,) = reader.get([task_id]).values()
    facts = [stored.fact for stored in reader.facts(after=0, limit=1000, task_id=task_id)]
    final = [fact.state for fact in facts if fact.state in TERMINAL]
    assert final == [task.state], f"{task_id} is {task.state} with history {facts}"
    assert facts[-1].state is task.state, f"{task_id} moved on after its end: {facts}"


def states(reader: SqliteTaskReader, ids: Iterable[str]) -> dict[TaskState, int]:
    """Count tasks by state; an id that is not stored fails the test."""
    wanted = list(ids)
    found = reader.get(wanted)
    assert found.keys() == set(wanted), f"accepted and not stored: {set(wanted) - found.keys()}"
    return dict(Counter(task.state for task in found.values()))


def _check_order(marks: Sequence[Mark]) -> None:
    """Tokens of one task rise in the order in which its attempts really started."""
    last: dict[str, Token] = {}
    for mark in marks:
        if mark.what == "start":
            assert mark.token > last.get(mark.task_id, Token(0, 0)), f"token fell back: {mark}"
            last[mark.task_id] = mark.token

"""What a route demands of whoever asks: the words its policy is declared in.

A policy stands beside its route (`hcna_ray.api.routing.Routes.add`) and has two halves: the least
role, and what about the request is held against the key once the role will do. The table in
``docs/reference/access.md`` is made of them, and so are the cells of
``tests/unit/api/test_access_matrix.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hcna_ray.security.keys import ROLES, Role


class Check(StrEnum):
    """What is looked at beside the role."""

    NONE = "none"
    #: Task type and queue of what is submitted, and tasks it depends on.
    SUBMISSION = "submission"
    #: The task in the path.
    TASK = "task"
    #: Each task that is named, or that fits a filter.
    TASKS = "tasks"
    #: What the handler of the task in the path has printed.
    OUTPUT = "output"
    #: The schedule in the path, and what it submits.
    SCHEDULE = "schedule"
    #: Each schedule of a listing.
    SCHEDULES = "schedules"
    ARTIFACT = "artifact"
    #: The queue in the path.
    QUEUE = "queue"
    #: What workers run, and where they are.
    WORKERS = "workers"
    #: Whether a key may tell machines what to do.
    MACHINES = "machines"


#: What each check means, for people.
MEANING: dict[Check, str] = {
    Check.NONE: "nothing else",
    Check.SUBMISSION: "task type and queue lie in the key's scopes, else 403 `out_of_scope`; tasks "
    "it depends on are the caller's to see, else they do not exist",
    Check.TASK: "the task is the caller's to see, else 404",
    Check.TASKS: "other tasks than the caller's to see are left out; named, they do not exist",
    Check.OUTPUT: "the caller sees the task in full, else 404",
    Check.SCHEDULE: "the schedule is the caller's to see, as its tasks are, else 404; type and "
    "queue of what it is to submit lie in the key's scopes, else 403 `out_of_scope`",
    Check.SCHEDULES: "schedules whose tasks are not the caller's to see are left out",
    Check.ARTIFACT: "the artifact is the caller's, or was made by a task that it sees in full, "
    "else 404",
    Check.QUEUE: "the queue lies in the key's scopes, and they name no task types (a queue holds "
    "those of others), else 403 `out_of_scope`",
    Check.WORKERS: "of what runs, only tasks of the caller's to see; addresses and telemetry "
    "from operator on; without a key, who is there and no more",
    Check.MACHINES: "the key has no scopes, else 403 `out_of_scope`",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Who may use a route."""

    #: The least role; ``None`` is open to everyone.
    role: Role | None
    check: Check = Check.NONE
    #: The least role where C1 listens on more than loopback; ``None``: the same everywhere.
    in_public: Role | None = None

    def least(self, *, public: bool) -> Role | None:
        """Return the least role for a C1 that listens publicly or does not."""
        return self.in_public or self.role if public else self.role


def rank_of(role: Role | None) -> int:
    """Return the place of a role among all; below all of them for ``None``."""
    return -1 if role is None else ROLES.index(role)


#: Answers whoever asks, and tells nobody more than others.
OPEN = Policy(role=None)

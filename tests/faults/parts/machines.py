"""A machine that joins and leaves, and an artifact on its way to one, killed at every point.

W1 works under load all the time. W2 leaves and comes again; whoever comes by the failpoint is
killed there: M1's supervisor with its gate, or the command on the machine. The same command is
then given again, as its words say, and in the end W2 is a member and works. The copy of an artifact
is killed in W2's executor: the attempt is lost, the next one fetches it anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.stack import ENVIRONMENT, Stack, eventually, stack
from tests.rig.computer import HCNA

LINE = "kill points, whole stack"
#: Where the failpoint is come by.
POINTS = {
    "gate.leave.removed": "m1",
    "gate.join.redeemed": "m1",
    "gate.join.stored": "m1",
    "join.answer.received": "w2",
    "join.membership.written": "w2",
    "cache.file.fetched": "w2",
}
#: How long one command may take, how often it may be given, and how long until W2 works again.
_COMMAND_S, _TIMES, _PAUSE_S, _BACK_S = 180.0, 5, 3.0, 180.0


class Machines:
    """See this module."""

    name = "machines"
    title = "joining, leaving, and a worker's copy of an artifact, killed at every point"
    budget_s = 720.0
    needs_root = True
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return a case for each point."""
        if size is Size.SLICE:
            return []
        return [
            Case(name=point, seed=seed * 100 + number, options={"failpoints": [point]})
            for number, point in enumerate(POINTS, 1)
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Bring up M1 and two workers."""
        with stack(folder, seed=5, workers=("w1", "w2"), per_second=2.0) as shared:
            yield lambda case, own: run_case(shared, case, own)


def run_case(on: Stack, case: Case, folder: Path) -> Outcome:
    """Go by the case's point, dying there; then have it all checked."""
    (point,) = case.options["failpoints"]
    since = len(on.faults)
    on.clients.go_on()
    go_by = _fetch if point == "cache.file.fetched" else _leave_and_join
    troubles = go_by(on, point)
    drained = on.settle()
    out = on.judge(folder, drained, since)
    out.violations = troubles + out.violations
    out.counts = {LINE: 1}
    return out


def _leave_and_join(on: Stack, point: str) -> list[str]:
    """Have W2 leave and join again, and somebody die on the way."""
    code = on.computer.code_in(on.computer.hcna("m1", "invite --uses 0").out)
    commands = {"leave": "leave --drain 5", "join": f"join {code} --name W2 --wait 120"}
    ordered = on.note("forget", "W2", time.time())
    troubles: list[str] = []
    for what, command in commands.items():
        fired = on.arm(POINTS[point], point) if what in point.split(".") else None
        told = _until_done(on, command)
        if told:
            troubles.append(f"hcna {what}, {_TIMES} times: {told}")
        if fired is None:
            continue
        at = fired()
        on.disarm()
        if at:
            on.note("kill", "m1/m1-supervisor" if POINTS[point] == "m1" else "w2/hcna", at)
        else:
            troubles.append(f"nobody came by {point}")
    ordered["until"] = time.time()
    return troubles + _works(on)


def _until_done(on: Stack, command: str) -> str:
    """Give a command again until it ends well; return what it said if it never does."""
    said = ""
    for _ in range(_TIMES):
        done = on.rig["w2"].sh(
            f"{HCNA} {command}", timeout_s=_COMMAND_S, check=False, env=ENVIRONMENT
        )
        if done.ok:
            return ""
        said = f"exit code {done.code}: {done.err[-500:]}"
        time.sleep(_PAUSE_S)
    return said


def _works(on: Stack) -> list[str]:
    """Have W2 do a task that only it may do."""
    if not eventually(on.all_online, _BACK_S, 0.5):
        return [f"online are only {sorted(on.online())}"]
    task = eventually(lambda: on.clients.submit_one(0.0, "W2"), 60.0, 1.0)
    return [] if task and _completes(on, task) else ["W2 does no work"]


def _completes(on: Stack, task: str) -> bool:
    wanted = f"SELECT 1 FROM task WHERE id = '{task}' AND state = 'completed'"
    return bool(eventually(lambda: on.query(wanted), _BACK_S, 0.2))


def _fetch(on: Stack, point: str) -> list[str]:
    """Have a task on W2 read an artifact, and its executor die with the copy almost made."""
    status, stored = on.computer.api("PUT", "/artifacts", f"what {point} is about " * 1000)
    if status != 201:
        return [f"the artifact was not stored: {status} {stored}"]
    fired = on.arm("w2", point)
    task = eventually(
        lambda: on.clients.submit_one(0.0, "W2", artifact=stored["sha256"]), 60.0, 1.0
    )
    ended = bool(task and _completes(on, task))
    at = fired()
    on.disarm()
    if at is None:
        return [f"nobody came by {point}"]
    on.note("kill", "W2/executor", at)
    return [] if ended else ["the task whose copy was cut off is not done"]


PART = Machines()

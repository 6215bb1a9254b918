"""A newcomer's first minutes on two laptops, with a clock: ``make newcomer`` (as root).

Each step types what a person would, on hosts of their own (`tests.support.rig`), and looks for what
that person was promised. The table at the end has every line, also those that do not hold; the exit
code is 0 if every promise was kept within its time. Takes some minutes, and leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.rig.computer import LEAVES_S, PYTHON, Computer, eventually, launcher_config
from tests.support.rig import Done, Host, Rig, RigUnavailable

W1 = "HCNA-W1--prod--home--v1.0"
#: Longest time for a step that promises no shorter one, seconds.
STEP_S = 120.0
NAPS = 20
_TASK = re.compile(r"\btask-[0-9a-z]{26}\b")

FIRST_CELLS = """
from hcna_ray.client import Client

client = Client()
assert "W1" in client._repr_html_()  # What a cell shows of it.
results = list(client.map("echo", ({"n": n} for n in range(100))))
assert [one["n"] for one in results] == list(range(100))
print(client.submit("sleep", {"seconds": 5}).id)
"""
AFTER_A_RESTART = """
from hcna_ray.client import Client

print(Client().attach("ID").result(timeout_s=60)["processed_by"])
"""


class NotHere(Exception):
    """Something is not installed on this machine, so nothing can be said of a promise."""


@dataclass
class Walk:
    """Where the newcomer is, and what was handed over from step to step."""

    computer: Computer
    code: str = ""

    @property
    def machines(self) -> tuple[Host, Host]:
        """M1's and W1's."""
        return self.computer.m1, self.computer.rig["w1"]

    def types(self, host: str, line: str, *, check: bool = True, timeout_s: float = 180) -> Done:
        """Type a line in a shell on a host, in the checkout's environment."""
        settled = "export PATH=~/hcna-ray/.venv/bin:$PATH"
        return self.computer.rig[host].sh(f"{settled}\n{line}", timeout_s=timeout_s, check=check)


@dataclass(frozen=True)
class Step:
    """A line of the story."""

    typed: str
    promise: str
    #: Returns what was seen; raises `AssertionError` if that is not what was promised.
    look: Callable[[Walk], str]
    within_s: float = STEP_S


@dataclass
class Outcome:
    """What became of a step."""

    step: Step
    at_s: float
    took_s: float = 0.0
    seen: str = ""
    #: ``None`` where nothing can be said.
    holds: bool | None = True


@dataclass
class Story:
    """All steps, and when it began."""

    walk: Walk
    begun: float = field(default_factory=time.monotonic)
    outcomes: list[Outcome] = field(default_factory=list)

    def tell(self, step: Step) -> Outcome:
        """Take a step; nothing that goes wrong in it ends the story."""
        begun = time.monotonic()
        outcome = Outcome(step, begun - self.begun)
        try:
            outcome.seen = step.look(self.walk)
        except NotHere as missing:
            outcome.holds, outcome.seen = None, str(missing)
        except Exception as error:  # It is told in the table, whatever it is.
            outcome.holds = False
            outcome.seen = f"{type(error).__name__}: {error}"
        outcome.took_s = time.monotonic() - begun
        if outcome.holds and outcome.took_s > step.within_s:
            outcome.holds = False
            outcome.seen += f" (but later than {step.within_s:g} s)"
        self.outcomes.append(outcome)
        return outcome


# -- the steps -------------------------------------------------------------------------------------


def comes_up(walk: Walk) -> str:
    card = walk.types("m1", "hcna up").out.strip()
    lines = card.splitlines()
    assert len(lines) <= 12, f"the card has {len(lines)} lines"
    for part in ("http://127.0.0.1:8080", "/ui", "client.key", "curl", "hcna join "):
        assert part in card, f"no {part!r} on the card"
    walk.code = walk.computer.code_in(card)
    return f"card of {len(lines)} lines: C1, page, key, sample, join code"


def joins(walk: Walk) -> str:
    told = walk.types("w1", f"hcna join {walk.code}").out
    assert "this machine is W1" in told, told
    there = walk.types("m1", "hcna workers").out
    assert re.search(r"W1\b.*online", there), there
    return f"{told.strip().splitlines()[-1].strip()}; M1 shows it online"


def runs_the_demo(walk: Walk) -> str:
    told = walk.types("m1", "hcna demo").out
    assert "all 20 ended" in told, told
    end = told[told.index("The same yourself") :]
    assert "curl" in end
    assert "Client" in end
    return next(line.strip() for line in told.splitlines() if "checks held" in line)


def closes_the_lid(walk: Walk) -> str:
    m1, w1, computer = walk.computer.m1, walk.computer.rig["w1"], walk.computer
    m1.write("/root/naps.ndjson", '{"seconds": 2}\n' * NAPS)
    ended = len(_completed_sleeps(computer))
    line = "~/hcna-ray/.venv/bin/hcna map sleep naps.ndjson > results.ndjson"
    with m1.running("bash", "-c", f"cd && {line}") as mapping:
        eventually(lambda: len(_completed_sleeps(computer)) > ended + 1, 30, "some naps are over")
        try:
            w1.pause()
            eventually(lambda: computer.state_of("W1") == "asleep", 60, "W1 asleep")
            assert "asleep" in walk.types("m1", "hcna workers").out
        finally:
            w1.resume()
        back_s = computer.until_state("W1", "online", 60)
        code = mapping.wait(90)
    lost = walk.types("m1", "hcna events --kind lost --after 0 --no-follow").out.split()
    requeued = len({word for word in lost if word.startswith("task-")})
    assert code == 0, f"hcna map ends with exit code {code}"
    results = [json.loads(line) for line in m1.read("/root/results.ndjson").splitlines()]
    assert len(results) == NAPS, f"{len(results)} results"
    assert requeued, "nothing was held by W1 when the lid closed"
    twice = [task_id for task_id, times in computer.ends().items() if times > 1]
    assert not twice, f"ended twice: {twice}"
    return (
        f"W1 asleep, {requeued} tasks requeued; back {back_s:.0f} s after waking; "
        f"{len(results)} results, no task ended twice"
    )


def _completed_sleeps(computer: Computer) -> list[object]:
    _, found = computer.api("GET", "/tasks?task_type=sleep&status=completed&limit=100")
    return list(found["tasks"])


def uses_a_notebook(walk: Walk) -> str:
    first = walk.types("m1", f"{PYTHON} - <<'END'{FIRST_CELLS}END").out
    second = AFTER_A_RESTART.replace("ID", _task_in(first))
    assert W1 in walk.types("m1", f"{PYTHON} - <<'END'{second}END").out
    return "100 results in order; a new client went on with the task of the first"


def asks_why(walk: Walk) -> str:
    task_id = _task_in(walk.types("m1", "hcna submit echo --requires gpu=9").out)
    told = " ".join(walk.types("m1", f"hcna why {task_id}").out.split())
    assert "needs gpu>=9" in told, told
    assert "W1 has" in told, told
    assert "join a worker with gpu>=9, or drop the need" in told, told
    walk.types("m1", f"hcna task cancel {task_id}")
    return told[told.index("waiting:") :]


def _task_in(text: str) -> str:
    found = _TASK.search(text)
    assert found, f"no task in: {text}"
    return found[0]


def sees_figures(walk: Walk) -> str:
    told = walk.types("m1", "hcna observe up --every 5", check=False)
    text = told.out + told.err
    if "Prometheus at" in text and "is not there" in text:
        raise NotHere("Prometheus is not installed; hcna says how to install it")
    query = "http://127.0.0.1:9090/api/v1/query?query=hcna_worker_state"
    _, took = eventually(
        lambda: json.loads(walk.types("m1", f"curl -s '{query}'").out)["data"]["result"],
        40,
        "figures of the workers in Prometheus",
    )
    return f"Prometheus has figures of the workers after {took:.0f} s"


def sees_grafana(walk: Walk) -> str:
    told = walk.types("m1", "hcna observe up --every 5", check=False)
    walk.types("m1", "hcna observe down")
    if told.ok:
        assert "/d/hcna-overview" in told.out + told.err
        return "Grafana has the dashboards"
    assert "Grafana at" in told.err, told.err
    assert "Next: " in told.err, told.err
    how = told.err.strip().splitlines()[-1].split("Next: ", 1)[1]
    raise NotHere(f"Grafana is not installed, and hcna says how: {how}")


def submits_a_ray_job(walk: Walk) -> str:
    line = "ray job submit -- python ~/hcna-ray/docs/examples/first_tasks.py"
    told = walk.types("m1", f'eval "$(hcna env)"\n{line} 2>&1').out
    assert "succeeded" in told, told
    assert f"{W1} ran" in told, told
    return "job succeeded; its tasks ran on W1"


def deploys_with_serve(walk: Walk) -> str:
    line = "cd ~/hcna-ray && serve deploy serve_config.yaml"
    walk.types("m1", f'eval "$(hcna env)"\n{line} 2>&1')
    eventually(lambda: walk.computer.api("GET", "/ready")[0] == 200, 60, "C1 ready")
    walk.types("m1", "hcna submit echo --wait")
    return "C1 deployed from the file; the next task completed"


def types_ray_up(walk: Walk) -> str:
    before = _raylets(walk)
    client = walk.computer.rig["client"]
    client.write("/root/cluster.yaml", launcher_config(walk.computer, "w1", user="root"))
    told = walk.types("client", "ray up -y cluster.yaml 2>&1").out
    assert "will not be started" not in told, told
    assert _raylets(walk) == before, "Ray was started anew"
    status = walk.types("client", "ray exec cluster.yaml 'ray status' 2>&1").out
    assert "1.0 W1" in status, status
    return "found the same cluster and changed nothing; ray status shows W1"


def _raylets(walk: Walk) -> set[int]:
    return {
        one.pid
        for host in walk.machines
        for one in host.processes()
        if "raylet/raylet" in one.command
    }


def stops(walk: Walk) -> str:
    walk.types("m1", "hcna down")
    walk.computer.until_clean(LEAVES_S, *walk.machines)
    return "no process and no port is left on either machine"


STEPS = (
    Step("hcna up", "ready in 30 s; a card of at most 12 lines", comes_up, 30),
    Step("hcna join CODE", "it is W1, and M1 says so", joins, 45),
    Step("hcna demo", "20 tasks, and the same as curl and Python", runs_the_demo, 60),
    Step("(lid of W1 closed and opened)", "every result, none twice", closes_the_lid, 180),
    Step("(two notebook kernels)", "map of 100; a new one goes on", uses_a_notebook, 30),
    Step("hcna why ID", "who lacks the GPU, and what helps", asks_why, 15),
    Step("hcna observe up", "Prometheus with data", sees_figures, 60),
    Step("hcna observe up", "Grafana with dashboards, or how to install", sees_grafana, 60),
    Step("ray job submit", "works on the same cluster", submits_a_ray_job),
    Step("serve deploy serve_config.yaml", "works on the same cluster", deploys_with_serve),
    Step("ray up cluster.yaml", "works on the same cluster", types_ray_up),
    Step("hcna down", "nothing is left", stops, 60),
)


# -- the table -------------------------------------------------------------------------------------


def table(outcomes: list[Outcome]) -> Table:
    """Return what is printed at the end: a row for each step."""
    shown = Table(title="A newcomer's first minutes", title_justify="left", show_lines=True)
    for name in ("clock", "typed", "promised", "seen"):
        shown.add_column(name, overflow="fold")
    shown.add_column("took", justify="right", no_wrap=True)
    shown.add_column("holds", no_wrap=True)
    words = {True: "yes", False: "NO", None: "not here"}
    for one in outcomes:
        minutes, seconds = divmod(round(one.at_s), 60)
        shown.add_row(
            f"{minutes}:{seconds:02d}",
            one.step.typed,
            one.step.promise,
            one.seen if len(one.seen) <= 400 else f"{one.seen[:400]} ...",
            f"{one.took_s:.1f} s",
            words[one.holds],
        )
    return shown


def main() -> int:
    # `timeout make newcomer` must not leave hosts behind: end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = Console(highlight=False, width=140, markup=False)
    with tempfile.TemporaryDirectory(prefix="newcomer-") as base:
        try:
            rig = Rig.up(("m1", "w1", "client"), base=Path(base).resolve())
        except RigUnavailable as error:
            out.print(f"{error}. Next: sudo make newcomer")
            return 1
        with rig:
            walk = Walk(Computer(rig))
            # The promise is of a warm start: what Ray reads from disk has been read before.
            out.print("one start and stop before the clock begins")
            walk.types("m1", "hcna up --wait 300 && hcna down", timeout_s=400)
            story = Story(walk)
            for step in STEPS:
                out.print(f"$ {step.typed}")
                outcome = story.tell(step)
                out.print(f"  {outcome.seen}  [{outcome.took_s:.1f} s]")
    out.print(table(story.outcomes))
    broken = [one for one in story.outcomes if one.holds is False]
    kept = sum(one.holds is True for one in story.outcomes)
    out.print(f"{kept} of {len(STEPS)} lines hold, {len(broken)} do not")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""SIGKILL to each process of the whole stack, at failpoints and at any moment, under load.

A case is an epoch: some ten kills on the same computer, one after the other, each followed by what
has to come back; then everything is drained, and the checker reads all that was left so far.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hcna_ray import failpoints
from tests.faults.programme import Case, Outcome, RunCase, Size
from tests.faults.stack import Stack, allowed, eventually, stack

LINE = "kill points, whole stack"
#: Processes by a text in their command: where, which, and how often in all.
PROCESSES = {
    "moderator": ("m1", "ray::ModeratorActor", 6),
    "c1": ("m1", "ray::ServeReplica", 3),
    "serve-controller": ("m1", "ray::ServeController", 2),
    "serve-proxy": ("m1", "ray::ProxyActor", 1),
    "haproxy-manager": ("m1", "ray::HAProxyManager", 1),
    "haproxy": ("m1", "haproxy -db -f /tmp", 2),
    "edge": ("m1", "haproxy -db -f /root", 1),
    "m1-supervisor": ("m1", "hcna_ray.supervisor --relay", 2),
    "artifacts": ("m1", "ray::ArtifactsActor", 1),
    "gcs": ("m1", "gcs_server", 3),
    "head-raylet": ("m1", "raylet/raylet", 2),
    "raylet": ("worker", "raylet/raylet", 4),
    "agent": ("worker", "ray::NodeAgent", 4),
    "slot": ("worker", "ray::slot", 4),
    "executor": ("worker", "hcna_ray.runtime.executor", 6),
    "keeper": ("worker", "supervisor/keeper.py", 2),
    "ray-agent": ("worker", "ray::DashboardAgent", 1),
    "runtime-env-agent": ("worker", "ray::RuntimeEnvAgent", 1),
    "worker-supervisor": ("worker", "hcna_ray.supervisor", 3),
}
#: Failpoints that work under load, or a restart, comes by; the others are tried without the stack.
PREFIXES = ("actor.", "agent.", "c1.", "executor.", "ledger.", "moderator.", "nursery.")
PREFIXES += ("runner.", "slot.", "store.commit.", "writer.")
LEFT_OUT = ("agent.goodbye", "agent.heavy", "ledger.schedules", "moderator.prune")
#: Points that somebody comes by after the end of another process, which is killed first.
AFTER_KILL = {
    "agent.hello.before": "agent",
    "agent.hello.answered": "agent",
    "agent.attach.received": "slot",
    "agent.gone.before": "slot",
    "agent.gone.answered": "slot",
    "moderator.rebuild.begun": "moderator",
    "moderator.rebuild.done": "moderator",
    "slot.process.begun": "slot",
    "slot.process.attached": "slot",
    "slot.executor.mourned": "executor",
    "slot.mourning.confirmed": "executor",
}
#: What goes with the head, and takes its time.
_HEAD = ("gcs", "head-raylet")
#: What a failpoint may have killed: the first of these that is gone.
_ROLES = ("moderator", "c1", "agent", "slot", "executor")
_PER_EPOCH = 12
#: How long a failpoint may wait for somebody to come by.
_REACHED_S, _RESTARTED_S = 8.0, 20.0
SLICE_KILLS = ("moderator", "executor", "c1", "slot", "agent")


class WholeKills:
    """See this module."""

    name = "whole_kills"
    title = "kill -9 of every process of the whole stack, at failpoints and at any moment"
    budget_s = 1800.0
    needs_root = True
    only_when_named = False
    side_by_side = False

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        """Return the epochs."""
        if size is Size.SLICE:
            options = {"kills": list(SLICE_KILLS), "cut": True, "workers": 1}
            return [Case(name="epoch-slice", seed=seed, options=options)]
        draw = random.Random(f"{seed}-whole")
        kills = [
            f"point:{name}"
            for name in failpoints.POINTS
            if name.startswith(PREFIXES) and not name.startswith(LEFT_OUT)
        ]
        kills += [name for name, (_, _, times) in PROCESSES.items() for _ in range(times)]
        draw.shuffle(kills)
        epochs = [kills[start : start + _PER_EPOCH] for start in range(0, len(kills), _PER_EPOCH)]
        return [
            Case(
                name=f"epoch-{number:02}",
                seed=seed * 100 + number,
                options={
                    "kills": one,
                    "failpoints": [
                        what.removeprefix("point:") for what in one if what.startswith("point:")
                    ],
                },
            )
            for number, one in enumerate(epochs, 1)
        ]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        """Bring up M1 and its workers when the first case has come."""
        with ExitStack() as opened:
            shared: list[Stack] = []

            def run(case: Case, own: Path) -> Outcome:
                if not shared:
                    hosts = [f"w{number + 1}" for number in range(case.options.get("workers", 3))]
                    one = stack(folder, seed=case.seed, workers=hosts, per_second=5.0)
                    shared.append(opened.enter_context(one))
                return run_epoch(shared[0], case, own)

            yield run


def run_epoch(on: Stack, case: Case, folder: Path) -> Outcome:
    """Kill what the case says, one after the other; then have it all checked."""
    draw = random.Random(case.seed)
    since, troubles, notes = len(on.faults), [], []
    killed = partitions = 0
    on.clients.go_on()
    for what in case.options["kills"]:
        time.sleep(draw.uniform(0.5, 3.0))
        kill = _Kill(on, draw)
        if what.startswith("point:"):
            done = kill.at_point(what.removeprefix("point:"))
        else:
            done = kill.process(what)
        killed += done
        if not done:
            notes.append(f"not reached: {what}")
        troubles += [f"{what}: {one}" for one in kill.troubles]
    if case.options.get("cut"):
        partitions = 1
        _cut(on, "w1", 12.0)
    drained = on.settle()
    out = on.judge(folder, drained, since)
    out.violations = troubles + out.violations
    out.counts = {LINE: killed}
    if partitions:
        out.counts["partitions healed within 40 s"] = partitions
    out.notes += notes
    return out


def _cut(on: Stack, host: str, for_s: float) -> None:
    fault = on.note("partition", on.workers[host], time.time())
    on.rig.partition("m1", host)
    time.sleep(for_s)
    on.rig.heal("m1", host)
    fault["until"] = time.time()
    eventually(on.all_online, 60, 0.5)


class _Kill:
    """One kill and what has to come back after it."""

    def __init__(self, on: Stack, draw: random.Random) -> None:
        self._on, self._draw = on, draw
        self.troubles: list[str] = []
        agent = PROCESSES["agent"][1]
        self._agents = {host: set(on.pids(host, agent)) for host in on.workers}

    def process(self, what: str) -> bool:
        """Kill a process at any moment."""
        on = self._on
        place, text, _ = PROCESSES[what]
        host = self._draw.choice(list(on.workers)) if place == "worker" else "m1"
        fault: dict[str, object] = {}

        def now() -> None:
            fault.update(on.note("kill", _target(what, host, on), time.time()))

        if what == "executor":
            # Any of them: the one that forks the others, idle ones, one with work.
            on.kill_one(host, text, self._draw, now)
        else:
            on.kill_one(host, text, None, now)
        if not fault:
            return False
        self._back(what, host, float(str(fault["at"])))
        return True

    def at_point(self, point: str) -> bool:
        """Have whoever comes by a failpoint first be killed there; tell whether anybody did."""
        on = self._on
        worker = self._draw.choice(list(on.workers))
        before = {role: self._numbers(role, worker) for role in _ROLES}
        hosts = ("m1", worker)
        fired = {
            host: on.arm(host, point, f"kill@{self._draw.choice((1, 1, 2, 3))}") for host in hosts
        }

        def who() -> tuple[str, float] | None:
            for host, when in fired.items():
                if at := when():
                    return host, at
            return None

        on.clients.probe(True)
        if (first := AFTER_KILL.get(point)) is not None:
            place, text, _ = PROCESSES[first]
            place = worker if place == "worker" else "m1"
            target = _target(first, place, on)
            on.kill_one(place, text, None, lambda: on.note("kill", target, time.time()))
        found = eventually(who, _RESTARTED_S if first else _REACHED_S, 0.02)
        on.disarm()
        found = found or who()
        if found is None:
            on.clients.probe(False)
            return False
        host, at = found
        role = eventually(lambda: self._gone(before, worker), 5.0, 0.05) or "executor"
        on.note("kill", _target(role, host, on), at, point=point)
        self._back(role, host, at)
        return True

    def _numbers(self, role: str, worker: str) -> set[int]:
        place, text, _ = PROCESSES[role]
        return set(self._on.pids(worker if place == "worker" else "m1", text))

    def _gone(self, before: dict[str, set[int]], worker: str) -> str | None:
        return next((role for role in _ROLES if before[role] - self._numbers(role, worker)), None)

    def _back(self, what: str, host: str, at: float) -> None:
        """Wait until what was killed is back, and say so if it does not come."""
        on = self._on
        if what in ("moderator", "c1", "serve-controller", "serve-proxy", "haproxy", *_HEAD):
            title = "moderator" if what == "moderator" else "head" if what in _HEAD else "C1"
            self._until_accepting(f"{title} killed: accepting again", at)
        if what in _HEAD:
            self._until(on.all_online, "head killed: all workers back", at)
        elif what in ("raylet", "agent", "keeper", "ray-agent"):
            self._until(lambda: self._works(host), "worker killed: works again", at)
        elif what == "worker-supervisor":
            on.computer.systemctl(host, f"start hcna-{host}")

    def _works(self, host: str) -> bool:
        """Whether a worker has another agent than before, and a slot, and M1 knows."""
        on = self._on
        agents = set(on.pids(host, PROCESSES["agent"][1]))
        changed = agents and not agents & self._agents[host]
        slots = on.pids(host, PROCESSES["slot"][1])
        return bool(changed and slots and on.workers[host] in on.online())

    def _until(self, look: Callable[[], bool], title: str, at: float) -> None:
        if eventually(look, 2 * allowed(title), 0.2):
            self._on.took(title, time.time() - at)
        else:
            self.troubles.append(f"{title}: not within {2 * allowed(title):g} s")

    def _until_accepting(self, title: str, at: float) -> None:
        on = self._on
        on.clients.probe(True)
        when = eventually(lambda: on.clients.accepted_after(at), 2 * allowed(title), 0.05)
        on.clients.probe(False)
        if when is None:
            self.troubles.append(f"{title}: not within {2 * allowed(title):g} s")
        else:
            on.took(title, when - at)


def _target(what: str, host: str, on: Stack) -> str:
    if host == "m1":
        return "moderator" if what == "moderator" else "head" if what in _HEAD else f"m1/{what}"
    name = on.workers[host]
    return name if what in ("raylet", "agent", "keeper", "ray-agent") else f"{name}/{what}"


PART = WholeKills()

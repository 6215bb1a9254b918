"""``ray up cluster.yaml`` from a third machine, and Ray's own commands on what it brought up.

One story in order: up, again, a worker more, jobs, down without a trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.rig.computer import Computer, eventually, launcher_config, measured
from tests.support.rig import Done
from tests.support.rig.testing import rig_for_tests


class Launcher:
    """Ray's launcher on the host ``client``."""

    def __init__(self, computer: Computer) -> None:
        self.computer = computer
        self.client = computer.rig["client"]

    def write_config(self, *workers: str) -> None:
        """Put the repository's cluster.yaml, with these workers, where the user is."""
        text = launcher_config(self.computer, *workers, user="hcna-admin")
        self.client.write("/home/hcna-admin/cluster.yaml", text, user="hcna-admin")

    def ray(self, arguments: str, *, timeout_s: float = 180, check: bool = True) -> Done:
        """Run a command of Ray's as a user of the third machine."""
        return self.client.sh(
            f"cd && ~/hcna-ray/.venv/bin/ray {arguments} 2>&1",
            user="hcna-admin",
            timeout_s=timeout_s,
            check=check,
        )


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with rig_for_tests(base=tmp_path_factory.mktemp("rigs").resolve()) as rig:
        yield Launcher(Computer(rig, user="hcna-admin"))


def test_up_to_the_first_result_of_w1(launcher: Launcher) -> None:
    launcher.write_config("w1")
    begun = time.monotonic()
    told = launcher.ray("up -y cluster.yaml").out
    up_s = time.monotonic() - begun
    launcher.computer.works("W1", 60)

    measured(f"(a) ray up {up_s:.1f} s, first result of W1 after {time.monotonic() - begun:.1f} s")
    assert "this machine is W1" in told
    assert "will not be started" not in told
    assert list(launcher.computer.workers()) == ["W1"]


def test_again_changes_nothing(launcher: Launcher) -> None:
    before = {one.pid for one in launcher.computer.rig["w1"].processes() if "raylet" in one.command}
    begun = time.monotonic()
    launcher.ray("up -y cluster.yaml")

    measured(f"(a) ray up again {time.monotonic() - begun:.1f} s")
    after = {one.pid for one in launcher.computer.rig["w1"].processes() if "raylet" in one.command}
    assert before
    assert before == after


def test_a_worker_more(launcher: Launcher) -> None:
    launcher.write_config("w1", "w2")
    begun = time.monotonic()
    launcher.ray("up -y cluster.yaml")
    launcher.computer.works("W2", 60)

    measured(f"(a) W2 added, its first result after {time.monotonic() - begun:.1f} s")
    assert sorted(launcher.computer.workers()) == ["W1", "W2"]


def test_rays_own_commands(launcher: Launcher) -> None:
    submitted = launcher.ray("submit cluster.yaml hcna-ray/docs/examples/first_tasks.py")
    assert "HCNA-W1--prod--home--v1.0 ran" in submitted.out
    job = launcher.ray(
        "exec cluster.yaml 'ray job submit -- python ~/hcna-ray/docs/examples/first_tasks.py'"
    )
    assert "succeeded" in job.out
    status = launcher.ray("exec cluster.yaml 'ray status'")
    assert "1.0 W1" in status.out
    assert "1.0 W2" in status.out
    serve = launcher.ray(
        "exec cluster.yaml 'cd ~/hcna-ray && serve deploy serve_config.yaml && serve status'"
    )
    assert "hcna-c1" in serve.out
    attached = launcher.client.sh(
        "echo 'hcna workers --json; exit' | ~/hcna-ray/.venv/bin/ray attach ~/cluster.yaml 2>&1",
        user="hcna-admin",
        timeout_s=60,
    )
    assert '"W2"' in attached.out
    head = launcher.ray("get-head-ip cluster.yaml")
    assert launcher.computer.m1.address in head.out
    tunnel = launcher.client.popen(
        "bash",
        "-lc",
        "cd && exec ~/hcna-ray/.venv/bin/ray dashboard cluster.yaml",
        user="hcna-admin",
    )
    try:
        eventually(
            lambda: (
                launcher.client.sh(
                    "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/", check=False
                ).out
                == "200"
            ),
            30,
            "the dashboard through the tunnel",
        )
    finally:
        launcher.client.end(tunnel)


@pytest.mark.drill
def test_a_worker_that_is_off_is_named(launcher: Launcher) -> None:
    launcher.computer.rig["w2"].unplug()
    done = launcher.ray("up -y cluster.yaml", check=False)
    launcher.computer.rig["w2"].boot()

    assert done.code != 0
    assert "W2 (10.77.0.13) cannot be reached over SSH from M1" in done.out


@pytest.mark.drill
def test_a_worker_less(launcher: Launcher) -> None:
    launcher.ray("up -y cluster.yaml")
    launcher.computer.works("W2", 60)
    launcher.write_config("w1")
    launcher.ray("up -y cluster.yaml")

    assert list(launcher.computer.workers()) == ["W1"]
    assert launcher.computer.leftovers(launcher.computer.rig["w2"]) == []
    launcher.write_config("w1", "w2")
    launcher.ray("up -y cluster.yaml")


def test_down_leaves_nothing_on_any_host(launcher: Launcher) -> None:
    begun = time.monotonic()
    launcher.ray("down -y cluster.yaml")
    launcher.computer.until_clean(120)

    measured(f"(a) ray down: all hosts clean after {time.monotonic() - begun:.1f} s")
    time.sleep(10)
    launcher.computer.until_clean(0)  # Nothing came back.

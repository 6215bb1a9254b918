"""hcna-ray on the hosts of a rig: the commands that people type, and what they would look at.

Everything goes through the hosts' own shells, C1's HTTP API and files on the hosts' disks.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tests.support.figures import note
from tests.support.read_store import query
from tests.support.rig import Done, Host, Rig

HCNA = "/root/hcna-ray/.venv/bin/hcna"
PYTHON = "/root/hcna-ray/.venv/bin/python"
HOME = "/root/.hcna"
REPOSITORY = Path(__file__).parents[2]
_STAND_INS = "/etc/stand-ins"
_DATA = Path(__file__).parent / "data"
T = TypeVar("T")
#: When `hcna down` on M1 returns, the others have said that they stopped, and their supervisors
#: leave. The rest is for a busy machine, and for the SSH of a `ray up`, which stays for 10 s.
LEAVES_S = 15.0
#: A join code as M1 prints it.
CODE = re.compile(r"HCNA-[0-9A-Z-]{40,}")


def measured(text: str) -> None:
    """Print a figure, now and at the end; the test runner repeats those lines under its table."""
    figure = f"measured: {text}"
    note(figure)
    print(figure, flush=True)  # noqa: T201


def eventually(
    look: Callable[[], T], timeout_s: float, what: str, *, pause_s: float = 0.25
) -> tuple[T, float]:
    """Look until there is something; return it and after how many seconds it was there."""
    begun = time.monotonic()
    while True:
        found = look()
        took = time.monotonic() - begun
        if found:
            return found, took
        assert took < timeout_s, f"not within {timeout_s:g} s: {what} (last: {found!r})"
        time.sleep(pause_s)


def launcher_config(computer: Computer, *workers: str, user: str) -> str:
    """Return the repository's cluster.yaml with its four lines edited, and nothing else."""
    text = (REPOSITORY / "cluster.yaml").read_text()
    addresses = ", ".join(computer.rig[name].address for name in workers)
    for line, value in (
        ("head_ip", computer.m1.address),
        ("worker_ips", f"[{addresses}]"),
        ("ssh_user", user),
        ("ssh_private_key", "~/.ssh/id_ed25519"),
    ):
        before = next(one for one in text.splitlines() if one.strip().startswith(f"{line}:"))
        text = text.replace(before, f"{before[: before.index(line)]}{line}: {value}")
    return text


class Computer:
    """The composite computer of a rig; ``m1`` is its head."""

    def __init__(self, rig: Rig, *, user: str = "root") -> None:
        self.rig = rig
        self.m1 = rig["m1"]
        self.home = "/root/.hcna" if user == "root" else f"/home/{user}/.hcna"
        #: Where C1 answers without TLS on M1's loopback.
        self.c1_port = 8080
        self._key = ""

    # -- commands ----------------------------------------------------------------------------------

    def hcna(
        self, host: str, arguments: str, *, timeout_s: float = 150, check: bool = True
    ) -> Done:
        """Run an hcna command on a host, as its root would type it."""
        return self.rig[host].sh(f"{HCNA} {arguments}", timeout_s=timeout_s, check=check)

    def code_in(self, text: str) -> str:
        """Return the join code that a command printed."""
        found = CODE.search(text)
        assert found, f"no join code in: {text}"
        return found[0]

    def invite(self, options: str = "") -> str:
        """Have M1 make a join code."""
        return self.code_in(self.hcna("m1", f"invite {options}").out)

    def join(self, host: str, options: str = "", *, code: str | None = None) -> Done:
        """Join a host."""
        return self.hcna(host, f"join {code or self.invite()} {options}")

    def install_services(self, host: str, environment: Mapping[str, str] | None = None) -> None:
        """Install what `hcna units` writes, with a stand-in for the service manager.

        Args:
            host: Where.
            environment: Variables that the services get besides.
        """
        one = self.rig[host]
        for name in ("systemctl", "journalctl"):
            one.write(f"{_STAND_INS}/{name}", (_DATA / "systemctl").read_text(), mode=0o755)
        path = f"{_STAND_INS}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        one.write("/etc/sudoers.d/stand-ins", f"Defaults secure_path={path}\n", mode=0o440)
        for home in ("/root", "/home/hcna-admin"):
            rc = one.file(f"{home}/.bashrc")
            if _STAND_INS not in rc.read_text():
                rc.write_text(f"export PATH={_STAND_INS}:$PATH\n{rc.read_text()}")
        one.sh(f"{HCNA} units --dir /etc/systemd/system")
        lines = "".join(
            f"Environment={key}={value}\n" for key, value in (environment or {}).items()
        )
        for path in one.file("/etc/systemd/system").glob("hcna-*.service"):
            path.write_text(path.read_text().replace("[Service]\n", f"[Service]\n{lines}"))
        one.at_boot("units", f"{_STAND_INS}/systemctl boot\n")

    def systemctl(self, host: str, arguments: str) -> None:
        """Run the stand-in on a host."""
        self.rig[host].sh(f"{_STAND_INS}/systemctl {arguments}", timeout_s=120)

    # -- C1 ----------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """The owner's key, read on M1."""
        if not self._key:
            self._key = self.m1.read(f"{self.home}/keys/client.key").strip()
        return self._key

    def forget_key(self) -> None:
        """Read the key anew: M1's home has been removed."""
        self._key = ""

    def api(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Ask C1, from M1; status 0 if nobody answers."""
        command = ["curl", "-q", "-s", "-m", "70", "-X", method, "-w", "\n%{http_code}"]
        command += ["-H", f"Authorization: Bearer {self.key}"]
        if body is not None:
            command += ["-d", json.dumps(body)]
        done = self.m1.run(
            *command, f"http://127.0.0.1:{self.c1_port}{path}", timeout_s=80, check=False
        )
        text, _, status = done.out.rpartition("\n")
        try:
            return int(status or 0), json.loads(text) if text else None
        except ValueError:
            return int(status or 0), text

    def submit(self, task_type: str, payload: Any, **fields: Any) -> str:
        """Submit a task; return its id."""
        body = {"task_type": task_type, "payload": payload, **fields}
        status, answer = self.api("POST", "/tasks", body)
        assert status == 202, (status, answer)
        return str(answer["task_id"])

    def task(self, task_id: str, wait_s: float = 0) -> dict[str, Any]:
        """Return a task as C1 shows it."""
        status, answer = self.api("GET", f"/tasks/{task_id}?wait={wait_s:g}")
        assert status == 200, (status, answer)
        return dict(answer)

    def completed(self, task_id: str, timeout_s: float = 60) -> dict[str, Any]:
        """Wait for a task's result."""
        found, _ = eventually(
            lambda: (one := self.task(task_id, 20))["status"] not in _OPEN and one,
            timeout_s,
            f"the end of {task_id}",
        )
        assert found
        assert found["status"] == "completed", found
        return found

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return C1's list of workers by name; {} if C1 does not answer."""
        status, answer = self.api("GET", "/workers")
        return {one["name"]: one for one in answer["workers"]} if status == 200 else {}

    def state_of(self, worker: str) -> str | None:
        """Return a worker's state."""
        return self.workers().get(worker, {}).get("state")

    def until_state(self, worker: str, state: str, timeout_s: float) -> float:
        """Wait for a worker's state; return how long it took."""
        return eventually(lambda: self.state_of(worker) == state, timeout_s, f"{worker} {state}")[1]

    def works(self, worker: str, timeout_s: float) -> float:
        """Wait until a worker completes a task that is meant for it; return how long it took."""
        begun = time.monotonic()
        task_id = self.submit("echo", {"to": worker}, requires={"worker": worker})
        task = self.completed(task_id, timeout_s)
        assert f"-{worker}--" in task["result"]["processed_by"]
        return time.monotonic() - begun

    # -- looking in --------------------------------------------------------------------------------

    def log(self, host: str, name: str) -> list[dict[str, Any]]:
        """Return the JSON lines of a log file of a host."""
        path = self.rig[host].file(f"{self.home}/logs/{name}")
        if not path.exists():
            return []
        lines = path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, host: str, name: str, message: str, after: float) -> list[dict[str, Any]]:
        """Return the lines with a message that were written after a time of day."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(after))
        return [
            line
            for line in self.log(host, name)
            if line["message"].startswith(message) and line["at"] >= stamp
        ]

    def ends(self) -> dict[str, int]:
        """Return how often each task has ended, from the store's own record."""
        sql = (
            "SELECT task.id, count(fact.number) FROM task LEFT JOIN fact"
            " ON fact.task_id = task.id"
            " AND fact.state IN ('completed', 'failed', 'cancelled', 'expired')"
            " GROUP BY task.id"
        )
        return dict(query(self.m1.file(self.home) / "queue.db", sql))

    def leftovers(self, host: Host) -> list[str]:
        """Return what of ours is still there on a host: processes, ports, sockets."""
        found = [f"process {one}" for one in host.processes() if is_ours(one.command)]
        found += [f"port {port.number}" for port in host.ports() if port.number not in (22,)]
        return found

    def until_clean(self, timeout_s: float, *hosts: Host) -> float:
        """Wait until nothing of ours is left on these hosts, or on any; return how long it took."""
        begun = time.monotonic()
        while left := {
            host.name: found for host in hosts or self.rig if (found := self.leftovers(host))
        }:
            assert time.monotonic() - begun < timeout_s, f"left after {timeout_s:g} s: {left}"
            time.sleep(0.25)
        return time.monotonic() - begun


_OPEN = ("scheduled", "queued", "running")


def is_ours(command: str) -> bool:
    """Whether a process of a host is of hcna-ray or of Ray, by its command."""
    if "tests.support.rig" in command or "sshd" in command:
        return False
    return re.search(r"ray|hcna|haproxy|serve", command) is not None

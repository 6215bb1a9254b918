"""Which ports of the rig's hosts can be reached from where, beside what the settings declare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hcna_ray.config import load_settings
from hcna_ray.supervisor.firewall import PortPlan, Range, port_plan
from tests.rig.computer import PYTHON, Computer
from tests.support.rig import Host

_DATA = Path(__file__).parent / "data"
#: The hosts' own SSH server.
SSH = 22
GATE, GCS, DASHBOARD, RAY_CLIENT, PROCESSES = 10040, 6379, 8265, 10001, (10200, 10999)
RAYLETS = (10010, 10020)
#: What nobody is to reach from another machine: port, path, and what it is.
PAGES = (
    (DASHBOARD, "/api/jobs/", "Jobs API"),
    (DASHBOARD, "/api/version", "dashboard"),
    (DASHBOARD, "/nodes?view=summary", "dashboard"),
    (10012, "/api/job_agent/jobs/", "M1's agent, Jobs API"),
    (10022, "/api/job_agent/jobs/", "the worker's agent, Jobs API"),
    (10015, "/metrics", "figures of M1's node"),
    (10016, "/metrics", "figures of the autoscaler"),
    (10017, "/metrics", "figures of the dashboard"),
    (10025, "/metrics", "figures of the worker's node"),
    (10030, "/-/healthz", "Serve's Python proxy"),
    (10032, "/stats", "statistics of Serve's HAProxy"),
    (10033, "/metrics", "figures of Serve's HAProxy"),
    (RAY_CLIENT, "/", "Ray Client"),
    (8080, "/health", "C1"),
    (10034, "/health", "C1 behind its edge"),
    (8443, "/health", "control edge"),
    (9443, "/health", "the worker's page"),
    (10100, "/health", "C1's replica"),
)


def plan(role: str) -> PortPlan:
    """What the settings of these hosts declare."""
    settings = load_settings(home=Path("/nowhere"), env={})
    return port_plan(settings, "head" if role == "m1" else "worker")


def numbers(ranges: Sequence[Range]) -> set[int]:
    """Return the ports of ranges."""
    return {port for first, last in ranges for port in range(first, last + 1)}


def outward(host: Host) -> set[int]:
    """Return the ports on which a host listens for others, as its own kernel says."""
    return {one.number for one in host.ports() if one.protocol == "tcp" and not one.on_loopback}


def scan(source: Host, at: Host) -> set[int]:
    """Try every port of a host from another one; return those that accepted."""
    source.write("/root/scan.py", (_DATA / "scan.py").read_text())
    return set(json.loads(source.sh(f"{PYTHON} /root/scan.py {at.address}", timeout_s=300).out))


def found_by_a_stranger(computer: Computer, hosts: Sequence[str]) -> str:
    """Try every port of hosts from one that belongs to nobody; it must find what is declared.

    Returns:
        The counts, for people.
    """
    count = hidden = 0
    for name in hosts:
        host = computer.rig[name]
        declared = numbers(plan(name).everybody) | {SSH}

        found = scan(computer.rig["client"], host)

        assert found == declared, (name, sorted(found - declared), sorted(declared - found))
        count += len(found)
        # Without rules all this would be there to be found.
        hidden += len(outward(host) - declared)
    assert GATE in numbers(plan("m1").everybody)
    assert count == len(hosts) + 1
    assert hidden >= 10 * len(hosts), hidden
    return (
        f"ports of {len(hosts)} hosts from a stranger: {count} reached, as declared; "
        f"{hidden} hidden"
    )


def asked_for_pages(computer: Computer, ways: Sequence[tuple[str, str]]) -> str:
    """Ask hosts for pages that nobody elsewhere may see, and M1 for its own.

    Args:
        computer: The cluster.
        ways: From which host to which.

    Returns:
        The counts, for people.
    """
    asked = [(one, other, page) for one, other in ways for page in PAGES]

    def status(ask: tuple[str, str, tuple[int, str, str]]) -> str:
        one, other, (port, path, _) = ask
        return _status(computer.rig[one], computer.rig[other].address, port, path)

    # A request that is dropped is waited for: many at once.
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(status, asked))
    assert [ask for ask, code in zip(asked, answers, strict=True) if code != "000"] == []
    # They are there: their own host reaches them.
    here = [_status(computer.m1, "127.0.0.1", port, path) for port, path, _ in PAGES]
    answered = sum(each != "000" for each in here)
    assert answered >= 8, here
    return (
        f"Jobs API, dashboard, Ray Client, pages of figures from elsewhere: {len(asked)} requests, "
        f"0 answered; on M1 itself {answered} of {len(PAGES)} answer"
    )


def _status(source: Host, address: str, port: int, path: str) -> str:
    words = ["curl", "-qs", "-m", "3", "-o", "/dev/null", "-w", "%{http_code}"]
    return source.run(*words, f"http://{address}:{port}{path}", check=False).out.strip() or "000"

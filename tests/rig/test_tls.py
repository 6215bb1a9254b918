"""Who gets in at Ray's ports, what Ray makes of other certificates, and rotation under load."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.computer import HOME, PYTHON, Computer, eventually, measured
from tests.rig.people import REFUSED, certificates, met
from tests.support.rig import Host
from tests.support.rig.testing import rig_for_tests

#: Ray restarts eight times.
pytestmark = pytest.mark.drill

DATA = Path(__file__).parent / "data"
#: Ports of M1 and of W1 that speak gRPC.
HEAD = (6379, 10010, 10011, 10013)
WORKER = (10020, 10021, 10023)


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    base = tmp_path_factory.mktemp("rigs").resolve()
    with rig_for_tests(base=base) as rig:
        made = Computer(rig)
        for host in ("m1", "w1"):
            # Strangers have to come as far as Ray itself; who else does is for test_ports.py.
            rig[host].write(f"{HOME}/hcna.yaml", "ray: {firewall: off}\n")
        made.join("w1", code=made.code_in(made.hcna("m1", "up").out))
        eventually(lambda: made.state_of("W1") == "online", 60, "W1 online")
        made.works("W1", 60)
        yield made
        made.hcna("m1", "down")


@pytest.fixture(scope="module")
def people(computer: Computer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Certificates to try, by who shows them."""
    return certificates(computer, tmp_path_factory.mktemp("people"), computer.rig["client"])


def test_only_the_right_certificate_gets_in(computer: Computer, people: dict[str, str]) -> None:
    tried = 0
    for host, ports in (("m1", HEAD), ("w1", WORKER)):
        found = met(computer.rig["client"], people, computer.rig[host], ports)
        for port in ports:
            assert found[f"{port} right"]["verdict"] == "in", found
            for person in REFUSED:
                assert found[f"{port} {person}"]["verdict"] not in ("in", ""), (port, person)
                tried += 1
    measured(f"handshakes at {len(HEAD + WORKER)} ports of Ray: {tried} refused, none let in")


def test_the_certificate_alone_is_not_enough(computer: Computer) -> None:
    one, script = computer.rig["w1"], (DATA / "no_token.py").read_text()
    one.write("/root/no_token.py", script)
    token = one.read(f"{HOME}/keys/ray.token").strip()
    call = f"{PYTHON} /root/no_token.py {computer.m1.address}:6379 {HOME}/cluster"

    assert one.sh(call).out.strip() == "UNAUTHENTICATED"
    assert one.sh(f"{call} {'0' * 64}").out.strip() == "UNAUTHENTICATED"
    assert one.sh(f"{call} {token}").out.strip() == "answered"


def test_ray_reads_its_files_when_it_starts_and_a_rotation_restarts_it(
    computer: Computer, people: dict[str, str]
) -> None:
    one = computer.rig["w1"]
    shown = met(computer.rig["client"], people, one, WORKER[:1])[f"{WORKER[0]} right"]["serial"]
    assert shown == serial_of(one)
    script = (
        "import time; from datetime import UTC, datetime; from pathlib import Path;"
        "from hcna_ray.config import load_settings; from hcna_ray.supervisor.gate_client import "
        "ask_gate; from hcna_ray.supervisor.membership import read_membership; from "
        "hcna_ray.supervisor.node_certs import ensure_member_node; s = load_settings(); "
        "m = read_membership(s.cluster_dir); ensure_member_node(s, m.name, "
        f"'{one.address}', ask=lambda body: ask_gate(m, '/v1/certificate', body), "
        "now=datetime.now(UTC), anew=True)"
    )
    one.write("/root/anew.py", script)
    one.sh(f"{PYTHON} /root/anew.py")

    # The file is another one; the processes show what they read when they started.
    assert serial_of(one) != shown
    assert (
        met(computer.rig["client"], people, one, WORKER[:1])[f"{WORKER[0]} right"]["serial"]
        == shown
    )
    # Processes that start now show the new one, and meet the old ones.
    heavy = computer.submit("echo", {}, requires={"worker": "W1", "cpu": 1})
    computer.completed(heavy, 60)

    begun = time.monotonic()
    computer.hcna("m1", "certs rotate W1")
    took = time.monotonic() - begun

    after = met(computer.rig["client"], people, one, WORKER[:1])[f"{WORKER[0]} right"]["serial"]
    assert after == serial_of(one) != shown
    computer.works("W1", 30)
    measured(f"hcna certs rotate W1: {took:.1f} s until W1 is back with its new certificate")


def serial_of(host: Host) -> str:
    from cryptography import x509

    pem = host.read(f"{HOME}/cluster/node.pem")
    return f"{x509.load_pem_x509_certificate(pem.encode()).serial_number:x}"


def test_rotation_under_load_loses_nothing(computer: Computer, people: dict[str, str]) -> None:
    one = computer.rig["w1"]
    computer.m1.write("/root/load.py", (DATA / "load.py").read_text())
    before = {name: one.read(f"{HOME}/{name}") for name in ("keys/ray.token", "cluster/trust.pem")}
    load = computer.m1.popen(PYTHON, "/root/load.py", "300", "8")
    try:
        for words in ("certs rotate --token", "certs rotate --ca"):
            begun = time.monotonic()
            computer.hcna("m1", words, timeout_s=300)
            measured(f"hcna {words} under load: {time.monotonic() - begun:.1f} s")
        out, _ = load.communicate(timeout=180)
    finally:
        Host.end(load)
    ids = json.loads(out.splitlines()[-1])
    for task_id in ids:
        computer.completed(task_id, 60)
    ends = computer.ends()
    assert [ends[task_id] for task_id in ids] == [1] * len(ids)
    for name, text in before.items():
        assert one.read(f"{HOME}/{name}") != text
    # Neither the old token nor a certificate of the old authority opens anything.
    found = met(computer.rig["client"], people, computer.m1, HEAD[:1])
    assert found[f"{HEAD[0]} right"]["verdict"] != "in"
    call = f"{PYTHON} /root/no_token.py {computer.m1.address}:6379 {HOME}/cluster"
    assert one.sh(f"{call} {before['keys/ray.token'].strip()}").out.strip() == "UNAUTHENTICATED"
    assert one.sh(f"{call} {one.read(f'{HOME}/keys/ray.token').strip()}").out.strip() == "answered"
    # M1 signs its orders under the new authority, and W1 believes them.
    long = computer.submit("sleep", {"seconds": 120}, requires={"worker": "W1"})
    eventually(lambda: computer.task(long)["status"] == "running", 30, "the task runs")
    assert computer.api("POST", f"/tasks/{long}/cancel")[0] in (200, 202)
    eventually(lambda: computer.task(long)["status"] == "cancelled", 30, "it is cancelled")
    measured(f"{len(ids)} tasks submitted during three restarts with other credentials: 0 lost")


def test_a_machine_that_missed_a_change_of_the_authority_joins_again(computer: Computer) -> None:
    computer.hcna("w1", "down")
    away = computer.hcna("m1", "certs rotate --ca", timeout_s=300)
    assert "W1 was away" in away.err
    computer.hcna("m1", "certs rotate --finish --force", timeout_s=300)

    told = computer.hcna("w1", "doctor", check=False)
    assert "hcna join with a new code" in told.err

    computer.join("w1")
    eventually(lambda: computer.state_of("W1") == "online", 60, "W1 online")
    computer.works("W1", 60)


def test_revoked_access_ends_within_a_minute(computer: Computer) -> None:
    one = computer.rig["w1"]
    token = one.read(f"{HOME}/keys/ray.token").strip()
    # A copy of all that the machine knows: what somebody who has stolen it could use.
    one.sh(f"cp -a {HOME}/cluster /root/copy")
    call = f"{PYTHON} /root/no_token.py {computer.m1.address}:6379 /root/copy {token}"
    assert one.sh(call).out.strip() == "answered"

    begun = time.monotonic()
    revoking = computer.rig["m1"].popen(
        f"{HOME}/../hcna-ray/.venv/bin/hcna", "certs", "revoke", "W1"
    )
    try:
        _, took = eventually(lambda: one.sh(call).out.strip() == "UNAUTHENTICATED", 60, "refused")
        revoking.communicate(timeout=120)
    finally:
        Host.end(revoking)

    assert took < 60
    eventually(lambda: not one.file(f"{HOME}/run/supervisor.pid").exists(), 30, "W1 stopped")
    _, told = computer.api("GET", "/admin/audit?limit=1000")
    acts = {(line["action"], line["target"]) for line in told["entries"]}
    assert acts >= {
        ("credentials.rotated", "token"),
        ("credentials.rotated", "authority"),
        ("credentials.rotated", "finish"),
        ("certificate.revoked", "W1"),
        ("member.joined", "W1"),
        ("member.removed", "W1"),
    }
    assert computer.hcna("m1", "audit verify").code == 0
    measured(
        f"revoked access refused after {took:.1f} s, all is up again after "
        f"{time.monotonic() - begun:.1f} s"
    )

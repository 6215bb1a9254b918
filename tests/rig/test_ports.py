"""What of M1 and of the workers can be reached, by whom, and what it takes to be let in there.

Every port of every host is tried, from a host that belongs to nobody and from workers. What is
found must be what the settings declare, and something must be found at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcna_ray.config import load_settings
from hcna_ray.supervisor.firewall import OF_NODES, ranges_of
from tests.rig.computer import HOME, PYTHON, Computer, eventually, is_ours, measured
from tests.rig.people import REFUSED, certificates, met
from tests.rig.reach import (
    GATE,
    GCS,
    PROCESSES,
    RAYLETS,
    SSH,
    asked_for_pages,
    found_by_a_stranger,
    numbers,
    outward,
    plan,
    scan,
)
from tests.support.rig.testing import rig_for_tests

#: Each scan of a host takes seconds, and there are a dozen; handshakes wait besides.
pytestmark = pytest.mark.drill

DATA = Path(__file__).parent / "data"
#: Calls that change nothing, by what listens there.
CALLS = {
    "GCS": "/ray.rpc.NodeInfoGcsService/GetClusterId",
    "raylet": "/ray.rpc.NodeManagerService/GetResourceLoad",
    "process": "/ray.rpc.CoreWorkerService/NumPendingTasks",
}


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    base = tmp_path_factory.mktemp("rigs").resolve()
    with rig_for_tests(base=base) as rig:
        made = Computer(rig)
        made.join("w1", code=made.code_in(made.hcna("m1", "up").out))
        made.join("w2")
        for worker in ("W1", "W2"):
            eventually(lambda w=worker: made.state_of(w) == "online", 90, f"{worker} online")
            made.works(worker, 60)
        yield made
        made.hcna("m1", "down")


def test_a_stranger_finds_the_gate_and_nothing_else(computer: Computer) -> None:
    measured(found_by_a_stranger(computer, ("m1", "w1", "w2")))


def test_a_worker_finds_what_rays_nodes_need_of_each_other(computer: Computer) -> None:
    count = 0
    for one, other in (("w1", "m1"), ("w2", "m1"), ("w2", "w1"), ("m1", "w1"), ("m1", "w2")):
        host = computer.rig[other]
        declared = numbers(plan(other).everybody) | numbers(plan(other).members) | {SSH}
        before = outward(host)

        found = scan(computer.rig[one], host)

        # Ray's own processes come and go while it takes its time.
        steady = before & outward(host) & declared
        assert steady <= found <= declared, (one, other, found)
        needed = ranges_of(
            load_settings(home=Path("/nowhere"), env={}),
            OF_NODES["head" if other == "m1" else "worker"],
        )
        reached = found & numbers(needed)
        assert len(reached) >= 4, (one, other, found)
        count += len(found)
    measured(f"ports of the hosts from members' addresses: {count} reached, all of them declared")


def test_what_is_open_to_members_takes_the_right_certificate(
    computer: Computer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, tried, let_in = computer.rig["w1"], 0, 0
    people = certificates(computer, tmp_path_factory.mktemp("people"), one)
    for name in ("m1", "w2"):
        host = computer.rig[name]
        open_ = sorted((scan(one, host) & outward(host)) - {SSH, GATE})
        assert open_, name

        found = met(one, people, host, open_)

        for port in open_:
            if port not in outward(host):
                continue  # A process of Ray that has ended.
            assert found[f"{port} right"]["verdict"] == "in", (name, port, found)
            let_in += 1
            for person in REFUSED:
                assert found[f"{port} {person}"]["verdict"] not in ("in", ""), (name, port, person)
                tried += 1
    assert let_in >= 8
    measured(
        f"handshakes from a worker's address at {let_in} open ports: {tried} without the right "
        "certificate, 0 let in"
    )


def test_and_the_right_token(computer: Computer) -> None:
    one, script = computer.rig["w1"], (DATA / "no_token.py").read_text()
    one.write("/root/no_token.py", script)
    token = one.read(f"{HOME}/keys/ray.token").strip()
    refused = answered = 0
    for name in ("m1", "w2"):
        host = computer.rig[name]
        asked = [(GCS, "GCS")] if name == "m1" else []
        asked.append((RAYLETS[0 if name == "m1" else 1], "raylet"))
        first, last = PROCESSES
        asked += [(port, "process") for port in sorted(outward(host)) if first <= port <= last]
        for port, kind in asked:
            call = f"{PYTHON} /root/no_token.py {host.address}:{port} {HOME}/cluster"
            for wrong in ("''", "0" * 64):
                said = one.sh(f"{call} {wrong} {CALLS[kind]}").out.strip()
                if kind != "process" or port in outward(host):
                    assert said == "UNAUTHENTICATED", (name, port, kind, said)
                refused += 1
            if kind != "process":
                # The call is one that is answered: it was the token that was missing.
                assert one.sh(f"{call} {token} {CALLS[kind]}").out.strip() == "answered"
                answered += 1
    assert answered == 3
    assert refused >= 6
    measured(f"calls of Ray with a certificate and no token or another: {refused}, 0 answered")


def test_a_certificate_of_another_name_is_refused_by_who_calls(computer: Computer) -> None:
    """Ray asks of who is called whether the name fits; of callers it asks the token."""
    one, port = computer.rig["w1"], 7000
    health = f". {HOME}/run/ray.env; timeout 60 {PYTHON.replace('python', 'ray')} health-check"
    one.write("/root/relay.py", (DATA / "relay.py").read_text())
    direct = f"{computer.m1.address}:{GCS}"
    assert one.sh(f"{health} --address {direct}", timeout_s=70, check=False).ok

    # In M1's place there is now another address, behind which M1 itself answers.
    relay = f"{PYTHON} /root/relay.py {port} {computer.m1.address} {GCS}"
    one.sh(f"setsid {relay} >/root/relay.out 2>&1 & echo $! >/root/relay.pid")
    eventually(lambda: port in outward(one), 20, "the relay")
    passed = one.sh(f"{health} --address {one.address}:{port}", timeout_s=70, check=False)
    one.sh("kill $(cat /root/relay.pid)")

    assert not passed.ok
    callers = one.read("/root/relay.out").split()
    assert callers  # It was reached.
    measured(f"M1's certificate at another address: refused, {len(callers)} connections")


def test_the_gate_answers_nobody_without_a_code_or_a_token(computer: Computer) -> None:
    client, count = computer.rig["client"], 0
    for authorization in ("", "Member 0", "Invite 0", "Bearer 0", "Basic Og=="):
        for method, path in (
            ("GET", "/v1/members"),
            ("POST", "/v1/preflight"),
            ("POST", "/v1/join"),
            ("POST", "/v1/beat"),
            ("POST", "/v1/certificate"),
            ("POST", "/v1/credentials"),
            ("POST", "/v1/rotate"),
            ("POST", "/v1/stopped"),
            ("POST", "/v1/leave"),
        ):
            words = ["curl", "-qsk", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}"]
            words += ["-X", method, "-H", f"Authorization: {authorization}", "-d", "{}"]
            done = client.run(*words, f"https://{computer.m1.address}:{GATE}{path}", check=False)
            # A member's token or a code comes before what else is wrong.
            assert done.out in ("400", "401", "429"), (method, path, authorization, done.out)
            count += 1
    # And in clear, or with an old TLS, there is no answer at all.
    for options in ("http", "https --tls-max 1.1"):
        scheme, _, more = options.partition(" ")
        address = f"{scheme}://{computer.m1.address}:{GATE}/v1/ca"
        assert client.sh(f"curl -qsk -m 20 {more} {address}", check=False).out == ""
    measured(f"requests to the gate without a code or a token: {count}, 0 answered")


def test_jobs_dashboard_client_and_figures_are_for_nobody_else(computer: Computer) -> None:
    ways = ("client", "m1"), ("client", "w1"), ("w1", "m1"), ("w2", "w1"), ("m1", "w2")
    measured(asked_for_pages(computer, ways))


def test_serves_haproxy_keeps_its_pages_and_its_socket_to_itself(computer: Computer) -> None:
    where = {one.number: one for one in computer.m1.ports() if one.number in (10032, 10033)}
    assert where.keys() == {10032, 10033}
    assert all(one.on_loopback for one in where.values()), where
    found = computer.m1.sh("find /tmp -name 'admin.sock*' -type s -printf '%m %p\\n'").lines
    assert found
    assert {line.split()[0] for line in found} == {"600"}, found


def test_doctor_is_content_and_says_who_is_let_in(computer: Computer) -> None:
    for host in ("m1", "w1"):
        told = json.loads(computer.hcna(host, "doctor --json", check=False).out)
        (firewall,) = [each for each in told["checks"] if each["id"] == "firewall"]
        assert firewall["level"] == "ok", firewall
        assert "table inet hcna_" in firewall["found"]
        assert told["closing"] == []
        assert [each for each in told["checks"] if each["level"] == "fail"] == []


def test_rules_that_were_flushed_are_set_again(computer: Computer) -> None:
    m1, client = computer.m1, computer.rig["client"]
    m1.sh("nft flush ruleset")
    reach = f"timeout 3 bash -c '</dev/tcp/{m1.address}/{GCS}'"
    assert client.sh(reach, check=False).ok
    _, took = eventually(lambda: "hcna_" in m1.sh("nft list tables").out, 90, "rules again")
    assert not client.sh(reach, check=False).ok
    measured(f"flushed rules were set again after {took:.1f} s")


def test_who_leaves_is_shut_out_and_down_leaves_no_rules(computer: Computer) -> None:
    m1, two = computer.m1, computer.rig["w2"]
    reach = f"timeout 3 bash -c '</dev/tcp/{m1.address}/{GCS}'"
    assert two.sh(reach, check=False).ok

    computer.hcna("w2", "leave")
    _, took = eventually(lambda: not two.sh(reach, check=False).ok, 30, "shut out")
    measured(f"a machine that left was shut out of Ray's ports {took:.1f} s later")
    assert "hcna_" not in two.sh("nft list tables").out

    # What is killed, the supervisor too, leaves its rules; whoever asks is told, and down ends it.
    one = computer.rig["w1"]

    def killed() -> bool:
        # More than once: what is killed may have started another a moment before.
        left = [str(each.inner_pid) for each in one.processes() if is_ours(each.command)]
        if left:
            one.run("kill", "-9", *left, check=False)
        return not left

    eventually(killed, 30, "killed")
    told = json.loads(computer.hcna("w1", "doctor --json", check=False).out)
    (firewall,) = [each for each in told["checks"] if each["id"] == "firewall"]
    assert firewall["level"] == "warn", firewall
    assert "no supervisor looks after it" in firewall["found"]
    assert "hcna_" in one.sh("nft list tables").out
    computer.hcna("w1", "down")
    assert "hcna_" not in one.sh("nft list tables").out

    computer.hcna("m1", "down")
    for name in ("m1", "w1", "w2"):
        eventually(
            lambda n=name: "hcna_" not in computer.rig[n].sh("nft list tables").out, 60, "no rules"
        )

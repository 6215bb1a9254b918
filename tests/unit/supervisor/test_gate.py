"""The gate over real TLS on this machine."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from hcna_ray.config import load_settings
from hcna_ray.runtime.refusals import DAY_MAX
from hcna_ray.security.acts import waiting
from hcna_ray.security.authority import (
    ensure_server,
    install_node,
    list_issued,
    request_node,
)
from hcna_ray.security.certs import load_cert, make_request, new_key
from hcna_ray.security.keys import create_key, ensure_owner_key, revoke_key
from hcna_ray.supervisor import c1_calls, gate_server
from hcna_ray.supervisor.c1_calls import drain_worker, forget_worker
from hcna_ray.supervisor.gate_client import pinned_context
from hcna_ray.supervisor.gate_protocol import (
    BODY_BYTES_MAX,
    GATE_NAME,
    GateRefused,
    Versions,
)
from hcna_ray.supervisor.invites import decode_code, revoke_invite
from hcna_ray.supervisor.membership import read_members, remove_member
from hcna_ray.supervisor.reach import Listeners
from tests.support.gates import GateRig, free_port, joining, serving
from tests.support.handshakes import connect_here


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[GateRig]:
    with serving(tmp_path) as made:
        yield made


def member(answer: dict[str, Any]) -> str:
    return f"Member {answer['member_token']}"


def raw(rig: GateRig) -> ssl.SSLSocket:
    return connect_here(pinned_context(rig.ca_pem), rig.gate.port, GATE_NAME, timeout_s=5)


def exchange(rig: GateRig, request: bytes) -> tuple[int, dict[str, Any]]:
    with raw(rig) as connection:
        connection.sendall(request)
        heard = b""
        while part := connection.recv(65536):
            heard += part
    head, _, body = heard.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


# -- join ------------------------------------------------------------------------------------------


def test_a_machine_joins_and_gets_all_it_needs(rig: GateRig) -> None:
    answer = rig.join(address=None)

    assert answer["name"] == "W1"
    assert answer["node_id"] == "HCNA-W1--prod--home--v1.0"
    assert answer["gate_port"] == rig.gate.port
    assert answer["ray_address"] == "127.0.0.1:6379"
    assert answer["ray_token"] == (rig.settings.keys_dir / "ray.token").read_text().strip()
    assert answer["ca_pem"] == rig.ca_pem
    assert answer["shared"]["ports"]["gcs"] == 6379
    assert rig.told == ["prepare W1", "forget W1", "changed"]
    (kept,) = read_members(rig.settings.cluster_dir)
    assert (kept.name, kept.hostname, kept.address) == ("W1", "host-m-1", "127.0.0.1")
    assert answer["member_token"] not in (rig.settings.cluster_dir / "members.json").read_text()


def test_who_came_and_who_was_refused_waits_to_be_put_on_record(rig: GateRig) -> None:
    rig.join()
    for _ in range(2):
        rig.refusal("/v1/join", "Invite " + "0" * 32, **joining("m-2"))

    left = [one.entry for one in waiting(rig.settings.acts_dir, 10)]

    assert [(one.principal, one.action, one.outcome) for one in left] == [
        ("owner", "invite.created", "done"),
        ("W1", "member.joined", "done"),
        ("W1", "certificate.issued", "done"),
        ("127.0.0.1", "gate.refused", "refused"),
    ]


def names_in(pem: str) -> set[str]:
    made = x509.load_pem_x509_certificate(pem.encode())
    held = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ips = {str(ip) for ip in held.get_values_for_type(x509.IPAddress)}
    return ips | set(held.get_values_for_type(x509.DNSName))


def test_a_machine_that_joins_gets_a_certificate_for_its_own_key(
    rig: GateRig, tmp_path: Path
) -> None:
    csr = request_node(tmp_path / "w", "W1")

    answer = rig.join(csr=csr, address="10.0.0.7", addresses=["10.8.0.7", "10.0.0.8"])

    node = install_node(tmp_path / "w", answer["cert_pem"], answer["trust_pem"])
    load_cert(node.pem).verify_directly_issued_by(load_cert(rig.settings.cluster_dir / "ca.pem"))
    assert {"10.0.0.7", "10.8.0.7", "127.0.0.1", "w1.hcna.internal", "localhost"} <= names_in(
        answer["cert_pem"]
    )
    (listed,) = list_issued(rig.settings.cluster_dir)
    assert (listed.name, listed.kind) == ("W1", "node")


def test_a_member_renews_its_certificate_and_gets_nobody_elses_names(rig: GateRig) -> None:
    first = rig.join("a", address="10.0.0.7", hostname="first")
    second = rig.join("b", address="10.0.0.8", hostname="second")
    asked = {
        "csr": make_request(new_key(), "W2"),
        "hostname": "first",
        "addresses": ["10.0.0.7", "10.0.0.9", "10.0.0.8", "gate.hcna.internal"],
        "address": "10.0.0.8",
    }

    answer = rig.post("/v1/certificate", member(second), **asked)
    m1s = rig.post("/v1/certificate", member(first), **asked | {"hostname": "gate.hcna.internal"})

    names = names_in(answer["cert_pem"])
    assert names == {
        "10.0.0.8",
        "10.0.0.9",
        "127.0.0.1",
        "::1",
        "localhost",
        "w2.hcna.internal",
    }
    assert "gate.hcna.internal" not in names_in(m1s["cert_pem"])
    assert "10.0.0.8" not in names_in(m1s["cert_pem"])


@pytest.mark.parametrize(
    "name",
    [
        *("c1.lab.example.org", "C1.Lab.Example.org", "hcna-c1.local", "hcna-m1", "hcna-m1.local"),
        *("m1.lab.example.org", "m1", "edge.example.org", f"{socket.gethostname()}.local"),
        *("203.0.113.5", "2001:db8::5", "203.0.113.6"),
    ],
)
def test_a_member_gets_no_name_or_address_of_c1_or_m1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "M1.lab.example.org")
    (tmp_path / "hcna.yaml").write_text(
        "composite:\n  hosts: [c1.lab.example.org, 203.0.113.5, '2001:DB8:0::5']\n"
        "  security: {enable_tls: true}\n"
    )
    with serving(tmp_path) as rig:
        # As it was made before composite.hosts was changed.
        ensure_server(
            rig.settings.cluster_dir,
            rig.settings.cluster_dir / "edge.pem",
            "C1",
            names=["edge.example.org"],
            addresses=["203.0.113.6"],
            now=datetime.now(UTC),
        )
        answer = rig.join(hostname="host-a", address="10.0.0.7")
        csr = make_request(new_key(), "W1")
        asked = {"csr": csr, "address": "10.0.0.7", "addresses": [name]}
        got = rig.post("/v1/certificate", member(answer), hostname=name, **asked)
        own = rig.post("/v1/certificate", member(answer), hostname="host-a", **asked)

    nothing_else = {"127.0.0.1", "::1", "localhost", "w1.hcna.internal", "10.0.0.7"}
    assert names_in(got["cert_pem"]) == nothing_else
    assert names_in(own["cert_pem"]) == nothing_else | {"host-a"}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "invalid_request"),
        ({"csr": "x" * 8193}, "invalid_request"),
        ({"csr": ["x"]}, "invalid_request"),
        ({"csr": "nonsense"}, "certificate_refused"),
        ({"csr": "x", "addresses": ["10.0.0.1"] * 33}, "invalid_request"),
        ({"csr": "x", "addresses": [7]}, "invalid_request"),
    ],
)
def test_a_request_for_a_certificate_that_is_none(
    rig: GateRig, fields: dict[str, object], code: str
) -> None:
    refused = rig.refusal("/v1/certificate", member(rig.join()), **fields)

    assert (refused.status, refused.code) == (400, code)


def test_nobody_but_a_member_gets_a_certificate(rig: GateRig) -> None:
    csr = make_request(new_key(), "x")
    answer = rig.join()
    remove_member(rig.settings.cluster_dir, "W1")

    assert rig.refusal("/v1/certificate", member(answer), csr=csr).code == "unknown_member"
    assert rig.refusal("/v1/certificate", rig.invitation(), csr=csr).status == 401


def test_the_second_machine_is_the_second_worker(rig: GateRig) -> None:
    assert [rig.join(machine)["name"] for machine in ("a", "b", "c")] == ["W1", "W2", "W3"]


def test_a_name_that_is_taken_is_refused_and_the_holder_named(rig: GateRig) -> None:
    rig.join("a")

    refused = rig.refusal("/v1/join", rig.invitation(), **joining("b", name="W1"))

    assert (refused.status, refused.code) == (409, "name_taken")
    assert refused.message == "W1 is taken by host-a at 127.0.0.1"
    assert "hcna leave W1" in refused.fix


def test_the_name_of_m1s_own_worker_is_taken_while_it_stays(rig: GateRig) -> None:
    rig.local = "W1"

    assert rig.refusal("/v1/join", rig.invitation(), **joining(name="W1")).code == "name_taken"
    assert rig.join()["name"] == "W2"


def test_a_name_that_is_none_is_refused(rig: GateRig) -> None:
    assert rig.refusal("/v1/join", rig.invitation(), **joining(name="M1")).code == "name_refused"


def test_the_invitation_may_hold_the_name(rig: GateRig) -> None:
    assert rig.join(authorization=rig.invitation(name="W7"))["name"] == "W7"


def test_the_same_machine_joins_again_under_its_name_with_a_new_token(rig: GateRig) -> None:
    rig.join("a")
    first = rig.join("b")
    again = rig.join("b")

    assert again["name"] == first["name"] == "W2"
    assert rig.refusal("/v1/beat", member(first), time=0.0).code == "unknown_member"
    assert rig.post("/v1/beat", member(again), time=time.time())["order"] == "up"


def test_an_answer_that_was_lost_may_be_asked_for_again(rig: GateRig) -> None:
    invitation = rig.invitation()
    rig.join("a", invitation)

    assert rig.join("a", invitation)["name"] == "W1"
    refused = rig.refusal("/v1/join", invitation, **joining("b"))
    assert (refused.status, refused.code) == (401, "invite_used")


def test_a_code_that_expired_is_told_from_one_that_is_unknown(rig: GateRig) -> None:
    expired = rig.invitation(now=time.time() - 7200)

    refused = rig.refusal("/v1/join", expired, **joining())
    assert (refused.status, refused.code) == (410, "invite_expired")
    assert "hcna invite" in refused.fix
    refused = rig.refusal("/v1/join", "Invite " + "0" * 32, **joining())
    assert (refused.status, refused.code) == (401, "invite_unknown")


def test_a_code_may_be_revoked(rig: GateRig) -> None:
    code = rig.code()
    (invite_id,) = (
        each["id"]
        for each in json.loads((rig.settings.cluster_dir / "invites.json").read_text())["invites"]
    )
    revoke_invite(rig.settings.cluster_dir, invite_id)

    refused = rig.refusal("/v1/join", f"Invite {decode_code(code).token}", **joining())
    assert refused.code == "invite_unknown"


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"versions": {"python": "3.8.1"}}, "version_mismatch", "Python is 3.8.1 here"),
        ({"versions": None}, "version_mismatch", "Ray is"),
        ({"ray_tuning_hash": "other"}, "settings_mismatch", "different settings"),
        ({"time": time.time() - 600}, "clock_skew", "s behind M1's"),
        ({"time": time.time() + 600}, "clock_skew", "s ahead of M1's"),
    ],
)
def test_a_machine_that_does_not_fit_is_refused(
    rig: GateRig, fields: dict[str, Any], code: str, says: str
) -> None:
    invitation = rig.invitation()

    refused = rig.refusal("/v1/join", invitation, **joining(**fields))

    assert (refused.status, refused.code) == (409, code)
    assert says in refused.message
    assert refused.fix
    assert rig.told == []
    assert rig.join(authorization=invitation)["name"] == "W1", "the code is not used up"


@pytest.mark.parametrize(
    "fields",
    [
        {"machine_id": None},
        {"machine_id": 7},
        {"hostname": "x" * 200},
        {"hostname": "line\nline"},
        {"time": "noon"},
        {"time": True},
    ],
)
def test_what_is_no_proper_request_to_join(rig: GateRig, fields: dict[str, Any]) -> None:
    refused = rig.refusal("/v1/join", rig.invitation(), **joining(**fields))

    assert (refused.status, refused.code) == (400, "invalid_request")


def test_a_machine_that_is_expected_gets_its_name_by_its_address(tmp_path: Path) -> None:
    nodes = [
        {"node_id": "HCNA-W1--prod--home--v1.0", "address": "10.9.9.9"},
        {"node_id": "HCNA-W5--prod--attic--v1.0", "address": "host-five"},
    ]
    with serving(tmp_path, env={"HCNA_MODERATOR__WORKER_NODES": json.dumps(nodes)}) as rig:
        five = rig.join("5", hostname="host-five")
        other = rig.join("6")

    assert (five["name"], five["node_id"]) == ("W5", "HCNA-W5--prod--attic--v1.0")
    assert other["name"] == "W2", "W1 is kept for 10.9.9.9"


def test_two_that_join_at_once_wait_for_each_other(rig: GateRig) -> None:
    both, names = threading.Barrier(2), []
    invitations = [rig.invitation(), rig.invitation()]

    def join(machine: str, invitation: str) -> None:
        both.wait(timeout=5)
        names.append(rig.join(machine, invitation)["name"])

    threads = [
        threading.Thread(target=join, args=each) for each in zip("ab", invitations, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert sorted(names) == ["W1", "W2"]


def test_m1s_own_worker_that_will_not_yield_uses_up_no_code(rig: GateRig) -> None:
    def never(name: str) -> None:
        raise RuntimeError("busy")

    invitation = rig.invitation()
    rig.prepare = never
    assert rig.refusal("/v1/join", invitation, **joining()).status == 500
    rig.prepare = None
    assert rig.join("another", invitation)["name"] == "W1"


# -- preflight -------------------------------------------------------------------------------------


def test_a_preflight_says_what_m1_is_and_changes_nothing(rig: GateRig) -> None:
    invitation = rig.invitation()
    before = time.time()

    answer = rig.post("/v1/preflight", invitation, time=before)

    assert before <= answer["time"] <= time.time()
    assert answer["seen_address"] == "127.0.0.1"
    assert answer["name"] == "W1"
    assert answer["names_taken"] == {}
    assert answer["ready"] is True
    assert answer["ports"] == {}
    assert read_members(rig.settings.cluster_dir) == ()
    assert rig.join(authorization=invitation)["name"] == "W1"


def test_a_preflight_tells_that_a_name_is_taken(rig: GateRig) -> None:
    rig.join("a")

    answer = rig.post("/v1/preflight", rig.invitation(), name="W1")

    assert answer["name_problem"]["code"] == "name_taken"
    assert answer["names_taken"] == {"W1": {"hostname": "host-a", "address": "127.0.0.1"}}


def test_a_member_may_ask_for_a_preflight(rig: GateRig) -> None:
    assert rig.post("/v1/preflight", member(rig.join()))["name"] == "W1"


def test_m1_connects_back(rig: GateRig) -> None:
    first, second, closed = free_port(), free_port(), free_port()
    with (
        Listeners([first], "right", host="127.0.0.1"),
        Listeners([second], "wrong", host="127.0.0.1"),
    ):
        answer = rig.post(
            "/v1/preflight",
            rig.invitation(),
            word="right",
            listen_ports=[first, second, closed],
            live_ports=[second],
        )
        wrong = rig.post("/v1/preflight", rig.invitation(), word="right", listen_ports=[second])

    assert {int(port): each["verdict"] for port, each in answer["ports"].items()} == {
        first: "ok",
        second: "ok",
        closed: "refused",
    }
    assert wrong["ports"][str(second)] == {"verdict": "other", "detail": "something else answers"}


def test_m1_listens_for_a_while_on_ports_of_its_processes(rig: GateRig) -> None:
    answer = rig.post("/v1/preflight", rig.invitation(), open=True, word="w")
    again = rig.post("/v1/preflight", rig.invitation(), open=True, word="w")

    last = rig.settings.port("head_processes_max")
    assert answer["opened"] == again["opened"] == [last, last - 1, last - 2]
    with socket.create_connection(("127.0.0.1", last), timeout=5) as connection:
        assert connection.recv(16) == b"w"
    rig.gate.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", last), timeout=5)


@pytest.mark.parametrize("ports", ["22", [0], [65536], [True], ["22"], list(range(1, 66))])
def test_ports_that_are_none(rig: GateRig, ports: object) -> None:
    refused = rig.refusal("/v1/preflight", rig.invitation(), listen_ports=ports)

    assert (refused.status, refused.code) == (400, "invalid_request")


# -- beats -----------------------------------------------------------------------------------------


def test_a_beat_is_remembered(rig: GateRig) -> None:
    answer = rig.join()
    silent = rig.gate.beats()["W1"]
    body = joining() | {"report": {"worker": "up"}, "time": time.time() + 4}

    told = rig.post("/v1/beat", member(answer), **body)

    assert (told["order"], told["name"], told["seen_address"]) == ("up", "W1", "127.0.0.1")
    assert told["ray_address"] == "127.0.0.1:6379"
    assert silent.last_beat_at is silent.last_beat_age_s is None
    rig.passed_s = 60
    heard = rig.gate.beats()["W1"]
    assert heard.last_beat_age_s == pytest.approx(60, abs=5)
    assert heard.clock_skew_s == pytest.approx(4, abs=1)
    assert heard.same_ray_settings is True
    assert heard.report == {"worker": "up"}


def test_other_settings_of_ray_are_noticed(rig: GateRig) -> None:
    rig.post("/v1/beat", member(rig.join()), time=time.time(), ray_tuning_hash="other")

    assert rig.gate.beats()["W1"].same_ray_settings is False


def test_a_member_that_moved_is_found_at_its_new_address(rig: GateRig) -> None:
    answer = rig.join(address="10.0.0.7")
    assert rig.gate.beats()["W1"].address == "10.0.0.7"

    rig.post("/v1/beat", member(answer), time=time.time())

    assert rig.gate.beats()["W1"].address == "127.0.0.1"


def test_a_member_that_was_removed_is_told(rig: GateRig) -> None:
    answer = rig.join()
    remove_member(rig.settings.cluster_dir, "W1")

    refused = rig.refusal("/v1/beat", member(answer), time=time.time())

    assert (refused.status, refused.code) == (401, "unknown_member")
    assert rig.gate.beats() == {}


def test_all_are_told_to_stop(rig: GateRig) -> None:
    here, away = rig.join("a"), rig.join("b")
    rig.post("/v1/beat", member(away), time=time.time())
    rig.passed_s = 60
    rig.post("/v1/beat", member(here), time=time.time())

    rig.gate.announce_down()
    assert not rig.gate.wait_all_told(0.01)
    assert rig.post("/v1/beat", member(here), time=time.time())["order"] == "down"

    assert rig.gate.wait_all_told(5.0), "the one that is away is not waited for"


def test_all_that_were_told_to_stop_are_waited_for(rig: GateRig) -> None:
    one, other = rig.join("a"), rig.join("b")
    rig.gate.announce_down()
    for each in (one, other):
        assert rig.post("/v1/beat", member(each), time=time.time())["order"] == "down"
    assert rig.gate.wait_all_told(5.0)

    rig.post("/v1/stopped", member(one))
    assert rig.gate.wait_all_stopped(0.01) == (other["name"],)
    rig.post("/v1/stopped", member(other))

    assert rig.gate.wait_all_stopped(5.0) == ()
    assert rig.refusal("/v1/stopped", "Member x").code == "unknown_member"


def test_nobody_to_tell(rig: GateRig) -> None:
    rig.gate.announce_down()

    assert rig.gate.wait_all_told(0.0)
    assert rig.gate.wait_all_stopped(0.0) == ()


# -- leaving ---------------------------------------------------------------------------------------


def test_a_leave_that_was_cut_off_leaves_no_drained_worker_behind(rig: GateRig) -> None:
    """M1 ended between its own list and the moderator's: who joins then begins anew."""
    rig.join()
    remove_member(rig.settings.cluster_dir, "W1")
    rig.told.clear()

    rig.join()
    assert rig.told == ["prepare W1", "forget W1", "changed"]

    rig.told.clear()
    rig.join()  # Again, after an answer that was lost: what was ordered since stays.
    assert "forget W1" not in rig.told


def test_a_member_leaves_in_two_steps(rig: GateRig) -> None:
    answer = rig.join()
    rig.told.clear()

    assert rig.post("/v1/leave", member(answer), drain_s=20)["drained"] is True
    assert len(read_members(rig.settings.cluster_dir)) == 1
    assert rig.post("/v1/leave", member(answer), forget=True)["forgotten"] is True

    assert rig.told == ["drain W1 20", "changed", "forget W1"]
    assert read_members(rig.settings.cluster_dir) == ()
    assert rig.refusal("/v1/leave", member(answer), forget=True).code == "unknown_member"
    assert rig.join("another")["name"] == "W1", "the name is free again"


def test_the_owner_removes_a_member(rig: GateRig) -> None:
    rig.join()
    owner = f"Bearer {ensure_owner_key(rig.settings.keys_dir, now=0.0)}"

    assert rig.refusal("/v1/leave", owner, name="W9").code == "member_not_found"
    assert rig.post("/v1/leave", owner, name="W1", forget=True)["name"] == "W1"
    assert read_members(rig.settings.cluster_dir) == ()


def test_only_an_admin_sees_the_members(rig: GateRig) -> None:
    rig.join()
    keys = rig.settings.keys_dir
    user = create_key(keys, name="somebody", role="operator", now=0.0)
    former = create_key(keys, name="former", role="admin", now=0.0)
    revoke_key(keys, "former", now=1.0)
    late = create_key(keys, name="late", role="admin", now=0.0, expires_at=1.0)
    channel = rig.channel()

    refused = [f"Bearer {key}" for key in (user, former, late, "wrong")]
    for authorization in ("", "Bearer", "Member x", *refused):
        with pytest.raises(Exception, match="this needs"):
            channel.request("GET", "/v1/members", authorization=authorization)
    owner = f"Bearer {ensure_owner_key(keys, now=0.0)}"
    (seen,) = channel.request("GET", "/v1/members", authorization=owner)["members"]
    channel.close()

    assert (seen["name"], seen["last_beat_at"]) == ("W1", None)
    assert "token_sha256" not in seen


# -- the server ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_text", "status", "code"),
    [
        ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 404, "not_found"),
        ("POST /v1/nothing HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400, "malformed_json"),
        ("POST /v1/beat HTTP/1.1\r\n\r\n", 411, "length_required"),
        ("POST /v1/beat HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411, "length_required"),
        (
            "POST /v1/beat HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
            411,
            "length_required",
        ),
        (
            f"POST /v1/beat HTTP/1.1\r\nContent-Length: {BODY_BYTES_MAX + 1}\r\n\r\n",
            413,
            "too_large",
        ),
        ("POST /v1/beat HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]", 400, "malformed_json"),
        ("POST /v1/beat HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 401, "unauthorized"),
        ("DELETE /v1/members HTTP/1.1\r\n\r\n", 501, "malformed_request"),
        ("nonsense\r\n\r\n", 400, "malformed_request"),
        (f"GET /{'x' * 70000} HTTP/1.1\r\n\r\n", 414, "malformed_request"),
    ],
)
def test_what_is_refused(rig: GateRig, request_text: str, status: int, code: str) -> None:
    closing = request_text.replace(" HTTP/1.1\r\n", " HTTP/1.1\r\nConnection: close\r\n", 1)

    got, body = exchange(rig, closing.encode())

    assert (got, body["code"], body["status"]) == (status, code, status)


def test_deep_json_is_refused(rig: GateRig) -> None:
    body = b"[" * 60000
    head = f"POST /v1/beat HTTP/1.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"

    assert exchange(rig, head.encode() + body)[0] == 400


def test_one_connection_serves_many_requests(rig: GateRig) -> None:
    channel = rig.channel()
    authorization = member(rig.join())

    for _ in range(5):
        channel.request("POST", "/v1/beat", authorization=authorization, body={"time": 0.0})
    local = channel.local_address
    channel.close()

    assert local == "127.0.0.1"


def cut_off(rig: GateRig, connection: socket.socket) -> bool:
    """Let hours pass until the gate has ended the connection."""
    connection.settimeout(0.02)
    for _ in range(250):
        rig.passed_s += 3600
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            continue
        except ConnectionResetError:
            return True
    return False


def test_who_says_nothing_is_cut_off(rig: GateRig) -> None:
    with raw(rig) as silent, socket.create_connection(("127.0.0.1", rig.gate.port)) as mute:
        assert cut_off(rig, silent)
        assert cut_off(rig, mute)


def test_one_address_cannot_take_all_connections(
    rig: GateRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_server, "CONNECTIONS_PER_ADDRESS_MAX", 2)
    first, second = raw(rig), raw(rig)

    with pytest.raises(OSError, match=r"EOF|reset|closed"):
        raw(rig)

    first.close()
    second.close()


def test_who_speaks_no_tls_does_no_harm(rig: GateRig) -> None:
    with socket.create_connection(("127.0.0.1", rig.gate.port), timeout=5) as plain:
        plain.sendall(b"GET /v1/ca HTTP/1.1\r\n\r\n")
        try:
            plain.recv(4096)
        except ConnectionResetError:
            pass

    channel = rig.channel()
    assert channel.request("GET", "/v1/ca") == {"ca_pem": rig.ca_pem}
    channel.close()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Python's own, then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_is_gone_before_the_handshake_is_no_fault(rig: GateRig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        gone = socket.create_connection(listening.getsockname())
        accepted, address = listening.accept()
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()  # With a reset, since it does not linger.

    assert rig.gate._server is not None
    rig.gate._server.finish_request(accepted, address)  # Else it raises, and is logged.


def test_the_same_refusal_is_logged_once(rig: GateRig, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        rig.refusal("/v1/beat", "Member x", time=0.0)

    assert len([line for line in caplog.records if "refused" in line.message]) == 1


def told_refusals(rig: GateRig) -> list[tuple[str, str]]:
    left = [one.entry for one in waiting(rig.settings.acts_dir, 10_000)]
    return [(one.principal, one.detail) for one in left if one.action == "gate.refused"]


def test_the_same_refusal_is_on_record_once_a_minute_and_counted(rig: GateRig) -> None:
    for _ in range(5):
        rig.gate.refused(GateRefused(401, "unknown", "who?"), "/v1/beat", "192.0.2.1")
    assert told_refusals(rig) == [("192.0.2.1", "unknown")]

    rig.passed_s += 61.0
    rig.gate.tell_refusals()
    rig.gate.tell_refusals()
    assert told_refusals(rig) == [("192.0.2.1", "unknown"), ("192.0.2.1", "unknown, 4 times")]


def test_a_flood_of_refusals_from_many_addresses_has_few_lines_and_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcna_ray.supervisor.gate.leave", lines := Leave())
    rig = GateRig(settings=load_settings(home=tmp_path, env={}))
    count = 0
    for minute in range(2):
        for _ in range(2):
            for number in range(33 * 8):
                error = GateRefused(401, f"code{number % 8}", "who?")
                rig.gate.refused(error, "/", f"192.0.2.{number // 8}")
                count += 1
        assert len(lines.told) <= 64 * (minute + 1)
        rig.passed_s += 61.0
    for _ in range(30):
        rig.gate.tell_refusals()
        rig.passed_s += 61.0
    assert sum(lines.told) == count
    assert "(others)" in lines.principals


def test_refusals_have_so_many_lines_in_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcna_ray.supervisor.gate.leave", lines := Leave())
    rig = GateRig(settings=load_settings(home=tmp_path, env={}))
    for _ in range(40):
        for number in range(64):
            rig.gate.refused(GateRefused(401, "unknown", "who?"), "/", f"192.0.2.{number}")
        rig.passed_s += 61.0
    assert len(lines.told) == DAY_MAX


def test_a_refusal_that_found_no_place_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcna_ray.supervisor.gate.leave", lines := Leave(full=True))
    rig = GateRig(settings=load_settings(home=tmp_path, env={}))
    rig.gate.refused(GateRefused(401, "unknown", "who?"), "/", "192.0.2.1")
    lines.full = False
    rig.gate.tell_refusals()
    assert lines.told == []
    rig.passed_s += 61.0
    rig.gate.tell_refusals()
    assert lines.told == [1]


class Leave:
    """Stands where acts are left: keeps of how many refusals each line tells."""

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self.told: list[int] = []
        self.principals: set[str] = set()

    def __call__(self, *_: Any, principal: str, detail: str, **__: Any) -> bool:
        if not self.full:
            _code, _, times = detail.partition(", ")
            self.told.append(int(times.removesuffix(" times") or 1))
            self.principals.add(principal)
        return not self.full


def test_a_taken_port_is_an_error(rig: GateRig, tmp_path: Path) -> None:
    other = GateRig(settings=rig.settings)

    with pytest.raises(OSError, match="in use"):
        other.gate.start()
    other.gate.stop()


def test_a_stopped_gate_leaves_its_port(tmp_path: Path) -> None:
    with serving(tmp_path) as rig:
        port = rig.gate.port
        held = raw(rig)
    rig.gate.stop()

    held.settimeout(5)
    assert held.recv(1) == b""
    held.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_versions_that_differ_are_named() -> None:
    here = Versions(python="3.11.7", ray="2.60.0", hcna_ray="0.1.0")
    there = Versions(python="3.12.1", ray="2.61.0", hcna_ray="0.2.0")

    assert here.problems(Versions(python="3.11.9", ray="2.60.0", hcna_ray="0.1.0")) == []
    assert here.problems(there) == [
        "Python is 3.11.7 here and 3.12.1 on M1",
        "Ray is 2.60.0 here and 2.61.0 on M1",
        "hcna-ray is 0.1.0 here and 0.2.0 on M1",
    ]


# -- what is asked of C1 ---------------------------------------------------------------------------


def c1(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, dict[str, Any]]) -> list[Any]:
    asked: list[Any] = []
    waiting = list(answers)

    def ask(settings: object, method: str, path: str, body: object = None) -> Any:
        asked.append((method, path, body))
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    monkeypatch.setattr(c1_calls, "ask_c1", ask)
    return asked


def test_draining_waits_until_nothing_runs(rig: GateRig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = c1(monkeypatch, (200, {"running": ["t"]}), (200, {"running": []}))

    assert drain_worker(rig.settings, "W1", 30.0) == {"drained": True, "running": 0}
    assert asked == [
        ("POST", "/workers/W1/drain", {"deadline_s": 30.0}),
        ("GET", "/workers/W1", None),
    ]


def test_draining_has_an_end(rig: GateRig, monkeypatch: pytest.MonkeyPatch) -> None:
    c1(monkeypatch, (200, {"running": ["t"]}))

    assert drain_worker(rig.settings, "W1", 0.0) == {"drained": False, "running": 1}


def test_draining_without_c1(rig: GateRig) -> None:
    assert drain_worker(rig.settings, "W1", 1.0)["drained"] is False


def test_a_worker_that_is_unknown_is_forgotten(
    rig: GateRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = c1(monkeypatch, (409, {"detail": "still online"}), (404, {}))

    assert forget_worker(rig.settings, "W1") == {"forgotten": True}
    assert asked == [("DELETE", "/workers/W1", None)] * 2

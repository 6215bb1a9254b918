"""How a machine finds its M1, over real TLS on this machine."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hcna_ray.security.authority import begin_rollover, finish_rollover
from hcna_ray.security.certs import ensure_server
from hcna_ray.supervisor.gate_client import (
    Attempt,
    Contact,
    GateChannel,
    GateUnreachable,
    ask_gate,
    find_gate,
    pinned_context,
    reach_gate,
)
from hcna_ray.supervisor.gate_protocol import GATE_NAME, GateRefused
from hcna_ray.supervisor.invites import decode_code
from hcna_ray.supervisor.membership import Membership, remove_member
from tests.support.gates import LOG, GateRig, answering, free_port, membership_of, serving


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[GateRig]:
    with serving(tmp_path / "m1") as made:
        yield made


@pytest.fixture
def joined(rig: GateRig) -> Membership:
    return membership_of(rig.join())


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def unreachable(code: str) -> GateUnreachable:
    with pytest.raises(GateUnreachable) as caught:
        find_gate(decode_code(code))
    return caught.value


# -- finding ---------------------------------------------------------------------------------------


def test_m1_is_found_by_its_code(rig: GateRig) -> None:
    found = find_gate(decode_code(rig.code()))

    assert found.channel.address == "127.0.0.1"
    assert found.channel.local_address == "127.0.0.1"
    assert found.ca_pem == rig.ca_pem
    found.channel.close()


def test_an_address_that_leads_nowhere_does_no_harm(rig: GateRig) -> None:
    # Nothing listens on ::1, so that address fails at once.
    found = find_gate(decode_code(rig.code("::1", "127.0.0.1")))

    assert found.channel.address == "127.0.0.1"
    found.channel.close()


def test_m1_that_is_down_is_told_from_a_wrong_network(rig: GateRig) -> None:
    code = rig.code()
    rig.gate.stop()

    error = unreachable(code)

    assert [attempt.kind for attempt in error.attempts] == ["refused"]
    assert str(error) == (
        f"M1 cannot be reached on port {rig.settings.port('gate')}: "
        "127.0.0.1: refused (nothing listens there, or a firewall rejects it)"
    )
    assert "hcna up" in error.fix
    silent = GateUnreachable(10040, [Attempt("10.0.0.1", "timeout", "no answer")])
    assert "sudo ufw allow 10040/tcp" in silent.fix


def test_a_card_that_does_not_lead_to_m1_is_told_from_one_that_does() -> None:
    attempts = [Attempt("127.0.0.1", "timeout", "no answer")]
    wrong = GateUnreachable(10040, attempts, "10.255.255.1")
    right = GateUnreachable(10040, attempts, "127.0.0.1")

    assert str(wrong).startswith("M1 cannot be reached from 10.255.255.1 on port 10040")
    assert wrong.fix.startswith(
        "hcna join CODE without --address, or with that of the route to M1: "
    )
    assert "sudo ufw" in right.fix


def test_another_m1_at_the_address_is_not_trusted(rig: GateRig, tmp_path: Path) -> None:
    code = decode_code(rig.code())
    with serving(tmp_path / "other") as other, pytest.raises(GateUnreachable) as caught:
        find_gate(replace(code, gate_port=other.gate.port))

    (attempt,) = caught.value.attempts
    assert (attempt.kind, attempt.detail) == (
        "wrong_machine",
        "another machine answers than the code's M1",
    )
    assert "hcna invite" in caught.value.fix


def test_the_authority_alone_is_not_enough(rig: GateRig, tmp_path: Path) -> None:
    """Who shows the right authority but has no certificate of it is found out."""
    with serving(tmp_path / "other") as other:
        other.gate._ca_pem = rig.ca_pem
        code = replace(decode_code(rig.code()), gate_port=other.gate.port)
        with pytest.raises(GateUnreachable) as caught:
            find_gate(code)

    assert caught.value.attempts[0].kind == "wrong_machine"


def test_a_certificate_of_the_authority_for_something_else_is_not_enough(rig: GateRig) -> None:
    directory = rig.settings.cluster_dir
    pair = ensure_server(
        directory,
        "w1",
        names=("w1.hcna.internal",),
        addresses=("127.0.0.1",),
        now=datetime.now(UTC),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)

    def handshake(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    with answering(handshake) as port:
        channel = GateChannel("127.0.0.1", port, pinned_context(rig.ca_pem))
        with pytest.raises(ssl.SSLCertVerificationError, match=GATE_NAME):
            channel.request("GET", "/v1/ca")


@pytest.mark.parametrize("days", [-1000, 1000])
def test_a_clock_that_is_years_off_is_named(tmp_path: Path, days: int) -> None:
    with serving(tmp_path, ahead_s=timedelta(days=days).total_seconds()) as rig:
        error = unreachable(rig.code())

    assert [attempt.kind for attempt in error.attempts] == ["clock"]
    assert "timedatectl" in error.fix


@pytest.mark.parametrize("answer", [b"", b"220 mail.example ESMTP\r\n"])
def test_something_else_on_the_port(rig: GateRig, answer: bytes) -> None:
    def say(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(answer)

    with answering(say) as port, pytest.raises(GateUnreachable) as caught:
        find_gate(replace(decode_code(rig.code()), gate_port=port))

    assert caught.value.attempts[0].kind in ("wrong_machine", "other")


def test_a_gate_that_is_none(rig: GateRig) -> None:
    """A TLS server of another kind."""
    pair = rig.settings.cluster_dir
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair / "gate.pem", pair / "gate.key")

    def page(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(4096)
            secure.sendall(b"HTTP/1.0 200 OK\r\n\r\n<html>")

    with answering(page) as port, pytest.raises(GateUnreachable) as caught:
        find_gate(replace(decode_code(rig.code()), gate_port=port))

    assert "not that of a gate" in str(caught.value)


def test_a_member_finds_its_m1(rig: GateRig, joined: Membership) -> None:
    found = reach_gate(replace(joined, m1_addresses=("::1", "127.0.0.1")))
    found.channel.close()
    rig.gate.stop()

    with pytest.raises(GateUnreachable, match="refused"):
        reach_gate(joined)


def test_a_connection_that_went_stale_is_opened_again(rig: GateRig) -> None:
    channel = rig.channel()
    channel.request("GET", "/v1/ca")
    assert rig.gate._server is not None
    rig.gate._server.close_all()

    assert channel.request("GET", "/v1/ca") == {"ca_pem": rig.ca_pem}
    with pytest.raises(GateRefused) as refused:
        channel.request("POST", "/v1/beat", authorization="Member x", body={})
    assert (refused.value.status, refused.value.code) == (401, "unknown_member")
    channel.close()


# -- staying in contact ----------------------------------------------------------------------------


def test_a_contact_beats_and_is_told(rig: GateRig, joined: Membership) -> None:
    contact = Contact(rig.settings, joined, LOG, report=lambda: {"worker": "up"}, interval_s=0.005)
    assert contact.order is None
    assert contact.last_ok_age_s is None

    contact.start()
    until(lambda: contact.order == "up")
    assert contact.last_ok_age_s is not None
    assert contact.facts["ray_address"] == "127.0.0.1:6379"
    assert rig.gate.beats()["W1"].report == {"worker": "up"}

    rig.gate.announce_down()
    assert rig.gate.wait_all_told(10)
    until(lambda: contact.order == "down")
    contact.stop()
    contact.stop()


def test_a_contact_that_was_removed(rig: GateRig, joined: Membership) -> None:
    contact = Contact(rig.settings, joined, LOG)
    assert contact.beat()
    remove_member(rig.settings.cluster_dir, "W1")

    assert not contact.beat()
    assert not contact.beat()

    assert contact.order == "removed"
    contact.stop()
    assert contact._channel is not None
    contact._channel.close()


def test_a_contact_survives_m1(rig: GateRig, joined: Membership, tmp_path: Path) -> None:
    contact = Contact(rig.settings, joined, LOG, interval_s=0.005)
    contact.start()
    until(lambda: contact.order == "up")
    rig.gate.stop()
    until(lambda: contact.trouble != "")
    assert contact.order == "up", "silence is no order"
    age_s = contact.last_ok_age_s

    env = {"HCNA_PORTS__GATE": str(rig.settings.port("gate"))}
    with serving(rig.settings.home, env=env):
        until(lambda: contact.trouble == "")
        contact.stop()

    assert age_s is not None
    assert contact.last_ok_age_s is not None


def test_a_contact_tries_every_address(rig: GateRig, joined: Membership) -> None:
    both = replace(joined, m1_addresses=("::1", "127.0.0.1"))
    contact = Contact(rig.settings, both, LOG)

    assert contact.beat()
    assert contact._in_order()[0] == "127.0.0.1", "what worked is tried first"
    assert set(both.m1_addresses) <= set(contact._in_order())
    assert contact._channel is not None
    contact._channel.close()


def test_a_contact_keeps_on_after_an_error(rig: GateRig, joined: Membership) -> None:
    failures = []

    def report() -> dict[str, object]:
        if len(failures) < 2:
            failures.append(1)
            raise RuntimeError("not ready")
        return {}

    contact = Contact(rig.settings, joined, LOG, report=report, interval_s=0.005)
    contact.start()
    until(lambda: contact.order == "up")
    contact.stop()


def test_a_contact_stops_at_once(rig: GateRig, joined: Membership) -> None:
    contact = Contact(rig.settings, replace(joined, gate_port=free_port()), LOG, interval_s=3600)
    contact.start()
    until(lambda: contact.trouble != "")
    before = threading.active_count()

    contact.stop()

    assert threading.active_count() == before - 1
    assert "refused" in contact.trouble
    assert not contact.beat()


def test_a_member_that_missed_a_change_of_the_authority_says_what_to_do(
    rig: GateRig, joined: Membership
) -> None:
    directory, now = rig.settings.cluster_dir, datetime.now(UTC)
    contact = Contact(rig.settings, joined, LOG)
    begin_rollover(directory, now=now)
    assert contact.beat()
    finish_rollover(directory, now=now)
    rig.gate.stop()
    rig.gate.start()

    assert not contact.beat()
    assert "hcna join with a new code" in contact.trouble
    with pytest.raises(GateUnreachable) as caught:
        reach_gate(joined)
    assert {attempt.kind for attempt in caught.value.attempts} == {"other_authority"}
    assert "hcna join with a new code" in caught.value.fix


def test_an_m1_that_gives_no_certificates_yet(rig: GateRig, joined: Membership) -> None:
    with pytest.raises(GateRefused, match="upgrade M1 first"):
        ask_gate(joined, "/v1/of-a-later-version", {})
    with pytest.raises(GateRefused, match="not a text in PEM"):
        ask_gate(joined, "/v1/certificate", {"csr": ""})

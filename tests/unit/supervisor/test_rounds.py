"""Rounds of credentials: announced, taken over, cut off; and who is told what."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hcna_ray import failpoints
from hcna_ray.config import NodeSecuritySettings, Settings, load_settings
from hcna_ray.security import authority
from hcna_ray.security.authority import (
    Node,
    RolloverRefused,
    ensure_trust,
    is_rolling_over,
    own_serial,
    trusted,
)
from hcna_ray.security.certs import load_cert, new_authority
from hcna_ray.security.keys import ensure_owner_key, ensure_ray_token
from hcna_ray.security.orders import OrderRefused, OrderSigner, OrderVerifier
from hcna_ray.supervisor import daemon, gate, rotation, rounds
from hcna_ray.supervisor.daemon import Bootstrap, Member, Supervisor
from hcna_ray.supervisor.gate_client import Contact, ask_gate
from hcna_ray.supervisor.invites import decode_code
from hcna_ray.supervisor.membership import (
    read_members,
    read_membership,
    remove_member,
    write_membership,
)
from hcna_ray.supervisor.node_certs import ensure_m1_node, ensure_member_node
from hcna_ray.supervisor.processes import ProcessRef, identify
from hcna_ray.supervisor.rotation import Rotation, RotationFailed
from hcna_ray.supervisor.rounds import (
    Round,
    RoundRefused,
    announce,
    complete,
    read_round,
    take_over,
    token_for_members,
)
from hcna_ray.supervisor.rounds import begin as start_round
from hcna_ray.supervisor.state import write_supervisor
from tests.support.gates import LOG, GateRig, Json, joining, membership_of, serving

NOW = 1_790_000_000.0


@pytest.fixture
def m1(tmp_path: Path) -> Settings:
    settings = load_settings(home=tmp_path / "m1", env={})
    ensure_ray_token(settings.keys_dir)
    return settings


def token(settings: Settings) -> str:
    return (settings.keys_dir / "ray.token").read_text()


def begin(settings: Settings, reason: str = "token") -> Round:
    return announce(settings.cluster_dir, settings.keys_dir, reason, now=NOW)


def end(settings: Settings) -> Round:
    return take_over(settings.cluster_dir, settings.keys_dir)


def for_members(settings: Settings) -> str:
    return token_for_members(settings.cluster_dir, settings.keys_dir)


class TestFiles:
    def test_a_new_token_is_the_members_first_and_then_m1s(self, m1: Settings) -> None:
        old = token(m1)
        assert read_round(m1.cluster_dir) == Round()
        assert for_members(m1) == old

        made = begin(m1)

        assert made == Round(number=1, reason="token", pending=True, at=NOW)
        following = for_members(m1)
        assert token(m1) == old != following
        assert end(m1) == replace(made, pending=False)
        assert token(m1) == following == for_members(m1)
        assert end(m1) == replace(made, pending=False)
        assert token(m1) == following
        for name in ("ray.token", "ray.token.next"):
            path = m1.keys_dir / name
            assert not path.exists() or path.stat().st_mode & 0o777 == 0o600

    def test_one_at_a_time(self, m1: Settings) -> None:
        begin(m1)

        with pytest.raises(RoundRefused, match="under way"):
            begin(m1)

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "x": 1}'])
    def test_a_file_that_says_nothing(self, m1: Settings, text: str) -> None:
        m1.cluster_dir.mkdir(parents=True, exist_ok=True)
        (m1.cluster_dir / "round.json").write_text(text)

        assert read_round(m1.cluster_dir) == Round()

    @pytest.mark.parametrize("point", ["round.announced", "token.taken", "round.ended"])
    def test_cut_off_it_is_ended_at_the_next_start(
        self, m1: Settings, point: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = token(m1)

        def hit(name: str) -> None:
            if name == f"credentials.{point}":
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(failpoints, "hit", hit)
            with contextlib.suppress(KeyboardInterrupt):
                begin(m1)
                end(m1)
        following = for_members(m1)

        end(m1)

        assert read_round(m1.cluster_dir).pending is False
        assert token(m1) == following != old
        assert not (m1.keys_dir / "ray.token.next").exists()


class TestAuthority:
    """A change of the authority comes with the round that it is announced in."""

    @pytest.fixture
    def ca(self, m1: Settings) -> Path:
        ensure_m1_node(m1, now=datetime.now(UTC))
        return m1.cluster_dir / "ca.pem"

    def start(self, m1: Settings, reason: str) -> Round:
        return start_round(m1.cluster_dir, m1.keys_dir, reason, now=time.time())

    @pytest.mark.parametrize("reason", ["authority", "finish"])
    @pytest.mark.parametrize(
        "point",
        [
            "credentials.round.announced",
            "certificate.rollover.begun",
            "certificate.rollover.kept",
            "certificate.rollover.signing",
            "certificate.rollover.ended",
        ],
    )
    def test_cut_off_it_is_made_up_for_before_anybody_is_served(
        self, m1: Settings, ca: Path, reason: str, point: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = load_cert(ca)
        if reason == "finish":
            self.start(m1, "authority")
            end(m1)

        class PowerCut(BaseException):
            pass

        def hit(name: str) -> None:
            if name == point:
                raise PowerCut

        with monkeypatch.context() as patched:
            patched.setattr(failpoints, "hit", hit)
            with contextlib.suppress(PowerCut):
                self.start(m1, reason)

        done = complete(m1.cluster_dir, m1.keys_dir)

        assert (done.pending, done.reason) == (False, reason)
        trust = trusted(ensure_trust(m1.cluster_dir, now=datetime.now(UTC)))
        assert load_cert(ca) != old
        assert trust == ([old, load_cert(ca)] if reason == "authority" else [load_cert(ca)])
        assert complete(m1.cluster_dir, m1.keys_dir) == done

    def test_one_that_cannot_be_is_a_restart_with_another_token(
        self, m1: Settings, ca: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object, **names: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(rounds, "begin_rollover", full)
            with pytest.raises(OSError, match="No space"):
                self.start(m1, "authority")

        # Members may have asked meanwhile: what they know must do.
        done = complete(m1.cluster_dir, m1.keys_dir)
        assert (done.number, done.reason, done.pending) == (1, "token", False)
        assert not is_rolling_over(m1.cluster_dir)

    def test_one_at_a_time_and_only_what_was_begun_is_finished(
        self, m1: Settings, ca: Path
    ) -> None:
        with pytest.raises(RolloverRefused, match="no change of the authority is under way"):
            self.start(m1, "finish")
        self.start(m1, "authority")
        end(m1)
        with pytest.raises(RolloverRefused, match="has not ended yet"):
            self.start(m1, "authority")
        assert read_round(m1.cluster_dir).number == 1


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[GateRig]:
    with serving(tmp_path / "m1") as made:
        made.gate.rotated = lambda: made.told.append("rotated")
        yield made


@pytest.fixture
def owner(rig: GateRig) -> str:
    return f"Bearer {ensure_owner_key(rig.settings.keys_dir, now=NOW)}"


@pytest.fixture
def w1(rig: GateRig, tmp_path: Path) -> Settings:
    """The home of a machine that has joined."""
    settings = load_settings(home=tmp_path / "w1", env={})
    write_membership(settings.cluster_dir, membership_of(rig.join()))
    return settings


@pytest.fixture
def member(w1: Settings) -> Iterator[Supervisor]:
    """That machine's supervisor as far as it follows M1."""
    one = Supervisor(settings=w1, log=LOG, bootstrap=Bootstrap(wanted=False))
    one.membership = read_membership(w1.cluster_dir)
    assert one.membership is not None
    one.contact = Contact(w1, one.membership, LOG)
    yield one
    one.contact.close()


@contextmanager
def running(one: Supervisor, monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[list[str]]:
    """Give a supervisor members that run, and write down in which order they are stopped."""
    done: list[str] = []
    refs = {name: ProcessRef(pid, 1) for pid, name in enumerate(names, start=2**22)}
    one.members = [
        Member(
            name=name,
            command=lambda: [],
            port=1,
            node=None if name == "edge" else name,
            process=refs[name],
            up=True,
        )
        for name in names
    ]

    def stop(processes: Any, **_: float) -> list[ProcessRef]:
        done.extend(name for name in names if refs[name] in list(processes))
        return []

    with monkeypatch.context() as patched:
        patched.setattr(daemon, "stop", stop)
        patched.setattr(Supervisor, "_say_goodbye", lambda self: done.append("goodbye"))
        patched.setattr(Supervisor, "_own_address", lambda self: "127.0.0.1")
        yield done


class TestGate:
    def test_only_the_owner_rotates(self, rig: GateRig, w1: Settings) -> None:
        membership = read_membership(w1.cluster_dir)
        assert membership is not None
        bearer = f"Member {membership.member_token}"

        assert rig.refusal("/v1/rotate", bearer, what="token").status == 401
        assert rig.refusal("/v1/rotate", "Bearer x", what="token").status == 401
        assert read_round(rig.settings.cluster_dir).number == 0

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ({"what": "sun"}, 400, "invalid_request"),
            ({}, 400, "invalid_request"),
            ({"what": "node", "name": "W9"}, 404, "member_not_found"),
        ],
    )
    def test_what_cannot_be(
        self, rig: GateRig, owner: str, body: dict[str, str], status: int, code: str
    ) -> None:
        refused = rig.refusal("/v1/rotate", owner, **body)

        assert (refused.status, refused.code) == (status, code)
        assert rig.told == []

    def test_a_second_round_waits_for_the_first(self, rig: GateRig, owner: str) -> None:
        assert rig.post("/v1/rotate", owner, what="token") == {"round": 1}
        assert rig.told == ["rotated"]

        assert rig.refusal("/v1/rotate", owner, what="authority").code == "round_refused"
        assert not is_rolling_over(rig.settings.cluster_dir)

    def test_the_old_authority_stays_while_somebody_knows_no_other(
        self, rig: GateRig, owner: str, w1: Settings
    ) -> None:
        before = rig.ca_pem
        rig.post("/v1/rotate", owner, what="authority")
        take_over(rig.settings.cluster_dir, rig.settings.keys_dir)

        refused = rig.refusal("/v1/rotate", owner, what="finish")
        assert (refused.status, refused.code) == (409, "rollover_refused")
        assert "W1 was away" in refused.message
        # Codes and members know the gate by the old one, until it is given up.
        assert rig.ca_pem == before != (rig.settings.cluster_dir / "ca.pem").read_text()
        assert decode_code(rig.code()).trusts(before)
        assert rig.post("/v1/rotate", owner, what="finish", force=True) == {"round": 2}
        assert rig.ca_pem != before
        assert decode_code(rig.code()).trusts(rig.ca_pem)
        # The gate shows a certificate of the new one; the next who asks is answered.
        assert rig.refusal("/v1/rotate", owner, what="token").code == "round_refused"

    def test_what_was_announced_is_seen_through_although_it_failed(
        self, rig: GateRig, owner: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object, **names: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(rounds, "begin_rollover", full)
        with pytest.raises(OSError, match="No space"):
            rig.gate.handle("POST", "/v1/rotate", owner, {"what": "authority"}, "127.0.0.1")

        assert rig.told == ["rotated"]
        assert read_round(rig.settings.cluster_dir).reason == "token"

    def test_who_is_removed_while_he_asks_gets_nothing(
        self, rig: GateRig, w1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        membership = read_membership(w1.cluster_dir)
        assert membership is not None
        bearer, asked = f"Member {membership.member_token}", joining()
        at_last = gate.token_for_members

        def removed(cluster_dir: Path, keys_dir: Path) -> str:
            remove_member(rig.settings.cluster_dir, "W1")
            return at_last(cluster_dir, keys_dir)

        monkeypatch.setattr(gate, "token_for_members", removed)
        assert rig.refusal("/v1/credentials", bearer, **asked).code == "unknown_member"

    def test_who_is_removed_before_he_is_certified_gets_nothing(
        self, rig: GateRig, w1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        membership = read_membership(w1.cluster_dir)
        assert membership is not None
        bearer, sign = f"Member {membership.member_token}", gate.sign_request

        def removed(*args: Any, **names: Any) -> str:
            remove_member(rig.settings.cluster_dir, "W1")
            return sign(*args, **names)

        monkeypatch.setattr(gate, "sign_request", removed)
        assert rig.refusal("/v1/certificate", bearer, **joining()).code == "unknown_member"

    def test_one_that_asks_again_and_again_leaves_the_list_to_the_others(
        self, rig: GateRig, w1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gate, "_CERTIFICATES_A_DAY_MAX", 3)
        monkeypatch.setattr(gate, "_CERTIFICATES_MAX", 4)
        membership = read_membership(w1.cluster_dir)
        assert membership is not None
        bearer, asked = f"Member {membership.member_token}", joining()
        for _ in range(2):  # It had its first one when it joined.
            rig.post("/v1/certificate", bearer, **asked)

        refused = rig.refusal("/v1/certificate", bearer, **asked)
        assert (refused.status, refused.code) == (429, "too_many_certificates")
        assert "logs/supervisor.log of W1" in refused.fix
        rig.join("another")
        rig.ahead_s = 86500.0
        rig.post("/v1/certificate", bearer, **asked)
        assert rig.refusal("/v1/certificate", bearer, **asked).code == "too_many_certificates"

    def test_the_last_places_of_the_list_are_m1s(
        self, rig: GateRig, w1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(authority, "ISSUED_MAX", gate._CERTIFICATES_SPARE + 1)
        membership = read_membership(w1.cluster_dir)
        assert membership is not None
        bearer = f"Member {membership.member_token}"

        assert rig.refusal("/v1/certificate", bearer, **joining()).code == "certificate_refused"
        ensure_m1_node(rig.settings, now=datetime.now(UTC))


class TestMember:
    def beat(self, member: Supervisor) -> None:
        assert member.contact is not None
        assert member.contact.beat()
        member._follow(member.contact.facts, member.monotonic())

    def test_it_hands_back_takes_over_and_waits_for_m1(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.beat(member)
        assert rig.gate.caught_up(0)
        rig.post("/v1/rotate", owner, what="token")
        assert not rig.gate.caught_up(1)

        with running(member, monkeypatch, "worker") as done:
            self.beat(member)

            assert done == ["goodbye", "worker"]
            assert member.members[0].process is None
            assert not member._head_is_up()
        assert read_round(w1.cluster_dir).number == 1
        assert token(w1).strip() == (rig.settings.keys_dir / "ray.token.next").read_text()
        assert Node.of(w1.cluster_dir).pem.exists()
        assert member.contact is not None
        assert member.contact.beat()
        assert rig.gate.caught_up(1)
        assert rig.gate.beats()["W1"].serial == own_serial(w1.cluster_dir)

    def test_a_change_of_the_authority_reaches_it_in_two_rounds(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        old = rig.ca_pem
        orders = OrderVerifier(w1.cluster_dir)

        def order() -> tuple[bytes, bytes]:
            """Return what M1 would sign just now."""
            return b"stop", OrderSigner(rig.settings.cluster_dir).sign(b"stop")

        before = order()
        with running(member, monkeypatch, "worker"):
            rig.post("/v1/rotate", owner, what="authority")
            orders.verify(*order())  # It has not heard of the new one yet.
            self.beat(member)
            orders.verify(*order())
            take_over(rig.settings.cluster_dir, rig.settings.keys_dir)
            new = load_cert(rig.settings.cluster_dir / "ca.pem")
            both = trusted(w1.cluster_dir / "trust.pem")
            assert member.contact is not None
            assert member.contact.beat()
            assert rig.ca_pem == old
            rig.post("/v1/rotate", owner, what="finish")
            # M1 signs with the new one, and a worker that has not heard of that yet goes on.
            orders.verify(*order())
            orders.verify(*before)
            member._next_follow_at = 0.0
            self.beat(member)
        orders.verify(*order())
        with pytest.raises(OrderRefused, match="does not know"):
            orders.verify(*before)
        assert new in both
        assert len(both) == 2
        assert trusted(w1.cluster_dir / "trust.pem") == [new]
        membership = read_membership(w1.cluster_dir)
        assert membership is not None
        assert membership.ca_pem == rig.ca_pem
        load_cert(Node.of(w1.cluster_dir).pem).verify_directly_issued_by(new)
        assert member.contact is not None
        assert member.contact.beat()

    def test_one_machine_alone_gets_another_certificate(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with running(member, monkeypatch, "worker") as done:
            member._certify()
            self.beat(member)
            before = own_serial(w1.cluster_dir)
            told = rig.post("/v1/rotate", owner, what="node", name="W1")
            assert told == {"name": "W1", "serial": before}
            old_token = rig.settings.keys_dir / "ray.token"
            kept = old_token.read_text()

            self.beat(member)
            self.beat(member)

            assert own_serial(w1.cluster_dir) != before
            assert done == ["goodbye", "worker"]
        assert old_token.read_text() == kept
        assert rig.gate.beats()["W1"].serial == own_serial(w1.cluster_dir)

    def test_a_certificate_that_m1_does_not_give_stops_no_worker(
        self,
        rig: GateRig,
        owner: str,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with running(member, monkeypatch, "worker") as done:
            member._certify()
            self.beat(member)
            rig.post("/v1/rotate", owner, what="node", name="W1")
            monkeypatch.setattr(gate, "_CERTIFICATES_A_DAY_MAX", 0)
            self.beat(member)
            assert done == []

    def test_its_file_is_another_one_only_when_the_worker_has_ended(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whoever waits for the new serial number must not take the old worker for the new one."""
        with running(member, monkeypatch, "worker"):
            member._certify()
            self.beat(member)
            before, at_stop = own_serial(w1.cluster_dir), []
            monkeypatch.setattr(
                Supervisor,
                "_stop_worker",
                lambda self, why: at_stop.append(own_serial(w1.cluster_dir)),
            )
            rig.post("/v1/rotate", owner, what="node", name="W1")
            self.beat(member)
        assert at_stop == [before]
        assert own_serial(w1.cluster_dir) != before

    @pytest.mark.parametrize("what", ["node", "token"])
    def test_what_m1_says_meanwhile_is_not_followed_twice(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
        what: str,
    ) -> None:
        """To end a worker takes seconds; the beats go on, and tell of what is on the disk."""
        contact = member.contact
        assert contact is not None
        with running(member, monkeypatch, "worker"):
            member._certify()
            self.beat(member)
            stops: list[str] = []

            def stop_worker(self: Supervisor, why: str) -> None:
                stops.append(why)
                assert contact.beat()

            monkeypatch.setattr(Supervisor, "_stop_worker", stop_worker)
            rig.post("/v1/rotate", owner, what=what, name="W1")
            self.beat(member)
            serial = own_serial(w1.cluster_dir)
            for later in (10.0, 20.0):
                member._follow(contact.facts, member.monotonic() + later)
                assert contact.beat()
        assert len(stops) == 1
        assert own_serial(w1.cluster_dir) == serial
        assert contact.facts["renew"] is contact.facts["stale"] is False

    def test_authorities_that_are_not_named_stop_no_worker(
        self, rig: GateRig, member: Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running(member, monkeypatch, "worker") as done:
            member._certify()
            assert member.contact is not None
            assert member.contact.beat()
            member._follow({**member.contact.facts, "trust": "0" * 64}, 0.0)
            assert done == []

    def test_who_shows_a_certificate_of_his_own_is_not_told_to_renew_it(
        self, rig: GateRig, owner: str, member: Supervisor
    ) -> None:
        contact = member.contact
        assert contact is not None
        security = NodeSecuritySettings(
            enable_mtls=True, cert_path=Path("a"), key_path=Path("b"), ca_path=Path("c")
        )
        worker = contact.settings.worker.model_copy(update={"security": security})
        contact.settings = contact.settings.model_copy(update={"worker": worker})
        assert contact.beat()

        refused = rig.refusal("/v1/rotate", owner, what="node", name="W1")

        assert (refused.status, refused.code) == (409, "own_certificate")
        assert "hcna down && hcna up" in refused.fix
        assert rig.gate.beats()["W1"].own_certificate
        assert contact.beat()
        assert contact.facts["renew"] is False

    def test_other_authorities_reach_it_without_a_round(
        self,
        rig: GateRig,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with running(member, monkeypatch, "worker") as done:
            member._certify()
            self.beat(member)
            assert done == []
            # M1's owner names an authority of the house in its settings.
            directory, now = rig.settings.cluster_dir, datetime.now(UTC)
            _, house = new_authority(now)
            (directory / "own-ca.pem").write_text(house)
            bundle = ensure_trust(directory, now=now)

            self.beat(member)

            assert trusted(w1.cluster_dir / "trust.pem") == trusted(bundle)
            assert done == ["goodbye", "worker"]
            member._next_follow_at = 0.0
            self.beat(member)
            assert done == ["goodbye", "worker"]

    def test_a_token_that_is_not_the_rounds_is_replaced(
        self, rig: GateRig, w1: Settings, member: Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After a restore on M1 a number may mean another token."""
        with running(member, monkeypatch, "worker") as done:
            self.beat(member)
            assert done == []
            w1.keys_dir.mkdir(parents=True, exist_ok=True)
            (w1.keys_dir / "ray.token").write_text("f" * 64)
            self.beat(member)
            assert done == ["goodbye", "worker"]
            assert token(w1).strip() == token(rig.settings).strip()
            member._next_follow_at = 0.0
            self.beat(member)
            assert done == ["goodbye", "worker"]

    def test_credentials_of_a_round_that_begins_meanwhile_are_asked_for_again(
        self, rig: GateRig, w1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """M1's supervisor may announce one by itself, while the gate answers."""
        membership = read_membership(w1.cluster_dir)
        assert membership is not None
        at_last = gate.token_for_members

        def announced(cluster_dir: Path, keys_dir: Path) -> str:
            announce(cluster_dir, keys_dir, "certificates", now=NOW)
            return at_last(cluster_dir, keys_dir)

        monkeypatch.setattr(gate, "token_for_members", announced)
        answer = rig.post("/v1/credentials", f"Member {membership.member_token}", **joining())
        assert answer["round"] == 0

    def test_an_answer_that_lacks_something_changes_nothing(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        rig.post("/v1/rotate", owner, what="token")
        monkeypatch.setattr(daemon, "ask_gate", lambda *args: {"cert_pem": "x", "trust_pem": "y"})
        with running(member, monkeypatch, "worker") as done:
            self.beat(member)
            assert done == []
        assert "lacks ray_token" in caplog.text
        assert not (w1.keys_dir / "ray.token").exists()

    def test_m1_away_it_tries_again(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        rig.post("/v1/rotate", owner, what="token")
        assert member.contact is not None
        assert member.contact.beat()
        facts = member.contact.facts
        rig.gate.stop()

        with running(member, monkeypatch, "worker") as done:
            member._follow(facts, member.monotonic())

        # What it has goes on working until it can have something else.
        assert done == []
        assert read_round(w1.cluster_dir).number == 0


class TestStopping:
    """The whole cluster stops: M1 tells the others, and waits until they say that they have."""

    def test_a_machine_says_so_wherever_m1_is_by_now(
        self, rig: GateRig, member: Supervisor
    ) -> None:
        assert member.contact is not None
        assert member.membership is not None
        assert member.contact.beat()
        member.membership = replace(member.membership, m1_addresses=("::1",))
        rig.gate.announce_down()
        assert member.contact.beat()
        assert rig.gate.wait_all_told(5)
        assert rig.gate.wait_all_stopped(0) == ("W1",)

        member._obey(member.contact.order)
        member.stop_all()

        assert rig.gate.wait_all_stopped(5) == ()

    def test_m1_names_who_does_not(
        self, rig: GateRig, member: Supervisor, caplog: pytest.LogCaptureFixture
    ) -> None:
        m1 = Supervisor(settings=rig.settings, log=LOG, bootstrap=Bootstrap(wanted=False))
        m1.gate = rig.gate
        assert member.contact is not None
        rig.gate.announce_down()
        assert member.contact.beat()
        assert rig.gate.wait_all_told(5)

        m1._wait_for_the_others(m1.monotonic() - 3600)

        assert "W1 was told to stop and has not said that it has" in caplog.text

    def test_an_m1_that_is_gone_by_then_keeps_nobody(
        self, rig: GateRig, member: Supervisor, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        rig.gate.stop()

        member._say_stopped()

        assert "M1 was not told that this machine has stopped" in caplog.text


class TestM1:
    def test_it_waits_for_its_members_and_then_starts_anew(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        settings, clock = rig.settings, [1000.0]
        m1 = Supervisor(
            settings=settings,
            log=LOG,
            bootstrap=Bootstrap(wanted=False),
            monotonic=lambda: clock[0],
        )
        m1.gate = rig.gate
        assert member.contact is not None
        assert member.contact.beat()
        old = token(settings)
        rig.post("/v1/rotate", owner, what="token")
        with running(m1, monkeypatch, "head", "worker", "edge") as done:
            m1._lead_round(clock[0])
            assert done == []
            assert token(settings) == old

            with running(member, monkeypatch, "worker"):
                member._follow(member.contact.facts, 0.0)
                assert member.contact.beat()
                member._follow(member.contact.facts, 10.0)
                assert member.contact.beat()
            m1._lead_round(clock[0])

            assert done[0] == "goodbye"
            assert set(done) == {"goodbye", "head", "worker"}
        assert token(settings) != old
        assert token(settings).strip() == token(w1).strip()
        assert not read_round(settings.cluster_dir).pending
        assert not m1._round_announced.is_set()
        facts = member.contact.facts
        assert facts["hold"] is True
        assert member.contact.beat()
        assert member.contact.facts["hold"] is False

    def test_it_does_not_wait_for_ever(
        self,
        rig: GateRig,
        owner: str,
        w1: Settings,
        member: Supervisor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        m1 = Supervisor(settings=rig.settings, log=LOG, bootstrap=Bootstrap(wanted=False))
        m1.gate = rig.gate
        assert member.contact is not None
        assert member.contact.beat()
        rig.post("/v1/rotate", owner, what="token")
        with running(m1, monkeypatch, "head") as done:
            m1._lead_round(1000.0)
            m1._lead_round(1019.0)
            assert done == []
            m1._lead_round(1020.0)
            assert done == ["head"]

    def test_a_full_disk_puts_it_off(
        self, rig: GateRig, owner: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        m1 = Supervisor(settings=rig.settings, log=LOG, bootstrap=Bootstrap(wanted=False))
        m1.gate = rig.gate
        rig.post("/v1/rotate", owner, what="token")
        m1.round_announced()

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with running(m1, monkeypatch, "head"):
            with monkeypatch.context() as patched:
                patched.setattr(daemon, "take_over", full)
                m1._lead_round(1000.0)
                m1._lead_round(1001.0)
            assert m1._round_announced.is_set()
            assert read_round(rig.settings.cluster_dir).pending
            m1._lead_round(1003.5)
        assert not m1._round_announced.is_set()
        assert not read_round(rig.settings.cluster_dir).pending


class TestRenewal:
    """Ray's processes hold what they read when they started, long after it was renewed."""

    def renewed(self, settings: Settings, one: Supervisor, *, left_days: float) -> None:
        """Have the certificate be renewed, and what runs hold one that ends in some days."""
        ensure_m1_node(settings, now=datetime.now(UTC))
        for member in one.members:
            if member.node is not None:
                member.certificate_ends_at = time.time() + left_days * 86400

    def test_a_worker_starts_again_by_itself(
        self, member: Supervisor, w1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running(member, monkeypatch, "worker") as done:
            member._replace_old_nodes()
            self.renewed(w1, member, left_days=16)
            member._replace_old_nodes()
            assert done == []
            self.renewed(w1, member, left_days=14)
            member._replace_old_nodes()
            assert done == ["goodbye", "worker"]

    def test_on_m1_that_is_a_round(self, m1: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        one = Supervisor(settings=m1, log=LOG, bootstrap=Bootstrap(wanted=False))
        with running(one, monkeypatch, "head", "edge"):
            self.renewed(m1, one, left_days=16)
            one._replace_old_nodes()
            assert not one._round_announced.is_set()
            self.renewed(m1, one, left_days=14)
            one._replace_old_nodes()
            one._replace_old_nodes()
        assert one._round_announced.is_set()
        assert read_round(m1.cluster_dir).number == 1
        assert read_round(m1.cluster_dir).reason == "certificates"

    def test_only_the_one_that_it_holds_counts(
        self, member: Supervisor, w1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A laptop gets another file with every network, and none of them starts the wait anew."""
        path = Node.of(w1.cluster_dir).pem
        with running(member, monkeypatch, "worker") as done:
            for moved in range(3):
                self.renewed(w1, member, left_days=16 - moved)
                os.utime(path)
            member._replace_old_nodes()
            assert done == ["goodbye", "worker"]
            # What the file holds is no better.
            done.clear()
            member.members[0].process = ProcessRef(2**22, 1)
            self.renewed(w1, member, left_days=95)
            member._replace_old_nodes()
            assert done == []

    @pytest.mark.parametrize("ends_at", [7.5, None])
    def test_what_runs_is_adopted_with_what_it_holds_unless_it_is_in_clear(
        self, member: Supervisor, ends_at: float | None
    ) -> None:
        me = identify(os.getpid())

        def planned() -> list[Member]:
            nodes = {"head": "M1", "worker": "W1", "edge": None}
            return [
                Member(name=name, command=lambda: [], port=1, node=node)
                for name, node in nodes.items()
            ]

        head, worker, edge = member.members = planned()
        head.process, worker.process, edge.process = me, None, me
        head.certificate_ends_at = ends_at
        member._record()

        head, worker, edge = found = planned()
        member._adopt(found)

        assert [head.process, worker.process, edge.process] == (
            [me, None, me] if ends_at else [None, None, None]
        )
        assert head.certificate_ends_at == ends_at

    def test_a_round_that_cannot_be_announced_ends_nothing(
        self, m1: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = Supervisor(settings=m1, log=LOG, bootstrap=Bootstrap(wanted=False))

        def full(*args: object, **names: object) -> None:
            raise OSError(28, "No space left on device")

        with running(one, monkeypatch, "head"):
            self.renewed(m1, one, left_days=14)
            monkeypatch.setattr(daemon, "announce", full)
            one._replace_old_nodes()
        assert not one._round_announced.is_set()


class TestRotation:
    """What the command sees through; between two looks the machines do their part."""

    @pytest.fixture
    def states(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """What C1 says of the workers."""
        known = {"W1": "online"}

        def ask_c1(settings: Settings, method: str, path: str) -> tuple[int, Json]:
            if path == "/workers":
                return 200, {"workers": [{"name": name} for name in known]}
            name = path.removeprefix("/workers/")
            return (200, {"state": known[name]}) if name in known else (404, {})

        monkeypatch.setattr(rotation, "ask_c1", ask_c1)
        return known

    @pytest.fixture
    def do(
        self,
        rig: GateRig,
        owner: str,
        member: Supervisor,
        states: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> Iterator[Rotation]:
        """A rotation on an M1 that runs; each pause lets W1 beat and M1 come up again."""
        settings, clock, said = rig.settings, [0.0], rig.told
        ensure_m1_node(settings, now=datetime.now(UTC))
        me = identify(os.getpid())
        assert me is not None
        write_supervisor(settings.run_dir, me)
        assert member.contact is not None
        contact = member.contact
        monkeypatch.setattr(member, "_certify", functools.partial(certify_here, member))
        member._certify()
        contact.beat()

        def pause(seconds: float) -> None:
            clock[0] += seconds
            if "away" in said:
                return
            contact.beat()
            member._follow(contact.facts, clock[0] * 10)
            contact.beat()
            if read_round(settings.cluster_dir).pending and rig.gate.caught_up(
                read_round(settings.cluster_dir).number
            ):
                end(settings)
                ensure_m1_node(settings, now=datetime.now(UTC), anew=True)

        with running(member, monkeypatch, "worker"):
            yield Rotation(
                settings,
                on_step=said.append,
                wait_s=30,
                sleep=pause,
                monotonic=lambda: clock[0],
            )

    def test_one_machine(self, do: Rotation, rig: GateRig, w1: Settings) -> None:
        before, kept = own_serial(w1.cluster_dir), token(rig.settings)

        do.one("W1")

        assert own_serial(w1.cluster_dir) != before
        assert token(rig.settings) == kept
        assert do.restarts == 0
        assert rig.told[-1] == "W1 has another certificate"

    def test_all_machines_one_after_the_other(
        self, do: Rotation, rig: GateRig, w1: Settings
    ) -> None:
        mine, theirs = own_serial(rig.settings.cluster_dir), own_serial(w1.cluster_dir)

        do.each()

        assert own_serial(rig.settings.cluster_dir) != mine
        assert own_serial(w1.cluster_dir) != theirs
        assert (do.round, do.restarts) == (1, 1)
        steps = [step for step in rig.told if "W1 has another" in step or "restarts" in step]
        assert steps[0] == "W1 has another certificate"

    def test_the_authority_in_two_restarts(self, do: Rotation, rig: GateRig, w1: Settings) -> None:
        old = rig.ca_pem

        do.authority()

        assert (do.round, do.restarts) == (2, 2)
        new = load_cert(rig.settings.cluster_dir / "ca.pem")
        assert rig.ca_pem != old
        for home in (rig.settings, w1):
            node = Node.of(home.cluster_dir)
            assert trusted(node.trust) == [new]
            load_cert(node.pem).verify_directly_issued_by(new)
        assert token(rig.settings).strip() == token(w1).strip()

    def test_a_machine_that_is_away(self, do: Rotation, rig: GateRig) -> None:
        rig.told.append("away")
        rig.passed_s = 60.0

        with pytest.raises(RotationFailed, match="not all is up again within 30 s"):
            do.all("token")
        with pytest.raises(RotationFailed, match="under way") as caught:
            do.all("token")
        assert caught.value.fix == "hcna certs list"
        with pytest.raises(RotationFailed, match="no machine has joined as 'W9'"):
            do.one("W9")

    def test_a_worker_that_does_not_come_back(self, do: Rotation, states: dict[str, str]) -> None:
        states["W1"] = "gone"

        with pytest.raises(RotationFailed, match="W1 did not come back") as caught:
            do.one("W1")
        assert caught.value.fix == "hcna status"

    def test_a_member_is_removed(self, do: Rotation, rig: GateRig) -> None:
        do.remove("W1")

        assert read_members(rig.settings.cluster_dir) == ()
        assert "forget W1" in rig.told

    def test_a_gate_that_does_not_answer(self, do: Rotation, rig: GateRig) -> None:
        rig.gate.stop()

        with pytest.raises(RotationFailed, match="M1's gate does not answer"):
            do.one("W1")


def certify_here(
    one: Supervisor, *, anew: bool = False, on_answer: Callable[[Json], None] = lambda answer: None
) -> None:
    """Look after a member's certificate, on whatever machine this is."""
    membership = one.membership
    assert membership is not None
    ensure_member_node(
        one.settings,
        membership.name,
        "127.0.0.1",
        ask=lambda body: ask_gate(membership, "/v1/certificate", body),
        now=datetime.now(UTC),
        anew=anew,
        on_answer=on_answer,
    )

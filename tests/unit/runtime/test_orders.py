"""Orders between M1 and a worker: real signatures, real channels, and the bytes that travel."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import pickle
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.config import NodeSecuritySettings, Settings
from hcna_ray.core.models import HEAVY_SLOT, Token
from hcna_ray.runtime import orders, wire
from hcna_ray.runtime.keyring import cipher_of, guard_of
from hcna_ray.runtime.messages import (
    Exchange,
    Grant,
    Heartbeat,
    Hello,
    IntentOrder,
    Offer,
    Stop,
    Welcome,
)
from hcna_ray.runtime.orders import CipherMismatch, OrderDesk, OrderGuard
from hcna_ray.security.certs import ensure_ca
from hcna_ray.security.cipher import CipherUnready, MessageRefused
from hcna_ray.security.orders import OrderRefused, OrderSigner, OrderVerifier
from tests.support.builders import T0

NOW = datetime.now(UTC)
TOKEN, SHARED = "ab" * 32, "cd" * 32
STOP = Stop("t1", Token(1, 1), 0, "cancelled")
OFFER = Offer("t1", "echo", Token(1, 1), b"{}", 60.0, None, None, None)
INTENT = IntentOrder(
    {"msg_id": "m1", "intent": "test.ping", "payload": {"word": "canary"}, "ts": T0, "n": 1}
)
TELEMETRY = {"schema": "hcna.telemetry.v1", "payload": {"cpu_percent": 97.25, "word": "canary"}}
WELCOME = Welcome(
    moderator_node_id="HCNA-M1--prod--home--v1.0", generation=1, lease_ttl_s=30.0, heartbeat_s=5.0
)


def an_exchange(seq: int = 1, **changes: Any) -> Exchange:
    given: dict[str, Any] = {"worker": "W1", "incarnation": "a", "slot": HEAVY_SLOT, "seq": seq}
    return Exchange(**{**given, **changes})


def a_hello(**changes: Any) -> Hello:
    given: dict[str, Any] = {
        **{"worker": "W1", "node_id": "HCNA-W1", "incarnation": "a", "address": "10.0.0.2"},
        **{"cpu": 4.0, "mem_gb": 8.0, "gpu": 0.0, "resources": (), "labels": ()},
        **{"task_types": ("echo",), "sent_at": T0},
    }
    return Hello(**{**given, **changes})


class Cluster:
    """M1's desk and W1's guard, each with a home of its own, and a wire between them."""

    def __init__(self, folder: Path, m1: dict[str, Any], w1: dict[str, Any]) -> None:
        self.m1, self.w1 = Settings(home=folder / "m1"), Settings(home=folder / "w1")
        ensure_ca(self.m1.cluster_dir, now=NOW)
        ca_pem = (self.m1.cluster_dir / "ca.pem").read_text()
        self.w1.cluster_dir.mkdir(parents=True)
        joined = {"schema": 1, "ca_pem": ca_pem, "member_token": TOKEN}
        (self.w1.cluster_dir / "membership.json").write_text(json.dumps(joined))
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        members = {"schema": 1, "members": [{"name": "W1", "token_sha256": digest}]}
        (self.m1.cluster_dir / "members.json").write_text(json.dumps(members))
        for settings in (self.m1, self.w1):
            settings.keys_dir.mkdir(parents=True)
            (settings.keys_dir / "bpcs.key").write_text(SHARED)
            (settings.keys_dir / "bpcs.key").chmod(0o600)
        self.elapsed = 0.0
        self.desk = OrderDesk(
            OrderSigner(self.m1.cluster_dir),
            cipher_of(self.m1, NodeSecuritySettings(**m1)),
            elapsed=lambda: self.elapsed,
        )
        self.how = NodeSecuritySettings(**w1)
        self.guard = self.a_guard()

    def a_guard(self) -> OrderGuard:
        return guard_of(self.w1, cipher_of(self.w1, self.how))

    def say_hello(self, hello: Hello | None = None) -> Hello:
        """Begin a session; return the hello as it travelled."""
        sent = self.guard.hello(hello or a_hello())
        self.desk.check_hello(sent)
        self.guard.welcomed(sent, self.desk.welcome(sent, WELCOME))
        return sent

    def sent(self, grant: Grant, exchange: Exchange | None = None) -> bytes:
        """Return a grant as it travels."""
        return wire.pack_grant(self.desk.send(exchange or an_exchange(), grant))

    def received(self, raw: bytes, exchange: Exchange | None = None, took_s: float = 0.1) -> Grant:
        """Return what the worker makes of it."""
        return self.guard.receive(exchange or an_exchange(), wire.unpack_grant(raw), took_s)

    def beat(self, **changes: Any) -> Heartbeat:
        """Return a heartbeat as it travels."""
        clear = Heartbeat(
            worker="W1", incarnation="a", telemetry=TELEMETRY, slots=4, unanswered_s=0.25
        )
        sealed = self.guard.seal_heartbeat(dataclasses.replace(clear, **changes))
        travelled: Heartbeat = pickle.loads(pickle.dumps(sealed))
        return travelled


Make = Callable[..., Cluster]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(m1: dict[str, Any] | None = None, w1: dict[str, Any] | None = None) -> Cluster:
        return Cluster(tmp_path, m1 or {}, w1 or {})

    return made


BPCS = [{"enable_bpcs": True, "bpcs_key_exchange": how} for how in ("diffie-hellman", "pre-shared")]


@pytest.fixture(params=BPCS, ids=["diffie-hellman", "pre-shared"])
def sealed(make: Make, request: pytest.FixtureRequest) -> Cluster:
    """A cluster that seals its messages, after the first hello."""
    cluster = make(request.param, request.param)
    cluster.say_hello()
    return cluster


# -- signatures ------------------------------------------------------------------------------------


def test_orders_of_m1_are_carried_out(make: Make) -> None:
    cluster = make()
    grant = Grant(seq=1, stops=(STOP,), intents=(INTENT,), offers=(OFFER,))
    found = cluster.received(cluster.sent(grant))
    assert (found.stops, found.intents, found.offers) == ((STOP,), (INTENT,), (OFFER,))
    assert cluster.guard.refused == (0, "")


def test_a_grant_without_orders_is_not_signed(make: Make) -> None:
    cluster = make()
    grant = Grant(seq=1, offers=(OFFER,))
    assert cluster.desk.send(an_exchange(), grant) is grant
    assert cluster.received(wire.pack_grant(grant)).offers == (OFFER,)


def test_orders_without_a_signature_are_refused_and_said(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = make()
    raw = wire.pack_grant(Grant(seq=1, stops=(STOP,), intents=(INTENT,), offers=(OFFER,)))
    with caplog.at_level(logging.ERROR, logger="hcna_ray"):
        for _ in range(5):
            found = cluster.received(raw)
    assert (found.stops, found.intents, found.offers) == ((), (), (OFFER,))
    (record,) = caplog.records  # Five times would be a way to fill the disk.
    assert record.action == "order.refused"  # type: ignore[attr-defined]
    assert "bring M1 to the same version" in record.getMessage()
    assert cluster.guard.refused[0] == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda grant: dataclasses.replace(grant, stops=(STOP._replace(task_id="t2"),)),
        lambda grant: dataclasses.replace(grant, stops=(STOP._replace(token=Token(1, 2)),)),
        lambda grant: dataclasses.replace(grant, stops=(*grant.stops, STOP)),
        lambda grant: dataclasses.replace(grant, stops=()),
        lambda grant: dataclasses.replace(grant, intents=()),
        lambda grant: dataclasses.replace(
            grant, intents=(IntentOrder({**INTENT.envelope, "intent": "self.destruct"}),)
        ),
        lambda grant: dataclasses.replace(grant, offers=(OFFER,)),
        lambda grant: dataclasses.replace(grant, hello=True),
        lambda grant: dataclasses.replace(grant, proof=grant.proof[:-1]),
        lambda grant: dataclasses.replace(grant, proof=b"x"),
    ],
)
def test_a_changed_grant_is_refused(make: Make, change: Callable[[Grant], Grant]) -> None:
    cluster = make()
    grant = cluster.desk.send(an_exchange(), Grant(seq=1, stops=(STOP,), intents=(INTENT,)))
    with pytest.raises(OrderRefused):
        cluster.received(wire.pack_grant(change(grant)))
    assert cluster.guard.refused[0] == 1


@pytest.mark.parametrize(
    "asked",
    [
        an_exchange(2),
        an_exchange(incarnation="b"),
        an_exchange(worker="W2"),
        an_exchange(slot=0),
    ],
    ids=["number", "incarnation", "worker", "slot"],
)
def test_a_captured_grant_answers_no_other_question(make: Make, asked: Exchange) -> None:
    cluster = make()
    captured = cluster.sent(Grant(seq=1, stops=(STOP,), intents=(INTENT,)))
    with pytest.raises(OrderRefused):
        cluster.received(captured, asked)
    # Nor with the number written into it that was asked for.
    renumbered = dataclasses.replace(wire.unpack_grant(captured), seq=asked.seq)
    with pytest.raises(OrderRefused):
        cluster.received(wire.pack_grant(renumbered), asked)


def test_an_intent_that_took_too_long_is_refused_whatever_the_clocks_say(make: Make) -> None:
    cluster = make()
    raw = cluster.sent(Grant(seq=1, stops=(STOP,), intents=(INTENT,)))
    found = cluster.received(raw, took_s=3600.0)
    # A stop is good for its attempt alone, and so however late: the laptop may have slept.
    assert (found.stops, found.intents) == ((STOP,), ())
    assert "3600 s on its way" in cluster.guard.refused[1]


def test_another_m1_is_not_believed(make: Make, tmp_path: Path) -> None:
    cluster = make()
    ensure_ca(tmp_path / "other", now=NOW)
    other = OrderDesk(OrderSigner(tmp_path / "other"), None, elapsed=lambda: 0.0)
    hello = cluster.guard.hello(a_hello())
    with pytest.raises(OrderRefused, match="hcna join with a new code"):
        cluster.guard.welcomed(hello, other.welcome(hello, WELCOME))
    raw = wire.pack_grant(other.send(an_exchange(), Grant(seq=1, stops=(STOP,))))
    with pytest.raises(OrderRefused):
        cluster.received(raw)


def test_a_welcome_is_good_for_its_own_hello(make: Make) -> None:
    cluster = make()
    hello = cluster.guard.hello(a_hello())
    captured = cluster.desk.welcome(hello, dataclasses.replace(WELCOME, generation=9))
    cluster.guard.welcomed(hello, captured)
    for later in (a_hello(sent_at=T0 + 1), a_hello(incarnation="b"), a_hello(worker="W2")):
        with pytest.raises(OrderRefused):
            cluster.guard.welcomed(later, captured)
    with pytest.raises(OrderRefused):
        cluster.guard.welcomed(hello, dataclasses.replace(captured, generation=10))


def test_a_slot_checks_its_stops_too(make: Make) -> None:
    cluster = make()
    asked = an_exchange(slot=3)
    raw = cluster.sent(Grant(seq=1, stops=(STOP,), offers=(OFFER,)), asked)
    assert guard_of(cluster.w1).receive(asked, wire.unpack_grant(raw), 0.1).stops == (STOP,)


# -- rolling upgrade -------------------------------------------------------------------------------


class _Old:
    """A message of an older version: it lacks what came later."""

    def __init__(self, message: Any, *missing: str) -> None:
        for field in dataclasses.fields(message):
            if field.name not in missing:
                setattr(self, field.name, getattr(message, field.name))


def test_an_older_worker_goes_on(make: Make) -> None:
    cluster = make()
    hello: Any = _Old(a_hello(), "cipher")
    cluster.desk.check_hello(hello)
    assert cluster.desk.welcome(hello, WELCOME).generation == 1


def test_an_older_m1_is_named_with_the_next_step(make: Make) -> None:
    cluster = make()
    welcome: Any = _Old(WELCOME, "cipher", "proof")
    with pytest.raises(OrderRefused, match="bring M1 to the same version"):
        cluster.guard.welcomed(a_hello(), welcome)


# -- the message cipher ----------------------------------------------------------------------------


def test_sealed_intents_answers_and_telemetry_come_across(sealed: Cluster) -> None:
    grant = Grant(seq=1, intents=(INTENT,), stops=(STOP,))
    assert sealed.received(sealed.sent(grant)).intents == (INTENT,)
    answered = an_exchange(2, answers=(("m1", {"pong": True}),))
    raw = wire.pack_exchange(sealed.guard.seal_answers(answered))
    assert sealed.desk.open_answers(wire.unpack_exchange(raw)) == answered
    opened = sealed.desk.open_heartbeat(sealed.beat())
    assert opened is not None
    assert opened.telemetry == TELEMETRY


def test_what_is_captured_cannot_be_read(sealed: Cluster) -> None:
    answered = an_exchange(2, answers=(("m1", {"word": "canary"}),))
    for captured in (
        sealed.sent(Grant(seq=1, intents=(INTENT,))),
        wire.pack_exchange(sealed.guard.seal_answers(answered)),
        pickle.dumps(sealed.beat()),
    ):
        assert b"canary" not in captured
        assert b"test.ping" not in captured
        assert b"cpu_percent" not in captured


def test_captured_telemetry_cannot_be_changed(sealed: Cluster) -> None:
    captured = sealed.beat()
    box = captured.telemetry["box"]
    for place in range(len(box)):
        other = box[:place] + bytes([box[place] ^ 1]) + box[place + 1 :]
        with pytest.raises(MessageRefused):
            sealed.desk.open_heartbeat(
                dataclasses.replace(captured, telemetry={**captured.telemetry, "box": other})
            )
    for change in (
        {"unanswered_s": 0.0},
        {"trouble": "full"},
        {"slots": 0},
        {"began": (("t1", Token(1, 1), T0),)},
    ):
        with pytest.raises(MessageRefused):
            sealed.desk.open_heartbeat(dataclasses.replace(captured, **change))
    assert sealed.desk.open_heartbeat(captured) is not None


def test_captured_telemetry_cannot_be_sent_again(sealed: Cluster) -> None:
    captured = sealed.beat()
    assert sealed.desk.open_heartbeat(captured) is not None
    with pytest.raises(MessageRefused, match="again"):
        sealed.desk.open_heartbeat(captured)
    sealed.say_hello()
    with pytest.raises(MessageRefused):
        sealed.desk.open_heartbeat(captured)  # Nor in the next session.
    assert sealed.desk.open_heartbeat(sealed.beat()) is not None


#: A hello's half of a channel as anybody can make one up.
FORGED = bytes([9]) + bytes(31)


def test_a_hello_that_comes_twice_or_from_elsewhere_parts_nobody(sealed: Cluster) -> None:
    hello = sealed.guard.hello(a_hello())
    sealed.guard.welcomed(hello, sealed.desk.welcome(hello, WELCOME))
    for forged in (hello, dataclasses.replace(hello, cipher=FORGED)):
        sealed.desk.welcome(forged, WELCOME)  # Before anything has come through the channel,
    assert sealed.desk.open_heartbeat(sealed.beat()) is not None
    for forged in [hello, dataclasses.replace(hello, cipher=FORGED, incarnation="b")] * 20:
        sealed.desk.welcome(forged, WELCOME)  # and afterwards.
    assert sealed.desk.open_heartbeat(sealed.beat()) is not None
    assert sealed.received(sealed.sent(Grant(seq=1, intents=(INTENT,)))).intents == (INTENT,)
    answered = sealed.guard.seal_answers(an_exchange(2, answers=(("m1", {"pong": True}),)))
    assert sealed.desk.open_answers(answered).answers == (("m1", {"pong": True}),)


def test_a_hello_that_nobody_forged_changes_the_channel(sealed: Cluster) -> None:
    assert sealed.desk.open_heartbeat(sealed.beat()) is not None
    old = sealed.beat()
    sealed.say_hello()
    # M1 seals with the channel before until it has heard something through the new one.
    assert sealed.received(sealed.sent(Grant(seq=1, intents=(INTENT,)))).intents == (INTENT,)
    assert sealed.desk.open_heartbeat(sealed.beat()) is not None
    with pytest.raises(MessageRefused):
        sealed.desk.open_heartbeat(old)
    exchange = an_exchange(2)
    raw = sealed.sent(Grant(seq=2, intents=(INTENT,)), exchange)
    assert sealed.received(raw, exchange).intents == (INTENT,)


def test_what_hellos_offer_is_bounded(sealed: Cluster) -> None:
    for _ in range(3 * orders.OFFERED_MAX):
        sealed.say_hello()
    assert len(sealed.desk._channels["W1"].offered) == orders.OFFERED_MAX
    assert sealed.desk.open_heartbeat(sealed.beat()) is not None
    assert sealed.desk._channels["W1"].offered == []


def test_a_captured_intent_cannot_be_sent_again(sealed: Cluster) -> None:
    captured = sealed.sent(Grant(seq=1, intents=(INTENT,)))
    assert sealed.received(captured).intents == (INTENT,)
    assert sealed.received(captured).intents == ()  # The signature is good, the seal is not.
    with pytest.raises(OrderRefused):
        sealed.received(captured, an_exchange(2))


def test_a_lost_answer_is_sealed_anew(sealed: Cluster) -> None:
    grant = Grant(seq=1, intents=(INTENT,))
    sealed.sent(grant)
    assert sealed.received(sealed.sent(grant)).intents == (INTENT,)


def test_telemetry_in_clear_is_refused(sealed: Cluster) -> None:
    clear = Heartbeat(worker="W1", incarnation="a", telemetry=TELEMETRY)
    with pytest.raises(OrderRefused, match="not sealed"):
        sealed.desk.open_heartbeat(clear)
    with pytest.raises(OrderRefused, match="not sealed"):
        sealed.desk.open_answers(an_exchange(answers=(("m1", {"pong": True}),)))


def test_an_intent_in_clear_is_refused(sealed: Cluster) -> None:
    grant = Grant(seq=1, intents=(INTENT,))
    exchange = an_exchange()
    proof = sealed.desk._signer.sign(orders._grant_message(exchange, grant))
    found = sealed.received(wire.pack_grant(dataclasses.replace(grant, proof=proof)))
    assert found.intents == ()
    assert "not sealed" in sealed.guard.refused[1]


def test_a_new_moderator_asks_for_a_hello(sealed: Cluster) -> None:
    sealed.desk._channels.clear()  # It has begun anew, and knows of no session.
    assert sealed.desk.open_heartbeat(sealed.beat()) is None
    answered = sealed.guard.seal_answers(an_exchange(answers=(("m1", {"pong": True}),)))
    assert sealed.desk.open_answers(answered).answers == ()
    assert sealed.desk.send(an_exchange(), Grant(seq=1, intents=(INTENT,))).hello
    sealed.say_hello()
    assert sealed.desk.open_heartbeat(sealed.beat()) is not None


def test_before_the_hello_nothing_leaves_in_clear(sealed: Cluster) -> None:
    sealed.guard = sealed.a_guard()
    assert sealed.beat().telemetry == {}
    answered = sealed.guard.seal_answers(an_exchange(answers=(("m1", {"word": "canary"}),)))
    assert answered.answers == ()


def test_another_incarnation_has_no_channel(sealed: Cluster) -> None:
    assert sealed.desk.open_heartbeat(sealed.beat(incarnation="b")) is None


def test_another_worker_cannot_take_part_in_its_name(sealed: Cluster, tmp_path: Path) -> None:
    impostor = Settings(home=tmp_path / "impostor")
    impostor.cluster_dir.mkdir(parents=True)
    joined = json.loads((sealed.w1.cluster_dir / "membership.json").read_text())
    joined["member_token"] = "00" * 32
    (impostor.cluster_dir / "membership.json").write_text(json.dumps(joined))
    impostor.keys_dir.mkdir()
    (impostor.keys_dir / "bpcs.key").write_text(SHARED)
    (impostor.keys_dir / "bpcs.key").chmod(0o600)
    sealed.guard = guard_of(impostor, cipher_of(impostor, sealed.how))
    sealed.say_hello()
    with pytest.raises(MessageRefused):
        sealed.desk.open_heartbeat(sealed.beat())


@pytest.mark.parametrize(("m1", "w1"), [(BPCS[0], {}), ({}, BPCS[0])], ids=["m1", "w1"])
def test_one_side_alone_says_what_to_set_where(
    make: Make, m1: dict[str, Any], w1: dict[str, Any]
) -> None:
    cluster = make(m1, w1)
    with pytest.raises(CipherMismatch, match=r"enable_bpcs: true in hcna\.yaml of (W1|M1)"):
        cluster.say_hello()


def test_two_ways_to_a_key_do_not_meet(make: Make) -> None:
    cluster = make(BPCS[0], BPCS[1])
    cluster.say_hello()  # Both halves look alike; what is sealed does not open.
    with pytest.raises(MessageRefused):
        cluster.desk.open_heartbeat(cluster.beat())


def test_without_a_shared_key_the_next_step_is_named(make: Make) -> None:
    cluster = make(BPCS[1], BPCS[1])
    (cluster.w1.keys_dir / "bpcs.key").unlink()
    with pytest.raises(CipherUnready, match="openssl rand"):
        cluster.say_hello()


def test_without_the_cipher_nothing_is_sealed(make: Make) -> None:
    cluster = make()
    cluster.say_hello()
    assert cluster.desk.open_heartbeat(cluster.beat()) == cluster.beat()
    assert cluster.beat().telemetry == TELEMETRY


# -- bounds ----------------------------------------------------------------------------------------


def test_what_m1_has_not_put_on_record_is_told_again_later(make: Make) -> None:
    cluster = make()
    now = [0.0]
    guard = OrderGuard(
        OrderVerifier(cluster.w1.cluster_dir), None, patience_s=60.0, elapsed=lambda: now[0]
    )
    raw = wire.pack_grant(Grant(seq=1, stops=(STOP,)))
    assert guard.to_tell() is None
    guard.receive(an_exchange(), wire.unpack_grant(raw), 0.1)
    news = guard.to_tell()
    assert news is not None
    guard.told(news[0], written=False)
    guard.receive(an_exchange(), wire.unpack_grant(raw), 0.1)
    assert guard.to_tell() is None  # Not with every exchange.
    now[0] += orders.TELL_S
    news = guard.to_tell()
    assert news is not None
    assert news[0] == 2
    guard.receive(an_exchange(), wire.unpack_grant(raw), 0.1)  # While M1 writes down the two.
    guard.told(news[0], written=True)
    assert guard.refused[0] == 1
    guard.told(1, written=True)
    assert guard.refused == (0, "")


def test_channels_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "WORKERS_MAX", 1)
    cluster = make(BPCS[0], BPCS[0])
    cluster.say_hello(a_hello(worker="W2"))
    cluster.say_hello()
    assert list(cluster.desk._channels) == ["W1"]


class SlowSigner:
    """A signature whose renewal waits for somebody."""

    def __init__(self, *, able: bool) -> None:
        self.able = able
        self.begun, self.released = threading.Event(), threading.Event()
        self.renewals = 0

    def due(self) -> bool:
        return True

    def renew(self) -> None:
        self.renewals += 1
        self.begun.set()
        assert self.released.wait(30)
        self.able = True

    def sign(self, message: bytes) -> bytes:
        assert self.able
        return b"signed"


async def test_a_renewal_that_hangs_holds_up_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "RENEW_WAIT_S", 0.0)
    signer = SlowSigner(able=True)
    desk = OrderDesk(signer, None, elapsed=lambda: 0.0)
    grant = Grant(seq=1, stops=(STOP,))
    await desk.ready(Grant(seq=1, offers=(OFFER,)))
    assert signer.renewals == 0  # There is nothing to sign.
    for _ in range(3):
        await desk.ready(grant)
        assert desk.send(an_exchange(), grant).proof == b"signed"
    assert await asyncio.to_thread(signer.begun.wait, 30)
    assert signer.renewals == 1
    signer.released.set()


async def test_the_first_renewal_is_waited_for_and_the_loop_goes_on() -> None:
    signer = SlowSigner(able=False)
    desk = OrderDesk(signer, None, elapsed=lambda: 0.0)
    waiting = [asyncio.create_task(desk.ready()) for _ in range(3)]
    assert await asyncio.to_thread(signer.begun.wait, 30)
    assert not any(task.done() for task in waiting)
    signer.released.set()
    await asyncio.gather(*waiting)
    assert (signer.able, signer.renewals) == (True, 1)

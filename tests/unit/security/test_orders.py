"""M1's signature, and everybody else's."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hcna_ray.security.authority import (
    begin_rollover,
    ensure_trust,
    finish_rollover,
    gate_trust,
    sign_request,
)
from hcna_ray.security.certs import (
    CertificateBroken,
    ensure_ca,
    ensure_server,
    load_cert,
    make_request,
    new_key,
)
from hcna_ray.security.orders import (
    AGAIN,
    ORDERS_NAME,
    OrderRefused,
    OrderSigner,
    OrderVerifier,
    known_authorities,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
MESSAGE = b"stop"


class Calendar:
    """A time that is set by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def m1(tmp_path: Path) -> Path:
    """M1's directory, with an authority."""
    directory = tmp_path / "m1"
    ensure_ca(directory, now=NOW)
    return directory


@pytest.fixture
def w1(tmp_path: Path, m1: Path) -> Path:
    """The directory of a machine that joined before M1 signed anything."""
    directory = tmp_path / "w1"
    directory.mkdir()
    join(directory, m1)
    return directory


def join(directory: Path, m1: Path) -> None:
    """Write down what M1 says at a join, and with each round of credentials."""
    ca_pem = gate_trust(m1)
    (directory / "membership.json").write_text(json.dumps({"schema": 1, "ca_pem": ca_pem}))


def signed(directory: Path) -> bytes:
    return OrderSigner(directory, lambda: NOW).sign(MESSAGE)


def check(directory: Path, proof: bytes, message: bytes = MESSAGE) -> None:
    OrderVerifier(directory).verify(message, proof)


def test_what_m1_signs_is_believed_where_it_joined_and_on_m1(m1: Path, w1: Path) -> None:
    proof = signed(m1)
    check(w1, proof)
    check(m1, proof)
    assert oct((m1 / "orders.key").stat().st_mode)[-3:] == "600"


def test_another_message_is_not_believed(m1: Path, w1: Path) -> None:
    with pytest.raises(OrderRefused, match="somebody has changed it"):
        check(w1, signed(m1), b"stop everything")


def test_no_byte_of_a_proof_can_be_changed(m1: Path, w1: Path) -> None:
    proof = signed(m1)
    for place in range(len(proof)):
        # Not the lowest bit: one of DER's counts bits that mean nothing.
        changed = proof[:place] + bytes([proof[place] ^ 0x80]) + proof[place + 1 :]
        with pytest.raises(OrderRefused):
            check(w1, changed)


@pytest.mark.parametrize("proof", [b"", b"\0", b"\0\0", b"\xff\xff", b"\0\1x", bytes(500)])
def test_what_is_no_proof_is_refused(m1: Path, w1: Path, proof: bytes) -> None:
    with pytest.raises(OrderRefused, match="cannot be read"):
        check(w1, proof)


def test_another_authority_is_not_believed(w1: Path, tmp_path: Path) -> None:
    ensure_ca(tmp_path / "other", now=NOW)
    with pytest.raises(OrderRefused, match="does not know"):
        check(w1, signed(tmp_path / "other"))


def test_the_owners_own_authority_does_not_speak_for_m1(m1: Path, w1: Path, tmp_path: Path) -> None:
    """It signs for nodes: whoever it serves in the house is not M1."""
    house = tmp_path / "house"
    ensure_ca(house, now=NOW)
    (m1 / "own-ca.pem").write_bytes((house / "ca.pem").read_bytes())
    trust = ensure_trust(m1, now=NOW)
    (w1 / "trust.pem").write_bytes(trust.read_bytes())
    assert (house / "ca.pem").read_text() in trust.read_text()
    for directory in (w1, m1):
        with pytest.raises(OrderRefused, match="does not know"):
            check(directory, signed(house))
        check(directory, signed(m1))


def forged(m1: Path, names: tuple[str, ...], kind: str = "server") -> bytes:
    """Sign with a certificate that the right authority gave to somebody else."""
    signer = OrderSigner(m1, lambda: NOW)
    signer.sign(MESSAGE)
    key = new_key()
    pem = sign_request(
        m1,
        make_request(key, "W2"),
        name="W2",
        kind=kind,  # type: ignore[arg-type]
        names=names,
        addresses=(),
        now=NOW,
    )
    (m1 / "orders.key").write_text(key)
    (m1 / "orders.pem").write_text(pem)
    from cryptography.hazmat.primitives import serialization

    from hcna_ray.security.certs import load_key

    cert = load_cert(m1 / "orders.pem").public_bytes(serialization.Encoding.DER)
    signer._pair = load_key(m1 / "orders.key"), cert
    return signer.sign(MESSAGE)


@pytest.mark.parametrize(
    ("names", "kind", "why"),
    [
        (("w2.hcna.internal",), "node", "another machine than M1"),
        (("gate.hcna.internal",), "server", "another machine than M1"),
        ((ORDERS_NAME, "w2.hcna.internal"), "server", "another machine than M1"),
        ((ORDERS_NAME,), "client", "another purpose"),
    ],
)
def test_a_member_does_not_speak_for_m1(
    m1: Path, w1: Path, names: tuple[str, ...], kind: str, why: str
) -> None:
    with pytest.raises(OrderRefused, match=why):
        check(w1, forged(m1, names, kind))


def test_a_machine_that_knows_no_authority_says_what_to_do(m1: Path, tmp_path: Path) -> None:
    with pytest.raises(OrderRefused, match="hcna join with a new code"):
        check(tmp_path / "nowhere", signed(m1))


def sign(signer: OrderSigner) -> bytes:
    """Sign as M1 does, which looks after the certificate first."""
    if signer.due():
        signer.renew()
    return signer.sign(MESSAGE)


def test_the_certificate_is_renewed_and_no_clock_parts_a_worker_from_m1(m1: Path, w1: Path) -> None:
    calendar = Calendar()
    signer = OrderSigner(m1, calendar)
    first = sign(signer)
    assert not signer.due()
    calendar.now += timedelta(days=70)
    second = sign(signer)
    calendar.now -= timedelta(days=400)  # M1's clock is put back.
    third = sign(signer)
    certificates = {proof[: 2 + int.from_bytes(proof[:2], "big")] for proof in (first, second)}
    assert len(certificates) == 2
    for proof in (first, second, third):
        check(w1, proof)


def test_a_change_of_the_authority_is_followed(m1: Path, w1: Path) -> None:
    signer = OrderSigner(m1, lambda: NOW)
    sign(signer)
    begin_rollover(m1, now=NOW)
    check(w1, sign(signer))  # It has not heard of the new one yet.
    join(w1, m1)
    finish_rollover(m1, now=NOW)
    check(w1, sign(signer))
    check(m1, sign(signer))


def test_a_machine_that_missed_a_change_of_the_authority_says_what_to_do(
    m1: Path, w1: Path
) -> None:
    signer = OrderSigner(m1, lambda: NOW)
    begin_rollover(m1, now=NOW)
    check(w1, sign(signer))
    finish_rollover(m1, now=NOW)

    with pytest.raises(OrderRefused, match="hcna join with a new code"):
        check(w1, sign(signer))
    join(w1, m1)
    check(w1, sign(signer))


def test_orders_leave_although_the_certificate_cannot_be_renewed(
    m1: Path, w1: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calendar = Calendar()
    signer = OrderSigner(m1, calendar)
    sign(signer)
    key = (m1 / "ca.key").read_bytes()
    (m1 / "ca.key").unlink()
    calendar.now += timedelta(days=70)
    with caplog.at_level(logging.ERROR, logger="hcna_ray"):
        check(w1, sign(signer))
        check(w1, sign(signer))
    (record,) = caplog.records  # It is not tried again for each order,
    assert record.action == "orders.renewal_failed"  # type: ignore[attr-defined]
    assert "ca.key" in record.getMessage()
    calendar.now += AGAIN
    assert signer.due()  # but soon.
    (m1 / "ca.key").write_bytes(key)
    (m1 / "ca.key").chmod(0o600)
    old = signer.sign(MESSAGE)
    check(w1, sign(signer))
    size = int.from_bytes(old[:2], "big")
    assert signer.sign(MESSAGE)[: 2 + size] != old[: 2 + size]


def test_a_new_moderator_goes_on_with_the_certificate_on_its_disk(m1: Path, w1: Path) -> None:
    signed(m1)
    (m1 / "ca.key").unlink()
    check(w1, signed(m1))


def test_an_authority_that_has_ended_stops_no_orders(m1: Path, w1: Path) -> None:
    calendar = Calendar()
    signer = OrderSigner(m1, calendar)
    sign(signer)
    calendar.now += timedelta(days=5000)
    check(w1, sign(signer))


def test_without_any_certificate_nothing_is_signed(m1: Path) -> None:
    (m1 / "ca.key").unlink()
    with pytest.raises(CertificateBroken, match=r"ca\.key"):
        signed(m1)


def test_a_certificate_of_another_key_is_not_taken_from_the_disk(m1: Path) -> None:
    signed(m1)
    (m1 / "ca.key").unlink()
    (m1 / "orders.key").write_text(new_key())
    with pytest.raises(CertificateBroken, match=r"ca\.key"):
        signed(m1)


def test_a_machine_that_was_an_m1_itself_believes_the_one_it_joined(
    m1: Path, tmp_path: Path
) -> None:
    former = tmp_path / "former"
    ensure_ca(former, now=NOW)
    join(former, m1)
    check(former, signed(m1))
    ensure_server(former, "gate", names=("gate",), addresses=(), now=NOW)


def test_a_broken_membership_knows_nobody(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"ca_pem": "x"}'):
        (tmp_path / "membership.json").write_text(text)
        assert known_authorities(tmp_path) == []

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from ssl import PEM_cert_to_DER_cert

import pytest
from cryptography import x509

from hcna_ray.durable import write_private
from hcna_ray.security import certs
from hcna_ray.security.certs import (
    CA_LIFE,
    RENEW_BEFORE,
    SERVER_LIFE,
    CertificateBroken,
    Pair,
    ensure_ca,
    ensure_server,
    fingerprint,
)

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def cert(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def server(
    directory: Path, *, addresses: tuple[str, ...] = ("10.0.0.1",), now: datetime = NOW
) -> Pair:
    return ensure_server(directory, "gate", names=("gate.x",), addresses=addresses, now=now)


def test_the_authority_is_made_once_and_its_key_is_private(tmp_path: Path) -> None:
    first = ensure_ca(tmp_path, now=NOW)
    before = first.cert.read_text()

    again = ensure_ca(tmp_path, now=NOW + timedelta(days=400))

    assert again.cert.read_text() == before
    assert first.key.stat().st_mode & 0o777 == 0o600
    assert cert(first.cert).not_valid_after_utc == NOW + CA_LIFE


def test_half_an_authority_is_not_replaced(tmp_path: Path) -> None:
    ensure_ca(tmp_path, now=NOW).key.unlink()

    with pytest.raises(CertificateBroken, match=r"ca\.key"):
        ensure_ca(tmp_path, now=NOW)


def test_an_authority_without_its_certificate_is_not_replaced(tmp_path: Path) -> None:
    ensure_ca(tmp_path, now=NOW).cert.unlink()

    with pytest.raises(CertificateBroken, match=r"ca\.pem"):
        ensure_ca(tmp_path, now=NOW)


@pytest.mark.parametrize("written", range(3))
def test_an_authority_whose_making_was_interrupted_is_made_at_the_next_call(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = written

    def interrupted(path: Path, text: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        write_private(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(certs, "write_private", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_ca(tmp_path, now=NOW)

    pair = server(tmp_path)

    cert(pair.cert).verify_directly_issued_by(cert(tmp_path / "ca.pem"))
    assert sorted(path.name for path in tmp_path.glob("ca.*")) == ["ca.key", "ca.pem"]


def test_an_authority_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    pair = ensure_ca(tmp_path, now=NOW)
    pair.cert.write_text("nonsense")

    with pytest.raises(CertificateBroken, match=r"ca\.pem cannot be used"):
        ensure_ca(tmp_path, now=NOW)
    assert pair.cert.read_text() == "nonsense"


def test_a_server_certificate_names_its_addresses_and_is_signed(tmp_path: Path) -> None:
    pair = server(tmp_path, addresses=("10.0.0.1", "fd00::1"))

    made = cert(pair.cert)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gate.x"]
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.1", "fd00::1"}
    made.verify_directly_issued_by(cert(tmp_path / "ca.pem"))
    assert pair.key.stat().st_mode & 0o777 == 0o600


def test_a_good_server_certificate_is_kept(tmp_path: Path) -> None:
    before = server(tmp_path, addresses=("10.0.0.1", "10.0.0.2")).cert.read_text()

    # An address that went away, such as a VPN's, is no reason for a new one.
    assert server(tmp_path, addresses=("10.0.0.1",)).cert.read_text() == before


@pytest.mark.parametrize("why", ["address", "age", "clock", "unreadable", "key", "authority"])
def test_a_server_certificate_is_made_anew(tmp_path: Path, why: str) -> None:
    pair = server(tmp_path)
    before, addresses, now = cert(pair.cert).serial_number, ("10.0.0.1",), NOW
    match why:
        case "address":
            addresses = ("10.0.0.9",)
        case "age":
            now = NOW + SERVER_LIFE - RENEW_BEFORE
        case "clock":
            now = NOW - timedelta(days=3)
        case "unreadable":
            pair.cert.write_text("nonsense")
        case "key":
            pair.key.write_text((tmp_path / "ca.key").read_text())
        case "authority":
            (tmp_path / "ca.pem").unlink()
            (tmp_path / "ca.key").unlink()

    after = server(tmp_path, addresses=addresses, now=now)

    assert cert(after.cert).serial_number != before
    cert(after.cert).verify_directly_issued_by(cert(tmp_path / "ca.pem"))


def test_the_fingerprint_is_that_of_the_der_form(tmp_path: Path) -> None:
    pem = ensure_ca(tmp_path, now=NOW).cert.read_text()

    assert fingerprint(pem) == sha256(PEM_cert_to_DER_cert(pem)).hexdigest()
    with pytest.raises(ValueError, match="PEM"):
        fingerprint("nonsense")

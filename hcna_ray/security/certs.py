"""The cluster's own authority and the certificates it signs.

The authority is made once on M1 and never leaves it: ``ca.pem`` may be shown to everybody,
``ca.key`` to nobody. A machine that joins knows the authority by the fingerprint in its join code,
so no public authority and no name service is needed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hcna_ray import failpoints
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.security.keys import locked_dir

CA_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=90)
#: A certificate is made anew when less than this is left of it.
RENEW_BEFORE = timedelta(days=30)
#: A machine whose clock is behind must not take a fresh certificate for one of the future.
_BACKDATED = timedelta(days=1)


class CertificateBroken(HcnaError):
    """A certificate or key file exists but cannot be used. It is left as it is."""

    code = "certificate_broken"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} cannot be used: {self.reason}"


@dataclass(frozen=True)
class Pair:
    """The files of one certificate and its private key."""

    cert: Path
    key: Path


def ensure_ca(directory: Path, *, now: datetime) -> Pair:
    """Return the cluster's authority; make it at the first call.

    Raises:
        CertificateBroken: One of the two files is missing or unreadable. Nothing is made then:
            a new authority would lock out every machine that has joined.
    """
    pair = Pair(directory / "ca.pem", directory / "ca.key")
    unfinished = directory / "ca.key.new"
    with locked_dir(directory):
        if not pair.cert.exists() and not pair.key.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = _name("hcna-ray authority")
            builder = (
                _builder(name, name, key.public_key(), now=now, life=CA_LIFE)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(sign_certificates=True), critical=True)
                .add_extension(
                    x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
                )
            )
            # Under its name the key comes last: whoever is interrupted leaves no half that could
            # not be told from a lost one.
            write_private(unfinished, _key_text(key))
            write_private(pair.cert, _cert_text(builder.sign(key, hashes.SHA256())))
        if unfinished.exists() and pair.cert.exists():
            if not pair.key.exists():
                write_private(pair.key, unfinished.read_text(encoding="ascii"))
            unfinished.unlink()
        _load_cert(pair.cert)
        _load_key(pair.key)
    return pair


def ensure_server(
    directory: Path, stem: str, *, names: Iterable[str], addresses: Iterable[str], now: datetime
) -> Pair:
    """Return a server certificate ``stem.pem`` signed by the authority of the directory.

    It is made anew when it nears its end, when a name or an address is missing in it, when it
    cannot be read, or when another authority signed it.

    Args:
        directory: Where `ensure_ca` keeps the authority.
        stem: Name of the files without their ends.
        names: DNS names the server is known by.
        addresses: Its IP addresses.
        now: The time, aware.

    Raises:
        CertificateBroken: The authority cannot be used.
    """
    authority = ensure_ca(directory, now=now)
    pair = Pair(directory / f"{stem}.pem", directory / f"{stem}.key")
    wanted = [x509.DNSName(name) for name in sorted(set(names))]
    ips = [x509.IPAddress(ipaddress.ip_address(text)) for text in sorted(set(addresses))]
    with locked_dir(directory):
        ca, ca_key = _load_cert(authority.cert), _load_key(authority.key)
        if _still_good(pair, ca, {*wanted, *ips}, now):
            return pair
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(stem), ca.subject, key.public_key(), now=now, life=SERVER_LIFE)
            .add_extension(x509.SubjectAlternativeName([*wanted, *ips]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
        )
        write_private(pair.key, _key_text(key))
        failpoints.hit("certificate.key.written")
        write_private(pair.cert, _cert_text(builder.sign(ca_key, hashes.SHA256())))
    failpoints.hit("certificate.pair.written")
    return pair


def fingerprint(pem: str) -> str:
    """Return the SHA-256 of a certificate's DER form, in hex.

    Raises:
        ValueError: The text is not one certificate in PEM.
    """
    return (
        x509.load_pem_x509_certificate(pem.encode("ascii", "replace"))
        .fingerprint(hashes.SHA256())
        .hex()
    )


def _still_good(
    pair: Pair, ca: x509.Certificate, wanted: set[x509.GeneralName], now: datetime
) -> bool:
    try:
        cert, key = _load_cert(pair.cert), _load_key(pair.key)
        cert.verify_directly_issued_by(ca)
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # Whatever is wrong with it, the remedy is a new one.
        return False
    return (
        wanted <= set(names)
        and cert.public_key() == key.public_key()
        and cert.not_valid_before_utc <= now < cert.not_valid_after_utc - RENEW_BEFORE
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    now = now.astimezone(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + life)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _cert_text(cert: x509.Certificate) -> str:
    return cert.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _key_text(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")


def _load_cert(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateBroken(str(path), str(error)) from None


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise CertificateBroken(str(path), str(error)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateBroken(str(path), "it is not an elliptic-curve key")
    return key

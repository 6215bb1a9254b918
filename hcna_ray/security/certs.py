"""The cluster's own authority, the certificates it signs, and what is made of them for TLS.

The authority is made once on M1 and never leaves it: ``ca.pem`` may be shown to everybody,
``ca.key`` to nobody. A machine that joins knows the authority by the fingerprint in its join code,
so no public authority and no name service is needed. Who got which certificate, and what follows
from that, is the business of `hcna_ray.security.authority`.
"""

from __future__ import annotations

import ipaddress
import secrets
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
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
#: Weaker keys of RSA are refused.
_RSA_BITS_MIN = 2048

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
#: What a certificate is good for: one of a node is both, each node calls and is called.
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


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
            key, cert = new_authority(now)
            # Under its name the key comes last: whoever is interrupted leaves no half that could
            # not be told from a lost one.
            write_private(unfinished, key)
            write_private(pair.cert, cert)
        if unfinished.exists() and pair.cert.exists():
            if not pair.key.exists():
                write_private(pair.key, unfinished.read_text(encoding="ascii"))
            unfinished.unlink()
        load_cert(pair.cert)
        load_key(pair.key)
    return pair


def new_authority(now: datetime) -> tuple[str, str]:
    """Return key and certificate of a new authority, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: a certificate must not seem to come from the authority's successor.
    name = _name(f"hcna-ray authority {secrets.token_hex(4)}")
    builder = (
        _builder(name, name, key.public_key(), now=now, life=CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key_text(key), cert_text(builder.sign(key, hashes.SHA256()))


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
    ensure_ca(directory, now=now)
    authority = known_by(directory)
    pair = Pair(directory / f"{stem}.pem", directory / f"{stem}.key")
    wanted = alternative_names(names, addresses)
    with locked_dir(directory):
        ca, ca_key = load_cert(authority.cert), load_key(authority.key)
        if _still_good(pair, ca, set(wanted), now):
            return pair
        key = ec.generate_private_key(ec.SECP256R1())
        made = make_certificate(
            stem, key.public_key(), wanted, [SERVER], ca, ca_key, now=now, life=SERVER_LIFE
        )
        write_private(pair.key, key_text(key))
        failpoints.hit("certificate.key.written")
        write_private(pair.cert, cert_text(made))
    failpoints.hit("certificate.pair.written")
    return pair


def known_by(directory: Path) -> Pair:
    """Return the authority by which machines and join codes know M1.

    While a new authority takes over that is still the old one: those who have not heard of the new
    one must find M1, to hear of it.
    """
    old = Pair(directory / "ca.old.pem", directory / "ca.old.key")
    return old if old.cert.exists() else Pair(directory / "ca.pem", directory / "ca.key")


def make_certificate(
    common: str,
    public_key: PublicKey,
    names: Sequence[x509.GeneralName],
    purposes: Sequence[x509.ObjectIdentifier],
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime,
    life: timedelta,
) -> x509.Certificate:
    """Return a certificate for somebody's key, signed by the authority.

    Args:
        common: The common name; nothing depends on it.
        public_key: Whose certificate it is.
        names: Names and addresses for which it is good.
        purposes: `SERVER`, `CLIENT` or both.
        ca: The authority.
        ca_key: Its key.
        now: The time, aware.
        life: How long it is good; never longer than its authority.
    """
    life = min(life, ca.not_valid_after_utc - now)
    builder = (
        _builder(_name(common), ca.subject, public_key, now=now, life=life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def make_revocation_list(
    revoked: Iterable[tuple[int, datetime]],
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime,
    life: timedelta,
) -> str:
    """Return the authority's list of certificates (serial number, when) that count no more."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now - _BACKDATED)
        .next_update(now + life)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
    )
    for serial, at in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at)
        builder = builder.add_revoked_certificate(entry.build())
    made = builder.sign(ca_key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode("ascii")


def alternative_names(names: Iterable[str], addresses: Iterable[str]) -> list[x509.GeneralName]:
    """Return names and addresses as they stand in a certificate, sorted, each once.

    Raises:
        ValueError: A name is not ASCII, or an address is none.
    """
    dns = [x509.DNSName(name) for name in sorted(set(names))]
    found = {ipaddress.ip_address(text) for text in addresses}
    ips = [x509.IPAddress(each) for each in sorted(found, key=lambda ip: (ip.version, int(ip)))]
    return [*dns, *ips]


# -- keys and requests -----------------------------------------------------------------------------


def new_key() -> str:
    """Return a new private key as PEM."""
    return key_text(ec.generate_private_key(ec.SECP256R1()))


def make_request(key_pem: str, common: str) -> str:
    """Return a request for a certificate, signed with the key that it is for.

    Names are not in it: the authority decides by itself for which ones the certificate is.
    """
    key = parse_key(key_pem.encode("ascii"))
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(common))
    made = builder.sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode("ascii")


def key_in_request(request_pem: str) -> PublicKey:
    """Return the key that a request is for; whoever made it holds the private half.

    Raises:
        ValueError: It is no request, its signature is wrong, or the key is too weak.
    """
    try:
        request = x509.load_pem_x509_csr(request_pem.encode("ascii"))
        proven = request.is_signature_valid
        key = request.public_key()
    except Exception as error:  # The parser raises many kinds, all of them for what is no request.
        raise ValueError(f"it is not a certificate request ({error})") from None
    if not proven:
        raise ValueError("the request is not signed with its own key")
    return strong_key(key)


def strong_key(key: object) -> PublicKey:
    """Return the public key if it is one that TLS needs and nobody breaks.

    Raises:
        ValueError: It is of another kind, or too short.
    """
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _RSA_BITS_MIN:
            raise ValueError(f"its RSA key has {key.key_size} bits, fewer than {_RSA_BITS_MIN}")
        return key
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name not in ("secp256r1", "secp384r1"):
            raise ValueError(f"its key is on the curve {key.curve.name}, not on P-256 or P-384")
        return key
    raise ValueError("its key is neither RSA nor on an elliptic curve")


# -- TLS -------------------------------------------------------------------------------------------


def mutual_context(
    node: Path, trust: Path, *, server: bool, revoked: Path | None = None
) -> ssl.SSLContext:
    """Return a context for a connection on which both sides show a certificate.

    Args:
        node: Key and certificate of this side, in one file.
        trust: The authorities whose certificates count.
        server: Whether this side is called; else the other side must bear the name it is called by.
        revoked: List of certificates that do not count any more.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(node)
    context.load_verify_locations(trust)
    if revoked is not None:
        context.load_verify_locations(revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


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


def serial_and_end(pem: str) -> tuple[str, datetime]:
    """Return serial number, in hex, and end of a certificate.

    Raises:
        ValueError: The text is not one certificate in PEM.
    """
    cert = x509.load_pem_x509_certificate(pem.encode("ascii", "replace"))
    return f"{cert.serial_number:x}", cert.not_valid_after_utc


def _still_good(
    pair: Pair, ca: x509.Certificate, wanted: set[x509.GeneralName], now: datetime
) -> bool:
    try:
        cert, key = load_cert(pair.cert), load_key(pair.key)
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
    key: PublicKey,
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


def cert_text(cert: x509.Certificate) -> str:
    """Return a certificate as PEM."""
    return cert.public_bytes(serialization.Encoding.PEM).decode("ascii")


def key_text(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a private key as PEM, in clear."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")


def load_cert(path: Path) -> x509.Certificate:
    """Return the first certificate of a file.

    Raises:
        CertificateBroken: There is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateBroken(str(path), str(error)) from None


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key of a file of ours.

    Raises:
        CertificateBroken: There is none.
    """
    try:
        return parse_key(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise CertificateBroken(str(path), str(error)) from None


def parse_key(text: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the private key in a text of ours.

    Raises:
        ValueError: There is none, or it is not on an elliptic curve.
        TypeError: It is under a password.
    """
    key = serialization.load_pem_private_key(text, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("it is not an elliptic-curve key")
    return key

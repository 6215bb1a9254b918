"""Certificates that the owner brings: made with openssl, by the house's authority, Let's Encrypt.

Everything that would let a handshake fail later is looked for before anything starts, and said in
one sentence with the file and what to do.
"""

from __future__ import annotations

import getpass
import ipaddress
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from hcna_ray.core.errors import HcnaError
from hcna_ray.security.certs import strong_key

#: Certificates between the one that is shown and its authority.
_CHAIN_MAX = 8
_PURPOSE_NAMES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
}


class OwnCertificateRefused(HcnaError):
    """A certificate that the settings name cannot be used. ``fix`` says what to do."""

    code = "own_certificate_refused"

    def __init__(self, path: str, reason: str, fix: str) -> None:
        super().__init__(path, reason, fix)
        self.path, self.reason, self.fix = path, reason, fix

    def __str__(self) -> str:
        return f"{self.path} {self.reason}; {self.fix}"


@dataclass(frozen=True, kw_only=True)
class OwnCertificate:
    """A certificate that will do, as it was read."""

    #: Private key in clear, then the certificate and those between it and its authority.
    pem: str
    #: The authorities that were named with it; '' if none were.
    ca_pem: str
    expires_at: datetime


def load_own(
    cert_path: Path,
    key_path: Path,
    ca_path: Path | None,
    *,
    addresses: Collection[str],
    purposes: Collection[x509.ObjectIdentifier],
    now: datetime,
) -> OwnCertificate:
    """Return what three files of the owner hold, if a handshake with it will succeed.

    Args:
        cert_path: The certificate, alone or with those between it and its authority after it.
        key_path: Its private key, readable for this user alone, without a password.
        ca_path: The authority; None: one that everybody knows, such as Let's Encrypt.
        addresses: Names and IP addresses at which it will be called; each must be in it.
        purposes: What it must be good for, `certs.SERVER` and `certs.CLIENT`.
        now: The time, aware.

    Raises:
        OwnCertificateRefused: Something is missing or wrong; the text names file and remedy.
    """
    chain = _certificates(cert_path, "the certificate")
    cert = chain[0]
    key = _key(key_path)
    if key.public_key() != cert.public_key():
        raise OwnCertificateRefused(
            str(key_path), f"is not the key of {cert_path}", "name the two that belong together"
        )
    authorities = _certificates(ca_path, "the authority's certificate") if ca_path else []
    _check_time(cert_path, cert, now)
    try:
        strong_key(cert.public_key())
    except ValueError as error:
        raise OwnCertificateRefused(
            str(cert_path), f"is weak: {error}", "make it again: openssl req -newkey rsa:4096 ..."
        ) from None
    if isinstance(cert.signature_hash_algorithm, hashes.SHA1 | hashes.MD5):
        raise OwnCertificateRefused(
            str(cert_path), "is signed with a broken digest", "sign it again with -sha256"
        )
    _check_names(cert_path, cert, addresses)
    _check_purposes(cert_path, cert, purposes)
    if ca_path is not None:
        _check_chain(cert_path, chain, ca_path, authorities, now)
    clear = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")
    return OwnCertificate(
        pem=clear + _text(chain), ca_pem=_text(authorities), expires_at=cert.not_valid_after_utc
    )


def load_authorities(path: Path, *, now: datetime) -> str:
    """Return the certificates of the owner's authorities as PEM.

    Raises:
        OwnCertificateRefused: It is missing, unreadable, expired, or not one of an authority.
    """
    authorities = _certificates(path, "the authority's certificate")
    _check_authorities(path, authorities, now)
    return _text(authorities)


def names_in(path: Path) -> tuple[str, ...]:
    """Return the names and addresses that a certificate is for.

    Raises:
        OwnCertificateRefused: It is missing or unreadable.
    """
    (cert, *_) = _certificates(path, "the certificate")
    try:
        held = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    ips = (str(ip) for ip in held.get_values_for_type(x509.IPAddress))
    return (*held.get_values_for_type(x509.DNSName), *ips)


def is_signed_by(own: OwnCertificate, authorities: Sequence[x509.Certificate]) -> bool:
    """Whether one of these authorities has signed a certificate, itself or by one between."""
    return _leads_to(x509.load_pem_x509_certificates(own.pem.encode("ascii")), authorities)


def _certificates(path: Path, what: str) -> list[x509.Certificate]:
    text = _read(path, what)
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        pass
    fix = f"show what is in it: openssl x509 -noout -text -in {shlex.quote(str(path))}"
    raise OwnCertificateRefused(str(path), f"is not {what} in PEM", fix)


def _key(path: Path) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    text = _read(path, "the private key")
    quoted = shlex.quote(str(path))
    if path.stat().st_mode & 0o077:
        raise OwnCertificateRefused(
            str(path), "is readable for others than its owner", f"chmod 600 {quoted}"
        )
    try:
        key = load_pem_private_key(text, password=None)
    except TypeError:
        raise OwnCertificateRefused(
            str(path),
            "is under a password, which nobody types at a start",
            f"take it off: openssl pkey -in {quoted} -out {quoted}.clear",
        ) from None
    except Exception:  # Unsupported kinds raise one of the library's own.
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise OwnCertificateRefused(
            str(path), "is no private key of RSA or an elliptic curve in PEM", "name the key file"
        )
    return key


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        reason, fix = "is not there", f"put {what} there, or take its path out of the settings"
    except PermissionError:
        reason = f"cannot be read by user {getpass.getuser()}"
        fix = f"sudo chown {getpass.getuser()} {shlex.quote(str(path))}"
    except OSError as error:
        reason, fix = f"cannot be read ({error.strerror})", f"name the file of {what}"
    raise OwnCertificateRefused(str(path), reason, fix)


def _check_time(path: Path, cert: x509.Certificate, now: datetime) -> None:
    if now >= cert.not_valid_after_utc:
        when = cert.not_valid_after_utc.date().isoformat()
        raise OwnCertificateRefused(str(path), f"has expired on {when}", "renew it")
    if now < cert.not_valid_before_utc:
        when = cert.not_valid_before_utc.isoformat(timespec="minutes")
        raise OwnCertificateRefused(
            str(path), f"is valid only from {when} on", "set the clock of this machine"
        )


def _check_names(path: Path, cert: x509.Certificate, addresses: Collection[str]) -> None:
    extension = "subjectAltName=" + ",".join(map(_general, sorted(addresses)))
    fix = f"sign it again with openssl x509 -req ... -extfile <(echo {shlex.quote(extension)})"
    try:
        held = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise OwnCertificateRefused(
            str(path), "has no subject alternative name, and its common name does not count", fix
        ) from None
    names = [name.lower() for name in held.get_values_for_type(x509.DNSName)]
    ips = {str(ip) for ip in held.get_values_for_type(x509.IPAddress)}
    missing = [each for each in sorted(addresses) if each not in ips and not _covers(names, each)]
    if missing:
        raise OwnCertificateRefused(str(path), f"is not for {', '.join(missing)}", fix)


def _covers(names: Sequence[str], host: str) -> bool:
    """Whether a name, or one with a star for its first label, is that of the host (RFC 6125)."""
    host = host.lower()
    return host in names or f"*.{host.partition('.')[2]}" in names


def _general(address: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(address)}"
    except ValueError:
        return f"DNS:{address}"


def _check_purposes(
    path: Path, cert: x509.Certificate, purposes: Collection[x509.ObjectIdentifier]
) -> None:
    try:
        held = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return  # It may be used for everything.
    missing = [_PURPOSE_NAMES[each] for each in purposes if each not in held]
    if missing:
        wanted = ",".join(_PURPOSE_NAMES[each] for each in purposes)
        raise OwnCertificateRefused(
            str(path),
            f"is not meant for {' and '.join(missing)}",
            f"have it signed with extendedKeyUsage={wanted}, or without that extension",
        )


def _check_chain(
    path: Path,
    chain: Sequence[x509.Certificate],
    ca_path: Path,
    authorities: Sequence[x509.Certificate],
    now: datetime,
) -> None:
    _check_authorities(ca_path, authorities, now)
    if not _leads_to(chain, authorities):
        raise OwnCertificateRefused(
            str(path),
            f"was not signed by the authority in {ca_path}",
            "name the authority that signed it, and put certificates between the two after it",
        )


def _leads_to(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    shown = chain[0]
    for _ in range(_CHAIN_MAX):
        if any(_signed_by(shown, authority) for authority in authorities):
            return True
        above = next((each for each in chain[1:] if _signed_by(shown, each)), None)
        if above is None or above == shown:
            break
        shown = above
    return False


def _check_authorities(path: Path, authorities: Sequence[x509.Certificate], now: datetime) -> None:
    for authority in authorities:
        try:
            constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
            is_ca = constraints.value.ca
        except x509.ExtensionNotFound:
            is_ca = False
        if not is_ca:
            raise OwnCertificateRefused(
                str(path), "is not the certificate of an authority", "name the authority's"
            )
        _check_time(path, authority, now)


def _signed_by(cert: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        cert.verify_directly_issued_by(issuer)
    except Exception:  # Another subject, another kind of key, a wrong signature: not this one.
        return False
    return True


def _text(certificates: Sequence[x509.Certificate]) -> str:
    return "".join(
        each.public_bytes(serialization.Encoding.PEM).decode("ascii") for each in certificates
    )

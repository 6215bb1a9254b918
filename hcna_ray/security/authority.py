"""Who got which certificate from the cluster's authority: giving, renewing, taking back.

On M1, in ``cluster/``::

    ca.pem, ca.key           the authority that signs
    ca.old.pem, ca.old.key   its predecessor, trusted until everybody has heard of the new one
    own-ca.pem               the owner's authority, if the settings name certificates of his own
    trust.pem                the authorities whose certificates count: all of these
    issued.json              every certificate that was given out and has not long expired
    crl.pem                  those that do not count any more, signed by each authority
    node.pem                 this machine's own key and certificate, in one file

A machine that has joined has ``trust.pem`` and ``node.pem`` alone. Key and certificate share a file
so that they are replaced in one step: a process that starts at any moment finds a pair that fits.

What is private never leaves its machine: a member makes its key itself and sends a request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from hcna_ray import failpoints
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.security.certs import (
    CLIENT,
    RENEW_BEFORE,
    SERVER,
    SERVER_LIFE,
    CertificateBroken,
    Pair,
    alternative_names,
    cert_text,
    ensure_ca,
    key_in_request,
    load_cert,
    load_key,
    make_certificate,
    make_request,
    make_revocation_list,
    new_authority,
    new_key,
    parse_key,
)
from hcna_ray.security.keys import locked_dir

Kind = Literal["node", "server", "client"]

SCHEMA = 1
#: More certificates than this are a mistake.
ISSUED_MAX = 5000
NAMES_MAX = 64
#: Longest life that can be asked for: what browsers accept.
LIFE_MAX = timedelta(days=397)
#: A certificate that has expired is listed for another while.
_KEPT = timedelta(days=30)
#: A revocation list is good for this long, and made anew when half of it is over.
REVOCATIONS_LIFE = timedelta(days=30)
_PURPOSES = {"node": [SERVER, CLIENT], "server": [SERVER], "client": [CLIENT]}


class CertificateRefused(HcnaError):
    """The authority does not give this certificate, or knows none of that name."""

    code = "certificate_refused"


class RolloverRefused(HcnaError):
    """A change of the authority cannot begin or end now. The text says why."""

    code = "rollover_refused"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate as the authority remembers it."""

    #: Serial number, in hex.
    serial: str
    #: Whose: a node's short name, or what its owner called it.
    name: str
    kind: Kind
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    #: Of the certificate's DER form.
    sha256: str
    #: The same of the authority's.
    authority: str
    issued_at: float
    expires_at: float
    revoked_at: float | None = None
    reason: str = ""

    def state(self, now: datetime) -> str:
        """Return ``good``, ``expiring``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        if now.timestamp() >= self.expires_at:
            return "expired"
        ending = now + RENEW_BEFORE
        return "expiring" if ending.timestamp() >= self.expires_at else "good"


@dataclass(frozen=True, kw_only=True)
class Node:
    """The files with which a machine takes part in the cluster's TLS."""

    #: Its key and its certificate.
    pem: Path
    #: The authorities it believes.
    trust: Path

    @classmethod
    def of(cls, directory: Path) -> Node:
        """Return the files of this directory, whether they are there or not."""
        return cls(pem=directory / "node.pem", trust=directory / "trust.pem")


# -- giving ----------------------------------------------------------------------------------------


def sign_request(
    directory: Path,
    request_pem: str,
    *,
    name: str,
    kind: Kind,
    names: Iterable[str],
    addresses: Iterable[str],
    now: datetime,
    life: timedelta = SERVER_LIFE,
    spare: int = 0,
) -> str:
    """Return a certificate (PEM) for the key of a request, and remember it.

    Args:
        directory: Where the authority is.
        request_pem: What its owner made; only the key in it counts.
        name: Whose it is, for the list.
        kind: What it is good for.
        names: DNS names it is good for: who may have which is decided by the caller.
        addresses: IP addresses it is good for.
        now: The time, aware.
        life: How long it is good.
        spare: Places on the list that have to stay free for others.

    Raises:
        CertificateRefused: The request or a name is wrong, or there are too many certificates.
        CertificateBroken: The authority cannot be used.
    """
    names, addresses = sorted(set(names)), sorted(set(addresses))
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise CertificateRefused("the name of a certificate has 1 to 64 printable characters")
    if len(names) + len(addresses) > NAMES_MAX:
        raise CertificateRefused(f"a certificate is for {NAMES_MAX} names and addresses at most")
    if not timedelta(minutes=1) <= life <= LIFE_MAX:
        raise CertificateRefused(f"a certificate lives from a minute to {LIFE_MAX.days} days")
    try:
        key = key_in_request(request_pem)
        alternatives = alternative_names(names, addresses)
    except ValueError as error:
        raise CertificateRefused(str(error)) from None
    if kind != "client" and not alternatives:
        raise CertificateRefused("a certificate of a server needs a name or an address")
    ensure_ca(directory, now=now)
    with locked_dir(directory):
        ca_cert, ca_key = _signer(directory)
        kept = _kept(directory, now)
        if len(kept) >= ISSUED_MAX - spare:
            raise CertificateRefused(f"{len(kept)} certificates are given out already")
        made = make_certificate(
            name, key, alternatives, _PURPOSES[kind], ca_cert, ca_key, now=now, life=life
        )
        # Listed first: one that nobody has does no harm, one that nobody knows cannot be revoked.
        _save(directory, [*kept, _entry(made, ca_cert, name, kind, names, addresses, now)])
        failpoints.hit("certificate.issue.listed")
    return cert_text(made)


def ensure_trust(directory: Path, *, now: datetime) -> Path:
    """Return the bundle of the authorities that count on M1; make the authority at the first call.

    Raises:
        CertificateBroken: The authority cannot be used.
    """
    ensure_ca(directory, now=now)
    with locked_dir(directory):
        _complete_rollover(directory)
        _write_trust(directory)
    return directory / "trust.pem"


def ensure_node(
    directory: Path,
    name: str,
    *,
    names: Iterable[str],
    addresses: Iterable[str],
    now: datetime,
    anew: bool = False,
) -> Node:
    """Return M1's own files; made at the first call and whenever they would not do any more.

    That is: near their end, without one of the names or addresses, signed by an authority that no
    longer signs, revoked, or unreadable; or because ``anew`` says so.

    Raises:
        CertificateBroken: The authority cannot be used.
    """
    ensure_trust(directory, now=now)
    names, addresses = sorted(set(names)), sorted(set(addresses))
    node = Node.of(directory)
    ca = load_cert(directory / "ca.pem")
    revoked = {each.serial for each in list_issued(directory) if each.revoked_at is not None}
    if anew or node_problem(
        node, ca=ca, names=names, addresses=addresses, revoked=revoked, now=now
    ):
        key = new_key()
        request = make_request(key, name)
        made = sign_request(
            directory, request, name=name, kind="node", names=names, addresses=addresses, now=now
        )
        write_private(node.pem, key + made)
        failpoints.hit("certificate.node.written")
    return node


def ensure_server(
    directory: Path,
    path: Path,
    name: str,
    *,
    names: Iterable[str],
    addresses: Iterable[str],
    now: datetime,
) -> None:
    """See to it that a file holds key and certificate of a server of this machine that will do.

    While a new authority takes over, one of the old authority will do: whoever knows no other yet
    still finds the server.

    Args:
        directory: Where the authority is.
        path: The file, key first.
        name: Whose it is, for the list.
        names: DNS names it is good for.
        addresses: IP addresses it is good for.
        now: The time, aware.

    Raises:
        CertificateBroken: The authority cannot be used.
    """
    trust = ensure_trust(directory, now=now)
    names, addresses = sorted(set(names)), sorted(set(addresses))
    revoked = {each.serial for each in list_issued(directory) if each.revoked_at is not None}
    if not node_problem(
        Node(pem=path, trust=trust), names=names, addresses=addresses, revoked=revoked, now=now
    ):
        return
    key = new_key()
    made = sign_request(
        directory,
        make_request(key, name),
        name=name,
        kind="server",
        names=names,
        addresses=addresses,
        now=now,
    )
    write_private(path, key + made)


def node_problem(
    node: Node,
    *,
    ca: x509.Certificate | None = None,
    names: Collection[str],
    addresses: Collection[str],
    revoked: Collection[str] = (),
    now: datetime,
) -> str:
    """Return why a machine needs another certificate; '' if it does not.

    Args:
        node: Its files.
        ca: The authority that signs now; None: any of those it trusts will do.
        names: DNS names it needs.
        addresses: IP addresses it needs.
        revoked: Serial numbers that count no more, in hex.
        now: The time, aware.
    """
    try:
        cert, key = load_cert(node.pem), load_key(node.pem)
        authorities = [ca] if ca is not None else trusted(node.trust)
        held = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (CertificateBroken, ValueError, x509.ExtensionNotFound) as error:
        return f"it cannot be used ({error})"
    if cert.public_key() != key.public_key():
        return "its key is another one's"
    if not any(_signed_by(cert, each) for each in authorities):
        return "another authority signs now"
    missing = [str(each.value) for each in alternative_names(names, addresses) if each not in held]
    if missing:
        return f"it is not for {', '.join(missing)}"
    if _hex(cert.serial_number) in revoked:
        return "it is revoked"
    if now < cert.not_valid_before_utc:
        return "it is not valid yet"
    if now >= cert.not_valid_after_utc - renewal_margin(cert):
        return "it nears its end"
    return ""


def renewal_margin(cert: x509.Certificate) -> timedelta:
    """Return how long before its end a certificate is replaced: at most a third of its life."""
    return min(RENEW_BEFORE, (cert.not_valid_after_utc - cert.not_valid_before_utc) / 3)


# -- a member's side -------------------------------------------------------------------------------


def request_node(directory: Path, name: str) -> str:
    """Return a request for a certificate, for a new key that stays on this machine."""
    with locked_dir(directory):
        key = new_key()
        write_private(_waiting_key(directory), key)
    return make_request(key, name)


def install_node(directory: Path, cert_pem: str, trust_pem: str) -> Node:
    """Take into use what the authority answered to `request_node`.

    Raises:
        CertificateBroken: It does not fit the key that waits for it, or no authority that came
            with it has signed it. What was in use stays.
    """
    node, waiting = Node.of(directory), _waiting_key(directory)
    with locked_dir(directory):
        try:
            key_pem = waiting.read_text(encoding="ascii")
            key = parse_key(key_pem.encode("ascii"))
            cert = x509.load_pem_x509_certificate(cert_pem.encode("ascii"))
            authorities = x509.load_pem_x509_certificates(trust_pem.encode("ascii"))
        except (OSError, ValueError) as error:
            raise CertificateBroken(str(waiting), f"M1's answer: {error}") from None
        if cert.public_key() != key.public_key():
            raise CertificateBroken(str(waiting), "M1's answer is for another key")
        if not any(_signed_by(cert, each) for each in authorities):
            raise CertificateBroken(str(waiting), "M1's answer is signed by nobody it names")
        # First whom to believe, which is more than before, then what to show.
        write_private(node.trust, trust_pem)
        failpoints.hit("certificate.trust.written")
        write_private(node.pem, key_pem + cert_pem)
        failpoints.hit("certificate.answer.installed")
        waiting.unlink()
    return node


def install_trust(directory: Path, trust_pem: str) -> None:
    """Believe these authorities from now on.

    Raises:
        CertificateBroken: The text is no certificates.
    """
    path = directory / "trust.pem"
    try:
        x509.load_pem_x509_certificates(trust_pem.encode("ascii"))
    except ValueError as error:
        raise CertificateBroken(str(path), f"M1's answer: {error}") from None
    with locked_dir(directory):
        write_private(path, trust_pem)


def gate_trust(directory: Path) -> str:
    """Return the authorities by which members know M1's gate, the one that signed for it first."""
    paths = (directory / "ca.old.pem", directory / "ca.pem")
    return "".join(path.read_text(encoding="ascii") for path in paths if path.exists())


def own_serial(directory: Path) -> str:
    """Return the serial number of this machine's certificate, in hex; '' if it has none."""
    try:
        return f"{load_cert(Node.of(directory).pem).serial_number:x}"
    except CertificateBroken:
        return ""


def trust_digest(directory: Path) -> str:
    """Return what tells one bundle of authorities from another; '' if there is none."""
    try:
        return hashlib.sha256(Node.of(directory).trust.read_bytes()).hexdigest()
    except OSError:
        return ""


def remove_node(directory: Path) -> None:
    """Forget this machine's certificate and whom it believed: it has left."""
    for path in (*vars(Node.of(directory)).values(), _waiting_key(directory)):
        path.unlink(missing_ok=True)


# -- looking ---------------------------------------------------------------------------------------


def list_issued(directory: Path) -> tuple[Issued, ...]:
    """Return the certificates that were given out, oldest first.

    Raises:
        CertificateBroken: The list is there but is not one of ours.
    """
    path = directory / "issued.json"
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise CertificateBroken(str(path), f"its schema is not {SCHEMA}")
        return tuple(
            Issued(
                **entry | {"names": tuple(entry["names"]), "addresses": tuple(entry["addresses"])}
            )
            for entry in data["issued"]
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CertificateBroken(str(path), str(error)) from None


def trusted(trust: Path) -> list[x509.Certificate]:
    """Return the authorities of a bundle.

    Raises:
        CertificateBroken: There are none in the file, or there is no file.
    """
    try:
        return x509.load_pem_x509_certificates(trust.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateBroken(str(trust), str(error)) from None


# -- taking back -----------------------------------------------------------------------------------


def revoke(directory: Path, which: str, *, now: datetime, reason: str = "") -> tuple[Issued, ...]:
    """Take back certificates: the one of a serial number, or all that a name has.

    Args:
        directory: Where the authority is.
        which: Serial number, in hex, or at least its first eight digits; else a name.
        now: The time, aware.
        reason: For the list.

    Returns:
        Those that counted until now.

    Raises:
        CertificateRefused: None of these counts.
        CertificateBroken: The authority or the list cannot be used.
    """
    with locked_dir(directory):
        known = list_issued(directory)
        found = {each.serial for each in known if each.revoked_at is None and _is(each, which)}
        if not found:
            raise CertificateRefused(f"no certificate that counts is called {which!r}")
        changed = [
            replace(each, revoked_at=now.timestamp(), reason=reason[:200])
            if each.serial in found
            else each
            for each in known
        ]
        _save(directory, changed)
        failpoints.hit("certificate.revoke.listed")
        _write_revocations(directory, now)
    return tuple(each for each in changed if each.serial in found)


def ensure_revocations(directory: Path, *, now: datetime) -> Path:
    """Return the file with the authority's revocation list, made anew when it grows old."""
    path = directory / "crl.pem"
    with locked_dir(directory):
        _complete_rollover(directory)
        if not _revocations_will_do(path, directory, now):
            _write_revocations(directory, now)
    return path


# -- another authority -----------------------------------------------------------------------------


def begin_rollover(directory: Path, *, now: datetime) -> Pair:
    """Make a new authority, which signs from now on; the old one is trusted until the end.

    Raises:
        RolloverRefused: One is under way already.
        CertificateBroken: The authority cannot be used.
    """
    ensure_ca(directory, now=now)
    with locked_dir(directory):
        _complete_rollover(directory)
        if (directory / "ca.old.pem").exists():
            raise RolloverRefused("the last change of the authority has not ended yet")
        key, cert = new_authority(now)
        write_private(directory / "ca.next.key", key)
        write_private(directory / "ca.next.pem", cert)
        failpoints.hit("certificate.rollover.begun")
        _complete_rollover(directory)
        _write_revocations(directory, now)
    return Pair(directory / "ca.pem", directory / "ca.key")


def finish_rollover(directory: Path, *, now: datetime) -> bool:
    """Believe the old authority no more; whether there was one."""
    with locked_dir(directory):
        _complete_rollover(directory)
        old = Pair(directory / "ca.old.pem", directory / "ca.old.key")
        ended = old.cert.exists()
        old.cert.unlink(missing_ok=True)
        failpoints.hit("certificate.rollover.ended")
        old.key.unlink(missing_ok=True)
        _write_trust(directory)
        _write_revocations(directory, now)
    return ended


def is_rolling_over(directory: Path) -> bool:
    """Whether two authorities are trusted now."""
    return (directory / "ca.old.pem").exists() or (directory / "ca.next.pem").exists()


def _complete_rollover(directory: Path) -> None:
    """Bring a change of the authority to where both are in place. The caller holds the lock.

    Each step can be done again: whoever was interrupted goes on here at the next call.
    """
    next_cert, next_key = directory / "ca.next.pem", directory / "ca.next.key"
    if not next_cert.exists():
        next_key.unlink(missing_ok=True)  # It was never in use.
        return
    current = Pair(directory / "ca.pem", directory / "ca.key")
    if current.key.read_bytes() != next_key.read_bytes():
        write_private(directory / "ca.old.key", current.key.read_text(encoding="ascii"))
        write_private(directory / "ca.old.pem", current.cert.read_text(encoding="ascii"))
        failpoints.hit("certificate.rollover.kept")
        write_private(current.key, next_key.read_text(encoding="ascii"))
    write_private(current.cert, next_cert.read_text(encoding="ascii"))
    failpoints.hit("certificate.rollover.signing")
    _write_trust(directory)
    next_cert.unlink()
    next_key.unlink()


def _write_trust(directory: Path) -> None:
    """Write down whom to believe, M1's known authority first, if that has changed."""
    paths = (directory / "ca.old.pem", directory / "ca.pem", directory / "own-ca.pem")
    text = "".join(path.read_text(encoding="ascii") for path in paths if path.exists())
    trust = directory / "trust.pem"
    if not trust.exists() or trust.read_text(encoding="ascii") != text:
        write_private(trust, text)


# -- the list and the file of what was taken back --------------------------------------------------


def _write_revocations(directory: Path, now: datetime) -> None:
    known = list_issued(directory)
    texts = []
    for authority in _authorities(directory):
        ca, ca_key = load_cert(authority.cert), load_key(authority.key)
        mine = _fingerprint(ca)
        gone = [
            (int(each.serial, 16), datetime.fromtimestamp(each.revoked_at, UTC))
            for each in known
            if each.authority == mine and each.revoked_at is not None
        ]
        texts.append(make_revocation_list(gone, ca, ca_key, now=now, life=REVOCATIONS_LIFE))
    write_private(directory / "crl.pem", "".join(texts))
    failpoints.hit("certificate.revocations.written")


def _revocations_will_do(path: Path, directory: Path, now: datetime) -> bool:
    try:
        parts = path.read_bytes().split(_CRL_END)[:-1]
        lists = [x509.load_pem_x509_crl(part + _CRL_END) for part in parts]
    except (OSError, ValueError):
        return False
    issuers = {each.issuer for each in lists}
    wanted = {load_cert(authority.cert).subject for authority in _authorities(directory)}
    ends = [each.next_update_utc for each in lists]
    half = now + REVOCATIONS_LIFE / 2
    return issuers == wanted and all(end is not None and end > half for end in ends)


_CRL_END = b"-----END X509 CRL-----\n"


def _authorities(directory: Path) -> list[Pair]:
    stems = ("ca.old", "ca")
    pairs = [Pair(directory / f"{stem}.pem", directory / f"{stem}.key") for stem in stems]
    return [pair for pair in pairs if pair.cert.exists()]


def _signer(directory: Path) -> tuple[x509.Certificate, Any]:
    _complete_rollover(directory)
    return load_cert(directory / "ca.pem"), load_key(directory / "ca.key")


def _kept(directory: Path, now: datetime) -> list[Issued]:
    """Return what is worth keeping of the list. What is revoked counts until it has expired."""
    oldest = (now - _KEPT).timestamp()
    return [each for each in list_issued(directory) if each.expires_at > oldest]


def _save(directory: Path, issued: Sequence[Issued]) -> None:
    data = {"schema": SCHEMA, "issued": [asdict(each) for each in issued]}
    write_private(directory / "issued.json", json.dumps(data, indent=2) + "\n")


def _entry(
    cert: x509.Certificate,
    ca: x509.Certificate,
    name: str,
    kind: Kind,
    names: Sequence[str],
    addresses: Sequence[str],
    now: datetime,
) -> Issued:
    return Issued(
        serial=_hex(cert.serial_number),
        name=name,
        kind=kind,
        names=tuple(names),
        addresses=tuple(addresses),
        sha256=_fingerprint(cert),
        authority=_fingerprint(ca),
        issued_at=now.timestamp(),
        expires_at=cert.not_valid_after_utc.timestamp(),
    )


def _is(issued: Issued, which: str) -> bool:
    text = which.replace(":", "").lower()
    by_serial = len(text) >= 8 and issued.serial.startswith(text)
    return by_serial or issued.name == which


def _signed_by(cert: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        cert.verify_directly_issued_by(ca)
    except Exception:  # Another subject, another kind of key, a wrong signature: not this one.
        return False
    return True


def _fingerprint(cert: x509.Certificate) -> str:
    return cert.fingerprint(hashes.SHA256()).hex()


def _hex(serial: int) -> str:
    return f"{serial:040x}"


def _waiting_key(directory: Path) -> Path:
    return directory / "node.key.new"

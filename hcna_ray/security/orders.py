"""Signatures of M1's orders, made and checked with what both sides have since the machine joined.

M1 signs with a key of its own, ``cluster/orders.key``, whose certificate (``orders.pem``, for the
name `ORDERS_NAME`) the cluster's authority has signed: as the gate's, it is renewed before it ends
and follows a change of the authority. A worker knows that authority from its join code, so nothing
new has to be handed out, what one worker knows does not let it speak for M1 to another, and no
secret is shared that a backup or a second machine could give away. The signature is ECDSA on P-256:
the authority's keys are of that kind, and every machine that has joined can check them.

A signature says who; that an order is not an old one follows from what is signed: it names the
question that it answers, and each question is asked once (`hcna_ray.runtime.orders`). So a worker
does not ask its wall clock whether the certificate is valid now: a wrong clock would part it from
M1, and the key lies beside the authority's, so whoever has an old one needs none.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hcna_ray.core.errors import HcnaError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    from hcna_ray.security.certs import Pair

log = logging.getLogger(__name__)

#: Name in the certificate. Nobody but M1 gets one for it.
ORDERS_NAME = "orders.hcna.internal"
_STEM = "orders"
_DOMAIN = b"hcna.order.v1\0"
_HEAD = struct.Struct(">H")
#: Pause between two looks whether the certificate has to be renewed, and after one that failed.
LOOK = timedelta(hours=1)
AGAIN = timedelta(minutes=1)


class OrderRefused(HcnaError):
    """What claims to come from M1 is not signed by it, or is no answer to what was asked."""

    code = "order_refused"


class OrderSigner:
    """M1's signature. Made where the authority's key is."""

    def __init__(
        self, cluster_dir: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Name the directory of the authority; nothing is read yet.

        Args:
            cluster_dir: Where ``ca.key`` is.
            now: The time, aware.
        """
        self._dir, self._now = cluster_dir, now
        self._looked: datetime | None = None
        self._pause = LOOK
        self._authority = 0
        #: The key, and its certificate as DER.
        self._pair: tuple[ec.EllipticCurvePrivateKey, bytes] | None = None

    @property
    def able(self) -> bool:
        """Whether there is something to sign with, be it as old as it may."""
        return self._pair is not None

    def due(self) -> bool:
        """Whether it is time to `renew`."""
        if self._pair is None or self._looked is None:
            return True
        recent = timedelta(0) <= self._now() - self._looked < self._pause
        return not recent or self._changed_at() != self._authority

    def renew(self) -> None:
        """Look after the certificate. Waits for whoever else writes there: not on an event loop.

        Where that fails what there is goes on: no worker asks when a certificate ends, and orders
        that do not leave are worse than one that is old.

        Raises:
            CertificateBroken: The authority cannot be used, and there is no earlier certificate.
        """
        from hcna_ray.security.certs import CertificateBroken, Pair, ensure_server

        now = self._now()
        try:
            made = ensure_server(self._dir, _STEM, names=(ORDERS_NAME,), addresses=(), now=now)
            self._pair, self._pause = _read_pair(made), LOOK
        except Exception as error:  # A full disk, a lost key, a clock beyond the authority's end.
            self._pause = AGAIN
            log.error(
                "the certificate of M1's orders cannot be looked after; the old one goes on: %s",
                error,
                extra={"action": "orders.renewal_failed", "error": str(error)},
            )
            if self._pair is None:
                old = Pair(self._dir / f"{_STEM}.pem", self._dir / f"{_STEM}.key")
                try:
                    self._pair = _read_pair(old)
                except Exception:
                    if isinstance(error, HcnaError):
                        raise error from None
                    raise CertificateBroken(str(old.cert), str(error)) from error
        finally:
            self._looked, self._authority = now, self._changed_at()

    def sign(self, message: bytes) -> bytes:
        """Return what proves that M1 says this; the first time, after `renew`.

        Raises:
            CertificateBroken: There is nothing to sign with.
        """
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        if self._pair is None:
            self.renew()
        assert self._pair is not None
        key, cert = self._pair
        signature = key.sign(_DOMAIN + message, ec.ECDSA(hashes.SHA256()))
        return _HEAD.pack(len(cert)) + cert + signature

    def _changed_at(self) -> int:
        """Return what changes when another authority signs, or the old one goes."""
        try:
            return self._dir.stat().st_mtime_ns
        except OSError:
            return 0


def _read_pair(pair: Pair) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    from cryptography.hazmat.primitives import serialization

    from hcna_ray.security.certs import CertificateBroken, load_cert, load_key

    key, cert = load_key(pair.key), load_cert(pair.cert)
    if cert.public_key() != key.public_key():
        raise CertificateBroken(str(pair.cert), "it belongs to another key")
    return key, cert.public_bytes(serialization.Encoding.DER)


class OrderVerifier:
    """A worker's look at M1's signatures."""

    def __init__(self, cluster_dir: Path) -> None:
        """Name the directory with what this machine knows of the cluster.

        Args:
            cluster_dir: Of a machine that has joined, or of M1's.
        """
        self._dir = cluster_dir

    def verify(self, message: bytes, proof: bytes) -> None:
        """Return if M1 says this.

        Raises:
            OrderRefused: Somebody else does, or it was changed.
        """
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            (size,) = _HEAD.unpack_from(proof)
            cert = x509.load_der_x509_certificate(proof[_HEAD.size : _HEAD.size + size])
            signature = proof[_HEAD.size + size :]
            key = cert.public_key()
        except Exception as error:  # The parsers raise many kinds, all of them for what is broken.
            raise OrderRefused(f"the signature cannot be read ({type(error).__name__})") from None
        self._check(cert)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise OrderRefused("it is signed with a key of another kind")
        try:
            key.verify(signature, _DOMAIN + message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise OrderRefused("the signature does not fit: somebody has changed it") from None

    def _check(self, cert: x509.Certificate) -> None:
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        authorities = known_authorities(self._dir)
        if not authorities:
            raise OrderRefused(
                "this machine does not know M1's authority, so it cannot tell who gives orders: "
                "hcna leave --force, then hcna join with a new code (on M1's machine: hcna invite)"
            )
        if not any(_signed_by(cert, each) for each in authorities):
            raise OrderRefused(
                "it is signed by an authority that this machine does not know. If M1 changed its "
                "authority while this machine was away: hcna join with a new code (on M1's "
                "machine: hcna invite); if M1 was set up anew: hcna leave --force first"
            )
        try:
            names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            purposes = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            raise OrderRefused("it is signed by a certificate without a name") from None
        if names.get_values_for_type(x509.DNSName) != [ORDERS_NAME]:
            raise OrderRefused("it is signed by another machine than M1")
        if ExtendedKeyUsageOID.SERVER_AUTH not in purposes:
            raise OrderRefused("it is signed by a certificate for another purpose")


def known_authorities(cluster_dir: Path) -> list[x509.Certificate]:
    """Return the cluster's authorities that this machine believes, none if it knows none.

    A machine that has joined has them with its membership: that of its join code, then those that
    each round of credentials names. ``trust.pem`` is not asked: in it is the owner's authority too,
    which signs for nodes and not for M1.
    """
    from cryptography import x509

    found: list[x509.Certificate] = []
    joined = (cluster_dir / "membership.json").exists()
    for read in (_of_membership,) if joined else (_of_old_ca, _of_ca):
        try:
            found += x509.load_pem_x509_certificates(read(cluster_dir))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _of_membership(cluster_dir: Path) -> bytes:
    known = json.loads((cluster_dir / "membership.json").read_bytes())
    return str(known["ca_pem"]).encode("ascii")


def _of_old_ca(cluster_dir: Path) -> bytes:
    return (cluster_dir / "ca.old.pem").read_bytes()


def _of_ca(cluster_dir: Path) -> bytes:
    return (cluster_dir / "ca.pem").read_bytes()


def _signed_by(cert: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        cert.verify_directly_issued_by(ca)
    except Exception:  # Another subject, another kind of key, a wrong signature: not this one.
        return False
    return True

"""Join codes: one line of text with all that a second machine needs to find and trust M1.

A code holds M1's addresses, the gate's port, a secret, the fingerprint of the cluster's authority
and its own end. M1 keeps only a digest of the secret. The text is written in 32 letters and digits
that are hard to confuse; case, spaces and dashes do not matter, and O, I and L are read as 0, 1, 1.
A checksum tells a slip of the hand from a code that is wrong.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import secrets
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.security.acts import leave
from hcna_ray.security.certs import cert_text, ensure_ca, fingerprint, known_by
from hcna_ray.security.keys import locked_dir
from hcna_ray.supervisor.membership import MembersBroken, digest

PREFIX = "HCNA"
LIFETIME_S = 3600.0
LIFETIME_S_MAX = 30 * 86400.0
SCHEMA = 1
#: M1's addresses in a code; each makes it 7 characters longer.
ADDRESSES_MAX = 8
#: Open invitations at once.
INVITES_MAX = 1000
#: An invitation that has ended is listed for another day.
_KEPT_S = 86400.0

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_READ_AS = {**{letter: index for index, letter in enumerate(_ALPHABET)}, "O": 0, "I": 1, "L": 1}
_GROUP = 8
_VERSION = 1
_TOKEN_BYTES = 16
#: Twice as many as a code with every address has; what is read takes its length squared.
_LETTERS_MAX = 512
#: Of the fingerprint's 32 bytes: to find another authority with the same 16 is out of reach.
_FINGERPRINT_BYTES = 16
_CHECK_BYTES = 3
_FIXED = struct.Struct(f">BIH{_TOKEN_BYTES}s{_FINGERPRINT_BYTES}s")


class BadCode(HcnaError):
    """The text is not a join code, or a character of it is wrong."""

    code = "bad_join_code"


class InviteRefused(HcnaError):
    """The secret of a join code is not valid on this M1. ``code`` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class JoinCode:
    """What a join code says."""

    addresses: tuple[str, ...]
    gate_port: int
    token: str
    #: The first half of the SHA-256 of the authority's certificate, in hex.
    ca_sha256: str
    expires_at: int

    def trusts(self, ca_pem: str) -> bool:
        """Whether this certificate is the authority that the code was made for.

        Raises:
            ValueError: The text is not a certificate.
        """
        return hmac.compare_digest(fingerprint(ca_pem)[: len(self.ca_sha256)], self.ca_sha256)

    def trusts_one_of(self, bundle_pem: str) -> bool:
        """Whether the authority that the code was made for is one of those a member knows.

        Only for what this machine believes already: in what a stranger sends the right one may
        stand beside his own.
        """
        known = x509.load_pem_x509_certificates(bundle_pem.encode("ascii", "replace"))
        return any(self.trusts(cert_text(each)) for each in known)


@dataclass(frozen=True, kw_only=True)
class Invite:
    """An invitation as M1 remembers it: all but the secret."""

    id: str
    token_sha256: str
    created_at: float
    expires_at: float
    #: Machines that may use it; None: any number.
    uses: int | None
    #: Name that the machine gets, if it was chosen with the invitation.
    name: str | None
    #: Machines that have used it.
    used_by: tuple[str, ...] = ()
    revoked: bool = False

    def state(self, now: float) -> str:
        """Return ``open``, ``used``, ``expired`` or ``revoked``."""
        if self.revoked:
            return "revoked"
        if now >= self.expires_at:
            return "expired"
        used_up = self.uses is not None and len(self.used_by) >= self.uses
        return "used" if used_up else "open"


# -- the text ------------------------------------------------------------------------------------


def encode_code(code: JoinCode) -> str:
    """Return the text of a join code."""
    raw = _FIXED.pack(
        _VERSION,
        code.expires_at,
        code.gate_port,
        bytes.fromhex(code.token),
        bytes.fromhex(code.ca_sha256),
    )
    for address in code.addresses:
        packed = ipaddress.ip_address(address).packed
        raw += bytes([len(packed)]) + packed
    raw += hashlib.sha256(raw).digest()[:_CHECK_BYTES]
    bits = len(raw) * 8
    count = -(-bits // 5)
    number = int.from_bytes(raw) << (count * 5 - bits)
    text = "".join(_ALPHABET[number >> (5 * place) & 31] for place in reversed(range(count)))
    return "-".join([PREFIX, *(text[at : at + _GROUP] for at in range(0, count, _GROUP))])


def decode_code(text: str) -> JoinCode:
    """Return what a join code says.

    Raises:
        BadCode: It is not one, or was not copied whole and right.
    """
    letters = "".join(text.upper().split()).replace("-", "")
    if not letters.startswith(PREFIX):
        raise BadCode(f"a join code starts with {PREFIX}-")
    if len(letters) > _LETTERS_MAX:
        raise BadCode("this is longer than any join code; copy it again")
    values = [_READ_AS.get(letter) for letter in letters.removeprefix(PREFIX)]
    strange = sorted({x for x in letters.removeprefix(PREFIX) if x not in _READ_AS})
    if strange:
        raise BadCode(f"a join code has no {' '.join(strange[:5])} in it; copy it again")
    number = 0
    for value in values:
        number = number << 5 | (value or 0)
    size, spare = divmod(len(values) * 5, 8)
    if spare >= 5 or number & ((1 << spare) - 1):
        raise BadCode("a character of the join code is missing or wrong; copy it again")
    raw = (number >> spare).to_bytes(size)
    body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
    if len(body) < _FIXED.size or hashlib.sha256(body).digest()[:_CHECK_BYTES] != check:
        raise BadCode("a character of the join code is missing or wrong; copy it again")
    version, expires_at, port, token, ca_sha256 = _FIXED.unpack_from(body)
    if version != _VERSION:
        raise BadCode(f"the join code has version {version}; install the hcna-ray of M1's machine")
    return JoinCode(
        addresses=_unpack_addresses(body[_FIXED.size :]),
        gate_port=port,
        token=token.hex(),
        ca_sha256=ca_sha256.hex(),
        expires_at=expires_at,
    )


def _unpack_addresses(raw: bytes) -> tuple[str, ...]:
    found = []
    while raw:
        size, raw = raw[0], raw[1:]
        if size not in (4, 16) or len(raw) < size:
            raise BadCode("the join code holds an address that is none")
        found.append(str(ipaddress.ip_address(raw[:size])))
        raw = raw[size:]
    if not found:
        raise BadCode("the join code holds no address of M1")
    return tuple(found)


# -- what M1 keeps -------------------------------------------------------------------------------


def create_invite(
    settings: Settings,
    *,
    addresses: Sequence[str],
    lifetime_s: float = LIFETIME_S,
    uses: int | None = 1,
    name: str | None = None,
    now: float,
) -> tuple[str, Invite]:
    """Make an invitation; return its join code, which is shown once, and what is kept of it.

    Args:
        settings: Those of M1.
        addresses: Where M1 may be found, the best first; `ADDRESSES_MAX` are used.
        lifetime_s: How long the code works.
        uses: How many machines may use it; None: any number.
        name: Name for the machine, e.g. ``W2``; None: it chooses or gets the next free one.
        now: Seconds since the epoch.

    Raises:
        InviteRefused: Too many are open, or a number is out of bounds.
        CertificateBroken: The cluster's authority cannot be used.
    """
    if not 1 <= lifetime_s <= LIFETIME_S_MAX:
        raise InviteRefused("invalid_request", "a join code lives from 1 second to 30 days")
    if uses is not None and not 1 <= uses <= INVITES_MAX:
        raise InviteRefused("invalid_request", f"a join code has 1 to {INVITES_MAX} uses")
    if name is not None and uses != 1:
        raise InviteRefused("invalid_request", "a join code for one name has one use")
    directory = settings.cluster_dir
    ensure_ca(directory, now=datetime.fromtimestamp(now, UTC))
    ca_pem = known_by(directory).cert.read_text(encoding="ascii")
    token = secrets.token_hex(_TOKEN_BYTES)
    invite = Invite(
        id=secrets.token_hex(4),
        token_sha256=digest(token),
        created_at=now,
        expires_at=now + lifetime_s,
        uses=uses,
        name=name,
    )
    with locked_dir(directory):
        kept = [each for each in list_invites(directory) if now < each.expires_at + _KEPT_S]
        if len(kept) >= INVITES_MAX:
            kept = [each for each in kept if each.state(now) == "open"]
        if len(kept) >= INVITES_MAX:
            raise InviteRefused("invalid_request", f"{INVITES_MAX} join codes are open already")
        _save(directory, [*kept, invite])
    until = datetime.fromtimestamp(invite.expires_at, UTC).isoformat(timespec="seconds")
    leave(
        settings.acts_dir,
        "invite.created",
        invite.id,
        detail=f"{name or 'any name'}, until {until}",
    )
    code = JoinCode(
        addresses=tuple(addresses)[:ADDRESSES_MAX],
        gate_port=settings.port("gate"),
        token=token,
        ca_sha256=fingerprint(ca_pem)[: 2 * _FINGERPRINT_BYTES],
        expires_at=int(now + lifetime_s),
    )
    return encode_code(code), invite


def list_invites(cluster_dir: Path) -> tuple[Invite, ...]:
    """Return the invitations of the last days, oldest first.

    Raises:
        MembersBroken: The file is there but is not one of ours.
    """
    path = cluster_dir / "invites.json"
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise MembersBroken(str(path), f"its schema is not {SCHEMA}")
        return tuple(
            Invite(**entry | {"used_by": tuple(entry["used_by"])}) for entry in data["invites"]
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MembersBroken(str(path), str(error)) from None


def revoke_invite(cluster_dir: Path, invite_id: str) -> Invite | None:
    """End an invitation now; return it, or None if there is none with this id."""
    with locked_dir(cluster_dir):
        invites = list_invites(cluster_dir)
        found = next((each for each in invites if each.id == invite_id), None)
        if found is not None:
            ended = replace(found, revoked=True)
            _save(cluster_dir, [ended if each is found else each for each in invites])
    return found


def revoke_invites_of(cluster_dir: Path, machine_id: str) -> None:
    """End the invitations that a machine has used: it still has their text."""
    with locked_dir(cluster_dir):
        invites = list_invites(cluster_dir)
        ended = [
            replace(each, revoked=True) if machine_id in each.used_by else each for each in invites
        ]
        if ended != list(invites):
            _save(cluster_dir, ended)


def check_invite(
    cluster_dir: Path, token: str, *, now: float, machine_id: str | None = None
) -> Invite:
    """Return the invitation of this secret if it may be used now.

    Args:
        cluster_dir: Where M1 keeps its invitations.
        token: The secret in the join code.
        now: Seconds since the epoch.
        machine_id: Who asks: a machine that has used it before may do so again, so that an answer
            that was lost on the way does no harm.

    Raises:
        InviteRefused: ``invite_unknown``, ``invite_expired`` or ``invite_used``.
    """
    return _usable(list_invites(cluster_dir), token, now, machine_id)


def redeem(cluster_dir: Path, token: str, *, now: float, machine_id: str) -> Invite:
    """Use an invitation for this machine; see `check_invite`."""
    with locked_dir(cluster_dir):
        invites = list_invites(cluster_dir)
        found = _usable(invites, token, now, machine_id)
        if machine_id in found.used_by:
            return found
        used = replace(found, used_by=(*found.used_by, machine_id))
        _save(cluster_dir, [used if each is found else each for each in invites])
        return used


def _usable(invites: Sequence[Invite], token: str, now: float, machine_id: str | None) -> Invite:
    presented = digest(token)
    found: Invite | None = None
    for each in invites:
        if hmac.compare_digest(each.token_sha256, presented):
            found = each
    if found is None or found.revoked:
        raise InviteRefused("invite_unknown", "M1 does not know this join code, or it was revoked")
    match found.state(now):
        case "expired":
            raise InviteRefused("invite_expired", "the join code has expired")
        case "used" if machine_id not in found.used_by:
            raise InviteRefused("invite_used", "the join code was used by another machine")
    return found


def _save(cluster_dir: Path, invites: Sequence[Invite]) -> None:
    data = {"schema": SCHEMA, "invites": [asdict(each) for each in invites]}
    write_private(cluster_dir / "invites.json", json.dumps(data, indent=2) + "\n")

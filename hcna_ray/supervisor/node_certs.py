"""The certificate of this machine's Ray node: which names it needs, where it comes from.

On M1's machine the authority is at hand, or the owner's own files are named in the settings. A
machine that has joined asks M1's gate.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from hcna_ray.config import LOOPBACK, NodeSecuritySettings, Settings
from hcna_ray.durable import write_private
from hcna_ray.security.authority import (
    Node,
    ensure_node,
    ensure_revocations,
    ensure_trust,
    install_node,
    node_problem,
    request_node,
    trusted,
)
from hcna_ray.security.certs import CLIENT, SERVER, CertificateBroken
from hcna_ray.security.own_certs import (
    OwnCertificate,
    OwnCertificateRefused,
    is_signed_by,
    load_own,
)
from hcna_ray.supervisor.addresses import default_address, own_addresses
from hcna_ray.supervisor.gate_protocol import ADDRESSES_MAX

Json = dict[str, Any]

#: Longest name that fits into a certificate.
_NAME_CHARS_MAX = 253
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
#: The end of the names that only the cluster gives: its nodes', the gate's, that of M1's orders.
_INTERNAL = ".hcna.internal"


def names_of(node: str, hostname: str | None = None) -> tuple[str, ...]:
    """Return the DNS names for the certificate of a node: its own, and what calls it locally."""
    hostname = (socket.gethostname() if hostname is None else hostname).lower()
    return (f"{node.lower()}{_INTERNAL}", "localhost", *([hostname] if _usable(hostname) else []))


def _usable(hostname: str) -> bool:
    """Whether it is a name of a machine: no star, no address, none of those that we give."""
    labels = hostname.split(".")
    return (
        len(hostname) <= _NAME_CHARS_MAX
        and all(_LABEL.fullmatch(label) for label in labels)
        # Some libraries compare an address with the names, too.
        and not labels[-1].isdecimal()
        and not f".{hostname}".endswith(_INTERNAL)
    )


def addresses_here() -> tuple[str, ...]:
    """Return the IP addresses under which this machine's processes are called."""
    return (LOOPBACK, "::1", *(own.address for own in own_addresses()))


def grantable(asked: Iterable[str], others: Collection[str]) -> list[str]:
    """Return those of the addresses a member asks for that its certificate may be good for.

    None of another machine's, no names, nothing that is no machine's own.

    Args:
        asked: What the member says, and where it was seen.
        others: Addresses of M1 and of the other members.
    """
    found = set()
    for text in asked:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        odd = address.is_unspecified or address.is_multicast or address.is_loopback
        odd |= getattr(address, "ipv4_mapped", None) is not None
        if not odd and str(address) not in others:
            found.add(str(address))
    return sorted(found)


def ensure_m1_node(
    settings: Settings,
    *,
    now: datetime,
    anew: bool = False,
    addresses: Callable[[], tuple[str, ...]] = addresses_here,
) -> Node:
    """Return the files of M1's node, made or taken anew if they would not do any more.

    Args:
        settings: Of M1.
        now: The time, aware.
        anew: Make another certificate even if the present one would do.
        addresses: What it is good for, besides ``ray.node_address``.

    Raises:
        CertificateBroken: The authority cannot be used.
        OwnCertificateRefused: The settings name files that cannot be used.
    """
    directory, name = settings.cluster_dir, settings.moderator.name
    wanted = settings.ray.node_address
    here = (*addresses(), *([wanted] if wanted is not None else []))
    own = own_certificate(settings.moderator.security, wanted, now=now)
    write_if_changed(directory / "own-ca.pem", own.ca_pem if own is not None else "")
    if own is None:
        node = ensure_node(
            directory, name, names=names_of(name), addresses=here, now=now, anew=anew
        )
    else:
        ensure_trust(directory, now=now)
        node = Node.of(directory)
        write_if_changed(node.pem, own.pem)
    ensure_revocations(directory, now=now)
    return node


def ensure_member_node(
    settings: Settings,
    name: str,
    address: str,
    *,
    ask: Callable[[Json], Json],
    now: datetime,
    anew: bool = False,
    on_answer: Callable[[Json], None] = lambda answer: None,
) -> bool:
    """See to it that the files of a member's node will do; M1 is asked only if they would not.

    Args:
        settings: Of this machine.
        name: Its name in the cluster.
        address: Its address for the others.
        ask: Sends M1's gate a request for a certificate and returns the answer.
        now: The time, aware.
        anew: Ask even if the present one would do, or for whom to believe alone.
        on_answer: Told what M1 answered, before any of it is taken into use.

    Returns:
        Whether they are other ones than before.

    Raises:
        OSError: M1 cannot be reached, or a file cannot be written.
        CertificateBroken: M1's answer does not fit, or is not for this machine's address.
        OwnCertificateRefused: The owner's certificate will not do.
        HcnaError: M1 refused.
    """
    directory = settings.cluster_dir
    node = Node.of(directory)
    own = own_certificate(settings.worker.security, address, now=now)
    if own is not None and node.trust.exists() and not anew:
        _refuse_unbelieved(settings.worker.security, own, node)
        return write_if_changed(node.pem, own.pem)
    needed = (LOOPBACK, address)
    if not (anew or node_problem(node, names=(), addresses=needed, now=now)):
        return False
    answer = ask(certificate_request(directory, name, address))
    on_answer(answer)
    install_node(directory, str(answer.get("cert_pem")), str(answer.get("trust_pem")))
    if own is not None:
        _refuse_unbelieved(settings.worker.security, own, node)
        write_private(node.pem, own.pem)
    elif problem := node_problem(node, names=(), addresses=needed, now=now):
        raise CertificateBroken(
            str(node.pem),
            f"M1 has signed it, but {problem}; another machine on M1's list may have that address "
            "(hcna doctor, there), or a clock is wrong",
        )
    return True


def _refuse_unbelieved(security: NodeSecuritySettings, own: OwnCertificate, node: Node) -> None:
    """Refuse a certificate of the owner that M1 and the others would not let in."""
    if not is_signed_by(own, trusted(node.trust)):
        raise OwnCertificateRefused(
            str(security.cert_path),
            "is of an authority that M1 does not believe",
            "name the same ca_path in moderator.security on M1, with a certificate of M1's",
        )


def certificate_request(directory: Path, name: str, address: str | None) -> Json:
    """Return what a machine sends to get a certificate; its new key waits for the answer."""
    mine = [own.address for own in own_addresses() if not own.inside]
    asked = dict.fromkeys([*([address] if address else []), *mine])
    return {
        "csr": request_node(directory, name),
        "hostname": socket.gethostname()[:128],
        "address": address,
        "addresses": list(asked)[:ADDRESSES_MAX],
    }


def own_certificate(
    security: NodeSecuritySettings, address: str | None, *, now: datetime
) -> OwnCertificate | None:
    """Return the certificate that the settings name for this node, or None if they name none.

    Args:
        security: Of the node.
        address: Its address for the others, if it is chosen in the settings.
        now: The time, aware.

    Raises:
        OwnCertificateRefused: It cannot be used.
    """
    if not security.enable_mtls:
        return None
    assert security.cert_path is not None
    assert security.key_path is not None
    # Ray's processes call each other by the node's address, and some by 127.0.0.1.
    needed = {LOOPBACK, default_address() if address is None else address}
    return load_own(
        security.cert_path,
        security.key_path,
        security.ca_path,
        addresses=needed,
        purposes=(SERVER, CLIENT),
        now=now,
    )


def write_if_changed(path: Path, text: str) -> bool:
    """Write a private file unless it holds the text already; '' removes it. Whether it changed."""
    before = path.read_text(encoding="ascii") if path.exists() else ""
    if before == text:
        return False
    if text:
        write_private(path, text)
    else:
        path.unlink()
    return True

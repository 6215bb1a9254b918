"""Where requests of ours may go that somebody else asked for (webhooks), and how they are signed.

Whoever may submit a task may name an address that M1 will call, and M1 stands where the caller does
not: beside the database, the dashboard, a cloud's metadata. So an address is looked at twice. The
URL, before it is stored: its form, its scheme and port, and the list of hosts if there is one. And
what its name resolves to, each time, at the moment of the connection: the name is resolved once,
every address that comes back must be allowed, and the connection goes to one of those very
addresses. A name that answers differently the next time gains nothing by it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from hcna_ray.config import WebhookSettings
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.security.keys import locked_dir

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

URL_CHARS_MAX = 2048
_PORTS = {"https": 443, "http": 80}
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)\Z")
#: A last label that makes a name a number: then it is an IPv4 address in plain form, or refused.
_NUMBER = re.compile(r"[0-9]+\Z|0x[0-9a-f]*\Z")
#: IPv6 networks that carry an IPv4 address, and by how many bits that is to be shifted.
_CARRIERS: tuple[tuple[ipaddress.IPv6Network, int], ...] = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)
#: What nobody on the open network answers from, whatever a version of Python's tables says.
_NEVER: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)


class TargetRefused(HcnaError):
    """A URL, or what its name resolves to, is none that this machine calls for others."""

    code = "target_refused"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboundPolicy:
    """Where requests may go."""

    #: Hosts by name, or ``*.name`` for all below; none named: every host on the open network.
    hosts: tuple[str, ...] = ()
    #: Networks that are not open and allowed all the same.
    networks: tuple[Network, ...] = ()
    #: Addresses that are never allowed, such as those of this house.
    denied: frozenset[Address] = frozenset()
    #: Ports beside 443 (and 80, where plain HTTP is allowed).
    ports: tuple[int, ...] = ()
    plain_http: bool = False


def policy_of(settings: WebhookSettings, denied: Iterable[str] = ()) -> OutboundPolicy:
    """Return where the settings let reports go.

    Args:
        settings: Section ``webhooks``.
        denied: Addresses that are never allowed.
    """
    return OutboundPolicy(
        hosts=settings.hosts,
        networks=tuple(ipaddress.ip_network(text) for text in settings.networks),
        denied=frozenset(ipaddress.ip_address(text.partition("%")[0]) for text in denied),
        ports=settings.ports,
        plain_http=settings.plain_http,
    )


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes, as far as its URL says it."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What stands in the ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def vet_url(url: str, policy: OutboundPolicy) -> Target:
    """Return where a URL leads.

    Raises:
        TargetRefused: it is not well formed, or leads where no request may go.
    """
    if len(url) > URL_CHARS_MAX:
        raise TargetRefused(f"the URL has more than {URL_CHARS_MAX} characters")
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise TargetRefused("the URL holds a character that has no place in one")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TargetRefused("the URL is not well formed") from error
    schemes = ("https", "http") if policy.plain_http else ("https",)
    if parts.scheme not in schemes:
        raise TargetRefused(
            f"the URL does not begin with {' or '.join(s + '://' for s in schemes)}"
        )
    if "@" in parts.netloc or parts.fragment or url.endswith("#"):
        raise TargetRefused("the URL holds a user, a password or a fragment")
    host = _host(parts.netloc, parts.hostname or "")
    port = _PORTS[parts.scheme] if port is None else port
    allowed = {_PORTS[scheme] for scheme in schemes} | set(policy.ports)
    if port not in allowed:
        raise TargetRefused(f"port {port} is none of {', '.join(map(str, sorted(allowed)))}")
    if policy.hosts and not any(_fits(host, pattern) for pattern in policy.hosts):
        raise TargetRefused(f"{host} is none of the hosts that are allowed")
    literal = _literal(host)
    if literal is not None:
        vet_address(literal, policy)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port, path)


def vet_addresses(found: Iterable[str], policy: OutboundPolicy) -> Sequence[Address]:
    """Return what a name resolved to; all of it must be allowed.

    Raises:
        TargetRefused: one of them is not, or there is none.
    """
    addresses = []
    for text in found:
        try:
            addresses.append(ipaddress.ip_address(text))
        except ValueError as error:  # With a zone: of one link, and so none of the open network.
            raise TargetRefused(f"{text} is no address of the open network") from error
    if not addresses:
        raise TargetRefused("the host has no address")
    for address in addresses:
        vet_address(address, policy)
    return addresses


def vet_address(address: Address, policy: OutboundPolicy) -> None:
    """Raise `TargetRefused` unless a request may go to an address."""
    for form in _forms(address):
        if form in policy.denied:
            raise TargetRefused(f"{address} is an address of this house")
        if any(form in network for network in policy.networks):
            continue
        carried = form is address and len(_forms(address)) > 1
        if not carried and (not form.is_global or any(form in network for network in _NEVER)):
            raise TargetRefused(f"{address} is no address of the open network")


def _forms(address: Address) -> tuple[Address, ...]:
    """Return an address, and the IPv4 address in it if there is one: both count."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise TargetRefused(f"{address} is no address of the open network")
        for network, shift in _CARRIERS:
            if address in network:
                carried = ipaddress.IPv4Address((int(address) >> shift) & 0xFFFFFFFF)
                return address, carried
    return (address,)


def _host(netloc: str, host: str) -> str:
    """Return the host of a URL in its one form."""
    if netloc.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError as error:
            raise TargetRefused("the host is no IPv6 address") from error
    host = host.removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.match(label) for label in labels):
        raise TargetRefused("the host is no host name")
    if _NUMBER.match(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:  # Octal, hexadecimal, in one number: many read these.
            raise TargetRefused("the host is no IPv4 address in its plain form") from error
    if host == "localhost" or host.endswith(".localhost"):
        raise TargetRefused("localhost is no address of the open network")
    return host


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _fits(host: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and len(host) > len(pattern) - 1
    return host == pattern


# -- signatures ------------------------------------------------------------------------------------

#: What a secret begins with, as Standard Webhooks writes them; the rest is base64.
SECRET_PREFIX = "whsec_"
#: Below ``keys/``: what everybody's secret is derived from.
MASTER_FILE = "webhook.key"
_MASTER_BYTES = 32
_INFO = b"hcna webhook secret 1\0"


def ensure_master(keys_dir: Path) -> bytes:
    """Return what the secrets of this house are derived from; create it once.

    Raises:
        ValueError: the file is there and is not one of ours.
    """
    path = keys_dir / MASTER_FILE
    with locked_dir(keys_dir):
        if not path.exists():
            write_private(path, secrets.token_hex(_MASTER_BYTES))
        text = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch(f"[0-9a-f]{{{2 * _MASTER_BYTES}}}", text):
        raise ValueError(f"{MASTER_FILE} does not hold {2 * _MASTER_BYTES} hexadecimal digits")
    return bytes.fromhex(text)


def secret_of(master: bytes, principal: str) -> str:
    """Return what reports on somebody's tasks are signed with: theirs alone, and always the same.

    Nobody can sign what goes to the receivers of others, though all are signed by one house.
    """
    made = hmac.new(master, _INFO + principal.encode(), hashlib.sha256).digest()
    return SECRET_PREFIX + base64.b64encode(made).decode()


def sign(secret: str, message_id: str, at: int, body: bytes) -> str:
    """Return the ``webhook-signature`` of a message, as Standard Webhooks has it (v1).

    Args:
        secret: As `secret_of` makes them.
        message_id: The ``webhook-id``: the same on every try.
        at: The ``webhook-timestamp``, in whole seconds: that of the try.
        body: The very bytes that are sent.
    """
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = f"{message_id}.{at}.".encode() + body
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()

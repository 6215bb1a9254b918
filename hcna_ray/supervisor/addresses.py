"""Which of a machine's addresses another machine can use: asked of the kernel, never guessed."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import psutil

from hcna_ray.config import LOOPBACK

#: An address of a documentation range (RFC 5737): its route is the default route.
_FAR_AWAY = "203.0.113.1"
#: Beginnings of names of interfaces that lead out through a tunnel.
_TUNNELS = ("tailscale", "wg", "tun", "tap", "utun", "zt", "nebula", "ppp", "ipsec", "vpn")
#: Beginnings of names of bridges to containers and virtual machines: nobody outside is there.
_INSIDE = ("docker", "br-", "veth", "virbr", "lxc", "lxd", "cni", "flannel", "cali", "podman")


@dataclass(frozen=True)
class OwnAddress:
    """An address of this machine and the card it is on."""

    address: str
    interface: str

    @property
    def tunnel(self) -> bool:
        """Whether it leads through a VPN such as Tailscale or WireGuard."""
        return self.interface.startswith(_TUNNELS)

    @property
    def inside(self) -> bool:
        """Whether only containers and virtual machines of this machine are on it."""
        return self.interface.startswith(_INSIDE)

    def __str__(self) -> str:
        kind = ", VPN" if self.tunnel else ", containers" if self.inside else ""
        return f"{self.address} ({self.interface}{kind})"


def route_source(host: str, port: int) -> str:
    """Return the own address from which this machine would talk to ``host``. Nothing is sent.

    Raises:
        OSError: There is no route, or the name is unknown.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def own_addresses() -> tuple[OwnAddress, ...]:
    """Return the addresses of this machine that others may use, IPv4 first, the likely ones first.

    Loopback and link-local ones are left out, as is what is on a card that is down.
    """
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: list[tuple[tuple[bool, bool, bool], OwnAddress]] = []
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6) or interface not in up:
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            if address.is_loopback or address.is_link_local or address.is_unspecified:
                continue
            own = OwnAddress(str(address), interface)
            found.append(((address.version == 6, own.inside, own.tunnel), own))
    return tuple(own for _, own in sorted(found, key=lambda each: each[0]))


def default_address() -> str:
    """Return the own address of the default route, else the first own one, else loopback."""
    try:
        source = route_source(_FAR_AWAY, 9)
    except OSError:
        source = LOOPBACK
    if source != LOOPBACK:
        return source
    return next((own.address for own in own_addresses() if "." in own.address), LOOPBACK)


def outward_addresses(preferred: str | None = None) -> tuple[str, ...]:
    """Return the IPv4 addresses at which others may find this machine, the best one first.

    Args:
        preferred: ``ray.node_address``, if it is set.
    """
    own = [each.address for each in own_addresses() if "." in each.address and not each.inside]
    first = [preferred] if preferred else []
    return tuple(dict.fromkeys([*first, default_address(), *own]))


def interface_of(address: str) -> str | None:
    """Return the name of the card that has this address, or None if it is not our own."""
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.address.partition("%")[0] == address:
                return interface
    return None


def is_own(address: str) -> bool:
    """Whether the address is one of this machine's, loopback included."""
    return address.startswith("127.") or interface_of(address) is not None


def describe(address: str) -> str:
    """Return an own address with its card, e.g. ``100.64.0.7 (tailscale0, VPN)``."""
    interface = interface_of(address)
    return address if interface is None else str(OwnAddress(address, interface))

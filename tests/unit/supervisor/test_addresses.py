from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from hcna_ray.supervisor import addresses
from hcna_ray.supervisor.addresses import (
    OwnAddress,
    default_address,
    describe,
    interface_of,
    is_own,
    outward_addresses,
    own_addresses,
    route_source,
)

CARDS = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "tailscale0": ["100.64.0.7", "fd7a::7"],
    "eth0": ["10.0.0.7", "fe80::1%eth0", "fd00::7"],
    "wlan0": ["169.254.3.4", "192.168.1.7"],
    "eth9": ["10.9.9.9"],
}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        name: [
            SimpleNamespace(family=socket.AF_INET6 if ":" in each else socket.AF_INET, address=each)
            for each in listed
        ]
        for name, listed in CARDS.items()
    }
    found["eth0"].append(SimpleNamespace(family=socket.AF_PACKET, address="00:00:5e:00:53:01"))
    stats = {name: SimpleNamespace(isup=name != "eth9") for name in CARDS}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: stats)


@pytest.mark.usefixtures("cards")
def test_likely_addresses_come_first() -> None:
    assert [str(own) for own in own_addresses()] == [
        "10.0.0.7 (eth0)",
        "192.168.1.7 (wlan0)",
        "100.64.0.7 (tailscale0, VPN)",
        "172.17.0.1 (docker0, containers)",
        "fd00::7 (eth0)",
        "fd7a::7 (tailscale0, VPN)",
    ]


@pytest.mark.usefixtures("cards")
def test_what_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "route_source", lambda host, port: "192.168.1.7")

    assert default_address() == "192.168.1.7"
    assert outward_addresses() == ("192.168.1.7", "10.0.0.7", "100.64.0.7")
    assert outward_addresses("100.64.0.7") == ("100.64.0.7", "192.168.1.7", "10.0.0.7")


@pytest.mark.usefixtures("cards")
def test_without_a_route_the_first_own_address_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_route(host: str, port: int) -> str:
        raise OSError

    monkeypatch.setattr(addresses, "route_source", no_route)
    assert default_address() == "10.0.0.7"

    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    assert default_address() == "127.0.0.1"


@pytest.mark.usefixtures("cards")
def test_whose_address_it_is() -> None:
    assert interface_of("100.64.0.7") == "tailscale0"
    assert interface_of("10.0.0.99") is None
    assert is_own("127.0.0.1")
    assert is_own("10.0.0.7")
    assert not is_own("10.0.0.99")
    assert describe("100.64.0.7") == "100.64.0.7 (tailscale0, VPN)"
    assert describe("10.0.0.99") == "10.0.0.99"
    assert OwnAddress("172.18.0.1", "br-0a1b").inside


def test_the_route_to_this_machine_starts_here() -> None:
    assert route_source("127.0.0.1", 9) == "127.0.0.1"

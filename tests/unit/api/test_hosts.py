"""By which names C1 may be called, and from which pages."""

from __future__ import annotations

import pytest

from hcna_ray.api.hosts import HostRule
from hcna_ray.api.problems import BadRequest, HostRefused, OriginRefused, respond
from tests.support.c1 import Composite

AT_HOME = HostRule((), any_address=False)
PUBLIC = HostRule(("C1.example.org.", "*.lab.example.org", "fd00::7"), any_address=True)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "127.0.0.1",
        "127.9.9.9:1",
        "[::1]",
        "[::1]:8080",
    ],
)
def test_loopback_goes_by_these_names(host: str) -> None:
    AT_HOME.check(host.encode(), None)
    PUBLIC.check(host.encode(), None)


@pytest.mark.parametrize(
    "host",
    [
        "evil.test",
        "evil.test:8080",
        "localhost.evil.test",
        "127.0.0.1.evil.test",
        "0x7f000001",
        "2130706433",
        "127.1",
        "192.168.1.10",
        "[::ffff:192.168.1.10]",
        "c1.example.org",
    ],
)
def test_nothing_else_is_loopback(host: str) -> None:
    with pytest.raises(HostRefused, match=r"composite\.hosts") as refused:
        AT_HOME.check(host.encode(), None)

    response = respond(refused.value)
    assert response.status_code == 421
    assert b'"code":"host_refused"' in response.body


@pytest.mark.parametrize(
    "host",
    ["c1.example.org", "C1.Example.Org:443", "a.lab.example.org", "192.168.1.10:8080", "[fd00::7]"],
)
def test_behind_an_edge_its_names_and_every_address_will_do(host: str) -> None:
    PUBLIC.check(host.encode(), None)


@pytest.mark.parametrize("host", ["example.org", "a.b.lab.example.org", "lab.example.org", "c1"])
def test_behind_an_edge_a_strangers_name_will_not(host: str) -> None:
    with pytest.raises(HostRefused):
        PUBLIC.check(host.encode(), None)


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":8080",
        "a b",
        "a,b",
        "a/b",
        "user@localhost",
        "localhost:",
        "localhost:0x50",
        "localhost:123456",
        "[::1",
        "[]",
        "a\x00b",
        "ä",
        "a" * 300,
    ],
)
def test_what_is_no_host_is_said_to_be_none(host: str) -> None:
    with pytest.raises(BadRequest, match="Host"):
        PUBLIC.check(host.encode("latin-1"), None)


def test_a_host_is_needed() -> None:
    with pytest.raises(BadRequest, match="Host"):
        AT_HOME.check(None, None)


def test_pages_of_c1_itself_may_use_it() -> None:
    AT_HOME.check(b"localhost:8080", b"http://localhost:8080")
    PUBLIC.check(b"c1.example.org", b"https://C1.example.org")


def test_pages_of_a_named_host_may_use_it() -> None:
    rule = HostRule(("grafana.lab",), any_address=False)
    rule.check(b"localhost:8080", b"http://grafana.lab:3000")


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.test",
        "http://localhost",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "file://",
        "http://localhost:8080/",
        "http://localhost:8080@evil.test",
        "ftp://localhost:8080",
    ],
)
def test_pages_of_others_may_not(origin: str) -> None:
    with pytest.raises(OriginRefused) as refused:
        AT_HOME.check(b"localhost:8080", origin.encode())

    assert respond(refused.value).status_code == 403


def test_only_so_many_values_are_remembered() -> None:
    rule = HostRule((), any_address=False)
    for port in range(1, 1000):
        rule.check(f"localhost:{port}".encode(), None)

    assert len(rule._known) == 256


async def test_c1_asks_for_it_before_anything_else(c1: Composite) -> None:
    for path in ("/live", "/tasks", "/nothing"):
        reply = await c1.http.get(path, headers={"Host": "evil.test"})
        assert (reply.status_code, reply.json()["code"]) == (421, "host_refused")
        reply = await c1.http.get(path, headers={"Origin": "https://evil.test"})
        assert (reply.status_code, reply.json()["code"]) == (403, "origin_refused")
    assert (await c1.http.get("/live", headers={"Origin": "http://127.0.0.1"})).status_code == 200

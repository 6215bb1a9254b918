"""Forty ways to have M1 call what it should not, and none of them works."""

from __future__ import annotations

import base64
import ipaddress
from pathlib import Path

import pytest

from hcna_ray.config import WebhookSettings
from hcna_ray.security.outbound import (
    OutboundPolicy,
    Target,
    TargetRefused,
    ensure_master,
    policy_of,
    secret_of,
    sign,
    vet_address,
    vet_addresses,
    vet_url,
)
from tests.support.ssrf import bad_urls

#: The most that anybody would allow without naming networks: the guard must hold here.
OPEN = OutboundPolicy(plain_http=True, ports=(8080,))


BAD_URLS = bad_urls(8080)


@pytest.mark.parametrize("url", BAD_URLS.values(), ids=BAD_URLS.keys())
def test_a_url_that_leads_inside_is_refused(url: str) -> None:
    with pytest.raises(TargetRefused):
        vet_url(url, OPEN)


def test_there_are_at_least_forty_of_them() -> None:
    assert len(set(BAD_URLS.values())) >= 40


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://example.org", Target("https", "example.org", 443, "/")),
        ("https://Example.ORG./a?b=c", Target("https", "example.org", 443, "/a?b=c")),
        ("http://example.org:8080/x", Target("http", "example.org", 8080, "/x")),
        ("https://93.184.216.34/", Target("https", "93.184.216.34", 443, "/")),
        (
            "https://[2606:2800:220:1::1]/",
            Target("https", "2606:2800:220:1::1", 443, "/"),
        ),
    ],
)
def test_a_url_on_the_open_network_is_taken(url: str, target: Target) -> None:
    assert vet_url(url, OPEN) == target


def test_plain_http_is_for_those_who_allow_it() -> None:
    with pytest.raises(TargetRefused, match="https://"):
        vet_url("http://example.org/", OutboundPolicy())


def test_a_list_of_hosts_is_all_there_is() -> None:
    policy = OutboundPolicy(hosts=("hooks.example.org", "*.example.net"))
    assert vet_url("https://hooks.example.org/", policy).host == "hooks.example.org"
    assert vet_url("https://a.b.example.net/", policy).host == "a.b.example.net"
    for url in (
        "https://example.org/",
        "https://xhooks.example.org/",
        "https://example.net/",
        "https://hooks.example.org.evil.test/",
        "https://evilexample.net/",
    ):
        with pytest.raises(TargetRefused, match="none of the hosts"):
            vet_url(url, policy)


@pytest.mark.parametrize(
    "found",
    [
        [],
        ["127.0.0.1"],
        ["93.184.216.34", "127.0.0.1"],
        ["93.184.216.34", "10.0.0.7"],
        ["::1"],
        ["::ffff:10.0.0.7"],
        ["64:ff9b::a00:7"],
        ["2002:a00:7::1"],
        ["fe80::1%eth0"],
        ["169.254.169.254"],
    ],
)
def test_a_name_that_resolves_to_the_inside_is_refused(found: list[str]) -> None:
    with pytest.raises(TargetRefused):
        vet_addresses(found, OPEN)


def test_a_name_that_answers_by_turns_is_looked_at_each_time() -> None:
    (address,) = vet_addresses(["93.184.216.34"], OPEN)
    assert address == ipaddress.ip_address("93.184.216.34")
    with pytest.raises(TargetRefused):
        vet_addresses(["192.168.0.10"], OPEN)


def test_a_private_network_may_be_allowed_and_no_more_than_it() -> None:
    home = OutboundPolicy(networks=(ipaddress.ip_network("192.168.7.0/24"),), plain_http=True)
    assert vet_url("http://192.168.7.20/", home).host == "192.168.7.20"
    vet_addresses(["192.168.7.20", "::ffff:192.168.7.21"], home)
    with pytest.raises(TargetRefused):
        vet_addresses(["192.168.8.20"], home)


def test_what_is_denied_stays_so_in_an_allowed_network() -> None:
    own = ipaddress.ip_address("192.168.7.1")
    home = OutboundPolicy(
        networks=(ipaddress.ip_network("192.168.7.0/24"),), denied=frozenset({own})
    )
    for form in ("192.168.7.1", "::ffff:192.168.7.1"):
        with pytest.raises(TargetRefused, match="this house"):
            vet_address(ipaddress.ip_address(form), home)


def test_a_signature_is_that_of_standard_webhooks() -> None:
    """The example of the specification."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_everybody_has_a_secret_and_always_the_same(tmp_path: Path) -> None:
    master = ensure_master(tmp_path)
    first, second = secret_of(master, "alice"), secret_of(master, "bob")
    assert first != second
    assert len(base64.b64decode(first.removeprefix("whsec_"))) == 32
    assert sign(first, "m", 1, b"") != sign(second, "m", 1, b"")
    assert secret_of(ensure_master(tmp_path), "alice") == first
    assert (tmp_path / "webhook.key").stat().st_mode & 0o777 == 0o600
    assert secret_of(ensure_master(tmp_path / "another house"), "alice") != first


def test_a_broken_master_is_not_used(tmp_path: Path) -> None:
    ensure_master(tmp_path)
    (tmp_path / "webhook.key").write_text("00")
    with pytest.raises(ValueError, match="hexadecimal"):
        ensure_master(tmp_path)


def test_settings_say_where_reports_may_go() -> None:
    settings = WebhookSettings(
        hosts=("hooks.example.org",), networks=("10.1.0.0/16",), ports=(8443,), plain_http=True
    )
    policy = policy_of(settings, ["10.1.0.1", "fe80::1%eth0"])
    assert policy.hosts == ("hooks.example.org",)
    vet_addresses(["10.1.2.3"], policy)
    for address in ("10.1.0.1", "10.2.0.1", "fe80::1"):
        with pytest.raises(TargetRefused):
            vet_addresses([address], policy)
    with pytest.raises(ValueError, match="is no network"):
        WebhookSettings(networks=("10.1.2.3/8",))

"""The files of the edge: where they come from, when they are made anew, what stops a start."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from hcna_ray.api.replica import hosts_of
from hcna_ray.config import CompositeSecuritySettings, CompositeSettings, Settings, names_here
from hcna_ray.durable import write_private
from hcna_ray.security.authority import (
    begin_rollover,
    finish_rollover,
    list_issued,
    revoke,
)
from hcna_ray.security.certs import (
    SERVER,
    alternative_names,
    cert_text,
    load_cert,
    make_certificate,
    new_authority,
    new_key,
    parse_key,
)
from hcna_ray.security.keys import ensure_owner_key
from hcna_ray.security.own_certs import OwnCertificateRefused, names_in
from hcna_ray.supervisor.edge_keeper import EdgeKeeper, EdgeRefused

NOW = datetime(2026, 11, 21, tzinfo=UTC)


class Shop:
    """An M1, and an authority of its owner."""

    def __init__(self, home: Path, **security: Any) -> None:
        self.home = home
        key, self.ca_pem = new_authority(NOW)
        self.ca_key = parse_key(key.encode())
        self.listen = security.pop("listen_address", "127.0.0.1")
        self.hosts = security.pop("hosts", ("c1.example.org", "10.1.2.3"))
        self.security = {"enable_tls": True, **security}

    @property
    def keeper(self) -> EdgeKeeper:
        return EdgeKeeper(self.settings, addresses=lambda: ("127.0.0.1", "192.168.1.10"))

    @property
    def settings(self) -> Settings:
        return Settings(
            home=self.home,
            composite=CompositeSettings(
                listen_address=self.listen,
                hosts=self.hosts,
                security=CompositeSecuritySettings(**self.security),
            ),
        )

    def own(self, *names: str, days: int = 90) -> None:
        """Have a certificate of the owner's authority, and name it in the settings."""
        ca = x509.load_pem_x509_certificate(self.ca_pem.encode())
        key = new_key()
        made = make_certificate(
            "c1",
            parse_key(key.encode()).public_key(),
            alternative_names(names, ()),
            [SERVER],
            ca,
            self.ca_key,
            now=NOW,
            life=timedelta(days=days),
        )
        write_private(self.home / "own" / "c1.key", key)
        write_private(self.home / "own" / "c1.crt", cert_text(made))
        self.security |= {
            "cert_path": self.home / "own" / "c1.crt",
            "key_path": self.home / "own" / "c1.key",
        }

    @property
    def pem(self) -> Path:
        return self.settings.cluster_dir / "edge.pem"

    @property
    def config(self) -> str:
        return (self.settings.run_dir / "edge.cfg").read_text()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_without_tls_it_writes_the_configuration_of_the_control_edge(tmp_path: Path) -> None:
    keeper = EdgeKeeper(Settings(home=tmp_path))

    assert keeper.prepare(now=NOW)
    assert not keeper.prepare(now=NOW)
    assert not keeper.refresh(now=NOW)
    assert "frontend control" in keeper.config_path.read_text()
    assert not (tmp_path / "cluster").exists()


def test_the_clusters_authority_gives_a_certificate_for_all_names(shop: Shop) -> None:
    assert shop.keeper.prepare(now=NOW)

    names = names_in(shop.pem)
    assert {"c1.hcna.internal", "localhost", "c1.example.org"} <= set(names)
    assert {"127.0.0.1", "192.168.1.10", "10.1.2.3"} <= set(names)
    (issued,) = list_issued(shop.settings.cluster_dir)
    assert (issued.name, issued.kind) == ("C1", "server")
    assert shop.pem.stat().st_mode & 0o077 == 0


def test_nothing_is_made_twice(shop: Shop) -> None:
    keeper = shop.keeper
    keeper.prepare(now=NOW)
    before = shop.pem.read_bytes()

    assert not keeper.prepare(now=NOW)
    assert shop.keeper.prepare(now=NOW), "a new one does not know what the edge has read"
    assert shop.pem.read_bytes() == before


def test_it_is_renewed_before_its_end_without_a_change_of_any_file(shop: Shop) -> None:
    keeper = shop.keeper
    keeper.prepare(now=NOW)
    keeper.refresh(now=NOW)

    assert not keeper.refresh(now=NOW + timedelta(minutes=59))
    assert not keeper.refresh(now=NOW + timedelta(days=59))
    assert keeper.refresh(now=NOW + timedelta(days=61))
    assert load_cert(shop.pem).not_valid_after_utc > NOW + timedelta(days=150)


def test_a_revoked_one_is_replaced(shop: Shop) -> None:
    keeper = shop.keeper
    keeper.prepare(now=NOW)
    keeper.refresh(now=NOW)
    before = shop.pem.read_bytes()
    revoke(shop.settings.cluster_dir, "C1", now=NOW)

    assert keeper.refresh(now=NOW)
    assert shop.pem.read_bytes() != before


def test_a_new_name_in_the_settings_needs_a_new_one(shop: Shop) -> None:
    shop.keeper.prepare(now=NOW)
    shop.hosts = (*shop.hosts, "other.example.org")

    assert shop.keeper.prepare(now=NOW)
    assert "other.example.org" in names_in(shop.pem)


def test_the_old_authoritys_will_do_until_the_new_one_is_alone(shop: Shop) -> None:
    keeper, directory = shop.keeper, shop.settings.cluster_dir
    keeper.prepare(now=NOW)
    before = shop.pem.read_bytes()

    begin_rollover(directory, now=NOW)
    keeper.refresh(now=NOW)
    assert shop.pem.read_bytes() == before

    finish_rollover(directory, now=NOW)
    assert keeper.refresh(now=NOW)
    assert shop.pem.read_bytes() != before


def test_clients_of_the_cluster_are_asked_for_a_certificate(tmp_path: Path) -> None:
    shop = Shop(tmp_path, enable_mtls=True)
    keeper, directory = shop.keeper, shop.settings.cluster_dir

    keeper.prepare(now=NOW)
    assert "verify required crl-file" in shop.config
    assert (directory / "edge-clients.pem").read_text() == (directory / "ca.pem").read_text()

    begin_rollover(directory, now=NOW)
    assert keeper.refresh(now=NOW)
    assert (directory / "edge-clients.pem").read_text().count("BEGIN") == 2


def test_a_certificate_that_is_taken_back_makes_the_edge_read_anew(tmp_path: Path) -> None:
    shop = Shop(tmp_path, enable_mtls=True)
    keeper = shop.keeper
    keeper.prepare(now=NOW)
    keeper.refresh(now=NOW)
    assert not keeper.refresh(now=NOW)

    revoke(shop.settings.cluster_dir, "C1", now=NOW)

    assert keeper.refresh(now=NOW)


def test_clients_of_the_owners_authority_may_show_a_certificate(shop: Shop) -> None:
    write_private(shop.home / "own" / "ca.crt", shop.ca_pem)
    shop.security |= {"ca_path": shop.home / "own" / "ca.crt"}

    shop.keeper.prepare(now=NOW)

    assert "verify optional\n" in shop.config
    assert "crl-file" not in shop.config


class TestOfOnesOwn:
    def test_it_is_taken_as_it_is(self, shop: Shop) -> None:
        shop.own("c1.example.org", "*.example.org")
        shop.hosts = ("c1.example.org",)
        shop.keeper.prepare(now=NOW)

        assert set(names_in(shop.pem)) == {"c1.example.org", "*.example.org"}
        assert not list_issued(shop.settings.cluster_dir)
        here = set(names_here(shop.settings))
        assert set(hosts_of(shop.settings)) == here | {"c1.example.org", "*.example.org"}

    def test_whoever_renews_it_need_tell_nobody(self, shop: Shop) -> None:
        shop.own("c1.example.org")
        shop.hosts = ()
        keeper = shop.keeper
        keeper.prepare(now=NOW)
        keeper.refresh(now=NOW)
        assert not keeper.refresh(now=NOW)

        shop.own("c1.example.org")

        assert keeper.refresh(now=NOW)
        assert shop.pem.read_text().startswith((shop.home / "own" / "c1.key").read_text()[:80])

    def test_one_that_will_not_do_changes_nothing(self, shop: Shop) -> None:
        shop.own("c1.example.org")
        shop.hosts = ()
        keeper = shop.keeper
        keeper.prepare(now=NOW)
        before = shop.pem.read_bytes(), shop.config

        (shop.home / "own" / "c1.crt").write_text("half of")

        with pytest.raises(OwnCertificateRefused, match=r"c1\.crt is not the certificate"):
            keeper.refresh(now=NOW)
        assert (shop.pem.read_bytes(), shop.config) == before

    def test_it_must_be_for_the_names_in_the_settings(self, shop: Shop) -> None:
        shop.own("other.example.org")

        with pytest.raises(OwnCertificateRefused, match=r"is not for .*c1\.example\.org"):
            shop.keeper.prepare(now=NOW)

    def test_an_authority_must_be_one(self, shop: Shop) -> None:
        shop.own("c1.example.org")
        shop.hosts = ()
        shop.security["ca_path"] = shop.home / "own" / "c1.crt"

        with pytest.raises(OwnCertificateRefused, match="not the certificate of an authority"):
            shop.keeper.prepare(now=NOW)


class TestPublicly:
    def test_without_a_key_it_does_not_start(self, tmp_path: Path) -> None:
        shop = Shop(tmp_path, listen_address="0.0.0.0")

        with pytest.raises(EdgeRefused, match=r"listen_address is 0\.0\.0\.0.*hcna keys create"):
            shop.keeper.prepare(now=NOW)
        assert not (tmp_path / "run" / "edge.cfg").exists()

    def test_a_key_that_has_expired_is_none(self, tmp_path: Path) -> None:
        shop = Shop(tmp_path, listen_address="0.0.0.0")
        keys = shop.settings.keys_dir
        ensure_owner_key(keys, now=0.0)
        data = json.loads((keys / "keys.json").read_text())
        data["keys"][0]["expires_at"] = NOW.timestamp() - 1
        write_private(keys / "keys.json", json.dumps(data))

        with pytest.raises(EdgeRefused, match="no key opens C1"):
            shop.keeper.prepare(now=NOW)

    def test_with_one_it_does(self, tmp_path: Path) -> None:
        shop = Shop(tmp_path, listen_address="0.0.0.0")
        ensure_owner_key(shop.settings.keys_dir, now=NOW.timestamp())

        assert shop.keeper.prepare(now=NOW)
        assert "bind 0.0.0.0:8080 ssl" in shop.config

    def test_one_that_runs_goes_on_without(self, tmp_path: Path) -> None:
        shop = Shop(tmp_path, listen_address="0.0.0.0")
        ensure_owner_key(shop.settings.keys_dir, now=NOW.timestamp())
        keeper = shop.keeper
        keeper.prepare(now=NOW)
        (shop.settings.keys_dir / "keys.json").unlink()
        shop.pem.unlink()

        assert keeper.refresh(now=NOW)

    def test_on_loopback_none_is_needed_yet(self, shop: Shop) -> None:
        assert shop.keeper.prepare(now=NOW)


def test_what_haproxy_refuses_is_not_written(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.keeper.prepare(now=NOW)
    before = shop.config
    monkeypatch.setattr(
        "hcna_ray.supervisor.edge_keeper.edge_config", lambda *args, **options: "nonsense\n"
    )

    with pytest.raises(EdgeRefused, match=r"HAProxy refuses.*nonsense"):
        shop.keeper.prepare(now=NOW)
    assert shop.config == before


def test_names_of_a_certificate_that_is_not_there_are_none(shop: Shop) -> None:
    here = names_here(shop.settings)
    assert hosts_of(shop.settings) == (*shop.hosts, *here)
    assert hosts_of(Settings(home=shop.home)) == here
    assert {"hcna-m1", "hcna-m1.local", "hcna-c1.local", socket.gethostname()} <= set(here)

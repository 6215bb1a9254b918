"""Which certificate M1's node gets, from the authority or from its owner."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from hcna_ray.config import NodeSecuritySettings, Settings, load_settings
from hcna_ray.security.authority import Node, ensure_trust, list_issued, sign_request, trusted
from hcna_ray.security.certs import (
    CertificateBroken,
    ensure_ca,
    load_cert,
    load_key,
    make_request,
    new_key,
)
from hcna_ray.security.own_certs import OwnCertificateRefused
from hcna_ray.supervisor.daemon import Bootstrap, Supervisor
from hcna_ray.supervisor.node_certs import (
    Json,
    ensure_m1_node,
    ensure_member_node,
    grantable,
    names_of,
    write_if_changed,
)

NOW = datetime.now(UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", env={"HCNA_RAY__NODE_ADDRESS": "10.0.0.1"})


def own(settings: Settings, directory: Path, *addresses: str) -> Settings:
    """Return settings that name a certificate of the owner's own authority."""
    ensure_ca(directory, now=NOW)
    key = new_key()
    made = sign_request(
        directory,
        make_request(key, "m1"),
        name="m1",
        kind="node",
        names=["m1"],
        addresses=addresses,
        now=NOW,
    )
    for name, text in (("m1.key", key), ("m1.crt", made)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o600)
    security = NodeSecuritySettings(
        enable_mtls=True,
        cert_path=directory / "m1.crt",
        key_path=directory / "m1.key",
        ca_path=directory / "ca.pem",
    )
    moderator = settings.moderator.model_copy(update={"security": security})
    return settings.model_copy(update={"moderator": moderator})


def names_in(node: Node) -> set[str]:
    held = load_cert(node.pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ips = {str(ip) for ip in held.get_values_for_type(x509.IPAddress)}
    return ips | set(held.get_values_for_type(x509.DNSName))


def test_names_of_a_node() -> None:
    assert names_of("W2", "Laptop") == ("w2.hcna.internal", "localhost", "laptop")
    assert names_of("W2", "übung") == ("w2.hcna.internal", "localhost")
    assert names_of("W2", "a-b_c.lan") == ("w2.hcna.internal", "localhost", "a-b_c.lan")


@pytest.mark.parametrize(
    "hostname",
    [
        "",
        ".",
        "a..b",
        "a.",
        "-a",
        "a-",
        "a b",
        "*",
        "*.lan",
        "10.0.0.1",
        "::1",
        "7",
        "a" * 64,
        "a." * 127,
        "hcna.internal",
        "m1.hcna.internal",
        "Orders.hcna.internal",
        "x.w1.hcna.internal",
        "a\n",
        "a\0b",
    ],
)
def test_what_is_no_name_of_a_machine_or_anothers_is_left_out(hostname: str) -> None:
    assert names_of("W2", hostname) == ("w2.hcna.internal", "localhost")


def test_m1_is_known_by_every_address_it_has(settings: Settings) -> None:
    node = ensure_m1_node(settings, now=NOW, addresses=lambda: ("127.0.0.1", "10.9.9.9"))

    held = names_in(node)
    assert {"10.0.0.1", "10.9.9.9", "127.0.0.1", "localhost", "m1.hcna.internal"} <= held
    assert (settings.cluster_dir / "crl.pem").exists()
    again = ensure_m1_node(settings, now=NOW, addresses=lambda: ("127.0.0.1", "10.7.7.7"))
    assert "10.7.7.7" in names_in(again)
    assert [each.name for each in list_issued(settings.cluster_dir)] == ["M1", "M1"]


def test_the_owners_certificate_is_taken_and_both_authorities_count(
    settings: Settings, tmp_path: Path
) -> None:
    named = own(settings, tmp_path / "own", "10.0.0.1", "127.0.0.1")

    node = ensure_m1_node(named, now=NOW)

    authority = load_cert(tmp_path / "own" / "ca.pem")
    load_cert(node.pem).verify_directly_issued_by(authority)
    assert load_key(node.pem).public_key() == load_cert(node.pem).public_key()
    assert trusted(node.trust) == [load_cert(settings.cluster_dir / "ca.pem"), authority]
    assert list_issued(settings.cluster_dir) == ()
    # When it is renewed on the disk, the new one is taken.
    before = node.pem.read_text()
    assert ensure_m1_node(named, now=NOW).pem.read_text() == before
    own(settings, tmp_path / "own", "10.0.0.1", "127.0.0.1")
    assert ensure_m1_node(named, now=NOW).pem.read_text() != before
    # And when the settings name none any more, the authority is at work again.
    back = ensure_m1_node(settings, now=NOW)
    assert trusted(back.trust) == [load_cert(settings.cluster_dir / "ca.pem")]
    load_cert(back.pem).verify_directly_issued_by(load_cert(settings.cluster_dir / "ca.pem"))


def test_the_owners_certificate_must_be_for_the_nodes_addresses(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(OwnCertificateRefused, match=r"is not for 10\.0\.0\.1"):
        ensure_m1_node(own(settings, tmp_path / "own", "127.0.0.1"), now=NOW)


def test_a_file_is_written_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "x" / "own-ca.pem"

    assert not write_if_changed(path, "")
    assert write_if_changed(path, "a")
    assert not write_if_changed(path, "a")
    assert path.stat().st_mode & 0o777 == 0o600
    assert write_if_changed(path, "")
    assert not path.exists()


def test_a_member_is_granted_its_own_addresses_alone() -> None:
    asked = [
        "10.0.0.2",
        "10.0.0.2",
        "fd00::2",
        "10.0.0.1",
        "w2",
        "0.0.0.0",
        "127.0.0.9",
        "224.0.0.1",
        "::ffff:10.0.0.1",
    ]

    assert grantable(asked, {"10.0.0.1"}) == ["10.0.0.2", "fd00::2"]


class TestMember:
    """A machine that asks M1's gate, which is real; only the way there is left out."""

    @pytest.fixture
    def m1_home(self, tmp_path: Path) -> Path:
        ensure_ca(tmp_path / "m1", now=NOW)
        return tmp_path / "m1"

    def ensure(
        self,
        settings: Settings,
        m1_home: Path,
        address: str,
        *,
        now: datetime = NOW,
        anew: bool = False,
        granted: str | None = None,
    ) -> list[Json]:
        """Look after the certificate as W2; return what M1 was asked for."""
        asked = []

        def ask(body: Json) -> Json:
            asked.append(body)
            made = sign_request(
                m1_home,
                str(body["csr"]),
                name="W2",
                kind="node",
                names=["localhost"],
                addresses=["127.0.0.1", granted or str(body["address"])],
                now=now,
            )
            return {"cert_pem": made, "trust_pem": ensure_trust(m1_home, now=NOW).read_text()}

        changed = ensure_member_node(settings, "W2", address, ask=ask, now=now, anew=anew)
        assert changed == bool(asked)
        return asked

    def test_m1_is_asked_when_it_has_to_be(self, settings: Settings, m1_home: Path) -> None:
        first = self.ensure(settings, m1_home, "10.0.0.2")

        assert [body["address"] for body in first] == ["10.0.0.2"]
        assert "10.0.0.2" in first[0]["addresses"]
        assert "10.0.0.2" in names_in(Node.of(settings.cluster_dir))
        assert self.ensure(settings, m1_home, "10.0.0.2") == []
        # A laptop in another network; a certificate that nears its end.
        assert len(self.ensure(settings, m1_home, "10.7.7.7")) == 1
        later = NOW + timedelta(days=61)
        assert len(self.ensure(settings, m1_home, "10.7.7.7", now=later)) == 1
        assert self.ensure(settings, m1_home, "10.7.7.7", now=later) == []

    def test_a_certificate_of_its_own_needs_only_whom_to_believe(
        self, settings: Settings, m1_home: Path, tmp_path: Path
    ) -> None:
        named = own(settings, tmp_path / "own", "10.0.0.2", "127.0.0.1")
        worker = settings.worker.model_copy(update={"security": named.moderator.security})
        mine = settings.model_copy(update={"worker": worker})

        authority = load_cert(tmp_path / "own" / "ca.pem")
        # Nobody would let it in as long as M1 does not believe who signed it.
        for _ in range(2):
            with pytest.raises(OwnCertificateRefused, match=r"M1 does not believe; name the same"):
                self.ensure(mine, m1_home, "10.0.0.2")
        (m1_home / "own-ca.pem").write_text((tmp_path / "own" / "ca.pem").read_text())

        assert len(self.ensure(mine, m1_home, "10.0.0.2", anew=True)) == 1

        node = Node.of(settings.cluster_dir)
        load_cert(node.pem).verify_directly_issued_by(authority)
        assert trusted(node.trust) == [load_cert(m1_home / "ca.pem"), authority]
        assert self.ensure(mine, m1_home, "10.0.0.2") == []

    def test_an_answer_that_is_not_for_this_machine_is_no_help(
        self, settings: Settings, m1_home: Path
    ) -> None:
        with pytest.raises(CertificateBroken, match=r"not for 10\.0\.0\.2; another machine"):
            self.ensure(settings, m1_home, "10.0.0.2", granted="10.0.0.3")


class TestSupervisor:
    @pytest.fixture
    def supervisor(self, settings: Settings) -> Supervisor:
        log = logging.getLogger("tests.node_certs")
        return Supervisor(settings=settings, log=log, bootstrap=Bootstrap(wanted=False))

    def test_a_certificate_is_renewed_before_its_end_and_said(
        self, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        settings = supervisor.settings
        supervisor._certified()
        ensure_m1_node(settings, now=NOW - timedelta(days=61), anew=True)
        before = load_cert(settings.cluster_dir / "node.pem").serial_number

        supervisor._certified()

        after = load_cert(settings.cluster_dir / "node.pem")
        assert after.serial_number != before
        actions = [getattr(record, "action", "") for record in caplog.records]
        assert actions.count("certificate.new") == 2
        assert getattr(caplog.records[-1], "serial", "") == f"{after.serial_number:x}"

    def test_trouble_is_said_and_ends_nothing(
        self, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
    ) -> None:
        ensure_ca(supervisor.settings.cluster_dir, now=NOW).key.unlink()

        supervisor._certified()

        assert "ca.key cannot be used" in caplog.records[-1].getMessage()
        assert getattr(caplog.records[-1], "action", "") == "certificate.trouble"

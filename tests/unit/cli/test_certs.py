"""``hcna certs`` against files on a disk."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from hcna_ray.cli.main import main
from hcna_ray.config import load_settings
from hcna_ray.security.acts import waiting
from hcna_ray.security.certs import load_cert, load_key, make_request, new_key
from hcna_ray.security.keys import ensure_ray_token
from hcna_ray.supervisor.invites import InviteRefused, create_invite, decode_code, redeem
from hcna_ray.supervisor.membership import Member, add_member, read_members
from hcna_ray.supervisor.rounds import announce, read_round
from tests.unit.cli.conftest import Ran

Hcna = Callable[..., Ran]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of M1's authority; commands run in one without any of it."""
    monkeypatch.setenv("HCNA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HCNA_CONFIG", raising=False)
    monkeypatch.delenv("HCNA_DEBUG", raising=False)
    (tmp_path / "work").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home" / "cluster"


@pytest.fixture
def hcna(cluster: Path, capsys: pytest.CaptureFixture[str]) -> Hcna:
    def run(*words: str) -> Ran:
        capsys.readouterr()
        code = main(list(words))
        seen = capsys.readouterr()
        return Ran(code, seen.out, " ".join(seen.err.split()))

    return run


def a_member() -> Member:
    return Member(
        name="W2",
        node_id="HCNA-W2--prod--home--v1.0",
        machine_id="m-2",
        hostname="second",
        address="10.0.0.2",
        token_sha256="0" * 64,
        joined_at=0.0,
    )


def test_init_makes_authority_and_certificate_once(hcna: Hcna, cluster: Path) -> None:
    first = hcna("certs", "init", "--json")
    again = hcna("certs", "init")

    assert first.code == again.code == 0
    (known,) = first.json["authorities"]
    assert again.out.startswith(f"authority {known['sha256']}  until ")
    assert first.json["node"] == str(cluster / "node.pem")
    assert "Next: hcna certs list" in again.err
    listed = hcna("certs", "list", "--json").json
    assert [each["name"] for each in listed["certificates"]] == ["M1"]


def test_a_given_certificate_is_complete_and_listed(
    hcna: Hcna, cluster: Path, tmp_path: Path
) -> None:
    ran = hcna("certs", "issue", "W7", "--address", "10.0.0.7", "--dns", "w7.lan", "--days", "30")

    place = tmp_path / "work" / "W7"
    assert ran.code == 0
    assert ran.out.strip() == str(place)
    made = load_cert(place / "cert.pem")
    made.verify_directly_issued_by(load_cert(place / "ca.pem"))
    assert made.public_key() == load_key(place / "key.pem").public_key()
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {
        "w7.lan",
        "w7.hcna.internal",
        "localhost",
    }
    assert stat.S_IMODE((place / "key.pem").stat().st_mode) == 0o600
    # What is around it keeps its rights.
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o755
    listed = hcna("certs", "list")
    assert "W7" in listed.out
    assert "good" in listed.out
    assert "10.0.0.7" in listed.out


def test_what_is_there_is_not_overwritten(hcna: Hcna, tmp_path: Path) -> None:
    hcna("certs", "issue", "me", "--kind", "client")
    before = (tmp_path / "work" / "me" / "key.pem").read_text()

    ran = hcna("certs", "issue", "me", "--kind", "client")

    assert ran.code == 4
    assert "me exists already" in ran.err
    assert (tmp_path / "work" / "me" / "key.pem").read_text() == before


def test_a_request_made_elsewhere_keeps_its_key_there(hcna: Hcna, tmp_path: Path) -> None:
    request = tmp_path / "me.csr"
    request.write_text(make_request(new_key(), "me"))

    ran = hcna(
        "certs", "issue", "me", "--kind", "server", "--dns", "c1", "--csr", str(request), "--json"
    )

    place = Path(ran.json["directory"])
    assert sorted(path.name for path in place.iterdir() if path.suffix) == ["ca.pem", "cert.pem"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["../x"], 2, "1 to 63 letters"),
        (["x", "--kind", "king"], 2, "no kind 'king'"),
        (["x", "--kind", "server"], 2, "for a name or an address. Next: hcna certs issue x"),
        (["x", "--csr", "gone.csr"], 2, "gone.csr"),
        (["x", "--csr", "empty.csr"], 4, "not a certificate request"),
        (["x", "--address", "10.0.0.300"], 4, "10.0.0.300"),
        (["x", "--days", "400"], 2, "days"),
    ],
)
def test_what_makes_no_sense_is_refused(
    hcna: Hcna, tmp_path: Path, words: list[str], code: int, told: str
) -> None:
    (tmp_path / "work" / "empty.csr").touch()

    ran = hcna("certs", "issue", *words)

    assert ran.code == code, ran.err
    assert told in ran.err
    assert not (tmp_path / "work" / "x").exists()


def test_rotate_makes_another_one(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "init")
    before = (cluster / "node.pem").read_text()

    ran = hcna("certs", "rotate")

    assert ran.code == 0
    assert "Next: hcna certs list" in ran.err
    assert (cluster / "node.pem").read_text() != before
    assert hcna("certs", "rotate", "--json").json == {"round": 0, "restarts": 0}


def test_while_m1_is_down_token_and_authority_are_files(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "init")
    token = ensure_ray_token(cluster.parent / "keys")
    before, old = token.read_text(), (cluster / "ca.pem").read_text()

    assert hcna("certs", "rotate", "--token", "--json").json == {"round": 1, "restarts": 0}
    assert token.read_text() != before
    ran = hcna("certs", "rotate", "--ca", "--json")

    assert ran.json == {"round": 3, "restarts": 0}
    assert (cluster / "ca.pem").read_text() == (cluster / "trust.pem").read_text() != old
    load_cert(cluster / "node.pem").verify_directly_issued_by(load_cert(cluster / "ca.pem"))


def test_a_member_that_nobody_can_ask_keeps_the_old_authority(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "init")
    add_member(cluster, a_member())

    ran = hcna("certs", "rotate", "--ca")

    assert ran.code == 0
    assert "W2 was away and knows only the old authority" in ran.err
    assert len(hcna("certs", "list", "--json").json["authorities"]) == 2
    assert "the older authority counts until: hcna certs rotate" in hcna("certs", "list").err
    refused = hcna("certs", "rotate", "--finish")
    assert refused.code == 4
    assert "M1 is down, so nobody can say" in refused.err
    assert hcna("certs", "rotate", "--ca").code == 4
    assert hcna("certs", "rotate", "--finish", "--force").code == 0
    assert len(hcna("certs", "list", "--json").json["authorities"]) == 1
    assert "--finish" not in hcna("certs", "list").err


@pytest.mark.parametrize(
    "words",
    [
        ["orders", "--kind", "server", "--dns", "x"],
        ["gate"],
        ["x", "--dns", "Orders.hcna.internal"],
        ["x", "--dns", "hcna.internal"],
        ["x", "--dns", "*.hcna.internal"],
    ],
)
def test_nobody_gets_the_names_of_m1s_gate_and_orders(
    hcna: Hcna, cluster: Path, words: list[str]
) -> None:
    ran = hcna("certs", "issue", *words)

    assert ran.code == 2
    assert "given by the cluster itself" in ran.err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["W2", "--token"], 2, "one at a time"),
        (["--ca", "--finish"], 2, "one at a time"),
        (["W2"], 4, "M1 is down. Next: hcna up"),
    ],
)
def test_rotations_that_cannot_be(hcna: Hcna, words: list[str], code: int, told: str) -> None:
    ran = hcna("certs", "rotate", *words)

    assert ran.code == code
    assert told in ran.err


def test_a_revoked_machine_loses_its_place_and_what_it_knows(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "issue", "W2")
    add_member(cluster, a_member())
    token = ensure_ray_token(cluster.parent / "keys")
    before = token.read_text()

    kept = hcna("certs", "revoke", "W2", "--keep-token")
    assert kept.code == 0
    assert "W2 is no member any more" in kept.err
    assert read_members(cluster) == ()
    assert token.read_text() == before

    hcna("certs", "issue", "W2", "--to", "again")
    assert hcna("certs", "revoke", "W2").code == 0
    assert token.read_text() != before


def test_a_machine_without_a_certificate_that_counts_is_shut_out_too(
    hcna: Hcna, cluster: Path
) -> None:
    hcna("certs", "init")
    add_member(cluster, a_member())
    token = ensure_ray_token(cluster.parent / "keys")
    before = token.read_text()

    ran = hcna("certs", "revoke", "W2")

    assert (ran.code, ran.out) == (0, "")
    assert read_members(cluster) == ()
    assert token.read_text() != before
    assert hcna("certs", "revoke", "W2").code == 4


def test_the_code_of_a_revoked_machine_opens_nothing_any_more(hcna: Hcna, cluster: Path) -> None:
    settings = load_settings(home=cluster.parent, env={})
    hcna("certs", "issue", "W2")
    add_member(cluster, a_member())
    now = time.time()
    codes = [
        decode_code(create_invite(settings, addresses=["10.0.0.1"], uses=uses, now=now)[0])
        for uses in (1, None, 1)
    ]
    for code in codes[:2]:
        redeem(cluster, code.token, now=now, machine_id="m-2")

    hcna("certs", "revoke", "W2")

    for code in codes[:2]:
        with pytest.raises(InviteRefused, match="revoked"):
            redeem(cluster, code.token, now=now, machine_id="m-2")
    redeem(cluster, codes[2].token, now=now, machine_id="m-3")


def test_m1s_own_certificate_is_taken_back_and_another_made(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "init")
    before = load_cert(cluster / "node.pem").serial_number

    assert hcna("certs", "revoke", "M1").code == 0

    assert load_cert(cluster / "node.pem").serial_number != before
    first, second = hcna("certs", "list", "--json").json["certificates"]
    assert (first["state"], second["state"]) == ("revoked", "good")


def test_nothing_is_finished_that_was_not_begun(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "init")

    ran = hcna("certs", "rotate", "--finish")

    assert ran.code == 4
    assert "no change of the authority is under way" in ran.err


def test_what_was_cut_off_is_ended_before_something_else_begins(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "init")
    keys = cluster.parent / "keys"
    ensure_ray_token(keys)
    announce(cluster, keys, "token", now=time.time())

    assert hcna("certs", "rotate", "--token", "--json").json == {"round": 2, "restarts": 0}
    assert not read_round(cluster).pending


def test_revoke_by_name_or_serial(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "issue", "me", "--kind", "client")
    serial = hcna("certs", "list", "--json").json["certificates"][0]["serial"]

    ran = hcna("certs", "revoke", "me", "--reason", "lost laptop")

    assert ran.code == 0
    assert ran.out == f"{serial}  me  revoked\n"
    assert str(cluster / "crl.pem") in ran.err
    crl = x509.load_pem_x509_crl((cluster / "crl.pem").read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(int(serial, 16)) is not None
    again = hcna("certs", "revoke", serial[:12])
    assert again.code == 4
    assert "Next: hcna certs list" in again.err
    (known,) = hcna("certs", "list", "--json").json["certificates"]
    assert (known["state"], known["reason"]) == ("revoked", "lost laptop")
    left = [one.entry for one in waiting(cluster.parent / "acts", 10)]
    assert [(one.action, one.target) for one in left] == [
        ("certificate.issued", "me"),
        ("certificate.revoked", "me"),
    ]
    assert left[1].detail == f"{serial}, client: lost laptop"


def test_a_broken_authority_is_said(hcna: Hcna, cluster: Path) -> None:
    hcna("certs", "init")
    (cluster / "ca.key").unlink()

    ran = hcna("certs", "issue", "x")

    assert ran.code == 1
    assert "ca.key cannot be used" in ran.err
    assert "hcna restore --with-keys" in ran.err


def test_certificates_of_the_owner_are_looked_at(hcna: Hcna, cluster: Path, tmp_path: Path) -> None:
    cluster.parent.mkdir()
    paths = {f"{name}_path": str(tmp_path / name) for name in ("cert", "key", "ca")}
    security = {"enable_mtls": True, **paths}
    (cluster.parent / "hcna.yaml").write_text(json.dumps({"moderator": {"security": security}}))

    ran = hcna("certs", "init")

    assert ran.code == 1
    assert f"{tmp_path / 'cert'} is not there. Next: put the certificate there" in ran.err
    assert f"{tmp_path / 'cert'} is not there" in hcna("certs", "rotate").err


def test_only_m1_has_the_authority(hcna: Hcna, cluster: Path) -> None:
    cluster.mkdir(parents=True)
    fields = {
        "schema": 1,
        "name": "W2",
        "node_id": "HCNA-W2--prod--home--v1.0",
        "machine_id": "m",
        "m1_addresses": ["10.0.0.1"],
        "gate_port": 10040,
        "ca_pem": "",
        "ca_sha256": "",
        "member_token": "t",
        "ray_address": "10.0.0.1:10000",
        "moderator_node_id": "HCNA-M1--prod--home--v1.0",
        "shared": {},
        "joined_at": 0.0,
    }
    (cluster / "membership.json").write_text(json.dumps(fields))

    ran = hcna("certs", "list")

    assert ran.code == 4
    assert "this machine is W2; the authority is on M1. Next: hcna certs, on 10.0.0.1" in ran.err


def test_nothing_yet(hcna: Hcna) -> None:
    assert "no certificate was given out yet" in hcna("certs", "list").err
    assert hcna("certs", "list", "--json").json == {"authorities": [], "certificates": []}

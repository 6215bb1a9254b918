"""Certificates that the owner brings, made with openssl as the deployment guide shows."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hcna_ray.security.certs import CLIENT, SERVER, mutual_context
from hcna_ray.security.own_certs import OwnCertificate, OwnCertificateRefused, load_own
from tests.support.handshakes import shake_hands

NOW = datetime.now(UTC) + timedelta(hours=1)
ADDRESSES = ("127.0.0.1", "hcna-m1.local")
SAN = "subjectAltName=DNS:hcna-m1.local,IP:127.0.0.1"


def openssl(directory: Path, command: str) -> None:
    done = subprocess.run(
        ["openssl", *command.split()],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def sign(directory: Path, name: str, extensions: str, *, days: int = 365, ca: str = "ca") -> None:
    """Sign a request as the guide does, with extensions of its own."""
    (directory / "extensions").write_text(extensions)
    openssl(
        directory,
        f"x509 -req -in m1.csr -CA {ca}.crt -CAkey {ca}.key -CAcreateserial -out {name}.crt "
        f"-days {days} -sha256 -extfile extensions",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the deployment guide's commands make, with shorter keys; the rest is signed beside."""
    directory = tmp_path_factory.mktemp("openssl")
    subject = "/C=US/ST=State/L=City/O=HCNA-3/OU"
    new = "req -newkey rsa:2048 -nodes"
    openssl(
        directory,
        f"{new} -x509 -keyout ca.key -out ca.crt -days 365 -subj {subject}=CA/CN=hcna-ca.local",
    )
    openssl(
        directory,
        f"{new} -x509 -keyout other.key -out other.crt -days 365 -subj {subject}=CA/CN=other.local",
    )
    openssl(directory, f"{new} -keyout m1.key -out m1.csr -subj {subject}=M1/CN=hcna-m1.local")
    sign(directory, "m1", SAN)
    for name in ("ca", "m1", "other"):
        (directory / f"{name}.key").chmod(0o600)
    return directory


def load(
    directory: Path,
    *,
    cert: str = "m1.crt",
    key: str = "m1.key",
    ca: str | None = "ca.crt",
    addresses: Collection[str] = ADDRESSES,
    now: datetime = NOW,
) -> OwnCertificate:
    return load_own(
        directory / cert,
        directory / key,
        directory / ca if ca else None,
        addresses=addresses,
        purposes=(SERVER, CLIENT),
        now=now,
    )


def refusal(directory: Path, **more: object) -> OwnCertificateRefused:
    with pytest.raises(OwnCertificateRefused) as caught:
        load(directory, **more)  # type: ignore[arg-type]
    return caught.value


def test_the_guides_certificates_with_a_name_in_them_load_and_work(
    made: Path, tmp_path: Path
) -> None:
    own = load(made)

    node, trust = tmp_path / "node.pem", tmp_path / "trust.pem"
    node.write_text(own.pem)
    trust.write_text(own.ca_pem)
    met = shake_hands(
        mutual_context(node, trust, server=True),
        mutual_context(node, trust, server=False),
        "hcna-m1.local",
    )
    assert met.agreed, met
    assert abs(own.expires_at - (NOW + timedelta(days=365))) < timedelta(hours=2)


def test_the_guides_certificates_as_they_stand_have_no_name(made: Path) -> None:
    sign(made, "bare", "")

    error = refusal(made, cert="bare.crt")

    assert str(error) == (
        f"{made}/bare.crt has no subject alternative name, and its common name does not count; "
        "sign it again with openssl x509 -req ... -extfile "
        "<(echo subjectAltName=IP:127.0.0.1,DNS:hcna-m1.local)"
    )


def test_a_chain_leads_to_the_authority(made: Path, tmp_path: Path) -> None:
    sign(made, "middle", "basicConstraints=critical,CA:TRUE\n")
    (made / "middle.key").write_text((made / "m1.key").read_text())
    sign(made, "leaf", f"{SAN}\n", ca="middle")

    assert "was not signed by" in str(refusal(made, cert="leaf.crt"))
    (made / "chain.crt").write_text(
        (made / "leaf.crt").read_text() + (made / "middle.crt").read_text()
    )
    assert load(made, cert="chain.crt").pem.count("BEGIN CERTIFICATE") == 2
    # As certbot leaves it: the chain, and an authority that everybody knows.
    assert load(made, cert="chain.crt", ca=None).ca_pem == ""


def test_a_star_stands_for_one_label(made: Path) -> None:
    sign(made, "star", "subjectAltName=DNS:*.example.org")

    load(made, cert="star.crt", addresses=["c1.example.org"])
    assert "is not for a.b.example.org" in str(
        refusal(made, cert="star.crt", addresses=["a.b.example.org"])
    )


@pytest.mark.parametrize(
    ("files", "word", "fix"),
    [
        ({"cert": "gone.crt"}, "gone.crt is not there", "put the certificate there"),
        ({"key": "gone.key"}, "gone.key is not there", "put the private key there"),
        ({"ca": "gone.crt"}, "gone.crt is not there", "the authority's certificate"),
        ({"cert": "m1.key"}, "m1.key is not the certificate in PEM", "openssl x509 -noout"),
        ({"key": "m1.crt"}, "m1.crt is readable for others", "chmod 600"),
        ({"key": "open.key"}, "open.key is readable for others", "chmod 600"),
        ({"key": "junk.key"}, "junk.key is no private key", "name the key file"),
        ({"key": "locked.key"}, "is under a password", "openssl pkey -in"),
        ({"key": "ca.key"}, "is not the key of", "belong together"),
        ({"ca": "other.crt"}, "was not signed by the authority in", "other.crt"),
        ({"ca": "m1.crt"}, "is not the certificate of an authority", "name the authority's"),
        ({"addresses": ["10.0.0.1"]}, "is not for 10.0.0.1", "subjectAltName=IP:10.0.0.1"),
        ({"now": NOW + timedelta(days=366)}, "has expired on", "renew it"),
        ({"now": NOW - timedelta(days=2)}, "is valid only from", "set the clock"),
    ],
)
def test_what_cannot_work_is_said_with_file_and_remedy(
    made: Path, files: dict[str, object], word: str, fix: str
) -> None:
    if not (made / "locked.key").exists():
        openssl(made, "pkey -in m1.key -aes256 -passout pass:secret -out locked.key")
        (made / "junk.key").write_text("nonsense")
        (made / "open.key").write_text((made / "m1.key").read_text())
        (made / "open.key").chmod(0o644)
        (made / "junk.key").chmod(0o600)

    error = refusal(made, **files)

    assert word in str(error)
    assert fix in str(error)


@pytest.mark.parametrize(
    ("extensions", "word"),
    [
        (f"{SAN}\nextendedKeyUsage=serverAuth", "is not meant for clientAuth"),
        (f"{SAN}\nextendedKeyUsage=emailProtection", "is not meant for serverAuth and clientAuth"),
    ],
)
def test_a_certificate_for_something_else(made: Path, extensions: str, word: str) -> None:
    sign(made, "purpose", extensions)

    assert word in str(refusal(made, cert="purpose.crt"))


def test_both_purposes_may_be_named(made: Path) -> None:
    sign(made, "purposes", f"{SAN}\nextendedKeyUsage=serverAuth,clientAuth")

    load(made, cert="purposes.crt")


@pytest.mark.parametrize(("options", "word"), [("-newkey rsa:1024", "1024 bits")])
def test_weak_ones_are_refused(made: Path, options: str, word: str) -> None:
    openssl(made, f"req {options} -nodes -x509 -keyout weak.key -out weak.crt -subj /CN=x -sha256")
    (made / "weak.key").chmod(0o600)

    assert word in str(refusal(made, cert="weak.crt", key="weak.key", ca=None))


def test_a_broken_digest_is_refused(made: Path) -> None:
    openssl(made, "req -newkey rsa:2048 -nodes -x509 -keyout d.key -out d.crt -subj /CN=x -sha1")
    (made / "d.key").chmod(0o600)

    assert "broken digest" in str(refusal(made, cert="d.crt", key="d.key", ca=None))

"""Who gets through the edge's handshake, and who does not."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hcna_ray.config import Settings
from hcna_ray.security.authority import Kind, ensure_trust, revoke, sign_request
from hcna_ray.security.certs import make_request, new_key
from tests.support.c1 import ADMIN_KEY
from tests.support.edge import NAME, Recorder, RunningEdge, running_edge, served, write_pem

NOW = datetime.now(UTC)
REQUEST = (
    f"GET /tasks HTTP/1.1\r\nHost: {NAME}\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
    "Connection: close\r\n\r\n"
).encode()


def client_pem(
    directory: Path, path: Path, *, kind: Kind = "client", at: datetime = NOW, days: float = 1
) -> Path:
    """Have the authority of a directory sign a certificate; return key and certificate."""
    key = new_key()
    made = sign_request(
        directory,
        make_request(key, "anna"),
        name="anna",
        kind=kind,
        names=[] if kind == "client" else ["anna"],
        addresses=[],
        now=at,
        life=timedelta(days=days),
    )
    return write_pem(path, key, made)


def strangers_pem(tmp_path: Path) -> Path:
    """Return a certificate of somebody else's cluster."""
    elsewhere = tmp_path / "elsewhere"
    ensure_trust(elsewhere, now=NOW)
    return client_pem(elsewhere, tmp_path / "stranger.pem")


class Asked:
    """What a client got, or what the handshake said."""

    def __init__(self, edge: RunningEdge, pem: Path | None = None) -> None:
        context = edge.context()
        if pem is not None:
            context.load_cert_chain(pem)
        self.error, self.answer = "", b""
        try:
            with edge.connect(context) as connection:
                connection.sendall(REQUEST)
                # With TLS 1.3 the server's refusal comes with the first reading.
                while piece := connection.recv(65536):
                    self.answer += piece
        except OSError as error:
            self.error = str(error)

    @property
    def served(self) -> bool:
        return self.answer.startswith(b"HTTP/1.1 200 OK")


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Recorder]]:
    with served(tmp_path_factory.mktemp("c1"), hosts=(NAME,)) as found:
        yield found


Doors = Callable[[str], RunningEdge]


@pytest.fixture(scope="module")
def doors(
    behind: tuple[int, Recorder], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Doors]:
    """Edges that ask for a client's certificate in different ways."""
    home = tmp_path_factory.mktemp("doors")
    with (
        _door(home, behind[0], "none") as none,
        _door(home, behind[0], "required", enable_mtls=True) as required,
        _door(home, behind[0], "optional", ca_path=home / "own-ca.pem") as optional,
    ):
        yield {"none": none, "required": required, "optional": optional}.__getitem__


@contextmanager
def _door(home: Path, behind: int, name: str, **security: object) -> Iterator[RunningEdge]:
    def prepare(settings: Settings) -> None:
        # The owner's authority is, here, one that is made like the cluster's.
        ensure_trust(home / "own", now=NOW)
        write_pem(home / "own-ca.pem", (home / "own" / "ca.pem").read_text())

    with running_edge(home / name, behind, prepare=prepare, **security) as edge:
        yield edge


class TestOfTheServer:
    def test_who_believes_the_authority_is_served(self, doors: Doors) -> None:
        assert Asked(doors("none")).served

    def test_its_name_is_in_the_certificate(self, doors: Doors) -> None:
        edge = doors("none")
        for name in (NAME, "localhost", "127.0.0.1", "c1.hcna.internal"):
            with edge.connect(called=name) as connection:
                assert connection.version() == "TLSv1.3"

    def test_another_name_is_not(self, doors: Doors) -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            doors("none").connect(called="other.example.org")

    def test_who_believes_another_authority_leaves(self, doors: Doors, tmp_path: Path) -> None:
        trust = ensure_trust(tmp_path, now=NOW)
        with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
            doors("none").connect(ssl.create_default_context(cafile=trust))

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    def test_old_versions_are_refused(self, doors: Doors, version: ssl.TLSVersion) -> None:
        edge = doors("none")
        context = edge.context()
        with pytest.warns(DeprecationWarning, match="deprecated"):
            context.minimum_version = context.maximum_version = version
        # Without this our own library would not even ask.
        context.set_ciphers("ALL:@SECLEVEL=0")

        with pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version"):
            edge.connect(context)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_those_of_today_are_not(self, doors: Doors, version: ssl.TLSVersion) -> None:
        edge = doors("none")
        context = edge.context()
        context.minimum_version = context.maximum_version = version

        with edge.connect(context) as connection:
            cipher = connection.cipher()
        assert cipher is not None
        assert "GCM" in cipher[0] or "POLY1305" in cipher[0]

    @pytest.mark.parametrize(
        "ciphers", ["AES128-SHA", "ECDHE-ECDSA-AES256-SHA", "ECDHE-ECDSA-AES128-SHA256", "NULL"]
    )
    def test_weak_ciphers_are_refused(self, doors: Doors, ciphers: str) -> None:
        edge = doors("none")
        context = edge.context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(f"{ciphers}:@SECLEVEL=0")

        with pytest.raises(ssl.SSLError, match=r"(?i)handshake failure"):
            edge.connect(context)

    def test_http_2_is_not_offered(self, doors: Doors) -> None:
        edge = doors("none")
        context = edge.context()
        context.set_alpn_protocols(["h2", "http/1.1"])

        with edge.connect(context) as connection:
            assert connection.selected_alpn_protocol() == "http/1.1"

    def test_what_is_not_tls_gets_no_answer(
        self, doors: Doors, behind: tuple[int, Recorder]
    ) -> None:
        behind[1].seen.clear()
        with socket.create_connection(("127.0.0.1", doors("none").port), timeout=20) as plain:
            plain.sendall(REQUEST)
            try:
                answer = plain.recv(65536)
            except ConnectionResetError:
                answer = b""

        assert not answer.startswith(b"HTTP")
        assert behind[1].seen == []


class TestOfTheClient:
    def test_with_a_certificate_of_the_cluster(self, doors: Doors, tmp_path: Path) -> None:
        edge = doors("required")
        pem = client_pem(edge.settings.cluster_dir, tmp_path / "anna.pem")

        assert Asked(edge, pem).served
        assert edge.logged('"client_name":"anna"')

    def test_with_none(self, doors: Doors) -> None:
        asked = Asked(doors("required"))

        assert not asked.answer
        assert "certificate required" in asked.error.replace("_", " ").lower()

    def test_with_one_of_another_authority(self, doors: Doors, tmp_path: Path) -> None:
        asked = Asked(doors("required"), strangers_pem(tmp_path))

        assert not asked.answer
        assert "unknown ca" in asked.error.replace("_", " ").lower()

    def test_with_one_that_has_expired(self, doors: Doors, tmp_path: Path) -> None:
        edge = doors("required")
        pem = client_pem(
            edge.settings.cluster_dir, tmp_path / "old.pem", at=NOW - timedelta(days=5), days=2
        )
        asked = Asked(edge, pem)

        assert not asked.answer
        assert "expired" in asked.error

    def test_with_one_that_is_not_valid_yet(self, doors: Doors, tmp_path: Path) -> None:
        edge = doors("required")
        pem = client_pem(
            edge.settings.cluster_dir, tmp_path / "new.pem", at=NOW + timedelta(days=5)
        )
        asked = Asked(edge, pem)

        assert not asked.answer
        assert "certificate" in asked.error

    def test_with_one_that_is_for_servers(self, doors: Doors, tmp_path: Path) -> None:
        edge = doors("required")
        pem = client_pem(edge.settings.cluster_dir, tmp_path / "server.pem", kind="server")
        asked = Asked(edge, pem)

        assert not asked.answer
        assert "certificate" in asked.error

    def test_with_one_that_is_taken_back_within_one_look(
        self, doors: Doors, tmp_path: Path
    ) -> None:
        edge = doors("required")
        directory = edge.settings.cluster_dir
        pem = client_pem(directory, tmp_path / "bert.pem")
        assert Asked(edge, pem).served

        serial = ssl._ssl._test_decode_cert(str(pem))["serialNumber"]  # type: ignore[attr-defined]
        revoke(directory, serial.lower(), now=NOW)
        assert edge.keeper.refresh(now=NOW)
        edge.reload()

        # The process of before may take some more connections until it has given the port up.
        end = time.monotonic() + 20
        while (asked := Asked(edge, pem)).served:
            assert time.monotonic() < end, "it is still served"
        assert not asked.answer
        assert "revoked" in asked.error
        assert Asked(edge, client_pem(directory, tmp_path / "carl.pem")).served

    def test_who_need_not_show_one_must_show_a_good_one(self, doors: Doors, tmp_path: Path) -> None:
        edge = doors("optional")
        own = edge.settings.home.parent / "own"

        assert Asked(edge).served
        assert Asked(edge, client_pem(own, tmp_path / "anna.pem")).served
        assert not Asked(edge, strangers_pem(tmp_path)).answer
        clusters = client_pem(edge.settings.cluster_dir, tmp_path / "node.pem")
        assert not Asked(edge, clusters).answer, "another authority counts here"

"""The authority: whom it gives certificates, what they are good for, how it hands over."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hcna_ray import failpoints
from hcna_ray.security import authority
from hcna_ray.security.authority import (
    CertificateRefused,
    Kind,
    Node,
    RolloverRefused,
    begin_rollover,
    ensure_node,
    ensure_revocations,
    finish_rollover,
    install_node,
    is_rolling_over,
    list_issued,
    node_problem,
    remove_node,
    request_node,
    revoke,
    sign_request,
    trusted,
)
from hcna_ray.security.certs import (
    SERVER_LIFE,
    CertificateBroken,
    ensure_ca,
    ensure_server,
    load_cert,
    load_key,
    make_request,
    mutual_context,
    new_key,
)
from tests.support.handshakes import Handshake, shake_hands

NOW = datetime.now(UTC)
NAMES, ADDRESSES = ("w2.hcna.internal", "localhost"), ("127.0.0.1", "10.0.0.2")


def m1(directory: Path, *, now: datetime = NOW, anew: bool = False) -> Node:
    names = ("m1.hcna.internal", "localhost")
    return ensure_node(
        directory, "M1", names=names, addresses=("127.0.0.1", "10.0.0.1"), now=now, anew=anew
    )


def member(
    m1_dir: Path,
    directory: Path,
    *,
    name: str = "W2",
    names: tuple[str, ...] = NAMES,
    addresses: tuple[str, ...] = ADDRESSES,
    now: datetime = NOW,
    life: timedelta = SERVER_LIFE,
) -> Node:
    """Have a machine ask, and M1 answer."""
    made = sign_request(
        m1_dir,
        request_node(directory, name),
        name=name,
        kind="node",
        names=names,
        addresses=addresses,
        now=now,
        life=life,
    )
    return install_node(directory, made, (m1_dir / "trust.pem").read_text())


def issue(directory: Path, name: str = "X", kind: Kind = "node", **more: timedelta) -> str:
    ensure_ca(directory, now=NOW)
    return sign_request(
        directory,
        make_request(new_key(), name),
        name=name,
        kind=kind,
        names=("x",),
        addresses=(),
        now=NOW,
        **more,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """M1's directory, with its own certificate."""
    m1(tmp_path / "m1")
    return tmp_path / "m1"


@pytest.fixture
def w2(home: Path, tmp_path: Path) -> Node:
    return member(home, tmp_path / "w2")


def meet(
    server: Node, client: Node, *, called: str = "10.0.0.1", revoked: Path | None = None
) -> Handshake:
    return shake_hands(
        mutual_context(server.pem, server.trust, server=True, revoked=revoked),
        mutual_context(client.pem, client.trust, server=False),
        called,
    )


class TestHandshakes:
    def test_two_nodes_meet_in_both_directions(self, home: Path, w2: Node) -> None:
        m1_node = Node.of(home)

        there = meet(m1_node, w2)
        back = meet(w2, m1_node, called="10.0.0.2")

        assert there.agreed, there
        assert there.version in ("TLSv1.2", "TLSv1.3")
        assert back.agreed, back
        assert meet(w2, m1_node, called="localhost").agreed

    def test_without_a_certificate_nobody_gets_in(self, home: Path) -> None:
        node = Node.of(home)
        client = ssl.create_default_context(cafile=str(node.trust))

        met = shake_hands(mutual_context(node.pem, node.trust, server=True), client, "10.0.0.1")

        assert "peer did not return a certificate" in met.server_error.lower().replace("_", " ")

    def test_another_authority_is_refused_by_both_sides(self, home: Path, tmp_path: Path) -> None:
        stranger = m1(tmp_path / "stranger")

        met = meet(Node.of(home), stranger)
        assert "certificate verify failed" in met.client_error
        # One that believes anybody is not believed.
        careless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        careless.check_hostname, careless.verify_mode = False, ssl.CERT_NONE
        careless.load_cert_chain(stranger.pem)
        node = Node.of(home)
        met = shake_hands(mutual_context(node.pem, node.trust, server=True), careless, "10.0.0.1")
        assert "certificate verify failed" in met.server_error

    @pytest.mark.parametrize(
        ("now", "life", "word"),
        [
            (NOW - timedelta(days=91), SERVER_LIFE, "expired"),
            (NOW + timedelta(days=5), SERVER_LIFE, "not yet valid"),
        ],
    )
    def test_time_decides(
        self, home: Path, tmp_path: Path, now: datetime, life: timedelta, word: str
    ) -> None:
        late = member(home, tmp_path / "late", now=now, life=life)

        assert word in meet(Node.of(home), late).server_error
        assert word in meet(late, Node.of(home), called="10.0.0.2").client_error

    def test_a_name_that_is_not_in_it_is_refused(self, home: Path, w2: Node) -> None:
        assert "mismatch" in meet(Node.of(home), w2, called="10.0.0.9").client_error
        assert "mismatch" in meet(Node.of(home), w2, called="w2.hcna.internal").client_error

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    def test_old_versions_are_refused(self, home: Path, w2: Node, version: ssl.TLSVersion) -> None:
        old = mutual_context(w2.pem, w2.trust, server=False)
        old.minimum_version = old.maximum_version = version
        old.set_ciphers("ALL:@SECLEVEL=0")
        node = Node.of(home)

        met = shake_hands(mutual_context(node.pem, node.trust, server=True), old, "10.0.0.1")

        assert not met.agreed
        assert "protocol" in met.server_error.lower()

    def test_a_revoked_one_is_refused_and_the_next_one_is_not(
        self, home: Path, w2: Node, tmp_path: Path
    ) -> None:
        revoke(home, "W2", now=NOW)

        met = meet(Node.of(home), w2, revoked=home / "crl.pem")
        again = member(home, tmp_path / "w2")

        assert "revoked" in met.server_error
        assert meet(Node.of(home), again, revoked=home / "crl.pem").agreed

    def test_a_client_is_no_server(self, home: Path, tmp_path: Path) -> None:
        key = new_key()
        made = sign_request(
            home,
            make_request(key, "me"),
            name="me",
            kind="client",
            names=(),
            addresses=("10.0.0.2",),
            now=NOW,
        )
        pem = tmp_path / "me.pem"
        pem.write_text(key + made)
        mine = Node(pem=pem, trust=home / "trust.pem")

        assert meet(Node.of(home), mine).agreed
        met = meet(mine, Node.of(home), called="10.0.0.2")
        assert "unsuitable certificate purpose" in met.client_error.lower().replace("_", " ")


class TestGiving:
    def test_what_is_given_is_listed(self, home: Path, w2: Node) -> None:
        first, second = list_issued(home)

        assert (first.name, first.kind) == ("M1", "node")
        assert (second.name, second.names, second.addresses) == (
            "W2",
            tuple(sorted(NAMES)),
            tuple(sorted(ADDRESSES)),
        )
        assert int(second.serial, 16) == load_cert(w2.pem).serial_number
        assert second.sha256 == load_cert(w2.pem).fingerprint(hashes.SHA256()).hex()
        assert second.state(NOW) == "good"
        assert second.state(NOW + timedelta(days=61)) == "expiring"
        assert second.state(NOW + SERVER_LIFE) == "expired"
        assert (home / "issued.json").stat().st_mode & 0o777 == 0o600

    def test_a_key_stays_where_it_was_made(self, home: Path, w2: Node) -> None:
        mine = load_key(w2.pem)

        assert w2.pem.stat().st_mode & 0o777 == 0o600
        secret = mine.private_numbers().private_value.to_bytes(32)
        kept = [path for path in home.iterdir() if path.suffix in (".pem", ".key")]
        held = [load_key(path) for path in kept if b"PRIVATE" in path.read_bytes()]
        assert len(held) == 2
        assert all(key.private_numbers().private_value.to_bytes(32) != secret for key in held)

    def test_a_request_must_be_signed_with_its_own_key(self, home: Path) -> None:
        text = make_request(new_key(), "W2")
        der = bytearray(x509.load_pem_x509_csr(text.encode()).public_bytes(_DER))
        der[-3] ^= 1
        try:
            forged = x509.load_der_x509_csr(bytes(der)).public_bytes(_PEM).decode()
        except ValueError:
            forged = "nonsense"

        with pytest.raises(CertificateRefused, match="request"):
            sign(home, forged)
        with pytest.raises(CertificateRefused, match="not a certificate request"):
            sign(home, "nonsense")
        assert len(list_issued(home)) == 1

    def test_weak_keys_get_nothing(self, home: Path) -> None:
        weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
        strange = ec.generate_private_key(ec.SECP256K1())

        for key, word in ((weak, "1024 bits"), (strange, "secp256k1")):
            name = x509.Name([])
            builder = x509.CertificateSigningRequestBuilder().subject_name(name)
            text = builder.sign(key, hashes.SHA256()).public_bytes(_PEM).decode()
            with pytest.raises(CertificateRefused, match=word):
                sign(home, text)

    def test_bounds(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = make_request(new_key(), "W2")
        with pytest.raises(CertificateRefused, match="397 days"):
            issue(home, life=timedelta(days=398))
        with pytest.raises(CertificateRefused, match="name of a certificate"):
            issue(home, "x\ny")
        with pytest.raises(CertificateRefused, match="64 names"):
            sign(home, text, names=[f"n{i}" for i in range(65)])
        with pytest.raises(CertificateRefused, match="needs a name"):
            sign(home, text)
        with pytest.raises(CertificateRefused, match="address"):
            sign(home, text, addresses=["10.0.0.300"])
        monkeypatch.setattr(authority, "ISSUED_MAX", 2)
        issue(home)
        with pytest.raises(CertificateRefused, match="2 certificates"):
            issue(home)

    def test_long_expired_ones_leave_the_list(self, home: Path) -> None:
        later = NOW + timedelta(days=121)

        m1(home, now=later)

        assert [each.issued_at for each in list_issued(home)] == [later.timestamp()]

    def test_a_list_that_cannot_be_read_is_left_alone(self, home: Path) -> None:
        (home / "issued.json").write_text('{"schema": 1, "issued": [{}]}')

        with pytest.raises(CertificateBroken, match=r"issued\.json"):
            issue(home)
        (home / "issued.json").write_text('{"schema": 2}')
        with pytest.raises(CertificateBroken, match="schema"):
            list_issued(home)


class TestOwnNode:
    def test_a_good_one_is_kept(self, home: Path) -> None:
        before = (home / "node.pem").read_text()

        assert m1(home, now=NOW + timedelta(days=59)).pem.read_text() == before
        assert m1(home, anew=True).pem.read_text() != before

    @pytest.mark.parametrize("why", ["age", "address", "revoked", "unreadable", "gone", "key"])
    def test_another_one_is_made(self, home: Path, why: str) -> None:
        node, now, addresses = Node.of(home), NOW, ("127.0.0.1", "10.0.0.1")
        before = node.pem.read_text()
        match why:
            case "age":
                now = NOW + timedelta(days=61)
            case "address":
                addresses = ("127.0.0.1", "10.0.0.77")
            case "revoked":
                revoke(home, "M1", now=NOW)
            case "unreadable":
                node.pem.write_text("nonsense")
            case "gone":
                node.pem.unlink()
            case "key":
                node.pem.write_text(new_key() + before[before.index("-----BEGIN CERT") :])

        ensure_node(home, "M1", names=("localhost",), addresses=addresses, now=now)

        after = load_cert(node.pem)
        assert after.public_key() == load_key(node.pem).public_key()
        after.verify_directly_issued_by(load_cert(home / "ca.pem"))
        assert node.pem.read_text() != before

    def test_a_member_knows_when_to_ask(self, home: Path, w2: Node) -> None:
        def problem(**more: datetime | tuple[str, ...]) -> str:
            asked = {"names": NAMES, "addresses": ADDRESSES, "now": NOW} | more
            return node_problem(w2, **asked)  # type: ignore[arg-type]

        assert problem() == ""
        assert problem(now=NOW + timedelta(days=61)) == "it nears its end"
        assert problem(now=NOW - timedelta(days=3)) == "it is not valid yet"
        assert problem(addresses=("10.9.9.9", "fd00::1")) == "it is not for 10.9.9.9, fd00::1"
        begin_rollover(home, now=NOW)
        w2.trust.write_text((home / "trust.pem").read_text())
        assert problem() == ""
        finish_rollover(home, now=NOW)
        w2.trust.write_text((home / "trust.pem").read_text())
        assert problem() == "another authority signs now"
        remove_node(w2.pem.parent)
        assert problem().startswith("it cannot be used")

    def test_an_answer_that_does_not_fit_changes_nothing(self, home: Path, w2: Node) -> None:
        before, directory = w2.pem.read_text(), w2.pem.parent
        trust = w2.trust.read_text()

        request_node(directory, "W2")
        with pytest.raises(CertificateBroken, match="another key"):
            install_node(directory, issue(home), trust)
        with pytest.raises(CertificateBroken, match="answer"):
            install_node(directory, "nonsense", trust)
        request = request_node(directory, "W2")
        made = sign(home, request, names=["w2"])
        stranger = m1(directory.parent / "stranger").trust.read_text()
        with pytest.raises(CertificateBroken, match="nobody it names"):
            install_node(directory, made, stranger)
        assert w2.pem.read_text() == before
        install_node(directory, made, trust)
        assert w2.pem.read_text() != before
        with pytest.raises(CertificateBroken, match=r"node\.key\.new"):
            install_node(directory, made, trust)


class TestRevoking:
    def test_by_name_by_serial_and_not_twice(self, home: Path) -> None:
        issue(home, "A")
        issue(home, "A")
        issue(home, "B")
        *_, b = list_issued(home)

        assert [each.name for each in revoke(home, "A", now=NOW, reason="lost")] == ["A", "A"]
        shown = ":".join(b.serial[i : i + 2] for i in range(0, 12, 2)).upper()
        assert [each.serial for each in revoke(home, shown, now=NOW)] == [b.serial]
        with pytest.raises(CertificateRefused, match="'A'"):
            revoke(home, "A", now=NOW)
        states = [(each.name, each.state(NOW), each.reason) for each in list_issued(home)]
        assert states == [
            ("M1", "good", ""),
            ("A", "revoked", "lost"),
            ("A", "revoked", "lost"),
            ("B", "revoked", ""),
        ]
        crl = x509.load_pem_x509_crl((home / "crl.pem").read_bytes())
        assert crl.is_signature_valid(load_cert(home / "ca.pem").public_key())  # type: ignore[arg-type]
        assert len(crl) == 3

    def test_the_list_is_signed_anew_before_it_grows_old(self, home: Path) -> None:
        path = ensure_revocations(home, now=NOW)
        before = path.read_text()

        assert ensure_revocations(home, now=NOW + timedelta(days=14)).read_text() == before
        assert ensure_revocations(home, now=NOW + timedelta(days=16)).read_text() != before
        path.write_text("nonsense")
        assert "X509 CRL" in ensure_revocations(home, now=NOW).read_text()


class TestRollover:
    def test_both_authorities_count_until_the_old_one_ends(
        self, home: Path, w2: Node, tmp_path: Path
    ) -> None:
        old = load_cert(home / "ca.pem")
        server = ensure_server(home, "gate", names=("gate",), addresses=(), now=NOW)

        begin_rollover(home, now=NOW)
        m1_node = m1(home)
        w3 = member(home, tmp_path / "w3", name="W3", addresses=("10.0.0.3",))

        assert is_rolling_over(home)
        assert trusted(home / "trust.pem") == [old, load_cert(home / "ca.pem")]
        load_cert(m1_node.pem).verify_directly_issued_by(load_cert(home / "ca.pem"))
        # A machine that was told of the new authority meets old and new ones.
        w2.trust.write_text((home / "trust.pem").read_text())
        assert meet(m1_node, w2).agreed
        assert meet(w2, m1_node, called="10.0.0.2").agreed
        assert meet(w3, w2, called="10.0.0.3").agreed
        # Whoever was not told still knows the gate.
        again = ensure_server(home, "gate", names=("gate",), addresses=(), now=NOW)
        load_cert(again.cert).verify_directly_issued_by(old)
        assert again.cert.read_text() == server.cert.read_text()
        # Revocations of both are known.
        revoke(home, "W2", now=NOW)
        assert "revoked" in meet(m1_node, w2, revoked=home / "crl.pem").server_error
        assert meet(m1_node, w3, revoked=home / "crl.pem").agreed

        assert finish_rollover(home, now=NOW)
        assert not finish_rollover(home, now=NOW)
        assert not is_rolling_over(home)
        assert trusted(home / "trust.pem") == [load_cert(home / "ca.pem")]
        assert "verify failed" in meet(m1_node, w2).server_error
        again = ensure_server(home, "gate", names=("gate",), addresses=(), now=NOW)
        load_cert(again.cert).verify_directly_issued_by(load_cert(home / "ca.pem"))
        assert not [path for path in home.iterdir() if "old" in path.name or "next" in path.name]

    def test_one_at_a_time(self, home: Path) -> None:
        begin_rollover(home, now=NOW)

        with pytest.raises(RolloverRefused, match="not ended"):
            begin_rollover(home, now=NOW)

    @pytest.mark.parametrize(
        "point",
        ["rollover.begun", "rollover.kept", "rollover.signing", "rollover.ended"],
    )
    @pytest.mark.parametrize("written", range(2))
    def test_cut_off_anywhere_it_is_completed(
        self, home: Path, point: str, written: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = load_cert(home / "ca.pem")
        with interrupted_at(f"certificate.{point}", written, monkeypatch) as cut:
            begin_rollover(home, now=NOW)
            finish_rollover(home, now=NOW)
        assert cut()

        node = m1(home)

        current = load_cert(home / "ca.pem")
        assert current.public_key() == load_key(home / "ca.key").public_key()
        load_cert(node.pem).verify_directly_issued_by(current)
        assert current != old
        wanted = [current] if point == "rollover.ended" else [old, current]
        assert trusted(node.trust) == wanted
        finish_rollover(home, now=NOW)
        assert trusted(node.trust) == [current]
        assert not list(home.glob("ca.next*"))
        assert not list(home.glob("ca.old*"))


@contextmanager
def interrupted_at(
    point: str, writes_later: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], bool]]:
    """End what runs at a failpoint, or that many private files after it."""
    arrived = left = 0

    def hit(name: str) -> None:
        nonlocal arrived, left
        if name == point:
            arrived, left = 1, writes_later
            if not writes_later:
                raise KeyboardInterrupt
        elif arrived and name == "private.file.named":
            left -= 1
            if left <= 0:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", hit)
        try:
            yield lambda: bool(arrived)
        except KeyboardInterrupt:
            pass


_DER, _PEM = serialization.Encoding.DER, serialization.Encoding.PEM


def sign(
    directory: Path,
    request: str,
    *,
    names: list[str] | None = None,
    addresses: list[str] | None = None,
) -> str:
    return sign_request(
        directory,
        request,
        name="W2",
        kind="node",
        names=names or [],
        addresses=addresses or [],
        now=NOW,
    )

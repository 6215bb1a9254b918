"""C1's entrance for others, from a host that belongs to nobody: who gets in, and as whom."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.security.authority import ensure_trust, sign_request
from hcna_ray.security.certs import make_request, new_key
from tests.rig.computer import HCNA, HOME, Computer, eventually, measured
from tests.support.rig import Host
from tests.support.rig.testing import rig_for_tests

#: What was counted for the audit log is told after a minute.
pytestmark = pytest.mark.drill

NAME = "c1.lab.example.org"
#: The entrance, and what is behind it for M1's own programs.
PORT, BEHIND = 8080, 10034
IN_CLEAR = "composite: {listen_address: 0.0.0.0}\n"
CONFIG = f"""\
composite:
  listen_address: 0.0.0.0
  hosts: [{NAME}]
  security: {{enable_tls: true, enable_mtls: true}}
"""
PEOPLE = "/root/people"


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    base = tmp_path_factory.mktemp("rigs").resolve()
    with rig_for_tests(base=base) as rig:
        made = Computer(rig)
        made.c1_port = BEHIND
        made.m1.write(f"{HOME}/hcna.yaml", IN_CLEAR)
        refused = made.hcna("m1", "up", check=False)
        assert refused.code != 0
        assert "composite.listen_address is 0.0.0.0 without composite.security" in refused.err
        assert [one for one in made.leftovers(made.m1) if "hcna" in one] == []
        made.m1.write(f"{HOME}/hcna.yaml", CONFIG)
        said = made.hcna("m1", "up")
        assert f"https://{NAME}:{PORT}" in said.out + said.err
        yield made
        made.hcna("m1", "down")


@pytest.fixture(scope="module")
def client(computer: Computer, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The host ``client``, with certificates to try: the right one and some that must not do."""
    folder, one, now = tmp_path_factory.mktemp("people"), computer.rig["client"], datetime.now(UTC)
    cluster, other = folder / "cluster", folder / "other"
    cluster.mkdir()
    for name in ("ca.pem", "ca.key"):
        (cluster / name).write_text(computer.m1.read(f"{HOME}/cluster/{name}"))

    def signed(authority: Path, kind: Any, when: datetime) -> str:
        key = new_key()
        request = make_request(key, "anna")
        names = ["anna"] if kind == "server" else []
        made = sign_request(
            authority, request, name="anna", kind=kind, names=names, addresses=[], now=when
        )
        return key + made

    one.write(f"{PEOPLE}/trust.pem", computer.m1.read(f"{HOME}/cluster/trust.pem"))
    one.write(f"{PEOPLE}/other.pem", ensure_trust(other, now=now).read_text())
    for person, authority, kind, when in (
        ("right", cluster, "client", now),
        ("stranger", other, "client", now),
        ("expired", cluster, "client", now - timedelta(days=91)),
        ("early", cluster, "client", now + timedelta(days=5)),
        ("server", cluster, "server", now),
    ):
        one.write(f"{PEOPLE}/{person}.pem", signed(authority, kind, when), mode=0o600)
    return one


def ask(
    computer: Computer,
    source: Host,
    options: str = "",
    *,
    person: str = "right",
    called: str = NAME,
    trust: str = "trust",
    path: str = "/tasks",
    key: str | None = None,
) -> tuple[int, int, str]:
    """Ask C1 at its entrance; return curl's own code, the status or 0, and the answer."""
    words = ["curl", "-qs", "-m", "20", "-w", "\n%{http_code}", "--cacert", f"{PEOPLE}/{trust}.pem"]
    words += ["--resolve", f"{called}:{PORT}:{computer.m1.address}"]
    if person:
        words += ["--cert", f"{PEOPLE}/{person}.pem"]
    if key is not None:
        words += ["-H", f"Authorization: Bearer {key}"]
    words += [*shlex.split(options), f"https://{called}:{PORT}{path}"]
    done = source.run(*words, check=False)
    text, _, status = done.out.rpartition("\n")
    return done.code, int(status or 0), text


def test_the_right_certificate_and_key_get_in(computer: Computer, client: Host) -> None:
    for more in ("", "--tlsv1.3", "--tls-max 1.2"):
        assert ask(computer, client, more, key=computer.key)[:2] == (0, 200), more
    exports = (
        f"export HCNA_URL=https://{NAME}:{PORT} HCNA_API_KEY={computer.key} "
        f"HCNA_CA_FILE={PEOPLE}/trust.pem HCNA_CLIENT_CERT={PEOPLE}/right.pem "
        f"HCNA_CLIENT_KEY={PEOPLE}/right.pem"
    )
    client.sh(f"grep -q {NAME} /etc/hosts || echo {computer.m1.address} {NAME} >>/etc/hosts")
    done = client.sh(f"{exports}; {HCNA} submit echo message=outside --wait --json")
    assert json.loads(done.out)["result"]["message"] == "outside"


def test_others_end_at_the_handshake(computer: Computer, client: Host) -> None:
    tried = 0
    for person in ("", "stranger", "expired", "early", "server"):
        assert ask(computer, client, person=person, key=computer.key)[1] == 0, person
        tried += 1
    # The ciphers are there for TLS 1.2, so it is the version that is refused.
    weak = "--tlsv1.0 --ciphers ALL@SECLEVEL=0 --tls-max"
    assert ask(computer, client, f"{weak} 1.2", key=computer.key)[:2] == (0, 200)
    for version in ("1.0", "1.1"):
        assert ask(computer, client, f"{weak} {version}", key=computer.key)[1] == 0, version
        tried += 1
    plain = client.sh(f"curl -qs -m 10 http://{computer.m1.address}:{PORT}/live", check=False)
    assert plain.code != 0
    assert '"alive"' not in plain.out
    measured(f"C1's entrance from another host: {tried + 1} handshakes refused, none let in")


def test_a_client_finds_out_who_is_not_c1(computer: Computer, client: Host) -> None:
    untrusted = 60  # curl's word for a certificate that it does not believe
    assert ask(computer, client, trust="other", key=computer.key)[:2] == (untrusted, 0)
    assert ask(computer, client, called="evil.test", key=computer.key)[:2] == (untrusted, 0)
    # And C1 does not answer to names that are not its own.
    assert ask(computer, client, "-k", called="evil.test", key=computer.key)[:2] == (0, 421)


def test_a_certificate_is_no_key_and_wrong_keys_are_bounded(
    computer: Computer, client: Host
) -> None:
    assert ask(computer, client)[1] == 401
    assert ask(computer, client, key=computer.key)[1] == 200
    statuses = [
        ask(computer, client, f"-H 'X-Forwarded-For: 9.9.9.{n}'", key=f"hcna_{n}")[1]
        for n in range(12)
    ]
    assert statuses == [401] * 10 + [429] * 2
    assert ask(computer, client, key=computer.key)[1] == 200, "was good from there before"
    # M1's own programs are somewhere else.
    assert computer.api("GET", "/tasks")[0] == 200

    def told() -> list[dict[str, Any]]:
        status, answer = computer.api("GET", "/admin/audit?limit=200")
        assert status == 200
        return [one for one in answer["entries"] if one["action"] == "api.refused"]

    found, _ = eventually(told, 120, "the audit log")
    assert {one["principal"] for one in found} == {f"address {client.address}"}, found
    assert {one["outcome"] for one in found} == {"401", "429"}


def test_what_is_bound_is_the_entrance_alone(computer: Computer) -> None:
    where = {one.number: one.on_loopback for one in computer.m1.ports() if one.protocol == "tcp"}
    assert where[PORT] is False
    for number in (8443, BEHIND):
        assert where[number] is True, number
    told = json.loads(computer.hcna("m1", "doctor --json", check=False).out)
    (check,) = [each for each in told["checks"] if each["id"] == "entrance"]
    assert f"https://{NAME}:{PORT} (port {PORT}/tcp, TLS)" in check["found"]

"""``join``, ``leave``, ``doctor``, ``invite`` against a real gate; only Ray is left out."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hcna_ray import supervisor
from hcna_ray.cli.machines import parse_lifetime
from hcna_ray.cli.main import main
from hcna_ray.cli.terminal import UsageProblem
from hcna_ray.config import GIB, Settings
from hcna_ray.durable import make_private_dir
from hcna_ray.security.authority import begin_rollover, finish_rollover, trusted
from hcna_ray.security.certs import load_cert
from hcna_ray.security.keys import ensure_owner_key
from hcna_ray.security.orders import OrderSigner, OrderVerifier
from hcna_ray.supervisor.gate_protocol import Versions
from hcna_ray.supervisor.membership import (
    read_members,
    read_membership,
    remove_member,
    write_membership,
)
from hcna_ray.supervisor.processes import identify
from hcna_ray.supervisor.reach import Listeners
from hcna_ray.supervisor.state import write_state, write_supervisor
from tests.support.gates import GateRig, serving
from tests.unit.cli.conftest import Ran

ENV = {"HCNA_PORTS__OFFSET": "13500", "HCNA_LIMITS__DISK_FREE_BYTES_MIN": "0"}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[GateRig]:
    """M1, with listeners in place of its Ray."""
    names = ("gcs", "head_node_manager", "head_object_manager", "head_agent_grpc")
    with serving(tmp_path / "m1", env=ENV) as made:
        ports = [made.settings.port(name) for name in names]
        with Listeners(ports, "", host="127.0.0.1") as listeners:
            assert not listeners.taken
            yield made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State directory of the machine that the commands run on; not there yet."""
    place = tmp_path / "w"
    monkeypatch.setenv("HCNA_HOME", str(place))
    monkeypatch.delenv("HCNA_DEBUG", raising=False)
    monkeypatch.delenv("HCNA_CONFIG", raising=False)
    return place


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The supervisor of this machine, which would start Ray, writes down what it is asked for."""
    asked: list[str] = []
    memory = SimpleNamespace(available=8 * GIB, total=16 * GIB)
    usage = SimpleNamespace(free=50 * GIB, total=99 * GIB)

    def up(settings: Settings, *, wait_s: float, on_step: Callable[[str], None]) -> None:
        asked.append(f"up {wait_s:g}")

    def down(settings: Settings, *, on_step: Callable[[str], None], everywhere: bool) -> None:
        asked.append(f"down everywhere={everywhere}")

    monkeypatch.setattr(supervisor, "up", up)
    monkeypatch.setattr(supervisor, "down", down)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("resource.getrlimit", lambda which: (65536, 65536))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return asked


@pytest.fixture
def hcna(home: Path, local: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*words: str) -> Ran:
        capsys.readouterr()
        code = main(list(words))
        seen = capsys.readouterr()
        return Ran(code, seen.out, " ".join(seen.err.split()))

    return run


Hcna = Callable[..., Ran]


def on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands that follow on another machine."""
    monkeypatch.setenv("HCNA_HOME", str(home))


def runs_here(run_dir: Path) -> None:
    """Have this process pass for the supervisor of a home."""
    me = identify(os.getpid())
    assert me is not None
    make_private_dir(run_dir)
    write_supervisor(run_dir, me)


# -- join ------------------------------------------------------------------------------------------


def test_join_ticks_joins_starts_and_says_what_this_machine_is(
    hcna: Hcna, rig: GateRig, home: Path, local: list[str]
) -> None:
    ran = hcna("join", rig.code())

    assert ran.code == 0
    assert ran.out == (
        "this machine is W1: 8 CPU, 16.0 GB; M1 is HCNA-M1--prod--home--v1.0 at 127.0.0.1\n"
    )
    for name in ("address", "ports to M1", "ports from M1", "clock", "python", "ray", "disk"):
        assert f" {name} " in ran.err
    assert "✓ clock" in ran.err
    assert "✗" not in ran.err
    assert local == ["up 120"]
    membership = read_membership(home / "cluster")
    assert membership is not None
    assert (membership.name, membership.m1_addresses) == ("W1", ("127.0.0.1",))
    token = home / "keys" / "ray.token"
    assert token.read_text() == (rig.settings.keys_dir / "ray.token").read_text()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_join_as_json_holds_no_secret(hcna: Hcna, rig: GateRig, home: Path) -> None:
    ran = hcna("join", rig.code(), "--name", "W3", "--json")

    assert ran.code == 0
    assert ran.json["joined"] is True
    assert ran.json["membership"]["name"] == "W3"
    assert [check["level"] for check in ran.json["checks"]].count("fail") == 0
    membership = read_membership(home / "cluster")
    assert membership is not None
    assert membership.member_token not in ran.out


def test_join_reads_the_code_from_a_file_or_stdin(
    hcna: Hcna, rig: GateRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "code.txt"
    file.write_text(rig.code().lower() + "\n")
    assert hcna("join", "--code-file", str(file)).code == 0

    on(tmp_path / "w2", monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO(rig.code()))
    assert "W2" in hcna("join", "--code-file", "-").out


def test_join_again_changes_nothing(hcna: Hcna, rig: GateRig, home: Path, local: list[str]) -> None:
    code = rig.code()
    hcna("join", code)
    before = read_membership(home / "cluster")

    ran = hcna("join", code)

    assert ran.code == 0
    assert "this machine is W1" in ran.out
    assert read_membership(home / "cluster") == before
    assert local == ["up 120", "up 120"]


def test_join_after_m1_forgot_this_machine(hcna: Hcna, rig: GateRig, home: Path) -> None:
    hcna("join", rig.code())
    before = read_membership(home / "cluster")
    remove_member(rig.settings.cluster_dir, "W1")

    ran = hcna("join", rig.code())

    after = read_membership(home / "cluster")
    assert ran.code == 0
    assert before is not None
    assert after is not None
    assert after.machine_id == before.machine_id
    assert after.member_token != before.member_token


def test_a_worker_that_does_not_start_is_told_from_one_that_did_not_join(
    hcna: Hcna, rig: GateRig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: Settings, **options: Any) -> None:
        raise supervisor.StartFailed("not ready after 1 s")

    monkeypatch.setattr(supervisor, "up", fail)
    ran = hcna("join", rig.code(), "--wait", "1")

    assert ran.code == 1
    assert "has joined as W1, but its worker is not in yet: not ready after 1 s" in ran.err
    assert "Next: hcna doctor" in ran.err
    assert read_membership(home / "cluster") is not None


# Every bad case: nothing is changed, one line says what and what next, and the code is its own.


def refused(ran: Ran, code: int, says: str, then: str, home: Path) -> None:
    assert ran.code == code, ran.err
    assert says in ran.err
    assert then in ran.err.split("Next: ")[-1]
    assert not home.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give the join code once"),
        (("7F3K-92QD",), "a join code starts with HCNA-"),
        (("7F3K", "--code-file", "x"), "give the join code once"),
        (("--code-file", "/nowhere"), "/nowhere"),
    ],
)
def test_no_code(hcna: Hcna, home: Path, words: tuple[str, ...], says: str) -> None:
    refused(hcna("join", *words), 2, says, "hcna", home)


def test_a_mistyped_code(hcna: Hcna, rig: GateRig, home: Path) -> None:
    code = rig.code()
    wrong = code[:-1] + ("X" if code[-1] != "X" else "Y")

    refused(hcna("join", wrong), 2, "missing or wrong; copy it again", "hcna invite", home)


def test_an_expired_code(hcna: Hcna, rig: GateRig, home: Path) -> None:
    code = rig.code(now=time.time() - 7200)

    refused(hcna("join", code), 4, "M1 refuses: the join code has expired", "hcna invite", home)


def test_a_code_that_another_machine_used(hcna: Hcna, rig: GateRig, home: Path) -> None:
    code = rig.code()
    from hcna_ray.supervisor.invites import decode_code

    rig.join("another", f"Invite {decode_code(code).token}")

    refused(hcna("join", code), 4, "was used by another machine", "hcna invite", home)


def test_a_code_of_another_m1(hcna: Hcna, rig: GateRig, home: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "other", env={"HCNA_PORTS__GATE": str(rig.settings.ports.gate)}) as old:
        code = old.code()
    refused(hcna("join", code), 3, "M1 cannot be reached", "hcna up, on M1's machine", home)


def test_m1_that_is_down(hcna: Hcna, rig: GateRig, home: Path) -> None:
    code = rig.code()
    rig.gate.stop()

    refused(hcna("join", code), 3, "127.0.0.1: refused (nothing listens", "hcna up", home)


def test_a_taken_name(hcna: Hcna, rig: GateRig, home: Path) -> None:
    rig.join("another", name="W1")

    ran = hcna("join", rig.code(), "--name", "W1")

    refused(ran, 5, "W1 is taken by host-another at 127.0.0.1", "hcna join CODE", home)
    assert "fix hcna join CODE without --name" in ran.err


def test_a_port_in_use(hcna: Hcna, rig: GateRig, home: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 23520))
        other.listen()
        ran = hcna("join", rig.code(), "--json")

    refused(ran, 5, "a check failed: ports from M1", "hcna join CODE", home)
    assert ran.json["joined"] is False
    (failed,) = [check for check in ran.json["checks"] if check["level"] == "fail"]
    assert "23520 by" in failed["found"]
    assert "ss -ltnp" in failed["fix"]


def test_a_wrong_clock(hcna: Hcna, rig: GateRig, home: Path) -> None:
    rig.ahead_s = -600

    ran = hcna("join", rig.code())

    refused(ran, 5, "✗ clock 600.0 s ahead of M1's", "hcna join CODE", home)
    assert "fix set both clocks: sudo timedatectl set-ntp true" in ran.err


def test_another_version_of_ray(hcna: Hcna, rig: GateRig, home: Path) -> None:
    rig.gate.versions = replace(rig.versions, ray="2.61.0")

    ran = hcna("join", rig.code())

    refused(ran, 5, "a check failed: ray", "hcna join CODE", home)
    assert f"✗ ray {rig.versions.ray} here, 2.61.0 on M1" in ran.err
    assert isinstance(rig.versions, Versions)


def test_a_full_disk(hcna: Hcna, rig: GateRig, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=0, total=99 * GIB)
    limits = rig.settings.limits.model_copy(update={"disk_free_bytes_min": GIB})
    rig.gate.settings = rig.settings.model_copy(update={"limits": limits})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    ran = hcna("join", rig.code())

    refused(ran, 5, "0 MB free in", "hcna join CODE", home)
    assert "1.0 GB are needed" in ran.err


def test_no_permission(
    hcna: Hcna, rig: GateRig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)

    ran = hcna("join", rig.code())

    refused(ran, 5, "cannot be written: Permission denied", "hcna join CODE", home)
    assert "sudo chown" in ran.err


def test_an_address_of_another_machine(hcna: Hcna, rig: GateRig, home: Path) -> None:
    ran = hcna("join", rig.code(), "--address", "10.255.255.1")

    refused(ran, 2, "10.255.255.1 is no address of this machine", "without --address", home)
    assert "the route to M1 starts at 127.0.0.1" in ran.err


def test_m1s_own_machine_does_not_join_itself(
    hcna: Hcna, rig: GateRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(rig.settings.home, monkeypatch)

    ran = hcna("join", rig.code())

    assert ran.code == 4
    assert "this is the code of M1 on this very machine" in ran.err


def test_a_machine_with_an_m1_of_its_own(hcna: Hcna, rig: GateRig, home: Path) -> None:
    runs_here(home / "run")

    ran = hcna("join", rig.code())

    assert ran.code == 4
    assert "runs an M1 of its own. Next: hcna down" in ran.err


def test_a_member_of_another_m1(hcna: Hcna, rig: GateRig, home: Path, tmp_path: Path) -> None:
    hcna("join", rig.code())
    with serving(tmp_path / "other") as other:
        ran = hcna("join", other.code())

    assert ran.code == 4
    assert "this machine is W1 of HCNA-M1--prod--home--v1.0 at 127.0.0.1" in ran.err
    assert "Next: hcna leave" in ran.err


def test_a_member_that_missed_a_change_of_the_authority_joins_again(
    hcna: Hcna, rig: GateRig, home: Path, local: list[str]
) -> None:
    hcna("join", rig.code())
    directory, now = rig.settings.cluster_dir, datetime.now(UTC)
    begin_rollover(directory, now=now)
    finish_rollover(directory, now=now)
    rig.gate.stop()
    rig.gate.start()

    ran = hcna("join", rig.code())

    assert ran.code == 0, ran.err
    assert ran.out.startswith("this machine is W1: ")
    assert "another authority than when this machine joined" in ran.err
    assert local == ["up 120", "down everywhere=False", "up 120"]
    membership = read_membership(home / "cluster")
    assert membership is not None
    assert membership.ca_pem == rig.ca_pem
    assert trusted(home / "cluster" / "trust.pem") == [load_cert(directory / "ca.pem")]
    OrderVerifier(home / "cluster").verify(b"stop", OrderSigner(directory).sign(b"stop"))


# -- leave -----------------------------------------------------------------------------------------


def test_leave_drains_stops_and_is_forgotten(
    hcna: Hcna, rig: GateRig, home: Path, local: list[str]
) -> None:
    hcna("join", rig.code())
    rig.told.clear()

    ran = hcna("leave", "--drain", "5", "--json")

    assert ran.code == 0
    assert ran.json == {
        "name": "W1",
        "drained": True,
        "running": 0,
        "forgotten": True,
        "told_m1": True,
    }
    assert rig.told == ["drain W1 5", "changed", "forget W1"]
    assert local == ["up 120", "down everywhere=False"]
    assert read_membership(home / "cluster") is None
    assert not (home / "keys" / "ray.token").exists()
    assert "this machine is no longer W1" in ran.err


def test_leave_without_m1_needs_force(
    hcna: Hcna, rig: GateRig, home: Path, local: list[str]
) -> None:
    hcna("join", rig.code())
    rig.gate.stop()

    ran = hcna("leave")
    assert ran.code == 3
    assert "hcna leave --force" in ran.err
    assert read_membership(home / "cluster") is not None
    assert local == ["up 120"]

    ran = hcna("leave", "--force")
    assert ran.code == 0
    assert "M1 still lists it. Next: hcna leave W1 --force, on M1's machine" in ran.err
    assert read_membership(home / "cluster") is None


def test_leave_where_m1_has_forgotten_already(hcna: Hcna, rig: GateRig, home: Path) -> None:
    hcna("join", rig.code())
    remove_member(rig.settings.cluster_dir, "W1")

    assert hcna("leave").code == 0
    assert read_membership(home / "cluster") is None


@pytest.mark.parametrize("words", [(), ("W9",)])
def test_leave_what_was_not_joined(hcna: Hcna, home: Path, words: tuple[str, ...]) -> None:
    ran = hcna("leave", *words)

    assert ran.code == (4 if words else 2)
    assert "Next: hcna" in ran.err


def test_leave_with_another_name(hcna: Hcna, rig: GateRig) -> None:
    hcna("join", rig.code())

    assert "this machine is W1. Next: hcna leave" in hcna("leave", "W2").err


def test_the_owner_of_m1_removes_a_member(
    hcna: Hcna, rig: GateRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.join("gone")
    rig.join("also-gone")
    ensure_owner_key(rig.settings.keys_dir, now=0.0)
    # The settings in force are those of the gate, whatever a shell says.
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HCNA_PORTS__GATE", str(rig.settings.ports.gate))
    on(rig.settings.home, monkeypatch)
    runs_here(rig.settings.run_dir)
    rig.told.clear()

    assert "joined as W9 (joined: W1, W2)" in hcna("leave", "W9").err
    ran = hcna("leave", "W1", "--drain", "3", "--json")
    assert ran.json == {"name": "W1", "drained": True, "running": 0, "forgotten": True}
    assert rig.told == ["drain W1 3", "changed", "forget W1"]
    assert hcna("leave", "W2", "--force").code == 0
    assert rig.told[3:] == ["changed", "forget W2"]


def test_a_member_is_removed_while_m1_is_down(
    hcna: Hcna, rig: GateRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.join("gone")
    on(rig.settings.home, monkeypatch)

    ran = hcna("leave", "W1")

    assert "W1 is removed; M1 was down" in ran.err
    assert read_members(rig.settings.cluster_dir) == ()


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor_on_a_member(hcna: Hcna, rig: GateRig, home: Path) -> None:
    hcna("join", rig.code())
    runs_here(home / "run")

    ran = hcna("doctor", "--json")

    assert ran.code == 0, ran.err
    assert ran.json["role"] == "worker"
    assert ran.json["ok"] is True
    assert "23520:23521,23523,23900:24499" in ran.json["firewall"][0]
    assert ran.json["closing"] == []


def test_doctor_prints_what_a_firewall_needs(
    hcna: Hcna, rig: GateRig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hcna("join", rig.code())
    runs_here(home / "run")
    membership = read_membership(home / "cluster")
    assert membership is not None
    write_membership(home / "cluster", membership)
    rig.gate.settings = rig.settings.model_copy(
        update={"ports": rig.settings.ports.model_copy(update={"gcs": 6380})}
    )

    ran = hcna("doctor")

    assert ran.code == 5
    assert "✗ ports to M1" in ran.err
    assert "a check failed: ports to M1" in ran.err
    assert [line.split()[1] for line in ran.out.splitlines()[1:]] == ["ufw", "firewall-cmd", "nft"]


def test_doctor_ends_with_what_closes_rays_ports(hcna: Hcna, rig: GateRig, home: Path) -> None:
    hcna("join", rig.code())
    runs_here(home / "run")
    told = {"mode": "auto", "table": None, "let_in": ["10.0.0.1"], "trouble": "no root"}
    write_state(home / "run", {"firewall": told})

    ran = hcna("doctor")

    assert ran.code == 0, ran.err
    assert "Ray's ports are open to whoever reaches this machine: no root" in ran.err
    first, *commands = ran.out.splitlines()
    assert "again when a machine joins, moves or leaves" in first
    assert commands == [f"  {one}" for one in hcna("doctor", "--json").json["closing"]]
    assert commands[0].startswith("  sudo ")


def test_doctor_on_a_machine_of_nobody(hcna: Hcna, home: Path) -> None:
    ran = hcna("doctor", "--json")

    assert ran.code == 5
    assert ran.json["role"] == "head"
    assert "✗ supervisor does not run fix hcna up" in ran.err


# -- invite ----------------------------------------------------------------------------------------


def test_invite_makes_lists_and_revokes_codes(
    hcna: Hcna, rig: GateRig, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(rig.settings.home, monkeypatch)
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    made = hcna("invite", "--lifetime", "30m", "--name", "W4", "--json").json
    plain = hcna("invite")

    assert made["state"] == "open"
    assert made["expires_at"] - made["created_at"] == 1800
    assert plain.out.startswith("hcna join HCNA-")
    assert "nobody can join yet: hcna up" in plain.err
    listed = hcna("invite", "list").out
    assert f"{made['id']}  open" in listed
    assert "0/1 used  W4" in listed

    revoked = hcna("invite", "revoke", made["id"], "--json").json
    assert revoked["state"] == "revoked"
    assert [each["state"] for each in hcna("invite", "list", "--json").json] == ["revoked", "open"]
    assert made["code"] not in (rig.settings.cluster_dir / "invites.json").read_text()


def test_invite_with_no_end_of_uses(
    hcna: Hcna, rig: GateRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(rig.settings.home, monkeypatch)
    hcna("invite", "--uses", "0")

    assert "any number of uses" in hcna("invite", "list").out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--lifetime", "soon"), 2, "is no length of time"),
        (("--lifetime", "60d"), 2, "1 second to 30 days"),
        (("--uses", "2", "--name", "W2"), 2, "a join code for one name has one use"),
        (("revoke", "nobody"), 4, "there is no code with id nobody"),
    ],
)
def test_invite_refuses(
    hcna: Hcna, home: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    ran = hcna("invite", *words)

    assert ran.code == code
    assert says in ran.err
    assert "Next: hcna invite" in ran.err


def test_codes_are_made_by_m1_alone(hcna: Hcna, rig: GateRig) -> None:
    hcna("join", rig.code())

    ran = hcna("invite")

    assert ran.code == 4
    assert "this machine is W1; join codes are made by M1. Next: hcna invite, on 127" in ran.err


def test_there_are_no_codes_yet(hcna: Hcna, home: Path) -> None:
    ran = hcna("invite", "list")

    assert (ran.code, ran.out) == (0, "")
    assert json.loads(hcna("invite", "list", "--json").out) == []


def test_lengths_of_time() -> None:
    assert [parse_lifetime(text) for text in ("90", "90s", "1.5m", "1h", "2d")] == [
        90,
        90,
        90,
        3600,
        172800,
    ]
    with pytest.raises(UsageProblem):
        parse_lifetime("h")

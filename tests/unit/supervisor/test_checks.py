from __future__ import annotations

import errno
import os
import resource
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hcna_ray.config import GIB, MIB, ConfigError, Settings, load_settings
from hcna_ray.durable import make_private_dir
from hcna_ray.security.authority import Node
from hcna_ray.security.keys import ensure_owner_key
from hcna_ray.supervisor import checks
from hcna_ray.supervisor.checks import (
    Check,
    JoinChecks,
    ask_members,
    check_disk,
    check_home,
    choose_source,
    documented_ports,
    existing,
    firewall_command,
    firewall_tool,
    head_checks,
    judge_address,
    judge_certificate,
    judge_clock,
    judge_disk,
    judge_entrance,
    judge_files,
    judge_firewall,
    judge_member,
    judge_memory,
    judge_name,
    judge_ports_in,
    judge_ports_out,
    judge_ray_settings,
    judge_shared_memory,
    judge_versions,
    listener_of,
    machine_checks,
    member_checks,
    parse_reach,
)
from hcna_ray.supervisor.gate import MemberBeat
from hcna_ray.supervisor.gate_protocol import GateRefused, Versions
from hcna_ray.supervisor.membership import Membership, remove_member, write_membership
from hcna_ray.supervisor.node_certs import ensure_m1_node
from hcna_ray.supervisor.processes import identify
from hcna_ray.supervisor.reach import Listeners, Reach, explain, try_port
from hcna_ray.supervisor.rounds import Round
from hcna_ray.supervisor.state import write_state, write_supervisor
from tests.support.gates import GateRig, answering, free_port, membership_of, serving

HERE = Versions(python="3.11.7", ray="2.60.0", hcna_ray="0.1.0")
ENV = {"HCNA_PORTS__OFFSET": "13500", "HCNA_LIMITS__DISK_FREE_BYTES_MIN": "0"}
OK, REFUSED, TIMEOUT = Reach("ok"), Reach("refused"), Reach("timeout")


def by_id(found: list[Check]) -> dict[str, Check]:
    return {check.id: check for check in found}


@contextmanager
def occupying(port: int) -> Iterator[int]:
    """Listen as some other program would, and never answer; yields the port."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        yield int(other.getsockname()[1])


# -- judgements ------------------------------------------------------------------------------------


def test_the_address_is_that_of_the_route() -> None:
    check = judge_address("10.0.0.7", "10.0.0.7", "10.0.0.1")

    assert (check.level, check.found) == ("ok", "10.0.0.7 to M1 at 10.0.0.1")
    assert judge_address("127.0.0.1", "127.0.0.1", "127.0.0.1").level == "warn"


def test_an_address_that_is_translated_is_named_with_the_other() -> None:
    check = judge_address("192.168.1.7", "10.0.0.254", "10.0.0.1")

    assert not check.ok
    assert "from 192.168.1.7, but M1 sees 10.0.0.254" in check.found
    assert "--address" in check.fix


def test_a_name() -> None:
    assert judge_name("W2", None).found == "W2 is free for this machine"
    taken = judge_name(None, {"message": "W1 is taken by host-a at 10.0.0.7"})
    assert (taken.level, taken.found) == ("fail", "W1 is taken by host-a at 10.0.0.7")
    assert "--name" in taken.fix


@pytest.mark.parametrize(
    ("skew_s", "level", "found"),
    [
        (0.4, "ok", "0.4 s ahead of M1's"),
        (-1.9, "ok", "1.9 s behind M1's"),
        (2.1, "warn", "2.1 s ahead of M1's"),
        (-60.1, "fail", "60.1 s behind M1's"),
        (600.0, "fail", "600.0 s ahead of M1's"),
    ],
)
def test_the_clock(skew_s: float, level: str, found: str) -> None:
    check = judge_clock(skew_s)

    assert (check.level, check.found) == (level, found)
    assert (check.fix != "") == (level != "ok")


def test_versions() -> None:
    same = judge_versions(HERE, replace(HERE, python="3.11.9"))
    other = judge_versions(HERE, Versions(python="3.12.1", ray="2.61.0", hcna_ray="0.2.0"))

    assert [check.level for check in same] == ["ok"] * 3
    assert same[0].found == "3.11.7 (M1: 3.11.9)"
    assert [(check.id, check.level) for check in other] == [
        ("python", "fail"),
        ("ray", "fail"),
        ("hcna-ray", "fail"),
    ]
    assert other[0].fix == "uv tool install --python 3.12 hcna-ray==0.2.0"


def test_settings_of_ray() -> None:
    assert judge_ray_settings("a", "a").ok
    assert not judge_ray_settings("a", "b").ok


def test_ports_to_m1() -> None:
    reached = {"gcs": (6379, OK), "raylet": (10010, OK)}

    def judge(more: dict[str, tuple[int, Reach]], host: str = "10.0.0.1") -> Check:
        return judge_ports_out(host, reached | more, gate="10.0.0.1", documented=[(6379, 6379)])

    assert judge({}).found == "10.0.0.1: 6379, 10010"
    blocked = judge({"raylet": (10010, TIMEOUT)})
    assert "10010: no answer (a firewall drops it" in blocked.found
    assert blocked.fix.startswith("on M1's machine: sudo ufw allow")
    refused = judge({"raylet": (10010, REFUSED)})
    assert "hcna status" in refused.fix
    rejected = judge({"processes": (10399, REFUSED)})
    assert rejected.fix.startswith("on M1's machine: sudo ufw allow"), "M1 did listen there"
    elsewhere = judge({"gcs": (6379, TIMEOUT), "raylet": (10010, TIMEOUT)}, host="192.168.5.5")
    assert "node_address: 10.0.0.1" in elsewhere.fix


def test_ports_from_m1() -> None:
    def judge(reached: dict[int, Reach], taken: dict[int, str] | None = None) -> Check:
        return judge_ports_in(
            "10.0.0.7", "10.0.0.1", reached, taken or {}, documented=[(1, 2), (5, 5)], tool="nft"
        )

    assert judge({10020: OK, 10021: OK}).found == "10.0.0.7: 10020, 10021"
    blocked = judge({10020: TIMEOUT, 10021: TIMEOUT, 10999: OK})
    assert blocked.found.startswith("M1 at 10.0.0.1 cannot reach 10.0.0.7: 10020, 10021: no answer")
    assert blocked.fix == (
        "on this machine: sudo nft insert rule inet filter input ip saddr 10.0.0.1 "
        "tcp dport '{ 1-2, 5 }' accept"
    )
    taken = judge({}, {10020: "postgres (pid 7)"})
    assert taken.found == "in use on this machine: 10020 by postgres (pid 7)"
    assert "sport = :10020" in taken.fix


def test_disk_memory_and_limits() -> None:
    assert judge_disk("/x", 5 * GIB, GIB).found == "5.0 GB free in /x"
    assert judge_disk("/x", 100 * MIB, GIB).found == "100 MB free in /x; 1.0 GB are needed"
    assert [judge_memory(available, 8 * GIB).level for available in (3 * GIB, GIB, GIB - 1)] == [
        "ok",
        "warn",
        "fail",
    ]
    assert [judge_shared_memory(free).level for free in (None, GIB, 100 * MIB, MIB)] == [
        "warn",
        "ok",
        "warn",
        "fail",
    ]
    assert [judge_files(limit).level for limit in (resource.RLIM_INFINITY, 65536, 4096, 256)] == [
        "ok",
        "ok",
        "warn",
        "fail",
    ]


def test_how_a_member_is() -> None:
    beat = MemberBeat(
        name="W1",
        node_id="HCNA-W1",
        hostname="attic",
        address="10.0.0.7",
        joined_at=0.0,
        last_beat_at=5.0,
        last_beat_age_s=1.5,
        clock_skew_s=0.1,
        same_ray_settings=True,
    )

    assert judge_member(beat).found == "attic at 10.0.0.7: heard 1.5 s ago"
    asleep = judge_member(replace(beat, last_beat_age_s=90.0))
    assert (asleep.level, asleep.found) == ("warn", "attic at 10.0.0.7: last heard 90 s ago")
    silent = judge_member(replace(beat, last_beat_at=None, last_beat_age_s=None))
    assert "not heard since M1 started" in silent.found
    assert judge_member(replace(beat, same_ray_settings=False)).level == "fail"
    assert judge_member(replace(beat, clock_skew_s=-5.0)).level == "warn"
    assert judge_member(replace(beat, clock_skew_s=None)).level == "ok"
    behind = judge_member(replace(beat, round=1), Round(number=2))
    assert (behind.level, "logs/supervisor.log of " in behind.fix) == ("warn", True)
    assert judge_member(replace(beat, round=2), Round(number=2)).level == "ok"
    assert judge_member(replace(beat, round=1), Round(number=2, pending=True)).level == "ok"


# -- firewalls -------------------------------------------------------------------------------------


def test_what_to_type_for_each_firewall(tmp_path: Path) -> None:
    ports = documented_ports(load_settings(home=tmp_path, env={}), "worker")

    assert ports == [(10020, 10021), (10023, 10023), (10400, 10999)]
    assert firewall_command(ports, "ufw", "10.0.0.1") == (
        "sudo ufw allow proto tcp from 10.0.0.1 to any port 10020:10021,10023,10400:10999"
    )
    assert firewall_command(ports, "firewall-cmd") == (
        "sudo firewall-cmd --permanent --add-port=10020-10021/tcp --add-port=10023/tcp "
        "--add-port=10400-10999/tcp && sudo firewall-cmd --reload"
    )
    assert firewall_command([(1, 1)], "nft") == (
        "sudo nft insert rule inet filter input tcp dport '{ 1 }' accept"
    )
    assert firewall_command([(1, 1)], None).startswith("sudo ufw")


def test_the_ports_of_m1(tmp_path: Path) -> None:
    ports = documented_ports(load_settings(home=tmp_path, env={}), "head")

    assert ports == [
        (6379, 6379),
        (10010, 10011),
        (10013, 10013),
        (10040, 10040),
        (10200, 10399),
    ]


def test_whether_rays_ports_are_closed() -> None:
    closed = {"mode": "auto", "table": "hcna_1", "let_in": ["10.0.0.2", "10.0.0.3"], "trouble": ""}

    assert judge_firewall(closed).level == "ok"
    assert "table inet hcna_1 lets 2 other addresses in" in judge_firewall(closed).found
    assert judge_firewall({"mode": "off", "trouble": ""}).level == "ok"
    still_open = judge_firewall(closed | {"table": None, "trouble": "hcna is not root here"})
    assert still_open.level == "warn"
    assert still_open.found.endswith("whoever reaches this machine: hcna is not root here")


def test_which_firewall_there_is() -> None:
    assert firewall_tool({"nft": "/sbin/nft"}.get) == "nft"
    assert firewall_tool({"nft": "/sbin/nft", "ufw": "/sbin/ufw"}.get) == "ufw"
    assert firewall_tool({}.get) is None


# -- this machine ----------------------------------------------------------------------------------


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=8 * GIB, total=16 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(
        checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * GIB, total=99 * GIB)
    )
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (1024, 1048576))


@pytest.mark.usefixtures("roomy")
def test_a_good_machine_passes_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "a" / "home", env={})

    found = list(machine_checks(settings))

    assert [(check.id, check.level) for check in found] == [
        ("home", "ok"),
        ("disk", "ok"),
        ("memory", "ok"),
        ("shared memory", "ok"),
        ("open files", "ok"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = load_settings(home=tmp_path, env={"HCNA_LIMITS__DISK_FREE_BYTES_MIN": str(1024 * GIB)})
    if check_disk(full).ok:
        pytest.skip("this disk has a terabyte to spare")

    assert "1024.0 GB are needed" in check_disk(full).found


@pytest.mark.parametrize(
    ("number", "says", "fix"),
    [
        (errno.EACCES, "Permission denied", "sudo chown"),
        (errno.EROFS, "Read-only file system", "HCNA_HOME"),
        (errno.ENOSPC, "No space left", "make room"),
    ],
)
def test_a_home_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str, fix: str
) -> None:
    def refuse(dir: Path) -> Any:
        raise OSError(number, os.strerror(number), str(dir))

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    check = check_home(load_settings(home=tmp_path / "home", env={}))

    assert not check.ok
    assert f"{tmp_path} cannot be written: {says}" in check.found
    assert fix in check.fix


def test_a_home_without_permission() -> None:
    # Not below pytest's directory, which root keeps to itself.
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        home.chmod(0o755)
        (home / "cluster").mkdir(mode=0o500)
        settings = load_settings(home=home, env={})
        if root := os.geteuid() == 0:  # Who may write everywhere, so for once is somebody else.
            os.seteuid(65534)
        try:
            found = check_home(settings).found
        finally:
            if root:
                os.seteuid(0)

    assert "cannot be written" in found


def test_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
    assert existing(Path("relative/nowhere")) == Path()


def test_who_holds_a_port() -> None:
    with occupying(0) as port:
        found = listener_of(port)

    assert f"(pid {os.getpid()})" in found
    assert listener_of(free_port()) == "another program"


# -- ports -----------------------------------------------------------------------------------------


def test_what_a_failed_connection_means() -> None:
    assert explain(TimeoutError()).verdict == "timeout"
    assert explain(OSError(errno.ETIMEDOUT, "x")).verdict == "timeout"
    assert explain(OSError(errno.EHOSTUNREACH, "No route to host")).verdict == "no_route"
    assert str(explain(OSError(errno.ENETUNREACH, "away"))) == "no route (away)"
    assert str(explain(OSError(errno.EMFILE, "too many"))) == "too many"
    assert try_port("127.0.0.1", free_port(), timeout_s=5) == REFUSED


def test_a_listener_is_told_from_another_program() -> None:
    with answering(lambda connection: connection.sendall(b"SSH-2.0")) as port:
        assert try_port("127.0.0.1", port, timeout_s=5).ok
        assert try_port("127.0.0.1", port, timeout_s=5, word="w").detail == "something else answers"


def test_a_program_that_says_nothing_is_not_waited_for() -> None:
    with occupying(0) as port:
        assert try_port("127.0.0.1", port, timeout_s=0.02, word="w") == TIMEOUT


def test_listeners_leave_out_what_is_taken() -> None:
    free = free_port()
    with occupying(0) as taken:
        with Listeners([taken, free], "w") as listeners:
            assert (listeners.opened, listeners.taken) == ((free,), (taken,))
            for _ in range(3):
                assert try_port("127.0.0.1", free, timeout_s=5, word="w").ok
        listeners.close()
    assert try_port("127.0.0.1", free, timeout_s=5) == REFUSED


def test_what_m1_says_of_a_port() -> None:
    assert parse_reach({"verdict": "ok", "detail": ""}).ok
    assert parse_reach({"verdict": "strange"}).verdict == "other"
    assert parse_reach("nonsense") == Reach("other", "M1 could not say why")


# -- against an M1 ---------------------------------------------------------------------------------


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[GateRig]:
    with serving(tmp_path / "m1", env=ENV) as made:
        yield made


@pytest.fixture
def head(rig: GateRig) -> Iterator[None]:
    """What listens where M1's Ray would."""
    names = ("gcs", "head_node_manager", "head_object_manager", "head_agent_grpc")
    with Listeners([rig.settings.port(name) for name in names], "", host="127.0.0.1") as listeners:
        assert not listeners.taken
        yield


@pytest.fixture
def mine(tmp_path: Path) -> Settings:
    """Settings of the machine that joins, which knows nothing of M1's ports."""
    return load_settings(home=tmp_path / "w", env={})


def run(rig: GateRig, mine: Settings, authorization: str, **options: Any) -> dict[str, Check]:
    channel = rig.channel()
    try:
        machine = JoinChecks(mine, channel, authorization=authorization, **options)
        return by_id(list(machine.run()))
    finally:
        channel.close()


@pytest.mark.usefixtures("roomy", "head")
def test_a_machine_that_may_join(rig: GateRig, mine: Settings) -> None:
    found = run(rig, mine, rig.invitation())

    assert list(found) == [
        "address",
        "name",
        "ports to M1",
        "ports from M1",
        "clock",
        "python",
        "ray",
        "hcna-ray",
        "ray settings",
        "home",
        "disk",
        "memory",
        "shared memory",
        "open files",
    ]
    assert {name for name, check in found.items() if check.level != "ok"} == {"address"}
    assert "23520, 23521" in found["ports from M1"].found, "M1 decides about ports"
    assert "23899" in found["ports to M1"].found, "M1 opened one for the check"
    assert not mine.home.exists()


@pytest.mark.usefixtures("roomy")
def test_a_port_in_use_is_named_with_who_uses_it(rig: GateRig, mine: Settings) -> None:
    with occupying(23520):
        found = run(rig, mine, rig.invitation())
        live = run(rig, mine, rig.invitation(), live=True)

    assert f"23520 by {psutil.Process().name()} (pid {os.getpid()})" in found["ports from M1"].found
    assert live["ports from M1"].ok, "on a machine at work its own ports are in use"
    assert "19879, 23510, 23511, 23513: refused" in found["ports to M1"].found


@pytest.mark.usefixtures("roomy", "head")
def test_a_wrong_clock_and_other_versions(rig: GateRig, mine: Settings) -> None:
    rig.gate.versions = Versions(python="3.13.0", ray="2.61.0", hcna_ray="0.1.0")
    rig.ahead_s = 600
    found = run(rig, mine, rig.invitation())

    failed = {name for name, check in found.items() if not check.ok}
    assert failed == {"clock", "python", "ray"} or failed == {"clock", "python", "ray", "hcna-ray"}
    assert "600.0 s behind M1's" in found["clock"].found


@pytest.mark.usefixtures("roomy")
def test_settings_of_another_version(
    rig: GateRig, mine: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hcna_ray.supervisor.gate.shared_part", lambda settings: {"ports": {"moon": 1}}
    )
    found = run(rig, mine, rig.invitation())

    assert "unknown field ports.moon" in found["settings"].found
    assert "ports to M1" not in found


def test_a_code_that_is_not_valid_ends_the_checks(rig: GateRig, mine: Settings) -> None:
    with pytest.raises(GateRefused, match="does not know this join code"):
        run(rig, mine, "Invite " + "0" * 32)


# -- doctor ----------------------------------------------------------------------------------------


def supervised(settings: Settings) -> None:
    """Have this process pass for the supervisor."""
    me = identify(os.getpid())
    assert me is not None
    make_private_dir(settings.run_dir)
    write_supervisor(settings.run_dir, me)
    member = {"pid": me.pid, "started_ticks": me.started_ticks, "port": 1, "restarts": 0}
    write_state(
        settings.run_dir,
        {"members": {"head": member | {"up": True}, "edge": member | {"up": False}}},
    )


@pytest.fixture
def joined(rig: GateRig, mine: Settings) -> Membership:
    membership = membership_of(rig.join())
    write_membership(mine.cluster_dir, membership)
    return membership


@pytest.mark.usefixtures("roomy", "head")
def test_doctor_on_a_member(rig: GateRig, mine: Settings, joined: Membership) -> None:
    supervised(mine)

    found = by_id(list(member_checks(mine, joined)))

    assert {name for name, check in found.items() if not check.ok} == set()
    assert found["M1"].found == "answers at 127.0.0.1"
    assert found["name"].found == "this machine is W1"


@pytest.mark.usefixtures("roomy")
def test_doctor_on_a_member_whose_m1_is_away(
    rig: GateRig, mine: Settings, joined: Membership
) -> None:
    rig.gate.stop()

    found = by_id(list(member_checks(mine, joined)))

    assert {name for name, check in found.items() if not check.ok} == {"supervisor", "M1"}
    assert "refused" in found["M1"].found
    assert found["disk"].ok, "the machine itself is looked at nevertheless"


@pytest.mark.usefixtures("roomy")
def test_doctor_on_a_member_that_was_removed(
    rig: GateRig, mine: Settings, joined: Membership
) -> None:
    remove_member(rig.settings.cluster_dir, "W1")

    found = by_id(list(member_checks(mine, joined)))

    assert "does not know this machine" in found["M1"].found
    assert "hcna leave" in found["M1"].fix


@pytest.mark.usefixtures("roomy")
def test_doctor_on_m1_that_is_down(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, env={"HCNA_PORTS__OFFSET": "13500"})
    with occupying(settings.port("gcs")):
        found = by_id(list(head_checks(settings)))

    assert found["supervisor"].fix == "hcna up"
    assert f"{settings.port('gcs')} by" in found["ports"].found
    assert by_id(list(head_checks(settings)))["ports"].ok


@pytest.mark.parametrize(
    ("listen", "tls", "level", "words", "asked"),
    [
        ("127.0.0.1", False, "ok", "this machine alone", False),
        ("127.0.0.1", True, "ok", "this machine alone", False),
        ("0.0.0.0", True, "ok", "at https://m1.lab:8080 (port 8080/tcp, TLS)", True),
        ("0.0.0.0", False, "fail", "in clear", False),
    ],
)
def test_doctor_names_the_entrance_for_others(
    tmp_path: Path, listen: str, tls: bool, level: str, words: str, asked: bool
) -> None:
    env = {"HCNA_COMPOSITE__LISTEN_ADDRESS": listen}
    env["HCNA_COMPOSITE__SECURITY__ENABLE_TLS"] = str(tls).lower()
    settings = load_settings(home=tmp_path, env=env)

    check = judge_entrance(settings, "m1.lab")

    assert (check.level, words in check.found) == (level, True), check
    assert ((8080, 8080) in documented_ports(settings, "head")) == asked
    assert (8080, 8080) not in documented_ports(settings, "worker")


@pytest.mark.usefixtures("roomy", "head")
def test_doctor_on_m1(rig: GateRig) -> None:
    settings = rig.settings
    ensure_owner_key(settings.keys_dir, now=0.0)
    supervised(settings)
    answer = rig.join()
    rig.post("/v1/beat", f"Member {answer['member_token']}", time=0.0)

    found = by_id(list(head_checks(settings)))

    assert found["address"].ok
    assert found["processes"].found == "not up: edge"
    assert not found["C1"].ok
    assert "runs Ray with other settings" in found["member W1"].found
    assert [beat.name for beat in ask_members(settings)] == ["W1"]

    rig.gate.stop()
    found = by_id(list(head_checks(settings)))
    assert "does not answer" in found["gate"].found
    assert "(gate): refused" in found["address"].found


@pytest.mark.usefixtures("roomy")
def test_doctor_on_m1_whose_address_is_not_its_own(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, env={"HCNA_RAY__NODE_ADDRESS": "10.255.255.1"})
    supervised(settings)

    check = by_id(list(head_checks(settings)))["address"]

    assert not check.ok
    assert "10.255.255.1, which is no address of this machine" in check.found


def test_the_address_to_talk_from() -> None:
    assert choose_source(None, ["127.0.0.1"], 1) is None
    assert choose_source("127.0.0.1", ["127.0.0.1"], 1) == "127.0.0.1"
    with pytest.raises(ConfigError) as caught:
        choose_source("10.255.255.1", ["127.0.0.1"], 1)
    assert caught.value.message.startswith("10.255.255.1 is no address of this machine (own: ")
    assert caught.value.message.endswith("the route to M1 starts at 127.0.0.1 (lo)")


@pytest.mark.parametrize(
    ("left", "level", "word"),
    [
        (timedelta(days=60), "ok", "good until"),
        (timedelta(days=9), "warn", "renewed"),
        (timedelta(days=-1), "fail", "only"),
    ],
)
def test_a_certificate_is_good_for_a_while(left: timedelta, level: str, word: str) -> None:
    now = datetime(2026, 11, 21, tzinfo=UTC)

    found = judge_certificate(now + left, now)

    assert (found.level, bool(found.fix)) == (level, level != "ok")
    assert word in found.found
    assert judge_certificate(None, now).level == "ok"


def test_doctor_looks_at_the_certificate(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, env={})
    assert by_id(list(head_checks(settings)))["certificate"].level == "ok"
    ensure_m1_node(settings, now=datetime.now(UTC))
    assert "good until" in by_id(list(head_checks(settings)))["certificate"].found
    Node.of(settings.cluster_dir).pem.write_text("nonsense")

    broken = by_id(list(head_checks(settings)))["certificate"]

    assert (broken.level, broken.fix) == ("fail", "hcna down && hcna up makes it")

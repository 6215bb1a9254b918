"""Who may reach which port: the rules, the commands for people, and when they are set anew."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.config import Settings, load_settings
from hcna_ray.supervisor import control
from hcna_ray.supervisor.daemon import Bootstrap, Supervisor
from hcna_ray.supervisor.firewall import (
    FILE_NAME,
    OF_NODES,
    RANGES,
    Firewall,
    FirewallRefused,
    Peers,
    PortPlan,
    addresses_of,
    by_hand,
    commands_for,
    joined,
    manager_here,
    port_plan,
    reach_of,
    removal,
    rules,
    table_of,
    why_not,
    words_on_open_ports,
)
from hcna_ray.supervisor.gate_client import origin_of
from hcna_ray.supervisor.membership import Membership
from hcna_ray.supervisor.state import write_state
from tests.support.gates import GateRig, serving

LOG = logging.getLogger("tests.firewall")
MEMBERS = addresses_of(["10.0.0.3", "10.0.0.2", "2001:db8::2"])


def settings_of(home: Path, **env: str) -> Settings:
    return load_settings(home=home, env=env)


def numbers(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {port for first, last in ranges for port in range(first, last + 1)}


# -- the plan --------------------------------------------------------------------------------------


def test_m1_offers_its_gate_to_everybody_and_ray_to_members(tmp_path: Path) -> None:
    plan = port_plan(settings_of(tmp_path), "head")

    assert plan.everybody == ((10040, 10040),)
    assert plan.members == (
        (6379, 6379),
        (10010, 10011),
        (10013, 10013),
        (10020, 10021),
        (10023, 10023),
        (10200, 10999),
    )


def test_a_worker_offers_nothing_to_everybody(tmp_path: Path) -> None:
    plan = port_plan(settings_of(tmp_path, HCNA_PORTS__OFFSET="1000"), "worker")

    assert plan.everybody == ()
    assert plan.members == ((11020, 11021), (11023, 11023), (11400, 11999))
    assert plan.ours == ((10443, 10443), (11020, 11025), (11400, 11999))


def test_every_port_of_the_instance_is_ours(tmp_path: Path) -> None:
    """A port that somebody adds to the settings is closed until it is said for whom it is."""
    settings = settings_of(tmp_path, HCNA_PORTS__OFFSET="2000")
    plan = port_plan(settings, "head")

    assert numbers(plan.ours) == {port for _, port in settings._ports()}
    assert numbers(plan.members) < numbers(plan.ours)
    assert numbers(plan.everybody) < numbers(plan.ours)
    assert not numbers(plan.members) & numbers(plan.everybody)
    assert {name.removesuffix("_min") for name in type(settings.ports).model_fields} >= {
        *RANGES,
        *OF_NODES["head"],
        *OF_NODES["worker"],
    }


def test_pages_of_figures_and_jobs_are_for_nobody() -> None:
    for name in (
        "dashboard",
        "head_agent_http",
        "worker_agent_http",
        "head_metrics_export",
        "worker_metrics_export",
        "autoscaler_metrics",
        "dashboard_metrics",
        "haproxy_stats",
        "haproxy_metrics",
        "replica_http",
        "serve_fallback_proxy",
        "serve_http",
    ):
        assert reach_of(name) == "nobody", name
    assert reach_of("gate") == "everybody"
    assert reach_of("gcs") == reach_of("worker_processes") == "members"


def test_c1s_edge_at_a_public_address_is_for_everybody(tmp_path: Path) -> None:
    public = {"HCNA_COMPOSITE__LISTEN_ADDRESS": "0.0.0.0"}
    tls = {"HCNA_COMPOSITE__SECURITY__ENABLE_TLS": "true"}
    edge = settings_of(tmp_path, **public, **tls)

    assert port_plan(edge, "head").everybody == ((8080, 8080), (10040, 10040))
    assert port_plan(edge, "worker").everybody == ()
    # Without TLS nothing is bound there, whoever forgets to refuse the start.
    for bound in (settings_of(tmp_path, **public), settings_of(tmp_path, **tls)):
        assert port_plan(bound, "head").everybody == ((10040, 10040),)


def test_ranges_are_joined() -> None:
    assert joined([(5, 6), (1, 1), (2, 3), (6, 9), (11, 11)]) == ((1, 3), (5, 9), (11, 11))
    assert joined([]) == ()


# -- addresses -------------------------------------------------------------------------------------


def test_only_addresses_of_other_machines_come_into_the_rules() -> None:
    told = ["10.0.0.2", "::ffff:10.0.0.2", "127.0.0.1", "::1", "0.0.0.0", "224.0.0.1"]
    told += ["fe80::1%eth0", "w2.local", "", "10.0.0.0/8", "10.0.0.1 } accept; {", "fd00::2"]

    assert [str(each) for each in addresses_of(told)] == ["10.0.0.2", "fd00::2"]


def test_a_member_lets_in_m1_and_the_others() -> None:
    membership = membership_with("192.0.2.1", "m1.local")
    names = {"m1.local": ["192.0.2.9", "2001:db8::9"]}
    asked: list[str] = []

    def resolve(name: str) -> Sequence[str]:
        asked.append(name)
        return names.get(name, ())

    peers = Peers(resolve)

    assert peers.of(membership, {}) == {"192.0.2.1", "192.0.2.9", "2001:db8::9"}
    # M1 has moved, and there are others.
    facts: dict[str, Any] = {
        "ray_address": "192.0.2.77:6379",
        "m1_addresses": ["192.0.2.78"],
        "peers": ["192.0.2.20", "192.0.2.21", "w9.local"],
    }
    assert peers.of(membership, facts) >= {"192.0.2.77", "192.0.2.78", "192.0.2.20", "192.0.2.21"}
    assert asked == ["m1.local"]
    peers.forget_names()
    names["m1.local"] = ["192.0.2.10"]
    assert "192.0.2.10" in peers.of(membership, {"peers": "nonsense"})


def membership_with(*m1_addresses: str) -> Membership:
    return Membership(
        name="W1",
        node_id="HCNA-W1--prod--home--v1.0",
        machine_id="1",
        member_token="t",
        m1_addresses=m1_addresses,
        gate_port=10040,
        ca_sha256="",
        ca_pem="",
        ray_address="192.0.2.1:6379",
        moderator_node_id="HCNA-M1--prod--home--v1.0",
        shared={},
        joined_at=0.0,
    )


# -- the rules -------------------------------------------------------------------------------------


def test_the_rules_are_these() -> None:
    plan = PortPlan(everybody=((4, 4),), members=((1, 2),), ours=((1, 5),))

    assert rules("hcna_x", plan, MEMBERS) == (
        "# Written by the supervisor of hcna-ray; changes here are lost.\n"
        "add table inet hcna_x\n"
        "delete table inet hcna_x\n"
        "table inet hcna_x {\n"
        "    set for_everybody {\n"
        "        type inet_service\n"
        "        flags interval\n"
        "        elements = { 4 }\n"
        "    }\n"
        "    set for_members {\n"
        "        type inet_service\n"
        "        flags interval\n"
        "        elements = { 1-2 }\n"
        "    }\n"
        "    set ours {\n"
        "        type inet_service\n"
        "        flags interval\n"
        "        elements = { 1-5 }\n"
        "    }\n"
        "    set members4 {\n"
        "        type ipv4_addr\n"
        "        elements = { 10.0.0.2, 10.0.0.3 }\n"
        "    }\n"
        "    set members6 {\n"
        "        type ipv6_addr\n"
        "        elements = { 2001:db8::2 }\n"
        "    }\n"
        "    chain input {\n"
        "        type filter hook input priority filter; policy accept;\n"
        '        iif "lo" accept\n'
        "        ct state established ct direction reply accept\n"
        "        tcp dport @for_everybody accept\n"
        "        tcp dport @for_members ip saddr @members4 accept\n"
        "        tcp dport @for_members ip6 saddr @members6 accept\n"
        "        tcp dport @ours counter drop\n"
        "    }\n"
        "}\n"
    )


def test_no_other_table_is_named(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    table = table_of(settings)
    script = rules(table, port_plan(settings, "head"), ()) + removal(table)

    named = [line for line in script.splitlines() if "table" in line]
    assert {line.partition("inet ")[2].removesuffix(" {") for line in named} == {table}
    assert "flush" not in script
    assert table != table_of(settings_of(tmp_path / "other"))


# -- what people type ------------------------------------------------------------------------------


def test_what_to_type_with_nft(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)

    found = by_hand(settings, "head", MEMBERS, None)

    assert found == [f"sudo nft -f {tmp_path}/run/firewall.nft"]


def test_what_to_type_with_ufw(tmp_path: Path) -> None:
    found = by_hand(settings_of(tmp_path), "worker", MEMBERS[:1], "ufw")

    assert found == [
        "sudo ufw prepend allow proto tcp from 10.0.0.2 to any port 10020:10021,10023,10400:10999",
        "sudo ufw deny proto tcp from any to any port 9443,10020:10025,10400:10999",
    ]


def test_ufw_takes_fifteen_ports_at_once(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        **{f"HCNA_PORTS__{name.upper()}": str(20000 + 3 * n) for n, name in enumerate(SCATTERED)},
    )

    found = by_hand(settings, "head", (), "ufw")

    for command in found:
        ports = command.split()[-1].replace(":", ",").split(",")
        assert len(ports) <= 15, command
    denied = [command for command in found if "deny" in command]
    assert len(denied) > 1
    assert sum(len(command.split()[-1].split(",")) for command in denied) == len(
        port_plan(settings, "head").ours
    )


SCATTERED = (
    "gcs",
    "dashboard",
    "head_node_manager",
    "head_object_manager",
    "head_agent_http",
    "head_agent_grpc",
    "head_metrics_export",
    "worker_node_manager",
    "worker_object_manager",
    "serve_grpc",
    "gate",
)


def test_what_to_type_with_firewalld(tmp_path: Path) -> None:
    found = by_hand(settings_of(tmp_path), "head", MEMBERS, "firewalld")

    assert (
        'sudo firewall-cmd --permanent --add-rich-rule=\'rule priority="-20" '
        'family="ipv4" source address="10.0.0.2" port port="10010-10011" protocol="tcp" accept\''
    ) in found
    assert any('family="ipv6" source address="2001:db8::2"' in each for each in found)
    drops = [each for each in found if each.endswith("drop'")]
    assert all('priority="-10"' in each for each in drops)
    assert any('port="6379"' in each for each in drops)
    assert found[-1] == "sudo firewall-cmd --reload"


def test_what_manages_the_firewall(tmp_path: Path) -> None:
    config = tmp_path / "ufw.conf"
    programs = {"firewall-cmd": "/usr/bin/firewall-cmd", "ufw": "/usr/sbin/ufw"}

    def manager(state: int) -> str | None:
        return manager_here(programs.get, lambda command: state, config)

    assert manager(1) is None
    assert manager(0) == "firewalld"
    config.write_text("# ufw\nENABLED=no\n")
    assert manager(1) is None
    config.write_text("# ufw\nENABLED=yes\n")
    assert manager(0) == "ufw"


def test_open_ports_are_said_with_commands(tmp_path: Path) -> None:
    told = {"mode": "auto", "table": None, "let_in": ["10.0.0.2"], "trouble": "no root"}
    settings = settings_of(tmp_path)

    assert words_on_open_ports(told).endswith("whoever reaches this machine: no root")
    assert commands_for(settings, "head", told)
    for closed in ({}, {**told, "trouble": ""}, {**told, "mode": "off"}):
        assert words_on_open_ports(closed) == ""
        assert commands_for(settings, "head", closed) == []


# -- the shell -------------------------------------------------------------------------------------


class Nft:
    """Stands where nft is: keeps what it was given, and fails when it is told to."""

    def __init__(self) -> None:
        self.scripts: list[str] = []
        self.problem = ""
        self.table = ""

    def __call__(self, arguments: Sequence[str], script: str) -> str:
        if arguments[0] == "list":
            return "" if self.table else "No such file or directory"
        if not self.problem:
            self.scripts.append(script)
            self.table = script
        return self.problem

    def show(self, table: str) -> str:
        return self.table


def firewall(home: Path, nft: Nft, mode: str = "auto", why: str = "") -> Firewall:
    settings = settings_of(home, HCNA_RAY__FIREWALL=mode)
    return Firewall(settings, "head", LOG, nft=nft, show=nft.show, may=lambda: why)


def test_it_is_set_anew_only_when_somebody_else_is_let_in(tmp_path: Path) -> None:
    nft = Nft()
    one = firewall(tmp_path, nft)

    one.open_for(["10.0.0.2"])
    one.let_in(["10.0.0.2", "127.0.0.1"])
    assert len(nft.scripts) == 1
    one.let_in([])
    one.let_in(["10.0.0.3"])
    assert ["10.0.0.3" in each for each in nft.scripts] == [False, False, True]
    assert (tmp_path / "run" / FILE_NAME).read_text() == nft.scripts[-1]
    assert one.describe() == {
        "mode": "auto",
        "table": one.table,
        "let_in": ["10.0.0.3"],
        "trouble": "",
    }

    one.remove()
    one.remove()
    assert nft.scripts[-1] == removal(one.table)
    assert one.describe()["table"] is None


def test_what_somebody_flushed_is_set_again(tmp_path: Path) -> None:
    nft = Nft()
    one = firewall(tmp_path, nft)
    one.look_after()
    assert nft.scripts == []
    one.open_for(["10.0.0.2"])

    one.look_after()
    assert len(nft.scripts) == 1
    for left in ("", "table inet hcna {}"):  # Deleted, or there without its rules.
        nft.table = left
        one.look_after()
        one.look_after()
        assert nft.table == nft.scripts[0]
    assert nft.scripts == [nft.scripts[0]] * 3


def test_an_update_that_failed_once_is_made_up_for(tmp_path: Path) -> None:
    nft = Nft()
    one = firewall(tmp_path, nft)
    one.open_for(["10.0.0.2", "10.0.0.3"])

    nft.problem = "nft timed out"
    one.let_in(["10.0.0.3"])
    assert one.trouble == "nft timed out"
    assert words_on_open_ports(one.describe()).startswith("Ray's ports are open to the machines of")
    nft.problem = ""
    one.let_in(["10.0.0.3"])
    assert "10.0.0.2" in nft.table  # Not at every look, but once a minute.
    one.look_after()

    assert "10.0.0.2" not in nft.table
    assert "10.0.0.3" in nft.table
    assert one.trouble == ""
    one.look_after()
    assert len(nft.scripts) == 2


def test_rules_that_cannot_be_listed_are_set_again_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nft = Nft()
    one = firewall(tmp_path, nft)
    one._show = lambda table: ""
    one.open_for(["10.0.0.2"])
    one.look_after()
    assert len(nft.scripts) == 2
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_where_it_may_not_the_ports_stay_open_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nft = Nft()
    one = firewall(tmp_path, nft, why="hcna is not root here")

    one.open_for(["10.0.0.2"])
    one.let_in(["10.0.0.3"])
    one.look_after()
    one.remove()

    assert nft.scripts == []
    assert one.describe()["trouble"] == "hcna is not root here"
    assert [each.message for each in caplog.records] == ["Ray's ports are not closed"]
    # For whoever sets them by hand.
    assert "10.0.0.3" in (tmp_path / "run" / FILE_NAME).read_text()


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    nft = Nft()
    one = firewall(tmp_path, nft)
    nft.problem = "Error: Could not process rule: Operation not supported"
    one.open_for(["10.0.0.2"])
    assert "Operation not supported" in one.trouble

    nft.problem = ""
    one.let_in(["10.0.0.2"])
    assert nft.scripts == []  # Not at every look, but once a minute.
    one.look_after()
    assert len(nft.scripts) == 1
    assert one.trouble == ""


def test_on_means_that_it_must_be_possible(tmp_path: Path) -> None:
    with pytest.raises(FirewallRefused, match=r"ray\.firewall is on.*there is no nft"):
        firewall(tmp_path, Nft(), "on", "there is no nft").open_for([])
    firewall(tmp_path, Nft(), "on").open_for([])


def test_off_means_that_nothing_is_done(tmp_path: Path) -> None:
    nft = Nft()
    one = firewall(tmp_path, nft, "off")

    one.open_for(["10.0.0.2"])
    one.let_in([])
    one.look_after()
    one.remove()

    assert nft.scripts == []
    assert not (tmp_path / "run" / FILE_NAME).exists()
    assert one.describe()["mode"] == "off"


def test_off_takes_away_what_a_killed_supervisor_has_left(tmp_path: Path) -> None:
    nft = Nft()
    firewall(tmp_path, nft).open_for(["10.0.0.2"])
    one = firewall(tmp_path, nft, "off")

    one.open_for(["10.0.0.2"])

    assert nft.scripts[1:] == [removal(one.table)]


def test_a_bare_word_of_yaml_is_understood(tmp_path: Path) -> None:
    """YAML takes ``on`` and ``off`` without quotes for true and false."""
    for word in ("on", "off", "auto"):
        (tmp_path / "hcna.yaml").write_text(f"ray:\n  firewall: {word}\n")
        assert load_settings(home=tmp_path, env={}).ray.firewall == word


def test_who_may_set_rules(tmp_path: Path) -> None:
    status = tmp_path / "status"

    def reason(capabilities: str, program: str | None = "/usr/sbin/nft") -> str:
        status.write_text(f"Name:\tx\nCapPrm:\tffff\nCapEff:\t{capabilities}\n")
        return why_not(status, lambda: program)

    assert reason("0000000000001000") == ""
    assert "CAP_NET_ADMIN" in reason("0000000000000fff")
    assert "package nftables" in reason("0000000000001000", None)


# -- whom M1's gate lets in ------------------------------------------------------------------------


def test_the_gate_lets_in_who_shows_a_code_and_who_has_joined(tmp_path: Path) -> None:
    with serving(tmp_path) as rig:
        changed: list[frozenset[str]] = []
        rig.gate.origins_changed = lambda: changed.append(rig.gate.origins())
        invitation = rig.invitation()
        assert rig.gate.origins() == frozenset()

        assert refused(rig, "Invite nonsense")
        assert rig.gate.origins() == frozenset()
        rig.gate.handle("POST", "/v1/preflight", invitation, {}, "192.0.2.5")
        # Before the answer: the machine tries M1's ports as soon as it has it.
        assert changed == [frozenset({"192.0.2.5"})]
        rig.passed_s += 599
        assert rig.gate.origins() == {"192.0.2.5"}
        rig.passed_s += 2
        assert rig.gate.origins() == frozenset()


def test_the_gate_lets_in_members_where_they_are(tmp_path: Path) -> None:
    with serving(tmp_path) as rig:
        changed: list[frozenset[str]] = []
        answer = rig.join("one")
        rig.gate.origins_changed = lambda: changed.append(rig.gate.origins())
        token = f"Member {answer['member_token']}"
        rig.passed_s += 3600

        def beat(peer: str) -> Any:
            return rig.gate.handle("POST", "/v1/beat", token, {"time": 0}, peer)

        beat("192.0.2.7")
        assert changed[-1] == {"192.0.2.7"}
        assert beat("192.0.2.7")["peers"] == ["192.0.2.7"]
        assert len(changed) == 1
        beat("192.0.2.8")
        assert changed[-1] == {"192.0.2.8"}

        rig.gate.handle("POST", "/v1/preflight", token, {}, "192.0.2.8")
        rig.gate.handle("POST", "/v1/leave", token, {"forget": True}, "192.0.2.8")
        assert changed[-1] == frozenset()


def test_the_gate_lets_in_where_rays_connections_come_from(tmp_path: Path) -> None:
    """A machine that reached the gate over one network may talk to M1's Ray over another."""
    with serving(tmp_path) as rig:
        invitation = rig.invitation()
        body: dict[str, Any] = {"origin": "100.64.0.7"}
        rig.gate.handle("POST", "/v1/preflight", invitation, body, "192.0.2.5")
        assert rig.gate.origins() == {"192.0.2.5", "100.64.0.7"}

        token = f"Member {rig.join('one')['member_token']}"
        rig.passed_s += 3600
        told = rig.gate.handle("POST", "/v1/beat", token, {**body, "time": 0}, "192.0.2.5")
        assert rig.gate.origins() == {"192.0.2.5", "100.64.0.7"}
        assert told["peers"] == ["100.64.0.7", "192.0.2.5"]

        # What is no address is told, and comes into no rule.
        odd = {"origin": "0.0.0.0/0", "time": 0}
        rig.gate.handle("POST", "/v1/beat", token, odd, "192.0.2.5")
        assert [str(each) for each in addresses_of(rig.gate.origins())] == ["192.0.2.5"]


def test_the_way_to_m1s_ray_is_asked_of_the_kernel() -> None:
    assert origin_of("127.0.0.1:6379") == "127.0.0.1"
    assert origin_of(f"{'a' * 64}.local:6379") is None  # No name at all.
    assert origin_of("nonsense") is None


# -- the supervisor --------------------------------------------------------------------------------


def test_the_supervisor_lets_in_whom_the_gate_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as rig:
        nft = Nft()
        one = Supervisor(settings=rig.settings, log=LOG, bootstrap=Bootstrap(wanted=False))
        one.origins_changed()  # Before there are any rules.
        one.gate = rig.gate
        one.firewall = Firewall(rig.settings, "head", LOG, nft=nft, may=lambda: "")
        rig.gate.origins_changed = one.origins_changed
        one.origins_changed()
        assert "10.0.0.9" not in nft.scripts[-1]

        rig.gate.handle("POST", "/v1/preflight", rig.invitation(), {}, "10.0.0.9")
        assert "elements = { 10.0.0.9 }" in nft.scripts[-1]

        # A list that cannot be read changes nothing.
        rig.passed_s += 3600
        (rig.settings.cluster_dir / "members.json").write_text("{")
        before = len(nft.scripts)
        one.origins_changed()
        assert len(nft.scripts) == before
        assert any("cannot be used" in each.message for each in caplog.records)

        one.gate = None
        one.stop_all()
        assert nft.scripts[-1] == removal(one.firewall.table)


def test_up_says_which_commands_close_the_ports(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    told = {"mode": "auto", "table": None, "let_in": ["10.0.0.2"], "trouble": "no root"}
    steps: list[str] = []
    write_state(settings.run_dir, {"firewall": {**told, "trouble": ""}})
    control._tell_open_ports(settings, steps.append)
    write_state(settings.run_dir, {"firewall": None})
    control._tell_open_ports(settings, steps.append)
    assert steps == []

    write_state(settings.run_dir, {"firewall": told})
    control._tell_open_ports(settings, steps.append)

    assert steps[0].startswith(
        "note: Ray's ports are open to whoever reaches this machine: no root"
    )
    assert [each.strip() for each in steps[1:]] == commands_for(settings, "head", told)
    assert len(steps) > 1


def refused(rig: GateRig, authorization: str) -> bool:
    return rig.refusal("/v1/preflight", authorization).status == 401

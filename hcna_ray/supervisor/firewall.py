"""Who may reach which port of this machine: rules for nftables, made and kept by the supervisor.

Ray listens on every address whatever it is told, some of it in clear and without any key. So each
instance has one table of its own, ``inet hcna_<digest of its home>``, and never looks at another:

* loopback passes, and so do answers to connections that this machine opened itself;
* the ports for everybody (M1's gate, what the settings bind to a public address) pass;
* the ports that Ray's nodes need of each other pass from the addresses of the cluster's machines;
* every other packet to a port of this instance is dropped, by IPv4 and IPv6.

The table is replaced in one transaction whenever a machine joins, moves or leaves, so there is no
moment without rules. It stays while a supervisor is killed and its processes run on, and goes with
`hcna down`. A drop is final in nftables whatever other tables say, but what passes here may still
be stopped by another firewall of the machine, such as ufw: those have to let the members in too.

What may pass is a pure function of the settings; `Firewall` is the shell that hands it to ``nft``.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Literal

from hcna_ray.config import Settings, is_loopback
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.supervisor.membership import Membership
from hcna_ray.supervisor.ports import marker_of, single_ports

Role = Literal["head", "worker"]
#: Who may connect from another machine.
Reach = Literal["everybody", "members", "nobody"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: First and last port.
Range = tuple[int, int]

#: Ranges of ports, by the part of their settings' names before ``_min`` and ``_max``.
RANGES = ("replica_http", "replica_grpc", "head_processes", "worker_processes")
#: What Ray's nodes need of each other. Its pages of figures and the agents' HTTP are not among it.
OF_NODES: Mapping[Role, tuple[str, ...]] = {
    "head": (
        "gcs",
        "head_node_manager",
        "head_object_manager",
        "head_agent_grpc",
        "head_processes",
    ),
    "worker": (
        "worker_node_manager",
        "worker_object_manager",
        "worker_agent_grpc",
        "worker_processes",
    ),
}
#: Name of the file below ``run/`` with the rules, for ``nft -f`` and for people.
FILE_NAME = "firewall.nft"
#: More addresses than this are no cluster; a rule set has to stay readable.
ADDRESSES_MAX = 4096
_NFT_S = 10.0
_CAP_NET_ADMIN = 12
#: nft lies where only root's PATH looks.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
#: ufw takes so many ports in a rule; a range counts twice.
_UFW_PORTS_MAX = 15


class FirewallRefused(HcnaError):
    """``ray.firewall`` is on, and hcna may not set rules. The text says why."""

    code = "firewall_refused"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"ray.firewall is on, but hcna cannot set rules: {self.reason}; run it as root with "
            "nft installed, or set ray.firewall: auto"
        )


@dataclass(frozen=True, kw_only=True)
class PortPlan:
    """Which of an instance's ports may be reached by whom; sorted, no range touches the next."""

    everybody: tuple[Range, ...]
    members: tuple[Range, ...]
    #: All ports of the instance, those above among them.
    ours: tuple[Range, ...]


def reach_of(name: str) -> Reach:
    """Return who may reach a port of ``ports.*``, by its name without ``_min``."""
    if name == "gate":
        return "everybody"
    return "members" if name in (*OF_NODES["head"], *OF_NODES["worker"]) else "nobody"


def port_plan(settings: Settings, role: Role) -> PortPlan:
    """Return what the settings mean for a machine.

    Args:
        settings: Of this machine, M1's decisions included.
        role: ``head`` on M1's machine, which may have a worker too; ``worker`` on one that joined.
    """
    port = settings.port
    ours = [(each, each) for each in single_ports(settings, worker_only=role == "worker")]
    ranges = [name for name in RANGES if role == "head" or name.startswith("worker")]
    ours += [(port(f"{name}_min"), port(f"{name}_max")) for name in ranges]
    needed = OF_NODES["worker"] if role == "worker" else (*OF_NODES["head"], *OF_NODES["worker"])
    offered = [(settings.worker_host, settings.worker_port)]
    everybody = []
    if role == "head":
        offered += [
            (settings.api_host, settings.api_port),
            (settings.control_host, settings.control_port),
        ]
        everybody.append((port("gate"), port("gate")))
    everybody += [(each, each) for host, each in offered if not is_loopback(host)]
    members = ranges_of(settings, needed)
    return PortPlan(everybody=joined(everybody), members=members, ours=joined(ours))


def ranges_of(settings: Settings, names: Iterable[str]) -> tuple[Range, ...]:
    """Return the ports of ``ports.*`` with these names, in as few ranges as can be."""
    port = settings.port
    return joined(
        (port(f"{name}_min"), port(f"{name}_max")) if name in RANGES else (port(name), port(name))
        for name in names
    )


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the same ports in as few ranges as can be, sorted."""
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def addresses_of(hosts: Iterable[str]) -> tuple[Address, ...]:
    """Return the addresses among these, each once, sorted; what is none of another machine is out.

    They come from other machines and end in a file that root reads: nothing is passed on as text.
    """
    found: set[Address] = set()
    for host in hosts:
        try:
            address: Address = ipaddress.ip_address(host)
        except ValueError:
            continue
        if isinstance(address, ipaddress.IPv6Address):
            if address.scope_id is not None:
                continue  # A set of addresses knows no interfaces.
            address = address.ipv4_mapped or address
        if not (address.is_loopback or address.is_unspecified or address.is_multicast):
            found.add(address)
    return tuple(sorted(found, key=lambda each: (each.version, int(each))))[:ADDRESSES_MAX]


def table_of(settings: Settings) -> str:
    """Return the name of this instance's table, the same at every start of a home."""
    return f"hcna_{marker_of(settings).cluster_id[:8]}"


def rules(table: str, plan: PortPlan, members: Sequence[Address]) -> str:
    """Return the script for ``nft -f`` that puts a table in place of what it was, in one step."""
    four = [str(each) for each in members if each.version == 4]
    six = [str(each) for each in members if each.version == 6]
    return f"""\
# Written by the supervisor of hcna-ray; changes here are lost.
{_cleared(table)}
table inet {table} {{
{_set("for_everybody", "inet_service", map(_dashed, plan.everybody), interval=True)}\
{_set("for_members", "inet_service", map(_dashed, plan.members), interval=True)}\
{_set("ours", "inet_service", map(_dashed, plan.ours), interval=True)}\
{_set("members4", "ipv4_addr", four)}\
{_set("members6", "ipv6_addr", six)}\
    chain input {{
        type filter hook input priority filter; policy accept;
        iif "lo" accept
        ct state established ct direction reply accept
        tcp dport @for_everybody accept
        tcp dport @for_members ip saddr @members4 accept
        tcp dport @for_members ip6 saddr @members6 accept
        tcp dport @ours counter drop
    }}
}}
"""


def removal(table: str) -> str:
    """Return the script for ``nft -f`` that takes a table away; nothing happens without one."""
    return f"{_cleared(table)}\n"


def _cleared(table: str) -> str:
    # To delete what is not there is an error, to add what is there is none.
    return f"add table inet {table}\ndelete table inet {table}"


def _set(name: str, kind: str, elements: Iterable[str], *, interval: bool = False) -> str:
    lines = [f"    set {name} {{", f"        type {kind}"]
    if interval:
        lines.append("        flags interval")
    if listed := ", ".join(elements):
        lines.append(f"        elements = {{ {listed} }}")
    return "\n".join([*lines, "    }"]) + "\n"


def _dashed(ports: Range, dash: str = "-") -> str:
    first, last = ports
    return str(first) if first == last else f"{first}{dash}{last}"


# -- where people set the rules --------------------------------------------------------------------


def by_hand(
    settings: Settings, role: Role, members: Sequence[Address], manager: str | None
) -> list[str]:
    """Return the commands that close this machine's ports where hcna may not do it itself.

    Args:
        settings: Of this machine.
        role: What it is.
        members: Addresses that are let in now; the commands are others when they change.
        manager: What manages this machine's firewall: ``ufw``, ``firewalld`` or None.
    """
    plan = port_plan(settings, role)
    match manager:
        case "ufw":
            return [*_ufw(plan, members)]
        case "firewalld":
            return [*_firewalld(plan, members)]
        case _:
            return [f"sudo nft -f {shlex.quote(str(settings.run_dir / FILE_NAME))}"]


def _ufw(plan: PortPlan, members: Sequence[Address]) -> Iterator[str]:
    """The first rule that fits counts, so what is let in goes before what is there."""
    for origin, allowed in (*((str(m), plan.members) for m in members), ("any", plan.everybody)):
        for ports in _chunks(allowed):
            yield f"sudo ufw prepend allow proto tcp from {origin} to any port {ports}"
    for ports in _chunks(plan.ours):
        yield f"sudo ufw deny proto tcp from any to any port {ports}"


def _chunks(ranges: Sequence[Range]) -> Iterator[str]:
    chunk: list[Range] = []
    for each in ranges:
        if sum(1 + (first != last) for first, last in (*chunk, each)) > _UFW_PORTS_MAX:
            yield ",".join(_dashed(one, ":") for one in chunk)
            chunk = []
        chunk.append(each)
    if chunk:
        yield ",".join(_dashed(one, ":") for one in chunk)


def _firewalld(plan: PortPlan, members: Sequence[Address]) -> Iterator[str]:
    """Without priorities a rule that drops would go before those that accept."""
    add = "sudo firewall-cmd --permanent --add-rich-rule="
    for member in members:
        source = f'family="ipv{member.version}" source address="{member}" '
        for ports in plan.members:
            yield f"{add}'rule priority=\"-20\" {source}{_port_of(ports)} accept'"
    for ports in plan.everybody:
        yield f"{add}'rule priority=\"-20\" {_port_of(ports)} accept'"
    for ports in plan.ours:
        yield f"{add}'rule priority=\"-10\" {_port_of(ports)} drop'"
    yield "sudo firewall-cmd --reload"


def _port_of(ports: Range) -> str:
    return f'port port="{_dashed(ports)}" protocol="tcp"'


def words_on_open_ports(told: Mapping[str, Any]) -> str:
    """Return whom Ray's ports are open to and why, in one sentence; '' if all is as it should be.

    Args:
        told: What `Firewall.describe` told, as ``run/state.json`` holds it.
    """
    if told.get("mode") in (None, "off") or not told.get("trouble"):
        return ""
    if told.get("table"):
        return f"Ray's ports are open to the machines of before: {told['trouble']}"
    return f"Ray's ports are open to whoever reaches this machine: {told['trouble']}"


def commands_for(settings: Settings, role: Role, told: Mapping[str, Any]) -> list[str]:
    """Return what to type, if `words_on_open_ports` says anything, for this machine's firewall."""
    if not words_on_open_ports(told):
        return []
    listed = told.get("let_in")
    members = addresses_of(map(str, listed if isinstance(listed, list) else ()))
    return by_hand(settings, role, members, manager_here())


#: What to know of `commands_for`.
BY_HAND = "again when a machine joins, moves or leaves; ray.firewall: off ends this note"


def manager_here(
    which: Callable[[str], str | None] = shutil.which,
    run: Callable[[Sequence[str]], int] | None = None,
    ufw_config: Path = Path("/etc/ufw/ufw.conf"),
) -> str | None:
    """Return what manages this machine's firewall: ``ufw``, ``firewalld`` or None.

    That a program is installed says little; ufw must be switched on, firewalld must run.
    """
    try:
        lines = ufw_config.read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        lines = []
    if "enabled=yes" in [line.strip() for line in lines]:
        return "ufw"
    if which("firewall-cmd") and (run or _code_of)(["firewall-cmd", "--state"]) == 0:
        return "firewalld"
    return None


def _code_of(command: Sequence[str]) -> int:
    try:
        return subprocess.run(command, capture_output=True, timeout=_NFT_S, check=False).returncode
    except (OSError, subprocess.SubprocessError):
        return 1


# -- nft -------------------------------------------------------------------------------------------


def nft_program() -> str | None:
    """Return where ``nft`` is, or None."""
    return shutil.which("nft", path=os.pathsep.join((os.environ.get("PATH", os.defpath), _SBIN)))


def why_not(
    status: Path = Path("/proc/self/status"), program: Callable[[], str | None] = nft_program
) -> str:
    """Return why this process cannot set rules; '' if it may try."""
    if program() is None:
        return "there is no nft (package nftables)"
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
        may = bool(int(effective, 16) >> _CAP_NET_ADMIN & 1)
    except (OSError, StopIteration, IndexError, ValueError):
        may = os.geteuid() == 0
    return "" if may else "hcna is not root here (it has no CAP_NET_ADMIN)"


def run_nft(arguments: Sequence[str], script: str = "") -> str:
    """Run ``nft``; return what is wrong, or ''."""
    problem, _said = _nft(arguments, script)
    return problem


def show_table(table: str) -> str:
    """Return a table as ``nft`` lists it, without its counters; '' if it cannot be listed."""
    problem, said = _nft(["-s", *_listing(table)])
    return "" if problem else said


def _nft(arguments: Sequence[str], script: str = "") -> tuple[str, str]:
    """Run ``nft``; return what is wrong, or '', and what it says.

    The supervisor collects every child that ends, so the exit code may be somebody else's by the
    time it is asked for. nft says nothing on its standard error when all went well.
    """
    program = nft_program()
    if program is None:
        return "there is no nft (package nftables)", ""
    try:
        done = subprocess.run(
            [program, *arguments],
            input=script,
            capture_output=True,
            text=True,
            timeout=_NFT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error), ""
    said = done.stderr.strip().splitlines()
    if said:
        return said[0], ""
    return "" if done.returncode == 0 else f"nft ended with code {done.returncode}", done.stdout


def is_there(settings: Settings) -> bool:
    """Whether this instance's table is set; False where this process may not look."""
    return not why_not() and not run_nft(_listing(table_of(settings)))


def clear(settings: Settings) -> str:
    """Take this instance's table away, if there is one; return what is wrong, or ''.

    For what a supervisor that was killed has left.
    """
    return run_nft(["-f", "-"], removal(table_of(settings))) if is_there(settings) else ""


def _listing(table: str) -> list[str]:
    return ["list", "table", "inet", table]


class Firewall:
    """The table of one instance. Owns no other; any thread may call it.

    It is in place with the addresses of now, or `trouble` says why it is not; `look_after` then
    tries again.
    """

    def __init__(
        self,
        settings: Settings,
        role: Role,
        log: Logger,
        *,
        nft: Callable[[Sequence[str], str], str] = run_nft,
        show: Callable[[str], str] = show_table,
        may: Callable[[], str] = why_not,
    ) -> None:
        """Prepare; nothing is set before `let_in`.

        Args:
            settings: Of this machine.
            role: What it is.
            log: The supervisor's log.
            nft: Runs ``nft`` with arguments and a script; returns what is wrong, or ''.
            show: Returns what a table holds, the same text as long as nobody changes it, or ''.
            may: Returns why this process cannot set rules, or ''.
        """
        self.settings, self.role, self.log = settings, role, log
        self.table = table_of(settings)
        self.trouble = ""
        self._nft, self._show, self._may = nft, show, may
        self._plan = port_plan(settings, role)
        self._lock = threading.Lock()
        self._members: tuple[Address, ...] | None = None
        #: Whether a table of ours is there, be it one for other addresses, and what it held when
        #: it was set last.
        self._is_set = False
        self._shown = ""
        self._written = ""

    def open_for(self, hosts: Collection[str]) -> None:
        """Begin: let these addresses in and no others.

        Where ``ray.firewall`` is off now, what a supervisor that was killed has left goes.

        Raises:
            FirewallRefused: ``ray.firewall`` is on, and it cannot be done.
        """
        if self.settings.ray.firewall == "off" and not self._may():
            if not self._nft(_listing(self.table), ""):
                self._take_away()
            return
        self.let_in(hosts)
        if self.settings.ray.firewall == "on" and self.trouble:
            raise FirewallRefused(self.trouble)

    def let_in(self, hosts: Collection[str]) -> None:
        """Let these addresses in and no others.

        Nothing is done if that is so already, or if it has just failed: see `look_after`.
        """
        if self.settings.ray.firewall == "off":
            return
        members = addresses_of(hosts)
        with self._lock:
            if members == self._members and (self._is_set or self.trouble):
                return
            self._members = members
            self._apply()

    def look_after(self) -> None:
        """Set the rules again if somebody has changed them, or if they could not be set."""
        with self._lock:
            if self._members is None:
                return
            if not self.trouble:
                # A table may be there and be empty: that one lets everybody in.
                shown = self._show(self.table)
                if shown and shown == self._shown:
                    return
                if shown != self._shown:
                    self._is_set = False  # Who knows what the table lets in.
                    self.log.warning(
                        "the firewall's rules are not those that were set, they are set again",
                        extra={"action": "firewall.gone", "table": self.table},
                    )
            self._apply()

    def remove(self) -> None:
        """Take the table away. May be called twice."""
        if self.settings.ray.firewall == "off" or self._may():
            return
        with self._lock:
            self._members, self._is_set = None, False
            self._take_away()

    def describe(self) -> dict[str, Any]:
        """Return what ``run/state.json`` holds of it."""
        return {
            "mode": self.settings.ray.firewall,
            "table": self.table if self._is_set else None,
            "let_in": [str(each) for each in self._members or ()],
            "trouble": self.trouble,
        }

    def _take_away(self) -> None:
        if problem := self._nft(["-f", "-"], removal(self.table)):
            self.log.error(
                "the firewall's rules are left",
                extra={"action": "firewall.left", "table": self.table, "error": problem},
            )

    def _apply(self) -> None:
        assert self._members is not None
        text = rules(self.table, self._plan, self._members)
        try:
            if text != self._written:
                write_private(self.settings.run_dir / FILE_NAME, text)
            self._written = text
        except OSError as error:  # It is for people; nft reads its input.
            self.log.warning(
                "the firewall's rules cannot be written down",
                extra={"action": "firewall.file", "error": str(error)},
            )
        problem = self._may() or self._nft(["-f", "-"], text)
        # After a failure what was set before is still there: nft does all or nothing.
        if not problem:
            self._is_set, self._shown = True, self._show(self.table)
            self.log.info(
                "Ray's ports are closed to all but the cluster's machines",
                extra={"action": "firewall.set", "table": self.table, "let_in": len(self._members)},
            )
        elif problem != self.trouble:
            self.log.warning(
                "Ray's ports are not closed",
                extra={"action": "firewall.trouble", "error": problem},
            )
        self.trouble = problem


# -- who is let in on a machine that has joined ----------------------------------------------------


class Peers:
    """Addresses that a member has to let in: M1's, and those of the other members."""

    def __init__(self, resolve: Callable[[str], Collection[str]] | None = None) -> None:
        """Prepare. ``resolve`` returns the addresses of a name; default: asks the system."""
        self._resolve = resolve or _resolved
        self._known: dict[str, Collection[str]] = {}

    def of(self, membership: Membership, facts: Mapping[str, Any]) -> frozenset[str]:
        """Return what a member knows.

        Args:
            membership: What it joined.
            facts: M1's last answer; an M1 of an older version names no ``peers``.
        """
        told = [facts.get("ray_address") or membership.ray_address]
        hosts = [str(each).rpartition(":")[0].strip("[]") for each in told]
        hosts += [*membership.m1_addresses, *_listed(facts, "m1_addresses")]
        # M1 may be known by name; what others say of themselves asks no name service.
        found = {each for each in _listed(facts, "peers") if _is_address(each)}
        for host in hosts:
            found.update([host] if _is_address(host) else self._addresses(host))
        return frozenset(found)

    def forget_names(self) -> None:
        """Ask for names again: a machine may have another address by now."""
        self._known.clear()

    def _addresses(self, name: str) -> Collection[str]:
        if name not in self._known:
            self._known[name] = self._resolve(name)
        return self._known[name]


def _listed(facts: Mapping[str, Any], name: str) -> list[str]:
    value = facts.get(name)
    return [str(each) for each in value[:ADDRESSES_MAX]] if isinstance(value, list) else []


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolved(name: str) -> Collection[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return {str(each[4][0]) for each in found}

"""The tick list: what must hold before a machine joins, and what ``hcna doctor`` looks at.

Each judgement is a pure function of what was measured; the generators at the end measure, in the
order in which a person reads. A check that fails says what was found and what to type.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from hcna_ray.config import GIB, LOOPBACK, MIB, ConfigError, Settings, with_shared
from hcna_ray.core.errors import HcnaError
from hcna_ray.security.authority import Node
from hcna_ray.security.certs import CertificateBroken, known_by, load_cert
from hcna_ray.security.keys import read_client_key
from hcna_ray.supervisor import probe
from hcna_ray.supervisor.addresses import (
    default_address,
    describe,
    is_own,
    own_addresses,
    route_source,
)
from hcna_ray.supervisor.firewall import (
    OF_NODES,
    is_there,
    ranges_of,
    table_of,
    words_on_open_ports,
)
from hcna_ray.supervisor.gate import MemberBeat
from hcna_ray.supervisor.gate_client import (
    GateChannel,
    GateUnreachable,
    origin_of,
    pinned_context,
    reach_gate,
)
from hcna_ray.supervisor.gate_protocol import (
    CLOCK_SKEW_S_MAX,
    GateRefused,
    Versions,
    own_versions,
    parse_versions,
)
from hcna_ray.supervisor.membership import Membership, node_id_for, read_members
from hcna_ray.supervisor.ports import ray_tuning_hash, taken_ports
from hcna_ray.supervisor.reach import Listeners, Reach, try_port, try_ports
from hcna_ray.supervisor.rounds import Round, read_round
from hcna_ray.supervisor.state import read_state, read_supervisor, recorded_process

Level = Literal["ok", "warn", "fail"]
Json = dict[str, Any]

CLOCK_WARN_S = 2.0
MEMORY_WARN_BYTES = 2 * GIB
MEMORY_MIN_BYTES = 1 * GIB
#: Ray's object store takes two fifths of it and has 80 MiB at least.
SHARED_WARN_BYTES = 200 * MIB
SHARED_MIN_BYTES = 80 * MIB
FILES_WARN = 8192
FILES_MIN = 1024
#: A member that was not heard for this long is mentioned.
BEAT_WARN_S = 15.0
#: It is renewed when 30 days are left, and Ray's processes read it 15 days later at the latest.
CERTIFICATE_WARN = timedelta(days=10)

_CONNECT_S = 3.0
#: Ports of a worker that others connect to, and those of M1.
_WORKER_PORTS = (
    "worker_node_manager",
    "worker_object_manager",
    "worker_agent_grpc",
    "worker_processes_min",
    "worker_processes_max",
)
#: A port in the range of M1's processes, on which M1 listens for the check.
PROCESSES = "processes"
_HEAD_PORTS = ("gcs", "head_node_manager", "head_object_manager", "head_agent_grpc")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the tick list."""

    id: str
    level: Level
    found: str
    #: What to do about it; '' where there is nothing to do.
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether it does not stand in the way; a warning does not."""
        return self.level != "fail"


# -- judgements ----------------------------------------------------------------------------------


def judge_address(own: str, seen: str, m1: str) -> Check:
    """Whether M1 sees this machine under the address that the others will use."""
    if own != seen:
        return Check(
            id="address",
            level="fail",
            found=f"this machine talks to M1 from {own}, but M1 sees {seen}: an address "
            "translation (NAT) or a proxy is in between, and M1 could not connect to here",
            fix="use a network or VPN without translation, and the address of its card: "
            "hcna join CODE --address ADDRESS (own: "
            f"{', '.join(map(str, own_addresses())) or 'none'})",
        )
    if ipaddress.ip_address(own).is_loopback:
        return Check(
            id="address",
            level="warn",
            found=f"{own}: M1 is on this same machine",
            fix="nothing, if both run here on purpose",
        )
    return Check(id="address", level="ok", found=f"{describe(own)} to M1 at {m1}")


def judge_name(
    name: str | None, problem: Mapping[str, Any] | None, *, member: bool = False
) -> Check:
    """Whether the name asked for can be had; a member has it already."""
    if problem is not None:
        return Check(
            id="name",
            level="fail",
            found=str(problem.get("message")),
            fix="hcna join CODE without --name, or with another one; a machine that is gone for "
            "good is removed on M1's machine: hcna leave NAME",
        )
    found = f"this machine is {name}" if member else f"{name} is free for this machine"
    return Check(id="name", level="ok", found=found)


def judge_clock(skew_s: float) -> Check:
    """Whether the clocks agree. ``skew_s`` is this machine's minus M1's."""
    found = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} M1's"
    fix = "set both clocks: sudo timedatectl set-ntp true"
    if abs(skew_s) > CLOCK_SKEW_S_MAX:
        return Check(id="clock", level="fail", found=found, fix=fix)
    if abs(skew_s) > CLOCK_WARN_S:
        return Check(id="clock", level="warn", found=found, fix=fix)
    return Check(id="clock", level="ok", found=found)


def judge_versions(own: Versions, m1: Versions) -> list[Check]:
    """Whether Python (to its minor version), Ray and hcna-ray are those of M1."""
    same_python = own.python.split(".")[:2] == m1.python.split(".")[:2]
    minor = ".".join(m1.python.split(".")[:2])
    install = f"uv tool install --python {minor} hcna-ray=={m1.hcna_ray}"
    return [
        _same("python", own.python, m1.python, same_python, install),
        _same("ray", own.ray, m1.ray, own.ray == m1.ray, f"uv pip install ray=={m1.ray}"),
        _same("hcna-ray", own.hcna_ray, m1.hcna_ray, own.hcna_ray == m1.hcna_ray, install),
    ]


def judge_ray_settings(own: str, m1: str) -> Check:
    """Whether both machines would run Ray with the same settings."""
    if own != m1:
        return Check(
            id="ray settings",
            level="fail",
            found=f"{own} here, {m1} on M1: Ray's nodes would disagree about time-outs",
            fix="install the same hcna-ray on both machines",
        )
    return Check(id="ray settings", level="ok", found=f"the same as M1's ({own})")


def judge_ports_out(
    host: str,
    reached: Mapping[str, tuple[int, Reach]],
    *,
    gate: str,
    documented: Sequence[tuple[int, int]],
) -> Check:
    """Whether M1's ports can be reached from here.

    Args:
        host: Where M1's Ray says it is.
        reached: By what listens there: the port and what came of a connection.
        gate: Address at which the gate answered.
        documented: All ports that M1's firewall has to let in.
    """
    bad = {name: each for name, each in reached.items() if not each[1].ok}
    if not bad:
        ports = ", ".join(str(port) for port, _ in reached.values())
        return Check(id="ports to M1", level="ok", found=f"{host}: {ports}")
    open_them = f"on M1's machine: {firewall_command(documented, None)}"
    ray_down = {name: each for name, each in bad.items() if name != PROCESSES}
    if len(bad) == len(reached) and host != gate:
        fix = (
            f"M1's Ray is at {host}, which is not where the code led ({gate}). On M1's machine "
            f"put `ray: {{node_address: {gate}}}` into hcna.yaml, then hcna down and hcna up"
        )
    elif ray_down and {reach.verdict for _, reach in ray_down.values()} == {"refused"}:
        fix = f"on M1's machine: hcna status; if all is up there, a firewall says no: {open_them}"
    else:
        fix = open_them
    listed = _by_verdict({port: reach for port, reach in bad.values()})
    return Check(id="ports to M1", level="fail", found=f"{host}: {listed}", fix=fix)


def judge_ports_in(
    own: str,
    m1: str,
    reached: Mapping[int, Reach],
    taken: Mapping[int, str],
    *,
    documented: Sequence[tuple[int, int]],
    tool: str | None,
) -> Check:
    """Whether M1 can reach the ports of this machine's worker.

    Args:
        own: Address of this machine.
        m1: Address of M1.
        reached: By port, what came of M1's connection.
        taken: Ports that other programs hold here, and what is known of them.
        documented: All ports that this machine's firewall has to let in.
        tool: Firewall program of this machine.
    """
    if taken:
        listed = "; ".join(f"{port} by {by}" for port, by in sorted(taken.items()))
        first = min(taken)
        return Check(
            id="ports from M1",
            level="fail",
            found=f"in use on this machine: {listed}",
            fix=f"end that program (sudo ss -ltnp 'sport = :{first}'), or move the whole cluster: "
            "ports.offset in M1's hcna.yaml",
        )
    bad = {port: reach for port, reach in reached.items() if not reach.ok}
    if not bad:
        return Check(
            id="ports from M1", level="ok", found=f"{own}: {', '.join(map(str, sorted(reached)))}"
        )
    return Check(
        id="ports from M1",
        level="fail",
        found=f"M1 at {m1} cannot reach {own}: {_by_verdict(bad)}",
        fix=f"on this machine: {firewall_command(documented, tool, m1)}",
    )


def judge_disk(where: str, free: int, needed: int) -> Check:
    """Whether there is room on a disk."""
    found = f"{_size(free)} free in {where}"
    if free < needed:
        return Check(
            id="disk",
            level="fail",
            found=f"{found}; {_size(needed)} are needed",
            fix=f"make room, see: du -xh {where} | sort -h | tail; or use another disk with "
            "HCNA_HOME",
        )
    return Check(id="disk", level="ok", found=found)


def judge_memory(available: int, total: int) -> Check:
    """Whether there is memory for a worker."""
    found = f"{_size(available)} of {_size(total)} available"
    fix = "end what needs it, see: ps aux --sort=-rss | head"
    if available < MEMORY_MIN_BYTES:
        return Check(id="memory", level="fail", found=found, fix=fix)
    if available < MEMORY_WARN_BYTES:
        return Check(id="memory", level="warn", found=found, fix=fix)
    return Check(id="memory", level="ok", found=found)


def judge_shared_memory(free: int | None) -> Check:
    """Whether ``/dev/shm`` holds Ray's object store. None: there is none."""
    fix = "sudo mount -o remount,size=2G /dev/shm (in a container: --shm-size=2g)"
    if free is None:
        return Check(
            id="shared memory", level="warn", found="no /dev/shm: objects go to disk", fix=fix
        )
    found = f"{_size(free)} free in /dev/shm"
    if free < SHARED_MIN_BYTES:
        return Check(id="shared memory", level="fail", found=found, fix=fix)
    if free < SHARED_WARN_BYTES:
        return Check(id="shared memory", level="warn", found=found, fix=fix)
    return Check(id="shared memory", level="ok", found=found)


def judge_files(limit: int) -> Check:
    """Whether a process may open enough files. ``limit`` is the hard one."""
    fix = "raise it: LimitNOFILE=65536 in the unit, or 'nofile' in /etc/security/limits.conf"
    if limit == resource.RLIM_INFINITY:
        return Check(id="open files", level="ok", found="no limit")
    if limit < FILES_MIN:
        return Check(id="open files", level="fail", found=f"{limit} at most", fix=fix)
    if limit < FILES_WARN:
        return Check(id="open files", level="warn", found=f"{limit} at most", fix=fix)
    return Check(id="open files", level="ok", found=f"{limit} at most")


def judge_member(beat: MemberBeat, current: Round | None = None) -> Check:
    """How a member of this M1 is."""
    name, where = f"member {beat.name}", f"{beat.hostname} at {beat.address}"
    if beat.last_beat_age_s is None or beat.last_beat_age_s > BEAT_WARN_S:
        age = beat.last_beat_age_s
        heard = "not heard since M1 started" if age is None else f"last heard {age:.0f} s ago"
        return Check(
            id=name,
            level="warn",
            found=f"{where}: {heard}",
            fix="wake it, or there: hcna doctor; if it is gone for good: hcna leave "
            f"{beat.name} --force",
        )
    if beat.same_ray_settings is False:
        return Check(
            id=name,
            level="fail",
            found=f"{where}: runs Ray with other settings",
            fix="install the same hcna-ray there, then there: hcna down && hcna up",
        )
    clock = judge_clock(beat.clock_skew_s or 0.0)
    if clock.level != "ok":
        return Check(id=name, level=clock.level, found=f"{where}: {clock.found}", fix=clock.fix)
    if current is not None and not current.pending and beat.round != current.number:
        return Check(
            id=name,
            level="warn",
            found=f"{where}: has not taken over the last certificates and token yet",
            fix=f"see why in logs/supervisor.log of {beat.name}, or there: hcna down && hcna up",
        )
    return Check(id=name, level="ok", found=f"{where}: heard {beat.last_beat_age_s:.1f} s ago")


def judge_certificate(ends_at: datetime | None, now: datetime) -> Check:
    """Whether this machine's certificate is good for a while."""
    if ends_at is None:
        return Check(id="certificate", level="ok", found="none yet, it is made at the first start")
    until = f"until {ends_at.date().isoformat()}"
    if now >= ends_at:
        return Check(
            id="certificate", level="fail", found=f"good {until} only", fix="hcna down && hcna up"
        )
    if ends_at - now < CERTIFICATE_WARN:
        return Check(
            id="certificate",
            level="warn",
            found=f"good {until} only, it should have been renewed",
            fix="see why in logs/supervisor.log, then hcna down && hcna up",
        )
    return Check(id="certificate", level="ok", found=f"good {until}")


def judge_firewall(told: Mapping[str, Any]) -> Check:
    """Whether Ray's ports are closed to all but the cluster's machines.

    Args:
        told: What the supervisor says of it in ``run/state.json``.
    """
    if told.get("mode") == "off":
        found = "ray.firewall is off: who reaches Ray's ports is left to this machine's own rules"
        return Check(id="firewall", level="ok", found=found)
    if words := words_on_open_ports(told):
        return Check(
            id="firewall",
            level="warn",
            found=words,
            fix="type the commands that hcna doctor ends with",
        )
    let_in = told.get("let_in")
    count = len(let_in) if isinstance(let_in, list) else 0
    return Check(
        id="firewall",
        level="ok",
        found=f"table inet {told.get('table')} lets {count} other addresses in at Ray's ports",
    )


def judge_entrance(settings: Settings, hostname: str) -> Check:
    """Where other machines reach C1, and whether it may be open there.

    Args:
        settings: Of M1.
        hostname: What this machine is called where the settings do not say it.
    """
    try:
        settings.check_start()
    except HcnaError as error:
        fix = "set composite.security.enable_tls: true, or take composite.listen_address out"
        return Check(id="entrance", level="fail", found=str(error), fix=fix)
    if not settings.is_public:
        return Check(id="entrance", level="ok", found="C1 is for this machine alone")
    where = settings.public_url(hostname)
    found = f"other machines reach C1 at {where} (port {settings.api_port}/tcp, TLS)"
    return Check(id="entrance", level="ok", found=found)


# -- firewalls -----------------------------------------------------------------------------------


def firewall_tool(which: Callable[[str], str | None] = shutil.which) -> str | None:
    """Return the firewall program of this machine: ``ufw``, ``firewall-cmd``, ``nft`` or None."""
    return next((tool for tool in ("ufw", "firewall-cmd", "nft") if which(tool)), None)


def firewall_command(ports: Sequence[tuple[int, int]], tool: str | None, peer: str = "") -> str:
    """Return the command that lets others connect to these ranges of ports."""
    if tool == "firewall-cmd":
        each = " ".join(f"--add-port={_range(one, '-')}/tcp" for one in ports)
        return f"sudo firewall-cmd --permanent {each} && sudo firewall-cmd --reload"
    if tool == "nft":
        listed = ", ".join(_range(one, "-") for one in ports)
        origin = f"ip saddr {peer} " if peer else ""
        return f"sudo nft insert rule inet filter input {origin}tcp dport '{{ {listed} }}' accept"
    listed = ",".join(_range(one, ":") for one in ports)
    return f"sudo ufw allow proto tcp from {peer or 'any'} to any port {listed}"


def documented_ports(settings: Settings, role: str) -> list[tuple[int, int]]:
    """Return the ranges that other machines connect to: of ``head`` or of ``worker``."""
    if role == "worker":
        return [*ranges_of(settings, OF_NODES["worker"])]
    entrance = [(settings.api_port, settings.api_port)] if settings.is_public else []
    return [*entrance, *ranges_of(settings, ("gate", *OF_NODES["head"]))]


def _range(ports: tuple[int, int], dash: str) -> str:
    first, last = ports
    return str(first) if first == last else f"{first}{dash}{last}"


# -- measuring this machine ----------------------------------------------------------------------


def machine_checks(settings: Settings) -> Iterator[Check]:
    """Look at this machine alone: where things are kept, disk, memory, limits."""
    yield check_home(settings)
    yield check_disk(settings)
    memory = psutil.virtual_memory()
    yield judge_memory(memory.available, memory.total)
    shared = Path("/dev/shm")
    yield judge_shared_memory(shutil.disk_usage(shared).free if shared.is_dir() else None)
    yield judge_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def check_home(settings: Settings) -> Check:
    """Whether the state directory and what is in it can be written."""
    home = settings.home
    ours = [home, *(home / name for name in ("cluster", "keys", "run", "logs", "outbox"))]
    places = [path for path in ours if path.exists()] or [existing(home)]
    for place in [*places, existing(settings.data_dir)]:
        problem = _cannot_write(place)
        if problem:
            return Check(
                id="home",
                level="fail",
                found=f"{place} cannot be written: {os.strerror(problem)}",
                fix=f"make room in {place}"
                if problem == errno.ENOSPC
                else f"sudo chown -R $USER {place}; or another one: export HCNA_HOME=$HOME/hcna",
            )
    return Check(id="home", level="ok", found=f"{home} can be written")


def check_disk(settings: Settings) -> Check:
    """Whether there is room for the state and for the data of tasks."""
    needed = settings.limits.disk_free_bytes_min
    places = dict.fromkeys((existing(settings.home), existing(settings.data_dir)))
    checks = [judge_disk(str(at), shutil.disk_usage(at).free, needed) for at in places]
    return next((check for check in checks if not check.ok), checks[0])


def existing(path: Path) -> Path:
    """Return the path itself or the nearest directory above it that exists."""
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def listener_of(port: int) -> str:
    """Return what listens on a port of this machine, as far as this user may know."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        connections = []
    for each in connections:
        if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port:
            if each.pid is None:
                return "a program of another user"
            try:
                return f"{psutil.Process(each.pid).name()} (pid {each.pid})"
            except psutil.Error:
                return f"pid {each.pid}"
    return "another program"


def _cannot_write(directory: Path) -> int:
    """Return why nothing can be created in a directory, as errno; 0 if it can. Leaves nothing."""
    try:
        with tempfile.TemporaryFile(dir=directory) as stream:
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return 0


# -- measuring the way to M1 ---------------------------------------------------------------------


class JoinChecks:
    """The checks of a machine that joins, or has joined, against its M1.

    After `run` has ended, ``answer`` is what M1 said and ``effective`` the settings of this machine
    under M1's decisions.
    """

    def __init__(
        self,
        settings: Settings,
        channel: GateChannel,
        *,
        authorization: str,
        address: str | None = None,
        name: str | None = None,
        machine_id: str | None = None,
        live: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Prepare.

        Args:
            settings: Of this machine.
            channel: To M1's gate.
            authorization: ``Invite <token>`` or ``Member <token>``.
            address: Own address that was chosen; None: the route decides.
            name: Name that is asked for.
            machine_id: Id of this machine, if it has one yet.
            live: Its own cluster runs, so its ports are in use and that is well.
            now: Wall clock.
        """
        self.settings, self.channel, self.authorization = settings, channel, authorization
        self.address, self.name, self.machine_id = address, name, machine_id
        self.live, self.now = live, now
        self.answer: Json = {}
        self.effective = settings

    def run(self) -> Iterator[Check]:
        """Check everything; each check is given as soon as it is known.

        Raises:
            GateRefused: M1 does not accept the code or the token.
            OSError: The way to M1 broke down.
        """
        sent = self.now()
        self.answer = self._preflight({})
        skew_s = (sent + self.now()) / 2 - float(self.answer["time"])
        own = self.channel.local_address or ""
        yield judge_address(own, str(self.answer["seen_address"]), self.channel.address)
        yield judge_name(
            self.answer.get("name"),
            self.answer.get("name_problem"),
            member=self.authorization.startswith("Member "),
        )
        understood = self._take_settings()
        if understood is not None:
            yield understood
        else:
            yield from self._check_ports(own)
        yield judge_clock(skew_s)
        yield from judge_versions(own_versions(), parse_versions(self.answer.get("versions")))
        yield judge_ray_settings(ray_tuning_hash(), str(self.answer.get("ray_tuning_hash")))
        yield from machine_checks(self.effective)

    def _take_settings(self) -> Check | None:
        """Take over M1's settings; return a check if this version does not understand them."""
        like = str(self.answer["moderator_node_id"])
        node_id = node_id_for(str(self.answer.get("name") or "W1"), like)
        host = str(self.answer["ray_address"]).rpartition(":")[0]
        try:
            self.effective = with_shared(
                self.settings, self.answer["shared"], node_id, moderator=host
            )
        except (ConfigError, KeyError, TypeError) as error:
            return Check(
                id="settings",
                level="fail",
                found=f"M1's settings do not fit: {error}",
                fix="install the same hcna-ray on both machines",
            )
        return None

    def _check_ports(self, own: str) -> Iterator[Check]:
        port = self.effective.port
        word = secrets.token_hex(8)
        ports = [port(name) for name in _WORKER_PORTS]
        if self.live:
            # Ray hands out the first ports of the range and must not find us on one.
            ports.remove(port("worker_processes_min"))
        with Listeners(ports, word) as listeners:
            live = listeners.taken if self.live else ()
            taken = {} if self.live else {each: listener_of(each) for each in listeners.taken}
            answer = self._preflight(
                {
                    "open": True,
                    "origin": origin_of(str(self.answer["ray_address"])),
                    "word": word,
                    "listen_ports": list(listeners.opened),
                    "live_ports": list(live),
                }
            )
            yield self._ports_out(answer, word)
        reached = {int(each): parse_reach(raw) for each, raw in answer["ports"].items()}
        yield judge_ports_in(
            own,
            self.channel.address,
            reached,
            taken,
            documented=documented_ports(self.effective, "worker"),
            tool=firewall_tool(),
        )

    def _ports_out(self, answer: Json, word: str) -> Check:
        host = str(answer["ray_address"]).rpartition(":")[0]
        port = self.effective.port
        names = {port(name): name for name in _HEAD_PORTS}
        words = dict.fromkeys(names, "")
        for opened in answer.get("opened", [])[:1]:
            names[int(opened)], words[int(opened)] = PROCESSES, word
        reached = try_ports(host, words, timeout_s=_CONNECT_S, source=self.address)
        return judge_ports_out(
            host,
            {names[each]: (each, reach) for each, reach in reached.items()},
            gate=self.channel.address,
            documented=documented_ports(self.effective, "head"),
        )

    def _preflight(self, more: Json) -> Json:
        body = {
            "time": self.now(),
            "versions": asdict(own_versions()),
            "hostname": socket.gethostname()[:128],
            "machine_id": self.machine_id,
            "name": self.name,
            "address": self.address,
            **more,
        }
        return self.channel.request(
            "POST", "/v1/preflight", authorization=self.authorization, body=body
        )


def parse_reach(raw: Any) -> Reach:
    """Return what M1 says of one port."""
    verdicts = ("ok", "refused", "timeout", "no_route")
    verdict = raw.get("verdict") if isinstance(raw, dict) else None
    detail = str(raw.get("detail", "")) if isinstance(raw, dict) else ""
    return Reach(verdict if verdict in verdicts else "other", detail or "M1 could not say why")


# -- doctor --------------------------------------------------------------------------------------


def member_checks(settings: Settings, membership: Membership) -> Iterator[Check]:
    """Look at a machine that has joined: the way to its M1 both ways, and the machine itself."""
    yield _supervisor_check(settings)
    yield _certificate_check(settings)
    yield from _firewall_checks(settings)
    found = None
    try:
        found = reach_gate(membership)
        yield Check(id="M1", level="ok", found=f"answers at {found.channel.address}")
        live = read_supervisor(settings.run_dir) is not None
        yield from JoinChecks(
            settings,
            found.channel,
            authorization=f"Member {membership.member_token}",
            address=membership.address,
            machine_id=membership.machine_id,
            live=live,
        ).run()
        return
    except GateUnreachable as error:
        yield Check(id="M1", level="fail", found=str(error), fix=error.fix)
    except GateRefused as error:
        yield Check(id="M1", level="fail", found=str(error), fix=error.fix)
    except OSError as error:
        yield Check(id="M1", level="fail", found=f"stopped answering: {error}", fix="hcna doctor")
    finally:
        if found is not None:
            found.channel.close()
    yield from machine_checks(settings)


def head_checks(settings: Settings) -> Iterator[Check]:
    """Look at M1's machine, and at what it heard of the others."""
    yield _supervisor_check(settings)
    yield _certificate_check(settings)
    yield from _firewall_checks(settings)
    yield judge_entrance(settings, socket.gethostname())
    if read_supervisor(settings.run_dir) is None:
        taken = taken_ports(settings)
        listed = "; ".join(f"{port} by {listener_of(port)}" for port in sorted(taken))
        yield Check(
            id="ports",
            level="fail" if taken else "ok",
            found=f"in use: {listed}" if taken else "all free",
            fix="end these programs, or move this instance: ports.offset" if taken else "",
        )
    else:
        yield _own_address_check(settings)
        yield _processes_check(settings)
        ready = probe.is_ready(settings.serve_host, settings.serve_port)
        yield Check(
            id="C1",
            level="ok" if ready else "fail",
            found=f"{settings.api_url} is {'ready' if ready else 'not ready'}",
            fix="" if ready else f"wait half a minute; then see {settings.logs_dir}",
        )
        yield from _heard_of_members(settings)
    yield from machine_checks(settings)
    if settings.store_path is None:
        yield store_check(settings)


def store_check(settings: Settings) -> Check:
    """Look at the server that keeps the tasks: is it there, and does it keep what it commits?"""
    from hcna_ray.store.info import risks_of  # Brings the database's library.

    try:
        risks = risks_of(settings)
    except HcnaError as error:
        fix = f"start that server, or correct store.url: {settings.store_name}"
        if error.code == "store_restored":
            fix = "hcna store restored"
        return Check(id="store", level="fail", found=str(error), fix=fix)
    return judge_store(settings.store_name, risks, unsafe=settings.store.unsafe)


def judge_store(name: str, risks: Sequence[str], *, unsafe: bool) -> Check:
    """Whether a server keeps what it commits."""
    if not risks:
        return Check(id="store", level="ok", found=f"{name} answers and keeps what it commits")
    return Check(
        id="store",
        level="warn" if unsafe else "fail",
        found=f"{name} may lose what it commits: {' and '.join(risks)}",
        fix="turn it on for this server, database and role",
    )


def _supervisor_check(settings: Settings) -> Check:
    process = read_supervisor(settings.run_dir)
    if process is None:
        return Check(id="supervisor", level="fail", found="does not run", fix="hcna up")
    return Check(id="supervisor", level="ok", found=f"runs (pid {process.pid})")


def _firewall_checks(settings: Settings) -> Iterator[Check]:
    """Look at what the supervisor does about Ray's ports, or has left when it was killed."""
    told = read_state(settings.run_dir).get("firewall")
    if read_supervisor(settings.run_dir) is not None:
        if isinstance(told, dict):
            yield judge_firewall(told)
    elif is_there(settings):
        yield Check(
            id="firewall",
            level="warn",
            found=f"table inet {table_of(settings)} is there, and no supervisor looks after it",
            fix="hcna up; or hcna down, which takes it away",
        )


def _certificate_check(settings: Settings) -> Check:
    path = Node.of(settings.cluster_dir).pem
    if not path.exists():
        return judge_certificate(None, datetime.now(UTC))
    try:
        return judge_certificate(load_cert(path).not_valid_after_utc, datetime.now(UTC))
    except CertificateBroken as error:
        return Check(
            id="certificate", level="fail", found=str(error), fix="hcna down && hcna up makes it"
        )


def _own_address_check(settings: Settings) -> Check:
    address = settings.ray.node_address or default_address()
    if not is_own(address):
        return Check(
            id="address",
            level="fail",
            found=f"ray.node_address is {address}, which is no address of this machine (own: "
            f"{', '.join(map(str, own_addresses())) or 'none'})",
            fix="correct it in hcna.yaml, then hcna down and hcna up",
        )
    ports = {"gate": settings.port("gate"), "Ray": settings.port("gcs")}
    deaf = [
        f"{port} ({name}): {reach}"
        for name, port in ports.items()
        if not (reach := try_port(address, port, timeout_s=_CONNECT_S)).ok
    ]
    if deaf:
        return Check(
            id="address",
            level="fail",
            found=f"{describe(address)} does not answer on {'; '.join(deaf)}",
            fix="hcna down, then hcna up",
        )
    return Check(id="address", level="ok", found=describe(address))


def _processes_check(settings: Settings) -> Check:
    state = read_state(settings.run_dir)
    down = [
        name
        for name, entry in state.get("members", {}).items()
        if not entry.get("up") or recorded_process(state, name) is None
    ]
    if down:
        return Check(
            id="processes",
            level="fail",
            found=f"not up: {', '.join(down)}",
            fix=f"they are started again by themselves; see {settings.logs_dir}/supervisor.log",
        )
    return Check(id="processes", level="ok", found=f"up: {', '.join(state.get('members', {}))}")


def _heard_of_members(settings: Settings) -> Iterator[Check]:
    if not read_members(settings.cluster_dir):
        return
    try:
        beats = ask_members(settings)
    except (OSError, HcnaError, TypeError) as error:
        yield Check(
            id="gate", level="fail", found=f"does not answer: {error}", fix="hcna down && hcna up"
        )
        return
    current = read_round(settings.cluster_dir)
    for beat in beats:
        yield judge_member(beat, current)


def ask_members(settings: Settings) -> list[MemberBeat]:
    """Return what the gate of this machine heard of the members, asked with the owner's key.

    Raises:
        OSError: The gate does not answer, or this user may not read its certificate.
        GateRefused: The key is not valid.
    """
    channel, authorization = open_own_gate(settings)
    try:
        answer = channel.request("GET", "/v1/members", authorization=authorization)
    finally:
        channel.close()
    return [MemberBeat(**each) for each in answer["members"]]


def open_own_gate(settings: Settings) -> tuple[GateChannel, str]:
    """Return a channel to the gate of this machine, and the owner's authorization for it.

    Raises:
        OSError: This user may not read the certificate, or there is none yet.
    """
    known = known_by(settings.cluster_dir).cert
    context = pinned_context(known.read_text(encoding="ascii"))
    key = read_client_key(settings.keys_dir)
    return GateChannel(LOOPBACK, settings.port("gate"), context), f"Bearer {key}"


def choose_source(address: str | None, m1_addresses: Sequence[str], port: int) -> str | None:
    """Return the own address to talk from, if one was chosen.

    Raises:
        ConfigError: It is not an address of this machine; the text names those that are, and that
            of the route to M1.
    """
    if address is None:
        return None
    if is_own(address):
        return address
    try:
        route = f"; the route to M1 starts at {describe(route_source(m1_addresses[0], port))}"
    except OSError:
        route = ""
    own = ", ".join(map(str, own_addresses())) or "none"
    raise ConfigError(f"{address} is no address of this machine (own: {own}){route}", "--address")


def _by_verdict(reached: Mapping[int, Reach]) -> str:
    """Return ports with what came of them, the same said once."""
    ports: dict[str, list[str]] = {}
    for port, reach in sorted(reached.items()):
        ports.setdefault(str(reach), []).append(str(port))
    return "; ".join(f"{', '.join(listed)}: {verdict}" for verdict, listed in ports.items())


def _same(name: str, own: str, m1: str, same: bool, install: str) -> Check:
    if same:
        found = own if own == m1 else f"{own} (M1: {m1})"
        return Check(id=name, level="ok", found=found)
    return Check(id=name, level="fail", found=f"{own} here, {m1} on M1", fix=install)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GB" if count >= GIB else f"{count / MIB:.0f} MB"

"""The daemon: keeps the processes of one machine up, for ever.

On M1's machine these are the head, the control edge, a worker as long as nobody else works, and
the gate where other machines join; it also sees to it that C1 is deployed. On a machine that has
joined it is the worker alone, and a contact to M1's gate that tells when all is to stop.

It owns the processes below it and decides nothing about tasks. Its loop is one thread: look, reap,
start what is missing and due, check C1. If it is killed its members run on; the next daemon finds
them by ``state.json`` and adopts them.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from logging import Logger
from pathlib import Path
from typing import Any

from hcna_ray.config import LOOPBACK, MIB, Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import make_private_dir, write_private
from hcna_ray.security.authority import (
    Node,
    install_node,
    renewal_margin,
    trust_digest,
)
from hcna_ray.security.certs import load_cert
from hcna_ray.security.keys import ensure_owner_key, ensure_ray_token
from hcna_ray.supervisor import probe
from hcna_ray.supervisor.addresses import default_address, route_source
from hcna_ray.supervisor.backoff import restart_delay_s
from hcna_ray.supervisor.edge import edge_command
from hcna_ray.supervisor.edge_keeper import EdgeKeeper
from hcna_ray.supervisor.edge_log import EdgeLog
from hcna_ray.supervisor.firewall import Firewall, Peers, Role, clear
from hcna_ray.supervisor.gate import Gate
from hcna_ray.supervisor.gate_client import Contact, ask_gate
from hcna_ray.supervisor.gate_protocol import Json
from hcna_ray.supervisor.janitor import Janitor
from hcna_ray.supervisor.keeper import EXIT_TOLD_TO_STOP
from hcna_ray.supervisor.membership import (
    Membership,
    read_members,
    read_membership,
    write_membership,
)
from hcna_ray.supervisor.node_certs import (
    certificate_request,
    ensure_m1_node,
    ensure_member_node,
)
from hcna_ray.supervisor.ports import (
    FILES_MAX,
    accepts,
    head_command,
    is_free,
    marker_of,
    process_environment,
    taken_ports,
    worker_command,
)
from hcna_ray.supervisor.processes import (
    ProcessRef,
    become_subreaper,
    describe,
    identify,
    is_alive,
    reap,
    scan,
    send,
    stop,
)
from hcna_ray.supervisor.rounds import (
    Round,
    announce,
    complete,
    read_round,
    take_over,
    write_round,
)
from hcna_ray.supervisor.serve_proxy import serve_proxy_path, serve_proxy_script
from hcna_ray.supervisor.state import (
    CLUSTER_DOWN,
    RunLock,
    goodbye_done,
    goodbye_order,
    pending_restore,
    read_order,
    read_state,
    recorded_end,
    recorded_process,
    remove_run_files,
    write_cluster,
    write_ray_env,
    write_settings,
    write_state,
    write_supervisor,
)
from hcna_ray.supervisor.tracing import ship_traces

BOOTSTRAP_MODULE = "hcna_ray.runtime.bootstrap"

#: Exit codes of the daemon that `up` tells apart.
EXIT_FAILED = 1
EXIT_ALREADY_RUNNING = 3

_TICK_S = 0.2
#: A member that has run this long starts again with the shortest pause.
_STABLE_S = 60.0
#: After its start a member has this long until its port must accept connections.
_START_S = 60.0
#: How long ports may stay taken before that is said (again).
_PORTS_S = 15.0
#: Looks at a member's port, one each `ray.check_s`, that must fail before it is replaced.
_DEAF_CHECKS = 4
#: Looks at a head whose GCS has closed its port until that counts as an order to stop.
_CLOSED_CHECKS = 2
_BOOTSTRAP_S = 180.0
#: /ready may fail this often in a row before C1 is deployed again: a moderator restarts in 2 s.
_UNREADY_CHECKS = 2
_OUTPUT_BYTES_MAX = 8 * MIB
#: Pause between two runs of the janitor.
_TIDY_S = 60.0
#: Pause between two looks at this machine's certificate.
_CERTIFY_S = 3600.0
#: Pause between two looks at the files of the edge: a certificate taken back counts no more then.
_EDGE_S = 10.0
#: How long a worker's agent gets to end its work in good order.
_GOODBYE_S = 5.0
#: How long M1's machine stays to tell the others that all is to stop.
_TELL_S = 12.0
#: A machine that was told has this long, beside what its node may take to stop, to say that it has.
_LAST_WORD_S = 4.0
#: M1 waits this long for members to hand back their work before it starts again.
_ROUND_S = 20.0
#: Pause between two tries to get new credentials.
_FOLLOW_S = 3.0
#: A machine that asked to join takes the place of M1's own worker within this time, or not at all.
_YIELD_S = 60.0


class AlreadyRunning(HcnaError):
    """Another supervisor holds the lock of this home."""

    code = "already_running"


class PortsTaken(HcnaError):
    """Ports of this instance are in use by processes that are not its own."""

    code = "ports_taken"

    def __init__(self, ports: dict[int, str]) -> None:
        super().__init__(ports)
        self.ports = ports

    def __str__(self) -> str:
        listed = ", ".join(f"{port} ({name})" for port, name in sorted(self.ports.items()))
        first = min(self.ports)
        return (
            f"ports in use by other programs: {listed}; see who with: ss -ltnp 'sport = :{first}', "
            "or move this instance with HCNA_PORTS__OFFSET=1000"
        )


@dataclass(kw_only=True)
class Member:
    """One process that has to be up. ``port`` accepts connections when it works."""

    name: str
    #: Made anew at each start: the address of a laptop is another one in another network.
    command: Callable[[], Sequence[str]]
    port: int
    #: Ray node whose leftovers are cleared away before a new start; None for no Ray node.
    node: str | None
    #: Ports that must be free before it starts: a dead node's agents hold theirs for a while.
    own_ports: Sequence[int] = ()
    #: Further ports that must accept connections: `ray start --block` stays when its raylet left.
    also: Sequence[int] = ()
    #: Others, at addresses that need not be loopback.
    beyond: Sequence[tuple[str, int]] = ()
    #: Whether what it needs is there; asked before each start.
    after: Callable[[], bool] | None = None
    process: ProcessRef | None = None
    restarts: int = 0
    failures: int = 0
    started_at: float = 0.0
    not_before: float = 0.0
    deaf_checks: int = 0
    up: bool = False
    last_exit: int | None = None
    #: End of the certificate that its processes have read, seconds since the epoch.
    certificate_ends_at: float | None = None


@dataclass(kw_only=True)
class Bootstrap:
    """The run-to-completion child that brings up what lives inside Ray."""

    wanted: bool = True
    process: ProcessRef | None = None
    started_at: float = 0.0
    runs: int = 0
    failures: int = 0
    not_before: float = 0.0
    last_ok_at: float | None = None
    last_exit: int | None = None


@dataclass(kw_only=True)
class Supervisor:
    """Owns the processes of one machine. Invariant: at most one process per member."""

    settings: Settings
    log: Logger
    monotonic: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random
    members: list[Member] = field(default_factory=list)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    ready: bool = False
    #: Set on a machine that has joined another one's cluster.
    membership: Membership | None = None
    gate: Gate | None = None
    contact: Contact | None = None
    #: Who may reach Ray's ports; None before they are about to be opened.
    firewall: Firewall | None = None
    peers: Peers = field(default_factory=Peers)
    edge_keeper: EdgeKeeper | None = None
    edge_log: EdgeLog | None = None
    #: All machines are to stop, not only this one.
    cluster_down: bool = False
    _unready_checks: int = 0
    #: Until when M1's own worker stays away, for a machine that is about to take its place.
    _yield_until: float = 0.0
    _look_at_members: threading.Event = field(default_factory=threading.Event)
    _yielded: threading.Event = field(default_factory=threading.Event)
    _told: str | None = None
    _next_check_at: float = 0.0
    _next_tidy_at: float = 0.0
    _next_certify_at: float = 0.0
    _next_edge_at: float = 0.0
    _edge_trouble: str = ""
    _certificate_trouble: str = ""
    _certificate_failures: int = 0
    _round_announced: threading.Event = field(default_factory=threading.Event)
    #: Until when the members are waited for.
    _round_until: float = 0.0
    _next_follow_at: float = 0.0
    #: What M1 answered to the beats up to this one has been followed, or knows nothing of it.
    _followed: int = 0
    _written: dict[str, Any] = field(default_factory=dict)
    _letting_in: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _exit_codes: dict[int, int] = field(default_factory=dict)

    def run(self) -> None:
        """Keep everything up until `stop_soon`; then stop it all and leave nothing.

        Raises:
            AlreadyRunning: Another supervisor holds the lock of this home.
            PortsTaken: A port is in use by a program that is not ours.
        """
        run_dir = self.settings.run_dir
        lock = RunLock(run_dir)
        if not lock.acquire():
            raise AlreadyRunning(f"a supervisor is running already for {self.settings.home}")
        try:
            shipper = None
            try:
                self._prepare()
                shipper = ship_traces(self.settings, self.log)
                while not self._stopping.is_set():
                    self.tick()
                    self._stopping.wait(_TICK_S)
            finally:
                self.cluster_down |= read_order(run_dir) == CLUSTER_DOWN
                self.stop_all()
                if shipper is not None:
                    shipper.stop()
                remove_run_files(run_dir)
        finally:
            lock.release()

    def stop_soon(self) -> None:
        """Ask `run` to stop everything and return. May be called from a signal handler."""
        self._stopping.set()

    def tick(self) -> None:
        """Look once at everything and do what is due."""
        now = self.monotonic()
        self._reap()
        if self.contact is not None:
            self._obey(self.contact.order)
            self._follow(self.contact.facts, now)
        elif self._round_announced.is_set():
            self._lead_round(now)
        if self._look_at_members.is_set() or now >= self._yield_until > 0:
            self._look_at_members.clear()
            self._settle_local_worker(now)
        for member in list(self.members):
            self._look_after(member, now)
        if now >= self._next_check_at:
            self._next_check_at = now + self.settings.ray.check_s
            self._let_in()
            self._check(now)
        if now >= self._next_tidy_at:
            self._next_tidy_at = now + _TIDY_S
            self._tidy()
            self.peers.forget_names()
            if self.firewall is not None:
                self.firewall.look_after()
        if now >= self._next_certify_at:
            self._certified()
            self._replace_old_nodes()
        if now >= self._next_edge_at and self.edge_keeper is not None:
            self._next_edge_at = now + _EDGE_S
            self._refresh_edge(self.edge_keeper)
        self._run_bootstrap(now)
        self._record()

    def stop_all(self) -> None:
        """Stop C1's entrance first, then the worker, then the head, then whatever is left.

        If all machines are to stop, the others are told, and waited for until they have.
        """
        settings, marker = self.settings, marker_of(self.settings)
        term_s = settings.ray.stop_s
        self._say("stopping", "supervisor.stopping")
        if self.gate is not None and self.cluster_down:
            self.gate.announce_down()
        tell_until = self.monotonic() + _TELL_S
        if self.bootstrap.process is not None:
            stop([self.bootstrap.process], term_s=1.0)
        by_name = {member.name: member for member in self.members}
        for name in ("edge", "worker", "head"):
            member = by_name.get(name)
            if member is None or member.process is None:
                continue
            if name == "worker" and self.membership is not None and not self.cluster_down:
                self._say_goodbye()
            left = stop([member.process], term_s=term_s)
            self._reap()
            self._say(
                f"{name} stopped" if not left else f"{name} did not stop",
                "member.stopped",
                member=name,
            )
        if self.members:
            left = stop(scan(marker), term_s=1.0)
            self._reap()
            for process in left:
                self.log.error(
                    "process survived", extra={"action": "stop.left", "left": describe(process)}
                )
        if self.contact is not None:
            self.contact.stop()
        if self.edge_log is not None:
            self.edge_log.stop()
        if self.gate is not None:
            if self.cluster_down:
                self._wait_for_the_others(tell_until)
            self.gate.stop()
        if self.firewall is not None:
            self.firewall.remove()
        elif problem := clear(settings):
            self.log.error(
                "the firewall's rules are left", extra={"action": "firewall.left", "error": problem}
            )
        if self.contact is not None and self.cluster_down:
            self._say_stopped()

    def _wait_for_the_others(self, tell_until: float) -> None:
        """Wait until the machines that hear it have stopped, each as long as it may take."""
        assert self.gate is not None
        self.gate.wait_all_told(max(0.0, tell_until - self.monotonic()))
        until = tell_until + self.settings.ray.stop_s + _LAST_WORD_S
        for name in self.gate.wait_all_stopped(max(0.0, until - self.monotonic())):
            self.log.warning(
                "%s was told to stop and has not said that it has",
                name,
                extra={"action": "cluster.silent", "worker": name},
            )

    def _say_stopped(self) -> None:
        """Tell M1, which waits for it, that nothing of this machine's part is left."""
        try:
            self._ask_m1("/v1/stopped", {})
        except (HcnaError, OSError) as error:
            self.log.info(
                "M1 was not told that this machine has stopped",
                extra={"action": "cluster.untold", "error": str(error)},
            )

    # -- other machines -----------------------------------------------------------------------

    def _ask_m1(self, path: str, body: Json) -> Json:
        """Return M1's answer to one request of this member, wherever M1 is by now.

        Raises:
            HcnaError: It cannot be reached, or refused.
            OSError: It did not answer.
        """
        membership = self.membership
        assert membership is not None
        if self.contact is not None:
            membership = replace(membership, m1_addresses=self.contact.addresses)
        return ask_gate(membership, path, body)

    def prepare_place(self, worker: str) -> None:
        """Free a worker's name for a machine that joins: M1's own worker yields (any thread).

        Returns when it has stopped; what it was running is queued again.
        """
        if worker != self.settings.worker.name:
            return
        self._yielded.clear()
        self._yield_until = self.monotonic() + _YIELD_S
        self._look_at_members.set()
        self._yielded.wait(timeout=_YIELD_S / 2)

    def members_changed(self) -> None:
        """Look again who is a member (any thread)."""
        self._yield_until = 0.0
        self._look_at_members.set()

    def origins_changed(self) -> None:
        """Let in at Ray's ports whoever is a member now (any thread)."""
        self._let_in()

    def _let_in(self) -> None:
        """Let the cluster's machines in at Ray's ports, where hcna may, and nobody else."""
        if self.firewall is None:
            return
        try:
            with self._letting_in:  # Or what is older might be set last.
                self.firewall.let_in(self._origins())
        except HcnaError as error:  # The list of members; what it said before stays in force.
            self.log.error(str(error), extra={"action": "firewall.trouble"})

    def _origins(self) -> frozenset[str]:
        """Return the addresses of the cluster's other machines."""
        if self.membership is None:
            return self.gate.origins() if self.gate is not None else frozenset()
        facts = self.contact.facts if self.contact is not None else {}
        return self.peers.of(self.membership, facts)

    def local_worker(self) -> str | None:
        """Return the name that M1's own worker holds for good, or None if it would yield it."""
        if self.settings.moderator.local_worker == "always":
            return self.settings.worker.name
        return None

    def _wants_local_worker(self, now: float) -> bool:
        match self.settings.moderator.local_worker:
            case "always":
                return True
            case "never":
                return False
            case _:
                return now >= self._yield_until and not read_members(self.settings.cluster_dir)

    def _settle_local_worker(self, now: float) -> None:
        """Start or stop M1's own worker: it works as long as nobody else does."""
        wanted = self._wants_local_worker(now)
        if now >= self._yield_until:
            self._yield_until = 0.0
        present = self._member("worker")
        if wanted and present is None:
            self.members.append(self._plan_worker())
        elif not wanted and present is not None:
            if present.process is not None:
                self._say("the worker of this machine makes room", "member.yields")
                self._say_goodbye()
                stop([present.process], term_s=self.settings.ray.stop_s)
                stop(scan(marker_of(self.settings), node=present.node), term_s=1.0)
                self._reap()
            self.members.remove(present)
        self._yielded.set()

    def _say_goodbye(self) -> None:
        """Let the worker's agent hand back its work, so that nobody has to wait for a lease."""
        done = goodbye_done(self.settings.run_dir)
        done.unlink(missing_ok=True)
        order = goodbye_order(self.settings.run_dir)
        write_private(order, "stop\n")
        end = self.monotonic() + _GOODBYE_S
        while not done.exists() and self.monotonic() < end:
            self._reap()
            time.sleep(0.05)
        order.unlink(missing_ok=True)
        done.unlink(missing_ok=True)

    def _obey(self, order: str | None) -> None:
        """Do what M1's gate says: stop with all the others, or for good."""
        if order in (None, "up") or order == self._told:
            return
        self._told = order
        if order == "down":
            self._say("M1 was told to stop the cluster: this machine stops too", "cluster.down")
            self.cluster_down = True
        else:
            self.log.error(
                "M1 does not know this machine any more: it stops; to come back: hcna join CODE",
                extra={"action": "cluster.removed"},
            )
        self._stopping.set()

    # -- new credentials ----------------------------------------------------------------------

    def round_announced(self) -> None:
        """Restart Ray with new credentials as soon as the members have them (any thread)."""
        self._round_announced.set()

    def _lead_round(self, now: float) -> None:
        """On M1: wait a little for the members, then have the head start anew."""
        assert self.gate is not None
        if now < self._next_follow_at:
            return
        if not self._round_until:
            self._round_until = now + _ROUND_S
            self._say("waiting for the members to take over new credentials", "credentials.wait")
        number = read_round(self.settings.cluster_dir).number
        if now < self._round_until and not self.gate.caught_up(number):
            return
        worker, head = self._member("worker"), self._member("head")
        assert head is not None
        if worker is not None and worker.process is not None:
            self._say_goodbye()
        self._end_what_the_head_held()
        self._end(head)
        try:
            take_over(self.settings.cluster_dir, self.settings.keys_dir)
        except (HcnaError, OSError) as error:  # A full disk: again in a moment, with the old ones.
            self._next_follow_at = head.not_before = now + _FOLLOW_S
            self.log.error(str(error), extra={"action": "credentials.trouble"})
            return
        self._round_until = 0.0
        self._round_announced.clear()
        self._certified(anew=True)
        self.ready = False
        self._say("Ray starts again with new credentials", "credentials.taken", round=number)

    def _follow(self, told: Mapping[str, Any], now: float) -> None:
        """On a member: take over what M1's gate says is new."""
        assert self.contact is not None
        number, beat = told.get("round"), int(told.get("beat", 0))
        if beat <= self._followed or not isinstance(number, int) or now < self._next_follow_at:
            return
        directory = self.settings.cluster_dir
        behind = number != read_round(directory).number or told.get("stale") is True
        believed, counting = trust_digest(directory), told.get("trust")
        # Where there is none yet one is asked for before Ray starts.
        others = bool(believed) and counting not in (None, "", believed)
        wanted = behind or others or told.get("renew") is True
        try:
            if wanted:
                self._next_follow_at = now + _FOLLOW_S
            if behind:
                self._take_credentials(number)
            elif wanted:

                def taken(answer: Mapping[str, Any]) -> None:
                    # Only now: a worker that cannot have another one goes on with the one it has.
                    named = sha256(str(answer.get("trust_pem")).encode()).hexdigest()
                    if others and named != counting:
                        raise HcnaError("M1 says that other authorities count, and names none")
                    self._stop_worker("this machine's worker starts again with a new certificate")

                self._certify(anew=True, on_answer=taken)
            # It took a while, and M1 has answered meanwhile to what is no longer so.
            self._followed = self.contact.begun if wanted else beat
        except (HcnaError, OSError) as error:
            self.log.error(str(error), extra={"action": "credentials.trouble"})

    def _take_credentials(self, number: int) -> None:
        """Fetch this round's credentials, hand back what runs, and take them into use."""
        settings, membership, contact = self.settings, self.membership, self.contact
        assert membership is not None
        assert contact is not None
        name, address = membership.name, self._own_address()
        request = certificate_request(settings.cluster_dir, name, address)
        answer = self._ask_m1("/v1/credentials", request)
        for field_name in ("ray_token", "cert_pem", "trust_pem", "ca_pem"):
            if not isinstance(answer.get(field_name), str) or not answer[field_name]:
                raise HcnaError(f"M1's answer lacks {field_name}: are both of one version?")
        self._stop_worker("this machine's worker starts again with new credentials")
        write_private(settings.keys_dir / "ray.token", answer["ray_token"])
        install_node(settings.cluster_dir, answer["cert_pem"], answer["trust_pem"])
        self.membership = replace(membership, ca_pem=answer["ca_pem"])
        write_membership(settings.cluster_dir, self.membership)
        contact.trust(self.membership)
        # Last: whoever is cut off before asks again.
        write_round(settings.cluster_dir, Round(number=int(answer.get("round", number))))

    def _stop_worker(self, why: str) -> None:
        """End the worker's node in good order; it starts again at the next occasion."""
        worker = self._member("worker")
        if worker is None or worker.process is None:
            return
        self._say(why, "worker.renewed", member=worker.name)
        self._say_goodbye()
        self._end(worker)

    # -- the parts of a tick ------------------------------------------------------------------

    def _member(self, name: str) -> Member | None:
        return next((one for one in self.members if one.name == name), None)

    def _end(self, member: Member) -> None:
        """End a member; it starts again with the next tick."""
        if member.process is not None:
            stop([member.process], term_s=self.settings.ray.stop_s)
        self._reap()
        member.process, member.up, member.not_before = None, False, 0.0

    def _prepare(self) -> None:
        settings = self.settings
        if (cut_off := pending_restore(settings.run_dir)) is not None:
            raise HcnaError(cut_off)
        become_subreaper()
        _raise_file_limit()
        me = identify(os.getpid())
        assert me is not None
        write_supervisor(settings.run_dir, me)
        for path in (goodbye_order(settings.run_dir), goodbye_done(settings.run_dir)):
            path.unlink(missing_ok=True)
        self.membership = read_membership(settings.cluster_dir)
        if self.membership is None and read_round(settings.cluster_dir).pending:
            # The last supervisor came no further. What runs of it has the old token.
            stop(scan(marker_of(settings)), term_s=2.0)
            self._reap()
            complete(settings.cluster_dir, settings.keys_dir)
        members = self._plan_members()
        self._adopt(members)
        if not any(member.process for member in members):
            left = stop(scan(marker_of(settings)), term_s=2.0)
            self._reap()
            taken = taken_ports(settings, worker_only=self.membership is not None)
            if taken:
                raise PortsTaken(taken)
            if left:
                self.log.error("processes of an earlier run survive", extra={"count": len(left)})
        self.members = members
        _private_temp_dir(marker_of(settings).temp_dir)
        for directory in (settings.logs_dir, settings.outbox_dir, settings.artifacts_dir):
            make_private_dir(directory)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        write_settings(settings)
        write_ray_env(settings, self._head_address())
        if self.membership is None:
            self._prepare_head()
        else:
            self.contact = Contact(settings, self.membership, self.log)
            self.contact.start()
        role: Role = "head" if self.membership is None else "worker"
        self.firewall = Firewall(settings, role, self.log)
        self.firewall.open_for(self._origins())
        for warning in settings.warnings():
            self.log.warning(warning, extra={"action": "settings.warning"})

    def _adopt(self, members: Sequence[Member]) -> None:
        """Find what an earlier supervisor left running; nothing of it if Ray runs in clear."""
        state = read_state(self.settings.run_dir)
        for member in members:
            member.process = recorded_process(state, member.name)
            member.certificate_ends_at = recorded_end(state, member.name)
        if any(
            one.process is not None and one.node is not None and one.certificate_ends_at is None
            for one in members
        ):
            self._say("what runs is of a version without TLS, all starts anew", "member.in_clear")
            for member in members:
                member.process = None
        for member in members:
            if member.process is not None:
                member.started_at = self.monotonic()
                self._say(f"found {member.name} running", "member.adopted", member=member.name)

    def _prepare_head(self) -> None:
        settings = self.settings
        settings.check_start()
        ensure_owner_key(settings.keys_dir, now=time.time())
        ensure_ray_token(settings.keys_dir)
        self._certify()
        if settings.has_edge and settings.composite.edge.access_log:
            self.edge_log = EdgeLog.of(settings)
            self.edge_log.start()
        self.edge_keeper = EdgeKeeper(settings)
        self.edge_keeper.prepare(now=datetime.now(UTC))
        if settings.has_edge:
            self._reload_edge()  # One of an earlier supervisor may have missed something.
        proxy = serve_proxy_path(settings.run_dir)
        write_private(proxy, serve_proxy_script())
        proxy.chmod(0o700)
        write_cluster(settings, started_at=time.time())
        self.gate = Gate(
            settings,
            self.log,
            local_worker=self.local_worker,
            prepare=self.prepare_place,
            members_changed=self.members_changed,
            ready=lambda: self.ready,
            rotated=self.round_announced,
            origins_changed=self.origins_changed,
        )
        self.gate.start()

    def _certify(
        self,
        *,
        anew: bool = False,
        on_answer: Callable[[Mapping[str, Any]], None] = lambda answer: None,
    ) -> None:
        """Have the certificate of this machine's node be one that will do; tell of a new one.

        Raises:
            HcnaError: The authority cannot be used, the settings name files that cannot be used,
                or M1 refused.
            OSError: M1 cannot be reached, or the disk refused.
        """
        self._next_certify_at = self.monotonic() + _CERTIFY_S
        settings, membership, now = self.settings, self.membership, datetime.now(UTC)
        node = Node.of(settings.cluster_dir)
        before = node.pem.read_bytes() if node.pem.exists() else b""
        if membership is None:
            ensure_m1_node(settings, now=now, anew=anew)
        else:
            ensure_member_node(
                settings,
                membership.name,
                self._own_address(),
                ask=lambda body: self._ask_m1("/v1/certificate", body),
                now=now,
                anew=anew,
                on_answer=on_answer,
            )
        if node.pem.read_bytes() != before:
            cert = load_cert(node.pem)
            self._say(
                "this machine has a new certificate",
                "certificate.new",
                serial=f"{cert.serial_number:x}",
                expires_at=cert.not_valid_after_utc.isoformat(),
            )

    def _replace_old_nodes(self) -> None:
        """Have Ray's processes read a renewed certificate while the one that they hold is good.

        It was renewed when a third of its life was left, 30 days at most; half of that time they
        get to start again for another reason. Only the one that they hold counts: a laptop gets
        another file with every network.
        """
        try:
            cert = load_cert(Node.of(self.settings.cluster_dir).pem)
        except HcnaError:
            return
        ends_at, margin_s = cert.not_valid_after_utc, renewal_margin(cert).total_seconds()
        held = [one.certificate_ends_at for one in self.members if one.node and one.process]
        if not any(
            end is not None and end < ends_at.timestamp() and time.time() >= end - margin_s / 2
            for end in held
        ):
            return
        if self.membership is not None:
            self._stop_worker("this machine's worker starts again with its renewed certificate")
        elif not read_round(self.settings.cluster_dir).pending:
            directory, keys_dir = self.settings.cluster_dir, self.settings.keys_dir
            try:
                announce(directory, keys_dir, "certificates", now=time.time())
            except (HcnaError, OSError) as error:  # The owner was faster, or the disk is full.
                self.log.error(str(error), extra={"action": "credentials.trouble"})
                return
            self.round_announced()

    def _certified(self, *, anew: bool = False) -> bool:
        """Look after the certificate; whether it will do. Trouble is logged, once per sort."""
        try:
            self._certify(anew=anew)
        except (HcnaError, OSError) as error:
            if str(error) != self._certificate_trouble:
                self.log.error(str(error), extra={"action": "certificate.trouble"})
            self._certificate_trouble = str(error)
            self._certificate_failures += 1
            return False
        self._certificate_trouble, self._certificate_failures = "", 0
        return True

    def _refresh_edge(self, keeper: EdgeKeeper) -> None:
        """Have the edge read its files anew if they have changed; trouble is told once."""
        trouble = ""
        try:
            if keeper.refresh(now=datetime.now(UTC)):
                self._reload_edge()
        except (HcnaError, OSError, subprocess.SubprocessError) as error:
            trouble = str(error)
            if trouble != self._edge_trouble:
                self.log.error(trouble, extra={"action": "edge.trouble"})
        self._edge_trouble = trouble

    def _reload_edge(self) -> None:
        """Let the edge read its files anew. What is on its way is ended by the old process."""
        edge = next((one for one in self.members if one.name == "edge"), None)
        if edge is None or edge.process is None:
            return
        send(edge.process, signal.SIGUSR2)
        self._say("the edge reads its certificates and settings anew", "edge.reloaded")

    def _plan_members(self) -> list[Member]:
        settings = self.settings
        if self.membership is not None:
            return [self._plan_worker()]
        members = [
            Member(
                name="head",
                command=lambda: head_command(
                    settings, address=self._own_address(), memory=_memory(), shared=_shared()
                ),
                port=settings.port("gcs"),
                node=settings.moderator.name,
                own_ports=[settings.port("gcs"), settings.port("dashboard"), *self._ports("head")],
                also=[settings.port("head_node_manager")],
            ),
            Member(
                name="edge",
                command=lambda: edge_command(settings),
                port=settings.control_port,
                node=None,
                beyond=[_entrance(settings)] if settings.has_edge else [],
            ),
        ]
        if self._wants_local_worker(self.monotonic()):
            members.insert(1, self._plan_worker())
        return members

    def _plan_worker(self) -> Member:
        settings = self.settings
        return Member(
            name="worker",
            command=lambda: worker_command(
                settings,
                head=self._head_address(),
                address=self._own_address(),
                cpus=len(os.sched_getaffinity(0)),
                memory=_memory(),
                shared=_shared(),
            ),
            port=settings.port("worker_node_manager"),
            node=settings.worker.name,
            own_ports=self._ports("worker"),
            after=self._head_is_up,
        )

    def _head_address(self) -> str:
        """Return Ray's address on M1, ``host:port``. M1 may have moved since."""
        if self.membership is None:
            return self.settings.ray_address
        told = self.contact.facts.get("ray_address") if self.contact is not None else None
        return str(told or self.membership.ray_address)

    def _head_is_up(self) -> bool:
        if self.membership is None:
            return accepts(self.settings.port("head_node_manager"))
        if self.contact is not None and self.contact.facts.get("hold") is True:
            return False  # This head is about to end.
        host, _, port = self._head_address().rpartition(":")
        return accepts(int(port), host=host)

    def _own_address(self) -> str:
        """Return this machine's address for the others, as of now."""
        if self.settings.ray.node_address is not None:
            return self.settings.ray.node_address
        if self.membership is None:
            return default_address()
        if self.membership.address is not None:
            return self.membership.address
        host, _, port = self._head_address().rpartition(":")
        return route_source(host, int(port))

    def _ports(self, role: str) -> list[int]:
        """Return the ports of a Ray node's own processes."""
        names = ("node_manager", "object_manager", "agent_http", "agent_grpc", "runtime_env_agent")
        return [self.settings.port(f"{role}_{name}") for name in names]

    def _reap(self) -> None:
        """Collect every ended child and orphan; remember the codes for the log."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            code = reap(ended.si_pid)
            if code is not None:
                self._exit_codes[ended.si_pid] = code

    def _look_after(self, member: Member, now: float) -> None:
        if member.process is not None and not is_alive(member.process):
            self._bury(member, now)
        if member.process is not None or now < member.not_before:
            return
        if member.after is not None and not member.after():
            # M1 is away. Ask again after a while: its machine may be off for days.
            member.not_before = now + min(2.0, self.settings.ray.check_s)
            return
        if member.node is not None:
            stop(scan(marker_of(self.settings), node=member.node), term_s=1.0)
            self._reap()
        if not all(is_free(port) for port in member.own_ports):
            if now >= member.not_before + _PORTS_S:
                self.log.error(
                    "ports of %s are still taken",
                    member.name,
                    extra={"action": "member.ports_taken", "member": member.name},
                )
                member.not_before = now
            return
        if member.name == "head":
            # With this file `ray start` takes its predecessor for alive while a worker's raylet is.
            (marker_of(self.settings).temp_dir / "ray_current_cluster").unlink(missing_ok=True)
        if member.node is not None:
            if not self._certified():
                # Ray's processes would not come beyond their first connection.
                member.not_before = now + restart_delay_s(
                    self._certificate_failures, first_s=2.0, max_s=60.0, draw=self.draw()
                )
                return
            cert = load_cert(Node.of(self.settings.cluster_dir).pem)
            member.certificate_ends_at = cert.not_valid_after_utc.timestamp()
        try:
            command = member.command()
        except OSError as error:  # No network just now.
            self.log.warning(
                "no address for %s yet",
                member.name,
                extra={"action": "member.no_address", "error": str(error)},
            )
            member.not_before = now + 2.0
            return
        member.process = self._spawn(command, name=member.name, node=member.node)
        member.started_at, member.deaf_checks, member.up = now, 0, False
        self._say(f"starting {member.name}", "member.started", member=member.name)
        if member.name == "head":
            self.bootstrap.wanted, self.bootstrap.not_before = True, 0.0
            self.ready = False

    def _bury(self, member: Member, now: float) -> None:
        assert member.process is not None
        self._reap()  # It may have ended since the last time, and its code is wanted.
        member.last_exit = self._exit_codes.pop(member.process.pid, None)
        member.failures = 1 if now - member.started_at > _STABLE_S else member.failures + 1
        delay_s = restart_delay_s(
            member.failures,
            first_s=self.settings.ray.restart_backoff_s,
            max_s=self.settings.ray.restart_backoff_max_s,
            draw=self.draw(),
        )
        member.process, member.up = None, False
        member.not_before, member.restarts = now + delay_s, member.restarts + 1
        self.log.error(
            "%s ended, will start again",
            member.name,
            extra={
                "action": "member.died",
                "member": member.name,
                "exit_code": member.last_exit,
                "delay_s": round(delay_s, 3),
                "output": _tail(self.settings.logs_dir / f"{member.name}.out"),
            },
        )

        if member.name == "head":
            if member.last_exit == EXIT_TOLD_TO_STOP:
                self._told_to_stop()
            self._end_what_the_head_held()

    def _is_ending(self, head: Member) -> bool:
        """Whether the head's GCS has closed its port in good order.

        One that crashed takes its node with it at once; one that runs and listens no more was told
        to end, and may take its time for it.
        """
        assert head.process is not None
        waited = head.up and head.deaf_checks >= _CLOSED_CHECKS
        return waited and not accepts(head.port) and is_alive(head.process)

    def _told_to_stop(self) -> None:
        """Do what `ray stop` and `ray down` mean on M1's machine: the whole cluster ends."""
        self._say("Ray was told to stop: so does the cluster", "cluster.down")
        self.cluster_down = True
        self._stopping.set()

    def _end_what_the_head_held(self) -> None:
        """End the worker's node and the deployment of a head that is gone.

        The next head is another cluster to them: the raylet would leave by itself after 10 s, and a
        driver would wait for the old one for minutes. Outcomes are safe in the worker's outbox.
        """
        if self.bootstrap.process is not None:
            stop([self.bootstrap.process], term_s=0)
            self.bootstrap.process = None
        for member in self.members:
            if member.node is not None and member.process is not None:
                stop([member.process], term_s=self.settings.ray.stop_s)
                member.process, member.up = None, False
                self._say(f"{member.name} stopped, its head is gone", "member.stopped")

    def _check(self, now: float) -> None:
        """See whether members listen and C1 is ready; replace the deaf, deploy C1 again."""
        for member in self.members:
            if member.process is None:
                continue
            if _listens(member):
                member.deaf_checks = 0
                if not member.up:
                    member.up = True
                    self._say(f"{member.name} is up", "member.up", member=member.name)
                continue
            member.deaf_checks += 1
            if member.name == "head" and self._is_ending(member):
                self._told_to_stop()
                return
            patience = _START_S if not member.up else 0.0
            if member.deaf_checks >= _DEAF_CHECKS and now - member.started_at > patience:
                self.log.error(
                    "%s no longer listens, is replaced",
                    member.name,
                    extra={"action": "member.deaf", "member": member.name, "port": member.port},
                )
                stop([member.process], term_s=self.settings.ray.stop_s)
        if self.membership is not None:
            host, port = self.settings.worker_host, self.settings.worker_port
            self.ready = probe.is_connected(host, port)
            return
        was_ready = self.ready
        self.ready = probe.is_ready(self.settings.serve_host, self.settings.serve_port)
        if self.ready and not was_ready:
            self._say("C1 is ready", "composite.ready")
        self._unready_checks = 0 if self.ready else self._unready_checks + 1
        if self._unready_checks >= _UNREADY_CHECKS and self.bootstrap.process is None:
            why = set(probe.why_not_ready(self.settings.serve_host, self.settings.serve_port))
            if why and why <= probe.STORE_REASONS:
                self._wait_for_store(why)
            else:
                self.bootstrap.wanted = True

    def _wait_for_store(self, why: set[str]) -> None:
        """C1 and M1 are there: to deploy them again brings no store back."""
        if self._unready_checks == _UNREADY_CHECKS:
            self._say(f"waiting for the task store: {', '.join(sorted(why))}", "store.away")

    def _run_bootstrap(self, now: float) -> None:
        job = self.bootstrap
        if job.process is not None:
            if is_alive(job.process):
                if now - job.started_at > _BOOTSTRAP_S:
                    send(job.process, signal.SIGKILL)
                return
            self._reap()
            job.last_exit = self._exit_codes.pop(job.process.pid, None)
            job.process = None
            if job.last_exit == 0:
                job.failures, job.last_ok_at = 0, time.time()
                self._say("moderator, agents and C1 are deployed", "bootstrap.done")
                # Give C1 time to answer before it is found missing again.
                self._unready_checks = -_UNREADY_CHECKS
                return
            job.failures += 1
            delay_s = restart_delay_s(job.failures, first_s=1.0, max_s=30.0, draw=self.draw())
            job.wanted, job.not_before = True, now + delay_s
            self.log.error(
                "deployment failed, will try again",
                extra={
                    "action": "bootstrap.failed",
                    "exit_code": job.last_exit,
                    "delay_s": round(delay_s, 3),
                    "output": _tail(self.settings.logs_dir / "bootstrap.out"),
                },
            )
        if not job.wanted or now < job.not_before:
            return
        # It waits for the head itself: what it needs for that it imports while the head starts.
        head = self._member("head")
        if self.membership is not None or head is None or head.process is None:
            return
        job.wanted, job.runs, job.started_at = False, job.runs + 1, now
        command = [
            sys.executable,
            "-m",
            BOOTSTRAP_MODULE,
            "--ray-address",
            self.settings.ray_address,
        ]
        job.process = self._spawn(command, name="bootstrap", node=None)
        self._say("deploying moderator, agents and C1", "bootstrap.started")

    def _tidy(self) -> None:
        report = Janitor.of(self.settings, marker_of(self.settings).temp_dir).run(time.time())
        if report:
            self._say("old logs deleted", "janitor.done", **asdict(report))

    def _spawn(self, command: Sequence[str], *, name: str, node: str | None) -> ProcessRef | None:
        output = self.settings.logs_dir / f"{name}.out"
        make_private_dir(output.parent)
        too_long = output.exists() and output.stat().st_size > _OUTPUT_BYTES_MAX
        with output.open("wb" if too_long else "ab") as stream:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=process_environment(self.settings, os.environ, node=node),
                cwd=self.settings.home,
                start_new_session=True,
            )
        process = identify(child.pid)
        child.returncode = 0  # Reaped by `_reap`; the object must neither wait nor complain.
        return process

    def _record(self) -> None:
        job = self.bootstrap
        state: dict[str, Any] = {
            "pid": os.getpid(),
            "role": "head" if self.membership is None else "worker",
            "ready": self.ready,
            "firewall": self.firewall.describe() if self.firewall is not None else None,
            "members": {
                member.name: {
                    "pid": member.process.pid if member.process else None,
                    "started_ticks": member.process.started_ticks if member.process else None,
                    "up": member.up,
                    "port": member.port,
                    "restarts": member.restarts,
                    "last_exit": member.last_exit,
                    "certificate_ends_at": member.certificate_ends_at,
                }
                for member in self.members
            },
            "bootstrap": {
                "runs": job.runs,
                "failures": job.failures,
                "last_ok_at": job.last_ok_at,
                "last_exit": job.last_exit,
            },
        }
        if state != self._written:
            write_state(self.settings.run_dir, state)
            self._written = state

    def _say(self, message: str, action: str, **fields: Any) -> None:
        self.log.info(message, extra={"action": action, **fields})


def _listens(member: Member) -> bool:
    """Whether all ports of a member accept connections."""
    places = [(LOOPBACK, port) for port in (member.port, *member.also)]
    return all(accepts(port, host=host) for host, port in (*places, *member.beyond))


def _entrance(settings: Settings) -> tuple[str, int]:
    """Return where this machine reaches C1's public entrance."""
    everywhere = {"0.0.0.0": LOOPBACK, "::": "::1"}
    return everywhere.get(settings.api_host, settings.api_host), settings.api_port


def _memory() -> int:
    """Return the memory of this machine, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shared() -> int:
    """Return the free bytes of ``/dev/shm``."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0


def _raise_file_limit() -> None:
    """Let all below open as many files as allowed: a waiting client is one in several processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _private_temp_dir(path: Path) -> None:
    """Make Ray's temporary directory ours alone; /tmp is everybody's."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if path.is_symlink() or found.st_uid != os.getuid():
        raise HcnaError(f"{path} belongs to somebody else; set ray.temp_dir to another directory")
    path.chmod(0o700)
    make_private_dir(path / "serve")


def _tail(path: Path, *, size_bytes: int = 2000) -> str:
    """Return the end of a text file, or '' if it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - size_bytes))
            return stream.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""

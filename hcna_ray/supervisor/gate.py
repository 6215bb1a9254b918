"""The gate: the one door of M1 for machines that join, beat and leave. HTTPS, JSON, bounded.

It runs in M1's supervisor. Whoever comes with a join code may ask for a check of the way between
the two machines (``preflight``) and join; a member beats every few seconds and is told whether the
cluster is up; a member that goes is drained first. Nothing about tasks passes here.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from logging import Logger
from pathlib import Path
from typing import Any

from hcna_ray import failpoints
from hcna_ray.config import LOOPBACK, Settings, names_here, shared_part
from hcna_ray.core.errors import HcnaError
from hcna_ray.runtime.refusals import RefusalBook
from hcna_ray.security.acts import leave
from hcna_ray.security.authority import (
    CertificateRefused,
    RolloverRefused,
    ensure_trust,
    gate_trust,
    is_rolling_over,
    list_issued,
    sign_request,
    trust_digest,
)
from hcna_ray.security.certs import ensure_server, fingerprint, known_by, serial_and_end
from hcna_ray.security.keys import ensure_ray_token, load_keys, verify
from hcna_ray.security.own_certs import OwnCertificateRefused, names_in
from hcna_ray.supervisor.addresses import default_address, outward_addresses, own_addresses
from hcna_ray.supervisor.c1_calls import drain_worker, forget_worker
from hcna_ray.supervisor.gate_fields import (
    credential_of,
    number_of,
    origin_told,
    pem_of,
    ports_of,
    text_of,
    texts_of,
)
from hcna_ray.supervisor.gate_protocol import (
    ADDRESSES_MAX,
    CLOCK_SKEW_S_MAX,
    DOWN,
    GATE_NAME,
    PRESENT_S,
    UP,
    GateRefused,
    Json,
    Versions,
    own_versions,
    parse_versions,
)
from hcna_ray.supervisor.gate_server import GateServer
from hcna_ray.supervisor.invites import Invite, InviteRefused, check_invite, redeem
from hcna_ray.supervisor.membership import (
    Member,
    NameRefused,
    NameTaken,
    add_member,
    choose_name,
    digest,
    find_member,
    move_member,
    new_token,
    node_id_for,
    read_members,
    remove_member,
)
from hcna_ray.supervisor.node_certs import grantable, names_of
from hcna_ray.supervisor.ports import ray_tuning_hash
from hcna_ray.supervisor.reach import Listeners, try_ports
from hcna_ray.supervisor.rounds import (
    REASONS,
    RoundRefused,
    begin,
    expected_token_digest,
    read_round,
    token_for_members,
)

_CONNECT_BACK_S = 2.0
#: How long M1 listens on ports that it opened for a check.
_OPENED_S = 15.0
_DRAIN_S_MAX = 3600.0
#: Addresses and reasons of refusals that are told apart, and lines of them in a minute.
_REFUSALS_MAX = 64
#: A machine that showed a join code may reach Ray's ports for this long, so that it can check them.
_GUEST_S = 600.0
_GUESTS_MAX = 256
#: Certificates of one member on the list, and in a day: a laptop gets one for each new network.
_CERTIFICATES_MAX = 600
_CERTIFICATES_A_DAY_MAX = 50
#: Places on the list that members leave for M1 itself.
_CERTIFICATES_SPARE = 500

#: A certificate waits so long for the name services of the machine.
_FQDN_S = 2.0

_UNKNOWN_MEMBER = GateRefused(
    401,
    "unknown_member",
    "M1 does not know this machine (any more)",
    "hcna leave --force, then hcna join with a new code (on M1's machine: hcna invite)",
)


@dataclass(frozen=True, kw_only=True)
class MemberBeat:
    """A member and when it was heard last."""

    name: str
    node_id: str
    hostname: str
    address: str
    joined_at: float
    #: None: not heard since this supervisor started.
    last_beat_at: float | None
    last_beat_age_s: float | None
    #: Its clock minus ours, as of the last beat.
    clock_skew_s: float | None
    #: Whether it runs with the same settings of Ray.
    same_ray_settings: bool | None
    #: What it says of itself.
    report: Mapping[str, Any] = field(default_factory=dict)
    #: The round of its credentials, and the serial number of its certificate, in hex.
    round: int | None = None
    serial: str = ""
    #: Whether it shows a certificate of its owner.
    own_certificate: bool = False


@dataclass(frozen=True, kw_only=True)
class _Beat:
    at: float
    monotonic: float
    skew_s: float
    same_ray_settings: bool
    report: Mapping[str, Any]
    round: int
    serial: str
    own_certificate: bool


class Gate:
    """The server. `start` and `stop` from one thread; the rest from any."""

    def __init__(
        self,
        settings: Settings,
        log: Logger,
        *,
        local_worker: Callable[[], str | None],
        prepare: Callable[[str], None],
        members_changed: Callable[[], None],
        drain: Callable[[str, float], Json] | None = None,
        forget: Callable[[str], Json] | None = None,
        ready: Callable[[], bool] | None = None,
        rotated: Callable[[], None] = lambda: None,
        origins_changed: Callable[[], None] = lambda: None,
        versions: Versions | None = None,
        addresses: Callable[[], Sequence[str]] | None = None,
        host: str = "0.0.0.0",
        port: int | None = None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        poll_s: float = 0.25,
    ) -> None:
        """Take what the gate asks the rest of the supervisor for.

        Args:
            settings: Those of M1.
            log: The supervisor's log.
            local_worker: Name that M1's own worker holds for good, or None.
            prepare: Told the name before a machine gets it; returns when the name is free.
            members_changed: Told after a machine has joined or left.
            drain: Drains a worker within some seconds; default: asks C1.
            forget: Has the moderator forget a worker; default: asks C1.
            ready: Whether C1 is ready; default: not known.
            rotated: Told after a round of credentials was announced.
            origins_changed: Told when `origins` has changed; returns when it is taken into account.
            versions: Those that others must have; default: those of this process.
            addresses: Where M1 may be found, the best first; default: by its cards.
            host: Address to listen on.
            port: Port to listen on; default ``ports.gate``.
            now: Wall clock.
            monotonic: Clock for ages.
            poll_s: How often slow connections and the wish to stop are looked at.
        """
        self._poll_s = poll_s
        self.settings, self.log = settings, log
        self.local_worker, self.prepare = local_worker, prepare
        self.members_changed = members_changed
        self.drain = drain or (lambda name, drain_s: drain_worker(settings, name, drain_s))
        self.forget = forget or (lambda name: forget_worker(settings, name))
        self.ready, self.rotated = ready, rotated
        self.origins_changed = origins_changed
        self._outward = addresses or (lambda: outward_addresses(settings.ray.node_address))
        self.versions = versions or own_versions()
        self.now, self.monotonic = now, monotonic
        self._host, self._wanted_port = host, settings.port("gate") if port is None else port
        self._server: GateServer | None = None
        self._thread: threading.Thread | None = None
        self._ca_pem = ""
        self._joining = threading.Lock()
        self._changed = threading.Condition()
        self._beats: dict[str, _Beat] = {}
        self._going_down = False
        self._told: set[str] = set()
        self._stopped: set[str] = set()
        #: Where members' beats and Ray's connections come from, and until when a machine that may
        #: join is let in.
        self._seen: dict[str, tuple[str, ...]] = {}
        self._guests: dict[str, float] = {}
        #: Machines that are to get another certificate, and the one they have.
        self._renewing: dict[str, str] = {}
        #: What name services call this machine, once that is known.
        self._fqdn, self._fqdn_known = "", threading.Event()
        self._fqdn_known.set()  # Nobody looks for it before `start`.
        self._refusals = RefusalBook(monotonic, keys_max=_REFUSALS_MAX)
        #: Credentials are given before a round is announced or after it, never in between.
        self._rotating = threading.Lock()
        self._opening = threading.Lock()
        self._opened: tuple[Listeners, threading.Timer] | None = None

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen. Makes the authority, the certificate and Ray's token if they are missing.

        Raises:
            OSError: The port is taken.
            CertificateBroken: The authority cannot be used.
        """
        directory = self.settings.cluster_dir
        ensure_ray_token(self.settings.keys_dir)
        ensure_trust(directory, now=self._utc())
        self._ca_pem = known_by(directory).cert.read_text(encoding="ascii")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load_certificate(context)
        self._fqdn_known.clear()
        self._look_up_name()
        self._server = GateServer((self._host, self._wanted_port), self, context)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": self._poll_s},
            name="gate",
            daemon=True,
        )
        self._thread.start()
        self.log.info("the gate is open", extra={"action": "gate.started", "port": self.port})

    def stop(self) -> None:
        """Close the door and every connection. May be called twice."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        self._thread.join(timeout=5.0)
        server.server_close()
        server.close_all()
        self._close_opened()

    @property
    def port(self) -> int:
        """The port it listens on, or would."""
        return int(self._server.server_address[1]) if self._server else self._wanted_port

    @property
    def ray_address(self) -> str:
        """Where other machines find Ray's GCS, ``host:port``."""
        return f"{self._own_address()}:{self.settings.port('gcs')}"

    def announce_down(self) -> None:
        """Tell every member at its next beat that all is to stop."""
        with self._changed:
            self._going_down = True
            self._told.clear()
            self._stopped.clear()
        self.log.info("telling the members to stop", extra={"action": "gate.down"})

    def wait_all_told(self, timeout_s: float) -> bool:
        """Wait until every member that was here lately knows that all is to stop.

        Returns:
            False if ``timeout_s`` passed first.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._to_be_told(), timeout=timeout_s)

    def wait_all_stopped(self, timeout_s: float) -> tuple[str, ...]:
        """Wait until every member that was told to stop has said that nothing of it runs.

        Returns:
            The names of those that had not said so when ``timeout_s`` passed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._told <= self._stopped, timeout=timeout_s)
            silent = self._told - self._stopped
        members = read_members(self.settings.cluster_dir)
        return tuple(member.name for member in members if member.machine_id in silent)

    def beats(self) -> dict[str, MemberBeat]:
        """Return every member by name and when it was heard last."""
        now = self.monotonic()
        with self._changed:
            heard = dict(self._beats)
        found = {}
        for member in read_members(self.settings.cluster_dir):
            beat = heard.get(member.machine_id)
            found[member.name] = MemberBeat(
                name=member.name,
                node_id=member.node_id,
                hostname=member.hostname,
                address=member.address,
                joined_at=member.joined_at,
                last_beat_at=beat.at if beat else None,
                last_beat_age_s=round(now - beat.monotonic, 3) if beat else None,
                clock_skew_s=beat.skew_s if beat else None,
                same_ray_settings=beat.same_ray_settings if beat else None,
                report=beat.report if beat else {},
                round=beat.round if beat else None,
                serial=beat.serial if beat else "",
                own_certificate=beat.own_certificate if beat else False,
            )
        return found

    def origins(self) -> frozenset[str]:
        """Return the addresses from which the cluster's other machines reach this one.

        Raises:
            MembersBroken: The list of members cannot be read.
        """
        now = self.monotonic()
        with self._changed:
            self._guests = {at: until for at, until in self._guests.items() if now < until}
            guests = frozenset(self._guests)
        return self._member_origins() | guests

    def _member_origins(self) -> frozenset[str]:
        members = read_members(self.settings.cluster_dir)
        with self._changed:
            seen = [at for each in members for at in self._seen.get(each.machine_id, ())]
        return frozenset([*(each.address for each in members), *seen])

    # -- routes: each gets the body and the peer's address ------------------------------------

    def handle(self, method: str, path: str, authorization: str, body: Json, peer: str) -> Json:
        """Answer one request.

        Raises:
            GateRefused: With status, code, message and fix.
        """
        try:
            match method, path:
                case "GET", "/v1/ca":
                    return {"ca_pem": self._ca_pem}
                case "GET", "/v1/members":
                    self._owner(authorization)
                    return {
                        "members": [asdict(beat) for beat in self.beats().values()],
                        "round": asdict(read_round(self.settings.cluster_dir)),
                        "ready": self.ready() if self.ready else None,
                    }
                case "POST", "/v1/preflight":
                    return self._preflight(authorization, body, peer)
                case "POST", "/v1/join":
                    return self._join(authorization, body, peer)
                case "POST", "/v1/beat":
                    return self._beat(self._member(authorization), body, peer)
                case "POST", "/v1/certificate":
                    return self._certificate(self._member(authorization), body, peer)
                case "POST", "/v1/credentials":
                    return self._credentials(self._member(authorization), body, peer)
                case "POST", "/v1/rotate":
                    self._owner(authorization)
                    return self._rotate(body)
                case "POST", "/v1/stopped":
                    return self._note_stopped(self._member(authorization))
                case "POST", "/v1/leave":
                    return self._leave(self._leaver(authorization, body), body)
        except NameTaken as error:
            raise GateRefused(
                409,
                error.code,
                str(error),
                f"take another name, or on M1's machine remove it: hcna leave {error.name}",
            ) from None
        except NameRefused as error:
            raise GateRefused(
                409, error.code, str(error), "hcna join CODE without --name"
            ) from None
        except InviteRefused as error:
            status = 410 if error.code == "invite_expired" else 401
            raise GateRefused(
                status, error.code, error.message, "a new code: hcna invite, on M1's machine"
            ) from None
        raise GateRefused(404, "not_found", "there is nothing at this path")

    def _preflight(self, authorization: str, body: Json, peer: str) -> Json:
        invite, member = self._bearer(authorization, body)
        self._let_in(peer, *origin_told(body))
        asked = {port: text_of(body, "word") for port in ports_of(body, "listen_ports")}
        asked |= dict.fromkeys(ports_of(body, "live_ports"), "")
        answer: Json = {
            "time": self.now(),
            "versions": asdict(self.versions),
            "ray_tuning_hash": ray_tuning_hash(),
            "ray_address": self.ray_address,
            "moderator_node_id": self.settings.moderator.node_id,
            "m1_addresses": self._addresses(),
            "seen_address": peer,
            "shared": shared_part(self.settings),
            "ready": self.ready() if self.ready else None,
            "names_taken": {
                each.name: {"hostname": each.hostname, "address": each.address}
                for each in read_members(self.settings.cluster_dir)
            },
            "name": member.name if member else None,
            "name_problem": None,
        }
        if invite is not None:
            try:
                answer["name"] = self._name_for(invite, body, peer)
            except (NameTaken, NameRefused) as error:
                answer["name_problem"] = {"code": error.code, "message": str(error)}
        if body.get("open") is True:
            word = text_of(body, "word")
            answer["opened"] = self._open_for_a_while(word)
        reached = try_ports(peer, asked, timeout_s=_CONNECT_BACK_S)
        answer["ports"] = {
            str(port): {"verdict": reach.verdict, "detail": reach.detail}
            for port, reach in reached.items()
        }
        return answer

    def _join(self, authorization: str, body: Json, peer: str) -> Json:
        machine_id = text_of(body, "machine_id")
        if not machine_id:
            raise GateRefused(400, "invalid_request", "machine_id is missing")
        directory = self.settings.cluster_dir
        token = credential_of(authorization, "Invite")
        with self._joining:
            invite = check_invite(directory, token, now=self.now(), machine_id=machine_id)
            self._refuse_misfit(body)
            pem_of(body, "csr")
            name = self._name_for(invite, body, peer)
            is_new = all(each.name != name for each in read_members(directory))
            self.prepare(name)
            redeem(directory, token, now=self.now(), machine_id=machine_id)
            failpoints.hit("gate.join.redeemed")
            member_token = new_token()
            member = Member(
                name=name,
                node_id=self._node_id(name),
                machine_id=machine_id,
                hostname=text_of(body, "hostname") or peer,
                address=text_of(body, "address") or peer,
                token_sha256=digest(member_token),
                joined_at=self.now(),
            )
            add_member(directory, member)
            failpoints.hit("gate.join.stored")
        if is_new:
            # Who left before may still be on the moderator's record, drained: M1 may have ended
            # before it was struck off. A machine that joins begins anew.
            self.forget(name)
        self.members_changed()
        self.origins_changed()
        leave(
            self.settings.acts_dir,
            "member.joined",
            name,
            principal=name,
            detail=f"{member.hostname}, {member.address}",
        )
        self.log.info(
            "%s joined as %s",
            member.hostname,
            name,
            extra={"action": "gate.joined", "worker": name, "address": member.address},
        )
        return {
            **self._credentials(member, body, peer),
            "name": name,
            "node_id": member.node_id,
            "m1_addresses": self._addresses(),
            "gate_port": self.port,
            "ca_sha256": fingerprint(self._ca_pem),
            "member_token": member_token,
            "ray_address": self.ray_address,
            "moderator_node_id": self.settings.moderator.node_id,
            "shared": shared_part(self.settings),
            "joined_at": member.joined_at,
        }

    def _certificate(self, member: Member, body: Json, peer: str) -> Json:
        """Sign a member's request, for its own names and addresses alone."""
        self._refuse_flood(member)
        hostname = text_of(body, "hostname") or member.hostname
        asked = {
            peer,
            text_of(body, "address") or peer,
            *texts_of(body, "addresses", ADDRESSES_MAX),
        }
        others = [one for one in read_members(self.settings.cluster_dir) if one != member]
        m1s, edges = self._own_hosts(), self._edge_hosts()
        taken = {*m1s, *edges, *(one.hostname.lower() for one in others)}
        taken.discard("localhost")
        # Where it was seen it is, whoever was there before.
        theirs = {*edges, *(one.address for one in others)} - {peer}
        theirs |= {*m1s, *self._addresses(), *(own.address for own in own_addresses())}
        try:
            cert_pem = sign_request(
                self.settings.cluster_dir,
                pem_of(body, "csr"),
                name=member.name,
                kind="node",
                names=[name for name in names_of(member.name, hostname) if name not in taken],
                addresses=[LOOPBACK, "::1", *grantable(asked, theirs)],
                now=self._utc(),
                spare=_CERTIFICATES_SPARE,
            )
        except CertificateRefused as error:
            raise GateRefused(400, error.code, str(error)) from None
        # It may have been removed since it asked, and then its certificates are revoked by now.
        self._refuse_removed(member)
        serial, until = serial_and_end(cert_pem)
        leave(
            self.settings.acts_dir,
            "certificate.issued",
            member.name,
            principal=member.name,
            detail=f"{serial}, node, until {until.isoformat()}",
        )
        self.log.info(
            "%s has a new certificate",
            member.name,
            extra={
                "action": "gate.certified",
                "worker": member.name,
                "serial": serial,
                "expires_at": until.isoformat(),
            },
        )
        trust = ensure_trust(self.settings.cluster_dir, now=self._utc())
        return {"cert_pem": cert_pem, "trust_pem": trust.read_text(encoding="ascii")}

    def _own_hosts(self) -> set[str]:
        """Return the names and addresses that are M1's and C1's, whoever asks for them."""
        settings = self.settings
        composite = settings.composite
        found = [GATE_NAME, *names_here(settings), *composite.hosts]
        found += [composite.listen_address, settings.moderator.listen_address]
        self._fqdn_known.wait(timeout=_FQDN_S)
        for whole in (self._fqdn, socket.gethostname()):
            found += [whole, whole.partition(".")[0]]
        cert_path = composite.security.cert_path
        found += _names_in(cert_path) if cert_path is not None else ()
        return {_normal(one) for one in found if one}

    def _edge_hosts(self) -> set[str]:
        """Return what the cluster's own certificate of C1 is for, as far as it is of now."""
        if not self.settings.has_edge:
            return set()
        return {_normal(one) for one in _names_in(self.settings.cluster_dir / "edge.pem")}

    def _look_up_name(self) -> None:
        """Find out what name services call this machine, in the background: they may be slow."""

        def look() -> None:
            self._fqdn = socket.getfqdn()
            self._fqdn_known.set()

        threading.Thread(target=look, name="gate-name", daemon=True).start()

    def _credentials(self, member: Member, body: Json, peer: str) -> Json:
        """Give a member all that it needs for this round."""
        directory = self.settings.cluster_dir
        with self._rotating:
            # First the round: who gets the token of a later one asks again.
            current = read_round(directory)
            answer = {
                **self._certificate(member, body, peer),
                "ca_pem": gate_trust(directory),
                "ray_token": token_for_members(directory, self.settings.keys_dir),
                "round": current.number,
            }
        # Who is shut out is removed before another token is made: this one is not for him.
        self._refuse_removed(member)
        return answer

    def _refuse_removed(self, member: Member) -> None:
        known = read_members(self.settings.cluster_dir)
        if all(one.token_sha256 != member.token_sha256 for one in known):
            raise _UNKNOWN_MEMBER

    def _refuse_flood(self, member: Member) -> None:
        """Let no member that asks again and again fill the list, which is everybody's."""
        mine = [each for each in list_issued(self.settings.cluster_dir) if each.name == member.name]
        lately = [each for each in mine if each.issued_at > self.now() - 86400.0]
        if len(mine) >= _CERTIFICATES_MAX or len(lately) >= _CERTIFICATES_A_DAY_MAX:
            raise GateRefused(
                429,
                "too_many_certificates",
                f"{member.name} was given {len(lately)} certificates in a day, {len(mine)} in all",
                f"see why it asks again, in logs/supervisor.log of {member.name}",
            )

    def _rotate(self, body: Json) -> Json:
        """Have a member get another certificate, or all machines other credentials."""
        what, directory = text_of(body, "what"), self.settings.cluster_dir
        if what == "node":
            return self._renew_member(text_of(body, "name"))
        if what not in REASONS:
            raise GateRefused(400, "invalid_request", f"there is no rotation of {what!r}")
        try:
            with self._rotating:
                if what == "finish" and is_rolling_over(directory):
                    self._refuse_early_end(body)
                before = read_round(directory).number
                try:
                    made = begin(directory, self.settings.keys_dir, what, now=self.now())
                finally:
                    # Whatever came of it: what is announced is seen through.
                    if read_round(directory).number != before:
                        self.rotated()
                if what == "finish":
                    self._ca_pem = known_by(directory).cert.read_text(encoding="ascii")
                    if self._server is not None:
                        self.renew(self._server.context)
        except (RoundRefused, RolloverRefused) as error:
            raise GateRefused(409, error.code, str(error), "hcna certs list") from None
        leave(self.settings.acts_dir, "credentials.rotated", what, detail=f"round {made.number}")
        self.log.warning(
            "the cluster restarts Ray with new credentials (%s)",
            what,
            extra={"action": "credentials.announced", "round": made.number, "reason": what},
        )
        return {"round": made.number}

    def _refuse_early_end(self, body: Json) -> None:
        """Refuse to give up the old authority while a member knows no other, unless told to."""
        current = read_round(self.settings.cluster_dir).number
        away = [one.name for one in self.beats().values() if one.round != current]
        if away and body.get("force") is not True:
            raise RolloverRefused(
                f"{', '.join(away)} was away and knows only the old authority; without it "
                "it has to join again"
            )

    def _renew_member(self, name: str) -> Json:
        for member in read_members(self.settings.cluster_dir):
            if member.name == name:
                with self._changed:
                    beat = self._beats.get(member.machine_id)
                    if beat is not None and beat.own_certificate:
                        raise GateRefused(
                            409,
                            "own_certificate",
                            f"{name} shows a certificate of your own",
                            f"replace its files, then on {name}: hcna down && hcna up",
                        )
                    self._renewing[member.machine_id] = beat.serial if beat else ""
                return {"name": name, "serial": beat.serial if beat else ""}
        raise GateRefused(404, "member_not_found", f"no machine has joined as {name!r}")

    def caught_up(self, number: int) -> bool:
        """Whether every member that was here lately has the credentials of a round."""
        now = self.monotonic()
        with self._changed:
            return all(
                beat.round == number
                for beat in self._beats.values()
                if now - beat.monotonic < PRESENT_S
            )

    def _beat(self, member: Member, body: Json, peer: str) -> Json:
        report = body.get("report")
        beat = _Beat(
            at=self.now(),
            monotonic=self.monotonic(),
            skew_s=round(number_of(body, "time") - self.now(), 3),
            same_ray_settings=body.get("ray_tuning_hash") == ray_tuning_hash(),
            report=report if isinstance(report, dict) else {},
            round=int(number_of(body, "round")) if "round" in body else 0,
            serial=text_of(body, "serial"),
            own_certificate=body.get("own_certificate") is True,
        )
        with self._changed:
            before = self._beats.get(member.machine_id)
            self._beats[member.machine_id] = beat
            order = DOWN if self._going_down else UP
            if self._renewing.get(member.machine_id, beat.serial) != beat.serial:
                del self._renewing[member.machine_id]
            renew = member.machine_id in self._renewing
        current = read_round(self.settings.cluster_dir)
        if before is None or before.same_ray_settings != beat.same_ray_settings:
            self._note(member, beat)
        address = text_of(body, "address") or peer
        if address != member.address:
            self.log.info(
                "%s is at %s now",
                member.name,
                address,
                extra={"action": "gate.moved", "worker": member.name, "before": member.address},
            )
            move_member(self.settings.cluster_dir, member.name, address)
        seen = (peer, *origin_told(body))
        with self._changed:
            moved = self._seen.get(member.machine_id) != seen or address != member.address
            self._seen[member.machine_id] = seen
        if moved:
            self.origins_changed()
        return {
            "order": order,
            "round": current.number,
            # Its head is about to end: a worker that started now would have to start again.
            "hold": current.pending,
            "renew": renew,
            "stale": self._is_stale(text_of(body, "token")),
            "trust": trust_digest(self.settings.cluster_dir),
            "time": self.now(),
            "name": member.name,
            "seen_address": peer,
            "ray_address": self.ray_address,
            "m1_addresses": self._addresses(),
            "peers": sorted(self._member_origins()),
            "ray_tuning_hash": ray_tuning_hash(),
        }

    def _let_in(self, *addresses: str) -> None:
        """Let a machine reach Ray's ports for a while: it has shown that it may join, or has."""
        until = self.monotonic() + _GUEST_S
        with self._changed:
            is_new = not self._guests.keys() >= set(addresses)
            for address in addresses:
                self._guests.pop(address, None)
                self._guests[address] = until
            while len(self._guests) > _GUESTS_MAX:
                del self._guests[next(iter(self._guests))]  # The one that came first.
        if is_new:
            self.origins_changed()

    def _is_stale(self, token: str) -> bool:
        """Whether a member's token is not the one it should have, be its round's number right.

        After a restore on M1 the numbers begin again at those of the backup.
        """
        settings = self.settings
        expected = expected_token_digest(settings.cluster_dir, settings.keys_dir)
        return "" not in (token, expected) and token != expected

    def _note(self, member: Member, beat: _Beat) -> None:
        if beat.same_ray_settings:
            self.log.info(
                "%s is in contact",
                member.name,
                extra={"action": "gate.contact", "worker": member.name},
            )
        else:
            self.log.error(
                "%s runs with other settings of Ray; install the same hcna-ray there",
                member.name,
                extra={"action": "gate.settings_mismatch", "worker": member.name},
            )

    def _leave(self, member: Member, body: Json) -> Json:
        if body.get("forget") is not True:
            drain_s = min(number_of(body, "drain_s"), _DRAIN_S_MAX)
            return {"name": member.name, **self.drain(member.name, max(0.0, drain_s))}
        remove_member(self.settings.cluster_dir, member.name)
        failpoints.hit("gate.leave.removed")
        leave(self.settings.acts_dir, "member.removed", member.name)
        with self._changed:
            self._beats.pop(member.machine_id, None)
            for address in (member.address, *self._seen.pop(member.machine_id, ())):
                self._guests.pop(address, None)
            self._changed.notify_all()
        self.members_changed()
        self.origins_changed()
        self.log.info("%s left", member.name, extra={"action": "gate.left", "worker": member.name})
        return {"name": member.name, **self.forget(member.name)}

    def _note_stopped(self, member: Member) -> Json:
        with self._changed:
            self._stopped.add(member.machine_id)
            self._changed.notify_all()
        self.log.info(
            "%s stopped", member.name, extra={"action": "gate.stopped", "worker": member.name}
        )
        return {"name": member.name}

    def answered(self, path: str, authorization: str, answer: Json) -> None:
        """Note that an answer has been sent: a member that was told to stop knows it now."""
        if path == "/v1/beat" and answer.get("order") == DOWN:
            member = find_member(self.settings.cluster_dir, credential_of(authorization, "Member"))
            with self._changed:
                if member is not None:
                    self._told.add(member.machine_id)
                self._changed.notify_all()

    def refused(self, error: GateRefused, path: str, peer: str) -> None:
        """Log a refusal; of many that are the same, one a minute."""
        with self._changed:
            self._refusals.add(peer, error.code, 1, path[:100])
        self._tell_refusals({(peer, error.code): error.message})

    def tell_refusals(self) -> None:
        """Put on record the refusals that have waited long enough."""
        self._tell_refusals({})

    def _tell_refusals(self, messages: Mapping[tuple[str, str], str]) -> None:
        with self._changed:
            due = self._refusals.due()
        for peer, code, times, path in due:
            told = leave(
                self.settings.acts_dir,
                "gate.refused",
                path,
                principal=peer,
                outcome="refused",
                detail=code if times == 1 else f"{code}, {times} times",
            )
            if not told:
                with self._changed:
                    self._refusals.add(peer, code, times, path)
            self.log.warning(
                "refused: %s",
                messages.get((peer, code), code),
                extra={
                    "action": "gate.refused",
                    "code": code,
                    "peer": peer,
                    "path": path,
                    "times": times,
                },
            )

    # -- who asks -----------------------------------------------------------------------------

    def _bearer(self, authorization: str, body: Json) -> tuple[Invite | None, Member | None]:
        """Return the invitation or the member that a request came with."""
        if authorization.startswith("Member "):
            return None, self._member(authorization)
        token = credential_of(authorization, "Invite")
        machine_id = text_of(body, "machine_id") or None
        directory = self.settings.cluster_dir
        return check_invite(directory, token, now=self.now(), machine_id=machine_id), None

    def _member(self, authorization: str) -> Member:
        token = credential_of(authorization, "Member")
        member = find_member(self.settings.cluster_dir, token)
        if member is None:
            raise _UNKNOWN_MEMBER
        return member

    def _leaver(self, authorization: str, body: Json) -> Member:
        """Return who is to leave: the member that asks, or the one that the owner names."""
        if not authorization.startswith("Bearer "):
            return self._member(authorization)
        self._owner(authorization)
        name = text_of(body, "name")
        for member in read_members(self.settings.cluster_dir):
            if member.name == name:
                return member
        raise GateRefused(404, "member_not_found", f"no machine has joined as {name!r}")

    def _owner(self, authorization: str) -> None:
        key = verify(load_keys(self.settings.keys_dir), credential_of(authorization, "Bearer"))
        if key is None or key.role != "admin" or key.state(time.time()) != "good":
            raise GateRefused(401, "unauthorized", "this needs a key of role admin")

    # -- what is checked ----------------------------------------------------------------------

    def _refuse_misfit(self, body: Json) -> None:
        """Refuse a machine that could not work with this one."""
        problems = parse_versions(body.get("versions")).problems(self.versions)
        if problems:
            raise GateRefused(
                409,
                "version_mismatch",
                "; ".join(problems),
                f"install the same there: hcna-ray {self.versions.hcna_ray} "
                f"on Python {self.versions.python}",
            )
        if body.get("ray_tuning_hash") != ray_tuning_hash():
            raise GateRefused(
                409,
                "settings_mismatch",
                "the two machines would run Ray with different settings",
                f"install the same there: hcna-ray {self.versions.hcna_ray}",
            )
        skew_s = number_of(body, "time") - self.now()
        if abs(skew_s) > CLOCK_SKEW_S_MAX:
            word = "ahead of" if skew_s > 0 else "behind"
            raise GateRefused(
                409,
                "clock_skew",
                f"its clock is {abs(skew_s):.0f} s {word} M1's",
                "set the clock: sudo timedatectl set-ntp true",
            )

    def _name_for(self, invite: Invite, body: Json, peer: str) -> str:
        """Return the name for a machine: what it or the invitation says, or its address."""
        members = read_members(self.settings.cluster_dir)
        where = {peer, text_of(body, "hostname"), text_of(body, "address")} - {""}
        names = {
            node.node_id.split("--")[0].partition("-")[2]: node.address
            for node in self.settings.moderator.worker_nodes
        }
        taken = {member.name for member in members}
        mine = [name for name, at in names.items() if at in where and name not in taken]
        asked = invite.name or text_of(body, "name") or (mine[0] if mine else None)
        local = self.local_worker()
        return choose_name(
            members,
            machine_id=text_of(body, "machine_id"),
            requested=asked,
            reserved=(local,) if local else (),
            expected=names,
        )

    def _node_id(self, name: str) -> str:
        for node in self.settings.moderator.worker_nodes:
            if node.node_id.split("--")[0].endswith(f"-{name}"):
                return node.node_id
        return node_id_for(name, self.settings.moderator.node_id)

    # -- helpers ------------------------------------------------------------------------------

    def _to_be_told(self) -> set[str]:
        now = self.monotonic()
        present = {who for who, beat in self._beats.items() if now - beat.monotonic < PRESENT_S}
        return present - self._told

    def _own_address(self) -> str:
        return self.settings.ray.node_address or default_address()

    def _addresses(self) -> list[str]:
        return list(self._outward())

    def _open_for_a_while(self, word: str) -> list[int]:
        """Listen on the last ports of the range of M1's processes, which Ray uses last of all."""
        last = self.settings.port("head_processes_max")
        listeners = Listeners(range(last, last - 3, -1), word)
        timer = threading.Timer(_OPENED_S, listeners.close)
        timer.daemon = True
        with self._opening:
            self._close_opened()
            listeners.open()
            timer.start()
            self._opened = (listeners, timer)
        return list(listeners.opened)

    def _close_opened(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[1].cancel()
            opened[0].close()

    def _load_certificate(self, context: ssl.SSLContext) -> None:
        pair = ensure_server(
            self.settings.cluster_dir,
            "gate",
            names=(GATE_NAME, "localhost", socket.gethostname()),
            addresses=("127.0.0.1", *(own.address for own in own_addresses())),
            now=self._utc(),
        )
        context.load_cert_chain(pair.cert, pair.key)

    def renew(self, context: ssl.SSLContext) -> None:
        """Make the certificate anew if it nears its end; new connections get the new one."""
        self._look_up_name()
        try:
            self._load_certificate(context)
        except (HcnaError, OSError) as error:
            self.log.error(str(error), extra={"action": "gate.certificate"})

    def _utc(self) -> datetime:
        return datetime.fromtimestamp(self.now(), UTC)


def _names_in(cert: Path) -> tuple[str, ...]:
    try:
        return names_in(cert)
    except OwnCertificateRefused:
        return ()  # There is none yet, or the edge says what is wrong with it.


def _normal(host: str) -> str:
    """Return a name or an address as it is compared."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")

"""The other end of the gate: how a machine finds M1, trusts it, joins it and stays in contact.

Trust comes from the join code alone. The gate's certificate must be signed by the authority whose
fingerprint the code holds, and be made for the gate; at which address it is reached does not
matter, so tunnels and moved machines do no harm.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from logging import Logger
from typing import Any

from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.security.authority import own_serial
from hcna_ray.supervisor.addresses import describe, route_source
from hcna_ray.supervisor.gate_protocol import (
    BEAT_S,
    BODY_BYTES_MAX,
    GATE_NAME,
    REMOVED,
    GateRefused,
    Json,
)
from hcna_ray.supervisor.invites import JoinCode
from hcna_ray.supervisor.membership import Membership
from hcna_ray.supervisor.ports import ray_tuning_hash
from hcna_ray.supervisor.reach import explain
from hcna_ray.supervisor.rounds import held_token_digest, read_round

CONNECT_S = 5.0
#: A beat is short; a preflight waits for connections back.
ANSWER_S = 20.0
_BEAT_ANSWER_S = 5.0
#: X.509 verification errors of OpenSSL that mean a wrong clock.
_NOT_YET_VALID, _EXPIRED = 9, 10
#: What helps a member whose authority is not that of the gate any more.
_JOIN_ANEW = (
    "if M1 changed its authority while this machine was away: hcna join with a new code "
    "(hcna invite, on M1's machine)"
)


@dataclass(frozen=True)
class Attempt:
    """One address of M1 that was tried in vain, and why it failed.

    ``kind`` is ``refused``, ``timeout``, ``no_route``, ``wrong_machine``, ``other_authority``,
    ``clock`` or ``other``.
    """

    address: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.address}: {self.detail}"


class GateUnreachable(HcnaError):
    """M1 was reached at none of its addresses. ``attempts`` says why at each."""

    code = "m1_unreachable"

    def __init__(self, port: int, attempts: Sequence[Attempt], source: str | None = None) -> None:
        super().__init__(port, tuple(attempts), source)
        self.port, self.attempts, self.source = port, tuple(attempts), source

    def __str__(self) -> str:
        start = f" from {describe(self.source)}" if self.source else ""
        listed = "; ".join(str(attempt) for attempt in self.attempts)
        return f"M1 cannot be reached{start} on port {self.port}: {listed}"

    @property
    def fix(self) -> str:
        """What to do, by how it failed."""
        kinds = {attempt.kind for attempt in self.attempts}
        if self.source and (better := self._better_source()):
            return f"hcna join CODE without --address, or with that of the route to M1: {better}"
        if "clock" in kinds:
            return "set the clock of this machine: sudo timedatectl set-ntp true"
        if "other_authority" in kinds:
            return _JOIN_ANEW
        if "wrong_machine" in kinds:
            return "use a code that M1 prints now: hcna invite, on M1's machine"
        if kinds == {"refused"}:
            return "start M1: hcna up, on M1's machine"
        return (
            f"be in the same network or VPN as M1, and let port {self.port} in there: "
            f"sudo ufw allow {self.port}/tcp, on M1's machine"
        )

    def _better_source(self) -> str:
        """Return the own address at which the route to M1 starts, if it was not used."""
        try:
            start = route_source(self.attempts[0].address, self.port)
        except OSError:
            return ""
        return "" if start == self.source else describe(start)


class GateChannel:
    """One keep-alive connection to the gate at one address, opened when it is needed."""

    def __init__(
        self, address: str, port: int, context: ssl.SSLContext, *, source: str | None = None
    ) -> None:
        self.address, self.port = address, port
        self._context, self._source = context, source
        self._connection: _Connection | None = None
        #: Own address of the connection.
        self.local_address: str | None = None

    def request(
        self,
        method: str,
        path: str,
        *,
        authorization: str = "",
        body: Json | None = None,
        timeout_s: float = ANSWER_S,
    ) -> Json:
        """Return the answer to one request. A connection that went stale is opened again.

        Raises:
            GateRefused: The gate said no.
            OSError: It could not be reached, or did not answer in time.
        """
        fresh = self._connection is None
        try:
            return self._request(method, path, authorization, body, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if fresh or isinstance(error, TimeoutError):
                raise _as_os_error(error) from None
        try:
            return self._request(method, path, authorization, body, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise _as_os_error(error) from None

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(
        self, method: str, path: str, authorization: str, body: Json | None, timeout_s: float
    ) -> Json:
        if self._connection is None:
            connection = _Connection(self.address, self.port, self._context, self._source)
            connection.connect()
            self._connection = connection
            self.local_address = str(connection.sock.getsockname()[0])
        connection = self._connection
        connection.sock.settimeout(timeout_s)
        headers = {"Authorization": authorization} if authorization else {}
        raw = None
        if body is not None:
            raw, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        connection.request(method, path, body=raw, headers=headers)
        response = connection.getresponse()
        text = response.read(BODY_BYTES_MAX + 1)
        if response.will_close or len(text) > BODY_BYTES_MAX:
            self.close()
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise OSError("the answer is not that of a gate")
        if response.status != 200:
            raise GateRefused(
                response.status,
                str(data.get("code", "refused")),
                str(data.get("message", "M1 refused")),
                str(data.get("fix", "")),
            )
        return data


class _Connection(http.client.HTTPConnection):
    """TLS by our own context, to a name that does not depend on the address."""

    sock: socket.socket

    def __init__(
        self, address: str, port: int, context: ssl.SSLContext, source: str | None
    ) -> None:
        super().__init__(
            address, port, timeout=CONNECT_S, source_address=(source, 0) if source else None
        )
        self._context = context

    def connect(self) -> None:
        """Connect and shake hands."""
        super().connect()
        try:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=GATE_NAME)
        except BaseException:
            self.sock.close()
            raise


def pinned_context(ca_pem: str) -> ssl.SSLContext:
    """Return a context that trusts this authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca_pem)
    return context


def origin_of(ray_address: str) -> str | None:
    """Return the own address from which Ray connects to M1's Ray, or None if there is no way.

    M1's gate may have been reached over another network, a VPN for instance.
    """
    host, _, port = ray_address.rpartition(":")
    try:
        return route_source(host, int(port))
    except (OSError, ValueError):
        return None


# -- finding M1 ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """M1, at the address that answered."""

    channel: GateChannel
    ca_pem: str


def find_gate(code: JoinCode, *, source: str | None = None) -> Found:
    """Return a channel to the M1 of a join code; all its addresses are tried at once.

    Args:
        code: What the user typed.
        source: Own address to talk from; None: the kernel chooses.

    Raises:
        GateUnreachable: None of the addresses leads to that M1.
    """

    def try_one(address: str) -> Found | Attempt:
        return _try_address(address, code, source)

    return _first_found(code.addresses, code.gate_port, try_one, source)


def reach_gate(membership: Membership, *, source: str | None = None) -> Found:
    """Return a channel to the M1 that this machine has joined.

    Raises:
        GateUnreachable: None of its addresses leads there.
    """
    context = pinned_context(membership.ca_pem)

    def try_one(address: str) -> Found | Attempt:
        channel = GateChannel(address, membership.gate_port, context, source=source)
        try:
            channel.request("GET", "/v1/ca", timeout_s=CONNECT_S)
        except (OSError, GateRefused) as error:
            return _attempt_of_member(address, error)
        return Found(channel, membership.ca_pem)

    return _first_found(membership.m1_addresses, membership.gate_port, try_one, source)


def ask_gate(membership: Membership, path: str, body: Json) -> Json:
    """Return M1's answer to one request of this member, on a connection of its own.

    Raises:
        GateUnreachable: None of its addresses leads there.
        GateRefused: M1 said no.
        OSError: It did not answer.
    """
    channel = reach_gate(membership).channel
    try:
        authorization = f"Member {membership.member_token}"
        return channel.request("POST", path, authorization=authorization, body=body)
    except GateRefused as error:
        if error.code != "not_found":
            raise
        raise GateRefused(
            error.status,
            "version_mismatch",
            "M1 is older than this machine and gives no certificates: upgrade M1 first",
            "install the same hcna-ray on both machines, M1's first",
        ) from None
    finally:
        channel.close()


def _first_found(
    addresses: Sequence[str],
    port: int,
    try_one: Callable[[str], Found | Attempt],
    source: str | None,
) -> Found:
    """Try all addresses at once; return the first that answers well."""
    attempts: list[Attempt] = []
    pool = ThreadPoolExecutor(max_workers=len(addresses))
    futures = [pool.submit(try_one, address) for address in addresses]
    try:
        for future in as_completed(futures):
            result = future.result()
            if isinstance(result, Found):
                for other in futures:
                    if other is not future:
                        other.add_done_callback(_close_late)
                return result
            attempts.append(result)
    finally:
        pool.shutdown(wait=False)
    order = {address: index for index, address in enumerate(addresses)}
    raise GateUnreachable(port, sorted(attempts, key=lambda each: order[each.address]), source)


def _close_late(future: Future[Found | Attempt]) -> None:
    """Close the channel of an address that answered too, but not first."""
    result = future.result()
    if isinstance(result, Found):
        result.channel.close()


def _try_address(address: str, code: JoinCode, source: str | None) -> Found | Attempt:
    # The authority is fetched from a peer that is not trusted yet: only its fingerprint counts.
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    first = GateChannel(address, code.gate_port, stranger, source=source)
    try:
        ca_pem = str(first.request("GET", "/v1/ca", timeout_s=CONNECT_S).get("ca_pem", ""))
    except (OSError, GateRefused) as error:
        return _attempt(address, error)
    finally:
        first.close()
    try:
        trusted = code.trusts(ca_pem)
    except ValueError:
        trusted = False
    if not trusted:
        return Attempt(address, "wrong_machine", "another machine answers than the code's M1")
    channel = GateChannel(address, code.gate_port, pinned_context(ca_pem), source=source)
    try:
        channel.request("GET", "/v1/ca", timeout_s=CONNECT_S)
    except (OSError, GateRefused) as error:
        return _attempt(address, error)
    return Found(channel, ca_pem)


def _attempt(address: str, error: Exception) -> Attempt:
    """Say why an address failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
            return Attempt(address, "clock", "its certificate is not valid at this machine's time")
        return Attempt(address, "wrong_machine", "another machine answers than the code's M1")
    if isinstance(error, ssl.SSLError):
        return Attempt(address, "wrong_machine", "what answers there does not speak TLS as a gate")
    if isinstance(error, GateRefused):
        return Attempt(address, "wrong_machine", f"what answers there is no gate ({error})")
    assert isinstance(error, OSError)
    reach = explain(error)
    return Attempt(address, reach.verdict, str(reach))


def _attempt_of_member(address: str, error: Exception) -> Attempt:
    """Say why an address failed that led to M1 once."""
    found = _attempt(address, error)
    if isinstance(error, ssl.SSLCertVerificationError) and found.kind == "wrong_machine":
        return Attempt(
            address, "other_authority", "who answers is certified by an authority unknown here"
        )
    return found


def _as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else ConnectionError(f"no proper answer ({error!r})")


# -- staying in contact --------------------------------------------------------------------------


class Contact:
    """A member's line to M1: a thread that beats for ever and remembers what it was told."""

    def __init__(
        self,
        settings: Settings,
        membership: Membership,
        log: Logger,
        *,
        report: Callable[[], Mapping[str, Any]] | None = None,
        interval_s: float = BEAT_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is sent before `start`.

        Args:
            settings: Those of this machine.
            membership: What it joined.
            log: The supervisor's log.
            report: What to say of this machine in each beat, a small JSON object.
            interval_s: Pause between two beats.
            monotonic: Clock for ages.
        """
        self.settings, self.membership, self.log = settings, membership, log
        self._report, self._interval_s, self._monotonic = report, interval_s, monotonic
        self._context = pinned_context(membership.ca_pem)
        self._channel: GateChannel | None = None
        self._addresses = membership.m1_addresses
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        #: The channel was opened with what was believed before.
        self._stale = False
        self._begun = 0
        self._order: str | None = None
        self._last_ok: float | None = None
        self._facts: Json = {}
        self._trouble = ""

    @property
    def order(self) -> str | None:
        """The last order: ``up``, ``down`` or ``removed``; None before the first answer."""
        return self._order

    @property
    def last_ok_age_s(self) -> float | None:
        """Seconds since M1 answered last; None if it has not yet."""
        return None if self._last_ok is None else self._monotonic() - self._last_ok

    @property
    def facts(self) -> Mapping[str, Any]:
        """The last answer: ``ray_address``, ``seen_address``, ``m1_addresses``, ``time``, ...

        ``beat`` is the number of the beat that it answers, see `begun`.
        """
        return self._facts

    @property
    def begun(self) -> int:
        """How many beats have begun: their answers may know nothing of what was done since."""
        return self._begun

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where M1 may be: what it told last, and what was known at the join."""
        return self._addresses

    @property
    def trouble(self) -> str:
        """Why M1 cannot be reached now; '' if it can."""
        return self._trouble

    def start(self) -> None:
        """Beat from now on, in a thread."""
        self._thread = threading.Thread(target=self._run, name="contact", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop beating. May be called twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=_BEAT_ANSWER_S + CONNECT_S)
            self._thread = None

    def beat(self) -> bool:
        """Beat once, at the address that worked last, else at the others; whether M1 answered."""
        if self._stale:
            self._stale = False
            self.close()
        self._begun += 1  # Before it looks at any file.
        body: Json = {
            "time": time.time(),
            "ray_tuning_hash": ray_tuning_hash(),
            "address": self.membership.address,
            "origin": origin_of(str(self._facts.get("ray_address") or self.membership.ray_address)),
            "round": read_round(self.settings.cluster_dir).number,
            "serial": own_serial(self.settings.cluster_dir),
            "token": held_token_digest(self.settings.keys_dir),
            "own_certificate": self.settings.worker.security.enable_mtls,
            "report": dict(self._report()) if self._report else {},
        }
        attempts = []
        for address in self._in_order():
            if self._stopping.is_set():
                return False
            channel = self._channel_to(address)
            try:
                answer = channel.request(
                    "POST",
                    "/v1/beat",
                    authorization=f"Member {self.membership.member_token}",
                    body=body,
                    timeout_s=_BEAT_ANSWER_S,
                )
            except GateRefused as error:
                self._refused(error)
                return False
            except OSError as error:
                attempts.append(_attempt_of_member(address, error))
                self._channel = None
                continue
            self._answered({**answer, "beat": self._begun})
            return True
        self._silent(attempts)
        return False

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.beat()
            except Exception:
                self.log.exception("a beat failed", extra={"action": "contact.error"})
            # A little spread: members that lost the same M1 do not come back in step.
            self._stopping.wait(self._interval_s * random.uniform(0.9, 1.1))
        self.close()

    def close(self) -> None:
        """Close the connection; the next beat opens another one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def trust(self, membership: Membership) -> None:
        """Believe the authorities of a membership that was told anew, from the next beat on."""
        self.membership, self._context = membership, pinned_context(membership.ca_pem)
        self._stale = True

    def _in_order(self) -> tuple[str, ...]:
        first = (self._channel.address,) if self._channel else ()
        return tuple(dict.fromkeys([*first, *self._addresses]))

    def _channel_to(self, address: str) -> GateChannel:
        if self._channel is None or self._channel.address != address:
            if self._channel is not None:
                self._channel.close()
            self._channel = GateChannel(address, self.membership.gate_port, self._context)
        return self._channel

    def _answered(self, answer: Json) -> None:
        if self._trouble or self._last_ok is None:
            self.log.info("M1 answers", extra={"action": "contact.up"})
        order = str(answer.get("order"))
        if order != self._order:
            self.log.info("M1 says %s", order, extra={"action": "contact.order", "order": order})
        self._order, self._facts, self._trouble = order, answer, ""
        self._last_ok = self._monotonic()
        told = answer.get("m1_addresses")
        if isinstance(told, list):
            # M1 may move; what was known at the join stays known.
            self._addresses = tuple(
                dict.fromkeys([*map(str, told[:8]), *self.membership.m1_addresses])
            )

    def _refused(self, error: GateRefused) -> None:
        if error.code == "unknown_member":
            if self._order != REMOVED:
                self.log.error(str(error), extra={"action": "contact.removed", "fix": error.fix})
            self._order = REMOVED
        self._note_trouble(f"M1 refused: {error}")

    def _silent(self, attempts: Sequence[Attempt]) -> None:
        told = "; ".join(map(str, attempts))
        if any(each.kind == "other_authority" for each in attempts):
            told = f"{told}; {_JOIN_ANEW}"
        self._note_trouble(told)

    def _note_trouble(self, trouble: str) -> None:
        if trouble != self._trouble:
            self.log.warning("no contact to M1: %s", trouble, extra={"action": "contact.lost"})
        self._trouble = trouble

"""A real gate on a loopback port, and what a machine needs to talk to it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hcna_ray.config import Settings, load_settings
from hcna_ray.security.certs import known_by, make_request, new_key
from hcna_ray.supervisor.gate import Gate
from hcna_ray.supervisor.gate_client import GateChannel, pinned_context
from hcna_ray.supervisor.gate_protocol import GateRefused, Versions, own_versions
from hcna_ray.supervisor.invites import create_invite, decode_code
from hcna_ray.supervisor.membership import Membership
from hcna_ray.supervisor.ports import ray_tuning_hash

Json = dict[str, Any]

LOG = logging.getLogger("tests.gate")


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(kw_only=True)
class GateRig:
    """M1 as far as the gate goes: what it would ask the rest of the supervisor is recorded."""

    settings: Settings
    gate: Gate = field(init=False)
    #: Seconds that M1's clock is ahead of the real one.
    ahead_s: float = 0.0
    local: str | None = None
    told: list[str] = field(default_factory=list)
    prepare: Callable[[str], None] | None = None
    versions: Versions = field(default_factory=own_versions)
    #: Clock for ages, moved by tests.
    passed_s: float = 0.0

    def __post_init__(self) -> None:
        """Make the gate; it does not listen yet."""
        self.gate = Gate(
            self.settings,
            LOG,
            local_worker=lambda: self.local,
            prepare=self._prepare,
            members_changed=lambda: self.told.append("changed"),
            drain=self._drain,
            forget=self._forget,
            ready=lambda: True,
            versions=self.versions,
            addresses=lambda: ("127.0.0.1",),
            host="127.0.0.1",
            now=lambda: time.time() + self.ahead_s,
            monotonic=lambda: time.monotonic() + self.passed_s,
            poll_s=0.01,
        )

    def _prepare(self, name: str) -> None:
        self.told.append(f"prepare {name}")
        if self.prepare is not None:
            self.prepare(name)

    def _drain(self, name: str, drain_s: float) -> Json:
        self.told.append(f"drain {name} {drain_s:g}")
        return {"drained": True, "running": 0}

    def _forget(self, name: str) -> Json:
        self.told.append(f"forget {name}")
        return {"forgotten": True}

    @property
    def ca_pem(self) -> str:
        """Certificate of the authority by which this M1 is known."""
        return known_by(self.settings.cluster_dir).cert.read_text()

    def code(self, *addresses: str, **options: Any) -> str:
        """Return a join code of this M1."""
        where = addresses or ("127.0.0.1",)
        now = options.pop("now", time.time() + self.ahead_s)
        return create_invite(self.settings, addresses=where, now=now, **options)[0]

    def invitation(self, **options: Any) -> str:
        """Return the authorization that comes with a new join code."""
        return f"Invite {decode_code(self.code(**options)).token}"

    def channel(self) -> GateChannel:
        """Return a channel that trusts this M1."""
        return GateChannel("127.0.0.1", self.gate.port, pinned_context(self.ca_pem))

    def post(self, path: str, authorization: str, **body: Any) -> Json:
        """Send one request on a connection of its own."""
        channel = self.channel()
        try:
            return channel.request("POST", path, authorization=authorization, body=body)
        finally:
            channel.close()

    def refusal(self, path: str, authorization: str, **body: Any) -> GateRefused:
        """Send one request that must be refused."""
        try:
            answer = self.post(path, authorization, **body)
        except GateRefused as error:
            return error
        raise AssertionError(f"not refused: {answer}")

    def join(self, machine: str = "m-1", authorization: str | None = None, **more: Any) -> Json:
        """Have a machine join, with a new code unless one is given."""
        auth = authorization or self.invitation()
        return self.post("/v1/join", auth, **joining(machine, **more))


def joining(machine: str = "m-1", **more: Any) -> Json:
    """Return the body of a proper request to join."""
    return {
        "machine_id": machine,
        "hostname": f"host-{machine}",
        "time": time.time(),
        "versions": asdict(own_versions()),
        "ray_tuning_hash": ray_tuning_hash(),
        "csr": make_request(new_key(), machine),
    } | more


def membership_of(answer: Json, machine: str = "m-1") -> Membership:
    """Return what a machine keeps of the answer to its joining."""
    left_out = ("ray_token", "cert_pem", "trust_pem", "round")
    kept = {name: value for name, value in answer.items() if name not in left_out}
    addresses = ("127.0.0.1",)
    return Membership(**kept | {"machine_id": machine, "m1_addresses": addresses})


@contextmanager
def serving(home: Path, *, env: dict[str, str] | None = None, **options: Any) -> Iterator[GateRig]:
    """Serve a gate whose M1 has this home."""
    env = env or {}
    gate = free_port() - int(env.get("HCNA_PORTS__OFFSET", "0"))
    overrides = {"HCNA_RAY__NODE_ADDRESS": "127.0.0.1", "HCNA_PORTS__GATE": str(gate)}
    rig = GateRig(settings=load_settings(home=home, env=overrides | env), **options)
    rig.gate.start()
    try:
        yield rig
    finally:
        rig.gate.stop()


@contextmanager
def answering(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """Accept connections on a loopback port and hand each to ``handle``; yields the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        handle(connection)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=5)

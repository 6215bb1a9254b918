"""What both sides of the gate agree on: names, bounds, refusals, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hcna_ray.core.errors import HcnaError

Json = dict[str, Any]

#: Name in the gate's certificate. Members know M1 by it at any address, through any tunnel.
GATE_NAME = "gate.hcna.internal"
#: Longest body of a request and of an answer.
BODY_BYTES_MAX = 64 * 1024
#: Pause between two beats of a member.
BEAT_S = 3.0
#: A member whose last beat is no older than this is here: it waits to be told what comes.
PRESENT_S = 10.0
#: Clocks further apart than this do not join; leases, logs and certificates rest on them.
CLOCK_SKEW_S_MAX = 60.0
#: Ports in one request to connect back.
PORTS_MAX = 64
#: Addresses in one request for a certificate.
ADDRESSES_MAX = 32

#: Orders in the answer to a beat.
UP, DOWN, REMOVED = "up", "down", "removed"


class GateRefused(HcnaError):
    """M1 refused. ``code`` is stable; ``fix`` says what to do about it."""

    code = "refused"

    def __init__(self, status: int, code: str, message: str, fix: str = "") -> None:
        super().__init__(status, code, message, fix)
        self.status, self.code, self.message, self.fix = status, code, message, fix

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What must be equal on all machines of a cluster."""

    python: str
    ray: str
    hcna_ray: str

    def problems(self, m1: Versions) -> list[str]:
        """Return in which way this machine does not fit M1's; empty if it does."""
        found = []
        if _minor(self.python) != _minor(m1.python):
            found.append(f"Python is {self.python} here and {m1.python} on M1")
        if self.ray != m1.ray:
            found.append(f"Ray is {self.ray} here and {m1.ray} on M1")
        if self.hcna_ray != m1.hcna_ray:
            found.append(f"hcna-ray is {self.hcna_ray} here and {m1.hcna_ray} on M1")
        return found


def own_versions() -> Versions:
    """Return the versions of this process. Ray is not imported for it."""
    return Versions(
        python=platform.python_version(), ray=_installed("ray"), hcna_ray=_installed("hcna-ray")
    )


def parse_versions(data: Any) -> Versions:
    """Return versions out of a message; what is missing is ``?`` and fits nothing."""
    known = data if isinstance(data, Mapping) else {}
    return Versions(
        **{name: str(known.get(name, "?"))[:40] for name in Versions.__dataclass_fields__}
    )


def _minor(text: str) -> list[str]:
    return text.split(".")[:2]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"

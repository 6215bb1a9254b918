"""The life of one task, written down anew from the promises: what may follow what.

A log is replayed line by line. Overlapping leases, rising tokens and life after the end have checks
of their own (C7, C6, C5), so that each mistake is told once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.checker.inputs import TERMINAL, Fact, Token

ABSENT = "absent"
#: Lines that stand for a client's request and need one.
ASKED = {"accepted": "submit", "cancel_requested": "cancel", "replayed": "retry"}
KNOWN = frozenset(
    {
        "accepted",
        "queued",
        "granted",
        "returned",
        "started",
        "retry_scheduled",
        "lost",
        "cancel_requested",
        "unpinned",
        "replayed",
        *TERMINAL,
    }
)


@dataclass(frozen=True, slots=True)
class Life:
    """Where a task stands."""

    phase: str = ABSENT
    lease: Token | None = None
    cancel: bool = False

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.phase in TERMINAL


class Illegal(Exception):
    """A line that cannot follow what was before."""


def _must(held: bool, sentence: str) -> None:
    if not held:
        raise Illegal(sentence)


def after(life: Life, fact: Fact) -> Life:
    """Return where a task stands after one more line of its log.

    Raises:
        Illegal: the line contradicts what was before, or itself.
    """
    new = _after(life, fact)
    _must(
        new.phase == fact.state,
        f"after {fact.kind!r} the task must be {new.phase}, the log says {fact.state}",
    )
    return new


def _after(life: Life, fact: Fact) -> Life:
    kind, token, phase = fact.kind, fact.token, life.phase
    waiting = phase in ("scheduled", "queued") and life.lease is None
    holds = token is not None and token == life.lease and phase in ("queued", "running")
    match kind:
        case "accepted":
            _must(phase == ABSENT, f"accepted, but it was {phase} already")
            _must(fact.state in ("scheduled", "queued"), f"accepted as {fact.state}")
            return Life(fact.state)
        case "queued":
            _must(phase == "scheduled", f"queued out of {phase}")
            return replace(life, phase="queued")
        case "granted":
            _must(phase == "queued" or life.lease is not None, f"granted out of {phase}")
            _must(token is not None and fact.worker is not None, "granted to nobody")
            return replace(life, phase="queued", lease=token)
        case "returned":
            _must(holds and phase == "queued", "returned a lease that was not in force")
            return replace(life, lease=None)
        case "started":
            _must(holds and phase == "queued", "started without the lease in force")
            return replace(life, phase="running")
        case "retry_scheduled":
            _must(holds, "failed under a token that was not in force")
            return replace(life, phase="scheduled", lease=None)
        case "lost":
            _must(holds, "lost a lease that was not in force")
            return replace(life, phase="queued", lease=None)
        case "cancel_requested":
            _must(life.lease is not None, "a cancel was asked for, but nobody held the task")
            _must(not life.cancel, "a cancel was asked for twice")
            return replace(life, cancel=True)
        case "unpinned":
            _must(phase == "queued" and waiting, f"unpinned out of {phase}")
            return life
        case "replayed":
            _must(phase == "failed", f"replayed out of {phase}")
            return Life("queued")
        case "completed":
            _must(holds, "completed under a token that was not in force")
            return replace(life, phase="completed", lease=None)
        case "failed":
            _must(holds or (token is None and waiting), "failed under a token not in force")
            return replace(life, phase="failed", lease=None)
        case "cancelled":
            direct = token is None and waiting
            _must(direct or (holds and life.cancel), "cancelled while its lease was in force")
            return Life("cancelled", None, True)
        case "expired":
            _must(token is None and waiting, "expired while somebody held it")
            return replace(life, phase="expired")
        case _:
            # A newer store may tell more; what changes the task must be known here.
            _must(fact.state == phase, f"unknown line {kind!r} changed the task")
            return life


def needs_request(life: Life, fact: Fact) -> str | None:
    """Return the client's operation without which a line cannot be, or ``None``."""
    if fact.kind == "cancelled" and fact.token is None and not life.cancel:
        return "cancel"
    return ASKED.get(fact.kind)

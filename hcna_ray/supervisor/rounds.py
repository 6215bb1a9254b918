"""Rounds of credentials: what all machines must take over together, with one restart of Ray.

Ray knows one token at a time, and its processes read token and certificates when they start. So
another token, or another authority, is a *round*: M1 announces it, the members hand back what they
run and take the new credentials over, then M1's head starts anew and everybody with it. Tasks are
in the store and in the workers' outboxes, so none is lost.

``cluster/round.json``    the round of this machine's files; on M1 also whether it is under way
``keys/ray.token.next``   on M1, while a round is under way: the token that comes with it
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcna_ray import failpoints
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.security.authority import (
    RolloverRefused,
    begin_rollover,
    finish_rollover,
    is_rolling_over,
)
from hcna_ray.security.keys import ensure_ray_token, locked_dir

SCHEMA = 1
#: What a round can be asked for.
REASONS = ("token", "authority", "finish")


class RoundRefused(HcnaError):
    """No round can begin now. The text says why."""

    code = "round_refused"


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round of credentials."""

    number: int = 0
    #: What is new: one of `REASONS`, or ``certificates``; '' for those of the first start.
    reason: str = ""
    #: Announced, and M1's head runs with the old ones.
    pending: bool = False
    #: When it was announced, seconds since the epoch.
    at: float = 0.0


def read_round(cluster_dir: Path) -> Round:
    """Return the round of this machine's credentials; the first one if nothing tells."""
    try:
        data: Any = json.loads((cluster_dir / "round.json").read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            return Round()
        return Round(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # A member asks for its credentials again, which does no harm.
        return Round()


def write_round(cluster_dir: Path, made: Round) -> None:
    """Note the round that this machine's files belong to."""
    data = {"schema": SCHEMA, **asdict(made)}
    write_private(cluster_dir / "round.json", json.dumps(data, indent=2) + "\n")


def announce(cluster_dir: Path, keys_dir: Path, reason: str, *, now: float) -> Round:
    """Begin a round on M1, with a new token.

    Raises:
        RoundRefused: One is under way.
    """
    with locked_dir(cluster_dir):
        before = read_round(cluster_dir)
        if before.pending:
            raise RoundRefused("a restart with new credentials is under way already")
        made = Round(number=before.number + 1, reason=reason, pending=True, at=now)
        write_private(keys_dir / "ray.token.next", secrets.token_hex(32))
        write_round(cluster_dir, made)
    failpoints.hit("credentials.round.announced")
    return made


def begin(cluster_dir: Path, keys_dir: Path, reason: str, *, now: float) -> Round:
    """Announce a round on M1 and make the change that it is for.

    Meanwhile nobody is given credentials. In this order: what is cut off in between is announced,
    so `complete` makes the change up before anybody is served again.

    Args:
        cluster_dir: Where the authority is.
        keys_dir: Where the token is.
        reason: One of `REASONS`.
        now: Seconds since the epoch.

    Raises:
        RoundRefused: One is under way.
        RolloverRefused: The authority cannot change now, or is not changing.
    """
    rolling = is_rolling_over(cluster_dir)
    if reason == "authority" and rolling:
        raise RolloverRefused("the last change of the authority has not ended yet")
    if reason == "finish" and not rolling:
        raise RolloverRefused("no change of the authority is under way")
    made = announce(cluster_dir, keys_dir, reason, now=now)
    try:
        _change_authority(cluster_dir, made)
    except Exception:
        # What is announced goes on as a restart with another token, and is made up for by nobody:
        # members may have heard of it by then.
        write_round(cluster_dir, replace(made, reason="token"))
        raise
    return made


def complete(cluster_dir: Path, keys_dir: Path) -> Round:
    """End a round that was cut off, before anybody is served; see `begin` and `take_over`."""
    current = read_round(cluster_dir)
    if current.pending:
        _change_authority(cluster_dir, current)
    return take_over(cluster_dir, keys_dir)


def _change_authority(cluster_dir: Path, made: Round) -> None:
    now = datetime.fromtimestamp(made.at, UTC)
    if made.reason == "authority" and not is_rolling_over(cluster_dir):
        begin_rollover(cluster_dir, now=now)
    elif made.reason == "finish":
        finish_rollover(cluster_dir, now=now)


def take_over(cluster_dir: Path, keys_dir: Path) -> Round:
    """End a round on M1: from here on Ray's processes start with the new token.

    May be called again after it was cut off, and when no round is under way.
    """
    with locked_dir(cluster_dir):
        current = read_round(cluster_dir)
        following = keys_dir / "ray.token.next"
        if not current.pending:
            following.unlink(missing_ok=True)
            return current
        if following.exists():
            write_private(keys_dir / "ray.token", following.read_text(encoding="ascii"))
            failpoints.hit("credentials.token.taken")
        made = replace(current, pending=False)
        write_round(cluster_dir, made)
        failpoints.hit("credentials.round.ended")
        following.unlink(missing_ok=True)
    return made


def token_digest(token: str) -> str:
    """Return what tells one token of Ray from another, and nothing of either."""
    return hashlib.sha256(b"hcna.ray-token.v1\0" + token.encode()).hexdigest()[:16]


def held_token_digest(keys_dir: Path) -> str:
    """Return the digest of this machine's token; '' if it has none."""
    try:
        return token_digest((keys_dir / "ray.token").read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return ""


def expected_token_digest(cluster_dir: Path, keys_dir: Path) -> str:
    """Return the digest of what `token_for_members` returns, '' if there is none yet.

    Without waiting for whoever holds the lock: whenever it looks, it finds the one or the other.
    """
    try:
        if read_round(cluster_dir).pending:
            following = (keys_dir / "ray.token.next").read_text(encoding="ascii")
            return token_digest(following.strip())
    except (OSError, ValueError):
        pass  # It was taken over just now.
    return held_token_digest(keys_dir)


def token_for_members(cluster_dir: Path, keys_dir: Path) -> str:
    """Return the token that a member needs: that of the round under way, if there is one."""
    with locked_dir(cluster_dir):
        following = keys_dir / "ray.token.next"
        path = (
            following
            if read_round(cluster_dir).pending and following.exists()
            else ensure_ray_token(keys_dir)
        )
        return path.read_text(encoding="ascii").strip()

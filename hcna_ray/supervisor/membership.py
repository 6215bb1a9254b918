"""Who belongs to the cluster: M1's list of members, and on a member what it knows of M1.

``cluster/members.json``     on M1, one entry per machine that has joined
``cluster/membership.json``  on a machine that has joined; its presence makes it a worker
``cluster/machine_id``       on both, made once: the same machine joins again under its old name
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.naming import NodeName, is_short_name
from hcna_ray.durable import write_private
from hcna_ray.security.keys import locked_dir

SCHEMA = 1
#: More machines than this are a mistake; each beat reads the list.
MEMBERS_MAX = 1000


class NameTaken(HcnaError):
    """Another machine has this name. The text says which one."""

    code = "name_taken"

    def __init__(self, name: str, hostname: str, address: str) -> None:
        super().__init__(name, hostname, address)
        self.name, self.hostname, self.address = name, hostname, address

    def __str__(self) -> str:
        return f"{self.name} is taken by {self.hostname} at {self.address}"


class NameRefused(HcnaError):
    """The name asked for cannot be given to this machine."""

    code = "name_refused"


class MembersBroken(HcnaError):
    """A file below ``cluster/`` exists but cannot be understood. It is left as it is."""

    code = "members_broken"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} cannot be used: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A machine that has joined, as M1 remembers it. Its token is kept as a digest only."""

    name: str
    node_id: str
    machine_id: str
    hostname: str
    #: Where it was seen last.
    address: str
    token_sha256: str
    joined_at: float


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What a machine that has joined knows of its cluster."""

    name: str
    node_id: str
    machine_id: str
    #: Addresses of M1, the one that worked first.
    m1_addresses: tuple[str, ...]
    gate_port: int
    ca_pem: str
    ca_sha256: str
    member_token: str
    #: Ray's GCS, ``host:port``.
    ray_address: str
    moderator_node_id: str
    #: Settings that M1 decides for all, see `config.shared_part`.
    shared: Mapping[str, Any]
    joined_at: float
    #: Own address if one was chosen; None: that of the route to M1, asked at every start.
    address: str | None = None


# -- the list on M1 ------------------------------------------------------------------------------


def read_members(cluster_dir: Path) -> tuple[Member, ...]:
    """Return the machines that have joined, in the order of their names.

    Raises:
        MembersBroken: The file is there but is not one of ours.
    """
    path = cluster_dir / "members.json"
    data = _read_object(path)
    if data is None:
        return ()
    try:
        return tuple(Member(**entry) for entry in data["members"])
    except (KeyError, TypeError) as error:
        raise MembersBroken(str(path), f"an entry is wrong ({error})") from None


def find_member(cluster_dir: Path, token: str) -> Member | None:
    """Return the member with this token, or None. A wrong token takes as long as a right one."""
    presented, found = digest(token), None
    for member in read_members(cluster_dir):
        if hmac.compare_digest(member.token_sha256, presented):
            found = member
    return found


def choose_name(
    members: Collection[Member],
    *,
    machine_id: str,
    requested: str | None = None,
    reserved: Collection[str] = (),
    expected: Collection[str] = (),
) -> str:
    """Return the short name for a machine that joins.

    A machine that is known keeps its name. Else it gets the one it asks for, or the lowest free W.

    Args:
        members: All that have joined.
        machine_id: Who asks.
        requested: Name it asks for.
        reserved: Names of workers of M1's own machine, which stay.
        expected: Names meant for other machines: given to whoever asks, not to whoever does not.

    Raises:
        NameTaken: Another machine has the name.
        NameRefused: No name of a worker, or not the one this machine has.
    """
    by_name = {member.name: member for member in members}
    known = next((member for member in members if member.machine_id == machine_id), None)
    if known is not None:
        if requested not in (None, known.name):
            raise NameRefused(f"this machine is {known.name} already, so it cannot be {requested}")
        return known.name
    if requested is not None:
        if not is_short_name(requested) or not requested.startswith("W"):
            raise NameRefused(f"{requested!r} is not a worker's name; W1, W2, ... are")
        if requested in by_name:
            holder = by_name[requested]
            raise NameTaken(requested, holder.hostname, holder.address)
        if requested in reserved:
            raise NameTaken(requested, "M1's own worker", "M1")
        return requested
    index = 1
    while f"W{index}" in by_name or f"W{index}" in reserved or f"W{index}" in expected:
        index += 1
    return f"W{index}"


def node_id_for(name: str, like: str) -> str:
    """Return the full name of worker ``name`` in the cluster of the node ``like``."""
    role, index = name[0], int(name[1:])
    return str(replace(NodeName.parse(like), role=role, index=index))


def add_member(cluster_dir: Path, member: Member) -> None:
    """Put a machine on the list, in place of its former entry if it has one.

    Raises:
        NameTaken: Another machine has the name.
        NameRefused: The list is full.
    """
    with locked_dir(cluster_dir):
        others = [m for m in read_members(cluster_dir) if m.machine_id != member.machine_id]
        for other in others:
            if other.name == member.name:
                raise NameTaken(member.name, other.hostname, other.address)
        if len(others) >= MEMBERS_MAX:
            raise NameRefused(f"there are {MEMBERS_MAX} machines already")
        _write_members(cluster_dir, [*others, member])


def remove_member(cluster_dir: Path, name: str) -> Member | None:
    """Take a machine off the list; return what it was, or None if there was none."""
    with locked_dir(cluster_dir):
        members = read_members(cluster_dir)
        found = next((member for member in members if member.name == name), None)
        if found is not None:
            _write_members(cluster_dir, [member for member in members if member != found])
    return found


def move_member(cluster_dir: Path, name: str, address: str) -> None:
    """Note that a machine was seen at another address."""
    with locked_dir(cluster_dir):
        members = read_members(cluster_dir)
        moved = [replace(m, address=address) if m.name == name else m for m in members]
        if moved != list(members):
            _write_members(cluster_dir, moved)


def new_token() -> str:
    """Return a fresh token of 256 bits, in hex."""
    return secrets.token_hex(32)


def digest(token: str) -> str:
    """Return what is kept of a token: it is random enough to need neither salt nor stretching."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _write_members(cluster_dir: Path, members: Collection[Member]) -> None:
    ordered = sorted(members, key=lambda member: (len(member.name), member.name))
    data = {"schema": SCHEMA, "members": [asdict(member) for member in ordered]}
    write_private(cluster_dir / "members.json", json.dumps(data, indent=2) + "\n")


# -- on a member ---------------------------------------------------------------------------------


def read_membership(cluster_dir: Path) -> Membership | None:
    """Return what this machine joined, or None if it has not joined another one's cluster.

    Raises:
        MembersBroken: The file is there but is not one of ours.
    """
    path = cluster_dir / "membership.json"
    data = _read_object(path)
    if data is None:
        return None
    fields = {name: value for name, value in data.items() if name != "schema"}
    try:
        return Membership(**fields | {"m1_addresses": tuple(fields["m1_addresses"])})
    except (KeyError, TypeError) as error:
        raise MembersBroken(str(path), f"a field is wrong ({error})") from None


def write_membership(cluster_dir: Path, membership: Membership) -> None:
    """Make this machine a member."""
    data = {"schema": SCHEMA, **asdict(membership)}
    with locked_dir(cluster_dir):
        write_private(cluster_dir / "membership.json", json.dumps(data, indent=2) + "\n")


def remove_membership(cluster_dir: Path) -> None:
    """Forget what this machine joined. Its ``machine_id`` stays."""
    (cluster_dir / "membership.json").unlink(missing_ok=True)


def machine_id(cluster_dir: Path) -> str:
    """Return the id of this machine, random and made at the first call."""
    with locked_dir(cluster_dir):
        known = known_machine_id(cluster_dir)
        if known is not None:
            return known
        fresh = str(uuid.uuid4())
        write_private(cluster_dir / "machine_id", fresh + "\n")
        return fresh


def known_machine_id(cluster_dir: Path) -> str | None:
    """Return the id of this machine, or None if it has none yet. Nothing is written."""
    try:
        return str(uuid.UUID((cluster_dir / "machine_id").read_text(encoding="ascii").strip()))
    except (OSError, ValueError):
        return None


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file of our schema, or None if there is no file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise MembersBroken(str(path), str(error)) from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise MembersBroken(str(path), f"it is not an object of schema {SCHEMA}")
    return data

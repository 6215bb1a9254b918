"""API keys: who holds them, what they may do, and how they are kept.

    keys/keys.json    one entry a key: digest, name, role, scopes, expiry, quota, rate; schema 2
    keys/client.key   the owner's own key in clear, mode 0600, so that the command line just works

A key is 256 random bits, shown once. What is kept is its plain SHA-256. A slow hash (bcrypt,
argon2) makes guessing a *weak* secret dear; a secret of 256 bits cannot be guessed at any price,
and a slow hash would cost every request milliseconds and hand whoever sends wrong keys a way to
keep C1 busy. For the same reason no salt is needed: no two keys are alike, and no table holds them.

They are a file and not a table of the store because the same file is read by C1 and the gate, both
on M1, while M1 itself or its database is away; because ``hcna keys`` works before anything runs;
and because it is in ``hcna backup --with-keys`` and in no other backup. It is replaced in one step,
so that C1 sees a change by its stamp (`hcna_ray.security.key_ring`).

A key is one of an *owner*, by default its own name. Tasks belong to the owner, not to the key: so a
key can be replaced, and a second one can be handed to another program of the same person.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import OWNER
from hcna_ray.durable import make_private_dir, write_private

#: From the least to the most; each may do what those before it may.
Role = Literal["viewer", "submitter", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

#: What a key starts with, so that a leaked one is recognised by scanners.
PREFIX = "hcna_"
#: Keys on record, those included that were taken back.
KEYS_MAX = 1000
#: Entries in one scope of a key.
SCOPE_MAX = 100
QUOTA_MAX = 100_000_000
RATE_MAX = 1e6
SCHEMA = 2
#: Where they are, below ``keys/``.
FILE = "keys.json"
#: Digits of a digest by which a key is named where its name is not enough.
FINGERPRINT = 12

#: What entries of schema 1 said instead of a role of today, and what that was allowed to do.
_ROLES_OF_SCHEMA_1: Mapping[str, Role] = {"admin": "admin", "user": "operator"}
_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,99}\*?\Z|\*\Z")


class KeyFileBroken(HcnaError):
    """``keys.json`` exists but cannot be understood. Nobody is let in until it is repaired."""

    code = "key_file_broken"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} cannot be used: {self.reason}"


class KeyRefused(HcnaError):
    """A key cannot be created as asked for, or there is none to be taken back."""

    code = "key_refused"


class View(IntEnum):
    """How much of a task a caller sees."""

    #: It does not exist for them.
    NONE = 0
    #: Type, state, times, where it runs: nothing that its submitter or its handler wrote.
    OUTLINE = 1
    FULL = 2


#: How much a role sees of the tasks of others. One's own are seen in full by every role.
OF_OTHERS: Mapping[Role, View] = {
    "viewer": View.OUTLINE,
    "submitter": View.NONE,
    "operator": View.FULL,
    "admin": View.FULL,
}


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key on record. The key itself is not here and cannot be found out from this."""

    name: str
    role: Role
    sha256: str
    created_at: float
    #: Whose the tasks are that are submitted with it.
    owner: str = ""
    #: Names, or beginnings of names before a ``*``; empty means every one.
    task_types: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    expires_at: float | None = None
    revoked_at: float | None = None
    #: Tasks of the owner that may wait or run while one more is accepted.
    quota: int | None = None
    #: Requests a second, and how many at once after a quiet while.
    rate: float | None = None
    burst: int | None = None

    def __post_init__(self) -> None:
        """A key without an owner is its own."""
        if not self.owner:
            object.__setattr__(self, "owner", self.name)

    @cached_property
    def rank(self) -> int:
        """Place of its role among `ROLES`."""
        return ROLES.index(self.role)

    @property
    def fingerprint(self) -> str:
        """The first digits of its digest."""
        return self.sha256[:FINGERPRINT]

    @cached_property
    def scoped(self) -> bool:
        """Whether it is limited to some task types or queues."""
        return bool(self.task_types or self.queues)

    @cached_property
    def sees_all(self) -> bool:
        """Whether there is nothing that it may not see in full: then nothing is compared."""
        return OF_OTHERS[self.role] is View.FULL and not self.scoped

    def covers(self, task_type: str | None = None, queue: str | None = None) -> bool:
        """Whether a task type and a queue lie in its scopes; ``None`` is not asked about."""
        return (task_type is None or _among(task_type, self.task_types)) and (
            queue is None or _among(queue, self.queues)
        )

    def view(self, principal: str, task_type: str, queue: str) -> View:
        """How much it shows of a task. What lies outside its scopes does not exist for it."""
        if self.scoped and not self.covers(task_type, queue):
            return View.NONE
        return View.FULL if principal == self.owner else OF_OTHERS[self.role]

    def state(self, now: float) -> Literal["good", "expired", "revoked"]:
        """Whether it opens anything at an instant."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "expired"
        return "good"


def _among(name: str, patterns: Sequence[str]) -> bool:
    if not patterns:
        return True
    return any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        for pattern in patterns
    )


def create_key(
    keys_dir: Path,
    *,
    name: str,
    role: Role,
    now: float,
    owner: str | None = None,
    task_types: Iterable[str] = (),
    queues: Iterable[str] = (),
    expires_at: float | None = None,
    quota: int | None = None,
    rate: float | None = None,
    burst: int | None = None,
) -> str:
    """Create a key and return it in clear; only its digest is kept.

    Args:
        keys_dir: Directory of the key files; made with mode 0700 if it is missing.
        name: Shown in listings and in the audit; taken until the key is revoked.
        role: What it may do; see ``docs/reference/access.md``.
        now: Seconds since the epoch, kept as ``created_at``.
        owner: Whose tasks it submits and sees; default ``name``.
        task_types: Names it is limited to; ``drgfc.*`` means all that begin so.
        queues: Likewise.
        expires_at: Instant from which on it is refused.
        quota: Tasks of its owner that may be waiting or running.
        rate: Requests a second.
        burst: Requests at once after a quiet while; default what ``rate`` allows in a second.

    Raises:
        KeyRefused: The name is taken, something is out of bounds, or there are `KEYS_MAX` keys.
        KeyFileBroken: The existing file cannot be read; it is left as it is.
    """
    wanted = ApiKey(
        name=name,
        role=role,
        sha256="",
        created_at=now,
        owner=owner or name,
        task_types=tuple(dict.fromkeys(task_types)),
        queues=tuple(dict.fromkeys(queues)),
        expires_at=expires_at,
        quota=quota,
        rate=rate,
        burst=_burst_of(rate) if burst is None else burst,
    )
    if name == OWNER:
        raise KeyRefused(f"the key {OWNER!r} is made at the first start; choose another name")
    with locked_dir(keys_dir):
        return _create(keys_dir, wanted, now)


def revoke_key(keys_dir: Path, which: str, *, now: float) -> ApiKey:
    """Take a key back and return it as it is on record now.

    Args:
        keys_dir: Directory of the key files.
        which: Its name, or the first digits of its digest (at least 6) as listings show it.
        now: Kept as ``revoked_at``.

    Raises:
        KeyRefused: There is no such key, or several.
        KeyFileBroken: The existing file cannot be read; it is left as it is.
    """
    with locked_dir(keys_dir):
        known = load_keys(keys_dir)
        named = [key for key in known if key.name == which and key.revoked_at is None]
        if not named and len(which) >= 6:
            named = [
                key
                for key in known
                if key.sha256.startswith(which.lower()) and key.revoked_at is None
            ]
        if len(named) != 1:
            raise KeyRefused(
                f"{len(named)} keys begin with {which!r}"
                if named
                else f"there is no key {which!r} that could be revoked"
            )
        gone = replace(named[0], revoked_at=now)
        _save(keys_dir, [gone if key is named[0] else key for key in known])
        return gone


def ensure_owner_key(keys_dir: Path, *, now: float) -> str:
    """Return the owner's key in clear; create it (role ``admin``) at the first start.

    If the clear file was lost, or its key revoked, the owner gets a new key and the old one stops
    working.
    """
    with locked_dir(keys_dir):
        known = load_keys(keys_dir)
        clear = read_client_key(keys_dir)
        if clear is not None:
            found = verify(known, clear)
            if found is not None and found.state(now) == "good":
                return clear
        left = [key for key in known if key.name != OWNER or key.revoked_at is not None]
        if len(left) != len(known):
            _save(keys_dir, left)
        wanted = ApiKey(name=OWNER, role="admin", sha256="", created_at=now)
        clear = _create(keys_dir, wanted, now)
        write_private(keys_dir / "client.key", clear + "\n")
        return clear


def ensure_ray_token(keys_dir: Path) -> Path:
    """Return the file with the token that Ray demands of everyone who connects; create it once."""
    path = keys_dir / "ray.token"
    with locked_dir(keys_dir):
        if not path.exists():
            write_private(path, secrets.token_hex(32))
    return path


def read_client_key(keys_dir: Path) -> str | None:
    """Return the owner's key in clear, or None before the first start."""
    try:
        return (keys_dir / "client.key").read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None


def load_keys(keys_dir: Path) -> tuple[ApiKey, ...]:
    """Return all keys on record, oldest first, those revoked and expired too.

    Raises:
        KeyFileBroken: The file is there but is not one of ours.
    """
    path = keys_dir / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except ValueError as error:
        raise KeyFileBroken(str(path), f"it is not JSON ({error})") from None
    return parse_keys(text, str(path))


def parse_keys(text: str, where: str) -> tuple[ApiKey, ...]:
    """Return what a file of keys says.

    Args:
        text: Its content.
        where: What it is called in errors.

    Raises:
        KeyFileBroken: It is not one of ours.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KeyFileBroken(where, f"it is not JSON ({error})") from None
    try:
        schema = data["schema"]
        if schema not in (1, SCHEMA):
            raise KeyFileBroken(where, f"its schema is {schema!r}, not {SCHEMA}")
        keys = tuple(_parse(entry, schema) for entry in data["keys"])
    except (KeyError, TypeError, ValueError) as error:
        raise KeyFileBroken(where, f"an entry is wrong ({error!r})") from None
    return keys


def keys_text(keys: Sequence[ApiKey]) -> str:
    """Return the content of a file of keys."""
    return json.dumps({"schema": SCHEMA, "keys": [asdict(key) for key in keys]}, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class KeysRestored:
    """What becomes of keys where a backup of them is restored."""

    keys: tuple[ApiKey, ...]
    #: Taken back after the backup was made: they stay so.
    revoked: tuple[ApiKey, ...]
    #: Good in the backup, and on record no more.
    appeared: tuple[ApiKey, ...]
    #: On record and good, and not in the backup.
    gone: tuple[ApiKey, ...]


def restored_keys(
    backup: Sequence[ApiKey], before: Sequence[ApiKey], *, now: float
) -> KeysRestored:
    """Return the keys of a backup as they are to be: who was locked out since stays locked out.

    Args:
        backup: The backup's.
        before: Those on record until now.
        now: Seconds since the epoch.
    """
    known, kept = by_digest(before), by_digest(backup)
    keys = []
    revoked = []
    for key in backup:
        old = known.get(key.sha256)
        if key.revoked_at is None and old is not None and old.revoked_at is not None:
            key = replace(key, revoked_at=old.revoked_at)
            revoked.append(key)
        keys.append(key)
    return KeysRestored(
        keys=tuple(keys),
        revoked=tuple(revoked),
        appeared=tuple(k for k in keys if k.sha256 not in known and k.state(now) == "good"),
        gone=tuple(k for k in before if k.sha256 not in kept and k.state(now) == "good"),
    )


def digest_of(clear: str) -> str:
    """Return the digest of a key, as it is kept."""
    return hashlib.sha256(clear.encode("utf-8", "surrogatepass")).hexdigest()


def by_digest(keys: Iterable[ApiKey]) -> dict[str, ApiKey]:
    """Return the keys by what is kept of them, for `look_up`."""
    return {key.sha256: key for key in keys}


def look_up(known: Mapping[str, ApiKey], presented: str) -> ApiKey | None:
    """Return the key that was presented, revoked and expired ones too, or None.

    The time taken tells nothing of a key that is near: what is looked for is the digest of what was
    sent, and nobody can choose how a digest begins. What is found is compared in constant time.
    """
    digest = digest_of(presented)
    found = known.get(digest)
    if found is not None and hmac.compare_digest(found.sha256, digest):
        return found
    return None


def verify(keys: Sequence[ApiKey], presented: str) -> ApiKey | None:
    """Return the presented key, revoked and expired ones too, or None."""
    return look_up(by_digest(keys), presented)


def _create(keys_dir: Path, wanted: ApiKey, now: float) -> str:
    """Check what is wanted and add it; the directory is locked."""
    known = list(load_keys(keys_dir))
    _check(wanted)
    if any(key.name == wanted.name and key.revoked_at is None for key in known):
        raise KeyRefused(f"there is a key named {wanted.name!r} already")
    if len(known) >= KEYS_MAX:
        # What opens nothing any more is kept to be looked at, and goes when room is needed.
        useless = [key for key in known if key.state(now) != "good"]
        if not useless:
            raise KeyRefused(f"there are {KEYS_MAX} keys already")
        known.remove(useless[0])
    clear = PREFIX + secrets.token_urlsafe(32)
    _save(keys_dir, [*known, replace(wanted, sha256=digest_of(clear))])
    return clear


def _burst_of(rate: float | None) -> int | None:
    if rate is None or not math.isfinite(rate):
        return None
    return max(1, math.ceil(rate))


def _check(key: ApiKey) -> None:
    if key.role not in ROLES:
        raise KeyRefused(f"role {key.role!r} is unknown (known: {', '.join(ROLES)})")
    for what, text in (("name", key.name), ("owner", key.owner)):
        if not text or len(text) > 64 or not text.isprintable() or text != text.strip():
            raise KeyRefused(f"the {what} of a key has 1 to 64 printable characters")
    if key.owner == OWNER and OF_OTHERS[key.role] is not View.FULL:
        raise KeyRefused(f"the tasks of {OWNER!r} are for keys of role operator and admin")
    for what, names in (("task type", key.task_types), ("queue", key.queues)):
        if len(names) > SCOPE_MAX:
            raise KeyRefused(f"a key names at most {SCOPE_MAX} of them: {what}")
        for name in names:
            if not _PATTERN.match(name):
                raise KeyRefused(f"{name!r} is neither a {what} nor the beginning of one with a *")
    if key.scoped and key.role == "admin":
        raise KeyRefused("an admin may do everything: scopes are for the other roles")
    if key.expires_at is not None and not key.created_at < key.expires_at < 1e11:
        raise KeyRefused("a key expires after now")
    if key.quota is not None and not 1 <= key.quota <= QUOTA_MAX:
        raise KeyRefused(f"a quota is 1 to {QUOTA_MAX} tasks")
    if key.rate is not None and not 0 < key.rate <= RATE_MAX:
        raise KeyRefused(f"a rate is above 0 and at most {RATE_MAX:g} requests a second")
    if key.burst is not None and (key.rate is None or not 1 <= key.burst <= RATE_MAX):
        raise KeyRefused(f"a burst is 1 to {RATE_MAX:g} requests, and goes with a rate")


def _save(keys_dir: Path, keys: Sequence[ApiKey]) -> None:
    write_private(keys_dir / FILE, keys_text(keys))


_FIELDS = frozenset(each.name for each in fields(ApiKey))


def _parse(entry: dict[str, Any], schema: int) -> ApiKey:
    """Read one entry. What is not understood might be a limit, so it is not passed over."""
    if unknown := sorted(set(entry) - _FIELDS):
        raise ValueError(f"field {unknown[0]!r}")
    role = _ROLES_OF_SCHEMA_1.get(entry["role"]) if schema == 1 else entry["role"]
    digest = entry["sha256"]
    if not isinstance(digest, str) or len(bytes.fromhex(digest)) != 32:
        raise ValueError("sha256")
    if role not in ROLES:
        raise ValueError(f"role {entry['role']!r}")
    name = _typed(entry["name"], str)
    if schema == 1:
        name = _name_of_schema_1(name, digest)
    key = ApiKey(
        name=name,
        role=role,
        sha256=digest.lower(),
        created_at=_number(entry["created_at"]),
        owner=_typed(entry.get("owner", ""), str),
        task_types=_names(entry.get("task_types", [])),
        queues=_names(entry.get("queues", [])),
        expires_at=_optional(entry.get("expires_at")),
        revoked_at=_optional(entry.get("revoked_at")),
        quota=None if entry.get("quota") is None else _typed(entry["quota"], int),
        rate=_optional(entry.get("rate")),
        burst=None if entry.get("burst") is None else _typed(entry["burst"], int),
    )
    try:
        _check(replace(key, expires_at=None))
    except KeyRefused as error:
        raise ValueError(str(error)) from None
    return key


def _name_of_schema_1(name: str, digest: str) -> str:
    """Return a name without the blanks around it, which were allowed in schema 1."""
    bare = name.strip()
    if bare == name or (bare and bare != OWNER):
        return bare
    return f"key-{digest[:FINGERPRINT].lower()}"  # Nothing is left, or somebody else's name.


def _typed(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_typed(name, str) for name in _typed(value, list))


@contextmanager
def locked_dir(directory: Path) -> Iterator[None]:
    """Let one process (and thread) at a time change the files of a private directory."""
    make_private_dir(directory)
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

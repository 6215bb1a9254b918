"""API keys: 256 random bits, shown once, kept as SHA-256.

``keys/keys.json`` holds one entry per key (digest, name, role, time). ``keys/client.key`` holds the
owner's own key in clear, mode 0600, so that the command line works without any further step. A
digest without salt or stretching is enough here: the key itself has 256 bits of entropy.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import make_private_dir, write_private

Role = Literal["admin", "user"]

#: What a key starts with, so that a leaked one is recognised by scanners.
PREFIX = "hcna_"
#: More keys than this are a mistake; each request is compared with all of them.
KEYS_MAX = 1000
SCHEMA = 1
_OWNER = "owner"


class KeyFileBroken(HcnaError):
    """``keys.json`` exists but cannot be understood. Nobody is let in until it is repaired."""

    code = "key_file_broken"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} cannot be used: {self.reason}"


class KeyRefused(HcnaError):
    """A key cannot be created under this name or role, or there are too many."""

    code = "key_refused"


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One known key. The key itself is not here and cannot be found out from this."""

    name: str
    role: Role
    sha256: str
    created_at: float


def create_key(keys_dir: Path, *, name: str, role: Role, now: float) -> str:
    """Create a key and return it in clear; only its digest is kept.

    Args:
        keys_dir: Directory of the key files; made with mode 0700 if it is missing.
        name: Who holds the key; unique, shown in listings and in the audit.
        role: ``admin`` may also use ``/admin/*``; ``user`` may do everything else.
        now: Seconds since the epoch, kept as ``created_at``.

    Raises:
        KeyRefused: The name is taken or empty, the role unknown, or there are `KEYS_MAX` keys.
        KeyFileBroken: The existing file cannot be read; it is left as it is.
    """
    with locked_dir(keys_dir):
        return _create(keys_dir, name=name, role=role, now=now)


def ensure_owner_key(keys_dir: Path, *, now: float) -> str:
    """Return the owner's key in clear; create it (role ``admin``) at the first start.

    If the clear file was lost, the owner gets a new key and the old one stops working.
    """
    with locked_dir(keys_dir):
        known = load_keys(keys_dir)
        clear = read_client_key(keys_dir)
        if clear is not None and verify(known, clear) is not None:
            return clear
        _save(keys_dir, [key for key in known if key.name != _OWNER])
        clear = _create(keys_dir, name=_OWNER, role="admin", now=now)
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
    """Return all known keys, oldest first; none before the first start.

    Raises:
        KeyFileBroken: The file is there but is not one of ours.
    """
    path = keys_dir / "keys.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except ValueError as error:
        raise KeyFileBroken(str(path), f"it is not JSON ({error})") from None
    try:
        if data["schema"] != SCHEMA:
            raise KeyFileBroken(str(path), f"its schema is {data['schema']!r}, not {SCHEMA}")
        keys = tuple(_parse(entry) for entry in data["keys"])
    except (KeyError, TypeError, ValueError) as error:
        raise KeyFileBroken(str(path), f"an entry is wrong ({error!r})") from None
    return keys


def verify(keys: Sequence[ApiKey], presented: str) -> ApiKey | None:
    """Return the presented key, or None. A wrong key takes as long as a right one."""
    digest = _digest(presented)
    found: ApiKey | None = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def _create(keys_dir: Path, *, name: str, role: Role, now: float) -> str:
    known = load_keys(keys_dir)
    if role not in get_args(Role):
        raise KeyRefused(f"role {role!r} is unknown (known: {', '.join(get_args(Role))})")
    if not name or len(name) > 64 or not name.isprintable():
        raise KeyRefused("the name of a key has 1 to 64 printable characters")
    if any(key.name == name for key in known):
        raise KeyRefused(f"there is a key named {name!r} already")
    if len(known) >= KEYS_MAX:
        raise KeyRefused(f"there are {KEYS_MAX} keys already")
    clear = PREFIX + secrets.token_urlsafe(32)
    _save(keys_dir, [*known, ApiKey(name=name, role=role, sha256=_digest(clear), created_at=now)])
    return clear


def _save(keys_dir: Path, keys: Sequence[ApiKey]) -> None:
    data = {"schema": SCHEMA, "keys": [asdict(key) for key in keys]}
    write_private(keys_dir / "keys.json", json.dumps(data, indent=2) + "\n")


def _parse(entry: dict[str, object]) -> ApiKey:
    role, digest, created_at = entry["role"], entry["sha256"], entry["created_at"]
    if role not in get_args(Role):
        raise ValueError(f"role {role!r}")
    if not isinstance(digest, str) or len(bytes.fromhex(digest)) != 32:
        raise ValueError("sha256")
    if not isinstance(created_at, int | float):
        raise ValueError("created_at")
    return ApiKey(
        name=str(entry["name"]),
        role=cast(Role, role),
        sha256=digest.lower(),
        created_at=float(created_at),
    )


def _digest(clear: str) -> str:
    return hashlib.sha256(clear.encode("utf-8", "surrogatepass")).hexdigest()


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

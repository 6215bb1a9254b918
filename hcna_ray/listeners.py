"""Whose program listens on a port of this machine, before a secret is sent there.

While C1 is down, any user of the machine may listen on its loopback port. Linux tells whose socket
that is (``/proc/net/tcp``, see proc_net(5)); elsewhere nobody does.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENING = "0A"
_ROOT = 0
_ANY = frozenset({"0.0.0.0", "::"})
#: An IPv4 address as an IPv6 socket has it.
_MAPPED = "::ffff:"


def stranger_at(
    host: str, port: int, trusted_uid: int, tables: tuple[Path, ...] = _TABLES
) -> int | None:
    """Return the user id of a stranger who listens there, or None if none is known to.

    No stranger is this user, root, and ``trusted_uid``, whose secret it is.

    Args:
        host: An address of this machine, or ``localhost``.
        port: TCP port.
        trusted_uid: Owner of what would be sent.
        tables: Where the kernel tells; for tests.
    """
    addresses = {"127.0.0.1", "::1"} if host == "localhost" else {host}
    known = {os.getuid(), trusted_uid, _ROOT} if hasattr(os, "getuid") else {_ROOT}
    for table in tables:
        for address, number, uid in _listeners(table):
            if number == port and address in addresses | _ANY and uid not in known:
                return uid
    return None


def _listeners(table: Path) -> Iterator[tuple[str, int, int]]:
    """Yield address, port and user id of each listening socket."""
    try:
        lines = table.read_text("ascii").splitlines()[1:]
    except (OSError, ValueError):
        return
    for words in map(str.split, lines):
        if len(words) > 7 and words[3] == _LISTENING:
            address, _, port = words[1].rpartition(":")
            yield _address(address), int(port, 16), int(words[7])


def _address(text: str) -> str:
    """Return an address of the kernel's table: 32-bit words in the byte order of the machine."""
    raw = bytes.fromhex(text)
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, packed).removeprefix(_MAPPED)

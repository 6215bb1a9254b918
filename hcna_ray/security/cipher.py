"""The message cipher: intents and telemetry sealed from end to end, whatever carries them.

``security.enable_bpcs`` turns it on, on M1 and on each worker. A licensed cipher takes its place by
an entry point ``bpcs`` in the group ``hcna_ray.ciphers``: a function that is given the settings'
``bpcs_key_exchange`` and the pre-shared key (or None) and returns a `MessageCipher`. Without one
this stand-in is used: ChaCha20-Poly1305, with keys from X25519 (``diffie-hellman``) or from a key
that the owner has put on each machine (``pre-shared``).

A channel lives as long as a worker's session. Each direction has its own key and counts its
messages; a counter is opened once, and none that lies far behind: what was captured cannot be sent
again, sent back, or sent in another session.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, Protocol, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hcna_ray.core.errors import HcnaError

GROUP, NAME = "hcna_ray.ciphers", "bpcs"
KeyExchange = Literal["diffie-hellman", "pre-shared"]
#: Where the pre-shared key is, below ``keys/``: 64 hexadecimal digits, mode 0600.
KEY_FILE = "bpcs.key"
_KEY_BYTES = 32
#: A message that was overtaken by this many others is refused.
WINDOW = 64
_COUNTER_BYTES = 8
_INFO = b"hcna.bpcs.v1 "


class CipherUnready(HcnaError):
    """The message cipher is on, and this side cannot use it. The text says what to do."""

    code = "cipher_unready"


class MessageRefused(HcnaError):
    """A sealed message does not open: changed, captured and sent again, or of another session."""

    code = "message_refused"


class Channel(Protocol):
    """One side of a session. Not for several threads at once."""

    def seal(self, plain: bytes, bound: bytes) -> bytes:
        """Return what the other side opens, once, and beside the same ``bound`` only."""
        ...

    def open(self, sealed: bytes, bound: bytes) -> bytes:
        """Return what the other side sealed. Raises `MessageRefused`."""
        ...


class MessageCipher(Protocol):
    """Makes channels: the worker offers, M1 accepts."""

    def offer(self, secret: bytes) -> tuple[bytes, Callable[[bytes], Channel]]:
        """Begin a session as a worker.

        Args:
            secret: What this worker and M1 alone know, 32 bytes.

        Returns:
            What M1 has to get, and what makes the channel of M1's answer (it raises
            `MessageRefused` for one that cannot be).
        """
        ...

    def accept(self, offered: bytes, secret: bytes) -> tuple[bytes, Channel]:
        """Answer as M1; return the answer and the channel. Raises `MessageRefused`."""
        ...


def load_cipher(key_exchange: KeyExchange, keys_dir: Path) -> MessageCipher:
    """Return the cipher that is installed, or the stand-in.

    Raises:
        CipherUnready: There is no pre-shared key, or others may read it.
    """
    shared = read_shared_key(keys_dir) if key_exchange == "pre-shared" else None
    for point in entry_points(group=GROUP, name=NAME):
        return cast(MessageCipher, point.load()(key_exchange, shared))
    return StandIn(shared)


def read_shared_key(keys_dir: Path) -> bytes:
    """Return the pre-shared key.

    Raises:
        CipherUnready: It is missing, cannot be a key, or others may read it.
    """
    path = keys_dir / KEY_FILE
    make = f"openssl rand -hex 32 > {path} && chmod 600 {path}, the same file on each machine"
    try:
        with path.open("rb") as stream:
            private = not os.fstat(stream.fileno()).st_mode & 0o077
            text = stream.read(1024).decode("ascii").strip()
        key = bytes.fromhex(text)
    except (OSError, ValueError) as error:
        raise CipherUnready(f"there is no pre-shared key ({error}): {make}") from None
    if not private:
        raise CipherUnready(f"others may read {path}: chmod 600 {path}")
    if len(key) != _KEY_BYTES:
        raise CipherUnready(f"{path} is not 64 hexadecimal digits: {make}")
    return key


def secret_of(cluster_dir: Path, worker: str) -> bytes:
    """Return what a worker and M1 alone know, on either of the two.

    It is the digest of the token that the machine was given when it joined: M1 keeps nothing else
    of it. M1's own worker has none; it is on M1's machine and reads what M1 reads.

    Args:
        cluster_dir: Of this machine.
        worker: The worker's short name.

    Raises:
        CipherUnready: This machine, or the worker, has to join again.
    """
    joined = _read(cluster_dir / "membership.json")
    if joined is not None:
        return hashlib.sha256(str(joined.get("member_token", "")).encode()).digest()
    members = (_read(cluster_dir / "members.json") or {}).get("members")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, dict) and member.get("name") == worker:
            digest = bytes.fromhex(str(member.get("token_sha256", "")))
            if len(digest) != _KEY_BYTES:
                raise CipherUnready(
                    f"M1 has lost the secret of {worker}, as after a restore without keys: on "
                    f"{worker}, hcna leave --force, then hcna join with a new code"
                )
            return digest
    try:
        return hashlib.sha256(b"hcna local\0" + (cluster_dir / "ca.key").read_bytes()).digest()
    except OSError as error:
        raise CipherUnready(f"this machine has joined no cluster ({error}): hcna join") from None


def _read(path: Path) -> dict[str, object] | None:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


# -- the stand-in ----------------------------------------------------------------------------------


class StandIn:
    """X25519 or a pre-shared key, HKDF-SHA256, ChaCha20-Poly1305."""

    def __init__(self, shared: bytes | None = None) -> None:
        """Choose by what there is.

        Args:
            shared: The pre-shared key; None agrees on a new one for each session.
        """
        self._shared = shared

    def offer(self, secret: bytes) -> tuple[bytes, Callable[[bytes], Channel]]:
        """Begin a session as a worker; see `MessageCipher.offer`."""
        own, sent = self._half()

        def finish(answer: bytes) -> Channel:
            down, up = self._keys(own, sent, answer, answer, secret)
            return _Sealed(up, down)

        return sent, finish

    def accept(self, offered: bytes, secret: bytes) -> tuple[bytes, Channel]:
        """Answer as M1; see `MessageCipher.accept`."""
        own, sent = self._half()
        down, up = self._keys(own, offered, sent, offered, secret)
        return sent, _Sealed(down, up)

    def _half(self) -> tuple[X25519PrivateKey | None, bytes]:
        if self._shared is not None:
            return None, os.urandom(_KEY_BYTES)
        own = X25519PrivateKey.generate()
        return own, own.public_key().public_bytes_raw()

    def _keys(
        self,
        own: X25519PrivateKey | None,
        offered: bytes,
        answered: bytes,
        theirs: bytes,
        secret: bytes,
    ) -> tuple[bytes, bytes]:
        """Return the keys of what M1 says and of what the worker says."""
        if len(theirs) != _KEY_BYTES:
            raise MessageRefused("the other side uses another cipher, or another key exchange")
        if own is None:
            agreed, how = self._shared or b"", b"pre-shared"
        else:
            try:
                agreed = own.exchange(X25519PublicKey.from_public_bytes(theirs))
            except ValueError:
                raise MessageRefused("the other side's half of the key is none") from None
            how = b"diffie-hellman"
        # The secret proves who takes part: without it both halves in clear would not be enough.
        made = HKDF(
            algorithm=hashes.SHA256(),
            length=2 * _KEY_BYTES,
            salt=hashlib.sha256(offered + answered).digest(),
            info=_INFO + how,
        ).derive(agreed + secret)
        return made[:_KEY_BYTES], made[_KEY_BYTES:]


class _Sealed:
    """One side: its own counter, and which of the other's were opened."""

    def __init__(self, sending: bytes, receiving: bytes) -> None:
        self._sending, self._receiving = ChaCha20Poly1305(sending), ChaCha20Poly1305(receiving)
        self._sent = 0
        #: The highest counter that was opened, and, bit by bit, those below it.
        self._highest = 0
        self._opened = 0

    def seal(self, plain: bytes, bound: bytes) -> bytes:
        self._sent += 1
        counter = self._sent.to_bytes(_COUNTER_BYTES, "big")
        return counter + self._sending.encrypt(b"\0\0\0\0" + counter, plain, bound)

    def open(self, sealed: bytes, bound: bytes) -> bytes:
        counter = sealed[:_COUNTER_BYTES]
        number = int.from_bytes(counter, "big")
        behind = self._highest - number
        if behind >= WINDOW or (behind >= 0 and self._opened >> behind & 1):
            raise MessageRefused("a message was sent again")
        try:
            plain = self._receiving.decrypt(
                b"\0\0\0\0" + counter.ljust(_COUNTER_BYTES, b"\0"), sealed[_COUNTER_BYTES:], bound
            )
        except InvalidTag:
            raise MessageRefused("a message was changed, or is of another session") from None
        if behind < 0:
            self._opened = (self._opened << -behind if -behind < WINDOW else 0) | 1
            self._opened &= (1 << WINDOW) - 1
            self._highest = number
        else:
            self._opened |= 1 << behind
        return plain

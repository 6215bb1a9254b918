"""Bytes under a passphrase: scrypt makes the key, AES-256-GCM seals and proves.

    magic (8) | log2(n), r, p (1 each) | salt (16) | nonce (12) | ciphertext and tag

The head and what the caller binds to it (``bound``) are authenticated, not encrypted. Each sealing
draws a salt, so no key is used twice and the nonce could not repeat under one.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from hcna_ray.core.errors import HcnaError

#: A passphrase is the only thing between a lost disk and every key of the cluster.
PASSPHRASE_MIN = 12
PASSPHRASE_FILE_BYTES_MAX = 4096

_MAGIC = b"HCNASEAL"
_HEAD = struct.Struct(">8sBBB16s12s")
#: 128 MiB and some 0.4 s: dear for whoever guesses, bearable for the smallest M1.
_LOG2_N, _R, _P = 17, 8, 1
#: What is read may ask for this much memory at most: its head is not to be trusted yet.
_MEMORY_MAX = 512 * 1024 * 1024
_P_MAX = 4


class PassphraseRefused(HcnaError):
    """A passphrase is too short, or cannot be read safely."""

    code = "passphrase_refused"


class SealBroken(HcnaError):
    """Sealed bytes do not open: wrong passphrase, or somebody changed them."""

    code = "seal_broken"


def check_passphrase(passphrase: str) -> str:
    """Return the passphrase if it is long enough to seal with. Raises `PassphraseRefused`."""
    if len(passphrase) < PASSPHRASE_MIN:
        raise PassphraseRefused(f"a passphrase has at least {PASSPHRASE_MIN} characters")
    return passphrase


def read_passphrase(path: Path) -> str:
    """Return the first line of a file that nobody but its owner can read.

    Raises:
        PassphraseRefused: Others may read it, or its first line is empty.
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_mode & 0o077:
            raise PassphraseRefused(f"others may read {path}: chmod 600 {path}")
        raw = stream.read(PASSPHRASE_FILE_BYTES_MAX)
    try:
        line = raw.decode("utf-8").partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError:
        raise PassphraseRefused(f"{path} is not UTF-8 text") from None
    if not line:
        raise PassphraseRefused(f"the first line of {path} is empty")
    return line


def seal(plain: bytes, passphrase: str, *, bound: bytes) -> bytes:
    """Return bytes that open with this passphrase, and beside this ``bound``, only.

    Raises:
        PassphraseRefused: It is too short.
    """
    check_passphrase(passphrase)
    salt, nonce = os.urandom(16), os.urandom(12)
    head = _HEAD.pack(_MAGIC, _LOG2_N, _R, _P, salt, nonce)
    key = _key(passphrase, salt, _LOG2_N, _R, _P)
    return head + AESGCM(key).encrypt(nonce, plain, head + bound)


def unseal(sealed: bytes, passphrase: str, *, bound: bytes) -> bytes:
    """Return what `seal` was given.

    Raises:
        SealBroken: Wrong passphrase, or the bytes, or what they are bound to, were changed.
    """
    if len(sealed) < _HEAD.size:
        raise SealBroken("the sealed part is cut off")
    head = sealed[: _HEAD.size]
    magic, log2_n, r, p, salt, nonce = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise SealBroken("the sealed part has a form that this hcna-ray does not know")
    if not (0 < log2_n < 31 and 0 < p <= _P_MAX and r > 0 and (128 * r << log2_n) <= _MEMORY_MAX):
        raise SealBroken("the sealed part asks for an unreasonable amount of memory")
    try:
        return AESGCM(_key(passphrase, salt, log2_n, r, p)).decrypt(
            nonce, sealed[_HEAD.size :], head + bound
        )
    except InvalidTag:
        raise SealBroken("wrong passphrase, or the archive was changed") from None


def _key(passphrase: str, salt: bytes, log2_n: int, r: int, p: int) -> bytes:
    raw = passphrase.encode("utf-8", "surrogatepass")
    return Scrypt(salt=salt, length=32, n=1 << log2_n, r=r, p=p).derive(raw)

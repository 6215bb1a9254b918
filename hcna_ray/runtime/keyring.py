"""Which keys the orders of `hcna_ray.runtime.orders` are checked and sealed with: the settings'."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hcna_ray.config import NodeSecuritySettings, Settings
from hcna_ray.core.clock import boottime
from hcna_ray.runtime.host import LATE_S
from hcna_ray.runtime.orders import Channel, Cipher, OrderGuard
from hcna_ray.security.orders import OrderVerifier

if TYPE_CHECKING:
    from hcna_ray.security.cipher import MessageCipher


class SettingsCipher:
    """The message cipher with the keys that are on this machine, read for each session anew."""

    def __init__(self, settings: Settings, security: NodeSecuritySettings) -> None:
        """Remember where they are.

        Args:
            settings: Of this machine.
            security: Those of M1, or of the worker.
        """
        self._settings, self._how = settings, security.bpcs_key_exchange

    def offer(self, worker: str) -> tuple[bytes, Callable[[bytes], Channel]]:
        """Begin a session as a worker. Raises `CipherUnready`."""
        return self._cipher().offer(self._secret(worker))

    def accept(self, worker: str, offered: bytes) -> tuple[bytes, Channel]:
        """Answer as M1. Raises `CipherUnready`, `MessageRefused`."""
        return self._cipher().accept(offered, self._secret(worker))

    def _cipher(self) -> MessageCipher:
        from hcna_ray.security.cipher import load_cipher

        return load_cipher(self._how, self._settings.keys_dir)

    def _secret(self, worker: str) -> bytes:
        from hcna_ray.security.cipher import secret_of

        return secret_of(self._settings.cluster_dir, worker)


def cipher_of(settings: Settings, security: NodeSecuritySettings) -> Cipher | None:
    """Return the message cipher of M1 or of a worker; None if it is off."""
    return SettingsCipher(settings, security) if security.enable_bpcs else None


def guard_of(settings: Settings, cipher: Cipher | None = None) -> OrderGuard:
    """Return what looks at M1's orders on this machine. A slot is sent no intents: no cipher."""
    return OrderGuard(
        OrderVerifier(settings.cluster_dir),
        cipher,
        patience_s=settings.slots.exchange_wait_s + LATE_S,
        elapsed=boottime,
    )

"""Sealed bytes open with the passphrase, beside what they were bound to, and not otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcna_ray.security import sealing
from hcna_ray.security.sealing import (
    PassphraseRefused,
    SealBroken,
    read_passphrase,
    seal,
    unseal,
)

WORDS = "correct horse battery staple"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_LOG2_N", 10)


def test_what_was_sealed_comes_back_and_stands_nowhere_in_clear() -> None:
    sealed = seal(b"a secret", WORDS, bound=b"b")
    assert unseal(sealed, WORDS, bound=b"b") == b"a secret"
    assert b"a secret" not in sealed
    assert sealed != seal(b"a secret", WORDS, bound=b"b")


@pytest.mark.parametrize(("words", "bound"), [("another one, as long", b"b"), (WORDS, b"c")])
def test_another_passphrase_or_place_opens_nothing(words: str, bound: bytes) -> None:
    with pytest.raises(SealBroken, match="wrong passphrase"):
        unseal(seal(b"a secret", WORDS, bound=b"b"), words, bound=bound)


def test_no_byte_can_be_changed_or_taken_away() -> None:
    sealed = seal(b"a secret", WORDS, bound=b"")
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(SealBroken):
            unseal(bytes(changed), WORDS, bound=b"")
        with pytest.raises(SealBroken):
            unseal(sealed[:position], WORDS, bound=b"")


@pytest.mark.parametrize("cost", [(30, 8, 1), (20, 255, 1), (17, 8, 255), (0, 8, 1), (17, 0, 1)])
def test_a_head_that_asks_for_too_much_is_refused_before_it_is_paid(
    cost: tuple[int, int, int],
) -> None:
    sealed = bytearray(seal(b"a secret", WORDS, bound=b""))
    sealed[8:11] = bytes(cost)
    with pytest.raises(SealBroken, match="unreasonable"):
        unseal(bytes(sealed), WORDS, bound=b"")


def test_a_short_passphrase_is_refused() -> None:
    with pytest.raises(PassphraseRefused, match="12"):
        seal(b"a secret", "short", bound=b"")


def test_a_passphrase_is_the_first_line_of_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text(f"{WORDS}\r\nsomething else\n")
    path.chmod(0o640)
    with pytest.raises(PassphraseRefused, match="chmod 600"):
        read_passphrase(path)
    path.chmod(0o600)
    assert read_passphrase(path) == WORDS


@pytest.mark.parametrize("raw", [b"", b"\nsecond", b"\xff\xfe\n"])
def test_a_file_without_a_passphrase(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "words"
    path.write_bytes(raw)
    path.chmod(0o600)
    with pytest.raises(PassphraseRefused):
        read_passphrase(path)

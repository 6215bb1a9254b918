"""The message cipher: what was captured cannot be read, changed or sent again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.security import cipher
from hcna_ray.security.cipher import (
    Channel,
    CipherUnready,
    MessageRefused,
    StandIn,
    load_cipher,
    read_shared_key,
    secret_of,
)

SECRET, KEY = bytes(range(32)), bytes(range(32, 64))
PLAIN, BOUND = b"cpu_percent: 97", b"W1"


def a_session(
    shared: bytes | None = None, theirs: bytes | None = None, secrets: tuple[bytes, bytes] = ()
) -> tuple[Channel, Channel]:
    """Return the worker's and M1's side of a session."""
    own, other = secrets or (SECRET, SECRET)
    offered, finish = StandIn(shared).offer(own)
    answered, m1 = StandIn(shared if theirs is None else theirs).accept(offered, other)
    return finish(answered), m1


@pytest.fixture(params=["diffie-hellman", "pre-shared"])
def session(request: pytest.FixtureRequest) -> tuple[Channel, Channel]:
    return a_session(KEY if request.param == "pre-shared" else None)


Session = tuple[Channel, Channel]


def test_both_directions_open(session: Session) -> None:
    worker, m1 = session
    for _ in range(3):
        assert m1.open(worker.seal(PLAIN, BOUND), BOUND) == PLAIN
        assert worker.open(m1.seal(PLAIN, BOUND), BOUND) == PLAIN


def test_a_captured_message_cannot_be_read(session: Session) -> None:
    worker, m1 = session
    sealed = worker.seal(PLAIN * 50, BOUND)
    assert PLAIN not in sealed
    assert worker.seal(PLAIN, BOUND) != worker.seal(PLAIN, BOUND)
    for stranger in (*a_session(), *a_session(KEY), worker):
        with pytest.raises(MessageRefused):
            stranger.open(sealed, BOUND)
    assert m1.open(sealed, BOUND) == PLAIN * 50


def test_no_bit_of_it_can_be_changed(session: Session) -> None:
    worker, m1 = session
    sealed = worker.seal(PLAIN, BOUND)
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MessageRefused):
            m1.open(bytes(changed), BOUND)
    for length in range(len(sealed)):
        with pytest.raises(MessageRefused):
            m1.open(sealed[:length], BOUND)
    with pytest.raises(MessageRefused):
        m1.open(sealed, b"W2")
    assert m1.open(sealed, BOUND) == PLAIN  # What was refused has not used it up.


def test_it_cannot_be_sent_again(session: Session) -> None:
    worker, m1 = session
    first, second = worker.seal(b"1", BOUND), worker.seal(b"2", BOUND)
    assert m1.open(first, BOUND) == b"1"
    for again in (first, first):
        with pytest.raises(MessageRefused, match="again"):
            m1.open(again, BOUND)
    assert m1.open(second, BOUND) == b"2"
    with pytest.raises(MessageRefused, match="again"):
        m1.open(first, BOUND)


def test_nor_in_another_session_nor_back(session: Session) -> None:
    worker, _m1 = session
    sealed = worker.seal(PLAIN, BOUND)
    with pytest.raises(MessageRefused):
        worker.open(sealed, BOUND)
    for shared in (None, KEY):
        _again, later = a_session(shared)
        with pytest.raises(MessageRefused):
            later.open(sealed, BOUND)


def test_what_was_overtaken_opens_once_and_not_for_ever(session: Session) -> None:
    worker, m1 = session
    sent = [worker.seal(bytes([n]), BOUND) for n in range(200)]
    assert m1.open(sent[5], BOUND) == b"\5"
    assert m1.open(sent[3], BOUND) == b"\3"
    with pytest.raises(MessageRefused, match="again"):
        m1.open(sent[3], BOUND)
    assert m1.open(sent[150], BOUND) == bytes([150])
    assert m1.open(sent[150 - cipher.WINDOW + 1], BOUND)
    with pytest.raises(MessageRefused, match="again"):
        m1.open(sent[150 - cipher.WINDOW], BOUND)
    with pytest.raises(MessageRefused, match="again"):
        m1.open(sent[150], BOUND)


@pytest.mark.parametrize("shared", [None, KEY])
def test_who_does_not_know_the_secret_takes_no_part(shared: bytes | None) -> None:
    worker, m1 = a_session(shared, secrets=(SECRET, bytes(32)))
    with pytest.raises(MessageRefused):
        m1.open(worker.seal(PLAIN, BOUND), BOUND)
    with pytest.raises(MessageRefused):
        worker.open(m1.seal(PLAIN, BOUND), BOUND)


def test_another_shared_key_or_exchange_does_not_fit() -> None:
    for shared, theirs in ((KEY, bytes(32)), (KEY, None)):
        offered, finish = StandIn(shared).offer(SECRET)
        answered, m1 = StandIn(theirs).accept(offered, SECRET)
        with pytest.raises(MessageRefused):
            m1.open(finish(answered).seal(PLAIN, BOUND), BOUND)


@pytest.mark.parametrize("half", [b"", b"x", bytes(31), bytes(32), bytes(33)])
def test_half_a_key_that_is_none_is_refused(half: bytes) -> None:
    with pytest.raises(MessageRefused):
        StandIn().accept(half, SECRET)
    _offered, finish = StandIn().offer(SECRET)
    with pytest.raises(MessageRefused):
        finish(half)


# -- the keys of a machine -------------------------------------------------------------------------


def test_a_shared_key_is_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "bpcs.key"
    with pytest.raises(CipherUnready, match="openssl rand -hex 32"):
        read_shared_key(tmp_path)
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o644)
    with pytest.raises(CipherUnready, match="chmod 600"):
        read_shared_key(tmp_path)
    path.chmod(0o600)
    assert read_shared_key(tmp_path) == KEY
    for text in ("", "abc", "zz" * 32, KEY.hex()[2:]):
        path.write_text(text)
        with pytest.raises(CipherUnready):
            read_shared_key(tmp_path)


def test_both_sides_find_the_same_secret(tmp_path: Path) -> None:
    m1, w1 = tmp_path / "m1", tmp_path / "w1"
    m1.mkdir()
    w1.mkdir()
    with pytest.raises(CipherUnready, match="hcna join"):
        secret_of(w1, "W1")
    (w1 / "membership.json").write_text(json.dumps({"member_token": "ab" * 32}))
    digest = hashlib.sha256(("ab" * 32).encode()).hexdigest()
    members = [{"name": "W1", "token_sha256": digest}, {"name": "W2", "token_sha256": ""}]
    (m1 / "members.json").write_text(json.dumps({"schema": 1, "members": members}))
    (m1 / "ca.key").write_text("the authority's")
    assert secret_of(m1, "W1") == secret_of(w1, "W1")
    with pytest.raises(CipherUnready, match="join with a new code"):
        secret_of(m1, "W2")
    local = secret_of(m1, "W3")  # M1's own worker, on the same machine.
    assert local not in (secret_of(m1, "W1"), bytes(32))
    assert len(local) == 32


def test_a_licensed_cipher_takes_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []

    class Installed:
        def load(self) -> Callable[..., str]:
            return lambda *arguments: given.append(arguments) or "theirs"  # type: ignore[func-returns-value]

    (tmp_path / "bpcs.key").write_text(KEY.hex())
    os.chmod(tmp_path / "bpcs.key", 0o600)
    assert isinstance(load_cipher("diffie-hellman", tmp_path), StandIn)
    monkeypatch.setattr(
        cipher, "entry_points", lambda *, group, name: [Installed()] if name == "bpcs" else []
    )
    assert load_cipher("pre-shared", tmp_path) == "theirs"  # type: ignore[comparison-overlap]
    assert load_cipher("diffie-hellman", tmp_path) == "theirs"  # type: ignore[comparison-overlap]
    assert given == [("pre-shared", KEY), ("diffie-hellman", None)]

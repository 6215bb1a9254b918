"""The search for planted secrets finds them where they are, in all their clothes."""

from __future__ import annotations

import base64
import gzip
import json
import os
import urllib.parse
from datetime import UTC, datetime
from pathlib import Path

import pytest
import zstandard

from hcna_ray.security.certs import ensure_ca
from tests.support.canaries import CHUNK, Canaries, Hit
from tests.support.session_canaries import letters_of

KEY, TOKEN = 'se"cret/of+ours', "ab" * 32


@pytest.fixture
def canaries() -> Canaries:
    return Canaries({"a key": KEY, "a token": TOKEN})


@pytest.mark.parametrize(
    "raw",
    [
        KEY.encode(),
        json.dumps(f"x {KEY}").encode(),
        urllib.parse.quote(KEY, safe="").encode(),
        KEY.encode().hex().encode(),
        *[base64.b64encode(b"x" * n + KEY.encode()) for n in range(4)],
    ],
)
def test_a_secret_is_found_in_its_usual_clothes(canaries: Canaries, raw: bytes) -> None:
    assert canaries.within(b"before " + raw + b" after") == ["a key"]
    assert canaries.within(raw[:-6]) == []


def test_files_are_searched_packed_ones_too_and_their_names(
    canaries: Canaries, tmp_path: Path
) -> None:
    secret = TOKEN.encode()
    (tmp_path / "across").write_bytes(b"." * (CHUNK - 30) + secret)
    (tmp_path / "log.gz").write_bytes(gzip.compress(b"..." + secret))
    (tmp_path / "log.zst").write_bytes(zstandard.compress(b"..." + secret))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(os.urandom(100) + secret)[:20])
    (tmp_path / "good").write_bytes(b"nothing")
    (tmp_path / TOKEN).write_bytes(b"")
    (tmp_path / "link").symlink_to(f"/x/{TOKEN}")
    home = tmp_path / "home"
    home.mkdir()
    (home / "key").write_bytes(secret)

    hits = canaries.in_folders([tmp_path], homes=[home])

    found = sorted(hit.where.replace(str(tmp_path), "") for hit in hits)
    assert found == ["/across", "/link", "/log.gz", "/log.zst", f"the name /{TOKEN}"]
    assert canaries.in_folders([home]) == [Hit("a token", str(home / "key"))]


def test_processes_are_searched(canaries: Canaries) -> None:
    told = Path("/proc/self/environ").read_bytes().split(b"\0")
    planted = max(told, key=len).decode()

    hits = Canaries({"environment": planted}).in_processes([os.getpid()])

    assert hits == [Hit("environment", f"/proc/{os.getpid()}/environ")]
    assert canaries.in_processes([os.getpid(), 1 << 30]) == []


def test_a_private_key_is_found_in_a_copy_and_its_certificate_is_none(tmp_path: Path) -> None:
    pair = ensure_ca(tmp_path, now=datetime(2026, 1, 1, tzinfo=UTC))
    key, cert = pair.key.read_text(), pair.cert.read_text()
    assert letters_of(cert) == ""
    canaries = Canaries({"a key": letters_of(key)})
    assert canaries.within((cert + key).encode()) == ["a key"]
    assert canaries.within(json.dumps(key).encode()) == ["a key"]
    assert canaries.within(cert.encode()) == []
    other = ensure_ca(tmp_path / "other", now=datetime(2026, 1, 1, tzinfo=UTC))
    assert canaries.within(other.key.read_bytes()) == []

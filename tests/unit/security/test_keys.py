"""API keys: made once, kept as digests, in files that only their owner reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcna_ray.security.keys import (
    KeyFileBroken,
    KeyRefused,
    create_key,
    ensure_owner_key,
    ensure_ray_token,
    load_keys,
    read_client_key,
    verify,
)


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    return tmp_path / "home" / "keys"


def test_a_key_is_recognised_and_never_kept(keys_dir: Path) -> None:
    clear = create_key(keys_dir, name="ci", role="user", now=5.0)

    (key,) = load_keys(keys_dir)
    assert clear.startswith("hcna_")
    assert len(clear) >= len("hcna_") + 43  # 256 bits in base64
    assert verify([key], clear) == key
    assert (key.name, key.role, key.created_at) == ("ci", "user", 5.0)
    assert clear not in (keys_dir / "keys.json").read_text()


@pytest.mark.parametrize("presented", ["", "hcna_", "hcna_" + "A" * 43, "\udcff", "x" * 100_000])
def test_anything_else_is_refused(keys_dir: Path, presented: str) -> None:
    create_key(keys_dir, name="ci", role="user", now=5.0)

    assert verify(load_keys(keys_dir), presented) is None


def test_the_owner_gets_one_key_at_the_first_start(keys_dir: Path) -> None:
    clear = ensure_owner_key(keys_dir, now=1.0)

    assert ensure_owner_key(keys_dir, now=2.0) == clear == read_client_key(keys_dir)
    (key,) = load_keys(keys_dir)
    assert (key.name, key.role, key.created_at) == ("owner", "admin", 1.0)


def test_a_lost_clear_key_is_replaced_and_the_old_one_ends(keys_dir: Path) -> None:
    old = ensure_owner_key(keys_dir, now=1.0)
    create_key(keys_dir, name="ci", role="user", now=2.0)
    (keys_dir / "client.key").unlink()

    new = ensure_owner_key(keys_dir, now=3.0)

    keys = load_keys(keys_dir)
    assert verify(keys, old) is None
    assert verify(keys, new) is not None
    assert [key.name for key in keys] == ["ci", "owner"]


def test_files_are_their_owners_alone(keys_dir: Path) -> None:
    ensure_owner_key(keys_dir, now=1.0)
    ensure_ray_token(keys_dir)

    assert keys_dir.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in keys_dir.iterdir()}
    assert set(modes.values()) == {0o600}
    assert {"keys.json", "client.key", "ray.token"} <= modes.keys()


def test_the_ray_token_is_made_once(keys_dir: Path) -> None:
    first = ensure_ray_token(keys_dir).read_text()

    assert ensure_ray_token(keys_dir).read_text() == first
    assert len(first) == 64


@pytest.mark.parametrize(("name", "role"), [("ci", "user"), ("", "user"), ("x", "root")])
def test_a_wrong_or_taken_name_and_an_unknown_role_are_refused(
    keys_dir: Path, name: str, role: str
) -> None:
    create_key(keys_dir, name="ci", role="user", now=1.0)

    with pytest.raises(KeyRefused):
        create_key(keys_dir, name=name, role=role, now=2.0)  # type: ignore[arg-type]
    assert len(load_keys(keys_dir)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"schema": 2, "keys": []}),
        json.dumps({"schema": 1, "keys": [{"name": "x"}]}),
        json.dumps(
            {"schema": 1, "keys": [{"name": "x", "role": "user", "sha256": "zz", "created_at": 1}]}
        ),
    ],
)
def test_a_broken_file_lets_nobody_in_and_is_left_as_it_is(keys_dir: Path, text: str) -> None:
    keys_dir.mkdir(parents=True)
    (keys_dir / "keys.json").write_text(text)

    with pytest.raises(KeyFileBroken):
        load_keys(keys_dir)
    with pytest.raises(KeyFileBroken):
        ensure_owner_key(keys_dir, now=1.0)
    assert (keys_dir / "keys.json").read_text() == text

"""API keys: made once, kept as digests, in files that only their owner reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.security.keys import (
    KEYS_MAX,
    ApiKey,
    KeyFileBroken,
    KeyRefused,
    View,
    create_key,
    digest_of,
    ensure_owner_key,
    ensure_ray_token,
    load_keys,
    read_client_key,
    revoke_key,
    verify,
)

HEX = "ab" * 32


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    return tmp_path / "home" / "keys"


def a_key(**changes: Any) -> ApiKey:
    return ApiKey(**({"name": "x", "role": "submitter", "sha256": HEX, "created_at": 0} | changes))


def test_a_key_is_recognised_and_never_kept(keys_dir: Path) -> None:
    clear = create_key(keys_dir, name="ci", role="submitter", now=5.0)

    (key,) = load_keys(keys_dir)
    assert clear.startswith("hcna_")
    assert len(clear) >= len("hcna_") + 43  # 256 bits in base64
    assert verify([key], clear) == key
    assert (key.name, key.owner, key.role, key.created_at) == ("ci", "ci", "submitter", 5.0)
    assert clear not in (keys_dir / "keys.json").read_text()


@pytest.mark.parametrize("presented", ["", "hcna_", "hcna_" + "A" * 43, "\udcff", "x" * 100_000])
def test_anything_else_is_refused(keys_dir: Path, presented: str) -> None:
    create_key(keys_dir, name="ci", role="submitter", now=5.0)

    assert verify(load_keys(keys_dir), presented) is None


def test_everything_said_of_a_key_is_kept(keys_dir: Path) -> None:
    create_key(
        keys_dir,
        name="ci-2",
        role="submitter",
        now=5.0,
        owner="ci",
        task_types=["echo", "drgfc.*", "echo"],
        queues=["lab"],
        expires_at=9.0,
        quota=10,
        rate=2.5,
    )

    (key,) = load_keys(keys_dir)
    assert (key.owner, key.task_types, key.queues) == ("ci", ("echo", "drgfc.*"), ("lab",))
    assert (key.expires_at, key.quota, key.rate, key.burst) == (9.0, 10, 2.5, 3)
    assert [key.state(at) for at in (8.9, 9.0)] == ["good", "expired"]


def test_scopes_are_names_or_their_beginnings() -> None:
    key = a_key(task_types=("echo", "drgfc.*"), queues=("lab",))

    assert key.covers("echo", "lab")
    assert key.covers("drgfc.compress")
    assert key.covers(queue="lab")
    assert not key.covers("echo2")
    assert not key.covers("drgfc")
    assert not key.covers("echo", "default")
    assert a_key().covers("anything", "anywhere")
    assert a_key(task_types=("*",)).covers("anything")


@pytest.mark.parametrize(
    ("role", "others", "sees_all"),
    [
        ("viewer", View.OUTLINE, False),
        ("submitter", View.NONE, False),
        ("operator", View.FULL, True),
        ("admin", View.FULL, True),
    ],
)
def test_how_much_each_role_sees(role: str, others: View, sees_all: bool) -> None:
    key = a_key(role=role, owner="me")

    assert key.view("me", "echo", "default") is View.FULL
    assert key.view("you", "echo", "default") is others
    assert key.sees_all == sees_all
    if role != "admin":
        scoped = a_key(role=role, owner="me", queues=("lab",))
        assert not scoped.sees_all
        assert scoped.view("me", "echo", "default") is View.NONE
        assert scoped.view("you", "echo", "lab") is others


def test_the_owner_gets_one_key_at_the_first_start(keys_dir: Path) -> None:
    clear = ensure_owner_key(keys_dir, now=1.0)

    assert ensure_owner_key(keys_dir, now=2.0) == clear == read_client_key(keys_dir)
    (key,) = load_keys(keys_dir)
    assert (key.name, key.role, key.created_at) == ("owner", "admin", 1.0)


def test_a_lost_clear_key_is_replaced_and_the_old_one_ends(keys_dir: Path) -> None:
    old = ensure_owner_key(keys_dir, now=1.0)
    create_key(keys_dir, name="ci", role="submitter", now=2.0)
    (keys_dir / "client.key").unlink()

    new = ensure_owner_key(keys_dir, now=3.0)

    keys = load_keys(keys_dir)
    assert verify(keys, old) is None
    assert verify(keys, new) is not None
    assert [key.name for key in keys] == ["ci", "owner"]


def test_a_revoked_owner_gets_another_key(keys_dir: Path) -> None:
    old = ensure_owner_key(keys_dir, now=1.0)
    revoke_key(keys_dir, "owner", now=2.0)

    new = ensure_owner_key(keys_dir, now=3.0)

    keys = load_keys(keys_dir)
    assert new != old
    assert [(key.name, key.state(4.0)) for key in keys] == [("owner", "revoked"), ("owner", "good")]


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


@pytest.mark.parametrize(
    "wanted",
    [
        {"name": "ci"},
        {"name": ""},
        {"name": "owner", "role": "admin"},
        {"name": "a\nb"},
        {"name": " x"},
        {"name": "x" * 65},
        {"role": "root"},
        {"role": "user"},
        {"owner": "owner"},
        {"owner": "owner", "role": "viewer"},
        {"task_types": ["a b"]},
        {"task_types": ["*a"]},
        {"queues": ["a*b"]},
        {"queues": [f"q{n}" for n in range(101)]},
        {"role": "admin", "queues": ["lab"]},
        {"expires_at": 1.5},
        {"quota": 0},
        {"rate": 0.0},
        {"rate": float("inf")},
        {"burst": 5},
        {"rate": 1.0, "burst": 0},
    ],
)
def test_what_makes_no_sense_is_refused(keys_dir: Path, wanted: dict[str, Any]) -> None:
    create_key(keys_dir, name="ci", role="submitter", now=1.0)

    with pytest.raises(KeyRefused):
        create_key(keys_dir, **({"name": "new", "role": "submitter", "now": 2.0} | wanted))
    assert len(load_keys(keys_dir)) == 1


def test_a_revoked_key_stays_on_record_and_its_name_is_free(keys_dir: Path) -> None:
    old = create_key(keys_dir, name="ci", role="submitter", now=1.0)
    gone = revoke_key(keys_dir, "ci", now=2.0)
    new = create_key(keys_dir, name="ci", role="viewer", now=3.0)

    keys = load_keys(keys_dir)
    found = verify(keys, old)
    assert found == gone
    assert (gone.revoked_at, gone.state(2.0)) == (2.0, "revoked")
    assert [key.state(4.0) for key in keys] == ["revoked", "good"]
    assert verify(keys, new) == keys[1]
    for name in ("ci-2", "", digest_of(old)[:12]):
        with pytest.raises(KeyRefused, match="there is no key"):
            revoke_key(keys_dir, name, now=5.0)
    assert revoke_key(keys_dir, keys[1].fingerprint, now=5.0).name == "ci"


def test_room_is_made_by_what_opens_nothing_any_more(keys_dir: Path) -> None:
    clear = create_key(keys_dir, name="k", role="viewer", now=1.0)
    (key,) = json.loads((keys_dir / "keys.json").read_text())["keys"]
    every = [key | {"name": f"k{n}", "owner": "", "sha256": f"{n:064x}"} for n in range(KEYS_MAX)]
    every[7]["expires_at"] = 2.0
    (keys_dir / "keys.json").write_text(json.dumps({"schema": 2, "keys": every}))

    create_key(keys_dir, name="new", role="viewer", now=3.0)

    names = [key.name for key in load_keys(keys_dir)]
    assert len(names) == KEYS_MAX
    assert "k7" not in names
    with pytest.raises(KeyRefused, match="1000 keys"):
        create_key(keys_dir, name="one more", role="viewer", now=3.0)
    assert verify(load_keys(keys_dir), clear) is None


def test_a_file_of_the_first_schema_is_read_and_written_anew(keys_dir: Path) -> None:
    keys_dir.mkdir(parents=True)
    entries = [
        {"name": "owner", "role": "admin", "sha256": HEX, "created_at": 1.0},
        {"name": "guest", "role": "user", "sha256": "cd" * 32, "created_at": 2.0},
    ]
    (keys_dir / "keys.json").write_text(json.dumps({"schema": 1, "keys": entries}))

    keys = load_keys(keys_dir)
    assert [(key.name, key.role) for key in keys] == [("owner", "admin"), ("guest", "operator")]
    create_key(keys_dir, name="ci", role="submitter", now=3.0)
    assert json.loads((keys_dir / "keys.json").read_text())["schema"] == 2
    assert load_keys(keys_dir)[:2] == keys


ENTRY = {"name": "x", "role": "viewer", "sha256": HEX, "created_at": 1}


def test_blanks_around_names_of_schema_1_lock_nobody_out(keys_dir: Path) -> None:
    keys_dir.mkdir(parents=True)
    names = (" ci", "ci 2 ", "   ", "owner ", "owner")
    entries = [
        {"name": name, "role": "user", "sha256": f"{n:064x}", "created_at": 1.0}
        for n, name in enumerate(names)
    ]
    (keys_dir / "keys.json").write_text(json.dumps({"schema": 1, "keys": entries}))
    found = [key.name for key in load_keys(keys_dir)]
    assert found == ["ci", "ci 2", "key-000000000000", "key-000000000000", "owner"]
    create_key(keys_dir, name="new", role="viewer", now=2.0)  # It is written as schema 2.
    assert [key.name for key in load_keys(keys_dir)] == [*found, "new"]
    for name in (" ci", "  ", ""):
        text = json.dumps({"schema": 2, "keys": [ENTRY | {"name": name}]})
        (keys_dir / "keys.json").write_text(text)
        with pytest.raises(KeyFileBroken):
            load_keys(keys_dir)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"schema": 3, "keys": []}),
        json.dumps({"schema": 1, "keys": [{"name": "x"}]}),
        json.dumps({"schema": 1, "keys": [ENTRY]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"role": "user"}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"sha256": "zz"}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"created_at": True}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"queues": "lab"}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"queues": [1]}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"quota": -1}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"rate": "1"}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"only_on": "mondays"}]}),
        json.dumps({"schema": 2, "keys": [ENTRY | {"role": "admin", "queues": ["lab"]}]}),
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

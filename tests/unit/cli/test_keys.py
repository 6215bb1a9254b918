"""``hcna keys`` against a file on a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from hcna_ray.cli.main import main
from hcna_ray.security.acts import waiting
from hcna_ray.security.keys import ensure_owner_key, load_keys, read_client_key, verify
from tests.unit.cli.conftest import Ran

Hcna = Callable[..., Ran]


@pytest.fixture
def keys_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HCNA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HCNA_CONFIG", raising=False)
    monkeypatch.delenv("HCNA_DEBUG", raising=False)
    return tmp_path / "home" / "keys"


@pytest.fixture
def hcna(keys_dir: Path, capsys: pytest.CaptureFixture[str]) -> Hcna:
    def run(*words: str) -> Ran:
        capsys.readouterr()
        code = main(list(words))
        seen = capsys.readouterr()
        return Ran(code, seen.out, " ".join(seen.err.split()))

    return run


def test_a_key_is_made_and_shown_once(hcna: Hcna, keys_dir: Path) -> None:
    made = hcna("keys", "create", "ci")

    clear = made.out.strip()
    assert made.code == 0
    assert "not shown again" in made.err
    assert "Next: hcna keys list" in made.err
    (key,) = load_keys(keys_dir)
    assert verify([key], clear) == key
    assert (key.name, key.role, key.owner) == ("ci", "submitter", "ci")
    listed = hcna("keys", "list")
    assert clear not in listed.out
    assert listed.out.splitlines()[1].split()[:4] == ["ci", "submitter", "ci", "good"]


def test_everything_that_limits_a_key_can_be_said(hcna: Hcna) -> None:
    words = "--role viewer --owner lab --task-type echo --task-type drgfc.* --queue lab"
    words += " --expires 90d --quota 5 --rate 2.5 --burst 10"
    made = hcna("keys", "create", "screen", *words.split(), "--json").json

    assert made["key"].startswith("hcna_")
    del made["key"]
    (listed,) = hcna("keys", "list", "--json").json
    assert listed == made
    expires = datetime.fromisoformat(made["expires_at"]).timestamp()
    assert 89 * 86400 < expires - time.time() <= 90 * 86400
    assert {n: made[n] for n in ("role", "owner", "task_types", "queues", "quota", "rate")} == {
        "role": "viewer",
        "owner": "lab",
        "task_types": ["echo", "drgfc.*"],
        "queues": ["lab"],
        "quota": 5,
        "rate": 2.5,
    }
    line = hcna("keys", "list").out.splitlines()[1]
    assert "type echo, type drgfc.*, queue lab, 5 tasks, 2.5/s" in line


def test_an_instant_may_be_named(hcna: Hcna) -> None:
    made = hcna("keys", "create", "x", "--expires", "2190-01-31T12:00:00Z", "--json").json
    assert made["expires_at"] == "2190-01-31T12:00:00+00:00"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--role", "root"], 2, "there is no role 'root'"),
        (["--expires", "soon"], 2, "--expires 'soon'"),
        (["--expires", "2001-01-01"], 4, "a key expires after now"),
        (["--role", "admin", "--queue", "lab"], 4, "scopes are for the other roles"),
        (["--rate", "nan"], 4, "a rate is above 0"),
        (["--quota", "0"], 4, "a quota is 1 to"),
    ],
)
def test_what_makes_no_sense_is_refused(
    hcna: Hcna, keys_dir: Path, words: list[str], code: int, said: str
) -> None:
    ran = hcna("keys", "create", "x", *words)

    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err
    assert "Next: hcna keys" in ran.err
    assert load_keys(keys_dir) == ()


def test_a_key_is_revoked_by_name_or_fingerprint(hcna: Hcna, keys_dir: Path) -> None:
    hcna("keys", "create", "ci")
    assert hcna("keys", "create", "ci").code == 4
    gone = hcna("keys", "revoke", "ci")
    assert gone.code == 0
    assert gone.out.split()[1:] == ["ci", "revoked"]
    assert hcna("keys", "revoke", "ci").code == 4

    hcna("keys", "create", "ci")
    new = load_keys(keys_dir)[1]
    assert hcna("keys", "revoke", new.fingerprint, "--json").json["state"] == "revoked"
    assert [line.split()[3] for line in hcna("keys", "list").out.splitlines()[1:]] == [
        "revoked"
    ] * 2


def test_what_is_done_to_keys_waits_to_be_put_on_record(hcna: Hcna, keys_dir: Path) -> None:
    clear = hcna("keys", "create", "ci", "--role", "viewer").out.strip()
    hcna("keys", "revoke", "ci")
    hcna("keys", "revoke", "ci")

    left = [one.entry for one in waiting(keys_dir.parent / "acts", 10)]

    assert [(one.action, one.target) for one in left] == [
        ("key.created", "ci"),
        ("key.revoked", "ci"),
    ]
    assert left[0].detail == f"{load_keys(keys_dir)[0].fingerprint}, viewer"
    assert clear not in str(left)


def test_the_owners_key_is_replaced_when_it_is_revoked(hcna: Hcna, keys_dir: Path) -> None:
    old = ensure_owner_key(keys_dir, now=1.0)

    ran = hcna("keys", "revoke", "owner")

    assert ran.code == 0
    assert "hcna env" in ran.err
    new = read_client_key(keys_dir)
    assert new not in (None, old)
    assert [key.state(time.time()) for key in load_keys(keys_dir)] == ["revoked", "good"]


def test_nothing_to_list_and_a_broken_file_say_what_helps(hcna: Hcna, keys_dir: Path) -> None:
    empty = hcna("keys", "list")
    assert (empty.code, empty.out) == (0, "")
    assert "Next: hcna up" in empty.err
    keys_dir.mkdir(parents=True)
    (keys_dir / "keys.json").write_text("{")
    broken = hcna("keys", "list")
    assert broken.code == 1
    assert "hcna restore --with-keys" in broken.err

"""``hcna backup`` and ``hcna restore`` as they are typed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hcna_ray.cli.backup import VARIABLE
from hcna_ray.security import sealing
from hcna_ray.security.keys import ensure_owner_key, read_client_key
from hcna_ray.store.sqlite import SqliteTaskStore
from hcna_ray.supervisor.ports import process_environment
from tests.support.builders import a_task
from tests.unit.cli.conftest import Hcna

WORDS = "correct horse battery staple"


@pytest.fixture
def home(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home with one task, and no Ray that could be another's."""
    monkeypatch.setattr(sealing, "_LOG2_N", 10)
    monkeypatch.setenv("HCNA_RAY__TEMP_DIR", str(tmp_path / "ray"))
    monkeypatch.delenv(VARIABLE, raising=False)
    home = Path(os.environ["HCNA_HOME"])
    store = SqliteTaskStore(home / "queue.db")
    with store.transaction():
        store.insert([a_task()])
    store.close()
    ensure_owner_key(home / "keys", now=0.0)
    return home


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words"
    path.write_text(WORDS + "\n")
    path.chmod(0o600)
    return str(path)


def test_there_and_back(
    hcna: Hcna, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = hcna("backup", "--to", str(tmp_path))
    assert ran.code == 0
    archive = ran.out.strip()
    assert Path(archive).is_file()
    assert "tasks: 1 queued; artifacts: 0" in ran.err
    assert f"Next: hcna backup verify {archive}" in " ".join(ran.err.split())

    ran = hcna("backup", "verify", archive)
    assert ran.code == 0
    assert "every byte is as it was written" in ran.out

    ran = hcna("restore", archive)
    assert ran.code == 1
    assert "--force moves that aside and deletes nothing" in ran.err

    monkeypatch.setenv("HCNA_HOME", str(tmp_path / "other"))
    ran = hcna("restore", archive)
    assert ran.code == 0, ran.err
    assert "What was accepted after" in ran.out
    assert "whatever a worker still reports of before changes nothing" in ran.out
    assert ran.out.endswith("Next: hcna up\n")
    assert (tmp_path / "other" / "queue.db").is_file()


def test_all_of_it_as_json(hcna: Hcna, home: Path, tmp_path: Path) -> None:
    made = hcna("backup", "--to", str(tmp_path / "a"), "--json").json
    assert made["path"] == str(tmp_path / "a")
    assert (made["kind"], made["sealed"], made["point"]["tasks"]) == (
        "moderator",
        False,
        {"queued": 1},
    )
    assert hcna("backup", "verify", made["path"], "--json").json["whole"] is True
    back = hcna("restore", made["path"], "--force", "--json").json
    assert back["generation"] > 1
    assert back["ended"] == {"returned": 0, "lost": 0}
    assert "queue.db.set-aside-" in back["set_aside"][-1]


@pytest.mark.parametrize("how", ["file", "environment"])
def test_keys_under_a_passphrase(
    hcna: Hcna, home: Path, tmp_path: Path, words: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--passphrase-file", words] if how == "file" else []
    if how == "environment":
        monkeypatch.setenv(VARIABLE, WORDS)
    archive = hcna("backup", "--to", str(tmp_path / "a"), "--with-keys", *flags).out.strip()
    assert hcna("backup", "verify", archive, *flags, "--json").json["opened"] is True
    monkeypatch.setenv("HCNA_HOME", str(tmp_path / "other"))
    assert hcna("restore", archive, "--with-keys", *flags).code == 0
    assert read_client_key(tmp_path / "other" / "keys") == read_client_key(home / "keys")


def test_a_wrong_passphrase(hcna: Hcna, home: Path, tmp_path: Path, words: str) -> None:
    archive = str(tmp_path / "a")
    hcna("backup", "--to", archive, "--with-keys", "--passphrase-file", words)
    Path(words).write_text("another one, as long\n")
    for command in (("backup", "verify", archive), ("restore", archive, "--with-keys")):
        ran = hcna(*command, "--passphrase-file", words)
        assert ran.code == 1
        assert "wrong passphrase" in ran.err


def test_without_a_terminal_nobody_is_asked(hcna: Hcna, home: Path, tmp_path: Path) -> None:
    ran = hcna("backup", "--to", str(tmp_path / "a"), "--with-keys")
    assert ran.code == 2
    assert "--passphrase-file" in ran.err
    assert not (tmp_path / "a").exists()


def test_a_passphrase_is_no_word_of_the_command_line(hcna: Hcna, home: Path) -> None:
    assert hcna("backup", "--passphrase", WORDS).code == 2


def test_a_damaged_archive(hcna: Hcna, home: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a"
    hcna("backup", "--to", str(archive))
    archive.write_bytes(archive.read_bytes()[:-1])
    ran = hcna("backup", "verify", str(archive))
    assert ran.code == 1
    assert "cannot be used: it is cut off" in ran.err


def test_a_damaged_artifact_is_exit_code_5(hcna: Hcna, home: Path, tmp_path: Path) -> None:
    name = "ab" * 32
    store = SqliteTaskStore(home / "queue.db")
    with store.transaction():
        store.insert([a_task("t2", seq=2, payload=f'["{name}"]'.encode())])
    store.close()
    (home / "artifacts" / "ab").mkdir(parents=True)
    (home / "artifacts" / "ab" / name).write_bytes(b"rot")
    ran = hcna("backup", "--to", str(tmp_path / "a"))
    assert ran.code == 5
    assert name in ran.err
    assert (tmp_path / "a").is_file()


def test_no_process_of_ours_inherits_the_passphrase(tmp_path: Path) -> None:
    from hcna_ray.config import Settings

    given = {VARIABLE: WORDS, "PATH": "/bin"}
    assert VARIABLE not in process_environment(Settings(home=tmp_path), given)


def test_with_tasks_on_a_server(
    hcna: Hcna, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCNA_STORE__URL", "postgresql://me:canary@db/hcna")
    ran = hcna("backup", "--to", str(tmp_path / "a.tar.zst"))
    assert ran.code == 0
    told = " ".join(ran.err.split())
    assert "tasks: in PostgreSQL, not in it; artifacts: 0" in told
    dump, then = f"--file={tmp_path / 'a.dump'} postgresql://me@db/hcna", "&& hcna backup --to"
    assert f"{dump} {then}" in told
    assert "canary" not in ran.err + ran.out

    monkeypatch.delenv("HCNA_STORE__URL")
    ran = hcna("restore", str(tmp_path / "a.tar.zst"))
    assert ran.code == 1
    assert "set DATABASE_URL (or store.url) to the database first" in " ".join(ran.err.split())

    monkeypatch.setenv("HCNA_STORE__URL", "postgresql://me:canary@db/new")
    ran = hcna("restore", str(tmp_path / "a.tar.zst"))
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].startswith("0 artifacts of ")
    assert any("--dbname=postgresql://me@db/new FILE.dump" in line for line in lines)
    assert lines[-2:] == ["hcna store restored", "Next: hcna up"]
    assert "canary" not in ran.out
    assert (home / "queue.db").exists(), "a SQLite store is none of this backup's"

"""What goes into an archive, what an archive may be, and what a restore does to a home."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import stat
import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from hcna_ray.config import (
    LimitSettings,
    RaySettings,
    Settings,
    StoreSettings,
    WorkerResources,
    WorkerSettings,
    load_settings,
)
from hcna_ray.core.errors import HcnaError
from hcna_ray.runtime.artifacts import open_store
from hcna_ray.security import sealing
from hcna_ray.security.authority import list_issued, revoke
from hcna_ray.security.keys import (
    create_key,
    ensure_owner_key,
    ensure_ray_token,
    load_keys,
    read_client_key,
    revoke_key,
    verify,
)
from hcna_ray.security.sealing import PassphraseRefused, SealBroken
from hcna_ray.store import backup as archives
from hcna_ray.store.artifacts import Maker
from hcna_ray.store.backup import (
    STORE,
    BackupDamaged,
    BackupRefused,
    Entry,
    Folder,
    Manifest,
    scratch,
)
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from hcna_ray.supervisor import backup as module
from hcna_ray.supervisor.backup import backup, check, restore
from hcna_ray.supervisor.daemon import Supervisor
from hcna_ray.supervisor.membership import (
    Member,
    Membership,
    add_member,
    choose_name,
    find_member,
    read_members,
    read_membership,
    write_membership,
)
from hcna_ray.supervisor.membership import digest as token_digest
from hcna_ray.supervisor.node_certs import ensure_m1_node
from hcna_ray.supervisor.state import RunLock, pending_restore, restore_mark
from tests.support.builders import T0, a_task

WORDS = "correct horse battery staple"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_LOG2_N", 10)
    for name in list(os.environ):
        if name.startswith("HCNA_"):
            monkeypatch.delenv(name)


def settings_of(home: Path, **more: Any) -> Settings:
    limits = LimitSettings(disk_free_bytes_min=0)
    return Settings(home=home, limits=limits, ray=RaySettings(temp_dir=home / "ray"), **more)


def a_member(name: str = "W2", token: str = "t") -> Member:
    return Member(
        name=name,
        node_id=f"HCNA-{name}--prod--home--v1.0",
        machine_id=f"machine-{name}",
        hostname=f"host-{name}",
        address="10.0.0.2",
        token_sha256=token_digest(token),
        joined_at=T0,
    )


def a_membership(token: str) -> Membership:
    return Membership(
        name="W2",
        node_id="HCNA-W2--prod--home--v1.0",
        machine_id="machine-W2",
        m1_addresses=("10.0.0.1",),
        gate_port=10040,
        ca_pem="pem",
        ca_sha256="0" * 64,
        member_token=token,
        ray_address="10.0.0.1:6379",
        moderator_node_id="HCNA-M1--prod--home--v1.0",
        shared={},
        joined_at=T0,
    )


@pytest.fixture
def m1(tmp_path: Path) -> Settings:
    """A machine that is M1, with one task, a member, and canaries in every secret place."""
    home = tmp_path / "m1"
    home.mkdir()
    (home / "hcna.yaml").write_text("moderator:\n  scheduling:\n    max_losses: 7\n")
    settings = settings_of(home, source=home / "hcna.yaml")
    store = SqliteTaskStore(home / "queue.db")
    with store.transaction():
        store.insert([a_task()])
    store.close()
    ensure_owner_key(settings.keys_dir, now=T0)
    ensure_ray_token(settings.keys_dir)
    add_member(settings.cluster_dir, a_member(token="canary-member-token"))
    for name in ("ca.key", "gate.key", "launcher.json", "invites.json", "machine_id"):
        (settings.cluster_dir / name).write_text(f"canary-{name}")
    return settings


@pytest.fixture
def spare(tmp_path: Path) -> Settings:
    return settings_of(tmp_path / "spare")


@pytest.fixture
def archive(m1: Settings, tmp_path: Path) -> Path:
    return Path(backup(m1, to=tmp_path / "a.tar.zst", now=T0).path)


@pytest.fixture
def with_keys(m1: Settings, tmp_path: Path) -> Path:
    path = tmp_path / "k.tar.zst"
    return Path(backup(m1, to=path, passphrase=WORDS, now=T0).path)


# -- taking archives apart and putting them together ---------------------------------------------

Piece = tuple[tarfile.TarInfo, bytes]


def unpacked(archive: Path) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(archive.read_bytes())


def pieces(archive: Path) -> list[Piece]:
    """What any tar program makes of it."""
    with tarfile.open(fileobj=io.BytesIO(unpacked(archive))) as tar:
        return [(one, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]


def put_together(found: list[Piece], path: Path) -> Path:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in found:
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(raw.getvalue()))
    return path


def signed(found: list[Piece], change: Callable[[Manifest], Manifest]) -> list[Piece]:
    """Change the manifest as somebody would who knows the format; its digest fits."""
    (info, raw), (sum_info, _) = found[-2:]
    manifest = change(msgspec.json.decode(raw, type=Manifest))
    raw = msgspec.json.encode(manifest)
    digest = archives.hashlib.sha256(raw).hexdigest().encode() + b"\n"
    return [*found[:-2], (info, raw), (sum_info, digest)]


def with_member(found: list[Piece], info: tarfile.TarInfo, data: bytes = b"x") -> list[Piece]:
    """Add a member, and list it."""
    entry = Entry(
        member=info.name, size=len(data), sha256=archives.hashlib.sha256(data).hexdigest()
    )
    both = [*found[:-2], (info, data), *found[-2:]]
    return signed(both, lambda one: replace(one, entries=(*one.entries, entry)))


# -- the archive -----------------------------------------------------------------------------------


class TestArchive:
    def test_it_is_one_private_file_that_tar_can_read(self, archive: Path) -> None:
        assert stat.S_IMODE(archive.stat().st_mode) == 0o600
        assert [info.name for info, _ in pieces(archive)] == [
            "hcna-backup",
            "config/hcna.yaml",
            "cluster/members.json",
            "store/queue.db",
            "manifest.json",
            "manifest.sha256",
        ]

    def test_the_manifest_says_what_point_it_is(self, archive: Path) -> None:
        manifest = check(archive)
        assert (manifest.format, manifest.kind, manifest.created_at) == (1, "moderator", T0)
        assert manifest.node_id == "HCNA-M1--prod--home--v1.0"
        assert manifest.point is not None
        assert (manifest.point.generation, manifest.point.tasks) == (1, {"queued": 1})
        assert not manifest.sealed

    def test_a_directory_gets_a_name_with_the_time(self, m1: Settings, tmp_path: Path) -> None:
        report = backup(m1, to=tmp_path, now=T0)
        assert Path(report.path).name == "hcna-M1-20260101T000000Z.tar.zst"

    def test_nothing_is_overwritten(self, m1: Settings, archive: Path) -> None:
        before = archive.read_bytes()
        with pytest.raises(BackupRefused, match="exists"):
            backup(m1, to=archive, now=T0)
        assert archive.read_bytes() == before

    def test_nothing_half_is_left(
        self, m1: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(archives.ArchiveWriter, "finish", broken)
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(KeyboardInterrupt):
            backup(m1, to=out, now=T0)
        assert list(out.iterdir()) == []
        assert not list(m1.home.glob(".hcna*"))

    def test_what_a_killed_backup_left_is_swept_by_the_next_one(
        self, m1: Settings, tmp_path: Path
    ) -> None:
        child = os.fork()
        if not child:
            with scratch(tmp_path, ".hcna-backup-") as left:
                (left / "half").write_text("half")
                os._exit(0)  # No clean-up, as after a SIGKILL.
        os.waitpid(child, 0)
        assert list(tmp_path.glob(".hcna-backup-*/half"))

        with scratch(tmp_path, ".hcna-backup-") as busy:
            backup(m1, to=tmp_path / "a.tar.zst", now=T0)
            assert list(tmp_path.glob(".hcna-backup-*")) == [busy]

    @pytest.mark.parametrize("to", ["no/such/dir/a.tar.zst"])
    def test_a_missing_directory(self, m1: Settings, tmp_path: Path, to: str) -> None:
        with pytest.raises(BackupRefused, match="no directory"):
            backup(m1, to=tmp_path / to, now=T0)

    def test_a_home_without_a_store(self, spare: Settings, tmp_path: Path) -> None:
        with pytest.raises(BackupRefused, match="hcna up"):
            backup(spare, to=tmp_path, now=T0)

    def test_postgresql_is_left_to_its_own_tool(self, m1: Settings, tmp_path: Path) -> None:
        url = "postgresql://me:canary@db/hcna?sslmode=require"
        store = StoreSettings.model_construct(url=url)
        on_server = m1.model_copy(update={"store": store})
        report = backup(on_server, to=tmp_path / "a.tar.zst", now=T0)
        assert report.manifest.on_server
        assert STORE not in {entry.member for entry in report.manifest.entries}
        assert report.manifest.artifacts == len(list(m1.artifacts_dir.glob("??/*")))
        first, then = report.notes
        assert "begun before it" in first
        assert f"--file={tmp_path / 'a.dump'} 'postgresql://me@db/hcna?sslmode=require'" in then
        assert then.index("pg_dump") < then.index("hcna backup --to")
        assert b"canary" not in Path(report.path).read_bytes()
        assert "canary" not in f"{report}"

    def test_a_setting_in_the_environment_is_told(
        self, m1: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HCNA_RAY__PROFILE", "tiny")
        (note,) = backup(m1, to=tmp_path, now=T0).notes
        assert note == "HCNA_RAY__PROFILE is set in the environment and not in the archive"


class TestSecrets:
    def canaries(self, settings: Settings) -> list[bytes]:
        found = [b"canary-", token_digest("canary-member-token").encode()]
        for name in ("client.key", "ray.token", "keys.json"):
            found.append((settings.keys_dir / name).read_bytes().strip())
        return found

    @pytest.mark.parametrize("passphrase", [None, WORDS])
    def test_none_stands_in_an_archive_in_clear(
        self, m1: Settings, tmp_path: Path, passphrase: str | None
    ) -> None:
        report = backup(m1, to=tmp_path, passphrase=passphrase, now=T0)
        raw = unpacked(Path(report.path))
        assert [one for one in self.canaries(m1) if one in raw] == []
        assert b"host-W2" in raw  # Members are there, without what lets them in.

    def test_a_configuration_with_a_password_is_a_secret(
        self, m1: Settings, tmp_path: Path, spare: Settings
    ) -> None:
        text = "# see https://user:canary-pass@example.org/x\n"
        (m1.home / "hcna.yaml").write_text(text)
        report = backup(m1, to=tmp_path / "plain", now=T0)
        assert b"canary-pass" not in unpacked(Path(report.path))
        assert "holds a password" in report.notes[0]

        sealed = Path(backup(m1, to=tmp_path / "sealed", passphrase=WORDS, now=T0).path)
        assert b"canary-pass" not in unpacked(sealed)
        restore(spare, sealed, passphrase=WORDS, now=T0)
        assert (spare.home / "hcna.yaml").read_text() == text

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://h/d?user=u&password=canary-pass",
            "postgresql://h/d?sslpassword=canary-pass&user=u",
            "postgresql://h/d?PASSWORD=canary-pass",
            "postgresql://h/d?pass%77ord=canary-pass",
            '"postgresql://h/d?\\x70assword=canary-pass"',
            '"postgresql://h/d?user=u&pass\\\n    word=canary-pass"',
            "postgresql://u:canary-pass/x@h/d",
            "postgresql://u:canary-pass@h/d",
            "postgresql://h/d  # not postgresql://h/d?password=canary-pass",
        ],
    )
    def test_a_password_is_found_wherever_a_url_holds_it(
        self, spare: Settings, tmp_path: Path, url: str
    ) -> None:
        spare.home.mkdir()
        (spare.home / "hcna.yaml").write_text(f"store:\n  url: {url}\n")
        settings = load_settings(spare.home)
        assert settings.store_path is None
        report = backup(settings, to=tmp_path / "plain", now=T0)
        assert b"canary-pass" not in unpacked(Path(report.path))
        assert "holds a password" in report.notes[0]
        sealed = Path(backup(settings, to=tmp_path / "sealed", passphrase=WORDS, now=T0).path)
        assert b"canary-pass" not in unpacked(sealed)

    @pytest.mark.parametrize(
        "url", ["postgresql://u@h/d?passfile=/p&sslmode=require", "postgresql://h:1/d?user=u"]
    )
    def test_a_url_without_a_password_is_no_secret(
        self, spare: Settings, tmp_path: Path, url: str
    ) -> None:
        spare.home.mkdir()
        (spare.home / "hcna.yaml").write_text(f"store:\n  url: {url}\n")
        report = backup(load_settings(spare.home), to=tmp_path / "plain", now=T0)
        assert url.encode() in unpacked(Path(report.path))

    def test_keys_certificates_and_members_come_back_with_the_passphrase(
        self, m1: Settings, spare: Settings, with_keys: Path
    ) -> None:
        report = restore(spare, with_keys, passphrase=WORDS, now=T0)

        assert read_client_key(spare.keys_dir) == read_client_key(m1.keys_dir)
        assert ensure_owner_key(spare.keys_dir, now=T0) == read_client_key(m1.keys_dir)
        for name in ("ca.key", "gate.key", "launcher.json", "machine_id", "members.json"):
            path = spare.cluster_dir / name
            assert path.read_bytes() == (m1.cluster_dir / name).read_bytes()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(spare.cluster_dir.stat().st_mode) == 0o700
        member = find_member(spare.cluster_dir, "canary-member-token")
        assert member is not None
        assert member.name == "W2"
        assert report.notes == ()

    def test_an_artifact_stays_its_owners(
        self, m1: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        mine = open_store(m1).put(b"what anna has sent", owner="anna").sha256
        unnamed = open_store(m1).put(b"what no task names", owner="anna").sha256
        store = SqliteTaskStore(m1.home / "queue.db")
        with store.transaction():
            store.insert([a_task("t2", seq=2, payload=json.dumps({"file": mine}).encode())])
        store.close()
        report = backup(m1, to=tmp_path / "owned.tar.zst", now=T0)

        restore(spare, Path(report.path), now=T0)

        found = open_store(spare)
        assert found.owned(mine, "anna")
        assert not found.owned(mine, "ben")
        assert not found.own(unnamed, "anna")

    def test_what_a_task_has_made_stays_so(
        self, m1: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        maker = Maker("anna", "echo", "lab")
        artifacts = open_store(m1)
        made = artifacts.put(b"what anna's task has made").sha256
        artifacts.made(made, maker)
        store = SqliteTaskStore(m1.home / "queue.db")
        with store.transaction():
            store.insert([a_task("t2", seq=2, payload=json.dumps({"file": made}).encode())])
        store.close()
        report = backup(m1, to=tmp_path / "made.tar.zst", now=T0)

        restore(spare, Path(report.path), now=T0)

        found = open_store(spare)
        assert found.makers(made) == [maker]
        assert found.owned(made, "anna")

    def test_the_authority_goes_on_where_it_was(
        self, m1: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        now = datetime.fromtimestamp(T0, UTC)
        for name in ("ca.key", "gate.key"):
            (m1.cluster_dir / name).unlink()
        ensure_m1_node(m1, now=now)
        revoke(m1.cluster_dir, "M1", now=now)
        archive = Path(backup(m1, to=tmp_path / "c.tar.zst", passphrase=WORDS, now=T0).path)

        restore(spare, archive, passphrase=WORDS, now=T0)

        for name in ("ca.pem", "ca.key", "trust.pem", "node.pem", "issued.json", "crl.pem"):
            assert (spare.cluster_dir / name).read_bytes() == (m1.cluster_dir / name).read_bytes()
        # It knows whom it gave what, and gives the next one.
        ensure_m1_node(spare, now=now)
        assert [each.state(now) for each in list_issued(spare.cluster_dir)] == ["revoked", "good"]

    def test_an_invitation_is_never_opened_again(self, spare: Settings, with_keys: Path) -> None:
        restore(spare, with_keys, passphrase=WORDS, now=T0)
        assert not (spare.cluster_dir / "invites.json").exists()

    def test_without_keys_a_member_keeps_its_name_and_must_join_again(
        self, spare: Settings, archive: Path
    ) -> None:
        report = restore(spare, archive, now=T0)
        members = read_members(spare.cluster_dir)
        assert find_member(spare.cluster_dir, "canary-member-token") is None
        assert find_member(spare.cluster_dir, "") is None
        assert choose_name(members, machine_id="machine-W2") == "W2"
        assert "W2 must join again" in report.notes[0]
        assert not spare.keys_dir.exists()

    def test_a_wrong_passphrase_changes_nothing(self, spare: Settings, with_keys: Path) -> None:
        with pytest.raises(SealBroken):
            restore(spare, with_keys, passphrase="another one, as long", now=T0)
        assert not spare.home.exists()

    def test_keys_that_are_not_there(self, spare: Settings, archive: Path) -> None:
        with pytest.raises(BackupRefused, match="no keys"):
            restore(spare, archive, passphrase=WORDS, now=T0)

    def test_a_short_passphrase_leaves_no_archive(self, m1: Settings, tmp_path: Path) -> None:
        with pytest.raises(PassphraseRefused):
            backup(m1, to=tmp_path / "x", passphrase="short", now=T0)
        assert not (tmp_path / "x").exists()

    def test_who_changes_an_archive_with_keys_needs_the_passphrase(
        self, with_keys: Path, tmp_path: Path
    ) -> None:
        """Even with all digests set right."""

        def other_member(one: Manifest) -> Manifest:
            data = b"moderator: {}\n"
            digest = archives.hashlib.sha256(data).hexdigest()
            return replace(
                one,
                entries=tuple(
                    replace(entry, size=len(data), sha256=digest)
                    if entry.member == "config/hcna.yaml"
                    else entry
                    for entry in one.entries
                ),
            )

        found = [
            (info, b"moderator: {}\n" if info.name == "config/hcna.yaml" else data)
            for info, data in pieces(with_keys)
        ]
        changed = put_together(signed(found, other_member), tmp_path / "changed")
        assert check(changed).sealed
        with pytest.raises(SealBroken):
            check(changed, WORDS)

    @pytest.mark.parametrize(
        "name", ["keys/../evil", "/etc/evil", "other/x", "keys/.lock", "keys/"]
    )
    def test_a_sealed_name_leads_nowhere_else(
        self,
        m1: Settings,
        spare: Settings,
        tmp_path: Path,
        name: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(module, "_secrets", lambda _settings: {name: b"evil"})
        path = Path(backup(m1, to=tmp_path, passphrase=WORDS, now=T0).path)
        with pytest.raises(BackupDamaged, match="sealed"):
            restore(spare, path, passphrase=WORDS, now=T0)


class TestDamage:
    def refused(self, archive: Path, spare: Settings) -> str:
        with pytest.raises(BackupDamaged) as caught:
            check(archive)
        with pytest.raises(BackupDamaged):
            restore(spare, archive, now=T0)
        assert not spare.home.exists()
        return str(caught.value)

    def test_any_changed_byte(self, with_keys: Path, tmp_path: Path) -> None:
        """The first and last bytes each, and some of all between: frame, headers, files.

        A few bits of a frame mean nothing, such as sizes of buffers and padding.
        """
        raw, whole = with_keys.read_bytes(), unpacked(with_keys)
        some = random.Random(7).sample(range(100, len(raw) - 100), 300)
        changed, harmless = tmp_path / "changed", 0
        for position in [*range(100), *some, *range(len(raw) - 100, len(raw))]:
            for bit in (1, 0x80):
                flipped = bytearray(raw)
                flipped[position] ^= bit
                changed.write_bytes(flipped)
                try:
                    check(changed)
                except BackupDamaged:
                    continue
                assert unpacked(changed) == whole, position
                harmless += 1
        assert harmless < 20  # Of a thousand.

    def test_any_truncation(self, archive: Path, tmp_path: Path) -> None:
        raw = archive.read_bytes()
        cut = tmp_path / "cut"
        for length in {
            *range(64),
            *range(0, len(raw), len(raw) // 200),
            *range(len(raw) - 64, len(raw)),
        }:
            cut.write_bytes(raw[:length])
            with pytest.raises(BackupDamaged):
                check(cut)

    @pytest.mark.parametrize("tail", [b"\0", b"x", b"\x28\xb5\x2f\xfd"])
    def test_bytes_behind_the_end(self, archive: Path, spare: Settings, tail: bytes) -> None:
        archive.write_bytes(archive.read_bytes() + tail)
        self.refused(archive, spare)

    @pytest.mark.parametrize("member", range(6))
    def test_a_byte_inside_each_member(
        self, archive: Path, spare: Settings, tmp_path: Path, member: int
    ) -> None:
        """With a frame that is whole: only digests can tell."""
        found = pieces(archive)
        info, data = found[member]
        found[member] = (info, bytes([data[0] ^ 1]) + data[1:])
        self.refused(put_together(found, tmp_path / "changed"), spare)

    @pytest.mark.parametrize("member", range(6))
    def test_a_missing_member(
        self, archive: Path, spare: Settings, tmp_path: Path, member: int
    ) -> None:
        found = pieces(archive)
        del found[member]
        self.refused(put_together(found, tmp_path / "changed"), spare)

    @pytest.mark.parametrize("member", range(6))
    def test_a_member_twice(
        self, archive: Path, spare: Settings, tmp_path: Path, member: int
    ) -> None:
        found = pieces(archive)
        found.insert(member, found[member])
        self.refused(put_together(found, tmp_path / "changed"), spare)

    @pytest.mark.parametrize(
        "raw",
        [b"", b"hello", b"PK\x03\x04", zstandard.ZstdCompressor().compress(b"hello")],
        ids=["empty", "text", "zip", "zstd"],
    )
    def test_something_else(self, spare: Settings, tmp_path: Path, raw: bytes) -> None:
        (tmp_path / "x").write_bytes(raw)
        self.refused(tmp_path / "x", spare)

    def test_another_tar_file(self, spare: Settings, tmp_path: Path) -> None:
        info = tarfile.TarInfo("data/x")
        self.refused(put_together([(info, b"x")], tmp_path / "x"), spare)

    def test_a_newer_format_says_so(self, archive: Path, spare: Settings, tmp_path: Path) -> None:
        found = pieces(archive)
        found[0] = (found[0][0], b'{"product":"hcna-ray","format":2,"kind":"moderator"}')
        assert "upgrade" in self.refused(put_together(found, tmp_path / "x"), spare)

    def test_a_store_that_is_not_the_manifests(
        self, archive: Path, spare: Settings, tmp_path: Path
    ) -> None:
        def older(one: Manifest) -> Manifest:
            assert one.point is not None
            return replace(one, point=replace(one.point, last_fact=12))

        changed = put_together(signed(pieces(archive), older), tmp_path / "x")
        with pytest.raises(BackupDamaged, match="not what its manifest says"):
            restore(spare, changed, now=T0)
        assert [path for path in spare.home.rglob("*") if path.is_file()] == []


class TestHostile:
    """Archives whose digests are all right, made to write elsewhere."""

    def refused(self, found: list[Piece], tmp_path: Path, spare: Settings) -> str:
        archive = put_together(found, tmp_path / "evil.tar.zst")
        with pytest.raises(BackupDamaged) as caught:
            restore(spare, archive, now=T0)
        assert not spare.home.exists()
        assert not list(tmp_path.rglob("*evil-file*"))
        return str(caught.value)

    @pytest.mark.parametrize(
        "name",
        [
            "/tmp/evil-file",
            "../evil-file",
            "data/../../evil-file",
            "data//evil-file",
            "data/./evil-file",
            "data/",
            "store/../evil-file",
            "artifacts/../evil-file",
            "artifacts/" + "0" * 63,
            "evil-file",
            "keys/client.key",
            "data/" + "x" * 200,
        ],
    )
    def test_names(self, archive: Path, spare: Settings, tmp_path: Path, name: str) -> None:
        self.refused(with_member(pieces(archive), tarfile.TarInfo(name)), tmp_path, spare)

    @pytest.mark.parametrize(
        "kind",
        [
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
            tarfile.CONTTYPE,
            tarfile.GNUTYPE_SPARSE,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.AREGTYPE,
        ],
    )
    def test_links_devices_and_headers(
        self, archive: Path, spare: Settings, tmp_path: Path, kind: bytes
    ) -> None:
        info = tarfile.TarInfo("data/evil-file")
        info.type, info.linkname = kind, "../../evil-file"
        told = self.refused(with_member(pieces(archive), info, b""), tmp_path, spare)
        assert "not a plain file" in told

    @pytest.mark.parametrize("path", ["../evil-file", "/tmp/evil-file", "a/../../evil-file", ""])
    def test_paths_in_the_manifest(
        self, archive: Path, spare: Settings, tmp_path: Path, path: str
    ) -> None:
        found = with_member(pieces(archive), tarfile.TarInfo("data-long/00000001"))

        def led(one: Manifest) -> Manifest:
            return replace(one, entries=(*one.entries[:-1], replace(one.entries[-1], path=path)))

        assert "leads to" in self.refused(signed(found, led), tmp_path, spare)

    @pytest.mark.parametrize("created_at", [1e300, -1.0])
    def test_times_in_the_manifest(
        self, archive: Path, spare: Settings, tmp_path: Path, created_at: float
    ) -> None:
        found = signed(pieces(archive), lambda one: replace(one, created_at=created_at))
        assert "cannot be" in self.refused(found, tmp_path, spare)

    @pytest.mark.parametrize("generation", [1 << 60, -1])
    def test_numbers_in_the_manifest(
        self, archive: Path, spare: Settings, tmp_path: Path, generation: int
    ) -> None:
        def far(one: Manifest) -> Manifest:
            assert one.point is not None
            return replace(one, point=replace(one.point, generation=generation))

        assert "cannot be" in self.refused(signed(pieces(archive), far), tmp_path, spare)

    def test_a_store_is_private_whatever_the_manifest_says(
        self, archive: Path, spare: Settings, tmp_path: Path
    ) -> None:
        def opened(one: Manifest) -> Manifest:
            return replace(one, entries=tuple(replace(each, mode=0o666) for each in one.entries))

        changed = put_together(signed(pieces(archive), opened), tmp_path / "x")
        restore(spare, changed, now=T0)
        assert stat.S_IMODE((spare.home / "queue.db").stat().st_mode) == 0o600

    def test_folders_in_the_manifest(self, archive: Path, spare: Settings, tmp_path: Path) -> None:
        evil = Folder(path="../evil-file", mode=0o777)
        found = signed(pieces(archive), lambda one: replace(one, folders=(evil,)))
        assert "leads to" in self.refused(found, tmp_path, spare)

    def test_a_store_for_an_artifact(self, archive: Path, spare: Settings, tmp_path: Path) -> None:
        info = tarfile.TarInfo("artifacts/" + "0" * 64)
        told = self.refused(with_member(pieces(archive), info), tmp_path, spare)
        assert "does not hold what it is named for" in told


# -- the home --------------------------------------------------------------------------------------


class TestHome:
    def tasks(self, settings: Settings) -> set[str]:
        assert settings.store_path is not None
        reader = SqliteTaskReader(settings.store_path)
        try:
            return set(reader.get(["t1", "t2"]))
        finally:
            reader.close()

    def test_an_empty_machine_gets_store_and_settings(
        self, m1: Settings, spare: Settings, archive: Path
    ) -> None:
        report = restore(spare, archive, now=T0)
        assert self.tasks(spare) == {"t1"}
        assert (spare.home / "hcna.yaml").read_bytes() == (m1.home / "hcna.yaml").read_bytes()
        assert load_settings(home=spare.home).moderator.scheduling.max_losses == 7
        names = {path.name for path in spare.home.iterdir()}
        assert names - {"queue.db-wal", "queue.db-shm"} == {
            "cluster",
            "hcna.yaml",
            "queue.db",
            "run",
        }
        assert list(spare.run_dir.iterdir()) == []
        assert stat.S_IMODE((spare.home / "queue.db").stat().st_mode) == 0o600
        assert report.set_aside == ()

    def test_the_archives_own_settings_say_where_the_store_is(
        self, m1: Settings, spare: Settings, tmp_path: Path
    ) -> None:
        elsewhere = tmp_path / "srv" / "tasks.db"
        text = f"store: {{url: 'sqlite://{elsewhere}'}}\nray: {{temp_dir: {tmp_path}/ray}}\n"
        (m1.home / "hcna.yaml").write_text(text)
        restore(spare, Path(backup(m1, to=tmp_path, now=T0).path), now=T0)
        assert elsewhere.is_file()
        assert not (spare.home / "queue.db").exists()

    def test_a_running_supervisor_is_in_the_way(self, spare: Settings, archive: Path) -> None:
        lock = RunLock(spare.run_dir)
        assert lock.acquire()
        for force in (False, True):
            with pytest.raises(BackupRefused, match="hcna down"):
                restore(spare, archive, force=force, now=T0)
        lock.release()
        restore(spare, archive, now=T0)

    def test_so_is_any_process_of_the_home(
        self, spare: Settings, archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "scan", lambda _marker: [object()])
        monkeypatch.setattr(module, "describe", lambda _process: "77 ray::Moderator")
        with pytest.raises(BackupRefused, match="77 ray::Moderator still runs"):
            restore(spare, archive, now=T0)
        assert RunLock(spare.run_dir).is_free()

    def test_a_store_in_the_way_is_moved_aside_only_when_told(
        self, m1: Settings, archive: Path
    ) -> None:
        store = SqliteTaskStore(m1.home / "queue.db")
        with store.transaction():
            store.insert([a_task("t2", seq=2)])
        store.close()
        (m1.home / "queue.db-wal").write_bytes(b"")
        with pytest.raises(BackupRefused, match="--force"):
            restore(m1, archive, now=T0)
        assert self.tasks(m1) == {"t1", "t2"}

        report = restore(m1, archive, force=True, now=T0 + 1)

        assert self.tasks(m1) == {"t1"}
        aside = m1.home / "queue.db.set-aside-20260101T000001Z"
        assert str(aside) in report.set_aside
        assert aside.with_name(f"{aside.name}-wal").exists()
        old = SqliteTaskReader(aside)
        assert set(old.get(["t1", "t2"])) == {"t1", "t2"}
        old.close()

    def test_a_store_and_its_log_stay_together_over_an_interrupted_restore(
        self, m1: Settings, archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (m1.home / "queue.db-wal").write_bytes(b"")

        def interrupted(name: str) -> None:
            if name == "restore.aside.moved":
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("hcna_ray.failpoints.hit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                restore(m1, archive, force=True, now=T0 + 1)
        report = restore(m1, archive, force=True, now=T0 + 60)

        aside = m1.home / "queue.db.set-aside-20260101T000001Z"
        assert str(aside) in report.set_aside
        assert aside.with_name(f"{aside.name}-wal").exists()

    def test_present_keys_and_settings_are_kept(self, m1: Settings, archive: Path) -> None:
        key = read_client_key(m1.keys_dir)
        (m1.home / "hcna.yaml").write_text("# mine\n")
        report = restore(m1, archive, force=True, now=T0)
        assert read_client_key(m1.keys_dir) == key
        assert find_member(m1.cluster_dir, "canary-member-token") is not None
        assert (m1.home / "hcna.yaml").read_text() == "# mine\n"
        assert "max_losses" in next(m1.home.glob("hcna.yaml.from-backup-*")).read_text()
        assert "was kept" in report.notes[0]

    def test_other_keys_are_moved_aside_for_the_backups(
        self, m1: Settings, spare: Settings, with_keys: Path
    ) -> None:
        mine = ensure_owner_key(spare.keys_dir, now=T0)
        with pytest.raises(BackupRefused, match="keys"):
            restore(spare, with_keys, passphrase=WORDS, now=T0)
        restore(spare, with_keys, passphrase=WORDS, force=True, now=T0)
        assert read_client_key(spare.keys_dir) == read_client_key(m1.keys_dir)
        (aside,) = spare.home.glob("keys.set-aside-*")
        assert read_client_key(aside) == mine

    def test_a_key_that_was_taken_back_since_stays_so(self, m1: Settings, tmp_path: Path) -> None:
        lost = create_key(m1.keys_dir, name="lost", role="operator", now=T0)
        forgotten = create_key(m1.keys_dir, name="forgotten", role="viewer", now=T0)
        archive = Path(backup(m1, to=tmp_path / "k.tar.zst", passphrase=WORDS, now=T0).path)
        revoke_key(m1.keys_dir, "lost", now=T0 + 1)
        later = create_key(m1.keys_dir, name="later", role="viewer", now=T0 + 1)
        known = json.loads((m1.keys_dir / "keys.json").read_text())
        known["keys"] = [one for one in known["keys"] if one["name"] != "forgotten"]
        (m1.keys_dir / "keys.json").write_text(json.dumps(known))

        report = restore(m1, archive, passphrase=WORDS, force=True, now=T0 + 2)

        keys = load_keys(m1.keys_dir)
        found = verify(keys, lost)
        assert found is not None
        assert found.revoked_at == T0 + 1
        back = verify(keys, forgotten)
        assert back is not None
        assert back.state(T0 + 2) == "good"
        assert verify(keys, later) is None
        came, gone = (note for note in report.notes if note.startswith("keys "))
        assert "came back" in came
        assert f"forgotten ({back.fingerprint})" in came
        assert "are gone" in gone
        assert "later (" in gone
        reader = SqliteTaskReader(m1.home / "queue.db")
        lines = [one.entry for one in reader.audit_after(0, 100)]
        reader.close()
        assert [(one.action, one.target) for one in lines if one.action.startswith("key.")] == [
            ("key.revoked", "lost"),
            ("key.restored", "forgotten"),
            ("key.gone", "later"),
        ]

    def test_a_restore_that_was_cut_off_forgets_no_key_that_was_taken_back(
        self, m1: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lost = create_key(m1.keys_dir, name="lost", role="operator", now=T0)
        archive = Path(backup(m1, to=tmp_path / "k.tar.zst", passphrase=WORDS, now=T0).path)
        revoke_key(m1.keys_dir, "lost", now=T0 + 1)
        real = module._Plan._move_aside

        def crash(plan: module._Plan) -> None:
            real(plan)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(module._Plan, "_move_aside", crash)
            with pytest.raises(KeyboardInterrupt):
                restore(m1, archive, passphrase=WORDS, force=True, now=T0 + 2)
        restore(m1, archive, passphrase=WORDS, force=True, now=T0 + 9)
        found = verify(load_keys(m1.keys_dir), lost)
        assert found is not None
        assert found.revoked_at == T0 + 1

    def test_keys_of_before_that_cannot_be_read_are_told(
        self, m1: Settings, with_keys: Path
    ) -> None:
        (m1.keys_dir / "keys.json").write_text("{}")
        report = restore(m1, with_keys, passphrase=WORDS, force=True, now=T0)
        assert "taken back there may be good again" in report.notes[0]

    def test_a_clock_behind_the_backup_is_refused(self, spare: Settings, archive: Path) -> None:
        with pytest.raises(BackupRefused, match="clock"):
            restore(spare, archive, now=T0 - 3600)
        restore(spare, archive, now=T0 - 60)

    def test_a_machine_that_has_joined_is_no_m1(self, spare: Settings, archive: Path) -> None:
        write_membership(spare.cluster_dir, a_membership("t"))
        with pytest.raises(BackupRefused, match="hcna leave"):
            restore(spare, archive, now=T0)

    @pytest.mark.parametrize("crash_in", ["_move_aside", "_put_secrets", "_put_config"])
    def test_one_that_is_cut_off_is_noticed_and_can_be_repeated(
        self,
        m1: Settings,
        archive: Path,
        crash_in: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real = getattr(module._Plan, crash_in)

        def crash(plan: object) -> None:
            real(plan)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module._Plan, crash_in, crash)
            with pytest.raises(KeyboardInterrupt):
                restore(m1, archive, force=True, now=T0)
        assert restore_mark(m1.run_dir).exists()
        assert "hcna restore again" in (pending_restore(m1.run_dir) or "")
        with pytest.raises(HcnaError, match="cut off"):
            Supervisor(settings=m1, log=logging.getLogger("test"))._prepare()

        restore(m1, archive, force=True, now=T0 + 1)
        assert pending_restore(m1.run_dir) is None
        assert self.tasks(m1) == {"t1"}

    def test_every_rename_is_a_place_to_be_cut_off(
        self, m1: Settings, archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At any moment the old store, the new one, or the mark is there: never none of them."""
        real = os.replace

        def stop(source: object, target: object) -> None:
            if str(target).endswith("queue.db"):
                raise KeyboardInterrupt
            real(source, target)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(module.os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                restore(m1, archive, force=True, now=T0)
        assert not (m1.home / "queue.db").exists()
        assert pending_restore(m1.run_dir)
        assert list(m1.home.glob("queue.db.set-aside-*"))


# -- a worker's files ------------------------------------------------------------------------------


class TestWorker:
    @pytest.fixture
    def w2(self, tmp_path: Path) -> Settings:
        data = tmp_path / "data"
        (data / "deep" / "er").mkdir(parents=True)
        (data / "empty").mkdir(mode=0o750)
        (data / "deep" / "er" / "a b?ü.txt").write_text("text")
        (data / "run.sh").write_text("#!/bin/sh\n")
        (data / "run.sh").chmod(0o750)
        (data / ("x" * 120)).write_text("a long name")
        (data / "nothing").write_bytes(b"")
        os.utime(data / "run.sh", (T0, T0))
        worker = WorkerSettings(resources=WorkerResources(disk_path=data))
        settings = settings_of(tmp_path / "w2", worker=worker)
        write_membership(settings.cluster_dir, a_membership("canary-member-token"))
        return settings

    def other(self, tmp_path: Path) -> Settings:
        resources = WorkerResources(disk_path=tmp_path / "other-data")
        return settings_of(tmp_path / "other", worker=WorkerSettings(resources=resources))

    def tree(self, root: Path) -> dict[str, tuple[int, bytes | None]]:
        return {
            str(path.relative_to(root)): (
                stat.S_IMODE(path.stat().st_mode),
                path.read_bytes() if path.is_file() else None,
            )
            for path in root.rglob("*")
        }

    def test_its_data_directory_comes_back(self, w2: Settings, tmp_path: Path) -> None:
        archive = Path(backup(w2, to=tmp_path, worker="w2", now=T0).path)
        assert archive.name.startswith("hcna-W2-")
        other = self.other(tmp_path)
        report = restore(other, archive, now=T0)
        assert self.tree(other.data_dir) == self.tree(w2.data_dir)
        assert (other.data_dir / "run.sh").stat().st_mtime == T0
        assert (report.kind, report.files, report.generation) == ("worker", 4, None)
        assert read_membership(other.cluster_dir) is None
        assert b"canary-member-token" not in unpacked(archive)

    def test_with_keys_it_is_the_same_worker_again(self, w2: Settings, tmp_path: Path) -> None:
        archive = Path(backup(w2, to=tmp_path, worker="W2", passphrase=WORDS, now=T0).path)
        assert b"canary-member-token" not in unpacked(archive)
        other = self.other(tmp_path)
        restore(other, archive, passphrase=WORDS, now=T0)
        assert read_membership(other.cluster_dir) == read_membership(w2.cluster_dir)

    def test_links_and_pipes_are_left_out_and_told(self, w2: Settings, tmp_path: Path) -> None:
        (tmp_path / "outside").write_text("canary-outside")
        (w2.data_dir / "link").symlink_to(tmp_path / "outside")
        (w2.data_dir / "folder").symlink_to(tmp_path)
        os.mkfifo(w2.data_dir / "pipe")
        report = backup(w2, to=tmp_path, worker="W2", now=T0)
        assert report.manifest.skipped == (
            "folder: a link",
            "link: a link",
            "pipe: not a plain file",
        )
        assert b"canary-outside" not in unpacked(Path(report.path))

    def test_its_home_inside_the_data_directory_is_not_data(
        self, w2: Settings, tmp_path: Path
    ) -> None:
        inside = w2.model_copy(update={"home": w2.data_dir / "hcna"})
        write_membership(inside.cluster_dir, a_membership("canary-member-token"))
        report = backup(inside, to=tmp_path, worker="W2", now=T0)
        assert report.manifest.skipped == ("hcna: hcna-ray's own directory",)
        assert b"canary-member-token" not in unpacked(Path(report.path))

    def test_a_file_that_is_written_to_is_told(
        self, w2: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        growing = w2.data_dir / "run.sh"
        real = archives.ArchiveWriter._head

        def head(writer: archives.ArchiveWriter, member: str, size: int) -> None:
            if member == "data/run.sh":
                growing.write_bytes(b"#")
            real(writer, member, size)

        monkeypatch.setattr(archives.ArchiveWriter, "_head", head)
        report = backup(w2, to=tmp_path, worker="W2", now=T0)
        assert report.manifest.changed == ("run.sh",)
        assert check(Path(report.path)).changed == ("run.sh",)

    def test_files_in_the_way_are_moved_aside_only_when_told(
        self, w2: Settings, tmp_path: Path
    ) -> None:
        archive = Path(backup(w2, to=tmp_path, worker="W2", now=T0).path)
        (w2.data_dir / "newer").write_text("newer")
        with pytest.raises(BackupRefused, match="--force"):
            restore(w2, archive, now=T0)
        restore(w2, archive, force=True, now=T0)
        aside = w2.data_dir / "set-aside-20260101T000000Z"
        assert (aside / "newer").read_text() == "newer"
        assert (w2.data_dir / "run.sh").exists()

    def test_two_restores_within_a_second_keep_both_asides(
        self, w2: Settings, tmp_path: Path
    ) -> None:
        archive = Path(backup(w2, to=tmp_path, worker="W2", now=T0).path)
        for _ in range(3):
            (w2.data_dir / "run.sh").write_text("newer")
            restore(w2, archive, force=True, now=T0)
        asides = sorted(path.name for path in w2.data_dir.glob("set-aside-*"))
        assert asides == ["set-aside-20260101T000000Z-3"]  # It holds the others.
        last = w2.data_dir / asides[0]
        assert (last / "run.sh").read_text() == "newer"
        assert (last / "set-aside-20260101T000000Z-2" / "run.sh").read_text() == "newer"

    def test_it_is_run_on_that_machine(self, w2: Settings, m1: Settings, tmp_path: Path) -> None:
        with pytest.raises(BackupRefused, match="on that machine"):
            backup(w2, to=tmp_path, worker="W3", now=T0)
        with pytest.raises(BackupRefused, match="hcna backup --worker W2"):
            backup(w2, to=tmp_path, now=T0)
        with pytest.raises(BackupRefused, match="no data directory"):
            backup(m1, to=tmp_path, worker="W1", now=T0)

    def test_an_archive_inside_what_it_saves(self, w2: Settings) -> None:
        with pytest.raises(BackupRefused, match="inside"):
            backup(w2, to=w2.data_dir / "deep", worker="W2", now=T0)


def test_the_manifest_is_json_that_others_can_read(archive: Path) -> None:
    manifest = json.loads(dict((i.name, d) for i, d in pieces(archive))["manifest.json"])
    assert manifest["product"] == "hcna-ray"
    assert {entry["member"] for entry in manifest["entries"]} == {
        "config/hcna.yaml",
        "cluster/members.json",
        "store/queue.db",
    }

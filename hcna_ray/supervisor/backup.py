"""``hcna backup`` and ``hcna restore``: what of this machine goes into an archive, and back.

The format and its checks are `hcna_ray.store.backup`'s. This module knows the home: where things
are, which of them are secret, what must not run, and in which order files are put in place so that
a restore that is cut off is noticed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import yaml

from hcna_ray import failpoints
from hcna_ray.config import (
    POSTGRES_SCHEMES,
    Settings,
    load_settings,
    secrets_of,
    without_secrets,
)
from hcna_ray.core.audit import RESTORED
from hcna_ray.core.models import AuditEntry
from hcna_ray.durable import make_private_dir, sync_dir, sync_file, write_private
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.restore import EndedLeases, end_leases
from hcna_ray.security.keys import (
    ApiKey,
    KeyFileBroken,
    keys_text,
    load_keys,
    parse_keys,
    restored_keys,
)
from hcna_ray.security.sealing import seal, unseal
from hcna_ray.store.artifacts import (
    checked_makers,
    checked_marks,
    makers_in,
    marks_in,
    put_makers,
    put_marks,
)
from hcna_ray.store.backup import (
    CONFIG,
    FORMAT,
    MAKERS,
    MEMBERS,
    MODERATOR,
    OWNERS,
    PRODUCT,
    SEALED,
    SMALL,
    STORE,
    WORKER,
    ArchiveWriter,
    BackupDamaged,
    BackupRefused,
    Contents,
    Entry,
    Folder,
    Manifest,
    Point,
    artifacts_named,
    artifacts_present,
    binding,
    check_store,
    data_member,
    disk_errors,
    extract,
    generation_of,
    inspect,
    next_generation,
    renumber,
    scratch,
    snapshot,
)
from hcna_ray.store.generations import numbers_to_skip
from hcna_ray.store.sqlite import SqliteTaskStore
from hcna_ray.supervisor.membership import SCHEMA as MEMBERS_SCHEMA
from hcna_ray.supervisor.membership import read_members, read_membership
from hcna_ray.supervisor.ports import marker_of
from hcna_ray.supervisor.processes import describe, scan
from hcna_ray.supervisor.state import RunLock, restore_mark

SUFFIX = ".tar.zst"
#: The keys of C1, by their name in the sealed part.
_KEYS = "keys/keys.json"
_BACKUP_PREFIX, _RESTORE_PREFIX = _PREFIXES = (".hcna-backup-", ".hcna-restore-")
#: The file system's own, in the root of a disk.
_LOST_FOUND = "lost+found"
#: A clock may be this far behind that of the machine which made the backup.
CLOCK_BEHIND_S = 300.0
#: Open invitations let in whoever has the code: an archive must not open one again.
_NEVER_SEALED = frozenset({"invites.json"})
_SEALED_NAME = re.compile(r"(?:keys|cluster)/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
#: A user and password inside a URL, or a password among its options.
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@|[?&](ssl)?password=", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class BackupReport:
    """What a backup made. ``notes`` tell what is not in it."""

    path: str
    archive_bytes: int
    took_s: float
    manifest: Manifest
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """What a restore did, and what its owner must know."""

    kind: str
    created_at: float
    took_s: float
    point: Point | None
    generation: int | None
    ended: EndedLeases | None
    artifacts: int
    files: int
    with_keys: bool
    #: Whether the tasks are on a database server, where nothing was restored.
    on_server: bool
    #: Where what stood in the way is now.
    set_aside: tuple[str, ...]
    notes: tuple[str, ...]


# -- backup ----------------------------------------------------------------------------------------


def backup(
    settings: Settings,
    *,
    to: Path,
    worker: str | None = None,
    passphrase: str | None = None,
    now: float,
) -> BackupReport:
    """Write an archive of this machine, while it works or not.

    Args:
        settings: Of this machine.
        to: The file to write, or a directory for it.
        worker: The worker whose files are meant, which must be this machine's; None: M1.
        passphrase: Adds keys and certificates, sealed with it.
        now: Seconds since the epoch.

    Raises:
        BackupRefused: It cannot be made here; nothing is left.
        BackupDamaged: The store is damaged.
        PassphraseRefused: The passphrase is too short.
    """
    started = time.monotonic()
    kind, name, node_id = _what(settings, worker)
    target = _target(to, name, now)
    if kind == WORKER and target.parent.is_relative_to(settings.data_dir.resolve()):
        raise BackupRefused(f"{target} lies inside what is saved, {settings.data_dir}")
    with disk_errors(target.parent), scratch(target.parent, _BACKUP_PREFIX) as staging:
        manifest = Manifest(
            format=FORMAT,
            product=PRODUCT,
            version=metadata.version(PRODUCT),
            kind=kind,
            node_id=node_id,
            created_at=now,
        )
        staged = staging / "archive"
        descriptor = os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            writer = ArchiveWriter(stream, kind)
            notes = _add_settings(writer, settings, sealed=passphrase is not None)
            if kind == MODERATOR and settings.store_path is None:
                root = settings.artifacts_dir
                manifest = _add_artifacts(writer, root, artifacts_present(root), manifest)
                notes += _dump_notes(settings, target)
            elif kind == MODERATOR:
                manifest = _add_store(writer, settings, target.parent, manifest)
            else:
                manifest = _add_data(writer, settings, manifest)
            manifest = replace(manifest, entries=tuple(writer.entries))
            if passphrase is not None:
                secrets = msgspec.msgpack.encode(_secrets(settings))
                writer.add_bytes(SEALED, seal(secrets, passphrase, bound=binding(manifest)))
                failpoints.hit("backup.secrets.sealed")
                manifest = replace(manifest, entries=tuple(writer.entries))
            failpoints.hit("backup.manifest.before")
            writer.finish(manifest)
            stream.flush()
            os.fsync(stream.fileno())
        failpoints.hit("backup.archive.flushed")
        if target.exists():
            raise BackupRefused(f"{target} exists already")
        os.replace(staged, target)
        failpoints.hit("backup.archive.named")
        sync_dir(target.parent)
    return BackupReport(
        path=str(target),
        archive_bytes=target.stat().st_size,
        took_s=time.monotonic() - started,
        manifest=manifest,
        notes=notes,
    )


def _what(settings: Settings, worker: str | None) -> tuple[str, str, str]:
    """Return kind, short name and full name of what is saved."""
    membership = read_membership(settings.cluster_dir)
    if worker is None:
        if membership is not None:
            raise BackupRefused(
                f"this machine is {membership.name}, and the store is M1's: here it is "
                f"hcna backup --worker {membership.name}"
            )
        return MODERATOR, settings.moderator.name, settings.moderator.node_id
    name, node_id = settings.worker.name, settings.worker.node_id
    if membership is not None:
        name, node_id = membership.name, membership.node_id
    if worker.upper() != name.upper():
        raise BackupRefused(
            f"this machine is {name}: run hcna backup --worker {worker.upper()} on that machine"
        )
    if not settings.data_dir.is_dir():
        raise BackupRefused(f"there is no data directory {settings.data_dir}")
    return WORKER, name, node_id


def _target(to: Path, name: str, now: float) -> Path:
    to = to.expanduser().absolute()
    if to.is_dir():
        stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
        to = to / f"hcna-{name}-{stamp}{SUFFIX}"
    parent = to.parent.resolve()
    if not parent.is_dir():
        raise BackupRefused(f"there is no directory {parent}")
    if (parent / to.name).exists():
        raise BackupRefused(f"{parent / to.name} exists already")
    return parent / to.name


def _add_settings(writer: ArchiveWriter, settings: Settings, *, sealed: bool) -> tuple[str, ...]:
    notes: list[str] = []
    source = settings.source
    if source is not None:
        text = source.read_bytes()
        if not holds_password(text):
            writer.add_bytes(CONFIG, text)
        elif not sealed:
            notes.append(f"{source} holds a password, so it is left out without --with-keys")
    outside = sorted(name for name in os.environ if name.startswith("HCNA_") and "__" in name)
    notes += [f"{name} is set in the environment and not in the archive" for name in outside]
    members = read_members(settings.cluster_dir)
    if members:
        entries = [asdict(replace(member, token_sha256="")) for member in members]
        data = {"schema": MEMBERS_SCHEMA, "members": entries}
        writer.add_bytes(MEMBERS, (json.dumps(data, indent=2) + "\n").encode())
    return tuple(notes)


def _add_store(
    writer: ArchiveWriter, settings: Settings, beside: Path, manifest: Manifest
) -> Manifest:
    source = settings.store_path
    assert source is not None
    place = _place_for_copy(source, beside, reserve=settings.limits.disk_free_bytes_min)
    with scratch(place, _BACKUP_PREFIX) as folder, disk_errors(place):
        copy = folder / "queue.db"
        point = snapshot(source, copy)
        with copy.open("rb") as stream:
            writer.add_file(STORE, stream)
        present = artifacts_present(settings.artifacts_dir)
        named = artifacts_named(copy, present)
    # What the commit refers to was stored before it, and artifacts never change.
    named_here = {name: present[name] for name in named}
    manifest = replace(manifest, point=point)
    return _add_artifacts(writer, settings.artifacts_dir, named_here, manifest)


def _add_artifacts(
    writer: ArchiveWriter, root: Path, present: Mapping[str, Path], manifest: Manifest
) -> Manifest:
    damaged = []
    for name in sorted(present):
        try:
            stream = present[name].open("rb")
        except FileNotFoundError:
            raise BackupRefused(f"artifact {name} went away meanwhile; run it again") from None
        with stream:
            entry, _changed = writer.add_file(f"artifacts/{name}", stream)
            failpoints.hit("backup.artifact.added")
        if entry.sha256 != name:
            damaged.append(name)
    for member, found in (
        (OWNERS, marks_in(root, present)),
        (MAKERS, makers_in(root, present)),
    ):
        if found:
            data = json.dumps(found, separators=(",", ":")).encode()
            if len(data) > SMALL[member]:
                raise BackupRefused("too many artifacts have owners for one archive")
            writer.add_bytes(member, data)
    return replace(manifest, damaged=tuple(damaged))


def _dump_notes(settings: Settings, target: Path) -> tuple[str, ...]:
    """Say what makes the other half of a backup, and which half comes first."""
    dump = target.with_name(target.name.removesuffix(SUFFIX) + ".dump")
    again = shlex.join(["hcna", "backup", "--to", str(target.parent)])
    return (
        "the tasks are in PostgreSQL and not in this archive, which goes with every dump that was "
        "begun before it: all that such a dump refers to is here",
        f"so each time, in this order: {dump_command(settings, dump)} && {again}",
    )


def dump_command(settings: Settings, target: Path) -> str:
    """Return the command that copies the database; its password comes from elsewhere."""
    words = ["pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={target}"]
    return shlex.join([*words, without_secrets(settings.store_url)])


def restore_command(settings: Settings) -> str:
    """Return the command that fills an empty database from a dump."""
    words = ["pg_restore", "--exit-on-error", "--single-transaction", "--no-owner"]
    words += ["--no-privileges", f"--dbname={without_secrets(settings.store_url)}"]
    return f"{shlex.join(words)} FILE.dump"


def _place_for_copy(store: Path, beside: Path, *, reserve: int) -> Path:
    """Return where the store is copied to: beside itself if that leaves the reserve untouched.

    The copy is over soonest there, and as long as it takes the store's log only grows.
    """
    if not store.is_file():
        raise BackupRefused(f"there is no task store at {store}: start it with hcna up")
    size = store.stat().st_size
    if shutil.disk_usage(store.parent).free - size >= reserve:
        return store.parent
    free = shutil.disk_usage(beside).free
    if beside.stat().st_dev == store.parent.stat().st_dev or free < size:
        raise BackupRefused(
            f"{beside} has {free >> 20} MiB free; a copy of the store takes {size >> 20}, and the "
            f"store's own disk keeps a reserve of {reserve >> 20}: use --to with another disk"
        )
    return beside


def _add_data(writer: ArchiveWriter, settings: Settings, manifest: Manifest) -> Manifest:
    root, home = settings.data_dir.resolve(), settings.home.resolve()
    folders: list[Folder] = []
    changed: list[str] = []
    skipped: list[str] = []
    waiting, number = [root], 0
    while waiting:
        folder = waiting.pop()
        try:
            found = sorted(os.scandir(folder), key=lambda one: one.name)
        except OSError as error:
            skipped.append(f"{folder.relative_to(root)}: {error.strerror}")
            continue
        for one in found:
            path = Path(one.path)
            below = str(path.relative_to(root))
            if one.name.startswith(_PREFIXES) or one.name == _LOST_FOUND:
                continue
            if one.is_dir(follow_symlinks=False):
                if path == home:
                    skipped.append(f"{below}: hcna-ray's own directory")
                    continue
                mode = one.stat(follow_symlinks=False).st_mode & 0o777
                folders.append(Folder(path=below, mode=mode))
                waiting.append(path)
                continue
            if not one.is_file(follow_symlinks=False):
                what = "a link" if one.is_symlink() else "not a plain file"
                skipped.append(f"{below}: {what}")
                continue
            number += 1
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                stream = os.fdopen(os.open(path, flags), "rb")
            except OSError as error:
                skipped.append(f"{below}: {error.strerror}")
                continue
            with stream:
                _entry, torn = writer.add_file(data_member(below, number), stream, path=below)
                failpoints.hit("backup.data.added")
            if torn:
                changed.append(below)
    return replace(
        manifest,
        folders=tuple(folders),
        changed=tuple(changed),
        skipped=tuple(skipped),
    )


def _secrets(settings: Settings) -> dict[str, bytes]:
    """Return what is sealed: every file of ``keys/`` and ``cluster/``, by name."""
    found: dict[str, bytes] = {}
    for kind, folder in (("keys", settings.keys_dir), ("cluster", settings.cluster_dir)):
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            name = f"{kind}/{path.name}"
            plain = path.is_file() and not path.is_symlink()
            if plain and _SEALED_NAME.match(name) and path.name not in _NEVER_SEALED:
                found[name] = path.read_bytes()
    source = settings.source
    if source is not None:
        text = source.read_bytes()
        if holds_password(text):
            found[CONFIG] = text
    return found


def holds_password(config: bytes) -> bool:
    """Return whether a file of settings holds a password, be it in a comment."""
    text = config.decode("utf-8", "replace")
    try:
        # What YAML makes of it counts as well: a URL may be written with escapes, or over lines.
        texts = [text, *_texts(yaml.safe_load(text))]
    except (yaml.YAMLError, ValueError, RecursionError):
        return True  # Nobody can say.
    return any(
        _PASSWORD.search(one)
        or _PASSWORD.search(unquote(one))
        or (one.startswith(POSTGRES_SCHEMES) and secrets_of(one))
        for one in texts
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in what YAML was read as."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


# -- restore ---------------------------------------------------------------------------------------


def restore(
    settings: Settings,
    archive: Path,
    *,
    force: bool = False,
    passphrase: str | None = None,
    now: float,
) -> RestoreReport:
    """Bring back what an archive holds. This machine's part must be down.

    Everything is checked and prepared beside its place first; only then files are moved, the store
    last. What stands in the way is moved aside, never deleted.

    Args:
        settings: Of this machine, as they are before.
        archive: What `backup` wrote.
        force: Move aside what is in the way.
        passphrase: Brings keys and certificates back too.
        now: Seconds since the epoch.

    Raises:
        BackupRefused: It cannot be done here. Nothing was changed.
        BackupDamaged: The archive is not whole. Nothing was changed.
        SealBroken: Wrong passphrase. Nothing was changed.
    """
    started = time.monotonic()
    contents = inspect(archive)
    secrets = _unsealed(archive, contents, passphrase)
    with _stopped(settings):
        make_private_dir(settings.home)
        plan = _Plan(settings, archive, contents, secrets, force=force, now=now)
        report = plan.carry_out()
    return replace(report, took_s=time.monotonic() - started)


def check(archive: Path, passphrase: str | None = None) -> Manifest:
    """Return the manifest of an archive that is whole; open its sealed part if one can be.

    Raises:
        BackupDamaged: It is not whole.
        SealBroken: Wrong passphrase.
    """
    contents = inspect(archive)
    _unsealed(archive, contents, passphrase)
    return contents.manifest


def _unsealed(archive: Path, contents: Contents, passphrase: str | None) -> dict[str, bytes]:
    if passphrase is None:
        return {}
    sealed = contents.small.get(SEALED)
    if sealed is None:
        raise BackupRefused(f"{archive} holds no keys: it was made without --with-keys")
    raw = unseal(sealed, passphrase, bound=binding(contents.manifest))
    try:
        found = msgspec.msgpack.decode(raw, type=dict[str, bytes])
    except msgspec.MsgspecError as error:
        raise BackupDamaged(str(archive), f"its sealed part is broken ({error})") from None
    for name in found:
        if not _SEALED_NAME.match(name) and name != CONFIG:
            raise BackupDamaged(str(archive), f"its sealed part holds {name!r}")
    return found


@contextmanager
def _stopped(settings: Settings) -> Iterator[None]:
    """Make sure that nothing of this home runs, and that nothing is started meanwhile."""
    lock = RunLock(settings.run_dir)
    if not lock.acquire():
        raise BackupRefused("this machine's part is running: hcna down first")
    try:
        left = [describe(process) for process in scan(marker_of(settings))]
        if left:
            raise BackupRefused(f"{left[0]} still runs: hcna down first")
        yield
    finally:
        lock.release()


class _Plan:
    """One restore: what goes where, what is in the way, and carrying it out."""

    def __init__(
        self,
        settings: Settings,
        archive: Path,
        contents: Contents,
        secrets: Mapping[str, bytes],
        *,
        force: bool,
        now: float,
    ) -> None:
        """Look at the home; refuse what cannot be done."""
        self._archive, self._manifest, self._small = archive, contents.manifest, contents.small
        self._secrets, self._force, self._now = secrets, force, now
        self._home, self._mark = settings.home, restore_mark(settings.run_dir)
        self._notes: list[str] = []
        self._set_aside: list[str] = []
        self._config = secrets.get(CONFIG, contents.small.get(CONFIG))
        member = OWNERS
        try:
            self._marks = checked_marks(json.loads(contents.small.get(OWNERS, b"{}")))
            member = MAKERS
            self._makers = checked_makers(json.loads(contents.small.get(MAKERS, b"{}")))
        except (ValueError, RecursionError) as error:
            raise BackupDamaged(str(archive), f"{member}: {error}") from None
        #: Written with this machine's settings, or with the archive's if it has none yet.
        self._settings = self._effective(settings)
        self._stamp = self._free_stamp()
        self._interrupted = _stamp_of(self._mark)
        self._check_clock()
        self._check_role()
        in_the_way = self._in_the_way()
        if in_the_way and not force:
            listed = ", ".join(str(path) for path in in_the_way)
            raise BackupRefused(
                f"this machine has {listed} already; --force moves that aside and deletes nothing"
            )
        self._moved = in_the_way
        self._key_lines = self._merge_keys()

    # -- looking ---------------------------------------------------------------------------------

    def _free_stamp(self) -> str:
        """Return what tells this restore's things from those of others, also of the same second."""
        second = stamp = datetime.fromtimestamp(self._now, UTC).strftime("%Y%m%dT%H%M%SZ")
        store = self._settings.store_path
        folders = {self._home, self._settings.data_dir, *(() if store is None else (store.parent,))}
        number = 1
        while any(next(one.glob(f"*set-aside-{stamp}*"), None) for one in folders):
            number += 1
            stamp = f"{second}-{number}"
        return stamp

    @property
    def _config_path(self) -> Path:
        named = os.environ.get("HCNA_CONFIG")
        return Path(named).expanduser().absolute() if named else self._home / "hcna.yaml"

    def _effective(self, settings: Settings) -> Settings:
        if self._config is None or self._config_path.exists():
            return settings
        with scratch(self._home, _RESTORE_PREFIX) as folder:
            file = folder / "hcna.yaml"
            file.write_bytes(self._config)
            return load_settings(home=self._home, path=file)

    def _check_clock(self) -> None:
        created = self._manifest.created_at
        if self._now < created - CLOCK_BEHIND_S:
            made = datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds")
            raise BackupRefused(
                f"the backup was made at {made}, which lies ahead of this machine's clock: set the "
                "clock first, for the new generation is taken from it"
            )

    def _check_role(self) -> None:
        joined = read_membership(self._settings.cluster_dir)
        if self._manifest.kind == MODERATOR:
            if joined is not None:
                raise BackupRefused(
                    f"this machine is {joined.name} of another one, and the backup is an M1's: "
                    "hcna leave first"
                )
            if self._settings.store_path is None and self._has_store:
                raise BackupRefused("the settings name a PostgreSQL store, the backup is SQLite's")
            if self._settings.store_path is not None and not self._has_store:
                raise BackupRefused(
                    "the backup's tasks are in PostgreSQL: set DATABASE_URL (or store.url) to the "
                    "database first, or hcna up would begin with an empty store"
                )

    def _in_the_way(self) -> list[Path]:
        found: list[Path] = []
        if self._has_store:
            store = self._store_path
            found += [path for path in _store_files(store) if path.exists()]
        elif self._manifest.kind == WORKER:
            data = self._settings.data_dir
            found += [
                path
                for path in sorted(data.iterdir() if data.is_dir() else ())
                if not path.name.startswith(_PREFIXES) and path.name != _LOST_FOUND
            ]
        for name in ("keys", "cluster"):
            folder = self._home / name
            for path in sorted(folder.glob("[!.]*")) if self._secrets else ():
                wanted = self._secrets.get(f"{name}/{path.name}")
                if not path.is_file() or wanted != path.read_bytes():
                    found.append(folder)
                    break
        return found

    @property
    def _has_store(self) -> bool:
        """Whether the archive holds a store: an M1's on PostgreSQL does not."""
        return self._manifest.kind == MODERATOR and not self._manifest.on_server

    @property
    def _store_path(self) -> Path:
        path = self._settings.store_path
        assert path is not None
        return path

    def _merge_keys(self) -> tuple[AuditEntry, ...]:
        """Keep those keys locked out that were taken back since; return what to put on record."""
        data = self._secrets.get(_KEYS)
        before = [] if data is None else self._keys_of_before()
        if data is None or not before:
            return ()
        try:
            kept = parse_keys(data.decode("utf-8"), f"{_KEYS} of {self._archive}")
        except (KeyFileBroken, ValueError) as error:
            self._notes.append(f"{error}: nobody is let in until it is repaired")
            return ()
        found = restored_keys(kept, before, now=self._now)
        if found.revoked:
            text = keys_text(found.keys)
            self._secrets = {**self._secrets, _KEYS: text.encode("utf-8")}
        if found.appeared:
            self._notes.append(
                f"keys came back that were on record no more: {_listed(found.appeared)}; take back "
                "those that must not open anything: hcna keys revoke"
            )
        if found.gone:
            self._notes.append(
                f"keys are gone that are not in the backup: {_listed(found.gone)}; make new ones: "
                "hcna keys create"
            )
        said = (
            ("key.revoked", found.revoked, "taken back after the backup was made, and stays so"),
            ("key.restored", found.appeared, "came back with the backup; it was on record no more"),
            ("key.gone", found.gone, "it is not in the backup"),
        )
        return tuple(
            AuditEntry(
                at=self._now,
                principal="owner",
                action=action,
                target=key.name,
                outcome="done",
                detail=f"{key.fingerprint}, {key.role}: {why}",
            )
            for action, keys, why in said
            for key in keys
        )

    def _keys_of_before(self) -> list[ApiKey]:
        """Return the keys of this machine, those too that an interrupted restore moved aside."""
        folder = self._home / "keys"
        folders = [folder]
        if self._interrupted is not None:
            folders.append(_aside(folder, None, self._interrupted))
        found: dict[str, ApiKey] = {}
        for one in folders:
            try:
                known = load_keys(one)
            except (KeyFileBroken, OSError) as error:
                self._notes.append(
                    f"{error}: keys that were taken back there may be good again; hcna keys list"
                )
                continue
            for key in known:
                if key.sha256 not in found or key.revoked_at is not None:
                    found[key.sha256] = key
        return list(found.values())

    # -- doing -----------------------------------------------------------------------------------

    def carry_out(self) -> RestoreReport:
        """Prepare everything beside its place, then move it in."""
        ended, generation = None, None
        is_moderator = self._manifest.kind == MODERATOR
        if self._has_store:
            place = self._store_path.parent
        else:
            place = self._home if is_moderator else self._settings.data_dir
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            scratch(self._home, _RESTORE_PREFIX) as at_home,
            scratch(place, _RESTORE_PREFIX) as beside,
        ):
            new_artifacts = self._extract(at_home, beside)
            if self._has_store:
                generation, ended = self._prepare_store(beside / "queue.db")
            self._pend()
            self._move_aside()
            for name in new_artifacts:
                self._put_artifact(at_home / "artifacts" / name, name)
            if self._marks:
                put_marks(self._settings.artifacts_dir, self._marks)
            put_makers(self._settings.artifacts_dir, self._makers)
            self._put_secrets()
            self._put_config()
            failpoints.hit("restore.config.put")
            if is_moderator:
                self._put_members()
            if self._has_store:
                os.replace(beside / "queue.db", self._store_path)
                failpoints.hit("restore.store.put")
            elif not is_moderator:
                self._put_data(beside / "data")
            sync_dir(place)
            sync_dir(self._home)
            failpoints.hit("restore.mark.before_removal")
            self._mark.unlink()
            failpoints.hit("restore.mark.removed")
            sync_dir(self._mark.parent)
        self._note_members()
        if self._manifest.on_server:
            self._note_database()
        return RestoreReport(
            kind=self._manifest.kind,
            created_at=self._manifest.created_at,
            took_s=0.0,
            point=self._manifest.point,
            generation=generation,
            ended=ended,
            artifacts=self._manifest.artifacts - len(self._manifest.damaged),
            files=sum(1 for entry in self._manifest.entries if entry.path),
            with_keys=bool(self._secrets),
            on_server=self._manifest.on_server,
            set_aside=tuple(self._set_aside),
            notes=tuple(self._notes),
        )

    def _extract(self, at_home: Path, beside: Path) -> list[str]:
        """Write store, artifacts and data beside their places; return the artifacts."""
        wanted: list[str] = []
        damaged = frozenset(self._manifest.damaged)

        def place(entry: Entry) -> Path | None:
            if entry.member == STORE:
                return beside / "queue.db"
            if entry.path:
                return beside / "data" / entry.path
            folder, _, name = entry.member.partition("/")
            if folder == "artifacts" and name not in damaged:
                wanted.append(name)
                return at_home / "artifacts" / name
            return None

        extract(self._archive, self._manifest, place)
        return wanted

    def _prepare_store(self, path: Path) -> tuple[int, EndedLeases]:
        point = self._manifest.point
        if not path.is_file() or point is None:
            raise BackupDamaged(str(self._archive), "there is no store in it")
        if check_store(path) != point:
            raise BackupDamaged(str(self._archive), "its store is not what its manifest says")
        created, now = self._manifest.created_at, self._now
        replaced = generation_of(self._store_path) if self._store_path.exists() else 0
        generation = next_generation(point, created_at=created, now=now, others=[replaced])
        failpoints.hit("restore.generation.before")
        renumber(path, generation=generation, skip=numbers_to_skip(created_at=created, now=now))
        failpoints.hit("restore.generation.raised")
        made = datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds")
        why = f"a backup of {made} was restored"
        note = AuditEntry(
            at=now,
            principal="owner",
            action=RESTORED,
            target=self._archive.name,
            outcome="done",
            detail=f"{why}; last fact {point.last_fact}, generation {point.generation} is now "
            f"{generation}",
        )
        store = SqliteTaskStore(path)  # Brings an older schema up to date.
        try:
            policy = Policy.from_settings(self._settings)
            ended = end_leases(store, policy, now=now, why=why, note=note)
            if self._key_lines:
                with store.transaction():
                    store.append_audit(self._key_lines)
            failpoints.hit("restore.leases.ended")
        finally:
            store.close()
        sync_file(path)
        return generation, ended

    def _pend(self) -> None:
        """From here on the home is neither the old one nor the new one."""
        told = {"archive": str(self._archive), "since": self._interrupted or self._stamp}
        write_private(self._mark, json.dumps(told) + "\n")
        failpoints.hit("restore.mark.written")

    def _move_aside(self) -> None:
        """Rename what is in the way. The log of a store goes first: alone it harms nobody."""
        for path in self._moved:
            if self._manifest.kind == WORKER and path.parent == self._settings.data_dir:
                aside = path.parent / f"set-aside-{self._stamp}" / path.name
                aside.parent.mkdir(mode=0o700, exist_ok=True)
            else:
                aside = self._aside(path)
            os.rename(path, aside)
            failpoints.hit("restore.aside.moved")
            sync_dir(path.parent)
            self._set_aside.append(str(aside))

    def _aside(self, path: Path) -> Path:
        """Return the name under which a file is kept."""
        store = self._settings.store_path
        if self._interrupted is not None and store is not None and path in _store_files(store):
            # An interrupted restore may have moved the log alone: its store goes with it.
            aside = _aside(path, store, self._interrupted)
            if not aside.exists():
                return aside
        return _aside(path, store, self._stamp)

    def _put_artifact(self, source: Path, name: str) -> None:
        target = self._settings.artifacts_dir / name[:2] / name
        make_private_dir(target.parent)
        source.chmod(0o400)
        os.replace(source, target)  # The same bytes, or damaged ones.
        failpoints.hit("restore.artifact.put")
        sync_dir(target.parent)

    def _put_secrets(self) -> None:
        for name, data in self._secrets.items():
            if name != CONFIG:
                write_private(self._home / name, data.decode("utf-8"))
                failpoints.hit("restore.secret.put")

    def _put_config(self) -> None:
        if self._config is None:
            return
        path, text = self._config_path, self._config.decode("utf-8")
        if not path.exists():
            write_private(path, text)
        elif path.read_bytes() != self._config:
            beside = path.with_name(f"{path.name}.from-backup-{self._stamp}")
            write_private(beside, text)
            self._notes.append(f"{path} was kept; the backup's settings are in {beside}")

    def _put_members(self) -> None:
        data = self._small.get(MEMBERS)
        target = self._settings.cluster_dir / "members.json"
        if data is not None and not target.exists():
            write_private(target, data.decode("utf-8"))

    def _put_data(self, source: Path) -> None:
        root = self._settings.data_dir
        for folder in self._manifest.folders:
            (source / folder.path).mkdir(parents=True, exist_ok=True)
        for folder in reversed(self._manifest.folders):
            (source / folder.path).chmod(folder.mode)
        for path in sorted(source.iterdir()) if source.is_dir() else ():
            os.rename(path, root / path.name)
            failpoints.hit("restore.data.put")

    def _note_database(self) -> None:
        made = datetime.fromtimestamp(self._manifest.created_at, UTC).isoformat(timespec="seconds")
        self._notes += [
            f"the tasks are in PostgreSQL: {self._settings.store_name}. If that database is lost "
            f"too, make an empty one and fill it from a dump that was begun before {made}, then "
            "end what was out:",
            restore_command(self._settings),
            "hcna store restored",
        ]

    def _note_members(self) -> None:
        if self._manifest.kind != MODERATOR:
            return
        strangers = [m.name for m in read_members(self._settings.cluster_dir) if not m.token_sha256]
        if strangers:
            self._notes.append(
                f"{', '.join(strangers)} must join again (hcna invite here, hcna join CODE there) "
                "and keep their names: the backup's keys were not restored"
            )


def _store_files(store: Path) -> list[Path]:
    """Return a store's files, the log first."""
    return [store.with_name(f"{store.name}{end}") for end in ("-wal", "-shm", "")]


def _stamp_of(mark: Path) -> str | None:
    """Return what an interrupted restore had called what it moved aside; None without one."""
    try:
        return str(json.loads(mark.read_text(encoding="utf-8"))["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _aside(path: Path, store: Path | None, stamp: str) -> Path:
    """Return the name under which a file is kept. A store and its log still fit together."""
    if store is not None and path in _store_files(store):
        end = path.name.removeprefix(store.name)
        return path.with_name(f"{store.name}.set-aside-{stamp}{end}")
    return path.with_name(f"{path.name}.set-aside-{stamp}")


def _listed(keys: Sequence[ApiKey]) -> str:
    return ", ".join(f"{key.name} ({key.fingerprint})" for key in keys)

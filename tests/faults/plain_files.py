"""Kills of what changes a home while nobody serves it: migration, backup, restore, copy, keys.

Each is killed at every step, several times in a row, and must then succeed as if nothing had been;
what can be read in between is the old state or the new one, whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcna_ray.durable import write_private
from hcna_ray.security.authority import Node, trusted
from hcna_ray.security.certs import ensure_server, load_cert, load_key
from hcna_ray.store.artifacts import ArtifactStore
from hcna_ray.store.backup import artifacts_present
from hcna_ray.store.base import TaskReader
from hcna_ray.store.migrate import copy_store
from hcna_ray.store.migrations import known_migrations
from hcna_ray.store.postgres import PostgresTaskReader
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from hcna_ray.supervisor.backup import check as check_archive
from hcna_ray.supervisor.rounds import read_round
from hcna_ray.supervisor.state import restore_mark
from tests.faults.plain_roles import settings_of
from tests.faults.programme import Case, Outcome
from tests.faults.spawner import SpawnerLink
from tests.support.builders import a_fact, a_task
from tests.support.postgres import PostgresServer
from tests.support.read_store import export, query

#: How often one step is killed in a row.
TIMES = 3
_ENDS_S = 60.0
_PASSPHRASE = "correct horse battery staple"
_KILLED = -9
#: Migrations of versions to come.
_LATER = (
    (9002, "9002_more.sql", "CREATE TABLE more (a INTEGER) STRICT; INSERT INTO more VALUES (1);"),
    (9003, "9003_column.sql", "ALTER TABLE more ADD COLUMN b TEXT; UPDATE more SET b = 'x';"),
    (9004, "9004_index.sql", "CREATE INDEX more_by_b ON more (b);"),
)


class Servers:
    """The PostgreSQL server of these cases, started when it is first asked for."""

    def __init__(self) -> None:
        self._server: PostgresServer | None = None

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.remove()

    def one(self) -> PostgresServer:
        """Return the server, running."""
        if self._server is None:
            self._server = PostgresServer()
            self._server.start()
        return self._server


class _Work:
    """What a case needs: a folder, the spawner, and where to tell what broke."""

    def __init__(
        self, case: Case, folder: Path, spawner: Path, servers: Servers, line: str
    ) -> None:
        self.case, self.folder, self.servers = case, folder, servers
        self.draw = random.Random(case.seed)
        self.link = SpawnerLink(spawner, folder / "failpoints")
        self.out = Outcome(counts={line: 0})
        self._line = line

    def expect(self, holds: bool, promise: str) -> None:
        """Note a broken promise."""
        if not holds:
            self.out.violations.append(f"{self.case.name}: {promise}")

    async def run(self, role: str, arguments: Mapping[str, Any]) -> int:
        """Run a process to its end; return how it ended."""
        log = self.folder / f"{role}.log"
        async with asyncio.timeout(_ENDS_S):
            return await self.link.ended(await self.link.start(role, log, arguments))

    async def killed_at(
        self, role: str, point: str, arguments: Mapping[str, Any], number: int = 1
    ) -> bool:
        """Run a process that is killed when it has come as far as a point."""
        folder = self.folder / "failpoints" / role
        folder.mkdir(parents=True, exist_ok=True)
        (folder / point).write_text(f"kill@{number}")
        status = await self.run(role, arguments)
        (folder / point).unlink(missing_ok=True)
        killed = status == _KILLED
        self.out.counts[self._line] += killed
        said = (self.folder / f"{role}.log").read_text()[-1500:]
        self.expect(
            killed, f"{role} should have been killed at {point}, ended with {status}\n{said}"
        )
        return killed

    async def succeeds(self, role: str, arguments: Mapping[str, Any], after: str) -> None:
        """Run a process that must succeed."""
        status = await self.run(role, arguments)
        said = (self.folder / f"{role}.log").read_text()[-1500:]
        self.expect(status == 0, f"{role} after a kill at {after} ended with {status}\n{said}")


def _filled(store: Path, tasks: int = 300) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    one = SqliteTaskStore(store)
    with one.transaction():
        one.insert(
            [
                a_task(f"t{seq}", seq=seq, payload=b'"' + b"x" * 300 + b'"')
                for seq in range(1, tasks)
            ]
        )
        one.append_facts([a_fact(f"t{seq}", kind="accepted") for seq in range(1, tasks)])
    one.close()


def _history(reader: TaskReader) -> list[tuple[int, str, str]]:
    try:
        found = reader.facts(after=0, limit=10**6)
    finally:
        reader.close()
    return [(one.number, one.fact.task_id, one.fact.kind) for one in found]


def _dump(store: Path, target: Path) -> bytes:
    export(store, target, taken_at=0.0)
    return target.read_bytes()


def _is_whole(store: Path) -> bool:
    return query(store, "PRAGMA integrity_check") == [("ok",)]


# -- migration -------------------------------------------------------------------------------------


async def _creation(work: _Work) -> None:
    """An empty store, killed while it is made."""
    for point in work.case.options["failpoints"]:
        store = work.folder / f"{point}.db"
        arguments = {"store": str(store), "more_migrations": []}
        for _ in range(TIMES):
            await work.killed_at("store", point, arguments)
            if point == "schema.step.committed":
                break  # The first migration is done; the others are begun in the next try.
        await work.succeeds("store", arguments, point)
        work.expect(_is_whole(store), f"the store is damaged after {point}")
        _filled(store, 5)


async def _migration(work: _Work) -> None:
    """A store with tasks, killed at each step on its way to a version to come."""
    for turn in range(2):
        store = work.folder / f"{turn}.db"
        _filled(store)
        before = _dump(store, work.folder / "before.jsonl")
        arguments = {"store": str(store), "more_migrations": list(_LATER)}
        for _ in _LATER:
            for _ in range(TIMES):
                await work.killed_at("store", "schema.step.applied", arguments)
            if turn:
                await work.killed_at("store", "schema.step.committed", arguments)
            else:
                # The step is applied, and the next one is begun, in the same process.
                await work.killed_at("store", "store.file.created", arguments)
                break
        await work.succeeds("store", arguments, "each of its steps")
        work.expect(_is_whole(store), "the store is damaged")
        work.expect(_dump(store, work.folder / "after.jsonl") == before, "tasks have changed")
        steps = query(store, "SELECT number FROM schema_migration ORDER BY number")
        more = query(store, "SELECT a, b FROM more")
        every = [one.number for one in known_migrations()] + [number for number, *_ in _LATER]
        work.expect(steps == [(number,) for number in every], f"the ledger has {steps}")
        work.expect(more == [(1, "x")], f"a migration was run in part, or twice: {more}")


# -- backup and restore ----------------------------------------------------------------------------


def _machine(home: Path) -> None:
    """Make an M1 with tasks, artifacts and keys, and a worker's files."""
    settings = settings_of(home)
    assert settings.store_path is not None
    _filled(settings.store_path)
    artifacts = ArtifactStore(
        settings.artifacts_dir,
        artifact_bytes_max=1 << 20,
        part_bytes_max=1 << 20,
        uploads_max=4,
        upload_idle_s=60.0,
        disk_free_bytes_min=0,
        now=time.time,
        disk_free=lambda _: 1 << 40,
    )
    store = SqliteTaskStore(settings.store_path)
    with store.transaction():
        for number in range(4):
            made = artifacts.put(os.urandom(3000))
            payload = f'{{"file": {{"$artifact": "{made.sha256}"}}}}'.encode()
            seq = 1000 + number
            store.insert([a_task(f"t{seq}", seq=seq, payload=payload)])
            store.append_facts([a_fact(f"t{seq}", kind="accepted")])
    store.close()
    for number in range(3):
        write_private(home / "keys" / f"key-{number}", f"secret {number}")
    for number in range(4):
        path = settings.data_dir / f"folder-{number}" / "file"
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(2000))


async def _backups(work: _Work) -> None:
    """A backup beside a store that is written to; killed, it leaves nothing or a whole one."""
    home = work.folder / "home"
    _machine(home)
    path = settings_of(home).store_path
    assert path is not None
    busy = asyncio.create_task(_write(path))
    try:
        for point in work.case.options["failpoints"]:
            for turn in range(TIMES):
                to = work.folder / f"{point}.{turn}.tar.zst"
                role, _, arguments = _backup_of(point, home, to)
                await work.killed_at(role, point, arguments)
                if to.exists():
                    work.expect(point == "backup.archive.named", f"an archive after {point}")
                    check_archive(to, arguments.get("passphrase"))
            to = work.folder / f"{point}.tar.zst"
            role, _, arguments = _backup_of(point, home, to)
            await work.succeeds(role, arguments, point)
            check_archive(to, arguments.get("passphrase"))
            left = [path.name for path in work.folder.glob(".hcna-backup-*")]
            work.expect(not left, f"killed backups have left {left}")
    finally:
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)


def _backup_of(point: str, home: Path, to: Path) -> tuple[str, str, dict[str, Any]]:
    arguments: dict[str, Any] = {"home": str(home), "to": str(to), "now": time.time()}
    if point == "backup.data.added":
        return "worker-backup", point, {**arguments, "worker": settings_of(home).worker.name}
    return "backup", point, {**arguments, "passphrase": _PASSPHRASE}


async def _write(store: Path) -> None:
    """Commit something all the time."""
    one = SqliteTaskStore(store)
    try:
        while True:
            seq = one.last_seq() + 1
            with one.transaction():
                one.insert([a_task(f"t{seq}", seq=seq)])
                one.append_facts([a_fact(f"t{seq}", kind="accepted")])
            await asyncio.sleep(0.01)
    finally:
        one.close()


async def _restores(work: _Work) -> None:
    """A restore over another machine's home; killed, it is done again and succeeds."""
    home = work.folder / "home"
    _machine(home)
    archive, files = work.folder / "m1.tar.zst", work.folder / "w1.tar.zst"
    await work.succeeds(*_bare(_backup_of("", home, archive)), "nothing")
    await work.succeeds(*_bare(_backup_of("backup.data.added", home, files)), "nothing")
    path = settings_of(home).store_path
    assert path is not None
    wanted = _history(SqliteTaskReader(path))
    whole = work.case.options["all"]
    for point in work.case.options["failpoints"]:
        spare = work.folder / point
        is_data = point == "restore.data.put"
        # Something stands in the way: another store, or other files.
        _machine(spare)
        arguments = {"home": str(spare), "force": True}
        arguments |= {"archive": str(files)} if is_data else {"archive": str(archive)}
        if not is_data:
            arguments["passphrase"] = _PASSPHRASE
        for turn in range(TIMES if whole else 1):
            # What one left aside does not stand in the way again: it may come by less often.
            number = 2 if turn == 0 and point in ("restore.file.extracted",) else 1
            arguments["now"] = time.time()
            if point == "restore.aside.moved" and turn:
                _filled(settings_of(spare).store_path or path, 4)
            await work.killed_at("restore", point, arguments, number)
            marked = restore_mark(settings_of(spare).run_dir).exists()
            work.expect(marked or point not in _MARKED, f"no mark after {point}")
        arguments["now"] = time.time()
        await work.succeeds("restore", arguments, point)
        _look_at(work, home, spare, wanted, point)


_MARKED = (
    "restore.mark.written",
    "restore.aside.moved",
    "restore.artifact.put",
    "restore.secret.put",
    "restore.config.put",
    "restore.store.put",
    "restore.data.put",
    "restore.mark.before_removal",
)


def _bare(backup: tuple[str, str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    return backup[0], backup[2]


def _look_at(
    work: _Work, home: Path, spare: Path, wanted: list[tuple[int, str, str]], point: str
) -> None:
    there, here = settings_of(home), settings_of(spare)
    assert here.store_path is not None
    work.expect(not restore_mark(here.run_dir).exists(), f"the mark is left after {point}")
    left = [one for folder in (spare, here.data_dir) for one in folder.glob(".hcna-restore-*")]
    work.expect(not left, f"killed restores at {point} have left {left}")
    if point == "restore.data.put":
        for path in there.data_dir.rglob("file"):
            found = here.data_dir / path.relative_to(there.data_dir)
            same = found.is_file() and found.read_bytes() == path.read_bytes()
            work.expect(same, f"{path.parent.name} is not what it was, after {point}")
        return
    found_facts = _history(SqliteTaskReader(here.store_path))
    work.expect(found_facts[: len(wanted)] == wanted, f"the log is another one after {point}")
    work.expect(_is_whole(here.store_path), f"the store is damaged after {point}")
    present = artifacts_present(here.artifacts_dir)
    for name in artifacts_present(there.artifacts_dir):
        good = name in present and hashlib.sha256(present[name].read_bytes()).hexdigest() == name
        work.expect(good, f"artifact {name} is missing after {point}")
    for path in (home / "keys").glob("[!.]*"):
        found = spare / "keys" / path.name
        same = found.is_file() and found.read_bytes() == path.read_bytes()
        work.expect(same, f"{path.name} is not what it was, after {point}")


# -- copy ------------------------------------------------------------------------------------------


async def _copies(work: _Work) -> None:
    """`hcna store migrate`: killed before its end nothing is there, after it everything."""
    server = work.servers.one()
    store = work.folder / "queue.db"
    _filled(store)
    wanted = _history(SqliteTaskReader(store))
    for point in work.case.options["failpoints"]:
        url = server.url(server.create_database())
        arguments = {"store": str(store), "url": url}
        done = point in ("copy.store.committed", "postgres.commit.after")
        for turn in range(TIMES):
            number = (1, 3, 7)[turn] if point == "copy.table.sent" else 1
            await work.killed_at("copy", point, arguments, number)
            if done or (point == "postgres.step.applied" and turn):
                break
        if not done:
            await work.succeeds("copy", arguments, point)
        found = _history(PostgresTaskReader(url))
        work.expect(found == wanted, f"{len(found)} of {len(wanted)} lines after {point}")


async def _copies_back(work: _Work) -> None:
    """The way back: the file has its name when all of it is there, or it is not there at all."""
    store = work.folder / "queue.db"
    _filled(store)
    wanted = _history(SqliteTaskReader(store))
    server = work.servers.one()
    url = server.url(server.create_database())
    copy_store(store, url)
    for point in work.case.options["failpoints"]:
        target = work.folder / f"{point}.db"
        arguments = {"store": str(target), "url": url}
        done = point == "copy.file.named"
        for turn in range(1 if done else TIMES):
            number = (1, 3, 7)[turn] if point == "copy.back.sent" else 1
            await work.killed_at("copy_back", point, arguments, number)
            work.expect(target.exists() == done, f"after {point} there is a file, or none")
        if not done:
            await work.succeeds("copy_back", arguments, point)
        found = _history(SqliteTaskReader(target))
        work.expect(found == wanted, f"{len(found)} of {len(wanted)} lines after {point}")
        work.expect(_is_whole(target), f"the copy is damaged after {point}")


# -- keys and certificates -------------------------------------------------------------------------


async def _certificates(work: _Work) -> None:
    """Authority and certificate, killed while they are written: the next start has them."""
    for point in work.case.options["failpoints"]:
        for number in range(1, 5):
            home = work.folder / f"{point}.{number}"
            home.mkdir()
            arguments = {"home": str(home)}
            if point.startswith("certificate.") and number > 1:
                break
            await work.killed_at("certify", point, arguments, number)
            await work.succeeds("certify", arguments, f"{point} ({number})")
            ensure_server(
                home / "cluster",
                "gate",
                names=["m1"],
                addresses=["127.0.0.1"],
                now=datetime.now(UTC),
            )


async def _authority(work: _Work) -> None:
    """Giving, revoking and handing over, killed at each step: the next time all of it fits."""
    for point in work.case.options["failpoints"]:
        home = work.folder / point
        home.mkdir()
        await work.killed_at("authorize", point, {"home": str(home)})
        await work.succeeds("authorize", {"home": str(home)}, point)
        cluster = home / "cluster"
        current, node = load_cert(cluster / "ca.pem"), Node.of(cluster)
        work.expect(
            current.public_key() == load_key(cluster / "ca.key").public_key()
            and load_cert(node.pem).public_key() == load_key(node.pem).public_key()
            and load_cert(node.pem).issuer == current.subject
            and trusted(node.trust) == [current],
            f"authority, certificate and whom M1 believes do not fit after {point}",
        )
        work.expect(
            not read_round(cluster).pending
            and (home / "keys" / "ray.token").exists()
            and not (home / "keys" / "ray.token.next").exists(),
            f"the token was not taken over after {point}",
        )


#: Cases by their name: points, and whether the slice has them.
KINDS: dict[str, tuple[Sequence[str], bool]] = {
    "creation": (("store.file.created", "schema.step.applied", "schema.step.committed"), True),
    "migration": (("store.file.created", "schema.step.applied", "schema.step.committed"), False),
    "backups": (
        (
            "backup.store.copied",
            "backup.artifact.added",
            "backup.data.added",
            "backup.secrets.sealed",
            "backup.manifest.before",
            "backup.archive.flushed",
            "backup.archive.named",
        ),
        False,
    ),
    "restores": (
        (
            "restore.file.extracted",
            "restore.generation.before",
            "restore.generation.raised",
            "restore.leases.ended",
            "restore.mark.written",
            "restore.aside.moved",
            "restore.artifact.put",
            "restore.secret.put",
            "restore.config.put",
            "restore.store.put",
            "restore.data.put",
            "restore.mark.before_removal",
            "restore.mark.removed",
        ),
        False,
    ),
    "copies": (
        (
            "postgres.step.applied",
            "copy.table.sent",
            "copy.store.compared",
            "postgres.commit.before",
            "postgres.commit.after",
            "copy.store.committed",
        ),
        False,
    ),
    "copies-back": (("copy.back.sent", "copy.file.compared", "copy.file.named"), False),
    "certificates": (
        (
            "private.file.flushed",
            "private.file.named",
            "certificate.key.written",
            "certificate.pair.written",
        ),
        True,
    ),
    "authority": (
        (
            "certificate.issue.listed",
            "certificate.node.written",
            "certificate.trust.written",
            "certificate.answer.installed",
            "certificate.revoke.listed",
            "certificate.revocations.written",
            "certificate.rollover.begun",
            "certificate.rollover.kept",
            "certificate.rollover.signing",
            "certificate.rollover.ended",
            "credentials.round.announced",
            "credentials.token.taken",
            "credentials.round.ended",
        ),
        False,
    ),
}
_WORK: dict[str, Callable[[Any], Awaitable[None]]] = {
    "creation": _creation,
    "migration": _migration,
    "backups": _backups,
    "restores": _restores,
    "copies": _copies,
    "copies-back": _copies_back,
    "certificates": _certificates,
    "authority": _authority,
}


async def run(case: Case, folder: Path, spawner: Path, servers: Servers, line: str) -> Outcome:
    """Run one of these cases."""
    work = _Work(case, folder, spawner, servers, line)
    await work.link.open()
    try:
        await _WORK[case.options["kind"]](work)
    finally:
        await work.link.close()
    return work.out

"""The secrets of a running cluster, and the places where they must not be when a session ends."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from hcna_ray.config import Settings
from hcna_ray.durable import make_private_dir, write_private
from hcna_ray.security.keys import create_key, read_client_key
from hcna_ray.supervisor import backup
from hcna_ray.supervisor.control import invite
from hcna_ray.supervisor.invites import decode_code
from hcna_ray.supervisor.ports import marker_of
from hcna_ray.supervisor.processes import scan
from tests.support.canaries import Canaries, Hit

#: What is in the command line of nurseries and of the executors that they fork.
HANDLERS = b"hcna_ray.runtime.executor"
#: Letters at the end of the first line of a private key: what is in front says what it is, and what
#: comes behind, of one on a curve, is the public key.
PEM_LETTERS = 40


def plant(settings: Settings, canaries: Canaries) -> None:
    """Put secrets of ours where the product would take them from. Before the cluster is up."""
    make_private_dir(settings.keys_dir)
    # Hex, as the product wants it; nothing uses it while the cipher is off.
    bpcs = secrets.token_hex(32)
    write_private(settings.keys_dir / "bpcs.key", bpcs + "\n")
    canaries.add("bpcs key", bpcs)


def take_up(settings: Settings, canaries: Canaries) -> None:
    """Take up what the product has made for itself. The cluster is up."""
    now = time.time()
    owner = read_client_key(settings.keys_dir)
    assert owner is not None
    canaries.add("API key of the owner", owner)
    canaries.add("Ray's token", (settings.keys_dir / "ray.token").read_text().strip())
    made = create_key(settings.keys_dir, name="canary-unused", role="viewer", now=now)
    canaries.add("API key of a viewer", made)
    code = invite(settings, now=now)
    canaries.add("join code", code)
    canaries.add("token of the join code", decode_code(code).token)
    take_up_keys(settings, canaries)


def take_up_keys(settings: Settings, canaries: Canaries) -> None:
    """Take up the private keys that there are by now: some are made when they are first needed."""
    for path in sorted(settings.cluster_dir.rglob("*")):
        if path.is_file() and (letters := letters_of(path.read_text("utf-8", "replace"))):
            canaries.add(f"private key in {path.name}", letters)


def letters_of(pem: str) -> str:
    """Return letters of a private key that are its own, in one line as in a copy; '' if none is."""
    body = pem.partition("PRIVATE KEY-----\n")[2]
    return body.partition("\n")[0][-PEM_LETTERS:]


def back_up(settings: Settings, canaries: Canaries, folder: Path) -> None:
    """Make a backup without keys, and one with them under a passphrase."""
    passphrase = canaries.plant("passphrase of a backup")
    now = time.time()
    make_private_dir(folder)
    backup.backup(settings, to=folder / "plain.tar.zst", now=now)
    backup.backup(settings, to=folder / "keys.tar.zst", passphrase=passphrase, now=now)


def homes_of(settings: Settings) -> list[Path]:
    """Return where secrets are at home: directories for the owner alone."""
    return [settings.keys_dir, settings.cluster_dir]


def handlers_of(settings: Settings) -> list[int]:
    """Return the processes of an instance that run handlers, or fork those that do."""
    found = scan(marker_of(settings))
    return [one.pid for one in found if HANDLERS in _command(one.pid)]


def in_processes(settings: Settings, canaries: Canaries) -> list[Hit]:
    """Look at the command line of everybody, and at the environment of whatever is the instance's.

    Of other processes it says nothing: a client may well have its key in the environment.
    """
    own = [one.pid for one in scan(marker_of(settings))]
    return canaries.in_processes(environ=False) + canaries.in_processes(own)


def in_files(settings: Settings, canaries: Canaries) -> list[Hit]:
    """Look at logs, Ray's logs and dumps, the database, outputs, artifacts and backups."""
    folders = [settings.home, marker_of(settings).temp_dir]
    return canaries.in_folders(folders, homes=homes_of(settings))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

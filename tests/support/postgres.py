"""A PostgreSQL server of the tests' own: started by them, broken by them, ended by its pid.

It comes from the system's packages (Debian: ``postgresql``; see scripts/system_packages.sh), keeps
its data in a temporary directory, and syncs to disk as in production. ``initdb`` refuses to run as
root, so root runs it as the user that the package has made.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

#: Who owns the server's files when the tests run as root.
_ACCOUNT = "postgres"
_START_S = 60.0
_PR_SET_PDEATHSIG = 1
_CONFIG = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
unix_socket_permissions = 0700
fsync = on
full_page_writes = on
synchronous_commit = on
max_connections = 60
shared_buffers = 64MB
max_wal_size = 256MB
logging_collector = off
log_min_messages = warning
"""

_names = itertools.count(1)


class PostgresMissing(Exception):
    """There is no PostgreSQL here that could be started."""


class PostgresServer:
    """One server. It can be stopped, crashed and started again; its data stay until `remove`."""

    user = "hcna"

    def __init__(self) -> None:
        """Create the data directory; `start` starts the server.

        Raises:
            PostgresMissing: the programs are not installed, or nobody may run them.
        """
        self._bin = _programs()
        self._as = _runner()
        # Hard to miss in a log, and with what a URL must escape.
        self.password = f"p@ss/{secrets.token_hex(8)}"
        self.port = _free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="hcna-pg-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        if self._as:
            account = pwd.getpwnam(_ACCOUNT)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        secret = self.folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)  # Inside a directory of mode 0700.
        self._run(
            "initdb",
            *("--pgdata", str(self.data), "--username", self.user, "--pwfile", str(secret)),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"),
        )
        secret.unlink()
        config = _CONFIG.format(port=self.port, folder=self.folder)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(config)

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.folder / "log"

    def url(self, database: str, *, password: bool = True, options: str = "") -> str:
        """Return the URL of a database, over TCP."""
        secret = f":{quote(self.password, safe='')}" if password else ""
        return f"postgresql://{self.user}{secret}@127.0.0.1:{self.port}/{database}{options}"

    def create_database(self, template: str | None = None) -> str:
        """Create a database, by default an empty one, and return its name."""
        name = f"test{next(_names)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template or 'template0'}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database and end whatever uses it."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement with a connection of its own, and return what it found."""
        with psycopg.connect(self.url(database), autocommit=True) as db:
            cursor = db.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def shell(self, command: str) -> str:
        """Run a command line as an operator would, with this server's programs and password.

        Returns:
            What it wrote.
        """
        path = os.pathsep.join((str(self._bin), os.environ["PATH"]))
        done = subprocess.run(
            ["sh", "-euc", command],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "PGPASSWORD": self.password},
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    # -- life and death --------------------------------------------------------------------------

    def start(self, **settings: str) -> None:
        """Start the server and wait until it takes connections.

        Args:
            settings: Server settings that differ this time, e.g. ``fsync="off"``.
        """
        assert self._process is None, "it runs already"
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as, str(self._bin / "postgres"), "-D", str(self.data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        end = time.monotonic() + _START_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError as error:
                status = self._process.poll()
                if status is not None or time.monotonic() > end:
                    told = self.log.read_text(errors="replace")[-2000:]
                    raise PostgresMissing(f"the server did not start ({error}): {told}") from None
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """Process id of the server itself, which is not that of whoever ran it."""
        return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT is a fast shutdown, SIGQUIT an immediate one (like a crash)."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self.pid, how)
        process.wait(timeout=_START_S)

    def crash(self) -> None:
        """``kill -9`` of the server and of every process it has."""
        assert self._process is not None
        process, self._process = self._process, None
        server = self.pid
        children = _children(server)
        os.kill(server, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait(timeout=_START_S)
        # The next server refuses to start while one of the old ones holds the shared memory.
        end = time.monotonic() + _START_S
        while any(Path(f"/proc/{pid}").exists() for pid in (server, *children)):
            assert time.monotonic() < end, "the server's processes do not end"
            time.sleep(0.01)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop every process of the server in its tracks, and let them go on afterwards."""
        assert self._process is not None
        server = self.pid
        os.kill(server, signal.SIGSTOP)  # From here on it starts no more of them.
        stopped = [server, *_children(server)]
        for pid in stopped[1:]:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            # Whoever ran it as another user stops with it, and must go on too.
            for pid in (*stopped, self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def remove(self) -> None:
        """Stop the server and delete its data."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._as, str(self._bin / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise PostgresMissing(f"{program} failed: {done.stderr[-1000:]}")


@contextlib.contextmanager
def running_server() -> Iterator[PostgresServer]:
    """A server for some tests; they are skipped, loudly, where there can be none.

    ``HCNA_REQUIRE_ALL=1`` fails them instead.
    """
    try:
        server = PostgresServer()
        try:
            server.start()
        except BaseException:
            server.remove()
            raise
    except PostgresMissing as error:
        why = f"NO POSTGRESQL FOR THE TESTS: {error}"
        if os.environ.get("HCNA_REQUIRE_ALL") == "1":
            pytest.fail(why)
        pytest.skip(why)
    try:
        yield server
    finally:
        server.remove()


def _programs() -> Path:
    """Return the folder with ``initdb`` and ``postgres``: the newest that is installed."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    versions = sorted((int(path.parts[-3]), path.parent) for path in installed)
    if not versions:
        raise PostgresMissing("initdb is missing; as root: scripts/system_packages.sh")
    return versions[-1][1]


def _runner() -> list[str]:
    """Return what runs a command as somebody whom ``initdb`` accepts."""
    if os.geteuid():
        return []
    try:
        pwd.getpwnam(_ACCOUNT)
    except KeyError:
        raise PostgresMissing(f"root cannot run it, and there is no user {_ACCOUNT}") from None
    return ["runuser", "-u", _ACCOUNT, "--"]


def _end_with_parent() -> None:
    """Have Linux end the child when the tests are killed and can no longer do so."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _children(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in path.read_text().split()]
